//! What the programs are told, and what they count: the maps of `ebpf/capture.c`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::{self, Cidr, Config, Dns, Groups, Owner, Selection};

/// `struct settings`
pub(super) type Settings = [u8; 40];
/// `struct listed_key`
pub(super) type Listed = [u32; 2];
/// `struct block_key` without its prefix length: kind and address.
pub(super) type Block = [u32; 5];
/// `struct ports`: one bit a port, for each kind in turn.
pub(super) type PortBits = [u64; 3 * PORT_WORDS];
const PORT_WORDS: usize = 1024;
/// `struct place`
pub(super) type Place = [u8; 20];

/// Slots that are filled once and stay.
pub(super) const LASTING: u32 = 1 << 14;
/// The addresses that name slots: 127.128.0.0/10, and for IPv6 this block with the same last 32 bits. A route must lead it here.
pub(crate) const SLOTS_V6: Cidr =
    Cidr { ip: IpAddr::V6(Ipv6Addr::new(0xfd6f, 0x7574, 0x7269, 0x6767, 0x6572, 0, 0, 0)), prefix: 96 };

const UID: u32 = 1;
const GID: u32 = 2;
const GROUP: u32 = 3;

/// Which part of `struct ports`.
const PORT_EXCLUDED: usize = 0;
const PORT_CAPTURED: usize = 1;
const PORT_INBOUND: usize = 2;

const LOCAL: u32 = 1;
const BLOCK_EXCLUDED: u32 = 2;
const BLOCK_CAPTURED: u32 = 3;
const SERVER: u32 = 4;

/// Entries of `listed` and `blocks`, each.
pub(super) const MAX_ENTRIES: usize = 1024;

/// `filled` in `struct settings`.
const MORE_UIDS: u32 = 1;
const MORE_GIDS: u32 = 2;
const GROUPS: u32 = 4;
const MORE_LOCALS: u32 = 8;
const EXCLUDED_BLOCKS: u32 = 16;
const CAPTURED_BLOCKS: u32 = 32;
const EXCLUDED_PORTS: u32 = 64;
const CAPTURED_PORTS: u32 = 128;

/// Why a connection goes where it goes, in the order of the programs' questions; each has a counter.
pub(crate) const REASONS: [&str; 16] = [
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
    "captured port, to the proxy",
    "port that is not captured",
    "dropped: the proxy does not listen",
];
const INBOUND_CAPTURED: usize = 13;
const INBOUND_OTHER: usize = 14;

/// The program that answers so.
pub(crate) fn chain(reason: usize) -> &'static str {
    if reason < INBOUND_CAPTURED { "connect" } else { "inbound" }
}

/// Who opens a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The socket is bound to 127.0.0.6 or ::6: the proxy calls the application behind it.
    pub(crate) passthrough: bool,
}

/// Everything the programs know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Tables {
    pub(super) settings: Settings,
    pub(super) listed: BTreeSet<Listed>,
    /// (prefix length, kind and address)
    pub(super) blocks: BTreeSet<(u32, Block)>,
    pub(super) ports: Ports,
}

impl Default for Tables {
    fn default() -> Self {
        Self { settings: [0; 40], listed: BTreeSet::new(), blocks: BTreeSet::new(), ports: Ports::default() }
    }
}

/// Sets of ports.
#[derive(Clone, Eq, PartialEq)]
pub(super) struct Ports(pub(super) Box<PortBits>);

impl Default for Ports {
    fn default() -> Self {
        Self(Box::new([0; 3 * PORT_WORDS]))
    }
}

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries([PORT_EXCLUDED, PORT_CAPTURED, PORT_INBOUND].map(|kind| self.text(kind))).finish()
    }
}

impl Ports {
    fn place(kind: usize, port: u16) -> (usize, u64) {
        (kind * PORT_WORDS + usize::from(port >> 6), 1 << (port & 63))
    }

    fn has(&self, kind: usize, port: u16) -> bool {
        let (word, bit) = Self::place(kind, port);
        self.0[word] & bit != 0
    }

    fn set(&mut self, kind: usize, range: config::Ports, member: bool) {
        for port in range.first..=range.last {
            let (word, bit) = Self::place(kind, port);
            self.0[word] = if member { self.0[word] | bit } else { self.0[word] & !bit };
        }
    }

    fn any(&self, kind: usize) -> bool {
        self.0[kind * PORT_WORDS..][..PORT_WORDS].iter().any(|word| *word != 0)
    }

    /// `80, 8000:8100`
    fn text(&self, kind: usize) -> String {
        let mut parts = Vec::new();
        let mut first = None;
        for port in 0..=u16::MAX {
            let member = self.has(kind, port);
            let start = *first.get_or_insert(port);
            if !member {
                first = None;
            } else if port == u16::MAX || !self.has(kind, port + 1) {
                parts.push(if start == port { port.to_string() } else { format!("{start}:{port}") });
            }
        }
        if parts.is_empty() { "none".to_owned() } else { parts.join(", ") }
    }
}

/// The first of the addresses that name slots.
pub(crate) fn first_slot(v6: bool) -> IpAddr {
    let slot = Ipv4Addr::from_octets(address_of(0).to_ne_bytes());
    match SLOTS_V6.ip {
        IpAddr::V6(prefix) if v6 => Ipv6Addr::from(u128::from(prefix) | u128::from(u32::from(slot))).into(),
        _ => slot.into(),
    }
}

pub(crate) fn loopback(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

/// What the maps hold for a lasting slot: the last 32 bits of the addresses that name it, in network order.
pub(super) fn address_of(slot: u32) -> u32 {
    (0x7f80_0000 | slot).to_be()
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
        let (only_groups, groups) = match &config.groups {
            Groups::AllExcept(groups) => (false, groups),
            Groups::Only(groups) => (true, groups),
        };
        tables.listed.extend(ids(UID, &config.proxy_uids));
        tables.listed.extend(ids(GID, &config.proxy_gids));
        tables.listed.extend(ids(GROUP, groups));
        let ports = &mut tables.ports;
        config.outbound_exclude_ports.iter().for_each(|range| ports.set(PORT_EXCLUDED, *range, true));
        config.outbound_ports.iter().for_each(|range| ports.set(PORT_CAPTURED, *range, true));
        if config.inbound_by_programs {
            match &config.inbound_ports {
                Selection::All => {
                    ports.set(PORT_INBOUND, config::Ports { first: 0, last: u16::MAX }, true);
                    config.inbound_exclude.iter().for_each(|range| ports.set(PORT_INBOUND, *range, false));
                }
                Selection::Only(list) => list.iter().for_each(|range| ports.set(PORT_INBOUND, *range, true)),
            }
            ports.set(PORT_INBOUND, config.tunnel_port.into(), false);
        }

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
        // What nearly every pod has one of, the programs find in the settings; no user and no group has the number -1.
        let first = |owners: &[Owner]| owners.iter().find_map(|owner| owner.id).unwrap_or(u32::MAX);
        let own: Vec<Ipv4Addr> = local
            .iter()
            .filter_map(|ip| match ip.to_canonical() {
                IpAddr::V4(ip) if !ip.is_loopback() => Some(ip),
                _ => None,
            })
            .collect();
        let [.., own_ip] = words(own.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED).into());
        let filled = [
            (MORE_UIDS, config.proxy_uids.len() > 1),
            (MORE_GIDS, config.proxy_gids.len() > 1),
            (GROUPS, !groups.is_empty()),
            (MORE_LOCALS, own.len() > 1),
            (EXCLUDED_BLOCKS, !config.outbound_exclude_cidrs.is_empty()),
            (CAPTURED_BLOCKS, !cidrs.is_empty()),
            (EXCLUDED_PORTS, tables.ports.any(PORT_EXCLUDED)),
            (CAPTURED_PORTS, tables.ports.any(PORT_CAPTURED)),
        ];
        let filled: u32 = filled.iter().filter(|(_, is)| *is).map(|(bit, _)| bit).sum();
        let numbers = [first(&config.proxy_uids), first(&config.proxy_gids), own_ip, filled];
        for (out, number) in out[24..].chunks_exact_mut(4).zip(numbers) {
            out.copy_from_slice(&number.to_ne_bytes());
        }
        tables
    }

    /// Programs on the pod's interfaces capture what comes in.
    pub(crate) fn captures_inbound(&self) -> bool {
        self.ports.any(PORT_INBOUND)
    }

    pub(crate) fn captures_ipv6(&self) -> bool {
        self.settings[20] != 0
    }

    /// The ports of the proxy that connections are led to.
    pub(crate) fn proxy_ports(&self) -> Vec<u16> {
        let port = |at: usize| u16::from_ne_bytes([self.settings[at], self.settings[at + 1]]);
        [Some(port(8)), self.captures_inbound().then(|| port(12))].into_iter().flatten().collect()
    }

    /// The first user whose connections are left alone.
    pub(crate) fn proxy_user(&self) -> Option<u32> {
        let [.., a, b, c, d] = self.settings[..28] else { return None };
        Some(u32::from_ne_bytes([a, b, c, d])).filter(|uid| *uid != u32::MAX)
    }

    /// What the program on an interface would do with a connection from outside; as [`Tables::decide`].
    pub(crate) fn decide_inbound(&self, to: SocketAddr) -> (Option<u16>, usize) {
        let inbound_port = u16::from_ne_bytes([self.settings[12], self.settings[13]]);
        let captured =
            self.ports.has(PORT_INBOUND, to.port()) && (to.ip().to_canonical().is_ipv4() || self.captures_ipv6());
        if captured { (Some(inbound_port), INBOUND_CAPTURED) } else { (None, INBOUND_OTHER) }
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
            format!("ports left alone: {}", self.ports.text(PORT_EXCLUDED)),
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
            format!("ports captured whatever the address: {}", self.ports.text(PORT_CAPTURED)),
            match all {
                true => format!("everything else goes to port {}", port(8)),
                false => format!("to port {} go the blocks: {}", port(8), join(&mut blocks(BLOCK_CAPTURED))),
            },
            match self.captures_inbound() {
                true => {
                    format!("what comes in goes to port {} for the ports: {}", port(12), self.ports.text(PORT_INBOUND))
                }
                false => "what comes in is left to packet rules".to_owned(),
            },
            format!("IPv6: {}", if ipv6 { "as IPv4" } else { "left alone" }),
        ]
    }

    /// What the programs would do with a connection: the port it is led to, and the number of the reason in [`REASONS`]. The same
    /// questions in the same order as `decide` in `ebpf/capture.c`; a test holds them together.
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
        if self.ports.has(PORT_EXCLUDED, to.port()) {
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
        } else if self.ports.has(PORT_CAPTURED, to.port()) {
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
    fn slots_have_addresses() {
        assert_eq!(first_slot(false).to_string(), "127.128.0.0");
        assert_eq!(first_slot(true).to_string(), "fd6f:7574:7269:6767:6572:0:7f80:0");
    }

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
            outbound_ports: vec![9000.into()],
            outbound_exclude_ports: vec![25.into()],
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
        assert_eq!(tables.describe().len(), 11);
        assert_eq!(tables.proxy_user(), Some(1337));
        assert_eq!(tables.proxy_ports(), [15001]);
    }

    #[test]
    fn inbound_ports_are_all_but_the_excluded_ones_or_those_listed() {
        let of = |inbound_ports, inbound_exclude| {
            let config = Config { inbound_ports, inbound_exclude, inbound_by_programs: true, ..Config::default() };
            Tables::new(&config, &[])
        };
        let all = of(Selection::All, vec![15020.into(), 15021.into()]);
        assert_eq!(all.ports.text(PORT_INBOUND), "0:15007, 15009:15019, 15022:65535");
        assert_eq!(all.proxy_ports(), [15001, 15006]);
        let some = of(Selection::Only(vec![80.into(), 15008.into()]), Vec::new());
        assert_eq!(some.ports.text(PORT_INBOUND), "80");
        let to = |ip: &str| some.decide_inbound(SocketAddr::new(ip.parse().expect("address"), 80)).0;
        assert_eq!([to("10.0.0.1"), to("::ffff:10.0.0.1"), to("fd00::1")], [Some(15006), Some(15006), None]);
        assert_eq!(some.decide_inbound("10.0.0.1:81".parse().expect("address")), (None, INBOUND_OTHER));
    }
}
