//! Files that tell of hosts whose health changed: by active checks and by outlier detection, a line of JSON each.

use crate::runtime::Shared;
use mesh_types::ArcStr;
use proxy_core::health_check::{CheckKind, HealthCheckConfig};
use proxy_core::outlier::{Cause, Event};
use proxy_core::{Address, Host};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::time::SystemTime;

/// Why an active check failed (`data.core.v3.HealthCheckFailureType`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    /// The host answered so.
    Active,
    /// It said so in the answer to a request.
    Passive,
    Network,
    Timeout,
}

/// What happened to a host that is checked (`data.core.v3.HealthCheckEvent`).
#[derive(Clone, Copy, Debug)]
pub(crate) enum HealthEvent {
    Added { first: bool },
    Ejected { failure: Failure, status: u16 },
    Failed { failure: Failure, first: bool, status: u16 },
    Degraded,
    NoLongerDegraded,
    Succeeded,
}

/// Makes the files exist.
pub(crate) fn open<'a>(shared: &Shared, paths: impl IntoIterator<Item = &'a ArcStr>) {
    for path in paths {
        if let Err(e) = shared.logs.open(path) {
            tracing::error!(%path, error = %e, "cannot open the event log");
        }
    }
}

/// Events are few, so that each is written at once.
fn write(shared: &Shared, path: &ArcStr, event: &Map<String, Value>) {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    let written = shared.logs.open(path).and_then(|file| (&*file).write_all(&line));
    if let Err(e) = written {
        tracing::debug!(%path, error = %e, "cannot write the event log");
    }
}

/// Tells of a host's health, as Envoy's `HealthCheckEventLoggerImpl`: all fields, in the order of their numbers.
pub(crate) fn health(shared: &Shared, config: &HealthCheckConfig, cluster: &str, host: &Host, event: HealthEvent) {
    if config.event_logs.is_empty() {
        return;
    }
    let kind = match config.kind {
        CheckKind::Http(_) => "HTTP",
        CheckKind::Tcp { .. } => "TCP",
        CheckKind::Grpc { .. } => "GRPC",
    };
    let failure_type = |failure: Failure| match failure {
        Failure::Active => "ACTIVE",
        Failure::Passive => "PASSIVE",
        Failure::Network => "NETWORK",
        Failure::Timeout => "NETWORK_TIMEOUT",
    };
    // By whether the field stands before the time, and after the locality.
    let (place, name, value) = match event {
        HealthEvent::Ejected { failure, status } => {
            (0, "eject_unhealthy_event", json!({"failure_type": failure_type(failure), "http_status_code": status}))
        }
        HealthEvent::Added { first } => (0, "add_healthy_event", json!({"first_check": first})),
        HealthEvent::Failed { failure, first, status } => (
            1,
            "health_check_failure_event",
            json!({"failure_type": failure_type(failure), "first_check": first, "http_status_code": status}),
        ),
        HealthEvent::Degraded => (1, "degraded_healthy_host", json!({})),
        HealthEvent::NoLongerDegraded => (1, "no_longer_degraded_host", json!({})),
        HealthEvent::Succeeded => (2, "successful_health_check_event", json!({})),
    };
    let mut line = Map::new();
    let put = |line: &mut Map<String, Value>, name: &str, value: Value| drop(line.insert(name.to_owned(), value));
    put(&mut line, "health_checker_type", kind.into());
    put(&mut line, "host", address(&host.address));
    put(&mut line, "cluster_name", cluster.into());
    if place == 0 {
        put(&mut line, name, value.clone());
    }
    put(&mut line, "timestamp", now().into());
    if place == 1 {
        put(&mut line, name, value.clone());
    }
    if !host.metadata.is_empty() {
        let fields: Map<String, Value> =
            host.metadata.iter().map(|(name, fields)| (name.to_string(), fields.clone().into())).collect();
        put(&mut line, "metadata", json!({"filter_metadata": fields, "typed_filter_metadata": {}}));
    }
    let locality = &host.locality;
    let locality = json!({"region": &*locality.region, "zone": &*locality.zone, "sub_zone": &*locality.sub_zone});
    put(&mut line, "locality", locality);
    if place == 2 {
        put(&mut line, name, value);
    }
    for path in &config.event_logs {
        write(shared, path, &line);
    }
}

/// Tells of an ejection or a return, if the bootstrap says where (`data.cluster.v3.OutlierDetectionEvent`).
pub(crate) fn outlier(shared: &Shared, cluster: &str, event: &Event, line: Option<proxy_core::outlier::RateLine>) {
    let Some(path) = shared.outlier_log.get() else { return };
    // That a host is degraded is told as if it were ejected.
    let (host, history, kind, cause, enforced) = match event {
        Event::Ejected { host, cause, enforced, history } => {
            (host, history, Some(cause_name(*cause)), Some(*cause), *enforced)
        }
        Event::Degraded { host, history } => (host, history, Some("DEGRADED"), None, true),
        Event::Returned { host, history } => (host, history, None, None, false),
        Event::Overflow { .. } => return,
    };
    let mut out = Map::new();
    let mut put = |name: &str, value: Value| drop(out.insert(name.to_owned(), value));
    put("type", kind.unwrap_or("CONSECUTIVE_5XX").into());
    put("timestamp", now().into());
    if let Some(since) = history.since_last {
        put("secs_since_last_action", since.as_secs().to_string().into());
    }
    put("cluster_name", cluster.into());
    put("upstream_url", host.address.to_string().into());
    put("action", if kind.is_some() { "EJECT" } else { "UNEJECT" }.into());
    put("num_ejections", history.ejections.into());
    put("enforced", enforced.into());
    // Whole percents, as the event's fields.
    let percent = |rate: f64| rate.max(0.0) as u32;
    let own = |local| host.state.outlier.rate(local).map_or(0, percent);
    match cause {
        Some(cause @ (Cause::SuccessRate | Cause::LocalSuccessRate)) => put(
            "eject_success_rate_event",
            json!({
                "host_success_rate": own(cause == Cause::LocalSuccessRate),
                "cluster_average_success_rate": line.map_or(0, |l| percent(l.average)),
                "cluster_success_rate_ejection_threshold": line.map_or(0, |l| percent(l.threshold)),
            }),
        ),
        Some(cause @ (Cause::FailurePercentage | Cause::LocalFailurePercentage)) => {
            let local = cause == Cause::LocalFailurePercentage;
            put("eject_failure_percentage_event", json!({"host_success_rate": own(local)}));
        }
        _ if kind.is_some() => put("eject_consecutive_event", json!({})),
        _ => {}
    }
    write(shared, path, &out);
}

fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Consecutive5xx => "CONSECUTIVE_5XX",
        Cause::ConsecutiveGateway => "CONSECUTIVE_GATEWAY_FAILURE",
        Cause::ConsecutiveLocal => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
        Cause::SuccessRate => "SUCCESS_RATE",
        Cause::LocalSuccessRate => "SUCCESS_RATE_LOCAL_ORIGIN",
        Cause::FailurePercentage => "FAILURE_PERCENTAGE",
        Cause::LocalFailurePercentage => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
    }
}

fn now() -> String {
    crate::admin::timestamp(SystemTime::now())
}

/// `config.core.v3.Address`, with all its fields.
fn address(address: &Address) -> Value {
    match address {
        Address::Ip(socket) => json!({"socket_address": {
            "protocol": "TCP",
            "address": socket.ip().to_string(),
            "port_value": socket.port(),
            "resolver_name": "",
            "ipv4_compat": false,
            "network_namespace_filepath": "",
        }}),
        Address::Pipe(path) => json!({"pipe": {"path": &**path, "mode": 0}}),
        Address::Internal(name) => {
            json!({"envoy_internal_address": {"server_listener_name": &**name, "endpoint_id": ""}})
        }
    }
}
