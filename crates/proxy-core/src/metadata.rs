use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use mesh_types::ArcStr;
use prost::Message as _;
use serde_json::{Map, Number, Value};

use crate::pb;

/// Structured facts by namespace: of a route, a cluster, an endpoint, or written by filters during a request.
///
/// Few namespaces, but thousands of clusters and hosts with some: a list, sorted. Fields that are the same for many requests
/// are shared by them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(Vec<(ArcStr, Arc<Map<String, Value>>)>);

/// Metadata that stays encoded until somebody asks for it: of thousands of clusters few are ever used.
pub(crate) struct EncodedMetadata {
    encoded: Box<[u8]>,
    compiled: OnceLock<Arc<Metadata>>,
}

impl EncodedMetadata {
    /// `encoded`: a `core.v3.Metadata`.
    pub(crate) fn new(encoded: Vec<u8>) -> Self {
        Self { encoded: encoded.into(), compiled: OnceLock::new() }
    }

    pub(crate) fn get(&self) -> &Arc<Metadata> {
        self.compiled.get_or_init(|| {
            // It is part of a message that was read before.
            let metadata = pb::core::Metadata::decode(&*self.encoded).unwrap_or_default();
            Arc::new(Metadata::compile(Some(&metadata)))
        })
    }
}

impl std::fmt::Debug for EncodedMetadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

/// Facts by name that filters of one connection or request hand to each other; text is all that is needed here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FilterState {
    /// The facts.
    pub values: BTreeMap<ArcStr, ArcStr>,
    /// The names of those that hash policies may look at (Envoy's `Hashable`).
    pub hashable: BTreeSet<ArcStr>,
}

impl FilterState {
    /// The hash of an object that has one.
    pub fn hash(&self, key: &ArcStr) -> Option<u64> {
        let value = self.values.get(key).filter(|_| self.hashable.contains(key))?;
        Some(crate::hash::xx64(value.as_bytes(), 0))
    }
}

impl Metadata {
    pub(crate) fn compile(metadata: Option<&pb::core::Metadata>) -> Self {
        let Some(metadata) = metadata else { return Self::default() };
        let mut all: Vec<(ArcStr, _)> = metadata
            .filter_metadata
            .iter()
            .map(|(name, fields)| (name.as_str().into(), Arc::new(object(fields))))
            .collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Self(all)
    }

    /// All namespaces with their fields.
    pub fn iter(&self) -> impl Iterator<Item = (&ArcStr, &Map<String, Value>)> {
        self.0.iter().map(|(name, fields)| (name, &**fields))
    }

    pub(crate) fn namespace(&self, name: &str) -> Option<&Map<String, Value>> {
        self.0.iter().find(|(known, _)| **known == *name).map(|(_, fields)| &**fields)
    }

    /// The value at a path in a namespace.
    pub fn get(&self, namespace: &str, path: &[impl AsRef<str>]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        let mut value = self.namespace(namespace)?.get(first.as_ref())?;
        for key in rest {
            value = value.as_object()?.get(key.as_ref())?;
        }
        Some(value)
    }

    /// Sets one field of a namespace.
    pub fn set(&mut self, namespace: &str, key: &str, mut value: Value) {
        let fields = self.of(namespace);
        // Protobuf prints the fields of a struct in order.
        value.sort_all_objects();
        fields.insert(key.to_owned(), value);
        fields.sort_keys();
    }

    /// The fields of a namespace, which is made if there is none.
    fn of(&mut self, namespace: &str) -> &mut Map<String, Value> {
        let at = match self.0.binary_search_by(|(name, _)| (**name).cmp(namespace)) {
            Ok(at) => at,
            Err(at) => {
                self.0.insert(at, (namespace.into(), Arc::default()));
                at
            }
        };
        Arc::make_mut(&mut self.0[at].1)
    }

    /// As [`merge`](Metadata::merge), without a copy where all fields of the namespace are set. The values are in order.
    pub fn share(&mut self, namespace: &ArcStr, values: &Arc<Map<String, Value>>) {
        match self.0.binary_search_by(|(name, _)| (**name).cmp(namespace)) {
            Ok(at) if self.0[at].1.keys().all(|key| values.contains_key(key)) => self.0[at].1 = values.clone(),
            Ok(_) => self.merge(namespace, values),
            Err(at) => self.0.insert(at, (namespace.clone(), values.clone())),
        }
    }

    /// Adds values to a namespace, which is there from then on.
    pub fn merge(&mut self, namespace: &str, values: &Map<String, Value>) {
        self.of(namespace);
        for (key, value) in values {
            self.set(namespace, key, value.clone());
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The fields that load balancing looks at.
    pub(crate) fn lb(&self) -> Option<&Map<String, Value>> {
        self.namespace("envoy.lb")
    }
}

/// The `envoy.lb` criteria of a route: which subset of a cluster's hosts may serve it. Sorted by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetadataMatch(pub Vec<(ArcStr, Value)>);

impl MetadataMatch {
    pub(crate) fn compile(metadata: Option<&pb::core::Metadata>) -> Option<Self> {
        Self::from_fields(Metadata::compile(metadata).lb()?)
    }

    fn from_fields(fields: &Map<String, Value>) -> Option<Self> {
        let mut all: Vec<(ArcStr, Value)> = fields.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        (!all.is_empty()).then_some(Self(all))
    }

    /// Whether a host with this metadata fulfils all of them. `list_as_any`: of a list, one value is enough.
    pub(crate) fn fits(&self, metadata: &Metadata, list_as_any: bool) -> bool {
        let fields = metadata.lb();
        self.0.iter().all(|(key, wanted)| match fields.and_then(|f| f.get(&**key)) {
            Some(Value::Array(list)) if list_as_any => list.contains(wanted),
            Some(value) => value == wanted,
            None => false,
        })
    }

    /// These criteria over those of an outer level; the inner ones win (weighted cluster over route).
    pub(crate) fn merged_over(self, outer: Option<&MetadataMatch>) -> Self {
        let mut all: BTreeMap<ArcStr, Value> = outer.map(|o| o.0.iter().cloned().collect()).unwrap_or_default();
        all.extend(self.0);
        Self(all.into_iter().collect())
    }
}

/// A protobuf struct as JSON object.
pub fn object(fields: &pb::Struct) -> Map<String, Value> {
    // Sorted, because protobuf maps have no order and equal input must give equal tables.
    let mut sorted: Vec<_> = fields.fields.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(b.0));
    sorted.into_iter().map(|(k, v)| (k.clone(), json(v))).collect()
}

/// A protobuf value as JSON. Whole numbers become integers, so that they print without a fraction.
pub(crate) fn json(value: &pb::Value) -> Value {
    match &value.kind {
        None | Some(pb::ValueKind::NullValue(_)) => Value::Null,
        Some(pb::ValueKind::BoolValue(b)) => Value::Bool(*b),
        Some(pb::ValueKind::StringValue(s)) => Value::String(s.clone()),
        Some(pb::ValueKind::NumberValue(n)) => number(*n),
        Some(pb::ValueKind::ListValue(list)) => Value::Array(list.values.iter().map(json).collect()),
        Some(pb::ValueKind::StructValue(fields)) => Value::Object(object(fields)),
    }
}

/// A number as JSON; see [`json`].
pub(crate) fn number(n: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if n.fract() == 0.0 && n.abs() <= EXACT {
        return Value::Number((n as i64).into());
    }
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}
