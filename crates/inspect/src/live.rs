//! Reaching what runs: the proxy of a pod of `outrigger up`, or a file.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use crate::Dump;

/// The largest dump that is read; a proxy of ten thousand services writes some hundred megabytes.
const LIMIT: u64 = 1 << 30;

/// Whose configuration is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// The pod: its name or the beginning of it, with `.NAMESPACE` if need be; `deployment/NAME` means its pod
    #[arg(value_name = "POD", required_unless_present = "file", conflicts_with = "file")]
    pub pod: Option<String>,
    /// A config dump as JSON instead, of Envoy or ours; - reads standard input
    #[arg(long, short = 'f', value_name = "FILE")]
    pub file: Option<std::path::PathBuf>,
    /// The pod's namespace
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name-of-mesh", default_value = "default", env = "OUTRIGGER_NAME")]
    pub mesh: String,
}

impl Target {
    /// Its configuration, endpoints included.
    ///
    /// # Errors
    /// When it cannot be reached or read.
    pub fn dump(&self) -> anyhow::Result<Dump> {
        Dump::parse(self.dump_json()?)
    }

    /// The same as it came.
    pub(crate) fn dump_json(&self) -> anyhow::Result<Value> {
        match (&self.file, &self.pod) {
            (Some(path), _) => read(path),
            (None, Some(_)) => {
                let bytes = self.ask("GET", "/config_dump?include_eds")?;
                serde_json::from_slice(&bytes).context("the proxy's answer is no JSON")
            }
            (None, None) => anyhow::bail!("name a pod, or a dump with --file"),
        }
    }

    /// Asks the admin server of the pod's proxy.
    pub(crate) fn ask(&self, method: &str, path: &str) -> anyhow::Result<Vec<u8>> {
        let pod = self.pod.as_deref().context("name a pod")?;
        let pod = pod.rsplit_once('/').map_or(pod, |(_, name)| name);
        machine::ask_proxy(&self.mesh, &full_name(pod, self.namespace.as_deref()), method, path)
    }
}

/// Asks a proxy's admin server at `ADDRESS:PORT`.
///
/// # Errors
/// When nothing answers there, or the answer is no success.
pub fn ask_admin(address: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    machine::ask_admin(address, "GET", path).with_context(|| format!("ask {address}"))
}

fn read(path: &Path) -> anyhow::Result<Value> {
    let mut text = Vec::new();
    match path.as_os_str() == "-" {
        true => std::io::stdin().lock().take(LIMIT).read_to_end(&mut text)?,
        false => {
            let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
            file.take(LIMIT).read_to_end(&mut text).with_context(|| path.display().to_string())?
        }
    };
    serde_json::from_slice(&text).with_context(|| {
        format!("{} is no config dump (what /config_dump?include_eds answers, as JSON)", path.display())
    })
}

/// `NAME.NAMESPACE`, if a namespace is asked for and the name does not bring its own.
pub(crate) fn full_name(pod: &str, namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) if !pod.contains('.') => format!("{pod}.{namespace}"),
        _ => pod.to_owned(),
    }
}
