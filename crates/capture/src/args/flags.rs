//! The command line, read as the reference's flag library (pflag) reads it, down to what it says of mistakes.
//!
//! An own reader, not clap: values may start with a dash (`-x -b` gives -x the value `-b`), words that are no flags are ignored, and
//! this program must fit in a few MiB.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Text,
    Switch,
    /// A port, in any notation that Go reads: `15002`, `0x3a9a`.
    Port,
    Duration,
}

/// One flag. What it means is in [`super::Args::resolve`].
pub(super) struct Flag {
    pub(super) long: &'static str,
    short: Option<char>,
    pub(super) kind: Kind,
    /// Shown by `--help` only.
    default: &'static str,
    help: &'static str,
}

const fn flag(long: &'static str, short: Option<char>, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { long, short, kind, default, help }
}

/// The names are those of `tools/istio-iptables/pkg/constants`; `ebpf-cgroup` is ours.
pub(super) const FLAGS: &[Flag] = &[
    flag(
        "capture-all-dns",
        None,
        Kind::Switch,
        "",
        "With --redirect-dns: queries to any server, not only to those of /etc/resolv.conf",
    ),
    flag("cleanup-only", None, Kind::Switch, "", "Remove all rules of this program, whatever flags made them"),
    flag("cni-mode", None, Kind::Switch, "", "Accepted for compatibility"),
    flag("drop-invalid", None, Kind::Switch, "", "Drop packets that belong to no connection"),
    flag("dry-run", Some('n'), Kind::Switch, "", "Print what would be done, and do nothing"),
    flag("dual-stack", None, Kind::Switch, "", "Capture IPv6 beside IPv4"),
    flag(
        "ebpf-cgroup",
        None,
        Kind::Text,
        "",
        "Capture by eBPF programs on this cgroup (v2) of the pod and on its interfaces instead of by packet rules",
    ),
    flag("envoy-port", Some('p'), Kind::Text, "15001", "Port of the proxy's outbound listener"),
    flag(
        "force-apply",
        None,
        Kind::Switch,
        "",
        "Accepted for compatibility: rules are always brought to what the flags say",
    ),
    flag("force-iptables-binary", None, Kind::Text, "", "iptables back end: nft or legacy (without it the one in use)"),
    flag("inbound-capture-port", Some('z'), Kind::Text, "15006", "Port of the proxy's inbound listener"),
    flag("inbound-tunnel-port", Some('e'), Kind::Text, "15008", "Port for inbound tunnels (HBONE), never captured"),
    flag("iptables-probe-port", None, Kind::Port, "15002", "Port that the validation connects to"),
    flag(
        "istio-exclude-interfaces",
        Some('c'),
        Kind::Text,
        "",
        "Interfaces whose traffic is not captured, comma separated",
    ),
    flag(
        "istio-inbound-interception-mode",
        Some('m'),
        Kind::Text,
        "",
        "How inbound connections reach the proxy: REDIRECT or TPROXY",
    ),
    flag(
        "istio-inbound-ports",
        Some('b'),
        Kind::Text,
        "",
        "Inbound ports and ranges (8000:8100) to capture, comma separated, or * for all",
    ),
    flag("istio-inbound-tproxy-mark", Some('t'), Kind::Text, "1337", "Packet mark for TPROXY"),
    flag("istio-inbound-tproxy-route-table", Some('r'), Kind::Text, "133", "Routing table for TPROXY"),
    flag(
        "istio-local-exclude-ports",
        Some('d'),
        Kind::Text,
        "",
        "Inbound ports not to capture, comma separated; only with -b *",
    ),
    flag(
        "istio-local-outbound-ports-exclude",
        Some('o'),
        Kind::Text,
        "",
        "Outbound ports not to capture, comma separated",
    ),
    flag(
        "istio-outbound-ports",
        Some('q'),
        Kind::Text,
        "",
        "Outbound ports to capture whatever the address, comma separated",
    ),
    flag(
        "istio-service-cidr",
        Some('i'),
        Kind::Text,
        "",
        "Outbound address blocks to capture, comma separated, or * for all",
    ),
    flag(
        "istio-service-exclude-cidr",
        Some('x'),
        Kind::Text,
        "",
        "Outbound address blocks not to capture, comma separated",
    ),
    flag(
        "kube-virt-interfaces",
        Some('k'),
        Kind::Text,
        "",
        "Interfaces of virtual machines, whose inbound traffic counts as outbound",
    ),
    flag("native-nftables", None, Kind::Switch, "", "Program nftables directly; needs no iptables and no nft"),
    flag("network-namespace", None, Kind::Text, "", "Accepted for compatibility"),
    flag("probe-timeout", None, Kind::Duration, "5s", "How long the validation tries"),
    flag(
        "proxy-gid",
        Some('g'),
        Kind::Text,
        "",
        "Groups whose traffic is not captured, comma separated (without it the value of -u)",
    ),
    flag(
        "proxy-uid",
        Some('u'),
        Kind::Text,
        "",
        "Users whose traffic is not captured, comma separated (without it the user of $ENVOY_USER, else 1337)",
    ),
    flag("reconcile", None, Kind::Switch, "", "Accepted for compatibility: drift is always repaired"),
    flag("redirect-dns", None, Kind::Switch, "", "Send DNS queries to the agent"),
    flag("run-validation", None, Kind::Switch, "", "Check that captured traffic reaches the proxy's ports"),
    flag("skip-rule-apply", None, Kind::Switch, "", "Change no rules"),
    // Log flags of Istio's programs, accepted so that injected pods start; messages go to stderr in any case.
    flag("log_as_json", None, Kind::Switch, "", ""),
    flag("log_caller", None, Kind::Text, "", ""),
    flag("log_output_level", None, Kind::Text, "", ""),
    flag("log_stacktrace_level", None, Kind::Text, "", ""),
    flag("log_target", None, Kind::Text, "", ""),
    flag("vklog", None, Kind::Text, "", ""),
];

/// What was written, by long name. A later value replaces an earlier one.
pub(super) type Given = BTreeMap<&'static str, String>;

/// A command line that cannot be read.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Usage {
    #[error("unknown flag: --{0}")]
    Unknown(String),
    #[error("unknown shorthand flag: {0:?} in -{1}")]
    UnknownShort(char, String),
    #[error("flag needs an argument: {0}")]
    NoValue(String),
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    #[error("invalid argument {value:?} for {flag:?} flag: {reason}")]
    Value { flag: String, value: String, reason: &'static str },
}

impl Flag {
    /// `-n, --dry-run`
    fn spelled(&self) -> String {
        match self.short {
            Some(short) => format!("-{short}, --{}", self.long),
            None => format!("--{}", self.long),
        }
    }

    /// Whether `value` can be read at all; ports, blocks and the like are looked at when all flags are known.
    fn check(&self, value: &str) -> Result<(), Usage> {
        let reason = match self.kind {
            Kind::Text => None,
            Kind::Switch => super::parse_bool(value).is_none().then_some("neither true nor false"),
            Kind::Port => super::parse_port(value).is_none().then_some("not a number from 0 to 65535"),
            Kind::Duration => super::duration(value).is_none().then_some("not a duration such as 5s"),
        };
        match reason {
            None => Ok(()),
            Some(reason) => Err(Usage::Value { flag: self.spelled(), value: value.to_owned(), reason }),
        }
    }
}

/// Reads a command line without the program's name; `None` when help is wanted.
pub(super) fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Given>, Usage> {
    let mut given = Given::new();
    let mut words = arguments.into_iter().map(|word| word.to_string_lossy().into_owned());
    while let Some(word) = words.next() {
        if word == "--" {
            break;
        }
        if let Some(long) = word.strip_prefix("--") {
            if long.starts_with(['-', '=']) {
                return Err(Usage::Syntax(word));
            }
            let (name, value) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let Some(flag) = FLAGS.iter().find(|f| f.long == name) else {
                if name == "help" {
                    return Ok(None);
                }
                return Err(Usage::Unknown(name.to_owned()));
            };
            let value = match (value, flag.kind) {
                (Some(value), _) => value,
                (None, Kind::Switch) => "true".to_owned(),
                (None, _) => words.next().ok_or_else(|| Usage::NoValue(word.clone()))?,
            };
            flag.check(&value)?;
            given.insert(flag.long, value);
        } else if let Some(shorts) = word.strip_prefix('-').filter(|rest| !rest.is_empty())
            && !read_shorts(shorts, &mut words, &mut given)?
        {
            return Ok(None);
        }
        // Anything else is an argument, which the reference ignores.
    }
    Ok(Some(given))
}

/// `-nz15006`, `-z=15006`, `-z 15006`. False: help is wanted.
fn read_shorts(shorts: &str, words: &mut impl Iterator<Item = String>, given: &mut Given) -> Result<bool, Usage> {
    let mut rest = shorts;
    while let Some(short) = rest.chars().next() {
        rest = &rest[short.len_utf8()..];
        let Some(flag) = FLAGS.iter().find(|f| f.short == Some(short)) else {
            if short == 'h' {
                return Ok(false);
            }
            return Err(Usage::UnknownShort(short, shorts.to_owned()));
        };
        let value = match (rest.strip_prefix('='), flag.kind) {
            // As pflag: a lone `-z=` has the value `=`.
            (Some(value), _) if !value.is_empty() => Some(value.to_owned()),
            (_, Kind::Switch) => None,
            _ if !rest.is_empty() => Some(rest.to_owned()),
            _ => Some(words.next().ok_or_else(|| Usage::NoValue(format!("{short:?} in -{shorts}")))?),
        };
        let done = value.is_some();
        let value = value.unwrap_or_else(|| "true".to_owned());
        flag.check(&value)?;
        given.insert(flag.long, value);
        if done {
            break;
        }
    }
    Ok(true)
}

pub(super) fn help() -> String {
    let mut text =
        String::from("Redirects a pod's traffic to its sidecar proxy.\n\nUsage:\n  istio-iptables [flags]\n\nFlags:\n");
    for flag in FLAGS.iter().filter(|f| !f.help.is_empty()) {
        let short = flag.short.map_or_else(|| "    ".to_owned(), |s| format!("-{s}, "));
        let kind = match flag.kind {
            Kind::Text => " string",
            Kind::Switch => "",
            Kind::Port => " uint16",
            Kind::Duration => " duration",
        };
        let default = if flag.default.is_empty() { String::new() } else { format!(" (default {})", flag.default) };
        // Writing into a string cannot fail.
        let _ = writeln!(text, "  {short}--{:<42} {}{default}", format!("{}{kind}", flag.long), flag.help);
    }
    text.push_str(
        "\nEach flag but --envoy-port can also be given in the environment, by its name in capitals with _ for -.\n",
    );
    text
}
