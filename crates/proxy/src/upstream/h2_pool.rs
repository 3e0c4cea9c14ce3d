//! HTTP/2 connections of a pool: each shared by many requests, opened one at a time.

use super::connect::{ConnectError, ConnectionFacts, open};
use super::h2_watch::{Fate, Watch};
use super::pool::{Counted, Pool};
use crate::batch::Batch;
use crate::io::Io;
use crate::keepalive::{KEEPALIVE_TIMEOUT, Pinger, Pulse};
use crate::stats::{ClusterStats, HTTP2_CODEC};
use bytes::Bytes;
use proxy_core::Host;
use proxy_core::circuit::Resource;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

#[derive(Default)]
pub(crate) struct H2Pool {
    connections: RefCell<Vec<Rc<Inner>>>,
    opening: Cell<bool>,
    /// Told when a connection is open, or ended, or has room again for a crowd.
    opened: Rc<Notify>,
    /// Requests that wait because the circuit breaker allows no further connection.
    crowd: Rc<Cell<u32>>,
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
    /// The pool's.
    crowd: Rc<Cell<u32>>,
    room: Rc<Notify>,
    /// A connection that was silent for so long is asked whether it is there.
    pulse: Option<(Rc<Pulse>, Duration)>,
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
        inner.requests.set(inner.requests.get() + 1);
        if let Some((pulse, idle)) = &inner.pulse {
            pulse.ask_after(*idle);
        }
        if inner.max_requests.is_some_and(|max| inner.requests.get() >= max) {
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
        headers.byte_size() <= bytes as usize && headers.len() <= fields as usize
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
        self.inner.idle_since.set(Instant::now());
        if self.inner.crowd.get() > 0 {
            self.inner.room.notify_waiters();
        }
    }
}

impl H2Pool {
    /// A connection with room, if one is open.
    pub(super) fn ready(&self, host: &Host) -> Option<H2Connection> {
        let mut connections = self.connections.borrow_mut();
        // A host that failed since is not trusted with the same connections.
        connections.retain(|c| !c.fate.is_closed() && c.failures == host.state.failures());
        connections.iter().filter(|c| c.streams.get() < c.max_streams).find_map(H2Connection::new)
    }

    /// Opens one, or waits for the one that is being opened.
    pub(super) async fn connect(&self, pool: &Rc<Pool>) -> Result<H2Connection, ConnectError> {
        let permit = loop {
            if let Some(ready) = self.ready(&pool.host) {
                return Ok(ready);
            }
            if self.opening.get() {
                self.opened.notified().await;
                continue;
            }
            match pool.may_connect() {
                Some(permit) => break permit,
                // Envoy always lets a pool have one connection.
                None if pool.open.get() == 0 => break pool.breaker().force(Resource::Connections),
                None => {
                    self.crowd.set(self.crowd.get() + 1);
                    self.opened.notified().await;
                    self.crowd.set(self.crowd.get() - 1);
                }
            }
        };
        self.opening.set(true);
        let _opening = Opening(self);
        let counted = pool.count(Some(permit));
        let opened = open(&pool.cluster, &pool.host, pool.tls.as_deref(), &pool.variant, &pool.worker.shared).await;
        let (io, facts) = opened.inspect_err(|e| counted.by_peer.set(!e.timeout))?;
        self.adopt(pool, io, Rc::new(facts), counted).await
    }

    /// Speaks HTTP/2 on a connection that is open.
    pub(super) async fn adopt(
        &self,
        pool: &Rc<Pool>,
        io: Io,
        facts: Rc<ConnectionFacts>,
        counted: Counted,
    ) -> Result<H2Connection, ConnectError> {
        let config = pool.cluster.config();
        let options = &config.http2;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(options.initial_stream_window)
            .initial_connection_window_size(options.initial_connection_window)
            .max_concurrent_reset_streams(64)
            .enable_push(false)
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
        let streams = Rc::new(Cell::new(0));
        let busy = streams.clone();
        let driver = fate.clone();
        let opened = self.opened.clone();
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
            opened.notify_waiters();
        });
        let now = Instant::now();
        let inner = Rc::new(Inner {
            send,
            facts,
            streams,
            stats: pool.cluster.stats.clone(),
            requests: Cell::new(0),
            max_requests: config.max_requests_per_connection,
            max_streams: options.max_concurrent_streams,
            max_head: (config.max_response_header_bytes(false), config.max_response_headers),
            fate,
            stream_errors: options.stream_error_on_invalid_message,
            idle_since: Cell::new(now),
            opened: now,
            failures: pool.host.state.failures(),
            crowd: self.crowd.clone(),
            room: self.opened.clone(),
            pulse,
        });
        let ended = || ConnectError { timeout: false, reason: "the connection ended at once".to_owned() };
        let handle = H2Connection::new(&inner).ok_or_else(ended)?;
        self.connections.borrow_mut().push(inner);
        pool.cluster.sweep();
        Ok(handle)
    }

    pub(super) fn sweep(&self, now: Instant, timeout: Option<Duration>, stats: &ClusterStats) -> bool {
        let mut connections = self.connections.borrow_mut();
        connections.retain(|c| {
            let idle = c.streams.get() == 0 && timeout.is_some_and(|t| now.duration_since(c.idle_since.get()) >= t);
            if idle {
                stats.upstream_cx_idle_timeout.inc();
                tracing::debug!(age = ?now.duration_since(c.opened), "closing an idle HTTP/2 connection");
            }
            !idle && !c.fate.is_closed()
        });
        !connections.is_empty()
    }

    /// New requests go elsewhere; the connection ends with its last stream.
    pub(super) fn drain(&self) {
        self.connections.borrow_mut().clear();
    }
}

struct Opening<'a>(&'a H2Pool);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.opening.set(false);
        self.0.opened.notify_waiters();
    }
}
