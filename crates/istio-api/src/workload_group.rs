//! The template of the WorkloadEntries that machines register themselves with.

use std::collections::BTreeMap;

use crate::wire::message;
use crate::workload_entry::WorkloadEntry;

message! {
    /// `networking.v1alpha3.WorkloadGroup`.
    WorkloadGroup {
        metadata: Option<ObjectMeta>,
        template: Option<WorkloadEntry>,
        probe: Option<ReadinessProbe>,
    }
}

message! {
    /// `networking.v1alpha3.WorkloadGroup.ObjectMeta`.
    ObjectMeta {
        labels: BTreeMap<String, String>,
        annotations: BTreeMap<String, String>,
    }
}

message! {
    /// `networking.v1alpha3.ReadinessProbe`.
    ReadinessProbe {
        initial_delay_seconds "initialDelaySeconds": i32,
        timeout_seconds "timeoutSeconds": i32,
        period_seconds "periodSeconds": i32,
        success_threshold "successThreshold": i32,
        failure_threshold "failureThreshold": i32,
        http_get "httpGet": Option<HttpHealthCheckConfig>,
        tcp_socket "tcpSocket": Option<TcpHealthCheckConfig>,
        exec: Option<ExecHealthCheckConfig>,
        grpc: Option<GrpcHealthCheckConfig>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPHealthCheckConfig`.
    HttpHealthCheckConfig {
        path: String,
        port: u32,
        host: String,
        scheme: String,
        http_headers "httpHeaders": Vec<HttpHeader>,
    }
}

message! {
    /// `networking.v1alpha3.GrpcHealthCheckConfig`.
    GrpcHealthCheckConfig {
        port: u32,
        service: String,
    }
}

message! {
    /// `networking.v1alpha3.HTTPHeader`.
    HttpHeader {
        name: String,
        value: String,
    }
}

message! {
    /// `networking.v1alpha3.TCPHealthCheckConfig`.
    TcpHealthCheckConfig {
        host: String,
        port: u32,
    }
}

message! {
    /// `networking.v1alpha3.ExecHealthCheckConfig`.
    ExecHealthCheckConfig {
        command: Vec<String>,
    }
}
