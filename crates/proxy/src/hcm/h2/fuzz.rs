//! Frames as anybody may send them, through the guard into the HTTP/2 crate and back.

use super::fault;
use super::flood::Limits;
use super::guard::{Guard, Settings};
use crate::batch::Batch;
use crate::io::{Io, Raw};
use bytes::Bytes;
use proxy_core::cluster::Http2Options;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn frame(kind: u8, flags: u8, stream: u8, body: &[u8]) -> Vec<u8> {
    [&[0, (body.len() >> 8) as u8, body.len() as u8, kind, flags, 0, 0, 0, stream][..], body].concat()
}

/// What came back: kinds of frames and codes of errors, in order.
fn summary(mut bytes: &[u8]) -> Vec<(u8, u32)> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        // A connection may end in the middle of a frame.
        let Some((body, rest)) = rest.split_at_checked(length) else { break };
        let code = match head[3] {
            3 => body.get(..4),
            7 => body.get(4..8),
            _ => None,
        };
        frames.push((head[3], code.map_or(0, |c| u32::from_be_bytes([c[0], c[1], c[2], c[3]]))));
        bytes = rest;
    }
    frames.truncate(16);
    frames
}

async fn serve(io: UnixStream) -> usize {
    let options = Http2Options::default();
    let settings = Settings { table_size: 4096, connect: false, streams: 1024, window: 1 << 24 };
    let (io, outlet) = Batch::new(Io::Raw(Raw::Unix(io)), false);
    let guard = Guard::new(io, settings, Limits::of(&options), false, Duration::from_secs(5), None);
    let switch = guard.switch();
    let mut builder = h2::server::Builder::new();
    let Ok(mut connection) = builder.max_header_list_size(128 * 1024).handshake::<Guard, Bytes>(guard).await else {
        return 0;
    };
    let mut requests = 0;
    outlet.gather();
    let mut accept = async || {
        std::future::poll_fn(|cx| {
            let polled = connection.poll_accept(cx);
            outlet.poll_out(cx);
            polled
        })
        .await
    };
    while let Some(Ok((request, mut answer))) = accept().await {
        requests += 1;
        if fault(&request).is_some() {
            switch.cut();
        } else {
            // The peer may have reset the stream already.
            let _ = answer.send_response(http::Response::new(()), requests % 2 == 0).map(|mut body| {
                let _ = body.send_data(Bytes::from_static(b"hello"), true);
            });
        }
    }
    requests
}

#[test]
fn http2() {
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
    let words = [
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    ::fuzz::run("http2", &seeds, &words, |bytes| {
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            let client = async {
                let (mut read, mut write) = theirs.into_split();
                let send = async move {
                    // The server may hang up at any time.
                    let _ = write.write_all(PREFACE).await;
                    let _ = write.write_all(bytes).await;
                    let _ = write.shutdown().await;
                };
                let mut answer = Vec::new();
                let receive = async {
                    let _ = read.read_to_end(&mut answer).await;
                };
                tokio::join!(send, receive);
                answer
            };
            // It ends, and memory is what it was: nothing is kept beyond the connection.
            let (requests, answer) = tokio::join!(serve(ours), client);
            (requests, summary(&answer))
        })
    });
}
