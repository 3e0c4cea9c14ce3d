//! `proxy sidecar`: starts the parts in order, watches over them, ends them in order.
//!
//! ```text
//!  ports open ─► certificate ─► proxy ─► configuration ─► ready ─► (drain) ─► SIGTERM ─► drain ─► end
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use lifecycle::metrics::Registry;
use lifecycle::readiness::Readiness;
use lifecycle::signal::{Shutdown, Signals};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::dataplane::DataPlane;
use crate::dns::{Naming, ResolvConf, Server, SharedTable, TableHandler};
use crate::settings::{Drain, Settings};
use crate::status::{self, Controls, Port, Status};
use crate::{control_plane, envoy, flags, outrigger};

/// How often connections are counted while waiting for the last. Source: istio `pkg/envoy/agent.go`.
const CONNECTIONS_CHECK: Duration = Duration::from_secs(1);
/// How long the status ports may finish what they are answering.
const STATUS_DRAIN: Duration = Duration::from_millis(200);

/// Runs until the pod is to end.
pub async fn run(settings: Settings) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen().context("signals cannot be handled")?;
    let metrics = Registry::new();
    let names = SharedTable::default();
    let readiness = Readiness::new(&["certificate"]);
    let controls = Arc::new(Controls::default());
    let (running, data_plane) = watch::channel(None);
    let status = Arc::new(Status::new(
        readiness.clone(),
        data_plane,
        controls.clone(),
        (settings.probers.clone(), settings.scrape.clone()),
        names.clone(),
        metrics.clone(),
        settings.ports.status,
    ));

    let (status_drain, watch) = lifecycle::drain::channel();
    let mut ports = tokio::task::JoinSet::new();
    let pages = [
        (settings.ports.status, Port::Status),
        (settings.ports.health, Port::Health),
        (settings.ports.prometheus, Port::Prometheus),
    ];
    for (number, port) in pages {
        // Envoy's bootstrap has listeners of its own for all but the first.
        if number != 0 && (port == Port::Status || settings.data_plane == flags::DataPlane::Outrigger) {
            ports.spawn(status::serve(status::bind(number)?, status.clone(), port, watch.clone()));
        }
    }
    drop(watch);

    let manager =
        identity::Manager::start(settings.certificates.clone(), settings.rotation, settings.output_certs.clone());
    let certificate = manager.certificate();
    // Ends with the process; it only copies one state into the other.
    tokio::spawn(mirror_certificate(certificate.clone(), manager.failure(), readiness.clone(), metrics.clone()));

    let _dns = start_dns(&settings, &names, &metrics).await?;
    let table: Option<Box<dyn ads::client::Handler>> = match &settings.dns {
        Some(_) => Some(Box::new(TableHandler::new(naming(&settings), names))),
        None => None,
    };
    let connector = control_plane::connector(settings.discovery.clone(), certificate.clone());
    let proxy = match settings.data_plane {
        flags::DataPlane::Outrigger => outrigger::start(&settings, certificate, connector, table),
        flags::DataPlane::Envoy => envoy::start(&settings, certificate, connector, table),
    };
    let proxy = proxy.context("the proxy cannot start")?;
    running.send_replace(Some(proxy.clone()));

    let mut drained = false;
    let signal = loop {
        tokio::select! {
            signal = signals.next() => break Some(signal),
            () = controls.quit.notified() => break None,
            () = proxy.ended() => {
                info!("the proxy was asked to quit");
                break None;
            }
            () = controls.drain.notified() => {
                if !drained {
                    proxy.drain().await;
                }
                drained = true;
            }
        }
    };
    match signal {
        None => {}
        Some(_) if drained => info!("already drained; ending at once"),
        Some(signal) => terminate(proxy.as_ref(), settings.drain, signal, &mut signals, &controls).await,
    }
    proxy.stop().await;
    if !status_drain.drain(STATUS_DRAIN).await {
        ports.abort_all();
    }
    info!("ended");
    Ok(ExitCode::SUCCESS)
}

/// Serves on while clients turn away, as istio `pkg/envoy/agent.go`, `terminate`.
async fn terminate(proxy: &dyn DataPlane, drain: Drain, signal: Shutdown, signals: &mut Signals, controls: &Controls) {
    proxy.drain().await;
    let finished = async {
        if !drain.exit_on_zero {
            info!(wait = ?drain.termination, ?signal, "draining");
            tokio::time::sleep(drain.termination).await;
            return;
        }
        info!(minimum = ?drain.minimum, ?signal, "draining until the last connection has ended");
        tokio::time::sleep(drain.minimum).await;
        loop {
            match proxy.active_connections().await {
                Some(0) | None => return,
                Some(open) => info!(open, "connections are still open"),
            }
            tokio::time::sleep(CONNECTIONS_CHECK).await;
        }
    };
    let started = Instant::now();
    tokio::select! {
        () = finished => info!(after = ?started.elapsed(), "drained"),
        // The same signal twice: somebody is in a hurry.
        second = signals.next() => warn!(signal = ?second, "asked again; ending without waiting"),
        () = controls.quit.notified() => info!("asked to quit; ending without waiting"),
    }
}

async fn mirror_certificate(
    mut certificate: watch::Receiver<Option<Arc<identity::WorkloadCertificate>>>,
    mut failure: watch::Receiver<Option<String>>,
    readiness: Readiness,
    metrics: Registry,
) {
    let expiry = metrics.gauge(
        "istio_agent_cert_expiry_seconds",
        "The time remaining, in seconds, before the certificate chain will expire.",
        &[("resource_name", "default")],
    );
    loop {
        let current = certificate.borrow_and_update().clone();
        let reason = failure.borrow_and_update().clone();
        match (&current, reason) {
            (Some(_), _) => readiness.met("certificate"),
            (None, Some(reason)) => readiness.unmet("certificate", reason),
            (None, None) => {}
        }
        if let Some(current) = current {
            let left = current.not_after.duration_since(std::time::SystemTime::now()).unwrap_or_default();
            expiry.set(left.as_secs_f64());
        }
        tokio::select! {
            changed = certificate.changed() => if changed.is_err() { return },
            changed = failure.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(Duration::from_secs(15)) => {}
        }
    }
}

async fn start_dns(settings: &Settings, names: &SharedTable, metrics: &Registry) -> anyhow::Result<Option<Server>> {
    let Some(dns) = &settings.dns else { return Ok(None) };
    let servers = match ResolvConf::load(&dns.resolv_conf) {
        Ok(conf) => conf.servers,
        Err(error) => {
            warn!(%error, path = %dns.resolv_conf.display(), "no upstream resolvers: names that the mesh does not know will fail");
            Vec::new()
        }
    };
    let server = Server::start(dns, servers, names.clone(), metrics).await?;
    info!(addresses = ?server.addresses(), "DNS");
    Ok(Some(server))
}

fn naming(settings: &Settings) -> Naming {
    let search = settings.dns.as_ref().and_then(|dns| ResolvConf::load(&dns.resolv_conf).ok()).map(|conf| conf.search);
    Naming {
        namespace: settings.namespace.clone(),
        domain: settings.domain.clone(),
        search: search.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests;
