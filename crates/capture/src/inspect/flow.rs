//! `capture show`: the live rules as the way that packets take.

use std::fmt::Write;

use super::live::{Action, At, Chain, Table, is_our_chain};
use crate::ebpf::{Live, REASONS};

/// Tables of ours as a tree: each hook, and under it the chains that it leads to, with counters. Others are named only.
pub(crate) fn show(tables: &[Table], programs: &[(String, Live)]) -> String {
    let mut out = String::new();
    for (cgroup, live) in programs {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "eBPF programs on {cgroup}{}", if live.partial { " (incomplete)" } else { "" });
        if !live.interfaces.is_empty() {
            let _ = writeln!(out, "  and on what comes in by {}", live.interfaces.join(", "));
        }
        live.tables.describe().iter().for_each(|line| out.push_str(&format!("  {line}\n")));
        let _ = writeln!(out, "  connections:");
        for ((reason, count), number) in REASONS.iter().zip(&live.counters).zip(1..) {
            let _ = writeln!(out, "  {number:>4} {count:>9}  {reason}");
        }
        out.push('\n');
    }
    for table in tables.iter().filter(|table| table.is_ours()) {
        let _ = writeln!(out, "{}", table.title());
        let mut shown = Vec::new();
        for chain in table.chains.iter().filter(|c| c.hook.is_some() && !c.rules.is_empty()) {
            let from = match chain.hook {
                Some((At::Prerouting, _)) => "what comes in",
                _ => "what leaves",
            };
            let _ = writeln!(out, "  {from}: {}", chain.name);
            tree(&mut out, table, chain, 2, &mut shown);
        }
        for chain in table.chains.iter().filter(|c| is_our_chain(&c.name) && !shown.contains(&c.name.as_str())) {
            let _ = writeln!(out, "  nothing leads to: {}", chain.name);
            tree(&mut out, table, chain, 2, &mut Vec::new());
        }
        out.push('\n');
    }
    let others: Vec<String> = tables
        .iter()
        .filter(|t| !t.is_ours() && t.chains.iter().any(|c| !c.rules.is_empty()))
        .map(Table::title)
        .collect();
    if !others.is_empty() {
        let _ = writeln!(out, "Tables of others: {}", others.join(", "));
    }
    if out.is_empty() {
        out.push_str("No capture: neither rules nor eBPF programs of ours are here.\n");
    }
    out
}

/// One chain; chains that rules lead to are drawn under the first of them.
fn tree<'a>(out: &mut String, table: &'a Table, chain: &'a Chain, depth: usize, shown: &mut Vec<&'a str>) {
    shown.push(&chain.name);
    for (rule, number) in chain.rules.iter().zip(1..) {
        let _ = writeln!(out, "{:indent$}{number:>3} {:>9}  {rule}", "", rule.packets, indent = depth * 2);
        for action in &rule.actions {
            if let Action::Jump(name) | Action::Goto(name) = action
                && !shown.contains(&name.as_str())
                && let Some(next) = table.chain(name)
            {
                tree(out, table, next, depth + 1, shown);
            }
        }
    }
}
