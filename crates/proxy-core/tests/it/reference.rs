//! Where the reference data is, and reading it.

use std::path::{Path, PathBuf};

use envoy_api::Message;
use serde_json::Value;

/// The folder of reference data, or `None` with one visible line.
pub(crate) fn folder(name: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("OUTRIGGER_CONFORMANCE") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"),
    };
    let folder = root.join(name);
    if !folder.is_dir() {
        println!("SKIPPED: no reference data at {}", folder.display());
        return None;
    }
    Some(folder)
}

/// The sub-folders, sorted.
pub(crate) fn folders(of: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(of).unwrap().map(|e| e.unwrap().path()).filter(|path| path.is_dir()).collect();
    all.sort();
    all
}

/// The messages in a JSON list, of a type.
pub(crate) fn messages<M: Message + Default>(file: &Path, type_url: &str) -> Vec<M> {
    let Ok(text) = std::fs::read_to_string(file) else { return Vec::new() };
    let values: Vec<Value> = serde_json::from_str(&text).unwrap();
    values.iter().map(|value| message(value, type_url)).collect()
}

/// A message out of its JSON form.
pub(crate) fn message<M: Message + Default>(value: &Value, type_url: &str) -> M {
    let bytes = envoy_api::json::from_json(type_url, value).unwrap_or_else(|e| panic!("{e}: {value}"));
    M::decode(bytes.as_slice()).unwrap()
}

/// YAML as JSON.
pub(crate) fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap()
}
