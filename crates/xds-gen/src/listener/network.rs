//! Filters of TCP connections (istiod `networkfilter.go`).

use envoy_api::istio::MySqlProxy;
use envoy_api::listener::Filter;
use envoy_api::pb::envoy::extensions::filters::network::{
    mongo_proxy::v3::MongoProxy,
    redis_proxy::v3::{
        RedisProxy,
        redis_proxy::{ConnPoolSettings, PrefixRoutes, prefix_routes},
    },
    tcp_proxy::v3::{
        TcpProxy,
        tcp_proxy::{ClusterSpecifier, TunnelingConfig, WeightedCluster, weighted_cluster::ClusterWeight},
    },
};
use envoy_api::pb::envoy::r#type::v3::{HashPolicy, hash_policy};
use istio_api::DestinationRule;
use istio_api::destination_rule::TunnelSettings;
use istio_api::virtual_service::RouteDestination;
use mesh_types::Protocol;
use registry::{Resolution, Service};

use super::{tcp_proxy_filter, to_cluster};
use crate::access_log::{self, Of};
use crate::context::Context;
use crate::filters::sni_forward_proxy;
use crate::names::{self, StatName};
use crate::proto::{any, duration, network_filter, parse_duration, seconds};
use crate::route::destination_cluster;
use crate::telemetry::Side;
use crate::wasm::{self, Phase};
use crate::{authz, filters};

/// The filters around the last ones: who may connect, what is counted.
fn complete(cx: &Context<'_>, side: Side, port: u16, last: Vec<Filter>) -> Vec<Filter> {
    if side == Side::Server {
        let exchange = filters::network_metadata_exchange(cx);
        return exchange.into_iter().chain(guarded(cx, side, port, last)).collect();
    }
    wrap(cx, side, port, false, last)
}

/// As [`complete`], with the policies of the proxy's own workload.
fn guarded(cx: &Context<'_>, side: Side, port: u16, last: Vec<Filter>) -> Vec<Filter> {
    wrap(cx, side, port, true, last)
}

fn wrap(cx: &Context<'_>, side: Side, port: u16, guarded: bool, last: Vec<Filter>) -> Vec<Filter> {
    let mut out = Vec::new();
    if guarded {
        out.extend(authz::tcp_custom(cx));
    }
    let plugins = |phase| wasm::network(cx, side, port, phase);
    out.extend(plugins(Phase::Authn).chain(plugins(Phase::Authz)));
    if guarded {
        out.extend(authz::tcp(cx));
    }
    out.extend(plugins(Phase::Stats).chain(plugins(Phase::Any)));
    out.extend(cx.tcp_filters(side));
    out.extend(last);
    out
}

fn stack(cx: &Context<'_>, protocol: Protocol, config: &TcpProxy) -> Vec<Filter> {
    let (settings, stat_prefix) = (&cx.push.settings, || config.stat_prefix.clone());
    let mut out = Vec::with_capacity(2);
    match protocol {
        Protocol::Mongo if settings.mongo_filter => {
            let mongo = MongoProxy { stat_prefix: stat_prefix(), ..MongoProxy::default() };
            out.push(network_filter("envoy.filters.network.mongo_proxy", any(&mongo)));
        }
        Protocol::MySql if settings.mysql_filter => {
            let mysql = MySqlProxy { stat_prefix: stat_prefix() };
            out.push(network_filter("envoy.filters.network.mysql_proxy", any(&mysql)));
        }
        Protocol::Redis if settings.redis_filter => return vec![redis(stat_prefix(), config)],
        _ => {}
    }
    out.push(tcp_proxy_filter(config));
    out
}

/// Redis is understood to the end: commands go to the first cluster.
fn redis(stat_prefix: String, config: &TcpProxy) -> Filter {
    let cluster = match &config.cluster_specifier {
        Some(ClusterSpecifier::Cluster(cluster)) => cluster.clone(),
        Some(ClusterSpecifier::WeightedClusters(all)) => {
            all.clusters.first().map(|c| c.name.clone()).unwrap_or_default()
        }
        None => String::new(),
    };
    let redis = RedisProxy {
        stat_prefix,
        latency_in_micros: true,
        settings: Some(ConnPoolSettings { op_timeout: Some(seconds(5)), ..ConnPoolSettings::default() }),
        prefix_routes: Some(PrefixRoutes {
            catch_all_route: Some(prefix_routes::Route { cluster, ..Default::default() }),
            ..PrefixRoutes::default()
        }),
        ..RedisProxy::default()
    };
    network_filter("envoy.filters.network.redis_proxy", any(&redis))
}

/// An inbound TCP port.
pub(super) fn inbound(cx: &Context<'_>, protocol: Protocol, cluster: &str, stat: &StatName<'_>) -> Vec<Filter> {
    let pattern = &cx.push.mesh.inbound_cluster_stat_name;
    let config = TcpProxy {
        stat_prefix: if pattern.is_empty() { cluster.to_owned() } else { stat.fill(pattern) },
        idle_timeout: parse_duration(&cx.node.idle_timeout),
        access_log: access_log::logs(cx, Side::Server, Of::Connections),
        ..to_cluster(cluster)
    };
    complete(cx, Side::Server, stat.port, stack(cx, protocol, &config))
}

fn tunnel(rule: &DestinationRule, subset: &str) -> Option<TunnelSettings> {
    let own = rule.subsets.iter().find(|s| s.name == subset).and_then(|s| s.traffic_policy.as_ref());
    own.and_then(|p| p.tunnel.clone()).or_else(|| rule.traffic_policy.as_ref()?.tunnel.clone())
}

fn apply_rule(cx: &Context<'_>, config: &mut TcpProxy, rule: Option<&DestinationRule>, subset: &str) {
    let policy = rule.and_then(|r| r.traffic_policy.as_ref());
    let tcp = policy.and_then(|p| p.connection_pool.as_ref()).and_then(|p| p.tcp.as_ref());
    config.idle_timeout =
        tcp.and_then(|t| t.idle_timeout).map(duration).or_else(|| parse_duration(&cx.node.idle_timeout));
    config.max_downstream_connection_duration = tcp.and_then(|t| t.max_connection_duration).map(duration);
    let Some(rule) = rule else { return };
    let hash = |p: Option<&istio_api::destination_rule::TrafficPolicy>| {
        let lb = p?.load_balancer.as_ref()?;
        Some(lb.consistent_hash.as_ref().and_then(|h| h.use_source_ip).unwrap_or(false))
    };
    let own = rule.subsets.iter().find(|s| s.name == subset).and_then(|s| hash(s.traffic_policy.as_ref()));
    if own.or_else(|| hash(policy)).unwrap_or(false) {
        let specifier = hash_policy::PolicySpecifier::SourceIp(hash_policy::SourceIp {});
        config.hash_policy = vec![HashPolicy { policy_specifier: Some(specifier) }];
    }
    if let Some(tunnel) = tunnel(rule, subset) {
        config.tunneling_config = Some(TunnelingConfig {
            hostname: crate::proto::host_port(
                &tunnel.target_host,
                u16::try_from(tunnel.target_port).unwrap_or_default(),
            ),
            use_post: tunnel.protocol == "POST",
            ..TunnelingConfig::default()
        });
    }
}

/// Where an outbound chain of one cluster leads.
pub(super) struct Target<'a> {
    pub cluster: &'a str,
    pub subset: &'a str,
    pub rule: Option<&'a DestinationRule>,
    pub port: u16,
}

/// An outbound chain that leads to one cluster.
pub(super) fn single(
    cx: &Context<'_>,
    protocol: Protocol,
    target: &Target<'_>,
    service: Option<&Service>,
    stat: Option<StatName<'_>>,
) -> Vec<Filter> {
    let &Target { cluster, subset, rule, port } = target;
    let mut config =
        TcpProxy { access_log: access_log::logs(cx, Side::Client, Of::Connections), ..to_cluster(cluster) };
    if let Some(stat) = stat.filter(|_| !cx.push.mesh.outbound_cluster_stat_name.is_empty()) {
        config.stat_prefix = stat.fill(&cx.push.mesh.outbound_cluster_stat_name);
    }
    apply_rule(cx, &mut config, rule, subset);
    let mut last = Vec::new();
    if let Some(service) = service
        && service.is_wildcard()
        && service.resolution == Resolution::DynamicDns
    {
        last.push(sni_forward_proxy(cx, service, port));
        last.extend(stack(cx, protocol, &config));
        // As istiod, which has a waypoint in mind: what the workload lets in decides about what it lets out, too.
        return guarded(cx, Side::Client, port, last);
    }
    last.extend(stack(cx, protocol, &config));
    complete(cx, Side::Client, port, last)
}

/// An outbound chain for a VirtualService's TCP or TLS route.
pub(super) fn routed(
    cx: &Context<'_>,
    protocol: Protocol,
    (port, port_name): (u16, &str),
    routes: &[RouteDestination],
    rule_name: (&str, &str),
) -> Vec<Filter> {
    let service_of = |r: &RouteDestination| r.destination.as_ref().and_then(|d| cx.scope.service(&d.host)).cloned();
    let Some(first) = routes.first() else { return Vec::new() };
    let rule = service_of(first).and_then(|s| cx.scope.destination_rule(cx.node, &s.hostname, true).cloned());
    let rule = rule.as_ref().map(|r| &r.spec);
    let cluster_of = |r: &RouteDestination| {
        let destination = r.destination.clone().unwrap_or_default();
        destination_cluster(&destination, service_of(r).as_deref(), port)
    };
    if routes.len() == 1 {
        let subset = first.destination.as_ref().map(|d| d.subset.clone()).unwrap_or_default();
        let service = service_of(first);
        let stat = service.as_ref().zip(first.destination.as_ref()).map(|(service, destination)| StatName {
            host: &destination.host,
            kubernetes: names::of_kubernetes(service),
            subset: &subset,
            port,
            port_name,
            target: Some(0),
        });
        let target = Target { cluster: &cluster_of(first), subset: &subset, rule, port };
        return single(cx, protocol, &target, None, stat);
    }
    let clusters: Vec<ClusterWeight> = routes
        .iter()
        .filter(|r| r.weight > 0)
        .map(|r| ClusterWeight {
            name: cluster_of(r),
            weight: u32::try_from(r.weight).unwrap_or_default(),
            ..ClusterWeight::default()
        })
        .collect();
    let mut config = TcpProxy {
        stat_prefix: format!("{}.{}", rule_name.0, rule_name.1),
        cluster_specifier: Some(ClusterSpecifier::WeightedClusters(WeightedCluster { clusters })),
        access_log: access_log::logs(cx, Side::Client, Of::Connections),
        ..TcpProxy::default()
    };
    apply_rule(cx, &mut config, rule, "");
    complete(cx, Side::Client, port, stack(cx, protocol, &config))
}

/// The port that stands in the name of a service's cluster: its only port if it has just one.
pub(super) fn default_port(service: &Service, port: u16) -> u16 {
    if service.ports.len() == 1 { service.ports[0].port } else { port }
}
