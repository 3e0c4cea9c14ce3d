//! The runtime: values by key that may change while the proxy runs, over the defaults of the configuration.
//!
//! Compilation binds a key once ([`Runtime::live`]); from then on whoever decides reads one atomic, and a change of the
//! runtime writes it. Keys that only requests know are looked up in a snapshot ([`Runtime::get`]). Nothing is locked while
//! traffic flows.

mod entry;
mod live;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mesh_types::ArcStr;
use serde_json::Value;

pub use entry::Entry;
pub use live::{Live, RuntimeValue};

use crate::rejected::{At, Compiled, Invalid};
use crate::{fields, metadata, pb};

/// The layers of values, later ones over earlier ones, and who follows them. Clones are the same runtime.
#[derive(Clone, Default)]
pub struct Runtime(Arc<Inner>);

/// Not its values: whoever keeps a clone is not different when they change.
impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Runtime")
    }
}

#[derive(Default)]
struct Inner {
    snapshot: ArcSwap<Snapshot>,
    /// Whoever changes the snapshot holds its lock.
    cells: Mutex<live::Cells>,
}

#[derive(Clone, Default)]
struct Snapshot {
    layers: Vec<Layer>,
    /// Times the layers were put together.
    loads: u64,
}

#[derive(Clone, Debug)]
struct Layer {
    name: ArcStr,
    kind: LayerKind,
    values: BTreeMap<ArcStr, Entry>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum LayerKind {
    Static,
    /// What `/runtime_modify` changes.
    Admin,
}

/// Numbers for statistics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RuntimeCounts {
    /// Keys that have a value.
    pub keys: u64,
    /// Layers.
    pub layers: u64,
    /// Whether `/runtime_modify` has set something that still holds.
    pub overridden: bool,
    /// Times the layers were put together.
    pub loads: u64,
}

impl Snapshot {
    /// What holds under a key: the last layer that says something wins.
    fn entry(&self, key: &str) -> Option<&Entry> {
        self.layers.iter().rev().find_map(|layer| layer.values.get(key))
    }

    fn keys(&self) -> BTreeSet<&ArcStr> {
        self.layers.iter().flat_map(|layer| layer.values.keys()).collect()
    }
}

impl Runtime {
    /// The runtime of a bootstrap.
    pub(crate) fn compile(config: Option<&pb::bootstrap::LayeredRuntime>) -> Compiled<Self> {
        let mut layers: Vec<Layer> = Vec::new();
        for (i, layer) in config.iter().flat_map(|c| &c.layers).enumerate() {
            let layer = Layer::compile(layer).at_index("layers", i)?;
            if layers.iter().any(|other| other.name == layer.name) {
                return Err(Invalid::new(format!("layers[{i}].name"), format!("there are two layers {}", layer.name)));
            }
            if layer.kind == LayerKind::Admin && layers.iter().any(|other| other.kind == LayerKind::Admin) {
                return Err(Invalid::new(format!("layers[{i}]"), "there may be one admin layer at most"));
            }
            layers.push(layer);
        }
        // Envoy puts the layers together twice while it starts.
        let snapshot = ArcSwap::from_pointee(Snapshot { layers, loads: 2 });
        Ok(Self(Arc::new(Inner { snapshot, cells: Mutex::default() })))
    }

    fn cells(&self) -> std::sync::MutexGuard<'_, live::Cells> {
        self.0.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands under `key`, or `default`, now and after every change. Without a key: always the default.
    pub fn live<T: RuntimeValue>(&self, key: &str, default: T) -> Live<T> {
        if key.is_empty() {
            return Live::fixed(default);
        }
        let mut cells = self.cells();
        let now = self.get(key).unwrap_or(default);
        cells.bind(key, default, now)
    }

    /// A switch of the configuration, with its own default or this one.
    pub(crate) fn flag(&self, flag: Option<&pb::core::RuntimeFeatureFlag>, default: bool) -> Live<bool> {
        let Some(flag) = flag else { return Live::fixed(default) };
        self.live(&flag.runtime_key, fields::flag(flag.default_value.as_ref(), default))
    }

    /// A number of the configuration; without it this one.
    pub(crate) fn double(&self, number: Option<&pb::core::RuntimeDouble>, default: f64) -> Live<f64> {
        match number {
            Some(number) => self.live(&number.runtime_key, number.default_value),
            None => Live::fixed(default),
        }
    }

    /// What stands under `key` at this moment.
    pub fn get<T: RuntimeValue>(&self, key: &str) -> Option<T> {
        self.0.snapshot.load().entry(key).and_then(T::of_entry)
    }

    /// Sets values of the admin layer; an empty one takes the key out. `false`: there is no such layer.
    pub fn modify<'a>(&self, changes: impl IntoIterator<Item = (&'a str, &'a str)>) -> bool {
        let mut cells = self.cells();
        let mut next = Snapshot::clone(&self.0.snapshot.load());
        let Some(admin) = next.layers.iter_mut().find(|layer| layer.kind == LayerKind::Admin) else { return false };
        for (key, value) in changes {
            match value {
                "" => drop(admin.values.remove(key)),
                value => drop(admin.values.insert(key.into(), Entry::of_written(value))),
            }
        }
        next.loads += 1;
        cells.refresh(|key| next.entry(key));
        self.0.snapshot.store(Arc::new(next));
        true
    }

    /// Whether any key begins so.
    pub fn mentions(&self, prefix: &str) -> bool {
        self.0.snapshot.load().layers.iter().flat_map(|layer| layer.values.keys()).any(|key| key.starts_with(prefix))
    }

    /// The layers' names.
    pub fn layers(&self) -> Vec<ArcStr> {
        self.0.snapshot.load().layers.iter().map(|layer| layer.name.clone()).collect()
    }

    /// All keys with their values as they were written, one a layer; "" where a layer says nothing.
    pub fn entries(&self) -> BTreeMap<ArcStr, Vec<String>> {
        let snapshot = self.0.snapshot.load();
        let written = |key: &ArcStr| {
            let of = |layer: &Layer| layer.values.get(key).map(|e| e.written().to_owned()).unwrap_or_default();
            snapshot.layers.iter().map(of).collect()
        };
        snapshot.keys().into_iter().map(|key| (key.clone(), written(key))).collect()
    }

    /// For statistics.
    pub fn counts(&self) -> RuntimeCounts {
        let snapshot = self.0.snapshot.load();
        RuntimeCounts {
            keys: snapshot.keys().len() as u64,
            layers: snapshot.layers.len() as u64,
            overridden: snapshot.layers.iter().any(|l| l.kind == LayerKind::Admin && !l.values.is_empty()),
            loads: snapshot.loads,
        }
    }
}

impl Layer {
    fn compile(layer: &pb::bootstrap::RuntimeLayer) -> Compiled<Self> {
        use pb::bootstrap::runtime_layer::LayerSpecifier;
        let name = fields::required("name", &layer.name)?;
        let mut values = BTreeMap::new();
        let kind = match &layer.layer_specifier {
            Some(LayerSpecifier::StaticLayer(fields)) => {
                for (key, value) in metadata::object(fields) {
                    flatten(&key, &value, &mut values).at("static_layer")?;
                }
                LayerKind::Static
            }
            Some(LayerSpecifier::AdminLayer(_)) => LayerKind::Admin,
            Some(LayerSpecifier::DiskLayer(_)) => return Err(Invalid::unsupported("disk_layer")),
            Some(LayerSpecifier::RtdsLayer(_)) => return Err(Invalid::unsupported("rtds_layer")),
            None => return Err(Invalid::new("layer_specifier", "is missing")),
        };
        Ok(Self { name, kind, values })
    }
}

/// Nested objects become dotted keys, unless they are a share.
fn flatten(key: &str, value: &Value, out: &mut BTreeMap<ArcStr, Entry>) -> Compiled<()> {
    match value {
        Value::Object(fields)
            if !fields.is_empty() && !fields.contains_key("numerator") && !fields.contains_key("denominator") =>
        {
            fields.iter().try_for_each(|(name, value)| flatten(&format!("{key}.{name}"), value, out))
        }
        other => {
            let entry = Entry::of_value(other).ok_or_else(|| Invalid::new(key, "is no value of a runtime"))?;
            out.insert(key.into(), entry);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
