//! What the programs are told, and what they count: the maps of `ebpf/outbound.c`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::config::{Cidr, Config, Dns, Groups, Owner, Selection};

/// `struct settings`
pub(super) type Settings = [u8; 24];
/// `struct listed_key`
pub(super) type Listed = [u32; 2];
/// `struct block_key` without its prefix length: kind and address.
pub(super) type Block = [u32; 5];

const UID: u32 = 1;
const GID: u32 = 2;
const GROUP: u32 = 3;
const PORT_EXCLUDED: u32 = 4;
const PORT_CAPTURED: u32 = 5;

const LOCAL: u32 = 1;
const BLOCK_EXCLUDED: u32 = 2;
const BLOCK_CAPTURED: u32 = 3;
const SERVER: u32 = 4;

/// Entries of `listed` and `blocks`, each.
pub(super) const MAX_ENTRIES: usize = 1024;

/// Why a connection goes where it goes, in the order of the programs' questions; each has a counter.
pub(crate) const REASONS: [&str; 13] = [
    "excluded port",
    "the proxy to this pod, to its inbound port",
    "the proxy's own",
    "to this pod itself",
    "group that is not captured",
    "DNS query, to the agent",
    "UDP",
    "loopback",
    "excluded block",
    "captured port, to the proxy",
    "captured block, to the proxy",
    "no rule captures it",
    "original destination told to the proxy",
];

/// Who opens a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The socket is bound to 127.0.0.6 or ::6: the proxy calls the application behind it.
    pub(crate) passthrough: bool,
}

/// Everything the programs know.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tables {
    pub(super) settings: Settings,
    pub(super) listed: BTreeSet<Listed>,
    /// (prefix length, kind and address)
    pub(super) blocks: BTreeSet<(u32, Block)>,
}

/// IPv4 addresses in their mapped form, in network order.
pub(super) fn words(ip: IpAddr) -> [u32; 4] {
    let octets = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    std::array::from_fn(|i| {
        u32::from_ne_bytes([octets[4 * i], octets[4 * i + 1], octets[4 * i + 2], octets[4 * i + 3]])
    })
}

fn block(kind: u32, cidr: Cidr) -> (u32, Block) {
    // The kind is compared whole; before an IPv4 address come 96 bits of the mapped form.
    let bits = 32 + u32::from(cidr.prefix) + if cidr.ip.is_ipv4() { 96 } else { 0 };
    let [a, b, c, d] = words(cidr.network().ip);
    (bits, [kind, a, b, c, d])
}

impl Tables {
    /// `local`: every address of the namespace. Connections to them stay in the pod, as with `-o lo` in the rules.
    pub(crate) fn new(config: &Config, local: &[IpAddr]) -> Self {
        let mut tables = Self::default();
        let ids =
            |kind: u32, owners: &[Owner]| owners.iter().filter_map(|o| o.id).map(|id| [kind, id]).collect::<Vec<_>>();
        let ports = |kind: u32, ports: &[u16]| ports.iter().map(|p| [kind, u32::from(*p)]).collect::<Vec<_>>();
        let (only_groups, groups) = match &config.groups {
            Groups::AllExcept(groups) => (false, groups),
            Groups::Only(groups) => (true, groups),
        };
        tables.listed.extend(ids(UID, &config.proxy_uids));
        tables.listed.extend(ids(GID, &config.proxy_gids));
        tables.listed.extend(ids(GROUP, groups));
        tables.listed.extend(ports(PORT_EXCLUDED, &config.outbound_exclude_ports));
        tables.listed.extend(ports(PORT_CAPTURED, &config.outbound_ports));

        tables.blocks.extend(local.iter().map(|ip| block(LOCAL, Cidr::host(ip.to_canonical()))));
        tables.blocks.extend(config.outbound_exclude_cidrs.iter().map(|c| block(BLOCK_EXCLUDED, *c)));
        let (all_blocks, cidrs) = match &config.outbound_cidrs {
            Selection::All => (true, &[][..]),
            Selection::Only(list) => (false, list.as_slice()),
        };
        tables.blocks.extend(cidrs.iter().map(|c| block(BLOCK_CAPTURED, *c)));
        let dns = match &config.dns {
            Dns::Off => 0,
            Dns::Servers { v4, v6 } => {
                tables.blocks.extend(v4.iter().chain(v6).map(|ip| block(SERVER, Cidr::host(*ip))));
                1
            }
            Dns::All => 2,
        };

        let mask = u32::MAX.checked_shl(32 - u32::from(config.loopback_v4.prefix)).unwrap_or(0);
        let [.., loopback] = words(config.loopback_v4.network().ip);
        let captures_loopback = cidrs.iter().any(|cidr| cidr.ip.is_loopback());
        let out = &mut tables.settings;
        out[0..4].copy_from_slice(&loopback.to_ne_bytes());
        out[4..8].copy_from_slice(&mask.to_be_bytes());
        out[8..10].copy_from_slice(&config.proxy_port.to_ne_bytes());
        out[10..12].copy_from_slice(&config.dns_port.to_ne_bytes());
        out[12..14].copy_from_slice(&config.inbound_port.to_ne_bytes());
        out[14..16].copy_from_slice(&config.tunnel_port.to_ne_bytes());
        out[16..21].copy_from_slice(&[
            dns,
            captures_loopback.into(),
            all_blocks.into(),
            only_groups.into(),
            config.ipv6.into(),
        ]);
        tables
    }

    /// In words, one line a fact, for people.
    pub(crate) fn describe(&self) -> Vec<String> {
        let port = |at: usize| u16::from_ne_bytes([self.settings[at], self.settings[at + 1]]);
        let (dns, all, only, ipv6) =
            (self.settings[16], self.settings[18] != 0, self.settings[19] != 0, self.settings[20] != 0);
        let listed = |kind: u32| self.listed.iter().filter(move |[k, _]| *k == kind).map(|[_, v]| v.to_string());
        let blocks = |kind: u32| {
            self.blocks.iter().filter(move |(_, [k, ..])| *k == kind).map(|(bits, [_, rest @ ..])| {
                let ip = address(*rest).to_canonical();
                format!("{ip}/{}", bits - 32 - if ip.is_ipv4() { 96 } else { 0 })
            })
        };
        let join = |items: &mut dyn Iterator<Item = String>| {
            let text = items.collect::<Vec<_>>().join(", ");
            if text.is_empty() { "none".to_owned() } else { text }
        };
        vec![
            format!("ports left alone: {}", join(&mut listed(PORT_EXCLUDED))),
            format!("users left alone (the proxy): {}", join(&mut listed(UID))),
            format!("groups left alone (the proxy): {}", join(&mut listed(GID))),
            format!("addresses of this pod: {}", join(&mut blocks(LOCAL))),
            match only {
                true => format!("only these groups are captured: {}", join(&mut listed(GROUP))),
                false => format!("other groups left alone: {}", join(&mut listed(GROUP))),
            },
            match dns {
                0 => "DNS: left alone".to_owned(),
                1 => format!("DNS to port {} for the servers: {}", port(10), join(&mut blocks(SERVER))),
                _ => format!("DNS to port {} for every server", port(10)),
            },
            format!("blocks left alone: {}", join(&mut blocks(BLOCK_EXCLUDED))),
            format!("ports captured whatever the address: {}", join(&mut listed(PORT_CAPTURED))),
            match all {
                true => format!("everything else goes to port {}", port(8)),
                false => format!("to port {} go the blocks: {}", port(8), join(&mut blocks(BLOCK_CAPTURED))),
            },
            format!("IPv6: {}", if ipv6 { "as IPv4" } else { "left alone" }),
        ]
    }

    /// What the programs would do with a connection: the port it is led to, and the number of the reason in [`REASONS`]. The same
    /// questions in the same order as `decide` in `ebpf/outbound.c`; a test holds them together.
    pub(crate) fn decide(&self, who: Who, udp: bool, to: SocketAddr) -> (Option<u16>, usize) {
        let ip = to.ip().to_canonical();
        let has = |kind: u32, value: u32| self.listed.contains(&[kind, value]);
        let holds = |kind: u32| {
            let key = words(ip);
            self.blocks.iter().any(|(bits, [k, rest @ ..])| *k == kind && same_prefix(*rest, key, bits - 32))
        };
        let port = |at: usize| u16::from_ne_bytes([self.settings[at], self.settings[at + 1]]);
        let (dns, captures_loopback, all, only) =
            (self.settings[16], self.settings[17] != 0, self.settings[18] != 0, self.settings[19] != 0);
        if ip.is_ipv6() && self.settings[20] == 0 {
            return (None, 11);
        }
        let in_loopback = match ip {
            IpAddr::V4(ip) => {
                let (net, mask) = (&self.settings[0..4], &self.settings[4..8]);
                ip.octets().iter().zip(mask).map(|(o, m)| o & m).eq(net.iter().copied())
            }
            IpAddr::V6(ip) => ip.is_loopback(),
        };
        let local = in_loopback || ip.is_loopback() || holds(LOCAL);
        let query = dns != 0 && to.port() == 53;
        let by_user = has(UID, who.uid);
        if has(PORT_EXCLUDED, to.port().into()) {
            (None, 0)
        } else if by_user || has(GID, who.gid) {
            let again = !udp && local && !in_loopback && !who.passthrough && to.port() != port(14);
            if again && !(by_user && query) { (Some(port(12)), 1) } else { (None, 2) }
        } else if local && !captures_loopback && !query {
            (None, 3)
        } else if has(GROUP, who.gid) != only {
            (None, 4)
        } else if query && (dns == 2 || holds(SERVER)) {
            (Some(port(10)), 5)
        } else if udp {
            (None, 6)
        } else if in_loopback {
            (None, 7)
        } else if holds(BLOCK_EXCLUDED) {
            (None, 8)
        } else if has(PORT_CAPTURED, to.port().into()) {
            (Some(port(8)), 9)
        } else if all || holds(BLOCK_CAPTURED) {
            (Some(port(8)), 10)
        } else {
            (None, 11)
        }
    }
}

fn address(words: [u32; 4]) -> IpAddr {
    let mut octets = [0; 16];
    words.iter().zip(octets.chunks_exact_mut(4)).for_each(|(word, out)| out.copy_from_slice(&word.to_ne_bytes()));
    IpAddr::from(octets)
}

fn same_prefix(a: [u32; 4], b: [u32; 4], bits: u32) -> bool {
    let number = |words: [u32; 4]| match address(words) {
        IpAddr::V6(ip) => u128::from(ip),
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
    };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    number(a) & mask == number(b) & mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_compare_kind_and_prefix() {
        let of = |text: &str| block(BLOCK_CAPTURED, text.parse().expect("block"));
        assert_eq!(of("0.0.0.0/0").0, 128);
        assert_eq!(of("10.1.2.3/8"), of("10.0.0.0/8"));
        assert_eq!(of("fd00::/8").0, 40);
    }

    #[test]
    fn decisions_follow_the_order_of_the_rules() {
        let config = Config {
            outbound_cidrs: Selection::Only(vec!["10.0.0.0/8".parse().expect("block")]),
            outbound_exclude_cidrs: vec!["10.9.0.0/16".parse().expect("block")],
            outbound_ports: vec![9000],
            outbound_exclude_ports: vec![25],
            groups: Groups::AllExcept(vec![Owner::id(202)]),
            dns: Dns::Servers { v4: vec!["10.96.0.10".parse().expect("address")], v6: Vec::new() },
            ipv6: true,
            ..Config::default()
        };
        let tables = Tables::new(&config, &["10.244.0.7".parse().expect("address")]);
        let of = |uid, gid, udp, to: &str| {
            tables.decide(Who { uid, gid, passthrough: false }, udp, to.parse().expect("address"))
        };
        assert_eq!(of(1000, 1000, false, "10.1.1.1:80"), (Some(15001), 10));
        assert_eq!(of(1000, 1000, false, "[::ffff:10.1.1.1]:80"), (Some(15001), 10));
        assert_eq!(of(1000, 1000, false, "10.1.1.1:25"), (None, 0));
        assert_eq!(of(1337, 1000, false, "10.1.1.1:80"), (None, 2));
        assert_eq!(of(1337, 1000, false, "10.244.0.7:80"), (Some(15006), 1));
        assert_eq!(of(1337, 1337, false, "10.244.0.7:15008"), (None, 2));
        assert_eq!(of(1337, 1337, false, "10.244.0.7:53"), (None, 2));
        let who = Who { uid: 1337, gid: 1337, passthrough: true };
        assert_eq!(tables.decide(who, false, "10.244.0.7:80".parse().expect("address")), (None, 2));
        assert_eq!(of(1000, 1000, false, "10.244.0.7:80"), (None, 3));
        assert_eq!(of(1000, 202, false, "10.1.1.1:80"), (None, 4));
        assert_eq!(of(1000, 1000, true, "10.96.0.10:53"), (Some(15053), 5));
        assert_eq!(of(1000, 1000, true, "10.96.0.11:53"), (None, 6));
        assert_eq!(of(1000, 1000, false, "127.0.0.1:53"), (None, 7));
        assert_eq!(of(1000, 1000, false, "10.9.1.1:80"), (None, 8));
        assert_eq!(of(1000, 1000, false, "192.0.2.1:9000"), (Some(15001), 9));
        assert_eq!(of(1000, 1000, false, "[2001:db8::1]:80"), (None, 11));
        assert_eq!(tables.describe().len(), 10);
        assert_eq!(REASONS.len(), 13);
    }
}
