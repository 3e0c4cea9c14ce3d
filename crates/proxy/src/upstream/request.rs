//! One request on an upstream connection, whichever HTTP version that speaks.

use super::connect::ConnectionFacts;
use super::h2_pool::H2Connection;
use super::pool::{Acquired, Lease};
use crate::h1::{self, Limits, ReadError};
use crate::stream::{BodyError, Frame, Framing, RecvBody, SendBody, header_bytes};
use crate::wire::Stream;
use bytes::Bytes;
use http2::{Item, Reason};
use proxy_core::Headers;
use proxy_core::stream_info::{HttpProtocol, UpstreamInfo};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

/// Why an upstream request failed after its connection was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The connection closed (or was reset).
    Terminated,
    /// HTTP/2 RST_STREAM.
    Reset,
    /// RST_STREAM with REFUSED_STREAM: the request was not processed.
    Refused,
    /// RST_STREAM with PROTOCOL_ERROR: the peer says that the request is none.
    Blamed,
    /// RST_STREAM with CONNECT_ERROR.
    Connect,
    /// The answer is no HTTP.
    Protocol(&'static str),
}

impl From<BodyError> for Failure {
    fn from(e: BodyError) -> Self {
        match e {
            BodyError::Closed => Failure::Terminated,
            BodyError::Reset(Reason::REFUSED_STREAM) => Failure::Refused,
            BodyError::Reset(Reason::PROTOCOL_ERROR) | BodyError::Malformed(_) => Failure::Blamed,
            BodyError::Reset(Reason::CONNECT_ERROR) => Failure::Connect,
            BodyError::Reset(_) => Failure::Reset,
            BodyError::Protocol(detail) | BodyError::Refused(detail) | BodyError::Unreadable(detail) => {
                Failure::Protocol(detail)
            }
        }
    }
}

/// What a request asks for beside an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tunnel {
    No,
    /// `upgrade` and `connection: upgrade`.
    Upgrade,
    Connect,
}

/// An upstream request under way.
pub(crate) struct Upstream {
    pub(crate) send: SendBody,
    pub(crate) response: Response,
    pub(crate) facts: Rc<ConnectionFacts>,
    pub(crate) protocol: HttpProtocol,
    /// Of the request's fields on the wire, see [`header_bytes`].
    pub(crate) head_bytes: u64,
    /// What the connection had read and written before this request.
    before: (u64, u64),
}

/// The answer side.
pub(crate) enum Response {
    H1 {
        lease: Lease,
        head_request: bool,
        keep_alive: bool,
        limits: Limits,
        tunnel: Tunnel,
    },
    H2 {
        stream: Stream,
        connection: H2Connection,
        tunnel: Tunnel,
        /// What an extended CONNECT asks for.
        upgrade: Option<Box<[u8]>>,
    },
    /// The head was taken; what keeps the connection alive.
    Taken {
        lease: Option<Lease>,
        reusable: bool,
        _h2: Option<H2Connection>,
    },
}

/// A response head with its body.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: RecvBody,
    /// Of its fields on the wire, see [`header_bytes`].
    pub(crate) header_bytes: u64,
    /// 1xx but not 101: another head follows.
    pub(crate) interim: bool,
    /// The tunnel that was asked for is there: `body` is what comes out of it.
    pub(crate) tunnel: bool,
}

impl Reply {
    fn interim(status: u16, headers: Headers, header_bytes: u64) -> Self {
        Self { status, headers, body: RecvBody::Empty, header_bytes, interim: true, tunnel: false }
    }
}

impl Upstream {
    /// Writes the head (to the buffer; bytes leave with the first flush). `end`: there is no body.
    pub(crate) fn start(
        acquired: Acquired,
        headers: &mut Headers,
        end: bool,
        tunnel: Tunnel,
        enable_trailers: bool,
    ) -> Result<Box<Self>, Failure> {
        let started = match acquired {
            Acquired::H1(lease) => Self::start_h1(lease, headers, end, tunnel, enable_trailers),
            Acquired::H2(connection) => Self::start_h2(connection, headers, end, tunnel)?,
        };
        Ok(Box::new(started))
    }

    /// A raw connection that carries a terminated CONNECT.
    pub(crate) fn tunnel(io: crate::io::Io, facts: Rc<ConnectionFacts>) -> (Self, Reply) {
        let mut inner = h1::Conn::new(io);
        inner.switch_to_raw();
        let conn: h1::Shared = Rc::new(std::cell::RefCell::new(inner));
        let mut headers = Headers::new();
        headers.set_status(200);
        let body = RecvBody::H1(conn.clone());
        let reply = Reply { status: 200, headers, body, header_bytes: 0, interim: false, tunnel: true };
        let send = SendBody::H1 { conn, framing: Framing::Raw };
        let tunnel = Self {
            send,
            response: Response::taken(),
            facts,
            protocol: HttpProtocol::Http11,
            head_bytes: 0,
            before: (0, 0),
        };
        (tunnel, reply)
    }

    fn start_h1(mut lease: Lease, headers: &mut Headers, end: bool, tunnel: Tunnel, enable_trailers: bool) -> Self {
        lease.begin();
        if tunnel == Tunnel::Connect {
            lease.half_close();
        }
        let method = headers.get(":method").unwrap_or_default();
        let head_request = method == b"HEAD";
        let bodiless = h1::is_bodiless(method);
        headers.remove("transfer-encoding");
        let (framing, added) = if tunnel != Tunnel::No {
            (Framing::Raw, None)
        } else if headers.contains("content-length") {
            (if end { Framing::None } else { Framing::Length }, None)
        } else if end {
            (Framing::None, (!bodiless).then_some(h1::EMPTY))
        } else {
            (Framing::Chunked { trailers: enable_trailers }, Some(h1::CHUNKED))
        };
        let conn = lease.conn().clone();
        let before = {
            let conn = &mut *conn.borrow_mut();
            let before = conn.wire();
            conn.out.write(|out| h1::write_request(out, headers, added, conn.style));
            before
        };
        let head_bytes = header_bytes(headers, 4) + h1::framing_bytes(added);
        let facts = lease.facts().clone();
        let limits = lease.limits();
        Self {
            send: SendBody::H1 { conn, framing },
            response: Response::H1 { lease, head_request, keep_alive: true, limits, tunnel },
            facts,
            protocol: HttpProtocol::Http11,
            head_bytes,
            before,
        }
    }

    /// Adds the bytes that this request put on the wire and took from it; HTTP/2 does not tell.
    pub(crate) fn count_wire(&self, info: &mut UpstreamInfo, stats: &crate::stats::ClusterStats) {
        if let SendBody::H1 { conn, .. } = &self.send {
            let (read, written) = conn.borrow().wire_since(self.before);
            info.wire_bytes_received += read;
            info.wire_bytes_sent += written;
            stats.upstream_cx_rx_bytes_total.add(read);
            stats.upstream_cx_tx_bytes_total.add(written);
        }
    }

    fn start_h2(connection: H2Connection, headers: &Headers, end: bool, tunnel: Tunnel) -> Result<Self, Failure> {
        let upgrade = (tunnel == Tunnel::Upgrade).then(|| extended_connect(headers));
        let (head, asked) = match upgrade {
            Some((head, asked)) => (Some(head), Some(asked)),
            None => (None, None),
        };
        let stream = connection.send(head.as_ref().unwrap_or(headers), end).ok_or(Failure::Refused)?;
        let facts = connection.facts().clone();
        Ok(Self {
            send: SendBody::h2(stream.clone()),
            response: Response::H2 { stream, connection, tunnel, upgrade: asked },
            facts,
            protocol: HttpProtocol::Http2,
            head_bytes: header_bytes(headers, 4),
            before: (0, 0),
        })
    }
}

/// Whether the upgrade is the one to HTTP/2, which nobody here takes.
fn is_h2c(headers: &Headers) -> bool {
    headers.get("upgrade").is_some_and(|kind| kind.eq_ignore_ascii_case(b"h2c"))
}

/// Makes the upgrade of HTTP/1 the one of HTTP/2 (RFC 8441), and returns what is asked for as well (Envoy
/// `Utility::transformUpgradeRequestFromH1toH2`). Like Envoy, this does not look at whether the peer announced it.
fn extended_connect(headers: &Headers) -> (Headers, Box<[u8]>) {
    let mut head = headers.clone();
    let asked: Box<[u8]> = headers.get("upgrade").unwrap_or_default().into();
    head.set(":method", b"CONNECT");
    head.set(":protocol", &asked);
    head.remove("upgrade");
    if head.get("content-length") == Some(b"0") {
        head.remove("content-length");
    }
    (head, asked)
}

impl Response {
    fn taken() -> Self {
        Response::Taken { lease: None, reusable: false, _h2: None }
    }

    /// The next head.
    pub(crate) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Box<Reply>, Failure>> {
        match self {
            Response::H1 { lease, head_request, keep_alive, limits, tunnel } => {
                let conn = lease.conn().clone();
                let mut head = match ready!(conn.borrow_mut().poll_response(cx, limits, *head_request)) {
                    Ok(head) => head,
                    Err(ReadError::Syntax(e)) => return Poll::Ready(Err(Failure::Protocol(e.detail))),
                    Err(_) => return Poll::Ready(Err(Failure::Terminated)),
                };
                if head.status < 100 {
                    return Poll::Ready(Err(Failure::Protocol("http1.codec_error")));
                }
                let interim = (100..200).contains(&head.status) && head.status != 101;
                if interim {
                    return Poll::Ready(Ok(Box::new(Reply::interim(head.status, head.headers, head.fields))));
                }
                *keep_alive = head.keep_alive;
                if head.ends {
                    lease.announced_end();
                }
                // Whatever the status is: what says that it upgrades does (Envoy `ConnectionImpl::onHeadersCompleteImpl`).
                let tunnel = match tunnel {
                    Tunnel::No => false,
                    Tunnel::Connect => (200..300).contains(&head.status),
                    Tunnel::Upgrade if head.upgrade && is_h2c(&head.headers) => {
                        head.headers.remove("upgrade");
                        head.headers.remove("connection");
                        false
                    }
                    Tunnel::Upgrade => head.upgrade,
                };
                let body = if tunnel {
                    *keep_alive = false;
                    conn.borrow_mut().switch_to_raw();
                    RecvBody::H1(conn.clone())
                } else if conn.borrow().body_done() {
                    RecvBody::Empty
                } else {
                    RecvBody::H1(conn.clone())
                };
                let reply = Box::new(Reply {
                    status: head.status,
                    headers: head.headers,
                    body,
                    header_bytes: head.fields,
                    interim: false,
                    tunnel,
                });
                let Response::H1 { lease, keep_alive, .. } = std::mem::replace(self, Response::taken()) else {
                    return Poll::Ready(Err(Failure::Terminated));
                };
                *self = Response::Taken { reusable: keep_alive, lease: Some(lease), _h2: None };
                Poll::Ready(Ok(reply))
            }
            Response::H2 { stream, connection, tunnel, upgrade } => {
                let mut headers = match ready!(stream.poll_item(cx)) {
                    Ok(Item::Head(headers, _)) => headers,
                    Ok(_) => return Poll::Ready(Err(Failure::Protocol(http2::VIOLATION))),
                    Err(broken) => return Poll::Ready(Err(connection.failure(broken))),
                };
                let mut status = headers.status().unwrap_or_default();
                if (100..200).contains(&status) {
                    let bytes = header_bytes(&headers, 3);
                    headers.remove(":status");
                    return Poll::Ready(Ok(Box::new(Reply::interim(status, headers, bytes))));
                }
                let tunnel = match tunnel {
                    Tunnel::No => false,
                    Tunnel::Connect => (200..300).contains(&status),
                    Tunnel::Upgrade => status == 200,
                };
                if let Some(upgrade) = upgrade.take().filter(|_| tunnel) {
                    status = 101;
                    headers.set_status(status);
                    headers.push(b"upgrade", &upgrade);
                    headers.push(b"connection", b"upgrade");
                }
                if tunnel && headers.get("content-length") == Some(b"0") {
                    // Of a tunnel that says nothing, and the codec of Envoy leaves it out.
                    headers.remove("content-length");
                }
                headers.join_single();
                if !connection.accepts(&headers) {
                    // Envoy calls that the peer's reset.
                    stream.reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(Err(Failure::Reset));
                }
                let body = RecvBody::h2(stream.clone());
                let header_bytes = header_bytes(&headers, 3);
                let reply = Box::new(Reply { status, headers, body, header_bytes, interim: false, tunnel });
                if let Response::H2 { connection, .. } = std::mem::replace(self, Response::taken()) {
                    *self = Response::Taken { lease: None, reusable: false, _h2: Some(connection) };
                }
                Poll::Ready(Ok(reply))
            }
            Response::Taken { .. } => Poll::Pending,
        }
    }

    /// The exchange is over and both sides complete: the connection may serve the next request.
    pub(crate) fn finish(&mut self) {
        if let Response::Taken { lease, reusable: true, .. } = self
            && let Some(lease) = lease.take()
            && lease.conn().borrow().body_done()
        {
            lease.release();
        } else if let Response::Taken { lease: Some(lease), .. } = self {
            lease.served();
        }
    }
}

/// A whole request and answer in memory, for what the proxy asks itself (JWKS, ext_authz). `limit` bounds the answer's body.
/// `on_head` is told the answer's head, whatever becomes of its body.
pub(crate) async fn call(
    acquired: Acquired,
    mut headers: Headers,
    body: Bytes,
    limit: usize,
    on_head: impl FnOnce(u16, &Headers),
) -> Result<(u16, Headers, Bytes), Failure> {
    let mut upstream = Upstream::start(acquired, &mut headers, body.is_empty(), Tunnel::No, false)?;
    if !body.is_empty() {
        upstream.send.push(Frame::Data(body));
        upstream.send.end(false);
    }
    std::future::poll_fn(|cx| upstream.send.poll_flush(cx)).await.map_err(Failure::from)?;
    let mut reply = loop {
        let reply = std::future::poll_fn(|cx| upstream.response.poll_head(cx)).await?;
        if !reply.interim {
            break reply;
        }
    };
    on_head(reply.status, &reply.headers);
    let mut data = Vec::new();
    loop {
        match std::future::poll_fn(|cx| reply.body.poll_frame(cx)).await {
            Some(Ok(Frame::Data(bytes))) => {
                if data.len() + bytes.len() > limit {
                    return Err(Failure::Terminated);
                }
                data.extend_from_slice(&bytes);
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                for (name, value) in trailers.iter_regular() {
                    reply.headers.push(name, value);
                }
            }
            Some(Err(e)) => return Err(e.into()),
            None => break,
        }
    }
    upstream.response.finish();
    Ok((reply.status, reply.headers, data.into()))
}
