//! The generators against istiod's own output, and against their own rules.

mod caches;
mod conformance;
mod stock;
