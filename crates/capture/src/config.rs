//! What to capture, parsed and checked. Every error names the flag and the value.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// As istio-iptables refuses more (`tools/istio-iptables/pkg/config`, `ValidateOwnerGroups`).
const MAX_OWNER_GROUPS: usize = 64;
/// Longest name that an interface can have (IFNAMSIZ without the final zero).
const MAX_INTERFACE: usize = 15;

/// A value that cannot be used.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{flag} {value:?}: {reason}")]
pub struct Invalid {
    /// Flag (`--proxy-uid`) or environment variable.
    pub flag: &'static str,
    pub value: String,
    pub reason: String,
}

impl Invalid {
    pub(crate) fn new(flag: &'static str, value: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { flag, value: value.into(), reason: reason.into() }
    }
}

/// An address block, printed as the C library prints it, which is how it comes back from iptables.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cidr {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    pub const fn host(ip: IpAddr) -> Self {
        Self { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
    }

    pub fn is_ipv6(&self) -> bool {
        self.ip.is_ipv6()
    }

    /// The block without bits behind the prefix, as the kernel stores it.
    pub fn network(&self) -> Self {
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask))
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
            }
        };
        Self { ip, prefix: self.prefix }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            // Unlike Rust, the C library still writes the obsolete IPv4-compatible addresses with dots.
            IpAddr::V6(ip) if ip.segments()[..6] == [0; 6] && ip.segments()[6] != 0 => {
                let [.., a, b, c, d] = ip.octets();
                write!(f, "::{a}.{b}.{c}.{d}/{}", self.prefix)
            }
            ip => write!(f, "{ip}/{}", self.prefix),
        }
    }
}

impl FromStr for Cidr {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (ip, prefix) = text.split_once('/').ok_or("no prefix length (as in 10.0.0.0/8)")?;
        let ip: IpAddr = ip.parse().map_err(|_| "no IP address before the /")?;
        let plain = prefix.bytes().all(|b| b.is_ascii_digit()) && (prefix == "0" || !prefix.starts_with('0'));
        if prefix.is_empty() || !plain {
            return Err("the prefix length is no number");
        }
        let prefix = prefix.parse().map_err(|_| "the prefix length is too large")?;
        if prefix > if ip.is_ipv4() { 32 } else { 128 } {
            Err("the prefix length is too large")
        } else {
            Ok(Self { ip, prefix })
        }
    }
}

/// A port, or a range of them; printed as iptables prints it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
}

impl Ports {
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Every packet with a port at all.
    pub(crate) fn is_all(self) -> bool {
        (self.first, self.last) == (0, u16::MAX)
    }
}

impl From<u16> for Ports {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}:{}", self.first, self.last) }
    }
}

impl FromStr for Ports {
    type Err = &'static str;

    /// As iptables reads them: `0x` and a leading 0 as in C; without a first port from 0, without a last one to 65535.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // DIFFERS: Istio hands names to iptables, which takes `http` and fails late on `htp`.
        const BAD: &str = "a port is a number from 0 to 65535, a range is two of them as in 8000:8100";
        let number = |text: &str, without: u16| if text.is_empty() { Ok(without) } else { c_number(text).ok_or(BAD) };
        match text.split_once(':') {
            None => c_number(text).map(Self::from).ok_or(BAD),
            Some((first, last)) => match (number(first, 0)?, number(last, u16::MAX)?) {
                (first, last) if first > last => Err("the first port of the range is greater than the last"),
                (first, last) => Ok(Self { first, last }),
            },
        }
    }
}

/// As strtoul with base 0, for 16 bits.
fn c_number(text: &str) -> Option<u16> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    // The standard library would take a second sign.
    if digits.starts_with('+') {
        return None;
    }
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u16::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if digits.starts_with('0') => u16::from_str_radix(digits, 8).ok(),
        None => digits.parse().ok(),
    }
}

/// All, or some; an empty list is none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Selection<T> {
    All,
    Only(Vec<T>),
}

impl<T> Selection<T> {
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Only(list) if list.is_empty())
    }
}

/// A user or group: what was written, and the number it stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Owner {
    pub name: String,
    /// None when no such name is known here; then the rules can be shown but not applied.
    pub id: Option<u32>,
}

impl Owner {
    pub fn id(id: u32) -> Self {
        Self { name: id.to_string(), id: Some(id) }
    }
}

/// How inbound connections come to the proxy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Mode {
    #[default]
    Redirect,
    /// Keeps the client's address: the packet's destination stays, a local socket takes it.
    Tproxy,
}

/// Which groups' outbound traffic is captured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Groups {
    AllExcept(Vec<Owner>),
    Only(Vec<Owner>),
}

/// Which DNS queries go to the agent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Dns {
    #[default]
    Off,
    /// Those to the name servers of the resolver configuration.
    Servers {
        v4: Vec<IpAddr>,
        v6: Vec<IpAddr>,
    },
    All,
}

/// Everything that decides the rules.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Config {
    /// Outbound listener.
    pub proxy_port: u16,
    /// Inbound listener.
    pub inbound_port: u16,
    /// Never captured inbound (HBONE).
    pub tunnel_port: u16,
    pub dns_port: u16,
    pub proxy_uids: Vec<Owner>,
    pub proxy_gids: Vec<Owner>,
    pub mode: Mode,
    pub inbound_ports: Selection<Ports>,
    /// Only with all inbound ports.
    pub inbound_exclude: Vec<Ports>,
    pub outbound_cidrs: Selection<Cidr>,
    pub outbound_exclude_cidrs: Vec<Cidr>,
    /// Captured whatever the address.
    pub outbound_ports: Vec<Ports>,
    pub outbound_exclude_ports: Vec<Ports>,
    /// Interfaces of virtual machines: what comes in there counts as outbound.
    pub virt_interfaces: Vec<String>,
    pub exclude_interfaces: Vec<String>,
    pub groups: Groups,
    pub tproxy_mark: u32,
    pub tproxy_table: u32,
    pub dns: Dns,
    pub drop_invalid: bool,
    pub ipv6: bool,
    /// Inside 127.0.0.0/8.
    pub loopback_v4: Cidr,
    /// Outbound connections are captured when they are made, by eBPF programs, and not by packet rules.
    pub by_sockets: bool,
    /// So are inbound ones, where they come in; else packet rules capture them.
    pub inbound_by_programs: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            proxy_port: 15001,
            inbound_port: 15006,
            tunnel_port: 15008,
            dns_port: 15053,
            proxy_uids: vec![Owner::id(1337)],
            proxy_gids: vec![Owner::id(1337)],
            mode: Mode::Redirect,
            inbound_ports: Selection::Only(Vec::new()),
            inbound_exclude: Vec::new(),
            outbound_cidrs: Selection::Only(Vec::new()),
            outbound_exclude_cidrs: Vec::new(),
            outbound_ports: Vec::new(),
            outbound_exclude_ports: Vec::new(),
            virt_interfaces: Vec::new(),
            exclude_interfaces: Vec::new(),
            groups: Groups::AllExcept(Vec::new()),
            tproxy_mark: 1337,
            tproxy_table: 133,
            dns: Dns::Off,
            drop_invalid: false,
            ipv6: false,
            loopback_v4: Cidr::host(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            by_sockets: false,
            inbound_by_programs: false,
        }
    }
}

impl Config {
    /// The first user, group or owner group that has no number here.
    pub fn unknown_owner(&self) -> Option<Invalid> {
        let (variable, list) = match &self.groups {
            Groups::AllExcept(list) => ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", list),
            Groups::Only(list) => ("ISTIO_OUTBOUND_OWNER_GROUPS", list),
        };
        let groups = list.iter().map(|g| (variable, g));
        let uids = self.proxy_uids.iter().map(|u| ("--proxy-uid", u));
        let gids = self.proxy_gids.iter().map(|g| ("--proxy-gid", g));
        uids.chain(gids).chain(groups).find(|(_, owner)| owner.id.is_none()).map(|(flag, owner)| {
            let kind = if flag == "--proxy-uid" { "user" } else { "group" };
            Invalid::new(flag, &owner.name, format!("no such {kind} here; give its number"))
        })
    }
}

/// The items of a comma list; empty ones are ignored, as the reference does (`split` in its `iptables/capture`).
pub(crate) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

pub(crate) fn port(flag: &'static str, text: &str) -> Result<u16, Invalid> {
    let bad = || Invalid::new(flag, text, "a port is a number from 1 to 65535");
    text.trim().parse().ok().filter(|p| *p > 0).ok_or_else(bad)
}

pub(crate) fn ports(flag: &'static str, text: &str) -> Result<Vec<Ports>, Invalid> {
    items(text).map(|item| item.parse().map_err(|reason: &str| Invalid::new(flag, item, reason))).collect()
}

pub(crate) fn port_selection(flag: &'static str, text: &str) -> Result<Selection<Ports>, Invalid> {
    if text == "*" { Ok(Selection::All) } else { ports(flag, text).map(Selection::Only) }
}

pub(crate) fn cidrs(flag: &'static str, text: &str) -> Result<Selection<Cidr>, Invalid> {
    if text == "*" {
        return Ok(Selection::All);
    }
    let parse = |item: &str| item.parse().map_err(|reason: &str| Invalid::new(flag, item, reason));
    // Unlike ports and names, blocks are read by the reference itself, to which a blank is a fault.
    text.split(',').filter(|item| !item.is_empty()).map(parse).collect::<Result<_, _>>().map(Selection::Only)
}

pub(crate) fn interfaces(flag: &'static str, text: &str) -> Result<Vec<String>, Invalid> {
    let check = |name: &str| {
        let fits = name.len() <= MAX_INTERFACE
            && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'"' | b'\''));
        if fits { Ok(name.to_owned()) } else { Err(Invalid::new(flag, name, "no interface can have this name")) }
    };
    items(text).map(check).collect()
}

/// Loopback blocks are inside 127.0.0.0/8.
pub(crate) fn loopback(flag: &'static str, text: &str) -> Result<Cidr, Invalid> {
    let cidr: Cidr = text.parse().map_err(|reason: &str| Invalid::new(flag, text, reason))?;
    let inside = cidr.prefix >= 8 && matches!(cidr.ip, IpAddr::V4(ip) if ip.is_loopback());
    if inside { Ok(cidr) } else { Err(Invalid::new(flag, text, "a loopback block must be inside 127.0.0.0/8")) }
}

pub(crate) fn nonempty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Looks a name up in `/etc/passwd` or `/etc/group` given as text: `NAME:x:ID:…`.
pub(crate) fn named(name: &str, database: &str) -> Option<u32> {
    let mut entries = database.lines().map(|line| line.split(':').collect::<Vec<_>>());
    entries.find(|fields| fields.first() == Some(&name))?.get(2)?.parse().ok()
}

/// A name or a number.
pub(crate) fn owner(name: &str, database: &str) -> Owner {
    Owner { name: name.to_owned(), id: name.parse().ok().or_else(|| named(name, database)) }
}

pub(crate) fn owners(text: &str, database: &str) -> Vec<Owner> {
    items(text).map(|item| owner(item, database)).collect()
}

/// `include` is `*` or a list; the exclusions count only with `*`.
pub(crate) fn groups(include: &str, exclude: &str, database: &str) -> Result<Groups, Invalid> {
    if include == "*" {
        return Ok(Groups::AllExcept(owners(exclude, database)));
    }
    let all = owners(include, database);
    if all.len() > MAX_OWNER_GROUPS {
        let reason = format!("{} groups; at most {MAX_OWNER_GROUPS} can be given", all.len());
        return Err(Invalid::new("ISTIO_OUTBOUND_OWNER_GROUPS", include, reason));
    }
    Ok(Groups::Only(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_text_and_know_their_network() {
        let cidr: Cidr = "127.0.0.1/8".parse().expect("block");
        assert_eq!(cidr.to_string(), "127.0.0.1/8");
        assert_eq!(cidr.network().to_string(), "127.0.0.0/8");
        assert_eq!("::127.0.0.53/128".parse::<Cidr>().expect("block").to_string(), "::127.0.0.53/128");
        assert_eq!("::1/0".parse::<Cidr>().expect("block").network().to_string(), "::/0");
        for bad in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/", "x/8", "::/129", "10.0.0.0/+8", "10.0.0.0/08", "/8", ""] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_ignore_empty_items_and_name_what_is_wrong() {
        assert_eq!(ports("-d", "15020,6000,,7000,"), Ok([15020, 6000, 7000].map(Ports::from).to_vec()));
        let error = ports("--istio-local-exclude-ports", "80,http").expect_err("a name").to_string();
        assert_eq!(
            error,
            "--istio-local-exclude-ports \"http\": a port is a number from 0 to 65535, a range is two of them as in 8000:8100"
        );
        assert!(ports("-d", "70000").is_err());
        assert_eq!(ports("-d", "0x50,010,+9,0, 443"), Ok([80, 8, 9, 0, 443].map(Ports::from).to_vec()), "as iptables");
        let text = |text| ports("-d", text).map(|ports| ports.iter().map(Ports::to_string).collect::<Vec<_>>());
        assert_eq!(
            text("8000:8100,:80,60000:,5:5,:").expect("ranges"),
            ["8000:8100", "0:80", "60000:65535", "5", "0:65535"]
        );
        for bad in ["9:7", "1:2:3", "a:b", "1-2", "1:70000", "-1:5", "080", "0x", "0x+5", "++5", "*"] {
            assert!(ports("-d", bad).is_err(), "{bad}");
        }
        assert!(interfaces("-c", "a-very-long-interface").is_err());
        for bad in [" *", "10.0.0.0/8, 11.0.0.0/8", "10.0.0.0/8,*"] {
            assert!(cidrs("-i", bad).is_err(), "{bad}");
        }
        assert_eq!(cidrs("-i", ",10.0.0.0/8,,"), cidrs("-i", "10.0.0.0/8"));
        assert!(loopback("L", "127.0.0.1/7").is_err());
        assert!(loopback("L", "10.0.0.0/8").is_err());
    }

    #[test]
    fn names_are_looked_up_and_unknown_ones_reported() {
        let database = "root:x:0:\ngames:x:60:\n";
        assert_eq!(owner("games", database).id, Some(60));
        assert_eq!(owner("202", database).id, Some(202));
        let config = Config { groups: groups("java,202", "", database).expect("groups"), ..Config::default() };
        let error = config.unknown_owner().expect("java").to_string();
        assert_eq!(error, "ISTIO_OUTBOUND_OWNER_GROUPS \"java\": no such group here; give its number");
        let many = (0..65).map(|g| g.to_string()).collect::<Vec<_>>().join(",");
        assert!(groups(&many, "", database).is_err());
    }
}
