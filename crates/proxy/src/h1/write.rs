//! Writing of HTTP/1 heads, as Envoy 1.40 does.

use proxy_core::cluster::{HeaderCase, Http1Options};
use proxy_core::{Headers, WrittenNames};

/// A field that the framing adds to a head: of this hop, so no field of the message that logs show.
pub(crate) type FramingField = (&'static str, &'static str);

/// The body comes in chunks.
pub(crate) const CHUNKED: FramingField = ("transfer-encoding", "chunked");
/// There is no body, where one could be.
pub(crate) const EMPTY: FramingField = ("content-length", "0");

/// Bytes of its line.
pub(crate) fn framing_bytes(framing: Option<FramingField>) -> u64 {
    framing.map_or(0, |(name, value)| (name.len() + value.len() + ": \r\n".len()) as u64)
}

/// How heads are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// Names get capitals, unless their spelling was kept.
    proper_case: bool,
    /// `send_fully_qualified_url`.
    whole_url: bool,
}

impl Style {
    pub(crate) fn of(options: &Http1Options) -> Self {
        Self { proper_case: options.header_case == HeaderCase::Proper, whole_url: options.send_fully_qualified_url }
    }
}

/// Methods without a defined body get no `content-length: 0` (Envoy `HeaderUtility::requestShouldHaveNoBody`).
pub(crate) fn is_bodiless(method: &[u8]) -> bool {
    matches!(method, b"GET" | b"HEAD" | b"DELETE" | b"TRACE" | b"CONNECT")
}

/// Writes a request head.
pub(crate) fn write_request(out: &mut Vec<u8>, headers: &Headers, framing: Option<FramingField>, style: Style) {
    let method = headers.get(":method").unwrap_or(b"GET");
    out.extend_from_slice(method);
    out.push(b' ');
    let authority = headers.get(":authority").unwrap_or_default();
    let path = headers.get(":path");
    if style.whole_url && path.is_some() && method != b"CONNECT" {
        out.extend_from_slice(headers.get(":scheme").unwrap_or(b"http"));
        out.extend_from_slice(b"://");
        out.extend_from_slice(authority);
    }
    out.extend_from_slice(path.unwrap_or(authority));
    out.extend_from_slice(b" HTTP/1.1\r\n");
    write_name(out, b"host", headers.written(), style);
    out.extend_from_slice(b": ");
    out.extend_from_slice(authority);
    out.extend_from_slice(b"\r\n");
    write_fields(out, headers, framing, style);
}

/// Writes a response head.
pub(crate) fn write_response(
    out: &mut Vec<u8>,
    status: u16,
    http10: bool,
    headers: &Headers,
    framing: Option<FramingField>,
    style: Style,
) {
    out.extend_from_slice(if http10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    match headers.get(":status") {
        // As it came.
        Some(odd) if !(100..1000).contains(&status) => out.extend_from_slice(odd),
        _ => {
            let digits = [status / 100, status / 10, status].map(|digit| b'0' + (digit % 10) as u8);
            out.extend_from_slice(&digits);
        }
    }
    out.push(b' ');
    let reason = headers.written().and_then(|written| written.reason.as_deref());
    out.extend_from_slice(reason.unwrap_or(reason_phrase(status)).as_bytes());
    out.extend_from_slice(b"\r\n");
    write_fields(out, headers, framing, style);
}

/// The name as the peer wrote it, with capitals, or as it is.
#[inline]
fn write_name(out: &mut Vec<u8>, name: &[u8], written: Option<&WrittenNames>, style: Style) {
    let proper = match written {
        None => style.proper_case,
        Some(written) => {
            if let Some(spelling) = written.get(name) {
                out.extend_from_slice(spelling);
                return;
            }
            written.proper_others
        }
    };
    let start = out.len();
    out.extend_from_slice(name);
    if proper {
        // As Envoy's `ProperCaseHeaderKeyFormatter`: behind everything but letters and digits.
        let mut word = true;
        for b in &mut out[start..] {
            if word {
                b.make_ascii_uppercase();
            }
            word = !b.is_ascii_alphanumeric();
        }
    }
}

fn write_fields(out: &mut Vec<u8>, headers: &Headers, framing: Option<FramingField>, style: Style) {
    let written = headers.written();
    if written.is_none() && !style.proper_case {
        headers.write_lines(out);
    } else {
        for (name, value) in headers.iter_regular() {
            write_field(out, name, value, written, style);
        }
    }
    if let Some((name, value)) = framing {
        write_field(out, name.as_bytes(), value.as_bytes(), written, style);
    }
    out.extend_from_slice(b"\r\n");
}

fn write_field(out: &mut Vec<u8>, name: &[u8], value: &[u8], written: Option<&WrittenNames>, style: Style) {
    write_name(out, name, written, style);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Reason phrases as Envoy writes them (source/common/http/codes.cc).
pub(crate) fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        203 => "Non-Authoritative Information",
        204 => "No Content",
        205 => "Reset Content",
        206 => "Partial Content",
        207 => "Multi-Status",
        208 => "Already Reported",
        226 => "IM Used",
        300 => "Multiple Choices",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        305 => "Use Proxy",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        407 => "Proxy Authentication Required",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Payload Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Entity",
        423 => "Locked",
        424 => "Failed Dependency",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        506 => "Variant Also Negotiates",
        507 => "Insufficient Storage",
        508 => "Loop Detected",
        510 => "Not Extended",
        511 => "Network Authentication Required",
        599 => "Last Unassigned Server Error Code",
        _ => "Unknown",
    }
}
