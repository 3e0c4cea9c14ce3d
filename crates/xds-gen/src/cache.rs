//! Resources by their inputs: shared between proxies that differ in nothing that matters, and between snapshots.
//!
//! What proxies of one class share is made from the class's own [`Node`], in which everything that does not
//! matter is blank: so nothing of the proxy that happens to ask first can get in.

use std::sync::Arc;

use envoy_api::Resource;
use envoy_api::cluster::Cluster;
use envoy_api::listener::Listener;
use istio_api::DestinationRule;
use mesh_types::ArcStr;
use push_context::{Config, ListenerRules, Node, PeerRules, Same, SidecarScope};
use registry::{Endpoint, Registry, Resolution, Service, TrafficDistribution};

use crate::context::Context;
use crate::envoy_filter::Patches;
use crate::{cluster, endpoint, listener, name_table, names, route};

/// Resources that many hold.
pub(crate) type Shared = Arc<[Resource]>;

/// Endpoints of one service.
type Endpoints = Option<Same<[Endpoint]>>;

/// What is kept: type URL, name, bytes. One name may be kept several times, for proxies of several classes.
pub(crate) fn kept(push: &push_context::PushContext) -> Vec<(&'static str, ArcStr, usize)> {
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
enum Use {
    Listeners,
    /// Listeners without what tells who the proxy is.
    Ports,
    /// And name tables.
    Routes,
    /// And endpoints: these are the same for clients of all namespaces.
    Clusters,
}

/// Lists of load assignments that are kept: proxies of one class ask for the same ones, as a rule.
const LISTS: usize = 256;

/// Metadata that generators read, other than for the use of EnvoyFilters.
const METADATA: [&str; 11] = [
    "DNS_PROXY_ADDR",
    GENERATOR,
    "MESH_ID",
    "WORKLOAD_NAME",
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
const NETWORK: &str = "topology.istio.io/network";
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Labels that telemetry reports.
const REPORTED: [&str; 3] = ["app", "service.istio.io/canonical-name", "service.istio.io/canonical-revision"];

/// All clusters of a proxy.
pub(crate) fn clusters(cx: &Context<'_>) -> Shared {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Same<Registry>);

    let key = |node| Key(Same(node), Same(cx.scope.clone()), Same(cx.push.registry.clone()));
    cx.push.memo().get(key(itself(cx)), || {
        if is_patched(cx) {
            return encode_clusters(&Patches::of(cx).clusters(cx, cluster::all(cx)));
        }
        #[derive(Eq, Hash, PartialEq)]
        struct OutboundKey(Key);
        let class = class(cx, Use::Clusters);
        let outbound = cx.push.memo().get(OutboundKey(key(class.clone())), || {
            let own = cx.of_class(&class);
            let services = own.scope.services.iter();
            services.flat_map(|service| service_clusters(&own, &class, service).to_vec()).collect::<Shared>()
        });
        let mut seen = std::collections::HashSet::new();
        let own = encode_clusters(&cluster::fixed(cx));
        outbound.iter().chain(own.iter()).filter(|c| seen.insert(c.name.clone())).cloned().collect()
    })
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
        encode_clusters(&out)
    })
}

/// The load assignments of these names.
pub(crate) fn endpoints(cx: &Context<'_>, wanted: &[ArcStr]) -> Shared {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Target, ArcStr);
    #[derive(Eq, Hash, PartialEq)]
    struct All(Same<Node>, Same<SidecarScope>, Same<Registry>, Vec<ArcStr>);

    let class = class(cx, Use::Clusters);
    let own = cx.of_class(&class);
    let make = |name: &ArcStr| Resource::new(name.clone(), &endpoint::load_assignment(&own, name));
    let load = |name: &ArcStr| match names::parse_outbound(name).and_then(|(_, _, host)| own.scope.service(host)) {
        Some(service) => {
            let key = Key(Target::new(&own, &class, service), name.clone());
            own.push.memo().get(key, || make(name))
        }
        None => make(name),
    };
    let (scope, registry) = (Same(own.scope.clone()), Same(own.push.registry.clone()));
    let all = All(Same(class.clone()), scope, registry, wanted.to_vec());
    own.push.memo().get_of(LISTS, all, || wanted.iter().map(load).collect())
}

/// All listeners of a proxy.
pub(crate) fn listeners(cx: &Context<'_>) -> Shared {
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
    struct ByRules(Same<Node>, Same<Registry>, ListenerRules);

    let (memo, node) = (cx.push.memo(), Same(itself(cx)));
    let targets = cx.targets.iter().map(|t| (Same(t.service.clone()), t.port.port, t.target_port)).collect();
    let by_scope = ByScope { node: node.clone(), scope: Same(cx.scope.clone()), targets, headless: headless(cx) };
    let by_rules = ByRules(node, Same(cx.push.registry.clone()), cx.push.listener_rules());
    let all = memo.get(by_rules, || memo.get(by_scope.clone(), || make_listeners(cx)));
    memo.get(by_scope, || all.clone())
}

fn make_listeners(cx: &Context<'_>) -> Shared {
    if is_patched(cx) {
        return encode_listeners(&Patches::of(cx).listeners(listener::all(cx)));
    }
    #[derive(Eq, Hash, PartialEq)]
    struct OutboundKey(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);
    let class = class(cx, Use::Listeners);
    let key = OutboundKey(Same(class.clone()), Same(cx.scope.clone()), headless(cx));
    let outbound =
        cx.push.memo().get(key, || encode_listeners(&listener::outbound_side(&cx.of_class(&class), &ports(cx))));
    let own = encode_listeners(&listener::inbound_side(cx));
    outbound.iter().chain(own.iter()).cloned().collect()
}

/// The addresses and ports that outbound listeners are for.
pub(crate) fn ports(cx: &Context<'_>) -> Arc<listener::Ports> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);
    let wide = class(cx, Use::Ports);
    let key = Key(Same(wide.clone()), Same(cx.scope.clone()), headless(cx));
    cx.push.memo().get(key, || Arc::new(listener::Ports::of(&cx.of_class(&wide))))
}

/// Route tables of these names.
pub(crate) fn routes(cx: &Context<'_>, wanted: &[ArcStr]) -> Vec<Resource> {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, ArcStr);

    let class = if is_patched(cx) { itself(cx) } else { class(cx, Use::Routes) };
    let table = |name: &ArcStr| {
        cx.push.memo().get(Key(Same(class.clone()), Same(cx.scope.clone()), name.clone()), || {
            let own = cx.of_class(&class);
            let config = Patches::of(&own).route(route::outbound(&own, name));
            Resource::new(config.name.as_str(), &config)
        })
    };
    wanted.iter().map(table).collect()
}

/// The name table.
pub(crate) fn names(cx: &Context<'_>) -> Resource {
    #[derive(Eq, Hash, PartialEq)]
    struct Key(Same<Node>, Same<SidecarScope>, Vec<Endpoints>);

    let class = class(cx, Use::Routes);
    cx.push.memo().get(Key(Same(class.clone()), Same(cx.scope.clone()), headless(cx)), || {
        Resource::new("", &name_table::build(&cx.of_class(&class)))
    })
}

fn encode_clusters(clusters: &[Cluster]) -> Shared {
    clusters.iter().map(|c| Resource::new(c.name.as_str(), c)).collect()
}

fn encode_listeners(listeners: &[Listener]) -> Shared {
    listeners.iter().map(|l| Resource::new(l.name.as_str(), l)).collect()
}

/// Whether any EnvoyFilter is for the proxy: it shares nothing then.
fn is_patched(cx: &Context<'_>) -> bool {
    !cx.push.envoy_filters(&cx.node.namespace, &cx.node.labels).is_empty()
}

/// Services without address: their endpoints have a part in listeners and names.
fn headless(cx: &Context<'_>) -> Vec<Endpoints> {
    let services = cx.scope.egress.iter().flat_map(|e| &e.services);
    let headless = services.filter(|s| s.resolution == Resolution::Passthrough);
    headless.map(|s| cx.push.registry.endpoint_list(s).cloned().map(Same)).collect()
}

/// The one object that stands for all equal nodes.
fn one(cx: &Context<'_>, node: Node) -> Arc<Node> {
    let node = Arc::new(node);
    let value = node.clone();
    cx.push.memo().get(node, move || value)
}

pub(crate) fn itself(cx: &Context<'_>) -> Arc<Node> {
    one(cx, cx.node.clone())
}

/// The proxy without all that does not matter.
fn class(cx: &Context<'_>, what: Use) -> Arc<Node> {
    let node = cx.node;
    let rules = cx.push.client_labels();
    // Some services are only for clients on the endpoint's own node.
    let local = |s: &Arc<Service>| s.node_local || s.traffic_distribution == TrafficDistribution::PreferSameNode;
    let by_node = what == Use::Clusters && (rules.contains(HOSTNAME) || cx.scope.services.iter().any(local));
    let (reported, everywhere) = (what == Use::Listeners, what == Use::Clusters);
    let matters = |label: &str| {
        rules.contains(label)
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
        let lists = headless(cx).into_iter().flatten();
        let own = node.addresses.first();
        let is_own = |e: &Endpoint| e.addresses.first().is_some_and(|a| own.is_some_and(|own| **own == **a));
        lists.into_iter().any(|list| list.0.iter().any(is_own))
    };
    let traced = reported && !cx.push.mesh.extension_providers.is_empty();
    let metadata =
        node.metadata.iter().filter(|(key, _)| METADATA.contains(&&***key) || (by_node && *key == NODE_NAME));
    one(
        cx,
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
