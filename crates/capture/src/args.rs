//! Flags and environment of istio-iptables: what was written, then what it means.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{self, Config, Dns, Invalid, Mode};

/// Flags of `istio-iptables`. Each long flag but `--envoy-port` can also come from the environment, by its name in capitals with `_`.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(args_override_self = true, about = "Redirects a pod's traffic to its sidecar proxy")]
pub struct Args {
    /// Port of the proxy's outbound listener [default: 15001]
    #[arg(short = 'p', long)]
    envoy_port: Option<String>,
    /// Port of the proxy's inbound listener [default: 15006]
    #[arg(short = 'z', long)]
    inbound_capture_port: Option<String>,
    /// Port for inbound tunnels (HBONE), never captured [default: 15008]
    #[arg(short = 'e', long)]
    inbound_tunnel_port: Option<String>,
    /// Users whose traffic is not captured, comma separated [default: the user of $ENVOY_USER, else 1337]
    #[arg(short = 'u', long)]
    proxy_uid: Option<String>,
    /// Groups whose traffic is not captured, comma separated [default: the value of --proxy-uid]
    #[arg(short = 'g', long)]
    proxy_gid: Option<String>,
    /// How inbound connections reach the proxy: REDIRECT or TPROXY
    #[arg(short = 'm', long)]
    istio_inbound_interception_mode: Option<String>,
    /// Inbound ports to capture, comma separated, or * for all
    #[arg(short = 'b', long)]
    istio_inbound_ports: Option<String>,
    /// Inbound ports not to capture, comma separated; only with -b *
    #[arg(short = 'd', long)]
    istio_local_exclude_ports: Option<String>,
    /// Outbound address blocks to capture, comma separated, or * for all
    #[arg(short = 'i', long)]
    istio_service_cidr: Option<String>,
    /// Outbound address blocks not to capture, comma separated
    #[arg(short = 'x', long)]
    istio_service_exclude_cidr: Option<String>,
    /// Outbound ports to capture whatever the address, comma separated
    #[arg(short = 'q', long)]
    istio_outbound_ports: Option<String>,
    /// Outbound ports not to capture, comma separated
    #[arg(short = 'o', long)]
    istio_local_outbound_ports_exclude: Option<String>,
    /// Interfaces of virtual machines, whose inbound traffic counts as outbound, comma separated
    #[arg(short = 'k', long)]
    kube_virt_interfaces: Option<String>,
    /// Interfaces whose traffic is not captured, comma separated
    #[arg(short = 'c', long)]
    istio_exclude_interfaces: Option<String>,
    /// Packet mark for TPROXY [default: 1337]
    #[arg(short = 't', long)]
    istio_inbound_tproxy_mark: Option<String>,
    /// Routing table for TPROXY [default: 133]
    #[arg(short = 'r', long)]
    istio_inbound_tproxy_route_table: Option<String>,
    /// Port that the validation connects to [default: 15002]
    #[arg(long)]
    iptables_probe_port: Option<String>,
    /// How long the validation tries [default: 5s]
    #[arg(long)]
    probe_timeout: Option<String>,
    /// Network namespace of the pod; accepted for compatibility, used only in messages
    #[arg(long)]
    network_namespace: Option<String>,
    /// iptables back end: nft or legacy [default: the one in use]
    #[arg(long)]
    force_iptables_binary: Option<String>,

    /// Print what would be done, and do nothing
    #[arg(short = 'n', long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    dry_run: Option<bool>,
    /// Change no rules
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    skip_rule_apply: Option<bool>,
    /// Check that captured traffic reaches the proxy's ports
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    run_validation: Option<bool>,
    /// Accepted for compatibility: rules are always brought to what the flags say
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    force_apply: Option<bool>,
    /// Remove all rules of this program, whatever flags made them
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    cleanup_only: Option<bool>,
    /// Accepted for compatibility: drift is always repaired
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    reconcile: Option<bool>,
    /// Program nftables directly; needs no iptables and no nft
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    native_nftables: Option<bool>,
    /// Accepted for compatibility
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    cni_mode: Option<bool>,
    /// Send DNS queries to the agent
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    redirect_dns: Option<bool>,
    /// With --redirect-dns: queries to any server, not only to those of /etc/resolv.conf
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    capture_all_dns: Option<bool>,
    /// Drop packets that belong to no connection
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    drop_invalid: Option<bool>,
    /// Capture IPv6 beside IPv4
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    dual_stack: Option<bool>,

    #[command(flatten)]
    log: LogArgs,

    /// Set by `istio-clean-iptables`.
    #[arg(skip)]
    thorough: bool,
}

/// Log flags of Istio's programs, accepted so that injected pods start; messages of this program go to stderr in any case.
#[derive(Clone, Debug, Default, clap::Args)]
struct LogArgs {
    #[arg(long = "log_output_level", hide = true)]
    output_level: Option<String>,
    #[arg(long = "log_stacktrace_level", hide = true)]
    stacktrace_level: Option<String>,
    #[arg(long = "log_target", hide = true)]
    target: Option<String>,
    #[arg(long = "log_caller", hide = true)]
    caller: Option<String>,
    #[arg(long = "log_as_json", hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    as_json: Option<bool>,
}

/// Flags of `istio-clean-iptables`: those of `istio-iptables`, of which only a few matter for removal.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(about = "Removes every rule, route and address that istio-iptables made")]
pub struct CleanArgs {
    #[command(flatten)]
    pub(crate) args: Args,
}

/// What to do with the rules.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    Apply,
    CleanUp,
    /// `istio-clean-iptables`: also the passthrough address, which `--cleanup-only` leaves as the reference does.
    CleanUpAll,
    /// `--skip-rule-apply`
    Nothing,
}

/// Which way the rules go into the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Choice {
    /// iptables where there is one, since that is what others look for; else netlink.
    Auto,
    /// nftables over netlink.
    Native,
    /// `nft` or `legacy`
    Forced(&'static str),
}

/// The flags with their meaning, before this namespace is looked at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    /// Without IPv6 and name servers, which depend on the namespace.
    pub(crate) config: Config,
    pub(crate) dual_stack: bool,
    pub(crate) redirect_dns: bool,
    pub(crate) capture_all_dns: bool,
    pub(crate) action: Action,
    pub(crate) choice: Choice,
    pub(crate) dry_run: bool,
    pub(crate) validate: bool,
    pub(crate) probe_port: u16,
    pub(crate) probe_timeout: Duration,
}

/// What resolution needs from outside, so that tests can give their own.
pub(crate) struct Surroundings<'a> {
    pub(crate) env: &'a dyn Fn(&str) -> Option<String>,
    /// Contents of `/etc/passwd` and `/etc/group`.
    pub(crate) users: &'a str,
    pub(crate) groups: &'a str,
}

impl Args {
    pub(crate) fn clean_up(mut self) -> Self {
        self.cleanup_only = Some(true);
        self.skip_rule_apply = Some(false);
        self.thorough = true;
        self
    }

    /// Flag before environment before default.
    pub(crate) fn resolve(&self, around: &Surroundings<'_>) -> Result<Settings, Invalid> {
        let from = Sources { env: around.env };
        let port = |flag: &'static str, given: &Option<String>, default: u16| match from.text(flag, given) {
            text if text.is_empty() => Ok(default),
            text => config::port(flag, &text),
        };
        let number = |flag: &'static str, given: &Option<String>, default: u32| match from.text(flag, given) {
            text if text.is_empty() => Ok(default),
            text => parse_number(&text).ok_or_else(|| Invalid::new(flag, text, "not a number")),
        };
        // The only flag without a variable: in the reference ENVOY_PORT is something else's.
        let proxy_port = match self.envoy_port.as_deref().unwrap_or_default() {
            "" => 15001,
            text => config::port("--envoy-port", text)?,
        };
        let uid = match from.text("--proxy-uid", &self.proxy_uid) {
            text if !text.is_empty() => text,
            _ => {
                let user = (around.env)("ENVOY_USER").filter(|u| !u.is_empty()).unwrap_or_else(|| "istio-proxy".into());
                config::owner(&user, around.users).id.unwrap_or(1337).to_string()
            }
        };
        let gid = match from.text("--proxy-gid", &self.proxy_gid) {
            text if !text.is_empty() => text,
            _ => uid.clone(),
        };
        let exclude_cidrs = "--istio-service-exclude-cidr";
        let outbound_exclude_cidrs =
            match config::cidrs(exclude_cidrs, &from.text(exclude_cidrs, &self.istio_service_exclude_cidr))? {
                config::Selection::Only(list) => list,
                config::Selection::All => {
                    return Err(Invalid::new(
                        exclude_cidrs,
                        "*",
                        "excluding everything is not possible; leave -i empty instead",
                    ));
                }
            };
        let mode = match from.text("--istio-inbound-interception-mode", &self.istio_inbound_interception_mode).as_str()
        {
            "TPROXY" => Mode::Tproxy,
            _ => Mode::Redirect,
        };
        let ports = |flag: &'static str, given: &Option<String>| config::ports(flag, &from.text(flag, given));
        let interfaces = |flag: &'static str, given: &Option<String>| config::interfaces(flag, &from.text(flag, given));
        let variable = |name: &str, default: &str| {
            (around.env)(name).filter(|v| !v.is_empty()).unwrap_or_else(|| default.to_owned())
        };
        let config = Config {
            proxy_port,
            inbound_port: port("--inbound-capture-port", &self.inbound_capture_port, 15006)?,
            tunnel_port: port("--inbound-tunnel-port", &self.inbound_tunnel_port, 15008)?,
            proxy_uids: config::owners(&uid, around.users),
            proxy_gids: config::owners(&gid, around.groups),
            mode,
            inbound_ports: config::port_selection(
                "--istio-inbound-ports",
                &from.text("--istio-inbound-ports", &self.istio_inbound_ports),
            )?,
            inbound_exclude: ports("--istio-local-exclude-ports", &self.istio_local_exclude_ports)?,
            outbound_cidrs: config::cidrs(
                "--istio-service-cidr",
                &from.text("--istio-service-cidr", &self.istio_service_cidr),
            )?,
            outbound_exclude_cidrs,
            outbound_ports: ports("--istio-outbound-ports", &self.istio_outbound_ports)?,
            outbound_exclude_ports: ports(
                "--istio-local-outbound-ports-exclude",
                &self.istio_local_outbound_ports_exclude,
            )?,
            virt_interfaces: interfaces("--kube-virt-interfaces", &self.kube_virt_interfaces)?,
            exclude_interfaces: interfaces("--istio-exclude-interfaces", &self.istio_exclude_interfaces)?,
            groups: config::groups(
                &variable("ISTIO_OUTBOUND_OWNER_GROUPS", "*"),
                &variable("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", ""),
                around.groups,
            )?,
            tproxy_mark: number("--istio-inbound-tproxy-mark", &self.istio_inbound_tproxy_mark, 1337)?,
            tproxy_table: number("--istio-inbound-tproxy-route-table", &self.istio_inbound_tproxy_route_table, 133)?,
            drop_invalid: from.switch("--drop-invalid", self.drop_invalid, Some("INVALID_DROP"))?,
            loopback_v4: config::loopback(
                "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
                &variable("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1/32"),
            )?,
            dns: Dns::Off,
            ..Config::default()
        };
        let force = from.text("--force-iptables-binary", &self.force_iptables_binary);
        let native = from.switch("--native-nftables", self.native_nftables, None)?;
        let choice = match (force.as_str(), native, (around.env)("OUTRIGGER_CAPTURE").unwrap_or_default().as_str()) {
            (_, true, _) | ("", false, "native") => Choice::Native,
            ("", false, _) => Choice::Auto,
            ("nft", ..) => Choice::Forced("nft"),
            ("legacy", ..) => Choice::Forced("legacy"),
            _ => return Err(Invalid::new("--force-iptables-binary", force, "the back ends are nft and legacy")),
        };
        let clean = from.switch("--cleanup-only", self.cleanup_only, None)?;
        let skip = from.switch("--skip-rule-apply", self.skip_rule_apply, None)?;
        let timeout = from.text("--probe-timeout", &self.probe_timeout);
        let timeout = if timeout.is_empty() { "5s".to_owned() } else { timeout };
        // Read only to refuse what is no switch; see their help.
        from.switch("--force-apply", self.force_apply, None)?;
        from.switch("--reconcile", self.reconcile, None)?;
        from.switch("--cni-mode", self.cni_mode, None)?;
        Ok(Settings {
            config,
            dual_stack: from.switch("--dual-stack", self.dual_stack, Some("ISTIO_DUAL_STACK"))?,
            redirect_dns: from.switch("--redirect-dns", self.redirect_dns, Some("ISTIO_META_DNS_CAPTURE"))?,
            capture_all_dns: from.switch("--capture-all-dns", self.capture_all_dns, None)?,
            action: match (skip, clean) {
                (true, _) => Action::Nothing,
                (false, true) if self.thorough => Action::CleanUpAll,
                (false, true) => Action::CleanUp,
                (false, false) => Action::Apply,
            },
            choice,
            dry_run: from.switch("--dry-run", self.dry_run, None)?,
            validate: from.switch("--run-validation", self.run_validation, None)?,
            probe_port: port("--iptables-probe-port", &self.iptables_probe_port, 15002)?,
            probe_timeout: duration(&timeout)
                .ok_or_else(|| Invalid::new("--probe-timeout", timeout, "not a duration such as 5s"))?,
        })
    }
}

struct Sources<'a> {
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl Sources<'_> {
    /// `--istio-inbound-ports` -> `ISTIO_INBOUND_PORTS`
    fn variable(flag: &str) -> String {
        flag.trim_start_matches('-').to_uppercase().replace('-', "_")
    }

    fn text(&self, flag: &'static str, given: &Option<String>) -> String {
        given.clone().or_else(|| (self.env)(&Self::variable(flag))).unwrap_or_default()
    }

    fn switch(&self, flag: &'static str, given: Option<bool>, other: Option<&'static str>) -> Result<bool, Invalid> {
        if let Some(given) = given {
            return Ok(given);
        }
        for name in [Some(Self::variable(flag)), other.map(str::to_owned)].into_iter().flatten() {
            match (self.env)(&name).as_deref() {
                None | Some("") => {}
                // As Go's strconv.ParseBool.
                Some("1" | "t" | "T" | "true" | "TRUE" | "True") => return Ok(true),
                Some("0" | "f" | "F" | "false" | "FALSE" | "False") => return Ok(false),
                Some(bad) => return Err(Invalid::new(flag, bad, format!("{name} is neither true nor false"))),
            }
        }
        Ok(false)
    }
}

/// Decimal or hexadecimal, as iptables takes marks.
fn parse_number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// As Go's time.ParseDuration, without signs: `5s`, `1m30s`, `1.5s`, `500ms`, `0`.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let units: BTreeMap<&str, f64> =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)].into();
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = rest[number..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(rest.len(), |end| number + end);
        total += rest[..number].parse::<f64>().ok()? * units.get(&rest[number..unit])?;
        rest = &rest[unit..];
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(total).ok()).flatten()
}

#[cfg(test)]
mod tests;
