//! Istio's standard metrics (istio/proxy extensions/stats): `istio_requests_total` and the rest, with all labels.
//!
//! A label set is rendered once, when first seen; a request only adds numbers to its series.

use super::registry::{Sample, Scope};
use super::render;
use super::{Counter, Histogram};
use foldhash::HashMap;
use mesh_types::ArcStr;
use proxy_core::ResponseFlags;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

/// Who is at the other end (or here): what the labels say of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Workload {
    pub(crate) name: ArcStrOrUnknown,
    pub(crate) namespace: ArcStrOrUnknown,
    pub(crate) app: ArcStrOrUnknown,
    pub(crate) version: ArcStrOrUnknown,
    pub(crate) canonical_service: ArcStrOrUnknown,
    pub(crate) canonical_revision: ArcStrOrUnknown,
    pub(crate) cluster: ArcStrOrUnknown,
}

/// An interned workload: equal when it is the same one, so that a request hashes a pointer and not its names.
#[derive(Clone, Debug)]
pub(crate) struct Peer(pub(crate) Arc<Workload>);

impl PartialEq for Peer {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Peer {}

impl Hash for Peer {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

/// Text that prints as `unknown` when it is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ArcStrOrUnknown(pub(crate) Option<ArcStr>);

impl ArcStrOrUnknown {
    pub(crate) fn as_str(&self) -> &str {
        self.0.as_deref().filter(|s| !s.is_empty()).unwrap_or("unknown")
    }
}

impl From<&str> for ArcStrOrUnknown {
    fn from(text: &str) -> Self {
        Self((!text.is_empty()).then(|| text.into()))
    }
}

/// Response flags as a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Flags(u32);

impl Flags {
    pub(crate) fn of(flags: ResponseFlags) -> Self {
        if flags.is_empty() {
            return Self(0);
        }
        let bits = ResponseFlags::ALL.iter().enumerate().filter(|(_, (flag, ..))| flags.contains(*flag));
        Self(bits.fold(0, |all, (i, _)| all | 1 << i))
    }
}

impl std::fmt::Display for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == 0 {
            return f.write_str("-");
        }
        let mut first = true;
        for (i, (_, short, _)) in ResponseFlags::ALL.iter().enumerate() {
            if self.0 & 1 << i != 0 {
                f.write_str(if first { "" } else { "," })?;
                f.write_str(short)?;
                first = false;
            }
        }
        Ok(())
    }
}

/// What tells one TCP series from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TcpLabels {
    /// `source` or `destination`.
    pub(crate) reporter: &'static str,
    pub(crate) source: Peer,
    pub(crate) destination: Peer,
    pub(crate) source_principal: ArcStrOrUnknown,
    pub(crate) destination_principal: ArcStrOrUnknown,
    /// Host of the service, `reviews.default.svc.cluster.local`.
    pub(crate) service: ArcStrOrUnknown,
    pub(crate) service_name: ArcStrOrUnknown,
    pub(crate) service_namespace: ArcStrOrUnknown,
    pub(crate) mutual_tls: Option<bool>,
    pub(crate) flags: Flags,
}

/// What tells one HTTP series from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RequestLabels {
    pub(crate) peers: TcpLabels,
    pub(crate) response_code: u16,
    pub(crate) grpc_status: Option<u32>,
    pub(crate) grpc: bool,
}

#[derive(Debug, Default)]
struct HttpSeries {
    requests: Counter,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

#[derive(Debug, Default)]
struct TcpSeries {
    opened: Counter,
    closed: Counter,
    sent: Counter,
    received: Counter,
}

/// All series of all workers, by rendered labels. Locked when a label set is first seen and on scrape.
#[derive(Default)]
pub(crate) struct Series {
    http: Mutex<BTreeMap<String, Vec<Arc<HttpSeries>>>>,
    tcp: Mutex<BTreeMap<String, Vec<Arc<TcpSeries>>>>,
}

/// A worker's way to its series.
pub(crate) struct IstioStats {
    registry: Arc<super::Registry>,
    http: RefCell<HashMap<RequestLabels, Arc<HttpSeries>>>,
    tcp: RefCell<HashMap<TcpLabels, Arc<TcpSeries>>>,
}

/// One TCP connection's series, for reports in between.
pub(crate) struct TcpReport(Arc<TcpSeries>);

impl TcpReport {
    pub(crate) fn bytes(&self, sent: u64, received: u64) {
        self.0.sent.add(sent);
        self.0.received.add(received);
    }

    pub(crate) fn closed(&self) {
        self.0.closed.inc();
    }
}

/// Series a worker keeps; beyond, new label sets are not counted (a peer must not fill the memory).
const MAX_SERIES: usize = 10_000;

impl IstioStats {
    pub(crate) fn new(registry: Arc<super::Registry>) -> Rc<Self> {
        Rc::new(Self { registry, http: RefCell::default(), tcp: RefCell::default() })
    }

    /// Counts one finished request; sizes include heads, as Istio's.
    pub(crate) fn request(&self, labels: RequestLabels, duration_ms: u64, request_bytes: u64, response_bytes: u64) {
        let mut map = self.http.borrow_mut();
        let series = match map.get(&labels) {
            Some(series) => series,
            None if map.len() >= MAX_SERIES => return,
            None => {
                let series = Arc::new(HttpSeries::default());
                let mut all = self.registry.istio.http.lock().unwrap_or_else(PoisonError::into_inner);
                all.entry(labels.render()).or_default().push(series.clone());
                map.entry(labels).or_insert(series)
            }
        };
        series.requests.inc();
        series.duration.record(duration_ms);
        series.request_bytes.record(request_bytes);
        series.response_bytes.record(response_bytes);
    }

    /// Counts an opened TCP connection.
    pub(crate) fn tcp_opened(&self, labels: TcpLabels) -> Option<TcpReport> {
        let mut map = self.tcp.borrow_mut();
        if !map.contains_key(&labels) {
            if map.len() >= MAX_SERIES {
                return None;
            }
            let series = Arc::new(TcpSeries::default());
            let mut all = self.registry.istio.tcp.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(labels.render("tcp")).or_default().push(series.clone());
            map.insert(labels.clone(), series);
        }
        let series = map.get(&labels)?.clone();
        series.opened.inc();
        Some(TcpReport(series))
    }
}

impl TcpLabels {
    /// Label order as Istio's stats filter writes it.
    fn render(&self, protocol: &str) -> String {
        let mut out = String::with_capacity(700);
        let (s, d) = (&self.source.0, &self.destination.0);
        let mut put = |name: &str, value: &str| {
            if !out.is_empty() {
                out.push(',');
            }
            let _ = write!(out, "{name}=\"{}\"", render::escape(value));
        };
        put("reporter", self.reporter);
        put("source_workload", s.name.as_str());
        put("source_canonical_service", s.canonical_service.as_str());
        put("source_canonical_revision", known_or(&s.canonical_revision, "latest", &s.canonical_service));
        put("source_workload_namespace", s.namespace.as_str());
        put("source_principal", self.source_principal.as_str());
        put("source_app", s.app.as_str());
        put("source_version", s.version.as_str());
        put("source_cluster", s.cluster.as_str());
        put("destination_workload", d.name.as_str());
        put("destination_workload_namespace", d.namespace.as_str());
        put("destination_principal", self.destination_principal.as_str());
        put("destination_app", d.app.as_str());
        put("destination_version", d.version.as_str());
        put("destination_service", self.service.as_str());
        put("destination_canonical_service", d.canonical_service.as_str());
        put("destination_canonical_revision", known_or(&d.canonical_revision, "latest", &d.canonical_service));
        put("destination_service_name", self.service_name.as_str());
        put("destination_service_namespace", self.service_namespace.as_str());
        put("destination_cluster", d.cluster.as_str());
        put("request_protocol", protocol);
        put("response_flags", &self.flags.to_string());
        let security = match self.mutual_tls {
            Some(true) => "mutual_tls",
            Some(false) => "none",
            None => "unknown",
        };
        put("connection_security_policy", security);
        out
    }
}

fn known_or<'a>(value: &'a ArcStrOrUnknown, default: &'a str, other: &ArcStrOrUnknown) -> &'a str {
    match (&value.0, &other.0) {
        (None, Some(_)) => default,
        _ => value.as_str(),
    }
}

impl RequestLabels {
    fn render(&self) -> String {
        let mut out = self.peers.render(if self.grpc { "grpc" } else { "http" });
        let grpc = self.grpc_status.map(|s| s.to_string()).unwrap_or_default();
        let code = format!("response_code=\"{}\",grpc_response_status=\"{grpc}\",", self.response_code);
        let at = out.find("response_flags=").unwrap_or(out.len());
        out.insert_str(at, &code);
        out
    }
}

impl Series {
    /// Prometheus text of all series of the metrics that are wanted by name.
    pub(crate) fn render(&self, wanted: &dyn Fn(&str) -> bool) -> String {
        let http: Vec<(String, Vec<Arc<HttpSeries>>)> = {
            let map = self.http.lock().unwrap_or_else(PoisonError::into_inner);
            map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        let tcp: Vec<(String, Vec<Arc<TcpSeries>>)> = {
            let map = self.tcp.lock().unwrap_or_else(PoisonError::into_inner);
            map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        let mut out = String::new();
        if !http.is_empty() {
            if wanted("istio_requests_total") {
                out.push_str("# TYPE istio_requests_total counter\n");
                for (labels, parts) in &http {
                    let n: u64 = parts.iter().map(|p| p.requests.get()).sum();
                    let _ = writeln!(out, "istio_requests_total{{{labels}}} {n}");
                }
            }
            type Pick = fn(&HttpSeries) -> &Histogram;
            let histograms: [(&str, Pick); 3] = [
                ("istio_request_duration_milliseconds", |s| &s.duration),
                ("istio_request_bytes", |s| &s.request_bytes),
                ("istio_response_bytes", |s| &s.response_bytes),
            ];
            for (name, pick) in histograms.into_iter().filter(|(name, _)| wanted(name)) {
                let _ = writeln!(out, "# TYPE {name} histogram");
                for (labels, parts) in &http {
                    let mut sample = super::HistogramSample::default();
                    for part in parts {
                        sample.merge(&pick(part).read());
                    }
                    render::histogram(&mut out, name, labels, &sample, &super::BOUNDS);
                }
            }
        }
        type Pick = fn(&TcpSeries) -> &Counter;
        let counters: [(&str, Pick); 4] = [
            ("istio_tcp_connections_opened_total", |s| &s.opened),
            ("istio_tcp_connections_closed_total", |s| &s.closed),
            ("istio_tcp_sent_bytes_total", |s| &s.sent),
            ("istio_tcp_received_bytes_total", |s| &s.received),
        ];
        for (name, pick) in counters.into_iter().filter(|(name, _)| wanted(name)) {
            if tcp.is_empty() {
                break;
            }
            let _ = writeln!(out, "# TYPE {name} counter");
            for (labels, parts) in &tcp {
                let n: u64 = parts.iter().map(|p| pick(p).get()).sum();
                let _ = writeln!(out, "{name}{{{labels}}} {n}");
            }
        }
        out
    }
}

/// Numbers that a closure computes when read (uptime, live), registered as a scope.
pub(crate) struct Computed<F>(pub(crate) F);

impl<F: Fn(&mut dyn FnMut(&str, Sample)) + Send + Sync> Scope for Computed<F> {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        (self.0)(f);
    }
}
