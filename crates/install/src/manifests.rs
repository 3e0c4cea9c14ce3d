//! Everything that a control plane needs in a cluster, under istiod's names.

use serde_json::{Value, json};

use crate::webhooks;

/// What may differ from one installation to another.
#[derive(Clone, Debug)]
pub struct Choices {
    /// Revision of the control plane; "" and `default` are the default one.
    pub revision: String,
    /// Namespace of the control plane, which is the mesh's root namespace.
    pub namespace: String,
    /// Registry and path of the images.
    pub hub: String,
    /// Tag of the images.
    pub tag: String,
    /// Laid over injection's built-in values.
    pub values: Value,
    /// The mesh configuration; its root namespace is `namespace` unless it says otherwise.
    pub mesh: Value,
    /// Where the API server finds the webhooks, such as `https://10.0.0.1:15017`, when the control plane does not run
    /// in the cluster; then it gets no Deployment.
    pub webhook_url: Option<String>,
    /// Whether CRDs are part of it.
    pub crds: bool,
}

impl Choices {
    pub(crate) fn is_default(&self) -> bool {
        matches!(self.revision.as_str(), "" | "default")
    }

    /// The revision as labels have it.
    pub(crate) fn label(&self) -> &str {
        if self.is_default() { "default" } else { &self.revision }
    }

    /// `name` for the default revision, else `name-REVISION`.
    pub(crate) fn named(&self, name: &str) -> String {
        if self.is_default() { name.to_owned() } else { format!("{name}-{}", self.revision) }
    }

    /// A name for what is not in a namespace.
    pub(crate) fn global(&self, name: &str) -> String {
        format!("{}-{}", self.named(name), self.namespace)
    }

    pub(crate) fn labels(&self) -> Value {
        json!({
            "app": "istiod",
            "istio.io/rev": self.label(),
            "app.kubernetes.io/name": "istiod",
            "app.kubernetes.io/part-of": "istio",
            "app.kubernetes.io/managed-by": "outrigger",
        })
    }

    fn object(&self, api_version: &str, kind: &str, name: &str, rest: Value) -> Value {
        let mut object = json!({
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace, "labels": self.labels()},
        });
        extend(&mut object, rest);
        object
    }

    pub(crate) fn global_object(&self, api_version: &str, kind: &str, name: &str, rest: Value) -> Value {
        let mut object = self.object(api_version, kind, name, rest);
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("namespace");
        }
        object
    }
}

fn extend(object: &mut Value, rest: Value) {
    if let (Value::Object(object), Value::Object(rest)) = (object, rest) {
        object.extend(rest);
    }
}

/// All objects in the order in which they can be made.
///
/// # Errors
/// Values or a mesh configuration that injection cannot work with.
pub fn manifests(choices: &Choices) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    if choices.crds {
        for document in kube_source::crds().split("\n---\n") {
            let mut crd: Value = serde_json::from_str(document)?;
            crd["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "outrigger".into();
            objects.push(crd);
        }
    }
    let namespace = choices.namespace.as_str();
    objects.push(json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": namespace, "labels": {"app.kubernetes.io/managed-by": "outrigger"}},
    }));
    objects.extend(permissions(choices));
    objects.extend(config_maps(choices)?);
    objects.push(service(choices));
    if choices.webhook_url.is_none() {
        objects.push(deployment(choices));
    }
    // Last: from now on pods are refused where nobody answers.
    objects.push(webhooks::injection(choices));
    objects.push(webhooks::validation(choices));
    Ok(objects)
}

fn permissions(choices: &Choices) -> [Value; 5] {
    const RBAC: &str = "rbac.authorization.k8s.io/v1";
    let read = ["get", "list", "watch"];
    let name = choices.named("istiod");
    let (cluster_role, local_role) = (choices.global("istiod-clusterrole"), choices.named("istiod"));
    let subject = json!([{"kind": "ServiceAccount", "name": name, "namespace": choices.namespace}]);
    let rule = |groups: &[&str], resources: &[&str], verbs: &[&str]| json!({"apiGroups": groups, "resources": resources, "verbs": verbs});
    let istio = ["networking.istio.io", "security.istio.io", "telemetry.istio.io", "extensions.istio.io"];
    let cluster_rules = json!([
        rule(&[""], &["nodes", "pods", "services", "namespaces", "endpoints"], &read),
        rule(&["discovery.k8s.io"], &["endpointslices"], &read),
        rule(&istio, &["*"], &read),
        // Machines that register themselves.
        rule(
            &["networking.istio.io"],
            &["workloadentries", "workloadentries/status"],
            &["get", "create", "patch", "delete"],
        ),
        rule(&["gateway.networking.k8s.io"], &["httproutes", "grpcroutes"], &read),
        rule(&["apiextensions.k8s.io"], &["customresourcedefinitions"], &read),
        // The root certificate goes to every namespace.
        rule(&[""], &["configmaps"], &["get", "list", "watch", "create", "update", "patch"]),
        // caBundle
        rule(
            &["admissionregistration.k8s.io"],
            &["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
            &["get", "list", "watch", "update", "patch"],
        ),
        rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
        // Certificates that DestinationRules name, for proxies whose service accounts may read them.
        rule(&[""], &["secrets"], &read),
        rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
        // Addresses of ServiceEntries that have none.
        rule(&["networking.istio.io"], &["serviceentries/status"], &["patch"]),
    ]);
    let local_rules = json!([
        // cacerts, istio-ca-secret
        rule(&[""], &["secrets"], &["get", "list", "watch", "create", "update"]),
        rule(&["coordination.k8s.io"], &["leases"], &["get", "create", "update", "patch"]),
    ]);
    let reference =
        |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
    [
        choices.object("v1", "ServiceAccount", &name, json!({})),
        choices.global_object(RBAC, "ClusterRole", &cluster_role, json!({"rules": cluster_rules})),
        choices.global_object(
            RBAC,
            "ClusterRoleBinding",
            &cluster_role,
            json!({"roleRef": reference("ClusterRole", &cluster_role), "subjects": subject}),
        ),
        choices.object(RBAC, "Role", &local_role, json!({"rules": local_rules})),
        choices.object(
            RBAC,
            "RoleBinding",
            &local_role,
            json!({"roleRef": reference("Role", &local_role), "subjects": subject}),
        ),
    ]
}

fn config_maps(choices: &Choices) -> anyhow::Result<[Value; 2]> {
    let mut mesh = choices.mesh.clone();
    anyhow::ensure!(mesh.is_object(), "the mesh configuration is no mapping");
    if mesh["rootNamespace"].is_null() {
        mesh["rootNamespace"] = choices.namespace.as_str().into();
    }
    let discovery = format!("{}.{}.svc:15012", choices.named("istiod"), choices.namespace);
    if mesh["defaultConfig"]["discoveryAddress"].is_null() {
        mesh["defaultConfig"]["discoveryAddress"] = discovery.into();
    }
    let builtin = inject::Builtin {
        hub: choices.hub.clone(),
        tag: choices.tag.clone(),
        revision: choices.revision.clone(),
        values: choices.values.clone(),
        mesh: mesh.clone(),
    };
    // Refused here rather than by the control plane.
    inject::Config::builtin(&builtin)?;
    let mut values = builtin.values();
    if values["global"]["istioNamespace"] == "istio-system" {
        values["global"]["istioNamespace"] = choices.namespace.as_str().into();
    }
    let injection = json!({
        "config": inject::to_yaml(&builtin.injection()),
        "values": serde_json::to_string_pretty(&values)?,
    });
    Ok([
        choices.object(
            "v1",
            "ConfigMap",
            &choices.named("istio"),
            json!({"data": {"mesh": inject::to_yaml(&mesh), "meshNetworks": "networks: {}\n"}}),
        ),
        choices.object("v1", "ConfigMap", &choices.named("istio-sidecar-injector"), json!({"data": injection})),
    ])
}

fn service(choices: &Choices) -> Value {
    let port = |name: &str, port: u16, target: u16| json!({"name": name, "port": port, "targetPort": target, "protocol": "TCP"});
    let spec = json!({
        "selector": {"app": "istiod", "istio.io/rev": choices.label()},
        "ports": [
            port("grpc-xds", 15010, 15010),
            port("https-dns", 15012, 15012),
            port("https-webhook", 443, 15017),
            port("http-monitoring", 15014, 15014),
        ],
    });
    choices.object("v1", "Service", &choices.named("istiod"), json!({"spec": spec}))
}

fn deployment(choices: &Choices) -> Value {
    let container = json!({
        "name": "discovery",
        "image": format!("{}/outrigger:{}", choices.hub, choices.tag),
        "args": ["control-plane", "--registries=Kubernetes"],
        "ports": [
            {"name": "grpc-xds", "containerPort": 15010},
            {"name": "https-dns", "containerPort": 15012},
            {"name": "https-webhook", "containerPort": 15017},
            {"name": "http-monitoring", "containerPort": 15014},
        ],
        "env": [
            {"name": "REVISION", "value": choices.label()},
            {"name": "CLUSTER_ID", "value": "Kubernetes"},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        ],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 15014}, "periodSeconds": 3, "timeoutSeconds": 5},
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": 1337,
            "runAsGroup": 1337,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    });
    let spec = json!({
        "replicas": 1,
        "selector": {"matchLabels": {"app": "istiod", "istio.io/rev": choices.label()}},
        "strategy": {"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": "25%"}},
        "template": {
            "metadata": {
                "labels": {"app": "istiod", "istio.io/rev": choices.label(), "sidecar.istio.io/inject": "false"},
                "annotations": {"prometheus.io/port": "15014", "prometheus.io/scrape": "true"},
            },
            "spec": {"serviceAccountName": choices.named("istiod"), "containers": [container]},
        },
    });
    choices.object("apps/v1", "Deployment", &choices.named("istiod"), json!({"spec": spec}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(revision: &str) -> Choices {
        Choices {
            revision: revision.to_owned(),
            namespace: "istio-system".to_owned(),
            hub: "registry.example/mesh".to_owned(),
            tag: "1".to_owned(),
            values: json!({}),
            mesh: json!({}),
            webhook_url: None,
            crds: false,
        }
    }

    /// What tells objects apart.
    fn names(objects: &[Value]) -> Vec<String> {
        objects.iter().map(|object| format!("{} {}", object["kind"], object["metadata"]["name"])).collect()
    }

    #[test]
    fn revisions_share_nothing_but_the_namespace() {
        let (one, two) = (names(&manifests(&choices("")).unwrap()), names(&manifests(&choices("canary")).unwrap()));
        let shared: Vec<&String> = one.iter().filter(|name| two.contains(name)).collect();
        assert_eq!(shared, [r#""Namespace" "istio-system""#]);
    }

    #[test]
    fn what_is_installed_can_be_loaded() {
        let objects = manifests(&choices("canary")).unwrap();
        let map = objects.iter().find(|object| object["metadata"]["name"] == "istio-sidecar-injector-canary").unwrap();
        let text = |object: &Value, key: &str| object["data"][key].as_str().map(str::to_owned);
        let mesh = objects.iter().find(|object| object["metadata"]["name"] == "istio-canary").unwrap();
        let texts =
            inject::Texts { inject: text(map, "config"), values: text(map, "values"), mesh: text(mesh, "mesh") };
        let config = inject::Config::from_texts(&texts, "map", &inject::Builtin::default()).unwrap();
        assert_eq!(config.template_names(), ["sidecar"]);
    }
}
