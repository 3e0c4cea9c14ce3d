//! TCP inside an HTTP request to the cluster: CONNECT or POST (`tcp_proxy.tunneling_config`).

use super::copy::{Ended, Side, Transfer, watched};
use crate::h1;
use crate::io::Io;
use crate::stream::{BodyError, Framing, Pump, PumpError, RecvBody, SendBody};
use crate::upstream::{self, AcquireError, ConnectError, Failure, Pool, Reply, Upstream};
use proxy_core::Headers;
use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;

/// A request whose body is the client's bytes, and whose answer's body goes to the client.
pub(super) struct Tunnel {
    pub(super) upstream: Box<Upstream>,
    reply: Box<Reply>,
}

/// Sends the request and waits for a 2xx that does not end at once.
pub(super) async fn open(pool: &Rc<Pool>, mut headers: Headers) -> Result<Tunnel, AcquireError> {
    let connect = match headers.method() {
        Some("CONNECT") => upstream::Tunnel::Connect,
        _ => upstream::Tunnel::No,
    };
    let acquired = pool.acquire().await?;
    let failed = |reason: &str| AcquireError::Connect(ConnectError { timeout: false, reason: reason.to_owned() });
    let gone = |_: Failure| failed("");
    let mut upstream = Upstream::start(acquired, &mut headers, false, connect, false).map_err(gone)?;
    let reply = poll_fn(|cx| {
        if let Poll::Ready(Err(e)) = upstream.send.poll_flush(cx) {
            return Poll::Ready(Err(Failure::from(e)));
        }
        loop {
            match upstream.response.poll_head(cx) {
                Poll::Ready(Ok(reply)) if reply.interim => {}
                other => return other,
            }
        }
    });
    let reply = reply.await.map_err(gone)?;
    if (200..300).contains(&reply.status) && !reply.body.is_empty() {
        Ok(Tunnel { upstream, reply })
    } else {
        upstream.send.reset(h2::Reason::INTERNAL_ERROR);
        Err(failed(&format!("tunnel_response:{}", reply.status)))
    }
}

impl Tunnel {
    /// Moves bytes both ways, as `copy::both` does on plain connections.
    pub(super) async fn run(
        self,
        down: Io,
        transfer: &Transfer,
        mut gate: Option<&mut dyn FnMut() -> Result<(), String>>,
    ) -> Ended {
        let Tunnel { mut upstream, reply } = self;
        let mut conn = h1::Conn::new(down);
        conn.switch_to_raw();
        let conn: h1::Shared = Rc::new(RefCell::new(conn));
        let mut from_client = RecvBody::H1(conn.clone());
        let mut from_server = reply.body;
        let mut to_client = SendBody::H1 { conn: conn.clone(), framing: Framing::Raw };
        let (mut there, mut back) = (Pump::new(), Pump::new());
        let (mut there_done, mut back_done) = (false, false);
        watched(transfer, |cx| {
            if let Some(check) = &mut gate
                && conn.borrow_mut().io.poll_first_byte(cx).is_ready()
            {
                if let Err(details) = check() {
                    return Poll::Ready(Ended::Denied(details));
                }
                gate = None;
            }
            if gate.is_none() && !there_done {
                let moved = direction(cx, &mut there, &mut from_client, &mut upstream.send);
                transfer.received.set(there.bytes);
                match moved {
                    Poll::Ready(Ok(())) => there_done = true,
                    Poll::Ready(Err(PumpError::Source(_))) => return Poll::Ready(Ended::Failed(Side::Downstream)),
                    Poll::Ready(Err(PumpError::Sink(_))) => return Poll::Ready(Ended::Failed(Side::Upstream)),
                    Poll::Pending => {}
                }
            }
            if !back_done {
                let moved = direction(cx, &mut back, &mut from_server, &mut to_client);
                transfer.sent.set(back.bytes);
                match moved {
                    Poll::Ready(Ok(())) => back_done = true,
                    Poll::Ready(Err(PumpError::Source(_))) => return Poll::Ready(Ended::Failed(Side::Upstream)),
                    Poll::Ready(Err(PumpError::Sink(_))) => return Poll::Ready(Ended::Failed(Side::Downstream)),
                    Poll::Pending => {}
                }
            }
            if there_done && back_done { Poll::Ready(Ended::Complete(Side::Upstream)) } else { Poll::Pending }
        })
        .await
    }
}

/// Moves one way; at the end a raw connection is closed for writing.
fn direction(
    cx: &mut Context<'_>,
    pump: &mut Pump,
    from: &mut RecvBody,
    to: &mut SendBody,
) -> Poll<Result<(), PumpError>> {
    std::task::ready!(pump.poll(cx, |cx| from.poll_frame(cx), to))?;
    match to {
        SendBody::H1 { conn, framing: Framing::Raw } => {
            let end = std::task::ready!(Pin::new(&mut conn.borrow_mut().io).poll_shutdown(cx));
            // A peer that is gone already cannot be told; its own direction shows that.
            Poll::Ready(end.or(Ok::<(), BodyError>(())).map_err(PumpError::Sink))
        }
        _ => Poll::Ready(Ok(())),
    }
}
