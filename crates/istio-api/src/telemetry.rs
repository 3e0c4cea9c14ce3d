//! Metrics, traces and access logs of proxies.

use std::collections::BTreeMap;

use crate::selector::PolicyTargetReference;
use crate::selector::WorkloadSelector;
use crate::wire::Duration;
use crate::wire::{enumeration, message};

message! {
    /// `telemetry.v1alpha1.Telemetry`.
    Telemetry {
        selector: Option<WorkloadSelector>,
        target_ref "targetRef": Option<PolicyTargetReference>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        tracing: Vec<Tracing>,
        metrics: Vec<Metrics>,
        access_logging "accessLogging": Vec<AccessLogging>,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing`.
    Tracing {
        r#match: Option<TracingSelector>,
        providers: Vec<ProviderRef>,
        random_sampling_percentage "randomSamplingPercentage": Option<f64>,
        disable_span_reporting "disableSpanReporting": Option<bool>,
        custom_tags "customTags": BTreeMap<String, CustomTag>,
        use_request_id_for_trace_sampling "useRequestIdForTraceSampling": Option<bool>,
        enable_istio_tags "enableIstioTags": Option<bool>,
        disable_context_propagation "disableContextPropagation": Option<bool>,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.TracingSelector`.
    TracingSelector {
        mode: WorkloadMode,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.CustomTag`.
    CustomTag {
        literal: Option<Literal>,
        environment: Option<Environment>,
        header: Option<RequestHeader>,
        formatter: Option<Formatter>,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.Literal`.
    Literal {
        value: String,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.Environment`.
    Environment {
        name: String,
        default_value "defaultValue": String,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.RequestHeader`.
    RequestHeader {
        name: String,
        default_value "defaultValue": String,
    }
}

message! {
    /// `telemetry.v1alpha1.Tracing.Formatter`.
    Formatter {
        value: String,
    }
}

message! {
    /// `telemetry.v1alpha1.ProviderRef`.
    ProviderRef {
        name: String,
    }
}

message! {
    /// `telemetry.v1alpha1.Metrics`.
    Metrics {
        providers: Vec<ProviderRef>,
        overrides: Vec<MetricsOverrides>,
        reporting_interval "reportingInterval": Option<Duration>,
    }
}

message! {
    /// `telemetry.v1alpha1.MetricSelector`.
    MetricSelector {
        metric: Option<IstioMetric>,
        custom_metric "customMetric": Option<String>,
        mode: WorkloadMode,
    }
}

enumeration! {
    /// `telemetry.v1alpha1.MetricSelector.IstioMetric`.
    IstioMetric {
        AllMetrics = 0 "ALL_METRICS",
        RequestCount = 1 "REQUEST_COUNT",
        RequestDuration = 2 "REQUEST_DURATION",
        RequestSize = 3 "REQUEST_SIZE",
        ResponseSize = 4 "RESPONSE_SIZE",
        TcpOpenedConnections = 5 "TCP_OPENED_CONNECTIONS",
        TcpClosedConnections = 6 "TCP_CLOSED_CONNECTIONS",
        TcpSentBytes = 7 "TCP_SENT_BYTES",
        TcpReceivedBytes = 8 "TCP_RECEIVED_BYTES",
        GrpcRequestMessages = 9 "GRPC_REQUEST_MESSAGES",
        GrpcResponseMessages = 10 "GRPC_RESPONSE_MESSAGES",
    }
}

message! {
    /// `telemetry.v1alpha1.MetricsOverrides`.
    MetricsOverrides {
        r#match: Option<MetricSelector>,
        disabled: Option<bool>,
        tag_overrides "tagOverrides": BTreeMap<String, TagOverride>,
    }
}

message! {
    /// `telemetry.v1alpha1.MetricsOverrides.TagOverride`.
    TagOverride {
        operation: TagOperation,
        value: String,
    }
}

enumeration! {
    /// `telemetry.v1alpha1.MetricsOverrides.TagOverride.Operation`.
    TagOperation {
        Upsert = 0 "UPSERT",
        Remove = 1 "REMOVE",
    }
}

message! {
    /// `telemetry.v1alpha1.AccessLogging`.
    AccessLogging {
        r#match: Option<LogSelector>,
        providers: Vec<ProviderRef>,
        disabled: Option<bool>,
        filter: Option<Filter>,
    }
}

message! {
    /// `telemetry.v1alpha1.AccessLogging.LogSelector`.
    LogSelector {
        mode: WorkloadMode,
    }
}

message! {
    /// `telemetry.v1alpha1.AccessLogging.Filter`.
    Filter {
        expression: String,
    }
}

enumeration! {
    /// `telemetry.v1alpha1.WorkloadMode`.
    WorkloadMode {
        ClientAndServer = 0 "CLIENT_AND_SERVER",
        Client = 1 "CLIENT",
        Server = 2 "SERVER",
    }
}
