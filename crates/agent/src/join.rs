//! `outrigger join`: a machine without Kubernetes becomes a workload of the mesh, and stops being one when this ends.
//!
//! ```text
//!  files, flags ─► variables of an agent ─► capture rules ─► agent (a child process, as the proxy's user) ─► rules undone
//! ```
//!
//! It takes the place of `istio-start.sh` in Istio's packages for virtual machines: the files are those that
//! `istioctl experimental workload entry configure` writes, the variables those that the script knows. The agent registers the
//! machine with its WorkloadGroup and tells its health.

mod files;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::ValueEnum;
use lifecycle::signal::Signals;
use tracing::{info, warn};

use files::Folder;

/// What joining machines are never captured on: logins, metrics and health. As istioctl writes.
const EXCLUDED: &str = "22,15090,15021,15020";
/// istiod's, where nothing else is said.
const CONTROL_PLANE: &str = "istiod.istio-system.svc:15012";

/// What cluster.env says to capture and to Istio's script, and nothing to the agent.
const NOT_FOR_THE_AGENT: [&str; 9] = [
    "ISTIO_CUSTOM_IP_TABLES",
    "ISTIO_INBOUND_INTERCEPTION_MODE",
    "ISTIO_INBOUND_PORTS",
    "ISTIO_LOCAL_EXCLUDE_PORTS",
    "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",
    "ISTIO_NAMESPACE",
    "ISTIO_SERVICE",
    "ISTIO_SERVICE_CIDR",
    "ISTIO_SERVICE_EXCLUDE_CIDR",
];

/// How traffic gets to the proxy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Capture {
    /// By rules; whether in nftables or iptables is found out.
    #[default]
    Rules,
    /// By rules in nftables, without any program.
    Nftables,
    /// Not at all: applications call the proxy's ports themselves (`captureMode: NONE`).
    None,
}

/// `outrigger join`
#[derive(Clone, Debug, clap::Args)]
pub struct JoinArgs {
    /// Folder with cluster.env, istio-token, mesh.yaml, root-cert.pem and hosts, as `outrigger workload configure` and
    /// `istioctl experimental workload entry configure` write them. Flags win over what they say
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
    /// A service account's token for the audience istio-ca; may be missing once the machine has a certificate
    #[arg(long, value_name = "FILE")]
    token: Option<PathBuf>,
    /// The mesh's root certificate
    #[arg(long = "root-cert", value_name = "FILE")]
    root_cert: Option<PathBuf>,
    /// The WorkloadGroup to register with
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// The WorkloadGroup's namespace
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The service account whose token this is
    #[arg(long = "service-account", value_name = "NAME")]
    service_account: Option<String>,
    /// Where the control plane is
    #[arg(long = "control-plane", value_name = "HOST:PORT")]
    control_plane: Option<String>,
    /// The name in the control plane's certificate, when it is not the host's
    #[arg(long = "control-plane-name", value_name = "NAME")]
    control_plane_name: Option<String>,
    /// This machine's address for others; the one that leads out if not given
    #[arg(long, value_name = "IP")]
    address: Option<std::net::IpAddr>,
    /// How traffic gets to the proxy
    #[arg(long, value_enum, default_value = "rules")]
    capture: Capture,
    /// User and group that the proxy runs as, whose traffic is never captured
    #[arg(long = "proxy-uid", default_value_t = 1337, value_name = "NUMBER")]
    proxy_uid: u32,
    /// Where certificates are kept, so that the machine can join again when its token has expired
    #[arg(long, default_value = "/var/lib/outrigger/join", value_name = "DIR")]
    state: PathBuf,
    #[command(flatten)]
    log: crate::LogFlags,
}

/// Everything that is decided before anything is done.
#[derive(Debug, Eq, PartialEq)]
struct Plan {
    /// Over the environment of this process.
    variables: BTreeMap<String, String>,
    /// Flags of `agent proxy sidecar`.
    flags: Vec<String>,
    /// Flags of `istio-iptables`; `None`: nothing is captured.
    capture: Option<Vec<String>>,
    /// User and group of the agent; `None`: those of this process.
    user: Option<(u32, u32)>,
}

/// Runs until the machine is to leave, or the agent ends by itself.
pub fn join(args: JoinArgs) -> anyhow::Result<ExitCode> {
    lifecycle::logging::init(&lifecycle::logging::Options { json: args.log.json, levels: args.log.levels.clone() })?;
    let folder = match &args.folder {
        Some(folder) => Folder::read(folder)?,
        None => Folder::default(),
    };
    let root = rustix::process::geteuid().is_root();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let plan = plan(&args, &folder, root, &host)?;
    keep(&args, &folder, plan.user)?;
    let own = std::env::current_exe().context("this program cannot be found")?;
    crate::on_one_thread(run(&plan, &own))
}

fn plan(args: &JoinArgs, folder: &Folder, root: bool, host: &str) -> anyhow::Result<Plan> {
    let mut variables = folder.variables.clone();
    let mut set = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            variables.insert(name.to_owned(), value);
        }
    };
    set("POD_NAMESPACE", args.namespace.clone());
    set("ISTIO_META_AUTO_REGISTER_GROUP", args.group.clone());
    set("ISTIO_META_WORKLOAD_NAME", args.group.clone().filter(|_| folder.is_empty()));
    set("SERVICE_ACCOUNT", args.service_account.clone());
    set("ISTIO_SVC_IP", args.address.map(|ip| ip.to_string()));
    let get = |name: &str| variables.get(name).filter(|value| !value.is_empty()).cloned();

    let namespace = get("POD_NAMESPACE").or_else(|| get("ISTIO_NAMESPACE")).unwrap_or_else(|| "default".to_owned());
    let told = args.control_plane.clone().or_else(|| get("PILOT_ADDRESS")).or_else(|| folder.discovery_address());
    let address = told.or_else(|| get("CA_ADDR")).unwrap_or_else(|| CONTROL_PLANE.to_owned());
    let Some((name, port)) =
        address.rsplit_once(':').filter(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok())
    else {
        bail!("the control plane's address {address:?} is not HOST:PORT");
    };
    // DIFFERS: Istio has the line of `hosts` put into /etc/hosts by hand; here it holds for the agent only.
    let resolved = folder.hosts.get(name);
    let dialled = resolved.map_or_else(
        || address.clone(),
        |ip| std::net::SocketAddr::new(*ip, port.parse().unwrap_or_default()).to_string(),
    );
    let san = args.control_plane_name.clone().or_else(|| resolved.map(|_| name.to_owned()));

    // With a port of plain text nothing is proved, and nobody can be registered.
    if port == "15010" {
        bail!("the control plane's port 15010 is plain text: a machine must prove who it is, on port 15012");
    }
    let intercepted = match args.capture {
        Capture::None => "NONE".to_owned(),
        _ => get("ISTIO_INBOUND_INTERCEPTION_MODE").unwrap_or_else(|| "REDIRECT".to_owned()),
    };
    let captured = args.capture != Capture::None && get("ISTIO_CUSTOM_IP_TABLES").as_deref() != Some("true");
    if captured && !root {
        bail!(
            "capturing traffic needs root; --capture none joins without, for applications that call the proxy themselves"
        );
    }
    let tproxy = intercepted == "TPROXY";
    let capture = captured.then(|| {
        let mut flags = vec!["-u".to_owned(), args.proxy_uid.to_string(), "-g".to_owned(), args.proxy_uid.to_string()];
        let mut default = |variable: &str, flag: &str, value: &str| {
            if get(variable).is_none() {
                flags.extend([flag.to_owned(), value.to_owned()]);
            }
        };
        default("ISTIO_SERVICE_CIDR", "-i", "*");
        default("ISTIO_INBOUND_PORTS", "-b", "*");
        default("ISTIO_LOCAL_EXCLUDE_PORTS", "-d", EXCLUDED);
        if args.capture == Capture::Nftables {
            flags.push("--native-nftables".to_owned());
        }
        flags
    });

    let certificates = args.state.join("certs").display().to_string();
    let root_cert = args.state.join("root-cert.pem").display().to_string();
    let mut flags = vec!["--domain".to_owned(), format!("{namespace}.svc.cluster.local")];
    flags.extend(["--discoveryAddress".to_owned(), dialled.clone()]);
    if folder.mesh.is_some() {
        flags.extend(["--meshConfig".to_owned(), args.state.join("mesh.yaml").display().to_string()]);
    }
    let host: String = host.split('.').next().unwrap_or_default().to_lowercase();
    let given = [
        ("POD_NAMESPACE", Some(namespace)),
        ("POD_NAME", get("POD_NAME").or_else(|| Some(host).filter(|host| !host.is_empty()))),
        ("INSTANCE_IP", get("ISTIO_SVC_IP")),
        ("CA_ADDR", Some(dialled)),
        ("ISTIOD_SAN", san.or_else(|| get("ISTIOD_SAN"))),
        ("XDS_ROOT_CA", Some(root_cert.clone())),
        ("CA_ROOT_CA", Some(root_cert)),
        ("OUTRIGGER_TOKEN_FILE", Some(args.state.join("istio-token").display().to_string())),
        // The certificate that is written is what the next one is asked for with.
        ("PROV_CERT", Some(certificates.clone())),
        ("OUTPUT_CERTS", Some(certificates)),
        ("ISTIO_META_INTERCEPTION_MODE", Some(intercepted)),
    ];
    variables.extend(given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    // As Istio's script: a transparent proxy needs root's capabilities, and is told apart by its group.
    let user = root.then_some((if tproxy { 0 } else { args.proxy_uid }, args.proxy_uid));
    Ok(Plan { variables, flags, capture, user })
}

/// Puts what the agent reads where only it can.
fn keep(args: &JoinArgs, folder: &Folder, user: Option<(u32, u32)>) -> anyhow::Result<()> {
    let own = |path: &Path| match user {
        Some((uid, gid)) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
        None => Ok(()),
    };
    let certificates = args.state.join("certs");
    for path in [&args.state, &certificates] {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).and_then(|()| own(path));
        made.with_context(|| format!("{} cannot be made", path.display()))?;
    }
    let read = |path: &Option<PathBuf>| -> anyhow::Result<Option<String>> {
        let Some(path) = path else { return Ok(None) };
        std::fs::read_to_string(path).map(Some).with_context(|| format!("{} cannot be read", path.display()))
    };
    let texts = [
        ("istio-token", read(&args.token)?.or_else(|| folder.token.clone())),
        ("root-cert.pem", read(&args.root_cert)?.or_else(|| folder.root_cert.clone())),
        ("mesh.yaml", folder.mesh.clone()),
    ];
    for (name, text) in texts {
        let path = args.state.join(name);
        let Some(text) = text else {
            // One of an earlier time may serve, but for the token, which is of no use twice.
            match name {
                "istio-token" if !certificates.join("cert-chain.pem").exists() => {
                    bail!(
                        "there is no token, and no certificate of an earlier time in {}: say --token FILE",
                        certificates.display()
                    )
                }
                "root-cert.pem" if !path.exists() => {
                    bail!("there is no root certificate of the mesh: say --root-cert FILE")
                }
                "istio-token" => drop(std::fs::remove_file(&path)),
                _ => {}
            }
            continue;
        };
        let _ = std::fs::remove_file(&path); // so that mode and owner apply
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes())).and_then(|()| own(&path));
        written.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

async fn run(plan: &Plan, own: &Path) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen().context("signals cannot be handled")?;
    if let Some(flags) = &plan.capture {
        // Rules of an earlier run, with whatever flags, are replaced by these in one step.
        let status = Command::new(own).arg("istio-iptables").args(flags).envs(&plan.variables).status();
        if !status.context("capture cannot be set up")?.success() {
            bail!("traffic cannot be captured; see above");
        }
        info!("traffic is captured");
    }
    let ended = supervise(plan, own, &mut signals).await;
    if plan.capture.is_some() {
        let status = Command::new(own).arg("istio-clean-iptables").envs(&plan.variables).status();
        match status {
            Ok(status) if status.success() => info!("traffic is captured no more"),
            other => warn!(?other, "capture rules may be left; `outrigger istio-clean-iptables` removes them"),
        }
    }
    ended
}

/// Runs the agent to its end.
async fn supervise(plan: &Plan, own: &Path, signals: &mut Signals) -> anyhow::Result<ExitCode> {
    let mut command = Command::new(own);
    command.args(["agent", "proxy", "sidecar"]).args(&plan.flags).envs(&plan.variables);
    for name in NOT_FOR_THE_AGENT {
        command.env_remove(name);
    }
    if let Some((uid, gid)) = plan.user {
        command.uid(uid).gid(gid);
    }
    let mut agent = tokio::process::Command::from(command);
    // Were this process gone, nobody would undo the rules, and without a proxy they would cut the machine off; so the agent stays.
    let mut agent = agent.spawn().context("the agent cannot be started")?;
    let pid = agent.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
    loop {
        tokio::select! {
            status = agent.wait() => {
                let status = status.context("the agent is lost")?;
                info!(%status, "the agent has ended");
                return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
            signal = signals.next() => {
                info!(?signal, "leaving the mesh");
                if let Some(pid) = pid {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM); // fails when it has ended
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
