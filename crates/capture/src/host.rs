//! What this network namespace is like: its addresses and its name servers.

use std::net::IpAddr;

use netns::{Addr, Netlink};

/// Which families the namespace has addresses in, apart from loopback and link-local ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Addresses {
    /// The first address is IPv6, or, with dual stack, any is.
    pub(crate) ipv6: bool,
    /// The first address is IPv6.
    pub(crate) first_ipv6: bool,
    /// There is an IPv6 address that `ipv6` ignores.
    pub(crate) ipv6_uncaptured: bool,
}

/// Reads the addresses in the kernel's order, which is all IPv4 ones before all IPv6 ones. `None`: there is none.
pub(crate) fn addresses(netlink: &mut Netlink, dual_stack: bool) -> Result<Option<Addresses>, netns::Error> {
    Ok(decide(&usable(netlink.addrs()?), dual_stack))
}

/// Without loopback and link-local addresses; IPv4-mapped ones count as IPv4, as in the reference.
fn usable(all: Vec<Addr>) -> Vec<IpAddr> {
    let local = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    };
    all.into_iter().map(|a| a.ip.to_canonical()).filter(|ip| !local(ip)).collect()
}

/// Every address of this namespace but IPv6 link-local ones, which come and go with their interfaces' state.
pub(crate) fn local_addresses(netlink: &mut Netlink) -> Result<Vec<IpAddr>, netns::Error> {
    let lasts = |ip: &IpAddr| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    Ok(netlink.addrs()?.into_iter().map(|a| a.ip).filter(lasts).collect())
}

fn decide(ips: &[IpAddr], dual_stack: bool) -> Option<Addresses> {
    let first_ipv6 = ips.first()?.is_ipv6();
    let any = ips.iter().any(IpAddr::is_ipv6);
    let ipv6 = first_ipv6 || (dual_stack && any);
    Some(Addresses { ipv6, first_ipv6, ipv6_uncaptured: any && !ipv6 })
}

/// The name servers of a resolver configuration, IPv4 and IPv6.
pub(crate) fn name_servers(resolv_conf: &str) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        // A link-local server carries its interface (`fe80::1%eth0`), which rules cannot hold.
        let address = words.next().filter(|w| *w == "nameserver").and(words.next())?;
        address.split('%').next()?.parse::<IpAddr>().ok()
    };
    resolv_conf.lines().filter_map(server).partition(IpAddr::is_ipv4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_whitespace().map(|ip| ip.parse().expect("address")).collect()
    }

    #[test]
    fn the_first_address_decides_unless_dual_stack() {
        let of = |text: &str, dual| decide(&ips(text), dual).map(|a| (a.ipv6, a.first_ipv6, a.ipv6_uncaptured));
        assert_eq!(of("", false), None);
        assert_eq!(of("10.0.0.1", true), Some((false, false, false)));
        assert_eq!(of("10.0.0.1 fd00::1", false), Some((false, false, true)));
        assert_eq!(of("10.0.0.1 fd00::1", true), Some((true, false, false)));
        assert_eq!(of("fd00::1 10.0.0.1", false), Some((true, true, false)));
    }

    #[test]
    fn loopback_and_link_local_addresses_do_not_count() {
        let addr = |ip: &str| Addr { index: 1, ip: ip.parse().expect("address"), prefix: 24, link_local: false };
        let all = ["127.0.0.1", "169.254.3.4", "::1", "fe80::1", "::ffff:10.0.0.9", "fd00::1"].map(addr).to_vec();
        assert_eq!(usable(all), ips("10.0.0.9 fd00::1"));
    }

    #[test]
    fn name_servers_are_split_by_family() {
        let text =
            "# comment\nnameserver 10.96.0.10\nsearch x\nnameserver fe80::1%eth0\nnameserver bad\noptions nameserver";
        assert_eq!(name_servers(text), (ips("10.96.0.10"), ips("fe80::1")));
    }
}
