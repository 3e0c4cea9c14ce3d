//! `outrigger proxy-status`: how far each proxy is.

use std::process::ExitCode;

use serde_json::json;

use crate::table::Table;

/// How far each proxy is, as `istioctl proxy-status`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger proxy-status")]
pub struct Args {
    /// Only this proxy: the beginning of its name
    #[arg(value_name = "POD")]
    pod: Option<String>,
    /// Name of the mesh, when several run on this machine
    #[arg(long, default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written
    #[arg(long, short = 'o', default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

/// Runs the command. Ends with 1 if a proxy refuses its configuration.
///
/// # Errors
/// When no such mesh runs.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = machine::distribution(&args.mesh, None)?;
    all.proxies.retain(|proxy| args.pod.as_ref().is_none_or(|pod| proxy.proxy.starts_with(pod.as_str())));
    all.proxies.sort_by(|a, b| a.proxy.cmp(&b.proxy));
    let refuses = all.proxies.iter().any(|proxy| !proxy.nacks.is_empty());
    if args.output == "json" {
        println!("{}", serde_json::to_string_pretty(&json!({"revision": all.wanted, "proxies": all.proxies}))?);
    } else {
        let mut table = Table::new(5, &["NAME", "STATUS", "REVISION", "REFUSES"]);
        for proxy in &all.proxies {
            let status = match (proxy.nacks.is_empty(), proxy.synced_to >= all.wanted) {
                (false, _) => "NACKED",
                (true, true) => "SYNCED",
                (true, false) => "STALE",
            };
            let nacks = if proxy.nacks.is_empty() { "-".to_owned() } else { proxy.nacks.join("; ") };
            table.row([proxy.proxy.clone(), status.to_owned(), format!("{}/{}", proxy.synced_to, all.wanted), nacks]);
        }
        print!("{}", table.render());
    }
    Ok(if refuses { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
