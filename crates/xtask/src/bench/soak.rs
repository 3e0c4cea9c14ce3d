//! Two sidecars under steady load for a long time, while configuration, certificates and endpoints change.

use super::proxy;
use crate::shell::command;
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MESH: &str = "xtask-soak";

/// Certificates live a minute and are replaced after half of it.
const YAML: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: soak-client, annotations: {proxy.istio.io/config: "proxyMetadata: {SECRET_TTL: 60s}"}}
spec: {containers: [{name: a, image: curlimages/curl, command: [outrigger, sample, sleep]}]}
"#;

const SERVERS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: soak-server}
spec:
  replicas: REPLICAS
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}, annotations: {proxy.istio.io/config: "proxyMetadata: {SECRET_TTL: 60s}"}}
    spec:
      terminationGracePeriodSeconds: 15
      containers:
      - name: echo
        image: example/echo
        command: [outrigger, sample, echo, --port, "8080"]
        ports: [{containerPort: 8080}]
        readinessProbe: {httpGet: {path: /status/200, port: 8080}, periodSeconds: 1}
"#;

const ROUTE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http:
  - match: [{headers: {x-change: {exact: 'CHANGE'}}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: server}}]
  - timeout: 30s
    route: [{destination: {host: server}}]
";

/// Time between two changes of configuration.
const EVERY: Duration = Duration::from_secs(3);

/// Loads for `seconds` at `share` of what the pair can do, while the configuration changes.
pub(crate) fn run(seconds: u64, share: f64, program: Option<PathBuf>) -> anyhow::Result<()> {
    let outrigger = super::program(program)?;
    let fortio = proxy::fortio()?;
    let folder = std::env::temp_dir().join(MESH);
    std::fs::create_dir_all(&folder)?;
    let servers = |replicas: u32| SERVERS.replace("REPLICAS", &replicas.to_string());
    let file = write(&folder, "mesh.yaml", &format!("{YAML}---{}", servers(3)))?;
    let mesh = Mesh(&outrigger);
    let up = mesh.command("up").arg(&file).arg("--detach").stdout(Stdio::null()).status()?;
    if !up.success() {
        bail!("the mesh does not start");
    }
    let load = |rate: &str, time: &str| {
        let mut load = mesh.command("exec");
        load.args(["soak-client", "-c", "a", "--"]).arg(&fortio);
        load.args(["load", "-quiet", "-allow-initial-errors", "-c", "16", "-qps", rate, "-t", time, "-json", "-"]);
        load.arg("http://server:8080/status/200").stdout(Stdio::piped()).stderr(Stdio::null());
        load
    };
    // The first second finds the most that goes through.
    let most = Report::read(&load("0", "5s").output()?.stdout)?;
    let rate = (most.rate * share).max(1.0);
    println!("{:.0} requests a second at most; {rate:.0} for {seconds} s", most.rate);
    let child = load(&format!("{rate:.0}"), &format!("{seconds}s")).spawn()?;
    let (began, mut changes, mut shown) = (Instant::now(), 0u32, 0);
    while began.elapsed() < Duration::from_secs(seconds.saturating_sub(2)) {
        changes += 1;
        let yaml = match changes % 5 {
            0 => servers(2 + changes / 5 % 3),
            _ => ROUTE.replace("CHANGE", &changes.to_string()),
        };
        let file = write(&folder, "change.yaml", &yaml)?;
        let applied = mesh.command("apply").arg("-f").arg(file).stdout(Stdio::null()).status()?;
        if !applied.success() {
            bail!("change {changes} was refused");
        }
        if began.elapsed().as_secs() / 30 >= shown {
            shown = began.elapsed().as_secs() / 30 + 1;
            println!("{:>5} s  {changes:>3} changes  sidecar memory {}", began.elapsed().as_secs(), memory());
        }
        std::thread::sleep((began + EVERY * changes).saturating_duration_since(Instant::now()));
    }
    let report = Report::read(&child.wait_with_output()?.stdout)?;
    println!("{:>5} s  {changes:>3} changes  sidecar memory {}", seconds, memory());
    println!("{} requests, answers by status: {}", report.count, report.codes);
    if report.codes != format!("\"200\": {}", report.count) {
        bail!("requests failed that no configuration explains");
    }
    Ok(())
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let file = folder.join(name);
    std::fs::write(&file, text)?;
    Ok(file)
}

struct Mesh<'a>(&'a Path);

impl Mesh<'_> {
    fn command(&self, verb: &str) -> Command {
        let mut command = command(self.0);
        command.args([verb, "--name", MESH]);
        command
    }
}

impl Drop for Mesh<'_> {
    fn drop(&mut self) {
        let _ = self.command("down").stdout(Stdio::null()).status();
    }
}

/// What fortio's JSON says.
struct Report {
    count: u64,
    rate: f64,
    codes: String,
}

impl Report {
    fn read(json: &[u8]) -> anyhow::Result<Report> {
        let text = String::from_utf8_lossy(json);
        let after = |name: &str| {
            let (_, rest) = text.split_once(&format!("\"{name}\": "))?;
            Some(rest)
        };
        let number = |name: &str| after(name)?.split([',', '\n', '}']).next()?.trim().parse::<f64>().ok();
        let codes = after("RetCodes").and_then(|rest| rest.trim_start_matches('{').split('}').next());
        let codes = codes.with_context(|| format!("the load generator says nothing: {text}"))?;
        Ok(Report {
            count: number("Count").unwrap_or(0.0) as u64,
            rate: number("ActualQPS").unwrap_or(0.0),
            codes: codes.split_whitespace().collect::<Vec<_>>().join(" "),
        })
    }
}

/// Resident and private megabytes of each sidecar of this mesh that runs now.
fn memory() -> String {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let environment = read("environ");
        let ours = environment.split(|b| *b == 0).any(|v| v.starts_with(b"POD_NAME=soak-"));
        let sidecar = read("cmdline").windows(14).any(|w| w == b"proxy\0sidecar\0");
        if !ours || !sidecar {
            continue;
        }
        let rollup = String::from_utf8_lossy(&read("smaps_rollup")).into_owned();
        let megabytes = |field: &str| -> f64 {
            let line = rollup.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or(0.0) * 1024.0 / 1e6
        };
        let name = if environment.windows(20).any(|w| w == b"POD_NAME=soak-client") { "client" } else { "server" };
        all.push(format!("{name} {:.1} ({:.1} private)", megabytes("Rss:"), megabytes("Anonymous:")));
    }
    all.sort();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let json = b"{\n \"ActualQPS\": 99.5,\n \"DurationHistogram\": {\n  \"Count\": 12,\n  \"Min\": 1 },\n \"RetCodes\": {\n  \"200\": 12\n }\n}";
        let report = Report::read(json).unwrap();
        assert_eq!((report.count, report.rate, &*report.codes), (12, 99.5, "\"200\": 12"));
    }
}
