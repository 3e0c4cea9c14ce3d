//! The way to upstream hosts: per worker, a balancer and connection pools for each cluster.

mod connect;
mod h2_pool;
mod pool;
mod request;
mod waiting;

pub(crate) use connect::{Announced, ConnectError, Protocol, ServerNames, Source, Variant};
pub(crate) use pool::{AcquireError, Acquired, Counted, Pool};
pub(crate) use request::{Failure, Reply, Tunnel, Upstream, call};

use crate::dns;
use crate::events::HealthEvent;
use crate::peer;
use crate::runtime::{ClusterEntry, MadeFor};
use crate::stats::{Answers, ClusterStats, Workload};
use crate::worker::Worker;
use arc_swap::ArcSwap;
use mesh_types::ArcStr;
use proxy_core::balance::{Local, SubsetUse, ZoneUse};
use proxy_core::circuit::Resource;
use proxy_core::cluster::{Discovery, LbPolicy};
use proxy_core::endpoints::{Health, Locality};
use proxy_core::outlier::{Cause, Event, Outcome};
use proxy_core::{Cluster, Endpoints, Host, LoadBalancer, PickContext, StreamInfo};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// A cluster as one worker uses it. Made when first used.
pub(crate) struct WorkerCluster {
    pub(crate) entry: Arc<ClusterEntry>,
    pub(crate) stats: Arc<ClusterStats>,
    local: Option<Arc<ClusterEntry>>,
    balancer: RefCell<LoadBalancer>,
    endpoints: RefCell<Arc<Endpoints>>,
    /// By the host's address in memory: hosts live as long as their entry here.
    hosts: RefCell<HashMap<*const Host, Rc<HostPools>, ByAddress>>,
    sweeping: Cell<bool>,
    /// Another one serves new requests: connections end with those that they have.
    retired: Cell<bool>,
    /// The next choices, made already to connect to these hosts ahead.
    foreseen: RefCell<VecDeque<Arc<Host>>>,
    /// Hosts that were made for this worker's connections.
    known: RefCell<HashMap<MadeFor, Arc<Host>>>,
    /// Who the hosts are, as far as their metadata says.
    workloads: RefCell<HashMap<*const Host, Option<Arc<Workload>>, ByAddress>>,
    /// Where answers count by zones; as many as have served.
    zones: RefCell<Vec<(ArcStr, Option<Arc<Answers>>)>>,
}

/// Hashes addresses in memory. Nobody outside chooses them, so that mixing them is enough.
#[derive(Clone, Copy, Default)]
struct ByAddress;

struct AddressHasher(u64);

impl BuildHasher for ByAddress {
    type Hasher = AddressHasher;

    fn build_hasher(&self) -> AddressHasher {
        AddressHasher(0)
    }
}

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, value: usize) {
        // The table takes its place from the low bits and its tag from the high ones.
        let mixed = (self.0 ^ value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The pools of one host, one per way of connecting to it.
pub(crate) struct HostPools {
    /// Keeps the host's address in memory its own, which is the key of the table.
    host: Arc<Host>,
    pools: RefCell<Vec<(Variant, Rc<Pool>)>>,
}

impl WorkerCluster {
    /// `local`: those of our own kind, if zones are to matter, and where we stand.
    pub(crate) fn new(
        entry: Arc<ClusterEntry>,
        stats: Arc<ClusterStats>,
        seed: u64,
        local: Option<(Arc<ClusterEntry>, Locality)>,
    ) -> Rc<Self> {
        let endpoints = entry.endpoints.load_full();
        let mut balancer = LoadBalancer::new(entry.cluster.clone(), endpoints.clone(), seed);
        let local = local.map(|(local, place)| {
            balancer.set_local(Local { endpoints: local.endpoints.load_full(), place });
            local
        });
        Rc::new(Self {
            entry,
            local,
            stats,
            balancer: RefCell::new(balancer),
            endpoints: RefCell::new(endpoints),
            hosts: RefCell::default(),
            sweeping: Cell::new(false),
            retired: Cell::new(false),
            foreseen: RefCell::default(),
            known: RefCell::default(),
            workloads: RefCell::default(),
            zones: RefCell::default(),
        })
    }

    pub(crate) fn config(&self) -> &Arc<Cluster> {
        &self.entry.cluster
    }

    /// Chooses a host; `None`: no healthy upstream.
    pub(crate) fn pick(&self, context: &PickContext<'_>, random: &mut proxy_core::Random) -> Option<Arc<Host>> {
        if self.entry.makes_hosts() {
            return self.made(context);
        }
        self.refresh();
        // Retries choose with conditions.
        while context.previous.is_empty() {
            let foreseen = self.foreseen.borrow_mut().pop_front();
            match foreseen {
                Some(host) if host.health() == Health::Healthy => return Some(host),
                Some(_) => {}
                None => break,
            }
        }
        self.draw(context, random)
    }

    /// The host that stands for where a connection or request goes.
    fn made(&self, context: &PickContext<'_>) -> Option<Arc<Host>> {
        let key = match &self.config().discovery {
            Discovery::OriginalDst(config) => {
                let (address, invalid) = config.destination(context);
                self.stats.original_dst_host_invalid.add(invalid);
                MadeFor::Destination(address?)
            }
            _ => MadeFor::Name(dns::name_of(self.config(), context.headers, context.stream)?.0),
        };
        if let Some(host) = self.known.borrow().get(&key).filter(|host| host.state.choose()) {
            return Some(host.clone());
        }
        self.refresh();
        let host = match &key {
            MadeFor::Name(_) => self.entry.made(&key)?,
            MadeFor::Destination(address) => {
                let name = format!("{}{address}", self.config().name);
                self.entry.make(key.clone(), *address, name.into())
            }
        };
        let mut known = self.known.borrow_mut();
        known.retain(|_, host| host.state.is_there());
        known.insert(key, host.clone());
        Some(host)
    }

    /// Has the name looked up that a connection is for, if that is not known: the next one will find it. Nobody waits for
    /// answers to TCP.
    pub(crate) fn looks_up(&self, worker: &Worker, info: &StreamInfo) -> bool {
        let Discovery::DynamicForwardProxy { cache, .. } = &self.config().discovery else { return false };
        let Some((key, port)) = dns::name_of(self.config(), None, Some(info)) else { return false };
        worker.shared.names.get(&worker.shared, cache).starts(&worker.shared, &key, port)
    }

    fn draw(&self, context: &PickContext<'_>, random: &mut proxy_core::Random) -> Option<Arc<Host>> {
        let mut balancer = self.balancer.borrow_mut();
        let host = balancer.pick_amid(context, self.entry.breakers.under_way(), random);
        if balancer.panicked() {
            self.stats.lb_healthy_panic.inc();
        }
        match balancer.zone_use() {
            ZoneUse::None => {}
            ZoneUse::Direct => self.stats.lb_zone_routing_all_directly.inc(),
            ZoneUse::Sampled => self.stats.lb_zone_routing_sampled.inc(),
            ZoneUse::Cross => self.stats.lb_zone_routing_cross_zone.inc(),
            ZoneUse::NoCapacity => {
                self.stats.lb_zone_routing_cross_zone.inc();
                self.stats.lb_zone_no_capacity_left.inc();
            }
            ZoneUse::LocalNotOk => self.stats.lb_local_cluster_not_ok.inc(),
        }
        match balancer.subset_use() {
            SubsetUse::None => {}
            SubsetUse::Selected => self.stats.lb_subsets_selected.inc(),
            SubsetUse::Fallback => self.stats.lb_subsets_fallback.inc(),
            SubsetUse::FallbackPanic => self.stats.lb_subsets_fallback_panic.inc(),
        }
        host
    }

    /// Before a request: opens connections to the hosts that come next, if there are too few in sum for the ratio
    /// (Envoy `ClusterManagerImpl::maybePreconnect`). Only choices that depend on nothing can be foreseen.
    pub(crate) fn look_ahead(self: &Rc<Self>, worker: &Rc<Worker>, variant: &Variant) {
        let config = self.config();
        let ratio = config.predictive_ratio;
        if ratio <= 1.0 || !matches!(config.lb, LbPolicy::RoundRobin(_) | LbPolicy::Random) || config.subsets.is_some()
        {
            return;
        }
        for _ in 0..pool::AT_ONCE {
            let all = self.hosts.borrow().values().fold(pool::Load::default(), |sum, host| sum + host.load());
            let healthy = self.endpoints.borrow().hosts().filter(|host| host.health() == Health::Healthy).count();
            if !all.is_short(ratio, 1) || self.foreseen.borrow().len() >= healthy {
                return;
            }
            let context = PickContext::at(Instant::now());
            let Some(host) = self.draw(&context, &mut worker.random.borrow_mut()) else { return };
            self.foreseen.borrow_mut().push_back(host.clone());
            if !self.pool(worker, &host, variant).is_some_and(|pool| pool.connect_ahead(ratio)) {
                return;
            }
        }
    }

    /// Whether the load assignment wants this request dropped; true: like all others.
    pub(crate) fn drops(&self, random: &mut proxy_core::Random) -> Option<bool> {
        let endpoints = self.endpoints.borrow();
        endpoints.drop_category(random)?;
        Some(endpoints.drops_all())
    }

    /// Takes over endpoints that changed since the last pick.
    pub(crate) fn refresh(&self) {
        if let Some(local) = &self.local {
            let (current, mut balancer) = (local.endpoints.load(), self.balancer.borrow_mut());
            let known = balancer.local().filter(|known| !Arc::ptr_eq(&known.endpoints, &current));
            if let Some(place) = known.map(|known| known.place.clone()) {
                balancer.set_local(Local { endpoints: ArcSwap::load_full(&local.endpoints), place });
            }
        }
        let current = self.entry.endpoints.load();
        if !Arc::ptr_eq(&current, &self.endpoints.borrow()) {
            let current = ArcSwap::load_full(&self.entry.endpoints);
            self.balancer.borrow_mut().update(current.clone());
            self.foreseen.borrow_mut().clear();
            self.forget_removed(&current);
            self.workloads.borrow_mut().clear();
            *self.endpoints.borrow_mut() = current;
        }
    }

    /// Pools of hosts that are gone are dropped; what is in flight on them goes on.
    fn forget_removed(&self, endpoints: &Endpoints) {
        let present: std::collections::HashSet<*const Host> = endpoints.hosts().map(Arc::as_ptr).collect();
        let mut hosts = self.hosts.borrow_mut();
        let mut gone = Vec::new();
        hosts.retain(|ptr, pools| {
            let keep = present.contains(ptr);
            if !keep {
                gone.push(pools.clone());
            }
            keep
        });
        if gone.is_empty() {
            return;
        }
        self.known.borrow_mut().retain(|_, host| host.state.is_there());
        let by_address: HashMap<_, &Arc<Host>> = endpoints.hosts().map(|host| (&host.address, host)).collect();
        for pools in gone {
            // One that is still the same keeps its connections, whatever else is said of it now.
            let next = by_address.get(&pools.host.address).filter(|host| Arc::ptr_eq(&host.state, &pools.host.state));
            match next.filter(|host| !hosts.contains_key(&Arc::as_ptr(host))) {
                Some(host) => {
                    let kept = HostPools { host: (*host).clone(), pools: RefCell::new(pools.pools.take()) };
                    hosts.insert(Arc::as_ptr(host), Rc::new(kept));
                }
                None => pools.close_idle(),
            }
        }
    }

    /// The workload behind a host of this cluster.
    pub(crate) fn workload_of(&self, worker: &Worker, host: &Arc<Host>) -> Option<Arc<Workload>> {
        if self.entry.makes_hosts() {
            return None;
        }
        let key = Arc::as_ptr(host);
        let mut known = self.workloads.borrow_mut();
        known.entry(key).or_insert_with(|| peer::of_host(host).map(|w| worker.intern(w))).clone()
    }

    /// Where an answer counts that came from the host's zone to ours, if both are known (Envoy
    /// `CodeStatsImpl::chargeResponseStat`).
    pub(crate) fn answers_between_zones(&self, worker: &Worker, host: &Host) -> Option<Arc<Answers>> {
        let (from, to) = (&worker.shared.identity.zone, &host.locality.zone);
        if from.is_empty() || to.is_empty() {
            return None;
        }
        let mut zones = self.zones.borrow_mut();
        if let Some((_, answers)) = zones.iter().find(|(zone, _)| zone == to) {
            return answers.clone();
        }
        let answers = worker.answers(&self.config().stat_name, format!("zone.{from}.{to}"));
        zones.push((to.clone(), answers.clone()));
        answers
    }

    /// The pool for this host and way of connecting; `None` when the circuit breaker allows no further one.
    pub(crate) fn pool(self: &Rc<Self>, worker: &Rc<Worker>, host: &Arc<Host>, variant: &Variant) -> Option<Rc<Pool>> {
        let key = Arc::as_ptr(host);
        let mut hosts = self.hosts.borrow_mut();
        let pools =
            hosts.entry(key).or_insert_with(|| Rc::new(HostPools { host: host.clone(), pools: RefCell::default() }));
        let mut list = pools.pools.borrow_mut();
        if let Some((_, pool)) = list.iter().find(|(v, _)| v == variant) {
            let place = pool.take_place();
            if !place {
                self.stats.upstream_cx_pool_overflow.inc();
            }
            return place.then(|| pool.clone());
        }
        let permit = match variant.protocol {
            Protocol::Raw => None,
            _ => {
                let breaker = self.entry.breakers.get(variant.priority);
                let mut permit = breaker.acquire(Resource::Pools);
                if permit.is_none() {
                    // Another one of the host may have come to its end.
                    list.retain(|(_, pool)| !pool.is_unused());
                    permit = breaker.acquire(Resource::Pools);
                }
                let Some(permit) = permit else {
                    self.stats.upstream_cx_pool_overflow.inc();
                    return None;
                };
                Some(permit)
            }
        };
        let tls = self.entry.client_tls(host);
        let pool = Pool::new(worker.clone(), self.clone(), host.clone(), variant.clone(), tls, permit);
        list.push((variant.clone(), pool.clone()));
        Some(pool)
    }

    /// Starts closing idle connections in time, if that is not going on already.
    pub(crate) fn sweep(self: &Rc<Self>) {
        if self.sweeping.replace(true) {
            return;
        }
        let this = Rc::downgrade(self);
        // Nobody waits for it: it ends with the cluster or when nothing is idle.
        tokio::task::spawn_local(async move {
            loop {
                let Some(pause) = this.upgrade().map(|cluster| cluster.sweep_pause()) else { return };
                tokio::time::sleep(pause).await;
                let Some(cluster) = this.upgrade() else { return };
                // Hosts may be gone that nothing asks for any more.
                cluster.refresh();
                if !cluster.sweep_once() {
                    cluster.sweeping.set(false);
                    return;
                }
            }
        });
    }

    /// Short timeouts are looked after more often.
    fn sweep_pause(&self) -> Duration {
        let config = self.config();
        let shortest = [config.idle_timeout, config.max_connection_duration].into_iter().flatten().min();
        shortest.map_or(SWEEP, |timeout| (timeout / 4).clamp(Duration::from_millis(10), SWEEP))
    }

    /// True while something is left to watch.
    fn sweep_once(&self) -> bool {
        let now = Instant::now();
        let mut left = false;
        self.hosts.borrow_mut().retain(|_, pools| {
            let busy = pools.sweep(now);
            left |= busy;
            busy || !self.entry.makes_hosts()
        });
        left
    }

    /// Closes what idles now, and what is in use afterwards: the cluster was changed, removed or is drained.
    pub(crate) fn retire(&self) {
        self.retired.set(true);
        for pools in self.hosts.borrow().values() {
            pools.close_idle();
        }
    }
}

impl WorkerCluster {
    /// Tells outlier detection how a try went.
    pub(crate) fn on_result(&self, host: &Arc<Host>, outcome: Option<Outcome>, worker: &Worker) {
        let stats = &host.state.stats;
        match outcome {
            // Whether an answer is a success shows later.
            None
            | Some(Outcome::Connected | Outcome::ConnectedForRequests | Outcome::Status(_) | Outcome::Degraded(_)) => {}
            Some(_) => stats.count(false),
        }
        if outcome == Some(Outcome::Timeout) {
            stats.rq_timeout.fetch_add(1, Relaxed);
        }
        self.judge(host, outcome, worker);
    }

    /// As [`on_result`](Self::on_result), of a TCP connection, which is no request that fails.
    pub(crate) fn judge(&self, host: &Arc<Host>, outcome: Option<Outcome>, worker: &Worker) {
        let (Some(outcome), Some(config), Some(detector)) = (outcome, &self.config().outlier, &self.entry.outlier)
        else {
            return;
        };
        let causes = config.report(host, outcome);
        let degrades = config.degrades(host, outcome);
        if causes == [None, None] && !degrades {
            return;
        }
        let endpoints = self.entry.endpoints.load();
        let (now, random) = (Instant::now(), &mut *worker.random.borrow_mut());
        let events: Vec<Event> = {
            let mut detector = detector.lock().unwrap_or_else(PoisonError::into_inner);
            let degraded = degrades.then(|| detector.degrade(host, &endpoints, now, random)).flatten();
            let causes = causes.into_iter().flatten();
            let ejected = causes.filter_map(|cause| detector.on_threshold(host, cause, &endpoints, now, random));
            degraded.into_iter().chain(ejected).collect()
        };
        for event in events {
            count_outlier(&self.stats, &event);
            crate::events::outlier(&worker.shared, &self.config().name, &event, None);
            self.entry.tell_of_failure(matches!(event, Event::Ejected { enforced: true, .. }));
        }
    }

    /// A host said in an answer that it fails (`x-envoy-immediate-health-check-fail`).
    pub(crate) fn on_own_word(&self, host: &Host, worker: &Worker) {
        if host.state.on_own_word() {
            let event = HealthEvent::Ejected { failure: crate::events::Failure::Passive, status: 0 };
            for checks in &self.config().health_checks {
                crate::events::health(&worker.shared, checks, &self.config().name, host, event);
            }
            self.stats.other.inc("health_check.passive_failure");
            self.stats.other.inc("health_check.failure");
            self.entry.tell_of_failure(true);
        }
    }
}

/// Counts an ejection as Envoy (`outlier_detection.*`).
pub(crate) fn count_outlier(stats: &ClusterStats, event: &Event) {
    let (Event::Ejected { cause, .. } | Event::Overflow { cause, .. }) = event else {
        if matches!(event, Event::Degraded { .. }) {
            stats.other.inc("outlier_detection.ejections_detected_degradation");
        }
        return;
    };
    stats.other.inc(&format!("outlier_detection.ejections_detected_{}", cause_name(*cause)));
    match cause {
        Cause::Consecutive5xx => stats.other.inc("outlier_detection.ejections_consecutive_5xx"),
        Cause::SuccessRate => stats.other.inc("outlier_detection.ejections_success_rate"),
        _ => {}
    }
    // Deprecated, and never counted for younger causes.
    if let (Event::Ejected { .. }, Cause::Consecutive5xx | Cause::SuccessRate) = (event, cause) {
        stats.other.inc("outlier_detection.ejections_total");
    }
    match event {
        Event::Ejected { enforced: true, .. } => {
            stats.other.inc("outlier_detection.ejections_enforced_total");
            stats.other.inc(&format!("outlier_detection.ejections_enforced_{}", cause_name(*cause)));
        }
        Event::Overflow { .. } => stats.other.inc("outlier_detection.ejections_overflow"),
        _ => {}
    }
}

/// Makes the counters of outlier detection exist.
pub(crate) fn touch_outlier(stats: &ClusterStats) {
    for what in ["consecutive_5xx", "enforced_total", "overflow", "success_rate", "total"] {
        stats.other.touch(&format!("outlier_detection.ejections_{what}"));
    }
    stats.other.touch("outlier_detection.ejections_detected_degradation");
    for cause in [
        Cause::Consecutive5xx,
        Cause::ConsecutiveGateway,
        Cause::ConsecutiveLocal,
        Cause::SuccessRate,
        Cause::LocalSuccessRate,
        Cause::FailurePercentage,
        Cause::LocalFailurePercentage,
    ] {
        stats.other.touch(&format!("outlier_detection.ejections_detected_{}", cause_name(cause)));
        stats.other.touch(&format!("outlier_detection.ejections_enforced_{}", cause_name(cause)));
    }
}

/// As the names of its counters end.
fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Consecutive5xx => "consecutive_5xx",
        Cause::ConsecutiveGateway => "consecutive_gateway_failure",
        Cause::ConsecutiveLocal => "consecutive_local_origin_failure",
        Cause::SuccessRate => "success_rate",
        Cause::LocalSuccessRate => "local_origin_success_rate",
        Cause::FailurePercentage => "failure_percentage",
        Cause::LocalFailurePercentage => "local_origin_failure_percentage",
    }
}

/// How often idle connections are looked at: bounds how late an idle timeout may be, and how long a connection that
/// the peer closed stays counted.
const SWEEP: Duration = Duration::from_secs(1);

impl HostPools {
    fn sweep(&self, now: Instant) -> bool {
        let mut busy = false;
        // Pools whose making clients decide could become many: they end with what they have.
        self.pools.borrow_mut().retain(|(variant, pool)| {
            let used = pool.sweep(now);
            busy |= used;
            used || (variant.is_lasting())
        });
        busy
    }

    fn load(&self) -> pool::Load {
        self.pools.borrow().iter().fold(pool::Load::default(), |sum, (_, pool)| sum + pool.load())
    }

    fn close_idle(&self) {
        for (_, pool) in self.pools.borrow().iter() {
            pool.close_idle();
        }
    }
}

/// Counts a request (or a TCP connection, which is one) on its host and cluster while it lives.
pub(crate) struct Active {
    cluster: Rc<WorkerCluster>,
    host: Arc<Host>,
}

impl Active {
    pub(crate) fn new(cluster: Rc<WorkerCluster>, host: Arc<Host>) -> Self {
        cluster.stats.upstream_rq_active.inc();
        host.state.active.fetch_add(1, Relaxed);
        host.state.stats.rq_total.fetch_add(1, Relaxed);
        Self { cluster, host }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.cluster.stats.upstream_rq_active.dec();
        self.host.state.active.fetch_sub(1, Relaxed);
    }
}
