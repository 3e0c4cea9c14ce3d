//! The span of a request: which requests are traced, the context passed on, what is told to the collector.

use super::encode::AddToAnswer;
use super::exchange::Exchange;
use crate::export::{self, Item, Target, otlp};
use proxy_core::filters::{HttpFilter, HttpFilterEntry};
use proxy_core::format::{Format, MetadataSource};
use proxy_core::hcm::{CustomTag, TagSource, Tracing, TracingProvider};
use proxy_core::listener::Direction;
use proxy_core::stream_info::StreamTimes;
use proxy_core::trace::{Propagation, TraceContext, pack_reason, packed_reason};
use proxy_core::{FormatContext, Headers, ResponseFlags, StreamInfo};
use serde_json::{Value, json};
use std::borrow::Cow;
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
    /// The hop's client tells of the call itself, so that this end is its server.
    server: bool,
    shared: bool,
    /// Its parent is another process's.
    remote: bool,
    /// The span of the try that is under way, if tries have spans of their own.
    attempt: Option<Attempt>,
}

/// The span of one upstream request.
struct Attempt {
    context: TraceContext,
    operation: String,
    /// When it began, from the start of the stream on.
    began: Duration,
    /// Tries before it.
    retries: u32,
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
    let splits = matches!(&tracing.provider, Some(TracingProvider::Zipkin { split: true, .. }));
    let server = !egress || splits || spawns(exchange, tracing);
    let matched = exchange.matched.clone();
    let of_route = matched.as_ref().and_then(|m| m.route.tracing.as_ref());
    let named = of_route.and_then(|route| route.operation.as_ref()).or(tracing.operation.as_ref());
    let named = named.map(|format| written(format, &FormatContext::new(&exchange.info, Some(&exchange.request), None)));
    // An operation of the configuration takes the decorator's place.
    let decorator = matched.as_ref().and_then(|m| m.route.decorator.clone()).filter(|_| named.is_none());
    let otel = matches!(&tracing.provider, Some(TracingProvider::OpenTelemetry { .. }));
    let authority = exchange.request.authority().unwrap_or_default();
    let is_named = named.is_some();
    let mut operation = match (named, &decorator) {
        (Some(named), _) => named,
        (None, Some(decorator)) => decorator.operation.to_string(),
        // As Envoy's tracers name them.
        (None, None) if otel && egress => format!("egress {authority}"),
        (None, None) if otel => "ingress".to_owned(),
        (None, None) => authority.to_owned(),
    };
    let passed_on = decorator.filter(|d| d.propagate).map(|d| d.operation.to_string());
    let mut answered = None;
    const OPERATION: &str = "x-envoy-decorator-operation";
    if egress {
        if let Some(operation) = &passed_on {
            exchange.request.set(OPERATION, operation.as_bytes());
        }
    } else if !is_named {
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
        TracingProvider::Zipkin { long_ids, shared_span, .. } => (*long_ids, *shared_span && server),
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
    let remote = before.is_some();
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
    exchange.span = Some(Box::new(Span {
        context,
        sampled,
        operation,
        decorator: answered,
        egress,
        server,
        shared: share,
        remote,
        attempt: None,
    }));
}

/// Whether tries have spans of their own: as the listener says, or its router.
fn spawns(exchange: &Exchange, tracing: &Tracing) -> bool {
    let starts = |entry: &HttpFilterEntry| matches!(&entry.filter, HttpFilter::Router(r) if r.start_child_span);
    tracing.spawn_upstream_span || exchange.http.config.filters.last().is_some_and(starts)
}

fn written(format: &Format, cx: &FormatContext<'_>) -> String {
    let mut out = Vec::new();
    format.write(cx, &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// Begins the span of a try, if tries have some, and writes its context into the request (Envoy `UpstreamRequest`).
pub(super) fn begin_try(exchange: &mut Exchange, cluster: &str) {
    if exchange.span.is_none() {
        return;
    }
    let http = exchange.http.clone();
    let Some(tracing) = http.config.tracing.as_ref().filter(|tracing| spawns(exchange, tracing)) else { return };
    let of_route = exchange.matched.as_ref().and_then(|m| m.route.tracing.as_ref());
    let named = of_route.and_then(|route| route.upstream_operation.as_ref()).or(tracing.upstream_operation.as_ref());
    let cx = FormatContext::new(&exchange.info, Some(&exchange.request), None);
    let operation = named.map_or_else(|| format!("router {cluster} egress"), |format| written(format, &cx));
    let (began, retries) = (exchange.elapsed(), exchange.info.upstream.attempts.saturating_sub(1));
    let Some(span) = &mut exchange.span else { return };
    let context = span.context.child(span.sampled, &mut http.worker.random.borrow_mut());
    span.attempt = Some(Attempt { context, operation, began, retries });
    if let Some(provider) = tracing.provider.as_ref().filter(|_| !tracing.no_context_propagation) {
        context.inject(provider.propagation(), &mut exchange.request);
    }
}

/// How a try ended.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum TryEnd {
    /// With all of its answer.
    Complete,
    /// Nobody wanted (the rest of) the answer.
    Canceled,
    /// By a failure, of which this is Envoy's name.
    Failed(&'static str),
}

/// Ends the span of a try (Envoy `HttpTracerUtility::finalizeUpstreamSpan`). `head`: the answer's, if there was one; that of an
/// answer that was passed on may be the client's.
pub(super) fn end_try(
    exchange: &mut Exchange,
    status: Option<u16>,
    head: Option<&Headers>,
    flags: ResponseFlags,
    end: TryEnd,
) {
    let Some(span) = &mut exchange.span else { return };
    let (Some(attempt), true) = (span.attempt.take(), span.sampled) else { return };
    let http = exchange.http.clone();
    let Some(tracing) = &http.config.tracing else { return };
    let upstream = &exchange.info.upstream;
    let mut tags = Tags::default();
    tags.push("component", "proxy");
    tags.push("http.protocol", upstream.protocol.map_or("-", |p| p.as_str()));
    tags.push("http.status_code", status.unwrap_or(0).to_string());
    tags.push("response_flags", flags.to_string());
    tags.cluster(&exchange.info);
    if let Some(host) = &upstream.host {
        tags.push("upstream_address", host.address.to_string());
        tags.push("peer.address", host.address.to_string());
    }
    if attempt.retries > 0 {
        tags.push("retry.count", attempt.retries.to_string());
    }
    let heads = [head.or(exchange.response.as_ref().filter(|_| status.is_some())), exchange.trailers.as_ref()];
    let mut failed = tags.grpc_answer(heads) || status.is_none_or(|status| status >= 500);
    match end {
        TryEnd::Complete => {}
        TryEnd::Canceled => tags.push("canceled", "true"),
        TryEnd::Failed(reason) => {
            failed = true;
            tags.push("error.reason", reason);
        }
    }
    if failed {
        tags.push("error", "true");
    }
    tags.custom(exchange, tracing);
    let now = exchange.elapsed();
    let told = Told {
        context: attempt.context,
        operation: attempt.operation,
        server: false,
        shared: false,
        remote: false,
        status,
        from: attempt.began,
        took: now.saturating_sub(attempt.began),
        annotations: attempted(&exchange.info.times, tracing.verbose, now),
        tags,
        failed,
    };
    tell(exchange, tracing, told);
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
    let of_route = exchange.matched.as_ref().and_then(|m| m.route.tracing.as_ref());
    let (client, share, overall) = match of_route {
        Some(route) => (&route.client, &route.random, &route.overall),
        None => (&tracing.client, &tracing.random, &tracing.overall),
    };
    let reason = if exchange.request.contains("x-client-trace-id") && client.hit(&mut random) {
        'b'
    } else if exchange.request.contains("x-envoy-force-trace") {
        'a'
    } else if share.hit(&mut random) {
        '9'
    } else {
        '4'
    };
    let reason = if reason != '4' && overall.hit(&mut random) { reason } else { '4' };
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
    // What is still under way ends with the request.
    end_try(exchange, None, None, ResponseFlags::NONE, TryEnd::Canceled);
    let Some(span) = exchange.span.take().filter(|s| s.sampled) else { return };
    let http = exchange.http.clone();
    let Some(tracing) = &http.config.tracing else { return };
    let info = &exchange.info;
    let code = info.response_code.unwrap_or(0);
    let mut tags = Tags::of_request(exchange, tracing, &http.worker.shared.node);
    let failed = tags.grpc(exchange) || code == 0 || code >= 500;
    if failed {
        tags.push("error", "true");
    }
    tags.custom(exchange, tracing);
    let told = Told {
        context: span.context,
        operation: span.operation,
        server: span.server,
        shared: span.shared,
        remote: span.remote,
        status: info.response_code,
        from: Duration::ZERO,
        took: info.times.complete.unwrap_or_default(),
        annotations: annotations(&info.times, tracing.verbose, !span.server),
        tags,
        failed,
    };
    tell(exchange, tracing, told);
}

/// Methods that OpenTelemetry's conventions know.
const METHODS: [&str; 9] = ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"];

/// A span that is over.
struct Told {
    context: TraceContext,
    operation: String,
    /// Of a call that came here; else of one that left.
    server: bool,
    shared: bool,
    remote: bool,
    status: Option<u16>,
    /// From the start of the stream on.
    from: Duration,
    took: Duration,
    /// What happened, and when, from the start of the stream on.
    annotations: Vec<(&'static str, Duration)>,
    tags: Tags,
    failed: bool,
}

/// Hands a span to the exporter, in the provider's form.
fn tell(exchange: &Exchange, tracing: &Tracing, told: Told) {
    let worker = &exchange.http.worker;
    let Some(provider) = &tracing.provider else { return };
    let Told { context, operation, server, shared, remote, status, from, took, annotations, tags, failed } = told;
    let stream = exchange.info.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let start = stream + from;
    let (target, item) = match provider {
        TracingProvider::Zipkin { collector, .. } => {
            let tags: serde_json::Map<String, Value> =
                tags.0.into_iter().map(|(k, v)| (k.into_owned(), v.into())).collect();
            let annotation =
                |(what, at): (&str, Duration)| json!({"timestamp": (stream + at).as_micros() as u64, "value": what});
            let mut json = json!({
                "traceId": context.trace_id(),
                "id": format!("{:016x}", context.span),
                "name": operation,
                "kind": if server { "SERVER" } else { "CLIENT" },
                "timestamp": start.as_micros() as u64,
                "duration": (took.as_micros() as u64).max(1),
                "localEndpoint": { "serviceName": worker.shared.node.cluster, "port": 0 },
                "annotations": annotations.into_iter().map(annotation).collect::<Vec<_>>(),
                "tags": tags,
            });
            if let Some(own) = worker.shared.own_address {
                json["localEndpoint"][if own.is_ipv4() { "ipv4" } else { "ipv6" }] = own.to_string().into();
            }
            if let Some(parent) = context.parent {
                json["parentId"] = format!("{parent:016x}").into();
            }
            if shared {
                json["shared"] = true.into();
            }
            (Target::Zipkin(collector.clone()), Item::Json(json))
        }
        TracingProvider::OpenTelemetry { collector, service, detects_environment } => {
            let Some(to) = collector.clone() else { return };
            let parent = context.parent.map(|p| p.to_be_bytes().to_vec()).unwrap_or_default();
            // By OpenTelemetry's conventions, what a server blames its client for is a failure to the client.
            let failed = failed || (!server && status.is_some_and(|status| status >= 400));
            let remote = if remote { otlp::IS_REMOTE } else { 0 };
            let attribute = |(name, value): &(Cow<'_, str>, String)| match &**name {
                "http.method" if !METHODS.contains(&value.as_str()) => otlp::KeyValue::text(name, "_OTHER"),
                _ => otlp::KeyValue::text(name, value),
            };
            let event = |(what, at): &(&str, Duration)| otlp::Event {
                time_unix_nano: (stream + *at).as_nanos() as u64,
                name: (*what).to_owned(),
            };
            let item = Item::Span(otlp::Span {
                trace_id: context.trace.to_be_bytes().to_vec(),
                span_id: context.span.to_be_bytes().to_vec(),
                trace_state: exchange.request.get_str("tracestate").unwrap_or_default().to_owned(),
                parent_span_id: parent,
                name: operation,
                kind: if server { 2 } else { 3 },
                start_time_unix_nano: start.as_nanos() as u64,
                end_time_unix_nano: (start + took).as_nanos() as u64,
                attributes: tags.0.iter().map(attribute).collect(),
                // The last one says that the span ended, which is Zipkin's word.
                events: annotations.iter().rev().skip(1).rev().map(event).collect(),
                status: failed.then_some(otlp::Status { code: 2 }),
                flags: otlp::SAMPLED | otlp::HAS_IS_REMOTE | remote,
            });
            (Target::Spans { to, service: service.clone(), detects_environment: *detects_environment }, item)
        }
    };
    export::send(worker, target, item, export::When::Spans);
}

/// When what happened: of a verbose tracer everything that is known, of others that the answer left (`ss`), or came (`cr`).
fn annotations(times: &StreamTimes, verbose: bool, egress: bool) -> Vec<(&'static str, Duration)> {
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
    let events = events.chain([(if egress { "cr" } else { "ss" }, times.complete)]);
    events.filter_map(|(what, at)| Some((what, at?))).collect()
}

/// As [`annotations`], of a try.
fn attempted(times: &StreamTimes, verbose: bool, now: Duration) -> Vec<(&'static str, Duration)> {
    let events = [
        ("first_upstream_tx_byte_sent", times.upstream_first_tx),
        ("last_upstream_tx_byte_sent", times.upstream_last_tx),
        ("first_upstream_rx_byte_received", times.upstream_first_rx),
        ("last_upstream_rx_byte_received", times.upstream_last_rx),
    ];
    let events = events.into_iter().filter(|_| verbose).chain([("cr", Some(now))]);
    events.filter_map(|(what, at)| Some((what, at?))).collect()
}

/// What a span says, by name; each once.
#[derive(Default)]
struct Tags(Vec<(Cow<'static, str>, String)>);

impl Tags {
    fn push(&mut self, name: &'static str, value: impl Into<String>) {
        self.0.push((name.into(), value.into()));
    }

    /// What is told of every request (Envoy `HttpTracerUtility`).
    fn of_request(exchange: &Exchange, tracing: &Tracing, node: &crate::bootstrap::NodeInfo) -> Self {
        let (request, info) = (&exchange.request, &exchange.info);
        let header = |name: &str| request.get_str(name).unwrap_or("-");
        let mut path = request.get_str("x-envoy-original-path").or(request.path()).unwrap_or_default();
        let most = (0..=tracing.max_path_tag_length as usize).rev().find(|at| path.is_char_boundary(*at));
        path = &path[..most.unwrap_or(0).min(path.len())];
        let scheme = request.get_str("x-forwarded-proto").unwrap_or_default();
        let mut tags = Self::default();
        tags.push("node_id", &*node.id);
        tags.push("component", "proxy");
        tags.push("guid:x-request-id", header("x-request-id"));
        tags.push("http.url", format!("{scheme}://{}{path}", request.authority().unwrap_or_default()));
        tags.push("http.method", header(":method"));
        tags.push("downstream_cluster", header("x-envoy-downstream-service-cluster"));
        tags.push("user_agent", header("user-agent"));
        tags.push("http.protocol", info.protocol.map_or("-", |p| p.as_str()));
        tags.push("peer.address", info.remote.ip().map_or_else(|| info.remote.to_string(), |ip| ip.to_string()));
        tags.push("request_size", info.bytes_received.to_string());
        tags.push("response_size", info.bytes_sent.to_string());
        tags.push("response_flags", info.flags.to_string());
        tags.push("http.status_code", info.response_code.unwrap_or(0).to_string());
        let zone = node.message.locality.as_ref().map(|locality| locality.zone.as_str()).unwrap_or_default();
        if !zone.is_empty() {
            tags.push("zone", zone);
        }
        tags.cluster(info);
        if let Some(id) = request.get_str("x-client-trace-id") {
            tags.push("guid:x-client-trace-id", id);
        }
        tags
    }

    fn cluster(&mut self, info: &StreamInfo) {
        if let Some(cluster) = &info.upstream.cluster {
            let shown = info.upstream.cluster_stat_name.as_ref().unwrap_or(cluster);
            self.push("upstream_cluster", &**cluster);
            self.push("upstream_cluster.name", &**shown);
        }
    }

    /// What is told of calls of gRPC (Envoy `HttpTracerUtility`); whether the call failed, other than by the client's fault.
    fn grpc(&mut self, exchange: &Exchange) -> bool {
        let request = &exchange.request;
        if exchange.grpc {
            self.push("grpc.path", request.path().unwrap_or_default());
            self.push("grpc.authority", request.authority().unwrap_or_default());
            self.push("grpc.content_type", request.get_str("content-type").unwrap_or_default());
            if let Some(timeout) = request.get_str("grpc-timeout") {
                self.push("grpc.timeout", timeout);
            }
        }
        self.grpc_answer([exchange.response.as_ref(), exchange.trailers.as_ref()])
    }

    /// What an answer says of a call; whether that failed.
    fn grpc_answer(&mut self, heads: [Option<&Headers>; 2]) -> bool {
        let mut failed = false;
        for head in heads.into_iter().flatten() {
            let Some(status) = head.get_str("grpc-status") else { continue };
            self.push("grpc.status_code", status);
            if let Some(message) = head.get_str("grpc-message") {
                self.push("grpc.message", message);
            }
            // UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
            failed |= matches!(status.parse(), Ok(2 | 4 | 8 | 12..=15));
        }
        failed
    }

    /// Tags of the route, and those of the listener whose names they do not take. They win over what is told anyway.
    fn custom(&mut self, exchange: &Exchange, tracing: &Tracing) {
        let of_route = exchange.matched.as_ref().and_then(|m| m.route.tracing.as_ref());
        let of_route = of_route.map_or(&[][..], |route| &route.custom_tags);
        let taken = |tag: &CustomTag| of_route.iter().any(|own| own.name == tag.name);
        for tag in of_route.iter().chain(tracing.custom_tags.iter().filter(|tag| !taken(tag))) {
            let value = value(&tag.source, exchange);
            if value.is_empty() {
                continue;
            }
            self.0.retain(|(name, _)| **name != *tag.name);
            self.0.push((tag.name.to_string().into(), value));
        }
    }
}

fn value(source: &TagSource, exchange: &Exchange) -> String {
    let (request, info) = (&exchange.request, &exchange.info);
    match source {
        TagSource::Literal(value) => value.to_string(),
        TagSource::Format(format) => {
            let mut cx = FormatContext::new(info, Some(request), exchange.response.as_ref());
            cx.trailers = exchange.trailers.as_ref();
            written(format, &cx)
        }
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
    }
}
