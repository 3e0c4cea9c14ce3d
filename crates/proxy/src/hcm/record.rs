//! The last requests with the decision taken at each step, for `/requests` of the admin port.

use super::exchange::Exchange;
use mesh_types::ArcStr;
use proxy_core::{Address, StreamInfo};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Requests that the process remembers.
const KEPT: usize = 10_000;
/// Longer paths are cut; a ring of the longest heads must not fill the memory.
const MAX_TEXT: usize = 256;
/// Steps of one request that are remembered.
const MAX_STEPS: usize = 32;

/// One decision.
#[derive(Debug)]
pub(crate) struct Step {
    at: u32,
    what: What,
}

/// The usual decisions are only put into words when somebody asks.
#[derive(Debug)]
enum What {
    Passed(ArcStr),
    Filter(Box<(ArcStr, Cow<'static, str>)>),
    /// An RBAC filter that this policy satisfied.
    AllowedBy(Box<(ArcStr, ArcStr)>),
    /// An RBAC filter of which no policy denies it.
    NotDenied(ArcStr),
    Own(Box<(&'static str, Cow<'static, str>)>),
    /// The virtual host and the route of the record.
    Route,
    /// The record's host answered this.
    Answered(u32, u16),
    Tried(Box<(u32, String)>),
}

/// The decisions about one request, while it lasts.
#[derive(Debug, Default)]
pub(crate) struct Steps(Vec<Step>);

impl Steps {
    /// Of a request that passes so many filters, finds its route and is answered.
    pub(super) fn with_room_for(filters: usize) -> Self {
        Self(Vec::with_capacity((filters + 2).min(MAX_STEPS)))
    }

    /// A filter let the request through.
    pub(super) fn passed(&mut self, at: Duration, name: &ArcStr) {
        self.push(at, What::Passed(name.clone()));
    }

    /// An RBAC filter let the request through, because of a policy or because none denies it.
    pub(super) fn allowed(&mut self, at: Duration, name: &ArcStr, policy: Option<&ArcStr>) {
        self.push(
            at,
            match policy {
                Some(policy) => What::AllowedBy(Box::new((name.clone(), policy.clone()))),
                None => What::NotDenied(name.clone()),
            },
        );
    }

    /// So many decisions, of those that are kept.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// What a filter did.
    pub(super) fn filter(&mut self, at: Duration, name: &ArcStr, decision: impl Into<Cow<'static, str>>) {
        self.push(at, What::Filter(Box::new((name.clone(), decision.into()))));
    }

    /// What the connection manager or the router did.
    pub(super) fn own(&mut self, at: Duration, name: &'static str, decision: impl Into<Cow<'static, str>>) {
        self.push(at, What::Own(Box::new((name, decision.into()))));
    }

    /// The route is the one that the request has at its end.
    pub(super) fn route(&mut self, at: Duration) {
        self.push(at, What::Route);
    }

    /// The host that the request has at its end answered.
    pub(super) fn answered(&mut self, at: Duration, number: u32, status: u16) {
        self.push(at, What::Answered(number, status));
    }

    /// How a try ended.
    pub(super) fn tried(&mut self, at: Duration, number: u32, decision: String) {
        self.push(at, What::Tried(Box::new((number, decision))));
    }

    /// Puts into words what refers to the route and host, before these change.
    pub(super) fn settle(&mut self, info: &StreamInfo) {
        for step in &mut self.0 {
            let route = info.route.as_ref().map(|r| (&*r.name, r.index));
            match step.what {
                What::Route => {
                    let found = route_text(info.virtual_host.as_ref().map(|v| &*v.name), route);
                    step.what = What::Own(Box::new(("route", found.into())));
                }
                What::Answered(number, status) => {
                    let host = info.upstream.host.as_ref().map(|h| &h.address);
                    step.what = What::Tried(Box::new((number, answer_text(host, status))));
                }
                _ => {}
            }
        }
    }

    fn push(&mut self, at: Duration, what: What) {
        if self.0.len() < MAX_STEPS {
            let at = u32::try_from(at.as_micros()).unwrap_or(u32::MAX);
            self.0.push(Step { at, what });
        }
    }
}

fn route_text(virtual_host: Option<&str>, route: Option<(&str, usize)>) -> String {
    match (virtual_host, route) {
        (Some(host), Some(("", index))) => format!("virtual host {host}, route {index}"),
        (Some(host), Some((name, _))) => format!("virtual host {host}, route {name}"),
        (Some(host), None) => format!("virtual host {host}, no route matches"),
        (None, _) => "no virtual host has this domain".to_owned(),
    }
}

fn answer_text(host: Option<&Address>, status: u16) -> String {
    match host {
        Some(host) => format!("{host}: {status}"),
        None => status.to_string(),
    }
}

/// One request of the past.
#[derive(Debug)]
struct Record {
    /// Id, method, authority and path in one piece, with where each ends.
    text: Box<str>,
    ends: [u16; 4],
    start: SystemTime,
    connection: Arc<proxy_core::ConnectionInfo>,
    protocol: &'static str,
    virtual_host: Option<ArcStr>,
    route: Option<ArcStr>,
    route_index: Option<u32>,
    cluster: Option<ArcStr>,
    host: Option<Address>,
    trace: Option<ArcStr>,
    attempts: u32,
    code: u16,
    flags: proxy_core::ResponseFlags,
    details: Option<Cow<'static, str>>,
    received: u64,
    sent: u64,
    duration: Duration,
    steps: Vec<Step>,
}

/// The requests of one worker.
#[derive(Debug)]
pub(crate) struct Ring {
    records: Mutex<VecDeque<Record>>,
    size: usize,
}

/// The rings of all workers.
#[derive(Debug, Default)]
pub(crate) struct Rings(Mutex<Vec<Arc<Ring>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rings {
    /// A ring for one of `workers` workers.
    pub(crate) fn add(&self, workers: usize) -> Arc<Ring> {
        let ring = Arc::new(Ring { records: Mutex::default(), size: (KEPT / workers.max(1)).max(1) });
        lock(&self.0).push(ring.clone());
        ring
    }

    /// Those that fit, as JSON. With an id the oldest comes first, else the newest.
    pub(crate) fn read(&self, id: Option<&str>, cluster: Option<&str>, code: Option<u16>, limit: usize) -> Value {
        let rings = lock(&self.0).clone();
        let mut found: Vec<(SystemTime, Value)> = Vec::new();
        for ring in rings {
            let records = lock(&ring.records);
            let fits = |r: &&Record| {
                id.is_none_or(|id| r.part(0) == id)
                    && cluster.is_none_or(|cluster| r.cluster.as_deref() == Some(cluster))
                    && code.is_none_or(|code| r.code == code)
            };
            found.extend(records.iter().rev().filter(fits).take(limit).map(|r| (r.start, r.json())));
        }
        found.sort_by_key(|record| std::cmp::Reverse(record.0));
        found.truncate(limit);
        if id.is_some() {
            found.reverse();
        }
        json!({ "requests": found.into_iter().map(|(_, record)| record).collect::<Vec<_>>() })
    }
}

impl Ring {
    #[inline]
    fn push(&self, record: Record) {
        let mut records = lock(&self.records);
        let old = if records.len() >= self.size { records.pop_front() } else { None };
        records.push_back(record);
        drop(records);
        // Freed outside the lock.
        drop(old);
    }
}

impl Record {
    fn part(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { usize::from(self.ends[index - 1]) };
        self.text.get(start..usize::from(self.ends[index])).unwrap_or_default()
    }

    fn json(&self) -> Value {
        let steps: Vec<Value> = self
            .steps
            .iter()
            .map(|step| {
                let (name, decision) = match &step.what {
                    What::Passed(name) => (name.to_string(), "passed".into()),
                    What::Filter(filter) => (filter.0.to_string(), filter.1.clone()),
                    What::AllowedBy(by) => (by.0.to_string(), format!("allowed by {}", by.1).into()),
                    What::NotDenied(name) => (name.to_string(), "allowed: no policy denies it".into()),
                    What::Own(own) => (own.0.to_owned(), own.1.clone()),
                    What::Route => {
                        let route = self.route.as_deref().zip(self.route_index.map(|index| index as usize));
                        ("route".to_owned(), route_text(self.virtual_host.as_deref(), route).into())
                    }
                    What::Answered(number, status) => {
                        (format!("try {number}"), answer_text(self.host.as_ref(), *status).into())
                    }
                    What::Tried(tried) => (format!("try {}", tried.0), Cow::Borrowed(&*tried.1)),
                };
                json!({ "at_us": step.at, "step": name, "decision": decision })
            })
            .collect();
        let connection = &self.connection;
        let peer = connection.tls.as_ref().and_then(|tls| tls.peer.as_ref()).and_then(|peer| peer.uri_sans.first());
        let text = |value: Option<&ArcStr>| value.map(ToString::to_string);
        let time = self.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        json!({
            "request_id": self.part(0),
            "trace_id": text(self.trace.as_ref()),
            "time_ms": time,
            "connection_id": connection.id,
            "listener": connection.listener.to_string(),
            "filter_chain": connection.filter_chain.to_string(),
            "downstream_remote": connection.remote.to_string(),
            "downstream_local": connection.local.to_string(),
            "peer": text(peer),
            "sni": text(connection.server_name.as_ref()),
            "protocol": self.protocol,
            "method": self.part(1),
            "authority": self.part(2),
            "path": self.part(3),
            "virtual_host": text(self.virtual_host.as_ref()),
            "route": text(self.route.as_ref()),
            "route_index": self.route_index,
            "cluster": text(self.cluster.as_ref()),
            "host": self.host.as_ref().map(ToString::to_string),
            "attempts": self.attempts,
            "code": self.code,
            "flags": self.flags.to_string(),
            "details": self.details,
            "bytes_received": self.received,
            "bytes_sent": self.sent,
            "duration_us": self.duration.as_micros() as u64,
            "steps": steps,
        })
    }
}

/// At most [`MAX_TEXT`] bytes, at a character's end.
fn cut(text: &str) -> &str {
    if text.len() <= MAX_TEXT {
        return text;
    }
    let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}

/// Remembers a request that is over, with what it has no more use for.
pub(super) fn remember(exchange: &mut Exchange) {
    let request = &exchange.request;
    let parts = [
        cut(request.get_str("x-request-id").unwrap_or_default()),
        cut(request.method().unwrap_or_default()),
        cut(request.authority().unwrap_or_default()),
        cut(request.get_str("x-envoy-original-path").or(request.path()).unwrap_or_default()),
    ];
    let mut text = String::with_capacity(parts.iter().map(|part| part.len()).sum());
    let mut ends = [0u16; 4];
    for (end, part) in ends.iter_mut().zip(parts) {
        text.push_str(part);
        *end = text.len() as u16;
    }
    let info = &mut exchange.info;
    exchange.http.worker.ring.push(Record {
        text: text.into(),
        ends,
        start: info.start,
        connection: info.connection.clone(),
        protocol: info.protocol.map_or("", |p| p.as_str()),
        virtual_host: info.virtual_host.as_ref().map(|v| v.name.clone()),
        route: info.route.as_ref().map(|r| r.name.clone()),
        route_index: info.route.as_ref().and_then(|r| u32::try_from(r.index).ok()),
        cluster: info.upstream.cluster.take(),
        host: info.upstream.host.as_ref().map(|h| h.address.clone()),
        trace: info.trace_id.take(),
        attempts: info.upstream.attempts,
        code: info.response_code.unwrap_or(0),
        flags: info.flags,
        details: info.response_code_details.take(),
        received: info.bytes_received,
        sent: info.bytes_sent,
        duration: info.times.complete.unwrap_or_default(),
        steps: std::mem::take(&mut exchange.steps.0),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_cut_at_a_character() {
        let text = "ä".repeat(200);
        assert_eq!(cut(&text).len(), MAX_TEXT);
        assert_eq!(cut(&text[..7 * 2]), &text[..14]);
    }
}
