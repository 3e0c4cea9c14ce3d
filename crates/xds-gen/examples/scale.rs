//! How long generation takes: `scale OBJECTS NODES`, the input of `scale_input.py` (a stream of objects, a list
//! of nodes). Prints milliseconds for the first generation, after a change of endpoints, and after a change
//! of a VirtualService.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use config_store::Store;
use envoy_api::type_url;
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use xds_gen::{Names, generate};

/// Asks as the proxies would; the time by type, in milliseconds.
fn everything(push: &PushContext, nodes: &[Node]) -> String {
    let (mut bytes, mut times) = (0, [0.0; 4]);
    for node in nodes {
        let mut names = Vec::new();
        let tables = ["80".into(), "9080".into()];
        let asked = [type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER, type_url::ROUTE];
        for (i, type_url) in asked.into_iter().enumerate() {
            let wanted = match i {
                1 => Names::List(&names),
                3 => Names::List(&tables),
                _ => Names::Wildcard,
            };
            let start = Instant::now();
            let resources = generate(push, node, type_url, wanted);
            times[i] += start.elapsed().as_secs_f64() * 1000.0;
            bytes += resources.iter().map(|r| r.body.len()).sum::<usize>();
            if i == 0 {
                names = resources.iter().map(|c| c.name.clone()).filter(|n| n.starts_with("outbound|")).collect();
            }
        }
    }
    format!("{bytes} bytes, clusters endpoints listeners routes {times:.1?} ms")
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [objects, nodes] = args.as_slice() else { return Err("usage: scale OBJECTS NODES".into()) };
    let mut store = Store::new();
    let (documents, errors) = manifest::read(&[objects.into()]);
    errors.iter().for_each(|e| eprintln!("{e}"));
    documents.iter().for_each(|document| drop(store.apply(document)));
    let described: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(nodes)?)?;
    let settings = Settings::default();
    let read = |node: &serde_json::Value| -> Result<Node, Box<dyn Error>> {
        let bytes = envoy_api::json::from_json("envoy.config.core.v3.Node", node)?;
        Ok(Node::from_envoy(&envoy_api::Message::decode(bytes.as_slice())?, None)?)
    };
    let nodes = described.iter().map(read).collect::<Result<Vec<Node>, _>>()?;
    let mesh = Arc::new(MeshConfig::builtin());

    let start = Instant::now();
    let mut push = PushContext::build(&store.snapshot(), &mesh, &settings);
    println!("build {:?}", start.elapsed());
    let start = Instant::now();
    let first = generate(&push, &nodes[0], type_url::CLUSTER, Names::Wildcard).len();
    println!("clusters of one proxy {first} {:?}", start.elapsed());
    let start = Instant::now();
    println!("{} {:?}", everything(&push, &nodes), start.elapsed());
    for change in ["", "EndpointSlice", "VirtualService", "DestinationRule"] {
        let document = documents.iter().find(|d| d.value["kind"] == change);
        if let Some(document) = document {
            let text = document
                .value
                .to_string()
                .replace("10.128.0.1\"", "10.99.0.1\"")
                .replace("\"hosts\"", "\"exportTo\":[\"*\"],\"hosts\"");
            let text = text.replace("\"v1\"}", "\"v2\"}");
            for changed in manifest::parse(Path::new("change.json"), &text).map_err(|e| e.to_string())? {
                store.apply(&changed)?;
            }
        }
        let start = Instant::now();
        push = push.update(&store.snapshot(), &mesh);
        print!("after {change:?}: update {:?} ", start.elapsed());
        let start = Instant::now();
        println!("{} {:?}", everything(&push, &nodes), start.elapsed());
    }
    Ok(())
}
