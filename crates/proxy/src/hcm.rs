//! The HTTP connection manager: downstream HTTP/1 and HTTP/2 connections, and what happens to each request.

mod authz;
mod date;
mod encode;
mod exchange;
mod ext_authz;
mod filters;
mod grpc_web;
mod h1;
mod h2;
mod keys;
mod limits;
mod local_reply;
mod mirror;
mod overload;
mod record;
mod redirect;
mod respond;
mod router;
mod span;
mod timers;

pub(crate) use exchange::{Exchange, is_grpc};
pub(crate) use ext_authz::{check_head, connection_attributes, grpc_frame, is_allowed};
pub(crate) use keys::{Kept, fetch_ahead, fetches_ahead};
pub(crate) use limits::{LocalLimits, counters as limit_counters};
pub(crate) use record::{Ring, Rings};
pub(crate) use router::succeeded;

use crate::downstream::Connection;
use crate::io::Io;
use crate::runtime::{ChainEntry, RouteSlot};
use crate::stats::{HttpStats, ListenerHttpStats, Named, Workload};
use crate::worker::Worker;
use proxy_core::filters::HttpFilter;
use proxy_core::hcm::{Codec, HeadersWithUnderscores, HttpConnectionManager, Routes};
use proxy_core::stream_info::HttpProtocol;
use proxy_core::{ConnectionInfo, Listener, ResponseFlags, RouteTable};
use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A downstream HTTP connection: what its requests share.
pub(crate) struct Http {
    pub(crate) worker: Rc<Worker>,
    pub(crate) config: Arc<HttpConnectionManager>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) chain: Arc<ChainEntry>,
    pub(crate) info: Arc<ConnectionInfo>,
    /// Where the connection wanted to go, if that is known.
    pub(crate) original_dst: Option<SocketAddr>,
    pub(crate) stats: Arc<HttpStats>,
    /// The answers by listener.
    pub(crate) of_listener: Arc<ListenerHttpStats>,
    routes: Option<Arc<RouteSlot>>,
    since: Instant,
    requests: Cell<u32>,
    /// What its last request of HTTP/1 spoke whose head could be read.
    spoken: Cell<Option<HttpProtocol>>,
    /// The peer broke the protocol.
    broken: Cell<bool>,
    /// Bytes read from the connection; of HTTP/1 once it has ended.
    received: Cell<u64>,
    /// Bytes written to it.
    sent: Cell<u64>,
    /// Requests that their client took back at once.
    premature_resets: Cell<u32>,
    /// Since when it says with each answer that it ends, because it idled, grew old or drains; it does after the drain timeout.
    ending: Cell<Option<Instant>>,
    /// It ends because its listener drains.
    drained: Cell<bool>,
    /// Of HTTP/2.
    h2: OnceCell<crate::wire::Connection>,
    /// An HTTP/2 client was told to leave.
    leaves: Cell<bool>,
    /// Wakes what tells it.
    told: tokio::sync::Notify,
    /// How long this one may last, and how long it goes on after it said that it ends.
    max_duration: Option<Duration>,
    drain_timeout: Duration,
    /// `max_duration` passed and was counted.
    aged: Cell<bool>,
    /// Requests under way.
    active: Cell<u32>,
    /// The connection ends here, and what its streams are to say.
    end: Cell<Option<End>>,
    /// Buckets of local rate limits that count each connection by itself.
    limits: RefCell<std::collections::HashMap<usize, limits::Buckets>>,
    /// The peer's last announcement and what it says: the same on every request of a connection.
    announced: RefCell<Option<(Vec<u8>, Arc<Workload>)>>,
}

/// Why the proxy ended a connection that had streams.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Its chain or the proxy is gone.
    Cut,
    /// A PING was not answered.
    Unanswered,
    /// The peer broke the protocol: details of the log, other ones for the stream that did it.
    Codec { details: &'static str, blamed: Option<(u32, &'static str)> },
}

impl End {
    /// What streams of a connection that is cut off say (Envoy `ActiveTcpConnection`, whose reason this is, word for word).
    const CUT: &str = "downstream_local_disconnect(purging_socket_that_have_not_progressed_to_connections)";
}

impl Http {
    /// Takes note of one more request of HTTP/2.
    fn count_h2_request(&self) {
        self.requests.set(self.requests.get() + 1);
        self.stats.downstream_rq_http2_total.inc();
    }

    /// The route table as it is now; `None` when RDS has not delivered it.
    pub(crate) fn route_table(&self) -> Option<Arc<RouteTable>> {
        match (&self.config.routes, &self.routes) {
            (Routes::Inline(table), _) => Some(table.clone()),
            (_, Some(slot)) => slot.table.load_full(),
            _ => None,
        }
    }

    /// True when this connection should end after the current request.
    fn closing(&self) -> bool {
        let worn = self.config.max_requests_per_connection.is_some_and(|max| self.requests.get() >= max);
        worn || self.ending.get().is_some() || self.draining()
    }

    fn draining(&self) -> bool {
        // A proxy whose health checks are made to fail wants to be left, too (Envoy `DrainManagerImpl::drainClose`).
        let shared = &self.worker.shared;
        let random = &mut *self.worker.random.borrow_mut();
        let ends = self.drained.get()
            || self.chain.lets_go(&shared.draining, random)
            || !self.listener.drains_when_modified_only
                && shared.health_failed.load(std::sync::atomic::Ordering::Relaxed)
            || shared.draining.ends(self.listener.direction, random);
        if ends {
            self.drain();
        }
        ends
    }

    /// Has the connection end because its listener drains.
    fn drain(&self) {
        if !self.drained.replace(true) {
            self.stats.downstream_cx_drain_close.inc();
            self.leave();
        }
    }

    /// Whether the connection is cut off because its chain or the proxy is gone.
    pub(crate) fn was_cut(&self) -> bool {
        matches!(self.end.get(), Some(End::Cut))
    }

    /// Counts a connection that has come to its end while nothing was said to the peer.
    fn count_end(&self) {
        match self.was_cut() {
            true => self.stats.downstream_cx_destroy_local.inc(),
            false => self.stats.downstream_cx_destroy_remote.inc(),
        }
    }

    /// Counts a connection that ended in the middle of a request.
    fn count_end_of_active(&self) {
        self.stats.downstream_cx_destroy_active_rq.inc();
        // Envoy says so of connections that it cuts off as well.
        self.stats.downstream_cx_destroy_remote_active_rq.inc();
    }

    /// Tells an HTTP/2 client to use another connection, before anything else is said. After the drain timeout this one takes
    /// no more streams.
    fn leave(&self) {
        if let Some(conn) = self.h2.get()
            && !self.leaves.replace(true)
        {
            conn.announce_end();
            self.told.notify_one();
        }
    }

    /// Whether `max_duration` is over: then the connection ends after the drain timeout, and says so until then
    /// (Envoy `ConnectionManagerImpl::onConnectionDurationTimeout`).
    fn too_old(&self) -> bool {
        let Some(max) = self.max_duration.filter(|max| self.since.elapsed() >= *max) else {
            return false;
        };
        if !self.aged.replace(true) {
            self.stats.downstream_cx_max_duration_reached.inc();
            self.ending.set(self.ending.get().or_else(|| self.since.checked_add(max)));
        }
        true
    }

    /// What the peer says of itself.
    pub(crate) fn announced(&self, value: &[u8]) -> Option<Arc<Workload>> {
        let mut last = self.announced.borrow_mut();
        if let Some((seen, workload)) = &*last
            && seen == value
        {
            return Some(workload.clone());
        }
        let workload = self.worker.intern(crate::peer::of_header(value)?);
        *last = Some((value.to_vec(), workload.clone()));
        Some(workload)
    }

    /// Limits of a request head.
    fn head_limits(&self) -> crate::h1::Limits {
        let config = &self.config;
        crate::h1::Limits {
            underscores: match self.config.headers_with_underscores {
                HeadersWithUnderscores::Allow => crate::h1::UnderscoreAction::Allow,
                HeadersWithUnderscores::Reject => crate::h1::UnderscoreAction::Reject,
                HeadersWithUnderscores::Drop => crate::h1::UnderscoreAction::Drop,
            },
            https_url: self.info.tls.is_some() || !config.use_remote_address || config.xff_num_trusted_hops > 0,
            ..crate::h1::Limits::of(&config.http1, config.max_request_headers_bytes, config.max_headers_count)
        }
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        // Of one that was busy all the time.
        self.too_old();
        self.stats.downstream_cx_active.dec();
        self.stats.downstream_cx_destroy.inc();
        self.stats.downstream_cx_length_ms.record(self.since.elapsed().as_millis() as u64);
        if self.info.tls.is_some() {
            self.stats.downstream_cx_ssl_active.dec();
        }
    }
}

/// Counts a connection that a filter before the connection manager has ended: to Envoy it was there for all filters of its chain.
/// The caller counts who ended it.
pub(crate) fn count_unserved(stats: &HttpStats, tls: bool) -> &HttpStats {
    stats.downstream_cx_total.inc();
    if tls {
        stats.downstream_cx_ssl_total.inc();
    }
    stats.downstream_cx_destroy.inc();
    stats
}

/// What the listener's log says of a connection.
#[derive(Default)]
pub(crate) struct Served {
    /// If there was a request.
    pub(crate) protocol: Option<HttpProtocol>,
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) flags: ResponseFlags,
}

/// Serves a connection whose chain ends in an HTTP connection manager.
// Not an `async fn`, which would have memory for its arguments as long as the connection lives.
pub(crate) fn serve(connection: Connection, config: Arc<HttpConnectionManager>) -> impl Future<Output = Served> {
    let stats = connection.worker.http_stats(&config.stat_prefix);
    stats.downstream_cx_total.inc();
    stats.downstream_cx_active.inc();
    if connection.info.tls.is_some() {
        stats.downstream_cx_ssl_total.inc();
        stats.downstream_cx_ssl_active.inc();
    }
    let address = &connection.listener.stat_prefix;
    let of_listener = connection.worker.listener_http_stats(address, &config.stat_prefix);
    let (max_duration, drain_timeout) = {
        let random = &mut *connection.worker.random.borrow_mut();
        (config.max_connection_duration.map(|max| max.draw(random)), config.drain_timeout.draw(random))
    };
    let http = Rc::new(Http {
        routes: connection.chain.routes.clone(),
        worker: connection.worker,
        config,
        listener: connection.listener,
        chain: connection.chain,
        info: connection.info,
        original_dst: connection.original_dst,
        stats,
        of_listener,
        since: Instant::now(),
        requests: Cell::new(0),
        spoken: Cell::new(None),
        broken: Cell::new(false),
        received: Cell::new(0),
        sent: Cell::new(0),
        premature_resets: Cell::new(0),
        ending: Cell::new(None),
        drained: Cell::new(false),
        h2: OnceCell::new(),
        leaves: Cell::new(false),
        told: tokio::sync::Notify::new(),
        max_duration,
        drain_timeout,
        aged: Cell::new(false),
        active: Cell::new(0),
        end: Cell::new(None),
        limits: RefCell::default(),
        announced: RefCell::default(),
    });
    let mut io = connection.io;
    async move {
        let known = match http.config.codec {
            Codec::Http1 => Some(false),
            Codec::Http2 => Some(true),
            Codec::Auto => match http.info.tls.as_ref().and_then(|t| t.alpn.as_deref()) {
                Some(alpn) if alpn.ends_with("h2") => Some(true),
                Some(alpn) if alpn.contains("http/1") => Some(false),
                _ => None,
            },
        };
        let sniffed = tokio::select! {
            sniffed = sniff(&http, &mut io, known) => sniffed,
            () = http.chain.cut() => {
                http.stats.downstream_cx_destroy_local.inc();
                None
            }
        };
        let Some(is_h2) = sniffed else { return Served::default() };
        let protocol = if is_h2 {
            Box::pin(h2::serve(http.clone(), io)).await;
            (http.requests.get() > 0).then_some(HttpProtocol::Http2)
        } else {
            h1::serve(http.clone(), io).await;
            http.spoken.get()
        };
        let broken = http.broken.get() || matches!(http.end.get(), Some(End::Codec { .. }));
        Served {
            protocol,
            bytes_received: http.received.get(),
            bytes_sent: http.sent.get(),
            flags: if broken { ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR } else { ResponseFlags::NONE },
        }
    }
}

/// Makes the counters of the filters exist: those of the connection manager, and others.
pub(crate) fn touch_counters(config: &HttpConnectionManager, stats: &HttpStats, others: &Named) {
    for name in redirect::COUNTERS.iter().chain(&span::COUNTERS) {
        stats.other.touch(name);
    }
    if let Some(provider) = config.tracing.as_ref().and_then(|tracing| tracing.provider.as_ref()) {
        others.touch_all(crate::export::counters(provider));
    }
    let own = &stats.other;
    let of_composites = config.filters.iter().filter_map(|entry| match &entry.filter {
        HttpFilter::Composite(composite) => Some(composite.all()),
        _ => None,
    });
    for entry in config.filters.iter().chain(of_composites.flatten()) {
        match &entry.filter {
            HttpFilter::Composite(_) => own.touch_all(&filters::DELEGATION_COUNTERS),
            HttpFilter::ExtAuthz(config) => {
                ext_authz::COUNTERS.iter().for_each(|what| own.touch(&ext_authz::counter(config, what)));
            }
            HttpFilter::StatefulSession(session) => {
                session.counters.iter().for_each(|counters| own.touch_all(&counters.all()));
            }
            HttpFilter::HeaderToMetadata(rules) => rules.counters().for_each(|name| others.touch(name)),
            HttpFilter::LocalRateLimit(limit) => limits::counters(limit).for_each(|name| others.touch(&name)),
            HttpFilter::Fault(_) => {
                own.touch_gauges(&[filters::ActiveFault::GAUGE]);
                own.touch_all(&filters::FAULT_COUNTERS);
            }
            HttpFilter::HealthCheck(_) => own.touch_all(&filters::HEALTH_COUNTERS),
            HttpFilter::SetMetadata(_) => own.touch(filters::METADATA_DENIED),
            HttpFilter::Cors => own.touch_all(&["cors.origin_invalid", "cors.origin_valid"]),
            HttpFilter::Rbac(rbac) => {
                for (prefix, what) in [
                    (&rbac.stat_prefix, ["allowed", "denied"]),
                    (&rbac.shadow_prefix, ["shadow_allowed", "shadow_denied"]),
                ] {
                    what.iter().for_each(|what| own.touch(&filters::rbac_counter(prefix, what)));
                }
            }
            HttpFilter::Jwt(jwt) => own.touch_all(&jwt.counters.all()),
            _ => {}
        }
    }
}

/// So many bytes of the preface tell (`PRI * HTTP/2`, as Envoy's).
const PREFIX: usize = 12;

/// Tells HTTP/2 by its preface, without taking bytes. `known`: which it is, once something comes. `None`: closed or idle for
/// too long.
async fn sniff(http: &Rc<Http>, io: &mut Io, known: Option<bool>) -> Option<bool> {
    let mut buf = [0u8; 24];
    let peek = async {
        let stream = match io {
            Io::Raw(crate::io::Raw::Tcp(stream)) => stream,
            Io::Server(stream) => {
                use tokio::io::AsyncBufReadExt as _;
                // What was in one record: clients write the preface at once, and who writes less speaks HTTP/1.
                let seen = stream.fill_buf().await.ok().filter(|seen| !seen.is_empty())?;
                return known.or_else(|| {
                    Some(seen.get(..PREFIX).is_some_and(|start| crate::inspect::PREFACE.starts_with(start)))
                });
            }
            _ => return known.or(Some(false)),
        };
        // As Envoy, by what came first: who writes less of the preface at once speaks HTTP/1.
        match stream.peek(&mut buf).await {
            Ok(0) | Err(_) => None,
            Ok(n) => known.or_else(|| Some(n >= PREFIX && crate::inspect::PREFACE.starts_with(&buf[..n.min(PREFIX)]))),
        }
    };
    let (config, stats) = (&http.config, &http.stats);
    let limits = [
        (config.idle_timeout, &stats.downstream_cx_idle_timeout),
        (http.max_duration, &stats.downstream_cx_max_duration_reached),
    ];
    let limit = limits.into_iter().filter_map(|(after, counter)| Some((after?, counter))).min_by_key(|limit| limit.0);
    let found = match limit {
        Some((after, counter)) => match tokio::time::timeout(after, peek).await {
            Ok(found) => found,
            Err(_) => {
                counter.inc();
                http.aged.set(true);
                stats.downstream_cx_destroy_local.inc();
                return None;
            }
        },
        None => peek.await,
    };
    if found.is_none() {
        stats.downstream_cx_destroy_remote.inc();
    }
    found
}
