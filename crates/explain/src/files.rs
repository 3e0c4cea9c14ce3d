//! A mesh out of files: its objects with their places, and the proxies that are asked about.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use config_store::{Key, Snapshot, Store};
use istio_api::MeshConfig;
use manifest::Document;
use push_context::{Node, PushContext, Settings};
use serde_json::Value;

/// Which files.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Sources {
    /// Kubernetes and Istio objects: files or folders, several times; document order is age
    #[arg(long = "input", short = 'f', value_name = "FILE", num_args = 1..)]
    pub input: Vec<PathBuf>,
    /// MeshConfig over the built-in defaults
    #[arg(long, value_name = "FILE")]
    pub mesh_config: Option<PathBuf>,
    /// Settings of the control plane: `dualStack`, `env`
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// Descriptions of proxies, instead of the pods of the input
    #[arg(long, value_name = "FILE")]
    pub proxy: Option<PathBuf>,
}

/// What the files say.
#[derive(Debug)]
pub struct Files {
    /// All documents, in order.
    pub documents: Vec<Document>,
    /// What the store took of them.
    pub snapshot: Snapshot,
    /// What was refused, one sentence each.
    pub refused: Vec<String>,
    /// The index that proxies are served from.
    pub push: PushContext,
    /// The proxies of `--proxy`.
    pub proxies: Vec<Node>,
}

impl Files {
    /// Reads and indexes everything.
    ///
    /// # Errors
    /// When a file cannot be read or is no YAML. Objects that the control plane would refuse are listed, not fatal.
    ///
    /// With `complete`, workloads get pods and services get endpoints, as if the manifests ran.
    pub fn load(sources: &Sources, complete: bool) -> anyhow::Result<Self> {
        let (mut documents, errors) = manifest::read(&sources.input);
        if let Some(error) = errors.into_iter().next() {
            return Err(error.into());
        }
        let settings = sources.settings.as_deref().map(settings).transpose()?.unwrap_or_default();
        let mesh = match &sources.mesh_config {
            None => MeshConfig::builtin(),
            Some(path) => MeshConfig::load(path, &read(path)?)?,
        };
        let mut proxies = Vec::new();
        if let Some(path) = &sources.proxy {
            for document in manifest::parse_plain(path, &read(path)?)? {
                let node = Node::from_yaml(&document.value, &settings);
                proxies.push(node.with_context(|| path.display().to_string())?);
            }
        }
        if complete {
            let made = crate::workloads::complete(&mut documents);
            documents.extend(made);
        }
        let mut store = Store::new();
        let mut refused = Vec::new();
        for document in &documents {
            match store.apply(document) {
                Ok(_) => {}
                // Kinds that proxies have nothing of (Deployments, …) are none of our business.
                Err(error) if error.key.is_none() => {}
                Err(error) => refused.push(error.to_string()),
            }
        }
        let snapshot = store.snapshot();
        let push = PushContext::build(&snapshot, &Arc::new(mesh), &settings);
        Ok(Self { documents, snapshot, refused, push, proxies })
    }

    /// The document of an object.
    pub fn document(&self, key: &Key) -> Option<&Document> {
        // The last one of a key is what the store holds.
        self.documents.iter().rev().find(|document| Key::of(document).as_ref() == Some(key))
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn settings(path: &Path) -> anyhow::Result<Settings> {
    let mut out = Settings::default();
    for document in manifest::parse_plain(path, &read(path)?)? {
        let fields = document.value.as_object().ok_or_else(|| anyhow!("{}: not a mapping", path.display()))?;
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("dualStack", Value::Bool(on)) => out.dual_stack = *on,
                ("env", Value::Object(env)) => {
                    for (name, value) in env {
                        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        if !out.set_env(name, &text) {
                            eprintln!("warning: {}: setting {name} is not known and has no effect", path.display());
                        }
                    }
                }
                _ => bail!("{}: {key}: unknown or of the wrong type", path.display()),
            }
        }
    }
    Ok(out)
}
