//! External authorizers of MeshConfig (istiod `extauthz.go`).

use envoy_api::core::{ApiVersion, GrpcService, HeaderValue, HttpUri, grpc_service, http_uri::HttpUpstreamType};
use envoy_api::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService, ext_authz::Services,
};
use envoy_api::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz as TcpExtAuthz;
use envoy_api::pb::envoy::r#type::matcher::v3::{
    ListStringMatcher, MetadataMatcher, StringMatcher, ValueMatcher, value_matcher,
};
use envoy_api::pb::envoy::r#type::v3::{HttpStatus, StatusCode};
use istio_api::Duration;
use istio_api::extension_provider::{
    EnvoyExternalAuthorizationGrpcProvider, EnvoyExternalAuthorizationHttpProvider,
    EnvoyExternalAuthorizationRequestBody, ExtensionProvider,
};

use super::{EXT_AUTHZ_PREFIX, EXT_AUTHZ_STAT, HTTP_RBAC, TCP_RBAC};
use crate::access_log::lookup;
use crate::context::Context;
use crate::proto::{duration, exact, prefix, suffix};

fn find<'a>(cx: &'a Context<'_>, name: &str) -> Option<&'a ExtensionProvider> {
    let usable = |p: &&ExtensionProvider| {
        p.name == name && (p.envoy_ext_authz_http.is_some() || p.envoy_ext_authz_grpc.is_some())
    };
    let found = cx.push.mesh.extension_providers.iter().find(usable).filter(|_| is_label(name))?;
    let sensible = match (&found.envoy_ext_authz_http, &found.envoy_ext_authz_grpc) {
        (Some(http), _) => {
            let headers = http.include_request_headers_in_check.iter();
            let headers = headers.chain(&http.include_headers_in_check).chain(&http.headers_to_downstream_on_deny);
            let mut headers =
                headers.chain(&http.headers_to_downstream_on_allow).chain(&http.headers_to_upstream_on_allow);
            is_port(http.port)
                && (http.path_prefix.is_empty() || http.path_prefix.starts_with('/'))
                && !headers.any(|header| header == "*")
        }
        (None, Some(grpc)) => is_port(grpc.port),
        (None, None) => false,
    };
    sensible.then_some(found)
}

/// Whether it can stand in names of policies and metrics: a label of DNS in lower case.
fn is_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.len() <= 63 && name.chars().all(plain) && !name.starts_with('-') && !name.ends_with('-')
}

fn is_port(port: u32) -> bool {
    (1..=65535).contains(&port)
}

fn timeout(own: Option<Duration>) -> Option<envoy_api::wkt::Duration> {
    Some(duration(own.unwrap_or(Duration::from_secs(600))))
}

/// Only requests that the shadow RBAC filter marked are asked about.
fn enabled(filter: &str, provider: &str) -> Option<MetadataMatcher> {
    let value = prefix(&format!("{EXT_AUTHZ_PREFIX}-{provider}"));
    Some(MetadataMatcher {
        filter: filter.to_owned(),
        path: vec![super::rule::segment(&format!("{EXT_AUTHZ_STAT}shadow_effective_policy_id"))],
        value: Some(ValueMatcher { match_pattern: Some(value_matcher::MatchPattern::StringMatch(value)) }),
        ..MetadataMatcher::default()
    })
}

fn status(text: &str) -> Option<Option<HttpStatus>> {
    if text.is_empty() {
        return Some(None);
    }
    let code: i32 = text.parse().ok()?;
    StatusCode::try_from(code).ok().map(|_| Some(HttpStatus { code }))
}

fn headers(list: &[String]) -> Option<ListStringMatcher> {
    let matcher = |h: &String| {
        let own = match (h.strip_prefix('*'), h.strip_suffix('*')) {
            (Some(rest), _) => suffix(rest),
            (_, Some(rest)) => prefix(rest),
            _ => exact(h),
        };
        StringMatcher { ignore_case: true, ..own }
    };
    (!list.is_empty()).then(|| ListStringMatcher { patterns: list.iter().map(matcher).collect() })
}

fn body(own: Option<&EnvoyExternalAuthorizationRequestBody>) -> Option<BufferSettings> {
    own.map(|b| BufferSettings {
        max_request_bytes: b.max_request_bytes,
        allow_partial_message: b.allow_partial_message,
        pack_as_bytes: b.pack_as_bytes,
    })
}

fn grpc(cx: &Context<'_>, own: &EnvoyExternalAuthorizationGrpcProvider) -> Option<GrpcService> {
    let (authority, cluster_name) = lookup(cx.push, "authz", &own.service, own.port)?;
    let target = grpc_service::EnvoyGrpc { cluster_name, authority, ..Default::default() };
    Some(GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(target)),
        timeout: timeout(own.timeout),
        ..GrpcService::default()
    })
}

/// The filter that asks a provider about HTTP requests; nothing if the provider is unknown or broken.
pub(super) fn http(cx: &Context<'_>, name: &str) -> Option<ExtAuthz> {
    let provider = find(cx, name)?;
    let common = ExtAuthz {
        transport_api_version: ApiVersion::V3 as i32,
        filter_enabled_metadata: enabled(HTTP_RBAC, name),
        ..ExtAuthz::default()
    };
    if let Some(own) = &provider.envoy_ext_authz_http {
        return Some(ExtAuthz {
            status_on_error: status(&own.status_on_error)?,
            failure_mode_allow: own.fail_open,
            with_request_body: body(own.include_request_body_in_check.as_ref()),
            allowed_headers: headers(&own.include_request_headers_in_check)
                .or_else(|| headers(&own.include_headers_in_check)),
            services: Some(Services::HttpService(http_service(cx, own)?)),
            ..common
        });
    }
    let own = provider.envoy_ext_authz_grpc.as_ref()?;
    Some(ExtAuthz {
        status_on_error: status(&own.status_on_error)?,
        failure_mode_allow: own.fail_open,
        with_request_body: body(own.include_request_body_in_check.as_ref()),
        services: Some(Services::GrpcService(grpc(cx, own)?)),
        ..common
    })
}

fn http_service(cx: &Context<'_>, own: &EnvoyExternalAuthorizationHttpProvider) -> Option<HttpService> {
    let (host, cluster) = lookup(cx.push, "authz", &own.service, own.port)?;
    let add: Vec<HeaderValue> = own
        .include_additional_headers_in_check
        .iter()
        .map(|(key, value)| HeaderValue { key: key.clone(), value: value.clone(), ..HeaderValue::default() })
        .collect();
    let response = AuthorizationResponse {
        allowed_upstream_headers: headers(&own.headers_to_upstream_on_allow),
        allowed_client_headers: headers(&own.headers_to_downstream_on_deny),
        allowed_client_headers_on_success: headers(&own.headers_to_downstream_on_allow),
        ..AuthorizationResponse::default()
    };
    #[allow(deprecated)] // What istiod sends.
    Some(HttpService {
        server_uri: Some(HttpUri {
            uri: format!("http://{host}"),
            timeout: timeout(own.timeout),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
        }),
        path_prefix: own.path_prefix.clone(),
        authorization_request: (!add.is_empty())
            .then(|| AuthorizationRequest { headers_to_add: add, ..AuthorizationRequest::default() }),
        authorization_response: (response != AuthorizationResponse::default()).then_some(response),
        ..HttpService::default()
    })
}

/// The filter that asks about TCP connections: outer nothing if the provider is unknown or broken, inner
/// nothing if it only understands HTTP.
pub(super) fn tcp(cx: &Context<'_>, name: &str) -> Option<Option<TcpExtAuthz>> {
    // What is wrong with it is so for HTTP, too.
    http(cx, name)?;
    let provider = find(cx, name)?;
    let Some(own) = &provider.envoy_ext_authz_grpc else { return Some(None) };
    Some(Some(TcpExtAuthz {
        stat_prefix: "tcp.".to_owned(),
        grpc_service: Some(grpc(cx, own)?),
        failure_mode_allow: own.fail_open,
        transport_api_version: ApiVersion::V3 as i32,
        filter_enabled_metadata: enabled(TCP_RBAC, name),
        ..TcpExtAuthz::default()
    }))
}
