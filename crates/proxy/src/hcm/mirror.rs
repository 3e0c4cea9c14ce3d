//! Request mirroring: copies nobody waits for. They leave beside the request's first try and get its body as it comes
//! (Envoy's "streaming shadows").

mod feed;

pub(super) use feed::Feed;

use super::exchange::{Exchange, is_grpc};
use super::router::{is_canary, succeeded};
use crate::internal;
use crate::stats::OWN_REQUESTS;
use crate::stream::{BodyError, Frame, Pump, PumpError};
use crate::upstream::{
    AcquireError, Acquired, Active, Failure, Protocol, Reply, ServerNames, Tunnel, Upstream, Variant, WorkerCluster,
};
use feed::Tap;
use mesh_types::ArcStr;
use proxy_core::circuit::Resource;
use proxy_core::outlier::Outcome as Health;
use proxy_core::route::{Matched, Mirror, Timeouts};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{FormatContext, Headers, Host, PickContext};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// A copy to be sent.
pub(super) struct Copy {
    cluster: ArcStr,
    headers: Headers,
}

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
    mirror.change_headers(&mut headers, &FormatContext::new(&exchange.info, Some(&exchange.request), None));
    let authority = headers.authority().unwrap_or_default().to_owned();
    let authority = mirror.authority(&authority).into_owned();
    headers.set(":authority", authority.as_bytes());
    super::span::copied(exchange, mirror.trace_sampled, &mut headers);
    internal::mark(&exchange.http.worker, &mut headers, None);
    headers
}

/// Sends the copies' heads; their bodies come through the feeds. `tells`: Envoy's own headers are sent. `empty`: there is no body.
pub(super) fn start(
    exchange: &Exchange,
    matched: &Matched,
    copies: Vec<Copy>,
    timeouts: &Timeouts,
    tells: bool,
    empty: bool,
) -> Vec<Feed> {
    let mut feeds = Vec::new();
    for mut copy in copies {
        let Some(cluster) = exchange.http.worker.cluster(&copy.cluster) else { continue };
        if let Some(timeout) = timeouts.global.or(timeouts.per_try).filter(|_| tells) {
            copy.headers.set("x-envoy-expected-rq-timeout-ms", timeout.as_millis().to_string().as_bytes());
        }
        let (feed, tap) = feed::new(empty);
        let sending = Sending {
            worker: exchange.http.worker.clone(),
            cluster,
            original_dst: exchange.http.original_dst,
            // The copy's endpoint must fit the original's subset, too.
            matched: matched.metadata_match().is_some().then(|| matched.clone()),
            headers: copy.headers,
            timeout: timeouts.global,
            empty,
            tunnel: exchange.hints.tunnel(),
            downstream: exchange.info.protocol,
            tap,
        };
        // Nobody waits for a mirror: that is its point. It ends with its answer, its timeout or its feed.
        tokio::task::spawn_local(sending.run());
        feeds.push(feed);
    }
    feeds
}

/// A copy on its way.
struct Sending {
    worker: Rc<crate::worker::Worker>,
    cluster: Rc<WorkerCluster>,
    original_dst: Option<std::net::SocketAddr>,
    matched: Option<Matched>,
    headers: Headers,
    timeout: Option<Duration>,
    empty: bool,
    tunnel: Tunnel,
    downstream: Option<HttpProtocol>,
    tap: Tap,
}

/// How a copy ended before it was answered.
enum Lost {
    /// The request it copies was given up before its end.
    Cancelled,
    /// By the circuit breaker, which has counted.
    Refused,
    TimedOut,
    Failed(Health),
}

impl Sending {
    async fn run(mut self) {
        self.worker.named_stats().inc(OWN_REQUESTS);
        let Some(host) = self.pick() else {
            self.cluster.stats.upstream_cx_none_healthy.inc();
            return self.cluster.stats.charge(503, true);
        };
        let protocol = Protocol::of(&self.cluster.config().protocol, self.downstream);
        let names = ServerNames::of(self.cluster.config(), &self.headers);
        let pool = self.cluster.pool(&self.worker, &host, &Variant { protocol, names, ..Variant::default() });
        let Some(pool) = pool else { return self.cluster.stats.charge(503, true) };
        let mut acquiring = Box::pin(pool.acquire());
        let mut late = None;
        let (tap, timeout) = (&mut self.tap, self.timeout);
        let acquired = poll_fn(|cx| {
            // First: a connection that comes just now is left to others.
            if tap.is_cancelled(cx) {
                return Poll::Ready(Err(Lost::Cancelled));
            }
            if let Poll::Ready(acquired) = acquiring.as_mut().poll(cx) {
                return Poll::Ready(Ok(acquired));
            }
            poll_late(&mut late, tap, timeout, cx).map(|()| Err(Lost::TimedOut))
        })
        .await;
        drop(acquiring);
        let ended = match acquired {
            Ok(Ok(acquired)) => self.send(acquired, &host, late).await,
            Ok(Err(AcquireError::Overflow)) => return self.cluster.stats.charge(503, true),
            Ok(Err(AcquireError::Connect(e))) if e.timeout => Err(Lost::Failed(Health::ConnectTimeout)),
            Ok(Err(AcquireError::Connect(_))) => Err(Lost::Failed(Health::ConnectFailed)),
            Err(lost) => {
                self.cluster.stats.upstream_rq_cancelled.inc();
                Err(lost)
            }
        };
        match ended {
            Ok(()) | Err(Lost::Cancelled | Lost::Refused) => {}
            Err(Lost::TimedOut) => {
                self.cluster.on_result(&host, Some(Health::Timeout), &self.worker);
                self.cluster.stats.upstream_rq_timeout.inc();
                self.cluster.stats.charge(504, true);
            }
            // What failed counts as Envoy answers it.
            Err(Lost::Failed(how)) => {
                self.cluster.on_result(&host, Some(how), &self.worker);
                self.cluster.stats.charge(503, true);
            }
        }
    }

    fn pick(&self) -> Option<Arc<Host>> {
        let context = PickContext {
            hash: None,
            metadata_match: self.matched.as_ref().and_then(Matched::metadata_match),
            previous: &[],
            retry: None,
            override_host: None,
            original_dst: self.original_dst,
            stream: None,
            headers: Some(&self.headers),
            now: Instant::now(),
        };
        self.cluster.pick(&context, &mut self.worker.random.borrow_mut())
    }

    /// Sends the request and drops the answer, whose status counts.
    async fn send(
        &mut self,
        acquired: Acquired,
        host: &Arc<Host>,
        mut late: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
    ) -> Result<(), Lost> {
        let stats = &self.cluster.stats;
        self.cluster.on_result(host, Some(Health::ConnectedForRequests), &self.worker);
        let Some(_permit) = self.cluster.entry.breakers.get(Default::default()).acquire(Resource::Requests) else {
            acquired.put_back();
            stats.other.inc("upstream_rq_active_overflow");
            host.state.stats.count(false);
            stats.charge(503, true);
            return Err(Lost::Refused);
        };
        let _active = Active::new(self.cluster.clone(), host.clone());
        stats.upstream_rq_total.inc();
        let began = Instant::now();
        let end = self.empty && self.tunnel == Tunnel::No;
        let trailers = self.cluster.config().http1.enable_trailers;
        let failed = |_: Failure| Lost::Failed(Health::Reset);
        let mut upstream = Upstream::start(acquired, &mut self.headers, end, self.tunnel, trailers).map_err(failed)?;
        let mut pump = Pump::new();
        let mut sent = end;
        let mut reply: Option<Box<Reply>> = None;
        let (tap, timeout, cluster, worker) = (&mut self.tap, self.timeout, &self.cluster, &self.worker);
        let tunnel = self.tunnel != Tunnel::No;
        let grpc = is_grpc(&self.headers);
        let result = poll_fn(|cx| {
            if !sent {
                let source = |cx: &mut std::task::Context<'_>| match tap.poll(cx) {
                    // A client that leaves its tunnel takes the copy's with it.
                    Poll::Ready(None) if tunnel => Poll::Ready(Some(Err(BodyError::Closed))),
                    next => next,
                };
                match pump.poll(cx, source, &mut upstream.send) {
                    Poll::Ready(Ok(())) => sent = true,
                    Poll::Ready(Err(PumpError::Source(_))) => return Poll::Ready(Err(Lost::Cancelled)),
                    // There may be an answer all the same.
                    Poll::Ready(Err(PumpError::Sink(_))) => {
                        sent = true;
                        tap.close();
                    }
                    Poll::Pending => {}
                }
            } else if let Poll::Ready(Err(_)) = upstream.send.poll_flush(cx) {
                tap.close();
            }
            if let Poll::Ready(()) = poll_late(&mut late, tap, timeout, cx) {
                return Poll::Ready(Err(Lost::TimedOut));
            }
            loop {
                match &mut reply {
                    None => match upstream.response.poll_head(cx) {
                        Poll::Ready(Ok(head)) if head.interim => {}
                        Poll::Ready(Ok(head)) => {
                            cluster.on_result(host, Some(Health::of_answer(head.status, &head.headers)), worker);
                            if head.status >= 500 || !grpc || head.body.is_empty() {
                                let success = head.status < 500 && (!grpc || succeeded(&head.headers));
                                host.state.stats.count(success);
                            }
                            stats.charge(head.status, true);
                            if is_canary(&head.headers, host)
                                && let Some(answers) = worker.answers(&cluster.config().stat_name, "canary".to_owned())
                            {
                                answers.charge(head.status);
                            }
                            reply = Some(head);
                        }
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(Lost::Failed(Health::Reset))),
                        Poll::Pending => return Poll::Pending,
                    },
                    Some(answer) => match answer.body.poll_frame(cx) {
                        Poll::Ready(Some(Ok(Frame::Trailers(trailers)))) if grpc && answer.status < 500 => {
                            host.state.stats.count(succeeded(&trailers));
                        }
                        Poll::Ready(Some(Ok(_))) => {}
                        // It was answered, and counted; whatever cuts the answer short matters to nobody.
                        Poll::Ready(Some(Err(_))) => return Poll::Ready(Ok(false)),
                        Poll::Ready(None) => return Poll::Ready(Ok(sent)),
                        Poll::Pending => return Poll::Pending,
                    },
                }
            }
        })
        .await;
        upstream.count_wire(&mut Default::default(), stats);
        if reply.is_some() {
            stats.took(began.elapsed().as_millis() as u64, true);
        }
        match result {
            Ok(true) => upstream.response.finish(),
            Ok(false) => upstream.send.reset(http2::Reason::NO_ERROR),
            Err(_) => super::router::cancel(stats, &mut upstream),
        }
        match result {
            // Its answer has counted.
            Err(_) if reply.is_some() => Ok(()),
            Err(lost) => Err(lost),
            Ok(_) => Ok(()),
        }
    }
}

/// Ready when the copy's time is over, which runs from the end of its request on.
fn poll_late(
    late: &mut Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
    tap: &Tap,
    timeout: Option<Duration>,
    cx: &mut std::task::Context<'_>,
) -> Poll<()> {
    let Some(timeout) = timeout.filter(|_| tap.is_ended()) else { return Poll::Pending };
    late.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout))).as_mut().poll(cx)
}
