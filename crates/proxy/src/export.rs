//! Sends spans and log records to collectors: gathered per worker, posted in batches, never waited for.

use crate::internal;
use crate::log::Entry;
use crate::stats::OWN_REQUESTS;
use crate::upstream::{Protocol, Variant, call};
use crate::worker::Worker;
use bytes::Bytes;
use envoy_api::pb::envoy::service::accesslog::v3 as als;
use mesh_types::ArcStr;
use prost::Message;
use proxy_core::collector::{GrpcService, HttpCollector, about_process};
use proxy_core::hcm::{SpanService, TracingProvider};
use proxy_core::{Headers, PickContext};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a batch goes, and as what.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Target {
    /// JSON spans to Zipkin.
    Zipkin(Arc<HttpCollector>),
    /// Spans to an OpenTelemetry collector; with the name of the service, of which the environment may say more.
    Spans { to: SpanService, service: ArcStr, detects_environment: bool },
    /// Log records to an OpenTelemetry collector, with the attributes of the resource.
    Logs { to: Arc<GrpcService>, resource: Vec<(ArcStr, ArcStr)> },
    /// Records to Envoy's access log service, under the log's name.
    Als { to: Arc<GrpcService>, log: ArcStr },
}

/// Spans that left, batches that time sent; then batches that arrived, that did not, and that had nowhere to go.
const ZIPKIN: [&str; 5] = [
    "tracing.zipkin.spans_sent",
    "tracing.zipkin.timer_flushed",
    "tracing.zipkin.reports_sent",
    "tracing.zipkin.reports_dropped",
    "tracing.zipkin.reports_skipped_no_cluster",
];
const OPEN_TELEMETRY: [&str; 2] = ["tracing.opentelemetry.spans_sent", "tracing.opentelemetry.timer_flushed"];

/// The counters of a provider, which exist from the start.
pub(crate) fn counters(provider: &TracingProvider) -> &'static [&'static str] {
    match provider {
        TracingProvider::Zipkin { .. } => &[
            ZIPKIN[0],
            ZIPKIN[1],
            ZIPKIN[2],
            ZIPKIN[3],
            ZIPKIN[4],
            // Envoy's internal client never fails this way.
            "tracing.zipkin.reports_failed",
        ],
        TracingProvider::OpenTelemetry { .. } => &OPEN_TELEMETRY,
    }
}

impl Target {
    /// What is counted of it: see [`ZIPKIN`].
    fn counters(&self) -> Option<&'static [&'static str]> {
        match self {
            Target::Zipkin(_) => Some(&ZIPKIN),
            Target::Spans { .. } => Some(&OPEN_TELEMETRY),
            Target::Logs { .. } | Target::Als { .. } => None,
        }
    }
}

/// One encoded span or record.
pub(crate) enum Item {
    Json(serde_json::Value),
    Span(otlp::Span),
    Log(otlp::LogRecord),
    Als(Entry),
}

impl Item {
    /// Its size on the way, as far as that counts.
    fn bytes(&self) -> usize {
        match self {
            Item::Json(_) | Item::Span(_) => 0,
            Item::Log(record) => record.encoded_len(),
            Item::Als(Entry::Http(entry)) => entry.encoded_len(),
            Item::Als(Entry::Tcp(entry)) => entry.encoded_len(),
        }
    }
}

/// When a batch is sent.
#[derive(Clone, Copy)]
pub(crate) enum When {
    /// As Envoy's tracers do.
    Spans,
    /// With so many bytes, at the latest after so long (`buffer_size_bytes`, `buffer_flush_interval`).
    Bytes { most: u32, after: Duration },
}

/// What waits to be sent. Bounded: a collector that is gone must not fill the memory.
#[derive(Default)]
pub(crate) struct Batches(RefCell<HashMap<Target, Batch>>);

#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    bytes: usize,
}

/// Who makes spans.
const SDK: &str = "outrigger";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const USER_AGENT: &str = concat!("OTel-OTLP-Exporter-Outrigger/", env!("CARGO_PKG_VERSION"));
const MAX_WAITING: usize = 4096;
/// Zipkin's and OpenTelemetry's tracers of Envoy send from so many spans on…
const SEND_AT: usize = 5;
/// …or after this.
const SEND_AFTER: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Takes one item for `target`.
pub(crate) fn send(worker: &Rc<Worker>, target: Target, item: Item, when: When) {
    let (waiting, bytes) = {
        let mut batches = worker.exports.0.borrow_mut();
        let batch = batches.entry(target.clone()).or_default();
        if batch.items.len() >= MAX_WAITING {
            return;
        }
        batch.bytes += item.bytes();
        batch.items.push(item);
        (batch.items.len(), batch.bytes)
    };
    let (full, after) = match when {
        When::Spans => (waiting == SEND_AT, SEND_AFTER),
        When::Bytes { most, after } => (bytes >= most as usize, after),
    };
    if full {
        flush(worker, &target);
    } else if waiting == 1 {
        let weak = Rc::downgrade(worker);
        // Ends by itself, with the worker at the latest.
        tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            if let Some(worker) = weak.upgrade() {
                if let Some([_, by_timer, ..]) = target.counters() {
                    worker.named_stats().inc(by_timer);
                }
                flush(&worker, &target);
            }
        });
    }
}

fn flush(worker: &Rc<Worker>, target: &Target) {
    let items = worker.exports.0.borrow_mut().remove(target).unwrap_or_default().items;
    if items.is_empty() {
        return;
    }
    let counters = target.counters();
    if let Some([spans, ..]) = counters {
        worker.named_stats().add(spans, items.len() as u64);
    }
    let message = request(target, items, &worker.shared.node.message);
    let worker = worker.clone();
    // Nobody waits for telemetry.
    tokio::task::spawn_local(async move {
        let Outgoing { cluster, mut headers, body, timeout } = message;
        internal::mark(&worker, &mut headers, Some(timeout));
        let status = tokio::time::timeout(timeout, post(&worker, &cluster, headers, body)).await.ok().flatten();
        if status.is_none() {
            tracing::debug!(%cluster, "a batch of telemetry was lost");
        }
        let Some([_, _, sent, dropped, no_cluster]) = counters.and_then(|c| <[&str; 5]>::try_from(c).ok()) else {
            return;
        };
        worker.named_stats().inc(match status {
            Some(202) => sent,
            _ if worker.cluster(&cluster).is_none() => no_cluster,
            // Envoy's internal client answers where no upstream does.
            _ => dropped,
        });
    });
}

/// A batch on its way.
struct Outgoing {
    cluster: ArcStr,
    headers: Headers,
    body: Bytes,
    timeout: Duration,
}

/// The answer's status.
async fn post(worker: &Rc<Worker>, cluster: &str, headers: Headers, body: Bytes) -> Option<u16> {
    worker.named_stats().inc(OWN_REQUESTS);
    let cluster = worker.cluster(cluster)?;
    let host = cluster.pick(&PickContext::at(Instant::now()), &mut worker.random.borrow_mut())?;
    let protocol = Protocol::of(&cluster.config().protocol, None);
    let pool = cluster.pool(worker, &host, &Variant { protocol, ..Variant::default() })?;
    let acquired = pool.acquire().await.ok()?;
    cluster.stats.upstream_rq_total.inc();
    let (status, ..) = call(acquired, headers, body, 1 << 16, |_, _| ()).await.ok()?;
    cluster.stats.charge(status, false);
    Some(status)
}

fn grpc(to: &GrpcService, path: &str, message: &impl Message) -> Outgoing {
    let mut headers = Headers::of([
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", &*to.authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]);
    to.metadata.iter().for_each(|(name, value)| headers.push_lower(name, value.as_bytes()));
    let mut body = vec![0u8; 5];
    body.extend_from_slice(&message.encode_to_vec());
    let length = u32::try_from(body.len() - 5).unwrap_or(u32::MAX);
    body[1..5].copy_from_slice(&length.to_be_bytes());
    Outgoing { cluster: to.cluster.clone(), headers, body: body.into(), timeout: TIMEOUT }
}

fn http(to: &HttpCollector, kind: &str, body: Vec<u8>) -> Outgoing {
    let mut headers = Headers::of([
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &*to.path),
        (":authority", &*to.host),
        ("content-type", kind),
    ]);
    for (name, value) in &to.headers {
        headers.set(name, &about_process(value, |name| std::env::var(name).ok()));
    }
    // The length is not told: Envoy sends bodies of its own in chunks.
    Outgoing { cluster: to.cluster.clone(), headers, body: body.into(), timeout: to.timeout }
}

/// `OTEL_RESOURCE_ATTRIBUTES`: names and values, `=` between them and `,` behind each but the last.
fn environment() -> Vec<(String, String)> {
    let text = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    text.split(',').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn request(target: &Target, items: Vec<Item>, node: &envoy_api::core::Node) -> Outgoing {
    match target {
        Target::Zipkin(to) => {
            let spans: Vec<_> =
                items.into_iter().filter_map(|i| if let Item::Json(v) = i { Some(v) } else { None }).collect();
            http(to, "application/json", serde_json::Value::Array(spans).to_string().into_bytes())
        }
        Target::Spans { to, service, detects_environment } => {
            let spans = items.into_iter().filter_map(|i| if let Item::Span(s) = i { Some(s) } else { None }).collect();
            let own = [
                ("service.name", &**service),
                ("telemetry.sdk.name", SDK),
                ("telemetry.sdk.language", "rust"),
                ("telemetry.sdk.version", VERSION),
            ];
            let mut attributes: BTreeMap<_, _> = own.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
            if *detects_environment {
                attributes.extend(environment());
            }
            let attributes = attributes.iter().map(|(k, v)| otlp::KeyValue::text(k, v)).collect();
            let resource = Some(otlp::Resource { attributes });
            let scope = Some(otlp::Scope { name: SDK.to_owned(), version: VERSION.to_owned() });
            let scope_spans = vec![otlp::ScopeSpans { scope, spans }];
            let message = otlp::ExportSpans { resource_spans: vec![otlp::ResourceSpans { resource, scope_spans }] };
            match to {
                SpanService::Grpc(to) => {
                    grpc(to, "/opentelemetry.proto.collector.trace.v1.TraceService/Export", &message)
                }
                SpanService::Http(to) => {
                    let mut outgoing = http(to, "application/x-protobuf", message.encode_to_vec());
                    outgoing.headers.push(b"user-agent", USER_AGENT.as_bytes());
                    outgoing
                }
            }
        }
        Target::Logs { to, resource } => {
            let log_records =
                items.into_iter().filter_map(|i| if let Item::Log(l) = i { Some(l) } else { None }).collect();
            let attributes = resource.iter().map(|(k, v)| otlp::KeyValue::text(k, v)).collect();
            let message = otlp::ExportLogs {
                resource_logs: vec![otlp::ResourceLogs {
                    resource: Some(otlp::Resource { attributes }),
                    scope_logs: vec![otlp::ScopeLogs { log_records }],
                }],
            };
            grpc(to, "/opentelemetry.proto.collector.logs.v1.LogsService/Export", &message)
        }
        // DIFFERS: Envoy keeps one stream open; a stream for each batch says the same.
        Target::Als { to, log } => {
            use als::stream_access_logs_message::{HttpAccessLogEntries, Identifier, LogEntries, TcpAccessLogEntries};
            let (mut http, mut tcp) = (Vec::new(), Vec::new());
            for item in items {
                match item {
                    Item::Als(Entry::Http(entry)) => http.push(*entry),
                    Item::Als(Entry::Tcp(entry)) => tcp.push(*entry),
                    _ => {}
                }
            }
            let entries = match http.is_empty() {
                true => LogEntries::TcpLogs(TcpAccessLogEntries { log_entry: tcp }),
                false => LogEntries::HttpLogs(HttpAccessLogEntries { log_entry: http }),
            };
            let message = als::StreamAccessLogsMessage {
                identifier: Some(Identifier { node: Some(node.clone()), log_name: log.to_string() }),
                log_entries: Some(entries),
            };
            grpc(to, "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs", &message)
        }
    }
}

/// The few messages of opentelemetry-proto (v1) that are sent, with its field numbers.
pub(crate) mod otlp {
    /// `common.v1.AnyValue`, text only.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct AnyValue {
        #[prost(string, optional, tag = "1")]
        pub(crate) text: Option<String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct KeyValue {
        #[prost(string, tag = "1")]
        pub(crate) key: String,
        #[prost(message, optional, tag = "2")]
        pub(crate) value: Option<AnyValue>,
    }

    impl KeyValue {
        pub(crate) fn text(key: &str, value: &str) -> Self {
            Self { key: key.to_owned(), value: Some(AnyValue { text: Some(value.to_owned()) }) }
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Resource {
        #[prost(message, repeated, tag = "1")]
        pub(crate) attributes: Vec<KeyValue>,
    }

    /// `trace.v1.Span`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub(crate) trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(crate) span_id: Vec<u8>,
        #[prost(string, tag = "3")]
        pub(crate) trace_state: String,
        #[prost(bytes = "vec", tag = "4")]
        pub(crate) parent_span_id: Vec<u8>,
        #[prost(string, tag = "5")]
        pub(crate) name: String,
        /// 2: server, 3: client.
        #[prost(int32, tag = "6")]
        pub(crate) kind: i32,
        #[prost(fixed64, tag = "7")]
        pub(crate) start_time_unix_nano: u64,
        #[prost(fixed64, tag = "8")]
        pub(crate) end_time_unix_nano: u64,
        #[prost(message, repeated, tag = "9")]
        pub(crate) attributes: Vec<KeyValue>,
        #[prost(message, repeated, tag = "11")]
        pub(crate) events: Vec<Event>,
        #[prost(message, optional, tag = "15")]
        pub(crate) status: Option<Status>,
        /// [`SAMPLED`], [`HAS_IS_REMOTE`] and [`IS_REMOTE`].
        #[prost(fixed32, tag = "16")]
        pub(crate) flags: u32,
    }

    /// `trace.v1.Span.Event`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Event {
        #[prost(fixed64, tag = "1")]
        pub(crate) time_unix_nano: u64,
        #[prost(string, tag = "2")]
        pub(crate) name: String,
    }

    /// The trace is recorded (W3C's flag).
    pub(crate) const SAMPLED: u32 = 1;
    /// It is known whether the parent is in another process.
    pub(crate) const HAS_IS_REMOTE: u32 = 0x100;
    /// It is.
    pub(crate) const IS_REMOTE: u32 = 0x200;

    /// `trace.v1.Status`; code 2 is an error.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Status {
        #[prost(int32, tag = "3")]
        pub(crate) code: i32,
    }

    /// `common.v1.InstrumentationScope`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct Scope {
        #[prost(string, tag = "1")]
        pub(crate) name: String,
        #[prost(string, tag = "2")]
        pub(crate) version: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ScopeSpans {
        #[prost(message, optional, tag = "1")]
        pub(crate) scope: Option<Scope>,
        #[prost(message, repeated, tag = "2")]
        pub(crate) spans: Vec<Span>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ResourceSpans {
        #[prost(message, optional, tag = "1")]
        pub(crate) resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(crate) scope_spans: Vec<ScopeSpans>,
    }

    /// `collector.trace.v1.ExportTraceServiceRequest`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ExportSpans {
        #[prost(message, repeated, tag = "1")]
        pub(crate) resource_spans: Vec<ResourceSpans>,
    }

    /// `logs.v1.LogRecord`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct LogRecord {
        #[prost(fixed64, tag = "1")]
        pub(crate) time_unix_nano: u64,
        #[prost(message, optional, tag = "5")]
        pub(crate) body: Option<AnyValue>,
        #[prost(message, repeated, tag = "6")]
        pub(crate) attributes: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ScopeLogs {
        #[prost(message, repeated, tag = "2")]
        pub(crate) log_records: Vec<LogRecord>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ResourceLogs {
        #[prost(message, optional, tag = "1")]
        pub(crate) resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        pub(crate) scope_logs: Vec<ScopeLogs>,
    }

    /// `collector.logs.v1.ExportLogsServiceRequest`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(crate) struct ExportLogs {
        #[prost(message, repeated, tag = "1")]
        pub(crate) resource_logs: Vec<ResourceLogs>,
    }
}
