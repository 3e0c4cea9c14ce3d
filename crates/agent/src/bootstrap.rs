//! The bootstrap of our own proxy, in memory: node, admin port, and that everything else comes by ADS.
//!
//! Ports 15021 and 15090, which Envoy's bootstrap has listeners for, are the agent's own here.

use envoy_api::bootstrap::bootstrap::DynamicResources;
use envoy_api::bootstrap::{Admin, Bootstrap};
use envoy_api::core::config_source::ConfigSourceSpecifier;
use envoy_api::core::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_api::core::socket_address::PortSpecifier;
use envoy_api::core::{
    Address, AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, GrpcService, SocketAddress, address,
    api_config_source,
};
use envoy_api::wkt;

use crate::settings::Settings;

/// The name by which Istio's configuration refers to the control plane.
pub(crate) const XDS_CLUSTER: &str = "xds-grpc";

/// Makes the bootstrap.
pub(crate) fn bootstrap(settings: &Settings) -> Bootstrap {
    let ads = || ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
        // Wait for the control plane as long as it takes.
        initial_fetch_timeout: Some(wkt::Duration { seconds: 0, nanos: 0 }),
        resource_api_version: ApiVersion::V3 as i32,
        ..Default::default()
    };
    let api_type =
        if settings.discovery.delta { api_config_source::ApiType::DeltaGrpc } else { api_config_source::ApiType::Grpc };
    let xds = GrpcService {
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            cluster_name: XDS_CLUSTER.to_owned(),
            ..Default::default()
        })),
        ..Default::default()
    };
    Bootstrap {
        node: Some(settings.node.clone()),
        admin: Some(Admin { address: Some(localhost(settings.ports.admin)), ..Default::default() }),
        dynamic_resources: Some(DynamicResources {
            lds_config: Some(ads()),
            cds_config: Some(ads()),
            ads_config: Some(ApiConfigSource {
                api_type: api_type as i32,
                transport_api_version: ApiVersion::V3 as i32,
                set_node_on_first_message_only: true,
                grpc_services: vec![xds],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn localhost(port: u16) -> Address {
    let socket = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port.into())),
        ..Default::default()
    };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}
