//! istiod's debug pages (pilot/pkg/xds/debug.go), for people and for `istioctl`.

mod dump;
mod registry;

use std::collections::BTreeMap;
use std::sync::Arc;

use ::registry::{Gateways, NetworkGateway};
use config_store::{Body, Kind, Object};
use envoy_api::type_url;
use lifecycle::http::{Response, json, text};
use push_context::Node;
use serde_json::{Map, Value, json};

use crate::metrics::short;
use crate::push_status::PushStatus;
use crate::status::{ProxyStatus, Statuses};
use crate::world::State;

type Page = fn(&State, &About<'_>, &str) -> Result<Value, Failure>;

/// What pages show beside the state, and to whom.
pub(crate) struct About<'a> {
    pub(crate) statuses: &'a Statuses,
    /// The injection configuration, where this control plane injects.
    pub(crate) injector: Option<Arc<inject::Config>>,
    /// The namespace whose proxies the caller may see; `None`: all of them.
    pub(crate) namespace: Option<&'a str>,
}

/// Why a page is not shown.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request makes no sense.
    Bad(String),
    /// There is no such proxy, here.
    NotFound(String),
}

impl<T: Into<String>> From<T> for Failure {
    fn from(message: T) -> Failure {
        Failure::Bad(message.into())
    }
}

/// Pages that workloads may see, of proxies of their own namespace (istiod `activeNamespaceDebuggers`).
const OF_NAMESPACE: [&str; 3] = ["config_dump", "ndsz", "edsz"];

/// Path below `/debug/`, what it shows, how.
const PAGES: &[(&str, &str, Page)] = &[
    ("adsz", "connected proxies and what they watch", adsz),
    ("authorizationz", "authorization policies by namespace", authorizationz),
    ("cachez", "what is kept of generated resources; ?sizes=true how much, ?clear=true forgets it", dump::cachez),
    ("clusterz", "clusters that are read", clusterz),
    ("config_distribution", "version of each proxy", config_distribution),
    ("config_dump", "what the proxy of ?proxyID=NAME.NAMESPACE is sent", config_dump),
    ("configz", "Istio resources in effect", configz),
    ("connections", "connected proxies", connections),
    ("ecdsz", "filter configurations of the proxy of ?proxyID=NAME.NAMESPACE", |state, about, query| {
        dump::of_types(state, &*connected(about, query)?, &[type_url::EXTENSION])
    }),
    ("edsz", "endpoints of the proxy of ?proxyID=NAME.NAMESPACE", |state, about, query| {
        dump::of_types(state, &*connected(about, query)?, &[type_url::ENDPOINT])
    }),
    ("endpointz", "endpoints of each port of each service", |state, _, _| Ok(registry::endpoints(&state.push))),
    ("endpointShardz", "endpoints by service and registry", |state, _, _| Ok(registry::endpoint_shards(&state.push))),
    ("force_disconnect", "ends the stream of the proxy of ?proxyID=NAME.NAMESPACE", |_, _, _| {
        Err(Failure::Bad("it is asked for by itself".to_owned()))
    }),
    ("inject", "templates of injection", inject_templates),
    ("instancesz", "services that each connected proxy serves", instancesz),
    ("list", "these pages", |_, _, _| Ok(PAGES.iter().map(|(name, _, _)| format!("/debug/{name}")).collect())),
    ("mesh", "MeshConfig in effect", mesh),
    ("ndsz", "the name table of the proxy of ?proxyID=NAME.NAMESPACE", ndsz),
    ("networkz", "gateways between networks", |state, _, _| Ok(gateways(&state.push.registry.networks().gateways))),
    ("push_status", "the latest snapshot", push_status),
    ("pushcontext", "what pushes are made from", pushcontext),
    ("registryz", "services", |state, _, _| Ok(registry::services(&state.push))),
    ("resourcesz", "kinds that are read", resourcesz),
    ("sidecarz", "what the proxy of ?proxyID=NAME.NAMESPACE may see", sidecarz),
    ("syncz", "which proxies have accepted what they were sent", syncz),
    ("telemetryz", "Telemetry resources by namespace", telemetryz),
];

/// The page at `path`, which starts with `/debug`.
pub(crate) fn page(path: &str, query: &str, state: &State, about: &About<'_>) -> Response {
    let name = path.trim_start_matches("/debug").trim_matches('/');
    if about.namespace.is_some() && !OF_NAMESPACE.contains(&name) {
        return text(403, "this page is for the root namespace's service accounts, or for this machine\n");
    }
    if name.is_empty() {
        let lines: String = PAGES.iter().map(|(name, what, _)| format!("/debug/{name}  {what}\n")).collect();
        return text(200, lines);
    }
    if let Some(said) = act(name, query, state, about) {
        return match said {
            Ok(said) => text(200, said),
            Err(failure) => failure.answer(),
        };
    }
    match PAGES.iter().find(|(other, _, _)| *other == name) {
        None => text(404, format!("there is no page {name:?}; /debug lists them\n")),
        Some((_, _, page)) => match page(state, about, query) {
            Ok(value) => json(200, &value),
            Err(failure) => failure.answer(),
        },
    }
}

/// Pages over xDS, as `istioctl experimental internal-debug` and agents ask for them: a resource of this type whose name is
/// a page with its query, and whose content is the page (istiod `debuggen.go`).
pub(crate) const TYPE: &str = "istio.io/debug";

/// The page of that name, for [`TYPE`].
pub(crate) fn resource(name: &str, state: &State, about: &About<'_>) -> Result<Vec<u8>, String> {
    let (page, query) = name.split_once('?').unwrap_or((name, ""));
    if about.namespace.is_some() && !OF_NAMESPACE.contains(&page) {
        return Err("it is for the root namespace's service accounts".to_owned());
    }
    let Some((_, _, made)) = PAGES.iter().find(|(other, _, _)| *other == page) else {
        return Err("there is no such page".to_owned());
    };
    match made(state, about, query) {
        Ok(value) => Ok(value.to_string().into_bytes()),
        Err(Failure::Bad(message) | Failure::NotFound(message)) => Err(message),
    }
}

impl Failure {
    fn answer(self) -> Response {
        match self {
            Failure::Bad(message) => text(400, format!("{message}\n")),
            Failure::NotFound(message) => text(404, format!("{message}\n")),
        }
    }
}

/// Requests that do something, and what is said of it.
fn act(name: &str, query: &str, state: &State, about: &About<'_>) -> Option<Result<String, Failure>> {
    match name {
        "cachez" if parameter(query, "clear").is_some() => {
            state.push.memo().clear();
            Some(Ok("Cache cleared\n".to_owned()))
        }
        "force_disconnect" => Some(connected(about, query).map(|node| {
            about.statuses.disconnect(&node.id);
            "OK".to_owned()
        })),
        _ => None,
    }
}

/// The value of `key` in a query string. Names of proxies need no decoding.
fn parameter<'q>(query: &'q str, key: &str) -> Option<&'q str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// As istiod's `SyncStatus`: per type what was sent, accepted and, ours, refused.
fn syncz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let wanted = parameter(query, "proxyID");
    let proxies = about.statuses.all();
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
fn config_distribution(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let rows = about.statuses.all().into_iter().map(|proxy| {
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
fn config_dump(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let node = connected(about, query)?;
    let Some(types) = parameter(query, "types").filter(|types| !types.is_empty()) else {
        return dump::whole(state, &node);
    };
    let types: Vec<&str> = types.split(',').filter_map(dump::long).collect();
    dump::of_types(state, &node, &types)
}

fn ndsz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    dump::of_types(state, &*connected(about, query)?, &[type_url::NAME_TABLE])
}

/// istiod's clusters by secret; here there is one.
fn clusterz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    Ok(json!([{"id": &*state.push.settings.cluster_id, "syncStatus": "synced"}]))
}

fn inject_templates(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let config = about.injector.as_ref();
    let config = config.ok_or_else(|| Failure::NotFound("this control plane does not inject".to_owned()))?;
    Ok(json!(config.template_sources()))
}

fn resourcesz(_: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_custom());
    Ok(kinds.map(|kind| json!({"group": kind.group(), "version": "v1", "kind": kind.as_str()})).collect())
}

fn pushcontext(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let policies = authorizationz(state, about, query)?["authorization_policies"].take();
    let networks = state.push.registry.networks();
    Ok(json!({"AuthorizationPolicies": policies, "NetworkGateways": gateways(&networks.gateways),
        "UnresolvedGateways": gateways(&networks.unresolved)}))
}

/// As Go writes istiod's `NetworkGateway`.
fn gateways(gateways: &Gateways) -> Value {
    let row = |gateway: &NetworkGateway| {
        json!({"Network": &*gateway.network, "Cluster": &*gateway.cluster, "Addr": &*gateway.address,
            "Port": gateway.port, "HBONEPort": gateway.hbone_port,
            "ServiceAccount": {"Namespace": "", "Name": ""}})
    };
    gateways.all().into_iter().map(row).collect()
}

fn connected(about: &About<'_>, query: &str) -> Result<Arc<Node>, Failure> {
    let proxy = parameter(query, "proxyID").ok_or("which proxy? add ?proxyID=NAME.NAMESPACE")?;
    let node = about.statuses.node(proxy).filter(|node| about.namespace.is_none_or(|own| *node.namespace == *own));
    node.ok_or_else(|| {
        Failure::NotFound(format!("no proxy {proxy:?} is connected to this control plane; it may be to another"))
    })
}

/// As istiod's `AdsClients`, with what each type's last response was.
fn adsz(_: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let wanted = parameter(query, "proxyID");
    let mut proxies = about.statuses.all();
    proxies.retain(|proxy| wanted.is_none_or(|wanted| wanted == proxy.proxy || wanted == &*proxy.node_id));
    if let (Some(wanted), true) = (wanted, proxies.is_empty()) {
        let message = format!("no proxy {wanted:?} is connected to this control plane; it may be to another");
        return Err(Failure::NotFound(message));
    }
    let row = |proxy: ProxyStatus| {
        let node = about.statuses.node(&proxy.node_id);
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

fn connections(_: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let proxies = about.statuses.all();
    Ok(json!({"totalClients": proxies.len(), "clients": proxies.iter().map(client).collect::<Value>()}))
}

/// Node id and what it serves.
fn instancesz(state: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    let rows = about.statuses.all().into_iter().filter_map(|proxy| {
        let node = about.statuses.node(&proxy.node_id)?;
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

fn mesh(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    serde_json::to_value(&*state.mesh).map_err(|error| Failure::Bad(error.to_string()))
}

/// As istiod's: what each of its gauges counts.
fn push_status(state: &State, about: &About<'_>, _: &str) -> Result<Value, Failure> {
    Ok(PushStatus::of(state, &about.statuses.nodes()).to_json())
}

fn configz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_custom());
    Ok(kinds.flat_map(|kind| state.snapshot.list(*kind)).map(|object| manifest(object)).collect())
}

fn sidecarz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let node = connected(about, query)?;
    Ok(registry::scope(&state.push, &state.push.scope(&node)))
}

fn telemetryz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let mut namespaces: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for object in state.snapshot.list(Kind::Telemetry) {
        let row = json!({"name": &*object.key.name, "namespace": &*object.key.namespace, "spec": spec(&object.body)});
        namespaces.entry(&object.key.namespace).or_default().push(row);
    }
    Ok(json!({"telemetries": {"namespace_to_telemetries": namespaces, "root_namespace": state.mesh.root_namespace}}))
}

fn authorizationz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
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
