//! What the sidecars measured, put together into edges of a graph: requests, success, latency. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// One line of Prometheus text: name, labels, value.
#[derive(Debug, PartialEq)]
pub struct Sample<'a> {
    /// The metric.
    pub name: &'a str,
    /// Its labels.
    pub labels: BTreeMap<&'a str, String>,
    /// Its value.
    pub value: f64,
}

/// Who calls whom.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    pub(crate) from: String,
    pub(crate) to: String,
}

/// What happened on an edge since the sidecars started.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Traffic {
    pub(crate) requests: f64,
    /// Answers of 500 and above, and none at all (code 0).
    pub(crate) failures: f64,
    /// Requests by upper bound of their duration, cumulative, in order of the bound.
    buckets: BTreeMap<Bound, f64>,
}

/// A bucket's bound in microseconds, so that it can be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Bound(u64);

/// Numbers of an edge for a person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct EdgeRow {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) requests: u64,
    /// Percent.
    pub(crate) success: f64,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
}

/// Edges by what the *destination's* sidecar reports: every request of the mesh is there exactly once.
pub(crate) type Edges = BTreeMap<Edge, Traffic>;

/// Adds one sidecar's metrics.
pub(crate) fn add(edges: &mut Edges, text: &str) {
    for sample in text.lines().filter_map(parse) {
        let label =
            |name: &str| sample.labels.get(name).map(String::as_str).filter(|v| !v.is_empty() && *v != "unknown");
        if sample.labels.get("reporter").map(String::as_str) != Some("destination") {
            continue;
        }
        let is_total = matches!(sample.name, "istio_requests_total");
        let is_bucket = sample.name == "istio_request_duration_milliseconds_bucket";
        if !is_total && !is_bucket {
            continue;
        }
        let named = |app: &str, workload: &str, version: &str| {
            let name = label(app).or_else(|| label(workload))?;
            Some(match label(version).filter(|version| *version != "latest") {
                Some(version) => format!("{name} {version}"),
                None => name.to_owned(),
            })
        };
        let edge = Edge {
            from: label("source_app").or_else(|| label("source_workload")).unwrap_or("outside").to_owned(),
            to: named("destination_app", "destination_workload", "destination_version")
                .unwrap_or_else(|| "?".to_owned()),
        };
        let traffic = edges.entry(edge).or_default();
        if is_total {
            traffic.requests += sample.value;
            let code: u32 = label("response_code").and_then(|code| code.parse().ok()).unwrap_or(0);
            if code == 0 || code >= 500 {
                traffic.failures += sample.value;
            }
        } else if let Some(bound) = label("le").and_then(bound) {
            *traffic.buckets.entry(bound).or_default() += sample.value;
        }
    }
}

/// The edges as rows, in order.
pub(crate) fn rows(edges: &Edges) -> Vec<EdgeRow> {
    let app = |to: &str| to.split(' ').next().unwrap_or_default().to_owned();
    let mut versions: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for edge in edges.keys() {
        versions.entry(app(&edge.to)).or_default().insert(&edge.to);
    }
    edges
        .iter()
        .map(|(edge, traffic)| EdgeRow {
            from: edge.from.clone(),
            // An only version is no news.
            to: if versions.get(&app(&edge.to)).is_some_and(|all| all.len() > 1) {
                edge.to.clone()
            } else {
                app(&edge.to)
            },
            requests: traffic.requests as u64,
            success: if traffic.requests > 0.0 { 100.0 * (1.0 - traffic.failures / traffic.requests) } else { 100.0 },
            p50_ms: traffic.quantile(0.5),
            p99_ms: traffic.quantile(0.99),
        })
        .collect()
}

impl Traffic {
    /// In milliseconds, interpolated within the bucket as Prometheus' `histogram_quantile` does.
    fn quantile(&self, quantile: f64) -> Option<f64> {
        let total = self.buckets.values().last().copied().filter(|total| *total > 0.0)?;
        let rank = quantile * total;
        let (mut below, mut lower) = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= rank {
                let Some(upper) = bound.milliseconds() else { return Some(lower) };
                let inside = count - below;
                return Some(if inside > 0.0 { lower + (upper - lower) * (rank - below) / inside } else { upper });
            }
            below = *count;
            lower = bound.milliseconds().unwrap_or(lower);
        }
        None
    }
}

impl Bound {
    fn milliseconds(self) -> Option<f64> {
        (self.0 != u64::MAX).then(|| self.0 as f64 / 1000.0)
    }
}

fn bound(text: &str) -> Option<Bound> {
    if text == "+Inf" {
        return Some(Bound(u64::MAX));
    }
    let value: f64 = text.parse().ok()?;
    (value >= 0.0).then_some(Bound((value * 1000.0) as u64))
}

/// One line of the text format; `None` for comments and what is not understood.
pub fn parse(line: &str) -> Option<Sample<'_>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ')?;
        return Some(Sample { name, labels: BTreeMap::new(), value: value.split(' ').next()?.parse().ok()? });
    };
    let mut labels = BTreeMap::new();
    let mut rest = rest;
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some(Sample { name, labels, value: after.split_whitespace().next()?.parse().ok()? });
        }
        let (key, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at + 1,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(key, value);
        rest = &after[end..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_has_success_and_quantiles() {
        let text = r#"# TYPE istio_requests_total counter
istio_requests_total{reporter="destination",source_app="productpage",destination_app="reviews",destination_version="v2",response_code="200"} 90
istio_requests_total{reporter="destination",source_app="productpage",destination_app="reviews",destination_version="v2",response_code="503"} 10
istio_requests_total{reporter="source",source_app="productpage",destination_app="reviews",response_code="200"} 100
istio_request_duration_milliseconds_bucket{reporter="destination",source_app="productpage",destination_app="reviews",destination_version="v2",le="1"} 50
istio_request_duration_milliseconds_bucket{reporter="destination",source_app="productpage",destination_app="reviews",destination_version="v2",le="5"} 100
istio_request_duration_milliseconds_bucket{reporter="destination",source_app="productpage",destination_app="reviews",destination_version="v2",le="+Inf"} 100
broken{a="b
"#;
        let mut edges = Edges::new();
        add(&mut edges, text);
        let rows = rows(&edges);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].from.as_str(), rows[0].to.as_str(), rows[0].requests), ("productpage", "reviews", 100));
        assert!((rows[0].success - 90.0).abs() < 1e-9);
        assert_eq!(rows[0].p50_ms, Some(1.0));
        assert!((rows[0].p99_ms.unwrap() - 4.92).abs() < 1e-9);
    }
}
