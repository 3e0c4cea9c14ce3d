//! The state of the mesh: one writer, any number of readers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use config_store::{Body, Change, Key, Kind, Object, Rejected, Snapshot, Store};
use istio_api::{MeshConfig, MeshNetworks};
use manifest::Document;
use push_context::{Keys, PushContext};
use registry::GatewayAddresses;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::metrics::{Metrics, Published};
use crate::push_status::without_pods;

/// Updates that may wait while a snapshot is built; senders wait beyond it.
const QUEUE: usize = 1024;

/// The longest rest between two snapshots under constant change.
const LONGEST_REST: Duration = Duration::from_millis(100);

/// A change of the configuration.
#[derive(Debug)]
pub enum Update {
    /// Store an object that is known to be good.
    Upsert(Box<Object>),
    /// Read, check and store a manifest.
    Apply(Box<Document>),
    /// Store what was read of a manifest, and checked; a fraction of the manifest's size.
    Read(Box<Reading>),
    /// Remove an object.
    Delete(Key),
    /// Keys of token issuers, in place of all before.
    Keys(Keys),
    /// MeshNetworks of a file, which hold over those of the ConfigMap.
    Networks(Arc<MeshNetworks>),
    /// Addresses of networks' gateways that are given by name, in place of all before.
    GatewayAddresses(GatewayAddresses),
}

/// What [`Object::read`] makes of a manifest.
pub type Reading = Result<(Object, Vec<manifest::Error>), Rejected>;

impl Update {
    /// Reads and checks a manifest now.
    pub fn read(document: &Document) -> Update {
        Update::Read(Box::new(Object::read(document)))
    }

    /// The object that it is about; `None` when that is of no known kind.
    pub(crate) fn key(&self) -> Option<Key> {
        match self {
            Update::Upsert(object) => Some(object.key.clone()),
            Update::Apply(document) => Key::of(document),
            Update::Read(reading) => match &**reading {
                Ok((object, _)) => Some(object.key.clone()),
                Err(rejected) => rejected.key.clone(),
            },
            Update::Delete(key) => Some(key.clone()),
            Update::Keys(_) | Update::Networks(_) | Update::GatewayAddresses(_) => None,
        }
    }
}

/// Everything at one moment. Never changes.
#[derive(Debug)]
pub struct State {
    /// Grows by one with every snapshot; 0 before the first.
    pub revision: u64,
    /// The objects.
    pub snapshot: Snapshot,
    /// The indexes made from them.
    pub push: Arc<PushContext>,
    /// The mesh's settings, ConfigMap included.
    pub mesh: Arc<MeshConfig>,
}

/// What a batch of updates led to.
type Answer = (u64, Vec<Rejected>);

struct Request {
    updates: Vec<Update>,
    answer: oneshot::Sender<Answer>,
    received: Instant,
}

/// The readers' side. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// Replaced whole; the lock covers the pointer only.
    current: Arc<RwLock<Arc<State>>>,
    revision: watch::Receiver<u64>,
    requests: mpsc::Sender<Request>,
}

/// The writer's side: run it as a task.
pub(crate) struct Writer {
    store: Store,
    base_mesh: Arc<MeshConfig>,
    mesh: Arc<MeshConfig>,
    settings: push_context::Settings,
    /// A file says what networks there are.
    has_networks_file: bool,
    /// The last context: the next takes from it what has not changed.
    push: Arc<PushContext>,
    mesh_config_map: Key,
    current: Arc<RwLock<Arc<State>>>,
    revision: watch::Sender<u64>,
    requests: mpsc::Receiver<Request>,
    metrics: Arc<Metrics>,
    /// How many changes of each sort the next snapshot has.
    reasons: BTreeMap<&'static str, u64>,
    /// EndpointSlices that the next snapshot has anew.
    slices: BTreeSet<Key>,
    /// The next snapshot has other keys of issuers, or other networks.
    has_news: bool,
}

/// The name of the ConfigMap with this revision's MeshConfig.
pub(crate) fn mesh_config_map(revision: &str) -> String {
    if revision.is_empty() || revision == "default" { "istio".into() } else { format!("istio-{revision}") }
}

/// An empty world and its writer.
///
/// MeshConfig comes from `mesh`, with the ConfigMap `istio` (`istio-REVISION`) of the root namespace laid over
/// it whenever there is one.
pub(crate) fn new(
    mesh: MeshConfig,
    revision: &str,
    settings: push_context::Settings,
    metrics: Arc<Metrics>,
) -> (World, Writer) {
    let mesh_config_map = Key::new(Kind::ConfigMap, &mesh.root_namespace, &mesh_config_map(revision));
    let mesh = Arc::new(mesh);
    let store = Store::new();
    let snapshot = store.snapshot();
    let push = Arc::new(PushContext::build(&snapshot, &mesh, &settings));
    let state = Arc::new(State { revision: 0, snapshot, push: push.clone(), mesh: mesh.clone() });
    let current = Arc::new(RwLock::new(state));
    let (revision, watched) = watch::channel(0);
    let (sender, requests) = mpsc::channel(QUEUE);
    let world = World { current: current.clone(), revision: watched, requests: sender };
    let base_mesh = mesh.clone();
    let reasons = BTreeMap::new();
    let has_networks_file = !settings.networks.networks.is_empty();
    let writer = Writer {
        store,
        base_mesh,
        mesh,
        settings,
        has_networks_file,
        push,
        mesh_config_map,
        current,
        revision,
        requests,
        metrics,
        reasons,
        slices: BTreeSet::new(),
        has_news: false,
    };
    (world, writer)
}

impl World {
    /// The latest state.
    pub(crate) fn current(&self) -> Arc<State> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the latest revision.
    pub(crate) fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.clone()
    }

    /// Applies updates as one snapshot and waits until readers see it.
    pub(crate) async fn update(&self, updates: Vec<Update>) -> Answer {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send(Request { updates, answer, received: Instant::now() }).await.is_ok();
        // The writer ends only with the control plane itself; nothing is built any more then.
        let gone = (self.current().revision, Vec::new());
        if sent { answered.await.unwrap_or(gone) } else { gone }
    }
}

impl Writer {
    /// Works until every [`World`] is dropped.
    ///
    /// There is no debounce: an update on an idle control plane is built at once. While a snapshot is built, further
    /// updates gather and become the next one; under constant change the writer rests as long as it worked.
    pub(crate) async fn run(mut self) {
        while let Some(first) = self.requests.recv().await {
            let started = Instant::now();
            let mut batch = vec![first];
            while let Ok(more) = self.requests.try_recv() {
                batch.push(more);
            }
            let more = self.build(batch);
            let worked = started.elapsed();
            if more || !self.requests.is_empty() {
                tokio::time::sleep(worked.min(LONGEST_REST)).await;
            }
        }
    }

    /// Applies a batch, publishes the result; whether the batch was more than one request.
    fn build(&mut self, batch: Vec<Request>) -> bool {
        let more = batch.len() > 1;
        let received = batch.first().map_or_else(Instant::now, |request| request.received);
        let before = self.store.snapshot();
        let mut answers = Vec::with_capacity(batch.len());
        for request in batch {
            let mut rejected = Vec::new();
            for update in request.updates {
                if let Err(error) = self.apply(update) {
                    warn!("{error}");
                    let name = error.key.as_ref().map(|key| format!("{}/{}", key.namespace, key.name));
                    self.metrics.rejected(error.key.as_ref().map(|key| key.kind), &name.unwrap_or_default());
                    rejected.push(error);
                }
            }
            answers.push((request.answer, rejected));
        }
        let snapshot = self.store.snapshot();
        let first = *self.revision.borrow() == 0;
        if first || std::mem::take(&mut self.has_news) || snapshot.revision() != before.revision() {
            self.publish(&before, snapshot, received);
        }
        let revision = *self.revision.borrow();
        for (answer, rejected) in answers {
            // Who asked may have gone away; the update holds all the same.
            let _ = answer.send((revision, rejected));
        }
        more
    }

    fn apply(&mut self, update: Update) -> Result<(), Rejected> {
        let change = match update {
            Update::Upsert(object) => Some(self.store.upsert(*object)),
            Update::Delete(key) => self.store.delete(&key),
            Update::Keys(keys) => {
                self.push = Arc::new(self.push.with_keys(keys));
                *self.reasons.entry("config").or_default() += 1;
                self.has_news = true;
                return Ok(());
            }
            Update::Networks(networks) => {
                self.has_networks_file = true;
                self.set_networks(networks);
                return Ok(());
            }
            Update::GatewayAddresses(addresses) => {
                self.settings.gateway_addresses = Arc::new(addresses);
                self.settings_changed();
                return Ok(());
            }
            Update::Apply(document) => return self.apply(Update::read(&document)),
            Update::Read(reading) => {
                let (object, warnings) = (*reading)?;
                for warning in warnings {
                    warn!("{}: {warning}", object.key);
                }
                Some(self.store.upsert(object))
            }
        };
        if let Some(change) = change.filter(Change::is_change) {
            let event = match change {
                Change::Added(_) => "add",
                Change::Deleted(_) => "delete",
                Change::Updated(_) | Change::Unchanged(_) => "update",
            };
            self.metrics.changed(change.key().kind, event);
            if change.key().kind == Kind::EndpointSlice {
                self.slices.insert(change.key().clone());
            }
            let reason = match change.key().kind {
                // Others have root certificates.
                Kind::ConfigMap if *change.key() != self.mesh_config_map => "secret",
                kind => reason(kind),
            };
            *self.reasons.entry(reason).or_default() += 1;
            debug!(object = %change.key(), event, "configuration changed");
        }
        Ok(())
    }

    fn set_networks(&mut self, networks: Arc<MeshNetworks>) {
        if *networks != *self.settings.networks {
            self.settings.networks = networks;
            self.settings_changed();
        }
    }

    fn settings_changed(&mut self) {
        self.push = Arc::new(self.push.with_settings(&self.settings));
        *self.reasons.entry("networks").or_default() += 1;
        self.has_news = true;
    }

    fn publish(&mut self, before: &Snapshot, snapshot: Snapshot, changed: Instant) {
        let started = Instant::now();
        if before.get(&self.mesh_config_map) != snapshot.get(&self.mesh_config_map) {
            self.read_mesh(&snapshot);
            self.read_networks(&snapshot);
            // They are part of what is published now.
            self.has_news = false;
        }
        let revision = *self.revision.borrow() + 1;
        let push = Arc::new(self.push.update(&snapshot, &self.mesh));
        self.push = push.clone();
        self.metrics.built(started.elapsed(), &snapshot);
        let slices = std::mem::take(&mut self.slices);
        let slices = slices.iter().filter_map(|key| snapshot.get(key));
        self.metrics.without_pods(slices.map(|slice| without_pods(&snapshot, slice).len()).sum());
        let state = Arc::new(State { revision, snapshot, push, mesh: self.mesh.clone() });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = state;
        let reasons = std::mem::take(&mut self.reasons);
        self.metrics.published(Published { revision, changed, at: Instant::now(), reasons });
        self.revision.send_replace(revision);
        info!(revision, took = ?started.elapsed(), "snapshot published");
    }

    /// What the ConfigMap has under a key, and what to call it in messages.
    fn in_config_map(&self, snapshot: &Snapshot, key: &str) -> (Option<String>, PathBuf) {
        let text = snapshot.get(&self.mesh_config_map).and_then(|object| match &object.body {
            Body::ConfigMap(map) => map.data.as_ref()?.get(key).cloned(),
            _ => None,
        });
        let Key { namespace, name, .. } = &self.mesh_config_map;
        (text, format!("ConfigMap {namespace}/{name}, {key}").into())
    }

    /// Takes MeshNetworks from the ConfigMap; what cannot be read leaves the last good ones.
    fn read_networks(&mut self, snapshot: &Snapshot) {
        if self.has_networks_file {
            return;
        }
        let (text, file) = self.in_config_map(snapshot, "meshNetworks");
        match text.map_or_else(|| Ok(MeshNetworks::default()), |text| MeshNetworks::load(&file, &text)) {
            Ok(networks) => self.set_networks(Arc::new(networks)),
            Err(error) => warn!("{error}; the mesh keeps its last networks"),
        }
    }

    /// Takes MeshConfig from the ConfigMap; what cannot be read leaves the last good one.
    fn read_mesh(&mut self, snapshot: &Snapshot) {
        let (text, file) = self.in_config_map(snapshot, "mesh");
        let merged = match text {
            None => Ok(self.base_mesh.as_ref().clone()),
            Some(text) => self.base_mesh.load_over(&file, &text),
        };
        match merged {
            Ok(mesh) => self.mesh = Arc::new(mesh),
            Err(error) => warn!("{error}; the mesh keeps its last settings"),
        }
    }
}

/// Why istiod would push (`TriggerReason`).
fn reason(kind: Kind) -> &'static str {
    match kind {
        Kind::EndpointSlice | Kind::Pod | Kind::Node => "endpoint",
        Kind::Service => "service",
        Kind::Secret => "secret",
        Kind::Namespace => "namespace",
        Kind::ConfigMap => "global",
        _ => "config",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn documents(yaml: &str) -> Vec<Update> {
        let documents = manifest::parse(Path::new("a.yaml"), yaml).unwrap();
        documents.into_iter().map(|document| Update::Apply(Box::new(document))).collect()
    }

    fn start() -> World {
        let (world, writer) = new(MeshConfig::builtin(), "", push_context::Settings::default(), Arc::default());
        tokio::spawn(writer.run());
        world
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n";

    #[tokio::test]
    async fn an_update_is_visible_when_it_returns_and_only_once() {
        let world = start();
        let (revision, rejected) = world.update(documents(SERVICE)).await;
        assert_eq!((revision, rejected.len()), (1, 0));
        assert_eq!(world.current().snapshot.len(Kind::Service), 1);
        assert_eq!(world.update(documents(SERVICE)).await.0, 1, "nothing changed");
        let bad = SERVICE.replace("port: 80", "port: x");
        let (revision, rejected) = world.update(documents(&bad)).await;
        assert_eq!((revision, rejected.len()), (1, 1));
    }

    #[tokio::test]
    async fn networks_follow_the_config_map_services_and_names() {
        let world = start();
        let gateways = || -> Vec<String> {
            let state = world.current();
            let all = state.push.registry.networks().gateways.all();
            all.iter().map(|gateway| format!("{} {}:{}", gateway.network, gateway.address, gateway.port)).collect()
        };
        let map = |networks: &str| {
            documents(&format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  meshNetworks: '{networks}'\n"
            ))
        };
        world
            .update(map("networks: {two: {gateways: [{address: 10.0.0.1, port: 443}, {address: gw, port: 444}]}}"))
            .await;
        assert_eq!(gateways(), ["two 10.0.0.1:443"]);
        world.update(map("networks: {two: {gateways: [{address: 10.0.0.2}]}}")).await;
        assert_eq!(gateways(), ["two 10.0.0.1:443"], "a port is missing");
        let addresses = [("gw".into(), vec!["10.0.0.3".parse().unwrap()])].into();
        let revision = world.update(vec![Update::GatewayAddresses(addresses)]).await.0;
        assert_eq!(gateways(), ["two 10.0.0.1:443", "two 10.0.0.3:444"]);
        assert_eq!(world.update(Vec::new()).await.0, revision, "nothing is new");
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: a, labels: {topology.istio.io/network: three}}\n\
            spec: {type: LoadBalancer, ports: [{port: 15443}]}\nstatus: {loadBalancer: {ingress: [{ip: 10.0.0.4}]}}\n";
        world.update(documents(service)).await;
        assert_eq!(gateways(), ["two 10.0.0.1:443", "two 10.0.0.3:444", "three 10.0.0.4:15443"]);
        let file = MeshNetworks::load(Path::new("n"), "networks: {one: {gateways: [{address: 10.0.0.9, port: 1}]}}");
        world.update(vec![Update::Networks(Arc::new(file.unwrap()))]).await;
        world.update(map("")).await;
        assert_eq!(gateways(), ["three 10.0.0.4:15443", "one 10.0.0.9:1"], "the file holds");
    }

    #[tokio::test]
    async fn the_config_map_changes_the_mesh_and_a_bad_one_does_not() {
        let world = start();
        let map = |mesh: &str| {
            documents(&format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: '{mesh}'\n"
            ))
        };
        world.update(map("trustDomain: td")).await;
        assert_eq!(world.current().mesh.trust_domain, "td");
        world.update(map("trustDomain: [")).await;
        assert_eq!(world.current().mesh.trust_domain, "td");
        world.update(vec![Update::Delete(Key::new(Kind::ConfigMap, "istio-system", "istio"))]).await;
        assert_eq!(world.current().mesh.trust_domain, "cluster.local");
    }
}
