//! Starting a proxy inside a process, and the handle on it.

use crate::bootstrap::{InvalidBootstrap, NodeInfo, Parts};
use crate::control::{Control, Incoming, lose_patience};
use crate::drain::DrainStrategy;
use crate::log::LogFiles;
use crate::runtime::Shared;
use crate::stats::Naming;
use crate::{admin, dns, events, overload, sources, tls, worker, xds};
use ads::client::{Connector, Handler, Subscriptions};
use bytes::Bytes;
use envoy_api::Message;
use envoy_api::bootstrap::Bootstrap;
use identity::WorkloadCertificate;
use proxy_core::config_source::Origin;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How to run a proxy.
pub struct Options {
    /// Worker threads; 0: one per processor.
    pub concurrency: usize,
    /// The workload's certificate from the agent, served as the secrets `default` and `ROOTCA`.
    pub certificates: Option<watch::Receiver<Option<Arc<WorkloadCertificate>>>>,
    /// The way to the control plane; without it the bootstrap's ADS cluster is dialled.
    pub ads: Option<Connector>,
    /// Further types to ask the control plane for, with who handles them.
    pub extra: Vec<(String, Box<dyn Handler>)>,
    /// What is asked of the control plane and said to it; whoever keeps a copy can say more.
    pub subscriptions: Subscriptions,
    /// Accept filters that are not understood and leave them out.
    pub allow_unsupported_filters: bool,
    /// How long removed listeners and chains let connections go on.
    pub drain_time: Duration,
    /// How fast they are told to end where whole listeners drain.
    pub drain_strategy: DrainStrategy,
    /// The log level as it was asked for, shown by `/server_info`.
    pub log_level: String,
    /// What else `/server_info` shows of the command line, by the names of `envoy.admin.v3.CommandLineOptions`.
    pub given: Vec<(&'static str, serde_json::Value)>,
    /// A file that gets the admin port's address.
    pub admin_address_path: Option<PathBuf>,
    /// Only check the configuration: nothing is bound, nothing started.
    pub validate: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            concurrency: 0,
            certificates: None,
            ads: None,
            extra: Vec::new(),
            subscriptions: Subscriptions::new(),
            allow_unsupported_filters: false,
            drain_time: Duration::from_secs(600),
            drain_strategy: DrainStrategy::default(),
            log_level: "warning".to_owned(),
            given: Vec::new(),
            admin_address_path: None,
            validate: false,
        }
    }
}

/// Why a proxy did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The bootstrap is refused.
    #[error(transparent)]
    Bootstrap(#[from] InvalidBootstrap),
    /// A thread or socket could not be made.
    #[error("cannot start the proxy")]
    System(#[from] std::io::Error),
}

/// A running proxy. Dropping it ends the proxy.
pub struct Handle {
    control: Arc<Mutex<Control>>,
    tasks: Mutex<JoinSet<()>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    admin: Arc<admin::Admin>,
}

fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handle {
    /// Whether first clusters and listeners are in use; an error says what is missing.
    pub fn ready(&self) -> Result<(), String> {
        lock(&self.control).ready()
    }

    /// Tells clients to go (`connection: close`, GOAWAY); new connections are still served.
    pub fn drain(&self) {
        lock(&self.control).drain(false);
    }

    /// All counters in Prometheus' text format, Istio's included. `used_only`: those that were never touched left out.
    pub fn stats_prometheus(&self, used_only: bool) -> String {
        self.admin.prometheus(used_only)
    }

    /// Envoy's `/config_dump`.
    pub fn config_dump(&self) -> serde_json::Value {
        self.admin.config_dump(&[])
    }

    /// Open downstream connections.
    pub fn connections(&self) -> u64 {
        self.admin.connections()
    }

    /// Resolves when `/quitquitquit` was asked for.
    pub async fn quit_requested(&self) {
        self.admin.quit_requested().await;
    }

    /// Ends the proxy: workers write their logs and stop.
    pub fn shutdown(&self) {
        lock(&self.control).shutdown();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A worker that panicked has said so already.
            let _ = thread.join();
        }
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Starts a proxy. Must be called on a tokio runtime, which runs its control tasks; the data plane has threads of its own.
pub fn start(bootstrap: Bootstrap, options: Options) -> Result<Handle, StartError> {
    start_parts(Parts::split(bootstrap.encode_to_vec().into())?, options)
}

/// As [`start`].
pub(crate) fn start_parts(bootstrap: Parts, mut options: Options) -> Result<Handle, StartError> {
    lifecycle::memory::merge_what_is_freed();
    let node = Arc::new(NodeInfo::of(bootstrap.head.node.as_ref()));
    let concurrency = match options.concurrency {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let shared =
        Shared::new(LogFiles::default(), node, concurrency, options.drain_time, options.drain_strategy, own_address());
    let mut workers = Vec::new();
    let mut threads = Vec::new();
    if !options.validate {
        for index in 0..concurrency {
            let (sender, thread) = worker::spawn(shared.clone(), index)?;
            workers.push(sender);
            threads.push(thread);
        }
    }
    let (dns_sender, dns_receiver) = tokio::sync::mpsc::unbounded_channel();
    let mut core_options = proxy_core::Options {
        allow_unsupported_filters: options.allow_unsupported_filters,
        local_address: shared.own_address,
        node_id: shared.node.id.clone(),
        node_cluster: shared.node.cluster.clone(),
        ..Default::default()
    };
    let settings = proxy_core::Bootstrap::settings(&bootstrap.head, &core_options)
        .map_err(|e| InvalidBootstrap::Refused(e.to_string()))?;
    core_options.runtime = settings.runtime.clone();
    core_options.tracing = settings.tracing.clone();
    overload::limit_connections(&shared, &settings);
    if let Some(path) = settings.outlier_log.clone().filter(|_| !options.validate) {
        events::open(&shared, [&path]);
        // Nobody else sets it.
        let _ = shared.outlier_log.set(path);
    }
    if let Some(name) = settings.local_cluster.clone() {
        // Nobody else sets it.
        let _ = shared.local_cluster.set((name, settings.node.locality.clone()));
    }
    if let Some(config) = settings.overload.clone() {
        overload::install(&shared, config);
    }
    if !bootstrap.head.stats_sinks.is_empty() {
        tracing::warn!("stats_sinks of the bootstrap have no effect: statistics are pulled from /stats/prometheus");
    }
    let (patience_sender, awaited) = tokio::sync::mpsc::unbounded_channel();
    let mut control = Control::new(shared.clone(), core_options, workers, dns_sender, patience_sender);
    control.subscriptions = options.subscriptions.clone();
    control.own_certificate = options.certificates.is_some();
    if let Some(certificates) = &options.certificates {
        take_certificate(&shared, certificates.borrow().as_deref());
    }
    control.follow_all(settings.cds.as_ref(), settings.lds.as_ref());
    load_static(&mut control, &bootstrap)?;
    control.follow_listeners();
    control.subscribe();
    let admin_address = settings.admin.as_ref().map(|admin| admin.address.clone());
    let (demands, wanted_secrets) = (control.demands.subscribe(), control.demands.subscribe());
    let control = Arc::new(Mutex::new(control));
    let bootstrap = Arc::new(bootstrap);
    let admin =
        admin::Admin::new(shared.clone(), control.clone(), bootstrap.clone(), Naming::new(&settings.stats), &options);
    let mut tasks = JoinSet::new();
    if !options.validate {
        if let Some(address) = admin_address {
            let listener = admin::bind(&address)?;
            if let Some(path) = &options.admin_address_path {
                let text = listener.address().unwrap_or(address).to_string();
                if let Err(e) = std::fs::write(path, text) {
                    tracing::error!(path = %path.display(), error = %e, "cannot write the admin address");
                }
            }
            tasks.spawn(admin::serve(listener, admin.clone()));
        }
        if let Some(overload) = shared.overload.get() {
            tasks.spawn(overload::watch(overload.clone()));
        }
        tasks.spawn(dns::run(dns_receiver, control.clone()));
        tasks.spawn(lose_patience(awaited, control.clone()));
        tasks.spawn(sources::run(demands, control.clone(), shared.node.message.clone()));
        tasks.spawn(tls::follow_files(shared.clone(), wanted_secrets));
        if let Some(mut certificates) = options.certificates.take() {
            let (shared, control) = (shared.clone(), control.clone());
            tasks.spawn(async move {
                while certificates.changed().await.is_ok() {
                    let current = certificates.borrow_and_update().clone();
                    take_certificate(&shared, current.as_deref());
                    lock(&control).secrets_came();
                }
            });
        }
        let extra = std::mem::take(&mut options.extra);
        xds::start(&mut tasks, settings.ads.as_ref(), &control, options.ads.take(), extra);
    }
    Ok(Handle { control, tasks: Mutex::new(tasks), threads: Mutex::new(threads), admin })
}

/// The address this machine uses towards others. Connecting a UDP socket sends nothing.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified())
}

fn take_certificate(shared: &Shared, certificate: Option<&WorkloadCertificate>) {
    if let Some(certificate) = certificate
        && let Err(e) = shared.secrets.set_workload(certificate)
    {
        tracing::error!(error = %e, "the agent's certificate cannot be used");
    }
}

fn refuse(refused: Vec<(mesh_types::ArcStr, String)>) -> Result<(), InvalidBootstrap> {
    match refused.into_iter().next() {
        Some((_, reason)) => Err(InvalidBootstrap::Refused(reason)),
        None => Ok(()),
    }
}

/// What all resources begin with.
#[derive(prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

fn incoming(body: &Bytes) -> Result<Incoming, InvalidBootstrap> {
    let named = Named::decode(body.clone()).map_err(|e| InvalidBootstrap::Shape(e.to_string()))?;
    Ok(Incoming { name: named.name.into(), version: "".into(), body: body.clone() })
}

/// A name that stands there twice.
fn twice(all: &[Incoming]) -> Option<&mesh_types::ArcStr> {
    let mut seen = std::collections::HashSet::new();
    all.iter().map(|incoming| &incoming.name).find(|name| !seen.insert(*name))
}

/// A secret that stands there twice: each kind has its own names (Envoy `SecretManagerImpl::addStaticSecret`).
fn secret_twice(secrets: &[Bytes]) -> Option<String> {
    use envoy_api::pb::envoy::extensions::transport_sockets::tls::v3::{Secret, secret::Type};
    let mut seen = std::collections::HashSet::new();
    let kinds = secrets.iter().filter_map(|body| {
        let secret = Secret::decode(body.clone()).ok()?;
        let kind = match secret.r#type? {
            Type::TlsCertificate(_) => "TlsCertificate",
            Type::ValidationContext(_) => "CertificateValidationContext",
            Type::SessionTicketKeys(_) => "TlsSessionTicketKeys",
            Type::GenericSecret(_) => "GenericSecret",
        };
        Some((kind, secret.name))
    });
    let mut twice = kinds.filter(|secret| !seen.insert(secret.clone()));
    twice.next().map(|(kind, name)| format!("duplicate static {kind} secret name {name}"))
}

/// Secrets, clusters, listeners of the bootstrap; any refused one stops the start, as in Envoy.
fn load_static(control: &mut Control, bootstrap: &Parts) -> Result<(), InvalidBootstrap> {
    let resources = &bootstrap.resources;
    if let Some(twice) = secret_twice(&resources.secrets) {
        return Err(InvalidBootstrap::Refused(twice));
    }
    let secrets = resources.secrets.iter().map(incoming).collect::<Result<_, _>>()?;
    refuse(control.update_secrets(&Origin::Static, secrets, &[]))?;
    let clusters = resources.clusters.iter().map(incoming).collect::<Result<Vec<_>, _>>()?;
    if let Some(twice) = twice(&clusters) {
        return Err(InvalidBootstrap::Refused(format!("cluster manager: duplicate cluster '{twice}'")));
    }
    refuse(control.update_clusters(clusters, &[], false))?;
    if let Some((name, _)) = control.shared.local_cluster.get()
        && resources.clusters.iter().map(incoming).all(|cluster| cluster.is_ok_and(|cluster| cluster.name != *name))
    {
        return Err(InvalidBootstrap::Refused(format!("local cluster '{name}' must be defined")));
    }
    let mut listeners = resources.listeners.iter().map(incoming).collect::<Result<Vec<_>, _>>()?;
    for (i, listener) in listeners.iter_mut().enumerate().filter(|(_, l)| l.name.is_empty()) {
        // Envoy gives unnamed listeners a UUID; a number is enough to keep them apart.
        let named = Named { name: format!("listener-{i}") };
        // A later field of the same number counts.
        listener.body = [&listener.body[..], &named.encode_to_vec()].concat().into();
        listener.name = named.name.into();
    }
    refuse(control.update_listeners(listeners, &[], false))?;
    if let Some(problem) = control.unknown_clusters().or_else(|| control.unusable_tls()) {
        return Err(InvalidBootstrap::Refused(problem));
    }
    Ok(())
}
