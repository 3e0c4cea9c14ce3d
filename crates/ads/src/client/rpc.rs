//! Which gRPC method a stream is: the aggregated one, or that of a single type.

use crate::Protocol;
use envoy_api::type_url;
use http::uri::PathAndQuery;

/// A discovery service's two streams.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rpc {
    sotw: &'static str,
    delta: &'static str,
}

macro_rules! rpc {
    ($service:literal, $sotw:literal, $delta:literal) => {
        Rpc {
            sotw: concat!("/envoy.service.", $service, "/", $sotw),
            delta: concat!("/envoy.service.", $service, "/", $delta),
        }
    };
}

impl Rpc {
    /// All types on one stream.
    pub const AGGREGATED: Rpc =
        rpc!("discovery.v3.AggregatedDiscoveryService", "StreamAggregatedResources", "DeltaAggregatedResources");

    /// The service of one type, for those that have one.
    pub fn of(type_url: &str) -> Option<Rpc> {
        Some(match type_url {
            type_url::CLUSTER => rpc!("cluster.v3.ClusterDiscoveryService", "StreamClusters", "DeltaClusters"),
            type_url::ENDPOINT => rpc!("endpoint.v3.EndpointDiscoveryService", "StreamEndpoints", "DeltaEndpoints"),
            type_url::LISTENER => rpc!("listener.v3.ListenerDiscoveryService", "StreamListeners", "DeltaListeners"),
            type_url::ROUTE => rpc!("route.v3.RouteDiscoveryService", "StreamRoutes", "DeltaRoutes"),
            type_url::SECRET => rpc!("secret.v3.SecretDiscoveryService", "StreamSecrets", "DeltaSecrets"),
            _ => return None,
        })
    }

    pub(super) fn path(self, protocol: Protocol) -> PathAndQuery {
        PathAndQuery::from_static(match protocol {
            Protocol::StateOfTheWorld => self.sotw,
            Protocol::Delta => self.delta,
        })
    }
}
