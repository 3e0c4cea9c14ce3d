//! Scopes and policies, case by case as istiod decides them.

use envoy_api::type_url;
use serde_json::{Value, json};

use crate::generated::{Generated, filters, find, service};

const HTTP: &str = "{name: http, port: 80}";

fn provider(name: &str, more: &str) -> String {
    format!("{{name: {name}, envoyExtAuthzHttp: {{service: a.default.svc.cluster.local, port: 80, {more}}}}}")
}

/// The filters of a server whose CUSTOM policies name `providers`.
fn custom(names: &[&str], providers: &[String], env: &[(&str, &str)], annotations: &str, rules: &str) -> Value {
    let policy = |name: &&str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p-{}, namespace: default, annotations: {{{annotations}}}}}
spec: {{action: CUSTOM, provider: {{name: {name}}}, rules: [{rules}]}}
---
",
            name.to_ascii_lowercase().replace('_', "-")
        )
    };
    let objects = service("a", HTTP, "", "") + &names.iter().map(policy).collect::<String>();
    let mesh = format!("{{extensionProviders: [{}]}}", providers.join(", "));
    Generated::of(&objects, &mesh, env, "labels: {app: a}").listener("virtualInbound")
}

#[test]
fn a_broken_authorizer_denies() {
    let paths = "{to: [{operation: {paths: [/x]}}]}";
    let asks = |name: &str, providers: &[String]| {
        let listener = custom(&[name], providers, &[], "a: b", paths);
        let denied = listener.to_string().contains("deny-due-to-bad-CUSTOM-action");
        let asked = filters(&listener).iter().any(|name| name.ends_with("ext_authz"));
        assert_ne!(denied, asked);
        asked
    };
    assert!(asks("ext", &[provider("ext", "pathPrefix: /check, statusOnError: '503'")]));
    for (name, more) in [
        ("Ext_1", ""),
        ("ext", "pathPrefix: check"),
        ("ext", "headersToUpstreamOnAllow: ['*']"),
        ("ext", "statusOnError: '999'"),
    ] {
        assert!(!asks(name, &[provider(name, more)]), "{name} {more}");
    }
}

#[test]
fn several_authorizers_need_a_setting() {
    let asked = |env: &[(&str, &str)]| {
        let listener = custom(&["one", "two"], &[provider("one", ""), provider("two", "")], env, "a: b", "{}");
        filters(&listener).iter().filter(|name| name.ends_with("ext_authz")).count()
    };
    assert_eq!(asked(&[]), 0);
    assert!(asked(&[("PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS", "true")]) > 1);
}

#[test]
fn all_telemetries_that_select_a_workload_count() {
    let telemetry = |name: &str, metric: &str| {
        format!(
            "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: {name}, namespace: default}}
spec:
  selector: {{matchLabels: {{app: a}}}}
  metrics: [{{providers: [{{name: prometheus}}], overrides: [{{match: {{metric: {metric}}}, disabled: true}}]}}]
---
"
        )
    };
    let objects = service("a", HTTP, "", "") + &telemetry("one", "REQUEST_COUNT") + &telemetry("two", "REQUEST_SIZE");
    let mesh = "{extensionProviders: [{name: prometheus, prometheus: {}}]}";
    let listener = Generated::of(&objects, mesh, &[], "labels: {app: a}").listener("virtualInbound").to_string();
    assert!(listener.contains("requests_total") && listener.contains("request_bytes"), "{listener}");
}

fn entry(name: &str, namespace: &str, host: &str, port: u16) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{hosts: [{host}], ports: [{{number: {port}, name: http, protocol: HTTP}}], resolution: STATIC, endpoints: [{{address: 10.9.0.1}}]}}
---
"
    )
}

fn clusters(made: &Generated) -> Vec<String> {
    let all = made.all(type_url::CLUSTER);
    all.as_object().unwrap().keys().filter(|name| name.starts_with("outbound|")).cloned().collect()
}

#[test]
fn of_services_of_one_exact_host_one_is_taken() {
    let objects = entry("one", "other", "x.example", 80) + &entry("two", "other", "x.example", 81);
    let sidecar = |hosts: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: s, namespace: default}}
spec: {{egress: [{{hosts: [{hosts}]}}]}}
"
        )
    };
    let of = |hosts: &str| clusters(&Generated::of(&(objects.clone() + &sidecar(hosts)), "{}", &[], ""));
    assert_eq!(of("other/x.example"), ["outbound|80||x.example"]);
    assert_eq!(of("'other/*'"), ["outbound|80||x.example", "outbound|81||x.example"]);
}

#[test]
fn the_mesh_says_how_far_service_entries_are_seen() {
    let namespace = |name: &str, labels: &str| {
        format!("\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n---\n")
    };
    let objects = [
        namespace("default", "tier: own"),
        namespace("other", "tier: hidden"),
        namespace("third", "tier: open"),
        entry("a", "default", "a.example", 80),
        entry("b", "other", "b.example", 80),
        entry("c", "third", "c.example", 80),
    ];
    let of = |apply: bool| {
        let mesh = format!(
            "
serviceEntryVisibility:
  applyToSidecars: {apply}
  defaultVisibility: NAMESPACE
  policies:
  - visibility: PUBLIC
    matchingRules: [{{namespaceSelector: {{matchExpressions: [{{key: tier, operator: In, values: [open]}}]}}}}]
  - visibility: NONE
    matchingRules: [{{namespaceSelector: {{matchLabels: {{tier: hidden}}}}}}]
"
        );
        clusters(&Generated::of(&objects.concat(), &mesh, &[], ""))
    };
    assert_eq!(of(true), ["outbound|80||a.example", "outbound|80||c.example"]);
    assert_eq!(of(false).len(), 3);
}

#[test]
fn tls_at_the_sidecar_takes_the_meshs_defaults() {
    let of = |tls: &str| {
        let sidecar = format!(
            "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: p, namespace: default}}
spec: {{mtls: {{mode: DISABLE}}}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: s, namespace: default}}
spec:
  ingress:
  - port: {{number: 8443, protocol: HTTPS, name: https}}
    defaultEndpoint: 127.0.0.1:80
    tls: {{{tls}}}
"
        );
        let mesh = "{tlsDefaults: {minProtocolVersion: TLSV1_3, ecdhCurves: [P-256], cipherSuites: [AES128-SHA]}}";
        let listener =
            Generated::of(&sidecar, mesh, &[("ENABLE_TLS_ON_SIDECAR_INGRESS", "true")], "").listener("virtualInbound");
        let mut found = Vec::new();
        find(&listener, "tls_params", &mut found);
        found.retain(|params| params["cipher_suites"].as_array().is_some_and(|c| c.len() < 3));
        found.first().map(|params| (*params).clone()).unwrap_or_default()
    };
    let files = "mode: SIMPLE, serverCertificate: /c, privateKey: /k";
    let defaults = of(files);
    assert_eq!(defaults["tls_minimum_protocol_version"], "TLSv1_3");
    assert_eq!((&defaults["ecdh_curves"], &defaults["cipher_suites"]), (&json!(["P-256"]), &json!(["AES128-SHA"])));
    let own = of(&format!("{files}, minProtocolVersion: TLSV1_2, cipherSuites: [AES256-SHA, AES256-SHA, NO-SUCH]"));
    assert_eq!(own["tls_minimum_protocol_version"], "TLSv1_2");
    assert_eq!(own["cipher_suites"], json!(["AES256-SHA"]));
}

#[test]
fn connection_settings_of_a_proxy_reach_its_connection_managers() {
    let of = |settings: &str| {
        let mesh = "{defaultConfig: {connectionSettings: {httpMaxStreamDuration: 9s}}}";
        let proxy = format!("labels: {{app: a}}, metadata: {{PROXY_CONFIG: {{{settings}}}}}");
        let made = Generated::of(&service("a", HTTP, "", ""), mesh, &[], &proxy);
        let listener = made.listener("0.0.0.0_80");
        let mut found = Vec::new();
        find(&listener, "filters", &mut found);
        let manager = found[0].as_array().unwrap().last().unwrap()["typed_config"].clone();
        assert!(manager["http_filters"].is_array());
        manager
    };
    let own = of("connectionSettings: {httpIdleTimeout: 7s, httpRequestTimeout: 3s, httpStreamIdleTimeout: 1s, \
         httpMaxConcurrentStreams: 5, http2InitialStreamWindowSize: -1, httpMergeSlashes: true, \
         httpHeadersWithUnderscoresAction: HEADERS_WITH_UNDERSCORES_DROP_HEADER, \
         httpPathWithEscapedSlashesAction: REJECT_REQUEST}");
    let common = json!({"idle_timeout": "7s", "headers_with_underscores_action": "DROP_HEADER"});
    assert_eq!(own["common_http_protocol_options"], common);
    assert_eq!((&own["request_timeout"], &own["stream_idle_timeout"]), (&json!("3s"), &json!("1s")));
    assert_eq!(own["http2_protocol_options"], json!({"max_concurrent_streams": 5}));
    assert_eq!(own["merge_slashes"], true);
    assert_eq!(own["path_with_escaped_slashes_action"], "REJECT_REQUEST");
    let default = of("concurrency: 2");
    assert_eq!(default["common_http_protocol_options"], json!({"max_stream_duration": "9s"}));
}

#[test]
fn keys_that_nobody_fetched_fit_no_token() {
    let rule = "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: default}
spec: {jwtRules: [{issuer: i, jwksUri: 'https://keys.example/jwks'}, {issuer: j, jwksUri: 'http://a.default.svc.cluster.local/jwks'}]}
";
    let of = |mode: &str| {
        let env = [("PILOT_JWT_ENABLE_REMOTE_JWKS", mode)];
        let made = Generated::of(&(service("a", HTTP, "", "") + rule), "{}", &env, "labels: {app: a}");
        let listener = made.listener("virtualInbound");
        let mut found = Vec::new();
        find(&listener, "providers", &mut found);
        let kind = |name: &str| {
            let provider = &found[0][name];
            match provider["remote_jwks"]["http_uri"]["cluster"].as_str() {
                Some(cluster) => cluster.to_owned(),
                None => provider["local_jwks"]["inline_string"].as_str().unwrap()[..20].to_owned(),
            }
        };
        [kind("origins-0"), kind("origins-1")]
    };
    let nothing = "{\n  \"keys\": [\n    {\n";
    let inside = "outbound|80||a.default.svc.cluster.local";
    assert!(of("false").iter().all(|keys| nothing.starts_with(keys.as_str()) || keys.starts_with(nothing)));
    assert_eq!(of("hybrid")[1], inside);
    assert!(of("true")[0].starts_with("{\n"));
    assert_eq!(of("envoy"), ["outbound|443||keys.example", inside]);
}

#[test]
fn namespaces_that_are_not_discovered_do_not_exist() {
    let namespace = |name: &str, labels: &str| {
        format!("\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n---\n")
    };
    let objects = [
        namespace("default", "mesh: 'on'"),
        namespace("other", "a: b"),
        entry("a", "default", "a.example", 80),
        entry("b", "other", "b.example", 80),
    ];
    let of = |mesh: &str| clusters(&Generated::of(&objects.concat(), mesh, &[], ""));
    assert_eq!(of("{discoverySelectors: [{matchLabels: {mesh: 'on'}}]}"), ["outbound|80||a.example"]);
    assert_eq!(of("{}").len(), 2);
}

#[test]
fn names_that_are_looked_up_by_sni_have_the_policies_of_the_workload() {
    let objects = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: far, namespace: default}
spec:
  hosts: ['*.example.com']
  ports: [{number: 443, name: tls, protocol: TLS}]
  resolution: DYNAMIC_DNS
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: default}
spec:
  selector: {matchLabels: {app: client}}
  action: DENY
  rules: [{from: [{source: {namespaces: [bad]}}]}]
";
    let of = |app: &str| {
        let all = Generated::of(objects, "{}", &[], &format!("labels: {{app: {app}}}"));
        filters(&all.listener("0.0.0.0_443")["filter_chains"][0])
    };
    let [rbac, forward] = ["envoy.filters.network.rbac", "envoy.extensions.filters.network.sni_dynamic_forward_proxy"];
    let client = of("client");
    let place = |name: &str| client.iter().position(|filter| filter == name);
    assert!(place(rbac).is_some() && place(rbac) < place(forward), "{client:?}");
    assert!(!of("other").contains(&rbac.to_owned()));
}

#[test]
fn a_sidecar_takes_hosts_out_of_what_it_imports() {
    let services: String = ["a", "b"].iter().map(|name| service(name, HTTP, "", "")).collect();
    let elsewhere = service("c", HTTP, "", "").replace("namespace: default", "namespace: other");
    let names = |hosts: &str| -> Vec<String> {
        let sidecar = format!(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: s, namespace: default}}
spec: {{egress: [{{hosts: [{hosts}]}}]}}
"
        );
        let all = Generated::of(&(services.clone() + &elsewhere + &sidecar), "{}", &[], "").all(type_url::CLUSTER);
        let names = all.as_object().unwrap().keys().filter_map(|name| name.strip_prefix("outbound|80||"));
        names.map(|host| host.split('.').next().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(names("'*/*'"), ["a", "b", "c"]);
    assert_eq!(names("'*/*', '~other/*'"), ["a", "b"]);
    assert_eq!(names("'*/*', '~./a.default.svc.cluster.local'"), ["b", "c"]);
    assert_eq!(names("'*/*', '~*/*.default.svc.cluster.local'"), ["c"]);
    assert_eq!(names("'./*', 'other/*', '~/a.default.svc.cluster.local'"), ["b", "c"]);
    assert_eq!(names("'*/*', '~/*'"), [""; 0]);
    assert_eq!(names("'default/a.default.svc.cluster.local', '~default/b.default.svc.cluster.local'"), ["a"]);
}

#[test]
fn older_proxies_hear_of_traces_what_they_know() {
    let telemetry = "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: t, namespace: istio-system}
spec:
  tracing:
  - providers: [{name: zipkin}]
    disableContextPropagation: true
    customTags: {path: {formatter: {value: '%REQ(:path)%'}}, other: {literal: {value: x}}}
";
    let mesh = "{extensionProviders: [{name: zipkin, zipkin: {service: a.default.svc.cluster.local, port: 80, \
        timeout: 3s, traceContextOption: USE_B3_WITH_W3C_PROPAGATION}}]}";
    let objects = service("a", HTTP, "", "") + telemetry;
    let of = |version: &str| {
        let proxy = format!("labels: {{app: a}}, metadata: {{ISTIO_VERSION: '{version}'}}");
        let listener = Generated::of(&objects, mesh, &[], &proxy).listener("virtualInbound");
        let mut found = Vec::new();
        find(&listener, "tracing", &mut found);
        let tracing = found.first().expect("inbound requests are traced");
        let config = &tracing["provider"]["typed_config"];
        let tags = tracing["custom_tags"].as_array().unwrap();
        let has = |value: &Value| !value.is_null();
        [
            has(&config["collector_service"]),
            config["collector_cluster"] == "outbound|80||a.default.svc.cluster.local",
            has(&config["trace_context_option"]),
            has(&tracing["no_context_propagation"]),
            tags.iter().any(|tag| tag["tag"] == "path"),
            tags.iter().any(|tag| tag["tag"] == "other"),
        ]
    };
    assert_eq!(of("1.30.0"), [true, false, true, true, true, true]);
    assert_eq!(of("1.29.4"), [true, false, true, false, true, true]);
    assert_eq!(of("1.28.0"), [false, true, true, false, false, true]);
    assert_eq!(of("1.27.9"), [false, true, false, false, false, true]);
}

#[test]
fn code_stands_in_the_chain_of_its_phase() {
    let extension = |kind: &str, name: &str, spec: &str| {
        format!(
            "---
apiVersion: extensions.istio.io/v1alpha1
kind: {kind}
metadata: {{name: {name}, namespace: default}}
spec: {{selector: {{matchLabels: {{app: a}}}}, {spec}}}
"
        )
    };
    let objects = service("a", HTTP, "", "")
        + &extension(
            "TrafficExtension",
            "lua",
            "phase: AUTHN, priority: 10, lua: {inlineCode: 'function envoy_on_request(h) end'}",
        )
        + &extension(
            "TrafficExtension",
            "wasm",
            "phase: AUTHN, match: [{mode: SERVER}], wasm: {url: 'oci://x/y', type: HTTP, pluginConfig: {a: b}}",
        )
        + &extension("WasmPlugin", "old", "phase: AUTHN, priority: 20, url: 'oci://x/z', pluginConfig: {a: b}");
    let made = Generated::of(&objects, "{}", &[], "labels: {app: a}");
    let own = |listener: &Value| {
        let mut out: Vec<String> =
            filters(listener).iter().filter_map(|f| Some(f.strip_prefix(PREFIX)?.to_owned())).collect();
        out.dedup();
        out
    };
    const PREFIX: &str = "extensions.istio.io/trafficextension/default.";
    let inbound = made.listener("virtualInbound");
    assert_eq!(own(&inbound)[..3], ["old~istio-translated-wasmplugin", "lua", "wasm"]);
    let mut code = Vec::new();
    find(&inbound, "default_source_code", &mut code);
    assert_eq!(code[0]["inline_string"], "function envoy_on_request(h) end");
    assert_eq!(own(&made.listener("0.0.0.0_80")), ["old~istio-translated-wasmplugin", "lua"]);
    let sent = made.all(type_url::EXTENSION);
    let sent: Vec<&String> = sent.as_object().unwrap().keys().collect();
    assert_eq!(sent, [&format!("{PREFIX}wasm"), &format!("{PREFIX}old~istio-translated-wasmplugin")], "by age");
}

#[test]
fn the_former_scope_prefers_nobody() {
    let objects = entry("older", "aaa", "b.other.svc.cluster.local", 80)
        .replace("metadata: {", "metadata: {creationTimestamp: '2020-01-01T00:00:00Z', ")
        + "
apiVersion: v1
kind: Service
metadata: {name: b, namespace: other, creationTimestamp: '2021-01-01T00:00:00Z'}
spec: {clusterIP: 10.96.0.3, ports: [{name: http, port: 81}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: s, namespace: default}
spec: {egress: [{hosts: ['*/*']}]}
";
    let of = |unified: &str| clusters(&Generated::of(&objects, "{}", &[("PILOT_UNIFIED_SIDECAR_SCOPE", unified)], ""));
    assert_eq!(of("true"), ["outbound|81||b.other.svc.cluster.local"]);
    assert_eq!(of("false"), ["outbound|80||b.other.svc.cluster.local"]);
}

#[test]
fn logs_that_cannot_be_written_leave_the_meshs_own() {
    let telemetry = |providers: &str| {
        format!(
            "{}
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: t, namespace: default}}
spec: {{accessLogging: [{{providers: [{providers}]}}]}}
",
            service("a", "{name: http, port: 80}", "", "")
        )
    };
    let mesh = "
accessLogFile: /dev/mesh
extensionProviders:
- {name: nowhere, envoyHttpAls: {service: missing.example.com, port: 9000}}
- {name: file, envoyFileAccessLog: {path: /dev/own}}
";
    let paths = |providers: &str| {
        let listener = Generated::of(&telemetry(providers), mesh, &[], "").listener("virtualOutbound");
        let mut paths = Vec::new();
        find(&listener["access_log"], "path", &mut paths);
        paths.into_iter().cloned().collect::<Vec<_>>()
    };
    assert_eq!(paths("{name: nowhere}"), ["/dev/mesh"]);
    assert_eq!(paths("{name: nowhere}, {name: file}"), ["/dev/own"]);
}
