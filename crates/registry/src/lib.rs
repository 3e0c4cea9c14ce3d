//! Services, endpoints and workloads, as the generators need them.
//!
//! In: a [`config_store::Snapshot`]: Kubernetes' Services, EndpointSlices, Pods and Nodes, and Istio's
//! ServiceEntries and WorkloadEntries. Out: [`Registry`]: [`Service`]s in order of age with their
//! [`Endpoint`]s. Never: which proxy may see what (`push-context`), Envoy types, I/O, clocks.

mod endpoint;
mod entry;
mod history;
mod kubernetes;
mod locality;
mod network;
mod service;
mod settings;
mod targets;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use config_store::{Kind, Object, Snapshot};
use istio_api::MeshConfig;
use mesh_types::ArcStr;

use history::History;
use kubernetes::EndpointMap;

pub use endpoint::{CANONICAL_NAME, CANONICAL_REVISION, Endpoint, Health, TlsMode, Workload, canonical_service};
pub use history::{ServiceKey, Version};
pub use locality::{Locality, augment_labels};
pub use network::{GatewayAddresses, Gateways, NetworkGateway, Networks};
pub use service::{Port, Provider, Resolution, Service, ServiceTarget, TargetPort, TrafficDistribution};
pub use settings::{Compliance, JwksMode, Settings};
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
    /// By host name, then namespace of the service; each endpoint names its port.
    endpoints: foldhash::HashMap<ArcStr, Vec<OfNamespace>>,
    workloads: Arc<Workloads>,
    /// Endpoints that no EndpointSlice names.
    written: Arc<EndpointMap>,
    history: History,
    placement: Arc<Placement>,
    networks: Arc<Networks>,
}

/// A namespace's endpoints of a host.
type OfNamespace = (ArcStr, Arc<[Endpoint]>);

/// Stands for all that decides which services a proxy's workload serves: while it is the same object, nothing of that has changed.
#[derive(Debug, Default)]
pub struct Placement(());

/// What workloads are read from and with.
struct Reader<'a> {
    snapshot: &'a Snapshot,
    mesh: &'a MeshConfig,
    settings: &'a Settings,
    networks: &'a Networks,
}

/// Pods and WorkloadEntries.
#[derive(Debug, Default)]
struct Workloads {
    /// By namespace, then name; of two with one name the pod.
    by_name: HashMap<ArcStr, HashMap<ArcStr, Arc<Workload>>>,
    /// The same by their first address, which several may share; pods first.
    by_address: HashMap<ArcStr, Vec<Arc<Workload>>>,
    /// Pods as read, by their object's address (which the object held beside it keeps from being used again), so
    /// that a later build need not read them again.
    pods: HashMap<usize, (Arc<Object>, Arc<Workload>)>,
}

impl Workloads {
    fn named(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.by_name.get(namespace)?.get(name)
    }

    /// The pod of that name.
    fn pod(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        self.named(namespace, name).filter(|workload| workload.is_pod)
    }

    /// The pod that serves at an address.
    fn pod_at(&self, namespace: &str, address: &str) -> Option<&Arc<Workload>> {
        let serves = |w: &&Arc<Workload>| w.is_pod && w.ready && !w.finished && *w.namespace == *namespace;
        self.by_address.get(address)?.iter().rev().find(serves)
    }
}

impl Registry {
    /// Reads everything that names a service or an endpoint. Objects that make no sense are left out.
    pub fn build(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Registry {
        Registry::build_after(None, snapshot, mesh, settings)
    }

    /// The registry of a newer snapshot of the same settings and MeshConfig. What equals its like in this one, the
    /// registry of `before`, is taken from here, so that pointers tell what changed. `changed` are the kinds that differ;
    /// of these `before` may hold more than this registry was made of.
    pub fn update(
        &self,
        before: &Snapshot,
        snapshot: &Snapshot,
        changed: &[Kind],
        mesh: &MeshConfig,
        settings: &Settings,
    ) -> Registry {
        let read = |kind: &Kind| {
            use Kind::{EndpointSlice, Namespace, Node, Pod, Service, ServiceEntry, WorkloadEntry};
            matches!(kind, Namespace | Node | Pod | Service | EndpointSlice | ServiceEntry | WorkloadEntry)
        };
        let changed: Vec<Kind> = changed.iter().copied().filter(read).collect();
        match &changed[..] {
            [] | [Kind::EndpointSlice] => self.with_slices(before, snapshot, settings),
            // Where pods are depends on their Nodes.
            _ => {
                let previous = (!changed.contains(&Kind::Node)).then_some(self);
                Registry::build_after(previous, snapshot, mesh, settings)
            }
        }
    }

    fn build_after(
        previous: Option<&Registry>,
        snapshot: &Snapshot,
        mesh: &MeshConfig,
        settings: &Settings,
    ) -> Registry {
        let networks = Arc::new(Networks::build(snapshot, mesh, settings));
        // Which network a workload is in may depend on all of it.
        let previous = previous.filter(|previous| previous.networks == networks);
        let empty = HashMap::new();
        let reader = Reader { snapshot, mesh, settings, networks: &networks };
        let pods = kubernetes::pods(&reader, previous.map_or(&empty, |p| &p.workloads.pods));
        let mut services = kubernetes::services(snapshot, mesh, settings);
        services.extend(entry::services(snapshot, mesh, settings));
        sort_by_age(&mut services);
        service::resolve_aliases(&mut services);
        service::share_accounts(&mut services);

        let entry_workloads = entry::workloads(&reader);
        let mut written = entry::endpoints(&reader, &pods, &entry_workloads);
        if settings.services_select_entries {
            kubernetes::select_workload_entries(&services, &entry_workloads, &mut written);
        }
        let mut workloads = Workloads::default();
        for workload in pods.iter().map(|(_, workload)| workload.clone()).chain(entry_workloads) {
            if let Some(address) = workload.addresses.first() {
                workloads.by_address.entry(address.clone()).or_default().push(workload.clone());
            }
            let of_namespace = workloads.by_name.entry(workload.namespace.clone()).or_default();
            of_namespace.entry(workload.name.clone()).or_insert(workload);
        }
        workloads.pods =
            pods.into_iter().map(|(object, workload)| (Arc::as_ptr(&object) as usize, (object, workload))).collect();
        let own = services.iter().filter(|s| s.provider == Provider::Kubernetes);
        let own: HashMap<ServiceKey, &Service> = own.map(|s| ((s.hostname.clone(), s.namespace.clone()), s)).collect();
        let own_service = |key: &ServiceKey| own.get(key).copied();
        let mut lists = kubernetes::endpoints(snapshot, settings, &networks, |_| true, own_service, &workloads);
        for (key, list) in &written {
            lists.entry(key.clone()).or_default().extend_from_slice(list);
        }

        let old_services: HashMap<(&str, &str, &str), &Arc<Service>> =
            previous.iter().flat_map(|p| &p.services).map(|s| (identity(s), s)).collect();
        let reuse_service = |service: Service| match old_services.get(&identity(&service)) {
            Some(old) if ***old == service => (*old).clone(),
            _ => Arc::new(service),
        };
        let mut out = Registry {
            services: services.into_iter().map(reuse_service).collect(),
            workloads: Arc::new(workloads),
            written: Arc::new(written),
            networks: previous.map_or_else(|| networks.clone(), |previous| previous.networks.clone()),
            ..Registry::default()
        };
        let mut changed = Vec::new();
        for (key, list) in lists {
            let old = previous.and_then(|p| p.list(&key.0, &key.1)).filter(|old| ***old == *list);
            if old.is_none() {
                changed.push(key.clone());
            }
            let list = old.cloned().unwrap_or_else(|| list.into());
            out.endpoints.entry(key.0).or_default().push((key.1, list));
        }
        if let Some(previous) = previous.filter(|p| same(&p.services, &out.services)) {
            let lists = previous.endpoints.iter();
            let lists = lists.flat_map(|(host, of_host)| of_host.iter().map(move |(namespace, _)| (host, namespace)));
            let gone = lists.filter(|(host, namespace)| out.list(host, namespace).is_none());
            changed.extend(gone.map(|(host, namespace)| (host.clone(), namespace.clone())));
            out.history = previous.history.next(changed);
        }
        out
    }

    /// As [`Registry::build_after`] where only EndpointSlices have changed: looks at nothing but the services of these.
    fn with_slices(&self, before: &Snapshot, snapshot: &Snapshot, settings: &Settings) -> Registry {
        let of = |snapshot: &Snapshot| -> HashSet<usize> {
            snapshot.list(Kind::EndpointSlice).map(|object| Arc::as_ptr(object) as usize).collect()
        };
        let (old, new) = (of(before), of(snapshot));
        let differ = |snapshot: &Snapshot, other: &HashSet<usize>| -> Vec<ServiceKey> {
            let slices = snapshot.list(Kind::EndpointSlice);
            let differ = slices.filter(|object| !other.contains(&(Arc::as_ptr(object) as usize)));
            differ.filter_map(|object| kubernetes::service_of(object, settings)).collect()
        };
        let affected: HashSet<ServiceKey> = differ(before, &new).into_iter().chain(differ(snapshot, &old)).collect();
        // In one pass, however many they are.
        let mut services: HashMap<&ServiceKey, Vec<&Arc<Service>>> =
            affected.iter().map(|key| (key, Vec::new())).collect();
        for service in &self.services {
            if let Some(list) = services.get_mut(&(service.hostname.clone(), service.namespace.clone())) {
                list.push(service);
            }
        }
        let services_of = |key: &ServiceKey| services.get(key).map_or(&[][..], Vec::as_slice);
        let own = |key: &ServiceKey| -> Option<&Service> {
            services_of(key).iter().find(|s| s.provider == Provider::Kubernetes).map(|s| &***s)
        };
        let wanted = |key: &ServiceKey| affected.contains(key);
        let mut lists = kubernetes::endpoints(snapshot, settings, &self.networks, wanted, own, &self.workloads);
        let mut endpoints = self.endpoints.clone();
        let (mut changed, mut placement) = (Vec::new(), self.placement.clone());
        for key in affected.iter().cloned() {
            let mut list = lists.remove(&key).unwrap_or_default();
            list.extend(self.written.get(&key).into_iter().flatten().cloned());
            if self.endpoints(&key.0, &key.1) == list {
                continue;
            }
            // Services without a selector are a workload's by its address.
            let by_address = |s: &Arc<Service>| {
                s.selector.is_empty() || s.provider == Provider::External || s.resolution == Resolution::Passthrough
            };
            if services_of(&key).iter().copied().any(by_address) {
                placement = Arc::default();
            }
            let of_host = endpoints.entry(key.0.clone()).or_default();
            of_host.retain(|(namespace, _)| *namespace != key.1);
            if !list.is_empty() {
                of_host.push((key.1.clone(), list.into()));
            }
            changed.push(key);
        }
        Registry {
            services: self.services.clone(),
            endpoints,
            workloads: self.workloads.clone(),
            written: self.written.clone(),
            history: self.history.next(changed),
            placement,
            networks: self.networks.clone(),
        }
    }

    fn list(&self, hostname: &str, namespace: &str) -> Option<&Arc<[Endpoint]>> {
        self.endpoints.get(hostname)?.iter().find(|(own, _)| **own == *namespace).map(|(_, list)| list)
    }

    /// Networks of the mesh and their gateways; the same object while it is equal.
    pub fn networks(&self) -> &Arc<Networks> {
        &self.networks
    }

    /// Stands for the endpoints of this registry.
    pub fn version(&self) -> &Arc<Version> {
        self.history.version()
    }

    /// The services whose endpoints have changed since another registry's version, from which this one differs in nothing
    /// but endpoints; nothing if that is not known.
    pub fn changed_since(&self, version: &Arc<Version>) -> Option<impl Iterator<Item = &ServiceKey>> {
        self.history.since(version)
    }

    /// Stands for what [`Registry::targets`], [`Registry::workload`] and the endpoints of services without an address depend on.
    pub fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// The endpoints of a service as one list that stays the same object while nothing changes.
    pub fn endpoint_list(&self, service: &Service) -> Option<&Arc<[Endpoint]>> {
        self.list(&service.hostname, &service.namespace)
    }

    /// Endpoints of all ports of a service, in the order their source gave.
    pub fn endpoints(&self, hostname: &str, namespace: &str) -> &[Endpoint] {
        self.list(hostname, namespace).map_or(&[], |list| list)
    }

    /// Endpoints behind one port of a service.
    pub fn endpoints_by_port<'a>(&'a self, service: &'a Service, port: u16) -> impl Iterator<Item = &'a Endpoint> {
        let name = service.port(port).map(|p| &*p.name);
        let all = self.endpoints(&service.hostname, &service.namespace);
        all.iter().filter(move |e| name.is_some_and(|n| *n == *e.service_port_name))
    }

    /// The same, as clusters and listeners find them: those of ServiceEntries by the port's number, which entries for
    /// one host may name differently (istiod `EndpointShards.CopyEndpoints`).
    pub fn endpoints_by_number<'a>(&'a self, service: &'a Service, port: u16) -> impl Iterator<Item = &'a Endpoint> {
        let name = service.port(port).map(|p| &*p.name);
        let all = self.endpoints(&service.hostname, &service.namespace);
        all.iter().filter(move |e| match e.service_port {
            0 => name.is_some_and(|n| *n == *e.service_port_name),
            number => number == port && name.is_some(),
        })
    }
}

/// Whether two lists hold the same objects.
fn same<T>(a: &[Arc<T>], b: &[Arc<T>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
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
