//! Short names for the Envoy packages this crate reads.

pub(crate) use envoy_api::pb::google::protobuf::{Any, BoolValue, Duration, Struct, UInt32Value, Value};

pub(crate) use envoy_api::pb::envoy::config::accesslog::v3 as accesslog;
pub(crate) use envoy_api::pb::envoy::config::bootstrap::v3 as bootstrap;
pub(crate) use envoy_api::pb::envoy::config::cluster::v3 as cluster;
pub(crate) use envoy_api::pb::envoy::config::common::mutation_rules::v3 as mutation;
pub(crate) use envoy_api::pb::envoy::config::core::v3 as core;
pub(crate) use envoy_api::pb::envoy::config::endpoint::v3 as endpoint;
pub(crate) use envoy_api::pb::envoy::config::listener::v3 as listener;
pub(crate) use envoy_api::pb::envoy::config::metrics::v3 as metrics;
pub(crate) use envoy_api::pb::envoy::config::overload::v3 as overload;
pub(crate) use envoy_api::pb::envoy::config::rbac::v3 as rbac;
pub(crate) use envoy_api::pb::envoy::config::route::v3 as route;
pub(crate) use envoy_api::pb::envoy::config::trace::v3 as trace;
pub(crate) use envoy_api::pb::envoy::extensions as ext;
pub(crate) use envoy_api::pb::envoy::extensions::filters::http as http_filter;
pub(crate) use envoy_api::pb::envoy::extensions::filters::listener as listener_filter;
pub(crate) use envoy_api::pb::envoy::extensions::filters::network as network_filter;
pub(crate) use envoy_api::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
pub(crate) use envoy_api::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
pub(crate) use envoy_api::pb::envoy::r#type::matcher::v3 as matcher;
pub(crate) use envoy_api::pb::envoy::r#type::metadata::v3 as metadata_key;
pub(crate) use envoy_api::pb::envoy::r#type::tracing::v3 as tracing_tag;
pub(crate) use envoy_api::pb::envoy::r#type::v3 as kind;
pub(crate) use envoy_api::pb::google::api::expr::v1alpha1 as cel;
pub(crate) use envoy_api::pb::google::protobuf::value::Kind as ValueKind;
pub(crate) use envoy_api::pb::xds::core::v3 as xds;
pub(crate) use envoy_api::pb::xds::r#type::matcher::v3 as xds_matcher;
pub(crate) use envoy_api::pb::xds::r#type::v3 as xds_type;
