//! TCP inside an HTTP request to the cluster: CONNECT or POST (`tcp_proxy.tunneling_config`).

use super::copy::{Ended, Side, Transfer, watched};
use crate::h1;
use crate::io::Io;
use crate::stats::ClusterStats;
use crate::stream::{BodyError, Frame, Framing, Pump, PumpError, RecvBody, SendBody};
use crate::upstream::{self, AcquireError, Active, ConnectError, Failure, Pool, Upstream, WorkerCluster};
use proxy_core::FilterState;
use proxy_core::listener::Tunneling;
use proxy_core::{FormatContext, Headers, StreamInfo};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;

/// A request, which counts from its start, whose body is the client's bytes, and whose answer's body goes to the client.
pub(super) struct Tunnel {
    pub(super) upstream: Box<Upstream>,
    body: RecvBody,
    /// The answer's trailers, once they came.
    trailers: Option<Headers>,
    _active: Active,
}

/// Where filter state keeps the answer's head and trailers.
const HEADERS: &str = "envoy.tcp_proxy.propagate_response_headers";
const TRAILERS: &str = "envoy.tcp_proxy.propagate_response_trailers";

/// Keeps fields in filter state, in the form in which Envoy shows them (`TunnelResponseHeadersOrTrailers::serializeAsProto`).
fn keep(state: &mut FilterState, name: &str, fields: &Headers) {
    let text = |bytes: &[u8]| Value::from(String::from_utf8_lossy(bytes).into_owned());
    let status = fields.get(":status").map(|status| (&b":status"[..], status));
    let all = status.into_iter().chain(fields.iter_regular());
    let all: Vec<Value> = all.map(|(name, value)| json!({"key": text(name), "value": text(value)})).collect();
    state.values.insert(name.into(), json!({ "headers": all }).to_string().into());
}

/// Sends the request and waits for a 2xx that does not end at once. What is on the wire counts in `info`, whatever comes of it.
pub(super) async fn open(
    pool: &Rc<Pool>,
    config: &Tunneling,
    info: &mut StreamInfo,
    cluster: &Rc<WorkerCluster>,
) -> Result<Tunnel, AcquireError> {
    let mut headers = config.request(&FormatContext::new(info, None, None));
    let connect = match headers.method() {
        Some("CONNECT") => upstream::Tunnel::Connect,
        _ => upstream::Tunnel::No,
    };
    let acquired = pool.acquire().await?;
    let failed = |reason: &str| AcquireError::Connect(ConnectError { timeout: false, reason: reason.to_owned() });
    let gone = |_: Failure| failed("");
    let stats = &cluster.stats;
    stats.upstream_rq_total.inc();
    let active = Active::new(cluster.clone(), pool.host().clone());
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
    if config.keeps_headers {
        keep(&mut info.filter_state, HEADERS, &reply.headers);
    }
    if (200..300).contains(&reply.status) && !reply.body.is_empty() {
        Ok(Tunnel { upstream, body: reply.body, trailers: None, _active: active })
    } else {
        upstream.count_wire(&mut info.upstream, stats);
        upstream.send.reset(http2::Reason::INTERNAL_ERROR);
        Err(failed(&format!("tunnel_response:{}", reply.status)))
    }
}

impl Tunnel {
    /// Moves bytes both ways, as `copy::both` does on plain connections.
    pub(super) async fn run(
        &mut self,
        down: Io,
        transfer: &Transfer,
        mut gate: Option<&mut dyn FnMut() -> Result<(), String>>,
    ) -> Ended {
        let Tunnel { upstream, body: from_server, trailers, .. } = self;
        let mut conn = h1::Conn::new(down);
        conn.switch_to_raw();
        let conn: h1::Shared = Rc::new(RefCell::new(conn));
        let mut from_client = RecvBody::H1(conn.clone());
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
                let moved = direction(cx, &mut there, |cx| from_client.poll_frame(cx), &mut upstream.send);
                transfer.received.set(there.bytes);
                match moved {
                    Poll::Ready(Ok(())) => there_done = true,
                    Poll::Ready(Err(PumpError::Source(_))) => return Poll::Ready(Ended::Failed(Side::Downstream)),
                    Poll::Ready(Err(PumpError::Sink(_))) => return Poll::Ready(Ended::Failed(Side::Upstream)),
                    Poll::Pending => {}
                }
            }
            if !back_done {
                let read = |cx: &mut Context<'_>| {
                    let frame = from_server.poll_frame(cx);
                    if let Poll::Ready(Some(Ok(Frame::Trailers(fields)))) = &frame {
                        *trailers = Some(fields.clone());
                    }
                    frame
                };
                let moved = direction(cx, &mut back, read, &mut to_client);
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

impl Tunnel {
    /// Counts what was on the wire, and keeps the trailers.
    pub(super) fn finish(&self, config: &Tunneling, info: &mut StreamInfo, stats: &ClusterStats) {
        self.upstream.count_wire(&mut info.upstream, stats);
        // What is around the bytes in HTTP/2 nobody counts; in HTTP/1 it is the heads.
        info.upstream.wire_bytes_sent += info.bytes_received;
        info.upstream.wire_bytes_received += info.bytes_sent;
        stats.upstream_cx_tx_bytes_total.add(info.bytes_received);
        stats.upstream_cx_rx_bytes_total.add(info.bytes_sent);
        if let (true, Some(trailers)) = (config.keeps_trailers, &self.trailers) {
            keep(&mut info.filter_state, TRAILERS, trailers);
        }
    }
}

/// Moves one way; at the end a raw connection is closed for writing.
fn direction(
    cx: &mut Context<'_>,
    pump: &mut Pump,
    read: impl FnMut(&mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>>,
    to: &mut SendBody,
) -> Poll<Result<(), PumpError>> {
    std::task::ready!(pump.poll(cx, read, to))?;
    match to {
        SendBody::H1 { conn, framing: Framing::Raw } => {
            let end = std::task::ready!(Pin::new(&mut conn.borrow_mut().io).poll_shutdown(cx));
            // A peer that is gone already cannot be told; its own direction shows that.
            Poll::Ready(end.or(Ok::<(), BodyError>(())).map_err(PumpError::Sink))
        }
        _ => Poll::Ready(Ok(())),
    }
}
