//! The router: from a matched route to an answer, over as many tries as the policy allows.

use super::exchange::{Exchange, Outcome, Stop};
use super::local_reply::LocalReply;
use super::timers::Deadline;
use crate::stats::ClusterStats;
use crate::stream::{BodyError, Frame, Pump, PumpError, RecvBody, SendBody};
use crate::upstream::{
    AcquireError, Acquired, ConnectError, Failure, Pool, Protocol, Reply, Upstream, Variant, WorkerCluster,
};
use bytes::Bytes;
use proxy_core::circuit::Resource;
use proxy_core::cluster::UpstreamProtocol;
use proxy_core::filters::HttpFilter;
use proxy_core::outlier::Outcome as Health;
use proxy_core::retry::{ResetReason, RetryVerdict};
use proxy_core::route::{Action, Forward, HashContext, HostRewrite, Matched, Timeouts};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{FormatContext, Headers, Host, PickContext, ResponseFlags, RetryState};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

/// Carries out the route's action.
pub(super) async fn route(exchange: &mut Exchange, body: &mut RecvBody) -> Result<Outcome, Stop> {
    let stats = exchange.http.stats.clone();
    if let Some(location) = exchange.redirect_to_tls.take() {
        stats.rq_redirect.inc();
        let mut reply = LocalReply::new(301, "", "direct_response");
        reply.direct = true;
        reply.headers.push(("location".into(), location.into_bytes()));
        return Err(reply.into());
    }
    let Some(matched) = exchange.matched.clone() else {
        stats.no_route.inc();
        return Err(LocalReply::new(404, "", "route_not_found").flagged(ResponseFlags::NO_ROUTE).into());
    };
    match &matched.route.action {
        Action::Forward(forward) => {
            exchange.check_upgrade()?;
            forward_request(exchange, body, &matched, forward).await
        }
        Action::Redirect(redirect) => {
            stats.rq_redirect.inc();
            let (status, location) = redirect.location(&matched.route.matcher, &exchange.request);
            let mut reply = LocalReply::new(status, "", "direct_response");
            reply.headers.push(("location".into(), location.into_bytes()));
            Err(direct(exchange, &matched, reply))
        }
        Action::Direct(answer) => {
            stats.rq_direct_response.inc();
            let mut reply = LocalReply::new(answer.status, "", "direct_response");
            reply.raw_body = Some(answer.body.clone());
            Err(direct(exchange, &matched, reply))
        }
        Action::NonForwarding => {
            stats.no_route.inc();
            Err(LocalReply::new(404, "", "route_not_found").flagged(ResponseFlags::NO_ROUTE).into())
        }
    }
}

/// An answer that the route gives by itself, with the route's header changes.
fn direct(exchange: &Exchange, matched: &Matched, mut reply: LocalReply) -> Stop {
    reply.direct = true;
    let mut headers = Headers::new();
    for (name, value) in &reply.headers {
        headers.push(name.as_bytes(), value);
    }
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
    matched.finalize_response(&mut headers, &cx);
    reply.headers =
        headers.iter_regular().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), v.to_vec())).collect();
    reply.into()
}

/// The request body over several tries: what was sent is kept while it may be needed again.
struct Outgoing<'a> {
    rest: &'a mut RecvBody,
    kept: Vec<Frame>,
    at: usize,
    size: usize,
    limit: usize,
    keeping: bool,
    ended: bool,
    /// Body bytes of the client.
    received: u64,
    /// HTTP/1 trailers are dropped unless they are enabled.
    drop_trailers: bool,
}

impl Outgoing<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if let Some(frame) = self.kept.get(self.at) {
            self.at += 1;
            return Poll::Ready(Some(Ok(frame.clone())));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        match self.rest.poll_frame(cx) {
            Poll::Ready(Some(Ok(Frame::Trailers(_)))) if self.drop_trailers => self.poll(cx),
            Poll::Ready(Some(Ok(frame))) => {
                if let Frame::Data(data) = &frame {
                    self.received += data.len() as u64;
                    self.size += data.len();
                }
                if self.keeping && self.size > self.limit {
                    self.keeping = false;
                    self.kept = Vec::new();
                    self.at = 0;
                }
                if self.keeping {
                    self.kept.push(frame.clone());
                    self.at += 1;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.ended = true;
                Poll::Ready(None)
            }
            other => other,
        }
    }

    fn rewind(&mut self) {
        self.at = 0;
    }

    /// Whether another try can send the same body.
    fn repeatable(&self) -> bool {
        self.keeping || self.received == 0
    }

    fn is_empty(&self) -> bool {
        self.ended && self.kept.is_empty()
    }
}

/// How one try ended before there was an answer to pass on.
enum Tried {
    Answer(Box<Reply>, Box<Upstream>, Pump, bool),
    Failed { why: Why, started: bool },
    PerTryTimeout(Deadline),
}

/// What went wrong, as Envoy names it.
#[derive(Clone, Debug)]
enum Why {
    Connect(ConnectError),
    Overflow,
    Stream(Failure),
}

impl Why {
    fn text(&self) -> &'static str {
        match self {
            Why::Connect(e) if e.timeout => "connection timeout",
            Why::Connect(_) => "remote connection failure",
            Why::Overflow => "overflow",
            Why::Stream(Failure::Terminated) => "connection termination",
            Why::Stream(Failure::Reset) => "remote reset",
            Why::Stream(Failure::Refused) => "remote refused stream reset",
            Why::Stream(Failure::Protocol(_)) => "protocol error",
        }
    }

    fn flags(&self) -> ResponseFlags {
        match self {
            Why::Connect(_) => ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
            Why::Overflow => ResponseFlags::UPSTREAM_OVERFLOW,
            Why::Stream(Failure::Terminated) => ResponseFlags::UPSTREAM_TERMINATION,
            Why::Stream(Failure::Reset | Failure::Refused) => ResponseFlags::UPSTREAM_RESET,
            Why::Stream(Failure::Protocol(_)) => ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
        }
    }

    fn reason(&self) -> ResetReason {
        match self {
            Why::Connect(e) if e.timeout => ResetReason::ConnectTimeout,
            Why::Connect(_) => ResetReason::ConnectFailure,
            Why::Overflow => ResetReason::Overflow,
            Why::Stream(Failure::Terminated) => ResetReason::ConnectionTermination,
            Why::Stream(Failure::Reset) => ResetReason::RemoteReset,
            Why::Stream(Failure::Refused) => ResetReason::RemoteRefused,
            Why::Stream(Failure::Protocol(_)) => ResetReason::ProtocolError,
        }
    }

    /// `upstream_reset_before_response_started{connection_termination}`
    fn details(&self, phase: &str) -> String {
        let text = self.text().replace(' ', "_");
        match self {
            Why::Connect(e) if !e.reason.is_empty() => {
                format!("upstream_reset_{phase}_response_started{{{text}|{}}}", e.reason.replace(' ', "_"))
            }
            _ => format!("upstream_reset_{phase}_response_started{{{text}}}"),
        }
    }

    fn reply(&self, retried: bool) -> LocalReply {
        let retried = if retried { "retried and the latest " } else { "" };
        let body = format!(
            "upstream connect error or disconnect/reset before headers. {retried}reset reason: {}",
            self.text()
        );
        let status = if matches!(self, Why::Stream(Failure::Protocol(_))) { 502 } else { 503 };
        let mut reply = LocalReply::new(status, body, self.details("before")).flagged(self.flags());
        if matches!(self, Why::Overflow) {
            reply.headers.push(("x-envoy-overloaded".into(), b"true".to_vec()));
        }
        reply
    }
}

/// What stays the same over the tries of a request.
struct Plan<'a> {
    matched: &'a Matched,
    forward: &'a Forward,
    cluster: Rc<WorkerCluster>,
    timeouts: Timeouts,
    suppress_envoy_headers: bool,
    hash: Option<u64>,
    alpn: Option<&'a proxy_core::filters::AlpnOverride>,
    /// When the router got the request.
    began: Instant,
}

async fn forward_request(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    matched: &Matched,
    forward: &Forward,
) -> Result<Outcome, Stop> {
    let http = exchange.http.clone();
    let worker = http.worker.clone();
    let name = matched.cluster(&exchange.request);
    exchange.info.upstream.cluster = None;
    let Some(cluster) = name.as_deref().and_then(|n| worker.cluster(n)) else {
        http.stats.no_cluster.inc();
        let reply = LocalReply::new(forward.cluster_not_found_status, "", "cluster_not_found")
            .flagged(ResponseFlags::NO_CLUSTER);
        return Err(reply.into());
    };
    exchange.info.upstream.cluster = Some(cluster.config().name.clone());
    exchange.info.upstream.cluster_stat_name = Some(cluster.config().stat_name.clone());
    http.stats.rq_total.inc();
    let (router, alpn) = http.config.filters.iter().fold((None, None), |(router, alpn), entry| match &entry.filter {
        HttpFilter::Router(config) => (Some(config), alpn),
        HttpFilter::IstioAlpn(config) => (router, Some(&**config)),
        _ => (router, alpn),
    });
    let suppress = router.is_some_and(|r| r.suppress_envoy_headers);
    let respect = router.is_some_and(|r| r.respect_expected_rq_timeout);
    let policy = matched.retry_policy();
    let timeouts = forward.timeouts(policy.map(Arc::as_ref), &mut exchange.request, respect, !suppress);
    let mut retries = RetryState::new(policy, &mut exchange.request);
    let (hash, cookie) = forward.hash(&HashContext {
        headers: &exchange.request,
        remote: &exchange.info.remote,
        local: &http.info.local,
        filter_state: &exchange.info.filter_state,
    });
    if let Some(cookie) = cookie {
        exchange.add_to_response.push(("set-cookie".into(), cookie.0.into_bytes()));
    }
    {
        // Formatters see the request as it was; the copy is only made when there are some.
        let before = has_request_ops(matched).then(|| exchange.request.clone());
        let cx = FormatContext::new(&exchange.info, before.as_ref(), None);
        matched.finalize_request(&mut exchange.request, &cx, !suppress);
    }
    if exchange.request.get(":scheme").is_none() {
        exchange.request.set(":scheme", b"http");
    }
    let mirrors = super::mirror::chosen(exchange, matched);
    let limit = matched.body_buffer_limit().unwrap_or(u64::from(http.listener.per_connection_buffer_limit));
    let ended = body.is_empty();
    let tunnel = exchange.hints.upgrade || exchange.hints.connect;
    let mut outgoing = Outgoing {
        rest: body,
        kept: Vec::new(),
        at: 0,
        size: 0,
        limit: limit as usize,
        keeping: (retries.is_some() || !mirrors.is_empty()) && !tunnel,
        ended,
        received: 0,
        drop_trailers: exchange.answer.is_h1() && !http.config.http1.enable_trailers,
    };
    let plan = Plan {
        matched,
        forward,
        cluster,
        timeouts,
        suppress_envoy_headers: suppress,
        hash,
        alpn,
        began: Instant::now(),
    };
    if exchange.body_done {
        exchange.timers.set(Deadline::Global, plan.timeouts.global);
    }
    let mut result = tries(exchange, &plan, &mut outgoing, retries.as_mut()).await;
    if let Err(Stop::Reply(reply)) = &mut result {
        reply.finalize = true;
    }
    exchange.info.bytes_received = exchange.info.bytes_received.max(outgoing.received);
    if !mirrors.is_empty() {
        if outgoing.keeping && outgoing.ended {
            super::mirror::send(exchange, mirrors, std::mem::take(&mut outgoing.kept));
        } else {
            plan.cluster.stats.retry_or_shadow_abandoned.inc();
        }
    }
    if exchange.hints.upgrade || exchange.hints.connect {
        http.stats.downstream_cx_upgrades_active.dec();
    }
    result
}

async fn tries(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    mut retries: Option<&mut RetryState>,
) -> Result<Outcome, Stop> {
    let worker = exchange.http.worker.clone();
    let stats = plan.cluster.stats.clone();
    let mut previous: Vec<Arc<Host>> = Vec::new();
    let mut retry_permit = None;
    loop {
        let host = pick(exchange, plan, &previous);
        let Some(host) = host else {
            stats.upstream_cx_none_healthy.inc();
            if plan.cluster.entry.is_original_dst() {
                stats.original_dst_host_invalid.inc();
            }
            exchange.info.upstream.host = None;
            return Err(LocalReply::new(503, "no healthy upstream", "no_healthy_upstream")
                .flagged(ResponseFlags::NO_HEALTHY_UPSTREAM)
                .into());
        };
        exchange.info.upstream.host = Some(host.clone());
        exchange.info.upstream.attempts += 1;
        let tried = one_try(exchange, plan, outgoing, &host).await?;
        let mut failure = None;
        let verdict = match &tried {
            Tried::Answer(reply, ..) => {
                plan.cluster.on_result(&host, Some(Health::Status(outlier_status(reply))), &worker);
                match &mut retries {
                    Some(r) => r.on_response(&reply.headers, &mut worker.random.borrow_mut(), SystemTime::now()),
                    None => RetryVerdict::No,
                }
            }
            Tried::Failed { why, started } => {
                let result = match why {
                    Why::Connect(e) if e.timeout => Some(Health::ConnectTimeout),
                    Why::Connect(_) => Some(Health::ConnectFailed),
                    Why::Overflow => None,
                    Why::Stream(_) => Some(Health::Reset),
                };
                plan.cluster.on_result(&host, result, &worker);
                match why {
                    Why::Stream(Failure::Protocol(_)) => stats.upstream_cx_protocol_error.inc(),
                    Why::Stream(Failure::Reset | Failure::Refused) => stats.upstream_rq_rx_reset.inc(),
                    _ => {}
                }
                failure = Some(why.clone());
                match &mut retries {
                    Some(r) => r.on_reset(why.reason(), *started, &mut worker.random.borrow_mut()),
                    None => RetryVerdict::No,
                }
            }
            Tried::PerTryTimeout(Deadline::Global | Deadline::UpstreamStream) => {
                plan.cluster.on_result(&host, Some(Health::Timeout), &worker);
                RetryVerdict::No
            }
            Tried::PerTryTimeout(_) => {
                plan.cluster.on_result(&host, Some(Health::Timeout), &worker);
                match &mut retries {
                    Some(r) => r.on_reset(ResetReason::PerTryTimeout, true, &mut worker.random.borrow_mut()),
                    None => RetryVerdict::No,
                }
            }
        };
        drop(retry_permit.take());
        let retried = exchange.info.upstream.attempts > 1;
        match verdict {
            RetryVerdict::Retry { after } if outgoing.repeatable() => {
                let breaker = plan.cluster.entry.breakers.get(plan.forward.priority);
                match breaker.acquire(Resource::Retries) {
                    Some(permit) => {
                        if let Tried::Answer(reply, mut upstream, ..) = tried {
                            discard(&reply, &mut upstream);
                        }
                        stats.upstream_rq_retry.inc();
                        stats.upstream_rq_retry_backoff_exponential.inc();
                        retry_permit = Some(permit);
                        outgoing.rewind();
                        previous.push(host);
                        exchange.timers.clear(Deadline::PerTry);
                        exchange.timers.clear(Deadline::PerTryIdle);
                        match pause(exchange, plan, after).await? {
                            Paused::Go => {}
                            Paused::GlobalTimeout => return Err(timed_out(exchange, plan, Deadline::Global)),
                        }
                        continue;
                    }
                    None => {
                        stats.upstream_rq_retry_overflow.inc();
                        exchange.info.flags.insert(ResponseFlags::UPSTREAM_OVERFLOW);
                    }
                }
            }
            RetryVerdict::Retry { .. } => stats.retry_or_shadow_abandoned.inc(),
            RetryVerdict::LimitExceeded => {
                stats.upstream_rq_retry_limit_exceeded.inc();
                exchange.info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
            }
            RetryVerdict::No => {}
        }
        return match tried {
            Tried::Answer(reply, upstream, pump, sent) => {
                if retried && reply.status < 500 && verdict == RetryVerdict::No {
                    stats.upstream_rq_retry_success.inc();
                }
                pass_on(exchange, plan, outgoing, *reply, *upstream, pump, sent).await
            }
            Tried::Failed { .. } => {
                let why = failure.unwrap_or(Why::Stream(Failure::Terminated));
                if let Why::Connect(e) = &why
                    && !e.reason.is_empty()
                {
                    exchange.info.upstream.transport_failure = Some(e.reason.as_str().into());
                }
                let reply = why.reply(retried);
                stats.upstream_rq.inc(reply.status);
                Err(reply.into())
            }
            Tried::PerTryTimeout(deadline) => Err(timed_out(exchange, plan, deadline)),
        };
    }
}

/// gRPC failures count as their HTTP status (Envoy `Filter::onUpstreamHeaders`).
fn outlier_status(reply: &Reply) -> u16 {
    let grpc = reply.headers.get_str("grpc-status").and_then(|s| s.parse::<u32>().ok());
    match grpc {
        Some(14) => 503,
        Some(2 | 13 | 15) => 500,
        Some(4) => 504,
        _ => reply.status,
    }
}

enum Paused {
    Go,
    GlobalTimeout,
}

/// The back-off before a retry, under the watch of the global timeout.
async fn pause(exchange: &mut Exchange, _plan: &Plan<'_>, after: std::time::Duration) -> Result<Paused, Stop> {
    let sleep = tokio::time::sleep(after);
    tokio::pin!(sleep);
    poll_fn(|cx| {
        if sleep.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(Paused::Go));
        }
        if let Poll::Ready(reset) = exchange.answer.poll_gone(cx, exchange.body_done) {
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        match exchange.timers.poll(cx) {
            Poll::Ready(Deadline::Global) => Poll::Ready(Ok(Paused::GlobalTimeout)),
            Poll::Ready(other) => Poll::Ready(Err(exchange.deadline(other))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Whether any level changes request headers.
fn has_request_ops(matched: &Matched) -> bool {
    matched.weighted.is_some()
        || !matched.route.request_ops.is_empty()
        || !matched.vhost.request_ops.is_empty()
        || !matched.table.request_ops.is_empty()
}

/// The answer of a try that is repeated: its connection is kept when nothing more comes.
fn discard(reply: &Reply, upstream: &mut Upstream) {
    if reply.body.is_empty() {
        upstream.response.finish();
    } else {
        upstream.send.reset(h2::Reason::CANCEL);
    }
}

fn pick(exchange: &mut Exchange, plan: &Plan<'_>, previous: &[Arc<Host>]) -> Option<Arc<Host>> {
    let worker = exchange.http.worker.clone();
    let context = PickContext {
        hash: plan.hash,
        metadata_match: plan.matched.metadata_match(),
        previous,
        retry: plan.matched.retry_policy().map(Arc::as_ref),
        override_host: None,
        original_dst: exchange.http.original_dst,
        headers: Some(&exchange.request),
        now: Instant::now(),
    };
    plan.cluster.pick(&context, &mut worker.random.borrow_mut())
}

/// How connections for this request are made.
fn variant(exchange: &Exchange, plan: &Plan<'_>) -> Variant {
    let config = plan.cluster.config();
    let protocol = match &config.protocol {
        UpstreamProtocol::Http1 => Protocol::Http1,
        UpstreamProtocol::Http2 => Protocol::Http2,
        UpstreamProtocol::UseDownstream => match exchange.info.protocol {
            Some(HttpProtocol::Http2) => Protocol::Http2,
            _ => Protocol::Http1,
        },
        UpstreamProtocol::Auto => Protocol::Auto,
    };
    let server_name = config.auto_sni.then(|| exchange.request.authority()).flatten().map(|authority| {
        let host = authority.rsplit_once(':').filter(|(_, p)| p.bytes().all(|b| b.is_ascii_digit()));
        host.map_or(authority, |(host, _)| host).into()
    });
    let alpn = plan.alpn.and_then(|alpn| {
        let protocol = match protocol {
            Protocol::Http2 => HttpProtocol::Http2,
            _ if exchange.info.protocol == Some(HttpProtocol::Http10) => HttpProtocol::Http10,
            _ => HttpProtocol::Http11,
        };
        alpn.protocols(protocol).map(Arc::from)
    });
    Variant { protocol, server_name, alpn }
}

/// Connects, sends the request and waits for a head.
async fn one_try(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    host: &Arc<Host>,
) -> Result<Tried, Stop> {
    let worker = exchange.http.worker.clone();
    let stats = plan.cluster.stats.clone();
    let pool = plan.cluster.pool(&worker, host, &variant(exchange, plan));
    let breaker = plan.cluster.entry.breakers.get(plan.forward.priority);
    if plan.forward.connect.is_some() && exchange.hints.connect {
        return dial_tunnel(exchange, plan, &pool).await;
    }
    let acquired = match acquire(exchange, plan, pool.acquire(plan.forward.priority)).await? {
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
    let Some(_permit) = breaker.acquire(Resource::Requests) else {
        return Ok(Tried::Failed { why: Why::Overflow, started: false });
    };
    let _active = Active::new(plan.cluster.clone(), host.clone());
    stats.upstream_rq_total.inc();
    prepare_head(exchange, plan, host);
    let end = outgoing.is_empty();
    let tunnel = exchange.hints.upgrade || exchange.hints.connect;
    let started = Upstream::start(acquired, &mut exchange.request, end && !tunnel, tunnel, enable_trailers(plan)).await;
    let mut upstream = match started {
        Ok(upstream) => upstream,
        Err(failure) => return Ok(Tried::Failed { why: Why::Stream(failure), started: false }),
    };
    let info = &mut exchange.info.upstream;
    info.local = upstream.facts.local.clone();
    info.tls = upstream.facts.tls.clone();
    info.connection_id = Some(upstream.facts.id);
    info.protocol = Some(upstream.protocol);
    info.header_bytes_sent = exchange.request.byte_size() as u64;
    exchange.info.times.upstream_first_tx = Some(exchange.began.elapsed());
    if exchange.body_done {
        exchange.timers.set(Deadline::PerTry, plan.timeouts.per_try);
        exchange.timers.set_idle(Deadline::PerTryIdle, plan.timeouts.per_try_idle);
    }
    exchange.timers.set(Deadline::UpstreamStream, plan.cluster.config().max_stream_duration);
    let mut pump = Pump::new();
    let mut sent = false;
    let mut sink_failed = None;
    let waited: Result<Result<Reply, Tried>, Stop> = poll_fn(|cx| {
        loop {
            if !sent && sink_failed.is_none() {
                match pump.poll(cx, |cx| outgoing.poll(cx), &mut upstream.send) {
                    Poll::Ready(Ok(())) => {
                        sent = true;
                        exchange.info.times.upstream_last_tx = Some(exchange.began.elapsed());
                    }
                    Poll::Ready(Err(PumpError::Source(e))) => return Poll::Ready(Err(client_failed(exchange, e))),
                    // An answer may be there all the same (the upstream refused the body).
                    Poll::Ready(Err(PumpError::Sink(e))) => sink_failed = Some(e),
                    Poll::Pending => {}
                }
                if outgoing.ended && !exchange.body_done {
                    exchange.request_complete();
                    exchange.timers.set(Deadline::Global, plan.timeouts.global);
                    exchange.timers.set(Deadline::PerTry, plan.timeouts.per_try);
                    exchange.timers.set_idle(Deadline::PerTryIdle, plan.timeouts.per_try_idle);
                }
            }
            match upstream.response.poll_head(cx) {
                Poll::Ready(Ok(reply)) if reply.interim => {
                    if reply.status == 100 && exchange.http.config.proxy_100_continue {
                        exchange.answer.interim(100, &reply.headers);
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
        if let Poll::Ready(reset) = exchange.answer.poll_gone(cx, watch_client) {
            stats.upstream_rq_cancelled.inc();
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        match exchange.timers.poll(cx) {
            Poll::Ready(
                deadline @ (Deadline::Global | Deadline::PerTry | Deadline::PerTryIdle | Deadline::UpstreamStream),
            ) => Poll::Ready(Ok(Err(Tried::PerTryTimeout(deadline)))),
            Poll::Ready(other) => Poll::Ready(Err(exchange.deadline(other))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    match waited {
        Ok(Ok(reply)) => {
            exchange.info.times.upstream_first_rx = Some(exchange.began.elapsed());
            Ok(Tried::Answer(Box::new(reply), Box::new(upstream), pump, sent))
        }
        Ok(Err(tried)) => {
            if let Tried::PerTryTimeout(deadline) = &tried {
                cancel(&stats, &mut upstream);
                if *deadline == Deadline::PerTry {
                    stats.upstream_rq_per_try_timeout.inc();
                }
            }
            Ok(tried)
        }
        Err(stop) => {
            cancel(&stats, &mut upstream);
            Err(stop)
        }
    }
}

/// CONNECT ends here: the upstream gets the tunnel's bytes.
async fn dial_tunnel(exchange: &mut Exchange, plan: &Plan<'_>, pool: &Rc<Pool>) -> Result<Tried, Stop> {
    let dialled = exchange.wait(pool.dial(plan.forward.priority)).await?;
    let (io, facts, counted) = match dialled {
        Ok(dialled) => dialled,
        Err(AcquireError::Connect(e)) => return Ok(Tried::Failed { why: Why::Connect(e), started: false }),
        Err(AcquireError::Overflow) => return Ok(Tried::Failed { why: Why::Overflow, started: false }),
    };
    plan.cluster.stats.upstream_rq_total.inc();
    exchange.tunnel = Some(counted);
    exchange.info.upstream.local = facts.local.clone();
    let (upstream, reply) = Upstream::tunnel(io, facts);
    Ok(Tried::Answer(Box::new(reply), Box::new(upstream), Pump::new(), false))
}

enum Acquire {
    Done(Result<Acquired, AcquireError>),
    TimedOut,
}

async fn acquire(
    exchange: &mut Exchange,
    _plan: &Plan<'_>,
    work: impl Future<Output = Result<Acquired, AcquireError>>,
) -> Result<Acquire, Stop> {
    let mut work = std::pin::pin!(work);
    poll_fn(|cx| {
        if let Poll::Ready(done) = work.as_mut().poll(cx) {
            return Poll::Ready(Ok(Acquire::Done(done)));
        }
        if let Poll::Ready(reset) = exchange.answer.poll_gone(cx, exchange.body_done) {
            return Poll::Ready(Err(Stop::Gone(reset)));
        }
        match exchange.timers.poll(cx) {
            Poll::Ready(Deadline::Global) => Poll::Ready(Ok(Acquire::TimedOut)),
            Poll::Ready(other) => Poll::Ready(Err(exchange.deadline(other))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// The client's side of a request broke.
fn client_failed(exchange: &mut Exchange, e: BodyError) -> Stop {
    match e {
        BodyError::Protocol(detail) => {
            exchange.http.stats.downstream_cx_protocol_error.inc();
            let mut reply =
                LocalReply::new(400, "Bad Request", detail).flagged(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR);
            reply.close = true;
            reply.into()
        }
        BodyError::Reset(_) => Stop::Gone(true),
        BodyError::Closed => Stop::Gone(false),
    }
}

fn enable_trailers(plan: &Plan<'_>) -> bool {
    plan.cluster.config().http1.enable_trailers
}

/// Completes the head for this try.
fn prepare_head(exchange: &mut Exchange, plan: &Plan<'_>, host: &Host) {
    let attempts = exchange.info.upstream.attempts;
    let elapsed = plan.began.elapsed();
    let request = &mut exchange.request;
    let tells_grpc = exchange.grpc && request.contains("grpc-timeout");
    if plan.matched.vhost.include_request_attempt_count {
        request.set("x-envoy-attempt-count", attempts.to_string().as_bytes());
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
    exchange.peer.announce(request, &exchange.http, plan.cluster.config());
}

/// What a passed deadline means once the router has the request.
fn timed_out(exchange: &mut Exchange, plan: &Plan<'_>, deadline: Deadline) -> Stop {
    let stats = &plan.cluster.stats;
    let details = match deadline {
        Deadline::PerTry => "upstream_per_try_timeout",
        Deadline::PerTryIdle => {
            stats.upstream_rq_per_try_idle_timeout.inc();
            "upstream_per_try_idle_timeout"
        }
        Deadline::UpstreamStream => {
            stats.upstream_rq_max_duration_reached.inc();
            "upstream_max_stream_duration_reached"
        }
        _ => {
            stats.upstream_rq_timeout.inc();
            "response_timeout"
        }
    };
    let (body, flag) = match deadline {
        Deadline::UpstreamStream => {
            ("upstream max stream duration reached", ResponseFlags::UPSTREAM_MAX_STREAM_DURATION)
        }
        _ => ("upstream request timeout", ResponseFlags::UPSTREAM_TIMEOUT),
    };
    stats.upstream_rq.inc(504);
    let _ = exchange;
    LocalReply::new(504, body, details).flagged(flag).into()
}

/// Passes an answer on to the client, while the rest of the request still goes up.
async fn pass_on(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    reply: Reply,
    mut upstream: Upstream,
    mut up_pump: Pump,
    mut sent: bool,
) -> Result<Outcome, Stop> {
    let stats = plan.cluster.stats.clone();
    let Reply { status, mut headers, mut body, .. } = reply;
    stats.upstream_rq.inc(status);
    exchange.info.upstream.header_bytes_received = headers.byte_size() as u64;
    let tunnel = (exchange.hints.upgrade && status == 101) || (exchange.hints.connect && (200..300).contains(&status));
    let service_time =
        exchange.info.times.upstream_first_tx.map_or(exchange.began.elapsed(), |t| exchange.began.elapsed() - t);
    if !tunnel && !exchange.hints.connect {
        headers.remove("connection");
        headers.remove("upgrade");
    }
    if !plan.suppress_envoy_headers && !exchange.hints.upgrade && !exchange.hints.connect {
        headers.set("x-envoy-upstream-service-time", service_time.as_millis().to_string().as_bytes());
    }
    if plan.matched.vhost.include_attempt_count_in_response {
        headers.set("x-envoy-attempt-count", exchange.info.upstream.attempts.to_string().as_bytes());
    }
    let http = exchange.http.clone();
    exchange.peer.learn_from_answer(&mut headers, &http);
    exchange.info.response_code = Some(status);
    exchange.info.response_code_details = Some("via_upstream".into());
    {
        let response = headers.clone();
        let cx = FormatContext::new(&exchange.info, Some(&exchange.request), Some(&response));
        plan.matched.finalize_response(&mut headers, &cx);
    }
    exchange.info.response_code_details = Some("via_upstream".into());
    if exchange.info.upstream.protocol == Some(HttpProtocol::Http2) || exchange.grpc {
        // Trailers-only answers carry the status in the head.
        exchange.note_grpc(&headers);
    }
    let end = body.is_empty() && !tunnel;
    if !exchange.body_done && !tunnel && exchange.answer.is_h1() {
        exchange.answer.close_after();
    }
    exchange.timers.clear(Deadline::PerTry);
    let mut sink = exchange.send_head(headers, end, tunnel);
    let mut down_pump = Pump::new();
    let began = exchange.began;
    let drop_trailers = upstream.protocol != HttpProtocol::Http2 && !plan.cluster.config().http1.enable_trailers;
    let mut trailers = None;
    let mut upstream_failed = None;
    let ended: Result<(), Broken> = poll_fn(|cx| {
        let mut moved = false;
        if !sent {
            let before = up_pump.bytes;
            match up_pump.poll(cx, |cx| outgoing.poll(cx), &mut upstream.send) {
                Poll::Ready(Ok(())) if tunnel => return Poll::Ready(Err(Broken::Client(false))),
                Poll::Ready(Ok(())) => {
                    sent = true;
                    exchange.request_complete();
                }
                Poll::Ready(Err(PumpError::Source(_))) => return Poll::Ready(Err(Broken::Client(false))),
                // The answer decides.
                Poll::Ready(Err(PumpError::Sink(_))) => sent = true,
                Poll::Pending => {}
            }
            moved |= before != up_pump.bytes;
        }
        let before = down_pump.bytes;
        let polled = down_pump.poll(
            cx,
            |cx| {
                let frame = body.poll_frame(cx);
                match frame {
                    Poll::Ready(Some(Ok(Frame::Trailers(_)))) if drop_trailers => body.poll_frame(cx),
                    Poll::Ready(Some(Ok(Frame::Trailers(t)))) => {
                        trailers = Some(t.clone());
                        Poll::Ready(Some(Ok(Frame::Trailers(t))))
                    }
                    other => other,
                }
            },
            &mut sink,
        );
        moved |= before != down_pump.bytes;
        match polled {
            Poll::Ready(Ok(())) => {
                if !tunnel || sent {
                    return Poll::Ready(Ok(()));
                }
                // The upstream closed its side of a tunnel: so do we.
                return Poll::Ready(Ok(()));
            }
            Poll::Ready(Err(PumpError::Source(e))) => {
                upstream_failed = Some(e);
                return Poll::Ready(Err(Broken::Upstream));
            }
            Poll::Ready(Err(PumpError::Sink(e))) => {
                return Poll::Ready(Err(Broken::Client(matches!(e, BodyError::Reset(_)))));
            }
            Poll::Pending => {}
        }
        if moved {
            exchange.timers.touch(Deadline::Idle);
            exchange.timers.touch(Deadline::PerTryIdle);
        }
        if let Poll::Ready(e) = sink.poll_reset(cx) {
            return Poll::Ready(Err(Broken::Client(matches!(e, BodyError::Reset(_)))));
        }
        if exchange.answer.is_h1()
            && exchange.body_done
            && !tunnel
            && let Poll::Ready(reset) = exchange.answer.poll_gone(cx, true)
        {
            return Poll::Ready(Err(Broken::Client(reset)));
        }
        match exchange.timers.poll(cx) {
            Poll::Ready(deadline) => Poll::Ready(Err(Broken::Deadline(deadline))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    exchange.info.bytes_sent = down_pump.bytes;
    exchange.info.times.upstream_last_rx = Some(began.elapsed());
    exchange.info.times.downstream_last_tx = Some(began.elapsed());
    stats.upstream_rq_time.record(began.elapsed().as_millis() as u64);
    stats.upstream_cx_tx_bytes_total.add(up_pump.bytes + exchange.info.upstream.header_bytes_sent);
    stats.upstream_cx_rx_bytes_total.add(down_pump.bytes + exchange.info.upstream.header_bytes_received);
    if let Some(trailers) = trailers {
        exchange.note_grpc(&trailers);
        exchange.trailers = Some(trailers);
    }
    match ended {
        Ok(()) => {
            if sent {
                upstream.response.finish();
            } else {
                upstream.send.reset(h2::Reason::NO_ERROR);
                exchange.http.stats.downstream_rq_response_before_rq_complete.inc();
            }
            Ok(if tunnel { Outcome::Tunnel } else { Outcome::Done })
        }
        Err(Broken::Upstream) => {
            let failure = match upstream_failed {
                // Envoy's HTTP/1 codec calls an incomplete message a protocol error.
                Some(BodyError::Closed) if upstream.protocol != HttpProtocol::Http2 => Failure::Protocol("incomplete"),
                Some(e) => e.into(),
                None => Failure::Terminated,
            };
            if matches!(failure, Failure::Protocol(_)) {
                stats.upstream_cx_protocol_error.inc();
            } else {
                stats.upstream_rq_rx_reset.inc();
            }
            let why = Why::Stream(failure);
            exchange.info.flags.insert(why.flags());
            exchange.info.response_code_details = Some(why.details("after").into());
            exchange.http.stats.rq_reset_after_downstream_response_started.inc();
            exchange.http.stats.downstream_rq_tx_reset.inc();
            abort(exchange, sink, h2::Reason::INTERNAL_ERROR).await;
            Ok(if tunnel { Outcome::Tunnel } else { Outcome::Aborted })
        }
        Err(Broken::Client(reset)) => {
            cancel(&stats, &mut upstream);
            if tunnel && !reset {
                exchange.info.flags.insert(ResponseFlags::DOWNSTREAM_TERMINATION);
                exchange.info.response_code_details = Some("downstream_remote_disconnect".into());
                return Ok(Outcome::Tunnel);
            }
            Err(Stop::Gone(reset))
        }
        Err(Broken::Deadline(deadline)) => {
            cancel(&stats, &mut upstream);
            let (flag, details) = match deadline {
                Deadline::Idle => {
                    exchange.http.stats.downstream_rq_idle_timeout.inc();
                    (ResponseFlags::STREAM_IDLE_TIMEOUT, "stream_idle_timeout")
                }
                Deadline::Stream => {
                    exchange.http.stats.downstream_rq_max_duration_reached.inc();
                    (ResponseFlags::DURATION_TIMEOUT, "max_duration_timeout")
                }
                Deadline::UpstreamStream => {
                    stats.upstream_rq_max_duration_reached.inc();
                    (ResponseFlags::UPSTREAM_MAX_STREAM_DURATION, "upstream_max_stream_duration_reached")
                }
                Deadline::PerTryIdle => {
                    stats.upstream_rq_per_try_idle_timeout.inc();
                    (ResponseFlags::UPSTREAM_TIMEOUT, "upstream_per_try_idle_timeout")
                }
                _ => {
                    stats.upstream_rq_timeout.inc();
                    (ResponseFlags::UPSTREAM_TIMEOUT, "response_timeout")
                }
            };
            exchange.info.flags.insert(flag);
            exchange.info.response_code_details = Some(details.into());
            abort(exchange, sink, h2::Reason::INTERNAL_ERROR).await;
            Ok(Outcome::TimedOut)
        }
    }
}

/// Gives a request up: a reset on HTTP/2, the end of the connection on HTTP/1.
fn cancel(stats: &ClusterStats, upstream: &mut Upstream) {
    if upstream.protocol == HttpProtocol::Http2 {
        stats.upstream_rq_tx_reset.inc();
    }
    upstream.send.reset(h2::Reason::CANCEL);
}

/// Why an answer could not be passed on to its end.
enum Broken {
    Client(bool),
    Upstream,
    Deadline(Deadline),
}

/// What was read is written, then the stream is cut.
async fn abort(exchange: &mut Exchange, mut sink: SendBody, reason: h2::Reason) {
    let flush = poll_fn(|cx| sink.poll_flush(cx));
    // A client that does not read loses the rest at once.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(100), flush).await;
    sink.reset(reason);
    exchange.answer.close_after();
}

/// Counts a request on its host and cluster while it lives.
struct Active {
    cluster: Rc<WorkerCluster>,
    host: Arc<Host>,
}

impl Active {
    fn new(cluster: Rc<WorkerCluster>, host: Arc<Host>) -> Self {
        cluster.stats.upstream_rq_active.inc();
        host.state.active.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        host.state.stats.rq_total.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self { cluster, host }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.cluster.stats.upstream_rq_active.dec();
        self.host.state.active.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// The bytes of a body that was kept.
pub(super) fn joined(frames: &[Frame]) -> Bytes {
    let mut all = Vec::new();
    for frame in frames {
        if let Frame::Data(data) = frame {
            all.extend_from_slice(data);
        }
    }
    all.into()
}
