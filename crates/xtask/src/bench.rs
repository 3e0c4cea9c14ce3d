mod up;

/// One benchmark a file.
#[derive(clap::Subcommand)]
pub(crate) enum What {
    /// Bookinfo on this machine: time from the command to the page served, and resident memory.
    Up {
        /// How often to start it.
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
}

pub(crate) fn run(what: What) -> anyhow::Result<()> {
    match what {
        What::Up { runs } => up::run(runs),
    }
}
