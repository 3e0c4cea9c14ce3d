use std::net::IpAddr;
use std::sync::Arc;

use mesh_types::{ArcStr, Labels};

use crate::Locality;

/// Whether a workload's sidecar terminates mutual TLS (label `security.istio.io/tlsMode`).
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub enum TlsMode {
    /// No sidecar: plain text only.
    #[default]
    Disabled,
    /// A sidecar that speaks Istio's mutual TLS.
    Istio,
    /// What a label says that is neither: nothing to us, a name of a transport socket to EnvoyFilters.
    Other(ArcStr),
}

impl TlsMode {
    /// From a workload's labels.
    pub fn of_labels(labels: &Labels) -> TlsMode {
        match labels.get("security.istio.io/tlsMode").map(String::as_str) {
            Some("istio") => TlsMode::Istio,
            None | Some("disabled") => TlsMode::Disabled,
            Some(other) => TlsMode::Other(other.into()),
        }
    }

    /// As the label has it.
    pub fn as_str(&self) -> &str {
        match self {
            TlsMode::Disabled => "disabled",
            TlsMode::Istio => "istio",
            TlsMode::Other(other) => other,
        }
    }
}

/// Whether an endpoint may receive requests.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Health {
    /// Nothing is known: endpoints that were written down.
    Unknown,
    /// Ready.
    Healthy,
    /// Not ready.
    Unhealthy,
    /// Shutting down but still serving; only sessions that stick to it may use it.
    Draining,
    /// Shutting down.
    Terminating,
}

/// One address behind one port of a service (istiod `IstioEndpoint`).
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Endpoint {
    /// IP addresses, the first is the primary one; or one host name or `unix://` path.
    pub addresses: Vec<ArcStr>,
    /// Where it listens; 0 for unix sockets.
    pub port: u16,
    /// The service's port that leads here.
    pub service_port_name: ArcStr,
    /// And its number, by which clusters whose proxies look names up find the endpoints of ServiceEntries; 0 of others.
    pub service_port: u16,
    /// Who serves there.
    pub workload: Arc<Workload>,
    /// Relative weight; 0 counts as 1.
    pub weight: u32,
    /// Readiness.
    pub health: Health,
}

impl Endpoint {
    /// Whether every address is an IP address.
    pub fn is_ip(&self) -> bool {
        !self.addresses.is_empty() && self.addresses.iter().all(|a| a.parse::<IpAddr>().is_ok())
    }
}

/// A pod or a WorkloadEntry.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Workload {
    /// Kubernetes name of the pod or entry.
    pub name: ArcStr,
    /// Name of what created it: the Deployment for its pods.
    pub workload_name: ArcStr,
    /// Namespace.
    pub namespace: ArcStr,
    /// IP addresses.
    pub addresses: Vec<ArcStr>,
    /// As written; pods of one workload share them.
    pub labels: Arc<Labels>,
    /// With topology labels added.
    pub topology_labels: Arc<Labels>,
    /// SPIFFE identity as text; empty if none.
    pub identity: String,
    /// Whether it takes mutual TLS.
    pub tls_mode: TlsMode,
    /// Where it runs.
    pub locality: Locality,
    /// The same as written, `region/zone/subzone`: endpoints of one text form one group.
    pub locality_label: ArcStr,
    /// Network, as far as it decides how the workload is reached; empty is in reach of all.
    pub network: ArcStr,
    /// Kubernetes node.
    pub node: ArcStr,
    /// `hostname` of pods with a subdomain (StatefulSets).
    pub hostname: ArcStr,
    /// `subdomain`: name of the governing headless service.
    pub subdomain: ArcStr,
    /// Named ports: of containers, or of the WorkloadEntry's `ports`.
    pub ports: Vec<(ArcStr, u16)>,
    /// Named ports of containers for UDP.
    pub udp_ports: Vec<(ArcStr, u16)>,
    /// Relative weight (WorkloadEntry).
    pub weight: u32,
    /// The pod's conditions say it is ready; WorkloadEntries always are.
    pub ready: bool,
    /// A pod, whose readiness is known; WorkloadEntries are just written down.
    pub is_pod: bool,
    /// The pod is over (Succeeded, Failed) and owns no address any more.
    pub finished: bool,
}

impl Workload {
    /// Its address is an IP address, as Kubernetes services need it, not a name or a unix socket.
    pub(crate) fn has_ip_only(&self) -> bool {
        self.addresses.iter().all(|a| a.parse::<IpAddr>().is_ok())
    }

    /// The number of a named port.
    pub fn port(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(n, _)| &**n == name).map(|(_, port)| *port)
    }
}

/// The label that names the service which a workload belongs to, in telemetry.
pub const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
/// And that of its version.
pub const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

/// Name and revision under which a workload appears in telemetry (istio `pkg/kube/labels`, `CanonicalService`).
pub fn canonical_service<'a>(labels: &'a Labels, workload_name: &'a str) -> (&'a str, &'a str) {
    let first = |keys: [&str; 3]| keys.into_iter().find_map(|key| labels.get(key)).map(String::as_str);
    (
        first([CANONICAL_NAME, "app.kubernetes.io/name", "app"]).unwrap_or(workload_name),
        first([CANONICAL_REVISION, "app.kubernetes.io/version", "version"]).unwrap_or("latest"),
    )
}
