//! istiod's environment variables, and what they change.

use serde_json::{Value, json};

use crate::generated::{Generated, filters, find, service};

const HTTP: &str = "{name: http, port: 80}";
const A: &str = "outbound|80||a.default.svc.cluster.local";

/// A service `a`, and the proxy as its client.
fn client(port: &str, metadata: &str, env: &[(&str, &str)]) -> Generated {
    Generated::of(&service("a", port, metadata, ""), "{}", env, "")
}

/// A proxy that serves `a`.
fn server(port: &str, more: &str, mesh: &str, env: &[(&str, &str)]) -> Generated {
    Generated::of(&(service("a", port, "", "") + more), mesh, env, "labels: {app: a}")
}

fn all<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    let mut out = Vec::new();
    find(value, key, &mut out);
    out
}

#[test]
fn sessions_stick_where_the_service_says_so() {
    let label = "labels: {istio.io/persistent-session: 'sid:/shop'}";
    let on = [("PILOT_ENABLE_PERSISTENT_SESSION_FILTER", "true")];
    let (with, without) = (client(HTTP, label, &on), client(HTTP, label, &[]));
    let statuses = json!(["HEALTHY", "DRAINING", "UNKNOWN", "DEGRADED"]);
    assert_eq!(without.cluster(A)["common_lb_config"]["override_host_status"]["statuses"], statuses);
    assert_eq!(client(HTTP, "", &on).cluster(A)["common_lb_config"]["override_host_status"], Value::Null);
    let name = "envoy.filters.http.stateful_session".to_owned();
    assert!(filters(&with.listener("0.0.0.0_80")).contains(&name));
    assert!(!filters(&without.listener("0.0.0.0_80")).contains(&name));
    let route = with.route("80");
    let cookies = all(&route, "cookie");
    assert_eq!(cookies, [&json!({"name": "sid", "path": "/shop"})]);
    assert!(all(&without.route("80"), "cookie").is_empty());
    let header = client(HTTP, "labels: {istio.io/persistent-session-header: x-sid}", &on);
    assert!(header.route("80").to_string().contains("x-sid"));
}

#[test]
fn http_1_0_is_told_apart_where_it_is_accepted() {
    let sniffed = "{name: any, port: 80}";
    let matched = |env: &[(&str, &str)]| {
        let listener = server(sniffed, "", "{}", env).listener("virtualInbound");
        all(&listener, "application_protocols").into_iter().filter(|list| list[0] == "http/1.0").count()
    };
    assert_eq!(matched(&[]), 0);
    assert_eq!(matched(&[("PILOT_HTTP10", "1")]), 2, "of the port, and of all others");
}

#[test]
fn trust_domains_of_roots_are_let_in_once() {
    let mesh =
        "{trustDomain: one, trustDomainAliases: [two, one], caCertificates: [{pem: x, trustDomains: [three, two]}]}";
    let prefixes = |env: &[(&str, &str)]| {
        let listener = server(HTTP, "", mesh, env).listener("virtualInbound");
        let list = all(&listener, "match_subject_alt_names").first().map(|list| (*list).clone());
        list.unwrap_or_default()
    };
    let prefix = |domain: &str| json!({"prefix": format!("spiffe://{domain}/")});
    assert_eq!(prefixes(&[]), json!([prefix("one"), prefix("two"), prefix("three")]));
    assert_eq!(prefixes(&[("PILOT_SKIP_VALIDATE_TRUST_DOMAIN", "true")]), Value::Null);
}

#[test]
fn service_ports_stay_beside_a_sidecars() {
    let sidecar = "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: s, namespace: default}
spec:
  ingress: [{port: {number: 9999, protocol: HTTP, name: http}, defaultEndpoint: '127.0.0.1:9999'}]
";
    let of = |env: &[(&str, &str)]| server(HTTP, sidecar, "{}", env);
    let merge = [("PILOT_ALLOW_SIDECAR_SERVICE_INBOUND_LISTENER_MERGE", "true")];
    let ports = |of: &Generated| {
        let listener = of.listener("virtualInbound");
        let mut ports: Vec<u64> = all(&listener, "destination_port").iter().filter_map(|p| p.as_u64()).collect();
        ports.dedup();
        ports
    };
    assert_eq!(ports(&of(&[])), [15006, 9999]);
    assert_eq!(ports(&of(&merge)), [15006, 80, 9999]);
    of(&merge).cluster("inbound|80||");
    assert_eq!(of(&[]).all(envoy_api::type_url::CLUSTER)["inbound|80||"], Value::Null);
}

#[test]
fn unready_endpoints_and_panic() {
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: r, namespace: default}
spec:
  host: a
  trafficPolicy: {outlierDetection: {minHealthPercent: 30}}
";
    let of = |spec: &str, env: &[(&str, &str)]| {
        let made = Generated::of(&(service("a", HTTP, "", spec) + rule), "{}", env, "");
        let threshold = made.cluster(A)["common_lb_config"]["healthy_panic_threshold"]["value"].clone();
        (all(&made.endpoints(A), "lb_endpoints")[0].as_array().unwrap().len(), threshold)
    };
    assert_eq!(of("", &[]), (1, json!(30.0)));
    assert_eq!(of("", &[("PILOT_SEND_UNHEALTHY_ENDPOINTS", "true")]).0, 2);
    let (endpoints, threshold) = of("trafficDistribution: PreferClose", &[]);
    assert_eq!(endpoints, 2, "nearness is judged by health");
    assert!(threshold.is_null() || threshold == json!(0.0), "{threshold}");
    let plain = client(HTTP, "", &[("PILOT_AUTO_SEND_UNHEALTHY_ENDPOINTS", "false")]);
    assert_eq!(all(&plain.endpoints(A), "lb_endpoints")[0].as_array().unwrap().len(), 1);
    assert_eq!(plain.cluster(A)["common_lb_config"]["healthy_panic_threshold"], Value::Null);
}

#[test]
fn telemetry_and_exchange_can_be_left_out() {
    let off = [("PILOT_ENABLE_METADATA_EXCHANGE", "false"), ("PILOT_ENABLE_TELEMETRY_LABEL", "false")];
    let (with, without) = (client(HTTP, "", &[]), client(HTTP, "", &off));
    let text =
        |of: &Generated| [of.cluster(A), of.endpoints(A), of.listener("0.0.0.0_80")].map(|v| v.to_string()).concat();
    for part in ["metadata_exchange", "istio-peer-exchange", "\"services\"", "\"workload\""] {
        assert!(text(&with).contains(part), "{part}");
        assert!(!text(&without).contains(part), "{part}");
    }
    let quiet = client(HTTP, "", &[("PILOT_DISABLE_MX_ALPN", "true")]);
    assert!(text(&quiet).contains("metadata_exchange"));
    let cluster = quiet.cluster(A);
    assert!(all(&cluster, "alpn_protocols").contains(&&json!(["istio"])), "{cluster}");
    let server = server("{name: tcp, port: 80}", "", "{}", &[("PILOT_DISABLE_MX_ALPN", "true")]);
    assert!(!all(&server.listener("virtualInbound"), "alpn_protocols").contains(&&json!([
        "istio-peer-exchange",
        "h2",
        "http/1.1"
    ])));
    let plain = client(HTTP, "", &[("PILOT_ENABLE_ALPN_FILTER", "false")]);
    assert!(!filters(&plain.listener("0.0.0.0_80")).contains(&"istio.alpn".to_owned()));
}

#[test]
fn protocols_are_parsed_on_demand() {
    let last = |port: &str, variable: &str| {
        let made = client(port, "", &[(variable, "true")]);
        let listener = made.listener("10.1.0.1_80");
        (filters(&listener), made.cluster(A)["lb_policy"].clone())
    };
    let (mysql, _) = last("{name: mysql, port: 80}", "PILOT_ENABLE_MYSQL_FILTER");
    assert!(
        mysql.contains(&"envoy.filters.network.mysql_proxy".to_owned()) && mysql.last().unwrap().ends_with("tcp_proxy")
    );
    let (redis, policy) = last("{name: redis, port: 80}", "PILOT_ENABLE_REDIS_FILTER");
    assert_eq!(redis.last().unwrap(), "envoy.filters.network.redis_proxy");
    assert_eq!(policy, "MAGLEV");
}

#[test]
fn numbers_of_clusters_and_listeners() {
    let entry = |annotations: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: e, namespace: default, annotations: {{{annotations}}}}}
spec: {{hosts: [x.example], ports: [{{number: 80, name: http, protocol: HTTP}}], resolution: DNS, location: MESH_EXTERNAL}}
"
        )
    };
    let env = [
        ("PILOT_DNS_JITTER_DURATION", "2s"),
        ("PILOT_DNS_CARES_UDP_MAX_QUERIES", "7"),
        ("DISABLE_TRACK_REMAINING_CB_METRICS", "false"),
        ("ENABLE_LOCALITY_WEIGHTED_LB_CONFIG", "true"),
        ("MAX_CONNECTIONS_PER_SOCKET_EVENT_LOOP", "3"),
        ("PILOT_GATEWAY_TRANSPORT_SOCKET_CONNECT_TIMEOUT", "0"),
        ("PILOT_SIDECAR_USE_REMOTE_ADDRESS", "true"),
        ("ENABLE_100_CONTINUE_HEADERS", "false"),
        ("PILOT_ENABLE_ABSOLUTE_FQDN_VHOST_DOMAIN", "false"),
    ];
    let made = Generated::of(&entry("a: b"), "{}", &env, "");
    let cluster = made.cluster("outbound|80||x.example");
    assert_eq!(cluster["dns_jitter"], "2s");
    assert_eq!(all(&cluster, "udp_max_queries"), [&json!(7)]);
    assert_eq!(all(&cluster, "track_remaining"), [&json!(true)]);
    assert_ne!(cluster["common_lb_config"]["locality_weighted_lb_config"], Value::Null);
    assert_eq!(cluster["type"], "STRICT_DNS");
    let listener = made.listener("0.0.0.0_80");
    assert!(all(&listener, "transport_socket_connect_timeout").is_empty());
    assert_eq!(all(&listener, "use_remote_address"), [&json!(true)]);
    assert!(all(&listener, "proxy_100_continue").is_empty());
    assert_eq!(made.listener("virtualOutbound")["max_connections_to_accept_per_socket_event"], 3);
    assert_eq!(all(&made.route("80"), "domains")[0], &json!(["x.example"]));
    let races = Generated::of(&entry("istio.io/connect-strategy: race_first_tcp_connect"), "{}", &[], "");
    let cluster = races.cluster("outbound|80||x.example");
    assert_eq!((&cluster["type"], &cluster["dns_lookup_family"]), (&json!("LOGICAL_DNS"), &json!("ALL")));
}

#[test]
fn proxies_ask_for_exact_balance_and_name_their_own_ports() {
    let made = |metadata: &str| {
        let ports = "{name: http, port: 15090}";
        Generated::of(&service("a", ports, "", ""), "{}", &[], &format!("labels: {{app: a}}, metadata: {{{metadata}}}"))
    };
    let exact = made("INBOUND_LISTENER_EXACT_BALANCE: 'true', OUTBOUND_LISTENER_EXACT_BALANCE: 'true'");
    for (name, is_exact) in [("virtualInbound", true), ("0.0.0.0_15090", true), ("virtualOutbound", false)] {
        assert_eq!(exact.listener(name)["connection_balance_config"].is_object(), is_exact, "{name}");
    }
    exact.cluster("inbound|15090||");
    let own = made("ENVOY_PROMETHEUS_PORT: 15090").all(envoy_api::type_url::LISTENER);
    assert!(own.get("0.0.0.0_15090").is_none(), "the proxy listens there itself");
    assert!(!all(&own, "destination_port").contains(&&json!(15090)));
}

#[test]
fn tls_is_limited_to_what_the_mesh_complies_with() {
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a, namespace: default}
spec: {host: a.default.svc.cluster.local, trafficPolicy: {tls: {mode: SIMPLE}}}
";
    let mesh = "{tlsDefaults: {cipherSuites: [ECDHE-RSA-AES128-GCM-SHA256, AES128-SHA], ecdhCurves: [P-384]}}";
    let both = |policy: &str| {
        let env = [("COMPLIANCE_POLICY", policy)];
        let cluster = Generated::of(&(service("a", HTTP, "", "") + rule), mesh, &env, "").cluster(A);
        let listener = server(HTTP, "", "{}", &env).listener("virtualInbound");
        (all(&cluster, "tls_params")[0].clone(), all(&listener, "tls_params")[0].clone())
    };
    let (client, server) = both("fips-140-2");
    let versions = json!({"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_2",
        "cipher_suites": ["ECDHE-RSA-AES128-GCM-SHA256"]});
    assert_eq!(client, versions);
    assert_eq!(server["cipher_suites"].as_array().unwrap().len(), 4);
    assert_eq!(server["tls_maximum_protocol_version"], "TLSv1_2");
    let (client, server) = both("fips-140-3");
    assert_eq!(client["compliance_policies"], json!(["FIPS_202205"]));
    assert_eq!(client["ecdh_curves"], json!(["P-384"]));
    assert_eq!(server["compliance_policies"], json!(["FIPS_202205"]));
    let (client, _) = both("pqc");
    assert_eq!(client["tls_minimum_protocol_version"], "TLSv1_3");
    assert_eq!(client["ecdh_curves"], json!(["X25519MLKEM768"]));
    assert_eq!(both("other"), both(""));
}

#[test]
fn credentials_come_from_where_their_names_and_the_proxy_say() {
    let secrets = |name: &str, proxy: &str| {
        let rule = format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: a, namespace: default}}
spec:
  host: a.default.svc.cluster.local
  workloadSelector: {{matchLabels: {{app: a}}}}
  trafficPolicy: {{tls: {{mode: MUTUAL, {name}}}}}
"
        );
        let proxy = format!("labels: {{app: a}}, {proxy}");
        let cluster = Generated::of(&(service("a", HTTP, "", "") + &rule), "{}", &[], &proxy).cluster(A);
        let of = |key: &str| {
            let found = all(&cluster, key)[0].clone();
            let found = if found.is_array() { found[0].clone() } else { found };
            let server = all(&found, "cluster_name").first().map_or(json!("ads"), |name| (*name).clone());
            (found["name"].clone(), server)
        };
        let (own, root) = (of("tls_certificate_sds_secret_configs"), of("validation_context_sds_secret_config"));
        [own.0, own.1, root.0, root.1].map(|text| text.as_str().unwrap_or_default().to_owned())
    };
    let named = |name: &str, proxy: &str| secrets(&format!("credentialName: '{name}'"), proxy);
    assert_eq!(named("own", ""), ["kubernetes://own", "ads", "kubernetes://own-cacert", "ads"]);
    assert_eq!(named("builtin://", ""), ["default", "sds-grpc", "ROOTCA", "sds-grpc"]);
    assert_eq!(named("invalid://x", ""), ["invalid://", "ads", "invalid://", "ads"]);
    assert_eq!(named("other://x", ""), ["kubernetes://other://x", "ads", "kubernetes://other://x-cacert", "ads"]);
    assert_eq!(named("sds://x", ""), ["kubernetes://x", "ads", "kubernetes://x-cacert", "ads"]);
    let beside = "metadata: {credential: 'true', file-credential: 'true'}";
    assert_eq!(named("sds://x", beside), ["sds://x", "sds-external", "sds://x-cacert", "sds-external"]);
    let files = "clientCertificate: /c, privateKey: /k, caCertificates: /r";
    assert_eq!(secrets(files, ""), ["file-cert:/c~/k", "sds-grpc", "file-root:/r", "sds-grpc"]);
    assert_eq!(secrets(files, beside), ["file-cert:/c~/k", "sds-files-grpc", "file-root:/r", "sds-files-grpc"]);
}
