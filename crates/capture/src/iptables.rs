//! Rules as iptables text: what `iptables-restore` reads, and what `iptables-save` would print of the same rules.

mod apply;
mod plan;

pub(crate) use apply::{Backend, Error, Programs, apply, find_leftovers, legacy_tables};

use crate::config::Owner;
use crate::rules::{L4, Match, Rule, RuleSet, Table, Target};

/// As the reference sorts its tables.
const TABLES: [Table; 3] = [Table::Mangle, Table::Nat, Table::Raw];

/// Input of `iptables-restore --noflush` for one family on a clean namespace, spelled as the reference spells it; empty when the
/// family has no rules.
pub fn restore_text(set: &RuleSet, v6: bool) -> String {
    let mut text = String::new();
    if v6 && !set.ipv6 {
        return text;
    }
    for table in TABLES {
        let rules: Vec<&Rule> = set.rules.iter().filter(|r| r.table == table && r.families.include(v6)).collect();
        if rules.is_empty() {
            continue;
        }
        text.push_str(&format!("* {}\n", table.name()));
        for chain in set.chains(table, Some(v6)).into_iter().filter(|c| !c.is_hook()) {
            text.push_str(&format!("-N {}\n", chain.iptables_name()));
        }
        for rule in rules {
            text.push_str(&restore_line(rule));
            text.push('\n');
        }
        text.push_str("COMMIT\n");
    }
    text
}

fn restore_line(rule: &Rule) -> String {
    let mut words = match rule.insert {
        Some(index) => format!("-I {} {}", rule.chain.iptables_name(), index + 1),
        None => format!("-A {}", rule.chain.iptables_name()),
    };
    for condition in &rule.matches {
        words.push(' ');
        words.push_str(&match condition {
            Match::In(name) => format!("-i {name}"),
            Match::Out(name) => format!("-o {name}"),
            Match::Src(cidr) => format!("-s {cidr}"),
            Match::Dst(cidr) => format!("-d {cidr}"),
            Match::NotDst(cidr) => format!("! -d {cidr}"),
            Match::Proto(l4) => format!("-p {}", l4.name()),
            Match::Dport(ports) => format!("--dport {ports}"),
            Match::NotDport(ports) => not_dports(ports, ""),
            Match::Sport(port) => format!("--sport {port}"),
            Match::Uid(owner) => format!("-m owner --uid-owner {}", owner.name),
            Match::NotUid(owner) => format!("-m owner ! --uid-owner {}", owner.name),
            Match::Gid(owner) => format!("-m owner --gid-owner {}", owner.name),
            Match::NotGid(owners) => not_gids(owners, |o| o.name.clone()),
            Match::Mark(mark) => format!("-m mark --mark {mark}"),
            Match::NotMark(mark) => format!("-m mark ! --mark {mark}"),
            Match::ConnMark(mark) => format!("-m connmark --mark {mark}"),
            Match::Invalid => "-m conntrack --ctstate INVALID".to_owned(),
            Match::RelatedEstablished => "-m conntrack --ctstate RELATED,ESTABLISHED".to_owned(),
        });
    }
    // The reference writes the short form of the option for DNS over UDP.
    let udp = rule.matches.contains(&Match::Proto(L4::Udp));
    let target = match &rule.target {
        Target::Redirect(port) if udp => format!("-j REDIRECT --to-port {port}"),
        Target::SetMark(mark) => format!("-j MARK --set-mark {mark}"),
        Target::SaveMark => "-j CONNMARK --save-mark".to_owned(),
        Target::RestoreMark => "-j CONNMARK --restore-mark".to_owned(),
        Target::Tproxy(mark, port) => format!("-j TPROXY --tproxy-mark {mark}/0xffffffff --on-port {port}"),
        other => simple_target(other),
    };
    format!("{words} {target}")
}

fn simple_target(target: &Target) -> String {
    match target {
        Target::Return => "-j RETURN".to_owned(),
        Target::Accept => "-j ACCEPT".to_owned(),
        Target::Drop => "-j DROP".to_owned(),
        Target::Jump(chain) => format!("-j {}", chain.iptables_name()),
        Target::Goto(chain) => format!("-g {}", chain.iptables_name()),
        Target::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        Target::SetMark(mark) => format!("-j MARK --set-xmark {mark:#x}/0xffffffff"),
        Target::SaveMark => "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff".to_owned(),
        Target::RestoreMark => "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff".to_owned(),
        Target::Tproxy(mark, port) => {
            format!("-j TPROXY --on-port {port} --on-ip 0.0.0.0 --tproxy-mark {mark:#x}/0xffffffff")
        }
        Target::Zone(zone) => format!("-j CT --zone {zone}"),
        Target::NoTrack => "-j CT --notrack".to_owned(),
    }
}

fn not_dports(ports: &[u16], module: &str) -> String {
    match ports {
        [port] => format!("{module}! --dport {port}"),
        many => format!("-m multiport ! --dports {}", many.iter().map(u16::to_string).collect::<Vec<_>>().join(",")),
    }
}

fn not_gids(owners: &[Owner], text: impl Fn(&Owner) -> String) -> String {
    owners.iter().map(|o| format!("-m owner ! --gid-owner {}", text(o))).collect::<Vec<_>>().join(" ")
}

fn number(owner: &Owner) -> String {
    owner.id.map_or_else(|| owner.name.clone(), |id| id.to_string())
}

/// A rule as `iptables-save` prints it, without `-A CHAIN`: addresses first, then interfaces, protocol, modules.
fn save_spec(rule: &Rule, v6: bool) -> String {
    let mut words: Vec<(u8, String)> = Vec::new();
    // The protocol loads its own module for ports, but only when a port is compared singly.
    let module = rule.matches.iter().find_map(|m| match m {
        Match::Proto(l4) => Some(format!("-m {} ", l4.name())),
        _ => None,
    });
    let module = module.unwrap_or_default();
    for condition in &rule.matches {
        words.push(match condition {
            Match::Src(cidr) => (0, format!("-s {}", cidr.network())),
            Match::Dst(cidr) => (1, format!("-d {}", cidr.network())),
            Match::NotDst(cidr) => (1, format!("! -d {}", cidr.network())),
            Match::In(name) => (2, format!("-i {name}")),
            Match::Out(name) => (3, format!("-o {name}")),
            Match::Proto(l4) => (4, format!("-p {}", l4.name())),
            // The whole range is no condition, but names its module all the same.
            Match::Dport(ports) if ports.is_all() => (5, module.trim_end().to_owned()),
            Match::Dport(ports) => (5, format!("{module}--dport {ports}")),
            Match::NotDport(ports) => (5, not_dports(ports, &module)),
            Match::Sport(port) => (5, format!("{module}--sport {port}")),
            Match::Uid(owner) => (5, format!("-m owner --uid-owner {}", number(owner))),
            Match::NotUid(owner) => (5, format!("-m owner ! --uid-owner {}", number(owner))),
            Match::Gid(owner) => (5, format!("-m owner --gid-owner {}", number(owner))),
            Match::NotGid(owners) => (5, not_gids(owners, number)),
            Match::Mark(mark) => (5, format!("-m mark --mark {mark:#x}")),
            Match::NotMark(mark) => (5, format!("-m mark ! --mark {mark:#x}")),
            Match::ConnMark(mark) => (5, format!("-m connmark --mark {mark:#x}")),
            Match::Invalid => (5, "-m conntrack --ctstate INVALID".to_owned()),
            Match::RelatedEstablished => (5, "-m conntrack --ctstate RELATED,ESTABLISHED".to_owned()),
        });
    }
    words.sort_by_key(|(rank, _)| *rank);
    let mut target = simple_target(&rule.target);
    if v6 {
        target = target.replace("--on-ip 0.0.0.0", "--on-ip ::");
    }
    words.into_iter().map(|(_, word)| word).chain([target]).collect::<Vec<_>>().join(" ")
}

/// What `iptables-save` prints of these rules alone.
#[cfg(test)]
pub(crate) fn saved_text(set: &RuleSet, v6: bool) -> String {
    let mut text = String::new();
    for table in TABLES {
        text.push_str(&format!("*{}\n", table.name()));
        let names =
            set.chains(table, Some(v6)).into_iter().map(|chain| format!(":{} - [0:0]\n", chain.iptables_name()));
        text.extend(names);
        let rules = set.evaluated(table, Some(v6)).into_iter();
        text.extend(rules.map(|r| format!("-A {} {}\n", r.chain.iptables_name(), save_spec(r, v6))));
        text.push_str("COMMIT\n");
    }
    text
}
