//! The data plane: sockets, TLS, HTTP/1 and HTTP/2, pools, access log and stats around `proxy-core`.
//!
//! ```text
//!  bootstrap, ADS, SDS, DNS ──► control (one writer) ──► tables (Arc) ──► worker 1..N, each a thread with its own
//!                                                                         listeners, pools, counters
//!  client ─► downstream (chain) ─► hcm | tcp ─► proxy-core decides ─► upstream (pool) ─► host
//! ```
//!
//! In: an Envoy v3 bootstrap, certificates, a way to the control plane. Out: bytes moved, logs, counters, an admin port.
//! Never: decisions of its own (those are `proxy-core`'s), YAML of users, knowledge of Kubernetes.

mod admin;
mod args;
mod bootstrap;
mod checks;
mod control;
mod dns;
mod downstream;
mod drain;
mod ejection;
mod events;
mod export;
#[cfg(test)]
mod fuzz;
mod h1;
mod hcm;
mod inspect;
mod internal;
mod io;
mod jwks;
mod keepalive;
mod log;
mod overload;
mod peer;
mod proxy_protocol;
mod runtime;
mod socket;
mod sources;
mod start;
mod stats;
mod stream;
mod tcp;
mod tls;
mod upstream;
mod wire;
mod worker;
mod xds;

pub use args::{Args, run};
pub use bootstrap::InvalidBootstrap;
pub use drain::DrainStrategy;
pub use start::{Handle, Options, StartError, start};
