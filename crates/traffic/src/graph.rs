//! `outrigger graph`: who calls whom, how often, and with what success.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::fleet;
use crate::seen::{self, Call};

/// Who calls whom, with rates and failures, from the proxies' own statistics.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger graph
  outrigger graph --window 0 -o dot")]
pub struct Args {
    /// Seconds over which rates are measured; 0: only what was counted since the proxies started
    #[arg(long, default_value_t = 2)]
    window: u64,
    /// Only calls from or to this namespace
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written: dot is for Graphviz
    #[arg(long, short = 'o', value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Output {
    Text,
    Dot,
    Json,
}

/// One arrow.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Edge {
    from: String,
    to: String,
    protocol: String,
    /// Requests, or connections of TCP, since the proxies started.
    requests: u64,
    /// Those of them that were answered with 500 and more, or not at all.
    failures: u64,
    /// Of the failures, by response flag.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    flags: BTreeMap<String, u64>,
    mutual_tls: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_second: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// When no such mesh runs.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut edges = edges(&counted(&args.mesh)?);
    if args.window > 0 {
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs(args.window));
        let later = self::edges(&counted(&args.mesh)?);
        let took = began.elapsed().as_secs_f64();
        edges = later
            .into_iter()
            .map(|(key, mut edge)| {
                let before = edges.get(&key).map_or(0, |edge| edge.requests);
                edge.requests_per_second = Some(edge.requests.saturating_sub(before) as f64 / took);
                (key, edge)
            })
            .collect();
    }
    let inside = |name: &str| args.namespace.as_ref().is_none_or(|ns| name.ends_with(&format!(".{ns}")));
    let edges: Vec<Edge> = edges.into_values().filter(|edge| inside(&edge.from) || inside(&edge.to)).collect();
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&edges)?),
        Output::Dot => print!("{}", dot(&edges)),
        Output::Text => print!("{}", table(&edges)),
    }
    Ok(ExitCode::SUCCESS)
}

/// The counts of all proxies together; one that does not answer is named.
fn counted(mesh: &str) -> anyhow::Result<BTreeMap<Call, u64>> {
    let mut all = BTreeMap::new();
    for pod in fleet::pods(mesh)? {
        match fleet::statistics(mesh, &pod) {
            Ok(text) => {
                for (call, count) in seen::calls(&text) {
                    *all.entry(call).or_default() += count;
                }
            }
            Err(error) => eprintln!("note: {error:#}"),
        }
    }
    Ok(all)
}

/// Arrows: a call between two sidecars is counted at both, so at the server; one that only the client's saw, there.
fn edges(calls: &BTreeMap<Call, u64>) -> BTreeMap<(String, String, String), Edge> {
    let named = |name: &str, namespace: &str| match (name, namespace) {
        ("" | "unknown", _) => "outside".to_owned(),
        (name, "" | "unknown") => name.to_owned(),
        (name, namespace) => format!("{name}.{namespace}"),
    };
    let mut out: BTreeMap<(String, String, String), Edge> = BTreeMap::new();
    let mut add = |call: &Call, to: String, count: u64| {
        let from = named(&call.from, &call.from_namespace);
        let edge = out.entry((from.clone(), to.clone(), call.protocol.clone())).or_default();
        (edge.from, edge.to, edge.protocol) = (from, to, call.protocol.clone());
        edge.requests += count;
        let failed = match call.code.parse::<u16>() {
            Ok(code) => code >= 500 || code == 0,
            Err(_) => call.protocol == "tcp" && !matches!(call.flags.as_str(), "" | "-"),
        };
        if failed {
            edge.failures += count;
            if !matches!(call.flags.as_str(), "" | "-") {
                *edge.flags.entry(call.flags.clone()).or_default() += count;
            }
        }
        edge.mutual_tls |= call.security == "mutual_tls";
    };
    for (call, count) in calls.iter().filter(|(call, _)| !call.outbound) {
        add(call, named(&call.to, &call.to_namespace), *count);
    }
    // Of the clients' counts: what reached no sidecar. Without a workload the service, or the outside, stands for it.
    let arrived: Vec<(String, String)> = calls
        .keys()
        .filter(|call| !call.outbound)
        .map(|call| (call.from.clone(), named(&call.to, &call.to_namespace)))
        .collect();
    for (call, count) in calls.iter().filter(|(call, _)| call.outbound) {
        let to = match call.to.as_str() {
            "" | "unknown" => match call.host.as_str() {
                "" | "unknown" => "outside".to_owned(),
                host => host.to_owned(),
            },
            name => named(name, &call.to_namespace),
        };
        if !arrived.contains(&(call.from.clone(), to.clone())) {
            add(call, to, *count);
        }
    }
    out
}

fn table(edges: &[Edge]) -> String {
    if edges.is_empty() {
        return "no proxy has seen a request\n".to_owned();
    }
    let head = ["FROM", "TO", "PROTOCOL", "REQUESTS", "PER SECOND", "FAILED", "TLS"].map(str::to_owned);
    let rows = edges.iter().map(|edge| {
        let flags: Vec<String> = edge.flags.iter().map(|(flag, count)| format!("{flag} {count}")).collect();
        let share = edge.failures as f64 * 100.0 / edge.requests.max(1) as f64;
        let failed = match (edge.failures, flags.as_slice()) {
            (0, _) => "-".to_owned(),
            (count, []) => format!("{count} ({share:.1} %)"),
            (count, flags) => format!("{count} ({share:.1} %: {})", flags.join(", ")),
        };
        let rate = edge.requests_per_second.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
        let tls = if edge.mutual_tls { "mutual" } else { "-" };
        let protocol = edge.protocol.clone();
        [edge.from.clone(), edge.to.clone(), protocol, edge.requests.to_string(), rate, failed, tls.to_owned()]
    });
    let rows: Vec<[String; 7]> = std::iter::once(head).chain(rows).collect();
    let widths: Vec<usize> =
        (0..7).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; 7]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn dot(edges: &[Edge]) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut out = String::from("digraph mesh {\n  rankdir=LR;\n");
    for edge in edges {
        let mut label = format!("{} {}", edge.requests, edge.protocol);
        if let Some(rate) = edge.requests_per_second {
            label = format!("{label}, {rate:.1}/s");
        }
        let mut more = String::new();
        if edge.failures > 0 {
            label = format!("{label}, {} failed", edge.failures);
            more = ", color=red".to_owned();
        }
        let (from, to) = (quoted(&edge.from), quoted(&edge.to));
        out.push_str(&format!("  {from} -> {to} [label={}{more}];\n", quoted(&label)));
    }
    out.push_str("}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(outbound: bool, from: &str, to: &str, code: &str) -> Call {
        let own = |text: &str| text.to_owned();
        Call {
            outbound,
            from: own(from),
            from_namespace: own("x"),
            to: own(to),
            to_namespace: own("x"),
            host: own("elsewhere.example"),
            protocol: own("http"),
            code: own(code),
            flags: own(if code == "503" { "UH" } else { "-" }),
            ..Call::default()
        }
    }

    #[test]
    fn a_call_between_two_sidecars_is_one_arrow() {
        let calls = BTreeMap::from([
            (call(true, "a", "b", "200"), 5),
            (call(false, "a", "b", "200"), 5),
            (call(true, "a", "unknown", "503"), 2),
        ]);
        let edges: Vec<Edge> = edges(&calls).into_values().collect();
        let short: Vec<_> = edges.iter().map(|e| (e.from.as_str(), e.to.as_str(), e.requests, e.failures)).collect();
        assert_eq!(short, [("a.x", "b.x", 5, 0), ("a.x", "elsewhere.example", 2, 2)]);
        assert!(table(&edges).contains("2 (100.0 %: UH 2)"), "{}", table(&edges));
        assert!(dot(&edges).contains("\"a.x\" -> \"b.x\" [label=\"5 http\"];"), "{}", dot(&edges));
    }
}
