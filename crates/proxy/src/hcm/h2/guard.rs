//! What the `h2` crate says on the wire, in Envoy's words: the first SETTINGS, and which errors end a connection.
//!
//! Envoy's codec (nghttp2) closes the connection without a frame for most violations: malformed messages, wrong stream
//! numbers, bad values in control frames. Only framing, padding, compression and DATA errors get a GOAWAY. The crate
//! answers each of them with GOAWAY or RST_STREAM; the guard stands between it and the socket and swallows those. It
//! also writes what the crate cannot: answers to streams whose heads are not complete.

use super::flood::{Flood, Flooded, Limits};
use super::seen::{FRAME_SIZE_ERROR, PROTOCOL_ERROR, REFUSED_STREAM, Seen};
use super::switch::{Fault, Switch};
use crate::batch::Batch;
use crate::frames::{
    ACK, CONTINUATION, END_HEADERS, Frames, GOAWAY, HEADERS, Head, PING, RST_STREAM, SETTINGS, written_of,
};
use crate::hcm::{End, Http};
use crate::inspect::PREFACE;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// The last stream that there can be, which the first of two GOAWAYs names.
const MAX_STREAM: u32 = 0x7fff_ffff;

/// What the crate's ping after its first GOAWAY carries.
const SHUTDOWN_PING: [u8; 8] = [0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54];

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
        let (flood, switch) = (&mut self.flood, &self.switch);
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
                        Some(PROTOCOL_ERROR) if logs => switch.reset(head.stream),
                        _ => {}
                    }
                    switch.read(head.stream);
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
        let asked = self.asked == Some(self.switch.given());
        self.outgoing.clone().look(bytes, |head, body| {
            let found = match head.kind {
                RST_STREAM if self.switch.has_answered(head.stream) => Some(Change::Skip),
                // Who opens too many streams is refused only until it can know how many there may be.
                RST_STREAM if self.seen.acknowledged && word(bytes, body) == Some(REFUSED_STREAM) => {
                    Some(if asked { Change::Cut } else { Change::Ask { last: true } })
                }
                RST_STREAM => match word(bytes, body) {
                    Some(PROTOCOL_ERROR) if self.switch.is_unread(head.stream) && !asked => {
                        Some(Change::Ask { last: false })
                    }
                    _ if self.stream_errors => None,
                    Some(PROTOCOL_ERROR) if self.switch.is_unread(head.stream) => Some(Change::Refuse),
                    Some(code) if self.seen.closes_instead(code, head.stream) => {
                        let trailers = self.seen.bad_trailers(head.stream).filter(|_| code == PROTOCOL_ERROR);
                        Some(trailers.map_or(Change::Refuse, |details| Change::Trailers(head.stream, details)))
                    }
                    _ => None,
                },
                GOAWAY => match word(bytes, body + 4) {
                    Some(PROTOCOL_ERROR) if self.seen.bad_size => Some(Change::SizeError),
                    Some(PROTOCOL_ERROR) if self.switch.has_unread() && !asked => Some(Change::Ask { last: true }),
                    // Of such a head the crate could not read a field.
                    Some(PROTOCOL_ERROR)
                        if self.seen.hides_goaway(PROTOCOL_ERROR, true) && self.switch.has_unread() =>
                    {
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
                self.asked = Some(self.switch.given());
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
                self.switch.forget_answered(skipped.stream);
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
        if self.out_block || !self.outgoing.is_between() || !self.switch.has_late() {
            return Poll::Ready(Ok(()));
        }
        let late = self.switch.take_late();
        match Pin::new(&mut self.io).poll_write(cx, &late)? {
            Poll::Ready(n) => {
                self.wrote(&late[..n]);
                // A batch takes all or nothing.
                debug_assert_eq!(n, late.len());
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                self.switch.put_late(late);
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
            Poll::Ready(_) => this.switch.closed_by_peer(),
        }
        if this.greeted < PREFACE.len() && polled.is_ready() {
            this.greet(cx, &buf.filled()[before..])?;
            if this.switch.is_cut() {
                buf.set_filled(before);
                return polled;
            }
        }
        let (seen, flood, http) = (&mut this.seen, &mut this.flood, &this.http);
        let switch = &this.switch;
        let (mut flooded, mut calm) = (None, 0);
        let came = &buf.filled()[before..];
        this.incoming.look(came, |head, body| {
            if head.kind == HEADERS && !seen.in_block {
                if seen.opens(head) && head.stream % 2 == 1 {
                    switch.came(head.stream);
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
        switch.owes(owed);
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
    fn settings_are_envoys() {
        let frame = Settings { table_size: 4096, connect: false, streams: 1024, window: 1 << 24 }.frame();
        assert_eq!(frame.len(), 33);
        assert_eq!(frame[9..15], [0, 1, 0, 0, 0x10, 0]);
    }
}
