//! What one proxy may see: istiod's SidecarScope.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt};
use istio_api::destination_rule::ConnectionPoolSettings;
use istio_api::mesh_config::OutboundTrafficPolicyMode as MeshMode;
use istio_api::sidecar::{IstioEgressListener, OutboundTrafficPolicy, OutboundTrafficPolicyMode};
use istio_api::virtual_service::{Destination, HttpRoute};
use istio_api::{DestinationRule, Sidecar, VirtualService};
use mesh_types::{ArcStr, Protocol, selects};
use registry::{Provider, Service};

use crate::{Config, ConsolidatedRule, Node, PushContext, host};

/// Which scope: the Sidecar it is from, if any, and the namespace it is for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Key {
    sidecar: Option<(ArcStr, ArcStr)>,
    namespace: ArcStr,
}

impl Key {
    pub(crate) fn new(node: &Node, sidecar: Option<&Arc<Config<Sidecar>>>) -> Key {
        Key { sidecar: sidecar.map(|s| (s.namespace.clone(), s.name.clone())), namespace: node.namespace.clone() }
    }
}

/// One egress listener of a Sidecar and what it imports.
#[derive(Debug)]
pub struct EgressListener {
    /// As written; `*/*` when there is none.
    pub listener: IstioEgressListener,
    /// Services it may reach.
    pub services: Vec<Arc<Service>>,
    /// VirtualServices that hold for it.
    pub virtual_services: Vec<Arc<Config<VirtualService>>>,
    /// For each service the VirtualService (namespace, name) whose wildcard host fits it best.
    pub wildcard_owner: HashMap<ArcStr, (ArcStr, ArcStr)>,
}

impl EgressListener {
    /// Its port's number; 0 without one.
    pub fn port(&self) -> u16 {
        self.listener.port.as_ref().and_then(|p| u16::try_from(p.number).ok()).unwrap_or_default()
    }
}

/// What one proxy may see.
#[derive(Debug)]
pub struct SidecarScope {
    /// Name of the Sidecar, or `default-sidecar`.
    pub name: ArcStr,
    /// Namespace of the proxies it is for.
    pub namespace: ArcStr,
    /// The Sidecar.
    pub sidecar: Option<Arc<Config<Sidecar>>>,
    /// In the order written.
    pub egress: Vec<EgressListener>,
    /// All services that any egress listener or VirtualService needs, in the order found.
    pub services: Arc<[Arc<Service>]>,
    /// What happens to traffic to unknown destinations.
    pub outbound_policy: OutboundTrafficPolicy,
    /// Of what is let through, plain HTTP goes to whom its Host names (`ALLOW_ANY_DYNAMIC_DNS`, which only the mesh
    /// can ask for).
    pub dynamic_dns: bool,
    by_host: Arc<HashMap<ArcStr, Arc<Service>>>,
    destination_rules: Arc<HashMap<ArcStr, Vec<ConsolidatedRule>>>,
    reach: Arc<Reach>,
}

/// Stands for the services of a scope and their DestinationRules: scopes that have the same share it.
#[derive(Debug)]
pub struct Reach(());

impl SidecarScope {
    pub(crate) fn build(
        push: &PushContext,
        sidecar: Option<&Arc<Config<Sidecar>>>,
        namespace: &ArcStr,
    ) -> SidecarScope {
        let everything = [IstioEgressListener { hosts: vec!["*/*".to_owned()], ..IstioEgressListener::default() }];
        let listeners = match sidecar {
            Some(sidecar) if !sidecar.spec.egress.is_empty() => &sidecar.spec.egress[..],
            _ => &everything,
        };
        let egress: Vec<EgressListener> = listeners.iter().map(|l| import(push, namespace, l)).collect();
        let mut found = Found::default();
        for listener in &egress {
            collect(push, namespace, listener, &mut found);
        }
        let mut destination_rules = HashMap::new();
        for service in &found.services {
            let rules = push.rules_for(namespace, service);
            if !rules.is_empty() {
                destination_rules.insert(service.hostname.clone(), rules);
            }
        }
        let mesh_mode = push.mesh.outbound_traffic_policy.as_ref().map(|p| p.mode);
        let of_sidecar = sidecar.is_some_and(|s| s.spec.outbound_traffic_policy.is_some());
        let outbound_policy = match sidecar.and_then(|s| s.spec.outbound_traffic_policy.clone()) {
            Some(policy) => policy,
            None => OutboundTrafficPolicy {
                mode: match mesh_mode {
                    Some(MeshMode::RegistryOnly) => OutboundTrafficPolicyMode::RegistryOnly,
                    _ => OutboundTrafficPolicyMode::AllowAny,
                },
                egress_proxy: None,
            },
        };
        SidecarScope {
            name: sidecar.map_or_else(|| "default-sidecar".into(), |s| s.name.clone()),
            namespace: namespace.clone(),
            sidecar: sidecar.cloned(),
            egress,
            services: found.services.into(),
            outbound_policy,
            dynamic_dns: !of_sidecar && mesh_mode == Some(MeshMode::AllowAnyDynamicDns),
            by_host: Arc::new(found.by_host),
            destination_rules: Arc::new(destination_rules),
            reach: Arc::new(Reach(())),
        }
    }

    /// All services by host name.
    pub fn by_host(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.by_host.values()
    }

    /// The DestinationRules of each host, and whom they are exported to.
    pub fn destination_rules(
        &self,
    ) -> impl Iterator<Item = (&ArcStr, impl Iterator<Item = (&Config<DestinationRule>, &BTreeSet<String>)>)> {
        fn both(rule: &ConsolidatedRule) -> (&Config<DestinationRule>, &BTreeSet<String>) {
            (&rule.rule, rule.export_to())
        }
        self.destination_rules.iter().map(move |(host, rules)| (host, rules.iter().map(both)))
    }

    /// The object that is the same for all scopes of the same services and DestinationRules, as far as these were told.
    pub fn reach(&self) -> &Arc<Reach> {
        &self.reach
    }

    /// Shares services and DestinationRules with another scope if that has the same ones; whether it has.
    pub(crate) fn share(&mut self, other: &SidecarScope) -> bool {
        let same_services = self.services.len() == other.services.len()
            && self.services.iter().zip(&*other.services).all(|(a, b)| a == b);
        let same_rule = |a: &ConsolidatedRule, b: &ConsolidatedRule| {
            // Whether a rule with a selector is for a proxy depends on its namespace.
            Arc::ptr_eq(&a.rule, &b.rule)
                && (a.rule.spec.workload_selector.is_none() || self.namespace == other.namespace)
        };
        let same_rules = |(host, rules): (&ArcStr, &Vec<ConsolidatedRule>)| {
            let theirs = other.destination_rules.get(host).map_or(&[][..], Vec::as_slice);
            rules.len() == theirs.len() && rules.iter().zip(theirs).all(|(a, b)| same_rule(a, b))
        };
        let same = same_services
            && self.destination_rules.len() == other.destination_rules.len()
            && self.destination_rules.iter().all(same_rules);
        if same {
            self.services = other.services.clone();
            self.by_host = other.by_host.clone();
            self.destination_rules = other.destination_rules.clone();
            self.reach = other.reach.clone();
        }
        same
    }

    /// The service of that name, if the proxy may see it.
    pub fn service(&self, hostname: &str) -> Option<&Arc<Service>> {
        self.by_host.get(hostname)
    }

    /// Whether unknown destinations are let through.
    pub fn allows_any(&self) -> bool {
        self.outbound_policy.mode == OutboundTrafficPolicyMode::AllowAny
    }

    /// The ingress listeners of the Sidecar; empty means: what the registry says.
    pub fn ingress(&self) -> &[istio_api::sidecar::IstioIngressListener] {
        self.sidecar.as_ref().map_or(&[], |s| &s.spec.ingress)
    }

    /// The Sidecar's connection pool for one inbound port.
    pub fn inbound_connection_pool(&self, port: u16) -> Option<&ConnectionPoolSettings> {
        let spec = &self.sidecar.as_ref()?.spec;
        let of_port = spec.ingress.iter().find(|i| i.port.as_ref().is_some_and(|p| p.number == u32::from(port)));
        of_port.and_then(|i| i.connection_pool.as_ref()).or(spec.inbound_connection_pool.as_ref())
    }

    /// The DestinationRule for a service: one whose selector fits this client, else the general one.
    pub fn destination_rule(
        &self,
        node: &Node,
        hostname: &str,
        outbound: bool,
    ) -> Option<&Arc<Config<DestinationRule>>> {
        let rules = self.destination_rules.get(hostname)?;
        let mut general = None;
        for rule in rules.iter().map(|r| &r.rule) {
            match &rule.spec.workload_selector {
                None => general = Some(rule),
                Some(selector) if outbound && rule.namespace == self.namespace => {
                    if selects(&selector.match_labels, &node.labels) {
                        return Some(rule);
                    }
                }
                Some(_) => {}
            }
        }
        general
    }

    /// The egress listener that a route table belongs to: `port` 0 means a unix socket named `bind`.
    pub fn egress_for_route(&self, port: u16, bind: &str) -> Option<&EgressListener> {
        self.egress.iter().find(|e| match &e.listener.port {
            None => true,
            Some(_) if e.port() != port => false,
            Some(_) => port != 0 || e.listener.bind == bind,
        })
    }
}

/// Host patterns that one namespace entry of an egress listener imports.
#[derive(Debug, Default)]
struct Hosts {
    exact: BTreeSet<String>,
    all: Vec<String>,
    excluded: Vec<String>,
}

impl Hosts {
    fn excludes(&self, name: &str) -> bool {
        self.excluded.iter().any(|e| host::is_subset(name, e))
    }

    fn imports(&self, name: &str) -> bool {
        self.exact.contains(name)
            || self.all.iter().any(|pattern| {
                (host::is_wildcard(name) || host::is_wildcard(pattern)) && host::is_subset(name, pattern)
            })
    }

    fn imports_rule(&self, rule: &Config<VirtualService>, name: &str) -> bool {
        if rule.is_gateway_api() {
            return self.imports(name);
        }
        self.exact.contains(name)
            || self
                .all
                .iter()
                .any(|pattern| (host::is_wildcard(name) || host::is_wildcard(pattern)) && host::matches(name, pattern))
    }
}

/// Before a namespace: these hosts are taken out of what others import; without a namespace out of all.
const EXCLUDES: char = '~';

fn classify(listener: &IstioEgressListener, namespace: &str) -> BTreeMap<String, Hosts> {
    let mut out: BTreeMap<String, Hosts> = BTreeMap::new();
    for text in &listener.hosts {
        let Some((ns, name)) = text.split_once('/').filter(|(_, name)| !name.contains('/')) else { continue };
        let (ns, excluded) = match ns.strip_prefix(EXCLUDES) {
            Some("") => ("*", true),
            Some(ns) => (ns, true),
            None => (ns, false),
        };
        let hosts = out.entry(if ns == "." { namespace.to_owned() } else { ns.to_owned() }).or_default();
        if excluded {
            hosts.excluded.push(name.to_owned());
            continue;
        }
        if !host::is_wildcard(name) {
            hosts.exact.insert(name.to_owned());
        }
        hosts.all.push(name.to_owned());
    }
    out
}

/// Whether all hosts are whole names in a given namespace. Then of several services of one name in one namespace one is
/// taken, and their order is that of age alone.
fn exact_only(listener: &IstioEgressListener) -> bool {
    let imported = listener.hosts.iter().filter_map(|text| text.split_once('/'));
    imported
        .filter(|(ns, name)| !ns.starts_with(EXCLUDES) && !name.contains('/'))
        .all(|(ns, name)| ns != "*" && !host::is_wildcard(name))
}

impl PushContext {
    /// istiod `servicesForExactHosts`.
    fn exact_services<'a>(&'a self, namespace: &str, hosts: &BTreeMap<String, Hosts>) -> Vec<&'a Arc<Service>> {
        let named = hosts.iter().flat_map(|(ns, hosts)| hosts.exact.iter().map(move |name| (ns, name)));
        let found = named.filter_map(|(ns, name)| self.services_by_host(name)?.get(ns.as_str()));
        let mut out: Vec<&Arc<Service>> = found.filter(|service| self.is_visible(service, namespace)).collect();
        out.sort_by_key(|s| (s.created, s.name.clone(), s.namespace.clone()));
        out
    }
}

/// Whether the listener takes only services of its own port.
fn matches_port(listener: &IstioEgressListener) -> bool {
    listener.port.as_ref().is_some_and(|p| p.number != 0 && !p.protocol.eq_ignore_ascii_case("HTTP_PROXY"))
}

/// istiod `convertIstioListenerToWrapper`.
fn import(push: &PushContext, namespace: &ArcStr, listener: &IstioEgressListener) -> EgressListener {
    let hosts = classify(listener, namespace);
    let anywhere = hosts.get("*");
    let excluded = |ns: &str, name: &str| {
        hosts.get(ns).is_some_and(|h| h.excludes(name)) || anywhere.is_some_and(|h| h.excludes(name))
    };
    let mut virtual_services: Vec<Arc<Config<VirtualService>>> = Vec::new();
    for config in push.virtual_services(namespace) {
        let imported = |name: &str| {
            let by_namespace = hosts.get(&*config.namespace).is_some_and(|h| h.imports_rule(config, name));
            (by_namespace || anywhere.is_some_and(|h| h.imports_rule(config, name)))
                && !excluded(&config.namespace, name)
        };
        let seen = |v: &Arc<Config<VirtualService>>| v.name == config.name && v.namespace == config.namespace;
        if config.spec.hosts.iter().any(|h| imported(h)) && !virtual_services.iter().any(seen) {
            virtual_services.push(config.clone());
        }
    }
    let visible = match exact_only(listener) {
        true => push.exact_services(namespace, &hosts),
        false => push.services_for(namespace),
    };
    let visible = visible.into_iter();
    let port = listener.port.as_ref().filter(|_| matches_port(listener)).map(|p| p.number);
    let imported: Vec<Arc<Service>> = visible
        .filter(|s| !excluded(&s.namespace, &s.hostname))
        .filter_map(|s| {
            let sources = [hosts.get(&*s.namespace), anywhere];
            sources.into_iter().flatten().find_map(|h| {
                let service = if h.imports(&s.hostname) { with_port(s, port) } else { None }?;
                Some(with_aliases(service, h))
            })
        })
        .collect();
    let services = one_namespace_each(imported, namespace, push.settings.unified_scope);
    let wildcard_owner = wildcard_owners(&virtual_services, &services);
    EgressListener { listener: listener.clone(), services, virtual_services, wildcard_owner }
}

/// The service reduced to the listener's port; nothing if it has no such port.
fn with_port(service: &Arc<Service>, port: Option<u32>) -> Option<Arc<Service>> {
    let Some(number) = port else { return Some(service.clone()) };
    let port = service.ports.iter().find(|p| u32::from(p.port) == number)?;
    if service.ports.len() == 1 {
        return Some(service.clone());
    }
    Some(Arc::new(Service { ports: vec![port.clone()], ..(**service).clone() }))
}

/// The service with only those aliases that are imported too.
fn with_aliases(service: Arc<Service>, hosts: &Hosts) -> Arc<Service> {
    if service.aliases.iter().all(|(name, _)| hosts.imports(name)) {
        return service;
    }
    let mut copy = (*service).clone();
    copy.aliases.retain(|(name, _)| hosts.imports(name));
    Arc::new(copy)
}

/// Of services with one host name in several namespaces those of a single namespace: the proxy's own, else, if these are
/// preferred, a Kubernetes service's, else the oldest's.
fn one_namespace_each(services: Vec<Arc<Service>>, namespace: &str, prefer: bool) -> Vec<Arc<Service>> {
    let mut chosen: HashMap<ArcStr, (ArcStr, bool)> = HashMap::new();
    for service in &services {
        let candidate = (service.namespace.clone(), prefer && service.provider == Provider::Kubernetes);
        match chosen.get(&service.hostname) {
            None => {
                chosen.insert(service.hostname.clone(), candidate);
            }
            Some((existing, kubernetes)) => {
                let better = *candidate.0 == *namespace || (!kubernetes && candidate.1 && **existing != *namespace);
                if better {
                    chosen.insert(service.hostname.clone(), candidate);
                }
            }
        }
    }
    let keep = |s: &Arc<Service>| chosen.get(&s.hostname).is_some_and(|(ns, _)| *ns == s.namespace);
    services.into_iter().filter(keep).collect()
}

/// istiod `computeWildcardHostVirtualServiceIndex`.
fn wildcard_owners(
    rules: &[Arc<Config<VirtualService>>],
    services: &[Arc<Service>],
) -> HashMap<ArcStr, (ArcStr, ArcStr)> {
    let (mut exact, mut wildcards) = (BTreeMap::new(), BTreeMap::new());
    for rule in rules {
        for name in &rule.spec.hosts {
            let map = if host::is_wildcard(name) { &mut wildcards } else { &mut exact };
            map.entry(ArcStr::from(name.as_str())).or_insert(rule);
        }
    }
    let owner = |s: &Arc<Service>| {
        let (_, rule) = host::most_specific(&s.hostname, &exact, &wildcards)?;
        Some((s.hostname.clone(), (rule.namespace.clone(), rule.name.clone())))
    };
    services.iter().filter_map(owner).collect()
}

/// Services of a scope as they are found.
#[derive(Default)]
struct Found {
    services: Vec<Arc<Service>>,
    by_host: HashMap<ArcStr, Arc<Service>>,
}

impl Found {
    /// istiod `appendSidecarServices`: of two with one host name Kubernetes' wins; equals merge their ports.
    fn add(&mut self, service: &Arc<Service>) {
        let Some(existing) = self.by_host.get(&service.hostname).cloned() else {
            self.services.push(service.clone());
            self.by_host.insert(service.hostname.clone(), service.clone());
            return;
        };
        if Arc::ptr_eq(&existing, service) {
            return;
        }
        let replacement = match (existing.provider, service.provider) {
            (Provider::Kubernetes, Provider::External) => return,
            (Provider::External, Provider::Kubernetes) => service.clone(),
            _ if existing.ports == service.ports || !mergeable(&existing, service) => return,
            _ => {
                let mut merged = (*existing).clone();
                for port in &service.ports {
                    if !merged.ports.iter().any(|p| p.port == port.port) {
                        merged.ports.push(port.clone());
                    }
                }
                Arc::new(merged)
            }
        };
        if let Some(slot) = self.services.iter_mut().find(|s| s.hostname == service.hostname) {
            *slot = replacement.clone();
        }
        self.by_host.insert(service.hostname.clone(), replacement);
    }
}

fn mergeable(a: &Service, b: &Service) -> bool {
    a.namespace == b.namespace
        && a.resolution == b.resolution
        && a.provider == b.provider
        && a.labels == b.labels
        && a.selector == b.selector
        && a.export_to == b.export_to
}

/// Adds what an egress listener imports and what its VirtualServices send to.
fn collect(push: &PushContext, namespace: &ArcStr, listener: &EgressListener, found: &mut Found) {
    listener.services.iter().for_each(|s| found.add(s));
    for rule in &listener.virtual_services {
        for (name, ports) in destinations(&rule.spec, namespace) {
            let Some(by_namespace) = push.services_by_host(&name) else { continue };
            let service = by_namespace.get(namespace).or_else(|| {
                let visible = || by_namespace.values().filter(|s| push.is_visible(s, namespace));
                if !push.settings.best_namespace {
                    return visible().next();
                }
                let kubernetes = visible().find(|s| s.provider == Provider::Kubernetes);
                kubernetes.or_else(|| visible().min_by_key(|s| s.created))
            });
            let Some(service) = service else { continue };
            let narrowed = if matches_port(&listener.listener) {
                with_port(service, listener.listener.port.as_ref().map(|p| p.number))
            } else {
                with_ports(service, &ports)
            };
            if let Some(service) = narrowed {
                found.add(&service);
            }
        }
    }
}

/// The service reduced to the ports that VirtualServices send to; 0 stands for any.
fn with_ports(service: &Arc<Service>, ports: &BTreeSet<u32>) -> Option<Arc<Service>> {
    if ports.is_empty() || ports.contains(&0) {
        return Some(service.clone());
    }
    let kept: Vec<_> = service.ports.iter().filter(|p| ports.contains(&u32::from(p.port))).cloned().collect();
    match kept.len() {
        0 => None,
        n if n == service.ports.len() => Some(service.clone()),
        _ => Some(Arc::new(Service { ports: kept, ..(**service).clone() })),
    }
}

/// Hosts and ports that a VirtualService sends to, of routes that hold for clients of `namespace`.
fn destinations(rule: &VirtualService, namespace: &str) -> BTreeMap<String, BTreeSet<u32>> {
    let mut out: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    let mut add = |destination: &Destination| {
        let port = destination.port.as_ref().map_or(0, |p| p.number);
        out.entry(destination.host.clone()).or_default().insert(port);
    };
    let applies = |route: &&HttpRoute| {
        let mut named = route.r#match.iter().filter(|m| !m.source_namespace.is_empty()).peekable();
        named.peek().is_none() || named.any(|m| m.source_namespace == namespace)
    };
    for route in rule.http.iter().filter(applies) {
        route.route.iter().filter_map(|r| r.destination.as_ref()).for_each(&mut add);
        route.mirror.iter().for_each(&mut add);
        route.mirrors.iter().filter_map(|m| m.destination.as_ref()).for_each(&mut add);
    }
    let tcp = rule.tcp.iter().flat_map(|r| &r.route);
    let tls = rule.tls.iter().flat_map(|r| &r.route);
    tcp.chain(tls).filter_map(|r| r.destination.as_ref()).for_each(&mut add);
    out
}

impl EgressListener {
    /// The protocol of its port; `HTTP_PROXY` counts as [`Protocol::Http`].
    pub fn protocol(&self) -> Option<Protocol> {
        let port = self.listener.port.as_ref()?;
        Some(if self.is_http_proxy() { Protocol::Http } else { Protocol::parse(&port.protocol) })
    }

    /// A forward proxy: applications name their destination in the request line.
    pub fn is_http_proxy(&self) -> bool {
        self.listener.port.as_ref().is_some_and(|p| p.protocol.eq_ignore_ascii_case("HTTP_PROXY"))
    }
}
