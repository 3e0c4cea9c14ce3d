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
mod ebpf;
mod host;
mod inspect;
mod iptables;
mod nftables;
mod routes;
mod rules;
mod run;
mod validate;

#[cfg(test)]
mod conformance;

use std::ffi::OsString;

pub use args::{Args, Usage};
pub use config::{Cidr, Config, Dns, Groups, Invalid, Mode, Owner, Ports, Selection};
pub use ebpf::attached_programs;
pub use inspect::{InspectArgs, inspect};
pub use iptables::restore_text as iptables_text;
pub use nftables::{Captured, captured, text as nft_text};
pub use rules::{Chain, Families, L4, Match, Rule, RuleSet, Table, Target, rules};
pub use validate::original_destination;

/// What an unknown flag ends with, as in the reference.
const USAGE: u8 = 255;

/// Runs `istio-iptables` from a whole command line (with the program's name): sets up capture in the current network namespace.
///
/// Exit status 0; 1 on any error; 126 when validation failed; 255 for a command line that cannot be read.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    command("istio-iptables", arguments, |args| finish(run::run(&args)))
}

/// Runs `istio-clean-iptables` from a whole command line: removes everything of ours from the current network namespace.
pub fn clean(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    command("istio-clean-iptables", arguments, |args| finish(run::run(&args.clean_up())))
}

fn command(name: &str, arguments: impl IntoIterator<Item = OsString>, then: impl FnOnce(Args) -> u8) -> u8 {
    let mut arguments = arguments.into_iter().skip(1).peekable();
    // `pilot-agent istio-iptables …` and `istio-iptables …` are the same.
    arguments.next_if(|first| first == name);
    match Args::read(arguments) {
        Ok(Some(args)) => then(args),
        Ok(None) => {
            print!("{}", Args::help());
            0
        }
        Err(error) => {
            eprintln!("Error: {error}");
            USAGE
        }
    }
}

fn finish(result: Result<String, run::Failure>) -> u8 {
    match result {
        Ok(shown) => {
            print!("{shown}");
            0
        }
        Err(failure) => {
            let mut text = format!("Error: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(error) = cause {
                text.push_str(&format!(": {error}"));
                cause = error.source();
            }
            eprintln!("{text}");
            failure.exit_status()
        }
    }
}
