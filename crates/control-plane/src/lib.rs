//! The control plane: istiod's place in the mesh.
//!
//! ```text
//!  Update ─► world (one writer: store ─► PushContext ─► State) ─► source ─► ads ─► 15010, 15012
//!                                                        └─► webhook 15017, monitoring 15014
//!  CSR + token or certificate ─► identity ─► ca ─► 15012
//! ```
//!
//! In: objects, a MeshConfig, listeners that somebody else has bound. Out: xDS, certificates, admission
//! answers, debug pages.
//! Never: what is inside an Envoy resource; an identity that nobody verified; how an API server is asked (`kube-source`).

mod allocation;
mod args;
mod connection;
mod debug;
mod federation;
mod folder;
mod identity;
mod injection;
mod jwks;
mod metrics;
mod monitoring;
mod networks;
mod push_status;
mod registration;
mod secrets;
mod serve;
mod source;
mod sources;
mod status;
mod tls;
mod validate;
mod webhook;
mod world;

pub use args::{Args, keep_webhooks_trusting, run};
pub use identity::Tokens;
pub use injection::Injector;
pub use serve::{Handle, Listeners, ServeError, Settings, serve};
pub use status::{Laggard, Laggards, ProxyStatus, TypeStatus};
pub use validate::{ValidateArgs, crds, validate};
pub use world::{Reading, State, Update};
