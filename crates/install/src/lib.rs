//! `outrigger install` and `outrigger uninstall`.
//!
//! In: a revision, images, values. Out: manifests, printed or applied to an API server, and taken away again.
//! Never: how the control plane works; it is described by its flags, ports and ConfigMaps only.
//!
//! ```text
//!  choices ─► manifests (CRDs, namespace, RBAC, ConfigMaps, webhooks, Service, Deployment) ─► print | apply | remove
//! ```

mod args;
mod manifests;
mod webhooks;

pub use args::{InstallArgs, UninstallArgs, install, uninstall};
pub use manifests::{Choices, manifests};
