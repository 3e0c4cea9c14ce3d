//! What gRPC clients and servers without a proxy get.

use std::path::Path;
use std::sync::Arc;

use config_store::Store;
use envoy_api::{json, type_url};
use istio_api::MeshConfig;
use mesh_types::ArcStr;
use push_context::{Node, PushContext, Settings};
use serde_json::{Value, json};
use xds_gen::{Names, generate};

const MESH: &str = "
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: test}
spec:
  clusterIP: 10.1.0.1
  selector: {app: echo}
  ports: [{name: grpc, port: 7070, targetPort: 17070}, {name: grpc-admin, port: 7071, targetPort: 17071}]
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: test}
spec: {clusterIP: 10.1.0.2, ports: [{name: grpc, port: 7070}]}
---
apiVersion: v1
kind: Pod
metadata: {name: echo-1, namespace: test, labels: {app: echo}}
spec: {serviceAccountName: echo, containers: [{name: c, image: i}]}
status: {podIP: 10.0.0.5, phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: echo-1, namespace: test, labels: {kubernetes.io/service-name: echo}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.5], conditions: {ready: true}, targetRef: {kind: Pod, name: echo-1, namespace: test}}]
ports: [{name: grpc, port: 17070}, {name: grpc-admin, port: 17071}]
---
";

const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: echo, namespace: test}
spec:
  host: echo.test.svc.cluster.local
  trafficPolicy:
    tls: {mode: ISTIO_MUTUAL}
    connectionPool: {http: {http2MaxRequests: 7}, tcp: {maxConnections: 3}}
  subsets:
  - {name: v1, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: LEAST_REQUEST}}}
  - {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x, minimumRingSize: 9}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: test}
spec:
  hosts: [echo]
  http:
  - match: [{headers: {who: {exact: me}}}]
    timeout: 3s
    route: [{destination: {host: echo, subset: v1}, weight: 20}, {destination: {host: echo, subset: v2}, weight: 80}]
  - route: [{destination: {host: echo}}]
---
";

fn push(yaml: &str) -> PushContext {
    let mut store = Store::new();
    for document in manifest::parse(Path::new("a.yaml"), yaml).unwrap() {
        store.apply(&document).unwrap_or_else(|rejected| panic!("{rejected}"));
    }
    PushContext::build(&store.snapshot(), &Arc::new(MeshConfig::builtin()), &Settings::default())
}

fn node(labels: Value) -> Node {
    let metadata = json!({"GENERATOR": "grpc"});
    let node =
        json!({"name": "echo-1", "namespace": "test", "ips": ["10.0.0.5"], "labels": labels, "metadata": metadata});
    Node::from_yaml(&node, &Settings::default()).unwrap()
}

fn get(push: &PushContext, node: &Node, of: &str, names: &[&str]) -> Vec<Value> {
    let names: Vec<ArcStr> = names.iter().map(|name| ArcStr::from(*name)).collect();
    let all = generate(push, node, of, Names::List(&names));
    all.iter()
        .map(|resource| {
            let value = json::to_json(of, &resource.body).unwrap();
            assert_eq!(value["name"].as_str().or(value["cluster_name"].as_str()), Some(&*resource.name));
            value
        })
        .collect()
}

#[test]
fn a_client_gets_a_listener_for_each_way_it_writes_a_host() {
    let push = push(MESH);
    let node = node(json!({"app": "echo"}));
    let names = ["echo:7070", "echo.test.svc.cluster.local:7071", "nobody:1"];
    let listeners = get(&push, &node, type_url::LISTENER, &names);
    let got: Vec<&str> = listeners.iter().filter_map(|l| l["name"].as_str()).collect();
    // As istiod: ports gather by service.
    let expected = ["echo:7070", "echo:7071", "echo.test.svc.cluster.local:7070", "echo.test.svc.cluster.local:7071"];
    assert_eq!(got, expected);
    let manager = &listeners[0]["api_listener"]["api_listener"];
    assert_eq!(manager["rds"]["route_config_name"], "outbound|7070||echo.test.svc.cluster.local");
    assert_eq!(manager["rds"]["config_source"], json!({"ads": {}}));
    let filters: Vec<&Value> = manager["http_filters"].as_array().unwrap().iter().map(|f| &f["name"]).collect();
    assert_eq!(filters, ["envoy.filters.http.fault", "envoy.filters.http.router"]);
    let all = generate(&push, &node, type_url::LISTENER, Names::Wildcard);
    assert_eq!(all.len(), 3, "every port of every service");
    assert!(generate(&push, &node, type_url::LISTENER, Names::List(&[])).is_empty());
}

#[test]
fn routes_are_those_of_one_host_and_tell_the_limit_of_calls() {
    let push = push(&format!("{MESH}{RULES}"));
    let name = "outbound|7070||echo.test.svc.cluster.local";
    let tables = get(&push, &node(json!({})), type_url::ROUTE, &[name, "7070", "outbound|x||y"]);
    assert_eq!(tables.len(), 1, "{tables:?}");
    let hosts = tables[0]["virtual_hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 1, "the other service of the port is not in it");
    let domains: Vec<&str> = hosts[0]["domains"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for domain in ["echo.test.svc.cluster.local:7070", "echo:7070", "echo"] {
        assert!(domains.contains(&domain), "{domain} in {domains:?}");
    }
    let route = &hosts[0]["routes"][0]["route"];
    assert_eq!(route["max_stream_duration"], json!({"max_stream_duration": "3s"}));
    assert_eq!(route["max_grpc_timeout"], Value::Null);
    assert_eq!(hosts[0]["routes"][1]["route"]["max_stream_duration"], json!({"max_stream_duration": "0s"}));
    let proxy = json!({"name": "x", "namespace": "test", "ips": ["10.0.0.6"]});
    let proxy = Node::from_yaml(&proxy, &Settings::default()).unwrap();
    let table = &get(&push, &proxy, type_url::ROUTE, &["7070"])[0];
    assert!(!table.to_string().contains("max_stream_duration"), "for proxies nothing changes");
}

#[test]
fn clusters_have_what_such_clients_know_of_a_rule() {
    let push = push(&format!("{MESH}{RULES}"));
    let of = |subset: &str| format!("outbound|7070|{subset}|echo.test.svc.cluster.local");
    let names = [of(""), of("v1"), of("v2"), of("v3"), "outbound|1||echo.test.svc.cluster.local".to_owned()];
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let clusters = get(&push, &node(json!({})), type_url::CLUSTER, &names);
    assert_eq!(clusters.len(), 3, "neither a subset nor a port that does not exist");
    assert_eq!(clusters[0]["eds_cluster_config"], json!({"eds_config": {"ads": {}}, "service_name": names[0]}));
    assert_eq!(clusters[0]["circuit_breakers"], json!({"thresholds": [{"max_requests": 7}]}));
    assert_eq!(clusters[0]["lb_policy"], Value::Null, "their own default");
    assert_eq!(clusters[1]["lb_policy"], "LEAST_REQUEST");
    assert_eq!(clusters[2]["lb_policy"], "RING_HASH");
    assert_eq!(clusters[2]["ring_hash_lb_config"]["minimum_ring_size"], 9);
    let tls = &clusters[1]["transport_socket"]["typed_config"]["common_tls_context"];
    assert_eq!(clusters[1]["transport_socket"]["name"], "envoy.transport_sockets.tls");
    let plugin = json!({"instance_name": "default", "certificate_name": "default"});
    assert_eq!(tls["tls_certificate_provider_instance"], plugin);
    assert_eq!(tls["tls_certificate_certificate_provider_instance"], plugin);
    let validation = &tls["combined_validation_context"]["default_validation_context"];
    assert_eq!(validation["ca_certificate_provider_instance"]["certificate_name"], "ROOTCA");
    let names = &validation["match_subject_alt_names"];
    assert_eq!(names, &json!([{"exact": "spiffe://cluster.local/ns/test/sa/echo"}]));
    let without = generate(&push, &node(json!({})), type_url::CLUSTER, Names::Wildcard);
    assert!(without.is_empty(), "nothing without names");
    let endpoints = get(&push, &node(json!({})), type_url::ENDPOINT, &[&of("")]);
    assert!(endpoints[0].to_string().contains("10.0.0.5"), "{endpoints:?}");
}

#[test]
fn a_server_gets_its_own_ports_with_mutual_tls_and_policies() {
    let policy = |name: &str, action: &str, rest: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: test, annotations: {{{rest}}}}}\n\
             spec:\n  action: {action}\n  rules: [{{when: [{{key: 'request.headers[echo]', values: [{name}]}}]}}]\n---\n"
        )
    };
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: test}\n\
                  spec: {mtls: {mode: STRICT}}\n---\n";
    let policies = policy("block", "DENY", "") + &policy("allow", "ALLOW", "") + &policy("log", "AUDIT", "");
    let dry = policy("dry", "DENY", "istio.io/dry-run: 'true'");
    let with_rules = push(&format!("{MESH}{strict}{policies}{dry}"));
    let name = |address: &str| format!("xds.istio.io/grpc/lds/inbound/{address}");
    let names = [name("[::]:17070"), name("0.0.0.0:1"), name("0.0.0.0")];
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let of = |push: &PushContext, labels: Value| {
        let mut listeners = get(push, &node(labels), type_url::LISTENER, &names);
        assert_eq!(listeners.len(), 1, "only where a service leads to");
        listeners.remove(0)
    };
    let listener = of(&with_rules, json!({"app": "echo"}));
    assert_eq!(listener["address"]["socket_address"], json!({"address": "::", "port_value": 17070}));
    let chain = &listener["filter_chains"][0];
    assert_eq!(chain["name"], "inbound-mtls");
    assert_eq!(chain["transport_socket"]["typed_config"]["require_client_certificate"], true);
    let manager = &chain["filters"][0]["typed_config"];
    let filters = manager["http_filters"].as_array().unwrap();
    let filter_names: Vec<&Value> = filters.iter().map(|f| &f["name"]).collect();
    let expected = ["envoy.filters.http.rbac.DENY", "envoy.filters.http.rbac", "envoy.filters.http.router"];
    assert_eq!(filter_names, expected);
    let rules = |i: usize| filters[i]["typed_config"]["rules"]["policies"].as_object().unwrap();
    assert_eq!(rules(0).keys().collect::<Vec<_>>(), ["test-block-0"], "not what is in dry run");
    assert_eq!(rules(1).keys().collect::<Vec<_>>(), ["test-allow-0"]);
    let route = &manager["route_config"]["virtual_hosts"][0]["routes"][0];
    assert_eq!(route["non_forwarding_action"], json!({}));

    let nothing = push(MESH);
    assert_eq!(of(&nothing, json!({"app": "echo"}))["filter_chains"][0]["name"], "inbound-plaintext");
    let pod = MESH.replace("labels: {app: echo}}", "labels: {app: echo, security.istio.io/tlsMode: istio}}");
    let labelled = push(&pod);
    assert_eq!(of(&labelled, json!({"app": "echo"}))["filter_chains"][0]["name"], "inbound-mtls");
    let nobody = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: test}\nspec: {}\n";
    let closed = push(&format!("{MESH}{nobody}"));
    let filter =
        &of(&closed, json!({"app": "echo"}))["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0];
    assert_eq!(
        filter["typed_config"]["rules"]["policies"].as_object().unwrap().len(),
        1,
        "an ALLOW without rules: {filter}"
    );
}

#[test]
fn sessions_are_kept_by_the_client_itself() {
    let mesh = MESH.replace(
        "metadata: {name: echo, namespace: test}",
        "metadata: {name: echo, namespace: test, labels: {istio.io/persistent-session: 'test-cookie:/Service/Method'}}",
    );
    let mut store = Store::new();
    for document in manifest::parse(Path::new("a.yaml"), &mesh).unwrap() {
        store.apply(&document).unwrap_or_else(|rejected| panic!("{rejected}"));
    }
    let mut settings = Settings::default();
    settings.set_env("PILOT_ENABLE_PERSISTENT_SESSION_FILTER", "true");
    let push = PushContext::build(&store.snapshot(), &Arc::new(MeshConfig::builtin()), &settings);
    let listener = &get(&push, &node(json!({})), type_url::LISTENER, &["echo:7070"])[0];
    let filters = listener["api_listener"]["api_listener"]["http_filters"].as_array().unwrap();
    assert_eq!(filters.len(), 3, "in front of the others: {filters:?}");
    let cookie = &filters[0]["typed_config"]["session_state"]["typed_config"]["cookie"];
    assert_eq!(cookie, &json!({"name": "test-cookie", "path": "/Service/Method"}));
    let cluster = &get(&push, &node(json!({})), type_url::CLUSTER, &["outbound|7070||echo.test.svc.cluster.local"])[0];
    let statuses = &cluster["common_lb_config"]["override_host_status"]["statuses"];
    assert!(statuses.to_string().contains("DRAINING"), "{cluster}");
}
