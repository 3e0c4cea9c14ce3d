//! What is wrong with a mesh, and what mends it.
//!
//! In: the objects of a running mesh or of files, and of a running mesh what its proxies and control plane say. Out: findings, each with
//! the object it is about and the command or the lines of YAML that mend it.
//! Never: a change of the mesh; a check that needs more than a look.
//!
//! `configuration` looks at objects only; `live` at what runs.

mod configuration;
mod finding;
mod live;

use std::io::IsTerminal;
use std::process::ExitCode;

use explain::{Files, Sources};

pub use finding::{Finding, Severity};

/// Look for what is wrong with a mesh; each finding names the command or the lines of YAML that mend it.
///
/// Looked at are the objects (routes to subsets that do not exist or have no pods, ports whose names hide their protocol, mutual TLS
/// that one side wants and the other does not, policies and Sidecars that contradict each other) and, of a running mesh, its pods:
/// proxies that refuse or lag, failed requests and their cause, certificates, capture. Ends with 1 if there is a problem.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger doctor -f samples/bookinfo samples/bookinfo/networking/user-jason.yaml
  outrigger doctor")]
pub struct Args {
    #[command(flatten)]
    sources: Sources,
    /// Name of the running mesh that is looked at where there is no --input
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written
    #[arg(long, short = 'o', default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

/// Runs the command.
///
/// # Errors
/// When the input cannot be read, or no such mesh runs.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let is_running = args.sources.input.is_empty();
    let files = match is_running {
        true => Files::running(&args.mesh, &args.sources)?,
        false => Files::load(&args.sources, true)?,
    };
    let mut findings = configuration::check(&files);
    if is_running {
        findings.extend(live::check(&args.mesh, &files)?);
    }
    findings.sort_by_key(|finding| finding.severity);
    let problems = findings.iter().filter(|finding| finding.severity == Severity::Problem).count();
    match args.output.as_str() {
        "json" => println!("{}", serde_json::to_string_pretty(&findings)?),
        _ => {
            let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            print!("{}", finding::text(&findings, colour));
        }
    }
    Ok(if problems > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
