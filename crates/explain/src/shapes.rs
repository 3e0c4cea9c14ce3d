//! Questions about a configuration that are no calls: which clusters hosts go to, which own clusters and listeners there are.

use std::collections::BTreeMap;

use proxy_core::route::Forward;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Configuration;

/// A question.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Question {
    /// The clusters of every domain of a route table.
    VirtualHosts {
        /// Its name.
        route_config: String,
    },
    /// The workload's own clusters, their endpoints, and the hosts that their metrics name.
    InboundClusters,
    /// The listeners on a port.
    ListenerShape {
        /// The port.
        port: u16,
    },
}

/// Answers it in the words of the reference data's README.
pub(crate) fn answer(question: &Question, at: &Configuration) -> Value {
    match question {
        Question::VirtualHosts { route_config } => virtual_hosts(route_config, at),
        Question::InboundClusters => inbound_clusters(at),
        Question::ListenerShape { port } => listener_shape(*port, at),
    }
}

fn virtual_hosts(name: &str, at: &Configuration) -> Value {
    let mut out = BTreeMap::new();
    for host in at.tables.get(name).into_iter().flat_map(|table| table.virtual_hosts()) {
        let forwards = host.routes.iter().filter_map(|route| route.forward());
        let mut clusters: Vec<&str> = forwards.flat_map(Forward::cluster_names).map(|name| &**name).collect();
        clusters.sort_unstable();
        let clusters = if clusters.is_empty() { Value::Null } else { json!(clusters) };
        out.extend(host.domains.iter().map(|domain| (domain.to_string(), clusters.clone())));
    }
    json!(out)
}

fn inbound_clusters(at: &Configuration) -> Value {
    let (mut clusters, mut telemetry) = (serde_json::Map::new(), serde_json::Map::new());
    for raw in at.raw.clusters.iter().filter(|cluster| cluster.name.starts_with("inbound|")) {
        let Some(Ok((cluster, endpoints))) = at.cluster(&raw.name) else { continue };
        let hosts: Vec<String> = endpoints.hosts().map(|host| host.address.to_string()).collect();
        clusters.insert(raw.name.clone(), if hosts.is_empty() { Value::Null } else { json!(hosts) });
        let services = cluster.metadata().get("istio", &["services"]).and_then(Value::as_array);
        let names: Vec<&Value> = services.into_iter().flatten().filter_map(|service| service.get("host")).collect();
        if !names.is_empty() {
            telemetry.insert(raw.name.clone(), json!(names));
        }
    }
    json!({ "clusters": clusters, "telemetry": telemetry })
}

fn listener_shape(port: u16, at: &Configuration) -> Value {
    let on_port: Vec<_> = at.listeners.iter().filter(|listener| listener.address.port() == Some(port)).collect();
    let names: Vec<&str> = on_port.iter().map(|listener| &*listener.name).collect();
    let chains = || {
        let raw = at.raw.listeners.iter().filter(|listener| names.contains(&listener.name.as_str()));
        raw.flat_map(|listener| &listener.filter_chains)
    };
    let prefixes: Vec<u32> = chains()
        .filter_map(|chain| chain.filter_chain_match.as_ref())
        .flat_map(|criteria| &criteria.prefix_ranges)
        .map(|range| range.prefix_len.as_ref().map_or(0, |length| length.value))
        .collect();
    json!({
        "listenersOnPort": names.len(),
        "listeners": names,
        "filterChainMatcher": at.raw.listeners.iter().any(|l| names.contains(&l.name.as_str()) && l.filter_chain_matcher.is_some()),
        "filterChainsWithPrefixRanges": chains()
            .filter(|chain| chain.filter_chain_match.as_ref().is_some_and(|criteria| !criteria.prefix_ranges.is_empty()))
            .count(),
        "prefixLen": prefixes,
        "defaultFilterChain": on_port.iter().any(|listener| listener.default_chain.is_some()),
    })
}
