//! What filters do to the answer on its way back: header changes, sessions, slowed bodies, counted gRPC messages.

use super::exchange::Exchange;
use super::filters;
use crate::stream::{BodyError, Frame, RecvBody};
use mesh_types::ArcStr;
use proxy_core::filters::{
    HeaderMutation, HealthCheckFilter, HttpFilter, HttpFilterEntry, PerFilter, SessionCounters, StatefulSession,
};
use proxy_core::{FormatContext, Headers};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::Sleep;

/// A session that the request brought, or would get.
pub(crate) struct Session {
    pub(crate) config: Arc<StatefulSession>,
    /// The host it names.
    pub(crate) wanted: Option<String>,
    /// Whether the answer names one.
    applies: bool,
    /// Whether the settings are the filter's own, which count.
    own: bool,
}

impl Session {
    /// `config`: what holds for the request; `filter`: the filter's own.
    pub(super) fn begin(config: &Arc<StatefulSession>, filter: &Arc<StatefulSession>, request: &Headers) -> Self {
        Self {
            config: config.clone(),
            wanted: config.wanted(request, unix_seconds()),
            applies: config.applies_to(request.path().unwrap_or_default()),
            own: Arc::ptr_eq(config, filter),
        }
    }

    /// Counts what became of it.
    pub(super) fn count(&self, exchange: &Exchange, counter: fn(&SessionCounters) -> &ArcStr) {
        if let Some(counters) = self.config.counters.as_ref().filter(|_| self.own) {
            exchange.http.stats.other.inc(counter(counters));
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A field that a filter wants on the answer.
pub(crate) struct AddToAnswer {
    pub(crate) name: String,
    pub(crate) value: Vec<u8>,
    pub(crate) how: Addition,
}

/// What becomes of fields of that name that are there.
#[derive(Clone, Copy)]
pub(crate) enum Addition {
    /// They go.
    Set,
    /// They stay, and this is added.
    Append,
    /// They stay, instead of this.
    IfAbsent,
    /// They go; without any this is not added.
    IfPresent,
}

impl AddToAnswer {
    pub(crate) fn set(name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self { name: name.into(), value: value.into(), how: Addition::Set }
    }

    pub(super) fn apply(&self, headers: &mut Headers) {
        let there = headers.contains(&self.name);
        match self.how {
            Addition::Append => headers.add(&self.name, &self.value),
            Addition::IfAbsent if there => {}
            Addition::IfPresent if !there => {}
            Addition::Set | Addition::IfAbsent | Addition::IfPresent => headers.set(&self.name, &self.value),
        }
    }
}

/// Lets the filters change the head of the answer, the last one first.
pub(super) fn head(exchange: &mut Exchange, headers: &mut Headers) {
    let http = exchange.http.clone();
    for entry in exchange.filters(&http.config).iter().rev() {
        filters::pass_over(exchange, entry, Some(headers));
        if let HttpFilter::Composite(_) = entry.filter {
            let Some(acting) = filters::delegates(exchange, entry).cloned() else { continue };
            acting.iter().rev().for_each(|filter| head_of(exchange, filter, headers));
        } else {
            head_of(exchange, entry, headers);
        }
    }
}

/// Lets one filter change the head of the answer.
fn head_of(exchange: &mut Exchange, entry: &HttpFilterEntry, headers: &mut Headers) {
    match &entry.filter {
        HttpFilter::HeaderMutation(own) => {
            let (enabled, _) = filters::settings(exchange, entry);
            if !enabled {
                return;
            }
            let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
            for changes in filters::mutations(own, exchange.matched.as_deref(), &entry.name) {
                changes.response.apply_to_response(headers, &cx);
            }
        }
        HttpFilter::HeaderToMetadata(own) => {
            let (enabled, per) = filters::settings(exchange, entry);
            let rules = match &per {
                _ if !enabled => return,
                Some(PerFilter::HeaderToMetadata(route)) => &route.response,
                _ => &own.response,
            };
            let http = exchange.http.clone();
            let count = |name: &str| http.worker.named_stats().inc(name);
            rules.apply(headers, &mut exchange.info.dynamic_metadata, count);
        }
        HttpFilter::GrpcWeb => exchange.web.iter().for_each(|web| web.head(headers)),
        HttpFilter::StatefulSession(_) => {
            let Some(session) = &exchange.session else { return };
            let Some(host) = &exchange.info.upstream.host else { return };
            if !session.applies {
                session.count(exchange, |counters| &counters.no_session);
                return;
            }
            let host = host.address.to_string();
            if session.wanted.as_deref() == Some(&*host) {
                session.count(exchange, |counters| &counters.routed);
                return;
            }
            // A session that begins is, to Envoy, one that led nowhere.
            if session.config.strict.is_none() {
                session.count(exchange, |counters| &counters.failed_open);
            }
            if let Some((name, value)) = session.config.remember(&host, unix_seconds()) {
                headers.push(name.as_bytes(), value.as_bytes());
            }
        }
        HttpFilter::HealthCheck(check) if filters::settings(exchange, entry).0 => {
            health_check(exchange, check, headers);
        }
        _ => {}
    }
}

/// Lets the filters change the request's trailers.
pub(super) fn request_trailers(exchange: &Exchange, trailers: &mut Headers) {
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
    let all = exchange.filters(&exchange.http.config).iter();
    for entry in all.flat_map(|entry| filters::acting(exchange, entry)) {
        each_mutation(exchange, entry, |changes| changes.request_trailers.apply_to_trailers(trailers, &cx));
    }
}

/// Lets the filters change the answer's trailers, the last one first.
pub(super) fn response_trailers(exchange: &Exchange, trailers: &mut Headers) {
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), exchange.response.as_ref());
    let all = exchange.filters(&exchange.http.config).iter().rev();
    for entry in all.flat_map(|entry| filters::acting(exchange, entry).iter().rev()) {
        each_mutation(exchange, entry, |changes| changes.response_trailers.apply_to_trailers(trailers, &cx));
    }
}

fn each_mutation(exchange: &Exchange, entry: &HttpFilterEntry, change: impl FnMut(&HeaderMutation)) {
    if let HttpFilter::HeaderMutation(own) = &entry.filter
        && filters::settings(exchange, entry).0
    {
        filters::mutations(own, exchange.matched.as_deref(), &entry.name).for_each(change);
    }
}

/// Tells who answered a health check, and others that this proxy wants no more traffic.
fn health_check(exchange: &Exchange, check: &HealthCheckFilter, headers: &mut Headers) {
    let shared = &exchange.http.worker.shared;
    if exchange.info.health_check {
        // What the proxy said itself stands for other checks, too.
        if exchange.info.response_code_details.as_deref() != Some("health_check_cached") {
            check.remember(headers.status().unwrap_or(503), headers.contains("x-envoy-degraded"), Instant::now());
        }
        headers.set("x-envoy-upstream-healthchecked-cluster", shared.node.cluster.as_bytes());
    }
    if shared.health_failed.load(Ordering::Relaxed) {
        headers.set("x-envoy-immediate-health-check-fail", b"true");
    }
}

/// How often a slowed body gets new bytes (Envoy `StreamRateLimiter`: 16 times a second).
const TICK: Duration = Duration::from_micros(62_500);

/// Lets a body through at a fixed rate.
pub(crate) struct Throttle {
    /// Bytes each tick.
    share: usize,
    left: usize,
    /// What the upstream sent so far, up to `limit` bytes.
    held: VecDeque<Frame>,
    size: usize,
    limit: usize,
    /// The upstream has said all.
    ended: bool,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Throttle {
    /// `limit`: how much is read ahead.
    pub(super) fn new(kib_per_second: u64, limit: usize) -> Self {
        let share = usize::try_from(kib_per_second.saturating_mul(64)).unwrap_or(usize::MAX);
        // The first bytes come with the first tick.
        let sleep = Some(Box::pin(tokio::time::sleep(TICK)));
        Self { share, left: 0, held: VecDeque::new(), size: 0, limit, ended: false, sleep }
    }

    /// Whether the upstream has said all, whatever of it is still held: its timeouts are over then.
    pub(super) fn has_read_all(&self) -> bool {
        self.ended
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>, body: &mut RecvBody) -> Poll<Option<Result<Frame, BodyError>>> {
        while !self.ended && self.size < self.limit {
            match body.poll_frame(cx) {
                Poll::Ready(Some(Ok(Frame::Data(data)))) if data.is_empty() => {}
                Poll::Ready(Some(Ok(frame))) => {
                    if let Frame::Data(data) = &frame {
                        self.size += data.len();
                    }
                    self.held.push_back(frame);
                }
                Poll::Ready(None) => self.ended = true,
                Poll::Ready(failed) => return Poll::Ready(failed),
                Poll::Pending => break,
            }
        }
        let mut data = match self.held.pop_front() {
            Some(Frame::Data(data)) => data,
            Some(trailers) => return Poll::Ready(Some(Ok(trailers))),
            None if self.ended => return Poll::Ready(None),
            None => return Poll::Pending,
        };
        while self.left == 0 {
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(TICK)));
            if sleep.as_mut().poll(cx).is_pending() {
                self.held.push_front(Frame::Data(data));
                return Poll::Pending;
            }
            self.sleep = None;
            self.left = self.share;
        }
        let now = data.split_to(data.len().min(self.left));
        self.left -= now.len();
        self.size -= now.len();
        if !data.is_empty() {
            self.held.push_front(Frame::Data(data));
        }
        Poll::Ready(Some(Ok(Frame::Data(now))))
    }
}

/// Counts the messages of a gRPC body: five bytes (flags, length), then the message.
#[derive(Debug, Default)]
pub(crate) struct GrpcMessages {
    pub(crate) count: u64,
    prefix: [u8; 5],
    have: usize,
    rest: usize,
}

impl GrpcMessages {
    pub(super) fn look(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.rest > 0 {
                let skip = self.rest.min(data.len());
                self.rest -= skip;
                data = &data[skip..];
                continue;
            }
            self.prefix[self.have] = data[0];
            data = &data[1..];
            self.have += 1;
            if self.have == 5 {
                self.have = 0;
                self.count += 1;
                let [_, length @ ..] = self.prefix;
                self.rest = u32::from_be_bytes(length) as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_over_any_cuts() {
        let bytes = [&[0, 0, 0, 0, 2, 1, 1][..], &[0, 0, 0, 0, 0], &[1, 0, 0, 0, 1, 9]].concat();
        for cut in 1..bytes.len() {
            let mut messages = GrpcMessages::default();
            for part in bytes.chunks(cut) {
                messages.look(part);
            }
            assert_eq!(messages.count, 3);
        }
    }
}
