//! Policy routing for TPROXY, and the IPv6 passthrough address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netns::{Error, Netlink, Route, RouteKind, Rule, Scope};

use crate::config::{Config, Mode};
use crate::ebpf::SLOTS_V6;
use crate::rules::PASSTHROUGH_V6;

/// Marked packets are delivered here whatever their destination.
fn local_route(v6: bool, table: u32) -> Route {
    let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    // The kernel has no scopes for IPv6.
    let scope = if v6 { Scope::Universe } else { Scope::Host };
    Route { kind: RouteKind::Local, dev: Some("lo".into()), scope, table, ..Route::new(any, 0) }
}

/// The programs' IPv6 addresses are this host's, though no interface has them.
fn slots_route() -> Route {
    const LOCAL_TABLE: u32 = 255;
    Route {
        kind: RouteKind::Local,
        dev: Some("lo".into()),
        table: LOCAL_TABLE,
        // Else it would be the passthrough address, which says that the proxy calls.
        src: Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        ..Route::new(SLOTS_V6.ip, SLOTS_V6.prefix)
    }
}

fn mark_rule(v6: bool, mark: u32, table: u32) -> Rule {
    Rule { v6, fwmark: Some(mark), fwmask: None, table, priority: None }
}

fn existing_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(e) if e.is_exists() => Ok(()),
        other => other,
    }
}

fn missing_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(e) if e.is_missing() => Ok(()),
        other => other,
    }
}

/// Makes addresses, rules and routes as the configuration wants them. Doing it twice changes nothing.
///
/// DIFFERS: Istio adds the policy rule once more on every run.
pub(crate) fn apply(netlink: &mut Netlink, config: &Config) -> Result<(), Error> {
    if config.ipv6 {
        existing_is_fine(netlink.add_addr("lo", PASSTHROUGH_V6, 128))?;
    }
    if config.ipv6 && config.by_sockets {
        existing_is_fine(netlink.add_route(&slots_route()))?;
    }
    if config.mode == Mode::Tproxy && !config.inbound_ports.is_none() {
        for v6 in if config.ipv6 { &[false, true][..] } else { &[false] } {
            existing_is_fine(netlink.add_route(&local_route(*v6, config.tproxy_table)))?;
            existing_is_fine(netlink.add_rule(&mark_rule(*v6, config.tproxy_mark, config.tproxy_table)))?;
        }
    }
    Ok(())
}

/// Removes the IPv6 passthrough address.
pub(crate) fn remove_passthrough(netlink: &mut Netlink) -> Result<(), Error> {
    missing_is_fine(netlink.del_addr("lo", PASSTHROUGH_V6, 128))
}

/// Removes the route of the programs' IPv6 addresses.
pub(crate) fn remove_slots(netlink: &mut Netlink) -> Result<(), Error> {
    // A kernel without IPv6 has no such routes.
    match netlink.routes(true, slots_route().table) {
        Ok(routes) if routes.iter().any(|r| (r.dst, r.prefix) == (SLOTS_V6.ip, SLOTS_V6.prefix)) => {
            missing_is_fine(netlink.del_route(&slots_route()))
        }
        _ => Ok(()),
    }
}

/// Removes what earlier runs left and `keep` no longer wants: for the marks given, and for those of `marks` that were found in live rules.
pub(crate) fn remove_stale(netlink: &mut Netlink, config: &Config, marks: &[u32], keep: bool) -> Result<(), Error> {
    for v6 in [false, true] {
        let wanted = keep && config.mode == Mode::Tproxy && !config.inbound_ports.is_none() && (!v6 || config.ipv6);
        // A kernel without IPv6 has no such rules.
        let Ok(rules) = netlink.rules(v6) else { continue };
        for rule in rules {
            let Some(mark) = rule.fwmark.filter(|m| *m == config.tproxy_mark || marks.contains(m)) else { continue };
            if wanted && (mark, rule.table) == (config.tproxy_mark, config.tproxy_table) {
                continue;
            }
            // Only a rule that leads to a route of our shape is ours.
            let route = local_route(v6, rule.table);
            let routes = netlink.routes(v6, rule.table).unwrap_or_default();
            if rule.table != config.tproxy_table && routes != [route.clone()] {
                continue;
            }
            missing_is_fine(netlink.del_rule(&rule))?;
            if !(wanted && rule.table == config.tproxy_table) && routes.contains(&route) {
                missing_is_fine(netlink.del_route(&route))?;
            }
        }
    }
    Ok(())
}
