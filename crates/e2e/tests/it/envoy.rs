//! Real Envoy judges what we generate: it loads every resource of the stock profile.

use std::path::Path;
use std::process::Command;

use e2e::{Output, envoy, outrigger, sample};
use serde_json::{Value, json};

const PRODUCTPAGE: &str = "
name: productpage-v1
namespace: default
ips: [10.0.0.9]
serviceAccount: bookinfo-productpage
labels: {app: productpage, version: v1}
metadata: {PROFILE: stock}
";

fn generated(folder: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join(format!("{kind}.json"))).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    value.as_array().unwrap().clone()
}

/// A bootstrap that holds the resources as static ones; route tables come inline in listeners of their own.
fn bootstrap(folder: &Path) -> Value {
    let pipe = |name: &str| {
        json!({ "name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": { "cluster_name": name, "endpoints": [
            { "lb_endpoints": [{ "endpoint": { "address": { "pipe": { "path": "/nowhere" } } } }] } ] } })
    };
    let mut clusters = generated(folder, "clusters");
    clusters.extend([pipe("sds-grpc"), pipe("xds-grpc")]);
    let mut listeners = generated(folder, "listeners");
    for (number, route) in generated(folder, "routes").into_iter().enumerate() {
        listeners.push(json!({
            "name": format!("routes-{number}"),
            "address": { "socket_address": { "address": "127.0.0.1", "port_value": 20000 + number } },
            "filter_chains": [{ "filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                    "stat_prefix": "routes",
                    "route_config": route,
                    "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" } }],
                },
            }] }],
        }));
    }
    json!({
        "node": { "id": "sidecar~10.0.0.9~productpage-v1.default~default.svc.cluster.local", "cluster": "productpage" },
        "dynamic_resources": { "ads_config": { "api_type": "GRPC", "transport_api_version": "V3",
            "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds-grpc" } }] } },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

#[test]
fn real_envoy_loads_what_bookinfo_generates() {
    let Some(envoy) = envoy() else {
        println!("SKIPPED: real_envoy_loads_what_bookinfo_generates: no Envoy; `cargo xtask setup` installs it");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let proxy = folder.path().join("proxy.yaml");
    std::fs::write(&proxy, PRODUCTPAGE).unwrap();
    let networking = std::fs::read_dir(sample("networking")).unwrap();
    for file in networking.map(|entry| entry.unwrap().path()) {
        let out = folder.path().join("out");
        let output = Output::of(
            outrigger()
                .args(["xds", "generate", "--input"])
                .arg(sample("bookinfo.yaml"))
                .arg("--input")
                .arg(&file)
                .arg("--proxy")
                .arg(&proxy)
                .arg("--output")
                .arg(&out),
        );
        assert!(output.success, "{}: {}", file.display(), output.all());
        let config = folder.path().join("envoy.json");
        std::fs::write(&config, bootstrap(&out).to_string()).unwrap();
        let judged = Output::of(Command::new(&envoy).args(["--mode", "validate", "-l", "error", "-c"]).arg(&config));
        assert!(judged.success, "{}: {}", file.display(), judged.all());
    }
}
