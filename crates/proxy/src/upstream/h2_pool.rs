//! HTTP/2 connections of a pool: each shared by many requests.

use super::connect::{ConnectError, ConnectionFacts};
use super::h2_watch::{Fate, Watch};
use super::pool::{Counted, Pool};
use crate::batch::Batch;
use crate::io::Io;
use crate::keepalive::{KEEPALIVE_TIMEOUT, Pinger, Pulse};
use crate::stats::{ClusterStats, HTTP2_CODEC, HTTP2_GAUGES};
use bytes::Bytes;
use proxy_core::Host;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Default)]
pub(crate) struct H2Pool {
    connections: RefCell<Vec<Rc<Inner>>>,
}

struct Inner {
    send: h2::client::SendRequest<Bytes>,
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
    /// Whether it may take more requests.
    fate: Rc<Fate>,
    /// Malformed answers end their stream only.
    stream_errors: bool,
    idle_since: Cell<Instant>,
    opened: Instant,
    /// How many times the host had failed when it was made.
    failures: u32,
    pool: Weak<Pool>,
    /// A connection that was silent for so long is asked whether it is there.
    pulse: Option<(Rc<Pulse>, Duration)>,
}

impl Inner {
    /// Whether it has lived as long as it may; then it takes no more requests.
    fn is_too_old(&self) -> bool {
        let old = self.max_duration.is_some_and(|max| self.opened.elapsed() >= max);
        if old && !self.fate.is_closed() {
            self.stats.upstream_cx_max_duration_reached.inc();
            self.fate.close();
        }
        old
    }

    /// By the cluster's and by the host's word.
    fn most_streams(&self) -> u32 {
        self.max_streams.min(u32::try_from(self.send.current_max_send_streams()).unwrap_or(u32::MAX))
    }
}

/// A request's share of a connection.
pub(crate) struct H2Connection {
    inner: Rc<Inner>,
    send: h2::client::SendRequest<Bytes>,
}

impl H2Connection {
    /// `None` when it takes no more requests.
    fn new(inner: &Rc<Inner>) -> Option<Self> {
        if inner.fate.is_closed() {
            return None;
        }
        let mut send = inner.send.clone();
        // A handle that has sent nothing waits for nothing: this only finds connections that have ended.
        if let Poll::Ready(Err(_)) = send.poll_ready(&mut Context::from_waker(Waker::noop())) {
            inner.fate.close();
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
            inner.fate.close();
        }
        Some(Self { inner: inner.clone(), send })
    }

    /// Queues a request's head.
    pub(super) fn send(
        &mut self,
        request: http::Request<()>,
        end: bool,
    ) -> Result<(h2::client::ResponseFuture, h2::SendStream<Bytes>), h2::Error> {
        let sent = self.send.send_request(request, end);
        if sent.is_err() {
            self.inner.fate.close();
        }
        sent
    }

    pub(super) fn stats(&self) -> &ClusterStats {
        &self.inner.stats
    }

    pub(crate) fn facts(&self) -> &Rc<ConnectionFacts> {
        &self.inner.facts
    }

    /// Whether the head of an answer is within the cluster's limits.
    pub(super) fn accepts(&self, headers: &proxy_core::Headers) -> bool {
        let (bytes, fields) = self.inner.max_head;
        let (fits, few) = (headers.byte_size() <= bytes as usize, headers.len() <= fields as usize);
        if !fits {
            self.inner.stats.other.inc("http2.header_list_size_too_large");
        } else if !few {
            self.inner.stats.other.inc("http2.header_overflow");
        }
        fits && few
    }

    /// Whether the connection ended for a malformed answer.
    pub(super) fn is_blamed(&self) -> bool {
        self.inner.fate.is_cut()
    }

    /// An answer is malformed. As Envoy, the connection ends with it, unless only streams are to
    /// (`override_stream_error_on_invalid_http_message`).
    pub(super) fn blame(&self) {
        self.inner.stats.other.inc("http2.rx_messaging_error");
        if !self.inner.stream_errors {
            self.inner.fate.cut();
        }
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
        connections.retain(|c| !c.fate.is_closed() && c.failures == host.state.failures() && !c.is_too_old());
        connections.iter().filter(|c| c.streams.get() < c.most_streams()).find_map(H2Connection::new)
    }

    /// Connections, requests on them, and how many more they take.
    pub(super) fn load(&self) -> (usize, usize, usize) {
        let connections = self.connections.borrow();
        let add = |(streams, room): (usize, usize), c: &Rc<Inner>| {
            let used = c.streams.get();
            let left = c.max_requests.map_or(u32::MAX, |max| max.saturating_sub(c.requests.get()));
            let free = if c.fate.is_closed() { 0 } else { c.most_streams().saturating_sub(used).min(left) };
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
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(options.initial_stream_window)
            .initial_connection_window_size(options.initial_connection_window)
            .max_concurrent_reset_streams(64)
            .enable_push(false)
            // Until the host has said how many it takes.
            .initial_max_send_streams(options.max_concurrent_streams as usize)
            .max_send_buffer_size(256 * 1024);
        let failed = |e: h2::Error| ConnectError { timeout: false, reason: format!("{e}") };
        let (io, outlet) = Batch::new(io, true);
        let fate = Fate::new(pool.cluster.stats.clone());
        let watch = Watch::new(io, fate.clone());
        let (send, mut connection) = builder.handshake(watch).await.map_err(failed)?;
        let mut pulse = None;
        let mut pinger = options.keepalive.and_then(|keepalive| {
            let own = Pulse::new();
            outlet.tell(own.clone());
            pulse = keepalive.idle_interval.map(|idle| (own.clone(), idle));
            Some(Pinger::new(keepalive, connection.ping_pong()?, own, pool.worker.clone()))
        });
        let stats = pool.cluster.stats.clone();
        stats.other.touch_all(&HTTP2_CODEC);
        stats.other.touch_gauges(&HTTP2_GAUGES);
        stats.other.inc("http2.nghttp2_upstream_connections");
        let streams = Rc::new(Cell::new(0));
        let busy = streams.clone();
        let driver = fate.clone();
        // The driver owns the connection and ends with it; requests find out through their streams.
        tokio::task::spawn_local(async move {
            let counted = counted;
            let driven = std::future::poll_fn(|cx| {
                driver.drive(cx.waker());
                // First, so that a PING goes out before the request that wants to know.
                if let Some(pinger) = &mut pinger
                    && pinger.poll(cx).is_ready()
                {
                    return Poll::Ready(None);
                }
                let polled = Pin::new(&mut connection).poll(cx);
                outlet.poll_out(cx);
                polled.map(Some)
            });
            let ending = driven.await;
            match ending {
                Some(result) => {
                    // What the proxy ends has no request that counts: it was refused, or broke the connection itself.
                    let by_peer = driver.is_by_peer();
                    counted.by_peer.set(by_peer);
                    counted.busy.set(by_peer && busy.get() > 0);
                    if let Err(e) = result {
                        tracing::debug!(error = %e, "upstream HTTP/2 connection ended");
                    }
                }
                None => {
                    counted.busy.set(busy.get() > 0);
                    stats.other.inc(KEEPALIVE_TIMEOUT);
                }
            }
            driver.close();
        });
        let now = Instant::now();
        let inner = Rc::new(Inner {
            send,
            facts,
            streams,
            stats: pool.cluster.stats.clone(),
            requests: Cell::new(0),
            max_requests: config.max_requests_per_connection,
            max_duration: config.max_connection_duration,
            max_streams: options.max_concurrent_streams,
            max_head: (config.max_response_header_bytes(false), config.max_response_headers),
            fate,
            stream_errors: options.stream_error_on_invalid_message,
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
            !idle && !c.fate.is_closed() && !c.is_too_old()
        });
        !connections.is_empty()
    }

    /// New requests go elsewhere; the connection ends with its last stream.
    pub(super) fn drain(&self) {
        self.connections.borrow_mut().clear();
    }
}
