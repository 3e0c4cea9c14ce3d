//! How long generation takes without any cache: `speed INPUT.yaml...`, the inputs of istiod's own benchmarks.
//!
//! Prints microseconds for one proxy, by phase, as the median of many rounds:
//! - `snapshot`: the context of a push (istiod's `BenchmarkInitPushContext`, less the proxy's scope);
//! - `proxy`: what holds for a proxy as long as it is connected: its scope, the services it runs, what it shares with others;
//! - each type: its resources, encoded. As istiod's benchmarks with its cache off, whose measured loop begins with a proxy
//!   that has its scope and services, and repeats on one context: all that was generated is forgotten before each round.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use config_store::Store;
use envoy_api::type_url;
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use serde_json::json;
use xds_gen::{Names, shared};

const TYPES: [(&str, &str); 4] = [
    ("listeners", type_url::LISTENER),
    ("clusters", type_url::CLUSTER),
    ("routes", type_url::ROUTE),
    ("endpoints", type_url::ENDPOINT),
];
/// For each figure.
const TIME: Duration = Duration::from_millis(400);
const LEAST: usize = 15;

/// The median of as many rounds as fit in the time; a round gives what it took, as only some of it may count.
fn median(mut round: impl FnMut() -> Duration) -> u128 {
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < LEAST || start.elapsed() < TIME {
        times.push(round());
    }
    times.sort();
    times[times.len() / 2].as_micros()
}

fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    let made = work();
    let time = start.elapsed();
    drop(made);
    time
}

fn store(path: &Path) -> Store {
    let (documents, errors) = manifest::read(&[path.to_owned()]);
    errors.iter().for_each(|e| eprintln!("{e}"));
    let mut store = Store::new();
    for document in &documents {
        if let Err(error) = store.apply(document) {
            eprintln!("{error}");
        }
    }
    store
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = Settings::default();
    let mut mesh = MeshConfig::builtin();
    let log = json!({"name": "envoy-json", "envoyFileAccessLog": {"path": "/dev/stdout", "logFormat": {"labels": {}}}});
    mesh.extension_providers.push(serde_json::from_value(log)?);
    let mesh = Arc::new(mesh);
    let node = json!({
        "name": "v0", "ips": ["1.1.1.1"], "serviceAccount": "default",
        "labels": {"istio.io/benchmark": "true"}
    });
    let node = Node { dns_domain: "default.example.org".to_owned(), ..Node::from_yaml(&node, &settings)? };
    let node = Arc::new(node);
    for path in std::env::args_os().skip(1).map(PathBuf::from) {
        let snapshot = store(&path).snapshot();
        let build = || PushContext::build(&snapshot, &mesh, &settings);
        // Asks for nothing, but by then the proxy is known.
        let introduce = |push: &PushContext| drop(shared(push, &node, type_url::EXTENSION, Names::List(&[])));
        let mut line = format!("{:32}", path.file_stem().unwrap_or_default().to_string_lossy());
        line += &format!(" snapshot {:6}", median(|| timed(build)));
        let proxy = median(|| {
            let push = build();
            timed(|| introduce(&push))
        });
        line += &format!(" proxy {proxy:6}");
        let push = build();
        for (name, type_url) in TYPES {
            let asked: Vec<mesh_types::ArcStr> =
                shared(&push, &node, type_url, Names::Wildcard).iter().map(|r| r.name.clone()).collect();
            let names = match name {
                "routes" | "endpoints" => Names::List(&asked),
                _ => Names::Wildcard,
            };
            let time = median(|| {
                push.memo().clear();
                introduce(&push);
                timed(|| shared(&push, &node, type_url, names))
            });
            line += &format!(" {name} {time:6} ({})", asked.len());
        }
        println!("{line}");
    }
    Ok(())
}
