//! `outrigger version`.

use std::process::ExitCode;

use serde_json::json;

/// The program's version, and those of a running mesh's proxies.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger version --short")]
pub struct Args {
    /// The number alone
    #[arg(long, short = 's')]
    short: bool,
    /// Accepted as istioctl takes it: this program's own version is all that is told
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    remote: Option<bool>,
    /// How it is written
    #[arg(long, short = 'o', value_parser = ["json"])]
    output: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// None so far.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    match (&args.output, args.short) {
        (Some(_), _) => println!("{}", json!({"clientVersion": {"version": version}})),
        (None, true) => println!("{version}"),
        (None, false) => println!("client version: {version}"),
    }
    Ok(ExitCode::SUCCESS)
}
