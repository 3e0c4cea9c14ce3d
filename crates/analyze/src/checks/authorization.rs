//! Do AuthorizationPolicies hold for anybody, and do they name namespaces that exist?

use istio_api::AuthorizationPolicy;
use mesh_types::{Labels, selects};

use crate::message::{Level, Message};
use crate::world::{Resource, SECURITY, World, selector_text};

fn namespace_fits(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => true,
        (Some(end), _) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => pattern.eq_ignore_ascii_case(name),
    }
}

fn unmatched(world: &World<'_>, policy: &Resource<'_>, spec: &AuthorizationPolicy) -> Option<Labels> {
    let root = Some(world.mesh.root_namespace.as_str()).filter(|name| !name.is_empty()).unwrap_or("istio-system");
    let everywhere = policy.namespace == root;
    let selector = spec.selector.as_ref().map(|s| s.match_labels.clone());
    if everywhere && selector.is_none() {
        return None;
    }
    let selector = selector.unwrap_or_default();
    let found = world
        .workloads()
        .filter(|pod| everywhere || pod.namespace == policy.namespace)
        .any(|pod| (world.in_mesh(pod) || pod.is_ambient_pod()) && selects(&selector, &pod.pod_labels()));
    (!found).then_some(selector)
}

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for (policy, spec) in world.specs::<AuthorizationPolicy>(SECURITY, "AuthorizationPolicy") {
        if let Some(selector) = unmatched(world, policy, &spec) {
            let labels = selector_text(&selector);
            let text = format!("No matching workloads for this resource with the following labels: {labels}");
            out.push(Message::new("IST0127", Level::Warning, policy, text));
        }
        for (i, rule) in spec.rules.iter().enumerate() {
            for (j, from) in rule.from.iter().enumerate() {
                let Some(source) = &from.source else { continue };
                for (field, names) in [("namespaces", &source.namespaces), ("notNamespaces", &source.not_namespaces)] {
                    for (k, name) in names.iter().enumerate() {
                        if world.all("", "Namespace").iter().any(|n| namespace_fits(name, n.name)) {
                            continue;
                        }
                        let text = format!("Referenced namespace not found: {name:?}");
                        let field = format!("spec.rules[{i}].from[{j}].source.{field}[{k}]");
                        out.push(Message::new("IST0101", Level::Error, policy, text).at(policy, &field));
                    }
                }
            }
        }
    }
}
