//! Envoy's bootstrap as Istio generates it. Pure.
//!
//! Source: istio `tools/packaging/common/envoy_bootstrap.json`, `pkg/bootstrap/config.go`. It loads in Istio's Envoy and in a stock one.

mod sinks;
mod stats;

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
    let v6 = settings.addresses.iter().all(|ip| ip.is_ipv6());
    let mixed = !v6 && settings.addresses.iter().any(|ip| ip.is_ipv6());
    let first_v6 = settings.addresses.first().is_some_and(|ip| ip.is_ipv6());
    let (v4_hosts, v6_hosts) = (("127.0.0.1", "0.0.0.0"), ("::1", "::"));
    // Source: istio `pkg/bootstrap/config.go`, `toTemplateParams`.
    let ((localhost, wildcard), additional, family) = match (mixed && settings.envoy.dual_stack, first_v6) {
        (true, true) => (v6_hosts, Some(v4_hosts), "ALL"),
        (true, false) => (v4_hosts, Some(v6_hosts), "ALL"),
        (false, _) if v6 => (v6_hosts, None, "V6_ONLY"),
        (false, _) => (v4_hosts, None, "V4_ONLY"),
    };
    let ports = settings.ports;
    let mut clusters = vec![
        tcp_cluster("prometheus_stats", localhost, ports.admin),
        tcp_cluster("agent", localhost, ports.status),
        pipe_cluster("sds-grpc", sds),
        xds_cluster(xds),
    ];
    clusters.extend(sinks::clusters(settings, family));
    if settings.envoy.self_discovery {
        clusters.push(local_cluster());
    }
    let metrics_host = if settings.metrics_localhost_only { localhost } else { wildcard };
    let stats_path: &[(&str, &str)] = &[("/stats/prometheus", "prometheus_stats")];
    let mut stats = listener(metrics_host, ports.prometheus, "stats", stats_path);
    if settings.envoy.config["statsCompression"] != json!(false) {
        compress(&mut stats);
    }
    let mut health = listener(wildcard, ports.health, "agent", &[("/healthz/ready", "agent")]);
    if settings.envoy.status_proxy_protocol {
        health["listener_filters"] = json!([{ "name": "envoy.listener.proxy_protocol", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
            "allow_requests_without_proxy_protocol": true,
        } }]);
    }
    if let Some((other_localhost, other_wildcard)) = additional {
        let other = if settings.metrics_localhost_only { other_localhost } else { other_wildcard };
        stats["additional_addresses"] = json!([{ "address": address(other, ports.prometheus) }]);
        health["additional_addresses"] = json!([{ "address": address(other_wildcard, ports.health) }]);
    }
    let mut listeners = vec![stats];
    if ports.secure_metrics > 0 {
        listeners.push(secure(listener(wildcard, ports.secure_metrics, "secure_stats", stats_path)));
    }
    if ports.secure_merged_metrics > 0 {
        let paths = [("/stats/prometheus", "agent"), ("/metrics", "agent")];
        let port = ports.secure_merged_metrics;
        listeners.push(secure(listener(wildcard, port, "secure_merged_stats", &paths)));
    }
    listeners.push(health);
    let log_format = if settings.envoy.log_json {
        json!({ "json_format": { "time": "%Y-%m-%dT%T.%fZ", "level": "%l", "scope": "envoy %n", "msg": "%j", "caller": "%g:%#", "thread": "%t" } })
    } else {
        json!({ "text_format": "%Y-%m-%dT%T.%fZ\t%l\tenvoy %n %g:%#\t%v\tthread=%t" })
    };
    let mut bootstrap = json!({
        "application_log_config": { "log_format": log_format },
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
        "stats_config": stats::config(settings),
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
            "listeners": listeners,
        },
        "overload_manager": { "resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": max_connections(settings),
            },
        }] },
        "deferred_stat_options": { "enable_deferred_creation_stats": true },
    });
    if let Some(tracing) = sinks::tracing(settings) {
        bootstrap["tracing"] = tracing;
    }
    let stats_sinks = sinks::stats_sinks(settings);
    if !stats_sinks.is_empty() {
        bootstrap["stats_sinks"] = stats_sinks.into();
    }
    for (name, value) in stats::intervals(settings) {
        bootstrap[name] = value.into();
    }
    let mut manager = json!({});
    if settings.envoy.self_discovery {
        manager["local_cluster_name"] = "local_cluster".into();
    }
    if let Some(path) = &settings.outlier_log_path {
        manager["outlier_detection"] = json!({ "event_log_path": path });
    }
    if manager != json!({}) {
        manager["enable_deferred_cluster_creation"] = true.into();
        bootstrap["cluster_manager"] = manager;
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

/// Some paths of one port, each led to a cluster.
fn listener(host: &str, port: u16, stat_prefix: &str, paths: &[(&str, &str)]) -> Value {
    let routes: Vec<Value> = paths
        .iter()
        .map(|(path, cluster)| json!({ "match": { "prefix": path }, "route": { "cluster": cluster } }))
        .collect();
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
                "route_config": { "virtual_hosts": [{ "name": "backend", "domains": ["*"], "routes": routes }] },
                "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": { "@type": ROUTER } }],
            },
        }] }],
    })
}

/// Compressors before the router.
fn compress(listener: &mut Value) {
    let compressor = |name: &str, library: &str, kind: &str| {
        json!({ "name": format!("envoy.filters.http.compressor.{name}"), "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor",
            "compressor_library": { "name": library, "typed_config": { "@type": format!("type.googleapis.com/envoy.extensions.compression.{name}.compressor.v3.{kind}") } },
            "response_direction_config": { "common_config": { "content_type": [
                "text/plain",
                "application/vnd.google.protobuf",
                "application/openmetrics-text",
                "application/openmetrics-protobuf",
            ] } },
        } })
    };
    let filters =
        listener.pointer_mut("/filter_chains/0/filters/0/typed_config/http_filters").and_then(Value::as_array_mut);
    if let Some(filters) = filters {
        let all =
            [("brotli", "stats_brotli", "Brotli"), ("zstd", "stats_zstd", "Zstd"), ("gzip", "stats_gzip", "Gzip")];
        filters.splice(0..0, all.map(|(name, library, kind)| compressor(name, library, kind)));
    }
}

/// The same listener for clients with a certificate of the mesh only.
fn secure(mut listener: Value) -> Value {
    listener["listener_filters"] = json!([{ "name": "envoy.filters.listener.tls_inspector", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    } }]);
    let chain = &mut listener["filter_chains"][0];
    chain["filter_chain_match"] = json!({ "transport_protocol": "tls" });
    chain["transport_socket"] = json!({ "name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": true,
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [sds("default")],
            "combined_validation_context": {
                "default_validation_context": {},
                "validation_context_sds_secret_config": sds("ROOTCA"),
            },
        },
    } });
    listener
}

/// A secret of the agent's.
fn sds(name: &str) -> Value {
    json!({ "name": name, "sds_config": {
        "api_config_source": {
            "api_type": "GRPC",
            "grpc_services": [{ "envoy_grpc": { "cluster_name": "sds-grpc" } }],
            "set_node_on_first_message_only": true,
            "transport_api_version": "V3",
        },
        "resource_api_version": "V3",
    } })
}

/// The cluster of this proxy's own peers, for zone-aware balancing.
fn local_cluster() -> Value {
    json!({
        "name": "local_cluster",
        "alt_stat_name": "local_cluster;",
        "type": "EDS",
        "connect_timeout": "1s",
        "load_balancing_policy": { "policies": [{ "typed_extension_config": {
            "name": "envoy.load_balancing_policies.least_request",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest",
                "locality_lb_config": { "zone_aware_lb_config": { "min_cluster_size": "1" } },
            },
        } }] },
        "eds_cluster_config": {
            "eds_config": { "ads": {}, "resource_api_version": "V3" },
            "service_name": "local_cluster",
        },
    })
}

/// Source: istio `pkg/bootstrap/config.go`, `getNodeMetadataOptions`.
fn max_connections(settings: &Settings) -> u64 {
    let config = &settings.envoy.config;
    let limit = config["connectionSettings"]["globalDownstreamConnectionLimit"].as_u64().filter(|limit| *limit > 0);
    let text = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
    limit
        .or_else(|| text(&config["proxyMetadata"]["ISTIO_META_GLOBAL_DOWNSTREAM_MAX_CONNECTIONS"]))
        .or_else(|| text(&config["runtimeValues"]["overload.global_downstream_max_connections"]))
        .unwrap_or(i32::MAX as u64)
}

fn runtime(settings: &Settings) -> Value {
    let mut flags = json!({
        "re2.max_program_size.error_level": "32768",
        "envoy.deprecated_features:envoy.config.listener.v3.Listener.hidden_envoy_deprecated_use_original_dst": true,
        "envoy.reloadable_features.http_reject_path_with_fragment": false,
        "envoy.reloadable_features.fixed_heap_use_allocated": true,
        "envoy.reloadable_features.coalesce_lb_rebuilds_on_batch_update": false,
    });
    if !settings.envoy.strip_fragment {
        flags["envoy.reloadable_features.http_strip_fragment_from_path_unsafe_if_disabled"] = "false".into();
    }
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

#[cfg(test)]
mod tests;
