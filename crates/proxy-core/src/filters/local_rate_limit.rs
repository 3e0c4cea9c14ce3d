use std::time::{Duration, Instant};

use mesh_types::ArcStr;

use super::descriptors::{Entries, RateLimitContext, RateLimitRule};
use crate::fields;
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::{HeaderOps, Matched};
use crate::runtime::Runtime;

/// So many requests a time, counted by each worker's caller (`filters.http.local_ratelimit.v3.LocalRateLimit`).
#[derive(Clone, Debug)]
pub struct LocalRateLimit {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// Status of refused requests.
    pub status: u16,
    /// For requests without a descriptor; `None`: they are not limited.
    pub bucket: Option<TokenBucketConfig>,
    /// Requests that are counted.
    pub enabled: Fraction,
    /// Requests over the limit that are refused.
    pub enforced: Fraction,
    /// Added to refusals.
    pub response_headers: HeaderOps,
    /// Added to requests that are over the limit but pass.
    pub not_enforced_headers: HeaderOps,
    /// Buckets of their own for certain requests.
    pub descriptors: Vec<Descriptor>,
    /// How descriptors are made; empty: by the route's rate limits of `stage`.
    rules: Vec<RateLimitRule>,
    /// Which of the route's rate limits count.
    stage: u32,
    /// Whether the virtual host's count beside the route's.
    outer: OuterRules,
    /// How many values of open descriptors are counted by themselves, each.
    pub max_dynamic: usize,
    /// Each downstream connection has its own buckets.
    pub per_connection: bool,
    /// gRPC requests are refused with `RESOURCE_EXHAUSTED` instead of `UNAVAILABLE`.
    pub resource_exhausted: bool,
    /// Requests with a descriptor take from the common bucket, too.
    pub always_consume_default: bool,
    /// Tell how much is left by `x-ratelimit-*` headers.
    pub ratelimit_headers: bool,
    /// Tell refused clients when to come again.
    pub retry_after: bool,
}

/// Which rate limits of a virtual host count for its routes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum OuterRules {
    /// All, unless the route has some.
    Overridden,
    /// All.
    Included,
    /// None.
    Ignored,
}

/// A bucket that a request takes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Demand {
    /// The place of its descriptor.
    pub descriptor: usize,
    /// Of a descriptor with open values: which of its buckets.
    pub values: Option<Vec<(String, String)>>,
    /// So many tokens.
    pub tokens: u32,
}

/// A bucket for requests with certain entries.
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor {
    /// Key and value; an empty value stands for any.
    pub entries: Vec<(ArcStr, ArcStr)>,
    /// Its bucket.
    pub bucket: TokenBucketConfig,
    /// Requests over this limit are counted, but pass.
    pub shadow: bool,
}

impl Descriptor {
    fn is_open(&self) -> bool {
        self.entries.iter().any(|(_, value)| value.is_empty())
    }

    fn fits(&self, entries: &Entries) -> bool {
        self.entries.len() == entries.len()
            && self
                .entries
                .iter()
                .zip(entries)
                .all(|((key, value), (k, v))| **key == *k && (value.is_empty() || **value == *v))
    }
}

/// Size and refill of a bucket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenBucketConfig {
    /// Most tokens.
    pub max_tokens: u32,
    /// New ones each time.
    pub tokens_per_fill: u32,
    /// That time.
    pub fill_interval: Duration,
}

impl TokenBucketConfig {
    pub(crate) fn compile(bucket: Option<&pb::kind::TokenBucket>) -> Compiled<Self> {
        let bucket = bucket.ok_or_else(|| Invalid::new("token_bucket", "is missing"))?;
        let interval = fields::duration("token_bucket.fill_interval", bucket.fill_interval.as_ref())?;
        // Envoy `LocalRateLimiterImpl`: shorter intervals are refused.
        let interval = interval.filter(|i| *i >= Duration::from_millis(50));
        Ok(Self {
            max_tokens: bucket.max_tokens,
            tokens_per_fill: fields::uint(bucket.tokens_per_fill.as_ref(), 1).max(1),
            fill_interval: interval.ok_or_else(|| {
                Invalid::new("token_bucket.fill_interval", "local rate limit token bucket fill timer must be >= 50ms")
            })?,
        })
    }
}

impl TokenBucketConfig {
    /// How fast it fills.
    pub fn per_second(&self) -> f64 {
        f64::from(self.tokens_per_fill) / self.fill_interval.as_secs_f64()
    }
}

/// Tokens that are refilled with time. Owned by whoever counts; pure otherwise.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    config: TokenBucketConfig,
    tokens: f64,
    last: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(config: &TokenBucketConfig, now: Instant) -> Self {
        Self { config: *config, tokens: config.max_tokens.into(), last: now }
    }

    /// Its size and refill.
    pub fn config(&self) -> &TokenBucketConfig {
        &self.config
    }

    /// Takes tokens if there are enough (Envoy `AtomicTokenBucketImpl`: tokens come in continuously).
    pub fn take(&mut self, n: u32, now: Instant) -> bool {
        self.refill(now);
        if self.tokens < f64::from(n) {
            return false;
        }
        self.tokens -= f64::from(n);
        true
    }

    /// Whole tokens left.
    pub fn remaining(&mut self, now: Instant) -> u32 {
        self.refill(now);
        self.tokens as u32
    }

    /// How long until another token is there.
    pub fn until_next(&mut self, now: Instant) -> Duration {
        self.refill(now);
        let missing = 1.0 - self.tokens.fract();
        self.config.fill_interval.mul_f64(missing / f64::from(self.config.tokens_per_fill))
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.last);
        let rate = f64::from(self.config.tokens_per_fill) / self.config.fill_interval.as_secs_f64();
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min(self.config.max_tokens.into());
        self.last = self.last.max(now);
    }
}

impl LocalRateLimit {
    pub(super) fn compile(
        limit: &pb::http_filter::local_ratelimit::v3::LocalRateLimit,
        runtime: &Runtime,
    ) -> Compiled<Self> {
        use pb::ext::common::ratelimit::v3::VhRateLimitsOptions;
        refuse!("local_cluster_rate_limit": limit.local_cluster_rate_limit.is_some());
        let mut descriptors = Vec::new();
        if !(0..=1).contains(&limit.enable_x_ratelimit_headers) {
            return Err(Invalid::new("enable_x_ratelimit_headers", "is no known value"));
        }
        for (i, descriptor) in limit.descriptors.iter().enumerate() {
            for entry in &descriptor.entries {
                fields::required("key", &entry.key).at_index("descriptors", i)?;
            }
            descriptors.push(Descriptor {
                entries: descriptor.entries.iter().map(|e| (e.key.as_str().into(), e.value.as_str().into())).collect(),
                bucket: TokenBucketConfig::compile(descriptor.token_bucket.as_ref()).at_index("descriptors", i)?,
                shadow: descriptor.shadow_mode,
            });
        }
        for (i, descriptor) in descriptors.iter().enumerate() {
            let same = |other: &Descriptor| other.entries == descriptor.entries;
            if !descriptor.is_open() && descriptors[..i].iter().any(same) {
                return Err(Invalid::new(format!("descriptors[{i}]"), "there is one with the same entries already"));
            }
        }
        let status = limit.status.as_ref().map_or(429, |s| s.code);
        Ok(Self {
            stat_prefix: fields::required("stat_prefix", &limit.stat_prefix)?,
            // Below 400 the code is no error, so Envoy takes 429.
            status: u16::try_from(status).ok().filter(|s| (400..600).contains(s)).unwrap_or(429),
            bucket: limit.token_bucket.as_ref().map(|b| TokenBucketConfig::compile(Some(b))).transpose()?,
            enabled: Fraction::runtime(limit.filter_enabled.as_ref(), Fraction::NONE, runtime).at("filter_enabled")?,
            enforced: Fraction::runtime(limit.filter_enforced.as_ref(), Fraction::NONE, runtime)
                .at("filter_enforced")?,
            response_headers: HeaderOps::compile(&limit.response_headers_to_add, &[]).at("response_headers_to_add")?,
            not_enforced_headers: HeaderOps::compile(&limit.request_headers_to_add_when_not_enforced, &[])
                .at("request_headers_to_add_when_not_enforced")?,
            descriptors,
            rules: RateLimitRule::compile_own(&limit.rate_limits)?,
            stage: limit.stage,
            outer: match VhRateLimitsOptions::try_from(limit.vh_rate_limits) {
                Ok(VhRateLimitsOptions::Override) => OuterRules::Overridden,
                Ok(VhRateLimitsOptions::Include) => OuterRules::Included,
                Ok(VhRateLimitsOptions::Ignore) => OuterRules::Ignored,
                Err(_) => return Err(Invalid::new("vh_rate_limits", "is no known value")),
            },
            max_dynamic: fields::uint(limit.max_dynamic_descriptors.as_ref(), 20) as usize,
            per_connection: limit.local_rate_limit_per_downstream_connection,
            resource_exhausted: limit.rate_limited_as_resource_exhausted,
            always_consume_default: fields::flag(limit.always_consume_default_token_bucket.as_ref(), true),
            ratelimit_headers: limit.enable_x_ratelimit_headers != 0,
            retry_after: limit.enable_retry_after_header,
        })
    }

    /// The buckets of descriptors that a request takes from.
    pub fn demands(&self, matched: Option<&Matched>, cx: &RateLimitContext<'_>) -> Vec<Demand> {
        if self.descriptors.is_empty() {
            return Vec::new();
        }
        let own = !self.rules.is_empty();
        let rules = if own { self.rules.iter().collect() } else { self.route_rules(matched) };
        let mut found = Vec::new();
        for rule in rules {
            let Some(entries) = rule.entries(cx) else { continue };
            // Envoy's routes do not say how much a request counts.
            let Some(tokens) = (if own { rule.hits(cx) } else { Some(1) }) else { continue };
            let fits = |open: bool| self.descriptors.iter().position(|d| d.is_open() == open && d.fits(&entries));
            if let Some(descriptor) = fits(false) {
                found.push(Demand { descriptor, values: None, tokens });
            } else if let Some(descriptor) = fits(true) {
                found.push(Demand { descriptor, values: Some(entries), tokens });
            }
        }
        found
    }

    /// Rules of route and virtual host, of this filter's stage.
    fn route_rules<'m>(&self, matched: Option<&'m Matched>) -> Vec<&'m RateLimitRule> {
        let Some((own, outer, both)) = matched.and_then(Matched::rate_limit_rules) else { return Vec::new() };
        let outer = match self.outer {
            _ if both => outer,
            OuterRules::Included => outer,
            OuterRules::Overridden if own.is_empty() => outer,
            OuterRules::Overridden | OuterRules::Ignored => &[],
        };
        own.iter().chain(outer).filter(|rule| rule.stage == self.stage).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_refills_with_time() {
        let config = TokenBucketConfig { max_tokens: 2, tokens_per_fill: 1, fill_interval: Duration::from_secs(1) };
        let start = Instant::now();
        let mut bucket = TokenBucket::new(&config, start);
        assert!(bucket.take(1, start) && bucket.take(1, start) && !bucket.take(1, start));
        assert_eq!(bucket.until_next(start + Duration::from_millis(250)), Duration::from_millis(750));
        assert!(bucket.take(1, start + Duration::from_secs(1)));
        assert_eq!(bucket.remaining(start + Duration::from_secs(100)), 2);
    }
}
