use crate::shell::{command, show};
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MESH: &str = "xtask-bench";

/// Starts bookinfo `runs` times and prints each run; memory is read after 200 page views.
pub(crate) fn run(runs: u32, program: Option<PathBuf>) -> anyhow::Result<()> {
    let outrigger = super::program(program)?;
    println!("run  page served   pods+control plane (RSS)  shared counted once (PSS)   largest sidecar (RSS)");
    for run in 1..=runs {
        let started = Instant::now();
        let mut up = command(&outrigger);
        up.args(["up", "samples/bookinfo", "--detach", "--name", MESH, "--publish", "productpage:9080=19080"]);
        let _mesh = Mesh::start(&outrigger, &mut up)?;
        let page = "http://127.0.0.1:19080/productpage";
        while !curl(page) {
            if started.elapsed() > Duration::from_secs(60) {
                bail!("the page was not served within a minute");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let served = started.elapsed();
        for _ in 0..200 {
            curl(page);
        }
        let memory = memory()?;
        println!(
            "{run:>3}  {:>9.2} s  {:>20.1} MB  {:>24.1} MB  {:>20.1} MB",
            served.as_secs_f64(),
            memory.resident,
            memory.proportional,
            memory.largest_sidecar
        );
    }
    Ok(())
}

/// A running mesh that is taken down when the measurement ends, however it ends.
struct Mesh<'a> {
    outrigger: &'a std::path::Path,
}

impl<'a> Mesh<'a> {
    fn start(outrigger: &'a std::path::Path, up: &mut Command) -> anyhow::Result<Mesh<'a>> {
        let status = up.stdout(Stdio::null()).status().with_context(|| format!("cannot run {}", show(up)))?;
        let mesh = Mesh { outrigger };
        if !status.success() {
            bail!("`{}` failed: {status}", show(up));
        }
        Ok(mesh)
    }
}

impl Drop for Mesh<'_> {
    fn drop(&mut self) {
        let _ = Command::new(self.outrigger).args(["down", "--name", MESH]).stdout(Stdio::null()).status();
    }
}

fn curl(url: &str) -> bool {
    let status = Command::new("curl").args(["-sf", "-m", "5", "-o", "/dev/null", url]).status();
    status.is_ok_and(|status| status.success())
}

/// Megabytes of 10^6 bytes.
struct Memory {
    resident: f64,
    proportional: f64,
    largest_sidecar: f64,
}

/// Sums the mesh's processes: the one that `up` left running, and everything below it.
fn memory() -> anyhow::Result<Memory> {
    let mut parents = BTreeMap::new();
    let mut roots = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The program's name stands in parentheses and may hold spaces; the parent follows the state.
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.insert(pid, parent.unwrap_or(0));
        // The one in the background was started as /proc/self/exe.
        if command_line(pid).is_some_and(|line| line.contains("\0up\0") && line.contains(MESH)) {
            roots.push(pid);
        }
    }
    if roots.is_empty() {
        bail!("found no running `outrigger up`");
    }
    let mut memory = Memory { resident: 0.0, proportional: 0.0, largest_sidecar: 0.0 };
    for &pid in parents.keys() {
        let below = std::iter::successors(Some(pid), |pid| parents.get(pid).copied()).any(|pid| roots.contains(&pid));
        if !below {
            continue;
        }
        let Ok(rollup) = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
        let resident = field(&rollup, "Rss:");
        memory.resident += resident;
        memory.proportional += field(&rollup, "Pss:");
        if command_line(pid).is_some_and(|line| line.contains("proxy\0sidecar\0")) {
            memory.largest_sidecar = memory.largest_sidecar.max(resident);
        }
    }
    Ok(memory)
}

fn command_line(pid: u32) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A field of `smaps_rollup`, from kB to megabytes.
fn field(rollup: &str, name: &str) -> f64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").trim().parse().unwrap_or(0.0);
    kilobytes * 1024.0 / 1e6
}
