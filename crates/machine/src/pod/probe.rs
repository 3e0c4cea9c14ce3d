//! Probes: one question to a container, and the counting that turns answers into a state.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1::{Container, GRPCAction, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::network::Dialer;

/// What a probe or hook asks, other than running a program.
pub(crate) struct Asker {
    /// Connects from the mesh's namespace, as kubelet connects from its node.
    pub(crate) dialer: Dialer,
    pub(crate) ip: IpAddr,
}

/// A probe's numbers with the API server's defaults.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Timing {
    pub(crate) fn of(probe: &Probe) -> Self {
        let seconds = |value: Option<i32>, default: u64, least: u64| {
            Duration::from_secs(
                value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default).max(least),
            )
        };
        let count = |value: Option<i32>, default| {
            value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)
        };
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0, 0),
            period: seconds(probe.period_seconds, 10, 1),
            timeout: seconds(probe.timeout_seconds, 1, 1),
            success_threshold: count(probe.success_threshold, 1),
            failure_threshold: count(probe.failure_threshold, 3),
        }
    }
}

/// Consecutive answers, and what follows from them. Pure: kubelet `pkg/kubelet/prober/worker.go`.
#[derive(Debug)]
pub(crate) struct Counter {
    timing: Timing,
    last: Option<bool>,
    run: u32,
}

impl Counter {
    pub(crate) fn new(timing: Timing) -> Self {
        Self { timing, last: None, run: 0 }
    }

    /// Adds an answer; `Some(outcome)` once enough equal ones came in a row.
    pub(crate) fn add(&mut self, success: bool) -> Option<bool> {
        if self.last == Some(success) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(success);
            self.run = 1;
        }
        let needed = if success { self.timing.success_threshold } else { self.timing.failure_threshold };
        (self.run >= needed).then_some(success)
    }
}

impl Asker {
    /// One question over the network. An error says why the answer counts as a failure.
    pub(crate) async fn ask(&self, container: &Container, probe: &Probe) -> Result<(), String> {
        let limit = Timing::of(probe).timeout;
        let answer = async {
            if let Some(get) = &probe.http_get {
                self.http_get(container, get).await
            } else if let Some(tcp) = &probe.tcp_socket {
                let port = port_number(container, &tcp.port)?;
                let ip = host(tcp.host.as_deref(), self.ip)?;
                self.dialer
                    .connect(SocketAddr::new(ip, port))
                    .await
                    .map(drop)
                    .map_err(|error| refused(ip, port, &error))
            } else if let Some(grpc) = &probe.grpc {
                self.grpc(grpc).await
            } else {
                // The API server refuses a probe without handler; kubelet counts it as success.
                Ok(())
            }
        };
        tokio::time::timeout(limit, answer).await.map_err(|_| format!("no answer within {} s", limit.as_secs()))?
    }

    /// `httpGet` of a probe or hook: any status from 200 to 399 is success.
    pub(crate) async fn http_get(&self, container: &Container, get: &HTTPGetAction) -> Result<(), String> {
        let port = port_number(container, &get.port)?;
        let ip = host(get.host.as_deref(), self.ip)?;
        if get.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("HTTPS")) {
            // Kubelet does not verify the certificate either; that the port accepts a connection is what can be said without a TLS stack.
            // DIFFERS: kubelet asks over TLS. After injection the agent does it, so this concerns pods without sidecar only.
            return self
                .dialer
                .connect(SocketAddr::new(ip, port))
                .await
                .map(drop)
                .map_err(|error| refused(ip, port, &error));
        }
        let path = get.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let mut request = http::Request::get(&path)
            .header("user-agent", "kube-probe/1.36")
            .header("accept", "*/*")
            .header("connection", "close");
        let mut has_host = false;
        for header in get.http_headers.iter().flatten() {
            has_host |= header.name.eq_ignore_ascii_case("host");
            request = request.header(&header.name, &header.value);
        }
        if !has_host {
            request = request.header("host", SocketAddr::new(ip, port).to_string());
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        let status = self
            .dialer
            .http(SocketAddr::new(ip, port), request)
            .await
            .map_err(|error| format!("GET {path} on port {port}: {error}"))?
            .0;
        if (200..400).contains(&status.as_u16()) {
            Ok(())
        } else {
            Err(format!("GET {path} on port {port} answered {status}"))
        }
    }

    /// `grpc.health.v1.Health/Check` with hand-made messages: request field 1 is the service, response field 1 the status (SERVING = 1).
    async fn grpc(&self, action: &GRPCAction) -> Result<(), String> {
        let port = u16::try_from(action.port).map_err(|_| format!("port {} is no port", action.port))?;
        let stream = self
            .dialer
            .connect(SocketAddr::new(self.ip, port))
            .await
            .map_err(|error| refused(self.ip, port, &error))?;
        let service = action.service.as_deref().unwrap_or_default().as_bytes();
        let mut message = Vec::with_capacity(service.len() + 2);
        if !service.is_empty() {
            let length =
                u8::try_from(service.len()).ok().filter(|l| *l < 0x80).ok_or("the service's name is too long")?;
            message.extend([0x0a, length]);
            message.extend(service);
        }
        let mut frame = vec![0u8];
        frame.extend(u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
        frame.extend(message);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
        // Ends when the sender is dropped below.
        let connection = tokio::spawn(connection);
        let request =
            http::Request::post(format!("http://{}/grpc.health.v1.Health/Check", SocketAddr::new(self.ip, port)))
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(Full::new(Bytes::from(frame)))
                .map_err(|error| error.to_string())?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let header_status = response.headers().get("grpc-status").cloned();
            let body = http_body_util::Limited::new(response.into_body(), 4096)
                .collect()
                .await
                .map_err(|error| error.to_string())?;
            let status = body.trailers().and_then(|t| t.get("grpc-status")).or(header_status.as_ref()).cloned();
            if status.as_ref().is_some_and(|status| status != "0") {
                return Err(format!("gRPC health check on port {port}: status {status:?}"));
            }
            match body.to_bytes().get(5..) {
                Some([0x08, 0x01, ..]) => Ok(()),
                _ => Err(format!("gRPC health check on port {port}: not serving")),
            }
        }
        .await;
        connection.abort();
        answer
    }
}

fn refused(ip: IpAddr, port: u16, error: &io::Error) -> String {
    format!("connect to {}: {error}", SocketAddr::new(ip, port))
}

fn host(host: Option<&str>, pod: IpAddr) -> Result<IpAddr, String> {
    match host {
        None | Some("") => Ok(pod),
        Some(text) => text.parse().map_err(|_| format!("host {text:?} must be an address")),
    }
}

/// A probe's port: a number, or the name of one of the container's ports.
pub(crate) fn port_number(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match name.parse() {
            Ok(number) => number,
            Err(_) => {
                container
                    .ports
                    .iter()
                    .flatten()
                    .find(|port| port.name.as_deref() == Some(name))
                    .ok_or_else(|| format!("container {} has no port named {name:?}", container.name))?
                    .container_port
            }
        },
    };
    u16::try_from(number).map_err(|_| format!("port {number} is no port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_answers_in_a_row() {
        let probe = Probe { failure_threshold: Some(2), success_threshold: Some(2), ..Probe::default() };
        let mut counter = Counter::new(Timing::of(&probe));
        let outcomes: Vec<_> =
            [false, true, false, false, true, true, true].into_iter().map(|answer| counter.add(answer)).collect();
        assert_eq!(outcomes, [None, None, None, Some(false), None, Some(true), Some(true)]);
    }
}
