//! Stand-ins for well-known sample images, so that their YAML runs where there are no images:
//! Istio's bookinfo services, a sleeper, and an echo server in the way of httpbin.
//!
//! In: flags and environment as the images read them. Out: HTTP servers. Never: mesh code. These
//! are the applications, they know nothing of sidecars.

mod bookinfo;
mod echo;
mod server;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Run a stand-in for a sample image.
#[derive(Debug, Parser)]
pub struct Args {
    #[command(subcommand)]
    sample: Sample,
}

#[derive(Debug, Subcommand)]
enum Sample {
    /// One of the four bookinfo services.
    Bookinfo(bookinfo::Args),
    /// Answers with what it received, in the way of httpbin.
    Echo {
        /// Port to listen on.
        #[arg(long, default_value_t = 80)]
        port: u16,
        /// Address to listen on; all of them if not given.
        #[arg(long, conflicts_with = "socket")]
        address: Option<IpAddr>,
        /// Unix socket to listen on instead.
        #[arg(long, conflicts_with = "port")]
        socket: Option<PathBuf>,
    },
    /// Does nothing until it is told to stop.
    Sleep,
}

/// Runs the sample until SIGTERM or SIGINT.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            result = async {
                match args.sample {
                    Sample::Bookinfo(args) => bookinfo::run(args).await,
                    Sample::Echo { port, address: Some(address), .. } => {
                        echo::run(server::At::Address((address, port).into())).await
                    }
                    Sample::Echo { socket: Some(path), .. } => echo::run(server::At::Socket(path)).await,
                    Sample::Echo { port, .. } => echo::run(server::At::Port(port)).await,
                    Sample::Sleep => {
                        lifecycle::memory::release_unused();
                        std::future::pending().await
                    }
                }
            } => result,
            stopped = server::stop_signal() => stopped,
        }
    })
}
