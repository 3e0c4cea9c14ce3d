//! Live rules as the expressions that make them: the way back from what the kernel holds.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::expr::{CMP_GTE, CMP_LTE, CtState, Expr, Op};
use super::set::Verdict;
use super::{L4, Net};
use crate::wire::{self, attributes, find};

/// A part of a live rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Part {
    Known(Expr),
    /// A kind of expression that this program never makes, by the kernel's name for it.
    Unknown(String),
}

/// What a register holds at some point of a rule.
#[derive(Clone, Debug)]
enum Held {
    L4Proto,
    NfProto,
    Iif,
    Oif,
    Uid,
    Gid,
    Mark,
    CtMark,
    CtState,
    /// Offset in the network header, and the mask that was laid over it.
    Network(u32, Option<Vec<u8>>),
    Sport,
    Dport,
    Value(Vec<u8>),
}

/// Reads the expressions of one rule. `elements` gives the keys of a set by its name.
pub(super) fn parts(list: &[u8], v6_table: Option<bool>, elements: &mut dyn FnMut(&str) -> Vec<Vec<u8>>) -> Vec<Part> {
    let mut reader = Reader { held: BTreeMap::new(), v6: v6_table, l4: None, low: None, elements, out: Vec::new() };
    for (_, expr) in attributes(list) {
        let name = find(expr, 1).map(wire::text).unwrap_or_default();
        let data = find(expr, 2).unwrap_or_default();
        if reader.read(&name, data).is_none() {
            reader.out.push(Part::Unknown(name));
        }
    }
    if reader.low.is_some() {
        reader.out.push(Part::Unknown("cmp".to_owned()));
    }
    reader.out
}

struct Reader<'a> {
    held: BTreeMap<u32, Held>,
    v6: Option<bool>,
    l4: Option<L4>,
    /// The first port of a range whose last one has not been read yet.
    low: Option<u16>,
    elements: &'a mut dyn FnMut(&str) -> Vec<Vec<u8>>,
    out: Vec<Part>,
}

/// Registers of four bytes have numbers from 8; 1 to 4 are the old names of every fourth of them.
fn register(data: &[u8], kind: u16) -> Option<u32> {
    let number = find(data, kind).map(wire::be32)?;
    Some(if (1..=4).contains(&number) { 8 + (number - 1) * 4 } else { number })
}

fn number(data: &[u8], kind: u16) -> Option<u32> {
    find(data, kind).map(wire::be32)
}

fn value(data: &[u8], kind: u16) -> Option<&[u8]> {
    find(find(data, kind)?, 1)
}

fn port(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|b| u16::from_be_bytes(*b))
}

impl Reader<'_> {
    fn known(&mut self, expr: Expr) -> Option<()> {
        self.out.push(Part::Known(expr));
        Some(())
    }

    fn load(&mut self, data: &[u8], kind: u16, held: Held) -> Option<()> {
        self.held.insert(register(data, kind)?, held);
        Some(())
    }

    fn read(&mut self, name: &str, data: &[u8]) -> Option<()> {
        match name {
            "counter" => self.known(Expr::Counter),
            "meta" if find(data, 3).is_some() => {
                let from = self.held.get(&register(data, 3)?).cloned();
                match (number(data, 2)?, from?) {
                    (3, Held::Value(bytes)) => self.known(Expr::SetMark(wire::ne32(&bytes))),
                    (3, Held::CtMark) => self.known(Expr::RestoreMark),
                    _ => None,
                }
            }
            "meta" => {
                let held = match number(data, 2)? {
                    3 => Held::Mark,
                    6 => Held::Iif,
                    7 => Held::Oif,
                    10 => Held::Uid,
                    11 => Held::Gid,
                    15 => Held::NfProto,
                    16 => Held::L4Proto,
                    _ => return None,
                };
                self.load(data, 1, held)
            }
            "ct" if find(data, 4).is_some() => {
                let from = self.held.get(&register(data, 4)?).cloned();
                match (number(data, 2)?, from?) {
                    (3, Held::Mark) => self.known(Expr::SaveMark),
                    (17, Held::Value(bytes)) => {
                        let zone = bytes.first_chunk().map(|b| u16::from_ne_bytes(*b))?;
                        self.known(Expr::CtZone(zone))
                    }
                    _ => None,
                }
            }
            "ct" => {
                let held = match number(data, 2)? {
                    0 => Held::CtState,
                    3 => Held::CtMark,
                    _ => return None,
                };
                self.load(data, 1, held)
            }
            "payload" => {
                let held = match (number(data, 2)?, number(data, 3)?, number(data, 4)?) {
                    (1, offset, _) => Held::Network(offset, None),
                    (2, 0, 2) => Held::Sport,
                    (2, 2, 2) => Held::Dport,
                    _ => return None,
                };
                self.load(data, 1, held)
            }
            "bitwise" => {
                let mask = value(data, 4)?.to_vec();
                let held = match self.held.get(&register(data, 1)?)? {
                    Held::Network(offset, None) => Held::Network(*offset, Some(mask)),
                    Held::CtState => {
                        // `ct state` compares with nothing after the mask.
                        self.known(Expr::CtState(CtState::from_bits(wire::ne32(&mask))))?;
                        Held::CtState
                    }
                    _ => return None,
                };
                self.load(data, 2, held)
            }
            "immediate" if number(data, 1) == Some(0) => {
                let verdict = find(find(data, 2)?, 2)?;
                let chain = || find(verdict, 2).map(wire::text);
                let verdict = match number(verdict, 1)? as i32 {
                    0 => Verdict::Drop,
                    1 => Verdict::Accept,
                    -3 => Verdict::Jump(chain()?),
                    -4 => Verdict::Goto(chain()?),
                    -5 => Verdict::Return,
                    _ => return None,
                };
                self.known(Expr::Verdict(verdict))
            }
            "immediate" => self.load(data, 1, Held::Value(value(data, 2)?.to_vec())),
            "redir" => {
                let Held::Value(bytes) = self.held.get(&register(data, 1)?)? else { return None };
                let port = port(bytes)?;
                self.known(Expr::Redirect(port))
            }
            "tproxy" => {
                let Held::Value(bytes) = self.held.get(&register(data, 3)?)? else { return None };
                let port = port(bytes)?;
                self.known(Expr::Tproxy(number(data, 1)? == 10, port))
            }
            "masq" => self.known(Expr::Masquerade),
            "notrack" => self.known(Expr::NoTrack),
            "cmp" => self.compare(data),
            "lookup" => self.lookup(data),
            _ => None,
        }
    }

    fn compare(&mut self, data: &[u8]) -> Option<()> {
        let held = self.held.get(&register(data, 1)?).cloned()?;
        let bytes = value(data, 3)?;
        let op = match number(data, 2)? {
            0 => Op::Eq,
            1 => Op::Ne,
            CMP_GTE if matches!(held, Held::Dport) && self.low.is_none() => {
                self.low = Some(port(bytes)?);
                return Some(());
            }
            CMP_LTE if matches!(held, Held::Dport) => {
                let range = Expr::DportRange(self.l4?, self.low.take()?, port(bytes)?);
                return self.known(range);
            }
            _ => return None,
        };
        let name = || {
            let mut text = wire::text(bytes);
            // No zero at the end: the name goes on in any way.
            if !bytes.contains(&0) {
                text.push('*');
            }
            text
        };
        let expr = match held {
            Held::L4Proto => {
                let l4 = [L4::Tcp, L4::Udp].into_iter().find(|l4| [l4.number()] == bytes)?;
                if op == Op::Ne {
                    return None;
                }
                self.l4 = Some(l4);
                Expr::L4Proto(l4)
            }
            Held::NfProto if op == Op::Eq => {
                let v6 = bytes == [10];
                self.v6 = Some(v6);
                Expr::Ipv6(v6)
            }
            Held::Iif => Expr::Iif(op, name()),
            Held::Oif => Expr::Oif(op, name()),
            Held::Uid => Expr::SkUid(op, vec![wire::ne32(bytes)]),
            Held::Gid => Expr::SkGid(op, vec![wire::ne32(bytes)]),
            Held::Mark => Expr::Mark(op, wire::ne32(bytes)),
            Held::CtMark => Expr::CtMark(op, wire::ne32(bytes)),
            // Told when the mask was read.
            Held::CtState => return (op == Op::Ne && bytes == [0; 4]).then_some(()),
            Held::Sport => Expr::Sport(self.l4?, op, vec![port(bytes)?]),
            Held::Dport => Expr::Dport(self.l4?, op, vec![port(bytes)?]),
            Held::Network(offset, mask) => self.address(offset, mask.as_deref(), op, bytes)?,
            Held::NfProto | Held::Value(_) => return None,
        };
        self.known(expr)
    }

    fn address(&self, offset: u32, mask: Option<&[u8]>, op: Op, bytes: &[u8]) -> Option<Expr> {
        let prefix = match mask {
            Some(mask) => mask.iter().map(|b| b.count_ones()).sum::<u32>(),
            None => bytes.len() as u32 * 8,
        };
        let ip = if self.v6? {
            let mut octets = [0; 16];
            octets.get_mut(..bytes.len())?.copy_from_slice(bytes);
            IpAddr::V6(Ipv6Addr::from(octets))
        } else {
            let mut octets = [0; 4];
            octets.get_mut(..bytes.len())?.copy_from_slice(bytes);
            IpAddr::V4(Ipv4Addr::from(octets))
        };
        let net = Net::new(ip, u8::try_from(prefix).ok()?);
        match (self.v6?, offset) {
            (false, 12) | (true, 8) => Some(Expr::Saddr(op, net)),
            (false, 16) | (true, 24) => Some(Expr::Daddr(op, net)),
            _ => None,
        }
    }

    fn lookup(&mut self, data: &[u8]) -> Option<()> {
        let held = self.held.get(&register(data, 2)?).cloned()?;
        if find(data, 3).is_some() {
            // A map.
            return None;
        }
        let op = if number(data, 5).unwrap_or(0) & 1 == 1 { Op::Ne } else { Op::Eq };
        let keys = (self.elements)(&find(data, 1).map(wire::text)?);
        let ports = || keys.iter().filter_map(|key| port(key)).collect::<Vec<_>>();
        let ids = || keys.iter().map(|key| wire::ne32(key)).collect::<Vec<_>>();
        let expr = match held {
            Held::Sport => Expr::Sport(self.l4?, op, ports()),
            Held::Dport => Expr::Dport(self.l4?, op, ports()),
            Held::Uid => Expr::SkUid(op, ids()),
            Held::Gid => Expr::SkGid(op, ids()),
            _ => return None,
        };
        self.known(expr)
    }
}
