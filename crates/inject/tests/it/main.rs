//! Reference data and properties.

mod builtin;
mod conformance;
mod fuzz;
mod originals;
mod properties;
