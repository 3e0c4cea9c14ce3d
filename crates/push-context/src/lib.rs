//! An immutable snapshot of everything that decides what proxies get, indexed for the generators.
//!
//! In: a [`config_store::Snapshot`], MeshConfig and [`Settings`]. Out: [`PushContext`]: services and
//! endpoints (`registry`), merged VirtualServices and DestinationRules, policies, and for each proxy
//! ([`Node`]) its [`SidecarScope`]: what it may see. Never: Envoy resources, streams, I/O, clocks.

mod authn;
mod config;
mod destination_rule;
mod extension;
pub mod host;
mod keys;
mod memo;
mod mesh_route;
mod node;
mod node_yaml;
mod rules;
mod scope;
mod virtual_service;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use config_store::{Kind, Object, Snapshot};
use istio_api::mesh_config::Visibility;
use istio_api::{AuthorizationPolicy, EnvoyFilter, MeshConfig, RequestAuthentication, Sidecar, Telemetry};
use mesh_types::{ArcStr, Labels, selects};
use registry::{Locality, Placement, Registry, Service, augment_labels};

use rules::{ByNamespace, Rules};

pub use authn::{MtlsMode, PeerPolicy, PeerRules};
pub use config::{Config, RouteSource};
pub use destination_rule::ConsolidatedRule;
pub use extension::Extension;
pub use keys::{KeySource, Keys};
pub use memo::{Memo, Same};
pub use mesh_route::quote;
pub use node::{InterceptionMode, InvalidNode, IpMode, Node, Profile, ProxyConfigText};
pub use registry::Settings;
pub use rules::ListenerRules;
pub use scope::{EgressListener, Reach, SidecarScope};

/// Services by namespace.
type Namespaces = BTreeMap<ArcStr, Arc<Service>>;

/// Everything that a push is made of; see the crate's head.
#[derive(Debug)]
pub struct PushContext {
    /// The mesh's settings.
    pub mesh: Arc<MeshConfig>,
    /// The control plane's own settings.
    pub settings: Settings,
    /// Services and endpoints.
    pub registry: Arc<Registry>,
    /// Namespace of mesh-wide policies.
    pub root_namespace: ArcStr,
    by_host: Arc<HashMap<ArcStr, Namespaces>>,
    rules: Arc<Rules>,
    snapshot: Snapshot,
    memo: Arc<Memo>,
    /// Scopes by the Sidecar they are from and the namespace they are for; made when first asked for.
    /// The lock covers the lookup only: two proxies may compute the same scope at once, which is harmless.
    scopes: Mutex<Scopes>,
    /// Scopes of an earlier snapshot, of which parts may still hold.
    former: Scopes,
}

type Scopes = HashMap<scope::Key, Arc<SidecarScope>>;

/// Stands for all of a [`PushContext`] but its MeshConfig, its [`Settings`] and endpoints of services that have an address:
/// equal while none of the rest has changed.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Identity(Same<Rules>, Same<Placement>);

impl PushContext {
    /// Reads and indexes a snapshot.
    pub fn build(snapshot: &Snapshot, mesh: &Arc<MeshConfig>, settings: &Settings) -> PushContext {
        let root_namespace = root_namespace(mesh);
        let seen = discovered(snapshot, mesh);
        let registry = Arc::new(Registry::build(&seen, mesh, settings));
        PushContext {
            mesh: mesh.clone(),
            settings: settings.clone(),
            by_host: Arc::new(by_host(&registry)),
            registry,
            rules: Arc::new(Rules::build(&seen, mesh, settings, &root_namespace, None)),
            root_namespace,
            snapshot: snapshot.clone(),
            memo: Arc::default(),
            scopes: Mutex::default(),
            former: Scopes::new(),
        }
    }

    /// The context of a newer snapshot: what changes leave alone is taken over, and so is what was generated.
    ///
    /// Equal to [`PushContext::build`] but for the time it takes.
    pub fn update(&self, snapshot: &Snapshot, mesh: &Arc<MeshConfig>) -> PushContext {
        if **mesh != *self.mesh {
            return PushContext::build(snapshot, mesh, &self.settings).with_keys((*self.rules.keys).clone());
        }
        let changed: Vec<Kind> = snapshot.changed_kinds(&self.snapshot).collect();
        let whole = snapshot;
        let snapshot = &*discovered(whole, mesh);
        if !mesh.discovery_selectors.is_empty() && changed.contains(&Kind::Namespace) {
            // Any kind may have come or gone with a namespace.
            return PushContext::build(whole, mesh, &self.settings).with_keys((*self.rules.keys).clone());
        }
        // Routes of the Gateway API hold for services that exist.
        let routed = mesh_route::ROUTES.iter().any(|kind| snapshot.len(*kind) > 0);
        let is_rule = |kind: &Kind| kind.is_custom() || (routed && mesh_route::PARENTS.contains(kind));
        let same_rules = !changed.iter().any(is_rule);
        let rules = match same_rules {
            true => self.rules.clone(),
            false => {
                let previous = Some((&*self.rules, &changed[..]));
                Arc::new(Rules::build(snapshot, mesh, &self.settings, &self.root_namespace, previous))
            }
        };
        let is_registered = |kind: &Kind| match kind {
            Kind::ServiceEntry | Kind::WorkloadEntry => true,
            Kind::Secret | Kind::ConfigMap => false,
            kind => !kind.is_custom(),
        };
        let registry = match changed.iter().any(is_registered) {
            true => Arc::new(self.registry.update(&self.snapshot, snapshot, &changed, mesh, &self.settings)),
            false => self.registry.clone(),
        };
        if **registry.networks() != **self.registry.networks() {
            // Any endpoint may be reached another way.
            return PushContext::build(whole, mesh, &self.settings).with_keys((*self.rules.keys).clone());
        }
        let same_services = registry.services.len() == self.registry.services.len()
            && registry.services.iter().zip(&self.registry.services).all(|(a, b)| Arc::ptr_eq(a, b));
        let known = self.known_scopes();
        let former = self.latest_scopes();
        let scopes = if same_rules && same_services { known } else { Scopes::new() };
        self.memo.age();
        PushContext {
            mesh: mesh.clone(),
            settings: self.settings.clone(),
            by_host: if same_services { self.by_host.clone() } else { Arc::new(by_host(&registry)) },
            registry,
            rules,
            root_namespace: self.root_namespace.clone(),
            snapshot: whole.clone(),
            memo: self.memo.clone(),
            scopes: Mutex::new(scopes),
            former,
        }
    }

    /// The same with other settings.
    pub fn with_settings(&self, settings: &Settings) -> PushContext {
        PushContext::build(&self.snapshot, &self.mesh, settings).with_keys((*self.rules.keys).clone())
    }

    fn known_scopes(&self) -> Scopes {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those of an earlier snapshot while none of this one are known.
    fn latest_scopes(&self) -> Scopes {
        let known = self.known_scopes();
        if known.is_empty() { self.former.clone() } else { known }
    }

    /// What proxies get, but for endpoints, is the same for the same identity.
    pub fn identity(&self) -> Identity {
        Identity(Same(self.rules.clone()), Same(self.registry.placement().clone()))
    }

    /// Where generators keep what they made.
    pub fn memo(&self) -> &Memo {
        &self.memo
    }

    /// Labels of clients that outbound rules may ask for; the same object while it is equal.
    pub fn client_labels(&self) -> &Arc<BTreeSet<String>> {
        &self.rules.labels
    }

    /// The rules that listeners are made of.
    pub fn listener_rules(&self) -> ListenerRules {
        self.rules.of_listeners()
    }

    /// What servers take, as one object that stays the same while nothing changes.
    pub fn peer_rules(&self) -> &Arc<PeerRules> {
        &self.rules.peers
    }

    /// The trust domain of the mesh.
    pub fn trust_domain(&self) -> &str {
        if self.mesh.trust_domain.is_empty() { "cluster.local" } else { &self.mesh.trust_domain }
    }

    /// SPIFFE identities that a client may meet behind a service, sorted.
    pub fn service_accounts(&self, service: &Service) -> Vec<String> {
        let endpoints = self.registry.endpoints(&service.hostname, &service.namespace);
        let identities = endpoints.iter().map(|e| &*e.workload.identity).filter(|i| !i.is_empty());
        // Endpoints of a service have few accounts between them.
        let mut known: Vec<&str> =
            service.service_accounts.iter().map(|account| &**account).chain(identities).collect();
        known.sort_unstable();
        known.dedup();
        let mut names: Vec<String> = known.into_iter().map(str::to_owned).collect();
        // As istio pkg/spiffe, ExpandWithTrustDomains: names of another shape stay as they are.
        let own = names.len();
        for alias in &self.mesh.trust_domain_aliases {
            let renamed = names[..own].iter().filter_map(|name| {
                let parts: Vec<&str> = name.strip_prefix("spiffe://")?.split('/').collect();
                let [_, "ns", namespace, "sa", account] = parts[..] else { return None };
                Some(format!("spiffe://{alias}/ns/{namespace}/sa/{account}"))
            });
            let renamed: Vec<String> = renamed.collect();
            names.extend(renamed);
        }
        names.sort();
        names.dedup();
        names
    }

    /// The services of one host name, by namespace.
    pub(crate) fn services_by_host(&self, hostname: &str) -> Option<&Namespaces> {
        self.by_host.get(hostname)
    }

    /// Whether a namespace may see a service (`exportTo`).
    pub fn is_visible(&self, service: &Service, namespace: &str) -> bool {
        if self.is_public(service) {
            return true;
        }
        let audience = self.audience(service);
        let sees = |to: &&str| *to == namespace || (*to == "." && *service.namespace == *namespace);
        !audience.contains(&"~") && audience.iter().any(sees)
    }

    /// Whom a service is exported to (istiod `serviceExportTo`): what it says, else what the mesh says, and no farther
    /// than the mesh lets ServiceEntries of its namespace be seen.
    fn audience<'a>(&'a self, service: &'a Service) -> Vec<&'a str> {
        let default = &self.mesh.default_service_export_to;
        let written: Vec<&str> = match (service.export_to.is_empty(), default.is_empty()) {
            (false, _) => service.export_to.iter().map(|to| &**to).collect(),
            (true, false) => default.iter().map(String::as_str).collect(),
            (true, true) => vec!["*"],
        };
        let own = |to: &&str| matches!(*to, "*" | ".") || *to == &*service.namespace;
        match service.visibility {
            Visibility::None => vec!["~"],
            Visibility::Namespace => vec![if written.iter().any(own) { "." } else { "~" }],
            Visibility::Public | Visibility::VisibilityUnspecified => written,
        }
    }

    /// The proxy as its pod or WorkloadEntry says, whose labels and place win over what it says itself.
    ///
    /// As istiod `Proxy.SetWorkloadLabels` and `setTopologyLabels`. Nothing if it is just as it says.
    pub fn effective(&self, node: &Node) -> Option<Node> {
        let workload = self.registry.workload(&node.query(&self.settings.cluster_id));
        let mut labels = match workload {
            Some(workload) if workload.is_pod => {
                let (place, network) = (&workload.locality, &workload.network);
                augment_labels(&workload.labels, &self.settings.cluster_id, place, "", network)
            }
            Some(workload) => (*workload.topology_labels).clone(),
            None => node.labels.clone(),
        };
        let place = Locality::of_topology(&labels).or_else(|| Locality::of_label(&labels));
        let locality = place.unwrap_or_else(|| node.locality.clone());
        let of_node = node.meta("NODE_NAME").unwrap_or_default();
        labels = augment_labels(&labels, &node.cluster_id, &locality, of_node, &node.network);
        let same = labels == node.labels && locality == node.locality;
        (!same).then(|| Node { labels, locality, ..node.clone() })
    }

    /// The services that a namespace may see: those exported to it by name, then the public ones, both by age. Of two
    /// with one host name the later one's routes win, so the order matters.
    pub(crate) fn services_for<'a>(&'a self, namespace: &'a str) -> Vec<&'a Arc<Service>> {
        let mut out: Vec<_> = self.registry.services.iter().filter(|s| self.is_visible(s, namespace)).collect();
        out.sort_by_cached_key(|s| self.is_public(s));
        out
    }

    fn is_public(&self, service: &Service) -> bool {
        let default = &self.mesh.default_service_export_to;
        let by_default = service.export_to.is_empty() && (default.is_empty() || default.iter().any(|to| to == "*"));
        match service.visibility {
            Visibility::Public | Visibility::VisibilityUnspecified => {
                by_default || service.export_to.iter().any(|to| &**to == "*")
            }
            Visibility::None | Visibility::Namespace => false,
        }
    }

    /// What the proxy may see.
    pub fn scope(&self, node: &Node) -> Arc<SidecarScope> {
        let sidecar = self.sidecar_for(&node.namespace, &node.labels);
        let key = scope::Key::new(node, sidecar);
        let lock = || self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(scope) = lock().get(&key) {
            return scope.clone();
        }
        let mut scope = SidecarScope::build(self, sidecar, &node.namespace);
        let others: Vec<_> = self.former.get(&key).cloned().into_iter().chain(lock().values().cloned()).collect();
        let _ = others.iter().any(|other| scope.share(other));
        lock().entry(key).or_insert(Arc::new(scope)).clone()
    }

    /// The Sidecar that applies to a workload: by selector, then its namespace's, then the root namespace's.
    ///
    /// As istiod `initSidecarScopes` and `doGetSidecarScope`: the oldest wins among equals.
    pub fn sidecar_for(&self, namespace: &str, labels: &Labels) -> Option<&Arc<Config<Sidecar>>> {
        let own = || self.rules.sidecars.iter().filter(|s| *s.namespace == *namespace);
        own()
            .find(|s| s.spec.workload_selector.as_ref().is_some_and(|w| selects(&w.labels, labels)))
            .or_else(|| own().find(|s| s.spec.workload_selector.is_none()))
            .or_else(|| {
                let mut root = self.rules.sidecars.iter().filter(|s| s.namespace == self.root_namespace);
                root.find(|s| s.spec.workload_selector.is_none())
            })
    }

    /// Authorization policies of the root namespace and the proxy's that select it, in order of age.
    pub fn authorization_policies(&self, namespace: &str, labels: &Labels) -> Vec<&Arc<Config<AuthorizationPolicy>>> {
        let selected = |policy: &&Arc<Config<AuthorizationPolicy>>| {
            let spec = &policy.spec;
            let attached = !spec.target_refs.is_empty() || spec.target_ref.is_some();
            !attached && spec.selector.as_ref().is_none_or(|s| selects(&s.match_labels, labels))
        };
        self.for_workload(&self.rules.authorization_policies, namespace, true).filter(selected).collect()
    }

    /// RequestAuthentications that select the proxy: its namespace's first, then the root namespace's.
    pub fn request_authentications(
        &self,
        namespace: &str,
        labels: &Labels,
    ) -> Vec<&Arc<Config<RequestAuthentication>>> {
        let selected = |policy: &&Arc<Config<RequestAuthentication>>| {
            let spec = &policy.spec;
            let attached = !spec.target_refs.is_empty() || spec.target_ref.is_some();
            !attached && spec.selector.as_ref().is_none_or(|s| selects(&s.match_labels, labels))
        };
        self.for_workload(&self.rules.request_authentications, namespace, false).filter(selected).collect()
    }

    /// Policies of the root namespace and of one namespace, each once.
    fn for_workload<'a, T>(
        &'a self,
        policies: &'a ByNamespace<T>,
        namespace: &str,
        root_first: bool,
    ) -> impl Iterator<Item = &'a Arc<Config<T>>> {
        let get = |namespace: &str| policies.get(namespace).map_or(&[][..], Vec::as_slice);
        let own = if *namespace == *self.root_namespace { &[] } else { get(namespace) };
        let root = get(&self.root_namespace);
        let (first, second) = if root_first { (root, own) } else { (own, root) };
        first.iter().chain(second)
    }

    /// EnvoyFilters of the root namespace, then of the proxy's, that select it, in their order of application:
    /// by priority, then age (istiod `getMatchedEnvoyFilters`).
    pub fn envoy_filters(&self, namespace: &str, labels: &Labels) -> Vec<&Arc<Config<EnvoyFilter>>> {
        let selected = |filter: &&Arc<Config<EnvoyFilter>>| {
            filter.spec.target_refs.is_empty()
                && filter.spec.workload_selector.as_ref().is_none_or(|s| selects(&s.labels, labels))
        };
        let mut out: Vec<_> = self.for_workload(&self.rules.envoy_filters, namespace, true).filter(selected).collect();
        out.sort_by_key(|filter| filter.spec.priority);
        out
    }

    /// WasmPlugins and TrafficExtensions of the proxy's namespace, then of the root namespace, that select it.
    pub fn extensions(&self, namespace: &str, labels: &Labels) -> Vec<&Arc<Config<Extension>>> {
        let selected = |extension: &&Arc<Config<Extension>>| {
            let spec = &extension.spec.plugin;
            let attached = !spec.target_refs.is_empty() || spec.target_ref.is_some();
            !attached && spec.selector.as_ref().is_none_or(|s| selects(&s.match_labels, labels))
        };
        self.for_workload(&self.rules.extensions, namespace, false).filter(selected).collect()
    }

    /// The Telemetry objects that hold for a proxy, from the widest to the narrowest: of the root namespace,
    /// of its namespace, of its labels (istiod `applicableTelemetries`).
    pub fn telemetries(&self, namespace: &str, labels: &Labels) -> Vec<&Arc<Config<Telemetry>>> {
        let get = |namespace: &str| self.rules.telemetries.get(namespace).map_or(&[][..], Vec::as_slice);
        let wide = |t: &&Arc<Config<Telemetry>>| {
            t.spec.selector.as_ref().is_none_or(|s| s.match_labels.is_empty())
                && t.spec.target_refs.is_empty()
                && t.spec.target_ref.is_none()
        };
        let own = || get(namespace).iter();
        let mut out = Vec::new();
        if *namespace != *self.root_namespace {
            out.extend(get(&self.root_namespace).iter().find(wide));
        }
        out.extend(own().find(wide));
        out.extend(own().filter(|t| {
            t.spec.selector.as_ref().is_some_and(|s| !s.match_labels.is_empty() && selects(&s.match_labels, labels))
        }));
        out
    }
}

/// What of a snapshot counts: the objects of namespaces that any of the mesh's `discoverySelectors` selects.
fn discovered<'a>(snapshot: &'a Snapshot, mesh: &MeshConfig) -> Cow<'a, Snapshot> {
    if mesh.discovery_selectors.is_empty() {
        return Cow::Borrowed(snapshot);
    }
    let selected = |object: &&Arc<Object>| mesh.discovery_selectors.iter().any(|s| s.matches(&object.labels));
    let names: BTreeSet<&str> = snapshot.list(Kind::Namespace).filter(selected).map(|o| &*o.key.name).collect();
    Cow::Owned(snapshot.within(|namespace| names.contains(namespace)))
}

fn root_namespace(mesh: &MeshConfig) -> ArcStr {
    if mesh.root_namespace.is_empty() { "istio-system".into() } else { mesh.root_namespace.as_str().into() }
}

fn by_host(registry: &Registry) -> HashMap<ArcStr, Namespaces> {
    let mut out: HashMap<ArcStr, Namespaces> = HashMap::new();
    for service in &registry.services {
        let namespaces = out.entry(service.hostname.clone()).or_default();
        let existing = namespaces.get(&service.namespace);
        // The oldest wins, but Kubernetes always wins over ServiceEntries.
        if existing.is_none_or(|old| old.provider > service.provider) {
            namespaces.insert(service.namespace.clone(), service.clone());
        }
    }
    out
}
