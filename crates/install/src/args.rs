//! The two commands.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use kube_source::{Cluster, Options, Removal};
use serde_json::{Value, json};

use crate::manifests::{Choices, manifests};

#[derive(Clone, Debug, clap::Args)]
struct Target {
    /// Revision of the control plane
    #[arg(short, long, default_value = "")]
    revision: String,
    /// Namespace of the control plane, the mesh's root namespace
    #[arg(short = 'i', long = "istioNamespace", default_value = "istio-system", value_name = "NAME")]
    namespace: String,
    /// Kubeconfig of the cluster
    #[arg(short = 'c', long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Print, change nothing
    #[arg(long)]
    dry_run: bool,
}

impl Target {
    async fn connect(&self) -> anyhow::Result<Cluster> {
        let options = Options { kubeconfig: self.kubeconfig.clone(), context: self.context.clone() };
        Ok(Cluster::connect(&options).await?)
    }
}

/// `outrigger install`
#[derive(Clone, Debug, clap::Args)]
pub struct InstallArgs {
    #[command(flatten)]
    target: Target,
    /// Registry and path of the images
    #[arg(long, default_value = "outrigger", value_name = "NAME")]
    hub: String,
    /// Tag of the images
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"), value_name = "TAG")]
    tag: String,
    /// Values for injection, laid over the built-in ones
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Option<PathBuf>,
    /// Mesh configuration, laid over the defaults
    #[arg(long = "meshConfig", value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// Where the API server finds the webhooks of a control plane outside of the cluster, which gets no Deployment
    #[arg(long, value_name = "URL")]
    webhook_url: Option<String>,
    /// Leave out the CustomResourceDefinitions
    #[arg(long)]
    skip_crds: bool,
}

/// `outrigger uninstall`
#[derive(Clone, Debug, clap::Args)]
pub struct UninstallArgs {
    #[command(flatten)]
    target: Target,
    /// Also take away the CustomResourceDefinitions, with all objects of their kinds, and the namespace
    #[arg(long)]
    purge: bool,
}

fn mapping(file: Option<&PathBuf>) -> anyhow::Result<Value> {
    let Some(file) = file else { return Ok(json!({})) };
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut documents = manifest::parse_plain(file, &text)?;
    anyhow::ensure!(documents.len() == 1, "{}: expected one document", file.display());
    Ok(documents.remove(0).value)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

/// Runs `outrigger install`.
///
/// # Errors
/// Files that cannot be read, values that injection cannot use, an API server that refuses something.
pub fn install(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    let target = &args.target;
    let objects = manifests(&Choices {
        revision: target.revision.clone(),
        namespace: target.namespace.clone(),
        hub: args.hub.clone(),
        tag: args.tag.clone(),
        values: mapping(args.values.as_ref())?,
        mesh: mapping(args.mesh.as_ref())?,
        webhook_url: args.webhook_url.clone(),
        crds: !args.skip_crds,
    })?;
    let mut out = std::io::stdout().lock();
    if target.dry_run {
        for object in &objects {
            writeln!(out, "{}---", inject::to_yaml(object)).context("cannot print")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    runtime()?.block_on(async {
        let cluster = target.connect().await?;
        for object in &objects {
            // A namespace that is there belongs to whoever made it.
            let done = if object["kind"] == "Namespace" {
                cluster.create_missing(object).await.map(|made| if made { "made" } else { "is there" })
            } else {
                cluster.apply(object).await.map(|()| "applied")
            };
            let done = done.with_context(|| format!("cannot apply {}", title(object)))?;
            writeln!(out, "{} {done}", title(object)).context("cannot print")?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Runs `outrigger uninstall`: what `install` of the same revision made, and nothing that another revision needs.
///
/// # Errors
/// An API server that cannot be reached or refuses something.
pub fn uninstall(args: &UninstallArgs) -> anyhow::Result<ExitCode> {
    let target = &args.target;
    let mut objects = manifests(&Choices {
        revision: target.revision.clone(),
        namespace: target.namespace.clone(),
        hub: String::new(),
        tag: String::new(),
        values: json!({}),
        mesh: json!({}),
        webhook_url: None,
        crds: args.purge,
    })?;
    if !args.purge {
        objects.retain(|object| object["kind"] != "Namespace");
    }
    // The webhooks first: nobody answers them soon.
    objects.reverse();
    let mut out = std::io::stdout().lock();
    if target.dry_run {
        for object in &objects {
            writeln!(out, "{}", title(object)).context("cannot print")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    runtime()?.block_on(async {
        let cluster = target.connect().await?;
        for object in &objects {
            let done = cluster.remove(object).await.with_context(|| format!("cannot remove {}", title(object)))?;
            match done {
                Removal::Removed => writeln!(out, "{} removed", title(object)).context("cannot print")?,
                Removal::Foreign => {
                    writeln!(out, "{} is not ours and stays", title(object)).context("cannot print")?;
                }
                Removal::Absent => {}
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn title(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    match metadata["namespace"].as_str() {
        Some(namespace) => format!("{} {namespace}/{}", text(&object["kind"]), text(&metadata["name"])),
        None => format!("{} {}", text(&object["kind"]), text(&metadata["name"])),
    }
}
