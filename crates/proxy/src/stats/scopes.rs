//! The counters Envoy has per cluster, connection manager, listener and TCP proxy. Names are Envoy's
//! (docs: configuration/upstream/cluster_manager/cluster_stats and its siblings).

use super::registry::{Sample, Scope};
use super::{Codes, Counter, Gauge, Histogram};

macro_rules! scope {
    ($(#[$doc:meta])* $name:ident { counters { $($c:ident),* $(,)? } gauges { $($g:ident),* $(,)? } histograms { $($h:ident),* $(,)? } codes { $($code:ident = $prefix:literal),* $(,)? } }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name {
            $(pub(crate) $c: Counter,)*
            $(pub(crate) $g: Gauge,)*
            $(pub(crate) $h: Histogram,)*
            $(pub(crate) $code: Codes,)*
            /// Rarely used counters by dotted name.
            pub(crate) other: Named,
        }

        impl Scope for $name {
            fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
                $(f(&dotted(stringify!($c)), Sample::Counter(self.$c.get()));)*
                $(f(&dotted(stringify!($g)), Sample::Gauge(self.$g.get()));)*
                $({
                    let sample = self.$h.read();
                    if sample.count() > 0 { f(&dotted(stringify!($h)), Sample::Histogram(sample)); }
                })*
                $(visit_codes($prefix, &self.$code, f);)*
                self.other.visit(f);
            }
        }
    };
}

/// Envoy's name of a field: `ssl_handshake` is `ssl.handshake`.
fn dotted(field: &'static str) -> std::borrow::Cow<'static, str> {
    match field.strip_prefix("ssl_") {
        Some(rest) => format!("ssl.{rest}").into(),
        None => field.into(),
    }
}

/// `PREFIX_503` and `PREFIX_5xx` from one table.
fn visit_codes(prefix: &str, codes: &Codes, f: &mut dyn FnMut(&str, Sample)) {
    let mut classes = [0u64; 6];
    codes.each(|code, n| {
        classes[usize::from(code / 100).min(5)] += n;
        if prefix != "downstream_rq" {
            f(&format!("{prefix}_{code}"), Sample::Counter(n));
        }
    });
    for (class, n) in classes.iter().enumerate().skip(1) {
        // Envoy creates a cluster's classes when first counted, a connection manager's at once.
        if *n > 0 || prefix == "downstream_rq" {
            f(&format!("{prefix}_{class}xx"), Sample::Counter(*n));
        }
    }
    if classes.iter().sum::<u64>() > 0 || prefix == "downstream_rq" {
        f(&format!("{prefix}_completed"), Sample::Counter(classes.iter().sum()));
    }
}

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

    /// Moves a gauge up or down.
    pub(crate) fn shift(&self, name: &str, up: bool) {
        let mut map = self.gauges.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let n = map.entry(name.to_owned()).or_default();
        *n = if up { n.wrapping_add(1) } else { n.wrapping_sub(1) };
    }

    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
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
            assignment_stale, assignment_timeout_received, bind_errors, lb_healthy_panic, lb_recalculate_zone_structures,
            max_host_weight, membership_change, original_dst_host_invalid, retry_or_shadow_abandoned, update_attempt, update_empty,
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
            upstream_cx_active, upstream_cx_rx_bytes_buffered, upstream_cx_tx_bytes_buffered, upstream_rq_active,
            upstream_rq_pending_active
        }
        histograms { upstream_rq_time, upstream_cx_connect_ms, upstream_cx_length_ms }
        codes { upstream_rq = "upstream_rq" }
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
        histograms { downstream_cx_length_ms }
        codes {}
    }
}

scope! {
    /// Per TCP proxy.
    TcpStats {
        counters {
            downstream_cx_no_route, downstream_cx_rx_bytes_total, downstream_cx_total, downstream_cx_tx_bytes_total,
            downstream_flow_control_paused_reading_total, downstream_flow_control_resumed_reading_total, idle_timeout,
            max_downstream_connection_duration, upstream_flush_total
        }
        gauges { downstream_cx_rx_bytes_buffered, downstream_cx_tx_bytes_buffered, upstream_flush_active }
        histograms {}
        codes {}
    }
}

scope! {
    /// Counters whose whole name comes from configuration.
    PlainStats { counters {} gauges {} histograms {} codes {} }
}
