//! Streams: what came on each, what is to go, and the handles of those who serve them.

use crate::conn::{Out, State};
use crate::frame::{MAX_PAYLOAD, Reason};
use crate::message::Rules;
use bytes::{Buf, Bytes, BytesMut};
use proxy_core::Headers;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Why a stream broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The connection ended.
    Closed,
    /// It ended because its host broke the protocol.
    Protocol,
    /// The peer reset it.
    Reset(Reason),
    /// It was reset here, for a message that is malformed; what is wrong with it, if that is the message's head or its end.
    Malformed(Option<&'static str>),
    /// The peer leaves and will not look at it.
    Refused,
    /// It was reset by who has it.
    Given,
}

/// A part of a message that came.
#[derive(Debug)]
pub enum Item {
    /// Of an answer: `:status` and its fields, interim or not, and whether nothing follows.
    Head(Headers, bool),
    Data(Bytes),
    Trailers(Headers),
    End,
}

/// A stream's state.
#[derive(Default)]
pub(crate) struct Entry {
    pub(crate) id: u32,
    pub(crate) handles: u32,
    /// The connection does not know it any more.
    pub(crate) retired: bool,
    task: Option<Waker>,
    pub(crate) rules: Rules,
    inbox: VecDeque<Item>,
    /// Of an answer: a head came.
    pub(crate) answered: bool,
    /// The peer said all.
    pub(crate) end_received: bool,
    pub(crate) recv_window: i64,
    /// Bytes in the inbox.
    unread: u32,
    /// Bytes in it, or taken from it, that do not count as read yet.
    pub(crate) held: u32,
    /// Bytes read for which the peer has no room yet.
    pub(crate) consumed: u32,
    pub(crate) send_window: i64,
    queue: VecDeque<Bytes>,
    queued: usize,
    trailers: Option<Headers>,
    /// What is queued is all.
    ends: bool,
    ends_apart: bool,
    pub(crate) end_sent: bool,
    /// It waits for room, and is in the connection's list of those.
    pub(crate) blocked: bool,
    broken: Option<Broken>,
}

/// One piece of two, without copying the first again each time.
fn join(first: Bytes, second: &[u8]) -> Bytes {
    let mut whole = first.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    whole.extend_from_slice(second);
    whole.freeze()
}

impl Entry {
    pub(crate) fn begin(&mut self, id: u32, rules: Rules, send_window: u32, recv_window: u32) {
        // The rest is as `clear` left it.
        self.id = id;
        self.retired = false;
        self.rules = rules;
        self.send_window = send_window.into();
        self.recv_window = recv_window.into();
    }

    /// Makes it as new, with its memory and its place in the list of those that wait. Returns how many bytes nobody read.
    pub(crate) fn clear(&mut self) -> u32 {
        let (mut inbox, mut queue) = (std::mem::take(&mut self.inbox), std::mem::take(&mut self.queue));
        let unread = self.held;
        inbox.clear();
        queue.clear();
        *self = Self { inbox, queue, retired: true, blocked: self.blocked, ..Self::default() };
        unread
    }

    /// Whether both sides said all, or it broke.
    pub(crate) fn is_closed(&self) -> bool {
        self.broken.is_some() || (self.end_received && self.end_sent)
    }

    /// Whether the peer said that nothing follows.
    pub(crate) fn was_ended_by_peer(&self) -> bool {
        self.end_received || matches!(self.broken, Some(Broken::Reset(_)))
    }

    pub(crate) fn fail(&mut self, broken: Broken) {
        self.broken.get_or_insert(broken);
        self.queue.clear();
        self.queued = 0;
        self.wake();
    }

    pub(crate) fn wake(&mut self) {
        if let Some(task) = self.task.take() {
            task.wake();
        }
    }

    fn wait(&mut self, cx: &mut Context<'_>) {
        if !self.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            self.task = Some(cx.waker().clone());
        }
    }

    /// Gives something to who reads it. Nobody wants what comes to a stream without handles.
    pub(crate) fn deliver(&mut self, item: Item) {
        if let Item::Data(data) = &item {
            self.unread += data.len() as u32;
            if self.inbox.len() >= APART
                && let Some(Item::Data(last)) = self.inbox.back_mut()
                && last.len() + data.len() <= MAX_PAYLOAD
            {
                *last = join(std::mem::take(last), data);
                return self.wake();
            }
        }
        self.inbox.push_back(item);
        self.wake();
    }

    /// Whether so little waits to be read that the peer may send more.
    pub(crate) fn is_read_soon(&self) -> bool {
        self.unread <= UNREAD
    }

    /// Whether there is anything to write.
    pub(crate) fn has_more(&self) -> bool {
        self.broken.is_none() && !self.end_sent && (self.queued > 0 || self.ends)
    }

    /// Bytes of data that wait.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Whether a frame with the next `length` bytes is the last one.
    pub(crate) fn ends_with(&self, length: usize) -> bool {
        self.ends && length == self.queued && self.trailers.is_none() && (length == 0 || !self.ends_apart)
    }

    pub(crate) fn take_trailers(&mut self) -> Option<Headers> {
        self.trailers.take()
    }

    /// The next bytes of data, `length` of them, in pieces.
    pub(crate) fn take_data(&mut self, length: usize, mut each: impl FnMut(Bytes)) {
        let mut left = length;
        while left > 0
            && let Some(front) = self.queue.front_mut()
        {
            let piece = if front.len() <= left {
                self.queue.pop_front().unwrap_or_default()
            } else {
                let piece = front.slice(..left);
                front.advance(left);
                piece
            };
            left -= piece.len();
            each(piece);
        }
        self.queued -= length;
        self.send_window -= length as i64;
    }
}

impl<O: Out> State<O> {
    pub(crate) fn release_handle(&mut self, key: usize) {
        let entry = &mut self.streams[key];
        entry.handles -= 1;
        if entry.handles > 0 {
            return;
        }
        entry.task = None;
        if entry.retired {
            self.forget(key);
        } else if !(entry.ends && entry.end_received) {
            // Who has it goes before it is over. What was said to the end may still leave.
            let whole = entry.end_sent && self.server;
            self.reset(key, if whole { Reason::NO_ERROR } else { Reason::INTERNAL_ERROR });
        }
    }
}

/// A handle of a stream. All handles of one belong to one task at a time: the one that polled last is woken.
pub struct Stream<O: Out> {
    state: Rc<RefCell<State<O>>>,
    key: usize,
}

impl<O: Out> Clone for Stream<O> {
    fn clone(&self) -> Self {
        Self::new(self.state.clone(), self.key)
    }
}

impl<O: Out> Drop for Stream<O> {
    fn drop(&mut self) {
        self.state.borrow_mut().release_handle(self.key);
    }
}

impl<O: Out> Stream<O> {
    pub(crate) fn new(state: Rc<RefCell<State<O>>>, key: usize) -> Self {
        state.borrow_mut().streams[key].handles += 1;
        Self { state, key }
    }

    /// Takes over a handle that was counted.
    pub(crate) fn adopt(state: Rc<RefCell<State<O>>>, key: usize) -> Self {
        Self { state, key }
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.with(|entry| entry.id)
    }

    fn with<R>(&self, f: impl FnOnce(&mut Entry) -> R) -> R {
        f(&mut self.state.borrow_mut().streams[self.key])
    }

    /// The next part of what the peer says. What came before it broke comes first.
    pub fn poll_item(&self, cx: &mut Context<'_>) -> Poll<Result<Item, Broken>> {
        let mut state = self.state.borrow_mut();
        let entry = &mut state.streams[self.key];
        match entry.inbox.pop_front() {
            Some(Item::Data(data)) => {
                entry.unread -= data.len() as u32;
                if entry.held > 0 && entry.is_read_soon() {
                    let held = std::mem::take(&mut entry.held);
                    state.consume(self.key, held);
                }
                return Poll::Ready(Ok(Item::Data(data)));
            }
            Some(item) => return Poll::Ready(Ok(item)),
            None => {}
        }
        if entry.end_received {
            return Poll::Ready(Ok(Item::End));
        }
        if let Some(broken) = entry.broken {
            return Poll::Ready(Err(broken));
        }
        entry.wait(cx);
        Poll::Pending
    }

    /// Whether the peer has said all, and all was read.
    pub fn is_read(&self) -> bool {
        self.with(|entry| entry.end_received && entry.inbox.is_empty())
    }

    /// Sends the head of an answer, interim or not.
    pub fn send_head(&self, status: u16, headers: &Headers, end: bool) -> Result<(), Broken> {
        let mut state = self.state.borrow_mut();
        if let Some(broken) = state.streams[self.key].broken {
            return Err(broken);
        }
        state.answer(self.key, status, headers, end);
        Ok(())
    }

    /// Queues data.
    pub fn push(&self, data: Bytes) {
        self.with(|entry| {
            if entry.broken.is_none() && !entry.end_sent && !data.is_empty() {
                entry.queued += data.len();
                entry.queue.push_back(data);
            }
        });
    }

    /// Queues trailers, behind all data. Without a field they are only an end.
    pub fn push_trailers(&self, trailers: Headers) {
        if trailers.iter_regular().next().is_some() {
            self.with(|entry| entry.trailers = Some(trailers));
        }
    }

    /// What is queued is all. `apart`: the end is said in a frame of its own.
    pub fn end(&self, apart: bool) {
        self.with(|entry| {
            entry.ends = true;
            entry.ends_apart = apart;
        });
    }

    /// Bytes of data that wait.
    pub fn queued(&self) -> usize {
        self.with(|entry| entry.queued)
    }

    /// Whether the peer's windows have no room for all that waits.
    pub fn is_held(&self) -> bool {
        let state = self.state.borrow();
        let entry = &state.streams[self.key];
        entry.has_more() && entry.queued as i64 > state.send_window.min(entry.send_window)
    }

    /// Writes what is queued, as far as there is room. Ready when all of it has left.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut state = self.state.borrow_mut();
        let entry = &mut state.streams[self.key];
        if let Some(broken) = entry.broken {
            return if entry.end_sent { Poll::Ready(Ok(())) } else { Poll::Ready(Err(broken)) };
        }
        if entry.has_more() {
            state.advance(self.key);
        }
        let entry = &mut state.streams[self.key];
        if entry.has_more() {
            entry.wait(cx);
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when it broke, unless by our own reset.
    pub fn poll_broken(&self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.with(|entry| match entry.broken {
            Some(Broken::Given) | None => {
                entry.wait(cx);
                Poll::Pending
            }
            Some(broken) => Poll::Ready(broken),
        })
    }

    /// Resets it, unless it is over. What is queued is forgotten.
    pub fn reset(&self, reason: Reason) {
        let mut state = self.state.borrow_mut();
        let entry = &state.streams[self.key];
        if !entry.is_closed() {
            state.reset(self.key, reason);
        }
    }
}

/// Bytes that may wait to be read before the peer gets no more room.
const UNREAD: u32 = 64 * 1024;

/// Parts that wait to be read each by itself. Behind them data is joined, so that small frames, which windows do not bound,
/// take no more memory than their bytes.
const APART: usize = 64;

/// The most that a stream writes before others have their turn.
pub(crate) const TURN: usize = MAX_PAYLOAD;
