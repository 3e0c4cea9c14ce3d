//! Selectors shared by security, telemetry and extension resources.

use std::collections::BTreeMap;

use crate::wire::{enumeration, message};

message! {
    /// `type.v1beta1.WorkloadSelector`.
    WorkloadSelector {
        match_labels "matchLabels": BTreeMap<String, String>,
    }
}

message! {
    /// `type.v1beta1.PortSelector`.
    PortSelector {
        number: u32,
    }
}

message! {
    /// `type.v1beta1.PolicyTargetReference`.
    PolicyTargetReference {
        group: String,
        kind: String,
        name: String,
        namespace: String,
    }
}

enumeration! {
    /// `type.v1beta1.WorkloadMode`.
    WorkloadMode {
        Undefined = 0 "UNDEFINED",
        Client = 1 "CLIENT",
        Server = 2 "SERVER",
        ClientAndServer = 3 "CLIENT_AND_SERVER",
    }
}
