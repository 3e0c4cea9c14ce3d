use std::time::Duration;

use envoy_api::istio;
use mesh_types::ArcStr;
use serde_json::{Map, Value};

use crate::cel::Expression;
use crate::fields;
use crate::rejected::{At, Compiled, Invalid};
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
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct PeerMetadataConfig {
    /// How the client is learnt from its request; the first that tells counts.
    pub downstream_discovery: Vec<PeerMethod>,
    /// How the server is learnt from its response.
    pub upstream_discovery: Vec<PeerMethod>,
    /// How the client is told who we are.
    pub downstream_propagation: Vec<PeerMethod>,
    /// How the server is told who we are.
    pub upstream_propagation: Vec<PeerMethod>,
    /// Labels told besides those that metrics need.
    pub additional_labels: Vec<ArcStr>,
}

/// One way to learn or tell who a peer is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PeerMethod {
    /// `x-envoy-peer-metadata` and its id.
    Headers {
        /// Services outside the mesh are told nothing.
        skip_external: bool,
    },
    /// `baggage` with OpenTelemetry's names.
    Baggage,
}

impl PeerMetadataConfig {
    pub(super) fn of(config: &Map<String, Value>) -> Compiled<Self> {
        let mut compiled = Self::default();
        for (key, value) in config {
            let list = || value.as_array().map(Vec::as_slice).unwrap_or_default();
            match key.as_str() {
                "downstream_discovery" => compiled.downstream_discovery = methods(list()).at(key)?,
                "upstream_discovery" => {
                    compiled.upstream_discovery = methods(list()).at(key)?;
                    // Envoy reads baggage of clients only.
                    compiled.upstream_discovery.retain(|method| *method != PeerMethod::Baggage);
                }
                "downstream_propagation" => compiled.downstream_propagation = methods(list()).at(key)?,
                "upstream_propagation" => compiled.upstream_propagation = methods(list()).at(key)?,
                "additional_labels" => {
                    compiled.additional_labels = list().iter().filter_map(Value::as_str).map(ArcStr::from).collect();
                }
                // What internal listeners see; a sidecar has none behind its connections.
                "shared_with_upstream" => {}
                other => return Err(Invalid::unsupported(other)),
            }
        }
        Ok(compiled)
    }
}

fn methods(list: &[Value]) -> Compiled<Vec<PeerMethod>> {
    let mut methods = Vec::with_capacity(list.len());
    for (i, method) in list.iter().enumerate() {
        for (name, config) in method.as_object().into_iter().flatten() {
            match name.as_str() {
                "istio_headers" => {
                    let skip = config.get("skip_external_clusters").and_then(Value::as_bool).unwrap_or(false);
                    methods.push(PeerMethod::Headers { skip_external: skip });
                }
                "baggage" => methods.push(PeerMethod::Baggage),
                // Needs a provider of workloads in the bootstrap, which is refused there; without one, Envoy finds nobody either.
                "workload_discovery" => {}
                other => return Err(Invalid::unsupported(format!("[{i}].{other}"))),
            }
        }
    }
    Ok(methods)
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
