//! What users blame the agent for: first requests, jobs that never end, restarts, outages, rotations. All with real processes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use e2e::{Mesh, Output, can_run_meshes, get, sample};

const SERVER: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{name: http, port: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server}
spec:
  replicas: 3
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}, annotations: {proxy.istio.io/config: "proxyMetadata: METADATA", example/restarted: "GENERATION"}}
    spec:
      containers:
      - name: echo
        image: example/echo
        command: [outrigger, sample, echo, --port, "8080"]
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /status/200, port: 8080}, periodSeconds: 1}
"#;

const CLIENT: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: client, annotations: {proxy.istio.io/config: "proxyMetadata: METADATA"}}
spec: {containers: [{name: a, image: curlimages/curl, command: [outrigger, sample, sleep]}]}
"#;

/// Each request a connection, so each one a handshake.
const NO_REUSE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: server}
spec: {host: server, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 1}}}}
";

const JOB: &str = r#"
apiVersion: batch/v1
kind: Job
metadata: {name: first}
spec:
  completions: 200
  parallelism: 8
  backoffLimit: 0
  template:
    spec: {restartPolicy: Never, containers: [{name: a, image: curlimages/curl, command: [curl, -sS, -f, -o, /dev/null, "http://server:8080/status/200"]}]}
"#;

/// The lengths that are promised (a minute without control plane, five of certificates that live one) take too long for every run;
/// with `OUTRIGGER_FULL_LENGTH` set they are kept.
fn length(short: u64, full: u64) -> u64 {
    if std::env::var_os("OUTRIGGER_FULL_LENGTH").is_some() { full } else { short }
}

fn server(generation: &str, metadata: &str) -> String {
    SERVER.replace("GENERATION", generation).replace("METADATA", metadata)
}

/// Manifests in a folder of their own.
struct Manifests(tempfile::TempDir);

impl Manifests {
    fn new(files: &[(&str, &str)]) -> Manifests {
        let folder = Manifests(tempfile::tempdir().unwrap());
        files.iter().for_each(|(name, text)| drop(folder.write(name, text)));
        folder
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn up(&self, name: &str) -> Arc<Mesh> {
        Arc::new(Mesh::up(name, &[self.0.path().to_str().unwrap()]).unwrap())
    }
}

/// Requests from inside the mesh, by curl in the client's pod: four of them, each at a quarter of the rate.
struct InnerLoad(Vec<JoinHandle<String>>);

impl InnerLoad {
    fn start(mesh: &Arc<Mesh>, rate: u32, seconds: u32) -> InnerLoad {
        let one = |_| {
            let (mesh, rate) = (mesh.clone(), format!("{}/s", rate / 4));
            let url = format!(
                "http://server:8080/status/200?[1-{}]",
                rate.trim_end_matches("/s").parse::<u32>().unwrap() * seconds
            );
            std::thread::spawn(move || {
                let curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}\n", "--rate", &rate, &url];
                mesh.exec("client", "a", &curl).stdout
            })
        };
        InnerLoad((0..4).map(one).collect())
    }

    /// Waits for the end; how many requests there were, and the statuses other than 200.
    fn end(self) -> (usize, Vec<String>) {
        let all: Vec<String> = self
            .0
            .into_iter()
            .flat_map(|one| one.join().unwrap().lines().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        (all.len(), all.into_iter().filter(|status| status != "200").collect())
    }
}

fn until(what: &str, patience: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn statuses(mesh: &Mesh, prefix: &str) -> Vec<String> {
    let pods = mesh.pods().unwrap_or_default();
    let ours = pods.iter().filter(|pod| pod["name"].as_str().is_some_and(|name| name.starts_with(prefix)));
    ours.filter_map(|pod| Some(pod["status"].as_str()?.to_owned())).collect()
}

/// A failed first request fails its pod, and with no retries the job stops: so all complete only if none fails, and only if no
/// sidecar outlives its application.
#[test]
fn a_first_request_never_fails_and_jobs_end() {
    if !can_run_meshes("a_first_request_never_fails_and_jobs_end") {
        return;
    }
    let manifests = Manifests::new(&[("server.yaml", &server("1", "{}"))]);
    let mesh = manifests.up("e2e-first");
    mesh.apply(&manifests.write("job.yaml", JOB));
    until("200 jobs", Duration::from_secs(240), || {
        let statuses = statuses(&mesh, "first-");
        assert!(!statuses.iter().any(|status| status == "Error"), "{statuses:?}");
        statuses.iter().filter(|status| *status == "Completed").count() == 200
    });
}

#[test]
fn restarts_and_a_missing_control_plane_lose_nothing() {
    if !can_run_meshes("restarts_and_a_missing_control_plane_lose_nothing") {
        return;
    }
    let manifests =
        Manifests::new(&[("server.yaml", &server("1", "{}")), ("client.yaml", &CLIENT.replace("METADATA", "{}"))]);
    let mesh = manifests.up("e2e-restart");

    let load = InnerLoad::start(&mesh, 500, 14);
    std::thread::sleep(Duration::from_secs(1));
    let before = mesh.pods().unwrap();
    mesh.apply(&manifests.write("server.yaml", &server("2", "{}")));
    let old: Vec<&str> =
        before.iter().filter_map(|pod| pod["name"].as_str()).filter(|name| name.starts_with("server-")).collect();
    until("the rollout", Duration::from_secs(60), || {
        let now = mesh.pods().unwrap_or_default();
        let ready = |name: &str| name.starts_with("server-") && !old.contains(&name);
        let fresh = now.iter().filter(|pod| pod["name"].as_str().is_some_and(ready) && pod["settled"] == true).count();
        fresh == 3 && !now.iter().any(|pod| pod["name"].as_str().is_some_and(|name| old.contains(&name)))
    });
    let (sent, failed) = load.end();
    println!("rolling restart: {sent} requests, {} failed", failed.len());
    assert!(sent > 1000 && failed.is_empty(), "rolling restart: {sent} sent, failed: {failed:?}");

    // Not only new connections to the control plane fail: what is open breaks with the next packet.
    let away = length(8, 60);
    let load = InnerLoad::start(&mesh, 500, away as u32 + 4);
    let pods: Vec<String> =
        mesh.pods().unwrap().iter().filter_map(|pod| Some(pod["name"].as_str()?.to_owned())).collect();
    let cut = "add table inet cut; add chain inet cut o { type filter hook output priority -300; }; \
        add rule inet cut o tcp dport {15010, 15012} reject with tcp reset";
    for pod in &pods {
        let done = mesh.in_pod_network(pod, &["nft", cut]);
        assert!(done.success, "{}", done.all());
    }
    std::thread::sleep(Duration::from_secs(away));
    for pod in &pods {
        mesh.in_pod_network(pod, &["nft", "delete table inet cut"]);
    }
    let (sent, failed) = load.end();
    println!("control plane away: {sent} requests, {} failed", failed.len());
    assert!(sent > 1000 && failed.is_empty(), "control plane away: {sent} sent, failed: {failed:?}");
    until("sidecars connected again", Duration::from_secs(60), || {
        mesh.pods().unwrap_or_default().iter().all(|pod| pod["sidecar"] == "synced")
    });
}

#[test]
fn certificates_and_the_root_rotate_without_a_failed_handshake() {
    if !can_run_meshes("certificates_and_the_root_rotate_without_a_failed_handshake") {
        return;
    }
    let ttl = length(8, 60);
    let short = &format!("{{SECRET_TTL: {ttl}s}}");
    let manifests = Manifests::new(&[
        ("server.yaml", &server("1", short)),
        ("client.yaml", &CLIENT.replace("METADATA", short)),
        ("rule.yaml", NO_REUSE),
    ]);
    let mesh = manifests.up("e2e-rotate");
    let log = |mesh: &Mesh| Output::of(mesh.command("logs").args(["client", "-c", "istio-proxy"])).all();
    // New ones come at half their life, with some jitter.
    let seconds = length(24, 300);
    let load = InnerLoad::start(&mesh, 200, seconds as u32);
    std::thread::sleep(Duration::from_secs(6));
    let rotated = Output::of(Command::new(e2e::outrigger().get_program()).args([
        "ca",
        "rotate-root",
        "--name",
        "e2e-rotate",
        "--settle",
        "4",
    ]));
    assert!(rotated.success && rotated.stdout.contains("the new root signs"), "{}", rotated.all());
    let (sent, failed) = load.end();
    let log = log(&mesh);
    let renewed = log.matches("new workload certificate").count();
    println!("rotation: {sent} requests, {} failed; {renewed} certificates of the client", failed.len());
    assert!(sent > 1000 && failed.is_empty(), "rotation: {sent} sent, failed: {failed:?}\n{log}");
    assert!(renewed >= 4 && log.contains("further root certificates are trusted"), "{log}");
    assert!(log.contains("roots=2"), "{log}");
}

/// Pods exactly as real Istio's injection made them.
fn injected_bookinfo() -> Option<String> {
    let folder = std::env::var_os("OUTRIGGER_CONFORMANCE").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"));
    std::fs::read_to_string(folder.join("inject/x-bookinfo-all-no-native/expected.yaml")).ok()
}

fn serves_the_page_with_every_probe_green(name: &str, manifest: &str, port: u16) {
    let manifests = Manifests::new(&[("bookinfo.yaml", manifest)]);
    let publish = format!("productpage:9080={port}");
    // Injected already: the mesh is not to do it again.
    let arguments = [manifests.0.path().to_str().unwrap(), "--no-default-injection", "--publish", publish.as_str()];
    let mesh = Mesh::up(name, &arguments).unwrap();
    let pods = mesh.pods().unwrap();
    assert!(pods.len() == 6 && pods.iter().all(|pod| pod["ready"] == 2), "{pods:?}");
    until("the page", Duration::from_secs(20), || {
        let page = get(port, "/productpage", &[]).text;
        page.starts_with("HTTP/1.1 200") && page.contains("An extremely entertaining play by Shakespeare")
    });
    for pod in &pods {
        let pod = pod["name"].as_str().unwrap();
        let ready =
            mesh.exec(pod, "istio-proxy", &["pilot-agent", "request", "--debug-port=15020", "GET", "healthz/ready"]);
        assert!(ready.success, "{pod}: {}", ready.all());
        let metrics =
            mesh.exec(pod, "istio-proxy", &["pilot-agent", "request", "--debug-port=15020", "GET", "stats/prometheus"]);
        assert!(
            metrics.stdout.contains("istio_agent_") && metrics.stdout.contains("envoy_"),
            "{pod}: {}",
            metrics.all()
        );
    }
}

#[test]
fn pods_that_real_istio_injected_run_on_our_agent_and_proxy() {
    let test = "pods_that_real_istio_injected_run_on_our_agent_and_proxy";
    let Some(manifest) = injected_bookinfo() else {
        println!("SKIPPED: {test}: no reference data; set OUTRIGGER_CONFORMANCE to its folder");
        return;
    };
    if can_run_meshes(test) {
        serves_the_page_with_every_probe_green("e2e-injected", &manifest, 19191);
    }
}

#[test]
fn pods_that_real_istio_injected_run_on_our_agent_with_real_envoy() {
    let test = "pods_that_real_istio_injected_run_on_our_agent_with_real_envoy";
    let envoy = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| sample("../../build"), PathBuf::from).join("envoy");
    let Some(manifest) = injected_bookinfo() else {
        println!("SKIPPED: {test}: no reference data; set OUTRIGGER_CONFORMANCE to its folder");
        return;
    };
    let Ok(envoy) = envoy.canonicalize() else {
        println!("SKIPPED: {test}: no Envoy; `cargo xtask setup` installs it");
        return;
    };
    if can_run_meshes(test) {
        let arguments = format!("- sidecar\n        - --proxy=envoy\n        - --binaryPath={}\n", envoy.display());
        let manifest = manifest.replace("- sidecar\n", &arguments);
        assert!(manifest.contains("--proxy=envoy"), "the reference data has another shape");
        serves_the_page_with_every_probe_green("e2e-injected-envoy", &manifest, 19192);
    }
}

/// The agent's certificates, by a tool that is not ours.
#[test]
fn openssl_verifies_what_a_workload_got() {
    if !can_run_meshes("openssl_verifies_what_a_workload_got") {
        return;
    }
    let metadata = "{OUTPUT_CERTS: /etc/istio/proxy/certs}";
    let manifests = Manifests::new(&[("client.yaml", &CLIENT.replace("METADATA", metadata))]);
    let mesh = manifests.up("e2e-openssl");
    let dir = "/etc/istio/proxy/certs";
    let openssl = |command: &str| {
        let command = command.replace("DIR", dir);
        mesh.exec("client", "istio-proxy", &["sh", "-c", &command]).all()
    };
    let verified = openssl(
        "openssl verify -x509_strict -purpose sslserver -CAfile DIR/root-cert.pem -untrusted DIR/cert-chain.pem DIR/cert-chain.pem",
    );
    assert!(verified.trim().ends_with(": OK"), "{verified}");
    let client = openssl("openssl verify -purpose sslclient -CAfile DIR/root-cert.pem DIR/cert-chain.pem");
    assert!(client.trim().ends_with(": OK"), "{client}");
    let text = openssl("openssl x509 -in DIR/cert-chain.pem -noout -text");
    assert!(text.contains("URI:spiffe://cluster.local/ns/default/sa/default"), "{text}");
    assert!(text.contains("prime256v1") && text.contains("CA:FALSE"), "{text}");
    let keys = openssl("openssl x509 -in DIR/cert-chain.pem -noout -pubkey; openssl pkey -in DIR/key.pem -pubout");
    let halves: Vec<&str> =
        keys.split("-----END PUBLIC KEY-----").map(str::trim).filter(|half| !half.is_empty()).collect();
    assert!(halves.len() == 2 && halves[0] == halves[1], "the key is the certificate's: {keys}");
    assert_eq!(openssl("stat -c %a DIR/key.pem").trim(), "600");
}
