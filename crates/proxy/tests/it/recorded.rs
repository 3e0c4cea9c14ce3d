//! Everything that istiod sent in the reference cases, played over ADS by a server: one configuration after the other to the
//! same proxy, so that each replaces the one before and all of that is removed.

use crate::fixture::bootstrap;
use crate::library::Authority;
use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::listener::Listener;
use envoy_api::{Message, Resource, core, type_url, wkt};
use mesh_types::ArcStr;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

/// Type, file and the field that names a resource.
const FILES: [(&str, &str, &str); 4] = [
    (type_url::CLUSTER, "clusters.json", "name"),
    (type_url::ENDPOINT, "endpoints.json", "cluster_name"),
    (type_url::LISTENER, "listeners.json", "name"),
    (type_url::ROUTE, "routes.json", "name"),
];

type Snapshot = BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>;

/// What a proxy of a case gets.
fn recorded(folder: &Path) -> Snapshot {
    let of = |(url, file, key): (&'static str, &str, &str)| {
        let text = std::fs::read_to_string(folder.join(file)).unwrap_or_else(|_| "[]".to_owned());
        let values: Vec<Value> = serde_json::from_str(&text).expect("a list");
        let resources = values.iter().map(|value| {
            let name = value[key].as_str().expect("a name").to_owned();
            let mut body = envoy_api::json::from_json(url, value).expect("a resource");
            if url == type_url::LISTENER {
                // The ports of this machine are not the test's.
                let mut listener = Listener::decode(&body[..]).expect("its own encoding");
                listener.bind_to_port = Some(wkt::BoolValue { value: false });
                body = listener.encode_to_vec();
            }
            (name, body)
        });
        (url, resources.collect())
    };
    FILES.into_iter().map(of).collect()
}

/// Each proxy of each case.
fn cases() -> Vec<PathBuf> {
    let root = match std::env::var_os("OUTRIGGER_CONFORMANCE") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"),
    };
    let folders = |of: &Path| {
        let mut all: Vec<PathBuf> =
            std::fs::read_dir(of).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
        all.sort();
        all
    };
    let mut all = Vec::new();
    for case in folders(&root.join("xds/cases")) {
        all.push(case.join("golden"));
        all.extend(folders(&case.join("golden")));
    }
    if all.is_empty() {
        println!("SKIPPED: no reference data at {}", root.display());
    }
    all
}

struct Istiod {
    current: Mutex<Snapshot>,
    revision: watch::Sender<u64>,
    refused: Mutex<Vec<String>>,
    accepted: Mutex<BTreeMap<String, usize>>,
}

impl Istiod {
    fn send(&self, snapshot: Snapshot) {
        *self.current.lock().expect("not poisoned") = snapshot;
        self.revision.send_modify(|r| *r += 1);
    }

    fn acknowledged(&self, of: &str) -> usize {
        self.accepted.lock().expect("not poisoned").get(of).copied().unwrap_or(0)
    }
}

impl Source for Istiod {
    type Proxy = ();

    fn connect(&self, node: &core::Node, peer: &Peer) -> Result<(), tonic::Status> {
        let token = peer.token.as_ref().map(ads::server::BearerToken::expose);
        assert_eq!((node.id.as_str(), token), ("sidecar~10.0.0.1~a.default~default.svc.cluster.local", Some("of-a")));
        Ok(())
    }

    fn resources(&self, (): &(), type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
        let current = self.current.lock().expect("not poisoned");
        let wanted = |name: &str| match names {
            Names::Wildcard => true,
            Names::List(list) => list.iter().any(|n| **n == *name),
        };
        // As istiod, whose versions say when something was sent.
        let version = ArcStr::from(self.revision.borrow().to_string());
        let resource =
            |(name, body): (&String, &Vec<u8>)| Resource::with_version(name.as_str(), version.clone(), body.clone());
        current.get(type_url).into_iter().flatten().filter(|(name, _)| wanted(name)).map(resource).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    fn report(&self, (): &(), event: &Event) {
        match &event.kind {
            EventKind::Nacked { type_url, error, .. } => {
                self.refused.lock().expect("not poisoned").push(format!("{type_url}: {error}"));
            }
            EventKind::Acked { type_url, .. } => {
                *self.accepted.lock().expect("not poisoned").entry(type_url.to_string()).or_default() += 1;
            }
            _ => {}
        }
    }
}

fn section<'a>(dump: &'a Value, kind: &str) -> &'a Value {
    let configs = dump["configs"].as_array().expect("a list");
    configs.iter().find(|c| c["@type"].as_str().is_some_and(|t| t.ends_with(kind))).unwrap_or(&Value::Null)
}

/// Names of the clusters and listeners that came from the control plane; `false`: those in use, `true`: those that wait.
fn live(dump: &Value, waiting: bool) -> (BTreeSet<String>, BTreeSet<String>) {
    let names = |list: &Value, path: &str| {
        let items = list.as_array().into_iter().flatten();
        items.filter_map(|i| Some(i.pointer(path)?.as_str()?.to_owned())).collect::<BTreeSet<_>>()
    };
    let clusters = section(dump, "ClustersConfigDump");
    let listeners = &section(dump, "ListenersConfigDump")["dynamic_listeners"];
    match waiting {
        false => (
            names(&clusters["dynamic_active_clusters"], "/cluster/name"),
            names(listeners, "/active_state/listener/name"),
        ),
        true => (
            names(&clusters["dynamic_warming_clusters"], "/cluster/name"),
            names(listeners, "/warming_state/listener/name"),
        ),
    }
}

/// Waits until the proxy has exactly this.
async fn settled(proxy: &proxy::Handle, snapshot: &Snapshot, case: &str, refused: &Mutex<Vec<String>>) {
    let names = |of: &str| snapshot.get(of).into_iter().flat_map(|all| all.keys().cloned()).collect::<BTreeSet<_>>();
    let expected = (names(type_url::CLUSTER), names(type_url::LISTENER));
    let mut dump = Value::Null;
    for _ in 0..600 {
        let refused = refused.lock().expect("not poisoned").join("\n");
        assert!(refused.is_empty(), "{case}: {refused}");
        dump = proxy.config_dump();
        if live(&dump, false) == expected && live(&dump, true) == Default::default() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (clusters, listeners) = live(&dump, false);
    panic!(
        "{case}: missing {:?} {:?}, too many {:?} {:?}, waiting {:?}",
        expected.0.difference(&clusters).collect::<Vec<_>>(),
        expected.1.difference(&listeners).collect::<Vec<_>>(),
        clusters.difference(&expected.0).collect::<Vec<_>>(),
        listeners.difference(&expected.1).collect::<Vec<_>>(),
        live(&dump, true)
    );
}

async fn play(api_type: &str) {
    let cases = cases();
    let istiod = Arc::new(Istiod {
        current: Mutex::default(),
        revision: watch::Sender::new(1),
        refused: Mutex::default(),
        accepted: Mutex::default(),
    });
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("xds");
    let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
    let router = tonic::transport::Server::builder().add_service(ads::server::service(istiod.clone()));
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    let server = tokio::spawn(async move { router.serve_with_incoming(incoming).await.expect("it serves") });
    let cluster = |name: &str, path: &Path| {
        json!({"name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": {"cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": path}}}}]}]}})
    };
    let service = |cluster: &str| {
        json!({"envoy_grpc": {"cluster_name": cluster, "authority": "istiod.istio-system.svc"},
            "initial_metadata": [{"key": "authorization", "value": "Bearer of-a"}]})
    };
    let ads = json!({"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"});
    let config = json!({
        "node": {"id": "sidecar~10.0.0.1~a.default~default.svc.cluster.local", "cluster": "a.default"},
        "dynamic_resources": {"cds_config": ads, "lds_config": ads, "ads_config": {
            // The first server is gone; the second one is tried.
            "api_type": api_type, "transport_api_version": "V3", "grpc_services": [service("gone"), service("xds-grpc")]
        }},
        "static_resources": {"clusters": [cluster("gone", &folder.path().join("gone")), cluster("xds-grpc", &path)]}
    });
    // The agent's part.
    let (_agent, certificates) = watch::channel(Some(Arc::new(Authority::new().workload("a"))));
    let certificates = Some(certificates);
    let options =
        proxy::Options { concurrency: 1, allow_unsupported_filters: true, certificates, ..Default::default() };
    let proxy = proxy::start(bootstrap(&config), options).expect("it starts");
    for case in &cases {
        let snapshot = recorded(case);
        let before = istiod.acknowledged(type_url::LISTENER);
        istiod.send(snapshot.clone());
        // Dumps take longer than anything else here.
        while istiod.acknowledged(type_url::LISTENER) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        settled(&proxy, &snapshot, &case.display().to_string(), &istiod.refused).await;
    }
    let Some(last) = cases.last() else { return };
    assert_eq!(proxy.ready(), Ok(()));

    // One listener and one cluster go, and come back.
    let snapshot = recorded(last);
    let mut less = snapshot.clone();
    for of in [type_url::CLUSTER, type_url::LISTENER] {
        less.get_mut(of).and_then(BTreeMap::pop_last).expect("there is one");
    }
    istiod.send(less.clone());
    settled(&proxy, &less, "a removal", &istiod.refused).await;
    istiod.send(snapshot.clone());
    settled(&proxy, &snapshot, "its end", &istiod.refused).await;

    // All of it once more, as istiod does after a restart: nothing changes, everything is acknowledged.
    let before = istiod.acknowledged(type_url::LISTENER);
    istiod.send(snapshot.clone());
    while istiod.acknowledged(type_url::LISTENER) == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    settled(&proxy, &snapshot, "a repetition", &istiod.refused).await;
    for (of, ..) in FILES {
        assert!(istiod.acknowledged(of) > 1, "{of} is acknowledged");
    }
    drop(proxy);
    server.abort();
}

#[tokio::test]
async fn istiods_stream_of_all_cases_is_taken() {
    play("GRPC").await;
}

#[tokio::test]
async fn istiods_incremental_stream_of_all_cases_is_taken() {
    play("DELTA_GRPC").await;
}
