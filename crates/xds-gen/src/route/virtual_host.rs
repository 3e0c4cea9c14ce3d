//! Virtual hosts of outbound route tables: services, and VirtualServices over them.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_api::route::{Route, RouteAction, VirtualHost};
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use istio_api::VirtualService;
use push_context::{Config, EgressListener, host};
use registry::{Provider, Resolution, Service, UNSPECIFIED_IP};

use super::action::{self, Services, hash_policy, service_hash};
use super::{default_route, retry, session};
use crate::context::Context;
use crate::names;
use crate::proto::{host_port, host_text};

/// Whether requests carry their attempt's number.
pub(super) fn counts_attempts(cx: &Context<'_>) -> bool {
    crate::listener::counts_attempts(cx)
}

/// Whether rewritten requests carry the host they were for.
pub(super) fn forwards_host(cx: &Context<'_>) -> bool {
    crate::listener::forwards_host(cx)
}

/// Routes, and the hosts they are for.
struct Group {
    port: u16,
    services: Vec<Arc<Service>>,
    /// Hosts of a VirtualService that are no service.
    hosts: Vec<String>,
    routes: Routes,
}

/// Routes of a virtual host. Most have but one, and that differs in nothing but names.
#[derive(Clone)]
pub(super) enum Routes {
    Made(Arc<Vec<action::Made>>),
    /// All requests to a service's port, without any rule.
    Plain(Arc<Service>, u16),
}

/// A virtual host whose routes are beside it.
pub(super) struct Host {
    pub(super) host: VirtualHost,
    pub(super) routes: Routes,
}

/// The virtual hosts of a route table, whole.
pub(crate) fn outbound(cx: &Context<'_>, route_name: &str, port: u16) -> Vec<VirtualHost> {
    let whole = |Host { host, routes }| VirtualHost {
        routes: match routes {
            Routes::Made(routes) => routes.iter().cloned().map(action::Made::into_message).collect(),
            Routes::Plain(service, port) => vec![service_route(cx, &service, port)],
        },
        ..host
    };
    hosts(cx, route_name, port).into_iter().map(whole).collect()
}

/// istiod `BuildSidecarOutboundVirtualHosts`. Port 0: of all ports, for forward proxies and unix sockets.
pub(super) fn hosts(cx: &Context<'_>, route_name: &str, port: u16) -> Vec<Host> {
    let Some(egress) = cx.scope.egress_for_route(port, route_name) else { return Vec::new() };
    let port = if egress.is_http_proxy() { 0 } else { port };
    let mut services: Services = HashMap::with_capacity(egress.services.len());
    let mut order: Vec<Arc<str>> = Vec::with_capacity(egress.services.len());
    for service in &egress.services {
        let narrowed = if port == 0 {
            service.clone()
        } else {
            let Some(own) = service.port(port) else { continue };
            let is_lower = !service.hostname.bytes().any(|byte| byte.is_ascii_uppercase());
            match service.ports.len() == 1 && is_lower {
                true => service.clone(),
                false => Arc::new(Service {
                    ports: vec![own.clone()],
                    hostname: service.hostname.to_ascii_lowercase().into(),
                    ..(**service).clone()
                }),
            }
        };
        let name = narrowed.hostname.clone();
        if services.insert(name.clone(), narrowed).is_none() {
            order.push(name);
        }
    }
    let mut groups = Vec::new();
    let mut routed: HashSet<Arc<str>> = HashSet::new();
    for rule in egress.virtual_services.iter().filter(|r| port == 80 || touches(r, &services)) {
        let routes = action::routes(cx, rule, port, &services);
        if routes.is_empty() {
            continue;
        }
        groups.extend(rule_groups(cx, rule, routes, egress, &services, &order, port));
    }
    for service in groups.iter().flat_map(|g| &g.services) {
        routed.insert(service.hostname.clone());
    }
    for name in order.iter().filter(|name| !routed.contains(*name)) {
        let service = &services[name];
        if service.resolution == Resolution::Alias {
            continue;
        }
        for own in service.ports.iter().filter(|p| p.protocol.is_http() || p.protocol.is_unsupported()) {
            groups.push(Group {
                port: own.port,
                services: vec![service.clone()],
                hosts: Vec::new(),
                routes: match service_hash(cx, service, own.port) {
                    None => Routes::Plain(service.clone(), own.port),
                    Some(_) => Routes::Made(Arc::new(vec![action::Made::new(
                        service_route(cx, service, own.port),
                        Vec::new(),
                    )])),
                },
            });
        }
    }
    assemble(cx, groups, port)
}

/// Whether a rule has to do with any of the services (istiod `selectVirtualServices`).
fn touches(rule: &Config<VirtualService>, services: &Services) -> bool {
    rule.spec.hosts.iter().map(|h| h.to_ascii_lowercase()).any(|h| {
        let wild = host::is_wildcard(&h);
        services.contains_key(h.as_str())
            || services.keys().any(|s| (wild || host::is_wildcard(s)) && host::matches(&h, s))
    })
}

fn service_route(cx: &Context<'_>, service: &Service, port: u16) -> Route {
    let mut action = plain_action(cx);
    action.hash_policy.extend(service_hash(cx, service, port).as_ref().and_then(hash_policy));
    let operation = format!("{}:{port}/*", service.hostname);
    default_route(&names::outbound(port, "", &service.hostname), &operation, action)
}

/// What is done with requests that no rule is for.
pub(super) fn plain_action(cx: &Context<'_>) -> RouteAction {
    let mut action = RouteAction::default();
    action::timeouts(&mut action, None);
    action.retry_policy = retry::outbound(cx.push.mesh.default_http_retry_policy.as_ref(), false);
    action
}

/// The services that a rule routes, by port (istiod `buildSidecarVirtualHostsForVirtualService`).
fn rule_groups(
    cx: &Context<'_>,
    rule: &Config<VirtualService>,
    routes: Vec<action::Made>,
    egress: &EgressListener,
    services: &Services,
    order: &[Arc<str>],
    port: u16,
) -> Vec<Group> {
    let mut hosts = Vec::new();
    let mut matching: Vec<Arc<Service>> = Vec::new();
    for name in &rule.spec.hosts {
        let lower = name.to_ascii_lowercase();
        if host::is_wildcard(&lower) {
            continue;
        }
        match services.get(lower.as_str()) {
            Some(service) => matching.push(service.clone()),
            None => hosts.push(name.clone()),
        }
    }
    for name in rule.spec.hosts.iter().map(|h| h.to_ascii_lowercase()).filter(|h| host::is_wildcard(h)) {
        if rule.is_gateway_api() {
            hosts.push(name);
            continue;
        }
        let mut found = false;
        for service in order.iter().filter(|s| host::matches(s, &name)) {
            found = true;
            let owner = egress.wildcard_owner.get(service);
            if owner.is_some_and(|(ns, own)| *ns == rule.namespace && *own == rule.name) {
                matching.push(services[service].clone());
            }
        }
        if !found {
            hosts.push(name);
        }
    }
    // A route of the Gateway API holds for clients of its own namespace, or for all if that is the service's too.
    let own = |service: &Arc<Service>| service.namespace == rule.namespace || cx.node.namespace == rule.namespace;
    if rule.is_gateway_api() && !matching.iter().any(own) {
        return Vec::new();
    }
    let mut by_port: BTreeMap<u16, Vec<Arc<Service>>> = BTreeMap::new();
    for service in matching {
        for own in service.ports.iter().filter(|p| p.protocol.is_http() || p.protocol.is_unsupported()) {
            by_port.entry(own.port).or_default().push(service.clone());
        }
    }
    if by_port.is_empty() && port == 80 {
        by_port.insert(80, Vec::new());
    }
    let routes = Routes::Made(Arc::new(routes));
    by_port
        .into_iter()
        .map(|(port, services)| Group { port, services, hosts: hosts.clone(), routes: routes.clone() })
        .collect()
}

fn assemble(cx: &Context<'_>, groups: Vec<Group>, port: u16) -> Vec<Host> {
    let all = || groups.iter().flat_map(|g| g.services.iter().map(|s| (&s.hostname, g.port)));
    let known: HashSet<&str> = all().map(|(name, _)| &**name).collect();
    // Few tables have names with ports in them.
    let with_ports = OnceCell::new();
    let with_ports = || with_ports.get_or_init(|| all().map(|(name, port)| host_port(name, port)).collect());
    let is_known =
        |name: &str| known.contains(name) || (name.contains(':') && HashSet::<String>::contains(with_ports(), name));
    let mut names = HashSet::with_capacity(groups.len());
    let mut taken: HashSet<String> = HashSet::with_capacity(groups.len() * 5);
    let mut out: Vec<(u16, Host)> = Vec::with_capacity(groups.len());
    for group in &groups {
        let hosts = group.hosts.iter().map(|h| (h.to_ascii_lowercase(), None));
        let services = group.services.iter().map(|s| (s.hostname.to_string(), Some(s)));
        for (hostname, service) in hosts.chain(services) {
            let name = host_port(&hostname, group.port);
            if !names.insert(name.clone()) {
                continue;
            }
            let (mut domains, expanded) = match service {
                None if crate::grpc::is_client(cx.node) => (vec![host_text(&hostname), name.clone()], Vec::new()),
                None => (vec![host_text(&hostname)], Vec::new()),
                Some(service) => service_domains(cx, service, port, group.port),
            };
            domains.retain(|d| !(is_known(d) && expanded.contains(d)) && taken.insert(d.to_ascii_lowercase()));
            if domains.is_empty() {
                continue;
            }
            let host = VirtualHost {
                name,
                domains,
                include_request_attempt_count: counts_attempts(cx),
                typed_per_filter_config: service
                    .and_then(|service| session::of_service(cx, service))
                    .map(|own| (crate::filters::STATEFUL_SESSION.to_owned(), own))
                    .into_iter()
                    .collect(),
                ..VirtualHost::default()
            };
            out.push((group.port, Host { host, routes: group.routes.clone() }));
        }
    }
    if port != 0 {
        return out.into_iter().filter(|(p, _)| *p == port).map(|(_, v)| v).collect();
    }
    // Of all ports: only those of port 80 may be named without it.
    let merge = |(own, mut v): (u16, Host)| {
        if own != 80 {
            v.host.domains.retain(|d| d.contains(':'));
        }
        (!v.host.domains.is_empty()).then_some(v)
    };
    out.into_iter().filter_map(merge).collect()
}

fn push_domain(out: &mut Vec<String>, domain: &str, port: u16) {
    out.push(host_text(domain));
    if port != 0 {
        out.push(host_port(domain, port));
    }
}

/// All names of a service, and which of them are short forms (istiod `generateVirtualHostDomains`).
fn service_domains(cx: &Context<'_>, service: &Service, listener_port: u16, port: u16) -> (Vec<String>, Vec<String>) {
    // Envoy ignores ports in route tables of one port; gRPC's clients do not.
    let port = if listener_port != 0 && !crate::grpc::is_client(cx.node) { 0 } else { port };
    let (mut domains, mut expanded) = (Vec::new(), Vec::new());
    let aliases = service.aliases.iter().map(|(name, _)| &**name);
    for name in std::iter::once(&*service.hostname).chain(aliases) {
        let short = alternatives(cx, name, port);
        push_domain(&mut domains, name, port);
        domains.extend(short.iter().cloned());
        expanded.extend(short);
    }
    if service.resolution == Resolution::Passthrough && service.provider == Provider::Kubernetes {
        let wild: Vec<String> = domains.iter().map(|d| format!("*.{d}")).collect();
        domains.extend(wild);
    }
    for address in cx.service_addresses(service) {
        if !address.is_empty() && address != UNSPECIFIED_IP {
            push_domain(&mut domains, address, port);
        }
    }
    (domains, expanded)
}

/// Other ways to write a host name, with a trailing dot or relative to the proxy's domain
/// (istiod `GenerateAltVirtualHosts`). Port 0: without ports.
pub(crate) fn alternatives(cx: &Context<'_>, hostname: &str, port: u16) -> Vec<String> {
    let mut out = Vec::new();
    if cx.push.settings.absolute_names {
        if hostname.parse::<std::net::IpAddr>().is_err() {
            out.push([hostname, "."].concat());
        }
        if port != 0 {
            out.push(host_port(&format!("{hostname}."), port));
        }
    }
    out.extend(relative(hostname, port, &cx.node.dns_domain));
    out
}

/// Names relative to the proxy's domain.
fn relative(hostname: &str, port: u16, dns_domain: &str) -> Vec<String> {
    let mut out = Vec::new();
    if let Some((namespace, domain)) = dns_domain.split_once(".svc.") {
        if hostname.ends_with(&format!(".svc.{domain}"))
            && let Some((in_cluster, _)) = hostname.split_once(".svc.")
            && let Some((name, own_namespace)) = in_cluster.split_once('.')
        {
            if own_namespace == namespace {
                push_domain(&mut out, name, port);
                push_domain(&mut out, &format!("{in_cluster}.svc"), port);
                push_domain(&mut out, in_cluster, port);
            } else {
                push_domain(&mut out, in_cluster, port);
                push_domain(&mut out, &format!("{in_cluster}.svc"), port);
            }
        }
        return out;
    }
    // Elsewhere: what is left when the domain that both share is taken off.
    let own: Vec<&str> = hostname.split('.').collect();
    let theirs: Vec<&str> = dns_domain.split('.').collect();
    let shared = own.iter().rev().zip(theirs.iter().rev()).take_while(|(a, b)| a == b).count();
    if shared == 0 {
        return out;
    }
    let unique = own[..own.len() - shared].join(".");
    if unique.is_empty() {
        return out;
    }
    push_domain(&mut out, &unique, port);
    if own.len() - shared == 2 {
        push_domain(&mut out, &format!("{unique}.{}", own[own.len() - shared]), port);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_depend_on_the_namespace() {
        let of = |domain| relative("a.prod.svc.cluster.local", 0, domain);
        assert_eq!(of("prod.svc.cluster.local"), ["a", "a.prod.svc", "a.prod"]);
        assert_eq!(of("test.svc.cluster.local"), ["a.prod", "a.prod.svc"]);
        assert!(relative("example.com", 80, "prod.svc.cluster.local").is_empty());
        assert_eq!(relative("a.b.example.com", 80, "example.com"), ["a.b", "a.b:80", "a.b.example", "a.b.example:80"]);
    }
}
