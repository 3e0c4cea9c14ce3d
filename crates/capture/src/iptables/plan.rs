//! Compares what is there with what is wanted and writes the `iptables-restore --noflush` input that makes up the difference.
//!
//! Ours are the chains named `ISTIO_*` and, in the built-in chains, the rules that lead there or that have the shape of ours (they
//! carry no name). Everything else belongs to others: it is neither changed nor counted as drift.

use std::collections::{BTreeMap, BTreeSet};

use super::{TABLES, restore_line, save_spec};
use crate::rules::RuleSet;

const PREFIX: &str = "ISTIO_";

/// `iptables-save` output: table -> chain -> rules without `-A CHAIN`. User chains are there even when empty.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Saved(BTreeMap<String, BTreeMap<String, Vec<String>>>);

impl Saved {
    pub(super) fn parse(text: &str) -> Self {
        let mut tables: BTreeMap<String, BTreeMap<String, Vec<String>>> = BTreeMap::new();
        let mut table = String::new();
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('*') {
                table = name.trim().to_owned();
                tables.entry(table.clone()).or_default();
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split_whitespace().next().unwrap_or_default();
                tables.entry(table.clone()).or_default().entry(name.to_owned()).or_default();
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
                tables.entry(table.clone()).or_default().entry(chain.to_owned()).or_default().push(rule.to_owned());
            }
        }
        Self(tables)
    }

    fn chains(&self, table: &str) -> impl Iterator<Item = (&str, &Vec<String>)> {
        self.0.get(table).into_iter().flatten().map(|(name, rules)| (name.as_str(), rules))
    }

    fn our_chains(&self, table: &str) -> BTreeMap<&str, &Vec<String>> {
        self.chains(table).filter(|(name, _)| name.starts_with(PREFIX)).collect()
    }

    /// The rules of ours in the chains of others, in order.
    fn our_hooks(&self, table: &str, wanted: &BTreeSet<(&str, String)>) -> Vec<(&str, &str)> {
        let ours = self.our_chains(table);
        let others = || self.chains(table).filter(|(name, _)| !name.starts_with(PREFIX));
        let all: BTreeSet<(&str, &str)> =
            others().flat_map(|(chain, rules)| rules.iter().map(move |r| (chain, r.as_str()))).collect();
        let is_ours = |chain: &str, rule: &str| {
            leads_to_us(rule)
                || (!ours.is_empty() && (mark_rule(rule) || interface_rule(chain, rule, &all)))
                || (!ours.is_empty() && wanted.contains(&(chain, rule.to_owned())))
        };
        others()
            .flat_map(|(chain, rules)| rules.iter().map(move |r| (chain, r.as_str())))
            .filter(|(c, r)| is_ours(c, r))
            .collect()
    }

    /// Where something of ours is: table -> the built-in chains that lead to us.
    pub(super) fn touched(&self) -> BTreeMap<&str, BTreeSet<&str>> {
        let nothing = BTreeSet::new();
        let hooks =
            |table: &str| self.our_hooks(table, &nothing).into_iter().map(|(chain, _)| chain).collect::<BTreeSet<_>>();
        let all = self.0.keys().map(|table| (table.as_str(), hooks(table)));
        all.filter(|(table, hooks)| !hooks.is_empty() || !self.our_chains(table).is_empty()).collect()
    }

    /// The fwmarks of our TPROXY rules, whatever flags they were made with.
    pub(super) fn tproxy_marks(&self) -> Vec<u32> {
        let divert = self.0.get("mangle").and_then(|t| t.get("ISTIO_DIVERT")).into_iter().flatten();
        divert
            .filter_map(|r| r.split_once("--set-xmark 0x")?.1.split('/').next())
            .filter_map(|m| u32::from_str_radix(m, 16).ok())
            .collect()
    }
}

fn leads_to_us(rule: &str) -> bool {
    rule.split_whitespace()
        .collect::<Vec<_>>()
        .windows(2)
        .any(|w| matches!(w[0], "-j" | "-g") && w[1].starts_with(PREFIX))
}

/// The TPROXY rules of OUTPUT and PREROUTING in mangle. Their mark is a flag, their shape is not.
fn mark_rule(rule: &str) -> bool {
    let shape: Vec<&str> =
        rule.split_whitespace().map(|word| if word.starts_with("0x") { "MARK" } else { word }).collect();
    let shape = shape.join(" ");
    shape == "-p tcp -m mark --mark MARK -j CONNMARK --save-mark --nfmask MARK --ctmask MARK"
        || shape == "-p tcp -m connmark --mark MARK -j CONNMARK --restore-mark --nfmask MARK --ctmask MARK"
        || shape == "-o lo -p tcp -m mark --mark MARK -j RETURN"
        || (rule.starts_with("! -d ")
            && rule.contains(" -o lo -p tcp -m owner --")
            && rule.ends_with(" -j MARK --set-xmark 0x53a/0xffffffff"))
}

/// Rules for excluded interfaces come in pairs (in by PREROUTING, out by OUTPUT), those for virtual machines beside a jump to us.
fn interface_rule(chain: &str, rule: &str, all: &BTreeSet<(&str, &str)>) -> bool {
    let name = |flag: &str| rule.strip_prefix(flag)?.strip_suffix(" -j RETURN").filter(|name| !name.contains(' '));
    match chain {
        "PREROUTING" => name("-i ").is_some_and(|name| {
            let comes_in =
                |rule: &str| rule.split_whitespace().collect::<Vec<_>>().windows(2).any(|w| w == ["-i", name]);
            all.contains(&("OUTPUT", &format!("-o {name} -j RETURN")))
                || all.iter().any(|(c, r)| *c == "PREROUTING" && comes_in(r) && leads_to_us(r))
        }),
        "OUTPUT" => name("-o ").is_some_and(|name| all.contains(&("PREROUTING", &format!("-i {name} -j RETURN")))),
        _ => false,
    }
}

/// The input that turns `saved` into `wanted` (nothing, for a clean-up), or `None` when it is so already.
///
/// Each table changes in one transaction: chains of ours are emptied, our rules leave the built-in chains, the new ones come in.
pub(super) fn plan(saved: &Saved, wanted: Option<&RuleSet>, v6: bool) -> Option<String> {
    let mut text = String::new();
    for table in TABLES {
        let rules = wanted.filter(|set| !v6 || set.ipv6).map(|set| set.evaluated(table, Some(v6))).unwrap_or_default();
        let mut chains: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let mut hooks: Vec<(&str, String)> = Vec::new();
        for rule in &rules {
            let name = rule.chain.iptables_name();
            if rule.chain.is_hook() {
                hooks.push((name, save_spec(rule, v6)));
            } else {
                chains.entry(name).or_default().push(save_spec(rule, v6));
            }
        }
        let live = saved.our_chains(table.name());
        let live_hooks = saved.our_hooks(table.name(), &hooks.iter().cloned().collect());
        let same_chains = live.len() == chains.len()
            && chains.iter().all(|(name, rules)| live.get(name).is_some_and(|l| *l == rules));
        if same_chains && same_hooks(&hooks, &live_hooks) {
            continue;
        }
        text.push_str(&format!("*{}\n", table.name()));
        // A declared chain is made, or emptied when it is there.
        let every: BTreeSet<&str> = live.keys().copied().chain(chains.keys().copied()).collect();
        every.iter().for_each(|name| text.push_str(&format!(":{name} - [0:0]\n")));
        live_hooks.iter().for_each(|(chain, rule)| text.push_str(&format!("-D {chain} {rule}\n")));
        for rule in wanted.map(|set| set.rules.iter()).into_iter().flatten() {
            if rule.table == table && rule.families.include(v6) && !rules.is_empty() {
                text.push_str(&restore_line(rule));
                text.push('\n');
            }
        }
        every.iter().filter(|name| !chains.contains_key(*name)).for_each(|name| text.push_str(&format!("-X {name}\n")));
        text.push_str("COMMIT\n");
    }
    (!text.is_empty()).then_some(text)
}

/// Same rules in each built-in chain, in the same order among ours.
fn same_hooks(wanted: &[(&str, String)], live: &[(&str, &str)]) -> bool {
    let of = |chain: &str| wanted.iter().filter(|(c, _)| *c == chain).map(|(_, r)| r.as_str()).collect::<Vec<_>>();
    let there = |chain: &str| live.iter().filter(|(c, _)| *c == chain).map(|(_, r)| *r).collect::<Vec<_>>();
    let chains: BTreeSet<&str> = wanted.iter().map(|(c, _)| *c).chain(live.iter().map(|(c, _)| *c)).collect();
    chains.into_iter().all(|chain| of(chain) == there(chain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Mode, Selection};
    use crate::rules::rules;

    fn config() -> Config {
        Config { inbound_ports: Selection::All, outbound_cidrs: Selection::All, ..Config::default() }
    }

    /// What `iptables-save` prints after the rules were applied beside `others`.
    fn saved(set: &RuleSet, others: &str) -> Saved {
        let mut text = String::new();
        for table in TABLES {
            text.push_str(&format!("*{}\n", table.name()));
            set.chains(table, Some(false))
                .into_iter()
                .for_each(|c| text.push_str(&format!(":{} - [0:0]\n", c.iptables_name())));
            set.evaluated(table, Some(false))
                .into_iter()
                .for_each(|r| text.push_str(&format!("-A {} {}\n", r.chain.iptables_name(), save_spec(r, false))));
            if table.name() == "nat" {
                text.push_str(others);
            }
            text.push_str("COMMIT\n");
        }
        Saved::parse(&text)
    }

    #[test]
    fn the_same_rules_need_no_change_whatever_others_do() {
        for mode in [Mode::Redirect, Mode::Tproxy] {
            let set = rules(&Config {
                mode,
                exclude_interfaces: vec!["net1".into()],
                virt_interfaces: vec!["tap0".into()],
                ..config()
            });
            let others =
                ":KUBE - [0:0]\n-A PREROUTING -i eth9 -j RETURN\n-A KUBE -j RETURN\n-A OUTPUT -p icmp -j ACCEPT\n";
            assert_eq!(plan(&saved(&set, others), Some(&set), false), None);
        }
    }

    #[test]
    fn a_clean_namespace_gets_everything_and_a_clean_up_takes_it_all_back() {
        let set = rules(&Config {
            mode: Mode::Tproxy,
            exclude_interfaces: vec!["net1".into()],
            virt_interfaces: vec!["tap0".into()],
            ..config()
        });
        assert!(
            plan(&Saved::default(), Some(&set), false).is_some_and(|text| text.contains("-A OUTPUT -j ISTIO_OUTPUT\n"))
        );
        assert_eq!(plan(&Saved::default(), None, false), None);
        let others = "-A PREROUTING -i eth9 -j RETURN\n-A OUTPUT -p icmp -j ACCEPT\n";
        let text = plan(&saved(&set, others), None, false).expect("something to clean");
        let deleted = text.lines().filter(|l| l.starts_with("-D")).count();
        let hooks = set.rules.iter().filter(|r| r.chain.is_hook() && r.families.include(false)).count();
        assert_eq!(deleted, hooks);
        assert!(!text.contains("eth9") && !text.contains("icmp") && !text.contains("-A "));
        for chain in ["ISTIO_OUTPUT", "ISTIO_DIVERT", "ISTIO_TPROXY", "ISTIO_INBOUND"] {
            assert!(text.contains(&format!("-X {chain}\n")));
        }
    }

    #[test]
    fn other_flags_replace_only_the_tables_that_differ() {
        let old = rules(&Config { dns: crate::config::Dns::All, ..config() });
        let new = rules(&Config {
            dns: crate::config::Dns::All,
            inbound_ports: Selection::Only(vec![80.into()]),
            ..config()
        });
        let text = plan(&saved(&old, ""), Some(&new), false).expect("a difference");
        assert!(text.contains("*nat\n") && !text.contains("*raw\n") && !text.contains("*mangle\n"));
        assert!(text.contains("-D OUTPUT -j ISTIO_OUTPUT\n") && text.contains(":ISTIO_OUTPUT - [0:0]\n"));
    }
}
