use std::path::PathBuf;

use super::*;
use crate::environment::Environment;
use crate::flags::{DataPlane, ProxyFlags};
use crate::settings::Root;

/// Real Envoy, as `cargo xtask setup` installs it.
fn envoy() -> Option<PathBuf> {
    let folder = std::env::var_os("OUTRIGGER_BUILD").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../build"));
    Some(folder.join("envoy")).filter(|path| path.is_file())
}

fn settings(config: Value, annotations: &str, variables: &[(&str, &str)]) -> Settings {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("etc/istio/pod")).unwrap();
    std::fs::write(dir.path().join("etc/istio/pod/annotations"), annotations).unwrap();
    let config = config.to_string();
    let mut env = vec![
        ("PROXY_CONFIG", config.as_str()),
        ("POD_NAME", "reviews-v1-abc"),
        ("POD_NAMESPACE", "default"),
        ("INSTANCE_IP", "10.0.0.7"),
        ("HOST_IP", "10.9.9.9"),
    ];
    env.extend_from_slice(variables);
    let env: Environment = env.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let flags = ProxyFlags { proxy: DataPlane::Envoy, ..ProxyFlags::default() };
    Settings::resolve(&flags, &env, Root::at(dir.path())).unwrap()
}

/// Everything that Istio's template can be asked for.
fn rich() -> Settings {
    let config = json!({
        "tracing": { "zipkin": { "address": "$(HOST_IP):9411" }, "tlsSettings": { "mode": "ISTIO_MUTUAL" } },
        "envoyMetricsService": { "address": "metrics:15000", "tcpKeepalive": { "time": "10s", "probes": 3 } },
        "envoyAccessLogService": { "address": "logs:15000", "tlsSettings": { "mode": "MUTUAL", "clientCertificate": "/c", "privateKey": "/k", "caCertificates": "/r", "subjectAltNames": ["spiffe://x"], "sni": "logs" } },
        "statsdUdpAddress": "10.1.1.1:9125",
        "extraStatTags": ["dlp_status", "dlp_status"],
        "proxyStatsMatcher": { "inclusionPrefixes": ["http.{pod_ip}_"], "inclusionRegexps": [".*_timeout"] },
        "runtimeValues": { "a.b": "true", "overload.global_downstream_max_connections": "50", "re2.max_program_size.error_level": "" },
    });
    let annotations = "sidecar.istio.io/statsFlushInterval=\"2s\"\nsidecar.istio.io/statsEvictionInterval=\"10s\"\n\
        sidecar.istio.io/extraStatTags=\"dlp_error\"\nsidecar.istio.io/statsInclusionSuffixes=\"upstream_rq_1xx\"\n\
        sidecar.istio.io/statsHistogramBuckets=\"{\\\"istiocustom\\\":[1,5,10]}\"\n";
    let variables = [
        ("ENVOY_SECURE_METRICS_PORT", "15091"),
        ("ENVOY_SECURE_MERGED_METRICS_PORT", "15092"),
        ("METRICS_LOCALHOST_ACCESS_ONLY", "true"),
        ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "true"),
        ("ISTIO_META_ENABLE_SELF_DISCOVERY", "true"),
    ];
    settings(config, annotations, &variables)
}

#[test]
fn what_configuration_and_annotations_ask_for_is_in_it() {
    let made = bootstrap(&rich(), "./XDS", "./SDS");
    let at = |path: &str| made.pointer(path).cloned().unwrap_or_default();
    assert_eq!(at("/stats_flush_interval"), "2s");
    assert_eq!(at("/stats_eviction_interval"), "10s");
    assert_eq!(at("/stats_config/histogram_bucket_settings/0/match/prefix"), "istiocustom");
    let text = made.to_string();
    for part in [
        r#""prefix":"http.10.0.0.7_""#,
        r#""suffix":"upstream_rq_1xx""#,
        r#""suffix":"downstream_cx_active""#,
        r#""regex":".*_timeout""#,
        r#""tag_name":"dlp_error""#,
        r#""name":"file-cert:/c~/k""#,
        r#""max_active_downstream_connections":50"#,
        r#""local_cluster_name":"local_cluster""#,
        r#""a.b":true"#,
    ] {
        assert!(text.contains(part), "{part} in {made:#}");
    }
    assert_eq!(text.matches("dlp_status=").count(), 1, "named twice, kept once");
    let runtime = at("/layered_runtime").to_string();
    assert!(!runtime.contains("re2.max_program_size"), "an empty value takes a default away: {runtime}");
    let clusters: Vec<&str> =
        made["static_resources"]["clusters"].as_array().unwrap().iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(
        clusters,
        [
            "prometheus_stats",
            "agent",
            "sds-grpc",
            "xds-grpc",
            "zipkin",
            "envoy_metrics_service",
            "envoy_accesslog_service",
            "local_cluster"
        ]
    );
    let zipkin = &made["static_resources"]["clusters"][4];
    let address = zipkin.pointer("/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address/socket_address/address");
    assert_eq!(address.unwrap(), "10.9.9.9");
    assert_eq!(zipkin.pointer("/transport_socket/typed_config/sni").unwrap(), "10.9.9.9");
    assert_eq!(at("/static_resources/listeners/0/name"), "127.0.0.1_15090");
    assert_eq!(made["node"]["metadata"]["PROFILE"], Value::Null, "the default path is where Istio has its own Envoy");
}

#[test]
fn real_envoy_takes_it() {
    let Some(envoy) = envoy() else {
        println!("SKIPPED: real_envoy_takes_it: no Envoy; `cargo xtask setup` installs it");
        return;
    };
    let dual = [("ISTIO_DUAL_STACK", "true"), ("ENVOY_STATUS_PORT_ENABLE_PROXY_PROTOCOL", "true")];
    let mut both = settings(json!({ "tracing": { "datadog": { "address": "dd:8126" } } }), "", &dual);
    both.addresses.push("2001:db8::7".parse().unwrap());
    for settings in [settings(json!({}), "", &[]), rich(), both] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bootstrap.json");
        let made = bootstrap(&settings, "./XDS", "./SDS");
        std::fs::write(&file, made.to_string()).unwrap();
        let output = std::process::Command::new(&envoy)
            .args(["--mode", "validate", "-l", "error", "--allow-unknown-static-fields", "-c"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
