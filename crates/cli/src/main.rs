//! The `outrigger` program: finds out which role is meant, and hands over. Every role is a library.
//!
//! Called as `pilot-agent`, `istio-iptables` or `istio-clean-iptables` it is that program.

mod output;
mod roles;

use clap::Parser;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: lifecycle::blocks::Blocks = lifecycle::blocks::Blocks;

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
    // Capture runs in an init container: in milliseconds and a few MiB, so without the parser of the whole command line.
    let word = |at: usize| arguments.get(at).and_then(|word| word.to_str());
    let at = if word(1) == Some("agent") { 2 } else { 1 };
    let capture = match word(at) {
        Some("istio-iptables") => Some(capture::main as fn(_) -> u8),
        Some("istio-clean-iptables") => Some(capture::clean as fn(_) -> u8),
        _ => None,
    };
    if let Some(capture) = capture {
        // What the loader touched is half of what capture would ever hold.
        lifecycle::memory::release_unused();
        lifecycle::memory::end(capture(arguments.drain(at..)));
    }
    output::end_with_the_reader();
    lifecycle::names::use_files_and_dns();
    if word(1) == Some("agent") {
        let agent = agent::without_unknown_flags(arguments.split_off(1));
        arguments.extend(agent);
    }
    roles::Cli::parse_from(arguments).run()
}
