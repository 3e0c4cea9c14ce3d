//! The byte streams the proxy talks over: TCP or unix sockets, plain or TLS, behind one enum (no boxing of plain ones).

use bytes::{Buf, Bytes, BytesMut};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Raw {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A socket, possibly with TLS over it.
#[derive(Debug)]
pub(crate) enum Io {
    Raw(Raw),
    Server(Box<tokio_rustls::server::TlsStream<Raw>>),
    Client(Box<tokio_rustls::client::TlsStream<Raw>>),
}

impl Raw {
    /// Ready when reading would not block, without reading (no system call when the driver knows nothing new).
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Raw::Tcp(s) => s.poll_read_ready(cx),
            Raw::Unix(s) => s.poll_read_ready(cx),
        }
    }
}

impl AsyncRead for Raw {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Raw::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Raw::Unix(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Raw {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Raw::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Raw::Unix(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // To the kernel one buffer is less work by itself than as a list of one, which is what TLS mostly writes.
        if let [one] = bufs {
            return self.poll_write(cx, one);
        }
        match self.get_mut() {
            Raw::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Raw::Unix(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Raw::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Raw::Unix(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

macro_rules! each {
    ($self:expr, $s:ident => $e:expr) => {
        match $self {
            Io::Raw($s) => $e,
            Io::Server($s) => {
                let $s = &mut **$s;
                $e
            }
            Io::Client($s) => {
                let $s = &mut **$s;
                $e
            }
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let result = each!(self.get_mut(), s => Pin::new(s).poll_read(cx, buf));
        match result {
            // A peer that closes without close_notify is an end of stream, as in Envoy.
            Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            other => other,
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => Pin::new(s).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => Pin::new(s).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => Pin::new(s).poll_shutdown(cx))
    }
}

impl Io {
    /// Ends the socket both ways at once: whoever reads finds the end, and so does the peer.
    pub(crate) fn cut(&self) {
        let raw = match self {
            Io::Raw(raw) => raw,
            Io::Server(stream) => stream.get_ref().0,
            Io::Client(stream) => stream.get_ref().0,
        };
        // One that is not connected any more needs no end.
        let _ = match raw {
            Raw::Tcp(stream) => rustix::net::shutdown(stream, rustix::net::Shutdown::Both),
            Raw::Unix(stream) => rustix::net::shutdown(stream, rustix::net::Shutdown::Both),
        };
    }
}

/// The first read of a connection or after idling; most heads fit.
const FIRST_READ: usize = 4 * 1024;
/// Reads grow up to this while they come in full.
pub(crate) const MAX_READ: usize = 64 * 1024;

/// Buffers that a worker keeps for the next connections that have bytes to move.
const SPARE: usize = 32;
/// Of larger ones, fewer are kept.
const SPARE_SIZE: usize = 16 * 1024;
const SPARE_LARGE: usize = 8;
/// What a write buffer starts with: most heads with a small body fit.
const FIRST_WRITE: usize = 2 * 1024;

thread_local! {
    /// TLS reads of idle connections go through this, so that an idle connection owns no buffer.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// Idle connections give their buffers to busy ones: most requests then allocate none.
    static SPARE_READS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    /// A few large ones for bodies, which the allocator would give back to the kernel and get again each time.
    static LARGE_READS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    /// Buffers of which pieces are in use elsewhere, mostly until they are written.
    static LENT_READS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static SPARE_WRITES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the buffer of a connection that has nothing to read. If pieces of it are still in use it is freed with them, unless
/// it is one of a few that wait for that.
pub(crate) fn give_back(buf: &mut BytesMut) {
    let mut buf = std::mem::take(buf);
    buf.clear();
    if !buf.try_reclaim(FIRST_READ) {
        keep(&LENT_READS, SPARE_LARGE, buf);
        return;
    }
    match buf.capacity() {
        0..=SPARE_SIZE => keep(&SPARE_READS, SPARE, buf),
        _ => keep(&LARGE_READS, SPARE_LARGE, buf),
    }
}

fn keep<T>(spare: &'static std::thread::LocalKey<RefCell<Vec<T>>>, limit: usize, buf: T) {
    spare.with_borrow_mut(|spare| {
        if spare.len() < limit {
            spare.push(buf);
        }
    });
}

/// A buffer that nobody else uses, of about that size or none.
fn spare_read(size: usize) -> BytesMut {
    let large = if size > SPARE_SIZE { LARGE_READS.with_borrow_mut(Vec::pop).or_else(returned) } else { None };
    large.or_else(|| SPARE_READS.with_borrow_mut(Vec::pop)).unwrap_or_default()
}

/// One of the buffers that were lent, if all its pieces are gone.
fn returned() -> Option<BytesMut> {
    LENT_READS.with_borrow_mut(|lent| {
        let free = lent.iter_mut().position(|buf| buf.try_reclaim(FIRST_READ))?;
        Some(lent.swap_remove(free))
    })
}

impl Io {
    /// Reads once, appending to `buf`; 0 is the end. An idle connection (`buf` without capacity) gets a buffer only when bytes are there.
    /// `want`: so many bytes are expected.
    pub(crate) fn poll_read_into(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
        want: usize,
    ) -> Poll<io::Result<usize>> {
        let want = want.clamp(FIRST_READ, MAX_READ);
        if buf.capacity() == 0 {
            match self {
                Io::Raw(raw) => ready!(raw.poll_read_ready(cx))?,
                _ => return self.poll_read_scratch(cx, buf),
            }
            *buf = spare_read(want);
        }
        let room = buf.capacity() - buf.len();
        if room < want / 2 {
            buf.reserve(want);
        }
        // The future is only the pair of references: polling a fresh one each time loses nothing.
        std::pin::pin!(self.read_buf(buf)).poll(cx)
    }

    fn poll_read_scratch(&mut self, cx: &mut Context<'_>, buf: &mut BytesMut) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(16 * 1024, 0);
            let mut read_buf = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *self).poll_read(cx, &mut read_buf))?;
            *buf = spare_read(read_buf.filled().len());
            buf.extend_from_slice(read_buf.filled());
            Poll::Ready(Ok(read_buf.filled().len()))
        })
    }

    /// Ready when a byte (or the end) is really there, of the plain text with TLS; readiness alone may be spurious on a new
    /// socket. The byte stays where it is.
    pub(crate) fn poll_first_byte(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Io::Raw(Raw::Tcp(stream)) => {
                let mut byte = [0];
                stream.poll_peek(cx, &mut ReadBuf::new(&mut byte)).map(|_| ())
            }
            Io::Raw(raw) => raw.poll_read_ready(cx).map(|_| ()),
            Io::Server(stream) => Pin::new(stream).poll_fill_buf(cx).map(|_| ()),
            Io::Client(stream) => Pin::new(stream).poll_fill_buf(cx).map(|_| ()),
        }
    }

    /// Takes what has come in and nobody will read, within bounds: closing a socket that holds such bytes resets the
    /// connection, and the peer may lose what was written last.
    pub(crate) fn discard_unread(&mut self) {
        let raw = match self {
            Io::Raw(raw) => raw,
            Io::Server(stream) => stream.get_mut().0,
            Io::Client(stream) => stream.get_mut().0,
        };
        let mut buf = [0; 4096];
        for _ in 0..16 {
            let read = match raw {
                Raw::Tcp(stream) => stream.try_read(&mut buf),
                Raw::Unix(stream) => stream.try_read(&mut buf),
            };
            if !matches!(read, Ok(1..)) {
                return;
            }
        }
    }

    /// For plain sockets: ready when reading would not block, without a buffer. TLS may hold plain text of its own, so
    /// there one must read to know.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Io::Raw(raw) => raw.poll_read_ready(cx).map(|_| ()),
            Io::Server(_) | Io::Client(_) => Poll::Ready(()),
        }
    }
}

/// Pieces below this are copied together; larger ones are written from where they are.
const COPY_BELOW: usize = 2048;

/// Bytes waiting to be written, in order.
#[derive(Debug, Default)]
pub(crate) struct Out {
    segments: VecDeque<Bytes>,
    tail: Vec<u8>,
    tail_at: usize,
    len: usize,
}

impl Out {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Runs `write` on the open end of the buffer.
    pub(crate) fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let tail = self.open_tail();
        let before = tail.len();
        write(tail);
        self.len += self.tail.len() - before;
    }

    fn open_tail(&mut self) -> &mut Vec<u8> {
        if self.tail.capacity() == 0 {
            let spare = SPARE_WRITES.with_borrow_mut(Vec::pop);
            self.tail = spare.unwrap_or_else(|| Vec::with_capacity(FIRST_WRITE));
        }
        &mut self.tail
    }

    pub(crate) fn push(&mut self, bytes: Bytes) {
        if bytes.len() < COPY_BELOW {
            self.len += bytes.len();
            self.open_tail().extend_from_slice(&bytes);
            return;
        }
        if self.tail.len() > self.tail_at {
            let mut tail = Bytes::from(std::mem::take(&mut self.tail));
            tail.advance(self.tail_at);
            self.segments.push_back(tail);
        } else {
            self.tail.clear();
        }
        self.tail_at = 0;
        self.len += bytes.len();
        self.segments.push_back(bytes);
    }

    /// Writes until empty; gives the memory back when it was a lot.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>, io: &mut Io, written: &mut u64) -> Poll<io::Result<()>> {
        let mut wrote = false;
        while self.len > 0 {
            let n = if self.segments.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, &self.tail[self.tail_at..]))?
            } else {
                let mut slices = [IoSlice::new(&[]); 16];
                let mut used = 0;
                for segment in self.segments.iter().take(15) {
                    slices[used] = IoSlice::new(segment);
                    used += 1;
                }
                if self.segments.len() <= 15 && self.tail.len() > self.tail_at {
                    slices[used] = IoSlice::new(&self.tail[self.tail_at..]);
                    used += 1;
                }
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..used]))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            wrote = true;
            *written += n as u64;
            self.consume(n);
        }
        if wrote || !matches!(io, Io::Raw(_)) {
            ready!(Pin::new(io).poll_flush(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    fn consume(&mut self, mut n: usize) {
        self.len -= n;
        while let Some(front) = self.segments.front_mut() {
            if front.len() > n {
                front.advance(n);
                return;
            }
            n -= front.len();
            self.segments.pop_front();
        }
        self.tail_at += n;
        if self.tail_at == self.tail.len() {
            self.tail.clear();
            self.tail_at = 0;
        }
    }

    /// Frees what an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        if self.len > 0 {
            return;
        }
        let mut tail = std::mem::take(self).tail;
        if (FIRST_WRITE..=SPARE_SIZE).contains(&tail.capacity()) {
            tail.clear();
            keep(&SPARE_WRITES, SPARE, tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_passed_on_when_nobody_reads_them() {
        let mut used = BytesMut::with_capacity(FIRST_READ);
        used.extend_from_slice(b"a request");
        let piece = used.split_to(4).freeze();
        give_back(&mut used);
        assert_eq!(SPARE_READS.with_borrow(Vec::len), 0, "a piece is in use: {piece:?}");
        let mut used = BytesMut::with_capacity(FIRST_READ);
        used.extend_from_slice(b"a request");
        drop(used.split_to(4).freeze());
        give_back(&mut used);
        assert_eq!(SPARE_READS.with_borrow(|spare| spare[0].len()), 0);
        let mut out = Out::default();
        out.write(|v| v.extend_from_slice(b"head"));
        out.consume(4);
        out.shrink();
        assert_eq!(SPARE_WRITES.with_borrow(|spare| spare[0].len()), 0);
    }

    #[test]
    fn out_keeps_order_over_partial_writes() {
        let mut out = Out::default();
        out.write(|v| v.extend_from_slice(b"head"));
        out.push(Bytes::from(vec![b'x'; 5000]));
        out.write(|v| v.extend_from_slice(b"tail"));
        assert_eq!(out.len(), 5008);
        out.consume(2);
        out.consume(5003);
        assert_eq!(&out.tail[out.tail_at..], b"ail");
        out.consume(3);
        assert!(out.is_empty());
    }
}
