//! What holds for any pod.

use inject::{Builtin, Config, NamespaceMeta, NativeSidecars, Outcome, Owner, Request, inject, webhook};
use proptest::prelude::*;
use serde_json::{Value, json};

fn once(pod: &Value, config: &Config) -> Value {
    let namespace = NamespaceMeta { name: "default".to_owned(), ..NamespaceMeta::default() };
    let owner = Owner::of_pod(pod);
    match inject(&Request::new(pod, &owner, &namespace), config).unwrap() {
        Outcome::Injected { pod, .. } => pod,
        Outcome::Skipped { decision } => panic!("{}", decision.rule),
    }
}

fn probe() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!({"httpGet": {"path": "/", "port": 8080, "scheme": "HTTPS"}, "timeoutSeconds": 2})),
        Just(json!({"tcpSocket": {"port": "web"}})),
        Just(json!({"grpc": {"port": 9000}})),
        Just(json!({"exec": {"command": ["true"]}})),
    ]
}

fn container(name: &'static str) -> impl Strategy<Value = Value> {
    (probe(), probe(), any::<bool>()).prop_map(move |(ready, live, ports)| {
        let ports = if ports { json!([{"containerPort": 80, "name": "web"}]) } else { json!([]) };
        json!({"name": name, "image": "i", "readinessProbe": ready, "livenessProbe": live, "ports": ports})
    })
}

fn own_proxy() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        Just(None),
        Just(Some(json!({"name": "istio-proxy", "image": "auto", "resources": {"requests": {"cpu": "1"}}}))),
        Just(Some(json!({"name": "istio-proxy", "image": "own:1", "securityContext": {"runAsUser": 2000}}))),
    ]
}

fn annotations() -> impl Strategy<Value = Value> {
    let pairs = vec![
        ("prometheus.io/port", "8080"),
        ("prometheus.io/scrape", "false"),
        ("sidecar.istio.io/interceptionMode", "TPROXY"),
        ("sidecar.istio.io/interceptionMode", "NONE"),
        ("proxy.istio.io/config", "holdApplicationUntilProxyStarts: true"),
        ("sidecar.istio.io/nativeSidecar", "true"),
        ("status.sidecar.istio.io/port", "15030"),
    ];
    proptest::sample::subsequence(pairs, 0..4)
        .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), json!(v))).collect()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn injecting_twice_is_injecting_once(
        first in container("a"),
        second in proptest::option::of(container("b")),
        init in proptest::option::of(container("setup")),
        own in own_proxy(),
        annotations in annotations(),
        native in any::<bool>(),
    ) {
        let mut config = Config::builtin(&Builtin::default()).unwrap();
        config.native = if native { NativeSidecars::On } else { NativeSidecars::Off };
        let containers: Vec<Value> = [Some(first), own, second].into_iter().flatten().collect();
        let inits: Vec<Value> = init.into_iter().collect();
        let pod = json!({
            "metadata": {"name": "p", "annotations": annotations},
            "spec": {"containers": containers, "initContainers": inits, "volumes": [{"name": "v", "emptyDir": {}}]},
        });
        let injected = once(&pod, &config);
        prop_assert_eq!(once(&injected, &config), injected);
    }

    #[test]
    fn templates_never_panic(
        text in "[{}a-zé.$|() \"=:0-9-]{0,60}",
        action in "[a-cé.$|() \"'`\\\\=:0-9exui_+*/,-]{0,30}",
        verbs in "[%a-zé0-9.*#+ \\[\\]-]{0,20}",
    ) {
        for source in [text, format!("{{{{{action}}}}}"), format!("{{{{printf {verbs:?} 1 .a \"é\" 1.5 nil}}}}")] {
            let _ = inject::render(&source, "data", r#"{"a": [1, {"b": "c"}]}"#);
        }
    }

    #[test]
    fn strings_never_panic(text in ".{0,30}", number in -5i64..40) {
        for function in ["trunc", "abbrev", "wrap", "indent", "nindent"] {
            let _ = inject::render(&format!("{{{{{function} {number} .s}}}}"), "data", &json!({"s": text}).to_string());
        }
        for function in ["title", "untitle", "snakecase", "camelcase", "swapcase", "initials", "toYaml", "dir", "ext",
            "b64dec", "semver", "urlParse", "regexQuoteMeta", "js", "html", "quote", "durationRound"]
        {
            let _ = inject::render(&format!("{{{{{function} .s}}}}"), "data", &json!({"s": text}).to_string());
        }
        let _ = inject::render(&format!("{{{{substr {number} 7 .s}}}}{{{{date .s 0}}}}{{{{semverCompare .s \"1.2.3\"}}}}"), "data",
            &json!({"s": text}).to_string());
    }

    #[test]
    fn yaml_reads_back(text in ".{0,40}|[ \n\t:#'\"a0-9-]{0,12}", key in "[a-z0-9:. ~-]{1,8}") {
        let value = json!({key: [text.clone(), {"x": text}]});
        let data = json!({"v": value}).to_string();
        let yaml = inject::render("{{toYaml .v}}", "data", &data).unwrap();
        let read = manifest::parse_plain(std::path::Path::new("y"), &yaml).map_err(|error| TestCaseError::fail(format!("{error}: {yaml:?}")))?;
        prop_assert_eq!(&read[0].value, &value, "{:?}", yaml);
    }

    #[test]
    fn files_never_panic(text in "[a-zA-Z0-9:\\-{}\\[\\] \n]{0,80}") {
        let config = Config::builtin(&Builtin::default()).unwrap();
        let head = "apiVersion: v1\nkind: Pod\n";
        let _ = inject::inject_text(std::path::Path::new("f"), &text, &config);
        let _ = inject::inject_text(std::path::Path::new("f"), &format!("{head}{text}"), &config);
    }

    #[test]
    fn reviews_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200), mangled in ".{0,40}") {
        let config = Config::builtin(&Builtin::default()).unwrap();
        webhook::handle("/inject", Some("application/json"), &body, &config);
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "1", "object": {"metadata": mangled, "spec": {"containers": mangled}}},
        });
        webhook::handle("/inject", Some("application/json"), review.to_string().as_bytes(), &config);
    }
}
