//! Configuration from files, as a projected config map or `kube-inject`'s flags give them.

use std::path::{Path, PathBuf};

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
}

impl Config {
    /// Reads, parses and checks everything; all templates must parse.
    ///
    /// # Errors
    /// A file that cannot be read, and the first wrong field or template.
    pub fn load(files: &Files) -> Result<Self, ConfigError> {
        let name = |path: &Option<PathBuf>, builtin: &str| {
            path.as_ref().map_or_else(|| builtin.to_owned(), |path| path.display().to_string())
        };
        let names =
            [name(&files.inject, "built-in"), name(&files.values, "built-in values"), name(&files.mesh, "built-in mesh")];
        let builtin = Builtin::default();
        let inject = match &files.inject {
            Some(path) => injection(&names[0], &read(path)?)?,
            None => builtin.injection(),
        };
        let values = match &files.values {
            Some(path) => yaml::mapping(&names[1], &read(path)?)?,
            None => builtin.values(),
        };
        let mesh = match &files.mesh {
            Some(path) => yaml::mapping(&names[2], &read(path)?)?,
            None => json!({}),
        };
        Self::assemble([&names[0], &names[1], &names[2]], &inject, values, &mesh)
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { file: path.display().to_string(), source })
}

/// A file without `templates` (and that is not the old form either) is a template itself; such a file
/// is seldom YAML before it is rendered.
fn injection(name: &str, text: &str) -> Result<Value, ConfigError> {
    match yaml::mapping(name, text) {
        Ok(value) if !value["templates"].is_null() || value["template"].as_str().is_some_and(|t| t.contains("[[")) => {
            Ok(value)
        }
        Err(error) if text.lines().any(|line| line.starts_with("templates:")) => Err(error.into()),
        _ => Ok(json!({"policy": "enabled", "templates": {"sidecar": text}})),
    }
}
