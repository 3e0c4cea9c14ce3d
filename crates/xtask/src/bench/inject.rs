use crate::shell::root;
use anyhow::{Context, ensure};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Injection: one pod, the webhook's whole answer on one core, and `kube-inject` of bookinfo as a process.
pub(crate) fn run(pods: u32, program: Option<std::path::PathBuf>) -> anyhow::Result<()> {
    let outrigger = super::program(program)?;
    // The webhook's code in a process of its own: it prints what it measured.
    let mut measured = Command::new(&outrigger)
        .args(["inject", "review", "--measure", &pods.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", outrigger.display()))?;
    measured.stdin.take().context("its input is piped")?.write_all(REVIEW.as_bytes())?;
    let output = measured.wait_with_output()?;
    ensure!(output.status.success(), "inject review failed: {}", output.status);
    println!(
        "webhook: {} (asked: median at most 1 ms, at least 1000 pods/s)",
        String::from_utf8_lossy(&output.stdout).trim()
    );
    kube_inject(&outrigger)
}

/// A pod of bookinfo, as the API server sends it.
const REVIEW: &str = r#"{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
  "uid": "1", "namespace": "default", "operation": "CREATE", "object": {
    "metadata": {
      "generateName": "productpage-v1-5b8c7c5f4-",
      "labels": {"app": "productpage", "version": "v1", "pod-template-hash": "5b8c7c5f4"},
      "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9080"},
      "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "productpage-v1-5b8c7c5f4",
        "controller": true, "uid": "2"}]},
    "spec": {
      "serviceAccountName": "bookinfo-productpage",
      "containers": [{
        "name": "productpage", "image": "docker.io/istio/examples-bookinfo-productpage-v1:1.20.3",
        "ports": [{"containerPort": 9080, "name": "http"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}],
      "volumes": [{"name": "tmp", "emptyDir": {}}]}}}}"#;

/// Wall time from start to end and the largest resident memory, over 20 runs.
fn kube_inject(outrigger: &std::path::Path) -> anyhow::Result<()> {
    let file = root().join("samples/bookinfo/bookinfo.yaml");
    let mut times = Vec::new();
    let mut memory = 0;
    for _ in 0..20 {
        let started = Instant::now();
        let child = Command::new(outrigger).args(["kube-inject", "-f"]).arg(&file).stdout(Stdio::null()).spawn()?;
        let status = wait(child, &mut memory)?;
        ensure!(status, "kube-inject failed");
        times.push(started.elapsed());
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    println!(
        "kube-inject of bookinfo, process included: median {:.1} ms, at most {:.1} ms, peak memory {:.1} MiB (asked: at most 20 ms, 20 MiB)",
        milliseconds(median),
        milliseconds(times[times.len() - 1]),
        memory as f64 / 1024.0
    );
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Waits for the end; `memory` becomes the largest resident set seen, in KiB, which the kernel keeps until then.
fn wait(mut child: std::process::Child, memory: &mut u64) -> anyhow::Result<bool> {
    let path = format!("/proc/{}/status", child.id());
    loop {
        let status = std::fs::read_to_string(&path).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
        *memory = (*memory).max(peak.unwrap_or(0));
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
