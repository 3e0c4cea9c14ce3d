//! The pods of a running mesh and their proxies.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use serde_json::Value;

/// A pod with a sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) address: String,
}

impl Pod {
    pub(crate) fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

/// All pods with a sidecar, by name.
pub(crate) fn pods(mesh: &str) -> anyhow::Result<Vec<Pod>> {
    let objects = machine::objects(mesh)?;
    let pods = objects.documents.iter().filter(|document| document.kind() == "Pod");
    let mut all: Vec<Pod> = pods
        .filter_map(|document| {
            let labels = document.value.pointer("/metadata/labels").and_then(Value::as_object)?;
            let labels: BTreeMap<String, String> =
                labels.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect();
            let injected = labels.get("security.istio.io/tlsMode").is_some_and(|mode| mode == "istio");
            let address = document.value.pointer("/status/podIP").and_then(Value::as_str).unwrap_or_default();
            injected.then(|| Pod {
                name: document.name().to_owned(),
                namespace: document.namespace().unwrap_or("default").to_owned(),
                labels,
                address: address.to_owned(),
            })
        })
        .collect();
    all.sort_by_key(Pod::full_name);
    Ok(all)
}

/// The pod that a user means: its name, the beginning of it, or its `app` label, with `.NAMESPACE` if need be.
pub(crate) fn find<'p>(pods: &'p [Pod], said: &str) -> anyhow::Result<&'p Pod> {
    let said = said.rsplit_once('/').map_or(said, |(_, name)| name);
    let (name, namespace) = match said.rsplit_once('.') {
        Some((name, ns)) if pods.iter().any(|pod| pod.namespace == ns) => (name, Some(ns)),
        _ => (said, None),
    };
    let here = || pods.iter().filter(|pod| namespace.is_none_or(|ns| pod.namespace == ns));
    let found = here()
        .find(|pod| pod.name == name)
        .or_else(|| here().find(|pod| pod.labels.get("app").is_some_and(|app| app == name)))
        .or_else(|| here().find(|pod| pod.name.starts_with(name)));
    match found {
        Some(pod) => Ok(pod),
        None if pods.is_empty() => bail!("no pod of the mesh has a sidecar"),
        None => {
            let names: Vec<String> = pods.iter().take(12).map(Pod::full_name).collect();
            bail!("there is no pod {said:?} with a sidecar; there is {}", names.join(", "))
        }
    }
}

/// A proxy's statistics as Prometheus text.
pub(crate) fn statistics(mesh: &str, pod: &Pod) -> anyhow::Result<String> {
    let body = machine::ask_proxy(mesh, &pod.full_name(), "GET", "/stats/prometheus").context(pod.full_name())?;
    String::from_utf8(body).context(pod.full_name())
}
