//! Puts the parts together and on the ports.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use ca::{Authority, CertificateService};
use config_store::Rejected;
use istio_api::MeshConfig;
use kube_source::Cluster;
use lifecycle::drain::Watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;
use tracing::info;

use crate::connection::{self, Secure};
use crate::federation;
use crate::identity::{Identities, Tokens, Verified};
use crate::injection::Injector;
use crate::jwks;
use crate::metrics::Metrics;
use crate::monitoring::Monitoring;
use crate::networks;
use crate::registration::{Keeper, Registrar};
use crate::secrets::{Keys, Reviews};
use crate::source::Generator;
use crate::status::{Laggards, ProxyStatus, Statuses};
use crate::webhook::Webhooks;
use crate::world::{self, State, Update, World};

/// How the control plane behaves.
#[derive(Clone)]
pub struct Settings {
    /// MeshConfig; the ConfigMap `istio` of the root namespace is laid over it. Trust domain and root namespace
    /// are in it.
    pub mesh: MeshConfig,
    /// Name, networks and DNS domain of the cluster, and generation's settings.
    pub push: push_context::Settings,
    /// This control plane's revision; "" or `default` is the default one.
    pub revision: String,
    /// Names in our own server certificate, besides the usual ones of istiod.
    pub server_names: Vec<String>,
    /// Audiences of tokens that are accepted; one is enough.
    pub audiences: Vec<String>,
    /// What `POST /inject` works with; `None` when injection is done elsewhere.
    pub injector: Option<Injector>,
    /// Where WorkloadEntries of machines that register themselves are written; `None`: they live as long as this process.
    pub cluster: Option<Cluster>,
    /// How long a machine that registered itself may be away before it is forgotten.
    pub entry_grace: Duration,
    /// What tells this control plane from others of the same mesh.
    pub name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mesh: MeshConfig::builtin(),
            push: push_context::Settings::default(),
            revision: String::new(),
            server_names: Vec::new(),
            audiences: vec![ca::DEFAULT_AUDIENCE.to_owned()],
            injector: None,
            cluster: None,
            entry_grace: Duration::from_secs(10),
            name: "outrigger".to_owned(),
        }
    }
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("revision", &self.revision)
            .field("push", &self.push)
            .field("server_names", &self.server_names)
            .field("audiences", &self.audiences)
            .finish_non_exhaustive()
    }
}

/// Bound sockets, one for each port; they may be in another network namespace than this process.
#[derive(Debug)]
pub struct Listeners {
    /// xDS in clear text: 15010.
    pub grpc: TcpListener,
    /// xDS and certificates over TLS: 15012.
    pub grpc_tls: TcpListener,
    /// Admission webhooks: 15017.
    pub webhook: TcpListener,
    /// `/metrics`, `/debug`, `/ready`, `/version`: 15014.
    pub monitoring: TcpListener,
}

/// Why the control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A listener is not usable.
    #[error("the {port} port cannot be used")]
    Listener {
        /// Which.
        port: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is no certificate for ourselves, or no way to verify clients.
    #[error("TLS cannot be set up")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A running control plane. Cheap to clone; it runs until the shutdown, not until the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Handle {
    world: World,
    statuses: Arc<Statuses>,
    metrics: Arc<Metrics>,
}

impl Handle {
    pub(crate) fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Applies updates as one snapshot. Returns its revision, once proxies can see it, and what was left out and why.
    pub async fn update(&self, updates: Vec<Update>) -> (u64, Vec<Rejected>) {
        self.world.update(updates).await
    }

    /// What each connected proxy has been sent and has accepted.
    pub fn sync_status(&self) -> Vec<ProxyStatus> {
        self.statuses.all()
    }

    /// Waits until all connected proxies have accepted `revision`.
    ///
    /// # Errors
    /// Those which have not at the end of `timeout`, or have refused something.
    pub async fn wait(&self, revision: u64, timeout: Duration) -> Result<(), Laggards> {
        self.statuses.wait(revision, timeout).await
    }

    /// The latest state.
    pub fn state(&self) -> Arc<State> {
        self.world.current()
    }

    /// Follows the latest revision.
    pub fn revisions(&self) -> tokio::sync::watch::Receiver<u64> {
        self.world.revisions()
    }
}

/// Starts serving on the current tokio runtime; returns as soon as all ports answer. Proxies are admitted after the
/// first [`Handle::update`].
///
/// # Errors
/// When a listener or TLS cannot be used.
pub async fn serve(
    settings: Settings,
    listeners: Listeners,
    authority: Arc<Authority>,
    tokens: impl Into<Tokens>,
    shutdown: Watch,
) -> Result<Handle, ServeError> {
    let metrics = Arc::new(Metrics::default());
    metrics.started(env!("CARGO_PKG_VERSION"));
    let tls = |alpn: &[&str]| {
        crate::tls::server_config(&authority, server_names(&settings), alpn)
            .map(TlsAcceptor::from)
            .map_err(|error| ServeError::Tls(error.into()))
    };
    let (grpc_tls, https) = (tls(&["h2"])?, tls(&["h2", "http/1.1"])?);
    let grpc_listener = async_listener("gRPC", listeners.grpc)?;
    let tls_listener = async_listener("secure gRPC", listeners.grpc_tls)?;
    let webhook_listener = async_listener("webhook", listeners.webhook)?;
    let monitoring_listener = async_listener("monitoring", listeners.monitoring)?;

    let (world, writer) = world::new(settings.mesh, &settings.revision, settings.push, metrics.clone());
    let statuses = Arc::new(Statuses::default());
    let identities = Identities { world: world.clone(), tokens: tokens.into(), audiences: settings.audiences.into() };
    let keys = match &settings.cluster {
        None => Keys::Everybody,
        Some(cluster) => Keys::Review(Arc::new(Reviews::new(cluster.clone()))),
    };
    let registrar = Registrar::default();
    let keeper = Keeper {
        registrar: registrar.clone(),
        world: world.clone(),
        cluster: settings.cluster,
        grace: settings.entry_grace,
        name: settings.name,
        metrics: metrics.clone(),
    };
    let plain = Generator {
        world: world.clone(),
        statuses: statuses.clone(),
        metrics: metrics.clone(),
        registrar: registrar.clone(),
        connections: Arc::new(AtomicU64::new(1)),
        secure: false,
        keys: Keys::Nobody,
    };
    let secure = Generator {
        world: world.clone(),
        statuses: statuses.clone(),
        metrics: metrics.clone(),
        registrar: registrar.clone(),
        connections: plain.connections.clone(),
        secure: true,
        keys,
    };
    let federation = federation::follow(world.clone(), authority.clone());
    let issuers = jwks::follow(world.clone(), metrics.clone());
    let gateways = networks::follow(world.clone());
    let certificates = CertificateService::new(authority.clone(), Arc::new(Verified(metrics.clone())));
    let plain = Routes::new(ads::server::service(Arc::new(plain))).prepare();
    let secure = Routes::new(ads::server::service(Arc::new(secure))).add_service(certificates).prepare();
    let injector = settings.injector.clone();
    let webhooks = Webhooks { injector: settings.injector, world: world.clone(), metrics: metrics.clone() };
    let secure_port = Secure { tls: grpc_tls, identities: identities.clone(), metrics: metrics.clone() };
    let monitoring = Monitoring {
        world: world.clone(),
        statuses: statuses.clone(),
        metrics: metrics.clone(),
        identities,
        injector,
        authority,
    };

    let mut tasks = JoinSet::new();
    tasks.spawn(writer.run());
    tasks.spawn(keeper.run());
    tasks.spawn(federation);
    tasks.spawn(issuers);
    tasks.spawn(gateways);
    tasks.spawn(connection::serve_grpc(grpc_listener, None, plain, shutdown.clone()));
    tasks.spawn(connection::serve_grpc(tls_listener, Some(secure_port), secure, shutdown.clone()));
    let answer = move |request| webhooks.clone().answer(request);
    tasks.spawn(connection::serve_https(webhook_listener, https, answer, shutdown.clone()));
    tasks.spawn(monitoring.serve(monitoring_listener, shutdown.clone()));
    // Nobody waits for this task itself: it owns the others, and holds the watch that the owner of the shutdown waits for.
    tokio::spawn(async move {
        shutdown.started().await;
        info!("control plane is shutting down");
        // The writer ends when the handles are gone, so only the four servers are waited for.
        for _ in 0..4 {
            tasks.join_next().await;
        }
        drop(shutdown);
    });
    Ok(Handle { world, statuses, metrics })
}

/// The names proxies and API servers call istiod by.
fn server_names(settings: &Settings) -> Vec<String> {
    let namespace = &settings.mesh.root_namespace;
    let mut services = vec!["istiod".to_owned(), "istiod-remote".into(), "istio-pilot".into()];
    if !settings.revision.is_empty() && settings.revision != "default" {
        services.push(format!("istiod-{}", settings.revision));
    }
    let mut names = Vec::new();
    for service in services {
        names.push(format!("{service}.{namespace}.svc"));
        names.push(format!("{service}.{namespace}"));
        names.push(format!("{service}.{namespace}.svc.{}", settings.push.domain));
    }
    names.extend(["localhost".into(), "127.0.0.1".into(), "::1".into()]);
    names.extend(settings.server_names.iter().cloned());
    names
}

fn async_listener(port: &'static str, listener: TcpListener) -> Result<tokio::net::TcpListener, ServeError> {
    let converted = listener.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener));
    converted.map_err(|source| ServeError::Listener { port, source })
}
