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
use crate::{control_plane, crl, debug_relay, envoy, flags, health, outrigger, secure_metrics};

/// How often connections are counted while waiting for the last. Source: istio `pkg/envoy/agent.go`.
///
/// DIFFERS: every second there; the pod of a rollout need not wait that long for its end.
const CONNECTIONS_CHECK: Duration = Duration::from_millis(100);
/// How often a wait for connections is worth a line.
const CONNECTIONS_LOG: Duration = Duration::from_secs(5);
/// How often in a row connections may not be countable.
const CONNECTIONS_RETRIES: u32 = 5;
/// How often the proxy is asked whether the start is over.
const SETTLE_CHECK: Duration = Duration::from_millis(50);
/// The pauses after which unused memory is given back again grow from this …
const SETTLE_FIRST: Duration = Duration::from_secs(1);
/// … to this: once a minute costs nothing that can be measured.
const SETTLE_LONGEST: Duration = Duration::from_secs(60);
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
        (settings.ports.status, settings.metrics_localhost_only),
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
    let certificate = crl::attach(certificate, settings.root.path(crl::FILE));
    if settings.data_plane == flags::DataPlane::Outrigger {
        let secure =
            [(settings.ports.secure_metrics, Port::Prometheus), (settings.ports.secure_merged_metrics, Port::Merged)];
        for (number, port) in secure.into_iter().filter(|(number, _)| *number != 0) {
            let (status, watch) = (status.clone(), watch.clone());
            ports.spawn(secure_metrics::serve(status::bind(number)?, status, port, certificate.clone(), watch));
        }
    }
    let connector = || control_plane::connector(settings.discovery.clone(), certificate.clone());
    ports.spawn(debug_relay::serve(connector(), settings.node.clone(), watch));
    let connector = connector();
    let (said, health) = watch::channel(None);
    let proxy = match settings.data_plane {
        flags::DataPlane::Outrigger => outrigger::start(&settings, certificate, connector, table, health),
        flags::DataPlane::Envoy => envoy::start(&settings, certificate, connector, table, health),
    };
    let proxy = proxy.context("the proxy cannot start")?;
    // Ends with the agent's end, which has the last word.
    let probing = settings.proxy_config.readiness_probe.clone().filter(|_| settings.registers).map(|probe| {
        let (destination, proxy, said) = (settings.probe_destination, proxy.clone(), said.clone());
        tokio::spawn(health::probe(probe, destination, proxy, said))
    });
    running.send_replace(Some(proxy.clone()));
    // Ends by itself; a process that ends earlier has nothing to give back.
    tokio::spawn(settle(proxy.clone()));

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
    if let Some(probing) = probing {
        probing.abort();
    }
    if settings.registers {
        said.send_replace(health::leaving());
    }
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

/// Serves on while clients turn away, as istio `pkg/envoy/agent.go`, `terminate`; but there is one deadline for all of it.
async fn terminate(proxy: &dyn DataPlane, drain: Drain, signal: Shutdown, signals: &mut Signals, controls: &Controls) {
    let started = Instant::now();
    proxy.drain().await;
    let finished = async {
        if !drain.exit_on_zero {
            info!(wait = ?drain.termination, ?signal, "draining");
            tokio::time::sleep(drain.termination).await;
            return "the drain is over";
        }
        info!(minimum = ?drain.minimum, deadline = ?drain.deadline, ?signal, "draining until the last connection has ended");
        tokio::time::sleep(drain.minimum).await;
        let (mut told, mut failures) = (None, 0);
        loop {
            match proxy.active_connections().await {
                Some(0) => return "the last connection has ended",
                Some(open) => {
                    failures = 0;
                    if told.is_none_or(|told: Instant| told.elapsed() >= CONNECTIONS_LOG) {
                        info!(open, "connections are still open");
                        told = Some(Instant::now());
                    }
                }
                // A count that cannot be had may be had the next time.
                None if failures < CONNECTIONS_RETRIES => failures += 1,
                None => return "connections cannot be counted",
            }
            tokio::time::sleep(CONNECTIONS_CHECK).await;
        }
    };
    let deadline = async {
        match drain.deadline {
            Some(deadline) => tokio::time::sleep_until(started + deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        reason = finished => info!(after = ?started.elapsed(), reason, "drained"),
        () = deadline => warn!(after = ?started.elapsed(), "the pod's grace is nearly over; closing what is still open"),
        // The same signal twice: somebody is in a hurry.
        second = signals.next() => warn!(signal = ?second, "asked again; ending without waiting"),
        () = controls.quit.notified() => info!("asked to quit; ending without waiting"),
    }
}

/// Gives back what only the start needed, as soon as the proxy is ready to serve; later what configuration changes and
/// first requests needed. Less and less often: there is less and less to give back.
async fn settle(proxy: Arc<dyn DataPlane>) {
    while proxy.ready().await.is_err() {
        tokio::time::sleep(SETTLE_CHECK).await;
    }
    let mut pause = SETTLE_FIRST;
    loop {
        lifecycle::memory::release_unused();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(SETTLE_LONGEST);
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
