use std::time::UNIX_EPOCH;

use serde_json::json;

use super::*;
use crate::stream_info::{ConnectionInfo, StreamInfo};

fn table(config: serde_json::Value) -> RouteTable {
    let bytes = envoy_api::json::from_json(envoy_api::type_url::ROUTE, &config).unwrap();
    RouteTable::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &Options::default()).unwrap()
}

fn rejected(config: serde_json::Value) -> String {
    let bytes = envoy_api::json::from_json(envoy_api::type_url::ROUTE, &config).unwrap();
    RouteTable::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &Options::default())
        .unwrap_err()
        .to_string()
}

/// One virtual host for all, with these routes.
fn routes(routes: serde_json::Value) -> RouteTable {
    table(json!({"name": "t", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]}))
}

fn find(table: &RouteTable, headers: &Headers, random: u64) -> RouteResult {
    table.find(&RouteInput {
        headers,
        metadata: &Metadata::default(),
        filter_state: &FilterState::default(),
        tls: None,
        random,
    })
}

fn found(table: &RouteTable, headers: &Headers) -> Matched {
    match find(table, headers, 0) {
        RouteResult::Found(matched) => matched,
        other => panic!("{other:?}"),
    }
}

fn get(path: &str) -> Headers {
    Headers::of([
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "host.test:80"),
        (":path", path),
        ("x-forwarded-proto", "http"),
    ])
}

fn finalized(table: &RouteTable, path: &str) -> Headers {
    let mut headers = get(path);
    let matched = found(table, &headers);
    let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
    let before = headers.clone();
    matched.finalize_request(&mut headers, &FormatContext::new(&info, Some(&before), None), true);
    headers
}

#[test]
fn domains_exact_suffix_prefix_any() {
    let hosts = ["a.test", "*.a.test", "*-x.a.test", "a.*", "a.b.*", "*"];
    let hosts: Vec<_> = hosts.iter().map(|d| json!({"name": d, "domains": [d]})).collect();
    let table = table(json!({"name": "t", "virtual_hosts": hosts, "ignore_port_in_host_matching": true}));
    for (host, expected) in [
        ("A.test:8080", "a.test"),
        ("b.a.test", "*.a.test"),
        ("b-x.a.test", "*-x.a.test"),
        (".a.test", "*"),
        ("a.org", "a.*"),
        ("a.b.org", "a.b.*"),
        ("[::1]:80", "*"),
        ("", "*"),
    ] {
        assert_eq!(&*table.virtual_host(host).unwrap().name, expected, "{host}");
    }
}

#[test]
fn a_domain_twice_is_refused() {
    let host = |name: &str| json!({"name": name, "domains": ["a.test"]});
    assert_eq!(
        rejected(json!({"name": "t", "virtual_hosts": [host("one"), host("two")]})),
        "route configuration t: virtual_hosts[1].domains: only unique values for domains are permitted, duplicate entry of domain a.test"
    );
}

#[test]
fn path_rules() {
    let to = |cluster: &str| json!({"cluster": cluster});
    let table = routes(json!([
        {"match": {"path": "/exact"}, "route": to("exact")},
        {"match": {"path_separated_prefix": "/sep"}, "route": to("sep")},
        {"match": {"safe_regex": {"regex": "/re/[0-9]+"}}, "route": to("re")},
        {"match": {"prefix": "/Ci", "case_sensitive": false}, "route": to("ci")},
        {"match": {"prefix": "/p", "query_parameters": [{"name": "q", "string_match": {"exact": "1"}}]}, "route": to("q")},
        {"match": {"prefix": "/p", "grpc": {}}, "route": to("grpc")},
        {"match": {"prefix": "/p"}, "route": to("p")},
    ]));
    for (path, expected) in [
        ("/exact?x=1", Some("exact")),
        ("/exact/", None),
        ("/sep", Some("sep")),
        ("/sep/x", Some("sep")),
        ("/sepx", None),
        ("/re/12?y", Some("re")),
        ("/re/12x", None),
        ("/cIx", Some("ci")),
        ("/px?a=2&q=1", Some("q")),
        ("/px?q=2", Some("p")),
    ] {
        let result = find(&table, &get(path), 0);
        let cluster = match &result {
            RouteResult::Found(matched) => matched.cluster(&get(path)).map(|c| c.to_string()),
            _ => None,
        };
        assert_eq!(cluster.as_deref(), expected, "{path}");
    }
    let mut grpc = get("/p");
    grpc.push(b"content-type", b"application/grpc+proto");
    assert_eq!(found(&table, &grpc).cluster(&grpc).as_deref(), Some("grpc"));
}

#[test]
fn weights_cover_the_total() {
    let table = routes(json!([{"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [
        {"name": "a", "weight": 90, "host_rewrite_literal": "a.test"}, {"name": "b", "weight": 10}]}}}]));
    let headers = get("/");
    let share = (0..100)
        .filter(|n| match find(&table, &headers, *n) {
            RouteResult::Found(matched) => matched.cluster(&headers).as_deref() == Some("b"),
            _ => false,
        })
        .count();
    assert_eq!(share, 10);
    assert_eq!(finalized(&table, "/").authority(), Some("a.test"));
    let zero = json!({"name": "t", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [{"name": "a", "weight": 0}]}}}]}]});
    assert!(rejected(zero).ends_with("sum of weights must be greater than 0"));
}

#[test]
fn weights_of_the_runtime_may_be_any_number() {
    let layers = json!({"layers": [{"name": "static", "static_layer": {"w.a": 1e19, "w.b": 1e19}}]});
    let bytes = envoy_api::json::from_json("type.googleapis.com/envoy.config.bootstrap.v3.LayeredRuntime", &layers);
    let layers = prost::Message::decode(bytes.unwrap().as_slice()).unwrap();
    let options = Options { runtime: crate::Runtime::compile(Some(&layers)).unwrap(), ..Options::default() };
    let config = json!({"name": "t", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"runtime_key_prefix": "w", "clusters": [
            {"name": "a", "weight": 90}, {"name": "b", "weight": 10}]}}}]}]});
    let bytes = envoy_api::json::from_json(envoy_api::type_url::ROUTE, &config).unwrap();
    let table = RouteTable::compile(&prost::Message::decode(bytes.as_slice()).unwrap(), &options).unwrap();
    let headers = get("/");
    let drawn = |random| match find(&table, &headers, random) {
        RouteResult::Found(matched) => matched.cluster(&headers).as_deref().map(str::to_owned),
        _ => None,
    };
    assert_eq!((drawn(5).as_deref(), drawn(u64::MAX - 1).as_deref()), (Some("a"), Some("b")));
}

#[test]
fn rewrites() {
    let table = routes(json!([
        {"match": {"prefix": "/a"}, "route": {"cluster": "c", "prefix_rewrite": "/new", "host_rewrite_literal": "h.test", "append_x_forwarded_host": true}},
        {"match": {"path": "/e"}, "route": {"cluster": "c", "prefix_rewrite": "/x"}},
        {"match": {"safe_regex": {"regex": "/re/.*"}}, "route": {"cluster": "c",
            "regex_rewrite": {"pattern": {"regex": "^/re/([^/]+)(/.*)$"}, "substitution": "\\2/\\1"}}},
        {"match": {"prefix": "/"}, "route": {"cluster": "c", "host_rewrite_path_regex": {"pattern": {"regex": "^/(.+)/.+$"}, "substitution": "\\1"}}},
    ]));
    let headers = finalized(&table, "/a/b?c=d");
    assert_eq!(headers.path(), Some("/new/b?c=d"));
    assert_eq!(headers.get_str("x-envoy-original-path"), Some("/a/b?c=d"));
    assert_eq!(headers.get_str("x-envoy-original-host"), Some("host.test:80"));
    assert_eq!(headers.get_str("x-forwarded-host"), Some("host.test:80"));
    assert_eq!(headers.authority(), Some("h.test"));
    assert_eq!(finalized(&table, "/e?q").path(), Some("/x?q"));
    assert_eq!(finalized(&table, "/re/a/b?q").path(), Some("/b/a?q"));
    assert_eq!(finalized(&table, "/host/x").authority(), Some("host"));
    // Of nothing no path is made.
    let table = routes(json!([{"match": {"prefix": "/"}, "route": {"cluster": "c",
        "regex_rewrite": {"pattern": {"regex": "^/a.*"}, "substitution": ""}}}]));
    let headers = finalized(&table, "/a/b?q");
    assert_eq!((headers.path(), headers.contains("x-envoy-original-path")), (Some("/a/b?q"), false));
    assert_eq!(own_location(&headers), "http://host.test:80/a/b?q");
}

#[test]
fn outer_levels_win_unless_told_otherwise() {
    let add = |value: &str| {
        json!([{"header": {"key": "x", "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"},
               {"header": {"key": "y", "value": value}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}])
    };
    for (specific, winner, order) in [(false, "table", "route,vhost,table"), (true, "route", "table,vhost,route")] {
        let table = table(
            json!({"name": "t", "most_specific_header_mutations_wins": specific, "request_headers_to_add": add("table"),
            "virtual_hosts": [{"name": "v", "domains": ["*"], "request_headers_to_add": add("vhost"),
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "c"}, "request_headers_to_add": add("route")}]}]}),
        );
        let headers = finalized(&table, "/");
        assert_eq!(headers.get_str("x"), Some(winner));
        assert_eq!(headers.joined("y").as_deref(), Some(order.as_bytes()));
    }
}

#[test]
fn redirects() {
    let table = routes(json!([
        {"match": {"prefix": "/https"}, "redirect": {"https_redirect": true}},
        {"match": {"prefix": "/all"}, "redirect": {"scheme_redirect": "https", "host_redirect": "n.test", "port_redirect": 8443,
            "path_redirect": "/to", "response_code": "PERMANENT_REDIRECT"}},
        {"match": {"prefix": "/query"}, "redirect": {"path_redirect": "/to?a=b"}},
        {"match": {"prefix": "/strip"}, "redirect": {"prefix_rewrite": "/new", "strip_query": true, "response_code": "FOUND"}},
    ]));
    let location = |path: &str| {
        let headers = get(path);
        let matched = found(&table, &headers);
        let Action::Redirect(redirect) = &matched.route.action else { panic!() };
        redirect.location(&matched.route.matcher, &headers)
    };
    // Port 80 belongs to http, so it goes.
    assert_eq!(location("/https?q"), (301, "https://host.test/https?q".into()));
    assert_eq!(location("/all?q=1"), (308, "https://n.test:8443/to?q=1".into()));
    assert_eq!(location("/query?q=1"), (301, "http://host.test:80/to?a=b".into()));
    assert_eq!(location("/strip/x?q"), (302, "http://host.test:80/new/x".into()));
}

#[test]
fn tls_is_demanded_by_the_virtual_host() {
    let table = table(
        json!({"name": "t", "virtual_hosts": [{"name": "v", "domains": ["*"], "require_tls": "ALL", "routes": []}]}),
    );
    let RouteResult::RedirectToTls(_, location) = find(&table, &get("/p?q"), 0) else { panic!() };
    assert_eq!(location, "https://host.test:80/p?q");
    let mut secure = get("/p");
    secure.set("x-forwarded-proto", b"https");
    assert!(matches!(find(&table, &secure, 0), RouteResult::NoRoute(_)));
}

#[test]
fn timeouts_by_route_and_headers() {
    let table = routes(json!([
        {"match": {"prefix": "/none"}, "route": {"cluster": "c", "timeout": "0s"}},
        {"match": {"prefix": "/grpc"}, "route": {"cluster": "c", "timeout": "3s", "max_grpc_timeout": "2s"}},
        {"match": {"prefix": "/dur"}, "route": {"cluster": "c", "max_stream_duration": {"max_stream_duration": "2s", "grpc_timeout_header_max": "1s"}}},
        {"match": {"prefix": "/"}, "route": {"cluster": "c", "retry_policy": {"retry_on": "5xx", "per_try_timeout": "1s"}}},
    ]));
    let check = |path: &str, extra: &[(&str, &str)]| {
        let mut headers = get(path);
        for (name, value) in extra {
            headers.push(name.as_bytes(), value.as_bytes());
        }
        let matched = found(&table, &headers);
        let policy = matched.retry_policy().cloned();
        let timeouts = matched.forward().unwrap().timeouts(policy.as_deref(), &mut headers, false, true);
        (timeouts.global.map(|d| d.as_millis()), timeouts.per_try.map(|d| d.as_millis()), headers)
    };
    let (global, per_try, headers) = check("/", &[]);
    assert_eq!((global, per_try), (Some(15_000), Some(1000)));
    assert_eq!(headers.get_str("x-envoy-expected-rq-timeout-ms"), Some("1000"));
    let (global, per_try, headers) = check("/", &[("x-envoy-upstream-rq-timeout-ms", "500")]);
    assert_eq!((global, per_try), (Some(500), None));
    assert!(!headers.contains("x-envoy-upstream-rq-timeout-ms"));
    assert_eq!(check("/none", &[]).0, None);
    let grpc = ("content-type", "application/grpc");
    let (global, _, headers) = check("/grpc", &[grpc, ("grpc-timeout", "5S")]);
    assert_eq!((global, headers.get_str("grpc-timeout")), (Some(2000), Some("2000m")));
    assert_eq!(check("/grpc", &[grpc, ("grpc-timeout", "300m")]).0, Some(300));
    let (global, _, headers) = check("/dur", &[grpc]);
    assert_eq!((global, headers.get_str("grpc-timeout")), (None, Some("2000m")));
    // None at all is over at once; what cannot be read does not count, and is not passed on.
    let mut now = get("/dur");
    now.push(b"grpc-timeout", b"0m");
    assert_eq!(found(&table, &now).max_stream_duration(&now, None), Some(Duration::from_millis(10)));
    let (global, _, headers) = check("/", &[("x-envoy-upstream-rq-timeout-ms", "soon")]);
    assert_eq!((global, headers.contains("x-envoy-upstream-rq-timeout-ms")), (Some(15_000), false));
}

#[test]
fn parameters_of_segments_are_passed_over_where_asked_for() {
    let config = json!({"name": "t", "ignore_path_parameters_in_path_matching": true, "virtual_hosts": [{"name": "v", "domains": ["*"],
        "routes": [{"match": {"path": "/a/b/c"}, "route": {"cluster": "c"}}]}]});
    let table = table(config);
    assert!(matches!(find(&table, &get("/a/b;v=2/c;w?q"), 0), RouteResult::Found(_)));
    assert!(!matches!(find(&table, &get("/a/b;v=2/d"), 0), RouteResult::Found(_)));
}
