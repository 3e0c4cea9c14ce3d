//! A connection: what it is made with, what it tells, and its state.

use crate::flood::{Flood, Flooded, Limits};
use crate::frame::{self, GOAWAY, HEAD, Head, MAX_31, MAX_PAYLOAD, PING, PREFACE, Reason, SETTINGS, settings};
use crate::hpack::{Decoder, Encoder};
use crate::message::Rules;
use crate::receive::Block;
use crate::stream::{Broken, Entry, Stream};
use bytes::{Bytes, BytesMut};
use foldhash::HashMap;
use proxy_core::Headers;
use proxy_core::cluster::Http2Options;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

/// Windows before anybody said anything (RFC 9113, section 6.9.2).
pub(crate) const FIRST_WINDOW: u32 = 65_535;
/// Entries of streams that a connection without any keeps for the next.
const SPARE: usize = 8;

/// Streams that ended of which a server remembers how.
const REMEMBERED: usize = 32;

/// Where frames go.
pub trait Out {
    /// Runs `write` on the open end.
    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>));
    /// Appends data, which need not be copied.
    fn push(&mut self, data: Bytes);
    /// Bytes that wait.
    fn len(&self) -> usize;
    /// Whether none do.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Forgets what waits.
    fn clear(&mut self);
}

/// One side's part of a connection (`envoy.config.core.v3.Http2ProtocolOptions`).
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of the peer's HPACK table.
    pub table_size: u32,
    /// Extended CONNECT (RFC 8441) is allowed.
    pub connect: bool,
    /// Streams that the peer may open; of a client: that it opens until the peer says otherwise.
    pub max_streams: u32,
    /// Bytes, of each stream.
    pub stream_window: u32,
    /// Bytes, of all together.
    pub connection_window: u32,
    /// Bytes of names and values, and fields, of a head; what is beyond is not kept.
    pub max_head: (usize, usize),
    /// Malformed messages end their stream only.
    pub stream_errors: bool,
    /// What a peer may send that costs us more than it.
    pub limits: Option<Limits>,
}

impl Options {
    /// What the configuration says. `max_head`: see [`Options::max_head`].
    pub fn of(options: &Http2Options, max_head: (usize, usize)) -> Self {
        Self {
            table_size: options.hpack_table_size,
            connect: options.allow_connect,
            max_streams: options.max_concurrent_streams,
            stream_window: options.initial_stream_window,
            connection_window: options.initial_connection_window,
            max_head,
            stream_errors: options.stream_error_on_invalid_message,
            limits: Some(Limits::of(options)),
        }
    }
}

/// A request that came.
pub struct Incoming<O: Out> {
    pub stream: Stream<O>,
    pub headers: Headers,
    /// Nothing follows.
    pub end: bool,
    /// It has more than it may have. What is beyond is missing.
    pub excess: Option<Excess>,
}

/// What a head has too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    Bytes,
    Fields,
}

/// A message whose stream was reset here, for what was wrong with it, before anybody was told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// Why the connection is to end.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// A malformed message, and what is wrong with it; nothing is said.
    Message(&'static str),
    /// What came on a stream that was given out, and what is wrong with it; nothing is said.
    Of(u32, &'static str),
    /// Nothing is said.
    Flood(Flooded),
    /// Nothing is said; what Envoy's codec calls it.
    Broken(&'static str),
    /// A GOAWAY says why.
    Told(Reason),
}

impl Fault {
    /// Whether what waits to be written is not written any more.
    pub fn is_silent(self) -> bool {
        !matches!(self, Fault::Told(_) | Fault::Flood(Flooded::Control { own: true }))
    }
}

/// What happened since it was last asked, for counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub rx_reset: u32,
    pub tx_reset: u32,
    pub rx_trailers: u32,
    pub rx_goaway: u32,
    pub tx_goaway: u32,
    /// Streams refused because there are too many.
    pub refused: u32,
    /// Malformed messages, of clients' connections.
    pub malformed: u32,
    /// Trailers of clients' connections with too many bytes, and with too many fields. Of heads whoever reads them tells.
    pub large_trailers: u32,
    pub many_trailers: u32,
}

/// What the peer's SETTINGS say.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) settings: bool,
    pub(crate) window: u32,
    pub(crate) max_streams: u32,
    pub(crate) connect: bool,
    pub(crate) no_priorities: Option<u32>,
}

/// A request whose stream has a handle that is not given out yet.
pub(crate) struct Request {
    pub(crate) key: usize,
    pub(crate) headers: Headers,
    pub(crate) end: bool,
    pub(crate) excess: Option<Excess>,
}

pub(crate) struct State<O> {
    pub(crate) server: bool,
    pub(crate) options: Options,
    pub(crate) out: O,
    /// Bytes of the client's preface that have not come.
    pub(crate) preface: usize,
    /// The peer's first SETTINGS have begun.
    pub(crate) begun: bool,
    pub(crate) decoder: Decoder,
    pub(crate) encoder: Encoder,
    /// A head that is not complete.
    pub(crate) block: Option<Block>,
    pub(crate) streams: Vec<Entry>,
    pub(crate) free: Vec<usize>,
    /// The last streams of a client that ended, and whether it was the client that ended them.
    pub(crate) ended: VecDeque<(u32, bool)>,
    /// There were others before.
    pub(crate) forgot: bool,
    pub(crate) by_id: HashMap<u32, usize>,
    /// The last stream that the peer opened, and the last of them that was taken.
    pub(crate) highest: u32,
    pub(crate) taken: u32,
    /// The number of the next stream of a client.
    pub(crate) next: u32,
    pub(crate) peer: Peer,
    /// Our SETTINGS that were not acknowledged.
    pub(crate) unacknowledged: u32,
    pub(crate) send_window: i64,
    pub(crate) recv_window: i64,
    /// Bytes read for which the peer has no room yet.
    pub(crate) consumed: u32,
    /// Streams whose data waits for room.
    pub(crate) blocked: VecDeque<usize>,
    /// Answers to SETTINGS and PINGs, which leave before all else, unless the connection ends for what came with them.
    pub(crate) urgent: Vec<u8>,
    /// Room that a client is yet to be told of, once its first frames were taken.
    pub(crate) window_owed: Option<u32>,
    /// The connection ended for a request's head that cannot be read.
    pub(crate) headless: bool,
    pub(crate) closed: bool,
    /// A host that leaves said the last that it had to say.
    pub(crate) over_by_answer: bool,
    pub(crate) requests: VecDeque<Result<Request, Malformed>>,
    pub(crate) fault: Option<Fault>,
    /// A GOAWAY with the last stream was sent: streams beyond are passed over.
    pub(crate) leaving: bool,
    /// The last stream that the peer will answer.
    pub(crate) peer_last: u32,
    pub(crate) peer_leaves: bool,
    pub(crate) pongs: u32,
    pub(crate) flood: Option<Flood>,
    pub(crate) resets: Rate,
    pub(crate) glitches: Rate,
    pub(crate) tally: Tally,
    pub(crate) driver: Option<Waker>,
    /// The driver was woken, or is at work.
    pub(crate) awake: bool,
    /// Whoever opens streams has gone: it ends with its last stream.
    pub(crate) unwanted: bool,
}

/// So much at once, and so much a second after (nghttp2's `nghttp2_ratelim`).
#[derive(Debug)]
pub(crate) struct Rate {
    left: u64,
    most: u64,
    a_second: u64,
    since: Option<Instant>,
}

impl Rate {
    fn new(most: u64, a_second: u64) -> Self {
        Self { left: most, most, a_second, since: None }
    }

    /// Takes one, unless there are too many.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let seconds = now.duration_since(since).as_secs();
        if seconds > 0 {
            self.left = self.most.min(self.left.saturating_add(seconds.saturating_mul(self.a_second)));
            self.since = Some(now);
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }
}

/// A connection, as its driver has it. Streams share its state.
pub struct Connection<O>(pub(crate) Rc<RefCell<State<O>>>);

impl<O> Clone for Connection<O> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<O: Out> Connection<O> {
    /// A client's side. The preface and our SETTINGS are in `out` at once.
    pub fn client(options: Options, out: O) -> Self {
        let mut state = State::new(false, options, out);
        state.out.write(|out| out.extend_from_slice(PREFACE));
        state.greet();
        Self(Rc::new(RefCell::new(state)))
    }

    /// A server's side. Our SETTINGS wait for the client's first bytes, as Envoy's do.
    pub fn server(options: Options, out: O) -> Self {
        Self(Rc::new(RefCell::new(State::new(true, options, out))))
    }

    /// Takes the frames that have come; what is left in `buf` is part of one.
    pub fn receive(&self, buf: &mut BytesMut, now: Instant) {
        self.0.borrow_mut().receive(buf, now);
    }

    /// How many bytes the frame lacks of which the first are in `buf`.
    pub fn missing(&self, buf: &[u8]) -> usize {
        buf.first_chunk()
            .map(Head::read)
            .map_or(0, |head| (HEAD + head.length.min(MAX_PAYLOAD)).saturating_sub(buf.len()))
    }

    /// The stream whose head has begun and is not complete, as a whole or as far as it lies in `buf`.
    pub fn owed_head(&self, buf: &[u8]) -> Option<u32> {
        self.0.borrow().owed_head(buf)
    }

    /// Whether the connection ended for, or in the middle of, a request's head.
    pub fn is_headless(&self) -> bool {
        let state = self.0.borrow();
        state.headless || state.owed_head(&[]).is_some()
    }

    /// Takes a stream whose head is not complete; the rest of it will be passed over.
    pub fn take_early(&self, id: u32) -> Stream<O> {
        let key = self.0.borrow_mut().take_early(id);
        Stream::new(self.0.clone(), key)
    }

    /// The next request, or what became of it.
    pub fn accept(&self) -> Option<Result<Incoming<O>, Malformed>> {
        let request = self.0.borrow_mut().requests.pop_front()?;
        Some(request.map(|Request { key, headers, end, excess }| {
            let stream = Stream::adopt(self.0.clone(), key);
            Incoming { stream, headers, end, excess }
        }))
    }

    /// Sends a request. `keep` says which of its regular fields go along. `None` when the connection takes none.
    pub fn open(&self, head: &Headers, end: bool, keep: impl Fn(&[u8], &[u8]) -> bool) -> Option<Stream<O>> {
        let key = self.0.borrow_mut().open(head, end, keep)?;
        Some(Stream::new(self.0.clone(), key))
    }

    /// Whether another request can be sent.
    pub fn is_open(&self) -> bool {
        let state = self.0.borrow();
        state.fault.is_none() && !state.closed && !state.peer_leaves && !state.unwanted && state.next <= MAX_31
    }

    /// Streams that may be open at once, by the peer's word.
    pub fn max_streams(&self) -> u32 {
        self.0.borrow().peer.max_streams
    }

    /// Streams that are open.
    pub fn active(&self) -> usize {
        self.0.borrow().by_id.len()
    }

    /// Why the connection is to end.
    pub fn fault(&self) -> Option<Fault> {
        self.0.borrow().fault
    }

    /// Nobody will open streams any more.
    pub fn release(&self) {
        let mut state = self.0.borrow_mut();
        state.unwanted = true;
        state.wake_driver();
    }

    /// Whether all is said: either side leaves, or nobody wants it any more, and no stream is left.
    pub fn is_over(&self) -> bool {
        let state = self.0.borrow();
        (state.leaving || state.unwanted || (state.peer_leaves && !state.server)) && state.by_id.is_empty()
    }

    /// Whether a host that leaves has given its last answer, and the connection is over by that.
    pub fn is_over_by_answer(&self) -> bool {
        self.0.borrow().over_by_answer
    }

    /// Says that the connection will end, without refusing anything yet (a GOAWAY with the last number there is).
    pub fn announce_end(&self) {
        self.0.borrow_mut().goaway(MAX_31, Reason::NO_ERROR, "");
    }

    /// Takes no more streams (a GOAWAY with the last one taken).
    pub fn leave(&self) {
        let mut state = self.0.borrow_mut();
        if !state.leaving {
            state.leaving = true;
            state.tally.tx_goaway += 1;
            let last = state.taken;
            state.goaway(last, Reason::NO_ERROR, "");
        }
    }

    /// Whether that was said.
    pub fn is_leaving(&self) -> bool {
        self.0.borrow().leaving
    }

    /// Sends a PING.
    pub fn ping(&self, opaque: u64) {
        let mut state = self.0.borrow_mut();
        state.out.write(|out| {
            frame::head(out, 8, PING, 0, 0);
            out.extend_from_slice(&opaque.to_be_bytes());
        });
        state.wake_driver();
    }

    /// Answers to PINGs since the last call.
    pub fn take_pongs(&self) -> u32 {
        std::mem::take(&mut self.0.borrow_mut().pongs)
    }

    /// What happened since the last call.
    pub fn take_tally(&self) -> Tally {
        std::mem::take(&mut self.0.borrow_mut().tally)
    }

    /// The peer waits for us, and has taken all answers to what it asked for.
    pub fn rests(&self) {
        if let Some(flood) = &mut self.0.borrow_mut().flood {
            flood.rests();
        }
    }

    /// The driver is at work, and is to be woken by this when there is more.
    pub fn drive(&self, waker: &Waker) {
        let mut state = self.0.borrow_mut();
        if !state.driver.as_ref().is_some_and(|known| known.will_wake(waker)) {
            state.driver = Some(waker.clone());
        }
        state.awake = true;
    }

    /// The driver waits.
    pub fn pause(&self) {
        let mut state = self.0.borrow_mut();
        state.awake = false;
        // What many streams used is not kept for few.
        if state.streams.len() > SPARE && state.free.len() == state.streams.len() {
            state.streams = Vec::new();
            state.free = Vec::new();
            state.blocked = VecDeque::new();
        }
    }

    /// Streams in the list of those that wait for room.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.0.borrow().blocked.len()
    }

    /// Moves data of streams that waited for room. Returns whether there was any.
    pub fn pump(&self) -> bool {
        self.0.borrow_mut().pump()
    }

    /// Runs `f` on what waits to be written.
    pub fn with_out<R>(&self, f: impl FnOnce(&mut O) -> R) -> R {
        f(&mut self.0.borrow_mut().out)
    }

    /// The connection is gone: all streams find out.
    pub fn close(&self) {
        self.0.borrow_mut().close();
    }
}

impl<O: Out> State<O> {
    fn new(server: bool, options: Options, out: O) -> Self {
        let peer = Peer {
            settings: false,
            window: FIRST_WINDOW,
            max_streams: options.max_streams,
            connect: false,
            no_priorities: None,
        };
        Self {
            server,
            out,
            preface: if server { PREFACE.len() } else { 0 },
            begun: false,
            decoder: Decoder::new(options.table_size),
            encoder: Encoder::new(),
            block: None,
            streams: Vec::new(),
            free: Vec::new(),
            ended: VecDeque::new(),
            forgot: false,
            by_id: HashMap::default(),
            highest: 0,
            taken: 0,
            next: 1,
            peer,
            unacknowledged: 0,
            send_window: FIRST_WINDOW.into(),
            recv_window: i64::from(options.connection_window.max(FIRST_WINDOW)),
            consumed: 0,
            blocked: VecDeque::new(),
            urgent: Vec::new(),
            window_owed: None,
            headless: false,
            closed: false,
            over_by_answer: false,
            requests: VecDeque::new(),
            fault: None,
            leaving: false,
            peer_last: MAX_31,
            peer_leaves: false,
            pongs: 0,
            flood: options.limits.map(Flood::new),
            resets: Rate::new(1000, 33),
            glitches: Rate::new(10_000, 33),
            tally: Tally::default(),
            driver: None,
            awake: false,
            unwanted: false,
            options,
        }
    }

    /// Says our SETTINGS, in Envoy's order (`ConnectionImpl::sendSettingsHelper`), and the connection's window.
    pub(crate) fn greet(&mut self) {
        let options = self.options;
        let push = (!self.server).then_some((settings::PUSH, 0));
        let rest = [
            (settings::TABLE_SIZE, options.table_size),
            (settings::CONNECT, u32::from(options.connect)),
            (settings::MAX_STREAMS, options.max_streams),
            (settings::WINDOW, options.stream_window),
        ];
        let more = options.connection_window.saturating_sub(FIRST_WINDOW);
        self.unacknowledged += 1;
        self.out.write(|out| {
            let all = push.into_iter().chain(rest);
            frame::head(out, all.clone().count() * 6, SETTINGS, 0, 0);
            for (id, value) in all {
                out.extend_from_slice(&id.to_be_bytes());
                out.extend_from_slice(&value.to_be_bytes());
            }
        });
        match (more > 0).then_some(more) {
            Some(more) if !self.server => self.window_update(0, more),
            more => self.window_owed = more,
        }
    }

    pub(crate) fn goaway(&mut self, last: u32, reason: Reason, text: &str) {
        self.out.write(|out| {
            frame::head(out, 8 + text.len(), GOAWAY, 0, 0);
            out.extend_from_slice(&last.to_be_bytes());
            out.extend_from_slice(&reason.0.to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        });
        self.wake_driver();
    }

    /// Ends the connection with a GOAWAY. `text`: what nghttp2 says with it.
    pub(crate) fn tell(&mut self, reason: Reason, text: &str) {
        if self.fault.is_none() {
            let last = self.taken;
            self.goaway(last, reason, text);
            self.fault = Some(Fault::Told(reason));
        }
    }

    /// Ends it without a word. As in Envoy, what is to be said of the bytes that came with the fault is not said either.
    pub(crate) fn blame(&mut self, fault: Fault) {
        if self.fault.is_none() {
            self.fault = Some(fault);
        }
    }

    pub(crate) fn wake_driver(&mut self) {
        if !self.awake
            && let Some(driver) = &self.driver
        {
            self.awake = true;
            driver.wake_by_ref();
        }
    }

    /// A new stream.
    pub(crate) fn insert(&mut self, id: u32, rules: Rules) -> usize {
        let key = self.free.pop().unwrap_or_else(|| {
            self.streams.push(Entry::default());
            self.streams.len() - 1
        });
        self.streams[key].begin(id, rules, self.peer.window, self.options.stream_window);
        self.by_id.insert(id, key);
        key
    }

    /// Ends a stream that is complete or broken, as far as the connection is concerned.
    pub(crate) fn retire(&mut self, key: usize) {
        let entry = &mut self.streams[key];
        if !entry.is_closed() || entry.retired {
            return;
        }
        entry.retired = true;
        self.by_id.remove(&entry.id);
        if self.server {
            if self.ended.len() == REMEMBERED {
                self.ended.pop_front();
                self.forgot = true;
            }
            self.ended.push_back((entry.id, entry.was_ended_by_peer()));
        }
        let entry = &self.streams[key];
        if entry.handles == 0 {
            self.forget(key);
        }
        // A client that waits for the last one to end, or a drain.
        if self.by_id.is_empty() {
            self.wake_driver();
        }
    }

    /// Frees the entry of a stream that nobody holds any more.
    pub(crate) fn forget(&mut self, key: usize) {
        let unread = self.streams[key].clear();
        self.consume_connection(unread);
        self.free.push(key);
    }

    /// Breaks a stream, and wakes who has it.
    pub(crate) fn fail(&mut self, key: usize, broken: Broken) {
        let entry = &mut self.streams[key];
        entry.fail(broken);
        self.retire(key);
    }

    fn close(&mut self) {
        self.closed = true;
        // A client's requests suffer from what their host did; a server's end with their connection.
        let broken = if self.fault.is_some() && !self.server { Broken::Protocol } else { Broken::Closed };
        for request in std::mem::take(&mut self.requests).into_iter().flatten() {
            self.release_handle(request.key);
        }
        let all: Vec<usize> = self.by_id.values().copied().collect();
        for key in all {
            self.fail(key, broken);
        }
        self.driver = None;
    }

    /// The payload that one frame of data may have now.
    pub(crate) fn room(&self, stream_window: i64) -> usize {
        let window = self.send_window.min(stream_window).max(0);
        usize::try_from(window).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD)
    }
}
