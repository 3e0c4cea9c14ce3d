//! YAML in, through `manifest`, and out.

mod emit;

use std::path::Path;

use manifest::Error;
use serde_json::{Map, Value};

pub(crate) use emit::emit;

/// The one mapping that a text holds; an empty text is an empty mapping.
pub(crate) fn mapping(name: &str, text: &str) -> Result<Value, Error> {
    let documents = manifest::parse_plain(Path::new(name), text)?;
    match documents.len() {
        0 => Ok(Value::Object(Map::new())),
        1 => Ok(documents.into_iter().next().map(|document| document.value).unwrap_or_default()),
        _ => Err(documents[1].error("", "expected one document, found several")),
    }
}
