//! What injection works with: templates, values, mesh configuration, selectors, modes.

mod builtin;
mod files;
mod values;

use std::collections::BTreeMap;

use go_template::{Delimiters, Limits, Template};
use manifest::Document;
use serde_json::Value;

pub use builtin::Builtin;
pub use files::{Files, Texts};

use crate::decision::{Policy, Selection};
use crate::functions::FUNCTIONS;
use crate::mesh::Mesh;
use crate::rendered::Rendered;
use crate::schema;

/// A configuration that cannot be used; the one before stays.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {file}")]
    Read { file: String, source: std::io::Error },
    /// Bad syntax or a field of the wrong type: the error has file, line and field.
    #[error(transparent)]
    Document(Box<manifest::Error>),
    /// `line` is where the template starts; 0 when that is not known.
    #[error("{file}:{line}: template {name} cannot be parsed")]
    Template { file: String, line: u32, name: String, source: Box<go_template::Error> },
}

impl From<manifest::Error> for ConfigError {
    fn from(error: manifest::Error) -> Self {
        Self::Document(Box::new(error))
    }
}

/// When the sidecar runs as an init container that keeps running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NativeSidecars {
    #[default]
    Off,
    On,
}

/// Everything about injection that is not the pod.
#[derive(Debug)]
pub struct Config {
    pub(crate) templates: BTreeMap<String, Template>,
    /// The templates as they were written, for people.
    template_sources: BTreeMap<String, String>,
    pub(crate) default_templates: Vec<String>,
    pub(crate) aliases: BTreeMap<String, Vec<String>>,
    pub(crate) selection: Selection,
    pub(crate) injected_annotations: BTreeMap<String, String>,
    pub(crate) values: Value,
    pub(crate) mesh: Mesh,
    /// `istio.io/rev`; "" and "default" are the default revision.
    pub revision: String,
    pub native: NativeSidecars,
    /// `COMPLIANCE_POLICY`
    pub compliance_policy: String,
    pub(crate) limits: Limits,
    pub(crate) rendered: Rendered,
}

impl Config {
    /// The names of the templates, in order.
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.keys().map(String::as_str).collect()
    }

    /// The templates' text, by name.
    pub fn template_sources(&self) -> &BTreeMap<String, String> {
        &self.template_sources
    }

    /// What the policy says where nothing else does.
    pub fn policy(&self) -> Policy {
        self.selection.policy
    }

    /// A configuration's parts put together: the injection configuration (`templates` and so on), the
    /// values and the mesh configuration.
    fn assemble(inject: &Document, values: &Document, mesh: &Document) -> Result<Self, ConfigError> {
        let templates = templates(inject)?;
        let source = |name: &String| inject.value["templates"][name].as_str().or(inject.value["template"].as_str());
        let template_sources =
            templates.keys().filter_map(|name| Some((name.clone(), source(name)?.to_owned()))).collect();
        let wrong = |path: &str, expected: &str| ConfigError::from(inject.error(path, format!("expected {expected}")));
        let inject = &inject.value;
        let strings = |value: &Value, path: &str| -> Result<Vec<String>, ConfigError> {
            match value {
                Value::Null => Ok(Vec::new()),
                Value::Array(items) => {
                    items.iter().map(text_of).collect::<Option<_>>().ok_or_else(|| wrong(path, "strings"))
                }
                _ => Err(wrong(path, "a list")),
            }
        };
        let selectors = |name: &str| -> Result<Vec<Value>, ConfigError> {
            match &inject[name] {
                Value::Null => Ok(Vec::new()),
                Value::Array(items) => Ok(items.clone()),
                _ => Err(wrong(name, "a list")),
            }
        };
        let mut default_templates = strings(&inject["defaultTemplates"], "defaultTemplates")?;
        if default_templates.is_empty() {
            default_templates.push("sidecar".to_owned());
        }
        let mut aliases = BTreeMap::new();
        for (name, list) in inject["aliases"].as_object().into_iter().flatten() {
            aliases.insert(name.clone(), strings(list, &format!("aliases.{name}"))?);
        }
        let mut injected_annotations = BTreeMap::new();
        for (name, value) in inject["injectedAnnotations"].as_object().into_iter().flatten() {
            let value = text_of(value).ok_or_else(|| wrong("injectedAnnotations", "strings"))?;
            injected_annotations.insert(name.clone(), value);
        }
        let policy = match inject["policy"].as_str() {
            Some("enabled") => Policy::Enabled,
            Some("disabled") => Policy::Disabled,
            _ => Policy::Illegal,
        };
        values::check(values)?;
        Ok(Self {
            templates,
            template_sources,
            default_templates,
            aliases,
            selection: Selection {
                policy,
                never: selectors("neverInjectSelector")?,
                always: selectors("alwaysInjectSelector")?,
            },
            injected_annotations,
            values: values.value.clone(),
            mesh: load_mesh(mesh)?,
            revision: String::new(),
            native: NativeSidecars::Off,
            compliance_policy: String::new(),
            limits: Limits::default(),
            rendered: Rendered::default(),
        })
    }
}

/// A string, or the number or boolean that YAML made of one; nothing written is "".
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        other => schema::scalar_text(other),
    }
}

/// Parses all templates.
fn templates(inject: &Document) -> Result<BTreeMap<String, Template>, ConfigError> {
    let parse = |name: &str, source: &str, delimiters: Delimiters<'_>| {
        Template::parse_with(name, source, delimiters, &FUNCTIONS).map_err(|source| ConfigError::Template {
            file: inject.file().display().to_string(),
            line: inject.line_of(&format!("templates[\"{name}\"]")).unwrap_or(0),
            name: name.to_owned(),
            source: Box::new(source),
        })
    };
    let mut templates = BTreeMap::new();
    match &inject.value["templates"] {
        Value::Null => {
            // The old form: one template in square brackets.
            if let Some(source) = inject.value["template"].as_str().filter(|source| source.contains("[[")) {
                let delimiters = Delimiters { left: "[[", right: "]]" };
                templates.insert("sidecar".to_owned(), parse("sidecar", source, delimiters)?);
            }
        }
        Value::Object(sources) => {
            for (name, source) in sources {
                let path = format!("templates[\"{name}\"]");
                let source = source.as_str().ok_or_else(|| inject.error(&path, "expected a string"))?;
                templates.insert(name.clone(), parse(name, source, Delimiters::default())?);
            }
        }
        _ => return Err(inject.error("templates", "expected an object").into()),
    }
    Ok(templates)
}

fn load_mesh(mesh: &Document) -> Result<Mesh, ConfigError> {
    let loaded = Mesh::load(&mesh.value).map_err(|mismatch| {
        let message = format!("expected {}, found {}", mismatch.expected, mismatch.found);
        mesh.error(&mismatch.path, message)
    })?;
    match loaded.fault() {
        Some((path, message)) => Err(mesh.error(&path, message).into()),
        None => Ok(loaded),
    }
}
