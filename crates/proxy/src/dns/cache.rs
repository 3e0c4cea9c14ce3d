//! Names that requests and handshakes bring (dynamic forward proxies): asked for once, kept, asked for again, forgotten.
//!
//! Workers read a table of names that is replaced whole; a task for each name writes it.

use crate::dns::resolver::Unresolved;
use crate::runtime::{ClusterEntry, MadeFor, Shared};
use crate::stats::{Kind, PlainStats};
use arc_swap::ArcSwap;
use mesh_types::ArcStr;
use proxy_core::cluster::NameCache;
use proxy_core::{Cluster, Headers, StreamInfo};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// All caches by name.
#[derive(Default)]
pub(crate) struct NameCaches {
    caches: ArcSwap<HashMap<ArcStr, Arc<DnsCache>>>,
    /// Held by who adds one.
    adding: Mutex<()>,
    /// Where lookups run.
    runtime: OnceLock<Handle>,
}

impl NameCaches {
    /// Lookups run there from now on.
    pub(crate) fn run_on(&self, runtime: Handle) {
        // Set once, when the proxy starts.
        let _ = self.runtime.set(runtime);
    }

    /// The cache of this configuration, made when first asked for.
    pub(crate) fn get(&self, shared: &Arc<Shared>, config: &Arc<NameCache>) -> Arc<DnsCache> {
        if let Some(cache) = self.caches.load().get(&config.name) {
            return cache.clone();
        }
        let adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut caches = HashMap::clone(&self.caches.load());
        if let Some(cache) = caches.get(&config.name) {
            return cache.clone();
        }
        let cache = DnsCache::new(shared, config.clone());
        caches.insert(config.name.clone(), cache.clone());
        self.caches.store(Arc::new(caches));
        drop(adding);
        for (name, port) in &cache.config.ahead {
            cache.start(shared, &key_of(name, *port), *port);
        }
        cache
    }
}

/// What is known of some names.
pub(crate) struct DnsCache {
    config: Arc<NameCache>,
    names: ArcSwap<HashMap<ArcStr, Arc<Name>>>,
    /// Clusters that have a host for each of them. Who holds the lock may replace the table.
    clusters: Mutex<Vec<Weak<ClusterEntry>>>,
    /// Requests that wait for answers.
    waiting: AtomicU64,
    /// As many as the gauges say.
    shown: AtomicU64,
    stats: Arc<PlainStats>,
    began: Instant,
}

/// One name with its port.
struct Name {
    key: ArcStr,
    /// What it means; who waits for the first answer is told.
    meaning: watch::Sender<Option<Meaning>>,
    /// When it was last asked for, in milliseconds since the cache began.
    used: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Meaning {
    /// An address stays when later lookups fail.
    address: Option<SocketAddr>,
    /// What the resolver said of the last lookup without an address.
    details: &'static str,
}

/// What came of asking for a name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lookup {
    Found,
    /// Nobody knows it, for this reason.
    Unknown(&'static str),
    /// There are too many names.
    Overflow,
    /// Too many requests wait for answers.
    Pending,
}

impl Lookup {
    /// What the access log says of a request that ends with it.
    pub(crate) fn details(self) -> String {
        match self {
            Self::Found => String::new(),
            Self::Unknown(why) => format!("dns_resolution_failure{{{}}}", why.replace(' ', "_")),
            Self::Overflow => "dns_cache_overflow".to_owned(),
            Self::Pending => "dns_cache_pending_requests_overflow".to_owned(),
        }
    }
}

/// What its counters are named.
const COUNTERS: [&str; 11] = [
    "cache_load",
    "dns_address_filter_out",
    "dns_query_attempt",
    "dns_query_failure",
    "dns_query_success",
    "dns_query_timeout",
    "dns_rq_pending_overflow",
    "host_added",
    "host_address_changed",
    "host_overflow",
    "host_removed",
];

impl DnsCache {
    fn new(shared: &Shared, config: Arc<NameCache>) -> Arc<Self> {
        let stats = Arc::new(PlainStats::default());
        shared.registry.add(Kind::Plain, "".into(), stats.clone());
        let cache = Arc::new(Self {
            config,
            names: ArcSwap::default(),
            clusters: Mutex::default(),
            waiting: AtomicU64::new(0),
            shown: AtomicU64::new(0),
            stats,
            began: Instant::now(),
        });
        for counter in COUNTERS {
            cache.stats.other.touch(&cache.stat(counter));
        }
        shared.resolvers.touch();
        cache.stats.other.set_gauge(&cache.stat("num_hosts"), 0);
        cache.show_waiting(0);
        cache
    }

    fn stat(&self, name: &str) -> String {
        format!("dns_cache.{}.{name}", self.config.name)
    }

    fn count(&self, name: &str) {
        self.stats.other.inc(&self.stat(name));
    }

    /// Its names are hosts of this cluster, now and later.
    pub(crate) fn serve(&self, entry: &Arc<ClusterEntry>) {
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        clusters.retain(|cluster| cluster.strong_count() > 0);
        clusters.push(Arc::downgrade(entry));
        for name in self.names.load().values() {
            if let Some(address) = name.meaning.borrow().and_then(|meaning| meaning.address) {
                entry.make(MadeFor::Name(name.key.clone()), address, name.key.clone());
            }
        }
    }

    /// What a name means: at once if that is known, else as soon as somebody says.
    pub(crate) async fn look_up(self: &Arc<Self>, shared: &Arc<Shared>, key: &ArcStr, port: u16) -> Lookup {
        let Some(_waiting) = Waiting::begin(self) else {
            self.count("dns_rq_pending_overflow");
            return Lookup::Pending;
        };
        match self.known(key) {
            Some(Known::Means(meaning)) => meaning.into(),
            Some(Known::Awaited(mut answer)) => self.wait(&mut answer).await,
            None if self.names.load().len() >= self.config.max_names => {
                self.count("host_overflow");
                Lookup::Overflow
            }
            None => match self.start(shared, key, port) {
                Some(mut answer) => self.wait(&mut answer).await,
                None => Lookup::Unknown(""),
            },
        }
    }

    /// What is known of a name that nobody needs to wait for.
    pub(crate) fn known_now(&self, key: &ArcStr) -> Option<Lookup> {
        match self.known(key)? {
            Known::Means(meaning) => Some(meaning.into()),
            Known::Awaited(_) => None,
        }
    }

    /// Has a name looked up that nobody asked for yet; whether its meaning is still awaited.
    pub(crate) fn starts(self: &Arc<Self>, shared: &Arc<Shared>, key: &ArcStr, port: u16) -> bool {
        match self.known(key) {
            Some(Known::Means(_)) => false,
            Some(Known::Awaited(_)) => true,
            None if self.names.load().len() >= self.config.max_names => {
                self.count("host_overflow");
                false
            }
            None => self.start(shared, key, port).is_some(),
        }
    }

    fn known(&self, key: &ArcStr) -> Option<Known> {
        let names = self.names.load();
        let name = names.get(key)?;
        name.used.store(self.now(), Relaxed);
        let meaning = *name.meaning.borrow();
        Some(meaning.map_or_else(|| Known::Awaited(name.meaning.subscribe()), Known::Means))
    }

    async fn wait(&self, answer: &mut watch::Receiver<Option<Meaning>>) -> Lookup {
        let waiting = self.waiting.load(Relaxed);
        self.shown.store(waiting, Relaxed);
        self.show_waiting(waiting);
        let found = answer.wait_for(Option::is_some).await.ok().and_then(|meaning| *meaning);
        found.map_or(Lookup::Unknown(""), Lookup::from)
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Adds a name. Who asks for the same at the same time gets the same answer.
    fn start(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        key: &ArcStr,
        port: u16,
    ) -> Option<watch::Receiver<Option<Meaning>>> {
        let runtime = shared.names.runtime.get()?;
        let _writing = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = self.names.load().get(key) {
            return Some(name.meaning.subscribe());
        }
        let (meaning, answer) = watch::channel(None);
        let name = Arc::new(Name { key: key.clone(), meaning, used: AtomicU64::new(self.now()) });
        self.replace(|names| {
            names.insert(key.clone(), name.clone());
        });
        self.count("host_added");
        // Ends when the name is forgotten, or with the proxy.
        runtime.spawn(keep(Arc::downgrade(shared), Arc::downgrade(self), name, port));
        Some(answer)
    }

    fn replace(&self, change: impl FnOnce(&mut HashMap<ArcStr, Arc<Name>>)) {
        let mut names = HashMap::clone(&self.names.load());
        change(&mut names);
        self.stats.other.set_gauge(&self.stat("num_hosts"), names.len() as u64);
        self.names.store(Arc::new(names));
    }

    /// Takes an answer; how long it holds.
    fn take(
        &self,
        name: &Name,
        port: u16,
        answer: Result<super::resolver::Answer, Unresolved>,
    ) -> Result<Duration, ()> {
        let before = *name.meaning.borrow();
        let (found, details, holds) = match answer {
            Ok(answer) => {
                self.count("dns_query_success");
                let address = answer.addresses.first().map(|ip| SocketAddr::new(*ip, port));
                // Of what is in no record of DNS nobody says how long it holds (c-ares: no time at all).
                let ttl = answer.ttl.unwrap_or_default().max(self.config.dns.min_refresh);
                let holds = if address.is_some() { ttl } else { self.config.dns.refresh };
                (address, answer.details, Ok(holds))
            }
            Err(why) => {
                self.count("dns_query_failure");
                if why == Unresolved::Late {
                    self.count("dns_query_timeout");
                }
                (None, why.details(), Err(()))
            }
        };
        let known = before.and_then(|meaning| meaning.address);
        let address = found.or(known);
        if let Some(found) = found.filter(|found| Some(*found) != known) {
            self.count("host_address_changed");
            // DIFFERS: the name gets another host; Envoy keeps the host, and with it connections to the address before.
            let clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
            for cluster in clusters.iter().filter_map(Weak::upgrade) {
                cluster.make(MadeFor::Name(name.key.clone()), found, name.key.clone());
            }
        }
        name.meaning.send_replace(Some(Meaning { address, details }));
        holds
    }

    /// Whether nobody used the name for long; it is forgotten then.
    fn forgets(&self, name: &Name) -> bool {
        let idle = self.now().saturating_sub(name.used.load(Relaxed));
        if u128::from(idle) <= self.config.host_ttl.as_millis() {
            return false;
        }
        let clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters.iter().filter_map(Weak::upgrade) {
            cluster.unmake(&MadeFor::Name(name.key.clone()));
        }
        self.replace(|names| {
            names.remove(&name.key);
        });
        self.count("host_removed");
        true
    }

    fn show_waiting(&self, waiting: u64) {
        let left = self.config.max_pending.saturating_sub(waiting);
        self.stats.other.set_gauge(&self.stat("circuit_breakers.rq_pending_remaining"), left);
        let open = u64::from(waiting > 0 && left == 0);
        self.stats.other.set_gauge(&self.stat("circuit_breakers.rq_pending_open"), open);
    }
}

enum Known {
    Means(Meaning),
    Awaited(watch::Receiver<Option<Meaning>>),
}

impl From<Meaning> for Lookup {
    fn from(meaning: Meaning) -> Self {
        if meaning.address.is_some() { Self::Found } else { Self::Unknown(meaning.details) }
    }
}

/// A request that waits for an answer.
struct Waiting<'a>(&'a DnsCache);

impl<'a> Waiting<'a> {
    fn begin(cache: &'a DnsCache) -> Option<Self> {
        let most = cache.config.max_pending;
        cache.waiting.fetch_update(Relaxed, Relaxed, |n| (n < most).then_some(n + 1)).ok()?;
        Some(Self(cache))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let left = self.0.waiting.fetch_sub(1, Relaxed) - 1;
        // What nobody waited for was not shown.
        if self.0.shown.swap(left, Relaxed) != left {
            self.0.show_waiting(left);
        }
    }
}

/// Asks for a name, and asks again, until nobody wants it any more.
async fn keep(shared: Weak<Shared>, cache: Weak<DnsCache>, name: Arc<Name>, port: u16) {
    let mut failures = 0u32;
    loop {
        let (Some(shared), Some(cache)) = (shared.upgrade(), cache.upgrade()) else { return };
        if failures == 0 && name.meaning.borrow().is_some() && cache.forgets(&name) {
            return;
        }
        cache.count("dns_query_attempt");
        let host = name.key.rsplit_once(':').map_or(&*name.key, |(host, _)| host);
        let dns = &cache.config.dns;
        let asked = shared.resolvers.resolve(&dns.servers, dns.family, host);
        let answer = match cache.config.query_timeout {
            Some(longest) => tokio::time::timeout(longest, asked).await.unwrap_or(Err(Unresolved::Late)),
            None => asked.await,
        };
        let pause = match cache.take(&name, port, answer) {
            Ok(holds) => {
                failures = 0;
                holds
            }
            Err(()) => {
                failures = failures.saturating_add(1);
                super::pause_after(failures, dns)
            }
        };
        drop((shared, cache));
        tokio::time::sleep(pause).await;
    }
}

/// The name with the port under which it is kept (Envoy `DnsHostInfo::normalizeHostForDfp`).
pub(crate) fn key_of(host: &str, port: u16) -> ArcStr {
    match port_in(host) {
        Some(_) => host.into(),
        None => format!("{host}:{port}").into(),
    }
}

fn port_in(host: &str) -> Option<u16> {
    let (_, port) = host.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'))?;
    port.parse().ok()
}

/// The name that a request or a connection is for, as its key, and the port: what the filter state says, else the host, else
/// the SNI (Envoy `dynamic_forward_proxy::Cluster::LoadBalancer::chooseHost`).
pub(crate) fn name_of(
    cluster: &Cluster,
    headers: Option<&Headers>,
    stream: Option<&StreamInfo>,
) -> Option<(ArcStr, u16)> {
    let state = |key: &str| stream.and_then(|info| info.filter_state.values.get(key)).map(|value| &**value);
    let sni = || stream.and_then(|info| info.connection.server_name.as_deref());
    let host = state("envoy.upstream.dynamic_host");
    let host = host.or_else(|| headers.map_or_else(sni, Headers::authority)).filter(|host| !host.is_empty())?;
    let default = if cluster.transport.default.tls().is_some() { 443 } else { 80 };
    let port = state("envoy.upstream.dynamic_port").and_then(|port| port.parse().ok());
    let port = port_in(host).or(port).unwrap_or(default);
    Some((key_of(host, port), port))
}
