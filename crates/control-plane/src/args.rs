//! `outrigger control-plane`: istiod's place, reading folders and an API server.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use ca::{Authority, TokenIssuer, TokenVerifier};
use clap::Parser;
use istio_api::MeshConfig;
use kube_source::Cluster;
use lifecycle::signal::Signals;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::allocation;
use crate::folder::Folders;
use crate::identity::Tokens;
use crate::injection::{self, Injector, Native};
use crate::networks;
use crate::serve::{Handle, Listeners, Settings, serve};
use crate::sources::follow;
use crate::world::mesh_config_map;

/// How long connections may last after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Serve configuration, certificates and webhooks to sidecars, from a Kubernetes API server and folders of YAML.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Files and folders (without those below them) of Kubernetes and Istio YAML; changes are followed. What they say holds
    /// over what the API server says.
    #[arg(long = "config", visible_alias = "configDir", value_name = "PATH")]
    config: Vec<PathBuf>,
    /// Kubeconfig of the API server; without, the pod's service account is used.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long = "context", value_name = "NAME")]
    context: Option<String>,
    /// Whether to read a Kubernetes API server: `Kubernetes` or nothing. Unless given: with --kubeconfig or without
    /// --config.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    registries: Option<Vec<String>>,
    /// MeshConfig over the built-in defaults; the ConfigMap `istio` of the root namespace is laid over it.
    #[arg(long = "meshConfig", visible_alias = "mesh-config", value_name = "FILE")]
    mesh_config: Option<PathBuf>,
    /// MeshNetworks, instead of the key `meshNetworks` of the ConfigMap `istio`; changes are followed.
    #[arg(
        long = "networksConfig",
        visible_alias = "networks-config",
        default_value = "./etc/istio/config/meshNetworks",
        value_name = "FILE"
    )]
    networks_config: PathBuf,
    /// xDS in clear text.
    #[arg(long = "grpcAddr", visible_alias = "grpc-addr", default_value = ":15010", value_name = "ADDRESS")]
    grpc: String,
    /// xDS and certificates over TLS.
    #[arg(
        long = "secureGRPCAddr",
        visible_alias = "secure-grpc-addr",
        default_value = ":15012",
        value_name = "ADDRESS"
    )]
    grpc_tls: String,
    /// Admission webhooks.
    #[arg(long = "httpsAddr", visible_alias = "https-addr", default_value = ":15017", value_name = "ADDRESS")]
    webhook: String,
    /// Readiness, version, metrics and debug pages.
    #[arg(
        long = "monitoringAddr",
        visible_alias = "monitoring-addr",
        default_value = ":15014",
        value_name = "ADDRESS"
    )]
    monitoring: String,
    /// DNS domain of the cluster.
    #[arg(long, default_value = "cluster.local", value_name = "DOMAIN")]
    domain: String,
    /// Name of the cluster.
    #[arg(
        long = "clusterID",
        visible_alias = "cluster-id",
        env = "CLUSTER_ID",
        default_value = "Kubernetes",
        value_name = "NAME"
    )]
    cluster_id: String,
    /// Revision of this control plane.
    #[arg(long, env = "REVISION", default_value = "", value_name = "NAME")]
    revision: String,
    /// Folder of ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem; a self-signed root is made in it when it is
    /// empty. Without, these are taken from the Secrets `cacerts` or `istio-ca-secret` of the API server, where a self-signed
    /// root is kept, too; without either, the root lives as long as this process.
    #[arg(long = "ca-dir", value_name = "DIR")]
    ca_dir: Option<PathBuf>,
    /// JSON Web Key Set that verifies service account tokens. Without, the API server is asked, if there is one.
    #[arg(long = "token-keys", value_name = "FILE")]
    token_keys: Option<PathBuf>,
    /// Issuer that tokens must name.
    #[arg(long = "token-issuer", value_name = "URL")]
    token_issuer: Option<String>,
    /// Folder with the signing key of service account tokens, made when it is missing.
    #[arg(long = "token-dir", value_name = "DIR", conflicts_with = "token_keys")]
    token_dir: Option<PathBuf>,
    /// Audiences of tokens that are accepted.
    #[arg(long = "token-audiences", default_value = ca::DEFAULT_AUDIENCE, value_delimiter = ',', value_name = "NAMES")]
    audiences: Vec<String>,
    /// Further names of this server in its certificate.
    #[arg(long = "server-name", value_name = "NAME")]
    server_names: Vec<String>,
    /// Folder with injection's files `config` and `values`, as istiod's projected ConfigMap; changes are followed.
    /// Without them the ConfigMap `istio-sidecar-injector` of the root namespace holds, else what is built in.
    #[arg(long = "inject-dir", default_value = "./var/lib/istio/inject", value_name = "DIR")]
    inject_dir: PathBuf,
    /// Run sidecars as init containers that stay; `auto`: when every node can.
    #[arg(long = "native-sidecars", env = "ENABLE_NATIVE_SIDECARS", default_value = "auto", value_name = "WHEN")]
    native_sidecars: Native,
    /// Compliance policy that injected proxies keep to, such as fips-140-3.
    #[arg(long = "compliance-policy", env = "COMPLIANCE_POLICY", default_value = "", value_name = "NAME")]
    compliance_policy: String,
    /// How long a machine that registered itself may be away before its WorkloadEntry is removed.
    #[arg(
        long = "workload-entry-grace",
        env = "PILOT_WORKLOAD_ENTRY_GRACE_PERIOD",
        default_value = "10s",
        value_name = "DURATION"
    )]
    entry_grace: istio_api::Duration,
    /// What tells this control plane from others of the same mesh.
    #[arg(long = "instance", env = "POD_NAME", default_value = "outrigger", value_name = "NAME")]
    instance: String,
    /// Levels of what is logged, such as `default:info,ads:debug`.
    #[arg(long = "log_output_level", default_value = "", value_name = "LEVELS")]
    log_level: String,
    /// Log JSON.
    #[arg(long = "log_as_json")]
    log_json: bool,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start: a port is taken, a file is missing.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    lifecycle::memory::keep_heap_small();
    lifecycle::logging::init(&lifecycle::logging::Options { json: args.log_json, levels: levels(&args.log_level) })?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(serve_until_signal(args))
}

async fn serve_until_signal(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let mesh = match &args.mesh_config {
        None => MeshConfig::builtin(),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            MeshConfig::load(path, &text)?
        }
    };
    let cluster = match args.reads_cluster() {
        true => {
            let options = kube_source::Options { kubeconfig: args.kubeconfig.clone(), context: args.context.clone() };
            Some(Cluster::connect(&options).await?)
        }
        false => None,
    };
    let authority = Arc::new(authority(&args, &mesh, cluster.as_ref()).await?);
    let builtin = inject::Builtin {
        revision: args.revision.clone(),
        mesh: serde_json::to_value(&mesh)?,
        ..inject::Builtin::default()
    };
    let injector = Injector::new(inject::Config::builtin(&builtin)?);
    let sources = injection::Sources {
        folder: args.inject_dir.clone(),
        mesh: args.mesh_config.clone(),
        cluster: cluster.clone(),
        namespace: mesh.root_namespace.clone(),
        injection_map: injection::injection_config_map(&args.revision),
        mesh_map: mesh_config_map(&args.revision),
        builtin,
        native: args.native_sidecars,
        compliance_policy: args.compliance_policy.clone(),
    };
    let networks = networks::read(&args.networks_config)?;
    let settings = Settings {
        mesh,
        push: push_context::Settings {
            networks: networks.clone().unwrap_or_default().into(),
            cluster_id: args.cluster_id.as_str().into(),
            domain: args.domain.as_str().into(),
            ..generation_settings()
        },
        revision: args.revision.clone(),
        server_names: args.server_names.clone(),
        audiences: args.audiences.clone(),
        injector: Some(injector.clone()),
        cluster: cluster.clone(),
        entry_grace: args.entry_grace.to_std().context("--workload-entry-grace is negative")?,
        name: args.instance.clone(),
    };
    let listeners = Listeners {
        grpc: bind(&args.grpc)?,
        grpc_tls: bind(&args.grpc_tls)?,
        webhook: bind(&args.webhook)?,
        monitoring: bind(&args.monitoring)?,
    };
    let (trigger, watch) = lifecycle::drain::channel();
    let mesh_map_namespace = settings.mesh.root_namespace.clone();
    let mesh_map = (settings.mesh.root_namespace.clone(), mesh_config_map(&args.revision));
    let handle = serve(settings, listeners, authority.clone(), tokens(&args, cluster.as_ref())?, watch).await?;
    info!(config = ?args.config, api_server = cluster.is_some(), "control plane is serving");
    // Ended, with all they do, when this function is.
    let mut tasks = JoinSet::new();
    tasks.spawn(sources.follow(injector, handle.metrics()));
    if networks.is_some() {
        tasks.spawn(networks::follow_file(args.networks_config.clone(), handle.clone()));
    }
    let batches = cluster.map(|cluster| {
        // One batch waits while the last is applied; further changes wait in the connection.
        let (sender, batches) = mpsc::channel(1);
        let (metrics, id) = (handle.metrics(), args.cluster_id.clone());
        let cluster = cluster.observed(move |notice| metrics.api_server(&id, notice));
        let watching = cluster.clone();
        tasks.spawn(async move { watching.watch(mesh_map, sender).await });
        // A name that no other process has, not even this one's next life.
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let me = format!("{}_{}_{started}", args.instance, std::process::id());
        tasks.spawn(allocation::run(cluster.clone(), handle.clone(), mesh_map_namespace, me));
        tasks.spawn(write_back(cluster, handle.clone(), authority, args.revision.clone()));
        batches
    });
    tokio::select! {
        () = follow(&handle, Folders::new(args.config.clone()), batches) => {}
        signal = signals.next() => info!(?signal, "stopping"),
    }
    if !trigger.drain(GRACE).await {
        warn!(grace = ?GRACE, "connections still open at the deadline; closing them");
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn reads_cluster(&self) -> bool {
        match &self.registries {
            Some(names) => names.iter().any(|name| name == "Kubernetes"),
            None => self.kubeconfig.is_some() || self.config.is_empty(),
        }
    }
}

/// What the API server is told of us, once we serve.
async fn write_back(cluster: Cluster, handle: Handle, authority: Arc<Authority>, revision: String) {
    let mut revisions = handle.revisions();
    if revisions.wait_for(|revision| *revision > 0).await.is_err() {
        return;
    }
    // While the root is replaced, both are published: the API server and agents trust the old and the new.
    loop {
        let (bundle, generation) = (authority.trust_bundle(), authority.generation());
        tokio::select! {
            _ = async {
                tokio::join!(cluster.publish_root_certificate(&bundle), cluster.patch_webhooks(&revision, &bundle))
            } => {}
            () = replaced(&authority, generation) => {}
        }
    }
}

/// Keeps the caBundle of the revision's webhooks to all roots that `authority` wants trusted. Ends never.
pub async fn keep_webhooks_trusting(cluster: Cluster, authority: Arc<Authority>, revision: String) {
    loop {
        let (bundle, generation) = (authority.trust_bundle(), authority.generation());
        tokio::select! {
            () = cluster.patch_webhooks(&revision, &bundle) => {}
            () = replaced(&authority, generation) => {}
        }
    }
}

/// Waits until other roots are to be trusted than in `generation`.
async fn replaced(authority: &Authority, generation: u64) {
    /// A root is replaced once in years, in two steps that are minutes apart.
    const LOOK: Duration = Duration::from_millis(500);
    while authority.generation() == generation {
        tokio::time::sleep(LOOK).await;
    }
}

/// istiod's names of the Secrets with the CA (security/pkg/pki/ca): the one that users plug in comes first.
const PLUGGED_IN: &str = "cacerts";
const SELF_SIGNED: &str = "istio-ca-secret";

async fn authority(args: &Args, mesh: &MeshConfig, cluster: Option<&Cluster>) -> anyhow::Result<Authority> {
    if let Some(dir) = &args.ca_dir {
        return Ok(Authority::load_or_create(dir, &mesh.trust_domain)?);
    }
    let Some(cluster) = cluster else { return Ok(Authority::generate(&mesh.trust_domain)?) };
    let namespace = &mesh.root_namespace;
    // Twice, since another replica may make the Secret at the same moment.
    for _ in 0..2 {
        for name in [PLUGGED_IN, SELF_SIGNED] {
            if let Some(files) = cluster.secret(namespace, name).await? {
                let read = Authority::from_files(&files).with_context(|| format!("Secret {namespace}/{name}"))?;
                info!(secret = name, "certificate authority loaded");
                return Ok(read);
            }
        }
        let files = ca::self_signed(&mesh.trust_domain)?;
        if cluster.create_secret(namespace, SELF_SIGNED, "istio.io/ca-root", files.clone()).await? {
            info!(secret = SELF_SIGNED, "self-signed root made");
            return Ok(Authority::from_files(&files)?);
        }
    }
    anyhow::bail!("Secret {namespace}/{SELF_SIGNED} can neither be read nor made")
}

fn tokens(args: &Args, cluster: Option<&Cluster>) -> anyhow::Result<Tokens> {
    if let Some(path) = &args.token_keys {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(TokenVerifier::from_key_set(&text, args.token_issuer.clone())?.into());
    }
    if let Some(dir) = &args.token_dir {
        return Ok(TokenIssuer::load_or_create(Path::new(dir))?.verifier().into());
    }
    Ok(match cluster {
        Some(cluster) => cluster.clone().into(),
        None => TokenVerifier::from_key_set(r#"{"keys": []}"#, None)?.into(),
    })
}

/// The Kubernetes client reports each attempt at a server that is away as an error; the watches say it once.
fn levels(asked: &str) -> String {
    format!("{asked},kube_client:none").trim_start_matches(',').to_owned()
}

/// Generation's settings by the variables that istiod has for them.
fn generation_settings() -> push_context::Settings {
    let mut settings = push_context::Settings::default();
    for (name, value) in std::env::vars_os() {
        if let (Some(name), Some(value)) = (name.to_str(), value.to_str()) {
            settings.set_env(name, value);
        }
    }
    settings
}

/// Binds Go's `:PORT` (all addresses of both families) or `ADDRESS:PORT`.
fn bind(address: &str) -> anyhow::Result<TcpListener> {
    let bound = match address.strip_prefix(':') {
        Some(port) => {
            let port: u16 = port.parse().with_context(|| format!("{address:?} is not an address"))?;
            TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        }
        None => TcpListener::bind(address),
    };
    bound.with_context(|| format!("cannot listen on {address}"))
}
