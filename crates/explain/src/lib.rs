//! Where a request goes and why, answered by what decides it: `proxy-core`.
//!
//! In: configuration (YAML through `xds-gen`, or a proxy's own), and a connection with a request on it.
//! Out: every decision from the listener to the endpoint with its reasons, as data, text or JSON.
//! Never: a decision of its own. Whatever is compared, chosen or refused is so by `proxy-core`; this crate asks it in the proxy's order.
//!
//! ```text
//!  YAML ─► files ─► xds-gen ─┐
//!  config dump ──────────────┴─► Configuration ─► connection ─┬─► calls (Istio's simulator's form)
//!                                                            └─► walk: hop, upstream ─► trace ─► text, JSON
//! ```

mod address;
mod allowances;
mod args;
mod calls;
mod capture_rule;
mod configuration;
mod connection;
mod describe;
mod destination;
mod files;
mod hop;
mod mesh;
mod origin;
mod past;
mod request;
mod scope;
mod shapes;
mod sidecar;
#[cfg(test)]
mod tests;
mod text;
mod trace;
pub mod unused;
mod upstream;
mod vacancy;
mod walk;
pub mod words;
mod workloads;

pub use args::{Args, run};
pub use configuration::{Configuration, Resources};
pub use connection::{Arrival, Capture, ClientTls, Dial, Payload, Quirks};
pub use describe::{Args as DescribeArgs, run as describe};
pub use files::{Files, Sources};
pub use origin::blame;
pub use sidecar::{Args as SidecarArgs, run as sidecar};
pub use trace::{Explanation, Outcome, PassedOver, Side, Source, Step};
