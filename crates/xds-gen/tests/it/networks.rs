//! Endpoints of other networks, and the gateways that lead there.

use std::path::Path;
use std::sync::Arc;

use istio_api::MeshNetworks;
use push_context::Settings;
use serde_json::{Value, json};

use crate::generated::{Generated, find, service};

const A: &str = "outbound|80||a.default.svc.cluster.local";

/// A pod of service `a`, with a sidecar.
fn pod(name: &str, ip: &str, labels: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: default, labels: {{app: a, security.istio.io/tlsMode: istio, {labels}}}}}
status: {{podIP: {ip}, phase: Running, conditions: [{{type: Ready, status: 'True'}}]}}
---
"
    )
}

fn mesh(pods: &[(&str, &str, &str)], more: &str) -> String {
    let endpoints: Vec<String> = pods
        .iter()
        .map(|(name, ip, _)| {
            format!("{{addresses: [{ip}], targetRef: {{kind: Pod, name: {name}, namespace: default}}}}")
        })
        .collect();
    let objects: String = pods.iter().map(|(name, ip, labels)| pod(name, ip, labels)).collect();
    format!(
        "{objects}
apiVersion: v1
kind: Service
metadata: {{name: a, namespace: default}}
spec: {{clusterIP: 10.1.0.1, ports: [{{name: http, port: 80}}], selector: {{app: a}}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: a, namespace: default, labels: {{kubernetes.io/service-name: a}}}}
addressType: IPv4
endpoints: [{}]
ports: [{{name: http, port: 80}}]
---
{more}",
        endpoints.join(", ")
    )
}

/// A Service that is a gateway, reached at a load balancer's addresses.
fn gateway(name: &str, labels: &str, ports: &str, ingress: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: istio-system, labels: {{{labels}}}}}
spec: {{type: LoadBalancer, clusterIP: 10.1.9.1, ports: [{ports}], selector: {{istio: eastwest}}}}
status: {{loadBalancer: {{ingress: [{ingress}]}}}}
---
"
    )
}

const PORT: &str = "{name: tls, port: 15443}";

fn networks(yaml: &str) -> Settings {
    let networks = MeshNetworks::load(Path::new("networks.yaml"), yaml).unwrap();
    Settings { networks: Arc::new(networks), ..Settings::default() }
}

fn of(objects: &str, settings: &Settings, proxy: &str) -> Generated {
    Generated::with(objects, "{}", settings, proxy)
}

/// Address, port and weight of all endpoints.
fn list(assignment: &Value) -> Vec<(String, u64, u64)> {
    let localities = assignment["endpoints"].as_array().into_iter().flatten();
    let all = localities.flat_map(|l| l["lb_endpoints"].as_array().into_iter().flatten());
    let row = |e: &Value| {
        let socket = &e["endpoint"]["address"]["socket_address"];
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let address = socket["address"].as_str().unwrap_or_default().to_owned();
        (address, number(&socket["port_value"]), number(&e["load_balancing_weight"]))
    };
    all.map(row).collect()
}

fn rows(rows: &[(&str, u64, u64)]) -> Vec<(String, u64, u64)> {
    rows.iter().map(|(address, port, weight)| ((*address).to_owned(), *port, *weight)).collect()
}

const TWO: &[(&str, &str, &str)] = &[
    ("near", "10.0.0.1", "topology.istio.io/network: one"),
    ("far", "10.0.0.2", "topology.istio.io/network: two"),
    ("farther", "10.0.0.3", "topology.istio.io/network: two"),
];
const ONE: &str = "metadata: {NETWORK: one}";

#[test]
fn without_gateways_all_is_in_reach() {
    let all = of(&mesh(TWO, ""), &Settings::default(), ONE);
    assert_eq!(list(&all.endpoints(A)), rows(&[("10.0.0.1", 80, 1), ("10.0.0.2", 80, 1), ("10.0.0.3", 80, 1)]));
}

#[test]
fn gateways_stand_for_the_endpoints_of_their_network() {
    let label = "topology.istio.io/network: two";
    let objects = mesh(TWO, &gateway("gw", label, PORT, "{ip: 172.16.0.1}, {ip: 172.16.0.2}"));
    let settings = Settings::default();
    let near = of(&objects, &settings, ONE);
    let expected = [("10.0.0.1", 80, 2), ("172.16.0.1", 15443, 2), ("172.16.0.2", 15443, 2)];
    assert_eq!(list(&near.endpoints(A)), rows(&expected));
    let endpoints = near.endpoints(A);
    assert_eq!(endpoints["endpoints"][0]["load_balancing_weight"], 6);
    let metadata = json!({"filter_metadata": {"envoy.transport_socket_match": {"tlsMode": "istio"},
        "istio": {"workload": ";;;;Kubernetes"}}});
    assert_eq!(endpoints["endpoints"][0]["lb_endpoints"][1]["metadata"], metadata);
    // Of its own network nothing needs a gateway, weights are multiplied all the same.
    let far = of(&objects, &settings, "metadata: {NETWORK: two}");
    assert_eq!(list(&far.endpoints(A)), rows(&[("10.0.0.1", 80, 2), ("10.0.0.2", 80, 2), ("10.0.0.3", 80, 2)]));
    // Who does not know where it is takes the gateways there are.
    assert_eq!(list(&of(&objects, &settings, "").endpoints(A)), rows(&expected));
    let view =
        |list: &str| of(&objects, &settings, &format!("metadata: {{NETWORK: one, REQUESTED_NETWORK_VIEW: '{list}'}}"));
    assert_eq!(list(&view("three,one").endpoints(A)), rows(&[("10.0.0.1", 80, 2)]));
    let six = "ips: ['fd00::9'], metadata: {NETWORK: one}";
    assert_eq!(list(&of(&objects, &settings, six).endpoints(A)), rows(&[("10.0.0.1", 80, 2)]), "no gateway has IPv6");
}

#[test]
fn without_mutual_tls_nothing_behind_a_gateway_is_reached() {
    let gateway = gateway("gw", "topology.istio.io/network: two", PORT, "{ip: 172.16.0.1}");
    let near = rows(&[("10.0.0.1", 80, 1)]);
    for mode in ["DISABLE", "SIMPLE"] {
        let rule = format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: a, namespace: default}}
spec: {{host: a.default.svc.cluster.local, trafficPolicy: {{tls: {{mode: {mode}}}}}}}
"
        );
        let all = of(&mesh(TWO, &(gateway.clone() + &rule)), &Settings::default(), ONE);
        assert_eq!(list(&all.endpoints(A)), near, "{mode}");
    }
    let bare = mesh(TWO, &gateway)
        .replace("security.istio.io/tlsMode: istio, topology.istio.io/network: two", "topology.istio.io/network: two");
    assert_eq!(list(&of(&bare, &Settings::default(), ONE).endpoints(A)), near);
}

#[test]
fn services_are_gateways_as_their_labels_and_ports_say() {
    let reached = |labels: &str, ports: &str, ingress: &str| {
        list(&of(&mesh(TWO, &gateway("gw", labels, ports, ingress)), &Settings::default(), ONE).endpoints(A))
    };
    let label = "topology.istio.io/network: two";
    let at = |address: &str, port: u64| rows(&[("10.0.0.1", 80, 1), (address, port, 2)]);
    let own = format!("{label}, networking.istio.io/gatewayPort: '16443'");
    assert_eq!(reached(&own, "{name: tls, port: 16443}", "{ip: 172.16.0.1}"), at("172.16.0.1", 16443));
    let direct = rows(&[("10.0.0.1", 80, 1), ("10.0.0.2", 80, 1), ("10.0.0.3", 80, 1)]);
    assert_eq!(reached(&own, PORT, "{ip: 172.16.0.1}"), direct, "the port is not the Service's");
    assert_eq!(reached(label, "{name: hbone, port: 15008}", "{ip: 172.16.0.1}"), direct, "not for sidecars");
    assert_eq!(reached(label, PORT, "{hostname: gw.example.com}"), direct, "nobody knows the address");
    assert_eq!(reached(label, PORT, ""), direct);
    // By nodes: those that a selector names, at the node's port.
    let nodes = "
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {edge: 'yes'}}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: ExternalIP, address: 172.16.0.7}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
status: {addresses: [{type: ExternalIP, address: 172.16.0.8}]}
---
apiVersion: v1
kind: Service
metadata:
  name: gw
  namespace: istio-system
  labels: {topology.istio.io/network: two}
  annotations: {traffic.istio.io/nodeSelector: '{\"edge\": \"yes\"}'}
spec: {type: NodePort, clusterIP: 10.1.9.1, ports: [{name: tls, port: 15443, nodePort: 31443}], selector: {istio: eastwest}}
";
    assert_eq!(list(&of(&mesh(TWO, nodes), &Settings::default(), ONE).endpoints(A)), at("172.16.0.7", 31443));
}

#[test]
fn mesh_networks_tell_where_endpoints_are_and_how_to_get_there() {
    let plain: &[(&str, &str, &str)] = &[("a1", "10.0.0.1", ""), ("a2", "10.64.0.1", ""), ("a3", "10.65.0.1", "")];
    let settings = networks(
        "
networks:
  one: {endpoints: [{fromCidr: 10.0.0.0/16}]}
  two:
    endpoints: [{fromCidr: 10.64.0.0/12}]
    gateways: [{address: 172.16.0.1, port: 443}, {registryServiceName: gw.istio-system.svc.cluster.local, port: 1}]
  three: {endpoints: [{fromCidr: 10.65.0.0/16}]}
",
    );
    let all = of(&mesh(plain, ""), &settings, ONE);
    assert_eq!(
        list(&all.endpoints(A)),
        rows(&[("10.0.0.1", 80, 1), ("172.16.0.1", 443, 2)]),
        "the widest range counts"
    );
    // Services are gateways of the network that this registry is in; so are all its workloads.
    let registry = networks(
        "
networks:
  home:
    endpoints: [{fromRegistry: Kubernetes}]
    gateways: [{registryServiceName: gw.istio-system.svc.cluster.local, port: 443}]
",
    );
    let objects = mesh(plain, &gateway("gw", "", "{name: tls, port: 443}", "{ip: 172.16.0.9}"));
    assert_eq!(list(&of(&objects, &registry, ONE).endpoints(A)), rows(&[("172.16.0.9", 443, 3)]));
    // The label of the root namespace comes first.
    let labelled = objects
        + "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {topology.istio.io/network: one}}
";
    let direct = rows(&[("10.0.0.1", 80, 1), ("10.64.0.1", 80, 1), ("10.65.0.1", 80, 1)]);
    assert_eq!(list(&of(&labelled, &registry, ONE).endpoints(A)), direct);
}

#[test]
fn names_of_gateways_are_resolved_by_who_resolves_the_endpoints() {
    let mut settings = networks("networks: {two: {gateways: [{address: gw.example.com, port: 15443}]}}");
    let entry = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: far, namespace: default}
spec:
  hosts: [far.example]
  ports: [{number: 80, name: http, protocol: HTTP}]
  location: MESH_INTERNAL
  resolution: DNS
  endpoints: [{address: far.internal, network: two, labels: {security.istio.io/tlsMode: istio}}]
---
";
    let fixed = entry
        .replace("far.example", "static.example")
        .replace("name: far", "name: static")
        .replace("DNS", "STATIC")
        .replace("}}]", "}}, {network: two, serviceAccount: far}]")
        .replace("far.internal", "10.9.0.1");
    let objects = entry.to_owned() + &fixed;
    let all = of(&objects, &settings, ONE);
    let by_name = |all: &Generated| list(&all.cluster("outbound|80||far.example")["load_assignment"]);
    let sent = |all: &Generated| list(&all.endpoints("outbound|80||static.example"));
    assert_eq!(by_name(&all), rows(&[]), "of what family the name's addresses are is not known");
    let both = of(&objects, &settings, "ips: [10.0.0.9, 'fd00::9'], metadata: {NETWORK: one}");
    assert_eq!(by_name(&both), rows(&[("gw.example.com", 15443, 1)]));
    assert_eq!(sent(&all), rows(&[("10.9.0.1", 80, 1)]), "there is no gateway that anybody could reach");
    settings.gateway_addresses = Arc::new(
        [("gw.example.com".into(), vec!["172.16.0.2".parse().unwrap(), "172.16.0.1".parse().unwrap()])].into(),
    );
    let all = of(&objects, &settings, ONE);
    assert_eq!(
        sent(&all),
        rows(&[("172.16.0.1", 15443, 2), ("172.16.0.2", 15443, 2)]),
        "the entry without address, too"
    );
    settings.set_env("RESOLVE_HOSTNAME_GATEWAYS", "false");
    assert_eq!(sent(&of(&objects, &settings, ONE)), rows(&[("10.9.0.1", 80, 1)]));
}

#[test]
fn gateways_are_preferred_by_their_network() {
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a, namespace: default}
spec:
  host: a.default.svc.cluster.local
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 5}
    loadBalancer: {localityLbSetting: {failoverPriority: [topology.istio.io/network]}}
";
    let gateway = gateway("gw", "topology.istio.io/network: two", PORT, "{ip: 172.16.0.1}");
    let proxy = "labels: {app: client}, metadata: {NETWORK: one}";
    let all = of(&mesh(TWO, &(gateway + rule)), &Settings::default(), proxy);
    let endpoints = all.endpoints(A);
    let priorities: Vec<u64> =
        endpoints["endpoints"].as_array().unwrap().iter().map(|l| l["priority"].as_u64().unwrap_or(0)).collect();
    assert_eq!(priorities, [0, 1]);
    assert_eq!(list(&endpoints), rows(&[("10.0.0.1", 80, 1), ("172.16.0.1", 15443, 2)]));
}

#[test]
fn other_words_for_tls_modes_reach_the_metadata_of_rules_that_want_mutual_tls() {
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a, namespace: default}
spec: {host: a.default.svc.cluster.local, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}
";
    let other = |more: &str| {
        let objects = mesh(&[("a1", "10.0.0.1", "")], more).replace("tlsMode: istio", "tlsMode: special");
        let endpoints = of(&objects, &Settings::default(), "").endpoints(A);
        endpoints["endpoints"][0]["lb_endpoints"][0]["metadata"]["filter_metadata"]["envoy.transport_socket_match"]
            .clone()
    };
    assert_eq!(other(rule), json!({"tlsMode": "special"}));
    assert_eq!(other(""), Value::Null);
    let none = service("b", "{name: http, port: 80}", "", "");
    assert!(
        !of(&none, &Settings::default(), "")
            .endpoints("outbound|80||b.default.svc.cluster.local")
            .to_string()
            .contains("tlsMode")
    );
}

#[test]
fn a_client_is_in_its_pods_network_and_on_the_node_that_it_names() {
    let root = "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {topology.istio.io/network: one}}
";
    let objects =
        mesh(&[("client", "10.0.0.9", "")], root).replace("status: {podIP", "spec: {nodeName: n7}\nstatus: {podIP");
    let labels = |proxy: &str| of(&objects, &Settings::default(), proxy).effective().labels;
    let own = labels("labels: {app: a}");
    assert_eq!(own.get("topology.istio.io/network").map(String::as_str), Some("one"));
    assert_eq!(own.get("kubernetes.io/hostname"), None);
    let named = labels("labels: {app: a}, metadata: {NODE_NAME: m}");
    assert_eq!(named.get("kubernetes.io/hostname").map(String::as_str), Some("m"));
}

#[test]
fn only_identities_are_known_in_other_trust_domains() {
    let entry = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: default}
spec:
  hosts: [e.com]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 2.2.2.2, labels: {security.istio.io/tlsMode: istio}}]
  subjectAltNames: [spiffe://one/x, spiffe://one/ns/a/sa/b, e.com]
";
    let generated = Generated::of(entry, "trustDomainAliases: [two]", &[], "labels: {app: a}");
    let cluster = generated.cluster("outbound|80||e.com");
    let mut names = Vec::new();
    find(&cluster, "exact", &mut names);
    let mut names: Vec<&str> = names.into_iter().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names, ["e.com", "spiffe://one/ns/a/sa/b", "spiffe://one/x", "spiffe://two/ns/a/sa/b"]);
}
