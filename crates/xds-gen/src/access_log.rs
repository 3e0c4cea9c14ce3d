//! Access logs (istiod `accesslog.go`, `telemetry_logging.go`).

use envoy_api::core::{
    ApiVersion, DataSource, GrpcService, JsonFormatOptions, SubstitutionFormatString, data_source::Specifier,
    grpc_service, substitution_format_string::Format,
};
use envoy_api::pb::envoy::config::accesslog::v3::{
    AccessLog, AccessLogFilter, AndFilter, ExtensionFilter, ResponseFlagFilter, access_log,
    access_log_filter::FilterSpecifier, extension_filter,
};
use envoy_api::pb::envoy::extensions::access_loggers::{
    file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
    filters::cel::v3::ExpressionFilter,
    grpc::v3::{CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig},
    open_telemetry::v3::OpenTelemetryAccessLogConfig,
};
use envoy_api::pb::envoy::extensions::formatter::req_without_query::v3::ReqWithoutQuery;
use envoy_api::pb::opentelemetry::proto::common::v1::{AnyValue, KeyValue, KeyValueList, any_value};
use envoy_api::{Any, core};
use istio_api::extension_provider::{EnvoyFileAccessLogProvider, EnvoyOpenTelemetryLogProvider, ExtensionProvider};
use istio_api::mesh_config::AccessLogEncoding;
use push_context::PushContext;
use serde_json::{Value, json};

use crate::context::Context;
use crate::names;
use crate::proto::{any, extension, json_struct};
use crate::telemetry::{Log, Side};
use crate::tls::strings;

const TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

fn default_json() -> Value {
    json!({
        "start_time": "%START_TIME%",
        "route_name": "%ROUTE_NAME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "protocol": "%PROTOCOL%",
        "response_code": "%RESPONSE_CODE%",
        "response_flags": "%RESPONSE_FLAGS%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
        "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "duration": "%DURATION%",
        "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
        "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
        "user_agent": "%REQ(USER-AGENT)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "authority": "%REQ(:AUTHORITY)%",
        "upstream_host": "%UPSTREAM_HOST%",
        "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
        "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
        "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
        "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "requested_server_name": "%REQUESTED_SERVER_NAME%",
        "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    })
}

/// Filter state that logs over gRPC carry.
const STATE: [&str; 6] = [
    "upstream_peer",
    "downstream_peer",
    "wasm.upstream_peer",
    "wasm.upstream_peer_id",
    "wasm.downstream_peer",
    "wasm.downstream_peer_id",
];

/// What an access log belongs to.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Of {
    /// HTTP requests.
    Requests,
    /// TCP connections that found their chain.
    Connections,
    /// Connections that no filter chain matches.
    Listener,
}

/// Access logs of one direction.
pub(crate) fn logs(cx: &Context<'_>, side: Side, of: Of) -> Vec<AccessLog> {
    cx.common.logs.get((side, of), || make(cx, side, of))
}

fn make(cx: &Context<'_>, side: Side, of: Of) -> Vec<AccessLog> {
    let mesh = &cx.push.mesh;
    if of == Of::Listener && mesh.disable_envoy_listener_log {
        return Vec::new();
    }
    let unmatched = (of == Of::Listener).then(|| AccessLogFilter {
        filter_specifier: Some(FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter { flags: strings(&["NR"]) })),
    });
    // Providers that cannot be reached count as little as none: then only MeshConfig's own log file does.
    let reachable = cx.telemetry.logs(side).iter().filter_map(|log| {
        let make = || provider(cx.push, &log.provider);
        Some((log, cx.common.log_providers.get(log.provider.name.clone(), make)?))
    });
    let mut reachable = reachable.peekable();
    if reachable.peek().is_none() {
        let file = (!mesh.access_log_file.is_empty()).then(|| mesh_file(cx.push, &mesh.access_log_file));
        let service = mesh.enable_envoy_access_log_service.then(|| mesh_service(of));
        return file.into_iter().chain(service).map(|log| with_filter(log, unmatched.clone())).collect();
    }
    let entry = |(log, entry): (&Log, AccessLog)| {
        let own = log.filter.as_ref().map(|expression| cel(expression));
        let mut all: Vec<AccessLogFilter> = unmatched.clone().into_iter().chain(own).collect();
        let filter = match all.len() {
            0 => None,
            1 => all.pop(),
            _ => {
                Some(AccessLogFilter { filter_specifier: Some(FilterSpecifier::AndFilter(AndFilter { filters: all })) })
            }
        };
        with_filter(entry, filter)
    };
    reachable.filter(|(log, _)| !log.disabled).map(entry).collect()
}

fn with_filter(log: AccessLog, filter: Option<AccessLogFilter>) -> AccessLog {
    AccessLog { filter, ..log }
}

fn cel(expression: &str) -> AccessLogFilter {
    let config = ExpressionFilter { expression: expression.to_owned(), ..ExpressionFilter::default() };
    AccessLogFilter {
        filter_specifier: Some(FilterSpecifier::ExtensionFilter(ExtensionFilter {
            name: "envoy.access_loggers.extension_filters.cel".to_owned(),
            config_type: Some(extension_filter::ConfigType::TypedConfig(any(&config))),
        })),
    }
}

fn entry(name: &str, config: Any) -> AccessLog {
    AccessLog { name: name.to_owned(), filter: None, config_type: Some(access_log::ConfigType::TypedConfig(config)) }
}

/// Formatter extensions that a format needs.
fn formatters(text: &str) -> Vec<core::TypedExtensionConfig> {
    if !text.contains("%REQ_WITHOUT_QUERY") {
        return Vec::new();
    }
    vec![extension("envoy.formatter.req_without_query", any(&ReqWithoutQuery {}))]
}

fn text_format(text: &str) -> String {
    match text {
        "" => TEXT.to_owned(),
        text if text.ends_with('\n') => text.to_owned(),
        text => format!("{text}\n"),
    }
}

fn file(path: &str, format: Format, formatters: Vec<core::TypedExtensionConfig>, omit_empty_values: bool) -> AccessLog {
    let is_json = matches!(format, Format::JsonFormat(_));
    let format = SubstitutionFormatString {
        format: Some(format),
        json_format_options: is_json.then(JsonFormatOptions::default),
        formatters,
        omit_empty_values,
        ..SubstitutionFormatString::default()
    };
    let config = FileAccessLog { path: path.to_owned(), access_log_format: Some(AccessLogFormat::LogFormat(format)) };
    entry("envoy.access_loggers.file", any(&config))
}

fn text_file(path: &str, text: &str, omit: bool) -> AccessLog {
    let text = text_format(text);
    let formatters = formatters(&text);
    let source = DataSource { specifier: Some(Specifier::InlineString(text)), ..DataSource::default() };
    file(path, Format::TextFormatSource(source), formatters, omit)
}

fn json_file(path: &str, labels: &Value, omit: bool) -> AccessLog {
    // As istiod: nested values are not looked into.
    let values = labels.as_object().into_iter().flat_map(|fields| fields.values());
    let needed = values.filter_map(|value| value.as_str()).map(formatters).find(|needed| !needed.is_empty());
    file(path, Format::JsonFormat(json_struct(labels)), needed.unwrap_or_default(), omit)
}

/// The log file that MeshConfig names.
fn mesh_file(push: &PushContext, path: &str) -> AccessLog {
    let format = &push.mesh.access_log_format;
    match push.mesh.access_log_encoding {
        AccessLogEncoding::Text => text_file(path, format, false),
        AccessLogEncoding::Json => {
            let own = serde_json::from_str::<Value>(format).ok().filter(Value::is_object);
            json_file(path, &own.unwrap_or_else(default_json), false)
        }
    }
}

/// The log service of the proxy's bootstrap (MeshConfig `enableEnvoyAccessLogService`).
fn mesh_service(of: Of) -> AccessLog {
    let target = grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
        cluster_name: "envoy_accesslog_service".to_owned(),
        ..Default::default()
    });
    let common = |log_name: &str| CommonGrpcAccessLogConfig {
        log_name: log_name.to_owned(),
        grpc_service: Some(GrpcService { target_specifier: Some(target), ..GrpcService::default() }),
        transport_api_version: ApiVersion::V3 as i32,
        filter_state_objects_to_log: strings(&STATE),
        ..CommonGrpcAccessLogConfig::default()
    };
    let tcp = |common| {
        let config = TcpGrpcAccessLogConfig { common_config: Some(common) };
        entry("envoy.tcp_grpc_access_log", any(&config))
    };
    match of {
        Of::Connections => tcp(common("tcp_envoy_accesslog")),
        Of::Listener => tcp(common("listener_envoy_accesslog")),
        Of::Requests => {
            let config = HttpGrpcAccessLogConfig {
                common_config: Some(common("http_envoy_accesslog")),
                ..HttpGrpcAccessLogConfig::default()
            };
            entry("envoy.access_loggers.http_grpc", any(&config))
        }
    }
}

fn provider(push: &PushContext, provider: &ExtensionProvider) -> Option<AccessLog> {
    if let Some(own) = &provider.envoy_file_access_log {
        return Some(provider_file(push, &provider.name, own));
    }
    if let Some(own) = &provider.envoy_otel_als {
        return open_telemetry(push, own);
    }
    let objects =
        |own: &[String]| if own.is_empty() { strings(&["upstream_peer", "downstream_peer"]) } else { own.to_vec() };
    let log_name = |own: &str, default: &str| if own.is_empty() { default.to_owned() } else { own.to_owned() };
    if let Some(own) = &provider.envoy_http_als {
        let config = HttpGrpcAccessLogConfig {
            common_config: Some(CommonGrpcAccessLogConfig {
                filter_state_objects_to_log: objects(&own.filter_state_objects_to_log),
                ..grpc(push, "envoyHTTPAls", (&own.service, own.port), log_name(&own.log_name, "http_envoy_accesslog"))?
            }),
            additional_request_headers_to_log: own.additional_request_headers_to_log.clone(),
            additional_response_headers_to_log: own.additional_response_headers_to_log.clone(),
            additional_response_trailers_to_log: own.additional_response_trailers_to_log.clone(),
        };
        return Some(entry("envoy.access_loggers.http_grpc", any(&config)));
    }
    let own = provider.envoy_tcp_als.as_ref()?;
    let config = TcpGrpcAccessLogConfig {
        common_config: Some(CommonGrpcAccessLogConfig {
            filter_state_objects_to_log: objects(&own.filter_state_objects_to_log),
            ..grpc(push, "envoyTCPAls", (&own.service, own.port), log_name(&own.log_name, "tcp_envoy_accesslog"))?
        }),
    };
    Some(entry("envoy.tcp_grpc_access_log", any(&config)))
}

fn provider_file(push: &PushContext, name: &str, own: &EnvoyFileAccessLogProvider) -> AccessLog {
    if name == "envoy" && own.log_format.is_none() && !own.omit_empty_values {
        return mesh_file(push, &own.path);
    }
    let path = if own.path.is_empty() { "/dev/stdout" } else { &own.path };
    let omit = own.omit_empty_values;
    let Some(format) = &own.log_format else { return text_file(path, "", omit) };
    match &format.labels {
        Some(labels) if labels.as_object().is_some_and(|l| !l.is_empty()) => json_file(path, labels, omit),
        Some(_) => json_file(path, &default_json(), omit),
        None => text_file(path, format.text.as_deref().unwrap_or_default(), omit),
    }
}

fn grpc(
    push: &PushContext,
    kind: &'static str,
    (service, port): (&str, u32),
    log_name: String,
) -> Option<CommonGrpcAccessLogConfig> {
    let (authority, cluster_name) = lookup(push, kind, service, port)?;
    let target = grpc_service::TargetSpecifier::EnvoyGrpc(grpc_service::EnvoyGrpc {
        cluster_name,
        authority,
        ..Default::default()
    });
    Some(CommonGrpcAccessLogConfig {
        log_name,
        grpc_service: Some(GrpcService { target_specifier: Some(target), ..GrpcService::default() }),
        transport_api_version: ApiVersion::V3 as i32,
        ..CommonGrpcAccessLogConfig::default()
    })
}

fn open_telemetry(push: &PushContext, own: &EnvoyOpenTelemetryLogProvider) -> Option<AccessLog> {
    let name = if own.log_name.is_empty() { "otel_envoy_accesslog" } else { &own.log_name };
    let format = own.log_format.clone().unwrap_or_default();
    let text = if format.text.is_empty() { TEXT.to_owned() } else { format.text };
    let string = |s: &str| Some(AnyValue { value: Some(any_value::Value::StringValue(s.to_owned())) });
    let labels = format.labels.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();
    let mut attributes: Vec<(&String, &Value)> = labels.iter().collect();
    attributes.sort_by_key(|(key, _)| key.as_str());
    let values: Vec<KeyValue> = attributes
        .iter()
        .map(|(key, value)| KeyValue {
            key: (*key).clone(),
            value: string(value.as_str().unwrap_or_default()),
            ..KeyValue::default()
        })
        .collect();
    let all_text = format!("{text}{}", Value::Object(labels.clone()));
    #[allow(deprecated)] // What istiod sends.
    let config = OpenTelemetryAccessLogConfig {
        common_config: Some(CommonGrpcAccessLogConfig {
            filter_state_objects_to_log: strings(&STATE),
            ..grpc(push, "envoyOtelAls", (&own.service, own.port), name.to_owned())?
        }),
        disable_builtin_labels: true,
        body: string(&text),
        attributes: (!values.is_empty()).then_some(KeyValueList { values }),
        formatters: formatters(&all_text),
        ..OpenTelemetryAccessLogConfig::default()
    };
    Some(entry("envoy.access_loggers.open_telemetry", any(&config)))
}

/// Host and cluster of a provider's service, written `host` or `namespace/host` (istiod `LookupCluster`).
///
/// Failures are counted, under istiod's name of the provider's kind.
pub(crate) fn lookup(push: &PushContext, kind: &'static str, service: &str, port: u32) -> Option<(String, String)> {
    let found = find(push, service, port);
    if found.is_none() {
        push.memo().failed(kind);
    }
    found
}

fn find(push: &PushContext, service: &str, port: u32) -> Option<(String, String)> {
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    let mut found = push
        .registry
        .services
        .iter()
        .filter(|s| *s.hostname == *host && namespace.is_none_or(|ns| *s.namespace == *ns));
    let first = found.next()?;
    if found.any(|other| other.namespace != first.namespace) {
        return None;
    }
    let port = u16::try_from(port).ok()?;
    Some((first.hostname.to_string(), names::outbound(port, "", &first.hostname)))
}
