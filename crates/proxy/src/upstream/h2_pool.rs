//! HTTP/2 connections of a pool: each shared by many requests.

use super::connect::{ConnectError, ConnectionFacts, Protocol};
use super::pool::{Counted, Pool};
use super::request::Failure;
use crate::io::Io;
use crate::io::Out;
use crate::keepalive::{KEEPALIVE_TIMEOUT, Pinger, Pulse};
use crate::stats::{ClusterStats, HTTP2_CODEC, HTTP2_GAUGES};
use crate::wire::{Connection, Stream, Turn, Wire};
use http2::{Broken, Fault, Reason, Tally};
use proxy_core::{Headers, Host};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

#[derive(Default)]
pub(crate) struct H2Pool {
    connections: RefCell<Vec<Rc<Inner>>>,
}

struct Inner {
    conn: Connection,
    facts: Rc<ConnectionFacts>,
    /// The cluster's.
    stats: Arc<ClusterStats>,
    streams: Rc<Cell<u32>>,
    /// Requests ever sent.
    requests: Cell<u32>,
    max_requests: Option<u32>,
    max_duration: Option<Duration>,
    max_streams: u32,
    /// Bytes and number of an answer's fields.
    max_head: (u32, u32),
    /// It takes no more requests, by our own word.
    closed: Cell<bool>,
    idle_since: Cell<Instant>,
    opened: Instant,
    /// How many times the host had failed when it was made.
    failures: u32,
    pool: Weak<Pool>,
    /// A connection that was silent for so long is asked whether it is there.
    pulse: Option<(Rc<Pulse>, Duration)>,
}

impl Inner {
    fn is_closed(&self) -> bool {
        self.closed.get() || !self.conn.is_open()
    }

    /// Whether it has lived as long as it may; then it takes no more requests.
    fn is_too_old(&self) -> bool {
        let old = self.max_duration.is_some_and(|max| self.opened.elapsed() >= max);
        if old && !self.is_closed() {
            self.stats.upstream_cx_max_duration_reached.inc();
            self.closed.set(true);
        }
        old
    }

    /// By the cluster's and by the host's word.
    fn most_streams(&self) -> u32 {
        self.max_streams.min(self.conn.max_streams())
    }
}

impl Drop for Inner {
    /// It ends with its last stream.
    fn drop(&mut self) {
        self.conn.release();
    }
}

/// A request's share of a connection.
pub(crate) struct H2Connection {
    inner: Rc<Inner>,
}

impl H2Connection {
    /// `None` when it takes no more requests.
    fn new(inner: &Rc<Inner>) -> Option<Self> {
        if inner.is_closed() {
            return None;
        }
        inner.streams.set(inner.streams.get() + 1);
        inner.stats.http2_streams_active.inc();
        inner.requests.set(inner.requests.get() + 1);
        if let Some((pulse, idle)) = &inner.pulse {
            pulse.ask_after(*idle);
        }
        if inner.max_requests.is_some_and(|max| inner.requests.get() >= max) {
            inner.stats.upstream_cx_max_requests.inc();
            inner.closed.set(true);
        }
        Some(Self { inner: inner.clone() })
    }

    /// Sends a request's head, without what is of HTTP/1 only, which a route may have added. `None` when the connection has ended.
    pub(super) fn send(&self, head: &Headers, end: bool) -> Option<Stream> {
        let mut plain = None;
        if head.method() == Some("CONNECT") && !head.contains(":protocol") {
            // RFC 9113, 8.5.
            let plain = plain.insert(head.clone());
            plain.remove(":scheme");
            plain.remove(":path");
        }
        self.inner.conn.open(plain.as_ref().unwrap_or(head), end, |name, value| match name {
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" => false,
            b"te" => value == b"trailers",
            _ => true,
        })
    }

    /// What it is to a request that it broke before its answer.
    pub(super) fn failure(&self, broken: Broken) -> Failure {
        match broken {
            Broken::Reset(Reason::REFUSED_STREAM) | Broken::Refused => Failure::Refused,
            Broken::Reset(Reason::PROTOCOL_ERROR) => Failure::Blamed,
            Broken::Reset(Reason::CONNECT_ERROR) => Failure::Connect,
            Broken::Reset(_) => Failure::Reset,
            Broken::Malformed(details) => Failure::Protocol(details.unwrap_or(http2::VIOLATION)),
            // Envoy's codec client blames the host for all that was under way on such a connection.
            Broken::Protocol => Failure::Protocol(http2::VIOLATION),
            Broken::Closed | Broken::Given => {
                self.inner.stats.upstream_rq_pending_failure_eject.inc();
                Failure::Terminated
            }
        }
    }

    pub(crate) fn facts(&self) -> &Rc<ConnectionFacts> {
        &self.inner.facts
    }

    /// Whether the head of an answer is within the cluster's limits.
    pub(super) fn accepts(&self, headers: &Headers) -> bool {
        let (bytes, fields) = self.inner.max_head;
        let (fits, few) = (headers.byte_size() <= bytes as usize, headers.len() <= fields as usize);
        if !fits {
            self.inner.stats.other.inc("http2.header_list_size_too_large");
        } else if !few {
            self.inner.stats.other.inc("http2.header_overflow");
        }
        fits && few
    }
}

impl Drop for H2Connection {
    fn drop(&mut self) {
        self.inner.streams.set(self.inner.streams.get() - 1);
        self.inner.stats.http2_streams_active.dec();
        self.inner.idle_since.set(Instant::now());
        if let Some(pool) = self.inner.pool.upgrade() {
            pool.serve();
        }
    }
}

impl H2Pool {
    /// A connection with room, if one is open.
    pub(super) fn ready(&self, host: &Host) -> Option<H2Connection> {
        let mut connections = self.connections.borrow_mut();
        // A host that failed since is not trusted with the same connections.
        connections.retain(|c| !c.is_closed() && c.failures == host.state.failures() && !c.is_too_old());
        connections.iter().filter(|c| c.streams.get() < c.most_streams()).find_map(H2Connection::new)
    }

    /// Connections, requests on them, and how many more they take.
    pub(super) fn load(&self) -> (usize, usize, usize) {
        let connections = self.connections.borrow();
        let add = |(streams, room): (usize, usize), c: &Rc<Inner>| {
            let used = c.streams.get();
            let left = c.max_requests.map_or(u32::MAX, |max| max.saturating_sub(c.requests.get()));
            let free = if c.is_closed() { 0 } else { c.most_streams().saturating_sub(used).min(left) };
            (streams + used as usize, room + free as usize)
        };
        let (streams, room) = connections.iter().fold((0, 0), add);
        (connections.len(), streams, room)
    }

    /// Speaks HTTP/2 on a connection that is open.
    pub(super) async fn adopt(
        &self,
        pool: &Rc<Pool>,
        io: Io,
        facts: Rc<ConnectionFacts>,
        counted: Counted,
    ) -> Result<(), ConnectError> {
        let config = pool.cluster.config();
        let options = &config.http2;
        let max_head = (config.max_response_header_bytes(false), config.max_response_headers);
        let codec = http2::Options::of(options, (max_head.0 as usize, max_head.1 as usize));
        let conn = Connection::client(codec, Out::default());
        let mut wire = Wire::new(io, conn.clone());
        let mut pulse = None;
        let mut pinger = options.keepalive.map(|keepalive| {
            let own = Pulse::new();
            wire.pulse = Some(own.clone());
            pulse = keepalive.idle_interval.map(|idle| (own.clone(), idle));
            Pinger::new(keepalive, conn.clone(), own, pool.worker.clone())
        });
        let stats = pool.cluster.stats.clone();
        if pool.variant.protocol == Protocol::Auto {
            count_codec(&stats);
        }
        let streams = Rc::new(Cell::new(0));
        let busy = streams.clone();
        // The driver owns the connection and ends with it; requests find out through their streams.
        tokio::task::spawn_local(async move {
            let counted = counted;
            // Whoever waited for it speaks first, whatever the host has said by now.
            tokio::task::yield_now().await;
            let driven = std::future::poll_fn(|cx| {
                loop {
                    // First, so that a PING goes out before the request that wants to know.
                    if let Some(pinger) = &mut pinger
                        && pinger.poll(cx).is_ready()
                    {
                        return Poll::Ready(Ending::Unanswered);
                    }
                    let turn = wire.poll_turn(cx);
                    count(&stats, wire.conn.take_tally());
                    match turn {
                        Poll::Ready(Turn::Closed) => return Poll::Ready(Ending::ByPeer),
                        _ if wire.conn.fault().is_some() || wire.conn.is_over() => return Poll::Ready(Ending::Here),
                        Poll::Ready(Turn::Received(_)) => {}
                        Poll::Pending => return Poll::Pending,
                    }
                }
            });
            match driven.await {
                // What the proxy ends has no request that counts: it was refused, or broke the connection itself.
                Ending::Here => {
                    let fault = wire.conn.fault();
                    // Closing while frames are taken is an error to Envoy's codec, as well (`setAndCheckCodecCallbackStatus`).
                    if fault.is_some() || wire.conn.is_over_by_answer() {
                        stats.upstream_cx_protocol_error.inc();
                    }
                    if let Some(Fault::Flood(flooded)) = fault
                        && let Some(counter) = flooded.counter()
                    {
                        stats.other.inc(counter);
                    }
                    if fault.is_some_and(|fault| fault.is_silent()) {
                        wire.conn.with_out(http2::Out::clear);
                    }
                }
                Ending::ByPeer => {
                    counted.by_peer.set(true);
                    counted.busy.set(busy.get() > 0);
                }
                Ending::Unanswered => {
                    counted.busy.set(busy.get() > 0);
                    stats.other.inc(KEEPALIVE_TIMEOUT);
                }
            }
        });
        let now = Instant::now();
        let inner = Rc::new(Inner {
            conn,
            facts,
            streams,
            stats: pool.cluster.stats.clone(),
            requests: Cell::new(0),
            max_requests: config.max_requests_per_connection,
            max_duration: config.max_connection_duration,
            max_streams: options.max_concurrent_streams,
            max_head,
            closed: Cell::new(false),
            idle_since: Cell::new(now),
            opened: now,
            failures: pool.host.state.failures(),
            pool: Rc::downgrade(pool),
            pulse,
        });
        self.connections.borrow_mut().push(inner);
        pool.cluster.sweep();
        Ok(())
    }

    pub(super) fn sweep(&self, now: Instant, timeout: Option<Duration>, stats: &ClusterStats) -> bool {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|c| {
            let idle = c.streams.get() == 0 && timeout.is_some_and(|t| now.duration_since(c.idle_since.get()) >= t);
            if idle {
                stats.upstream_cx_idle_timeout.inc();
                tracing::debug!(age = ?now.duration_since(c.opened), "closing an idle HTTP/2 connection");
            }
            !idle && !c.is_closed() && !c.is_too_old()
        });
        !connections.is_empty()
    }

    /// New requests go elsewhere; the connection ends with its last stream.
    pub(super) fn drain(&self) {
        self.connections.borrow_mut().clear();
    }
}

/// How a connection came to its end.
enum Ending {
    ByPeer,
    Here,
    /// A PING was not answered.
    Unanswered,
}

/// Counts a connection of HTTP/2: when it is begun, or once it is negotiated.
pub(super) fn count_codec(stats: &ClusterStats) {
    stats.other.touch_all(&HTTP2_CODEC);
    stats.other.touch_gauges(&HTTP2_GAUGES);
    stats.other.inc("http2.nghttp2_upstream_connections");
}

fn count(stats: &ClusterStats, tally: Tally) {
    if tally == Tally::default() {
        return;
    }
    let other = &stats.other;
    stats.upstream_cx_close_notify.add(tally.rx_goaway.into());
    other.add("http2.rx_reset", tally.rx_reset.into());
    other.add("http2.tx_reset", tally.tx_reset.into());
    other.add("http2.rx_messaging_error", tally.malformed.into());
    other.add("http2.header_list_size_too_large", tally.large_trailers.into());
    other.add("http2.header_overflow", tally.many_trailers.into());
}
