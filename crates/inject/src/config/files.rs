//! Configuration from files, as a projected config map or `kube-inject`'s flags give them.

use std::path::{Path, PathBuf};

use manifest::Document;
use serde_json::{Value, json};

use super::{Builtin, Config, ConfigError};
use crate::yaml;

/// Where the parts of a configuration are. What is not given is the built-in.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The injection configuration, or a bare template that is used as `sidecar`.
    pub inject: Option<PathBuf>,
    pub values: Option<PathBuf>,
    pub mesh: Option<PathBuf>,
    /// An IstioOperator; its values and mesh configuration win over the files.
    pub operator: Option<PathBuf>,
}

impl Config {
    /// Reads, parses and checks everything; all templates must parse.
    ///
    /// # Errors
    /// A file that cannot be read, and the first wrong field or template.
    pub fn load(files: &Files) -> Result<Self, ConfigError> {
        let builtin = Builtin::default();
        let inject = match &files.inject {
            Some(path) => injection(path)?,
            None => Document::from_value(builtin.injection(), "built-in"),
        };
        let values = match &files.values {
            Some(path) => yaml::document(path, &read(path)?)?,
            None => Document::from_value(builtin.values(), "built-in values"),
        };
        let mesh = match &files.mesh {
            Some(path) => yaml::document(path, &read(path)?)?,
            None => Document::from_value(json!({}), "built-in mesh"),
        };
        let Some(path) = &files.operator else { return Self::assemble(&inject, &values, &mesh) };
        let (values, own) = operator(path)?;
        Self::assemble(&inject, &values, own.as_ref().unwrap_or(&mesh))
    }
}

/// The values of an IstioOperator over the built-in ones, and its mesh configuration where it has one.
///
/// DIFFERS: istioctl lays them over the Helm charts of its profiles; the built-in values are the default
/// profile's as far as injection goes.
fn operator(path: &Path) -> Result<(Document, Option<Document>), ConfigError> {
    let document = yaml::document(path, &read(path)?)?;
    if document.kind() != "IstioOperator" {
        return Err(document.error("kind", "expected IstioOperator").into());
    }
    let spec = &document.value["spec"];
    let mut values = match &spec["values"] {
        Value::Null => json!({}),
        values @ Value::Object(_) => values.clone(),
        _ => return Err(document.error("spec.values", "expected an object").into()),
    };
    for field in ["hub", "tag"] {
        if !spec[field].is_null() && values["global"][field].is_null() {
            values["global"][field] = spec[field].clone();
        }
    }
    let values = Builtin { values, ..Builtin::default() }.values();
    let mesh = &spec["meshConfig"];
    let mesh = (!mesh.is_null()).then(|| Document::from_value(mesh.clone(), path));
    Ok((Document::from_value(values, path), mesh))
}

/// The parts of a configuration as texts, as config maps hold them. What is not given is the built-in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts {
    /// Key `config` of `istio-sidecar-injector`.
    pub inject: Option<String>,
    /// Its key `values`.
    pub values: Option<String>,
    /// Key `mesh` of `istio`.
    pub mesh: Option<String>,
}

impl Config {
    /// As [`Config::load`]; `builtin` fills in what is missing, `origin` names the source in errors.
    ///
    /// # Errors
    /// The first wrong field or template.
    pub fn from_texts(texts: &Texts, origin: &str, builtin: &Builtin) -> Result<Self, ConfigError> {
        let document = |text: &Option<String>, key: &str, default: Value| match text {
            Some(text) => Ok(yaml::document(Path::new(&format!("{origin}/{key}")), text)?),
            None => Ok::<_, ConfigError>(Document::from_value(default, format!("built-in {key}"))),
        };
        let mut config = Self::assemble(
            &document(&texts.inject, "config", builtin.injection())?,
            &document(&texts.values, "values", builtin.values())?,
            &document(&texts.mesh, "mesh", builtin.mesh.clone())?,
        )?;
        config.revision.clone_from(&builtin.revision);
        Ok(config)
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { file: path.display().to_string(), source })
}

/// A file without `templates` (and that is not the old form either) is a template itself; such a file
/// is seldom YAML before it is rendered.
fn injection(path: &Path) -> Result<Document, ConfigError> {
    let text = read(path)?;
    match yaml::document(path, &text) {
        Ok(document)
            if !document.value["templates"].is_null()
                || document.value["template"].as_str().is_some_and(|template| template.contains("[[")) =>
        {
            Ok(document)
        }
        Err(error) if text.lines().any(|line| line.starts_with("templates:")) => Err(error.into()),
        _ => Ok(Document::from_value(json!({"policy": "enabled", "templates": {"sidecar": text}}), path)),
    }
}
