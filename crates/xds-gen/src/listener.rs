//! Listeners (istiod `listener.go`, `listener_builder.go`).

mod connection;
mod http;
mod inbound;
mod network;
mod outbound;
mod tracing;

use envoy_api::core::TrafficDirection;
use envoy_api::listener::listener::{
    ConnectionBalanceConfig,
    connection_balance_config::{BalanceType, ExactBalance},
};
use envoy_api::listener::{AdditionalAddress, Filter, FilterChain, FilterChainMatch, Listener};
use envoy_api::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_api::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier};
use push_context::{InterceptionMode, IpMode};

use crate::access_log::{self, Of};
use crate::context::Context;
use crate::filters::{TCP_PROXY, yes};
use crate::names;
use crate::proto::{address, any, listener_filter, network_filter, parse_duration, u32_value};
use crate::telemetry::Side;

pub(crate) use http::{ManagerKind, counts_attempts, forwards_host, preserves_case};
pub(crate) use outbound::Ports;

/// All listeners of a proxy.
pub(crate) fn all(cx: &Context<'_>) -> Vec<Listener> {
    let mut out = outbound_side(cx, &Ports::of(cx));
    out.extend(inbound_side(cx));
    out
}

fn none(cx: &Context<'_>) -> bool {
    cx.push.mesh.proxy_listen_port <= 0
}

/// Those for what the application sends.
pub(crate) fn outbound_side(cx: &Context<'_>, ports: &Ports) -> Vec<Listener> {
    if none(cx) {
        return Vec::new();
    }
    let mut out = outbound::all(cx, ports);
    out.extend(http_proxy(cx));
    if !cx.no_interception() {
        out.push(virtual_outbound(cx));
    }
    out
}

/// Those for what the application receives.
pub(crate) fn inbound_side(cx: &Context<'_>) -> Vec<Listener> {
    if none(cx) { Vec::new() } else { inbound::all(cx) }
}

fn mesh_port(port: i32) -> u16 {
    u16::try_from(port).unwrap_or_default()
}

/// Addresses beyond the first, for dual stack.
pub(crate) fn additional(addresses: &[&str], port: u16) -> Vec<AdditionalAddress> {
    let more = addresses.iter().skip(1).filter(|a| !a.is_empty());
    more.map(|a| AdditionalAddress { address: Some(address(a, port)), ..AdditionalAddress::default() }).collect()
}

/// As a rule one connection a wake-up, so that worker threads share the load.
fn accept_one(cx: &Context<'_>) -> Option<envoy_api::wkt::UInt32Value> {
    Some(cx.push.settings.connections_per_event).filter(|most| *most > 0).and_then(u32_value)
}

/// Worker threads get exactly as many connections each, if the proxy asks for it.
fn balance(exact: bool) -> Option<ConnectionBalanceConfig> {
    exact.then_some(ConnectionBalanceConfig { balance_type: Some(BalanceType::ExactBalance(ExactBalance {})) })
}

fn to_cluster(cluster: &str) -> TcpProxy {
    TcpProxy {
        stat_prefix: cluster.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    }
}

fn tcp_proxy_filter(config: &TcpProxy) -> Filter {
    network_filter(TCP_PROXY, any(config))
}

/// Traffic that reaches a virtual listener's own port was not captured: dropped, or it would loop.
fn black_hole(name: &str, port: u16, mut filters: Vec<Filter>) -> FilterChain {
    filters.push(tcp_proxy_filter(&to_cluster(names::BLACK_HOLE)));
    FilterChain {
        name: name.to_owned(),
        filter_chain_match: Some(FilterChainMatch {
            destination_port: u32_value(u32::from(port)),
            ..FilterChainMatch::default()
        }),
        filters,
        ..FilterChain::default()
    }
}

/// Where traffic to unknown destinations goes.
pub(crate) fn catch_all_cluster(cx: &Context<'_>) -> String {
    match &cx.scope.outbound_policy.egress_proxy {
        _ if !cx.scope.allows_any() => names::BLACK_HOLE.to_owned(),
        Some(proxy) => crate::route::destination_cluster(proxy, None, 0),
        None => names::PASSTHROUGH.to_owned(),
    }
}

fn catch_all_filters(cx: &Context<'_>) -> Vec<Filter> {
    let config = TcpProxy {
        idle_timeout: parse_duration(&cx.node.idle_timeout),
        access_log: access_log::logs(cx, Side::Client, Of::Connections),
        ..to_cluster(&catch_all_cluster(cx))
    };
    let mut filters = cx.tcp_filters(Side::Client);
    filters.push(tcp_proxy_filter(&config));
    filters
}

/// Port 15001: all captured outbound traffic, handed to the listener of its destination.
fn virtual_outbound(cx: &Context<'_>) -> Listener {
    let port = mesh_port(cx.push.mesh.proxy_listen_port);
    let wildcards = cx.wildcards();
    let mut filter_chains = vec![black_hole("virtualOutbound-blackhole", port, cx.tcp_filters(Side::Client))];
    let mut listener_filters = Vec::new();
    if cx.scope.dynamic_dns {
        filter_chains.push(outbound::dynamic_dns(cx));
        listener_filters.push(listener_filter("envoy.filters.listener.http_inspector", &HttpInspector::default()));
    }
    filter_chains.push(FilterChain {
        name: "virtualOutbound-catchall-tcp".to_owned(),
        filters: catch_all_filters(cx),
        ..FilterChain::default()
    });
    Listener {
        name: "virtualOutbound".to_owned(),
        address: Some(address(wildcards[0], port)),
        additional_addresses: if cx.dual_stack() && wildcards.len() > 1 {
            additional(wildcards, port)
        } else if cx.push.settings.v4_outbound && cx.node.ip_mode == IpMode::V6 {
            additional(&[wildcards[0], "0.0.0.0"], port)
        } else {
            Vec::new()
        },
        transparent: if cx.node.interception == InterceptionMode::Tproxy { yes() } else { None },
        use_original_dst: yes(),
        listener_filters,
        filter_chains,
        traffic_direction: TrafficDirection::Outbound as i32,
        max_connections_to_accept_per_socket_event: accept_one(cx),
        access_log: access_log::logs(cx, Side::Client, Of::Listener),
        ..Listener::default()
    }
}

/// The forward proxy on loopback, if the mesh or the pod asks for one.
fn http_proxy(cx: &Context<'_>) -> Option<Listener> {
    let port = cx.node.http_proxy_port.unwrap_or(mesh_port(cx.push.mesh.proxy_http_port));
    (port != 0).then(|| outbound::forward_proxy(cx, port))
}
