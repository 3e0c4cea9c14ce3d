//! Routing rules of a host: how a request to it is matched, changed and sent on.

use std::collections::BTreeMap;

use crate::wire::Duration;
use crate::wire::{enumeration, message};

/// gRPC's status codes by name; the index is the code (gRPC's statuscodes.md).
pub const GRPC_STATUSES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

message! {
    /// `networking.v1alpha3.VirtualService`.
    VirtualService {
        hosts: Vec<String>,
        gateways: Vec<String>,
        http: Vec<HttpRoute>,
        tls: Vec<TlsRoute>,
        tcp: Vec<TcpRoute>,
        export_to "exportTo": Vec<String>,
    }
}

message! {
    /// `networking.v1alpha3.Destination`.
    Destination {
        host: String,
        subset: String,
        port: Option<PortSelector>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPRoute`.
    HttpRoute {
        name: String,
        r#match: Vec<HttpMatchRequest>,
        route: Vec<HttpRouteDestination>,
        redirect: Option<HttpRedirect>,
        direct_response "directResponse": Option<HttpDirectResponse>,
        delegate: Option<Delegate>,
        rewrite: Option<HttpRewrite>,
        timeout: Option<Duration>,
        retries: Option<HttpRetry>,
        fault: Option<HttpFaultInjection>,
        mirror: Option<Destination>,
        mirrors: Vec<HttpMirrorPolicy>,
        mirror_percent "mirrorPercent": Option<u32>,
        mirror_percentage "mirrorPercentage": Option<Percent>,
        cors_policy "corsPolicy": Option<CorsPolicy>,
        headers: Option<Headers>,
    }
}

message! {
    /// `networking.v1alpha3.Delegate`.
    Delegate {
        name: String,
        namespace: String,
    }
}

message! {
    /// `networking.v1alpha3.Headers`.
    Headers {
        request: Option<HeaderOperations>,
        response: Option<HeaderOperations>,
    }
}

message! {
    /// `networking.v1alpha3.Headers.HeaderOperations`.
    HeaderOperations {
        set: BTreeMap<String, String>,
        add: BTreeMap<String, String>,
        remove: Vec<String>,
    }
}

message! {
    /// `networking.v1alpha3.TLSRoute`.
    TlsRoute {
        r#match: Vec<TlsMatchAttributes>,
        route: Vec<RouteDestination>,
    }
}

message! {
    /// `networking.v1alpha3.TCPRoute`.
    TcpRoute {
        r#match: Vec<L4MatchAttributes>,
        route: Vec<RouteDestination>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPMatchRequest`.
    HttpMatchRequest {
        name: String,
        uri: Option<StringMatch>,
        scheme: Option<StringMatch>,
        method: Option<StringMatch>,
        authority: Option<StringMatch>,
        headers: BTreeMap<String, StringMatch>,
        port: u32,
        source_labels "sourceLabels": BTreeMap<String, String>,
        gateways: Vec<String>,
        query_params "queryParams": BTreeMap<String, StringMatch>,
        ignore_uri_case "ignoreUriCase": bool,
        without_headers "withoutHeaders": BTreeMap<String, StringMatch>,
        source_namespace "sourceNamespace": String,
        stat_prefix "statPrefix": String,
    }
}

message! {
    /// `networking.v1alpha3.HTTPRouteDestination`.
    HttpRouteDestination {
        destination: Option<Destination>,
        weight: i32,
        headers: Option<Headers>,
    }
}

message! {
    /// `networking.v1alpha3.RouteDestination`.
    RouteDestination {
        destination: Option<Destination>,
        weight: i32,
    }
}

message! {
    /// `networking.v1alpha3.L4MatchAttributes`.
    L4MatchAttributes {
        destination_subnets "destinationSubnets": Vec<String>,
        port: u32,
        source_subnet "sourceSubnet": String,
        source_labels "sourceLabels": BTreeMap<String, String>,
        gateways: Vec<String>,
        source_namespace "sourceNamespace": String,
    }
}

message! {
    /// `networking.v1alpha3.TLSMatchAttributes`.
    TlsMatchAttributes {
        sni_hosts "sniHosts": Vec<String>,
        destination_subnets "destinationSubnets": Vec<String>,
        port: u32,
        source_labels "sourceLabels": BTreeMap<String, String>,
        gateways: Vec<String>,
        source_namespace "sourceNamespace": String,
    }
}

message! {
    /// `networking.v1alpha3.HTTPRedirect`.
    HttpRedirect {
        uri: String,
        authority: String,
        port: Option<u32>,
        derive_port "derivePort": Option<RedirectPortSelection>,
        scheme: String,
        redirect_code "redirectCode": u32,
        prefix_rewrite "prefixRewrite": String,
    }
}

enumeration! {
    /// `networking.v1alpha3.HTTPRedirect.RedirectPortSelection`.
    RedirectPortSelection {
        FromProtocolDefault = 0 "FROM_PROTOCOL_DEFAULT",
        FromRequestPort = 1 "FROM_REQUEST_PORT",
    }
}

message! {
    /// `networking.v1alpha3.HTTPDirectResponse`.
    HttpDirectResponse {
        status: u32,
        body: Option<HttpBody>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPBody`.
    HttpBody {
        string: Option<String>,
        bytes: Option<String>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPRewrite`.
    HttpRewrite {
        uri: String,
        authority: String,
        uri_regex_rewrite "uriRegexRewrite": Option<RegexRewrite>,
    }
}

message! {
    /// `networking.v1alpha3.RegexRewrite`.
    RegexRewrite {
        r#match: String,
        rewrite: String,
    }
}

message! {
    /// `networking.v1alpha3.StringMatch`.
    StringMatch {
        exact: Option<String>,
        prefix: Option<String>,
        regex: Option<String>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPRetry`.
    HttpRetry {
        attempts: i32,
        per_try_timeout "perTryTimeout": Option<Duration>,
        retry_on "retryOn": String,
        retry_remote_localities "retryRemoteLocalities": Option<bool>,
        retry_ignore_previous_hosts "retryIgnorePreviousHosts": Option<bool>,
        backoff: Option<Duration>,
    }
}

message! {
    /// `networking.v1alpha3.CorsPolicy`.
    CorsPolicy {
        allow_origin "allowOrigin": Vec<String>,
        allow_origins "allowOrigins": Vec<StringMatch>,
        allow_methods "allowMethods": Vec<String>,
        allow_headers "allowHeaders": Vec<String>,
        expose_headers "exposeHeaders": Vec<String>,
        max_age "maxAge": Option<Duration>,
        allow_credentials "allowCredentials": Option<bool>,
        unmatched_preflights "unmatchedPreflights": UnmatchedPreflights,
    }
}

enumeration! {
    /// `networking.v1alpha3.CorsPolicy.UnmatchedPreflights`.
    UnmatchedPreflights {
        Unspecified = 0 "UNSPECIFIED",
        Forward = 1 "FORWARD",
        Ignore = 2 "IGNORE",
    }
}

message! {
    /// `networking.v1alpha3.HTTPFaultInjection`.
    HttpFaultInjection {
        delay: Option<Delay>,
        abort: Option<Abort>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPFaultInjection.Delay`.
    Delay {
        percent: i32,
        fixed_delay "fixedDelay": Option<Duration>,
        exponential_delay "exponentialDelay": Option<Duration>,
        percentage: Option<Percent>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPFaultInjection.Abort`.
    Abort {
        http_status "httpStatus": Option<i32>,
        grpc_status "grpcStatus": Option<String>,
        http2_error "http2Error": Option<String>,
        percentage: Option<Percent>,
    }
}

message! {
    /// `networking.v1alpha3.HTTPMirrorPolicy`.
    HttpMirrorPolicy {
        destination: Option<Destination>,
        percentage: Option<Percent>,
    }
}

message! {
    /// `networking.v1alpha3.PortSelector`.
    PortSelector {
        number: u32,
    }
}

message! {
    /// `networking.v1alpha3.Percent`.
    Percent {
        value: f64,
    }
}

/// Codes that Go's net/http has a text for: only these count as status codes among conditions for retries.
pub fn is_http_status(code: u16) -> bool {
    matches!(code, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431 | 451
        | 500..=508 | 510 | 511)
}
