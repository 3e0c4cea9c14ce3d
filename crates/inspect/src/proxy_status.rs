//! `outrigger proxy-status`: how far each proxy is.

use std::process::ExitCode;

use serde_json::json;

use crate::table::Table;

/// How far each proxy is, as `istioctl proxy-status`; below the table what is refused, and who lags.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger proxy-status")]
pub struct Args {
    /// Only this proxy: the beginning of its name
    #[arg(value_name = "POD")]
    pod: Option<String>,
    /// Only proxies of this namespace
    #[arg(long, short = 'n')]
    namespace: Option<String>,
    /// Name of the mesh, when several run on this machine
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
    /// How it is written
    #[arg(long, short = 'o', default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

/// Runs the command. Ends with 1 if a proxy refuses its configuration.
///
/// # Errors
/// When no such mesh runs.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut all = machine::distribution(&args.mesh, None)?;
    all.proxies.retain(|proxy| {
        let namespace = proxy.proxy.rsplit_once('.').map_or("", |(_, namespace)| namespace);
        args.pod.as_ref().is_none_or(|pod| proxy.proxy.starts_with(pod.as_str()))
            && args.namespace.as_ref().is_none_or(|wanted| namespace == wanted)
    });
    if let Some(pod) = args.pod.as_ref().filter(|_| all.proxies.is_empty()) {
        anyhow::bail!("no proxy of a pod {pod:?} is connected; `outrigger ps` shows all pods");
    }
    all.proxies.sort_by(|a, b| a.proxy.cmp(&b.proxy));
    let refuses = all.proxies.iter().any(|proxy| !proxy.nacks.is_empty());
    if args.output == "json" {
        println!("{}", serde_json::to_string_pretty(&json!({"revision": all.wanted, "proxies": all.proxies}))?);
    } else {
        let head = ["NAME", "CLUSTER", "CDS", "LDS", "EDS", "RDS", "ECDS", "ISTIOD", "VERSION"];
        let mut table = Table::new(5, &head);
        for proxy in &all.proxies {
            let of = |kind: &str| proxy.types.get(kind).cloned().unwrap_or_else(|| "NOT SENT".to_owned());
            let [cds, lds, eds, rds, ecds] = ["CDS", "LDS", "EDS", "RDS", "ECDS"].map(of);
            let (name, cluster, version) = (proxy.proxy.clone(), proxy.cluster.clone(), proxy.version.clone());
            table.row([name, cluster, cds, lds, eds, rds, ecds, args.mesh.clone(), version]);
        }
        print!("{}", table.render());
        // What istioctl cannot tell.
        for proxy in &all.proxies {
            for nack in &proxy.nacks {
                println!("{} refuses {nack}", proxy.proxy);
            }
            if proxy.nacks.is_empty() && proxy.synced_to < all.wanted {
                println!("{} has revision {} of {}", proxy.proxy, proxy.synced_to, all.wanted);
            }
        }
    }
    Ok(if refuses { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
