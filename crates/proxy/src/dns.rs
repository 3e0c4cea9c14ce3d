//! Hosts of STRICT_DNS and LOGICAL_DNS clusters: resolved, and resolved again.

use crate::control::Control;
use crate::runtime::ClusterEntry;
use crate::stats::{ClusterStats, Kind};
use crate::worker::Worker;
use mesh_types::ArcStr;
use proxy_core::Endpoints;
use proxy_core::cluster::{Discovery, DnsConfig, DnsFamily};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;

/// Serves clusters as they come; one task each, which ends with the cluster.
pub(crate) async fn run(mut clusters: UnboundedReceiver<Arc<ClusterEntry>>, control: Arc<Mutex<Control>>) {
    while let Some(entry) = clusters.recv().await {
        let (Discovery::StrictDns(config) | Discovery::LogicalDns(config)) = &entry.cluster.discovery else { continue };
        let config = config.clone();
        // Ends when the cluster is dropped.
        tokio::spawn(keep_resolved(Arc::downgrade(&entry), config, control.clone()));
    }
}

async fn keep_resolved(entry: Weak<ClusterEntry>, config: DnsConfig, control: Arc<Mutex<Control>>) {
    let mut failures = 0u32;
    let stats = Arc::new(ClusterStats::default());
    if let Some(cluster) = entry.upgrade() {
        let shared = control.lock().unwrap_or_else(PoisonError::into_inner).shared.clone();
        shared.registry.add(Kind::Cluster, cluster.cluster.stat_name.clone(), stats.clone());
    }
    loop {
        let Some(cluster) = entry.upgrade() else { return };
        let names = cluster.cluster.dns_names();
        let mut found: HashMap<(ArcStr, u16), Vec<SocketAddr>> = HashMap::new();
        let mut failed = false;
        for (name, port) in names {
            stats.update_attempt.inc();
            match tokio::net::lookup_host((name.to_string(), port)).await {
                Ok(addresses) => {
                    stats.update_success.inc();
                    let chosen = of_family(addresses.collect(), config.family);
                    found.insert((name, port), chosen);
                }
                // The resolver knows that there is no such name: an answer, unless there must be an address.
                Err(e) if is_unknown(&e) && matches!(cluster.cluster.discovery, Discovery::StrictDns(_)) => {
                    stats.update_success.inc();
                    found.insert((name, port), Vec::new());
                }
                Err(e) => {
                    tracing::debug!(%name, error = %e, "cannot resolve");
                    stats.update_failure.inc();
                    failed = true;
                }
            }
        }
        let warm = cluster.warm.load(std::sync::atomic::Ordering::Acquire);
        if !failed || !warm {
            let previous = cluster.endpoints.load_full();
            let resolve = |name: &str, port: u16| found.get(&(ArcStr::from(name), port)).cloned().unwrap_or_default();
            match Endpoints::resolved(&cluster.cluster, &resolve, Some(&previous)) {
                Ok(endpoints) => {
                    let addresses = |of: &Endpoints| of.hosts().map(|host| host.address.clone()).collect::<Vec<_>>();
                    match addresses(&previous) == addresses(&endpoints) {
                        true if !failed => stats.update_no_rebuild.inc(),
                        _ => {}
                    }
                    cluster.set_endpoints(Arc::new(endpoints));
                    if !warm {
                        control.lock().unwrap_or_else(PoisonError::into_inner).finish_warming();
                    }
                }
                Err(e) => tracing::warn!(cluster = %cluster.cluster.name, error = %e, "cannot use resolved addresses"),
            }
        }
        drop(cluster);
        failures = if failed { failures + 1 } else { 0 };
        let pause = match failures {
            0 => config.refresh,
            n => (config.failure_refresh.0 * 2u32.saturating_pow(n.min(10) - 1)).min(config.failure_refresh.1),
        };
        tokio::time::sleep(pause.max(Duration::from_millis(10)) + at_random(config.jitter)).await;
    }
}

/// Whether a name does not exist or has no address, by the words of the C library, which tells in no other way.
fn is_unknown(e: &std::io::Error) -> bool {
    let text = e.to_string();
    ["Name or service not known", "No address associated with hostname"].iter().any(|known| text.contains(known))
}

/// Up to `most`, so that many proxies do not ask at once.
fn at_random(most: Duration) -> Duration {
    // A fresh RandomState is seeded from the system; nothing here needs better randomness.
    let random = RandomState::new().hash_one(0u8) as u32;
    most.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// What names of requests mean, and when that was found out.
pub(crate) type Cache = HashMap<(String, u16), (SocketAddr, Instant)>;

/// Names kept by a worker; clients choose them, so there must be an end.
const MAX_NAMES: usize = 1024;

/// The address behind a name that a request or a handshake brought, for a dynamic forward proxy.
pub(crate) async fn resolve(worker: &Worker, config: &DnsConfig, name: &str, port: u16) -> Option<SocketAddr> {
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, port));
    }
    let key = (name.to_ascii_lowercase(), port);
    if let Some((address, since)) = worker.names.borrow().get(&key)
        && since.elapsed() < config.refresh
    {
        return Some(*address);
    }
    let found = tokio::net::lookup_host((key.0.as_str(), port)).await;
    let found = found.inspect_err(|error| tracing::debug!(name, %error, "cannot resolve")).ok()?;
    let address = of_family(found.collect(), config.family).into_iter().next()?;
    let mut names = worker.names.borrow_mut();
    if names.len() >= MAX_NAMES {
        names.retain(|_, (_, since)| since.elapsed() < config.refresh);
    }
    if names.len() < MAX_NAMES {
        names.insert(key, (address, Instant::now()));
    }
    Some(address)
}

fn of_family(addresses: Vec<SocketAddr>, family: DnsFamily) -> Vec<SocketAddr> {
    let only = |v6: bool| addresses.iter().copied().filter(|a| a.is_ipv6() == v6).collect::<Vec<_>>();
    let mut chosen = match family {
        DnsFamily::V4Only => only(false),
        DnsFamily::V6Only => only(true),
        DnsFamily::All => addresses,
        DnsFamily::Auto => Some(only(true)).filter(|l| !l.is_empty()).unwrap_or_else(|| only(false)),
        DnsFamily::V4Preferred => Some(only(false)).filter(|l| !l.is_empty()).unwrap_or_else(|| only(true)),
    };
    chosen.dedup();
    chosen
}
