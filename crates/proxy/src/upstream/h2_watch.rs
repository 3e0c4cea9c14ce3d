//! What passes on an HTTP/2 connection to a host, as far as the `h2` crate does not tell: GOAWAY and resets.

use crate::batch::Batch;
use crate::frames::{Frames, GOAWAY, Head, RST_STREAM, written_of};
use crate::stats::ClusterStats;
use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How a connection fares, known to its driver and its pool.
pub(super) struct Fate {
    stats: Arc<ClusterStats>,
    /// It takes no more requests.
    closed: Cell<bool>,
    /// It is to end now.
    cut: Cell<bool>,
    /// The host ended it.
    by_peer: Cell<bool>,
    driver: RefCell<Option<Waker>>,
}

impl Fate {
    pub(super) fn new(stats: Arc<ClusterStats>) -> Rc<Self> {
        Rc::new(Self {
            stats,
            closed: Cell::default(),
            cut: Cell::default(),
            by_peer: Cell::default(),
            driver: RefCell::default(),
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// New requests go elsewhere; it ends with the last one on it.
    pub(super) fn close(&self) {
        self.closed.set(true);
    }

    /// It ends at once, with all that is under way on it.
    pub(super) fn cut(&self) {
        self.close();
        self.cut.set(true);
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.get()
    }

    pub(super) fn is_by_peer(&self) -> bool {
        self.by_peer.get()
    }

    /// Whom to wake when it is to end.
    pub(super) fn drive(&self, driver: &Waker) {
        let mut known = self.driver.borrow_mut();
        if !known.as_ref().is_some_and(|known| known.will_wake(driver)) {
            *known = Some(driver.clone());
        }
    }

    fn received(&self, head: Head) {
        match head.kind {
            // As Envoy, each of them: a host that leaves gently says it twice.
            GOAWAY => {
                self.stats.upstream_cx_close_notify.inc();
                self.close();
            }
            RST_STREAM => self.stats.other.inc("http2.rx_reset"),
            _ => {}
        }
    }

    fn sent(&self, head: Head) {
        if head.kind == RST_STREAM {
            self.stats.other.inc("http2.tx_reset");
        }
    }
}

/// A connection between socket and crate.
pub(super) struct Watch {
    io: Batch,
    incoming: Frames,
    outgoing: Frames,
    fate: Rc<Fate>,
}

impl Watch {
    pub(super) fn new(io: Batch, fate: Rc<Fate>) -> Self {
        Self { io, incoming: Frames::default(), outgoing: Frames::after_preface(), fate }
    }

    fn wrote(&mut self, bytes: &[u8]) {
        self.outgoing.look(bytes, |head, _| {
            self.fate.sent(head);
            true
        });
    }
}

impl AsyncRead for Watch {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.fate.cut.get() {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        let bytes = &buf.filled()[before..];
        if polled.is_ready() && bytes.is_empty() {
            this.fate.by_peer.set(true);
        }
        this.incoming.look(bytes, |head, _| {
            this.fate.received(head);
            true
        });
        polled
    }
}

impl AsyncWrite for Watch {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write(cx, buf))?;
        this.wrote(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs))?;
        written_of(bufs, written, |part| this.wrote(part));
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
