//! The configuration's one writer: compiles resources, warms them, publishes tables, binds sockets.
//!
//! A resource that is refused leaves its former state in use; everything else of the same update is applied.

mod warming;

use crate::drain::DrainStrategy;
use crate::runtime::{ClusterEntry, ListenerEntry, Listeners, Shared};
use crate::socket::{self, BindOptions, Bound};
use crate::sources::Demand;
use crate::stats::Kind;
use crate::tls;
use crate::worker::Command;
use ads::client::{Subscriptions, Wanted};
use bytes::Bytes;
use envoy_api::{Message, pb, type_url};
use mesh_types::ArcStr;
use proxy_core::access_log::LogSink;
use proxy_core::cluster::Discovery;
use proxy_core::config_source::{ConfigSource, Origin};
use proxy_core::hcm::Routes;
use proxy_core::listener::{Direction, Terminal};
use proxy_core::tls::{CertificateSource, SdsRef, Secret, TlsCommon};
use proxy_core::{Address, Cluster, Endpoints, Listener, ListenerSet, Options, RouteTable, Runtime};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc::UnboundedSender;

pub(crate) use warming::{Awaited, lose_patience};
use warming::{has_routes, tls_of};

/// A named resource as it arrives.
pub(crate) struct Incoming {
    pub(crate) name: ArcStr,
    pub(crate) version: ArcStr,
    pub(crate) body: Bytes,
}

/// Names and reasons of refused resources.
pub(crate) type Refused = Vec<(ArcStr, String)>;

/// What was last applied of one type, for dumps and counters.
#[derive(Default)]
pub(crate) struct TypeState {
    pub(crate) version: ArcStrOrEmpty,
    pub(crate) updates: u64,
    pub(crate) rejected: u64,
}

/// A version that starts empty.
#[derive(Clone, Debug)]
pub(crate) struct ArcStrOrEmpty(pub(crate) ArcStr);

impl Default for ArcStrOrEmpty {
    fn default() -> Self {
        Self("".into())
    }
}

/// Envoy's counters of its managers.
#[derive(Default)]
struct Changes {
    clusters: [u64; 3],
    listeners: [u64; 3],
    refused_listeners: u64,
}

const ADDED: usize = 0;
const MODIFIED: usize = 1;
const REMOVED: usize = 2;

/// The master copy of the configuration.
pub(crate) struct Control {
    pub(crate) shared: Arc<Shared>,
    options: Options,
    workers: Vec<UnboundedSender<Command>>,
    clusters: BTreeMap<ArcStr, Arc<ClusterEntry>>,
    /// Clusters that wait for their endpoints or secrets; they replace what is in use when these come.
    warming: BTreeMap<ArcStr, Arc<ClusterEntry>>,
    listeners: BTreeMap<ArcStr, Arc<ListenerEntry>>,
    /// Listeners that wait for their routes or secrets.
    warming_listeners: BTreeMap<ArcStr, Arc<ListenerEntry>>,
    /// The last assignment of each EDS name, so that a changed cluster need not wait.
    assignments: HashMap<ArcStr, Bytes>,
    bound: HashMap<ArcStr, Vec<Address>>,
    /// How often clusters and listeners came, changed and went.
    changes: Changes,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) types: BTreeMap<&'static str, TypeState>,
    /// Types whose first answer is still awaited before the proxy is ready.
    pub(crate) awaiting: BTreeSet<&'static str>,
    was_ready: Cell<bool>,
    /// What others than the aggregated stream are asked for.
    pub(crate) demands: tokio::sync::watch::Sender<BTreeSet<Demand>>,
    /// Those of them that the bootstrap makes: all clusters, all listeners.
    pub(crate) roots: BTreeSet<Demand>,
    /// The workload's certificate comes from the agent in this process, so nobody is asked for it.
    pub(crate) own_certificate: bool,
    dns: UnboundedSender<Arc<ClusterEntry>>,
    patience: UnboundedSender<(Duration, Awaited)>,
}

impl Control {
    pub(crate) fn new(
        shared: Arc<Shared>,
        options: Options,
        workers: Vec<UnboundedSender<Command>>,
        dns: UnboundedSender<Arc<ClusterEntry>>,
        patience: UnboundedSender<(Duration, Awaited)>,
    ) -> Self {
        Self {
            shared,
            options,
            workers,
            clusters: BTreeMap::new(),
            warming: BTreeMap::new(),
            listeners: BTreeMap::new(),
            warming_listeners: BTreeMap::new(),
            assignments: HashMap::new(),
            bound: HashMap::new(),
            changes: Changes::default(),
            subscriptions: Subscriptions::new(),
            types: BTreeMap::new(),
            awaiting: BTreeSet::new(),
            was_ready: Cell::new(false),
            demands: tokio::sync::watch::Sender::default(),
            roots: BTreeSet::new(),
            own_certificate: false,
            dns,
            patience,
        }
    }

    /// Where all clusters or all listeners come from, as the bootstrap says.
    pub(crate) fn follow_all(&mut self, of: &'static str, source: &ConfigSource) {
        match &source.origin {
            Origin::Ads => self.subscriptions.set(of, Wanted::all()),
            Origin::Static => return,
            origin => {
                self.roots.insert(Demand { origin: origin.clone(), type_url: of, name: None });
            }
        }
        self.awaiting.insert(of);
        self.expect(source, Awaited::Type(of));
    }

    /// Applies one response of whoever was asked.
    pub(crate) fn update(&mut self, origin: &Origin, of: &str, updated: Vec<Incoming>, removed: &[ArcStr]) -> Refused {
        let version = updated.last().map(|u| u.version.clone());
        let (key, refused) = match of {
            type_url::CLUSTER => (type_url::CLUSTER, self.update_clusters(updated, removed, true)),
            type_url::ENDPOINT => (type_url::ENDPOINT, self.update_endpoints(updated, removed)),
            type_url::LISTENER => (type_url::LISTENER, self.update_listeners(updated, removed, true)),
            type_url::ROUTE => (type_url::ROUTE, self.update_routes(updated, removed)),
            type_url::SECRET => (type_url::SECRET, self.update_secrets(origin, updated, removed)),
            _ => return Vec::new(),
        };
        let state = self.types.entry(key).or_default();
        state.updates += 1;
        if let Some(version) = version {
            state.version = ArcStrOrEmpty(version);
        }
        if !refused.is_empty() {
            state.rejected += 1;
        }
        self.awaiting.remove(key);
        refused
    }

    /// True once nothing that readiness depends on is missing, and from then on: what comes later waits beside what serves.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.was_ready.get() {
            return Ok(());
        }
        if let Some(of) = self.awaiting.first() {
            let name = of.rsplit('.').next().unwrap_or(of);
            return Err(format!("waiting for the control plane's first {name} resources"));
        }
        if let Some((name, cluster)) = self.warming.iter().next() {
            let what = if cluster.has_endpoints() { "secrets or health" } else { "endpoints" };
            return Err(format!("waiting for {what} of cluster {name}"));
        }
        if let Some((name, listener)) = self.warming_listeners.iter().next() {
            let what = if has_routes(listener) { "secrets" } else { "routes" };
            return Err(format!("waiting for {what} of listener {name}"));
        }
        self.was_ready.set(true);
        Ok(())
    }

    /// Names and values of the counters of the cluster and the listener manager.
    pub(crate) fn changes(&self) -> [(&'static str, u64); 8] {
        let Changes { clusters, listeners, refused_listeners } = &self.changes;
        [
            ("cluster_manager.cluster_added", clusters[ADDED]),
            ("cluster_manager.cluster_modified", clusters[MODIFIED]),
            ("cluster_manager.cluster_removed", clusters[REMOVED]),
            ("listener_manager.listener_added", listeners[ADDED]),
            ("listener_manager.listener_modified", listeners[MODIFIED]),
            ("listener_manager.listener_removed", listeners[REMOVED]),
            ("listener_manager.listener_create_success", listeners[ADDED] + listeners[MODIFIED]),
            ("listener_manager.listener_create_failure", *refused_listeners),
        ]
    }

    /// The values that keys of the configuration stand for.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.options.runtime
    }

    /// Sets values of the runtime's admin layer; `false`: there is none.
    pub(crate) fn modify_runtime<'a>(&self, changes: impl IntoIterator<Item = (&'a str, &'a str)>) -> bool {
        let runtime = &self.options.runtime;
        let changed = runtime.modify(changes);
        if changed {
            self.clusters.values().chain(self.warming.values()).for_each(|cluster| cluster.follow(runtime));
        }
        changed
    }

    pub(crate) fn warming_clusters(&self) -> impl Iterator<Item = &Arc<ClusterEntry>> {
        self.warming.values()
    }

    pub(crate) fn warming_listeners(&self) -> impl Iterator<Item = &Arc<ListenerEntry>> {
        self.warming_listeners.values()
    }

    /// Adds, changes and removes clusters.
    pub(crate) fn update_clusters(&mut self, updated: Vec<Incoming>, removed: &[ArcStr], dynamic: bool) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            if let Err(reason) = self.put_cluster(&incoming, dynamic) {
                refused.push((incoming.name, reason));
            }
        }
        for name in removed {
            if self.clusters.get(name).is_some_and(|c| c.dynamic)
                && let Some(entry) = self.clusters.remove(name)
            {
                self.shared.registry.remove(Kind::Cluster, &entry.cluster.stat_name);
                self.changes.clusters[REMOVED] += 1;
            }
            self.warming.remove(name);
        }
        self.publish_clusters();
        self.subscribe();
        refused
    }

    fn put_cluster(&mut self, incoming: &Incoming, dynamic: bool) -> Result<(), String> {
        let old = self.clusters.get(&incoming.name);
        if old.is_some_and(|old| old.body == incoming.body) && !self.warming.contains_key(&incoming.name) {
            return Ok(());
        }
        let decode = |body: &Bytes| pb::envoy::config::cluster::v3::Cluster::decode(body.clone());
        let message = decode(&incoming.body).map_err(|e| format!("malformed: {e}"))?;
        let cluster = Cluster::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = cluster.name.clone();
        if let Some(old) = self.clusters.get(&name) {
            let fingerprint = Cluster::fingerprint(&message);
            let same = decode(&old.body).is_ok_and(|old| Cluster::fingerprint(&old) == fingerprint);
            if same && !self.warming.contains_key(&name) {
                return Ok(());
            }
            if !old.dynamic && dynamic {
                return Err("a static cluster of that name exists".into());
            }
        }
        let known = self.clusters.contains_key(&name) || self.warming.contains_key(&name);
        self.changes.clusters[if known { MODIFIED } else { ADDED }] += 1;
        let (body, version) = (incoming.body.clone(), incoming.version.clone());
        let entry = ClusterEntry::new(Arc::new(cluster), body, version, dynamic, &self.options.runtime);
        crate::ejection::watch(&self.shared, &entry);
        let patience = self.patience.clone();
        crate::checks::watch(&self.shared, &entry, move || {
            // The receiver lives as long as the proxy.
            let _ = patience.send((Duration::ZERO, Awaited::Checks));
        });
        match &entry.cluster.discovery {
            Discovery::Eds { service_name, .. } => {
                if let Some(body) = self.assignments.get(service_name).cloned() {
                    // Refused before: the same assignment is refused again, and EDS will say so.
                    let _ = self.assign(&entry, &body);
                }
            }
            Discovery::StrictDns(_) | Discovery::LogicalDns(_) => {
                // The receiver lives as long as the proxy.
                let _ = self.dns.send(entry.clone());
            }
            _ => {}
        }
        let secrets = self.missing_secrets(entry.cluster.transport.tls_contexts().map(|tls| &tls.common));
        entry.has_secrets.store(secrets.is_empty(), Ordering::Release);
        for secret in &secrets {
            self.expect(&secret.source, Awaited::ClusterSecrets(Arc::downgrade(&entry)));
        }
        if entry.is_warm() {
            self.warming.remove(&name);
            self.clusters.insert(name, entry);
        } else {
            if let Discovery::Eds { source, .. } = &entry.cluster.discovery {
                self.expect(source, Awaited::Cluster(Arc::downgrade(&entry)));
            }
            self.warming.insert(name, entry);
        }
        Ok(())
    }

    fn assign(&self, entry: &Arc<ClusterEntry>, body: &Bytes) -> Result<(), String> {
        let message = pb::envoy::config::endpoint::v3::ClusterLoadAssignment::decode(body.clone())
            .map_err(|e| format!("malformed: {e}"))?;
        let previous = match entry.warm.load(Ordering::Acquire) {
            true => Some(entry.endpoints.load_full()),
            // A changed cluster keeps the hosts (and their health) of the one it replaces.
            false => self.clusters.get(&entry.cluster.name).map(|c| c.endpoints.load_full()),
        };
        let endpoints = Endpoints::compile(&message, &entry.cluster, previous.as_deref()).map_err(|e| e.to_string())?;
        entry.set_endpoints(Arc::new(endpoints));
        Ok(())
    }

    /// Takes assignments for all clusters that use them.
    fn update_endpoints(&mut self, updated: Vec<Incoming>, _removed: &[ArcStr]) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            self.assignments.insert(incoming.name.clone(), incoming.body.clone());
            let users: Vec<_> = self
                .clusters
                .values()
                .chain(self.warming.values())
                .filter(|c| c.cluster.eds_name() == Some(&incoming.name))
                .cloned()
                .collect();
            for entry in users {
                if let Err(reason) = self.assign(&entry, &incoming.body) {
                    refused.push((incoming.name.clone(), reason));
                }
            }
        }
        self.finish_warming();
        refused
    }

    fn publish_clusters(&mut self) {
        let table: crate::runtime::Clusters = self.clusters.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let table = Arc::new(table);
        self.shared.clusters.store(table.clone());
        self.tell(|| Command::Clusters(table.clone()));
    }

    fn tell(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            // A worker that is gone takes the process with it.
            let _ = worker.send(command());
        }
    }

    /// Adds, changes and removes listeners.
    pub(crate) fn update_listeners(&mut self, updated: Vec<Incoming>, removed: &[ArcStr], dynamic: bool) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            if let Err(reason) = self.put_listener(&incoming, dynamic) {
                self.changes.refused_listeners += 1;
                refused.push((incoming.name, reason));
            }
        }
        for name in removed {
            self.warming_listeners.remove(name);
            if self.listeners.get(name).is_some_and(|l| l.dynamic) {
                self.drop_listener(name);
            }
        }
        // Subscriptions first: a listener may wait for routes that nobody asked for yet.
        self.subscribe();
        refused.extend(self.finish_listeners());
        self.publish_listeners();
        refused
    }

    fn put_listener(&mut self, incoming: &Incoming, dynamic: bool) -> Result<(), String> {
        let old = self.listeners.get(&incoming.name);
        if old.is_some_and(|old| old.body == incoming.body) && !self.warming_listeners.contains_key(&incoming.name) {
            return Ok(());
        }
        let message = pb::envoy::config::listener::v3::Listener::decode(incoming.body.clone())
            .map_err(|e| format!("malformed: {e}"))?;
        let listener = Listener::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = listener.name.clone();
        for path in log_files(&listener) {
            self.shared.logs.open(path).map_err(|e| format!("unable to open file '{path}': {e}"))?;
        }
        let known = self.listeners.contains_key(&name) || self.warming_listeners.contains_key(&name);
        self.changes.listeners[if known { MODIFIED } else { ADDED }] += 1;
        let entry = ListenerEntry::new(
            Arc::new(listener),
            incoming.body.clone(),
            incoming.version.clone(),
            dynamic,
            self.listeners.get(&name).map(|l| &**l),
            &self.shared.routes,
        );
        for source in rds_sources(&entry.listener).map(|(_, source)| source) {
            self.expect(source, Awaited::Routes(Arc::downgrade(&entry)));
        }
        for secret in self.missing_secrets(tls_of(&entry.listener)) {
            self.expect(&secret.source, Awaited::Secrets(Arc::downgrade(&entry)));
        }
        self.warming_listeners.insert(name, entry);
        Ok(())
    }

    /// Moves a listener into use.
    fn start_listener(&mut self, name: ArcStr) -> Result<(), String> {
        let Some(entry) = self.warming_listeners.remove(&name) else { return Ok(()) };
        self.bind(&entry)?;
        if let Some(old) = self.listeners.insert(name, entry.clone()) {
            old.drain_missing(Some(&entry));
        }
        Ok(())
    }

    fn drop_listener(&mut self, name: &ArcStr) {
        if let Some(entry) = self.forget_listener(name) {
            entry.drain_missing(None);
        }
    }

    /// Accepts no more connections of a listener.
    fn forget_listener(&mut self, name: &ArcStr) -> Option<Arc<ListenerEntry>> {
        let entry = self.listeners.remove(name)?;
        self.changes.listeners[REMOVED] += 1;
        if self.bound.remove(name).is_some() {
            self.tell(|| Command::StopListening(name.clone()));
        }
        Some(entry)
    }

    /// Binds a listener's addresses on all workers, unless that was done.
    fn bind(&mut self, entry: &ListenerEntry) -> Result<(), String> {
        let listener = &entry.listener;
        if !listener.bind_to_port || self.workers.is_empty() {
            return Ok(());
        }
        let addresses: Vec<Address> =
            std::iter::once(&listener.address).chain(&listener.additional_addresses).cloned().collect();
        if self.bound.get(&listener.name) == Some(&addresses) {
            return Ok(());
        }
        let mut sockets: Vec<Vec<Bound>> = self.workers.iter().map(|_| Vec::new()).collect();
        for address in &addresses {
            let own_sockets = listener.reuse_port && matches!(address, Address::Ip(_));
            let options = BindOptions {
                transparent: listener.transparent,
                freebind: listener.freebind,
                reuse_port: own_sockets,
                backlog: listener.tcp_backlog.map_or(4096, |b| i32::try_from(b).unwrap_or(i32::MAX)),
                others: &listener.socket_options,
            };
            let fail = |e: std::io::Error| format!("cannot bind '{address}': {e}");
            let first = socket::listen(address, options).map_err(fail)?;
            for list in sockets.iter_mut().skip(1) {
                let bound = match (&first, own_sockets) {
                    (_, true) => socket::listen(address, options).map_err(fail)?,
                    (Bound::Tcp(s), false) => Bound::Tcp(s.try_clone().map_err(fail)?),
                    (Bound::Unix(s), false) => Bound::Unix(s.try_clone().map_err(fail)?),
                };
                list.push(bound);
            }
            sockets[0].push(first);
        }
        if self.bound.insert(listener.name.clone(), addresses).is_some() {
            self.tell(|| Command::StopListening(listener.name.clone()));
        }
        for (worker, list) in self.workers.iter().zip(sockets) {
            for bound in list {
                let _ = worker.send(Command::Listen(listener.name.clone(), bound));
            }
        }
        Ok(())
    }

    fn publish_listeners(&mut self) {
        let by_name: HashMap<_, _> = self.listeners.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let set = ListenerSet::new(self.listeners.values().map(|l| l.listener.clone()));
        self.shared.listeners.store(Arc::new(Listeners { set, by_name }));
        let rds: BTreeSet<ArcStr> = self.rds_names();
        self.shared.routes.retain(|name| rds.contains(name));
    }

    fn rds_names(&self) -> BTreeSet<ArcStr> {
        let all = self.listeners.values().chain(self.warming_listeners.values());
        all.flat_map(|l| l.listener.rds_names().cloned().collect::<Vec<_>>()).collect()
    }

    /// Routes that listeners want, with whom they are asked of.
    fn wanted_routes(&self) -> impl Iterator<Item = (&ArcStr, &ConfigSource)> {
        self.listeners.values().chain(self.warming_listeners.values()).flat_map(|l| rds_sources(&l.listener))
    }

    /// Takes route tables.
    fn update_routes(&mut self, updated: Vec<Incoming>, removed: &[ArcStr]) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            let slot = self.shared.routes.slot(&incoming.name);
            if slot.dump.load().as_ref().is_some_and(|d| d.0 == incoming.body) {
                continue;
            }
            let compiled = pb::envoy::config::route::v3::RouteConfiguration::decode(incoming.body.clone())
                .map_err(|e| format!("malformed: {e}"))
                .and_then(|m| RouteTable::compile(&m, &self.options).map_err(|e| e.to_string()));
            match compiled {
                Ok(table) => {
                    slot.table.store(Some(Arc::new(table)));
                    slot.dump.store(Some(Arc::new((incoming.body, incoming.version, SystemTime::now()))));
                }
                Err(reason) => refused.push((incoming.name, reason)),
            }
        }
        for name in removed {
            // Envoy keeps a removed route configuration until no listener asks for it.
            tracing::debug!(%name, "route configuration removed by the control plane");
        }
        refused.extend(self.finish_listeners());
        self.publish_listeners();
        refused
    }

    /// Takes secrets.
    pub(crate) fn update_secrets(&mut self, origin: &Origin, updated: Vec<Incoming>, removed: &[ArcStr]) -> Refused {
        let mut refused = Vec::new();
        for incoming in updated {
            let done = pb::envoy::extensions::transport_sockets::tls::v3::Secret::decode(incoming.body.clone())
                .map_err(|e| format!("malformed: {e}"))
                .and_then(|m| Secret::compile(&m).map_err(|e| e.to_string()))
                .and_then(|s| self.shared.secrets.set(origin, s).map_err(|e| e.to_string()));
            if let Err(reason) = done {
                refused.push((incoming.name, reason));
            }
        }
        for name in removed {
            self.shared.secrets.remove(origin, name);
        }
        self.secrets_came();
        refused
    }

    /// Tells the control plane, and whoever else is asked, which named resources are wanted now.
    pub(crate) fn subscribe(&self) {
        let mut wanted = BTreeSet::new();
        let mut want = |type_url: &'static str, name: &ArcStr, source: &ConfigSource| {
            wanted.insert(Demand { origin: source.origin.clone(), type_url, name: Some(name.clone()) });
        };
        let clusters = || self.clusters.values().chain(self.warming.values());
        let mut secrets = BTreeSet::new();
        for cluster in clusters() {
            if let Discovery::Eds { service_name, source } = &cluster.cluster.discovery {
                want(type_url::ENDPOINT, service_name, source);
            }
            for tls in cluster.cluster.transport.tls_contexts() {
                sds_refs(&tls.common, &mut secrets);
            }
        }
        for (name, source) in self.wanted_routes() {
            want(type_url::ROUTE, name, source);
        }
        for listener in self.listeners.values().chain(self.warming_listeners.values()) {
            tls_of(&listener.listener).for_each(|common| sds_refs(common, &mut secrets));
        }
        for secret in secrets {
            if !(self.own_certificate && tls::is_workload(&secret.name)) {
                want(type_url::SECRET, &secret.name, &secret.source);
            }
        }
        for of in [type_url::ENDPOINT, type_url::ROUTE, type_url::SECRET] {
            let of_ads = wanted.iter().filter(|d| d.origin == Origin::Ads && d.type_url == of);
            self.subscriptions.set(of, Wanted::names(of_ads.filter_map(|d| d.name.clone())));
        }
        wanted.retain(|demand| matches!(demand.origin, Origin::Grpc(_) | Origin::Path(_)));
        wanted.extend(self.roots.iter().cloned());
        self.demands.send_if_modified(|current| {
            let changed = *current != wanted;
            if changed {
                *current = wanted;
            }
            changed
        });
    }

    /// Tells inbound and outbound connections to end as soon as that loses nothing, all at once or one after the other.
    pub(crate) fn drain(&mut self, inbound_only: bool) {
        self.shared.draining.begin(inbound_only);
        if self.shared.draining.strategy == DrainStrategy::Gradual {
            return;
        }
        for listener in self.listeners.values() {
            if !inbound_only || listener.listener.direction == Direction::Inbound {
                listener.drain_missing(None);
            }
        }
    }

    /// Stops accepting.
    pub(crate) fn stop_listeners(&mut self, inbound_only: bool) {
        let names: Vec<ArcStr> = self
            .listeners
            .iter()
            .filter(|(_, l)| !inbound_only || l.listener.direction == Direction::Inbound)
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            if let Some(entry) = self.forget_listener(&name)
                && self.shared.draining.strategy == DrainStrategy::Immediate
            {
                entry.drain_missing(None);
            }
        }
        self.publish_listeners();
    }

    /// Ends the workers.
    pub(crate) fn shutdown(&self) {
        self.tell(|| Command::Shutdown);
    }

    /// Names in static routes and TCP proxies of clusters that do not exist, as Envoy checks them at start.
    pub(crate) fn unknown_clusters(&self) -> Option<String> {
        for listener in self.listeners.values().chain(self.warming_listeners.values()) {
            for chain in listener.listener.all_chains() {
                match &chain.terminal {
                    Terminal::Http(hcm) => {
                        if let Routes::Inline(table) = &hcm.routes
                            && table.common.validate_clusters.unwrap_or(true)
                            && let Some(name) = table.cluster_names().find(|n| !self.has_cluster(n))
                        {
                            return Some(format!("route: unknown cluster '{name}'"));
                        }
                    }
                    Terminal::TcpProxy(_) | Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => {}
                }
            }
        }
        None
    }

    /// The first static TLS context that nothing can be done with, as Envoy reads its files at start. A secret that has
    /// yet to come does not count.
    pub(crate) fn unusable_tls(&self) -> Option<String> {
        let listeners = self.listeners.values().chain(self.warming_listeners.values());
        let chains = listeners.flat_map(|l| l.listener.all_chains()).filter_map(|chain| chain.tls.as_ref());
        let clusters = self.clusters.values().chain(self.warming.values());
        let contexts = clusters.flat_map(|c| c.cluster.transport.tls_contexts());
        let mut all = chains.map(|tls| &tls.common).chain(contexts.map(|tls| &tls.common));
        all.find_map(|common| tls::check(common, &self.shared.secrets).err().map(|e| format!("TLS context: {e}")))
    }

    /// A listener with an address that another one has, too.
    pub(crate) fn duplicate_address(&self) -> Option<String> {
        let mut seen = std::collections::HashSet::new();
        let mut bound = self.listeners.values().chain(self.warming_listeners.values());
        let twice = bound.find(|entry| {
            let listener = &entry.listener;
            let any_port = listener.address.socket().is_some_and(|socket| socket.port() == 0);
            listener.bind_to_port && !any_port && !seen.insert(&listener.address)
        });
        twice.map(|entry| format!("error adding listener: '{}' has duplicate address", entry.listener.name))
    }

    fn has_cluster(&self, name: &ArcStr) -> bool {
        self.clusters.contains_key(name) || self.warming.contains_key(name)
    }
}

/// The files that a listener writes its records to.
fn log_files(listener: &Listener) -> impl Iterator<Item = &ArcStr> {
    let chains = listener.all_chains().flat_map(|chain| match &chain.terminal {
        Terminal::Http(hcm) => &hcm.access_log[..],
        Terminal::TcpProxy(proxy) => &proxy.access_log[..],
        _ => &[],
    });
    listener.access_log.iter().chain(chains).filter_map(|log| match &log.sink {
        LogSink::File(path) => Some(path),
        _ => None,
    })
}

/// The routes that a listener takes from RDS.
fn rds_sources(listener: &Listener) -> impl Iterator<Item = (&ArcStr, &ConfigSource)> {
    listener.all_chains().filter_map(|chain| match &chain.terminal {
        Terminal::Http(hcm) => match &hcm.routes {
            Routes::Rds { name, source } => Some((name, source)),
            Routes::Inline(_) => None,
        },
        _ => None,
    })
}

fn sds_refs(common: &TlsCommon, out: &mut BTreeSet<SdsRef>) {
    for certificate in &common.certificates {
        if let CertificateSource::Sds(sds) = certificate {
            out.insert(sds.clone());
        }
    }
    out.extend(common.validation.sds.clone());
}
