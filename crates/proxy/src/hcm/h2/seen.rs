//! What has come in on a connection, as far as it decides how Envoy's codec answers an error.

use super::{INVALID_FIELD, VIOLATION};
use crate::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Head, PING, PRIORITY, RST_STREAM, SETTINGS,
    WINDOW_UPDATE,
};

/// Codes of errors (RFC 9113, 7).
pub(super) const PROTOCOL_ERROR: u32 = 1;
pub(super) const FLOW_CONTROL_ERROR: u32 = 3;
pub(super) const STREAM_CLOSED: u32 = 5;
pub(super) const FRAME_SIZE_ERROR: u32 = 6;
pub(super) const REFUSED_STREAM: u32 = 7;

/// Flags of frames (RFC 9113, 6.2).
const PADDED: u8 = 0x8;
const WITH_PRIORITY: u8 = 0x20;

impl Head {
    /// RFC 9113, section 6: lengths that make a FRAME_SIZE_ERROR.
    fn has_bad_size(&self) -> bool {
        match self.kind {
            PRIORITY => self.length != 5,
            RST_STREAM | WINDOW_UPDATE => self.length != 4,
            SETTINGS if self.flags & ACK != 0 => self.length != 0,
            SETTINGS => !self.length.is_multiple_of(6),
            PING => self.length != 8,
            HEADERS if self.flags & WITH_PRIORITY != 0 => self.length < 5,
            _ => false,
        }
    }
}

/// What has come in, as far as it decides how an error is answered.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) last: Option<u8>,
    /// A header block is not complete.
    pub(super) in_block: bool,
    /// The stream whose first head is not complete.
    pub(super) head: Option<u32>,
    /// The highest stream that the peer opened.
    pub(super) highest: u32,
    /// The last frame was a head that opened a stream, as far as its number tells.
    pub(super) fresh: bool,
    /// A frame of a length that its kind cannot have.
    pub(super) bad_size: bool,
    /// A frame with more padding than it has room for.
    bad_padding: bool,
    /// The peer knows our settings.
    pub(super) acknowledged: bool,
    /// The peer leaves.
    pub(super) goodbye: bool,
    /// The stream whose trailers came last, and whether they say that nothing follows.
    pub(super) trailers: Option<(u32, bool)>,
    /// Streams whose last frame was DATA, the last few.
    with_data: [u32; 32],
    next: usize,
}

impl Seen {
    /// `first`: of the frame's payload, if it has come with its head.
    pub(super) fn note(&mut self, head: Head, first: Option<u8>) {
        let padded = matches!(head.kind, DATA | HEADERS) && head.flags & PADDED != 0;
        self.bad_padding |= padded && first.map_or(head.length == 0, |padding| usize::from(padding) >= head.length);
        self.last = Some(head.kind);
        self.fresh = self.opens(head) && head.stream % 2 == 1;
        self.bad_size |= head.has_bad_size();
        self.acknowledged |= head.kind == SETTINGS && head.flags & ACK != 0;
        self.goodbye |= head.kind == GOAWAY;
        match head.kind {
            DATA if !self.with_data.contains(&head.stream) => {
                self.with_data[self.next] = head.stream;
                self.next = (self.next + 1) % self.with_data.len();
            }
            HEADERS | CONTINUATION if !self.in_block || head.kind == CONTINUATION => {
                self.in_block = head.flags & END_HEADERS == 0;
                if self.opens(head) {
                    self.highest = head.stream;
                    self.head = Some(head.stream);
                } else if head.kind == HEADERS {
                    self.trailers = Some((head.stream, head.flags & END_STREAM != 0));
                    self.with_data.iter_mut().filter(|stream| **stream == head.stream).for_each(|stream| *stream = 0);
                }
                self.head = self.head.filter(|_| self.in_block);
            }
            _ => {}
        }
    }

    /// Whether a header block is a request's, not a trailer's.
    pub(super) fn opens(&self, head: Head) -> bool {
        head.kind == HEADERS && head.stream > self.highest
    }

    /// Whether Envoy closes without this GOAWAY. `unread`: it is for a head that the crate did not understand.
    ///
    /// DIFFERS: windows that overflow and pings of a stream are answered as RFC 9113 asks (6.9.1, 5.4.1), so that a
    /// peer learns what it did; Envoy closes without a word.
    pub(super) fn hides_goaway(&self, code: u32, unread: bool) -> bool {
        let told = match code {
            FLOW_CONTROL_ERROR => self.last == Some(WINDOW_UPDATE),
            PROTOCOL_ERROR => self.last == Some(PING),
            _ => false,
        };
        matches!(code, PROTOCOL_ERROR | FLOW_CONTROL_ERROR | STREAM_CLOSED)
            && !told
            && !self.in_block
            && !self.bad_size
            && !self.bad_padding
            && (unread || !matches!(self.last, Some(DATA | CONTINUATION)))
    }

    /// What Envoy says of the trailers that came last, if they are this stream's and break the rules of messages.
    pub(super) fn bad_trailers(&self, stream: u32) -> Option<&'static str> {
        let (_, ends) = self.trailers.filter(|(with, _)| *with == stream)?;
        Some(if ends { INVALID_FIELD } else { VIOLATION })
    }

    /// Whether Envoy closes the connection instead of this RST_STREAM.
    pub(super) fn closes_instead(&self, code: u32, stream: u32) -> bool {
        match code {
            PROTOCOL_ERROR => !self.with_data.contains(&stream),
            // DIFFERS: as with GOAWAY, a window that overflows is told.
            FLOW_CONTROL_ERROR => !matches!(self.last, Some(DATA | WINDOW_UPDATE)),
            STREAM_CLOSED => self.last != Some(DATA),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_messages_close_but_bad_bodies_reset() {
        let mut seen = Seen::default();
        seen.note(Head { length: 1, kind: HEADERS, flags: 5, stream: 1 }, None);
        assert!(seen.closes_instead(PROTOCOL_ERROR, 1) && seen.hides_goaway(PROTOCOL_ERROR, false));
        seen.note(Head { length: 1, kind: DATA, flags: 1, stream: 1 }, None);
        assert!(!seen.closes_instead(PROTOCOL_ERROR, 1) && !seen.hides_goaway(PROTOCOL_ERROR, false));
        seen.note(Head { length: 1, kind: HEADERS, flags: 5, stream: 1 }, None);
        assert!(seen.closes_instead(PROTOCOL_ERROR, 1), "trailers");
        assert_eq!((seen.bad_trailers(1), seen.bad_trailers(3)), (Some(INVALID_FIELD), None));
        seen.note(Head { length: 1, kind: HEADERS, flags: 0, stream: 3 }, None);
        assert!(!seen.hides_goaway(PROTOCOL_ERROR, true), "a header block was interrupted");
        assert_eq!(seen.head, Some(3));
        seen.note(Head { length: 1, kind: CONTINUATION, flags: END_HEADERS, stream: 3 }, None);
        assert_eq!(seen.head, None, "the head is there");
        seen.note(Head { length: 1, kind: HEADERS, flags: 1, stream: 3 }, None);
        assert!(seen.in_block && seen.head.is_none(), "trailers");
    }

    #[test]
    fn bad_padding_is_told() {
        let head = Head { length: 3, kind: HEADERS, flags: PADDED | END_HEADERS, stream: 1 };
        let hides = |first| {
            let mut seen = Seen::default();
            seen.note(head, Some(first));
            seen.hides_goaway(PROTOCOL_ERROR, false)
        };
        assert!(hides(2) && !hides(3));
    }
}
