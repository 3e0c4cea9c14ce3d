//! Are annotations known, and where they belong?

use crate::message::{Level, Message};
use crate::world::{Resource, World};

const CURRENT: bool = false;
const DEPRECATED: bool = true;

/// Istio's annotations: whether they are out of date, and the kinds that they are for.
const KNOWN: [(&str, bool, &[&str]); 68] = [
    ("alpha.istio.io/canonical-serviceaccounts", DEPRECATED, &["Service"]),
    ("alpha.istio.io/kubernetes-serviceaccounts", DEPRECATED, &["Service"]),
    ("ambient.istio.io/bypass-inbound-capture", CURRENT, &["Pod"]),
    ("ambient.istio.io/dns-capture", CURRENT, &["Pod"]),
    ("ambient.istio.io/redirection", CURRENT, &["Pod"]),
    ("ambient.istio.io/waypoint-inbound-binding", CURRENT, &["GatewayClass", "Gateway"]),
    ("galley.istio.io/analyze-suppress", CURRENT, &["Any"]),
    ("gateway.istio.io/controller-version", CURRENT, &["Any"]),
    ("gateway.istio.io/name-override", CURRENT, &["Gateway"]),
    ("gateway.istio.io/service-account", CURRENT, &["Gateway"]),
    ("inject.istio.io/templates", CURRENT, &["Pod"]),
    ("istio.io/autoRegistrationGroup", CURRENT, &["WorkloadEntry"]),
    ("istio.io/connectedAt", CURRENT, &["WorkloadEntry"]),
    ("istio.io/disconnectedAt", CURRENT, &["WorkloadEntry"]),
    ("istio.io/dry-run", CURRENT, &["AuthorizationPolicy"]),
    ("istio.io/reroute-virtual-interfaces", CURRENT, &["Pod"]),
    ("istio.io/rev", CURRENT, &["Pod"]),
    ("istio.io/use-waypoint-canary-weight", CURRENT, &["Service", "ServiceEntry", "Namespace"]),
    ("istio.io/workloadController", CURRENT, &["WorkloadEntry"]),
    ("kubernetes.io/ingress.class", CURRENT, &["Ingress"]),
    ("networking.istio.io/exportTo", CURRENT, &["Service"]),
    ("networking.istio.io/service-type", CURRENT, &["Gateway"]),
    ("networking.istio.io/traffic-distribution", CURRENT, &["Namespace", "Service", "ServiceEntry"]),
    ("prometheus.istio.io/merge-metrics", CURRENT, &["Pod"]),
    ("proxy.istio.io/config", CURRENT, &["Pod"]),
    ("proxy.istio.io/overrides", CURRENT, &["Pod"]),
    ("readiness.status.sidecar.istio.io/applicationPorts", CURRENT, &["Pod"]),
    ("readiness.status.sidecar.istio.io/failureThreshold", CURRENT, &["Pod"]),
    ("readiness.status.sidecar.istio.io/initialDelaySeconds", CURRENT, &["Pod"]),
    ("readiness.status.sidecar.istio.io/periodSeconds", CURRENT, &["Pod"]),
    ("sidecar.istio.io/agentLogLevel", CURRENT, &["Pod"]),
    ("sidecar.istio.io/bootstrapOverride", CURRENT, &["Pod"]),
    ("sidecar.istio.io/componentLogLevel", CURRENT, &["Pod"]),
    ("sidecar.istio.io/discoveryAddress", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/extraStatTags", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/inject", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/interceptionMode", CURRENT, &["Pod"]),
    ("sidecar.istio.io/logLevel", CURRENT, &["Pod"]),
    ("sidecar.istio.io/nativeSidecar", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyCPU", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyCPULimit", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyImage", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyImageType", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyMemory", CURRENT, &["Pod"]),
    ("sidecar.istio.io/proxyMemoryLimit", CURRENT, &["Pod"]),
    ("sidecar.istio.io/rewriteAppHTTPProbers", CURRENT, &["Pod"]),
    ("sidecar.istio.io/statsCompression", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/statsEvictionInterval", CURRENT, &["Pod"]),
    ("sidecar.istio.io/statsFlushInterval", CURRENT, &["Pod"]),
    ("sidecar.istio.io/statsHistogramBins", CURRENT, &["Pod"]),
    ("sidecar.istio.io/statsHistogramBuckets", CURRENT, &["Pod"]),
    ("sidecar.istio.io/statsInclusionPrefixes", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/statsInclusionRegexps", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/statsInclusionSuffixes", DEPRECATED, &["Pod"]),
    ("sidecar.istio.io/status", CURRENT, &["Pod"]),
    ("sidecar.istio.io/userVolume", CURRENT, &["Pod"]),
    ("sidecar.istio.io/userVolumeMount", CURRENT, &["Pod"]),
    ("status.sidecar.istio.io/port", CURRENT, &["Pod"]),
    ("topology.istio.io/controlPlaneClusters", CURRENT, &["Namespace"]),
    ("traffic.istio.io/nodeSelector", CURRENT, &["Service"]),
    ("traffic.sidecar.istio.io/excludeInboundPorts", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/excludeInterfaces", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/includeInboundPorts", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/includeOutboundPorts", CURRENT, &["Pod"]),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", DEPRECATED, &["Pod"]),
];

/// What istiod and controllers write themselves.
const AUTOMATIC: [&str; 3] = ["sidecar.istio.io/status", "gateway.istio.io/controller-version", "istio.io/rev"];
const INJECT: &str = "sidecar.istio.io/inject";

pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for (group, kind) in [("", "Namespace"), ("", "Service"), ("", "Pod"), ("apps", "Deployment")] {
        for resource in world.all(group, kind) {
            for (name, value) in &resource.annotations {
                let is_istios = name.split('/').next().is_some_and(|domain| domain.ends_with("istio.io"));
                if (is_istios || name == "kubernetes.io/ingress.class") && !AUTOMATIC.contains(&name.as_str()) {
                    out.extend(problems(resource, kind, name, value));
                }
            }
        }
    }
}

fn problems(resource: &Resource<'_>, kind: &str, name: &str, value: &str) -> Vec<Message> {
    let tell = |code, level, text: String| {
        Message::new(code, level, resource, text).at(resource, &format!("metadata.annotations[\"{name}\"]"))
    };
    let Some((_, deprecated, kinds)) = KNOWN.iter().find(|(known, ..)| *known == name) else {
        return vec![tell("IST0108", Level::Warning, format!("Unknown annotation: {name}"))];
    };
    let mut out = Vec::new();
    // Who has the label too keeps the annotation for older versions.
    if *deprecated && !(name == INJECT && resource.labels.contains_key(INJECT)) {
        let instead = if name == INJECT { " in favor of the \"sidecar.istio.io/inject\" label" } else { "" };
        let text =
            format!("Annotation {name:?} has been deprecated{instead} and may not work in future Istio versions.");
        out.push(tell("IST0135", Level::Info, text));
    }
    if kinds.contains(&"Any") {
        return out;
    }
    if !kinds.contains(&kind) {
        let text = format!("Misplaced annotation: {name} can only be applied to {}", kinds.join(", "));
        out.push(tell("IST0107", Level::Warning, text));
    } else if let Err(problem) = inject::check_annotation(name, value) {
        out.push(tell("IST0125", Level::Warning, format!("Invalid annotation {name}: {problem}")));
    }
    out
}
