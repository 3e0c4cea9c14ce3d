//! The span of a request: which requests are traced, the context passed on, what is told to the collector.

use super::encode::AddToAnswer;
use super::exchange::Exchange;
use crate::export::{self, Item, Target, otlp};
use proxy_core::format::MetadataSource;
use proxy_core::hcm::{TagSource, Tracing, TracingProvider};
use proxy_core::listener::Direction;
use proxy_core::stream_info::StreamTimes;
use proxy_core::trace::{Propagation, TraceContext, pack_reason, packed_reason};
use proxy_core::{Headers, StreamInfo};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// Why requests are traced, or that they are not.
pub(super) const COUNTERS: [&str; 5] = [
    HEALTH_CHECK,
    "tracing.client_enabled",
    "tracing.not_traceable",
    "tracing.random_sampling",
    "tracing.service_forced",
];

/// Counted by the health check filter, where nothing is traced, too.
pub(super) const HEALTH_CHECK: &str = "tracing.health_check";

/// The span of a request that came to a connection manager with tracing.
pub(crate) struct Span {
    context: TraceContext,
    sampled: bool,
    operation: String,
    /// Sent back to the client of an inbound request.
    decorator: Option<String>,
    egress: bool,
    shared: bool,
}

impl Span {
    /// It is not told to the collector after all.
    pub(super) fn forget(&mut self) {
        self.sampled = false;
    }
}

/// Counts why a request was traced, or that it was not, at its end.
pub(super) fn count(exchange: &Exchange) {
    if exchange.http.config.tracing.is_none() {
        return;
    }
    let [_, client, not, random, forced] = COUNTERS;
    exchange.http.stats.other.inc(match exchange.trace_reason {
        '9' => random,
        'a' => forced,
        'b' => client,
        _ => not,
    });
}

/// Begins the span and writes its context into the request (Envoy `ActiveStream::traceRequest`).
pub(super) fn begin(exchange: &mut Exchange) {
    let http = exchange.http.clone();
    let Some(tracing) = &http.config.tracing else { return };
    exchange.trace_reason = decide(exchange, tracing);
    let traced = exchange.trace_reason != '4';
    let egress = exchange.info.connection.direction == Direction::Outbound;
    let decorator = exchange.matched.as_ref().and_then(|m| m.route.decorator.clone());
    let otel = matches!(&tracing.provider, Some(TracingProvider::OpenTelemetry { .. }));
    let mut operation = match &decorator {
        Some(decorator) => decorator.operation.to_string(),
        // As Envoy's tracers name them.
        None if otel => if egress { "egress" } else { "ingress" }.to_owned(),
        None => exchange.request.authority().unwrap_or_default().to_owned(),
    };
    let passed_on = decorator.filter(|d| d.propagate).map(|d| d.operation.to_string());
    let mut answered = None;
    const OPERATION: &str = "x-envoy-decorator-operation";
    if egress {
        if let Some(operation) = &passed_on {
            exchange.request.set(OPERATION, operation.as_bytes());
        }
    } else {
        match exchange.request.get_str(OPERATION).map(str::to_owned) {
            Some(own) => {
                operation = own;
                exchange.request.remove(OPERATION);
            }
            None => answered = passed_on,
        }
    }
    let Some(provider) = &tracing.provider else {
        // There are no spans, but their names are told.
        if let Some(name) = answered {
            exchange.add_to_response.push(AddToAnswer::set(OPERATION, name));
        }
        return;
    };
    let how = provider.propagation();
    let (long, share) = match provider {
        TracingProvider::Zipkin { long_ids, shared_span, .. } => (*long_ids, *shared_span && !egress),
        TracingProvider::OpenTelemetry { .. } => (true, false),
    };
    if TraceContext::is_broken(how, &exchange.request) {
        return;
    }
    let mut random = http.worker.random.borrow_mut();
    let before = TraceContext::extract(how, &exchange.request);
    let told = before.as_ref().and_then(|b| b.sampled);
    let told =
        told.or_else(|| (how != Propagation::W3c).then(|| TraceContext::b3_sampled(&exchange.request)).flatten());
    let sampled = match (told, how) {
        // As Envoy's tracer for OpenTelemetry: whoever says no is heard.
        (Some(told), Propagation::W3c) => told && traced,
        (told, _) => told.unwrap_or(traced),
    };
    let context = match &before {
        Some(before) if share => TraceContext { sampled: Some(sampled), ..*before },
        Some(before) => before.child(sampled, &mut random),
        None => TraceContext::root(long, sampled, &mut random),
    };
    drop(random);
    if !tracing.no_context_propagation {
        context.inject(how, &mut exchange.request);
        if how == Propagation::W3c && (before.is_none() || !exchange.request.contains("tracestate")) {
            // As Envoy, which has a state with every span of OpenTelemetry.
            exchange.request.set("tracestate", b"");
        }
    }
    exchange.info.trace_id = Some(context.trace_id().into());
    // Zipkin's spans tell their trace only.
    exchange.info.span_id = (how == Propagation::W3c).then(|| format!("{:016x}", context.span).into());
    exchange.info.traced = sampled;
    exchange.span = Some(Box::new(Span { context, sampled, operation, decorator: answered, egress, shared: share }));
}

/// Writes the context of a span below the request's into its copy for a mirror; `sampled`: the mirror's own decision.
pub(super) fn copied(exchange: &Exchange, sampled: Option<bool>, headers: &mut Headers) {
    let Some(span) = &exchange.span else { return };
    let Some(tracing) = exchange.http.config.tracing.as_ref().filter(|t| !t.no_context_propagation) else { return };
    let Some(how) = tracing.provider.as_ref().map(TracingProvider::propagation) else { return };
    let random = &mut exchange.http.worker.random.borrow_mut();
    span.context.child(sampled.unwrap_or(span.sampled), random).inject(how, headers);
}

/// Why the request is traced, as it stands in its id (Envoy `Tracing::Reason`); `4`: it is not.
fn decide(exchange: &mut Exchange, tracing: &Tracing) -> char {
    let id = exchange.request.get_str("x-request-id").unwrap_or_default().to_owned();
    let pack = exchange.http.config.pack_trace_reason;
    if pack && packed_reason(&id) == Some(true) {
        return char::from(id.as_bytes()[14]);
    }
    let worker = exchange.http.worker.clone();
    let mut random = worker.random.borrow_mut();
    let reason = if exchange.request.contains("x-client-trace-id") && tracing.client.hit(&mut random) {
        'b'
    } else if exchange.request.contains("x-envoy-force-trace") {
        'a'
    } else if tracing.random.hit(&mut random) {
        '9'
    } else {
        '4'
    };
    let reason = if reason != '4' && tracing.overall.hit(&mut random) { reason } else { '4' };
    if pack && let Some(packed) = pack_reason(&id, reason) {
        exchange.request.set("x-request-id", packed.as_bytes());
    }
    reason
}

/// The operation's name on its way back.
pub(super) fn answer_head(exchange: &mut Exchange, headers: &mut Headers) {
    let Some(span) = &mut exchange.span else { return };
    const OPERATION: &str = "x-envoy-decorator-operation";
    if span.egress {
        if let Some(operation) = headers.get_str(OPERATION) {
            span.operation = operation.to_owned();
        }
        headers.remove(OPERATION);
    } else if let Some(operation) = &span.decorator {
        headers.set(OPERATION, operation.as_bytes());
    }
}

/// Ends the span and hands it to the exporter (Envoy `HttpTracerUtility::finalizeDownstreamSpan`).
pub(super) fn end(exchange: &mut Exchange) {
    let Some(span) = exchange.span.take().filter(|s| s.sampled) else { return };
    let http = exchange.http.clone();
    let worker = &http.worker;
    let Some(tracing) = &http.config.tracing else { return };
    let Some(provider) = &tracing.provider else { return };
    let info = &exchange.info;
    let code = info.response_code.unwrap_or(0);
    let mut tags = tags(&exchange.request, info, tracing, &worker.shared.node);
    let failed = grpc_tags(exchange, &mut tags) || code == 0 || code >= 500;
    if failed {
        tags.push(("error".into(), "true".into()));
    }
    let start = info.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let took = info.times.complete.unwrap_or_default();
    let (target, item) = match provider {
        TracingProvider::Zipkin { collector, .. } => {
            let tags: serde_json::Map<String, Value> = tags.into_iter().map(|(k, v)| (k, v.into())).collect();
            let mut json = json!({
                "traceId": span.context.trace_id(),
                "id": format!("{:016x}", span.context.span),
                "name": span.operation,
                "kind": if span.egress { "CLIENT" } else { "SERVER" },
                "timestamp": start.as_micros() as u64,
                "duration": (took.as_micros() as u64).max(1),
                "localEndpoint": { "serviceName": worker.shared.node.cluster, "port": 0 },
                "annotations": annotations(&info.times, tracing.verbose, span.egress, start),
                "tags": tags,
            });
            if let Some(own) = worker.shared.own_address {
                json["localEndpoint"][if own.is_ipv4() { "ipv4" } else { "ipv6" }] = own.to_string().into();
            }
            if let Some(parent) = span.context.parent {
                json["parentId"] = format!("{parent:016x}").into();
            }
            if span.shared {
                json["shared"] = true.into();
            }
            (Target::Zipkin(collector.clone()), Item::Json(json))
        }
        TracingProvider::OpenTelemetry { collector, service, detects_environment } => {
            let Some(to) = collector.clone() else { return };
            let parent = span.context.parent.map(|p| p.to_be_bytes().to_vec()).unwrap_or_default();
            let item = Item::Span(otlp::Span {
                trace_id: span.context.trace.to_be_bytes().to_vec(),
                span_id: span.context.span.to_be_bytes().to_vec(),
                trace_state: exchange.request.get_str("tracestate").unwrap_or_default().to_owned(),
                parent_span_id: parent,
                name: span.operation.clone(),
                kind: if span.egress { 3 } else { 2 },
                start_time_unix_nano: start.as_nanos() as u64,
                end_time_unix_nano: (start + took).as_nanos() as u64,
                attributes: tags.iter().map(|(k, v)| otlp::KeyValue::text(k, v)).collect(),
                status: failed.then_some(otlp::Status { code: 2 }),
            });
            (Target::Spans { to, service: service.clone(), detects_environment: *detects_environment }, item)
        }
    };
    export::send(worker, target, item, export::When::Spans);
}

/// When what happened: of a verbose tracer everything that is known, of others that the answer left (`ss`), or came (`cr`).
fn annotations(times: &StreamTimes, verbose: bool, egress: bool, start: Duration) -> Vec<Value> {
    let events = [
        ("last_downstream_rx_byte_received", times.request_received),
        ("first_upstream_tx_byte_sent", times.upstream_first_tx),
        ("last_upstream_tx_byte_sent", times.upstream_last_tx),
        ("first_upstream_rx_byte_received", times.upstream_first_rx),
        ("last_upstream_rx_byte_received", times.upstream_last_rx),
        ("first_downstream_tx_byte_sent", times.downstream_first_tx),
        ("last_downstream_tx_byte_sent", times.downstream_last_tx),
    ];
    let events = events.into_iter().filter(|_| verbose);
    events
        .chain([(if egress { "cr" } else { "ss" }, times.complete)])
        .filter_map(|(what, at)| Some(json!({"timestamp": (start + at?).as_micros() as u64, "value": what})))
        .collect()
}

/// What is told of calls of gRPC (Envoy `HttpTracerUtility`); whether the call failed, other than by the client's fault.
fn grpc_tags(exchange: &Exchange, tags: &mut Vec<(String, String)>) -> bool {
    let (request, mut tag) = (&exchange.request, |name: &str, value: &str| tags.push((name.into(), value.into())));
    if exchange.grpc {
        tag("grpc.path", request.path().unwrap_or_default());
        tag("grpc.authority", request.authority().unwrap_or_default());
        tag("grpc.content_type", request.get_str("content-type").unwrap_or_default());
        if let Some(timeout) = request.get_str("grpc-timeout") {
            tag("grpc.timeout", timeout);
        }
    }
    let mut failed = false;
    for head in [exchange.response.as_ref(), exchange.trailers.as_ref()].into_iter().flatten() {
        let Some(status) = head.get_str("grpc-status") else { continue };
        tag("grpc.status_code", status);
        if let Some(message) = head.get_str("grpc-message") {
            tag("grpc.message", message);
        }
        // UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
        failed |= matches!(status.parse(), Ok(2 | 4 | 8 | 12..=15));
    }
    failed
}

fn tags(
    request: &Headers,
    info: &StreamInfo,
    tracing: &Tracing,
    node: &crate::bootstrap::NodeInfo,
) -> Vec<(String, String)> {
    let header = |name: &str| request.get_str(name).unwrap_or("-").to_owned();
    let mut path = request.get_str("x-envoy-original-path").or(request.path()).unwrap_or_default().to_owned();
    path.truncate((0..=tracing.max_path_tag_length as usize).rev().find(|at| path.is_char_boundary(*at)).unwrap_or(0));
    let scheme = request.get_str("x-forwarded-proto").unwrap_or_default();
    let mut tags: Vec<(String, String)> = vec![
        ("node_id".into(), node.id.clone()),
        ("component".into(), "proxy".into()),
        ("guid:x-request-id".into(), header("x-request-id")),
        ("http.url".into(), format!("{scheme}://{}{path}", request.authority().unwrap_or_default())),
        ("http.method".into(), header(":method")),
        ("downstream_cluster".into(), header("x-envoy-downstream-service-cluster")),
        ("user_agent".into(), header("user-agent")),
        ("http.protocol".into(), info.protocol.map_or("-", |p| p.as_str()).to_owned()),
        ("peer.address".into(), info.remote.ip().map_or_else(|| info.remote.to_string(), |ip| ip.to_string())),
        ("request_size".into(), info.bytes_received.to_string()),
        ("response_size".into(), info.bytes_sent.to_string()),
        ("response_flags".into(), info.flags.to_string()),
        ("http.status_code".into(), info.response_code.unwrap_or(0).to_string()),
    ];
    let zone = node.message.locality.as_ref().map(|locality| locality.zone.as_str()).unwrap_or_default();
    if !zone.is_empty() {
        tags.push(("zone".into(), zone.to_owned()));
    }
    if let Some(cluster) = &info.upstream.cluster {
        let shown = info.upstream.cluster_stat_name.as_ref().unwrap_or(cluster);
        tags.push(("upstream_cluster".into(), cluster.to_string()));
        tags.push(("upstream_cluster.name".into(), shown.to_string()));
    }
    if let Some(id) = request.get_str("x-client-trace-id") {
        tags.push(("guid:x-client-trace-id".into(), id.to_owned()));
    }
    for tag in &tracing.custom_tags {
        let value = match &tag.source {
            TagSource::Literal(value) => value.to_string(),
            TagSource::Environment(name, default) => {
                (info.connection.environment)(name).unwrap_or_else(|| default.to_string())
            }
            TagSource::Header(name, default) => request.get_str(name).unwrap_or(default).to_owned(),
            TagSource::Metadata { of, namespace, path, default } => {
                let metadata = match of {
                    MetadataSource::Route => info.route.as_ref().map(|r| &r.metadata),
                    MetadataSource::UpstreamHost => info.upstream.host.as_ref().map(|h| &*h.metadata),
                    MetadataSource::Cluster => info.upstream.cluster_metadata.as_deref(),
                    _ => Some(&info.dynamic_metadata),
                };
                match metadata.and_then(|m| m.get(namespace, path)) {
                    Some(Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                    None => default.to_string(),
                }
            }
        };
        if !value.is_empty() {
            tags.push((tag.name.to_string(), value));
        }
    }
    tags
}
