//! One document: its value and where each of its fields was written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Line and column, both from 1; 0 means unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// The shape of a value with a [`Mark`] for each entry.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) enum Marks {
    #[default]
    Leaf,
    Sequence(Vec<(Mark, Marks)>),
    Mapping(BTreeMap<Box<str>, (Mark, Marks)>),
}

mod path {
    use super::{Arc, Deserialize, Path, PathBuf, Serialize};

    pub(super) fn serialize<S: serde::Serializer>(path: &Arc<Path>, to: S) -> Result<S::Ok, S::Error> {
        path.as_ref().serialize(to)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Arc<Path>, D::Error> {
        PathBuf::deserialize(from).map(Into::into)
    }
}

impl Mark {
    fn move_down(&mut self, lines: u32) {
        if self.line > 0 {
            self.line += lines;
        }
    }
}

impl Marks {
    fn move_down(&mut self, lines: u32) {
        let entries: &mut dyn Iterator<Item = &mut (Mark, Marks)> = match self {
            Marks::Leaf => return,
            Marks::Sequence(entries) => &mut entries.iter_mut(),
            Marks::Mapping(entries) => &mut entries.values_mut(),
        };
        for (mark, marks) in entries {
            mark.move_down(lines);
            marks.move_down(lines);
        }
    }
}

/// One manifest: an object, or any other YAML mapping, with positions.
///
/// `value` keeps explicit nulls, since in a patch or a Helm value they mean something; the decoders
/// below treat them as unset.
///
/// Serialized it keeps its positions, for commands that ask a running mesh what it was given.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Document {
    /// What was written, as JSON.
    pub value: Value,
    #[serde(with = "path")]
    pub(crate) file: Arc<Path>,
    pub(crate) mark: Mark,
    pub(crate) marks: Marks,
}

impl Document {
    /// A document that was never text: made by a program or received as JSON.
    pub fn from_value(value: Value, file: impl Into<PathBuf>) -> Self {
        Self { value, file: file.into().into(), mark: Mark::default(), marks: Marks::Leaf }
    }

    /// `apiVersion`, or "" when there is none.
    pub fn api_version(&self) -> &str {
        self.text("/apiVersion")
    }

    /// The group part of `apiVersion`; "" for the core group.
    pub fn group(&self) -> &str {
        self.api_version().split_once('/').map_or("", |(group, _)| group)
    }

    /// `kind`, or "" when there is none.
    pub fn kind(&self) -> &str {
        self.text("/kind")
    }

    /// `metadata.name`, or "" when there is none.
    pub fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// `metadata.namespace`, if it is set and not empty.
    pub fn namespace(&self) -> Option<&str> {
        Some(self.text("/metadata/namespace")).filter(|namespace| !namespace.is_empty())
    }

    /// The file this came from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Line of the first field; 0 when unknown.
    pub fn line(&self) -> u32 {
        self.mark.line
    }

    /// Line of the field at `path`, written `spec.http[0].route[1].destination.host`.
    ///
    /// Keys that hold dots are written in brackets and quotes: `metadata.annotations["a.b/c"]`.
    /// `None` when there is no such field, or it never stood in a file.
    pub fn line_of(&self, path: &str) -> Option<u32> {
        let (mark, depth_left) = self.nearest(path);
        (depth_left == 0 && mark.line > 0).then_some(mark.line)
    }

    /// Decodes the whole document.
    ///
    /// # Errors
    /// When a field has the wrong type; the error names it and its line.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_path_to_error::deserialize(&self.value).map_err(|error| self.decode_error("", &error))
    }

    /// Decodes one top-level field such as `spec`, which is an object. A missing one, or null, decodes as an empty object.
    ///
    /// # Errors
    /// When a field has the wrong type; the error names it and its line.
    pub fn decode_field<T: DeserializeOwned>(&self, field: &str) -> Result<T, Error> {
        let empty = Value::Object(serde_json::Map::new());
        let value = match self.value.get(field) {
            None | Some(Value::Null) => &empty,
            Some(value @ Value::Object(_)) => value,
            // What serde derives would take a list for the fields in their order.
            Some(other) => return Err(self.error(field, format!("expected an object, found {}", type_name(other)))),
        };
        serde_path_to_error::deserialize(value).map_err(|error| self.decode_error(field, &error))
    }

    /// An error about the field at `path`; its position is that of the deepest part of the path that
    /// was written.
    pub fn error(&self, path: &str, message: impl Into<String>) -> Error {
        let (mark, _) = self.nearest(path);
        Error {
            file: self.file.to_path_buf(),
            line: mark.line,
            column: mark.column,
            field: (!path.is_empty()).then(|| path.to_owned()),
            message: message.into(),
        }
    }

    /// The text that it was parsed from began so many lines below the file's beginning.
    pub(crate) fn move_down(&mut self, lines: u32) {
        if lines > 0 {
            self.mark.move_down(lines);
            self.marks.move_down(lines);
        }
    }

    /// The part of this document under `items[index]`, as a document of its own.
    pub(crate) fn item(&self, index: usize, value: &Value) -> Self {
        let (mark, marks) = match &self.marks {
            Marks::Mapping(fields) => match fields.get("items") {
                Some((_, Marks::Sequence(items))) => items.get(index).cloned().unwrap_or_default(),
                _ => Default::default(),
            },
            _ => Default::default(),
        };
        Self { value: value.clone(), file: self.file.clone(), mark, marks }
    }

    fn decode_error<E: std::fmt::Display>(&self, prefix: &str, error: &serde_path_to_error::Error<E>) -> Error {
        let path = error.path().to_string();
        let path = match (prefix, path.as_str()) {
            ("", ".") => String::new(),
            (prefix, ".") => prefix.to_owned(),
            ("", path) => path.to_owned(),
            (prefix, path) if path.starts_with('[') => format!("{prefix}{path}"),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        self.error(&path, error.inner().to_string())
    }

    fn text(&self, pointer: &str) -> &str {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// The mark of the deepest existing part of `path`, and how many steps of it are missing.
    fn nearest(&self, path: &str) -> (Mark, usize) {
        let steps = steps(path);
        let (mut mark, mut marks) = (self.mark, &self.marks);
        for (done, step) in steps.iter().enumerate() {
            let next = match (step, marks) {
                (Step::Key(key), Marks::Mapping(fields)) => fields.get(key.as_ref()).or_else(|| {
                    let other = other_spelling(key);
                    fields.get(other.as_str())
                }),
                (Step::Index(index), Marks::Sequence(items)) => items.get(*index),
                _ => None,
            };
            match next {
                Some((next_mark, next_marks)) => (mark, marks) = (*next_mark, next_marks),
                None => return (mark, steps.len() - done),
            }
        }
        (mark, 0)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Step<'p> {
    Key(Cow<'p, str>),
    Index(usize),
}

/// `a.b[0]["c.d"]` as steps. Whatever is malformed becomes a key that does not exist.
fn steps(path: &str) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix("[\"") {
            let end = inner.find("\"]").unwrap_or(inner.len());
            steps.push(Step::Key(Cow::Borrowed(&inner[..end])));
            rest = inner.get(end + 2..).unwrap_or("");
        } else if let Some(inner) = rest.strip_prefix('[') {
            let end = inner.find(']').unwrap_or(inner.len());
            steps.push(match inner[..end].parse() {
                Ok(index) => Step::Index(index),
                Err(_) => Step::Key(Cow::Borrowed(&inner[..end])),
            });
            rest = inner.get(end + 1..).unwrap_or("");
        } else {
            let rest_of_key = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest_of_key.find(['.', '[']).unwrap_or(rest_of_key.len());
            if end > 0 {
                steps.push(Step::Key(Cow::Borrowed(&rest_of_key[..end])));
            }
            rest = &rest_of_key[end..];
            if end == 0 && rest.starts_with('.') {
                rest = &rest[1..];
            }
        }
    }
    steps
}

/// Istio reads both `exportTo` and `export_to`; a path in one spelling finds the other.
fn other_spelling(key: &str) -> String {
    let mut out = String::with_capacity(key.len() + 4);
    if key.contains('_') {
        let mut upper = false;
        for c in key.chars() {
            match c {
                '_' => upper = true,
                c if upper => {
                    out.extend(c.to_uppercase());
                    upper = false;
                }
                c => out.push(c),
            }
        }
    } else {
        for c in key.chars() {
            if c.is_ascii_uppercase() {
                out.push('_');
                out.push(c.to_ascii_lowercase());
            } else {
                out.push(c);
            }
        }
    }
    out
}

/// What a value is, for messages: `a string`, `a list`, `null`.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_into_keys_and_indexes() {
        let key = |s: &'static str| Step::Key(Cow::Borrowed(s));
        assert_eq!(
            steps("spec.http[0].match[\"a.b/c\"].x"),
            [key("spec"), key("http"), Step::Index(0), key("match"), key("a.b/c"), key("x")]
        );
        assert_eq!(steps(""), []);
        assert_eq!(steps("..[[x"), [key("[x")]);
    }
}
