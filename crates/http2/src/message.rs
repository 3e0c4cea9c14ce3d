//! Rules of messages (RFC 9113, section 8), as strict as those of nghttp2, on which Envoy's codec is made (its
//! `nghttp2_http.c`): what makes a head malformed, and whether a body has the length that was said.

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Keep,
    /// It is left out: a length that says nothing.
    Skip,
    /// The message is malformed.
    Malformed,
}

/// What a stream's fields said so far; of its head, then of its trailers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    seen: u16,
    /// Something that is no pseudo-header came.
    regular: bool,
    pub(crate) status: u16,
    /// `content-length`.
    length: Option<u64>,
    /// Bytes of body that came.
    came: u64,
}

const AUTHORITY: u16 = 1;
const METHOD: u16 = 1 << 1;
const PATH: u16 = 1 << 2;
const SCHEME: u16 = 1 << 3;
const PROTOCOL: u16 = 1 << 4;
const HOST: u16 = 1 << 5;
const STATUS: u16 = 1 << 6;
const HEAD: u16 = 1 << 7;
const CONNECT: u16 = 1 << 8;
const OPTIONS: u16 = 1 << 9;
/// The scheme is one of HTTP's.
const HTTP_SCHEME: u16 = 1 << 10;
const ROOTED: u16 = 1 << 11;
const ASTERISK: u16 = 1 << 12;
/// Only interim answers came.
const INTERIM: u16 = 1 << 13;

impl Rules {
    /// Of the answer to a request with this method.
    pub(crate) fn of_answer(method: Option<&[u8]>) -> Self {
        let seen = match method {
            Some(b"HEAD") => HEAD,
            Some(b"CONNECT") => CONNECT,
            _ => 0,
        };
        Self { seen, ..Self::default() }
    }

    /// Looks at a field. `trailer`: of trailers; `connect`: extended CONNECT is allowed; only of requests.
    pub(crate) fn request_field(&mut self, name: &[u8], value: &[u8], trailer: bool, connect: bool) -> Verdict {
        if let Some(verdict) = self.name(name, trailer) {
            return verdict;
        }
        let fine = match name {
            b":authority" => all(value, AUTHORITY_CHARS) && self.first(AUTHORITY, value),
            b":method" => {
                let fine = !value.is_empty() && all(value, TOKEN_CHARS) && self.first(METHOD, value);
                self.seen |= match value {
                    b"HEAD" => HEAD,
                    b"CONNECT" => CONNECT,
                    b"OPTIONS" => OPTIONS,
                    _ => 0,
                };
                fine
            }
            b":path" => {
                let fine = all(value, PATH_CHARS) && self.first(PATH, value);
                self.seen |= match value {
                    [b'/', ..] => ROOTED,
                    b"*" => ASTERISK,
                    _ => 0,
                };
                fine
            }
            b":scheme" => {
                if matches!(value, b"http" | b"https") {
                    self.seen |= HTTP_SCHEME;
                }
                is_scheme(value) && self.first(SCHEME, value)
            }
            b":protocol" => {
                let blank = value.iter().all(|b| matches!(b, b' ' | b'\t'));
                connect && !blank && self.first(PROTOCOL, value) && all(value, VALUE_CHARS)
            }
            b"host" => all(value, AUTHORITY_CHARS) && self.first(HOST, value),
            b"content-length" => self.length(value),
            _ => return self.regular(name, value),
        };
        if fine { Verdict::Keep } else { Verdict::Malformed }
    }

    /// The same of an answer.
    pub(crate) fn answer_field(&mut self, name: &[u8], value: &[u8], trailer: bool) -> Verdict {
        if let Some(verdict) = self.name(name, trailer) {
            return verdict;
        }
        let fine = match name {
            b":status" => {
                let digits = value.len() == 3 && value.iter().all(u8::is_ascii_digit);
                let number = value.iter().fold(0, |sum: u16, b| sum.wrapping_mul(10).wrapping_add(u16::from(b & 15)));
                let fine = self.first(STATUS, value) && digits && number != 101;
                self.status = if fine { number } else { 0 };
                fine
            }
            b"content-length" if self.status == 204 => {
                if self.length.is_some() || value != b"0" {
                    return Verdict::Malformed;
                }
                self.length = Some(0);
                return Verdict::Skip;
            }
            b"content-length" if self.status / 100 == 1 => false,
            b"content-length" if self.status / 100 == 2 && self.seen & CONNECT != 0 => return Verdict::Skip,
            b"content-length" => self.length(value),
            _ => return self.regular(name, value),
        };
        if fine { Verdict::Keep } else { Verdict::Malformed }
    }

    /// What is already known by the name.
    fn name(&mut self, name: &[u8], trailer: bool) -> Option<Verdict> {
        match name {
            [b':', ..] => (trailer || self.regular).then_some(Verdict::Malformed),
            _ => {
                self.regular = true;
                (name.is_empty() || !all(name, NAME_CHARS)).then_some(Verdict::Malformed)
            }
        }
    }

    fn regular(&self, name: &[u8], value: &[u8]) -> Verdict {
        match name {
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                Verdict::Malformed
            }
            b"te" if !value.eq_ignore_ascii_case(b"trailers") => Verdict::Malformed,
            b"te" => Verdict::Keep,
            [b':', ..] => Verdict::Malformed,
            _ if all(value, VALUE_CHARS) => Verdict::Keep,
            _ => Verdict::Malformed,
        }
    }

    /// Whether a field that may be there once, and not empty, is there for the first time.
    fn first(&mut self, flag: u16, value: &[u8]) -> bool {
        let first = self.seen & flag == 0 && !value.is_empty();
        self.seen |= flag;
        first
    }

    fn length(&mut self, value: &[u8]) -> bool {
        if self.length.is_some() || value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
            return false;
        }
        let digits = std::str::from_utf8(value).ok();
        self.length = digits.and_then(|digits| digits.parse().ok()).filter(|length| i64::try_from(*length).is_ok());
        self.length.is_some()
    }

    /// At the end of a request's head: whether all is there that must be.
    pub(crate) fn is_request(&mut self) -> bool {
        let has = |flags| self.seen & flags == flags;
        if has(CONNECT) && !has(PROTOCOL) {
            self.length = None;
            return self.seen & (SCHEME | PATH) == 0 && has(AUTHORITY);
        }
        let path = !has(HTTP_SCHEME) || has(ROOTED) || has(OPTIONS | ASTERISK);
        has(METHOD | PATH | SCHEME)
            && self.seen & (AUTHORITY | HOST) != 0
            && (!has(PROTOCOL) || has(CONNECT | AUTHORITY))
            && path
    }

    /// At the end of an answer's head: whether it is one.
    pub(crate) fn is_answer(&mut self) -> bool {
        if self.seen & STATUS == 0 {
            return false;
        }
        if self.status / 100 == 1 {
            *self = Self { seen: self.seen & (HEAD | CONNECT) | INTERIM, status: self.status, ..Self::default() };
            return true;
        }
        self.seen &= !INTERIM;
        if self.seen & HEAD != 0 || matches!(self.status, 204 | 304) {
            self.length = Some(0);
        } else if self.seen & CONNECT != 0 {
            self.length = None;
        }
        true
    }

    /// Whether the head that came last was not the last one.
    pub(crate) fn is_interim(&self) -> bool {
        self.seen & INTERIM != 0
    }

    /// Takes note of a part of the body. False when there is more than was said, or none may be.
    pub(crate) fn data(&mut self, length: usize) -> bool {
        self.came += length as u64;
        !self.is_interim() && self.length.is_none_or(|said| self.came <= said)
    }

    /// At the end of the message: whether it is whole.
    pub(crate) fn is_whole(&self) -> bool {
        !self.is_interim() && self.length.is_none_or(|said| said == self.came)
    }
}

fn is_scheme(value: &[u8]) -> bool {
    let rest = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
    value.first().is_some_and(u8::is_ascii_alphabetic) && value.iter().all(rest)
}

fn all(value: &[u8], of: &[u8; 256]) -> bool {
    // Without an early end the compiler looks at several bytes at once.
    value.iter().fold(1, |fine, b| fine & of[usize::from(*b)]) == 1
}

const fn chars(letters: bool, from: u8, to: u8, others: &[u8]) -> [u8; 256] {
    let mut table = [0; 256];
    let mut b = 0;
    while b < 256 {
        let byte = b as u8;
        if (letters && byte.is_ascii_alphanumeric()) || (from <= byte && byte <= to) {
            table[b] = 1;
        }
        b += 1;
    }
    let mut at = 0;
    while at < others.len() {
        table[others[at] as usize] = 1;
        at += 1;
    }
    table
}

const NONE: (u8, u8) = (1, 0);
static TOKEN_CHARS: &[u8; 256] = &chars(true, NONE.0, NONE.1, b"!#$%&'*+-.^_`|~");
static NAME_CHARS: &[u8; 256] = &{
    let mut table = *TOKEN_CHARS;
    let mut upper = b'A';
    while upper <= b'Z' {
        table[upper as usize] = 0;
        upper += 1;
    }
    table
};
static AUTHORITY_CHARS: &[u8; 256] = &chars(true, NONE.0, NONE.1, b"!$%&'()*+,-.:;=[]_~");
static VALUE_CHARS: &[u8; 256] = &{
    let mut table = chars(true, 0x20, 0xff, b"\t");
    table[0x7f] = 0;
    table
};
static PATH_CHARS: &[u8; 256] = &{
    let mut table = chars(true, 0x21, 0xff, b"");
    table[0x7f] = 0;
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &[(&str, &str)]) -> bool {
        let mut rules = Rules::default();
        let look = |(name, value): &(&str, &str)| rules.request_field(name.as_bytes(), value.as_bytes(), false, true);
        fields.iter().map(look).all(|verdict| verdict != Verdict::Malformed) && rules.is_request()
    }

    const GET: [(&str, &str); 3] = [(":method", "GET"), (":scheme", "http"), (":path", "/")];

    #[test]
    fn requests_have_what_they_must_have() {
        let with = |more: &[(&'static str, &'static str)]| request(&[&GET[..], more].concat());
        assert!(with(&[(":authority", "a")]) && with(&[("host", "a")]) && !with(&[]));
        assert!(!with(&[(":authority", "a"), (":authority", "a")]) && !with(&[("x", "y"), (":authority", "a")]));
        assert!(!with(&[(":authority", "u@a")]) && !with(&[(":authority", "a"), ("te", "gzip")]));
        assert!(!with(&[(":authority", "a"), ("X", "y")]) && !with(&[(":authority", "a"), ("x y", "z")]));
        assert!(!with(&[(":authority", "a"), ("content-length", "")]) && !with(&[(":authority", "a"), (":x", "y")]));
        assert!(!request(&[(":method", "GET"), (":scheme", "http"), (":path", "*"), (":authority", "a")]));
        assert!(request(&[(":method", "OPTIONS"), (":scheme", "http"), (":path", "*"), (":authority", "a")]));
        assert!(request(&[(":method", "CONNECT"), (":authority", "a:1")]));
        assert!(!request(&[(":method", "CONNECT"), (":authority", "a:1"), (":path", "/")]));
    }

    #[test]
    fn bodies_are_as_long_as_was_said() {
        let mut rules = Rules::default();
        rules.request_field(b"content-length", b"5", false, false);
        assert!(rules.data(3) && !rules.is_whole() && rules.data(2) && rules.is_whole() && !rules.data(1));
        let mut rules = Rules::of_answer(Some(b"HEAD"));
        assert_eq!(rules.answer_field(b":status", b"200", false), Verdict::Keep);
        assert_eq!(rules.answer_field(b"content-length", b"5", false), Verdict::Keep);
        assert!(rules.is_answer() && rules.is_whole() && !rules.data(1));
    }

    #[test]
    fn an_interim_answer_is_followed_by_another() {
        let mut rules = Rules::of_answer(None);
        rules.answer_field(b":status", b"103", false);
        rules.answer_field(b"link", b"x", false);
        assert!(rules.is_answer() && rules.is_interim() && !rules.is_whole());
        assert_eq!(rules.answer_field(b":status", b"200", false), Verdict::Keep);
        assert!(rules.is_answer() && !rules.is_interim() && rules.is_whole());
        assert_eq!(Rules::of_answer(None).answer_field(b":status", b"101", false), Verdict::Malformed);
    }
}
