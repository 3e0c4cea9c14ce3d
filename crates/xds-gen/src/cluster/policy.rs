//! Traffic policies (istiod `cluster_traffic_policy.go`).

use envoy_api::cluster::{
    CircuitBreakers, Cluster, OutlierDetection as EnvoyOutlier, UpstreamConnectionOptions,
    circuit_breakers::{Thresholds, thresholds},
    cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy},
};
use envoy_api::core::{
    Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as Common, KeepaliveSettings, TcpKeepalive,
    http1_protocol_options::{HeaderKeyFormat, header_key_format::HeaderFormat},
};
use envoy_api::pb::envoy::config::common::matcher::v3::{HttpHeadersMatch, MatchPredicate, match_predicate};
use envoy_api::pb::envoy::extensions::http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig;
use envoy_api::pb::envoy::extensions::upstreams::http::v3::{
    HttpProtocolOptions,
    http_protocol_options::{
        OutlierDetection as HttpOutlier, UpstreamProtocolOptions, UseDownstreamHttpConfig,
        explicit_http_config::ProtocolConfig,
    },
};
use envoy_api::route::{HeaderMatcher, header_matcher::HeaderMatchSpecifier};
use istio_api::DestinationRule;
use istio_api::destination_rule::{
    ConnectionPoolSettings, H2UpgradePolicy, OutlierDetection, PortTrafficPolicy, RetryBudget, Subset, TrafficPolicy,
};
use istio_api::mesh_config::H2UpgradePolicy as MeshUpgrade;
use push_context::Config;
use registry::{Port, Service};

use super::{Made, explicit, load_balancer, note_rule, upstream_tls};
use crate::context::Context;
use crate::names;
use crate::notes::Notes;
use crate::proto::{any, duration, exact, extension, percent, u32_value};

/// Key of the HTTP options among a cluster's extension options.
pub(super) const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A cluster while policies are applied; HTTP options are packed at the end.
pub(super) struct Draft {
    pub(super) cluster: Cluster,
    pub(super) http: Option<HttpProtocolOptions>,
    pub(super) notes: Notes,
    /// Fields that are bytes already.
    pub(super) fields: Vec<(u32, Vec<u8>)>,
    /// A dynamic forward proxy: names are known only by the request.
    pub(super) is_dynamic: bool,
}

/// Whether HTTP/1 header names keep their case (ProxyConfig `preserveHttp1HeaderCase`).
pub(super) fn preserves_case(cx: &Context<'_>) -> bool {
    crate::listener::preserves_case(cx)
}

pub(crate) fn preserve_case() -> Http1ProtocolOptions {
    let config = any(&PreserveCaseFormatterConfig::default());
    Http1ProtocolOptions {
        header_key_format: Some(HeaderKeyFormat {
            header_format: Some(HeaderFormat::StatefulFormatter(extension("preserve_case", config))),
        }),
        ..Http1ProtocolOptions::default()
    }
}

/// Field numbers of `Cluster`.
const METADATA: u32 = 25;
const FILTERS: u32 = 40;
pub(super) const SOCKET_MATCHES: u32 = 43;

impl From<Cluster> for Draft {
    fn from(cluster: Cluster) -> Draft {
        Draft { cluster, http: None, notes: Notes::default(), fields: Vec::new(), is_dynamic: false }
    }
}

impl Draft {
    /// As [`Draft::new`] for a cluster that tells telemetry of its service.
    pub(super) fn of_service(cluster: Cluster, port: &Port, cx: &Context<'_>, service: &Service) -> Draft {
        let mut draft = Draft::new(cluster, port, cx);
        if cx.push.settings.telemetry_label {
            draft.notes.service(service);
        }
        draft
    }

    /// Starts with the protocol that the port speaks (istiod `setUpstreamProtocol`).
    pub(super) fn new(cluster: Cluster, port: &Port, cx: &Context<'_>) -> Draft {
        let mut draft = Draft::from(cluster);
        if port.protocol.is_http2() {
            draft.use_http2();
            return draft;
        }
        let sniffed = port.protocol.is_unsupported();
        if (port.protocol.is_http() || sniffed) && preserves_case(cx) {
            draft.options().upstream_protocol_options =
                Some(explicit(ProtocolConfig::HttpProtocolOptions(preserve_case())));
        }
        if sniffed {
            draft.use_downstream_protocol();
        }
        draft
    }

    pub(super) fn options(&mut self) -> &mut HttpProtocolOptions {
        self.http.get_or_insert_default()
    }

    fn use_http2(&mut self) {
        let options = self.options();
        if options.upstream_protocol_options.is_none() {
            options.upstream_protocol_options =
                Some(explicit(ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())));
        }
    }

    fn use_downstream_protocol(&mut self) {
        let options = self.options();
        let http1 = match options.upstream_protocol_options.take() {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)) => match config.protocol_config {
                Some(ProtocolConfig::HttpProtocolOptions(http1)) => http1,
                _ => Http1ProtocolOptions::default(),
            },
            _ => Http1ProtocolOptions::default(),
        };
        options.upstream_protocol_options =
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: Some(http1),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..Default::default()
            }));
    }

    fn http2(&mut self) -> Option<&mut Http2ProtocolOptions> {
        match &mut self.http.as_mut()?.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)) => match &mut config.protocol_config {
                Some(ProtocolConfig::Http2ProtocolOptions(http2)) => Some(http2),
                _ => None,
            },
            _ => None,
        }
    }

    /// The upstream's HTTP version is the client's.
    pub(super) fn follows_client(&self) -> bool {
        let options = self.http.as_ref().and_then(|o| o.upstream_protocol_options.as_ref());
        matches!(options, Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)))
    }

    pub(super) fn is_http2(&mut self) -> bool {
        self.http2().is_some()
    }

    pub(super) fn kind(&self) -> Option<DiscoveryType> {
        match self.cluster.cluster_discovery_type {
            Some(ClusterDiscoveryType::Type(kind)) => DiscoveryType::try_from(kind).ok(),
            _ => None,
        }
    }

    /// The finished cluster.
    pub(super) fn finish(mut self) -> Made {
        if let Some(mut options) = self.http.take() {
            if options.upstream_protocol_options.is_none() {
                options.upstream_protocol_options =
                    Some(explicit(ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())));
            }
            self.cluster.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), any(&options));
        }
        self.fields.extend(self.notes.into_field(METADATA));
        Made::new(self.cluster, self.fields)
    }
}

fn of_port(p: &PortTrafficPolicy) -> TrafficPolicy {
    TrafficPolicy {
        load_balancer: p.load_balancer.clone(),
        connection_pool: p.connection_pool.clone(),
        outlier_detection: p.outlier_detection.clone(),
        tls: p.tls.clone(),
        ..TrafficPolicy::default()
    }
}

/// The policy for one port: the port's own alone if it has one. The flag says so.
fn for_port(policy: Option<&TrafficPolicy>, port: u16) -> (Option<TrafficPolicy>, bool) {
    let Some(policy) = policy else { return (None, false) };
    let own = policy.port_level_settings.iter().find(|p| p.port.as_ref().is_some_and(|n| n.number == u32::from(port)));
    match own {
        Some(own) => (Some(of_port(own)), true),
        None => (Some(policy.clone()), false),
    }
}

/// A subset's policy over its rule's (istiod `MergeSubsetTrafficPolicy`).
pub(crate) fn merged(rule: Option<&TrafficPolicy>, subset: Option<&TrafficPolicy>, port: u16) -> Option<TrafficPolicy> {
    let (base, _) = for_port(rule, port);
    let (over, by_port) = for_port(subset, port);
    let (Some(base), Some(over)) = (&base, over) else { return base.or(for_port(subset, port).0) };
    let mut out = TrafficPolicy { port_level_settings: Vec::new(), ..base.clone() };
    macro_rules! replace {
        ($($field:ident)*) => { $( if over.$field.is_some() || by_port { out.$field = over.$field; } )* };
    }
    macro_rules! keep {
        ($($field:ident)*) => { $( if over.$field.is_some() { out.$field = over.$field; } )* };
    }
    replace!(connection_pool outlier_detection load_balancer tls);
    keep!(tunnel proxy_protocol retry_budget);
    Some(out)
}

fn with_mesh_default(cx: &Context<'_>, policy: Option<TrafficPolicy>) -> Option<TrafficPolicy> {
    let Some(default) = &cx.push.mesh.default_traffic_policy else { return policy };
    if default.connection_pool.is_none() && default.outlier_detection.is_none() {
        return policy;
    }
    let mut policy = policy.unwrap_or_default();
    if policy.connection_pool.is_none() {
        policy.connection_pool.clone_from(&default.connection_pool);
    }
    if policy.outlier_detection.is_none() {
        policy.outlier_detection.clone_from(&default.outlier_detection);
    }
    Some(policy)
}

/// Who a policy is applied for.
pub(super) struct Target<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a Port,
    /// What clients ask for by SNI.
    pub(super) sni: String,
    pub(super) policy: TrafficPolicy,
    /// The policy that decides about the server's mode: the rule's or the subset's, unmerged.
    pub(super) unmerged: Option<&'a TrafficPolicy>,
    pub(super) rule: Option<&'a DestinationRule>,
    pub(super) subset: &'a str,
}

pub(super) fn apply_rule(
    cx: &Context<'_>,
    draft: &mut Draft,
    service: &Service,
    port: &Port,
    rule: Option<&std::sync::Arc<Config<DestinationRule>>>,
) {
    let whole = rule.and_then(|r| r.spec.traffic_policy.as_ref());
    let policy = with_mesh_default(cx, for_port(whole, port.port).0).unwrap_or_default();
    let sni = if draft.is_dynamic { String::new() } else { names::sni(port.port, "", &service.hostname) };
    let target = Target { service, port, sni, policy, unmerged: whole, rule: rule.map(|r| &r.spec), subset: "" };
    apply_outbound(cx, draft, &target);
    if service.mesh_external {
        draft.notes.yes("external");
    }
    if let Some(rule) = rule {
        note_rule(&mut draft.notes, rule, Some(&target.policy));
    }
}

pub(super) fn apply_subset(
    cx: &Context<'_>,
    draft: &mut Draft,
    service: &Service,
    port: &Port,
    rule: &Config<DestinationRule>,
    subset: &Subset,
) {
    let whole = rule.spec.traffic_policy.as_ref();
    let base = with_mesh_default(cx, for_port(whole, port.port).0);
    let policy = merged(base.as_ref(), subset.traffic_policy.as_ref(), port.port).unwrap_or_default();
    let target = Target {
        service,
        port,
        sni: names::sni(port.port, &subset.name, &service.hostname),
        policy,
        unmerged: subset.traffic_policy.as_ref(),
        rule: Some(&rule.spec),
        subset: &subset.name,
    };
    apply_outbound(cx, draft, &target);
    note_rule(&mut draft.notes, rule, Some(&target.policy));
    draft.notes.text("subset", &subset.name);
}

fn apply_outbound(cx: &Context<'_>, draft: &mut Draft, target: &Target<'_>) {
    let policy = &target.policy;
    let none = ConnectionPoolSettings::default();
    let pool = policy.connection_pool.as_ref().unwrap_or(&none);
    if wants_http2(cx, target.port, pool) {
        draft.use_http2();
    }
    connection_pool(cx, draft, pool, policy.retry_budget.as_ref());
    if let Some(outlier) = &policy.outlier_detection {
        outlier_detection(&mut draft.cluster, outlier, target.service.forces_unhealthy(&cx.push.settings));
        if !outlier.outlier_detection_http_error_codes.is_empty() {
            error_codes(draft, &outlier.outlier_detection_http_error_codes);
        }
    }
    load_balancer::apply(cx, draft, target);
    upstream_tls::apply(cx, draft, target);
    if draft.kind() == Some(DiscoveryType::OriginalDst) {
        draft.cluster.lb_policy = LbPolicy::ClusterProvided as i32;
    }
    if draft.kind() == Some(DiscoveryType::Eds) {
        draft.cluster.eds_cluster_config = Some(super::eds(&draft.cluster.name));
    }
    if cx.exchanges_over_tcp() {
        draft.fields.push((FILTERS, super::metadata_exchange_bytes(cx).to_vec()));
    }
}

/// The policy of a cluster that leads to the proxy's own application: pools only.
pub(super) fn apply_inbound(cx: &Context<'_>, draft: &mut Draft, policy: Option<TrafficPolicy>, port: u16) {
    let mut policy = with_mesh_default(cx, policy).unwrap_or_default();
    if let Some(pool) = cx.scope.inbound_connection_pool(port) {
        policy.connection_pool = Some(pool.clone());
    }
    connection_pool(cx, draft, &policy.connection_pool.unwrap_or_default(), policy.retry_budget.as_ref());
    if draft.kind() == Some(DiscoveryType::OriginalDst) {
        draft.cluster.lb_policy = LbPolicy::ClusterProvided as i32;
    }
}

/// A DestinationRule's policy for one of the proxy's own ports.
pub(super) fn inbound_policy(rule: &DestinationRule, port: u16) -> Option<TrafficPolicy> {
    for_port(rule.traffic_policy.as_ref(), port).0
}

fn wants_http2(cx: &Context<'_>, port: &Port, pool: &ConnectionPoolSettings) -> bool {
    if let Some(http) = &pool.http {
        match http.h2_upgrade_policy {
            _ if http.use_client_protocol => return false,
            H2UpgradePolicy::Upgrade => return true,
            H2UpgradePolicy::DoNotUpgrade => return false,
            H2UpgradePolicy::Default => {}
        }
    }
    port.protocol.is_http() && cx.push.mesh.h2_upgrade_policy == MeshUpgrade::Upgrade
}

pub(super) fn connection_pool(
    cx: &Context<'_>,
    draft: &mut Draft,
    pool: &ConnectionPoolSettings,
    budget: Option<&RetryBudget>,
) {
    // Positive settings count; everything else is "no limit".
    let limit = |value: i32| u32_value(u32::try_from(value).ok().filter(|v| *v > 0).unwrap_or(u32::MAX));
    let http = pool.http.clone().unwrap_or_default();
    let tcp = pool.tcp.clone().unwrap_or_default();
    let thresholds = Thresholds {
        max_connections: limit(tcp.max_connections),
        max_pending_requests: limit(http.http1_max_pending_requests),
        max_requests: limit(http.http2_max_requests),
        max_retries: limit(http.max_retries),
        retry_budget: budget.map(|b| thresholds::RetryBudget {
            budget_percent: percent(b.percent.unwrap_or(20.0)),
            budget_interval: b.budget_interval.map(duration),
            min_retry_concurrency: u32_value(if b.min_retry_concurrency > 0 { b.min_retry_concurrency } else { 3 }),
        }),
        track_remaining: !cx.push.settings.no_remaining,
        ..Thresholds::default()
    };
    let cluster = &mut draft.cluster;
    cluster.connect_timeout = tcp.connect_timeout.or(cx.push.mesh.connect_timeout).map(duration);
    cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() });
    for keepalive in [&cx.push.mesh.tcp_keepalive, &tcp.tcp_keepalive].into_iter().flatten() {
        let options: &mut UpstreamConnectionOptions = cluster.upstream_connection_options.get_or_insert_default();
        let out: &mut TcpKeepalive = options.tcp_keepalive.get_or_insert_default();
        if keepalive.probes > 0 {
            out.keepalive_probes = u32_value(keepalive.probes);
        }
        let whole = |d: istio_api::Duration| u32_value(u32::try_from(d.as_secs()).unwrap_or_default());
        if let Some(time) = keepalive.time {
            out.keepalive_time = whole(time);
        }
        if let Some(interval) = keepalive.interval {
            out.keepalive_interval = whole(interval);
        }
    }
    let positive = |value: i32| u32::try_from(value).ok().filter(|v| *v > 0);
    let idle = http.idle_timeout.or(tcp.idle_timeout);
    let max_requests = positive(http.max_requests_per_connection);
    let streams = positive(http.max_concurrent_streams);
    let keep_alive = http.http2_keep_alive.clone();
    if idle.is_some()
        || tcp.max_connection_duration.is_some()
        || max_requests.is_some()
        || streams.is_some()
        || keep_alive.is_some()
    {
        let common: &mut Common = draft.options().common_http_protocol_options.get_or_insert_default();
        common.idle_timeout = idle.map(duration);
        common.max_requests_per_connection = max_requests.and_then(u32_value);
        common.max_connection_duration = tcp.max_connection_duration.map(duration);
        if let Some(http2) = draft.http2() {
            if let Some(streams) = streams {
                http2.max_concurrent_streams = u32_value(streams);
            }
            if let Some(keep_alive) = keep_alive {
                http2.connection_keepalive = Some(KeepaliveSettings {
                    interval: keep_alive.interval.map(duration),
                    timeout: keep_alive.timeout.map(duration),
                    ..KeepaliveSettings::default()
                });
            }
        }
    }
    if http.use_client_protocol {
        draft.use_downstream_protocol();
    }
}

/// With `all_sent` endpoints that are not ready are among the cluster's, and must not be used in a panic.
fn outlier_detection(cluster: &mut Cluster, outlier: &OutlierDetection, all_sent: bool) {
    let enforce = |value: u32| u32_value(if value > 0 { 100 } else { 0 });
    let mut out = EnvoyOutlier {
        enforcing_success_rate: u32_value(0),
        interval: outlier.interval.map(duration),
        base_ejection_time: outlier.base_ejection_time.map(duration),
        ..EnvoyOutlier::default()
    };
    if let Some(errors) = outlier.consecutive_5xx_errors {
        out.consecutive_5xx = u32_value(errors);
        out.enforcing_consecutive_5xx = enforce(errors);
    }
    if let Some(errors) = outlier.consecutive_gateway_errors {
        out.consecutive_gateway_failure = u32_value(errors);
        out.enforcing_consecutive_gateway_failure = enforce(errors);
    }
    if let Some(max) = u32::try_from(outlier.max_ejection_percent).ok().filter(|v| *v > 0) {
        out.max_ejection_percent = u32_value(max);
    }
    if outlier.split_external_local_origin_errors {
        out.split_external_local_origin_errors = true;
        if let Some(failures) = outlier.consecutive_local_origin_failures.filter(|v| *v > 0) {
            out.consecutive_local_origin_failure = u32_value(failures);
            out.enforcing_consecutive_local_origin_failure = u32_value(100);
        }
        out.enforcing_local_origin_success_rate = u32_value(0);
    }
    cluster.outlier_detection = Some(out);
    if outlier.min_health_percent >= 0 {
        cluster.common_lb_config.get_or_insert_default().healthy_panic_threshold =
            percent(if all_sent { 0.0 } else { f64::from(outlier.min_health_percent) });
    }
}

/// Responses with these codes count as errors.
fn error_codes(draft: &mut Draft, codes: &[u32]) {
    let rule = |code: &u32| MatchPredicate {
        rule: Some(match_predicate::Rule::HttpResponseHeadersMatch(HttpHeadersMatch {
            headers: vec![HeaderMatcher {
                name: ":status".to_owned(),
                header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(exact(&code.to_string()))),
                ..HeaderMatcher::default()
            }],
        })),
    };
    let mut rules: Vec<MatchPredicate> = codes.iter().map(rule).collect();
    let predicate = if rules.len() == 1 {
        rules.remove(0)
    } else {
        MatchPredicate { rule: Some(match_predicate::Rule::OrMatch(match_predicate::MatchSet { rules })) }
    };
    draft.options().outlier_detection = Some(HttpOutlier { error_matcher: Some(predicate) });
}
