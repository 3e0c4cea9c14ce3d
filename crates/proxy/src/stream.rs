//! One interface over HTTP/1 and HTTP/2 messages: heads, a body to pull, a body to push.

use crate::h1::{self, HeadError, ReadError};
use crate::wire::Stream;

pub(crate) use crate::h1::Frame;
use http2::{Broken, Item, Reason};
use proxy_core::Headers;
use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

/// Why a body ended early.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// The peer closed the connection.
    Closed,
    /// The peer reset the stream (HTTP/2).
    Reset(Reason),
    /// The codec here reset the stream (HTTP/2): the message is malformed, and what is said of it.
    Malformed(Option<&'static str>),
    /// The peer broke the protocol.
    Protocol(&'static str),
    /// Its trailers are not to be had here (HTTP/2).
    Refused(&'static str),
    /// A filter cannot read what it says.
    Unreadable(&'static str),
}

impl From<ReadError> for BodyError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Closed | ReadError::Io(_) => BodyError::Closed,
            ReadError::Syntax(HeadError { detail, .. }) => BodyError::Protocol(detail),
        }
    }
}

impl From<Broken> for BodyError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Reset(reason) => BodyError::Reset(reason),
            Broken::Malformed(details) => BodyError::Malformed(details),
            Broken::Refused => BodyError::Reset(Reason::REFUSED_STREAM),
            Broken::Protocol => BodyError::Protocol(http2::VIOLATION),
            Broken::Closed | Broken::Given => BodyError::Closed,
        }
    }
}

/// How a client went away.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gone {
    /// The connection ended.
    Closed,
    /// It reset its stream (HTTP/2).
    Reset(Reason),
    /// Its message was malformed, and the stream was reset here (HTTP/2); what is said of it.
    Malformed(Option<&'static str>),
    /// Its stream is to be reset here, and why (HTTP/2).
    Refused(&'static str),
}

impl From<&BodyError> for Gone {
    fn from(e: &BodyError) -> Self {
        match e {
            BodyError::Reset(reason) => Gone::Reset(*reason),
            BodyError::Malformed(details) => Gone::Malformed(*details),
            BodyError::Refused(details) => Gone::Refused(details),
            BodyError::Closed | BodyError::Protocol(_) | BodyError::Unreadable(_) => Gone::Closed,
        }
    }
}

/// A body to read.
pub(crate) enum RecvBody {
    Empty,
    H1(h1::Shared),
    H2(Stream),
    /// Frames in memory, then nothing.
    Memory(VecDeque<Frame>),
    /// Frames in memory, then the rest of another body.
    Then(VecDeque<Frame>, Box<RecvBody>),
}

impl RecvBody {
    pub(crate) fn h2(stream: Stream) -> Self {
        if stream.is_read() { RecvBody::Empty } else { RecvBody::H2(stream) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, RecvBody::Empty)
    }

    /// Makes one frame of the data that is kept and of that of HTTP/2 that is at hand, up to about `limit` bytes. Returns how
    /// many came.
    pub(crate) fn gather(&mut self, limit: usize) -> usize {
        let (mut frames, rest) = match std::mem::replace(self, RecvBody::Empty) {
            RecvBody::Then(frames, rest) => (frames, *rest),
            RecvBody::Memory(frames) => (frames, RecvBody::Memory(VecDeque::new())),
            other => (VecDeque::new(), other),
        };
        let mut size = 0;
        if let RecvBody::H2(stream) = &rest {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            // An error it will say again.
            while size < limit
                && !matches!(frames.back(), Some(Frame::Trailers(_)))
                && let Poll::Ready(Some(Ok(frame))) = next(stream, &mut cx)
            {
                if let Frame::Data(data) = &frame {
                    size += data.len();
                }
                frames.push_back(frame);
            }
        }
        join(&mut frames);
        *self = match rest {
            RecvBody::Memory(_) => RecvBody::Memory(frames),
            rest if frames.is_empty() => rest,
            rest => RecvBody::Then(frames, Box::new(rest)),
        };
        size
    }

    /// Leaves what was read before and kept, so that the rest comes next.
    pub(crate) fn forget_kept(&mut self) {
        match std::mem::replace(self, RecvBody::Empty) {
            RecvBody::Then(_, mut rest) => {
                rest.forget_kept();
                *self = *rest;
            }
            RecvBody::Memory(_) => *self = RecvBody::Memory(VecDeque::new()),
            other => *self = other,
        }
    }

    /// Whether the frame that was taken last said that nothing follows, as frames of HTTP/2 can, or was the last one kept.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            RecvBody::H2(stream) => stream.is_read(),
            RecvBody::Memory(frames) => frames.is_empty(),
            RecvBody::Then(frames, rest) => frames.is_empty() && rest.is_over(),
            _ => false,
        }
    }

    /// Whether its end has come, behind what is still to be read.
    pub(crate) fn has_come(&self) -> bool {
        match self {
            RecvBody::Empty | RecvBody::Memory(_) => true,
            RecvBody::H1(_) => false,
            RecvBody::H2(stream) => stream.is_read(),
            RecvBody::Then(_, rest) => rest.has_come(),
        }
    }

    /// What is wrong with what has come of it, if that is known already.
    pub(crate) fn broken(&self) -> Option<BodyError> {
        match self {
            RecvBody::H1(conn) => conn.borrow().body_error().map(|e| BodyError::Protocol(e.detail)),
            RecvBody::Then(_, rest) => rest.broken(),
            RecvBody::Empty | RecvBody::H2(_) | RecvBody::Memory(_) => None,
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self {
            RecvBody::Empty => Poll::Ready(None),
            RecvBody::H1(conn) => conn.borrow_mut().poll_body(cx).map(|f| f.map(|r| r.map_err(BodyError::from))),
            RecvBody::H2(stream) => next(stream, cx),
            RecvBody::Memory(frames) => Poll::Ready(frames.pop_front().map(Ok)),
            RecvBody::Then(frames, rest) => match frames.pop_front() {
                Some(frame) => Poll::Ready(Some(Ok(frame))),
                None => rest.poll_frame(cx),
            },
        }
    }
}

/// Makes one of the frames of data at the start.
fn join(frames: &mut VecDeque<Frame>) {
    let data = |frame: &Frame| matches!(frame, Frame::Data(_));
    let count = frames.iter().take_while(|frame| data(frame)).count();
    if count > 1 {
        let pieces = frames.drain(..count).filter_map(|frame| match frame {
            Frame::Data(piece) => Some(piece),
            Frame::Trailers(_) => None,
        });
        let all = pieces.collect::<Vec<_>>().concat();
        frames.push_front(Frame::Data(all.into()));
    }
}

/// The next frame of a body on HTTP/2.
fn next(stream: &Stream, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
    loop {
        return Poll::Ready(match ready!(stream.poll_item(cx)) {
            Ok(Item::Data(data)) => Some(Ok(Frame::Data(data))),
            Ok(Item::Trailers(fields)) => Some(Ok(Frame::Trailers(fields))),
            Ok(Item::End) => None,
            // Nothing but a body follows the last head.
            Ok(Item::Head(..)) => continue,
            Err(broken) => Some(Err(broken.into())),
        });
    }
}

/// Bytes of a head's fields as Envoy's codec counts them: names, values, and so many each. The request line and the status
/// line do not count.
pub(crate) fn header_bytes(headers: &Headers, each: u64) -> u64 {
    let (count, bytes) = headers.line_sizes();
    count as u64 * each + bytes as u64
}

/// How a body is written on HTTP/1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// No body may follow (HEAD, 204, 304, or nothing to send).
    None,
    Length,
    Chunked {
        trailers: bool,
    },
    /// Raw bytes: an upgraded connection, or a body that ends with the connection.
    Raw,
}

/// Above this many buffered bytes the reader of the other side waits.
pub(crate) const HIGH_WATER: usize = 64 * 1024;

/// A body to write.
pub(crate) enum SendBody {
    H1 {
        conn: h1::Shared,
        framing: Framing,
    },
    /// `apart`: the end is said in a frame of its own.
    H2 {
        stream: Stream,
        apart: bool,
    },
}

impl SendBody {
    pub(crate) fn h2(stream: Stream) -> Self {
        SendBody::H2 { stream, apart: false }
    }

    /// Queues one frame.
    pub(crate) fn push(&mut self, frame: Frame) {
        match (self, frame) {
            (SendBody::H1 { conn, framing }, Frame::Data(data)) => {
                if data.is_empty() {
                    return;
                }
                let out = &mut conn.borrow_mut().out;
                match framing {
                    Framing::None => {}
                    Framing::Length | Framing::Raw => out.push(data),
                    Framing::Chunked { .. } => {
                        out.write(|v| {
                            use std::io::Write;
                            // Writing to a Vec cannot fail.
                            let _ = write!(v, "{:x}\r\n", data.len());
                        });
                        out.push(data);
                        out.write(|v| v.extend_from_slice(b"\r\n"));
                    }
                }
            }
            (SendBody::H1 { conn, framing: Framing::Chunked { trailers: true } }, Frame::Trailers(fields)) => {
                conn.borrow_mut().out.write(|v| {
                    v.extend_from_slice(b"0\r\n");
                    fields.write_lines(v);
                    v.extend_from_slice(b"\r\n");
                });
            }
            (SendBody::H1 { .. }, Frame::Trailers(_)) => {}
            (SendBody::H2 { stream, apart }, Frame::Data(data)) => {
                // The end that comes in a frame of its own goes on in one.
                *apart |= data.is_empty();
                stream.push(data);
            }
            (SendBody::H2 { stream, .. }, Frame::Trailers(fields)) => stream.push_trailers(fields),
        }
    }

    /// Queues the end of the message. `trailers_sent`: the last frame pushed was trailers.
    pub(crate) fn end(&mut self, trailers_sent: bool) {
        match self {
            SendBody::H1 { conn, framing: Framing::Chunked { trailers } } => {
                if !(trailers_sent && *trailers) {
                    conn.borrow_mut().out.write(|v| v.extend_from_slice(b"0\r\n\r\n"));
                }
            }
            SendBody::H1 { .. } => {}
            SendBody::H2 { stream, apart } => stream.end(*apart),
        }
    }

    /// What comes is of HTTP/1: of that Envoy's codec sees the end after all data, and says so in an empty frame.
    pub(crate) fn end_apart(&mut self) {
        if let SendBody::H2 { apart, .. } = self {
            *apart = true;
        }
    }

    pub(crate) fn is_h2(&self) -> bool {
        matches!(self, SendBody::H2 { .. })
    }

    /// Bytes that wait to be written.
    pub(crate) fn buffered(&self) -> usize {
        match self {
            SendBody::H1 { conn, .. } => conn.borrow().out.len(),
            SendBody::H2 { stream, .. } => stream.queued(),
        }
    }

    /// Whether the peer has to make room for what waits (HTTP/2).
    pub(crate) fn is_held(&self) -> bool {
        matches!(self, SendBody::H2 { stream, .. } if stream.is_held())
    }

    /// Writes what is queued.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            SendBody::H1 { conn, .. } => conn.borrow_mut().poll_flush(cx).map_err(|_| BodyError::Closed),
            SendBody::H2 { stream, .. } => stream.poll_flush(cx).map_err(BodyError::from),
        }
    }

    /// Ready when the peer reset this stream (HTTP/2 only; on HTTP/1 the connection's read side tells).
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        match self {
            SendBody::H2 { stream, .. } => stream.poll_broken(cx).map(BodyError::from),
            _ => Poll::Pending,
        }
    }

    /// Aborts the message; on HTTP/1 the caller drops the connection.
    pub(crate) fn reset(&mut self, reason: Reason) {
        if let SendBody::H2 { stream, .. } = self {
            stream.reset(reason);
        }
    }
}

/// Which side of a pump failed.
#[derive(Debug)]
pub(crate) enum PumpError {
    Source(BodyError),
    Sink(BodyError),
}

/// Moves a body from one side to the other, coalescing writes: bytes are flushed when nothing more can be read now.
pub(crate) struct Pump {
    trailers_sent: bool,
    source_done: bool,
    /// Body bytes moved.
    pub(crate) bytes: u64,
}

impl Pump {
    pub(crate) fn new() -> Self {
        Self { trailers_sent: false, source_done: false, bytes: 0 }
    }

    /// All was read; what is left waits for room at the other side.
    pub(crate) fn has_read_all(&self) -> bool {
        self.source_done
    }

    /// `source` gives the next frame.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut source: impl FnMut(&mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>>,
        sink: &mut SendBody,
    ) -> Poll<Result<(), PumpError>> {
        while !self.source_done {
            if sink.buffered() >= HIGH_WATER {
                ready!(sink.poll_flush(cx)).map_err(PumpError::Sink)?;
            }
            match source(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    match &frame {
                        Frame::Data(data) => self.bytes += data.len() as u64,
                        Frame::Trailers(_) => self.trailers_sent = true,
                    }
                    sink.push(frame);
                }
                Poll::Ready(None) => {
                    self.source_done = true;
                    sink.end(self.trailers_sent);
                }
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(PumpError::Source(e))),
                Poll::Pending => {
                    if let Poll::Ready(Err(e)) = sink.poll_flush(cx) {
                        return Poll::Ready(Err(PumpError::Sink(e)));
                    }
                    return Poll::Pending;
                }
            }
        }
        sink.poll_flush(cx).map_err(PumpError::Sink)
    }
}
