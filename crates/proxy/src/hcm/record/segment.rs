//! Records as bytes, so that thousands of them take little memory: numbers in as few bytes as they need, and what many have in
//! common (the names of the configuration, what is known of a connection) once for each segment.

use foldhash::HashMap;
use mesh_types::ArcStr;
use proxy_core::Address;
use std::net::{IpAddr, SocketAddr};

/// A name that is there for longer than one request.
#[derive(Debug)]
pub(super) enum Name {
    Shared(ArcStr),
    Static(&'static str),
}

impl Name {
    fn as_str(&self) -> &str {
        match self {
            Name::Shared(name) => name,
            Name::Static(name) => name,
        }
    }
}

/// Some records, one after the other, and what they share.
#[derive(Debug, Default)]
pub(super) struct Segment {
    bytes: Vec<u8>,
    /// Where each record begins.
    starts: Vec<u32>,
    names: Vec<Name>,
}

/// What the segment that is written to has already.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// By place in memory and length: a name that a segment has stays where it is.
    names: HashMap<(usize, usize), u64>,
    /// Where a connection is described, by its id.
    connections: HashMap<u64, u64>,
}

impl Known {
    /// A new segment has nothing.
    pub(super) fn clear(&mut self) {
        self.names.clear();
        self.connections.clear();
    }
}

impl Segment {
    /// One that is likely to become as large as this one.
    pub(super) fn like(&self) -> Self {
        Self {
            bytes: Vec::with_capacity(self.bytes.len()),
            starts: Vec::with_capacity(self.starts.len()),
            names: Vec::with_capacity(self.names.len()),
        }
    }

    /// Gives back the room that no further record will need.
    pub(super) fn complete(&mut self) {
        self.bytes.shrink_to_fit();
        self.starts.shrink_to_fit();
        self.names.shrink_to_fit();
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Begins a record.
    pub(super) fn write<'a>(&'a mut self, known: &'a mut Known) -> Writer<'a> {
        self.starts.push(self.bytes.len() as u32);
        Writer { segment: self, known }
    }

    /// The records, the last first.
    pub(super) fn read_back(&self) -> impl Iterator<Item = Reader<'_>> {
        self.starts.iter().rev().map(|at| self.read(*at as usize))
    }

    /// What was written from this place on.
    pub(super) fn read(&self, at: usize) -> Reader<'_> {
        Reader { segment: self, at }
    }
}

/// Writes one record; a [`Reader`] finds its parts in the same order.
pub(super) struct Writer<'a> {
    segment: &'a mut Segment,
    known: &'a mut Known,
}

impl Writer<'_> {
    /// Seven bits a byte, the lowest first.
    pub(super) fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.segment.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.segment.bytes.push(number as u8);
    }

    pub(super) fn optional_number(&mut self, number: Option<u64>) {
        self.number(number.map_or(0, |number| number.saturating_add(1)));
    }

    pub(super) fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.segment.bytes.extend_from_slice(text.as_bytes());
    }

    pub(super) fn optional_text(&mut self, text: Option<&str>) {
        self.number(text.is_some().into());
        text.into_iter().for_each(|text| self.text(text));
    }

    pub(super) fn name(&mut self, name: &ArcStr) {
        let index = self.index(name, || Name::Shared(name.clone()));
        self.number(index);
    }

    pub(super) fn optional_name(&mut self, name: Option<&ArcStr>) {
        self.number(name.is_some().into());
        name.into_iter().for_each(|name| self.name(name));
    }

    pub(super) fn static_name(&mut self, name: &'static str) {
        let index = self.index(name, || Name::Static(name));
        self.number(index);
    }

    fn index(&mut self, name: &str, make: impl FnOnce() -> Name) -> u64 {
        let names = &mut self.segment.names;
        *self.known.names.entry((name.as_ptr() as usize, name.len())).or_insert_with(|| {
            names.push(make());
            names.len() as u64 - 1
        })
    }

    pub(super) fn address(&mut self, address: &Address) {
        match address {
            Address::Ip(SocketAddr::V4(address)) => {
                self.number(4);
                self.segment.bytes.extend_from_slice(&address.ip().octets());
                self.number(address.port().into());
            }
            Address::Ip(SocketAddr::V6(address)) if address.scope_id() == 0 => {
                self.number(6);
                self.segment.bytes.extend_from_slice(&address.ip().octets());
                self.number(address.port().into());
            }
            _ => {
                self.number(0);
                self.text(&address.to_string());
            }
        }
    }

    /// Where the connection with this id is described, by `describe` if it is the first time.
    pub(super) fn connection(&mut self, id: u64, describe: impl FnOnce(&mut Writer<'_>)) {
        let described = self.known.connections.get(&id).copied();
        self.optional_number(described);
        if described.is_none() {
            self.known.connections.insert(id, self.segment.bytes.len() as u64);
            describe(self);
        }
    }
}

/// Reads a record. Past its end, numbers are 0 and texts empty.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    segment: &'a Segment,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn number(&mut self) -> u64 {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.bytes(1).first().copied().unwrap_or(0);
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        number
    }

    pub(super) fn optional_number(&mut self) -> Option<u64> {
        self.number().checked_sub(1)
    }

    pub(super) fn text(&mut self) -> &'a str {
        let length = self.number() as usize;
        std::str::from_utf8(self.bytes(length)).unwrap_or_default()
    }

    pub(super) fn optional_text(&mut self) -> Option<&'a str> {
        (self.number() != 0).then(|| self.text())
    }

    pub(super) fn name(&mut self) -> &'a str {
        let index = self.number() as usize;
        self.segment.names.get(index).map(Name::as_str).unwrap_or_default()
    }

    pub(super) fn optional_name(&mut self) -> Option<&'a str> {
        (self.number() != 0).then(|| self.name())
    }

    /// As it prints.
    pub(super) fn address(&mut self) -> String {
        let kind = self.number();
        let ip: Option<IpAddr> = match kind {
            4 => <[u8; 4]>::try_from(self.bytes(4)).ok().map(IpAddr::from),
            6 => <[u8; 16]>::try_from(self.bytes(16)).ok().map(IpAddr::from),
            _ => None,
        };
        match ip {
            Some(ip) => SocketAddr::new(ip, self.number() as u16).to_string(),
            None => self.text().to_owned(),
        }
    }

    /// The connection's description; this reader goes on behind it.
    pub(super) fn connection<T>(&mut self, read: impl FnOnce(&mut Reader<'a>) -> T) -> T {
        match self.optional_number() {
            Some(at) => read(&mut self.segment.read(at as usize)),
            None => read(self),
        }
    }

    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let found = self.segment.bytes.get(self.at..).and_then(|rest| rest.get(..length)).unwrap_or_default();
        self.at += found.len();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let (mut segment, mut known) = (Segment::default(), Known::default());
        let shared: ArcStr = "outbound|80||a.b".into();
        let numbers = [0, 127, 128, 300, u64::from(u32::MAX), u64::MAX];
        let addresses = ["1.2.3.4:80", "[::1]:65535"].map(|text| Address::Ip(text.parse().unwrap()));
        let pipe = Address::Pipe("/run/x.sock".into());
        for id in [7, 7, 8] {
            let mut writer = segment.write(&mut known);
            writer.connection(id, |writer| writer.text(&format!("connection {id}")));
            numbers.iter().for_each(|number| writer.number(*number));
            writer.optional_number(None);
            writer.optional_number(Some(3));
            writer.name(&shared);
            writer.static_name("HTTP/1.1");
            // A part of another name is a name of its own.
            writer.static_name(&"HTTP/1.1"[..4]);
            writer.optional_name(None);
            writer.optional_text(Some("ä"));
            addresses.iter().chain([&pipe]).for_each(|address| writer.address(address));
        }
        segment.complete();
        assert_eq!((segment.len(), segment.names.len()), (3, 3));
        for (mut reader, id) in segment.read_back().zip([8, 7, 7]) {
            assert_eq!(reader.connection(|reader| reader.text().to_owned()), format!("connection {id}"));
            assert_eq!(numbers.map(|_| reader.number()), numbers);
            assert_eq!((reader.optional_number(), reader.optional_number()), (None, Some(3)));
            assert_eq!((reader.name(), reader.name(), reader.name()), ("outbound|80||a.b", "HTTP/1.1", "HTTP"));
            assert_eq!((reader.optional_name(), reader.optional_text()), (None, Some("ä")));
            let read = [reader.address(), reader.address(), reader.address()];
            assert_eq!(read, ["1.2.3.4:80", "[::1]:65535", "/run/x.sock"]);
        }
        let mut beyond = segment.read(usize::MAX);
        assert_eq!((beyond.number(), beyond.text(), beyond.name()), (0, "", "outbound|80||a.b"));
    }
}
