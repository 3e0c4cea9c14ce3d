//! TCP proxying: choose a cluster and host, then move bytes both ways; large transfers bypass user space.

mod authz;
mod copy;
mod tunnel;

use crate::downstream::Connection;
use crate::io::Io;
use crate::peer;
use crate::runtime::exchange_of;
use crate::stats::TcpStats;
use crate::upstream::{AcquireError, Announced, Protocol, Source, Variant};
use crate::worker::Worker;
pub(crate) use authz::check as check_authz;
use bytes::Bytes;
use copy::{Side, Transfer};
use mesh_types::ArcStr;
use proxy_core::listener::{Direction, NetworkFilter, NetworkLocalRateLimit, TcpProxy};
use proxy_core::rbac::{Rbac, RbacInput};
use proxy_core::route::Priority;
use proxy_core::{
    AccessLog, ConnectionInfo, FilterState, FormatContext, Metadata, PickContext, ResponseFlags, StreamInfo,
};
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Serves one connection with `tcp_proxy`. `cluster`: chosen by a filter before (sni_cluster).
///
/// `gates`: checked when the client's first byte is there.
pub(crate) async fn serve(
    connection: Connection,
    proxy: Arc<TcpProxy>,
    cluster: Option<ArcStr>,
    gates: Vec<Arc<Rbac>>,
) {
    let worker = connection.worker.clone();
    let stats = worker.tcp_stats(&proxy.stat_prefix);
    stats.downstream_cx_total.inc();
    let mut info = StreamInfo::new(connection.info.clone(), SystemTime::now());
    let began = Instant::now();
    let random = worker.random.borrow_mut().next();
    let (name, metadata_match) = proxy.cluster(random);
    let name = cluster.unwrap_or_else(|| name.clone());
    let route = Route { name: &name, metadata_match, gates: &gates };
    if proxy.access_log_on_start {
        write_logs(&worker, &proxy.access_log, &info, "TcpConnectionStart");
    }
    run(connection, &proxy, &stats, &route, &mut info).await;
    info.times.complete = Some(began.elapsed());
    write_logs(&worker, &proxy.access_log, &info, "TcpConnectionEnd");
}

fn write_logs(worker: &std::rc::Rc<Worker>, logs: &[Arc<AccessLog>], info: &StreamInfo, kind: &'static str) {
    let mut context = FormatContext::new(info, None, None);
    context.access_log_type = kind;
    crate::log::write(worker, logs, &context);
}

/// Where a connection goes, and what must be checked first.
struct Route<'a> {
    name: &'a ArcStr,
    metadata_match: Option<&'a proxy_core::MetadataMatch>,
    gates: &'a [Arc<Rbac>],
}

async fn run(mut connection: Connection, proxy: &TcpProxy, stats: &TcpStats, route: &Route<'_>, info: &mut StreamInfo) {
    let Route { name, metadata_match, gates } = *route;
    let began = Instant::now();
    let worker = connection.worker.clone();
    let Some(cluster) = worker.cluster(name) else {
        stats.downstream_cx_no_route.inc();
        info.flags.insert(ResponseFlags::NO_CLUSTER);
        return;
    };
    let mut said = None;
    if let Some(exchange) = exchange_of(&connection.chain.chain.filters)
        && connection.info.tls.as_ref().is_some_and(|tls| tls.alpn.as_ref() == Some(&exchange.protocol))
    {
        let frame = worker.shared.identity.frame(exchange);
        said = match peer::exchange(&mut connection.io, &frame).await {
            Ok(said) => said,
            // The client hung up, or sends what no proxy sends.
            Err(error) => {
                tracing::debug!(%error, "no exchange of metadata with the client");
                info.flags.insert(ResponseFlags::DOWNSTREAM_TERMINATION);
                return;
            }
        };
    }
    info.upstream.cluster = Some(name.clone());
    info.upstream.cluster_stat_name = Some(cluster.config().stat_name.clone());
    info.upstream.cluster_metadata = Some(cluster.config().metadata.clone());
    let mut previous = Vec::new();
    let upstream = loop {
        let context = PickContext {
            hash: proxy.hash(&connection.info.remote),
            metadata_match,
            previous: &previous,
            retry: None,
            override_host: None,
            original_dst: connection.original_dst,
            headers: None,
            now: Instant::now(),
        };
        let host = cluster.pick(&context, &mut worker.random.borrow_mut());
        let Some(host) = host else {
            cluster.stats.upstream_cx_none_healthy.inc();
            if cluster.entry.is_original_dst() {
                cluster.stats.original_dst_host_invalid.inc();
            }
            info.flags.insert(ResponseFlags::NO_HEALTHY_UPSTREAM);
            return;
        };
        info.upstream.host = Some(host.clone());
        info.upstream.attempts += 1;
        cluster.stats.upstream_rq_total.inc();
        let source = Source::of(&connection.listener, &connection.info);
        let connected = match &proxy.tunneling {
            None => {
                let announced = Announced::to(&cluster, &host, &connection.info);
                let pool = cluster.pool(&worker, &host, &Variant { announced, source, ..Variant::default() });
                let dialled = pool.dial(Priority::Default).await;
                dialled.map(|(io, facts, counted)| (Way::Plain(Box::new(io), counted), facts))
            }
            Some(config) => {
                let protocol = Protocol::of(&cluster.config().protocol, None);
                let announced = Announced::to(&cluster, &host, &connection.info);
                let pool = cluster.pool(&worker, &host, &Variant { protocol, announced, source, ..Variant::default() });
                let request = config.request(&FormatContext::new(info, None, None));
                let opened = tunnel::open(&pool, request).await;
                opened
                    .map(|tunnel| (tunnel.upstream.facts.clone(), tunnel))
                    .map(|(facts, t)| (Way::Tunnel(Box::new(t)), facts))
            }
        };
        match connected {
            Ok(upstream) => break upstream,
            Err(AcquireError::Overflow) => {
                info.flags.insert(ResponseFlags::UPSTREAM_OVERFLOW);
                return;
            }
            Err(AcquireError::Connect(e)) => {
                info.flags.insert(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
                if !e.reason.is_empty() {
                    info.upstream.transport_failure = Some(e.reason.replace(' ', "_").into());
                }
                cluster.on_result(&host, Some(proxy_core::outlier::Outcome::ConnectFailed), &worker);
                previous.push(host);
                if info.upstream.attempts >= proxy.max_connect_attempts {
                    cluster.stats.upstream_cx_connect_attempts_exceeded.inc();
                    info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
                    return;
                }
                info.flags = ResponseFlags::NONE;
                if let Some(backoff) = &proxy.backoff {
                    let pause = backoff.after(info.upstream.attempts, &mut worker.random.borrow_mut());
                    tokio::time::sleep(pause).await;
                }
            }
        }
    };
    let (way, facts) = upstream;
    if let Some(host) = &info.upstream.host {
        cluster.on_result(host, Some(proxy_core::outlier::Outcome::Connected), &worker);
    }
    info.upstream.local = facts.local.clone();
    info.upstream.tls = facts.tls.clone();
    let said = if connection.listener.direction == Direction::Inbound { said } else { facts.peer.clone() };
    if proxy.access_log_on_connected {
        write_logs(&worker, &proxy.access_log, info, "TcpUpstreamConnected");
    }
    let labels = peer::tcp_labels(&worker, &connection.listener, info, &cluster, said);
    let report = labels.and_then(|l| worker.istio.tcp_opened(l));
    let transfer = Transfer {
        idle_timeout: proxy.idle_timeout,
        max_duration: proxy.max_downstream_connection_duration.map(|max| max.saturating_sub(began.elapsed())),
        received: Cell::new(0),
        sent: Cell::new(0),
        drain: connection.chain.drain.subscribe(),
        drain_time: worker.shared.drain_time,
    };
    let mut reported = (0, 0);
    let mut down = connection.io;
    let connection_info = info.connection.clone();
    let mut gate = || gates.iter().try_for_each(|rbac| check_rbac(&worker, &connection_info, rbac));
    let gate: Option<&mut dyn FnMut() -> Result<(), String>> = if gates.is_empty() { None } else { Some(&mut gate) };
    let moving = async {
        match way {
            Way::Plain(mut up, _counted) => copy::both(&mut down, &mut up, &transfer, gate).await,
            Way::Tunnel(tunnel) => tunnel.run(down, &transfer, gate).await,
        }
    };
    tokio::pin!(moving);
    // Long connections show up in metrics while they live.
    let reporting = connection.chain.chain.filters.iter().find_map(|filter| match filter {
        NetworkFilter::IstioStats(stats) => Some(stats.tcp_reporting),
        _ => None,
    });
    let every = reporting.unwrap_or(REPORT_EVERY);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    let far = Duration::from_secs(86400 * 365);
    let every = proxy.access_log_flush_interval.unwrap_or(far);
    let mut records = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    let ended = loop {
        tokio::select! {
            ended = &mut moving => break ended,
            _ = records.tick(), if proxy.access_log_flush_interval.is_some() => {
                (info.bytes_received, info.bytes_sent) = (transfer.received.get(), transfer.sent.get());
                info.times.complete = Some(began.elapsed());
                write_logs(&worker, &proxy.access_log, info, "TcpPeriodic");
                info.times.complete = None;
            }
            _ = ticks.tick(), if report.is_some() => {
                if let Some(report) = &report {
                    let now = (transfer.sent.get(), transfer.received.get());
                    report.bytes(now.0 - reported.0, now.1 - reported.1);
                    reported = now;
                }
            }
        }
    };
    let (received, sent) = (transfer.received.get(), transfer.sent.get());
    if let Some(report) = &report {
        report.bytes(sent - reported.0, received - reported.1);
        report.closed();
    }
    stats.downstream_cx_rx_bytes_total.add(received);
    stats.downstream_cx_tx_bytes_total.add(sent);
    cluster.stats.upstream_cx_tx_bytes_total.add(received);
    cluster.stats.upstream_cx_rx_bytes_total.add(sent);
    info.bytes_received = received;
    info.bytes_sent = sent;
    (info.downstream_wire_bytes_received, info.downstream_wire_bytes_sent) = (received, sent);
    info.upstream.wire_bytes_sent = received;
    info.upstream.wire_bytes_received = sent;
    match ended {
        copy::Ended::Denied(details) => info.connection_termination_details = Some(details.into()),
        copy::Ended::Idle => {
            stats.idle_timeout.inc();
            info.response_code_details = Some("tcp_session_idle_timeout".into());
        }
        copy::Ended::TooOld => {
            stats.max_downstream_connection_duration.inc();
            info.flags.insert(ResponseFlags::DURATION_TIMEOUT);
            info.response_code_details = Some("max_connection_duration_reached".into());
        }
        copy::Ended::Failed(Side::Downstream) => info.flags.insert(ResponseFlags::DOWNSTREAM_TERMINATION),
        copy::Ended::Failed(Side::Upstream) | copy::Ended::Complete | copy::Ended::Drained => {}
    }
}

/// How the bytes get to the host.
enum Way {
    Plain(Box<Io>, crate::upstream::Counted),
    Tunnel(Box<tunnel::Tunnel>),
}

/// Istio's default.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Checks a connection and counts the verdict as Envoy: `PREFIXrbac.allowed` and the shadow ones. An error is the detail.
pub(crate) fn check_rbac(worker: &Worker, info: &ConnectionInfo, rbac: &Rbac) -> Result<(), String> {
    let verdict = rbac.check(&RbacInput {
        headers: None,
        connection: info,
        remote: &info.remote,
        metadata: &Metadata::default(),
        filter_state: &FilterState::default(),
        route_metadata: None,
    });
    let stats = worker.named_stats();
    let prefix = rbac.stat_prefix.trim_end_matches('.');
    let name = |what: &str| if prefix.is_empty() { format!("rbac.{what}") } else { format!("{prefix}.rbac.{what}") };
    stats.inc(&name(if verdict.allowed { "allowed" } else { "denied" }));
    if let Some(shadow) = &verdict.shadow {
        stats.inc(&name(if shadow.allowed { "shadow_allowed" } else { "shadow_denied" }));
    }
    if verdict.allowed { Ok(()) } else { Err(verdict.details()) }
}

/// Network local rate limit: false means close.
pub(crate) fn take_token(connection: &Connection, limit: &Arc<NetworkLocalRateLimit>) -> bool {
    let key = Arc::as_ptr(limit) as usize;
    let mut buckets = connection.worker.buckets.borrow_mut();
    let bucket =
        buckets.entry(key).or_insert_with(|| proxy_core::filters::TokenBucket::new(&limit.bucket, Instant::now()));
    bucket.take(1, Instant::now())
}

/// `envoy.filters.network.direct_response`.
pub(crate) async fn respond(mut connection: Connection, bytes: Bytes) {
    // The peer may be gone; nothing else depends on it.
    if connection.io.write_all(&bytes).await.is_ok() {
        let _ = connection.io.shutdown().await;
    }
}

/// `envoy.filters.network.echo`.
pub(crate) async fn echo(mut connection: Connection) {
    let mut buf = vec![0; 16 * 1024];
    loop {
        match connection.io.read(&mut buf).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if connection.io.write_all(&buf[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// True when both ends are plain sockets, so that the kernel can move the bytes.
fn spliceable(a: &Io, b: &Io) -> bool {
    matches!(a, Io::Raw(_)) && matches!(b, Io::Raw(_))
}
