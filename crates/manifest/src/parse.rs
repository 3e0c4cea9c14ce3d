//! Text to documents.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::{DuplicateKeyPolicy, Location, Spanned};

use crate::document::{Mark, Marks};
use crate::{ALIAS_EVENTS_LIMIT, Document, Error};

/// Documents of one file.
const DOCUMENTS_LIMIT: usize = 1 << 20;
/// Mappings, sequences and scalars of one file.
const NODES_LIMIT: usize = 1 << 24;

/// Parses the manifests of one file. Lists are expanded, empty documents dropped.
///
/// # Errors
/// The first syntax error, or the first document that is not an object with `kind` and `apiVersion`.
pub fn parse(file: &Path, text: &str) -> Result<Vec<Document>, Error> {
    let mut documents = Vec::new();
    for document in parse_plain(file, text)? {
        expand(document, &mut documents)?;
    }
    Ok(documents)
}

/// Parses any YAML or JSON whose documents are mappings, such as a MeshConfig; nothing else is asked of
/// them.
///
/// # Errors
/// The first syntax error, or the first document that is not a mapping.
pub fn parse_plain(file: &Path, text: &str) -> Result<Vec<Document>, Error> {
    let file: Arc<Path> = file.into();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let roots = match serde_saphyr::from_multiple_with_options::<Spanned<Node>>(text, options()) {
        Ok(roots) => roots,
        // JSON may be indented by tabs, which YAML forbids; then only the positions are lost.
        Err(error) => match serde_json::from_str::<Value>(text) {
            Ok(value) => return Ok(vec![Document { value, file, mark: Mark::default(), marks: Marks::Leaf }]),
            Err(_) => return Err(syntax_error(&file, &error)),
        },
    };
    let mut documents = Vec::with_capacity(roots.len());
    for root in roots {
        let document = Document {
            mark: mark(root.referenced),
            value: root.value.value,
            marks: root.value.marks,
            file: file.clone(),
        };
        if !document.value.is_object() {
            return Err(document.error("", format!("expected an object, found {}", type_name(&document.value))));
        }
        documents.push(document);
    }
    Ok(documents)
}

/// What `kubectl` reads: 1.1 booleans and octals, merge keys; a key written twice is an error.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        legacy_octal_numbers: true,
        with_snippet: false,
        ignore_binary_tag_for_string: true,
        // The size of the file is the limit of what it holds; a dump of a big cluster is one file of many documents.
        budget: serde_saphyr::budget! {
            max_documents: DOCUMENTS_LIMIT,
            max_nodes: NODES_LIMIT,
            max_events: 2 * NODES_LIMIT,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: ALIAS_EVENTS_LIMIT },
    }
}

fn expand(document: Document, out: &mut Vec<Document>) -> Result<(), Error> {
    if document.kind().is_empty() {
        return Err(document.error("kind", "is missing: every object needs a kind"));
    }
    if document.api_version().is_empty() {
        return Err(document.error("apiVersion", "is missing: every object needs an apiVersion"));
    }
    // As kubectl: anything called …List with items, List itself and PodList alike.
    match document.value.get("items") {
        Some(Value::Array(items)) if document.kind().ends_with("List") => {
            for (index, item) in items.iter().enumerate() {
                let item = document.item(index, item);
                if !item.value.is_object() {
                    return Err(document.error(&format!("items[{index}]"), "is not an object"));
                }
                expand(item, out)?;
            }
        }
        _ => out.push(document),
    }
    Ok(())
}

fn syntax_error(file: &Path, error: &serde_saphyr::Error) -> Error {
    let Mark { line, column } = error.location().map(mark).unwrap_or_default();
    let text = error.without_snippet().to_string();
    // The library ends its message with the position, which we print in front of it.
    let message = match text.rfind(" at line ") {
        Some(end) if line > 0 => text[..end].to_owned(),
        _ => text,
    };
    Error { file: file.to_path_buf(), line, column, field: None, message }
}

fn mark(location: Location) -> Mark {
    Mark { line: location.line() as u32, column: location.column() as u32 }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A JSON value with the marks of what is inside it.
struct Node {
    value: Value,
    marks: Marks,
}

impl Node {
    fn leaf(value: impl Into<Value>) -> Self {
        Self { value: value.into(), marks: Marks::Leaf }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Node, E> {
        Ok(Node::leaf(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Node, E> {
        Ok(Node::leaf(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Node, E> {
        Ok(Node::leaf(v))
    }

    fn visit_i128<E>(self, v: i128) -> Result<Node, E> {
        Ok(Node::leaf(Number::from_f64(v as f64).map_or(Value::Null, Value::Number)))
    }

    fn visit_u128<E>(self, v: u128) -> Result<Node, E> {
        Ok(Node::leaf(Number::from_f64(v as f64).map_or(Value::Null, Value::Number)))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Node, E> {
        Number::from_f64(v).map(Node::leaf).ok_or_else(|| E::custom("JSON has no such number"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Node, E> {
        Ok(Node::leaf(v))
    }

    fn visit_string<E>(self, v: String) -> Result<Node, E> {
        Ok(Node::leaf(v))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let (mut values, mut marks) = (Vec::new(), Vec::new());
        while let Some(item) = items.next_element::<Spanned<Node>>()? {
            values.push(item.value.value);
            marks.push((mark(item.referenced), item.value.marks));
        }
        Ok(Node { value: Value::Array(values), marks: Marks::Sequence(marks) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Node, A::Error> {
        let (mut values, mut marks) = (Map::new(), BTreeMap::new());
        while let Some(key) = fields.next_key::<Spanned<String>>()? {
            let node = fields.next_value::<Node>()?;
            // The key's position, not the value's: a block value starts on a later line.
            marks.insert(key.value.as_str().into(), (mark(key.referenced), node.marks));
            values.insert(key.value, node.value);
        }
        Ok(Node { value: Value::Object(values), marks: Marks::Mapping(marks) })
    }
}

#[cfg(test)]
mod tests;
