//! Reads `iptables-save -c`.

use std::net::IpAddr;

use netns::nft::Net;

use super::live::{Action, At, Chain, Condition, Rule, Source, Table, What};
use crate::config::Ports;
use crate::rules::L4;

/// The tables of one family.
pub(super) fn tables(text: &str, source: Source, v6: bool) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            let nat = name == "nat";
            tables.push(Table { source, v6: Some(v6), name: name.to_owned(), nat, chains: Vec::new() });
            continue;
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            let name = words.next().unwrap_or_default().to_owned();
            let hook = hook(&table.name, &name);
            table.chains.push(Chain { name, hook, drops: words.next() == Some("DROP"), rules: Vec::new() });
        } else if let Some((chain, rule)) = read_rule(line)
            && let Some(chain) = table.chains.iter_mut().find(|c| c.name == chain)
        {
            chain.rules.push(rule);
        }
    }
    tables
}

fn hook(table: &str, chain: &str) -> Option<(At, i32)> {
    let at = match chain {
        "PREROUTING" => At::Prerouting,
        "OUTPUT" => At::Output,
        _ => return None,
    };
    let priority = match table {
        "raw" => -300,
        "mangle" => -150,
        "nat" => -100,
        _ => 0,
    };
    Some((at, priority))
}

/// The words of a rule; quoted ones (comments) stay together.
fn words(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"').and_then(|quoted| quoted.split_once('"')) {
            Some((word, after)) => (word, after),
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        out.push(word.to_owned());
        rest = after.trim_start();
    }
    out
}

/// `[12:720] -A CHAIN …`
fn read_rule(line: &str) -> Option<(String, Rule)> {
    let (counters, rest) = match line.strip_prefix('[') {
        Some(rest) => rest.split_once("] ")?,
        None => ("0:0", line),
    };
    let (packets, bytes) = counters.split_once(':')?;
    let mut words = words(rest.strip_prefix("-A ")?).into_iter();
    let chain = words.next()?;
    let mut rule = Rule {
        conditions: Vec::new(),
        actions: Vec::new(),
        packets: packets.parse().unwrap_or(0),
        bytes: bytes.parse().unwrap_or(0),
    };
    let mut not = false;
    let mut module = String::new();
    while let Some(word) = words.next() {
        if word == "!" {
            not = true;
            continue;
        }
        let mut next = || words.next().unwrap_or_default();
        let numbers = |text: String| text.split(',').filter_map(|n| n.parse().ok()).collect::<Vec<u32>>();
        let ports = |text: String| text.split(',').filter_map(|n| n.parse().ok()).collect::<Vec<Ports>>();
        let what = match word.as_str() {
            "-m" => {
                module = next();
                None
            }
            "--comment" => {
                next();
                None
            }
            "-i" => Some(What::In(interface(next()))),
            "-o" => Some(What::Out(interface(next()))),
            "-s" => net(&next()).map(What::Src),
            "-d" => net(&next()).map(What::Dst),
            "-p" => match next().as_str() {
                "tcp" => Some(What::Proto(L4::Tcp)),
                "udp" => Some(What::Proto(L4::Udp)),
                other => Some(What::Other(format!("-p {other}"))),
            },
            "--dport" | "--dports" => Some(What::Dport(ports(next()))),
            "--sport" | "--sports" => Some(What::Sport(ports(next()))),
            "--uid-owner" => Some(What::Uid(numbers(next()))),
            "--gid-owner" => Some(What::Gid(numbers(next()))),
            "--mark" => match number(&next()) {
                Some(mark) if module == "connmark" => Some(What::ConnMark(mark)),
                Some(mark) => Some(What::Mark(mark)),
                None => Some(What::Other("--mark".into())),
            },
            "--ctstate" => match next().as_str() {
                "INVALID" => Some(What::Invalid),
                "RELATED,ESTABLISHED" => Some(What::Known),
                other => Some(What::Other(format!("--ctstate {other}"))),
            },
            "-j" | "-g" => {
                let target = next();
                let rest: Vec<String> = words.by_ref().collect();
                rule.actions.push(action(&word, &target, &rest));
                None
            }
            other => Some(What::Other(other.to_owned())),
        };
        if let Some(what) = what {
            rule.conditions.push(Condition { not, what });
            not = false;
        }
    }
    Some((chain, rule))
}

/// iptables writes any end of a name as `+`.
fn interface(name: String) -> String {
    name.strip_suffix('+').map_or_else(|| name.clone(), |start| format!("{start}*"))
}

fn net(text: &str) -> Option<Net> {
    let (ip, prefix) = match text.split_once('/') {
        Some((ip, prefix)) => (ip, prefix.parse().ok()),
        None => (text, None),
    };
    let ip: IpAddr = ip.parse().ok()?;
    Some(Net::new(ip, prefix.unwrap_or(if ip.is_ipv4() { 32 } else { 128 })))
}

/// `0x539` or `0x539/0xffffffff`
fn number(text: &str) -> Option<u32> {
    let value = text.split('/').next()?;
    match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    }
}

fn action(flag: &str, target: &str, options: &[String]) -> Action {
    let option = |name: &str| options.iter().position(|o| o == name).and_then(|at| options.get(at + 1));
    let port = |name: &str| option(name).and_then(|text| text.parse().ok());
    let known = match target {
        "RETURN" => Some(Action::Return),
        "ACCEPT" => Some(Action::Accept),
        "DROP" => Some(Action::Drop),
        "REDIRECT" => port("--to-ports").map(Action::Redirect),
        "TPROXY" => port("--on-port").map(|port| Action::Tproxy(port, option("--tproxy-mark").and_then(|m| number(m)))),
        "MARK" => option("--set-xmark").and_then(|m| number(m)).map(Action::SetMark),
        "CONNMARK" if options.iter().any(|o| o == "--save-mark") => Some(Action::SaveMark),
        "CONNMARK" if options.iter().any(|o| o == "--restore-mark") => Some(Action::RestoreMark),
        "CT" if options.iter().any(|o| o == "--notrack") => Some(Action::NoTrack),
        "CT" => option("--zone").and_then(|z| z.parse().ok()).map(Action::Zone),
        "LOG" | "NFLOG" | "TRACE" => Some(Action::Nothing),
        "DNAT" | "SNAT" | "MASQUERADE" | "REJECT" | "CONNMARK" | "NOTRACK" | "TEE" | "SET" => None,
        // Targets of extensions have options; chains of users have none.
        chain if options.is_empty() && flag == "-g" => Some(Action::Goto(chain.to_owned())),
        chain if options.is_empty() => Some(Action::Jump(chain.to_owned())),
        _ => None,
    };
    known.unwrap_or_else(|| Action::Other(format!("{target} {}", options.join(" ")).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iptables::Backend;

    #[test]
    fn every_rule_of_ours_is_understood() {
        let config = crate::Config {
            mode: crate::Mode::Tproxy,
            inbound_ports: crate::Selection::All,
            outbound_cidrs: crate::Selection::Only(vec!["10.0.0.0/8".parse().expect("block")]),
            groups: crate::Groups::Only(vec![crate::Owner::id(5), crate::Owner::id(6)]),
            dns: crate::Dns::All,
            drop_invalid: true,
            exclude_interfaces: vec!["net1".into()],
            ..crate::Config::default()
        };
        let set = crate::rules(&config);
        let text = crate::iptables::saved_text(&set, false);
        let tables = tables(&text, Source::Iptables(Backend::Nft), false);
        let rules: Vec<&Rule> = tables.iter().flat_map(|t| &t.chains).flat_map(|c| &c.rules).collect();
        assert_eq!(rules.len(), set.rules.len());
        for rule in rules {
            let text = rule.to_string();
            assert!(!text.contains('[') && rule.actions.len() == 1, "{text}");
        }
    }

    #[test]
    fn rules_of_others_are_not_taken_for_what_they_are_not() {
        let line = "[7:9] -A PREROUTING -m set --match-set x dst -m comment --comment \"a -j b\" -j DNAT --to-destination 1.2.3.4:5";
        let (chain, rule) = read_rule(line).expect("rule");
        assert_eq!((chain.as_str(), rule.packets, rule.bytes), ("PREROUTING", 7, 9));
        assert!(rule.conditions.iter().any(|c| matches!(c.what, What::Other(_))));
        assert_eq!(rule.actions, [Action::Other("DNAT --to-destination 1.2.3.4:5".into())]);
        assert!(read_rule("nonsense").is_none());
    }
}
