//! Counters, gauges and histograms with labels, written in Prometheus' text format.
//!
//! For programs with tens of series; the data path of the proxy counts per worker by itself.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// All metrics of a program. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// Held while a series is looked up or everything is written, never while counting.
    families: Arc<Mutex<BTreeMap<String, Family>>>,
}

#[derive(Debug)]
struct Family {
    help: String,
    kind: Kind,
    /// By rendered labels: `{a="b"}` or empty.
    series: BTreeMap<String, Series>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Clone, Debug)]
enum Series {
    Number(Arc<AtomicU64>),
    Histogram(Arc<HistogramInner>),
}

/// A number that only grows.
#[derive(Clone, Debug)]
pub struct Counter(Arc<AtomicU64>);

/// A number that goes up and down; holds the bits of an `f64`.
#[derive(Clone, Debug)]
pub struct Gauge(Arc<AtomicU64>);

/// Counts of observations below bounds.
#[derive(Clone, Debug)]
pub struct Histogram(Arc<HistogramInner>);

#[derive(Debug)]
struct HistogramInner {
    bounds: Vec<f64>,
    counts: Vec<AtomicU64>,
    /// The bits of an `f64`.
    sum: AtomicU64,
    count: AtomicU64,
}

impl Registry {
    /// No metrics yet.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// The counter of this name and these labels, made at the first call.
    pub fn counter(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Counter {
        Counter(self.number(name, help, Kind::Counter, labels))
    }

    /// The gauge of this name and these labels, made at the first call.
    pub fn gauge(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Gauge {
        Gauge(self.number(name, help, Kind::Gauge, labels))
    }

    /// The histogram of this name and these labels, made at the first call with these upper bounds, which ascend.
    pub fn histogram(&self, name: &str, help: &str, bounds: &[f64], labels: &[(&str, &str)]) -> Histogram {
        let fresh = || HistogramInner {
            bounds: bounds.to_vec(),
            counts: bounds.iter().map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0f64.to_bits()),
            count: AtomicU64::new(0),
        };
        match self.series(name, help, Kind::Histogram, labels, || Series::Histogram(Arc::new(fresh()))) {
            Series::Histogram(inner) => Histogram(inner),
            Series::Number(_) => Histogram(Arc::new(fresh())),
        }
    }

    fn number(&self, name: &str, help: &str, kind: Kind, labels: &[(&str, &str)]) -> Arc<AtomicU64> {
        match self.series(name, help, kind, labels, || Series::Number(Arc::default())) {
            Series::Number(value) => value,
            Series::Histogram(_) => Arc::default(),
        }
    }

    /// A name used for two kinds is a programming error; the second user counts into the void rather than breaking the output.
    fn series(
        &self,
        name: &str,
        help: &str,
        kind: Kind,
        labels: &[(&str, &str)],
        fresh: impl FnOnce() -> Series,
    ) -> Series {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let family = families.entry(name.to_owned()).or_insert_with(|| Family {
            help: help.to_owned(),
            kind,
            series: BTreeMap::new(),
        });
        if family.kind != kind {
            return fresh();
        }
        family.series.entry(render_labels(labels)).or_insert_with(fresh).clone()
    }

    /// Everything, in Prometheus' text format, sorted.
    pub fn render(&self) -> String {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = String::new();
        for (name, family) in families.iter() {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "# HELP {name} {}\n# TYPE {name} {kind}",
                family.help.replace('\\', "\\\\").replace('\n', "\\n")
            );
            for (labels, series) in &family.series {
                match series {
                    Series::Number(value) if family.kind == Kind::Counter => {
                        let _ = writeln!(out, "{name}{labels} {}", value.load(Ordering::Relaxed));
                    }
                    Series::Number(value) => {
                        let _ = writeln!(out, "{name}{labels} {}", f64::from_bits(value.load(Ordering::Relaxed)));
                    }
                    Series::Histogram(histogram) => histogram.render(&mut out, name, labels),
                }
            }
        }
        out
    }
}

impl HistogramInner {
    fn render(&self, out: &mut String, name: &str, labels: &str) {
        let inner =
            labels.strip_prefix('{').and_then(|l| l.strip_suffix('}')).map(|l| format!("{l},")).unwrap_or_default();
        let mut total = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{inner}le=\"{bound}\"}} {total}");
        }
        let count = self.count.load(Ordering::Relaxed);
        let _ = writeln!(out, "{name}_bucket{{{inner}le=\"+Inf\"}} {count}");
        let _ = writeln!(
            out,
            "{name}_sum{labels} {}\n{name}_count{labels} {count}",
            f64::from_bits(self.sum.load(Ordering::Relaxed))
        );
    }
}

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Gauge {
    /// Replaces the value.
    pub fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }

    /// Adds to the value.
    pub fn add(&self, delta: f64) {
        add_float(&self.0, delta);
    }
}

impl Histogram {
    /// Counts one observation.
    pub fn observe(&self, value: f64) {
        let inner = &self.0;
        if let Some(i) = inner.bounds.iter().position(|bound| value <= *bound) {
            inner.counts[i].fetch_add(1, Ordering::Relaxed);
        }
        inner.count.fetch_add(1, Ordering::Relaxed);
        add_float(&inner.sum, value);
    }
}

fn add_float(cell: &AtomicU64, delta: f64) {
    let add = |bits| Some((f64::from_bits(bits) + delta).to_bits());
    let _ = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add); // `add` never says no
}

fn render_labels(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_as_prometheus_reads() {
        let registry = Registry::new();
        registry.counter("b_total", "Bs.", &[("who", "a\"b")]).add(2);
        registry.counter("b_total", "Bs.", &[("who", "a\"b")]).increment();
        let gauge = registry.gauge("a", "An a.", &[]);
        gauge.set(1.5);
        gauge.add(-1.0);
        let seconds = registry.histogram("c_seconds", "Cs.", &[0.1, 1.0], &[("x", "y")]);
        [0.05, 0.5, 5.0].iter().for_each(|s| seconds.observe(*s));
        let expected = "\
# HELP a An a.
# TYPE a gauge
a 0.5
# HELP b_total Bs.
# TYPE b_total counter
b_total{who=\"a\\\"b\"} 3
# HELP c_seconds Cs.
# TYPE c_seconds histogram
c_seconds_bucket{x=\"y\",le=\"0.1\"} 1
c_seconds_bucket{x=\"y\",le=\"1\"} 2
c_seconds_bucket{x=\"y\",le=\"+Inf\"} 3
c_seconds_sum{x=\"y\"} 5.55
c_seconds_count{x=\"y\"} 3
";
        assert_eq!(registry.render(), expected);
    }

    #[test]
    fn a_name_of_two_kinds_keeps_the_first() {
        let registry = Registry::new();
        registry.counter("x", "X.", &[]).add(1);
        registry.gauge("x", "X.", &[]).set(7.0);
        assert!(registry.render().ends_with("x 1\n"));
    }
}
