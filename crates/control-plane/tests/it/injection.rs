//! Injection through a real API server: `outrigger install`, templates that change, a root that is replaced.

use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kube_source::{Cluster, Options};
use kube_test::KubeLite;
use serde_json::{Value, json};

use crate::kubernetes::program;
use crate::mesh::Mesh;

/// How long anything may take; machines of tests are busy.
const PATIENCE: Duration = Duration::from_secs(40);

/// Own, so that no other control plane of the tests takes the webhooks for its own.
const REVISION: &str = "canary";

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let asked = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(asked.elapsed() < PATIENCE, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn pod(name: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "app", "image": "app:1"}]},
    })
}

/// Makes the pod; the API server's answer is the pod after admission.
fn create(kube: &KubeLite, namespace: &str, pod: &Value) -> Result<Value, String> {
    let output = kube.kubectl_with_input(&["create", "-n", namespace, "-o", "json", "-f", "-"], &pod.to_string());
    if output.success {
        serde_json::from_str(&output.stdout).map_err(|error| error.to_string())
    } else {
        Err(output.stderr)
    }
}

fn injected(pod: &Value) -> bool {
    let containers = |list: &str| pod["spec"][list].as_array().cloned().unwrap_or_default();
    containers("containers").iter().chain(&containers("initContainers")).any(|one| one["name"] == "istio-proxy")
}

/// Ends the process with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ports() -> [u16; 4] {
    let free = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    free.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn an_installed_control_plane_injects_and_follows_its_templates() {
    let Some(kube) = KubeLite::shared("injection") else { return };
    let [grpc, secure, webhook, monitoring] = ports();
    let verb = |verb: &str, more: &[&str]| {
        let output = program()
            .args([verb, "--revision", REVISION, "--kubeconfig"])
            .arg(kube.kubeconfig())
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let url = format!("https://127.0.0.1:{webhook}");
    verb("install", &["--webhook-url", &url]);
    let address = |port: u16| format!("127.0.0.1:{port}");
    let _running = Running(
        program()
            .args(["control-plane", "--revision", REVISION, "--native-sidecars", "false", "--kubeconfig"])
            .arg(kube.kubeconfig())
            .args(["--grpcAddr", &address(grpc), "--secureGRPCAddr", &address(secure)])
            .args(["--httpsAddr", &address(webhook), "--monitoringAddr", &address(monitoring)])
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let namespace = kube.namespace("inject");
    let plain = kube.namespace("plain");
    let labelled = kube.kubectl(&["label", "namespace", &namespace, &format!("istio.io/rev={REVISION}")]);
    assert!(labelled.success, "{}", labelled.stderr);

    // Once the API server trusts the webhook, a Deployment's pods are injected.
    until("the webhook answers", || create(kube, &namespace, &pod("first", json!({}))).ok().filter(injected));
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "app", "image": "app:1"}]},
            },
        },
    });
    kube.apply(&namespace, &deployment.to_string());
    let web = until("the Deployment's pod", || {
        let pods = kube.kubectl(&["get", "pods", "-n", &namespace, "-l", "app=web", "-o", "json"]);
        let pods: Value = serde_json::from_str(&pods.stdout).ok()?;
        pods["items"].get(0).cloned()
    });
    assert!(injected(&web), "{web}");
    assert_eq!(web["metadata"]["labels"]["service.istio.io/canonical-name"], "web");

    // Who opts out is left alone; so is who is not labelled, unless its pod asks for the revision.
    let out = create(kube, &namespace, &pod("out", json!({"sidecar.istio.io/inject": "false"}))).unwrap();
    assert!(!injected(&out));
    assert!(!injected(&create(kube, &plain, &pod("plain", json!({}))).unwrap()));
    assert!(injected(&create(kube, &plain, &pod("asks", json!({"istio.io/rev": REVISION}))).unwrap()));

    // A pod with invalid annotations is refused, with all of them named.
    let mut wrong = pod("wrong", json!({}));
    wrong["metadata"]["annotations"] =
        json!({"traffic.sidecar.istio.io/includeInboundPorts": "x", "sidecar.istio.io/interceptionMode": "y"});
    let refused = create(kube, &namespace, &wrong).unwrap_err();
    assert!(refused.contains("includeInboundPorts") && refused.contains("interceptionMode"), "{refused}");

    // A template that changes applies to the next pods, a broken one does not.
    let map = format!("istio-sidecar-injector-{REVISION}");
    let write = |added: &str| {
        let config = format!(
            "policy: enabled\ndefaultTemplates: [only]\ntemplates:\n  only: |\n    metadata: {{labels: {{added: {added}}}}}\n    spec:\n      containers: [{{name: istio-proxy, image: proxy}}]\n"
        );
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": map}, "data": {"config": config},
        });
        kube.apply("istio-system", &map.to_string());
    };
    let mut count = 0;
    let mut next = || {
        count += 1;
        create(kube, &namespace, &pod(&format!("next-{count}"), json!({}))).unwrap()
    };
    write("one");
    until("the new template", || Some(next()).filter(|pod| pod["metadata"]["labels"]["added"] == "one"));
    write("'{{ .Broken'");
    until("the broken template is counted", || {
        let metrics = page(monitoring, "/metrics");
        metrics.contains("outrigger_injection_config_loads_total{result=\"refused\"} 1").then_some(())
    });
    let after = next();
    assert!(injected(&after) && after["metadata"]["labels"]["added"] == "one", "{after}");
    assert!(page(monitoring, "/metrics").contains("sidecar_injection_success_total"));

    // What was installed goes, and nothing else.
    let removed = verb("uninstall", &[]);
    assert!(removed.contains("MutatingWebhookConfiguration istio-sidecar-injector-canary removed"), "{removed}");
    assert_eq!(verb("uninstall", &[]), "");
    let left = kube.kubectl(&["get", "crd", "sidecars.networking.istio.io"]);
    assert!(left.success, "{}", left.stderr);
}

/// `GET` of a page in clear text.
fn page(port: u16, path: &str) -> String {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    let mut text = String::new();
    let _ = write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let _ = stream.read_to_string(&mut text);
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replacing_the_root_refuses_no_pod() {
    let Some(kube) = KubeLite::shared("the root is replaced") else { return };
    let mesh = Mesh::start().await;
    let options = Options { kubeconfig: Some(kube.kubeconfig().to_owned()), context: None };
    let cluster = Cluster::connect(&options).await.unwrap();
    let namespace = kube.namespace("rotate");
    let hook = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "rotation", "labels": {"istio.io/rev": "rotation"}},
        "webhooks": [{
            "name": "rotation.sidecar-injector.istio.io",
            "clientConfig": {"url": format!("https://{}/inject", mesh.webhook)},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
            "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Fail",
        }],
    });
    kube.apply("default", &hook.to_string());
    let keeping = control_plane::keep_webhooks_trusting(cluster, mesh.authority.clone(), "rotation".to_owned());
    let keeping = tokio::spawn(keeping);
    let stop = AtomicBool::new(false);
    let roots = || {
        let get = kube.kubectl(&["get", "mutatingwebhookconfiguration", "rotation", "-o", "json"]);
        let hook: Value = serde_json::from_str(&get.stdout).unwrap_or_default();
        let bundle = hook["webhooks"][0]["clientConfig"]["caBundle"].as_str().unwrap_or_default().to_owned();
        // Base64 of both: the length tells how many.
        bundle.len() / (mesh.authority.root_pem().len() * 4 / 3 - 40)
    };
    let (made, failed) = tokio::task::block_in_place(|| {
        until("the first pod", || create(kube, &namespace, &pod("first", json!({}))).ok().filter(injected));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2)
                .map(|worker| {
                    let (stop, namespace) = (&stop, &namespace);
                    scope.spawn(move || {
                        let (mut made, mut failed) = (0, Vec::new());
                        while !stop.load(Ordering::Relaxed) {
                            made += 1;
                            match create(kube, namespace, &pod(&format!("load-{worker}-{made}"), json!({}))) {
                                Ok(pod) if injected(&pod) => {}
                                Ok(pod) => failed.push(format!("not injected: {pod}")),
                                Err(error) => failed.push(error),
                            }
                        }
                        (made, failed)
                    })
                })
                .collect();
            mesh.authority.rotate("cluster.local").unwrap();
            until("both roots are trusted", || (roots() == 2).then_some(()));
            // The API server takes what a webhook says from its own watch.
            std::thread::sleep(Duration::from_secs(1));
            assert!(mesh.authority.activate());
            std::thread::sleep(Duration::from_secs(2));
            stop.store(true, Ordering::Relaxed);
            let results = workers.into_iter().map(|worker| worker.join().unwrap());
            results.fold((0, Vec::new()), |(made, mut all), (more, failed): (usize, Vec<String>)| {
                all.extend(failed);
                (made + more, all)
            })
        })
    });
    keeping.abort();
    kube.kubectl(&["delete", "mutatingwebhookconfiguration", "rotation"]);
    assert!(failed.is_empty(), "{} of {made}: {}", failed.len(), failed[0]);
    assert!(made > 4, "{made} pods");
}
