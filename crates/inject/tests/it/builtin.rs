//! The built-in configuration.

use inject::{Builtin, Config, NamespaceMeta, NativeSidecars, Outcome, Owner, Request, inject};
use serde_json::{Value, json};

fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "details-v1-abc", "namespace": "default", "labels": {"app": "details", "version": "v1"}},
        "spec": {
            "serviceAccountName": "bookinfo-details",
            "containers": [{
                "name": "details",
                "image": "docker.io/istio/examples-bookinfo-details-v1:1.20.3",
                "ports": [{"containerPort": 9080}],
            }],
        },
    })
}

fn run(pod: &Value, native: NativeSidecars) -> Value {
    let mut config = Config::builtin(&Builtin::default()).unwrap();
    config.native = native;
    let namespace = NamespaceMeta {
        name: "default".to_owned(),
        labels: [("istio-injection".to_owned(), "enabled".to_owned())].into(),
        ..NamespaceMeta::default()
    };
    let owner = Owner::of_pod(pod);
    match inject(&Request::new(pod, &owner, &namespace).selecting(), &config).unwrap() {
        Outcome::Injected { pod, .. } => pod,
        Outcome::Skipped { decision } => panic!("{}", decision.rule),
    }
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    let items = pod["spec"][list].as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn bookinfo_gets_its_sidecar() {
    let pod = run(&pod(), NativeSidecars::Off);
    assert_eq!(names(&pod, "initContainers"), ["istio-init"]);
    assert_eq!(names(&pod, "containers"), ["details", "istio-proxy"]);
    let init = &pod["spec"]["initContainers"][0];
    assert_eq!(
        init["args"],
        json!([
            "istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b",
            "*", "-d", "15090,15021,15020", "--log_output_level=default:info"
        ])
    );
    assert!(init["image"].as_str().unwrap().starts_with("outrigger/proxyv2:"));
    let proxy = &pod["spec"]["containers"][1];
    assert_eq!(proxy["args"][1], "sidecar");
    assert_eq!(proxy["securityContext"]["runAsUser"], 1337);
    let token = pod["spec"]["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "istio-token");
    assert_eq!(token.unwrap()["projected"]["sources"][0]["serviceAccountToken"]["audience"], "istio-ca");
    assert_eq!(pod["metadata"]["annotations"]["prometheus.io/port"], "15020");
    for volume in ["workload-socket", "credential-socket", "workload-certs", "istiod-ca-cert", "istio-data",
        "istio-envoy", "istio-podinfo"]
    {
        assert!(names(&pod, "volumes").iter().any(|name| name == volume), "{volume}");
    }
}

#[test]
fn native_sidecars_are_init_containers() {
    let pod = run(&pod(), NativeSidecars::On);
    assert_eq!(names(&pod, "initContainers"), ["istio-init", "istio-proxy"]);
    assert_eq!(names(&pod, "containers"), ["details"]);
    assert_eq!(pod["spec"]["initContainers"][1]["restartPolicy"], "Always");
}

#[test]
fn annotations_are_honoured() {
    let mut pod = pod();
    pod["metadata"]["annotations"] = json!({
        "sidecar.istio.io/interceptionMode": "TPROXY",
        "sidecar.istio.io/proxyCPU": "50m",
        "sidecar.istio.io/proxyMemoryLimit": "64Mi",
        "traffic.sidecar.istio.io/excludeOutboundPorts": "5432",
        "traffic.sidecar.istio.io/excludeInboundPorts": "81",
        "sidecar.istio.io/userVolume": r#"{"extra": {"emptyDir": {}}}"#,
        "sidecar.istio.io/userVolumeMount": r#"{"extra": {"mountPath": "/extra"}}"#,
        "sidecar.istio.io/logLevel": "debug",
    });
    let pod = run(&pod, NativeSidecars::Off);
    let args = pod["spec"]["initContainers"][0]["args"].as_array().unwrap().clone();
    let after = |flag: &str| args[args.iter().position(|arg| arg == flag).unwrap() + 1].clone();
    assert_eq!((after("-m"), after("-o"), after("-d")), (json!("TPROXY"), json!("5432"), json!("15090,15021,81,15020")));
    let proxy = &pod["spec"]["containers"][1];
    assert_eq!(proxy["securityContext"]["runAsUser"], 0);
    assert_eq!(proxy["resources"], json!({"requests": {"cpu": "50m"}, "limits": {"memory": "64Mi"}}));
    assert!(proxy["volumeMounts"].as_array().unwrap().contains(&json!({"name": "extra", "mountPath": "/extra"})));
    assert_eq!(proxy["args"][4], "--proxyLogLevel=debug");
}

#[test]
fn namespaces_without_label_are_left_alone() {
    let config = Config::builtin(&Builtin::default()).unwrap();
    let (pod, namespace) = (pod(), NamespaceMeta { name: "default".to_owned(), ..NamespaceMeta::default() });
    let owner = Owner::of_pod(&pod);
    let outcome = inject(&Request::new(&pod, &owner, &namespace).selecting(), &config).unwrap();
    assert!(matches!(outcome, Outcome::Skipped { .. }));
}
