//! Against control planes with many clients, and against real proxies.

mod distribution;
mod tables;
