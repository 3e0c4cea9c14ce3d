//! Fuzz targets: templates, what users give `kube-inject`, what API servers send, and injection's configuration.

use std::path::Path;

use inject::{Builtin, Config, Texts, webhook};
use serde_json::json;

/// How a text was refused: the sentence without what it quotes.
fn refusal(error: &str) -> String {
    let words = error.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() > 2);
    words.take(6).collect::<Vec<_>>().join(" ")
}

const TEMPLATE_WORDS: [&str; 46] = [
    "{{",
    "}}",
    "{{-",
    "-}}",
    "{{/*",
    "*/}}",
    "if ",
    "else",
    "else if ",
    "end",
    "range ",
    "range $i, $e := ",
    "with ",
    "define \"a\"",
    "template \"a\" .",
    "block \"b\" .",
    "break",
    "continue",
    ".",
    "$",
    "$x := ",
    "$x = ",
    "|",
    "(",
    ")",
    "eq ",
    "lt ",
    "and ",
    "or ",
    "not ",
    "len ",
    "index ",
    "slice ",
    "printf \"%v %5.2f %q\" ",
    "toYaml ",
    "nindent 4 ",
    "default ",
    "dict \"a\" ",
    "list 1 2 ",
    "trunc ",
    "1",
    "-7",
    "0x1F",
    "1e9",
    "\"s\"",
    "`raw`",
];

#[test]
fn templates() {
    let seeds: [&[u8]; 6] = [
        b"{{ if .a }}x{{ else if eq .b 1 }}{{ .c.d }}{{ end }}",
        b"{{- range $i, $e := .list }}{{ $i }}={{ $e | quote }}{{ else }}none{{ end -}}",
        b"{{ define \"a\" }}{{ with .x }}{{ . }}{{ end }}{{ end }}{{ template \"a\" . }}",
        b"{{ block \"b\" .list }}{{ len . }}{{ break }}{{ end }}",
        b"{{ $x := dict \"a\" (list 1 2) }}{{ toYaml $x | nindent 2 }}{{ printf \"%05d|%-8s|%v\" 7 \"s\" nil }}",
        b"metadata:\n  labels: {{ toJson .labels }}\n{{/* comment */}}{{ semverCompare \">=1.2\" \"1.3\" }}",
    ];
    let data = json!({
        "a": true, "b": 1, "c": {"d": [1, 2.5, null]}, "list": ["x", "y"], "labels": {"app": "a"}, "x": {"y": "z"}, "s": "\u{e9}",
    })
    .to_string();
    fuzz::run("templates", &seeds, &TEMPLATE_WORDS, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        inject::render(&text, "data", &data)
            .map(|out| out.len().min(64))
            .map_err(|error| refusal(&format!("{error:#}")))
    });
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  annotations: {sidecar.istio.io/proxyCPU: 100m, proxy.istio.io/config: 'concurrency: 2'}\nspec:\n  containers:\n  - name: app\n    image: app:1\n    ports: [{containerPort: 80, name: web}]\n    readinessProbe: {httpGet: {path: /, port: web}}\n";

const YAML_WORDS: [&str; 40] = [
    ": ",
    "- ",
    "\n",
    "\n  ",
    "---\n",
    "...\n",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&a ",
    "*a",
    "!!str ",
    "|\n",
    ">-\n",
    "'",
    "\"",
    "# ",
    "~",
    "null",
    "true",
    "1e3",
    "0x1f",
    "<<: ",
    "? ",
    "kind: List\nitems:\n- ",
    "kind: Deployment",
    "kind: CronJob",
    "template:",
    "jobTemplate:",
    "initContainers:",
    "name: istio-proxy",
    "image: auto",
    "traffic.sidecar.istio.io/includeInboundPorts: ",
    "sidecar.istio.io/inject: ",
    "inject.istio.io/templates: ",
    "securityContext:",
    "volumes:",
    "hostNetwork: true",
];

#[test]
fn manifests() {
    let config = Config::builtin(&Builtin::default()).unwrap();
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  selector: {matchLabels: {app: d}}\n  template:\n    metadata: {labels: {app: d}}\n    spec:\n      containers: [{name: c, image: i}, {name: istio-proxy, image: auto}]\n";
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: s}\n---\nkey: &a [1, 'x']\nother: *a\n";
    let seeds = [POD.as_bytes(), deployment.as_bytes(), list.as_bytes()];
    fuzz::run("manifests", &seeds, &YAML_WORDS, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        match inject::inject_text(Path::new("f"), &text, &config) {
            Ok((out, documents)) => {
                // What comes out is YAML, and is left alone or injected again as before.
                let read = manifest::parse_lenient(Path::new("out"), &out);
                assert!(read.is_ok(), "{text:?} became {out:?}: {read:?}");
                Ok(documents.len())
            }
            Err(error) => Err(refusal(&error.to_string())),
        }
    });
}

#[test]
fn admission_reviews() {
    let config = Config::builtin(&Builtin::default()).unwrap();
    let review = |version: &str, object: serde_json::Value| {
        let request = json!({"uid": "u", "namespace": "default", "operation": "CREATE", "object": object});
        json!({"apiVersion": format!("admission.k8s.io/{version}"), "kind": "AdmissionReview", "request": request})
            .to_string()
    };
    let pod = json!({"metadata": {"name": "a", "labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "i"}]}});
    let generated = json!({
        "metadata": {"generateName": "a-", "annotations": {"sidecar.istio.io/interceptionMode": "TPROXY"}},
        "spec": {"initContainers": [{"name": "x"}], "containers": [{"name": "istio-proxy", "image": "auto"}], "volumes": null},
    });
    let seeds = [review("v1", pod.clone()), review("v1beta1", generated), review("v2", pod)];
    let seeds: Vec<&[u8]> = seeds.iter().map(String::as_bytes).collect();
    let words = [
        "null",
        "{}",
        "[]",
        "\"\"",
        "0",
        "-1",
        "1e400",
        "true",
        "\\u0000",
        "\\ud800",
        "\"containers\":",
        "\"metadata\":",
        "\"annotations\":",
        "\"request\":",
        "\"oldObject\":",
        "\"name\":\"istio-proxy\"",
        "\"hostNetwork\":true",
        "\"sidecar.istio.io/inject\":\"false\"",
        "\"inject.istio.io/templates\":\"sidecar,nosuch\"",
        "\"proxy.istio.io/config\":\"{\"",
    ];
    fuzz::run("admission reviews", &seeds, &words, |bytes| {
        let answer = webhook::handle("/inject", Some("application/json"), bytes, &config);
        if answer.status == 200 {
            let body: serde_json::Value = serde_json::from_slice(&answer.body).expect("an answer is JSON");
            assert!(body["response"]["allowed"].is_boolean(), "{body}");
        }
        let how = match answer.result {
            webhook::Result::Failed(reason) => refusal(&reason),
            webhook::Result::Skipped(rule) => rule.to_string(),
            webhook::Result::Injected => String::new(),
        };
        (answer.status, how)
    });
}

#[test]
fn configurations() {
    let seeds: [&[u8]; 3] = [
        b"policy: enabled\ndefaultTemplates: [sidecar]\naliases: {a: [sidecar]}\ntemplates:\n  sidecar: |\n    spec: {containers: [{name: istio-proxy, image: {{ .Values.a }}}]}\n",
        b"policy: enabled\nalwaysInjectSelector: []\ninjectedAnnotations: {a: b}\ntemplate: |\n  initContainers:\n  - name: istio-init\n    image: [[ .ProxyConfig.Image ]]\n",
        b"policy: disabled\nneverInjectSelector: [{matchLabels: {a: b}}, {matchExpressions: [{key: k, operator: In, values: [v]}]}]\ntemplates: {}\n",
    ];
    fuzz::run("configurations", &seeds, &YAML_WORDS, |bytes| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let texts = Texts { inject: Some(text.clone()), values: None, mesh: None };
        let first = Config::from_texts(&texts, "map", &Builtin::default());
        // The same text as values and as the mesh's settings: refused or taken, by name.
        let rest = Texts { inject: None, values: Some(text.clone()), mesh: Some(text) };
        let second = Config::from_texts(&rest, "map", &Builtin::default());
        let how =
            |read: Result<Config, inject::ConfigError>| read.map(drop).map_err(|error| refusal(&error.to_string()));
        (how(first), how(second))
    });
}
