//! Numbers and addresses as text. `std::fmt` takes a hundred instructions and more for each of them, and a line of the access log
//! has a dozen.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use crate::address::Address;

/// A number in decimal.
pub(crate) struct Digits {
    /// Zeros stand before the number.
    bytes: [u8; Digits::MOST],
    first: usize,
}

impl Digits {
    /// The largest number has so many.
    const MOST: usize = 20;

    pub(crate) fn of(mut n: u64) -> Self {
        let mut digits = Self { bytes: [b'0'; Self::MOST], first: Self::MOST };
        loop {
            digits.first -= 1;
            digits.bytes[digits.first] = b'0' + (n % 10) as u8;
            n /= 10;
            if n == 0 {
                return digits;
            }
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[self.first..]
    }
}

/// Appends a number in decimal.
pub(crate) fn number(out: &mut Vec<u8>, n: u64) {
    out.extend_from_slice(Digits::of(n).as_bytes());
}

/// Appends a number in decimal, with zeros before it if it has less than `width` digits.
pub(crate) fn padded(out: &mut Vec<u8>, n: u64, width: usize) {
    let digits = Digits::of(n);
    let first = digits.first.min(Digits::MOST.saturating_sub(width));
    out.extend_from_slice(&digits.bytes[first..]);
}

/// An address as text, without an allocation and, for IPv4, without the cost of formatting.
pub(crate) struct IpText {
    bytes: [u8; IpText::MAX],
    len: usize,
}

impl IpText {
    /// The longest IPv6 address has 39 characters.
    const MAX: usize = 40;

    pub(crate) fn of(ip: IpAddr) -> Self {
        let mut text = Self { bytes: [0; Self::MAX], len: 0 };
        match ip {
            IpAddr::V4(v4) => {
                for (index, octet) in v4.octets().into_iter().enumerate() {
                    if index > 0 {
                        text.push(b'.');
                    }
                    if octet >= 100 {
                        text.push(b'0' + octet / 100);
                    }
                    if octet >= 10 {
                        text.push(b'0' + octet / 10 % 10);
                    }
                    text.push(b'0' + octet % 10);
                }
            }
            IpAddr::V6(v6) => v6.to_string().bytes().for_each(|b| text.push(b)),
        }
        text
    }

    fn push(&mut self, byte: u8) {
        if let Some(free) = self.bytes.get_mut(self.len) {
            *free = byte;
            self.len += 1;
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Appends an address without a port.
pub(crate) fn ip(out: &mut Vec<u8>, ip: IpAddr) {
    out.extend_from_slice(IpText::of(ip).as_bytes());
}

/// Appends an address as its `Display` does.
pub(crate) fn address(out: &mut Vec<u8>, address: &Address) {
    match address {
        Address::Ip(SocketAddr::V4(v4)) => {
            ip(out, (*v4.ip()).into());
            out.push(b':');
            number(out, v4.port().into());
        }
        // Writing into a vector does not fail.
        other => drop(write!(out, "{other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers() {
        for n in [0, 7, 10, 99, 100, 12_345, u64::MAX] {
            assert_eq!(text(|out| number(out, n)), n.to_string());
            assert_eq!(text(|out| padded(out, n, 3)), format!("{n:03}"));
        }
    }

    #[test]
    fn addresses_are_written_as_the_standard_library_writes_them() {
        for known in
            ["0.0.0.0", "10.9.100.255", "127.0.0.1", "::", "2001:db8::17", "1111:2222:3333:4444:5555:6666:7777:8888"]
        {
            let parsed: IpAddr = known.parse().unwrap();
            assert_eq!(text(|out| ip(out, parsed)), known);
            let socket = Address::Ip(SocketAddr::new(parsed, 8080));
            assert_eq!(text(|out| address(out, &socket)), socket.to_string());
        }
        assert_eq!(text(|out| address(out, &Address::Pipe("/run/s".into()))), "/run/s");
    }
}
