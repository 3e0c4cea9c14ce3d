//! A mesh that can be asked about: its pods, what each proxy would be given, and where everything was written.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{anyhow, bail};
use config_store::{Body, Key, Kind};
use mesh_types::{Labels, selects};
use push_context::{MtlsMode, Node};
use registry::{Provider, Service};
use serde_json::{Value, json};

use crate::configuration::Resources;
use crate::trace::Source;
use crate::{Configuration, Files, vacancy};

/// A pod.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) ip: IpAddr,
    pub(crate) labels: Labels,
    pub(crate) annotations: Labels,
    pub(crate) node: Node,
    pub(crate) has_sidecar: bool,
    /// SPIFFE identity.
    pub(crate) identity: String,
}

impl Pod {
    /// `NAME.NAMESPACE`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.namespace)
    }
}

/// Files, and what follows from them.
pub(crate) struct Mesh {
    pub(crate) files: Files,
    pub(crate) pods: Vec<Rc<Pod>>,
    configurations: RefCell<HashMap<String, Rc<Configuration>>>,
}

impl Mesh {
    /// Finds the pods, or takes the proxies that were described.
    pub(crate) fn new(files: Files) -> anyhow::Result<Self> {
        let mut pods = Vec::new();
        let domain = files.push.trust_domain().to_owned();
        for node in &files.proxies {
            let ip = node.addresses.first().and_then(|ip| ip.parse().ok());
            pods.push(Rc::new(Pod {
                name: node.name.to_string(),
                namespace: node.namespace.to_string(),
                ip: ip.ok_or_else(|| anyhow!("proxy {} has no address", node.name))?,
                labels: node.labels.clone(),
                annotations: Labels::new(),
                identity: format!("spiffe://{domain}/ns/{}/sa/{}", node.namespace, node.service_account),
                node: node.clone(),
                has_sidecar: true,
            }));
        }
        if pods.is_empty() {
            for object in files.snapshot.list(Kind::Pod) {
                if let Body::Pod(pod) = &object.body
                    && let Some(pod) = pod_of(object, &serde_json::to_value(pod)?, &files, &domain)
                {
                    pods.push(Rc::new(pod));
                }
            }
        }
        Ok(Self { files, pods, configurations: RefCell::default() })
    }

    /// The pod that a user means: its name or the beginning of it, or its `app` label, with or without namespace.
    pub(crate) fn pod(&self, said: &str) -> anyhow::Result<Rc<Pod>> {
        let (said_name, namespace) = match said.rsplit_once('.') {
            Some((name, ns)) if self.pods.iter().any(|pod| pod.namespace == ns) => (name, Some(ns)),
            _ => (said, None),
        };
        let name = said_name.rsplit_once('/').map_or(said_name, |(_, name)| name);
        let here = || self.pods.iter().filter(|pod| namespace.is_none_or(|ns| pod.namespace == ns));
        let fits: [&dyn Fn(&Pod) -> bool; 3] =
            [&|pod| pod.name == name, &|pod| pod.labels.get("app").is_some_and(|app| app == name), &|pod| {
                pod.name.starts_with(&format!("{name}-"))
            }];
        let found: Vec<&Rc<Pod>> = fits
            .iter()
            .map(|fits| here().filter(|pod| fits(pod)).collect())
            .find(|found: &Vec<_>| !found.is_empty())
            .unwrap_or_default();
        match found.first() {
            Some(pod) => {
                let others: Vec<String> = found[1..].iter().map(|pod| pod.full_name()).collect();
                if !others.is_empty() {
                    eprintln!(
                        "note: {said} is taken for {}; it may also mean {}",
                        pod.full_name(),
                        vacancy::shown(&others)
                    );
                }
                Ok(Rc::clone(pod))
            }
            None if self.pods.is_empty() => bail!("there are no pods in the input, and no workloads to make them of"),
            None => {
                let mut names: Vec<String> = self.pods.iter().map(|pod| pod.full_name()).collect();
                names.truncate(12);
                bail!("there is no pod {said:?}; there is {}", names.join(", "))
            }
        }
    }

    /// The pod with this address.
    pub(crate) fn pod_at(&self, address: SocketAddr) -> Option<Rc<Pod>> {
        self.pods.iter().find(|pod| pod.ip == address.ip()).cloned()
    }

    /// What the pod's proxy would be given.
    pub(crate) fn configuration(&self, pod: &Pod) -> Rc<Configuration> {
        let mut all = self.configurations.borrow_mut();
        let made = all
            .entry(pod.full_name())
            .or_insert_with(|| Rc::new(Configuration::new(Resources::of_node(&self.files.push, &pod.node))));
        Rc::clone(made)
    }

    /// Where an object, or one of its fields, was written.
    pub(crate) fn source(&self, key: &Key, field: &str) -> Source {
        self.files.source(key, field)
    }

    /// Where a service, or one of its fields, was written.
    pub(crate) fn service_source(&self, service: &Service, field: &str) -> Source {
        let kind = if service.provider == Provider::Kubernetes { Kind::Service } else { Kind::ServiceEntry };
        self.source(&Key::new(kind, &service.namespace, &service.object_name), field)
    }

    /// The PeerAuthentication that decides what a port of a pod takes.
    pub(crate) fn peer_policy(&self, pod: &Pod, port: u16) -> (MtlsMode, Option<Source>) {
        let mode = self.files.push.peer_policy(&pod.node.namespace, &pod.labels).for_port(port);
        let root = self.files.push.root_namespace.clone();
        let all: Vec<_> = self
            .files
            .snapshot
            .list(Kind::PeerAuthentication)
            .filter_map(|object| match &object.body {
                Body::PeerAuthentication(spec) => Some((object, spec)),
                _ => None,
            })
            .collect();
        let labels_of = |spec: &istio_api::PeerAuthentication| {
            spec.selector.as_ref().map(|selector| selector.match_labels.clone()).filter(|labels| !labels.is_empty())
        };
        let find = |namespace: &str, with_selector: bool| {
            all.iter().find(|(object, spec)| {
                *object.key.namespace == *namespace
                    && match labels_of(spec) {
                        Some(labels) => with_selector && selects(&labels, &pod.labels),
                        None => !with_selector,
                    }
            })
        };
        let found = find(&pod.namespace, true).or_else(|| find(&pod.namespace, false)).or_else(|| find(&root, false));
        (mode, found.map(|(object, _)| self.source(&object.key, "spec.mtls")))
    }

    /// The service that a name means to a pod, as its resolver completes it (`ndots:5` and the search list of its namespace).
    pub(crate) fn service(&self, pod: &Pod, host: &str) -> Option<&Arc<Service>> {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let domain = self.files.push.settings.domain.clone();
        let tried = [
            format!("{host}.{}.svc.{domain}", pod.namespace),
            format!("{host}.svc.{domain}"),
            format!("{host}.{domain}"),
            host.clone(),
        ];
        let services = &self.files.push.registry.services;
        tried
            .iter()
            .find_map(|name| services.iter().find(|service| *service.hostname == **name))
            .or_else(|| services.iter().find(|s| s.is_wildcard() && host.ends_with(&s.hostname[1..])))
    }
}

/// The pod that an object is; `None` while it has no address.
pub(crate) fn pod_of(object: &config_store::Object, value: &Value, files: &Files, domain: &str) -> Option<Pod> {
    let text = |path: &str| value.pointer(path).and_then(Value::as_str);
    let ip: IpAddr = text("/status/podIP")?.parse().ok()?;
    let account = text("/spec/serviceAccountName").unwrap_or("default").to_owned();
    let annotation = |name: &str| object.annotations.get(name).cloned();
    let mut metadata = json!({ "OUTRIGGER_ORIGINS": "true", "OUTRIGGER_PROXY": "true" });
    if let Some(mode) = annotation("sidecar.istio.io/interceptionMode") {
        metadata["INTERCEPTION_MODE"] = json!(mode);
    }
    let document = json!({
        "name": &*object.key.name, "namespace": &*object.key.namespace, "ips": [ip.to_string()],
        "serviceAccount": account, "labels": object.labels, "metadata": metadata,
    });
    Some(Pod {
        name: object.key.name.to_string(),
        namespace: object.key.namespace.to_string(),
        ip,
        labels: object.labels.clone(),
        annotations: object.annotations.clone(),
        node: Node::from_yaml(&document, &files.push.settings).ok()?,
        has_sidecar: object.labels.get("security.istio.io/tlsMode").is_some_and(|mode| mode == "istio")
            && crate::workloads::is_injected(value),
        identity: format!("spiffe://{domain}/ns/{}/sa/{account}", object.key.namespace),
    })
}
