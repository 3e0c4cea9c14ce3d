use std::time::{Duration, Instant};

use mesh_types::ArcStr;

use crate::address::Address;
use crate::fields;
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, canonical_name, first_query_value, header_matchers};
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::HeaderOps;

/// So many requests a time, counted by each worker's caller (`filters.http.local_ratelimit.v3.LocalRateLimit`).
#[derive(Clone, Debug)]
pub struct LocalRateLimit {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// Status of refused requests.
    pub status: u16,
    /// For requests without a descriptor.
    pub bucket: TokenBucketConfig,
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
    pub rules: Vec<RateLimitRule>,
    /// Which of the route's rate limits count.
    pub stage: u32,
    /// Each downstream connection has its own buckets.
    pub per_connection: bool,
    /// gRPC requests are refused with `RESOURCE_EXHAUSTED` instead of `UNAVAILABLE`.
    pub resource_exhausted: bool,
    /// Requests with a descriptor take from the common bucket, too.
    pub always_consume_default: bool,
    /// Tell how much is left by `x-ratelimit-*` headers.
    pub ratelimit_headers: bool,
}

/// A bucket for requests with certain entries.
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor {
    /// Key and value; an empty value stands for any.
    pub entries: Vec<(ArcStr, ArcStr)>,
    /// Its bucket.
    pub bucket: TokenBucketConfig,
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
        if bucket.max_tokens == 0 {
            return Err(Invalid::new("token_bucket.max_tokens", "must be greater than 0"));
        }
        Ok(Self {
            max_tokens: bucket.max_tokens,
            tokens_per_fill: fields::uint(bucket.tokens_per_fill.as_ref(), 1).max(1),
            fill_interval: interval.ok_or_else(|| {
                Invalid::new("token_bucket.fill_interval", "local rate limit token bucket fill timer must be >= 50ms")
            })?,
        })
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
    pub(super) fn compile(limit: &pb::http_filter::local_ratelimit::v3::LocalRateLimit) -> Compiled<Self> {
        refuse!("vh_rate_limits": limit.vh_rate_limits != 0);
        refuse! {
            "local_cluster_rate_limit": limit.local_cluster_rate_limit.is_some(),
            "enable_retry_after_header": limit.enable_retry_after_header,
        }
        let mut descriptors = Vec::new();
        for (i, descriptor) in limit.descriptors.iter().enumerate() {
            descriptors.push(Descriptor {
                entries: descriptor.entries.iter().map(|e| (e.key.as_str().into(), e.value.as_str().into())).collect(),
                bucket: TokenBucketConfig::compile(descriptor.token_bucket.as_ref()).at_index("descriptors", i)?,
            });
        }
        let unlimited = TokenBucketConfig {
            max_tokens: u32::MAX,
            tokens_per_fill: u32::MAX,
            fill_interval: Duration::from_secs(1),
        };
        let status = limit.status.as_ref().map_or(429, |s| s.code);
        Ok(Self {
            stat_prefix: fields::required("stat_prefix", &limit.stat_prefix)?,
            // Below 400 the code is no error, so Envoy takes 429.
            status: u16::try_from(status).ok().filter(|s| (400..600).contains(s)).unwrap_or(429),
            bucket: match &limit.token_bucket {
                Some(bucket) => TokenBucketConfig::compile(Some(bucket))?,
                None => unlimited,
            },
            enabled: Fraction::runtime(limit.filter_enabled.as_ref(), Fraction::NONE).at("filter_enabled")?,
            enforced: Fraction::runtime(limit.filter_enforced.as_ref(), Fraction::NONE).at("filter_enforced")?,
            response_headers: HeaderOps::compile(&limit.response_headers_to_add, &[]).at("response_headers_to_add")?,
            not_enforced_headers: HeaderOps::compile(&limit.request_headers_to_add_when_not_enforced, &[])
                .at("request_headers_to_add_when_not_enforced")?,
            descriptors,
            rules: RateLimitRule::compile_all(&limit.rate_limits)?,
            stage: limit.stage,
            per_connection: limit.local_rate_limit_per_downstream_connection,
            resource_exhausted: limit.rate_limited_as_resource_exhausted,
            always_consume_default: fields::flag(limit.always_consume_default_token_bucket.as_ref(), true),
            ratelimit_headers: limit.enable_x_ratelimit_headers != 0,
        })
    }

    /// The descriptors (by index) whose buckets the request takes from. `route_rules`: those of route and virtual host.
    pub fn descriptors(&self, route_rules: &[&RateLimitRule], cx: &RateLimitContext<'_>) -> Vec<usize> {
        if self.descriptors.is_empty() {
            return Vec::new();
        }
        let own: Vec<&RateLimitRule> = self.rules.iter().collect();
        let rules = if own.is_empty() { route_rules } else { &own };
        let mut found = Vec::new();
        for rule in rules.iter().filter(|r| r.stage == self.stage) {
            let Some(entries) = rule.entries(cx) else { continue };
            // An exact descriptor comes before one with open values.
            let fits = |open: bool| {
                self.descriptors.iter().position(|d| {
                    d.entries.len() == entries.len()
                        && d.entries
                            .iter()
                            .zip(&entries)
                            .all(|((key, value), (k, v))| **key == *k && (**value == *v || (open && value.is_empty())))
                })
            };
            if let Some(index) = fits(false).or_else(|| fits(true))
                && !found.contains(&index)
            {
                found.push(index);
            }
        }
        found
    }
}

/// How a route makes descriptors (`route.v3.RateLimit`).
#[derive(Clone, Debug)]
pub struct RateLimitRule {
    stage: u32,
    actions: Vec<Action>,
}

#[derive(Clone, Debug)]
enum Action {
    GenericKey(ArcStr, ArcStr),
    SourceCluster,
    DestinationCluster,
    RemoteAddress,
    Header { name: Box<str>, key: ArcStr, skip: bool },
    Query { name: Box<str>, key: ArcStr, skip: bool },
    HeaderMatch { key: ArcStr, value: ArcStr, expect: bool, headers: Box<[HeaderMatcher]> },
}

/// What descriptors are made of.
#[derive(Clone, Copy, Debug)]
pub struct RateLimitContext<'a> {
    /// Request head.
    pub headers: &'a Headers,
    /// The trusted client address.
    pub remote: &'a Address,
    /// This proxy's `--service-cluster`.
    pub local_cluster: &'a str,
    /// The route's cluster.
    pub cluster: &'a str,
}

impl RateLimitRule {
    pub(crate) fn compile_all(limits: &[pb::route::RateLimit]) -> Compiled<Vec<Self>> {
        limits.iter().enumerate().map(|(i, l)| Self::compile(l).at_index("rate_limits", i)).collect()
    }

    fn compile(limit: &pb::route::RateLimit) -> Compiled<Self> {
        use pb::route::rate_limit::action::ActionSpecifier as Kind;
        refuse! {
            "limit": limit.limit.is_some(),
            "apply_on_stream_done": limit.apply_on_stream_done,
            "hits_addend": limit.hits_addend.is_some(),
        }
        let key = |key: &str, default: &str| -> ArcStr { if key.is_empty() { default.into() } else { key.into() } };
        let mut actions = Vec::new();
        for (i, action) in limit.actions.iter().enumerate() {
            actions.push(match &action.action_specifier {
                Some(Kind::GenericKey(a)) => {
                    Action::GenericKey(key(&a.descriptor_key, "generic_key"), a.descriptor_value.as_str().into())
                }
                Some(Kind::SourceCluster(_)) => Action::SourceCluster,
                Some(Kind::DestinationCluster(_)) => Action::DestinationCluster,
                Some(Kind::RemoteAddress(_)) => Action::RemoteAddress,
                Some(Kind::RequestHeaders(a)) => Action::Header {
                    name: canonical_name(&a.header_name).into(),
                    key: a.descriptor_key.as_str().into(),
                    skip: a.skip_if_absent,
                },
                Some(Kind::QueryParameters(a)) => Action::Query {
                    name: a.query_parameter_name.as_str().into(),
                    key: a.descriptor_key.as_str().into(),
                    skip: a.skip_if_absent,
                },
                Some(Kind::HeaderValueMatch(a)) => Action::HeaderMatch {
                    key: key(&a.descriptor_key, "header_match"),
                    value: a.descriptor_value.as_str().into(),
                    expect: fields::flag(a.expect_match.as_ref(), true),
                    headers: header_matchers("headers", &a.headers).at_index("actions", i)?,
                },
                _ => return Err(Invalid::unsupported(format!("actions[{i}]"))),
            });
        }
        Ok(Self { stage: fields::uint(limit.stage.as_ref(), 0), actions })
    }

    /// The descriptor's entries; `None`: an action gave nothing, so there is no descriptor.
    fn entries(&self, cx: &RateLimitContext<'_>) -> Option<Vec<(String, String)>> {
        let text = |v: &[u8]| String::from_utf8_lossy(v).into_owned();
        let mut entries = Vec::new();
        for action in &self.actions {
            entries.push(match action {
                Action::GenericKey(key, value) => (key.to_string(), value.to_string()),
                Action::SourceCluster => ("source_cluster".to_owned(), cx.local_cluster.to_owned()),
                Action::DestinationCluster => ("destination_cluster".to_owned(), cx.cluster.to_owned()),
                Action::RemoteAddress => ("remote_address".to_owned(), cx.remote.ip()?.to_string()),
                Action::Header { name, key, skip } => match cx.headers.get(name) {
                    Some(value) => (key.to_string(), text(value)),
                    None if *skip => continue,
                    None => return None,
                },
                Action::Query { name, key, skip } => {
                    match first_query_value(cx.headers.path().unwrap_or_default(), name) {
                        Some(value) => (key.to_string(), value.to_owned()),
                        None if *skip => continue,
                        None => return None,
                    }
                }
                Action::HeaderMatch { key, value, expect, headers } => {
                    if headers.iter().all(|m| m.matches(cx.headers)) != *expect {
                        return None;
                    }
                    (key.to_string(), value.to_string())
                }
            });
        }
        Some(entries)
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
