//! What is amiss with the snapshot that proxies have: istiod's `ProxyStatus`, as a page and as gauges.
//!
//! It is worked out when somebody looks, from the state and the proxies that are connected; pushing does not wait for it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use config_store::{Body, Key, Kind, Object, Snapshot};
use mesh_types::ArcStr;
use push_context::{InterceptionMode, IpMode, Node, SidecarScope};
use serde_json::{Map, Value, json};

use crate::metrics::proxy_id;
use crate::world::State;

/// Name and help of each gauge. All are set at each look, so that what was mended goes back to 0.
pub(crate) const GAUGES: [(&str, &str); 11] = [
    ("endpoint_no_pod", "Endpoints without an associated pod."),
    ("pilot_no_ip", "Pods not found in the endpoint table, possibly invalid."),
    ("pilot_endpoint_not_ready", "Endpoint found in unready state."),
    (
        "pilot_conflict_outbound_listener_tcp_over_current_tcp",
        "Number of conflicting tcp listeners with current tcp listener.",
    ),
    ("pilot_conflict_inbound_listener", "Number of conflicting inbound listeners."),
    ("pilot_duplicate_envoy_clusters", "Duplicate envoy clusters caused by service entries with same hostname"),
    (
        "pilot_dns_cluster_without_endpoints",
        "DNS clusters without endpoints caused by the endpoint field in STRICT_DNS type cluster is not set or the \
         corresponding subset cannot select any endpoint",
    ),
    ("pilot_eds_no_instances", "Number of clusters without instances."),
    ("pilot_vservice_dup_domain", "Virtual services with dup domains."),
    ("pilot_destrule_subsets", "Duplicate subsets across destination rules for same host"),
    (PENDING, "Number of endpoints that do not currently have any corresponding pods."),
];

/// Of all addresses without a pod; the others count hosts, clusters, listeners and proxies.
const PENDING: &str = "pilot_k8s_endpoints_pending_pod";

/// By metric and what it is about: the proxy that it was found with, if any, and a text.
#[derive(Debug, Default)]
pub(crate) struct PushStatus(BTreeMap<&'static str, BTreeMap<String, (String, String)>>);

impl PushStatus {
    pub(crate) fn of(state: &State, nodes: &[Arc<Node>]) -> PushStatus {
        let mut out = PushStatus::default();
        let not_ready = out.slices(state);
        out.subsets(state);
        let mut scopes: HashSet<(*const SidecarScope, IpMode, InterceptionMode)> = HashSet::new();
        for node in nodes {
            out.proxy(state, node, &not_ready);
            // What most proxies share is looked at once.
            let scope = state.push.scope(node);
            if scopes.insert((Arc::as_ptr(&scope), node.ip_mode, node.interception)) {
                for found in xds_gen::conflicts(&state.push, node) {
                    // A cluster without instances is so for all proxies.
                    let proxy = if found.metric == "pilot_eds_no_instances" { "" } else { proxy_id(node) };
                    out.add(found.metric, found.key, proxy, found.message);
                }
            }
        }
        out
    }

    fn add(&mut self, metric: &'static str, key: String, proxy: &str, message: String) {
        self.0.entry(metric).or_default().entry(key).or_insert((proxy.to_owned(), message));
    }

    /// How many things a gauge counts.
    pub(crate) fn count(&self, metric: &str) -> usize {
        self.0.get(metric).map_or(0, BTreeMap::len)
    }

    /// As istiod writes its `ProxyStatus`.
    pub(crate) fn to_json(&self) -> Value {
        let entry = |(proxy, message): &(String, String)| {
            let mut out = Map::new();
            for (field, text) in [("proxy", proxy), ("message", message)] {
                if !text.is_empty() {
                    out.insert(field.to_owned(), text.as_str().into());
                }
            }
            Value::Object(out)
        };
        let metric = |entries: &BTreeMap<String, (String, String)>| -> Value {
            Value::Object(entries.iter().map(|(key, found)| (key.clone(), entry(found))).collect())
        };
        let all = self.0.iter().filter(|(name, _)| **name != PENDING);
        json!(all.map(|(name, entries)| (*name, metric(entries))).collect::<BTreeMap<_, _>>())
    }

    /// Endpoints of pods that nobody knows; gives the addresses of those that are not ready.
    fn slices(&mut self, state: &State) -> HashSet<String> {
        let mut not_ready = HashSet::new();
        for object in state.snapshot.list(Kind::EndpointSlice) {
            let Body::EndpointSlice(slice) = &object.body else { continue };
            let namespace = &object.key.namespace;
            let service = object.labels.get("kubernetes.io/service-name").map_or("", String::as_str);
            let host = format!("{service}.{namespace}.svc.{}", state.push.settings.domain);
            for endpoint in slice.endpoints.iter().flatten() {
                let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
                if !ready {
                    not_ready.extend(endpoint.addresses.iter().cloned());
                }
            }
            for address in without_pods(&state.snapshot, object) {
                self.add("endpoint_no_pod", host.clone(), "", address.to_owned());
                self.add(PENDING, address.to_owned(), "", String::new());
            }
        }
        not_ready
    }

    /// Subsets of one name in several DestinationRules of a host: the oldest rule's is used.
    fn subsets(&mut self, state: &State) {
        type Merged<'a> = (&'a ArcStr, String, Vec<&'a String>, Option<&'a mesh_types::Labels>);
        let mut rules: Vec<_> = state.snapshot.list(Kind::DestinationRule).collect();
        rules.sort_by(|a, b| (a.created, &a.key.name).cmp(&(b.created, &b.key.name)));
        let mut known: HashMap<Merged<'_>, BTreeSet<&str>> = HashMap::new();
        for object in rules {
            let Body::DestinationRule(rule) = &object.body else { continue };
            let namespace = &object.key.namespace;
            let host = push_context::host::resolve(&rule.host, namespace, &state.push.settings.domain);
            let mut audience: Vec<&String> = rule.export_to.iter().collect();
            audience.sort();
            let selector = rule.workload_selector.as_ref().map(|selector| &selector.match_labels);
            let names: BTreeSet<&str> = rule.subsets.iter().map(|subset| subset.name.as_str()).collect();
            let merged = known.entry((namespace, host.clone(), audience, selector)).or_default();
            for name in names {
                if !merged.insert(name) {
                    let message = format!("Duplicate subset {name} found while merging destination rules for {host}");
                    self.add("pilot_destrule_subsets", host.clone(), "", message);
                }
            }
        }
    }

    /// Whether a proxy's own workload is served.
    fn proxy(&mut self, state: &State, node: &Node, not_ready: &HashSet<String>) {
        let id = proxy_id(node);
        for found in xds_gen::inbound_conflicts(&state.push, node) {
            self.add(found.metric, id.to_owned(), id, found.message);
        }
        if node.addresses.iter().any(|address| not_ready.contains(address)) {
            self.add("pilot_endpoint_not_ready", id.to_owned(), id, String::new());
        } else if state.push.registry.targets(&node.query(&state.push.settings.cluster_id)).is_empty() {
            self.add("pilot_no_ip", id.to_owned(), id, String::new());
        }
    }
}

/// The addresses of an EndpointSlice that are said to be of pods, but nobody knows the pods.
pub(crate) fn without_pods<'a>(snapshot: &Snapshot, slice: &'a Object) -> Vec<&'a str> {
    let Body::EndpointSlice(body) = &slice.body else { return Vec::new() };
    let mut out = Vec::new();
    for endpoint in body.endpoints.iter().flatten() {
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        let Some(pod) = pod else { continue };
        let of = pod.namespace.as_deref().unwrap_or(&slice.key.namespace);
        if snapshot.get(&Key::new(Kind::Pod, of, pod.name.as_deref().unwrap_or_default())).is_none() {
            out.extend(endpoint.addresses.iter().map(String::as_str));
        }
    }
    out
}
