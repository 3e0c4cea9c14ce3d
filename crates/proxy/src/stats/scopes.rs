//! The counters Envoy has per cluster, connection manager, listener and TCP proxy. Names are Envoy's
//! (docs: configuration/upstream/cluster_manager/cluster_stats and its siblings).

use super::registry::{Sample, Scope};
use super::{Codes, Counter, Gauge, Histogram};
use mesh_types::ArcStr;

macro_rules! scope {
    ($(#[$doc:meta])* $name:ident { counters { $($c:ident),* $(,)? } gauges { $($g:ident),* $(,)? } histograms { $($h:ident),* $(,)? } late { $($late:ident),* $(,)? } codes { $($code:ident = $prefix:literal),* $(,)? } }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name {
            $(pub(crate) $c: Counter,)*
            $(pub(crate) $g: Gauge,)*
            $(pub(crate) $h: Histogram,)*
            $(pub(crate) $late: Histogram,)*
            $(pub(crate) $code: Codes,)*
            /// Rarely used counters by dotted name.
            pub(crate) other: Named,
        }

        impl Scope for $name {
            fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
                $(visit_counter(stringify!($c), self.$c.get(), f);)*
                $(visit_gauge(stringify!($g), self.$g.get(), f);)*
                $(f(stringify!($h), Sample::Histogram(self.$h.read()));)*
                $({
                    let sample = self.$late.read();
                    if sample.count() > 0 { f(&stringify!($late).replace("internal_", "internal.upstream_"), Sample::Histogram(sample)); }
                })*
                $(visit_codes($prefix, &self.$code, f);)*
                self.more(f);
                self.other.visit(f);
            }
        }
    };
}

/// What a scope counts beside its fields.
trait More {
    fn more(&self, _f: &mut dyn FnMut(&str, Sample)) {}
}

/// `ssl_handshake` is `ssl.handshake`, and there only with TLS: [`ssl_zero`] makes the ones that count nothing yet.
fn visit_counter(field: &'static str, value: u64, f: &mut dyn FnMut(&str, Sample)) {
    match field.strip_prefix("ssl_") {
        Some(_) if value == 0 => {}
        Some(rest) => f(&format!("ssl.{rest}"), Sample::Counter(value)),
        None => f(field, Sample::Counter(value)),
    }
}

/// Likewise `http2_streams_active`, of which [`HTTP2_GAUGES`] makes the one that is 0.
fn visit_gauge(field: &'static str, value: u64, f: &mut dyn FnMut(&str, Sample)) {
    match field.strip_prefix("http2_") {
        Some(_) if value == 0 => {}
        Some(rest) => f(&format!("http2.{rest}"), Sample::Gauge(value)),
        None => f(field, Sample::Gauge(value)),
    }
}

/// The counters of every TLS transport, at zero.
pub(crate) fn ssl_zero(f: &mut dyn FnMut(&str, Sample)) {
    for name in [
        "connection_error",
        "fail_verify_cert_hash",
        "fail_verify_error",
        "fail_verify_no_cert",
        "fail_verify_san",
        "handshake",
        "no_certificate",
        "ocsp_staple_failed",
        "ocsp_staple_omitted",
        "ocsp_staple_requests",
        "ocsp_staple_responses",
        "session_reused",
    ] {
        f(&format!("ssl.{name}"), Sample::Counter(0));
    }
}

/// On top of the code of an answer to a call of gRPC that counts as one only (`suppress_grpc_request_failure_code_stats`):
/// the cluster's and the retries' codes leave it out, where Envoy tells apart who asked it is there.
const QUIET: u16 = 1 << 15;

/// `PREFIX_503` and `PREFIX_5xx` from one table.
fn visit_codes(prefix: &str, codes: &Codes, f: &mut dyn FnMut(&str, Sample)) {
    let mut classes = [0u64; 6];
    let (mut unknown, mut all) = (0, 0);
    codes.each(|code, n| {
        all += n;
        if code & QUIET != 0 && matches!(prefix, "upstream_rq" | "retry.upstream_rq") {
            return;
        }
        let code = code & !QUIET;
        match classes.get_mut(usize::from(code / 100)) {
            Some(class) if code >= 100 => {
                *class += n;
                if prefix != "downstream_rq" {
                    f(&format!("{prefix}_{code}"), Sample::Counter(n));
                }
            }
            // No class of answers that HTTP knows (Envoy `CodeStatsImpl::upstreamRqStatName`).
            _ => unknown += n,
        }
    });
    if unknown > 0 && prefix != "downstream_rq" {
        f(&format!("{prefix}_unknown"), Sample::Counter(unknown));
    }
    for (class, n) in classes.iter().enumerate().skip(1) {
        // Envoy creates a cluster's classes when first counted, a connection manager's at once.
        if *n > 0 || prefix == "downstream_rq" {
            f(&format!("{prefix}_{class}xx"), Sample::Counter(*n));
        }
    }
    if all > 0 || matches!(prefix, "downstream_rq" | "upstream_rq") {
        f(&format!("{prefix}_completed"), Sample::Counter(all));
    }
}

/// Requests of this proxy's own: mirrored ones, checks, keys, exports (Envoy `AsyncClientImpl`).
pub(crate) const OWN_REQUESTS: &str = "http.async-client.rq_total";

/// What else Envoy's client for them has, which is a router without a listener.
pub(crate) const OWN_REQUESTS_ELSE: [&str; 11] = [
    "no_cluster",
    "no_route",
    "passthrough_internal_redirect_bad_location",
    "passthrough_internal_redirect_no_route",
    "passthrough_internal_redirect_predicate",
    "passthrough_internal_redirect_too_many_redirects",
    "passthrough_internal_redirect_unsafe_scheme",
    "rq_direct_response",
    "rq_overload_local_reply",
    "rq_redirect",
    "rq_reset_after_downstream_response_started",
];

/// What Envoy's HTTP/1 codec counts, for all listeners: all of these exist once there was a connection.
pub(crate) const HTTP1_CODEC: [&str; 4] = [
    "http1.dropped_headers_with_underscores",
    "http1.metadata_not_supported_error",
    "http1.requests_rejected_with_underscores_in_headers",
    "http1.response_flood",
];

/// What Envoy's HTTP/2 codec counts, for all listeners and per cluster: all of these exist once there was a connection.
pub(crate) const HTTP2_CODEC: [&str; 25] = [
    "http2.cookies_total_bytes_too_large",
    "http2.deferred_stream_close",
    "http2.dropped_headers_with_underscores",
    "http2.goaway_sent",
    "http2.header_list_size_too_large",
    "http2.header_overflow",
    "http2.headers_cb_no_stream",
    "http2.inbound_empty_frames_flood",
    "http2.inbound_priority_frames_flood",
    "http2.inbound_window_update_frames_flood",
    "http2.keepalive_timeout",
    "http2.metadata_empty_frames",
    "http2.nghttp2_downstream_connections",
    "http2.nghttp2_upstream_connections",
    "http2.oghttp2_downstream_connections",
    "http2.oghttp2_upstream_connections",
    "http2.outbound_control_flood",
    "http2.outbound_flood",
    "http2.requests_rejected_with_underscores_in_headers",
    "http2.rx_messaging_error",
    "http2.rx_reset",
    "http2.stream_refused_errors",
    "http2.trailers",
    "http2.tx_flush_timeout",
    "http2.tx_reset",
];

/// Its gauges. What is queued in the crate is not known here.
pub(crate) const HTTP2_GAUGES: [&str; 4] = [
    "http2.outbound_control_frames_active",
    "http2.outbound_frames_active",
    "http2.pending_send_bytes",
    "http2.streams_active",
];

/// Counters and gauges with names that come from configuration or requests (`fault.*`, `grpc.*`): few, made on first use.
#[derive(Debug, Default)]
pub(crate) struct Named {
    counters: std::sync::Mutex<std::collections::BTreeMap<String, u64>>,
    gauges: std::sync::Mutex<std::collections::BTreeMap<String, u64>>,
}

impl Named {
    /// The lock is uncontended: one writer, and a scrape now and then.
    pub(crate) fn inc(&self, name: &str) {
        self.add(name, 1);
    }

    pub(crate) fn add(&self, name: &str, by: u64) {
        let mut map = self.counters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match map.get_mut(name) {
            Some(n) => *n += by,
            None => {
                map.insert(name.to_owned(), by);
            }
        }
    }

    /// Makes the counter exist at 0.
    pub(crate) fn touch(&self, name: &str) {
        let mut map = self.counters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !map.contains_key(name) {
            map.insert(name.to_owned(), 0);
        }
    }

    /// Makes several counters exist at 0.
    pub(crate) fn touch_all(&self, names: &[&str]) {
        let mut map = self.counters.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for name in names {
            if !map.contains_key(*name) {
                map.insert((*name).to_owned(), 0);
            }
        }
    }

    /// Makes several gauges exist at 0.
    pub(crate) fn touch_gauges(&self, names: &[&str]) {
        let mut map = self.gauges.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for name in names {
            if !map.contains_key(*name) {
                map.insert((*name).to_owned(), 0);
            }
        }
    }

    pub(crate) fn set_gauge(&self, name: &str, value: u64) {
        let mut map = self.gauges.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match map.get_mut(name) {
            Some(n) => *n = value,
            None => {
                map.insert(name.to_owned(), value);
            }
        }
    }

    /// Moves a gauge up or down.
    pub(crate) fn shift(&self, name: &str, up: bool) {
        let mut map = self.gauges.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let n = map.entry(name.to_owned()).or_default();
        *n = if up { n.wrapping_add(1) } else { n.wrapping_sub(1) };
    }

    pub(crate) fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        for (name, n) in self.counters.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            f(name, Sample::Counter(*n));
        }
        for (name, n) in self.gauges.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            f(name, Sample::Gauge(*n));
        }
    }
}

scope! {
    /// Per upstream cluster.
    ClusterStats {
        counters {
            assignment_stale, assignment_timeout_received, bind_errors, lb_healthy_panic, lb_local_cluster_not_ok,
            lb_recalculate_zone_structures, lb_zone_cluster_too_small, lb_zone_no_capacity_left, lb_zone_routing_all_directly,
            lb_zone_routing_cross_zone, lb_zone_routing_sampled, lb_subsets_fallback, lb_subsets_fallback_panic, lb_subsets_selected, original_dst_host_invalid, retry_or_shadow_abandoned, update_attempt, update_empty,
            update_failure, update_no_rebuild, update_success, upstream_cx_close_notify, upstream_cx_connect_attempts_exceeded,
            upstream_cx_connect_fail, upstream_cx_connect_timeout, upstream_cx_connect_with_0_rtt, upstream_cx_destroy,
            upstream_cx_destroy_local, upstream_cx_destroy_local_with_active_rq, upstream_cx_destroy_remote,
            upstream_cx_destroy_remote_with_active_rq, upstream_cx_destroy_with_active_rq, upstream_cx_http1_total,
            upstream_cx_http2_total, upstream_cx_idle_timeout, upstream_cx_max_duration_reached, upstream_cx_max_requests,
            upstream_cx_none_healthy, upstream_cx_overflow, upstream_cx_pool_overflow, upstream_cx_protocol_error,
            upstream_cx_rx_bytes_total, upstream_cx_total, upstream_cx_tx_bytes_total,
            upstream_flow_control_backed_up_total, upstream_flow_control_drained_total,
            upstream_flow_control_paused_reading_total, upstream_flow_control_resumed_reading_total,
            upstream_internal_redirect_failed_total, upstream_internal_redirect_succeeded_total, upstream_rq_cancelled,
            upstream_rq_maintenance_mode, upstream_rq_max_duration_reached, upstream_rq_pending_failure_eject,
            upstream_rq_pending_overflow, upstream_rq_pending_total, upstream_rq_per_try_idle_timeout,
            upstream_rq_per_try_timeout, upstream_rq_retry, upstream_rq_retry_backoff_exponential,
            upstream_rq_retry_backoff_ratelimited, upstream_rq_retry_limit_exceeded, upstream_rq_retry_overflow,
            upstream_rq_retry_success, upstream_rq_rx_reset, upstream_rq_timeout, upstream_rq_total, upstream_rq_tx_reset,
            ssl_handshake, ssl_connection_error, ssl_fail_verify_error, ssl_fail_verify_san, ssl_fail_verify_no_cert,
            ssl_fail_verify_cert_hash, ssl_no_certificate, ssl_session_reused
        }
        gauges {
            http2_streams_active, upstream_cx_active, upstream_cx_rx_bytes_buffered, upstream_cx_tx_bytes_buffered, upstream_rq_active,
            upstream_rq_pending_active
        }
        histograms { upstream_cx_connect_ms, upstream_cx_length_ms, upstream_rq_per_cx }
        late { upstream_rq_time, internal_rq_time }
        codes { upstream_rq = "upstream_rq", internal_rq = "internal.upstream_rq", retry_rq = "retry.upstream_rq" }
    }
}

scope! {
    /// Per HTTP connection manager.
    HttpStats {
        counters {
            downstream_cx_delayed_close_timeout, downstream_cx_destroy, downstream_cx_destroy_active_rq,
            downstream_cx_destroy_local, downstream_cx_destroy_local_active_rq, downstream_cx_destroy_remote,
            downstream_cx_destroy_remote_active_rq, downstream_cx_drain_close, downstream_cx_http1_total,
            downstream_cx_http2_total, downstream_cx_idle_timeout, downstream_cx_max_duration_reached,
            downstream_cx_max_requests_reached, downstream_cx_overload_disable_keepalive, downstream_cx_protocol_error,
            downstream_cx_rx_bytes_total, downstream_cx_ssl_total, downstream_cx_total, downstream_cx_tx_bytes_total,
            downstream_cx_upgrades_total, downstream_flow_control_paused_reading_total,
            downstream_flow_control_resumed_reading_total, downstream_rq_failed_path_normalization,
            downstream_rq_header_timeout, downstream_rq_http1_total, downstream_rq_http2_total, downstream_rq_idle_timeout,
            downstream_rq_max_duration_reached, downstream_rq_non_relative_path, downstream_rq_overload_close,
            downstream_rq_redirected_with_normalized_path, downstream_rq_rejected_via_ip_detection,
            downstream_rq_response_before_rq_complete, downstream_rq_rx_reset, downstream_rq_timeout, downstream_rq_too_large,
            downstream_rq_too_many_premature_resets, downstream_rq_total, downstream_rq_tx_reset, downstream_rq_ws_on_non_ws_route,
            no_cluster, no_route, passthrough_internal_redirect_bad_location, rq_direct_response, rq_redirect,
            rq_reset_after_downstream_response_started, rq_total, rs_too_large
        }
        gauges {
            downstream_cx_active, downstream_cx_http1_active, downstream_cx_http2_active, downstream_cx_ssl_active,
            downstream_cx_upgrades_active, downstream_rq_active, downstream_cx_rx_bytes_buffered, downstream_cx_tx_bytes_buffered
        }
        histograms { downstream_rq_time, downstream_cx_length_ms }
        late {}
        codes { downstream_rq = "downstream_rq" }
    }
}

scope! {
    /// Per listener.
    ListenerStats {
        counters {
            downstream_cx_destroy, downstream_cx_overflow, downstream_cx_overload_reject, downstream_cx_total,
            downstream_cx_transport_socket_connect_timeout, downstream_global_cx_overflow, downstream_pre_cx_timeout,
            downstream_listener_filter_error, downstream_listener_filter_remote_close, no_filter_chain_match,
            ssl_connection_error, ssl_fail_verify_cert_hash, ssl_fail_verify_error, ssl_fail_verify_no_cert,
            ssl_fail_verify_san, ssl_handshake, ssl_no_certificate, ssl_session_reused
        }
        gauges { downstream_cx_active, downstream_pre_cx_active }
        histograms { connections_accepted_per_socket_event, downstream_cx_length_ms }
        late {}
        codes {}
    }
}

scope! {
    /// Per TCP proxy.
    TcpStats {
        counters {
            downstream_cx_no_route, downstream_cx_rx_bytes_total, downstream_cx_total, downstream_cx_tx_bytes_total,
            downstream_flow_control_paused_reading_total, downstream_flow_control_resumed_reading_total, early_data_received_count_total,
            idle_timeout, max_downstream_connection_duration, upstream_flush_total
        }
        gauges { downstream_cx_rx_bytes_buffered, downstream_cx_tx_bytes_buffered, upstream_flush_active }
        histograms {}
        late {}
        codes {}
    }
}

scope! {
    /// Counters whose whole name comes from configuration.
    PlainStats { counters {} gauges { http2_streams_active } histograms {} late {} codes {} }
}

scope! {
    /// Answers of an HTTP connection manager on one listener (`listener.ADDRESS.http.PREFIX.*`).
    ListenerHttpStats { counters {} gauges {} histograms {} late {} codes { downstream_rq = "downstream_rq" } }
}

/// A listener's connections on one thread (`worker_0.downstream_cx_total`).
pub(crate) struct OfThread(pub(crate) std::sync::Arc<ListenerStats>, pub(crate) String);

impl Scope for OfThread {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        let Self(stats, thread) = self;
        f(&format!("{thread}.downstream_cx_active"), Sample::Gauge(stats.downstream_cx_active.get()));
        f(&format!("{thread}.downstream_cx_total"), Sample::Counter(stats.downstream_cx_total.get()));
    }
}

/// Counters of a listener's connection manager, with its place in their names.
pub(crate) struct OfManager(pub(crate) std::sync::Arc<ListenerHttpStats>, pub(crate) ArcStr);

impl Scope for OfManager {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        self.0.visit(&mut |name, sample| f(&format!("http.{}.{name}", self.1), sample));
    }
}

impl More for HttpStats {
    /// Of what is not done (HTTP/3), or never happens.
    fn more(&self, f: &mut dyn FnMut(&str, Sample)) {
        for name in ["downstream_cx_http1_soft_drain", "downstream_cx_http3_active"] {
            f(name, Sample::Gauge(0));
        }
        for name in ["downstream_cx_http3_total", "downstream_rq_http3_total", "rq_overload_local_reply"] {
            f(name, Sample::Counter(0));
        }
    }
}
impl More for ListenerStats {}
impl More for TcpStats {
    /// Likewise.
    fn more(&self, f: &mut dyn FnMut(&str, Sample)) {
        for name in ["downstream_cx_drain_close", "downstream_cx_overload_close", "route_delayed_total"] {
            f(name, Sample::Counter(0));
        }
    }
}
impl More for PlainStats {}
impl More for ListenerHttpStats {}

impl More for ClusterStats {
    /// Requests that came from outside are those that did not come from inside.
    fn more(&self, f: &mut dyn FnMut(&str, Sample)) {
        let external = Codes::default();
        let mut inside = std::collections::BTreeMap::new();
        self.internal_rq.each(|code, n| {
            inside.insert(code, n);
        });
        self.upstream_rq.each(|code, n| external.add(code, n.saturating_sub(inside.get(&code).copied().unwrap_or(0))));
        visit_codes("external.upstream_rq", &external, f);
        let mut time = self.upstream_rq_time.read();
        time.subtract(&self.internal_rq_time.read());
        if time.count() > 0 {
            f("external.upstream_rq_time", Sample::Histogram(time));
        }
    }
}

impl ClusterStats {
    /// As [`charge`](Self::charge), without the code of its own.
    pub(crate) fn charge_quietly(&self, status: u16, internal: bool) {
        self.charge(status | QUIET, internal);
    }

    /// As [`charge_quietly`](Self::charge_quietly), of an answer that is followed by a retry.
    pub(crate) fn charge_retry(&self, status: u16, quiet: bool) {
        self.retry_rq.inc(if quiet { status | QUIET } else { status });
    }

    /// An answer that the cluster, or the proxy in its place, gave. `internal`: to a request from inside.
    pub(crate) fn charge(&self, status: u16, internal: bool) {
        self.upstream_rq.inc(status);
        if internal {
            self.internal_rq.inc(status);
        }
    }

    /// How long an answer took.
    pub(crate) fn took(&self, millis: u64, internal: bool) {
        self.upstream_rq_time.record(millis);
        if internal {
            self.internal_rq_time.record(millis);
        }
    }
}

/// Answers of a cluster that count once more by another name (Envoy `CodeStatsImpl::chargeResponseStat`).
#[derive(Debug)]
pub(crate) struct Answers {
    /// What stands in front of their names; ends in a dot.
    prefix: String,
    codes: Codes,
    time: Histogram,
}

impl Answers {
    pub(crate) fn new(prefix: &str) -> Self {
        Self { prefix: format!("{prefix}."), codes: Codes::default(), time: Histogram::default() }
    }

    pub(crate) fn charge(&self, status: u16) {
        self.codes.inc(status);
    }

    pub(crate) fn took(&self, millis: u64) {
        self.time.record(millis);
    }
}

impl Scope for Answers {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        visit_answers(&self.prefix, &self.codes, &self.time, f);
    }
}

/// Codes and times that exist once something was counted.
fn visit_answers(prefix: &str, codes: &Codes, time: &Histogram, f: &mut dyn FnMut(&str, Sample)) {
    visit_codes("upstream_rq", codes, &mut |name, sample| {
        if sample != Sample::Counter(0) {
            f(&format!("{prefix}{name}"), sample);
        }
    });
    let time = time.read();
    if time.count() > 0 {
        f(&format!("{prefix}upstream_rq_time"), Sample::Histogram(time));
    }
}

/// Requests of a virtual cluster, or of a route with a name for statistics.
#[derive(Debug, Default)]
pub(crate) struct RequestStats {
    pub(crate) upstream_rq_retry: Counter,
    pub(crate) upstream_rq_retry_limit_exceeded: Counter,
    pub(crate) upstream_rq_retry_overflow: Counter,
    pub(crate) upstream_rq_retry_success: Counter,
    pub(crate) upstream_rq_timeout: Counter,
    pub(crate) upstream_rq_total: Counter,
    pub(crate) codes: Codes,
    pub(crate) time: Histogram,
}

impl Scope for RequestStats {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        for (name, counter) in [
            ("upstream_rq_retry", &self.upstream_rq_retry),
            ("upstream_rq_retry_limit_exceeded", &self.upstream_rq_retry_limit_exceeded),
            ("upstream_rq_retry_overflow", &self.upstream_rq_retry_overflow),
            ("upstream_rq_retry_success", &self.upstream_rq_retry_success),
            ("upstream_rq_timeout", &self.upstream_rq_timeout),
            ("upstream_rq_total", &self.upstream_rq_total),
        ] {
            f(name, Sample::Counter(counter.get()));
        }
        visit_answers("", &self.codes, &self.time, f);
    }
}
