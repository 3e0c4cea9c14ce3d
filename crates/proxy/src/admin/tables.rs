//! `/clusters` and `/listeners`, and the gauges of clusters.

use super::Admin;
use crate::runtime::ClusterEntry;
use crate::stats::{Entry, Kind, Sample};
use proxy_core::endpoints::{Health, HealthFlag};
use proxy_core::{Address, Host};
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;

/// Gauges that follow from a cluster's configuration and hosts; also makes an unused cluster's main counters appear.
pub(super) fn cluster_gauges(entry: &ClusterEntry, f: &mut dyn FnMut(Entry)) {
    let endpoints = entry.endpoints.load();
    let (mut total, mut healthy, mut degraded, mut ejected) = (0, 0, 0, 0);
    for host in endpoints.hosts() {
        total += 1;
        healthy += u64::from(host.health() == Health::Healthy);
        degraded += u64::from(host.health() == Health::Degraded);
        ejected += u64::from(host.state.has(HealthFlag::FailedOutlier));
    }
    let name = &entry.cluster.stat_name;
    let mut put = |stat: &str, sample: Sample| {
        f(Entry { kind: Kind::Cluster, scope: name.clone(), name: stat.to_owned(), sample });
    };
    put("membership_total", Sample::Gauge(total));
    put("membership_healthy", Sample::Gauge(healthy));
    put("membership_degraded", Sample::Gauge(degraded));
    put("membership_excluded", Sample::Gauge(0));
    put("lb_healthy_panic", Sample::Counter(0));
    put("version", Sample::Gauge(0));
    for (priority, label) in [(0, "default"), (1, "high")] {
        for what in ["cx_open", "cx_pool_open", "rq_open", "rq_pending_open", "rq_retry_open"] {
            let _ = priority;
            put(&format!("circuit_breakers.{label}.{what}"), Sample::Gauge(0));
        }
    }
    if entry.cluster.outlier.is_some() {
        put("outlier_detection.ejections_active", Sample::Gauge(ejected));
    }
    // A cluster that no worker has used yet has all its counters, at zero.
    crate::stats::each_zero(&mut |stat, sample| put(stat, sample));
}

impl Admin {
    pub(super) fn clusters_text(&self) -> String {
        let clusters = self.shared.clusters.load();
        let mut names: Vec<_> = clusters.keys().collect();
        names.sort();
        let mut out = String::new();
        for name in names {
            let entry = &clusters[name];
            let c = &entry.cluster;
            let _ = writeln!(out, "{name}::observability_name::{}", c.stat_name);
            for (priority, label) in [(0, "default"), (1, "high")] {
                let limits = &c.breakers[priority];
                let _ = writeln!(out, "{name}::{label}_priority::max_connections::{}", limits.connections);
                let _ = writeln!(out, "{name}::{label}_priority::max_pending_requests::{}", limits.pending);
                let _ = writeln!(out, "{name}::{label}_priority::max_requests::{}", limits.requests);
                let _ = writeln!(out, "{name}::{label}_priority::max_retries::{}", limits.retries);
            }
            let _ = writeln!(out, "{name}::added_via_api::{}", entry.dynamic);
            for host in entry.endpoints.load().hosts() {
                let prefix = format!("{name}::{}", host.address);
                let stats = &host.state.stats;
                for (stat, value) in [
                    ("cx_active", stats.cx_active.load(Relaxed)),
                    ("cx_connect_fail", stats.cx_connect_fail.load(Relaxed)),
                    ("cx_total", stats.cx_total.load(Relaxed)),
                    ("rq_active", u64::from(host.state.active.load(Relaxed))),
                    ("rq_error", stats.rq_error.load(Relaxed)),
                    ("rq_success", stats.rq_success.load(Relaxed)),
                    ("rq_timeout", stats.rq_timeout.load(Relaxed)),
                    ("rq_total", stats.rq_total.load(Relaxed)),
                ] {
                    let _ = writeln!(out, "{prefix}::{stat}::{value}");
                }
                let _ = writeln!(out, "{prefix}::hostname::{}", host.hostname);
                let _ = writeln!(out, "{prefix}::health_flags::{}", host.state.describe());
                let _ = writeln!(out, "{prefix}::weight::{}", host.weight);
                let _ = writeln!(out, "{prefix}::region::{}", host.locality.region);
                let _ = writeln!(out, "{prefix}::zone::{}", host.locality.zone);
                let _ = writeln!(out, "{prefix}::sub_zone::{}", host.locality.sub_zone);
                let _ = writeln!(out, "{prefix}::canary::false");
                let _ = writeln!(out, "{prefix}::priority::{}", host.priority);
                let _ = writeln!(out, "{prefix}::success_rate::-1");
                let _ = writeln!(out, "{prefix}::local_origin_success_rate::-1");
            }
        }
        out
    }

    pub(super) fn clusters_json(&self) -> Value {
        let clusters = self.shared.clusters.load();
        let mut names: Vec<_> = clusters.keys().collect();
        names.sort();
        let statuses: Vec<Value> = names
            .iter()
            .map(|name| {
                let entry = &clusters[*name];
                let hosts: Vec<Value> = entry.endpoints.load().hosts().map(|h| host_json(h)).collect();
                let breakers: Vec<Value> = [(0, "DEFAULT"), (1, "HIGH")]
                    .iter()
                    .map(|(i, label)| {
                        let limits = &entry.cluster.breakers[*i];
                        json!({"priority": label, "max_connections": limits.connections,
                               "max_pending_requests": limits.pending, "max_requests": limits.requests,
                               "max_retries": limits.retries})
                    })
                    .collect();
                let mut status = json!({
                    "name": &***name,
                    "observability_name": &*entry.cluster.stat_name,
                    "circuit_breakers": {"thresholds": breakers},
                });
                if entry.dynamic {
                    status["added_via_api"] = json!(true);
                }
                if let Some(eds) = entry.cluster.eds_name() {
                    status["eds_service_name"] = json!(&**eds);
                }
                if !hosts.is_empty() {
                    status["host_statuses"] = json!(hosts);
                }
                status
            })
            .collect();
        json!({ "cluster_statuses": statuses })
    }

    pub(super) fn listeners_text(&self) -> String {
        let listeners = self.shared.listeners.load();
        let mut names: Vec<_> = listeners.by_name.keys().collect();
        names.sort();
        let mut out = String::new();
        for name in names {
            let _ = writeln!(out, "{name}::{}", listeners.by_name[name].listener.address);
        }
        out
    }

    pub(super) fn listeners_json(&self) -> Value {
        let listeners = self.shared.listeners.load();
        let mut names: Vec<_> = listeners.by_name.keys().collect();
        names.sort();
        let statuses: Vec<Value> = names
            .iter()
            .map(|name| {
                let listener = &listeners.by_name[*name].listener;
                let mut status = json!({"name": &***name, "local_address": address_json(&listener.address)});
                if !listener.additional_addresses.is_empty() {
                    let all: Vec<_> = listener.additional_addresses.iter().map(address_json).collect();
                    status["additional_local_addresses"] = json!(all);
                }
                status
            })
            .collect();
        json!({ "listener_statuses": statuses })
    }
}

fn host_json(host: &Host) -> Value {
    let stats = &host.state.stats;
    let counter = |name: &str, value: u64| {
        if value == 0 { json!({"name": name}) } else { json!({"name": name, "value": value.to_string()}) }
    };
    let gauge = |name: &str, value: u64| {
        let mut entry = counter(name, value);
        entry["type"] = json!("GAUGE");
        entry
    };
    let mut health =
        json!({"eds_health_status": if !host.state.has(HealthFlag::EdsUnhealthy) { "HEALTHY" } else { "UNHEALTHY" }});
    if host.state.has(HealthFlag::FailedOutlier) {
        health["failed_outlier_check"] = json!(true);
    }
    let mut status = json!({
        "address": address_json(&host.address),
        "stats": [
            counter("cx_connect_fail", stats.cx_connect_fail.load(Relaxed)),
            counter("cx_total", stats.cx_total.load(Relaxed)),
            counter("rq_error", stats.rq_error.load(Relaxed)),
            counter("rq_success", stats.rq_success.load(Relaxed)),
            counter("rq_timeout", stats.rq_timeout.load(Relaxed)),
            counter("rq_total", stats.rq_total.load(Relaxed)),
            gauge("cx_active", stats.cx_active.load(Relaxed)),
            gauge("rq_active", u64::from(host.state.active.load(Relaxed))),
        ],
        "health_status": health,
        "weight": host.weight,
        "locality": {"region": &*host.locality.region, "zone": &*host.locality.zone, "sub_zone": &*host.locality.sub_zone},
    });
    if !host.hostname.is_empty() {
        status["hostname"] = json!(&*host.hostname);
    }
    if host.priority > 0 {
        status["priority"] = json!(host.priority);
    }
    status
}

/// `core.v3.Address` as JSON.
pub(super) fn address_json(address: &Address) -> Value {
    match address {
        Address::Ip(socket) => {
            json!({"socket_address": {"address": socket.ip().to_string(), "port_value": socket.port()}})
        }
        Address::Pipe(path) => json!({"pipe": {"path": &**path}}),
        Address::Internal(name) => json!({"envoy_internal_address": {"server_listener_name": &**name}}),
    }
}
