//! Outbound listeners: one for each address and port of services (istiod `listener.go`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_api::core::{self, TrafficDirection};
use envoy_api::listener::{Filter, FilterChain, FilterChainMatch, Listener};
use envoy_api::pb::envoy::extensions::filters::listener::{
    http_inspector::v3::HttpInspector, tls_inspector::v3::TlsInspector,
};
use foldhash::{HashSet, HashSetExt};
use istio_api::VirtualService;
use istio_api::sidecar::CaptureMode;
use istio_api::virtual_service::{L4MatchAttributes, TlsMatchAttributes};
use mesh_types::{ArcStr, Labels, Protocol, selects};
use push_context::{Config, EgressListener, host};
use registry::{Provider, Resolution, Service, UNSPECIFIED_IP};

use super::http::{self, Manager, Routes, outbound_prefix};
use super::{accept_one, additional, balance, catch_all_filters, network};
use crate::context::Context;
use crate::names::{self, HTTP_PROXY_ROUTE};
use crate::proto::{
    address, bool_value, cidr, config_path, duration, listener_filter, seconds, set_istio_metadata, u32_value,
};
use crate::route::virtual_host::alternatives;
use crate::telemetry::Side;
use crate::tls::strings;
use crate::wasm;

/// A range without the bits that do not count.
fn network_of(range: &core::CidrRange) -> Option<String> {
    let bits = range.prefix_len.map_or(0, |l| l.value);
    let network = match range.address_prefix.parse().ok()? {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & !u32::MAX.checked_shr(bits).unwrap_or(0)).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & !u128::MAX.checked_shr(bits).unwrap_or(0)).into()),
    };
    Some(format!("{network}/{bits}"))
}

/// What HTTP looks like to the inspector.
const PLAINTEXT_HTTP: [&str; 2] = ["http/1.1", "h2c"];

fn plaintext_http(cx: &Context<'_>) -> Vec<String> {
    let older = cx.push.settings.http10.then(|| "http/1.0".to_owned());
    older.into_iter().chain(strings(&PLAINTEXT_HTTP)).collect()
}

/// How the services on an address and port want to be treated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Http,
    Tcp,
    /// Sniffed.
    Auto,
}

fn kind_of(protocol: Protocol) -> Option<Kind> {
    match protocol {
        Protocol::Http | Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb => Some(Kind::Http),
        Protocol::Unsupported => Some(Kind::Auto),
        Protocol::Udp | Protocol::Hbone => None,
        _ => Some(Kind::Tcp),
    }
}

/// A filter chain before it is one.
#[derive(Clone, Default)]
struct Chain {
    sni: Vec<String>,
    cidrs: Vec<String>,
    alpn: Vec<String>,
    /// `raw_buffer` or nothing.
    transport: &'static str,
    metadata: Option<core::Metadata>,
    filters: Vec<Filter>,
    /// Instead of filters: connections go to this service.
    to: Option<ToService>,
    http: Option<HttpChain>,
}

#[derive(Clone)]
struct ToService {
    service: Arc<Service>,
    port: u16,
    protocol: Protocol,
}

/// What connections are told apart by: of two chains with the same one Envoy takes neither.
#[derive(Clone, Eq, Hash, PartialEq)]
struct Shape {
    transport: &'static str,
    alpn: Vec<String>,
    sni: Vec<String>,
    ranges: Vec<String>,
}

#[derive(Clone)]
struct HttpChain {
    route: String,
    protocol: Protocol,
    service: Option<Arc<Service>>,
    is_forward_proxy: bool,
}

impl Chain {
    fn matches_all(&self) -> bool {
        (self.sni.is_empty() || self.sni.iter().any(|s| s == "*"))
            && self.alpn.is_empty()
            && self.transport.is_empty()
            && self.cidrs.is_empty()
    }

    fn shape(&self) -> Shape {
        let sorted = |list: &[String], keep: &dyn Fn(&String) -> Option<String>| {
            let mut out: Vec<String> = list.iter().filter_map(keep).collect();
            out.sort();
            out.dedup();
            out
        };
        Shape {
            transport: self.transport,
            alpn: self.alpn.clone(),
            sni: sorted(&self.sni, &|s| (s != "*").then(|| s.clone())),
            ranges: sorted(&self.cidrs, &|s| {
                let range = cidr(s).filter(|r| r.address_prefix != UNSPECIFIED_IP)?;
                network_of(&range)
            }),
        }
    }

    fn to_match(&self) -> Option<FilterChainMatch> {
        if self.matches_all() {
            return None;
        }
        let mut names = self.sni.clone();
        names.sort();
        if names.iter().any(|s| s == "*") {
            names.clear();
        }
        let mut ranges = self.cidrs.clone();
        ranges.sort();
        Some(FilterChainMatch {
            server_names: names,
            prefix_ranges: ranges
                .iter()
                .filter_map(|r| cidr(r))
                .filter(|r| r.address_prefix != UNSPECIFIED_IP)
                .collect(),
            application_protocols: self.alpn.clone(),
            transport_protocol: self.transport.to_owned(),
            ..FilterChainMatch::default()
        })
    }
}

/// A listener while services are added to it.
struct Entry {
    binds: Vec<String>,
    bind_to_port: bool,
    port: u16,
    /// Of a Sidecar's explicit port: services of the catch-all listener do not add to it.
    locked: bool,
    chains: Vec<Chain>,
    /// Of the chains, from when there is a second service.
    shapes: HashSet<Shape>,
    kind: Kind,
    protocol: Protocol,
    /// Of a service.
    balanced: bool,
    /// Services whose connections nobody could tell from those of earlier ones, and their protocols.
    conflicts: Vec<(ArcStr, Protocol)>,
}

impl Entry {
    /// Adds a chain if Envoy can tell it from the others; whether it can.
    fn accepts(&mut self, chain: Chain) -> bool {
        if self.shapes.is_empty() {
            self.shapes = self.chains.iter().map(Chain::shape).collect();
        }
        let fresh = self.shapes.insert(chain.shape());
        if fresh {
            self.chains.push(chain);
        }
        fresh
    }
}

/// By address, then port.
#[derive(Default)]
struct Entries(BTreeMap<String, BTreeMap<u16, Entry>>);

impl Entries {
    fn get(&self, bind: &str, port: u16) -> Option<&Entry> {
        self.0.get(bind)?.get(&port)
    }

    fn get_mut(&mut self, bind: &str, port: u16) -> Option<&mut Entry> {
        self.0.get_mut(bind)?.get_mut(&port)
    }

    fn values(&self) -> impl Iterator<Item = &Entry> {
        self.0.values().flat_map(BTreeMap::values)
    }
}

/// One service port that wants a listener.
struct Wish<'a> {
    binds: Vec<String>,
    bind_to_port: bool,
    cidrs: Vec<String>,
    port: u16,
    protocol: Protocol,
    is_http_proxy: bool,
    service: &'a Arc<Service>,
    rules: &'a [Arc<Config<VirtualService>>],
    /// `cidrs` are a pod's addresses, which tell enough.
    of_pod: bool,
}

impl Wish<'_> {
    fn to_service(&self) -> ToService {
        ToService { service: self.service.clone(), port: self.port, protocol: self.protocol }
    }

    fn named_port(&self) -> (u16, &str) {
        (self.port, self.service.port(self.port).map_or("", |p| &*p.name))
    }
}

/// The addresses and ports that listeners are for, and what for: most of the work, and the same for many proxies.
pub(crate) struct Ports(Entries);

impl Ports {
    pub(crate) fn of(cx: &Context<'_>) -> Ports {
        let mut entries = Entries::default();
        for egress in &cx.scope.egress {
            for_egress(cx, egress, &mut entries);
        }
        Ports(entries)
    }

    /// Listeners that lack a service, and what istiod says of it.
    pub(crate) fn conflicts(&self) -> impl Iterator<Item = (String, String)> {
        self.0.values().flat_map(|entry| {
            let name = names::listener(entry.binds.first().map_or("", String::as_str), entry.port);
            entry.conflicts.iter().map(move |(host, protocol)| {
                let message = format!("Listener={name} Accepted={} Rejected={protocol} ({host})", entry.protocol);
                (name.clone(), message)
            })
        })
    }
}

pub(super) fn all(cx: &Context<'_>, ports: &Ports) -> Vec<Listener> {
    let fallback = catch_all_filters(cx);
    ports.0.values().map(|entry| finish(cx, entry, &fallback)).collect()
}

fn owned(list: &[&str]) -> Vec<String> {
    strings(list)
}

fn for_egress(cx: &Context<'_>, egress: &EgressListener, entries: &mut Entries) {
    let listener = &egress.listener;
    let bind_to_port =
        cx.no_interception() || listener.capture_mode == CaptureMode::None || listener.bind.starts_with("unix://");
    let binds = match () {
        () if !listener.bind.is_empty() => vec![listener.bind.clone()],
        () if bind_to_port => owned(cx.localhosts()),
        () => Vec::new(),
    };
    let rules = &egress.virtual_services;
    if let Some(protocol) = egress.protocol() {
        let port = egress.port();
        let conflicts = bound_by_others(cx, binds.first().map_or("", String::as_str), port, protocol.is_http(), true);
        if !may_bind(cx, bind_to_port, port) || conflicts {
            return;
        }
        for service in &egress.services {
            let is_http_proxy = egress.is_http_proxy();
            let wish = Wish {
                binds: binds.clone(),
                bind_to_port,
                cidrs: Vec::new(),
                port,
                protocol,
                is_http_proxy,
                service,
                rules,
                of_pod: false,
            };
            add(cx, wish, entries);
        }
        return;
    }
    entries.0.values_mut().flat_map(BTreeMap::values_mut).for_each(|e| e.locked = true);
    for service in &egress.services {
        for port in &service.ports {
            let bind = binds.first().map_or("", String::as_str);
            let conflicts = bound_by_others(cx, bind, port.port, port.protocol.is_http(), true);
            if !may_bind(cx, bind_to_port, port.port) || conflicts {
                continue;
            }
            let wish = |binds: Vec<String>| Wish {
                binds,
                bind_to_port,
                cidrs: Vec::new(),
                port: port.port,
                protocol: port.protocol,
                is_http_proxy: false,
                service,
                rules,
                of_pod: false,
            };
            let by_pod = binds.is_empty()
                && service.resolution == Resolution::Passthrough
                && cx.service_address(service) == UNSPECIFIED_IP
                && matches!(kind_of(port.protocol), Some(Kind::Tcp | Kind::Auto));
            if !by_pod {
                add(cx, wish(binds.clone()), entries);
                continue;
            }
            // Headless: a listener for each pod, because there is no address of the service's own.
            let mut pods = cx.push.registry.endpoints_by_number(service, port.port).peekable();
            if pods.peek().is_none() && service.provider == Provider::External && service.selector.is_empty() {
                add(cx, wish(Vec::new()), entries);
            }
            for pod in pods.filter(|p| p.is_ip()) {
                if *pod.addresses[0] == *cx.node.addresses[0] {
                    continue;
                }
                let addresses = pod.addresses.iter().map(|a| a.to_string()).collect();
                if cx.push.settings.headless_chains && kind_of(port.protocol) == Some(Kind::Tcp) {
                    add(cx, Wish { cidrs: addresses, of_pod: true, ..wish(owned(cx.wildcards())) }, entries);
                } else {
                    add(cx, wish(addresses), entries);
                }
            }
        }
    }
}

/// Ports that only root may bind are left alone where the proxy is not root.
pub(super) fn may_bind(cx: &Context<'_>, bind_to_port: bool, port: u16) -> bool {
    !(bind_to_port && cx.node.unprivileged && port != 0 && port < 1024)
}

/// Whether the proxy has a listener on all addresses for that port already (istiod `conflictWithReservedListener`):
/// the static ones that its metadata name, and the `virtual_ones`.
pub(super) fn bound_by_others(cx: &Context<'_>, bind: &str, port: u16, is_http: bool, virtual_ones: bool) -> bool {
    if if bind.is_empty() { !is_http } else { bind != cx.wildcards()[0] } {
        return false;
    }
    let mesh = &cx.push.mesh;
    let own = [mesh.proxy_listen_port, mesh.proxy_inbound_listen_port];
    cx.node.reserved_ports.contains(&port) || (virtual_ones && own.contains(&i32::from(port)))
}

/// istiod `buildSidecarOutboundListener`, with its rules for several services on one address and port.
fn add(cx: &Context<'_>, mut wish: Wish<'_>, entries: &mut Entries) {
    if wish.service.resolution == Resolution::Alias {
        return;
    }
    let Some(kind) = (if wish.is_http_proxy { Some(Kind::Http) } else { kind_of(wish.protocol) }) else { return };
    let wildcards = cx.wildcards();
    if kind == Kind::Http && !wish.is_http_proxy {
        // Most services of HTTP find the listener of their port there.
        let bind = wish.binds.first().map_or(wildcards[0], String::as_str);
        if entries.get(bind, wish.port).is_some_and(|e| e.locked || matches!(e.kind, Kind::Http | Kind::Auto)) {
            return;
        }
    }
    if wish.binds.is_empty() {
        if kind == Kind::Http {
            wish.binds = owned(wildcards);
        } else {
            bind_to_service(cx, &mut wish);
        }
    }
    let bind = wish.binds.first().cloned().unwrap_or_default();
    let port = wish.port;
    let current = entries.get(&bind, port);
    if current.is_some_and(|e| e.locked) {
        return;
    }
    let is_wildcard = bind == wildcards[0];
    let existing = current.map(|e| (e.kind, e.protocol));
    let sniffed = |chain: Chain| Chain { alpn: plaintext_http(cx), transport: "raw_buffer", ..chain };
    let (chains, new_kind) = match (kind, existing) {
        (Kind::Http, _) if wish.is_http_proxy => (vec![http_chain(&wish, &bind, false)], Kind::Http),
        (Kind::Http, Some((Kind::Http | Kind::Auto, _))) => return,
        (Kind::Http, _) => {
            let chain = http_chain(&wish, &bind, false);
            if is_wildcard { (vec![sniffed(chain)], Kind::Auto) } else { (vec![chain], Kind::Http) }
        }
        (Kind::Tcp, _) | (Kind::Auto, Some((Kind::Auto, _))) => (tcp_chains(cx, &wish, &bind), Kind::Tcp),
        (Kind::Auto, _) => {
            let mut chains = tcp_chains(cx, &wish, &bind);
            chains.push(sniffed(http_chain(&wish, &bind, !is_wildcard)));
            (chains, Kind::Auto)
        }
    };
    // Servers that speak first share their port with nobody: sniffing would wait for ever.
    let speaks_first = |p: Protocol| matches!(p, Protocol::Mongo | Protocol::MySql);
    if let Some((_, protocol)) = existing
        && (speaks_first(protocol) || speaks_first(wish.protocol))
        && protocol != wish.protocol
    {
        return;
    }
    let replaces = matches!((kind, existing), (_, None) | (Kind::Auto, Some((Kind::Http, _))));
    if replaces || wish.is_http_proxy {
        let protocol = if new_kind == Kind::Auto { Protocol::Unsupported } else { wish.protocol };
        let entry = Entry {
            binds: wish.binds,
            bind_to_port: wish.bind_to_port,
            port,
            locked: false,
            chains,
            shapes: HashSet::new(),
            kind: new_kind,
            protocol,
            balanced: true,
            conflicts: Vec::new(),
        };
        entries.0.entry(bind).or_default().insert(port, entry);
        return;
    }
    let Some(entry) = entries.get_mut(&bind, port) else { return };
    for chain in chains {
        if !entry.accepts(chain) {
            entry.conflicts.push((wish.service.hostname.clone(), wish.protocol));
        }
    }
    if kind != Kind::Tcp || entry.kind == Kind::Http {
        entry.kind = Kind::Auto;
        entry.protocol = Protocol::Unsupported;
    }
}

/// TCP is told apart by the service's address; ranges by filter chains on the wildcard address.
fn bind_to_service(cx: &Context<'_>, wish: &mut Wish<'_>) {
    let service = wish.service;
    let own = cx.service_address(service);
    let mut more: Vec<String> = cx.service_addresses(service).iter().skip(1).map(|a| (*a).to_owned()).collect();
    let own = if cx.is_external_v6(service, own) { "::" } else { own };
    let dual = cx.node.ip_mode == push_context::IpMode::Dual;
    if service.provider == Provider::External && dual && own == UNSPECIFIED_IP {
        more.push("::".to_owned());
    }
    if own.is_empty() {
        return;
    }
    let all: Vec<String> = std::iter::once(own.to_owned()).chain(more).collect();
    if own.contains('/') {
        wish.binds = owned(cx.wildcards());
        wish.cidrs = all;
    } else {
        wish.binds = all;
    }
}

fn http_chain(wish: &Wish<'_>, bind: &str, by_service: bool) -> Chain {
    let route = match wish.port {
        0 => bind.to_owned(),
        port if by_service => format!("{}:{port}", wish.service.hostname),
        port => port.to_string(),
    };
    Chain {
        http: Some(HttpChain {
            route,
            protocol: wish.protocol,
            service: Some(wish.service.clone()),
            is_forward_proxy: false,
        }),
        ..Chain::default()
    }
}

fn rule_metadata(rule: &Config<VirtualService>) -> Option<core::Metadata> {
    let mut metadata = None;
    set_istio_metadata(&mut metadata, "config", config_path("virtual-service", &rule.namespace, &rule.name));
    metadata
}

fn applies(cx: &Context<'_>, port: u16, gateways: &[String], labels: &Labels, wanted: u32, namespace: &str) -> bool {
    (gateways.is_empty() || gateways.iter().any(|g| g == "mesh"))
        && selects(labels, &cx.node.labels)
        && (wanted == 0 || wanted == u32::from(port))
        && (namespace.is_empty() || *namespace == *cx.node.namespace)
}

fn tcp_chains(cx: &Context<'_>, wish: &Wish<'_>, bind: &str) -> Vec<Chain> {
    let fits = |r: &&Arc<Config<VirtualService>>| r.spec.hosts.iter().any(|h| host::matches(h, &wish.service.hostname));
    let rules: Vec<&Arc<Config<VirtualService>>> = wish.rules.iter().filter(fits).collect();
    if wish.protocol.is_tls() { tls_chains(cx, wish, bind, &rules) } else { plain_chains(cx, wish, &rules) }
}

/// TLS that passes through, told apart by SNI (istiod `buildSidecarOutboundTLSFilterChainOpts`).
fn tls_chains(cx: &Context<'_>, wish: &Wish<'_>, bind: &str, rules: &[&Arc<Config<VirtualService>>]) -> Vec<Chain> {
    let mut out = Vec::new();
    let mut seen: Vec<(Vec<String>, Vec<String>)> = Vec::new();
    // As istiod: a match's subnets stay in force for the ones after it.
    let mut cidrs = wish.cidrs.clone();
    for rule in rules {
        for route in rule.spec.tls.iter().filter(|r| !r.route.is_empty()) {
            let matching = |m: &&TlsMatchAttributes| {
                applies(cx, wish.port, &m.gateways, &m.source_labels, m.port, &m.source_namespace)
            };
            for m in route.r#match.iter().filter(matching) {
                if !m.destination_subnets.is_empty() && wish.port > 0 {
                    cidrs.clone_from(&m.destination_subnets);
                }
                let key = (m.sni_hosts.clone(), m.destination_subnets.clone());
                if seen.contains(&key) {
                    continue;
                }
                seen.push(key);
                out.push(Chain {
                    metadata: rule_metadata(rule),
                    sni: m.sni_hosts.clone(),
                    cidrs: cidrs.clone(),
                    filters: network::routed(
                        cx,
                        wish.protocol,
                        wish.named_port(),
                        &route.route,
                        (&rule.name, &rule.namespace),
                    ),
                    ..Chain::default()
                });
            }
        }
    }
    if !out.is_empty() {
        return out;
    }
    let service = wish.service;
    let own = match cx.service_address(service) {
        range if range.contains('/') => "",
        plain if cx.is_external_v6(service, plain) => "::",
        plain => plain,
    };
    let wildcard = cx.wildcards()[0];
    let by_name = !wish.of_pod
        && (!cidrs.is_empty()
            || own.is_empty()
            || (own == wildcard && bind == wildcard)
            || (service.is_wildcard() && service.resolution == Resolution::DynamicDns));
    let mut sni = Vec::new();
    if by_name {
        sni.push(service.hostname.to_string());
        for (alias, _) in &service.aliases {
            sni.push(alias.to_string());
            sni.extend(alternatives(cx, alias, &cx.node.dns_domain, 0));
        }
    }
    vec![Chain { sni, cidrs, to: Some(wish.to_service()), ..Chain::default() }]
}

fn default_filters(cx: &Context<'_>, to: &ToService) -> Vec<Filter> {
    let service = &to.service;
    let rule = cx.scope.destination_rule(cx.node, &service.hostname, true);
    let port = network::default_port(service, to.port);
    let cluster = names::outbound(port, "", &service.hostname);
    let stat = names::StatName {
        host: &service.hostname,
        kubernetes: names::of_kubernetes(service),
        subset: "",
        port,
        port_name: "",
        target: Some(0),
    };
    let target = network::Target { cluster: &cluster, subset: "", rule: rule.map(|r| &r.spec), port: to.port };
    network::single(cx, to.protocol, &target, Some(service), Some(stat))
}

/// TCP by VirtualServices, else to the service (istiod `buildSidecarOutboundTCPFilterChainOpts`).
fn plain_chains(cx: &Context<'_>, wish: &Wish<'_>, rules: &[&Arc<Config<VirtualService>>]) -> Vec<Chain> {
    let mut out = Vec::new();
    for rule in rules {
        for route in rule.spec.tcp.iter().filter(|r| !r.route.is_empty()) {
            let filters =
                || network::routed(cx, wish.protocol, wish.named_port(), &route.route, (&rule.name, &rule.namespace));
            let matching = |m: &&L4MatchAttributes| {
                applies(cx, wish.port, &m.gateways, &m.source_labels, m.port, &m.source_namespace)
            };
            let chain = |cidrs, metadata| Chain { cidrs, metadata, filters: filters(), ..Chain::default() };
            let mut subnets: Vec<String> = Vec::new();
            let mut unconditional = route.r#match.is_empty();
            for m in route.r#match.iter().filter(matching) {
                if m.destination_subnets.is_empty() || wish.port == 0 {
                    unconditional = true;
                    break;
                }
                subnets.extend(m.destination_subnets.iter().cloned());
            }
            if unconditional {
                out.push(chain(wish.cidrs.clone(), rule_metadata(rule)));
                return out;
            }
            if !subnets.is_empty() {
                out.push(chain(subnets.clone(), None));
                let mut own = wish.cidrs.clone();
                own.sort();
                subnets.sort();
                if own == subnets {
                    return out;
                }
            }
        }
    }
    out.push(Chain { cidrs: wish.cidrs.clone(), to: Some(wish.to_service()), ..Chain::default() });
    out
}

fn finish(cx: &Context<'_>, entry: &Entry, fallback: &[Filter]) -> Listener {
    let bind = entry.binds.first().map_or("", String::as_str);
    let name = names::listener(bind, entry.port);
    let binds: Vec<&str> = entry.binds.iter().map(String::as_str).collect();
    let filters = |chain: &Chain| match &chain.to {
        Some(to) => default_filters(cx, to),
        None => chain.filters.clone(),
    };
    let chains: Vec<(&Chain, Vec<Filter>)> = entry.chains.iter().map(|chain| (chain, filters(chain))).collect();
    let is_dynamic = |f: &Filter| f.name == crate::filters::SNI_FORWARD_PROXY;
    let tls = chains.iter().any(|(chain, filters)| !chain.sni.is_empty() || filters.iter().any(is_dynamic));
    let sniffs = entry.chains.iter().any(|c| !c.alpn.is_empty());
    let mut listener_filters = Vec::new();
    if tls {
        listener_filters.push(listener_filter("envoy.filters.listener.tls_inspector", &tls_inspector()));
    }
    if sniffs {
        listener_filters.push(listener_filter("envoy.filters.listener.http_inspector", &HttpInspector::default()));
    }
    let mut listener = Listener {
        address: Some(address(bind, entry.port)),
        additional_addresses: additional(&binds, entry.port),
        traffic_direction: TrafficDirection::Outbound as i32,
        continue_on_listener_filters_timeout: true,
        max_connections_to_accept_per_socket_event: if entry.bind_to_port { accept_one(cx) } else { None },
        connection_balance_config: balance(cx.node.outbound_exact_balance && entry.balanced),
        bind_to_port: if entry.bind_to_port { None } else { bool_value(false) },
        listener_filters,
        listener_filters_timeout: match sniffs {
            true => cx.push.mesh.protocol_detection_timeout.map(duration),
            false => Some(seconds(0)),
        },
        ..Listener::default()
    };
    for (chain, filters) in chains {
        let filter_chain_match = chain.to_match();
        let mut out = FilterChain {
            metadata: chain.metadata.clone(),
            filters,
            transport_socket_connect_timeout: Some(cx.push.settings.handshake_timeout)
                .filter(|timeout| !timeout.is_zero())
                .map(duration),
            ..FilterChain::default()
        };
        if let Some(own) = &chain.http {
            out.filters.extend(wasm::before_http(cx, Side::Client, entry.port));
            out.filters.push(http::filter(
                cx,
                Manager {
                    side: Side::Client,
                    routes: Routes::Named(own.route.clone()),
                    stat_prefix: outbound_prefix(&name),
                    protocol: own.protocol,
                    is_forward_proxy: own.is_forward_proxy,
                    port: entry.port,
                    service: own.service.as_deref(),
                },
            ));
        }
        match filter_chain_match {
            None => listener.default_filter_chain = Some(out),
            own => listener.filter_chains.push(FilterChain { filter_chain_match: own, ..out }),
        }
    }
    match listener.default_filter_chain.take() {
        Some(only) if listener.filter_chains.is_empty() => listener.filter_chains.push(only),
        Some(own) => listener.default_filter_chain = Some(own),
        None => {
            listener.default_filter_chain = Some(FilterChain {
                filter_chain_match: Some(FilterChainMatch::default()),
                name: "PassthroughFilterChain".to_owned(),
                filters: fallback.to_vec(),
                ..FilterChain::default()
            });
        }
    }
    listener.name = name;
    listener
}

/// Reads as much as a small ClientHello needs.
pub(super) fn tls_inspector() -> TlsInspector {
    TlsInspector { initial_read_buffer_size: u32_value(512), ..TlsInspector::default() }
}

/// Plain HTTP to unknown addresses, for hosts that are looked up by name
/// (istiod `buildAllowAnyDynamicDNSHTTPFilterChain`).
pub(super) fn dynamic_dns(cx: &Context<'_>) -> FilterChain {
    let manager = Manager {
        side: Side::Client,
        routes: Routes::Inline(Box::new(crate::route::dynamic_dns(cx))),
        stat_prefix: outbound_prefix("virtualOutbound_allow_any_dynamic_dns"),
        protocol: Protocol::Http,
        is_forward_proxy: false,
        port: 0,
        service: None,
    };
    FilterChain {
        name: "virtualOutbound-catchall-tcp-http".to_owned(),
        filter_chain_match: Some(FilterChainMatch {
            application_protocols: plaintext_http(cx),
            ..FilterChainMatch::default()
        }),
        filters: vec![http::filter(cx, manager)],
        ..FilterChain::default()
    }
}

/// The forward proxy on loopback (istiod `buildHTTPProxy`).
pub(super) fn forward_proxy(cx: &Context<'_>, port: u16) -> Listener {
    let chain = HttpChain {
        route: HTTP_PROXY_ROUTE.to_owned(),
        protocol: Protocol::Http,
        service: None,
        is_forward_proxy: true,
    };
    let entry = Entry {
        binds: owned(cx.localhosts()),
        bind_to_port: true,
        port,
        locked: false,
        chains: vec![Chain { http: Some(chain), ..Chain::default() }],
        shapes: HashSet::new(),
        kind: Kind::Http,
        protocol: Protocol::Http,
        balanced: false,
        conflicts: Vec::new(),
    };
    finish(cx, &entry, &[])
}
