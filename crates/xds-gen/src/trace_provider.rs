//! Where spans are sent: the tracing providers of MeshConfig.

use envoy_api::any;
use envoy_api::core::{
    GrpcService, HeaderValue, HeaderValueOption, HttpService, HttpUri, grpc_service,
    header_value_option::HeaderAppendAction, http_uri::HttpUpstreamType,
};
use envoy_api::pb::envoy::config::trace::v3::{
    DatadogConfig, OpenTelemetryConfig, ZipkinConfig,
    tracing::{Http, http::ConfigType},
    zipkin_config::{CollectorEndpointVersion, TraceContextOption as EnvoyOption},
};
use istio_api::Duration;
use istio_api::extension_provider::{ExtensionProvider, HttpHeader, TraceContextOption};

use crate::access_log::lookup;
use crate::context::Context;
use crate::proto::{bool_value, duration};

/// A provider as Envoy needs it.
pub(crate) struct Exporter {
    pub(crate) http: Http,
    pub(crate) max_tag_length: u32,
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
///
/// DIFFERS: Skywalking is not supported; its spans need a library that our proxy lacks.
pub(crate) fn build(cx: &Context<'_>, provider: &ExtensionProvider) -> Option<Exporter> {
    let make = |name: &str, config, max_tag_length| Exporter {
        http: Http { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) },
        max_tag_length,
    };
    if let Some(own) = &provider.zipkin {
        let (host, cluster) = lookup(cx.push, &own.service, own.port)?;
        let path = if own.path.is_empty() { "/api/v2/spans" } else { &own.path };
        let option = match own.trace_context_option {
            TraceContextOption::UseB3 => EnvoyOption::UseB3,
            TraceContextOption::UseB3WithW3cPropagation => EnvoyOption::UseB3WithW3cPropagation,
        };
        let config = ZipkinConfig {
            collector_endpoint_version: CollectorEndpointVersion::HttpJson as i32,
            trace_id_128bit: !own.enable_64bit_trace_id,
            shared_span_context: bool_value(false),
            trace_context_option: option as i32,
            collector_service: Some(http_service(&host, path, cluster, own.timeout, &own.headers)),
            ..ZipkinConfig::default()
        };
        return Some(make("envoy.tracers.zipkin", any(&config), own.max_tag_length));
    }
    if let Some(own) = &provider.datadog {
        let (host, collector_cluster) = lookup(cx.push, &own.service, own.port)?;
        let config = DatadogConfig {
            collector_cluster,
            collector_hostname: host,
            service_name: service_name(cx),
            ..DatadogConfig::default()
        };
        return Some(make("envoy.tracers.datadog", any(&config), own.max_tag_length));
    }
    let own = provider.opentelemetry.as_ref()?;
    let (host, cluster) = lookup(cx.push, &own.service, own.port)?;
    let mut config = OpenTelemetryConfig { service_name: service_name(cx), ..OpenTelemetryConfig::default() };
    if let Some(http) = &own.http {
        config.http_service = Some(http_service(&host, &http.path, cluster, http.timeout, &http.headers));
    } else {
        let target = grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
            cluster_name: cluster,
            authority: host,
            ..Default::default()
        });
        let grpc = own.grpc.clone().unwrap_or_default();
        let metadata = |h: &HttpHeader| HeaderValue {
            key: h.name.clone(),
            value: h.value.clone().unwrap_or_default(),
            ..HeaderValue::default()
        };
        config.grpc_service = Some(GrpcService {
            target_specifier: Some(target),
            timeout: grpc.timeout.map(duration),
            initial_metadata: grpc.initial_metadata.iter().map(metadata).collect(),
            ..GrpcService::default()
        });
    }
    Some(make("envoy.tracers.opentelemetry", any(&config), own.max_tag_length))
}

/// The node's cluster, which the agent sets to `APP.NAMESPACE`.
fn service_name(cx: &Context<'_>) -> String {
    let app = cx.node.labels.get("app").map_or(&*cx.node.name, String::as_str);
    format!("{app}.{}", cx.node.namespace)
}
