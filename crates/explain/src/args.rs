//! `outrigger explain`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{anyhow, bail};

use crate::configuration::Resources;
use crate::{Configuration, Files, Sources, calls};

/// Where a request goes, and why.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    sources: Sources,
    /// Answer all calls of a file at once, in the form of Istio's request simulator
    #[arg(long, value_name = "FILE")]
    calls: Option<PathBuf>,
    /// How the answer is written
    #[arg(long, short = 'o', value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Runs the command.
///
/// # Errors
/// When the input cannot be read, or does not say what is asked about.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let files = Files::load(&args.sources)?;
    for error in &files.refused {
        eprintln!("warning: {error}");
    }
    match &args.calls {
        Some(path) => many(&files, path),
        None => bail!("no call"),
    }
}

fn many(files: &Files, path: &std::path::Path) -> anyhow::Result<ExitCode> {
    let mut configurations: HashMap<&str, Configuration> = HashMap::new();
    let mut answers = Vec::new();
    for entry in &calls::read(path)? {
        let node = match &entry.proxy {
            None => files.proxies.first().ok_or_else(|| anyhow!("--calls needs --proxy"))?,
            Some(name) => {
                let found = files.proxies.iter().find(|node| *node.name == **name);
                found.ok_or_else(|| anyhow!("no proxy {name} in --proxy"))?
            }
        };
        let configuration = configurations.entry(&node.name).or_insert_with(|| {
            let configuration = Configuration::new(Resources::of_node(&files.push, node));
            for error in &configuration.rejected {
                eprintln!("warning: proxy {} would refuse {error}", node.name);
            }
            configuration
        });
        answers.push(calls::answer(entry, configuration)?);
    }
    println!("{}", serde_json::to_string_pretty(&answers)?);
    Ok(ExitCode::SUCCESS)
}
