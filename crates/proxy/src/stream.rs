//! One interface over HTTP/1 and HTTP/2 messages: heads, a body to pull, a body to push.

use crate::h1::{self, HeadError, ReadError};
use crate::hcm::Late;

pub(crate) use crate::h1::Frame;
use bytes::{Buf, Bytes};
use proxy_core::Headers;
use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

/// Why a body ended early.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// The peer closed the connection.
    Closed,
    /// The peer reset the stream (HTTP/2).
    Reset(h2::Reason),
    /// The codec here reset the stream (HTTP/2): the message is malformed.
    Malformed,
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

impl From<h2::Error> for BodyError {
    fn from(e: h2::Error) -> Self {
        match e.reason() {
            Some(_) if e.is_reset() && e.is_library() => BodyError::Malformed,
            Some(reason) if e.is_reset() => BodyError::Reset(reason),
            Some(_) if e.is_library() => BodyError::Protocol("http2.protocol_error"),
            _ => BodyError::Closed,
        }
    }
}

/// How a client went away.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gone {
    /// The connection ended.
    Closed,
    /// It reset its stream (HTTP/2).
    Reset(h2::Reason),
    /// Its message was malformed, and the stream was reset here (HTTP/2).
    Malformed,
    /// Its stream is to be reset here, and why (HTTP/2).
    Refused(&'static str),
}

impl From<&BodyError> for Gone {
    fn from(e: &BodyError) -> Self {
        match e {
            BodyError::Reset(reason) => Gone::Reset(*reason),
            BodyError::Malformed => Gone::Malformed,
            BodyError::Refused(details) => Gone::Refused(details),
            BodyError::Closed | BodyError::Protocol(_) | BodyError::Unreadable(_) => Gone::Closed,
        }
    }
}

/// A body to read.
pub(crate) enum RecvBody {
    Empty,
    H1(h1::Shared),
    H2(H2Recv),
    /// Frames in memory, then nothing.
    Memory(VecDeque<Frame>),
    /// Frames in memory, then the rest of another body.
    Then(VecDeque<Frame>, Box<RecvBody>),
}

pub(crate) struct H2Recv {
    stream: h2::RecvStream,
    data_done: bool,
    /// The status allows no body.
    bodiless: bool,
}

impl RecvBody {
    pub(crate) fn h2(stream: h2::RecvStream) -> Self {
        Self::of_h2(stream, false)
    }

    /// What follows the head of a 204 or 304: a body is an error.
    pub(crate) fn h2_bodiless(stream: h2::RecvStream) -> Self {
        Self::of_h2(stream, true)
    }

    fn of_h2(stream: h2::RecvStream, bodiless: bool) -> Self {
        if stream.is_end_stream() {
            RecvBody::Empty
        } else {
            RecvBody::H2(H2Recv { stream, data_done: false, bodiless })
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, RecvBody::Empty)
    }

    /// Makes one frame of the data that is kept and of that of HTTP/2 that is at hand, up to about `limit` bytes. Returns how
    /// many came.
    pub(crate) fn gather(&mut self, limit: usize) -> usize {
        let (mut frames, mut rest) = match std::mem::replace(self, RecvBody::Empty) {
            RecvBody::Then(frames, rest) => (frames, *rest),
            RecvBody::Memory(frames) => (frames, RecvBody::Memory(VecDeque::new())),
            other => (VecDeque::new(), other),
        };
        let mut size = 0;
        if let RecvBody::H2(body) = &mut rest {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            // An error it will say again.
            while size < limit
                && !matches!(frames.back(), Some(Frame::Trailers(_)))
                && let Poll::Ready(Some(Ok(frame))) = body.poll_frame(&mut cx)
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
            RecvBody::H2(body) => body.stream.is_end_stream(),
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
            RecvBody::H2(body) => body.stream.is_end_stream(),
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
            RecvBody::H2(body) => body.poll_frame(cx),
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

impl H2Recv {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) if self.bodiless && !data.is_empty() => {
                    return Poll::Ready(Some(Err(BodyError::Protocol("http2.violation.of.messaging.rule"))));
                }
                Some(Ok(data)) => {
                    // Capacity goes back at once; what waits downstream of here is bounded by the send side.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::Data(data))));
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(e.into()))),
                None => self.data_done = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(map)) => Poll::Ready(Some(Ok(Frame::Trailers(from_map(&map))))),
            Ok(None) => Poll::Ready(None),
            Err(e) => Poll::Ready(Some(Err(e.into()))),
        }
    }
}

/// Fields of an `http` map, appended to nothing.
pub(crate) fn from_map(map: &http::HeaderMap) -> Headers {
    let mut headers = Headers::with_capacity(map.len(), 512);
    push_map(&mut headers, map);
    headers
}

pub(crate) fn push_map(headers: &mut Headers, map: &http::HeaderMap) {
    for (name, value) in map {
        headers.push_lower(name.as_str(), value.as_bytes());
    }
}

/// Regular fields as an `http` map for the h2 crate; fields it cannot carry are left out.
pub(crate) fn to_map(headers: &Headers) -> http::HeaderMap {
    let mut map = http::HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter_regular() {
        if let (Ok(name), Ok(value)) = (http::HeaderName::from_bytes(name), http::HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map
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
    H2(H2Send),
    /// Kept in memory.
    Late(Late),
    /// Swallows everything: nobody is there to take it.
    Discard,
}

pub(crate) struct H2Send {
    stream: h2::SendStream<Bytes>,
    pending: VecDeque<Bytes>,
    len: usize,
    trailers: Option<http::HeaderMap>,
    ending: bool,
    ended: bool,
    /// Its head waits for the connection's task, and it gets no capacity before.
    opening: bool,
    /// The end is said in a frame of its own.
    ends_apart: bool,
}

impl SendBody {
    pub(crate) fn h2(stream: h2::SendStream<Bytes>) -> Self {
        SendBody::H2(H2Send::new(stream))
    }

    /// A stream that a request has just opened.
    pub(crate) fn h2_opening(stream: h2::SendStream<Bytes>) -> Self {
        SendBody::H2(H2Send { opening: true, ..H2Send::new(stream) })
    }

    /// A stream whose head already ended it; kept for resets.
    pub(crate) fn h2_ended(stream: h2::SendStream<Bytes>) -> Self {
        SendBody::H2(H2Send { ending: true, ended: true, ..H2Send::new(stream) })
    }

    /// Queues one frame.
    pub(crate) fn push(&mut self, frame: Frame) {
        match (self, frame) {
            (SendBody::Late(late), Frame::Data(data)) => late.push(&data),
            (SendBody::Discard, _) | (SendBody::Late(_), Frame::Trailers(_)) => {}
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
            (SendBody::H2(h2), Frame::Data(data)) => {
                if !data.is_empty() {
                    h2.len += data.len();
                    h2.pending.push_back(data);
                }
            }
            (SendBody::H2(h2), Frame::Trailers(fields)) => h2.trailers = Some(to_map(&fields)),
        }
    }

    /// Queues the end of the message. `trailers_sent`: the last frame pushed was trailers.
    pub(crate) fn end(&mut self, trailers_sent: bool) {
        match self {
            SendBody::Discard | SendBody::Late(_) => {}
            SendBody::H1 { conn, framing: Framing::Chunked { trailers } } => {
                if !(trailers_sent && *trailers) {
                    conn.borrow_mut().out.write(|v| v.extend_from_slice(b"0\r\n\r\n"));
                }
            }
            SendBody::H1 { .. } => {}
            SendBody::H2(h2) => h2.ending = true,
        }
    }

    /// What comes is of HTTP/1: of that Envoy's codec sees the end after all data, and says so in an empty frame.
    pub(crate) fn end_apart(&mut self) {
        if let SendBody::H2(h2) = self {
            h2.ends_apart = true;
        }
    }

    pub(crate) fn is_h2(&self) -> bool {
        matches!(self, SendBody::H2(_))
    }

    /// Bytes that wait to be written.
    pub(crate) fn buffered(&self) -> usize {
        match self {
            SendBody::Discard | SendBody::Late(_) => 0,
            SendBody::H1 { conn, .. } => conn.borrow().out.len(),
            SendBody::H2(h2) => h2.len,
        }
    }

    /// Writes what is queued.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            SendBody::Discard | SendBody::Late(_) => Poll::Ready(Ok(())),
            SendBody::H1 { conn, .. } => conn.borrow_mut().poll_flush(cx).map_err(|_| BodyError::Closed),
            SendBody::H2(h2) => h2.poll_flush(cx),
        }
    }

    /// Ready when the peer reset this stream (HTTP/2 only; on HTTP/1 the connection's read side tells).
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        match self {
            SendBody::H2(h2) => h2.stream.poll_reset(cx).map(|r| match r {
                Ok(reason) => BodyError::Reset(reason),
                Err(e) => e.into(),
            }),
            _ => Poll::Pending,
        }
    }

    /// Aborts the message; on HTTP/1 the caller drops the connection.
    pub(crate) fn reset(&mut self, reason: h2::Reason) {
        if let SendBody::H2(h2) = self {
            h2.stream.send_reset(reason);
            h2.ended = true;
        }
    }
}

impl H2Send {
    fn new(stream: h2::SendStream<Bytes>) -> Self {
        Self {
            stream,
            pending: VecDeque::new(),
            len: 0,
            trailers: None,
            ending: false,
            ended: false,
            opening: false,
            ends_apart: false,
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        // What is at hand with the head leaves with it, in one write: the crate keeps it until there is capacity. That
        // is not more than a pump gathers.
        let opening = std::mem::take(&mut self.opening);
        while self.len > 0 {
            if self.ended {
                return Poll::Ready(Err(BodyError::Closed));
            }
            let mut room = self.len;
            if !opening {
                self.stream.reserve_capacity(self.len);
                room = self.stream.capacity();
            }
            while room == 0 {
                match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(n)) => room = n,
                    Some(Err(e)) => return Poll::Ready(Err(e.into())),
                    None => return Poll::Ready(Err(BodyError::Closed)),
                }
            }
            let Some(front) = self.pending.front_mut() else { break };
            let piece = if front.len() <= room {
                self.pending.pop_front().unwrap_or_default()
            } else {
                let piece = front.slice(..room);
                front.advance(room);
                piece
            };
            self.len -= piece.len();
            let last = self.len == 0 && self.ending && self.trailers.is_none() && !self.ends_apart;
            self.stream.send_data(piece, last).map_err(BodyError::from)?;
            self.ended |= last;
        }
        if self.ending && !self.ended {
            self.ended = true;
            match self.trailers.take() {
                Some(trailers) => self.stream.send_trailers(trailers),
                None => self.stream.send_data(Bytes::new(), true),
            }
            .map_err(BodyError::from)?;
        }
        Poll::Ready(Ok(()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;
    use crate::io::{Io, Raw};
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Waker;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn a_body_at_hand_leaves_with_its_head() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let (batch, outlet) = Batch::new(Io::Raw(Raw::Unix(ours)), true);
        let builder = h2::client::Builder::new();
        let (mut send, mut connection) = builder.handshake::<_, Bytes>(batch).await.unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut turn = || {
            assert!(Pin::new(&mut connection).poll(&mut cx).is_pending());
            outlet.poll_out(&mut cx);
        };
        turn();
        let mut preface = [0; 256];
        assert!(peer.read(&mut preface).await.unwrap() > 24);
        let request = http::Request::post("http://t/").body(()).unwrap();
        let (_answer, stream) = send.send_request(request, false).unwrap();
        let mut body = SendBody::h2_opening(stream);
        body.push(Frame::Data(Bytes::from_static(b"abc")));
        body.end(false);
        assert!(body.poll_flush(&mut Context::from_waker(Waker::noop())).is_ready());
        turn();
        let mut got = [0; 256];
        let n = peer.read(&mut got).await.unwrap();
        assert_eq!((got[3], &got[n - 3..n]), (1, &b"abc"[..]), "HEADERS and DATA in one write");
    }
}
