use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;
use std::time::Instant;

use crate::cluster::{LbPolicy, SlowStart};
use crate::endpoints::Host;
use crate::random::Random;

/// Draws indexes in proportion to weights, spread evenly: earliest deadline first, as Envoy's `EdfScheduler`.
#[derive(Debug, Default)]
pub(super) struct Weighted {
    queue: BinaryHeap<Entry>,
    weights: Vec<f64>,
    now: f64,
    order: u64,
}

#[derive(Debug, PartialEq)]
struct Entry {
    deadline: f64,
    /// Equal deadlines go in the order in which they were made.
    order: u64,
    index: usize,
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The earliest is the greatest, since the heap gives the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.deadline.total_cmp(&self.deadline).then_with(|| other.order.cmp(&self.order))
    }
}

impl Weighted {
    pub(super) fn new(weights: Vec<f64>) -> Self {
        let mut schedule = Self { weights, ..Self::default() };
        for index in 0..schedule.weights.len() {
            schedule.push(index, schedule.weights[index]);
        }
        schedule
    }

    fn push(&mut self, index: usize, weight: f64) {
        if weight > 0.0 {
            self.order += 1;
            self.queue.push(Entry { deadline: self.now + 1.0 / weight, order: self.order, index });
        }
    }

    pub(super) fn next(&mut self) -> Option<usize> {
        self.next_with(|index, weights| weights[index])
    }

    /// The weight counts from the moment at which an entry is drawn.
    fn next_with(&mut self, weight: impl Fn(usize, &[f64]) -> f64) -> Option<usize> {
        let entry = self.queue.pop()?;
        self.now = entry.deadline;
        let weight = weight(entry.index, &self.weights).max(f64::MIN_POSITIVE);
        self.push(entry.index, weight);
        Some(entry.index)
    }
}

/// Hosts of equal rank, chosen by a policy.
#[derive(Debug)]
pub(super) struct HostGroup {
    hosts: Vec<Arc<Host>>,
    /// Used where weights differ or hosts start slowly.
    schedule: Option<Weighted>,
    next: usize,
}

impl HostGroup {
    pub(super) fn new(hosts: Vec<Arc<Host>>, policy: &LbPolicy, seed: u64) -> Self {
        let unequal = hosts.windows(2).any(|two| two[0].weight != two[1].weight);
        let weighs = match policy {
            LbPolicy::RoundRobin(slow) => unequal || slow.is_some(),
            LbPolicy::LeastRequest { slow_start, full_scan, .. } => !full_scan && (unequal || slow_start.is_some()),
            _ => false,
        };
        let schedule = (weighs && !hosts.is_empty()).then(|| {
            let mut schedule = Weighted::new(hosts.iter().map(|h| f64::from(h.weight)).collect());
            // Workers that start together must not all begin with the same host.
            for _ in 0..seed % hosts.len() as u64 {
                schedule.next();
            }
            schedule
        });
        Self { next: if hosts.is_empty() { 0 } else { (seed % hosts.len() as u64) as usize }, hosts, schedule }
    }

    pub(super) fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.hosts.iter()
    }

    pub(super) fn pick(&mut self, policy: &LbPolicy, now: Instant, random: &mut Random) -> Option<Arc<Host>> {
        if self.hosts.is_empty() {
            return None;
        }
        let hosts = &self.hosts;
        if let Some(schedule) = &mut self.schedule {
            let index = schedule.next_with(|index, weights| match policy {
                LbPolicy::LeastRequest { bias, slow_start, .. } => {
                    let active = f64::from(hosts[index].state.active.load(Atomic::Relaxed));
                    let bias = bias.get();
                    let load = if bias == 1.0 { active + 1.0 } else { (active + 1.0).powf(bias) };
                    weights[index] / load * warmth(&hosts[index], slow_start.as_ref(), now)
                }
                LbPolicy::RoundRobin(slow_start) => weights[index] * warmth(&hosts[index], slow_start.as_ref(), now),
                _ => weights[index],
            })?;
            return hosts.get(index).cloned();
        }
        let draw = |random: &mut Random| &hosts[random.below(hosts.len() as u64) as usize];
        let chosen = match policy {
            LbPolicy::LeastRequest { full_scan: true, .. } => {
                let active = |host: &Host| host.state.active.load(Atomic::Relaxed);
                let least = hosts.iter().map(|host| active(host)).min()?;
                let idlest: Vec<_> = hosts.iter().filter(|host| active(host) == least).collect();
                // All may have become busier meanwhile.
                idlest.get(random.below(idlest.len().max(1) as u64) as usize).copied().unwrap_or(&hosts[0])
            }
            LbPolicy::LeastRequest { choices, .. } => {
                let mut best = draw(random);
                for _ in 1..*choices {
                    let other = draw(random);
                    if other.state.active.load(Atomic::Relaxed) < best.state.active.load(Atomic::Relaxed) {
                        best = other;
                    }
                }
                best
            }
            LbPolicy::Random => draw(random),
            _ => {
                let index = self.next % hosts.len();
                self.next = index + 1;
                &hosts[index]
            }
        };
        Some(Arc::clone(chosen))
    }
}

/// How much of its weight a host has, by its age (Envoy `EdfLoadBalancerBase::applySlowStartFactor`).
fn warmth(host: &Host, slow_start: Option<&SlowStart>, now: Instant) -> f64 {
    let Some(slow) = slow_start else { return 1.0 };
    let age = now.saturating_duration_since(host.state.since(now));
    if age >= slow.window {
        return 1.0;
    }
    let time = (age.as_secs_f64().max(1.0) / slow.window.as_secs_f64()).min(1.0);
    time.powf(1.0 / slow.aggression.get().max(f64::MIN_POSITIVE)).max(slow.min_weight)
}
