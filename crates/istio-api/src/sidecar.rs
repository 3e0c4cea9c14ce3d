//! What one sidecar listens on and what it may see of the mesh.

use std::collections::BTreeMap;

use crate::destination_rule::ConnectionPoolSettings;
use crate::gateway::ServerTlsSettings;
use crate::virtual_service::Destination;
use crate::wire::{enumeration, message};

message! {
    /// `networking.v1alpha3.Sidecar`.
    Sidecar {
        workload_selector "workloadSelector": Option<WorkloadSelector>,
        ingress: Vec<IstioIngressListener>,
        egress: Vec<IstioEgressListener>,
        inbound_connection_pool "inboundConnectionPool": Option<ConnectionPoolSettings>,
        outbound_traffic_policy "outboundTrafficPolicy": Option<OutboundTrafficPolicy>,
    }
}

message! {
    /// `networking.v1alpha3.IstioIngressListener`.
    IstioIngressListener {
        port: Option<SidecarPort>,
        bind: String,
        capture_mode "captureMode": CaptureMode,
        default_endpoint "defaultEndpoint": String,
        tls: Option<ServerTlsSettings>,
        connection_pool "connectionPool": Option<ConnectionPoolSettings>,
    }
}

message! {
    /// `networking.v1alpha3.IstioEgressListener`.
    IstioEgressListener {
        port: Option<SidecarPort>,
        bind: String,
        capture_mode "captureMode": CaptureMode,
        hosts: Vec<String>,
    }
}

message! {
    /// `networking.v1alpha3.WorkloadSelector`.
    WorkloadSelector {
        labels: BTreeMap<String, String>,
    }
}

message! {
    /// `networking.v1alpha3.OutboundTrafficPolicy`.
    OutboundTrafficPolicy {
        mode: OutboundTrafficPolicyMode,
        egress_proxy "egressProxy": Option<Destination>,
    }
}

enumeration! {
    /// `networking.v1alpha3.OutboundTrafficPolicy.Mode`.
    OutboundTrafficPolicyMode {
        RegistryOnly = 0 "REGISTRY_ONLY",
        AllowAny = 1 "ALLOW_ANY",
    }
}

message! {
    /// `networking.v1alpha3.SidecarPort`.
    SidecarPort {
        number: u32,
        protocol: String,
        name: String,
        target_port "targetPort": u32,
    }
}

enumeration! {
    /// `networking.v1alpha3.CaptureMode`.
    CaptureMode {
        Default = 0 "DEFAULT",
        Iptables = 1 "IPTABLES",
        None = 2 "NONE",
    }
}
