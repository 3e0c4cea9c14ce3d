//! Our proxy beside Envoy: the reference's scenarios in alternating rounds, then start-up and memory.

use crate::setup;
use crate::shell::{build_folder, command, must, on_path, root};
use anyhow::{Context, bail};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const FORTIO: &str = "fortio.org/fortio@v1.68.0";

/// One line of the comparison: the reference's case and how to load it, which figure is compared, and what is asked.
struct Scenario {
    name: &'static str,
    case: &'static str,
    flags: &'static [&'static str],
    /// Column of the reference's table, and the highest ratio to Envoy that meets the aim.
    asks: &'static [(&'static str, f64)],
    /// Latency is what the proxy adds: the same load without a proxy is taken off first.
    added: bool,
    /// With the policies, metrics and log of a sidecar, see `sidecar.py`.
    sidecar: bool,
    /// How many proxies stand in a row, where the floor is shown: `relay.c` in their place, which only moves bytes.
    floor: Option<usize>,
}

const PLAIN: Scenario =
    Scenario { name: "", case: "h1", flags: &[], asks: &[], added: false, sidecar: false, floor: Some(1) };

const SCENARIOS: [Scenario; 11] = [
    Scenario { name: "h1 1 KB, saturated", case: "h1", flags: &["--kind", "sat"], asks: &[("cpu", 0.30)], ..PLAIN },
    Scenario {
        name: "h1 64 KB, saturated",
        case: "h1",
        flags: &["--kind", "sat", "--path", "/64k"],
        asks: &[("cpu", 0.50)],
        ..PLAIN
    },
    Scenario {
        name: "h1 1 KB, 1000 a second",
        case: "h1",
        flags: &["--kind", "rate", "--rt"],
        asks: &[("cpu", 0.32), ("p50", 0.35), ("p99", 0.35)],
        added: true,
        ..PLAIN
    },
    Scenario {
        name: "sidecar 1 KB, saturated",
        flags: &["--kind", "sat"],
        asks: &[("cpu", 0.30)],
        sidecar: true,
        ..PLAIN
    },
    Scenario {
        name: "sidecar 1 KB, 1000/s",
        flags: &["--kind", "rate", "--rt"],
        asks: &[("cpu", 0.32), ("p50", 0.35), ("p99", 0.35)],
        added: true,
        sidecar: true,
        ..PLAIN
    },
    Scenario {
        name: "mTLS pair 1 KB",
        case: "mtls",
        flags: &["--kind", "sat"],
        asks: &[("cpu", 0.25)],
        floor: Some(2),
        ..PLAIN
    },
    // One write carries many of its requests, so that a relay's cost says little.
    Scenario {
        name: "h2 1 KB, saturated",
        case: "h2",
        flags: &["--kind", "sat"],
        asks: &[("cpu", 0.50)],
        floor: None,
        ..PLAIN
    },
    Scenario {
        name: "h2 64 KB, saturated",
        case: "h2",
        flags: &["--kind", "sat", "--path", "/64k"],
        asks: &[("cpu", 0.75)],
        floor: None,
        ..PLAIN
    },
    // Spliced, which the relay does not do.
    Scenario {
        name: "TCP bulk, per GB",
        case: "tcp",
        flags: &["--kind", "bulk"],
        asks: &[("cpu", 0.40)],
        floor: None,
        ..PLAIN
    },
    Scenario {
        name: "TCP short connections",
        case: "tcp",
        flags: &["--kind", "conn"],
        asks: &[("cpu", 0.60)],
        ..PLAIN
    },
    Scenario {
        name: "new mTLS connection",
        case: "hs",
        flags: &["--kind", "hs"],
        asks: &[("cpu", 0.55)],
        floor: None,
        ..PLAIN
    },
];

/// Runs every scenario `rounds` times against each proxy, `seconds` each; `only`: those whose name contains it.
pub(crate) fn run(rounds: u32, seconds: u32, only: Option<&str>, program: Option<PathBuf>) -> anyhow::Result<()> {
    let outrigger = super::program(program)?;
    let bench = Bench::prepare(outrigger)?;
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    println!("{:<24} {:<8} {:>10} {:>10} {:>7} {:>7} {:>7}", "", "figure", "Envoy", "ours", "ratio", "ask", "floor");
    for (index, scenario) in SCENARIOS.iter().enumerate().filter(|(_, scenario)| wanted(scenario.name)) {
        // Ports of their own: sockets of the run before may still wait.
        bench.scenario(scenario, rounds, seconds, 20_000 + 100 * index)?;
    }
    if wanted("start and memory") {
        bench.start_and_memory()?;
    }
    Ok(())
}

/// The load generator, built into the build folder when first needed.
pub(super) fn fortio() -> anyhow::Result<PathBuf> {
    let tools = build_folder().join("tools/bin");
    let fortio = tools.join("fortio");
    if !fortio.exists() {
        must(command("go").args(["install", FORTIO]).env("GOBIN", &tools))?;
    }
    Ok(fortio)
}

struct Bench {
    /// The reference's tools, compiled.
    folder: PathBuf,
    /// The same, with the configuration of a sidecar.
    sidecar: PathBuf,
    envoy: PathBuf,
    outrigger: PathBuf,
    fortio: PathBuf,
}

impl Bench {
    /// Copies the reference's tools into the build folder, where they are compiled.
    fn prepare(outrigger: PathBuf) -> anyhow::Result<Bench> {
        let reference = std::env::var_os("OUTRIGGER_CONFORMANCE")
            .map_or_else(|| root().join("../shared/conformance"), PathBuf::from)
            .with_file_name("bench")
            .join("dataplane");
        if !reference.join("bench.py").exists() {
            bail!("the reference's benchmark is not at {}", reference.display());
        }
        let missing: Vec<_> =
            [("wrk", "wrk"), ("h2load", "nghttp2-client"), ("nghttpd", "nghttp2-server"), ("cc", "gcc")]
                .into_iter()
                .filter(|(program, _)| !on_path(program))
                .map(|(_, package)| package)
                .collect();
        if !missing.is_empty() {
            bail!("install these Debian packages first: {}", missing.join(" "));
        }
        let envoy = setup::envoy().context("there is no Envoy: run `cargo xtask setup` first")?;
        let fortio = fortio()?;
        let prepared = |name: &str| {
            let folder = build_folder().join(name);
            must(Command::new("sh").arg(reference.join("setup.sh")).arg(&folder).stderr(Stdio::null()))?;
            anyhow::Ok(folder)
        };
        let (folder, sidecar) = (prepared("dataplane")?, prepared("dataplane-sidecar")?);
        std::fs::rename(sidecar.join("gen_envoy.py"), sidecar.join("plain.py"))?;
        std::fs::write(sidecar.join("gen_envoy.py"), include_str!("sidecar.py"))?;
        std::fs::write(folder.join("relay.c"), include_str!("relay.c"))?;
        must(Command::new("cc").args(["-O2", "-o", "relay", "relay.c"]).current_dir(&folder))?;
        Ok(Bench { folder, sidecar, envoy: envoy.canonicalize()?, outrigger, fortio })
    }

    fn scenario(&self, scenario: &Scenario, rounds: u32, seconds: u32, port: usize) -> anyhow::Result<()> {
        let mut proxies = "envoy-c1,outrigger-c1".to_owned();
        proxies += if scenario.added { ",direct" } else { "" };
        proxies += if scenario.floor.is_some() { ",relay" } else { "" };
        let relay = format!("relay|{}|{} {{L}} {{U}}", scenario.case, self.folder.join("relay").display());
        let output = Command::new("python3")
            .current_dir(if scenario.sidecar { &self.sidecar } else { &self.folder })
            .args(["bench.py", scenario.case, &proxies])
            .args(std::iter::repeat_n(["--add", &relay], scenario.floor.unwrap_or(0)).flatten())
            .args(scenario.flags)
            .args(["--rounds", &rounds.to_string(), "--secs", &seconds.to_string(), "--base", &port.to_string()])
            .env("ENVOY", &self.envoy)
            .env("OUTRIGGER", &self.outrigger)
            .env("FORTIO", &self.fortio)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let table = Table::read(&text);
        for (figure, ask) in scenario.asks {
            let base = match (*figure, scenario.added) {
                ("cpu", _) | (_, false) => 0.0,
                (figure, true) => table.cell("direct", figure).unwrap_or(0.0),
            };
            let cell = |proxy: &str| Some(table.cell(proxy, figure)? - base);
            let (Some(envoy), Some(ours)) = (cell("envoy-c1"), cell("outrigger-c1")) else {
                bail!("{}: no figures:\n{text}{}", scenario.name, String::from_utf8_lossy(&output.stderr));
            };
            // The reference takes the median of the rounds' ratios, which other load on the machine disturbs less.
            let ratio = |proxy: &str| match *figure {
                "cpu" => table.cell(proxy, "cpu ratio"),
                _ => Some(cell(proxy)? / envoy),
            };
            let floor = scenario.floor.and_then(|_| ratio("relay"));
            line(scenario.name, figure, (envoy, ours), ratio("outrigger-c1"), &format!("{ask:.2}"), floor);
        }
        Ok(())
    }

    /// Median of five starts each: to the first accepted connection, memory then, and with 1,000 connections.
    fn start_and_memory(&self) -> anyhow::Result<()> {
        let _backend = Running(
            Command::new(self.folder.join("backend"))
                .args(["http", "22000"])
                .spawn()
                .context("no benchmark backend")?,
        );
        let plain = self.configuration(0)?;
        let large = self.configuration(2000)?;
        let envoy = |file: &Path| {
            let mut command = Command::new(&self.envoy);
            command.arg("-c").arg(file).args(["--concurrency", "1", "--log-level", "off", "--disable-hot-restart"]);
            command
        };
        let ours = |file: &Path| {
            let mut command = Command::new(&self.outrigger);
            command.args(["proxy", "-c"]).arg(file).args(["--concurrency", "1", "-l", "off"]);
            command
        };
        let (a, b) = (median(|| start(&mut envoy(&plain), true))?, median(|| start(&mut ours(&plain), true))?);
        let show = |name, figure, both: (f64, f64), ask| line(name, figure, both, Some(both.1 / both.0), ask, None);
        show("start", "ms", (a.start, b.start), "15 ms");
        show("idle", "MB", (a.idle, b.idle), "8 MB");
        show("1,000 connections", "+MB", (a.connections, b.connections), "+13 MB");
        let (a, b) = (median(|| start(&mut envoy(&large), false))?, median(|| start(&mut ours(&large), false))?);
        show("start, 2,000 clusters", "ms", (a.start, b.start), "60 ms");
        show("idle, 2,000 clusters", "MB", (a.idle, b.idle), "15 MB");
        Ok(())
    }

    fn configuration(&self, clusters: u32) -> anyhow::Result<PathBuf> {
        let output = Command::new("python3")
            .arg(self.folder.join("gen_envoy.py"))
            .args(["http", &PORT.to_string(), "22000", "22002", &clusters.to_string()])
            .output()?;
        let file = self.folder.join(format!("conf/start-{clusters}.json"));
        std::fs::write(&file, output.stdout)?;
        Ok(file)
    }
}

const PORT: u16 = 22_001;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds, and megabytes of 2^20 bytes.
struct Start {
    start: f64,
    idle: f64,
    connections: f64,
}

fn start(command: &mut Command, connect: bool) -> anyhow::Result<Start> {
    let began = Instant::now();
    let child = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    while TcpStream::connect(("127.0.0.1", PORT)).is_err() {
        if began.elapsed() > Duration::from_secs(60) {
            bail!("nothing listens after a minute");
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    let took = began.elapsed().as_secs_f64() * 1e3;
    std::thread::sleep(Duration::from_secs(1));
    let idle = resident(child.0.id())?;
    let mut open = Vec::new();
    for _ in 0..if connect { 1000 } else { 0 } {
        let mut stream = TcpStream::connect(("127.0.0.1", PORT))?;
        stream.write_all(b"GET /1k HTTP/1.1\r\nhost: svc-7.default.svc.cluster.local\r\nuser-agent: x\r\n\r\n")?;
        open.push(stream);
    }
    for stream in &mut open {
        let mut answer = [0; 1024];
        stream.read_exact(&mut answer)?;
    }
    std::thread::sleep(Duration::from_millis(300));
    let connections = resident(child.0.id())? - idle;
    Ok(Start { start: took, idle, connections })
}

fn median(run: impl Fn() -> anyhow::Result<Start>) -> anyhow::Result<Start> {
    let runs = (0..5).map(|_| run()).collect::<anyhow::Result<Vec<_>>>()?;
    let of = |figure: fn(&Start) -> f64| {
        let mut all: Vec<f64> = runs.iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Ok(Start { start: of(|run| run.start), idle: of(|run| run.idle), connections: of(|run| run.connections) })
}

fn resident(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes / 1024.0)
}

fn line(name: &str, figure: &str, (envoy, ours): (f64, f64), ratio: Option<f64>, ask: &str, floor: Option<f64>) {
    let show = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
    let (ratio, floor) = (show(ratio), show(floor));
    println!("{name:<24} {figure:<8} {envoy:>10.1} {ours:>10.1} {ratio:>7} {ask:>7} {floor:>7}");
}

/// The Markdown table that the reference's script prints.
struct Table<'a> {
    rows: Vec<Vec<&'a str>>,
}

impl<'a> Table<'a> {
    fn read(text: &'a str) -> Table<'a> {
        let rows = text.lines().filter_map(|line| line.strip_prefix('|'));
        Table { rows: rows.map(|line| line.split('|').map(str::trim).collect()).collect() }
    }

    fn cell(&self, proxy: &str, column: &str) -> Option<f64> {
        let at = self.rows.first()?.iter().position(|name| *name == column)?;
        self.rows.iter().find(|row| row[0] == proxy)?.get(at)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read() {
        let text = "\n### h1\n| proxy | rps | cpu | cpu ratio |\n|---|---|---|---|\n| envoy-c1 | 16068 | 43.4 | 1 |\n\
                    | outrigger-c1 | 23778 | 19.2 | 0.442 |\n";
        let table = Table::read(text);
        assert_eq!(table.cell("envoy-c1", "cpu"), Some(43.4));
        assert_eq!(table.cell("outrigger-c1", "cpu ratio"), Some(0.442));
        assert_eq!(table.cell("direct", "cpu"), None);
    }
}
