//! Matches and statements, their nft syntax and their kernel form.
//!
//! The kernel's expressions come out in the order and the widths that nft chooses, so that `nft list ruleset` reads them back as
//! they were meant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::set::{Type, Value, Verdict};
use super::{L4, Net};
use crate::wire::Message;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Op {
    Eq,
    Ne,
}

impl Op {
    fn text(self) -> &'static str {
        match self {
            Self::Eq => "",
            Self::Ne => "!= ",
        }
    }

    fn number(self) -> u32 {
        match self {
            Self::Eq => 0,
            Self::Ne => 1,
        }
    }
}

/// Connection tracking states, as a set of bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CtState(u32);

impl CtState {
    pub const INVALID: Self = Self(1);
    pub const RELATED_ESTABLISHED: Self = Self(6);

    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

impl fmt::Display for CtState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(1, "invalid"), (4, "related"), (2, "established"), (8, "new")];
        let set: Vec<_> = names.iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, name)| *name).collect();
        f.write_str(&set.join(","))
    }
}

/// A field that a set or map is looked up with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Field {
    Ipv4Saddr,
    Ipv4Daddr,
    Ipv6Saddr,
    Ipv6Daddr,
    L4Proto,
    /// Destination port of whatever transport protocol.
    Dport,
    Mark,
}

impl Field {
    pub fn data_type(self) -> Type {
        match self {
            Self::Ipv4Saddr | Self::Ipv4Daddr => Type::Ipv4,
            Self::Ipv6Saddr | Self::Ipv6Daddr => Type::Ipv6,
            Self::L4Proto => Type::Protocol,
            Self::Dport => Type::Port,
            Self::Mark => Type::Mark,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Ipv4Saddr => "ip saddr",
            Self::Ipv4Daddr => "ip daddr",
            Self::Ipv6Saddr => "ip6 saddr",
            Self::Ipv6Daddr => "ip6 daddr",
            Self::L4Proto => "meta l4proto",
            Self::Dport => "th dport",
            Self::Mark => "meta mark",
        }
    }
}

/// How destination NAT chooses among several endpoints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pick {
    Random,
    /// One after the other.
    RoundRobin,
}

/// How a packet is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rejection {
    TcpReset,
    /// ICMP or ICMPv6 port unreachable.
    PortUnreachable,
}

/// One match or statement of a rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Expr {
    L4Proto(L4),
    /// IPv4 (`false`) or IPv6 (`true`) packets only.
    Ipv6(bool),
    Iif(Op, String),
    Oif(Op, String),
    Saddr(Op, Net),
    Daddr(Op, Net),
    Sport(L4, Op, Vec<u16>),
    Dport(L4, Op, Vec<u16>),
    /// From the first port to the last one.
    DportRange(L4, u16, u16),
    SkUid(Op, Vec<u32>),
    SkGid(Op, Vec<u32>),
    Mark(Op, u32),
    CtMark(Op, u32),
    CtState(CtState),
    /// The concatenated fields are (not) in a named set.
    InSet(Vec<Field>, Op, String),
    /// The verdict that a named map has for the concatenated fields, if it has one.
    VerdictMap(Vec<Field>, String),
    Counter,
    Verdict(Verdict),
    /// To a port of this host; only in nat chains, after a transport protocol match.
    Redirect(u16),
    Masquerade,
    /// To one of the endpoints, all of one family; only in nat chains, after a transport protocol match.
    Dnat(Vec<SocketAddr>, Pick),
    /// To a local transparent socket, whatever the packet's destination. `true` is IPv6.
    Tproxy(bool, u16),
    SetMark(u32),
    /// `ct mark set meta mark`
    SaveMark,
    /// `meta mark set ct mark`
    RestoreMark,
    CtZone(u16),
    /// Connection tracking does not see the packet; raw hooks only.
    NoTrack,
    Reject(Rejection),
}

impl Expr {
    pub fn jump(chain: impl Into<String>) -> Self {
        Self::Verdict(Verdict::Jump(chain.into()))
    }

    pub fn goto(chain: impl Into<String>) -> Self {
        Self::Verdict(Verdict::Goto(chain.into()))
    }
}

fn list<T: fmt::Display>(values: &[T]) -> String {
    match values {
        [single] => single.to_string(),
        many => format!("{{ {} }}", many.iter().map(T::to_string).collect::<Vec<_>>().join(", ")),
    }
}

fn concat(fields: &[Field]) -> String {
    fields.iter().map(|f| f.text()).collect::<Vec<_>>().join(" . ")
}

fn ip_name(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ip" } else { "ip6" }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::L4Proto(l4) => write!(f, "meta l4proto {l4}"),
            Self::Ipv6(v6) => write!(f, "meta nfproto {}", if *v6 { "ipv6" } else { "ipv4" }),
            Self::Iif(op, name) => write!(f, "iifname {}{name}", op.text()),
            Self::Oif(op, name) => write!(f, "oifname {}{name}", op.text()),
            Self::Saddr(op, net) => write!(f, "{} saddr {}{net}", ip_name(net.ip), op.text()),
            Self::Daddr(op, net) => write!(f, "{} daddr {}{net}", ip_name(net.ip), op.text()),
            Self::Sport(l4, op, ports) => write!(f, "{l4} sport {}{}", op.text(), list(ports)),
            Self::Dport(l4, op, ports) => write!(f, "{l4} dport {}{}", op.text(), list(ports)),
            Self::DportRange(l4, first, last) => write!(f, "{l4} dport {first}-{last}"),
            Self::SkUid(op, ids) => write!(f, "skuid {}{}", op.text(), list(ids)),
            Self::SkGid(op, ids) => write!(f, "skgid {}{}", op.text(), list(ids)),
            Self::Mark(op, mark) => write!(f, "meta mark {}{mark}", op.text()),
            Self::CtMark(op, mark) => write!(f, "ct mark {}{mark}", op.text()),
            Self::CtState(state) => write!(f, "ct state {state}"),
            Self::InSet(fields, op, set) => write!(f, "{} {}@{set}", concat(fields), op.text()),
            Self::VerdictMap(fields, map) => write!(f, "{} vmap @{map}", concat(fields)),
            Self::Counter => f.write_str("counter"),
            Self::Verdict(verdict) => verdict.fmt(f),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::Masquerade => f.write_str("masquerade"),
            Self::Dnat(endpoints, _) if endpoints.len() == 1 => {
                write!(f, "dnat {} to {}", ip_name(endpoints[0].ip()), endpoints[0])
            }
            Self::Dnat(endpoints, pick) => {
                let family = endpoints.first().map_or("ip", |e| ip_name(e.ip()));
                let pick = match pick {
                    Pick::Random => "random",
                    Pick::RoundRobin => "inc",
                };
                write!(f, "dnat {family} to numgen {pick} mod {} map {{ ", endpoints.len())?;
                for (i, endpoint) in endpoints.iter().enumerate() {
                    let comma = if i > 0 { ", " } else { "" };
                    write!(f, "{comma}{i} : {} . {}", endpoint.ip(), endpoint.port())?;
                }
                f.write_str(" }")
            }
            Self::Tproxy(v6, port) => write!(f, "tproxy {} to :{port}", if *v6 { "ip6" } else { "ip" }),
            Self::SetMark(mark) => write!(f, "meta mark set {mark}"),
            Self::SaveMark => f.write_str("ct mark set meta mark"),
            Self::RestoreMark => f.write_str("meta mark set ct mark"),
            Self::CtZone(zone) => write!(f, "ct zone set {zone}"),
            Self::NoTrack => f.write_str("notrack"),
            Self::Reject(Rejection::TcpReset) => f.write_str("reject with tcp reset"),
            Self::Reject(Rejection::PortUnreachable) => f.write_str("reject with icmpx port-unreachable"),
        }
    }
}

/// An anonymous set or map that a rule needs; sent just before it.
pub(super) struct AnonymousSet {
    pub(super) id: u32,
    pub(super) key: Type,
    /// Empty for a plain set.
    pub(super) data: Vec<Type>,
    pub(super) elements: Vec<(Value, Vec<Value>)>,
}

impl AnonymousSet {
    pub(super) fn name(&self) -> &'static str {
        if self.data.is_empty() { "__set%d" } else { "__map%d" }
    }
}

const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
const META_SKGID: u32 = 11;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_STATE: u32 = 0;
const CT_MARK: u32 = 3;
const CT_ZONE: u32 = 17;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
const SPORT_OFFSET: u32 = 0;
/// Comparisons that are no [`Op`]: at most, at least.
pub(super) const CMP_LTE: u32 = 3;
pub(super) const CMP_GTE: u32 = 5;
const DPORT_OFFSET: u32 = 2;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const REG_2: u32 = 2;
/// Registers of four bytes; number 8 is the start of `REG_1`.
const REG32_00: u32 = 8;

/// Writes the expressions of one rule. Remembers what has been matched, since nft writes each protocol dependency once.
pub(super) struct Encoder<'a> {
    pub(super) out: &'a mut Message,
    pub(super) sets: Vec<AnonymousSet>,
    /// Source of set ids, unique in the batch.
    pub(super) next_set: &'a mut u32,
    /// `None` in a table of one family, where the dependency is not needed.
    pub(super) inet: bool,
    l4: Option<u8>,
    nfproto: Option<u8>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(out: &'a mut Message, next_set: &'a mut u32, inet: bool) -> Self {
        Self { out, sets: Vec::new(), next_set, inet, l4: None, nfproto: None }
    }

    pub(super) fn encode(&mut self, expr: &Expr) {
        match expr {
            Expr::L4Proto(l4) => self.need_l4(l4.number()),
            Expr::Ipv6(v6) => {
                let number = if *v6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
                self.meta_load(META_NFPROTO, REG_1);
                self.cmp(Op::Eq, &[number]);
                self.nfproto = Some(number);
            }
            Expr::Iif(op, name) => self.interface(META_IIFNAME, *op, name),
            Expr::Oif(op, name) => self.interface(META_OIFNAME, *op, name),
            Expr::Saddr(op, net) => self.address(*op, *net, 12, 8),
            Expr::Daddr(op, net) => self.address(*op, *net, 16, 24),
            Expr::Sport(l4, op, ports) => self.ports(*l4, SPORT_OFFSET, *op, ports),
            Expr::Dport(l4, op, ports) => self.ports(*l4, DPORT_OFFSET, *op, ports),
            Expr::DportRange(l4, first, last) => {
                self.need_l4(l4.number());
                self.payload(TRANSPORT, DPORT_OFFSET, 2, REG_1);
                self.compare(CMP_GTE, &first.to_be_bytes());
                self.compare(CMP_LTE, &last.to_be_bytes());
            }
            Expr::SkUid(op, ids) => self.ids(META_SKUID, Type::Uid, *op, ids),
            Expr::SkGid(op, ids) => self.ids(META_SKGID, Type::Gid, *op, ids),
            Expr::Mark(op, mark) => {
                self.meta_load(META_MARK, REG_1);
                self.cmp(*op, &mark.to_ne_bytes());
            }
            Expr::CtMark(op, mark) => {
                self.ct_load(CT_MARK);
                self.cmp(*op, &mark.to_ne_bytes());
            }
            Expr::CtState(state) => {
                self.ct_load(CT_STATE);
                self.mask(&state.0.to_ne_bytes());
                self.cmp(Op::Ne, &[0; 4]);
            }
            Expr::InSet(fields, op, set) => {
                self.fields(fields);
                self.lookup(set, None, *op, None);
            }
            Expr::VerdictMap(fields, map) => {
                self.fields(fields);
                self.lookup(map, None, Op::Eq, Some(REG_VERDICT));
            }
            Expr::Counter => self.expr("counter", |m| {
                // Big-endian 64-bit bytes and packets.
                m.attr(1, &[0; 8]).attr(2, &[0; 8]);
            }),
            Expr::Verdict(verdict) => self.expr("immediate", |m| {
                m.be32(1, REG_VERDICT).nest(2, |m| encode_verdict(m, verdict));
            }),
            Expr::Redirect(port) => {
                self.immediate(REG_1, &port.to_be_bytes());
                self.expr("redir", |m| {
                    // NF_NAT_RANGE_PROTO_SPECIFIED
                    m.be32(1, REG_1).be32(3, 2);
                });
            }
            Expr::Masquerade => self.expr("masq", |_| {}),
            Expr::NoTrack => self.expr("notrack", |_| {}),
            Expr::Dnat(endpoints, pick) => self.dnat(endpoints, *pick),
            Expr::Tproxy(v6, port) => {
                self.immediate(REG_1, &port.to_be_bytes());
                let family = if *v6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
                self.expr("tproxy", |m| {
                    m.be32(1, family.into()).be32(3, REG_1);
                });
            }
            Expr::SetMark(mark) => {
                self.immediate(REG_1, &mark.to_ne_bytes());
                self.meta_set(META_MARK);
            }
            Expr::SaveMark => {
                self.meta_load(META_MARK, REG_1);
                self.ct_set(CT_MARK);
            }
            Expr::RestoreMark => {
                self.ct_load(CT_MARK);
                self.meta_set(META_MARK);
            }
            Expr::CtZone(zone) => {
                self.immediate(REG_1, &zone.to_ne_bytes());
                self.ct_set(CT_ZONE);
            }
            Expr::Reject(Rejection::TcpReset) => self.expr("reject", |m| {
                m.be32(1, 1);
            }),
            Expr::Reject(Rejection::PortUnreachable) => self.expr("reject", |m| {
                // NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_PORT_UNREACH
                m.be32(1, 2).u8(2, 1);
            }),
        }
    }

    fn expr(&mut self, name: &str, fill: impl FnOnce(&mut Message)) {
        self.out.nest(LIST_ELEM, |m| {
            m.text(EXPR_NAME, name).nest(EXPR_DATA, fill);
        });
    }

    fn meta_load(&mut self, key: u32, register: u32) {
        self.expr("meta", |m| {
            m.be32(2, key).be32(1, register);
        });
    }

    fn meta_set(&mut self, key: u32) {
        self.expr("meta", |m| {
            m.be32(2, key).be32(3, REG_1);
        });
    }

    fn ct_load(&mut self, key: u32) {
        self.expr("ct", |m| {
            m.be32(2, key).be32(1, REG_1);
        });
    }

    fn ct_set(&mut self, key: u32) {
        self.expr("ct", |m| {
            m.be32(2, key).be32(4, REG_1);
        });
    }

    fn cmp(&mut self, op: Op, value: &[u8]) {
        self.compare(op.number(), value);
    }

    fn compare(&mut self, op: u32, value: &[u8]) {
        self.expr("cmp", |m| {
            m.be32(1, REG_1).be32(2, op).nest(3, |m| {
                m.attr(DATA_VALUE, value);
            });
        });
    }

    fn mask(&mut self, mask: &[u8]) {
        self.expr("bitwise", |m| {
            m.be32(1, REG_1).be32(2, REG_1).be32(3, mask.len() as u32);
            m.nest(4, |m| {
                m.attr(DATA_VALUE, mask);
            });
            m.nest(5, |m| {
                m.attr(DATA_VALUE, &vec![0; mask.len()]);
            });
        });
    }

    fn payload(&mut self, base: u32, offset: u32, len: u32, register: u32) {
        self.expr("payload", |m| {
            m.be32(1, register).be32(2, base).be32(3, offset).be32(4, len);
        });
    }

    fn immediate(&mut self, register: u32, value: &[u8]) {
        self.expr("immediate", |m| {
            m.be32(1, register).nest(2, |m| {
                m.attr(DATA_VALUE, value);
            });
        });
    }

    fn lookup(&mut self, set: &str, id: Option<u32>, op: Op, dreg: Option<u32>) {
        self.expr("lookup", |m| {
            m.text(1, set).be32(2, REG_1);
            if let Some(register) = dreg {
                m.be32(3, register);
            }
            if let Some(id) = id {
                m.be32(4, id);
            }
            if op == Op::Ne {
                m.be32(5, 1);
            }
        });
    }

    fn need_l4(&mut self, number: u8) {
        if self.l4 != Some(number) {
            self.meta_load(META_L4PROTO, REG_1);
            self.cmp(Op::Eq, &[number]);
            self.l4 = Some(number);
        }
    }

    fn need_nfproto(&mut self, number: u8) {
        if self.inet && self.nfproto != Some(number) {
            self.meta_load(META_NFPROTO, REG_1);
            self.cmp(Op::Eq, &[number]);
            self.nfproto = Some(number);
        }
    }

    fn interface(&mut self, key: u32, op: Op, name: &str) {
        const IFNAMSIZ: usize = 16;
        let mut bytes = name.as_bytes().to_vec();
        // A trailing `+` (iptables) or `*` (nft) means any end: then the compared length stops before it.
        match bytes.last() {
            Some(b'+' | b'*') => {
                bytes.pop();
            }
            _ => bytes.resize(IFNAMSIZ.max(bytes.len() + 1), 0),
        }
        self.meta_load(key, REG_1);
        self.cmp(op, &bytes);
    }

    fn address(&mut self, op: Op, net: Net, offset_v4: u32, offset_v6: u32) {
        let (nfproto, offset, mut bytes) = match net.ip {
            IpAddr::V4(ip) => (NFPROTO_IPV4, offset_v4, ip.octets().to_vec()),
            IpAddr::V6(ip) => (NFPROTO_IPV6, offset_v6, ip.octets().to_vec()),
        };
        self.need_nfproto(nfproto);
        let prefix = usize::from(net.prefix).min(bytes.len() * 8);
        // Whole bytes are compared directly, as nft does; other prefixes through a mask.
        if prefix > 0 && prefix.is_multiple_of(8) {
            bytes.truncate(prefix / 8);
            self.payload(NETWORK, offset, bytes.len() as u32, REG_1);
        } else {
            let mask: Vec<u8> =
                (0..bytes.len()).map(|i| !(0xff_u32 >> prefix.saturating_sub(i * 8).min(8)) as u8).collect();
            bytes.iter_mut().zip(&mask).for_each(|(b, m)| *b &= m);
            self.payload(NETWORK, offset, bytes.len() as u32, REG_1);
            self.mask(&mask);
        }
        self.cmp(op, &bytes);
    }

    fn ports(&mut self, l4: L4, offset: u32, op: Op, ports: &[u16]) {
        self.need_l4(l4.number());
        self.payload(TRANSPORT, offset, 2, REG_1);
        match ports {
            [port] => self.cmp(op, &port.to_be_bytes()),
            many => self.anonymous(Type::Port, op, many.iter().map(|p| Value::Port(*p))),
        }
    }

    fn ids(&mut self, key: u32, kind: Type, op: Op, ids: &[u32]) {
        self.meta_load(key, REG_1);
        match ids {
            [id] => self.cmp(op, &id.to_ne_bytes()),
            many => self.anonymous(kind, op, many.iter().map(|id| Value::Number(*id))),
        }
    }

    fn new_set(&mut self, key: Type, data: Vec<Type>, elements: Vec<(Value, Vec<Value>)>) -> (u32, &'static str) {
        *self.next_set += 1;
        let set = AnonymousSet { id: *self.next_set, key, data, elements };
        let answer = (set.id, set.name());
        self.sets.push(set);
        answer
    }

    fn anonymous(&mut self, key: Type, op: Op, values: impl Iterator<Item = Value>) {
        let mut elements: Vec<_> = values.map(|v| (v, Vec::new())).collect();
        elements.sort();
        elements.dedup();
        let (id, name) = self.new_set(key, Vec::new(), elements);
        self.lookup(name, Some(id), op, None);
    }

    fn fields(&mut self, fields: &[Field]) {
        let mut offset = 0;
        for field in fields {
            let register = if offset == 0 { REG_1 } else { REG32_00 + offset };
            match field {
                Field::Ipv4Saddr | Field::Ipv4Daddr => self.need_nfproto(NFPROTO_IPV4),
                Field::Ipv6Saddr | Field::Ipv6Daddr => self.need_nfproto(NFPROTO_IPV6),
                Field::L4Proto | Field::Dport | Field::Mark => {}
            }
            match field {
                Field::Ipv4Saddr => self.payload(NETWORK, 12, 4, register),
                Field::Ipv4Daddr => self.payload(NETWORK, 16, 4, register),
                Field::Ipv6Saddr => self.payload(NETWORK, 8, 16, register),
                Field::Ipv6Daddr => self.payload(NETWORK, 24, 16, register),
                Field::L4Proto => self.meta_load(META_L4PROTO, register),
                Field::Dport => self.payload(TRANSPORT, DPORT_OFFSET, 2, register),
                Field::Mark => self.meta_load(META_MARK, register),
            }
            offset += (field.data_type().len().div_ceil(4)) as u32;
        }
    }

    fn dnat(&mut self, endpoints: &[SocketAddr], pick: Pick) {
        let v6 = endpoints.first().is_some_and(SocketAddr::is_ipv6);
        let address = |e: &SocketAddr| match e.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        // nft gives single values whole registers and packs looked-up ones.
        let port_register = if endpoints.len() == 1 { REG_2 } else { REG32_00 + if v6 { 4 } else { 1 } };
        if let [single] = endpoints {
            self.immediate(REG_1, &address(single));
            self.immediate(port_register, &single.port().to_be_bytes());
        } else {
            let modulus = endpoints.len() as u32;
            let kind = match pick {
                Pick::RoundRobin => 0,
                Pick::Random => 1,
            };
            self.expr("numgen", |m| {
                m.be32(1, REG_1).be32(2, modulus).be32(3, kind).be32(4, 0);
            });
            let elements = endpoints
                .iter()
                .zip(0..)
                .map(|(e, i)| (Value::Number(i), vec![Value::Ip(e.ip()), Value::Port(e.port())]))
                .collect();
            let data = vec![if v6 { Type::Ipv6 } else { Type::Ipv4 }, Type::Port];
            let (id, name) = self.new_set(Type::Integer, data, elements);
            self.lookup(name, Some(id), Op::Eq, Some(REG_1));
        }
        let family = if v6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 };
        self.expr("nat", |m| {
            m.be32(1, 1).be32(2, family.into());
            m.be32(3, REG_1).be32(4, REG_1).be32(5, port_register).be32(6, port_register);
        });
    }
}

pub(super) fn encode_verdict(message: &mut Message, verdict: &Verdict) {
    message.nest(DATA_VERDICT, |m| {
        m.be32(VERDICT_CODE, verdict.code() as u32);
        if let Some(chain) = verdict.chain() {
            m.text(VERDICT_CHAIN, chain);
        }
    });
}
