//! What is known about a pod once it is placed, and the values the downward API and references read from it.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ObjectFieldSelector, Pod, ResourceFieldSelector};

use super::quantity;

/// Keys and values of a config map or secret.
pub(crate) type Content = BTreeMap<String, Vec<u8>>;

/// Config maps and secrets by (namespace, name), at one moment.
#[derive(Debug, Default)]
pub(crate) struct Data {
    pub(crate) config_maps: HashMap<(String, String), Arc<Content>>,
    pub(crate) secrets: HashMap<(String, String), Arc<Content>>,
}

/// A pod with its place in the mesh.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) pod: Pod,
    pub(crate) ips: Vec<IpAddr>,
    /// The bridge's address: what a pod sees as its node.
    pub(crate) node_ip: IpAddr,
    pub(crate) node_name: String,
    /// `KEY=value` of services, as kubelet's service links, for `enableServiceLinks`.
    pub(crate) service_links: Vec<(String, String)>,
}

impl Facts {
    pub(crate) fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    pub(crate) fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    pub(crate) fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    pub(crate) fn service_account(&self) -> &str {
        self.pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.as_deref())
            .filter(|name| !name.is_empty())
            .unwrap_or("default")
    }

    /// The host name inside: `spec.hostname` or the pod's name, at most 63 characters (kubelet `GeneratePodHostNameAndDomain`).
    pub(crate) fn hostname(&self) -> String {
        let name = self.pod.spec.as_ref().and_then(|spec| spec.hostname.clone()).filter(|name| !name.is_empty());
        let mut name = name.unwrap_or_else(|| self.name().to_owned());
        name.truncate(63);
        name.trim_end_matches(['-', '.']).to_owned()
    }

    /// A `fieldRef`; `None` when the path is not supported by the downward API.
    pub(crate) fn field(&self, selector: &ObjectFieldSelector) -> Option<String> {
        let join = |map: Option<&BTreeMap<String, String>>| {
            // kubelet pkg/fieldpath FormatMap: sorted, values quoted as Go %q.
            map.into_iter().flatten().map(|(k, v)| format!("{k}={}", go_quote(v))).collect::<Vec<_>>().join("\n")
        };
        let meta = &self.pod.metadata;
        let path = selector.field_path.as_str();
        if let Some((map, rest)) = path.split_once("['") {
            let key = rest.strip_suffix("']")?;
            let map = match map {
                "metadata.labels" => meta.labels.as_ref(),
                "metadata.annotations" => meta.annotations.as_ref(),
                _ => return None,
            };
            return Some(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
        }
        let ips = || self.ips.iter().map(ToString::to_string).collect::<Vec<_>>();
        Some(match path {
            "metadata.name" => self.name().to_owned(),
            "metadata.namespace" => self.namespace().to_owned(),
            "metadata.uid" => self.uid().to_owned(),
            "metadata.labels" => join(meta.labels.as_ref()),
            "metadata.annotations" => join(meta.annotations.as_ref()),
            "spec.nodeName" => self.node_name.clone(),
            "spec.serviceAccountName" => self.service_account().to_owned(),
            "status.hostIP" | "status.hostIPs" => self.node_ip.to_string(),
            "status.podIP" => ips().first().cloned().unwrap_or_default(),
            "status.podIPs" => ips().join(","),
            _ => return None,
        })
    }

    /// A `resourceFieldRef` of `container` (or of the container it names). Unset limits are the machine's, as in Kubernetes.
    pub(crate) fn resource(&self, container: &Container, selector: &ResourceFieldSelector) -> Option<String> {
        let spec = self.pod.spec.as_ref()?;
        let container = match selector.container_name.as_deref() {
            None | Some("") => container,
            Some(name) => {
                spec.containers.iter().chain(spec.init_containers.iter().flatten()).find(|c| c.name == name)?
            }
        };
        let (kind, resource) = selector.resource.split_once('.')?;
        let resources = container.resources.as_ref();
        let limit = || resources.and_then(|r| r.limits.as_ref()).and_then(|l| l.get(resource));
        let amount = match kind {
            "limits" => limit().map(|q| q.0.clone()),
            // The API server defaults requests to limits.
            "requests" => Some(
                resources
                    .and_then(|r| r.requests.as_ref())
                    .and_then(|r| r.get(resource))
                    .or_else(limit)
                    .map_or("0".to_owned(), |q| q.0.clone()),
            ),
            _ => return None,
        };
        let amount = match amount {
            Some(text) => quantity::milli(&text)?,
            None => machine_total(resource)?,
        };
        Some(quantity::divided(amount, selector.divisor.as_ref().map(|q| q.0.as_str())))
    }
}

/// What this machine has of a resource, in thousandths.
fn machine_total(resource: &str) -> Option<i128> {
    match resource {
        "cpu" => Some(std::thread::available_parallelism().map_or(1, |n| n.get() as i128) * 1_000),
        "memory" => {
            let info = rustix::system::sysinfo();
            #[allow(clippy::useless_conversion, reason = "the field's width depends on the platform")]
            Some(i128::from(info.totalram) * i128::from(info.mem_unit) * 1_000)
        }
        "ephemeral-storage" => Some(0),
        _ => None,
    }
}

fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
