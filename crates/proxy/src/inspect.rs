//! Listener filters that look at the first bytes without taking them: TLS ClientHello and HTTP/1 or HTTP/2.
//!
//! Sources: envoy.filters.listener.tls_inspector and http_inspector.

mod fingerprint;

pub(crate) use fingerprint::Offer;

/// What a connection's first bytes say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClientHello {
    pub(crate) server_name: Option<String>,
    pub(crate) alpn: Vec<Vec<u8>>,
}

/// The result of looking at a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Look<T> {
    Found(T),
    /// It is something else.
    No,
    /// The prefix is too short to say.
    More,
}

/// What inspection for TLS counts.
pub(crate) const TLS_COUNTERS: [&str; 7] = [
    "tls_inspector.alpn_found",
    "tls_inspector.alpn_not_found",
    "tls_inspector.client_hello_too_large",
    "tls_inspector.sni_found",
    "tls_inspector.sni_not_found",
    "tls_inspector.tls_found",
    "tls_inspector.tls_not_found",
];

/// What inspection for HTTP counts.
pub(crate) const HTTP_COUNTERS: [&str; 5] = [
    "http_inspector.http10_found",
    "http_inspector.http11_found",
    "http_inspector.http2_found",
    "http_inspector.http_not_found",
    "http_inspector.read_error",
];

/// What TLS libraries say of bytes like those of [`client_hello`] that are no ClientHello, as in access logs
/// (`DOWNSTREAM_TRANSPORT_FAILURE_REASON`).
pub(crate) fn why_no_hello(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'G', b'E', b'T', b' ', ..] | [b'P', b'O', b'S', b'T', b' ', ..] => HTTP_REQUEST,
        [b'H', b'E', b'A', b'D', b' ', ..] | [b'P', b'U', b'T', b' ', ..] => HTTP_REQUEST,
        [b'C', b'O', b'N', b'N', b'E', ..] => {
            "TLS_error|error:1000009b:SSL_routines:OPENSSL_internal:HTTPS_PROXY_REQUEST:TLS_error_end"
        }
        [22, 3, _, _, _, _, long @ ..]
            if long.len() > 2 && u32::from_be_bytes([0, long[0], long[1], long[2]]) as usize > MAX_HELLO =>
        {
            "TLS_error|error:10000096:SSL_routines:OPENSSL_internal:EXCESSIVE_MESSAGE_SIZE:TLS_error_end"
        }
        [22, 3, ..] => "TLS_error|error:10000083:SSL_routines:OPENSSL_internal:CLIENTHELLO_PARSE_FAILED:TLS_error_end",
        _ => "TLS_error|error:100000f7:SSL_routines:OPENSSL_internal:WRONG_VERSION_NUMBER:TLS_error_end",
    }
}

const HTTP_REQUEST: &str = "TLS_error|error:1000009c:SSL_routines:OPENSSL_internal:HTTP_REQUEST:TLS_error_end";

/// More than this is never a ClientHello worth waiting for (the inspector's max_client_hello_size).
pub(crate) const MAX_HELLO: usize = 16 * 1024;

/// The longest record of TLS, sealed.
const MAX_RECORD: usize = 16384 + 256;

/// Looks for a TLS ClientHello.
pub(crate) fn client_hello(bytes: &[u8]) -> Look<ClientHello> {
    match handshake(bytes) {
        Look::Found(hello) => parse_hello(&hello).map_or(Look::No, Look::Found),
        Look::No => Look::No,
        Look::More => Look::More,
    }
}

/// The bytes of a ClientHello, which may span several records.
fn handshake(bytes: &[u8]) -> Look<Vec<u8>> {
    // Envoy's parser wants the head of a record before it says anything.
    if bytes.len() >= 5 && !is_prefix_of_record(bytes) {
        return Look::No;
    }
    let mut handshake = Vec::new();
    let mut rest = bytes;
    loop {
        let Some(header) = rest.get(..5) else { return too_short(bytes) };
        if header[0] != 22 || header[1] != 3 {
            return Look::No;
        }
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if len > MAX_RECORD {
            return Look::No;
        }
        let Some(body) = rest.get(5..5 + len) else { return too_short(bytes) };
        handshake.extend_from_slice(body);
        rest = &rest[5 + len..];
        if let Some(head) = handshake.get(..4) {
            if head[0] != 1 {
                return Look::No;
            }
            let want = 4 + usize::from(head[1]) * 65536 + usize::from(head[2]) * 256 + usize::from(head[3]);
            if want > MAX_HELLO {
                return Look::No;
            }
            if let Some(hello) = handshake.get(4..want) {
                return Look::Found(hello.to_vec());
            }
        }
    }
}

fn too_short(bytes: &[u8]) -> Look<Vec<u8>> {
    if bytes.len() >= MAX_HELLO { Look::No } else { Look::More }
}

fn is_prefix_of_record(bytes: &[u8]) -> bool {
    !matches!(bytes, [first, ..] if *first != 22) && !matches!(bytes, [_, major, ..] if *major != 3)
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn u8(&mut self) -> Option<usize> {
        self.take(1).map(|b| usize::from(b[0]))
    }

    fn u16(&mut self) -> Option<usize> {
        self.take(2).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]])))
    }
}

/// RFC 8446, 4.1.2; extensions server_name (0) and application_layer_protocol_negotiation (16).
fn parse_hello(bytes: &[u8]) -> Option<ClientHello> {
    let mut c = Cursor(bytes);
    c.take(2 + 32)?;
    let n = c.u8()?;
    c.take(n)?;
    let n = c.u16()?;
    c.take(n)?;
    let n = c.u8()?;
    c.take(n)?;
    let mut hello = ClientHello::default();
    if c.0.is_empty() {
        return Some(hello);
    }
    let n = c.u16()?;
    let mut extensions = Cursor(c.take(n)?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let n = extensions.u16()?;
        let mut body = Cursor(extensions.take(n)?);
        match kind {
            0 => {
                body.u16()?;
                while !body.0.is_empty() {
                    let name_type = body.u8()?;
                    let n = body.u16()?;
                    let name = body.take(n)?;
                    if name_type == 0 {
                        hello.server_name = std::str::from_utf8(name).ok().map(|s| s.to_ascii_lowercase());
                    }
                }
            }
            16 => {
                body.u16()?;
                while !body.0.is_empty() {
                    let n = body.u8()?;
                    hello.alpn.push(body.take(n)?.to_vec());
                }
            }
            _ => {}
        }
    }
    Some(hello)
}

/// HTTP versions the HTTP inspector tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HttpVersion {
    Http10,
    Http11,
    Http2,
}

/// The HTTP/2 connection preface.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A request line longer than this is not waited for.
const MAX_REQUEST_LINE: usize = 8 * 1024;
/// No method is longer.
const MAX_METHOD: usize = 20;

/// Looks for an HTTP/2 preface or an HTTP/1 request line.
pub(crate) fn http(bytes: &[u8]) -> Look<HttpVersion> {
    if bytes.starts_with(PREFACE) {
        return Look::Found(HttpVersion::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return Look::More;
    }
    let end = memchr::memchr(b'\n', bytes);
    let line = &bytes[..end.unwrap_or(bytes.len())];
    // As Envoy, whose parser wants the whole line before it says anything, unless it begins with what no line begins with.
    let method = line.iter().take_while(|b| **b != b' ').count();
    let token = line[..method].iter().all(|b| b.is_ascii_uppercase() || *b == b'-');
    let blank = bytes.first().is_some_and(|first| *first <= b' ' && !matches!(first, b'\r' | b'\n'));
    if blank || line.len() >= MAX_REQUEST_LINE {
        return Look::No;
    }
    if end.is_none() {
        return Look::More;
    }
    if !token || method > MAX_METHOD {
        return Look::No;
    }
    if method == 0 || method == line.len() {
        return Look::No;
    }
    let line = line.trim_ascii_end();
    if line.ends_with(b" HTTP/1.1") {
        Look::Found(HttpVersion::Http11)
    } else if line.ends_with(b" HTTP/1.0") {
        Look::Found(HttpVersion::Http10)
    } else {
        Look::No
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(sni: &str, alpn: &[&str]) -> Vec<u8> {
        let mut names = vec![0u8];
        names.extend((sni.len() as u16).to_be_bytes());
        names.extend(sni.as_bytes());
        let mut protocols = Vec::new();
        for p in alpn {
            protocols.push(p.len() as u8);
            protocols.extend(p.as_bytes());
        }
        let mut extensions = Vec::new();
        for (kind, list) in [(0u16, names), (16, protocols)] {
            extensions.extend(kind.to_be_bytes());
            extensions.extend((list.len() as u16 + 2).to_be_bytes());
            extensions.extend((list.len() as u16).to_be_bytes());
            extensions.extend(list);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 1, 1, 0]);
        body.extend((extensions.len() as u16).to_be_bytes());
        body.extend(extensions);
        let mut handshake = vec![1, 0];
        handshake.extend((body.len() as u16).to_be_bytes());
        handshake.extend(body);
        handshake
    }

    fn records(handshake: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in handshake.chunks(size) {
            out.extend([22, 3, 1]);
            out.extend((piece.len() as u16).to_be_bytes());
            out.extend(piece);
        }
        out
    }

    #[test]
    fn hello_in_one_or_many_records() {
        let handshake = hello("A.test", &["istio", "h2"]);
        let want = ClientHello { server_name: Some("a.test".into()), alpn: vec![b"istio".to_vec(), b"h2".to_vec()] };
        for size in [10, 40, 4096] {
            let bytes = records(&handshake, size);
            assert_eq!(client_hello(&bytes), Look::Found(want.clone()));
            for n in 0..bytes.len() {
                assert_eq!(client_hello(&bytes[..n]), Look::More, "prefix of {n}");
            }
        }
        assert_eq!(client_hello(b"GET / HTTP/1.1\r\n"), Look::No);
    }

    #[test]
    fn corrupt_hellos_do_not_panic() {
        let bytes = records(&hello("a.test", &["h2"]), 4096);
        for i in 0..bytes.len() {
            for value in [0, 1, 127, 255] {
                let mut copy = bytes.clone();
                copy[i] = value;
                let _ = client_hello(&copy);
            }
        }
    }

    #[test]
    fn http_versions() {
        assert_eq!(http(b"GET / HTTP/1.1\r\n"), Look::Found(HttpVersion::Http11));
        assert_eq!(http(b"GET / HTTP/1.0\r\n"), Look::Found(HttpVersion::Http10));
        assert_eq!(http(PREFACE), Look::Found(HttpVersion::Http2));
        assert_eq!(http(b"PRI * HT"), Look::More);
        assert_eq!(http(b"GET /very/long"), Look::More);
        assert_eq!(http(b"hello"), Look::More);
        let why = |bytes: &[u8]| why_no_hello(bytes).split(':').nth(4).map(str::to_owned);
        assert_eq!(why(b"GET / HTTP/1.1\r\n").as_deref(), Some("HTTP_REQUEST"));
        assert_eq!(why(b"hello").as_deref(), Some("WRONG_VERSION_NUMBER"));
        assert_eq!(why(b"\x16\x03\x01\x00\x05hello").as_deref(), Some("EXCESSIVE_MESSAGE_SIZE"));
        assert_eq!(http(b"hello\n"), Look::No);
        assert_eq!(http(b"\x00\x01\x02"), Look::No);
        assert_eq!(http(b"*1\r\n$4\r\nPING\r\n"), Look::No);
    }
}
