//! `/clusters` and `/listeners`, and the gauges of clusters.

use super::Admin;
use crate::runtime::{ClusterEntry, ListenerEntry};
use crate::stats::{Entry, Kind, Sample};
use crate::tls::SecretStore;
use proxy_core::balance::{Local, NoZones, SubsetCount, TableSize, no_zones};
use proxy_core::circuit::Resource;
use proxy_core::cluster::{Discovery, TransportSocket};
use proxy_core::endpoints::{Health, HealthFlag, Locality};
use proxy_core::route::Priority;
use proxy_core::{Address, Host};
use regex_automata::meta::Regex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

/// Counters of what the proxy does not do: HTTP/3, early data, queues.
const FEATURELESS: [&str; 8] = [
    "assignment_use_cached",
    "lb_subsets_removed",
    "upstream_cx_http3_total",
    "upstream_cx_preconnect_skipped",
    "upstream_http3_broken",
    "upstream_rq_0rtt",
    "upstream_rq_active_overflow",
    "upstream_rq_rx_reset_no_error",
];

/// The limits of circuit breakers that are shown. They are what they are now: the runtime and the requests under way,
/// of which retries may be a share, move them.
const LIMITS: [(&str, Resource); 4] = [
    ("max_connections", Resource::Connections),
    ("max_pending_requests", Resource::Pending),
    ("max_requests", Resource::Requests),
    ("max_retries", Resource::Retries),
];

/// What a TLS transport counts of its secrets.
pub(super) const SOCKET_FACTORY: [&str; 3] =
    ["downstream_context_secrets_not_ready", "ssl_context_update_by_sds", "upstream_context_secrets_not_ready"];

/// Says when a certificate ends.
pub(super) fn certificate_end(name: &str) -> String {
    format!("ssl.certificate.{name}.expiration_unix_time_seconds")
}

/// Gauges that follow from a cluster's configuration and hosts; also makes an unused cluster's main counters appear.
pub(super) fn cluster_gauges(entry: &ClusterEntry, secrets: &SecretStore, workers: usize, f: &mut dyn FnMut(Entry)) {
    let endpoints = entry.endpoints.load();
    let (mut total, mut healthy, mut degraded, mut ejected, mut excluded) = (0, 0, 0, 0, 0);
    let (mut passing, mut passing_degraded) = (0, 0);
    for host in endpoints.hosts() {
        total += 1;
        healthy += u64::from(host.health() == Health::Healthy);
        degraded += u64::from(host.health() == Health::Degraded);
        ejected += u64::from(host.state.has(HealthFlag::FailedOutlier));
        excluded += u64::from(host.state.is_excluded());
        if host.health_check.address.is_some() {
            passing += u64::from(!host.state.has(HealthFlag::FailedActive));
            passing_degraded += u64::from(host.state.has(HealthFlag::DegradedActive));
        }
    }
    let name = &entry.cluster.stat_name;
    let mut put = |stat: &str, sample: Sample| {
        f(Entry { kind: Kind::Cluster, scope: name.clone(), name: stat.to_owned(), sample });
    };
    if entry.cluster.endpoint_stats {
        for host in endpoints.hosts() {
            let prefix = format!("endpoint.{}", host.address.to_string().replace(':', "_"));
            let stats = &host.state.stats;
            let gauges = [
                ("cx_active", stats.cx_active.load(Relaxed)),
                ("healthy", u64::from(host.health() == Health::Healthy)),
                ("rq_active", host.state.active.load(Relaxed).into()),
                ("rq_pending_active", stats.rq_pending_active.load(Relaxed)),
            ];
            let counters = [
                ("cx_connect_fail", stats.cx_connect_fail.load(Relaxed)),
                ("cx_total", stats.cx_total.load(Relaxed)),
                ("rq_error", stats.rq_error.load(Relaxed)),
                ("rq_success", stats.rq_success.load(Relaxed)),
                ("rq_timeout", stats.rq_timeout.load(Relaxed)),
                ("rq_total", stats.rq_total.load(Relaxed)),
            ];
            gauges.into_iter().for_each(|(name, value)| put(&format!("{prefix}.{name}"), Sample::Gauge(value)));
            counters.into_iter().for_each(|(name, value)| put(&format!("{prefix}.{name}"), Sample::Counter(value)));
        }
    }
    put("membership_total", Sample::Gauge(total));
    put("membership_healthy", Sample::Gauge(healthy));
    put("membership_degraded", Sample::Gauge(degraded));
    put("membership_excluded", Sample::Gauge(excluded));
    if !entry.cluster.health_checks.is_empty() {
        put("health_check.healthy", Sample::Gauge(passing));
        put("health_check.degraded", Sample::Gauge(passing_degraded));
    }
    // Envoy looks at the weights of hosts that come and go, at those of the last priority last.
    let last = endpoints.priorities.last().into_iter().flat_map(|set| &set.localities);
    let weights = last.flat_map(|locality| &locality.hosts).map(|host| u64::from(host.weight));
    let weight = match entry.cluster.discovery {
        Discovery::Static | Discovery::LogicalDns(_) => 0,
        _ if entry.makes_hosts() => 0,
        // Nothing came yet that was taken.
        _ if Arc::ptr_eq(&endpoints, &entry.cluster.endpoints) => 0,
        _ => weights.max().unwrap_or(0).max(1),
    };
    put("max_host_weight", Sample::Gauge(weight));
    for (name, value) in entry.table_size(&endpoints).into_iter().flat_map(TableSize::gauges) {
        put(name, Sample::Gauge(value));
    }
    let sockets = entry.cluster.transport.matches.iter().map(|found| &found.socket);
    if sockets.chain([&entry.cluster.transport.default]).any(|s| matches!(s, TransportSocket::ProxyProtocol { .. })) {
        put("upstream.proxyprotocol.v2_tlvs_exceed_max_length", Sample::Counter(0));
    }
    put("version", Sample::Gauge(0));
    put("warming_state", Sample::Gauge(0));
    put("upstream_queue_overloaded", Sample::Gauge(0));
    let subsets = entry.cluster.subsets.as_ref().map(|config| SubsetCount::of(config, &endpoints)).unwrap_or_default();
    // Envoy's main thread has them, too.
    let made = subsets.subsets * (workers as u64 + 1);
    put("lb_subsets_active", Sample::Gauge(made));
    put("lb_subsets_created", Sample::Counter(made));
    if entry.cluster.subsets.is_some() {
        put("lb_subsets_single_host_per_subset_duplicate", Sample::Gauge(subsets.duplicates));
    }
    put("membership_change", Sample::Counter(entry.membership_changes.load(Relaxed)));
    put("update_no_rebuild", Sample::Counter(entry.unchanged.load(Relaxed)));
    for name in FEATURELESS {
        put(name, Sample::Counter(0));
    }
    let matches = entry.cluster.transport.matches.iter().map(|found| &*found.name).chain(["default"]);
    for name in matches {
        let chosen = |host: &&Arc<Host>| entry.cluster.transport(host).1.map_or("default", |name| &**name) == name;
        let count = match entry.makes_hosts() {
            // Without metadata none of them fits anything but what fits all.
            true if name == "default" => entry.hosts_made.load(Relaxed),
            true => 0,
            false => endpoints.hosts().filter(chosen).count() as u64,
        };
        put(&format!("{name}.total_match_count"), Sample::Counter(count));
    }
    if entry.cluster.transport.tls_contexts().next().is_some() {
        crate::stats::ssl_zero(&mut |stat, sample| put(stat, sample));
        for what in SOCKET_FACTORY {
            put(&format!("client_ssl_socket_factory.{what}"), Sample::Counter(0));
        }
    }
    // The contexts of one cluster share their names.
    let expirations = entry.cluster.transport.tls_contexts().flat_map(|tls| secrets.expirations(&tls.common));
    for (certificate, at) in expirations.collect::<BTreeMap<_, _>>() {
        put(&certificate_end(&certificate), Sample::Gauge(at));
    }
    for (priority, label) in [(Priority::Default, "default"), (Priority::High, "high")] {
        entry.breakers.get(priority).gauges(|what, value| {
            put(&format!("circuit_breakers.{label}.{what}"), Sample::Gauge(value));
        });
    }
    if entry.cluster.outlier.is_some() {
        put("outlier_detection.ejections_active", Sample::Gauge(ejected));
    }
    // A cluster that no worker has used yet has all its counters, at zero.
    crate::stats::each_zero(&mut |stat, sample| put(stat, sample));
}

/// What each thread of Envoy finds out about zones whenever the hosts of a cluster, or those of our own kind, are others
/// (`ZoneAwareLoadBalancerBase::regenerateLocalityRoutingStructures`). Choices are counted where they are made.
pub(super) fn zones(
    entry: &ClusterEntry,
    local: &ClusterEntry,
    place: &Locality,
    workers: usize,
    f: &mut dyn FnMut(Entry),
) {
    let config = &entry.cluster;
    if config.lb.is_hashing() || entry.makes_hosts() {
        return;
    }
    let threads = workers as u64 + 1;
    // Clusters are made in the order of their names: those behind the local one know its first hosts from the start.
    let before = u64::from(config.name < local.cluster.name);
    let of_local = (local.membership_changes.load(Relaxed) + before).saturating_sub(1);
    let changes = entry.membership_changes.load(Relaxed) + of_local;
    let known = Local { endpoints: local.endpoints.load_full(), place: place.clone() };
    let found = no_zones(config, &entry.endpoints.load(), &known);
    // Where our own zone is all that counts, those of our own kind are missed before they come.
    let missed = u64::from(config.zones.force_direct) * before + u64::from(found == Some(NoZones::LocalNotOk));
    let mut put = |name: &str, value: u64| {
        let sample = Sample::Counter(value * threads);
        f(Entry { kind: Kind::Cluster, scope: config.stat_name.clone(), name: name.to_owned(), sample });
    };
    put("lb_recalculate_zone_structures", changes);
    put("lb_local_cluster_not_ok", missed);
    put("lb_zone_cluster_too_small", u64::from(found == Some(NoZones::Small)));
}

/// A percentage with as many digits as Envoy prints.
fn six_digits(percent: f64) -> String {
    let whole = if percent.abs() >= 100.0 {
        3
    } else if percent.abs() >= 10.0 {
        2
    } else {
        1
    };
    let text = format!("{percent:.*}", 6 - whole);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Admin {
    /// `wanted`: only clusters whose names match.
    pub(super) fn clusters_text(&self, wanted: Option<&Regex>) -> String {
        let clusters = self.shared.clusters.load();
        let mut names: Vec<_> = clusters.keys().filter(|n| wanted.is_none_or(|w| w.is_match(n.as_bytes()))).collect();
        names.sort();
        let mut out = String::new();
        for name in names {
            let entry = &clusters[name];
            let c = &entry.cluster;
            let _ = writeln!(out, "{name}::observability_name::{}", c.stat_name);
            if let Some(detector) = &entry.outlier {
                let rates = detector.lock().unwrap_or_else(PoisonError::into_inner).rates();
                for (prefix, line) in ["", "local_origin_"].into_iter().zip(rates) {
                    let (average, threshold) = line.map_or((-1.0, -1.0), |line| (line.average, line.threshold));
                    let _ = writeln!(out, "{name}::outlier::{prefix}success_rate_average::{}", six_digits(average));
                    let threshold = six_digits(threshold);
                    let _ = writeln!(out, "{name}::outlier::{prefix}success_rate_ejection_threshold::{threshold}");
                }
            }
            for (priority, label) in [(Priority::Default, "default"), (Priority::High, "high")] {
                let breaker = entry.breakers.get(priority);
                for (limit, resource) in LIMITS {
                    let _ = writeln!(out, "{name}::{label}_priority::{limit}::{}", breaker.limit(resource));
                }
            }
            let _ = writeln!(out, "{name}::added_via_api::{}", entry.dynamic);
            if let Discovery::Eds { service_name: service, is_named: true, .. } = &entry.cluster.discovery {
                let _ = writeln!(out, "{name}::eds_service_name::{service}");
            }
            for host in entry.endpoints.load().hosts() {
                let prefix = format!("{name}::{}", host.address);
                let stats = &host.state.stats;
                for (stat, value) in [
                    ("cx_active", stats.cx_active.load(Relaxed)),
                    ("cx_connect_fail", stats.cx_connect_fail.load(Relaxed)),
                    ("cx_total", stats.cx_total.load(Relaxed)),
                    ("rq_active", u64::from(host.state.active.load(Relaxed))),
                    ("rq_error", stats.rq_error.load(Relaxed)),
                    ("rq_pending_active", stats.rq_pending_active.load(Relaxed)),
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
                let _ = writeln!(out, "{prefix}::canary::{}", host.is_canary());
                let _ = writeln!(out, "{prefix}::priority::{}", host.priority);
                let rate = |local| host.state.outlier.rate(local).unwrap_or(-1.0);
                let _ = writeln!(out, "{prefix}::success_rate::{}", six_digits(rate(false)));
                let _ = writeln!(out, "{prefix}::local_origin_success_rate::{}", six_digits(rate(true)));
            }
        }
        out
    }

    pub(super) fn clusters_json(&self, wanted: Option<&Regex>) -> Value {
        let clusters = self.shared.clusters.load();
        let mut names: Vec<_> = clusters.keys().filter(|n| wanted.is_none_or(|w| w.is_match(n.as_bytes()))).collect();
        names.sort();
        let statuses: Vec<Value> = names
            .iter()
            .map(|name| {
                let entry = &clusters[*name];
                let hosts: Vec<Value> = entry.endpoints.load().hosts().map(|h| host_json(h)).collect();
                let breakers: Vec<Value> = [(Priority::Default, None), (Priority::High, Some("HIGH"))]
                    .iter()
                    .map(|(priority, label)| {
                        let breaker = entry.breakers.get(*priority);
                        let limits = LIMITS.map(|(name, resource)| (name.to_owned(), json!(breaker.limit(resource))));
                        let mut threshold = Value::from_iter(limits);
                        if let Some(label) = label {
                            threshold["priority"] = json!(label);
                        }
                        threshold
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
                if let Discovery::Eds { service_name, is_named: true, .. } = &entry.cluster.discovery {
                    status["eds_service_name"] = json!(&**service_name);
                }
                if !hosts.is_empty() {
                    status["host_statuses"] = json!(hosts);
                }
                status
            })
            .collect();
        match statuses.is_empty() {
            true => json!({}),
            false => json!({ "cluster_statuses": statuses }),
        }
    }

    pub(super) fn listeners_text(&self) -> String {
        let mut out = String::new();
        for entry in self.listeners_in_order() {
            for address in entry.addresses() {
                let _ = writeln!(out, "{}::{address}", entry.listener.name);
            }
        }
        out
    }

    pub(super) fn listeners_json(&self) -> Value {
        let statuses: Vec<Value> = self
            .listeners_in_order()
            .iter()
            .map(|entry| {
                let mut addresses: Vec<Value> = entry.addresses().iter().map(address_json).collect();
                let additional = addresses.split_off(1);
                let mut status = json!({"name": &*entry.listener.name, "local_address": addresses[0]});
                if !additional.is_empty() {
                    status["additional_local_addresses"] = json!(additional);
                }
                status
            })
            .collect();
        json!({ "listener_statuses": statuses })
    }
}

impl Admin {
    /// As they came.
    pub(super) fn listeners_in_order(&self) -> Vec<Arc<ListenerEntry>> {
        let mut all: Vec<_> = self.shared.listeners.load().by_name.values().cloned().collect();
        all.sort_by(|a, b| (a.updated, &a.listener.name).cmp(&(b.updated, &b.listener.name)));
        all
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
    let eds = [
        (HealthFlag::EdsUnhealthy, "UNHEALTHY"),
        (HealthFlag::EdsDraining, "DRAINING"),
        (HealthFlag::EdsDegraded, "DEGRADED"),
    ];
    let eds = eds.into_iter().find(|(flag, _)| host.state.has(*flag)).map_or("HEALTHY", |(_, name)| name);
    let mut health = json!({"eds_health_status": eds});
    for (flag, name) in [
        (HealthFlag::FailedActive, "failed_active_health_check"),
        (HealthFlag::FailedOutlier, "failed_outlier_check"),
        (HealthFlag::DegradedActive, "failed_active_degraded_check"),
        (HealthFlag::PendingRemoval, "pending_dynamic_removal"),
        (HealthFlag::PendingActive, "pending_active_hc"),
        (HealthFlag::Excluded, "excluded_via_immediate_hc_fail"),
        (HealthFlag::ActiveTimeout, "active_hc_timeout"),
        (HealthFlag::DegradedOutlier, "failed_degraded_outlier_detection"),
    ] {
        if host.state.has(flag) {
            health[name] = json!(true);
        }
    }
    let place = &host.locality;
    let parts = [("region", &place.region), ("zone", &place.zone), ("sub_zone", &place.sub_zone)];
    let parts = parts.into_iter().filter(|(_, part)| !part.is_empty());
    let locality: serde_json::Map<_, _> = parts.map(|(name, part)| (name.to_owned(), json!(&**part))).collect();
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
            gauge("rq_pending_active", stats.rq_pending_active.load(Relaxed)),
        ],
        "health_status": health,
        "weight": host.weight,
        "locality": locality,
    });
    for (name, local) in [("success_rate", false), ("local_origin_success_rate", true)] {
        if let Some(rate) = host.state.outlier.rate(local) {
            status[name] = json!({"value": rate});
        }
    }
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
