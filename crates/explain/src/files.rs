//! A mesh out of files: its objects with their places, and the proxies that are asked about.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use config_store::{Body, Key, Kind, Snapshot, Store};
use istio_api::{MeshConfig, MeshNetworks};
use manifest::Document;
use push_context::{Node, PushContext, Settings};
use serde_json::Value;

use crate::trace::Source;

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
    mesh_config: Option<MeshText>,
}

/// Where the MeshConfig was written.
#[derive(Debug)]
struct MeshText {
    /// With lines of its own.
    document: Document,
    /// The object that it is a text in; none for a file.
    map: Option<Key>,
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
        if complete {
            let made = crate::workloads::complete(&mut documents);
            documents.extend(made);
        }
        Self::of(documents, sources, Settings::default())
    }

    /// What a running mesh was given, with the pods and endpoints that it made of it.
    ///
    /// # Errors
    /// When no such mesh runs.
    pub fn running(mesh: &str, sources: &Sources) -> anyhow::Result<Self> {
        let objects = machine::objects(mesh)?;
        Self::of(objects.documents, sources, Settings { dual_stack: objects.dual_stack, ..Settings::default() })
    }

    fn of(documents: Vec<Document>, sources: &Sources, defaults: Settings) -> anyhow::Result<Self> {
        let mut settings = match sources.settings.as_deref() {
            Some(path) => read_settings(path, defaults)?,
            None => defaults,
        };
        let mut mesh = MeshConfig::builtin();
        let mut mesh_config = None;
        if let Some(path) = &sources.mesh_config {
            let text = read(path)?;
            mesh = MeshConfig::load(path, &text)?;
            mesh_config = MeshText::of(path, &text, None);
        }
        let mut proxies = Vec::new();
        if let Some(path) = &sources.proxy {
            for document in manifest::parse_plain(path, &read(path)?)? {
                let node = Node::from_yaml(&document.value, &settings);
                proxies.push(node.with_context(|| path.display().to_string())?);
            }
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
        // As Istio's installation brings it along; a file that was named is what the user means.
        if sources.mesh_config.is_none()
            && let Some(map) = snapshot.find(Kind::ConfigMap, &mesh.root_namespace, "istio")
            && let Body::ConfigMap(config) = &map.body
            && let Some(data) = &config.data
        {
            let place = map.key.to_string();
            if let Some(text) = data.get("mesh") {
                mesh = mesh.load_over(Path::new(&place), text)?;
                mesh_config = MeshText::of(Path::new(&place), text, Some(map.key.clone()));
            }
            if let Some(text) = data.get("meshNetworks") {
                settings.networks = Arc::new(MeshNetworks::load(Path::new(&place), text)?);
            }
        }
        let push = PushContext::build(&snapshot, &Arc::new(mesh), &settings);
        Ok(Self { documents, snapshot, refused, push, proxies, mesh_config })
    }

    /// Where an object, or one of its fields, was written.
    pub fn source(&self, key: &Key, field: &str) -> Source {
        let place = self.document(key).and_then(|document| {
            let line = document.line_of(field).filter(|_| !field.is_empty()).unwrap_or_else(|| document.line());
            place(document.file(), line)
        });
        Source { object: key.to_string(), field: field.to_owned(), place: place.unwrap_or_default() }
    }

    /// The same, if the field is written at all.
    pub fn written(&self, key: &Key, field: &str) -> Option<Source> {
        self.value(key, field).map(|_| self.source(key, field))
    }

    /// What is written in a field of an object.
    pub fn value(&self, key: &Key, field: &str) -> Option<&Value> {
        let mut value = &self.document(key)?.value;
        for step in field.split(['.', '[']) {
            value = match step.strip_suffix(']') {
                Some(index) => value.get(index.parse::<usize>().ok()?)?,
                None => value.get(step)?,
            };
        }
        (!value.is_null()).then_some(value)
    }

    /// Where a field of the MeshConfig was written, if it was.
    pub fn mesh_source(&self, field: &str) -> Option<Source> {
        let MeshText { document, map } = self.mesh_config.as_ref()?;
        let line = document.line_of(field)?;
        let Some(key) = map else {
            let place = place(document.file(), line).unwrap_or_default();
            return Some(Source { object: "MeshConfig".to_owned(), field: field.to_owned(), place });
        };
        let around = self.document(key)?;
        // A text of several lines stands below its indicator, `|`.
        let begin = around.line_of("data.mesh").unwrap_or_default();
        let is_block = around.value.pointer("/data/mesh")?.as_str()?.contains('\n');
        let place = if begin == 0 { None } else { place(around.file(), if is_block { begin + line } else { begin }) };
        let field = format!("data.mesh: {field}");
        Some(Source { object: key.to_string(), field, place: place.unwrap_or_default() })
    }

    /// The document of an object.
    pub fn document(&self, key: &Key) -> Option<&Document> {
        // The last one of a key is what the store holds.
        self.documents.iter().rev().find(|document| Key::of(document).as_ref() == Some(key))
    }
}

impl MeshText {
    fn of(path: &Path, text: &str, map: Option<Key>) -> Option<Self> {
        let document = manifest::parse_plain(path, text).ok()?.into_iter().next()?;
        Some(Self { document, map })
    }
}

/// What the mesh made itself is in no file, and has no line.
fn place(file: &Path, line: u32) -> Option<String> {
    (line > 0).then(|| format!("{}:{line}", file.display()))
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn read_settings(path: &Path, mut out: Settings) -> anyhow::Result<Settings> {
    for document in manifest::parse_plain(path, &read(path)?)? {
        let fields = document.value.as_object().ok_or_else(|| anyhow!("{}: not a mapping", path.display()))?;
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("dualStack", Value::Bool(on)) => out.dual_stack = *on,
                ("meshNetworks", networks @ Value::Object(_)) => {
                    out.networks = Arc::new(MeshNetworks::load(path, &networks.to_string())?);
                }
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
