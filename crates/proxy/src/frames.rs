//! HTTP/2 frames (RFC 9113, section 4.1) as they pass by: their heads, found without keeping what is in them.

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const ACK: u8 = 1;
/// The same bit in HEADERS and DATA.
pub(crate) const END_STREAM: u8 = 1;

/// Calls `each` with the bytes of `bufs` that a vectored write took: the first `written` of them.
pub(crate) fn written_of(bufs: &[std::io::IoSlice<'_>], written: usize, mut each: impl FnMut(&[u8])) {
    let mut left = written;
    for part in bufs {
        let n = left.min(part.len());
        each(&part[..n]);
        left -= n;
    }
}

/// The client's preface comes before its first frame.
const PREFACE: usize = 24;

/// The head of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) length: usize,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
}

impl Head {
    pub(crate) fn read(bytes: &[u8; 9]) -> Self {
        Self {
            length: usize::from(bytes[0]) << 16 | usize::from(bytes[1]) << 8 | usize::from(bytes[2]),
            kind: bytes[3],
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & 0x7fff_ffff,
        }
    }
}

/// Finds frames in a stream of bytes, whatever the cuts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frames {
    /// Bytes that belong to the frame before (or the preface).
    skip: usize,
    head: [u8; 9],
    have: usize,
}

impl Frames {
    /// Of a client, which says the preface first.
    pub(crate) fn after_preface() -> Self {
        Self { skip: PREFACE, ..Self::default() }
    }

    /// Whether a frame has just ended.
    pub(crate) fn is_between(&self) -> bool {
        self.skip == 0 && self.have == 0
    }

    /// Whether the payload of a frame is not complete.
    pub(crate) fn is_within(&self) -> bool {
        self.skip > 0
    }

    /// Calls `found` with each frame's head and where it ends in `bytes`; stops when that says false.
    pub(crate) fn look(&mut self, bytes: &[u8], mut found: impl FnMut(Head, usize) -> bool) {
        let mut at = 0;
        while at < bytes.len() {
            if self.skip > 0 {
                let step = self.skip.min(bytes.len() - at);
                self.skip -= step;
                at += step;
                continue;
            }
            let step = (9 - self.have).min(bytes.len() - at);
            self.head[self.have..self.have + step].copy_from_slice(&bytes[at..at + step]);
            self.have += step;
            at += step;
            if self.have == 9 {
                self.have = 0;
                let head = Head::read(&self.head);
                self.skip = head.length;
                if !found(head, at) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u8, body: &[u8]) -> Vec<u8> {
        [&[0, 0, body.len() as u8, kind, flags, 0, 0, 0, stream][..], body].concat()
    }

    #[test]
    fn what_was_written_is_told_in_order() {
        let bufs = [std::io::IoSlice::new(b"abc"), std::io::IoSlice::new(b""), std::io::IoSlice::new(b"def")];
        let mut told = Vec::new();
        written_of(&bufs, 4, |part| told.extend_from_slice(part));
        assert_eq!(told, b"abcd");
    }

    #[test]
    fn frames_are_found_over_any_cuts() {
        let bytes =
            [frame(HEADERS, 4, 1, b"abc"), frame(DATA, 1, 1, b""), frame(RST_STREAM, 0, 3, &[0, 0, 0, 1])].concat();
        for cut in 1..bytes.len() {
            let mut frames = Frames::default();
            let mut kinds = Vec::new();
            for part in bytes.chunks(cut) {
                frames.look(part, |head, _| {
                    kinds.push((head.kind, head.stream));
                    true
                });
            }
            assert_eq!(kinds, [(HEADERS, 1), (DATA, 1), (RST_STREAM, 3)]);
        }
    }
}
