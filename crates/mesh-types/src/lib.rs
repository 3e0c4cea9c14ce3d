//! The vocabulary of the mesh: names, identities and protocols that every crate shares.
//!
//! In: text as users and Kubernetes write it. Out: checked values that print as they were read.
//! Never: I/O, clocks, protobuf. A change here recompiles nearly everything, so it stays small.

mod hostname;
mod protocol;
mod spiffe;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use hostname::{Hostname, InvalidHostname};
pub use protocol::Protocol;
pub use spiffe::{InvalidSpiffeId, SpiffeId};

/// A string that is cheap to clone and never changes.
pub type ArcStr = Arc<str>;

/// Kubernetes labels or annotations, sorted by key so that output is stable.
pub type Labels = BTreeMap<String, String>;

/// Whether every pair of `selector` is in `labels`. An empty selector selects everything.
pub fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selector_needs_every_pair() {
        let labels = Labels::from([("app".into(), "reviews".into()), ("version".into(), "v1".into())]);
        assert!(selects(&Labels::new(), &labels));
        assert!(selects(&Labels::from([("app".into(), "reviews".into())]), &labels));
        assert!(!selects(&Labels::from([("app".into(), "ratings".into())]), &labels));
        assert!(!selects(&Labels::from([("tier".into(), "x".into())]), &labels));
    }
}
