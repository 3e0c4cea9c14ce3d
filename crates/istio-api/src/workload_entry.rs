//! One workload outside Kubernetes, such as a virtual machine.

use std::collections::BTreeMap;

use crate::wire::message;

message! {
    /// `networking.v1alpha3.WorkloadEntry`.
    WorkloadEntry {
        address: String,
        ports: BTreeMap<String, u32>,
        labels: BTreeMap<String, String>,
        network: String,
        locality: String,
        weight: u32,
        service_account "serviceAccount": String,
    }
}
