//! Writing answers to the client, HTTP/1 or HTTP/2.

use crate::h1;
use crate::stream::{BodyError, Framing, Gone, SendBody, header_bytes};
use crate::wire::Stream;
use http2::Reason;
use proxy_core::{Headers, hcm};
use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Where the answer of one request goes.
pub(crate) enum Answer {
    H1(H1Answer),
    H2(Stream),
}

pub(crate) struct H1Answer {
    pub(crate) conn: h1::Shared,
    pub(crate) head_request: bool,
    pub(crate) http10: bool,
    /// Cleared when the connection must close after this answer.
    pub(crate) keep: Rc<Cell<bool>>,
    /// What the connection had read and written before this request.
    pub(crate) before: (u64, u64),
}

impl Answer {
    pub(crate) fn is_h1(&self) -> bool {
        matches!(self, Answer::H1(_))
    }

    /// Bytes read and written on the wire for this request; HTTP/2 does not tell.
    pub(crate) fn wire(&self) -> Option<(u64, u64)> {
        let Answer::H1(h1) = self else { return None };
        Some(h1.conn.borrow().wire_since(h1.before))
    }

    /// The connection closes after this answer (HTTP/1; HTTP/2 says GOAWAY on its own).
    pub(crate) fn close_after(&mut self) {
        if let Answer::H1(h1) = self {
            h1.keep.set(false);
        }
    }

    /// The number of an HTTP/2 stream.
    pub(crate) fn stream(&self) -> Option<u32> {
        match self {
            Answer::H2(stream) => Some(stream.id()),
            Answer::H1(_) => None,
        }
    }

    /// Sends an interim head (100, 103).
    pub(crate) fn interim(&mut self, status: u16, headers: &Headers) {
        match self {
            Answer::H1(h1) => {
                let conn = &mut *h1.conn.borrow_mut();
                conn.out.write(|out| h1::write_response(out, status, h1.http10, headers, None, conn.style));
            }
            // A stream that is gone shows at the next write.
            Answer::H2(stream) => _ = stream.send_head(status, headers, false),
        }
    }

    /// Sends the head; framing and connection headers are set here. `end`: no body follows. `tunnel`: raw bytes follow.
    /// With how many bytes its fields have on the wire, see [`header_bytes`].
    pub(crate) fn head(
        &mut self,
        status: u16,
        headers: &mut Headers,
        end: bool,
        tunnel: bool,
        trailers: bool,
    ) -> (SendBody, u64) {
        match self {
            Answer::H1(h1) => h1.head(status, headers, end, tunnel, trailers),
            Answer::H2(stream) => {
                headers.remove("transfer-encoding");
                headers.remove("connection");
                headers.remove("upgrade");
                let empty = headers.get("content-length") == Some(b"0");
                if (status == 204 || tunnel) && empty {
                    headers.remove("content-length");
                }
                // The answer to an extended CONNECT (RFC 8441) is 200.
                let status = if tunnel && status == 101 { 200 } else { status };
                // A stream that is gone shows at the next write.
                let _ = stream.send_head(status, headers, end);
                (SendBody::h2(stream.clone()), header_bytes(headers, 4))
            }
        }
    }

    /// Ready when the client gave up.
    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>, body_done: bool) -> Poll<Gone> {
        match self {
            Answer::H1(h1) => {
                if !body_done {
                    return Poll::Pending;
                }
                h1.conn.borrow_mut().poll_peer_closed(cx).map(|()| Gone::Closed)
            }
            Answer::H2(stream) => stream.poll_broken(cx).map(|broken| Gone::from(&BodyError::from(broken))),
        }
    }

    /// Resets the stream (HTTP/2); on HTTP/1 the connection is closed by its owner.
    pub(crate) fn reset(&mut self, reason: Reason) {
        match self {
            Answer::H1(h1) => h1.keep.set(false),
            Answer::H2(stream) => stream.reset(reason),
        }
    }
}

impl H1Answer {
    fn head(&mut self, status: u16, headers: &mut Headers, end: bool, tunnel: bool, trailers: bool) -> (SendBody, u64) {
        // RFC 9110, 8.6: these have no length.
        let no_length = status < 200 || status == 204;
        let bodiless_status = no_length || status == 304;
        headers.remove("transfer-encoding");
        if self.http10 && !tunnel && !headers.contains("content-length") {
            self.keep.set(false);
        }
        let (framing, added) = if tunnel {
            // Envoy says that an answer which upgrades without status 101 is chunked, and passes on what comes of it.
            let chunked = !no_length && !self.http10 && hcm::is_upgrade(headers) && !headers.contains("content-length");
            (Framing::Raw, chunked.then_some(h1::CHUNKED))
        } else if self.head_request || bodiless_status {
            if no_length {
                headers.remove("content-length");
            }
            let chunked = !bodiless_status && !self.http10 && !headers.contains("content-length");
            (Framing::None, chunked.then_some(h1::CHUNKED))
        } else if headers.contains("content-length") {
            (if end { Framing::None } else { Framing::Length }, None)
        } else if end {
            (Framing::None, Some(h1::EMPTY))
        } else if self.http10 {
            (Framing::Raw, None)
        } else {
            (Framing::Chunked { trailers }, Some(h1::CHUNKED))
        };
        if tunnel {
            self.keep.set(false);
        } else if !self.keep.get() {
            // An answer that says it upgrades goes on saying so (Envoy `ConnectionManagerImpl::encodeHeaders`).
            if !hcm::is_upgrade(headers) {
                headers.set("connection", b"close");
            }
        } else if self.http10 {
            headers.set("connection", b"keep-alive");
        }
        let http10 = self.http10;
        {
            let conn = &mut *self.conn.borrow_mut();
            conn.out.write(|out| h1::write_response(out, status, http10, headers, added, conn.style));
        }
        let bytes = header_bytes(headers, 4) + h1::framing_bytes(added);
        (SendBody::H1 { conn: self.conn.clone(), framing }, bytes)
    }
}
