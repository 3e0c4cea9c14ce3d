//! Downstream HTTP/2: one task per connection, and one per stream.

use super::exchange::{self, Exchange};
use super::respond::Answer;
use super::{End, Http};
use crate::h1::UnderscoreAction;
use crate::io::{Io, Out};
use crate::keepalive::{KEEPALIVE_TIMEOUT, Pinger, Pulse};
use crate::stats::{Counter, HTTP2_CODEC, HTTP2_GAUGES};
use crate::stream::RecvBody;
use crate::wire::{Connection, Turn, Wire};
use http2::{CALLBACK_FAILED, Excess, Fault, Incoming, Reason, Tally, is_rapid_reset};
use proxy_core::Headers;
use proxy_core::stream_info::HttpProtocol;
use std::future::Future;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;

/// How a connection came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The peer closed before the proxy did.
    ByPeer,
    /// The peer gets time to close.
    Gentle,
    /// Nobody waits for the peer.
    Abrupt,
}

pub(super) async fn serve(http: Rc<Http>, io: Io) {
    http.stats.downstream_cx_http2_total.inc();
    http.stats.downstream_cx_http2_active.inc();
    let options = &http.config.http2;
    let limits = http.head_limits();
    let mut codec = http2::Options::of(options, (limits.bytes, limits.fields));
    codec.stream_errors |= http.config.stream_error_on_invalid_message;
    let conn = Connection::server(codec, Out::default());
    let named = http.worker.named_stats();
    named.touch_all(&HTTP2_CODEC);
    named.touch_gauges(&HTTP2_GAUGES);
    named.inc("http2.nghttp2_downstream_connections");
    // Set once: a connection is served once.
    let _ = http.h2.set(conn.clone());
    let mut wire = Wire::new(io, conn);
    let ending = Driver::new(&http, &mut wire).run().await;
    let conn = wire.conn.clone();
    count(&http, conn.take_tally());
    // What came before a fault and was not answered never is.
    if ending == Ending::Abrupt || conn.fault().is_some_and(|fault| fault.is_silent()) {
        conn.with_out(http2::Out::clear);
    }
    conn.close();
    // As Envoy, a connection that ends here has time to hear of it.
    let wait = http.config.delayed_close_timeout.filter(|wait| !wait.is_zero() && ending == Ending::Gentle);
    let by_peer = match wait {
        _ if ending == Ending::ByPeer => true,
        Some(wait) => {
            let left = tokio::time::timeout(wait, std::future::poll_fn(|cx| wire.poll_drain(cx))).await;
            if left.is_err() {
                http.stats.downstream_cx_delayed_close_timeout.inc();
            }
            left.is_ok()
        }
        None => false,
    };
    if by_peer {
        http.stats.downstream_cx_destroy_remote.inc();
    } else {
        http.stats.downstream_cx_destroy_local.inc();
        if ending != Ending::Abrupt {
            // Nothing can be done about a peer that does not take the end.
            let _ = tokio::time::timeout(Duration::from_secs(1), std::future::poll_fn(|cx| wire.poll_end(cx))).await;
        }
    }
    http.stats.downstream_cx_http2_active.dec();
}

/// What a connection's task waits for.
enum Event {
    Request(Incoming<Out>),
    /// The peer broke its rules.
    Fault(Fault),
    /// The peer closed.
    Closed,
    /// All was said.
    Over,
    /// A PING was not answered.
    Silent,
    /// A head did not come in time; its stream, what that is called, and where it is counted.
    Late(u32, &'static str),
    /// Nothing was asked for so long.
    Idle,
    /// The connection may not live longer.
    Old,
    /// It was told to leave so long ago that it leaves.
    Drained,
    /// Look at everything again.
    Again,
    Cut,
}

/// A connection at work.
struct Driver<'a> {
    http: &'a Rc<Http>,
    wire: &'a mut Wire,
    /// The stream whose head is not complete, and since when.
    head: Option<(u32, Instant)>,
    /// When it says that it takes no more streams; it has said that it will not.
    leaves: Option<Instant>,
    idle_since: Instant,
    sleep: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

impl<'a> Driver<'a> {
    fn new(http: &'a Rc<Http>, wire: &'a mut Wire) -> Self {
        Self { http, wire, head: None, leaves: None, idle_since: Instant::now(), sleep: None }
    }

    async fn run(mut self) -> Ending {
        let http = self.http;
        let options = &http.config.http2;
        // Idle time is only looked at before requests, which a server does not make.
        let mut pinger = options.keepalive.map(|keepalive| {
            let pulse = Pulse::new();
            self.wire.pulse = Some(pulse.clone());
            Pinger::new(keepalive, self.wire.conn.clone(), pulse, http.worker.clone())
        });
        let mut cut = std::pin::pin!(http.chain.cut());
        loop {
            if is_rapid_reset(http.premature_resets.get(), http.requests.get()) {
                http.stats.downstream_rq_too_many_premature_resets.inc();
                return Ending::Abrupt;
            }
            let event = {
                let mut told = std::pin::pin!(http.told.notified());
                std::future::poll_fn(|cx| {
                    let polled = self.poll(cx);
                    if polled.is_ready() {
                        return polled;
                    }
                    if pinger.as_mut().is_some_and(|pinger| pinger.poll(cx).is_ready()) {
                        return Poll::Ready(Event::Silent);
                    }
                    if self.leaves.is_none() && told.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(Event::Again);
                    }
                    cut.as_mut().poll(cx).map(|()| Event::Cut)
                })
                .await
            };
            match event {
                Event::Request(incoming) => {
                    let last =
                        http.config.max_requests_per_connection.is_some_and(|max| http.requests.get() + 1 >= max);
                    stream(http, incoming);
                    if last {
                        http.stats.downstream_cx_max_requests_reached.inc();
                        http.leave();
                    }
                }
                Event::Fault(fault) => {
                    self.ended(Some(fault));
                    tracing::debug!(?fault, "downstream HTTP/2 connection ended");
                    return Ending::Gentle;
                }
                Event::Over => {
                    self.ended(None);
                    return Ending::Gentle;
                }
                Event::Closed => {
                    self.ended(None);
                    return Ending::ByPeer;
                }
                Event::Silent => {
                    http.worker.named_stats().inc(KEEPALIVE_TIMEOUT);
                    http.end.set(Some(End::Unanswered));
                    if http.active.get() > 0 {
                        http.stats.downstream_cx_destroy_active_rq.inc();
                        http.stats.downstream_cx_destroy_local_active_rq.inc();
                    }
                    return Ending::Abrupt;
                }
                Event::Late(id, details) => {
                    self.head = None;
                    self.refuse_late(id, details).await;
                }
                Event::Idle => {
                    http.stats.downstream_cx_idle_timeout.inc();
                    http.leave();
                }
                Event::Old => {
                    http.too_old();
                    http.leave();
                }
                Event::Drained => self.wire.conn.leave(),
                Event::Again => {}
                Event::Cut => {
                    http.end.set(Some(End::Cut));
                    if http.active.get() > 0 {
                        http.count_end_of_active();
                    }
                    return Ending::Abrupt;
                }
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let http = self.http;
        if http.leaves.get() && self.leaves.is_none() {
            self.leaves = Some(Instant::now() + http.drain_timeout);
        }
        loop {
            match self.wire.conn.accept() {
                Some(Ok(incoming)) => return Poll::Ready(Event::Request(incoming)),
                Some(Err(malformed)) => {
                    exchange::malformed(http, malformed.0);
                    continue;
                }
                None => {}
            }
            if let Some(fault) = self.wire.conn.fault() {
                return Poll::Ready(Event::Fault(fault));
            }
            let sent = self.wire.sent;
            let turn = self.wire.poll_turn(cx);
            let sent = self.wire.sent - sent;
            if sent > 0 {
                http.stats.downstream_cx_tx_bytes_total.add(sent);
                http.sent.set(http.sent.get() + sent);
            }
            count(http, self.wire.conn.take_tally());
            match turn {
                Poll::Ready(Turn::Received(came)) => {
                    http.stats.downstream_cx_rx_bytes_total.add(came as u64);
                    http.received.set(http.received.get() + came as u64);
                    let owed = self.wire.owed_head();
                    if owed != self.head.map(|(id, _)| id) {
                        self.head = owed.map(|id| (id, Instant::now()));
                    }
                }
                Poll::Ready(Turn::Closed) => return Poll::Ready(Event::Closed),
                Poll::Pending if self.wire.conn.is_over() => return Poll::Ready(Event::Over),
                Poll::Pending => return self.poll_due(cx),
            }
        }
    }

    /// Ready when the first of the times comes at which something is to be done.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let http = self.http;
        let config = &http.config;
        if http.active.get() > 0 {
            self.idle_since = Instant::now();
        }
        let late = self.head.and_then(|(id, since)| {
            let (after, details, counter) = head_timeout(http)?;
            Some((since + after, Event::Late(id, details), Some(counter)))
        });
        let idle = config.idle_timeout.filter(|_| http.active.get() == 0 && self.leaves.is_none());
        let idle = idle.map(|timeout| (self.idle_since + timeout, Event::Idle, None));
        let old = http.max_duration.filter(|_| self.leaves.is_none());
        let old = old.map(|max| (Instant::from_std(http.since) + max, Event::Old, None));
        let drained = self.leaves.filter(|_| !self.wire.conn.is_leaving()).map(|at| (at, Event::Drained, None));
        let first = [late, idle, old, drained].into_iter().flatten().min_by_key(|(at, ..)| *at);
        let Some((at, event, counter)) = first else {
            self.sleep = None;
            return Poll::Pending;
        };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if sleep.deadline() != at {
            sleep.as_mut().reset(at);
        }
        std::task::ready!(sleep.as_mut().poll(cx));
        self.sleep = None;
        if let Some(counter) = counter {
            counter.inc();
        }
        Poll::Ready(event)
    }

    /// Answers a stream whose head does not end in time.
    async fn refuse_late(&self, id: u32, details: &'static str) {
        let http = self.http;
        http.count_h2_request();
        let early = self.wire.conn.take_early(id);
        let hints = exchange::Hints::default();
        let exchange = Exchange::new(http, HttpProtocol::Http2, Headers::new(), Answer::H2(early.clone()), hints);
        exchange.refuse(408, details, false).await;
        // The rest of the request is not wanted.
        early.reset(Reason::NO_ERROR);
    }

    /// Counts and logs what a connection ended by, and has its streams know.
    fn ended(&self, fault: Option<Fault>) {
        let http = self.http;
        let stats = &http.stats;
        // A head that is not complete, or cannot be read, is a stream to Envoy.
        let headless = self.head.is_some() || self.wire.conn.is_headless();
        let mut malformed = false;
        let broken = |details, blamed| {
            stats.downstream_cx_protocol_error.inc();
            http.end.set(Some(End::Codec { details, blamed }));
        };
        match fault {
            Some(Fault::Flood(flooded)) => {
                if let Some(counter) = flooded.counter() {
                    http.worker.named_stats().inc(counter);
                }
                http.end.set(Some(End::Codec { details: flooded.details(), blamed: flooded.blames() }));
            }
            Some(Fault::Told(_)) => broken(CALLBACK_FAILED, None),
            Some(Fault::Broken(details)) => broken(details, None),
            Some(Fault::Of(stream, details)) => {
                if details != http2::UNKNOWN {
                    http.worker.named_stats().inc("http2.rx_messaging_error");
                }
                broken(CALLBACK_FAILED, Some((stream, details)));
            }
            Some(Fault::Message(details)) => {
                broken(CALLBACK_FAILED, None);
                exchange::malformed(http, details);
                malformed = true;
            }
            None => {}
        }
        if headless {
            exchange::abandoned(http, HttpProtocol::Http2, 0);
        }
        if headless || malformed || http.active.get() > 0 {
            stats.downstream_cx_destroy_active_rq.inc();
            match http.end.get() {
                Some(_) => stats.downstream_cx_destroy_local_active_rq.inc(),
                None => stats.downstream_cx_destroy_remote_active_rq.inc(),
            }
        }
    }
}

fn count(http: &Http, tally: Tally) {
    if tally == Tally::default() {
        return;
    }
    let named = http.worker.named_stats();
    let counts = [
        ("http2.rx_reset", tally.rx_reset),
        ("http2.tx_reset", tally.tx_reset),
        ("http2.trailers", tally.rx_trailers),
        ("http2.goaway_sent", tally.tx_goaway),
        ("http2.stream_refused_errors", tally.refused),
    ];
    for (name, count) in counts {
        named.add(name, count.into());
    }
}

/// How long a head may take, what it is to be called when it takes longer, and where that is counted.
fn head_timeout(http: &Http) -> Option<(Duration, &'static str, &Counter)> {
    let (config, stats) = (&http.config, &http.stats);
    let timeouts = [
        (config.request_headers_timeout, "request_header_timeout", &stats.downstream_rq_header_timeout),
        (config.stream_idle_timeout, "stream_idle_timeout", &stats.downstream_rq_idle_timeout),
        (config.request_timeout, "request_overall_timeout", &stats.downstream_rq_timeout),
        (config.max_stream_duration, "max_duration_timeout", &stats.downstream_rq_max_duration_reached),
    ];
    timeouts.into_iter().filter_map(|(after, details, counter)| Some((after?, details, counter))).min_by_key(|t| t.0)
}

/// Starts the exchange of one stream.
fn stream(http: &Rc<Http>, incoming: Incoming<Out>) {
    http.count_h2_request();
    let Incoming { stream, mut headers, excess, .. } = incoming;
    let connect = headers.get(":method") == Some(b"CONNECT");
    // What is called so is no other protocol (Envoy `HeaderUtility::isExtendedH2ConnectRequest`).
    let protocol = headers.get(":protocol").filter(|protocol| *protocol != b"bytestream").map(<[u8]>::to_vec);
    if headers.contains("host") {
        if !headers.contains(":authority")
            && let Some(host) = headers.get("host").map(<[u8]>::to_vec)
        {
            headers.set(":authority", &host);
        }
        headers.remove("host");
    }
    if headers.contains("cookie") {
        // Crumbs of one header (RFC 9113, 8.2.3), which Envoy puts behind the others.
        let crumbs = headers.get_all("cookie").filter(|crumb| !crumb.is_empty());
        let joined = crumbs.collect::<Vec<_>>().join(&b"; "[..]);
        headers.remove("cookie");
        if !joined.is_empty() {
            headers.push(b"cookie", &joined);
        }
    }
    headers.join_single();
    if let Some(protocol) = &protocol {
        // Inside it is the upgrade of HTTP/1 (Envoy `transformUpgradeRequestFromH2toH1`).
        headers.set(":method", b"GET");
        headers.remove(":protocol");
        headers.set("upgrade", protocol);
        headers.set("connection", b"upgrade");
        headers.remove("content-length");
    }
    let answer = Answer::H2(stream.clone());
    let hints = exchange::Hints {
        upgrade: protocol.is_some(),
        connect: connect && protocol.is_none(),
        expect_continue: headers.get("expect").is_some_and(|v| v.eq_ignore_ascii_case(b"100-continue")),
        absolute: None,
        header_bytes: None,
    };
    let verdict = match excess {
        Some(excess) => Err(exceeds(http, excess)),
        None => drop_or_refuse(http, &mut headers),
    };
    let mut exchange = Exchange::new(http, HttpProtocol::Http2, headers, answer, hints);
    let worker = http.worker.clone();
    worker.h2_streams().inc();
    // In a box, for a task is moved several times until it runs, and once more when it is done.
    let work = Box::pin(async move {
        match verdict {
            Ok(()) => {
                exchange.run(RecvBody::h2(stream)).await;
            }
            Err(detail) => exchange.reset(detail, Reason::INTERNAL_ERROR),
        }
        worker.h2_streams().dec();
    });
    // The stream ends with its exchange; the connection's end resets it, which the exchange notices.
    tokio::task::spawn_local(work);
}

/// What the codec of Envoy says, and counts, of more bytes or fields than there may be.
fn exceeds(http: &Http, excess: Excess) -> &'static str {
    let stats = http.worker.named_stats();
    match excess {
        Excess::Bytes => {
            stats.inc("http2.header_list_size_too_large");
            "http2.header_list_size_too_large"
        }
        // Which counts the pseudo-headers.
        Excess::Fields => {
            stats.inc("http2.header_overflow");
            "http2.too_many_headers"
        }
    }
}

/// Limits and names that the codec of Envoy checks, of trailers.
pub(super) fn check(http: &Http, trailers: &mut Headers) -> Result<(), &'static str> {
    let limits = http.head_limits();
    if trailers.byte_size() > limits.bytes {
        return Err(exceeds(http, Excess::Bytes));
    }
    if trailers.len() > limits.fields {
        return Err(exceeds(http, Excess::Fields));
    }
    drop_or_refuse(http, trailers)
}

/// Does with names that have an underscore what the configuration says.
fn drop_or_refuse(http: &Http, headers: &mut Headers) -> Result<(), &'static str> {
    let limits = http.head_limits();
    let stats = http.worker.named_stats();
    if limits.underscores != UnderscoreAction::Allow && headers.iter_regular().any(|(n, _)| n.contains(&b'_')) {
        if limits.underscores == UnderscoreAction::Reject {
            stats.inc("http2.requests_rejected_with_underscores_in_headers");
            return Err("http2.unexpected_underscore");
        }
        let dropped = headers.iter_regular().filter(|(name, _)| name.contains(&b'_')).count();
        stats.add("http2.dropped_headers_with_underscores", dropped as u64);
        headers.retain(|name, _| !name.contains(&b'_'));
    }
    Ok(())
}
