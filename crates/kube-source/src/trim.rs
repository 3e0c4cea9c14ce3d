//! Leaves of an object what decides something: the rest changes often, and fills memory.

use config_store::Kind;
use kube::api::{DynamicObject, ObjectMeta};
use manifest::Document;
use serde_json::{Map, Value, json};

/// Annotations that say nothing: one is a copy of the object, the other changes with every endpoint.
const NOISE: [&str; 2] =
    ["kubectl.kubernetes.io/last-applied-configuration", "endpoints.kubernetes.io/last-change-trigger-time"];

/// What of a Secret proxies may be given: other secrets of the cluster's users are not kept.
const CERTIFICATES: [&str; 9] =
    ["cert", "key", "cacert", "crl", "tls.crt", "tls.key", "tls.ocsp-staple", "ca.crt", "ca.crl"];

/// What of a ConfigMap they may be given: the certificates, and what is revoked.
const ROOTS: [(&str, &str); 2] = [("cacert", "crl"), ("ca.crt", "ca.crl")];

/// Leaves of a ConfigMap its root certificates and their revocations; whether there are any.
pub(crate) fn keep_roots(object: &mut DynamicObject) -> bool {
    let Some(whole) = object.data.as_object_mut() else { return false };
    whole.retain(|field, _| field == "data");
    let Some(data) = whole.get_mut("data").and_then(Value::as_object_mut) else { return false };
    data.retain(|key, _| ROOTS.iter().any(|(roots, revoked)| key == roots || key == revoked));
    ROOTS.iter().any(|(roots, _)| data.get(*roots).and_then(Value::as_str).is_some_and(|text| !text.is_empty()))
}

/// The object as a document, without what no reader of the store looks at.
pub(crate) fn document(kind: Kind, api_version: &str, object: DynamicObject) -> Document {
    let origin = match &object.metadata.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", object.metadata.name.as_deref().unwrap_or_default()),
        None => format!("{kind} {}", object.metadata.name.as_deref().unwrap_or_default()),
    };
    let mut whole = Map::new();
    whole.insert("apiVersion".into(), api_version.into());
    whole.insert("kind".into(), kind.as_str().into());
    whole.insert("metadata".into(), metadata(kind, &object.metadata));
    if let Value::Object(data) = object.data {
        whole.extend(data);
    }
    match kind {
        Kind::Pod => pod(&mut whole),
        Kind::Node => {
            whole.remove("spec");
            // Gateways between networks may be reached at the nodes.
            only(&mut whole, "addresses");
            let addresses = whole.get_mut("status").and_then(|status| status["addresses"].as_array_mut());
            addresses.into_iter().for_each(|list| list.retain(|address| address["type"] == "ExternalIP"));
        }
        // Where gateways between networks are reached.
        Kind::Service => only(&mut whole, "loadBalancer"),
        Kind::Namespace => drop(whole.remove("status")),
        Kind::Secret => {
            let data = whole.get_mut("data").and_then(Value::as_object_mut);
            data.into_iter().for_each(|data| data.retain(|key, _| CERTIFICATES.contains(&key.as_str())));
        }
        // Their status has the machine's health, and allocated addresses.
        Kind::WorkloadEntry | Kind::ServiceEntry => {}
        kind if kind.is_custom() => drop(whole.remove("status")),
        _ => {}
    }
    Document::from_value(Value::Object(whole), origin)
}

/// Keeps one field of the status, or none.
fn only(whole: &mut Map<String, Value>, field: &str) {
    let kept = whole.remove("status").and_then(|mut status| status.get_mut(field).map(Value::take));
    if let Some(kept) = kept.filter(|kept| !kept.is_null()) {
        whole.insert("status".into(), json!({field: kept}));
    }
}

fn metadata(kind: Kind, metadata: &ObjectMeta) -> Value {
    let mut out = Map::new();
    let mut put = |field: &str, value: Option<Value>| value.map(|value| out.insert(field.to_owned(), value));
    put("name", metadata.name.as_deref().map(Value::from));
    put("namespace", metadata.namespace.as_deref().map(Value::from));
    put("labels", metadata.labels.as_ref().map(|labels| json!(labels)));
    let annotations = metadata.annotations.iter().flatten().filter(|(name, _)| !NOISE.contains(&name.as_str()));
    let annotations: Map<_, _> = annotations.map(|(name, value)| (name.clone(), value.as_str().into())).collect();
    put("annotations", (!annotations.is_empty()).then_some(Value::Object(annotations)));
    put("creationTimestamp", metadata.creation_timestamp.as_ref().map(|time| json!(time)));
    put("deletionTimestamp", metadata.deletion_timestamp.as_ref().map(|time| json!(time)));
    if kind == Kind::Pod {
        let owners = metadata.owner_references.as_ref();
        put("ownerReferences", owners.map(|owners| json!(owners)));
        put("uid", metadata.uid.as_deref().map(Value::from));
    }
    Value::Object(out)
}

/// A pod without volumes, variables, probes and the times of its conditions.
fn pod(whole: &mut Map<String, Value>) {
    if let Some(spec) = whole.get_mut("spec").and_then(Value::as_object_mut) {
        const SPEC: [&str; 8] = [
            "nodeName",
            "serviceAccountName",
            "hostname",
            "subdomain",
            "hostNetwork",
            "containers",
            "initContainers",
            "restartPolicy",
        ];
        spec.retain(|field, _| SPEC.contains(&field.as_str()));
        for list in ["containers", "initContainers"] {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                let Some(container) = container.as_object_mut() else { continue };
                container.retain(|field, _| matches!(field.as_str(), "name" | "ports"));
            }
        }
    }
    if let Some(status) = whole.get_mut("status").and_then(Value::as_object_mut) {
        status.retain(|field, _| matches!(field.as_str(), "phase" | "podIP" | "podIPs" | "hostIP" | "conditions"));
        if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
            conditions.retain(|condition| condition["type"] == "Ready");
            for condition in conditions {
                *condition = json!({"type": "Ready", "status": condition["status"]});
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_gateways_are_reached_is_kept() {
        let trimmed = |kind: Kind, status: Value| {
            let object = json!({"metadata": {"name": "a"}, "spec": {"x": 1}, "status": status});
            let mut value = document(kind, "v1", serde_json::from_value(object).unwrap()).value;
            value["status"].take()
        };
        let balancer = json!({"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}, "conditions": []});
        assert_eq!(trimmed(Kind::Service, balancer), json!({"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}}));
        let ip = |kind: &str| json!({"type": kind, "address": "1.2.3.4"});
        let node = json!({"conditions": [{"type": "Ready"}], "addresses": [ip("InternalIP"), ip("ExternalIP")]});
        assert_eq!(trimmed(Kind::Node, node), json!({"addresses": [ip("ExternalIP")]}));
        assert_eq!(trimmed(Kind::Node, json!({"conditions": []})), Value::Null);
    }

    #[test]
    fn a_pod_keeps_what_decides_and_nothing_that_ticks() {
        let object: DynamicObject = serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "n", "resourceVersion": "7", "uid": "u", "managedFields": [],
                "creationTimestamp": "2026-11-21T10:00:00Z",
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "x": "y"}},
            "spec": {"nodeName": "node", "volumes": [{"name": "v"}],
                "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 80}]}]},
            "status": {"podIP": "10.0.0.1", "startTime": "2026-11-21T10:00:00Z", "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-21T10:00:00Z"}]},
        }))
        .unwrap();
        let document = document(Kind::Pod, "v1", object);
        assert_eq!(document.file().to_str(), Some("Pod n/a"));
        let expected = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "namespace": "n", "annotations": {"x": "y"},
                "creationTimestamp": "2026-11-21T10:00:00Z", "uid": "u"},
            "spec": {"nodeName": "node",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}]}]},
            "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        });
        assert_eq!(document.value, expected);
    }
}
