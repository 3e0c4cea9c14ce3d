use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use istio_api::mesh_config::Visibility;
use mesh_types::{ArcStr, Labels, Protocol};

use crate::{Settings, UNSPECIFIED_IP};

/// Who told us about a service.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Provider {
    /// A Kubernetes Service.
    Kubernetes,
    /// A ServiceEntry.
    External,
}

impl Provider {
    /// As name tables write it (istio `provider.ID`).
    pub fn as_str(self) -> &'static str {
        match self {
            Provider::Kubernetes => "Kubernetes",
            Provider::External => "External",
        }
    }
}

/// How a proxy finds a service's endpoints (istiod `model.Resolution`).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Resolution {
    /// From the control plane (EDS).
    ClientSideLb,
    /// By DNS, all addresses.
    DnsLb,
    /// By DNS, one address at a time.
    DnsRoundRobinLb,
    /// Where the application wanted to go.
    Passthrough,
    /// The name of another service (ExternalName).
    Alias,
    /// By DNS for each name of a wildcard.
    DynamicDns,
}

impl Resolution {
    /// Endpoints are host names that the proxy resolves.
    pub fn is_dns(self) -> bool {
        matches!(self, Resolution::DnsLb | Resolution::DnsRoundRobinLb)
    }
}

/// Preference for near endpoints (Kubernetes `trafficDistribution`).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum TrafficDistribution {
    /// None.
    #[default]
    Any,
    /// `PreferClose`, `PreferSameZone`.
    PreferSameZone,
    /// `PreferSameNode`.
    PreferSameNode,
}

impl TrafficDistribution {
    /// By the service's field, its annotation, its namespace's annotation (istiod `GetTrafficDistribution`).
    pub(crate) fn resolve(field: Option<&str>, own: &Labels, of_namespace: &Labels) -> TrafficDistribution {
        match field {
            Some("PreferClose" | "PreferSameZone") => return TrafficDistribution::PreferSameZone,
            Some("PreferSameNode") => return TrafficDistribution::PreferSameNode,
            _ => {}
        }
        let get = |annotations: &Labels| {
            let text = annotations.get("networking.istio.io/traffic-distribution")?.to_ascii_lowercase();
            (!text.is_empty()).then_some(text)
        };
        match get(own).or_else(|| get(of_namespace)).as_deref() {
            Some("preferclose" | "prefersamezone") => TrafficDistribution::PreferSameZone,
            Some("prefersamenode") => TrafficDistribution::PreferSameNode,
            _ => TrafficDistribution::Any,
        }
    }
}

/// A port of a service.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Port {
    /// May be empty for a single port.
    pub name: ArcStr,
    /// What clients dial.
    pub port: u16,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where pods listen.
    pub target: TargetPort,
}

/// Kubernetes' `targetPort`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// A container port's name.
    Name(ArcStr),
}

/// A service (istiod `model.Service`).
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Service {
    /// Fully qualified, lower case; may start with `*.` (ServiceEntry).
    pub hostname: ArcStr,
    /// Kubernetes name; the host for ServiceEntries.
    pub name: ArcStr,
    /// Namespace.
    pub namespace: ArcStr,
    /// Name of the object it is from.
    pub object_name: ArcStr,
    /// Source.
    pub provider: Provider,
    /// Unix seconds.
    pub created: i64,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Outside of the mesh: no mutual TLS.
    pub mesh_external: bool,
    /// In the order written.
    pub ports: Vec<Port>,
    /// Cluster IPs of both families; empty for headless services and ServiceEntries.
    pub cluster_ips: Vec<ArcStr>,
    /// The address listeners bind, possibly a CIDR range; [`UNSPECIFIED_IP`] if none.
    pub default_address: ArcStr,
    /// The object's labels.
    pub labels: Labels,
    /// Which workloads serve it; empty if given by other means.
    pub selector: Labels,
    /// `exportTo`; empty is the mesh's default.
    pub export_to: Vec<ArcStr>,
    /// ExternalName services that point here: host and namespace.
    pub aliases: Vec<(ArcStr, ArcStr)>,
    /// Target of an ExternalName service.
    pub external_name: ArcStr,
    /// Identities that may serve it: `subjectAltNames`.
    pub service_accounts: Vec<String>,
    /// Near endpoints first?
    pub traffic_distribution: TrafficDistribution,
    /// Only endpoints of the client's node (`internalTrafficPolicy: Local`).
    pub node_local: bool,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// ServiceEntry with resolution NONE: the port dialled instead of the service's.
    pub passthrough_ports: BTreeMap<u16, u16>,
    /// Addresses that were allocated to it, for proxies whose agents answer DNS with them; IPv4 first.
    pub allocated: Vec<ArcStr>,
    /// How far the mesh lets the service be seen, whatever `export_to` says (`serviceEntryVisibility`).
    pub visibility: Visibility,
    /// Connections race to all addresses of its name (annotation `istio.io/connect-strategy`).
    pub races: bool,
}

impl Service {
    /// Clients that were sent to an endpoint may return to it while it drains.
    pub fn keeps_draining(&self, settings: &Settings) -> bool {
        [&settings.session_label, &settings.session_header_label].into_iter().any(|key| self.session(key).is_some())
    }

    /// What a label about sessions says.
    pub fn session(&self, label: &str) -> Option<&str> {
        self.labels.get(label).map(String::as_str).filter(|value| !label.is_empty() && !value.is_empty())
    }

    /// Endpoints that are not ready are sent whatever a policy says: preference for near ones needs to know when to
    /// go farther (istiod `ForcesSupportUnhealthyEndpoints`).
    pub fn forces_unhealthy(&self, settings: &Settings) -> bool {
        settings.force_unhealthy || self.traffic_distribution != TrafficDistribution::Any
    }

    /// The port of that number, but for UDP, which no proxy handles.
    pub fn port(&self, port: u16) -> Option<&Port> {
        self.ports.iter().find(|p| p.port == port && p.protocol != Protocol::Udp)
    }

    /// A name starting with `*`.
    pub fn is_wildcard(&self) -> bool {
        self.hostname.starts_with('*')
    }

    /// No address of its own.
    pub fn is_headless(&self) -> bool {
        &*self.default_address == UNSPECIFIED_IP && self.cluster_ips.is_empty()
    }
}

/// A service port that a proxy's own workload serves (istiod `model.ServiceTarget`).
#[derive(Clone, Debug)]
pub struct ServiceTarget {
    /// The service.
    pub service: Arc<Service>,
    /// Its port.
    pub port: Port,
    /// Where the workload listens.
    pub target_port: u16,
}

/// Services of one host name in one namespace have the accounts that the youngest of them names, whatever the others
/// name (istiod `PushContext.addServiceAccounts`). `services` are in order of age.
pub(crate) fn share_accounts(services: &mut [Service]) {
    let key = |service: &Service| (service.hostname.clone(), service.namespace.clone());
    // Without ServiceEntries there are no namesakes.
    let mut youngest: HashMap<(ArcStr, ArcStr), usize> =
        services.iter().filter(|s| s.provider == Provider::External).map(|s| (key(s), 0)).collect();
    if youngest.is_empty() {
        return;
    }
    for (i, service) in services.iter().enumerate() {
        youngest.entry(key(service)).and_modify(|last| *last = i);
    }
    for i in 0..services.len() {
        if let Some(&last) = youngest.get(&key(&services[i])).filter(|last| **last != i) {
            services[i].service_accounts = services[last].service_accounts.clone();
        }
    }
}

/// Tells every service the ExternalName services that (directly or over others) point at it.
///
/// As istiod `push_context.go`, `resolveServiceAliases`: names are followed without regard to
/// namespaces, and circles end nowhere.
pub(crate) fn resolve_aliases(services: &mut [Service]) {
    let raw: HashMap<ArcStr, ArcStr> = services
        .iter()
        .filter(|s| s.resolution == Resolution::Alias)
        .map(|s| (s.hostname.clone(), s.external_name.clone()))
        .collect();
    if raw.is_empty() {
        return;
    }
    let mut aliases: HashMap<ArcStr, Vec<(ArcStr, ArcStr)>> = HashMap::new();
    for service in services.iter().filter(|s| s.resolution == Resolution::Alias) {
        let mut target = service.external_name.clone();
        let mut hops = 0;
        while let Some(next) = raw.get(&target) {
            target = next.clone();
            hops += 1;
            if hops > raw.len() {
                break;
            }
        }
        if hops <= raw.len() {
            aliases.entry(target).or_default().push((service.hostname.clone(), service.namespace.clone()));
        }
    }
    for list in aliases.values_mut() {
        list.sort_by(|a, b| (&a.1, &a.0).cmp(&(&b.1, &b.0)));
    }
    for service in services {
        if let Some(list) = aliases.get(&service.hostname) {
            service.aliases.clone_from(list);
        }
    }
}
