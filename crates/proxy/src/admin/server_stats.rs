//! `server.*`, `cluster_manager.*`, `listener_manager.*`, and what listeners and clusters have before they are used:
//! computed when somebody reads.

use super::tables;
use crate::control::Control;
use crate::hcm;
use crate::runtime::{ListenerEntry, Shared};
use crate::stats::{
    Computed, Entry, HistogramSample, HttpStats, Kind, ListenerHttpStats, ListenerStats, Named, OWN_REQUESTS,
    OWN_REQUESTS_ELSE, RequestStats, Sample, Scope, TcpStats, ssl_zero,
};
use mesh_types::ArcStr;
use proxy_core::filters::PerFilter;
use proxy_core::hcm::Routes;
use proxy_core::listener::Terminal;
use proxy_core::route::RouteTable;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The admin port's counters: it has no router.
pub(super) struct WithoutRouter(pub(super) Arc<HttpStats>);

impl Scope for WithoutRouter {
    fn visit(&self, f: &mut dyn FnMut(&str, Sample)) {
        let of_router = |name: &str| {
            name.starts_with("rq_")
                || name.starts_with("tracing.")
                || name.starts_with("no_")
                || name.starts_with("passthrough_")
        };
        self.0.visit(&mut |name, sample| {
            if !of_router(name) {
                f(name, sample);
            }
        });
    }
}

/// Counters of what the server does not do or never meets: hot restart, watchdogs, runtime from disk.
const FEATURELESS: [&str; 22] = [
    "cluster_manager.cluster_updated_via_merge",
    "cluster_manager.update_merge_cancelled",
    "cluster_manager.update_out_of_merge_window",
    "filesystem.flushed_by_timer",
    "filesystem.reopen_failed",
    "filesystem.write_failed",
    "main_thread.watchdog_mega_miss",
    "main_thread.watchdog_miss",
    "runtime.deprecated_feature_use",
    "runtime.load_error",
    "runtime.override_dir_exists",
    "server.debug_assertion_failures",
    "server.dropped_stat_flushes",
    "server.dynamic_unknown_fields",
    "server.envoy_bug_failures",
    "server.envoy_notifications",
    "server.main_thread.watchdog_mega_miss",
    "server.main_thread.watchdog_miss",
    "server.static_unknown_fields",
    "server.wip_protos",
    "workers.watchdog_mega_miss",
    "workers.watchdog_miss",
];

/// Likewise gauges.
const FEATURELESS_GAUGES: [&str; 6] = [
    "listener_manager.workers_pinned",
    "runtime.deprecated_feature_seen_since_process_start",
    "server.compilation_settings.fips_mode",
    "server.hot_restart_epoch",
    "server.parent_connections",
    "server.seconds_until_first_ocsp_response_expiring",
];

/// Makes them all known to the registry.
pub(super) fn register(shared: &Arc<Shared>, control: &Weak<Mutex<Control>>) {
    let weak = Arc::downgrade(shared);
    let subscribed = control.clone();
    shared.registry.add_source(Box::new(move |f| {
        if let Some(control) = subscribed.upgrade() {
            control.lock().unwrap_or_else(PoisonError::into_inner).subscription_stats(f);
        }
    }));
    let control = control.clone();
    let plain = Computed(move |f: &mut dyn FnMut(&str, Sample)| {
        if let Some(shared) = weak.upgrade() {
            of_server(&shared, &control, f);
        }
    });
    shared.registry.add(Kind::Plain, "".into(), Arc::new(plain));
    let weak = Arc::downgrade(shared);
    shared.registry.add_source(Box::new(move |f| {
        let Some(shared) = weak.upgrade() else { return };
        let (clusters, local) = (shared.clusters.load(), shared.local_cluster.get());
        for entry in clusters.values() {
            tables::cluster_gauges(entry, &shared.secrets, shared.concurrency, f);
            if let Some((name, place)) = local
                && let Some(local) = clusters.get(name).filter(|_| *name != entry.cluster.name)
            {
                tables::zones(entry, local, place, shared.concurrency, f);
            }
        }
        for entry in shared.listeners.load().by_name.values() {
            of_listener(entry, &shared, f);
        }
        for (_, slot) in shared.routes.all() {
            let Some(table) = slot.table.load_full() else { continue };
            of_routes(&table, &mut |kind, scope, name, sample| {
                f(Entry { kind, scope: scope.clone(), name: name.to_owned(), sample });
            });
        }
    }));
}

/// What virtual clusters, routes and their local rate limits count, at zero.
fn of_routes(table: &RouteTable, put: &mut dyn FnMut(Kind, &ArcStr, &str, Sample)) {
    for name in table.stat_names() {
        RequestStats::default().visit(&mut |stat, sample| put(Kind::VirtualHost, name, stat, sample));
    }
    for settings in table.filter_settings() {
        if let PerFilter::LocalRateLimit(limit) = settings {
            let none: ArcStr = "".into();
            hcm::limit_counters(limit).for_each(|name| put(Kind::Plain, &none, &name, Sample::Counter(0)));
        }
    }
}

/// What a listener and its chains count, at zero.
fn of_listener(entry: &ListenerEntry, shared: &Shared, f: &mut dyn FnMut(Entry)) {
    let listener = &entry.listener;
    let mut put = |kind: Kind, scope: &ArcStr, name: &str, sample: Sample| {
        f(Entry { kind, scope: scope.clone(), name: name.to_owned(), sample });
    };
    let address = &listener.stat_prefix;
    let mut own = |name: &str, sample: Sample| put(Kind::Listener, address, name, sample);
    ListenerStats::default().visit(&mut own);
    own("extension_config_missing", Sample::Counter(0));
    own("network_extension_config_missing", Sample::Counter(0));
    for worker in 0..shared.concurrency {
        own(&format!("worker_{worker}.downstream_cx_active"), Sample::Gauge(0));
        own(&format!("worker_{worker}.downstream_cx_total"), Sample::Counter(0));
    }
    if listener.all_chains().any(|chain| chain.tls.is_some()) {
        ssl_zero(&mut own);
        for what in tables::SOCKET_FACTORY {
            own(&format!("server_ssl_socket_factory.{what}"), Sample::Counter(0));
        }
    }
    let contexts = listener.all_chains().filter_map(|chain| chain.tls.as_ref());
    let expirations = contexts.flat_map(|tls| shared.secrets.expirations(&tls.common));
    // The contexts of one listener share their names.
    for (certificate, at) in expirations.collect::<BTreeMap<_, _>>() {
        own(&tables::certificate_end(&certificate), Sample::Gauge(at));
    }
    for chain in listener.all_chains() {
        match &chain.terminal {
            Terminal::Http(http) => {
                if let Routes::Inline(table) = &http.routes {
                    of_routes(table, &mut put);
                }
                let (own, others) = (HttpStats::default(), Named::default());
                hcm::touch_counters(http, &own, &others);
                own.visit(&mut |name, sample| put(Kind::Http, &http.stat_prefix, name, sample));
                others.visit(&mut |name, sample| put(Kind::Plain, &"".into(), name, sample));
                ListenerHttpStats::default().visit(&mut |name, sample| {
                    put(Kind::Listener, address, &format!("http.{}.{name}", http.stat_prefix), sample);
                });
            }
            Terminal::TcpProxy(proxy) => {
                TcpStats::default().visit(&mut |name, sample| put(Kind::Tcp, &proxy.stat_prefix, name, sample));
                if proxy.tunneling.is_some() {
                    for what in OWN_REQUESTS_ELSE.iter().chain(&["rq_total"]) {
                        let name = format!("tcpproxy_tunneling.{what}");
                        put(Kind::Tcp, &proxy.stat_prefix, &name, Sample::Counter(0));
                    }
                }
            }
            Terminal::DirectResponse(_) | Terminal::Echo | Terminal::Close => {}
        }
    }
    let mut plain = |name: &str| put(Kind::Plain, &"".into(), name, Sample::Counter(0));
    let inspect = &listener.inspect;
    if inspect.has_tls() {
        crate::inspect::TLS_COUNTERS.iter().for_each(|name| plain(name));
    }
    if let Some(config) = &inspect.proxy_protocol {
        crate::proxy_protocol::counters(config).for_each(|name| plain(&name));
    }
    if inspect.has_http() {
        crate::inspect::HTTP_COUNTERS.iter().for_each(|name| plain(name));
    }
}

fn of_server(shared: &Shared, control: &Weak<Mutex<Control>>, f: &mut dyn FnMut(&str, Sample)) {
    let failed = shared.health_failed.load(Ordering::Relaxed);
    let (ready, waits) = control.upgrade().map_or((false, false), |control| {
        let control = control.lock().unwrap_or_else(PoisonError::into_inner);
        (control.ready().is_ok(), control.waits_for_clusters())
    });
    let state = match (failed, ready, waits) {
        (true, ..) => 1,
        (false, true, _) => 0,
        (false, false, true) => 2,
        (false, false, false) => 3,
    };
    let clusters = shared.clusters.load();
    f("server.live", Sample::Gauge(u64::from(!failed && ready)));
    f("server.state", Sample::Gauge(state));
    f("server.uptime", Sample::Gauge(shared.started.elapsed().as_secs()));
    f("server.concurrency", Sample::Gauge(shared.concurrency as u64));
    f("server.version", Sample::Gauge(version()));
    f("server.total_connections", Sample::Gauge(0));
    f("server.stats_recent_lookups", Sample::Gauge(0));
    f("cluster_manager.active_clusters", Sample::Gauge(clusters.len() as u64));
    f("listener_manager.total_listeners_active", Sample::Gauge(shared.listeners.load().by_name.len() as u64));
    f("listener_manager.workers_started", Sample::Gauge(1));
    for name in FEATURELESS {
        f(name, Sample::Counter(0));
    }
    f(OWN_REQUESTS, Sample::Counter(0));
    for name in OWN_REQUESTS_ELSE {
        f(&format!("http.async-client.{name}"), Sample::Counter(0));
    }
    for name in FEATURELESS_GAUGES {
        f(name, Sample::Gauge(0));
    }
    for worker in 0..shared.concurrency {
        for what in ["watchdog_mega_miss", "watchdog_miss"] {
            f(&format!("server.worker_{worker}.{what}"), Sample::Counter(0));
        }
        let inflated = Sample::Gauge(clusters.len() as u64);
        f(&format!("thread_local_cluster_manager.worker_{worker}.clusters_inflated"), inflated);
    }
    f("thread_local_cluster_manager.main_thread.clusters_inflated", Sample::Gauge(clusters.len() as u64));
    let memory = super::memory();
    let bytes = |of: &str| memory[of].as_str().and_then(|n| n.parse().ok()).unwrap_or(0);
    f("server.memory_allocated", Sample::Gauge(bytes("allocated")));
    f("server.memory_heap_size", Sample::Gauge(bytes("heap_size")));
    f("server.memory_physical_size", Sample::Gauge(bytes("total_physical_bytes")));
    f("server.days_until_first_cert_expiring", Sample::Gauge(super::dump::days_until_first_expires(shared)));
    for name in [
        "filesystem.write_buffered",
        "filesystem.write_completed",
        "envoy.overload_actions.reset_high_memory_stream.count",
    ] {
        f(name, Sample::Counter(0));
    }
    f("filesystem.write_total_buffered", Sample::Gauge(0));
    f("overload.refresh_interval_delay", Sample::Histogram(HistogramSample::default()));
    let Some(control) = control.upgrade() else { return };
    let control = control.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = control.runtime().counts();
    f("runtime.load_success", Sample::Counter(runtime.loads));
    // There is nothing of it on disk.
    f("runtime.override_dir_not_exists", Sample::Counter(runtime.loads));
    f("runtime.num_keys", Sample::Gauge(runtime.keys));
    f("runtime.num_layers", Sample::Gauge(runtime.layers));
    f("runtime.admin_overrides_active", Sample::Gauge(runtime.overridden.into()));
    f("cluster_manager.warming_clusters", Sample::Gauge(control.warming_clusters().count() as u64));
    f("listener_manager.total_listeners_warming", Sample::Gauge(control.warming_listeners().count() as u64));
    let (listeners, chains) = control.leaving_counts();
    f("listener_manager.total_listeners_draining", Sample::Gauge(listeners));
    f("listener_manager.total_filter_chains_draining", Sample::Gauge(chains));
    for (name, count) in control.changes() {
        f(name, Sample::Counter(count));
    }
}

/// Envoy's `server.version` is the start of its commit as a number; ours is the version's parts.
fn version() -> u64 {
    env!("CARGO_PKG_VERSION").split('.').fold(0, |all, part| all * 1000 + part.parse::<u64>().unwrap_or(0))
}
