use crate::shell::{must, root};
use anyhow::{Context, bail};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

const MESH: &str = "xtask-bench-agent";
/// Queries on their way at a time, as from a handful of programs.
const WINDOW: usize = 16;
const SERVER: &str = "127.0.0.1:15053";

/// Bookinfo with DNS capture; then pods with productpage's configuration one after the other, on the idle mesh.
const MESH_CONFIG: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: 'defaultConfig: {concurrency: 1, proxyMetadata: {ISTIO_META_DNS_CAPTURE: \"true\"}}'}
";
const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: NAME, labels: {app: productpage, version: v1}}
spec: {serviceAccountName: bookinfo-productpage, containers: [{name: a, image: curlimages/curl, command: [outrigger, sample, sleep]}]}
";

/// How soon a sidecar is ready, what it holds in memory, and how many names it resolves.
pub(crate) fn run(runs: u32, program: Option<PathBuf>) -> anyhow::Result<()> {
    let program = super::program(program)?;
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("mesh.yaml");
    std::fs::write(&config, MESH_CONFIG)?;
    let mesh = Mesh { program: &program };
    let mut up = Command::new(&program);
    up.args(["up", "samples/bookinfo"]).arg(&config).args(["--detach", "--name", MESH]).current_dir(root());
    if !up.stdout(std::process::Stdio::null()).status()?.success() {
        bail!("`{up:?}` failed");
    }
    let mut ready = Vec::new();
    let mut resident = Vec::new();
    for run in 0..runs {
        let name = format!("bench-{run}");
        let file = folder.path().join("pod.yaml");
        std::fs::write(&file, POD.replace("NAME", &name))?;
        mesh.run(&["apply", "-f", &file.display().to_string()])?;
        let pid = mesh.sidecar(&name)?;
        ready.push(mesh.ready(&name, pid)?);
        std::thread::sleep(Duration::from_secs(1));
        resident.push(memory(pid)?);
        mesh.run(&["delete", "Pod", &name])?;
    }
    ready.sort();
    resident.sort_by(f64::total_cmp);
    let last = ready.len() - 1;
    println!(
        "ready after start   {:>9.0} ms   (asked: at most 150; median of {runs}, slowest {:.0} ms)",
        ms(ready[last / 2]),
        ms(ready[last])
    );
    println!(
        "resident memory     {:>9.1} MB   (asked: at most 12; median, largest {:.1} MB)",
        resident[last / 2],
        resident[last]
    );
    let pid = mesh.sidecar("productpage-v1")?;
    let mut load = Command::new("nsenter");
    load.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(std::env::current_exe()?).args(["bench", "dns-load"]);
    must(&mut load)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

struct Mesh<'a> {
    program: &'a Path,
}

impl Mesh<'_> {
    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(self.program).args(arguments).args(["--name", MESH]).output()?;
        if !output.status.success() {
            bail!("outrigger {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The process of a pod's agent, as soon as there is one.
    fn sidecar(&self, pod: &str) -> anyhow::Result<u32> {
        wait_for(&format!("the sidecar of {pod}"), || {
            processes().find(|pid| {
                let read = |what: &str| std::fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
                let environment = read("environ");
                let named = environment
                    .split(|byte| *byte == 0)
                    .any(|variable| variable.starts_with(format!("POD_NAME={pod}").as_bytes()));
                named && String::from_utf8_lossy(&read("cmdline")).contains("\0proxy\0")
            })
        })
    }

    /// From the start of the process to the line that says it is ready.
    fn ready(&self, pod: &str, pid: u32) -> anyhow::Result<Duration> {
        let line = wait_for("a ready sidecar", || {
            let log = self.run(&["logs", pod, "-c", "istio-proxy"]).ok()?;
            log.lines().find(|line| line.contains(" ready after=")).map(str::to_owned)
        })?;
        let stamp = line.split_whitespace().next().unwrap_or_default().to_owned();
        let output = Command::new("date").args(["-d", &stamp, "+%s.%N"]).output()?;
        let at: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().context("the log's time")?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Field 22, counted behind the program's name: clock ticks since boot, a hundredth of a second each.
        let ticks: f64 =
            stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19)).context("stat")?.parse()?;
        let uptime = std::fs::read_to_string("/proc/uptime")?;
        let uptime: f64 = uptime.split_whitespace().next().context("uptime")?.parse()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        Ok(Duration::from_secs_f64((at - (now - uptime + ticks / 100.0)).max(0.0)))
    }
}

impl Drop for Mesh<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["down"]);
    }
}

fn processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Resident memory in MB.
fn memory(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.split_whitespace().next().context("VmRSS")?.parse()?;
    Ok(kilobytes / 1024.0)
}

fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = attempt() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within 30 s");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks the agent's server in this network namespace for mesh names as fast as it answers, for three seconds.
pub(crate) fn dns_load() -> anyhow::Result<()> {
    let names =
        ["productpage", "details", "reviews", "ratings"].map(|name| format!("{name}.default.svc.cluster.local"));
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(SERVER)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut sent_at = vec![Instant::now(); 1 << 16];
    let mut latencies = Vec::with_capacity(1 << 20);
    let (mut next, mut lost) = (0u16, 0);
    let mut buffer = [0; 512];
    let send = |id: u16, at: &mut Vec<Instant>| -> std::io::Result<()> {
        at[usize::from(id)] = Instant::now();
        socket.send(&query(id, &names[usize::from(id) % names.len()])).map(drop)
    };
    for _ in 0..WINDOW {
        send(next, &mut sent_at)?;
        next = next.wrapping_add(1);
    }
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        match socket.recv(&mut buffer) {
            // An answer with at least one record.
            Ok(n) if n > 12 && buffer[7] > 0 => {
                latencies.push(sent_at[usize::from(u16::from_be_bytes([buffer[0], buffer[1]]))].elapsed());
            }
            Ok(_) => bail!("the agent does not know bookinfo's names"),
            Err(_) => lost += WINDOW,
        }
        send(next, &mut sent_at)?;
        next = next.wrapping_add(1);
    }
    let rate = latencies.len() as f64 / started.elapsed().as_secs_f64();
    latencies.sort();
    let at = |part: f64| latencies.get((latencies.len() as f64 * part) as usize).map_or(0.0, |l| l.as_secs_f64() * 1e6);
    println!("DNS answers         {rate:>9.0} /s   (asked: at least 20000 on one core; {lost} lost)");
    println!(
        "DNS median, p99     {:>9.0} µs {:>6.0} µs   (asked: p99 below 1000; {WINDOW} queries at a time, asker on the same machine)",
        at(0.5),
        at(0.99)
    );
    Ok(())
}

/// A query for an IPv4 address.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut packet = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    packet[..2].copy_from_slice(&id.to_be_bytes());
    for label in name.split('.') {
        packet.push(label.len() as u8);
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 0, 1, 0, 1]);
    packet
}
