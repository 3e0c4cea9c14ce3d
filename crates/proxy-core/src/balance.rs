//! Choosing a host: priority by health, locality by weight, host by policy.
//!
//! One [`LoadBalancer`] a worker and cluster. It sorts its hosts when they or their health changed, and draws after that.

mod bounded;
mod consistent;
mod priority;
mod schedule;
mod subset;
mod zones;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::address::Address;
use crate::cluster::{Cluster, Discovery, SubsetConfig};
use crate::endpoints::{Endpoints, Health, Host, Locality, LocalitySet, PrioritySet};
use crate::headers::Headers;
use crate::metadata::MetadataMatch;
use crate::random::Random;
use crate::retry::RetryPolicy;
use crate::stream_info::StreamInfo;
pub use consistent::TableSize;
use priority::PriorityLoad;
use schedule::HostGroup;
use subset::Subsets;
pub use subset::{SubsetCount, SubsetUse};
use zones::Zones;
pub use zones::{NoZones, ZoneUse, no_zones};

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
    /// Where the connection wanted to go.
    pub original_dst: Option<SocketAddr>,
    /// What filters said, for original destinations.
    pub stream: Option<&'a StreamInfo>,
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
            stream: None,
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
    seed: u64,
    panicked: bool,
    subset_use: SubsetUse,
    zone_use: ZoneUse,
    local: Option<Local>,
}

/// Those of our own kind (`cluster_manager.local_cluster_name`), and where we stand ourselves.
#[derive(Clone, Debug)]
pub struct Local {
    /// Their hosts.
    pub endpoints: Arc<Endpoints>,
    /// Our own place.
    pub place: Locality,
}

/// Hosts to choose from: all of a cluster, or one subset.
#[derive(Debug, Default)]
struct Pool {
    loads: Vec<PriorityLoad>,
    groups: Vec<PriorityGroups>,
    zones: Option<Zones>,
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
    /// All of them, also those in localities that get nothing.
    hosts: Vec<Arc<Host>>,
    groups: Vec<HostGroup>,
    /// Which group next; `None`: there is only one.
    schedule: Option<schedule::Weighted>,
    hash: Option<consistent::Table>,
}

impl LoadBalancer {
    /// A balancer over these hosts; equal seeds choose equally.
    pub fn new(cluster: Arc<Cluster>, endpoints: Arc<Endpoints>, seed: u64) -> Self {
        let mut balancer = Self {
            cluster,
            endpoints,
            epoch: 0,
            all: Pool::default(),
            subsets: Subsets::default(),
            seed,
            panicked: false,
            subset_use: SubsetUse::default(),
            zone_use: ZoneUse::default(),
            local: None,
        };
        balancer.rebuild();
        balancer
    }

    /// Those of our own kind are these now: traffic stays in our own zone as far as that is fair.
    pub fn set_local(&mut self, local: Local) {
        self.local = Some(local);
        self.rebuild();
    }

    /// Those of our own kind.
    pub fn local(&self) -> Option<&Local> {
        self.local.as_ref()
    }

    /// What zones had to do with the last choice, for statistics.
    pub fn zone_use(&self) -> ZoneUse {
        self.zone_use
    }

    fn health_changes(&self) -> u64 {
        let local = self.local.as_ref().map_or(0, |local| local.endpoints.epoch.load(Ordering::Acquire));
        self.endpoints.epoch.load(Ordering::Acquire).wrapping_add(local)
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
        self.epoch = self.health_changes();
        // Who makes hosts has nothing to choose.
        if matches!(self.cluster.discovery, Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy { .. }) {
            return;
        }
        let members = Members::of_all(&self.cluster);
        self.all = Pool::new(&self.cluster, &self.endpoints, self.local.as_ref(), self.seed, members);
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

    /// The host for a request; `None`: there is none, or the cluster makes hosts of names (flag UH, details `no_healthy_upstream`). `under_way`: requests of
    /// all workers to the cluster, by which bounded loads are measured.
    pub fn pick_amid(&mut self, cx: &PickContext<'_>, under_way: u64, random: &mut Random) -> Option<Arc<Host>> {
        self.panicked = false;
        self.subset_use = SubsetUse::default();
        if let Discovery::OriginalDst(config) = &self.cluster.discovery {
            let address = config.destination(cx).0?;
            return Some(self.endpoints.make(Address::Ip(address), "".into()));
        }
        if let Discovery::DynamicForwardProxy { .. } = &self.cluster.discovery {
            return None;
        }
        self.zone_use = ZoneUse::None;
        if self.health_changes() != self.epoch {
            self.rebuild();
        }
        if let Some(host) = cx.override_host.and_then(|wanted| self.session_host(wanted)) {
            return Some(host);
        }
        if self.cluster.subsets.is_none() {
            return self.all.pick(
                &self.cluster,
                cx,
                under_way,
                &mut Tell { panicked: &mut self.panicked, zone_use: &mut self.zone_use },
                random,
            );
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
        let host = pool.pick(
            cluster,
            cx,
            under_way,
            &mut Tell { panicked: &mut self.panicked, zone_use: &mut self.zone_use },
            random,
        );
        // A fallback that finds nobody does not count, and may be followed by another one.
        if host.is_some() || used != SubsetUse::Fallback {
            self.subset_use = used;
            return host;
        }
        if !config.panic_mode_any {
            return None;
        }
        let panicked = self.panicked;
        let host = self.all.pick(
            cluster,
            cx,
            under_way,
            &mut Tell { panicked: &mut self.panicked, zone_use: &mut self.zone_use },
            random,
        );
        self.panicked |= panicked;
        let host = host?;
        self.subset_use = SubsetUse::FallbackPanic;
        Some(host)
    }

    /// Whether a subset served the last choice, for statistics.
    pub fn subset_use(&self) -> SubsetUse {
        self.subset_use
    }

    /// Envoy `HostUtility::selectOverrideHost`.
    fn session_host(&self, wanted: &str) -> Option<Arc<Host>> {
        let host = match wanted.parse::<SocketAddr>() {
            Ok(address) => self.endpoints.find(&Address::Ip(address)),
            Err(_) => self.endpoints.find(&Address::Pipe(wanted.into())),
        }?;
        (self.cluster.session_statuses & 1 << host.status() != 0).then(|| Arc::clone(host))
    }

    /// Whether any host at all could be chosen now; for `x-envoy-…` health and tests.
    pub fn has_hosts(&self) -> bool {
        matches!(self.cluster.discovery, Discovery::OriginalDst(_) | Discovery::DynamicForwardProxy { .. })
            || !self.endpoints.is_empty()
    }
}

impl Pool {
    fn new(cluster: &Cluster, endpoints: &Endpoints, local: Option<&Local>, seed: u64, members: Members<'_>) -> Self {
        let groups: Vec<PriorityGroups> = endpoints
            .priorities
            .iter()
            .map(|set| PriorityGroups::new(cluster, endpoints, set, seed, members))
            .collect();
        let loads = priority::loads(cluster, endpoints, &groups);
        let zones = local.and_then(|local| Zones::new(cluster, endpoints, local, seed, members));
        Self { loads, groups, zones }
    }

    fn is_empty(&self) -> bool {
        self.groups.iter().all(|g| g.any.count() == 0)
    }

    fn pick(
        &mut self,
        cluster: &Cluster,
        cx: &PickContext<'_>,
        under_way: u64,
        tell: &mut Tell<'_>,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        // A first try goes anywhere.
        let retry = cx.retry.filter(|_| !cx.previous.is_empty());
        let attempts = retry.map_or(1, |r| r.host_selection_attempts + 1);
        let mut chosen = None;
        for attempt in 0..attempts {
            let host = self.pick_once(cluster, cx, under_way, attempt, tell, random)?;
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
        tell: &mut Tell<'_>,
        random: &mut Random,
    ) -> Option<Arc<Host>> {
        let draw = cx.hash.filter(|_| cluster.lb.is_hashing()).unwrap_or_else(|| random.next());
        // Only retries look at more than the loads of all, and hashing not even then.
        let retry = cx.retry.filter(|_| !cx.previous.is_empty() && !cluster.lb.is_hashing());
        let adjusted = retry.and_then(|retry| retry.previous_priorities).map(|every| {
            let tried: Vec<u32> = cx.previous.iter().map(|host| host.priority).collect();
            priority::after_tries(&self.loads, &tried, every as usize)
        });
        // Where there is no host at all, too few are healthy.
        *tell.panicked = self.loads.is_empty() && cluster.panic_threshold.get() > 0.0;
        let (index, health, panic) = priority::choose(adjusted.as_deref().unwrap_or(&self.loads), draw)?;
        *tell.panicked = panic;
        if let (0, false, Some(zones)) = (index, panic, &mut self.zones)
            && let Some(group) = zones.choose(cluster, health, tell.zone_use, random).ok()?
        {
            return group.pick(&cluster.lb, cx.now, random);
        }
        let groups = &mut self.groups[index];
        let group = match (panic, health) {
            (true, _) if cluster.fail_on_panic => return None,
            (true, _) => &mut groups.any,
            // Tables are made of healthy hosts (Envoy `ThreadAwareLoadBalancerBase::refresh`).
            (false, Health::Degraded) if !cluster.lb.is_hashing() => &mut groups.degraded,
            (false, _) => &mut groups.healthy,
        };
        group.pick(cluster, draw, attempt, under_way, cx, random)
    }
}

fn is_unwanted(host: &Arc<Host>, cx: &PickContext<'_>) -> bool {
    cx.retry.is_some_and(|retry| retry.avoids(host, cx.previous))
}

/// What a choice has to tell besides its host.
struct Tell<'a> {
    panicked: &'a mut bool,
    zone_use: &'a mut ZoneUse,
}

/// Which hosts make a pool, and whether the weights of their localities count.
#[derive(Clone, Copy)]
struct Members<'a> {
    fits: &'a dyn Fn(&Host) -> bool,
    weights: LocalityWeights,
}

/// How much the localities of a pool weigh.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum LocalityWeights {
    /// They are no more than their hosts.
    Ignored,
    /// What the configuration says.
    Given,
    /// The share of that which their hosts in the subset are.
    Scaled,
}

impl LocalityWeights {
    /// Of subsets, where they are asked for only (Envoy `PrioritySubsetImpl::determineLocalityWeights`).
    fn of_subset(cluster: &Cluster, config: &SubsetConfig) -> Self {
        match (cluster.locality_weighted && config.locality_weight_aware, config.scale_locality_weight) {
            (false, _) => Self::Ignored,
            (true, false) => Self::Given,
            (true, true) => Self::Scaled,
        }
    }
}

impl Members<'_> {
    fn of_all(cluster: &Cluster) -> Self {
        let weights = if cluster.locality_weighted { LocalityWeights::Given } else { LocalityWeights::Ignored };
        Self { fits: &|_| true, weights }
    }

    fn weight(&self, locality: &LocalitySet) -> f64 {
        let given = f64::from(locality.weight);
        match self.weights {
            LocalityWeights::Ignored => 0.0,
            LocalityWeights::Given => given,
            LocalityWeights::Scaled => {
                let here = locality.hosts.iter().filter(|host| (self.fits)(host)).count();
                (given * here as f64 / locality.hosts.len().max(1) as f64).round()
            }
        }
    }
}

impl PriorityGroups {
    fn new(cluster: &Cluster, endpoints: &Endpoints, set: &PrioritySet, seed: u64, members: Members<'_>) -> Self {
        let by_health =
            |wanted: Health| Localities::new(cluster, endpoints, set, seed, members, &|host| host.health() == wanted);
        // In panic only hashing knows localities (Envoy `ZoneAwareLoadBalancerBase::hostSourceToUse`).
        let all =
            if cluster.lb.is_hashing() { members } else { Members { weights: LocalityWeights::Ignored, ..members } };
        let any = Localities::new(cluster, endpoints, set, seed, all, &|_| true);
        let excluded = any.hosts().filter(|host| host.state.is_excluded());
        let excluded = excluded.fold((0, 0), |(count, weight), host| (count + 1, weight + u64::from(host.weight)));
        Self { healthy: by_health(Health::Healthy), degraded: by_health(Health::Degraded), any, excluded }
    }
}

impl Localities {
    fn new(
        cluster: &Cluster,
        endpoints: &Endpoints,
        set: &PrioritySet,
        seed: u64,
        members: Members<'_>,
        chosen: &dyn Fn(&Host) -> bool,
    ) -> Self {
        let pick = |locality: &LocalitySet| {
            let hosts = locality.hosts.iter().filter(|host| (members.fits)(host) && chosen(host));
            hosts.cloned().collect::<Vec<_>>()
        };
        let hosts: Vec<_> = set.localities.iter().flat_map(pick).collect();
        let group = |hosts| HostGroup::new(hosts, &cluster.lb, seed);
        let hashing = cluster.lb.is_hashing();
        let mut groups = Vec::new();
        let mut weights = Vec::new();
        let mut total = 0.0;
        if members.weights != LocalityWeights::Ignored {
            for locality in set.localities.iter().filter(|locality| !locality.hosts.is_empty()) {
                let weight = members.weight(locality);
                total += weight;
                let hosts = pick(locality);
                if hosts.is_empty() || weight == 0.0 {
                    continue;
                }
                let counted = locality.hosts.iter().filter(|host| (members.fits)(host) && !host.state.is_excluded());
                // Envoy `HostSetImpl::effectiveLocalityWeight`: sick localities lose weight once the reserve is used up,
                // though not in the tables of hashing.
                let reserve = f64::from(endpoints.overprovisioning) / 100.0;
                let available = if hashing { 1.0 } else { hosts.len() as f64 / counted.count() as f64 * reserve };
                weights.push(weight * available.min(1.0));
                groups.push(group(hosts));
            }
        }
        // Without any weight localities are no more than their hosts, and hashing finds nobody.
        let weighted = !weights.is_empty() || (hashing && members.weights != LocalityWeights::Ignored);
        if !weighted {
            groups.push(group(hosts.clone()));
        }
        if hashing {
            weights.iter_mut().for_each(|weight| *weight /= total);
        }
        let hash = hashing.then(|| consistent::Table::new(&cluster.lb, &groups, &weights));
        Self { hosts, schedule: weighted.then(|| schedule::Weighted::new(weights)), groups, hash }
    }

    fn count(&self) -> usize {
        self.hosts.len()
    }

    fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.hosts.iter()
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
