//! Can connections be told apart, and do several ServiceEntries agree?

use std::collections::{BTreeMap, BTreeSet};

use istio_api::ServiceEntry;

use super::hosts::scopes;
use crate::message::{Level, Message};
use crate::world::{NETWORKING, Resource, World};

pub(super) fn addresses(world: &World<'_>, out: &mut Vec<Message>) {
    let metadata = world.mesh.default_config.as_ref().map(|config| &config.proxy_metadata);
    let is_on = |key: &str| metadata.and_then(|m| m.get(key)).is_some_and(|value| value == "true");
    let allocated = is_on("ISTIO_META_DNS_CAPTURE")
        && (is_on("ISTIO_META_DNS_AUTO_ALLOCATE") || is_on("PILOT_ENABLE_IP_AUTOALLOCATE"));
    for (resource, spec) in world.specs::<ServiceEntry>(NETWORKING, "ServiceEntry") {
        if allocated || !spec.addresses.is_empty() || !resource.list("/status/addresses").is_empty() {
            continue;
        }
        for (index, port) in spec.ports.iter().enumerate() {
            if port.protocol.is_empty() || port.protocol.eq_ignore_ascii_case("TCP") {
                let text = "ServiceEntry addresses are required for this protocol.";
                let message = Message::new("IST0134", Level::Warning, resource, text);
                out.push(message.at(resource, &format!("spec.ports[{index}].name")));
            }
        }
    }
}

pub(super) fn protocols(world: &World<'_>, out: &mut Vec<Message>) {
    type Ports<'w, 'a> = BTreeMap<(String, String, u32), Vec<(String, &'w Resource<'a>)>>;
    let mut by_port: Ports<'_, '_> = BTreeMap::new();
    for (resource, spec) in world.specs::<ServiceEntry>(NETWORKING, "ServiceEntry") {
        for scope in scopes(&spec.export_to, resource.namespace) {
            for (host, port) in spec.hosts.iter().flat_map(|host| spec.ports.iter().map(move |port| (host, port))) {
                let key = (scope.clone(), host.clone(), port.number);
                by_port.entry(key).or_default().push((port.protocol.to_uppercase(), resource));
            }
        }
    }
    let mut told = BTreeSet::new();
    for ((scope, host, port), own) in &by_port {
        let mut entries = own.clone();
        if scope != "*" {
            entries.extend(by_port.get(&("*".to_owned(), host.clone(), *port)).into_iter().flatten().cloned());
        }
        let protocols: BTreeSet<&str> = entries.iter().map(|(protocol, _)| protocol.as_str()).collect();
        if protocols.len() < 2 {
            continue;
        }
        let names: BTreeSet<String> = entries.iter().map(|(_, resource)| resource.full_name()).collect();
        let join = |set: Vec<&str>| set.join(", ");
        let text = format!(
            "Multiple ServiceEntries ({}) define the same host {host:?} and port {port} with conflicting protocols ({}).",
            join(names.iter().map(String::as_str).collect()),
            join(protocols.into_iter().collect())
        );
        for (_, resource) in entries {
            if told.insert(resource.full_name()) {
                let message = Message::new("IST0177", Level::Warning, resource, text.clone());
                out.push(message.at(resource, "metadata.name"));
            }
        }
    }
}
