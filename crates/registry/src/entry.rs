//! Services, workloads and endpoints of ServiceEntries and WorkloadEntries.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use istio_api::MeshConfig;
use istio_api::service_entry::{Location, Resolution as EntryResolution, ServiceEntry, ServicePort};
use istio_api::workload_entry::WorkloadEntry;
use mesh_types::{ArcStr, Labels, Protocol, selects};

use crate::kubernetes::{EndpointMap, trust_domain};
use crate::service::TargetPort;
use crate::{
    Endpoint, Health, Locality, Port, Provider, Resolution, Service, Settings, TlsMode, TrafficDistribution,
    UNSPECIFIED_IP, Workload, augment_labels,
};

fn entries(snapshot: &Snapshot) -> impl Iterator<Item = (&Object, &ServiceEntry)> {
    snapshot.list(Kind::ServiceEntry).filter_map(|object| match &object.body {
        Body::ServiceEntry(entry) => Some((&**object, &**entry)),
        _ => None,
    })
}

/// One service for each host and address (istio `serviceentry/conversion.go`, `convertServices`).
pub(crate) fn services(snapshot: &Snapshot) -> Vec<Service> {
    entries(snapshot).flat_map(|(object, entry)| convert(object, entry)).collect()
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

fn convert(object: &Object, entry: &ServiceEntry) -> Vec<Service> {
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
    let traffic_distribution =
        match object.annotations.get("networking.istio.io/traffic-distribution").map(String::as_str) {
            Some("PreferClose" | "PreferSameZone") => TrafficDistribution::PreferSameZone,
            Some("PreferSameNode") => TrafficDistribution::PreferSameNode,
            _ => TrafficDistribution::Any,
        };
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
        labels: object.labels.clone(),
        selector: entry.workload_selector.as_ref().map(|s| s.labels.clone()).unwrap_or_default(),
        export_to: entry.export_to.iter().map(|e| e.as_str().into()).collect(),
        aliases: Vec::new(),
        external_name: "".into(),
        service_accounts: entry.subject_alt_names.clone(),
        traffic_distribution,
        node_local: false,
        publish_not_ready: false,
        passthrough_ports: passthrough_ports.clone(),
    };
    entry.hosts.iter().flat_map(|host| addresses.iter().map(move |a| (host, a))).map(|(h, a)| make(h, a)).collect()
}

fn convert_workload(
    name: &str,
    namespace: &ArcStr,
    entry: &WorkloadEntry,
    more_labels: &Labels,
    mesh: &MeshConfig,
    settings: &Settings,
) -> Workload {
    let mut labels: Labels = more_labels.clone();
    labels.extend(entry.labels.clone());
    let locality = if entry.locality.is_empty() {
        Locality::of_label(&labels).unwrap_or_default()
    } else {
        Locality::parse(&entry.locality)
    };
    let tls_mode = match labels.contains_key("security.istio.io/tlsMode") {
        true => TlsMode::of_labels(&labels),
        false if !entry.service_account.is_empty() => TlsMode::Istio,
        false => TlsMode::Disabled,
    };
    let network: ArcStr =
        if entry.network.is_empty() { settings.network.clone() } else { entry.network.as_str().into() };
    let identity = if entry.service_account.is_empty() {
        String::new()
    } else {
        format!("spiffe://{}/ns/{namespace}/sa/{}", trust_domain(mesh), entry.service_account)
    };
    Workload {
        name: name.into(),
        workload_name: name.into(),
        namespace: namespace.clone(),
        addresses: if entry.address.is_empty() { Vec::new() } else { vec![entry.address.as_str().into()] },
        topology_labels: augment_labels(&labels, &settings.cluster_id, &locality, "", &network),
        labels,
        identity,
        tls_mode,
        locality,
        network,
        ports: entry.ports.iter().map(|(name, port)| (name.as_str().into(), number(*port))).collect(),
        weight: entry.weight,
        ready: true,
        ..Workload::default()
    }
}

/// All WorkloadEntry objects.
pub(crate) fn workloads(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Vec<Arc<Workload>> {
    let list = snapshot.list(Kind::WorkloadEntry);
    list.filter_map(|object| match &object.body {
        Body::WorkloadEntry(entry) => Some(Arc::new(convert_workload(
            &object.key.name,
            &object.key.namespace,
            entry,
            &object.labels,
            mesh,
            settings,
        ))),
        _ => None,
    })
    .collect()
}

/// Endpoints written in ServiceEntries, picked by their selector, or the host itself for DNS.
pub(crate) fn endpoints(
    snapshot: &Snapshot,
    mesh: &MeshConfig,
    settings: &Settings,
    pods: &[Arc<Workload>],
    workload_entries: &[Arc<Workload>],
) -> EndpointMap {
    let mut out = EndpointMap::new();
    for (object, entry) in entries(snapshot) {
        let namespace = &object.key.namespace;
        let resolution = resolution(entry);
        let selector = entry.workload_selector.as_ref().map(|s| &s.labels);
        let mut list: Vec<Arc<Workload>> = entry
            .endpoints
            .iter()
            .enumerate()
            .map(|(i, e)| {
                let name = format!("{}-{i}", object.key.name);
                Arc::new(convert_workload(&name, namespace, e, &Labels::new(), mesh, settings))
            })
            .collect();
        if let Some(selector) = selector {
            let chosen = |w: &&Arc<Workload>| {
                w.namespace == *namespace && !w.finished && !w.addresses.is_empty() && selects(selector, &w.labels)
            };
            // Names decide nothing for DNS: a pod has no name to resolve.
            let pods = pods.iter().filter(|w| w.ready && !resolution.is_dns());
            list.extend(workload_entries.iter().chain(pods).filter(chosen).cloned());
        }
        for host in &entry.hosts {
            let key = (ArcStr::from(host.as_str()), namespace.clone());
            if out.contains_key(&key) {
                continue;
            }
            let itself = entry.endpoints.is_empty() && selector.is_none() && resolution.is_dns();
            let mut made = Vec::new();
            for port in &entry.ports {
                if itself {
                    made.push(Endpoint {
                        addresses: vec![host.as_str().into()],
                        port: number(if port.target_port != 0 { port.target_port } else { port.number }),
                        service_port_name: port.name.as_str().into(),
                        workload: Arc::new(Workload {
                            workload_name: object.key.name.clone(),
                            namespace: namespace.clone(),
                            ..Workload::default()
                        }),
                        weight: 0,
                        health: Health::Unknown,
                    });
                }
                // As istiod: a service of several addresses reports its endpoints once for each.
                for _ in 0..entry.addresses.len().max(1) {
                    made.extend(list.iter().map(|w| entry_endpoint(w, port)));
                }
            }
            out.insert(key, made);
        }
    }
    out
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
        workload: workload.clone(),
        weight: workload.weight,
        health: if workload.is_pod { Health::Healthy } else { Health::Unknown },
    }
}
