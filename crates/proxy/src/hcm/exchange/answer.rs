//! Answers: what the connection manager adds to heads, and the proxy's own.

use super::{Exchange, Outcome};
use crate::hcm::date::http_date;
use crate::hcm::encode;
use crate::hcm::grpc_web::GrpcWeb;
use crate::hcm::local_reply::LocalReply;
use crate::hcm::timers::Deadline;
use crate::stream::{Frame, Gone, Pump, PumpError, RecvBody, SendBody};
use crate::upstream::Tunnel;
use proxy_core::{FormatContext, Headers, ResponseFlags, hcm};
use std::task::Poll;
use std::time::Duration;

impl Exchange {
    /// Whether HTTP/1 connections go on after bad requests.
    fn only_stream_ends(&self) -> bool {
        let config = &self.http.config;
        config.http1.stream_error_on_invalid_message.unwrap_or(config.stream_error_on_invalid_message)
    }

    /// Applies the response changes of a route that does not answer by itself; `routed`: the answer is the router's.
    pub(crate) fn add_route_headers(&mut self, headers: &mut Headers, routed: bool) {
        if let Some(matched) = self.matched.clone().filter(|matched| !matched.route.answers()) {
            if routed && matched.vhost.include_attempt_count_in_response {
                headers.set_number("x-envoy-attempt-count", self.info.upstream.attempts.max(1).into());
            }
            let response = headers.clone();
            let cx = FormatContext::new(&self.info, Some(&self.request), Some(&response));
            matched.finalize_response(headers, &cx);
        }
    }

    /// Sends the head of an answer, with what the connection manager adds.
    pub(crate) fn send_head(&mut self, mut headers: Headers, end: bool, tunnel: bool) -> SendBody {
        let http = self.http.clone();
        for addition in self.add_to_response.drain(..) {
            addition.apply(&mut headers);
        }
        // Filters see the answers to bad heads, too.
        encode::head(self, &mut headers);
        crate::hcm::span::answer_head(self, &mut headers);
        if !headers.contains("date") {
            http_date(self.info.start + self.elapsed(), |date| headers.push_lower("date", date));
        }
        hcm::conform_response(&http.config, &mut headers, &self.request);
        if let Some(tell) = &http.config.proxy_status {
            tell.apply(&mut headers, &self.info);
        }
        let status = headers.status().unwrap_or(500);
        if http.closing() || http.too_old() || self.ends_for_overload() {
            self.answer.close_after();
        }
        self.info.response_code = Some(status);
        self.info.times.downstream_first_tx = Some(self.elapsed());
        let (body, bytes) = self.answer.head(status, &mut headers, end, tunnel, http.config.http1.enable_trailers);
        self.info.downstream_header_bytes_sent += bytes;
        if !self.body_done {
            http.stats.downstream_rq_response_before_rq_complete.inc();
        }
        self.response = Some(headers);
        // As Envoy, health checks say nothing of the service.
        if !self.info.health_check {
            self.http.stats.downstream_rq.inc(status);
            self.http.of_listener.downstream_rq.inc(status);
        }
        if tunnel && http.config.access_log_on_tunnel {
            self.log("DownstreamTunnelSuccessfullyEstablished");
        }
        body
    }

    /// Sends an answer of the proxy itself.
    pub(crate) async fn reply(&mut self, reply: LocalReply) -> Outcome {
        let flags = reply.flags;
        if !reply.flagged_late {
            self.info.flags.insert(flags);
        }
        self.info.response_code_details = Some(reply.details.clone());
        // Of a bad request nobody knows where it ends (Envoy `ActiveStream::sendLocalReply`).
        if reply.close || (reply.status == 400 && !self.only_stream_ends()) {
            self.answer.close_after();
        }
        let (mut headers, mut body) = reply.render(self);
        match &self.web {
            None => self.note_grpc(&headers),
            // Said in the head, and no call's own end.
            Some(_) if !body.is_empty() && GrpcWeb::is_foreign(&headers) => {
                GrpcWeb::explain(&mut headers, &std::mem::take(&mut body));
            }
            Some(_) => {}
        }
        self.info.flags.insert(flags);
        let body = if self.request.method() == Some("HEAD") { Default::default() } else { body };
        let sink = self.send_head(headers, body.is_empty(), false);
        self.info.bytes_sent = body.len() as u64;
        let mut source =
            RecvBody::Memory(if body.is_empty() { Default::default() } else { [Frame::Data(body)].into() });
        let outcome = self.send_rest(&mut source, sink).await;
        if !self.body_done
            && !self.answer.is_h1()
            && let Some(reason) = self.why_reset()
        {
            // First the connection writes the answer, which a reset would take back.
            tokio::task::yield_now().await;
            self.answer.reset(reason);
        }
        outcome
    }

    /// The code of the reset of a stream whose request is given up, if it says more than that (Envoy
    /// `ConnectionManagerImpl::doEndStream`).
    pub(crate) fn why_reset(&self) -> Option<http2::Reason> {
        let lost = [ResponseFlags::UPSTREAM_CONNECTION_FAILURE, ResponseFlags::UPSTREAM_TERMINATION];
        let lost = self.hints.tunnel() != Tunnel::No && lost.iter().any(|flag| self.info.flags.contains(*flag));
        lost.then_some(http2::Reason::CONNECT_ERROR)
    }

    /// Writes the rest of an answer that only its client has no room for (HTTP/2). The request is over when that has left
    /// (Envoy `ActiveStream::onCodecEncodeComplete`); who makes no room for all of it in time loses it (`ConnectionImpl::
    /// StreamImpl::onPendingFlushTimer`), or at once when its request is given up.
    pub(super) async fn flush(&mut self) {
        let Some(mut sink) = self.unsent.take() else { return };
        if !self.body_done {
            // First the connection writes what there is room for.
            tokio::task::yield_now().await;
            return sink.reset(http2::Reason::INTERNAL_ERROR);
        }
        let timeout = self.flush_timeout();
        let worker = self.http.worker.clone();
        let held = sink.is_held();
        let work = async move {
            let flush = std::future::poll_fn(|cx| sink.poll_flush(cx));
            let flushed = match timeout {
                Some(timeout) => tokio::time::timeout(timeout, flush).await.ok(),
                None => Some(flush.await),
            };
            if flushed.is_none() {
                worker.named_stats().inc("http2.tx_flush_timeout");
                sink.reset(http2::Reason::INTERNAL_ERROR);
            }
            flushed.unwrap_or(Ok(()))
        };
        if !held {
            // To Envoy's codec, what waits for the socket has left. It ends with its connection, or with the timeout.
            tokio::task::spawn_local(Box::pin(work));
            return;
        }
        let flushed = Box::pin(work).await;
        self.timers.waited();
        match flushed {
            Ok(()) => self.info.times.downstream_last_tx = Some(self.elapsed()),
            Err(e) => self.gone(Gone::from(&e)),
        }
    }

    /// How long a client may take to make room: the route's time, the manager's, or else the idle timeout, which the route
    /// can only set, not turn off (Envoy `ActiveStream::refreshIdleAndFlushTimeouts`).
    fn flush_timeout(&self) -> Option<Duration> {
        let config = &self.http.config;
        let route = self.matched.as_ref().and_then(|matched| matched.forward());
        let own = route.and_then(|route| route.flush_timeout).or(config.stream_flush_timeout);
        own.unwrap_or_else(|| route.and_then(|route| route.idle_timeout.flatten()).or(config.stream_idle_timeout))
    }

    /// Sends a body that is at hand.
    async fn send_rest(&mut self, source: &mut RecvBody, mut sink: SendBody) -> Outcome {
        let mut pump = Pump::new();
        let mut later = false;
        let mut gone = Gone::Closed;
        // A client that does not read is given up after the idle timeout.
        self.timers.clear(Deadline::Request);
        self.timers.clear(Deadline::Global);
        let result = std::future::poll_fn(|cx| {
            if let Poll::Ready(done) = pump.poll(cx, |cx| source.poll_frame(cx), &mut sink) {
                if let Err(PumpError::Sink(e)) = &done {
                    gone = Gone::from(e);
                }
                return Poll::Ready(done.is_ok());
            }
            if pump.has_read_all() && sink.is_h2() {
                later = true;
                return Poll::Ready(true);
            }
            match self.poll_deadline(cx) {
                Poll::Ready(_) => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
        if later {
            self.unsent = Some(sink);
        }
        if result {
            self.info.times.downstream_last_tx = Some(self.elapsed());
            Outcome::Done
        } else {
            self.gone(gone);
            Outcome::Aborted
        }
    }
}
