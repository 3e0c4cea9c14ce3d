//! The proxy's node: the id and metadata that the control plane generates configuration from.

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_api::core;
use envoy_api::wkt;
use serde_json::{Map, Value, json};

use crate::environment::Environment;
use crate::flags::Role;

/// What the node is made of.
#[derive(Clone, Debug)]
pub(crate) struct Facts<'a> {
    pub role: Role,
    /// The first is the pod's address.
    pub addresses: &'a [IpAddr],
    pub pod_name: &'a str,
    pub namespace: &'a str,
    /// `NAMESPACE.svc.cluster.local`.
    pub domain: &'a str,
    pub service_account: &'a str,
    pub labels: &'a BTreeMap<String, String>,
    pub annotations: &'a BTreeMap<String, String>,
    /// The merged proxy configuration as JSON.
    pub proxy_config: &'a Value,
    pub status_port: u16,
    pub prometheus_port: u16,
    pub exit_on_zero_active_connections: bool,
    /// The name in the control plane's certificate; empty without TLS.
    pub pilot_san: &'a str,
    pub outlier_log_path: Option<&'a str>,
    /// An Envoy that is not Istio's: it knows none of Istio's own filters, and the control plane is to send none.
    pub stock_envoy: bool,
    /// Whether our own proxy runs; the control plane may then use what Envoy lacks.
    pub own_proxy: bool,
}

/// The version of Istio whose behaviour we offer; istiod and our control plane adapt what they send to it.
pub(crate) const ISTIO_VERSION: &str = "1.30.0";

/// Makes the node. Source: istio `pkg/bootstrap/config.go`, `GetNodeMetaData`.
pub(crate) fn node(facts: &Facts<'_>, env: &Environment) -> core::Node {
    let role = match facts.role {
        Role::Sidecar => "sidecar",
        Role::Router => "router",
    };
    let address = facts.addresses.first().map_or_else(|| "127.0.0.1".to_owned(), ToString::to_string);
    let id = format!("{role}~{address}~{}.{}~{}", facts.pod_name, facts.namespace, facts.domain);
    let metadata = metadata(facts, env);
    let cluster = cluster(facts, &metadata);
    core::Node {
        id,
        cluster,
        metadata: Some(to_struct(metadata)),
        locality: locality(facts.labels),
        user_agent_name: "envoy".to_owned(),
        user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentVersion(format!(
            "outrigger/{}",
            env!("CARGO_PKG_VERSION")
        ))),
        ..Default::default()
    }
}

fn metadata(facts: &Facts<'_>, env: &Environment) -> Map<String, Value> {
    let mut metadata = Map::new();
    if let Some(Value::Object(given)) = facts.proxy_config.get("proxyMetadata") {
        let meta = given
            .iter()
            .filter_map(|(name, value)| Some((name.strip_prefix("ISTIO_META_")?.to_owned(), value.clone())));
        metadata.extend(meta);
    }
    metadata.extend(env.with_prefix("ISTIO_META_").map(|(name, value)| (name.to_owned(), Value::from(value))));
    let mut static_labels = Map::new();
    for (name, text) in env.with_prefix("ISTIO_METAJSON_") {
        match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(fields)) if name == "LABELS" => static_labels = fields,
            Ok(Value::Object(fields)) => metadata.extend(fields),
            _ => {
                tracing::warn!(name = %format!("ISTIO_METAJSON_{name}"), "environment variable is not a JSON object; ignored")
            }
        }
    }
    if facts.stock_envoy {
        metadata.entry("PROFILE").or_insert_with(|| "stock".into());
    }
    metadata.entry("METADATA_DISCOVERY").or_insert_with(|| "false".into());
    let mut labels = static_labels.clone();
    // The hash changes with each rollout and would split metrics by it.
    let pod_labels = facts.labels.iter().filter(|(name, _)| *name != "pod-template-hash");
    labels.extend(pod_labels.map(|(name, value)| (name.clone(), Value::from(value.as_str()))));
    if let Some(dns) = env.get("DNS_PROXY_ADDR") {
        metadata.insert("DNS_PROXY_ADDR".to_owned(), dns.into());
    }
    // POD_PORTS is a JSON list in a string in the environment, and stays one: istiod reads both.
    let mut set = |name: &str, value: Value| {
        let empty = match &value {
            Value::String(s) => s.is_empty(),
            Value::Object(o) => o.is_empty(),
            Value::Null => true,
            _ => false,
        };
        if !empty {
            metadata.insert(name.to_owned(), value);
        }
    };
    let addresses: Vec<String> = facts.addresses.iter().map(ToString::to_string).collect();
    set("LABELS", Value::Object(labels));
    set("STATIC_LABELS", Value::Object(static_labels));
    set("ANNOTATIONS", json!(facts.annotations));
    set("INSTANCE_IPS", addresses.join(",").into());
    set("NAME", facts.pod_name.into());
    set("NAMESPACE", facts.namespace.into());
    set("SERVICE_ACCOUNT", facts.service_account.into());
    set("PROXY_CONFIG", facts.proxy_config.clone());
    set("ENVOY_STATUS_PORT", facts.status_port.into());
    set("ENVOY_PROMETHEUS_PORT", facts.prometheus_port.into());
    if !facts.pilot_san.is_empty() {
        set("PILOT_SAN", json!([facts.pilot_san]));
    }
    set("OUTLIER_LOG_PATH", facts.outlier_log_path.unwrap_or_default().into());
    set("WORKLOAD_IDENTITY_SOCKET_FILE", "socket".into());
    if facts.exit_on_zero_active_connections {
        set("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "true".into());
    }
    metadata.entry("ISTIO_VERSION").or_insert_with(|| ISTIO_VERSION.into());
    if facts.own_proxy {
        metadata.insert("OUTRIGGER_PROXY".to_owned(), "true".into());
    }
    metadata
}

/// Source: istio `pkg/bootstrap/config.go`, `getServiceCluster`.
fn cluster(facts: &Facts<'_>, metadata: &Map<String, Value>) -> String {
    let workload = metadata.get("WORKLOAD_NAME").and_then(Value::as_str).filter(|name| !name.is_empty());
    let label = |name: &str| facts.labels.get(name).map(String::as_str).filter(|value| !value.is_empty());
    // Source: istio `pkg/kube/labels`, `CanonicalService`, `GetApp`.
    let app = label("app").or_else(|| label("app.kubernetes.io/name"));
    let canonical = label("service.istio.io/canonical-name").or(app).or(workload).unwrap_or("istio-proxy");
    let fallback = |name: &str| {
        if !name.is_empty() && name != "istio-proxy" {
            return name.to_owned();
        }
        match (app.or(workload), facts.namespace) {
            (Some(name), namespace) => format!("{name}.{namespace}"),
            (None, "") => "istio-proxy".to_owned(),
            (None, namespace) => format!("istio-proxy.{namespace}"),
        }
    };
    let config = facts.proxy_config;
    match config.get("tracingServiceName").and_then(Value::as_str) {
        Some("CANONICAL_NAME_ONLY") => fallback(canonical),
        Some("CANONICAL_NAME_AND_NAMESPACE") if !facts.namespace.is_empty() => {
            format!("{canonical}.{}", facts.namespace)
        }
        _ => fallback(config.get("serviceCluster").and_then(Value::as_str).unwrap_or_default()),
    }
}

/// Source: istio `pkg/model/proxy.go`, `GetLocalityLabel`, `SanitizeLocalityLabel`, `ConvertLocality`.
fn locality(labels: &BTreeMap<String, String>) -> Option<core::Locality> {
    let label = labels
        .get("topology.istio.io/locality")
        .or_else(|| labels.get("istio-locality"))
        .filter(|label| !label.is_empty())?;
    let label = if label.contains('/') { label.clone() } else { label.replace('.', "/") };
    let mut parts = label.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Some(core::Locality { region: next(), zone: next(), sub_zone: next() })
}

fn to_struct(fields: Map<String, Value>) -> wkt::Struct {
    wkt::Struct { fields: fields.into_iter().map(|(name, value)| (name, to_value(value))).collect() }
}

fn to_value(value: Value) -> wkt::Value {
    use wkt::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(s) => Kind::StringValue(s),
        Value::Array(values) => Kind::ListValue(wkt::ListValue { values: values.into_iter().map(to_value).collect() }),
        Value::Object(fields) => Kind::StructValue(to_struct(fields)),
    };
    wkt::Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text<'a>(node: &'a core::Node, name: &str) -> Option<&'a str> {
        match node.metadata.as_ref()?.fields.get(name)?.kind.as_ref()? {
            wkt::value::Kind::StringValue(s) => Some(s),
            _ => None,
        }
    }

    #[test]
    fn node_of_a_bookinfo_pod() {
        let labels = BTreeMap::from([
            ("app".to_owned(), "reviews".to_owned()),
            ("pod-template-hash".to_owned(), "x".to_owned()),
            ("istio-locality".to_owned(), "r.z.s".to_owned()),
        ]);
        let config = json!({"serviceCluster": "istio-proxy", "proxyMetadata": {"ISTIO_META_DNS_CAPTURE": "true"}});
        let facts = Facts {
            role: Role::Sidecar,
            addresses: &["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            pod_name: "reviews-v1-abc",
            namespace: "default",
            domain: "default.svc.cluster.local",
            service_account: "bookinfo-reviews",
            labels: &labels,
            annotations: &BTreeMap::new(),
            proxy_config: &config,
            status_port: 15021,
            prometheus_port: 15090,
            exit_on_zero_active_connections: false,
            pilot_san: "istiod.istio-system.svc",
            outlier_log_path: None,
            stock_envoy: false,
            own_proxy: true,
        };
        let env = Environment::from([
            ("ISTIO_META_WORKLOAD_NAME", "reviews-v1"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_METAJSON_X", "{\"A\":1}"),
        ]);
        let node = node(&facts, &env);
        assert_eq!(node.id, "sidecar~10.0.0.7~reviews-v1-abc.default~default.svc.cluster.local");
        assert_eq!(node.cluster, "reviews.default");
        assert_eq!(node.locality.as_ref().map(|l| (l.region.as_str(), l.sub_zone.as_str())), Some(("r", "s")));
        for (name, value) in [
            ("INSTANCE_IPS", "10.0.0.7,fd00::7"),
            ("WORKLOAD_NAME", "reviews-v1"),
            ("CLUSTER_ID", "Kubernetes"),
            ("SERVICE_ACCOUNT", "bookinfo-reviews"),
            ("DNS_CAPTURE", "true"),
            ("OUTRIGGER_PROXY", "true"),
            ("ISTIO_VERSION", ISTIO_VERSION),
        ] {
            assert_eq!(text(&node, name), Some(value), "{name}");
        }
        let Some(wkt::value::Kind::StructValue(labels)) = &node.metadata.as_ref().unwrap().fields["LABELS"].kind else {
            panic!()
        };
        assert!(labels.fields.contains_key("app") && !labels.fields.contains_key("pod-template-hash"));
    }
}
