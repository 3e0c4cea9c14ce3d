use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use istio_api::Severity;
use manifest::{Document, Error};
use mesh_types::{ArcStr, Labels};

use crate::snapshot::Table;
use crate::{Body, Key, Kind, Object, Origin, Snapshot};

/// The one writer. Readers take [`Store::snapshot`]s.
#[derive(Debug)]
pub struct Store {
    current: Snapshot,
    /// Creation time for the next object that brings none: one second after the last, so that the order of
    /// documents is their age.
    next_created: i64,
}

impl Default for Store {
    fn default() -> Self {
        let tables = Kind::ALL.iter().map(|_| Arc::new(Table::default())).collect();
        Self { current: Snapshot { tables, revision: 0 }, next_created: 1 }
    }
}

/// What an operation did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// The object is new.
    Added(Key),
    /// The object was there and says something else now.
    Updated(Key),
    /// The object was there and says the same.
    Unchanged(Key),
    /// The object is gone.
    Deleted(Key),
}

impl Change {
    /// The object's key.
    pub fn key(&self) -> &Key {
        match self {
            Change::Added(key) | Change::Updated(key) | Change::Unchanged(key) | Change::Deleted(key) => key,
        }
    }

    /// Whether readers see a difference.
    pub fn is_change(&self) -> bool {
        !matches!(self, Change::Unchanged(_))
    }
}

/// A document that was not stored, with everything that is wrong with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejected {
    /// Its key, if it is of a kind that we know.
    pub key: Option<Key>,
    /// At least one.
    pub errors: Vec<Error>,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            match &self.key {
                Some(key) => write!(f, "{key}: {error}")?,
                None => write!(f, "{error}")?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Rejected {}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads, checks and stores one document.
    ///
    /// # Errors
    /// When its kind is unknown (see [`Kind::of`]), a field has the wrong type, or istiod would refuse it; an
    /// older object of the same key then stays as it is.
    pub fn apply(&mut self, document: &Document) -> Result<Change, Rejected> {
        Object::read(document).map(|(object, _)| self.upsert(object))
    }

    /// Stores an object that is known to be good. Its creation time is kept if it is set, else that of the
    /// object it replaces, else it is younger than all others.
    pub fn upsert(&mut self, mut object: Object) -> Change {
        let key = object.key.clone();
        let table = &mut self.current.tables[key.kind.index()];
        let old = table.get(&key);
        if object.created == 0 {
            object.created = old.map_or(self.next_created, |old| old.created);
        }
        if old.is_some_and(|old| old.created == object.created && old.says_the_same(&object)) {
            return Change::Unchanged(key);
        }
        let change = if old.is_some() { Change::Updated(key) } else { Change::Added(key) };
        self.next_created = self.next_created.max(object.created + 1);
        self.current.revision += 1;
        object.resource_version = self.current.revision;
        Arc::make_mut(table).insert(Arc::new(object));
        change
    }

    /// Removes an object; `None` when there is none.
    pub fn delete(&mut self, key: &Key) -> Option<Change> {
        let table = &mut self.current.tables[key.kind.index()];
        table.get(key)?;
        Arc::make_mut(table).remove(key);
        self.current.revision += 1;
        Some(Change::Deleted(key.clone()))
    }

    /// Everything as it is now.
    pub fn snapshot(&self) -> Snapshot {
        self.current.clone()
    }
}

impl Object {
    /// Reads and checks a document; the warnings it deserves come along.
    ///
    /// # Errors
    /// As [`Store::apply`].
    pub fn read(document: &Document) -> Result<(Self, Vec<Error>), Rejected> {
        let Some(kind) = Kind::of(document.group(), document.kind()) else {
            let (kind, version) = (document.kind(), document.api_version());
            let mut message = format!("{kind} of {version} is not a kind that sidecars need");
            if let Some(meant) = Kind::like(document.group(), kind) {
                message.push_str(&format!("; {meant} of {} is", meant.group()));
            }
            return Err(Rejected { key: None, errors: vec![document.error("kind", message)] });
        };
        let key = Key::new(kind, document.namespace().unwrap_or("default"), document.name());
        let reject = |errors| Rejected { key: Some(key.clone()), errors };
        if let Some(error) = metadata_error(document, kind) {
            return Err(reject(vec![error]));
        }
        let metadata = |field: &str| -> Result<Labels, Rejected> {
            let Some(value) = document.value.pointer(&format!("/metadata/{field}")) else { return Ok(Labels::new()) };
            string_map(document, field, value).map_err(|error| reject(vec![error]))
        };
        let (labels, annotations) = (metadata("labels")?, metadata("annotations")?);
        let mut body = Body::decode(kind, document).map_err(|error| reject(vec![error]))?;
        body.set_defaults();
        let (mut errors, mut warnings) = (Vec::new(), Vec::new());
        for violation in body.validate(&key, &labels, &annotations) {
            let error = document.error(&violation.path, violation.message);
            match violation.severity {
                Severity::Error => errors.push(error),
                Severity::Warning => warnings.push(error),
            }
        }
        if !errors.is_empty() {
            return Err(reject(errors));
        }
        let written = !document.file().as_os_str().is_empty();
        let origin = written.then(|| Origin { file: document.file().to_path_buf(), line: document.line() });
        let created =
            document.value.pointer("/metadata/creationTimestamp").and_then(|time| unix_seconds(time.as_str()?));
        let created = created.unwrap_or(0);
        let healthy = matches!(body, Body::WorkloadEntry(_)).then(|| healthy(&document.value)).flatten();
        let allocated = match body {
            Body::ServiceEntry(_) => allocated(&document.value),
            _ => Vec::new(),
        };
        Ok((
            Self { key, labels, annotations, created, resource_version: 0, origin, healthy, allocated, body },
            warnings,
        ))
    }
}

/// As the API server: a name is needed, and names are DNS labels with dots.
fn metadata_error(document: &Document, kind: Kind) -> Option<Error> {
    let name = document.name();
    let valid = |name: &str| {
        name.len() <= 253
            && name.split('.').all(|label| {
                !label.starts_with('-')
                    && !label.ends_with('-')
                    && !label.is_empty()
                    && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            })
    };
    if name.is_empty() {
        return Some(document.error("metadata.name", "is missing"));
    }
    if !valid(name) {
        let message = format!("{name:?} is not a DNS name: lower case letters, digits, `-` and `.`");
        return Some(document.error("metadata.name", message));
    }
    let namespace = document.namespace().unwrap_or("default");
    if kind.is_namespaced() && (!valid(namespace) || namespace.contains('.') || namespace.len() > 63) {
        let message = format!("{namespace:?} is not a DNS label: lower case letters, digits and `-`");
        return Some(document.error("metadata.namespace", message));
    }
    None
}

/// What the status of a ServiceEntry says was allocated; text that is no address is passed over.
fn allocated(object: &serde_json::Value) -> Vec<(ArcStr, IpAddr)> {
    let list = object["status"]["addresses"].as_array().into_iter().flatten();
    list.filter_map(|own| Some((own["host"].as_str()?.into(), own["value"].as_str()?.parse().ok()?))).collect()
}

/// What the status says, as istio `pilot/pkg/model/status`, `GetBoolConditionFromSpec`.
fn healthy(object: &serde_json::Value) -> Option<bool> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    let condition = conditions.iter().find(|condition| condition["type"] == "Healthy")?;
    Some(condition["status"].as_str().is_some_and(|status| status.eq_ignore_ascii_case("true")))
}

fn string_map(document: &Document, field: &str, value: &serde_json::Value) -> Result<Labels, Error> {
    use serde_json::Value;
    let path = format!("metadata.{field}");
    let entries = match value {
        Value::Null => return Ok(Labels::new()),
        Value::Object(entries) => entries,
        _ => return Err(document.error(&path, "expected a mapping of strings")),
    };
    let mut map = Labels::new();
    for (key, value) in entries {
        match value {
            Value::String(text) => map.insert(key.clone(), text.clone()),
            Value::Null => map.insert(key.clone(), String::new()),
            _ => return Err(document.error(&format!("{path}[\"{key}\"]"), "expected a string; quote it")),
        };
    }
    Ok(map)
}

/// RFC 3339 in UTC, as Kubernetes writes it: `2026-11-21T10:00:00Z`.
fn unix_seconds(text: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let shape = text.get(10..11)? == "T" && text.ends_with('Z');
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !shape || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Days since 1970 with years starting in March, so that the leap day is the last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        365 * y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn document(yaml: &str) -> Document {
        manifest::parse(Path::new("a.yaml"), yaml).unwrap().remove(0)
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports: [{port: 80}]\n";

    #[test]
    fn applying_twice_changes_nothing() {
        let mut store = Store::new();
        let key = Key::new(Kind::Service, "default", "a");
        assert_eq!(store.apply(&document(SERVICE)), Ok(Change::Added(key.clone())));
        assert_eq!(store.apply(&document(SERVICE)), Ok(Change::Unchanged(key.clone())));
        assert_eq!(store.apply(&document(&SERVICE.replace("80", "81"))), Ok(Change::Updated(key.clone())));
        assert_eq!(store.snapshot().get(&key).unwrap().created, 1);
        assert_eq!(store.delete(&key), Some(Change::Deleted(key.clone())));
        assert_eq!(store.delete(&key), None);
    }

    #[test]
    fn a_snapshot_never_changes() {
        let mut store = Store::new();
        store.apply(&document(SERVICE)).unwrap();
        let before = store.snapshot();
        store.apply(&document(&SERVICE.replace("name: a", "name: b"))).unwrap();
        assert_eq!((before.len(Kind::Service), store.snapshot().len(Kind::Service)), (1, 2));
        let names: Vec<_> = store.snapshot().list(Kind::Service).map(|o| o.key.name.to_string()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(store.snapshot().changed_kinds(&before).collect::<Vec<_>>(), [Kind::Service]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let mut store = Store::new();
        let error = store.apply(&document(&SERVICE.replace("port: 80", "port: x"))).unwrap_err().to_string();
        assert!(error.starts_with("Service default/a: a.yaml:5:"), "{error}");
        let error = store.apply(&document(&SERVICE.replace("name: a", "name: A_b"))).unwrap_err();
        assert_eq!(error.errors[0].field.as_deref(), Some("metadata.name"));
        assert!(store.apply(&document("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}")).is_err());
        assert!(store.snapshot().is_empty());
    }

    #[test]
    fn null_is_an_unset_field_and_a_value_where_values_are_free() {
        let plugin = "apiVersion: extensions.istio.io/v1alpha1\nkind: WasmPlugin\nmetadata: {name: a}\n\
            spec: {url: 'oci://x', phase: null, selector: null, pluginConfig: {a: null, b: [null]}}\n";
        let (object, _) = Object::read(&document(plugin)).unwrap();
        let Body::WasmPlugin(plugin) = &object.body else { panic!("{object:?}") };
        assert!(plugin.selector.is_none());
        let config = serde_json::to_value(&plugin.plugin_config).unwrap();
        assert_eq!(config, serde_json::json!({"a": null, "b": [null]}));
    }

    #[test]
    fn timestamps_are_unix_seconds() {
        assert_eq!(unix_seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(unix_seconds("2024-02-29T12:00:01Z"), Some(1_709_208_001));
        assert_eq!(unix_seconds("2024-02-29"), None);
        assert_eq!(unix_seconds("é024-02-29T12:00:01Z"), None);
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::Value;
        let key =
            prop::sample::select(vec!["hosts", "http", "match", "uri", "prefix", "route", "weight", "timeout", "x"]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key.clone(), inner), 0..4)
                    .prop_map(|fields| fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_object_makes_it_panic(kind in prop::sample::select(Kind::ALL), spec in any_json(), name in "[a-z]{0,3}") {
            let group = kind.group();
            let version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
            let value = serde_json::json!({
                "apiVersion": version, "kind": kind.as_str(), "metadata": {"name": name, "labels": spec}, "spec": spec,
            });
            let mut store = Store::new();
            let applied = store.apply(&Document::from_value(value, "a.yaml")).is_ok();
            prop_assert_eq!(store.snapshot().len(kind), usize::from(applied));
        }

        #[test]
        fn a_store_agrees_with_a_plain_map(operations in prop::collection::vec((0u8..4, any::<bool>(), 0u8..3), 0..40)) {
            let mut store = Store::new();
            let mut model = std::collections::BTreeMap::new();
            for (name, delete, label) in operations {
                let name = format!("n{name}");
                if delete {
                    let gone = store.delete(&Key::new(Kind::Namespace, "", &name)).is_some();
                    prop_assert_eq!(gone, model.remove(&name).is_some());
                } else {
                    let mut object = Object::new("", &name, Body::Namespace(Box::default()));
                    object.labels.insert("label".into(), label.to_string());
                    let before = model.insert(name, label);
                    prop_assert_eq!(store.upsert(object).is_change(), before != Some(label));
                }
            }
            let snapshot = store.snapshot();
            let stored = snapshot.list(Kind::Namespace).map(|o| (o.key.name.to_string(), o.labels["label"].clone()));
            let expected: Vec<_> = model.into_iter().map(|(name, label)| (name, label.to_string())).collect();
            let mut stored: Vec<_> = stored.collect();
            stored.sort();
            prop_assert_eq!(stored, expected);
        }
    }
}
