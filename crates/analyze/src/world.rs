use std::collections::BTreeMap;

use istio_api::MeshConfig;
use manifest::Document;
use mesh_types::{Labels, selects};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Message;

/// Namespaces of Kubernetes' own, which no mesh has a say in.
const IGNORED: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "local-path-storage"];
/// Kinds whose `spec.template` becomes pods.
const WORKLOADS: [&str; 5] = ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"];

pub(crate) const NETWORKING: &str = "networking.istio.io";
pub(crate) const SECURITY: &str = "security.istio.io";
pub(crate) const TELEMETRY: &str = "telemetry.istio.io";
const SUPPRESS: &str = "galley.istio.io/analyze-suppress";

/// One object.
pub(crate) struct Resource<'a> {
    pub(crate) document: &'a Document,
    pub(crate) name: &'a str,
    /// "" for kinds that live in none.
    pub(crate) namespace: &'a str,
    pub(crate) labels: Labels,
    pub(crate) annotations: Labels,
}

/// All objects, by group and kind, in the order they were given.
pub(crate) struct World<'a> {
    pub(crate) mesh: &'a MeshConfig,
    by_kind: BTreeMap<(&'a str, &'a str), Vec<Resource<'a>>>,
}

fn strings(value: Option<&Value>) -> Labels {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

impl<'a> Resource<'a> {
    /// `default/reviews`, or only the name.
    pub(crate) fn full_name(&self) -> String {
        if self.namespace.is_empty() { self.name.to_owned() } else { format!("{}/{}", self.namespace, self.name) }
    }

    pub(crate) fn subject(&self) -> crate::Subject {
        crate::Subject {
            kind: self.document.kind().to_owned(),
            name: self.name.to_owned(),
            namespace: self.namespace.to_owned(),
            place: self.place(self.document.line()),
        }
    }

    /// `a.yaml:12`; only the file's name where lines mean little.
    pub(crate) fn place(&self, line: u32) -> String {
        let file = self.document.file();
        match file.extension().is_some_and(|extension| extension == "json") || line == 0 {
            true => file.display().to_string(),
            false => format!("{}:{line}", file.display()),
        }
    }

    /// The typed `spec`; nothing if it is not what it should be, which is told elsewhere.
    pub(crate) fn spec<T: DeserializeOwned>(&self) -> Option<T> {
        self.document.decode_field("spec").ok()
    }

    pub(crate) fn get(&self, pointer: &str) -> Option<&'a Value> {
        self.document.value.pointer(pointer).filter(|value| !value.is_null())
    }

    pub(crate) fn text(&self, pointer: &str) -> &'a str {
        self.get(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    pub(crate) fn list(&self, pointer: &str) -> &'a [Value] {
        self.get(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// Labels of what its template makes, for workloads; its own otherwise.
    pub(crate) fn pod_labels(&self) -> Labels {
        match self.document.kind() {
            "Pod" => self.labels.clone(),
            _ => strings(self.get("/spec/template/metadata/labels")),
        }
    }

    /// Whether ztunnel redirects the pod, so that it has no sidecar.
    pub(crate) fn is_ambient_pod(&self) -> bool {
        self.annotations.get("ambient.istio.io/redirection").is_some_and(|value| value == "enabled")
    }

    /// One of Istio's own (istioctl `IsIstioControlPlane`).
    pub(crate) fn is_control_plane(&self) -> bool {
        self.labels.contains_key("istio") || self.labels.get("release").is_some_and(|release| release == "istio")
    }
}

impl<'a> World<'a> {
    pub(crate) fn new(documents: &'a [Document], mesh: &'a MeshConfig, namespace: &'a str) -> World<'a> {
        let mut by_kind: BTreeMap<_, Vec<Resource<'a>>> = BTreeMap::new();
        for document in documents {
            let (group, kind) = (document.group(), document.kind());
            let namespaced = !matches!(
                (group, kind),
                ("", "Namespace" | "Node") | ("admissionregistration.k8s.io" | "apiextensions.k8s.io", _)
            );
            let own = if namespaced { document.namespace().unwrap_or(namespace) } else { "" };
            let place = if kind == "Namespace" { document.name() } else { own };
            if IGNORED.contains(&place) {
                continue;
            }
            by_kind.entry((group, kind)).or_default().push(Resource {
                document,
                name: document.name(),
                namespace: own,
                labels: strings(document.value.pointer("/metadata/labels")),
                annotations: strings(document.value.pointer("/metadata/annotations")),
            });
        }
        World { mesh, by_kind }
    }

    /// All objects of a kind.
    pub(crate) fn all(&self, group: &str, kind: &str) -> &[Resource<'a>] {
        let found = self.by_kind.iter().find(|((g, k), _)| *g == group && *k == kind);
        found.map_or(&[], |(_, resources)| resources)
    }

    /// All objects of all kinds.
    pub(crate) fn everything(&self) -> impl Iterator<Item = &Resource<'a>> {
        self.by_kind.values().flatten()
    }

    /// All objects of a kind that can be read, with what they say.
    pub(crate) fn specs<'w, T: DeserializeOwned>(
        &'w self,
        group: &str,
        kind: &str,
    ) -> impl Iterator<Item = (&'w Resource<'a>, T)> {
        self.all(group, kind).iter().filter_map(|resource| Some((resource, resource.spec()?)))
    }

    pub(crate) fn pods(&self) -> &[Resource<'a>] {
        self.all("", "Pod")
    }

    pub(crate) fn namespace(&self, name: &str) -> Option<&Resource<'a>> {
        self.all("", "Namespace").iter().find(|namespace| namespace.name == name)
    }

    /// Pods and what will be pods.
    ///
    /// DIFFERS: istioctl knows pods of a cluster only; where files are all there is, workloads say which pods will be.
    pub(crate) fn workloads(&self) -> impl Iterator<Item = &Resource<'a>> {
        let templates = WORKLOADS.iter().flat_map(|kind| {
            let group = if *kind == "Job" { "batch" } else { "apps" };
            self.all(group, kind)
        });
        self.pods().iter().chain(templates)
    }

    /// Whether a selector finds any pod in a namespace.
    pub(crate) fn selects_any(&self, selector: &Labels, namespace: &str) -> bool {
        self.workloads().any(|pod| pod.namespace == namespace && selects(selector, &pod.pod_labels()))
    }

    /// Whether a pod, or what a workload makes, has or gets a sidecar (istioctl `inMesh`).
    pub(crate) fn in_mesh(&self, pod: &Resource<'_>) -> bool {
        let is_pod = pod.document.kind() == "Pod";
        let prefix = if is_pod { "" } else { "/spec/template" };
        let containers = [format!("{prefix}/spec/containers"), format!("{prefix}/spec/initContainers")];
        let mut containers = containers.iter().flat_map(|pointer| pod.list(pointer));
        if containers.any(|c| c["name"] == "istio-proxy" && c["image"].as_str().is_some_and(|image| !image.is_empty()))
        {
            return true;
        }
        const INJECT: &str = "sidecar.istio.io/inject";
        let annotations = match is_pod {
            true => pod.annotations.clone(),
            false => strings(pod.get("/spec/template/metadata/annotations")),
        };
        if let Some(value) = pod.pod_labels().get(INJECT).or(annotations.get(INJECT)) {
            return value == "true";
        }
        let namespace = self.namespace(pod.namespace);
        namespace.is_some_and(|n| n.labels.get("istio-injection").is_some_and(|value| value == "enabled"))
    }

    /// Whether the object says that it does not want to hear of it.
    pub(crate) fn is_suppressed(&self, message: &Message) -> bool {
        let subject = &message.subject;
        let of = |r: &&Resource<'_>| {
            r.document.kind() == subject.kind && r.name == subject.name && r.namespace == subject.namespace
        };
        let codes = self.everything().find(of).and_then(|resource| resource.annotations.get(SUPPRESS));
        codes.is_some_and(|codes| codes.split(',').any(|code| code == "*" || code == message.code))
    }
}

/// Whether a Kubernetes label selector fits; one that is not there fits everything.
pub(crate) fn label_selector_fits(selector: &Value, labels: &Labels) -> bool {
    let expressions = selector["matchExpressions"].as_array().map_or(&[][..], Vec::as_slice);
    selects(&strings(selector.get("matchLabels")), labels)
        && expressions.iter().all(|expression| {
            let value = labels.get(expression["key"].as_str().unwrap_or_default());
            let listed = || {
                let values = expression["values"].as_array().into_iter().flatten();
                values.into_iter().any(|v| value.is_some_and(|value| v == value.as_str()))
            };
            match expression["operator"].as_str() {
                Some("In") => listed(),
                Some("NotIn") => !listed(),
                Some("Exists") => value.is_some(),
                Some("DoesNotExist") => value.is_none(),
                _ => false,
            }
        })
}

/// `app=a,version=v1`.
pub(crate) fn selector_text(selector: &Labels) -> String {
    let pairs: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}

/// A list as Go prints it.
pub(crate) fn list_text<T: std::fmt::Display>(list: &[T]) -> String {
    let items: Vec<String> = list.iter().map(ToString::to_string).collect();
    format!("[{}]", items.join(" "))
}

/// A short host name is of the namespace it is written in.
pub(crate) fn full_host(host: &str, namespace: &str) -> String {
    if host.starts_with('*') || host.contains('.') {
        return host.to_owned();
    }
    format!("{host}.{namespace}.svc.cluster.local")
}
