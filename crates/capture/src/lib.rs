//! Traffic capture for a pod: a drop-in for `istio-iptables`.
//!
//! In: flags and environment, and what this network namespace has (addresses, name servers, rules). Out: rules that lead the
//! pod's traffic through its proxy, in iptables or in native nftables, or their removal.
//! Never: other namespaces, daemons, the proxy itself.
//!
//! ```text
//! Args -> Settings -> Config --rules()--> RuleSet -+-> iptables-restore text -> one process per family
//!                                                  +-> nft text (dry run)
//!                                                  +-> netlink transaction
//! ```
//!
//! Everything up to [`RuleSet`] and its texts is pure. Each table changes in one transaction: killed at any moment and run again,
//! the result is the same.

mod args;
mod config;
mod host;
mod iptables;
mod nftables;
mod routes;
mod rules;
mod run;
mod validate;

#[cfg(test)]
mod conformance;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

pub use args::{Args, CleanArgs};
pub use config::{Cidr, Config, Dns, Groups, Invalid, Mode, Owner, Selection};
pub use iptables::restore_text as iptables_text;
pub use nftables::{Captured, captured, text as nft_text};
pub use rules::{Chain, Families, L4, Match, Rule, RuleSet, Table, Target, rules};
pub use validate::original_destination;

/// What an unknown flag ends with, as in the reference.
const USAGE: u8 = 255;

/// Sets up capture in the current network namespace: `outrigger istio-iptables`.
///
/// Exit status 0; 1 on any error; 126 when validation failed.
pub fn run(args: Args) -> ExitCode {
    finish(run::run(&args))
}

/// Removes everything of ours from the current network namespace: `outrigger istio-clean-iptables`.
pub fn clean(args: CleanArgs) -> ExitCode {
    finish(run::run(&args.args.clean_up()))
}

/// Runs `istio-iptables` from a whole command line (with the program's name). Exit status 255 for unknown flags.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    #[derive(Parser)]
    #[command(name = "istio-iptables")]
    struct Program {
        #[command(flatten)]
        args: Args,
    }
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    // `pilot-agent istio-iptables …` and `istio-iptables …` are the same.
    if arguments.get(1).is_some_and(|first| first == "istio-iptables") {
        arguments.remove(1);
    }
    match Program::try_parse_from(arguments) {
        Ok(program) => run(program.args),
        Err(error) => {
            // Help goes to stdout and is no failure; there is nobody left to tell when printing fails.
            let _ = error.print();
            if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
        }
    }
}

fn finish(result: Result<String, run::Failure>) -> ExitCode {
    match result {
        Ok(shown) => {
            print!("{shown}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let mut text = format!("Error: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(error) = cause {
                text.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("{text}");
            ExitCode::from(failure.exit_status())
        }
    }
}
