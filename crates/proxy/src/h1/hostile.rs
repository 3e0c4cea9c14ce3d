//! Whatever bytes a peer sends, in whatever pieces: the parsers answer the same, never panic, and what passes on cannot
//! be read in another way by the next hop.

use super::body::{Decoder, Frame, Step};
use super::head::{BodyLength, Limits, parse_request, parse_response, write_request};
use bytes::BytesMut;
use proptest::prelude::*;

const HEADS: [&str; 12] = [
    "GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-A:  1 \r\n\r\n",
    "POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 5\r\n\r\nhello",
    "POST / HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    "POST / HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "GET http://abs.test:81/p?q=1 HTTP/1.1\r\nhost: other\r\nconnection: upgrade, x\r\nupgrade: websocket\r\nx: 1\r\n\r\n",
    "CONNECT h:443 HTTP/1.1\r\nhost: h:443\r\nexpect: 100-continue\r\n\r\n",
    "\r\n\nOPTIONS * HTTP/1.0\nhost: t\nx-a: 1\n folded\n\n",
    "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "HTTP/1.0 404 Not Found\r\nserver: x\r\n\r\nuntil the end",
    "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "HTTP/1.1 304 \r\netag: \"a\"\r\ncontent-length: 10\r\n\r\n",
];

/// What changes in a sample: bytes that mean something to a parser more often than others.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), proptest::sample::select(&b"\r\n\0 :\t,;0123456789abcdefGHTP/1."[..])]
}

fn input() -> impl Strategy<Value = Vec<u8>> {
    let change = (0..3u8, any::<prop::sample::Index>(), byte());
    let changed = (proptest::sample::select(&HEADS[..]), proptest::collection::vec(change, 0..6));
    changed.prop_map(|(head, changes)| {
        let mut bytes = head.as_bytes().to_vec();
        for (what, at, byte) in changes {
            let at = at.index(bytes.len());
            match what {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => {}
            }
        }
        bytes
    })
}

fn limits() -> impl Strategy<Value = Limits> {
    (any::<bool>(), any::<bool>()).prop_map(|(accept_http10, chunked_length)| Limits {
        accept_http10,
        chunked_length,
        ..Limits::default()
    })
}

/// All data of a body that arrives in pieces of `piece` bytes, whether it ended, and what is left over.
fn decode(length: BodyLength, input: &[u8], piece: usize) -> Result<(Vec<u8>, bool, usize), ()> {
    let mut decoder = Decoder::new(length);
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
                    buf.extend_from_slice(piece);
                }
                None => return Ok((data, false, buf.len())),
            },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_are_read_the_same_in_pieces(bytes in input(), limits in limits()) {
        let whole = parse_request(&bytes, &limits);
        if let Ok(Some((head, used))) = &whole {
            prop_assert!(*used <= bytes.len());
            for end in 0..*used {
                prop_assert!(matches!(parse_request(&bytes[..end], &limits), Ok(None)), "differs at {end}: {head:?}");
            }
        }
    }

    #[test]
    fn responses_are_read_the_same_in_pieces(bytes in input(), head_request: bool) {
        let limits = Limits::default();
        if let Ok(Some((head, used))) = parse_response(&bytes, &limits, head_request) {
            prop_assert!(used <= bytes.len());
            for end in 0..used {
                let part = parse_response(&bytes[..end], &limits, head_request);
                prop_assert!(matches!(part, Ok(None)), "differs at {end}: {head:?}");
            }
        }
    }

    /// The next hop sees the same fields and the same end of the body: nothing can be smuggled past this proxy.
    #[test]
    fn what_passes_is_read_alike_by_the_next_hop(bytes in input(), limits in limits()) {
        if let Ok(Some((head, _))) = parse_request(&bytes, &limits) {
            let mut written = Vec::new();
            write_request(&mut written, &head.headers);
            // Ours may be longer where a host was empty or a line was folded; its own limit is not the point.
            let next = parse_request(&written, &Limits { bytes: 1 << 20, ..Limits::default() });
            let absolute = head.absolute.is_some() || head.headers.method() == Some("CONNECT");
            match next {
                Ok(Some((next, used))) => {
                    prop_assert_eq!(used, written.len());
                    prop_assert_eq!(next.body, head.body);
                    let fields = |h: &proxy_core::Headers| -> Vec<_> {
                        h.iter_regular().map(|(n, v)| (n.to_vec(), v.to_vec())).collect()
                    };
                    prop_assert_eq!(fields(&next.headers), fields(&head.headers));
                    prop_assert!(absolute || next.headers.path() == head.headers.path());
                }
                other => prop_assert!(head.headers.authority().is_none(), "not readable: {other:?} of {head:?}"),
            }
        }
    }

    #[test]
    fn bodies_are_read_the_same_in_pieces(bytes in input(), chunked: bool, piece in 1..8usize) {
        let length = if chunked { BodyLength::Chunked } else { BodyLength::Length(7) };
        let start = bytes.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |at| at + 4);
        prop_assert_eq!(decode(length, &bytes[start..], usize::MAX), decode(length, &bytes[start..], piece));
    }

    #[test]
    fn inspectors_take_any_bytes(mut bytes in proptest::collection::vec(byte(), 0..300), hello: bool) {
        if hello && bytes.len() > 9 {
            bytes[..6].copy_from_slice(&[22, 3, 1, 0, 200, 1]);
        }
        crate::inspect::client_hello(&bytes);
    }
}
