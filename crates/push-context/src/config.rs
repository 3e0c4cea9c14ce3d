use std::sync::Arc;

use config_store::{Body, Kind, Object, Snapshot};
use mesh_types::{ArcStr, Labels};

use crate::ByNamespace;

/// A configuration object: its name and age, and what it says.
#[derive(Clone, Debug, PartialEq)]
pub struct Config<T> {
    /// Kubernetes name.
    pub name: ArcStr,
    /// Kubernetes namespace.
    pub namespace: ArcStr,
    /// Unix seconds.
    pub created: i64,
    /// Annotations.
    pub annotations: Labels,
    /// Where each of its HTTP routes was written, if it was made from routes of the Gateway API.
    pub sources: Vec<RouteSource>,
    /// The object's `spec`.
    pub spec: T,
}

/// Where a route was written.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteSource {
    /// The object; it lives where what was made of it lives.
    pub kind: Kind,
    /// Its name.
    pub name: ArcStr,
    /// `spec.rules[0].matches[1]`.
    pub field: String,
}

impl<T> Config<T> {
    /// Whether it was made from routes of the Gateway API, which differ in a few details from what they were made
    /// into (istiod `UseGatewaySemantics`).
    pub fn is_gateway_api(&self) -> bool {
        !self.sources.is_empty()
    }

    /// Takes the metadata of a stored object.
    pub(crate) fn of(object: &Object, spec: T) -> Config<T> {
        Config {
            name: object.key.name.clone(),
            namespace: object.key.namespace.clone(),
            created: object.created,
            annotations: object.annotations.clone(),
            sources: Vec::new(),
            spec,
        }
    }
}

/// All objects of a kind, oldest first.
pub(crate) fn list<T>(snapshot: &Snapshot, kind: Kind, take: impl Fn(&Body) -> Option<T>) -> Vec<Arc<Config<T>>> {
    snapshot.list(kind).filter_map(|object| Some(Arc::new(Config::of(object, take(&object.body)?)))).collect()
}

/// All objects of a kind by namespace, oldest first.
pub(crate) fn by_namespace<T>(snapshot: &Snapshot, kind: Kind, take: impl Fn(&Body) -> Option<T>) -> ByNamespace<T> {
    let mut out = ByNamespace::new();
    for config in list(snapshot, kind, take) {
        out.entry(config.namespace.clone()).or_insert_with(Vec::new).push(config);
    }
    out
}
