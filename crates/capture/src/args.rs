//! Flags and environment of istio-iptables: what was written, then what it means.

mod flags;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

pub use flags::Usage;

use crate::config::{self, Config, Invalid, Mode};

/// A command line of `istio-iptables` as it was written.
#[derive(Clone, Debug, Default)]
pub struct Args {
    given: flags::Given,
    /// Set by `istio-clean-iptables`.
    thorough: bool,
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
    /// Where eBPF programs capture outbound traffic.
    pub(crate) cgroup: Option<PathBuf>,
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
    /// Reads a command line without the program's name; `None` when help is wanted.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Self>, Usage> {
        Ok(flags::read(arguments)?.map(|given| Self { given, thorough: false }))
    }

    /// The text of `--help`.
    pub fn help() -> String {
        flags::help()
    }

    pub(crate) fn clean_up(mut self) -> Self {
        self.given.insert("cleanup-only", "true".to_owned());
        self.given.insert("skip-rule-apply", "false".to_owned());
        self.thorough = true;
        self
    }

    /// Flag before environment before default.
    pub(crate) fn resolve(&self, around: &Surroundings<'_>) -> Result<Settings, Invalid> {
        let from = Sources { given: &self.given, env: around.env };
        let port = |flag: &'static str, default: u16| match from.text(flag) {
            text if text.is_empty() => Ok(default),
            text => config::port(flag, &text),
        };
        let uid = match from.text("--proxy-uid") {
            text if !text.is_empty() => text,
            _ => {
                let user = (around.env)("ENVOY_USER").unwrap_or_else(|| "istio-proxy".into());
                config::named(&user, around.users).unwrap_or(1337).to_string()
            }
        };
        let gid = match from.text("--proxy-gid") {
            text if !text.is_empty() => text,
            _ => uid.clone(),
        };
        let exclude_cidrs = "--istio-service-exclude-cidr";
        let outbound_exclude_cidrs = match config::cidrs(exclude_cidrs, &from.text(exclude_cidrs))? {
            config::Selection::Only(list) => list,
            config::Selection::All => {
                return Err(Invalid::new(
                    exclude_cidrs,
                    "*",
                    "excluding everything is not possible; leave -i empty instead",
                ));
            }
        };
        let mode = match from.text("--istio-inbound-interception-mode").as_str() {
            "TPROXY" => Mode::Tproxy,
            _ => Mode::Redirect,
        };
        let inbound_ports = config::port_selection("--istio-inbound-ports", &from.text("--istio-inbound-ports"))?;
        // What is not used is not looked at, as in the reference.
        let (marks, routes) = (mode == Mode::Tproxy, mode == Mode::Tproxy && !inbound_ports.is_none());
        let number = |flag: &'static str, default: u32, used: bool| match from.text(flag) {
            text if !used || text.is_empty() => Ok(default),
            text => parse_number(&text)
                // Routes know decimal numbers only.
                .filter(|_| !routes || !text.starts_with("0x"))
                .ok_or_else(|| Invalid::new(flag, text, "not a number")),
        };
        let ports = |flag: &'static str| config::ports(flag, &from.text(flag));
        let interfaces = |flag: &'static str| config::interfaces(flag, &from.text(flag));
        // As in the reference, a variable that is set but empty is not the default.
        let variable = |name: &str, default: &str| (around.env)(name).unwrap_or_else(|| default.to_owned());
        let cgroup = from.text("--ebpf-cgroup");
        let config = Config {
            proxy_port: port("--envoy-port", 15001)?,
            inbound_port: port("--inbound-capture-port", 15006)?,
            tunnel_port: port("--inbound-tunnel-port", 15008)?,
            proxy_uids: config::owners(&uid, around.users),
            proxy_gids: config::owners(&gid, around.groups),
            mode,
            inbound_exclude: match inbound_ports {
                config::Selection::All => ports("--istio-local-exclude-ports")?,
                config::Selection::Only(_) => Vec::new(),
            },
            inbound_ports,
            outbound_cidrs: config::cidrs("--istio-service-cidr", &from.text("--istio-service-cidr"))?,
            outbound_exclude_cidrs,
            outbound_ports: ports("--istio-outbound-ports")?,
            outbound_exclude_ports: ports("--istio-local-outbound-ports-exclude")?,
            virt_interfaces: interfaces("--kube-virt-interfaces")?,
            exclude_interfaces: interfaces("--istio-exclude-interfaces")?,
            groups: config::groups(
                &variable("ISTIO_OUTBOUND_OWNER_GROUPS", "*"),
                &variable("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", ""),
                around.groups,
            )?,
            tproxy_mark: number("--istio-inbound-tproxy-mark", 1337, marks)?,
            tproxy_table: number("--istio-inbound-tproxy-route-table", 133, routes)?,
            drop_invalid: from.switch("--drop-invalid", Some("INVALID_DROP")),
            loopback_v4: config::loopback(
                "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
                &variable("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1/32"),
            )?,
            by_sockets: !cgroup.is_empty(),
            ..Config::default()
        };
        if let (true, Some(name)) = (config.by_sockets, config.exclude_interfaces.first()) {
            let reason = "not possible with --ebpf-cgroup: the interface is not known when a connection is made";
            return Err(Invalid::new("--istio-exclude-interfaces", name, reason));
        }
        let force = from.text("--force-iptables-binary");
        let native = from.switch("--native-nftables", None);
        let choice = match (force.as_str(), native, (around.env)("OUTRIGGER_CAPTURE").unwrap_or_default().as_str()) {
            ("", true, _) | ("nft" | "legacy", true, _) | ("", false, "native") => Choice::Native,
            ("", false, _) => Choice::Auto,
            ("nft", ..) => Choice::Forced("nft"),
            ("legacy", ..) => Choice::Forced("legacy"),
            _ => return Err(Invalid::new("--force-iptables-binary", force, "the back ends are nft and legacy")),
        };
        let skip = from.switch("--skip-rule-apply", None);
        let clean = from.switch("--cleanup-only", None);
        let (probe_port, probe_timeout) = (from.text("--iptables-probe-port"), from.text("--probe-timeout"));
        Ok(Settings {
            config,
            dual_stack: from.switch("--dual-stack", Some("ISTIO_DUAL_STACK")),
            redirect_dns: from.switch("--redirect-dns", Some("ISTIO_META_DNS_CAPTURE")),
            capture_all_dns: from.switch("--capture-all-dns", None),
            action: match (skip, clean) {
                (true, _) => Action::Nothing,
                (false, true) if self.thorough => Action::CleanUpAll,
                (false, true) => Action::CleanUp,
                (false, false) => Action::Apply,
            },
            choice,
            cgroup: config::nonempty(cgroup).map(PathBuf::from),
            dry_run: from.switch("--dry-run", None),
            validate: from.switch("--run-validation", None),
            probe_port: parse_port(&probe_port).unwrap_or(15002),
            probe_timeout: duration(&probe_timeout).unwrap_or(Duration::from_secs(5)),
        })
    }
}

struct Sources<'a> {
    given: &'a flags::Given,
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl Sources<'_> {
    /// `--istio-inbound-ports` -> `ISTIO_INBOUND_PORTS`
    fn variable(flag: &str) -> String {
        flag.trim_start_matches('-').to_uppercase().replace('-', "_")
    }

    fn text(&self, flag: &'static str) -> String {
        if let Some(given) = self.given.get(flag.trim_start_matches('-')) {
            return given.clone();
        }
        // The only flag without a variable: in the reference ENVOY_PORT is something else's.
        let from_env = if flag == "--envoy-port" { None } else { (self.env)(&Self::variable(flag)) };
        from_env.unwrap_or_default()
    }

    /// The second variable counts before the first, as in the reference, which reads it later.
    fn switch(&self, flag: &'static str, second: Option<&str>) -> bool {
        if let Some(given) = self.given.get(flag.trim_start_matches('-')) {
            return parse_bool(given).unwrap_or_default();
        }
        let first = Self::variable(flag);
        for name in [second, Some(first.as_str())].into_iter().flatten() {
            let Some(value) = (self.env)(name).filter(|v| !v.is_empty()) else { continue };
            match parse_bool(&value) {
                Some(value) => return value,
                // DIFFERS: Istio says nothing.
                None => eprintln!("Warning: {name} {value:?} is neither true nor false and does not count"),
            }
        }
        false
    }
}

/// As Go's strconv.ParseBool.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// As Go's strconv.ParseUint with base 0, for 16 bits.
fn parse_port(text: &str) -> Option<u16> {
    let lower = text.to_ascii_lowercase();
    let digits = |prefix: &str| lower.strip_prefix(prefix).filter(|rest| !rest.starts_with('+'));
    if let Some(rest) = digits("0x") {
        u16::from_str_radix(rest, 16).ok()
    } else if let Some(rest) = digits("0b") {
        u16::from_str_radix(rest, 2).ok()
    } else if let Some(rest) = digits("0o").or_else(|| digits("0").filter(|rest| !rest.is_empty())) {
        u16::from_str_radix(rest, 8).ok()
    } else {
        digits("")?.parse().ok()
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
