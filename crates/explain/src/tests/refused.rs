//! Requests that the server's side refuses.

use super::ask;

fn rule(mode: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: d}}
spec:
  host: a
  trafficPolicy:
    tls:
      mode: {mode}
---
"
    )
}

fn peers(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: p}}
spec:
  mtls:
    mode: {mode}
---
"
    )
}

#[test]
fn both_sides_of_a_conflict_about_mutual_tls_are_named() {
    let of = |client: &str, server: &str| ask(&(rule(client) + &peers(server)), "client", "http://a/");
    of("DISABLE", "STRICT").fails(&[
        "closed: a.default takes mutual TLS only (PeerAuthentication default/p spec.mtls",
        "the client sends plain text because of DestinationRule default/d spec.trafficPolicy.tls.mode, ",
        "mesh.yaml:8: remove it",
    ]);
    of("ISTIO_MUTUAL", "DISABLE")
        .fails(&["takes plain text only", "DestinationRule default/d spec.trafficPolicy.tls.mode"]);
    of("ISTIO_MUTUAL", "STRICT").arrives().says_not("do not agree");
    ask(&peers("STRICT"), "bare", "http://a/")
        .fails(&["takes mutual TLS only (PeerAuthentication default/p", "the client sends plain text"]);
}

#[test]
fn mutual_tls_does_not_reach_an_application_without_a_sidecar() {
    let service = "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {selector: {app: bare}, ports: [{name: http, port: 80}]}}\n---\n";
    let rule = rule("ISTIO_MUTUAL").replace("host: a", "host: b");
    ask(&format!("{service}{rule}"), "client", "http://b/")
        .fails(&["503: bare.default takes plain text only, it has no sidecar", "DestinationRule default/d"]);
    ask(service, "client", "http://b/").arrives();
    // A gateway is a proxy itself.
    let gateway = "{apiVersion: v1, kind: Pod, metadata: {name: edge, labels: {app: edge, istio: egressgateway, sidecar.istio.io/inject: 'false'}}, spec: {containers: []}}\n---\n";
    let service = service.replace("app: bare", "app: edge");
    ask(&format!("{gateway}{service}{rule}"), "client", "http://b/").arrives();
}

const POLICIES: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nothing}
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: some}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/default/sa/boss]}}]
    to: [{operation: {methods: [GET, PUT]}}]
";

#[test]
fn every_allow_policy_that_does_not_allow_is_told_with_what_it_wants() {
    ask(POLICIES, "client", "http://a/").fails(&["403"]).says(&[
        "not by AuthorizationPolicy default/nothing: it has no rules, and so allows nobody  ← AuthorizationPolicy default/nothing spec, ",
        "not by rule 0 of AuthorizationPolicy default/some, which wants from principals cluster.local/ns/default/sa/boss; to methods GET or PUT",
        "mesh.yaml:11",
    ]).says_not("default/nothing spec.rules[0]");
    ask(POLICIES, "client", "tcp://a:90").fails(&["denied"]).says(&["which is of HTTP, and the port is not"]);
}

#[test]
fn a_listener_that_is_refused_for_its_keys_is_the_verdict() {
    let yaml = "apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r}
spec:
  jwtRules:
  - issuer: me
    jwks: '{\"keys\":[]}'
";
    ask(yaml, "client", "http://a/").fails(&[
        "the proxy refuses listener virtualInbound because of RequestAuthentication default/r spec.jwtRules[0].jwks, ",
        "mesh.yaml:7: holds no keys",
    ]);
}

#[test]
fn the_annotation_that_hides_a_service_is_named() {
    let yaml = "apiVersion: v1
kind: Service
metadata:
  name: c
  namespace: other
  annotations:
    networking.istio.io/exportTo: '.'
spec: {selector: {app: c}, ports: [{name: http, port: 80}]}
";
    ask(yaml, "client", "http://c.other/").says(&[
        "it is not exported to namespace default",
        "networking.istio.io/exportTo",
        "mesh.yaml:7",
    ]);
}

#[test]
fn a_refusal_of_a_running_proxy_leads_to_its_object() {
    let yaml = "apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r}
spec:
  jwtRules:
  - issuer: me
    jwks: '{\"keys\":[]}'
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d}
spec:
  host: a
  trafficPolicy: {loadBalancer: {simple: RANDOM}}
";
    let (_folder, mesh) = super::mesh(yaml, "");
    let blamed =
        |text: &str| crate::blame(&mesh.files, "a.default", text).map(|source| source.to_string()).unwrap_or_default();
    let of_key = blamed(
        "Listener: listener virtualInbound: filter_chains[1].providers[\"origins-0\"].local_jwks: holds no keys",
    );
    assert!(of_key.starts_with("RequestAuthentication default/r spec.jwtRules[0].jwks, "), "{of_key}");
    let of_cluster = blamed("Cluster: cluster outbound|80||a.default.svc.cluster.local: connect_timeout: too short");
    assert!(of_cluster.starts_with("DestinationRule default/d spec.trafficPolicy, "), "{of_cluster}");
    assert_eq!(blamed("Listener: listener x: address: missing"), "");
}
