//! Both directions of one TCP connection: buffers that grow with traffic, then splice(2) once a direction is bulk.

use super::spliceable;
use crate::io::{Io, Raw};
use crate::runtime::ChainEntry;
use rustix::fd::{AsFd, OwnedFd};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// What both directions share.
pub(super) struct Transfer {
    pub(super) idle_timeout: Option<Duration>,
    /// The connection's time that is left.
    pub(super) max_duration: Option<Duration>,
    /// Bytes from the client.
    pub(super) received: Cell<u64>,
    /// Bytes to the client.
    pub(super) sent: Cell<u64>,
    /// The gate is asked each time that the client sends something, not only the first time.
    pub(super) continuous: bool,
    pub(super) chain: Arc<ChainEntry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Downstream,
    Upstream,
}

/// How a transfer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// A policy refused the client; says which.
    Denied(String),
    /// Both sides closed, this one last.
    Complete(Side),
    Idle,
    /// The connection lasted too long.
    TooOld,
    Failed(Side),
    /// The listener went and its drain time is over, or the proxy ends.
    Drained,
}

/// The first buffer; idle connections have none.
const SMALL: usize = 8 * 1024;
/// Buffers grow up to this while reads come in full.
const LARGE: usize = 256 * 1024;
/// A direction that moved this much is bulk: the kernel moves the rest.
const BULK: u64 = 1 << 20;
/// Asked of the kernel for a splice pipe.
const PIPE: usize = 1 << 20;

enum Mode {
    Copy {
        buf: Vec<u8>,
        start: usize,
        end: usize,
        eof: bool,
    },
    Splice(Pipe),
    /// The end was passed on.
    Done,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    eof: bool,
}

struct Direction {
    mode: Mode,
    size: usize,
    moved: u64,
    splice: bool,
}

impl Direction {
    fn new(splice: bool) -> Self {
        Self { mode: Mode::Copy { buf: Vec::new(), start: 0, end: 0, eof: false }, size: SMALL, moved: 0, splice }
    }

    /// Moves what can be moved; ready when this direction is over. `Err(true)`: reading failed, `Err(false)`: writing did.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io) -> Poll<Result<(), bool>> {
        loop {
            match &mut self.mode {
                Mode::Done => return Poll::Ready(Ok(())),
                Mode::Copy { buf, start, end, eof } => {
                    while *start < *end {
                        match ready!(Pin::new(&mut *to).poll_write(cx, &buf[*start..*end])) {
                            Ok(0) | Err(_) => return Poll::Ready(Err(false)),
                            Ok(n) => {
                                *start += n;
                                self.moved += n as u64;
                            }
                        }
                    }
                    if *eof {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(|_| false)?;
                        // A peer that is gone already cannot be told; its own direction shows that.
                        let _ = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                        self.mode = Mode::Done;
                        continue;
                    }
                    if self.splice && self.moved >= BULK {
                        match Pipe::new() {
                            Ok(pipe) => self.mode = Mode::Splice(pipe),
                            Err(_) => self.splice = false,
                        }
                        continue;
                    }
                    if buf.is_empty() {
                        // Nothing is held for a silent peer.
                        match from.poll_readable(cx) {
                            Poll::Ready(()) => *buf = vec![0; self.size],
                            Poll::Pending => {
                                let _ = Pin::new(&mut *to).poll_flush(cx);
                                return Poll::Pending;
                            }
                        }
                    }
                    let mut read = ReadBuf::new(buf);
                    match Pin::new(&mut *from).poll_read(cx, &mut read) {
                        Poll::Ready(Ok(())) => {
                            let n = read.filled().len();
                            (*start, *end) = (0, n);
                            *eof = n == 0;
                            if n == buf.len() && self.size < LARGE {
                                self.size *= 2;
                                buf.resize(self.size, 0);
                            }
                        }
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(true)),
                        Poll::Pending => {
                            *buf = Vec::new();
                            if let Poll::Ready(Err(_)) = Pin::new(&mut *to).poll_flush(cx) {
                                return Poll::Ready(Err(false));
                            }
                            return Poll::Pending;
                        }
                    }
                }
                Mode::Splice(pipe) => {
                    let (Io::Raw(from_raw), Io::Raw(to_raw)) = (&mut *from, &mut *to) else {
                        return Poll::Ready(Err(false));
                    };
                    while pipe.held > 0 {
                        let n = ready!(pipe.drain(cx, to_raw)).map_err(|_| false)?;
                        self.moved += n as u64;
                    }
                    if pipe.eof {
                        let _ = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                        self.mode = Mode::Done;
                        continue;
                    }
                    match ready!(pipe.fill(cx, from_raw)) {
                        Ok(0) => pipe.eof = true,
                        Ok(_) => {}
                        Err(_) => return Poll::Ready(Err(true)),
                    }
                }
            }
        }
    }

    /// Bytes that a refused client sent; they go nowhere.
    fn refused(&mut self, cx: &mut Context<'_>, from: &mut Io) -> u64 {
        let mut buf = [0; SMALL];
        let mut read = ReadBuf::new(&mut buf);
        match Pin::new(from).poll_read(cx, &mut read) {
            Poll::Ready(Ok(())) => read.filled().len() as u64,
            _ => 0,
        }
    }

    fn done(&self) -> bool {
        matches!(self.mode, Mode::Done)
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The default of 64 KiB works too, with more calls.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
        Ok(Self { read, write, held: 0, eof: false })
    }

    fn fill(&mut self, cx: &mut Context<'_>, from: &Raw) -> Poll<io::Result<usize>> {
        let n = ready!(when_ready(from, Interest::READABLE, cx, |fd| {
            Ok(splice(fd, None, &self.write, None, PIPE, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
        }))?;
        self.held += n;
        Poll::Ready(Ok(n))
    }

    fn drain(&mut self, cx: &mut Context<'_>, to: &Raw) -> Poll<io::Result<usize>> {
        let held = self.held;
        let n = ready!(when_ready(to, Interest::WRITABLE, cx, |fd| {
            Ok(splice(&self.read, None, fd, None, held, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
        }))?;
        self.held -= n;
        Poll::Ready(Ok(n))
    }
}

/// Runs `op` on the socket once it is ready, again until it does not say "would block".
fn when_ready(
    raw: &Raw,
    interest: Interest,
    cx: &mut Context<'_>,
    mut op: impl FnMut(rustix::fd::BorrowedFd<'_>) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    let readable = interest == Interest::READABLE;
    loop {
        let result = match raw {
            Raw::Tcp(s) => {
                ready!(if readable { s.poll_read_ready(cx) } else { s.poll_write_ready(cx) })?;
                s.try_io(interest, || op(s.as_fd()))
            }
            Raw::Unix(s) => {
                ready!(if readable { s.poll_read_ready(cx) } else { s.poll_write_ready(cx) })?;
                s.try_io(interest, || op(s.as_fd()))
            }
        };
        match result {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return Poll::Ready(other),
        }
    }
}

/// Moves bytes both ways until both directions ended, one failed, or nothing moved for the idle timeout.
/// `gate` is asked at the client's first byte, or whenever there is something to read.
pub(super) async fn both(
    down: &mut Io,
    up: &mut Io,
    transfer: &Transfer,
    mut gate: Option<&mut dyn FnMut() -> Result<(), String>>,
) -> Ended {
    let splice = spliceable(down, up) && !transfer.continuous;
    let mut passed = gate.is_none();
    let mut there = Direction::new(splice);
    let mut back = Direction::new(splice);
    watched(transfer, |cx| {
        if let Some(check) = &mut gate
            && !there.done()
            && down.poll_first_byte(cx).is_ready()
        {
            if let Err(details) = check() {
                transfer.received.set(there.moved + there.refused(cx, down));
                return Poll::Ready(Ended::Denied(details));
            }
            passed = true;
            if !transfer.continuous {
                gate = None;
            }
        }
        let a = if passed { there.poll(cx, down, up) } else { Poll::Pending };
        let last = if there.done() && !back.done() { Side::Upstream } else { Side::Downstream };
        let b = back.poll(cx, up, down);
        transfer.received.set(there.moved);
        transfer.sent.set(back.moved);
        match (&a, &b) {
            (Poll::Ready(Err(read)), _) => {
                Poll::Ready(Ended::Failed(if *read { Side::Downstream } else { Side::Upstream }))
            }
            (_, Poll::Ready(Err(read))) => {
                Poll::Ready(Ended::Failed(if *read { Side::Upstream } else { Side::Downstream }))
            }
            _ if there.done() && back.done() => Poll::Ready(Ended::Complete(last)),
            _ => Poll::Pending,
        }
    })
    .await
}

/// Moves bytes (`step`, which counts them in `transfer`) until that is over or the connection's time is.
pub(super) async fn watched(transfer: &Transfer, mut step: impl FnMut(&mut Context<'_>) -> Poll<Ended>) -> Ended {
    let drained = transfer.chain.cut();
    tokio::pin!(drained);
    let idle = tokio::time::sleep(transfer.idle_timeout.unwrap_or(FAR));
    tokio::pin!(idle);
    let old = tokio::time::sleep(transfer.max_duration.unwrap_or(FAR));
    tokio::pin!(old);
    let mut last = 0;
    let mut last_moved = Instant::now();
    std::future::poll_fn(|cx| {
        if let Poll::Ready(ended) = step(cx) {
            return Poll::Ready(ended);
        }
        if drained.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ended::Drained);
        }
        if transfer.max_duration.is_some() && old.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ended::TooOld);
        }
        if let Some(timeout) = transfer.idle_timeout {
            let moved = transfer.received.get() + transfer.sent.get();
            if moved != last {
                last = moved;
                // The timer is not moved per packet: when it fires, what is left of the time is waited for.
                last_moved = Instant::now();
            }
            while idle.as_mut().poll(cx).is_ready() {
                let quiet = last_moved.elapsed();
                if quiet >= timeout {
                    return Poll::Ready(Ended::Idle);
                }
                idle.as_mut().reset(tokio::time::Instant::now() + (timeout - quiet));
            }
        }
        Poll::Pending
    })
    .await
}

/// Stands for "never" where a timer must exist.
const FAR: Duration = Duration::from_secs(86400 * 365);
