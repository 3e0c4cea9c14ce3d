//! The rules that are live in this network namespace, of whoever made them, in one form for all back ends.

use std::fmt;

use netns::nft::{self, Expr, LiveRule, Nft, Op, Part};

use super::saved;
use crate::config::Ports;
use crate::iptables::{Backend, Programs};
use crate::rules::L4;

/// Who holds a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Source {
    Nftables,
    Iptables(Backend),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables(Backend::Nft) => "iptables-nft",
            Self::Iptables(Backend::Legacy) => "iptables-legacy",
            Self::Iptables(Backend::Plain) => "iptables",
        })
    }
}

/// Where in a packet's way a base chain stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum At {
    Prerouting,
    Output,
}

/// One condition; lists mean any of them, none of them when `not`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Condition {
    pub(crate) not: bool,
    pub(crate) what: What,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum What {
    In(String),
    Out(String),
    Src(nft::Net),
    Dst(nft::Net),
    Ipv6(bool),
    Proto(L4),
    Dport(Vec<Ports>),
    Sport(Vec<Ports>),
    Uid(Vec<u32>),
    Gid(Vec<u32>),
    Mark(u32),
    ConnMark(u32),
    /// Only packets of known connections: RELATED, ESTABLISHED.
    Known,
    /// Only packets of no connection.
    Invalid,
    /// Something that this program never makes.
    Other(String),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    /// Counts or logs, and the next rule follows.
    Nothing,
    Return,
    Accept,
    Drop,
    Jump(String),
    Goto(String),
    Redirect(u16),
    SetMark(u32),
    SaveMark,
    RestoreMark,
    /// Port, and the mark that it sets.
    Tproxy(u16, Option<u32>),
    Zone(u16),
    NoTrack,
    /// Something that this program never makes, and that may end the packet's way.
    Other(String),
}

#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<Condition>,
    pub(crate) actions: Vec<Action>,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) name: String,
    /// Base chains: where, and at which priority (lower runs first).
    pub(crate) hook: Option<(At, i32)>,
    pub(crate) drops: bool,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) source: Source,
    /// The one family that it sees; `None` is both.
    pub(crate) v6: Option<bool>,
    pub(crate) name: String,
    /// Destination NAT: only the first packet of a connection meets it.
    pub(crate) nat: bool,
    pub(crate) chains: Vec<Chain>,
}

impl Table {
    pub(crate) fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|c| c.name == name)
    }

    /// Made by this program or by Istio: the whole table, natively, else chains by their names.
    pub(crate) fn is_ours(&self) -> bool {
        self.chains.iter().any(|c| is_our_chain(&c.name))
            && (self.source != Source::Nftables || self.name.starts_with("istio-proxy-"))
    }

    pub(crate) fn title(&self) -> String {
        let family = match self.v6 {
            None => "IPv4 and IPv6",
            Some(false) => "IPv4",
            Some(true) => "IPv6",
        };
        format!("{} ({}, {family})", self.name, self.source)
    }
}

pub(crate) fn is_our_chain(name: &str) -> bool {
    name.starts_with("ISTIO_") || name.starts_with("istio-")
}

/// Reads everything. Loads nothing: legacy tables that are not in use are not looked at.
pub(crate) fn read(programs: &Programs) -> Result<Vec<Table>, crate::run::Failure> {
    let mut tables = Vec::new();
    let mut nft = crate::run::open_nft()?;
    let iptables_nft = [Backend::Nft, Backend::Plain].into_iter().find(|b| programs.has(*b));
    let mut iptables_tables = [false; 2];
    if let Some(nft) = nft.as_mut() {
        for table in nft.tables()? {
            let v6 = match table.family {
                nft::Family::Inet => None,
                nft::Family::Ip => Some(false),
                nft::Family::Ip6 => Some(true),
            };
            // iptables reads its own tables better than we do: they hold extensions in its own format.
            let of_iptables = matches!(table.name.as_str(), "nat" | "mangle" | "raw" | "filter" | "security");
            match v6 {
                Some(v6) if of_iptables && iptables_nft.is_some() => iptables_tables[usize::from(v6)] = true,
                _ => tables.push(native(nft, &table, v6)?),
            }
        }
    }
    for v6 in [false, true] {
        if let Some(backend) = iptables_nft.filter(|_| iptables_tables[usize::from(v6)]) {
            let text = programs.counted(backend, v6)?;
            tables.extend(saved::tables(&text, Source::Iptables(backend), v6));
        }
        if programs.has(Backend::Legacy) && crate::iptables::legacy_tables(v6) {
            let text = programs.counted(Backend::Legacy, v6)?;
            tables.extend(saved::tables(&text, Source::Iptables(Backend::Legacy), v6));
        }
    }
    Ok(tables)
}

fn native(nft: &mut Nft, table: &nft::Table, v6: Option<bool>) -> Result<Table, netns::Error> {
    let chains = nft.chains(table)?;
    let rules = nft.rules(table)?;
    let mut out = Table { source: Source::Nftables, v6, name: table.name.clone(), nat: false, chains: Vec::new() };
    for chain in chains {
        let hook = chain.hook.and_then(|(number, priority)| match number {
            0 => Some((At::Prerouting, priority)),
            3 => Some((At::Output, priority)),
            _ => None,
        });
        out.nat |= chain.nat;
        let own: Vec<&LiveRule> = rules.iter().filter(|r| r.chain == chain.name).collect();
        let rules = own.into_iter().map(|rule| translate(nft.parts(table, rule), rule)).collect();
        out.chains.push(Chain { name: chain.name, hook, drops: chain.drops, rules });
    }
    Ok(out)
}

fn translate(parts: Vec<Part>, live: &LiveRule) -> Rule {
    let mut rule = Rule { conditions: Vec::new(), actions: Vec::new(), packets: live.packets, bytes: live.bytes };
    for part in parts {
        let expr = match part {
            Part::Known(expr) => expr,
            Part::Unknown(name) => {
                // Statements of that kind come last, conditions first; a rule with an unknown part is never taken for certain.
                rule.conditions.push(Condition { not: false, what: What::Other(name) });
                continue;
            }
        };
        let (not, what) = match expr {
            Expr::L4Proto(l4) => (false, What::Proto(l4_of(l4))),
            Expr::Ipv6(v6) => (false, What::Ipv6(v6)),
            Expr::Iif(op, name) => (op == Op::Ne, What::In(name)),
            Expr::Oif(op, name) => (op == Op::Ne, What::Out(name)),
            Expr::Saddr(op, net) => (op == Op::Ne, What::Src(net)),
            Expr::Daddr(op, net) => (op == Op::Ne, What::Dst(net)),
            Expr::Sport(_, op, ports) => (op == Op::Ne, What::Sport(ports.into_iter().map(Ports::from).collect())),
            Expr::Dport(_, op, ports) => (op == Op::Ne, What::Dport(ports.into_iter().map(Ports::from).collect())),
            Expr::DportRange(_, first, last) => (false, What::Dport(vec![Ports { first, last }])),
            Expr::SkUid(op, ids) => (op == Op::Ne, What::Uid(ids)),
            Expr::SkGid(op, ids) => (op == Op::Ne, What::Gid(ids)),
            Expr::Mark(op, mark) => (op == Op::Ne, What::Mark(mark)),
            Expr::CtMark(op, mark) => (op == Op::Ne, What::ConnMark(mark)),
            Expr::CtState(nft::CtState::INVALID) => (false, What::Invalid),
            Expr::CtState(nft::CtState::RELATED_ESTABLISHED) => (false, What::Known),
            Expr::Counter => continue,
            Expr::Verdict(verdict) => {
                rule.actions.push(match verdict {
                    nft::Verdict::Accept => Action::Accept,
                    nft::Verdict::Drop => Action::Drop,
                    nft::Verdict::Return => Action::Return,
                    nft::Verdict::Jump(chain) => Action::Jump(chain),
                    nft::Verdict::Goto(chain) => Action::Goto(chain),
                });
                continue;
            }
            Expr::Redirect(port) => {
                rule.actions.push(Action::Redirect(port));
                continue;
            }
            Expr::Tproxy(_, port) => {
                rule.actions.push(Action::Tproxy(port, None));
                continue;
            }
            Expr::SetMark(mark) => {
                rule.actions.push(Action::SetMark(mark));
                continue;
            }
            Expr::SaveMark => {
                rule.actions.push(Action::SaveMark);
                continue;
            }
            Expr::RestoreMark => {
                rule.actions.push(Action::RestoreMark);
                continue;
            }
            Expr::NoTrack => {
                rule.actions.push(Action::NoTrack);
                continue;
            }
            Expr::CtZone(zone) => {
                rule.actions.push(Action::Zone(zone));
                continue;
            }
            other => (false, What::Other(other.to_string())),
        };
        rule.conditions.push(Condition { not, what });
    }
    rule
}

fn l4_of(l4: nft::L4) -> L4 {
    match l4 {
        nft::L4::Tcp => L4::Tcp,
        nft::L4::Udp => L4::Udp,
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.not { "not " } else { "" };
        match &self.what {
            What::In(name) => write!(f, "{not}from interface {name}"),
            What::Out(name) => write!(f, "{not}to interface {name}"),
            What::Src(net) => write!(f, "{not}from {net}"),
            What::Dst(net) => write!(f, "{not}to {net}"),
            What::Ipv6(v6) => write!(f, "{not}{}", if *v6 { "IPv6" } else { "IPv4" }),
            What::Proto(l4) => write!(f, "{not}{}", l4.name()),
            What::Dport(ports) => write!(f, "{not}port {}", list(ports)),
            What::Sport(ports) => write!(f, "{not}from port {}", list(ports)),
            What::Uid(ids) => write!(f, "{not}user {}", list(ids)),
            What::Gid(ids) => write!(f, "{not}group {}", list(ids)),
            What::Mark(mark) => write!(f, "{not}mark {mark}"),
            What::ConnMark(mark) => write!(f, "{not}connection mark {mark}"),
            What::Known => write!(f, "{not}of a known connection"),
            What::Invalid => write!(f, "{not}of no connection"),
            What::Other(text) => write!(f, "{not}[{text}]"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("count"),
            Self::Return => f.write_str("back"),
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("DROP"),
            Self::Jump(chain) => write!(f, "-> {chain}"),
            Self::Goto(chain) => write!(f, "=> {chain}"),
            Self::Redirect(port) => write!(f, "redirect to port {port}"),
            Self::SetMark(mark) => write!(f, "set mark {mark}"),
            Self::SaveMark => f.write_str("keep the mark with the connection"),
            Self::RestoreMark => f.write_str("take the connection's mark"),
            Self::Tproxy(port, Some(mark)) => write!(f, "to the socket at port {port}, mark {mark}"),
            Self::Tproxy(port, None) => write!(f, "to the socket at port {port}"),
            Self::NoTrack => f.write_str("not tracked"),
            Self::Zone(zone) => write!(f, "tracking zone {zone}"),
            Self::Other(text) => write!(f, "[{text}]"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conditions: Vec<_> = self.conditions.iter().map(Condition::to_string).collect();
        let actions: Vec<_> = self.actions.iter().map(Action::to_string).collect();
        let conditions = if conditions.is_empty() { "everything".to_owned() } else { conditions.join(", ") };
        write!(f, "{conditions}: {}", if actions.is_empty() { "count".to_owned() } else { actions.join(", ") })
    }
}
