//! Beside each workload: what pilot-agent is in Istio, with our own proxy in the same process.
//!
//! ```text
//!  flags, environment, files ─► settings ─► sidecar ─┬─► identity (certificate, rotated)
//!                                                   ├─► proxy (xDS with that identity)
//!                                                   ├─► dns (15053, from the name table)
//!                                                   └─► status (15020, 15021, 15090: probes, metrics, drain; 15004: debug pages)
//! ```
//!
//! In: the injected pod's command line, environment and mounted files. Out: a ready proxy, and an orderly end.
//! Never: what is in a route or a cluster.

mod bootstrap;
mod control_plane;
mod crl;
mod dataplane;
mod debug_relay;
mod dns;
mod environment;
mod envoy;
mod fetch;
mod flags;
mod grpc_health;
mod health;
mod join;
mod node;
mod outrigger;
mod podinfo;
mod probes;
mod proxy_config;
mod requests;
mod scrape;
mod secure_metrics;
mod settings;
mod sidecar;
mod status;

use std::process::ExitCode;

use anyhow::Context;
use tracing::info;

pub use dns::explain::{Args as DnsArgs, run as dns};
pub use environment::Environment;
pub use flags::{
    Args, Command, DataPlane, LogFlags, OlderFlags, ProxyFlags, RequestFlags, Role, VersionFlags, WaitFlags,
    without_unknown_flags,
};
pub use join::{Capture, JoinArgs, join};
pub use settings::{Root, Settings};
pub use sidecar::run as sidecar;

/// Runs the agent's command on a runtime of its own, with one thread: what it does is little, and memory counts.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    lifecycle::logging::init(&lifecycle::logging::Options { json: args.log.json, levels: args.log.levels })?;
    match args.command {
        Command::Proxy(mut flags) => {
            flags.log_json = args.log.json;
            on_one_thread(proxy(&flags))
        }
        Command::Wait(flags) => on_one_thread(requests::wait(&flags)),
        Command::Request(flags) => on_one_thread(requests::request(&flags)),
        Command::Version(flags) => requests::version(&flags),
        Command::IstioIptables(passed) => Ok(capture::main(passed.command_line("istio-iptables")).into()),
        Command::IstioCleanIptables(passed) => Ok(capture::clean(passed.command_line("istio-clean-iptables")).into()),
    }
}

fn on_one_thread<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .context("no runtime")?;
    runtime.block_on(work)
}

async fn proxy(flags: &ProxyFlags) -> anyhow::Result<ExitCode> {
    let env = Environment::of_process();
    let settings = Settings::resolve(flags, &env, Root::system())?;
    let ignored: Vec<String> = env.ignored().iter().map(|(name, reason)| format!("{name} ({reason})")).collect();
    if !ignored.is_empty() {
        info!("environment variables ignored: {}", ignored.join(", "));
    }
    let ignored = flags.ignored();
    if !ignored.is_empty() {
        info!("flags ignored: {}", ignored.join(", "));
    }
    info!(node = %settings.node.id, control_plane = %settings.discovery.address, "starting");
    sidecar::run(settings).await
}
