//! Whether inbound connections must use mutual TLS.

use std::collections::BTreeMap;

use crate::selector::WorkloadSelector;
use crate::wire::{enumeration, message};

message! {
    /// `security.v1beta1.PeerAuthentication`.
    PeerAuthentication {
        selector: Option<WorkloadSelector>,
        mtls: Option<MutualTls>,
        port_level_mtls "portLevelMtls": BTreeMap<u32, MutualTls>,
    }
}

message! {
    /// `security.v1beta1.PeerAuthentication.MutualTLS`.
    MutualTls {
        mode: MutualTlsMode,
    }
}

enumeration! {
    /// `security.v1beta1.PeerAuthentication.MutualTLS.Mode`.
    MutualTlsMode {
        Unset = 0 "UNSET",
        Disable = 1 "DISABLE",
        Permissive = 2 "PERMISSIVE",
        Strict = 3 "STRICT",
    }
}
