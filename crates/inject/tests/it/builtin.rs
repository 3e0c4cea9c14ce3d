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
            "istio-iptables",
            "-p",
            "15001",
            "-z",
            "15006",
            "-u",
            "1337",
            "-m",
            "REDIRECT",
            "-i",
            "*",
            "-x",
            "",
            "-b",
            "*",
            "-d",
            "15090,15021,15020",
            "--log_output_level=default:info"
        ])
    );
    assert!(init["image"].as_str().unwrap().starts_with("outrigger/proxyv2:"));
    let proxy = &pod["spec"]["containers"][1];
    assert_eq!(proxy["args"][1], "sidecar");
    assert_eq!(proxy["securityContext"]["runAsUser"], 1337);
    let token = pod["spec"]["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == "istio-token");
    assert_eq!(token.unwrap()["projected"]["sources"][0]["serviceAccountToken"]["audience"], "istio-ca");
    assert_eq!(pod["metadata"]["annotations"]["prometheus.io/port"], "15020");
    for volume in [
        "workload-socket",
        "credential-socket",
        "workload-certs",
        "istiod-ca-cert",
        "istio-data",
        "istio-envoy",
        "istio-podinfo",
    ] {
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
    assert_eq!(
        (after("-m"), after("-o"), after("-d")),
        (json!("TPROXY"), json!("5432"), json!("15090,15021,81,15020"))
    );
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

#[test]
fn the_old_form_of_configuration_is_accepted() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        r#"
policy: enabled
template: |-
  initContainers:
  - name: istio-init
    image: docker.io/istio/proxy_init:1.0.6
    args:
    - "-p"
    - [[ .MeshConfig.ProxyListenPort ]]
    - "-b"
    - "[[ annotation .ObjectMeta `traffic.sidecar.istio.io/includeInboundPorts` (applicationPorts .Spec.Containers) ]]"
  containers:
  - name: istio-proxy
    image: [[ annotation .ObjectMeta `sidecar.istio.io/proxyImage` "docker.io/istio/proxyv2:1.0.6" ]]
    args:
    - --drainDuration
    - [[ formatDuration .ProxyConfig.DrainDuration ]]
    - --serviceCluster
    [[ if ne "" (index .ObjectMeta.Labels "app") -]]
    - [[ index .ObjectMeta.Labels "app" ]]
    [[ end -]]
    volumeMounts:
    - mountPath: /etc/certs/
      name: istio-certs
  volumes:
  - name: istio-certs
    secret:
      optional: true
      [[ if eq .Spec.ServiceAccountName "" -]]
      secretName: istio.default
      [[ else -]]
      secretName: [[ printf "istio.%s" .Spec.ServiceAccountName ]]
      [[ end -]]
"#
        .replace("- [[ .MeshConfig.ProxyListenPort ]]", "- [[ .MeshConfig.ProxyListenPort | quote ]]"),
    )
    .unwrap();
    let files = inject::Files { inject: Some(file.path().to_owned()), ..inject::Files::default() };
    let config = Config::load(&files).unwrap();
    let pod = pod();
    let (owner, namespace) = (Owner::of_pod(&pod), NamespaceMeta::default());
    let Outcome::Injected { pod, .. } = inject(&Request::new(&pod, &owner, &namespace), &config).unwrap() else {
        panic!("skipped");
    };
    assert_eq!(pod["spec"]["initContainers"][0]["args"], json!(["-p", "15001", "-b", "9080"]));
    assert_eq!(pod["spec"]["containers"][1]["args"], json!(["--drainDuration", "45s", "--serviceCluster", "details"]));
    assert_eq!(pod["spec"]["volumes"][0]["secret"]["secretName"], "istio.bookinfo-details");
}

#[test]
fn a_broken_configuration_names_file_and_template() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "policy: enabled\ntemplates:\n  sidecar: |\n    a\n    {{ nosuch }}\n").unwrap();
    let files = inject::Files { inject: Some(file.path().to_owned()), ..inject::Files::default() };
    let error = Config::load(&files).unwrap_err();
    let name = file.path().display().to_string();
    assert_eq!(error.to_string(), format!("{name}:3: template sidecar cannot be parsed"));
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "template: sidecar:2: function \"nosuch\" not defined");
}

#[test]
fn a_wrong_mesh_configuration_names_file_line_and_field() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "trustDomain: a\ndefaultConfig:\n  statusPort: many\n").unwrap();
    let files = inject::Files { mesh: Some(file.path().to_owned()), ..inject::Files::default() };
    let error = Config::load(&files).unwrap_err().to_string();
    let name = file.path().display().to_string();
    assert_eq!(error, format!("{name}:3:3: defaultConfig.statusPort: expected an integer, found a string (\"many\")"));
}

#[test]
fn proxy_config_resources_lie_around_the_annotation() {
    let config = Config::builtin(&Builtin::default()).unwrap();
    let mut pod = pod();
    pod["metadata"]["annotations"] = json!({"proxy.istio.io/config": "proxyMetadata: {B: annotation, C: annotation}"});
    let (owner, namespace) = (Owner::of_pod(&pod), NamespaceMeta::default());
    let mut request = Request::new(&pod, &owner, &namespace);
    request.proxy_configs = inject::ProxyConfigs {
        wide: vec![
            json!({"concurrency": 4, "environmentVariables": {"A": "root", "B": "root"}}),
            json!({"concurrency": 2, "image": {"imageType": "debug"}}),
        ],
        workload: Some(json!({"environmentVariables": {"C": "workload"}})),
    };
    let Outcome::Injected { pod, .. } = inject(&request, &config).unwrap() else { panic!("skipped") };
    let proxy = &pod["spec"]["containers"][1];
    assert!(proxy["image"].as_str().unwrap().ends_with("-debug"));
    let value = |name: &str| {
        let env = proxy["env"].as_array().unwrap();
        env.iter().find(|item| item["name"] == name).unwrap()["value"].as_str().unwrap().to_owned()
    };
    assert_eq!((value("A"), value("B"), value("C")), ("root".into(), "annotation".into(), "workload".into()));
    assert!(value("PROXY_CONFIG").contains("\"concurrency\":2"));
}
