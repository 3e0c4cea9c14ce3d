//! Decisions of the original that the reference data do not show.

use std::path::Path;

use inject::{Builtin, Config, NamespaceMeta, Outcome, Owner, Request, Texts, inject, inject_text};
use serde_json::{Value, json};

fn config(template: &str) -> Config {
    let quoted = serde_json::to_string(template).unwrap();
    let inject =
        format!("policy: enabled\ninjectedAnnotations: {{i: 1, b: true, f: 1.50}}\ntemplates: {{sidecar: {quoted}}}");
    let texts = Texts { inject: Some(inject), ..Texts::default() };
    Config::from_texts(&texts, "test", &Builtin::default()).unwrap()
}

fn webhook(template: &str, pod: &Value) -> Value {
    let namespace = NamespaceMeta { name: "default".to_owned(), ..NamespaceMeta::default() };
    match inject(&Request::new(pod, &Owner::of_pod(pod), &namespace), &config(template)).unwrap() {
        Outcome::Injected { pod, .. } => pod,
        Outcome::Skipped { decision } => panic!("{}", decision.rule),
    }
}

fn kube_inject(template: &str, text: &str) -> Result<Value, String> {
    let (out, _) = inject_text(Path::new("in"), text, &config(template)).map_err(|error| error.to_string())?;
    Ok(manifest::parse_plain(Path::new("out"), &out).unwrap().remove(0).value)
}

#[test]
fn scalars_become_strings_where_strings_belong() {
    let pod = kube_inject(
        "metadata: {}",
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: 12\n  labels: {version: 1, enabled: yes}\n  annotations: {x: true, f: 1.10, big: 10000000}\n\
         spec:\n  containers:\n  - name: c\n    args: [1, -2.5e10, true]\n    env: [{name: A, value: 5}]\n    resources: {limits: {cpu: 1}}\n",
    )
    .unwrap();
    let meta = &pod["metadata"];
    assert_eq!(meta["name"], "12");
    assert_eq!(meta["labels"], json!({"enabled": "true", "version": "1"}));
    assert_eq!((&meta["annotations"]["x"], &meta["annotations"]["f"]), (&json!("true"), &json!("1.1")));
    assert_eq!(meta["annotations"]["big"], "10000000");
    let container = &pod["spec"]["containers"][0];
    assert_eq!(container["args"], json!(["1", "-2.5e+10", "true"]));
    assert_eq!(container["env"][0]["value"], "5");
    // Where no string belongs, nothing changes.
    let error = kube_inject("", "apiVersion: v1\nkind: Pod\nspec: {containers: [{name: c, stdin: 1}]}\n").unwrap_err();
    assert!(error.contains("spec.containers[0].stdin"), "{error}");
}

#[test]
fn injected_annotations_may_be_written_as_scalars() {
    let pod = webhook("metadata: {}", &json!({"spec": {"containers": []}}));
    for (name, value) in [("i", "1"), ("b", "true"), ("f", "1.5")] {
        assert_eq!(pod["metadata"]["annotations"][name], value);
    }
}

#[test]
fn of_a_key_written_twice_the_last_counts() {
    let template = "metadata: {labels: {a: first, a: last}}";
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, name: b}\nspec: {containers: [{name: c}]}\n";
    let pod = kube_inject(template, text).unwrap();
    assert_eq!((&pod["metadata"]["name"], &pod["metadata"]["labels"]["a"]), (&json!("b"), &json!("last")));
}

#[test]
fn only_kube_inject_applies_the_annotation_to_the_whole_mesh_configuration() {
    let template = "metadata: {labels: {mesh: '{{.MeshConfig.DefaultConfig.StatusPort}}', proxy: '{{.ProxyConfig.StatusPort}}'}}\n\
                    spec: {containers: [{name: istio-proxy}]}";
    let probe = json!({"httpGet": {"path": "/", "port": 80}});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"annotations": {"proxy.istio.io/config": "statusPort: 15555"}},
        "spec": {"containers": [{"name": "c", "readinessProbe": probe}]},
    });
    for (result, mesh) in [(webhook(template, &pod), 15020), (kube_inject(template, &pod.to_string()).unwrap(), 15555)]
    {
        let mesh_text = mesh.to_string();
        assert_eq!(result["metadata"]["labels"]["mesh"], json!(mesh_text));
        assert_eq!(result["metadata"]["labels"]["proxy"], "15555");
        assert_eq!(result["metadata"]["annotations"]["prometheus.io/port"], json!(mesh_text));
        assert_eq!(result["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"], json!(mesh));
    }
}

#[test]
fn kube_inject_reads_the_proxy_configuration_also_of_what_it_leaves_alone() {
    let pod = |spec: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  labels: {{sidecar.istio.io/inject: false}}\n  annotations: {{proxy.istio.io/config: 'a: [b'}}\nspec: {spec}\n"
        )
    };
    assert!(kube_inject("", &pod("{containers: []}")).is_err());
    assert!(kube_inject("", &pod("{hostNetwork: true, containers: []}")).is_ok());
}

#[test]
fn pointers_to_scalars_are_true_when_they_are_set() {
    let context = json!({"runAsNonRoot": false, "runAsUser": 0});
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "c", "securityContext": context}]}});
    for (expression, want) in [
        ("{{if $s.RunAsNonRoot}}set{{else}}unset{{end}}", "set"),
        ("{{if $s.Privileged}}set{{else}}unset{{end}}", "unset"),
        ("{{$s.RunAsUser | default 7}}.{{$s.RunAsGroup | default 7}}", "0.7"),
        ("{{empty $s.RunAsUser}}.{{eq $s.RunAsGroup nil}}.{{eq $s.RunAsUser nil}}", "false.true.false"),
        ("{{add $s.RunAsUser 1}}.{{ternary 1 2 $s.RunAsNonRoot}}.{{kindOf $s.RunAsUser}}", "1.2.ptr"),
        ("{{toJson $s.RunAsNonRoot}}.{{toJson $s.Privileged}}.{{$s.RunAsUser}}", "false.null.0"),
        ("{{toJson .Spec.InitContainers}}.{{toJson .Spec.Volumes}}.{{len .Spec.Volumes}}", "null.null.0"),
    ] {
        let template = format!(
            "{{{{$s := (index .Spec.Containers 0).SecurityContext}}}}metadata: {{labels: {{x: '{expression}'}}}}"
        );
        assert_eq!(webhook(&template, &pod)["metadata"]["labels"]["x"], want, "{expression}");
    }
}

#[test]
fn a_label_puts_a_pod_into_no_network() {
    let template = "spec: {containers: [{name: istio-proxy}]}";
    let pod = |labels: Value| json!({"metadata": {"labels": labels}, "spec": {"containers": []}});
    let namespace = NamespaceMeta { name: "default".to_owned(), ..NamespaceMeta::default() };
    let values = r#"{"global": {"network": "mesh"}}"#.to_owned();
    let inject_text = format!("policy: enabled\ntemplates: {{sidecar: '{template}'}}");
    let texts = Texts { inject: Some(inject_text), values: Some(values), ..Texts::default() };
    let config = Config::from_texts(&texts, "test", &Builtin::default()).unwrap();
    for (labels, network) in [
        (json!({}), json!("mesh")),
        (json!({"topology.istio.io/network": "own"}), json!("own")),
        (json!({"topology.istio.io/network": ""}), Value::Null),
    ] {
        let pod = pod(labels);
        let Ok(Outcome::Injected { pod, .. }) = inject(&Request::new(&pod, &Owner::of_pod(&pod), &namespace), &config)
        else {
            panic!("the pod is not injected");
        };
        assert_eq!(pod["spec"]["containers"][0]["env"][0]["value"], network);
    }
}

#[test]
fn a_mesh_configuration_that_istiod_refuses_is_refused() {
    let mesh = |text: &str| Texts { mesh: Some(text.to_owned()), ..Texts::default() };
    let error =
        Config::from_texts(&mesh("trustDomain: a\ndefaultConfig:\n  statusPort: 0\n"), "m", &Builtin::default());
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("m/mesh:3:3: defaultConfig.statusPort: port number 0"), "{error}");
}

#[test]
fn all_values_have_their_types() {
    for (values, fault) in [
        ("global: {proxy: {autoInject: true}}", "global.proxy.autoInject: expected a string"),
        ("global: {imagePullSecrets: [a, 1]}", "global.imagePullSecrets[1]: expected a string"),
        ("global: {proxy: {resources: {limits: {cpu: 2}}}}", "global.proxy.resources.limits.cpu: expected a string"),
        ("global: {proxy_init: []}", "global.proxy_init: expected an object"),
        ("pilot: {replicaCount: -1}", "pilot.replicaCount: expected an integer that is not negative"),
    ] {
        let texts = Texts { values: Some(values.to_owned()), ..Texts::default() };
        let error = Config::from_texts(&texts, "v", &Builtin::default()).unwrap_err().to_string();
        assert!(error.starts_with("v/values:1:") && error.ends_with(fault), "{error}");
    }
    let fine = "global: {tag: 1.2, unknown: 1, proxy: {statusPort: '15020', privileged: null}}\nown: [1]";
    let texts = Texts { values: Some(fine.to_owned()), ..Texts::default() };
    assert!(Config::from_texts(&texts, "v", &Builtin::default()).is_ok());
}

#[test]
fn an_istio_operator_brings_values_and_mesh_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("iop.yaml");
    std::fs::write(
        &path,
        "kind: IstioOperator\nspec:\n  hub: here\n  values: {global: {tag: t1}}\n  meshConfig: {defaultConfig: {statusPort: 15555}}\n",
    )
    .unwrap();
    let config = Config::load(&inject::Files { operator: Some(path.clone()), ..inject::Files::default() }).unwrap();
    let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "c"}]}});
    let namespace = NamespaceMeta { name: "default".to_owned(), ..NamespaceMeta::default() };
    let Ok(Outcome::Injected { pod, .. }) = inject(&Request::new(&pod, &Owner::of_pod(&pod), &namespace), &config)
    else {
        panic!("the pod is not injected");
    };
    assert_eq!(pod["metadata"]["annotations"]["prometheus.io/port"], "15555");
    assert!(pod.to_string().contains("\"here/proxyv2:t1\""), "{pod}");
    std::fs::write(&path, "kind: Pod\n").unwrap();
    let error = Config::load(&inject::Files { operator: Some(path), ..inject::Files::default() }).unwrap_err();
    assert!(error.to_string().contains("kind: expected IstioOperator"), "{error}");
}

#[test]
fn kube_inject_leaves_out_what_its_types_do_not_know_and_says_so() {
    let text = "apiVersion: v1\nkind: Pod\nspec: {own: 1, gone: null, containers: [{name: c, ports: [{containerPort: 1, new: x}]}]}\n";
    let config = config("spec: {containers: [{name: istio-proxy, other: 1}]}");
    let (out, documents) = inject_text(Path::new("in"), text, &config).unwrap();
    let pod = manifest::parse_plain(Path::new("out"), &out).unwrap().remove(0).value;
    assert_eq!(
        (&pod["spec"]["own"], &pod["spec"]["containers"][0]["ports"]),
        (&Value::Null, &json!([{"containerPort": 1}]))
    );
    assert!(!out.contains("other"), "{out}");
    let named: Vec<bool> = ["spec.own ", "spec.containers[0].ports[0].new ", "gone"]
        .map(|path| documents[0].warnings.iter().any(|warning| warning.contains(path)))
        .into();
    assert_eq!(named, [true, true, false], "{:?}", documents[0].warnings);
}
