//! What `POST /inject` works with, kept up to date from files, ConfigMaps and nodes.
//!
//! As istio `pkg/kube/inject/watcher.go`: a configuration that cannot be used is refused and the one before stays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use config_store::{Body, Kind};
use inject::{Builtin, Config, NamespaceMeta, NativeSidecars, ProxyConfigs, Texts};
use kube_source::Cluster;
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::metrics::Metrics;
use crate::world::State;

/// Changes that come together are applied together; istiod waits as long.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// How often files are looked at.
const INTERVAL: Duration = Duration::from_millis(500);
/// How often nodes are asked for their version.
const NODES: Duration = Duration::from_secs(300);

/// The configuration that holds now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Injector {
    /// Replaced whole; the lock covers the pointer only.
    current: Arc<RwLock<Arc<Config>>>,
}

impl Injector {
    /// Starts with this configuration.
    pub fn new(config: Config) -> Self {
        Self { current: Arc::new(RwLock::new(Arc::new(config))) }
    }

    pub(crate) fn current(&self) -> Arc<Config> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, config: Config) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }
}

/// Where the configuration comes from.
pub(crate) struct Sources {
    /// A folder with the files `config` and `values`, as a projected ConfigMap; wins over the ConfigMap itself.
    pub(crate) folder: PathBuf,
    /// The mesh configuration's file; the ConfigMap wins over it.
    pub(crate) mesh: Option<PathBuf>,
    pub(crate) cluster: Option<Cluster>,
    /// Where the ConfigMaps are, and the names of injection's and of the mesh configuration's.
    pub(crate) namespace: String,
    pub(crate) injection_map: String,
    pub(crate) mesh_map: String,
    /// What holds where nothing else is said.
    pub(crate) builtin: Builtin,
    pub(crate) native: Native,
    /// `COMPLIANCE_POLICY`
    pub(crate) compliance_policy: String,
}

/// `ENABLE_NATIVE_SIDECARS`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Native {
    True,
    False,
    /// When all nodes can.
    Auto,
}

/// istiod's name of the ConfigMap with templates and values.
pub(crate) fn injection_config_map(revision: &str) -> String {
    match revision {
        "" | "default" => "istio-sidecar-injector".to_owned(),
        revision => format!("istio-sidecar-injector-{revision}"),
    }
}

/// What was read last.
#[derive(Default)]
struct Read {
    files: Texts,
    /// Keys of the ConfigMap for injection, and the mesh's text.
    map: Option<BTreeMap<String, String>>,
    mesh: Option<String>,
    native: bool,
}

impl Read {
    /// Files win, as with istiod.
    fn texts(&self) -> Texts {
        let key = |name: &str| self.map.as_ref().and_then(|map| map.get(name).cloned());
        Texts {
            inject: self.files.inject.clone().or_else(|| key("config")),
            values: self.files.values.clone().or_else(|| key("values")),
            mesh: self.mesh.clone().or_else(|| self.files.mesh.clone()),
        }
    }
}

impl Sources {
    /// Follows the sources for ever.
    pub(crate) async fn follow(self, injector: Injector, metrics: Arc<Metrics>) {
        let (send_map, mut maps) = mpsc::channel(1);
        let (send_mesh, mut meshes) = mpsc::channel(1);
        let (send_native, mut natives) = mpsc::channel(1);
        let watching = async {
            let Some(cluster) = &self.cluster else { return std::future::pending().await };
            tokio::join!(
                cluster.watch_config_map(&self.namespace, &self.injection_map, send_map),
                cluster.watch_config_map(&self.namespace, &self.mesh_map, send_mesh),
                async {
                    if self.native != Native::Auto {
                        return;
                    }
                    while send_native.send(cluster.runs_native_sidecars().await).await.is_ok() {
                        tokio::time::sleep(NODES).await;
                    }
                },
            );
        };
        let applying = async {
            let mut read = Read { native: self.native == Native::True, ..Read::default() };
            let mut seen = None;
            let mut applied = None;
            loop {
                let now = fingerprints(&self.files());
                if seen.as_ref() != Some(&now) {
                    read.files = self.read_files();
                    seen = Some(now);
                }
                let wanted = (read.texts(), read.native);
                if applied.as_ref() != Some(&wanted) {
                    self.apply(&wanted.0, wanted.1, &injector, &metrics);
                    applied = Some(wanted);
                }
                tokio::select! {
                    () = tokio::time::sleep(INTERVAL) => continue,
                    Some(map) = maps.recv() => read.map = map,
                    Some(map) = meshes.recv() => read.mesh = map.and_then(|mut map| map.remove("mesh")),
                    Some(native) = natives.recv() => read.native = native,
                }
                tokio::time::sleep(DEBOUNCE).await;
                while let Ok(map) = maps.try_recv() {
                    read.map = map;
                }
                while let Ok(map) = meshes.try_recv() {
                    read.mesh = map.and_then(|mut map| map.remove("mesh"));
                }
            }
        };
        tokio::join!(watching, applying);
    }

    fn apply(&self, texts: &Texts, native: bool, injector: &Injector, metrics: &Metrics) {
        match Config::from_texts(texts, &self.injection_map, &self.builtin) {
            Ok(mut config) => {
                config.native = if native { NativeSidecars::On } else { NativeSidecars::Off };
                config.compliance_policy.clone_from(&self.compliance_policy);
                info!(templates = ?config.template_names(), native, "injection configuration loaded");
                injector.set(config);
                metrics.injection_configured(true);
            }
            Err(error) => {
                let reason = format!("{:#}", anyhow::Error::from(error));
                warn!(reason, "injection configuration refused; the one before stays");
                metrics.injection_configured(false);
            }
        }
    }

    fn files(&self) -> [PathBuf; 3] {
        [self.folder.join("config"), self.folder.join("values"), self.mesh.clone().unwrap_or_default()]
    }

    fn read_files(&self) -> Texts {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(%error, "{} cannot be read", path.display());
                None
            }
        };
        let [inject, values, mesh] = self.files();
        Texts { inject: read(&inject), values: read(&values), mesh: read(&mesh) }
    }
}

/// Modification time and size of what is there; a projected volume's links change what they lead to.
fn fingerprints(files: &[PathBuf]) -> Vec<Option<(SystemTime, u64)>> {
    let of = |path: &PathBuf| std::fs::metadata(path).and_then(|data| Ok((data.modified()?, data.len()))).ok();
    files.iter().map(of).collect()
}

/// A namespace's labels and annotations.
pub(crate) fn namespace(state: &State, name: &str) -> Option<NamespaceMeta> {
    let object = state.snapshot.find(Kind::Namespace, "", name)?;
    let pairs = |labels: &mesh_types::Labels| labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Some(NamespaceMeta {
        name: name.to_owned(),
        labels: pairs(&object.labels),
        annotations: pairs(&object.annotations),
    })
}

/// The ProxyConfig resources for a pod, as istio `pkg/model/proxy_config.go`: without selector the root namespace's
/// and the pod's own namespace's, the oldest of each; with selector the oldest of the pod's namespace that fits.
pub(crate) fn proxy_configs(state: &State, namespace: &str, labels: &Value) -> ProxyConfigs {
    let mut found = ProxyConfigs::default();
    let root = state.mesh.root_namespace.as_str();
    let mut objects: Vec<_> = state.snapshot.list(Kind::ProxyConfig).collect();
    objects.sort_by(|a, b| (a.created, &*a.key.name).cmp(&(b.created, &*b.key.name)));
    let mut wide: [Option<Value>; 2] = [None, None];
    for object in objects {
        let Body::ProxyConfig(spec) = &object.body else { continue };
        let Ok(mut spec) = serde_json::to_value(spec) else { continue };
        let selector = spec.as_object_mut().and_then(|spec| spec.remove("selector"));
        let wanted = selector.as_ref().and_then(|selector| selector["matchLabels"].as_object());
        let selects = wanted.is_some_and(|wanted| !wanted.is_empty());
        let place = &*object.key.namespace;
        if selects {
            let fits = wanted.into_iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
            if place == namespace && fits && found.workload.is_none() {
                found.workload = Some(spec);
            }
        } else if place == root && wide[0].is_none() {
            wide[0] = Some(spec);
        } else if place == namespace && wide[1].is_none() {
            wide[1] = Some(spec);
        }
    }
    found.wide.extend(wide.into_iter().flatten());
    found
}
