//! A real Envoy as the data plane: bootstrap file, child process, and the sockets it talks to us on.
//!
//! ```text
//!  Envoy ─ ./etc/istio/proxy/XDS (unix) ─► relay ─ TLS with the workload's identity ─► control plane
//!        ─ …/workload-spiffe-uds/socket ─► secrets (SDS)
//! ```

mod bootstrap;
mod relay;
mod secrets;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ads::client::{Connector, Handler};
use anyhow::Context;
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use identity::WorkloadCertificate;
use tokio::net::UnixListener;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{error, info, warn};

use crate::dataplane::{DataPlane, Later};
use crate::fetch::{self, Answer, Target};
use crate::health::Said;
use crate::settings::Settings;

/// Where Istio's Envoy expects certificates.
const SDS_SOCKET: &str = "var/run/secrets/workload-spiffe-uds/socket";
/// A restarted Envoy that lived this long starts the back-off anew.
const HEALTHY: Duration = Duration::from_secs(30);
const MIN_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// How long the admin port may take; stats of large meshes are megabytes.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_STATS: usize = 256 << 20;

/// A running Envoy.
struct Envoy {
    admin: SocketAddr,
    /// Statistics of the agent's own listeners, which do not count as clients' connections.
    own_listeners: Vec<String>,
    inbound_only: bool,
    stop: Arc<Notify>,
    stopped: watch::Receiver<bool>,
}

/// Starts Envoy as soon as there is a certificate.
pub(crate) fn start(
    settings: &Settings,
    certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    connector: Connector,
    names: Option<Box<dyn Handler>>,
    health: watch::Receiver<Said>,
) -> anyhow::Result<Arc<dyn DataPlane>> {
    // As in Istio both are relative to the working directory, which is `/` in its image.
    let config_dir = settings.root.path(settings.proxy_config.config_path.trim_start_matches("./"));
    let (xds, sds) = (config_dir.join("XDS"), settings.root.path(SDS_SOCKET));
    std::fs::create_dir_all(&config_dir).with_context(|| format!("{} cannot be made", config_dir.display()))?;
    let file = match &settings.template_file {
        Some(file) => file.clone(),
        None => write_bootstrap(&config_dir, settings, &xds, &sds)?,
    };
    serve(&xds, tonic::transport::Server::builder().add_service(relay::Relay::service(connector, names, health)))?;
    let secrets = Arc::new(secrets::Secrets::new(certificate.clone()));
    serve(&sds, tonic::transport::Server::builder().add_service(ads::server::secret_service(secrets)))?;

    let localhost = if settings.addresses.first().is_some_and(|ip| ip.is_ipv6()) {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    let ports = settings.ports;
    let own = [ports.health, ports.prometheus]
        .map(|port| [format!("listener.0.0.0.0_{port}."), format!("listener.[__]_{port}.")]);
    let (stop, (done, stopped)) = (Arc::new(Notify::new()), watch::channel(false));
    let command = command(settings, &file);
    // Owned by the handle: `stop` ends it and waits for its end.
    tokio::spawn(supervise(command, certificate, stop.clone(), done));
    Ok(Arc::new(Envoy {
        admin: SocketAddr::new(localhost, ports.admin),
        own_listeners: own.into_iter().flatten().chain(["listener.admin.".to_owned()]).collect(),
        inbound_only: settings.role == crate::flags::Role::Sidecar,
        stop,
        stopped,
    }))
}

/// The file is readable by its owner only: proxyMetadata may hold what users put there.
fn write_bootstrap(dir: &Path, settings: &Settings, xds: &Path, sds: &Path) -> anyhow::Result<PathBuf> {
    let path = dir.join("envoy-rev.json");
    let json = bootstrap::bootstrap(settings, &xds.to_string_lossy(), &sds.to_string_lossy());
    let _ = std::fs::remove_file(&path); // so that the mode applies
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let write = file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{json:#}\n").as_bytes()));
    write.with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(path)
}

/// Serves gRPC on a unix socket that only our user may open.
fn serve(path: &Path, router: tonic::transport::server::Router) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(path); // left by an agent before us
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let listener = UnixListener::bind(path).with_context(|| format!("{} cannot be listened on", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let path = path.to_owned();
    // Ends with the process: Envoy may come back any time until then.
    tokio::spawn(async move {
        if let Err(error) = router.serve_with_incoming(UnixListenerStream::new(listener)).await {
            error!(path = %path.display(), %error, "socket for Envoy");
        }
    });
    Ok(())
}

/// Source: istio `pkg/envoy/proxy.go`, `args`.
fn command(settings: &Settings, file: &Path) -> Command {
    let config = &settings.proxy_config;
    let mut command = Command::new(&config.binary_path);
    let family = if settings.addresses.iter().all(|ip| ip.is_ipv6()) { "v6" } else { "v4" };
    let flush = config.file_flush_interval.and_then(istio_api::Duration::to_std).unwrap_or(Duration::from_secs(1));
    command.arg("-c").arg(file);
    command.args(["--drain-time-s", &settings.drain.listeners.as_secs().to_string(), "--drain-strategy", "immediate"]);
    command.args(["--local-address-ip-version", family, "--file-flush-interval-msec", &flush.as_millis().to_string()]);
    command.args(["--disable-hot-restart", "--allow-unknown-static-fields"]);
    if config.file_flush_min_size_kb > 0 {
        command.args(["--file-flush-min-size-kb", &config.file_flush_min_size_kb.to_string()]);
    }
    let (level, components): (Vec<&str>, Vec<&str>) =
        settings.proxy_log_level.split(',').partition(|part| !part.contains(':'));
    if let Some(level) = level.last().filter(|level| !level.is_empty()) {
        command.args(["-l", level]);
    }
    let components =
        if components.is_empty() { settings.proxy_component_log_level.clone() } else { components.join(",") };
    if !components.is_empty() {
        command.args(["--component-log-level", &components]);
    }
    if settings.envoy.skip_deprecated_logs {
        command.arg("--skip-deprecated-logs");
    }
    if settings.envoy.core_dump {
        command.arg("--enable-core-dump");
    }
    if let Some(path) = &settings.envoy.bootstrap_override {
        match bootstrap_override(path, &settings.envoy.host_ip) {
            Ok(json) => {
                command.args(["--config-yaml", &json]);
            }
            Err(error) => warn!(path = %path.display(), %error, "the bootstrap override cannot be used"),
        }
    }
    if settings.concurrency > 0 {
        command.args(["--concurrency", &settings.concurrency.to_string()]);
    }
    command.kill_on_drop(true);
    command
}

/// The override as JSON, which Envoy merges over the bootstrap. Source: istio `pkg/envoy/proxy.go`, `readBootstrapToJSON`.
fn bootstrap_override(path: &Path, host_ip: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path)?;
    let host = if host_ip.contains(':') { format!("[{host_ip}]") } else { host_ip.to_owned() };
    let text = text.replace("[$(HOST_IP)]", &host).replace("$(HOST_IP)", &host);
    let documents = manifest::parse_plain(path, &text)?;
    let first = documents.into_iter().next().context("it is empty")?;
    Ok(first.value.to_string())
}

/// Starts Envoy, and again whenever it ends, until told to stop.
async fn supervise(
    mut command: Command,
    mut certificate: watch::Receiver<Option<Arc<WorkloadCertificate>>>,
    stop: Arc<Notify>,
    done: watch::Sender<bool>,
) {
    // Without a certificate Envoy would count the missing secret as a failed update.
    let there = tokio::select! {
        there = certificate.wait_for(Option::is_some) => there.is_ok(),
        () = stop.notified() => false,
    };
    if there {
        keep_running(&mut command, &stop).await;
    }
    done.send_replace(true);
}

/// Until it ends in good order or is stopped.
async fn keep_running(command: &mut Command, stop: &Notify) {
    let mut pause = MIN_BACKOFF;
    loop {
        let started = tokio::time::Instant::now();
        info!(command = ?command.as_std(), "starting Envoy");
        let ended = match command.spawn() {
            Ok(mut child) => tokio::select! {
                status = child.wait() => match status {
                    // Somebody asked Envoy to quit on its admin port, as jobs do when they are done.
                    Ok(status) if status.success() => break,
                    Ok(status) => status.to_string(),
                    Err(error) => error.to_string(),
                },
                () = stop.notified() => {
                    kill(&mut child).await;
                    break;
                }
            },
            Err(error) => format!("cannot be started: {error}"),
        };
        if started.elapsed() > HEALTHY {
            pause = MIN_BACKOFF;
        }
        error!(%ended, restart = ?pause, "Envoy ended by itself");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.notified() => break,
        }
        pause = (pause * 2).min(MAX_BACKOFF);
    }
}

async fn kill(child: &mut Child) {
    if let Err(error) = child.kill().await {
        warn!(%error, "Envoy cannot be killed");
    }
}

impl Envoy {
    async fn admin(&self, method: &str, path: &str) -> Result<Answer, String> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "localhost")
            .body(Full::new(Bytes::new()));
        let request = request.map_err(|e| e.to_string())?;
        let target = Target { address: self.admin, from: None, tls: false };
        fetch::fetch(target, request, ADMIN_TIMEOUT, MAX_STATS).await.map_err(|e| format!("Envoy's admin port: {e}"))
    }
}

impl DataPlane for Envoy {
    fn ready(&self) -> Later<'_, Result<(), String>> {
        Box::pin(async {
            let answer = self.admin("GET", "/ready").await?;
            let text = String::from_utf8_lossy(&answer.body).trim().to_owned();
            if answer.status == 200 { Ok(()) } else { Err(format!("Envoy is {text}")) }
        })
    }

    fn prometheus<'a>(&'a self, query: &'a str) -> Later<'a, Result<String, String>> {
        Box::pin(async move {
            let mark = if query.is_empty() { "" } else { "?" };
            let answer = self.admin("GET", &format!("/stats/prometheus{mark}{query}")).await?;
            if answer.status == 200 {
                Ok(String::from_utf8_lossy(&answer.body).into_owned())
            } else {
                Err(format!("status {}", answer.status))
            }
        })
    }

    fn drain(&self) -> Later<'_, ()> {
        Box::pin(async {
            let scope = if self.inbound_only { "inboundonly&" } else { "" };
            if let Err(error) = self.admin("POST", &format!("/drain_listeners?{scope}graceful&skip_exit")).await {
                warn!(%error, "Envoy cannot be told to drain");
            }
        })
    }

    fn active_connections(&self) -> Later<'_, Option<u64>> {
        Box::pin(async {
            let answer = self.admin("GET", "/stats?usedonly&filter=downstream_cx_active$").await.ok()?;
            active_connections(&String::from_utf8_lossy(&answer.body), &self.own_listeners)
        })
    }

    fn stop(&self) -> Later<'_, ()> {
        Box::pin(async {
            self.stop.notify_one();
            self.ended().await;
        })
    }

    fn ended(&self) -> Later<'_, ()> {
        Box::pin(async {
            let _ = self.stopped.clone().wait_for(|stopped| *stopped).await; // Err: it has ended
        })
    }
}

/// Source: istio `pkg/envoy/agent.go`, `activeProxyConnections`.
fn active_connections(stats: &str, own: &[String]) -> Option<u64> {
    let lines = stats.lines().filter_map(|line| line.split_once(':'));
    let counted = lines.filter(|(name, _)| {
        name.starts_with("listener.") && !name.contains("worker_") && !name.starts_with("listener.envoy_internal_")
    });
    let counts = counted.filter(|(name, _)| !own.iter().any(|prefix| name.starts_with(prefix.as_str())));
    let counts: Vec<u64> = counts.filter_map(|(_, value)| value.trim().parse().ok()).collect();
    (!counts.is_empty()).then(|| counts.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clients_connections_are_counted() {
        let stats = "http.a.downstream_cx_active: 9\nlistener.0.0.0.0_15006.downstream_cx_active: 2\nlistener.0.0.0.0_15006.worker_0.downstream_cx_active: 2\n\
            listener.0.0.0.0_15021.downstream_cx_active: 5\nlistener.admin.main_thread.downstream_cx_active: 1\nlistener.0.0.0.0_15001.downstream_cx_active: 1\n";
        let own = ["listener.0.0.0.0_15021.".to_owned(), "listener.admin.".to_owned()];
        assert_eq!(active_connections(stats, &own), Some(3));
        assert_eq!(active_connections("", &own), None);
    }
}
