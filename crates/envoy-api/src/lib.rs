//! Envoy v3 types, type URLs, and canonical JSON: the one crate that knows where they come from.
//!
//! In: protobuf messages or their bytes. Out: the same, typed, as `Any`, or as proto3 JSON.
//! Never: decisions. Generators and the proxy decide; this crate only names.

pub use envoy_types::pb;
pub use pb::google::protobuf::{self as wkt, Any};
pub use prost::{Message, Name};

/// `envoy.admin.v3`.
pub use pb::envoy::admin::v3 as admin;
/// `envoy.config.bootstrap.v3`.
pub use pb::envoy::config::bootstrap::v3 as bootstrap;
/// `envoy.config.cluster.v3`.
pub use pb::envoy::config::cluster::v3 as cluster;
/// `envoy.config.core.v3`.
pub use pb::envoy::config::core::v3 as core;
/// `envoy.config.endpoint.v3`.
pub use pb::envoy::config::endpoint::v3 as endpoint;
/// `envoy.config.listener.v3`.
pub use pb::envoy::config::listener::v3 as listener;
/// `envoy.config.route.v3`.
pub use pb::envoy::config::route::v3 as route;
/// `envoy.extensions.filters.network.http_connection_manager.v3`.
pub use pb::envoy::extensions::filters::network::http_connection_manager::v3 as http;
/// `envoy.extensions.transport_sockets.tls.v3`.
pub use pb::envoy::extensions::transport_sockets::tls::v3 as tls;
/// `envoy.service.discovery.v3`.
pub use pb::envoy::service::discovery::v3 as discovery;

mod canonical;
pub mod istio;
pub mod json;
mod resource;
pub mod transcode;
pub mod wire;
pub mod xds;

pub use resource::{Resource, encode};

/// Type URLs of the resources that a sidecar subscribes to.
pub mod type_url {
    /// `envoy.config.listener.v3.Listener` (LDS).
    pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    /// `envoy.config.route.v3.RouteConfiguration` (RDS).
    pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    /// `envoy.config.cluster.v3.Cluster` (CDS).
    pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    /// `envoy.config.endpoint.v3.ClusterLoadAssignment` (EDS).
    pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    /// `envoy.extensions.transport_sockets.tls.v3.Secret` (SDS).
    pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    /// `envoy.config.core.v3.TypedExtensionConfig` (ECDS).
    pub const EXTENSION: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
    /// Istio's name table (NDS), istio `pilot/pkg/xds/v3/model.go`.
    pub const NAME_TABLE: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";
    /// Istio's: what an agent says of its workload's health, a request that nothing answers.
    pub const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";
}

/// Packs a message as Envoy expects it: `type.googleapis.com/` before the full name.
pub fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

/// Unpacks a message, or says what was found instead.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M, UnpackError> {
    let found = any.type_url.rsplit('/').next().unwrap_or_default();
    if found != M::full_name() {
        return Err(UnpackError::Type { expected: M::full_name(), found: found.to_owned() });
    }
    M::decode(any.value.as_slice()).map_err(|source| UnpackError::Bytes { name: M::full_name(), source })
}

/// An `Any` that does not hold the message that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Another message.
    #[error("expected {expected}, found {found}")]
    Type { expected: String, found: String },
    /// Bytes that are no such message.
    #[error("malformed {name}")]
    Bytes {
        name: String,
        #[source]
        source: prost::DecodeError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpack_names_the_wrong_type() {
        let packed = any(&core::Node { id: "a".into(), ..Default::default() });
        assert_eq!(packed.type_url, "type.googleapis.com/envoy.config.core.v3.Node");
        assert_eq!(unpack::<core::Node>(&packed).unwrap().id, "a");
        assert!(matches!(unpack::<core::Address>(&packed), Err(UnpackError::Type { .. })));
        let broken = Any { value: vec![0xff; 3], ..packed };
        assert!(matches!(unpack::<core::Node>(&broken), Err(UnpackError::Bytes { .. })));
    }
}
