use std::fmt;

use serde_json::{Value, json};

use crate::world::Resource;

/// Where the causes and cures of each code are written.
const DOCUMENTATION: &str = "https://istio.io/latest/docs/reference/config/analysis";

/// How bad it is; the worst first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Level {
    /// Traffic does not go where it is meant to.
    Error,
    /// It may not.
    Warning,
    /// Good to know.
    Info,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Error => "Error",
            Level::Warning => "Warning",
            Level::Info => "Info",
        })
    }
}

/// The object that a message is about.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Subject {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its namespace; "" for kinds that live in none.
    pub namespace: String,
    /// The file and line, if it was written in one: `a.yaml:12`.
    pub place: String,
}

/// `VirtualService default/reviews`.
impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// One finding.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Message {
    /// istioctl's code, such as `IST0101`.
    pub code: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What it is about.
    pub subject: Subject,
    /// What is wrong.
    pub text: String,
}

/// `Error [IST0101] (VirtualService default/x a.yaml:12) Referenced host not found: "y"`.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.level)?;
        self.without_level(f)
    }
}

impl Message {
    /// About a whole object.
    pub(crate) fn new(code: &'static str, level: Level, resource: &Resource<'_>, text: impl Into<String>) -> Message {
        Message { code, level, subject: resource.subject(), text: text.into() }
    }

    /// With the line of a field, if the field was written.
    pub(crate) fn at(mut self, resource: &Resource<'_>, field: &str) -> Message {
        if let Some(line) = resource.document.line_of(field) {
            self.subject.place = resource.place(line);
        }
        self
    }

    fn without_level(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = Some(&self.subject.place).filter(|place| !place.is_empty());
        let space = if place.is_some() { " " } else { "" };
        let place = place.map_or("", String::as_str);
        write!(f, "[{}] ({}{space}{place}) {}", self.code, self.subject, self.text)
    }

    /// As on a terminal that shows colours.
    pub(crate) fn coloured(&self) -> String {
        struct Rest<'a>(&'a Message);
        impl fmt::Display for Rest<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.without_level(f)
            }
        }
        let colour = match self.level {
            Level::Error => "\u{1b}[1;31m",
            Level::Warning => "\u{1b}[33m",
            Level::Info => "",
        };
        format!("{colour}{}\u{1b}[0m {}", self.level, Rest(self))
    }

    /// As istioctl writes it for programs.
    pub(crate) fn json(&self) -> Value {
        let mut out = json!({
            "code": self.code,
            "documentationUrl": format!("{DOCUMENTATION}/{}/?ref=istioctl-analyze", self.code.to_lowercase()),
            "level": self.level.to_string(),
            "message": self.text,
            "origin": self.subject.to_string(),
        });
        if !self.subject.place.is_empty() {
            out["reference"] = self.subject.place.as_str().into();
        }
        out
    }
}

/// The worst first, then by code and object; each once.
pub(crate) fn sort(messages: &mut Vec<Message>) {
    let key = |m: &Message| {
        let Subject { kind, name, namespace, .. } = &m.subject;
        (m.level, m.code, format!("{kind}/{name}/{namespace}"), m.to_string())
    };
    messages.sort_by_cached_key(key);
    messages.dedup();
}

/// Where to read more.
pub(crate) fn documentation() -> &'static str {
    DOCUMENTATION
}
