//! Services and their endpoints, worked out from Service objects and pods. Pure: equal input, equal output.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use netns::nft::L4;
use serde_json::{Value, json};

use crate::network::rules::Translation;

/// What of a pod concerns services.
pub(crate) struct PodView<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) ips: &'a [IpAddr],
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
}

/// An endpoint that does not come from a pod: written by the user, or the control plane itself.
#[derive(Clone, Debug)]
pub(crate) struct External {
    pub(crate) ip: IpAddr,
    /// By port name (`""` for the unnamed one).
    pub(crate) ports: BTreeMap<String, u16>,
    pub(crate) ready: bool,
}

/// One service with all that DNS, translation and EndpointSlices need.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ServiceView {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Empty for headless and ExternalName services.
    pub(crate) cluster_ips: Vec<IpAddr>,
    pub(crate) external_name: Option<String>,
    pub(crate) publish_not_ready: bool,
    pub(crate) ports: Vec<PortView>,
    pub(crate) endpoints: Vec<EndpointView>,
    /// Whether a selector made the endpoints, so that EndpointSlices must be written.
    pub(crate) selected: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PortView {
    pub(crate) name: String,
    pub(crate) port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub(crate) protocol: String,
    pub(crate) app_protocol: Option<String>,
}

impl PortView {
    fn l4(&self) -> Option<L4> {
        match self.protocol.as_str() {
            "TCP" => Some(L4::Tcp),
            "UDP" => Some(L4::Udp),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EndpointView {
    pub(crate) ips: Vec<IpAddr>,
    /// Name of the pod; empty for foreign endpoints.
    pub(crate) pod: String,
    pub(crate) pod_uid: String,
    /// Set when the endpoint has a name of its own below the service (`spec.subdomain`).
    pub(crate) hostname: Option<String>,
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
    /// The target port for each port of the service; `None` when the pod does not have the named port.
    pub(crate) ports: Vec<Option<u16>>,
}

/// Works out one service. `cluster_ips` are those assigned to it.
pub(crate) fn view(
    service: &Service,
    cluster_ips: &[IpAddr],
    pods: &[PodView<'_>],
    external: &[External],
) -> ServiceView {
    let namespace = service.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = service.metadata.name.clone().unwrap_or_default();
    let spec = service.spec.clone().unwrap_or_default();
    let ports: Vec<PortView> = spec
        .ports
        .iter()
        .flatten()
        .map(|port| PortView {
            name: port.name.clone().unwrap_or_default(),
            port: u16::try_from(port.port).unwrap_or(0),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    let external_name =
        (spec.type_.as_deref() == Some("ExternalName")).then(|| spec.external_name.clone().unwrap_or_default());
    let selector = spec.selector.filter(|selector| !selector.is_empty() && external_name.is_none());
    let mut endpoints: Vec<EndpointView> = match &selector {
        None => external
            .iter()
            .map(|one| EndpointView {
                ips: vec![one.ip],
                pod: String::new(),
                pod_uid: String::new(),
                hostname: None,
                ready: one.ready,
                terminating: false,
                ports: ports.iter().map(|port| one.ports.get(&port.name).copied()).collect(),
            })
            .collect(),
        Some(selector) => pods
            .iter()
            .filter(|view| view.pod.metadata.namespace.as_deref().unwrap_or("default") == namespace)
            .filter(|view| {
                let labels = view.pod.metadata.labels.as_ref();
                selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
            })
            .map(|view| {
                let targets = spec.ports.iter().flatten().map(|port| {
                    let target = port.target_port.clone().unwrap_or(IntOrString::Int(port.port));
                    target_port(view.pod, &target, port.protocol.as_deref().unwrap_or("TCP"))
                });
                let pod_spec = view.pod.spec.as_ref();
                let subdomain = pod_spec.and_then(|s| s.subdomain.as_deref());
                EndpointView {
                    ips: view.ips.to_vec(),
                    pod: view.pod.metadata.name.clone().unwrap_or_default(),
                    pod_uid: view.pod.metadata.uid.clone().unwrap_or_default(),
                    hostname: pod_spec.and_then(|s| s.hostname.clone()).filter(|_| subdomain == Some(name.as_str())),
                    ready: view.ready,
                    terminating: view.terminating,
                    ports: targets.collect(),
                }
            })
            .collect(),
    };
    endpoints.sort_by(|a, b| a.ips.cmp(&b.ips));
    ServiceView {
        namespace,
        name,
        cluster_ips: cluster_ips.to_vec(),
        external_name,
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        ports,
        endpoints,
        selected: selector.is_some(),
    }
}

/// The number of a target port in a pod: as `pkg/api/v1/pod` `FindPort`, sidecars included.
fn target_port(pod: &Pod, target: &IntOrString, protocol: &str) -> Option<u16> {
    match target {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => {
            if let Ok(number) = name.parse() {
                return Some(number);
            }
            let spec = pod.spec.as_ref()?;
            let sidecars =
                spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|container| container.ports.iter().flatten())
                .find(|port| {
                    port.name.as_deref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == protocol
                })
                .and_then(|port| u16::try_from(port.container_port).ok())
        }
    }
}

impl ServiceView {
    /// Endpoints that get traffic.
    pub(crate) fn serving(&self) -> impl Iterator<Item = &EndpointView> {
        self.endpoints.iter().filter(|e| self.publish_not_ready || (e.ready && !e.terminating))
    }

    /// The rules of its cluster addresses.
    pub(crate) fn translations(&self) -> Vec<Translation> {
        let mut out = Vec::new();
        for ip in &self.cluster_ips {
            for (index, port) in self.ports.iter().enumerate() {
                let Some(protocol) = port.l4() else { continue };
                let to = self
                    .serving()
                    .filter_map(|endpoint| {
                        let target = endpoint.ports.get(index).copied().flatten()?;
                        let own = endpoint.ips.iter().find(|candidate| candidate.is_ipv4() == ip.is_ipv4())?;
                        Some(SocketAddr::new(*own, target))
                    })
                    .collect();
                let service = format!("{}/{}:{}", self.namespace, self.name, port.port);
                out.push(Translation { from: SocketAddr::new(*ip, port.port), protocol, to, service });
            }
        }
        out
    }

    /// EndpointSlices as kube-controller-manager's endpointslice controller writes them: one per address family and set of ports.
    pub(crate) fn slices(&self) -> Vec<Value> {
        if !self.selected {
            return Vec::new();
        }
        // Endpoints whose named ports differ go to different slices.
        let mut groups: BTreeMap<(bool, Vec<Option<u16>>), Vec<Value>> = BTreeMap::new();
        for endpoint in &self.endpoints {
            for ip in &endpoint.ips {
                let ready = endpoint.ready && !endpoint.terminating;
                let mut value = json!({
                    "addresses": [ip.to_string()],
                    "conditions": {
                        "ready": ready || self.publish_not_ready,
                        "serving": endpoint.ready,
                        "terminating": endpoint.terminating,
                    },
                    "nodeName": crate::NODE_NAME,
                    "targetRef": {"kind": "Pod", "namespace": self.namespace, "name": endpoint.pod, "uid": endpoint.pod_uid},
                });
                if let Some(hostname) = &endpoint.hostname {
                    value["hostname"] = json!(hostname);
                }
                groups.entry((ip.is_ipv6(), endpoint.ports.clone())).or_default().push(value);
            }
        }
        if groups.is_empty() {
            // A service without endpoints has an empty slice, so that its former endpoints go.
            groups.insert((false, vec![None; self.ports.len()]), Vec::new());
        }
        groups
            .into_iter()
            .enumerate()
            .map(|(index, ((v6, targets), endpoints))| {
                let ports: Vec<Value> = self
                    .ports
                    .iter()
                    .zip(&targets)
                    .filter_map(|(port, target)| {
                        let mut value = json!({"name": port.name, "protocol": port.protocol, "port": (*target)?});
                        if let Some(app) = &port.app_protocol {
                            value["appProtocol"] = json!(app);
                        }
                        Some(value)
                    })
                    .collect();
                json!({
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": format!("{}-{index}", self.name),
                        "namespace": self.namespace,
                        "labels": {
                            "kubernetes.io/service-name": self.name,
                            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                        },
                    },
                    "addressType": if v6 { "IPv6" } else { "IPv4" },
                    "endpoints": endpoints,
                    "ports": ports,
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(text: &str) -> Service {
        manifest::parse(std::path::Path::new("t.yaml"), text).unwrap()[0].decode().unwrap()
    }

    fn pod(name: &str, port: u16) -> Pod {
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
        }))
        .unwrap()
    }

    #[test]
    fn named_target_ports_differ_by_pod_and_only_ready_pods_serve() {
        let service = service(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{name: http, port: 80, targetPort: http}]",
        );
        let (a, b, c) = (pod("a", 8080), pod("b", 9090), pod("c", 8080));
        let ips: Vec<IpAddr> = (2..5).map(|n| format!("10.244.0.{n}").parse().unwrap()).collect();
        let pods = [
            PodView { pod: &a, ips: &ips[0..1], ready: true, terminating: false },
            PodView { pod: &b, ips: &ips[1..2], ready: true, terminating: false },
            PodView { pod: &c, ips: &ips[2..3], ready: false, terminating: false },
        ];
        let view = view(&service, &["10.96.0.9".parse().unwrap()], &pods, &[]);
        let translations = view.translations();
        assert_eq!(translations.len(), 1);
        assert_eq!(translations[0].to, ["10.244.0.2:8080".parse().unwrap(), "10.244.0.3:9090".parse().unwrap()]);
        let slices = view.slices();
        assert_eq!(slices.len(), 2);
        assert_eq!(slices[0]["endpoints"][1]["conditions"]["ready"], json!(false));
        assert_eq!(slices[1]["ports"][0]["port"], json!(9090));
    }
}
