//! What the proxy measures, logs and traces: Telemetry and MeshConfig (istiod `model/telemetry.go`).

use std::collections::{BTreeMap, BTreeSet};

use envoy_api::http::HttpFilter;
use envoy_api::istio::{MetricConfig, StatsConfig};
use envoy_api::listener::Filter;
use istio_api::extension_provider::ExtensionProvider;
use istio_api::telemetry::{
    AccessLogging, IstioMetric, MetricSelector, Metrics, ProviderRef, TagOperation, Tracing, WorkloadMode,
};
use istio_api::{Duration, MeshConfig};
use push_context::{Node, Profile, PushContext};

use crate::filters::http_any;
use crate::proto::{any, duration, network_filter};

const STATS: &str = "istio.stats";

/// Direction of a listener as telemetry sees it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Side {
    /// Outbound.
    Client,
    /// Inbound.
    Server,
}

impl Side {
    fn is_in(self, mode: WorkloadMode) -> bool {
        match mode {
            WorkloadMode::ClientAndServer => true,
            WorkloadMode::Client => self == Side::Client,
            WorkloadMode::Server => self == Side::Server,
        }
    }
}

/// Changes to one metric.
#[derive(Clone, Debug, Default)]
struct Override {
    disabled: Option<bool>,
    /// Tag to expression; `None` removes it.
    tags: BTreeMap<String, Option<String>>,
}

/// Metrics of one provider in one direction.
#[derive(Clone, Debug, Default)]
struct SideMetrics {
    disabled: bool,
    overrides: BTreeMap<String, Override>,
}

#[derive(Clone, Debug, Default)]
struct ProviderMetrics {
    client: SideMetrics,
    server: SideMetrics,
    interval: Option<Duration>,
}

/// One access log to write.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    pub(crate) provider: ExtensionProvider,
    pub(crate) disabled: bool,
    /// CEL expression that an entry must fulfil.
    pub(crate) filter: Option<String>,
}

/// Everything about one proxy.
#[derive(Clone, Debug, Default)]
pub(crate) struct Telemetry {
    /// Prometheus providers by name.
    metrics: Vec<ProviderMetrics>,
    client_logs: Vec<Log>,
    server_logs: Vec<Log>,
    /// Tracing sections in order, when any object or default provider says something.
    pub(crate) tracing: Vec<Tracing>,
    stock: bool,
}

fn provider_names(list: &[ProviderRef]) -> Vec<&str> {
    list.iter().map(|p| p.name.as_str()).collect()
}

fn find<'a>(mesh: &'a MeshConfig, name: &str) -> Option<&'a ExtensionProvider> {
    mesh.extension_providers.iter().find(|p| p.name.eq_ignore_ascii_case(name))
}

impl Telemetry {
    pub(crate) fn resolve(push: &PushContext, node: &Node) -> Telemetry {
        let objects = push.telemetries(&node.namespace, &node.labels);
        let mesh = &*push.mesh;
        let metrics: Vec<&Metrics> = objects.iter().flat_map(|t| &t.spec.metrics).collect();
        let logs: Vec<&[AccessLogging]> =
            objects.iter().map(|t| &t.spec.access_logging[..]).filter(|l| !l.is_empty()).collect();
        let prometheus = |(name, metrics): (String, ProviderMetrics)| {
            find(mesh, &name).is_some_and(|p| p.prometheus.is_some()).then_some(metrics)
        };
        Telemetry {
            metrics: merge_metrics(&metrics, mesh).into_iter().filter_map(prometheus).collect(),
            client_logs: merge_logs(&logs, mesh, Side::Client),
            server_logs: merge_logs(&logs, mesh, Side::Server),
            tracing: objects.iter().flat_map(|t| t.spec.tracing.iter().cloned()).collect(),
            stock: node.profile == Profile::Stock,
        }
    }

    /// Access logs for one direction; none when only MeshConfig's own log file counts.
    pub(crate) fn logs(&self, side: Side) -> &[Log] {
        if side == Side::Client { &self.client_logs } else { &self.server_logs }
    }

    fn stats(&self, side: Side) -> Vec<StatsConfig> {
        if self.stock {
            return Vec::new();
        }
        let of = |provider: &ProviderMetrics| {
            let own = if side == Side::Client { &provider.client } else { &provider.server };
            (!own.disabled).then(|| StatsConfig {
                disable_host_header_fallback: side == Side::Server,
                tcp_reporting_duration: provider.interval.map(duration),
                metrics: own.overrides.iter().map(|(name, o)| metric(name, o)).collect(),
                ..StatsConfig::default()
            })
        };
        self.metrics.iter().filter_map(of).collect()
    }

    pub(crate) fn http_filters(&self, side: Side) -> Vec<HttpFilter> {
        self.stats(side).iter().map(|config| http_any(STATS, any(config))).collect()
    }

    pub(crate) fn tcp_filters(&self, side: Side) -> Vec<Filter> {
        self.stats(side).iter().map(|config| network_filter(STATS, any(config))).collect()
    }
}

fn metric(name: &str, change: &Override) -> MetricConfig {
    let name = match name {
        "REQUEST_COUNT" => "requests_total",
        "REQUEST_DURATION" => "request_duration_milliseconds",
        "REQUEST_SIZE" => "request_bytes",
        "RESPONSE_SIZE" => "response_bytes",
        "TCP_OPENED_CONNECTIONS" => "tcp_connections_opened_total",
        "TCP_CLOSED_CONNECTIONS" => "tcp_connections_closed_total",
        "TCP_SENT_BYTES" => "tcp_sent_bytes_total",
        "TCP_RECEIVED_BYTES" => "tcp_received_bytes_total",
        "GRPC_REQUEST_MESSAGES" => "request_messages_total",
        "GRPC_RESPONSE_MESSAGES" => "response_messages_total",
        other => other,
    };
    MetricConfig {
        name: name.to_owned(),
        drop: change.disabled == Some(true),
        dimensions: change.tags.iter().filter_map(|(tag, value)| Some((tag.clone(), value.clone()?))).collect(),
        tags_to_remove: change.tags.iter().filter(|(_, value)| value.is_none()).map(|(tag, _)| tag.clone()).collect(),
        ..MetricConfig::default()
    }
}

const ALL: [IstioMetric; 10] = [
    IstioMetric::RequestCount,
    IstioMetric::RequestDuration,
    IstioMetric::RequestSize,
    IstioMetric::ResponseSize,
    IstioMetric::TcpOpenedConnections,
    IstioMetric::TcpClosedConnections,
    IstioMetric::TcpSentBytes,
    IstioMetric::TcpReceivedBytes,
    IstioMetric::GrpcRequestMessages,
    IstioMetric::GrpcResponseMessages,
];

fn metric_names(selector: Option<&MetricSelector>) -> Vec<String> {
    let all = || ALL.iter().map(|m| m.as_str().to_owned()).collect();
    match selector {
        Some(MetricSelector { custom_metric: Some(name), .. }) => vec![name.clone()],
        Some(MetricSelector { metric: Some(metric), .. }) if *metric != IstioMetric::AllMetrics => {
            vec![metric.as_str().to_owned()]
        }
        _ => all(),
    }
}

fn is_all(selector: Option<&MetricSelector>) -> bool {
    selector.is_none_or(|s| s.custom_metric.is_none() && matches!(s.metric, None | Some(IstioMetric::AllMetrics)))
}

/// istiod `mergeMetrics`.
fn merge_metrics(sections: &[&Metrics], mesh: &MeshConfig) -> BTreeMap<String, ProviderMetrics> {
    let defaults: Vec<&str> = mesh.default_providers.iter().flat_map(|d| &d.metrics).map(String::as_str).collect();
    let mut out: BTreeMap<String, ProviderMetrics> = BTreeMap::new();
    if sections.is_empty() {
        out.extend(defaults.iter().map(|name| ((*name).to_owned(), ProviderMetrics::default())));
        return out;
    }
    let in_scope =
        sections.iter().rev().map(|m| provider_names(&m.providers)).find(|n| !n.is_empty()).unwrap_or(defaults.clone());
    let mut parent = defaults;
    for section in sections {
        let own = provider_names(&section.providers);
        if !own.is_empty() {
            parent = own;
        }
        for provider in parent.iter().filter(|p| in_scope.contains(p)) {
            let merged = out.entry((*provider).to_owned()).or_default();
            if section.reporting_interval.is_some() {
                merged.interval = section.reporting_interval;
            }
            for change in &section.overrides {
                let selector = change.r#match.as_ref();
                let mode = selector.map(|s| s.mode).unwrap_or_default();
                for (side, metrics) in [(Side::Client, &mut merged.client), (Side::Server, &mut merged.server)] {
                    if !side.is_in(mode) {
                        continue;
                    }
                    if is_all(selector) && change.disabled == Some(true) {
                        metrics.disabled = true;
                        continue;
                    }
                    metrics.disabled = false;
                    for name in metric_names(selector) {
                        let entry = metrics.overrides.entry(name).or_default();
                        if change.disabled.is_some() {
                            entry.disabled = change.disabled;
                        }
                        for (tag, tag_change) in &change.tag_overrides {
                            let value = match tag_change.operation {
                                TagOperation::Upsert => Some(tag_change.value.clone()),
                                TagOperation::Remove => None,
                            };
                            entry.tags.insert(tag.clone(), value);
                        }
                    }
                }
            }
        }
    }
    out
}

fn log_mode(section: &AccessLogging) -> WorkloadMode {
    section.r#match.as_ref().map(|m| m.mode).unwrap_or_default()
}

/// istiod `mergeLogs`: each object replaces the providers of the wider ones; sections without providers hold
/// for those of the section before.
fn merge_logs(objects: &[&[AccessLogging]], mesh: &MeshConfig, side: Side) -> Vec<Log> {
    let defaults: Vec<&str> =
        mesh.default_providers.iter().flat_map(|d| &d.access_logging).map(String::as_str).collect();
    let mut chosen: BTreeMap<&str, (bool, Option<String>)> = BTreeMap::new();
    if objects.is_empty() {
        chosen.extend(defaults.iter().map(|name| (*name, (false, None))));
    } else {
        let mut filters: BTreeMap<&str, Option<String>> = BTreeMap::new();
        let mut in_scope: BTreeSet<&str> = defaults.iter().copied().collect();
        for object in objects {
            let mut names = BTreeSet::new();
            for section in object.iter().filter(|s| side.is_in(log_mode(s))) {
                for name in provider_names(&section.providers) {
                    names.insert(name);
                    filters.insert(name, section.filter.as_ref().map(|f| f.expression.clone()));
                }
            }
            if !names.is_empty() {
                in_scope = names;
            }
        }
        let mut parent = defaults;
        for section in objects.iter().flat_map(|o| o.iter()) {
            let own = provider_names(&section.providers);
            if !own.is_empty() {
                parent = own;
            }
            for name in parent.iter().filter(|n| in_scope.contains(*n) && side.is_in(log_mode(section))) {
                let disabled = section.disabled == Some(true);
                let filter = if disabled { None } else { filters.get(name).cloned().flatten() };
                chosen.insert(name, (disabled, filter));
            }
        }
    }
    let log = |(name, (disabled, filter)): (&str, (bool, Option<String>))| {
        let provider = find(mesh, name)?;
        let writes = provider.envoy_file_access_log.is_some()
            || provider.envoy_http_als.is_some()
            || provider.envoy_tcp_als.is_some()
            || provider.envoy_otel_als.is_some();
        writes.then(|| Log { provider: provider.clone(), disabled, filter })
    };
    chosen.into_iter().filter_map(log).collect()
}
