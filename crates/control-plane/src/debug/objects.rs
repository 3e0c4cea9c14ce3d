//! Configuration as it was written: istiod's pages of objects and of policies by namespace.

use std::collections::BTreeMap;
use std::sync::Arc;

use config_store::{Body, Kind, Object};
use serde_json::{Value, json};

use super::{About, Failure, connected, parameter, registry};
use crate::world::State;

/// All objects of Istio and of the Gateway API, as manifests.
pub(super) fn configz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_custom());
    Ok(kinds.flat_map(|kind| state.snapshot.list(*kind)).map(|object| manifest(object)).collect())
}

/// The kinds, each in the version that istiod keeps it in.
pub(super) fn resourcesz(_: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let kinds = Kind::ALL.iter().filter(|kind| kind.is_custom());
    Ok(kinds.map(|kind| json!({"group": kind.group(), "version": version(*kind), "kind": kind.as_str()})).collect())
}

pub(super) fn telemetryz(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    if parameter(query, "proxyID").is_some_and(|proxy| !proxy.is_empty()) {
        return of_proxy(state, about, query);
    }
    let namespaces = by_namespace(
        state,
        Kind::Telemetry,
        |object| json!({"name": &*object.key.name, "namespace": &*object.key.namespace, "spec": spec(&object.body)}),
    );
    Ok(json!({"telemetries": {"namespace_to_telemetries": namespaces, "root_namespace": state.mesh.root_namespace}}))
}

/// What holds for one proxy, from the widest to the narrowest (istiod `computedTelemetries`).
fn of_proxy(state: &State, about: &About<'_>, query: &str) -> Result<Value, Failure> {
    let node = connected(state, about, query)?;
    let name = |name: &str, namespace: &str| json!({"Namespace": namespace, "Name": name});
    let none = name("", "");
    let mut keys = json!({"Root": none, "Proxy": none, "Namespace": none, "Workload": none});
    let (mut metrics, mut logging, mut tracing) = (Vec::new(), Vec::new(), Vec::new());
    for config in state.push.telemetries(&node.namespace, &node.labels) {
        let narrow = config.spec.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
        let place = match narrow {
            true => "Workload",
            false if config.namespace == state.push.root_namespace => "Root",
            false => "Proxy",
        };
        keys[place] = name(&config.name, &config.namespace);
        let mut spec = serde_json::to_value(&config.spec).unwrap_or_default();
        let mut list = |field: &str| match spec[field].take() {
            Value::Array(list) => list,
            _ => Vec::new(),
        };
        metrics.extend(list("metrics"));
        tracing.extend(list("tracing"));
        let logs = list("accessLogging");
        if !logs.is_empty() {
            let mut row = json!({"Root": none, "Proxy": none, "Namespace": none, "Workload": none, "Logging": logs});
            row[place] = keys[place].clone();
            logging.push(row);
        }
    }
    (keys["Metrics"], keys["Logging"], keys["Tracing"]) = (metrics.into(), logging.into(), tracing.into());
    Ok(keys)
}

pub(super) fn authorizationz(state: &State, _: &About<'_>, _: &str) -> Result<Value, Failure> {
    let namespaces = by_namespace(state, Kind::AuthorizationPolicy, |object| {
        json!({"name": &*object.key.name, "namespace": &*object.key.namespace,
            "annotations": object.annotations, "spec": spec(&object.body)})
    });
    Ok(
        json!({"authorization_policies": {"namespace_to_policies": namespaces, "root_namespace": state.mesh.root_namespace}}),
    )
}

/// The oldest first.
fn by_namespace(state: &State, kind: Kind, row: impl Fn(&Object) -> Value) -> Value {
    let mut all: Vec<&Arc<Object>> = state.snapshot.list(kind).collect();
    all.sort_by_key(|object| (object.created, &object.key.name, &object.key.namespace));
    let mut namespaces: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for object in all {
        namespaces.entry(&object.key.namespace).or_default().push(row(object));
    }
    json!(namespaces)
}

/// The version in which istiod keeps a kind.
fn version(kind: Kind) -> &'static str {
    match kind {
        Kind::EnvoyFilter => "v1alpha3",
        Kind::ProxyConfig => "v1beta1",
        Kind::WasmPlugin | Kind::TrafficExtension => "v1alpha1",
        _ => "v1",
    }
}

/// An object as a manifest; Kubernetes' own without what is secret.
fn manifest(object: &Object) -> Value {
    let key = &object.key;
    let mut metadata = json!({"name": &*key.name, "resourceVersion": object.resource_version.to_string(),
        "creationTimestamp": registry::time(object.created)});
    if !key.namespace.is_empty() {
        metadata["namespace"] = (&*key.namespace).into();
    }
    if !object.labels.is_empty() {
        metadata["labels"] = json!(object.labels);
    }
    let mut annotations = object.annotations.clone();
    if let Some(origin) = &object.origin {
        annotations.insert("outrigger/origin".to_owned(), format!("{}:{}", origin.file.display(), origin.line));
    }
    if !annotations.is_empty() {
        metadata["annotations"] = json!(annotations);
    }
    let group = key.kind.group();
    let version = version(key.kind);
    let version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
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
        Body::TrafficExtension(spec) => serde_json::to_value(spec),
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
