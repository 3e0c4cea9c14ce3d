//! What the `h2` crate says on the wire, in Envoy's words: the first SETTINGS, and which errors end a connection.
//!
//! Envoy's codec (nghttp2) closes the connection without a frame for most violations: malformed messages, wrong stream
//! numbers, bad values in control frames. Only framing, padding, compression and DATA errors get a GOAWAY. The crate
//! answers each of them with GOAWAY or RST_STREAM; the guard stands between it and the socket and swallows those. It
//! also writes what the crate cannot: answers to streams whose heads are not complete.

use super::flood::{Flood, Flooded, Limits};
use crate::batch::Batch;
use crate::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, Head, PING, PRIORITY, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, written_of,
};
use crate::hcm::{End, Http};
use crate::inspect::PREFACE;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;

/// Flags of frames (RFC 9113, 6.2).
const PADDED: u8 = 0x8;
const WITH_PRIORITY: u8 = 0x20;

/// Heads that are not given out, of which account is kept.
const MAX_UNREAD: usize = 4096;

/// The last stream that there can be, which the first of two GOAWAYs names.
const MAX_STREAM: u32 = 0x7fff_ffff;

/// What the crate's ping after its first GOAWAY carries.
const SHUTDOWN_PING: [u8; 8] = [0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];

impl Head {
    /// RFC 9113, section 6: lengths that make a FRAME_SIZE_ERROR.
    fn has_bad_size(&self) -> bool {
        match self.kind {
            PRIORITY => self.length != 5,
            RST_STREAM | WINDOW_UPDATE => self.length != 4,
            SETTINGS if self.flags & ACK != 0 => self.length != 0,
            SETTINGS => !self.length.is_multiple_of(6),
            PING => self.length != 8,
            HEADERS if self.flags & WITH_PRIORITY != 0 => self.length < 5,
            _ => false,
        }
    }
}

/// What has come in, as far as it decides how an error is answered.
#[derive(Debug, Default)]
struct Seen {
    last: Option<u8>,
    /// A header block is not complete.
    in_block: bool,
    /// The stream whose first head is not complete.
    head: Option<u32>,
    /// The highest stream that the peer opened.
    highest: u32,
    /// The last frame was a head that opened a stream, as far as its number tells.
    fresh: bool,
    /// A frame of a length that its kind cannot have.
    bad_size: bool,
    /// A frame with more padding than it has room for.
    bad_padding: bool,
    /// The peer knows our settings.
    acknowledged: bool,
    /// The peer leaves.
    goodbye: bool,
    /// The stream whose trailers came last, and whether they say that nothing follows.
    trailers: Option<(u32, bool)>,
    /// Streams whose last frame was DATA, the last few.
    with_data: [u32; 32],
    next: usize,
}

impl Seen {
    /// `first`: of the frame's payload, if it has come with its head.
    fn note(&mut self, head: Head, first: Option<u8>) {
        let padded = matches!(head.kind, DATA | HEADERS) && head.flags & PADDED != 0;
        self.bad_padding |= padded && first.map_or(head.length == 0, |padding| usize::from(padding) >= head.length);
        self.last = Some(head.kind);
        self.fresh = self.opens(head) && head.stream % 2 == 1;
        self.bad_size |= head.has_bad_size();
        self.acknowledged |= head.kind == SETTINGS && head.flags & ACK != 0;
        self.goodbye |= head.kind == GOAWAY;
        match head.kind {
            DATA if !self.with_data.contains(&head.stream) => {
                self.with_data[self.next] = head.stream;
                self.next = (self.next + 1) % self.with_data.len();
            }
            HEADERS | CONTINUATION if !self.in_block || head.kind == CONTINUATION => {
                self.in_block = head.flags & END_HEADERS == 0;
                if self.opens(head) {
                    self.highest = head.stream;
                    self.head = Some(head.stream);
                } else if head.kind == HEADERS {
                    self.trailers = Some((head.stream, head.flags & END_STREAM != 0));
                    self.with_data.iter_mut().filter(|stream| **stream == head.stream).for_each(|stream| *stream = 0);
                }
                self.head = self.head.filter(|_| self.in_block);
            }
            _ => {}
        }
    }

    /// Whether a header block is a request's, not a trailer's.
    fn opens(&self, head: Head) -> bool {
        head.kind == HEADERS && head.stream > self.highest
    }

    /// Whether Envoy closes without this GOAWAY. `unread`: it is for a head that the crate did not understand.
    ///
    /// DIFFERS: windows that overflow and pings of a stream are answered as RFC 9113 asks (6.9.1, 5.4.1), so that a
    /// peer learns what it did; Envoy closes without a word.
    fn hides_goaway(&self, code: u32, unread: bool) -> bool {
        let told = match code {
            FLOW_CONTROL_ERROR => self.last == Some(WINDOW_UPDATE),
            PROTOCOL_ERROR => self.last == Some(PING),
            _ => false,
        };
        matches!(code, PROTOCOL_ERROR | FLOW_CONTROL_ERROR | STREAM_CLOSED)
            && !told
            && !self.in_block
            && !self.bad_size
            && !self.bad_padding
            && (unread || !matches!(self.last, Some(DATA | CONTINUATION)))
    }

    /// What Envoy says of the trailers that came last, if they are this stream's and break the rules of messages.
    fn bad_trailers(&self, stream: u32) -> Option<&'static str> {
        let (_, ends) = self.trailers.filter(|(with, _)| *with == stream)?;
        Some(if ends { super::INVALID_FIELD } else { super::VIOLATION })
    }

    /// Whether Envoy closes the connection instead of this RST_STREAM.
    fn closes_instead(&self, code: u32, stream: u32) -> bool {
        match code {
            PROTOCOL_ERROR => !self.with_data.contains(&stream),
            // DIFFERS: as with GOAWAY, a window that overflows is told.
            FLOW_CONTROL_ERROR => !matches!(self.last, Some(DATA | WINDOW_UPDATE)),
            STREAM_CLOSED => self.last != Some(DATA),
            _ => false,
        }
    }
}

/// What a peer did that ends its connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// A malformed message; what was wrong with it.
    Message(&'static str),
    /// The trailers of a stream that is being served, and what was wrong with them.
    Trailers(u32, &'static str),
    Flood(Flooded),
}

/// Tells the guard to end its connection, and how it ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Switch(Rc<Ending>);

#[derive(Debug, Default)]
struct Ending {
    cut: Cell<bool>,
    fault: Cell<Option<Fault>>,
    by_peer: Cell<bool>,
    abrupt: Cell<bool>,
    /// The stream whose head is not complete, and since when.
    head: Cell<Option<(u32, Instant)>>,
    /// Frames for streams that the crate does not know of.
    late: RefCell<Vec<u8>>,
    /// Those streams. What the crate says of them, once the rest of their heads has come, is not written.
    answered: RefCell<Vec<u32>>,
    /// Streams whose heads came, and which the crate has not given out. It never does so with malformed ones.
    unread: RefCell<VecDeque<u32>>,
    /// How many it has given out.
    given: Cell<u64>,
    /// Streams that ended for a malformed message, and why.
    resets: RefCell<Vec<&'static str>>,
    /// What is known of resets that are not written yet.
    reasons: RefCell<VecDeque<&'static str>>,
}

impl Ending {
    /// A stream's head has come.
    fn came(&self, stream: u32) {
        let mut unread = self.unread.borrow_mut();
        // After a GOAWAY the crate passes over streams without a word.
        if unread.len() == MAX_UNREAD {
            unread.pop_front();
        }
        unread.push_back(stream);
    }

    /// The crate has given it out, or reset it.
    fn read(&self, stream: u32) {
        let mut unread = self.unread.borrow_mut();
        match unread.front() {
            Some(first) if *first == stream => _ = unread.pop_front(),
            _ => unread.retain(|unread| *unread != stream),
        }
    }
}

impl Switch {
    /// The connection ends without another byte.
    pub(super) fn cut(&self) {
        self.0.cut.set(true);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.0.cut.get()
    }

    /// The same, and nobody waits for the peer.
    pub(super) fn end_abruptly(&self) {
        self.0.abrupt.set(true);
        self.cut();
    }

    pub(super) fn is_abrupt(&self) -> bool {
        self.0.abrupt.get()
    }

    /// As [`Self::cut`], for what the peer did.
    pub(super) fn blame(&self, fault: Fault) {
        self.0.fault.set(Some(fault));
        self.cut();
    }

    /// What the peer did that ended the connection.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.0.fault.get()
    }

    /// A stream is about to be reset for a malformed message.
    pub(super) fn explain(&self, details: &'static str) {
        self.0.reasons.borrow_mut().push_back(details);
    }

    /// What was wrong with messages whose streams were reset since the last call.
    pub(super) fn take_resets(&self) -> Vec<&'static str> {
        self.0.resets.take()
    }

    /// The crate understood the head of a stream.
    pub(super) fn given_out(&self, stream: u32) {
        self.0.read(stream);
        self.0.given.set(self.0.given.get() + 1);
    }

    /// The stream of which the peer owes the rest of a head, and since when.
    pub(super) fn head(&self) -> Option<(u32, Instant)> {
        self.0.head.get()
    }

    /// Writes whole frames, the last ones of a stream whose head is not complete.
    pub(super) fn answer(&self, stream: u32, frames: &[u8]) {
        self.0.late.borrow_mut().extend_from_slice(frames);
        self.0.answered.borrow_mut().push(stream);
        self.0.head.set(None);
    }

    /// Whether that was done.
    pub(super) fn has_answered(&self, stream: u32) -> bool {
        self.0.answered.borrow().contains(&stream)
    }

    /// Whether the peer closed before the proxy did.
    pub(super) fn is_by_peer(&self) -> bool {
        self.0.by_peer.get()
    }
}

/// The first SETTINGS as Envoy sends them: header table size, extended CONNECT, streams, window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) table_size: u32,
    pub(super) connect: bool,
    pub(super) streams: u32,
    pub(super) window: u32,
}

impl Settings {
    fn frame(self) -> Vec<u8> {
        let mut out = vec![0, 0, 24, SETTINGS, 0, 0, 0, 0, 0];
        for (id, value) in [(1u16, self.table_size), (8, u32::from(self.connect)), (3, self.streams), (4, self.window)]
        {
            out.extend_from_slice(&id.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        }
        out
    }
}

/// A connection between socket and crate.
pub(super) struct Guard {
    io: Batch,
    incoming: Frames,
    outgoing: Frames,
    /// A header block that is being written is not complete.
    out_block: bool,
    /// The peer was told to leave.
    leaving: bool,
    /// The connection is to end for this.
    flooded: Option<Flooded>,
    seen: Seen,
    flood: Flood,
    settings: Option<Settings>,
    /// Our SETTINGS, as far as they are not written. They wait for the client's first word.
    pending: Vec<u8>,
    /// How much of the preface has come.
    greeted: usize,
    /// Bytes of the crate's own SETTINGS that are not to be written.
    drop: usize,
    /// Malformed messages end their stream only.
    stream_errors: bool,
    switch: Switch,
    drain_timeout: Duration,
    /// Where bytes, resets and floods are counted.
    http: Option<Rc<Http>>,
    /// How many streams were given out when a frame began to wait for the rest of them.
    asked: Option<u64>,
    /// The answer to the crate's ping, and when it gets it.
    pong: Option<(Pin<Box<Sleep>>, Vec<u8>)>,
}

/// What becomes of a frame that the crate wants to write.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// The connection ends before it.
    Cut,
    /// The same; the message of a stream was malformed.
    Refuse,
    /// It is left out.
    Skip,
    /// GOAWAY says FRAME_SIZE_ERROR.
    SizeError,
    /// It is left out and answered later.
    Ping,
    /// The connection ends before it, for the trailers of a stream.
    Trailers(u32, &'static str),
    /// It waits until the crate has given out the streams that it understood. `last`: the connection ends with it.
    Ask { last: bool },
}

impl Guard {
    pub(super) fn new(
        io: Batch,
        settings: Settings,
        limits: Limits,
        stream_errors: bool,
        drain_timeout: Duration,
        http: Option<Rc<Http>>,
    ) -> Self {
        Self {
            io,
            incoming: Frames::after_preface(),
            outgoing: Frames::default(),
            out_block: false,
            leaving: false,
            flooded: None,
            seen: Seen::default(),
            flood: Flood::new(limits),
            settings: Some(settings),
            pending: Vec::new(),
            greeted: 0,
            drop: 0,
            stream_errors,
            switch: Switch::default(),
            drain_timeout,
            http,
            asked: None,
            pong: None,
        }
    }

    pub(super) fn switch(&self) -> Switch {
        self.switch.clone()
    }

    /// Takes note of what was written.
    fn wrote(&mut self, bytes: &[u8]) {
        let (flood, ending) = (&mut self.flood, &self.switch.0);
        if let Some(http) = &self.http {
            http.stats.downstream_cx_tx_bytes_total.add(bytes.len() as u64);
            http.sent.set(http.sent.get() + bytes.len() as u64);
        }
        let (logs, http) = (self.stream_errors, &self.http);
        let (out_block, leaving) = (&mut self.out_block, &mut self.leaving);
        self.outgoing.look(bytes, |head, body| {
            flood.sent(head);
            match head.kind {
                HEADERS | CONTINUATION => *out_block = head.flags & END_HEADERS == 0,
                RST_STREAM => {
                    count(http, "http2.tx_reset");
                    match word(bytes, body) {
                        Some(REFUSED_STREAM) => count(http, "http2.stream_refused_errors"),
                        Some(PROTOCOL_ERROR) if logs => {
                            let known = ending.reasons.borrow_mut().pop_front();
                            if known.is_some() || ending.unread.borrow().contains(&head.stream) {
                                ending.resets.borrow_mut().push(known.unwrap_or(super::INVALID_FIELD));
                            }
                        }
                        _ => {}
                    }
                    ending.read(head.stream);
                }
                GOAWAY if word(bytes, body + 4) == Some(0) => {
                    // Only the second one, with the last stream's number, is counted.
                    match word(bytes, body) {
                        Some(MAX_STREAM) => *leaving = true,
                        _ => count(http, "http2.goaway_sent"),
                    }
                }
                _ => {}
            }
            true
        });
    }

    /// What in `bytes`, which the crate wants to write, is not to be written as it is, and where.
    fn change(&self, bytes: &[u8]) -> Option<(usize, Change)> {
        let mut change = None;
        let unread = self.switch.0.unread.borrow();
        let asked = self.asked == Some(self.switch.0.given.get());
        self.outgoing.clone().look(bytes, |head, body| {
            let found = match head.kind {
                RST_STREAM if self.switch.has_answered(head.stream) => Some(Change::Skip),
                // Who opens too many streams is refused only until it can know how many there may be.
                RST_STREAM if self.seen.acknowledged && word(bytes, body) == Some(REFUSED_STREAM) => {
                    Some(if asked { Change::Cut } else { Change::Ask { last: true } })
                }
                RST_STREAM => match word(bytes, body) {
                    Some(PROTOCOL_ERROR) if unread.contains(&head.stream) && !asked => {
                        Some(Change::Ask { last: false })
                    }
                    _ if self.stream_errors => None,
                    Some(PROTOCOL_ERROR) if unread.contains(&head.stream) => Some(Change::Refuse),
                    Some(code) if self.seen.closes_instead(code, head.stream) => {
                        let trailers = self.seen.bad_trailers(head.stream).filter(|_| code == PROTOCOL_ERROR);
                        Some(trailers.map_or(Change::Refuse, |details| Change::Trailers(head.stream, details)))
                    }
                    _ => None,
                },
                GOAWAY => match word(bytes, body + 4) {
                    Some(PROTOCOL_ERROR) if self.seen.bad_size => Some(Change::SizeError),
                    Some(PROTOCOL_ERROR) if !unread.is_empty() && !asked => Some(Change::Ask { last: true }),
                    // Of such a head the crate could not read a field.
                    Some(PROTOCOL_ERROR) if self.seen.hides_goaway(PROTOCOL_ERROR, true) && !unread.is_empty() => {
                        Some(Change::Refuse)
                    }
                    Some(code) if self.seen.hides_goaway(code, false) => {
                        let of_trailers = code == PROTOCOL_ERROR && self.seen.last == Some(HEADERS);
                        let trailers = self.seen.trailers.filter(|_| of_trailers);
                        let trailers = trailers.and_then(|(on, _)| Some((on, self.seen.bad_trailers(on)?)));
                        Some(trailers.map_or(Change::Cut, |(stream, details)| Change::Trailers(stream, details)))
                    }
                    // Envoy has nothing to say to a peer that leaves.
                    Some(0) if (!self.leaving || self.seen.goodbye) && word(bytes, body) != Some(MAX_STREAM) => {
                        Some(Change::Skip)
                    }
                    _ => None,
                },
                // The crate measures a round trip after its first GOAWAY; Envoy waits for the drain timeout.
                // Its other pings are ours, of `connection_keepalive`.
                PING if head.flags & ACK == 0 && bytes.get(body..body + 8) == Some(&SHUTDOWN_PING[..]) => {
                    Some(Change::Ping)
                }
                _ => None,
            };
            change = found.zip(body.checked_sub(9)).map(|(change, at)| (at, change));
            change.is_none()
        });
        change
    }

    /// Makes a change that is due at the start of `bytes`.
    fn poll_change(&mut self, cx: &mut Context<'_>, change: Change, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match change {
            Change::Cut => {}
            Change::Ask { last } => {
                self.asked = Some(self.switch.0.given.get());
                if let (true, Some(http)) = (last, &self.http) {
                    // Streams that find out meanwhile say the same.
                    http.end.set(Some(End::Codec { details: super::BROKEN, blamed: None }));
                }
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Change::Trailers(stream, details) => self.switch.blame(Fault::Trailers(stream, details)),
            Change::Refuse => self.switch.blame(Fault::Message(super::INVALID_FIELD)),
            Change::Skip => {
                let mut skipped = Head::read(&[0; 9]);
                self.outgoing.clone().look(bytes, |head, _| {
                    skipped = head;
                    false
                });
                let length = (9 + skipped.length).min(bytes.len());
                self.outgoing.look(&bytes[..length], |_, _| true);
                self.switch.0.answered.borrow_mut().retain(|answered| *answered != skipped.stream);
                return Poll::Ready(Ok(length));
            }
            Change::SizeError => {
                let mut frame = vec![0, 0, 8];
                frame.extend_from_slice(&bytes[3..13]);
                frame.extend_from_slice(&FRAME_SIZE_ERROR.to_be_bytes());
                std::task::ready!(Pin::new(&mut self.io).poll_write(cx, &frame))?;
            }
            Change::Ping => {
                let mut answer = bytes[..17].to_vec();
                answer[4] = ACK;
                self.wrote(&bytes[..17]);
                self.pong = Some((Box::pin(tokio::time::sleep(self.drain_timeout)), answer));
                cx.waker().wake_by_ref();
                return Poll::Ready(Ok(17));
            }
        }
        self.switch.cut();
        // The crate reads on, and finds the end.
        cx.waker().wake_by_ref();
        Poll::Ready(Ok(bytes.len()))
    }

    /// Cuts the connection, once the crate has seen what came before the flood.
    fn poll_flooded(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(flooded) = self.flooded.take() {
            self.switch.blame(Fault::Flood(flooded));
        }
        // At the end of its input the crate would forget streams that it has not given out.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes answers to streams that the crate does not know of, between its frames.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.out_block || !self.outgoing.is_between() || self.switch.0.late.borrow().is_empty() {
            return Poll::Ready(Ok(()));
        }
        let late = self.switch.0.late.take();
        match Pin::new(&mut self.io).poll_write(cx, &late)? {
            Poll::Ready(n) => {
                self.wrote(&late[..n]);
                // A batch takes all or nothing.
                debug_assert_eq!(n, late.len());
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                self.switch.0.late.replace(late);
                Poll::Pending
            }
        }
    }

    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let n = std::task::ready!(Pin::new(&mut self.io).poll_write(cx, &self.pending))?;
            self.pending.drain(..n);
        }
        Poll::Ready(Ok(()))
    }

    /// Looks at what came of the preface. Envoy says nothing to who speaks something else.
    fn greet(&mut self, cx: &mut Context<'_>, came: &[u8]) -> io::Result<()> {
        let rest = &PREFACE[self.greeted..];
        let length = came.len().min(rest.len());
        if came[..length] != rest[..length] {
            self.switch.cut();
            return Ok(());
        }
        self.greeted += length;
        match self.poll_pending(cx) {
            Poll::Ready(done) => done,
            // The rest leaves with what is written next.
            Poll::Pending => Ok(()),
        }
    }

    /// Writes our SETTINGS in the place of the crate's. Ready when nothing is left of them.
    fn poll_settings(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(settings) = self.settings
            && bytes.len() >= 9
        {
            self.settings = None;
            self.pending = settings.frame();
            self.drop = 9 + (usize::from(bytes[1]) << 8 | usize::from(bytes[2]));
        }
        if self.greeted > 0 {
            std::task::ready!(self.poll_pending(cx))?;
        }
        // What the crate wrote counts as written.
        let n = self.drop.min(bytes.len());
        self.drop -= n;
        self.wrote(&bytes[..n]);
        Poll::Ready(Ok(n))
    }
}

/// Four bytes at a place, if they are there.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn count(http: &Option<Rc<Http>>, name: &str) {
    if let Some(http) = http {
        http.worker.named_stats().inc(name);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.io.finish();
    }
}

impl AsyncRead for Guard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.switch.is_cut() {
            return Poll::Ready(Ok(()));
        }
        if this.flooded.is_some() {
            return this.poll_flooded(cx);
        }
        if let Some((sleep, answer)) = &mut this.pong
            && this.incoming.is_between()
            && buf.remaining() >= answer.len()
            && sleep.as_mut().poll(cx).is_ready()
        {
            buf.put_slice(answer);
            this.pong = None;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        match &polled {
            Poll::Pending => this.flood.rests(),
            Poll::Ready(Ok(())) if buf.filled().len() > before => {
                if let Some(http) = &this.http {
                    let came = (buf.filled().len() - before) as u64;
                    http.stats.downstream_cx_rx_bytes_total.add(came);
                    http.received.set(http.received.get() + came);
                }
            }
            Poll::Ready(_) => this.switch.0.by_peer.set(true),
        }
        if this.greeted < PREFACE.len() && polled.is_ready() {
            this.greet(cx, &buf.filled()[before..])?;
            if this.switch.is_cut() {
                buf.set_filled(before);
                return polled;
            }
        }
        let (seen, flood, http) = (&mut this.seen, &mut this.flood, &this.http);
        let ending = &this.switch.0;
        let (mut flooded, mut calm) = (None, 0);
        let came = &buf.filled()[before..];
        this.incoming.look(came, |head, body| {
            if head.kind == HEADERS && !seen.in_block {
                if seen.opens(head) && head.stream % 2 == 1 {
                    ending.came(head.stream);
                } else if !seen.opens(head) {
                    count(http, "http2.trailers");
                }
            }
            seen.note(head, came.get(body).copied());
            flooded = flood.received(head).err();
            calm = body.saturating_sub(9);
            flooded.is_none()
        });
        if let Some(http) = http {
            http.trailers.set(seen.trailers.and_then(|(stream, _)| Some((stream, seen.bad_trailers(stream)?))));
        }
        let part = (seen.fresh && this.incoming.is_within()).then_some(seen.highest);
        let owed = seen.head.or(part).filter(|stream| !this.switch.has_answered(*stream));
        if owed != ending.head.get().map(|(stream, _)| stream) {
            ending.head.set(owed.map(|stream| (stream, Instant::now())));
        }
        if let Some(flooded) = flooded {
            if let Some(counter) = flooded.counter() {
                count(http, counter);
            }
            // As Envoy: no more than what came before is read, and nothing is said.
            this.flooded = Some(flooded);
            buf.set_filled(before + calm);
            if calm == 0 {
                return this.poll_flooded(cx);
            }
        }
        polled
    }
}

impl AsyncWrite for Guard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.switch.is_cut() {
            return Poll::Ready(Ok(buf.len()));
        }
        std::task::ready!(this.poll_late(cx))?;
        if this.settings.is_some() || !this.pending.is_empty() || this.drop > 0 {
            match this.poll_settings(cx, buf) {
                Poll::Ready(Ok(0)) if !buf.is_empty() => {}
                other => return other,
            }
        }
        let upto = match this.change(buf) {
            Some((0, change)) => return this.poll_change(cx, change, buf),
            Some((at, _)) => at,
            None => buf.len(),
        };
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write(cx, &buf[..upto]))?;
        this.wrote(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        std::task::ready!(this.poll_late(cx))?;
        let plain = !this.switch.is_cut() && this.settings.is_none() && this.pending.is_empty() && this.drop == 0;
        // Errors come in the first part: frame heads and control frames; the others are payload of DATA.
        let first = bufs.iter().find(|b| !b.is_empty()).map_or(&[][..], |b| b);
        if !plain || this.change(first).is_some() {
            return Pin::new(this).poll_write(cx, first);
        }
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs))?;
        written_of(bufs, written, |part| this.wrote(part));
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.switch.is_cut() {
            std::task::ready!(this.poll_late(cx))?;
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    /// The end is said once the peer has gone or had its time: see [`super::serve`].
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_messages_close_but_bad_bodies_reset() {
        let mut seen = Seen::default();
        seen.note(Head { length: 1, kind: HEADERS, flags: 5, stream: 1 }, None);
        assert!(seen.closes_instead(PROTOCOL_ERROR, 1) && seen.hides_goaway(PROTOCOL_ERROR, false));
        seen.note(Head { length: 1, kind: DATA, flags: 1, stream: 1 }, None);
        assert!(!seen.closes_instead(PROTOCOL_ERROR, 1) && !seen.hides_goaway(PROTOCOL_ERROR, false));
        seen.note(Head { length: 1, kind: HEADERS, flags: 5, stream: 1 }, None);
        assert!(seen.closes_instead(PROTOCOL_ERROR, 1), "trailers");
        assert_eq!((seen.bad_trailers(1), seen.bad_trailers(3)), (Some(crate::hcm::h2::INVALID_FIELD), None));
        seen.note(Head { length: 1, kind: HEADERS, flags: 0, stream: 3 }, None);
        assert!(!seen.hides_goaway(PROTOCOL_ERROR, true), "a header block was interrupted");
        assert_eq!(seen.head, Some(3));
        seen.note(Head { length: 1, kind: CONTINUATION, flags: END_HEADERS, stream: 3 }, None);
        assert_eq!(seen.head, None, "the head is there");
        seen.note(Head { length: 1, kind: HEADERS, flags: 1, stream: 3 }, None);
        assert!(seen.in_block && seen.head.is_none(), "trailers");
    }

    #[test]
    fn bad_padding_is_told() {
        let head = Head { length: 3, kind: HEADERS, flags: PADDED | END_HEADERS, stream: 1 };
        let hides = |first| {
            let mut seen = Seen::default();
            seen.note(head, Some(first));
            seen.hides_goaway(PROTOCOL_ERROR, false)
        };
        assert!(hides(2) && !hides(3));
    }

    #[test]
    fn settings_are_envoys() {
        let frame = Settings { table_size: 4096, connect: false, streams: 1024, window: 1 << 24 }.frame();
        assert_eq!(frame.len(), 33);
        assert_eq!(frame[9..15], [0, 1, 0, 0, 0x10, 0]);
    }
}
