//! The fields of a head: read one by one, and what they say of the message.

use super::{
    BodyLength, CODEC, FIELD_BYTES, HeadError, INVALID_CHARACTERS, INVALID_TE, Limits, TOO_MANY, UnderscoreAction,
};
use super::{bad, find};
use crate::h1::scan::{has_controls, name_end, plain_field};
use proxy_core::cluster::HeaderCase;
use proxy_core::{Headers, WrittenNames};
use std::borrow::Cow;

/// What the framing and connection headers of one head say.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) length: Length,
    pub(super) chunked: bool,
    /// There is a `transfer-encoding`.
    pub(super) te: bool,
    /// It is another one than `chunked`.
    pub(super) odd_te: bool,
    pub(super) close: bool,
    /// `proxy-connection: close`.
    pub(super) proxy_close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade: bool,
    /// `connection` names other fields of this hop.
    pub(super) nominates: bool,
    pub(super) has_upgrade: bool,
    pub(super) expect_continue: bool,
    pub(super) drop_length: bool,
    /// `:authority` is known; a Host field is not looked at.
    pub(super) authority: bool,
    /// It is what Host fields said; further ones are appended.
    pub(super) host: bool,
    pub(super) dropped: u64,
    /// Of the fields, see [`FIELD_BYTES`].
    pub(super) bytes: u64,
    /// The number of the field that was refused.
    pub(super) failed: Option<usize>,
}

/// What `content-length` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Length {
    #[default]
    Unsaid,
    Known(u64),
    Wrong,
}

impl Facts {
    /// Takes a field that says how the message is framed.
    pub(super) fn frame(&mut self, name: &[u8], value: &[u8]) -> Result<(), HeadError> {
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if self.length != Length::Unsaid {
                    return Err(CODEC);
                }
                self.length = parse_length(value).map_or(Length::Wrong, Length::Known);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                self.chunked = value.eq_ignore_ascii_case(b"chunked");
                self.odd_te |= self.te || !self.chunked;
                self.te = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// Envoy `HeaderUtility::shouldCloseConnection`.
    pub(super) fn stays_open(&self, http10: bool) -> bool {
        !self.proxy_close && if http10 { self.keep_alive } else { !self.close }
    }

    pub(super) fn body_length(&mut self, limits: &Limits) -> Result<BodyLength, HeadError> {
        if self.length == Length::Wrong && !self.chunked {
            return Err(CODEC);
        }
        if self.te && self.length != Length::Unsaid {
            if !self.chunked || !limits.chunked_length {
                return Err(bad("http1.content_length_and_chunked_not_allowed"));
            }
            self.drop_length = true;
        }
        if self.odd_te {
            return Err(INVALID_TE);
        }
        self.upgrade &= self.has_upgrade;
        Ok(match (self.chunked, self.length) {
            (true, _) => BodyLength::Chunked,
            (_, Length::Known(0)) => BodyLength::None,
            (_, Length::Known(n)) => BodyLength::Length(n),
            _ => BodyLength::Close,
        })
    }
}

/// Takes the fields of a head into `headers`.
pub(super) struct Fields<'a> {
    headers: &'a mut Headers,
    limits: &'a Limits,
    facts: &'a mut Facts,
    request: bool,
    count: usize,
    host_seen: bool,
    written: Option<WrittenNames>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(headers: &'a mut Headers, limits: &'a Limits, facts: &'a mut Facts, request: bool) -> Self {
        let written = match limits.case {
            HeaderCase::Preserve { proper_others, .. } => Some(WrittenNames::new(proper_others)),
            HeaderCase::Lower | HeaderCase::Proper => None,
        };
        Self { headers, limits, facts, request, count: 0, host_seen: false, written }
    }

    /// Reads the lines from `at` up to the empty line; `ends`: where they end, if that is known.
    pub(super) fn read(mut self, head: &[u8], at: usize, ends: Option<&[u32]>) -> Result<(), HeadError> {
        let block = self.headers.block(&head[at..]);
        match ends {
            Some(ends) => self.plain(head, at, block, ends)?,
            None => self.any(&head[at..], block)?,
        }
        if let Some(written) = self.written {
            self.headers.set_written(written);
        }
        if self.count == 0 {
            // The end of the head is to Envoy's codec the end of a field.
            self.facts.bytes = FIELD_BYTES;
        }
        // Those that exist once count once, and those that are left out not at all.
        let most = self.limits.fields.saturating_add(self.facts.dropped as usize);
        if self.count > most && self.count - self.headers.repeated_single() > most {
            return Err(TOO_MANY);
        }
        Ok(())
    }

    fn plain(&mut self, head: &[u8], first: usize, block: usize, ends: &[u32]) -> Result<(), HeadError> {
        let mut at = first;
        for end in ends {
            let line = &head[at..*end as usize];
            let (colon, lower, value) = plain_field(line)?;
            // One blank before the value and none behind it: the line can stay as it is.
            let usual = match value {
                [b' ', value @ ..] if !matches!(value, [b' ', ..] | [.., b' ']) => Some(value),
                _ => None,
            };
            let start = usual.map(|_| block + at - first);
            self.field(&line[..colon], lower, usual.unwrap_or_else(|| value.trim_ascii()), start)?;
            at = *end as usize + 2;
        }
        Ok(())
    }

    fn any(&mut self, mut rest: &[u8], block: usize) -> Result<(), HeadError> {
        let length = rest.len();
        loop {
            let start = block + length - rest.len();
            let Some(line) = next_line(&mut rest)? else { return Ok(()) };
            let (colon, lower, value) = any_field(line)?;
            // One blank before the value and CR LF behind it.
            let usual = matches!(value, Cow::Borrowed(_))
                && colon + 3 + value.len() == line.len()
                && line[colon + 1] == b' '
                && line.last() == Some(&b'\r');
            self.field(&line[..colon], lower, &value, usual.then_some(start))?;
        }
    }

    /// `start`: the line is in the block there, in the usual form. `lower`: the name has no capitals.
    #[inline]
    fn field(&mut self, name: &[u8], lower: bool, value: &[u8], start: Option<usize>) -> Result<(), HeadError> {
        let (limits, facts, headers) = (self.limits, &mut *self.facts, &mut *self.headers);
        self.count += 1;
        facts.bytes += name.len() as u64 + value.len() as u64 + FIELD_BYTES;
        if self.request && limits.underscores != UnderscoreAction::Allow && name.contains(&b'_') {
            match limits.underscores {
                UnderscoreAction::Reject => {
                    facts.failed = Some(self.count);
                    return Err(bad("http1.unexpected_underscore"));
                }
                _ => {
                    facts.dropped += 1;
                    return Ok(());
                }
            }
        }
        if let Some(written) = &mut self.written {
            written.remember(name);
        }
        match name.len() {
            14 | 17 => facts.frame(name, value)?,
            10 if name.eq_ignore_ascii_case(b"connection") => {
                for token in value.split(|b| *b == b',').map(|t| t.trim_ascii()) {
                    facts.close |= token.eq_ignore_ascii_case(b"close");
                    facts.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
                    facts.upgrade |= token.eq_ignore_ascii_case(b"upgrade");
                    facts.nominates |= [&b"close"[..], b"keep-alive", b"upgrade", b"te"]
                        .iter()
                        .all(|known| !token.eq_ignore_ascii_case(known));
                }
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => facts.has_upgrade = true,
            16 if name.eq_ignore_ascii_case(b"proxy-connection") => {
                let mut tokens = value.split(|b| *b == b',');
                facts.proxy_close |= tokens.any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"));
            }
            6 if name.eq_ignore_ascii_case(b"expect") => {
                facts.expect_continue = value.eq_ignore_ascii_case(b"100-continue");
            }
            4 if self.request && name.eq_ignore_ascii_case(b"host") => {
                if self.host_seen {
                    self.count -= 1;
                }
                self.host_seen = true;
                if !facts.authority {
                    headers.push(b":authority", value);
                    facts.authority = true;
                    facts.host = true;
                } else if facts.host {
                    headers.append(":authority", value, ",");
                }
                return Ok(());
            }
            _ => {}
        }
        match start {
            Some(start) => headers.push_line(start, name.len(), value.len(), lower),
            None => headers.push(name, value),
        }
        Ok(())
    }
}

/// Which bytes are letters, digits or one of these: a table, for every byte of every head is looked up.
const fn alphanumeric_or(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut b = 0;
    while b < 256 {
        table[b] = (b as u8).is_ascii_alphanumeric();
        b += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = true;
        at += 1;
    }
    table
}

/// What Envoy's `HeaderUtility::authorityIsValid` lets through.
pub(super) fn authority_char(b: u8) -> bool {
    static TABLE: [bool; 256] = alphanumeric_or(b"-._~!$&'()*+,;=:@[]%");
    TABLE[usize::from(b)]
}

/// The next field of a head in whatever form, with its continuation lines and without the last LF; `None` at the empty line.
pub(in crate::h1) fn next_line<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>, HeadError> {
    if rest.is_empty() || rest.starts_with(b"\n") || rest.starts_with(b"\r\n") {
        return Ok(None);
    }
    let mut end = find(rest, b'\n').ok_or(CODEC)?;
    // A folded line belongs to the value before it (RFC 9112, 5.2).
    while matches!(rest.get(end + 1), Some(b' ' | b'\t')) {
        end = end + 1 + find(&rest[end + 1..], b'\n').ok_or(CODEC)?;
    }
    let line = &rest[..end];
    *rest = &rest[end + 1..];
    Ok(Some(line))
}

/// Where the name of a field ends, whether that has no capital, and the value.
pub(in crate::h1) fn any_field(line: &[u8]) -> Result<(usize, bool, Cow<'_, [u8]>), HeadError> {
    let (colon, lower) = name_end(line);
    if line.get(colon) == Some(&0) {
        return Err(INVALID_CHARACTERS);
    }
    if colon == 0 || line.get(colon) != Some(&b':') {
        return Err(CODEC);
    }
    Ok((colon, lower, clean_value(&line[colon + 1..])?))
}

/// RFC 9110 token characters.
pub(crate) fn is_token(b: u8) -> bool {
    TOKEN[usize::from(b)]
}

pub(in crate::h1) static TOKEN: [bool; 256] = alphanumeric_or(b"!#$%&'*+-.^_`|~");

/// The value without surrounding blanks, with CR and LF inside squeezed out; refuses other control characters.
fn clean_value(value: &[u8]) -> Result<Cow<'_, [u8]>, HeadError> {
    let value = value.trim_ascii();
    if !has_controls(value) {
        return Ok(Cow::Borrowed(value));
    }
    let mut squeeze = false;
    for b in value {
        match b {
            b'\r' | b'\n' => squeeze = true,
            b'\t' | 32..=126 | 128.. => {}
            _ => return Err(INVALID_CHARACTERS),
        }
    }
    if squeeze {
        return Ok(Cow::Owned(value.iter().copied().filter(|b| !matches!(b, b'\r' | b'\n')).collect()));
    }
    Ok(Cow::Borrowed(value))
}

fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}
