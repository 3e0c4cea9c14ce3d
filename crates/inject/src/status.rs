//! Names that Istio gives to containers, labels and annotations, and the record of an injection.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The sidecar.
pub(crate) const PROXY: &str = "istio-proxy";
/// Sets up the redirection.
pub(crate) const INIT: &str = "istio-init";
/// Checks the redirection that a CNI plugin set up.
pub(crate) const VALIDATION: &str = "istio-validation";
/// Allows core dumps.
pub(crate) const CORE_DUMP: &str = "enable-core-dump";

pub(crate) const INJECT: &str = "sidecar.istio.io/inject";
pub(crate) const STATUS: &str = "sidecar.istio.io/status";
pub(crate) const TEMPLATES: &str = "inject.istio.io/templates";
pub(crate) const OVERRIDES: &str = "proxy.istio.io/overrides";
pub(crate) const PROXY_CONFIG: &str = "proxy.istio.io/config";
pub(crate) const NATIVE: &str = "sidecar.istio.io/nativeSidecar";
pub(crate) const INTERCEPTION: &str = "sidecar.istio.io/interceptionMode";
pub(crate) const IMAGE_TYPE: &str = "sidecar.istio.io/proxyImageType";
pub(crate) const REWRITE_PROBES: &str = "sidecar.istio.io/rewriteAppHTTPProbers";
pub(crate) const STATUS_PORT: &str = "status.sidecar.istio.io/port";
pub(crate) const MERGE_METRICS: &str = "prometheus.istio.io/merge-metrics";
pub(crate) const NETWORK: &str = "topology.istio.io/network";
pub(crate) const REVISION: &str = "istio.io/rev";

/// The annotation `sidecar.istio.io/status`: what a template added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Status {
    pub(crate) init_containers: Option<Vec<String>>,
    pub(crate) containers: Option<Vec<String>>,
    pub(crate) volumes: Option<Vec<String>>,
    pub(crate) image_pull_secrets: Option<Vec<String>>,
    pub(crate) revision: String,
}

impl Status {
    /// The record of a rendered template.
    pub(crate) fn of_template(spec: &Value, revision: &str) -> Self {
        let names = |list: &str| -> Option<Vec<String>> {
            let names: Vec<String> = spec[list]
                .as_array()?
                .iter()
                .map(|item| item["name"].as_str().unwrap_or_default().to_owned())
                .collect();
            (!names.is_empty()).then_some(names)
        };
        Self {
            init_containers: names("initContainers"),
            containers: names("containers"),
            volumes: names("volumes"),
            image_pull_secrets: names("imagePullSecrets"),
            revision: if revision.is_empty() { "default" } else { revision }.to_owned(),
        }
    }

    /// The record in a pod that was injected before.
    pub(crate) fn of_pod(pod: &Value) -> Option<Self> {
        serde_json::from_str(annotation(pod, STATUS)?).ok()
    }
}

/// An annotation of an object.
pub(crate) fn annotation<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object.get("metadata")?.get("annotations")?.get(name)?.as_str()
}

/// A label of an object.
pub(crate) fn label<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object.get("metadata")?.get("labels")?.get(name)?.as_str()
}

/// `strconv.ParseBool`
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
