//! Every chore of the project behind one door: `cargo xtask VERB`.

mod bench;
mod fuzz;
mod setup;
mod shell;
mod test;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's chores")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install or build what the tests need, where it is missing, and say what was done.
    Setup,
    /// Everything that CI runs: set-up, formatting, lints, licences, unit, conformance and end-to-end tests.
    Test,
    /// Check what a script can see of the house rules.
    Tidy,
    /// Give every parser of bytes from outside changed inputs, two targets at a time.
    Fuzz {
        /// How long each target runs.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Only targets whose name contains this.
        only: Option<String>,
    },
    /// Measure, and print the numbers that docs/performance.md holds.
    Bench {
        #[command(subcommand)]
        what: bench::What,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Test => test::run(),
        Verb::Tidy => tidy::run(),
        Verb::Fuzz { seconds, only } => fuzz::run(seconds, only.as_deref(), None),
        Verb::Bench { what } => bench::run(what),
    }
}
