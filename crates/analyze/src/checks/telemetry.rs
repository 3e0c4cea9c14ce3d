//! Which Telemetry is a pod's, and does it say where to?

use std::collections::BTreeMap;

use istio_api::Telemetry;

use super::sidecar::{ByPod, names, select};
use crate::message::{Level, Message};
use crate::world::{Resource, TELEMETRY, World};

pub(super) fn providers(world: &World<'_>, out: &mut Vec<Message>) {
    if world.mesh.default_providers.as_ref().is_some_and(|p| !p.access_logging.is_empty()) {
        return;
    }
    for (resource, spec) in world.specs::<Telemetry>(TELEMETRY, "Telemetry") {
        for (index, logging) in spec.access_logging.iter().enumerate() {
            if logging.disabled != Some(true) && logging.providers.is_empty() {
                let text = format!(
                    "The Telemetry {} in namespace {:?} with empty providers will be ignored.",
                    resource.name, resource.namespace
                );
                let message = Message::new("IST0157", Level::Warning, resource, text);
                out.push(message.at(resource, &format!("spec.accessLogging[{index}]")));
            }
        }
    }
}

pub(super) fn selectors(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_pod = ByPod::new();
    for (resource, spec) in world.specs::<Telemetry>(TELEMETRY, "Telemetry") {
        let selector = spec.selector.map(|s| s.match_labels).unwrap_or_default();
        if selector.is_empty() {
            continue;
        }
        select(world, resource, &selector, "spec.selector.matchLabels", &mut by_pod, out);
    }
    for ((namespace, pod), telemetries) in by_pod.iter().filter(|(_, list)| list.len() > 1) {
        for resource in telemetries {
            let text = format!(
                "The Telemetries {} in namespace {namespace:?} select the same workload pod {pod:?}, which can lead to undefined \
                 behavior.",
                names(telemetries)
            );
            out.push(Message::new("IST0159", Level::Error, resource, text).at(resource, "metadata.name"));
        }
    }
}

pub(super) fn defaults(world: &World<'_>, out: &mut Vec<Message>) {
    let mut general: BTreeMap<&str, Vec<&Resource<'_>>> = BTreeMap::new();
    for (resource, spec) in world.specs::<Telemetry>(TELEMETRY, "Telemetry") {
        if spec.selector.is_none() {
            general.entry(resource.namespace).or_default().push(resource);
        }
    }
    for (namespace, telemetries) in general.iter().filter(|(_, list)| list.len() > 1) {
        for resource in telemetries {
            let text = format!(
                "The Telemetries {} in namespace {namespace:?} have no workload selector, which can lead to undefined behavior.",
                names(telemetries)
            );
            out.push(Message::new("IST0160", Level::Error, resource, text));
        }
    }
}
