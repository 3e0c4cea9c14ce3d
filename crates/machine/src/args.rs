//! The commands' flags.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use crate::network::publish::Publish;

/// Which mesh is meant.
#[derive(Debug, Clone, Args)]
pub struct Mesh {
    /// Name of the mesh, when several run on this machine
    #[arg(long, visible_alias = "mesh", default_value = "default", env = "OUTRIGGER_NAME")]
    pub name: String,
}

/// `outrigger up`
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Kubernetes and Istio YAML: files, folders, or - for standard input
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    #[command(flatten)]
    pub mesh: Mesh,
    /// Make a service reachable at this machine: SVC[.NS]:PORT=[ADDRESS:]PORT. productpage:9080=9080 is published when there is such a
    /// service and the port is free
    #[arg(long, value_name = "SVC:PORT=PORT")]
    pub publish: Vec<Publish>,
    /// Read folders with their subfolders
    #[arg(long, short = 'R')]
    pub recursive: bool,
    /// Apply changes of the files as they are saved
    #[arg(long)]
    pub watch: bool,
    /// Give the terminal back once everything runs; `outrigger down` ends it
    #[arg(long, short = 'd')]
    pub detach: bool,
    /// Run the smoke test over the running mesh, end it, and exit with the test's status
    #[arg(long)]
    pub check: bool,
    /// Give pods and services IPv6 addresses beside their IPv4 ones
    #[arg(long)]
    pub dual_stack: bool,
    /// Worker threads of each sidecar
    #[arg(long)]
    pub concurrency: Option<u32>,
    /// A setting of istiod by its variable, as Istio's value pilot.env: ENABLE_TLS_ON_SIDECAR_INGRESS=true
    #[arg(long, value_name = "NAME=VALUE")]
    pub pilot_env: Vec<PilotEnv>,
    /// Run this Envoy as the sidecars' proxy instead of our own
    #[arg(long, value_name = "FILE")]
    pub envoy: Option<PathBuf>,
    /// Leave pods alone in namespaces that the YAML does not declare; without this they get a sidecar
    #[arg(long)]
    pub no_default_injection: bool,
    /// Injection's configuration with its templates, such as the key `config` of Istio's ConfigMap
    #[arg(long, value_name = "FILE")]
    pub inject_config: Option<PathBuf>,
    /// Values for the templates, YAML or JSON
    #[arg(long, value_name = "FILE")]
    pub inject_values: Option<PathBuf>,
    /// Seconds to wait for all pods to be ready before saying which are not
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub timeout: u64,
    /// Set by --detach for the process in the background
    #[arg(long, hide = true)]
    pub background: bool,
}

/// `NAME=VALUE` of a variable that the control plane knows.
#[derive(Debug, Clone)]
pub struct PilotEnv {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl FromStr for PilotEnv {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} should look like NAME=VALUE"))?;
        if !control_plane::Settings::default().push.set_env(name, value) {
            return Err(format!("{name} is no setting of the control plane"));
        }
        Ok(Self { name: name.to_owned(), value: value.to_owned() })
    }
}

/// `outrigger down`
#[derive(Debug, Clone, Args)]
pub struct DownArgs {
    #[command(flatten)]
    pub mesh: Mesh,
    /// All meshes of this user
    #[arg(long)]
    pub all: bool,
}

/// `outrigger apply`
#[derive(Debug, Clone, Args)]
pub struct ApplyArgs {
    /// Files or folders to apply, or - for standard input
    #[arg(long, short = 'f', required = true)]
    pub filename: Vec<PathBuf>,
    /// Read folders with their subfolders
    #[arg(long, short = 'R')]
    pub recursive: bool,
    /// Namespace of objects that name none; one that names another is refused
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    /// Check everything and say what would change, without changing it
    #[arg(long, value_name = "client|server|none", num_args = 0..=1, require_equals = true, default_value = "none",
        default_missing_value = "client", value_parser = ["client", "server", "none"])]
    pub dry_run: String,
    /// Wait until all sidecars have accepted the change, so many seconds at most
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "10")]
    pub wait: Option<u64>,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger delete`
#[derive(Debug, Clone, Args)]
pub struct DeleteArgs {
    /// KIND NAME[.NAMESPACE]… or KIND/NAME[.NAMESPACE]…
    pub object: Vec<String>,
    /// Delete what these files describe
    #[arg(long, short = 'f')]
    pub filename: Vec<PathBuf>,
    /// Read folders with their subfolders
    #[arg(long, short = 'R')]
    pub recursive: bool,
    /// What is not there is no failure
    #[arg(long)]
    pub ignore_not_found: bool,
    /// Wait until all sidecars have accepted the change, so many seconds at most
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "10")]
    pub wait: Option<u64>,
    /// Namespace of objects that name none
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger ps`
#[derive(Debug, Clone, Args)]
pub struct PsArgs {
    /// How it is written
    #[arg(long, short = 'o', default_value = "table", value_parser = ["table", "json"])]
    pub output: String,
    /// Only pods of this namespace
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger exec`
#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// POD[.NAMESPACE]; the beginning of its name or its workload's name will do
    pub pod: String,
    /// The container; without, the pod's own one, not its sidecar
    #[arg(long, short = 'c')]
    pub container: Option<String>,
    /// The pod's namespace
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    #[command(flatten)]
    pub mesh: Mesh,
    /// Command to run
    #[arg(required = true, last = true)]
    pub command: Vec<String>,
}

/// `outrigger workload configure`
#[derive(Debug, Clone, Args)]
pub struct ConfigureArgs {
    /// The WorkloadGroup that the machine is to belong to
    pub group: String,
    /// The WorkloadGroup's namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub namespace: String,
    /// The folder for the files; its token is a secret
    #[arg(long, short = 'o', value_name = "DIR")]
    pub output: PathBuf,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger logs`
#[derive(Debug, Clone, Args)]
pub struct LogsArgs {
    /// POD[.NAMESPACE]; the beginning of its name or its workload's name will do
    pub pod: String,
    /// The container; without, the pod's own one, not its sidecar
    #[arg(long, short = 'c')]
    pub container: Option<String>,
    /// The pod's namespace
    #[arg(long, short = 'n')]
    pub namespace: Option<String>,
    /// Go on as more is written
    #[arg(long, short = 'f')]
    pub follow: bool,
    /// Only the last lines
    #[arg(long)]
    pub tail: Option<usize>,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger run-job`
#[derive(Debug, Clone, Args)]
pub struct RunJobArgs {
    /// CRONJOB[.NAMESPACE] to make a job of now
    pub cron_job: String,
    /// The cron job's namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub namespace: String,
    #[command(flatten)]
    pub mesh: Mesh,
}

/// `outrigger ca rotate-root`
#[derive(Debug, Clone, Args)]
pub struct RotateRootArgs {
    #[command(flatten)]
    pub mesh: Mesh,
    /// Seconds between trusting the new root and signing with it: all sidecars must have noticed it by then
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    pub settle: u64,
}
