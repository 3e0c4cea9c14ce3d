//! One binary for all end-to-end tests: linking is the slow part.

mod agent;
mod analyze;
mod answers;
mod answers_tour;
mod bad_input;
mod bookinfo;
mod browser;
mod changes;
mod conformance;
mod envoy;
mod interop;
mod join;
mod output;
mod sidecar;
mod templates;
mod traces;
