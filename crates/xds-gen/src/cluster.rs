//! Clusters: where requests can be sent (istiod `cluster.go`, `cluster_builder.go`).

mod inbound;
mod load_balancer;
mod policy;
mod upstream_tls;

use std::sync::Arc;

use envoy_api::Message;
use envoy_api::cluster::{
    Cluster, Filter,
    cluster::{
        ClusterDiscoveryType, CommonLbConfig, DiscoveryType, DnsLookupFamily, EdsClusterConfig, LbConfig, LbPolicy,
        OriginalDstLbConfig,
    },
};
use envoy_api::core::{
    self, BindConfig, HealthStatus, HealthStatusSet, Http1ProtocolOptions, Http2ProtocolOptions,
    HttpProtocolOptions as Common,
};
use envoy_api::endpoint::{ClusterLoadAssignment, LocalityLbEndpoints};
use envoy_api::pb::envoy::extensions::common::dynamic_forward_proxy::v3::DnsCacheConfig;
use envoy_api::pb::envoy::extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig;
use envoy_api::pb::envoy::extensions::upstreams::http::v3::{
    HttpProtocolOptions,
    http_protocol_options::{
        ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig, explicit_http_config::ProtocolConfig,
    },
};
use envoy_api::wire::Spliced;
use envoy_api::wkt;
use istio_api::DestinationRule;
use istio_api::destination_rule::{ConnectionPoolSettings, SimpleLb, Subset, TlsMode, TrafficPolicy};
use mesh_types::Protocol;
use push_context::Config;
use registry::{Port, Provider, Resolution, Service};

use crate::context::Context;
use crate::endpoint::Builder as EndpointBuilder;
use crate::names::{self, StatName};
use crate::notes::Notes;
use crate::proto::{ads, any, duration, extension, seconds, socket_address, structure, text, u32_value};
pub(crate) use load_balancer::consistent_hash;
pub(crate) use policy::{merged as merged_policy, preserve_case};

use policy::Draft;

/// A cluster that leads to a service.
pub(crate) type Made = Spliced<Cluster>;

/// All clusters of a proxy; of two with one name the first.
pub(crate) fn all(cx: &Context<'_>) -> Vec<Cluster> {
    let mut made = Vec::new();
    for service in cx.scope.services.iter() {
        outbound(cx, service, &mut made);
    }
    let mut out: Vec<Cluster> = made.into_iter().map(Made::into_message).collect();
    out.extend(fixed(cx));
    let mut seen = std::collections::HashSet::new();
    out.retain(|c| seen.insert(c.name.clone()));
    out
}

/// The clusters that do not lead to services: its own ports, and what was captured for elsewhere.
pub(crate) fn fixed(cx: &Context<'_>) -> Vec<Cluster> {
    let mut out = vec![black_hole(cx), passthrough(cx)];
    if cx.scope.dynamic_dns {
        out.push(by_any_name(cx));
    }
    inbound::all(cx, &mut out);
    out.push(inbound_passthrough(cx));
    out
}

/// The metadata exchange filter of TCP connections, which only Istio's Envoy has.
pub(super) fn metadata_exchange(cx: &Context<'_>) -> Vec<Filter> {
    cx.exchanges_over_tcp().then(|| exchange(cx)).into_iter().collect()
}

fn exchange(cx: &Context<'_>) -> Filter {
    Filter {
        name: crate::filters::METADATA_EXCHANGE.to_owned(),
        typed_config: Some(crate::filters::tcp_metadata_exchange(cx)),
        ..Filter::default()
    }
}

/// The same, encoded: every cluster has it.
fn metadata_exchange_bytes(cx: &Context<'_>) -> Arc<[u8]> {
    cx.common.exchange.get((), || exchange(cx).encode_to_vec().into())
}

/// The clusters of one service, with its subsets.
pub(crate) fn outbound(cx: &Context<'_>, service: &Service, out: &mut Vec<Made>) {
    if service.resolution == Resolution::Alias {
        return;
    }
    let rule = cx.scope.destination_rule(cx.node, &service.hostname, true);
    for port in service.ports.iter().filter(|p| p.protocol != Protocol::Udp) {
        let name = names::outbound(port.port, "", &service.hostname);
        if service.resolution == Resolution::DynamicDns && service.is_wildcard() {
            if matches!(port.protocol, Protocol::Http | Protocol::Tls | Protocol::Grpc | Protocol::Http2) {
                let cluster = dynamic_forward_proxy(name, crate::filters::dns_cache(cx, service), false);
                let mut draft = Draft::new(cluster, port, cx);
                draft.is_dynamic = true;
                policy::apply_rule(cx, &mut draft, service, port, rule);
                out.push(draft.finish());
            }
            continue;
        }
        let kind = discovery_type(cx, service);
        let endpoints = match kind {
            DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
                EndpointBuilder::new(cx, service, port.port, "", rule.map(|r| &r.spec)).dns_endpoints()
            }
            _ => Vec::new(),
        };
        let Some(mut cluster) = skeleton(cx, name, kind, endpoints, port, service) else { continue };
        if service.keeps_draining(&cx.push.settings) {
            // Envoy would drop draining endpoints; sessions that stick to one may still use it.
            let statuses =
                [HealthStatus::Healthy, HealthStatus::Draining, HealthStatus::Unknown, HealthStatus::Degraded];
            cluster.common_lb_config.get_or_insert_default().override_host_status =
                Some(HealthStatusSet { statuses: statuses.map(|status| status as i32).to_vec() });
        }
        let mut draft = Draft::of_service(cluster, port, cx, service);
        policy::apply_rule(cx, &mut draft, service, port, rule);
        let discovery = draft.kind();
        out.push(draft.finish());
        for subset in rule.into_iter().flat_map(|r| &r.spec.subsets) {
            if let Some(rule) = rule {
                out.extend(subset_cluster(cx, service, port, rule, subset, discovery));
            }
        }
    }
}

/// istiod's metric of clusters without endpoints that proxies look up by name.
pub(crate) const NO_DNS_NAMES: &str = "pilot_dns_cluster_without_endpoints";

/// What istiod counts when clusters of this service have no endpoints; nothing for those that need none.
pub(crate) fn without_endpoints(cx: &Context<'_>, service: &Service) -> Option<&'static str> {
    match discovery_type(cx, service) {
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => Some(NO_DNS_NAMES),
        DiscoveryType::Eds => Some("pilot_eds_no_instances"),
        _ => None,
    }
}

fn subset_cluster(
    cx: &Context<'_>,
    service: &Service,
    port: &Port,
    rule: &Config<DestinationRule>,
    subset: &Subset,
    discovery: Option<DiscoveryType>,
) -> Option<Made> {
    let name = names::outbound(port.port, &subset.name, &service.hostname);
    let lb = subset.traffic_policy.as_ref().and_then(|p| p.load_balancer.as_ref());
    let is_passthrough = lb.and_then(|lb| lb.simple) == Some(SimpleLb::Passthrough);
    let kind = match discovery {
        _ if is_passthrough => DiscoveryType::OriginalDst,
        Some(kind) => kind,
        None => return None,
    };
    let endpoints = match kind {
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
            EndpointBuilder::new(cx, service, port.port, &subset.name, Some(&rule.spec)).dns_endpoints()
        }
        _ => Vec::new(),
    };
    let cluster = skeleton(cx, name, kind, endpoints, port, service)?;
    let mut draft = Draft::of_service(cluster, port, cx, service);
    policy::apply_subset(cx, &mut draft, service, port, rule, subset);
    Some(draft.finish())
}

/// istiod `convertResolution`.
fn discovery_type(cx: &Context<'_>, service: &Service) -> DiscoveryType {
    match service.resolution {
        // Of a name's addresses that race for the connection any one is enough.
        Resolution::DnsLb if !service.races => DiscoveryType::StrictDns,
        Resolution::DnsLb | Resolution::DnsRoundRobinLb => DiscoveryType::LogicalDns,
        Resolution::Passthrough if cx.push.settings.headless_eds && service.provider == Provider::Kubernetes => {
            DiscoveryType::Eds
        }
        Resolution::Passthrough => DiscoveryType::OriginalDst,
        _ => DiscoveryType::Eds,
    }
}

/// istiod `buildCluster`: the parts that no policy changes. Nothing for DNS and static clusters without endpoints.
fn skeleton(
    cx: &Context<'_>,
    name: String,
    kind: DiscoveryType,
    endpoints: Vec<LocalityLbEndpoints>,
    port: &Port,
    service: &Service,
) -> Option<Cluster> {
    let pattern = &cx.push.mesh.outbound_cluster_stat_name;
    let subset = names::parse_outbound(&name).map_or("", |(_, subset, _)| subset);
    let mut cluster = Cluster {
        alt_stat_name: names::stat(&match pattern.is_empty() {
            true => name.clone(),
            false => StatName {
                host: &service.hostname,
                kubernetes: names::of_kubernetes(service),
                subset,
                port: port.port,
                port_name: &port.name,
                target: Some(0),
            }
            .fill(pattern),
        }),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
        common_lb_config: Some(CommonLbConfig::default()),
        ..Cluster::default()
    };
    match kind {
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => {
            let family = if service.races { DnsLookupFamily::All } else { lookup_family(cx) };
            cluster.dns_lookup_family = family as i32;
            let udp_max_queries = u32_value(cx.push.settings.dns_queries);
            let cares = CaresDnsResolverConfig { udp_max_queries, ..Default::default() };
            cluster.typed_dns_resolver_config = Some(extension("envoy.network.dns_resolver.cares", any(&cares)));
            #[allow(deprecated)] // What istiod sends.
            {
                cluster.dns_jitter = Some(duration(cx.push.settings.dns_jitter));
                cluster.dns_refresh_rate = cx.push.mesh.dns_refresh_rate.map(duration);
                cluster.respect_dns_ttl = true;
            }
        }
        DiscoveryType::OriginalDst => {
            if let Some(target) = service.passthrough_ports.get(&port.port) {
                cluster.lb_config = Some(LbConfig::OriginalDstLbConfig(OriginalDstLbConfig {
                    upstream_port_override: u32_value(u32::from(*target)),
                    ..Default::default()
                }));
            }
        }
        _ => {}
    }
    if matches!(kind, DiscoveryType::StrictDns | DiscoveryType::LogicalDns | DiscoveryType::Static) {
        if endpoints.is_empty() {
            return None;
        }
        cluster.load_assignment =
            Some(ClusterLoadAssignment { cluster_name: name.clone(), endpoints, ..Default::default() });
    }
    cluster.name = name;
    Some(cluster)
}

/// Which service a cluster leads to, for telemetry.
fn service_metadata(service: &Service) -> wkt::Value {
    let fields = structure([
        ("host", text(&service.hostname)),
        ("name", text(&service.name)),
        ("namespace", text(&service.namespace)),
    ]);
    wkt::Value { kind: Some(wkt::value::Kind::StructValue(fields)) }
}

/// istiod `SelectDNSLookupFamily`.
pub(crate) fn lookup_family(cx: &Context<'_>) -> DnsLookupFamily {
    match cx.node.ip_mode {
        push_context::IpMode::V6 if cx.push.settings.v4_outbound => DnsLookupFamily::All,
        push_context::IpMode::V6 => DnsLookupFamily::V6Only,
        push_context::IpMode::Dual if cx.dual_stack() => DnsLookupFamily::All,
        _ => DnsLookupFamily::V4Only,
    }
}

fn dynamic_forward_proxy(name: String, cache: DnsCacheConfig, allow_insecure_cluster_options: bool) -> Cluster {
    use envoy_api::cluster::cluster::CustomClusterType;
    use envoy_api::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3::{
        ClusterConfig, cluster_config::ClusterImplementationSpecifier,
    };
    let config = ClusterConfig {
        cluster_implementation_specifier: Some(ClusterImplementationSpecifier::DnsCacheConfig(cache)),
        allow_insecure_cluster_options,
        ..Default::default()
    };
    Cluster {
        alt_stat_name: names::stat(&name),
        lb_policy: LbPolicy::ClusterProvided as i32,
        cluster_discovery_type: Some(ClusterDiscoveryType::ClusterType(CustomClusterType {
            name: "envoy.clusters.dynamic_forward_proxy".to_owned(),
            typed_config: Some(any(&config)),
        })),
        name,
        ..Cluster::default()
    }
}

fn black_hole(cx: &Context<'_>) -> Cluster {
    Cluster {
        name: names::BLACK_HOLE.to_owned(),
        alt_stat_name: names::stat(names::BLACK_HOLE),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32)),
        connect_timeout: cx.push.mesh.connect_timeout.map(duration),
        ..Cluster::default()
    }
}

/// Whom a request's Host names, anywhere (istiod `buildAllowAnyDFPCluster`).
fn by_any_name(cx: &Context<'_>) -> Cluster {
    let tls = cx.push.mesh.outbound_traffic_policy.as_ref().and_then(|p| p.tls.as_ref());
    let tls = tls.filter(|tls| tls.mode != TlsMode::Disable);
    let name = names::ALLOW_ANY_DYNAMIC_DNS.to_owned();
    let cluster = dynamic_forward_proxy(name, crate::filters::any_dns_cache(cx), tls.is_none());
    let mut draft = Draft { is_dynamic: true, ..Draft::from(cluster) };
    policy::connection_pool(cx, &mut draft, &ConnectionPoolSettings::default(), None);
    draft.cluster.typed_extension_protocol_options.insert(policy::HTTP_OPTIONS.to_owned(), any(&as_client(cx)));
    if let Some(tls) = tls {
        draft.cluster.transport_socket = upstream_tls::without_service(cx, &mut draft, tls);
    }
    draft.cluster.filters = metadata_exchange(cx);
    draft.finish().into_message()
}

/// HTTP as the client speaks it.
fn as_client(cx: &Context<'_>) -> HttpProtocolOptions {
    let http1 = match policy::preserves_case(cx) {
        true => preserve_case(),
        false => Http1ProtocolOptions::default(),
    };
    HttpProtocolOptions {
        common_http_protocol_options: Some(Common { idle_timeout: Some(seconds(300)), ..Common::default() }),
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(
            UseDownstreamHttpConfig {
                http_protocol_options: Some(http1),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..Default::default()
            },
        )),
        ..HttpProtocolOptions::default()
    }
}

/// Where a connection wanted to go before it was captured.
fn passthrough(cx: &Context<'_>) -> Cluster {
    let cluster = Cluster {
        name: names::PASSTHROUGH.to_owned(),
        alt_stat_name: names::stat(names::PASSTHROUGH),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32)),
        lb_policy: LbPolicy::ClusterProvided as i32,
        ..Cluster::default()
    };
    let mut draft = Draft::from(cluster);
    let default = cx.push.mesh.default_traffic_policy.as_ref().and_then(|p| p.connection_pool.clone());
    policy::connection_pool(cx, &mut draft, &default.unwrap_or_default(), None);
    let mut cluster = draft.cluster;
    cluster.typed_extension_protocol_options.insert(policy::HTTP_OPTIONS.to_owned(), any(&as_client(cx)));
    cluster.filters = metadata_exchange(cx);
    cluster
}

fn inbound_passthrough(cx: &Context<'_>) -> Cluster {
    let (v4, v6) = (cx.node.supports_v4(), cx.node.supports_v6());
    let mut bind = bind_config(if v4 { "127.0.0.6" } else { "::6" });
    if v4 && v6 {
        bind.extra_source_addresses.push(extra_source("::6"));
    }
    Cluster {
        name: names::INBOUND_PASSTHROUGH.to_owned(),
        filters: Vec::new(),
        upstream_bind_config: Some(bind),
        ..passthrough(cx)
    }
}

/// Inbound connections to the application come from here, so that its replies are not captured again.
fn bind_config(address: &str) -> BindConfig {
    BindConfig { source_address: Some(socket_address(address, 0)), ..BindConfig::default() }
}

fn extra_source(address: &str) -> core::ExtraSourceAddress {
    core::ExtraSourceAddress { address: Some(socket_address(address, 0)), ..Default::default() }
}

/// Endpoints of the cluster come by EDS under its own name.
fn eds(name: &str) -> EdsClusterConfig {
    EdsClusterConfig { eds_config: Some(ads()), service_name: name.to_owned() }
}

/// Notes which rule shaped the cluster.
fn note_rule(notes: &mut Notes, rule: &Config<DestinationRule>, policy: Option<&TrafficPolicy>) {
    notes.config("destination-rule", &rule.namespace, &rule.name);
    if policy.and_then(|p| p.tls.as_ref()).is_some_and(|t| matches!(t.mode, TlsMode::Simple | TlsMode::Mutual)) {
        notes.text("alpn_override", "false");
    }
}

/// HTTP/2 or HTTP/1 towards the cluster, whatever the client speaks.
fn explicit(config: ProtocolConfig) -> UpstreamProtocolOptions {
    UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig { protocol_config: Some(config) })
}
