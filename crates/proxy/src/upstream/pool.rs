//! Connections of one host and variant: idle HTTP/1 ones are reused last in, first out; HTTP/2 ones are shared.

use super::WorkerCluster;
use super::connect::{ConnectError, ConnectionFacts, Protocol, Variant, open};
use super::h2_pool::{H2Connection, H2Pool};
use crate::h1;
use crate::io::Io;
use crate::tls::ClientTls;
use crate::worker::Worker;
use proxy_core::Host;
use proxy_core::circuit::{Breaker, Permit, Resource};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Waker};
use std::time::Instant;
use tokio::sync::oneshot;

pub(crate) struct Pool {
    pub(super) worker: Rc<Worker>,
    pub(super) cluster: Rc<WorkerCluster>,
    pub(super) host: Arc<Host>,
    pub(super) variant: Variant,
    pub(super) tls: Option<Arc<ClientTls>>,
    idle: RefCell<Vec<PooledH1>>,
    /// Open or opening connections of this pool.
    pub(super) open: Cell<usize>,
    /// Requests waiting for a connection because the circuit breaker allows no new one; the oldest first.
    waiting: RefCell<VecDeque<oneshot::Sender<Option<PooledH1>>>>,
    pub(super) h2: H2Pool,
    /// The circuit breaker's leave for a pool; TCP's are not counted.
    _permit: Option<Permit>,
}

/// An HTTP/1 connection with what it holds.
pub(crate) struct PooledH1 {
    pub(crate) conn: h1::Shared,
    pub(crate) facts: Rc<ConnectionFacts>,
    counted: Counted,
    requests: u32,
    /// How many times the host had failed when it was made.
    failures: u32,
    opened: Instant,
    since: Instant,
}

impl Drop for PooledH1 {
    fn drop(&mut self) {
        let by_peer = self.conn.try_borrow().is_ok_and(|conn| conn.at_eof());
        self.counted.by_peer.set(by_peer);
        self.counted.cluster.stats.upstream_rq_per_cx.record(self.requests.into());
    }
}

/// Keeps the gauges and the circuit breaker right while a connection lives.
pub(crate) struct Counted {
    pub(crate) cluster: Rc<WorkerCluster>,
    host: Arc<Host>,
    pool: std::rc::Weak<Pool>,
    opened: Instant,
    /// The peer closed it.
    pub(super) by_peer: Cell<bool>,
    /// A request is (or was) under way on it.
    pub(super) busy: Cell<bool>,
    _permit: Option<Permit>,
}

impl Counted {
    fn new(pool: &Rc<Pool>, permit: Option<Permit>) -> Self {
        pool.cluster.stats.upstream_cx_active.inc();
        pool.host.state.stats.cx_active.fetch_add(1, Relaxed);
        Self {
            cluster: pool.cluster.clone(),
            host: pool.host.clone(),
            pool: Rc::downgrade(pool),
            opened: Instant::now(),
            by_peer: Cell::new(false),
            busy: Cell::new(false),
            _permit: permit,
        }
    }

    /// Who ended a TCP connection.
    pub(crate) fn ended_by_peer(&self, by_peer: bool) {
        self.by_peer.set(by_peer);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let stats = &self.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.upstream_cx_destroy.inc();
        let (by_peer, busy) = (self.by_peer.get(), self.busy.get());
        if busy {
            stats.upstream_cx_destroy_with_active_rq.inc();
        }
        match (by_peer, busy) {
            (true, _) => stats.upstream_cx_destroy_remote.inc(),
            (false, _) => stats.upstream_cx_destroy_local.inc(),
        }
        match (by_peer, busy) {
            (true, true) => stats.upstream_cx_destroy_remote_with_active_rq.inc(),
            (false, true) => stats.upstream_cx_destroy_local_with_active_rq.inc(),
            (_, false) => {}
        }
        stats.upstream_cx_length_ms.record(self.opened.elapsed().as_millis() as u64);
        self.host.state.stats.cx_active.fetch_sub(1, Relaxed);
        if let Some(pool) = self.pool.upgrade() {
            pool.open.set(pool.open.get().saturating_sub(1));
            pool.wake_one();
        }
    }
}

/// A request's hold on an HTTP/1 connection. Dropped: closed. [`Lease::release`]: back to the pool.
pub(crate) struct Lease {
    inner: PooledH1,
    pool: Rc<Pool>,
}

/// A connection for one request.
pub(crate) enum Acquired {
    H1(Lease),
    H2(H2Connection),
}

/// Why there is none.
#[derive(Debug)]
pub(crate) enum AcquireError {
    Connect(ConnectError),
    /// Circuit breaker: too many pending requests.
    Overflow,
}

impl Pool {
    pub(super) fn new(
        worker: Rc<Worker>,
        cluster: Rc<WorkerCluster>,
        host: Arc<Host>,
        variant: Variant,
        tls: Option<Arc<ClientTls>>,
        permit: Option<Permit>,
    ) -> Rc<Self> {
        Rc::new(Self {
            _permit: permit,
            worker,
            cluster,
            host,
            variant,
            tls,
            idle: RefCell::default(),
            open: Cell::new(0),
            waiting: RefCell::default(),
            h2: H2Pool::default(),
        })
    }

    pub(super) fn breaker(&self) -> &Arc<Breaker> {
        self.cluster.entry.breakers.get(self.variant.priority)
    }

    /// Leave for one more connection, by the limits of the cluster and of the host.
    pub(super) fn may_connect(&self) -> Option<Permit> {
        let breaker = self.breaker();
        let permit = self.host_has_room().then(|| breaker.acquire(Resource::Connections)).flatten();
        if permit.is_none() {
            self.cluster.stats.upstream_cx_overflow.inc();
        }
        permit
    }

    fn host_has_room(&self) -> bool {
        self.breaker().allows_for_host(self.host.state.stats.cx_active.load(Relaxed))
    }

    /// Waits for a connection that comes back (`Some`), or for one that ended.
    async fn wait_for_room(&self) -> Option<PooledH1> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().push_back(sender);
        receiver.await.ok().flatten()
    }

    /// A connection that is there: shared, or idle.
    pub(crate) fn at_hand(self: &Rc<Self>) -> Option<Acquired> {
        if let Some(connection) = self.h2.ready(&self.host) {
            return Some(Acquired::H2(connection));
        }
        let inner = self.pop_idle()?;
        Some(Acquired::H1(Lease { inner, pool: self.clone() }))
    }

    /// A connection: idle, shared, or new.
    pub(crate) async fn acquire(self: &Rc<Self>) -> Result<Acquired, AcquireError> {
        if let Some(acquired) = self.at_hand() {
            return Ok(acquired);
        }
        let stats = &self.cluster.stats;
        let breaker = self.breaker();
        let Some(_pending) = breaker.acquire(Resource::Pending) else {
            stats.upstream_rq_pending_overflow.inc();
            return Err(AcquireError::Overflow);
        };
        stats.upstream_rq_pending_total.inc();
        let _pending_gauge = PendingGauge::new(self);
        if self.variant.protocol == Protocol::Http2 {
            return self.h2.connect(self).await.map(Acquired::H2).map_err(AcquireError::Connect);
        }
        loop {
            let permit = match self.may_connect() {
                Some(permit) => permit,
                // Envoy always lets a pool have one connection.
                None if self.open.get() == 0 => breaker.force(Resource::Connections),
                None => match self.wait_for_room().await {
                    Some(inner) => return Ok(Acquired::H1(Lease { inner, pool: self.clone() })),
                    None => continue,
                },
            };
            return self.connect(Some(permit)).await.map_err(AcquireError::Connect);
        }
    }

    async fn connect(self: &Rc<Self>, permit: Option<Permit>) -> Result<Acquired, ConnectError> {
        self.open.set(self.open.get() + 1);
        let counted = Counted::new(self, permit);
        let opened = open(&self.cluster, &self.host, self.tls.as_deref(), &self.variant, &self.worker.shared).await;
        let (io, facts) = opened.inspect_err(|e| counted.by_peer.set(!e.timeout))?;
        let facts = Rc::new(facts);
        let negotiated_h2 = self.variant.protocol == Protocol::Auto
            && facts.tls.as_ref().is_some_and(|t| t.alpn.as_deref() == Some("h2"));
        if negotiated_h2 {
            return self.h2.adopt(self, io, facts, counted).await.map(Acquired::H2);
        }
        let now = Instant::now();
        counted.busy.set(true);
        let mut conn = h1::Conn::new(io);
        conn.style = h1::Style::of(&self.cluster.config().http1);
        let inner = PooledH1 {
            conn: Rc::new(RefCell::new(conn)),
            facts,
            counted,
            requests: 0,
            failures: self.host.state.failures(),
            opened: now,
            since: now,
        };
        Ok(Acquired::H1(Lease { inner, pool: self.clone() }))
    }

    /// A raw connection for TCP proxying, never pooled.
    pub(crate) async fn dial(self: &Rc<Self>) -> Result<(Io, Rc<ConnectionFacts>, Counted), AcquireError> {
        while !self.host_has_room() && self.open.get() > 0 {
            self.cluster.stats.upstream_cx_overflow.inc();
            self.wait_for_room().await;
        }
        let stats = &self.cluster.stats;
        let Some(_pending) = self.breaker().acquire(Resource::Pending) else {
            stats.upstream_rq_pending_overflow.inc();
            return Err(AcquireError::Overflow);
        };
        stats.upstream_rq_pending_total.inc();
        let _pending_gauge = PendingGauge::new(self);
        let Some(permit) = self.breaker().acquire(Resource::Connections) else {
            stats.upstream_cx_overflow.inc();
            return Err(AcquireError::Overflow);
        };
        self.open.set(self.open.get() + 1);
        let counted = Counted::new(self, Some(permit));
        if self.variant.announced.is_some() || self.variant.source.is_some() {
            self.cluster.sweep();
        }
        let opened = open(&self.cluster, &self.host, self.tls.as_deref(), &self.variant, &self.worker.shared).await;
        let opened = opened.inspect_err(|e| counted.by_peer.set(!e.timeout));
        let (io, facts) = opened.map_err(AcquireError::Connect)?;
        counted.busy.set(true);
        Ok((io, Rc::new(facts), counted))
    }

    pub(super) fn count(self: &Rc<Self>, permit: Option<Permit>) -> Counted {
        self.open.set(self.open.get() + 1);
        Counted::new(self, permit)
    }

    fn pop_idle(&self) -> Option<PooledH1> {
        let mut idle = self.idle.borrow_mut();
        while let Some(inner) = idle.pop() {
            let quiet = inner.conn.borrow_mut().is_quiet(&mut Context::from_waker(Waker::noop()));
            // What a host that failed since is not trusted with.
            if quiet && inner.failures == self.host.state.failures() && !self.is_too_old(&inner) {
                inner.counted.busy.set(true);
                return Some(inner);
            }
        }
        None
    }

    fn wake_one(&self) {
        while let Some(waiter) = self.waiting.borrow_mut().pop_front() {
            if waiter.send(None).is_ok() {
                return;
            }
        }
    }

    fn give_back(self: &Rc<Self>, mut inner: PooledH1) {
        inner.requests += 1;
        inner.counted.busy.set(false);
        let config = self.cluster.config();
        if inner.failures != self.host.state.failures() {
            return;
        }
        if config.max_requests_per_connection.is_some_and(|max| inner.requests >= max) {
            self.cluster.stats.upstream_cx_max_requests.inc();
            return;
        }
        if self.is_too_old(&inner) {
            return;
        }
        loop {
            let Some(waiter) = self.waiting.borrow_mut().pop_front() else { break };
            inner.counted.busy.set(true);
            match waiter.send(Some(inner)) {
                Ok(()) => return,
                Err(Some(back)) => inner = back,
                Err(None) => return,
            }
        }
        inner.counted.busy.set(false);
        inner.since = Instant::now();
        inner.conn.borrow_mut().rest();
        self.idle.borrow_mut().push(inner);
        self.cluster.sweep();
    }

    /// Closes what idled too long or was closed by the peer; true while connections are left.
    pub(super) fn sweep(&self, now: Instant) -> bool {
        let timeout = self.cluster.config().idle_timeout;
        let mut dead = Vec::new();
        {
            let mut idle = self.idle.borrow_mut();
            let mut i = 0;
            while i < idle.len() {
                let timed_out = timeout.is_some_and(|t| now.duration_since(idle[i].since) >= t);
                let quiet = idle[i].conn.borrow_mut().is_quiet(&mut Context::from_waker(Waker::noop()));
                if timed_out && quiet {
                    self.cluster.stats.upstream_cx_idle_timeout.inc();
                }
                let distrusted = idle[i].failures != self.host.state.failures();
                if timed_out || !quiet || distrusted || self.is_too_old(&idle[i]) {
                    dead.push(idle.remove(i));
                } else {
                    i += 1;
                }
            }
        }
        // Dropped outside the borrow: the end of a connection wakes waiters.
        drop(dead);
        let h2 = self.h2.sweep(now, timeout, &self.cluster.stats);
        h2 || !self.idle.borrow().is_empty() || self.open.get() > 0
    }

    /// Nobody uses it, and nothing is kept in it.
    pub(super) fn is_unused(self: &Rc<Self>) -> bool {
        Rc::strong_count(self) == 1 && self.open.get() == 0
    }

    fn is_too_old(&self, inner: &PooledH1) -> bool {
        let old = self.cluster.config().max_connection_duration.is_some_and(|max| inner.opened.elapsed() >= max);
        if old {
            self.cluster.stats.upstream_cx_max_duration_reached.inc();
        }
        old
    }

    pub(super) fn close_idle(&self) {
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        drop(idle);
        self.h2.drain();
    }
}

/// Somebody who waits for a connection.
struct PendingGauge<'a>(&'a Pool);

impl<'a> PendingGauge<'a> {
    fn new(pool: &'a Pool) -> Self {
        pool.cluster.stats.upstream_rq_pending_active.inc();
        pool.host.state.stats.rq_pending_active.fetch_add(1, Relaxed);
        Self(pool)
    }
}

impl Drop for PendingGauge<'_> {
    fn drop(&mut self) {
        self.0.cluster.stats.upstream_rq_pending_active.dec();
        self.0.host.state.stats.rq_pending_active.fetch_sub(1, Relaxed);
    }
}

impl Acquired {
    /// No request was sent on it after all.
    pub(crate) fn put_back(self) {
        if let Self::H1(Lease { mut inner, pool }) = self {
            inner.counted.busy.set(false);
            inner.since = Instant::now();
            pool.idle.borrow_mut().push(inner);
            pool.cluster.sweep();
        }
    }
}

impl Lease {
    pub(crate) fn conn(&self) -> &h1::Shared {
        &self.inner.conn
    }

    pub(crate) fn facts(&self) -> &Rc<ConnectionFacts> {
        &self.inner.facts
    }

    /// Limits of the answers' heads.
    pub(super) fn limits(&self) -> h1::Limits {
        let config = self.pool.cluster.config();
        h1::Limits::of(&config.http1, config.max_response_header_bytes(true), config.max_response_headers)
    }

    /// The host said that the connection ends with this answer.
    pub(super) fn announced_end(&self) {
        self.pool.cluster.stats.upstream_cx_close_notify.inc();
    }

    /// The request is over, and the connection ends with it.
    pub(super) fn served(&self) {
        self.inner.counted.busy.set(false);
    }

    /// Gives the connection back for the next request; the response was read to its end.
    pub(crate) fn release(self) {
        self.pool.give_back(self.inner);
    }
}
