//! External services that policies and telemetry refer to by name.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::wire::Duration;
use crate::wire::{enumeration, message};

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider`.
    ExtensionProvider {
        name: String,
        envoy_ext_authz_http "envoyExtAuthzHttp": Option<EnvoyExternalAuthorizationHttpProvider>,
        envoy_ext_authz_grpc "envoyExtAuthzGrpc": Option<EnvoyExternalAuthorizationGrpcProvider>,
        zipkin: Option<ZipkinTracingProvider>,
        lightstep: Option<LightstepTracingProvider>,
        datadog: Option<DatadogTracingProvider>,
        stackdriver: Option<StackdriverProvider>,
        opencensus: Option<OpenCensusAgentTracingProvider>,
        skywalking: Option<SkyWalkingTracingProvider>,
        opentelemetry: Option<OpenTelemetryTracingProvider>,
        prometheus: Option<PrometheusMetricsProvider>,
        envoy_file_access_log "envoyFileAccessLog": Option<EnvoyFileAccessLogProvider>,
        envoy_http_als "envoyHttpAls": Option<EnvoyHttpGrpcV3LogProvider>,
        envoy_tcp_als "envoyTcpAls": Option<EnvoyTcpGrpcV3LogProvider>,
        envoy_otel_als "envoyOtelAls": Option<EnvoyOpenTelemetryLogProvider>,
        sds: Option<SdsProvider>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ServiceAttributeEnrichment`.
    ServiceAttributeEnrichment {
        IstioCanonical = 0 "ISTIO_CANONICAL",
        OtelSemanticConventions = 1 "OTEL_SEMANTIC_CONVENTIONS",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyExternalAuthorizationRequestBody`.
    EnvoyExternalAuthorizationRequestBody {
        max_request_bytes "maxRequestBytes": u32,
        allow_partial_message "allowPartialMessage": bool,
        pack_as_bytes "packAsBytes": bool,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyExternalAuthorizationHttpProvider`.
    EnvoyExternalAuthorizationHttpProvider {
        service: String,
        port: u32,
        timeout: Option<Duration>,
        path_prefix "pathPrefix": String,
        fail_open "failOpen": bool,
        clear_route_cache "clearRouteCache": bool,
        status_on_error "statusOnError": String,
        include_headers_in_check "includeHeadersInCheck": Vec<String>,
        include_request_headers_in_check "includeRequestHeadersInCheck": Vec<String>,
        include_additional_headers_in_check "includeAdditionalHeadersInCheck": BTreeMap<String, String>,
        include_request_body_in_check "includeRequestBodyInCheck": Option<EnvoyExternalAuthorizationRequestBody>,
        headers_to_upstream_on_allow "headersToUpstreamOnAllow": Vec<String>,
        headers_to_downstream_on_deny "headersToDownstreamOnDeny": Vec<String>,
        headers_to_downstream_on_allow "headersToDownstreamOnAllow": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyExternalAuthorizationGrpcProvider`.
    EnvoyExternalAuthorizationGrpcProvider {
        service: String,
        port: u32,
        timeout: Option<Duration>,
        fail_open "failOpen": bool,
        clear_route_cache "clearRouteCache": bool,
        status_on_error "statusOnError": String,
        include_request_body_in_check "includeRequestBodyInCheck": Option<EnvoyExternalAuthorizationRequestBody>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ZipkinTracingProvider`.
    ZipkinTracingProvider {
        service: String,
        port: u32,
        max_tag_length "maxTagLength": u32,
        enable_64bit_trace_id "enable64bitTraceId": bool,
        path: String,
        trace_context_option "traceContextOption": TraceContextOption,
        timeout: Option<Duration>,
        headers: Vec<HttpHeader>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ZipkinTracingProvider.TraceContextOption`.
    TraceContextOption {
        UseB3 = 0 "USE_B3",
        UseB3WithW3cPropagation = 1 "USE_B3_WITH_W3C_PROPAGATION",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.LightstepTracingProvider`.
    LightstepTracingProvider {
        service: String,
        port: u32,
        access_token "accessToken": String,
        max_tag_length "maxTagLength": u32,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.DatadogTracingProvider`.
    DatadogTracingProvider {
        service: String,
        port: u32,
        max_tag_length "maxTagLength": u32,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.SkyWalkingTracingProvider`.
    SkyWalkingTracingProvider {
        service: String,
        port: u32,
        access_token "accessToken": String,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.StackdriverProvider`.
    StackdriverProvider {
        debug: bool,
        max_number_of_attributes "maxNumberOfAttributes": Option<i64>,
        max_number_of_annotations "maxNumberOfAnnotations": Option<i64>,
        max_number_of_message_events "maxNumberOfMessageEvents": Option<i64>,
        max_tag_length "maxTagLength": u32,
        logging: Option<Logging>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.StackdriverProvider.Logging`.
    Logging {
        labels: BTreeMap<String, String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.OpenCensusAgentTracingProvider`.
    OpenCensusAgentTracingProvider {
        service: String,
        port: u32,
        context: Vec<TraceContext>,
        max_tag_length "maxTagLength": u32,
    }
}

enumeration! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.OpenCensusAgentTracingProvider.TraceContext`.
    TraceContext {
        Unspecified = 0 "UNSPECIFIED",
        W3cTraceContext = 1 "W3C_TRACE_CONTEXT",
        GrpcBin = 2 "GRPC_BIN",
        CloudTraceContext = 3 "CLOUD_TRACE_CONTEXT",
        B3 = 4 "B3",
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.PrometheusMetricsProvider`.
    PrometheusMetricsProvider {
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyFileAccessLogProvider`.
    EnvoyFileAccessLogProvider {
        path: String,
        log_format "logFormat": Option<FileLogFormat>,
        omit_empty_values "omitEmptyValues": bool,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyFileAccessLogProvider.LogFormat`.
    FileLogFormat {
        text: Option<String>,
        labels: Option<Value>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyHttpGrpcV3LogProvider`.
    EnvoyHttpGrpcV3LogProvider {
        service: String,
        port: u32,
        log_name "logName": String,
        filter_state_objects_to_log "filterStateObjectsToLog": Vec<String>,
        additional_request_headers_to_log "additionalRequestHeadersToLog": Vec<String>,
        additional_response_headers_to_log "additionalResponseHeadersToLog": Vec<String>,
        additional_response_trailers_to_log "additionalResponseTrailersToLog": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyTcpGrpcV3LogProvider`.
    EnvoyTcpGrpcV3LogProvider {
        service: String,
        port: u32,
        log_name "logName": String,
        filter_state_objects_to_log "filterStateObjectsToLog": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyOpenTelemetryLogProvider`.
    EnvoyOpenTelemetryLogProvider {
        service: String,
        port: u32,
        log_name "logName": String,
        log_format "logFormat": Option<OpenTelemetryLogFormat>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.EnvoyOpenTelemetryLogProvider.LogFormat`.
    OpenTelemetryLogFormat {
        text: String,
        labels: Option<Value>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.OpenTelemetryTracingProvider`.
    OpenTelemetryTracingProvider {
        service: String,
        port: u32,
        max_tag_length "maxTagLength": u32,
        http: Option<HttpService>,
        grpc: Option<GrpcService>,
        resource_detectors "resourceDetectors": Option<ResourceDetectors>,
        service_attribute_enrichment "serviceAttributeEnrichment": ServiceAttributeEnrichment,
        dynatrace_sampler "dynatraceSampler": Option<DynatraceSampler>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.OpenTelemetryTracingProvider.DynatraceSampler`.
    DynatraceSampler {
        tenant: String,
        cluster_id "clusterId": i32,
        root_spans_per_minute "rootSpansPerMinute": u32,
        http_service "httpService": Option<DynatraceApi>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.OpenTelemetryTracingProvider.DynatraceSampler.DynatraceApi`.
    DynatraceApi {
        service: String,
        port: u32,
        http: Option<HttpService>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.SDSProvider`.
    SdsProvider {
        name: String,
        service: String,
        port: u32,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.HttpService`.
    HttpService {
        path: String,
        timeout: Option<Duration>,
        headers: Vec<HttpHeader>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.HttpHeader`.
    HttpHeader {
        name: String,
        value: Option<String>,
        env_name "envName": Option<String>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ResourceDetectors`.
    ResourceDetectors {
        environment: Option<EnvironmentResourceDetector>,
        dynatrace: Option<DynatraceResourceDetector>,
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ResourceDetectors.EnvironmentResourceDetector`.
    EnvironmentResourceDetector {
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.ResourceDetectors.DynatraceResourceDetector`.
    DynatraceResourceDetector {
    }
}

message! {
    /// `mesh.v1alpha1.MeshConfig.ExtensionProvider.GrpcService`.
    GrpcService {
        timeout: Option<Duration>,
        initial_metadata "initialMetadata": Vec<HttpHeader>,
    }
}
