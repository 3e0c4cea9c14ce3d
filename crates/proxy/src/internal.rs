//! Requests of this proxy's own, to services that it asks or tells.

use crate::stats::OWN_REQUESTS;
use crate::upstream::{Protocol, Variant, call};
use crate::worker::Worker;
use bytes::Bytes;
use proxy_core::circuit::Resource;
use proxy_core::{Headers, PickContext};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Adds what Envoy's internal client (`AsyncStreamImpl`, and the router that it has) adds to its requests.
pub(crate) fn mark(worker: &Worker, headers: &mut Headers, timeout: Option<Duration>) {
    headers.set("x-envoy-internal", b"true");
    if let Some(own) = worker.shared.own_address {
        headers.add("x-forwarded-for", own.to_string().as_bytes());
    }
    if let Some(timeout) = timeout {
        headers.set_number("x-envoy-expected-rq-timeout-ms", timeout.as_millis() as u64);
    }
}

/// Asks a cluster; `None`: no host, no connection, no answer in time. The answer has at most `limit` bytes.
pub(crate) async fn ask(
    worker: &Rc<Worker>,
    cluster: &str,
    headers: Headers,
    body: Bytes,
    timeout: Duration,
    limit: usize,
) -> Option<(u16, Headers, Bytes)> {
    let cluster = worker.cluster(cluster)?;
    worker.named_stats().inc(OWN_REQUESTS);
    let host = cluster.pick(&PickContext::at(Instant::now()), &mut worker.random.borrow_mut());
    let Some(host) = host else {
        cluster.stats.charge(503, true);
        return None;
    };
    let protocol = Protocol::of(&cluster.config().protocol, None);
    let pool = cluster.pool(worker, &host, &Variant { protocol, ..Variant::default() })?;
    let stats = &cluster.stats;
    let head = Cell::new(None);
    let work = async {
        let acquired = pool.acquire().await.ok()?;
        let Some(_permit) = cluster.entry.breakers.get(Default::default()).acquire(Resource::Requests) else {
            acquired.put_back();
            stats.other.inc("upstream_rq_active_overflow");
            host.state.stats.count(false);
            return None;
        };
        stats.upstream_rq_total.inc();
        call(acquired, headers, body, limit, |status| head.set(Some(status))).await.ok()
    };
    let answer = tokio::time::timeout(timeout, work).await;
    if answer.is_err() {
        stats.upstream_rq_timeout.inc();
    }
    // The router of Envoy's internal client answers, and is charged, where no upstream does.
    let status = head.get().unwrap_or(if answer.is_ok() { 503 } else { 504 });
    stats.charge(status, true);
    answer.ok().flatten()
}
