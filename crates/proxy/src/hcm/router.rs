//! The router: from a matched route to an answer, over as many tries as the policy allows.

mod answer;
mod attempt;
mod counted;
mod outgoing;
mod why;

use super::exchange::{Exchange, Outcome, Stop};
use super::local_reply::LocalReply;
use super::mirror::Copy;
use super::span::TryEnd;
use super::timers::Deadline;
use crate::dns::{self, Lookup};
use crate::stats::ClusterStats;
use crate::stream::{Pump, RecvBody};
use crate::upstream::{Failure, Reply, Tunnel, Upstream, WorkerCluster};
use answer::pass_on;
pub(crate) use answer::succeeded;
use attempt::one_try;
pub(super) use counted::is_canary;
use counted::{Counted, Told};
use outgoing::Outgoing;
use proxy_core::circuit::Resource;
use proxy_core::cluster::{Discovery, NameCache};
use proxy_core::filters::{HttpFilter, HttpFilterEntry, RouterConfig};
use proxy_core::outlier::Outcome as Health;
use proxy_core::retry::{ResetReason, RetryRuntime, RetryVerdict, http_status_of_grpc};
use proxy_core::route::{Action, Forward, HashContext, Matched, SetCookie, Timeouts, own_location, tls_location};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{FormatContext, Headers, Host, PickContext, ResponseFlags, RetryState};
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;
use why::Why;

/// Carries out the route's action.
pub(super) async fn route(exchange: &mut Exchange, body: &mut RecvBody) -> Result<Outcome, Stop> {
    let http = exchange.http.clone();
    let stats = &http.stats;
    stats.rq_total.inc();
    if exchange.redirect_to_tls.take().is_some() {
        stats.rq_direct_response.inc();
        // Filters may have changed the path since.
        let location = tls_location(&exchange.request);
        let mut reply = LocalReply::new(301, "", "direct_response");
        reply.headers.push(("location".into(), location.into_bytes()));
        return Err(reply.into());
    }
    let Some(matched) = exchange.matched.clone() else {
        stats.no_route.inc();
        return Err(LocalReply::new(404, "", "route_not_found").flagged(ResponseFlags::NO_ROUTE).into());
    };
    match &matched.route.action {
        Action::Forward(forward) => {
            let mut result = forward_request(exchange, body, &matched, forward).await;
            if let Err(Stop::Reply(reply)) = &mut result {
                // These are found before there is a try to count.
                let early = [
                    ResponseFlags::NO_CLUSTER,
                    ResponseFlags::INVALID_ENVOY_HEADERS,
                    ResponseFlags::UNCONDITIONAL_DROP,
                    ResponseFlags::DROP_OVERLOAD,
                ];
                let of_manager = ["stream_idle_timeout", "max_duration_timeout", "request_overall_timeout"];
                reply.finalize =
                    !early.iter().any(|flag| reply.flags.intersects(*flag)) && !of_manager.contains(&&*reply.details);
            }
            result
        }
        Action::Redirect(redirect) => {
            stats.rq_direct_response.inc();
            let silent = |entry: &HttpFilterEntry| match &entry.filter {
                HttpFilter::Router(router) => router.suppress_envoy_headers,
                _ => false,
            };
            let keep = !exchange.filters(&http.config).iter().any(silent);
            let (status, location) = redirect.rewrite(&matched.route.matcher, &mut exchange.request, keep);
            let mut reply = LocalReply::new(status, "", "direct_response");
            reply.headers.push(("location".into(), location.into_bytes()));
            Err(direct(exchange, &matched, reply))
        }
        Action::Direct(answer) => {
            stats.rq_direct_response.inc();
            let mut reply = LocalReply::new(answer.status, "", "direct_response");
            if answer.status == 201 || (300..400).contains(&answer.status) {
                reply.headers.push(("location".into(), own_location(&exchange.request).into_bytes()));
            }
            reply.raw_body = Some(match &answer.body_format {
                None => answer.body.clone(),
                Some(format) => {
                    let text = String::from_utf8_lossy(&answer.body);
                    let mut cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
                    cx.local_reply_body = &text;
                    let mut body = Vec::new();
                    format.write(&cx, &mut body);
                    body.into()
                }
            });
            if let Some(format) = &answer.body_format {
                let own = answer.content_type.as_deref();
                let plain = if matches!(format, proxy_core::format::FormatString::Json(_)) {
                    "application/json"
                } else {
                    "text/plain"
                };
                reply.headers.push(("content-type".into(), own.unwrap_or(plain).as_bytes().to_vec()));
            }
            Err(direct(exchange, &matched, reply))
        }
        Action::NonForwarding => {
            // To Envoy's router it is a route to a cluster without name.
            stats.no_cluster.inc();
            Err(LocalReply::new(503, "", "cluster_not_found").flagged(ResponseFlags::NO_CLUSTER).into())
        }
    }
}

/// An answer that the route gives by itself, with the route's header changes.
fn direct(exchange: &mut Exchange, matched: &Matched, mut reply: LocalReply) -> Stop {
    // The route's formats may show them.
    exchange.info.response_code_details = Some(reply.details.clone());
    let mut headers = Headers::new();
    headers.set_status(reply.status);
    for (name, value) in &reply.headers {
        headers.push(name.as_bytes(), value);
    }
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
    matched.finalize_response(&mut headers, &cx);
    reply.headers =
        headers.iter_regular().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), v.to_vec())).collect();
    reply.into()
}

/// How one try ended before there was an answer to pass on.
enum Tried {
    Answer(Box<Reply>, Box<Upstream>, Pump, bool),
    Failed { why: Why, started: bool },
    PerTryTimeout(Deadline),
}

/// What stays the same over the tries of a request.
struct Plan<'a> {
    matched: &'a Matched,
    forward: &'a Forward,
    cluster: Rc<WorkerCluster>,
    timeouts: Timeouts,
    suppress_envoy_headers: bool,
    hash: Option<u64>,
    /// A `set-cookie` that keeps the client with its host; only the upstream's answer has it.
    cookie: Option<SetCookie>,
    alpn: Option<&'a proxy_core::filters::AlpnOverride>,
    /// When the router got the request.
    began: Instant,
    router: Option<&'a RouterConfig>,
    /// Copies that leave with the first try.
    mirrors: RefCell<Vec<Copy>>,
    /// Where it counts besides its cluster.
    counted: Counted,
}

impl Plan<'_> {
    /// Counts an answer that the proxy gives in the cluster's place.
    fn charge(&self, exchange: &Exchange, status: u16) {
        self.counted.answer(exchange, &self.cluster, status, Told::own(exchange));
    }

    /// Writes the record of a try that is over: what the upstream answered, or what went wrong.
    fn log_try(&self, exchange: &mut Exchange, response: Option<&Headers>, flags: ResponseFlags) {
        let logs = self.router.map(|router| &router.upstream_log[..]).unwrap_or_default();
        if logs.is_empty() {
            return;
        }
        let now = exchange.elapsed();
        let info = &mut exchange.info;
        let whole = (info.flags, info.response_code, info.times.complete, info.upstream.attempts, info.bytes_sent);
        info.flags.insert(flags);
        info.response_code = response.map_or(Some(0), Headers::status);
        info.times.complete = Some(now);
        // Envoy counts these for the client's stream only.
        (info.upstream.attempts, info.bytes_sent) = (0, 0);
        // What filters left, and the client's address as they took it, are the client's stream's, too.
        let details = info.response_code_details.take();
        let state = std::mem::take(&mut info.filter_state);
        let remote = std::mem::replace(&mut info.remote, exchange.http.info.remote.clone());
        exchange.log_to(logs, "UpstreamEnd", response);
        let info = &mut exchange.info;
        (info.response_code_details, info.filter_state, info.remote) = (details, state, remote);
        (info.flags, info.response_code, info.times.complete, info.upstream.attempts, info.bytes_sent) = whole;
    }
}

async fn forward_request(
    exchange: &mut Exchange,
    body: &mut RecvBody,
    matched: &Matched,
    forward: &Forward,
) -> Result<Outcome, Stop> {
    let http = exchange.http.clone();
    let (router, alpn) =
        exchange.filters(&http.config).iter().fold((None, None), |(router, alpn), entry| match &entry.filter {
            HttpFilter::Router(config) => (Some(config), alpn),
            HttpFilter::IstioAlpn(config) => (router, Some(&**config)),
            _ => (router, alpn),
        });
    if let Some(name) = router.and_then(|router| router.malformed(&exchange.request)) {
        http.stats.rq_total.inc();
        let value = exchange.request.get(name).unwrap_or_default();
        let body = format!("invalid header '{name}' with value '{}'", String::from_utf8_lossy(value));
        let reply = LocalReply::new(400, body, format!("request_headers_failed_strict_check{{{name}}}"));
        return Err(reply.flagged(ResponseFlags::INVALID_ENVOY_HEADERS).into());
    }
    let name = matched.cluster(&exchange.request);
    let Some(cluster) = name.and_then(|name| exchange.cluster(&name)) else {
        exchange.info.upstream.cluster = None;
        http.stats.no_cluster.inc();
        let reply = LocalReply::new(forward.cluster_not_found_status, "", "cluster_not_found")
            .flagged(ResponseFlags::NO_CLUSTER);
        return Err(reply.into());
    };
    exchange.name_cluster(&cluster);
    let counted = Counted::of(exchange, matched, router.map(|router| &**router));
    let suppress = router.is_some_and(|r| r.suppress_envoy_headers);
    let closed = in_maintenance(&cluster, &http.worker, suppress).or_else(|| drop_overload(&cluster, &http.worker));
    if let Some(reply) = closed {
        counted.answer(exchange, &cluster, 503, Told::own(exchange));
        return Err(reply.into());
    }
    let respect = router.is_some_and(|r| r.respect_expected_rq_timeout);
    let policy = matched.retry_policy();
    let timeouts = forward.timeouts(policy.map(Arc::as_ref), &mut exchange.request, respect, !suppress);
    {
        // The first try has its number before the route's changes, which may remove it.
        if matched.vhost.include_request_attempt_count {
            exchange.request.set("x-envoy-attempt-count", b"1");
        }
        // Formatters see the request as it was; the copy is only made when there are some.
        let before = has_request_ops(matched).then(|| exchange.request.clone());
        // The first try counts already.
        let attempts = std::mem::replace(&mut exchange.info.upstream.attempts, 1);
        let cx = FormatContext::new(&exchange.info, before.as_ref(), None);
        matched.finalize_request(&mut exchange.request, &cx, !suppress);
        exchange.info.upstream.attempts = attempts;
    }
    // A host is chosen by what the upstream gets. Nobody else asks for a hash, nor for the cookie that comes of it.
    let (hash, cookie) = if cluster.config().lb.is_hashing() {
        let cx = HashContext {
            headers: &exchange.request,
            remote: &exchange.info.remote,
            local: &http.info.local,
            filter_state: &exchange.info.filter_state,
        };
        forward.hash(&cluster.config().hash_policies, &cx)
    } else {
        (None, None)
    };
    let unset = RetryRuntime::default();
    let runtime = router.map_or(&unset, |router| &router.retries);
    // What the route adds to the request asks for retries, too.
    let mut retries = RetryState::new(policy, &mut exchange.request, runtime);
    if exchange.request.get(":scheme").is_none() {
        exchange.request.set(":scheme", b"http");
    }
    let mirrors = super::mirror::chosen(exchange, matched);
    let limit = matched.body_buffer_limit().unwrap_or(u64::from(exchange.buffer_limit()));
    let ended = body.is_empty();
    let tunnel = exchange.hints.tunnel() != Tunnel::No;
    let mut outgoing = Outgoing {
        rest: body,
        kept: Vec::new(),
        at: 0,
        size: 0,
        limit: limit as usize,
        keeping: (retries.is_some() || forward.internal_redirect.is_some()) && !tunnel,
        paused: tunnel,
        overflowed: false,
        ended,
        bodiless: ended,
        answered: false,
        received: 0,
        drop_trailers: exchange.answer.is_h1() && !http.config.http1.enable_trailers,
        limits: (!exchange.answer.is_h1()).then(|| http.clone()),
        feeds: Vec::new(),
        messages: (exchange.grpc && exchange.messages.is_some()).then(Default::default),
        text: exchange.web.as_mut().and_then(|web| web.request.take()),
    };
    let plan = Plan {
        matched,
        forward,
        cluster,
        timeouts,
        suppress_envoy_headers: suppress,
        hash,
        cookie,
        alpn,
        began: exchange.timers.now(),
        router: router.map(|router| &**router),
        mirrors: RefCell::new(mirrors),
        counted,
    };
    if exchange.body_done || asks_for_websocket(exchange) {
        exchange.timers.set(Deadline::Global, plan.timeouts.global);
    }
    let result = tries(exchange, &plan, &mut outgoing, retries.as_mut()).await;
    if matches!(result, Err(Stop::Reply(_))) {
        outgoing.leave_to_copies();
        if outgoing.ended {
            exchange.request_complete();
        }
    }
    if outgoing.overflowed {
        plan.cluster.stats.retry_or_shadow_abandoned.inc();
    }
    exchange.info.bytes_received = match exchange.redirects {
        0 => exchange.info.bytes_received.max(outgoing.received),
        _ => exchange.info.bytes_received + outgoing.received,
    };
    if let (Some(all), Some(messages)) = (&mut exchange.messages, outgoing.messages.take()) {
        all[0] = messages;
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
    let stats = &plan.cluster.stats;
    let mut previous: Vec<Arc<Host>> = Vec::new();
    let mut retry_permit = None;
    // Whether the try before ran into its timeout.
    let mut last_timed_out = None;
    loop {
        exchange.info.upstream.attempts += 1;
        if let Discovery::DynamicForwardProxy { cache, .. } = &plan.cluster.config().discovery {
            Box::pin(resolve(exchange, plan, cache)).await?;
        }
        let host = pick(exchange, plan, &previous);
        let Some(host) = host else {
            stats.upstream_cx_none_healthy.inc();
            exchange.info.upstream.host = None;
            plan.charge(exchange, 503);
            return Err(no_host().into());
        };
        exchange.info.upstream.host = Some(host.clone());
        if let Some(status) = strict_session(exchange, &plan.cluster, &host) {
            stats.upstream_cx_none_healthy.inc();
            exchange.info.upstream.host = None;
            plan.charge(exchange, status);
            return Err(LocalReply { status, ..no_host() }.into());
        }
        if let (Some(timed_out), true) = (last_timed_out, plan.matched.vhost.include_is_timeout_retry_header) {
            let value: &[u8] = if timed_out { b"true" } else { b"false" };
            exchange.request.set("x-envoy-is-timeout-retry", value);
        }
        super::span::begin_try(exchange, &plan.cluster.config().stat_name);
        let tried = one_try(exchange, plan, outgoing, &host).await?;
        if outgoing.answered {
            retries = None;
        }
        last_timed_out = Some(matches!(tried, Tried::PerTryTimeout(_)));
        let at = exchange.elapsed();
        let number = exchange.info.upstream.attempts;
        match &tried {
            Tried::Answer(reply, ..) => exchange.steps.answered(at, number, reply.status),
            Tried::Failed { why, .. } => {
                exchange.steps.tried(at, number, format!("{}: {}", host.address, why.text()));
                super::span::end_try(exchange, None, None, why.flags(), TryEnd::Failed(why.text()));
                plan.log_try(exchange, None, why.flags());
            }
            Tried::PerTryTimeout(deadline) => {
                exchange.steps.tried(at, number, format!("{}: no answer in time ({deadline:?})", host.address));
                super::span::end_try(exchange, None, None, ResponseFlags::UPSTREAM_TIMEOUT, TryEnd::Canceled);
                plan.log_try(exchange, None, ResponseFlags::UPSTREAM_TIMEOUT);
            }
        }
        let mut failure = None;
        let verdict = match &tried {
            Tried::Answer(reply, ..) => {
                exchange.info.upstream.header_bytes_received += reply.header_bytes;
                let checked = !plan.cluster.config().health_checks.is_empty();
                if checked && reply.headers.contains("x-envoy-immediate-health-check-fail") {
                    plan.cluster.on_own_word(&host, &worker);
                }
                let outcome = Health::of_answer(outlier_status(exchange, reply), &reply.headers);
                plan.cluster.on_result(&host, Some(outcome), &worker);
                match &mut retries {
                    Some(r) => r.on_response(&reply.headers, &mut worker.random.borrow_mut(), exchange.info.start + at),
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
                    Why::Stream(Failure::Protocol(_) | Failure::Blamed) => {
                        // Of HTTP/2 the connection counts what ends it.
                        if exchange.info.upstream.protocol == Some(HttpProtocol::Http2) {
                            stats.upstream_rq_tx_reset.inc();
                        } else if matches!(why, Why::Stream(Failure::Protocol(_))) {
                            stats.upstream_cx_protocol_error.inc();
                        }
                    }
                    Why::Stream(Failure::Reset) => stats.upstream_rq_rx_reset.inc(),
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
        // Whatever it is, it is what a retry was for (Envoy `RetryStateImpl::shouldRetry`).
        let over = matches!(tried, Tried::PerTryTimeout(Deadline::Global | Deadline::UpstreamStream));
        if retried && retries.is_some() && verdict == RetryVerdict::No && !over {
            stats.upstream_rq_retry_success.inc();
            plan.counted.each(|stats| stats.upstream_rq_retry_success.inc());
        }
        match verdict {
            RetryVerdict::Retry { .. }
                if plan.router.is_some_and(|r| !r.retries.allows(&mut worker.random.borrow_mut())) => {}
            RetryVerdict::Retry { after, asked } if outgoing.repeatable() => {
                let breaker = plan.cluster.entry.breakers.get(plan.forward.priority);
                match breaker.acquire(Resource::Retries) {
                    Some(permit) => {
                        if let Tried::Answer(reply, mut upstream, ..) = tried {
                            upstream.count_wire(&mut exchange.info.upstream, stats);
                            stats.charge_retry(reply.status, plan.counted.quiet);
                            host.state.stats.count(false);
                            let end = if reply.body.is_empty() { TryEnd::Complete } else { TryEnd::Canceled };
                            super::span::end_try(
                                exchange,
                                Some(reply.status),
                                Some(&reply.headers),
                                ResponseFlags::NONE,
                                end,
                            );
                            plan.log_try(exchange, Some(&reply.headers), ResponseFlags::NONE);
                            discard(&reply, &mut upstream);
                        }
                        retry_permit = Some(permit);
                        exchange.steps.settle(&exchange.info);
                        exchange.steps.own(
                            exchange.elapsed(),
                            "retry",
                            format!("again after {} ms", after.as_millis()),
                        );
                        outgoing.rewind();
                        previous.push(host);
                        exchange.timers.clear(Deadline::PerTry);
                        exchange.timers.clear(Deadline::PerTryIdle);
                        match Box::pin(pause(exchange, plan, after)).await? {
                            Paused::Go => {}
                            // Without a try under way there is none to count.
                            Paused::GlobalTimeout => {
                                return Err(timeout_reply(plan.timeouts.status, "response_timeout"));
                            }
                        }
                        stats.upstream_rq_retry.inc();
                        plan.counted.each(|stats| stats.upstream_rq_retry.inc());
                        match asked {
                            true => stats.upstream_rq_retry_backoff_ratelimited.inc(),
                            false => stats.upstream_rq_retry_backoff_exponential.inc(),
                        }
                        continue;
                    }
                    None => {
                        stats.upstream_rq_retry_overflow.inc();
                        plan.counted.each(|stats| stats.upstream_rq_retry_overflow.inc());
                        exchange.steps.own(exchange.elapsed(), "retry", "too many retries at once");
                        exchange.info.flags.insert(ResponseFlags::UPSTREAM_OVERFLOW);
                    }
                }
            }
            // It has become too long for that.
            RetryVerdict::Retry { .. } => {}
            RetryVerdict::LimitExceeded => {
                stats.upstream_rq_retry_limit_exceeded.inc();
                plan.counted.each(|stats| stats.upstream_rq_retry_limit_exceeded.inc());
                exchange.steps.own(exchange.elapsed(), "retry", "no try is left");
                exchange.info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
            }
            RetryVerdict::No => {}
        }
        return match tried {
            Tried::Answer(reply, upstream, pump, sent) => {
                let body = (outgoing.ended && outgoing.keeping).then_some(&*outgoing.kept);
                if let Some(next) = super::redirect::follow(exchange, plan.forward, &reply.headers, body) {
                    let status = reply.status;
                    let end = if reply.body.is_empty() { TryEnd::Complete } else { TryEnd::Canceled };
                    super::span::end_try(exchange, Some(reply.status), Some(&reply.headers), ResponseFlags::NONE, end);
                    plan.log_try(exchange, Some(&reply.headers), ResponseFlags::NONE);
                    let mut upstream = upstream;
                    discard(&reply, &mut upstream);
                    return Err(Stop::Redirect(Box::new(next), status));
                }
                let wanted = plan.router.is_some_and(|router| !router.upstream_log.is_empty());
                let head = wanted.then(|| reply.headers.clone());
                let status = reply.status;
                let outcome = pass_on(exchange, plan, outgoing, reply, upstream, pump, sent).await;
                let end = if outcome.is_ok() { TryEnd::Complete } else { TryEnd::Canceled };
                super::span::end_try(exchange, Some(status), None, ResponseFlags::NONE, end);
                if let Some(head) = head {
                    plan.log_try(exchange, Some(&head), ResponseFlags::NONE);
                }
                outcome
            }
            Tried::Failed { .. } => {
                let why = failure.unwrap_or(Why::Stream(Failure::Terminated));
                if let Why::Connect(e) = &why
                    && !e.reason.is_empty()
                {
                    exchange.info.upstream.transport_failure = Some(e.reason.replace(' ', "_").into());
                }
                if matches!(why, Why::Connect(_)) {
                    exchange.info.upstream.local = None;
                }
                let reply = why.reply(retried, outgoing.answered, plan.suppress_envoy_headers);
                // Interim answers were charged instead (Envoy `Filter::chargeUpstreamAbort`).
                if !outgoing.answered {
                    plan.charge(exchange, reply.status);
                }
                Err(reply.into())
            }
            Tried::PerTryTimeout(deadline) => Err(timed_out(exchange, plan, deadline)),
        };
    }
}

/// Failures of gRPC without a body count as their HTTP status (Envoy `Filter::onUpstreamHeaders`).
fn outlier_status(exchange: &Exchange, reply: &Reply) -> u16 {
    match reply.headers.get_str("grpc-status") {
        Some(status) if exchange.grpc => http_status_of_grpc(status.parse().ok()),
        _ => reply.status,
    }
}

/// Whether a request is a WebSocket's handshake: then the answer's timeouts run although the request is not over (Envoy
/// `Filter::decodeHeaders`).
fn asks_for_websocket(exchange: &Exchange) -> bool {
    exchange.hints.upgrade
        && exchange.request.get("upgrade").is_some_and(|kind| kind.eq_ignore_ascii_case(b"websocket"))
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
        if let Poll::Ready(gone) = exchange.answer.poll_gone(cx, exchange.body_done) {
            return Poll::Ready(Err(Stop::Gone(gone)));
        }
        match exchange.poll_deadline(cx) {
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
        upstream.send.reset(http2::Reason::INTERNAL_ERROR);
    }
}

/// The answer while the runtime says that somebody works on the cluster.
fn in_maintenance(cluster: &WorkerCluster, worker: &crate::worker::Worker, suppress: bool) -> Option<LocalReply> {
    if !cluster.entry.is_in_maintenance(&mut worker.random.borrow_mut()) {
        return None;
    }
    cluster.stats.upstream_rq_maintenance_mode.inc();
    let mut reply =
        LocalReply::new(503, "maintenance mode", "maintenance_mode").flagged(ResponseFlags::UPSTREAM_OVERFLOW);
    if !suppress {
        reply.headers.push(("x-envoy-overloaded".into(), b"true".to_vec()));
    }
    Some(reply)
}

/// The answer to a request that the load assignment wants dropped (Envoy `Filter::checkDropOverload`).
fn drop_overload(cluster: &WorkerCluster, worker: &crate::worker::Worker) -> Option<LocalReply> {
    let (body, details, header, flag) = match cluster.drops(&mut worker.random.borrow_mut())? {
        true => (
            "unconditional drop overload",
            "unconditional_drop_overload",
            "x-envoy-unconditional-drop-overload",
            ResponseFlags::UNCONDITIONAL_DROP,
        ),
        false => ("drop overload", "drop_overload", "x-envoy-drop-overload", ResponseFlags::DROP_OVERLOAD),
    };
    let mut reply = LocalReply::new(503, body, details).flagged(flag);
    reply.headers.push((header.into(), b"true".to_vec()));
    Some(reply)
}

fn no_host() -> LocalReply {
    LocalReply::new(503, "no healthy upstream", "no_healthy_upstream").flagged(ResponseFlags::NO_HEALTHY_UPSTREAM)
}

/// The status that answers a strict session whose host is not the one that could be chosen: the configured one if it is
/// gone, 503 if it only gets nothing.
fn strict_session(exchange: &Exchange, cluster: &WorkerCluster, host: &Host) -> Option<u16> {
    let session = exchange.session.as_ref()?;
    let status = session.config.strict?;
    let wanted = session.wanted.as_deref()?;
    let is_it = |host: &Host| host.address.to_string() == wanted;
    if is_it(host) {
        return None;
    }
    session.count(exchange, |counters| &counters.failed_closed);
    let is_there = cluster.entry.endpoints.load().hosts().any(|host| is_it(host));
    Some(if is_there { 503 } else { status })
}

/// Has the name looked up that the request is for now, unless a filter has seen to that (Envoy
/// `dynamic_forward_proxy::Cluster::LoadBalancer::chooseHost`).
async fn resolve(exchange: &mut Exchange, plan: &Plan<'_>, cache: &Arc<NameCache>) -> Result<(), Stop> {
    let config = plan.cluster.config();
    let Some((key, port)) = dns::name_of(config, Some(&exchange.request), Some(&exchange.info)) else { return Ok(()) };
    let worker = exchange.http.worker.clone();
    let names = worker.shared.names.get(&worker.shared, cache);
    let known = names.known_now(&key);
    let found = match known {
        Some(known) => known,
        None => exchange.wait(names.look_up(&worker.shared, &key, port)).await?,
    };
    if let Lookup::Found = found {
        return Ok(());
    }
    // What had to be waited for is no choice that failed.
    if !matches!((known, found), (None, Lookup::Unknown(_))) {
        plan.cluster.stats.upstream_cx_none_healthy.inc();
    }
    exchange.info.upstream.host = None;
    plan.charge(exchange, 503);
    let reply = LocalReply::new(503, "no healthy upstream", found.details());
    Err(reply.flagged(ResponseFlags::NO_HEALTHY_UPSTREAM).into())
}

fn pick(exchange: &mut Exchange, plan: &Plan<'_>, previous: &[Arc<Host>]) -> Option<Arc<Host>> {
    let worker = exchange.http.worker.clone();
    let context = PickContext {
        hash: plan.hash,
        metadata_match: plan.matched.metadata_match(),
        previous,
        retry: plan.matched.retry_policy().map(Arc::as_ref),
        override_host: exchange.session.as_ref().and_then(|s| s.wanted.as_deref()),
        original_dst: exchange.http.original_dst,
        stream: Some(&exchange.info),
        headers: Some(&exchange.request),
        now: exchange.timers.now(),
    };
    plan.cluster.pick(&context, &mut worker.random.borrow_mut())
}

/// What a passed deadline means once the router has the request.
fn timed_out(exchange: &Exchange, plan: &Plan<'_>, deadline: Deadline) -> Stop {
    let stats = &plan.cluster.stats;
    let details = match deadline {
        Deadline::PerTry => "upstream_per_try_timeout",
        Deadline::PerTryIdle => "upstream_per_try_idle_timeout",
        Deadline::UpstreamStream => {
            stats.upstream_rq_max_duration_reached.inc();
            "upstream_max_stream_duration_reached"
        }
        _ => {
            stats.upstream_rq_timeout.inc();
            plan.counted.each(|stats| stats.upstream_rq_timeout.inc());
            "response_timeout"
        }
    };
    if deadline == Deadline::UpstreamStream {
        // Which Envoy does not count among the cluster's answers.
        let flag = ResponseFlags::UPSTREAM_MAX_STREAM_DURATION;
        return LocalReply::new(504, "upstream max stream duration reached", details).flagged(flag).into();
    }
    plan.charge(exchange, plan.timeouts.status);
    timeout_reply(plan.timeouts.status, details)
}

fn timeout_reply(status: u16, details: &'static str) -> Stop {
    let body = if status == 204 { "" } else { "upstream request timeout" };
    LocalReply::new(status, body, details).flagged(ResponseFlags::UPSTREAM_TIMEOUT).into()
}

/// Gives a request up: a reset on HTTP/2 (Envoy names no other reason), the end of the connection on HTTP/1.
pub(super) fn cancel(stats: &ClusterStats, upstream: &mut Upstream) {
    if upstream.protocol == HttpProtocol::Http2 {
        stats.upstream_rq_tx_reset.inc();
    }
    upstream.send.reset(http2::Reason::INTERNAL_ERROR);
}
