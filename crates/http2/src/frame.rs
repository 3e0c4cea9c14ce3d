//! Frames on the wire (RFC 9113, section 4.1 and 6).

use std::fmt;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

/// Of SETTINGS and PING.
pub(crate) const ACK: u8 = 1;
/// Of HEADERS and DATA.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;
/// Of HEADERS: a priority comes first.
pub(crate) const WITH_PRIORITY: u8 = 0x20;

/// What a client says first (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of a frame's head.
pub(crate) const HEAD: usize = 9;
/// The most payload that a frame has in either direction: more is never announced, and never used.
pub(crate) const MAX_PAYLOAD: usize = 16384;
/// The highest number of a stream, and the largest window.
pub(crate) const MAX_31: u32 = 0x7fff_ffff;

/// SETTINGS (RFC 9113, section 6.5.2; RFC 8441; RFC 9218).
pub(crate) mod settings {
    pub(crate) const TABLE_SIZE: u16 = 1;
    pub(crate) const PUSH: u16 = 2;
    pub(crate) const MAX_STREAMS: u16 = 3;
    pub(crate) const WINDOW: u16 = 4;
    pub(crate) const MAX_FRAME: u16 = 5;
    pub(crate) const CONNECT: u16 = 8;
    pub(crate) const NO_PRIORITIES: u16 = 9;
}

/// Why a stream or a connection ends (RFC 9113, section 7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub u32);

impl Reason {
    pub const NO_ERROR: Reason = Reason(0);
    pub const PROTOCOL_ERROR: Reason = Reason(1);
    pub const INTERNAL_ERROR: Reason = Reason(2);
    pub const FLOW_CONTROL_ERROR: Reason = Reason(3);
    pub const STREAM_CLOSED: Reason = Reason(5);
    pub const FRAME_SIZE_ERROR: Reason = Reason(6);
    pub const REFUSED_STREAM: Reason = Reason(7);
    pub const CANCEL: Reason = Reason(8);
    pub const COMPRESSION_ERROR: Reason = Reason(9);
    pub const CONNECT_ERROR: Reason = Reason(10);
    pub const ENHANCE_YOUR_CALM: Reason = Reason(11);
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::NO_ERROR => "NO_ERROR",
            Self::PROTOCOL_ERROR => "PROTOCOL_ERROR",
            Self::INTERNAL_ERROR => "INTERNAL_ERROR",
            Self::FLOW_CONTROL_ERROR => "FLOW_CONTROL_ERROR",
            Self::STREAM_CLOSED => "STREAM_CLOSED",
            Self::FRAME_SIZE_ERROR => "FRAME_SIZE_ERROR",
            Self::REFUSED_STREAM => "REFUSED_STREAM",
            Self::CANCEL => "CANCEL",
            Self::COMPRESSION_ERROR => "COMPRESSION_ERROR",
            Self::CONNECT_ERROR => "CONNECT_ERROR",
            Self::ENHANCE_YOUR_CALM => "ENHANCE_YOUR_CALM",
            Self(code) => return write!(f, "{code}"),
        };
        f.write_str(name)
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) length: usize,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
}

impl Head {
    pub(crate) fn read(bytes: &[u8; HEAD]) -> Self {
        Self {
            length: usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]),
            kind: bytes[3],
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & MAX_31,
        }
    }

    /// Whether its kind cannot have its length, whatever is in it: FRAME_SIZE_ERROR of the connection.
    pub(crate) fn has_bad_size(&self) -> bool {
        match self.kind {
            PRIORITY => self.length != 5,
            RST_STREAM | WINDOW_UPDATE => self.length != 4,
            SETTINGS if self.flags & ACK != 0 => self.length != 0,
            SETTINGS => !self.length.is_multiple_of(6),
            PING => self.length != 8,
            GOAWAY => self.length < 8,
            PUSH_PROMISE => self.length < 4,
            _ => false,
        }
    }
}

/// Appends the head of a frame.
pub(crate) fn head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    let [_, a, b, c] = (length as u32).to_be_bytes();
    let [s, t, u, v] = stream.to_be_bytes();
    out.extend_from_slice(&[a, b, c, kind, flags, s, t, u, v]);
}

/// Four bytes at a place, or zero where there are none.
pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_as_they_are_written() {
        let mut out = Vec::new();
        head(&mut out, 0x01_02_03, DATA, END_STREAM, 5);
        let read = Head::read(out.first_chunk().unwrap());
        assert_eq!((read.length, read.kind, read.flags, read.stream), (0x01_02_03, DATA, END_STREAM, 5));
    }

    #[test]
    fn some_kinds_have_one_length() {
        let bad = |kind, flags, length| Head { length, kind, flags, stream: 0 }.has_bad_size();
        assert!(bad(PING, 0, 7) && bad(SETTINGS, 0, 5) && bad(SETTINGS, ACK, 6) && bad(RST_STREAM, 0, 5));
        assert!(!bad(PING, 0, 8) && !bad(SETTINGS, 0, 12) && !bad(GOAWAY, 0, 20) && !bad(DATA, 0, 0));
    }
}
