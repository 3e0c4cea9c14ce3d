//! Do VirtualServices lead anywhere, and does only one hold for a host?

use std::collections::{BTreeMap, BTreeSet};

use istio_api::virtual_service::Destination;
use istio_api::{DestinationRule, Gateway, VirtualService};
use push_context::host;

use super::hosts::{Hosts, scopes};
use crate::message::{Level, Message};
use crate::world::{NETWORKING, Resource, World, full_host, list_text};

/// Destinations, each with the field that names its host.
type Destinations<'a> = Vec<(String, &'a Destination)>;

/// Those of routes, and those of mirrors.
fn destinations_of(spec: &VirtualService) -> (Destinations<'_>, Destinations<'_>) {
    let (mut routes, mut mirrors) = (Vec::new(), Vec::new());
    let l4 = [
        ("tcp", spec.tcp.iter().map(|r| &r.route).collect::<Vec<_>>()),
        ("tls", spec.tls.iter().map(|r| &r.route).collect()),
    ];
    for (kind, list) in l4 {
        for (i, route) in list.into_iter().enumerate() {
            for (j, destination) in route.iter().enumerate() {
                let field = format!("spec.{kind}[{i}].route[{j}].destination.host");
                routes.extend(destination.destination.as_ref().map(|d| (field, d)));
            }
        }
    }
    for (i, route) in spec.http.iter().enumerate() {
        for (j, destination) in route.route.iter().enumerate() {
            let field = format!("spec.http[{i}].route[{j}].destination.host");
            routes.extend(destination.destination.as_ref().map(|d| (field, d)));
        }
        mirrors.extend(route.mirror.as_ref().map(|d| (format!("spec.http[{i}].mirror.host"), d)));
        for (j, mirror) in route.mirrors.iter().enumerate() {
            let field = format!("spec.http[{i}].mirrors[{j}].destination.host");
            mirrors.extend(mirror.destination.as_ref().map(|d| (field, d)));
        }
    }
    (routes, mirrors)
}

pub(super) fn destinations(world: &World<'_>, out: &mut Vec<Message>) {
    let hosts = Hosts::of(world);
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        let (routes, mirrors) = destinations_of(&spec);
        for (what, list) in [("host", routes), ("mirror host", mirrors)] {
            for (field, destination) in list {
                let name = &destination.host;
                let mut tell = |code, text: String| {
                    out.push(Message::new(code, Level::Error, resource, text).at(resource, &field));
                };
                let Some(found) = hosts.find(name, resource.namespace, &spec.export_to) else {
                    tell("IST0101", format!("Referenced {what} not found: {name:?}"));
                    continue;
                };
                match &destination.port {
                    None if found.ports.len() > 1 => tell(
                        "IST0112",
                        format!(
                            "This VirtualService routes to a service {name:?} that exposes multiple ports {}. Specifying a \
                             port in the destination is required to disambiguate.",
                            list_text(&found.ports)
                        ),
                    ),
                    Some(port) if !found.ports.contains(&port.number) => {
                        tell("IST0101", format!("Referenced host:port not found: \"{name}:{}\"", port.number));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Name and namespace of a service that a host means (istioctl `GetResourceNameFromHost`).
fn service_name(host: &str, namespace: &str) -> (String, String) {
    match host.strip_suffix(".svc.cluster.local").and_then(|service| service.rsplit_once('.')) {
        Some((name, of)) => (name.to_owned(), of.to_owned()),
        None => (host.to_owned(), namespace.to_owned()),
    }
}

pub(super) fn subsets(world: &World<'_>, out: &mut Vec<Message>) {
    let mut known = BTreeSet::new();
    for (resource, spec) in world.specs::<DestinationRule>(NETWORKING, "DestinationRule") {
        let service = service_name(&spec.host, resource.namespace);
        known.extend(spec.subsets.into_iter().map(|subset| (service.clone(), subset.name)));
    }
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        let (routes, mirrors) = destinations_of(&spec);
        for (what, list) in [("host+subset", routes), ("mirror+subset", mirrors)] {
            for (field, Destination { host, subset, .. }) in list {
                let key = (service_name(host, resource.namespace), subset.clone());
                if !subset.is_empty() && !known.contains(&key) {
                    let text = format!("Referenced {what} in destinationrule not found: \"{host}+{subset}\"");
                    out.push(Message::new("IST0101", Level::Error, resource, text).at(resource, &field));
                }
            }
        }
    }
}

fn is_of_mesh(spec: &VirtualService) -> bool {
    spec.gateways.is_empty() || spec.gateways.iter().any(|gateway| gateway == "mesh")
}

pub(super) fn conflicts(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_host: BTreeMap<(String, String), Vec<&Resource<'_>>> = BTreeMap::new();
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        for scope in scopes(&spec.export_to, resource.namespace).into_iter().filter(|_| is_of_mesh(&spec)) {
            for name in &spec.hosts {
                let key = (scope.clone(), full_host(name, resource.namespace));
                by_host.entry(key).or_default().push(resource);
            }
        }
    }
    let mut told = BTreeSet::new();
    for ((scope, name), own) in &by_host {
        let mut rules = own.clone();
        if scope != "*" {
            // What everybody sees holds in every namespace.
            let public = by_host.iter().filter(|((s, n), _)| s == "*" && host::matches(name, n));
            rules.extend(public.flat_map(|(_, rules)| rules));
        }
        if rules.len() < 2 {
            continue;
        }
        let mut names: Vec<String> = rules.iter().map(|r| r.full_name()).collect();
        names.sort();
        for resource in rules {
            if !told.insert(resource.full_name()) {
                continue;
            }
            let text = format!(
                "The VirtualServices {} associated with mesh gateway define the same host {scope}/{name} which can lead to \
                 undefined behavior. This can be fixed by merging the conflicting VirtualServices into a single resource.",
                names.join(",")
            );
            out.push(Message::new("IST0109", Level::Error, resource, text).at(resource, "metadata.name"));
        }
    }
}

/// Hosts of a gateway that rules of a namespace may use.
fn gateway_hosts(spec: &Gateway, own: &str, namespace: &str) -> Vec<String> {
    let all = spec.servers.iter().flat_map(|server| &server.hosts);
    all.filter_map(|host| match host.split_once('/') {
        None => Some(host.clone()),
        Some(("*", name)) => Some(name.to_owned()),
        Some((".", name)) => (own == namespace).then(|| name.to_owned()),
        Some((of, name)) => (of == namespace).then(|| name.to_owned()),
    })
    .collect()
}

pub(super) fn gateways(world: &World<'_>, out: &mut Vec<Message>) {
    const GATEWAY_API: &str = "gateway.networking.k8s.io";
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        for (index, name) in spec.gateways.iter().enumerate().filter(|(_, name)| *name != "mesh") {
            let field = format!("spec.gateways[{index}]");
            let mut tell = |code, level, text: String| {
                out.push(Message::new(code, level, resource, text).at(resource, &field));
            };
            if name.contains("~istio-autogenerated-k8s-gateway~") {
                let text = format!(
                    "Gateway reference in VirtualService {} is to an implementation-generated internal Gateway: {name}.",
                    resource.full_name()
                );
                tell("IST0165", Level::Warning, text);
                continue;
            }
            let (namespace, short) = name.split_once('/').unwrap_or((resource.namespace, name));
            let is = |g: &&Resource<'_>| g.name == short && g.namespace == namespace;
            let istio = world.all(NETWORKING, "Gateway").iter().find(is);
            let other = world.all(GATEWAY_API, "Gateway").iter().find(is);
            let hosts = match (istio, other) {
                (Some(gateway), _) => {
                    gateway.spec::<Gateway>().map(|s| gateway_hosts(&s, gateway.namespace, resource.namespace))
                }
                (None, Some(gateway)) => {
                    let host = |l: &serde_json::Value| l["hostname"].as_str().unwrap_or("*").to_owned();
                    Some(gateway.list("/spec/listeners").iter().map(host).collect())
                }
                (None, None) => {
                    tell("IST0101", Level::Error, format!("Referenced gateway not found: {name:?}"));
                    None
                }
            };
            let hosts = hosts.unwrap_or_default();
            if !hosts.iter().any(|g| spec.hosts.iter().any(|h| host::matches(g, h))) {
                let text = format!(
                    "one or more host {} defined in VirtualService {} not found in Gateway {namespace}/{short}.",
                    list_text(&spec.hosts),
                    resource.full_name()
                );
                tell("IST0132", Level::Warning, text);
            }
        }
    }
}
