//! How long generation takes without any cache: `speed INPUT.yaml...`, the inputs of istiod's own benchmarks.
//! Prints microseconds for one proxy, by type, as the median of many rounds.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use config_store::Store;
use envoy_api::type_url;
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use serde_json::json;
use xds_gen::{Names, generate};

const TYPES: [(&str, &str); 4] = [
    ("listeners", type_url::LISTENER),
    ("clusters", type_url::CLUSTER),
    ("routes", type_url::ROUTE),
    ("endpoints", type_url::ENDPOINT),
];
const ROUNDS: usize = 15;

fn median(mut times: Vec<Duration>) -> u128 {
    times.sort();
    times[times.len() / 2].as_micros()
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
    let (settings, mesh) = (Settings::default(), Arc::new(MeshConfig::builtin()));
    let node = json!({
        "name": "v0", "ips": ["1.1.1.1"], "serviceAccount": "default",
        "labels": {"istio.io/benchmark": "true"}
    });
    let node = Node::from_yaml(&node, &settings)?;
    for path in std::env::args_os().skip(1).map(PathBuf::from) {
        let snapshot = store(&path).snapshot();
        let mut line = format!("{:32}", path.file_stem().unwrap_or_default().to_string_lossy());
        let build = || PushContext::build(&snapshot, &mesh, &settings);
        let times = (0..ROUNDS).map(|_| {
            let start = Instant::now();
            let push = build();
            let time = start.elapsed();
            drop(push);
            time
        });
        line += &format!(" snapshot {:6}", median(times.collect()));
        for (name, type_url) in TYPES {
            let asked: Vec<mesh_types::ArcStr> = {
                let push = build();
                generate(&push, &node, type_url, Names::Wildcard).iter().map(|r| r.name.clone()).collect()
            };
            let names = match name {
                "routes" | "endpoints" => Names::List(&asked),
                _ => Names::Wildcard,
            };
            let times = (0..ROUNDS).map(|_| {
                let push = build();
                push.scope(&node);
                let start = Instant::now();
                let resources = generate(&push, &node, type_url, names);
                let time = start.elapsed();
                drop(resources);
                time
            });
            line += &format!(" {name} {:6} ({})", median(times.collect()), asked.len());
        }
        println!("{line}");
    }
    Ok(())
}
