use std::time::Duration;

use envoy_api::istio;
use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::cel::Expression;
use crate::fields;
use crate::rejected::{At, Compiled};
use crate::stream_info::HttpProtocol;

/// `istio.alpn`: which application protocols to offer upstream, by the protocol of the request.
#[derive(Clone, Debug, Default)]
pub struct AlpnOverride {
    http10: Vec<Vec<u8>>,
    http11: Vec<Vec<u8>>,
    http2: Vec<Vec<u8>>,
}

impl AlpnOverride {
    pub(super) fn compile(config: &istio::AlpnConfig) -> Compiled<Self> {
        let mut alpn = Self::default();
        for entry in &config.alpn_override {
            let list = match entry.upstream_protocol {
                0 => &mut alpn.http10,
                1 => &mut alpn.http11,
                _ => &mut alpn.http2,
            };
            *list = entry.alpn_override.iter().map(|p| p.as_bytes().to_vec()).collect();
        }
        Ok(alpn)
    }

    /// What to offer for a request that goes upstream in this protocol; `None`: the cluster's own list.
    pub fn protocols(&self, protocol: HttpProtocol) -> Option<&[Vec<u8>]> {
        let list = match protocol {
            HttpProtocol::Http10 => &self.http10,
            HttpProtocol::Http11 => &self.http11,
            HttpProtocol::Http2 => &self.http2,
        };
        (!list.is_empty()).then_some(list.as_slice())
    }
}

/// Exchange of workload metadata by headers (`io.istio.http.peer_metadata.Config`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PeerMetadataConfig {
    /// Learn the client from its request's headers.
    pub downstream_discovery: bool,
    /// Learn the server from its response's headers.
    pub upstream_discovery: bool,
    /// Tell the client who we are.
    pub downstream_propagation: bool,
    /// Tell the server who we are.
    pub upstream_propagation: bool,
}

impl PeerMetadataConfig {
    pub(super) fn of(config: &Map<String, Value>) -> Self {
        let by_headers = |key: &str| {
            let methods = config.get(key).and_then(Value::as_array);
            methods.is_some_and(|all| all.iter().any(|m| m.get("istio_headers").is_some()))
        };
        Self {
            downstream_discovery: by_headers("downstream_discovery"),
            upstream_discovery: by_headers("upstream_discovery"),
            downstream_propagation: by_headers("downstream_propagation"),
            upstream_propagation: by_headers("upstream_propagation"),
        }
    }
}

/// Who reports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reporter {
    /// By the listener's direction.
    ByDirection,
    /// Always the server (waypoints).
    ServerGateway,
}

/// `istio.stats`: changes to Istio's standard metrics.
#[derive(Clone, Debug)]
pub struct IstioStats {
    /// In order; later ones are applied over earlier ones.
    pub overrides: Vec<MetricOverride>,
    /// The Host header does not tell the destination service.
    pub disable_host_header_fallback: bool,
    /// How often open TCP connections are reported.
    pub tcp_reporting: Duration,
    /// Who reports.
    pub reporter: Reporter,
}

/// A change to a metric.
#[derive(Clone, Debug)]
pub struct MetricOverride {
    /// Short name (`requests_total`); empty: all.
    pub metric: ArcStr,
    /// Tags with their new values.
    pub dimensions: Vec<(ArcStr, Expression)>,
    /// Tags left out.
    pub removed: Vec<ArcStr>,
    /// The metric is not reported.
    pub drop: bool,
    /// Only where this holds.
    pub condition: Option<Expression>,
}

impl IstioStats {
    pub(crate) fn compile(config: &istio::StatsConfig) -> Compiled<Self> {
        let mut overrides = Vec::with_capacity(config.metrics.len());
        for (i, metric) in config.metrics.iter().enumerate() {
            let dimensions = metric
                .dimensions
                .iter()
                .map(|(tag, source)| Ok((tag.as_str().into(), Expression::compile(source).at_key("dimensions", tag)?)))
                .collect::<Compiled<_>>()
                .at_index("metrics", i)?;
            let condition = match metric.r#match.as_str() {
                "" => None,
                source => Some(Expression::compile(source).at("match").at_index("metrics", i)?),
            };
            overrides.push(MetricOverride {
                metric: metric.name.as_str().into(),
                dimensions,
                removed: metric.tags_to_remove.iter().map(|t| t.as_str().into()).collect(),
                drop: metric.drop,
                condition,
            });
        }
        Ok(Self {
            overrides,
            disable_host_header_fallback: config.disable_host_header_fallback,
            tcp_reporting: fields::duration("tcp_reporting_duration", config.tcp_reporting_duration.as_ref())?
                .filter(|d| !d.is_zero())
                .unwrap_or(Duration::from_secs(5)),
            reporter: if config.reporter == 1 { Reporter::ServerGateway } else { Reporter::ByDirection },
        })
    }

    /// Whether a metric is reported at all.
    pub fn reports(&self, metric: &str) -> bool {
        !self.overrides.iter().any(|o| o.drop && (o.metric.is_empty() || *o.metric == *metric))
    }
}
