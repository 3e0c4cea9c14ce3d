//! Active health checks: HTTP, gRPC and TCP, one task per host, on the control side.

use crate::events::{self, HealthEvent};
use crate::h1::{self, Conn, Limits};
use crate::io::{Io, Raw};
use crate::runtime::{ClusterEntry, Shared};
use crate::socket;
use crate::stats::{ClusterStats, Kind};
use crate::upstream::ServerNames;
use bytes::Bytes;
use mesh_types::ArcStr;
use proxy_core::cluster::TransportSocket;
use proxy_core::endpoints::HealthFlag;
use proxy_core::health_check::{
    CheckKind, CheckResult, HealthCheckConfig, HostChecks, HttpCheck, Transition, contains_in_order,
};
use proxy_core::route::HeaderOps;
use proxy_core::{Address, ConnectionInfo, FormatContext, Headers, Host, Random, StreamInfo};
use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, PoisonError, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// How often the list of hosts is compared with what is being checked.
const FOLLOW: Duration = Duration::from_millis(250);
/// A TCP check reads at most this much of an answer.
const MAX_ANSWER: usize = 64 * 1024;

/// Starts checking a cluster's hosts; ends with the cluster. `done` is told when all hosts were asked once.
pub(crate) fn watch(shared: &Arc<Shared>, entry: &Arc<ClusterEntry>, done: impl FnOnce() + Send + 'static) {
    if entry.cluster.health_checks.is_empty() || tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let stats = Arc::new(ClusterStats::default());
    for what in ["attempt", "success", "failure", "passive_failure", "network_failure", "verify_cluster"] {
        stats.other.touch(&format!("health_check.{what}"));
    }
    shared.registry.add(Kind::Cluster, entry.cluster.stat_name.clone(), stats.clone());
    events::open(shared, entry.cluster.health_checks.iter().flat_map(|config| &config.event_logs));
    // Ends when the cluster is dropped.
    tokio::spawn(follow(shared.clone(), Arc::downgrade(entry), stats, done));
}

async fn follow(
    shared: Arc<Shared>,
    entry: Weak<ClusterEntry>,
    stats: Arc<ClusterStats>,
    done: impl FnOnce() + Send + 'static,
) {
    // By where its state is: an address may be there twice, as two hosts.
    let place = |host: &Arc<Host>| Arc::as_ptr(&host.state).addr();
    let mut running: HashMap<usize, (Arc<Host>, Vec<AbortHandle>)> = HashMap::new();
    let first = Arc::new(Notify::new());
    let mut done = Some(done);
    while let Some(cluster) = entry.upgrade() {
        let endpoints = cluster.endpoints.load_full();
        let present: HashSet<usize> = endpoints.hosts().map(place).collect();
        running.retain(|place, (_, tasks)| {
            let stays = present.contains(place);
            if !stays {
                tasks.iter().for_each(AbortHandle::abort);
            }
            stays
        });
        let mut waited_for = 0;
        for host in endpoints.hosts() {
            if host.health_check.address.is_none() {
                continue;
            }
            waited_for += usize::from(!host.state.was_checked());
            if running.contains_key(&place(host)) {
                continue;
            }
            let checks = (0..cluster.cluster.health_checks.len()).map(|index| {
                let (shared, entry) = (shared.clone(), entry.clone());
                let (host, stats, first) = (host.clone(), stats.clone(), first.clone());
                tokio::spawn(check_host(Session { shared, entry, host, index, stats, first })).abort_handle()
            });
            running.insert(place(host), (host.clone(), checks.collect()));
        }
        if waited_for == 0 && cluster.has_endpoints() {
            cluster.checked.store(true, Release);
            if let Some(done) = done.take() {
                done();
            }
        }
        drop(endpoints);
        drop(cluster);
        // While the cluster waits for its first results they come in here.
        tokio::select! {
            () = tokio::time::sleep(FOLLOW) => {}
            () = first.notified(), if done.is_some() => {}
        }
    }
    for (_, tasks) in running.into_values() {
        tasks.iter().for_each(AbortHandle::abort);
    }
}

/// One of a host's checks, and what it keeps between the rounds.
struct Session {
    shared: Arc<Shared>,
    entry: Weak<ClusterEntry>,
    host: Arc<Host>,
    index: usize,
    stats: Arc<ClusterStats>,
    /// Told after the first result, when a cluster waits for it.
    first: Arc<Notify>,
}

async fn check_host(session: Session) {
    let Session { shared, entry, host, index, stats, first } = session;
    let mut random = Random::new(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), index));
    let mut state = HostChecks::default();
    let mut kept = Kept::Nothing;
    let mut is_first = true;
    let mut words = host.state.own_words();
    loop {
        let Some(cluster) = entry.upgrade() else { return };
        let Some(config) = cluster.cluster.health_checks.get(index).cloned() else { return };
        if is_first {
            let delay = state.initial_delay(&config, &mut random);
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
        }
        stats.other.inc("health_check.attempt");
        let asked = check(&shared, &cluster, &host, &config, &stats, std::mem::take(&mut kept));
        let mut status = 0;
        let result = match tokio::time::timeout(config.timeout, asked).await {
            Ok(Ok((result, answered, connection))) => {
                status = answered;
                kept = if config.reuse_connection { connection } else { Kept::Nothing };
                result
            }
            Ok(Err(e)) => {
                tracing::debug!(host = %host.address, error = %e, "health check failed");
                CheckResult::Unreachable
            }
            Err(_) => CheckResult::TimedOut,
        };
        if matches!(result, CheckResult::Unreachable | CheckResult::TimedOut) {
            stats.other.inc("health_check.network_failure");
        }
        let passed = matches!(result, CheckResult::Passed | CheckResult::Degraded);
        stats.other.inc(if passed { "health_check.success" } else { "health_check.failure" });
        let said = host.state.own_words();
        if std::mem::replace(&mut words, said) != said {
            state.on_own_word();
        }
        let used = cluster.used.load(Relaxed);
        let (first_result, was_degraded) = (state.is_first(), host.state.has(HealthFlag::DegradedActive));
        let (transition, pause) = state.on_result(&config, &host, result, used, &mut random);
        let degraded = host.state.has(HealthFlag::DegradedActive);
        let told = changes(&config, result, status, transition, first_result, was_degraded, degraded);
        for event in told.into_iter().flatten() {
            events::health(&shared, &config, &cluster.cluster.name, &host, event);
        }
        if let (true, Some(detector)) = (passed, &cluster.outlier) {
            let mut detector = detector.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(event) = detector.on_active_check_passed(&host, Instant::now()) {
                events::outlier(&shared, &cluster.cluster.name, &event, None);
            }
        }
        if matches!(transition, Transition::Healthy | Transition::Unhealthy) {
            tracing::info!(cluster = %cluster.cluster.name, host = %host.address, ?transition, "health changed");
            cluster.tell_of_failure(transition == Transition::Unhealthy);
        }
        if std::mem::take(&mut is_first) {
            first.notify_one();
        }
        drop(cluster);
        tokio::time::sleep(pause).await;
    }
}

/// What is told of a result (Envoy `ActiveHealthCheckSession::handleSuccess` and `setUnhealthy`).
fn changes(
    config: &HealthCheckConfig,
    result: CheckResult,
    status: u16,
    transition: Transition,
    first: bool,
    was_degraded: bool,
    degraded: bool,
) -> [Option<HealthEvent>; 2] {
    if matches!(result, CheckResult::Passed | CheckResult::Degraded) {
        let added = (transition == Transition::Healthy).then_some(HealthEvent::Added { first });
        let changed = match (was_degraded, degraded) {
            (false, true) => Some(HealthEvent::Degraded),
            (true, false) => Some(HealthEvent::NoLongerDegraded),
            _ => (config.log_successes && transition == Transition::Unchanged).then_some(HealthEvent::Succeeded),
        };
        return [added, changed];
    }
    let failure = match result {
        CheckResult::TimedOut => events::Failure::Timeout,
        CheckResult::Unreachable => events::Failure::Network,
        _ => events::Failure::Active,
    };
    let ejected = (transition == Transition::Unhealthy).then_some(HealthEvent::Ejected { failure, status });
    let failed = (first || config.log_failures).then_some(HealthEvent::Failed { failure, first, status });
    [ejected, failed]
}

/// A connection that the next check uses again.
#[derive(Default)]
enum Kept {
    #[default]
    Nothing,
    Raw(Box<Io>),
    H1(Box<Conn>),
    H2(h2::client::SendRequest<Bytes>, Driver),
}

impl Kept {
    /// An HTTP/1 connection that the host has not closed meanwhile.
    fn quiet_h1(self) -> Option<Box<Conn>> {
        let Self::H1(mut conn) = self else { return None };
        conn.is_quiet(&mut Context::from_waker(Waker::noop())).then_some(conn)
    }
}

/// The task that moves an HTTP/2 connection's frames; the connection ends with this.
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn connect(shared: &Shared, cluster: &ClusterEntry, host: &Host, config: &HealthCheckConfig) -> io::Result<Io> {
    let mut address = host.health_check.address.clone().unwrap_or_else(|| host.address.clone());
    if let (Some(port), Address::Ip(socket)) = (config.alt_port, &mut address) {
        socket.set_port(port);
    }
    let mut raw = socket::connect(&address, socket::ConnectOptions::default()).await?;
    let transport = cluster.cluster.check_transport(host, config.transport.as_ref());
    if let TransportSocket::ProxyProtocol { header, .. } = transport {
        let version = &header.version;
        raw.write_all(&announcement(&raw, *version)).await?;
    }
    match cluster.tls_of(transport) {
        Some(tls) => {
            let alpn = (!config.alpn.is_empty()).then_some(config.alpn.as_slice());
            Ok(Io::Client(tls.connect(raw, &shared.secrets, &ServerNames::default(), &host.hostname, alpn).await?.0))
        }
        None => Ok(Io::Raw(raw)),
    }
}

/// A PROXY header: nobody is announced but the two ends of this connection, and in version 2 not even these.
fn announcement(raw: &Raw, version: u8) -> Vec<u8> {
    let (from, to) = match raw {
        Raw::Tcp(stream) if version == 1 => (stream.local_addr().ok(), stream.peer_addr().ok()),
        _ => (None, None),
    };
    crate::proxy_protocol::header(version, from, to)
}

async fn check(
    shared: &Shared,
    cluster: &ClusterEntry,
    host: &Host,
    config: &HealthCheckConfig,
    stats: &ClusterStats,
    kept: Kept,
) -> io::Result<(CheckResult, u16, Kept)> {
    let fresh = || connect(shared, cluster, host, config);
    match &config.kind {
        CheckKind::Tcp { send, receive, announced } => {
            let io = match kept {
                Kept::Raw(io) => *io,
                _ => {
                    let mut io = fresh().await?;
                    if let (Some(version), Io::Raw(raw)) = (announced, &io) {
                        let header = announcement(raw, *version);
                        io.write_all(&header).await?;
                    }
                    io
                }
            };
            tcp(io, send, receive).await.map(|(result, kept)| (result, 0, kept))
        }
        CheckKind::Http(http) => {
            let head = http_head(cluster, host, http);
            let (status, headers, body, kept) = if http.http2 {
                let (send, driver) = match kept {
                    Kept::H2(send, driver) if !driver.0.is_finished() => (send, driver),
                    _ => handshake(fresh().await?).await?,
                };
                let (status, headers, body) = over_h2(send.clone(), &head, http.send.clone(), http.buffer).await?;
                (status, headers, body, Kept::H2(send, driver))
            } else {
                let conn = match kept.quiet_h1() {
                    Some(conn) => conn,
                    None => {
                        stats.other.touch_all(&crate::stats::HTTP1_CODEC);
                        Box::new(Conn::new(fresh().await?))
                    }
                };
                over_h1(conn, &head, http).await?
            };
            let result = judge(http, status, &headers, &body, stats);
            let told = headers.contains("x-envoy-immediate-health-check-fail");
            let refused = !http.matches(&body) || http.judge(status) != CheckResult::Passed;
            if told && refused {
                host.state.set(HealthFlag::Excluded, true);
            }
            Ok((result, status, kept))
        }
        CheckKind::Grpc { service, authority, headers } => {
            let authority = authority_of(cluster, host, authority);
            let scheme = scheme_of(cluster, host);
            let mut head = Headers::of([
                (":method", "POST"),
                (":scheme", scheme),
                (":authority", &**authority),
                (":path", "/grpc.health.v1.Health/Check"),
                ("te", "trailers"),
                ("grpc-timeout", &*grpc_timeout(config.timeout)),
                ("content-type", "application/grpc"),
                ("user-agent", "Envoy/HC"),
            ]);
            add_headers(headers, &mut head);
            // HealthCheckRequest { service = 1 }, framed.
            let mut message = vec![0, 0, 0, 0, 0];
            if !service.is_empty() {
                prost::encoding::string::encode(1, &service.to_string(), &mut message);
            }
            let length = u32::try_from(message.len() - 5).unwrap_or(u32::MAX);
            message[1..5].copy_from_slice(&length.to_be_bytes());
            let (send, driver) = match kept {
                Kept::H2(send, driver) if !driver.0.is_finished() => (send, driver),
                _ => handshake(fresh().await?).await?,
            };
            let (status, headers, body) = over_h2(send.clone(), &head, message.into(), MAX_ANSWER).await?;
            let ok = status == 200 && headers.get_str("grpc-status").is_some_and(|s| s == "0");
            // HealthCheckResponse { status = 1: SERVING }
            let serving = ok && body.get(5..) == Some(&[0x08, 0x01]);
            let result = if serving { CheckResult::Passed } else { CheckResult::Failed };
            Ok((result, 0, Kept::H2(send, driver)))
        }
    }
}

fn judge(http: &HttpCheck, status: u16, headers: &Headers, body: &[u8], stats: &ClusterStats) -> CheckResult {
    if !http.matches(body) {
        return CheckResult::Failed;
    }
    let result = http.judge(status);
    if result != CheckResult::Passed {
        return result;
    }
    let (parts, whole) = http.verify.get();
    let mut random = Random::new(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), status));
    if let Some(wanted) = http.service_name.as_ref().filter(|_| random.below(whole.into()) < u64::from(parts)) {
        stats.other.inc("health_check.verify_cluster");
        if !wanted.matches(headers.get("x-envoy-upstream-healthchecked-cluster").unwrap_or_default()) {
            return CheckResult::Failed;
        }
    }
    if headers.contains("x-envoy-degraded") { CheckResult::Degraded } else { CheckResult::Passed }
}

/// The name a host is asked by: its own for checks, that of the check, or the cluster's (Envoy
/// `HealthCheckerFactory::getHostname`).
fn authority_of<'a>(cluster: &'a ClusterEntry, host: &'a Host, of_check: &'a ArcStr) -> &'a ArcStr {
    let names = [&host.health_check.hostname, of_check];
    names.into_iter().find(|name| !name.is_empty()).unwrap_or(&cluster.cluster.name)
}

/// At most eight digits, in the smallest unit that they are enough for (Envoy `Grpc::Common::toGrpcTimeout`).
fn grpc_timeout(timeout: Duration) -> String {
    const MOST: u128 = 99_999_999;
    let mut time = timeout.as_millis();
    for (unit, size) in [("m", 1000), ("S", 60), ("M", 60)] {
        if time <= MOST {
            return format!("{time}{unit}");
        }
        time /= size;
    }
    format!("{}H", time.min(MOST))
}

fn scheme_of(cluster: &ClusterEntry, host: &Host) -> &'static str {
    if cluster.client_tls(host).is_some() { "https" } else { "http" }
}

fn http_head(cluster: &ClusterEntry, host: &Host, http: &HttpCheck) -> Headers {
    let authority = authority_of(cluster, host, &http.host);
    let mut headers = Headers::of([
        (":method", http.method),
        (":scheme", scheme_of(cluster, host)),
        (":authority", &**authority),
        (":path", &*http.path),
        ("user-agent", "Envoy/HC"),
    ]);
    add_headers(&http.headers, &mut headers);
    if !http.send.is_empty() {
        headers.set_number("content-length", http.send.len() as u64);
    }
    headers
}

/// What the check adds itself.
fn add_headers(ops: &HeaderOps, headers: &mut Headers) {
    // There is nobody downstream.
    let nobody = Address::Ip((Ipv4Addr::LOCALHOST, 0).into());
    let info =
        ConnectionInfo { local: nobody.clone(), remote: nobody.clone(), direct_remote: nobody, ..Default::default() };
    let info = StreamInfo::new(Arc::new(info), SystemTime::now());
    ops.apply(headers, &FormatContext::new(&info, None, None));
}

async fn over_h1(mut conn: Box<Conn>, head: &Headers, http: &HttpCheck) -> io::Result<(u16, Headers, Vec<u8>, Kept)> {
    let says_empty = http.send.is_empty() && !h1::is_bodiless(http.method.as_bytes());
    conn.out.write(|out| {
        h1::write_request(out, head, says_empty.then_some(h1::EMPTY), h1::Style::default());
        out.extend_from_slice(&http.send);
    });
    poll_fn(|cx| conn.poll_flush(cx)).await?;
    let limits = Limits::default();
    let head_only = http.method == "HEAD";
    let answer = loop {
        let answer = poll_fn(|cx| conn.poll_response(cx, &limits, head_only)).await.map_err(io::Error::other)?;
        // Interim answers are passed over.
        if answer.status >= 200 || answer.status == 101 {
            break answer;
        }
    };
    let mut body = Vec::new();
    while let Some(frame) = poll_fn(|cx| conn.poll_body(cx)).await {
        if let h1::Frame::Data(data) = frame.map_err(io::Error::other)?
            && !http.receive.is_empty()
        {
            body.extend_from_slice(&data[..data.len().min(http.buffer.saturating_sub(body.len()))]);
        }
    }
    let keep = answer.keep_alive && !conn.at_eof();
    Ok((answer.status, answer.headers, body, if keep { Kept::H1(conn) } else { Kept::Nothing }))
}

async fn handshake(io: Io) -> io::Result<(h2::client::SendRequest<Bytes>, Driver)> {
    let (send, connection) = h2::client::handshake(io).await.map_err(io::Error::other)?;
    let driver = tokio::spawn(async move {
        // How it ended shows in the next check.
        let _ = connection.await;
    });
    Ok((send, Driver(driver.abort_handle())))
}

/// The answer with as much of its body as `limit` says.
async fn over_h2(
    send: h2::client::SendRequest<Bytes>,
    head: &Headers,
    body: Bytes,
    limit: usize,
) -> io::Result<(u16, Headers, Vec<u8>)> {
    exchange(send, head, body, limit).await.map_err(io::Error::other)
}

async fn exchange(
    send: h2::client::SendRequest<Bytes>,
    head: &Headers,
    body: Bytes,
    limit: usize,
) -> Result<(u16, Headers, Vec<u8>), h2::Error> {
    let mut send = send.ready().await?;
    let request = h2_request(head).ok_or_else(|| h2::Error::from(h2::Reason::PROTOCOL_ERROR))?;
    let (answer, mut stream) = send.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        stream.send_data(body, true)?;
    }
    let (parts, mut stream) = answer.await?.into_parts();
    let mut headers = from_map(&parts.headers);
    let mut data = Vec::new();
    while let Some(piece) = stream.data().await {
        let piece = piece?;
        let _ = stream.flow_control().release_capacity(piece.len());
        data.extend_from_slice(&piece[..piece.len().min(limit.saturating_sub(data.len()))]);
    }
    if let Some(trailers) = stream.trailers().await? {
        push_map(&mut headers, &trailers);
    }
    Ok((parts.status.as_u16(), headers, data))
}

/// The head as the h2 crate wants it; `None` when it is no request.
fn h2_request(headers: &Headers) -> Option<http::Request<()>> {
    let authority = headers.authority().filter(|authority| !authority.is_empty());
    let mut uri = http::uri::Builder::new();
    uri = uri.scheme(headers.scheme().unwrap_or("http")).path_and_query(headers.path().unwrap_or("/"));
    if let Some(authority) = authority {
        uri = uri.authority(authority);
    }
    let mut request = http::Request::new(());
    *request.method_mut() = http::Method::from_bytes(headers.get(":method")?).ok()?;
    *request.uri_mut() = uri.build().ok()?;
    *request.version_mut() = http::Version::HTTP_2;
    let map = request.headers_mut();
    for (name, value) in headers.iter_regular() {
        if let (Ok(name), Ok(value)) = (http::HeaderName::from_bytes(name), http::HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map.remove(http::header::CONNECTION);
    Some(request)
}

/// Fields of an `http` map, appended to nothing.
fn from_map(map: &http::HeaderMap) -> Headers {
    let mut headers = Headers::with_capacity(map.len(), 512);
    push_map(&mut headers, map);
    headers
}

fn push_map(headers: &mut Headers, map: &http::HeaderMap) {
    for (name, value) in map {
        headers.push_lower(name.as_str(), value.as_bytes());
    }
}

async fn tcp(mut io: Io, send: &Bytes, receive: &[Bytes]) -> io::Result<(CheckResult, Kept)> {
    if receive.is_empty() {
        // That it could be made is all: what was to be sent is not waited for.
        return Ok((CheckResult::Passed, Kept::Nothing));
    }
    if !send.is_empty() {
        io.write_all(send).await?;
        io.flush().await?;
    }
    let mut seen = Vec::new();
    while !contains_in_order(&seen, receive) {
        let mut piece = [0; 1024];
        let n = io.read(&mut piece).await?;
        if n == 0 || seen.len() > MAX_ANSWER {
            return Ok((CheckResult::Unreachable, Kept::Nothing));
        }
        seen.extend_from_slice(&piece[..n]);
    }
    Ok((CheckResult::Passed, Kept::Raw(Box::new(io))))
}
