//! How a process of ours starts, is watched, and ends: signals, drain, readiness, logging, metrics, admin HTTP.
//!
//! In: nothing but the caller's arguments. Out: small building blocks that know no role.
//! Never: meshes, proxies, configuration.

pub mod blocks;
pub mod drain;
pub mod http;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod names;
pub mod readiness;
pub mod signal;
