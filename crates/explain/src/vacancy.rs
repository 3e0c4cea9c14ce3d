//! Why nobody serves a port of a service.

use std::fmt;

use mesh_types::{Labels, selects};
use registry::{Endpoint, Health, Provider, Service, TargetPort};

use crate::mesh::Mesh;
use crate::trace::Source;

/// More names than this are only counted.
const SHOWN: usize = 8;

/// What keeps a port of a service from having an endpoint that may be chosen.
pub(crate) struct Vacancy {
    /// In one sentence, with what there is instead.
    pub(crate) why: String,
    /// The field that would have to be another one.
    pub(crate) source: Source,
}

impl fmt::Display for Vacancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source.place.as_str() {
            "" => f.write_str(&self.why),
            place => write!(f, "{} ({place})", self.why),
        }
    }
}

/// Why a port of a service leads nowhere; `None` if somebody is ready to serve it.
pub(crate) fn of_port(mesh: &Mesh, service: &Service, port: u16) -> Option<Vacancy> {
    let object = mesh.service_source(service, "").object;
    let at = |field: &str, why: String| {
        Some(Vacancy { why: format!("{object} {why}"), source: mesh.service_source(service, field) })
    };
    let Some(index) = service.port(port).and_then(|own| service.ports.iter().position(|other| other == own)) else {
        return at("spec.ports", format!("has no port {port}, it has {}", ports(service)));
    };
    let all: Vec<&Endpoint> = mesh.files.push.registry.endpoints_by_port(service, port).collect();
    // Endpoints of ServiceEntries have no readiness.
    if all.iter().any(|endpoint| matches!(endpoint.health, Health::Healthy | Health::Unknown)) {
        return None;
    }
    if !all.is_empty() {
        let names: Vec<String> =
            all.iter().map(|endpoint| format!("{}.{}", endpoint.workload.name, endpoint.workload.namespace)).collect();
        return at("spec.selector", format!("has no ready pod: {} {} not", shown(&names), are(names.len())));
    }
    if service.provider != Provider::Kubernetes {
        return at("spec", "has no endpoints, and selects no workload that is there".to_owned());
    }
    if service.selector.is_empty() {
        let why = "has neither a selector nor an EndpointSlice with addresses".to_owned();
        return at("spec", why);
    }
    let here = || mesh.pods.iter().filter(|pod| *pod.namespace == *service.namespace);
    let wanted = labels(&service.selector);
    match (here().any(|pod| selects(&service.selector, &pod.labels)), &service.ports[index].target) {
        (false, _) => {
            let mut seen: Vec<String> = service
                .selector
                .keys()
                .flat_map(|key| here().filter_map(move |pod| Some(format!("{key}: {}", pod.labels.get(key)?))))
                .collect();
            seen.sort();
            seen.dedup();
            let instead = match seen.is_empty() {
                true => format!("no pod of namespace {} has such a label", service.namespace),
                false => format!("pods of namespace {} have {}", service.namespace, shown(&seen)),
            };
            at("spec.selector", format!("has no ready pod: its selector ({wanted}) fits none; {instead}"))
        }
        (true, TargetPort::Name(name)) => {
            let field = format!("spec.ports[{index}].targetPort");
            at(&field, format!("leads port {port} to {name:?}, and its pods have no container port of that name"))
        }
        (true, TargetPort::Number(_)) => {
            at("spec.selector", format!("has no endpoint, although its selector ({wanted}) fits pods"))
        }
    }
}

/// The ports of a service as one reads them: `80 (http), 90`.
pub(crate) fn ports(service: &Service) -> String {
    let named = service.ports.iter().map(|port| match &*port.name {
        "" => port.port.to_string(),
        name => format!("{} ({name})", port.port),
    });
    let all: Vec<String> = named.collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}

/// `app: a, version: v1`.
pub(crate) fn labels(labels: &Labels) -> String {
    let all: Vec<String> = labels.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    all.join(", ")
}

/// The first of many.
pub(crate) fn shown(all: &[String]) -> String {
    let rest = all.len().saturating_sub(SHOWN);
    let first = all[..all.len() - rest].join(", ");
    if rest > 0 { format!("{first} and {rest} more") } else { first }
}

fn are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}
