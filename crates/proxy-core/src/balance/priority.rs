use crate::balance::{Localities, PriorityGroups};
use crate::cluster::Cluster;
use crate::endpoints::{Endpoints, Health};

/// What a priority gets of the traffic, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct PriorityLoad {
    pub(super) healthy: u32,
    pub(super) degraded: u32,
    /// How much of it may be used, of healthy and of degraded hosts, in percent.
    available: [u32; 2],
    /// Use any host, healthy or not.
    pub(super) panic: bool,
}

/// Envoy `LoadBalancerBase::recalculatePerPriorityState` and `recalculatePerPriorityPanic`.
pub(super) fn loads(cluster: &Cluster, endpoints: &Endpoints, groups: &[PriorityGroups]) -> Vec<PriorityLoad> {
    let mut loads = vec![PriorityLoad::default(); groups.len()];
    if groups.is_empty() {
        return loads;
    }
    let availability = |part: &Localities, group: &PriorityGroups| {
        let (part, all) = match endpoints.weighted_priority_health {
            true => (weight(part), weight(&group.any) - group.excluded.1),
            false => (part.count() as u64, group.counted() as u64),
        };
        (u64::from(endpoints.overprovisioning) * part).checked_div(all).unwrap_or(0).min(100) as u32
    };
    let healthy: Vec<u32> = groups.iter().map(|g| availability(&g.healthy, g)).collect();
    let degraded: Vec<u32> = groups.iter().map(|g| availability(&g.degraded, g)).collect();
    for (load, available) in loads.iter_mut().zip(healthy.iter().zip(&degraded)) {
        load.available = [*available.0, *available.1];
    }
    let total = (healthy.iter().sum::<u32>() + degraded.iter().sum::<u32>()).min(100);
    let threshold = cluster.panic_threshold.get().min(100.0);
    if threshold == 0.0 && total == 0 {
        // Panic is off and nobody is available: the choice fails in the first priority.
        loads[0].healthy = 100;
        return loads;
    }
    if total != 100 {
        for (load, group) in loads.iter_mut().zip(groups) {
            load.panic = is_in_panic(group, threshold);
        }
    }
    if loads.iter().all(|l| l.panic) {
        total_panic(&mut loads, groups);
        return loads;
    }
    let mut left = 100;
    let mut share = |available: u32| {
        // Rounded as Envoy does it: the share of what is available in sum.
        let share = (available * 100 / total.max(1)).min(left);
        left -= share;
        share
    };
    for (load, available) in loads.iter_mut().zip(&healthy) {
        load.healthy = share(*available);
    }
    for (load, available) in loads.iter_mut().zip(&degraded) {
        load.degraded = share(*available);
    }
    // Rounding must not lose traffic.
    if left > 0 {
        if let Some(first) = healthy.iter().position(|h| *h > 0) {
            loads[first].healthy += left;
        } else if let Some(first) = degraded.iter().position(|d| *d > 0) {
            loads[first].degraded += left;
        }
    }
    loads
}

fn weight(group: &Localities) -> u64 {
    group.hosts().map(|h| u64::from(h.weight)).sum()
}

impl PriorityGroups {
    /// Hosts that count.
    fn counted(&self) -> usize {
        self.any.count() - self.excluded.0
    }
}

fn is_in_panic(group: &PriorityGroups, threshold: f64) -> bool {
    let all = group.counted();
    let available = group.healthy.count() + group.degraded.count();
    let percent = if all == 0 { 0.0 } else { 100.0 * available as f64 / all as f64 };
    percent < threshold
}

/// Every priority is in panic: traffic follows the number of hosts (`recalculateLoadInTotalPanic`).
fn total_panic(loads: &mut [PriorityLoad], groups: &[PriorityGroups]) {
    let total: usize = groups.iter().map(|g| g.any.count()).sum();
    if total == 0 {
        // Nobody at all.
        loads[0].healthy = 100;
        return;
    }
    let mut left = 100;
    for (load, group) in loads.iter_mut().zip(groups) {
        load.healthy = (100 * group.any.count() / total) as u32;
        left -= load.healthy;
    }
    if let Some(first) = groups.iter().position(|g| g.any.count() > 0) {
        loads[first].healthy += left;
    }
}

/// The priority for a random number or hash, which health its host must have, and whether it is in panic.
pub(super) fn choose(loads: &[PriorityLoad], draw: u64) -> Option<(usize, Health, bool)> {
    let total: u32 = loads.iter().map(|l| l.healthy + l.degraded).sum();
    if total == 0 {
        return None;
    }
    let draw = (draw % u64::from(total)) as u32 + 1;
    let mut reached = 0;
    for (health, pick) in [(Health::Healthy, healthy as fn(&PriorityLoad) -> u32), (Health::Degraded, degraded)] {
        for (index, load) in loads.iter().enumerate() {
            reached += pick(load);
            if draw <= reached {
                return Some((index, health, load.panic));
            }
        }
    }
    None
}

/// The loads for a retry after tries in these priorities, which are left out after every `every` tries (Envoy
/// `PreviousPrioritiesRetryPriority`). When none is left, all are there again.
pub(super) fn after_tries(loads: &[PriorityLoad], tried: &[u32], every: usize) -> Vec<PriorityLoad> {
    let mut excluded: Vec<u32> = Vec::new();
    let mut changed = false;
    for tries in tried.chunks_exact(every) {
        excluded.extend(tries);
        changed = true;
        if total_available(loads, &excluded) == 0 {
            excluded.clear();
        }
    }
    let total = total_available(loads, &excluded);
    let mut out = loads.to_vec();
    if !changed || total == 0 {
        return out;
    }
    for load in &mut out {
        (load.healthy, load.degraded) = (0, 0);
    }
    let mut left = 100;
    // Again and again, so that rounding loses nothing.
    while left > 0 {
        let before = left;
        for health in 0..2 {
            for (_, load) in out.iter_mut().enumerate().filter(|(i, _)| !excluded.contains(&(*i as u32))) {
                let more = (load.available[health] * 100 / total).min(left);
                *(if health == 0 { &mut load.healthy } else { &mut load.degraded }) += more;
                left -= more;
            }
        }
        if left == before {
            break;
        }
    }
    out
}

fn total_available(loads: &[PriorityLoad], excluded: &[u32]) -> u32 {
    let included = loads.iter().enumerate().filter(|(i, _)| !excluded.contains(&(*i as u32)));
    included.map(|(_, l)| l.available.iter().sum::<u32>()).sum::<u32>().min(100)
}

fn healthy(load: &PriorityLoad) -> u32 {
    load.healthy
}

fn degraded(load: &PriorityLoad) -> u32 {
    load.degraded
}
