//! Envoy's bootstrap as Istio generates it. Pure.
//!
//! Source: istio `tools/packaging/common/envoy_bootstrap.json`, `pkg/bootstrap/config.go`. It loads in Istio's Envoy and in a stock one.

use envoy_api::wkt;
use envoy_api::wkt::value::Kind;
use serde_json::{Map, Value, json};

use crate::settings::Settings;

const HTTP2: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const MANAGER: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// Makes the bootstrap. `xds` and `sds` are the agent's sockets.
pub(crate) fn bootstrap(settings: &Settings, xds: &str, sds: &str) -> Value {
    let (localhost, wildcard, family) = match settings.addresses.first() {
        Some(ip) if ip.is_ipv6() => ("::1", "::", "V6_ONLY"),
        _ => ("127.0.0.1", "0.0.0.0", "V4_ONLY"),
    };
    let ports = settings.ports;
    let mut clusters = vec![
        tcp_cluster("prometheus_stats", localhost, ports.admin),
        tcp_cluster("agent", localhost, ports.status),
        pipe_cluster("sds-grpc", sds),
        xds_cluster(xds),
    ];
    let zipkin = settings
        .proxy_config
        .tracing
        .as_ref()
        .and_then(|t| t.zipkin.as_ref())
        .and_then(|zipkin| zipkin.address.rsplit_once(':'));
    let zipkin = zipkin.and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    clusters.extend(zipkin.map(|(host, port)| dns_cluster("zipkin", host, port, family)));
    let mut bootstrap = json!({
        "node": node(settings),
        "layered_runtime": { "layers": [
            { "name": "global config", "static_layer": runtime(settings) },
            { "name": "admin", "admin_layer": {} },
        ] },
        "bootstrap_extensions": [{
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {
                "@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
                "type_url": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
                "value": { "buffer_size_kb": 64 },
            },
        }],
        "stats_config": { "use_all_default_tags": false, "stats_tags": stats_tags(), "stats_matcher": { "inclusion_list": { "patterns": stats_patterns(settings) } } },
        "admin": {
            "access_log": [{
                "name": "envoy.access_loggers.file",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/dev/null" },
            }],
            "profile_path": "/var/lib/istio/data/envoy.prof",
            "address": address(localhost, ports.admin),
        },
        "dynamic_resources": {
            "lds_config": { "ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3" },
            "cds_config": { "ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3" },
            "ads_config": {
                "api_type": if settings.discovery.delta { "DELTA_GRPC" } else { "GRPC" },
                "set_node_on_first_message_only": true,
                "transport_api_version": "V3",
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds-grpc" } }],
            },
        },
        "static_resources": {
            "clusters": clusters,
            "listeners": [
                listener(wildcard, ports.prometheus, "stats", "/stats/prometheus", "prometheus_stats"),
                listener(wildcard, ports.health, "agent", "/healthz/ready", "agent"),
            ],
        },
        "overload_manager": { "resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": i32::MAX,
            },
        }] },
        "deferred_stat_options": { "enable_deferred_creation_stats": true },
    });
    if zipkin.is_some() {
        bootstrap["tracing"] = json!({ "http": { "name": "envoy.tracers.zipkin", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
            "collector_cluster": "zipkin",
            "collector_endpoint": "/api/v2/spans",
            "collector_endpoint_version": "HTTP_JSON",
            "trace_id_128bit": true,
            "shared_span_context": false,
        } } });
    }
    if let Some(path) = &settings.outlier_log_path {
        bootstrap["cluster_manager"] =
            json!({ "outlier_detection": { "event_log_path": path }, "enable_deferred_cluster_creation": true });
    }
    bootstrap
}

fn address(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "protocol": "TCP", "address": host, "port_value": port } })
}

fn endpoint(name: &str, address: Value) -> Value {
    json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }] })
}

fn tcp_cluster(name: &str, host: &str, port: u16) -> Value {
    json!({
        "name": name,
        "alt_stat_name": format!("{name};"),
        "type": "STATIC",
        "connect_timeout": "0.250s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": endpoint(name, address(host, port)),
    })
}

fn dns_cluster(name: &str, host: &str, port: u16, family: &str) -> Value {
    json!({
        "name": name,
        "alt_stat_name": format!("{name};"),
        "type": "STRICT_DNS",
        "respect_dns_ttl": true,
        "dns_lookup_family": family,
        "dns_refresh_rate": "30s",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": endpoint(name, address(host, port)),
    })
}

fn pipe_cluster(name: &str, path: &str) -> Value {
    json!({
        "name": name,
        "alt_stat_name": format!("{name};"),
        "type": "STATIC",
        "typed_extension_protocol_options": { HTTP2: { "@type": format!("type.googleapis.com/{HTTP2}"), "explicit_http_config": { "http2_protocol_options": {} } } },
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": endpoint(name, json!({ "pipe": { "path": path } })),
    })
}

fn xds_cluster(path: &str) -> Value {
    let mut cluster = pipe_cluster("xds-grpc", path);
    let limits = |priority| json!({ "priority": priority, "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000 });
    cluster["circuit_breakers"] = json!({ "thresholds": [limits("DEFAULT"), limits("HIGH")] });
    cluster["upstream_connection_options"] = json!({ "tcp_keepalive": { "keepalive_time": 300 } });
    cluster["max_requests_per_connection"] = 1.into();
    cluster
}

/// One path of one port, led to a cluster.
fn listener(host: &str, port: u16, stat_prefix: &str, path: &str, cluster: &str) -> Value {
    json!({
        "name": format!("{host}_{port}"),
        "address": address(host, port),
        "ignore_global_conn_limit": true,
        "bypass_overload_manager": true,
        "filter_chains": [{ "filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": MANAGER,
                "codec_type": "AUTO",
                "stat_prefix": stat_prefix,
                "route_config": { "virtual_hosts": [{
                    "name": "backend",
                    "domains": ["*"],
                    "routes": [{ "match": { "prefix": path }, "route": { "cluster": cluster } }],
                }] },
                "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }],
            },
        }] }],
    })
}

fn runtime(settings: &Settings) -> Value {
    let mut flags = json!({
        "re2.max_program_size.error_level": "32768",
        "envoy.deprecated_features:envoy.config.listener.v3.Listener.hidden_envoy_deprecated_use_original_dst": true,
        "envoy.reloadable_features.http_reject_path_with_fragment": false,
        "envoy.reloadable_features.fixed_heap_use_allocated": true,
    });
    for (name, value) in &settings.proxy_config.runtime_values {
        if value.is_empty() {
            // As `extractRuntimeFlags`: an empty value takes a default away.
            if let Value::Object(flags) = &mut flags {
                flags.remove(name);
            }
            continue;
        }
        flags[name.as_str()] = match value.as_str() {
            "true" => true.into(),
            "false" => false.into(),
            text => text.into(),
        };
    }
    flags
}

fn stats_tags() -> Value {
    let tags = [
        ("cluster_name", r"^cluster(\.(.+);)"),
        ("http_conn_manager_prefix", r"^http\.(((?:[_.[:digit:]\w]*|[_\[\]aAbBcCdDeEfF[:digit:]\w\:]*));\.)"),
        ("thread_name", r"^server(\.(.+))\.watchdog"),
        ("tcp_prefix", r"^tcp\.((.*?)\.)\w+?$"),
        ("response_code", r"_rq(_(\d{3}))$"),
        ("response_code_class", r"_rq(_(\dxx))$"),
        (
            "http_conn_manager_listener_prefix",
            r"^listener(?=\.).*?\.http\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)",
        ),
        ("listener_address", r"^listener\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)"),
        ("mongo_prefix", r"^mongo\.(.+?)\.(collection|cmd|cx_|op_|delays_|decoding_)(.*?)$"),
        ("cache", r"(cache\.(.+?)\.)"),
        ("component", r"(component\.(.+?)\.)"),
        ("tag", r"(tag\.(.+?);\.)"),
        ("wasm_filter", r"(wasm_filter\.(.+?)\.)"),
        ("authz_enforce_result", r"rbac(\.(allowed|denied))"),
        ("authz_dry_run_action", r"(\.istio_dry_run_(allow|deny)_)"),
        ("authz_dry_run_result", r"(\.shadow_(allowed|denied))"),
    ];
    tags.iter().map(|(name, regex)| json!({ "tag_name": name, "regex": regex })).collect()
}

/// Which statistics Envoy keeps: those readiness needs, and what the configuration asks for.
fn stats_patterns(settings: &Settings) -> Value {
    let config = settings.proxy_config.proxy_stats_matcher.as_ref();
    let mut patterns = vec![json!({ "prefix": "reporter=" })];
    let asked = |list: Option<&Vec<String>>| list.cloned().unwrap_or_default();
    let prefixes = asked(config.map(|c| &c.inclusion_prefixes)).into_iter();
    let prefixes = prefixes
        .chain(["cluster_manager", "listener_manager", "server", "cluster.xds-grpc", "wasm"].map(str::to_owned));
    patterns.extend(prefixes.map(|prefix| json!({ "prefix": prefix })));
    let mut suffixes = asked(config.map(|c| &c.inclusion_suffixes));
    suffixes.extend(["rbac.allowed", "rbac.denied", "shadow_allowed", "shadow_denied"].map(str::to_owned));
    if settings.drain.exit_on_zero {
        suffixes.push("downstream_cx_active".to_owned());
    }
    patterns.extend(suffixes.into_iter().map(|suffix| json!({ "suffix": suffix })));
    let regexes = asked(config.map(|c| &c.inclusion_regexps)).into_iter().chain([r"vhost\..*\.route\..*".to_owned()]);
    patterns.extend(regexes.map(|regex| json!({ "safe_regex": { "regex": regex } })));
    patterns.push(json!({ "prefix": "component" }));
    patterns.push(json!({ "prefix": "istio" }));
    patterns.into()
}

fn node(settings: &Settings) -> Value {
    let node = &settings.node;
    let locality =
        node.locality.as_ref().map(|l| json!({ "region": l.region, "zone": l.zone, "sub_zone": l.sub_zone }));
    json!({
        "id": node.id,
        "cluster": node.cluster,
        "locality": locality.unwrap_or_else(|| json!({})),
        "metadata": node.metadata.as_ref().map_or_else(|| json!({}), from_struct),
    })
}

fn from_struct(fields: &wkt::Struct) -> Value {
    // Sorted, so that the file is the same every time.
    let mut names: Vec<&String> = fields.fields.keys().collect();
    names.sort();
    let pairs = names.into_iter().map(|name| (name.clone(), from_value(&fields.fields[name])));
    Value::Object(pairs.collect::<Map<_, _>>())
}

fn from_value(value: &wkt::Value) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => (*b).into(),
        Some(Kind::NumberValue(n)) => json!(n),
        Some(Kind::StringValue(s)) => s.as_str().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(from_value).collect(),
        Some(Kind::StructValue(fields)) => from_struct(fields),
    }
}
