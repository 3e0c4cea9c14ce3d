//! `outrigger kube-inject` and `outrigger inject …`.

mod istioctl;
mod render;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::Value;

use self::istioctl::IstioctlFlags;
use crate::config::{Config, Files, NativeSidecars};
use crate::decision::{self, NamespaceMeta};
use crate::webhook;
use crate::workload;

/// Where the configuration comes from; istioctl's flags.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ConfigArgs {
    /// Injection configuration, or a bare template for the sidecar; without it the built-in one
    #[arg(long = "injectConfigFile", value_name = "FILE")]
    inject_config_file: Option<PathBuf>,
    /// Values for the template, YAML or JSON
    #[arg(long = "valuesFile", value_name = "FILE")]
    values_file: Option<PathBuf>,
    /// Mesh configuration, laid over the defaults
    #[arg(long = "meshConfigFile", value_name = "FILE")]
    mesh_config_file: Option<PathBuf>,
    /// IstioOperator whose values and mesh configuration are used instead of the files
    #[arg(long = "operatorFileName", value_name = "FILE")]
    operator_file_name: Option<PathBuf>,
    /// Control plane revision
    #[arg(short, long, default_value = "")]
    revision: String,
    /// Run sidecars as init containers that stay: true or false
    #[arg(long, env = "ENABLE_NATIVE_SIDECARS", default_value = "false", hide_env_values = true)]
    native_sidecars: String,
    /// Compliance policy that the proxy keeps to, such as fips-140-3
    #[arg(long, env = "COMPLIANCE_POLICY", default_value = "", hide_env_values = true)]
    compliance_policy: String,
}

impl ConfigArgs {
    /// Whether a part of the configuration is not from a file.
    fn builtin(&self) -> bool {
        let operator = self.operator_file_name.is_some();
        self.inject_config_file.is_none()
            || (!operator && (self.values_file.is_none() || self.mesh_config_file.is_none()))
    }

    fn load(&self) -> anyhow::Result<Config> {
        let files = Files {
            inject: self.inject_config_file.clone(),
            values: self.values_file.clone(),
            mesh: self.mesh_config_file.clone(),
            operator: self.operator_file_name.clone(),
        };
        let mut config = Config::load(&files)?;
        config.revision.clone_from(&self.revision);
        config.native = match self.native_sidecars.as_str() {
            "true" => NativeSidecars::On,
            // DIFFERS: "auto" asks a cluster's nodes; without a cluster it is off.
            "false" | "auto" | "" => NativeSidecars::Off,
            other => bail!("ENABLE_NATIVE_SIDECARS: {other:?} is neither true, false nor auto"),
        };
        config.compliance_policy.clone_from(&self.compliance_policy);
        Ok(config)
    }
}

/// `outrigger kube-inject`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Workloads to inject, YAML or JSON; `-` for standard input
    #[arg(short, long, value_name = "FILE")]
    filename: Option<PathBuf>,
    /// Where the result goes, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Say for every workload which rule decided
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    istioctl: IstioctlFlags,
}

/// Runs `outrigger kube-inject`.
///
/// # Errors
/// Files that cannot be read, written or parsed, and whatever refuses an injection.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Some(file) = &args.filename else { bail!("filename not specified (see --filename or -f)") };
    let config = args.config.load()?;
    let flags = args.istioctl.of_a_cluster();
    if !flags.is_empty() && args.config.builtin() {
        eprintln!(
            "{}: no cluster is asked; what --injectConfigFile, --valuesFile and --meshConfigFile do not give is built in",
            flags.join(", ")
        );
    }
    let text = read(file)?;
    let (out, documents) = workload::inject_text(file, &text, &config)?;
    for document in &documents {
        for warning in &document.warnings {
            eprintln!("{warning}");
        }
        if args.explain {
            let verdict = if document.decision.inject { "injected" } else { "not injected" };
            eprintln!("{}: {verdict}: {}", document.object, document.decision.rule);
        }
    }
    match &args.output {
        Some(path) => std::fs::write(path, out).with_context(|| format!("cannot write {}", path.display()))?,
        None => std::io::stdout().write_all(out.as_bytes()).context("cannot write the result")?,
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| format!("open {}", file.display()))
}

/// `outrigger inject …`
#[derive(Clone, Debug, clap::Subcommand)]
pub enum InjectArgs {
    /// Say whether a pod is injected, and by which rule
    Check(CheckArgs),
    /// Answer an AdmissionReview from standard input as the webhook does
    Review(ReviewArgs),
    /// Render a template over data
    Render(RenderArgs),
}

/// `outrigger inject check`
#[derive(Clone, Debug, clap::Args)]
pub struct CheckArgs {
    /// Pods and workloads, YAML or JSON; `-` for standard input
    file: PathBuf,
    /// Labels of the namespace, as `istio-injection=enabled,…`
    #[arg(long, value_delimiter = ',', value_name = "KEY=VALUE")]
    namespace_labels: Vec<String>,
    /// The namespace, where the objects do not name it
    #[arg(short, long, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    config: ConfigArgs,
}

/// `outrigger inject review`
#[derive(Clone, Debug, clap::Args)]
pub struct ReviewArgs {
    /// Path of the URL that the API server would have called
    #[arg(long, default_value = "/inject")]
    path: String,
    /// Answer so many times and print how long it took instead of the answer (for benchmarks)
    #[arg(long, hide = true)]
    measure: Option<u32>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// `outrigger inject render`
#[derive(Clone, Debug, clap::Args)]
pub struct RenderArgs {
    /// The template
    #[arg(long)]
    template: PathBuf,
    /// The data, YAML or JSON; keys with Go's names are read as the pods and configurations they are
    #[arg(long)]
    data: PathBuf,
}

/// Runs `outrigger inject …`.
///
/// # Errors
/// Files that cannot be read or parsed; a request that the webhook would answer with an HTTP error.
pub fn run_inject(args: InjectArgs) -> anyhow::Result<ExitCode> {
    match args {
        InjectArgs::Check(args) => check(&args),
        InjectArgs::Review(args) => {
            let config = args.config.load()?;
            let mut body = Vec::new();
            std::io::stdin().read_to_end(&mut body).context("cannot read standard input")?;
            if let Some(times) = args.measure {
                return measure(&args.path, &body, &config, times);
            }
            let response = webhook::handle(&args.path, Some("application/json"), &body, &config);
            if response.status != 200 {
                bail!("HTTP {}: {}", response.status, String::from_utf8_lossy(&response.body).trim());
            }
            std::io::stdout().write_all(&response.body).context("cannot write the response")?;
            Ok(ExitCode::SUCCESS)
        }
        InjectArgs::Render(args) => {
            let text = render(&read(&args.template)?, &args.data.display().to_string(), &read(&args.data)?)?;
            std::io::stdout().write_all(text.as_bytes()).context("cannot write the result")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The webhook's whole answer, bytes to bytes, on this one thread.
fn measure(path: &str, body: &[u8], config: &Config, times: u32) -> anyhow::Result<ExitCode> {
    let mut took = Vec::new();
    let started = Instant::now();
    for _ in 0..times.max(1) {
        let before = Instant::now();
        let response = webhook::handle(path, Some("application/json"), body, config);
        took.push(before.elapsed());
        if response.result != webhook::Result::Injected {
            bail!("the pod is not injected: {:?}", response.result);
        }
    }
    let whole = started.elapsed().as_secs_f64();
    took.sort_unstable();
    let milliseconds = |at: usize| took[at.min(took.len() - 1)].as_secs_f64() * 1e3;
    println!(
        "{} pods, median {:.3} ms, 99% in {:.3} ms, {:.0} pods/s on one core",
        took.len(),
        milliseconds(took.len() / 2),
        milliseconds(took.len() * 99 / 100),
        took.len() as f64 / whole
    );
    Ok(ExitCode::SUCCESS)
}

pub use render::render;

fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let config = args.config.load()?;
    let mut labels = BTreeMap::new();
    for pair in &args.namespace_labels {
        let (key, value) = pair.split_once('=').with_context(|| format!("{pair:?} is not KEY=VALUE"))?;
        labels.insert(key.to_owned(), value.to_owned());
    }
    let mut looked_at = 0;
    for document in manifest::parse(&args.file, &read(&args.file)?)? {
        let pod = match document.kind() {
            "Pod" => &document.value,
            "CronJob" => &document.value["spec"]["jobTemplate"]["spec"]["template"],
            _ => &document.value["spec"]["template"],
        };
        if !pod.is_object() {
            continue;
        }
        looked_at += 1;
        let namespace = NamespaceMeta {
            name: document.namespace().unwrap_or(&args.namespace).to_owned(),
            labels: labels.clone(),
            annotations: BTreeMap::new(),
        };
        let unlabelled =
            config.values.pointer("/sidecarInjectorWebhook/enableNamespacesByDefault").and_then(Value::as_bool);
        let mut answer = decision::selected(&namespace, pod, &config.revision, unlabelled.unwrap_or(false));
        if answer.inject {
            let second = decision::decide(pod, &namespace.name, &config.selection);
            // Where nothing speaks against it, what selected the pod is the reason.
            if !second.inject || !matches!(second.rule, decision::Rule::Policy(_)) {
                answer = second;
            }
        }
        let verdict = if answer.inject { "injected" } else { "not injected" };
        println!("{} {}: {verdict}: {}", document.kind(), document.name(), answer.rule);
        for warning in &answer.warnings {
            println!("  warning: {warning}");
        }
    }
    if looked_at == 0 {
        bail!("{}: there is no pod here, and nothing that pods are made of", args.file.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// For the data of `render`: the text of a JSON value or the value itself.
fn embedded(value: &Value) -> Option<Value> {
    match value {
        Value::String(text) => serde_json::from_str(text).ok(),
        Value::Null => None,
        other => Some(other.clone()),
    }
}
