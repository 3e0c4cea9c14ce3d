//! A Kubernetes API server as a source of configuration, and what a control plane writes back to it.
//!
//! ```text
//!  API server ─ list, watch ─► trim ─► batches of Change ─► control-plane's store
//!  tokens ─► TokenReview       root certificate ─► ConfigMap istio-ca-root-cert, webhooks' caBundle
//! ```
//!
//! In: a kubeconfig, or the service account of the pod we run in. Out: [`Change`]s: at first one batch with all
//! there is, then what changed. A server that is away is asked again with back-off; nothing is taken back meanwhile.
//! Never: what the objects mean.

mod addresses;
mod apply;
mod client;
mod config_map;
mod crds;
mod documents;
mod kinds;
mod lease;
mod machines;
mod review;
mod root_cert;
mod secrets;
mod trim;
mod watch;
mod webhooks;

pub use apply::{ApplyError, Removal};
pub use client::{Cluster, ConnectError, Notice, Options};
pub use crds::crds;
pub use review::{Account, ReviewError};
pub use root_cert::ROOT_CERT_CONFIG_MAP;
pub use secrets::SecretError;
pub use watch::Change;
pub use webhooks::INJECTOR;
