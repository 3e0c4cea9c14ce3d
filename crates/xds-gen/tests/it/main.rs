//! The generators against istiod's own output, and against their own rules.

mod conformance;
mod stock;
