//! The local rate limit filter: buckets shared by all workers.

use super::exchange::{Exchange, Stop};
use super::local_reply::LocalReply;
use proxy_core::filters::{LocalRateLimit, RateLimitContext, RateLimitRule, TokenBucket};
use proxy_core::{FormatContext, Headers, ResponseFlags};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The default bucket, then one for each descriptor.
type Buckets = Vec<TokenBucket>;

/// Buckets by limit; one limit counts for all workers. The lock is held for one decision.
#[derive(Default)]
pub(crate) struct LocalLimits(Mutex<HashMap<usize, (Arc<LocalRateLimit>, Buckets)>>);

/// What the buckets said.
#[derive(Clone, Copy)]
struct Taken {
    ok: bool,
    max: u32,
    left: u32,
    /// Seconds until there is a token again.
    reset: u64,
}

impl LocalLimits {
    /// Takes one token for a request with these descriptors.
    fn take(&self, limit: &Arc<LocalRateLimit>, descriptors: &[usize], now: Instant) -> Taken {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Arc::as_ptr(limit) as usize;
        if !all.contains_key(&key) {
            // Limits of configurations that are gone.
            all.retain(|_, (limit, _)| Arc::strong_count(limit) > 1);
        }
        let (_, buckets) = all.entry(key).or_insert_with(|| (limit.clone(), fresh(limit, now)));
        take(limit, buckets, descriptors, now)
    }
}

pub(super) fn fresh(limit: &LocalRateLimit, now: Instant) -> Buckets {
    let own = limit.descriptors.iter().map(|d| &d.bucket);
    std::iter::once(&limit.bucket).chain(own).map(|config| TokenBucket::new(config, now)).collect()
}

/// Envoy `LocalRateLimiterImpl::requestAllowed`: the slowest bucket first, the common one last.
fn take(limit: &LocalRateLimit, buckets: &mut Buckets, descriptors: &[usize], now: Instant) -> Taken {
    let rate = |i: &usize| {
        let bucket = &limit.descriptors[*i].bucket;
        f64::from(bucket.tokens_per_fill) / bucket.fill_interval.as_secs_f64()
    };
    let mut order: Vec<usize> = descriptors.to_vec();
    order.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
    let with_common = order.is_empty() || limit.always_consume_default;
    let all = order.iter().map(|i| i + 1).chain(with_common.then_some(0));
    let mut shown = None;
    let mut ok = true;
    for index in all {
        ok = buckets[index].take(1, now);
        if shown.is_none() || !ok {
            shown = Some(index);
        }
        if !ok {
            break;
        }
    }
    let shown = shown.unwrap_or_default();
    let config = if shown == 0 { &limit.bucket } else { &limit.descriptors[shown - 1].bucket };
    let left = buckets[shown].remaining(now);
    let per_token = config.fill_interval.as_secs_f64() / f64::from(config.tokens_per_fill.max(1));
    Taken { ok, max: config.max_tokens, left, reset: if left == 0 { per_token.ceil() as u64 } else { 0 } }
}

pub(super) fn run(exchange: &mut Exchange, limit: &Arc<LocalRateLimit>) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let stats = worker.named_stats();
    let prefix = format!("{}.http_local_rate_limit", limit.stat_prefix);
    for what in ["enabled", "enforced", "ok", "rate_limited"] {
        stats.touch(&format!("{prefix}.{what}"));
    }
    if !limit.enabled.hit(&mut worker.random.borrow_mut()) {
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enabled"));
    let matched = exchange.matched.clone();
    let rules: Vec<&RateLimitRule> = matched.as_ref().map(|m| m.rate_limit_rules()).unwrap_or_default();
    let descriptors = limit.descriptors(
        &rules,
        &RateLimitContext {
            headers: &exchange.request,
            remote: &exchange.info.remote,
            local_cluster: &exchange.http.config.node_cluster,
            cluster: exchange.info.upstream.cluster.as_deref().unwrap_or_default(),
        },
    );
    let now = Instant::now();
    let taken = if limit.per_connection {
        let mut own = exchange.http.limits.borrow_mut();
        let buckets = own.entry(Arc::as_ptr(limit) as usize).or_insert_with(|| fresh(limit, now));
        take(limit, buckets, &descriptors, now)
    } else {
        worker.shared.limits.take(limit, &descriptors, now)
    };
    if limit.ratelimit_headers {
        for (name, value) in [
            ("x-ratelimit-limit", u64::from(taken.max)),
            ("x-ratelimit-remaining", taken.left.into()),
            ("x-ratelimit-reset", taken.reset),
        ] {
            exchange.add_to_response.push((name.to_owned(), value.to_string().into_bytes()));
        }
    }
    if taken.ok {
        stats.inc(&format!("{prefix}.ok"));
        return Ok(());
    }
    stats.inc(&format!("{prefix}.rate_limited"));
    if !limit.enforced.hit(&mut worker.random.borrow_mut()) {
        let cx = FormatContext::new(&exchange.info, None, None);
        limit.not_enforced_headers.apply_to_request(&mut exchange.request, &cx);
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enforced"));
    let mut reply =
        LocalReply::new(limit.status, "local_rate_limited", "local_rate_limited").flagged(ResponseFlags::RATE_LIMITED);
    if limit.resource_exhausted {
        reply.grpc_status = Some(8);
    }
    let mut extra = Headers::new();
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
    limit.response_headers.apply(&mut extra, &cx);
    reply.headers = extra.iter_regular().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), v.to_vec())).collect();
    Err(reply.into())
}
