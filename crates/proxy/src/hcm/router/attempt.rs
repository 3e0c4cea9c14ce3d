//! One try: a connection, the request, and the wait for an answer's head.

use super::counted::Told;
use super::outgoing::Outgoing;
use super::why::Why;
use super::{Plan, Tried, asks_for_websocket, cancel, no_host};
use crate::hcm::exchange::{Exchange, Stop};
use crate::hcm::local_reply::LocalReply;
use crate::hcm::mirror;
use crate::hcm::timers::Deadline;
use crate::stream::{Gone, Pump, PumpError, RecvBody, SendBody, header_bytes};
use crate::upstream::{
    AcquireError, Acquired, Active, Announced, Pool, Protocol, Reply, ServerNames, Source, Tunnel, Upstream, Variant,
};
use proxy_core::circuit::Resource;
use proxy_core::hcm::tell_request_id;
use proxy_core::outlier::Outcome as Health;
use proxy_core::route::{Connect, HostRewrite};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{Host, ResponseFlags};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

/// Connects, sends the request and waits for a head.
pub(super) async fn one_try(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    host: &Arc<Host>,
) -> Result<Tried, Stop> {
    let worker = exchange.http.worker.clone();
    let stats = &plan.cluster.stats;
    let variant = variant(exchange, plan, host);
    plan.cluster.look_ahead(&worker, &variant);
    let Some(pool) = plan.cluster.pool(&worker, host, &variant) else {
        // One pool too many is, to Envoy, a host too few.
        exchange.info.upstream.host = None;
        plan.charge(exchange, 503);
        return Err(no_host().into());
    };
    let copies = plan.mirrors.take();
    if !copies.is_empty() {
        let empty = outgoing.is_empty();
        outgoing.feeds =
            mirror::start(exchange, plan.matched, copies, &plan.timeouts, !plan.suppress_envoy_headers, empty);
    }
    let breaker = plan.cluster.entry.breakers.get(plan.forward.priority);
    if let Some(connect) = plan.forward.terminates(exchange.request.method().unwrap_or_default()) {
        return Box::pin(dial_tunnel(exchange, plan, outgoing, &pool, connect)).await;
    }
    let at_hand = pool.at_hand();
    let was_there = at_hand.is_some();
    let acquired = match at_hand {
        Some(acquired) => Acquire::Done(Ok(acquired)),
        // In a box: most requests need no room for this.
        None => Box::pin(acquire(exchange, plan, outgoing.rest, pool.acquire())).await?,
    };
    let acquired = match acquired {
        Acquire::Done(Ok(acquired)) => acquired,
        Acquire::Done(Err(AcquireError::Connect(e))) => {
            return Ok(Tried::Failed { why: Why::Connect(e), started: false });
        }
        Acquire::Done(Err(AcquireError::Overflow)) => {
            exchange.info.upstream.host = None;
            return Ok(Tried::Failed { why: Why::Overflow, started: false });
        }
        Acquire::TimedOut => return Ok(Tried::PerTryTimeout(Deadline::Global)),
    };
    plan.cluster.on_result(host, Some(Health::ConnectedForRequests), &worker);
    let Some(_permit) = breaker.acquire(Resource::Requests) else {
        acquired.put_back();
        stats.other.inc("upstream_rq_active_overflow");
        host.state.stats.count(false);
        return Ok(Tried::Failed { why: Why::Overflow, started: false });
    };
    let _active = Active::new(plan.cluster.clone(), host.clone());
    stats.upstream_rq_total.inc();
    plan.counted.each(|stats| stats.upstream_rq_total.inc());
    if !exchange.request.contains(":path") && exchange.request.method() != Some("CONNECT") {
        // A filter took it away. Envoy's codecs refuse to write such a head.
        let (facts, protocol) = match &acquired {
            Acquired::H1(lease) => (lease.facts(), HttpProtocol::Http11),
            Acquired::H2(connection) => (connection.facts(), HttpProtocol::Http2),
        };
        let info = &mut exchange.info.upstream;
        (info.local, info.protocol) = (facts.local.clone(), Some(protocol));
        if protocol == HttpProtocol::Http2 {
            stats.upstream_rq_tx_reset.inc();
        }
        let details = "filter_removed_required_request_headers{missing_required_header:_:path}";
        let reply = LocalReply::new(503, "missing required header: :path", details);
        return Err(reply.flagged(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR).into());
    }
    prepare_head(exchange, plan, host);
    let end = outgoing.is_empty();
    let kind = exchange.hints.tunnel();
    let tunnel = kind != Tunnel::No;
    let started = Upstream::start(acquired, &mut exchange.request, end, kind, enable_trailers(plan));
    let mut upstream = match started {
        Ok(upstream) => upstream,
        Err(failure) => return Ok(Tried::Failed { why: Why::Stream(failure), started: false }),
    };
    let info = &mut exchange.info.upstream;
    info.local = upstream.facts.local.clone();
    info.tls = upstream.facts.tls.clone();
    info.connection_id = Some(upstream.facts.id);
    info.protocol = Some(upstream.protocol);
    info.header_bytes_sent += upstream.head_bytes;
    if upstream.protocol == HttpProtocol::Http2 {
        // There may have been no room for another stream.
        exchange.timers.waited();
    }
    exchange.info.times.upstream_first_tx = Some(exchange.elapsed());
    if let Some(router) = plan.router.filter(|router| router.upstream_log_on_stream) {
        exchange.log_to(&router.upstream_log, "UpstreamPoolReady", None);
    }
    if exchange.body_done || asks_for_websocket(exchange) {
        exchange.timers.set(Deadline::PerTry, plan.timeouts.per_try);
        exchange.timers.set_idle(Deadline::PerTryIdle, plan.timeouts.per_try_idle);
    }
    let longest = plan.timeouts.upstream_stream.or(plan.cluster.config().max_stream_duration);
    exchange.timers.set(Deadline::UpstreamStream, longest);
    if exchange.waited && !tunnel {
        outgoing.gather(exchange);
    }
    let mut pump = Pump::new();
    let mut sent = false;
    let mut sink_failed = None;
    let waited: Result<Result<Box<Reply>, Tried>, Stop> = poll_fn(|cx| {
        loop {
            if !sent && sink_failed.is_none() {
                match pump.poll(cx, |cx| outgoing.poll_changed(cx, exchange), &mut upstream.send) {
                    Poll::Ready(Ok(())) => {
                        sent = true;
                        exchange.info.times.upstream_last_tx = Some(exchange.elapsed());
                    }
                    Poll::Ready(Err(PumpError::Source(e))) => {
                        // On a connection that was there, what is written by now is on its way.
                        if was_there {
                            let _ = upstream.send.poll_flush(cx);
                        }
                        return Poll::Ready(Err(exchange.client_failed(e)));
                    }
                    // An answer may be there all the same (the upstream refused the body).
                    Poll::Ready(Err(PumpError::Sink(e))) => sink_failed = Some(e),
                    Poll::Pending => {}
                }
                if outgoing.ended && !exchange.body_done {
                    if tunnel && exchange.answer.is_h1() {
                        return Poll::Ready(Err(Stop::Gone(Gone::Closed)));
                    }
                    exchange.request_complete();
                    exchange.timers.set(Deadline::Global, plan.timeouts.global);
                    exchange.timers.set(Deadline::PerTry, plan.timeouts.per_try);
                    exchange.timers.set_idle(Deadline::PerTryIdle, plan.timeouts.per_try_idle);
                }
            }
            match upstream.response.poll_head(cx) {
                Poll::Ready(Ok(mut reply)) if reply.interim => {
                    exchange.info.upstream.header_bytes_received += reply.header_bytes;
                    // Others than these are not even seen (Envoy `HeaderUtility::isSpecial1xx`), nor are those after the first
                    // (`Filter::onUpstream1xxHeaders`).
                    if !matches!(reply.status, 100 | 102..=104) || std::mem::replace(&mut outgoing.answered, true) {
                        continue;
                    }
                    let told = Told::of(exchange, &reply.headers);
                    plan.counted.answer(exchange, &plan.cluster, reply.status, told);
                    if exchange.http.config.proxy_100_continue {
                        for of_this_hop in ["connection", "keep-alive", "proxy-connection", "te", "upgrade"] {
                            reply.headers.remove(of_this_hop);
                        }
                        tell_request_id(&exchange.http.config, &mut reply.headers, &exchange.request);
                        exchange.info.downstream_header_bytes_sent += header_bytes(&reply.headers, 4);
                        exchange.info.response_code = Some(reply.status);
                        exchange.http.stats.downstream_rq.inc(reply.status);
                        exchange.http.of_listener.downstream_rq.inc(reply.status);
                        exchange.answer.interim(reply.status, &reply.headers);
                    }
                }
                Poll::Ready(Ok(reply)) => return Poll::Ready(Ok(Ok(reply))),
                Poll::Ready(Err(failure)) => {
                    return Poll::Ready(Ok(Err(Tried::Failed { why: Why::Stream(failure), started: true })));
                }
                Poll::Pending => break,
            }
        }
        let watch_client = exchange.body_done && !tunnel;
        if let Poll::Ready(gone) = exchange.answer.poll_gone(cx, watch_client) {
            return Poll::Ready(Err(Stop::Gone(gone)));
        }
        match exchange.poll_deadline(cx) {
            Poll::Ready(
                deadline @ (Deadline::Global | Deadline::PerTry | Deadline::PerTryIdle | Deadline::UpstreamStream),
            ) => Poll::Ready(Ok(Err(Tried::PerTryTimeout(deadline)))),
            Poll::Ready(other) => Poll::Ready(Err(exchange.deadline(other))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    exchange.waited = true;
    match waited {
        Ok(Ok(reply)) => {
            exchange.info.times.upstream_first_rx = Some(exchange.elapsed());
            Ok(Tried::Answer(reply, upstream, pump, sent))
        }
        Ok(Err(tried)) => {
            upstream.count_wire(&mut exchange.info.upstream, stats);
            if let Tried::PerTryTimeout(deadline) = &tried {
                cancel(stats, &mut upstream);
                match deadline {
                    Deadline::PerTry => stats.upstream_rq_per_try_timeout.inc(),
                    Deadline::PerTryIdle => stats.upstream_rq_per_try_idle_timeout.inc(),
                    _ => {}
                }
            }
            Ok(tried)
        }
        Err(stop) => {
            upstream.count_wire(&mut exchange.info.upstream, stats);
            cancel(stats, &mut upstream);
            Err(stop)
        }
    }
}

/// CONNECT ends here: the upstream gets the tunnel's bytes.
async fn dial_tunnel(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    pool: &Rc<Pool>,
    connect: Connect,
) -> Result<Tried, Stop> {
    outgoing.paused = true;
    let dialled = {
        let mut dial = std::pin::pin!(pool.dial());
        let dialled = poll_fn(|cx| {
            // What is there by now is read: whether the request is over tells how it is answered.
            if let Poll::Ready(Some(Err(e))) = outgoing.poll_paused(cx) {
                return Poll::Ready(Err(exchange.client_failed(e)));
            }
            if outgoing.ended && exchange.hints.connect && exchange.answer.is_h1() {
                return Poll::Ready(Err(Stop::Gone(Gone::Closed)));
            }
            exchange.poll_with(cx, |cx| dial.as_mut().poll(cx).map(Ok))
        });
        dialled.await?
    };
    if outgoing.ended {
        exchange.request_complete();
    }
    let (io, facts, counted) = match dialled {
        Ok(dialled) => dialled,
        Err(AcquireError::Connect(e)) => return Ok(Tried::Failed { why: Why::Connect(e), started: false }),
        Err(AcquireError::Overflow) => return Ok(Tried::Failed { why: Why::Overflow, started: false }),
    };
    plan.cluster.stats.upstream_rq_total.inc();
    plan.counted.each(|stats| stats.upstream_rq_total.inc());
    exchange.tunnel = Some(counted);
    exchange.info.upstream.local = facts.local.clone();
    exchange.info.times.upstream_first_rx = Some(exchange.elapsed());
    let (upstream, reply) = Upstream::tunnel(io, facts);
    if let (Some(version), SendBody::H1 { conn, .. }) = (connect.proxy_protocol, &upstream.send) {
        let info = &exchange.http.info;
        let header = crate::proxy_protocol::header(version, info.remote.socket(), info.local.socket());
        conn.borrow_mut().out.write(|out| out.extend_from_slice(&header));
    }
    Ok(Tried::Answer(Box::new(reply), Box::new(upstream), Pump::new(), false))
}

enum Acquire {
    Done(Result<Acquired, AcquireError>),
    TimedOut,
}

/// Bytes of a body that a client may send before it has heard of a window (RFC 9113, 6.9.2).
const AT_ONCE: usize = 65_535;

/// Waits for a connection. What the client sends meanwhile may end the request.
async fn acquire(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    body: &mut RecvBody,
    work: impl Future<Output = Result<Acquired, AcquireError>>,
) -> Result<Acquire, Stop> {
    // Of HTTP/2, what came together with the head is there by now.
    let is_h2 = !exchange.answer.is_h1();
    if is_h2 {
        exchange.info.bytes_received += body.gather(AT_ONCE) as u64;
    }
    let is_whole = is_h2 && body.has_come();
    let mut work = std::pin::pin!(work);
    let done = poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Ok(Acquire::Done(done)));
        }
        if let Some(e) = body.broken() {
            return Poll::Ready(Err(exchange.client_failed(e)));
        }
        if let Poll::Ready(gone) = exchange.answer.poll_gone(cx, exchange.body_done) {
            return Poll::Ready(Err(Stop::Gone(gone)));
        }
        match exchange.poll_deadline(cx) {
            Poll::Ready(Deadline::Global) => Poll::Ready(Ok(Acquire::TimedOut)),
            Poll::Ready(other) => Poll::Ready(Err(exchange.deadline(other))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    // A host that refuses does so at once; other frames of HTTP/2 mostly come after that.
    let refused = matches!(&done, Ok(Acquire::Done(Err(AcquireError::Connect(e)))) if !e.timeout);
    // What the breaker refuses was not waited for.
    let overflowed = matches!(&done, Ok(Acquire::Done(Err(AcquireError::Overflow))));
    exchange.waited |= !overflowed && (!refused || exchange.answer.is_h1());
    if refused && is_whole {
        exchange.request_complete();
    }
    if !matches!(done, Ok(Acquire::Done(_))) {
        plan.cluster.stats.upstream_rq_cancelled.inc();
    }
    done
}

fn enable_trailers(plan: &Plan<'_>) -> bool {
    plan.cluster.config().http1.enable_trailers
}

/// Completes the head for this try.
fn prepare_head(exchange: &mut Exchange, plan: &Plan<'_>, host: &Host) {
    let attempts = exchange.info.upstream.attempts;
    let elapsed = if attempts > 1 { plan.began.elapsed() } else { std::time::Duration::ZERO };
    let request = &mut exchange.request;
    let tells_grpc = exchange.grpc && request.contains("grpc-timeout");
    if plan.matched.vhost.include_request_attempt_count && attempts > 1 {
        request.set_number("x-envoy-attempt-count", attempts.into());
    }
    plan.timeouts.tell(elapsed, request, !plan.suppress_envoy_headers, tells_grpc);
    if let Some(HostRewrite::Auto) = &plan.forward.host_rewrite
        && !host.hostname.is_empty()
    {
        proxy_core::route::set_authority(
            request,
            host.hostname.as_bytes(),
            plan.forward.append_x_forwarded_host,
            !plan.suppress_envoy_headers,
        );
    }
    let tls = plan.cluster.config().transport(host).0.tls();
    if exchange.http.config.scheme_of_upstream {
        request.set(":scheme", if tls.is_some() { &b"https"[..] } else { b"http" });
    }
    let mutual = tls.is_some_and(|t| !t.common.certificates.is_empty());
    exchange.peer.announce(request, &exchange.http, plan.cluster.config(), mutual);
}

/// How connections for this request are made.
fn variant(exchange: &Exchange, plan: &Plan<'_>, host: &Host) -> Variant {
    let config = plan.cluster.config();
    let protocol = Protocol::of(&config.protocol, exchange.info.protocol);
    let names = ServerNames::of(config, &exchange.request);
    let alpn = plan.alpn.and_then(|alpn| {
        let protocol = match protocol {
            Protocol::Http2 => HttpProtocol::Http2,
            _ if exchange.info.protocol == Some(HttpProtocol::Http10) => HttpProtocol::Http10,
            _ => HttpProtocol::Http11,
        };
        alpn.protocols(protocol).map(Arc::from)
    });
    let announced = Announced::to(&plan.cluster, host, &exchange.http.info);
    let source = Source::of(&exchange.http.listener, &exchange.http.info);
    let owner = config.pool_per_downstream.then_some(exchange.http.info.id);
    Variant { protocol, names, alpn, announced, source, priority: plan.forward.priority, owner }
}
