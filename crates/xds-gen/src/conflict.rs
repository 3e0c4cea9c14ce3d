//! What generation leaves out, or leaves empty, because objects are at odds: istiod's `ProxyStatus` metrics.
//!
//! Asked for by people and their monitoring, not for each push: what proxies get does not depend on it.

use std::collections::{HashMap, HashSet};

use mesh_types::Protocol;
use push_context::{Node, PushContext, host};
use registry::{Resolution, Service};

use crate::client::Client;
use crate::context::Context;
use crate::endpoint::Builder;
use crate::names;
use crate::{cache, cluster};

/// One thing that is amiss.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Conflict {
    /// istiod's metric, which counts keys.
    pub metric: &'static str,
    /// What it is about: a cluster, a listener, a host.
    pub key: String,
    /// For people.
    pub message: String,
}

/// What is amiss for all proxies with the scope of this one.
pub fn conflicts(push: &PushContext, node: &Node) -> Vec<Conflict> {
    let client = Client::new(push, node);
    let cx = client.context(push);
    let mut out = clusters(&cx);
    out.extend(cache::ports(&cx, &client).conflicts().map(|(key, message)| Conflict {
        metric: "pilot_conflict_outbound_listener_tcp_over_current_tcp",
        key,
        message,
    }));
    out.extend(domains(&cx));
    out
}

/// Ports of this proxy's workload that several services want to be of several protocols.
pub fn inbound_conflicts(push: &PushContext, node: &Node) -> Vec<Conflict> {
    let mut first: HashMap<u16, (&Service, Protocol)> = HashMap::new();
    let mut out = Vec::new();
    let targets = push.registry.targets(&node.query(&push.settings.cluster_id));
    for target in &targets {
        let (host, protocol) = first.entry(target.target_port).or_insert((&*target.service, target.port.protocol));
        if *protocol != target.port.protocol && host.hostname != target.service.hostname {
            let (port, old, new) = (target.target_port, &host.hostname, &target.service.hostname);
            out.push(Conflict {
                metric: "pilot_conflict_inbound_listener",
                key: node.id.clone(),
                message: format!("Conflicting inbound listener:{port}. existing: {old}, incoming: {new}"),
            });
        }
    }
    out
}

/// Clusters without endpoints, and those of whose name there are several.
fn clusters(cx: &Context<'_>) -> Vec<Conflict> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for service in cx.scope.services.iter().filter(|service| service.resolution != Resolution::Alias) {
        let rule = cx.scope.destination_rule(cx.node, &service.hostname, true).map(|rule| &rule.spec);
        let subsets = rule.into_iter().flat_map(|rule| &rule.subsets).map(|subset| &*subset.name);
        let subsets: Vec<&str> = std::iter::once("").chain(subsets).collect();
        for port in service.ports.iter().filter(|port| service.port(port.port).is_some()) {
            for subset in &subsets {
                let key = names::outbound(port.port, subset, &service.hostname);
                if !seen.insert(key.clone()) {
                    let message = format!("Duplicate cluster {key} found while pushing CDS");
                    out.push(Conflict { metric: "pilot_duplicate_envoy_clusters", key, message });
                    continue;
                }
                let Some(metric) = cluster::without_endpoints(cx, service) else { continue };
                if !Builder::new(cx, service, port.port, subset, rule).is_empty() {
                    continue;
                }
                let message = match metric {
                    cluster::NO_DNS_NAMES => {
                        format!("STRICT_DNS cluster without endpoints {key} found while pushing CDS")
                    }
                    _ => String::new(),
                };
                out.push(Conflict { metric, key, message });
            }
        }
    }
    out
}

/// Hosts that more than one VirtualService routes: only the first one's routes are used.
fn domains(cx: &Context<'_>) -> Vec<Conflict> {
    let mut out = Vec::new();
    for egress in &cx.scope.egress {
        let mut seen = HashSet::new();
        for rule in &egress.virtual_services {
            for name in rule.spec.hosts.iter().map(|name| name.to_ascii_lowercase()) {
                // Wildcards give way to each other by how close they fit.
                if !host::is_wildcard(&name) && !rule.is_gateway_api() && !seen.insert(name.clone()) {
                    let message = format!("duplicate domain from virtual service: {name}");
                    out.push(Conflict { metric: "pilot_vservice_dup_domain", key: name, message });
                }
            }
        }
    }
    out
}
