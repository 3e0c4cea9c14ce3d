//! Netlink messages as bytes: headers, attributes, nesting, padding; and reading them back.

/// Set on attributes that hold attributes.
const NESTED: u16 = 1 << 15;
/// Bits of an attribute's type that are not flags.
const TYPE_MASK: u16 = 0x3fff;
/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// One netlink message under construction: `nlmsghdr`, a family header, attributes.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    buf: Vec<u8>,
}

impl Message {
    pub(crate) fn new(kind: u16, flags: u16) -> Self {
        let mut buf = Vec::with_capacity(256);
        buf.extend_from_slice(&[0; 4]);
        buf.extend_from_slice(&kind.to_ne_bytes());
        buf.extend_from_slice(&flags.to_ne_bytes());
        buf.extend_from_slice(&[0; 8]);
        Self { buf }
    }

    /// The family header that follows `nlmsghdr`; its length must be a multiple of four, as all of them are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.buf.extend_from_slice(bytes);
        self
    }

    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.buf.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(value);
        while !self.buf.len().is_multiple_of(4) {
            self.buf.push(0);
        }
        self
    }

    /// A zero-terminated string.
    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.attr(kind, &[value])
    }

    /// Host byte order, as rtnetlink wants it.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Network byte order, as nf_tables wants all its numbers.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 2]);
        self.buf.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.buf.len() - start) as u16;
        self.buf[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    pub(crate) fn len(&self) -> usize {
        self.buf.len()
    }

    pub(crate) fn or_flags(&mut self, flags: u16) {
        let now = u16::from_ne_bytes([self.buf[6], self.buf[7]]) | flags;
        self.buf[6..8].copy_from_slice(&now.to_ne_bytes());
    }

    pub(crate) fn set_sequence(&mut self, sequence: u32) {
        self.buf[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }

    /// The finished bytes, with the length filled in.
    pub(crate) fn finish(&mut self) -> &[u8] {
        let length = self.buf.len() as u32;
        self.buf[0..4].copy_from_slice(&length.to_ne_bytes());
        &self.buf
    }

    /// The bytes written from `start` on.
    pub(crate) fn since(&self, start: usize) -> &[u8] {
        &self.buf[start..]
    }
}

/// A received message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) body: &'a [u8],
}

/// The messages in one datagram; a damaged tail ends the iteration.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER)?;
        let length = ne32(header) as usize;
        let body = bytes.get(HEADER..length)?;
        let message = Received {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: ne32(&header[8..]),
            body,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes` as (type without flags, value); a damaged tail ends the iteration.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..4)?;
        let length = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of this type.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// The first four bytes in host order; 0 when there are fewer.
pub(crate) fn ne32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b))
}

/// The first four bytes in network order; 0 when there are fewer.
pub(crate) fn be32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
}

/// The first eight bytes in network order; 0 when there are fewer.
pub(crate) fn be64(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_be_bytes(*b))
}

/// A string attribute without its terminating zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip_with_padding_and_nesting() {
        let mut message = Message::new(7, 1);
        message.text(1, "eth0").nest(2, |m| {
            m.u8(3, 9).u32(4, 0x01020304);
        });
        message.set_sequence(5);
        let bytes = message.finish().to_vec();
        let received = messages(&bytes).next().expect("one message");
        assert_eq!((received.kind, received.flags, received.sequence), (7, 1, 5));
        let all: Vec<_> = attributes(received.body).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(text(all[0].1), "eth0");
        assert_eq!(find(all[1].1, 3), Some(&[9][..]));
        assert_eq!(find(all[1].1, 4).map(ne32), Some(0x01020304));
    }

    #[test]
    fn damaged_bytes_end_the_iteration() {
        assert_eq!(messages(&[0; 40]).count(), 0);
        assert_eq!(attributes(&[0; 8]).count(), 0);
        assert_eq!(attributes(&[255, 0, 1, 0]).count(), 0);
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
    }
}
