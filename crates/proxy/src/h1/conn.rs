//! One HTTP/1 connection, server or client side: read buffer, write buffer, and the body being read.

use super::body::{Decoder, Frame, Step};
use super::head::{BodyLength, HeadError, Limits, RequestHead, ResponseHead, parse_request, parse_response};
use super::write::Style;
use crate::io::{self as buffers, Io, Out};
use bytes::{Buf, BytesMut};
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

/// Why reading from a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The peer closed in the middle of a message.
    #[error("closed by the peer")]
    Closed,
    #[error("read failed")]
    Io(#[source] io::Error),
    #[error(transparent)]
    Syntax(#[from] HeadError),
}

/// A connection shared by the reading and the writing side of an exchange, on one thread.
pub(crate) type Shared = Rc<RefCell<Conn>>;

/// While a response is awaited, at most this much of the next pipelined requests is read ahead.
const READ_AHEAD: usize = 64 * 1024;

/// Envoy calls half a head a protocol error, nothing at all a termination, however the connection ended.
const HALF_A_HEAD: HeadError = HeadError::new(502, "http1.codec_error");

/// The first read of a message.
const FIRST_READ: usize = 4 * 1024;

pub(crate) struct Conn {
    pub(crate) io: Io,
    pub(crate) out: Out,
    read: BytesMut,
    decoder: Decoder,
    eof: bool,
    /// What is asked for when nothing else is known.
    read_size: usize,
    muted: bool,
    /// How heads are written.
    pub(crate) style: Style,
    /// Bytes read from the wire since the connection began.
    pub(crate) bytes_read: u64,
    /// As many were there when the last message, or what has come of it, was looked at.
    looked_at: u64,
    /// Bytes written to the wire since the connection began.
    pub(crate) bytes_written: u64,
}

impl Conn {
    pub(crate) fn new(io: Io) -> Self {
        Self {
            io,
            out: Out::default(),
            read: BytesMut::new(),
            decoder: Decoder::raw(BodyLength::None),
            eof: false,
            read_size: FIRST_READ,
            muted: false,
            style: Style::default(),
            bytes_read: 0,
            looked_at: 0,
            bytes_written: 0,
        }
    }

    /// Reads once into the buffer; 0 is the end of the stream. Who waits, for whatever it is, has no buffer.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        let want = self.decoder.expects().max(self.read_size);
        let n = match self.io.poll_read_into(cx, &mut self.read, want) {
            Poll::Ready(Ok(n)) => n,
            Poll::Ready(Err(e)) => {
                self.eof = true;
                return Poll::Ready(Err(e));
            }
            Poll::Pending => {
                if self.read.is_empty() {
                    buffers::give_back(&mut self.read);
                }
                return Poll::Pending;
            }
        };
        if n >= self.read_size {
            // It comes faster than it is read.
            self.read_size = (self.read_size * 2).min(buffers::MAX_READ);
        }
        self.eof = n == 0;
        self.bytes_read += n as u64;
        self.decoder.look(&self.read[self.read.len() - n..]);
        Poll::Ready(Ok(n))
    }

    /// The next request head; `None` when the peer closed between requests. The body decoder is set up for it.
    pub(crate) fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        limits: &Limits,
    ) -> Poll<Result<Option<Box<RequestHead>>, ReadError>> {
        loop {
            self.looked_at = self.bytes_read;
            if !self.read.is_empty()
                && let Some((head, used)) = parse_request(&self.read, limits)?
            {
                self.read.advance(used);
                self.decoder = Decoder::new(head.body, limits);
                self.decoder.look(&self.read);
                self.read_size = FIRST_READ;
                return Poll::Ready(Ok(Some(head)));
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) if self.read.is_empty() => return Poll::Ready(Ok(None)),
                Ok(0) => return Poll::Ready(Err(ReadError::Closed)),
                Ok(_) => {}
                Err(e) => return Poll::Ready(Err(ReadError::Io(e))),
            }
        }
    }

    /// The next response head (interim ones included).
    pub(crate) fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
        limits: &Limits,
        head_request: bool,
    ) -> Poll<Result<ResponseHead, ReadError>> {
        loop {
            self.looked_at = self.bytes_read;
            if !self.read.is_empty()
                && let Some((head, used)) = parse_response(&self.read, limits, head_request)?
            {
                self.read.advance(used);
                self.decoder = Decoder::new(head.body, limits);
                self.decoder.look(&self.read);
                self.read_size = FIRST_READ;
                return Poll::Ready(Ok(head));
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) if !self.read.is_empty() => return Poll::Ready(Err(HALF_A_HEAD.into())),
                Ok(0) => return Poll::Ready(Err(ReadError::Closed)),
                Ok(_) => {}
                Err(_) if !self.read.is_empty() => return Poll::Ready(Err(HALF_A_HEAD.into())),
                Err(e) => return Poll::Ready(Err(ReadError::Io(e))),
            }
        }
    }

    /// The next frame of the current body; `None` at its end. As Envoy, whose codec passes on at once what a read brought, this
    /// one makes one frame of the chunks that are there.
    pub(crate) fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, ReadError>>> {
        loop {
            if !self.decoder.done() {
                self.looked_at = self.bytes_read;
            }
            match self.decoder.step(&mut self.read) {
                Ok(Step::Frame(Frame::Data(data))) => {
                    return Poll::Ready(Some(Ok(Frame::Data(self.decoder.join(data, &mut self.read)))));
                }
                Ok(Step::Frame(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(Step::End) => return Poll::Ready(None),
                Ok(Step::More) => {}
                Err(e) => return Poll::Ready(Some(Err(e.into()))),
            }
            match ready!(self.poll_fill(cx)) {
                // However it ends: to Envoy's codec a reset is an end, too.
                Ok(0) | Err(_) if self.decoder.finish_on_close() => return Poll::Ready(None),
                Ok(0) => return Poll::Ready(Some(Err(ReadError::Closed))),
                Ok(_) => {}
                Err(e) => return Poll::Ready(Some(Err(ReadError::Io(e)))),
            }
        }
    }

    /// What is wrong with what has come of the current body.
    pub(crate) fn body_error(&self) -> Option<HeadError> {
        self.decoder.wrong()
    }

    /// True when the current body was read to its end.
    pub(crate) fn body_done(&self) -> bool {
        self.decoder.done()
    }

    /// The rest of the connection is raw bytes until it closes (after an upgrade or CONNECT).
    pub(crate) fn switch_to_raw(&mut self) {
        self.decoder = Decoder::raw(BodyLength::Close);
    }

    /// Resolves when the peer closed; reads (and keeps) what it sends meanwhile, up to a bound.
    pub(crate) fn poll_peer_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.read.len() < READ_AHEAD {
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        Poll::Pending
    }

    /// For a pooled client connection: usable while the peer neither closed nor sent anything.
    pub(crate) fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        if self.eof || !self.read.is_empty() {
            return false;
        }
        // Without news from the driver this makes no system call.
        matches!(self.poll_fill(cx), Poll::Pending)
    }

    /// Ready when bytes (or the end) of the next message are there.
    pub(crate) fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.eof || !self.read.is_empty() {
            return Poll::Ready(());
        }
        // An error shows again when the head is read.
        self.poll_fill(cx).map(|_| ())
    }

    /// More bytes came than the last message has.
    pub(crate) fn has_more(&self) -> bool {
        !self.read.is_empty()
    }

    pub(crate) fn at_eof(&self) -> bool {
        self.eof
    }

    /// The peer has closed: what is written from now on goes nowhere.
    pub(crate) fn mute(&mut self) {
        self.muted = true;
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.muted {
            self.bytes_written += std::mem::take(&mut self.out).len() as u64;
            return Poll::Ready(Ok(()));
        }
        if self.out.is_empty() && matches!(self.io, Io::Raw(_)) {
            return Poll::Ready(Ok(()));
        }
        ready!(self.out.poll_flush(cx, &mut self.io, &mut self.bytes_written))?;
        self.out.shrink();
        Poll::Ready(Ok(()))
    }

    /// Bytes taken from the wire for messages so far, and bytes written for messages.
    pub(crate) fn wire(&self) -> (u64, u64) {
        (self.bytes_read - self.read.len() as u64, self.bytes_written + self.out.len() as u64)
    }

    /// Bytes read and written for a message that began at this [`Self::wire`]. As in Envoy, what a read brought of the
    /// next message counts for this one, too.
    pub(crate) fn wire_since(&self, before: (u64, u64)) -> (u64, u64) {
        let written = self.bytes_written + self.out.len() as u64;
        (self.looked_at.saturating_sub(before.0), written - before.1)
    }

    /// Releases the buffer of a connection that goes to the pool.
    pub(crate) fn rest(&mut self) {
        if self.read.is_empty() {
            buffers::give_back(&mut self.read);
        }
    }
}

impl Conn {
    /// Reads and drops what still comes, until the peer closes (for a delayed close).
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.read.clear();
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
    }
}
