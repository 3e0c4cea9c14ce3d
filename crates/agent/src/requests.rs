//! `wait`, `request` and `version`: small clients of a running agent.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::time::Instant;

use crate::fetch::{self, Target};
use crate::flags::{RequestFlags, VersionFlags, WaitFlags};
use crate::node::ISTIO_VERSION;

/// Config dumps of large meshes are tens of megabytes.
const MAX_BODY: usize = 1 << 30;

/// Polls until the URL answers 200. Source: istio `pilot/cmd/pilot-agent/app/wait.go`.
pub(crate) async fn wait(flags: &WaitFlags) -> anyhow::Result<ExitCode> {
    let uri: http::Uri = flags.url.parse().with_context(|| format!("--url {:?}", flags.url))?;
    let host = uri.host().context("--url has no host")?;
    if uri.scheme_str() != Some("http") {
        bail!("--url must start with http://");
    }
    let port = uri.port_u16().unwrap_or(80);
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let deadline = Instant::now() + Duration::from_secs(flags.timeout_seconds);
    let request_timeout = Duration::from_millis(flags.request_timeout_millis.max(1));
    loop {
        let last = match ready(host, port, path, request_timeout).await {
            Ok(()) => return Ok(ExitCode::SUCCESS),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            bail!("timeout waiting for the proxy to become ready; last error: {last:#}");
        }
        tokio::time::sleep(
            Duration::from_millis(flags.period_millis.max(1)).min(deadline.saturating_duration_since(Instant::now())),
        )
        .await;
    }
}

async fn ready(host: &str, port: u16, path: &str, timeout: Duration) -> anyhow::Result<()> {
    let addresses = tokio::net::lookup_host((host.trim_matches(['[', ']']), port)).await?;
    let mut last = anyhow::anyhow!("{host} has no address");
    for address in addresses {
        let request = Request::get(path).header(http::header::HOST, host).body(Full::new(Bytes::new()))?;
        match fetch::fetch(Target { address, from: None, tls: false }, request, timeout, 1 << 16).await {
            Ok(answer) if answer.status == 200 => return Ok(()),
            Ok(answer) => {
                last = anyhow::anyhow!(
                    "HTTP status code {}: {}",
                    answer.status,
                    String::from_utf8_lossy(&answer.body).trim()
                )
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Sends one request to this pod's proxy or agent and prints the body, nothing else: istioctl parses it.
pub(crate) async fn request(flags: &RequestFlags) -> anyhow::Result<ExitCode> {
    const ALLOWED: [u16; 4] = [15000, 15004, 15020, 15021];
    if !ALLOWED.contains(&flags.debug_port) {
        bail!("debug port {} is not in allowed list {ALLOWED:?}", flags.debug_port);
    }
    let slash = if flags.path.starts_with('/') { "" } else { "/" };
    let request = Request::builder()
        .method(flags.method.to_ascii_uppercase().as_str())
        .uri(format!("{slash}{}", flags.path))
        .header(http::header::HOST, format!("localhost:{}", flags.debug_port))
        .body(Full::new(Bytes::from(flags.body.clone().unwrap_or_default())))?;
    let target = Target { address: SocketAddr::from((Ipv4Addr::LOCALHOST, flags.debug_port)), from: None, tls: false };
    let answer = fetch::fetch(target, request, Duration::from_secs(60), MAX_BODY).await?;
    if answer.status > 399 && answer.status != 404 {
        bail!("received unsuccessful status code {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    std::io::stdout().lock().write_all(&answer.body)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the version, as Istio's programs do.
pub(crate) fn version(flags: &VersionFlags) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    match flags.output.as_deref() {
        Some("json") => {
            println!("{:#}", serde_json::json!({ "clientVersion": { "version": version, "istio": ISTIO_VERSION } }))
        }
        Some("yaml") => println!("clientVersion:\n  version: {version}\n  istio: {ISTIO_VERSION}"),
        Some(other) => bail!("--output must be 'yaml' or 'json', not {other:?}"),
        None if flags.short => println!("{version}"),
        None => println!("outrigger {version}, as pilot-agent of Istio {ISTIO_VERSION}"),
    }
    Ok(ExitCode::SUCCESS)
}
