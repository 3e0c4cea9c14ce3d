//! Do pods get their sidecars?

use std::collections::BTreeSet;

use mesh_types::Labels;
use serde_json::Value;

use crate::message::{Level, Message};
use crate::world::{Resource, World, label_selector_fits, list_text};

const INJECTION: &str = "istio-injection";
const REVISION: &str = "istio.io/rev";
const DATAPLANE: &str = "istio.io/dataplane-mode";
const INJECT: &str = "sidecar.istio.io/inject";

/// Containers whose image the injector is to fill in, where no injector comes by.
pub(super) fn automatic_images(world: &World<'_>, out: &mut Vec<Message>) {
    let is_automatic = |resource: &Resource<'_>, containers: &str| {
        resource.list(containers).iter().any(|c| c["name"] == "istio-proxy" && c["image"] == "auto")
    };
    let text = |resource: &Resource<'_>| {
        let (kind, name) = (resource.document.kind(), resource.name);
        format!("{kind} {name} contains `image: auto` but does not match any Istio injection webhook selectors.")
    };
    for pod in world.pods().iter().filter(|pod| is_automatic(pod, "/spec/containers")) {
        out.push(Message::new("IST0147", Level::Error, pod, text(pod)));
    }
    let injectors = world.all("admissionregistration.k8s.io", "MutatingWebhookConfiguration").iter();
    let hooks: Vec<&Value> = injectors
        .flat_map(|resource| resource.list("/webhooks"))
        .filter(|hook| hook["name"].as_str().is_some_and(|name| name.ends_with("istio.io")))
        .collect();
    for deployment in world.all("apps", "Deployment") {
        let namespace = if deployment.namespace.is_empty() { "default" } else { deployment.namespace };
        let labels = world.namespace(namespace).map_or_else(Labels::new, |n| n.labels.clone());
        let fits = |hook: &&Value| {
            label_selector_fits(&hook["namespaceSelector"], &labels)
                && label_selector_fits(&hook["objectSelector"], &deployment.pod_labels())
        };
        if is_automatic(deployment, "/spec/template/spec/containers") && !hooks.iter().any(fits) {
            out.push(Message::new("IST0146", Level::Warning, deployment, text(deployment)));
        }
    }
}

/// Whether namespaces are injected unless they say otherwise, as the injector of a revision is configured.
fn by_default(world: &World<'_>, revision: &str) -> bool {
    let name = match revision {
        "" | "default" => "istio-sidecar-injector".to_owned(),
        revision => format!("istio-sidecar-injector-{revision}"),
    };
    let Some(map) = world.all("", "ConfigMap").iter().find(|map| map.name == name) else { return false };
    let values: Value = serde_json::from_str(map.text("/data/values")).unwrap_or_default();
    values["sidecarInjectorWebhook"]["enableNamespacesByDefault"] == true
}

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    let mut injected = BTreeSet::new();
    for namespace in world.all("", "Namespace").iter().filter(|n| n.name != "istio-system") {
        let label = |name: &str| namespace.labels.get(name).map(String::as_str);
        let injection = label(INJECTION);
        let mut ways: Vec<String> = injection.map(|value| format!("{INJECTION}={value}")).into_iter().collect();
        if injection.is_none_or(|value| value == "enabled") {
            ways.extend([REVISION, DATAPLANE].iter().filter_map(|name| Some(format!("{name}={}", label(name)?))));
        }
        if ways.len() > 1 {
            let text = format!(
                "The namespace has more than one type of injection labels {}, which may lead to undefined behavior. Make sure \
                 only one injection label exists.",
                list_text(&ways)
            );
            out.push(Message::new("IST0123", Level::Warning, namespace, text));
        }
        if label(DATAPLANE) == Some("ambient") {
            continue;
        }
        if injection.unwrap_or_default().is_empty() && label(REVISION).is_none() {
            let name = namespace.name;
            out.push(if by_default(world, label(REVISION).unwrap_or_default()) {
                let text = "is enabled for Istio injection, as Istio is installed with enableNamespacesByDefault as true.";
                Message::new("IST0148", Level::Info, namespace, text)
            } else {
                let text = format!(
                    "The namespace is not enabled for Istio injection. Run 'kubectl label namespace {name} \
                     istio-injection=enabled' to enable it, or 'kubectl label namespace {name} istio-injection=disabled' to \
                     explicitly mark it as not needing injection."
                );
                Message::new("IST0102", Level::Info, namespace, text).at(namespace, "metadata.name")
            });
        } else if injection == Some("enabled") {
            injected.insert(namespace.name);
        }
    }
    for pod in world.pods().iter().filter(|pod| injected.contains(pod.namespace)) {
        let wish = pod.labels.get(INJECT).or(pod.annotations.get(INJECT));
        let declined = wish.is_some_and(|value| value.eq_ignore_ascii_case("false"));
        let containers = pod.list("/spec/containers").iter().chain(pod.list("/spec/initContainers"));
        let proxy = containers.into_iter().find(|container| container["name"] == "istio-proxy");
        let has_proxy = proxy.is_some_and(|proxy| proxy["image"].as_str().is_some_and(|image| !image.is_empty()));
        if declined || has_proxy || pod.get("/spec/hostNetwork") == Some(&true.into()) {
            continue;
        }
        let text = format!(
            "The pod {} is missing the Istio proxy. This can often be resolved by restarting or redeploying the workload.",
            pod.full_name()
        );
        out.push(Message::new("IST0103", Level::Warning, pod, text));
    }
}
