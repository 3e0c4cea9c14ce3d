//! `outrigger tap`: requests as they come, out of the proxies' memory of their last ones.

use std::collections::HashSet;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;

use crate::fleet::{self, Pod};

/// How often the proxy is asked.
const PERIOD: Duration = Duration::from_millis(200);
/// So many requests are read at once; faster ones are counted as missed.
const BATCH: usize = 1000;

/// Show a pod's requests as they come, in and out, with what its proxy decided.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger tap productpage --past 5 --seconds 2
  outrigger tap reviews-v2 --path /reviews --code 2xx --steps --past 10 --seconds 1")]
pub struct Args {
    /// The pod: its name, the beginning of it, or its `app` label, with `.NAMESPACE` if need be
    #[arg(value_name = "POD")]
    pod: String,
    /// Begin with so many requests of the past
    #[arg(long, default_value_t = 0, value_name = "N")]
    past: usize,
    /// End after so many requests
    #[arg(long, value_name = "N")]
    max: Option<usize>,
    /// End after so many seconds
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Only requests whose path begins so
    #[arg(long, value_name = "PREFIX")]
    path: Option<String>,
    /// Only requests with this method
    #[arg(long)]
    method: Option<String>,
    /// Only answers with this status; 5xx means all of 500 to 599
    #[arg(long)]
    code: Option<String>,
    /// Only requests to clusters whose name has this in it
    #[arg(long)]
    cluster: Option<String>,
    /// With the decisions of each filter and each try
    #[arg(long)]
    steps: bool,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written: json is one object a line
    #[arg(long, short = 'o', default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

/// Runs the command until it has shown enough, or is interrupted.
///
/// # Errors
/// When there is no such pod, or its proxy keeps no requests (Envoy does not).
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let pods = fleet::pods(&args.mesh)?;
    let pod = fleet::find(&pods, &args.pod)?;
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut known: HashSet<String> = HashSet::new();
    let (mut shown, mut first) = (0, true);
    let mut out = std::io::stdout().lock();
    loop {
        let path = format!("/requests?limit={BATCH}");
        let body = machine::ask_proxy(&args.mesh, &pod.full_name(), "GET", &path)
            .context("its proxy does not tell of requests; Envoy cannot")?;
        let answer: Value = serde_json::from_slice(&body).context("the proxy's answer to /requests")?;
        // The newest come first.
        let records: Vec<&Value> = answer["requests"].as_array().into_iter().flatten().collect();
        let keys: Vec<String> = records.iter().map(|record| key(record)).collect();
        let fresh: Vec<&Value> = match first {
            true => records.iter().filter(|record| args.wants(record)).take(args.past).copied().collect(),
            false => {
                let fresh = records.iter().zip(&keys).filter(|(_, key)| !known.contains(*key));
                fresh.map(|(record, _)| *record).filter(|record| args.wants(record)).collect()
            }
        };
        if !first && records.len() == BATCH && keys.iter().all(|key| !known.contains(key)) {
            eprintln!("note: requests came faster than they could be shown");
        }
        for record in fresh.iter().rev() {
            match args.output.as_str() {
                "json" => writeln!(out, "{record}")?,
                _ => write!(out, "{}", args.text(record, pod, &pods))?,
            }
            shown += 1;
            if args.max.is_some_and(|max| shown >= max) {
                return Ok(ExitCode::SUCCESS);
            }
        }
        out.flush()?;
        known = keys.into_iter().collect();
        first = false;
        if end.is_some_and(|end| Instant::now() >= end) {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(PERIOD);
    }
}

/// Tells a request from all others of the proxy: an id may come several times.
fn key(record: &Value) -> String {
    let parts = ["request_id", "time_ms", "connection_id", "duration_us", "path", "cluster"];
    parts.map(|part| record[part].to_string()).join(" ")
}

impl Args {
    fn wants(&self, record: &Value) -> bool {
        let text = |key: &str| record[key].as_str().unwrap_or_default();
        let code = record["code"].as_u64().unwrap_or_default().to_string();
        self.path.as_ref().is_none_or(|prefix| text("path").starts_with(prefix.as_str()))
            && self.method.as_ref().is_none_or(|method| text("method").eq_ignore_ascii_case(method))
            && self.cluster.as_ref().is_none_or(|part| text("cluster").contains(part.as_str()))
            && self.code.as_ref().is_none_or(|wanted| match wanted.strip_suffix("xx") {
                Some(class) => code.len() == 3 && code.starts_with(class),
                None => code == *wanted,
            })
    }

    /// One line, and one for each step if they are wanted.
    fn text(&self, record: &Value, pod: &Pod, pods: &[Pod]) -> String {
        let text = |key: &str| record[key].as_str().unwrap_or_default();
        let named = |address: &str| {
            let ip = address.rsplit_once(':').map_or(address, |(ip, _)| ip);
            pods.iter().find(|pod| pod.address == ip).map_or_else(|| address.to_owned(), |pod| pod.name.clone())
        };
        let (arrow, peer) = match text("listener") {
            "virtualInbound" => ("in ", named(text("downstream_remote"))),
            _ => ("out", named(record["host"].as_str().unwrap_or("-"))),
        };
        let code = record["code"].as_u64().unwrap_or_default();
        let milliseconds = record["duration_us"].as_u64().unwrap_or_default() as f64 / 1000.0;
        let mut line = format!(
            "{} {} {arrow} {peer}  {} {}{}  {code}",
            clock(record["time_ms"].as_u64().unwrap_or_default()),
            pod.name,
            text("method"),
            text("authority"),
            text("path"),
        );
        if text("flags") != "-" {
            line = format!("{line} {}", text("flags"));
        }
        if text("details") != "via_upstream" {
            line = format!("{line} {}", text("details"));
        }
        line = format!("{line}  {milliseconds:.1} ms  {}\n", text("request_id"));
        if self.steps {
            for step in record["steps"].as_array().into_iter().flatten() {
                let at = step["at_us"].as_u64().unwrap_or_default() as f64 / 1000.0;
                let said = |key: &str| step[key].as_str().unwrap_or_default();
                line.push_str(&format!("    {at:8.2} ms  {}: {}\n", said("step"), said("decision")));
            }
        }
        line
    }
}

/// Time of day, UTC.
fn clock(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, milliseconds % 1000)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn requests_are_picked_and_written() {
        let record = json!({
            "request_id": "r", "time_ms": 3_723_004, "listener": "0.0.0.0_80", "host": "10.0.0.2:80", "method": "GET",
            "authority": "b", "path": "/x", "code": 503, "flags": "UF", "details": "why", "duration_us": 1500,
            "steps": [{ "at_us": 250, "step": "try 1", "decision": "refused" }],
        });
        let args = |line: &str| Line::parse_from(line.split(' ')).args;
        assert!(args("tap a --code 5xx --path / --method get").wants(&record));
        assert!(!args("tap a --code 500").wants(&record) && !args("tap a --path /y").wants(&record));
        let pod = |name: &str, address: &str| Pod {
            name: name.to_owned(),
            namespace: "x".to_owned(),
            labels: Default::default(),
            address: address.to_owned(),
        };
        let pods = [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")];
        assert_eq!(
            args("tap a --steps").text(&record, &pods[0], &pods),
            "01:02:03.004 a out b  GET b/x  503 UF why  1.5 ms  r\n        0.25 ms  try 1: refused\n"
        );
    }
}
