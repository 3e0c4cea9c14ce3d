//! What controllers have written into the status of objects.

use crate::message::{Level, Message};
use crate::world::{NETWORKING, SECURITY, World};

const GATEWAY_API: &str = "gateway.networking.k8s.io";
const OF_ROUTES: &[&str] = &["Accepted", "Programmed", "ResolvedRefs"];

/// Conditions that say that something is wrong when they are false.
const NEGATIVE: [(&str, &str, &[&str]); 7] = [
    ("", "Service", &["istio.io/WaypointBound"]),
    (NETWORKING, "ServiceEntry", &["istio.io/WaypointBound"]),
    (NETWORKING, "WorkloadEntry", &["istio.io/WaypointBound"]),
    (SECURITY, "AuthorizationPolicy", &["ZtunnelAccepted", "WaypointAccepted"]),
    (GATEWAY_API, "Gateway", OF_ROUTES),
    (GATEWAY_API, "HTTPRoute", OF_ROUTES),
    (GATEWAY_API, "GRPCRoute", OF_ROUTES),
];

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for (group, kind, types) in NEGATIVE {
        for resource in world.all(group, kind) {
            let of_parents = resource.list("/status/parents").iter().flat_map(|parent| parent["conditions"].as_array());
            for condition in resource.list("/status/conditions").iter().chain(of_parents.flatten()) {
                let text = |key: &str| condition[key].as_str().unwrap_or_default();
                let partly = text("type") == "WaypointAccepted" && text("reason") == "PartiallyInvalid";
                let is_false = condition["status"] == "False";
                if (is_false && types.contains(&text("type"))) || (kind == "AuthorizationPolicy" && partly) {
                    let text = format!(
                        "A condition with a negative status is present: type={}, reason={}, message={}.",
                        text("type"),
                        text("reason"),
                        text("message")
                    );
                    out.push(Message::new("IST0171", Level::Warning, resource, text));
                }
            }
        }
    }
}
