//! Connections of one host and variant: idle HTTP/1 ones are reused last in, first out; HTTP/2 ones are shared.

use super::WorkerCluster;
use super::connect::{ConnectError, ConnectionFacts, Protocol, Variant, open};
use super::h2_pool::{H2Connection, H2Pool};
use super::waiting::Waiting;
use crate::h1;
use crate::io::Io;
use crate::tls::ClientTls;
use crate::worker::Worker;
use proxy_core::Host;
use proxy_core::circuit::{Breaker, Permit, Resource};
use proxy_core::endpoints::Health;
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
    open: Cell<usize>,
    /// Of these, the ones that are being opened.
    opening: Cell<usize>,
    waiting: Waiting,
    /// TCP streams waiting for a connection to end because the host may have no more; the oldest first.
    dialling: RefCell<VecDeque<oneshot::Sender<()>>>,
    pub(super) h2: H2Pool,
    /// The circuit breaker's leave for a pool that has connections, or will; TCP's are not counted.
    place: RefCell<Option<Permit>>,
}

/// How busy a pool is, in requests.
#[derive(Clone, Copy, Default)]
pub(super) struct Load {
    /// Without a connection yet.
    pub(super) waiting: usize,
    pub(super) busy: usize,
    /// More that fit on connections that are open or being opened.
    pub(super) room: usize,
}

impl std::ops::Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { waiting: self.waiting + other.waiting, busy: self.busy + other.busy, room: self.room + other.room }
    }
}

impl Load {
    /// Whether there are too few connections for so many times the requests, with so many more (Envoy
    /// `ConnPoolImplBase::shouldConnect`).
    pub(super) fn is_short(self, ratio: f64, more: usize) -> bool {
        (self.waiting + self.busy + more) as f64 * ratio > (self.room + self.busy) as f64
    }
}

/// Connections begun at a time; what is missing then follows when one is open or has ended.
pub(super) const AT_ONCE: usize = 3;

/// An HTTP/1 connection with what it holds.
pub(crate) struct PooledH1 {
    pub(crate) conn: h1::Shared,
    pub(crate) facts: Rc<ConnectionFacts>,
    counted: Counted,
    requests: u32,
    /// A CONNECT went over it: when its peer ends, that counts as an end from here (Envoy `CodecReadFilter::onData`).
    half_close: bool,
    /// How many times the host had failed when it was made.
    failures: u32,
    opened: Instant,
    since: Instant,
}

impl Drop for PooledH1 {
    fn drop(&mut self) {
        let by_peer = self.conn.try_borrow().is_ok_and(|conn| conn.at_eof());
        self.counted.by_peer.set(by_peer && !self.half_close);
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
    permit: Option<Permit>,
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
            permit,
        }
    }

    /// The peer ended the connection, and nothing was left to do on it.
    pub(crate) fn left(&self) {
        self.by_peer.set(true);
        self.busy.set(false);
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
        // Back before somebody asks for it.
        drop(self.permit.take());
        if let Some(pool) = self.pool.upgrade() {
            pool.open.set(pool.open.get().saturating_sub(1));
            pool.ended();
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
    /// Whose connections these are.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    pub(super) fn new(
        worker: Rc<Worker>,
        cluster: Rc<WorkerCluster>,
        host: Arc<Host>,
        variant: Variant,
        tls: Option<Arc<ClientTls>>,
        place: Option<Permit>,
    ) -> Rc<Self> {
        Rc::new(Self {
            place: RefCell::new(place),
            worker,
            cluster,
            host,
            variant,
            tls,
            idle: RefCell::default(),
            open: Cell::new(0),
            opening: Cell::new(0),
            waiting: Waiting::default(),
            dialling: RefCell::default(),
            h2: H2Pool::default(),
        })
    }

    /// Takes a place among the cluster's pools again, if it was given back; false: there is none left.
    pub(super) fn take_place(&self) -> bool {
        let mut place = self.place.borrow_mut();
        if place.is_none() && self.variant.protocol != Protocol::Raw {
            *place = self.breaker().acquire(Resource::Pools);
        }
        place.is_some() || self.variant.protocol == Protocol::Raw
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

    /// Waits for a connection to end.
    async fn wait_for_room(&self) {
        let (sender, receiver) = oneshot::channel();
        self.dialling.borrow_mut().push_back(sender);
        // Nobody else drops senders.
        let _ = receiver.await;
    }

    /// A connection that is there: shared, or idle.
    pub(crate) fn at_hand(self: &Rc<Self>) -> Option<Acquired> {
        let acquired = match self.h2.ready(&self.host) {
            Some(connection) => Acquired::H2(connection),
            None => Acquired::H1(Lease { inner: self.pop_idle()?, pool: self.clone() }),
        };
        self.connect_for_waiting();
        Some(acquired)
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
        let place = self.waiting.enter();
        self.connect_for_waiting();
        place.wait().await.map_err(AcquireError::Connect)
    }

    /// Opens connections while more requests wait than those being opened will serve (Envoy
    /// `ConnPoolImplBase::tryCreateNewConnections`). They are the pool's: a request that gives up does not end them.
    fn connect_for_waiting(self: &Rc<Self>) {
        for _ in 0..AT_ONCE {
            if !self.wants_connection() {
                return;
            }
            let permit = match self.may_connect() {
                Some(permit) => permit,
                // Envoy always lets a pool have one connection.
                None if self.open.get() == 0 => self.breaker().force(Resource::Connections),
                None => return,
            };
            self.begin(permit);
        }
    }

    fn begin(self: &Rc<Self>, permit: Permit) {
        self.open.set(self.open.get() + 1);
        self.opening.set(self.opening.get() + 1);
        let counted = Counted::new(self, Some(permit));
        if self.variant.protocol == Protocol::Http2 {
            super::h2_pool::count_codec(&self.cluster.stats);
        }
        // Nobody waits for it: it ends with the connect timeout at the latest, and tells those in the queue.
        tokio::task::spawn_local(self.clone().connect(counted));
    }

    /// Whether there are too few for those who wait, or for those who come next (`per_upstream_preconnect_ratio`).
    fn wants_connection(&self) -> bool {
        let (waiting, opening) = (self.waiting.len(), self.opening.get() * self.requests_of_new());
        let ahead = self.cluster.config().preconnect_ratio;
        if ahead <= 1.0 || self.host.health() != Health::Healthy {
            return waiting > opening;
        }
        self.load().is_short(ahead, 0)
    }

    /// What goes on in it.
    pub(super) fn load(&self) -> Load {
        let (h2, streams, room) = self.h2.load();
        let idle = self.idle.borrow().len();
        let opening = self.opening.get();
        let busy = self.open.get().saturating_sub(opening + idle + h2) + streams;
        Load { waiting: self.waiting.len(), busy, room: opening * self.requests_of_new() + idle + room }
    }

    /// Opens a connection for a request that is likely to come (`predictive_preconnect_ratio`); false: it has enough.
    pub(super) fn connect_ahead(self: &Rc<Self>, ratio: f64) -> bool {
        if self.host.health() != Health::Healthy || !self.load().is_short(ratio, 1) {
            return false;
        }
        self.may_connect().map(|permit| self.begin(permit)).is_some()
    }

    /// So many requests may a connection serve at once before it is known what it speaks.
    fn requests_of_new(&self) -> usize {
        let config = self.cluster.config();
        match self.variant.protocol {
            Protocol::Http2 => {
                let streams = config.http2.max_concurrent_streams;
                config.max_requests_per_connection.map_or(streams, |max| max.min(streams)) as usize
            }
            _ => 1,
        }
    }

    async fn connect(self: Rc<Self>, counted: Counted) {
        let opened = open(&self.cluster, &self.host, self.tls.as_deref(), &self.variant, &self.worker.shared).await;
        self.opening.set(self.opening.get() - 1);
        let result = match opened {
            Ok((io, facts)) => self.adopt(io, Rc::new(facts), counted).await,
            Err(e) => {
                counted.by_peer.set(!e.timeout);
                Err((e, Some(counted)))
            }
        };
        match result {
            Ok(()) => self.serve(),
            Err((e, counted)) => {
                // One failure is everybody's: those who want to try again decide so themselves.
                while self.waiting.len() > 0 {
                    self.cluster.stats.upstream_rq_pending_failure_eject.inc();
                    self.waiting.give(Err(e.clone()));
                }
                self.connect_for_waiting();
                drop(counted);
            }
        }
    }

    /// Takes in an open connection.
    async fn adopt(
        self: &Rc<Self>,
        io: Io,
        facts: Rc<ConnectionFacts>,
        counted: Counted,
    ) -> Result<(), (ConnectError, Option<Counted>)> {
        let is_h2 = match self.variant.protocol {
            Protocol::Http2 => true,
            Protocol::Auto => facts.tls.as_ref().is_some_and(|t| t.alpn.as_deref() == Some("h2")),
            Protocol::Raw | Protocol::Http1 => false,
        };
        if self.variant.protocol == Protocol::Auto {
            super::connect::count_negotiated(&self.cluster, &self.host, is_h2);
        }
        if is_h2 {
            return self.h2.adopt(self, io, facts, counted).await.map_err(|e| (e, None));
        }
        let now = Instant::now();
        let mut conn = h1::Conn::new(io);
        conn.style = h1::Style::of(&self.cluster.config().http1);
        self.hand_on(PooledH1 {
            conn: Rc::new(RefCell::new(conn)),
            facts,
            counted,
            requests: 0,
            half_close: false,
            failures: self.host.state.failures(),
            opened: now,
            since: now,
        });
        Ok(())
    }

    /// Hands out free HTTP/2 streams to those who wait, and opens what is missing.
    pub(super) fn serve(self: &Rc<Self>) {
        while self.waiting.len() > 0 {
            let Some(connection) = self.h2.ready(&self.host) else { return self.connect_for_waiting() };
            self.waiting.give(Ok(Acquired::H2(connection)));
        }
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
        let variant = Variant { protocol: Protocol::Raw, ..self.variant.clone() };
        let opened = open(&self.cluster, &self.host, self.tls.as_deref(), &variant, &self.worker.shared).await;
        let opened = opened.inspect_err(|e| {
            stats.upstream_rq_pending_failure_eject.inc();
            counted.by_peer.set(!e.timeout);
        });
        let (io, facts) = opened.map_err(AcquireError::Connect)?;
        counted.busy.set(true);
        Ok((io, Rc::new(facts), counted))
    }

    fn pop_idle(&self) -> Option<PooledH1> {
        loop {
            // Not borrowed while one is dropped: its end looks after those who wait.
            let inner = self.idle.borrow_mut().pop()?;
            let quiet = inner.conn.borrow_mut().is_quiet(&mut Context::from_waker(Waker::noop()));
            // What a host that failed since is not trusted with.
            if quiet && inner.failures == self.host.state.failures() && !self.is_too_old(&inner) {
                inner.counted.busy.set(true);
                return Some(inner);
            }
        }
    }

    /// A connection has ended.
    fn ended(self: &Rc<Self>) {
        self.connect_for_waiting();
        // To Envoy a pool without connections is none.
        if self.open.get() == 0 && self.waiting.len() == 0 {
            self.place.take();
        }
        while let Some(dialling) = self.dialling.borrow_mut().pop_front() {
            if dialling.send(()).is_ok() {
                return;
            }
        }
    }

    fn give_back(self: &Rc<Self>, inner: PooledH1) {
        inner.counted.busy.set(false);
        let config = self.cluster.config();
        if inner.failures != self.host.state.failures() {
            return;
        }
        if inner.conn.borrow().has_more() {
            // An answer that nobody asked for.
            self.cluster.stats.upstream_cx_protocol_error.inc();
            return;
        }
        if config.max_requests_per_connection.is_some_and(|max| inner.requests >= max) || self.is_too_old(&inner) {
            return;
        }
        inner.conn.borrow_mut().rest();
        self.hand_on(inner);
    }

    /// A connection is free: for who waits longest, or for the next request. It is not looked at, so that a host that
    /// closes each connection fails requests instead of being connected to again and again.
    fn hand_on(self: &Rc<Self>, inner: PooledH1) {
        inner.counted.busy.set(true);
        let lease = Lease { inner, pool: self.clone() };
        let Some(Ok(Acquired::H1(Lease { mut inner, .. }))) = self.waiting.give(Ok(Acquired::H1(lease))) else {
            return self.connect_for_waiting();
        };
        inner.counted.busy.set(false);
        if self.cluster.retired.get() {
            return;
        }
        inner.since = Instant::now();
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
        if let Self::H1(Lease { inner, pool }) = self {
            pool.hand_on(inner);
        }
    }
}

impl Lease {
    /// Another request is sent.
    pub(super) fn begin(&mut self) {
        self.inner.requests += 1;
        let cluster = &self.pool.cluster;
        // The last one counts, however it goes on (Envoy `ConnPoolImplBase::attachStreamToClient`).
        if cluster.config().max_requests_per_connection == Some(self.inner.requests) {
            cluster.stats.upstream_cx_max_requests.inc();
        }
    }

    /// A CONNECT is sent.
    pub(super) fn half_close(&mut self) {
        self.inner.half_close = true;
    }

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
