//! Substitution formats (`%REQ(:METHOD)% %RESPONSE_CODE%`), parsed once and written without allocation where that is possible.

mod command;
mod json;
mod parse;
mod time;
mod write;

use std::io::Write;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

pub use command::{Command, MetadataSource};
pub(crate) use parse::Dialect;
pub use time::TimeFormat;
pub(crate) use time::civil;
pub(crate) use write::percent_decode;

use crate::pb;
use crate::rejected::{At, Compiled, Invalid, Rejected};
use crate::stream_info::StreamInfo;
use crate::{Headers, metadata};

/// A parsed text format.
#[derive(Clone, Debug)]
pub struct Format {
    items: Box<[Item]>,
    omit_empty: bool,
}

#[derive(Clone, Debug)]
enum Item {
    Text(Box<str>),
    Command { command: Command, limit: Option<usize> },
}

/// Everything a format may print.
#[derive(Clone, Copy, Debug)]
pub struct FormatContext<'a> {
    /// The stream.
    pub info: &'a StreamInfo,
    /// Request head, as it stands.
    pub request: Option<&'a Headers>,
    /// Response head, as it stands.
    pub response: Option<&'a Headers>,
    /// Response trailers.
    pub trailers: Option<&'a Headers>,
    /// Body of an answer that this proxy made itself.
    pub local_reply_body: &'a str,
    /// For instance `DownstreamEnd`, `TcpConnectionEnd`, `NotSet`.
    pub access_log_type: &'a str,
}

impl<'a> FormatContext<'a> {
    /// The usual context while a request is processed.
    pub fn new(info: &'a StreamInfo, request: Option<&'a Headers>, response: Option<&'a Headers>) -> Self {
        Self { info, request, response, trailers: None, local_reply_body: "", access_log_type: "NotSet" }
    }

    /// The moment of writing.
    pub(crate) fn now(&self) -> SystemTime {
        (self.info.connection.clock)()
    }

    /// How long the stream lasted, or has lasted until now.
    pub(crate) fn lasted(&self) -> Option<Duration> {
        self.info.times.complete.or_else(|| self.now().duration_since(self.info.start).ok())
    }
}

/// What a command wrote.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Written {
    /// Nothing: the value does not exist.
    Missing,
    /// Text.
    Text,
    /// A number, in decimal.
    Number,
    /// A JSON value other than a plain string or number.
    Json,
}

impl Format {
    /// Parses. Missing values print as `-`, or as nothing with `omit_empty`.
    pub fn parse(text: &str, omit_empty: bool) -> Result<Self, Rejected> {
        Self::compile(text, omit_empty).map_err(|invalid| invalid.of("format", text))
    }

    pub(crate) fn compile(text: &str, omit_empty: bool) -> Compiled<Self> {
        Self::in_dialect(text, omit_empty, Dialect::default())
    }

    pub(crate) fn in_dialect(text: &str, omit_empty: bool, dialect: Dialect) -> Compiled<Self> {
        Ok(Self { items: parse::items(text, dialect)?, omit_empty })
    }

    /// Appends the text to `out`.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        self.items.iter().for_each(|item| self.write_item(item, cx, out));
    }

    fn write_item(&self, item: &Item, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        match item {
            Item::Text(text) => out.extend_from_slice(text.as_bytes()),
            Item::Command { command, limit } => {
                let start = out.len();
                if command.write(cx, out) == Written::Missing {
                    if !self.omit_empty {
                        out.push(b'-');
                    }
                } else if let Some(limit) = limit {
                    out.truncate(out.len().min(start + limit));
                }
            }
        }
    }

    /// The text, when it depends on nothing.
    pub fn constant(&self) -> Option<&str> {
        match &*self.items {
            [] => Some(""),
            [Item::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// One command alone keeps its type in JSON; everything else is a string.
    fn write_json(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
        let mut value = Vec::new();
        let written = match &*self.items {
            [Item::Command { command, limit }] => {
                let written = command.write(cx, &mut value);
                value.truncate(limit.filter(|_| written == Written::Text).unwrap_or(usize::MAX).min(value.len()));
                written
            }
            // Each part is escaped by itself, so that bytes in one do not change how others are read.
            parts => {
                out.push(b'"');
                for part in parts {
                    value.clear();
                    self.write_item(part, cx, &mut value);
                    write_json_text(&value, out);
                }
                out.push(b'"');
                return true;
            }
        };
        match written {
            Written::Missing => return false,
            Written::Number | Written::Json => out.extend_from_slice(&value),
            Written::Text => write_json_string(&value, out),
        }
        true
    }
}

fn write_json_string(text: &[u8], out: &mut Vec<u8>) {
    // Writing into a vector does not fail, and a string always serializes.
    if let Ok(text) = std::str::from_utf8(text) {
        let _ = serde_json::to_writer(out, text);
        return;
    }
    // Bytes that are no UTF-8 are escaped as if they were Latin-1, so that none is lost (Envoy `Json::sanitize`).
    let latin: String = text.iter().map(|b| char::from(*b)).collect();
    for c in serde_json::to_string(&latin).unwrap_or_default().chars() {
        match u8::try_from(c) {
            Ok(ascii @ ..0x80) => out.push(ascii),
            _ => _ = write!(out, "\\u{:04x}", u32::from(c)),
        }
    }
}

/// What stands between the quotes.
fn write_json_text(text: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    write_json_string(text, out);
    out.remove(start);
    out.pop();
}

/// A parsed JSON format: a tree whose strings are formats. Keys are sorted.
#[derive(Clone, Debug)]
pub struct JsonFormat {
    root: Node,
    omit_empty: bool,
}

#[derive(Clone, Debug)]
enum Node {
    Object(Box<[(Box<str>, Node)]>),
    Array(Box<[Node]>),
    Format(Format),
    Constant(Value),
}

impl JsonFormat {
    pub(crate) fn compile(fields: &pb::Struct, omit_empty: bool, dialect: Dialect) -> Compiled<Self> {
        Ok(Self { root: Node::object(&metadata::object(fields), omit_empty, dialect)?, omit_empty })
    }

    /// Appends one JSON object, without a line break.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        self.root.write(cx, self.omit_empty, out);
    }
}

impl Node {
    fn object(fields: &Map<String, Value>, omit_empty: bool, dialect: Dialect) -> Compiled<Self> {
        let mut all: Vec<(Box<str>, Node)> = Vec::with_capacity(fields.len());
        for (key, value) in fields {
            all.push((key.as_str().into(), Self::compile(value, omit_empty, dialect).at_key("json_format", key)?));
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self::Object(all.into()))
    }

    fn compile(value: &Value, omit_empty: bool, dialect: Dialect) -> Compiled<Self> {
        Ok(match value {
            Value::String(text) => Self::Format(Format::in_dialect(text, omit_empty, dialect)?),
            Value::Object(fields) => Self::object(fields, omit_empty, dialect)?,
            Value::Array(items) => {
                Self::Array(items.iter().map(|i| Self::compile(i, omit_empty, dialect)).collect::<Compiled<_>>()?)
            }
            other => Self::Constant(other.clone()),
        })
    }

    /// Says whether anything was written; a value that is missing is written only as `null`.
    fn write(&self, cx: &FormatContext<'_>, omit_empty: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Node::Format(format) => {
                let some = format.write_json(cx, out);
                if !some && !omit_empty {
                    out.extend_from_slice(b"null");
                }
                return some || !omit_empty;
            }
            Node::Constant(Value::Null) if omit_empty => return false,
            Node::Constant(value) => {
                let _ = serde_json::to_writer(out, value);
            }
            Node::Array(items) => {
                out.push(b'[');
                let mut first = true;
                for item in items {
                    let start = out.len();
                    if !first {
                        out.push(b',');
                    }
                    if item.write(cx, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(start);
                    }
                }
                out.push(b']');
            }
            Node::Object(fields) => {
                out.push(b'{');
                let mut first = true;
                for (key, node) in fields {
                    let start = out.len();
                    if !first {
                        out.push(b',');
                    }
                    write_json_string(key.as_bytes(), out);
                    out.push(b':');
                    if node.write(cx, omit_empty, out) {
                        first = false;
                    } else {
                        out.truncate(start);
                    }
                }
                if first && omit_empty {
                    return false;
                }
                out.push(b'}');
            }
        }
        true
    }
}

/// `SubstitutionFormatString`: text, or JSON lines.
#[derive(Clone, Debug)]
pub enum FormatString {
    /// Written as it is.
    Text(Format),
    /// One object and a line break.
    Json(JsonFormat),
}

impl FormatString {
    pub(crate) fn compile(format: &pb::core::SubstitutionFormatString) -> Compiled<Self> {
        use pb::core::data_source::Specifier;
        use pb::core::substitution_format_string::Format as Kind;
        let dialect = Dialect::of(&format.formatters)?;
        let omit = format.omit_empty_values;
        Ok(match &format.format {
            Some(Kind::TextFormat(text)) => Self::Text(Format::in_dialect(text, omit, dialect).at("text_format")?),
            Some(Kind::JsonFormat(fields)) => Self::Json(JsonFormat::compile(fields, omit, dialect)?),
            Some(Kind::TextFormatSource(source)) => match &source.specifier {
                Some(Specifier::InlineString(text)) => {
                    Self::Text(Format::in_dialect(text, omit, dialect).at("text_format_source")?)
                }
                Some(Specifier::InlineBytes(bytes)) => {
                    let text =
                        std::str::from_utf8(bytes).map_err(|e| Invalid::new("text_format_source", e.to_string()))?;
                    Self::Text(Format::in_dialect(text, omit, dialect).at("text_format_source")?)
                }
                _ => return Err(Invalid::unsupported("text_format_source")),
            },
            None => return Err(Invalid::new("format", "is missing")),
        })
    }

    /// Appends one record.
    pub fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Text(format) => format.write(cx, out),
            Self::Json(format) => {
                format.write(cx, out);
                out.push(b'\n');
            }
        }
    }
}

#[cfg(test)]
mod tests;
