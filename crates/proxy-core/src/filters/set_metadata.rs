//! Writes fixed metadata (Envoy `SetMetadataFilter`).

use std::sync::Arc;

use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::metadata::{Metadata, object};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// What is written, in order.
#[derive(Debug)]
pub struct SetMetadata(Box<[Entry]>);

#[derive(Debug)]
struct Entry {
    namespace: ArcStr,
    fields: Arc<Map<String, Value>>,
    /// Goes into what is there already.
    merge: bool,
}

impl SetMetadata {
    pub(crate) fn compile(config: &pb::http_filter::set_metadata::v3::Config) -> Compiled<Self> {
        let entry = |namespace: &str, value: &pb::Struct, merge| Entry {
            namespace: namespace.into(),
            fields: Arc::new(object(value)),
            merge,
        };
        let mut entries = Vec::with_capacity(config.metadata.len() + 1);
        #[expect(deprecated, reason = "still understood, and written first")]
        if let Some(value) = config.value.as_ref().filter(|_| !config.metadata_namespace.is_empty()) {
            entries.push(entry(&config.metadata_namespace, value, true));
        }
        for (i, of) in config.metadata.iter().enumerate() {
            if of.metadata_namespace.is_empty() {
                return Err(Invalid::new("metadata_namespace", "is empty")).at_index("metadata", i);
            }
            if of.typed_value.is_some() {
                return Err(Invalid::unsupported("typed_value")).at_index("metadata", i);
            }
            // Without a value there is nothing to write.
            entries.extend(of.value.as_ref().map(|value| entry(&of.metadata_namespace, value, of.allow_overwrite)));
        }
        Ok(Self(entries.into()))
    }

    /// Writes it; how many entries found their namespace taken.
    pub fn apply(&self, metadata: &mut Metadata) -> u64 {
        let mut denied = 0;
        for entry in &self.0 {
            match metadata.namespace(&entry.namespace) {
                None => metadata.share(&entry.namespace, &entry.fields),
                Some(old) if entry.merge => {
                    let mut merged = old.clone();
                    merge(&mut merged, &entry.fields);
                    metadata.merge(&entry.namespace, &merged);
                }
                Some(_) => denied += 1,
            }
        }
        denied
    }
}

/// Envoy `StructUtil::update`: lists grow, structs are merged, everything else is replaced.
fn merge(into: &mut Map<String, Value>, from: &Map<String, Value>) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Array(old)), Value::Array(new)) => old.extend(new.iter().cloned()),
            (Some(Value::Object(old)), Value::Object(new)) => merge(old, new),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}
