//! Addresses of services and endpoints: of both families, allocated, of pods.

use envoy_api::type_url;
use serde_json::{Value, json};

use crate::generated::{self, Generated, find};

fn pod(name: &str, ips: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: default, labels: {{app: a}}}}
spec: {{hostname: {name}, {more} containers: [{{name: c}}]}}
status: {{phase: Running, podIPs: [{ips}], conditions: [{{type: Ready, status: 'True'}}]}}
---
"
    )
}

fn slice(name: &str, family: &str, addresses: &str) -> String {
    format!(
        "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: a}}}}
addressType: {family}
endpoints: [{addresses}]
ports: [{{name: tcp, port: 80}}]
---
"
    )
}

fn service(ips: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: a, namespace: default}}
spec: {{{ips}, selector: {{app: a}}, ports: [{{name: tcp, port: 80}}]}}
---
"
    )
}

#[test]
fn a_pod_of_both_families_is_one_endpoint_where_the_service_has_both() {
    let target = "targetRef: {kind: Pod, name: p, namespace: default}";
    let of = |ips: &str, dual: &str| {
        let objects = [
            service(ips),
            pod("p", "{ip: 10.0.0.1}, {ip: 'fd00::1'}", ""),
            slice("a-4", "IPv4", &format!("{{addresses: [10.0.0.1], {target}}}")),
            slice("a-6", "IPv6", &format!("{{addresses: ['fd00::1'], {target}}}")),
        ];
        let made = Generated::of(&objects.concat(), "{}", &[("ISTIO_DUAL_STACK", dual)], "");
        let endpoints = made.endpoints("outbound|80||a.default.svc.cluster.local");
        let mut found = Vec::new();
        find(&endpoints, "endpoint", &mut found);
        let address = |e: &&Value| e["address"]["socket_address"]["address"].as_str().unwrap().to_owned();
        let more = found.iter().filter(|e| !e["additional_addresses"].is_null()).count();
        (found.iter().map(address).collect::<Vec<_>>(), more)
    };
    let both = "clusterIP: 10.1.0.1, clusterIPs: [10.1.0.1, 'fd01::1']";
    assert_eq!(of(both, "true"), (vec!["10.0.0.1".to_owned()], 1));
    let apart = vec!["10.0.0.1".to_owned(), "fd00::1".to_owned()];
    assert_eq!(of("clusterIP: 10.1.0.1", "true"), (apart.clone(), 0), "the service has one family");
    assert_eq!(of(both, "false"), (apart, 0));
}

const ENTRY: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: default, labels: {LABEL}}
spec: {hosts: [x.example], ports: [{number: 3306, name: tcp, protocol: TCP}], resolution: DNS}
status: {addresses: [{host: x.example, value: 240.240.0.5}, {host: x.example, value: '2001:2::5'}, {host: y, value: 240.240.0.6}]}
";

#[test]
fn allocated_addresses_are_for_proxies_that_answer_dns() {
    let of = |label: &str, env: &[(&str, &str)], metadata: &str| {
        let objects = ENTRY.replace("LABEL", label);
        let made = Generated::of(&objects, "{}", env, &format!("metadata: {{{metadata}}}"));
        let listeners = made.all(type_url::LISTENER);
        let names: Vec<&String> = listeners.as_object().unwrap().keys().filter(|n| n.ends_with("_3306")).collect();
        let ips = metadata.starts_with("DNS_CAPTURE").then(|| made.names()["x.example"]["ips"].clone());
        (names[0].clone(), ips)
    };
    let capture = "DNS_CAPTURE: 'true'";
    assert_eq!(of("a: b", &[], capture), ("240.240.0.5_3306".to_owned(), Some(json!(["240.240.0.5"]))));
    assert_eq!(of("a: b", &[], "a: b").0, "0.0.0.0_3306");
    assert_eq!(of("networking.istio.io/enable-autoallocate-ip: 'False'", &[], capture).0, "0.0.0.0_3306");
    assert_eq!(of("a: b", &[("PILOT_ENABLE_IP_AUTOALLOCATE", "false")], capture).0, "0.0.0.0_3306");
}

#[test]
fn pods_of_headless_services_have_names_of_their_own_family() {
    let of = |pod_ip: &str, proxy_ip: &str| {
        let objects = [
            service("clusterIP: None"),
            pod("p", &format!("{{ip: '{pod_ip}'}}"), "subdomain: a,"),
            slice(
                "a",
                if pod_ip.contains(':') { "IPv6" } else { "IPv4" },
                &format!("{{addresses: ['{pod_ip}'], targetRef: {{kind: Pod, name: p}}}}"),
            ),
        ];
        let proxy = format!("metadata: {{DNS_CAPTURE: 'true'}}, ips: ['{proxy_ip}']");
        Generated::of(&objects.concat(), "{}", &[], &proxy).names()
    };
    let own = of("10.0.0.1", "10.0.0.9");
    assert_eq!(own["p.a.default.svc.cluster.local"]["ips"], json!(["10.0.0.1"]));
    assert_eq!(own["a.default.svc.cluster.local"]["ips"], json!(["10.0.0.1"]));
    assert_eq!(of("fd00::1", "fd00::9"), Value::Null, "istiod knows no address of a headless service but 0.0.0.0");
}

#[test]
fn headless_pods_may_share_a_listener() {
    let objects = [
        service("clusterIP: None"),
        pod("p", "{ip: 10.0.0.1}", ""),
        slice("a", "IPv4", "{addresses: [10.0.0.1], targetRef: {kind: Pod, name: p}}, {addresses: [10.0.0.2]}"),
    ];
    let names = |on: &str| {
        let env = [("PILOT_ENABLE_HEADLESS_FILTER_CHAIN_LISTENER", on)];
        let made = Generated::of(&objects.concat(), "{}", &env, "");
        let all = made.all(type_url::LISTENER);
        let own: Vec<String> = all.as_object().unwrap().keys().filter(|n| n.ends_with("_80")).cloned().collect();
        (own.clone(), made.listener(&own[0])["filter_chains"].as_array().unwrap().len())
    };
    assert_eq!(names("false"), (vec!["10.0.0.1_80".to_owned(), "10.0.0.2_80".to_owned()], 1));
    assert_eq!(names("true"), (vec!["0.0.0.0_80".to_owned()], 2));
}

#[test]
fn clusters_of_headless_services_may_balance() {
    let objects = [service("clusterIP: None"), slice("a", "IPv4", "{addresses: [10.0.0.1]}")];
    let env = [("PILOT_ENABLE_EDS_FOR_HEADLESS_SERVICES", "true")];
    let kind = |env: &[(&str, &str)]| {
        let made = Generated::of(&objects.concat(), "{}", env, "");
        made.cluster("outbound|80||a.default.svc.cluster.local")["type"].clone()
    };
    assert_eq!((kind(&env), kind(&[])), (json!("EDS"), json!("ORIGINAL_DST")));
}

#[test]
fn names_of_the_outside_are_asked_of_the_proxys_own_agent() {
    let mesh = "{outboundTrafficPolicy: {mode: ALLOW_ANY_DYNAMIC_DNS}}";
    let proxy = "metadata: {DNS_CAPTURE: 'true', DNS_PROXY_ADDR: '127.0.0.9:5353'}";
    let made = Generated::of(&service("clusterIP: 10.1.0.1"), mesh, &[], proxy);
    for resource in [made.cluster("AllowAnyDynamicDNSCluster"), made.listener("virtualOutbound")] {
        let mut found = Vec::new();
        find(&resource, "resolvers", &mut found);
        let resolver = json!([{"socket_address": {"address": "127.0.0.9", "port_value": 5353}}]);
        assert!(!found.is_empty() && found.iter().all(|own| **own == resolver), "{found:?}");
    }
}

#[test]
fn a_proxy_of_another_cluster_serves_nothing_of_this() {
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default, labels: {app: a, from: pod}}
spec: {containers: []}
status: {podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.9}]}
---
";
    let inbound = |cluster: &str| {
        let objects = pod.to_owned() + &generated::service("a", "{name: http, port: 80}", "", "");
        let proxy = format!("labels: {{app: a}}, metadata: {{CLUSTER_ID: {cluster}}}");
        let all = Generated::of(&objects, "{}", &[], &proxy).all(type_url::CLUSTER);
        all.get("inbound|80||").is_some()
    };
    assert!(inbound("Kubernetes"));
    assert!(!inbound("elsewhere"));
}

#[test]
fn a_target_port_by_name_is_one_of_the_same_transport() {
    let pod = |transport: &str| {
        format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: default, labels: {{app: a}}}}
spec: {{containers: [{{name: c, ports: [{{name: web, containerPort: 8080, protocol: {transport}}}]}}]}}
status: {{podIP: 10.0.0.9, podIPs: [{{ip: 10.0.0.9}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: a, namespace: default}}
spec:
  clusterIP: 10.1.0.1
  selector: {{app: a}}
  ports:
  - {{name: http, port: 80, targetPort: web, protocol: UDP}}
  - {{name: tcp, port: 9000, targetPort: 9000}}
  # A name, in quotes as it is.
  - {{name: tcp-quoted, port: 9001, targetPort: '9001'}}
"
        )
    };
    let inbound = |transport: &str| {
        let made = Generated::of(&pod(transport), "{}", &[], "labels: {app: a}");
        let all = made.all(type_url::CLUSTER);
        all.as_object().unwrap().keys().filter(|name| name.starts_with("inbound|")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(inbound("TCP"), ["inbound|9000||"]);
    assert_eq!(inbound("UDP"), ["inbound|8080||", "inbound|9000||"]);
}

#[test]
fn the_local_cluster_is_the_proxys_own_workload_in_its_region() {
    let pod = |name: &str, ip: &str, labels: &str| {
        format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: default, labels: {{app: a, {labels}}}}}
spec: {{containers: []}}
status: {{podIP: {ip}, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: a}}}}
addressType: IPv4
endpoints: [{{addresses: [{ip}], targetRef: {{kind: Pod, name: {name}, namespace: default}}}}]
ports: [{{name: http, port: 80}}]
---
"
        )
    };
    let of = |workload: &str, place: &str, hash: &str| {
        format!("service.istio.io/workload-name: {workload}, istio-locality: {place}, pod-template-hash: {hash}")
    };
    let objects = [
        "
apiVersion: v1
kind: Service
metadata: {name: a, namespace: default}
spec: {clusterIP: 10.1.0.1, selector: {app: a}, ports: [{name: http, port: 80}]}
---
"
        .to_owned(),
        pod("client", "10.0.0.9", &of("w", "here.a", "x")),
        pod("same", "10.0.0.1", &of("w", "here.b", "x")),
        pod("other-region", "10.0.0.2", &of("w", "there.a", "x")),
        pod("other-workload", "10.0.0.3", &of("v", "here.a", "x")),
        pod("older", "10.0.0.4", &of("w", "here.a", "z")),
    ]
    .concat();
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r, namespace: default}
spec: {host: a, trafficPolicy: {outlierDetection: {}, loadBalancer: {localityLbSetting: {enabled: true}}}}
";
    let proxy = "labels: {app: a}, metadata: {WORKLOAD_NAME: w}";
    let made = Generated::of(&(objects + rule), "{}", &[], proxy).load_assignment("local_cluster");
    assert_eq!(made["cluster_name"], "local_cluster");
    let mut found = Vec::new();
    find(&made, "address", &mut found);
    let addresses: Vec<_> = found.into_iter().filter_map(Value::as_str).collect();
    assert_eq!(addresses, ["10.0.0.9", "10.0.0.1"]);
    let mut priorities = Vec::new();
    find(&made, "priority", &mut priorities);
    assert_eq!(priorities, Vec::<&Value>::new(), "rules have no say");
    let stranger = Generated::of(rule, "{}", &[], proxy).load_assignment("local_cluster");
    assert_eq!(stranger, json!({"cluster_name": "local_cluster"}));
}

#[test]
fn an_address_without_a_pod_is_of_no_namespace() {
    let made = Generated::of(&generated::service("a", "{name: http, port: 80}", "", ""), "{}", &[], "");
    let endpoints = made.endpoints("outbound|80||a.default.svc.cluster.local");
    let mut workloads = Vec::new();
    find(&endpoints, "workload", &mut workloads);
    assert_eq!(workloads, [";;;;Kubernetes", ";;;;Kubernetes"]);
}
