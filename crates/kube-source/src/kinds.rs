use config_store::Kind;
use kube::discovery::ApiResource;

/// Versions of Istio's kinds, the preferred one first.
const NETWORKING: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const SECURITY: &[&str] = &["v1", "v1beta1"];
const TELEMETRY: &[&str] = &["v1", "v1alpha1"];

/// How the API server knows a kind.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) kind: Kind,
    pub(crate) plural: &'static str,
    /// The preferred version first.
    pub(crate) versions: &'static [&'static str],
    /// Other names that `kubectl` takes.
    pub(crate) short: &'static [&'static str],
}

/// Kubernetes' own kinds that are watched.
///
/// Of ConfigMaps the mesh's is, and those with root certificates; of Secrets those that may hold certificates.
pub(crate) const CORE: [Api; 5] = [
    core(Kind::Namespace, "namespaces"),
    core(Kind::Node, "nodes"),
    core(Kind::Pod, "pods"),
    core(Kind::Service, "services"),
    core(Kind::EndpointSlice, "endpointslices"),
];

/// Kinds that need a CRD: Istio's, by the versions of its own CRDs, and the Gateway API's.
pub(crate) const CUSTOM: [Api; 17] = [
    custom(Kind::VirtualService, "virtualservices", NETWORKING, &["vs"]),
    custom(Kind::DestinationRule, "destinationrules", NETWORKING, &["dr"]),
    custom(Kind::ServiceEntry, "serviceentries", NETWORKING, &["se"]),
    custom(Kind::Sidecar, "sidecars", NETWORKING, &[]),
    custom(Kind::WorkloadEntry, "workloadentries", NETWORKING, &["we"]),
    custom(Kind::WorkloadGroup, "workloadgroups", NETWORKING, &["wg"]),
    custom(Kind::EnvoyFilter, "envoyfilters", &["v1alpha3"], &[]),
    custom(Kind::Gateway, "gateways", NETWORKING, &["gw"]),
    custom(Kind::ProxyConfig, "proxyconfigs", &["v1beta1"], &[]),
    custom(Kind::PeerAuthentication, "peerauthentications", SECURITY, &["pa"]),
    custom(Kind::RequestAuthentication, "requestauthentications", SECURITY, &["ra"]),
    custom(Kind::AuthorizationPolicy, "authorizationpolicies", SECURITY, &["ap"]),
    custom(Kind::Telemetry, "telemetries", TELEMETRY, &["telemetry"]),
    custom(Kind::WasmPlugin, "wasmplugins", &["v1alpha1"], &[]),
    custom(Kind::TrafficExtension, "trafficextensions", &["v1alpha1"], &[]),
    custom(Kind::HTTPRoute, "httproutes", &["v1", "v1beta1"], &[]),
    custom(Kind::GRPCRoute, "grpcroutes", &["v1"], &[]),
];

const fn core(kind: Kind, plural: &'static str) -> Api {
    Api { kind, plural, versions: &["v1"], short: &[] }
}

const fn custom(
    kind: Kind,
    plural: &'static str,
    versions: &'static [&'static str],
    short: &'static [&'static str],
) -> Api {
    Api { kind, plural, versions, short }
}

impl Api {
    /// The resource in one of its versions.
    pub(crate) fn resource(&self, version: &str) -> ApiResource {
        let group = self.kind.group();
        ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") },
            kind: self.kind.as_str().to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    /// The name of the CRD.
    pub(crate) fn crd_name(&self) -> String {
        format!("{}.{}", self.plural, self.kind.group())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_custom_kind_is_watched() {
        for kind in Kind::ALL.iter().filter(|kind| kind.is_custom()) {
            assert!(CUSTOM.iter().any(|api| api.kind == *kind), "{kind}");
        }
    }
}
