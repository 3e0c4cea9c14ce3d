//! The configuration's one writer: compiles resources, warms them, publishes tables, binds sockets.
//!
//! A resource that is refused leaves its former state in use; everything else of the same update is applied.

mod clusters;
mod leaving;
mod listeners;
mod updates;
mod warming;

use crate::runtime::{ClusterEntry, ListenerEntry, Shared};
use crate::sources::Demand;
use crate::tls;
use crate::worker::Command;
use ads::client::{Subscriptions, Wanted};
use bytes::Bytes;
use envoy_api::{Message, pb, type_url};
use mesh_types::ArcStr;
use proxy_core::cluster::{Discovery, NameCache};
use proxy_core::config_source::{ConfigSource, Origin};
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use proxy_core::tls::{CertificateSource, SdsRef, Secret, TlsCommon};
use proxy_core::{Address, Listener, Options, RouteTable, Runtime};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc::UnboundedSender;

pub(crate) use leaving::Leaving;
use updates::Taken;
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
    /// How often hosts of clusters in use came or went.
    hosts: u64,
    listeners: [u64; 3],
    /// How often a worker began to serve one.
    served: u64,
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

    /// How often a cluster came or changed.
    fn clusters_put(&self) -> u64 {
        self.clusters[ADDED] + self.clusters[MODIFIED]
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

/// A secret that came, from whom and when.
pub(crate) struct TakenSecret {
    origin: Origin,
    pub(crate) version: ArcStr,
    pub(crate) at: SystemTime,
    body: Bytes,
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
    /// The caches of names that clusters and filters ever asked for.
    name_caches: HashMap<ArcStr, Arc<NameCache>>,
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
    /// The types of which all resources are asked for, and of whom.
    all_of: Vec<(&'static str, Origin)>,
    /// The stream to the control plane is open.
    connected: bool,
    /// The secrets that came, by their names.
    pub(crate) taken_secrets: BTreeMap<ArcStr, TakenSecret>,
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
            name_caches: HashMap::new(),
            bound: HashMap::new(),
            stopped: BTreeSet::new(),
            stops: None,
            changes: Changes::default(),
            subscriptions: Subscriptions::new(),
            types: BTreeMap::new(),
            updates: BTreeMap::new(),
            all_of: Vec::new(),
            connected: false,
            taken_secrets: BTreeMap::new(),
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
            self.all_of.push((of, source.origin.clone()));
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

    /// Applies one response of whoever was asked; `version`: of all of it.
    pub(crate) fn update(
        &mut self,
        origin: &Origin,
        of: &str,
        version: &ArcStr,
        updated: Vec<Incoming>,
        removed: &[ArcStr],
    ) -> Refused {
        let names: BTreeSet<ArcStr> = updated.iter().map(|u| u.name.clone()).collect();
        let began = Instant::now();
        let before = self.changes.of(of);
        let put = self.changes.clusters_put();
        let (key, refused) = match of {
            type_url::CLUSTER => (type_url::CLUSTER, self.update_clusters(updated, removed, true)),
            type_url::ENDPOINT => (type_url::ENDPOINT, self.update_endpoints(updated, removed)),
            type_url::LISTENER => (type_url::LISTENER, self.update_listeners(updated, removed, true)),
            type_url::ROUTE => (type_url::ROUTE, self.update_routes(updated, removed)),
            type_url::SECRET => (type_url::SECRET, self.update_secrets(origin, updated, removed)),
            _ => return Vec::new(),
        };
        // As in Envoy, an update by which nothing changes leaves the version.
        if self.changes.of(of) > before {
            self.types.entry(key).or_default().version = ArcStrOrEmpty(version.clone());
        }
        let taken = Taken { version: version.clone(), took: began.elapsed() };
        if matches!(key, type_url::CLUSTER | type_url::LISTENER) {
            let reloads = refused.is_empty() && self.changes.clusters_put() > put;
            let updates = self.updates.entry((key, "".into())).or_default();
            updates.count(refused.is_empty().then_some(taken));
            if reloads {
                updates.reload();
            }
        } else {
            // A response of which anything is refused is so for all who asked for the type (Envoy `WatchMap::onConfigUpdateFailed`).
            if *origin == Origin::Ads && !refused.is_empty() {
                let all = self
                    .updates
                    .iter_mut()
                    .filter(|((of, name), _)| *of == key && refused.iter().all(|(r, _)| r != name));
                all.for_each(|(_, updates)| updates.count(None));
            }
            for name in names {
                let accepted = refused.iter().all(|(refused, _)| *refused != name);
                self.updates.entry((key, name)).or_default().count(accepted.then(|| taken.clone()));
            }
        }
        self.awaiting.remove(key);
        for (name, _) in &refused {
            self.wait_no_more(key, Some(name));
        }
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
    pub(crate) fn changes(&self) -> [(&'static str, u64); 11] {
        let Changes { clusters, hosts, listeners, served, in_place, refused_listeners } = &self.changes;
        [
            ("cluster_manager.cluster_added", clusters[ADDED]),
            ("cluster_manager.cluster_modified", clusters[MODIFIED]),
            ("cluster_manager.cluster_removed", clusters[REMOVED]),
            ("cluster_manager.cluster_updated", *hosts),
            ("listener_manager.listener_added", listeners[ADDED]),
            ("listener_manager.listener_modified", listeners[MODIFIED]),
            ("listener_manager.listener_removed", listeners[REMOVED]),
            ("listener_manager.listener_in_place_updated", *in_place),
            ("listener_manager.listener_stopped", self.stopped.len() as u64),
            ("listener_manager.listener_create_success", *served),
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

    fn tell(&self, command: impl Fn() -> Command) {
        for worker in &self.workers {
            // A worker that is gone takes the process with it.
            let _ = worker.send(command());
        }
    }

    /// All listeners that serve or will serve, and those whose last connections do.
    fn all_listeners(&self) -> impl Iterator<Item = &Arc<ListenerEntry>> {
        let leaving = self.leaving.iter().map(|leaving| &leaving.entry);
        self.listeners.values().chain(self.warming_listeners.values()).chain(leaving)
    }

    fn rds_names(&self) -> BTreeSet<ArcStr> {
        let all = self.all_listeners();
        all.flat_map(|l| l.listener.rds_names().cloned().collect::<Vec<_>>()).collect()
    }

    /// Routes that listeners want, with whom they are asked of.
    fn wanted_routes(&self) -> impl Iterator<Item = (&ArcStr, &ConfigSource)> {
        self.all_listeners().flat_map(|l| rds_sources(&l.listener))
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
                    self.updates.entry((type_url::ROUTE, incoming.name)).or_default().reload();
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
        for Incoming { name, version, body } in updated {
            // One that did not change keeps its version, too.
            if self.taken_secrets.get(&name).is_some_and(|taken| taken.origin == *origin && taken.body == body) {
                continue;
            }
            let done = pb::envoy::extensions::transport_sockets::tls::v3::Secret::decode(body.clone())
                .map_err(|e| format!("malformed: {e}"))
                .and_then(|m| Secret::compile(&m).map_err(|e| e.to_string()))
                .and_then(|secret| {
                    // Of what nobody asks for by now the kind does not matter.
                    let (certificate, validation) = (certificates.contains(&name), validations.contains(&name));
                    let fits = match &secret {
                        Secret::Certificate { .. } => certificate || !validation,
                        Secret::Validation { .. } => validation || !certificate,
                        Secret::Generic { .. } => !certificate && !validation,
                    };
                    fits.then_some(secret).ok_or_else(|| "unexpected kind of secret".to_owned())
                })
                .and_then(|s| self.shared.secrets.set(origin, s).map_err(|e| e.to_string()));
            match done {
                Ok(()) => drop(
                    self.taken_secrets
                        .insert(name, TakenSecret { origin: origin.clone(), version, at: SystemTime::now(), body }),
                ),
                Err(reason) => refused.push((name, reason)),
            }
        }
        for name in removed {
            // What is in use goes only with whoever uses it (Envoy `SdsApi::onConfigUpdate`).
            tracing::debug!(%name, "secret removed by the control plane");
        }
        self.secrets_came();
        refused
    }

    /// Forgets the secrets that nothing in use names any more.
    fn forget_secrets(&mut self, wanted: &BTreeSet<Demand>) {
        let secrets = &self.shared.secrets;
        self.taken_secrets.retain(|name, taken| {
            let demand = Demand { origin: taken.origin.clone(), type_url: type_url::SECRET, name: Some(name.clone()) };
            let used = taken.origin == Origin::Static || wanted.contains(&demand);
            if !used {
                secrets.remove(&taken.origin, name);
            }
            used
        });
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

    /// The resources that are wanted by their names now, and of whom.
    fn wanted(&self) -> BTreeSet<Demand> {
        let mut wanted = BTreeSet::new();
        let mut want = |type_url: &'static str, name: &ArcStr, source: &ConfigSource| {
            wanted.insert(Demand { origin: source.origin.clone(), type_url, name: Some(name.clone()) });
        };
        let clusters = || self.clusters.values().chain(self.warming.values());
        let mut secrets = BTreeSet::new();
        for cluster in clusters() {
            if let Discovery::Eds { service_name, source, .. } = &cluster.cluster.discovery {
                want(type_url::ENDPOINT, service_name, source);
            }
            for tls in cluster.cluster.transport.tls_contexts() {
                sds_refs(&tls.common, &mut secrets);
            }
        }
        for (name, source) in self.wanted_routes() {
            want(type_url::ROUTE, name, source);
        }
        for listener in self.all_listeners() {
            tls_of(&listener.listener).for_each(|common| sds_refs(common, &mut secrets));
        }
        for secret in secrets {
            if !(self.own_certificate && tls::is_workload(&secret.name)) {
                want(type_url::SECRET, &secret.name, &secret.source);
            }
        }
        wanted
    }

    /// Tells the control plane, and whoever else is asked, which named resources are wanted now.
    pub(crate) fn subscribe(&mut self) {
        let mut wanted = self.wanted();
        self.forget_secrets(&wanted);
        let named: BTreeSet<_> = wanted.iter().filter_map(|d| Some((d.type_url, d.name.clone()?))).collect();
        // Those of which all resources are asked for have no name.
        self.updates.retain(|of, _| of.1.is_empty() || named.contains(of));
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
