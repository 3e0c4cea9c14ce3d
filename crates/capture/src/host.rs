//! What this network namespace is like: its addresses and its name servers.

use std::net::IpAddr;

use netns::Netlink;

/// Which families the namespace has addresses in, apart from loopback and link-local ones.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Addresses {
    /// The first address is IPv6, or, with dual stack, any is.
    pub(crate) ipv6: bool,
    /// There is an IPv6 address that `ipv6` ignores.
    pub(crate) ipv6_uncaptured: bool,
}

/// Reads the addresses in the order of the interfaces. `None`: there is none.
pub(crate) fn addresses(netlink: &mut Netlink, dual_stack: bool) -> Result<Option<Addresses>, netns::Error> {
    let usable = |ip: &IpAddr| !ip.is_loopback() && !ip.is_multicast() && !ip.is_unspecified();
    let mut all = netlink.addrs()?;
    all.retain(|a| usable(&a.ip) && !a.link_local);
    all.sort_by_key(|a| (a.index, a.ip.is_ipv6()));
    Ok(decide(&all.iter().map(|a| a.ip).collect::<Vec<_>>(), dual_stack))
}

fn decide(ips: &[IpAddr], dual_stack: bool) -> Option<Addresses> {
    let first = ips.first()?;
    let any = ips.iter().any(IpAddr::is_ipv6);
    let ipv6 = first.is_ipv6() || (dual_stack && any);
    Some(Addresses { ipv6, ipv6_uncaptured: any && !ipv6 })
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
        let of = |text: &str, dual| decide(&ips(text), dual);
        assert_eq!(of("", false), None);
        assert_eq!(of("10.0.0.1", true), Some(Addresses { ipv6: false, ipv6_uncaptured: false }));
        assert_eq!(of("10.0.0.1 fd00::1", false), Some(Addresses { ipv6: false, ipv6_uncaptured: true }));
        assert_eq!(of("10.0.0.1 fd00::1", true), Some(Addresses { ipv6: true, ipv6_uncaptured: false }));
        assert_eq!(of("fd00::1 10.0.0.1", false), Some(Addresses { ipv6: true, ipv6_uncaptured: false }));
    }

    #[test]
    fn name_servers_are_split_by_family() {
        let text =
            "# comment\nnameserver 10.96.0.10\nsearch x\nnameserver fe80::1%eth0\nnameserver bad\noptions nameserver";
        assert_eq!(name_servers(text), (ips("10.96.0.10"), ips("fe80::1")));
    }
}
