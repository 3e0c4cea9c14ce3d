//! Resources by their inputs: shared between proxies that differ in nothing that matters, and between snapshots.
//!
//! What proxies of one class share is made from the class's own [`Node`], in which everything that does not
//! matter is blank: so nothing of the proxy that happens to ask first can get in.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use envoy_api::cluster::Cluster;
use envoy_api::listener::Listener;
use envoy_api::{Message, Name, Resource, wire};
use istio_api::DestinationRule;
use mesh_types::ArcStr;
use push_context::{Config, ListenerRules, Node, PeerRules, PushContext, Reach, Same, SidecarScope};
use registry::{Endpoint, Placement, Resolution, Service, ServiceKey, TrafficDistribution, Version};

pub(crate) use crate::client::Shared;
use crate::client::{Client, Endpoints};
use crate::context::Context;
use crate::envoy_filter::Patches;
use crate::{cluster, endpoint, listener, name_table, names, route, tls};

/// What is kept: type URL, name, bytes. One name may be kept several times, for proxies of several classes.
pub(crate) fn kept(push: &PushContext) -> Vec<(&'static str, ArcStr, usize)> {
    use envoy_api::type_url;
    let mut out = Vec::new();
    push.memo().each(|keys, value| {
        // Keys are types of the functions above and below. Lists of a whole proxy hold the same resources once more.
        let of = |function: &str| keys.contains(&format!("cache::{function}::"));
        let kind = match () {
            () if of("service_clusters") => type_url::CLUSTER,
            () if of("make_listeners") => type_url::LISTENER,
            () if of("routes") => type_url::ROUTE,
            () if of("endpoints") => type_url::ENDPOINT,
            () if of("names") => type_url::NAME_TABLE,
            () => return,
        };
        let mut note = |resource: &Resource| out.push((kind, resource.name.clone(), resource.body.len()));
        if let Some(resource) = value.downcast_ref::<Resource>() {
            note(resource);
        } else if let Some(list) = value.downcast_ref::<Shared>().filter(|_| kind != type_url::ENDPOINT) {
            list.iter().for_each(note);
        }
    });
    out.sort();
    out
}

/// What a class of proxies gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Use {
    Listeners,
    /// Listeners without what tells who the proxy is.
    Ports,
    /// And name tables.
    Routes,
    /// And endpoints: these are the same for clients of all namespaces.
    Clusters,
}

impl Use {
    /// In the order of their values.
    pub(crate) const ALL: [Use; 4] = [Use::Listeners, Use::Ports, Use::Routes, Use::Clusters];
}

/// Lists of load assignments that are kept: proxies of one class ask for the same ones, as a rule.
const LISTS: usize = 256;
/// Lists of clusters that are kept: one for each set of services that proxies may see.
const SCOPES: usize = 1 << 14;

/// Lists of single proxies that are kept.
const PROXIES: usize = 1 << 18;

/// Metadata that generators read, other than for the use of EnvoyFilters.
const METADATA: [&str; 14] = [
    "DNS_PROXY_ADDR",
    GENERATOR,
    "MESH_ID",
    "WORKLOAD_NAME",
    endpoint::network::VIEW,
    tls::FILE_SERVER,
    tls::SECRET_SERVER,
    "TLS_SERVER_CERT_CHAIN",
    "TLS_SERVER_KEY",
    "TLS_SERVER_ROOT_CERT",
    "TLS_CLIENT_CERT_CHAIN",
    "TLS_CLIENT_KEY",
    "TLS_CLIENT_ROOT_CERT",
    route::ORIGINS,
];
/// Who asks: `grpc` for clients that are no proxies.
pub(crate) const GENERATOR: &str = "GENERATOR";
const NODE_NAME: &str = "NODE_NAME";
/// Decides how spans are sent.
const VERSION: &str = "ISTIO_VERSION";
const NETWORK: &str = "topology.istio.io/network";
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Labels that telemetry reports.
const REPORTED: [&str; 3] = ["app", "service.istio.io/canonical-name", "service.istio.io/canonical-revision"];

/// All clusters of a proxy.
pub(crate) fn clusters(cx: &Context<'_>, client: &Arc<Client>) -> Shared {
    if client.is_patched {
        #[derive(Eq, Hash, PartialEq)]
        struct Key(Same<Client>, Same<Version>);
        let key = Key(Same(client.clone()), Same(cx.push.registry.version().clone()));
        return cx.push.memo().get(key, || encode_clusters(&Patches::of(cx).clusters(cx, cluster::all(cx))));
    }
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Client>, Same<[Resource]>);
    let outbound = outbound_clusters(cx, client);
    /// While rules change, few proxies' own clusters do.
    #[derive(Eq, Hash, PartialEq)]
    struct ByNode(Same<Node>);
    #[derive(Clone)]
    struct List {
        outbound: Shared,
        own: Shared,
        whole: Shared,
    }
    let refresh = |last: Option<List>| {
        let own = packed(&cluster::fixed(cx), |cluster| &cluster.name);
        if let Some(last) = last.filter(|last| Arc::ptr_eq(&last.outbound, &outbound) && last.own == own) {
            return last;
        }
        let mut names: HashSet<&str> = own.iter().map(|c| &*c.name).collect();
        // Of two with one name the first.
        outbound.iter().for_each(|c| {
            names.remove(&*c.name);
        });
        let whole = outbound.iter().chain(own.iter().filter(|c| names.remove(&*c.name))).cloned().collect();
        List { outbound: outbound.clone(), whole, own }
    };
    let (memo, by_node) = (cx.push.memo(), ByNode(Same(client.node.clone())));
    memo.get(Key(Same(client.clone()), Same(outbound.clone())), || memo.follow(PROXIES, by_node, refresh).whole)
}

/// Something for each of the services of a class of proxies, as of one version of the endpoints.
#[derive(Clone)]
struct Followed {
    version: Same<Version>,
    peers: Same<PeerRules>,
    /// Of clusters: those of each service.
    parts: Arc<[Shared]>,
    list: Shared,
}

impl Followed {
    /// The services that it is to be made anew for; `None` if it is for all.
    fn changes<'a>(&self, cx: &'a Context<'_>) -> Option<HashSet<&'a ServiceKey>> {
        let same_peers = Arc::ptr_eq(&self.peers.0, cx.push.peer_rules());
        cx.push.registry.changed_since(&self.version.0).filter(|_| same_peers).map(Iterator::collect)
    }
}

/// Clusters that lead to services.
fn outbound_clusters(cx: &Context<'_>, client: &Client) -> Shared {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<Reach>);

    let class = client.class(Use::Clusters);
    let key = Key(Same(class.clone()), Same(cx.scope.reach().clone()));
    let refresh = |last: Option<Followed>| {
        let own = cx.of_class(class);
        let services = &own.scope.services;
        let now = |parts: Arc<[Shared]>, list: Shared| Followed {
            version: Same(cx.push.registry.version().clone()),
            peers: Same(cx.push.peer_rules().clone()),
            parts,
            list,
        };
        let flat = |parts: &[Shared]| {
            let mut seen = HashSet::new();
            parts.iter().flat_map(|part| part.iter()).filter(|c| seen.insert(&*c.name)).cloned().collect()
        };
        if let Some(last) = last
            && let Some(changes) = last.changes(cx)
        {
            if changes.is_empty() {
                return last;
            }
            let affected = services.iter().enumerate().filter(|(_, service)| is_of(service, &changes));
            let anew = affected.map(|(place, service)| (place, service_clusters(&own, class, service)));
            let anew: Vec<_> = anew.filter(|(place, part)| **part != *last.parts[*place]).collect();
            if anew.is_empty() {
                return now(last.parts, last.list);
            }
            let mut parts = last.parts.to_vec();
            anew.into_iter().for_each(|(place, part)| parts[place] = part);
            let list = flat(&parts);
            return now(parts.into(), list);
        }
        let parts: Arc<[Shared]> = services.iter().map(|service| service_clusters(&own, class, service)).collect();
        let list = flat(&parts);
        now(parts, list)
    };
    cx.push.memo().follow(SCOPES, key, refresh).list
}

fn is_of(service: &Service, keys: &HashSet<&ServiceKey>) -> bool {
    keys.iter().any(|(host, namespace)| service.hostname == *host && service.namespace == *namespace)
}

/// What the clusters and endpoints of a service are made of, beyond its class of clients.
#[derive(Eq, Hash, PartialEq)]
struct Target {
    class: Same<Node>,
    service: Same<Service>,
    rule: Option<Same<Config<DestinationRule>>>,
    endpoints: Endpoints,
    peers: Same<PeerRules>,
}

impl Target {
    fn new(cx: &Context<'_>, class: &Arc<Node>, service: &Arc<Service>) -> Target {
        Target {
            class: Same(class.clone()),
            service: Same(service.clone()),
            rule: cx.scope.destination_rule(cx.node, &service.hostname, true).cloned().map(Same),
            endpoints: cx.push.registry.endpoint_list(service).cloned().map(Same),
            peers: Same(cx.push.peer_rules().clone()),
        }
    }
}

fn service_clusters(cx: &Context<'_>, class: &Arc<Node>, service: &Arc<Service>) -> Shared {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Target);

    cx.push.memo().get(Key(Target::new(cx, class, service)), || {
        let mut out = Vec::new();
        cluster::outbound(cx, service, &mut out);
        out.iter().map(|made| Resource::from_bytes(made.message.name.as_str(), made.encode())).collect()
    })
}

/// Names that a proxy asks for.
#[derive(Eq, PartialEq)]
struct Wanted(Vec<ArcStr>);

/// A few of thousands of names tell the lists of different proxies apart.
impl Hash for Wanted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let places = [0, self.0.len() / 2, self.0.len().saturating_sub(1)];
        (self.0.len(), places.map(|place| self.0.get(place))).hash(state);
    }
}

/// The load assignments of these names.
pub(crate) fn endpoints(cx: &Context<'_>, client: &Client, wanted: &[ArcStr]) -> Shared {
    let is_local = |name: &ArcStr| **name == *endpoint::LOCAL_CLUSTER;
    if !wanted.iter().any(is_local) {
        return services_endpoints(cx, client, wanted);
    }
    let services: Vec<ArcStr> = wanted.iter().filter(|name| !is_local(name)).cloned().collect();
    let local = Resource::new(endpoint::LOCAL_CLUSTER, &endpoint::local_cluster(cx));
    services_endpoints(cx, client, &services).iter().cloned().chain([local]).collect()
}

/// Those that are the same for many proxies.
fn services_endpoints(cx: &Context<'_>, client: &Client, wanted: &[ArcStr]) -> Shared {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Target, ArcStr);
    #[derive(Eq, Hash, PartialEq)]
    struct All(Same<Node>, Same<Reach>, Wanted);

    let class = client.class(Use::Clusters);
    let own = cx.of_class(class);
    let make = |name: &ArcStr| Resource::new(name.clone(), &endpoint::load_assignment(&own, name));
    let service = |name: &str| names::parse_outbound(name).and_then(|(_, _, host)| own.scope.service(host));
    let load = |name: &ArcStr| match service(name) {
        Some(service) => {
            let key = Key(Target::new(&own, class, service), name.clone());
            own.push.memo().get(key, || make(name))
        }
        None => make(name),
    };
    let all = All(Same(class.clone()), Same(own.scope.reach().clone()), Wanted(wanted.to_vec()));
    let refresh = |last: Option<Followed>| {
        let now = |list: Shared| Followed {
            version: Same(cx.push.registry.version().clone()),
            peers: Same(cx.push.peer_rules().clone()),
            parts: Arc::default(),
            list,
        };
        if let Some(last) = last
            && let Some(changes) = last.changes(cx)
        {
            if changes.is_empty() {
                return last;
            }
            let affected = |name: &str| changes.iter().any(|(host, _)| name.ends_with(&**host));
            let affected = wanted.iter().enumerate().filter(|(_, name)| affected(name));
            let anew: Vec<_> = affected.map(|(place, name)| (place, load(name))).collect();
            let anew: Vec<_> = anew.into_iter().filter(|(place, new)| *new != last.list[*place]).collect();
            if anew.is_empty() {
                return now(last.list);
            }
            let mut list = last.list.to_vec();
            anew.into_iter().for_each(|(place, new)| list[place] = new);
            return now(list.into());
        }
        now(wanted.iter().map(load).collect())
    };
    own.push.memo().follow(LISTS, all, refresh).list
}

/// All listeners of a proxy.
pub(crate) fn listeners(cx: &Context<'_>, client: &Client) -> Shared {
    /// While endpoints change, the scope stays.
    #[derive(Clone, Eq, Hash, PartialEq)]
    struct ByScope {
        node: Same<Node>,
        scope: Same<SidecarScope>,
        /// Its own service, port and target port.
        targets: Vec<(Same<Service>, u16, u16)>,
        headless: Vec<Endpoints>,
    }
    /// While rules for requests change, which have no part in listeners, services and endpoints stay.
    #[derive(Eq, Hash, PartialEq)]
    struct ByRules(Same<Node>, Same<Placement>, ListenerRules);

    let (memo, node) = (cx.push.memo(), Same(client.node.clone()));
    let targets = cx.targets.iter().map(|t| (Same(t.service.clone()), t.port.port, t.target_port)).collect();
    let headless = client.headless.clone();
    let by_scope = ByScope { node: node.clone(), scope: Same(cx.scope.clone()), targets, headless };
    let by_rules = ByRules(node, Same(cx.push.registry.placement().clone()), cx.push.listener_rules());
    let all = memo.get(by_rules, || memo.get(by_scope.clone(), || make_listeners(cx, client)));
    memo.get(by_scope, || all.clone())
}

fn make_listeners(cx: &Context<'_>, client: &Client) -> Shared {
    if client.is_patched {
        return encode_listeners(&Patches::of(cx).listeners(listener::all(cx)));
    }
    #[derive(Eq, Hash, PartialEq)]
    struct OutboundKey(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);
    let class = client.class(Use::Listeners);
    let key = OutboundKey(Same(class.clone()), Same(cx.scope.clone()), client.headless.clone());
    let make = || packed(&listener::outbound_side(&cx.of_class(class), &ports(cx, client)), |listener| &listener.name);
    let outbound = cx.push.memo().get(key, make);
    let own = packed(&listener::inbound_side(cx), |listener| &listener.name);
    outbound.iter().chain(own.iter()).cloned().collect()
}

/// The addresses and ports that outbound listeners are for.
pub(crate) fn ports(cx: &Context<'_>, client: &Client) -> Arc<listener::Ports> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);
    let wide = client.class(Use::Ports);
    let key = Key(Same(wide.clone()), Same(cx.scope.clone()), client.headless.clone());
    cx.push.memo().get(key, || Arc::new(listener::Ports::of(&cx.of_class(wide))))
}

/// Route tables of these names.
pub(crate) fn routes(cx: &Context<'_>, client: &Client, wanted: &[ArcStr]) -> Vec<Resource> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, ArcStr);

    let class = if client.is_patched { &client.node } else { client.class(Use::Routes) };
    let own = OnceCell::new();
    let table = |name: &ArcStr| {
        cx.push.memo().get(Key(Same(class.clone()), Same(cx.scope.clone()), name.clone()), || {
            let own = own.get_or_init(|| cx.of_class(class));
            if !client.is_patched {
                return route::encoded::outbound(own, class, name);
            }
            let config = Patches::of(own).route(route::outbound(own, name));
            Resource::new(config.name.as_str(), &config)
        })
    };
    wanted.iter().map(table).collect()
}

/// The name table.
pub(crate) fn names(cx: &Context<'_>, client: &Client) -> Resource {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);

    let class = client.class(Use::Routes);
    cx.push.memo().get(Key(Same(class.clone()), Same(cx.scope.clone()), client.headless.clone()), || {
        Resource::new("", &name_table::build(&cx.of_class(class)))
    })
}

/// Messages with nothing but what generators made in them, every `Any` of which is sorted already.
fn packed<M: Message + Name>(messages: &[M], name: impl Fn(&M) -> &String) -> Shared {
    messages.iter().map(|message| Resource::from_bytes(name(message).as_str(), wire::encode(message))).collect()
}

fn encode_clusters(clusters: &[Cluster]) -> Shared {
    clusters.iter().map(|c| Resource::new(c.name.as_str(), c)).collect()
}

fn encode_listeners(listeners: &[Listener]) -> Shared {
    listeners.iter().map(|l| Resource::new(l.name.as_str(), l)).collect()
}

/// The one object that stands for all equal nodes.
pub(crate) fn one(push: &PushContext, node: Node) -> Arc<Node> {
    let node = Arc::new(node);
    let value = node.clone();
    push.memo().get(node, move || value)
}

pub(crate) fn itself(cx: &Context<'_>) -> Arc<Node> {
    one(cx.push, cx.node.clone())
}

/// What decides among the services of a scope who shares what.
pub(crate) struct Seen {
    /// Those without address.
    pub(crate) headless: Vec<Arc<Service>>,
    /// Some are only for clients on the endpoint's own node.
    by_node: bool,
    /// Listeners for names that are looked up have the proxy's own policies.
    looked_up: bool,
}

/// Found once for all proxies of a scope.
pub(crate) fn seen(cx: &Context<'_>) -> Arc<Seen> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<SidecarScope>);

    let look = || {
        let services = cx.scope.egress.iter().flat_map(|e| &e.services);
        let local = |s: &Arc<Service>| s.node_local || s.traffic_distribution == TrafficDistribution::PreferSameNode;
        let looked_up = |s: &Arc<Service>| s.is_wildcard() && s.resolution == Resolution::DynamicDns;
        Arc::new(Seen {
            headless: services.filter(|s| s.resolution == Resolution::Passthrough).cloned().collect(),
            by_node: cx.scope.services.iter().any(local),
            looked_up: cx.scope.services.iter().any(looked_up),
        })
    };
    cx.push.memo().get(Key(Same(cx.scope.clone())), look)
}

/// The proxy without all that does not matter.
pub(crate) fn class(cx: &Context<'_>, what: Use, seen: &Seen, headless: &[Endpoints]) -> Arc<Node> {
    let node = cx.node;
    let rules = cx.push.client_labels();
    let by_node = what == Use::Clusters && (rules.contains(HOSTNAME) || seen.by_node);
    let (reported, everywhere) = (what == Use::Listeners, what == Use::Clusters);
    let all = matches!(what, Use::Listeners | Use::Ports) && seen.looked_up;
    let matters = |label: &str| {
        rules.contains(label)
            || all
            || (everywhere && label == NETWORK)
            || (by_node && label == HOSTNAME)
            || (reported && REPORTED.contains(&label))
    };
    let bound = matches!(what, Use::Listeners | Use::Ports);
    let mut labels = node.labels.clone();
    labels.retain(|label, _| matters(label));
    if labels.is_empty() {
        // Clients without any label have no preference by labels.
        labels.extend(node.labels.keys().next().map(|_| (String::new(), String::new())));
    }
    let own_address = || {
        let lists = headless.iter().flatten();
        let own = node.addresses.first();
        let is_own = |e: &Endpoint| e.addresses.first().is_some_and(|a| own.is_some_and(|own| **own == **a));
        lists.into_iter().any(|list| list.0.iter().any(is_own))
    };
    let traced = reported && !cx.push.mesh.extension_providers.is_empty();
    let metadata = node.metadata.iter().filter(|(key, _)| {
        METADATA.contains(&&***key) || (by_node && *key == NODE_NAME) || (traced && *key == VERSION)
    });
    one(
        cx.push,
        Node {
            id: String::new(),
            name: if traced { node.name.clone() } else { "".into() },
            cluster: if traced { node.cluster.clone() } else { String::new() },
            addresses: if bound && own_address() { node.addresses.clone() } else { vec![String::new()] },
            namespace: if everywhere { "".into() } else { node.namespace.clone() },
            dns_domain: if everywhere { String::new() } else { node.dns_domain.clone() },
            labels,
            service_account: String::new(),
            metadata: metadata.map(|(k, v)| (k.clone(), v.clone())).collect(),
            ..node.clone()
        },
    )
}
