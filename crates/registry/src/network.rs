//! Networks of the mesh and the gateways between them.
//!
//! Source: istiod `pilot/pkg/model/network.go` and `pilot/pkg/serviceregistry/kube/controller/network.go`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use ipnet::IpNet;
use istio_api::MeshConfig;
use k8s_openapi::api::core::v1::{Node, Service, ServiceSpec};
use mesh_types::{ArcStr, Labels, selects};

use crate::{Locality, Settings, augment_labels, kubernetes};

/// Label of pods, WorkloadEntries, Services and the root namespace.
pub(crate) const NETWORK: &str = "topology.istio.io/network";
/// Label of Services that are gateways: the port of mutual TLS.
const GATEWAY_PORT: &str = "networking.istio.io/gatewayPort";
/// Annotation of Services of type NodePort: labels of the nodes whose addresses lead to them, as JSON.
const NODE_SELECTOR: &str = "traffic.istio.io/nodeSelector";
/// Where gateways take mutual TLS unless they say otherwise.
const PORT: u16 = 15443;
/// Where they take HBONE, which sidecars do not speak to them.
const HBONE_PORT: u16 = 15008;

/// Addresses of gateways that are given by name.
pub type GatewayAddresses = BTreeMap<ArcStr, Vec<IpAddr>>;

/// A way into a network (istiod `model.NetworkGateway`).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NetworkGateway {
    /// IP address, or a name where names are not resolved.
    pub address: ArcStr,
    /// Where it takes mutual TLS; 0 if it does not.
    pub port: u32,
    /// Where it takes HBONE; 0 if it does not.
    pub hbone_port: u32,
    /// The network that it leads to.
    pub network: ArcStr,
    /// The cluster that it is in; empty if unknown.
    pub cluster: ArcStr,
    /// What stands for the labels of a workload.
    pub labels: Arc<Labels>,
}

impl NetworkGateway {
    fn new(network: &str, cluster: &ArcStr, address: ArcStr, port: u32, hbone_port: u32) -> NetworkGateway {
        let labels = augment_labels(&Labels::new(), cluster, &Locality::default(), "", network).into();
        NetworkGateway { address, port, hbone_port, network: network.into(), cluster: cluster.clone(), labels }
    }
}

/// Gateways by network, in order of address and port.
#[derive(Debug, Default, PartialEq)]
pub struct Gateways {
    by_network: BTreeMap<ArcStr, Vec<NetworkGateway>>,
    by_cluster: HashMap<(ArcStr, ArcStr), Vec<NetworkGateway>>,
    scale: u32,
}

impl Gateways {
    fn new(set: &BTreeSet<NetworkGateway>) -> Gateways {
        let mut out = Gateways { scale: 1, ..Gateways::default() };
        for gateway in set {
            out.by_network.entry(gateway.network.clone()).or_default().push(gateway.clone());
            let key = (gateway.network.clone(), gateway.cluster.clone());
            out.by_cluster.entry(key).or_default().push(gateway.clone());
        }
        let counts = out.by_network.values().chain(out.by_cluster.values()).map(|list| list.len());
        out.scale = counts.fold(1, |multiple, count| {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            (multiple / divisor(multiple, count)).saturating_mul(count)
        });
        out
    }

    /// No network has one: all of the mesh is in reach.
    pub fn is_empty(&self) -> bool {
        self.by_network.is_empty()
    }

    /// The smallest weight that can be shared evenly among the gateways of every network.
    pub fn scale(&self) -> u32 {
        self.scale
    }

    /// All of them, in order of address and port.
    pub fn all(&self) -> Vec<&NetworkGateway> {
        let mut all: Vec<_> = self.by_network.values().flatten().collect();
        all.sort();
        all
    }

    /// The gateways that lead sidecars to a network: those of the endpoint's cluster if there are any, and of them those
    /// that take mutual TLS.
    pub fn towards<'a>(&'a self, network: &str, cluster: &ArcStr) -> impl Iterator<Item = &'a NetworkGateway> {
        let near = self.by_cluster.get(&(ArcStr::from(network), cluster.clone()));
        let list = near.or_else(|| self.by_network.get(network));
        list.into_iter().flatten().filter(|gateway| gateway.port != 0)
    }
}

/// The greatest common divisor; of 0 and another the other.
fn divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a.max(1) } else { divisor(b, a % b) }
}

/// Which endpoint is in which network, and how to get there.
#[derive(Debug, Default, PartialEq)]
pub struct Networks {
    /// Gateways by IP address, names resolved, for endpoints that the control plane sends.
    pub gateways: Gateways,
    /// Gateways as they were given, for clusters whose proxies resolve names themselves.
    pub unresolved: Gateways,
    /// Of the cluster, by the label of the root namespace.
    of_namespace: ArcStr,
    /// Of the cluster, by MeshNetworks.
    of_registry: ArcStr,
    /// By address; the widest range first.
    ranges: Vec<(IpNet, ArcStr)>,
}

impl Networks {
    pub(crate) fn build(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Networks {
        let root = if mesh.root_namespace.is_empty() { "istio-system" } else { &mesh.root_namespace };
        let root = snapshot.find(Kind::Namespace, "", root);
        let mut out = Networks {
            of_namespace: root.and_then(|object| object.labels.get(NETWORK)).map_or("", String::as_str).into(),
            ..Networks::default()
        };
        let mut set = BTreeSet::new();
        // Services that MeshNetworks name as gateways: host name, network and port.
        let mut named: Vec<(&str, &str, u32)> = Vec::new();
        let mut ranges: BTreeMap<IpNet, ArcStr> = BTreeMap::new();
        for (name, network) in &settings.networks.networks {
            let of_cidr = network.endpoints.iter().filter_map(|e| e.from_cidr.as_deref()?.parse::<IpNet>().ok());
            ranges.extend(of_cidr.map(|range| (range.trunc(), name.as_str().into())));
            let own = |e: &istio_api::mesh_networks::NetworkEndpoints| {
                e.from_registry.as_deref() == Some(&*settings.cluster_id)
            };
            let is_own = network.endpoints.iter().any(own);
            if is_own && out.of_registry.is_empty() {
                out.of_registry = name.as_str().into();
            }
            for gateway in &network.gateways {
                if let Some(address) = gateway.address.as_deref().filter(|address| !address.is_empty()) {
                    set.insert(NetworkGateway::new(name, &"".into(), address.into(), gateway.port, 0));
                } else if let Some(service) = gateway.registry_service_name.as_deref().filter(|_| is_own) {
                    named.push((service, name, gateway.port));
                }
            }
        }
        out.ranges = ranges.into_iter().collect();
        out.ranges.sort_by_key(|(range, _)| range.prefix_len());
        for object in snapshot.list(Kind::Service) {
            let Body::Service(service) = &object.body else { continue };
            set.extend(of_service(snapshot, object, service, &named, settings));
        }
        out.unresolved = Gateways::new(&set);
        let resolve = |gateway: &NetworkGateway| -> Vec<NetworkGateway> {
            if gateway.address.parse::<IpAddr>().is_ok() {
                return vec![gateway.clone()];
            }
            let known = settings.gateway_addresses.get(&gateway.address).filter(|_| settings.resolve_gateways);
            let at = |ip: &IpAddr| NetworkGateway { address: ip.to_string().into(), ..gateway.clone() };
            known.into_iter().flatten().map(at).collect()
        };
        out.gateways = Gateways::new(&set.iter().flat_map(resolve).collect());
        out
    }

    /// The network of a workload of the cluster: as its label says, the root namespace's label, MeshNetworks.
    pub(crate) fn of(&self, address: &str, labels: &Labels) -> ArcStr {
        if let Some(network) = labels.get(NETWORK).filter(|network| !network.is_empty()) {
            return network.as_str().into();
        }
        for of_cluster in [&self.of_namespace, &self.of_registry] {
            if !of_cluster.is_empty() {
                return of_cluster.clone();
            }
        }
        if self.ranges.is_empty() {
            return ArcStr::default();
        }
        let Ok(address) = address.parse::<IpAddr>() else { return ArcStr::default() };
        let own = self.ranges.iter().find(|(range, _)| range.contains(&address));
        own.map(|(_, network)| network.clone()).unwrap_or_default()
    }

    /// Gateways that are given by name, which somebody has to resolve.
    pub fn names(&self) -> BTreeSet<ArcStr> {
        let all = self.unresolved.by_network.values().flatten();
        all.filter(|gateway| gateway.address.parse::<IpAddr>().is_err())
            .map(|gateway| gateway.address.clone())
            .collect()
    }
}

/// The gateways that a Service is: for each of its addresses outside of the cluster.
fn of_service(
    snapshot: &Snapshot,
    object: &Object,
    service: &Service,
    named: &[(&str, &str, u32)],
    settings: &Settings,
) -> Vec<NetworkGateway> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let label = object.labels.get(NETWORK).filter(|network| !network.is_empty());
    // Network, port of mutual TLS, port of HBONE.
    let wanted: Vec<(&str, u32, u32)> = match label {
        Some(network) => {
            let own = object.labels.get(GATEWAY_PORT).and_then(|text| text.parse::<u16>().ok());
            let listens = |port: u16| {
                let is = |p: &k8s_openapi::api::core::v1::ServicePort| {
                    p.port == i32::from(port) && p.protocol.as_deref() != Some("UDP")
                };
                if spec.ports.iter().flatten().any(is) { u32::from(port) } else { 0 }
            };
            let ports = (listens(own.unwrap_or(PORT)), listens(HBONE_PORT));
            if ports == (0, 0) {
                tracing::debug!(service = %object.key, "labelled as a gateway, but without the gateway's port");
                return Vec::new();
            }
            vec![(network, ports.0, ports.1)]
        }
        None if named.is_empty() => return Vec::new(),
        None => {
            let host = kubernetes::hostname(&object.key.name, &object.key.namespace, settings);
            let own = named.iter().filter(|(service, ..)| *service == &*host);
            own.map(|(_, network, port)| (*network, *port, 0)).collect()
        }
    };
    if wanted.is_empty() {
        return Vec::new();
    }
    let (addresses, node_ports) = reached_at(snapshot, object, service, spec);
    let at = |address: &ArcStr| {
        let make = |(network, port, hbone): &(&str, u32, u32)| {
            let port = node_ports.get(port).copied().unwrap_or(*port);
            NetworkGateway::new(network, &settings.cluster_id, address.clone(), port, *hbone)
        };
        wanted.iter().map(make).collect::<Vec<_>>()
    };
    addresses.iter().flat_map(at).collect()
}

/// Addresses of a Service outside of the cluster, and other ports that its ports have there.
fn reached_at(
    snapshot: &Snapshot,
    object: &Object,
    service: &Service,
    spec: &ServiceSpec,
) -> (Vec<ArcStr>, HashMap<u32, u32>) {
    let kind = spec.type_.as_deref().unwrap_or_default();
    let mut addresses: Vec<ArcStr> = Vec::new();
    if kind == "LoadBalancer" {
        let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        for ingress in balancer.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten() {
            let texts = [ingress.ip.as_deref(), ingress.hostname.as_deref()];
            addresses.extend(texts.into_iter().flatten().find(|text| !text.is_empty()).map(ArcStr::from));
        }
    }
    addresses.extend(spec.external_ips.iter().flatten().map(|ip| ArcStr::from(ip.as_str())));
    let Some(selector) = object.annotations.get(NODE_SELECTOR).filter(|_| kind == "NodePort") else {
        return (addresses, HashMap::new());
    };
    let number = |port: i32| u32::try_from(port).unwrap_or_default();
    let ports = spec.ports.iter().flatten();
    let node_ports = ports.map(|p| (number(p.port), number(p.node_port.unwrap_or_default()))).collect();
    if addresses.is_empty() {
        // As istiod: a selector that is no JSON selects all.
        let selector: Labels = serde_json::from_str(selector).unwrap_or_default();
        for node in snapshot.list(Kind::Node).filter(|node| selects(&selector, &node.labels)) {
            let Body::Node(body) = &node.body else { continue };
            addresses.extend(external(body));
        }
    }
    (addresses, node_ports)
}

/// The first external address of a Node.
fn external(node: &Node) -> Option<ArcStr> {
    let mut addresses = node.status.as_ref()?.addresses.iter().flatten();
    addresses.find(|a| a.type_ == "ExternalIP" && !a.address.is_empty()).map(|a| a.address.as_str().into())
}
