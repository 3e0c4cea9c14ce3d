//! EnvoyFilters where it is not obvious what istiod does.

use serde_json::{Value, json};

use crate::generated::{Generated, filters, service};

const HTTP: &str = "{name: http, port: 80}";

fn patched(patches: &str, more: &str, proxy: &str) -> Generated {
    let filter = format!(
        "
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {{name: f, namespace: default}}
spec:
  configPatches:
{patches}
---
"
    );
    Generated::of(&(service("a", HTTP, "", "") + &filter + more), "{}", &[], proxy)
}

fn hosts(made: &Generated) -> Vec<Value> {
    let route = made.route("80");
    route["virtual_hosts"].as_array().unwrap().iter().map(|host| host["name"].clone()).collect()
}

#[test]
fn a_virtual_host_that_was_removed_is_not_added_again() {
    let name = "a.default.svc.cluster.local:80";
    let remove = format!(
        "  - {{applyTo: VIRTUAL_HOST, match: {{context: SIDECAR_OUTBOUND, routeConfiguration: {{vhost: {{name: '{name}'}}}}}}, patch: {{operation: REMOVE}}}}\n"
    );
    let add = |name: &str| {
        format!(
            "  - {{applyTo: VIRTUAL_HOST, match: {{context: SIDECAR_OUTBOUND}}, patch: {{operation: ADD, value: {{name: '{name}', domains: [x]}}}}}}\n"
        )
    };
    assert_eq!(hosts(&patched(&(remove.clone() + &add(name)), "", "")), [json!("allow_any")]);
    assert_eq!(hosts(&patched(&(remove + &add("other")), "", "")), [json!("allow_any"), json!("other")]);
}

#[test]
fn a_chain_that_lost_its_last_filter_stays() {
    let remove = "  - {applyTo: NETWORK_FILTER, match: {context: SIDECAR_OUTBOUND, listener: {name: 0.0.0.0_80, filterChain: {filter: {name: envoy.filters.network.http_connection_manager}}}}, patch: {operation: REMOVE}}\n";
    let listener = patched(remove, "", "").listener("0.0.0.0_80");
    assert_eq!(listener["filter_chains"].as_array().unwrap().len(), 1);
    assert_eq!(filters(&listener["filter_chains"]), Vec::<String>::new());
}

#[test]
fn an_inbound_cluster_is_found_by_any_of_its_services() {
    let patch = |service: &str| {
        format!(
            "  - {{applyTo: CLUSTER, match: {{context: SIDECAR_INBOUND, cluster: {{service: {service}}}}}, patch: {{operation: MERGE, value: {{connect_timeout: 77s}}}}}}\n"
        )
    };
    let second = "
apiVersion: v1
kind: Service
metadata: {name: b, namespace: default}
spec: {clusterIP: 10.1.0.2, selector: {app: a}, ports: [{name: http, port: 8080, targetPort: 80}]}
";
    let timeout = |service: &str, more: &str| {
        patched(&patch(service), more, "labels: {app: a}").cluster("inbound|80||")["connect_timeout"].clone()
    };
    assert_eq!(timeout("b.default.svc.cluster.local", second), "77s", "though it has another port");
    assert_eq!(timeout("c.default.svc.cluster.local", second), "10s");
    let sidecar = "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: s, namespace: default}
spec: {ingress: [{port: {number: 7070, protocol: HTTP, name: http}, defaultEndpoint: 127.0.0.1:7070}]}
";
    let made = patched(&patch("s.default"), sidecar, "labels: {app: a}");
    assert_eq!(made.cluster("inbound|7070||")["connect_timeout"], "77s");
}

#[test]
fn metadata_that_is_no_text_fits_no_text() {
    let patch = "  - {applyTo: CLUSTER, match: {context: SIDECAR_OUTBOUND, proxy: {metadata: {FLAG: 'true'}}}, patch: {operation: REMOVE}}\n";
    let removed = |value: &str| {
        let made = patched(patch, "", &format!("metadata: {{FLAG: {value}}}"));
        made.all(envoy_api::type_url::CLUSTER).get("outbound|80||a.default.svc.cluster.local").is_none()
    };
    assert!(removed("'true'"));
    assert!(!removed("true"));
}

#[test]
fn routes_inside_inbound_listeners_are_patched() {
    let patch = "  - {applyTo: HTTP_ROUTE, match: {context: SIDECAR_INBOUND, routeConfiguration: {name: 'inbound|80||'}}, patch: {operation: MERGE, value: {name: renamed}}}\n";
    let listener = patched(patch, "", "labels: {app: a}").listener("virtualInbound");
    assert!(listener.to_string().contains("\"renamed\""));
}

#[test]
fn a_patch_of_another_type_leaves_what_comes_after_it_as_it_was() {
    let value = |more: &str| {
        format!(
            "patch: {{operation: MERGE, value: {{typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router, {more}}}}}}}"
        )
    };
    // The first filter of a chain is no router: istiod gives up the group of listeners there.
    let patches = format!(
        "  - {{applyTo: HTTP_FILTER, match: {{context: SIDECAR_OUTBOUND}}, {}}}
  - {{applyTo: HTTP_FILTER, match: {{context: SIDECAR_INBOUND, listener: {{filterChain: {{filter: {{name: envoy.filters.network.http_connection_manager, subFilter: {{name: envoy.filters.http.router}}}}}}}}}}, {}}}
  - {{applyTo: LISTENER, match: {{context: SIDECAR_OUTBOUND, listener: {{name: 0.0.0.0_80}}}}, patch: {{operation: MERGE, value: {{stat_prefix: before}}}}}}
  - {{applyTo: FILTER_CHAIN, match: {{context: SIDECAR_OUTBOUND, listener: {{name: 0.0.0.0_80}}}}, patch: {{operation: ADD, value: {{name: after, filters: [{{name: x}}]}}}}}}
",
        value("suppress_envoy_headers: true"),
        value("suppress_envoy_headers: true"),
    );
    let made = patched(&patches, "", "labels: {app: a}");
    let listener = made.listener("0.0.0.0_80");
    assert_eq!(listener["stat_prefix"], "before");
    let text = listener.to_string();
    assert!(!text.contains("suppress_envoy_headers"), "{text}");
    assert!(!text.contains("\"after\""), "{text}");
    assert!(made.listener("virtualInbound").to_string().contains("suppress_envoy_headers"), "another group");
}
