//! `/stats` as text, JSON and Prometheus.

use super::registry::{Entry, Kind, Sample};
use super::{BOUNDS, HistogramSample};
use std::collections::BTreeMap;
use std::fmt::Write;

/// How `/stats` shows histograms.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Buckets {
    /// Estimates of quantiles.
    Quantiles,
    /// Each bucket with all below it.
    Cumulative,
    /// Each bucket for itself.
    Disjoint,
}

impl Buckets {
    /// The counts by bucket that are shown; `None`: quantiles are.
    fn counts(self, sample: &HistogramSample) -> Option<Vec<(f64, u64)>> {
        let mut sum = 0;
        let counts = BOUNDS.iter().zip(sample.buckets).map(|(bound, n)| {
            sum += n;
            (*bound, if self == Self::Cumulative { sum } else { n })
        });
        (self != Self::Quantiles).then(|| counts.collect())
    }
}

/// `name: value` lines, sorted.
pub(crate) fn text(entries: &[Entry], buckets: Buckets) -> String {
    let mut lines: BTreeMap<String, String> = BTreeMap::new();
    let mut histograms = BTreeMap::new();
    for entry in entries {
        match &entry.sample {
            Sample::Counter(n) | Sample::Gauge(n) => {
                lines.insert(entry.full_name(), n.to_string());
            }
            Sample::Histogram(h) => {
                histograms.insert(entry.full_name(), h.clone());
            }
        }
    }
    let mut out = String::new();
    for (name, value) in lines {
        let _ = writeln!(out, "{name}: {value}");
    }
    for (name, histogram) in histograms {
        let _ = write!(out, "{name}:");
        if histogram.count() == 0 {
            out.push_str(" No recorded values\n");
            continue;
        }
        match buckets.counts(&histogram) {
            Some(counts) => counts.iter().for_each(|(bound, n)| {
                let _ = write!(out, " B{bound}({n},{n})");
            }),
            None => QUANTILES.iter().for_each(|quantile| {
                let _ = write!(out, " P{quantile}({0},{0})", histogram.quantile(*quantile));
            }),
        }
        out.push('\n');
    }
    out
}

/// Envoy's supported quantiles.
const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

impl HistogramSample {
    /// An estimate from the buckets: the upper bound of the bucket that holds the quantile.
    fn quantile(&self, quantile: f64) -> f64 {
        let wanted = (self.count() as f64 * quantile / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted {
                return BOUNDS.get(i).copied().unwrap_or(BOUNDS[BOUNDS.len() - 1]);
            }
        }
        0.0
    }
}

/// `{"stats":[…]}`, histograms last, as Envoy.
pub(crate) fn json(entries: &[Entry], buckets: Buckets) -> serde_json::Value {
    let mut stats: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    let mut histograms = Vec::new();
    for entry in entries {
        match &entry.sample {
            Sample::Counter(n) | Sample::Gauge(n) => {
                let name = entry.full_name();
                stats.insert(name.clone(), serde_json::json!({"name": name, "value": n}));
            }
            Sample::Histogram(h) if buckets != Buckets::Quantiles => {
                let counts = buckets.counts(h).unwrap_or_default();
                let counts = counts
                    .iter()
                    .map(|(bound, n)| serde_json::json!({"upper_bound": bound, "interval": n, "cumulative": n}));
                let counts: Vec<_> = counts.collect();
                histograms.push(serde_json::json!({"name": entry.full_name(), "buckets": counts}));
            }
            Sample::Histogram(h) => {
                let quantile = |q: f64| (h.count() > 0).then(|| h.quantile(q));
                let values: Vec<_> = QUANTILES
                    .iter()
                    .map(|q| serde_json::json!({"interval": quantile(*q), "cumulative": quantile(*q)}))
                    .collect();
                histograms.push(serde_json::json!({"name": entry.full_name(), "values": values}));
            }
        }
    }
    let mut list: Vec<_> = stats.into_values().collect();
    if buckets != Buckets::Quantiles {
        list.push(serde_json::json!({ "histograms": histograms }));
    } else if !histograms.is_empty() {
        list.push(serde_json::json!({
            "histograms": {"supported_quantiles": QUANTILES, "computed_quantiles": histograms}
        }));
    }
    serde_json::json!({ "stats": list })
}

/// Prometheus text format with the tags Envoy extracts from names.
pub(crate) fn prometheus(entries: &[Entry], used_only: bool) -> String {
    // By name: the type, and labels with values.
    type Family<'a> = (&'static str, Vec<(String, &'a Sample)>);
    let mut families: BTreeMap<String, Family<'_>> = BTreeMap::new();
    let counted = super::counted(entries);
    for entry in entries {
        if used_only && !entry.is_used(&counted) {
            continue;
        }
        let (name, labels) = prometheus_name(entry);
        let kind = match entry.sample {
            Sample::Counter(_) => "counter",
            Sample::Gauge(_) => "gauge",
            Sample::Histogram(_) => "histogram",
        };
        families.entry(name).or_insert_with(|| (kind, Vec::new())).1.push((labels, &entry.sample));
    }
    let mut out = String::new();
    for (name, (kind, samples)) in families {
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for (labels, sample) in samples {
            match sample {
                Sample::Counter(n) | Sample::Gauge(n) => {
                    let _ = writeln!(out, "{name}{{{labels}}} {n}");
                }
                Sample::Histogram(h) => histogram(&mut out, &name, &labels, h),
            }
        }
    }
    out
}

/// The `_bucket`, `_sum` and `_count` lines of one histogram.
pub(crate) fn histogram(out: &mut String, name: &str, labels: &str, sample: &HistogramSample) {
    let separator = if labels.is_empty() { "" } else { "," };
    let mut sum = 0;
    for (bound, n) in BOUNDS.iter().zip(sample.buckets) {
        sum += n;
        let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {sum}");
    }
    let total = sample.count();
    let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"+Inf\"}} {total}");
    let _ = writeln!(out, "{name}_sum{{{labels}}} {}", sample.sum);
    let _ = writeln!(out, "{name}_count{{{labels}}} {total}");
}

fn prometheus_name(entry: &Entry) -> (String, String) {
    let mut labels = String::new();
    let mut name = entry.name.as_str();
    let shortened;
    if let Some((stem, code)) = response_code(name) {
        if let Some(class) = code.strip_suffix("xx") {
            let _ = write!(labels, "envoy_response_code_class=\"{class}\"");
            shortened = format!("{stem}_xx");
        } else {
            let _ = write!(labels, "envoy_response_code=\"{code}\"");
            shortened = stem.to_owned();
        }
        name = &shortened;
    }
    let moved;
    if let Some((rest, label, value)) = tagged(entry.kind, name) {
        if !labels.is_empty() {
            labels.push(',');
        }
        let _ = write!(labels, "{label}=\"{}\"", escape(value));
        moved = rest;
        name = &moved;
    }
    let tag = match entry.kind {
        Kind::Cluster => "envoy_cluster_name",
        Kind::Http => "envoy_http_conn_manager_prefix",
        Kind::Listener => "envoy_listener_address",
        Kind::Tcp => "envoy_tcp_prefix",
        Kind::Plain | Kind::VirtualHost => "",
    };
    let mut full = String::from("envoy_");
    // The admin port has no address.
    let admin = entry.kind == Kind::Listener && &*entry.scope == "admin";
    if entry.kind == Kind::VirtualHost {
        full.push_str("vhost_");
        name_of_requests(&entry.scope, &mut full, &mut labels);
    } else if entry.kind == Kind::Plain || admin {
        if admin {
            full.push_str("listener_");
        }
        if !entry.scope.is_empty() {
            sanitize(&mut full, &entry.scope);
            full.push('_');
        }
    } else {
        full.push_str(entry.kind.prefix());
        full.push('_');
        if !labels.is_empty() {
            labels.push(',');
        }
        let _ = write!(labels, "{tag}=\"{}\"", escape(&entry.scope));
    }
    sanitize(&mut full, name);
    (full, labels)
}

/// `VHOST.vcluster.NAME` and `VHOST.route.NAME` as labels. Envoy's rules take one part between dots for each; what is left
/// of longer ones stays in the name.
fn name_of_requests(scope: &str, full: &mut String, labels: &mut String) {
    let mut parts = scope.split('.');
    let vhost = parts.next().unwrap_or_default();
    let mut tags = vec![("envoy_virtual_host", vhost)];
    let kind = parts.next().unwrap_or_default();
    sanitize(full, kind);
    full.push('_');
    match kind {
        "vcluster" => tags.insert(0, ("envoy_virtual_cluster", parts.next().unwrap_or_default())),
        "route" => tags.push(("envoy_route", parts.next().unwrap_or_default())),
        _ => {}
    }
    for part in parts {
        sanitize(full, part);
        full.push('_');
    }
    for (tag, value) in tags {
        let separator = if labels.is_empty() { "" } else { "," };
        let _ = write!(labels, "{separator}{tag}=\"{}\"", escape(value));
    }
}

/// A part of a name that Envoy makes a label (`source/common/config/well_known_names.cc`): the name without it, the label and
/// its value.
fn tagged(kind: Kind, name: &str) -> Option<(String, &'static str, &str)> {
    if let Some((what, value)) = name.strip_prefix("ssl.").and_then(|rest| rest.split_once('.')) {
        let label = match (what, kind) {
            // Envoy has two rules for these, of which the older one names clusters' only.
            ("ciphers", Kind::Cluster) => "cipher_suite",
            ("ciphers", _) => "envoy_ssl_cipher",
            ("curves", _) => "envoy_ssl_curve",
            ("sigalgs", _) => "envoy_ssl_sigalg",
            ("versions", _) => "envoy_ssl_version",
            _ => return None,
        };
        return Some((format!("ssl.{what}"), label, value));
    }
    if kind == Kind::Listener
        && let Some((prefix, rest)) = name.strip_prefix("http.").and_then(|rest| rest.rsplit_once('.'))
    {
        return Some((format!("http.{rest}"), "envoy_http_conn_manager_prefix", prefix));
    }
    if let Some((before, after)) = name.split_once("worker_")
        && matches!(before, "" | "server." | "thread_local_cluster_manager.")
        && let Some((worker, rest)) = after.split_once('.')
        && worker.bytes().all(|b| b.is_ascii_digit())
    {
        return Some((format!("{before}worker.{rest}"), "envoy_worker_id", worker));
    }
    if kind == Kind::Plain
        && let Some((prefix, rest)) = name.split_once(".http_local_rate_limit.")
    {
        return Some((format!("http_local_rate_limit.{rest}"), "envoy_local_http_ratelimit_prefix", prefix));
    }
    None
}

/// Splits `upstream_rq_503` and `downstream_rq_2xx`.
fn response_code(name: &str) -> Option<(&str, &str)> {
    let (stem, code) = name.rsplit_once('_')?;
    let ok = stem.ends_with("_rq")
        && code.len() == 3
        && code.as_bytes()[0].is_ascii_digit()
        && (code.ends_with("xx") || code.bytes().all(|b| b.is_ascii_digit()));
    ok.then_some((stem, code))
}

fn sanitize(out: &mut String, name: &str) {
    out.extend(name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }));
}

/// A label value with backslashes, quotes and line ends escaped.
pub(crate) fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out
}
