mod agent;
mod capture;
mod control_plane;
mod inject;
mod proxy;
mod soak;
mod unix_sockets;
mod up;

use crate::shell::{command, must, root};
use anyhow::Context;
use std::path::PathBuf;

/// One benchmark a file.
#[derive(clap::Subcommand)]
pub(crate) enum What {
    /// A sidecar: time from start to ready, memory, names resolved a second.
    Agent {
        /// How many sidecars are started, one after the other.
        #[arg(long, default_value_t = 5)]
        runs: u32,
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Traffic capture: applying rules natively, by iptables and eBPF, and what capture adds to a connection.
    Capture {
        /// How often each is measured; the median counts.
        #[arg(long, default_value_t = 15)]
        runs: usize,
        /// Connections a round.
        #[arg(long, default_value_t = 1000)]
        connections: u32,
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
        /// A real istio-iptables to measure beside it.
        #[arg(long)]
        reference: Option<PathBuf>,
    },
    /// 1000 services and 100 proxies on one control plane: full sync, one rule changed, one endpoint changed.
    ControlPlane {
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// The asking half of `agent`, inside a pod's network.
    #[command(hide = true)]
    DnsLoad,
    /// Injection: time a pod, pods a second on one core, `kube-inject` of bookinfo as a process.
    Inject {
        /// How many pods the webhook's code is given.
        #[arg(long, default_value_t = 5000)]
        pods: u32,
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Two sidecars under steady load while configuration, certificates and endpoints change: nothing may fail.
    Soak {
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// The share of what the pair can do at most.
        #[arg(long, default_value_t = 0.8)]
        share: f64,
        /// The program to test, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Applications and their sidecars over unix sockets beside TCP on the loopback interface, with our proxy and with Envoy.
    UnixSockets {
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Bookinfo on this machine: time from the command to the page served, and resident memory.
    Up {
        /// How often to start it.
        #[arg(long, default_value_t = 5)]
        runs: u32,
        /// The program to measure, instead of a fresh release build.
        #[arg(long)]
        program: Option<PathBuf>,
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
        program: Option<PathBuf>,
    },
}

pub(crate) fn run(what: What) -> anyhow::Result<()> {
    match what {
        What::Agent { runs, program } => agent::run(runs, program),
        What::Capture { runs, connections, program, reference } => {
            capture::run(runs, connections, program, reference.as_deref())
        }
        What::ControlPlane { program } => control_plane::run(program),
        What::DnsLoad => agent::dns_load(),
        What::Inject { pods, program } => inject::run(pods, program),
        What::UnixSockets { program } => unix_sockets::run(program),
        What::Up { runs, program } => up::run(runs, program),
        What::Soak { seconds, share, program } => soak::run(seconds, share, program),
        What::Proxy { rounds, seconds, only, program } => proxy::run(rounds, seconds, only.as_deref(), program),
    }
}

/// The program to measure, as an absolute path: this one, or a fresh release build.
fn program(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    match given {
        Some(given) => given.canonicalize().with_context(|| format!("no program {}", given.display())),
        None => {
            must(command("cargo").args(["build", "--release", "--locked", "--package", "cli"]))?;
            Ok(root().join("target/release/outrigger"))
        }
    }
}
