//! Choosing a host: priority by health, locality by weight, host by policy.
//!
//! One [`LoadBalancer`] a worker and cluster. It sorts its hosts when they or their health changed, and draws after that.

mod bounded;
mod consistent;
mod priority;
mod schedule;
mod subset;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::address::Address;
use crate::cluster::{Cluster, Discovery, LbPolicy, OriginalDst, SubsetConfig};
use crate::endpoints::{Endpoints, Health, Host};
use crate::headers::Headers;
use crate::metadata::MetadataMatch;
use crate::random::Random;
use crate::retry::RetryPolicy;
use priority::PriorityLoad;
use schedule::HostGroup;
use subset::Subsets;
pub use subset::{SubsetCount, SubsetUse};

/// What a choice looks at.
#[derive(Clone, Copy, Debug)]
pub struct PickContext<'a> {
    /// The request's hash, for ring hash and Maglev.
    pub hash: Option<u64>,
    /// Subset criteria of the route.
    pub metadata_match: Option<&'a MetadataMatch>,
    /// Hosts that were tried before.
    pub previous: &'a [Arc<Host>],
    /// Says what follows from that.
    pub retry: Option<&'a RetryPolicy>,
    /// The host of a stateful session (address as text), if it may get traffic.
    pub override_host: Option<&'a str>,
    /// Where the connection wanted to go; for a dynamic forward proxy, what the name of the request means.
    pub original_dst: Option<SocketAddr>,
    /// Request head, for original destinations by header.
    pub headers: Option<&'a Headers>,
    /// The moment.
    pub now: Instant,
}

impl PickContext<'_> {
    /// A choice that depends on nothing.
    pub fn at(now: Instant) -> Self {
        Self {
            hash: None,
            metadata_match: None,
            previous: &[],
            retry: None,
            override_host: None,
            original_dst: None,
            headers: None,
            now,
        }
    }
}

/// Chooses hosts of one cluster for one worker.
#[derive(Debug)]
pub struct LoadBalancer {
    cluster: Arc<Cluster>,
    endpoints: Arc<Endpoints>,
    epoch: u64,
    all: Pool,
    subsets: Subsets,
    /// Original destinations seen, and resolved names.
    ephemeral: HashMap<Address, Arc<Host>>,
    seed: u64,
    panicked: bool,
    subset_use: SubsetUse,
}

/// Hosts to choose from: all of a cluster, or one subset.
#[derive(Debug, Default)]
struct Pool {
    loads: Vec<PriorityLoad>,
    groups: Vec<PriorityGroups>,
}

/// The hosts of one priority, by health.
#[derive(Debug)]
struct PriorityGroups {
    healthy: Localities,
    degraded: Localities,
    any: Localities,
    /// Of all hosts, those that do not count: number and weight.
    excluded: (usize, u64),
}

/// Hosts in one group, or in one group a locality with weights.
#[derive(Debug)]
struct Localities {
    groups: Vec<HostGroup>,
    /// Which group next; `None`: there is only one.
    schedule: Option<schedule::Weighted>,
    hash: Option<consistent::Table>,
}

/// More destinations than this are cleaned up: those nobody holds.
const EPHEMERAL_LIMIT: usize = 1024;

impl LoadBalancer {
    /// A balancer over these hosts; equal seeds choose equally.
    pub fn new(cluster: Arc<Cluster>, endpoints: Arc<Endpoints>, seed: u64) -> Self {
        let mut balancer = Self {
            cluster,
            endpoints,
            epoch: 0,
            all: Pool::default(),
            subsets: Subsets::default(),
            ephemeral: HashMap::new(),
            seed,
            panicked: false,
            subset_use: SubsetUse::default(),
        };
        balancer.rebuild();
        balancer
    }

    /// The hosts are these now.
    pub fn update(&mut self, endpoints: Arc<Endpoints>) {
        self.endpoints = endpoints;
        self.rebuild();
    }

    /// The hosts it chooses from.
    pub fn endpoints(&self) -> &Arc<Endpoints> {
        &self.endpoints
    }

    fn rebuild(&mut self) {
        self.epoch = self.endpoints.epoch.load(Ordering::Acquire);
        self.all = Pool::new(&self.cluster, &self.endpoints, self.seed, |_| true);
        self.subsets.clear();
    }

    /// Whether the last choice was made in panic (statistic `lb_healthy_panic`).
    pub fn panicked(&self) -> bool {
        self.panicked
    }

    /// The host for a request to a cluster that has no other; see [`pick_amid`](LoadBalancer::pick_amid).
    pub fn pick(&mut self, cx: &PickContext<'_>, random: &mut Random) -> Option<Arc<Host>> {
        self.pick_amid(cx, 0, random)
    }

    /// The host for a request; `None`: there is none (flag UH, details `no_healthy_upstream`). `under_way`: requests of
    /// all workers to the cluster, by which bounded loads are measured.
    pub fn pick_amid(&mut self, cx: &PickContext<'_>, under_way: u64, random: &mut Random) -> Option<Arc<Host>> {
        self.panicked = false;
        self.subset_use = SubsetUse::default();
        if let Discovery::OriginalDst(config) = &self.cluster.discovery {
            let address = destination(config, cx)?;
            return Some(self.ephemeral_host(Address::Ip(address), ""));
        }
        if let Discovery::DynamicForwardProxy(_) = &self.cluster.discovery {
            return cx.original_dst.map(|address| self.ephemeral_host(Address::Ip(address), ""));
        }
        if self.endpoints.epoch.load(Ordering::Acquire) != self.epoch {
            self.rebuild();
        }
        if let Some(host) = cx.override_host.and_then(|wanted| self.session_host(wanted)) {
            return Some(host);
        }
        if self.cluster.subsets.is_none() {
            return self.all.pick(&self.cluster, cx, under_way, &mut self.panicked, random);
        }
        let cluster = self.cluster.clone();
        let config = cluster.subsets.as_ref()?;
        match config.alternatives(cx.metadata_match) {
            None => self.pick_in_subset(config, cx.metadata_match, cx, under_way, random),
            Some(all) => {
                all.iter().find_map(|criteria| self.pick_in_subset(config, Some(criteria), cx, under_way, random))
            }
        }
    }

    fn pick_in_subset(
        &mut self,
        config: &SubsetConfig,
        criteria: Option<&MetadataMatch>,
        cx: &PickContext<'_>,
        under_way: u64,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        let cluster = &self.cluster;
        let (choice, used) = self.subsets.choose(config, cluster, &self.endpoints, self.seed, criteria);
        let pool = match choice {
            subset::Choice::All => &mut self.all,
            subset::Choice::Subset(pool) => pool,
            subset::Choice::Nothing => return None,
        };
        self.subset_use = used;
        pool.pick(cluster, cx, under_way, &mut self.panicked, random)
    }

    /// Whether a subset served the last choice, for statistics.
    pub fn subset_use(&self) -> SubsetUse {
        self.subset_use
    }

    /// The host with this address, made if it is new: for original destinations and resolved names.
    pub fn ephemeral_host(&mut self, address: Address, hostname: &str) -> Arc<Host> {
        if self.ephemeral.len() >= EPHEMERAL_LIMIT && !self.ephemeral.contains_key(&address) {
            self.ephemeral.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let make = || Arc::new(Host::ephemeral(address.clone(), hostname.into()));
        Arc::clone(self.ephemeral.entry(address.clone()).or_insert_with(make))
    }

    /// Envoy `LoadBalancerContext::overrideHostToSelect`: healthy and degraded hosts, and those that nobody judged.
    fn session_host(&self, wanted: &str) -> Option<Arc<Host>> {
        let host = match wanted.parse::<SocketAddr>() {
            Ok(address) => self.endpoints.find(&Address::Ip(address)),
            Err(_) => self.endpoints.find(&Address::Pipe(wanted.into())),
        }?;
        (host.health() != Health::Unhealthy).then(|| Arc::clone(host))
    }

    /// Whether any host at all could be chosen now; for `x-envoy-…` health and tests.
    pub fn has_hosts(&self) -> bool {
        matches!(self.cluster.discovery, Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy(_))
            || !self.endpoints.is_empty()
    }
}

/// Envoy `OriginalDstCluster::LoadBalancer::chooseHost`.
fn destination(config: &OriginalDst, cx: &PickContext<'_>) -> Option<SocketAddr> {
    let by_header = config.http_header.as_ref().and_then(|name| cx.headers?.get_str(name)?.parse().ok());
    let mut address: SocketAddr = by_header.or(cx.original_dst)?;
    if let Some(port) = config.port_override {
        address.set_port(port);
    }
    Some(address)
}

impl Pool {
    fn new(cluster: &Cluster, endpoints: &Endpoints, seed: u64, member: impl Fn(&Host) -> bool) -> Self {
        let groups: Vec<PriorityGroups> = endpoints
            .priorities
            .iter()
            .map(|set| PriorityGroups::new(cluster, endpoints, set, seed, &member))
            .collect();
        let loads = priority::loads(cluster, endpoints, &groups);
        Self { loads, groups }
    }

    fn is_empty(&self) -> bool {
        self.groups.iter().all(|g| g.any.count() == 0)
    }

    fn pick(
        &mut self,
        cluster: &Cluster,
        cx: &PickContext<'_>,
        under_way: u64,
        panicked: &mut bool,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        // A first try goes anywhere.
        let retry = cx.retry.filter(|_| !cx.previous.is_empty());
        let attempts = retry.map_or(1, |r| r.host_selection_attempts + 1);
        let mut chosen = None;
        for attempt in 0..attempts {
            let host = self.pick_once(cluster, cx, under_way, attempt, panicked, random)?;
            let again = attempt + 1 < attempts && is_unwanted(&host, cx);
            chosen = Some(host);
            if !again {
                break;
            }
        }
        chosen
    }

    fn pick_once(
        &mut self,
        cluster: &Cluster,
        cx: &PickContext<'_>,
        under_way: u64,
        attempt: u32,
        panicked: &mut bool,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        let draw = cx.hash.filter(|_| is_hashing(&cluster.lb)).unwrap_or_else(|| random.next());
        // Only retries look at more than the loads of all.
        let adjusted = cx.retry.and_then(|r| r.previous_priorities).filter(|_| !cx.previous.is_empty()).map(|every| {
            let tried: Vec<u32> = cx.previous.iter().map(|host| host.priority).collect();
            priority::after_tries(&self.loads, &tried, every as usize)
        });
        // Where there is no host at all, too few are healthy.
        *panicked = self.loads.is_empty() && cluster.panic_threshold.get() > 0.0;
        let (index, health, panic) = priority::choose(adjusted.as_deref().unwrap_or(&self.loads), draw)?;
        *panicked = panic;
        let groups = &mut self.groups[index];
        let group = match (panic, health) {
            (true, _) if cluster.fail_on_panic => return None,
            (true, _) => &mut groups.any,
            (false, Health::Degraded) => &mut groups.degraded,
            (false, _) => &mut groups.healthy,
        };
        group.pick(cluster, draw, attempt, under_way, cx, random)
    }
}

fn is_hashing(policy: &LbPolicy) -> bool {
    matches!(policy, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. })
}

fn is_unwanted(host: &Arc<Host>, cx: &PickContext<'_>) -> bool {
    cx.retry.is_some_and(|retry| retry.avoids(host, cx.previous))
}

impl PriorityGroups {
    fn new(
        cluster: &Cluster,
        endpoints: &Endpoints,
        set: &crate::endpoints::PrioritySet,
        seed: u64,
        member: &dyn Fn(&Host) -> bool,
    ) -> Self {
        let by_health = |health: Option<Health>| {
            Localities::new(
                cluster,
                endpoints,
                set,
                seed,
                &|host| member(host) && health.is_none_or(|wanted| host.health() == wanted),
                member,
            )
        };
        let any = by_health(None);
        let excluded = any.hosts().filter(|host| host.state.is_excluded());
        let excluded = excluded.fold((0, 0), |(count, weight), host| (count + 1, weight + u64::from(host.weight)));
        Self { healthy: by_health(Some(Health::Healthy)), degraded: by_health(Some(Health::Degraded)), any, excluded }
    }
}

impl Localities {
    fn new(
        cluster: &Cluster,
        endpoints: &Endpoints,
        set: &crate::endpoints::PrioritySet,
        seed: u64,
        chosen: &dyn Fn(&Host) -> bool,
        member: &dyn Fn(&Host) -> bool,
    ) -> Self {
        let pick = |hosts: &[Arc<Host>]| hosts.iter().filter(|h| chosen(h)).cloned().collect::<Vec<_>>();
        let weighted = cluster.locality_weighted && set.localities.iter().any(|l| l.weight > 0);
        let mut groups = Vec::new();
        let mut weights = Vec::new();
        if weighted {
            for locality in set.localities.iter().filter(|l| l.weight > 0) {
                let hosts = pick(&locality.hosts);
                let all = locality.hosts.iter().filter(|h| member(h)).count();
                if hosts.is_empty() || all == 0 {
                    continue;
                }
                // Envoy `HostSetImpl::effectiveLocalityWeight`: sick localities lose weight once the reserve is used up.
                let available = hosts.len() as f64 / all as f64 * f64::from(endpoints.overprovisioning) / 100.0;
                weights.push(f64::from(locality.weight) * available.min(1.0));
                groups.push(HostGroup::new(hosts, &cluster.lb, seed));
            }
        } else {
            let hosts: Vec<_> = set.localities.iter().flat_map(|l| pick(&l.hosts)).collect();
            groups.push(HostGroup::new(hosts, &cluster.lb, seed));
        }
        let hash = is_hashing(&cluster.lb).then(|| consistent::Table::new(&cluster.lb, &groups, &weights));
        Self { schedule: weighted.then(|| schedule::Weighted::new(weights)), groups, hash }
    }

    fn count(&self) -> usize {
        self.groups.iter().map(HostGroup::len).sum()
    }

    fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.groups.iter().flat_map(HostGroup::hosts)
    }

    fn pick(
        &mut self,
        cluster: &Cluster,
        hash: u64,
        attempt: u32,
        under_way: u64,
        cx: &PickContext<'_>,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        if let Some(table) = &self.hash {
            return table.pick(hash, attempt, under_way);
        }
        let group = match &mut self.schedule {
            None => self.groups.first_mut()?,
            Some(schedule) => {
                let index = schedule.next()?;
                self.groups.get_mut(index)?
            }
        };
        group.pick(&cluster.lb, cx.now, random)
    }
}

#[cfg(test)]
mod tests;
