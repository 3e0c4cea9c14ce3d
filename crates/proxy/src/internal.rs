//! Requests of this proxy's own, to services that it asks or tells.

use crate::hcm::{is_grpc, succeeded};
use crate::stats::OWN_REQUESTS;
use crate::upstream::{AcquireError, Active, Protocol, ServerNames, Variant, call};
use crate::worker::Worker;
use bytes::Bytes;
use proxy_core::circuit::Resource;
use proxy_core::outlier::Outcome;
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
        cluster.stats.upstream_cx_none_healthy.inc();
        cluster.stats.charge(503, true);
        return None;
    };
    let protocol = Protocol::of(&cluster.config().protocol, None);
    let names = ServerNames::of(cluster.config(), &headers);
    let pool = cluster.pool(worker, &host, &Variant { protocol, names, ..Variant::default() })?;
    let stats = &cluster.stats;
    let tell = |outcome| cluster.on_result(&host, Some(outcome), worker);
    let head = Cell::new(None);
    let work = async {
        let acquired = match pool.acquire().await {
            Ok(acquired) => acquired,
            Err(AcquireError::Overflow) => return None,
            Err(AcquireError::Connect(e)) => {
                tell(if e.timeout { Outcome::ConnectTimeout } else { Outcome::ConnectFailed });
                return None;
            }
        };
        tell(Outcome::ConnectedForRequests);
        let Some(_permit) = cluster.entry.breakers.get(Default::default()).acquire(Resource::Requests) else {
            acquired.put_back();
            stats.other.inc("upstream_rq_active_overflow");
            host.state.stats.count(false);
            return None;
        };
        let _active = Active::new(cluster.clone(), host.clone());
        stats.upstream_rq_total.inc();
        let began = Instant::now();
        let grpc = is_grpc(&headers);
        let told = |status, answer: &Headers| {
            head.set(Some(status));
            tell(Outcome::of_answer(status, answer));
        };
        let answer = call(acquired, headers, body, limit, told).await;
        match &answer {
            Ok((status, answer, _)) => host.state.stats.count(*status < 500 && (!grpc || succeeded(answer))),
            Err(_) if head.get().is_none() => tell(Outcome::Reset),
            Err(_) => {}
        }
        if head.get().is_some() {
            stats.took(began.elapsed().as_millis() as u64, true);
        }
        answer.ok()
    };
    let answer = tokio::time::timeout(timeout, work).await;
    if answer.is_err() {
        stats.upstream_rq_timeout.inc();
        if head.get().is_none() {
            tell(Outcome::Timeout);
        }
    }
    // The router of Envoy's internal client answers, and is charged, where no upstream does.
    let status = head.get().unwrap_or(if answer.is_ok() { 503 } else { 504 });
    stats.charge(status, true);
    answer.ok().flatten()
}
