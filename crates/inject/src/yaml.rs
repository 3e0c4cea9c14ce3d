//! YAML in, through `manifest`, and out.

mod emit;

use std::path::Path;

use manifest::{Document, Error};
use serde_json::{Map, Value};

pub use emit::emit;

/// The one mapping that a text holds, with its positions; an empty text is an empty mapping.
pub(crate) fn document(file: &Path, text: &str) -> Result<Document, Error> {
    let mut documents = manifest::parse_lenient(file, text)?;
    match documents.len() {
        0 => Ok(Document::from_value(Value::Object(Map::new()), file)),
        1 => Ok(documents.remove(0)),
        _ => Err(documents[1].error("", "expected one document, found several")),
    }
}

/// As [`document`], without positions.
pub(crate) fn mapping(name: &str, text: &str) -> Result<Value, Error> {
    let file = Path::new(name);
    let mut values = manifest::parse_values(file, text)?;
    match values.len() {
        0 => Ok(Value::Object(Map::new())),
        1 => Ok(values.remove(0)),
        // It has the position of what is too many.
        _ => document(file, text).map(|document| document.value),
    }
}
