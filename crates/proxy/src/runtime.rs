//! What all threads of the proxy share: tables published whole, secrets, counters. Nothing here is locked on the data path.

use crate::drain::{Drain, DrainStrategy, Draining};
use crate::log::LogFiles;
use crate::stats::Registry;
use crate::tls::{ClientTls, SecretStore, ServerTls};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use mesh_types::ArcStr;
use proxy_core::balance::TableSize;
use proxy_core::circuit::Breakers;
use proxy_core::cluster::{Discovery, TransportSocket};
use proxy_core::endpoints::{HostState, Locality};
use proxy_core::listener::{FilterChain, MetadataExchange, NetworkFilter, Terminal};
use proxy_core::outlier::OutlierDetector;
use proxy_core::runtime::Live;
use proxy_core::{Address, Cluster, Endpoints, Host, Listener, ListenerSet, RouteTable, Runtime};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

/// The process-wide state.
pub(crate) struct Shared {
    pub(crate) registry: Arc<Registry>,
    pub(crate) secrets: SecretStore,
    pub(crate) clusters: ArcSwap<Clusters>,
    pub(crate) listeners: ArcSwap<Listeners>,
    pub(crate) routes: RouteSlots,
    pub(crate) resolvers: crate::dns::Resolvers,
    /// Names that requests and handshakes brought.
    pub(crate) names: crate::dns::NameCaches,
    pub(crate) logs: LogFiles,
    pub(crate) identity: crate::peer::LocalIdentity,
    pub(crate) limits: crate::hcm::LocalLimits,
    /// The last requests.
    pub(crate) rings: crate::hcm::Rings,
    ids: AtomicU64,
    /// `/healthcheck/fail`: answers say that they are unhealthy, `/ready` says DRAINING.
    pub(crate) health_failed: AtomicBool,
    /// What is done when resources run short, if the bootstrap says anything about that.
    pub(crate) overload: OnceLock<Arc<crate::overload::Overload>>,
    /// Downstream connections in sum, but for listeners that `ignore_global_conn_limit`.
    pub(crate) connections: AtomicU64,
    /// The cluster that we are a host of, and where we stand.
    pub(crate) local_cluster: OnceLock<(ArcStr, Locality)>,
    /// The file that tells of ejections.
    pub(crate) outlier_log: OnceLock<ArcStr>,
    /// Their limit, if only the runtime says one.
    pub(crate) connection_limit: OnceLock<Live<u64>>,
    /// Listeners drain: connections are closed as soon as that loses nothing.
    pub(crate) draining: Draining,
    pub(crate) started: Instant,
    pub(crate) started_at: SystemTime,
    pub(crate) concurrency: usize,
    /// This machine's address towards others.
    pub(crate) own_address: Option<std::net::IpAddr>,
    pub(crate) node: Arc<crate::bootstrap::NodeInfo>,
    /// Seconds over which a removed listener or chain lets its connections go.
    pub(crate) drain_time: std::time::Duration,
}

impl Shared {
    pub(crate) fn new(
        logs: LogFiles,
        node: Arc<crate::bootstrap::NodeInfo>,
        concurrency: usize,
        drain_time: std::time::Duration,
        strategy: DrainStrategy,
        own_address: Option<std::net::IpAddr>,
    ) -> Arc<Self> {
        let registry = Arc::<Registry>::default();
        Arc::new(Self {
            resolvers: crate::dns::Resolvers::new(&registry),
            registry,
            secrets: SecretStore::default(),
            names: crate::dns::NameCaches::default(),
            clusters: ArcSwap::default(),
            listeners: ArcSwap::default(),
            routes: RouteSlots::default(),
            logs,
            identity: crate::peer::LocalIdentity::of(&node),
            limits: crate::hcm::LocalLimits::default(),
            rings: crate::hcm::Rings::default(),
            ids: AtomicU64::new(0),
            health_failed: AtomicBool::new(false),
            overload: OnceLock::new(),
            connections: AtomicU64::new(0),
            local_cluster: OnceLock::new(),
            outlier_log: OnceLock::new(),
            connection_limit: OnceLock::new(),
            draining: Draining::new(strategy, drain_time),
            started: Instant::now(),
            started_at: SystemTime::now(),
            concurrency,
            own_address,
            node,
            drain_time,
        })
    }

    /// A number for a connection, never used twice.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }
}

/// All clusters by name.
pub(crate) type Clusters = HashMap<ArcStr, Arc<ClusterEntry>>;

/// A cluster with what belongs to it at run time. Lives until its configuration changes or goes.
pub(crate) struct ClusterEntry {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) endpoints: ArcSwap<Endpoints>,
    /// The service's names, once there is traffic to count.
    service: OnceLock<crate::peer::Service>,
    /// Circuit breakers, shared by all workers.
    pub(crate) breakers: Breakers,
    /// So many percent of the requests are answered 503, by a key of the runtime.
    maintenance: AtomicU32,
    /// Ejects hosts; locked only when a host reached a threshold, and by its timer.
    pub(crate) outlier: Option<Box<Mutex<OutlierDetector>>>,
    tls: Vec<(Arc<proxy_core::tls::UpstreamTls>, Arc<ClientTls>)>,
    /// The encoded resource, for dumps; and its version ("" when static).
    pub(crate) body: Bytes,
    pub(crate) version: ArcStr,
    pub(crate) updated: SystemTime,
    pub(crate) dynamic: bool,
    /// EDS and DNS: the endpoints came.
    pub(crate) warm: AtomicBool,
    /// Active checks: all hosts were asked once.
    pub(crate) checked: AtomicBool,
    /// Its secrets came, or were waited for long enough.
    pub(crate) has_secrets: AtomicBool,
    /// A connection to one of its hosts was wanted.
    pub(crate) used: AtomicBool,
    /// How often hosts came or went (`membership_change`), the first ones among them.
    pub(crate) membership_changes: AtomicU64,
    /// Hosts that were made as connections needed them.
    made: Mutex<HashMap<MadeFor, Arc<Host>>>,
    /// How many hosts were ever made.
    pub(crate) hosts_made: AtomicU64,
    table_size: Mutex<Option<Measured>>,
    /// How often endpoints came by EDS that change nothing (`update_no_rebuild`).
    pub(crate) unchanged: AtomicU64,
    /// Counts the times that a host was found to fail, where connections must end then.
    pub(crate) failures: Option<tokio::sync::watch::Sender<u64>>,
}

/// What a host was made for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum MadeFor {
    /// An original destination.
    Destination(SocketAddr),
    /// A name with its port.
    Name(ArcStr),
}

/// How large the table of hashes was, of these endpoints after so many changes of their health.
#[derive(Debug)]
struct Measured {
    endpoints: Arc<Endpoints>,
    changes: u64,
    size: Option<TableSize>,
}

impl ClusterEntry {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        body: Bytes,
        version: ArcStr,
        dynamic: bool,
        runtime: &Runtime,
    ) -> Arc<Self> {
        let tls = cluster.transport.tls_contexts().map(|c| (c.clone(), Arc::new(ClientTls::new(c.clone())))).collect();
        let endpoints = ArcSwap::from(cluster.endpoints.clone());
        let waits =
            matches!(cluster.discovery, Discovery::Eds { .. } | Discovery::StrictDns(_) | Discovery::LogicalDns(_));
        let entry = Arc::new(Self {
            endpoints,
            service: OnceLock::new(),
            breakers: Breakers::new(&cluster.breakers),
            maintenance: AtomicU32::new(0),
            outlier: cluster.outlier.clone().map(|c| Box::new(Mutex::new(OutlierDetector::new(*c, Instant::now())))),
            tls,
            body,
            version,
            updated: SystemTime::now(),
            dynamic,
            warm: AtomicBool::new(!waits),
            checked: AtomicBool::new(cluster.health_checks.is_empty()),
            has_secrets: AtomicBool::new(false),
            used: AtomicBool::new(false),
            membership_changes: AtomicU64::new(moved(&Endpoints::default(), &cluster.endpoints)),
            made: Mutex::default(),
            hosts_made: AtomicU64::new(0),
            table_size: Mutex::new(None),
            unchanged: AtomicU64::new(0),
            failures: cluster.close_on_failure.then(|| tokio::sync::watch::Sender::new(0)),
            cluster,
        });
        entry.follow(runtime);
        entry
    }

    /// The service's names, for metrics.
    pub(crate) fn service(&self) -> &crate::peer::Service {
        self.service.get_or_init(|| crate::peer::Service::of(&self.cluster))
    }

    /// Takes what the runtime says of this cluster.
    pub(crate) fn follow(&self, runtime: &Runtime) {
        let name = &self.cluster.name;
        self.breakers.follow(name, runtime);
        let percent = runtime.get::<u64>(&format!("upstream.maintenance_mode.{name}")).unwrap_or(0);
        self.maintenance.store(u32::try_from(percent.min(100)).unwrap_or(100), Ordering::Relaxed);
    }

    /// Whether a request is not to be served because somebody works on the cluster.
    pub(crate) fn is_in_maintenance(&self, random: &mut proxy_core::Random) -> bool {
        match self.maintenance.load(Ordering::Relaxed) {
            0 => false,
            percent => random.below(100) < u64::from(percent),
        }
    }

    /// Hosts are made as connections need them.
    pub(crate) fn makes_hosts(&self) -> bool {
        matches!(self.cluster.discovery, Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy { .. })
    }

    /// The host that was made for `key`, if it is still there.
    pub(crate) fn made(&self, key: &MadeFor) -> Option<Arc<Host>> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.get(key).filter(|host| host.state.choose()).cloned()
    }

    /// Makes a host, in place of the one before; unless there is one with this address.
    pub(crate) fn make(&self, key: MadeFor, address: SocketAddr, hostname: ArcStr) -> Arc<Host> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let address = Address::Ip(address);
        if let Some(host) = made.get(&key).filter(|host| host.address == address && host.state.choose()) {
            return host.clone();
        }
        let before = self.endpoints.load();
        let host = before.make(address, hostname);
        self.hosts_made.fetch_add(1, Ordering::Relaxed);
        if let Some(old) = made.insert(key, host.clone()) {
            old.state.leave();
        }
        let others = before.hosts().filter(|host| host.state.is_there()).cloned();
        self.publish_made(others.chain([host.clone()]).collect());
        host
    }

    /// The host made for `key` goes.
    pub(crate) fn unmake(&self, key: &MadeFor) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = made.remove(key) {
            host.state.leave();
            self.publish_made(self.endpoints.load().hosts().filter(|host| host.state.is_there()).cloned().collect());
        }
    }

    /// Lets hosts go that nobody chose since the last time and that have no connections.
    pub(crate) fn clean_up(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let before = made.len();
        let held = |state: &HostState| {
            state.stats.cx_active.load(Ordering::Relaxed) > 0 || state.active.load(Ordering::Relaxed) > 0
        };
        made.retain(|_, host| !host.state.lapses(held));
        if made.len() < before {
            self.publish_made(self.endpoints.load().hosts().filter(|host| host.state.is_there()).cloned().collect());
        }
    }

    /// Whoever changes what was made holds its lock.
    fn publish_made(&self, hosts: Vec<Arc<Host>>) {
        let before = self.endpoints.load();
        self.endpoints.store(Arc::new(Endpoints::made(hosts, &before)));
        self.membership_changes.fetch_add(1, Ordering::Relaxed);
    }

    /// The TLS for connections to `host`, `None` for plain text.
    pub(crate) fn client_tls(&self, host: &Host) -> Option<Arc<ClientTls>> {
        self.tls_of(self.cluster.transport(host).0)
    }

    /// The TLS of one of its transports.
    pub(crate) fn tls_of(&self, transport: &TransportSocket) -> Option<Arc<ClientTls>> {
        let context = transport.tls()?;
        self.tls.iter().find(|(k, _)| Arc::ptr_eq(k, context)).map(|(_, tls)| tls.clone())
    }

    /// How large the table of hashes is, of these endpoints; worked out once for each health of theirs.
    pub(crate) fn table_size(&self, endpoints: &Arc<Endpoints>) -> Option<TableSize> {
        let mut known = self.table_size.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = endpoints.health_changes();
        if let Some(known) = &*known
            && Arc::ptr_eq(&known.endpoints, endpoints)
            && known.changes == changes
        {
            return known.size;
        }
        let size = TableSize::of(&self.cluster, endpoints);
        *known = Some(Measured { endpoints: endpoints.clone(), changes, size });
        size
    }

    /// Whether its endpoints are known.
    pub(crate) fn has_endpoints(&self) -> bool {
        self.warm.load(Ordering::Acquire)
    }

    /// Whether it may be used.
    pub(crate) fn is_warm(&self) -> bool {
        self.has_endpoints() && self.checked.load(Ordering::Acquire) && self.has_secrets.load(Ordering::Acquire)
    }

    /// A host's health changed.
    pub(crate) fn tell_of_failure(&self, failed: bool) {
        if let (true, Some(failures)) = (failed, &self.failures) {
            failures.send_modify(|n| *n += 1);
        }
    }

    /// Publishes new endpoints; whether there are other hosts now.
    pub(crate) fn set_endpoints(&self, endpoints: Arc<Endpoints>) -> bool {
        let before = self.endpoints.load();
        let changes = moved(&before, &endpoints);
        self.membership_changes.fetch_add(changes, Ordering::Relaxed);
        let is_eds = matches!(self.cluster.discovery, Discovery::Eds { .. });
        if is_eds && changes == 0 && before.weighs_as(&endpoints) {
            self.unchanged.fetch_add(1, Ordering::Relaxed);
        }
        self.endpoints.store(endpoints);
        self.warm.store(true, Ordering::Release);
        changes > 0
    }
}

/// In how many priorities there are other hosts than before (Envoy counts the callbacks of its priority sets).
fn moved(before: &Endpoints, after: &Endpoints) -> u64 {
    // A host that is another now has a state of its own.
    fn by_priority(endpoints: &Endpoints) -> BTreeMap<u32, HashSet<*const HostState>> {
        let mut all: BTreeMap<u32, HashSet<*const HostState>> = BTreeMap::new();
        for host in endpoints.hosts() {
            all.entry(host.priority).or_default().insert(Arc::as_ptr(&host.state));
        }
        all
    }
    let (before, after) = (by_priority(before), by_priority(after));
    let priorities: BTreeSet<&u32> = before.keys().chain(after.keys()).collect();
    priorities.into_iter().filter(|priority| before.get(priority) != after.get(priority)).count() as u64
}

/// Route tables by RDS name. Connection managers hold the slot, so a new table is used by the next request.
#[derive(Default)]
pub(crate) struct RouteSlots(Mutex<HashMap<ArcStr, Arc<RouteSlot>>>);

/// One route table that may change, or not be there yet.
#[derive(Default)]
pub(crate) struct RouteSlot {
    pub(crate) table: ArcSwapOption<RouteTable>,
    /// Encoded resource, version and time, for dumps.
    pub(crate) dump: ArcSwapOption<(Bytes, ArcStr, SystemTime)>,
}

impl RouteSlots {
    /// The slot of that name, made when first asked for.
    pub(crate) fn slot(&self, name: &ArcStr) -> Arc<RouteSlot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name.clone()).or_default().clone()
    }

    /// All slots, sorted by name.
    pub(crate) fn all(&self) -> Vec<(ArcStr, Arc<RouteSlot>)> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = map.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Drops slots that no listener names any more.
    pub(crate) fn retain(&self, keep: impl Fn(&ArcStr) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| keep(name));
    }
}

/// All listeners as workers see them.
#[derive(Default)]
pub(crate) struct Listeners {
    pub(crate) set: ListenerSet,
    pub(crate) by_name: HashMap<ArcStr, Arc<ListenerEntry>>,
}

/// A listener with what belongs to it at run time.
pub(crate) struct ListenerEntry {
    pub(crate) listener: Arc<Listener>,
    pub(crate) chains: Vec<Arc<ChainEntry>>,
    pub(crate) body: Bytes,
    pub(crate) version: ArcStr,
    pub(crate) updated: SystemTime,
    pub(crate) dynamic: bool,
    /// Nothing but its filter chains differs from what it replaced.
    pub(crate) in_place: bool,
    /// The addresses it listens on, once it does.
    pub(crate) addresses: OnceLock<Vec<Address>>,
    /// Its routes, and its secrets, were waited for long enough.
    pub(crate) no_more_routes: AtomicBool,
    pub(crate) no_more_secrets: AtomicBool,
}

/// A filter chain: connections hold it, and are told to end when it goes.
pub(crate) struct ChainEntry {
    pub(crate) chain: Arc<FilterChain>,
    pub(crate) tls: Option<ServerTls>,
    pub(crate) routes: Option<Arc<RouteSlot>>,
    /// Whether the chain was removed or changed.
    pub(crate) drain: tokio::sync::watch::Sender<Drain>,
}

/// Istio's exchange of metadata, among network filters.
pub(crate) fn exchange_of(filters: &[NetworkFilter]) -> Option<&MetadataExchange> {
    filters.iter().find_map(|filter| match filter {
        NetworkFilter::MetadataExchange(exchange) => Some(exchange),
        _ => None,
    })
}

impl ListenerEntry {
    /// `previous`: chains that did not change are kept, and so are their connections.
    pub(crate) fn new(
        listener: Arc<Listener>,
        body: Bytes,
        version: ArcStr,
        dynamic: bool,
        previous: Option<&ListenerEntry>,
        routes: &RouteSlots,
    ) -> Self {
        let chains = listener
            .all_chains()
            .map(|chain| {
                let kept = previous
                    .and_then(|p| p.chains.iter().find(|c| c.chain.hash == chain.hash && c.chain.name == chain.name));
                match kept {
                    Some(kept) => kept.clone(),
                    None => ChainEntry::new(chain.clone(), routes),
                }
            })
            .collect();
        Self {
            listener,
            chains,
            body,
            version,
            updated: SystemTime::now(),
            dynamic,
            in_place: false,
            addresses: OnceLock::new(),
            no_more_routes: AtomicBool::new(false),
            no_more_secrets: AtomicBool::new(false),
        }
    }

    /// The run-time side of a chain that [`Listener::find_chain`] gave.
    pub(crate) fn entry_of(&self, chain: &Arc<FilterChain>) -> Option<&Arc<ChainEntry>> {
        let at = self.listener.all_chains().position(|c| Arc::ptr_eq(c, chain))?;
        self.chains.get(at)
    }

    /// Its addresses, with the ports that they really have.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        let written = || std::iter::once(&self.listener.address).chain(&self.listener.additional_addresses).cloned();
        self.addresses.get().cloned().unwrap_or_else(|| written().collect())
    }

    /// The chains that `next` does not have any more.
    pub(crate) fn missing_in(&self, next: Option<&ListenerEntry>) -> Vec<Arc<ChainEntry>> {
        let is_kept = |chain: &Arc<ChainEntry>| next.is_some_and(|n| n.chains.iter().any(|c| Arc::ptr_eq(c, chain)));
        self.chains.iter().filter(|chain| !is_kept(chain)).cloned().collect()
    }
}

impl ChainEntry {
    /// Whether a connection is to end with its next answer because the chain goes.
    pub(crate) fn lets_go(&self, draining: &Draining, random: &mut proxy_core::Random) -> bool {
        match *self.drain.borrow() {
            Drain::No => false,
            Drain::Since(began) => draining.is_due(began, random),
            Drain::Over => true,
        }
    }

    /// Why connections have ended that were cut off (Envoy's word for it: `ActiveTcpConnection`).
    pub(crate) fn cut_reason(&self) -> Option<Cow<'static, str>> {
        let over = *self.drain.borrow() == Drain::Over;
        over.then_some(Cow::Borrowed("purging_socket_that_have_not_progressed_to_connections"))
    }

    /// Resolves when connections are to be cut off.
    pub(crate) fn cut(&self) -> impl Future<Output = ()> + use<> {
        let mut drain = self.drain.subscribe();
        async move {
            // A connection holds its chain, and so the sender.
            let _ = drain.wait_for(|drain| *drain == Drain::Over).await;
        }
    }

    fn new(chain: Arc<FilterChain>, routes: &RouteSlots) -> Arc<Self> {
        let slot = match &chain.terminal {
            Terminal::Http(hcm) => hcm.rds_name().map(|name| routes.slot(name)),
            _ => None,
        };
        let exchanges = exchange_of(&chain.filters).is_some() && matches!(chain.terminal, Terminal::TcpProxy(_));
        let tls = chain.tls.clone().map(|tls| ServerTls::new(tls, exchanges));
        Arc::new(Self { chain, tls, routes: slot, drain: tokio::sync::watch::Sender::default() })
    }
}
