//! The health of a machine's application, told to the control plane: probed as the WorkloadGroup says, said on change.
//!
//! Source: istio `pkg/istio-agent/health`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use ads::client::Problem;
use anyhow::{Context, bail};
use bytes::Bytes;
use http::Request;
use http::header::{CONNECTION, HOST, USER_AGENT};
use http_body_util::Full;
use istio_api::workload_group::{HttpHealthCheckConfig, ReadinessProbe};
use tokio::sync::watch;
use tracing::{debug, info};

use crate::dataplane::DataPlane;
use crate::fetch::{self, Target};

/// What was said last; nothing before the first probe's result.
pub(crate) type Said = Option<Option<Problem>>;

/// The workload leaves for good and is not to be waited for; for istiod it is just unhealthy.
pub(crate) fn leaving() -> Said {
    Some(Some(Problem { code: tonic::Code::Unavailable as i32, message: "the agent is ending".to_owned() }))
}

/// How much of an answer is read.
const MAX_BODY: usize = 10 << 10;

/// Probes for ever, and says when the result changes.
pub(crate) async fn probe(
    probe: ReadinessProbe,
    destination: IpAddr,
    proxy: Arc<dyn DataPlane>,
    said: watch::Sender<Said>,
) {
    let seconds =
        |value: i32, default: u64| Duration::from_secs(u64::try_from(value).ok().filter(|v| *v > 0).unwrap_or(default));
    let threshold = |value: i32| value.max(1);
    let timeout = seconds(probe.timeout_seconds, 1);
    tokio::time::sleep(seconds(probe.initial_delay_seconds, 0)).await;
    let mut ticks = tokio::time::interval(seconds(probe.period_seconds, 10));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut successes, mut failures) = (0, 0);
    let mut healthy = None;
    loop {
        ticks.tick().await;
        // A machine whose proxy does not serve is of no use, however well its application is.
        let result = match proxy.ready().await {
            Ok(()) => match tokio::time::timeout(timeout, once(&probe, destination)).await {
                Ok(result) => result.map_err(|error| format!("{error:#}")),
                Err(_) => Err(format!("no answer within {timeout:?}")),
            },
            Err(reason) => Err(format!("the proxy is not ready: {reason}")),
        };
        match result {
            Ok(()) => (successes, failures) = (successes + 1, 0),
            Err(ref reason) => {
                debug!(reason, "the application is not well");
                (successes, failures) = (0, failures + 1);
            }
        }
        match result {
            Ok(()) if successes >= threshold(probe.success_threshold) && healthy != Some(true) => {
                info!("the application is healthy");
                healthy = Some(true);
                said.send_replace(Some(None));
            }
            Err(message) if failures >= threshold(probe.failure_threshold) && healthy != Some(false) => {
                info!(reason = message, "the application is not healthy");
                healthy = Some(false);
                said.send_replace(Some(Some(Problem { code: tonic::Code::Internal as i32, message })));
            }
            _ => {}
        }
    }
}

async fn once(probe: &ReadinessProbe, destination: IpAddr) -> anyhow::Result<()> {
    if let Some(get) = &probe.http_get {
        return http_get(get, destination).await;
    }
    if let Some(tcp) = &probe.tcp_socket {
        let target = target(&tcp.host, tcp.port, destination, false).await?;
        return fetch::connect(target).await.map(drop).with_context(|| format!("cannot connect to {}", target.address));
    }
    if let Some(grpc) = &probe.grpc {
        let target = target("", grpc.port, destination, false).await?;
        return Ok(crate::grpc_health::check(target, &grpc.service).await?);
    }
    if let Some(exec) = &probe.exec {
        let Some((program, arguments)) = exec.command.split_first() else { bail!("the probe's command is empty") };
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let status = command.status().await.with_context(|| format!("{program} cannot be run"))?;
        if !status.success() {
            bail!("{program}: {status}");
        }
        return Ok(());
    }
    bail!("the probe says neither httpGet, tcpSocket, grpc nor exec")
}

/// Where to probe. On this machine the connection comes from the address that capture lets pass.
async fn target(host: &str, port: u32, destination: IpAddr, tls: bool) -> anyhow::Result<Target> {
    let port = u16::try_from(port).with_context(|| format!("port {port} is not a port number"))?;
    let address = if host.is_empty() {
        SocketAddr::new(destination, port)
    } else {
        let mut found = tokio::net::lookup_host((host, port)).await.with_context(|| format!("host {host}"))?;
        found.next().with_context(|| format!("host {host} has no address"))?
    };
    let here = address.ip() == destination || address.ip().is_loopback();
    let from = if address.is_ipv4() {
        IpAddr::from(Ipv4Addr::new(127, 0, 0, 6))
    } else {
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()
    };
    Ok(Target { address, from: here.then_some(from), tls })
}

/// DIFFERS: redirects count as an answer; Istio follows them, to wherever they lead.
async fn http_get(get: &HttpHealthCheckConfig, destination: IpAddr) -> anyhow::Result<()> {
    let target = target(&get.host, get.port, destination, get.scheme.eq_ignore_ascii_case("https")).await?;
    let slash = if get.path.starts_with('/') { "" } else { "/" };
    let mut request = Request::get(format!("{slash}{}", get.path)).body(Full::new(Bytes::new()))?;
    let headers = request.headers_mut();
    for header in &get.http_headers {
        headers.append(http::HeaderName::try_from(&header.name)?, http::HeaderValue::try_from(&header.value)?);
    }
    if !headers.contains_key(HOST) {
        headers.insert(HOST, http::HeaderValue::try_from(target.address.to_string())?);
    }
    headers.entry(USER_AGENT).or_insert(http::HeaderValue::from_static("istio-probe/1.0"));
    headers.insert(CONNECTION, http::HeaderValue::from_static("close"));
    // The caller has the time in view; this is only longer.
    let answer = fetch::fetch(target, request, Duration::from_secs(3600), MAX_BODY).await?;
    match answer.status {
        200..400 => Ok(()),
        status => bail!("status code was not from [200,400), bad code {status}"),
    }
}

#[cfg(test)]
mod tests {
    use istio_api::workload_group::{ExecHealthCheckConfig, TcpHealthCheckConfig};

    use super::*;
    use crate::dataplane::Later;

    /// A proxy that is always there.
    struct Ready;

    impl DataPlane for Ready {
        fn ready(&self) -> Later<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn prometheus<'a>(&'a self, _: &'a str) -> Later<'a, Result<String, String>> {
            Box::pin(std::future::ready(Ok(String::new())))
        }

        fn drain(&self) -> Later<'_, ()> {
            Box::pin(std::future::ready(()))
        }

        fn active_connections(&self) -> Later<'_, Option<u64>> {
            Box::pin(std::future::ready(None))
        }

        fn stop(&self) -> Later<'_, ()> {
            Box::pin(std::future::ready(()))
        }

        fn ended(&self) -> Later<'_, ()> {
            Box::pin(std::future::pending())
        }
    }

    const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn a_change_is_said_once_its_threshold_is_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tcp_socket = Some(TcpHealthCheckConfig { port: address.port().into(), ..Default::default() });
        let settings = ReadinessProbe { tcp_socket, period_seconds: 1, failure_threshold: 2, ..Default::default() };
        let (said, mut hears) = watch::channel(None);
        let task = tokio::spawn(probe(settings, LOCALHOST, Arc::new(Ready), said));
        hears.changed().await.unwrap();
        assert_eq!(*hears.borrow_and_update(), Some(None));
        drop(listener);
        hears.changed().await.unwrap();
        let problem = hears.borrow_and_update().clone().flatten().unwrap();
        assert_eq!(problem.code, tonic::Code::Internal as i32);
        assert!(problem.message.contains(&format!("cannot connect to {address}")), "{}", problem.message);
        let _again = tokio::net::TcpListener::bind(address).await.unwrap();
        hears.changed().await.unwrap();
        assert_eq!(*hears.borrow_and_update(), Some(None));
        task.abort();
    }

    #[tokio::test]
    async fn commands_and_answers_decide() {
        let exec = |command: &[&str]| ReadinessProbe {
            exec: Some(ExecHealthCheckConfig { command: command.iter().map(|word| (*word).to_owned()).collect() }),
            ..Default::default()
        };
        assert!(once(&exec(&["true"]), LOCALHOST).await.is_ok());
        assert_eq!(once(&exec(&["false"]), LOCALHOST).await.unwrap_err().to_string(), "false: exit status: 1");
        assert!(once(&exec(&[]), LOCALHOST).await.is_err());
        assert!(once(&ReadinessProbe::default(), LOCALHOST).await.is_err());

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            while let Ok((mut stream, from)) = listener.accept().await {
                assert_eq!(from.ip(), IpAddr::from([127, 0, 0, 6]), "capture would lead it to the proxy");
                let mut head = [0; 512];
                let length = stream.read(&mut head).await.unwrap_or_default();
                let well = head[..length].starts_with(b"GET /well ");
                let answer = if well {
                    "HTTP/1.1 204 No Content\r\n\r\n"
                } else {
                    "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"
                };
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let get = |path: &str| ReadinessProbe {
            http_get: Some(HttpHealthCheckConfig { path: path.to_owned(), port: port.into(), ..Default::default() }),
            ..Default::default()
        };
        assert!(once(&get("well"), LOCALHOST).await.is_ok());
        let ill = once(&get("/ill"), LOCALHOST).await.unwrap_err().to_string();
        assert_eq!(ill, "status code was not from [200,400), bad code 503");
    }
}
