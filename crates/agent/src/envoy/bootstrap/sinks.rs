//! What Envoy sends elsewhere: traces, metrics, access logs. Clusters for it, and the parts of the bootstrap that name them.

use std::time::Duration;

use serde_json::{Value, json};

use super::{HTTP2, address};
use crate::settings::Settings;

/// Clusters of collectors, in the order of Istio's template.
pub(super) fn clusters(settings: &Settings, family: &str) -> Vec<Value> {
    let config = &settings.envoy.config;
    let tracing = &config["tracing"];
    let tracer = [("zipkin", "zipkin", false), ("lightstep", "lightstep", true), ("datadog", "datadog_agent", false)];
    let mut clusters = Vec::new();
    for (field, name, http2) in tracer {
        if let Some(to) = collector(settings, &tracing[field]["address"]) {
            let mut cluster = dns_cluster(name, &to, family, http2);
            if field == "zipkin" {
                cluster["dns_refresh_rate"] = "30s".into();
            }
            if let Some(socket) = transport_socket(&tracing["tlsSettings"], &to.0, http2) {
                cluster["transport_socket"] = socket;
            }
            clusters.push(cluster);
            break;
        }
    }
    for (field, name) in
        [("envoyMetricsService", "envoy_metrics_service"), ("envoyAccessLogService", "envoy_accesslog_service")]
    {
        let service = &config[field];
        let Some(to) = collector(settings, &service["address"]) else { continue };
        let mut cluster = dns_cluster(name, &to, family, true);
        if let Some(socket) = transport_socket(&service["tlsSettings"], &to.0, true) {
            cluster["transport_socket"] = socket;
        }
        if service["tcpKeepalive"].is_object() {
            cluster["upstream_connection_options"] = keepalive(&service["tcpKeepalive"]);
        }
        clusters.push(cluster);
    }
    clusters
}

/// `tracing` of the bootstrap.
pub(super) fn tracing(settings: &Settings) -> Option<Value> {
    let tracing = &settings.envoy.config["tracing"];
    let there = |field: &str| collector(settings, &tracing[field]["address"]).is_some();
    let (name, config) = if there("zipkin") {
        let config = json!({
            "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
            "collector_cluster": "zipkin",
            "collector_endpoint": "/api/v2/spans",
            "collector_endpoint_version": "HTTP_JSON",
            "trace_id_128bit": true,
            "shared_span_context": false,
        });
        ("zipkin", config)
    } else if there("datadog") {
        let config = json!({
            "@type": "type.googleapis.com/envoy.config.trace.v3.DatadogConfig",
            "collector_cluster": "datadog_agent",
            "service_name": settings.node.cluster,
        });
        ("datadog", config)
    } else {
        // DIFFERS: lightstep's tracer is not in Envoy any more; its cluster stays for configuration that names it.
        return None;
    };
    Some(json!({ "http": { "name": format!("envoy.tracers.{name}"), "typed_config": config } }))
}

/// `stats_sinks` of the bootstrap.
pub(super) fn stats_sinks(settings: &Settings) -> Vec<Value> {
    let config = &settings.envoy.config;
    let mut sinks = Vec::new();
    if collector(settings, &config["envoyMetricsService"]["address"]).is_some() {
        sinks.push(json!({ "name": "envoy.stat_sinks.metrics_service", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.metrics.v3.MetricsServiceConfig",
            "transport_api_version": "V3",
            "grpc_service": { "envoy_grpc": { "cluster_name": "envoy_metrics_service" } },
        } }));
    }
    if let Some((host, port)) = collector(settings, &config["statsdUdpAddress"]) {
        sinks.push(json!({ "name": "envoy.stat_sinks.statsd", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.metrics.v3.StatsdSink",
            "address": { "socket_address": { "address": host, "port_value": port } },
        } }));
    }
    sinks
}

/// `HOST:PORT`, where `$(HOST_IP)` is the node's address.
fn collector(settings: &Settings, address: &Value) -> Option<(String, u16)> {
    let (host, port) = address.as_str()?.rsplit_once(':')?;
    let host = match host {
        "$(HOST_IP)" if !settings.envoy.host_ip.is_empty() => settings.envoy.host_ip.as_str(),
        host => host.trim_matches(['[', ']']),
    };
    Some((host.to_owned(), port.parse().ok()?))
}

fn dns_cluster(name: &str, (host, port): &(String, u16), family: &str, http2: bool) -> Value {
    let mut socket = address(host, *port);
    if let Some(socket) = socket["socket_address"].as_object_mut() {
        socket.remove("protocol");
    }
    let mut cluster = json!({
        "name": name,
        "alt_stat_name": format!("{name};"),
        "type": "STRICT_DNS",
        "respect_dns_ttl": true,
        "dns_lookup_family": family,
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": super::endpoint(name, socket),
    });
    if http2 {
        cluster["typed_extension_protocol_options"] = json!({ HTTP2: { "@type": format!("type.googleapis.com/{HTTP2}"), "explicit_http_config": { "http2_protocol_options": {} } } });
    }
    cluster
}

/// Source: istio `pkg/bootstrap/option/convert.go`, `tlsContextConvert`.
fn transport_socket(tls: &Value, default_sni: &str, http2: bool) -> Option<Value> {
    let text = |field: &str| tls[field].as_str().unwrap_or_default();
    let mut common = json!({});
    let (root, alpn) = match text("mode") {
        "SIMPLE" => (format!("file-root:{}", text("caCertificates")), json!(["h2"])),
        "MUTUAL" => {
            let (chain, key) = (text("clientCertificate"), text("privateKey"));
            if !chain.is_empty() && !key.is_empty() {
                common["tls_certificate_sds_secret_configs"] = json!([super::sds(&format!("file-cert:{chain}~{key}"))]);
            }
            (format!("file-root:{}", text("caCertificates")), json!(["h2"]))
        }
        "ISTIO_MUTUAL" => {
            common["tls_certificate_sds_secret_configs"] = json!([super::sds("default")]);
            ("ROOTCA".to_owned(), json!(["istio", "h2"]))
        }
        _ => return None,
    };
    let names: Vec<Value> =
        tls["subjectAltNames"].as_array().into_iter().flatten().map(|name| json!({ "exact": name })).collect();
    let mut default_context = json!({});
    if !names.is_empty() {
        default_context["match_subject_alt_names"] = names.into();
    }
    common["combined_validation_context"] = json!({ "default_validation_context": default_context, "validation_context_sds_secret_config": super::sds(&root) });
    if http2 {
        common["alpn_protocols"] = alpn;
    }
    let mut context = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common,
    });
    let sni = match text("sni") {
        "" if text("mode") == "ISTIO_MUTUAL" => default_sni,
        sni => sni,
    };
    if !sni.is_empty() {
        context["sni"] = sni.into();
    }
    Some(json!({ "name": "envoy.transport_sockets.tls", "typed_config": context }))
}

fn keepalive(settings: &Value) -> Value {
    let mut keepalive = json!({});
    if let Some(probes) = settings["probes"].as_u64().filter(|probes| *probes > 0) {
        keepalive["keepalive_probes"] = probes.into();
    }
    for (field, name) in [("time", "keepalive_time"), ("interval", "keepalive_interval")] {
        let parsed = settings[field].as_str().and_then(|text| text.parse::<istio_api::Duration>().ok());
        let seconds = parsed.and_then(istio_api::Duration::to_std).unwrap_or(Duration::ZERO).as_secs();
        if seconds > 0 {
            keepalive[name] = seconds.into();
        }
    }
    json!({ "tcp_keepalive": keepalive })
}
