use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::fields;
use crate::headers::Headers;
use crate::pb;
use crate::random::Random;
use crate::rejected::{Compiled, Invalid};

/// Pauses that double, with full jitter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackOff {
    /// The first pause is up to this.
    pub base: Duration,
    /// No pause is longer.
    pub max: Duration,
}

impl BackOff {
    pub(super) fn of_retry(config: &pb::route::retry_policy::RetryBackOff) -> Compiled<Self> {
        Self::new(config.base_interval.as_ref(), config.max_interval.as_ref())
    }

    pub(crate) fn of_strategy(config: &pb::core::BackoffStrategy) -> Compiled<Self> {
        Self::new(config.base_interval.as_ref(), config.max_interval.as_ref())
    }

    fn new(base: Option<&pb::Duration>, max: Option<&pb::Duration>) -> Compiled<Self> {
        let base =
            fields::duration("base_interval", base)?.ok_or_else(|| Invalid::new("base_interval", "is missing"))?;
        // Below a millisecond is rounded up to one.
        let base = base.max(Duration::from_millis(1));
        let max = fields::duration("max_interval", max)?.unwrap_or(base * 10);
        if max < base {
            return Err(Invalid::new("max_interval", "must be greater than or equal to the base_interval"));
        }
        Ok(Self { base, max })
    }

    /// The pause after so many tries.
    pub fn after(&self, tries: u32, random: &mut Random) -> Duration {
        let mut pause = Pause::new(*self);
        for _ in 1..tries {
            pause.next(random);
        }
        pause.next(random)
    }
}

/// The pauses of one request (Envoy `JitteredExponentialBackOffStrategy`).
#[derive(Clone, Debug)]
pub(super) struct Pause {
    limits: BackOff,
    next: Duration,
}

impl Pause {
    pub(super) fn new(limits: BackOff) -> Self {
        Self { limits, next: limits.base }
    }

    pub(super) fn next(&mut self, random: &mut Random) -> Duration {
        let upper = self.next;
        self.next = (self.next * 2).min(self.limits.max);
        Duration::from_millis(random.below(upper.as_millis() as u64)).min(self.limits.max)
    }
}

/// Pauses that the upstream asks for in its response.
#[derive(Clone, Debug)]
pub struct RateLimitedBackOff {
    headers: Box<[(Box<str>, bool)]>,
    max: Duration,
}

impl RateLimitedBackOff {
    pub(super) fn compile(config: &pb::route::retry_policy::RateLimitedRetryBackOff) -> Compiled<Self> {
        let headers =
            config.reset_headers.iter().map(|h| (h.name.to_ascii_lowercase().into(), h.format == 1)).collect();
        let max = fields::positive("max_interval", config.max_interval.as_ref(), Duration::from_secs(300))?;
        Ok(Self { headers, max })
    }

    /// What the first usable header says; nothing at all and longer than the maximum are not usable.
    pub(super) fn interval(&self, response: &Headers, now: SystemTime) -> Option<Duration> {
        self.headers.iter().find_map(|(name, is_moment)| {
            let number: u64 = response.get_str(name)?.trim().parse().ok()?;
            let seconds =
                if *is_moment { number.checked_sub(now.duration_since(UNIX_EPOCH).ok()?.as_secs())? } else { number };
            let interval = Duration::from_secs(seconds);
            (interval <= self.max && !interval.is_zero()).then_some(interval)
        })
    }
}
