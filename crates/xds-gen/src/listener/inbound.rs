//! Inbound listeners: traffic to the proxy's own workload (istiod `listener_inbound.go`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_api::core::{self, TrafficDirection};
use envoy_api::listener::{
    FilterChain, FilterChainMatch, Listener, ListenerFilter, ListenerFilterChainMatchPredicate,
    listener_filter_chain_match_predicate::{MatchSet, Rule},
};
use envoy_api::pb::envoy::extensions::filters::listener::{
    http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst, original_src::v3::OriginalSrc,
};
use envoy_api::pb::envoy::r#type::v3::Int32Range;
use envoy_api::tls::DownstreamTlsContext;
use istio_api::sidecar::CaptureMode;
use mesh_types::{ArcStr, Protocol};
use push_context::{InterceptionMode, MtlsMode};
use registry::Provider;

use super::http::{self, Manager, Routes};
use super::outbound::{bound_by_others, may_bind, tls_inspector};
use super::{accept_one, additional, balance, black_hole, mesh_port, network};
use crate::access_log::{self, Of};
use crate::context::Context;
use crate::filters::{network_metadata_exchange, yes};
use crate::names::{self, INBOUND_PASSTHROUGH, StatName};
use crate::proto::{address, config_path, duration, listener_filter, set_istio_metadata, transport_socket, u32_value};
use crate::telemetry::Side;
use crate::tls::{self, strings};
use crate::wasm;

const TLS: &str = "tls";
const RAW: &str = "raw_buffer";
const MTLS_HTTP: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
const MTLS_TCP: &[&str] = &["istio-peer-exchange", "istio"];
const MTLS_ALL: &[&str] = &["istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"];
const PLAINTEXT_HTTP: &[&str] = &["http/1.1", "h2c"];
/// Where HTTP/1.0 is accepted; elsewhere it passes as TCP at least.
const PLAINTEXT_HTTP_10: &[&str] = &["http/1.0", "http/1.1", "h2c"];

/// One port of the workload.
struct Port {
    /// Where the workload listens; 0 stands for all ports without an own chain.
    target: u16,
    /// What clients dial, for names in telemetry.
    port: u16,
    protocol: Protocol,
    cluster: String,
    bind: Vec<String>,
    bind_to_port: bool,
    /// TLS for clients outside of the mesh.
    tls: Option<DownstreamTlsContext>,
    /// Host name of the service, or of the Sidecar.
    host: String,
    /// Name and namespace of the service, if it is Kubernetes'.
    kubernetes: Option<(ArcStr, ArcStr)>,
    /// The port's name.
    port_name: ArcStr,
    metadata: Option<core::Metadata>,
}

impl Port {
    fn is_passthrough(&self) -> bool {
        self.cluster == INBOUND_PASSTHROUGH
    }

    fn name(&self, http: bool) -> String {
        match (self.is_passthrough(), http) {
            (true, true) => "virtualInbound-catchall-http".to_owned(),
            (true, false) => "virtualInbound".to_owned(),
            (false, _) => names::listener(self.bind.first().map_or("", String::as_str), self.target),
        }
    }
}

/// How a connection to a port must look for a chain.
struct Shape {
    alpn: &'static [&'static str],
    transport: &'static str,
    http: bool,
    tls: bool,
}

const fn shape(alpn: &'static [&'static str], transport: &'static str, http: bool, tls: bool) -> Shape {
    Shape { alpn, transport, http, tls }
}

/// istiod `getFilterChainMatchOptions`.
fn options(cx: &Context<'_>, mode: MtlsMode, protocol: Protocol) -> Vec<Shape> {
    let none: &[&str] = &[];
    let plaintext = if cx.push.settings.http10 { PLAINTEXT_HTTP_10 } else { PLAINTEXT_HTTP };
    match (mode, protocol.is_http(), protocol.is_unsupported()) {
        (MtlsMode::Strict, true, _) => vec![shape(none, TLS, true, true)],
        (MtlsMode::Permissive, true, _) => {
            vec![shape(MTLS_ALL, TLS, true, true), shape(none, RAW, true, false)]
        }
        (MtlsMode::Disable, true, _) => vec![shape(none, RAW, true, false)],
        (MtlsMode::Strict, _, true) => {
            vec![shape(MTLS_HTTP, TLS, true, true), shape(none, TLS, false, true)]
        }
        (MtlsMode::Permissive, _, true) => vec![
            shape(MTLS_HTTP, TLS, true, true),
            shape(plaintext, RAW, true, false),
            shape(MTLS_TCP, TLS, false, true),
            shape(none, RAW, false, false),
            shape(none, TLS, false, false),
        ],
        (MtlsMode::Disable, _, true) => {
            vec![shape(plaintext, RAW, true, false), shape(none, RAW, false, false)]
        }
        (MtlsMode::Strict, _, _) => vec![shape(none, TLS, false, true)],
        (MtlsMode::Permissive, _, _) => {
            vec![shape(MTLS_ALL, TLS, false, true), shape(none, TLS, false, false), shape(none, RAW, false, false)]
        }
        (MtlsMode::Disable, _, _) => vec![shape(none, RAW, false, false)],
    }
}

pub(super) fn all(cx: &Context<'_>) -> Vec<Listener> {
    let mut own = Vec::new();
    let mut virtual_chains = Vec::new();
    for port in ports(cx) {
        let mode = cx.peer.for_port(port.target);
        let chains = match &port.tls {
            Some(_) if mode == MtlsMode::Disable => {
                let http = port.protocol.is_http();
                vec![chain(cx, &port, &shape(&[], TLS, http, true), mode)]
            }
            _ => options(cx, mode, port.protocol).iter().map(|o| chain(cx, &port, o, mode)).collect(),
        };
        if port.bind_to_port {
            own.push(custom(cx, &port, chains));
        } else {
            virtual_chains.extend(chains);
        }
    }
    let mut out = Vec::new();
    if !cx.no_interception() {
        out.push(virtual_inbound(cx, virtual_chains));
    }
    out.extend(own);
    out
}

/// The ports that get chains of their own: the Sidecar's, else the registry's.
fn ports(cx: &Context<'_>) -> Vec<Port> {
    let mut by_port: BTreeMap<u16, Port> = BTreeMap::new();
    let by_registry = cx.scope.ingress().is_empty();
    if by_registry && cx.no_interception() {
        return Vec::new();
    }
    if by_registry || cx.push.settings.merge_inbound {
        let bind_to_port = cx.no_interception();
        for target in cx.targets.iter() {
            let number = target.target_port;
            let is_http = target.port.protocol.is_http();
            let conflicts = bound_by_others(cx, cx.wildcards()[0], number, is_http, true);
            if !may_bind(cx, bind_to_port, number) || conflicts || has_ingress(cx, number) {
                continue;
            }
            by_port.entry(number).or_insert_with(|| Port {
                target: number,
                port: target.port.port,
                protocol: target.port.protocol,
                cluster: names::inbound(number),
                bind: strings(cx.wildcards()),
                bind_to_port,
                tls: None,
                host: target.service.hostname.to_string(),
                kubernetes: (target.service.provider == Provider::Kubernetes)
                    .then(|| (target.service.name.clone(), target.service.namespace.clone())),
                port_name: target.port.name.clone(),
                metadata: None,
            });
        }
    }
    for listener in cx.scope.ingress() {
        let Some(written) = &listener.port else { continue };
        let Ok(number) = u16::try_from(written.number) else { continue };
        let bind_to_port = match listener.capture_mode {
            CaptureMode::Default => cx.no_interception(),
            CaptureMode::None => true,
            CaptureMode::Iptables => false,
        };
        let mut protocol = Protocol::parse(&written.protocol);
        let conflicts = bound_by_others(cx, &listener.bind, number, protocol.is_http(), false);
        if !may_bind(cx, bind_to_port, number) || conflicts {
            continue;
        }
        // Without an address it is the pod's own.
        let bind = match listener.bind.is_empty() {
            true => match cx.node.addresses.iter().find(|address| is_global(address)) {
                Some(own) => vec![own.clone()],
                None => strings(cx.wildcards()),
            },
            false => vec![listener.bind.clone()],
        };
        let mut metadata = None;
        set_istio_metadata(&mut metadata, "config", config_path("sidecar", &cx.scope.namespace, &cx.scope.name));
        let settings = listener.tls.as_ref().filter(|_| cx.push.settings.tls_on_ingress);
        if settings.is_some() {
            protocol = after_tls(protocol);
        }
        by_port.entry(number).or_insert_with(|| Port {
            target: number,
            port: number,
            protocol,
            cluster: names::inbound(number),
            bind,
            bind_to_port,
            tls: settings.map(|settings| tls::ingress(cx, settings)),
            host: format!("{}.{}", cx.scope.name, cx.scope.namespace),
            kubernetes: None,
            port_name: written.name.as_str().into(),
            metadata,
        });
    }
    by_port.into_values().collect()
}

/// Whether the Sidecar has a listener of its own for the port.
fn has_ingress(cx: &Context<'_>, port: u16) -> bool {
    cx.scope.ingress().iter().any(|i| i.port.as_ref().is_some_and(|p| p.number == u32::from(port)))
}

/// As Go's `IP.IsGlobalUnicast`, for which private addresses are global.
fn is_global(address: &str) -> bool {
    match address.parse() {
        Ok(IpAddr::V4(ip)) => {
            let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
            !(special || ip.is_link_local() || ip.is_broadcast())
        }
        Ok(IpAddr::V6(ip)) => {
            !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local())
        }
        Err(_) => false,
    }
}

/// What is left when TLS is taken off.
fn after_tls(protocol: Protocol) -> Protocol {
    match protocol {
        Protocol::Https => Protocol::Http,
        Protocol::Tls => Protocol::Tcp,
        other => other,
    }
}

fn chain(cx: &Context<'_>, port: &Port, how: &Shape, mode: MtlsMode) -> FilterChain {
    let filters = if how.http {
        let manager = Manager {
            side: Side::Server,
            routes: Routes::Inline(Box::new(crate::route::inbound(
                cx,
                &port.cluster,
                &port.host,
                port.port,
                port.protocol,
            ))),
            stat_prefix: match port.is_passthrough() {
                true => names::stat(&port.cluster),
                false => names::stat(&format!("inbound_{}", port.name(true))),
            },
            protocol: port.protocol,
            is_forward_proxy: false,
            port: port.target,
            service: None,
        };
        let plugins = wasm::before_http(cx, Side::Server, port.target);
        network_metadata_exchange(cx).into_iter().chain(plugins).chain([http::filter(cx, manager)]).collect()
    } else {
        let stat = StatName {
            host: &port.host,
            kubernetes: port.kubernetes.as_ref().map(|(name, namespace)| (&**name, &**namespace)),
            subset: "",
            port: port.port,
            port_name: if port.is_passthrough() { "virtualInbound" } else { &port.port_name },
            target: None,
        };
        network::inbound(cx, port.protocol, &port.cluster, &stat)
    };
    let socket = |context: &DownstreamTlsContext| transport_socket("envoy.transport_sockets.tls", context);
    let mutual = || tls::inbound_mtls(cx, mode, how.http).as_ref().map(socket);
    let transport_socket = match &port.tls {
        _ if !how.tls => None,
        Some(own) if mode == MtlsMode::Disable => Some(socket(own)),
        _ => cx.common.server_tls.get((mode, how.http), mutual),
    };
    FilterChain {
        name: port.name(how.http),
        filter_chain_match: Some(FilterChainMatch {
            destination_port: if port.target > 0 { u32_value(u32::from(port.target)) } else { None },
            application_protocols: strings(how.alpn),
            transport_protocol: how.transport.to_owned(),
            ..FilterChainMatch::default()
        }),
        filters,
        transport_socket,
        metadata: port.metadata.clone(),
        ..FilterChain::default()
    }
}

/// Ports without an own chain: of the workload, but of no service.
fn passthrough_chains(cx: &Context<'_>) -> Vec<FilterChain> {
    let port = mesh_port(cx.push.mesh.proxy_inbound_listen_port);
    let filters = network_metadata_exchange(cx).into_iter().chain(cx.tcp_filters(Side::Server)).collect();
    let mut out = vec![black_hole("virtualInbound-blackhole", port, filters)];
    let has_own_chain = |port: u16| {
        if cx.scope.ingress().is_empty() {
            return cx.targets.iter().any(|t| t.target_port == port);
        }
        has_ingress(cx, port)
    };
    let special = cx.peer.ports.keys().copied().filter(|port| !has_own_chain(*port));
    for target in std::iter::once(0).chain(special) {
        let port = Port {
            target,
            port: 0,
            protocol: Protocol::Unsupported,
            cluster: INBOUND_PASSTHROUGH.to_owned(),
            bind: Vec::new(),
            bind_to_port: false,
            tls: None,
            host: String::new(),
            kubernetes: None,
            port_name: "".into(),
            metadata: None,
        };
        let mode = cx.peer.for_port(target);
        out.extend(options(cx, mode, port.protocol).iter().map(|o| chain(cx, &port, o, mode)));
    }
    out
}

/// Port 15006: all captured inbound traffic.
fn virtual_inbound(cx: &Context<'_>, chains: Vec<FilterChain>) -> Listener {
    let mut all = passthrough_chains(cx);
    all.extend(chains);
    let port = mesh_port(cx.push.mesh.proxy_inbound_listen_port);
    let transparent = if cx.node.interception == InterceptionMode::Tproxy { yes() } else { None };
    let listener = listener(cx, "virtualInbound", cx.wildcards(), port, false, all);
    Listener { transparent, ..listener }
}

/// An ingress listener that binds its own port.
fn custom(cx: &Context<'_>, port: &Port, chains: Vec<FilterChain>) -> Listener {
    let binds: Vec<&str> = port.bind.iter().map(String::as_str).collect();
    listener(cx, &port.name(false), &binds, port.target, true, chains)
}

fn listener(
    cx: &Context<'_>,
    name: &str,
    binds: &[&str],
    port: u16,
    bind_to_port: bool,
    filter_chains: Vec<FilterChain>,
) -> Listener {
    Listener {
        name: name.to_owned(),
        address: binds.first().map(|b| address(b, port)),
        additional_addresses: if cx.dual_stack() { additional(binds, port) } else { Vec::new() },
        traffic_direction: TrafficDirection::Inbound as i32,
        continue_on_listener_filters_timeout: true,
        max_connections_to_accept_per_socket_event: accept_one(cx),
        connection_balance_config: balance(cx.node.inbound_exact_balance),
        access_log: access_log::logs(cx, Side::Server, Of::Listener),
        listener_filters: inspectors(cx, bind_to_port, &filter_chains),
        listener_filters_timeout: cx.push.mesh.protocol_detection_timeout.map(duration),
        filter_chains,
        ..Listener::default()
    }
}

/// Original destination, and the inspectors that the chains' matches need, switched off for ports that do not
/// (istiod `populateListenerFilters`).
fn inspectors(cx: &Context<'_>, bind_to_port: bool, chains: &[FilterChain]) -> Vec<ListenerFilter> {
    let mut out = Vec::new();
    if !bind_to_port {
        out.push(listener_filter("envoy.filters.listener.original_dst", &OriginalDst::default()));
        if cx.node.interception == InterceptionMode::Tproxy {
            let config = OriginalSrc { mark: 1337, ..OriginalSrc::default() };
            out.push(listener_filter("envoy.filters.listener.original_src", &config));
        }
    }
    // By port: whether TLS and HTTP must be told apart.
    let mut needs: BTreeMap<u32, (bool, bool)> = BTreeMap::new();
    for own in chains.iter().filter_map(|c| c.filter_chain_match.as_ref()) {
        let entry = needs.entry(own.destination_port.map_or(0, |p| p.value)).or_default();
        entry.0 |= own.transport_protocol == TLS;
        entry.1 |= own.application_protocols.iter().any(|p| p == "http/1.1" || p == "h2c");
    }
    let without = |http: bool| -> Vec<u32> {
        needs.iter().filter(|(_, need)| !(if http { need.1 } else { need.0 })).map(|(port, _)| *port).collect()
    };
    if needs.values().any(|need| need.0) {
        let filter = listener_filter("envoy.filters.listener.tls_inspector", &tls_inspector());
        let by_default = needs.get(&0).is_some_and(|need| need.0);
        let filter_disabled = if by_default {
            exclude(&without(false).into_iter().filter(|p| *p != 0).collect::<Vec<_>>())
        } else {
            let with: Vec<u32> = needs.iter().filter(|(p, need)| **p != 0 && need.0).map(|(p, _)| *p).collect();
            exclude(&with).map(|rule| ListenerFilterChainMatchPredicate { rule: Some(Rule::NotMatch(Box::new(rule))) })
        };
        out.push(ListenerFilter { filter_disabled, ..filter });
    }
    if needs.values().any(|need| need.1) {
        let filter = listener_filter("envoy.filters.listener.http_inspector", &HttpInspector::default());
        out.push(ListenerFilter { filter_disabled: exclude(&without(true)), ..filter });
    }
    out
}

/// A predicate for these ports.
fn exclude(ports: &[u32]) -> Option<ListenerFilterChainMatchPredicate> {
    let range = |port: &u32| {
        let start = i32::try_from(*port).unwrap_or_default();
        ListenerFilterChainMatchPredicate {
            rule: Some(Rule::DestinationPortRange(Int32Range { start, end: start + 1 })),
        }
    };
    match ports {
        [] => None,
        [only] => Some(range(only)),
        all => Some(ListenerFilterChainMatchPredicate {
            rule: Some(Rule::OrMatch(MatchSet { rules: all.iter().map(range).collect() })),
        }),
    }
}
