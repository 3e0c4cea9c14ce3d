//! rtnetlink: links, addresses, routes and policy rules of one namespace.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

use crate::socket::{Failure, Socket};
use crate::wire::{self, Message, attributes, find};
use crate::{Error, Netns};

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const DELROUTE: u16 = 25;
const GETROUTE: u16 = 26;
const NEWRULE: u16 = 32;
const DELRULE: u16 = 33;
const GETRULE: u16 = 34;

const F_REPLACE: u16 = 0x100;
const F_EXCL: u16 = 0x200;
const F_CREATE: u16 = 0x400;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const INFO_SLAVE_KIND: u16 = 4;
const INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const BRPORT_MODE: u16 = 4;
const BRPORT_ISOLATED: u16 = 33;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
/// Marks routes made by hand, as `ip route add` does.
const RTPROT_BOOT: u8 = 3;

const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;

const IFINFO: usize = 16;
const IFADDR: usize = 8;
const RTMSG: usize = 12;

/// The main routing table.
const TABLE_MAIN: u32 = 254;

/// A network interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub loopback: bool,
    /// Index of the bridge it is a port of.
    pub master: Option<u32>,
    pub mac: Vec<u8>,
    /// `veth`, `bridge`, …; none for physical devices and loopback.
    pub kind: Option<String>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Addr {
    pub index: u32,
    pub ip: IpAddr,
    pub prefix: u8,
    pub link_local: bool,
}

/// How far away a route's destination is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Scope {
    /// Behind a gateway, or anywhere.
    #[default]
    Universe,
    /// On the link itself.
    Link,
    /// On this host.
    Host,
}

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RouteKind {
    #[default]
    Unicast,
    /// Delivered here whatever the address (TPROXY).
    Local,
    Blackhole,
    /// Refused with ICMP host unreachable.
    Unreachable,
}

/// A route. The default route is `0.0.0.0/0` or `::/0`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    pub dst: IpAddr,
    pub prefix: u8,
    pub via: Option<IpAddr>,
    pub dev: Option<String>,
    pub scope: Scope,
    pub kind: RouteKind,
    /// Source address that connections without one of their own take.
    pub src: Option<IpAddr>,
    /// Routing table; 254 is the main one.
    pub table: u32,
}

impl Route {
    /// A route of the main table without gateway or device.
    pub fn new(dst: IpAddr, prefix: u8) -> Self {
        Self {
            dst,
            prefix,
            via: None,
            dev: None,
            scope: Scope::Universe,
            kind: RouteKind::Unicast,
            src: None,
            table: TABLE_MAIN,
        }
    }

    /// The default route of the gateway's family.
    pub fn default_via(via: IpAddr) -> Self {
        let any = if via.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        Self { via: Some(via), ..Self::new(any, 0) }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RouteKind::Unicast => {}
            RouteKind::Local => f.write_str("local ")?,
            RouteKind::Blackhole => f.write_str("blackhole ")?,
            RouteKind::Unreachable => f.write_str("unreachable ")?,
        }
        write!(f, "{}/{}", self.dst, self.prefix)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(dev) = &self.dev {
            write!(f, " dev {dev}")?;
        }
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

/// A policy rule: packets with a mark look in a table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rule {
    pub v6: bool,
    pub fwmark: Option<u32>,
    pub fwmask: Option<u32>,
    pub table: u32,
    /// The kernel chooses one when there is none.
    pub priority: Option<u32>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(mark) = self.fwmark {
            write!(f, "fwmark {mark:#x} ")?;
        }
        write!(f, "lookup {}{}", self.table, if self.v6 { " (IPv6)" } else { "" })
    }
}

/// An rtnetlink socket. It stays in the namespace it was opened in.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// In the namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Socket::open(libc::NETLINK_ROUTE)
            .map(|socket| Self { socket })
            .map_err(|e| Error::io("open an rtnetlink socket", e))
    }

    /// In another namespace.
    pub fn open_in(ns: &Netns) -> Result<Self, Error> {
        ns.run(Self::open).map_err(|e| Error::io("enter a network namespace", e))?
    }

    /// Sets `lo` up.
    pub fn loopback_up(&mut self) -> Result<(), Error> {
        self.set_up("lo")
    }

    /// A bridge without spanning tree.
    ///
    /// Where br_netfilter is loaded, set `net.bridge.bridge-nf-call-iptables` (and `-ip6tables`) to 0 in the namespace: otherwise
    /// destination NAT happens while a packet is still being bridged, and packets between isolated ports are lost.
    pub fn add_bridge(&mut self, name: &str) -> Result<(), Error> {
        let mut message = link_message(0, 0, 0, F_CREATE | F_EXCL);
        message.text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |m| {
            m.text(INFO_KIND, "bridge");
        });
        self.change(message, || format!("add bridge {name}"))
    }

    /// A veth pair: `name` here, `peer` in `peer_ns`.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_ns: &Netns) -> Result<(), Error> {
        let mut message = link_message(0, 0, 0, F_CREATE | F_EXCL);
        message.text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, |m| {
            m.text(INFO_KIND, "veth").nest(INFO_DATA, |m| {
                m.nest(VETH_INFO_PEER, |m| {
                    m.raw(&[0; IFINFO]).text(IFLA_IFNAME, peer).u32(IFLA_NET_NS_FD, peer_ns.as_fd().as_raw_fd() as u32);
                });
            });
        });
        self.change(message, || format!("add veth {name} with peer {peer}"))
    }

    /// Removes an interface; a veth's peer goes with it.
    pub fn del_link(&mut self, name: &str) -> Result<(), Error> {
        let index = self.index(name)?;
        self.change(link_message_of(DELLINK, index, 0, 0, 0), || format!("delete {name}"))
    }

    pub fn set_up(&mut self, name: &str) -> Result<(), Error> {
        let index = self.index(name)?;
        let up = libc::IFF_UP as u32;
        self.change(link_message(index, up, up, 0), || format!("set {name} up"))
    }

    pub fn set_down(&mut self, name: &str) -> Result<(), Error> {
        let index = self.index(name)?;
        self.change(link_message(index, 0, libc::IFF_UP as u32, 0), || format!("set {name} down"))
    }

    /// Makes `name` a port of the bridge `master`.
    pub fn set_master(&mut self, name: &str, master: &str) -> Result<(), Error> {
        let (index, bridge) = (self.index(name)?, self.index(master)?);
        let mut message = link_message(index, 0, 0, 0);
        message.u32(IFLA_MASTER, bridge);
        self.change(message, || format!("make {name} a port of {master}"))
    }

    /// Flags of a bridge port: `isolated` ports exchange frames only with ports that are not; `hairpin` lets a frame leave
    /// through the port it came in by.
    pub fn set_bridge_port(&mut self, name: &str, isolated: bool, hairpin: bool) -> Result<(), Error> {
        let index = self.index(name)?;
        let mut message = link_message(index, 0, 0, 0);
        message.nest(IFLA_LINKINFO, |m| {
            m.text(INFO_SLAVE_KIND, "bridge").nest(INFO_SLAVE_DATA, |m| {
                m.u8(BRPORT_ISOLATED, isolated.into()).u8(BRPORT_MODE, hairpin.into());
            });
        });
        self.change(message, || format!("set bridge port flags of {name}"))
    }

    pub fn set_mac(&mut self, name: &str, mac: [u8; 6]) -> Result<(), Error> {
        let index = self.index(name)?;
        let mut message = link_message(index, 0, 0, 0);
        message.attr(IFLA_ADDRESS, &mac);
        self.change(message, || format!("set the hardware address of {name}"))
    }

    /// In bytes.
    pub fn set_mtu(&mut self, name: &str, mtu: u32) -> Result<(), Error> {
        let index = self.index(name)?;
        let mut message = link_message(index, 0, 0, 0);
        message.u32(IFLA_MTU, mtu);
        self.change(message, || format!("set the MTU of {name} to {mtu}"))
    }

    /// Gives an interface an address. IPv6 addresses work at once (no duplicate address detection).
    pub fn add_addr(&mut self, dev: &str, ip: IpAddr, prefix: u8) -> Result<(), Error> {
        let message = self.addr_message(NEWADDR, F_CREATE | F_EXCL, dev, ip, prefix)?;
        self.change(message, || format!("add address {ip}/{prefix} to {dev}"))
    }

    pub fn del_addr(&mut self, dev: &str, ip: IpAddr, prefix: u8) -> Result<(), Error> {
        let message = self.addr_message(DELADDR, 0, dev, ip, prefix)?;
        self.change(message, || format!("delete address {ip}/{prefix} from {dev}"))
    }

    fn addr_message(&mut self, kind: u16, flags: u16, dev: &str, ip: IpAddr, prefix: u8) -> Result<Message, Error> {
        let index = self.index(dev)?;
        let mut message = Message::new(kind, flags);
        let [a, b, c, d] = index.to_ne_bytes();
        message.raw(&[family(ip), prefix, 0, 0, a, b, c, d]);
        let bytes = octets(ip);
        message.attr(IFA_LOCAL, &bytes).attr(IFA_ADDRESS, &bytes);
        if ip.is_ipv6() {
            message.u32(IFA_FLAGS, IFA_F_NODAD);
        }
        Ok(message)
    }

    /// Fails with [`Error::is_exists`] when the same destination has a route already.
    pub fn add_route(&mut self, route: &Route) -> Result<(), Error> {
        let message = self.route_message(NEWROUTE, F_CREATE | F_EXCL, route)?;
        self.change(message, || format!("add route {route}"))
    }

    /// Adds a route or puts it in the place of the one with the same destination.
    pub fn replace_route(&mut self, route: &Route) -> Result<(), Error> {
        let message = self.route_message(NEWROUTE, F_CREATE | F_REPLACE, route)?;
        self.change(message, || format!("replace route {route}"))
    }

    pub fn del_route(&mut self, route: &Route) -> Result<(), Error> {
        let message = self.route_message(DELROUTE, 0, route)?;
        self.change(message, || format!("delete route {route}"))
    }

    fn route_message(&mut self, kind: u16, flags: u16, route: &Route) -> Result<Message, Error> {
        let dev = route.dev.as_deref().map(|dev| self.index(dev)).transpose()?;
        let scope = match route.scope {
            Scope::Universe => 0,
            Scope::Link => 253,
            Scope::Host => 254,
        };
        let what = match route.kind {
            RouteKind::Unicast => 1,
            RouteKind::Local => 2,
            RouteKind::Blackhole => 6,
            RouteKind::Unreachable => 7,
        };
        let small_table = u8::try_from(route.table).unwrap_or(0);
        let mut message = Message::new(kind, flags);
        message.raw(&[family(route.dst), route.prefix, 0, 0, small_table, RTPROT_BOOT, scope, what, 0, 0, 0, 0]);
        if route.prefix > 0 {
            message.attr(RTA_DST, &octets(route.dst));
        }
        if let Some(via) = route.via {
            message.attr(RTA_GATEWAY, &octets(via));
        }
        if let Some(index) = dev {
            message.u32(RTA_OIF, index);
        }
        if let Some(src) = route.src {
            message.attr(RTA_PREFSRC, &octets(src));
        }
        message.u32(RTA_TABLE, route.table);
        Ok(message)
    }

    /// Fails with [`Error::is_exists`] when there is the same rule already, whatever its priority: the kernel itself would add a
    /// second one that does nothing.
    pub fn add_rule(&mut self, rule: &Rule) -> Result<(), Error> {
        let same = |r: &Rule| {
            (r.table, r.fwmark) == (rule.table, rule.fwmark) && rule.priority.is_none_or(|p| r.priority == Some(p))
        };
        if self.rules(rule.v6)?.iter().any(same) {
            return Err(Error::new(format!("add rule {rule}"), Failure { errno: libc::EEXIST, ..Failure::default() }));
        }
        self.change(rule_message(NEWRULE, F_CREATE | F_EXCL, rule), || format!("add rule {rule}"))
    }

    /// Removes one such rule.
    pub fn del_rule(&mut self, rule: &Rule) -> Result<(), Error> {
        self.change(rule_message(DELRULE, 0, rule), || format!("delete rule {rule}"))
    }

    /// All interfaces in the kernel's order.
    pub fn links(&mut self) -> Result<Vec<Link>, Error> {
        let mut message = Message::new(GETLINK, 0);
        message.raw(&[0; IFINFO]);
        self.socket.dump(&message, link).map_err(|e| Error::new("list links", e))
    }

    /// All addresses, ordered by family, then interface.
    pub fn addrs(&mut self) -> Result<Vec<Addr>, Error> {
        let mut message = Message::new(GETADDR, 0);
        message.raw(&[0; IFADDR]);
        self.socket.dump(&message, addr).map_err(|e| Error::new("list addresses", e))
    }

    /// The routes of one table; devices are given by name.
    pub fn routes(&mut self, v6: bool, table: u32) -> Result<Vec<Route>, Error> {
        let links = self.links()?;
        let mut message = Message::new(GETROUTE, 0);
        let mut header = [0; RTMSG];
        header[0] = af(v6);
        message.raw(&header);
        let all = self.socket.dump(&message, |body| route(body, &links)).map_err(|e| Error::new("list routes", e))?;
        Ok(all.into_iter().filter(|r| r.table == table && r.dst.is_ipv6() == v6).collect())
    }

    /// The policy rules of one family, in the order of their priority.
    pub fn rules(&mut self, v6: bool) -> Result<Vec<Rule>, Error> {
        let mut message = Message::new(GETRULE, 0);
        let mut header = [0; RTMSG];
        header[0] = af(v6);
        message.raw(&header);
        self.socket.dump(&message, rule).map_err(|e| Error::new("list rules", e))
    }

    /// One interface by name.
    pub fn link(&mut self, name: &str) -> Result<Link, Error> {
        let mut message = Message::new(GETLINK, 0);
        message.raw(&[0; IFINFO]).text(IFLA_IFNAME, name);
        let answer = self.socket.query(message).map_err(|e| Error::new(format!("find interface {name}"), e))?;
        let gone =
            || Error::new(format!("find interface {name}"), Failure { errno: libc::ENODEV, ..Failure::default() });
        answer.as_deref().and_then(link).ok_or_else(gone)
    }

    fn index(&mut self, name: &str) -> Result<u32, Error> {
        self.link(name).map(|link| link.index)
    }

    fn change(&mut self, message: Message, operation: impl FnOnce() -> String) -> Result<(), Error> {
        self.socket.request(message).map_err(|e| Error::new(operation(), e))
    }
}

fn link_message(index: u32, flags: u32, change: u32, request: u16) -> Message {
    link_message_of(NEWLINK, index, flags, change, request)
}

fn link_message_of(kind: u16, index: u32, flags: u32, change: u32, request: u16) -> Message {
    let mut message = Message::new(kind, request);
    let mut header = [0; IFINFO];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    message.raw(&header);
    message
}

fn rule_message(kind: u16, flags: u16, rule: &Rule) -> Message {
    let mut message = Message::new(kind, flags);
    let small_table = u8::try_from(rule.table).unwrap_or(0);
    message.raw(&[af(rule.v6), 0, 0, 0, small_table, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0]);
    if let Some(mark) = rule.fwmark {
        message.u32(FRA_FWMARK, mark);
    }
    if let Some(mask) = rule.fwmask {
        message.u32(FRA_FWMASK, mask);
    }
    if let Some(priority) = rule.priority {
        message.u32(FRA_PRIORITY, priority);
    }
    message.u32(FRA_TABLE, rule.table);
    message
}

fn link(body: &[u8]) -> Option<Link> {
    let (header, rest) = body.split_at_checked(IFINFO)?;
    let flags = wire::ne32(&header[8..]);
    Some(Link {
        index: wire::ne32(&header[4..]),
        name: find(rest, IFLA_IFNAME).map(wire::text)?,
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        master: find(rest, IFLA_MASTER).map(wire::ne32),
        mac: find(rest, IFLA_ADDRESS).unwrap_or_default().to_vec(),
        kind: find(rest, IFLA_LINKINFO).and_then(|info| find(info, INFO_KIND)).map(wire::text),
    })
}

fn addr(body: &[u8]) -> Option<Addr> {
    const LINK: u8 = 253;
    let (header, rest) = body.split_at_checked(IFADDR)?;
    // IPv4 puts the own address in LOCAL and a point-to-point peer in ADDRESS; IPv6 mostly has only ADDRESS.
    let bytes = find(rest, IFA_LOCAL).or_else(|| find(rest, IFA_ADDRESS))?;
    Some(Addr { index: wire::ne32(&header[4..]), ip: ip(bytes)?, prefix: header[1], link_local: header[3] == LINK })
}

fn route(body: &[u8], links: &[Link]) -> Option<Route> {
    let (header, rest) = body.split_at_checked(RTMSG)?;
    let v6 = i32::from(header[0]) == libc::AF_INET6;
    let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let mut route = Route::new(any, header[1]);
    route.table = u32::from(header[4]);
    route.scope = match header[6] {
        253 => Scope::Link,
        254 => Scope::Host,
        _ => Scope::Universe,
    };
    route.kind = match header[7] {
        1 => RouteKind::Unicast,
        2 => RouteKind::Local,
        6 => RouteKind::Blackhole,
        7 => RouteKind::Unreachable,
        _ => return None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            RTA_DST => route.dst = ip(value)?,
            RTA_GATEWAY => route.via = ip(value),
            RTA_PREFSRC => route.src = ip(value),
            RTA_TABLE => route.table = wire::ne32(value),
            RTA_OIF => route.dev = links.iter().find(|l| l.index == wire::ne32(value)).map(|l| l.name.clone()),
            _ => {}
        }
    }
    Some(route)
}

fn rule(body: &[u8]) -> Option<Rule> {
    let (header, rest) = body.split_at_checked(RTMSG)?;
    if header[7] != FR_ACT_TO_TBL {
        return None;
    }
    Some(Rule {
        v6: i32::from(header[0]) == libc::AF_INET6,
        fwmark: find(rest, FRA_FWMARK).map(wire::ne32),
        fwmask: find(rest, FRA_FWMASK).map(wire::ne32),
        table: find(rest, FRA_TABLE).map_or(u32::from(header[4]), wire::ne32),
        // The kernel leaves out priority 0 (the local table).
        priority: Some(find(rest, FRA_PRIORITY).map_or(0, wire::ne32)),
    })
}

fn af(v6: bool) -> u8 {
    if v6 { libc::AF_INET6 as u8 } else { libc::AF_INET as u8 }
}

fn family(ip: IpAddr) -> u8 {
    af(ip.is_ipv6())
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
