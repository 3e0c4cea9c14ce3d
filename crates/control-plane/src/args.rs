//! `outrigger control-plane`: istiod's place, reading folders.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ca::{Authority, TokenIssuer, TokenVerifier};
use clap::Parser;
use istio_api::MeshConfig;
use lifecycle::signal::Signals;
use tracing::{info, warn};

use crate::folder::Folders;
use crate::serve::{Handle, Listeners, Settings, serve};

/// How long connections may last after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Serve configuration, certificates and webhooks to sidecars, from folders of YAML.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Files and folders (without those below them) of Kubernetes and Istio YAML; changes are followed.
    #[arg(long = "config", visible_alias = "configDir", value_name = "PATH", required = true)]
    config: Vec<PathBuf>,
    /// MeshConfig over the built-in defaults; the ConfigMap `istio` of the root namespace is laid over it.
    #[arg(long = "meshConfig", visible_alias = "mesh-config", value_name = "FILE")]
    mesh_config: Option<PathBuf>,
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
    /// empty. Without, the root lives as long as this process.
    #[arg(long = "ca-dir", value_name = "DIR")]
    ca_dir: Option<PathBuf>,
    /// JSON Web Key Set that verifies service account tokens. Without, only client certificates are accepted, or, with
    /// --token-dir, our own tokens.
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
    lifecycle::logging::init(&lifecycle::logging::Options { json: args.log_json, levels: args.log_level.clone() })?;
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
    let authority = match &args.ca_dir {
        Some(dir) => Authority::load_or_create(dir, &mesh.trust_domain)?,
        None => Authority::generate(&mesh.trust_domain)?,
    };
    let injector = inject::Config::builtin(&inject::Builtin {
        revision: args.revision.clone(),
        mesh: serde_json::to_value(&mesh)?,
        ..inject::Builtin::default()
    })?;
    let settings = Settings {
        mesh,
        push: push_context::Settings {
            cluster_id: args.cluster_id.as_str().into(),
            domain: args.domain.as_str().into(),
            ..push_context::Settings::default()
        },
        revision: args.revision.clone(),
        server_names: args.server_names.clone(),
        audiences: args.audiences.clone(),
        injector: Some(Arc::new(injector)),
    };
    let listeners = Listeners {
        grpc: bind(&args.grpc)?,
        grpc_tls: bind(&args.grpc_tls)?,
        webhook: bind(&args.webhook)?,
        monitoring: bind(&args.monitoring)?,
    };
    let (trigger, watch) = lifecycle::drain::channel();
    let handle = serve(settings, listeners, Arc::new(authority), verifier(&args)?, watch).await?;
    info!(config = ?args.config, "control plane is serving");
    tokio::select! {
        () = follow(&handle, Folders::new(args.config.clone())) => {}
        signal = signals.next() => info!(?signal, "stopping"),
    }
    if !trigger.drain(GRACE).await {
        warn!(grace = ?GRACE, "connections still open at the deadline; closing them");
    }
    Ok(ExitCode::SUCCESS)
}

/// Never ends by itself.
async fn follow(handle: &Handle, mut folders: Folders) {
    loop {
        let updates = folders.read();
        handle.update(updates).await;
        folders.changed().await;
    }
}

fn verifier(args: &Args) -> anyhow::Result<TokenVerifier> {
    if let Some(path) = &args.token_keys {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(TokenVerifier::from_key_set(&text, args.token_issuer.clone())?);
    }
    match &args.token_dir {
        Some(dir) => Ok(TokenIssuer::load_or_create(Path::new(dir))?.verifier()),
        None => Ok(TokenVerifier::from_key_set(r#"{"keys": []}"#, None)?),
    }
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
