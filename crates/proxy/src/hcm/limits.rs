//! The local rate limit filter: buckets shared by all workers.

use super::encode::AddToAnswer;
use super::exchange::{Exchange, Stop};
use super::local_reply::LocalReply;
use proxy_core::filters::{Demand, LocalRateLimit, RateLimitContext, TokenBucket};
use proxy_core::{FormatContext, ResponseFlags};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The buckets of one limit.
pub(crate) struct Buckets {
    common: Option<TokenBucket>,
    /// By descriptor.
    fixed: Vec<TokenBucket>,
    /// By descriptor: those of open values, the latest used last.
    open: Vec<Vec<(Values, TokenBucket)>>,
}

type Values = Vec<(String, String)>;

/// Buckets by limit; one limit counts for all workers. The lock is held for one decision.
#[derive(Default)]
pub(crate) struct LocalLimits(Mutex<HashMap<usize, (Arc<LocalRateLimit>, Buckets)>>);

/// What the buckets said.
#[derive(Clone, Copy)]
struct Taken {
    ok: bool,
    /// Over a limit that is only watched.
    shadow: bool,
    /// The bucket that tells: the one that is empty, else the slowest.
    shown: Option<Shown>,
}

#[derive(Clone, Copy)]
struct Shown {
    max: u32,
    left: u32,
    /// Seconds until there is a token again.
    reset: u64,
}

impl LocalLimits {
    /// Takes tokens for a request.
    fn take(&self, limit: &Arc<LocalRateLimit>, demands: Vec<Demand>, now: Instant) -> Taken {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Arc::as_ptr(limit) as usize;
        if !all.contains_key(&key) {
            // Limits of configurations that are gone.
            all.retain(|_, (limit, _)| Arc::strong_count(limit) > 1);
        }
        let (_, buckets) = all.entry(key).or_insert_with(|| (limit.clone(), Buckets::new(limit, now)));
        buckets.take(limit, demands, now)
    }
}

impl Buckets {
    fn new(limit: &LocalRateLimit, now: Instant) -> Self {
        Self {
            common: limit.bucket.map(|config| TokenBucket::new(&config, now)),
            fixed: limit.descriptors.iter().map(|d| TokenBucket::new(&d.bucket, now)).collect(),
            open: limit.descriptors.iter().map(|_| Vec::new()).collect(),
        }
    }

    fn bucket(&mut self, limit: &LocalRateLimit, demand: &Demand, now: Instant) -> &mut TokenBucket {
        let Some(values) = demand.values.clone() else { return &mut self.fixed[demand.descriptor] };
        let open = &mut self.open[demand.descriptor];
        let known = open.iter().position(|(known, _)| *known == values);
        let entry = match known {
            Some(at) => open.remove(at),
            None => {
                if open.len() >= limit.max_dynamic.max(1) {
                    open.remove(0);
                }
                (values, TokenBucket::new(&limit.descriptors[demand.descriptor].bucket, now))
            }
        };
        let last = open.len();
        open.push(entry);
        &mut open[last].1
    }

    /// Envoy `LocalRateLimiterImpl::requestAllowed`: the slowest bucket first, the common one last.
    fn take(&mut self, limit: &LocalRateLimit, mut demands: Vec<Demand>, now: Instant) -> Taken {
        let rate = |demand: &Demand| limit.descriptors[demand.descriptor].bucket.per_second();
        demands.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
        let with_common = demands.is_empty() || limit.always_consume_default;
        for demand in &demands {
            let bucket = self.bucket(limit, demand, now);
            // Envoy takes nothing for a request that counts for none, and holds that for a failure.
            let ok = demand.tokens > 0 && bucket.take(demand.tokens, now);
            if !ok {
                let shadow = limit.descriptors[demand.descriptor].shadow;
                return Taken { ok: false, shadow, shown: Some(Shown::of(bucket, now)) };
            }
        }
        let mut common = self.common.as_mut().filter(|_| with_common);
        let ok = common.as_mut().is_none_or(|common| common.take(1, now));
        let shown = match demands.first() {
            Some(slowest) if ok => Some(Shown::of(self.bucket(limit, slowest, now), now)),
            _ => common.map(|common| Shown::of(common, now)),
        };
        Taken { ok, shadow: false, shown }
    }
}

impl Shown {
    fn of(bucket: &mut TokenBucket, now: Instant) -> Self {
        let config = *bucket.config();
        let left = bucket.remaining(now);
        let reset = if left == 0 { bucket.until_next(now).as_secs_f64().ceil() as u64 } else { 0 };
        Self { max: config.max_tokens, left, reset }
    }
}

/// The names of its counters.
pub(crate) fn counters(limit: &LocalRateLimit) -> impl Iterator<Item = String> {
    let of = |what| format!("{}.http_local_rate_limit.{what}", limit.stat_prefix);
    ["enabled", "enforced", "ok", "rate_limited", "shadow_mode"].into_iter().map(of)
}

pub(super) fn run(exchange: &mut Exchange, limit: &Arc<LocalRateLimit>) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let stats = worker.named_stats();
    let prefix = format!("{}.http_local_rate_limit", limit.stat_prefix);
    if !limit.enabled.hit(&mut worker.random.borrow_mut()) {
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enabled"));
    let demands = limit.demands(
        exchange.matched.as_deref(),
        &RateLimitContext {
            headers: &exchange.request,
            remote: &exchange.info.remote,
            local_cluster: &exchange.http.config.node_cluster,
            cluster: exchange.info.upstream.cluster.as_deref().unwrap_or_default(),
            metadata: &exchange.info.dynamic_metadata,
            route_metadata: exchange.matched.as_ref().map(|m| &m.route.metadata),
            format: FormatContext::new(&exchange.info, Some(&exchange.request), None),
        },
    );
    let now = Instant::now();
    let taken = if limit.per_connection {
        let mut own = exchange.http.limits.borrow_mut();
        let buckets = own.entry(Arc::as_ptr(limit) as usize).or_insert_with(|| Buckets::new(limit, now));
        buckets.take(limit, demands, now)
    } else {
        worker.shared.limits.take(limit, demands, now)
    };
    if let (true, Some(shown)) = (limit.ratelimit_headers, taken.shown) {
        for (name, value) in [
            ("x-ratelimit-limit", u64::from(shown.max)),
            ("x-ratelimit-remaining", shown.left.into()),
            ("x-ratelimit-reset", shown.reset),
        ] {
            exchange.add_to_response.push(AddToAnswer::set(name, value.to_string()));
        }
    }
    if taken.ok {
        stats.inc(&format!("{prefix}.ok"));
        return Ok(());
    }
    stats.inc(&format!("{prefix}.rate_limited"));
    if taken.shadow {
        stats.inc(&format!("{prefix}.shadow_mode"));
        return Ok(());
    }
    if !limit.enforced.hit(&mut worker.random.borrow_mut()) {
        let cx = FormatContext::new(&exchange.info, None, None);
        limit.not_enforced_headers.apply_to_request(&mut exchange.request, &cx);
        return Ok(());
    }
    stats.inc(&format!("{prefix}.enforced"));
    let mut reply =
        LocalReply::new(limit.status, "local_rate_limited", "local_rate_limited").flagged(ResponseFlags::RATE_LIMITED);
    // As Envoy, which says so once the answer is made.
    reply.flagged_late = true;
    if limit.resource_exhausted {
        reply.grpc_status = Some(8);
    }
    if let (true, 429, Some(shown)) = (limit.retry_after, limit.status, taken.shown) {
        reply.headers.push(("retry-after".into(), shown.reset.to_string().into_bytes()));
    }
    reply.limit = Some(limit.clone());
    Err(reply.into())
}
