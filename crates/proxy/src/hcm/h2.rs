//! Downstream HTTP/2 on the `h2` crate: one task per stream.

mod flood;
#[cfg(test)]
mod fuzz;
mod guard;
mod late;
mod seen;
mod switch;

use super::exchange::{self, Exchange};
use super::respond::{Answer, H2Answer};
use super::{End, Http};
use crate::batch::{Batch, Outlet};
use crate::h1::UnderscoreAction;
use crate::io::Io;
use crate::keepalive::{KEEPALIVE_TIMEOUT, Pinger, Pulse};
use crate::stats::{Counter, HTTP2_CODEC, HTTP2_GAUGES};
use crate::stream::{RecvBody, push_map};
use bytes::Bytes;
use guard::{Guard, Settings};
use proxy_core::Headers;
use proxy_core::stream_info::HttpProtocol;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use switch::{Fault, Switch};
use tokio::time::Instant;

pub(crate) use late::Late;

/// Resets of its own streams that a peer may pile up before the connection ends (CVE-2023-44487).
const MAX_RESETS: usize = 100;

pub(super) async fn serve(http: Rc<Http>, io: Io) {
    http.stats.downstream_cx_http2_total.inc();
    http.stats.downstream_cx_http2_active.inc();
    let (io, outlet) = Batch::new(io, false);
    let switch = requests(&http, io, &outlet).await;
    // As Envoy, a connection that ends here has time to hear of it.
    let wait = http.config.delayed_close_timeout.filter(|wait| !wait.is_zero() && !switch.is_abrupt());
    let by_peer = match wait {
        _ if switch.is_by_peer() => true,
        Some(wait) => {
            let left = tokio::time::timeout(wait, std::future::poll_fn(|cx| outlet.poll_drain(cx))).await;
            if left.is_err() {
                http.stats.downstream_cx_delayed_close_timeout.inc();
            }
            left.is_ok()
        }
        None => false,
    };
    if by_peer {
        http.stats.downstream_cx_destroy_remote.inc();
    } else {
        http.stats.downstream_cx_destroy_local.inc();
        if !switch.is_abrupt() {
            // Nothing can be done about a peer that does not take the end.
            let _ = tokio::time::timeout(Duration::from_secs(1), std::future::poll_fn(|cx| outlet.poll_end(cx))).await;
        }
    }
    http.stats.downstream_cx_http2_active.dec();
}

/// What the codec of Envoy says of malformed fields, and of messages that lack some or have them twice.
pub(super) const INVALID_FIELD: &str = "http2.invalid.header.field";
pub(super) const VIOLATION: &str = "http2.violation.of.messaging.rule";
/// And of streams whose connection ends for what another one did.
const BROKEN: &str = "codec_error:The_user_callback_function_failed";

async fn requests(http: &Rc<Http>, io: Batch, outlet: &Outlet) -> Switch {
    let options = &http.config.http2;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(options.initial_stream_window)
        .initial_connection_window_size(options.initial_connection_window)
        .max_concurrent_streams(options.max_concurrent_streams)
        // A header block may be as large as the head limit; we answer above it, the crate refuses far above it.
        .max_header_list_size((http.config.max_request_headers_bytes * 2).max(128 * 1024))
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_send_buffer_size(256 * 1024);
    if options.allow_connect {
        builder.enable_connect_protocol();
    }
    let settings = Settings {
        table_size: options.hpack_table_size,
        connect: options.allow_connect,
        streams: options.max_concurrent_streams,
        window: options.initial_stream_window,
    };
    let stream_errors = options.stream_error_on_invalid_message || http.config.stream_error_on_invalid_message;
    http.worker.named_stats().touch_all(&HTTP2_CODEC);
    http.worker.named_stats().touch_gauges(&HTTP2_GAUGES);
    http.worker.named_stats().inc("http2.nghttp2_downstream_connections");
    let limits = flood::Limits::of(options);
    let guard = Guard::new(io, settings, limits, stream_errors, http.config.drain_timeout, Some(http.clone()));
    let switch = guard.switch();
    let handshake = builder.handshake::<Guard, Bytes>(guard);
    let mut connection = match tokio::time::timeout(Duration::from_secs(10), handshake).await {
        Ok(Ok(connection)) => connection,
        _ => {
            http.stats.downstream_cx_protocol_error.inc();
            http.broken.set(true);
            return switch;
        }
    };
    outlet.gather();
    // Idle time is only looked at before requests, which a server does not make.
    let mut pinger = options.keepalive.and_then(|keepalive| {
        let pulse = Pulse::new();
        outlet.tell(pulse.clone());
        Some(Pinger::new(keepalive, connection.ping_pong()?, pulse, http.worker.clone()))
    });
    let draining = Cell::new(false);
    let idle = http.config.idle_timeout;
    let mut idle_since = Instant::now();
    let mut cut = std::pin::pin!(http.chain.cut());
    loop {
        if flood::is_rapid_reset(http.premature_resets.get(), http.requests.get()) {
            http.stats.downstream_rq_too_many_premature_resets.inc();
            switch.end_abruptly();
            return switch;
        }
        let busy = http.active.get() > 0;
        if busy {
            idle_since = Instant::now();
        }
        let idle_end = async {
            match idle {
                Some(timeout) if !busy => tokio::time::sleep_until(idle_since + timeout).await,
                // Looked at again when the last stream ends, which wakes the connection.
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        let old = async {
            match http.config.max_connection_duration {
                Some(max) if !draining.get() => tokio::time::sleep(max.saturating_sub(http.since.elapsed())).await,
                _ => std::future::pending().await,
            }
        };
        let accept = std::future::poll_fn(|cx| {
            if http.leaves.get() && !draining.replace(true) {
                // Before the answer that made it so.
                connection.graceful_shutdown();
            }
            let mut polled = connection.poll_accept(cx);
            if switch.is_cut() && polled.is_pending() {
                // Before the streams find out.
                polled = Poll::Ready(None);
            }
            // Streams that came in together are answered together, if they can be at once.
            if polled.is_pending() {
                outlet.poll_out(cx);
            }
            for details in switch.take_resets() {
                exchange::malformed(http, details);
            }
            polled
        });
        let mut pause = None;
        let late = std::future::poll_fn(|cx| {
            let owed = switch.head().and_then(|(stream, since)| Some((stream, since, head_timeout(http)?)));
            let Some((stream, since, (after, details, counter))) = owed else {
                pause = None;
                return Poll::Pending;
            };
            let sleep = pause.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(since + after)));
            sleep.as_mut().poll(cx).map(|()| (stream, details, counter))
        });
        let silent = std::future::poll_fn(|cx| pinger.as_mut().map_or(Poll::Pending, |pinger| pinger.poll(cx)));
        tokio::select! {
            biased;
            accepted = accept => match accepted {
                Some(Ok((request, answer))) => {
                    let last = http.config.max_requests_per_connection.is_some_and(|max| http.requests.get() + 1 >= max);
                    stream(http, request, answer, &switch, stream_errors);
                    if last {
                        http.stats.downstream_cx_max_requests_reached.inc();
                        if !draining.replace(true) {
                            connection.graceful_shutdown();
                        }
                    }
                }
                Some(Err(e)) => {
                    ended(http, &switch, Some(&e));
                    tracing::debug!(error = %e, "downstream HTTP/2 connection ended");
                    return switch;
                }
                None => {
                    ended(http, &switch, None);
                    return switch;
                }
            },
            () = silent => {
                http.worker.named_stats().inc(KEEPALIVE_TIMEOUT);
                http.end.set(Some(End::Unanswered));
                if http.active.get() > 0 {
                    http.stats.downstream_cx_destroy_active_rq.inc();
                    http.stats.downstream_cx_destroy_local_active_rq.inc();
                }
                switch.end_abruptly();
                return switch;
            }
            (stream, details, counter) = late => {
                counter.inc();
                late::refuse(http, &switch, stream, details).await;
            }
            () = idle_end => {
                if http.active.get() == 0 && !draining.replace(true) {
                    http.stats.downstream_cx_idle_timeout.inc();
                    connection.graceful_shutdown();
                }
            }
            () = old => {
                http.too_old();
                draining.set(true);
                connection.graceful_shutdown();
            }
            // Which is looked at with the next poll.
            () = http.told.notified(), if !draining.get() => {}
            () = cut.as_mut() => {
                http.end.set(Some(End::Cut));
                if http.active.get() > 0 {
                    http.count_end_of_active();
                }
                switch.end_abruptly();
                return switch;
            }
        }
    }
}

/// Counts and logs what a connection ended by, and has its streams know.
fn ended(http: &Rc<Http>, switch: &Switch, error: Option<&h2::Error>) {
    let stats = &http.stats;
    // A head that is not complete, or cannot be read, is a stream to Envoy.
    let mut headless = switch.head().is_some();
    let mut malformed = false;
    match switch.fault() {
        Some(Fault::Flood(flooded)) => {
            http.end.set(Some(End::Codec { details: flooded.details(), blamed: flooded.blames() }));
        }
        fault => {
            if switch.is_cut() || error.is_some_and(h2::Error::is_library) {
                stats.downstream_cx_protocol_error.inc();
                http.end.set(Some(End::Codec { details: BROKEN, blamed: None }));
                headless |= error.and_then(h2::Error::reason) == Some(h2::Reason::COMPRESSION_ERROR);
            }
            if let Some(Fault::Trailers(stream, details)) = fault {
                http.worker.named_stats().inc("http2.rx_messaging_error");
                http.end.set(Some(End::Codec { details: BROKEN, blamed: Some((stream, details)) }));
            }
            if let Some(Fault::Message(details)) = fault {
                exchange::malformed(http, details);
                malformed = true;
            }
        }
    }
    if headless {
        exchange::abandoned(http, HttpProtocol::Http2, 0);
    }
    if headless || malformed || http.active.get() > 0 {
        stats.downstream_cx_destroy_active_rq.inc();
        match http.end.get() {
            Some(_) => stats.downstream_cx_destroy_local_active_rq.inc(),
            None => stats.downstream_cx_destroy_remote_active_rq.inc(),
        }
    }
}

/// How long a head may take, what it is to be called when it takes longer, and where that is counted.
fn head_timeout(http: &Http) -> Option<(Duration, &'static str, &Counter)> {
    let (config, stats) = (&http.config, &http.stats);
    let timeouts = [
        (config.request_headers_timeout, "request_header_timeout", &stats.downstream_rq_header_timeout),
        (config.stream_idle_timeout, "stream_idle_timeout", &stats.downstream_rq_idle_timeout),
        (config.request_timeout, "request_overall_timeout", &stats.downstream_rq_timeout),
        (config.max_stream_duration, "max_duration_timeout", &stats.downstream_rq_max_duration_reached),
    ];
    timeouts.into_iter().filter_map(|(after, details, counter)| Some((after?, details, counter))).min_by_key(|t| t.0)
}

/// Starts the exchange of one stream.
/// `switch`: ends the connection when the message is malformed, unless `stream_errors`: then only its stream ends.
fn stream(
    http: &Rc<Http>,
    request: http::Request<h2::RecvStream>,
    mut answer: h2::server::SendResponse<Bytes>,
    switch: &Switch,
    stream_errors: bool,
) {
    switch.given_out(answer.stream_id().into());
    if switch.has_answered(answer.stream_id().into()) {
        // Its head came too late. The guard keeps this to itself.
        answer.send_reset(h2::Reason::NO_ERROR);
        return;
    }
    let excess = exceeds(http, size_of(&request));
    if let (Some(details), None) = (fault(&request), excess) {
        if stream_errors {
            switch.explain(details);
            answer.send_reset(h2::Reason::PROTOCOL_ERROR);
        } else {
            switch.blame(Fault::Message(details));
        }
        return;
    }
    http.count_h2_request();
    let (parts, body) = request.into_parts();
    let mut headers = Headers::with_capacity(parts.headers.len() + 4, 768);
    headers.push(b":method", parts.method.as_str().as_bytes());
    if let Some(scheme) = parts.uri.scheme_str() {
        headers.push(b":scheme", scheme.as_bytes());
    }
    if let Some(authority) = parts.uri.authority() {
        headers.push(b":authority", authority.as_str().as_bytes());
    }
    let protocol = parts.extensions.get::<h2::ext::Protocol>().map(|p| p.as_str().to_owned());
    let connect = parts.method == http::Method::CONNECT;
    if !connect || protocol.is_some() {
        let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
        headers.push(b":path", path.as_bytes());
    }
    if let Some(protocol) = &protocol {
        headers.push(b":protocol", protocol.as_bytes());
    }
    let has_authority = headers.contains(":authority");
    if !has_authority && let Some(host) = parts.headers.get("host") {
        headers.push(b":authority", host.as_bytes());
    }
    push_map(&mut headers, &parts.headers);
    headers.remove("host");
    if headers.contains("cookie") {
        // Crumbs of one header (RFC 9113, 8.2.3), which Envoy puts behind the others.
        let crumbs = headers.get_all("cookie").filter(|crumb| !crumb.is_empty());
        let joined = crumbs.collect::<Vec<_>>().join(&b"; "[..]);
        headers.remove("cookie");
        if !joined.is_empty() {
            headers.push(b"cookie", &joined);
        }
    }
    headers.join_single();
    if let Some(protocol) = &protocol {
        // Inside it is the upgrade of HTTP/1 (Envoy `transformUpgradeRequestFromH2toH1`).
        headers.set(":method", b"GET");
        headers.remove(":protocol");
        headers.set("upgrade", protocol.as_bytes());
        headers.set("connection", b"upgrade");
        headers.remove("content-length");
    }
    let answer = Answer::H2(H2Answer { answer });
    let hints = exchange::Hints {
        upgrade: protocol.is_some(),
        connect: connect && protocol.is_none(),
        expect_continue: headers.get("expect").is_some_and(|v| v.eq_ignore_ascii_case(b"100-continue")),
        absolute: None,
        header_bytes: None,
    };
    let verdict = excess.map_or_else(|| drop_or_refuse(http, &mut headers), Err);
    let mut exchange = Exchange::new(http, HttpProtocol::Http2, headers, answer, hints);
    let worker = http.worker.clone();
    worker.h2_streams().inc();
    // In a box, for a task is moved several times until it runs, and once more when it is done.
    let work = Box::pin(async move {
        match verdict {
            Ok(()) => {
                exchange.run(RecvBody::h2(body)).await;
            }
            Err(detail) => exchange.reset(detail, h2::Reason::INTERNAL_ERROR),
        }
        worker.h2_streams().dec();
    });
    // The stream ends with its exchange; the connection's end resets it, which the exchange notices.
    tokio::task::spawn_local(work);
}

/// What Envoy's codec refuses and the crate lets through.
fn fault(request: &http::Request<h2::RecvStream>) -> Option<&'static str> {
    let (uri, headers) = (request.uri(), request.headers());
    let connect = request.method() == http::Method::CONNECT;
    let options = request.method() == http::Method::OPTIONS;
    let rooted =
        uri.path_and_query().is_none_or(|path| path.as_str().starts_with('/') || (options && path.as_str() == "*"));
    let has_host = uri.authority().is_some() || headers.contains_key("host");
    if !has_host || (!connect && !rooted) {
        return Some(VIOLATION);
    }
    let userinfo = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    let twice = |name| headers.get_all(name).iter().nth(1).is_some();
    let no_length = headers.get("content-length").is_some_and(http::HeaderValue::is_empty);
    // The crate keeps no scheme that is empty.
    let no_scheme = !connect && uri.authority().is_some() && uri.scheme().is_none();
    (userinfo || no_length || no_scheme || twice("content-length") || twice("host")).then_some(INVALID_FIELD)
}

/// Bytes and number of a head's fields as they came: each crumb of a cookie, and a `host` beside the authority.
fn size_of(request: &http::Request<h2::RecvStream>) -> (usize, usize) {
    let (uri, headers) = (request.uri(), request.headers());
    let protocol = request.extensions().get::<h2::ext::Protocol>().map(|protocol| protocol.as_str().len());
    let path = uri.path_and_query().map(|path| path.as_str().len());
    let pseudo = [
        Some((":method".len(), request.method().as_str().len())),
        // Which the crate drops when there is no authority.
        uri.scheme_str()
            .or((uri.authority().is_none()).then_some("http"))
            .map(|scheme| (":scheme".len(), scheme.len())),
        uri.authority().map(|authority| (":authority".len(), authority.as_str().len())),
        path.filter(|_| request.method() != http::Method::CONNECT || protocol.is_some())
            .map(|path| (":path".len(), path)),
        protocol.map(|protocol| (":protocol".len(), protocol)),
    ];
    let regular = headers.iter().map(|(name, value)| (name.as_str().len(), value.len()));
    let add = |(bytes, fields), (name, value)| (bytes + name + value, fields + 1);
    pseudo.into_iter().flatten().chain(regular).fold((0, 0), add)
}

/// What the codec of Envoy says, and counts, of more bytes or fields than there may be.
fn exceeds(http: &Http, (bytes, fields): (usize, usize)) -> Option<&'static str> {
    let limits = http.head_limits();
    let stats = http.worker.named_stats();
    if bytes > limits.bytes {
        stats.inc("http2.header_list_size_too_large");
        return Some("http2.header_list_size_too_large");
    }
    // Which counts the pseudo-headers.
    if fields > limits.fields {
        stats.inc("http2.header_overflow");
        return Some("http2.too_many_headers");
    }
    None
}

/// Limits and names that the codec of Envoy checks, of trailers.
pub(super) fn check(http: &Http, trailers: &mut Headers) -> Result<(), &'static str> {
    match exceeds(http, (trailers.byte_size(), trailers.len())) {
        Some(details) => Err(details),
        None => drop_or_refuse(http, trailers),
    }
}

/// Does with names that have an underscore what the configuration says.
fn drop_or_refuse(http: &Http, headers: &mut Headers) -> Result<(), &'static str> {
    let limits = http.head_limits();
    let stats = http.worker.named_stats();
    if limits.underscores != UnderscoreAction::Allow && headers.iter_regular().any(|(n, _)| n.contains(&b'_')) {
        if limits.underscores == UnderscoreAction::Reject {
            stats.inc("http2.requests_rejected_with_underscores_in_headers");
            return Err("http2.unexpected_underscore");
        }
        let dropped = headers.iter_regular().filter(|(name, _)| name.contains(&b'_')).count();
        stats.add("http2.dropped_headers_with_underscores", dropped as u64);
        headers.retain(|name, _| !name.contains(&b'_'));
    }
    Ok(())
}
