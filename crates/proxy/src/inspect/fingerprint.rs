//! What a ClientHello offers, as the short names under which client programs are known: JA3 and JA4.

use super::{Cursor, Look, handshake};
use aws_lc_rs::digest;
use md5::{Digest as _, Md5};

/// What fingerprints are made of, without the values of GREASE (RFC 8701), which only the groups keep, as in Envoy.
#[derive(Debug, Default)]
pub(crate) struct Offer {
    version: u16,
    ciphers: Vec<u16>,
    extensions: Vec<u16>,
    versions: Vec<u16>,
    groups: Vec<u16>,
    point_formats: Vec<u8>,
    signatures: Vec<u16>,
    /// The first one.
    alpn: Vec<u8>,
}

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

fn is_grease(value: u16) -> bool {
    let [high, low] = value.to_be_bytes();
    high == low && low & 0xf == 0xa
}

fn all_numbers(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
}

fn numbers(bytes: &[u8]) -> Vec<u16> {
    all_numbers(bytes).filter(|value| !is_grease(*value)).collect()
}

impl Offer {
    /// Of the first bytes of a connection that hold a whole ClientHello.
    pub(crate) fn of(bytes: &[u8]) -> Option<Self> {
        match handshake(bytes) {
            Look::Found(hello) => Self::parse(&hello),
            Look::No | Look::More => None,
        }
    }

    fn parse(hello: &[u8]) -> Option<Self> {
        let mut c = Cursor(hello);
        let mut offer = Offer { version: u16::try_from(c.u16()?).ok()?, ..Offer::default() };
        c.take(32)?;
        let n = c.u8()?;
        c.take(n)?;
        let n = c.u16()?;
        offer.ciphers = numbers(c.take(n)?);
        let n = c.u8()?;
        c.take(n)?;
        if c.0.is_empty() {
            return Some(offer);
        }
        let n = c.u16()?;
        let mut extensions = Cursor(c.take(n)?);
        while !extensions.0.is_empty() {
            let kind = u16::try_from(extensions.u16()?).ok()?;
            let n = extensions.u16()?;
            let mut body = Cursor(extensions.take(n)?);
            if !is_grease(kind) {
                offer.extensions.push(kind);
            }
            match kind {
                10 => offer.groups = all_numbers(body.0.get(2..)?).collect(),
                11 => offer.point_formats = body.0.get(1..)?.to_vec(),
                13 => offer.signatures = numbers(body.0.get(2..)?),
                ALPN => {
                    body.u16()?;
                    let n = body.u8()?;
                    offer.alpn = body.take(n)?.to_vec();
                }
                43 => offer.versions = numbers(body.0.get(1..)?),
                _ => {}
            }
        }
        Some(offer)
    }

    /// The MD5 of what is offered, in the client's order.
    pub(crate) fn ja3(&self) -> String {
        let list = |values: &[u16]| values.iter().map(u16::to_string).collect::<Vec<_>>().join("-");
        let formats: Vec<u16> = self.point_formats.iter().copied().map(u16::from).collect();
        let lists = [list(&self.ciphers), list(&self.extensions), list(&self.groups), list(&formats)];
        hex(&Md5::digest(format!("{},{}", self.version, lists.join(","))))
    }

    /// How much is offered, and hashes of what, sorted.
    pub(crate) fn ja4(&self) -> String {
        let version = match self.versions.iter().copied().max().unwrap_or(self.version) {
            0x0304 => "13",
            0x0303 => "12",
            0x0302 => "11",
            0x0301 => "10",
            0x0300 => "s3",
            _ => "00",
        };
        let name = if self.extensions.contains(&SERVER_NAME) { 'd' } else { 'i' };
        let (ciphers, extensions) = (self.ciphers.len().min(99), self.extensions.len().min(99));
        let alpn = match (self.alpn.first(), self.alpn.last()) {
            (Some(first), Some(last)) if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric() => {
                [*first, *last].map(char::from).iter().collect()
            }
            (Some(first), Some(last)) => format!("{:x}{:x}", first >> 4, last & 0xf),
            _ => "00".to_owned(),
        };
        let sorted = |values: &[u16]| {
            let mut values = values.to_vec();
            values.sort_unstable();
            listed(&values)
        };
        let hashed: Vec<u16> =
            self.extensions.iter().copied().filter(|kind| ![SERVER_NAME, ALPN].contains(kind)).collect();
        let mut offered = sorted(&hashed);
        if !self.signatures.is_empty() {
            offered = format!("{offered}_{}", listed(&self.signatures));
        }
        let suites = short_hash(&sorted(&self.ciphers));
        format!("t{version}{name}{ciphers:02}{extensions:02}{alpn}_{suites}_{}", short_hash(&offered))
    }
}

fn listed(values: &[u16]) -> String {
    values.iter().map(|value| format!("{value:04x}")).collect::<Vec<_>>().join(",")
}

/// The first 12 digits of a SHA-256; zeros of nothing.
fn short_hash(text: &str) -> String {
    if text.is_empty() {
        return "0".repeat(12);
    }
    hex(&digest::digest(&digest::SHA256, text.as_bytes()).as_ref()[..6])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_offered_has_a_name_too() {
        let offer = Offer { version: 0x0303, ..Offer::default() };
        assert_eq!(offer.ja4(), "t12i000000_000000000000_000000000000");
        assert_eq!(offer.ja3(), hex(&Md5::digest("771,,,,")));
        assert!(Offer::of(b"GET / HTTP/1.1\r\n").is_none() && is_grease(0x1a1a) && !is_grease(0x1a2a));
    }
}
