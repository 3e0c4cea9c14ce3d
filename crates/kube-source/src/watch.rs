//! Lists and watches, merged into batches.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::time::Duration;

use config_store::{Key, Kind, Object, Rejected};
use futures::{FutureExt, Stream, StreamExt};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api as KubeApi;
use kube::api::{DynamicObject, PartialObjectMeta};
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::{Backoff, ResetTimerBackoff};
use kube::runtime::watcher::{self, Event};
use tokio::sync::mpsc;
use tokio_stream::StreamMap;
use tracing::{debug, info, warn};

use crate::kinds::{self, Api};
use crate::{Cluster, Notice};

/// The largest batch, so that a reader sees something even while everything changes.
const MOST: usize = 20_000;

/// How soon after an error the server is asked again, and how long at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));
/// A watch that went well for so long starts with short pauses again.
const HEALTHY: Duration = Duration::from_secs(30);
/// How often the server is asked whether a kind whose CRD is new is served yet.
const DISCOVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Secrets that certainly hold no certificates, of which clusters have many (istiod's `SecretsFieldSelector`).
const SECRETS: &str = "type!=helm.sh/release.v1,type!=kubernetes.io/service-account-token";

/// A difference to what was said before.
#[derive(Debug)]
pub enum Change {
    /// The object is new or says something else: read and checked, with warnings, or refused.
    Apply(Box<Result<(Object, Vec<manifest::Error>), Rejected>>),
    /// The object is gone.
    Delete(Key),
}

/// Tells the watches apart.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Watch {
    /// All objects of a kind.
    Kind(Kind),
    /// ConfigMaps with certificates that proxies may be told to trust.
    Roots,
    /// Which CRDs there are.
    Crds,
}

enum Item {
    Object(Event<DynamicObject>),
    Crd(Event<PartialObjectMeta<CustomResourceDefinition>>),
}

type Items = Pin<Box<dyn Stream<Item = Result<Item, watcher::Error>> + Send>>;

/// What a watch has told so far.
#[derive(Default)]
struct Told {
    api_version: String,
    known: HashSet<Key>,
    /// The keys of a list that is being read.
    listing: Option<HashSet<Key>>,
    listed: bool,
    failing: bool,
}

struct Watcher {
    cluster: Cluster,
    /// Namespace and name of the mesh's ConfigMap.
    mesh: (String, String),
    streams: StreamMap<Watch, Items>,
    told: HashMap<Watch, Told>,
    /// Kinds that have a CRD but are not watched yet.
    pending: HashSet<Kind>,
    batch: Vec<Change>,
}

impl Cluster {
    /// Watches all that sidecars are made of, until nobody listens. The first batch is complete: it is sent when every
    /// kind that the server serves has been listed.
    ///
    /// Of ConfigMaps `mesh`, a namespace and a name, is read, and of the others the root certificates in them.
    pub async fn watch(&self, mesh: (String, String), batches: mpsc::Sender<Vec<Change>>) {
        let mut watcher = Watcher {
            cluster: self.clone(),
            mesh,
            streams: StreamMap::new(),
            told: HashMap::new(),
            pending: HashSet::new(),
            batch: Vec::new(),
        };
        watcher.start();
        watcher.run(batches).await;
    }

    /// The version in which the server serves each of `kinds`.
    pub(crate) async fn served(&self, kinds: &HashSet<Kind>) -> Result<Vec<(&'static Api, ApiResource)>, kube::Error> {
        let groups = self.client.list_api_groups().await?;
        let mut lists: HashMap<String, HashSet<String>> = HashMap::new();
        for group in groups.groups.iter().filter(|group| kinds.iter().any(|kind| kind.group() == group.name)) {
            for version in &group.versions {
                let resources = self.client.list_api_group_resources(&version.group_version).await?;
                let plurals = resources.resources.into_iter().map(|resource| resource.name).collect();
                lists.insert(version.group_version.clone(), plurals);
            }
        }
        let served = kinds::CUSTOM.iter().filter(|api| kinds.contains(&api.kind)).filter_map(|api| {
            let resources = api.versions.iter().map(|version| api.resource(version));
            let mut served = resources
                .filter(|resource| lists.get(&resource.api_version).is_some_and(|list| list.contains(api.plural)));
            served.next().map(|resource| (api, resource))
        });
        Ok(served.collect())
    }
}

impl Watcher {
    fn start(&mut self) {
        for api in &kinds::CORE {
            self.watch_kind(api.kind, &api.resource(api.versions[0]), watcher::Config::default());
        }
        let config_maps = ApiResource {
            group: String::new(),
            version: "v1".into(),
            api_version: "v1".into(),
            kind: "ConfigMap".into(),
            plural: "configmaps".into(),
        };
        let only = watcher::Config::default().fields(&format!("metadata.name={}", self.mesh.1));
        self.watch_kind(Kind::ConfigMap, &config_maps, only);
        let roots = KubeApi::<DynamicObject>::all_with(self.cluster.client.clone(), &config_maps);
        let roots = watcher::watcher(roots, watcher::Config::default()).backoff(pauses());
        self.streams.insert(Watch::Roots, Box::pin(roots.map(|event| event.map(Item::Object))));
        self.told.insert(Watch::Roots, Told { api_version: config_maps.api_version.clone(), ..Told::default() });
        let secrets = ApiResource { kind: "Secret".into(), plural: "secrets".into(), ..config_maps };
        self.watch_kind(Kind::Secret, &secrets, watcher::Config::default().fields(SECRETS));
        let crds = KubeApi::<PartialObjectMeta<CustomResourceDefinition>>::all(self.cluster.client.clone());
        let crds = watcher::watcher(crds, watcher::Config::default()).backoff(pauses());
        self.streams.insert(Watch::Crds, Box::pin(crds.map(|event| event.map(Item::Crd))));
        self.told.insert(Watch::Crds, Told::default());
    }

    fn watch_kind(&mut self, kind: Kind, resource: &ApiResource, config: watcher::Config) {
        let client = self.cluster.client.clone();
        let api = match kind {
            Kind::ConfigMap => KubeApi::<DynamicObject>::namespaced_with(client, &self.mesh.0, resource),
            _ => KubeApi::<DynamicObject>::all_with(client, resource),
        };
        let objects = watcher::watcher(api, config).backoff(pauses());
        self.streams.insert(Watch::Kind(kind), Box::pin(objects.map(|event| event.map(Item::Object))));
        self.told.entry(Watch::Kind(kind)).or_default().api_version = resource.api_version.clone();
        debug!(%kind, version = resource.api_version, "watching");
    }

    async fn run(mut self, batches: mpsc::Sender<Vec<Change>>) {
        let mut pause = DISCOVERY.0;
        loop {
            let wait = if self.pending.is_empty() { None } else { Some(pause) };
            tokio::select! {
                item = self.streams.next() => {
                    let Some((watch, item)) = item else { return };
                    self.take(watch, item);
                }
                () = tokio::time::sleep(wait.unwrap_or(DISCOVERY.1)), if wait.is_some() => {
                    self.discover().await;
                    pause = (pause * 2).min(DISCOVERY.1);
                }
                () = batches.closed() => return,
            }
            while self.batch.len() < MOST
                && let Some(Some((watch, item))) = self.streams.next().now_or_never()
            {
                self.take(watch, item);
            }
            if self.pending.is_empty() {
                pause = DISCOVERY.0;
            }
            if self.is_complete()
                && !self.batch.is_empty()
                && batches.send(std::mem::take(&mut self.batch)).await.is_err()
            {
                return;
            }
        }
    }

    /// Whether everything that is served has been listed once.
    fn is_complete(&self) -> bool {
        self.told.values().all(|told| told.listed) && !self.starting()
    }

    /// At the start, kinds with a CRD are waited for; later ones come when they come.
    fn starting(&self) -> bool {
        let kinds = self.told.keys().filter(|watch| matches!(watch, Watch::Kind(kind) if kind.is_custom())).count();
        kinds == 0 && !self.pending.is_empty()
    }

    async fn discover(&mut self) {
        match self.cluster.served(&self.pending).await {
            Ok(served) => {
                for (api, resource) in served {
                    self.pending.remove(&api.kind);
                    self.watch_kind(api.kind, &resource, watcher::Config::default());
                }
            }
            Err(error) => warn!(error = %chain(&error), "the API server does not say what it serves"),
        }
    }

    fn take(&mut self, watch: Watch, item: Result<Item, watcher::Error>) {
        let told = self.told.entry(watch).or_default();
        let item = match item {
            Ok(item) => item,
            Err(error) => {
                self.cluster.notice(&Notice::WatchFailed);
                if !told.failing {
                    told.failing = true;
                    warn!(?watch, error = %chain(&error), "watch interrupted; what it said holds");
                }
                // Whoever may not read Secrets, or all ConfigMaps, serves without them.
                if matches!(watch, Watch::Kind(Kind::Secret) | Watch::Roots) && has_code(&error, 403) {
                    told.listed = true;
                }
                // A version that is no longer served, or a CRD that is gone.
                if let (true, Watch::Kind(kind)) = (has_code(&error, 404), watch)
                    && kind.is_custom()
                {
                    self.streams.remove(&watch);
                    self.pending.insert(kind);
                }
                return;
            }
        };
        if std::mem::take(&mut told.failing) {
            info!(?watch, "watch resumed");
        }
        match (watch, item) {
            (Watch::Kind(kind), Item::Object(event)) => take_object(told, &mut self.batch, kind, event),
            (Watch::Roots, Item::Object(event)) => {
                if let Some(event) = about_roots(told, &self.mesh, event) {
                    take_object(told, &mut self.batch, Kind::ConfigMap, event);
                }
            }
            (_, Item::Crd(Event::InitApply(crd) | Event::Apply(crd))) => {
                let name = crd.metadata.name.unwrap_or_default();
                let api = kinds::CUSTOM.iter().find(|api| api.crd_name() == name);
                if let Some(api) = api.filter(|api| !self.streams.contains_key(&Watch::Kind(api.kind))) {
                    self.pending.insert(api.kind);
                }
            }
            (_, Item::Crd(Event::Delete(crd))) => {
                let name = crd.metadata.name.unwrap_or_default();
                if let Some(api) = kinds::CUSTOM.iter().find(|api| api.crd_name() == name) {
                    // The server has deleted the objects before.
                    self.streams.remove(&Watch::Kind(api.kind));
                    self.pending.remove(&api.kind);
                    let told = self.told.remove(&Watch::Kind(api.kind)).unwrap_or_default();
                    self.batch.extend(told.known.into_iter().map(Change::Delete));
                }
            }
            (_, Item::Crd(Event::InitDone)) => told.listed = true,
            (_, Item::Crd(Event::Init)) | (Watch::Crds, Item::Object(_)) => {}
        }
    }
}

/// What an event about a ConfigMap says of root certificates, if anything: most ConfigMaps have none, and the mesh's is
/// watched by itself.
fn about_roots(told: &Told, mesh: &(String, String), event: Event<DynamicObject>) -> Option<Event<DynamicObject>> {
    let is_known = |object: &DynamicObject| told.known.contains(&key(Kind::ConfigMap, object));
    let is_mesh = |object: &DynamicObject| {
        object.metadata.namespace.as_ref() == Some(&mesh.0) && object.metadata.name.as_ref() == Some(&mesh.1)
    };
    match event {
        Event::Init | Event::InitDone => Some(event),
        Event::InitApply(mut object) => {
            (!is_mesh(&object) && crate::trim::keep_roots(&mut object)).then_some(Event::InitApply(object))
        }
        Event::Apply(mut object) if !is_mesh(&object) => match crate::trim::keep_roots(&mut object) {
            true => Some(Event::Apply(object)),
            false => is_known(&object).then_some(Event::Delete(object)),
        },
        Event::Apply(_) => None,
        Event::Delete(object) => is_known(&object).then_some(Event::Delete(object)),
    }
}

fn key(kind: Kind, object: &DynamicObject) -> Key {
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    Key::new(kind, namespace, object.metadata.name.as_deref().unwrap_or_default())
}

fn take_object(told: &mut Told, batch: &mut Vec<Change>, kind: Kind, event: Event<DynamicObject>) {
    let key = |object: &DynamicObject| key(kind, object);
    match event {
        Event::Init => told.listing = Some(HashSet::new()),
        Event::InitApply(object) | Event::Apply(object) => {
            let key = key(&object);
            if let Some(listing) = &mut told.listing {
                listing.insert(key.clone());
            }
            told.known.insert(key);
            let document = crate::trim::document(kind, &told.api_version, object);
            batch.push(Change::Apply(Box::new(Object::read(&document))));
        }
        Event::Delete(object) => {
            let key = key(&object);
            told.known.remove(&key);
            batch.push(Change::Delete(key));
        }
        Event::InitDone => {
            told.listed = true;
            let Some(listing) = told.listing.take() else { return };
            // What went while nobody watched.
            let gone = told.known.difference(&listing).cloned();
            batch.extend(gone.map(Change::Delete));
            told.known = listing;
        }
    }
}

/// Pauses between attempts, each twice the last.
struct Doubling(Duration);

fn pauses() -> ResetTimerBackoff<Doubling> {
    ResetTimerBackoff::new(Doubling(BACKOFF.0), HEALTHY)
}

impl Iterator for Doubling {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0;
        self.0 = (pause * 2).min(BACKOFF.1);
        Some(pause)
    }
}

impl Backoff for Doubling {
    fn reset(&mut self) {
        self.0 = BACKOFF.0;
    }
}

fn has_code(error: &watcher::Error, code: u16) -> bool {
    let source = match error {
        watcher::Error::InitialListFailed(source)
        | watcher::Error::WatchStartFailed(source)
        | watcher::Error::WatchFailed(source) => source,
        _ => return false,
    };
    matches!(source, kube::Error::Api(status) if status.code == code)
}

/// An error with its causes, which `kube` prints partly itself.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(name: &str) -> DynamicObject {
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "n"}, "spec": {}})).unwrap()
    }

    #[test]
    fn of_config_maps_roots_are_kept_as_long_as_they_are_there() {
        let map = |name: &str, data: serde_json::Value| -> DynamicObject {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": "n"}, "data": data})).unwrap()
        };
        let mesh = ("n".to_owned(), "istio".to_owned());
        let (mut told, mut batch) = (Told { api_version: "v1".into(), ..Told::default() }, Vec::new());
        let roots = || map("roots", json!({"ca.crt": "PEM", "note": "x"}));
        for event in [
            Event::Init,
            Event::InitApply(roots()),
            Event::InitApply(map("istio", json!({"ca.crt": "PEM", "mesh": "{}"}))),
            Event::InitApply(map("settings", json!({"a": "b"}))),
            Event::InitDone,
            Event::Apply(map("settings", json!({"a": "c"}))),
            Event::Delete(map("settings", json!({}))),
            Event::Apply(map("istio", json!({"cacert": "PEM"}))),
            Event::Apply(map("roots", json!({"ca.crt": ""}))),
            Event::Apply(map("roots", json!({"note": "x"}))),
        ] {
            if let Some(event) = about_roots(&told, &mesh, event) {
                take_object(&mut told, &mut batch, Kind::ConfigMap, event);
            }
        }
        let said = batch.iter().map(|change| match change {
            Change::Delete(key) => format!("gone: {key}"),
            Change::Apply(reading) => {
                let object = &reading.as_ref().as_ref().unwrap().0;
                let config_store::Body::ConfigMap(map) = &object.body else { panic!("{:?}", object.body) };
                format!("{}: {:?}", object.key, map.data.as_ref().unwrap())
            }
        });
        let said: Vec<_> = said.collect();
        assert_eq!(said, ["ConfigMap n/roots: {\"ca.crt\": \"PEM\"}", "gone: ConfigMap n/roots"]);
        assert!(told.listed && told.known.is_empty());
    }

    #[test]
    fn a_new_list_deletes_what_is_not_in_it() {
        let (mut told, mut batch) = (Told::default(), Vec::new());
        let mut take = |event| take_object(&mut told, &mut batch, Kind::Service, event);
        take(Event::Init);
        take(Event::InitApply(service("a")));
        take(Event::InitApply(service("b")));
        take(Event::InitDone);
        take(Event::Apply(service("c")));
        take(Event::Init);
        take(Event::InitApply(service("b")));
        take(Event::InitDone);
        let mut deleted: Vec<_> = batch
            .iter()
            .filter_map(|change| match change {
                Change::Delete(key) => Some(key.to_string()),
                Change::Apply(_) => None,
            })
            .collect();
        deleted.sort();
        assert_eq!(deleted, ["Service n/a", "Service n/c"]);
        assert!(told.listed);
    }
}
