//! What a machine outside of the mesh needs to join it: the files that `istioctl experimental workload entry configure` writes.

use std::collections::BTreeMap;
use std::time::Duration;

use ca::TokenRequest;
use config_store::{Body, Kind, Object};
use istio_api::WorkloadGroup;
use serde_json::{Map, Value, json};

use super::{Plane, ROOT_NAMESPACE};

/// As istioctl asks for.
const TOKEN_TTL: Duration = Duration::from_secs(3600);
/// Never captured: somebody may be logged in, and what reads metrics and health must get through.
const LOCAL_PORTS: &str = "22,15090,15021,15020";

impl Plane {
    /// The files, by name, for a machine of this WorkloadGroup that registers itself.
    pub(crate) fn workload_files(
        &self,
        namespace: &str,
        group: &str,
        gateway: &str,
    ) -> Result<BTreeMap<String, String>, String> {
        let state = self.handle.state();
        let object = state.snapshot.find(Kind::WorkloadGroup, namespace, group);
        let object = object.ok_or_else(|| format!("there is no WorkloadGroup {namespace}/{group}"))?;
        let Body::WorkloadGroup(spec) = &object.body else { return Err("not a WorkloadGroup".to_owned()) };
        let template = spec.template.clone().unwrap_or_default();
        let account = if template.service_account.is_empty() { "default" } else { &template.service_account };
        let mut config = match serde_json::to_value(&state.mesh.default_config) {
            Ok(Value::Object(config)) => config,
            _ => Map::new(),
        };
        merge_annotation(&mut config, object, spec)?;
        config.insert("discoveryAddress".to_owned(), format!("istiod.{ROOT_NAMESPACE}.svc:15012").into());
        if let Some(probe) = &spec.probe {
            config.insert("readinessProbe".to_owned(), serde_json::to_value(probe).unwrap_or_default());
        }
        let mut metadata = match config.remove("proxyMetadata") {
            Some(Value::Object(metadata)) => metadata,
            _ => Map::new(),
        };
        let mut labels: BTreeMap<String, String> =
            spec.metadata.as_ref().map(|metadata| metadata.labels.clone()).unwrap_or_default();
        labels.extend(template.labels.clone());
        let of = |names: [&str; 3]| names.iter().find_map(|name| labels.get(*name)).cloned();
        let service = of(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
        let service = service.unwrap_or_else(|| group.to_owned());
        let revision = of(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
        let revision = revision.unwrap_or_else(|| "latest".to_owned());
        labels.insert("service.istio.io/canonical-name".to_owned(), service.clone());
        labels.insert("service.istio.io/canonical-revision".to_owned(), revision.clone());
        let ports: Vec<Value> =
            template.ports.iter().map(|(name, port)| json!({"name": name, "containerPort": port})).collect();
        let mut set = |name: &str, value: String| metadata.insert(name.to_owned(), value.into());
        set("CANONICAL_SERVICE", service);
        set("CANONICAL_REVISION", revision);
        set("POD_NAMESPACE", namespace.to_owned());
        set("SERVICE_ACCOUNT", account.to_owned());
        set("TRUST_DOMAIN", self.trust_domain.clone());
        set("ISTIO_META_CLUSTER_ID", "Kubernetes".to_owned());
        set("ISTIO_META_MESH_ID", self.trust_domain.clone());
        set("ISTIO_META_NETWORK", template.network.clone());
        if !ports.is_empty() {
            set("ISTIO_META_POD_PORTS", Value::from(ports).to_string());
        }
        set("ISTIO_META_WORKLOAD_NAME", group.to_owned());
        set("ISTIO_META_AUTO_REGISTER_GROUP", group.to_owned());
        set("ISTIO_META_DNS_CAPTURE", "true".to_owned());
        set("ISTIO_METAJSON_LABELS", json!(labels).to_string());

        let mut variables: BTreeMap<&str, String> =
            metadata.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_str()?.to_owned()))).collect();
        let inbound: Vec<String> = template.ports.values().map(u32::to_string).collect();
        variables.insert("ISTIO_INBOUND_PORTS", if inbound.is_empty() { "*".to_owned() } else { inbound.join(",") });
        variables.insert("ISTIO_NAMESPACE", namespace.to_owned());
        variables.insert("ISTIO_SERVICE", format!("{group}.{namespace}"));
        variables.insert("ISTIO_SERVICE_CIDR", "*".to_owned());
        variables.insert("ISTIO_LOCAL_EXCLUDE_PORTS", LOCAL_PORTS.to_owned());
        let env = variables.iter().map(|(name, value)| format!("{name}={}\n", quoted(value))).collect();

        config.insert("proxyMetadata".to_owned(), Value::Object(metadata.clone()));
        let token = TokenRequest {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            audience: ca::DEFAULT_AUDIENCE.to_owned(),
            ttl: TOKEN_TTL,
            ..TokenRequest::default()
        };
        let token = self.tokens.0.issue(&token).map_err(|error| format!("service account token: {error}"))?;
        let mesh = format!("{:#}\n", json!({"defaultConfig": config}));
        let files = [
            ("cluster.env", env),
            ("hosts", format!("{gateway} istiod.{ROOT_NAMESPACE}.svc\n")),
            ("istio-token", token),
            ("mesh.yaml", mesh),
            ("root-cert.pem", self.root_pem()),
        ];
        Ok(files.into_iter().map(|(name, text)| (name.to_owned(), text)).collect())
    }
}

/// `proxy.istio.io/config` of the group and of what its entries carry, over the mesh's.
fn merge_annotation(config: &mut Map<String, Value>, object: &Object, spec: &WorkloadGroup) -> Result<(), String> {
    const NAME: &str = "proxy.istio.io/config";
    let of_entries = spec.metadata.as_ref().and_then(|metadata| metadata.annotations.get(NAME));
    for text in [object.annotations.get(NAME), of_entries].into_iter().flatten() {
        let file = std::path::PathBuf::from(format!("{}, annotation {NAME}", object.key));
        let documents = manifest::parse_plain(&file, text).map_err(|error| error.to_string())?;
        for document in documents {
            let Value::Object(fields) = document.value else {
                return Err(format!("{}: annotation {NAME} is no mapping", object.key));
            };
            for (name, value) in fields {
                match (config.get_mut(&name), value) {
                    (Some(Value::Object(there)), Value::Object(more)) if name == "proxyMetadata" => there.extend(more),
                    (_, value) => drop(config.insert(name, value)),
                }
            }
        }
    }
    Ok(())
}

/// For a shell.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}
