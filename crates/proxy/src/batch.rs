//! Writes of an HTTP/2 connection, gathered over one turn of its task.
//!
//! The `h2` crate writes and flushes at each DATA frame; with many streams under way that is one system call a frame,
//! which is most of what a small answer costs. Here a flush waits until the connection's task has nothing more to say.

use crate::io::Io;
use crate::keepalive::Pulse;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are gathered before the socket is asked to take some.
const MOST: usize = 64 * 1024;
/// Buffers that a worker keeps for the next turn: one is in use at a time, unless sockets are full.
const SPARE: usize = 4;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

struct State {
    io: Io,
    out: Vec<u8>,
    /// Bytes of `out` that are written.
    written: usize,
    /// Flushes wait.
    gathers: bool,
    /// TLS may hold bytes back that were written.
    unflushed: bool,
    failed: Option<io::ErrorKind>,
    /// Told of what comes in.
    pulse: Option<Rc<Pulse>>,
}

/// The stream that the crate writes to.
pub(crate) struct Batch(Rc<RefCell<State>>);

/// Sends what was gathered.
pub(crate) struct Outlet(Rc<RefCell<State>>);

impl Batch {
    /// `gathers`: from the beginning; otherwise from [`Outlet::gather`] on.
    pub(crate) fn new(io: Io, gathers: bool) -> (Self, Outlet) {
        let state = State { io, out: Vec::new(), written: 0, gathers, unflushed: false, failed: None, pulse: None };
        let state = Rc::new(RefCell::new(state));
        (Self(state.clone()), Outlet(state))
    }

    /// Writes what the socket takes now, and reads what nobody will: see [`Io::discard_unread`].
    pub(crate) fn finish(&self) {
        let mut state = self.0.borrow_mut();
        // Nobody waits for the rest: the connection is gone.
        let _ = state.poll_out(&mut Context::from_waker(Waker::noop()));
        state.io.discard_unread();
    }
}

impl Outlet {
    /// From now on flushes wait for [`Outlet::poll_out`], which has to be called after each poll of the connection.
    pub(crate) fn gather(&self) {
        self.0.borrow_mut().gathers = true;
    }

    /// Who is told of what comes in.
    pub(crate) fn tell(&self, pulse: Rc<Pulse>) {
        self.0.borrow_mut().pulse = Some(pulse);
    }

    /// Sends what was gathered. When the socket is full the task is woken once it is not; errors are found by the
    /// connection's next read or write.
    pub(crate) fn poll_out(&self, cx: &mut Context<'_>) {
        let mut state = self.0.borrow_mut();
        if let Poll::Ready(Err(e)) = state.poll_out(cx) {
            state.failed = Some(e.kind());
            cx.waker().wake_by_ref();
        }
    }

    /// After the connection's end: writes the rest and drops what still comes, until the peer closes.
    pub(crate) fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.borrow_mut();
        // A peer that takes nothing more is found by the read.
        let _ = state.poll_out(cx);
        let mut dropped = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut dropped);
            match ready!(Pin::new(&mut state.io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Says the end of what is written, over TLS with an alert.
    pub(crate) fn poll_end(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_end(cx)
    }
}

impl State {
    fn waiting(&self) -> usize {
        self.out.len() - self.written
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.waiting() > 0 {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        if self.out.capacity() > 0 {
            let mut buffer = std::mem::take(&mut self.out);
            self.written = 0;
            buffer.clear();
            BUFFERS.with_borrow_mut(|spare| {
                if spare.len() < SPARE {
                    spare.push(buffer);
                }
            });
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// Makes room for a write.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(kind) = self.failed {
            return Poll::Ready(Err(kind.into()));
        }
        if self.waiting() >= MOST {
            ready!(self.poll_out(cx))?;
        }
        if self.out.capacity() == 0 {
            self.out = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
        }
        self.unflushed = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let _ = self.poll_out(&mut Context::from_waker(Waker::noop()));
    }
}

impl AsyncRead for Batch {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.borrow_mut();
        if let Some(kind) = state.failed {
            return Poll::Ready(Err(kind.into()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut state.io).poll_read(cx, buf);
        if let Some(pulse) = &state.pulse
            && buf.filled().len() > before
        {
            pulse.beat();
        }
        polled
    }
}

impl AsyncWrite for Batch {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.0.borrow_mut();
        ready!(state.poll_room(cx))?;
        state.out.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.borrow_mut();
        ready!(state.poll_room(cx))?;
        bufs.iter().for_each(|buf| state.out.extend_from_slice(buf));
        Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.borrow_mut();
        if state.gathers { Poll::Ready(Ok(())) } else { state.poll_out(cx) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_end(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Raw;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn a_turn_is_one_write() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let (mut batch, outlet) = Batch::new(Io::Raw(Raw::Unix(ours)), true);
        for part in [&b"one "[..], b"two ", b"three"] {
            batch.write_all(part).await.unwrap();
            batch.flush().await.unwrap();
        }
        let mut buf = [0; 64];
        assert!(peer.try_read(&mut buf).is_err(), "nothing is sent before the turn ends");
        outlet.poll_out(&mut Context::from_waker(Waker::noop()));
        let n = peer.read(&mut buf).await.unwrap();
        assert_eq!(&buf[..n], b"one two three");
    }

    #[tokio::test]
    async fn a_full_socket_holds_the_writer_back_and_loses_nothing() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let (mut batch, outlet) = Batch::new(Io::Raw(Raw::Unix(ours)), true);
        let total = 4 << 20;
        let writer = async {
            batch.write_all(&vec![7; total]).await.unwrap();
            batch.shutdown().await.unwrap();
            drop((batch, outlet));
        };
        let reader = async {
            let mut got = Vec::new();
            peer.read_to_end(&mut got).await.unwrap();
            got
        };
        let ((), got) = tokio::join!(writer, reader);
        assert_eq!((got.len(), got.iter().all(|b| *b == 7)), (total, true));
    }

    #[tokio::test]
    async fn what_is_left_is_sent_at_the_end() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let (mut batch, outlet) = Batch::new(Io::Raw(Raw::Unix(ours)), true);
        batch.write_all(b"goaway").await.unwrap();
        drop((batch, outlet));
        let mut got = Vec::new();
        peer.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"goaway");
    }
}
