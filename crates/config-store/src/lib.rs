//! Kubernetes and Istio objects by kind, namespace and name.
//!
//! In: manifests, or objects that a program made. Out: [`Snapshot`]s that never change, and a [`Change`] for
//! every object that did. An object that istiod would refuse is [`Rejected`], and what was stored before stays.
//! Never: files, a Kubernetes API client, what the objects mean for a proxy.

mod compact;
mod kind;
mod object;
mod patch_value;
mod snapshot;
mod store;

pub use compact::Compact;
pub use kind::Kind;
pub use object::{Body, Key, Object, Origin};
pub use patch_value::{InvalidValue, patch_value};
pub use snapshot::Snapshot;
pub use store::{Change, Rejected, Store};
