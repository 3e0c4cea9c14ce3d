//! Listeners by name: API listeners of hosts (`host:port`), and the ports of a gRPC server.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use envoy_api::core::{
    Address, AggregatedConfigSource, ConfigSource, address::Address as AddressKind,
    config_source::ConfigSourceSpecifier,
};
use envoy_api::http::{HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier};
use envoy_api::listener::{ApiListener, FilterChain, Listener};
use envoy_api::pb::envoy::config::rbac::v3::rbac::Action as RbacAction;
use envoy_api::route::{NonForwardingAction, Route, RouteConfiguration, VirtualHost, route};
use envoy_api::tls::DownstreamTlsContext;
use envoy_api::{Resource, any};
use istio_api::authorization_policy::Action;
use push_context::MtlsMode;
use registry::ServiceTarget;

use super::split_host_port;
use crate::Names;
use crate::authz;
use crate::context::Context;
use crate::filters;
use crate::listener::additional;
use crate::names;
use crate::proto::{bool_value, host_port, network_filter, socket_address};
use crate::route::everything;

/// Names of a server's own listeners begin so; the address follows (istio `pkg/istio-agent/grpcxds`).
const SERVER: &str = "xds.istio.io/grpc/lds/inbound/";

/// What was asked for about one host.
#[derive(Debug, Default, Eq, PartialEq)]
struct Asked {
    /// The ways it was written; there is a listener for each.
    names: BTreeSet<String>,
    /// Empty: all ports.
    ports: BTreeSet<String>,
}

/// The listeners of these names; without names those of all hosts that the client may see.
pub(super) fn all(cx: &Context<'_>, wanted: Names<'_>) -> Vec<Resource> {
    let list = match wanted {
        Names::Wildcard => &[][..],
        // It had names and gave them all up.
        Names::List([]) => return Vec::new(),
        Names::List(list) => list,
    };
    let asked = asked(list.iter().map(|name| &**name), &cx.node.namespace, &cx.node.dns_domain);
    let servers: Vec<&str> = asked.keys().filter(|name| name.starts_with(SERVER)).map(String::as_str).collect();
    let listeners = clients(cx, &asked).into_iter().chain(inbound(cx, &servers));
    listeners.map(|listener| Resource::new(listener.name.as_str(), &listener)).collect()
}

fn asked<'a>(names: impl Iterator<Item = &'a str>, namespace: &str, domain: &str) -> BTreeMap<String, Asked> {
    let mut out: BTreeMap<String, Asked> = BTreeMap::new();
    for name in names {
        if name.starts_with(SERVER) {
            out.insert(name.to_owned(), Asked { names: [name.to_owned()].into(), ports: BTreeSet::new() });
            continue;
        }
        let (host, port) = match split_host_port(name) {
            Some((host, port)) => (host, Some(port)),
            None => (name, None),
        };
        for key in std::iter::once(host.to_owned()).chain(full_name(host, namespace, domain)) {
            let known = out.contains_key(&key);
            let entry = out.entry(key).or_default();
            entry.names.insert(host.to_owned());
            match port {
                // All ports were asked for before.
                Some(_) if known && entry.ports.is_empty() => {}
                Some(port) => {
                    entry.ports.insert(port.to_owned());
                }
                None => entry.ports.clear(),
            }
        }
    }
    out
}

/// What a short name stands for in the client's namespace (istiod `tryFindFQDN`).
fn full_name(name: &str, namespace: &str, domain: &str) -> Option<String> {
    if !name.contains('.') {
        return Some(format!("{name}.{domain}"));
    }
    [namespace.to_owned(), format!("{namespace}.svc")].into_iter().find_map(|suffix| {
        let short = name.strip_suffix(&format!(".{suffix}"))?;
        domain.starts_with(&suffix).then(|| format!("{short}.{domain}"))
    })
}

fn clients(cx: &Context<'_>, asked: &BTreeMap<String, Asked>) -> Vec<Listener> {
    let mut out = Vec::new();
    for service in cx.scope.services.iter() {
        let everything = Asked { names: [service.hostname.to_string()].into(), ports: BTreeSet::new() };
        let own = if asked.is_empty() { Some(&everything) } else { asked.get(&*service.hostname) };
        let Some(own) = own else { continue };
        for name in &own.names {
            let is_wanted = |port: u16| own.ports.is_empty() || own.ports.contains(&port.to_string());
            for port in service.ports.iter().filter(|port| is_wanted(port.port)) {
                let source = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
                let session = crate::route::session::filter(cx, service);
                let session = session.map(|own| filters::http(filters::STATEFUL_SESSION, &own));
                let manager = HttpConnectionManager {
                    http_filters: session.into_iter().chain([filters::fault(), filters::router(false)]).collect(),
                    route_specifier: Some(RouteSpecifier::Rds(Rds {
                        config_source: Some(ConfigSource {
                            config_source_specifier: Some(source),
                            ..ConfigSource::default()
                        }),
                        route_config_name: names::outbound(port.port, "", &service.hostname),
                    })),
                    ..HttpConnectionManager::default()
                };
                out.push(Listener {
                    name: host_port(name, port.port),
                    address: Some(at(cx.service_address(service), port.port)),
                    additional_addresses: additional(&cx.service_addresses(service), port.port),
                    api_listener: Some(ApiListener { api_listener: Some(any(&manager)) }),
                    ..Listener::default()
                });
            }
        }
    }
    out
}

fn at(address: &str, port: u16) -> Address {
    Address { address: Some(AddressKind::SocketAddress(socket_address(address, port))) }
}

fn inbound(cx: &Context<'_>, names: &[&str]) -> Vec<Listener> {
    let targets: HashMap<u16, &ServiceTarget> = cx.targets.iter().map(|own| (own.target_port, own)).collect();
    let listener = |name: &&str| {
        let (address, port) = split_host_port(name.strip_prefix(SERVER)?)?;
        let target = targets.get(&port.parse().ok()?)?;
        // Filters of the listener and original destinations are refused by the servers.
        Some(Listener {
            name: (*name).to_owned(),
            address: Some(at(address, target.target_port)),
            additional_addresses: additional(&cx.service_addresses(&target.service), target.target_port),
            filter_chains: vec![chain(cx, target.target_port)],
            ..Listener::default()
        })
    };
    names.iter().filter_map(listener).collect()
}

fn chain(cx: &Context<'_>, port: u16) -> FilterChain {
    // Their chains cannot tell TLS from plain text: where both are accepted, the label says what clients will speak.
    let expects_mtls = cx.node.labels.get("security.istio.io/tlsMode").is_some_and(|mode| mode == "istio");
    let mtls = match cx.peer.for_port(port) {
        MtlsMode::Strict => true,
        MtlsMode::Permissive => expects_mtls,
        MtlsMode::Disable => false,
    };
    let kind = if mtls { "mtls" } else { "plaintext" };
    let of = |action, rbac| authz::grpc(cx, action, rbac);
    let deny = of(Action::Deny, RbacAction::Deny).map(|rules| filters::http("envoy.filters.http.rbac.DENY", &rules));
    let allow = of(Action::Allow, RbacAction::Allow).map(|rules| filters::http("envoy.filters.http.rbac", &rules));
    let http_filters: Vec<HttpFilter> = deny.into_iter().chain(allow).chain([filters::router(false)]).collect();
    let take = Route {
        r#match: Some(everything()),
        action: Some(route::Action::NonForwardingAction(NonForwardingAction {})),
        ..Route::default()
    };
    let table = RouteConfiguration {
        name: "inbound".to_owned(),
        virtual_hosts: vec![VirtualHost {
            domains: vec!["*".to_owned()],
            routes: vec![take],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    };
    let manager = HttpConnectionManager {
        http_filters,
        route_specifier: Some(RouteSpecifier::RouteConfig(table)),
        ..HttpConnectionManager::default()
    };
    let tls = DownstreamTlsContext {
        common_tls_context: Some(super::certificates(&[])),
        require_client_certificate: bool_value(true),
        ..DownstreamTlsContext::default()
    };
    FilterChain {
        name: format!("inbound-{kind}"),
        filters: vec![network_filter(&format!("inbound-hcm{kind}"), any(&manager))],
        transport_socket: mtls.then(|| super::transport_socket(&tls)),
        ..FilterChain::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str]) -> BTreeMap<String, Asked> {
        asked(names.iter().copied(), "ns", "ns.svc.cluster.local")
    }

    fn entry(names: &[&str], ports: &[&str]) -> Asked {
        let set = |of: &[&str]| of.iter().map(|text| (*text).to_owned()).collect();
        Asked { names: set(names), ports: set(ports) }
    }

    #[test]
    fn ports_gather_until_all_are_wanted() {
        let got = of(&["foo.com:80", "foo.com:443", "wildcard.com"]);
        assert_eq!(got["foo.com"], entry(&["foo.com"], &["80", "443"]));
        assert_eq!(got["wildcard.com"], entry(&["wildcard.com"], &[]));
        assert_eq!(of(&["foo.com:80", "foo.com", "foo.com:443"])["foo.com"], entry(&["foo.com"], &[]));
    }

    #[test]
    fn short_names_stand_for_full_ones_and_servers_for_themselves() {
        let got = of(&["foo:80", "foo.ns:81", "foo.ns.svc:82", "foo.ns.svc.cluster.local:83"]);
        let names = ["foo", "foo.ns", "foo.ns.svc", "foo.ns.svc.cluster.local"];
        assert_eq!(got["foo.ns.svc.cluster.local"], entry(&names, &["80", "81", "82", "83"]));
        assert_eq!(got["foo.ns"], entry(&["foo.ns"], &["81"]));
        let server = format!("{SERVER}[::]:8076");
        assert_eq!(of(&[&server])[&server], entry(&[&server], &[]));
        for other in ["foo.com", "foo.ns.com", "foo.ns.svc.notdnsdomain", "foo.ns.svc.cluster.local.extra"] {
            assert_eq!(full_name(other, "ns", "ns.svc.cluster.local"), None, "{other}");
        }
    }
}
