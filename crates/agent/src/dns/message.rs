//! DNS messages, as far as a server for addresses needs them: read one question, write its answer.
//!
//! Everything else (what is forwarded) passes as bytes. Source: RFC 1035 section 4, RFC 6891 for EDNS.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// How long clients may keep our answers, in seconds. Low, because addresses of services change with their entries.
///
/// Source: istio `pkg/dns/client/dns.go`, `defaultTTLInSeconds`.
const TTL: u32 = 30;
/// The UDP size we announce: what fits a frame everywhere (DNS flag day 2020).
const OUR_UDP_SIZE: u16 = 1232;

pub(super) const TYPE_A: u16 = 1;
pub(super) const TYPE_PTR: u16 = 12;
pub(super) const TYPE_AAAA: u16 = 28;
pub(super) const TYPE_CNAME: u16 = 5;
pub(super) const TYPE_SOA: u16 = 6;
pub(super) const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;

/// Response codes.
pub(super) const FORMAT_ERROR: u8 = 1;
pub(super) const SERVER_FAILURE: u8 = 2;
pub(super) const NAME_ERROR: u8 = 3;
pub(super) const NOT_IMPLEMENTED: u8 = 4;

/// A query with one question.
#[derive(Debug)]
pub(super) struct Query<'a> {
    packet: &'a [u8],
    /// Header and question.
    question_end: usize,
    /// Lower case, no trailing dot; `None` if a label has bytes that no host name has.
    pub(super) name: Option<String>,
    pub(super) kind: u16,
    class: u16,
    /// The UDP size the client takes, if it speaks EDNS.
    edns: Option<u16>,
}

/// A packet that is no query we can read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Unreadable {
    /// Not even a header, or itself a response: no answer at all, or two servers could answer each other for ever.
    Silent,
    /// To be answered with this code.
    Code(u8),
}

/// One record to answer with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Record<'a> {
    Address(IpAddr),
    Pointer(&'a str),
}

impl<'a> Query<'a> {
    /// Reads a packet.
    pub(super) fn parse(packet: &'a [u8]) -> Result<Query<'a>, Unreadable> {
        if packet.len() < 12 || packet[2] & 0x80 != 0 {
            return Err(Unreadable::Silent);
        }
        if packet[2] & 0x78 != 0 {
            return Err(Unreadable::Code(NOT_IMPLEMENTED));
        }
        let bad = Unreadable::Code(FORMAT_ERROR);
        let count = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        if count(4) != 1 {
            return Err(bad);
        }
        let (name, mut at) = read_name(packet, 12).ok_or(bad)?;
        let kind = read_u16(packet, at).ok_or(bad)?;
        let class = read_u16(packet, at + 2).ok_or(bad)?;
        at += 4;
        let question_end = at;
        let mut edns = None;
        for _ in 0..u32::from(count(6)) + u32::from(count(8)) + u32::from(count(10)) {
            at = skip_name(packet, at).ok_or(bad)?;
            let record = read_u16(packet, at).ok_or(bad)?;
            let value = read_u16(packet, at + 2).ok_or(bad)?;
            let length = read_u16(packet, at + 8).ok_or(bad)?;
            if record == TYPE_OPT {
                edns = Some(value);
            }
            at += 10 + usize::from(length);
            if at > packet.len() {
                return Err(bad);
            }
        }
        Ok(Query { packet, question_end, name, kind, class, edns })
    }

    /// Whether it asks for Internet names, as all do but curiosities.
    pub(super) fn is_internet(&self) -> bool {
        self.class == CLASS_IN
    }

    /// How long an answer over UDP may be.
    pub(super) fn udp_limit(&self) -> usize {
        usize::from(self.edns.unwrap_or(512).max(512))
    }

    /// The answer: an alias if there is one, then records; what does not fit `limit` is left out and the client told so.
    pub(super) fn answer(&self, alias_of: Option<&str>, records: &[Record<'_>], limit: usize) -> Vec<u8> {
        let opt = if self.edns.is_some() { 11 } else { 0 };
        let mut out = self.header(0, true);
        let mut count: u16 = 0;
        let mut truncated = false;
        // Names of records point back at the question (offset 12), or behind an alias at the alias's target.
        let mut owner: u16 = 0xc00c;
        if let Some(target) = alias_of {
            let start = out.len();
            write_head(&mut out, owner, TYPE_CNAME);
            let data = out.len() + 2;
            write_data(&mut out, |out| write_name(out, target));
            owner = 0xc000 | data as u16; // within the first few hundred bytes
            if out.len() + opt > limit {
                out.truncate(start);
                truncated = true;
            } else {
                count += 1;
            }
        }
        for record in records {
            if truncated {
                break;
            }
            let start = out.len();
            match record {
                Record::Address(IpAddr::V4(ip)) => {
                    write_head(&mut out, owner, TYPE_A);
                    write_data(&mut out, |out| out.extend_from_slice(&ip.octets()));
                }
                Record::Address(IpAddr::V6(ip)) => {
                    write_head(&mut out, owner, TYPE_AAAA);
                    write_data(&mut out, |out| out.extend_from_slice(&ip.octets()));
                }
                Record::Pointer(name) => {
                    write_head(&mut out, owner, TYPE_PTR);
                    write_data(&mut out, |out| write_name(out, name));
                }
            }
            if out.len() + opt > limit {
                out.truncate(start);
                truncated = true;
            } else {
                count += 1;
            }
        }
        out[6..8].copy_from_slice(&count.to_be_bytes());
        if truncated {
            out[2] |= 0x02;
        }
        self.write_opt(&mut out);
        out
    }

    /// An answer without records and with this code.
    pub(super) fn failure(&self, code: u8) -> Vec<u8> {
        let mut out = self.header(code, false);
        self.write_opt(&mut out);
        out
    }

    /// Whether `response` answers this query: same id, same question.
    pub(super) fn is_answered_by(&self, response: &[u8]) -> bool {
        response.len() >= 12
            && response[..2] == self.packet[..2]
            && response[2] & 0x80 != 0
            // Servers that cannot read the question may leave it out.
            && (response[4..6] == [0, 0] || response.get(12..self.question_end).is_some_and(|q| q.eq_ignore_ascii_case(&self.packet[12..self.question_end])))
    }

    fn header(&self, code: u8, authoritative: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        out.extend_from_slice(&self.packet[..self.question_end]);
        let recursion_desired = self.packet[2] & 0x01;
        out[2] = 0x80 | recursion_desired | if authoritative { 0x04 } else { 0 };
        out[3] = 0x80 | code; // recursion is available: others answer what we do not know
        out[6..12].fill(0);
        out
    }

    fn write_opt(&self, out: &mut Vec<u8>) {
        if self.edns.is_some() {
            out.push(0);
            out.extend_from_slice(&TYPE_OPT.to_be_bytes());
            out.extend_from_slice(&OUR_UDP_SIZE.to_be_bytes());
            out.extend_from_slice(&[0; 6]);
            out[10..12].copy_from_slice(&1u16.to_be_bytes());
        }
    }
}

/// A refusal of a packet that could not be read, as far as its header goes.
pub(super) fn refuse(packet: &[u8], code: u8) -> Vec<u8> {
    let mut out = packet[..12.min(packet.len())].to_vec();
    out.resize(12, 0);
    out[2] = 0x80 | (out[2] & 0x79);
    out[3] = 0x80 | code;
    out[4..12].fill(0);
    out
}

/// One record of a packet, by places in it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct RecordAt {
    pub(super) kind: u16,
    pub(super) ttl: u32,
    pub(super) ttl_at: usize,
    pub(super) data: Range<usize>,
}

/// All records behind the questions of a packet, in order; `None` if it cannot be read to its end.
pub(super) fn records(packet: &[u8]) -> Option<Vec<RecordAt>> {
    let count = |at: usize| read_u16(packet, at).map(usize::from);
    let mut at = 12;
    for _ in 0..count(4)? {
        at = skip_name(packet, at)? + 4;
    }
    let mut found = Vec::new();
    for _ in 0..count(6)? + count(8)? + count(10)? {
        at = skip_name(packet, at)?;
        let (kind, ttl_at) = (read_u16(packet, at)?, at + 4);
        let ttl = u32::from_be_bytes(packet.get(ttl_at..ttl_at + 4)?.try_into().ok()?);
        let data = at + 10..at + 10 + usize::from(read_u16(packet, at + 8)?);
        at = data.end;
        packet.get(data.clone())?;
        found.push(RecordAt { kind, ttl, ttl_at, data });
    }
    Some(found)
}

/// The possibly compressed name at a place of a packet, without the trailing dot.
pub(super) fn name_at(packet: &[u8], mut at: usize) -> Option<String> {
    let mut labels: Vec<String> = Vec::new();
    // More parts than a name of 255 bytes has: pointers in a circle.
    for _ in 0..128 {
        let length = usize::from(*packet.get(at)?);
        if length == 0 {
            return Some(labels.join("."));
        }
        if length & 0xc0 == 0xc0 {
            at = usize::from(read_u16(packet, at)? & 0x3fff);
            continue;
        }
        labels.push(String::from_utf8_lossy(packet.get(at + 1..at + 1 + length)?).into_owned());
        at += 1 + length;
    }
    None
}

/// A query for one name, recursion desired; `None` if a label is empty or too long.
pub(super) fn query(name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut packet = vec![0x4f, 0x52, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        packet.push(label.len() as u8);
        packet.extend_from_slice(label.as_bytes());
    }
    packet.push(0);
    packet.extend_from_slice(&kind.to_be_bytes());
    packet.extend_from_slice(&CLASS_IN.to_be_bytes());
    (packet.len() <= 12 + 255 + 4).then_some(packet)
}

/// The address that a name under `in-addr.arpa` or `ip6.arpa` stands for.
pub(super) fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(octets) = name.strip_suffix(".in-addr.arpa") {
        let octets: Vec<u8> = octets.split('.').rev().map(str::parse).collect::<Result<_, _>>().ok()?;
        return Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into());
    }
    let nibbles = name.strip_suffix(".ip6.arpa")?;
    let mut value = 0u128;
    let mut count = 0;
    for nibble in nibbles.split('.').rev() {
        let digit = (nibble.len() == 1).then(|| u128::from_str_radix(nibble, 16).ok()).flatten()?;
        value = value << 4 | digit;
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from(value).into())
}

fn read_u16(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]))
}

/// A question's name, which nobody compresses, and where it ends.
fn read_name(packet: &[u8], mut at: usize) -> Option<(Option<String>, usize)> {
    let start = at;
    let mut name = String::new();
    let mut printable = true;
    loop {
        let length = usize::from(*packet.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        // Over 63 is a pointer or unknown; RFC 1035 section 2.3.4: names are no longer than 255.
        if length > 63 || at + length - start > 254 {
            return None;
        }
        let label = packet.get(at..at + length)?;
        at += length;
        if !name.is_empty() {
            name.push('.');
        }
        for byte in label {
            printable &= byte.is_ascii_graphic() && *byte != b'.';
            name.push(char::from(byte.to_ascii_lowercase()));
        }
    }
    Some((printable.then_some(name), at))
}

/// Where a possibly compressed name ends.
fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match usize::from(*packet.get(at)?) {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length if length > 63 => return None,
            length => at += 1 + length,
        }
    }
}

fn write_head(out: &mut Vec<u8>, owner: u16, kind: u16) {
    out.extend_from_slice(&owner.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    out.extend_from_slice(&TTL.to_be_bytes());
}

fn write_data(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0, 0]);
    write(out);
    let length = (out.len() - at - 2) as u16; // a name or an address: below 256
    out[at..at + 2].copy_from_slice(&length.to_be_bytes());
}

/// A name of a zone; labels longer than allowed are cut, which no checked configuration has.
fn write_name(out: &mut Vec<u8>, name: &str) {
    for label in name.split('.').filter(|label| !label.is_empty()) {
        let label = &label.as_bytes()[..label.len().min(63)];
        out.push(label.len() as u8);
        out.extend_from_slice(label);
    }
    out.push(0);
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
