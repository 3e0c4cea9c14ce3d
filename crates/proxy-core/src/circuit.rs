//! Circuit breakers: limits on what may be under way to a cluster at a time, shared by all workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::Priority;

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
    /// Pools.
    pub pools: u32,
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
    /// Requests of this time count, too.
    pub interval: Duration,
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
            track_remaining: false,
        }
    }
}

impl BreakerLimits {
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
        if breakers.is_some_and(|b| !b.per_host_thresholds.is_empty()) {
            return Err(Invalid::unsupported("per_host_thresholds"));
        }
        Ok(limits.map(Option::unwrap_or_default))
    }

    fn of(threshold: &pb::cluster::circuit_breakers::Thresholds) -> Compiled<Self> {
        let default = Self::default();
        let uint = |value: &Option<pb::UInt32Value>, default: u32| fields::uint(value.as_ref(), default);
        let retry_budget = match &threshold.retry_budget {
            None => None,
            Some(budget) => Some(RetryBudget {
                percent: fields::percent("retry_budget.budget_percent", budget.budget_percent.as_ref(), 20.0)?,
                min_concurrency: uint(&budget.min_retry_concurrency, 3),
                interval: fields::duration("retry_budget.budget_interval", budget.budget_interval.as_ref())?
                    .unwrap_or_default(),
            }),
        };
        Ok(Self {
            connections: uint(&threshold.max_connections, default.connections),
            pending: uint(&threshold.max_pending_requests, default.pending),
            requests: uint(&threshold.max_requests, default.requests),
            retries: uint(&threshold.max_retries, default.retries),
            retry_budget,
            pools: uint(&threshold.max_connection_pools, default.pools),
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
}

/// The breakers of one cluster. One for all workers; kept when the cluster is updated with equal limits.
#[derive(Debug)]
pub struct Breakers {
    priorities: [Arc<Breaker>; 2],
}

impl Breakers {
    /// Closed breakers with these limits.
    pub fn new(limits: &[BreakerLimits; 2]) -> Self {
        Self { priorities: limits.map(|limits| Arc::new(Breaker { limits, used: Default::default() })) }
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
    used: [AtomicU32; 4],
}

impl Breaker {
    fn limit(&self, resource: Resource) -> u32 {
        match resource {
            Resource::Connections => self.limits.connections,
            Resource::Pending => self.limits.pending,
            Resource::Requests => self.limits.requests,
            Resource::Retries => match self.limits.retry_budget {
                None => self.limits.retries,
                Some(budget) => {
                    let under_way = self.used(Resource::Requests) + self.used(Resource::Pending);
                    ((f64::from(under_way) * budget.percent / 100.0) as u32).max(budget.min_concurrency)
                }
            },
        }
    }

    /// So many are in use.
    pub fn used(&self, resource: Resource) -> u32 {
        self.used[resource as usize].load(Ordering::Relaxed)
    }

    /// So many are left.
    pub fn remaining(&self, resource: Resource) -> u32 {
        self.limit(resource).saturating_sub(self.used(resource))
    }

    /// One more, if the limit allows; given back when the permit is dropped. Two workers at once may pass the limit by
    /// one each, as in Envoy.
    pub fn acquire(self: &Arc<Self>, resource: Resource) -> Option<Permit> {
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
    fn retry_budget_follows_the_requests() {
        let budget = RetryBudget { percent: 20.0, min_concurrency: 1, interval: Duration::ZERO };
        let limits = BreakerLimits { retry_budget: Some(budget), ..BreakerLimits::default() };
        let breakers = Breakers::new(&[limits, limits]);
        let breaker = breakers.get(Priority::Default);
        assert_eq!(breaker.remaining(Resource::Retries), 1);
        let _requests: Vec<_> = (0..20).map(|_| breaker.force(Resource::Requests)).collect();
        assert_eq!(breaker.remaining(Resource::Retries), 4);
    }
}
