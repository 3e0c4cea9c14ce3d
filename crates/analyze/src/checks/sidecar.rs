//! Which Sidecar is a pod's?

use std::collections::{BTreeMap, BTreeSet};

use istio_api::Sidecar;
use mesh_types::{Labels, selects};

use crate::message::{Level, Message};
use crate::world::{NETWORKING, Resource, World, list_text, selector_text};

pub(super) fn names(resources: &[&Resource<'_>]) -> String {
    let mut names: Vec<&str> = resources.iter().map(|r| r.name).collect();
    names.sort_unstable();
    list_text(&names)
}

/// By namespace and name of a pod: the objects that select it.
pub(super) type ByPod<'w> = BTreeMap<(&'w str, &'w str), Vec<&'w Resource<'w>>>;

/// Notes the pods that an object selects. One that selects nothing, now and later, is told.
pub(super) fn select<'w>(
    world: &'w World<'w>,
    resource: &'w Resource<'w>,
    selector: &Labels,
    field: &str,
    by_pod: &mut ByPod<'w>,
    out: &mut Vec<Message>,
) {
    for pod in world.pods().iter().filter(|p| p.namespace == resource.namespace && selects(selector, &p.labels)) {
        by_pod.entry((pod.namespace, pod.name)).or_default().push(resource);
    }
    if !world.selects_any(selector, resource.namespace) {
        let label = selector.keys().next().map_or("", String::as_str);
        let text = format!("Referenced selector not found: {:?}", selector_text(selector));
        out.push(Message::new("IST0101", Level::Error, resource, text).at(resource, &format!("{field}[\"{label}\"]")));
    }
}

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_pod = ByPod::new();
    let mut general: BTreeMap<&str, Vec<&Resource<'_>>> = BTreeMap::new();
    for (resource, spec) in world.specs::<Sidecar>(NETWORKING, "Sidecar") {
        let selector = spec.workload_selector.map(|s| s.labels).unwrap_or_default();
        if selector.is_empty() {
            general.entry(resource.namespace).or_default().push(resource);
            continue;
        }
        select(world, resource, &selector, "spec.workloadSelector.labels", &mut by_pod, out);
    }
    let mut told = BTreeSet::new();
    let mut ineffective = |resource: &Resource<'_>, reason: &str, out: &mut Vec<Message>| {
        if told.insert(resource.full_name()) {
            let text = format!("The policy has no impact: {reason}.");
            out.push(Message::new("IST0167", Level::Warning, resource, text));
        }
    };
    for ((namespace, name), sidecars) in &by_pod {
        let pod = world.pods().iter().find(|p| p.name == *name && p.namespace == *namespace);
        for resource in sidecars {
            if pod.is_some_and(Resource::is_ambient_pod) {
                ineffective(resource, "selected workload is in ambient mode, the policy has no impact", out);
            } else if sidecars.len() > 1 {
                let text = format!(
                    "The Sidecars {} in namespace {namespace:?} select the same workload pod {name:?}, which can lead to \
                     undefined behavior.",
                    names(sidecars)
                );
                out.push(Message::new("IST0110", Level::Error, resource, text).at(resource, "metadata.name"));
            }
        }
    }
    for (namespace, sidecars) in &general {
        let ambient = world.namespace(namespace).is_some_and(|n| {
            let is = |label: &str, value: &str| n.labels.get(label).is_some_and(|v| v == value);
            let injected =
                is("istio-injection", "enabled") || n.labels.get("istio.io/rev").is_some_and(|r| !r.is_empty());
            !injected && is("istio.io/dataplane-mode", "ambient")
        });
        for resource in sidecars {
            if ambient {
                ineffective(resource, "namespace is in ambient mode, the policy has no impact", out);
            } else if sidecars.len() > 1 {
                let text = format!(
                    "The Sidecars {} in namespace {namespace:?} have no workload selector, which can lead to undefined behavior.",
                    names(sidecars)
                );
                out.push(Message::new("IST0111", Level::Error, resource, text));
            }
        }
    }
}
