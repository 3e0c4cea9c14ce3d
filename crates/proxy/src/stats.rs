//! Counters: one writer (a worker) each, found once per connection or cluster, merged when somebody asks.
//!
//! No atomic read-modify-write happens on the data path: a worker loads and stores its own cells, a scrape only loads.

mod istio;
mod naming;
mod registry;
mod render;
mod scopes;

pub(crate) use istio::{ArcStrOrUnknown, Computed, Flags, IstioStats, Peer, RequestLabels, TcpLabels, Workload};
pub(crate) use naming::Naming;
pub(crate) use registry::{Entry, Kind, Registry, Sample, Scope, counted};
pub(crate) use render::{Buckets, json, prometheus, text};
pub(crate) use scopes::{
    Answers, ClusterStats, HTTP1_CODEC, HTTP2_CODEC, HTTP2_GAUGES, HttpStats, ListenerHttpStats, ListenerStats, Named,
    OWN_REQUESTS, OWN_REQUESTS_ELSE, OfManager, OfThread, PlainStats, RequestStats, TcpStats, ssl_zero,
};

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A number that only grows; written by one thread.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that goes up and down; written by one thread. Sums over workers are right even if one part is negative.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    pub(crate) fn inc(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }

    pub(crate) fn dec(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(1), Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of Envoy's default histogram buckets (source/common/stats/histogram_impl.cc), which Istio's metrics use too.
pub(crate) const BOUNDS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0,
    600000.0, 1800000.0, 3600000.0,
];

/// Observations by bucket; written by one thread.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// One per bound, the last for everything above.
    buckets: [Counter; BOUNDS.len() + 1],
    sum: Counter,
}

impl Histogram {
    pub(crate) fn record(&self, value: u64) {
        let v = value as f64;
        let bucket = BOUNDS.iter().position(|bound| v <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].inc();
        self.sum.add(value);
    }

    pub(crate) fn read(&self) -> HistogramSample {
        HistogramSample { buckets: std::array::from_fn(|i| self.buckets[i].get()), sum: self.sum.get() }
    }
}

/// A merged histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HistogramSample {
    pub(crate) buckets: [u64; BOUNDS.len() + 1],
    pub(crate) sum: u64,
}

impl HistogramSample {
    pub(crate) fn merge(&mut self, other: &Self) {
        for (a, b) in self.buckets.iter_mut().zip(other.buckets) {
            *a += b;
        }
        self.sum += other.sum;
    }

    /// What is left without `part`.
    pub(crate) fn subtract(&mut self, part: &Self) {
        for (a, b) in self.buckets.iter_mut().zip(part.buckets) {
            *a = a.saturating_sub(b);
        }
        self.sum = self.sum.saturating_sub(part.sum);
    }

    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// Counts by small keys (response codes) without a lock: key and count share one cell.
#[derive(Debug, Default)]
pub(crate) struct Codes([AtomicU64; 24]);

impl Codes {
    /// Counts `code`; when more than the table's size of different codes were seen, the rest is not told apart.
    pub(crate) fn inc(&self, code: u16) {
        self.add(code, 1);
    }

    /// Counts `code` so many times.
    pub(crate) fn add(&self, code: u16, n: u64) {
        if n == 0 {
            return;
        }
        for cell in &self.0 {
            let value = cell.load(Relaxed);
            if value == 0 || (value >> 48) as u16 == code {
                cell.store((u64::from(code) << 48) | ((value & COUNT) + n), Relaxed);
                return;
            }
        }
    }

    pub(crate) fn each(&self, mut f: impl FnMut(u16, u64)) {
        for cell in &self.0 {
            let value = cell.load(Relaxed);
            if value != 0 {
                f((value >> 48) as u16, value & COUNT);
            }
        }
    }
}

const COUNT: u64 = (1 << 48) - 1;

/// The counters of a cluster that was never used, so that they show at zero.
pub(crate) fn each_zero(f: &mut dyn FnMut(&str, Sample)) {
    ClusterStats::default().visit(f);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_count_apart() {
        let codes = Codes::default();
        for code in [200, 200, 503, 200] {
            codes.inc(code);
        }
        let mut all = Vec::new();
        codes.each(|c, n| all.push((c, n)));
        assert_eq!(all, [(200, 3), (503, 1)]);
    }

    #[test]
    fn requests_from_inside_and_outside_are_told_apart() {
        let stats = ClusterStats::default();
        stats.charge(200, false);
        stats.charge(200, true);
        stats.charge(503, true);
        stats.took(7, true);
        let mut all = std::collections::BTreeMap::new();
        stats.visit(&mut |name, sample| {
            all.insert(name.to_owned(), sample);
        });
        let count = |name: &str| match all.get(name) {
            Some(Sample::Counter(n)) => Some(*n),
            _ => None,
        };
        assert_eq!(count("upstream_rq_200"), Some(2));
        assert_eq!(count("internal.upstream_rq_200"), Some(1));
        assert_eq!(count("internal.upstream_rq_completed"), Some(2));
        assert_eq!(count("external.upstream_rq_200"), Some(1));
        assert_eq!(count("external.upstream_rq_503"), None);
        assert!(all.contains_key("internal.upstream_rq_time"));
        assert!(!all.contains_key("external.upstream_rq_time"));
        assert!(!all.keys().any(|name| name.starts_with("ssl.")), "there is no TLS");
    }

    #[test]
    fn gauges_at_zero_are_used_once_something_was_counted() {
        let entry =
            |name: &str, sample| Entry { kind: Kind::Cluster, scope: "a".into(), name: name.to_owned(), sample };
        let entries = [
            entry("upstream_cx_total", Sample::Counter(1)),
            entry("upstream_cx_active", Sample::Gauge(0)),
            entry("upstream_rq_total", Sample::Counter(0)),
            entry("upstream_rq_active", Sample::Gauge(0)),
            entry("membership_change", Sample::Counter(1)),
            entry("membership_excluded", Sample::Gauge(0)),
            entry("version", Sample::Gauge(0)),
        ];
        let counted = counted(&entries);
        let used = entries.iter().filter(|e| e.is_used(&counted)).map(|e| &*e.name);
        assert_eq!(
            used.collect::<Vec<_>>(),
            ["upstream_cx_total", "upstream_cx_active", "membership_change", "membership_excluded"]
        );
    }

    #[test]
    fn parts_of_names_become_labels() {
        let entry = |kind, scope: &str, name: &str| Entry {
            kind,
            scope: scope.into(),
            name: name.to_owned(),
            sample: Sample::Counter(1),
        };
        let entries = [
            entry(Kind::Listener, "0.0.0.0_80", "http.a.b.downstream_rq_2xx"),
            entry(Kind::Listener, "0.0.0.0_80", "ssl.ciphers.X-1"),
            entry(Kind::Listener, "admin", "downstream_cx_total"),
            entry(Kind::Plain, "", "server.worker_3.watchdog_miss"),
            entry(Kind::VirtualHost, "v.vcluster.get", "upstream_rq_2xx"),
            entry(Kind::VirtualHost, "v.route.r.x", "upstream_rq_total"),
            entry(Kind::VirtualHost, "a.b:80.vcluster.other", "upstream_rq_total"),
        ];
        let text = prometheus(&entries, Buckets::Cumulative, &Naming::default());
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "envoy_listener_admin_downstream_cx_total{} 1",
                "envoy_listener_http_downstream_rq_xx{envoy_response_code_class=\"2\",envoy_http_conn_manager_prefix=\"a.b\",envoy_listener_address=\"0.0.0.0_80\"} 1",
                "envoy_listener_ssl_ciphers{envoy_ssl_cipher=\"X-1\",envoy_listener_address=\"0.0.0.0_80\"} 1",
                "envoy_server_worker_watchdog_miss{envoy_worker_id=\"3\"} 1",
                "envoy_vhost_b_80_vcluster_other_upstream_rq_total{envoy_virtual_host=\"a\"} 1",
                "envoy_vhost_route_x_upstream_rq_total{envoy_virtual_host=\"v\",envoy_route=\"r\"} 1",
                "envoy_vhost_vcluster_upstream_rq_xx{envoy_response_code_class=\"2\",envoy_virtual_cluster=\"get\",envoy_virtual_host=\"v\"} 1",
            ]
        );
    }

    #[test]
    fn histogram_bounds_are_inclusive() {
        let h = Histogram::default();
        h.record(1);
        h.record(2);
        h.record(4_000_000);
        let sample = h.read();
        assert_eq!((sample.buckets[1], sample.buckets[2], sample.buckets[19]), (1, 1, 1));
        assert_eq!(sample.count(), 3);
    }
}
