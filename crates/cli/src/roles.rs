use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// The sidecar mesh in one program.
///
/// Run a whole mesh on this machine with `outrigger up`, or put a single part in the place of
/// Istio's: the injector, the traffic capture, the control plane, the agent with its proxy.
#[derive(Parser)]
#[command(name = "outrigger", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Run a mesh from Kubernetes and Istio YAML on this machine.
    Up(machine::UpArgs),
    /// Take a mesh down and leave nothing behind.
    Down(machine::DownArgs),
    /// Create or change objects of a running mesh.
    Apply(machine::ApplyArgs),
    /// Delete objects of a running mesh.
    Delete(machine::DeleteArgs),
    /// List the pods of a running mesh.
    Ps(machine::PsArgs),
    /// Run a command in a container of a running mesh.
    Exec(machine::ExecArgs),
    /// Show what a container wrote.
    Logs(machine::LogsArgs),
    /// Start a job of a cron job now.
    RunJob(machine::RunJobArgs),
    /// Add the sidecar to the workloads in YAML files, as istioctl kube-inject.
    KubeInject(Box<inject::Args>),
    /// Look at injection without a cluster.
    Inject {
        #[command(subcommand)]
        verb: inject::InjectArgs,
    },
    /// Put the control plane into a cluster, or print its manifests.
    Install(install::InstallArgs),
    /// Take out of a cluster what `install` put there.
    Uninstall(install::UninstallArgs),
    /// Check objects as the control plane would.
    Validate(control_plane::ValidateArgs),
    /// Look for faults in the configuration of a mesh, as istioctl analyze.
    Analyze(Box<analyze::AnalyzeArgs>),
    /// Write the CustomResourceDefinitions of Istio's kinds, for clusters that lack them.
    Crds,
    /// Serve configuration and certificates to sidecars, as istiod.
    ControlPlane(Box<control_plane::Args>),
    /// Work with the certificate authority of a running mesh.
    Ca {
        #[command(subcommand)]
        verb: Ca,
    },
    /// Work with xDS resources offline.
    Xds {
        #[command(subcommand)]
        verb: Xds,
    },
    /// Say where a request goes, and why.
    Explain(Box<explain::Args>),
    /// Wait until a change is live at every proxy.
    Wait(inspect::WaitArgs),
    /// Look at what a proxy holds, as istioctl proxy-config.
    #[command(visible_alias = "pc")]
    ProxyConfig(inspect::ProxyConfigArgs),
    /// Say how far each proxy is, as istioctl proxy-status.
    ProxyStatus(inspect::ProxyStatusArgs),
    /// Look at Sidecars: which one applies to a pod, and the one that covers what was seen.
    Sidecar {
        #[command(subcommand)]
        verb: Sidecar,
    },
    /// Show a pod's requests as they come.
    Tap(traffic::TapArgs),
    /// Show who calls whom.
    Graph(traffic::GraphArgs),
    /// Look for what is wrong with a mesh, and say what mends it.
    Doctor(doctor::Args),
    /// Describe pods and services, list authorization policies, as istioctl experimental.
    #[command(alias = "experimental")]
    X {
        #[command(subcommand)]
        verb: X,
    },
    /// Tell the version.
    Version(inspect::VersionArgs),
    /// Run beside a workload: identity, proxy, probes, names; as pilot-agent.
    Agent(agent::Args),
    /// Make this machine, which is no pod, a workload of the mesh until this ends.
    Join(Box<agent::JoinArgs>),
    /// Work with machines that are workloads of a running mesh.
    Workload {
        #[command(subcommand)]
        verb: Workload,
    },
    /// Look at names as a pod sees them.
    Dns(agent::DnsArgs),
    /// Run the proxy from an Envoy bootstrap file, as envoy.
    Proxy(proxy::Args),
    /// Redirect a pod's traffic to its sidecar, as istio-iptables.
    #[command(name = "istio-iptables", disable_help_flag = true)]
    Iptables(Passed),
    /// Undo every redirection, as istio-clean-iptables.
    #[command(name = "istio-clean-iptables", disable_help_flag = true)]
    CleanIptables(Passed),
    /// See what is captured in a pod: show, explain, doctor.
    Capture(capture::InspectArgs),
    /// Run a stand-in for a sample image.
    Sample(sample::Args),
    /// Write the completion script of a shell.
    Completion { shell: clap_complete::Shell },
    /// Set up a container and become its program (used by `up`).
    #[command(name = "container-init", hide = true)]
    ContainerInit,
}

/// A command line that its own parser reads, with the original's exit status for unknown flags.
#[derive(clap::Args)]
struct Passed {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "FLAGS")]
    arguments: Vec<std::ffi::OsString>,
}

#[derive(Subcommand)]
enum Ca {
    /// Replace the root certificate without a failed handshake: trust the new one, then sign with it.
    RotateRoot(machine::RotateRootArgs),
}

#[derive(Subcommand)]
enum Workload {
    /// Write what a machine needs to join: token, root certificate, settings; as istioctl workload entry configure.
    Configure(machine::ConfigureArgs),
}

#[derive(Subcommand)]
enum Xds {
    /// Write what a proxy would be sent.
    Generate(xds_gen::Args),
}

#[derive(Subcommand)]
enum Sidecar {
    /// Say which Sidecar applies to a pod, which ones lost, and what it saves.
    Explain(explain::SidecarArgs),
    /// Write the Sidecar that covers what was seen.
    Generate(traffic::GenerateArgs),
}

#[derive(Subcommand)]
enum X {
    /// Describe what configuration concerns a pod or a service.
    #[command(visible_alias = "des")]
    Describe(explain::DescribeArgs),
    /// Look at authorization policies.
    Authz {
        #[command(subcommand)]
        verb: Authz,
    },
}

#[derive(Subcommand)]
enum Authz {
    /// List the policies that a pod's proxy applies.
    Check(inspect::AuthzArgs),
}

impl Cli {
    pub(crate) fn run(self) -> ExitCode {
        let done = match self.role {
            Role::Up(args) => machine::up(&args),
            Role::Down(args) => machine::down(&args),
            Role::Apply(args) => machine::apply(&args),
            Role::Delete(args) => machine::delete(&args),
            Role::Ps(args) => machine::ps(&args),
            Role::Exec(args) => machine::exec(&args),
            Role::Logs(args) => machine::logs(&args),
            Role::RunJob(args) => machine::run_job(&args),
            Role::KubeInject(args) => inject::run(*args),
            Role::Inject { verb } => inject::run_inject(verb),
            Role::Install(args) => install::install(&args),
            Role::Uninstall(args) => install::uninstall(&args),
            Role::Validate(args) => control_plane::validate(args),
            Role::Analyze(args) => analyze::run(&args),
            Role::Crds => control_plane::crds(),
            Role::ControlPlane(args) => control_plane::run(*args),
            Role::Ca { verb: Ca::RotateRoot(args) } => machine::rotate_root(&args),
            Role::Xds { verb: Xds::Generate(args) } => {
                xds_gen::run(&args).map(|()| ExitCode::SUCCESS).map_err(Into::into)
            }
            Role::Explain(args) => explain::run(&args),
            Role::Wait(args) => inspect::wait(&args),
            Role::ProxyConfig(args) => inspect::proxy_config(&args),
            Role::ProxyStatus(args) => inspect::proxy_status(&args),
            Role::Sidecar { verb: Sidecar::Explain(args) } => explain::sidecar(&args),
            Role::Sidecar { verb: Sidecar::Generate(args) } => traffic::generate(&args),
            Role::Tap(args) => traffic::tap(&args),
            Role::Graph(args) => traffic::graph(&args),
            Role::Doctor(args) => doctor::run(&args),
            Role::X { verb: X::Describe(args) } => explain::describe(&args),
            Role::X { verb: X::Authz { verb: Authz::Check(args) } } => inspect::authz(&args),
            Role::Version(args) => inspect::version(&args),
            Role::Agent(args) => agent::run(args),
            Role::Join(args) => agent::join(*args),
            Role::Workload { verb: Workload::Configure(args) } => machine::configure_workload(&args),
            Role::Dns(args) => agent::dns(args),
            Role::Proxy(args) => Ok(proxy::run(args)),
            Role::Iptables(args) => {
                Ok(capture::main(std::iter::once("istio-iptables".into()).chain(args.arguments)).into())
            }
            Role::CleanIptables(args) => {
                Ok(capture::clean(std::iter::once("istio-clean-iptables".into()).chain(args.arguments)).into())
            }
            Role::Capture(args) => Ok(capture::inspect(&args, |mesh, pod| {
                machine::pod_process(mesh, pod).map_err(|error| format!("{error:#}"))
            })),
            Role::Sample(args) => sample::run(args).map(|()| ExitCode::SUCCESS),
            Role::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "outrigger", &mut script);
                print!("{}", String::from_utf8_lossy(&script));
                Ok(ExitCode::SUCCESS)
            }
            Role::ContainerInit => Ok(machine::container_init()),
        };
        match done {
            Ok(code) => code,
            Err(error) => {
                if let Some(status) = crate::output::status_of(&error) {
                    std::process::exit(status);
                }
                eprintln!("Error: {error:#}");
                ExitCode::FAILURE
            }
        }
    }
}
