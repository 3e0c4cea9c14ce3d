//! What the user asked for: all applied objects, and the views of them that the cluster works with.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use manifest::Document;
use serde_json::{Map, Value, json};

use crate::pod::facts::Data;
use crate::services::External;
use crate::workload::{self, Workload};

/// Identity of an object. `namespace` is empty for namespaces themselves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id {
    pub(crate) kind: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = self.kind.to_ascii_lowercase();
        if self.namespace.is_empty() || self.namespace == "default" {
            write!(f, "{kind}/{}", self.name)
        } else {
            write!(f, "{kind}/{}.{}", self.name, self.namespace)
        }
    }
}

/// What an `apply` did to one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    Created,
    Configured,
    Unchanged,
}

impl Applied {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
        }
    }
}

/// All applied objects.
#[derive(Default)]
pub(crate) struct Objects {
    documents: BTreeMap<Id, Document>,
    /// The order in which they came first: age decides between objects that contradict each other.
    born: HashMap<Id, u64>,
    services: BTreeMap<(String, String), Service>,
    workloads: BTreeMap<Id, Workload>,
    /// Labels and annotations of every namespace in use; `true` when a document declared it.
    namespaces: BTreeMap<String, NamespaceMeta>,
}

/// A namespace as injection sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamespaceMeta {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Objects {
    /// Takes a document in; the document returned carries its namespace.
    pub(crate) fn apply(&mut self, mut document: Document) -> (Id, Applied, Document) {
        let (id, applied) = self.prepare(&mut document);
        if applied != Applied::Unchanged {
            self.index(&id, &document);
        }
        self.documents.insert(id.clone(), document.clone());
        let age = self.born.values().max().map_or(0, |last| last + 1);
        self.born.entry(id.clone()).or_insert(age);
        (id, applied, document)
    }

    /// What [`apply`](Self::apply) would do.
    pub(crate) fn would_apply(&self, document: &Document) -> (Id, Applied) {
        self.prepare(&mut document.clone())
    }

    /// Fills the namespace in and compares with what is there.
    fn prepare(&self, document: &mut Document) -> (Id, Applied) {
        let id = id_of(document);
        if !id.namespace.is_empty()
            && let Some(meta) = document.value.get_mut("metadata").and_then(Value::as_object_mut)
        {
            meta.insert("namespace".to_owned(), json!(id.namespace));
        }
        let applied = match self.documents.get(&id) {
            None => Applied::Created,
            Some(old) if old.value == document.value => Applied::Unchanged,
            Some(_) => Applied::Configured,
        };
        (id, applied)
    }

    fn index(&mut self, id: &Id, document: &Document) {
        match id.kind.as_str() {
            "Service" => {
                if let Ok(service) = document.decode::<Service>() {
                    self.services.insert((id.namespace.clone(), id.name.clone()), service);
                }
            }
            "Namespace" => {
                let meta = NamespaceMeta {
                    labels: strings(document.value.pointer("/metadata/labels")),
                    annotations: strings(document.value.pointer("/metadata/annotations")),
                };
                self.namespaces.insert(id.name.clone(), meta);
            }
            _ => {
                if let Some(mut workload) = workload::of(document, &id.namespace) {
                    if let Some(old) = self.workloads.get(id) {
                        workload.uid.clone_from(&old.uid);
                    }
                    self.workloads.insert(id.clone(), workload);
                }
            }
        }
    }

    /// Forgets an object; false if it was not there.
    pub(crate) fn delete(&mut self, id: &Id) -> bool {
        if id.kind == "Service" {
            self.services.remove(&(id.namespace.clone(), id.name.clone()));
        }
        self.workloads.remove(id);
        self.born.remove(id);
        self.documents.remove(id).is_some()
    }

    /// Adds a workload that no document describes (a job made of a CronJob).
    pub(crate) fn add_workload(&mut self, workload: Workload) {
        let id = Id { kind: workload.kind.clone(), namespace: workload.namespace.clone(), name: workload.name.clone() };
        self.workloads.insert(id, workload);
    }

    /// Every document as it was applied last, the oldest object first.
    pub(crate) fn documents(&self) -> Vec<&Document> {
        let mut all: Vec<_> = self.documents.iter().collect();
        all.sort_by_key(|(id, _)| self.born.get(*id));
        all.into_iter().map(|(_, document)| document).collect()
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = (&(String, String), &Service)> {
        self.services.iter()
    }

    pub(crate) fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.services.get(&(namespace.to_owned(), name.to_owned()))
    }

    pub(crate) fn workloads(&self) -> impl Iterator<Item = (&Id, &Workload)> {
        self.workloads.iter()
    }

    pub(crate) fn workload(&self, id: &Id) -> Option<&Workload> {
        self.workloads.get(id)
    }

    pub(crate) fn namespace(&self, name: &str) -> Option<&NamespaceMeta> {
        self.namespaces.get(name)
    }

    /// Namespaces that objects refer to and nobody declared.
    pub(crate) fn undeclared(&self) -> Vec<String> {
        let mut missing: Vec<String> = self
            .documents
            .keys()
            .map(|id| id.namespace.clone())
            .filter(|ns| !ns.is_empty() && !self.namespaces.contains_key(ns))
            .collect();
        missing.sort();
        missing.dedup();
        missing
    }

    /// Config maps and secrets as pods read them; `root_pem` becomes `istio-ca-root-cert` in every namespace.
    pub(crate) fn data(&self, root_pem: &str) -> Data {
        let mut data = Data { config_maps: HashMap::new(), secrets: HashMap::new() };
        for namespace in self.namespaces.keys() {
            let content = BTreeMap::from([("root-cert.pem".to_owned(), root_pem.as_bytes().to_vec())]);
            data.config_maps.insert((namespace.clone(), "istio-ca-root-cert".to_owned()), Arc::new(content));
        }
        for (id, document) in &self.documents {
            let key = (id.namespace.clone(), id.name.clone());
            match id.kind.as_str() {
                "ConfigMap" => {
                    if let Ok(map) = document.decode::<ConfigMap>() {
                        let mut values: BTreeMap<String, Vec<u8>> =
                            map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes())).collect();
                        values.extend(map.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)));
                        data.config_maps.insert(key, Arc::new(values));
                    }
                }
                "Secret" => {
                    if let Ok(secret) = document.decode::<Secret>() {
                        let mut values: BTreeMap<String, Vec<u8>> =
                            secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect();
                        values.extend(
                            secret.string_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes())),
                        );
                        data.secrets.insert(key, Arc::new(values));
                    }
                }
                _ => {}
            }
        }
        data
    }

    /// Endpoints that the user wrote for a service without selector.
    pub(crate) fn external(&self, namespace: &str, name: &str) -> Vec<External> {
        let mut out = Vec::new();
        for (id, document) in &self.documents {
            if id.namespace != namespace {
                continue;
            }
            if id.kind == "EndpointSlice" {
                let of = document.value.pointer("/metadata/labels/kubernetes.io~1service-name").and_then(Value::as_str);
                if of == Some(name)
                    && let Ok(slice) = document.decode::<EndpointSlice>()
                {
                    out.extend(of_slice(&slice));
                }
            } else if id.kind == "Endpoints"
                && id.name == name
                && let Ok(endpoints) = document.decode::<Endpoints>()
            {
                out.extend(of_endpoints(&endpoints));
            }
        }
        out
    }
}

fn of_slice(slice: &EndpointSlice) -> Vec<External> {
    let ports: BTreeMap<String, u16> = slice
        .ports
        .iter()
        .flatten()
        .filter_map(|port| Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port?).ok()?)))
        .collect();
    slice
        .endpoints
        .iter()
        .flatten()
        .flat_map(|endpoint| {
            let ready = endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false);
            endpoint.addresses.iter().filter_map(move |text| Some((text.parse().ok()?, ready)))
        })
        .map(|(ip, ready)| External { ip, ports: ports.clone(), ready })
        .collect()
}

fn of_endpoints(endpoints: &Endpoints) -> Vec<External> {
    let mut out = Vec::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports: BTreeMap<String, u16> = subset
            .ports
            .iter()
            .flatten()
            .filter_map(|port| Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port).ok()?)))
            .collect();
        let addresses = subset.addresses.iter().flatten().map(|a| (a, true));
        let waiting = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
        out.extend(addresses.chain(waiting).filter_map(|(address, ready)| {
            Some(External { ip: address.ip.parse().ok()?, ports: ports.clone(), ready })
        }));
    }
    out
}

/// Identity of a document; objects without a namespace are in `default`.
pub(crate) fn id_of(document: &Document) -> Id {
    let cluster_scoped = document.kind() == "Namespace";
    Id {
        kind: document.kind().to_owned(),
        namespace: if cluster_scoped { String::new() } else { document.namespace().unwrap_or("default").to_owned() },
        name: document.name().to_owned(),
    }
}

fn strings(value: Option<&Value>) -> BTreeMap<String, String> {
    value
        .and_then(Value::as_object)
        .map(|map: &Map<String, Value>| {
            map.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deleting_a_virtual_service_leaves_the_service_of_the_same_name() {
        let mut objects = Objects::default();
        for (api, kind) in [("v1", "Service"), ("networking.istio.io/v1", "VirtualService")] {
            let value = json!({"apiVersion": api, "kind": kind, "metadata": {"name": "reviews"}, "spec": {}});
            objects.apply(Document::from_value(value, "t.yaml"));
        }
        let id = |kind: &str| Id { kind: kind.to_owned(), namespace: "default".to_owned(), name: "reviews".to_owned() };
        assert!(objects.delete(&id("VirtualService")));
        assert!(objects.service("default", "reviews").is_some());
        assert!(objects.delete(&id("Service")));
        assert!(objects.service("default", "reviews").is_none());
    }
}
