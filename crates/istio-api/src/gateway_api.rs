//! Routes of the Gateway API whose parents are services: how meshes are configured without Istio's own kinds.

use crate::wire::Duration;
use crate::wire::{enumeration, message};

message! {
    /// `gateway.networking.k8s.io` `HTTPRouteSpec`.
    HttpRoute {
        parent_refs "parentRefs": Vec<ParentReference>,
        hostnames: Vec<String>,
        rules: Vec<HttpRule>,
    }
}

message! {
    /// `gateway.networking.k8s.io` `GRPCRouteSpec`.
    GrpcRoute {
        parent_refs "parentRefs": Vec<ParentReference>,
        hostnames: Vec<String>,
        rules: Vec<GrpcRule>,
    }
}

message! {
    /// `ParentReference`: what a route is for.
    ParentReference {
        group: Option<String>,
        kind: Option<String>,
        namespace: Option<String>,
        name: String,
        section_name "sectionName": String,
        port: Option<u32>,
    }
}

message! {
    /// `HTTPRouteRule`.
    HttpRule {
        name: Option<String>,
        matches: Vec<HttpMatch>,
        filters: Vec<Filter>,
        backend_refs "backendRefs": Vec<BackendRef>,
        timeouts: Option<Timeouts>,
        retry: Option<Retry>,
    }
}

message! {
    /// `GRPCRouteRule`.
    GrpcRule {
        name: Option<String>,
        matches: Vec<GrpcMatch>,
        filters: Vec<Filter>,
        backend_refs "backendRefs": Vec<BackendRef>,
    }
}

message! {
    /// `HTTPRouteMatch`.
    HttpMatch {
        path: Option<PathMatch>,
        headers: Vec<NamedMatch>,
        query_params "queryParams": Vec<NamedMatch>,
        method: Option<String>,
    }
}

message! {
    /// `HTTPPathMatch`.
    PathMatch {
        r#type "type": PathMatchType,
        value: Option<String>,
    }
}

enumeration! {
    /// `PathMatchType`.
    PathMatchType {
        PathPrefix = 0 "PathPrefix",
        Exact = 1 "Exact",
        RegularExpression = 2 "RegularExpression",
    }
}

message! {
    /// `HTTPHeaderMatch`, `HTTPQueryParamMatch`, `GRPCHeaderMatch`.
    NamedMatch {
        r#type "type": ValueMatchType,
        name: String,
        value: String,
    }
}

enumeration! {
    /// `HeaderMatchType`, `QueryParamMatchType`, `GRPCHeaderMatchType`, `GRPCMethodMatchType`.
    ValueMatchType {
        Exact = 0 "Exact",
        RegularExpression = 1 "RegularExpression",
    }
}

message! {
    /// `GRPCRouteMatch`.
    GrpcMatch {
        method: Option<MethodMatch>,
        headers: Vec<NamedMatch>,
    }
}

message! {
    /// `GRPCMethodMatch`.
    MethodMatch {
        r#type "type": ValueMatchType,
        service: Option<String>,
        method: Option<String>,
    }
}

message! {
    /// `HTTPRouteFilter`, `GRPCRouteFilter`.
    Filter {
        r#type "type": String,
        request_header_modifier "requestHeaderModifier": Option<HeaderFilter>,
        response_header_modifier "responseHeaderModifier": Option<HeaderFilter>,
        request_mirror "requestMirror": Option<MirrorFilter>,
        request_redirect "requestRedirect": Option<RedirectFilter>,
        url_rewrite "urlRewrite": Option<RewriteFilter>,
        cors: Option<CorsFilter>,
    }
}

message! {
    /// `HTTPHeaderFilter`.
    HeaderFilter {
        set: Vec<Header>,
        add: Vec<Header>,
        remove: Vec<String>,
    }
}

message! {
    /// `HTTPHeader`.
    Header {
        name: String,
        value: String,
    }
}

message! {
    /// `HTTPRequestMirrorFilter`.
    MirrorFilter {
        backend_ref "backendRef": BackendRef,
        percent: Option<u32>,
        fraction: Option<Fraction>,
    }
}

message! {
    /// `Fraction`.
    Fraction {
        numerator: u32,
        denominator: Option<u32>,
    }
}

message! {
    /// `HTTPRequestRedirectFilter`.
    RedirectFilter {
        scheme: Option<String>,
        hostname: Option<String>,
        path: Option<PathModifier>,
        port: Option<u32>,
        status_code "statusCode": Option<u32>,
    }
}

message! {
    /// `HTTPURLRewriteFilter`.
    RewriteFilter {
        hostname: Option<String>,
        path: Option<PathModifier>,
    }
}

message! {
    /// `HTTPPathModifier`.
    PathModifier {
        r#type "type": PathModifierType,
        replace_full_path "replaceFullPath": String,
        replace_prefix_match "replacePrefixMatch": String,
    }
}

enumeration! {
    /// `HTTPPathModifierType`.
    PathModifierType {
        ReplaceFullPath = 0 "ReplaceFullPath",
        ReplacePrefixMatch = 1 "ReplacePrefixMatch",
    }
}

message! {
    /// `HTTPCORSFilter`.
    CorsFilter {
        allow_origins "allowOrigins": Vec<String>,
        allow_credentials "allowCredentials": bool,
        allow_methods "allowMethods": Vec<String>,
        allow_headers "allowHeaders": Vec<String>,
        expose_headers "exposeHeaders": Vec<String>,
        max_age "maxAge": u32,
    }
}

message! {
    /// `HTTPBackendRef`, `GRPCBackendRef`, `BackendObjectReference`.
    BackendRef {
        group: Option<String>,
        kind: Option<String>,
        name: String,
        namespace: Option<String>,
        port: Option<u32>,
        weight: Option<u32>,
        filters: Vec<Filter>,
    }
}

message! {
    /// `HTTPRouteTimeouts`.
    Timeouts {
        request: Option<Duration>,
        backend_request "backendRequest": Option<Duration>,
    }
}

message! {
    /// `HTTPRouteRetry`.
    Retry {
        codes: Vec<u32>,
        attempts: Option<u32>,
        backoff: Option<Duration>,
    }
}

/// What a [`ParentReference`] of a mesh names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MeshParent {
    /// A Kubernetes Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
}

impl ParentReference {
    /// Of a mesh's routes; nothing for those of gateways.
    pub fn mesh_parent(&self) -> Option<MeshParent> {
        match (self.group.as_deref()?, self.kind.as_deref()?) {
            ("", "Service") => Some(MeshParent::Service),
            ("networking.istio.io", "ServiceEntry") => Some(MeshParent::ServiceEntry),
            _ => None,
        }
    }
}

/// What a [`BackendRef`] names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackendKind {
    /// A Kubernetes Service, or a ServiceImport, which stands for the Service of that name in all clusters.
    Service,
    /// A host name of the registry.
    Hostname,
    /// Anything else: such requests are answered with 500.
    Unknown,
}

impl BackendRef {
    /// What it names.
    pub fn backend_kind(&self) -> BackendKind {
        match (self.group.as_deref().unwrap_or_default(), self.kind.as_deref().unwrap_or("Service")) {
            ("", "Service") | ("multicluster.x-k8s.io", "ServiceImport") => BackendKind::Service,
            ("networking.istio.io", "Hostname") => BackendKind::Hostname,
            _ => BackendKind::Unknown,
        }
    }
}
