//! What tests generate from YAML and look at as JSON.

use std::path::Path;
use std::sync::Arc;

use config_store::Store;
use envoy_api::{json, type_url};
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use serde_json::{Value, json};
use xds_gen::{Names, generate};

/// A control plane with one proxy.
pub(crate) struct Generated {
    push: PushContext,
    node: Node,
}

impl Generated {
    /// Of objects, a MeshConfig and a proxy, each in YAML, with istiod's variables.
    #[track_caller]
    pub(crate) fn of(objects: &str, mesh: &str, env: &[(&str, &str)], proxy: &str) -> Generated {
        let mut settings = Settings::default();
        for (name, value) in env {
            assert!(settings.set_env(name, value), "{name}");
        }
        Generated::with(objects, mesh, &settings, proxy)
    }

    /// As [`Generated::of`] with settings as they are.
    #[track_caller]
    pub(crate) fn with(objects: &str, mesh: &str, settings: &Settings, proxy: &str) -> Generated {
        let mut store = Store::new();
        for document in manifest::parse(Path::new("a.yaml"), objects).unwrap() {
            store.apply(&document).unwrap_or_else(|rejected| panic!("{rejected}"));
        }
        let mesh = MeshConfig::load(Path::new("mesh.yaml"), mesh).unwrap();
        let push = PushContext::build(&store.snapshot(), &Arc::new(mesh), settings);
        let ips = if proxy.contains("ips:") { "" } else { "ips: [10.0.0.9]," };
        let proxy = format!("{{name: client, {ips} {proxy}}}");
        let proxy = manifest::parse_plain(Path::new("proxy.yaml"), &proxy).unwrap().remove(0);
        let node = Node::from_yaml(&proxy.value, settings).unwrap();
        Generated { push, node }
    }

    /// The proxy as its pod says.
    pub(crate) fn effective(&self) -> Node {
        self.push.effective(&self.node).expect("a proxy with a pod")
    }

    /// All resources of a type by name.
    pub(crate) fn all(&self, type_url: &str) -> Value {
        let all = generate(&self.push, &self.node, type_url, Names::Wildcard);
        let text = |r: &envoy_api::Resource| (r.name.to_string(), json::to_json(type_url, &r.body).unwrap());
        Value::Object(all.iter().map(text).collect())
    }

    #[track_caller]
    fn one(&self, type_url: &str, name: &str) -> Value {
        let all = self.all(type_url);
        let names: Vec<&String> = all.as_object().unwrap().keys().collect();
        all.get(name).unwrap_or_else(|| panic!("no {name} in {names:?}")).clone()
    }

    #[track_caller]
    pub(crate) fn cluster(&self, name: &str) -> Value {
        self.one(type_url::CLUSTER, name)
    }

    #[track_caller]
    pub(crate) fn listener(&self, name: &str) -> Value {
        self.one(type_url::LISTENER, name)
    }

    #[track_caller]
    pub(crate) fn route(&self, name: &str) -> Value {
        self.one(type_url::ROUTE, name)
    }

    #[track_caller]
    pub(crate) fn endpoints(&self, name: &str) -> Value {
        self.one(type_url::ENDPOINT, name)
    }

    /// The load assignment of a cluster that is not the control plane's.
    #[track_caller]
    pub(crate) fn load_assignment(&self, name: &str) -> Value {
        let all = generate(&self.push, &self.node, type_url::ENDPOINT, Names::List(&[name.into()]));
        json::to_json(type_url::ENDPOINT, &all[0].body).unwrap()
    }

    /// The name table's entries.
    pub(crate) fn names(&self) -> Value {
        self.one(type_url::NAME_TABLE, "")["table"].clone()
    }
}

/// All values under a key, wherever it stands.
pub(crate) fn find<'a>(value: &'a Value, key: &str, out: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            out.extend(fields.get(key));
            fields.values().for_each(|inner| find(inner, key, out));
        }
        Value::Array(items) => items.iter().for_each(|inner| find(inner, key, out)),
        _ => {}
    }
}

/// The names of the filters of all connection managers and filter chains below a value.
pub(crate) fn filters(value: &Value) -> Vec<String> {
    let mut lists = Vec::new();
    for key in ["filters", "http_filters"] {
        find(value, key, &mut lists);
    }
    let names = lists.iter().flat_map(|list| list.as_array().into_iter().flatten());
    names.filter_map(|filter| filter["name"].as_str().map(str::to_owned)).collect()
}

/// A Kubernetes service of one port with an endpoint at 10.0.0.1, in namespace default.
pub(crate) fn service(name: &str, port: &str, metadata: &str, spec: &str) -> String {
    let labels = json!({"kubernetes.io/service-name": name});
    let number = port.rsplit_once("port: ").map_or("", |(_, rest)| rest.trim_end_matches('}'));
    let port_name = port.split_once("name: ").map_or("", |(_, rest)| rest.split(',').next().unwrap_or_default());
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, {metadata}}}
spec: {{clusterIP: 10.1.0.1, ports: [{port}], selector: {{app: {name}}}, {spec}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {labels}}}
addressType: IPv4
endpoints: [{{addresses: [10.0.0.1]}}, {{addresses: [10.0.0.2], conditions: {{ready: false, terminating: false}}}}]
ports: [{{name: {port_name}, port: {number}}}]
---
"
    )
}
