//! Services that the platform does not know, added to the mesh by hand.

use crate::sidecar::WorkloadSelector;
use crate::wire::{enumeration, message};
use crate::workload_entry::WorkloadEntry;

message! {
    /// `networking.v1alpha3.ServiceEntry`.
    ServiceEntry {
        hosts: Vec<String>,
        addresses: Vec<String>,
        ports: Vec<ServicePort>,
        location: Location,
        resolution: Resolution,
        endpoints: Vec<WorkloadEntry>,
        workload_selector "workloadSelector": Option<WorkloadSelector>,
        export_to "exportTo": Vec<String>,
        subject_alt_names "subjectAltNames": Vec<String>,
    }
}

enumeration! {
    /// `networking.v1alpha3.ServiceEntry.Location`.
    Location {
        MeshExternal = 0 "MESH_EXTERNAL",
        MeshInternal = 1 "MESH_INTERNAL",
    }
}

enumeration! {
    /// `networking.v1alpha3.ServiceEntry.Resolution`.
    Resolution {
        None = 0 "NONE",
        Static = 1 "STATIC",
        Dns = 2 "DNS",
        DnsRoundRobin = 3 "DNS_ROUND_ROBIN",
        DynamicDns = 4 "DYNAMIC_DNS",
    }
}

message! {
    /// `networking.v1alpha3.ServicePort`.
    ServicePort {
        number: u32,
        protocol: String,
        name: String,
        target_port "targetPort": u32,
    }
}
