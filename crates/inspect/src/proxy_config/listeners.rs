use envoy_api::core::address;
use envoy_api::http::{HttpConnectionManager, http_connection_manager::RouteSpecifier};
use envoy_api::listener::{Filter, FilterChain, FilterChainMatch, Listener, filter::ConfigType};
use envoy_api::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier as Tcp};
use envoy_api::route::{RouteConfiguration, route::Action, route_action::ClusterSpecifier, route_match::PathSpecifier};
use envoy_api::{Any, Message};

use super::{ListenerFilter, endpoints, routes};
use crate::table::Table;

const HTTP: &str = "envoy.filters.network.http_connection_manager";
const TCP: &str = "envoy.filters.network.tcp_proxy";
const BLACK_HOLE: &[u8] = b"BlackHoleCluster";

/// Lists of application protocols that have a name.
const PROTOCOLS: [(&str, &[&str]); 4] = [
    ("App: HTTP TLS", &["http/1.0", "http/1.1", "h2c", "istio-http/1.0", "istio-http/1.1", "istio-h2"]),
    ("App: Istio HTTP Plain", &["istio", "istio-http/1.0", "istio-http/1.1", "istio-h2"]),
    ("App: TCP TLS", &["istio-peer-exchange", "istio"]),
    ("App: HTTP", &["http/1.0", "http/1.1", "h2c"]),
];

pub(super) fn select(listeners: Vec<Listener>, filter: &ListenerFilter) -> Vec<Listener> {
    listeners
        .into_iter()
        .filter(|listener| {
            filter
                .address
                .as_ref()
                .is_none_or(|wanted| addresses(listener).iter().any(|own| own.eq_ignore_ascii_case(wanted)))
                && filter.port.is_none_or(|wanted| port(listener) == wanted)
                && filter.kind.as_ref().is_none_or(|wanted| kind(listener).eq_ignore_ascii_case(wanted))
        })
        .collect()
}

pub(super) fn table(listeners: Vec<Listener>, filter: &ListenerFilter, typed: bool) -> anyhow::Result<String> {
    if listeners.is_empty() {
        anyhow::bail!("no listeners found");
    }
    let mut listeners = select(listeners, filter);
    listeners.sort_by_cached_key(|listener| {
        (port(listener), addresses(listener).swap_remove(0), kind(listener), listener.name.clone())
    });
    let all = ["NAME", "ADDRESSES", "PORT", "MATCH", "DESTINATION"];
    let short = ["NAME", "ADDRESSES", "PORT", "TYPE"];
    let head = if filter.verbose { &all[..] } else { &short[..] };
    let mut table = Table::new(1, if typed { head } else { &head[1..] });
    for listener in &listeners {
        let (addresses, port) = (addresses(listener).join(","), port(listener).to_string());
        let name = format!("listener/{}", listener.name);
        if !filter.verbose {
            match typed {
                true => table.row([name, addresses, port, kind(listener).to_owned()]),
                false => table.row([addresses, port, kind(listener).to_owned()]),
            }
            continue;
        }
        let mut lines: Vec<(String, String)> = chains(listener)
            .map(|chain| (criteria(chain.filter_chain_match.as_ref()), destination(&chain.filters)))
            .collect();
        lines.sort_by(|a, b| b.1.cmp(&a.1));
        for (matched, destination) in lines {
            match typed {
                true => table.row([name.clone(), addresses.clone(), port.clone(), matched, destination]),
                false => table.row([addresses.clone(), port.clone(), matched, destination]),
            }
        }
    }
    Ok(table.render())
}

fn chains(listener: &Listener) -> impl Iterator<Item = &FilterChain> {
    listener.filter_chains.iter().chain(&listener.default_filter_chain)
}

/// At least one, which may be empty.
fn addresses(listener: &Listener) -> Vec<String> {
    let text = |address: Option<&envoy_api::core::Address>| match address.and_then(|address| address.address.as_ref()) {
        Some(address::Address::SocketAddress(socket)) => socket.address.clone(),
        Some(address::Address::Pipe(pipe)) => pipe.path.clone(),
        _ => String::new(),
    };
    let own = std::iter::once(text(listener.address.as_ref()));
    own.chain(listener.additional_addresses.iter().map(|additional| text(additional.address.as_ref()))).collect()
}

fn port(listener: &Listener) -> u32 {
    listener.address.as_ref().map_or(0, endpoints::port)
}

fn kind(listener: &Listener) -> &'static str {
    let filters = || chains(listener).flat_map(|chain| &chain.filters);
    let http = filters().any(|filter| filter.name == HTTP);
    let tcp = filters().any(|filter| filter.name == TCP && !is_black_hole(filter));
    match (http, tcp) {
        (true, false) => "HTTP",
        (true, true) => "HTTP+TCP",
        (false, true) => "TCP",
        (false, false) => "UNKNOWN",
    }
}

fn config(filter: &Filter) -> Option<&Any> {
    match &filter.config_type {
        Some(ConfigType::TypedConfig(any)) => Some(any),
        _ => None,
    }
}

fn is_black_hole(filter: &Filter) -> bool {
    config(filter).is_some_and(|any| any.value.windows(BLACK_HOLE.len()).any(|part| part == BLACK_HOLE))
}

fn criteria(criteria: Option<&FilterChainMatch>) -> String {
    let Some(criteria) = criteria else { return "ALL".to_owned() };
    let mut out = Vec::new();
    if !criteria.server_names.is_empty() {
        out.push(format!("SNI: {}", criteria.server_names.join(",")));
    }
    if !criteria.transport_protocol.is_empty() {
        out.push(format!("Trans: {}", criteria.transport_protocol));
    }
    if !criteria.application_protocols.is_empty() {
        let named = PROTOCOLS.iter().find(|(_, list)| criteria.application_protocols == *list);
        out.push(match named {
            Some((name, _)) => (*name).to_owned(),
            None => format!("App: {}", criteria.application_protocols.join(",")),
        });
    }
    let port = criteria.destination_port.as_ref().map(|port| format!(":{}", port.value));
    if !criteria.prefix_ranges.is_empty() {
        let ranges = criteria.prefix_ranges.iter().map(|range| {
            format!("{}/{}", range.address_prefix, range.prefix_len.as_ref().map_or(0, |length| length.value))
        });
        out.push(format!("Addr: {}{}", ranges.collect::<Vec<_>>().join(","), port.unwrap_or_default()));
    } else if let Some(port) = port {
        out.push(format!("Addr: *{port}"));
    }
    if out.is_empty() { "ALL".to_owned() } else { out.join("; ") }
}

fn destination(filters: &[Filter]) -> String {
    for filter in filters {
        let Some(any) = config(filter) else { continue };
        if filter.name == HTTP {
            let manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap_or_default();
            return match &manager.route_specifier {
                Some(RouteSpecifier::RouteConfig(config)) => inline(config),
                Some(RouteSpecifier::Rds(rds)) if !rds.route_config_name.is_empty() => {
                    format!("Route: {}", rds.route_config_name)
                }
                _ => "HTTP".to_owned(),
            };
        }
        if filter.name == TCP && !is_black_hole(filter) {
            let proxy = TcpProxy::decode(any.value.as_slice()).unwrap_or_default();
            let cluster = match proxy.cluster_specifier {
                Some(Tcp::Cluster(cluster)) => cluster,
                _ => String::new(),
            };
            return named(&cluster);
        }
    }
    "Non-HTTP/Non-TCP".to_owned()
}

/// `PassthroughCluster` and its like speak for themselves.
fn named(cluster: &str) -> String {
    if cluster.contains("Cluster") { cluster.to_owned() } else { format!("Cluster: {cluster}") }
}

fn inline(config: &RouteConfiguration) -> String {
    if let Some(cluster) = only_cluster(config) {
        return named(cluster);
    }
    let hosts = config.virtual_hosts.iter().map(|host| {
        let routes: Vec<String> = host.routes.iter().filter_map(|r| r.r#match.as_ref()).map(routes::describe).collect();
        match host.domains.as_slice() {
            [only] if only == "*" => routes.join(", "),
            domains => format!("{} {}", domains.join("/"), routes.join(", ")),
        }
    });
    format!("Inline Route: {}", hosts.collect::<Vec<_>>().join("; "))
}

/// The cluster of a table that sends everything to one.
fn only_cluster(config: &RouteConfiguration) -> Option<&str> {
    let [host] = config.virtual_hosts.as_slice() else { return None };
    let ([domain], [route]) = (host.domains.as_slice(), host.routes.as_slice()) else { return None };
    let everything =
        matches!(&route.r#match.as_ref()?.path_specifier, Some(PathSpecifier::Prefix(prefix)) if prefix == "/");
    match &route.action {
        Some(Action::Route(action)) if domain == "*" && everything => match &action.cluster_specifier {
            Some(ClusterSpecifier::Cluster(cluster)) => Some(cluster),
            _ => None,
        },
        _ => None,
    }
}
