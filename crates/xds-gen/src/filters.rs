//! Filters that look the same in every listener (istiod `pilot/pkg/xds/filters`).

use std::collections::BTreeSet;
use std::sync::OnceLock;

use envoy_api::http::{HttpFilter, http_filter::ConfigType};
use envoy_api::istio::{AlpnConfig, AlpnOverride};
use envoy_api::listener::Filter;
use envoy_api::pb::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use envoy_api::pb::envoy::extensions::filters::http::{
    cors::v3::Cors, fault::v3::HttpFault, grpc_stats::v3::FilterConfig as GrpcStats, grpc_web::v3::GrpcWeb,
    router::v3::Router,
};
use envoy_api::pb::envoy::extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig;
use envoy_api::{Any, Message, Name};
use registry::Service;
use serde_json::{Value, json};

use crate::context::Context;
use crate::proto::{any, bool_value, network_filter, typed_struct};
use crate::tls::strings;

pub(crate) const METADATA_EXCHANGE: &str = "istio.metadata_exchange";
pub(crate) const HTTP_CONNECTION_MANAGER: &str = "envoy.filters.network.http_connection_manager";
pub(crate) const STATEFUL_SESSION: &str = "envoy.filters.http.stateful_session";
pub(crate) const TCP_PROXY: &str = "envoy.filters.network.tcp_proxy";
pub(crate) const SNI_FORWARD_PROXY: &str = "envoy.extensions.filters.network.sni_dynamic_forward_proxy";

pub(crate) fn http<M: Message + Name>(name: &str, config: &M) -> HttpFilter {
    http_any(name, any(config))
}

pub(crate) fn http_any(name: &str, config: Any) -> HttpFilter {
    HttpFilter { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)), ..HttpFilter::default() }
}

pub(crate) fn tcp_metadata_exchange(cx: &Context<'_>) -> Any {
    let make = |labels: &str| {
        let config = json!({"protocol": "istio-peer-exchange", "enable_discovery": true});
        let url = "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange";
        typed_struct(url, &with_labels(config, labels))
    };
    // Every cluster has it.
    static EXCHANGE: OnceLock<Any> = OnceLock::new();
    match &*cx.push.settings.exchanged_labels {
        "" => EXCHANGE.get_or_init(|| make("")).clone(),
        labels => make(labels),
    }
}

/// Names further labels to exchange.
fn with_labels(mut config: Value, labels: &str) -> Value {
    if !labels.is_empty() {
        config["additional_labels"] = labels.split(',').collect::<BTreeSet<_>>().into_iter().collect();
    }
    config
}

/// The network filter that tells both ends of a TCP connection about each other; only Istio's Envoy has it.
pub(crate) fn network_metadata_exchange(cx: &Context<'_>) -> Option<Filter> {
    cx.exchanges_over_tcp().then(|| network_filter(METADATA_EXCHANGE, tcp_metadata_exchange(cx)))
}

/// The HTTP filter of the same purpose.
pub(crate) fn peer_metadata(cx: &Context<'_>, inbound: bool, skip_headers: bool) -> Option<HttpFilter> {
    /// Inbound, outbound, and outbound without headers for those outside of the mesh.
    static CONFIGS: OnceLock<[Any; 3]> = OnceLock::new();
    let make = |labels: &str| {
        let discovery = json!([{"istio_headers": {}}, {"workload_discovery": {}}]);
        let (all, in_mesh) =
            (json!([{"istio_headers": {}}]), json!([{"istio_headers": {"skip_external_clusters": true}}]));
        let configs = [
            json!({"downstream_discovery": discovery, "downstream_propagation": all}),
            json!({"upstream_discovery": discovery, "upstream_propagation": all}),
            json!({"upstream_discovery": discovery, "upstream_propagation": in_mesh}),
        ];
        let url = "type.googleapis.com/io.istio.http.peer_metadata.Config";
        configs.map(|config| typed_struct(url, &with_labels(config, labels)))
    };
    let kind = match (inbound, skip_headers) {
        (true, _) => 0,
        (false, false) => 1,
        (false, true) => 2,
    };
    let config = || match &*cx.push.settings.exchanged_labels {
        "" => CONFIGS.get_or_init(|| make(""))[kind].clone(),
        labels => make(labels)[kind].clone(),
    };
    let wanted = cx.has_istio_filters() && cx.push.settings.metadata_exchange;
    wanted.then(|| http_any(METADATA_EXCHANGE, config()))
}

/// Tells the server by ALPN that HTTP follows.
pub(crate) fn alpn() -> HttpFilter {
    let line = |upstream_protocol, names: [&str; 3]| AlpnOverride { upstream_protocol, alpn_override: strings(&names) };
    let config = AlpnConfig {
        alpn_override: vec![
            line(0, ["istio-http/1.0", "istio", "http/1.0"]),
            line(1, ["istio-http/1.1", "istio", "http/1.1"]),
            line(2, ["istio-h2", "istio", "h2"]),
        ],
    };
    http("istio.alpn", &config)
}

pub(crate) fn grpc_stats() -> HttpFilter {
    use envoy_api::pb::envoy::extensions::filters::http::grpc_stats::v3::filter_config::PerMethodStatSpecifier;
    let config = GrpcStats {
        emit_filter_state: true,
        per_method_stat_specifier: Some(PerMethodStatSpecifier::StatsForAllMethods(envoy_api::wkt::BoolValue {
            value: false,
        })),
        ..GrpcStats::default()
    };
    http("envoy.filters.http.grpc_stats", &config)
}

pub(crate) fn grpc_web() -> HttpFilter {
    http("envoy.filters.http.grpc_web", &GrpcWeb::default())
}

pub(crate) fn fault() -> HttpFilter {
    http("envoy.filters.http.fault", &HttpFault::default())
}

pub(crate) fn cors() -> HttpFilter {
    http("envoy.filters.http.cors", &Cors::default())
}

pub(crate) fn router(suppress_envoy_headers: bool) -> HttpFilter {
    http("envoy.filters.http.router", &Router { suppress_envoy_headers, ..Router::default() })
}

/// The DNS cache of one wildcard host; filter and cluster must name the same.
pub(crate) fn dns_cache(cx: &Context<'_>, service: &Service) -> DnsCacheConfig {
    DnsCacheConfig {
        name: dns_cache_name(&service.hostname),
        dns_lookup_family: crate::cluster::lookup_family(cx) as i32,
        ..DnsCacheConfig::default()
    }
}

/// istiod `model.BuildDNSCacheName`.
fn dns_cache_name(hostname: &str) -> String {
    format!("{hostname}_dfp_dns_cache")
}

pub(crate) fn sni_forward_proxy(cx: &Context<'_>, service: &Service, port: u16) -> Filter {
    use envoy_api::pb::envoy::extensions::filters::network::sni_dynamic_forward_proxy::v3::{
        FilterConfig, filter_config::PortSpecifier,
    };
    let config = FilterConfig {
        dns_cache_config: Some(dns_cache(cx, service)),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
        ..FilterConfig::default()
    };
    network_filter(SNI_FORWARD_PROXY, any(&config))
}

/// The names of all hosts outside of the mesh (istiod `buildAllowAnyDynamicDNSDNSCacheConfig`).
pub(crate) fn any_dns_cache(cx: &Context<'_>) -> DnsCacheConfig {
    // The agent knows names that the pod's own resolver does not.
    let agent = cx.node.dns_capture.then(|| {
        let named = cx.node.meta("DNS_PROXY_ADDR").and_then(|text| text.rsplit_once(':'));
        let (host, port) = named.unwrap_or(("localhost", "15053"));
        let host = if host == "localhost" { "127.0.0.1" } else { host.trim_matches(['[', ']']) };
        let resolver = crate::proto::address(host, port.parse().unwrap_or(15053));
        let cares = CaresDnsResolverConfig { resolvers: vec![resolver], ..CaresDnsResolverConfig::default() };
        crate::proto::extension("envoy.network.dns_resolver.cares", any(&cares))
    });
    DnsCacheConfig {
        name: "allow_any_dfp_dns_cache".to_owned(),
        dns_lookup_family: crate::cluster::lookup_family(cx) as i32,
        max_hosts: crate::proto::u32_value(cx.push.settings.dynamic_dns_hosts),
        typed_dns_resolver_config: agent,
        ..DnsCacheConfig::default()
    }
}

pub(crate) fn http_forward_proxy(cache: DnsCacheConfig) -> HttpFilter {
    use envoy_api::pb::envoy::extensions::filters::http::dynamic_forward_proxy::v3::{
        FilterConfig, filter_config::ImplementationSpecifier,
    };
    let config = FilterConfig {
        implementation_specifier: Some(ImplementationSpecifier::DnsCacheConfig(cache)),
        ..FilterConfig::default()
    };
    http("envoy.filters.http.dynamic_forward_proxy", &config)
}

pub(crate) fn yes() -> Option<envoy_api::wkt::BoolValue> {
    bool_value(true)
}
