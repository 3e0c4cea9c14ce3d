//! `outrigger xds generate`: resources from files, without a control plane.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config_store::{Snapshot, Store};
use envoy_api::{json, type_url};
use istio_api::{MeshConfig, MeshNetworks};
use mesh_types::ArcStr;
use push_context::{Node, PushContext, Settings};
use serde_json::Value;

use crate::{Names, generate};

/// Generates what a sidecar would be sent, from YAML files.
///
/// Writes listeners.json, routes.json, clusters.json, endpoints.json and, with DNS capture, nametable.json
/// for the first proxy into the output folder, for further proxies into folders of their name.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Kubernetes and Istio objects; files or folders, several times. Document order is age.
    #[arg(long = "input", value_name = "FILE", required = true, num_args = 1..)]
    pub input: Vec<PathBuf>,
    /// MeshConfig over the built-in defaults.
    #[arg(long, value_name = "FILE")]
    pub mesh_config: Option<PathBuf>,
    /// MeshNetworks: networks of the mesh and the gateways between them.
    #[arg(long, visible_alias = "networksConfig", value_name = "FILE")]
    pub mesh_networks: Option<PathBuf>,
    /// Settings of the control plane: `dualStack`, `env`, `meshNetworks`.
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// The proxies that ask, one document each.
    #[arg(long, value_name = "FILE")]
    pub proxy: PathBuf,
    /// Folder to write to.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// Why nothing, or not everything, was generated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is no YAML.
    #[error("{0}")]
    Yaml(String),
    /// Settings or MeshConfig that make no sense.
    #[error("{path}: {reason}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A proxy description that says too little.
    #[error("{path}")]
    Proxy {
        /// The file.
        path: PathBuf,
        /// What is missing.
        #[source]
        source: push_context::InvalidNode,
    },
    /// A generated resource could not be written as JSON.
    #[error("resource {name}")]
    Json {
        /// The resource.
        name: String,
        /// Why.
        #[source]
        source: json::Error,
    },
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    |source| Error::Io { path: path.to_owned(), source }
}

fn documents(path: &Path) -> Result<Vec<manifest::Document>, Error> {
    let text = fs::read_to_string(path).map_err(io(path))?;
    manifest::parse_plain(path, &text).map_err(|e| Error::Yaml(e.to_string()))
}

fn settings(path: &Path) -> Result<Settings, Error> {
    let fail = |reason: &str| Error::Settings { path: path.to_owned(), reason: reason.to_owned() };
    let mut out = Settings::default();
    for document in documents(path)? {
        let fields = document.value.as_object().ok_or_else(|| fail("not a mapping"))?;
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("dualStack", Value::Bool(on)) => out.dual_stack = *on,
                ("meshNetworks", networks @ Value::Object(_)) => {
                    out.networks = Arc::new(mesh_networks(path, &networks.to_string())?);
                }
                ("env", Value::Object(env)) => {
                    for (name, value) in env {
                        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        if !out.set_env(name, &text) {
                            eprintln!("warning: {}: setting {name} is not known and has no effect", path.display());
                        }
                    }
                }
                _ => return Err(fail(&format!("{key}: unknown or of the wrong type"))),
            }
        }
    }
    Ok(out)
}

fn mesh_networks(path: &Path, yaml: &str) -> Result<MeshNetworks, Error> {
    MeshNetworks::load(path, yaml).map_err(|error| Error::Yaml(error.to_string()))
}

/// Loads the input; objects that are refused are named on stderr and left out.
fn load(paths: &[PathBuf]) -> Result<Snapshot, Error> {
    let (documents, errors) = manifest::read(paths);
    if let Some(error) = errors.first() {
        return Err(Error::Yaml(error.to_string()));
    }
    let mut store = Store::new();
    for document in &documents {
        if let Err(error) = store.apply(document) {
            eprintln!("warning: {error}");
        }
    }
    Ok(store.snapshot())
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Error> {
    let mut settings = args.settings.as_deref().map(settings).transpose()?.unwrap_or_default();
    if let Some(path) = &args.mesh_networks {
        settings.networks = Arc::new(mesh_networks(path, &fs::read_to_string(path).map_err(io(path))?)?);
    }
    let mesh = match &args.mesh_config {
        None => MeshConfig::builtin(),
        Some(path) => {
            let text = fs::read_to_string(path).map_err(io(path))?;
            MeshConfig::load(path, &text).map_err(|e| Error::Yaml(e.to_string()))?
        }
    };
    let push = PushContext::build(&load(&args.input)?, &Arc::new(mesh), &settings);
    for (i, document) in documents(&args.proxy)?.iter().enumerate() {
        let node = Node::from_yaml(&document.value, &settings)
            .map_err(|source| Error::Proxy { path: args.proxy.clone(), source })?;
        let folder = if i == 0 { args.output.clone() } else { args.output.join(&*node.name) };
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        write_all(&push, &node, &folder)?;
    }
    Ok(())
}

fn write_all(push: &PushContext, node: &Node, folder: &Path) -> Result<(), Error> {
    let kinds = [
        (type_url::LISTENER, "listeners.json"),
        (type_url::ROUTE, "routes.json"),
        (type_url::CLUSTER, "clusters.json"),
        (type_url::ENDPOINT, "endpoints.json"),
        (type_url::NAME_TABLE, "nametable.json"),
    ];
    for (type_url, file) in kinds {
        let resources = generate(push, node, type_url, Names::Wildcard);
        if type_url == type_url::NAME_TABLE && !node.dns_capture {
            continue;
        }
        let mut values = Vec::with_capacity(resources.len());
        for resource in &resources {
            let name: &ArcStr = &resource.name;
            let value = json::to_json(type_url, &resource.body)
                .map_err(|source| Error::Json { name: name.to_string(), source })?;
            values.push(value);
        }
        values.sort_by_key(|v| v["name"].as_str().unwrap_or_default().to_owned());
        let path = folder.join(file);
        let text = format!("{:#}\n", Value::Array(values));
        fs::write(&path, text).map_err(io(&path))?;
    }
    Ok(())
}
