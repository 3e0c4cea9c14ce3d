//! The ProxyConfig inside MeshConfig (`defaultConfig`) and in the pod annotation `proxy.istio.io/config`.

use std::collections::BTreeMap;

use crate::destination_rule::ClientTlsSettings;
use crate::destination_rule::TcpKeepalive;
use crate::proxy_config::ProxyImage;
use crate::wire::Duration;
use crate::wire::{enumeration, message};
use crate::workload_group::ReadinessProbe;

message! {
    /// `mesh.v1alpha1.Tracing`.
    Tracing {
        zipkin: Option<Zipkin>,
        lightstep: Option<Lightstep>,
        datadog: Option<Datadog>,
        stackdriver: Option<Stackdriver>,
        open_census_agent "openCensusAgent": Option<OpenCensusAgent>,
        custom_tags "customTags": BTreeMap<String, CustomTag>,
        max_path_tag_length "maxPathTagLength": u32,
        sampling: f64,
        tls_settings "tlsSettings": Option<ClientTlsSettings>,
        enable_istio_tags "enableIstioTags": Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Zipkin`.
    Zipkin {
        address: String,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Lightstep`.
    Lightstep {
        address: String,
        access_token "accessToken": String,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Datadog`.
    Datadog {
        address: String,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Stackdriver`.
    Stackdriver {
        debug: bool,
        max_number_of_attributes "maxNumberOfAttributes": Option<i64>,
        max_number_of_annotations "maxNumberOfAnnotations": Option<i64>,
        max_number_of_message_events "maxNumberOfMessageEvents": Option<i64>,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.OpenCensusAgent`.
    OpenCensusAgent {
        address: String,
        context: Vec<TraceContext>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.Tracing.OpenCensusAgent.TraceContext`.
    TraceContext {
        Unspecified = 0 "UNSPECIFIED",
        W3cTraceContext = 1 "W3C_TRACE_CONTEXT",
        GrpcBin = 2 "GRPC_BIN",
        CloudTraceContext = 3 "CLOUD_TRACE_CONTEXT",
        B3 = 4 "B3",
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.CustomTag`.
    CustomTag {
        literal: Option<Literal>,
        environment: Option<Environment>,
        header: Option<RequestHeader>,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Literal`.
    Literal {
        value: String,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.Environment`.
    Environment {
        name: String,
        default_value "defaultValue": String,
    }
}

message! {
    /// `mesh.v1alpha1.Tracing.RequestHeader`.
    RequestHeader {
        name: String,
        default_value "defaultValue": String,
    }
}

message! {
    /// `mesh.v1alpha1.SDS`.
    Sds {
        enabled: bool,
        k8s_sa_jwt_path "k8sSaJwtPath": String,
    }
}

message! {
    /// `mesh.v1alpha1.Topology`.
    Topology {
        num_trusted_proxies "numTrustedProxies": u32,
        forward_client_cert_details "forwardClientCertDetails": ForwardClientCertDetails,
        proxy_protocol "proxyProtocol": Option<ProxyProtocolConfiguration>,
    }
}

message! {
    /// `mesh.v1alpha1.Topology.ProxyProtocolConfiguration`.
    ProxyProtocolConfiguration {
    }
}

message! {
    /// `mesh.v1alpha1.PrivateKeyProvider`.
    PrivateKeyProvider {
        cryptomb: Option<CryptoMb>,
        qat: Option<Qat>,
    }
}

message! {
    /// `mesh.v1alpha1.PrivateKeyProvider.CryptoMb`.
    CryptoMb {
        poll_delay "pollDelay": Option<Duration>,
        fallback: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.PrivateKeyProvider.QAT`.
    Qat {
        poll_delay "pollDelay": Option<Duration>,
        fallback: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig`.
    ProxyConfig {
        config_path "configPath": String,
        binary_path "binaryPath": String,
        service_cluster "serviceCluster": Option<String>,
        tracing_service_name "tracingServiceName": Option<TracingServiceName>,
        drain_duration "drainDuration": Option<Duration>,
        discovery_address "discoveryAddress": String,
        discovery_refresh_delay "discoveryRefreshDelay": Option<Duration>,
        zipkin_address "zipkinAddress": String,
        statsd_udp_address "statsdUdpAddress": String,
        envoy_metrics_service_address "envoyMetricsServiceAddress": String,
        proxy_admin_port "proxyAdminPort": i32,
        availability_zone "availabilityZone": String,
        control_plane_auth_policy "controlPlaneAuthPolicy": AuthenticationPolicy,
        custom_config_file "customConfigFile": String,
        stat_name_length "statNameLength": i32,
        concurrency: Option<i32>,
        proxy_bootstrap_template_path "proxyBootstrapTemplatePath": String,
        interception_mode "interceptionMode": InboundInterceptionMode,
        tracing: Option<Tracing>,
        sds: Option<Sds>,
        envoy_access_log_service "envoyAccessLogService": Option<RemoteService>,
        envoy_metrics_service "envoyMetricsService": Option<RemoteService>,
        proxy_metadata "proxyMetadata": BTreeMap<String, String>,
        runtime_values "runtimeValues": BTreeMap<String, String>,
        status_port "statusPort": i32,
        extra_stat_tags "extraStatTags": Vec<String>,
        gateway_topology "gatewayTopology": Option<Topology>,
        termination_drain_duration "terminationDrainDuration": Option<Duration>,
        mesh_id "meshId": String,
        readiness_probe "readinessProbe": Option<ReadinessProbe>,
        proxy_stats_matcher "proxyStatsMatcher": Option<ProxyStatsMatcher>,
        hold_application_until_proxy_starts "holdApplicationUntilProxyStarts": Option<bool>,
        ca_certificates_pem "caCertificatesPem": Vec<String>,
        image: Option<ProxyImage>,
        private_key_provider "privateKeyProvider": Option<PrivateKeyProvider>,
        proxy_headers "proxyHeaders": Option<ProxyHeaders>,
        file_flush_interval "fileFlushInterval": Option<Duration>,
        file_flush_min_size_kb "fileFlushMinSizeKb": u32,
        stats_compression "statsCompression": Option<bool>,
        connection_settings "connectionSettings": Option<ConnectionSettings>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.TracingServiceName`.
    TracingServiceName {
        AppLabelAndNamespace = 0 "APP_LABEL_AND_NAMESPACE",
        CanonicalNameOnly = 1 "CANONICAL_NAME_ONLY",
        CanonicalNameAndNamespace = 2 "CANONICAL_NAME_AND_NAMESPACE",
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.InboundInterceptionMode`.
    InboundInterceptionMode {
        Redirect = 0 "REDIRECT",
        Tproxy = 1 "TPROXY",
        None = 2 "NONE",
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyStatsMatcher`.
    ProxyStatsMatcher {
        inclusion_prefixes "inclusionPrefixes": Vec<String>,
        inclusion_suffixes "inclusionSuffixes": Vec<String>,
        inclusion_regexps "inclusionRegexps": Vec<String>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders`.
    ProxyHeaders {
        forwarded_client_cert "forwardedClientCert": ForwardClientCertDetails,
        set_current_client_cert_details "setCurrentClientCertDetails": Option<SetCurrentClientCertDetails>,
        request_id "requestId": Option<RequestId>,
        server: Option<Server>,
        attempt_count "attemptCount": Option<AttemptCount>,
        envoy_debug_headers "envoyDebugHeaders": Option<EnvoyDebugHeaders>,
        metadata_exchange_headers "metadataExchangeHeaders": Option<MetadataExchangeHeaders>,
        preserve_http1_header_case "preserveHttp1HeaderCase": Option<bool>,
        x_forwarded_host "xForwardedHost": Option<XForwardedHost>,
        x_forwarded_port "xForwardedPort": Option<XForwardedPort>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.MetadataExchangeMode`.
    MetadataExchangeMode {
        Undefined = 0 "UNDEFINED",
        InMesh = 1 "IN_MESH",
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.Server`.
    Server {
        disabled: Option<bool>,
        value: String,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.RequestId`.
    RequestId {
        disabled: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.AttemptCount`.
    AttemptCount {
        disabled: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.XForwardedHost`.
    XForwardedHost {
        enabled: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.XForwardedPort`.
    XForwardedPort {
        enabled: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.EnvoyDebugHeaders`.
    EnvoyDebugHeaders {
        disabled: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.MetadataExchangeHeaders`.
    MetadataExchangeHeaders {
        mode: MetadataExchangeMode,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ProxyHeaders.SetCurrentClientCertDetails`.
    SetCurrentClientCertDetails {
        subject: Option<bool>,
        cert: Option<bool>,
        chain: Option<bool>,
        dns: Option<bool>,
        uri: Option<bool>,
    }
}

message! {
    /// `mesh.v1alpha1.ProxyConfig.ConnectionSettings`.
    ConnectionSettings {
        profile: Profile,
        listener_per_connection_buffer_limit_bytes "listenerPerConnectionBufferLimitBytes": Option<i32>,
        cluster_per_connection_buffer_limit_bytes "clusterPerConnectionBufferLimitBytes": Option<i32>,
        http_idle_timeout "httpIdleTimeout": Option<Duration>,
        http_max_connection_duration "httpMaxConnectionDuration": Option<Duration>,
        http_drain_timeout "httpDrainTimeout": Option<Duration>,
        http_request_timeout "httpRequestTimeout": Option<Duration>,
        http_request_headers_timeout "httpRequestHeadersTimeout": Option<Duration>,
        http_stream_idle_timeout "httpStreamIdleTimeout": Option<Duration>,
        http_max_stream_duration "httpMaxStreamDuration": Option<Duration>,
        http_max_concurrent_streams "httpMaxConcurrentStreams": Option<i32>,
        http2_initial_stream_window_size "http2InitialStreamWindowSize": Option<i32>,
        http2_initial_connection_window_size "http2InitialConnectionWindowSize": Option<i32>,
        http_headers_with_underscores_action "httpHeadersWithUnderscoresAction": HeadersWithUnderscoresAction,
        http_merge_slashes "httpMergeSlashes": Option<bool>,
        http_path_with_escaped_slashes_action "httpPathWithEscapedSlashesAction": PathWithEscapedSlashesAction,
        listener_connection_limit "listenerConnectionLimit": Option<i32>,
        global_downstream_connection_limit "globalDownstreamConnectionLimit": Option<i32>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.ConnectionSettings.Profile`.
    Profile {
        Sidecar = 0 "SIDECAR",
        Edge = 1 "EDGE",
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.ConnectionSettings.HeadersWithUnderscoresAction`.
    HeadersWithUnderscoresAction {
        HeadersWithUnderscoresUnspecified = 0 "HEADERS_WITH_UNDERSCORES_UNSPECIFIED",
        HeadersWithUnderscoresAllow = 1 "HEADERS_WITH_UNDERSCORES_ALLOW",
        HeadersWithUnderscoresRejectRequest = 2 "HEADERS_WITH_UNDERSCORES_REJECT_REQUEST",
        HeadersWithUnderscoresDropHeader = 3 "HEADERS_WITH_UNDERSCORES_DROP_HEADER",
    }
}

enumeration! {
    /// `mesh.v1alpha1.ProxyConfig.ConnectionSettings.PathWithEscapedSlashesAction`.
    PathWithEscapedSlashesAction {
        PathWithEscapedSlashesUnspecified = 0 "PATH_WITH_ESCAPED_SLASHES_UNSPECIFIED",
        KeepUnchanged = 1 "KEEP_UNCHANGED",
        RejectRequest = 2 "REJECT_REQUEST",
        UnescapeAndRedirect = 3 "UNESCAPE_AND_REDIRECT",
        UnescapeAndForward = 4 "UNESCAPE_AND_FORWARD",
    }
}

message! {
    /// `mesh.v1alpha1.RemoteService`.
    RemoteService {
        address: String,
        tls_settings "tlsSettings": Option<ClientTlsSettings>,
        tcp_keepalive "tcpKeepalive": Option<TcpKeepalive>,
    }
}

enumeration! {
    /// `mesh.v1alpha1.AuthenticationPolicy`.
    AuthenticationPolicy {
        None = 0 "NONE",
        MutualTls = 1 "MUTUAL_TLS",
        Inherit = 1000 "INHERIT",
    }
}

enumeration! {
    /// `mesh.v1alpha1.ForwardClientCertDetails`.
    ForwardClientCertDetails {
        Undefined = 0 "UNDEFINED",
        Sanitize = 1 "SANITIZE",
        ForwardOnly = 2 "FORWARD_ONLY",
        AppendForward = 3 "APPEND_FORWARD",
        SanitizeSet = 4 "SANITIZE_SET",
        AlwaysForwardOnly = 5 "ALWAYS_FORWARD_ONLY",
    }
}
