//! `capture doctor`: what keeps capture from working here, each with the command that mends it.

use std::net::{IpAddr, SocketAddr};

use netns::nft::Nft;
use netns::{Link, Netlink, Netns};

use super::explain::{End, Packet, follow};
use super::live::{Action, Source, Table, What};
use crate::config::{Config, Dns, Mode, Selection};
use crate::iptables::Backend;
use crate::rules::{L4, rules};
use crate::{ebpf, nftables};

/// Above this share of its table, connection tracking soon drops connections.
const TRACKING_FULL_PERCENT: u64 = 80;

/// One result.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    pub(crate) what: String,
    /// What mends it.
    pub(crate) command: Option<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Level {
    Good,
    Warning,
    Problem,
}

impl Level {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

fn finding(level: Level, what: impl Into<String>, command: Option<&str>) -> Finding {
    Finding { level, what: what.into(), command: command.map(str::to_owned) }
}

/// What the doctor looks at, read before.
pub(crate) struct Patient<'a> {
    pub(crate) tables: &'a [Table],
    pub(crate) programs: &'a [(String, ebpf::Live)],
    pub(crate) links: &'a [Link],
    pub(crate) local: &'a [IpAddr],
    pub(crate) interface: &'a str,
}

pub(crate) fn examine(patient: &Patient<'_>, netlink: &mut Netlink) -> Vec<Finding> {
    let mut all = vec![kernel()];
    all.extend(back_ends(patient));
    all.extend(shadows(patient));
    all.extend(ipv6(patient));
    all.extend(leftovers(patient, netlink));
    all.extend(listeners(patient));
    all.extend(tracking());
    all.extend(programs(patient));
    all
}

/// Makes every kind of rule in a namespace of its own, which goes with the descriptor: nothing here changes.
fn kernel() -> Finding {
    let what = "the kernel has everything that capture needs (nf_tables, redirect, tproxy, connection tracking, sets)";
    let Ok(scratch) = Netns::create() else {
        let text = "this needs root and CAP_SYS_ADMIN to try the kernel's nf_tables without touching any rules";
        return finding(
            Level::Warning,
            text,
            Some("run it as root, or in a pod with capabilities SYS_ADMIN and NET_ADMIN"),
        );
    };
    let config = Config {
        mode: Mode::Tproxy,
        inbound_ports: Selection::All,
        outbound_cidrs: Selection::All,
        dns: Dns::All,
        drop_invalid: true,
        ipv6: true,
        ..Config::default()
    };
    let tried = Nft::open_in(&scratch).and_then(|mut nft| nft.apply(&nftables::batch(Some(&rules(&config)), &[])));
    match tried {
        Ok(()) => finding(Level::Good, what, None),
        Err(error) if error.is_permission() => finding(
            Level::Problem,
            "no CAP_NET_ADMIN: rules can be neither read nor made",
            Some("add the capability NET_ADMIN to the init container"),
        ),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|e| format!(": {e}")).unwrap_or_default();
            finding(
                Level::Problem,
                format!("the kernel refuses a rule that capture needs: {error}{cause}"),
                Some("modprobe -a nf_tables nft_redir nft_tproxy nft_ct nft_chain_nat nf_nat"),
            )
        }
    }
}

/// Rules of ours in more than one back end, or in another than the rest of the namespace uses.
fn back_ends(patient: &Patient<'_>) -> Vec<Finding> {
    let mut sources: Vec<Source> = Vec::new();
    for table in patient.tables.iter().filter(|t| t.is_ours()) {
        if !sources.contains(&table.source) {
            sources.push(table.source);
        }
    }
    let names = sources.iter().map(Source::to_string).collect::<Vec<_>>().join(" and ");
    let foreign_legacy = patient.tables.iter().any(|t| {
        t.source == Source::Iptables(Backend::Legacy) && !t.is_ours() && t.chains.iter().any(|c| !c.rules.is_empty())
    });
    let mut out = Vec::new();
    out.push(match sources.len() {
        0 if patient.programs.is_empty() => {
            finding(Level::Warning, "nothing is captured here: there are no rules of ours", None)
        }
        0 => finding(Level::Good, "there are no rules of ours beside the eBPF programs", None),
        1 => finding(Level::Good, format!("rules of ours are in one back end: {names}"), None),
        _ => finding(
            Level::Problem,
            format!("rules of ours are in {names}: every connection is captured twice"),
            Some("outrigger istio-clean-iptables, then istio-iptables once"),
        ),
    });
    if foreign_legacy && sources == [Source::Iptables(Backend::Nft)] {
        out.push(finding(
            Level::Warning,
            "others use iptables-legacy here, while our rules are in iptables-nft: both apply, in an order that is easily mistaken",
            Some("outrigger istio-clean-iptables, then istio-iptables --force-iptables-binary legacy"),
        ));
    }
    out
}

/// Rules of others that decide before ours do.
fn shadows(patient: &Patient<'_>) -> Vec<Finding> {
    let mut out = Vec::new();
    if !patient.tables.iter().any(Table::is_ours) && patient.programs.is_empty() {
        return out;
    }
    for v6 in [false, true] {
        let any: IpAddr = if v6 { [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into() } else { [198, 18, 0, 1].into() };
        let Some(own) = patient.local.iter().find(|ip| ip.is_ipv6() == v6 && !ip.is_loopback()) else { continue };
        let ways = [("an application's outbound", Some((1000, 1000)), *own, any), ("an inbound", None, any, *own)];
        for (name, owner, from, to) in ways {
            let packet = Packet {
                l4: L4::Tcp,
                from: SocketAddr::new(from, 40000),
                to: SocketAddr::new(to, 80),
                owner,
                interface: patient.interface.to_owned(),
                mark: 0,
            };
            let trace = follow(patient.tables, patient.programs.first().map(|p| &p.1), patient.local, &packet);
            let foreign = trace.steps.iter().rev().find(|s| !s.ours && !s.uncertain);
            let decides = matches!(trace.end, End::Dropped | End::Led { to: super::explain::Destination::Other, .. });
            if let (Some(step), true) = (foreign, decides) {
                out.push(finding(
                    Level::Problem,
                    format!(
                        "a rule of others decides {name} connection before ours: {}, {} rule {}: {}",
                        step.table, step.chain, step.number, step.rule
                    ),
                    Some("move that rule behind ours, or narrow it"),
                ));
            }
        }
    }
    if out.is_empty() {
        out.push(finding(Level::Good, "no rule of others decides before ours", None));
    }
    out
}

fn mentions_v6(table: &Table) -> bool {
    let v6 =
        |what: &What| matches!(what, What::Ipv6(true)) || matches!(what, What::Src(n) | What::Dst(n) if n.ip.is_ipv6());
    table.chains.iter().flat_map(|c| &c.rules).flat_map(|r| &r.conditions).any(|c| v6(&c.what))
}

fn ipv6(patient: &Patient<'_>) -> Option<Finding> {
    // Every interface has a link-local address; no service is reached by one.
    let is_reached = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if !v6.is_loopback() && !v6.is_unicast_link_local());
    let address = patient.local.iter().find(|ip| is_reached(ip) && !is_passthrough(**ip));
    let ours: Vec<&Table> = patient.tables.iter().filter(|t| t.is_ours()).collect();
    if ours.is_empty() && patient.programs.is_empty() {
        return None;
    }
    let by_programs = patient.programs.iter().any(|(_, live)| live.tables.captures_ipv6());
    let captured = by_programs || ours.iter().any(|t| t.v6 == Some(true) || (t.v6.is_none() && mentions_v6(t)));
    Some(match (address, captured) {
        (Some(ip), false) => finding(
            Level::Problem,
            format!("this pod has the IPv6 address {ip}, and IPv6 traffic passes the proxy by"),
            Some("istio-iptables --dual-stack (or ISTIO_DUAL_STACK=true) with the flags in use"),
        ),
        (Some(_), true) => finding(Level::Good, "IPv6 is captured as IPv4 is", None),
        (None, _) => finding(Level::Good, "there is no IPv6 address whose traffic could pass the proxy by", None),
    })
}

fn is_passthrough(ip: IpAddr) -> bool {
    ip == crate::rules::PASSTHROUGH_V6
}

/// Things of ours without the rules that need them, and rules without the things that they need.
fn leftovers(patient: &Patient<'_>, netlink: &mut Netlink) -> Vec<Finding> {
    let mut out = Vec::new();
    const CLEAN: &str = "outrigger istio-clean-iptables";
    let ours: Vec<&Table> = patient.tables.iter().filter(|t| t.is_ours()).collect();
    let rules = || ours.iter().flat_map(|t| &t.chains).flat_map(|c| &c.rules);
    for v6 in [false, true] {
        let name = if v6 { "IPv6" } else { "IPv4" };
        let tproxy = ours.iter().filter(|t| t.v6.is_none_or(|of| of == v6)).flat_map(|t| &t.chains).any(|chain| {
            let of_family = |r: &super::live::Rule| {
                r.actions.iter().any(|a| matches!(a, Action::Tproxy(..)))
                    && !r.conditions.iter().any(|c| matches!(&c.what, What::Dst(n) if n.ip.is_ipv6() != v6))
            };
            chain.rules.iter().any(of_family)
        });
        let marks: Vec<u32> = rules()
            .flat_map(|r| &r.actions)
            .filter_map(|a| match a {
                Action::SetMark(mark) => Some(*mark),
                Action::Tproxy(_, mark) => *mark,
                _ => None,
            })
            .collect();
        let policy = netlink.rules(v6).unwrap_or_default();
        let routed = policy.iter().find(|r| r.fwmark.is_some_and(|mark| marks.contains(&mark)));
        if tproxy && routed.is_none() {
            out.push(finding(
                Level::Problem,
                format!("there are {name} TPROXY rules, but no policy rule leads their packets to this host"),
                Some("run istio-iptables again with the flags in use: it brings back what is missing"),
            ));
        }
        let is_ours = |rule: &&netns::Rule| {
            let routes = netlink.routes(v6, rule.table).unwrap_or_default();
            rule.fwmark.is_some()
                && matches!(routes.as_slice(), [only] if only.kind == netns::RouteKind::Local && only.dev.as_deref() == Some("lo"))
        };
        if let Some(stale) = policy.iter().find(is_ours).filter(|r| !r.fwmark.is_some_and(|mark| marks.contains(&mark)))
        {
            out.push(finding(
                Level::Warning,
                format!(
                    "an {name} policy rule of TPROXY (mark {}, table {}) was left behind",
                    stale.fwmark.unwrap_or(0),
                    stale.table
                ),
                Some(CLEAN),
            ));
        }
    }
    if ours.is_empty() && patient.programs.is_empty() && patient.local.contains(&crate::rules::PASSTHROUGH_V6) {
        out.push(finding(Level::Warning, "the address ::6 was left behind on lo", Some(CLEAN)));
    }
    for (cgroup, _) in patient.programs.iter().filter(|(_, live)| live.partial) {
        out.push(finding(
            Level::Problem,
            format!("eBPF programs on {cgroup} are incomplete: a run was killed"),
            Some("run istio-iptables again with the flags in use"),
        ));
    }
    let loose = ours.iter().find(|t| t.chains.iter().all(|c| c.hook.is_none() || c.rules.is_empty()));
    if let Some(table) = loose {
        out.push(finding(
            Level::Warning,
            format!("nothing leads to the chains of ours in {}", table.title()),
            Some(CLEAN),
        ));
    }
    if out.is_empty() {
        out.push(finding(Level::Good, "nothing was left behind, and nothing is missing beside the rules", None));
    }
    out
}

/// Connections that are led to a port where nobody listens are refused.
fn listeners(patient: &Patient<'_>) -> Vec<Finding> {
    let mut ports: Vec<u16> = patient.programs.iter().flat_map(|(_, live)| live.tables.proxy_ports()).collect();
    for action in patient
        .tables
        .iter()
        .filter(|t| t.is_ours())
        .flat_map(|t| &t.chains)
        .flat_map(|c| &c.rules)
        .flat_map(|r| &r.actions)
    {
        if let Action::Redirect(port) | Action::Tproxy(port, _) = action
            && !ports.contains(port)
        {
            ports.push(*port);
        }
    }
    let listening: Vec<u16> =
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].into_iter().flat_map(listening).collect();
    let missing: Vec<String> =
        ports.iter().filter(|p| **p != 15053 && !listening.contains(p)).map(u16::to_string).collect();
    if ports.is_empty() {
        return Vec::new();
    }
    vec![if missing.is_empty() {
        finding(Level::Good, "the proxy listens where the rules lead", None)
    } else {
        let text = format!("nobody listens on port {} where connections are led: they fail", missing.join(", "));
        finding(Level::Problem, text, Some("start the proxy (outrigger agent proxy sidecar), or look why it ended"))
    }]
}

/// The ports of sockets in state LISTEN, of a table in `/proc`.
fn listening(file: &str) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let port = words.get(1)?.rsplit(':').next()?;
        (words.get(3) == Some(&LISTEN)).then(|| u16::from_str_radix(port, 16).ok())?
    };
    text.lines().skip(1).filter_map(port).collect()
}

fn tracking() -> Option<Finding> {
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?.trim().parse::<u64>().ok()
    };
    tracking_finding(read("count")?, read("max")?)
}

fn tracking_finding(count: u64, max: u64) -> Option<Finding> {
    let percent = count.saturating_mul(100).checked_div(max)?;
    let text = format!("connection tracking holds {count} of at most {max} connections ({percent} %)");
    Some(if percent < TRACKING_FULL_PERCENT {
        finding(Level::Good, text, None)
    } else {
        let command = format!("sysctl -w net.netfilter.nf_conntrack_max={} (on the node)", max.saturating_mul(2));
        finding(Level::Problem, format!("{text}: new connections will be dropped"), Some(&command))
    })
}

/// Whether capture by eBPF is complete, or would be possible.
fn programs(patient: &Patient<'_>) -> Vec<Finding> {
    const BPF: u32 = 39;
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    if let Some((_, live)) = patient.programs.first() {
        let uncaptured = |link: &&Link| !link.loopback && link.up && !live.interfaces.contains(&link.name);
        let mut out: Vec<Finding> = Vec::new();
        if !live.tables.captures_inbound() {
            let why = if ebpf::can_capture_inbound(patient.links) {
                "inbound ones by packet rules, if at all"
            } else {
                "inbound ones by packet rules, if at all: for programs they need Linux 6.6"
            };
            out.push(finding(Level::Good, format!("outbound connections are captured by eBPF programs, {why}"), None));
        } else {
            out.push(finding(Level::Good, "connections are captured by eBPF programs, in both directions", None));
            out.extend(patient.links.iter().filter(uncaptured).map(|link| {
                let text = format!(
                    "no program captures what comes in by interface {}: it came later, or is a virtual machine's",
                    link.name
                );
                finding(Level::Warning, text, Some("run istio-iptables again with the flags in use"))
            }));
        }
        return out;
    }
    let orphans = ebpf::inbound_interfaces(patient.links).unwrap_or_default();
    if !orphans.is_empty() {
        // Whose cgroup is not known here is captured all the same.
        let text = format!(
            "eBPF programs capture what comes in by {}; those of the cgroup are not seen from here",
            orphans.join(", ")
        );
        return vec![finding(
            Level::Warning,
            text,
            Some("say --ebpf-cgroup DIR; if nothing is there: outrigger istio-clean-iptables"),
        )];
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap_or_default();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap_or(0);
    let has = |capability: u32| effective >> capability & 1 == 1;
    vec![if has(NET_ADMIN) && (has(BPF) || has(SYS_ADMIN)) {
        finding(Level::Good, "the capabilities for --ebpf-cgroup (BPF and NET_ADMIN) are there", None)
    } else {
        let text = "not used and not possible: --ebpf-cgroup needs the capabilities BPF and NET_ADMIN";
        finding(Level::Good, text, None)
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nearly_full_table_is_a_problem() {
        assert_eq!(tracking_finding(10, 100).map(|f| f.level), Some(Level::Good));
        let full = tracking_finding(90, 100).expect("finding");
        assert_eq!(full.level, Level::Problem);
        assert!(full.command.is_some_and(|c| c.contains("nf_conntrack_max=200")));
        assert_eq!(tracking_finding(1, 0), None);
    }
}
