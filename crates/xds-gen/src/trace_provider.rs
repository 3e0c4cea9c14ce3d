//! Where spans are sent: the tracing providers of MeshConfig.

use envoy_api::Any;
use envoy_api::core::{
    GrpcService, HeaderValue, HeaderValueOption, HttpService, HttpUri, TypedExtensionConfig, grpc_service,
    header_value_option::HeaderAppendAction, http_uri::HttpUpstreamType,
};
use envoy_api::pb::envoy::config::trace::v3::{
    DatadogConfig, OpenTelemetryConfig, SkyWalkingConfig, ZipkinConfig,
    tracing::{Http, http::ConfigType},
    zipkin_config::{CollectorEndpointVersion, TraceContextOption as EnvoyOption},
};
use envoy_api::pb::envoy::extensions::tracers::opentelemetry::{
    resource_detectors::v3::{DynatraceResourceDetectorConfig, EnvironmentResourceDetectorConfig},
    samplers::v3::DynatraceSamplerConfig,
};
use istio_api::Duration;
use istio_api::extension_provider::{
    DynatraceSampler, ExtensionProvider, HttpHeader, OpenTelemetryTracingProvider, ServiceAttributeEnrichment,
    TraceContextOption,
};

use crate::access_log::lookup;
use crate::context::Context;
use crate::proto::{any, bool_value, duration, extension};

/// A provider as Envoy needs it.
pub(crate) struct Exporter {
    pub(crate) http: Http,
    pub(crate) max_tag_length: u32,
    /// Spans of requests that go on are the proxy's own.
    pub(crate) starts_child_span: bool,
    /// The provider decides which spans it takes.
    pub(crate) samples_itself: bool,
}

fn grpc_service(cluster_name: String, authority: String) -> GrpcService {
    let target = grpc_service::EnvoyGrpc { cluster_name, authority, ..Default::default() };
    GrpcService { target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(target)), ..GrpcService::default() }
}

fn headers(list: &[HttpHeader]) -> Vec<HeaderValueOption> {
    let option = |h: &HttpHeader| HeaderValueOption {
        header: Some(HeaderValue {
            key: h.name.clone(),
            value: h.value.clone().unwrap_or_default(),
            ..HeaderValue::default()
        }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..HeaderValueOption::default()
    };
    list.iter().map(option).collect()
}

fn http_service(
    host: &str,
    path: &str,
    cluster: String,
    timeout: Option<Duration>,
    list: &[HttpHeader],
) -> HttpService {
    HttpService {
        http_uri: Some(HttpUri {
            uri: format!("http://{host}{path}"),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
            timeout: Some(duration(timeout.unwrap_or(Duration::from_secs(5)))),
        }),
        request_headers_to_add: headers(list),
        ..HttpService::default()
    }
}

/// Nothing for providers that do not trace or whose service is unknown.
pub(crate) fn build(cx: &Context<'_>, provider: &ExtensionProvider) -> Option<Exporter> {
    let make = |name: &str, config, max_tag_length| Exporter {
        http: Http { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) },
        max_tag_length,
        starts_child_span: false,
        samples_itself: false,
    };
    if let Some(own) = &provider.skywalking {
        let (host, cluster) = lookup(cx.push, "skywalking", &own.service, own.port)?;
        let config = SkyWalkingConfig { grpc_service: Some(grpc_service(cluster, host)), ..Default::default() };
        return Some(Exporter { starts_child_span: true, ..make("envoy.tracers.skywalking", any(&config), 0) });
    }
    if let Some(own) = &provider.zipkin {
        let (host, cluster) = lookup(cx.push, "zipkin", &own.service, own.port)?;
        let path = if own.path.is_empty() { "/api/v2/spans" } else { &own.path };
        let option = match own.trace_context_option {
            TraceContextOption::UseB3 => EnvoyOption::UseB3,
            TraceContextOption::UseB3WithW3cPropagation => EnvoyOption::UseB3WithW3cPropagation,
        };
        let mut config = ZipkinConfig {
            collector_endpoint_version: CollectorEndpointVersion::HttpJson as i32,
            trace_id_128bit: !own.enable_64bit_trace_id,
            shared_span_context: bool_value(false),
            // Older proxies refuse what they do not know.
            trace_context_option: if cx.node.is_at_least((1, 28, 0)) { option } else { EnvoyOption::default() } as i32,
            ..ZipkinConfig::default()
        };
        if cx.node.is_at_least((1, 29, 0)) {
            config.collector_service = Some(http_service(&host, path, cluster, own.timeout, &own.headers));
        } else {
            path.clone_into(&mut config.collector_endpoint);
            (config.collector_cluster, config.collector_hostname) = (cluster, host);
        }
        return Some(make("envoy.tracers.zipkin", any(&config), own.max_tag_length));
    }
    if let Some(own) = &provider.datadog {
        let (host, collector_cluster) = lookup(cx.push, "datadog", &own.service, own.port)?;
        let config = DatadogConfig {
            collector_cluster,
            collector_hostname: host,
            service_name: cx.node.cluster.clone(),
            ..DatadogConfig::default()
        };
        return Some(make("envoy.tracers.datadog", any(&config), own.max_tag_length));
    }
    let own = provider.opentelemetry.as_ref()?;
    let (host, cluster) = lookup(cx.push, "opentelemetry", &own.service, own.port)?;
    let semantic = own.service_attribute_enrichment == ServiceAttributeEnrichment::OtelSemanticConventions;
    let detects = own.resource_detectors.clone().unwrap_or_default();
    let mut config = OpenTelemetryConfig {
        service_name: if semantic { semantic_name(cx) } else { cx.node.cluster.clone() },
        ..OpenTelemetryConfig::default()
    };
    if detects.environment.is_some() {
        config.resource_detectors.push(detector("environment", any(&EnvironmentResourceDetectorConfig {})));
    }
    if detects.dynatrace.is_some() {
        config.resource_detectors.push(detector("dynatrace", any(&DynatraceResourceDetectorConfig {})));
    }
    if semantic && detects.environment.is_none() {
        config.resource_detectors.push(detector("environment", any(&EnvironmentResourceDetectorConfig {})));
    }
    if let Some(sampler) = &own.dynatrace_sampler {
        config.sampler = Some(dynatrace(cx, own, sampler, &host, &cluster)?);
    }
    if let Some(http) = &own.http {
        config.http_service = Some(otel_service(&host, &http.path, cluster, http.timeout, &http.headers));
    } else {
        let grpc = own.grpc.clone().unwrap_or_default();
        let metadata = |h: &HttpHeader| HeaderValue {
            key: h.name.clone(),
            value: h.value.clone().unwrap_or_default(),
            ..HeaderValue::default()
        };
        config.grpc_service = Some(GrpcService {
            timeout: grpc.timeout.map(duration),
            initial_metadata: grpc.initial_metadata.iter().map(metadata).collect(),
            ..grpc_service(cluster, host)
        });
    }
    let made = make("envoy.tracers.opentelemetry", any(&config), own.max_tag_length);
    Some(Exporter { samples_itself: own.dynatrace_sampler.is_some(), ..made })
}

fn detector(name: &str, config: Any) -> TypedExtensionConfig {
    extension(&format!("envoy.tracers.opentelemetry.resource_detectors.{name}"), config)
}

/// As istiod: the host and the path without a scheme, joined by one slash.
fn otel_service(
    host: &str,
    path: &str,
    cluster: String,
    timeout: Option<Duration>,
    list: &[HttpHeader],
) -> HttpService {
    HttpService {
        http_uri: Some(HttpUri {
            uri: if path.is_empty() { host.to_owned() } else { format!("{host}/{}", path.trim_start_matches('/')) },
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
            timeout: timeout.map(duration),
        }),
        request_headers_to_add: headers(list),
        ..HttpService::default()
    }
}

/// Dynatrace says which spans it wants, over the exporter's own service if no other is named.
fn dynatrace(
    cx: &Context<'_>,
    own: &OpenTelemetryTracingProvider,
    sampler: &DynatraceSampler,
    host: &str,
    cluster: &str,
) -> Option<TypedExtensionConfig> {
    let service = match &sampler.http_service {
        None => {
            let http = own.http.as_ref()?;
            otel_service(host, "api/v2/samplingConfiguration", cluster.to_owned(), http.timeout, &http.headers)
        }
        Some(api) => {
            let (host, cluster) = lookup(cx.push, "dynatrace", &api.service, api.port)?;
            let http = api.http.clone().unwrap_or_default();
            otel_service(&host, &http.path, cluster, http.timeout, &http.headers)
        }
    };
    let config = DynatraceSamplerConfig {
        tenant: sampler.tenant.clone(),
        cluster_id: sampler.cluster_id,
        root_spans_per_minute: sampler.root_spans_per_minute,
        http_service: Some(service),
    };
    Some(extension("envoy.tracers.opentelemetry.samplers.dynatrace", any(&config)))
}

/// `service.name` by OpenTelemetry's conventions for Kubernetes.
fn semantic_name(cx: &Context<'_>) -> String {
    let label = |key: &str| cx.node.labels.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let name = label("app.kubernetes.io/instance")
        .or_else(|| label("app.kubernetes.io/name"))
        .or_else(|| cx.node.meta("WORKLOAD_NAME"))
        .unwrap_or(&cx.node.name);
    name.to_owned()
}
