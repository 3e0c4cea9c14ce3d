//! Frames as anybody may send them, to either side.

use crate::tests::{Bin, flush, hear, next, options, said};
use crate::{Connection, Item, PREFACE};
use bytes::{Bytes, BytesMut};
use proxy_core::Headers;
use std::time::Instant;

fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    crate::frame::head(&mut out, body.len(), kind, flags, stream);
    out.extend_from_slice(body);
    out
}

/// Kinds of frames and codes of errors, in order.
fn summary(mut bytes: &[u8]) -> Vec<(u8, u32)> {
    let mut frames = Vec::new();
    while let Some(head) = bytes.first_chunk().map(crate::frame::Head::read) {
        let body = bytes.get(9..9 + head.length).expect("whole frames");
        let code = match head.kind {
            crate::frame::RST_STREAM => crate::frame::word(body, 0),
            crate::frame::GOAWAY => crate::frame::word(body, 4),
            _ => 0,
        };
        frames.push((head.kind, code));
        bytes = &bytes[9 + head.length..];
    }
    frames.truncate(16);
    frames
}

const WORDS: [&str; 9] = [
    "\0\0\0\x01\x05\0\0\0\x03",
    "\0\0\x04\x08\0\0\0\0\0\x7f\0\0\0",
    "\0\0\x08\x06\0\0\0\0\0",
    "\0\0\x05\x02\0\0\0\0\x05",
    "\x40\x01a\x01b",
    "\x10\x0econtent-length\x015",
    "\x3f\x01",
    ":path",
    "\0\0\0\0",
];

#[test]
fn http2_server() {
    // GET / of a.test with the static table; a field that goes into the dynamic one, and is used.
    let head = b"\x82\x86\x84\x41\x06a.test";
    let seeds: Vec<Vec<u8>> = vec![
        [frame(4, 0, 0, b""), frame(1, 5, 1, head), frame(6, 0, 0, b"12345678")].concat(),
        [frame(4, 0, 0, b"\0\x04\0\0\x10\0"), frame(1, 4, 1, head), frame(0, 1, 1, b"a body")].concat(),
        [frame(4, 0, 0, b""), frame(1, 1, 1, &head[..3]), frame(9, 4, 1, &head[3..]), frame(8, 0, 1, b"\0\0\0\x01")]
            .concat(),
        [
            frame(4, 0, 0, b""),
            frame(1, 5, 1, &[&head[..], b"\x40\x03x-a\x03abc"].concat()),
            frame(1, 5, 3, &[&head[..], b"\xbe\xbe"].concat()),
        ]
        .concat(),
        [
            frame(4, 1, 0, b""),
            frame(2, 0, 3, b"\0\0\0\0\x10"),
            frame(3, 0, 1, b"\0\0\0\x08"),
            frame(7, 0, 0, b"\0\0\0\0\0\0\0\0"),
        ]
        .concat(),
        [frame(4, 0, 0, b""), frame(1, 0xd, 1, &[b"\x02", &head[..], b"\0\0"].concat()), frame(0, 9, 1, b"\x01a\0")]
            .concat(),
    ];
    let seeds: Vec<&[u8]> = seeds.iter().map(Vec::as_slice).collect();
    ::fuzz::run("http2_server", &seeds, &WORDS, |bytes| {
        let server = Connection::server(options(true), Bin::default());
        hear(&server, PREFACE);
        let mut out = said(&server);
        let (mut requests, mut rest) = (Vec::new(), BytesMut::new());
        // In two parts, wherever that cuts.
        for part in bytes.chunks(bytes.len().div_ceil(2).max(1)) {
            rest.extend_from_slice(part);
            server.receive(&mut rest, Instant::now());
            if let Some(id) = server.owed_head(&rest).filter(|id| id % 4 == 3) {
                requests.push(server.take_early(id));
            }
            while let Some(request) = server.accept() {
                let Ok(request) = request else { continue };
                let stream = request.stream;
                let _ = stream.send_head(200, &request.headers, requests.len() % 2 == 0);
                stream.push(Bytes::from_static(b"hello"));
                stream.end(false);
                let _ = flush(&stream);
                requests.push(stream);
            }
            for stream in &requests {
                while let Some(Ok(item)) = next(stream) {
                    if matches!(item, Item::End) {
                        break;
                    }
                }
            }
            out.extend(said(&server));
        }
        let count = requests.len();
        server.close();
        (count, summary(&out))
    });
}

#[test]
fn http2_client() {
    // `:status: 200` and 404 of the static table.
    let seeds: Vec<Vec<u8>> = vec![
        [frame(4, 0, 0, b""), frame(1, 4, 1, b"\x88"), frame(0, 1, 1, b"hello")].concat(),
        [frame(4, 0, 0, b"\0\x03\0\0\0\x01"), frame(1, 5, 3, b"\x8d"), frame(3, 0, 1, b"\0\0\0\x07")].concat(),
        [frame(4, 0, 0, b""), frame(7, 0, 0, b"\0\0\0\x01\0\0\0\0"), frame(1, 5, 1, b"\x88")].concat(),
        [
            frame(4, 0, 0, b""),
            frame(1, 4, 1, b"\x48\x03103"),
            frame(1, 4, 1, b"\x88"),
            frame(1, 5, 1, b"\x40\x01a\x01b"),
        ]
        .concat(),
        [frame(4, 0, 0, b"\0\x04\0\0\0\x01"), frame(8, 0, 1, b"\0\0\0\x05"), frame(5, 4, 1, b"\0\0\0\x02\x82")]
            .concat(),
    ];
    let seeds: Vec<&[u8]> = seeds.iter().map(Vec::as_slice).collect();
    let get = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
    let post = Headers::of([(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
    ::fuzz::run("http2_client", &seeds, &WORDS, |bytes| {
        let client = Connection::client(options(false), Bin::default());
        let streams = [client.open(&get, true, |_, _| true), client.open(&post, false, |_, _| true)];
        let streams: Vec<_> = streams.into_iter().flatten().collect();
        streams[1].push(Bytes::from_static(b"a body"));
        streams[1].end(true);
        let _ = flush(&streams[1]);
        let mut out = said(&client);
        out.drain(..PREFACE.len());
        hear(&client, bytes);
        let mut items = 0;
        for stream in &streams {
            while let Some(Ok(item)) = next(stream) {
                items += 1;
                if matches!(item, Item::End) {
                    break;
                }
            }
        }
        drop(streams);
        out.extend(said(&client));
        (items, summary(&out))
    });
}
