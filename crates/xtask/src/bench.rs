mod proxy;
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
    /// The proxy beside Envoy: CPU a request, latency, start and memory, as ratios.
    Proxy {
        /// How often each scenario runs against each proxy.
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Seconds of load a round.
        #[arg(long, default_value_t = 4)]
        seconds: u32,
        /// Only scenarios whose name contains this.
        #[arg(long)]
        only: Option<String>,
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<std::path::PathBuf>,
    },
}

pub(crate) fn run(what: What) -> anyhow::Result<()> {
    match what {
        What::Up { runs } => up::run(runs),
        What::Proxy { rounds, seconds, only, program } => proxy::run(rounds, seconds, only.as_deref(), program),
    }
}
