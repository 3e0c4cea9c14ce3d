//! Are EnvoyFilters' patches applied, and in the order that is meant?

use istio_api::EnvoyFilter;
use istio_api::envoy_filter::{ApplyTo, EnvoyConfigObjectPatch, Operation};

use crate::message::{Level, Message};
use crate::world::{NETWORKING, World};

/// What the patched object is called, if the patch says so.
fn name_of(patch: &EnvoyConfigObjectPatch) -> String {
    let value = patch.patch.as_ref().and_then(|p| p.value.as_ref());
    let own = value.and_then(|value| value["name"].as_str()).map(str::to_owned);
    let listener = patch.r#match.as_ref().and_then(|m| m.listener.as_ref());
    let filter = listener.and_then(|l| l.filter_chain.as_ref()).and_then(|c| c.filter.as_ref());
    own.or_else(|| value.and(filter).map(|filter| filter.name.clone())).unwrap_or_default()
}

fn fault(patch: &EnvoyConfigObjectPatch, operation: Operation) -> Option<(&'static str, &'static str)> {
    let of_route = matches!(patch.apply_to, ApplyTo::RouteConfiguration | ApplyTo::HttpRoute);
    let replaceable = matches!(patch.apply_to, ApplyTo::NetworkFilter | ApplyTo::HttpFilter | ApplyTo::VirtualHost);
    Some(match operation {
        Operation::Add if of_route => {
            ("IST0153", "The ADD operation will be ignored when applyTo is set to ROUTE_CONFIGURATION, or HTTP_ROUTE.")
        }
        Operation::Remove if of_route => (
            "IST0154",
            "The REMOVE operation will be ignored when applyTo is set to ROUTE_CONFIGURATION, or HTTP_ROUTE.",
        ),
        Operation::Replace if !replaceable => {
            ("IST0152", "The REPLACE operation is only valid for HTTP_FILTER and NETWORK_FILTER.")
        }
        _ => return None,
    })
}

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    // Names in patches for some versions of the proxy only.
    let mut versioned: Vec<String> = Vec::new();
    for (resource, spec) in world.specs::<EnvoyFilter>(NETWORKING, "EnvoyFilter") {
        for (index, patch) in spec.config_patches.iter().enumerate() {
            let Some(operation) = patch.patch.as_ref().map(|p| p.operation) else { break };
            let name = name_of(patch);
            let field = format!("spec.configPatches[{index}].patch.value");
            let relative = matches!(
                operation,
                Operation::Remove | Operation::Replace | Operation::InsertBefore | Operation::InsertAfter
            );
            if let Some((code, text)) = fault(patch, operation) {
                out.push(Message::new(code, Level::Error, resource, text).at(resource, &field));
            } else if relative && spec.priority == 0 {
                let (code, text) = match versioned.contains(&name) {
                    true => (
                        "IST0155",
                        "This EnvoyFilter does not have a priority and has a relative patch operation (NSTERT_BEFORE/AFTER, \
                         REPLACE, MERGE, DELETE) and proxyVersion set which can cause the EnvoyFilter not to be applied during an \
                         upgrade. Using the INSERT_FIRST or ADD option or setting the priority may help in ensuring the \
                         EnvoyFilter is applied correctly.",
                    ),
                    false => (
                        "IST0151",
                        "This EnvoyFilter does not have a priority and has a relative patch operation set which can cause the \
                         EnvoyFilter not to be applied. Using the INSERT_FIRST of ADD option or setting the priority may help in \
                         ensuring the EnvoyFilter is applied correctly.",
                    ),
                };
                out.push(Message::new(code, Level::Warning, resource, text).at(resource, &field));
            }
            let proxy = patch.r#match.as_ref().and_then(|m| m.proxy.as_ref());
            if proxy.is_some_and(|proxy| !proxy.proxy_version.is_empty()) {
                versioned.push(name);
            }
        }
    }
}
