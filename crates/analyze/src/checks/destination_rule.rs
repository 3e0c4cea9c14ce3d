//! Do DestinationRules fit services and pods, and do they check whom they talk to?

use istio_api::DestinationRule;
use istio_api::destination_rule::{ClientTlsSettings, TlsMode};
use mesh_types::{Labels, selects};

use super::hosts::Hosts;
use crate::message::{Level, Message};
use crate::world::{NETWORKING, Resource, World};

/// The labels of a pod, and those of the place it runs at, as endpoints have them.
fn topology(world: &World<'_>, pod: &Resource<'_>) -> Labels {
    let mut labels = pod.pod_labels();
    let name = pod.text("/spec/nodeName");
    let Some(node) = world.all("", "Node").iter().find(|node| node.name == name) else { return labels };
    for key in ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"] {
        if let Some(value) = node.labels.get(key).filter(|value| !value.is_empty()) {
            labels.entry(key.to_owned()).or_insert_with(|| value.clone());
        }
    }
    labels.entry("kubernetes.io/hostname".to_owned()).or_insert_with(|| name.to_owned());
    labels
}

fn trusts_anybody(tls: Option<&ClientTlsSettings>, rule: &DestinationRule) -> Option<TlsMode> {
    let tls = tls.filter(|tls| matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual))?;
    let by_secret = !tls.credential_name.is_empty() && rule.workload_selector.is_some();
    (tls.ca_certificates.is_empty() && !by_secret).then_some(tls.mode)
}

pub(super) fn certificates(world: &World<'_>, out: &mut Vec<Message>) {
    for (resource, spec) in world.specs::<DestinationRule>(NETWORKING, "DestinationRule") {
        let Some(policy) = &spec.traffic_policy else { continue };
        let about = |mode: TlsMode| {
            format!(
                "DestinationRule {} in namespace {} has TLS mode set to {mode} but no caCertificates are set to validate server \
                 identity for host: {}",
                resource.full_name(),
                resource.namespace,
                spec.host
            )
        };
        if let Some(mode) = trusts_anybody(policy.tls.as_ref(), &spec) {
            let message = Message::new("IST0128", Level::Warning, resource, about(mode));
            out.push(message.at(resource, "spec.trafficPolicy.tls"));
        }
        for (index, own) in policy.port_level_settings.iter().enumerate() {
            if let Some(mode) = trusts_anybody(own.tls.as_ref(), &spec) {
                let port = own.port.as_ref().map_or(0, |port| port.number);
                let text = format!("{} at port number:{port}", about(mode));
                let field = format!("spec.trafficPolicy.portLevelSettings[{index}].tls");
                out.push(Message::new("IST0129", Level::Warning, resource, text).at(resource, &field));
            }
        }
    }
}

pub(super) fn subsets(world: &World<'_>, out: &mut Vec<Message>) {
    let hosts = Hosts::of(world);
    let pods: Vec<Labels> = world.workloads().map(|pod| topology(world, pod)).collect();
    for (resource, spec) in world.specs::<DestinationRule>(NETWORKING, "DestinationRule") {
        let Some(host) = hosts.find(&spec.host, resource.namespace, &spec.export_to) else {
            let text = format!(
                "The host {} defined in the DestinationRule does not match any services in the mesh.",
                spec.host
            );
            out.push(Message::new("IST0174", Level::Warning, resource, text).at(resource, "spec.host"));
            continue;
        };
        for (index, subset) in spec.subsets.iter().enumerate() {
            let mut selector = host.selector.clone();
            selector.extend(subset.labels.clone());
            if !pods.iter().any(|labels| selects(&selector, labels)) {
                let text = format!(
                    "The Subset {} defined in the DestinationRule does not select any pods. Which may lead to 503 UH \
                     (NoHealthyUpstream).",
                    subset.name
                );
                let message = Message::new("IST0173", Level::Error, resource, text);
                out.push(message.at(resource, &format!("spec.subsets[{index}]")));
            }
        }
    }
}
