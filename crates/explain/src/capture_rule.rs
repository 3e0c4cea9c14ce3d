//! Whether a connection is redirected to the sidecar at all: the pod's own annotations over Istio's defaults.
//!
//! As the rules that istio-iptables makes of them (`tools/istio-iptables/pkg/capture`): exclusions come before inclusions.

use std::net::{IpAddr, SocketAddr};

use mesh_types::Labels;

use crate::trace::Step;

const PREFIX: &str = "traffic.sidecar.istio.io/";
/// Where redirected connections arrive.
const OUTBOUND_PORT: u16 = 15001;
const INBOUND_PORT: u16 = 15006;
/// The agent's and the proxy's own ports, which no rule redirects.
const OWN_PORTS: [u16; 3] = [15090, 15021, 15020];

/// The rule for a connection that leaves a pod, and whether the sidecar gets it.
pub(crate) fn outbound(annotations: &Labels, destination: SocketAddr) -> (bool, Step) {
    let said = |name: &str| annotations.get(&format!("{PREFIX}{name}")).map(String::as_str);
    let port = destination.port();
    let excluded = [
        (ports(said("excludeOutboundPorts"), port), "excludeOutboundPorts"),
        (ranges(said("excludeOutboundIPRanges"), destination.ip()), "excludeOutboundIPRanges"),
    ];
    let is_local = destination.ip().is_loopback();
    let included = said("includeOutboundIPRanges")
        .is_none_or(|list| list == "*" || ranges(Some(list), destination.ip()))
        || ports(said("includeOutboundPorts"), port);
    decide(destination, excluded, is_local, included, OUTBOUND_PORT)
}

/// The rule for a connection that reaches a pod, and whether the sidecar gets it.
pub(crate) fn inbound(annotations: &Labels, destination: SocketAddr) -> (bool, Step) {
    let said = |name: &str| annotations.get(&format!("{PREFIX}{name}")).map(String::as_str);
    let port = destination.port();
    let excluded = [
        (ports(said("excludeInboundPorts"), port), "excludeInboundPorts"),
        (OWN_PORTS.contains(&port), "the agent's own ports"),
    ];
    let included = said("includeInboundPorts").is_none_or(|list| list == "*" || ports(Some(list), port));
    decide(destination, excluded, false, included, INBOUND_PORT)
}

fn decide(
    destination: SocketAddr,
    excluded: [(bool, &str); 2],
    is_local: bool,
    included: bool,
    to: u16,
) -> (bool, Step) {
    let not = |why: &str| (false, Step::new("capture", format!("{destination} is not redirected: {why}")));
    if let Some((_, rule)) = excluded.iter().find(|(holds, _)| *holds) {
        return not(rule);
    }
    if is_local {
        return not("it is the pod itself");
    }
    if !included {
        return not("it is in no included range or port");
    }
    (true, Step::new("capture", format!("{destination} is redirected to port {to}")))
}

fn ports(list: Option<&str>, port: u16) -> bool {
    list.is_some_and(|list| list.split(',').any(|entry| entry.trim().parse() == Ok(port)))
}

fn ranges(list: Option<&str>, ip: IpAddr) -> bool {
    list.is_some_and(|list| {
        list.split(',').any(|entry| {
            let entry = entry.trim();
            match entry.split_once('/') {
                Some((base, length)) => match (base.parse::<IpAddr>(), length.parse::<u32>()) {
                    (Ok(base), Ok(length)) => in_range(base, length, ip),
                    _ => false,
                },
                None => entry.parse() == Ok(ip),
            }
        })
    })
}

fn in_range(base: IpAddr, length: u32, ip: IpAddr) -> bool {
    let (base, ip, width) = match (base, ip) {
        (IpAddr::V4(base), IpAddr::V4(ip)) => (u128::from(base.to_bits()), u128::from(ip.to_bits()), 32),
        (IpAddr::V6(base), IpAddr::V6(ip)) => (base.to_bits(), ip.to_bits(), 128),
        _ => return false,
    };
    length == 0 || (length <= width && base >> (width - length) == ip >> (width - length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(annotations: &[(&str, &str)], destination: &str) -> bool {
        let annotations = annotations.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect();
        outbound(&annotations, destination.parse().unwrap()).0
    }

    #[test]
    fn exclusions_come_before_inclusions() {
        assert!(captured(&[], "10.0.0.1:80"));
        assert!(!captured(&[("excludeOutboundPorts", "80, 81")], "10.0.0.1:81"));
        assert!(!captured(&[("excludeOutboundIPRanges", "10.0.0.0/8")], "10.0.0.1:80"));
        assert!(!captured(&[("includeOutboundIPRanges", "10.0.0.0/8")], "192.0.2.1:80"));
        assert!(captured(&[("includeOutboundIPRanges", ""), ("includeOutboundPorts", "80")], "192.0.2.1:80"));
        assert!(!captured(&[], "127.0.0.1:80"));
    }
}
