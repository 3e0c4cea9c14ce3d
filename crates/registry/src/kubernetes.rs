//! Services, pods and endpoints as Kubernetes knows them.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use istio_api::MeshConfig;
use istio_api::mesh_config::Visibility;
use k8s_openapi::api::core::v1::{Pod, Service as KubeService, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_types::{ArcStr, Labels, Protocol, selects};

use crate::service::TargetPort;
use crate::{
    Endpoint, Health, Locality, Networks, Port, Provider, Reader, Resolution, Service, ServiceKey, Settings, TlsMode,
    TrafficDistribution, UNSPECIFIED_IP, Workload, Workloads, augment_labels,
};

/// Endpoints by host name and namespace of their service.
pub(crate) type EndpointMap = HashMap<ServiceKey, Vec<Endpoint>>;

/// The host name of a Kubernetes service (istio `kube.ServiceHostname`).
pub(crate) fn hostname(name: &str, namespace: &str, settings: &Settings) -> ArcStr {
    format!("{name}.{namespace}.svc.{}", settings.domain).into()
}

pub(crate) fn services(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Vec<Service> {
    let (namespaces, none) = (namespace_annotations(snapshot), Labels::new());
    let list = snapshot.list(Kind::Service);
    list.filter_map(|object| match &object.body {
        Body::Service(service) => {
            let annotations = namespaces.get(&*object.key.namespace).copied().unwrap_or(&none);
            Some(convert_service(object, service, settings, trust_domain(mesh), annotations))
        }
        _ => None,
    })
    .collect()
}

/// Annotations of the namespaces, which hold for all that is in them.
fn namespace_annotations(snapshot: &Snapshot) -> HashMap<&str, &Labels> {
    snapshot.list(Kind::Namespace).map(|object| (&*object.key.name, &object.annotations)).collect()
}

fn port_number(value: i32) -> u16 {
    u16::try_from(value).unwrap_or_default()
}

fn convert_port(port: &ServicePort) -> Port {
    let number = port_number(port.port);
    let name = port.name.as_deref().unwrap_or_default();
    let transport = port.protocol.as_deref().unwrap_or("TCP");
    Port {
        name: name.into(),
        port: number,
        protocol: Protocol::of_service_port(number, name, transport, port.app_protocol.as_deref()),
        target: match &port.target_port {
            Some(IntOrString::Int(target)) if *target != 0 => TargetPort::Number(port_number(*target)),
            // A number in quotes is a name, too, which no port has.
            Some(IntOrString::String(target)) if !target.is_empty() => TargetPort::Name(target.as_str().into()),
            _ => TargetPort::Number(number),
        },
    }
}

/// istio `pilot/pkg/serviceregistry/kube/conversion.go`, `ConvertService`.
fn convert_service(
    object: &Object,
    kube: &KubeService,
    settings: &Settings,
    trust_domain: &str,
    namespace_annotations: &Labels,
) -> Service {
    let spec = kube.spec.clone().unwrap_or_default();
    let (name, namespace) = (object.key.name.clone(), object.key.namespace.clone());
    let mut resolution = Resolution::ClientSideLb;
    let external_name = spec.external_name.unwrap_or_default();
    let is_alias = spec.type_.as_deref() == Some("ExternalName") && !external_name.is_empty();
    let cluster_ip = spec.cluster_ip.unwrap_or_default();
    let mut cluster_ips: Vec<ArcStr> = Vec::new();
    if is_alias {
        resolution = Resolution::Alias;
    }
    if cluster_ip == "None" {
        resolution = Resolution::Passthrough;
    } else if !cluster_ip.is_empty() {
        let all = spec.cluster_ips.unwrap_or_default();
        cluster_ips = if all.is_empty() {
            vec![cluster_ip.as_str().into()]
        } else {
            all.iter().map(|ip| ip.as_str().into()).collect()
        };
    }
    let annotation = |key: &str| object.annotations.get(key).map(String::as_str);
    let split =
        |key: &str| annotation(key).filter(|text| !text.is_empty()).map(|text| text.split(',')).into_iter().flatten();
    let canonical = split("alpha.istio.io/canonical-serviceaccounts").map(str::to_owned);
    let kubernetes = split("alpha.istio.io/kubernetes-serviceaccounts")
        .map(|account| format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}"));
    let service_accounts = canonical.chain(kubernetes).collect();
    let traffic_distribution =
        TrafficDistribution::resolve(spec.traffic_distribution.as_deref(), &object.annotations, namespace_annotations);
    Service {
        hostname: hostname(&name, &namespace, settings),
        object_name: name.clone(),
        name,
        namespace,
        provider: Provider::Kubernetes,
        created: object.created,
        resolution,
        mesh_external: is_alias,
        ports: spec.ports.iter().flatten().map(convert_port).collect(),
        default_address: cluster_ips.first().cloned().unwrap_or_else(|| UNSPECIFIED_IP.into()),
        cluster_ips,
        labels: object.labels.clone(),
        selector: spec.selector.unwrap_or_default().into_iter().collect(),
        export_to: split("networking.istio.io/exportTo").map(|to| to.trim().into()).collect(),
        aliases: Vec::new(),
        external_name: if is_alias { external_name.as_str().into() } else { "".into() },
        service_accounts,
        traffic_distribution,
        node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        passthrough_ports: BTreeMap::new(),
        allocated: Vec::new(),
        visibility: Visibility::Public,
        races: false,
    }
}

/// All pods, those that `known` has (by their object's address) as they are there.
pub(crate) fn pods(
    reader: &Reader<'_>,
    known: &HashMap<usize, (Arc<Object>, Arc<Workload>)>,
) -> Vec<(Arc<Object>, Arc<Workload>)> {
    let nodes: HashMap<&str, &Labels> =
        reader.snapshot.list(Kind::Node).map(|node| (&*node.key.name, &node.labels)).collect();
    let mut interned = Interned::default();
    let convert = |object: &Arc<Object>| {
        if let Some((_, workload)) = known.get(&(Arc::as_ptr(object) as usize)) {
            return Some((object.clone(), workload.clone()));
        }
        let Body::Pod(pod) = &object.body else { return None };
        Some((object.clone(), Arc::new(convert_pod(object, pod.get(), &nodes, reader, &mut interned))))
    };
    reader.snapshot.list(Kind::Pod).filter_map(convert).collect()
}

/// One object for all equal labels.
#[derive(Default)]
struct Interned(HashSet<Arc<Labels>>);

impl Interned {
    fn one(&mut self, labels: Cow<'_, Labels>) -> Arc<Labels> {
        if let Some(known) = self.0.get(&*labels) {
            return known.clone();
        }
        let labels = Arc::new(labels.into_owned());
        self.0.insert(labels.clone());
        labels
    }
}

fn convert_pod(
    object: &Object,
    mut pod: Pod,
    nodes: &HashMap<&str, &Labels>,
    reader: &Reader<'_>,
    interned: &mut Interned,
) -> Workload {
    let spec = pod.spec.take().unwrap_or_default();
    let status = pod.status.take().unwrap_or_default();
    let node = spec.node_name.unwrap_or_default();
    let locality_label = Locality::label(&object.labels)
        .or_else(|| nodes.get(node.as_str()).and_then(|labels| Locality::label_of_node(labels)))
        .unwrap_or_default();
    let locality = Locality::parse(&locality_label);
    let mut addresses: Vec<ArcStr> =
        status.pod_ips.unwrap_or_default().iter().map(|ip| ip.ip.as_str().into()).collect();
    if let Some(ip) = status.pod_ip.filter(|ip| !ip.is_empty() && addresses.is_empty()) {
        addresses.push(ip.as_str().into());
    }
    let network = reader.networks.of(addresses.first().map_or("", |address| address), &object.labels);
    let account = match spec.service_account_name {
        Some(name) if !name.is_empty() => name,
        _ => "default".to_owned(),
    };
    let subdomain = spec.subdomain.unwrap_or_default();
    let hostname = match spec.hostname {
        _ if subdomain.is_empty() => String::new(),
        Some(hostname) if !hostname.is_empty() => hostname,
        _ => object.key.name.to_string(),
    };
    // Native sidecars count as containers; other init containers are over when the pod serves.
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec
        .containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|p| Some((p.protocol.as_deref(), (p.name.as_deref()?.into(), port_number(p.container_port)))));
    let of = |transport: &'static str| {
        move |(own, port): (Option<&str>, _)| (own.unwrap_or("TCP") == transport).then_some(port)
    };
    let phase = status.phase.unwrap_or_default();
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    Workload {
        workload_name: workload_name(object, &pod).into(),
        name: object.key.name.clone(),
        namespace: object.key.namespace.clone(),
        addresses,
        topology_labels: interned.one(Cow::Owned(augment_labels(
            &object.labels,
            &reader.settings.cluster_id,
            &locality,
            &node,
            &network,
        ))),
        labels: interned.one(Cow::Borrowed(&object.labels)),
        identity: format!("spiffe://{}/ns/{}/sa/{account}", trust_domain(reader.mesh), object.key.namespace),
        tls_mode: TlsMode::of_labels(&object.labels),
        locality,
        locality_label: locality_label.into(),
        network,
        node: node.as_str().into(),
        hostname: hostname.as_str().into(),
        subdomain: subdomain.as_str().into(),
        udp_ports: ports.clone().filter_map(of("UDP")).collect(),
        ports: ports.filter_map(of("TCP")).collect(),
        weight: 0,
        ready: ready && !terminating,
        is_pod: true,
        finished: matches!(phase.as_str(), "Succeeded" | "Failed"),
    }
}

/// The mesh's trust domain; `cluster.local` unless configured.
pub(crate) fn trust_domain(mesh: &MeshConfig) -> &str {
    if mesh.trust_domain.is_empty() { "cluster.local" } else { &mesh.trust_domain }
}

/// The Deployment, CronJob or other owner of a pod (istio `kube/util.go`, `GetWorkloadMetaFromPod`).
fn workload_name(object: &Object, pod: &Pod) -> String {
    if let Some(name) = object.labels.get("service.istio.io/workload-name") {
        return name.clone();
    }
    let generated = pod.metadata.generate_name.as_deref().is_some_and(|name| !name.is_empty());
    let owner = pod.metadata.owner_references.iter().flatten().find(|o| o.controller == Some(true));
    let Some(owner) = owner.filter(|o| generated && !o.name.is_empty()) else { return object.key.name.to_string() };
    let hash = |key: &str| object.labels.get(key).filter(|hash| !hash.is_empty() && owner.name.ends_with(&**hash));
    let name = match owner.kind.as_str() {
        "ReplicaSet" => match hash("pod-template-hash").or_else(|| hash("rollouts-pod-template-hash")) {
            Some(hash) => owner.name.strip_suffix(&format!("-{hash}")).unwrap_or(&owner.name),
            None => &owner.name,
        },
        "ReplicationController" => object.labels.get("deploymentconfig").unwrap_or(&owner.name),
        // A Job of a CronJob ends in the minute it was scheduled.
        "Job" => match owner.name.rsplit_once('-') {
            Some((name, digits))
                if !name.is_empty()
                    && (8..=10).contains(&digits.len())
                    && digits.bytes().all(|b| b.is_ascii_digit()) =>
            {
                name
            }
            _ => &owner.name,
        },
        _ => &owner.name,
    };
    name.to_owned()
}

/// The service that an EndpointSlice is of.
pub(crate) fn service_of(slice: &Object, settings: &Settings) -> Option<ServiceKey> {
    let name = slice.labels.get("kubernetes.io/service-name").filter(|name| !name.is_empty())?;
    let namespace = &slice.key.namespace;
    Some((hostname(name, namespace, settings), namespace.clone()))
}

/// Endpoints from EndpointSlices of the services that are wanted. `own` are Kubernetes' services.
pub(crate) fn endpoints<'a>(
    snapshot: &Snapshot,
    settings: &Settings,
    networks: &Networks,
    wanted: impl Fn(&ServiceKey) -> bool,
    own: impl Fn(&ServiceKey) -> Option<&'a Service>,
    workloads: &Workloads,
) -> EndpointMap {
    let find = |namespace: &str, pod: Option<(&str, &str)>, address: &str| match pod {
        Some((namespace, name)) => workloads.pod(namespace, name),
        None => workloads.pod_at(namespace, address),
    };
    let mut out = EndpointMap::new();
    // Of addresses that are no pod's.
    let mut bare: HashMap<ArcStr, Arc<Labels>> = HashMap::new();
    let mut stranger = |address: &str| {
        let none = Labels::new();
        let network = networks.of(address, &none);
        let labels = bare.entry(network.clone()).or_insert_with(|| {
            Arc::new(augment_labels(&none, &settings.cluster_id, &Locality::default(), "", &network))
        });
        Arc::new(Workload { topology_labels: labels.clone(), network, ..Workload::default() })
    };
    for object in snapshot.list(Kind::EndpointSlice) {
        let Body::EndpointSlice(slice) = &object.body else { continue };
        let Some(key) = service_of(object, settings).filter(&wanted) else { continue };
        let service = own(&key);
        // As istiod's `serviceNeedsPush`: nobody can send to what is exported to nobody.
        if service.is_some_and(|service| service.export_to.iter().any(|to| &**to == "~")) {
            continue;
        }
        let how = Slices {
            namespace: &object.key.namespace,
            sticky: service.is_some_and(|service| service.keeps_draining(settings)),
            both_families: settings.dual_stack && service.is_some_and(|service| service.cluster_ips.len() > 1),
        };
        add_slice(slice, &how, out.entry(key).or_default(), &find, &mut stranger);
    }
    out
}

/// Where a pod listens for a service port; nothing if no container names the port, or it does for another transport.
pub(crate) fn target_port(port: &Port, workload: &Workload) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) if port.protocol == Protocol::Udp => {
            workload.udp_ports.iter().find(|(own, _)| own == name).map(|(_, port)| *port)
        }
        TargetPort::Name(name) => workload.port(name),
    }
}

/// How the slices of a service are read.
struct Slices<'a> {
    namespace: &'a str,
    /// Endpoints that shut down are kept for those who know them.
    sticky: bool,
    /// A pod of both address families is one endpoint.
    both_families: bool,
}

fn add_slice<'a>(
    slice: &EndpointSlice,
    how: &Slices<'_>,
    list: &mut Vec<Endpoint>,
    find: &impl Fn(&str, Option<(&str, &str)>, &str) -> Option<&'a Arc<Workload>>,
    stranger: &mut impl FnMut(&str) -> Arc<Workload>,
) {
    if slice.address_type == "FQDN" {
        return;
    }
    let &Slices { namespace, sticky, both_families } = how;
    for entry in slice.endpoints.iter().flatten() {
        // As istiod `endpointHealthStatus`: what is not ready and does not say that it stays is going.
        let conditions = entry.conditions.clone().unwrap_or_default();
        let terminating = conditions.terminating.unwrap_or(true);
        let health = match conditions.ready.unwrap_or(true) {
            true => Health::Healthy,
            false if sticky && terminating && conditions.serving.unwrap_or(true) => Health::Draining,
            false if terminating => Health::Terminating,
            false => Health::Unhealthy,
        };
        let target = entry.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"));
        let pod_name =
            target.map(|t| (t.namespace.as_deref().unwrap_or(namespace), t.name.as_deref().unwrap_or_default()));
        for address in &entry.addresses {
            let found = find(namespace, pod_name, address);
            if found.is_none() && pod_name.is_some() {
                // The pod is not known yet; the endpoint appears together with it.
                continue;
            }
            let workload = found.cloned().unwrap_or_else(|| stranger(address));
            let whole = (both_families && pod_name.is_some() && workload.addresses.len() > 1)
                .then(|| workload.addresses.clone());
            if whole.is_some() && slice.address_type == "IPv6" {
                // The pod's endpoint stands in the slice of the other family.
                continue;
            }
            for port in slice.ports.iter().flatten() {
                let port_name: ArcStr = port.name.as_deref().unwrap_or_default().into();
                let number = port.port.map(port_number).unwrap_or_default();
                let addresses = match &whole {
                    Some(all) => all.clone(),
                    None => vec![address.as_str().into()],
                };
                list.push(Endpoint {
                    addresses,
                    port: number,
                    service_port_name: port_name,
                    service_port: 0,
                    workload: workload.clone(),
                    weight: 0,
                    health,
                });
            }
        }
    }
}

/// Adds WorkloadEntries that the selector of a Kubernetes service matches.
pub(crate) fn select_workload_entries(services: &[Service], entries: &[Arc<Workload>], endpoints: &mut EndpointMap) {
    if entries.is_empty() {
        return;
    }
    let selecting = services.iter().filter(|s| {
        s.provider == Provider::Kubernetes && s.resolution == Resolution::ClientSideLb && !s.selector.is_empty()
    });
    for service in selecting {
        let matching = entries.iter().filter(|w| {
            w.namespace == service.namespace && w.has_ip_only() && selects(&service.selector, &w.topology_labels)
        });
        for (entry, port) in matching.flat_map(|entry| service.ports.iter().map(move |port| (entry, port))) {
            let Some(number) = entry_port(port, entry) else { continue };
            let key = (service.hostname.clone(), service.namespace.clone());
            endpoints.entry(key).or_default().push(Endpoint {
                addresses: entry.addresses.clone(),
                port: number,
                service_port_name: port.name.clone(),
                service_port: 0,
                workload: entry.clone(),
                weight: entry.weight,
                health: Health::Unknown,
            });
        }
    }
}

/// Where a WorkloadEntry listens for a port of a Kubernetes service: as its `ports` say by the service port's name,
/// or by the target port's, which must then be there.
pub(crate) fn entry_port(port: &Port, entry: &Workload) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(entry.port(&port.name).filter(|p| *p != 0).unwrap_or(*number)),
        TargetPort::Name(name) => entry.port(name).filter(|p| *p != 0),
    }
}
