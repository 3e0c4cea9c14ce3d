//! TCP proxying: choose a cluster and host, then move bytes both ways; large transfers bypass user space.

mod authz;
mod copy;
mod tunnel;

use crate::downstream::Connection;
use crate::io::Io;
use crate::peer;
use crate::runtime::exchange_of;
use crate::stats::TcpStats;
use crate::upstream::{AcquireError, Acquired, Active, Announced, Protocol, Source, Variant, WorkerCluster};
use crate::worker::Worker;
pub(crate) use authz::check as check_authz;
use bytes::Bytes;
use copy::{Side, Transfer};
use mesh_types::ArcStr;
use proxy_core::circuit::Resource;
use proxy_core::listener::{Direction, NetworkFilter, TcpProxy};
use proxy_core::outlier::Outcome;
use proxy_core::rbac::{NETWORK_NAMESPACE, Rbac, RbacInput};
use proxy_core::route::Priority;
use proxy_core::{AccessLog, ConnectionInfo, FormatContext, Host, Metadata, PickContext, ResponseFlags, StreamInfo};
use std::cell::{Cell, RefCell};
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
) -> StreamInfo {
    let worker = connection.worker.clone();
    let stats = worker.tcp_stats(&proxy.stat_prefix);
    stats.downstream_cx_total.inc();
    let mut info = stream(connection.info.clone());
    let began = Instant::now();
    let random = worker.random.borrow_mut().next();
    let (name, metadata_match) = proxy.cluster(random);
    let chosen = cluster.or_else(|| info.filter_state.values.get("envoy.tcp_proxy.cluster").cloned());
    let name = chosen.unwrap_or_else(|| name.clone());
    let route = Route { name: &name, metadata_match, gates: &gates };
    if proxy.access_log_on_start {
        write_logs(&worker, &proxy.access_log, &info, "TcpConnectionStart");
    }
    let chain = connection.chain.clone();
    tokio::select! {
        biased;
        () = run(connection, &proxy, &stats, &route, &mut info) => {}
        // Before it is connected: from then on that is seen to.
        () = chain.cut() => {
            if proxy.tunneling.is_some() && info.upstream.host.is_some() {
                info.flags.insert(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
            }
            info.local_close_reason = chain.cut_reason();
        }
    }
    info.times.complete = Some(began.elapsed());
    write_logs(&worker, &proxy.access_log, &info, "TcpConnectionEnd");
    info
}

// Envoy `TcpProxy::Filter::onInitFailure`, spelt as there, with the number of its `UpstreamFailureReason`.
const CONNECT_FAILED: &str = "tcp_initializion_failure:0";
const NO_HEALTHY_HOST: &str = "tcp_initializion_failure:1";
const LIMIT_EXCEEDED: &str = "tcp_initializion_failure:2";
const NO_ROUTE: &str = "tcp_initializion_failure:3";

/// Why a connection is closed that no policy allows (Envoy `RoleBasedAccessControlFilter::closeConnection`).
pub(crate) const RBAC_DENIED: &str = "rbac_deny_close";

/// A connection is one stream, and shows what listener filters found.
fn stream(connection: Arc<ConnectionInfo>) -> StreamInfo {
    let mut info = StreamInfo::new(connection, SystemTime::now());
    info.dynamic_metadata = info.connection.metadata.clone();
    info.upstream.of_tcp_proxy = true;
    info
}

/// A connection whose TLS handshake failed: its host was chosen, and connected to, as soon as it came.
pub(crate) async fn give_up(
    worker: &std::rc::Rc<Worker>,
    proxy: &TcpProxy,
    connection: Arc<ConnectionInfo>,
    original_dst: Option<std::net::SocketAddr>,
) -> StreamInfo {
    let mut info = stream(connection);
    worker.tcp_stats(&proxy.stat_prefix).downstream_cx_total.inc();
    let random = worker.random.borrow_mut().next();
    let (name, metadata_match) = proxy.cluster(random);
    let name = info.filter_state.values.get("envoy.tcp_proxy.cluster").unwrap_or(name).clone();
    match worker.cluster(&name) {
        None => info.flags.insert(ResponseFlags::NO_CLUSTER),
        Some(cluster) => {
            info.upstream.cluster = Some(name);
            info.upstream.cluster_stat_name = Some(cluster.config().stat_name.clone());
            info.upstream.cluster_metadata = Some(cluster.config().metadata().clone());
            let hash = proxy.hash(&info.connection.remote, &info.connection.filter_state);
            let context = PickContext { hash, metadata_match, original_dst, ..PickContext::at(Instant::now()) };
            let picked = cluster.pick(&context, &mut worker.random.borrow_mut());
            match picked {
                Some(host) => connect_unused(worker, proxy, &cluster, host, &mut info).await,
                None => {
                    cluster.stats.upstream_cx_none_healthy.inc();
                    info.flags.insert(ResponseFlags::NO_HEALTHY_UPSTREAM);
                    info.local_close_reason = Some(NO_HEALTHY_HOST.into());
                }
            }
        }
    }
    info.times.complete = Some(Duration::ZERO);
    write_logs(worker, &proxy.access_log, &info, "TcpConnectionEnd");
    info
}

/// Connects to a host for a client that has gone by then. Of a tunnel there is the connection only, without its request.
async fn connect_unused(
    worker: &std::rc::Rc<Worker>,
    proxy: &TcpProxy,
    cluster: &std::rc::Rc<WorkerCluster>,
    host: Arc<Host>,
    info: &mut StreamInfo,
) {
    info.upstream.host = Some(host.clone());
    info.upstream.attempted.push(host.clone());
    info.upstream.attempts = 1;
    let announced = Announced::to(cluster, &host, &info.connection).map(Announced::alone);
    let protocol = match &proxy.tunneling {
        None => Protocol::Raw,
        Some(_) => Protocol::of(&cluster.config().protocol, None),
    };
    let Some(pool) = cluster.pool(worker, &host, &Variant { protocol, announced, ..Variant::default() }) else {
        return;
    };
    let connected = match &proxy.tunneling {
        None => pool.dial().await.map(|(_io, facts, _counted)| {
            cluster.stats.upstream_rq_total.inc();
            host.state.stats.rq_total.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            info.upstream.local = facts.local.clone();
        }),
        Some(_) => pool.acquire().await.map(Acquired::put_back),
    };
    match connected {
        Ok(()) => cluster.judge(&host, Some(Outcome::Connected), worker),
        Err(AcquireError::Overflow) => {}
        Err(AcquireError::Connect(e)) => {
            info.flags.insert(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
            if !e.reason.is_empty() {
                info.upstream.transport_failure = Some(e.reason.replace(' ', "_").into());
            }
            cluster.judge(&host, Some(Outcome::ConnectFailed), worker);
            if proxy.max_connect_attempts == 1 {
                cluster.stats.upstream_cx_connect_attempts_exceeded.inc();
                info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
                info.local_close_reason = Some(CONNECT_FAILED.into());
            }
        }
    }
}

/// A connection that a filter before ended.
pub(crate) fn refuse(
    connection: &Connection,
    proxy: &TcpProxy,
    flags: ResponseFlags,
    reason: Option<&'static str>,
) -> StreamInfo {
    let mut info = stream(connection.info.clone());
    info.local_close_reason = reason.map(Into::into);
    connection.worker.tcp_stats(&proxy.stat_prefix).downstream_cx_total.inc();
    info.flags.insert(flags);
    info.times.complete = Some(Duration::ZERO);
    write_logs(&connection.worker, &proxy.access_log, &info, "TcpConnectionEnd");
    info
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
    let failed = |info: &mut StreamInfo, reason: &'static str| info.local_close_reason = Some(reason.into());
    let began = Instant::now();
    let worker = connection.worker.clone();
    let Some(cluster) = worker.cluster(name) else {
        stats.downstream_cx_no_route.inc();
        info.flags.insert(ResponseFlags::NO_CLUSTER);
        failed(info, NO_ROUTE);
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
    info.upstream.cluster_metadata = Some(cluster.config().metadata().clone());
    let mut previous = Vec::new();
    let upstream = loop {
        // Nobody waits for room (Envoy `TcpProxy::Filter::establishUpstreamConnection`).
        if cluster.entry.breakers.get(Priority::Default).remaining(Resource::Connections) == 0 {
            cluster.stats.upstream_cx_overflow.inc();
            info.flags.insert(ResponseFlags::UPSTREAM_OVERFLOW);
            failed(info, LIMIT_EXCEEDED);
            return;
        }
        let context = PickContext {
            hash: proxy.hash(&connection.info.remote, &connection.info.filter_state),
            metadata_match,
            previous: &previous,
            retry: None,
            override_host: None,
            original_dst: connection.original_dst,
            stream: Some(&*info),
            headers: None,
            now: Instant::now(),
        };
        let host = cluster.pick(&context, &mut worker.random.borrow_mut());
        let Some(host) = host else {
            // A host that may come yet is no choice that failed.
            if !cluster.looks_up(&worker, info) {
                cluster.stats.upstream_cx_none_healthy.inc();
            }
            info.flags.insert(ResponseFlags::NO_HEALTHY_UPSTREAM);
            failed(info, NO_HEALTHY_HOST);
            return;
        };
        info.upstream.host = Some(host.clone());
        info.upstream.attempted.push(host.clone());
        info.upstream.attempts += 1;
        let source = Source::of(&connection.listener, &connection.info);
        let announced = Announced::to(&cluster, &host, &connection.info).map(Announced::alone);
        let protocol = match &proxy.tunneling {
            None => Protocol::Raw,
            Some(_) => Protocol::of(&cluster.config().protocol, None),
        };
        let variant = Variant { protocol, announced, source, ..Variant::default() };
        let Some(pool) = cluster.pool(&worker, &host, &variant) else {
            info.flags.insert(ResponseFlags::NO_HEALTHY_UPSTREAM);
            failed(info, NO_HEALTHY_HOST);
            return;
        };
        let connected = match &proxy.tunneling {
            None => {
                let dialled = pool.dial().await;
                dialled.map(|(io, facts, counted)| (Way::Plain(Box::new(io), counted), facts))
            }
            Some(config) => {
                let opened = tunnel::open(&pool, config, info, &cluster).await;
                opened
                    .map(|tunnel| (tunnel.upstream.facts.clone(), tunnel))
                    .map(|(facts, t)| (Way::Tunnel(Box::new(t)), facts))
            }
        };
        match connected {
            Ok(upstream) => break upstream,
            Err(AcquireError::Overflow) => {
                info.upstream.host = None;
                if info.upstream.attempts >= proxy.max_connect_attempts {
                    cluster.stats.upstream_cx_connect_attempts_exceeded.inc();
                    info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
                    failed(info, CONNECT_FAILED);
                    return;
                }
            }
            Err(AcquireError::Connect(e)) => {
                info.flags.insert(ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
                if !e.reason.is_empty() {
                    info.upstream.transport_failure = Some(e.reason.replace(' ', "_").into());
                }
                cluster.judge(&host, Some(Outcome::ConnectFailed), &worker);
                previous.push(host);
                if info.upstream.attempts >= proxy.max_connect_attempts {
                    cluster.stats.upstream_cx_connect_attempts_exceeded.inc();
                    info.flags.insert(ResponseFlags::UPSTREAM_RETRY_LIMIT);
                    failed(info, CONNECT_FAILED);
                    return;
                }
                if let Some(backoff) = &proxy.backoff {
                    let pause = backoff.after(info.upstream.attempts, &mut worker.random.borrow_mut());
                    tokio::time::sleep(pause).await;
                }
            }
        }
    };
    let (way, facts) = upstream;
    // A tunnel's request counts on its own.
    let plain = info.upstream.host.clone().filter(|_| matches!(way, Way::Plain(..)));
    let _active = plain.map(|host| {
        cluster.stats.upstream_rq_total.inc();
        Active::new(cluster.clone(), host)
    });
    if let Some(host) = &info.upstream.host {
        cluster.judge(host, Some(Outcome::Connected), &worker);
    }
    info.upstream.local = facts.local.clone();
    info.upstream.tls = facts.tls.clone();
    let said = if connection.listener.direction == Direction::Inbound { said } else { facts.peer.clone() };
    if proxy.access_log_on_connected {
        write_logs(&worker, &proxy.access_log, info, "TcpUpstreamConnected");
    }
    let labels = peer::tcp_labels(&worker, &connection.listener, info, &cluster, said);
    let report = labels.and_then(|l| worker.istio.tcp_opened(l));
    let own_timeout = info.filter_state.values.get("envoy.tcp_proxy.per_connection_idle_timeout_ms");
    let own_timeout = own_timeout.and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
    let transfer = Transfer {
        idle_timeout: own_timeout.or(proxy.idle_timeout),
        max_duration: proxy
            .max_downstream_connection_duration
            .map(|max| max.draw(&mut worker.random.borrow_mut()).saturating_sub(began.elapsed())),
        received: Cell::new(0),
        sent: Cell::new(0),
        continuous: gates.iter().any(|rbac| rbac.continuous),
        chain: connection.chain.clone(),
    };
    let mut reported = (0, 0);
    let mut down = connection.io;
    let connection_info = info.connection.clone();
    let told = RefCell::new(info.connection.metadata.clone());
    let delay = Cell::new(None);
    let mut gate = || {
        gates.iter().try_for_each(|rbac| {
            let checked = check_rbac(&worker, &connection_info, rbac, &mut told.borrow_mut());
            checked.inspect_err(|_| delay.set(rbac.delay_deny))
        })
    };
    let gate: Option<&mut dyn FnMut() -> Result<(), String>> = if gates.is_empty() { None } else { Some(&mut gate) };
    // Without TLS a connection that fails was reset.
    let raw = matches!(&way, Way::Plain(up, _) if matches!(**up, Io::Raw(_)));
    let over = Cell::new(None);
    let moving = async {
        match way {
            Way::Plain(mut up, counted) => {
                let ended = copy::both(&mut down, &mut up, &transfer, gate).await;
                let by_peer =
                    copy::Ended::Complete(Side::Upstream) == ended || copy::Ended::Failed(Side::Upstream) == ended;
                // Who says last that it ends is who ends it, as Envoy sees it.
                counted.ended_by_peer(by_peer);
                // Dropped in this order: the server hears of the end first.
                (ended, Some((up, counted, down)))
            }
            Way::Tunnel(mut tunnel) => {
                let ended = tunnel.run(down, &transfer, gate).await;
                over.set(Some(tunnel));
                (ended, None)
            }
        }
    };
    tokio::pin!(moving);
    let failed = host_fails(&cluster, info.upstream.host.clone());
    tokio::pin!(failed);
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
    let (ended, held) = loop {
        tokio::select! {
            over = &mut moving => break over,
            () = &mut failed => break (copy::Ended::Complete(Side::Downstream), None),
            _ = records.tick(), if proxy.access_log_flush_interval.is_some() => {
                (info.bytes_received, info.bytes_sent) = (transfer.received.get(), transfer.sent.get());
                (info.downstream_wire_bytes_received, info.downstream_wire_bytes_sent) =
                    (info.bytes_received, info.bytes_sent);
                info.upstream.wire_bytes_sent = info.bytes_received;
                info.upstream.wire_bytes_received = info.bytes_sent;
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
    info.dynamic_metadata = told.take();
    let (received, sent) = (transfer.received.get(), transfer.sent.get());
    if let Some(report) = &report {
        report.bytes(sent - reported.0, received - reported.1);
        report.closed();
    }
    stats.downstream_cx_rx_bytes_total.add(received);
    stats.downstream_cx_tx_bytes_total.add(sent);
    info.bytes_received = received;
    info.bytes_sent = sent;
    (info.downstream_wire_bytes_received, info.downstream_wire_bytes_sent) = (received, sent);
    // Records written meanwhile knew only what was inside.
    (info.upstream.wire_bytes_sent, info.upstream.wire_bytes_received) = (0, 0);
    match (over.take(), &proxy.tunneling) {
        (Some(tunnel), Some(config)) => tunnel.finish(config, info, &cluster.stats),
        _ => {
            cluster.stats.upstream_cx_tx_bytes_total.add(received);
            cluster.stats.upstream_cx_rx_bytes_total.add(sent);
            (info.upstream.wire_bytes_sent, info.upstream.wire_bytes_received) = (received, sent);
        }
    }
    match ended {
        copy::Ended::Denied(details) => {
            info.connection_termination_details = Some(details.into());
            info.local_close_reason = Some(RBAC_DENIED.into());
            // The proxy filter has seen nothing.
            (info.downstream_wire_bytes_received, info.upstream.wire_bytes_sent) = (0, 0);
            // Both connections stay meanwhile.
            if let (Some(delay), Some((_up, _counted, mut down))) = (delay.get(), held) {
                linger(&mut down, delay, true).await;
            }
        }
        copy::Ended::Idle => {
            stats.idle_timeout.inc();
            info.local_close_reason = Some("tcp_session_idle_timeout".into());
        }
        copy::Ended::TooOld => {
            stats.max_downstream_connection_duration.inc();
            info.flags.insert(ResponseFlags::DURATION_TIMEOUT);
            info.local_close_reason = Some("max_connection_duration_reached".into());
        }
        copy::Ended::Failed(Side::Upstream) if raw => info.flags.insert(ResponseFlags::UPSTREAM_RESET),
        // That the client was the one to go Envoy only says of those that are not connected yet.
        copy::Ended::Failed(_) | copy::Ended::Complete(_) => {}
        copy::Ended::Drained => info.local_close_reason = transfer.chain.cut_reason(),
    }
}

/// A refused client is not told at once; what it sends meanwhile goes nowhere. With `half_close` it may have said all and still wait.
pub(crate) async fn linger(client: &mut Io, delay: Duration, half_close: bool) {
    let gone = async {
        let mut dropped = [0; 1024];
        loop {
            match client.read(&mut dropped).await {
                Ok(0) if half_close => std::future::pending().await,
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    // Whichever comes first.
    let _ = tokio::time::timeout(delay, gone).await;
}

/// Resolves when the host is found to fail, for clusters whose connections end then.
async fn host_fails(cluster: &WorkerCluster, host: Option<Arc<Host>>) {
    if let (Some(failures), Some(host)) = (&cluster.entry.failures, host) {
        let mut failures = failures.subscribe();
        let before = host.state.failures();
        while failures.changed().await.is_ok() {
            if host.state.failures() != before {
                return;
            }
        }
    }
    std::future::pending().await
}

/// How the bytes get to the host.
enum Way {
    Plain(Box<Io>, crate::upstream::Counted),
    Tunnel(Box<tunnel::Tunnel>),
}

/// Istio's default.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// The names of a policy's counters: `PREFIX.rbac.WHAT`, with the prefix of shadow rules in between.
fn rbac_counter(rbac: &Rbac, shadow: bool, what: &str) -> String {
    let parts = [&*rbac.stat_prefix, "rbac", if shadow { &*rbac.shadow_prefix } else { "" }, what];
    let parts = parts.iter().map(|part| part.trim_end_matches('.')).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join(".")
}

/// Makes the counters of a policy exist.
pub(crate) fn touch_rbac(worker: &Worker, rbac: &Arc<Rbac>) {
    if worker.touched.borrow_mut().insert(Arc::as_ptr(rbac) as usize) {
        for (shadow, what) in [(false, "allowed"), (false, "denied"), (true, "shadow_allowed"), (true, "shadow_denied")]
        {
            worker.named_stats().touch(&rbac_counter(rbac, shadow, what));
        }
    }
}

/// Checks a connection, counts the verdict as Envoy and notes it in the metadata. An error is the detail.
pub(crate) fn check_rbac(
    worker: &Worker,
    info: &ConnectionInfo,
    rbac: &Rbac,
    metadata: &mut Metadata,
) -> Result<(), String> {
    let verdict = rbac.check(&RbacInput {
        headers: None,
        connection: info,
        remote: &info.remote,
        metadata: &Metadata::default(),
        filter_state: &info.filter_state,
        route: None,
        stream: None,
    });
    let stats = worker.named_stats();
    if verdict.enforced.is_some() {
        stats.inc(&rbac_counter(rbac, false, if verdict.allowed { "allowed" } else { "denied" }));
    }
    if let Some(shadow) = &verdict.shadow {
        stats.inc(&rbac_counter(rbac, true, if shadow.allowed { "shadow_allowed" } else { "shadow_denied" }));
        metadata.share(&NETWORK_NAMESPACE, &shadow.note);
    }
    if let Some(hint) = verdict.log_hint {
        metadata.set("envoy.common", "access_log_hint", hint.into());
    }
    if verdict.allowed { Ok(()) } else { Err(verdict.details()) }
}

/// `envoy.filters.network.direct_response`.
pub(crate) async fn respond(mut connection: Connection, bytes: Bytes) {
    // The peer may be gone; nothing else depends on it.
    if connection.io.write_all(&bytes).await.is_ok() {
        let _ = connection.io.shutdown().await;
    }
}

/// `envoy.filters.network.echo`, which counts the bytes.
pub(crate) async fn echo(mut connection: Connection, bytes: &Cell<u64>) {
    let mut buf = vec![0; 16 * 1024];
    loop {
        match connection.io.read(&mut buf).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                bytes.set(bytes.get() + n as u64);
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
