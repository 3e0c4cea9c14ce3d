//! Rules as native nftables: text as the reference's dry run spells it, and a netlink transaction.

use netns::nft::{self, Batch, ChainType, CtState, Expr, Hook, HookPoint, Op, Verdict};

use crate::config::{Cidr, Owner, Ports};
use crate::rules::{Chain, L4, Match, Rule, RuleSet, Table, Target};

/// As the reference declares them: hooks first.
const CHAINS: [Chain; 11] = [
    Chain::Prerouting,
    Chain::OutputHook,
    Chain::Divert,
    Chain::Tproxy,
    Chain::Inbound,
    Chain::Redirect,
    Chain::InRedirect,
    Chain::Output,
    Chain::OutputGroups,
    Chain::OutputDns,
    Chain::Drop,
];

fn table_name(table: Table) -> String {
    format!("istio-proxy-{}", table.name())
}

/// The native table of ours that holds these rules.
pub(crate) fn table(table: Table) -> nft::Table {
    nft::Table::new(nft::Family::Inet, table_name(table))
}

fn hook(table: Table, chain: Chain) -> Option<Hook> {
    let point = match chain {
        Chain::Prerouting => HookPoint::Prerouting,
        Chain::OutputHook => HookPoint::Output,
        _ => return None,
    };
    let (kind, priority) = match (table, point) {
        (Table::Nat, _) => (ChainType::Nat, -100),
        // Only this type looks up the route again when the mark changed.
        (Table::Mangle, HookPoint::Output) => (ChainType::Route, -150),
        (Table::Mangle, _) => (ChainType::Filter, -150),
        (Table::Raw, _) => (ChainType::Filter, -300),
    };
    Some(Hook { kind, point, priority })
}

fn chains(set: &RuleSet, table: Table) -> Vec<Chain> {
    let used = set.chains(table, None);
    CHAINS.into_iter().filter(|c| used.contains(c)).collect()
}

/// Replaces the tables of ours by these rules, or just removes them (`None`), given the ones that are there.
pub(crate) fn batch(set: Option<&RuleSet>, present: &[nft::Table]) -> Batch {
    let mut batch = Batch::new();
    for kind in Table::ALL {
        let name = table(kind);
        let chains = set.map(|set| chains(set, kind)).unwrap_or_default();
        if chains.is_empty() {
            if present.contains(&name) {
                batch.delete_table(&name);
            }
            continue;
        }
        // DIFFERS: Istio flushes the table, which leaves empty chains of earlier flags behind. Deleting costs some 15 ms (the
        // kernel's grace periods), so a table that is not there is only added.
        if present.contains(&name) {
            batch.replace_table(&name);
        } else {
            batch.add_table(&name);
        }
        chains.iter().for_each(|chain| {
            batch.add_chain(&name, chain.nft_name(), hook(kind, *chain));
        });
        for rule in set.map(|set| set.evaluated(kind, None)).unwrap_or_default() {
            batch.add_rule(&name, rule.chain.nft_name(), &nft::Rule::new(exprs(rule)));
        }
    }
    batch
}

/// Connections that the live native rules sent to the proxy, and DNS queries sent to the agent, since the rules were made.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Captured {
    pub outbound: u64,
    pub inbound: u64,
    pub dns: u64,
}

/// Reads the counters of the native tables. Nat rules see only the first packet of a connection; TPROXY rules see the first of each
/// inbound connection, too, since later packets are diverted before them.
pub fn captured(nft: &mut nft::Nft) -> Result<Captured, netns::Error> {
    let mut all = Captured::default();
    for kind in [Table::Nat, Table::Mangle] {
        for rule in nft.rules(&table(kind))? {
            if rule.chain == Chain::Redirect.nft_name() {
                all.outbound += rule.packets;
            } else if rule.chain == Chain::InRedirect.nft_name() || rule.chain == Chain::Tproxy.nft_name() {
                all.inbound += rule.packets;
            } else if rule.chain == Chain::OutputDns.nft_name() {
                all.dns += rule.packets;
            }
        }
    }
    Ok(all)
}

fn rank(condition: &Match) -> u8 {
    match condition {
        Match::In(_) | Match::Out(_) => 0,
        // As the reference has it: the state before the port.
        Match::Proto(_) | Match::RelatedEstablished => 1,
        Match::Src(_) | Match::Dst(_) | Match::NotDst(_) => 2,
        Match::Dport(_) | Match::NotDport(_) | Match::Sport(_) => 3,
        _ => 4,
    }
}

/// Conditions in the reference's order: its nftables builder sorts, except for the tracking zones.
fn sorted(rule: &Rule) -> Vec<&Match> {
    let mut matches: Vec<&Match> = rule.matches.iter().collect();
    if rule.table != Table::Raw {
        matches.sort_by_key(|m| rank(m));
    }
    matches
}

fn l4(l4: L4) -> nft::L4 {
    match l4 {
        L4::Tcp => nft::L4::Tcp,
        L4::Udp => nft::L4::Udp,
    }
}

fn net(cidr: Cidr) -> nft::Net {
    nft::Net::new(cidr.ip, cidr.prefix)
}

/// Owners without a number never get here: `Config::unknown_owner` stops before.
fn id(owner: &Owner) -> u32 {
    owner.id.unwrap_or(u32::MAX)
}

/// Ports and the like are compared for the protocol that the rule names.
fn protocol(rule: &Rule) -> L4 {
    if rule.matches.contains(&Match::Proto(L4::Udp)) { L4::Udp } else { L4::Tcp }
}

fn is_v6(rule: &Rule) -> bool {
    rule.matches.iter().any(|m| matches!(m, Match::Src(c) | Match::Dst(c) | Match::NotDst(c) if c.is_ipv6()))
}

/// Whether the protocol is left to the port comparison to state, as the reference does for DNS and the ports of outbound rules.
fn implicit_protocol(rule: &Rule) -> bool {
    let has_port = rule.matches.iter().any(|m| matches!(m, Match::Dport(_)));
    // The reference states it for the one rule of all servers over TCP.
    let all_servers = rule.chain == Chain::OutputDns && rule.matches.len() == 2;
    rule.table == Table::Raw
        || (rule.chain == Chain::OutputDns && !(all_servers && protocol(rule) == L4::Tcp))
        || (has_port && matches!(rule.chain, Chain::Output | Chain::OutputGroups))
}

fn exprs(rule: &Rule) -> Vec<Expr> {
    let proto = l4(protocol(rule));
    let mut out = Vec::new();
    for condition in sorted(rule) {
        match condition {
            Match::In(name) => out.push(Expr::Iif(Op::Eq, name.clone())),
            Match::Out(name) => out.push(Expr::Oif(Op::Eq, name.clone())),
            Match::Src(cidr) => out.push(Expr::Saddr(Op::Eq, net(*cidr))),
            Match::Dst(cidr) => out.push(Expr::Daddr(Op::Eq, net(*cidr))),
            Match::NotDst(cidr) => out.push(Expr::Daddr(Op::Ne, net(*cidr))),
            Match::Proto(_) if implicit_protocol(rule) => {}
            Match::Proto(p) => out.push(Expr::L4Proto(l4(*p))),
            Match::Dport(Ports { first, last }) if first == last => {
                out.push(Expr::Dport(proto, Op::Eq, vec![*first]));
            }
            Match::Dport(Ports { first, last }) => out.push(Expr::DportRange(proto, *first, *last)),
            Match::NotDport(ports) => out.push(Expr::Dport(proto, Op::Ne, ports.clone())),
            Match::Sport(port) => out.push(Expr::Sport(proto, Op::Eq, vec![*port])),
            Match::Uid(owner) => out.push(Expr::SkUid(Op::Eq, vec![id(owner)])),
            Match::NotUid(owner) => out.push(Expr::SkUid(Op::Ne, vec![id(owner)])),
            Match::Gid(owner) => out.push(Expr::SkGid(Op::Eq, vec![id(owner)])),
            Match::NotGid(owners) => out.extend(owners.iter().map(|o| Expr::SkGid(Op::Ne, vec![id(o)]))),
            Match::Mark(mark) => out.push(Expr::Mark(Op::Eq, *mark)),
            Match::NotMark(mark) => out.push(Expr::Mark(Op::Ne, *mark)),
            Match::ConnMark(mark) => out.push(Expr::CtMark(Op::Eq, *mark)),
            Match::Invalid => {
                // As the reference, whose nftables form drops only TCP.
                out.push(Expr::L4Proto(nft::L4::Tcp));
                out.push(Expr::CtState(CtState::INVALID));
            }
            Match::RelatedEstablished => out.push(Expr::CtState(CtState::RELATED_ESTABLISHED)),
        }
    }
    if let Target::Tproxy(mark, port) = &rule.target {
        out.extend([
            Expr::Tproxy(is_v6(rule), *port),
            Expr::SetMark(*mark),
            Expr::Counter,
            Expr::Verdict(Verdict::Accept),
        ]);
        return out;
    }
    out.push(Expr::Counter);
    out.push(match &rule.target {
        Target::Return => Expr::Verdict(Verdict::Return),
        Target::Accept | Target::Tproxy(..) => Expr::Verdict(Verdict::Accept),
        Target::Drop => Expr::Verdict(Verdict::Drop),
        Target::Jump(chain) => Expr::jump(chain.nft_name()),
        Target::Goto(chain) => Expr::goto(chain.nft_name()),
        Target::Redirect(port) => Expr::Redirect(*port),
        Target::SetMark(mark) => Expr::SetMark(*mark),
        Target::SaveMark => Expr::SaveMark,
        Target::RestoreMark => Expr::RestoreMark,
        Target::Zone(zone) => Expr::CtZone(*zone),
        Target::NoTrack => Expr::NoTrack,
    });
    out
}

/// The transaction as text, spelled and ordered as the reference's.
pub fn text(set: &RuleSet) -> String {
    let mut text = String::new();
    // The tables in the order nat, mangle, raw.
    for kind in Table::ALL {
        let chains = chains(set, kind);
        if chains.is_empty() {
            continue;
        }
        let name = format!("inet {}", table_name(kind));
        text.push_str(&format!("add table {name}\nflush table {name}\n"));
        for chain in chains {
            let hook = hook(kind, chain).map(|h| format!(" {h}")).unwrap_or_default();
            text.push_str(&format!("add chain {name} {}{hook}\n", chain.nft_name()));
        }
        let mut lengths = [0_usize; CHAINS.len()];
        for rule in set.rules.iter().filter(|r| r.table == kind) {
            let length = &mut lengths[CHAINS.iter().position(|c| *c == rule.chain).unwrap_or_default()];
            let (verb, index) = match rule.insert {
                Some(index) if index < *length => ("insert", format!(" index {index}")),
                _ => ("add", String::new()),
            };
            *length += 1;
            text.push_str(&format!("{verb} rule {name} {}{index} {}\n", rule.chain.nft_name(), rule_text(rule)));
        }
    }
    text
}

fn rule_text(rule: &Rule) -> String {
    let proto = protocol(rule).name();
    let family = |cidr: &Cidr| if cidr.is_ipv6() { "ip6" } else { "ip" };
    // In the raw table the reference spells socket owners with their full name.
    let meta = if rule.table == Table::Raw { "meta " } else { "" };
    let mut words = Vec::new();
    for condition in sorted(rule) {
        words.push(match condition {
            Match::In(name) => format!("iifname {name}"),
            Match::Out(name) => format!("oifname {name}"),
            Match::Src(cidr) => format!("{} saddr {cidr}", family(cidr)),
            Match::Dst(cidr) => format!("{} daddr {cidr}", family(cidr)),
            Match::NotDst(cidr) => format!("{} daddr != {cidr}", family(cidr)),
            Match::Proto(_) if implicit_protocol(rule) => continue,
            Match::Proto(l4) => format!("meta l4proto {}", l4.name()),
            // DIFFERS: Istio hands ranges to nftables in the form of iptables, which it refuses.
            Match::Dport(ports) => format!("{proto} dport {ports}").replace(':', "-"),
            Match::NotDport(ports) => match ports.as_slice() {
                [port] => format!("{proto} dport != {port}"),
                many => {
                    format!("{proto} dport != {{ {} }}", many.iter().map(u16::to_string).collect::<Vec<_>>().join(", "))
                }
            },
            Match::Sport(port) => format!("{proto} sport {port}"),
            Match::Uid(owner) => format!("{meta}skuid {}", owner.name),
            Match::NotUid(owner) => format!("{meta}skuid != {}", owner.name),
            Match::Gid(owner) => format!("{meta}skgid {}", owner.name),
            Match::NotGid(owners) => {
                owners.iter().map(|o| format!("{meta}skgid != {}", o.name)).collect::<Vec<_>>().join(" ")
            }
            Match::Mark(mark) => format!("mark {mark}"),
            Match::NotMark(mark) => format!("mark != {mark}"),
            Match::ConnMark(mark) => format!("ct mark {mark}"),
            Match::Invalid => "meta l4proto tcp ct state invalid".to_owned(),
            Match::RelatedEstablished => "ct state related,established".to_owned(),
        });
    }
    words.push(match &rule.target {
        Target::Return => "counter return".to_owned(),
        Target::Accept => "counter accept".to_owned(),
        Target::Drop => "counter drop".to_owned(),
        Target::Jump(chain) => format!("counter jump {}", chain.nft_name()),
        Target::Goto(chain) => format!("counter goto {}", chain.nft_name()),
        Target::Redirect(port) => format!("counter redirect to :{port}"),
        Target::SetMark(mark) => format!("counter meta mark set {mark}"),
        Target::SaveMark => "counter ct mark set mark".to_owned(),
        Target::RestoreMark => "counter meta mark set ct mark".to_owned(),
        Target::Tproxy(mark, port) => {
            let ip = if is_v6(rule) { "ip6" } else { "ip" };
            format!("tproxy {ip} to :{port} meta mark set {mark} counter accept")
        }
        Target::Zone(zone) => format!("counter ct zone set {zone}"),
        Target::NoTrack => "counter notrack".to_owned(),
    });
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Dns, Mode, Selection};
    use crate::rules::rules;

    #[test]
    fn conditions_are_spelled_and_ordered_as_in_the_reference() {
        let config = Config {
            mode: Mode::Tproxy,
            inbound_ports: Selection::Only(vec![80.into()]),
            outbound_ports: vec![9000.into()],
            outbound_exclude_ports: vec![25.into()],
            drop_invalid: true,
            dns: Dns::All,
            ..Config::default()
        };
        let text = text(&rules(&config));
        for rule in [
            "istio-inbound meta l4proto tcp ct state related,established tcp dport 80 counter jump istio-divert\n",
            "istio-inbound meta l4proto tcp tcp dport 80 counter jump istio-tproxy\n",
            "prerouting meta l4proto tcp ct state invalid counter jump istio-drop\n",
            "istio-output-dns meta l4proto tcp tcp dport 53 counter redirect to :15053\n",
            "istio-output-dns udp dport 53 counter redirect to :15053\n",
            "istio-output tcp dport 25 counter return\n",
            "istio-output udp dport 25 counter return\n",
            "istio-output tcp dport 9000 counter jump istio-redirect\n",
        ] {
            assert!(text.contains(rule), "{rule}{text}");
        }
    }
}
