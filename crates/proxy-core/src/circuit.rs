//! Circuit breakers: limits on what may be under way to a cluster at a time, shared by all workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::Priority;
use crate::runtime::Runtime;

/// The limits of one priority.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerLimits {
    /// Connections.
    pub connections: u32,
    /// Requests that wait for a connection.
    pub pending: u32,
    /// Requests.
    pub requests: u32,
    /// Retries.
    pub retries: u32,
    /// Retries as a share of the requests, instead.
    pub retry_budget: Option<RetryBudget>,
    /// Pools of HTTP connections.
    pub pools: u32,
    /// Connections to one host.
    pub connections_per_host: u32,
    /// Report how much is left.
    pub track_remaining: bool,
}

/// Retries as a share of the requests under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// Percent.
    pub percent: f64,
    /// So many in any case.
    pub min_concurrency: u32,
}

impl Default for BreakerLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            pending: 1024,
            requests: 1024,
            retries: 3,
            retry_budget: None,
            pools: u32::MAX,
            connections_per_host: u32::MAX,
            track_remaining: false,
        }
    }
}

impl BreakerLimits {
    /// By [`Resource`].
    fn numbers(&self) -> [u32; 5] {
        [self.connections, self.pending, self.requests, self.retries, self.pools]
    }

    /// By priority: default, high. The first threshold of a priority counts.
    pub(crate) fn compile(breakers: Option<&pb::cluster::CircuitBreakers>) -> Compiled<[Self; 2]> {
        let mut limits = [None, None];
        for (i, threshold) in breakers.iter().flat_map(|b| &b.thresholds).enumerate() {
            let slot = limits
                .get_mut(usize::try_from(threshold.priority).unwrap_or(usize::MAX))
                .ok_or_else(|| Invalid::new(format!("thresholds[{i}].priority"), "is no known value"))?;
            if slot.is_none() {
                *slot = Some(Self::of(threshold).at_index("thresholds", i)?);
            }
        }
        let mut limits = limits.map(Option::unwrap_or_default);
        let mut seen = [false; 2];
        for (i, threshold) in breakers.iter().flat_map(|b| &b.per_host_thresholds).enumerate() {
            refuse! {
                "per_host_thresholds.max_pending_requests": threshold.max_pending_requests.is_some(),
                "per_host_thresholds.max_requests": threshold.max_requests.is_some(),
                "per_host_thresholds.max_retries": threshold.max_retries.is_some(),
                "per_host_thresholds.max_connection_pools": threshold.max_connection_pools.is_some(),
                "per_host_thresholds.retry_budget": threshold.retry_budget.is_some(),
                "per_host_thresholds.track_remaining": threshold.track_remaining,
            }
            let at = usize::try_from(threshold.priority).ok().filter(|at| *at < limits.len());
            let at =
                at.ok_or_else(|| Invalid::new(format!("per_host_thresholds[{i}].priority"), "is no known value"))?;
            if !std::mem::replace(&mut seen[at], true) {
                limits[at].connections_per_host = fields::uint(threshold.max_connections.as_ref(), u32::MAX);
            }
        }
        Ok(limits)
    }

    fn of(threshold: &pb::cluster::circuit_breakers::Thresholds) -> Compiled<Self> {
        let default = Self::default();
        let uint = |value: &Option<pb::UInt32Value>, default: u32| fields::uint(value.as_ref(), default);
        let retry_budget = match &threshold.retry_budget {
            None => None,
            Some(budget) => {
                let interval = fields::duration("retry_budget.budget_interval", budget.budget_interval.as_ref())?;
                refuse!("retry_budget.budget_interval": interval.is_some_and(|i| !i.is_zero()));
                Some(RetryBudget {
                    percent: fields::percent("retry_budget.budget_percent", budget.budget_percent.as_ref(), 20.0)?,
                    min_concurrency: uint(&budget.min_retry_concurrency, 3),
                })
            }
        };
        Ok(Self {
            connections: uint(&threshold.max_connections, default.connections),
            pending: uint(&threshold.max_pending_requests, default.pending),
            requests: uint(&threshold.max_requests, default.requests),
            retries: uint(&threshold.max_retries, default.retries),
            retry_budget,
            pools: uint(&threshold.max_connection_pools, default.pools),
            connections_per_host: default.connections_per_host,
            track_remaining: threshold.track_remaining,
        })
    }
}

/// What is limited.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resource {
    /// Connections.
    Connections,
    /// Requests that wait for a connection.
    Pending,
    /// Requests.
    Requests,
    /// Retries.
    Retries,
    /// Pools of HTTP connections.
    Pools,
}

/// Names of limits in keys of the runtime, by [`Resource`].
const NAMES: [&str; 5] =
    ["max_connections", "max_pending_requests", "max_requests", "max_retries", "max_connection_pools"];

/// The breakers of one cluster. One for all workers; kept when the cluster is updated with equal limits.
#[derive(Debug)]
pub struct Breakers {
    priorities: [Arc<Breaker>; 2],
}

impl Breakers {
    /// Closed breakers with these limits.
    pub fn new(limits: &[BreakerLimits; 2]) -> Self {
        let breaker = |limits: BreakerLimits| Breaker {
            current: limits.numbers().map(AtomicU32::new),
            budget: Budget::default(),
            limits,
            used: Default::default(),
            retry_asked: AtomicBool::new(false),
        };
        Self { priorities: limits.map(|limits| Arc::new(breaker(limits))) }
    }

    /// Takes the limits that the runtime has for the cluster of this name, and the configured ones else.
    pub fn follow(&self, cluster: &str, runtime: &Runtime) {
        // Asked once, so that many clusters are not looked up in vain.
        let any = runtime.mentions(&format!("circuit_breakers.{cluster}."));
        for (breaker, priority) in self.priorities.iter().zip(["default", "high"]) {
            let key = |name: &str| format!("circuit_breakers.{cluster}.{priority}.{name}");
            for ((slot, configured), name) in breaker.current.iter().zip(breaker.limits.numbers()).zip(NAMES) {
                let limit = any.then(|| runtime.get::<u64>(&key(name))).flatten();
                let limit = limit.map_or(configured, |limit| u32::try_from(limit).unwrap_or(u32::MAX));
                slot.store(limit, Ordering::Relaxed);
            }
            let percent = || runtime.get::<f64>(&key("retry_budget.budget_percent"));
            let min = || runtime.get::<u64>(&key("retry_budget.min_retry_concurrency"));
            breaker.budget.set(any.then(percent).flatten(), any.then(min).flatten());
        }
    }

    /// Requests under way, of all priorities.
    pub fn under_way(&self) -> u64 {
        self.priorities.iter().map(|breaker| u64::from(breaker.used(Resource::Requests))).sum()
    }

    /// The breaker of a priority.
    pub fn get(&self, priority: Priority) -> &Arc<Breaker> {
        &self.priorities[priority as usize]
    }
}

/// The breaker of one priority.
#[derive(Debug)]
pub struct Breaker {
    limits: BreakerLimits,
    /// The limits that hold, by [`Resource`].
    current: [AtomicU32; 5],
    budget: Budget,
    used: [AtomicU32; 5],
    /// A retry was ever asked for, whether it was allowed or not.
    retry_asked: AtomicBool,
}

/// What the runtime says of the budget of retries.
#[derive(Debug)]
struct Budget {
    /// Bits of a number; NaN: nothing.
    percent: AtomicU64,
    /// [`u64::MAX`]: nothing.
    min_concurrency: AtomicU64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { percent: AtomicU64::new(f64::NAN.to_bits()), min_concurrency: AtomicU64::new(u64::MAX) }
    }
}

impl Budget {
    fn set(&self, percent: Option<f64>, min_concurrency: Option<u64>) {
        self.percent.store(percent.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
        self.min_concurrency.store(min_concurrency.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Over the configured one; either number alone makes a budget (Envoy `RetryBudgetImpl`).
    fn over(&self, configured: Option<RetryBudget>) -> Option<RetryBudget> {
        let percent = f64::from_bits(self.percent.load(Ordering::Relaxed));
        let min = self.min_concurrency.load(Ordering::Relaxed);
        if percent.is_nan() && min == u64::MAX {
            return configured;
        }
        let mut budget = configured.unwrap_or(RetryBudget { percent: 20.0, min_concurrency: 3 });
        if !percent.is_nan() {
            budget.percent = percent;
        }
        if min != u64::MAX {
            budget.min_concurrency = u32::try_from(min).unwrap_or(u32::MAX);
        }
        Some(budget)
    }
}

impl Breaker {
    /// What may be in use now.
    pub fn limit(&self, resource: Resource) -> u32 {
        let budget = match resource {
            Resource::Retries => self.budget.over(self.limits.retry_budget),
            _ => None,
        };
        match budget {
            Some(budget) => {
                let under_way = self.used(Resource::Requests) + self.used(Resource::Pending);
                ((f64::from(under_way) * budget.percent / 100.0) as u32).max(budget.min_concurrency)
            }
            None => self.plain_limit(resource),
        }
    }

    /// Without the budget.
    fn plain_limit(&self, resource: Resource) -> u32 {
        self.current[resource as usize].load(Ordering::Relaxed)
    }

    /// So many are in use.
    pub fn used(&self, resource: Resource) -> u32 {
        self.used[resource as usize].load(Ordering::Relaxed)
    }

    /// Whether one more connection may be made to a host that has so many.
    pub fn allows_for_host(&self, open: u64) -> bool {
        open < u64::from(self.limits.connections_per_host)
    }

    /// Calls `f` with Envoy's gauges of this breaker: whether each limit is reached, and what is left of it if that is
    /// tracked. A retry budget has no fixed limit: its gauge is that of `max_retries`, and nothing is left of it
    /// after the first retry was asked for (Envoy `RetryBudgetImpl::clearRemainingGauge`).
    pub fn gauges(&self, mut f: impl FnMut(&'static str, u64)) {
        let limits = &self.limits;
        for (resource, open, remaining) in [
            (Resource::Connections, "cx_open", "remaining_cx"),
            (Resource::Pools, "cx_pool_open", "remaining_cx_pools"),
            (Resource::Requests, "rq_open", "remaining_rq"),
            (Resource::Pending, "rq_pending_open", "remaining_pending"),
            (Resource::Retries, "rq_retry_open", "remaining_retries"),
        ] {
            let (used, limit) = (self.used(resource), self.plain_limit(resource));
            // Envoy sets a gauge when something is taken or given back, so that a limit of zero shows only while passed.
            f(open, u64::from(used > 0 && used >= limit));
            if limits.track_remaining {
                let unlimited = resource == Resource::Pools && limit == u32::MAX;
                let limit = if unlimited { u64::MAX } else { u64::from(limit) };
                let budget = resource == Resource::Retries
                    && self.retry_asked.load(Ordering::Relaxed)
                    && self.budget.over(limits.retry_budget).is_some();
                f(remaining, if budget { 0 } else { limit.saturating_sub(u64::from(used)) });
            }
        }
    }

    /// So many are left.
    pub fn remaining(&self, resource: Resource) -> u32 {
        self.limit(resource).saturating_sub(self.used(resource))
    }

    /// One more, if the limit allows; given back when the permit is dropped. Two workers at once may pass the limit by
    /// one each, as in Envoy.
    pub fn acquire(self: &Arc<Self>, resource: Resource) -> Option<Permit> {
        if resource == Resource::Retries {
            self.retry_asked.store(true, Ordering::Relaxed);
        }
        (self.used(resource) < self.limit(resource)).then(|| self.force(resource))
    }

    /// One more in any case: Envoy lets the first connection of a pool pass its limit.
    pub fn force(self: &Arc<Self>, resource: Resource) -> Permit {
        self.used[resource as usize].fetch_add(1, Ordering::Relaxed);
        Permit { breaker: Arc::clone(self), resource }
    }
}

/// One unit of a limited resource.
#[derive(Debug)]
pub struct Permit {
    breaker: Arc<Breaker>,
    resource: Resource,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.breaker.used[self.resource as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_come_back() {
        let limits = BreakerLimits { requests: 2, ..BreakerLimits::default() };
        let breakers = Breakers::new(&[limits, BreakerLimits::default()]);
        let breaker = breakers.get(Priority::Default);
        let first = breaker.acquire(Resource::Requests).unwrap();
        let _second = breaker.acquire(Resource::Requests).unwrap();
        assert!(breaker.acquire(Resource::Requests).is_none());
        drop(first);
        assert_eq!(breaker.remaining(Resource::Requests), 1);
        assert!(breakers.get(Priority::High).acquire(Resource::Requests).is_some());
    }

    #[test]
    fn gauges_tell_what_is_open_and_left() {
        let limits = BreakerLimits { connections: 2, retries: 0, track_remaining: true, ..BreakerLimits::default() };
        let breakers = Breakers::new(&[limits, BreakerLimits::default()]);
        let gauges = |priority| {
            let mut all = std::collections::BTreeMap::new();
            breakers.get(priority).gauges(|name, value| assert_eq!(all.insert(name, value), None));
            all
        };
        let breaker = breakers.get(Priority::Default);
        let first = breaker.acquire(Resource::Connections);
        assert_eq!((gauges(Priority::Default)["cx_open"], gauges(Priority::Default)["remaining_cx"]), (0, 1));
        let _second = breaker.acquire(Resource::Connections);
        assert_eq!((gauges(Priority::Default)["cx_open"], gauges(Priority::Default)["remaining_cx"]), (1, 0));
        drop(first);
        assert_eq!(gauges(Priority::Default)["cx_open"], 0);
        // Nothing was ever taken of it.
        assert_eq!(gauges(Priority::Default)["rq_retry_open"], 0);
        assert_eq!(gauges(Priority::Default)["remaining_cx_pools"], u64::MAX);
        assert_eq!(gauges(Priority::High).len(), 5, "what is left is not tracked here");
    }

    #[test]
    fn the_runtime_makes_a_retry_budget() {
        let key = "circuit_breakers.a.default.retry_budget.min_retry_concurrency";
        let layer = |spec| pb::bootstrap::RuntimeLayer { name: "admin".into(), layer_specifier: Some(spec) };
        let spec = pb::bootstrap::runtime_layer::LayerSpecifier::AdminLayer(Default::default());
        let config = pb::bootstrap::LayeredRuntime { layers: vec![layer(spec)] };
        let runtime = Runtime::compile(Some(&config)).unwrap();
        let breakers = Breakers::new(&[BreakerLimits::default(); 2]);
        runtime.modify([(key, "0")]);
        breakers.follow("a", &runtime);
        let breaker = breakers.get(Priority::Default);
        assert_eq!(breaker.remaining(Resource::Retries), 0);
        let _requests: Vec<_> = (0..10).map(|_| breaker.force(Resource::Requests)).collect();
        assert_eq!(breaker.remaining(Resource::Retries), 2, "twenty percent by default");
        runtime.modify([(key, "")]);
        breakers.follow("a", &runtime);
        assert_eq!(breaker.remaining(Resource::Retries), 3, "the plain limit");
    }

    #[test]
    fn retry_budget_follows_the_requests() {
        let budget = RetryBudget { percent: 20.0, min_concurrency: 1 };
        let limits = BreakerLimits { retry_budget: Some(budget), ..BreakerLimits::default() };
        let breakers = Breakers::new(&[limits, limits]);
        let breaker = breakers.get(Priority::Default);
        assert_eq!(breaker.remaining(Resource::Retries), 1);
        let _requests: Vec<_> = (0..20).map(|_| breaker.force(Resource::Requests)).collect();
        assert_eq!(breaker.remaining(Resource::Retries), 4);
    }
}
