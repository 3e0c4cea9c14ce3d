//! The pipeline: pod in, patched pod out. Pure.
//!
//! As istio `pkg/kube/inject`: `injectPod`, `RunTemplate`, `postProcessPod`.

use std::collections::BTreeMap;
use std::rc::Rc;

use go_template::{Record, Value as Data};
use serde_json::{Value, json};

use crate::annotations::{self, InvalidAnnotation};
use crate::config::{Config, NativeSidecars};
use crate::decision::{self, Decision, NamespaceMeta, Rule, Selection};
use crate::merge::{self, MergeError};
use crate::mesh::{self, Mesh};
use crate::owner::Owner;
use crate::rendered::Overlay;
use crate::schema::{self, Mismatch};
use crate::status::{self, PROXY, Status, annotation};
use crate::{images, overlay, pod as pods, probes, prometheus, yaml};

/// A pod to inject.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// A v1 Pod, or the template of a workload as one.
    pub pod: &'a Value,
    /// What the pod belongs to; [`Owner::of_pod`] when the pod tells.
    pub owner: &'a Owner,
    /// Where the pod will live.
    pub namespace: &'a NamespaceMeta,
    /// Environment of the proxy from the webhook's path, see [`crate::webhook::path_env`].
    pub env: BTreeMap<String, String>,
    /// Also applies the label selectors of the webhook configuration, as the API server would have
    /// done before. Off in the webhook and in `kube-inject`.
    pub select: bool,
    /// `kube-inject` takes no notice of selectors and policy.
    pub always: bool,
    /// ProxyConfig resources that concern the pod.
    pub proxy_configs: ProxyConfigs,
}

/// The `spec`s of the `networking.istio.io/v1beta1` ProxyConfig resources that concern a pod.
#[derive(Clone, Debug, Default)]
pub struct ProxyConfigs {
    /// Those without selector: the root namespace's, then the pod's own namespace's.
    pub wide: Vec<Value>,
    /// The oldest that selects the pod; it wins over the pod's annotation.
    pub workload: Option<Value>,
}

impl<'a> Request<'a> {
    /// A pod that the webhook was called for.
    pub fn new(pod: &'a Value, owner: &'a Owner, namespace: &'a NamespaceMeta) -> Self {
        Self {
            pod,
            owner,
            namespace,
            env: BTreeMap::new(),
            select: false,
            always: false,
            proxy_configs: ProxyConfigs::default(),
        }
    }

    /// Decides also by the labels of namespace and pod whether the webhook would be called.
    pub fn selecting(mut self) -> Self {
        self.select = true;
        self
    }
}

/// What came out.
#[derive(Clone, Debug)]
pub enum Outcome {
    Injected {
        /// The whole pod.
        pod: Value,
        /// What the user should know: ignored, overridden, misspelt.
        warnings: Vec<String>,
        decision: Decision,
    },
    Skipped {
        decision: Decision,
    },
}

/// A pod that cannot be injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error("the pod is malformed: {0}")]
    Pod(String),
    #[error("failed to run injection template: {}", list(.0))]
    Annotations(Vec<InvalidAnnotation>),
    #[error("failed to run injection template: requested template {name:?} not found; have {known}")]
    UnknownTemplate { name: String, known: String },
    #[error("failed to run injection template: {0}")]
    Template(Box<go_template::Error>),
    #[error("failed to run injection template {template}: what it renders is not YAML: {message}")]
    Yaml { template: String, message: String },
    #[error("failed to run injection template {template}: failed applying injection overlay: {message}")]
    Overlay { template: String, message: String },
    #[error("annotation {name}: {message}")]
    Annotation { name: &'static str, message: String },
    #[error("a ProxyConfig resource is malformed: {0}")]
    ProxyConfig(String),
    #[error("failed to process pod: {0}")]
    Prometheus(String),
}

fn list(faults: &[InvalidAnnotation]) -> String {
    let lines: Vec<String> = faults.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

impl From<go_template::Error> for InjectError {
    fn from(error: go_template::Error) -> Self {
        Self::Template(Box::new(error))
    }
}

impl From<Mismatch> for InjectError {
    fn from(error: Mismatch) -> Self {
        Self::Pod(error.to_string())
    }
}

/// Injects a pod, or says why not.
///
/// # Errors
/// Wrong annotations, a template that fails, a result that is no pod.
pub fn inject(request: &Request<'_>, config: &Config) -> Result<Outcome, InjectError> {
    if !request.pod.is_object() {
        return Err(InjectError::Pod("expected an object".to_owned()));
    }
    if request.select {
        let unlabelled =
            config.values.pointer("/sidecarInjectorWebhook/enableNamespacesByDefault").and_then(Value::as_bool);
        let decision =
            decision::selected(request.namespace, request.pod, &config.revision, unlabelled.unwrap_or(false));
        if !decision.inject {
            return Ok(Outcome::Skipped { decision });
        }
    }
    let everything = Selection::default();
    let selection = if request.always { &everything } else { &config.selection };
    let decision = decision::decide(request.pod, &request.namespace.name, selection);
    if !decision.inject {
        // `kube-inject` reads the proxy configuration before it asks whether to inject.
        if request.always
            && decision.rule != Rule::HostNetwork
            && let Some(text) = annotation(request.pod, status::PROXY_CONFIG)
        {
            mesh::proxy_config(text)
                .map_err(|message| InjectError::Annotation { name: status::PROXY_CONFIG, message })?;
        }
        return Ok(Outcome::Skipped { decision });
    }
    let mut warnings = decision.warnings.clone();
    let pod = Injection::new(request, config)?.run(&mut warnings)?;
    Ok(Outcome::Injected { pod, warnings, decision })
}

/// One injection on its way.
struct Injection<'r> {
    config: &'r Config,
    namespace: &'r NamespaceMeta,
    owner: &'r Owner,
    /// The pod as it came, as Go would write it.
    original: Value,
    /// With ProxyConfig resources and the annotation `proxy.istio.io/config` applied.
    mesh: Mesh,
    env: BTreeMap<String, String>,
    /// As `kube-inject`: always the template `sidecar` unless the pod names others, no aliases.
    default_only: bool,
}

impl<'r> Injection<'r> {
    fn new(request: &Request<'r>, config: &'r Config) -> Result<Self, InjectError> {
        let faults = annotations::check(request.pod);
        if !faults.is_empty() {
            return Err(InjectError::Annotations(faults));
        }
        let mut original = schema::normalise(schema::named("Pod"), request.pod)?;
        if let Some(metadata) = original["metadata"].as_object_mut() {
            // Managed fields can be large and are none of injection's business.
            metadata.shift_remove("managedFields");
        }
        images::drop_openshift_user(&mut original, request.namespace);
        let mut mesh = config.mesh.clone();
        for spec in &request.proxy_configs.wide {
            mesh = mesh.with_resource(spec).map_err(InjectError::ProxyConfig)?;
        }
        if let Some(text) = annotation(&original, status::PROXY_CONFIG) {
            mesh = mesh
                .with_proxy_config(text)
                .map_err(|message| InjectError::Annotation { name: status::PROXY_CONFIG, message })?;
        }
        if let Some(spec) = &request.proxy_configs.workload {
            mesh = mesh.with_resource(spec).map_err(InjectError::ProxyConfig)?;
        }
        let mut env = request.env.clone();
        cluster_and_network(&original, config, &mut env);
        Ok(Self {
            config,
            namespace: request.namespace,
            owner: request.owner,
            original,
            mesh,
            env,
            default_only: request.always,
        })
    }

    /// The mesh configuration that templates and post-processing work with: `kube-inject` applies the pod's
    /// annotation to it, the webhook only to `.ProxyConfig`.
    fn context(&self) -> &Mesh {
        if self.default_only { &self.mesh } else { &self.config.mesh }
    }

    fn run(self, warnings: &mut Vec<String>) -> Result<Value, InjectError> {
        warn(&self.original, warnings);
        let (mut pod, template) = self.render()?;
        pod = overlay::reapply(pod, &self.original, &template, self.mesh.proxy())
            .map_err(|message| InjectError::Annotation { name: status::OVERRIDES, message })?;
        self.finish(&mut pod, &template, warnings)?;
        Ok(schema::normalise(schema::named("Pod"), &pod)?)
    }

    /// Renders all templates: the merged pod, and the templates alone as a pod.
    fn render(&self) -> Result<(Value, Value), InjectError> {
        let stripped = overlay::strip(&self.original, self.context().status_port())
            .map_err(|message| InjectError::Annotation { name: status::OVERRIDES, message })?;
        let ty = schema::named("Pod");
        // A container that a template added before is not the user's own.
        let injected_before = Status::of_pod(&self.original)
            .is_some_and(|status| status.containers.iter().flatten().any(|name| name == PROXY));
        let mut merged = self.original.clone();
        let mut alone: Option<Value> = None;
        for name in self.template_names() {
            let Some(template) = self.config.templates.get(&name) else {
                let known = self.config.template_names().join(", ");
                return Err(InjectError::UnknownTemplate { name, known });
            };
            let text = template.render(self.data(&stripped), self.config.limits)?;
            let failed = |message: String| InjectError::Overlay { template: name.clone(), message };
            let apply = |pod: Value, patch: &Value| {
                let pod = merge::merge(ty, pod, patch).map_err(|error: MergeError| failed(error.to_string()))?;
                schema::normalise(ty, &pod).map_err(|error| failed(error.to_string()))
            };
            let overlay = self.config.rendered.get(text, |text| {
                let patch = yaml::mapping(&name, text)
                    .map_err(|error| InjectError::Yaml { template: name.clone(), message: error.to_string() })?;
                let patch = as_pod(patch);
                let alone = apply(schema::normalise(ty, &json!({}))?, &patch)?;
                Ok::<_, InjectError>(Overlay { patch, alone })
            })?;
            alone = Some(match alone {
                None => overlay.alone.clone(),
                Some(alone) => apply(alone, &overlay.patch)?,
            });
            let alone = alone.as_ref();
            // A user's own istio-proxy among the containers customises the one among the init
            // containers when the template puts it there.
            if self.native(&merged)
                && !injected_before
                && alone.is_some_and(|alone| pods::find(pods::containers(alone, "initContainers"), PROXY).is_some())
                && let Some(container) = pods::remove(&mut merged, "containers", PROXY)
                && let Some(items) = pods::list_mut(&mut merged, "initContainers")
            {
                items.push(container);
            }
            merged = apply(merged, &overlay.patch)?;
        }
        Ok((merged, alone.map_or_else(|| schema::normalise(ty, &json!({})), Ok)?))
    }

    fn native(&self, pod: &Value) -> bool {
        match annotation(pod, status::NATIVE) {
            Some("true") => true,
            Some("false") => false,
            _ => self.config.native == NativeSidecars::On,
        }
    }

    fn template_names(&self) -> Vec<String> {
        let names: Vec<String> = match annotation(&self.original, status::TEMPLATES) {
            Some(names) => names.split(',').map(|name| name.trim().to_owned()).collect(),
            None if self.default_only => vec!["sidecar".to_owned()],
            None => self.config.default_templates.clone(),
        };
        let mut out = Vec::with_capacity(names.len());
        for name in names {
            match self.config.aliases.get(&name).filter(|_| !self.default_only) {
                Some(aliases) => out.extend(aliases.iter().cloned()),
                None => out.push(name),
            }
        }
        out
    }

    /// What templates see.
    fn data<'a>(&'a self, stripped: &'a Value) -> Data<'a> {
        let record = |name, fields| Data::Record(Rc::new(Record { name, fields }));
        let config = self.config;
        let annotation = |name: &str| annotation(stripped, name);
        let proxy = self.mesh.proxy();
        let (uid, gid) = images::proxy_ids(self.namespace);
        let revision = if config.revision == "default" && self.default_only { "" } else { config.revision.as_str() };
        record(
            "inject.SidecarTemplateData",
            vec![
                (
                    "TypeMeta",
                    record(
                        "v1.TypeMeta",
                        vec![
                            ("Kind", Data::from(self.owner.kind.as_str())),
                            ("APIVersion", Data::from(self.owner.api_version.as_str())),
                        ],
                    ),
                ),
                (
                    "DeploymentMeta",
                    record(
                        "types.NamespacedName",
                        vec![
                            ("Namespace", Data::from(self.owner.namespace.as_str())),
                            ("Name", Data::from(self.owner.name.as_str())),
                        ],
                    ),
                ),
                ("ObjectMeta", schema::view(schema::named("ObjectMeta"), &stripped["metadata"])),
                ("Spec", schema::view(schema::named("PodSpec"), &stripped["spec"])),
                ("ProxyConfig", schema::view(schema::named("ProxyConfig"), proxy)),
                ("MeshConfig", schema::view(schema::named("MeshConfig"), self.context().value())),
                ("Values", Data::from_json(&config.values)),
                ("Revision", Data::from(revision)),
                ("NativeSidecars", Data::Bool(config.native == NativeSidecars::On)),
                ("ProxyImage", Data::from(images::proxy(&config.values, proxy, annotation(status::IMAGE_TYPE)))),
                ("ProxyInitImage", Data::from(images::init(&config.values, annotation(status::IMAGE_TYPE)))),
                ("ProxyUID", Data::Int(uid, "int64")),
                ("ProxyGID", Data::Int(gid, "int64")),
                ("InboundTrafficPolicyMode", Data::from(self.context().inbound_mode())),
                ("CompliancePolicy", Data::from(config.compliance_policy.as_str())),
            ],
        )
    }

    /// What templates cannot do well.
    fn finish(&self, pod: &mut Value, template: &Value, warnings: &mut Vec<String>) -> Result<(), InjectError> {
        if !self.env.is_empty()
            && let Some(proxy) = pods::container_mut(pod, PROXY)
        {
            override_env(proxy, &self.env);
        }
        let mesh = self.context();
        prometheus::merge(pod, mesh).map_err(InjectError::Prometheus)?;
        prometheus::secure_port(pod);
        probes::rewrite(pod, self.rewrites_probes(pod), mesh.status_port(), warnings);
        if let Some(network) = self.env.get("ISTIO_META_NETWORK") {
            pods::metadata_mut(pod, "labels").insert(status::NETWORK.to_owned(), json!(network));
        }
        let status = Status::of_template(&template["spec"], self.reported_revision());
        let annotations = pods::metadata_mut(pod, "annotations");
        annotations.insert(status::STATUS.to_owned(), json!(serde_json::to_string(&status).unwrap_or_default()));
        if !self.default_only {
            for (name, value) in &self.config.injected_annotations {
                annotations.insert(name.clone(), json!(value));
            }
        }
        self.order(pod);
        Ok(())
    }

    fn reported_revision(&self) -> &str {
        &self.config.revision
    }

    fn rewrites_probes(&self, pod: &Value) -> bool {
        let own = annotation(pod, status::REWRITE_PROBES).and_then(status::parse_bool);
        let values = self.config.values.pointer("/sidecarInjectorWebhook/rewriteAppHTTPProbe");
        own.unwrap_or_else(|| values.and_then(Value::as_bool).unwrap_or(false))
    }

    /// Puts the containers into an order in which redirection and proxy start at the right moment.
    fn order(&self, pod: &mut Value) {
        let held = self.config.values.pointer("/global/proxy/holdApplicationUntilProxyStarts").and_then(Value::as_bool);
        if self.mesh.hold_application() || held.unwrap_or(false) {
            pods::move_first(pod, "containers", PROXY);
        } else {
            pods::move_last(pod, "containers", PROXY);
        }
        let list = "initContainers";
        if pods::find(pods::containers(pod, list), PROXY).is_some() {
            for name in [status::CORE_DUMP, PROXY, status::VALIDATION, status::INIT] {
                pods::move_first(pod, list, name);
            }
        } else {
            // The user's init containers run before the redirection, else they would have no network.
            pods::move_first(pod, list, status::VALIDATION);
            pods::move_last(pod, list, status::INIT);
            pods::move_last(pod, list, status::CORE_DUMP);
        }
    }
}

/// Old templates render the parts of a pod's spec without the pod around them.
fn as_pod(rendered: Value) -> Value {
    const PARTS: [&str; 6] =
        ["initContainers", "containers", "volumes", "dnsConfig", "imagePullSecrets", "securityContext"];
    let Value::Object(mut map) = rendered else { return rendered };
    if map.contains_key("spec") || map.contains_key("metadata") || !PARTS.iter().any(|part| map.contains_key(*part)) {
        return Value::Object(map);
    }
    let mut pod = json!({});
    if let Some(annotations) = map.shift_remove("podRedirectAnnot") {
        pod["metadata"] = json!({"annotations": annotations});
    }
    map.retain(|key, _| PARTS.contains(&key.as_str()));
    pod["spec"] = Value::Object(map);
    pod
}

/// Cluster and network: values, then the webhook's path, then the pod's label.
fn cluster_and_network(pod: &Value, config: &Config, env: &mut BTreeMap<String, String>) {
    let value = |path: &str| config.values.pointer(path).and_then(Value::as_str);
    let label = status::label(pod, status::NETWORK);
    for (name, path, label) in [
        ("ISTIO_META_CLUSTER_ID", "/global/multiCluster/clusterName", None),
        ("ISTIO_META_NETWORK", "/global/network", label),
    ] {
        let given = env.get(name).map(String::as_str).filter(|given| !given.is_empty());
        // A label wins even when it is empty: then the pod is in no network.
        let chosen = label.or(given).or_else(|| value(path)).unwrap_or_default().to_owned();
        if !chosen.is_empty() {
            env.insert(name.to_owned(), chosen);
        }
    }
}

/// Replaces variables of the same names, and appends them in order.
fn override_env(container: &mut Value, env: &BTreeMap<String, String>) {
    if let Some(list) = container.get_mut("env").and_then(Value::as_array_mut) {
        list.retain(|item| item["name"].as_str().is_none_or(|name| !env.contains_key(name)));
    }
    for (name, value) in env {
        pods::push_env(container, name, value);
    }
}

fn warn(pod: &Value, warnings: &mut Vec<String>) {
    for name in annotations::unknown(pod) {
        warnings.push(format!("annotation {name} is unknown and ignored"));
    }
    if let Some(yaml) = pod["metadata"]["annotations"][status::PROXY_CONFIG].as_str() {
        for field in mesh::unknown_proxy_fields(yaml) {
            warnings.push(format!("annotation {}: field {field} is unknown and ignored", status::PROXY_CONFIG));
        }
    }
    match pod["spec"]["dnsPolicy"].as_str() {
        None | Some("" | "ClusterFirst") => {}
        Some(other) => {
            warnings.push(format!("dnsPolicy is {other}: the sidecar may not find its control plane"));
        }
    }
}
