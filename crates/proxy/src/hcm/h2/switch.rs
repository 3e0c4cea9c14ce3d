//! What the guard of a connection and those who serve its streams tell each other.

use super::INVALID_FIELD;
use super::flood::Flooded;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use tokio::time::Instant;

/// Heads that are not given out, of which account is kept.
const MAX_UNREAD: usize = 4096;

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

impl Switch {
    /// A stream's head has come.
    pub(super) fn came(&self, stream: u32) {
        let mut unread = self.0.unread.borrow_mut();
        // After a GOAWAY the crate passes over streams without a word.
        if unread.len() == MAX_UNREAD {
            unread.pop_front();
        }
        unread.push_back(stream);
    }

    /// The crate has given it out, or reset it.
    pub(super) fn read(&self, stream: u32) {
        let mut unread = self.0.unread.borrow_mut();
        match unread.front() {
            Some(first) if *first == stream => _ = unread.pop_front(),
            _ => unread.retain(|unread| *unread != stream),
        }
    }

    /// Whether the crate has said nothing of a stream whose head has come.
    pub(super) fn is_unread(&self, stream: u32) -> bool {
        self.0.unread.borrow().contains(&stream)
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.0.unread.borrow().is_empty()
    }

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

    /// A stream was reset for a malformed message, whatever is known of it.
    pub(super) fn reset(&self, stream: u32) {
        let known = self.0.reasons.borrow_mut().pop_front();
        if known.is_some() || self.is_unread(stream) {
            self.0.resets.borrow_mut().push(known.unwrap_or(INVALID_FIELD));
        }
    }

    /// What was wrong with messages whose streams were reset since the last call.
    pub(super) fn take_resets(&self) -> Vec<&'static str> {
        self.0.resets.take()
    }

    /// The crate understood the head of a stream.
    pub(super) fn given_out(&self, stream: u32) {
        self.read(stream);
        self.0.given.set(self.0.given.get() + 1);
    }

    /// How many streams that was said of.
    pub(super) fn given(&self) -> u64 {
        self.0.given.get()
    }

    /// The peer owes the rest of this stream's head, or of none.
    pub(super) fn owes(&self, stream: Option<u32>) {
        if stream != self.0.head.get().map(|(stream, _)| stream) {
            self.0.head.set(stream.map(|stream| (stream, Instant::now())));
        }
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

    /// The crate has said what it says at the end of a stream that was answered so.
    pub(super) fn forget_answered(&self, stream: u32) {
        self.0.answered.borrow_mut().retain(|answered| *answered != stream);
    }

    pub(super) fn has_late(&self) -> bool {
        !self.0.late.borrow().is_empty()
    }

    /// What [`Self::answer`] was given.
    pub(super) fn take_late(&self) -> Vec<u8> {
        self.0.late.take()
    }

    /// Gives back what could not be written.
    pub(super) fn put_late(&self, frames: Vec<u8>) {
        self.0.late.replace(frames);
    }

    pub(super) fn closed_by_peer(&self) {
        self.0.by_peer.set(true);
    }

    /// Whether the peer closed before the proxy did.
    pub(super) fn is_by_peer(&self) -> bool {
        self.0.by_peer.get()
    }
}
