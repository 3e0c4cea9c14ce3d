//! Requests that wait for a connection of a pool, the oldest first.

use super::connect::ConnectError;
use super::pool::Acquired;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

/// What waiting ends with.
pub(super) type Outcome = Result<Acquired, ConnectError>;

#[derive(Default)]
pub(super) struct Waiting {
    /// Some belong to requests that have given up: they are passed over, and swept out when they are many.
    senders: RefCell<VecDeque<oneshot::Sender<Outcome>>>,
    /// Requests that wait.
    count: Cell<usize>,
}

/// A place in the queue, left when dropped.
pub(super) struct Place<'a> {
    queue: &'a Waiting,
    receiver: oneshot::Receiver<Outcome>,
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.count.get()
    }

    /// Queues up at the end.
    pub(super) fn enter(&self) -> Place<'_> {
        let (sender, receiver) = oneshot::channel();
        let mut senders = self.senders.borrow_mut();
        if senders.len() > 2 * self.count.get() + 16 {
            senders.retain(|sender| !sender.is_closed());
        }
        senders.push_back(sender);
        self.count.set(self.count.get() + 1);
        Place { queue: self, receiver }
    }

    /// Ends the oldest one's wait; the outcome comes back when nobody waits.
    pub(super) fn give(&self, mut outcome: Outcome) -> Option<Outcome> {
        loop {
            let oldest = self.senders.borrow_mut().pop_front();
            let Some(sender) = oldest else { return Some(outcome) };
            match sender.send(outcome) {
                Ok(()) => {
                    self.count.set(self.count.get() - 1);
                    return None;
                }
                Err(back) => outcome = back,
            }
        }
    }
}

impl Place<'_> {
    /// Waits for a connection, or to hear that there is none.
    pub(super) async fn wait(mut self) -> Outcome {
        let gone = || ConnectError { timeout: false, reason: String::new() };
        (&mut self.receiver).await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        match self.receiver.try_recv() {
            // It came too late: the next one may have it.
            Ok(Ok(acquired)) => acquired.put_back(),
            Err(TryRecvError::Empty) => self.queue.count.set(self.queue.count.get() - 1),
            Ok(Err(_)) | Err(TryRecvError::Closed) => {}
        }
    }
}
