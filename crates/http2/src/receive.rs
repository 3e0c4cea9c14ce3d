//! What comes in, in the order of decisions of nghttp2 (`nghttp2_session_mem_recv2`) and of Envoy's callbacks from it.

use crate::conn::{Excess, Fault, Malformed, Out, Request, State};
use crate::frame::{
    self, ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEAD, HEADERS, Head, MAX_31, MAX_PAYLOAD, PADDED,
    PING, PREFACE, PRIORITY, PUSH_PROMISE, RST_STREAM, Reason, SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, settings, word,
};
use crate::hpack;
use crate::message::{Rules, Verdict};
use crate::stream::{Broken, Item};
use crate::{CALLBACK_FAILED, INVALID_FIELD, UNKNOWN, VIOLATION};
use bytes::{Buf, Bytes, BytesMut};
use proxy_core::Headers;
use std::time::Instant;

/// CONTINUATIONs of one head.
///
/// DIFFERS: the nghttp2 in Envoy takes any number, and bytes without end, of a head that it has already refused.
const MAX_CONTINUATIONS: u32 = 1000;
/// Bytes of a block beyond what its head may have.
const BLOCK_MARGIN: usize = 64 * 1024;
/// Fields of a head, and bytes of them beyond those of its block, for which there is room from the start.
const USUAL_FIELDS: usize = 16;
const USUAL_BYTES: usize = 256;
/// Entries of one SETTINGS frame (nghttp2's `NGHTTP2_DEFAULT_MAX_SETTINGS`).
const MAX_SETTINGS: usize = 32;
/// Data below this is copied, so that a small piece does not keep a large buffer: eight times its own size at most.
const COPY_BELOW: usize = 8192;

/// A header block that is not complete.
pub(crate) struct Block {
    stream: u32,
    target: Target,
    end: bool,
    bytes: Vec<u8>,
    continuations: u32,
}

/// What a header block is.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// Nobody's: it only keeps the table right.
    Nobody,
    Request(usize),
    Answer(usize),
    Trailers(usize),
}

/// What is read of a header block.
struct Reading {
    headers: Headers,
    rules: Rules,
    /// Names and values that were kept, in bytes.
    size: usize,
    excess: Option<Excess>,
    malformed: bool,
}

impl Reading {
    fn add(&mut self, name: &[u8], value: &[u8], verdict: Verdict, max: (usize, usize)) {
        match verdict {
            Verdict::Skip => {}
            Verdict::Malformed => self.malformed = true,
            Verdict::Keep => {
                self.headers.push(name, value);
                self.size += name.len() + value.len();
                if self.size > max.0 {
                    self.excess = Some(Excess::Bytes);
                } else if self.headers.len() > max.1 {
                    self.excess = Some(Excess::Fields);
                }
            }
        }
    }

    /// Nothing more of it matters.
    fn is_spoilt(&self) -> bool {
        self.malformed || self.excess.is_some()
    }
}

impl<O: Out> State<O> {
    pub(crate) fn receive(&mut self, buf: &mut BytesMut, now: Instant) {
        if !self.take_preface(buf) {
            return;
        }
        while self.fault.is_none()
            && let Some(head) = buf.first_chunk().map(Head::read)
        {
            if !self.begun && (head.kind != SETTINGS || head.flags & ACK != 0) {
                self.tell(Reason::PROTOCOL_ERROR, "SETTINGS expected");
                break;
            }
            if head.length > MAX_PAYLOAD {
                self.tell(Reason::FRAME_SIZE_ERROR, "too large frame size");
                break;
            }
            if buf.len() < HEAD + head.length {
                break;
            }
            // Padding is no payload.
            let padding = if matches!(head.kind, DATA | HEADERS) && head.flags & PADDED != 0 {
                buf.get(HEAD).map_or(0, |padding| 1 + usize::from(*padding))
            } else {
                0
            };
            let counted = Head { length: head.length.saturating_sub(padding), ..head };
            if let Some(flood) = &mut self.flood
                && let Err(flooded) = flood.received(counted)
            {
                self.blame(Fault::Flood(flooded));
                break;
            }
            let last = !self.server && self.peer_leaves && !self.by_id.is_empty();
            buf.advance(HEAD);
            if head.kind == DATA {
                let large = head.length >= COPY_BELOW;
                let data = if large {
                    buf.split_to(head.length).freeze()
                } else {
                    Bytes::copy_from_slice(&buf[..head.length])
                };
                if !large {
                    buf.advance(head.length);
                }
                self.frame(head, &[], data, now);
            } else {
                self.frame(head, &buf[..head.length], Bytes::new(), now);
                buf.advance(head.length);
            }
            self.over_by_answer |= last && self.by_id.is_empty();
            if !self.server && self.peer_leaves && self.by_id.is_empty() {
                // It ends here, whatever the host still says: often that it was not done with our frames.
                buf.clear();
                break;
            }
        }
        if self.fault.is_some() {
            buf.clear();
            return;
        }
        if !self.urgent.is_empty() {
            self.out.write(|out| out.append(&mut self.urgent));
        }
        if self.preface == 0
            && let Some(more) = self.window_owed.take()
        {
            self.window_update(0, more);
        }
        if let Some(flooded) = self.flood.as_ref().and_then(|flood| flood.answers().err()) {
            // The answers leave all the same.
            self.blame(Fault::Flood(flooded));
        }
    }

    /// Takes what has come of a client's preface. False while that is not all, or something else came.
    fn take_preface(&mut self, buf: &mut BytesMut) -> bool {
        if self.fault.is_some() {
            buf.clear();
            return false;
        }
        if self.preface == 0 {
            return true;
        }
        let rest = &PREFACE[PREFACE.len() - self.preface..];
        let length = buf.len().min(rest.len());
        if buf[..length] != rest[..length] {
            self.blame(Fault::Broken("codec_error:Received_bad_client_magic_byte_string"));
            buf.clear();
            return false;
        }
        if self.preface == PREFACE.len() && length > 0 {
            self.greet();
        }
        self.preface -= length;
        buf.advance(length);
        self.preface == 0
    }

    fn frame(&mut self, head: Head, payload: &[u8], data: Bytes, now: Instant) {
        self.begun = true;
        if let Some(block) = &self.block {
            if head.kind != CONTINUATION || head.stream != block.stream {
                return self.tell(Reason::PROTOCOL_ERROR, "unexpected non-CONTINUATION frame or stream_id is invalid");
            }
            return self.continuation(head, payload);
        }
        if head.has_bad_size() {
            return self.tell(Reason::FRAME_SIZE_ERROR, "");
        }
        match head.kind {
            DATA => self.data(head, data),
            HEADERS => self.headers(head, payload, now),
            // DIFFERS: Envoy passes over these; RFC 9113 (6.3) and RFC 7540 (5.3.1) ask for an error.
            PRIORITY if self.server && (head.stream == 0 || word(payload, 0) & MAX_31 == head.stream) => {
                self.tell(Reason::PROTOCOL_ERROR, "PRIORITY: depend on itself");
            }
            PRIORITY => self.glitch(now),
            RST_STREAM => self.rst_stream(head, Reason(word(payload, 0)), now),
            SETTINGS => self.settings(head, payload),
            // Nobody may push to us.
            PUSH_PROMISE if self.by_id.contains_key(&head.stream) => self.blame(Fault::Of(head.stream, UNKNOWN)),
            PUSH_PROMISE => self.blame(Fault::Broken(CALLBACK_FAILED)),
            // DIFFERS: Envoy closes without a word; RFC 9113 (6.7) asks for this.
            PING if head.stream != 0 => self.tell(Reason::PROTOCOL_ERROR, "PING: stream_id != 0"),
            PING if head.flags & ACK != 0 => self.pongs += 1,
            PING => {
                frame::head(&mut self.urgent, payload.len(), PING, ACK, 0);
                self.urgent.extend_from_slice(payload);
            }
            GOAWAY => self.goaway_received(head, payload),
            WINDOW_UPDATE => self.window_update_received(head, word(payload, 0) & MAX_31),
            CONTINUATION => self.tell(Reason::PROTOCOL_ERROR, "CONTINUATION: unexpected"),
            _ => self.glitch(now),
        }
    }

    /// Something that is allowed but odd.
    fn glitch(&mut self, now: Instant) {
        if !self.glitches.take(now) {
            self.tell(Reason::ENHANCE_YOUR_CALM, "");
        }
    }

    /// Whether nobody has opened this stream yet.
    fn is_idle(&self, id: u32) -> bool {
        let own = (id % 2 == 1) != self.server;
        if own { id >= self.next || self.server } else { id > self.highest }
    }

    fn data(&mut self, head: Head, mut data: Bytes) {
        if head.stream == 0 {
            return self.tell(Reason::PROTOCOL_ERROR, "DATA: stream_id == 0");
        }
        if self.is_idle(head.stream) {
            return self.tell(Reason::PROTOCOL_ERROR, "DATA: stream in idle");
        }
        self.recv_window -= head.length as i64;
        let Some(&key) = self.by_id.get(&head.stream) else {
            // What a stream that is gone gets counts as read.
            if self.recv_window < 0 {
                return self.tell(Reason::FLOW_CONTROL_ERROR, "");
            }
            if self.follows_its_end(head.stream) {
                self.rst(head.stream, Reason::STREAM_CLOSED);
            }
            return self.consume_connection(head.length as u32);
        };
        let entry = &mut self.streams[key];
        if entry.end_received {
            return self.tell(Reason::STREAM_CLOSED, "DATA: stream in half-closed(remote)");
        }
        if !self.server && !entry.answered {
            return self.tell(Reason::PROTOCOL_ERROR, "DATA: stream not opened");
        }
        if head.flags & PADDED != 0 {
            let Some(padding) = data.first().map(|padding| usize::from(*padding)) else {
                return self.tell(Reason::PROTOCOL_ERROR, "DATA: insufficient padding space");
            };
            if padding >= data.len() {
                return self.tell(Reason::PROTOCOL_ERROR, "DATA: invalid padding");
            }
            data.truncate(data.len() - padding);
            data.advance(1);
        }
        if self.recv_window < 0 {
            return self.tell(Reason::FLOW_CONTROL_ERROR, "");
        }
        let entry = &mut self.streams[key];
        entry.recv_window -= head.length as i64;
        if entry.recv_window < 0 {
            self.consume_connection(head.length as u32);
            return self.spoil(key, Reason::FLOW_CONTROL_ERROR, None);
        }
        self.consume(key, (head.length - data.len()) as u32);
        let entry = &mut self.streams[key];
        let end = head.flags & END_STREAM != 0;
        let fits = entry.rules.data(data.len()) || data.is_empty();
        if !fits || (end && !entry.rules.is_whole()) {
            // Of this only the stream hears.
            self.consume_connection(data.len() as u32);
            return self.spoil(key, Reason::PROTOCOL_ERROR, None);
        }
        let length = data.len() as u32;
        if entry.handles == 0 {
            self.consume_connection(length);
        } else {
            // Also without any data: Envoy's filters see each frame.
            entry.deliver(Item::Data(data));
            // There is room for more at once, unless whoever reads it cannot follow.
            if entry.is_read_soon() {
                self.consume(key, length);
            } else {
                entry.held += length;
            }
        }
        if end {
            self.end_received(key);
        }
    }

    /// Whether a frame came on a stream that the peer itself had ended. It is told once.
    ///
    /// DIFFERS: Envoy passes over such frames; RFC 9113 (5.1) asks for an error.
    fn follows_its_end(&mut self, id: u32) -> bool {
        let ended = self.ended.iter_mut().find(|(ended, _)| *ended == id);
        ended.is_some_and(|(_, by_peer)| std::mem::take(by_peer))
    }

    fn end_received(&mut self, key: usize) {
        let entry = &mut self.streams[key];
        entry.end_received = true;
        entry.wake();
        self.retire(key);
    }

    /// Resets a stream for what came on it.
    fn spoil(&mut self, key: usize, reason: Reason, details: Option<&'static str>) {
        let id = self.streams[key].id;
        self.rst(id, reason);
        let windows = reason == Reason::FLOW_CONTROL_ERROR;
        self.fail(key, if windows { Broken::Reset(reason) } else { Broken::Malformed(details) });
    }

    /// A message breaks the rules: its stream ends, and with it the connection unless only streams are to.
    fn malformed(&mut self, key: usize, details: &'static str) {
        if !self.server {
            self.tally.malformed += 1;
        }
        let given_out = self.server && self.streams[key].handles > 0;
        if self.options.stream_errors {
            if self.server && !given_out {
                self.requests.push_back(Err(Malformed(details)));
            }
            return self.spoil(key, Reason::PROTOCOL_ERROR, Some(details));
        }
        let id = self.streams[key].id;
        self.blame(if given_out { Fault::Of(id, details) } else { Fault::Message(details) });
        self.fail(key, Broken::Malformed(Some(details)));
    }

    fn headers(&mut self, head: Head, payload: &[u8], now: Instant) {
        let (mut at, mut end) = (0, payload.len());
        if head.flags & PADDED != 0 {
            let Some(&padding) = payload.first() else {
                return self.tell(Reason::PROTOCOL_ERROR, "HEADERS: insufficient padding space");
            };
            at = 1;
            let priority = if head.flags & WITH_PRIORITY != 0 { 5 } else { 0 };
            if usize::from(padding) + priority > payload.len() - 1 {
                return self.tell(Reason::PROTOCOL_ERROR, "HEADERS: invalid padding");
            }
            end -= usize::from(padding);
        }
        let mut depends = None;
        if head.flags & WITH_PRIORITY != 0 {
            if end - at < 5 {
                return self.tell(Reason::FRAME_SIZE_ERROR, "");
            }
            depends = Some(word(payload, at) & MAX_31);
            at += 5;
        }
        let target = match self.by_id.get(&head.stream) {
            None => self.opened(head.stream, depends == Some(head.stream)),
            Some(&key) => {
                let entry = &self.streams[key];
                if entry.end_received {
                    return self.blame(Fault::Of(head.stream, UNKNOWN));
                }
                let answer = !self.server && (!entry.answered || entry.rules.is_interim());
                self.tally.rx_trailers += u32::from(self.server);
                Some(if answer { Target::Answer(key) } else { Target::Trailers(key) })
            }
        };
        let Some(target) = target else { return };
        if matches!(target, Target::Nobody) {
            self.glitch(now);
        }
        let ends = head.flags & END_STREAM != 0;
        if head.flags & END_HEADERS != 0 {
            self.complete(head.stream, target, ends, &payload[at..end]);
        } else {
            let bytes = payload[at..end].to_vec();
            self.block = Some(Block { stream: head.stream, target, end: ends, bytes, continuations: 0 });
        }
    }

    /// A head on a stream that is not known. `None` when the connection ends for it.
    fn opened(&mut self, id: u32, on_itself: bool) -> Option<Target> {
        let new = self.server && id % 2 == 1 && id > self.highest;
        if id == 0 || (self.server && id.is_multiple_of(2)) || (!self.server && self.is_idle(id)) {
            self.blame(Fault::Broken(CALLBACK_FAILED));
            return None;
        }
        if !new {
            // DIFFERS: Envoy passes over all of these; RFC 9113 (5.1, 5.1.1) asks for an error where it is one for sure.
            if self.follows_its_end(id) {
                self.tell(Reason::STREAM_CLOSED, "HEADERS: stream closed");
                return None;
            }
            if self.server && !self.forgot && !self.ended.iter().any(|(ended, _)| *ended == id) {
                self.tell(Reason::PROTOCOL_ERROR, "request HEADERS: invalid stream_id");
                return None;
            }
            return Some(Target::Nobody);
        }
        self.highest = id;
        let many = self.by_id.len() >= self.options.max_streams as usize;
        if many && self.unacknowledged == 0 {
            self.blame(Fault::Broken(CALLBACK_FAILED));
            return None;
        }
        // DIFFERS: of who has left and has no streams Envoy reads nothing more, and answers no PINGs.
        let left = self.peer_leaves && self.by_id.is_empty();
        if self.leaving || left {
            return Some(Target::Nobody);
        }
        if on_itself {
            self.blame(Fault::Broken(CALLBACK_FAILED));
            return None;
        }
        if many {
            self.tally.refused += 1;
            self.rst(id, Reason::REFUSED_STREAM);
            return Some(Target::Nobody);
        }
        self.taken = id;
        Some(Target::Request(self.insert(id, Rules::default())))
    }

    fn continuation(&mut self, head: Head, payload: &[u8]) {
        let Some(block) = &mut self.block else { return };
        block.continuations += 1;
        block.bytes.extend_from_slice(payload);
        if block.continuations > MAX_CONTINUATIONS || block.bytes.len() > self.options.max_head.0 + BLOCK_MARGIN {
            return self.blame(Fault::Broken("codec_error:Too_many_CONTINUATION_frames_following_a_HEADER_frame"));
        }
        if head.flags & END_HEADERS != 0
            && let Some(block) = self.block.take()
        {
            self.complete(block.stream, block.target, block.end, &block.bytes);
        }
    }

    /// A whole header block.
    fn complete(&mut self, id: u32, target: Target, end: bool, block: &[u8]) {
        let (key, trailer) = match target {
            Target::Request(key) | Target::Answer(key) => (Some(key), false),
            Target::Trailers(key) => (Some(key), true),
            Target::Nobody => (None, false),
        };
        // A stream that was answered before its head was complete is over, and its entry may be another's.
        let key = key.filter(|key| self.by_id.get(&id) == Some(key));
        let mut reading = Reading {
            headers: match key.filter(|_| !trailer) {
                Some(_) => Headers::with_capacity(USUAL_FIELDS, block.len() + USUAL_BYTES),
                None => Headers::new(),
            },
            rules: key.map(|key| std::mem::take(&mut self.streams[key].rules)).unwrap_or_default(),
            size: 0,
            excess: None,
            malformed: false,
        };
        let (server, connect, max) = (self.server, self.options.connect, self.options.max_head);
        let decoded = self.decoder.decode(block, |name, value| {
            if key.is_none() || reading.is_spoilt() {
                return;
            }
            let verdict = if server {
                reading.rules.request_field(name, value, trailer, connect)
            } else {
                reading.rules.answer_field(name, value, trailer)
            };
            reading.add(name, value, verdict, max);
        });
        if let Err(hpack::Malformed) = decoded {
            self.headless = matches!(target, Target::Request(_)) && key.is_some();
            return self.tell(Reason::COMPRESSION_ERROR, "");
        }
        let Some(key) = key else { return };
        let Reading { headers, mut rules, excess, malformed, .. } = reading;
        if malformed {
            return self.malformed(key, INVALID_FIELD);
        }
        let whole = match target {
            _ if excess.is_some() => true,
            Target::Request(_) => rules.is_request() && (!end || rules.is_whole()),
            Target::Answer(_) => rules.is_answer() && (!end || rules.is_whole()),
            Target::Trailers(_) | Target::Nobody => end && rules.is_whole(),
        };
        self.streams[key].rules = rules;
        if !whole {
            return self.malformed(key, VIOLATION);
        }
        if let Some(excess) = excess.filter(|_| !self.server) {
            // Whoever reads it finds out that it is too much, or that there is no end.
            match (target, excess) {
                (Target::Answer(_), _) => self.streams[key].deliver(Item::Head(headers, end)),
                (_, Excess::Bytes) => self.tally.large_trailers += 1,
                (_, Excess::Fields) => self.tally.many_trailers += 1,
            }
            let id = self.streams[key].id;
            self.rst(id, Reason::INTERNAL_ERROR);
            return self.fail(key, Broken::Reset(Reason::INTERNAL_ERROR));
        }
        match target {
            Target::Request(_) => {
                self.streams[key].handles += 1;
                self.requests.push_back(Ok(Request { key, headers, end, excess }));
            }
            Target::Answer(_) => {
                self.streams[key].answered = true;
                self.streams[key].deliver(Item::Head(headers, end));
            }
            Target::Trailers(_) | Target::Nobody => {
                self.streams[key].deliver(Item::Trailers(headers));
            }
        }
        if end {
            self.end_received(key);
        }
    }

    fn rst_stream(&mut self, head: Head, reason: Reason, now: Instant) {
        if head.stream == 0 || self.is_idle(head.stream) {
            return self.blame(Fault::Broken(CALLBACK_FAILED));
        }
        if let Some(&key) = self.by_id.get(&head.stream) {
            self.tally.rx_reset += 1;
            if !self.server && self.streams[key].end_received {
                // The answer was whole, so that nobody wanted the rest of the request.
                self.reset(key, Reason::INTERNAL_ERROR);
            } else {
                self.fail(key, Broken::Reset(reason));
            }
        }
        if self.server && !self.resets.take(now) {
            self.tell(Reason::INTERNAL_ERROR, "");
        }
    }

    fn settings(&mut self, head: Head, payload: &[u8]) {
        if head.stream != 0 {
            return self.blame(Fault::Broken(CALLBACK_FAILED));
        }
        if head.flags & ACK != 0 {
            match self.unacknowledged.checked_sub(1) {
                Some(left) => {
                    self.unacknowledged = left;
                    self.decoder.acknowledged();
                }
                None => self.blame(Fault::Broken(CALLBACK_FAILED)),
            }
            return;
        }
        if payload.len() / 6 > MAX_SETTINGS {
            return self.tell(Reason::ENHANCE_YOUR_CALM, "SETTINGS: too many setting entries");
        }
        if !self.peer.settings {
            self.peer.settings = true;
            // It takes as many as it likes, unless it says how many.
            self.peer.max_streams = u32::MAX;
        }
        for entry in payload.chunks_exact(6) {
            let (id, value) = (u16::from_be_bytes([entry[0], entry[1]]), word(entry, 2));
            if !self.setting(id, value) {
                return;
            }
        }
        self.peer.no_priorities.get_or_insert(0);
        frame::head(&mut self.urgent, 0, SETTINGS, ACK, 0);
    }

    /// Takes one of the peer's SETTINGS. False when the connection ends for it.
    fn setting(&mut self, id: u16, value: u32) -> bool {
        let flag = value <= 1;
        let fine = match id {
            settings::TABLE_SIZE => {
                self.encoder.set_max_size(value);
                true
            }
            settings::PUSH => flag && (self.server || value == 0),
            settings::MAX_STREAMS => {
                self.peer.max_streams = value;
                true
            }
            settings::WINDOW if value > MAX_31 => false,
            settings::WINDOW => {
                let more = i64::from(value) - i64::from(self.peer.window);
                self.peer.window = value;
                for key in self.by_id.values() {
                    self.streams[*key].send_window += more;
                }
                let over = |key: &&usize| self.streams[**key].send_window > i64::from(MAX_31);
                let over: Vec<usize> = self.by_id.values().filter(over).copied().collect();
                for key in over {
                    self.spoil(key, Reason::FLOW_CONTROL_ERROR, None);
                }
                true
            }
            settings::MAX_FRAME => (MAX_PAYLOAD as u32..=0xff_ffff).contains(&value),
            settings::CONNECT => {
                let withdrawn = !self.server && self.peer.connect && value == 0;
                self.peer.connect = value == 1;
                flag && !withdrawn
            }
            settings::NO_PRIORITIES => {
                let changed = self.peer.no_priorities.is_some_and(|before| before != value);
                self.peer.no_priorities = Some(value);
                flag && !changed
            }
            _ => true,
        };
        if !fine {
            self.blame(Fault::Broken(CALLBACK_FAILED));
        }
        fine
    }

    fn goaway_received(&mut self, head: Head, payload: &[u8]) {
        let last = word(payload, 0) & MAX_31;
        let own = last == 0 || (last % 2 == 1) != self.server;
        if head.stream != 0 || !own || last > self.peer_last {
            return self.blame(Fault::Broken(CALLBACK_FAILED));
        }
        self.peer_last = last;
        // A peer that leaves gently says it twice; Envoy's codec tells the first.
        self.tally.rx_goaway += u32::from(!self.peer_leaves);
        self.peer_leaves = true;
        if !self.server {
            let beyond: Vec<usize> = self.by_id.iter().filter(|(id, _)| **id > last).map(|(_, key)| *key).collect();
            for key in beyond {
                self.fail(key, Broken::Refused);
            }
        }
    }

    fn window_update_received(&mut self, head: Head, more: u32) {
        if head.stream == 0 {
            self.send_window += i64::from(more);
            if more == 0 {
                self.blame(Fault::Broken(CALLBACK_FAILED));
            } else if self.send_window > i64::from(MAX_31) {
                // DIFFERS: Envoy closes without a word; RFC 9113 (6.9.1) asks for this. The same below.
                self.tell(Reason::FLOW_CONTROL_ERROR, "");
            }
            return;
        }
        if self.is_idle(head.stream) {
            return self.blame(Fault::Broken(CALLBACK_FAILED));
        }
        let Some(&key) = self.by_id.get(&head.stream) else { return };
        if more == 0 {
            return self.blame(Fault::Of(head.stream, UNKNOWN));
        }
        let entry = &mut self.streams[key];
        entry.send_window += i64::from(more);
        if entry.send_window > i64::from(MAX_31) {
            self.spoil(key, Reason::FLOW_CONTROL_ERROR, None);
        }
    }

    pub(crate) fn owed_head(&self, buf: &[u8]) -> Option<u32> {
        if !self.server {
            return None;
        }
        if let Some(Block { stream, target: Target::Request(_), .. }) = &self.block {
            return self.by_id.contains_key(stream).then_some(*stream);
        }
        let head = Head::read(buf.first_chunk()?);
        let new = self.block.is_none() && head.kind == HEADERS && head.stream % 2 == 1 && head.stream > self.highest;
        (new && self.preface == 0).then_some(head.stream)
    }

    pub(crate) fn take_early(&mut self, id: u32) -> usize {
        if let Some(Block { stream, target: Target::Request(key), .. }) = &self.block
            && *stream == id
        {
            return *key;
        }
        self.highest = self.highest.max(id);
        self.taken = id;
        self.insert(id, Rules::default())
    }
}
