//! Request mirroring: copies nobody waits for, sent once the request's body is known.

use super::exchange::Exchange;
use crate::stream::Frame;
use crate::upstream::{Protocol, Variant, call, server_name};
use mesh_types::ArcStr;
use proxy_core::route::{Matched, Mirror};
use proxy_core::{Headers, PickContext};
use std::time::Instant;

/// A copy to be sent.
pub(super) struct Copy {
    cluster: ArcStr,
    headers: Headers,
}

/// A mirror's answer is read and dropped, up to this.
const MAX_ANSWER: usize = 16 << 20;

/// Which mirrors get this request, with its head as it goes upstream.
pub(super) fn chosen(exchange: &Exchange, matched: &Matched) -> Vec<Copy> {
    let worker = &exchange.http.worker;
    let mut copies = Vec::new();
    for mirror in matched.mirrors() {
        let Some(cluster) = mirror.choose(&exchange.request, &mut worker.random.borrow_mut()) else { continue };
        copies.push(Copy { cluster, headers: copied_head(exchange, mirror) });
    }
    copies
}

fn copied_head(exchange: &Exchange, mirror: &Mirror) -> Headers {
    let mut headers = exchange.request.clone();
    let authority = headers.authority().unwrap_or_default().to_owned();
    let authority = mirror.authority(&authority).into_owned();
    headers.set(":authority", authority.as_bytes());
    super::span::copied(exchange, mirror.trace_sampled, &mut headers);
    // As Envoy's internal client marks its requests.
    headers.set("x-envoy-internal", b"true");
    if let Some(own) = exchange.http.worker.shared.own_address {
        headers.add("x-forwarded-for", own.to_string().as_bytes());
    }
    if let Some(timeout) = exchange.matched.as_ref().and_then(|m| m.forward()).and_then(|f| f.timeout) {
        headers.set("x-envoy-expected-rq-timeout-ms", timeout.as_millis().to_string().as_bytes());
    }
    headers
}

/// Sends the copies.
pub(super) fn send(exchange: &Exchange, copies: Vec<Copy>, body: Vec<Frame>) {
    let body = super::router::joined(&body);
    let timeout = exchange.matched.as_ref().and_then(|m| m.forward()).and_then(|f| f.timeout);
    for copy in copies {
        let worker = exchange.http.worker.clone();
        let Some(cluster) = worker.cluster(&copy.cluster) else { continue };
        let body = body.clone();
        let local = exchange.http.original_dst;
        // Nobody waits for a mirror: that is its point.
        tokio::task::spawn_local(async move {
            let context = PickContext {
                hash: None,
                metadata_match: None,
                previous: &[],
                retry: None,
                override_host: None,
                original_dst: local,
                headers: Some(&copy.headers),
                now: Instant::now(),
            };
            let host = cluster.pick(&context, &mut worker.random.borrow_mut());
            let Some(host) = host else {
                cluster.stats.upstream_cx_none_healthy.inc();
                return;
            };
            let protocol = Protocol::of(&cluster.config().protocol, None);
            let server_name = server_name(cluster.config(), &copy.headers);
            let pool = cluster.pool(&worker, &host, &Variant { protocol, server_name, ..Variant::default() });
            let Some(pool) = pool else { return };
            let work = async {
                let acquired = pool.acquire().await.ok()?;
                cluster.stats.upstream_rq_total.inc();
                let mut headers = copy.headers;
                if !body.is_empty() && !headers.contains("content-length") {
                    headers.remove("transfer-encoding");
                }
                call(acquired, headers, body, MAX_ANSWER, |_| ()).await.ok().map(|(status, ..)| status)
            };
            let status = match timeout {
                Some(timeout) => tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| {
                    cluster.stats.upstream_rq_timeout.inc();
                    Some(504)
                }),
                None => work.await,
            };
            // The copies come from inside; what failed counts as Envoy answers it.
            cluster.stats.charge(status.unwrap_or(503), true);
        });
    }
}
