//! MeshNetworks: which endpoints are in which network, and the gateways between networks.

use std::collections::BTreeMap;

use crate::wire::message;

message! {
    /// `mesh.v1alpha1.Network`.
    Network {
        endpoints: Vec<NetworkEndpoints>,
        gateways: Vec<IstioNetworkGateway>,
    }
}

message! {
    /// `mesh.v1alpha1.Network.NetworkEndpoints`.
    NetworkEndpoints {
        from_cidr "fromCidr": Option<String>,
        from_registry "fromRegistry": Option<String>,
    }
}

message! {
    /// `mesh.v1alpha1.Network.IstioNetworkGateway`.
    IstioNetworkGateway {
        registry_service_name "registryServiceName": Option<String>,
        address: Option<String>,
        port: u32,
        locality: String,
    }
}

message! {
    /// `mesh.v1alpha1.MeshNetworks`.
    MeshNetworks {
        networks: BTreeMap<String, Network>,
    }
}
