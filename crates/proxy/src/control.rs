//! The configuration's one writer: compiles resources, warms them, publishes tables, binds sockets.
//!
//! A resource that is refused leaves its former state in use; everything else of the same update is applied.

mod leaving;
mod updates;
mod warming;

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
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc::UnboundedSender;

pub(crate) use leaving::Leaving;
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
    /// Modified listeners of which nothing but filter chains changed.
    in_place: u64,
    refused_listeners: u64,
}

impl Changes {
    /// How often anything of a type changed.
    fn of(&self, type_url: &str) -> u64 {
        match type_url {
            type_url::CLUSTER => self.clusters.iter().sum(),
            _ => self.listeners.iter().sum(),
        }
    }
}

/// Which listeners were stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stops {
    Inbound,
    All,
}

/// A listener that was refused (`admin.v3.UpdateFailureState`).
pub(crate) struct Failed {
    pub(crate) body: Bytes,
    pub(crate) details: String,
    pub(crate) at: SystemTime,
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
    /// Listeners and chains whose connections go.
    leaving: Vec<Leaving>,
    /// Why the last state of a listener was refused, by its name; and what of the last update was.
    failed: BTreeMap<ArcStr, Arc<Failed>>,
    last_failed: Vec<Arc<Failed>>,
    /// Whom all listeners are asked of once the first clusters are in use.
    listeners_later: Option<ConfigSource>,
    /// The last assignment of each EDS name, so that a changed cluster need not wait.
    assignments: HashMap<ArcStr, Bytes>,
    bound: HashMap<ArcStr, Vec<Address>>,
    /// Listeners that accept no more by `/drain_listeners`, and which there are no new ones of.
    stopped: BTreeSet<ArcStr>,
    stops: Option<Stops>,
    /// How often clusters and listeners came, changed and went.
    changes: Changes,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) types: BTreeMap<&'static str, TypeState>,
    /// What came of each subscription.
    updates: updates::Subscribed,
    /// The stream to the control plane is open.
    connected: bool,
    /// The versions of secrets, and when they came.
    pub(crate) secret_versions: BTreeMap<ArcStr, (ArcStr, SystemTime)>,
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
            leaving: Vec::new(),
            failed: BTreeMap::new(),
            last_failed: Vec::new(),
            listeners_later: None,
            assignments: HashMap::new(),
            bound: HashMap::new(),
            stopped: BTreeSet::new(),
            stops: None,
            changes: Changes::default(),
            subscriptions: Subscriptions::new(),
            types: BTreeMap::new(),
            updates: BTreeMap::new(),
            connected: false,
            secret_versions: BTreeMap::new(),
            awaiting: BTreeSet::new(),
            was_ready: Cell::new(false),
            demands: tokio::sync::watch::Sender::default(),
            roots: BTreeSet::new(),
            own_certificate: false,
            dns,
            patience,
        }
    }

    /// Where all clusters and all listeners come from, as the bootstrap says.
    pub(crate) fn follow_all(&mut self, clusters: Option<&ConfigSource>, listeners: Option<&ConfigSource>) {
        for (of, source) in [(type_url::CLUSTER, clusters), (type_url::LISTENER, listeners)] {
            let Some(source) = source.filter(|source| source.origin != Origin::Static) else { continue };
            self.awaiting.insert(of);
            self.updates.entry((of, "".into())).or_default();
            match of {
                type_url::LISTENER => self.listeners_later = Some(source.clone()),
                _ => self.follow(of, source),
            }
        }
    }

    fn follow(&mut self, of: &'static str, source: &ConfigSource) {
        match &source.origin {
            Origin::Ads => self.subscriptions.set(of, Wanted::all()),
            origin => {
                self.roots.insert(Demand { origin: origin.clone(), type_url: of, name: None });
            }
        }
        self.expect(source, Awaited::Type(of));
    }

    /// Whether the first clusters have yet to come into use.
    pub(crate) fn waits_for_clusters(&self) -> bool {
        self.awaiting.contains(type_url::CLUSTER) || !self.warming.is_empty()
    }

    /// Asks for listeners as soon as the first clusters are in use, which they lead to (Envoy's init manager).
    pub(crate) fn follow_listeners(&mut self) {
        if !self.waits_for_clusters()
            && let Some(source) = self.listeners_later.take()
        {
            self.follow(type_url::LISTENER, &source);
            self.subscribe();
        }
    }

    /// Applies one response of whoever was asked.
    pub(crate) fn update(&mut self, origin: &Origin, of: &str, updated: Vec<Incoming>, removed: &[ArcStr]) -> Refused {
        let version = updated.last().map(|u| u.version.clone());
        let names: Vec<ArcStr> = updated.iter().map(|u| u.name.clone()).collect();
        let before = self.changes.of(of);
        let (key, refused) = match of {
            type_url::CLUSTER => (type_url::CLUSTER, self.update_clusters(updated, removed, true)),
            type_url::ENDPOINT => (type_url::ENDPOINT, self.update_endpoints(updated, removed)),
            type_url::LISTENER => (type_url::LISTENER, self.update_listeners(updated, removed, true)),
            type_url::ROUTE => (type_url::ROUTE, self.update_routes(updated, removed)),
            type_url::SECRET => (type_url::SECRET, self.update_secrets(origin, updated, removed)),
            _ => return Vec::new(),
        };
        // Of an update that is refused as a whole there is no version.
        let applied = refused.is_empty() || self.changes.of(of) > before;
        if let Some(version) = version.filter(|_| applied) {
            self.types.entry(key).or_default().version = ArcStrOrEmpty(version);
        }
        if matches!(key, type_url::CLUSTER | type_url::LISTENER) {
            self.updates.entry((key, "".into())).or_default().count(refused.is_empty());
        } else {
            for name in names {
                let accepted = refused.iter().all(|(refused, _)| *refused != name);
                self.updates.entry((key, name)).or_default().count(accepted);
            }
        }
        self.awaiting.remove(key);
        self.follow_listeners();
        refused
    }

    /// True once nothing that readiness depends on is missing, and from then on: what comes later waits beside what serves.
    pub(crate) fn ready(&self) -> Result<(), String> {
        if self.was_ready.get() {
            return Ok(());
        }
        // In the order in which they are asked for.
        let first = |of: &&str| self.awaiting.contains(of) && (**of == *type_url::CLUSTER || self.warming.is_empty());
        if let Some(of) = [type_url::CLUSTER, type_url::LISTENER].iter().find(|of| first(of)) {
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
    pub(crate) fn changes(&self) -> [(&'static str, u64); 10] {
        let Changes { clusters, listeners, in_place, refused_listeners } = &self.changes;
        [
            ("cluster_manager.cluster_added", clusters[ADDED]),
            ("cluster_manager.cluster_modified", clusters[MODIFIED]),
            ("cluster_manager.cluster_removed", clusters[REMOVED]),
            ("listener_manager.listener_added", listeners[ADDED]),
            ("listener_manager.listener_modified", listeners[MODIFIED]),
            ("listener_manager.listener_removed", listeners[REMOVED]),
            ("listener_manager.listener_in_place_updated", *in_place),
            ("listener_manager.listener_stopped", self.stopped.len() as u64),
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
        let mut seen = HashSet::new();
        for incoming in updated {
            let put = match seen.insert(incoming.name.clone()) {
                true => self.put_cluster(&incoming, dynamic),
                false => Err(format!("duplicate cluster {} found", incoming.name)),
            };
            if let Err(reason) = put {
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
        let newest = self.warming.get(&incoming.name).or_else(|| self.clusters.get(&incoming.name));
        if newest.is_some_and(|newest| newest.body == incoming.body) {
            return Ok(());
        }
        let decode = |body: &Bytes| pb::envoy::config::cluster::v3::Cluster::decode(body.clone());
        let message = decode(&incoming.body).map_err(|e| format!("malformed: {e}"))?;
        let cluster = Cluster::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = cluster.name.clone();
        if dynamic {
            self.check_tls(cluster.transport.tls_contexts().map(|tls| &tls.common))?;
        }
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
        if let Some(old) = self.clusters.get(&name) {
            // To its statistics it is still the same cluster.
            entry.membership_changes.fetch_add(old.membership_changes.load(Ordering::Relaxed), Ordering::Relaxed);
        }
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

    /// Puts a cluster's endpoints into use.
    pub(crate) fn put_endpoints(&self, entry: &ClusterEntry, endpoints: Endpoints) {
        if entry.set_endpoints(Arc::new(endpoints)) && entry.cluster.close_on_change {
            self.tell(|| Command::DrainCluster(entry.cluster.name.clone()));
        }
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
        self.put_endpoints(entry, endpoints);
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
        self.follow_listeners();
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
        // First, because a new one may have the address of one that goes.
        for name in removed {
            self.warming_listeners.remove(name);
            if self.listeners.get(name).is_some_and(|l| l.dynamic) {
                self.drop_listener(name);
            }
        }
        self.failed.clear();
        self.last_failed.clear();
        let mut seen = HashSet::new();
        for incoming in updated {
            let again = !seen.insert(incoming.name.clone());
            let put = match again {
                true => Err(format!("duplicate listener {} found", incoming.name)),
                false => self.put_listener(&incoming, dynamic),
            };
            if let Err(reason) = put {
                self.fail(&incoming.name, &incoming.body, &reason, !again);
                refused.push((incoming.name, reason));
            }
        }
        // Subscriptions first: a listener may wait for routes that nobody asked for yet.
        self.subscribe();
        refused.extend(self.finish_listeners());
        self.publish_listeners();
        refused
    }

    /// Takes note of a listener that was refused; `known`: under its name.
    fn fail(&mut self, name: &ArcStr, body: &Bytes, details: &str, known: bool) {
        let failed = Arc::new(Failed { body: body.clone(), details: details.to_owned(), at: SystemTime::now() });
        if known {
            self.failed.insert(name.clone(), failed.clone());
        }
        self.last_failed.push(failed);
    }

    /// Listeners whose last state was refused, and what was refused of the last update.
    pub(crate) fn failed_listeners(&self) -> (impl Iterator<Item = (&ArcStr, &Failed)>, impl Iterator<Item = &Failed>) {
        (self.failed.iter().map(|(name, failed)| (name, &**failed)), self.last_failed.iter().map(|failed| &**failed))
    }

    fn put_listener(&mut self, incoming: &Incoming, dynamic: bool) -> Result<(), String> {
        let old = self.listeners.get(&incoming.name).cloned();
        let newest = self.warming_listeners.get(&incoming.name).or(old.as_ref());
        if newest.is_some_and(|newest| newest.body == incoming.body) {
            return Ok(());
        }
        if dynamic && old.as_ref().is_some_and(|old| !old.dynamic) {
            return Err("a static listener of that name exists".into());
        }
        let decode = |body: &Bytes| pb::envoy::config::listener::v3::Listener::decode(body.clone());
        let message = decode(&incoming.body).map_err(|e| format!("malformed: {e}"))?;
        let mut listener = Listener::compile(&message, &self.options).map_err(|e| e.to_string())?;
        let name = listener.name.clone();
        if self.is_stopped(&listener) {
            tracing::debug!(listener = &*name, "not taken, as listeners of its direction were stopped");
            return Ok(());
        }
        if let Some(old) = &old {
            if old.listener.reuse_port != listener.reuse_port {
                return Err("reuse port cannot be changed during an update".into());
            }
            listener.replaces(&old.listener);
        }
        if let Some(address) = self.address_in_use(&listener) {
            return Err(format!(
                "error adding listener: '{name}' has duplicate address '{address}' as existing listener"
            ));
        }
        if dynamic {
            if let Some(cluster) = self.unknown_cluster(&listener) {
                return Err(format!("route: unknown cluster '{cluster}'"));
            }
            self.check_tls(tls_of(&listener))?;
        }
        for path in log_files(&listener) {
            self.shared.logs.open(path).map_err(|e| format!("unable to open file '{path}': {e}"))?;
        }
        let known = old.is_some() || self.warming_listeners.contains_key(&name);
        self.changes.listeners[if known { MODIFIED } else { ADDED }] += 1;
        let in_place = old.as_ref().is_some_and(|old| decode(&old.body).is_ok_and(|old| same_but_chains(old, message)));
        self.changes.in_place += u64::from(in_place);
        let mut entry = ListenerEntry::new(
            Arc::new(listener),
            incoming.body.clone(),
            incoming.version.clone(),
            dynamic,
            old.as_deref(),
            &self.shared.routes,
        );
        entry.in_place = in_place;
        let entry = Arc::new(entry);
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
        if let Err(reason) = self.bind(&entry) {
            self.changes.refused_listeners += 1;
            // It was counted when it came, and is not what it was counted for.
            let known = self.listeners.contains_key(&name);
            let counted = &mut self.changes.listeners[if known { MODIFIED } else { ADDED }];
            *counted = counted.saturating_sub(1);
            self.fail(&name, &entry.body, &reason, true);
            return Err(reason);
        }
        if let Some(old) = self.listeners.insert(name, entry.clone()) {
            self.let_go(old, Some(&entry));
        }
        Ok(())
    }

    fn drop_listener(&mut self, name: &ArcStr) {
        if let Some(entry) = self.forget_listener(name) {
            self.let_go(entry, None);
        }
    }

    /// An address that another listener has already. Those that bind any port can have no conflict.
    fn address_in_use(&self, listener: &Listener) -> Option<Address> {
        let addresses =
            |l: &Listener| std::iter::once(&l.address).chain(&l.additional_addresses).cloned().collect::<Vec<_>>();
        let own = addresses(listener);
        let all = self.listeners.values().chain(self.warming_listeners.values()).map(|entry| &entry.listener);
        let others = all.filter(|other| other.name != listener.name && other.bind_to_port == listener.bind_to_port);
        others.flat_map(|other| addresses(other)).find(|address| {
            let any_port = address.socket().is_some_and(|socket| socket.port() == 0);
            !(any_port && listener.bind_to_port) && own.contains(address)
        })
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
            if let Some(real) = self.listeners.get(&listener.name).and_then(|old| old.addresses.get()) {
                // A state of a listener starts once.
                let _ = entry.addresses.set(real.clone());
            }
            return Ok(());
        }
        let mut real = Vec::with_capacity(addresses.len());
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
            // Port 0 is the same one for all workers.
            let address = first.address().unwrap_or_else(|| address.clone());
            for list in sockets.iter_mut().skip(1) {
                let bound = match (&first, own_sockets) {
                    (_, true) => socket::listen(&address, options).map_err(fail)?,
                    (Bound::Tcp(s), false) => Bound::Tcp(s.try_clone().map_err(fail)?),
                    (Bound::Unix(s), false) => Bound::Unix(s.try_clone().map_err(fail)?),
                };
                list.push(bound);
            }
            sockets[0].push(first);
            real.push(address);
        }
        // As above.
        let _ = entry.addresses.set(real);
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
            let compiled = compiled.and_then(|table| match self.unknown_in(&table, false) {
                Some(cluster) => Err(format!("route: unknown cluster '{cluster}'")),
                None => Ok(table),
            });
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
        let (certificates, validations) = self.wanted_kinds();
        for incoming in updated {
            self.secret_versions.insert(incoming.name.clone(), (incoming.version.clone(), SystemTime::now()));
            let done = pb::envoy::extensions::transport_sockets::tls::v3::Secret::decode(incoming.body.clone())
                .map_err(|e| format!("malformed: {e}"))
                .and_then(|m| Secret::compile(&m).map_err(|e| e.to_string()))
                .and_then(|secret| {
                    // Of what nobody asks for by now the kind does not matter.
                    let (certificate, validation) =
                        (certificates.contains(&incoming.name), validations.contains(&incoming.name));
                    let fits = match &secret {
                        Secret::Certificate { .. } => certificate || !validation,
                        Secret::Validation { .. } => validation || !certificate,
                        Secret::Generic { .. } => !certificate && !validation,
                    };
                    fits.then_some(secret).ok_or_else(|| "unexpected kind of secret".to_owned())
                })
                .and_then(|s| self.shared.secrets.set(origin, s).map_err(|e| e.to_string()));
            if let Err(reason) = done {
                refused.push((incoming.name, reason));
            }
        }
        for name in removed {
            // What is in use goes only with whoever uses it (Envoy `SdsApi::onConfigUpdate`).
            tracing::debug!(%name, "secret removed by the control plane");
        }
        self.secrets_came();
        refused
    }

    /// Names of secrets that certificates, and that roots, are asked for by.
    fn wanted_kinds(&self) -> (BTreeSet<ArcStr>, BTreeSet<ArcStr>) {
        let (mut certificates, mut validations) = (BTreeSet::new(), BTreeSet::new());
        let listeners = self.listeners.values().chain(self.warming_listeners.values());
        let of_listeners = listeners.flat_map(|entry| tls_of(&entry.listener));
        let clusters = self.clusters.values().chain(self.warming.values());
        let of_clusters = clusters.flat_map(|entry| entry.cluster.transport.tls_contexts().map(|tls| &tls.common));
        for common in of_listeners.chain(of_clusters) {
            for certificate in &common.certificates {
                if let CertificateSource::Sds(sds) = certificate {
                    certificates.insert(sds.name.clone());
                }
            }
            validations.extend(common.validation.sds.iter().map(|sds| sds.name.clone()));
        }
        (certificates, validations)
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
    }

    /// Stops accepting, for good (Envoy `ListenerManagerImpl::stopListeners`).
    pub(crate) fn stop_listeners(&mut self, inbound_only: bool) {
        if self.stops != Some(Stops::All) {
            self.stops = Some(if inbound_only { Stops::Inbound } else { Stops::All });
        }
        let all = self.listeners.values().map(|entry| &entry.listener);
        let stopped: Vec<ArcStr> = all.filter(|listener| self.is_stopped(listener)).map(|l| l.name.clone()).collect();
        for name in stopped {
            if self.bound.remove(&name).is_some() {
                self.tell(|| Command::StopListening(name.clone()));
            }
            self.stopped.insert(name);
        }
    }

    fn is_stopped(&self, listener: &Listener) -> bool {
        match self.stops {
            None => false,
            Some(Stops::Inbound) => listener.direction == Direction::Inbound,
            Some(Stops::All) => true,
        }
    }

    /// Cuts all connections off and ends the workers.
    pub(crate) fn shutdown(&self) {
        self.cut_all();
        self.tell(|| Command::Shutdown);
    }

    /// A name in a static route of a cluster that does not exist, as Envoy checks them at start.
    pub(crate) fn unknown_clusters(&self) -> Option<String> {
        let all = self.listeners.values().chain(self.warming_listeners.values());
        let unknown = all.flat_map(|entry| self.unknown_cluster(&entry.listener)).next();
        unknown.map(|name| format!("route: unknown cluster '{name}'"))
    }

    /// A cluster that a route table names and that does not exist; `default`: whether one looks for that unless the table says.
    fn unknown_in(&self, table: &RouteTable, default: bool) -> Option<ArcStr> {
        let looks = table.common.validate_clusters.unwrap_or(default);
        looks.then(|| table.cluster_names().find(|name| !self.has_cluster(name)).cloned()).flatten()
    }

    /// Likewise of one listener's inline routes.
    fn unknown_cluster(&self, listener: &Listener) -> Option<ArcStr> {
        listener.all_chains().find_map(|chain| match &chain.terminal {
            Terminal::Http(hcm) => match &hcm.routes {
                Routes::Inline(table) => self.unknown_in(table, true),
                Routes::Rds { .. } => None,
            },
            Terminal::TcpProxy(_) | Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => None,
        })
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

    /// Whether something can be done with TLS contexts, as far as that is known yet.
    fn check_tls<'a>(&self, mut contexts: impl Iterator<Item = &'a TlsCommon>) -> Result<(), String> {
        contexts
            .try_for_each(|common| tls::check(common, &self.shared.secrets))
            .map_err(|e| format!("TLS context: {e}"))
    }

    fn has_cluster(&self, name: &ArcStr) -> bool {
        self.clusters.contains_key(name) || self.warming.contains_key(name)
    }
}

/// Whether two states of a listener differ in their filter chains only.
fn same_but_chains(
    mut one: pb::envoy::config::listener::v3::Listener,
    mut other: pb::envoy::config::listener::v3::Listener,
) -> bool {
    for listener in [&mut one, &mut other] {
        listener.filter_chains.clear();
        listener.default_filter_chain = None;
    }
    one == other
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
