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

fn everything(push: &PushContext, nodes: &[Node]) -> usize {
    let mut bytes = 0;
    for node in nodes {
        let clusters = generate(push, node, type_url::CLUSTER, Names::Wildcard);
        let listeners = generate(push, node, type_url::LISTENER, Names::Wildcard);
        let names: Vec<_> = clusters.iter().map(|c| c.name.clone()).filter(|n| n.starts_with("outbound|")).collect();
        let endpoints = generate(push, node, type_url::ENDPOINT, Names::List(&names));
        let tables = ["80".into(), "9080".into()];
        let routes = generate(push, node, type_url::ROUTE, Names::List(&tables));
        bytes += [clusters, listeners, endpoints, routes].iter().flatten().map(|r| r.body.len()).sum::<usize>();
    }
    bytes
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [objects, nodes] = args.as_slice() else { return Err("usage: scale OBJECTS NODES".into()) };
    let mut store = Store::new();
    let (documents, _) = manifest::read(&[objects.into()]);
    documents.iter().for_each(|document| drop(store.apply(document)));
    let described: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(nodes)?)?;
    let settings = Settings::default();
    let read = |node: &serde_json::Value| -> Result<Node, Box<dyn Error>> {
        Ok(Node::from_envoy(&envoy_api::json::message_from_json(node)?, None)?)
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
    println!("everything {} bytes {:?}", everything(&push, &nodes), start.elapsed());
    for change in ["", "EndpointSlice", "VirtualService", "DestinationRule"] {
        let document = documents.iter().find(|d| d.value["kind"] == change);
        if let Some(document) = document {
            let text = document.value.to_string().replace("10.128.0.1\"", "10.99.0.1\"").replace("\"hosts\"", "\"exportTo\":[\"*\"],\"hosts\"");
            let text = text.replace("\"v1\"}", "\"v2\"}");
            for changed in manifest::parse(Path::new("change.json"), &text).map_err(|e| e.to_string())? {
                store.apply(&changed)?;
            }
        }
        let start = Instant::now();
        push = push.update(&store.snapshot(), &mesh);
        print!("after {change:?}: update {:?} ", start.elapsed());
        let start = Instant::now();
        println!("everything {} bytes {:?}", everything(&push, &nodes), start.elapsed());
    }
    Ok(())
}
