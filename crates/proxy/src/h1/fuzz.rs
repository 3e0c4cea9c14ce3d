//! Whatever bytes a peer sends, in whatever pieces: the parsers answer the same, never panic, and what passes on cannot
//! be read in another way by the next hop.

use super::body::{Decoder, Frame, Step};
use super::head::{BodyLength, Limits, parse_request, parse_response};
use super::write::{Style, write_request};
use bytes::BytesMut;
use proxy_core::Headers;

const HEADS: [&[u8]; 12] = [
    b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    b"GET http://abs.test:81/p?q=1 HTTP/1.1\r\nhost: other\r\nconnection: upgrade, x\r\nupgrade: websocket\r\nx: 1\r\n\r\n",
    b"CONNECT h:443 HTTP/1.1\r\nhost: h:443\r\nexpect: 100-continue\r\n\r\n",
    b"\r\n\nOPTIONS * HTTP/1.0\nhost: t\nx-a: 1\n folded\n\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.0 404 Not Found\r\nserver: x\r\n\r\nuntil the end",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 304 \r\netag: \"a\"\r\ncontent-length: 10\r\n\r\n",
];

const WORDS: [&str; 22] = [
    "\r\n",
    "\r\n\r\n",
    "\n\n",
    "\r",
    "\r\n ",
    "content-length: ",
    "Content-Length: 5\r\n",
    "transfer-encoding: chunked\r\n",
    "Transfer-Encoding:\tchunked",
    ", chunked",
    "identity",
    "host: a\r\n",
    "connection: close\r\n",
    "connection: upgrade, content-length\r\n",
    "upgrade: h2c\r\n",
    "HTTP/1.1",
    "HTTP/1.0",
    "http://a@b:80",
    "CONNECT ",
    "0\r\n\r\n",
    "ffffffffffffffff",
    "+5",
];

/// Options change with the input's length, so that all of them meet all inputs.
fn limits(bytes: &[u8]) -> Limits {
    Limits {
        accept_http10: bytes.len() & 1 == 0,
        chunked_length: bytes.len() & 2 == 0,
        bytes: if bytes.len() & 12 == 0 { 64 } else { 60 * 1024 },
        ..Limits::default()
    }
}

/// All data of a body that arrives in pieces of `piece` bytes, whether it ended, and what is left over.
fn decode(length: BodyLength, input: &[u8], piece: usize) -> Result<(Vec<u8>, bool, usize), ()> {
    let mut decoder = Decoder::raw(length);
    let (mut buf, mut data) = (BytesMut::new(), Vec::new());
    let mut pieces = input.chunks(piece);
    let mut left = input.len();
    loop {
        match decoder.step(&mut buf).map_err(|_| ())? {
            Step::Frame(Frame::Data(frame)) => data.extend_from_slice(&frame),
            Step::Frame(Frame::Trailers(_)) => {}
            Step::End => return Ok((data, true, left + buf.len())),
            Step::More => match pieces.next() {
                Some(piece) => {
                    left -= piece.len();
                    decoder.look(piece);
                    buf.extend_from_slice(piece);
                }
                None => return Ok((data, false, buf.len())),
            },
        }
    }
}

/// Where a message is cut to see that a part is not taken for the whole.
fn cuts(end: usize) -> impl Iterator<Item = usize> {
    (0..end).step_by(1 + end / 256)
}

fn regular(headers: &Headers) -> Vec<(Vec<u8>, Vec<u8>)> {
    headers.iter_regular().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

#[test]
fn http1_requests() {
    ::fuzz::run("http1_requests", &HEADS, &WORDS, |bytes| {
        let limits = limits(bytes);
        let (head, used) = match parse_request(bytes, &limits) {
            Ok(Some(whole)) => whole,
            Ok(None) => return ("more", None, 0),
            Err(error) => return (error.detail, None, 0),
        };
        assert!(used <= bytes.len());
        for end in cuts(used) {
            assert!(matches!(parse_request(&bytes[..end], &limits), Ok(None)), "differs at {end}: {head:?}");
        }
        let way = (head.body, head.keep_alive, head.upgrade, head.absolute, head.headers.contains(":authority"));
        let mut written = Vec::new();
        write_request(&mut written, &head.headers, None, Style::default());
        // Ours may be longer where a host was empty or a line was folded, and has one field more where the address names the host; its
        // own limits are not the point.
        let next = parse_request(&written, &Limits { bytes: 1 << 20, fields: 1 << 10, ..Limits::default() });
        let absolute = head.absolute.is_some() || head.headers.method() == Some("CONNECT");
        match next {
            // The next hop sees the same fields and the same end of the body: nothing can be smuggled past this proxy.
            Ok(Some((next, used))) => {
                assert_eq!(used, written.len());
                assert_eq!(next.body, head.body);
                assert_eq!(regular(&next.headers), regular(&head.headers));
                assert!(absolute || next.headers.path() == head.headers.path());
            }
            other => {
                // Without a host or a path it goes nowhere.
                let rooted = head.headers.path().is_none_or(|path| path.starts_with(['/', '*']));
                assert!(head.headers.authority().is_none() || !rooted, "not readable: {other:?} of {head:?}");
            }
        }
        ("request", Some(format!("{way:?}")), head.headers.len())
    });
}

#[test]
fn http1_responses() {
    ::fuzz::run("http1_responses", &HEADS, &WORDS, |bytes| {
        let (limits, to_head) = (Limits::default(), bytes.len() & 1 == 0);
        let (head, used) = match parse_response(bytes, &limits, to_head) {
            Ok(Some(whole)) => whole,
            Ok(None) => return ("more".to_owned(), 0),
            Err(error) => return (error.detail.to_owned(), 0),
        };
        assert!(used <= bytes.len());
        for end in cuts(used) {
            let part = parse_response(&bytes[..end], &limits, to_head);
            assert!(matches!(part, Ok(None)), "differs at {end}: {head:?}");
        }
        (format!("{} {:?} {}", head.status / 100, head.body, head.keep_alive), head.headers.len())
    });
}

#[test]
fn http1_bodies() {
    let seeds: [&[u8]; 3] = [
        b"5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
        b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\nGET / HTTP/1.1\r\n",
        b"0000a ; x=\"y\"\r\n0123456789\r\n00\r\na: b\r\n c\r\n\r\n",
    ];
    ::fuzz::run("http1_bodies", &seeds, &WORDS, |bytes| {
        let length = if bytes.len() & 1 == 0 { BodyLength::Chunked } else { BodyLength::Length(7) };
        let whole = decode(length, bytes, usize::MAX);
        assert_eq!(whole, decode(length, bytes, 1 + bytes.len() % 7));
        whole.map(|(data, ended, left)| (data.len(), ended, left)).ok()
    });
}
