//! Hosts of clusters that come and go by themselves: names are resolved, and resolved again; destinations are forgotten.

mod cache;
mod resolver;

pub(crate) use cache::{Lookup, NameCaches, key_of, name_of};
pub(crate) use resolver::Resolvers;

use crate::control::Control;
use crate::runtime::ClusterEntry;
use crate::stats::{ClusterStats, Kind};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use mesh_types::ArcStr;
use proxy_core::Endpoints;
use proxy_core::cluster::{Discovery, DnsConfig};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;

/// Serves clusters as they come; one task each, which ends with the cluster.
pub(crate) async fn run(mut clusters: UnboundedReceiver<Arc<ClusterEntry>>, control: Arc<Mutex<Control>>) {
    let runtime = tokio::runtime::Handle::current();
    control.lock().unwrap_or_else(PoisonError::into_inner).shared.names.run_on(runtime);
    while let Some(entry) = clusters.recv().await {
        // All of them end when the cluster is dropped.
        match &entry.cluster.discovery {
            Discovery::StrictDns(config) | Discovery::LogicalDns(config) => {
                tokio::spawn(keep_resolved(Arc::downgrade(&entry), config.clone(), control.clone()));
            }
            Discovery::OriginalDst(config) => {
                tokio::spawn(clean_up(Arc::downgrade(&entry), config.cleanup_interval));
            }
            Discovery::DynamicForwardProxy { cache, .. } => {
                let shared = control.lock().unwrap_or_else(PoisonError::into_inner).shared.clone();
                shared.names.get(&shared, cache).serve(&entry);
            }
            Discovery::Static | Discovery::Eds { .. } => {}
        }
    }
}

/// Lets original destinations go that nobody wants any more.
async fn clean_up(entry: Weak<ClusterEntry>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(entry) = entry.upgrade() else { return };
        entry.clean_up();
    }
}

/// Asks for the cluster's names, each at its own time, and takes over what they mean.
async fn keep_resolved(entry: Weak<ClusterEntry>, config: DnsConfig, control: Arc<Mutex<Control>>) {
    let Some(cluster) = entry.upgrade() else { return };
    // One host there is in any case: that its name means nothing now is no news.
    let logical = matches!(cluster.cluster.discovery, Discovery::LogicalDns(_));
    let shared = control.lock().unwrap_or_else(PoisonError::into_inner).shared.clone();
    let stats = Arc::new(ClusterStats::default());
    shared.registry.add(Kind::Cluster, cluster.cluster.stat_name.clone(), stats.clone());
    let names = cluster.cluster.dns_names();
    drop(cluster);
    if names.is_empty() {
        take_over(&entry, &control, &HashMap::new());
    }

    let ask = |index: usize, pause: Duration| {
        let (resolvers, config, stats, name) = (&shared.resolvers, &config, &stats, &names[index].0);
        async move {
            tokio::time::sleep(pause).await;
            stats.update_attempt.inc();
            (index, resolvers.resolve(&config.servers, config.family, name).await)
        }
    };
    let mut asked: FuturesUnordered<_> = (0..names.len()).map(|index| ask(index, Duration::ZERO)).collect();
    let mut known: HashMap<&(ArcStr, u16), Vec<SocketAddr>> = HashMap::new();
    // What one name means is taken over, and the cluster served, whatever others do (Envoy `StrictDnsClusterImpl`).
    let mut unasked: HashSet<usize> = (0..names.len()).collect();
    let mut failures = vec![0u32; names.len()];
    while let Some((index, answer)) = asked.next().await {
        if entry.strong_count() == 0 {
            return;
        }
        let name = &names[index];
        let was_first = unasked.remove(&index);
        let answer = answer.inspect_err(|why| tracing::debug!(name = %name.0, ?why, "cannot resolve")).ok();
        let answer = answer.filter(|answer| !(logical && answer.addresses.is_empty()));
        let mut changed = false;
        let pause = match answer {
            Some(answer) => {
                stats.update_success.inc();
                failures[index] = 0;
                let addresses = with_port(answer.addresses, name.1);
                changed = known.get(name).map_or(&[][..], |known| known) != addresses;
                if !changed {
                    stats.update_no_rebuild.inc();
                }
                known.insert(name, addresses);
                let ttl = answer.ttl.filter(|_| config.respect_ttl).map(|ttl| ttl.max(config.min_refresh));
                ttl.unwrap_or(config.refresh) + at_random(config.jitter)
            }
            None => {
                stats.update_failure.inc();
                failures[index] = failures[index].saturating_add(1);
                pause_after(failures[index], &config)
            }
        };
        if changed || was_first {
            take_over(&entry, &control, &known);
        }
        asked.push(ask(index, pause.max(Duration::from_millis(10))));
    }
}

/// How long nobody is asked after so many failures, at least one.
fn pause_after(failures: u32, config: &DnsConfig) -> Duration {
    let (base, longest) = config.failure_refresh;
    (base * 2u32.pow(failures.clamp(1, 11) - 1)).min(longest)
}

/// The cluster's hosts have these addresses now.
fn take_over(entry: &Weak<ClusterEntry>, control: &Mutex<Control>, known: &HashMap<&(ArcStr, u16), Vec<SocketAddr>>) {
    let Some(cluster) = entry.upgrade() else { return };
    let previous = cluster.endpoints.load_full();
    let resolve = |name: &str, port: u16| known.get(&(ArcStr::from(name), port)).cloned().unwrap_or_default();
    match Endpoints::resolved(&cluster.cluster, &resolve, Some(&previous)) {
        Ok(endpoints) => {
            let was_warm = cluster.warm.load(Ordering::Acquire);
            let mut control = control.lock().unwrap_or_else(PoisonError::into_inner);
            control.put_endpoints(&cluster, endpoints);
            if !was_warm {
                control.finish_warming();
            }
        }
        Err(error) => tracing::warn!(cluster = %cluster.cluster.name, %error, "cannot use resolved addresses"),
    }
}

/// Each address once, as a socket's.
fn with_port(addresses: Vec<IpAddr>, port: u16) -> Vec<SocketAddr> {
    let mut all: Vec<SocketAddr> = Vec::with_capacity(addresses.len());
    for ip in addresses {
        let address = SocketAddr::new(ip, port);
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// Up to `most`, so that many proxies do not ask at once.
fn at_random(most: Duration) -> Duration {
    // A fresh RandomState is seeded from the system; nothing here needs better randomness.
    let random = RandomState::new().hash_one(0u8) as u32;
    most.mul_f64(f64::from(random) / f64::from(u32::MAX))
}
