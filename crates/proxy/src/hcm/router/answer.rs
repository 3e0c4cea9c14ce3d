//! Passing an answer on to the client.

use super::counted::Told;
use super::outgoing::Outgoing;
use super::why::Why;
use super::{Plan, asks_for_websocket, cancel};
use crate::hcm::encode::{self, Throttle};
use crate::hcm::exchange::{Exchange, Outcome, Stop};
use crate::hcm::grpc_web::{GrpcWeb, foreign_body};
use crate::hcm::local_reply::LocalReply;
use crate::hcm::timers::Deadline;
use crate::stream::{BodyError, Frame, Gone, Pump, PumpError, RecvBody, SendBody};
use crate::upstream::{Failure, Reply, Tunnel, Upstream};
use proxy_core::retry::http_status_of_grpc;
use proxy_core::route::Matched;
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{FormatContext, Headers, ResponseFlags};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use tokio::io::AsyncWrite;

/// Passes an answer on to the client, while the rest of the request still goes up.
pub(super) async fn pass_on(
    exchange: &mut Exchange,
    plan: &Plan<'_>,
    outgoing: &mut Outgoing<'_>,
    reply: Box<Reply>,
    mut upstream: Box<Upstream>,
    mut up_pump: Pump,
    mut sent: bool,
) -> Result<Outcome, Stop> {
    let stats = &plan.cluster.stats;
    let Reply { status, mut headers, mut body, tunnel: accepted, .. } = *reply;
    let told = Told::of(exchange, &headers);
    if refuses_websocket(exchange, upstream.protocol, status) {
        // The body would be no handshake's (Envoy `UpstreamCodecFilter::CodecBridge::decodeHeaders`).
        upstream.count_wire(&mut exchange.info.upstream, stats);
        let mut reply = LocalReply::new(status, "", "websocket_handshake_unsuccessful");
        reply.headers =
            headers.iter_regular().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), v.to_vec())).collect();
        return Err(reply.into());
    }
    plan.counted.answer(exchange, &plan.cluster, status, told);
    let end = body.is_empty();
    let host = exchange.info.upstream.host.clone();
    let count = |success| host.iter().for_each(|host| host.state.stats.count(success));
    // Of gRPC the end tells (Envoy `Filter::handleNon5xxResponseHeaders`).
    let deferred = status < 500 && exchange.grpc && !end;
    match status {
        500.. => count(false),
        _ if deferred => {}
        _ => count(!exchange.grpc || succeeded(&headers)),
    }

    // A POST can open a connection, too, but its answer is framed as any other.
    let tunnel = accepted && (exchange.hints.upgrade || exchange.hints.connect);
    outgoing.paused &= match exchange.hints.tunnel() {
        Tunnel::No => !accepted,
        Tunnel::Upgrade => status != 101,
        Tunnel::Connect => !(200..300).contains(&status),
    };
    let service_time = exchange.elapsed().saturating_sub(exchange.info.times.upstream_first_tx.unwrap_or_default());
    // Envoy measures from the end of the request, so an early answer has no such time.
    if !plan.suppress_envoy_headers && exchange.body_done {
        headers.set_number("x-envoy-upstream-service-time", service_time.as_millis() as u64);
    }
    if plan.matched.vhost.include_attempt_count_in_response {
        headers.set_number("x-envoy-attempt-count", exchange.info.upstream.attempts.into());
    }
    if let Some(cookie) = &plan.cookie {
        // Each choice of a host adds it anew.
        for _ in 0..exchange.info.upstream.attempts {
            headers.push_lower("set-cookie", cookie.0.as_bytes());
        }
    }
    let http = exchange.http.clone();
    exchange.peer.pass_answer(&mut headers, &http, plan.cluster.config());
    exchange.info.response_code = Some(status);
    exchange.info.response_code_details = Some("via_upstream".into());
    if has_response_ops(plan.matched) {
        exchange.info.bytes_received = exchange.info.bytes_received.max(outgoing.received);
        let response = headers.clone();
        let cx = FormatContext::new(&exchange.info, Some(&exchange.request), Some(&response));
        plan.matched.finalize_response(&mut headers, &cx);
    }
    exchange.info.response_code_details = Some("via_upstream".into());
    if exchange.info.upstream.protocol == Some(HttpProtocol::Http2) || exchange.grpc {
        // Trailers-only answers carry the status in the head.
        exchange.note_grpc(&headers);
    }
    let end = body.is_empty();
    if !exchange.body_done && !tunnel && exchange.answer.is_h1() {
        exchange.answer.close_after();
    }
    exchange.timers.clear(Deadline::PerTry);
    exchange.timers.clear(Deadline::Request);
    if tunnel {
        exchange.timers.clear(Deadline::Global);
        exchange.timers.clear(Deadline::PerTryIdle);
    }
    // As `grpc_stats`, which counts no messages in what is not an answer of gRPC.
    let grpc = exchange.messages.is_some() && status == 200 && super::super::exchange::is_grpc(&headers);
    let mut end = end;
    if !end && exchange.web.is_some() && GrpcWeb::is_foreign(&headers) {
        let text = foreign_body(exchange, &mut body).await?;
        GrpcWeb::explain(&mut headers, &text);
        (body, end) = (RecvBody::Empty, true);
    }
    let mut sink = exchange.send_head(headers, end, tunnel);
    let mut web = exchange.web.take();
    if upstream.protocol != HttpProtocol::Http2 {
        sink.end_apart();
    }
    let mut down_pump = Pump::new();
    let drop_trailers = upstream.protocol != HttpProtocol::Http2 && !plan.cluster.config().http1.enable_trailers;
    let connected = exchange.hints.connect;
    let raw = exchange.tunnel.is_some() && !tunnel;
    // The upstream that leaves such a tunnel leaves, to Envoy's codec, an answer that is not complete.
    let endless = tunnel && upstream.protocol != HttpProtocol::Http2 && exchange.tunnel.is_none();
    let mut throttle = exchange.throttle.take();
    let mut messages = exchange.messages.take();
    let mut trailers = None;
    let mut upstream_failed = None;
    // The client is slower than the answer.
    let mut later = false;
    // The host wants nothing more of the request.
    let mut refused = false;
    let ended: Result<(), Broken> = poll_fn(|cx| {
        let mut moved = false;
        if !sent && !refused {
            let before = up_pump.bytes;
            match up_pump.poll(cx, |cx| outgoing.poll_changed(cx, exchange), &mut upstream.send) {
                // On HTTP/2 a client that has said all still listens.
                Poll::Ready(Ok(())) if tunnel && exchange.answer.is_h1() => {
                    return Poll::Ready(Err(Broken::Client(Gone::Closed)));
                }
                Poll::Ready(Ok(())) => {
                    if let (true, SendBody::H1 { conn, .. }) = (raw || (tunnel && connected), &upstream.send) {
                        // The end of a request's body is that of the host's input. A host that is gone shows on its own side.
                        let _ = std::task::ready!(Pin::new(&mut conn.borrow_mut().io).poll_shutdown(cx));
                    }
                    sent = true;
                    exchange.request_complete();
                }
                Poll::Ready(Err(PumpError::Source(e))) => {
                    return Poll::Ready(Err(Broken::Client(Gone::from(&e))));
                }
                // The answer decides. On HTTP/2 the request is given up with it, unless it was complete.
                Poll::Ready(Err(PumpError::Sink(_))) if upstream.protocol == HttpProtocol::Http2 => {
                    sent = exchange.body_done;
                    refused = true;
                }
                Poll::Ready(Err(PumpError::Sink(_))) => sent = true,
                Poll::Pending if outgoing.paused && outgoing.ended && exchange.answer.is_h1() => {
                    return Poll::Ready(Err(Broken::Client(Gone::Closed)));
                }
                Poll::Pending => {}
            }
            moved |= before != up_pump.bytes;
        }
        let before = down_pump.bytes;
        let polled = down_pump.poll(
            cx,
            |cx| {
                let frame = match &mut throttle {
                    Some(throttle) => throttle.poll(cx, &mut body),
                    None => body.poll_frame(cx),
                };
                if let (true, Some(messages), Poll::Ready(Some(Ok(Frame::Data(data))))) = (grpc, &mut messages, &frame)
                {
                    messages[1].look(data);
                }
                let frame = match frame {
                    Poll::Ready(Some(Ok(Frame::Trailers(_)))) if drop_trailers => body.poll_frame(cx),
                    Poll::Ready(Some(Ok(Frame::Trailers(mut t)))) => {
                        encode::response_trailers(exchange, &mut t);
                        trailers = Some(t.clone());
                        Poll::Ready(Some(Ok(Frame::Trailers(t))))
                    }
                    Poll::Ready(None) if endless => Poll::Ready(Some(Err(BodyError::Closed))),
                    other => other,
                };
                match (frame, &mut web) {
                    (Poll::Ready(Some(Ok(frame))), Some(web)) => Poll::Ready(Some(Ok(web.frame(frame)))),
                    (frame, _) => frame,
                }
            },
            &mut sink,
        );
        moved |= before != down_pump.bytes;
        match polled {
            Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
            Poll::Ready(Err(PumpError::Source(e))) => {
                upstream_failed = Some(e);
                return Poll::Ready(Err(Broken::Upstream));
            }
            Poll::Ready(Err(PumpError::Sink(e))) => {
                return Poll::Ready(Err(Broken::Client(Gone::from(&e))));
            }
            Poll::Pending if down_pump.has_read_all() && !tunnel && sink.is_h2() => {
                later = true;
                return Poll::Ready(Ok(()));
            }
            Poll::Pending => {}
        }
        if moved {
            exchange.timers.touch(Deadline::Idle);
            exchange.timers.touch(Deadline::PerTryIdle);
        }
        if throttle.as_ref().is_some_and(Throttle::has_read_all) {
            for deadline in [Deadline::Global, Deadline::PerTryIdle, Deadline::UpstreamStream] {
                exchange.timers.clear(deadline);
            }
        }
        if let Poll::Ready(e) = sink.poll_reset(cx) {
            return Poll::Ready(Err(Broken::Client(Gone::from(&e))));
        }
        if exchange.answer.is_h1()
            && exchange.body_done
            && !tunnel
            && let Poll::Ready(gone) = exchange.answer.poll_gone(cx, true)
        {
            return Poll::Ready(Err(Broken::Client(gone)));
        }
        // A record written meanwhile tells how far it is.
        exchange.info.bytes_sent = down_pump.bytes;
        match exchange.poll_deadline(cx) {
            Poll::Ready(deadline) => Poll::Ready(Err(Broken::Deadline(deadline))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    exchange.messages = messages;
    exchange.web = web.take();
    upstream.count_wire(&mut exchange.info.upstream, stats);
    if upstream.protocol == HttpProtocol::Http2 {
        // Frames are not counted, only what is in them.
        let info = &mut exchange.info.upstream;
        info.wire_bytes_sent = info.header_bytes_sent + up_pump.bytes;
        info.wire_bytes_received = info.header_bytes_received + down_pump.bytes;
        stats.upstream_cx_tx_bytes_total.add(info.wire_bytes_sent);
        stats.upstream_cx_rx_bytes_total.add(info.wire_bytes_received);
    }
    exchange.info.bytes_sent = down_pump.bytes;
    let elapsed = exchange.elapsed();
    exchange.info.times.upstream_last_rx = Some(elapsed);
    exchange.info.times.downstream_last_tx = ended.is_ok().then_some(elapsed);
    plan.counted.took(exchange, &plan.cluster, elapsed.as_millis() as u64, told);
    // A client that leaves says nothing about the host.
    if deferred && matches!(ended, Ok(()) | Err(Broken::Upstream)) {
        count(ended.is_ok() && trailers.as_ref().is_some_and(succeeded));
    }
    if let Some(trailers) = trailers {
        exchange.note_grpc(&trailers);
        // A browser's are part of the body.
        exchange.trailers = exchange.web.is_none().then_some(trailers);
    }
    match ended {
        Ok(()) => {
            if let Some(counted) = exchange.tunnel.as_ref().filter(|_| sent) {
                counted.left();
            }
            if later {
                exchange.unsent = Some(sink);
            }
            if sent {
                upstream.response.finish();
            } else {
                if let SendBody::H1 { conn, .. } = &upstream.send
                    && !tunnel
                    && conn.borrow().has_more()
                {
                    stats.upstream_cx_protocol_error.inc();
                }
                upstream.send.reset(http2::Reason::INTERNAL_ERROR);
                if upstream.protocol == HttpProtocol::Http2 {
                    stats.upstream_rq_tx_reset.inc();
                }
                exchange.answered_early();
            }
            Ok(if tunnel { Outcome::Tunnel } else { Outcome::Done })
        }
        Err(Broken::Upstream) => {
            let failure = match upstream_failed {
                // Envoy's HTTP/1 codec calls an incomplete message a protocol error.
                Some(BodyError::Closed) if upstream.protocol != HttpProtocol::Http2 && !tunnel => {
                    Failure::Protocol("incomplete")
                }
                Some(e) => e.into(),
                None => Failure::Terminated,
            };
            match failure {
                // On HTTP/2 the rest of an answer breaks its stream only.
                Failure::Protocol(_) | Failure::Blamed if upstream.protocol == HttpProtocol::Http2 => {
                    stats.upstream_rq_tx_reset.inc();
                    upstream.send.reset(http2::Reason::PROTOCOL_ERROR);
                }
                Failure::Protocol(_) => stats.upstream_cx_protocol_error.inc(),
                // To Envoy's codec that is no reset.
                Failure::Terminated if endless => {}
                Failure::Terminated if upstream.protocol == HttpProtocol::Http2 => {
                    stats.upstream_rq_pending_failure_eject.inc();
                }
                Failure::Refused | Failure::Blamed | Failure::Connect => {}
                Failure::Reset | Failure::Terminated => stats.upstream_rq_rx_reset.inc(),
            }
            let why = Why::Stream(failure);
            exchange.info.flags.insert(why.flags());
            exchange.info.response_code_details = Some(why.details("after").into());
            // Envoy counts those whose success was not certain with the head.
            if super::super::exchange::is_grpc(&exchange.request) {
                exchange.http.stats.rq_reset_after_downstream_response_started.inc();
            }
            exchange.http.stats.downstream_rq_tx_reset.inc();
            // Envoy's callback for resets in any direction.
            exchange.http.stats.downstream_rq_rx_reset.inc();
            let reason = exchange.why_reset().unwrap_or(http2::Reason::INTERNAL_ERROR);
            abort(exchange, sink, reason).await;
            Ok(Outcome::Aborted)
        }
        Err(Broken::Client(gone)) => {
            cancel(stats, &mut upstream);
            if tunnel && matches!(gone, Gone::Closed) && !exchange.http.was_cut() {
                exchange.http.stats.downstream_rq_rx_reset.inc();
                exchange.info.flags.insert(ResponseFlags::DOWNSTREAM_TERMINATION);
                exchange.info.response_code_details = Some("downstream_remote_disconnect".into());
                return Ok(Outcome::Tunnel);
            }
            Err(Stop::Gone(gone))
        }
        Err(Broken::Deadline(deadline)) => {
            cancel(stats, &mut upstream);
            let (flag, details) = match deadline {
                Deadline::Idle => {
                    exchange.http.stats.downstream_rq_idle_timeout.inc();
                    (ResponseFlags::STREAM_IDLE_TIMEOUT, "stream_idle_timeout")
                }
                Deadline::Stream => {
                    exchange.http.stats.downstream_rq_max_duration_reached.inc();
                    (ResponseFlags::NONE, "max_duration_timeout")
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
                    plan.counted.each(|stats| stats.upstream_rq_timeout.inc());
                    (ResponseFlags::UPSTREAM_TIMEOUT, "response_timeout")
                }
            };
            exchange.info.flags.insert(flag);
            exchange.info.response_code_details = Some(details.into());
            exchange.http.stats.downstream_rq_tx_reset.inc();
            exchange.http.stats.downstream_rq_rx_reset.inc();
            abort(exchange, sink, http2::Reason::INTERNAL_ERROR).await;
            Ok(Outcome::Aborted)
        }
    }
}

/// Whether the answer to a WebSocket handshake is one that neither accepts it nor says that it failed.
fn refuses_websocket(exchange: &Exchange, protocol: HttpProtocol, status: u16) -> bool {
    protocol == HttpProtocol::Http11 && status != 101 && status < 400 && asks_for_websocket(exchange)
}

/// Whether any level changes response headers.
fn has_response_ops(matched: &Matched) -> bool {
    matched.weighted.is_some()
        || !matched.route.response_ops.is_empty()
        || !matched.vhost.response_ops.is_empty()
        || !matched.table.response_ops.is_empty()
}

/// Why an answer could not be passed on to its end.
enum Broken {
    Client(Gone),
    Upstream,
    Deadline(Deadline),
}

/// What was read is written, then the stream is cut.
async fn abort(exchange: &mut Exchange, mut sink: SendBody, reason: http2::Reason) {
    let flush = poll_fn(|cx| sink.poll_flush(cx));
    // A client that does not read loses the rest at once.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(100), flush).await;
    if !exchange.answer.is_h1() {
        // Its connection writes the head, if that is still to be written: a reset would take it back.
        tokio::task::yield_now().await;
    }
    exchange.timers.waited();
    sink.reset(reason);
}

/// Whether gRPC's status, which must be there, is none of a server's failure.
pub(crate) fn succeeded(fields: &Headers) -> bool {
    fields.get_str("grpc-status").is_some_and(|status| http_status_of_grpc(status.parse().ok()) < 500)
}
