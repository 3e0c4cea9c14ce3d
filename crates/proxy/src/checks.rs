//! Active health checks: HTTP, gRPC and TCP, one task per host, on the control side.

use crate::h1::{self, Conn, Limits};
use crate::io::Io;
use crate::runtime::{ClusterEntry, Shared};
use crate::socket;
use crate::stats::{ClusterStats, Kind};
use bytes::Bytes;
use proxy_core::health_check::{CheckKind, CheckResult, HealthCheckConfig, HostChecks, HttpCheck, Transition};
use proxy_core::{Address, FormatContext, Headers, Host, Random, StreamInfo};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::AbortHandle;

/// How often the list of hosts is compared with what is being checked.
const FOLLOW: Duration = Duration::from_millis(250);
/// A TCP check reads at most this much of an answer.
const MAX_ANSWER: usize = 64 * 1024;

/// Starts checking a cluster's hosts; ends with the cluster.
pub(crate) fn watch(shared: &Arc<Shared>, entry: &Arc<ClusterEntry>) {
    if entry.cluster.health_checks.is_empty() || tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let stats = Arc::new(ClusterStats::default());
    for what in ["attempt", "success", "failure", "passive_failure", "network_failure", "verify_cluster"] {
        stats.other.touch(&format!("health_check.{what}"));
    }
    shared.registry.add(Kind::Cluster, entry.cluster.stat_name.clone(), stats.clone());
    // Ends when the cluster is dropped.
    tokio::spawn(follow(shared.clone(), Arc::downgrade(entry), stats));
}

async fn follow(shared: Arc<Shared>, entry: Weak<ClusterEntry>, stats: Arc<ClusterStats>) {
    let mut running: HashMap<Address, (Arc<Host>, Vec<AbortHandle>)> = HashMap::new();
    while let Some(cluster) = entry.upgrade() {
        let endpoints = cluster.endpoints.load_full();
        running.retain(|address, (host, tasks)| {
            let same = endpoints.find(address).is_some_and(|now| Arc::ptr_eq(now, host));
            if !same {
                tasks.iter().for_each(AbortHandle::abort);
            }
            same
        });
        for host in endpoints.hosts() {
            if running.contains_key(&host.address) || host.health_check.address.is_none() {
                continue;
            }
            let checks = (0..cluster.cluster.health_checks.len()).map(|index| {
                let task = check_host(shared.clone(), entry.clone(), host.clone(), index, stats.clone());
                tokio::spawn(task).abort_handle()
            });
            running.insert(host.address.clone(), (host.clone(), checks.collect()));
        }
        drop(endpoints);
        drop(cluster);
        tokio::time::sleep(FOLLOW).await;
    }
    for (_, tasks) in running.into_values() {
        tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn check_host(
    shared: Arc<Shared>,
    entry: Weak<ClusterEntry>,
    host: Arc<Host>,
    index: usize,
    stats: Arc<ClusterStats>,
) {
    let mut random = Random::new(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), index));
    let mut state = HostChecks::default();
    let mut traffic = host.state.stats.rq_total.load(Relaxed);
    let mut first = true;
    loop {
        let Some(cluster) = entry.upgrade() else { return };
        let Some(config) = cluster.cluster.health_checks.get(index).cloned() else { return };
        if std::mem::take(&mut first) {
            let delay = state.initial_delay(&config, &mut random);
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
        }
        stats.other.inc("health_check.attempt");
        let result = match tokio::time::timeout(config.timeout, check(&shared, &cluster, &host, &config)).await {
            Ok(Ok(result)) => result,
            Ok(Err(e)) => {
                tracing::debug!(host = %host.address, error = %e, "health check failed");
                stats.other.inc("health_check.network_failure");
                CheckResult::Unreachable
            }
            Err(_) => {
                stats.other.inc("health_check.network_failure");
                CheckResult::Unreachable
            }
        };
        let passed = matches!(result, CheckResult::Passed | CheckResult::Degraded);
        stats.other.inc(if passed { "health_check.success" } else { "health_check.failure" });
        let total = host.state.stats.rq_total.load(Relaxed);
        let (transition, pause) = state.on_result(&config, &host, result, total != traffic, &mut random);
        traffic = total;
        if transition != Transition::Unchanged {
            tracing::info!(cluster = %cluster.cluster.name, host = %host.address, ?transition, "health changed");
        }
        drop(cluster);
        tokio::time::sleep(pause).await;
    }
}

async fn connect(shared: &Shared, cluster: &ClusterEntry, host: &Host, config: &HealthCheckConfig) -> io::Result<Io> {
    let mut address = host.health_check.address.clone().unwrap_or_else(|| host.address.clone());
    if let (Some(port), Address::Ip(socket)) = (config.alt_port, &mut address) {
        socket.set_port(port);
    }
    let raw = socket::connect(&address, socket::ConnectOptions::default()).await?;
    match cluster.client_tls(host) {
        Some(tls) => {
            let alpn = (!config.alpn.is_empty()).then_some(config.alpn.as_slice());
            tls.connect(raw, &shared.secrets, None, &host.hostname, alpn).await.map(|(stream, _)| Io::Client(stream))
        }
        None => Ok(Io::Raw(raw)),
    }
}

async fn check(
    shared: &Shared,
    cluster: &ClusterEntry,
    host: &Host,
    config: &HealthCheckConfig,
) -> io::Result<CheckResult> {
    let io = connect(shared, cluster, host, config).await?;
    match &config.kind {
        CheckKind::Tcp { send, receive } => tcp(io, send, receive).await,
        CheckKind::Http(http) => {
            let (status, headers) = if http.http2 {
                let request = http_head(cluster, host, http);
                let (status, headers, _) = over_h2(io, &request, Bytes::new()).await?;
                (status, headers)
            } else {
                over_h1(io, &http_head(cluster, host, http)).await?
            };
            if let Some(wanted) = &http.service_name {
                let found = headers.get("x-envoy-upstream-healthchecked-cluster").unwrap_or_default();
                if !wanted.matches(found) {
                    return Ok(CheckResult::Failed);
                }
            }
            let degraded = headers.contains("x-envoy-degraded");
            Ok(match http.judge(status) {
                CheckResult::Passed if degraded => CheckResult::Degraded,
                other => other,
            })
        }
        CheckKind::Grpc { service, authority } => {
            let authority = if authority.is_empty() { &cluster.cluster.name } else { authority };
            let head = Headers::of([
                (":method", "POST"),
                (":scheme", "http"),
                (":authority", &**authority),
                (":path", "/grpc.health.v1.Health/Check"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            ]);
            // HealthCheckRequest { service = 1 }, framed.
            let mut message = vec![0, 0, 0, 0, 0];
            if !service.is_empty() && service.len() < 128 {
                message.extend([0x0a, service.len() as u8]);
                message.extend(service.as_bytes());
            }
            message[4] = (message.len() - 5) as u8;
            let (status, headers, body) = over_h2(io, &head, message.into()).await?;
            let ok = status == 200 && headers.get_str("grpc-status").is_none_or(|s| s == "0");
            // HealthCheckResponse { status = 1: SERVING }
            Ok(if ok && body.get(5..) == Some(&[0x08, 0x01]) { CheckResult::Passed } else { CheckResult::Failed })
        }
    }
}

fn http_head(cluster: &ClusterEntry, host: &Host, http: &HttpCheck) -> Headers {
    let authority = [&http.host, &host.health_check.hostname, &host.hostname, &cluster.cluster.name]
        .into_iter()
        .find(|name| !name.is_empty())
        .unwrap_or(&cluster.cluster.name);
    let mut headers = Headers::of([
        (":method", http.method),
        (":scheme", "http"),
        (":authority", &**authority),
        (":path", &*http.path),
        ("user-agent", "Envoy/HC"),
    ]);
    let info = StreamInfo::new(Arc::default(), SystemTime::now());
    http.headers.apply(&mut headers, &FormatContext::new(&info, None, None));
    headers
}

async fn over_h1(io: Io, head: &Headers) -> io::Result<(u16, Headers)> {
    let mut conn = Conn::new(io);
    conn.out.write(|out| h1::write_request(out, head, h1::Style::default()));
    poll_fn(|cx| conn.poll_flush(cx)).await?;
    let limits = Limits::default();
    let answer = poll_fn(|cx| conn.poll_response(cx, &limits, true)).await.map_err(io::Error::other)?;
    Ok((answer.status, answer.headers))
}

async fn over_h2(io: Io, head: &Headers, body: Bytes) -> io::Result<(u16, Headers, Bytes)> {
    let (send, connection) = h2::client::handshake(io).await.map_err(io::Error::other)?;
    // Dropped with this check, which ends the connection.
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    let result = exchange(send, head, body).await.map_err(io::Error::other);
    driver.abort();
    result
}

async fn exchange(
    send: h2::client::SendRequest<Bytes>,
    head: &Headers,
    body: Bytes,
) -> Result<(u16, Headers, Bytes), h2::Error> {
    let mut send = send.ready().await?;
    let request = crate::upstream::h2_request(head).ok_or_else(|| h2::Error::from(h2::Reason::PROTOCOL_ERROR))?;
    let (answer, mut stream) = send.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        stream.send_data(body, true)?;
    }
    let (parts, mut stream) = answer.await?.into_parts();
    let mut headers = crate::stream::from_map(&parts.headers);
    let mut data = Vec::new();
    while let Some(piece) = stream.data().await {
        let piece = piece?;
        let _ = stream.flow_control().release_capacity(piece.len());
        data.extend_from_slice(&piece);
        if data.len() > MAX_ANSWER {
            break;
        }
    }
    if let Some(trailers) = stream.trailers().await? {
        crate::stream::push_map(&mut headers, &trailers);
    }
    Ok((parts.status.as_u16(), headers, data.into()))
}

async fn tcp(mut io: Io, send: &Bytes, receive: &[Bytes]) -> io::Result<CheckResult> {
    if !send.is_empty() {
        io.write_all(send).await?;
        io.flush().await?;
    }
    let mut seen = Vec::new();
    while !contains_in_order(&seen, receive) {
        let mut piece = [0; 1024];
        let n = io.read(&mut piece).await?;
        if n == 0 || seen.len() > MAX_ANSWER {
            return Ok(CheckResult::Unreachable);
        }
        seen.extend_from_slice(&piece[..n]);
    }
    Ok(CheckResult::Passed)
}

/// Each pattern after the one before, anything in between.
fn contains_in_order(mut text: &[u8], patterns: &[Bytes]) -> bool {
    patterns.iter().all(|pattern| match memchr::memmem::find(text, pattern) {
        Some(at) => {
            text = &text[at + pattern.len()..];
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_in_order() {
        let patterns = [Bytes::from_static(b"ab"), Bytes::from_static(b"cd")];
        assert!(contains_in_order(b"xxab--cd", &patterns));
        assert!(!contains_in_order(b"cdab", &patterns));
        assert!(contains_in_order(b"", &[]));
    }
}
