//! Fuzz targets: what control planes send, paths and texts that requests bring.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use envoy_api::{Message, type_url};
use proxy_core::endpoints::Endpoints;
use proxy_core::hcm::{PathVerdict, normalize};
use proxy_core::listener::{ChainInput, Terminal};
use proxy_core::matchers::Regex;
use proxy_core::route::{Action, RouteInput, RouteResult};
use proxy_core::tls::Secret;
use proxy_core::{
    Address, Cluster, ConnectionInfo, FilterState, Format, FormatContext, Headers, HttpConnectionManager, Listener,
    Metadata, Options, PickContext, Random, RouteTable, StreamInfo,
};
use serde_json::{Value, json};

const MANAGER: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

fn bytes_of(type_url: &str, value: &Value) -> Vec<u8> {
    envoy_api::json::from_json(type_url, value).unwrap_or_else(|e| panic!("{e}: {value}"))
}

fn manager(fields: &Value) -> Value {
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let rbac = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
    let mut manager = json!({
        "@type": MANAGER, "stat_prefix": "m", "route_config": routes(),
        "http_filters": [
            {"name": "rbac", "typed_config": {"@type": rbac, "rules": {"policies": {"p": {
                "permissions": [{"url_path": {"path": {"prefix": "/a"}}}],
                "principals": [{"authenticated": {"principal_name": {"suffix": "/sa/a"}}}],
            }}}}},
            {"name": "router", "typed_config": {"@type": router}},
        ],
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        manager[name] = value.clone();
    }
    manager
}

fn routes() -> Value {
    json!({"name": "t", "virtual_hosts": [{"name": "v", "domains": ["a.test", "*.b.test", "*"], "routes": [
        {"match": {"path_separated_prefix": "/sep", "query_parameters": [{"name": "q"}]}, "route": {"cluster": "c", "prefix_rewrite": "/x"}},
        {"match": {"prefix": "/re"}, "redirect": {"prefix_rewrite": "/to", "https_redirect": true, "strip_query": true}},
        {"match": {"safe_regex": {"regex": "/r/([a-z]+)"}}, "route": {"cluster": "c", "regex_rewrite": {"pattern": {"regex": "/r/([a-z]+)"}, "substitution": "/\\1"}}},
        {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": [{"name": "c", "weight": 1}, {"name": "d", "weight": 3}]},
            "retry_policy": {"retry_on": "5xx,connect-failure", "num_retries": 2}, "timeout": "1s"}},
    ]}]})
}

fn resources() -> Vec<Vec<u8>> {
    let tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
    vec![
        bytes_of(
            type_url::LISTENER,
            &json!({
                "name": "l", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15006}},
                "filter_chains": [{"filter_chain_match": {"destination_port": 80, "prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}],
                    "server_names": ["*.a.test"], "application_protocols": ["istio"]}, "filters": [{"name": "m", "typed_config": manager(&json!({}))}]}],
            }),
        ),
        bytes_of(type_url::ROUTE, &routes()),
        bytes_of(
            type_url::CLUSTER,
            &json!({
                "name": "c", "type": "EDS", "eds_cluster_config": {"eds_config": {"ads": {}}, "service_name": "s"}, "connect_timeout": "1s",
                "lb_policy": "RING_HASH", "outlier_detection": {"consecutive_5xx": 5},
                "transport_socket": {"name": "tls", "typed_config": {"@type": tls, "sni": "a", "common_tls_context": {"alpn_protocols": ["istio"]}}},
                "lb_subset_config": {"fallback_policy": "ANY_ENDPOINT", "subset_selectors": [{"keys": ["v"]}]},
            }),
        ),
        bytes_of(
            type_url::ENDPOINT,
            &json!({
                "cluster_name": "s", "endpoints": [{"locality": {"region": "r", "zone": "z"}, "load_balancing_weight": 3, "priority": 0, "lb_endpoints": [
                    {"endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 80}}}, "load_balancing_weight": 2,
                     "metadata": {"filter_metadata": {"envoy.lb": {"v": "1"}}}},
                    {"endpoint": {"address": {"socket_address": {"address": "10.0.0.2", "port_value": 80}}}, "health_status": "DRAINING"},
                ]}],
            }),
        ),
        bytes_of(
            type_url::SECRET,
            &json!({"name": "default", "validation_context": {"trusted_ca": {"inline_string": "x"}}}),
        ),
    ]
}

fn ip(text: &str) -> Address {
    Address::Ip(text.parse().unwrap())
}

/// Any bytes as each kind of resource: refused by name or compiled, always to the same, and then usable.
#[test]
fn xds() {
    let seeds = resources();
    let seeds: Vec<&[u8]> = seeds.iter().map(Vec::as_slice).collect();
    let words = [
        "type.googleapis.com/",
        "envoy.filters.http.router",
        "\x0a\0",
        "\x08\x01",
        "(((",
        "[a-z]{99}",
        "*.",
        "%REQ(a)%",
        "10.0.0.1",
        "::/0",
    ];
    let options = Options::default();
    let static_cluster = Cluster::compile(&Message::decode(seeds[2]).unwrap(), &options).map(Arc::new).unwrap();
    let headers =
        Headers::of([(":method", "GET"), (":path", "/re?q=1"), (":authority", "x.b.test"), (":scheme", "http")]);
    ::fuzz::run("xds", &seeds, &words, |bytes| {
        let mut ways = Vec::new();
        let mut note = |what: &str, field: Option<String>| ways.push(format!("{what} {}", field.unwrap_or_default()));
        if let Ok(message) = envoy_api::listener::Listener::decode(bytes) {
            let listener = Listener::compile(&message, &options);
            if let Ok(listener) = &listener {
                let input = ChainInput {
                    destination: &ip("10.0.0.9:80"),
                    source: &ip("10.0.0.1:5"),
                    direct_source: &ip("10.0.0.1:5"),
                    server_name: "x.a.test",
                    transport_protocol: "tls",
                    application_protocols: &[b"istio".to_vec()],
                };
                let chain = listener.find_chain(&input).map(|chain| chain.hash);
                let again = Listener::compile(&message, &options).expect("as before");
                assert_eq!(again.find_chain(&input).map(|chain| chain.hash), chain);
            }
            note("listener", listener.err().map(|r| r.field));
        }
        if let Ok(message) = envoy_api::route::RouteConfiguration::decode(bytes) {
            let table = RouteTable::compile(&message, &options);
            if let Ok(table) = &table {
                routed(table, &headers);
            }
            note("routes", table.err().map(|r| r.field));
        }
        if let Ok(message) = envoy_api::cluster::Cluster::decode(bytes) {
            let cluster = Cluster::compile(&message, &options);
            if cluster.is_ok() {
                let again = envoy_api::cluster::Cluster::decode(bytes).expect("as before");
                assert_eq!(Cluster::fingerprint(&message), Cluster::fingerprint(&again));
            }
            note("cluster", cluster.err().map(|r| r.field));
        }
        if let Ok(message) = envoy_api::endpoint::ClusterLoadAssignment::decode(bytes) {
            let endpoints = Endpoints::compile(&message, &static_cluster, None);
            note("endpoints", endpoints.as_ref().err().map(|r| r.field.clone()));
            if let Ok(endpoints) = endpoints {
                let (hosts, mut random) = (endpoints.hosts().count(), Random::new(1));
                let mut balancer = proxy_core::LoadBalancer::new(static_cluster.clone(), Arc::new(endpoints), 1);
                let context = PickContext { hash: Some(7), ..PickContext::at(std::time::Instant::now()) };
                let picked = balancer.pick(&context, &mut random);
                assert!(picked.is_none() || hosts > 0);
            }
        }
        if let Ok(message) = envoy_api::tls::Secret::decode(bytes) {
            note("secret", Secret::compile(&message).err().map(|r| r.field));
        }
        ways
    });
}

fn routed(table: &RouteTable, headers: &Headers) -> &'static str {
    let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
    let (metadata, state) = (Metadata::default(), FilterState::default());
    let input = RouteInput { headers, metadata: &metadata, filter_state: &state, tls: None, random: 7 };
    let RouteResult::Found(matched) = table.find(&input) else { return "none" };
    let mut headers = headers.clone();
    if let Action::Redirect(redirect) = &matched.route.action {
        redirect.location(&matched.route.matcher, &headers);
        return "redirect";
    }
    let before = headers.clone();
    matched.finalize_request(&mut headers, &FormatContext::new(&info, Some(&before), None), true);
    "forward"
}

fn compiled_manager(fields: &Value) -> HttpConnectionManager {
    let listener = json!({
        "name": "l", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 80}},
        "filter_chains": [{"filters": [{"name": "m", "typed_config": manager(fields)}]}],
    });
    let message = Message::decode(bytes_of(type_url::LISTENER, &listener).as_slice()).unwrap();
    let listener = Listener::compile(&message, &Options::default()).unwrap();
    let Terminal::Http(manager) = &listener.chains[0].terminal else { panic!("a connection manager") };
    // The listener is dropped here, so that this is the only owner.
    let manager = manager.clone();
    drop(listener);
    Arc::try_unwrap(manager).expect("the only owner")
}

/// Paths: what RBAC and routes look at cannot climb, and the next hop that normalises again finds nothing to change.
#[test]
fn paths() {
    let managers = [
        compiled_manager(
            &json!({"normalize_path": true, "merge_slashes": true, "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD"}),
        ),
        compiled_manager(&json!({"normalize_path": true, "path_with_escaped_slashes_action": "REJECT_REQUEST"})),
        compiled_manager(&json!({"normalize_path": true, "merge_slashes": true})),
        compiled_manager(&json!({})),
    ];
    let table = RouteTable::compile(
        &Message::decode(bytes_of(type_url::ROUTE, &routes()).as_slice()).unwrap(),
        &Options::default(),
    )
    .unwrap();
    let seeds: [&[u8]; 8] = [
        b"/a/../b?x=/../y",
        b"/a//b/./c",
        b"/%2e%2e/%2E./a",
        b"/a%2Fb%5Cc",
        b"/sep/x?q=1",
        b"/r/abc",
        b"/re",
        b"/a\\..\\b;c=%00",
    ];
    let words =
        ["../", "/..", "/./", "//", "%2e", "%2F", "%5c", "%25", "%252e", "\\", "?", ";", "#", "/re", "/sep/", "é"];
    ::fuzz::run("paths", &seeds, &words, |bytes| {
        let mut ways = Vec::new();
        for (index, manager) in managers.iter().enumerate() {
            let mut headers = Headers::of([(":method", "GET"), (":authority", "a.test")]);
            headers.push(b":path", bytes);
            let verdict = normalize(manager, &mut headers);
            let path = headers.get(":path").unwrap_or_default().to_vec();
            // Codecs refuse paths without a slash at the front, and NULs.
            if verdict == PathVerdict::Ok && index < 3 && bytes.starts_with(b"/") && !bytes.contains(&0) {
                let only = path.split(|b| *b == b'?').next().unwrap_or_default();
                let climbs = only.split(|b| *b == b'/').any(|part| part == b".." || part == b".");
                assert!(!climbs, "{}", path.escape_ascii());
                // Of nothing but slashes two stay, as in Envoy.
                let doubled = only != b"//" && only.windows(2).any(|w| w == b"//");
                assert!(index == 1 || !doubled, "{}", path.escape_ascii());
                // As in Envoy, `%2e%2e;x` becomes `..;x`, which would climb if it were read again.
                if !only.contains(&b';') {
                    let mut again = headers.clone();
                    let second = normalize(manager, &mut again);
                    assert!(second == PathVerdict::Ok, "{}", path.escape_ascii());
                    assert_eq!(again.get(":path"), Some(&*path), "{}", path.escape_ascii());
                }
            }
            ways.push((std::mem::discriminant(&verdict), path == bytes, routed(&table, &headers)));
        }
        ways
    });
}

/// Texts of configuration that are small languages: formats, regular expressions.
#[test]
fn texts() {
    let info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
    let headers = Headers::of([(":method", "GET"), (":path", "/a?b"), (":authority", "a.test"), ("x-a", "\"\u{e9}\n")]);
    let seeds: [&[u8]; 6] = [
        b"[%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE%\n",
        b"%DYNAMIC_METADATA(a:b:c):10% %FILTER_STATE(x:PLAIN)% %RESP(y?z):3% %%",
        b"%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:ms)% %UPSTREAM_PEER_SUBJECT% %DOWNSTREAM_PEER_CERT_V_START(%s)%",
        b"^/api/(v[0-9]+)/(.*)$",
        b"(?i:a|b)*[^x-z\\d]{2,5}?",
        b"%QUERY_PARAM(a)% %ENVIRONMENT(HOME)% %PATH(NQ:ORIG):5% %METADATA(CLUSTER:a:b)%",
    ];
    let words =
        ["%REQ(", ")%", "):", "%", "%START_TIME(", "%f", "?", "(", ")", "{1000}", "{0,9}", "\\p{L}", "|", "[^", "*+"];
    ::fuzz::run("texts", &seeds, &words, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let format = Format::parse(&text, bytes.len() & 1 == 0);
        if let Ok(format) = &format {
            let mut out = Vec::new();
            format.write(&FormatContext::new(&info, Some(&headers), Some(&headers)), &mut out);
            assert!(out.len() < 64 * 1024 + 100 * bytes.len(), "{} bytes out of {text}", out.len());
        }
        let regex = Regex::new(&text).map(|regex| regex.matches(b"/api/v1/x"));
        (format.err().map(|r| r.reason.chars().take(20).collect::<String>()), regex.ok())
    });
}
