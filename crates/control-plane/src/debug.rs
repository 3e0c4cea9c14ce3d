//! istiod's debug pages (pilot/pkg/xds/debug.go), for people and for `istioctl`.

use std::collections::{BTreeMap, BTreeSet};
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
    ("config_distribution", "revision and version of each proxy", syncz),
    ("config_dump", "what the proxy of ?proxyID=NAME.NAMESPACE is sent", config_dump),
    ("configz", "Istio resources in effect", configz),
    ("connections", "connected proxies", connections),
    ("endpointz", "endpoint slices by service", endpointz),
    ("endpointShardz", "endpoint slices by service", endpointz),
    ("mesh", "MeshConfig in effect", mesh),
    ("ndsz", "the name table of the proxy of ?proxyID=NAME.NAMESPACE", ndsz),
    ("push_status", "the latest snapshot", push_status),
    ("registryz", "services", registryz),
    ("sidecarz", "Sidecar resources", sidecarz),
    ("syncz", "which proxies have accepted what they were sent", syncz),
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

/// As istiod's `SyncStatus`: per type what was sent, accepted and refused.
fn syncz(state: &State, statuses: &Statuses, query: &str) -> Result<Value, String> {
    let wanted = parameter(query, "proxyID");
    let proxies = statuses.all();
    let rows = proxies.iter().filter(|proxy| wanted.is_none_or(|wanted| wanted == proxy.proxy)).map(|proxy| {
        let mut row = Map::new();
        row.insert("proxy".into(), proxy.proxy.as_str().into());
        row.insert("proxy_type".into(), "sidecar".into());
        row.insert("istio_version".into(), proxy.version.as_str().into());
        row.insert("revision".into(), state.revision.into());
        row.insert("synced_to".into(), proxy.synced_to.into());
        for (url, status) in &proxy.types {
            let kind = match short(url) {
                "cds" => "cluster",
                "eds" => "endpoint",
                "lds" => "listener",
                "rds" => "route",
                other => other,
            };
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

fn adsz(_: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let proxies = statuses.all();
    Ok(json!({"totalClients": proxies.len(), "clients": proxies}))
}

fn connections(_: &State, statuses: &Statuses, _: &str) -> Result<Value, String> {
    let row = |proxy: ProxyStatus| {
        json!({"connectionId": proxy.connection, "proxy": proxy.proxy, "connectedAt": proxy.connected_at,
            "address": proxy.address, "identity": proxy.identity})
    };
    let proxies = statuses.all();
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.into_iter().map(row).collect::<Value>()}))
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
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_istio());
    Ok(kinds.flat_map(|kind| state.snapshot.list(*kind)).map(|object| manifest(object)).collect())
}

fn sidecarz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    Ok(state.snapshot.list(Kind::Sidecar).map(|object| manifest(object)).collect())
}

fn authorizationz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let mut namespaces: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for object in state.snapshot.list(Kind::AuthorizationPolicy) {
        namespaces.entry(&object.key.namespace).or_default().push(manifest(object));
    }
    Ok(
        json!({"authorization_policies": {"namespace_to_policies": namespaces, "root_namespace": state.mesh.root_namespace}}),
    )
}

fn registryz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let services = state.snapshot.list(Kind::Service).chain(state.snapshot.list(Kind::ServiceEntry));
    Ok(services.map(|object| manifest(object)).collect())
}

fn endpointz(state: &State, _: &Statuses, _: &str) -> Result<Value, String> {
    let mut services: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for object in state.snapshot.list(Kind::EndpointSlice) {
        let Body::EndpointSlice(slice) = &object.body else { continue };
        let service = object.labels.get("kubernetes.io/service-name").map_or(&*object.key.name, String::as_str);
        let addresses = services.entry(format!("{service}.{}", object.key.namespace)).or_default();
        for endpoint in slice.endpoints.iter().flatten() {
            let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
            for (address, port) in
                endpoint.addresses.iter().flat_map(|a| slice.ports.iter().flatten().map(move |p| (a, p)))
            {
                let state = if ready { "HEALTHY" } else { "UNHEALTHY" };
                addresses.insert(format!("{address}:{} {state}", port.port.unwrap_or_default()));
            }
        }
    }
    Ok(services.into_iter().map(|(service, addresses)| json!({"svc": service, "ep": addresses})).collect())
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
