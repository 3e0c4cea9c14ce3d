use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crate::{Key, Kind, Object};

/// All objects at one moment. Cheap to clone, never changes.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(crate) tables: Vec<Arc<Table>>,
    pub(crate) revision: u64,
}

/// The objects of one kind.
#[derive(Debug, Default)]
pub(crate) struct Table {
    by_key: BTreeMap<Key, Arc<Object>>,
    /// Filled by the first reader after a change.
    by_age: OnceLock<Vec<Arc<Object>>>,
}

/// Used by the store when a snapshot still holds the table: the objects themselves are shared.
impl Clone for Table {
    fn clone(&self) -> Self {
        Self { by_key: self.by_key.clone(), by_age: OnceLock::new() }
    }
}

impl Table {
    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Object>> {
        self.by_key.get(key)
    }

    pub(crate) fn insert(&mut self, object: Arc<Object>) {
        self.by_age = OnceLock::new();
        self.by_key.insert(object.key.clone(), object);
    }

    pub(crate) fn remove(&mut self, key: &Key) -> bool {
        self.by_age = OnceLock::new();
        self.by_key.remove(key).is_some()
    }

    fn by_age(&self) -> &[Arc<Object>] {
        self.by_age.get_or_init(|| {
            let mut objects: Vec<_> = self.by_key.values().cloned().collect();
            objects.sort_by(|a, b| {
                (a.created, &a.key.name, &a.key.namespace).cmp(&(b.created, &b.key.name, &b.key.namespace))
            });
            objects
        })
    }
}

impl Snapshot {
    /// The object with this key.
    pub fn get(&self, key: &Key) -> Option<&Arc<Object>> {
        self.table(key.kind)?.get(key)
    }

    /// The object with this kind, namespace ("" for kinds that live in none) and name.
    pub fn find(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Arc<Object>> {
        self.get(&Key::new(kind, namespace, name))
    }

    /// All objects of a kind: the oldest first, then by name and namespace, as istiod resolves conflicts
    /// (pilot/pkg/model, `sortByCreationComparator`).
    pub fn list(&self, kind: Kind) -> std::slice::Iter<'_, Arc<Object>> {
        self.table(kind).map_or(&[][..], Table::by_age).iter()
    }

    /// How many objects of a kind there are.
    pub fn len(&self, kind: Kind) -> usize {
        self.table(kind).map_or(0, |table| table.by_key.len())
    }

    /// The same without the objects of namespaces that are not to be kept, and without those namespaces.
    pub fn within(&self, keep: impl Fn(&str) -> bool) -> Snapshot {
        let kept = |key: &Key| match key.kind {
            Kind::Namespace => keep(&key.name),
            _ => key.namespace.is_empty() || keep(&key.namespace),
        };
        let filter = |table: &Arc<Table>| {
            let own = table.by_key.iter().filter(|(key, _)| kept(key));
            let by_key = own.map(|(key, object)| (key.clone(), object.clone())).collect();
            Arc::new(Table { by_key, by_age: OnceLock::new() })
        };
        Snapshot { tables: self.tables.iter().map(filter).collect(), revision: self.revision }
    }

    /// Whether there is no object at all.
    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(|table| table.by_key.is_empty())
    }

    /// Grows by one with every change of an object.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The kinds that differ between two snapshots of one store.
    pub fn changed_kinds<'s>(&'s self, other: &'s Snapshot) -> impl Iterator<Item = Kind> + 's {
        Kind::ALL.iter().copied().filter(|kind| match (self.table(*kind), other.table(*kind)) {
            (Some(a), Some(b)) => !std::ptr::eq(a, b),
            (a, b) => a.is_some() != b.is_some(),
        })
    }

    fn table(&self, kind: Kind) -> Option<&Table> {
        self.tables.get(kind.index()).map(|table| &**table)
    }
}
