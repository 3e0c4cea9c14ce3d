//! Probes and hooks of the application, which the injection pointed at the agent: `/app-health/CONTAINER/livez` and so on.
//!
//! The agent asks the application from 127.0.0.6, which the capture rules let pass, so that no policy of the mesh
//! stands between a kubelet and the application.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Request};
use http_body_util::Full;
use lifecycle::http::{Response, text, with_type};
use serde::Deserialize;
use tracing::info;

use crate::fetch::{self, Target};

/// Source: istio `pilot/cmd/pilot-agent/status/server.go`, `maxRespBodyLength`.
const MAX_BODY: usize = 10 << 10;
/// Longer than any pod lives.
const UNLIMITED: Duration = Duration::from_secs(365 * 24 * 3600);
/// Redirects on the same host are followed this far, as kubelets do.
const MAX_REDIRECTS: usize = 10;

/// ISTIO_KUBE_APP_PROBERS: what to do for each path.
#[derive(Clone, Debug)]
pub struct Probers {
    by_path: BTreeMap<String, Prober>,
    destination: IpAddr,
}

/// ISTIO_KUBE_APP_PROBERS that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadProbers {
    #[error("ISTIO_KUBE_APP_PROBERS is not the JSON of probes")]
    Json(#[source] serde_json::Error),
    #[error(
        "ISTIO_KUBE_APP_PROBERS: {path}: the path is not /app-health/CONTAINER/(livez|readyz|startupz) or /app-lifecycle/CONTAINER/(prestopz|poststartz)"
    )]
    Path { path: String },
    #[error("ISTIO_KUBE_APP_PROBERS: {path}: exactly one of httpGet, tcpSocket and grpc is needed")]
    Kind { path: String },
    #[error("ISTIO_KUBE_APP_PROBERS: {path}: port {port} is not a port number")]
    Port { path: String, port: i64 },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Prober {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
    timeout_seconds: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpGet {
    #[serde(default)]
    path: String,
    port: i64,
    #[serde(default)]
    scheme: String,
    #[serde(default)]
    http_headers: Vec<Header>,
}

#[derive(Clone, Debug, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Clone, Debug, Deserialize)]
struct TcpSocket {
    port: i64,
}

#[derive(Clone, Debug, Deserialize)]
struct Grpc {
    port: i64,
    service: Option<String>,
}

impl Probers {
    /// Reads the variable; unset means no probes. `destination` is the pod's address.
    pub fn parse(json: Option<&str>, destination: IpAddr) -> Result<Probers, BadProbers> {
        let by_path: BTreeMap<String, Prober> =
            json.map_or_else(|| Ok(BTreeMap::new()), serde_json::from_str).map_err(BadProbers::Json)?;
        for (path, prober) in &by_path {
            let parts: Vec<&str> = path.split('/').collect();
            let known = match parts.as_slice() {
                ["", "app-health", container, kind] => {
                    !container.is_empty() && ["livez", "readyz", "startupz"].contains(kind)
                }
                ["", "app-lifecycle", container, kind] => {
                    !container.is_empty() && ["prestopz", "poststartz"].contains(kind)
                }
                _ => false,
            };
            if !known {
                return Err(BadProbers::Path { path: path.clone() });
            }
            let ports = [
                prober.http_get.as_ref().map(|p| p.port),
                prober.tcp_socket.as_ref().map(|p| p.port),
                prober.grpc.as_ref().map(|p| p.port),
            ];
            let mut ports = ports.into_iter().flatten();
            let (Some(port), None) = (ports.next(), ports.next()) else {
                return Err(BadProbers::Kind { path: path.clone() });
            };
            if !(1..=65535).contains(&port) {
                return Err(BadProbers::Port { path: path.clone(), port });
            }
        }
        Ok(Probers { by_path, destination })
    }

    /// Answers a request for `path`, or `None` if it is not one of ours.
    pub async fn handle(&self, path: &str, headers: &HeaderMap, status_port: u16) -> Option<Response> {
        if !path.starts_with("/app-health/") && !path.starts_with("/app-lifecycle/") {
            return None;
        }
        let Some(prober) = self.by_path.get(path) else {
            return Some(text(400, format!("app prober config does not exists for {path}")));
        };
        let timeout = match prober.timeout_seconds.filter(|seconds| *seconds > 0) {
            Some(seconds) => Duration::from_secs(seconds),
            // Hooks have none; they end with the pod's grace, and the kubelet waits as long.
            None if path.starts_with("/app-lifecycle/") => UNLIMITED,
            // Kubernetes' default for probes.
            None => Duration::from_secs(1),
        };
        let target = |port: i64, tls: bool| Target {
            address: SocketAddr::new(self.destination, u16::try_from(port).unwrap_or_default()), // checked by `parse`
            from: Some(if self.destination.is_ipv4() {
                Ipv4Addr::new(127, 0, 0, 6).into()
            } else {
                Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()
            }),
            tls,
        };
        Some(if let Some(get) = &prober.http_get {
            let target = target(get.port, get.scheme.eq_ignore_ascii_case("https"));
            http_get(get, target, headers, status_port, timeout).await
        } else if let Some(tcp) = &prober.tcp_socket {
            match tokio::time::timeout(timeout, fetch::connect(target(tcp.port, false))).await {
                Ok(Ok(_)) => text(200, ""),
                Ok(Err(error)) => failed(path, &error.to_string()),
                Err(_) => failed(path, &format!("no connection within {timeout:?}")),
            }
        } else if let Some(grpc) = &prober.grpc {
            let check =
                crate::grpc_health::check(target(grpc.port, false), grpc.service.as_deref().unwrap_or_default());
            match tokio::time::timeout(timeout, check).await {
                Ok(Ok(())) => text(200, ""),
                Ok(Err(error)) => failed(path, &error.to_string()),
                Err(_) => failed(path, &format!("no answer within {timeout:?}")),
            }
        } else {
            text(500, "") // `parse` saw to it that this does not happen
        })
    }
}

fn failed(path: &str, reason: &str) -> Response {
    info!(path, reason, "probe of the application failed");
    text(500, "")
}

async fn http_get(
    get: &HttpGet,
    mut target: Target,
    headers: &HeaderMap,
    status_port: u16,
    timeout: Duration,
) -> Response {
    let slash = if get.path.starts_with('/') { "" } else { "/" };
    let mut path = format!("{slash}{}", get.path);
    let deadline = tokio::time::Instant::now() + timeout;
    for _ in 0..=MAX_REDIRECTS {
        let request = match probe_request(get, &path, target, headers, status_port) {
            Ok(request) => request,
            Err(error) => return failed(&get.path, &error.to_string()),
        };
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let answer = match fetch::fetch(target, request, left, MAX_BODY).await {
            Ok(answer) => answer,
            Err(error) => return failed(&get.path, &error.to_string()),
        };
        if !(300..400).contains(&answer.status) {
            return with_type(answer.status, "text/plain; charset=utf-8", answer.body);
        }
        // To elsewhere: the application answers, which is all that was asked. To itself: follow.
        let location = answer.headers.get(http::header::LOCATION).and_then(|location| location.to_str().ok());
        match location.and_then(|location| same_host(location, target)) {
            Some(next) => (target, path) = next,
            None => return text(200, ""),
        }
    }
    failed(&get.path, "stopped after 10 redirects")
}

/// Where a redirect leads that stays on the host of `from`; its port and scheme may be others, as for kubelets.
fn same_host(location: &str, from: Target) -> Option<(Target, String)> {
    if location.starts_with('/') && !location.starts_with("//") {
        return Some((from, location.to_owned()));
    }
    let scheme = if from.tls { "https" } else { "http" };
    let absolute = if location.starts_with("//") { format!("{scheme}:{location}") } else { location.to_owned() };
    let uri: http::Uri = absolute.parse().ok()?;
    if uri.host()?.trim_matches(['[', ']']).parse() != Ok(from.address.ip()) {
        return None;
    }
    let tls = uri.scheme_str()? == "https";
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let path = uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
    Some((Target { address: SocketAddr::new(from.address.ip(), port), tls, ..from }, path))
}

/// The kubelet's headers go on to the application; the host it sees names its own port.
fn probe_request(
    get: &HttpGet,
    path: &str,
    target: Target,
    headers: &HeaderMap,
    status_port: u16,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let mut request = Request::get(path).body(Full::new(Bytes::new()))?;
    for (name, value) in headers {
        // Hop by hop; the request has no body.
        if ![CONNECTION, TRANSFER_ENCODING, http::header::CONTENT_LENGTH].contains(name) {
            request.headers_mut().append(name, value.clone());
        }
    }
    for header in &get.http_headers {
        request
            .headers_mut()
            .insert(http::HeaderName::try_from(&header.name)?, http::HeaderValue::try_from(&header.value)?);
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).map(str::to_owned);
    let host = match host.as_deref().map(|host| (host, host.strip_suffix(&format!(":{status_port}")))) {
        Some((_, Some(name))) => format!("{name}:{}", target.address.port()),
        Some((host, None)) => host.to_owned(),
        None => target.address.to_string(),
    };
    request.headers_mut().insert(HOST, http::HeaderValue::try_from(host)?);
    request.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("close"));
    Ok(request)
}

#[cfg(test)]
mod tests;
