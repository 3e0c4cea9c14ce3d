//! Looking through heads eight bytes at a time: most of what a head costs is the look at each of its bytes.

use super::head::{CODEC, HeadError, TOKEN};

const ONES: u64 = u64::from_ne_bytes([1; 8]);
const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);

/// The high bit of bytes below 32 and of those that are 127. Right up to the first such byte; behind it others may be marked, too.
#[inline]
fn controls(bytes: u64) -> u64 {
    // The latter as zeros.
    let deletes = bytes ^ (ONES * 127);
    (bytes.wrapping_sub(ONES * 32) & !bytes | deletes.wrapping_sub(ONES) & !deletes) & HIGH
}

/// The high bit of bytes that are neither small letters nor hyphens.
#[inline]
fn unusual_in_names(bytes: u64) -> u64 {
    let low = bytes & !HIGH;
    let letters = (low + ONES * (0x80 - b'a' as u64)) & !(low + ONES * (0x7f - b'z' as u64));
    let others = (low ^ (ONES * b'-' as u64)) + ONES * 0x7f;
    (!letters & others | bytes) & HIGH
}

/// Where the next control character is, line ends and tabs included.
#[inline]
fn next_control(buf: &[u8], at: usize) -> Option<usize> {
    let (words, rest) = buf[at..].as_chunks();
    for (index, word) in words.iter().enumerate() {
        let found = controls(u64::from_le_bytes(*word));
        if found != 0 {
            return Some(at + index * 8 + found.trailing_zeros() as usize / 8);
        }
    }
    rest.iter().position(u8::is_ascii_control).map(|more| at + words.len() * 8 + more)
}

/// Whether there are control characters in it.
pub(super) fn has_controls(value: &[u8]) -> bool {
    next_control(value, 0).is_some()
}

/// Number of token characters that a line begins with, and whether no capital is among them.
#[inline]
pub(super) fn name_end(line: &[u8]) -> (usize, bool) {
    let mut at = 0;
    while let Some(word) = line[at..].first_chunk() {
        let found = unusual_in_names(u64::from_le_bytes(*word));
        if found != 0 {
            at += found.trailing_zeros() as usize / 8;
            break;
        }
        at += 8;
    }
    let mut lower = true;
    let more = line[at..].iter().position(|b| {
        lower &= !b.is_ascii_uppercase();
        !TOKEN[usize::from(*b)]
    });
    (more.map_or(line.len(), |more| at + more), lower)
}

/// Lines that are kept in mind; heads with more are rare.
const MOST_LINES: usize = 40;

/// A head that is complete.
pub(super) struct Extent {
    /// Where its first line starts: empty lines before it are skipped.
    pub(super) start: usize,
    /// Behind its empty line.
    pub(super) end: usize,
    /// Where its lines end, from `start`, if it is plain: each ends in CR LF, no other control character is in it, no field is folded.
    lines: [u32; MOST_LINES],
    /// So many; 0 if the head is not plain.
    count: usize,
}

impl Extent {
    /// `None`: not complete.
    pub(super) fn of(buf: &[u8]) -> Option<Extent> {
        let start = buf.iter().position(|b| *b != b'\r' && *b != b'\n')?;
        let mut extent = Extent { start, end: 0, lines: [0; MOST_LINES], count: 0 };
        let mut line = start;
        loop {
            let end = next_control(buf, line)?;
            let plain = buf[end] == b'\r' && buf.get(end + 1).is_none_or(|b| *b == b'\n') && buf[line] != b' ';
            if !plain || extent.count == MOST_LINES || u32::try_from(end).is_err() {
                extent.count = 0;
                extent.end = any_end(buf, line)?;
                return Some(extent);
            }
            if end + 1 == buf.len() {
                return None;
            }
            if end == line {
                extent.end = end + 2;
                return Some(extent);
            }
            extent.lines[extent.count] = (end - start) as u32;
            extent.count += 1;
            line = end + 2;
        }
    }

    /// The ends of the lines behind the first one, without CR LF, if the head is plain.
    pub(super) fn field_ends(&self) -> Option<&[u32]> {
        self.lines[..self.count].get(1..)
    }
}

/// The end of a head, whatever is in it, when all is known before the line at `at`.
fn any_end(buf: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match buf.get(at..)? {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            [] | [b'\r'] => return None,
            _ => at += memchr::memchr(b'\n', &buf[at..])? + 1,
        }
    }
}

/// A field of a plain head, without its line end: where its name ends, whether that has no capital, and the value.
#[inline]
pub(super) fn plain_field(line: &[u8]) -> Result<(usize, bool, &[u8]), HeadError> {
    let (colon, lower) = name_end(line);
    match line[colon..].split_first() {
        Some((b':', value)) if colon > 0 => Ok((colon, lower, value)),
        _ => Err(CODEC),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_known_in_every_place() {
        for byte in 0..=255u8 {
            for place in 0..17 {
                let mut text = [b'x'; 17];
                text[place] = byte;
                assert_eq!(next_control(&text, 0), byte.is_ascii_control().then_some(place), "{byte} at {place}");
                let token = TOKEN[usize::from(byte)];
                let expected = if token { 17 } else { place };
                assert_eq!(name_end(&text), (expected, !byte.is_ascii_uppercase()), "{byte} at {place}");
                // A control character that follows another one.
                if place < 16 {
                    text[place + 1] = 0x20;
                    text[place] = b'\n';
                    assert_eq!(next_control(&text, place + 1), None);
                }
            }
        }
    }

    #[test]
    fn heads_end_at_their_empty_line() {
        let found = |text: &[u8]| {
            let extent = Extent::of(text)?;
            Some((extent.start, extent.end, extent.field_ends().map(<[u32]>::to_vec)))
        };
        let head = b"\r\n\nGET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n\r\nbody\r\n\r\n";
        assert_eq!(found(head), Some((3, 36, Some(vec![23, 29]))));
        for length in 0..36 {
            assert_eq!(found(&head[..length]), None, "{length}");
        }
        for (text, end) in [
            (&b"GET / HTTP/1.1\nhost: a\n\nrest\r\n\r\n"[..], 24),
            (b"GET / HTTP/1.1\r\nhost: a\n\r\nrest\r\n\r\n", 26),
            (b"GET / HTTP/1.1\r\nhost:\ta\r\n\r\nrest\r\n\r\n", 27),
            (b"GET / HTTP/1.1\r\nhost: a\r\n b\r\n\r\nrest\r\n\r\n", 31),
            (b"GET / HTTP/1.1\r\nx: \r a\r\n\nrest\r\n\r\n", 25),
        ] {
            assert_eq!(found(text), Some((0, end, None)));
            for length in 0..end {
                assert_eq!(found(&text[..length]), None, "{length}");
            }
        }
        let many = [&b"GET / HTTP/1.1\r\n"[..], &b"x: 1\r\n".repeat(60), b"\r\n"].concat();
        assert_eq!(found(&many), Some((0, many.len(), None)));
    }
}
