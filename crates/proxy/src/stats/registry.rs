//! Where scopes are registered, merged and read.

use super::HistogramSample;
use mesh_types::ArcStr;
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a scope counts; gives the prefix of its names and the Prometheus tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Cluster,
    Http,
    Listener,
    Tcp,
    /// Virtual clusters and routes that are counted by themselves; the scope is `VHOST.vcluster.NAME` or
    /// `VHOST.route.NAME`.
    VirtualHost,
    /// Names without a prefix that comes from configuration.
    Plain,
}

impl Kind {
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Kind::Cluster => "cluster",
            Kind::Http => "http",
            Kind::Listener => "listener",
            Kind::Tcp => "tcp",
            Kind::VirtualHost => "vhost",
            Kind::Plain => "",
        }
    }
}

/// A merged value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Sample {
    Counter(u64),
    Gauge(u64),
    Histogram(HistogramSample),
    /// What is no number, such as a version.
    Text(ArcStr),
}

impl Sample {
    fn merge(&mut self, other: &Sample) {
        match (self, other) {
            (Sample::Counter(a), Sample::Counter(b)) | (Sample::Gauge(a), Sample::Gauge(b)) => *a = a.wrapping_add(*b),
            (Sample::Histogram(a), Sample::Histogram(b)) => a.merge(b),
            _ => {}
        }
    }

    /// Whether anything was ever counted.
    fn used(&self) -> bool {
        match self {
            Sample::Counter(n) | Sample::Gauge(n) => *n != 0,
            Sample::Histogram(h) => h.count() != 0,
            Sample::Text(text) => !text.is_empty(),
        }
    }
}

/// A group of counters of one thread.
pub(crate) trait Scope: Send + Sync {
    /// Calls `f` with each name (without prefix) and value.
    fn visit(&self, f: &mut dyn FnMut(&str, Sample));
}

type Key = (Kind, ArcStr);

/// Gives entries that are computed when somebody reads.
pub(crate) type Source = Box<dyn Fn(&mut dyn FnMut(Entry)) + Send + Sync>;

/// The number of a flush, and the histograms as they were then.
type Flushed = (u64, BTreeMap<(Key, String), HistogramSample>);

/// All scopes of the process. The lock is taken when a scope is made or somebody reads, never per request.
#[derive(Default)]
pub(crate) struct Registry {
    scopes: Mutex<BTreeMap<Key, Vec<Arc<dyn Scope>>>>,
    /// What `/reset_counters` subtracts.
    baseline: Mutex<BTreeMap<(Key, String), u64>>,
    sources: Mutex<Vec<Source>>,
    /// Histograms as of the last flush, and which flush that was.
    flushed: Mutex<Flushed>,
    pub(crate) istio: super::istio::Series,
}

/// One merged value with its place.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) scope: ArcStr,
    pub(crate) name: String,
    pub(crate) sample: Sample,
}

impl Entry {
    /// Envoy's dotted name.
    pub(crate) fn full_name(&self) -> String {
        match self.kind {
            Kind::Plain if self.scope.is_empty() => self.name.clone(),
            Kind::Plain => format!("{}.{}", self.scope, self.name),
            kind => format!("{}.{}.{}", kind.prefix(), self.scope, self.name),
        }
    }
}

/// The counters that are not 0, by place and name.
pub(crate) type Counted = HashSet<(Kind, ArcStr, String)>;

/// What was counted among `entries`.
pub(crate) fn counted(entries: &[Entry]) -> Counted {
    let counters = entries.iter().filter(|entry| matches!(entry.sample, Sample::Counter(n) if n > 0));
    counters.map(|entry| (entry.kind, entry.scope.clone(), entry.name.clone())).collect()
}

/// What Envoy sets when a cluster or the server is made.
const SET_AT_START: [&str; 13] = [
    "cluster_manager.warming_clusters",
    "control_plane.connected_state",
    "listener_manager.total_listeners_warming",
    "runtime.num_keys",
    "runtime.num_layers",
    "server.compilation_settings.fips_mode",
    "server.days_until_first_cert_expiring",
    "server.dynamic_unknown_fields",
    "server.state",
    "server.static_unknown_fields",
    "server.total_connections",
    "server.wip_protos",
    "warming_state",
];

impl Entry {
    /// Whether it was written since the start (`usedonly`). A gauge that came down again was, too: it goes with a counter.
    pub(crate) fn is_used(&self, counted: &Counted) -> bool {
        if self.sample.used() || SET_AT_START.contains(&&*self.name) {
            return true;
        }
        let is_counted = |counter: String| counted.contains(&(self.kind, self.scope.clone(), counter));
        match &*self.name {
            _ if !matches!(self.sample, Sample::Gauge(_)) => false,
            "downstream_pre_cx_active" => is_counted("downstream_cx_total".to_owned()),
            "membership_degraded" | "membership_excluded" | "membership_healthy" | "membership_total" => {
                // An update that brings no host to a cluster without hosts sets none of them.
                is_counted("membership_change".to_owned()) || !is_counted("update_success".to_owned())
            }
            "listener_manager.total_listeners_active" => is_counted("listener_manager.listener_added".to_owned()),
            "listener_manager.total_filter_chains_draining" => {
                is_counted("listener_manager.listener_in_place_updated".to_owned())
            }
            "circuit_breakers.default.cx_open" => is_counted("upstream_cx_total".to_owned()),
            // Connections of TCP are in no pool that counts.
            "circuit_breakers.default.cx_pool_open" => {
                ["1", "2"].iter().any(|version| is_counted(format!("upstream_cx_http{version}_total")))
            }
            "circuit_breakers.default.rq_open" => is_counted("upstream_rq_total".to_owned()),
            "circuit_breakers.default.rq_pending_open" => is_counted("upstream_rq_pending_total".to_owned()),
            name => name.strip_suffix("_active").is_some_and(|stem| is_counted(format!("{stem}_total"))),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn merge_into(merged: &mut BTreeMap<String, Sample>, name: &str, sample: Sample) {
    match merged.get_mut(name) {
        Some(seen) => seen.merge(&sample),
        None => {
            merged.insert(name.to_owned(), sample);
        }
    }
}

impl Registry {
    pub(crate) fn add(&self, kind: Kind, name: ArcStr, scope: Arc<dyn Scope>) {
        lock(&self.scopes).entry((kind, name)).or_default().push(scope);
    }

    pub(crate) fn add_source(&self, source: Source) {
        lock(&self.sources).push(source);
    }

    /// Forgets a scope whose configuration is gone.
    pub(crate) fn remove(&self, kind: Kind, name: &ArcStr) {
        lock(&self.scopes).remove(&(kind, name.clone()));
    }

    /// Everything, merged over workers, sorted.
    pub(crate) fn read(&self) -> Vec<Entry> {
        let scopes: Vec<(Key, Vec<Arc<dyn Scope>>)> =
            lock(&self.scopes).iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let baseline = lock(&self.baseline);
        let mut all: BTreeMap<Key, BTreeMap<String, Sample>> = BTreeMap::new();
        for (key, parts) in scopes {
            let merged = all.entry(key).or_default();
            for part in parts {
                part.visit(&mut |name, sample| merge_into(merged, name, sample));
            }
        }
        for source in lock(&self.sources).iter() {
            source(&mut |entry| {
                merge_into(all.entry((entry.kind, entry.scope)).or_default(), &entry.name, entry.sample);
            });
        }
        let mut entries = Vec::new();
        for (key, merged) in all {
            for (name, mut sample) in merged {
                if let Sample::Counter(n) = &mut sample
                    && !baseline.is_empty()
                    && let Some(base) = baseline.get(&(key.clone(), name.clone()))
                {
                    *n = n.wrapping_sub(*base);
                }
                entries.push(Entry { kind: key.0, scope: key.1.clone(), name, sample });
            }
        }
        entries
    }

    /// As [`Registry::read`], with histograms as Envoy shows them: of the last flush, empty before the first.
    /// `flush`: how many flush intervals have passed since the start.
    pub(crate) fn read_flushed(&self, flush: u64) -> Vec<Entry> {
        let mut entries = self.read();
        let mut flushed = lock(&self.flushed);
        if flush > flushed.0 {
            let all = entries.iter().filter_map(|entry| match &entry.sample {
                Sample::Histogram(h) => Some((((entry.kind, entry.scope.clone()), entry.name.clone()), h.clone())),
                _ => None,
            });
            *flushed = (flush, all.collect());
        }
        for entry in &mut entries {
            if let Sample::Histogram(h) = &mut entry.sample {
                let key = ((entry.kind, entry.scope.clone()), entry.name.clone());
                *h = flushed.1.get(&key).cloned().unwrap_or_default();
            }
        }
        entries
    }

    /// `/reset_counters`: counters start again from 0 (the workers' own cells are not touched).
    pub(crate) fn reset(&self) {
        let entries = self.read();
        let mut baseline = lock(&self.baseline);
        for entry in entries {
            if let Sample::Counter(n) = entry.sample {
                *baseline.entry(((entry.kind, entry.scope), entry.name)).or_default() += n;
            }
        }
    }
}
