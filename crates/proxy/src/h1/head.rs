//! Parsing of HTTP/1 heads, with the reading rules of Envoy 1.40 (Balsa parser, as the conformance data
//! shows them: bare LF accepted, obs-fold joined, CR inside a value dropped, names strict).

mod fields;

pub(crate) use fields::is_token;
pub(super) use fields::{TOKEN, any_field, next_line};

use super::scan::Extent;
use fields::{Facts, Fields, Length, authority_char};
use proxy_core::Headers;
use proxy_core::cluster::{HeaderCase, Http1Options};
use proxy_core::matchers::StringMatcher;
use std::ops::Range;
use std::sync::Arc;

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
#[derive(Clone, Debug)]
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
    /// `ignore_http_11_upgrade`.
    pub(crate) ignored_upgrades: Arc<[StringMatcher]>,
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
            ignored_upgrades: options.ignored_upgrades.clone(),
            ..Self::default()
        }
    }

    fn knows_method(&self, method: &[u8]) -> bool {
        known_method(method) || (self.custom_methods && !method.is_empty() && method.iter().all(|b| is_token(*b)))
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
            ignored_upgrades: Arc::default(),
        }
    }
}

/// Why a head was refused; `detail` is Envoy's response code detail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub(crate) struct HeadError {
    pub(crate) status: u16,
    pub(crate) detail: &'static str,
    /// Bytes of the fields that were read before that, see [`FIELD_BYTES`].
    pub(crate) fields: u64,
    /// It is known, and accepted, that the client speaks HTTP/1.0.
    pub(crate) http10: bool,
}

impl HeadError {
    pub(crate) const fn new(status: u16, detail: &'static str) -> Self {
        Self { status, detail, fields: 0, http10: false }
    }
}

const fn bad(detail: &'static str) -> HeadError {
    HeadError::new(400, detail)
}

/// What Envoy's codec counts of each field that it reads, besides name and value.
const FIELD_BYTES: u64 = 3;

/// Room for the fields of most messages and those that we add.
const USUAL_FIELDS: usize = 32;
const ADDED: usize = 384;

pub(super) const CODEC: HeadError = bad("http1.codec_error");
pub(super) const INVALID_CHARACTERS: HeadError = bad("http1.invalid_characters");
const INVALID_TE: HeadError = HeadError::new(501, "http1.invalid_transfer_encoding");
const LOW_VERSION: HeadError = HeadError::new(426, "low_version");
pub(super) const TOO_LARGE: HeadError = HeadError::new(431, "http1.headers_too_large");
pub(super) const TOO_MANY: HeadError = HeadError::new(431, "http1.too_many_headers");

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
    /// Bytes of the fields as they came, see [`FIELD_BYTES`].
    pub(crate) fields: u64,
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
    /// Bytes of the fields as they came, see [`FIELD_BYTES`].
    pub(crate) fields: u64,
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
    let blank = leading_blank(buf);
    let Some(extent) = Extent::of(buf) else { return early(buf, blank, limits) };
    let Extent { start, end, .. } = extent;
    if end - start > limits.bytes {
        return Err(TOO_LARGE);
    }
    let head = &buf[start..end];
    let line_end = find(head, b'\n').ok_or(CODEC)?;
    if head[0] <= b' ' {
        return Err(CODEC);
    }
    let line = request_line(&head[..line_end], limits).map_err(|e| match has_version(&head[..line_end]) {
        true => blame(head, line_end, (e, 0)),
        // What follows is another message.
        false => e,
    })?;
    if line.version.is_empty() {
        return line.alone(&head[..line_end], limits).map(|head| Some((head, start + line_end + 1)));
    }
    let mut facts = Facts::default();
    let head = line.with_fields(head, line_end, extent.field_ends(), limits, &mut facts).map_err(|e| {
        let failed = if e == TOO_MANY { limits.fields + 1 } else { facts.failed.unwrap_or(usize::MAX) };
        blame(head, line_end, (e, failed))
    })?;
    Ok(Some((head, end)))
}

/// What can be said of a head that is not complete. A client that speaks something else would wait for ever for its end.
fn early(buf: &[u8], blank: usize, limits: &Limits) -> Result<Option<(Box<RequestHead>, usize)>, HeadError> {
    let head = &buf[blank..];
    if head.first().is_some_and(|first| *first <= b' ') {
        return Err(CODEC);
    }
    if let Some(line_end) = find(head, b'\n') {
        let line = request_line(&head[..line_end], limits)?;
        if line.version.is_empty() {
            return line.alone(&head[..line_end], limits).map(|head| Some((head, blank + line_end + 1)));
        }
    }
    if head.len() > limits.bytes { Err(TOO_LARGE) } else { Ok(None) }
}

/// Why a complete head is refused of which `error` was found first, in the field with this number. As in Envoy, whose framer
/// goes through the whole head before the codec looks at single fields.
#[cold]
fn blame(head: &[u8], line_end: usize, (error, failed): (HeadError, usize)) -> HeadError {
    let control = |b: &u8| b.is_ascii_control() && !matches!(b, b'\t' | b'\r' | b'\n');
    if head.iter().any(control) {
        return INVALID_CHARACTERS;
    }
    let mut framing = Facts::default();
    let (mut rest, mut count, mut bytes) = (&head[line_end + 1..], 0, 0);
    loop {
        let line = match next_line(&mut rest) {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(e) => return e,
        };
        let (name, value) = match any_field(line) {
            Ok((colon, _, value)) => (&line[..colon], value),
            Err(e) => return e,
        };
        if let Err(e) = framing.frame(name, &value) {
            return e;
        }
        // A field is judged when the name of the next one has come.
        bytes += match count {
            _ if count < failed => name.len() as u64 + value.len() as u64 + FIELD_BYTES,
            _ if count == failed => name.len() as u64,
            _ => 0,
        };
        count += 1;
    }
    match framing.length {
        Length::Wrong if !framing.chunked => CODEC,
        _ if error == CODEC => CODEC,
        _ => HeadError { fields: bytes, ..error },
    }
}

/// Fields named by `connection` belong to this hop only (RFC 9110, 7.6.1). Those that say how the message is framed stay.
///
/// A client must not make us forget where a request is from (Envoy `Http1::Utility::sanitizeConnectionHeader`).
fn remove_nominated(headers: &mut Headers) -> Result<(), HeadError> {
    const REJECTED: HeadError = bad("http1.connection_header_rejected");
    const STAYS: [&str; 5] = ["close", "keep-alive", "te", "upgrade", "http2-settings"];
    const KEPT: [&str; 3] = ["connection", "content-length", "transfer-encoding"];
    const ORIGIN: [&str; 3] = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
    const MAX_NOMINATED: usize = 10;
    let value = headers.get_all("connection").collect::<Vec<_>>().join(&b","[..]);
    let tokens = value.split(|b| *b == b',').filter(|token| !token.is_empty());
    if tokens.clone().count() >= MAX_NOMINATED {
        return Err(REJECTED);
    }
    let mut left = Vec::new();
    for token in tokens.map(<[u8]>::trim_ascii) {
        let Ok(name) = std::str::from_utf8(token) else { continue };
        let name = name.to_ascii_lowercase();
        if name.starts_with(':') || ORIGIN.contains(&name.as_str()) {
            return Err(REJECTED);
        }
        if name == "host" {
            headers.remove(":authority");
        } else if STAYS.contains(&name.as_str()) {
            left.push(token);
        } else if !KEPT.contains(&name.as_str()) {
            headers.remove(&name);
        }
    }
    // Of what it named, only what is still there.
    match left.is_empty() {
        true => _ = headers.remove("connection"),
        false => headers.set("connection", &left.join(&b","[..])),
    }
    Ok(())
}

/// Takes the ignored ones out of the upgrades that a request offers; whether there are others.
fn leave_upgrades(headers: &mut Headers, ignored: &[StringMatcher]) -> bool {
    let offered = headers.joined("upgrade").unwrap_or_default().into_owned();
    let offered = offered.split(|b| *b == b',').map(<[u8]>::trim_ascii);
    let left: Vec<&[u8]> = offered.filter(|name| !ignored.iter().any(|ignored| ignored.matches(name))).collect();
    match left.is_empty() {
        true => _ = headers.remove("upgrade"),
        false => headers.set("upgrade", &left.join(&b","[..])),
    }
    !left.is_empty()
}

struct RequestLine {
    method: Range<usize>,
    target: Range<usize>,
    version: Range<usize>,
    connect: bool,
    http10: bool,
}

/// The first line of a request, without its LF.
fn request_line(line: &[u8], limits: &Limits) -> Result<RequestLine, HeadError> {
    let blank = |b: &u8| *b == b' ' || *b == b'\t';
    let trimmed = line.len() - line.iter().rev().take_while(|b| blank(b) || **b == b'\r').count();
    let line = &line[..trimmed];
    let method = 0..line.iter().position(blank).unwrap_or(line.len());
    let rest = method.end + line[method.end..].iter().take_while(|b| blank(b)).count();
    let target = rest..rest + line[rest..].iter().position(blank).unwrap_or(line.len() - rest);
    let rest = target.end + line[target.end..].iter().take_while(|b| blank(b)).count();
    let version = rest..line.len();
    if target.is_empty() || !limits.knows_method(&line[method.clone()]) {
        return Err(CODEC);
    }
    let connect = &line[method.clone()] == b"CONNECT";
    let known = version.is_empty() || is_version(&line[version.clone()]);
    if !known || !valid_target(&line[target.clone()], connect) {
        return Err(CODEC);
    }
    // Envoy takes every other version, and none (HTTP/0.9), for 1.0. It looks at how the line ends.
    Ok(RequestLine { method, target, version, connect, http10: !line.ends_with(b"HTTP/1.1") })
}

/// Whether there are three words in a request's line.
fn has_version(line: &[u8]) -> bool {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).count() > 2
}

impl RequestLine {
    /// A request of HTTP/0.9: it has no fields, and what follows is another message.
    fn alone(&self, line: &[u8], limits: &Limits) -> Result<Box<RequestHead>, HeadError> {
        self.with_fields(line, line.len(), Some(&[]), limits, &mut Facts::default())
    }

    /// The whole head, with the fields behind the line. The order of the checks is Envoy's
    /// (`ServerConnectionImpl::onHeadersCompleteBase`).
    fn with_fields(
        &self,
        head: &[u8],
        line_end: usize,
        ends: Option<&[u32]>,
        limits: &Limits,
        facts: &mut Facts,
    ) -> Result<Box<RequestHead>, HeadError> {
        let RequestLine { connect, http10, .. } = *self;
        let (method, target) = (&head[self.method.clone()], &head[self.target.clone()]);
        let mut headers = Headers::with_capacity(USUAL_FIELDS, head.len() + ADDED);
        headers.push(b":method", method);
        let absolute = if limits.absolute_url || connect {
            push_target(&mut headers, target, connect)
        } else {
            headers.push(b":path", target);
            Ok(None)
        };
        facts.authority = connect || matches!(absolute, Ok(Some(_)));
        Fields::new(&mut headers, limits, facts, true).read(head, (line_end + 1).min(head.len()), ends)?;
        let told = |e| HeadError { http10: http10 && limits.accept_http10, ..e };
        if connect {
            // What follows is not of HTTP (RFC 9110, 9.3.6).
            match (facts.length, facts.te) {
                (Length::Known(1..), _) => return Err(told(bad("http1.body_disallowed"))),
                (_, true) => return Err(told(INVALID_TE)),
                (length, _) => facts.drop_length = length != Length::Unsaid,
            }
        }
        let body = facts.body_length(limits).map_err(told)?;
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
        if facts.upgrade && !limits.ignored_upgrades.is_empty() {
            facts.upgrade = leave_upgrades(&mut headers, &limits.ignored_upgrades);
        }
        if facts.nominates && !facts.upgrade {
            remove_nominated(&mut headers).map_err(told)?;
        }
        let absolute = absolute.map_err(told)?;
        if target.first() == Some(&b'*') && (target.len() > 1 || method != b"OPTIONS") {
            return Err(told(bad("http1.invalid_url")));
        }
        if absolute == Some("https") && !limits.https_url {
            return Err(told(HeadError::new(403, "http1.https_url_on_plaintext_connection")));
        }
        if http10 && !limits.accept_http10 {
            return Err(LOW_VERSION);
        }
        if headers.get(":authority").is_some_and(|value| !value.iter().all(|b| authority_char(*b))) {
            return Err(told(bad("http.invalid_authority")));
        }
        Ok(Box::new(RequestHead {
            headers,
            body: if body == BodyLength::Close { BodyLength::None } else { body },
            http10,
            keep_alive: facts.stays_open(http10),
            upgrade: facts.upgrade,
            expect_continue: facts.expect_continue,
            absolute,
            dropped: facts.dropped,
            fields: facts.bytes,
        }))
    }
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
        headers.push(b":authority", target);
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
    headers.push(b":authority", host);
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
        if let Some(line_end) = find(buf, b'\n') {
            status_line(&buf[..line_end])?;
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
    if facts.drop_length {
        headers.remove("content-length");
    }
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
    let fields = facts.bytes;
    Ok(Some((ResponseHead { status, headers, body, keep_alive, ends, upgrade: facts.upgrade, fields }, end)))
}

/// Versions are as for requests. Like Envoy's parser, this one takes any number for a status.
fn status_line(line: &[u8]) -> Result<(u16, bool), HeadError> {
    if line.iter().any(|b| b.is_ascii_control() && !matches!(b, b'\t' | b'\r')) {
        return Err(INVALID_CHARACTERS);
    }
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
