//! The `outrigger` program: finds out which role is meant, and hands over. Every role is a library.
//!
//! Called as `pilot-agent`, `istio-iptables` or `istio-clean-iptables` it is that program.

mod roles;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    let called = arguments.first().map(std::path::Path::new).and_then(|path| path.file_name()?.to_str());
    let role = match called {
        Some("pilot-agent") => Some("agent"),
        Some("istio-iptables") => Some("istio-iptables"),
        Some("istio-clean-iptables") => Some("istio-clean-iptables"),
        _ => None,
    };
    // Becoming a container comes before anything that could open a file or start a thread.
    if arguments.get(1).is_some_and(|first| first == "container-init") {
        return machine::container_init();
    }
    if let Some(role) = role {
        arguments.insert(1, role.into());
    }
    roles::Cli::parse_from(arguments).run()
}
