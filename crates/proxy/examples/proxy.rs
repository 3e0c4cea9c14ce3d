//! The proxy alone, as a program: what the conformance tests run.

use clap::Parser;

fn main() -> std::process::ExitCode {
    proxy::run(proxy::Args::parse())
}
