//! Text to documents.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::{DuplicateKeyPolicy, Location, Spanned};

use crate::document::{Mark, Marks, type_name};
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
    parse_each(file, text, |document| documents.push(document))?;
    Ok(documents)
}

/// As [`parse`], but each document is handed over before the next is read: a dump of a big cluster needs a hundred
/// times its size in memory otherwise. After an error, what was handed over is all there will be.
///
/// # Errors
/// As [`parse`].
pub fn parse_each(file: &Path, text: &str, mut take: impl FnMut(Document)) -> Result<(), Error> {
    let mut lines = 0;
    for piece in pieces(text) {
        let mut documents = Vec::new();
        for mut document in parse_plain(file, piece).map_err(|error| further_down(error, lines))? {
            document.move_down(lines);
            expand(document, &mut documents)?;
        }
        documents.into_iter().for_each(&mut take);
        lines += piece.bytes().filter(|byte| *byte == b'\n').count() as u32;
    }
    Ok(())
}

/// Bytes of text that are parsed at a time, as far as documents allow.
const PIECE: usize = 64 << 10;

/// Cuts at lines that start a document. YAML allows `---` at a line's start nowhere else.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let from = rest.as_bytes().get(PIECE..).map(|_| PIECE);
        let cut = from.and_then(|from| next_marker(rest.as_bytes(), from));
        let (piece, after) = rest.split_at(cut.unwrap_or(rest.len()));
        rest = after;
        Some(piece)
    })
}

/// Where the next line with a document marker starts, from `from` on.
fn next_marker(text: &[u8], from: usize) -> Option<usize> {
    let found = text[from..].windows(4).position(|window| window == b"\n---")?;
    let start = from + found + 1;
    match text.get(start + 3) {
        None | Some(b'\n' | b'\r' | b' ' | b'\t') => Some(start),
        Some(_) => next_marker(text, start),
    }
}

fn further_down(error: Error, lines: u32) -> Error {
    Error { line: if error.line > 0 { error.line + lines } else { 0 }, ..error }
}

/// Parses any YAML or JSON whose documents are mappings, such as a MeshConfig; nothing else is asked of
/// them.
///
/// # Errors
/// The first syntax error, or the first document that is not a mapping.
pub fn parse_plain(file: &Path, text: &str) -> Result<Vec<Document>, Error> {
    plain::<true>(file, text, DuplicateKeyPolicy::Error)
}

/// As [`parse_plain`] for Envoy's configuration, whose reader (yaml-cpp) takes the name of a field as it is written: `y` is
/// no truth.
///
/// # Errors
/// As [`parse_plain`].
pub fn parse_envoy(file: &Path, text: &str) -> Result<Vec<Document>, Error> {
    plain::<false>(file, text, DuplicateKeyPolicy::Error)
}

/// As [`parse_plain`], but of a key that is written twice the last counts: as sigs.k8s.io/yaml reads what
/// injection works with.
///
/// # Errors
/// As [`parse_plain`].
pub fn parse_lenient(file: &Path, text: &str) -> Result<Vec<Document>, Error> {
    plain::<true>(file, text, DuplicateKeyPolicy::LastWins)
}

fn plain<const TYPED_KEYS: bool>(
    file: &Path,
    text: &str,
    duplicates: DuplicateKeyPolicy,
) -> Result<Vec<Document>, Error> {
    let file: Arc<Path> = file.into();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    type Root<const TYPED_KEYS: bool> = Spanned<Node<true, TYPED_KEYS>>;
    let roots = match serde_saphyr::from_multiple_with_options::<Root<TYPED_KEYS>>(text, options(duplicates)) {
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

/// The mappings that a text holds, without their positions, in half the time of [`parse_lenient`].
///
/// # Errors
/// As [`parse_lenient`].
pub fn parse_values(file: &Path, text: &str) -> Result<Vec<Value>, Error> {
    match serde_saphyr::from_multiple_with_options::<Node<false, true>>(text, options(DuplicateKeyPolicy::LastWins)) {
        Ok(roots) if roots.iter().all(|root| root.value.is_object()) => {
            Ok(roots.into_iter().map(|root| root.value).collect())
        }
        // The slow way knows where it is wrong, and what else may be read.
        _ => Ok(parse_lenient(file, text)?.into_iter().map(|document| document.value).collect()),
    }
}

/// What `kubectl` reads: 1.1 booleans and octals, merge keys.
fn options(duplicates: DuplicateKeyPolicy) -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: duplicates,
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
    // Advice to callers of the library is none to those who write YAML.
    let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or_default().to_owned();
    Error { file: file.to_path_buf(), line, column, field: None, message }
}

fn mark(location: Location) -> Mark {
    Mark { line: location.line() as u32, column: location.column() as u32 }
}

/// A JSON value with the marks of what is inside it, if it is `MARKED`. Names of fields are [`Key`]s.
struct Node<const MARKED: bool, const TYPED_KEYS: bool> {
    value: Value,
    marks: Marks,
}

impl<const MARKED: bool, const TYPED_KEYS: bool> Node<MARKED, TYPED_KEYS> {
    fn leaf(value: impl Into<Value>) -> Self {
        Self { value: value.into(), marks: Marks::Leaf }
    }
}

impl<'de, const MARKED: bool, const TYPED_KEYS: bool> Deserialize<'de> for Node<MARKED, TYPED_KEYS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor::<MARKED, TYPED_KEYS>)
    }
}

struct NodeVisitor<const MARKED: bool, const TYPED_KEYS: bool>;

impl<'de, const MARKED: bool, const TYPED_KEYS: bool> Visitor<'de> for NodeVisitor<MARKED, TYPED_KEYS> {
    type Value = Node<MARKED, TYPED_KEYS>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Self::Value, E> {
        Ok(Node::leaf(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Self::Value, E> {
        Ok(Node::leaf(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Self::Value, E> {
        Ok(Node::leaf(v))
    }

    fn visit_i128<E>(self, v: i128) -> Result<Self::Value, E> {
        Ok(Node::leaf(Number::from_f64(v as f64).map_or(Value::Null, Value::Number)))
    }

    fn visit_u128<E>(self, v: u128) -> Result<Self::Value, E> {
        Ok(Node::leaf(Number::from_f64(v as f64).map_or(Value::Null, Value::Number)))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Self::Value, E> {
        Number::from_f64(v).map(Node::leaf).ok_or_else(|| E::custom("JSON has no such number"))
    }

    fn visit_str<E>(self, v: &str) -> Result<Self::Value, E> {
        Ok(Node::leaf(v))
    }

    fn visit_string<E>(self, v: String) -> Result<Self::Value, E> {
        Ok(Node::leaf(v))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Node::leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Node::leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let (mut values, mut marks) = (Vec::new(), Vec::new());
        if !MARKED {
            while let Some(item) = items.next_element::<Self::Value>()? {
                values.push(item.value);
            }
            return Ok(Node { value: Value::Array(values), marks: Marks::Leaf });
        }
        while let Some(item) = items.next_element::<Spanned<Self::Value>>()? {
            values.push(item.value.value);
            marks.push((mark(item.referenced), item.value.marks));
        }
        Ok(Node { value: Value::Array(values), marks: Marks::Sequence(marks) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        let (mut values, mut marks) = (Map::new(), BTreeMap::new());
        if !MARKED {
            while let Some(Key::<TYPED_KEYS>(key)) = fields.next_key()? {
                let node = fields.next_value::<Self::Value>()?;
                values.insert(key, node.value);
            }
            return Ok(Node { value: Value::Object(values), marks: Marks::Leaf });
        }
        while let Some(Spanned { value: Key::<TYPED_KEYS>(key), referenced, .. }) = fields.next_key()? {
            let node = fields.next_value::<Self::Value>()?;
            // The key's position, not the value's: a block value starts on a later line.
            marks.insert(key.as_str().into(), (mark(referenced), node.marks));
            values.insert(key, node.value);
        }
        Ok(Node { value: Value::Object(values), marks: Marks::Mapping(marks) })
    }
}

/// The name of a field. `TYPED`: as `kubectl` (sigs.k8s.io/yaml), what would be a number or a boolean as a value is the
/// text of that, and `y` is `true`.
struct Key<const TYPED: bool>(String);

impl<'de, const TYPED: bool> Deserialize<'de> for Key<TYPED> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = String;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_bool<E>(self, v: bool) -> Result<String, E> {
                Ok(v.to_string())
            }

            fn visit_i64<E>(self, v: i64) -> Result<String, E> {
                Ok(v.to_string())
            }

            fn visit_u64<E>(self, v: u64) -> Result<String, E> {
                Ok(v.to_string())
            }

            fn visit_f64<E>(self, v: f64) -> Result<String, E> {
                Ok(v.to_string())
            }

            fn visit_str<E>(self, v: &str) -> Result<String, E> {
                Ok(v.to_owned())
            }

            fn visit_string<E>(self, v: String) -> Result<String, E> {
                Ok(v)
            }
        }

        match TYPED {
            true => deserializer.deserialize_any(KeyVisitor),
            false => deserializer.deserialize_str(KeyVisitor),
        }
        .map(Self)
    }
}

#[cfg(test)]
mod tests;
