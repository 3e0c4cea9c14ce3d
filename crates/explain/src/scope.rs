//! What a proxy may call: why it does not know a service that is there, and who says that it may call no others.

use config_store::{Key, Kind};
use registry::Service;

use crate::mesh::{Mesh, Pod};
use crate::trace::{Source, Step};

/// The object that keeps a service from a pod's proxy; `None` if it knows the service.
pub(crate) fn hidden(mesh: &Mesh, pod: &Pod, service: &Service) -> Option<Step> {
    let push = &mesh.files.push;
    let known = push.scope(&pod.node);
    if known.services.iter().any(|own| own.hostname == service.hostname && own.namespace == service.namespace) {
        return None;
    }
    let step = Step::new("scope", format!("the pod's proxy does not see {}", service.hostname));
    if !push.is_visible(service, &pod.namespace) {
        let fact = format!("it is not exported to namespace {}", pod.namespace);
        let written = ["metadata.annotations[\"networking.istio.io/exportTo\"]", "spec.exportTo"];
        let written = written.map(|field| mesh.service_source(service, field));
        let object = mesh.service_source(service, "");
        // A field that is not there has the line of its object; then the mesh says so, or the object's visibility.
        let source = written.into_iter().find(|source| source.place != object.place);
        let default = || mesh.files.mesh_source("defaultServiceExportTo").unwrap_or(object);
        return Some(step.fact(fact).source(Some(source.unwrap_or_else(default))).end());
    }
    let sidecar = push.sidecar_for(&pod.namespace, &pod.labels)?;
    let key = Key::new(Kind::Sidecar, &sidecar.namespace, &sidecar.name);
    let fact = format!("no egress host of the Sidecar fits; {}/{} would", service.namespace, service.hostname);
    Some(step.fact(fact).source(Some(mesh.source(&key, "spec.egress"))).end())
}

/// Where it is written that a pod's proxy may call only what it knows, if it is.
pub(crate) fn registry_only(mesh: &Mesh, pod: &Pod) -> Option<Source> {
    let scope = mesh.files.push.scope(&pod.node);
    if scope.allows_any() {
        return None;
    }
    match scope.sidecar.as_ref().filter(|sidecar| sidecar.spec.outbound_traffic_policy.is_some()) {
        Some(sidecar) => {
            let key = Key::new(Kind::Sidecar, &sidecar.namespace, &sidecar.name);
            Some(mesh.source(&key, "spec.outboundTrafficPolicy.mode"))
        }
        None => mesh.files.mesh_source("outboundTrafficPolicy.mode"),
    }
}

/// The step that says so.
pub(crate) fn blocked(of: Option<(&Mesh, &Pod)>, host: &str) -> Step {
    let step =
        Step::new("blocked", format!("the proxy may call only what it knows (REGISTRY_ONLY), and {host} is not that"));
    let step = step.source(of.and_then(|(mesh, pod)| registry_only(mesh, pod))).end();
    step.fact(format!("a ServiceEntry for {host} would let it through, or outboundTrafficPolicy.mode: ALLOW_ANY"))
}
