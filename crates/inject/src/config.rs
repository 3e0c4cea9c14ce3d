//! What injection works with: templates, values, mesh configuration, selectors, modes.

mod builtin;
mod files;

use std::collections::BTreeMap;

use go_template::{Delimiters, Limits, Template};
use serde_json::Value;

pub use builtin::Builtin;
pub use files::Files;

use crate::decision::{Policy, Selection};
use crate::functions::FUNCTIONS;
use crate::mesh::Mesh;

/// A configuration that cannot be used; the one before stays.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {file}")]
    Read { file: String, source: std::io::Error },
    #[error(transparent)]
    Yaml(#[from] manifest::Error),
    #[error("{file}: {message}")]
    Field { file: String, message: String },
    #[error("{file}: template {name} cannot be parsed")]
    Template { file: String, name: String, source: go_template::Error },
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
}

impl Config {
    /// The names of the templates, in order.
    pub fn template_names(&self) -> Vec<&str> {
        self.templates.keys().map(String::as_str).collect()
    }

    /// What the policy says where nothing else does.
    pub fn policy(&self) -> Policy {
        self.selection.policy
    }

    /// A configuration's parts put together: the injection configuration (`templates` and so on), the
    /// values and the mesh configuration, each as its YAML says.
    pub(crate) fn assemble(names: [&str; 3], inject: &Value, values: Value, mesh: &Value) -> Result<Self, ConfigError> {
        let file = names[0];
        let wrong = |message: String| ConfigError::Field { file: file.to_owned(), message };
        let mut templates = BTreeMap::new();
        let mut parse = |name: &str, source: &str, delimiters: Delimiters<'_>| {
            let template = Template::parse_with(name, source, delimiters, &FUNCTIONS).map_err(|source| {
                ConfigError::Template { file: file.to_owned(), name: name.to_owned(), source }
            })?;
            templates.insert(name.to_owned(), template);
            Ok::<(), ConfigError>(())
        };
        match &inject["templates"] {
            Value::Null => {
                // The old form: one template in square brackets.
                if let Some(source) = inject["template"].as_str().filter(|source| source.contains("[[")) {
                    parse("sidecar", source, Delimiters { left: "[[", right: "]]" })?;
                }
            }
            Value::Object(sources) => {
                for (name, source) in sources {
                    let source = source.as_str().ok_or_else(|| wrong(format!("templates.{name}: expected a string")))?;
                    parse(name, source, Delimiters::default())?;
                }
            }
            _ => return Err(wrong("templates: expected an object".to_owned())),
        }
        let strings = |value: &Value, path: &str| -> Result<Vec<String>, ConfigError> {
            match value {
                Value::Null => Ok(Vec::new()),
                Value::Array(items) => items
                    .iter()
                    .map(|item| item.as_str().map(str::to_owned))
                    .collect::<Option<_>>()
                    .ok_or_else(|| wrong(format!("{path}: expected strings"))),
                _ => Err(wrong(format!("{path}: expected a list"))),
            }
        };
        let selectors = |name: &str| -> Result<Vec<Value>, ConfigError> {
            match &inject[name] {
                Value::Null => Ok(Vec::new()),
                Value::Array(items) => Ok(items.clone()),
                _ => Err(wrong(format!("{name}: expected a list"))),
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
            let value = value.as_str().ok_or_else(|| wrong(format!("injectedAnnotations.{name}: expected a string")))?;
            injected_annotations.insert(name.clone(), value.to_owned());
        }
        let policy = match inject["policy"].as_str() {
            Some("enabled") => Policy::Enabled,
            Some("disabled") => Policy::Disabled,
            _ => Policy::Illegal,
        };
        let mesh = Mesh::load(mesh)
            .map_err(|error| ConfigError::Field { file: names[2].to_owned(), message: error.to_string() })?;
        check_values(names[1], &values)?;
        Ok(Self {
            templates,
            default_templates,
            aliases,
            selection: Selection {
                policy,
                never: selectors("neverInjectSelector")?,
                always: selectors("alwaysInjectSelector")?,
            },
            injected_annotations,
            values,
            mesh,
            revision: String::new(),
            native: NativeSidecars::Off,
            compliance_policy: String::new(),
            limits: Limits::default(),
        })
    }
}

/// Values that the injection itself reads must have their types; templates read the rest as it is.
fn check_values(file: &str, values: &Value) -> Result<(), ConfigError> {
    const TEXTS: [&str; 6] = [
        "/global/hub",
        "/global/variant",
        "/global/network",
        "/global/multiCluster/clusterName",
        "/global/proxy/image",
        "/global/proxy_init/image",
    ];
    let wrong = |path: &str, expected: &str| ConfigError::Field {
        file: file.to_owned(),
        message: format!("{}: expected {expected}", path.trim_start_matches('/').replace('/', ".")),
    };
    for path in TEXTS {
        if values.pointer(path).is_some_and(|value| !value.is_string() && !value.is_null()) {
            return Err(wrong(path, "a string"));
        }
    }
    for path in ["/global/proxy/holdApplicationUntilProxyStarts", "/sidecarInjectorWebhook/rewriteAppHTTPProbe"] {
        if values.pointer(path).is_some_and(|value| !value.is_boolean() && !value.is_null()) {
            return Err(wrong(path, "a boolean"));
        }
    }
    if values.pointer("/global/tag").is_some_and(|tag| tag.is_object() || tag.is_array()) {
        return Err(wrong("/global/tag", "a string or a number"));
    }
    Ok(())
}
