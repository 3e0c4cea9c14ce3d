//! Routes of the Gateway API whose parents are services.

use std::path::Path;
use std::sync::Arc;

use config_store::{Key, Kind, Store};
use envoy_api::{json, type_url};
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use serde_json::{Value, json};
use xds_gen::{Names, generate};

/// The routes of port 80 of a client in a namespace, by the virtual host's name.
fn routes(push: &PushContext, namespace: &str, host: &str) -> Value {
    routes_of(push, json!({"name": "client", "namespace": namespace, "ips": ["10.0.0.9"]}), host)
}

fn routes_of(push: &PushContext, proxy: Value, host: &str) -> Value {
    let node = Node::from_yaml(&proxy, &Settings::default()).unwrap();
    let tables = generate(push, &node, type_url::ROUTE, Names::Wildcard);
    let table = tables.iter().find(|resource| &*resource.name == "80").unwrap();
    let table = json::to_json(type_url::ROUTE, &table.body).unwrap();
    let hosts = table["virtualHosts"].as_array().or(table["virtual_hosts"].as_array()).unwrap();
    hosts.iter().find(|v| v["name"] == host).map_or(Value::Null, |v| v["routes"].clone())
}

fn store(yaml: &str) -> Store {
    let mut store = Store::new();
    for document in manifest::parse(Path::new("a.yaml"), yaml).unwrap() {
        store.apply(&document).unwrap_or_else(|rejected| panic!("{rejected}"));
    }
    store
}

fn push(store: &Store) -> PushContext {
    PushContext::build(&store.snapshot(), &Arc::new(MeshConfig::builtin()), &Settings::default())
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.1.0.1, ports: [{{name: http, port: 80}}]}}\n---\n"
    )
}

fn route(kind: &str, name: &str, namespace: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: a, namespace: default, port: 80}}]\n  rules:\n{rules}---\n"
    )
}

const A: &str = "a.default.svc.cluster.local:80";

/// What each route is called.
fn names(routes: &Value) -> Vec<&str> {
    routes.as_array().into_iter().flatten().map(|route| route["name"].as_str().unwrap()).collect()
}

#[test]
fn every_field_of_a_rule_reaches_the_route() {
    let rules = "
  - matches:
    - path: {type: PathPrefix, value: /v1/}
      method: POST
      headers: [{name: x-a, value: b}, {type: RegularExpression, name: x-c, value: 'd.*'}]
      queryParams: [{name: q, value: '1'}]
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: s}], add: [{name: x-add, value: a}], remove: [x-gone]}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-r, value: r}]}}
    - {type: URLRewrite, urlRewrite: {hostname: other.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}
    - {type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, fraction: {numerator: 1, denominator: 4}}}
    - {type: CORS, cors: {allowOrigins: ['https://*.example.com'], allowMethods: [GET], maxAge: 7}}
    timeouts: {request: 3s, backendRequest: 1s}
    retry: {codes: [503], attempts: 4, backoff: 50ms}
    backendRefs:
    - {name: a, port: 80, weight: 3}
    - {name: b, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [x-b]}}]}
    - {name: b, port: 80, weight: 0}
  - matches: [{path: {type: Exact, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: new.example, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /new}}}]
  - matches: [{path: {type: RegularExpression, value: '/r.+'}}]
    backendRefs: [{group: networking.istio.io, kind: Hostname, name: b.default.svc.cluster.local, port: 80}]
  - name: nowhere
    backendRefs: []
";
    let push = push(&store(&(service("a") + &service("b") + &route("HTTPRoute", "all", "default", rules))));
    let routes = routes(&push, "default", A);
    assert_eq!(
        names(&routes),
        ["default.all.1", "default.all.0", "default.all.2", "nowhere"],
        "the most specific first"
    );
    let text = routes.to_string();
    let get = |index: usize, pointer: &str| {
        let value = routes[index].pointer(pointer);
        value.unwrap_or_else(|| panic!("no {pointer} in {}", routes[index])).clone()
    };
    assert_eq!(get(0, "/redirect/path_redirect"), "/new");
    assert_eq!(get(0, "/redirect/scheme_redirect"), "https");
    assert_eq!(get(0, "/redirect/response_code"), "PERMANENT_REDIRECT");
    assert_eq!(get(1, "/match/path_separated_prefix"), "/v1");
    assert_eq!(get(1, "/match/query_parameters/0/name"), "q");
    assert_eq!(get(1, "/route/cluster_not_found_response_code"), "INTERNAL_SERVER_ERROR");
    assert_eq!(
        get(1, "/route/regex_rewrite/pattern/regex"),
        "^/v1(/?)(.*)",
        "the prefix is taken away, with its slash"
    );
    assert_eq!(get(1, "/route/regex_rewrite/substitution"), r"/\2");
    assert_eq!(get(1, "/route/host_rewrite_literal"), "other.example");
    assert_eq!(get(1, "/route/timeout"), "3s");
    assert_eq!(get(1, "/route/retry_policy/per_try_timeout"), "1s");
    assert_eq!(get(1, "/route/retry_policy/num_retries"), 4);
    assert_eq!(get(1, "/route/request_mirror_policies/0/runtime_fraction/default_value/numerator"), 250_000);
    assert_eq!(get(1, "/request_headers_to_remove/0"), "x-gone");
    let clusters = get(1, "/route/weighted_clusters/clusters");
    let weights: Vec<_> =
        clusters.as_array().unwrap().iter().map(|c| (c["name"].clone(), c["weight"].clone())).collect();
    assert_eq!(
        weights,
        [
            ("outbound|80||a.default.svc.cluster.local".into(), 3.into()),
            ("outbound|80||b.default.svc.cluster.local".into(), 1.into())
        ]
    );
    for part in ["x-set", "x-add", "x-r", "x-b", r"^https://.*\\.example\\.com$", "x-c"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(get(2, "/route/cluster"), "outbound|80||b.default.svc.cluster.local");
    assert_eq!(get(3, "/direct_response/status"), 500, "no backend at all");
}

#[test]
fn consumers_override_producers_in_their_own_namespace_only() {
    let to = |name: &str| format!("  - backendRefs: [{{name: {name}, namespace: default, port: 80}}]\n");
    let yaml = service("a")
        + &service("b")
        + &service("c")
        + &route("HTTPRoute", "producer", "default", &to("b"))
        + &route("HTTPRoute", "consumer", "shop", &to("c"))
        + &route(
            "HTTPRoute",
            "consumer-too",
            "shop",
            "  - matches: [{path: {value: /x}}]\n    backendRefs: [{name: b, namespace: default, port: 80}]\n",
        );
    let push = push(&store(&yaml));
    assert_eq!(names(&routes(&push, "default", A)), ["default.producer.0"]);
    assert_eq!(names(&routes(&push, "other", A)), ["default.producer.0"]);
    assert_eq!(names(&routes(&push, "shop", A)), ["shop.consumer-too.0", "shop.consumer.0"], "rules of both, in order");
}

#[test]
fn those_who_ask_are_told_where_a_route_was_written() {
    let rules = "  - matches: [{path: {value: /a}}, {path: {value: /a/b}}]\n    backendRefs: [{name: a, port: 80}]\n";
    let push = push(&store(&(service("a") + &route("HTTPRoute", "r", "default", rules))));
    let metadata = json!({"OUTRIGGER_ORIGINS": "true"});
    let proxy = json!({"name": "client", "namespace": "default", "ips": ["10.0.0.9"], "metadata": metadata});
    let routes = routes_of(&push, proxy, A);
    let of = |index: usize| routes[index]["metadata"]["filter_metadata"]["istio"].clone();
    let path = "/apis/gateway.networking.k8s.io/v1/namespaces/default/HTTPRoute/r";
    assert_eq!(of(0), json!({"config": path, "origin": "spec.rules[0].matches[1]"}), "the longer prefix comes first");
    assert_eq!(of(1), json!({"config": path, "origin": "spec.rules[0].matches[0]"}));
}

#[test]
fn calls_of_grpc_are_paths() {
    let rules = "  - matches: [{method: {service: shop.Cart, method: Add}, headers: [{name: x-a, value: b}]}, {method: {service: shop.Cart}}]\n    backendRefs: [{name: b, port: 80}]\n";
    let push = push(&store(&(service("a") + &service("b") + &route("GRPCRoute", "g", "default", rules))));
    let routes = routes(&push, "default", A);
    assert_eq!(routes[0]["match"]["path"], "/shop.Cart/Add");
    assert_eq!(routes[1]["match"]["path_separated_prefix"], "/shop.Cart");
}

#[test]
fn entries_are_parents_and_backends_by_their_hosts() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: outside}\nspec: {hosts: [api.example.com], \
                 ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}\n---\n";
    let mirror = |host: &str| {
        format!(
            "{{type: RequestMirror, requestMirror: {{backendRef: {{group: networking.istio.io, kind: Hostname, name: {host}, port: 80}}}}}}"
        )
    };
    let yaml = format!(
        "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: HTTPRoute\nmetadata: {{name: r}}\nspec:\n  parentRefs: [{{group: \
         networking.istio.io, kind: ServiceEntry, name: outside}}]\n  rules:\n  - filters: [{}, {}]\n    backendRefs: [{{group: \
         networking.istio.io, kind: Hostname, name: nobody.example, port: 80}}]\n",
        mirror("api.example.com"),
        mirror("nobody.example")
    );
    let push = push(&store(&(entry.to_owned() + &yaml)));
    let routes = routes(&push, "default", "api.example.com:80");
    assert_eq!(names(&routes), ["default.r.0"]);
    let action = &routes[0]["route"];
    assert_eq!(action["cluster"], "outbound|80||nobody.example", "answered with 500 by the proxy");
    let mirrors: Vec<&Value> =
        action["request_mirror_policies"].as_array().unwrap().iter().map(|m| &m["cluster"]).collect();
    assert_eq!(mirrors, ["outbound|80||api.example.com"], "nothing is sent to nobody");
}

#[test]
fn a_route_waits_for_its_parent() {
    let mut store =
        store(&(service("b") + &route("HTTPRoute", "r", "default", "  - backendRefs: [{name: b, port: 80}]\n")));
    let before = push(&store);
    assert_eq!(routes(&before, "default", A), Value::Null);
    store.apply(&manifest::parse(Path::new("a.yaml"), &service("a")).unwrap()[0]).unwrap();
    let mesh = Arc::new(MeshConfig::builtin());
    let with = before.update(&store.snapshot(), &mesh);
    assert_eq!(names(&routes(&with, "default", A)), ["default.r.0"]);
    store.delete(&Key::new(Kind::HTTPRoute, "default", "r")).unwrap();
    assert_eq!(names(&routes(&with.update(&store.snapshot(), &mesh), "default", A)), ["default"]);
}

#[test]
fn what_istiod_would_not_route_is_refused_with_its_line() {
    for (rules, field) in [
        ("  - backendRefs: [{name: b}]\n", "spec.rules[0].backendRefs[0]"),
        ("  - backendRefs: [{name: b.default, port: 80}]\n", "spec.rules[0].backendRefs[0].name"),
        ("  - filters: [{type: ExtensionRef}]\n", "spec.rules[0].filters[0].type"),
        ("  - matches: [{path: {type: RegularExpression, value: '('}}]\n", "spec.rules[0].matches[0].path.value"),
    ] {
        let documents = manifest::parse(Path::new("a.yaml"), &route("HTTPRoute", "r", "default", rules)).unwrap();
        let rejected = Store::new().apply(&documents[0]).unwrap_err();
        assert_eq!(rejected.errors[0].field.as_deref(), Some(field), "{rejected}");
        assert!(rejected.errors[0].line >= 7, "{rejected}");
    }
}
