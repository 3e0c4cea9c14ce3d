//! The last requests with the decision taken at each step, for `/requests` of the admin port.

mod segment;

use self::segment::{Known, Reader, Segment, Writer};
use super::exchange::Exchange;
use mesh_types::ArcStr;
use proxy_core::{ConnectionInfo, ResponseFlags, StreamInfo};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Requests that the process remembers.
const KEPT: usize = 10_000;
/// How many of them share what they have in common, and are forgotten together.
const PER_SEGMENT: usize = 250;
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
                    let host = info.upstream.host.as_ref().map(|h| h.address.to_string());
                    step.what = What::Tried(Box::new((number, answer_text(host.as_deref(), status.into()))));
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

fn answer_text(host: Option<&str>, status: u64) -> String {
    match host {
        Some(host) => format!("{host}: {status}"),
        None => status.to_string(),
    }
}

/// The requests of one worker.
#[derive(Debug)]
pub(crate) struct Ring {
    records: Mutex<Records>,
    size: usize,
}

/// The last ones, in segments of which the oldest goes as a whole.
#[derive(Debug, Default)]
struct Records {
    segments: VecDeque<Segment>,
    /// Of the last segment.
    known: Known,
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
        let mut found: Vec<(u64, Value)> = Vec::new();
        for ring in rings {
            let records = lock(&ring.records);
            let fits = |r: &Record<'_>| {
                id.is_none_or(|id| r.parts[0] == id)
                    && cluster.is_none_or(|cluster| r.cluster == Some(cluster))
                    && code.is_none_or(|code| r.code == u64::from(code))
            };
            let last = records.segments.iter().rev().flat_map(Segment::read_back).take(ring.size);
            found.extend(last.map(Record::read).filter(fits).take(limit).map(|r| (r.start, r.json())));
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
    fn write(&self, record: impl FnOnce(&mut Writer<'_>)) {
        let mut records = lock(&self.records);
        let Records { segments, known } = &mut *records;
        if segments.back().is_none_or(|last| last.len() >= PER_SEGMENT) {
            known.clear();
            let next = segments.back_mut().map(|last| {
                last.complete();
                last.like()
            });
            segments.push_back(next.unwrap_or_default());
            let without_first: usize = segments.iter().skip(1).map(Segment::len).sum();
            if without_first >= self.size {
                segments.pop_front();
            }
        }
        if let Some(last) = segments.back_mut() {
            record(&mut last.write(known));
        }
    }
}

/// One request of the past.
struct Record<'a> {
    connection: Connection<'a>,
    /// Id, method, authority and path.
    parts: [&'a str; 4],
    /// Microseconds since 1970.
    start: u64,
    protocol: &'a str,
    virtual_host: Option<&'a str>,
    route: Option<&'a str>,
    route_index: Option<u64>,
    cluster: Option<&'a str>,
    host: Option<String>,
    trace: Option<&'a str>,
    attempts: u64,
    code: u64,
    /// None if there are none.
    flags: Option<&'a str>,
    details: Option<&'a str>,
    received: u64,
    sent: u64,
    /// Microseconds.
    duration: u64,
    /// Where its decisions are.
    steps: Reader<'a>,
}

/// What a record tells of its connection.
struct Connection<'a> {
    id: u64,
    listener: &'a str,
    filter_chain: &'a str,
    remote: String,
    local: String,
    peer: Option<&'a str>,
    server_name: Option<&'a str>,
}

impl<'a> Connection<'a> {
    fn write(connection: &ConnectionInfo, to: &mut Writer<'_>) {
        let peer = connection.tls.as_ref().and_then(|tls| tls.peer.as_ref()).and_then(|peer| peer.uri_sans.first());
        to.number(connection.id);
        to.name(&connection.listener);
        to.name(&connection.filter_chain);
        to.address(&connection.remote);
        to.address(&connection.local);
        to.optional_text(peer.map(|uri| cut(uri)));
        to.optional_text(connection.server_name.as_deref());
    }

    fn read(from: &mut Reader<'a>) -> Self {
        Self {
            id: from.number(),
            listener: from.name(),
            filter_chain: from.name(),
            remote: from.address(),
            local: from.address(),
            peer: from.optional_text(),
            server_name: from.optional_text(),
        }
    }
}

impl<'a> Record<'a> {
    /// Writes a request that is over.
    fn write(exchange: &Exchange, to: &mut Writer<'_>) {
        let (request, info) = (&exchange.request, &exchange.info);
        to.connection(info.connection.id, |to| Connection::write(&info.connection, to));
        to.text(cut(request.get_str("x-request-id").unwrap_or_default()));
        to.text(cut(request.method().unwrap_or_default()));
        to.text(cut(request.authority().unwrap_or_default()));
        to.text(cut(request.get_str("x-envoy-original-path").or(request.path()).unwrap_or_default()));
        to.number(info.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64);
        to.static_name(info.protocol.map_or("", |p| p.as_str()));
        to.optional_name(info.virtual_host.as_ref().map(|v| &v.name));
        to.optional_name(info.route.as_ref().map(|r| &r.name));
        to.optional_number(info.route.as_ref().map(|r| r.index as u64));
        to.optional_name(info.upstream.cluster.as_ref());
        let host = info.upstream.host.as_ref();
        to.number(host.is_some().into());
        host.into_iter().for_each(|host| to.address(&host.address));
        to.optional_text(info.trace_id.as_deref());
        to.number(info.upstream.attempts.into());
        to.number(info.response_code.unwrap_or(0).into());
        let flags = (info.flags != ResponseFlags::NONE).then(|| info.flags.to_string());
        to.optional_text(flags.as_deref());
        to.optional_text(info.response_code_details.as_deref().map(cut));
        to.number(info.bytes_received);
        to.number(info.bytes_sent);
        to.number(info.times.complete.unwrap_or_default().as_micros() as u64);
        to.number(exchange.steps.0.len() as u64);
        exchange.steps.0.iter().for_each(|step| step.write(to));
    }

    fn read(mut from: Reader<'a>) -> Self {
        let from = &mut from;
        Self {
            connection: from.connection(Connection::read),
            parts: [from.text(), from.text(), from.text(), from.text()],
            start: from.number(),
            protocol: from.name(),
            virtual_host: from.optional_name(),
            route: from.optional_name(),
            route_index: from.optional_number(),
            cluster: from.optional_name(),
            host: (from.number() != 0).then(|| from.address()),
            trace: from.optional_text(),
            attempts: from.number(),
            code: from.number(),
            flags: from.optional_text(),
            details: from.optional_text(),
            received: from.number(),
            sent: from.number(),
            duration: from.number(),
            steps: from.clone(),
        }
    }

    fn json(&self) -> Value {
        let mut from = self.steps.clone();
        let count = from.number();
        let steps: Vec<Value> = (0..count).map(|_| self.step(&mut from)).collect();
        let connection = &self.connection;
        json!({
            "request_id": self.parts[0],
            "trace_id": self.trace,
            "time_ms": self.start / 1000,
            "connection_id": connection.id,
            "listener": connection.listener,
            "filter_chain": connection.filter_chain,
            "downstream_remote": connection.remote,
            "downstream_local": connection.local,
            "peer": connection.peer,
            "sni": connection.server_name,
            "protocol": self.protocol,
            "method": self.parts[1],
            "authority": self.parts[2],
            "path": self.parts[3],
            "virtual_host": self.virtual_host,
            "route": self.route,
            "route_index": self.route_index,
            "cluster": self.cluster,
            "host": self.host,
            "attempts": self.attempts,
            "code": self.code,
            "flags": self.flags.unwrap_or("-"),
            "details": self.details,
            "bytes_received": self.received,
            "bytes_sent": self.sent,
            "duration_us": self.duration,
            "steps": steps,
        })
    }

    /// One decision, as [`Step::write`] wrote it.
    fn step(&self, from: &mut Reader<'a>) -> Value {
        let at = from.number();
        let (name, decision): (Cow<'_, str>, Cow<'_, str>) = match from.number() {
            Step::ROUTE => {
                let route = self.route.zip(self.route_index.map(|index| index as usize));
                ("route".into(), route_text(self.virtual_host, route).into())
            }
            Step::ANSWERED => {
                let (number, status) = (from.number(), from.number());
                (format!("try {number}").into(), answer_text(self.host.as_deref(), status).into())
            }
            Step::PASSED => (from.name().into(), "passed".into()),
            Step::NOT_DENIED => (from.name().into(), "allowed: no policy denies it".into()),
            Step::ALLOWED_BY => (from.name().into(), format!("allowed by {}", from.name()).into()),
            Step::TRIED => (format!("try {}", from.number()).into(), from.text().into()),
            _ => (from.name().into(), from.text().into()),
        };
        json!({ "at_us": at, "step": name, "decision": decision })
    }
}

impl Step {
    const ROUTE: u64 = 0;
    const ANSWERED: u64 = 1;
    const PASSED: u64 = 2;
    const NOT_DENIED: u64 = 3;
    const ALLOWED_BY: u64 = 4;
    const TRIED: u64 = 5;
    const OWN: u64 = 6;

    fn write(&self, to: &mut Writer<'_>) {
        to.number(self.at.into());
        match &self.what {
            What::Route => to.number(Self::ROUTE),
            What::Answered(number, status) => {
                to.number(Self::ANSWERED);
                to.number((*number).into());
                to.number((*status).into());
            }
            What::Passed(name) => {
                to.number(Self::PASSED);
                to.name(name);
            }
            What::NotDenied(name) => {
                to.number(Self::NOT_DENIED);
                to.name(name);
            }
            What::AllowedBy(by) => {
                to.number(Self::ALLOWED_BY);
                to.name(&by.0);
                to.name(&by.1);
            }
            What::Tried(tried) => {
                to.number(Self::TRIED);
                to.number(tried.0.into());
                to.text(cut(&tried.1));
            }
            What::Filter(filter) => {
                to.number(Self::OWN);
                to.name(&filter.0);
                to.text(cut(&filter.1));
            }
            What::Own(own) => {
                to.number(Self::OWN);
                to.static_name(own.0);
                to.text(cut(&own.1));
            }
        }
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

/// Remembers a request that is over, and forgets its decisions: one that it leads to has its own.
pub(super) fn remember(exchange: &mut Exchange) {
    exchange.http.worker.ring.write(|to| Record::write(exchange, to));
    exchange.steps.0.clear();
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
