//! Both sides of a connection in memory.

use crate::{Broken, Connection, Fault, INVALID_FIELD, Item, Limits, Options, Out, PREFACE, Reason, Stream};
use bytes::{Bytes, BytesMut};
use proxy_core::Headers;
use proxy_core::cluster::Http2Options;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

#[derive(Default)]
pub(crate) struct Bin(Vec<u8>);

impl Out for Bin {
    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.0);
    }

    fn push(&mut self, data: Bytes) {
        self.0.extend_from_slice(&data);
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

pub(crate) fn options(server: bool) -> Options {
    Options {
        table_size: 4096,
        connect: false,
        max_streams: 100,
        stream_window: 65_535,
        connection_window: 100_000,
        max_head: (10_000, 100),
        stream_errors: false,
        limits: server.then(|| Limits::of(&Http2Options::default())),
    }
}

/// What a connection has to say.
pub(crate) fn said(conn: &Connection<Bin>) -> Vec<u8> {
    conn.pump();
    conn.with_out(|out| std::mem::take(&mut out.0))
}

pub(crate) fn hear(conn: &Connection<Bin>, bytes: &[u8]) {
    conn.receive(&mut BytesMut::from(bytes), Instant::now());
}

struct Pair {
    client: Connection<Bin>,
    server: Connection<Bin>,
}

impl Pair {
    fn new() -> Self {
        Self::with(options(false), options(true))
    }

    fn with(client: Options, server: Options) -> Self {
        let client = Connection::client(client, Bin::default());
        let server = Connection::server(server, Bin::default());
        let pair = Self { client, server };
        pair.talk();
        pair
    }

    /// Moves what each has to say until neither has.
    fn talk(&self) {
        loop {
            let (there, back) = (said(&self.client), said(&self.server));
            if there.is_empty() && back.is_empty() {
                return;
            }
            hear(&self.server, &there);
            hear(&self.client, &back);
        }
    }

    fn request(&self, method: &str, end: bool) -> (Stream<Bin>, Stream<Bin>) {
        let head = Headers::of([(":method", method), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
        let asked = self.client.open(&head, end, |_, _| true).expect("a stream");
        self.talk();
        let incoming = self.server.accept().expect("a request").expect("a good one");
        assert_eq!((incoming.headers.path(), incoming.end, incoming.excess), (Some("/"), end, None));
        (asked, incoming.stream)
    }
}

pub(crate) fn next(stream: &Stream<Bin>) -> Option<Result<Item, Broken>> {
    match stream.poll_item(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(item) => Some(item),
        Poll::Pending => None,
    }
}

pub(crate) fn flush(stream: &Stream<Bin>) -> Poll<Result<(), Broken>> {
    stream.poll_flush(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn a_message_goes_there_and_back() {
    let pair = Pair::new();
    let (asked, served) = pair.request("POST", false);
    asked.push(Bytes::from_static(b"abc"));
    asked.push_trailers(Headers::of([("x-end", "1")]));
    asked.end(false);
    assert!(flush(&asked).is_ready());
    pair.talk();
    assert!(matches!(next(&served), Some(Ok(Item::Data(data))) if data == "abc"));
    assert!(matches!(next(&served), Some(Ok(Item::Trailers(fields))) if fields.get("x-end") == Some(b"1")));
    assert!(matches!(next(&served), Some(Ok(Item::End))));
    served.send_head(103, &Headers::of([("link", "x")]), false).unwrap();
    served.send_head(200, &Headers::of([("content-length", "2")]), false).unwrap();
    served.push(Bytes::from_static(b"ok"));
    served.end(false);
    assert!(flush(&served).is_ready());
    pair.talk();
    assert!(matches!(next(&asked), Some(Ok(Item::Head(head, false))) if head.status() == Some(103)));
    assert!(matches!(next(&asked), Some(Ok(Item::Head(head, false))) if head.status() == Some(200)));
    assert!(matches!(next(&asked), Some(Ok(Item::Data(data))) if data == "ok"));
    assert!(matches!(next(&asked), Some(Ok(Item::End))));
    assert_eq!((pair.client.active(), pair.server.active()), (0, 0));
}

#[test]
fn data_waits_for_windows_and_all_of_it_arrives() {
    let pair = Pair::new();
    let streams: Vec<_> = (0..3).map(|_| pair.request("POST", false)).collect();
    let body: Bytes = (0..300_000u32).map(|n| n as u8).collect::<Vec<u8>>().into();
    for (asked, _) in &streams {
        asked.push(body.clone());
        asked.end(true);
        assert!(flush(asked).is_pending());
    }
    pair.talk();
    let mut came: Vec<Vec<u8>> = vec![Vec::new(); 3];
    for (at, (_, served)) in streams.iter().enumerate() {
        // Nobody reads the others meanwhile: their windows bound what they keep.
        while let Some(Ok(Item::Data(data))) = next(served) {
            came[at].extend_from_slice(&data);
            pair.talk();
        }
    }
    while streams.iter().any(|(_, served)| !served.is_read()) {
        for (at, (_, served)) in streams.iter().enumerate() {
            while let Some(Ok(Item::Data(data))) = next(served) {
                came[at].extend_from_slice(&data);
            }
        }
        pair.talk();
    }
    assert!(came.iter().all(|came| *came == body));
    assert!(streams.iter().all(|(asked, _)| flush(asked).is_ready()));
}

#[test]
fn resets_reach_the_other_side() {
    let pair = Pair::new();
    let (asked, served) = pair.request("GET", true);
    asked.reset(Reason::CANCEL);
    pair.talk();
    let cx = &mut Context::from_waker(Waker::noop());
    assert_eq!(served.poll_broken(cx), Poll::Ready(Broken::Reset(Reason::CANCEL)));
    assert_eq!((pair.server.take_tally().rx_reset, pair.client.take_tally().tx_reset), (1, 1));
    // One that nobody holds any more is reset, too.
    let (asked, served) = pair.request("GET", true);
    drop(served);
    pair.talk();
    assert_eq!(asked.poll_broken(cx), Poll::Ready(Broken::Reset(Reason::INTERNAL_ERROR)));
    assert_eq!((pair.client.active(), pair.server.active()), (0, 0));
}

#[test]
fn who_leaves_finishes_what_it_has() {
    let pair = Pair::new();
    let (asked, served) = pair.request("GET", true);
    pair.server.announce_end();
    pair.server.leave();
    let head = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
    let late = pair.client.open(&head, true, |_, _| true).expect("a stream");
    pair.talk();
    assert!(pair.server.accept().is_none() && !pair.client.is_open());
    let cx = &mut Context::from_waker(Waker::noop());
    assert_eq!(late.poll_broken(cx), Poll::Ready(Broken::Refused));
    assert!(!pair.server.is_over());
    served.send_head(204, &Headers::new(), true).unwrap();
    pair.talk();
    assert!(matches!(next(&asked), Some(Ok(Item::Head(_, true)))));
    assert!(pair.server.is_over() && pair.client.is_over());
}

#[test]
fn too_many_streams_are_refused_until_the_client_can_know() {
    let mut few = options(true);
    few.max_streams = 1;
    let server = Connection::server(few, Bin::default());
    let client = Connection::client(options(false), Bin::default());
    let head = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]);
    let open = || client.open(&head, true, |_, _| true).expect("a stream");
    let (_first, second) = (open(), open());
    hear(&server, &said(&client));
    let _served = server.accept().expect("a request").expect("a good one");
    assert!(server.accept().is_none());
    hear(&client, &said(&server));
    let cx = &mut Context::from_waker(Waker::noop());
    assert_eq!(second.poll_broken(cx), Poll::Ready(Broken::Reset(Reason::REFUSED_STREAM)));
    assert_eq!((server.take_tally().refused, client.max_streams()), (1, 1));
    let _third = open();
    hear(&server, &said(&client));
    assert!(matches!(server.fault(), Some(Fault::Broken(_))), "it knew");
}

#[test]
fn malformed_messages_end_the_connection_or_only_their_stream() {
    let bad = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", "u@a"), (":path", "/")]);
    for stream_errors in [false, true] {
        let pair = Pair::with(options(false), Options { stream_errors, ..options(true) });
        let asked = pair.client.open(&bad, true, |_, _| true).expect("a stream");
        pair.talk();
        let cx = &mut Context::from_waker(Waker::noop());
        if stream_errors {
            assert_eq!(pair.server.accept().and_then(Result::err), Some(crate::Malformed(INVALID_FIELD)));
            assert_eq!(asked.poll_broken(cx), Poll::Ready(Broken::Reset(Reason::PROTOCOL_ERROR)));
        } else {
            assert!(matches!(pair.server.fault(), Some(Fault::Message(INVALID_FIELD))));
        }
    }
}

#[test]
fn long_heads_go_in_several_frames() {
    let mut wide = options(true);
    wide.max_head = (100_000, 100);
    let pair = Pair::with(options(false), wide);
    let long = "v".repeat(40_000);
    let head =
        Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/"), ("x", &long)]);
    let _asked = pair.client.open(&head, true, |_, _| true).expect("a stream");
    pair.talk();
    let incoming = pair.server.accept().expect("a request").expect("a good one");
    assert_eq!(incoming.headers.get("x").map(<[u8]>::len), Some(40_000));
}

#[test]
fn a_head_that_does_not_end_can_be_answered() {
    let server = Connection::server(options(true), Bin::default());
    hear(&server, &[PREFACE, b"\0\0\0\x04\0\0\0\0\0", b"\0\0\x03\x01\x01\0\0\0\x01\x82\x86\x84"].concat());
    assert_eq!(server.owed_head(b""), Some(1));
    let early = server.take_early(1);
    early.send_head(408, &Headers::new(), true).unwrap();
    early.reset(Reason::NO_ERROR);
    assert_eq!((server.owed_head(b""), server.active()), (None, 0));
    // The rest keeps the table right, and is nobody's.
    hear(&server, b"\0\0\x08\x09\x04\0\0\0\x01\x41\x06a.test");
    hear(&server, b"\0\0\x04\x01\x05\0\0\0\x03\x82\x86\x84\xbe");
    let incoming = server.accept().expect("a request").expect("a good one");
    assert_eq!((incoming.stream.id(), incoming.headers.authority()), (3, Some("a.test")));
    // A part of a frame is a head that is owed, too.
    assert_eq!(server.owed_head(b"\0\0\x04\x01\x05\0\0\0\x05\x82"), Some(5));
}

#[test]
fn small_frames_are_joined_while_nobody_reads() {
    let pair = Pair::new();
    let (_asked, served) = pair.request("POST", false);
    let frames = |count: usize, frame: &[u8]| hear(&pair.server, &frame.repeat(count));
    frames(1000, b"\0\0\x01\0\0\0\0\0\x01a");
    frames(1000, b"\0\0\0\0\0\0\0\0\x01");
    let mut pieces = Vec::new();
    while let Some(Ok(Item::Data(piece))) = next(&served) {
        pieces.push(piece);
    }
    assert_eq!((pieces.len(), pieces.concat().len(), pieces[63].len()), (64, 1000, 937));
}

#[test]
fn answers_taken_back_leave_the_list_of_those_that_wait() {
    let mut server = options(true);
    server.limits = None;
    let server = Connection::server(server, Bin::default());
    hear(&server, &[PREFACE, b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0"].concat());
    for id in (1..100u8).step_by(2) {
        hear(&server, &[b"\0\0\x06\x01\x05\0\0\0".as_slice(), &[id], b"\x82\x86\x84\x01\x01a"].concat());
        let held = server.accept().expect("a request").expect("a good one").stream;
        held.send_head(200, &Headers::new(), false).unwrap();
        held.push(Bytes::from_static(b"held"));
        held.end(false);
        assert!(flush(&held).is_pending() && held.is_held());
        assert!(server.waiting() <= 1, "{} wait", server.waiting());
        hear(&server, &[b"\0\0\x04\x03\0\0\0\0".as_slice(), &[id], b"\0\0\0\x08"].concat());
        assert_eq!(flush(&held), Poll::Ready(Err(Broken::Reset(Reason::CANCEL))));
    }
}
