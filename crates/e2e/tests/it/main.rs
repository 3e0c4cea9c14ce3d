//! One binary for all end-to-end tests: linking is the slow part.

mod agent;
mod bad_input;
mod bookinfo;
mod browser;
mod changes;
mod envoy;
mod interop;
mod templates;
mod traces;
