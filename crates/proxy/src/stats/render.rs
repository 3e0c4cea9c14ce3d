//! `/stats` as text, JSON and Prometheus.

use super::registry::{Entry, Kind, Sample};
use super::{BOUNDS, HistogramSample, Naming};
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
    /// Buckets and quantiles.
    Detailed,
}

impl Buckets {
    /// The counts by bucket that are shown; `None`: quantiles are.
    fn counts(self, sample: &HistogramSample, bounds: &[f64]) -> Option<Vec<(f64, u64)>> {
        let mut below = 0;
        let counts = sample.cumulative(bounds).map(|(bound, sum)| {
            let n = sum - std::mem::replace(&mut below, sum);
            (bound, if self == Self::Cumulative { sum } else { n })
        });
        matches!(self, Self::Cumulative | Self::Disjoint).then(|| counts.collect())
    }
}

/// `name: value` lines: texts, numbers, histograms, each sorted.
pub(crate) fn text(entries: &[Entry], buckets: Buckets, naming: &Naming) -> String {
    let mut lines: BTreeMap<String, String> = BTreeMap::new();
    let mut histograms = BTreeMap::new();
    let mut texts = BTreeMap::new();
    for entry in entries {
        match &entry.sample {
            Sample::Counter(n) | Sample::Gauge(n) => {
                lines.insert(entry.full_name(), n.to_string());
            }
            Sample::Text(text) => {
                texts.insert(entry.full_name(), text);
            }
            Sample::Histogram(h) => {
                histograms.insert(entry.full_name(), h.clone());
            }
        }
    }
    let mut out = String::new();
    for (name, text) in texts {
        let _ = writeln!(out, "{name}: \"{text}\"");
    }
    for (name, value) in lines {
        let _ = writeln!(out, "{name}: {value}");
    }
    for (name, histogram) in histograms {
        let _ = write!(out, "{name}:");
        if histogram.count() == 0 {
            out.push_str(" No recorded values\n");
            continue;
        }
        match buckets.counts(&histogram, naming.bounds(&name)) {
            Some(counts) => counts.iter().for_each(|(bound, n)| {
                let _ = write!(out, " B{}({n},{n})", short(*bound));
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
    /// How many there are up to each of these bounds. Of a bound that is not among [`BOUNDS`], what is in the bucket that it
    /// parts is taken to be above it.
    fn cumulative<'a>(&'a self, bounds: &'a [f64]) -> impl Iterator<Item = (f64, u64)> + 'a {
        let up_to =
            |most: f64| BOUNDS.iter().zip(self.buckets).filter(|(bound, _)| **bound <= most).map(|(_, n)| n).sum();
        bounds.iter().map(move |bound| (*bound, up_to(*bound)))
    }

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

/// A bound as Envoy's text has it: six digits, larger ones by their power of ten.
fn short(bound: f64) -> String {
    if bound < 1e6 {
        return bound.to_string();
    }
    let text = format!("{bound:e}");
    let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{digits}e+{power:0>2}")
}

/// A number as Envoy writes it: without a fraction where there is none.
fn number(n: f64) -> serde_json::Value {
    if n.fract() == 0.0 && n.abs() < 1e15 { serde_json::json!(n as i64) } else { serde_json::json!(n) }
}

/// `{"stats":[…]}`, texts first and histograms last, as Envoy.
pub(crate) fn json(entries: &[Entry], buckets: Buckets, naming: &Naming) -> serde_json::Value {
    use serde_json::json;
    let mut stats: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    let mut texts: BTreeMap<String, serde_json::Value> = BTreeMap::new();
    let mut histograms = Vec::new();
    for entry in entries {
        let h = match &entry.sample {
            Sample::Counter(n) | Sample::Gauge(n) => {
                let name = entry.full_name();
                stats.insert(name.clone(), json!({"name": name, "value": n}));
                continue;
            }
            Sample::Text(text) => {
                let name = entry.full_name();
                texts.insert(name.clone(), json!({"name": name, "value": &**text}));
                continue;
            }
            Sample::Histogram(h) => h,
        };
        if let Some(counts) = buckets.counts(h, naming.bounds(&entry.full_name())) {
            let counts = counts
                .into_iter()
                .map(|(bound, n)| json!({"upper_bound": number(bound), "interval": n, "cumulative": n}));
            histograms.push(json!({"name": entry.full_name(), "buckets": counts.collect::<Vec<_>>()}));
            continue;
        }
        let values = QUANTILES.iter().map(|q| {
            let value = (h.count() > 0).then(|| number(h.quantile(*q)));
            json!({"cumulative": value, "interval": value})
        });
        let values: Vec<_> = values.collect();
        histograms.push(match buckets {
            Buckets::Detailed => {
                let lower = std::iter::once(0.0).chain(BOUNDS);
                let full = lower.zip(BOUNDS).zip(h.buckets).filter(|(_, n)| *n > 0).map(
                    |((low, high), n)| json!({"lower_bound": number(low), "width": number(high - low), "count": n}),
                );
                let full: Vec<_> = full.collect();
                json!({"name": entry.full_name(), "totals": full, "intervals": full, "percentiles": values})
            }
            _ => json!({"name": entry.full_name(), "values": values}),
        });
    }
    let mut list: Vec<_> = texts.into_values().chain(stats.into_values()).collect();
    let quantiles = || QUANTILES.map(number);
    if !histograms.is_empty() {
        list.push(match buckets {
            Buckets::Detailed => {
                json!({"histograms": {"supported_percentiles": quantiles(), "details": histograms}})
            }
            Buckets::Quantiles => {
                json!({"histograms": {"supported_quantiles": quantiles(), "computed_quantiles": histograms}})
            }
            Buckets::Cumulative | Buckets::Disjoint => json!({ "histograms": histograms }),
        });
    }
    json!({ "stats": list })
}

/// Prometheus text format with the tags Envoy extracts from names: counters, gauges, texts and histograms in turn.
pub(crate) fn prometheus(entries: &[Entry], buckets: Buckets, naming: &Naming) -> String {
    type Family<'a> = BTreeMap<String, Vec<(String, &'a Entry)>>;
    let mut kinds: [(&str, Family<'_>); 4] =
        ["counter", "gauge", "gauge", if buckets == Buckets::Quantiles { "summary" } else { "histogram" }]
            .map(|kind| (kind, BTreeMap::new()));
    for entry in entries {
        let (name, labels) = named_by(entry, naming);
        let kind = match entry.sample {
            Sample::Counter(_) => 0,
            Sample::Gauge(_) => 1,
            Sample::Text(_) => 2,
            Sample::Histogram(_) => 3,
        };
        kinds[kind].1.entry(name).or_default().push((labels, entry));
    }
    let mut out = String::new();
    for (kind, families) in kinds {
        // Envoy sorts by the names that still have their dots.
        for (dotted, samples) in families {
            let mut name = String::from("envoy_");
            sanitize(&mut name, &dotted);
            let _ = writeln!(out, "# TYPE {name} {kind}");
            for (labels, entry) in samples {
                match &entry.sample {
                    Sample::Counter(n) | Sample::Gauge(n) => {
                        let _ = writeln!(out, "{name}{{{labels}}} {n}");
                    }
                    Sample::Text(text) => {
                        let separator = if labels.is_empty() { "" } else { "," };
                        let _ = writeln!(out, "{name}{{{labels}{separator}text_value=\"{}\"}} 0", escape(text));
                    }
                    Sample::Histogram(h) if buckets == Buckets::Quantiles => summary(&mut out, &name, &labels, h),
                    Sample::Histogram(h) => {
                        histogram(&mut out, &name, &labels, h, naming.bounds(&entry.full_name()));
                    }
                }
            }
        }
    }
    out
}

/// The quantiles of one histogram, `_sum` and `_count`.
fn summary(out: &mut String, name: &str, labels: &str, sample: &HistogramSample) {
    let separator = if labels.is_empty() { "" } else { "," };
    for quantile in QUANTILES {
        let value = if sample.count() == 0 { "nan".to_owned() } else { sample.quantile(quantile).to_string() };
        let share = format!("{:.3}", quantile / 100.0);
        let share = share.trim_end_matches('0').trim_end_matches('.');
        let _ = writeln!(out, "{name}{{{labels}{separator}quantile=\"{share}\"}} {value}");
    }
    let _ = writeln!(out, "{name}_sum{{{labels}}} {}", sample.sum);
    let _ = writeln!(out, "{name}_count{{{labels}}} {}", sample.count());
}

/// The `_bucket`, `_sum` and `_count` lines of one histogram.
pub(crate) fn histogram(out: &mut String, name: &str, labels: &str, sample: &HistogramSample, bounds: &[f64]) {
    let separator = if labels.is_empty() { "" } else { "," };
    for (bound, sum) in sample.cumulative(bounds) {
        let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {sum}");
    }
    let total = sample.count();
    let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"+Inf\"}} {total}");
    let _ = writeln!(out, "{name}_sum{{{labels}}} {}", sample.sum);
    let _ = writeln!(out, "{name}_count{{{labels}}} {total}");
}

/// The name with its dots and without what became labels, and these: Envoy's own, those of the bootstrap, or both.
fn named_by(entry: &Entry, naming: &Naming) -> (String, String) {
    let full = entry.full_name();
    let Some(found) = naming.find(&full) else { return prometheus_name(entry, &[]) };
    if naming.has_defaults() {
        let (mut name, mut labels) = prometheus_name(entry, &found.early);
        found.take_out(&full, &mut name);
        put_labels(&found.late, &mut labels);
        return (name, labels);
    }
    let mut labels = String::new();
    put_labels(&found.early, &mut labels);
    put_labels(&found.late, &mut labels);
    (found.rest_of(&full), labels)
}

/// Adds labels; one that is there already stays as it is.
fn put_labels(more: &[(String, String)], labels: &mut String) {
    for (name, value) in more {
        if labels.split(',').any(|label| label.split('=').next() == Some(name)) {
            continue;
        }
        let separator = if labels.is_empty() { "" } else { "," };
        let _ = write!(labels, "{separator}{name}=\"{}\"", escape(value));
    }
}

/// By Envoy's own rules, with other labels among theirs.
fn prometheus_name(entry: &Entry, others: &[(String, String)]) -> (String, String) {
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
    let part = tagged(entry.kind, name);
    let of_worker = part.as_ref().is_some_and(|(_, label, _)| *label == "envoy_worker_id");
    if !of_worker {
        put_labels(others, &mut labels);
    }
    if let Some((rest, label, value)) = part {
        if !labels.is_empty() {
            labels.push(',');
        }
        let _ = write!(labels, "{label}=\"{}\"", escape(value));
        moved = rest;
        name = &moved;
    }
    if of_worker {
        put_labels(others, &mut labels);
    }
    let tag = match entry.kind {
        Kind::Cluster => "envoy_cluster_name",
        Kind::Http => "envoy_http_conn_manager_prefix",
        Kind::Listener => "envoy_listener_address",
        Kind::Tcp => "envoy_tcp_prefix",
        Kind::Plain | Kind::VirtualHost => "",
    };
    let mut full = String::new();
    // The admin port has no address.
    let admin = entry.kind == Kind::Listener && &*entry.scope == "admin";
    if entry.kind == Kind::VirtualHost {
        full.push_str("vhost.");
        name_of_requests(&entry.scope, &mut full, &mut labels);
    } else if entry.kind == Kind::Plain || admin {
        if admin {
            full.push_str("listener.");
        }
        if !entry.scope.is_empty() {
            full.push_str(&entry.scope);
            full.push('.');
        }
    } else {
        full.push_str(entry.kind.prefix());
        full.push('.');
        if !labels.is_empty() {
            labels.push(',');
        }
        let _ = write!(labels, "{tag}=\"{}\"", escape(&entry.scope));
    }
    full.push_str(name);
    (full, labels)
}

/// `VHOST.vcluster.NAME` and `VHOST.route.NAME` as labels. Envoy's rules take one part between dots for each; what is left
/// of longer ones stays in the name.
fn name_of_requests(scope: &str, full: &mut String, labels: &mut String) {
    let mut parts = scope.split('.');
    let vhost = parts.next().unwrap_or_default();
    let mut tags = vec![("envoy_virtual_host", vhost)];
    let kind = parts.next().unwrap_or_default();
    full.push_str(kind);
    full.push('.');
    match kind {
        "vcluster" => tags.insert(0, ("envoy_virtual_cluster", parts.next().unwrap_or_default())),
        "route" => tags.push(("envoy_route", parts.next().unwrap_or_default())),
        _ => {}
    }
    for part in parts {
        full.push_str(part);
        full.push('.');
    }
    for (tag, value) in tags {
        let separator = if labels.is_empty() { "" } else { "," };
        let _ = write!(labels, "{separator}{tag}=\"{}\"", escape(value));
    }
}

/// A part of a name that Envoy makes a label (`source/common/config/well_known_names.cc`): the name without it, the label and
/// its value.
fn tagged(kind: Kind, name: &str) -> Option<(String, &'static str, &str)> {
    // Of names with dots, their first part.
    if let Some((certificate, rest)) = name.strip_prefix("ssl.certificate.").and_then(|rest| rest.split_once('.')) {
        return Some((format!("ssl.certificate.{rest}"), "envoy_tls_certificate", certificate));
    }
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
    if kind == Kind::Plain
        && let Some((secret, rest)) = name.strip_prefix("sds.").and_then(|rest| rest.split_once('.'))
    {
        return Some((format!("sds.{rest}"), "envoy_xds_resource_name", secret));
    }
    if kind == Kind::Http
        && let Some((routes, rest)) = name.strip_prefix("rds.").and_then(|rest| rest.rsplit_once('.'))
    {
        return Some((format!("rds.{rest}"), "envoy_rds_route_config", routes));
    }
    if kind == Kind::Plain
        && let Some(rest) = name.strip_prefix("http.async-client.")
    {
        return Some((format!("http.{rest}"), "envoy_http_conn_manager_prefix", "async-client"));
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
