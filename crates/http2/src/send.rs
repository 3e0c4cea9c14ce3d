//! What goes out: heads, data as far as there is room, resets, and room for the peer.

use crate::conn::{Out, State};
use crate::frame::{
    self, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEAD, HEADERS, MAX_31, MAX_PAYLOAD, RST_STREAM, Reason,
    WINDOW_UPDATE,
};
use crate::hpack::Encoder;
use crate::message::Rules;
use crate::stream::{Broken, TURN};
use proxy_core::Headers;

/// Bytes that may wait in a connection's output before data of streams waits with its stream.
const MOST: usize = 64 * 1024;

/// Appends a header block: HEADERS, and CONTINUATION where it does not fit.
fn block(out: &mut Vec<u8>, stream: u32, end: bool, encode: impl FnOnce(&mut Vec<u8>)) {
    let flags = if end { END_STREAM } else { 0 };
    let start = out.len();
    frame::head(out, 0, HEADERS, flags | END_HEADERS, stream);
    encode(out);
    let length = out.len() - start - HEAD;
    if length <= MAX_PAYLOAD {
        out[start..start + 3].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
        return;
    }
    let rest = out.split_off(start + HEAD);
    out.truncate(start);
    let mut parts = rest.chunks(MAX_PAYLOAD).peekable();
    let mut kind = (HEADERS, flags);
    while let Some(part) = parts.next() {
        let last = if parts.peek().is_none() { END_HEADERS } else { 0 };
        frame::head(out, part.len(), kind.0, kind.1 | last, stream);
        out.extend_from_slice(part);
        kind = (CONTINUATION, 0);
    }
}

/// Pseudo-headers come before the others, whatever their order was.
fn fields(encoder: &mut Encoder, headers: &Headers, out: &mut Vec<u8>, keep: impl Fn(&[u8], &[u8]) -> bool) {
    for (name, value) in headers.iter().filter(|(name, _)| name.first() == Some(&b':')) {
        encoder.field(name, value, out);
    }
    for (name, value) in headers.iter_regular().filter(|(name, value)| keep(name, value)) {
        encoder.field(name, value, out);
    }
}

impl<O: Out> State<O> {
    /// Opens a stream with a request.
    pub(crate) fn open(&mut self, head: &Headers, end: bool, keep: impl Fn(&[u8], &[u8]) -> bool) -> Option<usize> {
        if self.fault.is_some() || self.closed || self.peer_leaves || self.next > MAX_31 {
            return None;
        }
        let id = self.next;
        self.next += 2;
        let key = self.insert(id, Rules::of_answer(head.get(":method")));
        let encoder = &mut self.encoder;
        self.out.write(|out| {
            block(out, id, end, |out| {
                encoder.begin(out);
                fields(encoder, head, out, keep);
            });
        });
        self.streams[key].end_sent = end;
        self.wake_driver();
        Some(key)
    }

    /// Writes the head of an answer.
    pub(crate) fn answer(&mut self, key: usize, status: u16, headers: &Headers, end: bool) {
        let id = self.streams[key].id;
        let encoder = &mut self.encoder;
        self.out.write(|out| {
            block(out, id, end, |out| {
                encoder.begin(out);
                let digits = [status / 100 % 10, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8);
                encoder.field(b":status", &digits, out);
                for (name, value) in headers.iter_regular() {
                    encoder.field(name, value, out);
                }
            });
        });
        if end {
            self.end_sent(key);
        }
        self.wake_driver();
    }

    fn end_sent(&mut self, key: usize) {
        self.streams[key].end_sent = true;
        self.retire(key);
    }

    /// Writes what a stream has, as far as there is room; what is left waits in the connection's list.
    pub(crate) fn advance(&mut self, key: usize) {
        if self.streams[key].blocked {
            // Its turn comes.
            return self.wake_driver();
        }
        while self.streams[key].has_more() {
            if !self.turn(key) {
                self.streams[key].blocked = true;
                self.blocked.push_back(key);
                break;
            }
        }
        self.wake_driver();
    }

    /// Writes one frame of a stream. False when there is no room.
    fn turn(&mut self, key: usize) -> bool {
        let room = self.room(self.streams[key].send_window).min(TURN);
        let entry = &mut self.streams[key];
        let id = entry.id;
        if entry.queued() > 0 {
            let length = entry.queued().min(room);
            if length == 0 || self.out.len() >= MOST {
                return false;
            }
            let end = entry.ends_with(length);
            let out = &mut self.out;
            out.write(|out| frame::head(out, length, DATA, if end { END_STREAM } else { 0 }, id));
            entry.take_data(length, |piece| out.push(piece));
            self.send_window -= length as i64;
            if let Some(flood) = &mut self.flood {
                flood.sent_data();
            }
            if end {
                self.end_sent(key);
            }
            return true;
        }
        if let Some(trailers) = entry.take_trailers() {
            let encoder = &mut self.encoder;
            self.out.write(|out| {
                block(out, id, true, |out| {
                    encoder.begin(out);
                    for (name, value) in trailers.iter_regular() {
                        encoder.field(name, value, out);
                    }
                });
            });
        } else {
            self.out.write(|out| frame::head(out, 0, DATA, END_STREAM, id));
            if let Some(flood) = &mut self.flood {
                flood.sent_data();
            }
        }
        self.end_sent(key);
        true
    }

    /// Lets streams that wait have their turns, one frame each, while there is room. Returns whether anything moved.
    pub(crate) fn pump(&mut self) -> bool {
        let mut moved = false;
        let mut stuck = 0;
        while stuck < self.blocked.len() && self.out.len() < MOST {
            let Some(key) = self.blocked.pop_front() else { break };
            if !self.streams[key].has_more() {
                // It broke meanwhile. Its entry may serve another stream by now, and keeps its place if that one waits, too.
                self.streams[key].blocked = false;
                continue;
            }
            if self.turn(key) {
                (moved, stuck) = (true, 0);
                self.streams[key].wake();
            } else {
                stuck += 1;
            }
            if self.streams[key].has_more() {
                self.blocked.push_back(key);
            } else {
                self.streams[key].blocked = false;
            }
        }
        moved
    }

    /// Resets a stream, and breaks it for those who have it.
    pub(crate) fn reset(&mut self, key: usize, reason: Reason) {
        let id = self.streams[key].id;
        self.rst(id, reason);
        self.fail(key, Broken::Given);
        self.wake_driver();
    }

    pub(crate) fn rst(&mut self, id: u32, reason: Reason) {
        self.tally.tx_reset += 1;
        self.out.write(|out| {
            frame::head(out, 4, RST_STREAM, 0, id);
            out.extend_from_slice(&reason.0.to_be_bytes());
        });
    }

    /// Bytes of a stream were read: the peer gets room for more once it is half of a window (nghttp2's
    /// `nghttp2_should_send_window_update`).
    pub(crate) fn consume(&mut self, key: usize, bytes: u32) {
        let window = self.options.stream_window;
        let entry = &mut self.streams[key];
        if !entry.retired && !entry.end_received {
            entry.consumed += bytes;
            if entry.consumed >= (window / 2).max(1) {
                let (id, more) = (entry.id, std::mem::take(&mut entry.consumed));
                entry.recv_window += i64::from(more);
                self.window_update(id, more);
            }
        }
        self.consume_connection(bytes);
    }

    pub(crate) fn consume_connection(&mut self, bytes: u32) {
        self.consumed += bytes;
        if self.consumed > 0 && self.consumed >= self.options.connection_window / 2 {
            let more = std::mem::take(&mut self.consumed);
            self.recv_window += i64::from(more);
            self.window_update(0, more);
        }
    }

    pub(crate) fn window_update(&mut self, stream: u32, more: u32) {
        self.out.write(|out| {
            frame::head(out, 4, WINDOW_UPDATE, 0, stream);
            out.extend_from_slice(&more.to_be_bytes());
        });
        self.wake_driver();
    }
}
