//! Why a proxy does not know a service that is there.

use config_store::{Key, Kind};
use registry::Service;

use crate::mesh::{Mesh, Pod};
use crate::trace::Step;

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
        return Some(step.fact(fact).source(Some(mesh.service_source(service))).end());
    }
    let sidecar = push.sidecar_for(&pod.namespace, &pod.labels)?;
    let key = Key::new(Kind::Sidecar, &sidecar.namespace, &sidecar.name);
    let fact = format!("no egress host of the Sidecar fits; {}/{} would", service.namespace, service.hostname);
    Some(step.fact(fact).source(Some(mesh.source(&key, "spec.egress"))).end())
}
