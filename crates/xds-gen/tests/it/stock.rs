//! The profile of proxies that are not Istio's build of Envoy.

use envoy_api::{json, type_url};
use push_context::Profile;
use serde_json::Value;
use xds_gen::{Names, generate};

use crate::conformance::{cases, each_case, load};

/// Everything named in `@type`, `type_url` or `name` anywhere in a resource.
fn names<'a>(value: &'a Value, out: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                if let ("@type" | "type_url" | "name", Value::String(text)) = (key.as_str(), value) {
                    out.push(text);
                }
                names(value, out);
            }
        }
        Value::Array(items) => items.iter().for_each(|v| names(v, out)),
        _ => {}
    }
}

#[test]
fn stock_proxies_get_none_of_istios_filters() {
    let Some(cases) = cases() else { return };
    for case in each_case(&cases) {
        let (push, mut nodes) = load(&case);
        for node in &mut nodes {
            node.profile = Profile::Stock;
            for type_url in [type_url::CLUSTER, type_url::LISTENER] {
                for resource in generate(&push, node, type_url, Names::Wildcard) {
                    let value = json::to_json(type_url, &resource.body).unwrap();
                    let mut found = Vec::new();
                    names(&value, &mut found);
                    // What stock Envoy rejects.
                    let own = ["istio.alpn", "istio.metadata_exchange", "istio.stats", "stats.PluginConfig"];
                    let bad = found.iter().find(|n| own.iter().any(|o| n.ends_with(o)));
                    assert_eq!(bad, None, "{} {}", case.display(), resource.name);
                }
            }
        }
    }
}

/// What these objects are to a proxy of that profile.
fn world(yaml: &str, profile: Profile) -> (push_context::PushContext, push_context::Node) {
    use config_store::Store;
    use push_context::{Node, PushContext, Settings};
    let mut store = Store::new();
    for document in manifest::parse(std::path::Path::new("a.yaml"), yaml).unwrap() {
        store.apply(&document).unwrap();
    }
    let settings = Settings::default();
    let mesh = std::sync::Arc::new(istio_api::MeshConfig::builtin());
    let push = PushContext::build(&store.snapshot(), &mesh, &settings);
    let mut node = Node::from_yaml(&serde_json::json!({"name": "b", "ips": ["10.1.1.1"]}), &settings).unwrap();
    node.profile = profile;
    (push, node)
}

/// ALPN of the cluster of a service port, for one profile.
fn cluster_alpn(profile: Profile, port_name: &str) -> Vec<String> {
    let yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec:\n  clusterIP: 10.0.0.1\n  selector: {{app: a}}\n  \
         ports: [{{port: 80, name: {port_name}}}]\n"
    );
    let (push, node) = world(&yaml, profile);
    let clusters = generate(&push, &node, type_url::CLUSTER, Names::Wildcard);
    let own = clusters.iter().find(|c| c.name.starts_with("outbound|80")).unwrap();
    let value = json::to_json(type_url::CLUSTER, &own.body).unwrap();
    let path = "/transport_socket_matches/0/transport_socket/typed_config/common_tls_context/alpn_protocols";
    let list = value.pointer(path).and_then(Value::as_array).unwrap();
    list.iter().map(|v| v.as_str().unwrap().to_owned()).collect()
}

#[test]
fn stock_clients_announce_http_by_the_clusters_alpn() {
    let stock = |port| cluster_alpn(Profile::Stock, port);
    assert_eq!(stock("http"), ["istio-http/1.1", "istio", "http/1.1"]);
    assert_eq!(stock("grpc"), ["istio-h2", "istio", "h2"]);
    assert_eq!(stock("tcp"), ["istio"]);
    assert_eq!(stock("web"), ["istio"]);
    assert_eq!(cluster_alpn(Profile::Outrigger, "http"), ["istio"], "the proxy's istio.alpn filter says it");
    assert_eq!(cluster_alpn(Profile::IstioProxy, "http"), ["istio-peer-exchange", "istio"]);
}

const SOCKET: &str = "
apiVersion: v1
kind: Service
metadata: {name: provider, namespace: default}
spec: {clusterIP: 10.0.0.1, selector: {app: a}, ports: [{port: 15889, name: http}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  egress:
  - {bind: 'unix:///var/mesh/uds.sock', port: {protocol: HTTP, name: a}, hosts: [./*]}
  - {bind: 127.0.0.1, port: {number: 3128, protocol: HTTP_PROXY, name: b}, hosts: [./*]}
  - {bind: 127.0.0.1, port: {number: 15889, protocol: HTTP, name: c}, hosts: [./*]}
";

#[test]
fn hosts_with_ports_can_be_matched() {
    for profile in [Profile::Stock, Profile::Outrigger, Profile::IstioProxy] {
        let (push, node) = world(SOCKET, profile);
        for (name, with_ports) in [("unix:///var/mesh/uds.sock", true), ("3128", true), ("15889", false)] {
            let names = [name.into()];
            let routes = generate(&push, &node, type_url::ROUTE, Names::List(&names));
            let table = json::to_json(type_url::ROUTE, &routes[0].body).unwrap();
            let domain = table.pointer("/virtual_hosts/0/domains/0").and_then(Value::as_str).unwrap();
            assert_eq!(domain.ends_with(":15889"), with_ports, "{profile:?} {name}: {table}");
            let ignored = table["ignore_port_in_host_matching"] == true;
            assert_eq!(ignored, !with_ports || profile == Profile::IstioProxy, "{profile:?} {name}: {table}");
        }
    }
}
