//! An HTTP/2 connection on its socket: reads are handed to the codec, and what it has to say is written once nothing more
//! can be read, so that what came together is answered together, in one write.

use crate::io::{Io, MAX_READ, Out, give_back};
use crate::keepalive::Pulse;
use bytes::{Bytes, BytesMut};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub(crate) type Connection = http2::Connection<Out>;
pub(crate) type Stream = http2::Stream<Out>;

impl http2::Out for Out {
    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        Out::write(self, write);
    }

    fn push(&mut self, data: Bytes) {
        Out::push(self, data);
    }

    fn len(&self) -> usize {
        Out::len(self)
    }

    fn clear(&mut self) {
        *self = Out::default();
    }
}

/// The first read of a connection or after idling.
const FIRST_READ: usize = 4 * 1024;

/// Bytes that are read before others have their turn.
const BURST: usize = 64 * 1024;

/// Bytes that wait for the socket before nothing more is read: answers to what is read are not bounded by windows.
const MOST_WAITING: usize = 256 * 1024;

/// What a turn of a connection came to.
pub(crate) enum Turn {
    /// So many bytes came, and the codec has them.
    Received(usize),
    /// The peer closed it, or it broke.
    Closed,
}

pub(crate) struct Wire {
    pub(crate) conn: Connection,
    io: Io,
    read: BytesMut,
    /// What the next read asks for.
    size: usize,
    /// Bytes written so far.
    pub(crate) sent: u64,
    /// Told of what comes in.
    pub(crate) pulse: Option<Rc<Pulse>>,
    failed: bool,
    /// Bytes read in this turn.
    burst: usize,
    /// The buffer was used since it was given back.
    has_read: bool,
    /// Nothing was written or read.
    fresh: bool,
}

impl Wire {
    pub(crate) fn new(io: Io, conn: Connection) -> Self {
        Self {
            conn,
            io,
            read: BytesMut::new(),
            size: FIRST_READ,
            sent: 0,
            pulse: None,
            failed: false,
            burst: 0,
            has_read: false,
            fresh: true,
        }
    }

    /// Reads once. While nothing is there to read, what waits is written; then the codec wakes the task when there is more.
    pub(crate) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        self.conn.drive(cx.waker());
        if self.fresh {
            // A client speaks first, whatever the server has said already.
            self.fresh = false;
            self.failed = self.poll_out(cx).is_err();
        }
        if self.failed {
            return Poll::Ready(Turn::Closed);
        }
        if self.burst >= BURST {
            // What came is passed on while it is near, and before there is more of it.
            cx.waker().wake_by_ref();
            return self.poll_pause(cx);
        }
        if self.waiting() >= MOST_WAITING {
            if self.poll_out(cx).is_err() {
                self.failed = true;
                return Poll::Ready(Turn::Closed);
            }
            if self.waiting() >= MOST_WAITING {
                // Who does not read is not listened to either. The socket wakes the task when it takes more.
                self.conn.pause();
                return Poll::Pending;
            }
        }
        let want = self.size.max(self.conn.missing(&self.read));
        match self.io.poll_read_into(cx, &mut self.read, want) {
            Poll::Ready(Ok(0) | Err(_)) => Poll::Ready(Turn::Closed),
            Poll::Ready(Ok(n)) => {
                self.has_read = true;
                self.burst += n;
                if let Some(pulse) = &self.pulse {
                    pulse.beat();
                }
                // Reads are as large as they come.
                if n * 2 > self.size {
                    self.size = (self.size * 2).min(MAX_READ);
                } else if n * 4 < self.size {
                    self.size = (self.size / 2).max(FIRST_READ);
                }
                self.conn.receive(&mut self.read, Instant::now());
                Poll::Ready(Turn::Received(n))
            }
            Poll::Pending => {
                let paused = self.poll_pause(cx);
                if self.waiting() == 0 {
                    self.conn.rests();
                }
                paused
            }
        }
    }

    /// Bytes that the socket has not taken.
    fn waiting(&self) -> usize {
        self.conn.with_out(|out| Out::len(out))
    }

    /// Writes what waits, and leaves the rest to the next turn.
    fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        self.burst = 0;
        if std::mem::take(&mut self.has_read) && self.read.is_empty() {
            give_back(&mut self.read);
        }
        if self.poll_out(cx).is_err() {
            self.failed = true;
            return Poll::Ready(Turn::Closed);
        }
        self.conn.pause();
        Poll::Pending
    }

    /// Writes what waits, as far as the socket takes it.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Self { conn, io, sent, .. } = self;
        loop {
            conn.pump();
            let written = conn.with_out(|out| {
                let waits = !out.is_empty();
                // TLS may hold bytes back that were written.
                let flushed = out.poll_flush(cx, io, sent);
                if flushed.is_ready() {
                    out.shrink();
                }
                flushed.map_ok(|()| waits)
            });
            match written {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) | Poll::Pending => return Ok(()),
                Poll::Ready(Err(e)) => return Err(e),
            }
        }
    }

    /// The stream whose head has begun to come.
    pub(crate) fn owed_head(&self) -> Option<u32> {
        self.conn.owed_head(&self.read)
    }

    /// After the connection's end: writes the rest and drops what still comes, until the peer closes.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // A peer that takes nothing more is found by the read.
        let _ = self.poll_out(cx);
        let mut dropped = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut dropped);
            match ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Says the end of what is written, over TLS with an alert.
    pub(crate) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { conn, io, sent, .. } = self;
        ready!(conn.with_out(|out| out.poll_flush(cx, io, sent)))?;
        Pin::new(io).poll_shutdown(cx)
    }
}

impl Drop for Wire {
    /// Writes what the socket takes now, and reads what nobody will: see [`Io::discard_unread`].
    fn drop(&mut self) {
        self.conn.close();
        // Nobody waits for the rest: the connection is gone.
        let _ = self.poll_out(&mut Context::from_waker(Waker::noop()));
        self.io.discard_unread();
    }
}
