//! Virtual hosts of outbound route tables: services, and VirtualServices over them.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use envoy_api::Any;
use envoy_api::route::{Route, RouteAction, VirtualHost};
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use istio_api::VirtualService;
use push_context::{Config, EgressListener, Same, host};
use registry::{Port, Provider, Resolution, Service, UNSPECIFIED_IP};

use super::action::{self, Services, hash_policy, service_hash};
use super::{default_route, retry, session};
use crate::context::{Addressing, Context};
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
    pub(super) named: Arc<Named>,
    pub(super) routes: Routes,
}

/// A virtual host but for its routes.
#[derive(Default)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) domains: Vec<String>,
    /// Which of the domains are short forms, that give way to services of that name.
    short: Vec<bool>,
    counts_attempts: bool,
    session: Option<Any>,
    /// Its field of a route table, encoded, with [`Routes::Plain`]: those of its service.
    pub(super) plain: OnceLock<Box<[u8]>>,
}

impl Named {
    /// The same with other domains, none of which gives way any more.
    pub(super) fn with(&self, domains: Vec<String>) -> Arc<Named> {
        Arc::new(Named {
            name: self.name.clone(),
            domains,
            counts_attempts: self.counts_attempts,
            session: self.session.clone(),
            ..Named::default()
        })
    }

    pub(super) fn message(&self) -> VirtualHost {
        let session = self.session.iter().map(|own| (crate::filters::STATEFUL_SESSION.to_owned(), own.clone()));
        VirtualHost {
            name: self.name.clone(),
            domains: self.domains.clone(),
            include_request_attempt_count: self.counts_attempts,
            typed_per_filter_config: session.collect(),
            ..VirtualHost::default()
        }
    }
}

/// The virtual hosts of a route table, whole.
pub(crate) fn outbound(cx: &Context<'_>, route_name: &str, port: u16) -> Vec<VirtualHost> {
    let whole = |Host { named, routes }| VirtualHost {
        routes: match routes {
            Routes::Made(routes) => routes.iter().cloned().map(action::Made::into_message).collect(),
            Routes::Plain(service, port) => vec![service_route(cx, &service, port)],
        },
        ..named.message()
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
                false => narrowed(cx, service, own),
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

/// The service with this port only: one object as long as the service is.
fn narrowed(cx: &Context<'_>, service: &Arc<Service>, own: &Port) -> Arc<Service> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Service>, u16);
    cx.push.memo().get(Key(Same(service.clone()), own.port), || {
        Arc::new(Service {
            ports: vec![own.clone()],
            hostname: service.hostname.to_ascii_lowercase().into(),
            ..(**service).clone()
        })
    })
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
    let view = View::of(cx, port);
    let own = |group| {
        let Group { port, services, hosts, .. }: &Group = group;
        let hosts = hosts.iter().map(|h| Arc::new(named_host(cx, &h.to_ascii_lowercase(), *port)));
        hosts.chain(services.iter().map(|s| view.named(s, *port))).collect::<Vec<_>>()
    };
    let all: Vec<(&Group, Vec<Arc<Named>>)> = groups.iter().map(|group| (group, own(group))).collect();
    let mut names = HashSet::with_capacity(groups.len());
    let mut taken: HashSet<Cow<'_, str>> = HashSet::with_capacity(groups.len() * 5);
    let mut out: Vec<(u16, Host)> = Vec::with_capacity(groups.len());
    for (group, named) in all.iter().flat_map(|(group, own)| own.iter().map(move |named| (group, named))) {
        if !names.insert(&*named.name) {
            continue;
        }
        let mut free = Vec::with_capacity(named.domains.len());
        for (domain, short) in named.domains.iter().zip(&named.short) {
            if !(*short && is_known(domain)) && taken.insert(lower(domain)) {
                free.push(domain);
            }
        }
        if free.is_empty() {
            continue;
        }
        let named = match free.len() == named.domains.len() {
            true => named.clone(),
            false => named.with(free.into_iter().cloned().collect()),
        };
        out.push((group.port, Host { named, routes: group.routes.clone() }));
    }
    if port != 0 {
        return out.into_iter().filter(|(p, _)| *p == port).map(|(_, v)| v).collect();
    }
    // Of all ports: only those of port 80 may be named without it.
    let merge = |(own, mut v): (u16, Host)| {
        if own != 80 {
            v.named = v.named.with(v.named.domains.iter().filter(|d| d.contains(':')).cloned().collect());
        }
        (!v.named.domains.is_empty()).then_some(v)
    };
    out.into_iter().filter_map(merge).collect()
}

fn lower(domain: &str) -> Cow<'_, str> {
    match domain.bytes().any(|byte| byte.is_ascii_uppercase()) {
        true => Cow::Owned(domain.to_ascii_lowercase()),
        false => Cow::Borrowed(domain),
    }
}

/// The virtual host of a rule's host that is no service.
fn named_host(cx: &Context<'_>, hostname: &str, port: u16) -> Named {
    let name = host_port(hostname, port);
    let mut domains = vec![host_text(hostname)];
    if crate::grpc::is_client(cx.node) {
        domains.push(name.clone());
    }
    let short = vec![false; domains.len()];
    Named { name, domains, short, counts_attempts: counts_attempts(cx), ..Named::default() }
}

/// How a proxy sees services, as far as their virtual hosts differ by it: most are the same for proxies of all namespaces,
/// and stay while rules change.
struct View<'a> {
    cx: &'a Context<'a>,
    how: How,
    /// The proxy's domain, and what it is for services of other namespaces.
    domain: Arc<str>,
    elsewhere: Arc<str>,
}

#[derive(Clone, Copy, Eq, Hash, PartialEq)]
struct How {
    /// Domains are with ports, too.
    ports: bool,
    counts_attempts: bool,
    addressing: Addressing,
}

impl<'a> View<'a> {
    fn of(cx: &'a Context<'a>, listener_port: u16) -> View<'a> {
        let domain = &*cx.node.dns_domain;
        let how = How {
            // Envoy ignores ports in route tables of one port; gRPC's clients do not.
            ports: listener_port == 0 || crate::grpc::is_client(cx.node),
            counts_attempts: counts_attempts(cx),
            addressing: cx.addressing(),
        };
        View {
            cx,
            how,
            domain: domain.into(),
            elsewhere: domain.find(".svc.").map_or(domain, |at| &domain[at..]).into(),
        }
    }

    /// The virtual host of a service's port.
    fn named(&self, service: &Arc<Service>, port: u16) -> Arc<Named> {
        #[derive(Eq, Hash, PartialEq)]
        struct Key {
            service: Same<Service>,
            port: u16,
            how: How,
            domain: Arc<str>,
        }
        let own = self.domain.strip_suffix(&*self.elsewhere);
        let mut names = service.aliases.iter().map(|(name, _)| name).chain([&service.hostname]);
        let near =
            own.is_some() && names.any(|name| in_cluster(name).is_some_and(|(_, _, theirs)| Some(theirs) == own));
        let domain = if near { &self.domain } else { &self.elsewhere };
        let key = Key { service: Same(service.clone()), port, how: self.how, domain: domain.clone() };
        self.cx.push.memo().get(key, || {
            let (domains, expanded) = service_domains(self.cx, service, domain, if self.how.ports { port } else { 0 });
            Arc::new(Named {
                name: host_port(&service.hostname, port),
                short: domains.iter().map(|domain| expanded.contains(domain)).collect(),
                domains,
                counts_attempts: self.how.counts_attempts,
                session: session::of_service(self.cx, service),
                plain: OnceLock::new(),
            })
        })
    }
}

fn push_domain(out: &mut Vec<String>, domain: &str, port: u16) {
    out.push(host_text(domain));
    if port != 0 {
        out.push(host_port(domain, port));
    }
}

/// All names of a service, and which of them are short forms (istiod `generateVirtualHostDomains`).
fn service_domains(cx: &Context<'_>, service: &Service, dns_domain: &str, port: u16) -> (Vec<String>, Vec<String>) {
    let (mut domains, mut expanded) = (Vec::new(), Vec::new());
    let aliases = service.aliases.iter().map(|(name, _)| &**name);
    for name in std::iter::once(&*service.hostname).chain(aliases) {
        let short = alternatives(cx, name, dns_domain, port);
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
pub(crate) fn alternatives(cx: &Context<'_>, hostname: &str, dns_domain: &str, port: u16) -> Vec<String> {
    let mut out = Vec::new();
    if cx.push.settings.absolute_names {
        if hostname.parse::<std::net::IpAddr>().is_err() {
            out.push([hostname, "."].concat());
        }
        if port != 0 {
            out.push(host_port(&format!("{hostname}."), port));
        }
    }
    out.extend(relative(hostname, port, dns_domain));
    out
}

/// A name as it is within a cluster, with its two parts: service and namespace.
fn in_cluster(hostname: &str) -> Option<(&str, &str, &str)> {
    let (in_cluster, _) = hostname.split_once(".svc.")?;
    let (name, namespace) = in_cluster.split_once('.')?;
    Some((in_cluster, name, namespace))
}

/// Names relative to the proxy's domain.
fn relative(hostname: &str, port: u16, dns_domain: &str) -> Vec<String> {
    let mut out = Vec::new();
    if let Some((namespace, domain)) = dns_domain.split_once(".svc.") {
        if hostname.ends_with(&format!(".svc.{domain}"))
            && let Some((in_cluster, name, own_namespace)) = in_cluster(hostname)
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
