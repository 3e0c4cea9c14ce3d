//! One request and its answer: preparation, filters, router, log and counters.

mod answer;
mod grpc;
mod prepare;
mod unread;

pub(crate) use grpc::is_grpc;
pub(crate) use unread::{abandoned, malformed};

use super::encode::{self, GrpcMessages, Session, Throttle};
use super::grpc_web::GrpcWeb;
use super::local_reply::LocalReply;
use super::record::{self, Steps};
use super::redirect::Redirected;
use super::respond::Answer;
use super::timers::{Deadline, Timers};
use super::{End, Http, filters, router};
use crate::h1;
use crate::peer;
use crate::stream::{Frame, Gone, RecvBody, SendBody, header_bytes};
use crate::upstream::{Tunnel, WorkerCluster};
use mesh_types::ArcStr;
use proxy_core::filters::HttpFilterEntry;
use proxy_core::hcm;
use proxy_core::route::{HashContext, Matched, PreviousRoutes, RouteInput, RouteResult};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{AccessLog, FormatContext, Headers, ResponseFlags, StreamInfo};
use std::borrow::Cow;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

/// What the codec knows beside the head.
#[derive(Default)]
pub(crate) struct Hints {
    pub(crate) upgrade: bool,
    pub(crate) connect: bool,
    pub(crate) expect_continue: bool,
    /// Scheme of an absolute request target.
    pub(crate) absolute: Option<&'static str>,
    /// Bytes of the fields as they came, see [`header_bytes`]; the codec of HTTP/2 does not tell.
    pub(crate) header_bytes: Option<u64>,
}

impl Hints {
    pub(crate) fn tunnel(&self) -> Tunnel {
        match (self.upgrade, self.connect) {
            (true, _) => Tunnel::Upgrade,
            (_, true) => Tunnel::Connect,
            _ => Tunnel::No,
        }
    }
}

/// A request that its client takes back earlier counts as an attack (Envoy's
/// `overload.premature_reset_min_stream_lifetime_seconds`).
const PREMATURE: Duration = Duration::from_secs(1);

/// How an exchange left its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The answer is complete.
    Done,
    /// It is, and came at once: an HTTP/1 connection that is to end does so after its delay, for to Envoy's codec the request
    /// is not over yet.
    AtOnce,
    /// The answer is not complete; an HTTP/1 connection ends after its delay.
    Aborted,
    /// The connection was a tunnel and is over.
    Tunnel,
}

/// Why work on a request stopped.
pub(crate) enum Stop {
    /// Answer this.
    Reply(Box<LocalReply>),
    /// The upstream's redirect is followed.
    Redirect(Box<Redirected>, u16),
    /// The client is gone.
    Gone(Gone),
}

impl From<LocalReply> for Stop {
    fn from(reply: LocalReply) -> Self {
        Stop::Reply(Box::new(reply))
    }
}

/// The state of one request.
pub(crate) struct Exchange {
    pub(crate) http: Rc<Http>,
    pub(crate) info: StreamInfo,
    pub(crate) request: Headers,
    pub(crate) response: Option<Headers>,
    pub(crate) trailers: Option<Headers>,
    pub(crate) answer: Answer,
    pub(crate) hints: Hints,
    pub(crate) matched: Option<Rc<Matched>>,
    /// The cluster that the route led to when it was found, and the state of the table then.
    cluster: Option<(Rc<WorkerCluster>, u64)>,
    pub(crate) timers: Timers,
    pub(crate) conformed: bool,
    /// Fields that filters want on the answer.
    pub(crate) add_to_response: Vec<encode::AddToAnswer>,
    /// Why it is traced, if requests are (`4`: it is not).
    pub(crate) trace_reason: char,
    /// The span, when requests are traced.
    pub(crate) span: Option<Box<super::span::Span>>,
    /// What was decided so far.
    pub(crate) steps: Steps,
    /// The stateful session, when its filter ran.
    pub(crate) session: Option<Session>,
    /// Slows the answer's body.
    pub(crate) throttle: Option<Throttle>,
    /// Counts as long as it is here.
    pub(crate) fault: Option<filters::ActiveFault>,
    /// Internal redirects followed so far.
    pub(crate) redirects: u32,
    /// Where they led, for those that may not lead there again.
    pub(crate) previous_routes: PreviousRoutes,
    /// gRPC messages of request and answer, when they are to be counted.
    pub(crate) messages: Option<Box<[GrpcMessages; 2]>>,
    /// Where the call of gRPC is counted, as it was when the filters that count saw it.
    pub(crate) call: Option<Box<grpc::Call>>,
    /// The same for a browser's.
    pub(crate) web_call: Option<Box<grpc::Call>>,
    pub(crate) peer: peer::RequestPeer,
    pub(crate) grpc: bool,
    /// A browser's call of gRPC.
    pub(crate) web: Option<Box<GrpcWeb>>,
    pub(crate) grpc_status: Option<u32>,
    pub(crate) body_done: bool,
    /// A filter or the router waited for something.
    pub(crate) waited: bool,
    /// An upgrade or CONNECT was let through; with the place of its own filters in the configuration, if it has some.
    pub(crate) upgraded: Option<Option<usize>>,
    /// What of the answer the client has no room for (HTTP/2).
    pub(crate) unsent: Option<SendBody>,
    /// Keeps a tunnel's upstream connection counted.
    pub(crate) tunnel: Option<crate::upstream::Counted>,
    /// `require_tls` of the virtual host: answer with this location.
    pub(crate) redirect_to_tls: Option<String>,
    /// A filter's bound on what is kept of a body.
    pub(crate) body_limit: Option<u32>,
    /// The filters that may be passed over, as far as they were reached.
    pub(super) passed_over: Vec<filters::PassedOver>,
}

impl Exchange {
    pub(crate) fn new(http: &Rc<Http>, protocol: HttpProtocol, request: Headers, answer: Answer, hints: Hints) -> Self {
        http.stats.downstream_rq_total.inc();
        if protocol != HttpProtocol::Http2 {
            http.stats.downstream_rq_http1_total.inc();
        }
        http.stats.downstream_rq_active.inc();
        http.active.set(http.active.get() + 1);
        let mut timers = Timers::default();
        timers.start();
        timers.set_idle(Deadline::Idle, http.config.stream_idle_timeout);
        timers.set(Deadline::Stream, http.config.max_stream_duration);
        timers.set(Deadline::Log, http.config.access_log_flush_interval);
        // Without a path it is no call (Envoy `Grpc::Common::isGrpcRequestHeaders`).
        let grpc = is_grpc(&request) && request.contains(":path");
        let header_bytes = hints.header_bytes.unwrap_or_else(|| header_bytes(&request, 3));
        // Made in its place: it is too large to be moved for every request.
        let mut exchange = Self {
            http: http.clone(),
            info: StreamInfo::new(http.info.clone(), SystemTime::now()),
            request,
            response: None,
            trailers: None,
            answer,
            hints,
            matched: None,
            cluster: None,
            timers,
            conformed: false,
            add_to_response: Vec::new(),
            trace_reason: '4',
            span: None,
            steps: Steps::with_room_for(http.config.filters.len()),
            session: None,
            throttle: None,
            fault: None,
            redirects: 0,
            previous_routes: PreviousRoutes::default(),
            messages: None,
            call: None,
            web_call: None,
            peer: peer::RequestPeer::default(),
            grpc,
            web: None,
            grpc_status: None,
            body_done: false,
            waited: false,
            upgraded: None,
            unsent: None,
            tunnel: None,
            redirect_to_tls: None,
            body_limit: None,
            passed_over: Vec::new(),
        };
        exchange.info.protocol = Some(protocol);
        exchange.info.downstream_header_bytes_received = header_bytes;
        exchange
    }

    /// Time since the request began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.timers.elapsed()
    }

    /// Serves the request.
    pub(crate) async fn run(&mut self, mut body: RecvBody) -> Outcome {
        if body.is_empty() {
            self.request_complete();
        } else {
            self.timers.set(Deadline::Request, self.http.config.request_timeout);
        }
        let mut result = match self.is_overloaded() {
            true => Err(self.overloaded().into()),
            false => self.prepare(),
        };
        let outcome = loop {
            let served = match result {
                Ok(()) => self.serve(&mut body).await,
                Err(stop) => Err(stop),
            };
            match served {
                Err(Stop::Redirect(redirected, status)) => {
                    body = self.redirect_to(*redirected, status);
                    result = Ok(());
                }
                done => break done,
            }
        };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(Stop::Reply(reply)) => {
                // What a filter held back was counted as it came.
                if self.waited && !self.body_done {
                    self.take_what_came(&mut body);
                }
                if !self.body_done {
                    // The rest of the request is not waited for.
                    self.answer.close_after();
                    self.answered_early();
                }
                match self.reply(*reply).await {
                    Outcome::Done if !self.waited => Outcome::AtOnce,
                    outcome => outcome,
                }
            }
            Err(Stop::Gone(gone)) => {
                if !self.body_done {
                    self.take_what_came(&mut body);
                }
                self.gone(gone);
                Outcome::Aborted
            }
            Err(Stop::Redirect(..)) => Outcome::Aborted,
        };
        self.flush().await;
        self.finish();
        outcome
    }

    /// How many bytes of a body may be kept; on HTTP/2 as many as a stream's window has (Envoy `StreamImpl::bufferLimit`).
    pub(crate) fn buffer_limit(&self) -> u32 {
        let http = &self.http;
        if let Some(limit) = self.body_limit {
            return limit;
        }
        if self.answer.is_h1() {
            http.listener.per_connection_buffer_limit
        } else {
            http.config.http2.initial_stream_window
        }
    }

    /// During a wait Envoy would have read on: a request that is all there by now is complete.
    fn take_what_came(&mut self, body: &mut RecvBody) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut size = 0;
        body.forget_kept();
        while size < self.buffer_limit() as usize {
            match body.poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                    size += data.len();
                    self.info.bytes_received += data.len() as u64;
                }
                Poll::Ready(Some(Ok(Frame::Trailers(_)))) => {}
                Poll::Ready(None) => return self.request_complete(),
                Poll::Ready(Some(Err(_))) | Poll::Pending => return,
            }
        }
    }

    /// There is an answer before the end of the request, whose rest is given up: to Envoy, a reset.
    pub(crate) fn answered_early(&self) {
        self.http.stats.downstream_rq_rx_reset.inc();
    }

    async fn serve(&mut self, body: &mut RecvBody) -> Result<Outcome, Stop> {
        self.find_route();
        self.steps.route(self.elapsed());
        if self.redirects == 0 {
            super::span::begin(self);
        }
        if self.redirects == 0 && self.http.config.access_log_on_new_request {
            self.log("DownstreamStart");
        }
        self.check_upgrade()?;
        filters::run(self, body).await?;
        router::route(self, body).await
    }

    /// Answers a head that the codec refused.
    pub(crate) async fn refuse(mut self, status: u16, detail: &'static str, protocol: bool) {
        let flags = match detail {
            _ if protocol => ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
            "stream_idle_timeout" => ResponseFlags::STREAM_IDLE_TIMEOUT,
            _ => ResponseFlags::NONE,
        };
        let body = match detail {
            _ if protocol => h1::reason_phrase(status),
            "request_header_timeout" => "request header timeout",
            "stream_idle_timeout" => "stream timeout",
            "max_duration_timeout" => "downstream duration timeout",
            _ => "request timeout",
        };
        let mut reply = LocalReply::new(status, body, detail);
        reply.flags = flags;
        reply.flagged_late = protocol;
        self.answered_early();
        self.reply(reply).await;
        self.flush().await;
        self.finish();
    }

    /// Resets a stream that the codec refused (HTTP/2).
    pub(crate) fn reset(mut self, detail: &'static str, reason: http2::Reason) {
        self.answer.reset(reason);
        self.info.flags.insert(ResponseFlags::DOWNSTREAM_RESET);
        self.info.response_code_details = Some(Cow::Borrowed(detail));
        // A reset by the codec counts as one that came.
        self.http.stats.downstream_rq_rx_reset.inc();
        // Envoy logs these without the request.
        self.request = Headers::new();
        self.finish();
    }

    /// The filters that this request passes.
    pub(crate) fn filters<'a>(&self, config: &'a hcm::HttpConnectionManager) -> &'a [HttpFilterEntry] {
        let own = self.upgraded.flatten().and_then(|own| config.upgrades.get(own)?.filters.as_deref());
        own.unwrap_or(&config.filters)
    }

    /// Looks up the route and takes over what it says about the whole stream.
    pub(crate) fn find_route(&mut self) {
        let Some(table) = self.http.route_table() else { return };
        let input = RouteInput {
            headers: &self.request,
            metadata: &self.info.dynamic_metadata,
            filter_state: &self.info.filter_state,
            tls: self.http.info.tls.as_deref(),
            random: self.http.worker.random.borrow_mut().next(),
        };
        match table.find(&input) {
            RouteResult::Found(mut matched) => {
                matched.draw_by_hash(&HashContext {
                    headers: &self.request,
                    remote: &self.info.remote,
                    local: &self.http.info.local,
                    filter_state: &self.info.filter_state,
                });
                self.info.route = Some(matched.route.clone());
                self.info.virtual_host = Some(matched.vhost.clone());
                if let Some(forward) = matched.forward()
                    && let Some(idle) = forward.idle_timeout
                {
                    self.timers.set_idle(Deadline::Idle, idle);
                }
                let max = matched.max_stream_duration(&self.request, self.http.config.max_stream_duration);
                let left = max.map(|max| max.saturating_sub(self.elapsed()));
                self.timers.set(Deadline::Stream, left);
                let worker = &self.http.worker;
                let cluster = matched.cluster(&self.request).and_then(|name| worker.cluster(&name));
                if let Some(cluster) = &cluster {
                    self.info.upstream.cluster = Some(cluster.config().name.clone());
                    self.info.upstream.cluster_stat_name = Some(cluster.config().stat_name.clone());
                    self.info.upstream.cluster_metadata = Some(cluster.config().metadata().clone());
                }
                self.cluster = cluster.map(|cluster| (cluster, worker.table_changes.get()));
                self.matched = Some(Rc::new(matched));
            }
            RouteResult::RedirectToTls(vhost, location) => {
                self.info.virtual_host = Some(vhost);
                self.redirect_to_tls = Some(location);
            }
            RouteResult::NoRoute(vhost) => self.info.virtual_host = Some(vhost),
            RouteResult::NoVirtualHost => {}
        }
    }

    /// The request goes to this cluster; mostly it was named when the route was found.
    pub(crate) fn name_cluster(&mut self, cluster: &WorkerCluster) {
        let config = cluster.config();
        let info = &mut self.info.upstream;
        if !info.cluster.as_ref().is_some_and(|known| Arc::ptr_eq(known, &config.name)) {
            info.cluster = Some(config.name.clone());
            info.cluster_stat_name = Some(config.stat_name.clone());
            info.cluster_metadata = Some(config.metadata().clone());
        }
    }

    /// The cluster of that name; mostly it was found with the route.
    pub(crate) fn cluster(&mut self, name: &ArcStr) -> Option<Rc<WorkerCluster>> {
        let worker = &self.http.worker;
        let known = self.cluster.take();
        let known =
            known.filter(|(cluster, changes)| *changes == worker.table_changes.get() && cluster.config().name == *name);
        known.map(|(cluster, _)| cluster).or_else(|| worker.cluster(name))
    }

    /// Drops the cached route, after a filter changed what it depends on.
    pub(crate) fn clear_route(&mut self) {
        self.steps.settle(&self.info);
        self.matched = None;
        self.info.route = None;
        self.info.virtual_host = None;
        self.info.upstream.cluster = None;
        self.info.upstream.cluster_stat_name = None;
        self.info.upstream.cluster_metadata = None;
        self.find_route();
    }

    /// The whole request was read.
    pub(crate) fn request_complete(&mut self) {
        if !self.body_done {
            self.body_done = true;
            self.info.times.request_received = Some(self.elapsed());
            self.timers.clear(Deadline::Request);
        }
    }

    /// Waits for `work` while the client and the clock are watched.
    pub(crate) async fn wait<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Stop> {
        let mut work = std::pin::pin!(work);
        std::future::poll_fn(|cx| {
            let polled = self.poll_with(cx, |cx| work.as_mut().poll(cx).map(Ok));
            self.waited |= polled.is_pending();
            polled
        })
        .await
    }

    /// Polls `work`, then whether the client is gone or a deadline of the stream passed.
    pub(crate) fn poll_with<T>(
        &mut self,
        cx: &mut Context<'_>,
        work: impl FnOnce(&mut Context<'_>) -> Poll<Result<T, Stop>>,
    ) -> Poll<Result<T, Stop>> {
        if let Poll::Ready(done) = work(cx) {
            return Poll::Ready(done);
        }
        if let Poll::Ready(gone) = self.answer.poll_gone(cx, self.body_done) {
            return Poll::Ready(Err(Stop::Gone(gone)));
        }
        if let Poll::Ready(deadline) = self.poll_deadline(cx) {
            return Poll::Ready(Err(self.deadline(deadline)));
        }
        Poll::Pending
    }

    /// What a passed deadline means before the router has sent the request.
    pub(crate) fn deadline(&mut self, deadline: Deadline) -> Stop {
        match deadline {
            Deadline::Request => {
                self.http.stats.downstream_rq_timeout.inc();
                let mut reply = LocalReply::new(408, "request timeout", "request_overall_timeout");
                reply.close = true;
                reply.into()
            }
            Deadline::Idle => {
                self.http.stats.downstream_rq_idle_timeout.inc();
                let status = if self.body_done { 504 } else { 408 };
                let mut reply = LocalReply::new(status, "stream timeout", "stream_idle_timeout");
                reply.flags = ResponseFlags::STREAM_IDLE_TIMEOUT;
                reply.into()
            }
            Deadline::Stream => {
                self.http.stats.downstream_rq_max_duration_reached.inc();
                let status = if self.body_done { 504 } else { 408 };
                let mut reply = LocalReply::new(status, "downstream duration timeout", "max_duration_timeout");
                reply.grpc_status = Some(4);
                reply.into()
            }
            _ => LocalReply::new(504, "upstream request timeout", "response_timeout").into(),
        }
    }

    /// The client went away.
    pub(crate) fn gone(&mut self, gone: Gone) {
        let stats = &self.http.stats;
        stats.downstream_rq_rx_reset.inc();
        let end = self.http.end.get();
        if let (Gone::Reset(_), None, None) = (gone, end, self.info.response_code)
            && self.elapsed() < PREMATURE
        {
            self.http.premature_resets.set(self.http.premature_resets.get() + 1);
        }
        let (flag, details) = match (gone, end) {
            (Gone::Refused(details), _) => {
                self.answer.reset(http2::Reason::INTERNAL_ERROR);
                (ResponseFlags::DOWNSTREAM_RESET, details)
            }
            // To Envoy that is no reset.
            (Gone::Reset(http2::Reason::NO_ERROR), None) if self.body_done => return,
            (Gone::Malformed(Some(details)), None) => {
                self.http.worker.named_stats().inc("http2.rx_messaging_error");
                (ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR, details)
            }
            (Gone::Reset(http2::Reason::PROTOCOL_ERROR) | Gone::Malformed(None), None) => {
                (ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR, "http2.remote_reset")
            }
            (Gone::Reset(http2::Reason::REFUSED_STREAM), None) => {
                (ResponseFlags::DOWNSTREAM_RESET, "http2.remote_refuse")
            }
            (Gone::Reset(_), None) => (ResponseFlags::DOWNSTREAM_RESET, "http2.remote_reset"),
            (Gone::Closed, None) => {
                if self.answer.is_h1() {
                    self.http.count_end_of_active();
                }
                (ResponseFlags::DOWNSTREAM_TERMINATION, "downstream_remote_disconnect")
            }
            (_, Some(End::Cut)) => {
                if self.answer.is_h1() {
                    self.http.count_end_of_active();
                }
                (ResponseFlags::DOWNSTREAM_TERMINATION, End::CUT)
            }
            // The crate calls the end of a connection a reset of its streams.
            (_, Some(End::Unanswered)) => {
                (ResponseFlags::DOWNSTREAM_TERMINATION, "downstream_local_disconnect(http2_ping_timeout)")
            }
            (_, Some(End::Codec { details, blamed })) => {
                let own = blamed.filter(|(stream, _)| self.answer.stream() == Some(*stream));
                let details = own.map_or(details, |(_, details)| details);
                (ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR, details)
            }
        };
        self.info.flags.insert(flag);
        self.info.response_code_details = Some(details.into());
    }

    /// Logs and counts.
    fn finish(&mut self) {
        let http = self.http.clone();
        let elapsed = self.elapsed();
        self.info.times.complete = Some(elapsed);
        http.stats.downstream_rq_active.dec();
        http.active.set(http.active.get().saturating_sub(1));
        if self.upgraded.is_some() {
            http.stats.downstream_cx_upgrades_active.dec();
        }
        super::span::count(self);
        if self.conformed {
            http.stats.downstream_rq_time.record(elapsed.as_millis() as u64);
        }
        if let Some((received, sent)) = self.answer.wire() {
            (self.info.downstream_wire_bytes_received, self.info.downstream_wire_bytes_sent) = (received, sent);
        } else {
            self.info.downstream_wire_bytes_received =
                self.info.downstream_header_bytes_received + self.info.bytes_received;
            self.info.downstream_wire_bytes_sent = self.info.downstream_header_bytes_sent + self.info.bytes_sent;
        }
        self.count_grpc();
        self.tell_messages();
        peer::report(self, elapsed);
        self.log("DownstreamEnd");
        super::span::end(self);
        record::remember(self);
    }

    /// Writes the access log.
    pub(super) fn log(&self, kind: &'static str) {
        self.log_to(&self.http.config.access_log, kind, self.response.as_ref());
    }

    /// Writes records about this stream as it is now.
    pub(crate) fn log_to(&self, logs: &[Arc<AccessLog>], kind: &'static str, response: Option<&Headers>) {
        if logs.is_empty() {
            return;
        }
        let mut context = FormatContext::new(&self.info, Some(&self.request), response);
        context.trailers = self.trailers.as_ref();
        context.access_log_type = kind;
        crate::log::write(&self.http.worker, logs, &context);
    }

    /// The next deadline that means something; those of the log write a record on the way.
    pub(crate) fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Deadline> {
        loop {
            match self.timers.poll(cx) {
                Poll::Ready(Deadline::Log) => {
                    self.info.times.complete = Some(self.elapsed());
                    self.log("DownstreamPeriodic");
                    self.info.times.complete = None;
                    self.timers.set(Deadline::Log, self.http.config.access_log_flush_interval);
                }
                other => return other,
            }
        }
    }
}

/// Serves one request of an HTTP/1 connection.
pub(super) async fn serve(
    http: Rc<Http>,
    protocol: HttpProtocol,
    request: Headers,
    answer: Answer,
    hints: Hints,
    body: RecvBody,
) -> Outcome {
    Exchange::new(&http, protocol, request, answer, hints).run(body).await
}
