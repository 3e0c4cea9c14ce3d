//! The command line: pilot-agent's, with the flags of older releases.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

/// `outrigger agent …`, or `pilot-agent …` by that name.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "agent",
    about = "Runs beside a workload: identity, proxy, probes, metrics, DNS, drain",
    disable_version_flag = true
)]
pub struct Args {
    #[command(flatten)]
    pub log: LogFlags,
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Runs the agent and the proxy
    Proxy(Box<ProxyFlags>),
    /// Waits until the proxy is ready
    Wait(WaitFlags),
    /// Makes an HTTP request to the proxy's admin port or the agent
    Request(RequestFlags),
    /// Prints the version
    Version(VersionFlags),
    /// Sets up traffic capture in this network namespace
    #[command(name = "istio-iptables", disable_help_flag = true)]
    IstioIptables(Passed),
    /// Removes traffic capture from this network namespace
    #[command(name = "istio-clean-iptables", disable_help_flag = true)]
    IstioCleanIptables(Passed),
}

/// A command line that another crate reads.
#[derive(Clone, Debug, clap::Args)]
pub struct Passed {
    /// Flags as of the command of the same name
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// Istio's logging flags, common to all its programs.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LogFlags {
    /// Levels, such as default:info,ads:debug
    #[arg(long = "log_output_level", global = true, default_value = "default:info", value_name = "LEVELS")]
    pub levels: String,
    /// Logs JSON, one object a line
    #[arg(long = "log_as_json", global = true)]
    pub json: bool,
    #[arg(long = "log_target", global = true, hide = true)]
    target: Vec<String>,
    #[arg(long = "log_caller", global = true, hide = true)]
    caller: Option<String>,
    #[arg(long = "log_stacktrace_level", global = true, hide = true)]
    stacktrace_level: Option<String>,
    #[arg(long = "log_rotate", global = true, hide = true)]
    rotate: Option<String>,
    #[arg(long = "vklog", global = true, hide = true)]
    vklog: Option<String>,
}

/// The kinds of proxy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum Role {
    /// Beside a workload.
    #[default]
    Sidecar,
    /// A gateway.
    Router,
}

/// Which proxy does the work.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum DataPlane {
    /// Our own, in this process.
    #[default]
    Outrigger,
    /// A real Envoy as a child process.
    Envoy,
}

/// `proxy sidecar …`
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ProxyFlags {
    /// What the proxy is
    #[arg(value_enum, default_value = "sidecar")]
    pub role: Role,
    /// The proxy to run
    #[arg(long, value_enum, default_value = "outrigger", env = "OUTRIGGER_DATA_PLANE")]
    pub proxy: DataPlane,
    /// DNS domain suffix; NAMESPACE.svc.cluster.local if not given
    #[arg(long)]
    pub domain: Option<String>,
    /// Mesh configuration, overridden by PROXY_CONFIG and the annotation proxy.istio.io/config
    #[arg(long = "meshConfig", default_value = "./etc/istio/config/mesh")]
    pub mesh_config: PathBuf,
    /// Worker threads
    #[arg(long)]
    pub concurrency: Option<i32>,
    /// Service cluster, if the pod has no app label
    #[arg(long = "serviceCluster")]
    pub service_cluster: Option<String>,
    /// The proxy's log level
    #[arg(long = "proxyLogLevel", default_value = "warning")]
    pub proxy_log_level: String,
    /// The proxy's log levels by component
    #[arg(long = "proxyComponentLogLevel", default_value = "")]
    pub proxy_component_log_level: String,
    /// Envoy: a bootstrap to use instead of the generated one
    #[arg(long = "templateFile")]
    pub template_file: Option<PathBuf>,
    /// Envoy: where outlier events are logged
    #[arg(long = "outlierLogPath")]
    pub outlier_log_path: Option<String>,
    #[command(flatten)]
    pub older: OlderFlags,
    /// Envoy: log JSON, as the agent with --log_as_json
    #[arg(skip)]
    pub log_json: bool,
    /// Flags that nobody knows; see [`without_unknown_flags`]
    #[arg(long = UNKNOWN_FLAG, hide = true)]
    pub unknown: Vec<String>,
}

const UNKNOWN_FLAG: &str = "outrigger-unknown-flag";

/// Turns flags that `proxy` does not know into ones that only say so: pilot-agent takes all flags, so that templates of any release
/// work (cobra's `UnknownFlags`). `words` starts with the program's name; other commands are left as they are.
pub fn without_unknown_flags(words: Vec<OsString>) -> Vec<OsString> {
    let root = <Args as clap::CommandFactory>::command();
    let Some(proxy) = words.iter().position(|word| word == "proxy") else { return words };
    let Some(command) = root.find_subcommand("proxy") else { return words };
    let known: Vec<(String, bool)> = command
        .get_arguments()
        .chain(root.get_arguments())
        .filter_map(|arg| {
            let value = arg.get_num_args().is_none_or(|range| range.takes_values()) && arg.get_action().takes_values();
            // Those whose value may be left out have it behind an equals sign or not at all.
            let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
            Some((arg.get_long()?.to_owned(), value && !optional))
        })
        .chain([("help".to_owned(), false)])
        .collect();
    let mut out: Vec<OsString> = Vec::with_capacity(words.len());
    let mut rest = words.into_iter().peekable();
    let mut at = 0;
    while let Some(word) = rest.next() {
        let is_option = word.to_str().filter(|text| at > proxy && text.len() > 1 && text.starts_with('-'));
        at += 1;
        let Some(text) = is_option else {
            out.push(word);
            continue;
        };
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        if text == "-h" {
            out.push(word);
            continue;
        }
        match known.iter().find(|(known, _)| name.strip_prefix("--") == Some(known)) {
            Some((_, takes_value)) => {
                let follows = *takes_value && value.is_none();
                out.push(word);
                if follows {
                    out.extend(rest.next());
                    at += 1;
                }
            }
            None => {
                out.push(format!("--{UNKNOWN_FLAG}={name}").into());
                // As cobra: the next word is its value, unless it is a flag.
                if value.is_none()
                    && rest.peek().and_then(|next| next.to_str()).is_some_and(|next| !next.starts_with('-'))
                {
                    rest.next();
                    at += 1;
                }
            }
        }
    }
    out
}

impl ProxyFlags {
    /// All flags that were given and have no effect.
    pub fn ignored(&self) -> Vec<String> {
        let older = self.older.ignored().into_iter().map(|name| format!("{name} (of an older release)"));
        older.chain(self.unknown.iter().map(|name| format!("{name} (not known)"))).collect()
    }
}

/// Flags of older releases, which guides still show. Each overrides the same setting of the proxy configuration or is
/// named as ignored.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Flags of older releases")]
pub struct OlderFlags {
    /// Where Envoy's bootstrap is written
    #[arg(long = "configPath")]
    pub config_path: Option<String>,
    /// The Envoy program
    #[arg(long = "binaryPath")]
    pub binary_path: Option<String>,
    /// How long listeners drain on change
    #[arg(long = "drainDuration")]
    pub drain_duration: Option<String>,
    /// The control plane
    #[arg(long = "discoveryAddress")]
    pub discovery_address: Option<String>,
    /// The Zipkin collector
    #[arg(long = "zipkinAddress")]
    pub zipkin_address: Option<String>,
    /// The proxy's admin port
    #[arg(long = "proxyAdminPort")]
    pub proxy_admin_port: Option<i32>,
    /// MUTUAL_TLS or NONE
    #[arg(long = "controlPlaneAuthPolicy")]
    pub control_plane_auth_policy: Option<String>,
    /// The agent's status port
    #[arg(long = "statusPort")]
    pub status_port: Option<i32>,
    /// The trust domain of certificates
    #[arg(long = "trust-domain")]
    pub trust_domain: Option<String>,
    #[arg(long = "parentShutdownDuration", hide = true)]
    parent_shutdown_duration: Option<String>,
    #[arg(long = "connectTimeout", hide = true)]
    connect_timeout: Option<String>,
    #[arg(long = "dnsRefreshRate", hide = true)]
    dns_refresh_rate: Option<String>,
    #[arg(long = "applicationPorts", hide = true)]
    application_ports: Vec<String>,
    #[arg(long = "discoveryRefreshDelay", hide = true)]
    discovery_refresh_delay: Option<String>,
    #[arg(long = "statsdUdpAddress", hide = true)]
    statsd_udp_address: Option<String>,
    #[arg(long = "envoyMetricsServiceAddress", hide = true)]
    envoy_metrics_service_address: Option<String>,
    #[arg(long = "availabilityZone", hide = true)]
    availability_zone: Option<String>,
    #[arg(long = "customConfigFile", hide = true)]
    custom_config_file: Option<String>,
    #[arg(long = "statNameLength", hide = true)]
    stat_name_length: Option<String>,
    #[arg(long = "controlPlaneBootstrap", hide = true, num_args = 0..=1, default_missing_value = "true")]
    control_plane_bootstrap: Option<String>,
    #[arg(long = "disableInternalTelemetry", hide = true, num_args = 0..=1, default_missing_value = "true")]
    disable_internal_telemetry: Option<String>,
    #[arg(long = "lightstepAddress", hide = true)]
    lightstep_address: Option<String>,
    #[arg(long = "mixerIdentity", hide = true)]
    mixer_identity: Option<String>,
    #[arg(long = "pilotIdentity", hide = true)]
    pilot_identity: Option<String>,
    #[arg(long = "stsPort", hide = true)]
    sts_port: Option<String>,
    #[arg(long = "tokenManagerPlugin", hide = true)]
    token_manager_plugin: Option<String>,
    #[arg(long = "profiling", hide = true, num_args = 0..=1, default_missing_value = "true")]
    profiling: Option<String>,
    #[arg(long = "id", hide = true)]
    id: Option<String>,
    #[arg(long = "ip", hide = true)]
    ip: Option<String>,
    #[arg(long = "serviceregistry", hide = true)]
    service_registry: Option<String>,
}

impl OlderFlags {
    /// The flags that were given and have no effect.
    pub fn ignored(&self) -> Vec<&'static str> {
        let given = [
            ("--parentShutdownDuration", self.parent_shutdown_duration.is_some()),
            ("--connectTimeout", self.connect_timeout.is_some()),
            ("--dnsRefreshRate", self.dns_refresh_rate.is_some()),
            ("--applicationPorts", !self.application_ports.is_empty()),
            ("--discoveryRefreshDelay", self.discovery_refresh_delay.is_some()),
            ("--statsdUdpAddress", self.statsd_udp_address.is_some()),
            ("--envoyMetricsServiceAddress", self.envoy_metrics_service_address.is_some()),
            ("--availabilityZone", self.availability_zone.is_some()),
            ("--customConfigFile", self.custom_config_file.is_some()),
            ("--statNameLength", self.stat_name_length.is_some()),
            ("--controlPlaneBootstrap", self.control_plane_bootstrap.is_some()),
            ("--disableInternalTelemetry", self.disable_internal_telemetry.is_some()),
            ("--lightstepAddress", self.lightstep_address.is_some()),
            ("--mixerIdentity", self.mixer_identity.is_some()),
            ("--pilotIdentity", self.pilot_identity.is_some()),
            ("--stsPort", self.sts_port.is_some()),
            ("--tokenManagerPlugin", self.token_manager_plugin.is_some()),
            ("--profiling", self.profiling.is_some()),
            ("--id", self.id.is_some()),
            ("--ip", self.ip.is_some()),
            ("--serviceregistry", self.service_registry.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }
}

impl Passed {
    /// The whole command line of that program.
    pub fn command_line(self, program: &str) -> impl Iterator<Item = OsString> {
        std::iter::once(OsString::from(program)).chain(self.arguments)
    }
}

/// `wait …`
#[derive(Clone, Debug, clap::Args)]
pub struct WaitFlags {
    /// How long to wait, in seconds
    #[arg(long = "timeoutSeconds", default_value_t = 60)]
    pub timeout_seconds: u64,
    /// How long one attempt may take, in milliseconds
    #[arg(long = "requestTimeoutMillis", default_value_t = 500)]
    pub request_timeout_millis: u64,
    /// The pause between attempts, in milliseconds
    #[arg(long = "periodMillis", default_value_t = 500)]
    pub period_millis: u64,
    /// What to ask
    #[arg(long, default_value = "http://localhost:15021/healthz/ready")]
    pub url: String,
}

/// `request GET stats`
#[derive(Clone, Debug, clap::Args)]
pub struct RequestFlags {
    /// 15000 (admin), 15004, 15020 (agent) or 15021
    #[arg(long = "debug-port", default_value_t = 15000)]
    pub debug_port: u16,
    /// The method
    pub method: String,
    /// The path, with or without a slash before it
    pub path: String,
    /// The body
    pub body: Option<String>,
}

/// `version …`
#[derive(Clone, Debug, clap::Args)]
pub struct VersionFlags {
    /// Only the version number
    #[arg(long, short)]
    pub short: bool,
    /// `json` or `yaml`
    #[arg(long, short)]
    pub output: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_of_an_injected_pod_is_read() {
        Args::command().debug_assert();
        let args = Args::try_parse_from([
            "pilot-agent",
            "proxy",
            "sidecar",
            "--domain",
            "default.svc.cluster.local",
            "--proxyLogLevel=warning",
            "--proxyComponentLogLevel=misc:error",
            "--log_output_level=default:info",
        ]);
        let args = args.unwrap();
        let Command::Proxy(proxy) = args.command else { panic!("not proxy") };
        assert_eq!((proxy.role, proxy.domain.as_deref()), (Role::Sidecar, Some("default.svc.cluster.local")));
        assert!(proxy.older.ignored().is_empty());
    }

    #[test]
    fn the_command_of_an_old_guide_is_read_and_what_is_ignored_named() {
        let line = "pilot-agent proxy sidecar --domain d --configPath /etc/istio/proxy --binaryPath /usr/local/bin/envoy \
            --serviceCluster sleep.default --drainDuration 45s --parentShutdownDuration 1m0s --discoveryAddress istio-pilot:15010 \
            --zipkinAddress zipkin:9411 --connectTimeout 10s --proxyAdminPort 15000 --controlPlaneAuthPolicy NONE \
            --dnsRefreshRate 300s --statusPort 15020 --applicationPorts 80,443 --trust-domain=cluster.local --concurrency 2";
        let args = Args::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Proxy(proxy) = args.command else { panic!("not proxy") };
        assert_eq!(proxy.older.discovery_address.as_deref(), Some("istio-pilot:15010"));
        assert_eq!(
            proxy.older.ignored(),
            ["--parentShutdownDuration", "--connectTimeout", "--dnsRefreshRate", "--applicationPorts"]
        );
        assert_eq!(proxy.concurrency, Some(2));
    }

    #[test]
    fn flags_that_nobody_knows_are_taken_and_named() {
        let read = |line: &str| {
            let words = without_unknown_flags(line.split_whitespace().map(OsString::from).collect());
            let Command::Proxy(proxy) = Args::try_parse_from(words).unwrap().command else { panic!("not proxy") };
            proxy
        };
        let proxy = read(
            "pilot-agent proxy sidecar --domain d --newFlag value --other=x --bare --log_output_level default:info \
             --controlPlaneBootstrap=false --concurrency 3 -z",
        );
        assert_eq!(proxy.unknown, ["--newFlag", "--other", "--bare", "-z"]);
        assert_eq!((proxy.domain.as_deref(), proxy.concurrency), (Some("d"), Some(3)));
        assert_eq!(proxy.ignored()[0], "--controlPlaneBootstrap (of an older release)");
        assert_eq!(read("pilot-agent proxy --unknown sidecar").role, Role::Sidecar);
        let other = ["pilot-agent", "wait", "--odd"].map(OsString::from).to_vec();
        assert_eq!(without_unknown_flags(other.clone()), other);
    }

    #[test]
    fn capture_flags_pass_untouched() {
        let line = "pilot-agent istio-iptables -p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x  -b * -d 15090,15021,15020 --log_output_level=default:info";
        let args = Args::try_parse_from(line.split(' ')).unwrap();
        let Command::IstioIptables(passed) = args.command else { panic!("not istio-iptables") };
        assert_eq!(passed.arguments.join(std::ffi::OsStr::new(" ")), line.split_once("iptables ").unwrap().1);
    }

    #[test]
    fn request_as_the_injected_pre_stop_hook_calls_it() {
        let args = Args::try_parse_from(["pilot-agent", "request", "--debug-port=15020", "POST", "drain"]).unwrap();
        let Command::Request(request) = args.command else { panic!("not request") };
        assert_eq!((request.debug_port, request.path.as_str()), (15020, "drain"));
    }
}
