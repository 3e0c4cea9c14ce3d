//! Do workloads leave room for their sidecars, and do services agree about their ports?

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::selects;
use serde_json::Value;

use crate::message::{Level, Message};
use crate::world::{Resource, World, list_text};

/// Whom the sidecar's traffic is known by.
const PROXY_USER: u64 = 1337;

pub(super) fn user(world: &World<'_>, out: &mut Vec<Message>) {
    let pods = world.pods().iter().map(|r| (r, r.get("/spec")));
    let deployments = world.all("apps", "Deployment").iter().map(|r| (r, r.get("/spec/template/spec")));
    for (resource, spec) in pods.chain(deployments).filter(|(resource, _)| !resource.is_control_plane()) {
        let Some(spec) = spec else { continue };
        let is_proxys = |of: &Value| of["securityContext"]["runAsUser"].as_u64() == Some(PROXY_USER);
        let containers = spec["containers"].as_array().into_iter().flatten();
        let mut others = containers.filter(|c| c["name"] != "istio-proxy" && c["name"] != "istio-operator");
        if is_proxys(spec) || others.any(is_proxys) {
            let text = "User ID (UID) 1337 is reserved for the sidecar proxy.";
            out.push(Message::new("IST0144", Level::Warning, resource, text));
        }
    }
}

/// Ports of the services that select what a deployment makes.
fn ports_of<'w>(world: &'w World<'_>, deployment: &Resource<'_>) -> Vec<(String, &'w Value)> {
    let labels = deployment.pod_labels();
    let mut out = Vec::new();
    for service in world.all("", "Service").iter().filter(|s| s.namespace == deployment.namespace) {
        let selector = service.get("/spec/selector").and_then(Value::as_object).into_iter().flatten();
        let selector = selector.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect();
        if service.get("/spec/selector").is_some_and(|s| s.as_object().is_some_and(|s| !s.is_empty()))
            && selects(&selector, &labels)
        {
            out.extend(service.list("/spec/ports").iter().map(|port| (service.full_name(), port)));
        }
    }
    out
}

pub(super) fn ports(world: &World<'_>, out: &mut Vec<Message>) {
    for deployment in world.all("apps", "Deployment").iter().filter(|deployment| world.in_mesh(deployment)) {
        if deployment.labels.get("gateway.istio.io/managed").is_some_and(|by| by == "istio.io-mesh-controller") {
            continue;
        }
        let mut protocols: BTreeMap<u64, BTreeMap<&str, Vec<String>>> = BTreeMap::new();
        let mut targets: BTreeMap<String, BTreeMap<u64, String>> = BTreeMap::new();
        for (service, port) in ports_of(world, deployment) {
            let number = port["port"].as_u64().unwrap_or_default();
            let protocol = port["protocol"].as_str().filter(|p| !p.is_empty()).unwrap_or("TCP");
            protocols.entry(number).or_default().entry(protocol).or_default().push(service.clone());
            let target = match &port["targetPort"] {
                Value::String(name) if !name.is_empty() && name != "0" => name.clone(),
                Value::Number(target) if target.as_u64() != Some(0) => target.to_string(),
                _ => number.to_string(),
            };
            targets.entry(target).or_default().insert(number, service);
        }
        let mut tell = |code, text| {
            out.push(Message::new(code, Level::Warning, deployment, text).at(deployment, "metadata.name"));
        };
        for (port, services) in protocols.iter().filter(|(_, services)| services.len() > 1) {
            let mut names: Vec<&String> = services.values().flatten().collect();
            names.sort();
            tell(
                "IST0116",
                format!(
                    "This deployment {} is associated with multiple services using port {port} but different protocols: {}",
                    deployment.name,
                    list_text(&names)
                ),
            );
        }
        for (target, services) in targets.iter().filter(|(_, services)| services.len() > 1) {
            let names: BTreeSet<&String> = services.values().collect();
            let mut names: Vec<&String> =
                if names.len() == services.len() { names.into_iter().collect() } else { services.values().collect() };
            names.sort();
            let ports: Vec<u64> = services.keys().copied().collect();
            tell(
                "IST0137",
                format!(
                    "This deployment {} is associated with multiple services {} using targetPort {target:?} but different ports: {}.",
                    deployment.name,
                    list_text(&names),
                    list_text(&ports)
                ),
            );
        }
    }
}
