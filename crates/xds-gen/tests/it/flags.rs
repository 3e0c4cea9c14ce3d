//! istiod's variables of rarer use: labels that are exchanged, outside services' names, who selects whom.

use std::path::Path;
use std::sync::Arc;

use istio_api::MeshNetworks;
use push_context::Settings;
use serde_json::{Value, json};

use crate::generated::{Generated, find, service};

const HTTP: &str = "{name: http, port: 80}";
const A: &str = "outbound|80||a.default.svc.cluster.local";

fn all<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    let mut out = Vec::new();
    find(value, key, &mut out);
    out
}

fn env<'a>(name: &'a str, value: &'a str) -> [(&'a str, &'a str); 1] {
    [(name, value)]
}

#[test]
fn further_labels_are_exchanged() {
    let made =
        |labels: &str| Generated::of(&service("a", HTTP, "", ""), "{}", &env("PILOT_MX_ADDITIONAL_LABELS", labels), "");
    let with = made("team,app,team");
    for value in [with.cluster(A), with.listener("0.0.0.0_80")] {
        assert!(all(&value, "additional_labels").contains(&&json!(["app", "team"])), "{value}");
    }
    assert!(all(&made("").cluster(A), "additional_labels").is_empty());
}

#[test]
fn outside_services_are_named_in_telemetry() {
    let entry = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: default, labels: {app: shop}}
spec:
  hosts: [x.example]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: 1.1.1.1, labels: {app: own}}]
";
    let name = |value: &str| {
        let variable = "LABEL_CANONICAL_SERVICES_FOR_MESH_EXTERNAL_SERVICE_ENTRIES";
        let made = Generated::of(entry, "{}", &env(variable, value), "").endpoints("outbound|80||x.example");
        all(&made, "workload")[0].as_str().unwrap().to_owned()
    };
    assert_eq!(name("false"), "e-0;default;own;;Kubernetes");
    assert_eq!(name("true"), "e-0;default;shop;;Kubernetes");
}

#[test]
fn networks_count_as_internal() {
    let networks = "networks: {n: {endpoints: [{fromCidr: 10.2.0.0/16}, {fromCidr: 9.0.0.0/8}]}}";
    let networks = Arc::new(MeshNetworks::load(Path::new("networks.yaml"), networks).unwrap());
    let ranges = |variable: Option<&str>| {
        let mut settings = Settings { networks: networks.clone(), ..Settings::default() };
        if let Some(variable) = variable {
            assert!(settings.set_env(variable, "true"));
        }
        let made = Generated::with(&service("a", HTTP, "", ""), "{}", &settings, "").listener("0.0.0.0_80");
        all(&made, "cidr_ranges").first().map(|ranges| (*ranges).clone())
    };
    let range = |address: &str, bits: u32| json!({"address_prefix": address, "prefix_len": bits});
    let both = Some(json!([range("9.0.0.0", 8), range("10.2.0.0", 16)]));
    assert_eq!(ranges(Some("ENABLE_HCM_INTERNAL_NETWORKS")), both);
    assert_eq!(ranges(Some("PILOT_SIDECAR_USE_REMOTE_ADDRESS")), both);
    assert_eq!(ranges(None), None);
}

#[test]
fn v6_proxies_may_take_v4_connections() {
    let listener = |value: &str| {
        let variable = "ISTIO_ENABLE_IPV4_OUTBOUND_LISTENER_FOR_IPV6_CLUSTERS";
        Generated::of("", "{}", &env(variable, value), "ips: ['fd00::9']").listener("virtualOutbound")
    };
    let address = |listener: &Value| all(&listener["additional_addresses"], "address").last().map(|a| (*a).clone());
    assert_eq!(address(&listener("true")), Some(json!("0.0.0.0")));
    assert_eq!(address(&listener("false")), None);
}

#[test]
fn rules_of_several_audiences_are_apart_or_one() {
    let rule = |name: &str, export: &str, more: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: {name}, namespace: default}}
spec: {{host: a, exportTo: [{export}], subsets: [{{name: {name}, labels: {{version: {name}}}}}], {more}}}
---
"
        )
    };
    let objects = service("a", HTTP, "", "") + &rule("one", "'*'", "") + &rule("two", "default", "");
    let subsets = |value: &str| {
        let made = Generated::of(&objects, "{}", &env("ENABLE_ENHANCED_DESTINATIONRULE_MERGE", value), "");
        let clusters = made.all(envoy_api::type_url::CLUSTER);
        ["one", "two"].map(|name| clusters.get(format!("outbound|80|{name}|a.default.svc.cluster.local")).is_some())
    };
    assert_eq!(subsets("true"), [false, true], "the younger, alone");
    assert_eq!(subsets("false"), [true, true]);
}

#[test]
fn selectors_reach_across_kinds_unless_switched_off() {
    let objects = service("a", HTTP, "", "")
        + "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: w, namespace: default}
spec: {address: 4.4.4.4, labels: {app: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: default, labels: {app: b}}
status: {podIP: 5.5.5.5, phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: default}
spec:
  hosts: [x.example]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  workloadSelector: {labels: {app: b}}
";
    let of = |variable: &str, cluster: &str, address: &str| {
        let made = |value: &str| Generated::of(&objects, "{}", &env(variable, value), "").endpoints(cluster);
        ["true", "false"].map(|value| all(&made(value), "address").contains(&&json!(address)))
    };
    assert_eq!(of("PILOT_ENABLE_K8S_SELECT_WORKLOAD_ENTRIES", A, "4.4.4.4"), [true, false]);
    assert_eq!(of("PILOT_ENABLE_SERVICEENTRY_SELECT_PODS", "outbound|80||x.example", "5.5.5.5"), [true, false]);
}

/// Two ServiceEntries for one host; the second names its port otherwise.
fn namesakes(second: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: one, namespace: default}}
spec:
  hosts: [x.example]
  ports: [{{number: 443, name: tls, protocol: TLS}}]
  resolution: DNS
  location: MESH_INTERNAL
  subjectAltNames: [first]
  workloadSelector: {{labels: {{app: nobody}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: two, namespace: default}}
spec:
  hosts: [x.example]
  ports: [{{number: 443, name: {second}, protocol: TLS}}]
  resolution: DNS
  location: MESH_INTERNAL
  subjectAltNames: [second]
  endpoints: [{{address: 1.1.1.1, labels: {{security.istio.io/tlsMode: istio}}}}]
"
    )
}

#[test]
fn entries_of_one_host_share_endpoints_by_number_and_accounts() {
    let cluster = Generated::of(&namesakes("other"), "{}", &[], "").cluster("outbound|443||x.example");
    assert!(all(&cluster, "address").contains(&&json!("1.1.1.1")), "{cluster}");
    assert_eq!(all(&cluster, "match_subject_alt_names")[0], &json!([{"exact": "second"}]), "the youngest's");
}

#[test]
fn a_mesh_of_one_family_takes_the_first_of_a_services_addresses() {
    let spec = "clusterIPs: [10.1.0.1, 'fd00::1'], ipFamilies: [IPv4, IPv6]";
    let domains = |value: &str| {
        let objects = service("a", HTTP, "", spec);
        let proxy = "ips: [10.0.0.9, 'fd00::9']";
        let route = Generated::of(&objects, "{}", &env("ISTIO_DUAL_STACK", value), proxy).route("80");
        let domains = all(&route, "domains")[0].as_array().unwrap().clone();
        ["10.1.0.1", "[fd00::1]"].map(|address| domains.contains(&json!(address)))
    };
    assert_eq!(domains("true"), [true, true]);
    assert_eq!(domains("false"), [true, false]);
}

#[test]
fn statistics_of_unknown_ports_are_named() {
    let mesh = "inboundClusterStatName: '%SERVICE_PORT_NAME%'";
    let listener = Generated::of("", mesh, &[], "").listener("virtualInbound");
    assert!(all(&listener, "stat_prefix").contains(&&json!("virtualInbound")), "{listener}");
}

#[test]
fn a_service_that_is_exported_to_nobody_has_no_endpoints() {
    let made = |export: &str| {
        let own = format!("annotations: {{networking.istio.io/exportTo: '{export}'}}");
        let rule = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v, namespace: default}
spec: {hosts: [x.example], http: [{route: [{destination: {host: a}}]}]}
";
        let objects = service("a", HTTP, &own, "") + rule;
        let endpoints = Generated::of(&objects, "{}", &[], "").all(envoy_api::type_url::ENDPOINT);
        endpoints.get(A).is_some_and(|assignment| !all(assignment, "lb_endpoints").is_empty())
    };
    assert!(made("."));
    assert!(!made("~"));
}
