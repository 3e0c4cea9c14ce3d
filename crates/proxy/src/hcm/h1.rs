//! Downstream HTTP/1: one request after the other on a connection.

use super::Http;
use super::exchange::{self, Exchange};
use super::respond::{Answer, H1Answer};
use super::timers::{Deadline, Timers};
use crate::h1::{Conn, HeadError, ReadError, RequestHead, Shared, Style};
use crate::io::Io;
use crate::stats::HTTP1_CODEC;
use crate::stream::RecvBody;
use proxy_core::Headers;
use proxy_core::stream_info::HttpProtocol;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;

pub(super) async fn serve(http: Rc<Http>, io: Io) {
    http.stats.downstream_cx_http1_total.inc();
    http.stats.downstream_cx_http1_active.inc();
    http.worker.named_stats().touch_all(&HTTP1_CODEC);
    let mut conn = Conn::new(io);
    conn.style = Style::of(&http.config.http1);
    let conn: Shared = Rc::new(RefCell::new(conn));
    let end = {
        let (mut requests, mut cut) = (pin!(requests(&http, &conn)), pin!(http.chain.cut()));
        poll_fn(|cx| {
            if http.end.get().is_none() && cut.as_mut().poll(cx).is_ready() {
                // What is under way finds that nobody is there any more.
                http.end.set(Some(super::End::Cut));
                conn.borrow().io.cut();
            }
            requests.as_mut().poll(cx)
        })
        .await
    };
    http.stats.downstream_cx_http1_active.dec();
    let (read, written) = {
        let conn = conn.borrow();
        (conn.bytes_read, conn.bytes_written)
    };
    http.received.set(read);
    http.sent.set(written);
    http.stats.downstream_cx_rx_bytes_total.add(read);
    http.stats.downstream_cx_tx_bytes_total.add(written);
    close(&http, conn, end).await;
}

/// How a connection ends.
enum End {
    /// The peer closed, or everything was said.
    Clean,
    /// An answer is on its way while the peer may still send: give it time to read (delayed close).
    Delayed,
}

async fn close(http: &Http, conn: Shared, end: End) {
    // From here on it does not grow older (Envoy `ConnectionManagerImpl::doConnectionClose`).
    http.too_old();
    http.aged.set(true);
    let Ok(conn) = Rc::try_unwrap(conn) else { return };
    let mut conn = conn.into_inner();
    match end {
        End::Clean => {
            if !conn.at_eof() {
                shut(http, &mut conn).await;
            }
        }
        End::Delayed => {
            // As Envoy: the end is only said after the peer closed, or after the timeout.
            if conn.at_eof() {
                http.count_end();
                return;
            }
            let Some(wait) = http.config.delayed_close_timeout.filter(|wait| !wait.is_zero()) else {
                return shut(http, &mut conn).await;
            };
            let drain = poll_fn(|cx| conn.poll_drain(cx));
            if tokio::time::timeout(wait, drain).await.is_err() {
                http.stats.downstream_cx_delayed_close_timeout.inc();
                http.stats.downstream_cx_destroy_local.inc();
            } else {
                http.stats.downstream_cx_destroy_remote.inc();
            }
        }
    }
}

/// Ends the connection from this side.
async fn shut(http: &Http, conn: &mut Conn) {
    http.stats.downstream_cx_destroy_local.inc();
    // Nothing can be done about a peer that does not take the end.
    let _ = tokio::time::timeout(Duration::from_secs(1), conn.io.shutdown()).await;
}

/// Answers that may wait to be written while more requests stand behind them (Envoy's `max_outbound_responses`).
const MAX_QUEUED: u32 = 2;

async fn requests(http: &Rc<Http>, conn: &Shared) -> End {
    let limits = http.head_limits();
    // Made once for all requests: to set and unset timers for each costs more than to parse it.
    let mut timers = Timers::default();
    let keep = Rc::new(Cell::new(true));
    // Answers since bytes last came. Envoy writes them once it has looked at all that had come.
    let mut queued = 0;
    loop {
        let before = conn.borrow().wire();
        let read = conn.borrow().bytes_read;
        if queued == MAX_QUEUED && conn.borrow().has_more() {
            return flooded(http, conn, before);
        }
        let head = match next_head(http, conn, before, &limits, &mut timers).await {
            Next::Head(head) => *head,
            Next::End(end) => return end,
        };
        let came = conn.borrow().bytes_read;
        if came > read {
            queued = 0;
        }
        begin(http);
        let RequestHead { headers, keep_alive, http10, upgrade, expect_continue, absolute, dropped, fields, .. } = head;
        if dropped > 0 {
            http.worker.named_stats().add("http1.dropped_headers_with_underscores", dropped);
        }
        let method = headers.get(":method");
        let (head_request, connect) = (method == Some(b"HEAD"), method == Some(b"CONNECT"));
        if upgrade || connect {
            // What follows is the tunnel's; if it is refused, the connection ends.
            conn.borrow_mut().switch_to_raw();
        }
        let body = if conn.borrow().body_done() { RecvBody::Empty } else { RecvBody::H1(conn.clone()) };
        keep.set(keep_alive);
        let answer = Answer::H1(H1Answer { conn: conn.clone(), head_request, http10, keep: keep.clone(), before });
        let protocol = if http10 { HttpProtocol::Http10 } else { HttpProtocol::Http11 };
        http.spoken.set(Some(protocol));
        let header_bytes = Some(fields);
        let hints = exchange::Hints { upgrade, connect, expect_continue, absolute, header_bytes };
        // In a box, so that a connection that waits for its next request has no memory for one, and all requests use the same.
        let outcome = Box::pin(exchange::serve(http.clone(), protocol, headers, answer, hints, body)).await;
        if outcome == exchange::Outcome::Aborted {
            // To a peer that is gone nothing is said. One that asked for the end, or was told of it, has it.
            return if !keep.get() && conn.borrow().body_done() { End::Clean } else { End::Delayed };
        }
        queued = match outcome {
            exchange::Outcome::AtOnce => queued + 1,
            _ if came == conn.borrow().bytes_read => 1,
            _ => 0,
        };
        let complete = conn.borrow().body_done();
        if outcome == exchange::Outcome::Tunnel {
            if conn.borrow().at_eof() {
                http.count_end();
                http.count_end_of_active();
                return End::Clean;
            }
            return End::Delayed;
        }
        // As Envoy: once the whole request was read, nothing can race with the end, and it need not wait.
        if !complete {
            return if conn.borrow().at_eof() { End::Clean } else { End::Delayed };
        }
        if !keep.get() {
            // While a listener or the connection drains, the answer says so, but the client may have sent its next request
            // already: the end comes after the drain timeout (Envoy `ConnectionManagerImpl::startDrainSequence`).
            let last = http.config.max_requests_per_connection.is_some_and(|max| http.requests.get() >= max);
            if last || !(keep_alive && (http.drained.get() || http.ending.get().is_some())) {
                return if outcome == exchange::Outcome::AtOnce { End::Delayed } else { End::Clean };
            }
            http.ending.set(http.ending.get().or_else(|| Some(Instant::now())));
        }
    }
}

/// Ends a connection whose peer asks on without reading (Envoy `ServerConnectionImpl::doFloodProtectionChecks`).
fn flooded(http: &Rc<Http>, conn: &Shared, before: (u64, u64)) -> End {
    http.worker.named_stats().inc("http1.response_flood");
    let details = "codec_error:Too_many_responses_queued.";
    http.end.set(Some(super::End::Codec { details, blamed: None }));
    http.stats.downstream_cx_destroy_active_rq.inc();
    http.stats.downstream_cx_destroy_local_active_rq.inc();
    count_unread(http, conn, before);
    End::Delayed
}

/// Counts and logs a request of which nothing is known.
fn count_unread(http: &Rc<Http>, conn: &Shared, before: (u64, u64)) {
    http.stats.downstream_rq_http1_total.inc();
    http.requests.set(http.requests.get() + 1);
    let (received, _) = conn.borrow().wire_since(before);
    exchange::abandoned(http, HttpProtocol::Http11, received);
}

enum Next {
    Head(Box<RequestHead>),
    End(End),
}

/// Waits for a request head within the idle timeout, then within the header timeout.
async fn next_head(
    http: &Rc<Http>,
    conn: &Shared,
    before: (u64, u64),
    limits: &crate::h1::Limits,
    timers: &mut Timers,
) -> Next {
    match wait_for_request(http, conn, timers).await {
        Waited::Bytes => {}
        Waited::End(end) => return Next::End(end),
    }
    let mut read = poll_fn(|cx| conn.borrow_mut().poll_request(cx, limits));
    // Mostly it is all there.
    let at_once = poll_fn(|cx| match Pin::new(&mut read).poll(cx) {
        Poll::Ready(head) => Poll::Ready(Some(head)),
        Poll::Pending => Poll::Ready(None),
    });
    let head = match at_once.await {
        Some(head) => head,
        None => match Box::pin(rest_of_head(http, read)).await {
            Ok(head) => head,
            Err(error) => return Next::End(Box::pin(refuse(http, conn, before, error, false)).await),
        },
    };
    match head {
        Ok(Some(head)) => Next::Head(head),
        Ok(None) => {
            http.count_end();
            Next::End(End::Clean)
        }
        Err(ReadError::Syntax(error)) => Next::End(Box::pin(refuse(http, conn, before, error, true)).await),
        Err(_) => {
            http.count_end();
            http.count_end_of_active();
            count_unread(http, conn, before);
            Next::End(End::Clean)
        }
    }
}

/// Waits for the rest of a head; `Err`: it did not come in time.
async fn rest_of_head<T>(http: &Http, read: impl Future<Output = T>) -> Result<T, HeadError> {
    let (config, stats) = (&http.config, &http.stats);
    // All of them run from the first byte.
    let first = [
        (config.request_headers_timeout, "request_header_timeout", &stats.downstream_rq_header_timeout),
        (config.request_timeout, "request_overall_timeout", &stats.downstream_rq_timeout),
        (config.stream_idle_timeout, "stream_idle_timeout", &stats.downstream_rq_idle_timeout),
        (config.max_stream_duration, "max_duration_timeout", &stats.downstream_rq_max_duration_reached),
    ]
    .into_iter()
    .filter_map(|(after, detail, counter)| Some((after.filter(|after| !after.is_zero())?, detail, counter)))
    .min_by_key(|(after, ..)| *after);
    let Some((after, detail, counter)) = first else { return Ok(read.await) };
    tokio::time::timeout(after, read).await.map_err(|_| {
        counter.inc();
        HeadError::new(408, detail)
    })
}

enum Waited {
    Bytes,
    End(End),
}

/// Waits for the first byte of a request. A connection that idles or is too old ends at once before its first request,
/// later after the drain timeout, in which it would serve one more (Envoy `ConnectionManagerImpl::onIdleTimeout`).
async fn wait_for_request(http: &Rc<Http>, conn: &Shared, timers: &mut Timers) -> Waited {
    let first = http.requests.get() == 0;
    timers.waited();
    timers.set(Deadline::Idle, http.config.idle_timeout);
    let left = |max: Duration| max.saturating_sub(http.since.elapsed());
    timers.set(Deadline::Stream, http.max_duration.filter(|_| !http.aged.get()).map(left));
    // From when the end was first announced: a client that goes on asking does not put it off.
    let left = |since: Instant| http.drain_timeout.saturating_sub(since.elapsed());
    timers.set(Deadline::Global, http.ending.get().map(left));
    loop {
        let passed = tokio::select! {
            biased;
            () = poll_fn(|cx| conn.borrow_mut().poll_news(cx)) => return Waited::Bytes,
            passed = poll_fn(|cx| timers.poll(cx)) => passed,
        };
        match passed {
            Deadline::Idle => http.stats.downstream_cx_idle_timeout.inc(),
            Deadline::Stream => {
                http.too_old();
            }
            // The drain timeout.
            _ => return Waited::End(End::Delayed),
        }
        if first {
            return Waited::End(End::Clean);
        }
        http.ending.set(http.ending.get().or_else(|| Some(Instant::now())));
        timers.set(Deadline::Global, http.ending.get().map(left));
    }
}

/// Counts a request of the connection, whatever comes of it.
fn begin(http: &Http) {
    http.requests.set(http.requests.get() + 1);
    if http.config.max_requests_per_connection == Some(http.requests.get()) {
        http.stats.downstream_cx_max_requests_reached.inc();
    }
}

/// Answers a head that was refused, and ends the connection.
async fn refuse(http: &Rc<Http>, conn: &Shared, before: (u64, u64), error: HeadError, protocol: bool) -> End {
    if protocol {
        http.stats.downstream_cx_protocol_error.inc();
        http.broken.set(true);
    }
    if error.detail == "http1.unexpected_underscore" {
        http.worker.named_stats().inc("http1.requests_rejected_with_underscores_in_headers");
    }
    begin(http);
    let keep = Rc::new(Cell::new(false));
    // To Envoy, an end that comes with the bytes comes before an answer to them.
    let ended = poll_fn(|cx| Poll::Ready(conn.borrow_mut().poll_peer_closed(cx).is_ready())).await;
    if ended {
        conn.borrow_mut().mute();
    }
    let http10 = error.http10;
    let answer = Answer::H1(H1Answer { conn: conn.clone(), head_request: false, http10, keep, before });
    let hints = exchange::Hints { header_bytes: Some(error.fields), ..exchange::Hints::default() };
    let exchange = Exchange::new(http, HttpProtocol::Http11, Headers::new(), answer, hints);
    exchange.refuse(error.status, error.detail, protocol).await;
    End::Delayed
}
