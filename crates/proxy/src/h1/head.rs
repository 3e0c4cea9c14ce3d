//! Parsing of HTTP/1 heads, with the reading rules of Envoy 1.40 (Balsa parser, as the conformance data
//! shows them: bare LF accepted, obs-fold joined, CR inside a value dropped, names strict).

use super::scan::{Extent, has_controls, name_end, plain_field};
use proxy_core::cluster::{HeaderCase, Http1Options};
use proxy_core::{Headers, WrittenNames};
use std::borrow::Cow;
use std::ops::Range;

/// What to do with header names that contain `_`
/// (`envoy.config.core.v3.HttpProtocolOptions.headers_with_underscores_action`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UnderscoreAction {
    #[default]
    Allow,
    Reject,
    Drop,
}

/// Bounds of a head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of the whole head.
    pub(crate) bytes: usize,
    /// Header fields.
    pub(crate) fields: usize,
    /// `enable_trailers`: the number of trailers is bounded, too.
    pub(crate) trailers: bool,
    /// `http10` requests accepted (else 426).
    pub(crate) accept_http10: bool,
    pub(crate) underscores: UnderscoreAction,
    /// `allow_chunked_length`: a content-length beside chunked is dropped instead of refused.
    pub(crate) chunked_length: bool,
    /// `allow_absolute_url`: else a whole URL is taken for a path.
    pub(crate) absolute_url: bool,
    /// A whole URL may say https. Envoy does not take that from clients of its own that come in plain text.
    pub(crate) https_url: bool,
    /// `allow_custom_methods`.
    pub(crate) custom_methods: bool,
    /// Whether spellings of names are kept.
    pub(crate) case: HeaderCase,
}

impl Limits {
    /// Limits of a message with what the codec's options say.
    pub(crate) fn of(options: &Http1Options, bytes: u32, fields: u32) -> Self {
        Self {
            bytes: bytes as usize,
            fields: fields as usize,
            trailers: options.enable_trailers,
            accept_http10: options.accept_http_10,
            chunked_length: options.allow_chunked_length,
            absolute_url: options.allow_absolute_url.unwrap_or(true),
            custom_methods: options.allow_custom_methods,
            case: options.header_case,
            ..Self::default()
        }
    }

    fn knows_method(&self, method: &[u8]) -> bool {
        known_method(method) || (self.custom_methods && method.iter().all(|b| is_token(*b)))
    }
}

impl Default for Limits {
    /// Envoy's defaults: 60 KiB, 100 fields.
    fn default() -> Self {
        Self {
            bytes: 60 * 1024,
            fields: 100,
            trailers: false,
            accept_http10: false,
            underscores: UnderscoreAction::Allow,
            chunked_length: false,
            absolute_url: true,
            https_url: true,
            custom_methods: false,
            case: HeaderCase::Lower,
        }
    }
}

/// Why a head was refused; `detail` is Envoy's response code detail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub(crate) struct HeadError {
    pub(crate) status: u16,
    pub(crate) detail: &'static str,
}

const fn bad(detail: &'static str) -> HeadError {
    HeadError { status: 400, detail }
}

/// Room for the fields of most messages and those that we add.
const USUAL_FIELDS: usize = 32;
const ADDED: usize = 384;

pub(super) const CODEC: HeadError = bad("http1.codec_error");
pub(super) const INVALID_CHARACTERS: HeadError = bad("http1.invalid_characters");
const INVALID_TE: HeadError = HeadError { status: 501, detail: "http1.invalid_transfer_encoding" };
const LOW_VERSION: HeadError = HeadError { status: 426, detail: "low_version" };
pub(super) const TOO_LARGE: HeadError = HeadError { status: 431, detail: "http1.headers_too_large" };
pub(super) const TOO_MANY: HeadError = HeadError { status: 431, detail: "http1.too_many_headers" };

/// How the body of a message is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyLength {
    None,
    Length(u64),
    Chunked,
    /// Until the peer closes (responses only).
    Close,
}

#[derive(Debug)]
pub(crate) struct RequestHead {
    pub(crate) headers: Headers,
    pub(crate) body: BodyLength,
    pub(crate) http10: bool,
    pub(crate) keep_alive: bool,
    /// `connection: upgrade` with this `upgrade` token.
    pub(crate) upgrade: bool,
    pub(crate) expect_continue: bool,
    /// The request target was an absolute URI with this scheme.
    pub(crate) absolute: Option<&'static str>,
    /// So many fields were left out for the underscores in their names.
    pub(crate) dropped: u64,
}

#[derive(Debug)]
pub(crate) struct ResponseHead {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: BodyLength,
    pub(crate) keep_alive: bool,
    /// The peer says that the connection ends with it.
    pub(crate) ends: bool,
    /// `connection: upgrade` with an `upgrade`.
    pub(crate) upgrade: bool,
}

pub(super) fn find(buf: &[u8], byte: u8) -> Option<usize> {
    memchr::memchr(byte, buf)
}

/// Number of leading bytes of `buf` that are only line ends (to be discarded before a request).
fn leading_blank(buf: &[u8]) -> usize {
    buf.iter().take_while(|b| **b == b'\r' || **b == b'\n').count()
}

/// A request head from the front of `buf`: the head and the number of bytes it took; `None` when more bytes are needed.
pub(crate) fn parse_request(buf: &[u8], limits: &Limits) -> Result<Option<(Box<RequestHead>, usize)>, HeadError> {
    let Some(extent) = Extent::of(buf) else {
        if buf.len() - leading_blank(buf) > limits.bytes {
            return Err(TOO_LARGE);
        }
        early_refusal(&buf[leading_blank(buf)..], limits)?;
        return Ok(None);
    };
    let Extent { start, end, .. } = extent;
    if end - start > limits.bytes {
        return Err(TOO_LARGE);
    }
    let head = &buf[start..end];
    let line_end = find(head, b'\n').ok_or(CODEC)?;
    let line = request_line(&head[..line_end])?;
    let method = &head[line.method];
    if !limits.knows_method(method) {
        return Err(if method.iter().any(u8::is_ascii_control) { INVALID_CHARACTERS } else { CODEC });
    }
    let target = &head[line.target];
    if target.contains(&b'\r') {
        // To Envoy this ends a word of the line.
        return Err(CODEC);
    }
    if target.iter().any(u8::is_ascii_control) {
        return Err(INVALID_CHARACTERS);
    }
    let connect = method == b"CONNECT";
    if !valid_target(target, connect) {
        return Err(CODEC);
    }
    if target.first() == Some(&b'*') && (target.len() > 1 || method != b"OPTIONS") {
        return Err(bad("http1.invalid_url"));
    }
    let version = &head[line.version];
    let http10 = match version {
        b"HTTP/1.1" => false,
        // Without a version it is HTTP/0.9. Envoy takes that and every other version for 1.0.
        b"" => true,
        other if is_version(other) => true,
        _ => return Err(CODEC),
    };
    if http10 && !limits.accept_http10 {
        return Err(LOW_VERSION);
    }
    let mut headers = Headers::with_capacity(USUAL_FIELDS, end - start + ADDED);
    headers.push(b":method", method);
    let absolute = if limits.absolute_url || connect {
        push_target(&mut headers, target, connect)?
    } else {
        headers.push(b":path", target);
        None
    };
    if absolute == Some("https") && !limits.https_url {
        return Err(HeadError { status: 403, detail: "http1.https_url_on_plaintext_connection" });
    }
    let mut facts = Facts { authority: absolute.is_some() || connect, ..Facts::default() };
    if !version.is_empty() {
        // HTTP/0.9 has no fields; what stands there is not looked at.
        Fields::new(&mut headers, limits, &mut facts, true).read(head, line_end + 1, extent.field_ends())?;
    }
    if connect {
        // What follows is not of HTTP (RFC 9110, 9.3.6).
        match (facts.length, facts.chunked) {
            (Some(1..), _) => return Err(bad("http1.body_disallowed")),
            (_, true) => return Err(INVALID_TE),
            (length, _) => facts.drop_length = length.is_some(),
        }
    }
    let body = facts.body_length(limits)?;
    headers.join_single();
    if facts.drop_length {
        headers.remove("content-length");
    }
    if facts.upgrade && headers.get("upgrade").is_some_and(|name| name.eq_ignore_ascii_case(b"h2c")) {
        // HTTP/2 is offered, and not taken (RFC 9110, 7.8): the request goes on as it is.
        headers.remove("upgrade");
        headers.remove("http2-settings");
        facts.upgrade = false;
    }
    if facts.nominates && !facts.upgrade {
        remove_nominated(&mut headers)?;
    }
    let keep_alive = facts.stays_open(http10);
    let body = match body {
        BodyLength::Close => BodyLength::None,
        other => other,
    };
    let head = RequestHead {
        headers,
        body,
        http10,
        keep_alive,
        upgrade: facts.upgrade,
        expect_continue: facts.expect_continue,
        absolute,
        dropped: facts.dropped,
    };
    Ok(Some((Box::new(head), end)))
}

/// Fields named by `connection` belong to this hop only (RFC 9110, 7.6.1). Those that say how the message is framed stay.
///
/// A client must not make us forget where a request is from (Envoy `Http1::Utility::sanitizeConnectionHeader`).
fn remove_nominated(headers: &mut Headers) -> Result<(), HeadError> {
    const REJECTED: HeadError = bad("http1.connection_header_rejected");
    const KEPT: [&str; 6] = ["connection", "content-length", "transfer-encoding", "te", "upgrade", "http2-settings"];
    const ORIGIN: [&str; 3] = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
    const MAX_NOMINATED: usize = 10;
    let value = headers.get_all("connection").collect::<Vec<_>>().join(&b","[..]);
    let tokens = value.split(|b| *b == b',').filter(|token| !token.is_empty());
    if tokens.clone().count() >= MAX_NOMINATED {
        return Err(REJECTED);
    }
    for token in tokens {
        let Ok(name) = std::str::from_utf8(token.trim_ascii()) else { continue };
        let name = name.to_ascii_lowercase();
        if name.starts_with(':') || ORIGIN.contains(&name.as_str()) {
            return Err(REJECTED);
        }
        if name == "host" {
            headers.remove(":authority");
        } else if !KEPT.contains(&name.as_str()) {
            headers.remove(&name);
        }
    }
    Ok(())
}

/// Garbage is refused before its end is seen: a client that speaks something else would wait for ever.
fn early_refusal(buf: &[u8], limits: &Limits) -> Result<(), HeadError> {
    if buf.first().is_some_and(|first| *first <= b' ') {
        return Err(CODEC);
    }
    if let Some(end) = find(buf, b'\n') {
        let line = request_line(&buf[..end])?;
        if !limits.knows_method(&buf[line.method]) {
            return Err(CODEC);
        }
    }
    Ok(())
}

struct RequestLine {
    method: Range<usize>,
    target: Range<usize>,
    version: Range<usize>,
}

fn request_line(line: &[u8]) -> Result<RequestLine, HeadError> {
    let blank = |b: &u8| *b == b' ' || *b == b'\t';
    let trimmed = line.len() - line.iter().rev().take_while(|b| blank(b) || **b == b'\r').count();
    let line = &line[..trimmed];
    let method = 0..line.iter().position(blank).unwrap_or(line.len());
    let rest = method.end + line[method.end..].iter().take_while(|b| blank(b)).count();
    let target = rest..rest + line[rest..].iter().position(blank).unwrap_or(line.len() - rest);
    let rest = target.end + line[target.end..].iter().take_while(|b| blank(b)).count();
    let version = rest..line.len();
    if target.is_empty() {
        return Err(CODEC);
    }
    Ok(RequestLine { method, target, version })
}

/// `HTTP/` and two digits.
fn is_version(text: &[u8]) -> bool {
    matches!(text, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit())
}

/// Methods that Envoy's codec knows when `allow_custom_methods` is off.
fn known_method(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET"
            | b"POST"
            | b"PUT"
            | b"HEAD"
            | b"DELETE"
            | b"OPTIONS"
            | b"PATCH"
            | b"CONNECT"
            | b"TRACE"
            | b"ACL"
            | b"BIND"
            | b"CHECKOUT"
            | b"COPY"
            | b"LINK"
            | b"LOCK"
            | b"MERGE"
            | b"MKACTIVITY"
            | b"MKCALENDAR"
            | b"MKCOL"
            | b"MOVE"
            | b"MSEARCH"
            | b"NOTIFY"
            | b"PROPFIND"
            | b"PROPPATCH"
            | b"PURGE"
            | b"QUERY"
            | b"REBIND"
            | b"REPORT"
            | b"SEARCH"
            | b"SOURCE"
            | b"SUBSCRIBE"
            | b"UNBIND"
            | b"UNLINK"
            | b"UNLOCK"
            | b"UNSUBSCRIBE"
    )
}

fn valid_target(target: &[u8], connect: bool) -> bool {
    let path_char = |b: &u8| (b'!'..=126).contains(b);
    let host_char = |b: &u8| b.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=@[]_~".contains(b);
    match target.first() {
        None => false,
        Some(b'/' | b'*') => target[1..].iter().all(path_char),
        Some(first) => {
            let mut rest = target;
            if !connect {
                let scheme = target.iter().take_while(|b| b.is_ascii_alphanumeric() || b"+-.".contains(b)).count();
                if !first.is_ascii_alphabetic() || !target[scheme..].starts_with(b"://") {
                    return false;
                }
                rest = &target[scheme + 3..];
            }
            let host = rest.iter().position(|b| *b == b'/' || *b == b'?').unwrap_or(rest.len());
            rest[..host].iter().all(host_char)
                && !rest[..host].windows(2).any(|w| w == b"@@")
                && rest[host..].iter().all(path_char)
        }
    }
}

/// Pushes `:path` and, for absolute targets and CONNECT, `:authority`.
fn push_target(headers: &mut Headers, target: &[u8], connect: bool) -> Result<Option<&'static str>, HeadError> {
    if connect {
        if matches!(target.first(), Some(b'/' | b'*')) || !ends_in_port(target) {
            return Err(bad("http1.invalid_url"));
        }
        headers.push(b":authority", authority(target)?);
        return Ok(None);
    }
    if matches!(target.first(), Some(b'/' | b'*')) {
        headers.push(b":path", target);
        return Ok(None);
    }
    let colon = find(target, b':').ok_or(CODEC)?;
    let scheme = if target[..colon].eq_ignore_ascii_case(b"http") {
        "http"
    } else if target[..colon].eq_ignore_ascii_case(b"https") {
        "https"
    } else {
        return Err(bad("http1.invalid_scheme"));
    };
    let rest = target.get(colon + 3..).ok_or(CODEC)?;
    let host_len = rest.iter().position(|b| matches!(b, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    if host_len == 0 {
        return Err(bad("http1.invalid_url"));
    }
    // Who the user is belongs to no authority (RFC 9110, 4.2.4).
    let host = rest[..host_len].rsplit(|b| *b == b'@').next().unwrap_or_default();
    let bare =
        host.iter().rev().take_while(|b| **b != b':' && **b != b']').count() == host.len() || host.ends_with(b"]");
    if !bare && !ends_in_port(host) {
        return Err(bad("http1.invalid_url"));
    }
    headers.push(b":authority", authority(host)?);
    // A query without a path is no path: the connection manager refuses it.
    let path = &rest[host_len..];
    headers.push(b":path", if path.is_empty() { b"/" } else { path });
    Ok(Some(scheme))
}

/// Whether an authority ends in a port number.
fn ends_in_port(host: &[u8]) -> bool {
    let port = host.iter().rposition(|b| *b == b':').map(|colon| &host[colon + 1..]);
    port.and_then(|port| std::str::from_utf8(port).ok()?.parse::<u16>().ok()).is_some()
}

/// What the framing and connection headers of one head say.
#[derive(Default)]
struct Facts {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    /// `proxy-connection: close`.
    proxy_close: bool,
    keep_alive: bool,
    upgrade: bool,
    /// `connection` names other fields of this hop.
    nominates: bool,
    has_upgrade: bool,
    expect_continue: bool,
    drop_length: bool,
    /// `:authority` is known; a Host field is not looked at.
    authority: bool,
    /// It is what Host fields said; further ones are appended.
    host: bool,
    dropped: u64,
}

impl Facts {
    /// Envoy `HeaderUtility::shouldCloseConnection`.
    fn stays_open(&self, http10: bool) -> bool {
        !self.proxy_close && if http10 { self.keep_alive } else { !self.close }
    }

    fn body_length(&mut self, limits: &Limits) -> Result<BodyLength, HeadError> {
        if self.chunked && self.length.is_some() {
            if !limits.chunked_length {
                return Err(bad("http1.content_length_and_chunked_not_allowed"));
            }
            self.drop_length = true;
        }
        self.upgrade &= self.has_upgrade;
        Ok(match (self.chunked, self.length) {
            (true, _) => BodyLength::Chunked,
            (_, Some(0)) => BodyLength::None,
            (_, Some(n)) => BodyLength::Length(n),
            _ => BodyLength::Close,
        })
    }
}

/// Takes the fields of a head into `headers`.
struct Fields<'a> {
    headers: &'a mut Headers,
    limits: &'a Limits,
    facts: &'a mut Facts,
    request: bool,
    count: usize,
    te_seen: bool,
    written: Option<WrittenNames>,
}

impl<'a> Fields<'a> {
    fn new(headers: &'a mut Headers, limits: &'a Limits, facts: &'a mut Facts, request: bool) -> Self {
        let written = match limits.case {
            HeaderCase::Preserve { proper_others, .. } => Some(WrittenNames::new(proper_others)),
            HeaderCase::Lower | HeaderCase::Proper => None,
        };
        Self { headers, limits, facts, request, count: 0, te_seen: false, written }
    }

    /// Reads the lines from `at` up to the empty line; `ends`: where they end, if that is known.
    fn read(mut self, head: &[u8], at: usize, ends: Option<&[u32]>) -> Result<(), HeadError> {
        let block = self.headers.block(&head[at..]);
        match ends {
            Some(ends) => self.plain(head, at, block, ends)?,
            None => self.any(&head[at..], block)?,
        }
        if let Some(written) = self.written {
            self.headers.set_written(written);
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
        while !(rest.is_empty() || rest.starts_with(b"\n") || rest.starts_with(b"\r\n")) {
            let start = block + length - rest.len();
            let mut end = find(rest, b'\n').ok_or(CODEC)?;
            // A folded line belongs to the value before it (RFC 9112, 5.2).
            while matches!(rest.get(end + 1), Some(b' ' | b'\t')) {
                end = end + 1 + find(&rest[end + 1..], b'\n').ok_or(CODEC)?;
            }
            let line = &rest[..end];
            rest = &rest[end + 1..];
            let (colon, lower) = name_end(line);
            if line.get(colon) == Some(&0) {
                return Err(INVALID_CHARACTERS);
            }
            if colon == 0 || line.get(colon) != Some(&b':') {
                return Err(CODEC);
            }
            let value = clean_value(&line[colon + 1..])?;
            // One blank before the value and CR LF behind it.
            let usual = matches!(value, Cow::Borrowed(_))
                && colon + 3 + value.len() == end
                && line[colon + 1] == b' '
                && line[end - 1] == b'\r';
            self.field(&line[..colon], lower, &value, usual.then_some(start))?;
        }
        Ok(())
    }

    /// `start`: the line is in the block there, in the usual form. `lower`: the name has no capitals.
    #[inline]
    fn field(&mut self, name: &[u8], lower: bool, value: &[u8], start: Option<usize>) -> Result<(), HeadError> {
        let (limits, facts, headers) = (self.limits, &mut *self.facts, &mut *self.headers);
        self.count += 1;
        if self.count > limits.fields {
            return Err(TOO_MANY);
        }
        if self.request && limits.underscores != UnderscoreAction::Allow && name.contains(&b'_') {
            match limits.underscores {
                UnderscoreAction::Reject => return Err(bad("http1.unexpected_underscore")),
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
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if facts.length.is_some() {
                    return Err(CODEC);
                }
                facts.length = Some(parse_length(value).ok_or(CODEC)?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.te_seen || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(INVALID_TE);
                }
                self.te_seen = true;
                facts.chunked = true;
            }
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
                let value = authority(value)?;
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
fn authority(value: &[u8]) -> Result<&[u8], HeadError> {
    if value.iter().all(|b| authority_char(*b)) { Ok(value) } else { Err(bad("http.invalid_authority")) }
}

fn authority_char(b: u8) -> bool {
    static TABLE: [bool; 256] = alphanumeric_or(b"-._~!$&'()*+,;=:@[]%");
    TABLE[usize::from(b)]
}

/// RFC 9110 token characters.
pub(crate) fn is_token(b: u8) -> bool {
    TOKEN[usize::from(b)]
}

pub(super) static TOKEN: [bool; 256] = alphanumeric_or(b"!#$%&'*+-.^_`|~");

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

/// A response head from the front of `buf`. `head_request`: the request was HEAD, so there is no body.
pub(crate) fn parse_response(
    buf: &[u8],
    limits: &Limits,
    head_request: bool,
) -> Result<Option<(ResponseHead, usize)>, HeadError> {
    if buf.first().is_some_and(|first| *first != b'H') {
        return Err(CODEC);
    }
    let Some(extent) = Extent::of(buf) else {
        if buf.len() > limits.bytes {
            return Err(TOO_LARGE);
        }
        return Ok(None);
    };
    let Extent { start, end, .. } = extent;
    if end - start > limits.bytes {
        return Err(TOO_LARGE);
    }
    let head = &buf[start..end];
    let line_end = find(head, b'\n').ok_or(CODEC)?;
    let (status, http10) = status_line(&head[..line_end])?;
    let mut headers = Headers::with_capacity(USUAL_FIELDS, end - start + ADDED);
    headers.set_status(status);
    let mut facts = Facts::default();
    Fields::new(&mut headers, limits, &mut facts, false).read(head, line_end + 1, extent.field_ends())?;
    headers.join_single();
    if matches!(limits.case, HeaderCase::Preserve { reason: true, .. }) {
        headers.set_reason(reason(&head[..line_end]));
    }
    let mut body = facts.body_length(limits)?;
    if status < 200 || status == 204 {
        if matches!(body, BodyLength::Chunked | BodyLength::Length(_)) {
            // RFC 9110, 8.6: who says so means another status, or another message.
            return Err(CODEC);
        }
        headers.remove("content-length");
    }
    if head_request || (100..200).contains(&status) || status == 204 || status == 304 {
        body = BodyLength::None;
    }
    let ends = !facts.stays_open(http10);
    let keep_alive = !ends && body != BodyLength::Close;
    Ok(Some((ResponseHead { status, headers, body, keep_alive, ends, upgrade: facts.upgrade }, end)))
}

/// Versions are as for requests. Like Envoy's parser, this one takes any number for a status.
fn status_line(line: &[u8]) -> Result<(u16, bool), HeadError> {
    let (version, rest) = line.split_at_checked(8).ok_or(CODEC)?;
    if !is_version(version) || !matches!(rest.first(), Some(b' ' | b'\t')) {
        return Err(CODEC);
    }
    let rest = rest.trim_ascii();
    let digits = &rest[..rest.iter().position(|b| matches!(b, b' ' | b'\t')).unwrap_or(rest.len())];
    if digits.is_empty() || digits.len() > 4 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(CODEC);
    }
    let status = digits.iter().fold(0u16, |n, d| n * 10 + u16::from(d - b'0'));
    Ok((status, version != b"HTTP/1.1"))
}

/// What follows the status code, if it can stand in a line of ours.
fn reason(line: &[u8]) -> Option<&str> {
    let rest = line[8..].trim_ascii();
    let rest = &rest[rest.iter().position(u8::is_ascii_whitespace)?..];
    let text = std::str::from_utf8(rest.trim_ascii()).ok()?;
    (!text.is_empty() && !text.bytes().any(|b| b.is_ascii_control())).then_some(text)
}

#[cfg(test)]
mod tests;
