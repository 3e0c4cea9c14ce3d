//! What validation of single objects says, and what is out of date.

use config_store::{Kind, Object};
use istio_api::{Sidecar, VirtualService};

use crate::message::{Level, Message};
use crate::world::{NETWORKING, World};

pub(super) fn valid(world: &World<'_>, out: &mut Vec<Message>) {
    for resource in world.everything() {
        let document = resource.document;
        if !Kind::of(document.group(), document.kind()).is_some_and(Kind::is_custom) {
            continue;
        }
        let mut tell = |code, level, what, fault: manifest::Error| {
            let field = fault.field.unwrap_or_default();
            let colon = if field.is_empty() { "" } else { ": " };
            let text = format!("{what}: {field}{colon}{}", fault.message);
            let mut message = Message::new(code, level, resource, text);
            if fault.line > 0 {
                message.subject.place = resource.place(fault.line);
            }
            out.push(message);
        };
        match Object::read(document) {
            Ok((_, warnings)) => {
                // Rules that are not used have codes of their own.
                for warning in warnings.into_iter().filter(|w| !w.message.starts_with("rule not used")) {
                    tell("IST0133", Level::Warning, "Schema validation warning", warning);
                }
            }
            Err(rejected) => {
                for error in rejected.errors {
                    tell("IST0106", Level::Error, "Schema validation error", error);
                }
            }
        }
    }
}

pub(super) fn deprecated(world: &World<'_>, out: &mut Vec<Message>) {
    for (resource, spec) in world.specs::<VirtualService>(NETWORKING, "VirtualService") {
        let percent = |r: &istio_api::virtual_service::HttpRoute| {
            r.fault.as_ref().and_then(|f| f.delay.as_ref()).is_some_and(|delay| delay.percent > 0)
        };
        for index in (0..spec.http.len()).filter(|index| percent(&spec.http[*index])) {
            let text = "Deprecated: HTTPRoute.fault.delay.percent is deprecated; use HTTPRoute.fault.delay.percentage";
            let field = format!("spec.http[{index}].fault.delay.percent");
            out.push(Message::new("IST0002", Level::Warning, resource, text).at(resource, &field));
        }
    }
    for (resource, spec) in world.specs::<Sidecar>(NETWORKING, "Sidecar") {
        if spec.outbound_traffic_policy.is_some_and(|policy| policy.egress_proxy.is_some()) {
            let text = "Deprecated: OutboundTrafficPolicy.EgressProxy ignored";
            let field = "spec.outboundTrafficPolicy.egressProxy";
            out.push(Message::new("IST0002", Level::Warning, resource, text).at(resource, field));
        }
    }
    const REMOVED: [&str; 4] = ["ClusterRbacConfig", "RbacConfig", "ServiceRole", "ServiceRoleBinding"];
    for resource in world.all("apiextensions.k8s.io", "CustomResourceDefinition") {
        let kind = resource.text("/spec/names/kind");
        if resource.text("/spec/group") == "rbac.istio.io" && REMOVED.contains(&kind) {
            let text = format!("Deprecated: Custom resource type rbac.istio.io {kind} is removed");
            out.push(Message::new("IST0002", Level::Warning, resource, text));
        }
    }
}
