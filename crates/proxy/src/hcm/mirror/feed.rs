//! The body of a request on its way into a copy.

use crate::stream::{BodyError, Frame, HIGH_WATER};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

#[derive(Default)]
struct Shared {
    frames: VecDeque<Frame>,
    /// Body bytes in `frames`.
    size: usize,
    /// No more comes.
    ended: bool,
    /// The request was given up before its end.
    cancelled: bool,
    /// The copy takes no more.
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// The router's end. Dropped before the end of the request, it takes the copy with it.
pub(in crate::hcm) struct Feed(Rc<RefCell<Shared>>);

/// The copy's end.
pub(super) struct Tap(Rc<RefCell<Shared>>);

/// Both ends; `ended`: there is no body.
pub(super) fn new(ended: bool) -> (Feed, Tap) {
    let shared = Rc::new(RefCell::new(Shared { ended, ..Shared::default() }));
    (Feed(shared.clone()), Tap(shared))
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl Feed {
    /// Ready when the copy is not too far behind: the client is read no faster than its slowest copy.
    pub(in crate::hcm) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut shared = self.0.borrow_mut();
        if shared.closed || shared.size < HIGH_WATER {
            return Poll::Ready(());
        }
        shared.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(in crate::hcm) fn push(&self, frame: Frame) {
        let mut shared = self.0.borrow_mut();
        if shared.closed {
            return;
        }
        if let Frame::Data(data) = &frame {
            shared.size += data.len();
        }
        shared.frames.push_back(frame);
        wake(&mut shared.reader);
    }

    pub(in crate::hcm) fn end(&self) {
        let mut shared = self.0.borrow_mut();
        shared.ended = true;
        wake(&mut shared.reader);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut shared = self.0.borrow_mut();
        shared.cancelled = !shared.ended;
        wake(&mut shared.reader);
    }
}

impl Tap {
    /// The next frame; an error when the request was given up.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.is_cancelled(cx) {
            return Poll::Ready(Some(Err(BodyError::Closed)));
        }
        let mut shared = self.0.borrow_mut();
        match shared.frames.pop_front() {
            Some(frame) => {
                if let Frame::Data(data) = &frame {
                    shared.size -= data.len();
                }
                wake(&mut shared.writer);
                Poll::Ready(Some(Ok(frame)))
            }
            None if shared.ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// Whether the request was given up; if not, the task is woken by whatever comes next.
    pub(super) fn is_cancelled(&self, cx: &mut Context<'_>) -> bool {
        let mut shared = self.0.borrow_mut();
        shared.reader = Some(cx.waker().clone());
        shared.cancelled
    }

    /// Whether all of the request came.
    pub(super) fn is_ended(&self) -> bool {
        self.0.borrow().ended
    }

    /// Takes no more.
    pub(super) fn close(&mut self) {
        let mut shared = self.0.borrow_mut();
        shared.closed = true;
        shared.frames.clear();
        shared.size = 0;
        wake(&mut shared.writer);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_feed_holds_the_client_back_and_tells_of_its_end() {
        let mut cx = Context::from_waker(Waker::noop());
        let (feed, mut tap) = new(false);
        assert!(tap.poll(&mut cx).is_pending());
        feed.push(Frame::Data(Bytes::from(vec![0; HIGH_WATER])));
        assert!(feed.poll_room(&mut cx).is_pending());
        assert!(matches!(tap.poll(&mut cx), Poll::Ready(Some(Ok(Frame::Data(_))))));
        assert!(feed.poll_room(&mut cx).is_ready());
        feed.end();
        drop(feed);
        assert!(matches!(tap.poll(&mut cx), Poll::Ready(None)), "an ended request is not given up");

        let (feed, mut tap) = new(false);
        drop(feed);
        assert!(matches!(tap.poll(&mut cx), Poll::Ready(Some(Err(_)))), "given up before its end");

        let (feed, tap) = new(false);
        feed.push(Frame::Data(Bytes::from(vec![0; HIGH_WATER])));
        drop(tap);
        assert!(feed.poll_room(&mut cx).is_ready(), "a copy that is gone holds nobody back");
    }
}
