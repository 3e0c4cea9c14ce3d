//! YAML and JSON manifests with the position of every field.
//!
//! In: text of files as `kubectl` reads them (YAML 1.1 scalars, several documents, lists, anchors).
//! Out: [`Document`]s: a JSON value plus the line of every field, so that any later complaint can say
//! `file:line:column: spec.http[0].route[1].destination.host: …`.
//! Never: knowledge of a kind, of Kubernetes or of Istio; network access.

mod document;
mod parse;
mod read;

pub use document::{Document, type_name};
pub use parse::{parse, parse_each, parse_envoy, parse_lenient, parse_plain, parse_values};
pub use read::{ALIAS_EVENTS_LIMIT, FILE_SIZE_LIMIT, is_manifest, read, read_each};

use std::path::PathBuf;

/// A manifest, or a field of one, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file as the user named it; `-` for standard input, `<memory>` when there was none.
    pub file: PathBuf,
    /// Counted from 1; 0 when the position is not known.
    pub line: u32,
    /// Counted from 1 in characters; 0 when the position is not known.
    pub column: u32,
    /// Path of the field inside the document, like `spec.http[0].match`.
    pub field: Option<String>,
    /// What is wrong: lower case, no full stop.
    pub message: String,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
            if self.column > 0 {
                write!(f, ":{}", self.column)?;
            }
        }
        if let Some(field) = &self.field {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for Error {}
