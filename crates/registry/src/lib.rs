//! Services, endpoints and workloads, as the generators need them.
//!
//! In: a [`config_store::Snapshot`]: Kubernetes' Services, EndpointSlices, Pods and Nodes, and Istio's
//! ServiceEntries and WorkloadEntries. Out: [`Registry`]: [`Service`]s in order of age with their
//! [`Endpoint`]s. Never: which proxy may see what (`push-context`), Envoy types, I/O, clocks.

mod endpoint;
mod entry;
mod kubernetes;
mod locality;
mod service;
mod settings;
mod targets;

use std::collections::HashMap;
use std::sync::Arc;

use config_store::{Object, Snapshot};
use istio_api::MeshConfig;
use mesh_types::ArcStr;

pub use endpoint::{Endpoint, Health, TlsMode, Workload, canonical_service};
pub use locality::{Locality, augment_labels};
pub use service::{Port, Provider, Resolution, Service, ServiceTarget, TargetPort, TrafficDistribution};
pub use settings::{JwksMode, Settings};
pub use targets::ProxyQuery;

/// Address of a service that has none: headless services and ServiceEntries without `addresses`.
pub const UNSPECIFIED_IP: &str = "0.0.0.0";

/// All services of the mesh and where they run.
///
/// Invariant: `services` is in order of creation, then name and namespace, as istiod's
/// `SortServicesByCreationTime`; many of istiod's conflicts are decided by that order.
#[derive(Debug, Default)]
pub struct Registry {
    /// By age.
    pub services: Vec<Arc<Service>>,
    /// By host name and namespace of the service; each endpoint names its port.
    endpoints: HashMap<(ArcStr, ArcStr), Arc<[Endpoint]>>,
    /// Pods and WorkloadEntries by namespace and name; of two with one name the pod.
    by_name: HashMap<(ArcStr, ArcStr), Arc<Workload>>,
    /// The same by their first address, which several may share.
    by_address: HashMap<ArcStr, Vec<Arc<Workload>>>,
    /// Pods as read, by their object's address (which the object held beside it keeps from being used again), so
    /// that a later build need not read them again.
    pods: HashMap<usize, (Arc<Object>, Arc<Workload>)>,
}

impl Registry {
    /// Reads everything that names a service or an endpoint. Objects that make no sense are left out.
    pub fn build(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Registry {
        Registry::build_after(None, snapshot, mesh, settings)
    }

    /// As [`Registry::build`]. What equals its like in `previous` is taken from there, so that pointers tell
    /// what changed; `previous` must be of the same settings, MeshConfig and Nodes.
    pub fn build_after(
        previous: Option<&Registry>,
        snapshot: &Snapshot,
        mesh: &MeshConfig,
        settings: &Settings,
    ) -> Registry {
        let empty = HashMap::new();
        let pods = kubernetes::pods(snapshot, mesh, settings, previous.map_or(&empty, |p| &p.pods));
        let workloads: Vec<Arc<Workload>> = pods.iter().map(|(_, workload)| workload.clone()).collect();
        let mut services = kubernetes::services(snapshot, mesh, settings);
        services.extend(entry::services(snapshot, mesh, settings));
        sort_by_age(&mut services);
        service::resolve_aliases(&mut services);

        let mut endpoints = kubernetes::endpoints(snapshot, settings, &services, &workloads);
        let entry_workloads = entry::workloads(snapshot, mesh, settings);
        for (key, list) in entry::endpoints(snapshot, mesh, settings, &workloads, &entry_workloads) {
            endpoints.entry(key).or_default().extend(list);
        }
        kubernetes::select_workload_entries(&services, &entry_workloads, &mut endpoints);
        let (mut by_name, mut by_address) = (HashMap::new(), HashMap::<ArcStr, Vec<Arc<Workload>>>::new());
        for workload in workloads.into_iter().chain(entry_workloads) {
            if let Some(address) = workload.addresses.first() {
                by_address.entry(address.clone()).or_default().push(workload.clone());
            }
            by_name.entry((workload.namespace.clone(), workload.name.clone())).or_insert(workload);
        }
        let old_services: HashMap<(&str, &str, &str), &Arc<Service>> =
            previous.iter().flat_map(|p| &p.services).map(|s| (identity(s), s)).collect();
        let reuse_service = |service: Service| match old_services.get(&identity(&service)) {
            Some(old) if ***old == service => (*old).clone(),
            _ => Arc::new(service),
        };
        let reuse_endpoints = |(key, list): ((ArcStr, ArcStr), Vec<Endpoint>)| {
            let old = previous.and_then(|p| p.endpoints.get(&key)).filter(|old| ***old == *list);
            let list = old.cloned().unwrap_or_else(|| list.into());
            (key, list)
        };
        Registry {
            services: services.into_iter().map(reuse_service).collect(),
            endpoints: endpoints.into_iter().map(reuse_endpoints).collect(),
            by_name,
            by_address,
            pods: pods
                .into_iter()
                .map(|(object, workload)| (Arc::as_ptr(&object) as usize, (object, workload)))
                .collect(),
        }
    }

    /// The endpoints of a service as one list that stays the same object while nothing changes.
    pub fn endpoint_list(&self, service: &Service) -> Option<&Arc<[Endpoint]>> {
        self.endpoints.get(&(service.hostname.clone(), service.namespace.clone()))
    }

    /// Endpoints of all ports of a service, in the order their source gave.
    pub fn endpoints(&self, hostname: &str, namespace: &str) -> &[Endpoint] {
        self.endpoints.get(&(hostname.into(), namespace.into())).map_or(&[], |list| list)
    }

    /// Endpoints behind one port of a service.
    pub fn endpoints_by_port<'a>(&'a self, service: &'a Service, port: u16) -> impl Iterator<Item = &'a Endpoint> {
        let name = service.port(port).map(|p| &*p.name);
        let all = self.endpoints(&service.hostname, &service.namespace);
        all.iter().filter(move |e| name.is_some_and(|n| *n == *e.service_port_name))
    }
}

/// Tells services of one ServiceEntry apart, too: it has one for each host and address.
fn identity(service: &Service) -> (&str, &str, &str) {
    (&service.hostname, &service.namespace, &service.default_address)
}

fn sort_by_age(services: &mut [Service]) {
    services.sort_by(|a, b| {
        (a.created, &a.name, &a.namespace, &a.hostname).cmp(&(b.created, &b.name, &b.namespace, &b.hostname))
    });
}
