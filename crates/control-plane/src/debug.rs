//! istiod's debug pages (pilot/pkg/xds/debug.go), for people and for `istioctl`.

mod registry;

use std::collections::BTreeMap;
use std::sync::Arc;

use config_store::{Body, Kind, Object};
use envoy_api::type_url;
use lifecycle::http::{Response, json, text};
use push_context::Node;
use serde_json::{Map, Value, json};

use crate::metrics::short;
use crate::status::{ProxyStatus, Statuses};
use crate::world::State;

type Page = fn(&State, &Statuses, &str) -> Result<Value, String>;

/// Path below `/debug/`, what it shows, how.
const PAGES: &[(&str, &str, Page)] = &[
    ("adsz", "connected proxies and what they watch", adsz),
    ("authorizationz", "authorization policies by namespace", authorizationz),
    ("config_distribution", "version of each proxy", config_distribution),
    ("config_dump", "what the proxy of ?proxyID=NAME.NAMESPACE is sent", config_dump),
    ("configz", "Istio resources in effect", configz),
    ("connections", "connected proxies", connections),
    ("endpointz", "endpoints of each port of each service", |state, _, _| Ok(registry::endpoints(&state.push))),
    ("endpointShardz", "endpoints by service and registry", |state, _, _| Ok(registry::endpoint_shards(&state.push))),
    ("instancesz", "services that each connected proxy serves", instancesz),
    ("list", "these pages", |_, _, _| Ok(PAGES.iter().map(|(name, _, _)| format!("/debug/{name}")).collect())),
    ("mesh", "MeshConfig in effect", mesh),
    ("ndsz", "the name table of the proxy of ?proxyID=NAME.NAMESPACE", ndsz),
    ("push_status", "the latest snapshot", push_status),
    ("registryz", "services", |state, _, _| Ok(registry::services(&state.push))),
    ("sidecarz", "what the proxy of ?proxyID=NAME.NAMESPACE may see", sidecarz),
    ("syncz", "which proxies have accepted what they were sent", syncz),
    ("telemetryz", "Telemetry resources by namespace", telemetryz),
];

/// The page at `path`, which starts with `/debug`.
pub(crate) fn page(path: &str, query: &str, state: &State, statuses: &Statuses) -> Response {
    let name = path.trim_start_matches("/debug").trim_matches('/');
    if name.is_empty() {
        let lines: String = PAGES.iter().map(|(name, what, _)| format!("/debug/{name}  {what}\n")).collect();
        return text(200, lines);
    }
    match PAGES.iter().find(|(other, _, _)| *other == name) {
        None => text(404, format!("there is no page {name:?}; /debug lists them\n")),
        Some((_, _, page)) => match page(state, statuses, query) {
            Ok(value) => json(200, &value),
            Err(message) => text(400, format!("{message}\n")),
        },
    }
}

/// The value of `key` in a query string. Names of proxies need no decoding.
fn parameter<'q>(query: &'q str, key: &str) -> Option<&'q str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// As istiod's `SyncStatus`: per type what was sent, accepted and, ours, refused.
fn syncz(state: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let wanted = parameter(query, "proxyID");
    let proxies = statuses.all();
    let rows = proxies.iter().filter(|proxy| wanted.is_none_or(|wanted| wanted == proxy.proxy)).map(|proxy| {
        let mut row = Map::new();
        row.insert("cluster_id".into(), proxy.cluster_id.as_str().into());
        row.insert("proxy".into(), proxy.proxy.as_str().into());
        row.insert("proxy_type".into(), "sidecar".into());
        row.insert("istio_version".into(), proxy.version.as_str().into());
        row.insert("revision".into(), state.revision.into());
        row.insert("synced_to".into(), proxy.synced_to.into());
        for (url, status) in &proxy.types {
            let kind = kind_of(url);
            row.insert(format!("{kind}_sent"), status.sent_nonce.as_str().into());
            row.insert(format!("{kind}_acked"), status.acked_nonce.as_str().into());
            if let Some(error) = &status.nacked {
                row.insert(format!("{kind}_nacked"), error.as_str().into());
            }
        }
        Value::Object(row)
    });
    Ok(rows.collect())
}

fn kind_of(url: &str) -> &str {
    match short(url) {
        "cds" => "cluster",
        "eds" => "endpoint",
        "lds" => "listener",
        "rds" => "route",
        "ecds" => "extensionconfig",
        other => other,
    }
}

/// As istiod's `SyncedVersions`; our nonces begin with the revision that was accepted.
fn config_distribution(_: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let rows = statuses.all().into_iter().map(|proxy| {
        let mut row = Map::new();
        row.insert("proxy".into(), proxy.proxy.as_str().into());
        for (url, status) in &proxy.types {
            let version = status.acked_nonce.split('-').next().unwrap_or_default();
            row.insert(format!("{}_acked", kind_of(url)), version.into());
        }
        Value::Object(row)
    });
    Ok(rows.collect())
}

/// As Envoy's own `/config_dump`, so that `istioctl proxy-config -f` reads it; endpoints come along.
fn config_dump(state: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let node = connected(statuses, query)?;
    let dumps = [
        (type_url::CLUSTER, "Clusters", "dynamic_active_clusters", "cluster"),
        (type_url::LISTENER, "Listeners", "dynamic_listeners", "listener"),
        (type_url::ROUTE, "Routes", "dynamic_route_configs", "route_config"),
        (type_url::ENDPOINT, "Endpoints", "dynamic_endpoint_configs", "endpoint_config"),
    ];
    let mut configs = Vec::new();
    for (url, dump, list, field) in dumps {
        let mut items = Vec::new();
        for resource in xds_gen::generate(&state.push, &node, url, xds_gen::Names::Wildcard) {
            let mut config = envoy_api::json::to_json(url, &resource.body).map_err(|error| error.to_string())?;
            config["@type"] = url.into();
            let item = json!({"version_info": &*resource.version, field: config});
            items.push(if list == "dynamic_listeners" {
                json!({"name": &*resource.name, "active_state": item})
            } else {
                item
            });
        }
        configs.push(json!({"@type": format!("type.googleapis.com/envoy.admin.v3.{dump}ConfigDump"), list: items}));
    }
    Ok(json!({"configs": configs}))
}

fn ndsz(state: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let node = connected(statuses, query)?;
    let tables = xds_gen::generate(&state.push, &node, type_url::NAME_TABLE, xds_gen::Names::Wildcard);
    let Some(table) = tables.first() else { return Err("the proxy does not capture DNS".into()) };
    envoy_api::json::to_json(type_url::NAME_TABLE, &table.body).map_err(|error| error.to_string())
}

fn connected(statuses: &Statuses, query: &str) -> Result<Arc<Node>, String> {
    let proxy = parameter(query, "proxyID").ok_or("which proxy? add ?proxyID=NAME.NAMESPACE")?;
    statuses.node(proxy).ok_or_else(|| format!("no proxy {proxy:?} is connected"))
}

/// As istiod's `AdsClients`, with what each type's last response was.
fn adsz(_: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let wanted = parameter(query, "proxyID");
    let mut proxies = statuses.all();
    proxies.retain(|proxy| wanted.is_none_or(|wanted| wanted == proxy.proxy || wanted == &*proxy.node_id));
    if let (Some(wanted), true) = (wanted, proxies.is_empty()) {
        return Err(format!("no proxy {wanted:?} is connected to this control plane; it may be to another"));
    }
    let row = |proxy: ProxyStatus| {
        let node = statuses.node(&proxy.node_id);
        let watches: Map<_, _> = proxy.types.keys().map(|url| (url.to_string(), json!([]))).collect();
        let mut row = client(&proxy);
        row["labels"] = json!(node.as_ref().map(|node| &node.labels));
        row["metadata"] = json!(node.as_ref().map(|node| &node.metadata));
        row["watches"] = Value::Object(watches);
        row["types"] = json!(proxy.types);
        row
    };
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.into_iter().map(row).collect::<Value>()}))
}

fn client(proxy: &ProxyStatus) -> Value {
    json!({"connectionId": format!("{}-{}", proxy.node_id, proxy.connection),
        "connectedAt": registry::time(i64::try_from(proxy.connected_at).unwrap_or_default()),
        "address": proxy.address, "identity": proxy.identity})
}

fn connections(_: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let proxies = statuses.all();
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.iter().map(client).collect::<Value>()}))
}

/// Node id and what it serves.
fn instancesz(state: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let rows = statuses.all().into_iter().filter_map(|proxy| {
        let node = statuses.node(&proxy.node_id)?;
        let targets = state.push.registry.targets(&node.query());
        let targets = targets.iter().map(|target| {
            json!({"Service": {"hostname": &*target.service.hostname, "Attributes": {
                    "Name": &*target.service.name, "Namespace": &*target.service.namespace}},
                "Port": {"name": &*target.port.name, "port": target.port.port, "TargetPort": target.target_port}})
        });
        Some((proxy.node_id.to_string(), targets.collect()))
    });
    Ok(Value::Object(rows.collect()))
}

fn mesh(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    serde_json::to_value(&*state.mesh).map_err(|error| error.to_string())
}

fn push_status(state: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let objects: BTreeMap<_, _> = Kind::ALL
        .iter()
        .map(|kind| (kind.as_str(), state.snapshot.len(*kind)))
        .filter(|(_, count)| *count > 0)
        .collect();
    Ok(json!({"revision": state.revision, "objects": objects, "proxies": statuses.len()}))
}

fn configz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_custom());
    Ok(kinds.flat_map(|kind| state.snapshot.list(*kind)).map(|object| manifest(object)).collect())
}

fn sidecarz(state: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let node = connected(statuses, query)?;
    Ok(registry::scope(&state.push, &state.push.scope(&node)))
}

fn telemetryz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let mut namespaces: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for object in state.snapshot.list(Kind::Telemetry) {
        let row = json!({"name": &*object.key.name, "namespace": &*object.key.namespace, "spec": spec(&object.body)});
        namespaces.entry(&object.key.namespace).or_default().push(row);
    }
    Ok(json!({"telemetries": {"namespace_to_telemetries": namespaces, "root_namespace": state.mesh.root_namespace}}))
}

fn authorizationz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let mut namespaces: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for object in state.snapshot.list(Kind::AuthorizationPolicy) {
        let row = json!({"name": &*object.key.name, "namespace": &*object.key.namespace,
            "annotations": object.annotations, "spec": spec(&object.body)});
        namespaces.entry(&object.key.namespace).or_default().push(row);
    }
    Ok(
        json!({"authorization_policies": {"namespace_to_policies": namespaces, "root_namespace": state.mesh.root_namespace}}),
    )
}

/// An object as a manifest; Kubernetes' own without what is secret.
fn manifest(object: &Object) -> Value {
    let key = &object.key;
    let mut metadata = json!({"name": &*key.name, "resourceVersion": object.resource_version.to_string()});
    if !key.namespace.is_empty() {
        metadata["namespace"] = (&*key.namespace).into();
    }
    if !object.labels.is_empty() {
        metadata["labels"] = json!(object.labels);
    }
    if let Some(origin) = &object.origin {
        metadata["annotations"] = json!({"outrigger/origin": format!("{}:{}", origin.file.display(), origin.line)});
    }
    let group = key.kind.group();
    let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
    json!({"apiVersion": version, "kind": key.kind.as_str(), "metadata": metadata, "spec": spec(&object.body)})
}

fn spec(body: &Body) -> Value {
    let value = match body {
        Body::Service(service) => serde_json::to_value(&service.spec),
        Body::VirtualService(spec) => serde_json::to_value(spec),
        Body::DestinationRule(spec) => serde_json::to_value(spec),
        Body::ServiceEntry(spec) => serde_json::to_value(spec),
        Body::Sidecar(spec) => serde_json::to_value(spec),
        Body::WorkloadEntry(spec) => serde_json::to_value(spec),
        Body::WorkloadGroup(spec) => serde_json::to_value(spec),
        Body::EnvoyFilter(spec) => serde_json::to_value(spec),
        Body::Gateway(spec) => serde_json::to_value(spec),
        Body::ProxyConfig(spec) => serde_json::to_value(spec),
        Body::PeerAuthentication(spec) => serde_json::to_value(spec),
        Body::RequestAuthentication(spec) => serde_json::to_value(spec),
        Body::AuthorizationPolicy(spec) => serde_json::to_value(spec),
        Body::Telemetry(spec) => serde_json::to_value(spec),
        Body::WasmPlugin(spec) => serde_json::to_value(spec),
        Body::HTTPRoute(spec) => serde_json::to_value(spec),
        Body::GRPCRoute(spec) => serde_json::to_value(spec),
        Body::Namespace(_)
        | Body::Node(_)
        | Body::Pod(_)
        | Body::EndpointSlice(_)
        | Body::ServiceAccount(_)
        | Body::ConfigMap(_)
        | Body::Secret(_) => Ok(Value::Null),
    };
    value.unwrap_or(Value::Null)
}
