//! Proxies as the conformance suite and `xds generate` describe them.

use registry::Locality;
use serde_json::{Map, Value, json};

use crate::{InvalidNode, Node, Settings};

impl Node {
    /// Reads one document of a proxy.yaml: `name`, `namespace`, `ips`, `serviceAccount`, `labels`,
    /// `locality`, `metadata`.
    pub fn from_yaml(document: &Value, settings: &Settings) -> Result<Node, InvalidNode> {
        let text = |key: &str| document.get(key).and_then(Value::as_str);
        let name = text("name").ok_or_else(|| InvalidNode::Yaml("no name".to_owned()))?;
        let namespace = text("namespace").unwrap_or("default");
        let ips: Vec<&str> =
            document.get("ips").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let first = ips.first().ok_or_else(|| InvalidNode::Yaml(format!("{name} has no ips")))?;
        let mut metadata: Map<String, Value> = Map::new();
        let mut put = |key: &str, value: Value| metadata.insert(key.to_owned(), value);
        put("NAME", json!(name));
        put("NAMESPACE", json!(namespace));
        put("INSTANCE_IPS", json!(ips.join(",")));
        put("ISTIO_VERSION", json!("1.32.0"));
        put("INTERCEPTION_MODE", json!("REDIRECT"));
        put("CLUSTER_ID", json!(&*settings.cluster_id));
        put("MESH_ID", json!(&*settings.domain));
        put("SERVICE_ACCOUNT", json!(text("serviceAccount").unwrap_or("default")));
        put("LABELS", document.get("labels").cloned().unwrap_or_else(|| json!({})));
        metadata.extend(document.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default());
        let id = format!("sidecar~{first}~{name}.{namespace}~{namespace}.svc.{}", settings.domain);
        Node::from_parts(&id, metadata, text("locality").map(Locality::parse))
    }
}
