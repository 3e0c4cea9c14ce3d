//! Services, workloads and endpoints of ServiceEntries and WorkloadEntries.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use istio_api::MeshConfig;
use istio_api::mesh_config::Visibility;
use istio_api::service_entry::{Location, Resolution as EntryResolution, ServiceEntry, ServicePort};
use istio_api::workload_entry::WorkloadEntry;
use mesh_types::{ArcStr, Labels, Protocol, selects};

use crate::kubernetes::{EndpointMap, trust_domain};
use crate::service::TargetPort;
use crate::{
    CANONICAL_NAME, CANONICAL_REVISION, Endpoint, Health, Locality, Port, Provider, Reader, Resolution, Service,
    Settings, TlsMode, TrafficDistribution, UNSPECIFIED_IP, Workload, augment_labels, canonical_service,
};

fn entries(snapshot: &Snapshot) -> impl Iterator<Item = (&Object, &ServiceEntry)> {
    snapshot.list(Kind::ServiceEntry).filter_map(|object| match &object.body {
        Body::ServiceEntry(entry) => Some((&**object, &**entry)),
        _ => None,
    })
}

/// One service for each host and address (istio `serviceentry/conversion.go`, `convertServices`).
pub(crate) fn services(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Vec<Service> {
    let none = Labels::new();
    let rules = mesh.service_entry_visibility.as_ref().filter(|rules| rules.apply_to_sidecars);
    let convert = |(object, entry): (&Object, &ServiceEntry)| {
        let namespace = snapshot.find(Kind::Namespace, "", &object.key.namespace);
        let visibility = match rules.map(|rules| rules.of_namespace(namespace.map_or(&none, |n| &n.labels))) {
            Some(narrow @ (Visibility::None | Visibility::Namespace)) => narrow,
            _ => Visibility::Public,
        };
        let services = convert(object, entry, namespace.map_or(&none, |n| &n.annotations), settings);
        services.into_iter().map(move |service| Service { visibility, ..service })
    };
    entries(snapshot).flat_map(convert).collect()
}

fn number(value: u32) -> u16 {
    u16::try_from(value).unwrap_or_default()
}

fn convert_port(port: &ServicePort) -> Port {
    let target = if port.target_port != 0 { port.target_port } else { port.number };
    Port {
        name: port.name.as_str().into(),
        port: number(port.number),
        protocol: Protocol::parse(&port.protocol),
        target: TargetPort::Number(number(target)),
    }
}

fn resolution(entry: &ServiceEntry) -> Resolution {
    match entry.resolution {
        EntryResolution::None => Resolution::Passthrough,
        EntryResolution::Static => Resolution::ClientSideLb,
        EntryResolution::Dns => Resolution::DnsLb,
        EntryResolution::DnsRoundRobin => Resolution::DnsRoundRobinLb,
        EntryResolution::DynamicDns => Resolution::DynamicDns,
    }
}

/// An IP address as it is; a range as it is unless it holds one address; nothing for other text.
fn listen_address(text: &str) -> Option<ArcStr> {
    if text.parse::<IpAddr>().is_ok() {
        return Some(text.into());
    }
    let (ip, bits) = text.split_once('/')?;
    let (ip, bits) = (ip.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?);
    let full = if ip.is_ipv4() { 32 } else { 128 };
    match bits {
        bits if bits > full => None,
        bits if bits == full => Some(ip.to_string().into()),
        _ => Some(text.into()),
    }
}

fn convert(object: &Object, entry: &ServiceEntry, of_namespace: &Labels, settings: &Settings) -> Vec<Service> {
    let resolution = resolution(entry);
    let addresses: Vec<ArcStr> = if entry.addresses.is_empty() {
        vec![UNSPECIFIED_IP.into()]
    } else {
        entry.addresses.iter().filter_map(|a| listen_address(a)).collect()
    };
    let passthrough_ports: BTreeMap<u16, u16> = entry
        .ports
        .iter()
        .filter(|p| resolution == Resolution::Passthrough && p.target_port != 0)
        .map(|p| (number(p.number), number(p.target_port)))
        .collect();
    let traffic_distribution = TrafficDistribution::resolve(None, &object.annotations, of_namespace);
    let strategy = object.annotations.get("istio.io/connect-strategy");
    let races = strategy.is_some_and(|text| text.eq_ignore_ascii_case("RACE_FIRST_TCP_CONNECT"));
    // As istiod `ShouldV2AutoAllocateIP`.
    let refused = object.labels.get("networking.istio.io/enable-autoallocate-ip");
    let may_allocate = settings.auto_allocate
        && entry.addresses.is_empty()
        && resolution != Resolution::Passthrough
        && !refused.is_some_and(|text| text.eq_ignore_ascii_case("false"));
    let allocated_to = |host: &String| {
        let own = |v4: bool| {
            let mut of_host = object.allocated.iter().filter(|(name, ip)| **name == **host && ip.is_ipv4() == v4);
            of_host.next_back().map(|(_, ip)| ArcStr::from(ip.to_string()))
        };
        let own: Vec<ArcStr> = own(true).into_iter().chain(own(false)).collect();
        if may_allocate { own } else { Vec::new() }
    };
    let mut labels = object.labels.clone();
    if settings.external_canonical && entry.location == Location::MeshExternal {
        let (name, revision) = canonical_service(&object.labels, &object.key.name);
        labels.insert(CANONICAL_NAME.to_owned(), name.to_owned());
        labels.insert(CANONICAL_REVISION.to_owned(), revision.to_owned());
    }
    let make = |host: &String, address: &ArcStr| Service {
        hostname: host.as_str().into(),
        name: host.as_str().into(),
        namespace: object.key.namespace.clone(),
        object_name: object.key.name.clone(),
        provider: Provider::External,
        created: object.created,
        resolution,
        mesh_external: entry.location == Location::MeshExternal,
        ports: entry.ports.iter().map(convert_port).collect(),
        cluster_ips: Vec::new(),
        default_address: address.clone(),
        labels: labels.clone(),
        selector: entry.workload_selector.as_ref().map(|s| s.labels.clone()).unwrap_or_default(),
        export_to: entry.export_to.iter().map(|e| e.as_str().into()).collect(),
        aliases: Vec::new(),
        external_name: "".into(),
        service_accounts: entry.subject_alt_names.clone(),
        traffic_distribution,
        node_local: false,
        publish_not_ready: false,
        passthrough_ports: passthrough_ports.clone(),
        allocated: allocated_to(host),
        visibility: Visibility::Public,
        races,
    };
    entry.hosts.iter().flat_map(|host| addresses.iter().map(move |a| (host, a))).map(|(h, a)| make(h, a)).collect()
}

fn convert_workload(
    name: &str,
    namespace: &ArcStr,
    entry: &WorkloadEntry,
    object: Option<&Object>,
    reader: &Reader<'_>,
) -> Workload {
    let mut labels: Labels = entry.labels.clone();
    labels.extend(object.into_iter().flat_map(|o| o.labels.clone()));
    let locality_label = match entry.locality.as_str() {
        "" => Locality::label(&labels).unwrap_or_default(),
        text => text.to_owned(),
    };
    let locality = Locality::parse(&locality_label);
    // Of an auto-registered machine the group is what created it.
    let own_name = object.and_then(|o| {
        o.annotations.get("istio.io/autoRegistrationGroup").or_else(|| o.labels.get("service.istio.io/workload-name"))
    });
    let tls_mode = match labels.contains_key("security.istio.io/tlsMode") {
        true => TlsMode::of_labels(&labels),
        false if !entry.service_account.is_empty() => TlsMode::Istio,
        false => TlsMode::Disabled,
    };
    // As istiod: the mesh's networks say what is preferred, but not which gateways lead there.
    let near = match entry.network.as_str() {
        "" => reader.networks.of(&entry.address, &labels),
        own => own.into(),
    };
    let identity = if entry.service_account.is_empty() {
        String::new()
    } else {
        format!("spiffe://{}/ns/{namespace}/sa/{}", trust_domain(reader.mesh), entry.service_account)
    };
    Workload {
        name: name.into(),
        workload_name: own_name.map_or(name, String::as_str).into(),
        namespace: namespace.clone(),
        addresses: if entry.address.is_empty() { Vec::new() } else { vec![entry.address.as_str().into()] },
        topology_labels: augment_labels(&labels, &reader.settings.cluster_id, &locality, "", &near).into(),
        labels: labels.into(),
        identity,
        tls_mode,
        locality,
        locality_label: locality_label.into(),
        network: entry.network.as_str().into(),
        ports: entry.ports.iter().map(|(name, port)| (name.as_str().into(), number(*port))).collect(),
        weight: entry.weight,
        ready: true,
        ..Workload::default()
    }
}

/// Whether a WorkloadEntry counts: with health checks on, not before its agent said that it is well.
///
/// Source: istio `pilot/pkg/serviceregistry/serviceentry/controller.go`, `isHealthy`.
fn is_healthy(object: &Object) -> bool {
    let checked = object.annotations.get("proxy.istio.io/health-checks-enabled");
    let checked = checked.is_some_and(|value| matches!(value.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"));
    !checked || object.healthy == Some(true)
}

/// All WorkloadEntry objects that are to be used.
pub(crate) fn workloads(reader: &Reader<'_>) -> Vec<Arc<Workload>> {
    let list = reader.snapshot.list(Kind::WorkloadEntry).filter(|object| is_healthy(object));
    list.filter_map(|object| match &object.body {
        Body::WorkloadEntry(entry) => {
            Some(Arc::new(convert_workload(&object.key.name, &object.key.namespace, entry, Some(object), reader)))
        }
        _ => None,
    })
    .collect()
}

/// Endpoints written in ServiceEntries, picked by their selector, or the host itself for DNS.
pub(crate) fn endpoints(
    reader: &Reader<'_>,
    pods: &[(Arc<Object>, Arc<Workload>)],
    workload_entries: &[Arc<Workload>],
) -> EndpointMap {
    let (mut out, snapshot) = (EndpointMap::new(), reader.snapshot);
    let mut by_namespace: HashMap<&ArcStr, Vec<&Arc<Workload>>> = HashMap::new();
    if entries(snapshot).any(|(_, entry)| entry.workload_selector.is_some()) {
        let selectable = if reader.settings.entries_select_pods { pods } else { &[] };
        let pods = selectable.iter().map(|(_, pod)| pod).filter(|w| w.ready && !w.finished);
        for workload in pods.chain(workload_entries).filter(|w| !w.addresses.is_empty()) {
            by_namespace.entry(&workload.namespace).or_default().push(workload);
        }
    }
    // Ports of names that the proxies resolve and that have one place only: the first entry's holds.
    let mut taken: HashSet<(ArcStr, ArcStr, u32)> = HashSet::new();
    let mut all: Vec<(&Object, &ServiceEntry)> = entries(snapshot).collect();
    all.sort_by_key(|(object, _)| (object.created, object.key.namespace.clone(), object.key.name.clone()));
    for (object, entry) in all {
        let namespace = &object.key.namespace;
        let resolution = resolution(entry);
        let by_name = matches!(resolution, Resolution::DnsLb | Resolution::DnsRoundRobinLb);
        let list: Vec<Arc<Workload>> = match entry.workload_selector.as_ref() {
            None => {
                let convert = |(i, e): (usize, &WorkloadEntry)| {
                    let name = format!("{}-{i}", object.key.name);
                    Arc::new(convert_workload(&name, namespace, e, None, reader))
                };
                entry.endpoints.iter().enumerate().map(convert).collect()
            }
            Some(selector) => {
                let chosen =
                    |w: &&&Arc<Workload>| selects(&selector.labels, &w.topology_labels) && (by_name || w.has_ip_only());
                let own = by_namespace.get(namespace).into_iter().flatten();
                let mut found: Vec<_> = own.filter(chosen).map(|w| (*w).clone()).collect();
                found.sort_by_key(|w| (!w.is_pod, w.name.clone()));
                found
            }
        };
        let itself = entry.endpoints.is_empty() && entry.workload_selector.is_none() && by_name;
        for host in &entry.hosts {
            let key = (ArcStr::from(host.as_str()), namespace.clone());
            let made = out.entry(key.clone()).or_default();
            for port in &entry.ports {
                // As istiod: a service of several addresses reports its endpoints once for each.
                let mut of_port = Vec::new();
                for _ in 0..entry.addresses.len().max(1) {
                    of_port.extend(list.iter().map(|w| entry_endpoint(w, port)));
                    if itself {
                        of_port.push(host_endpoint(object, host, port));
                    }
                }
                if resolution == Resolution::DnsRoundRobinLb {
                    if !taken.insert((key.0.clone(), key.1.clone(), port.number)) {
                        continue;
                    }
                    of_port.truncate(1);
                }
                made.extend(of_port);
            }
        }
    }
    out
}

/// The host of an entry that names no endpoints.
fn host_endpoint(object: &Object, host: &str, port: &ServicePort) -> Endpoint {
    Endpoint {
        addresses: vec![host.into()],
        port: number(if port.target_port != 0 { port.target_port } else { port.number }),
        service_port_name: port.name.as_str().into(),
        service_port: number(port.number),
        workload: Arc::new(Workload {
            workload_name: object.key.name.clone(),
            namespace: object.key.namespace.clone(),
            ..Workload::default()
        }),
        weight: 0,
        health: Health::Unknown,
    }
}

fn entry_endpoint(workload: &Arc<Workload>, port: &ServicePort) -> Endpoint {
    let unix = workload.addresses.first().is_some_and(|a| a.starts_with("unix://"));
    let named = workload.port(&port.name).filter(|p| *p > 0);
    Endpoint {
        addresses: workload.addresses.iter().map(|a| a.strip_prefix("unix://").unwrap_or(a).into()).collect(),
        port: match named {
            _ if unix => 0,
            Some(named) => named,
            None if port.target_port != 0 => number(port.target_port),
            None => number(port.number),
        },
        service_port_name: port.name.as_str().into(),
        service_port: number(port.number),
        workload: workload.clone(),
        weight: workload.weight,
        health: if workload.is_pod { Health::Healthy } else { Health::Unknown },
    }
}
