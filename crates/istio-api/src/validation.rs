//! What istiod's validation refuses or warns of (istio `pkg/config/validation`), kind by kind.
//!
//! Every kind has `validate(&self, namespace)`, where `namespace` is the one the resource lives in.

mod cel;
mod check;
mod destination_rule;
mod extensions;
mod gateway_api;
mod mesh;
mod security;
mod service_entry;
mod sidecar;
mod telemetry;
mod text;
mod virtual_service;

use check::Check;

#[cfg(test)]
mod tests;
