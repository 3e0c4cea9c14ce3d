//! The HTTP connection manager.

use std::net::IpAddr;
use std::sync::Arc;

use envoy_api::core::{Http1ProtocolOptions, HttpProtocolOptions};
use envoy_api::http::{
    HttpConnectionManager, HttpFilter, Rds, RequestIdExtension,
    http_connection_manager::{
        ForwardClientCertDetails, InternalAddressConfig, PathWithEscapedSlashesAction, RouteSpecifier,
        ServerHeaderTransformation, SetCurrentClientCertDetails, UpgradeConfig,
    },
};
use envoy_api::listener::Filter;
use envoy_api::pb::envoy::extensions::filters::http::stateful_session::v3::StatefulSession;
use envoy_api::pb::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig;
use envoy_api::route::RouteConfiguration;
use istio_api::MeshNetworks;
use istio_api::mesh_config::NormalizationType;
use istio_api::mesh_proxy::{ForwardClientCertDetails as Forward, MetadataExchangeMode, ProxyHeaders};
use mesh_types::Protocol;
use registry::{Resolution, Service};

use super::{connection, tracing};
use crate::access_log::{self, Of};
use crate::context::Context;
use crate::filters::{self, HTTP_CONNECTION_MANAGER, yes};
use crate::proto::{ads, any, bool_value, cidr, network_filter, parse_duration, seconds};
use crate::telemetry::Side;
use crate::wasm::{self, Phase};
use crate::{authz, jwt, names};

/// Where a connection manager gets its routes.
pub(super) enum Routes {
    /// By name over RDS.
    Named(String),
    /// Inside the listener.
    Inline(Box<RouteConfiguration>),
}

/// One connection manager.
pub(super) struct Manager<'a> {
    pub(super) side: Side,
    pub(super) routes: Routes,
    pub(super) stat_prefix: String,
    pub(super) protocol: Protocol,
    /// A forward proxy: absolute URLs are taken.
    pub(super) is_forward_proxy: bool,
    /// Where the workload listens, or what clients dial.
    pub(super) port: u16,
    /// The first service of an outbound listener.
    pub(super) service: Option<&'a Service>,
}

/// What the rest of a connection manager depends on, but for plugins and services with wildcard names.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct ManagerKind {
    side: Side,
    is_forward_proxy: bool,
    grpc_web: bool,
    http2: bool,
}

fn headers<'a>(cx: &'a Context<'_>) -> Option<&'a ProxyHeaders> {
    cx.proxy_config.proxy_headers.as_ref()
}

/// Whether HTTP/1 header names keep their case.
pub(crate) fn preserves_case(cx: &Context<'_>) -> bool {
    headers(cx).and_then(|h| h.preserve_http1_header_case) == Some(true)
}

/// Whether requests carry their attempt's number.
pub(crate) fn counts_attempts(cx: &Context<'_>) -> bool {
    headers(cx).and_then(|h| h.attempt_count.as_ref()).and_then(|a| a.disabled) != Some(true)
}

/// Whether rewritten requests carry the host they were for.
pub(crate) fn forwards_host(cx: &Context<'_>) -> bool {
    headers(cx).and_then(|h| h.x_forwarded_host.as_ref()).and_then(|x| x.enabled) == Some(true)
}

pub(super) fn filter(cx: &Context<'_>, manager: Manager<'_>) -> Filter {
    // Most connection managers of a proxy differ in nothing but these two, which are the first fields.
    let particular = manager.service.is_some_and(Service::is_wildcard)
        || !cx.push.extensions(&cx.node.namespace, &cx.node.labels).is_empty();
    let kind = ManagerKind {
        side: manager.side,
        is_forward_proxy: manager.is_forward_proxy,
        grpc_web: manager.protocol == Protocol::GrpcWeb,
        http2: manager.protocol.is_http2(),
    };
    let make = || any(&build(cx, kind, manager.port, manager.service)).value.into();
    let rest: Arc<[u8]> = match particular {
        true => make(),
        false => cx.common.managers.get(kind, make),
    };
    let mut config = any(&HttpConnectionManager {
        stat_prefix: manager.stat_prefix,
        route_specifier: Some(match manager.routes {
            Routes::Named(route_config_name) => {
                RouteSpecifier::Rds(Rds { config_source: Some(ads()), route_config_name })
            }
            Routes::Inline(config) => RouteSpecifier::RouteConfig(*config),
        }),
        ..HttpConnectionManager::default()
    });
    config.value.extend_from_slice(&rest);
    network_filter(HTTP_CONNECTION_MANAGER, config)
}

/// A connection manager without its statistics' prefix and routes.
fn build(cx: &Context<'_>, kind: ManagerKind, port: u16, service: Option<&Service>) -> HttpConnectionManager {
    let inbound = kind.side == Side::Server;
    let ph = headers(cx).cloned().unwrap_or_default();
    let server = ph.server.clone().unwrap_or_default();
    let hide_server = server.disabled == Some(true);
    let server_name = match () {
        () if hide_server => String::new(),
        () if !server.value.is_empty() => server.value,
        () if inbound => "istio-envoy".to_owned(),
        () => String::new(),
    };
    let normalization = cx.push.mesh.path_normalization.as_ref().map(|p| p.normalization).unwrap_or_default();
    let decode = normalization == NormalizationType::DecodeAndMergeSlashes;
    let tracing = tracing::settings(cx, kind.side);
    let request_id = UuidRequestIdConfig {
        use_request_id_for_trace_sampling: bool_value(tracing.use_request_id),
        ..UuidRequestIdConfig::default()
    };
    let http_filters = http_filters(cx, kind, port, service, &ph);
    let mut out = HttpConnectionManager {
        server_name,
        server_header_transformation: if hide_server {
            ServerHeaderTransformation::PassThrough as i32
        } else {
            ServerHeaderTransformation::Overwrite as i32
        },
        generate_request_id: if ph.request_id.and_then(|r| r.disabled) == Some(true) {
            bool_value(false)
        } else {
            None
        },
        proxy_100_continue: cx.push.settings.proxy_100_continue,
        append_x_forwarded_port: ph.x_forwarded_port.and_then(|x| x.enabled) == Some(true),
        normalize_path: bool_value(normalization != NormalizationType::None),
        merge_slashes: decode || normalization == NormalizationType::MergeSlashes,
        path_with_escaped_slashes_action: if decode {
            PathWithEscapedSlashesAction::UnescapeAndForward as i32
        } else {
            PathWithEscapedSlashesAction::KeepUnchanged as i32
        },
        use_remote_address: bool_value(cx.push.settings.use_remote_address && !inbound && !kind.is_forward_proxy),
        upgrade_configs: vec![UpgradeConfig { upgrade_type: "websocket".to_owned(), ..UpgradeConfig::default() }],
        common_http_protocol_options: parse_duration(&cx.node.idle_timeout)
            .map(|idle| HttpProtocolOptions { idle_timeout: Some(idle), ..HttpProtocolOptions::default() }),
        stream_idle_timeout: Some(seconds(0)),
        access_log: access_log::logs(cx, kind.side, Of::Requests),
        tracing: tracing.tracing,
        request_id_extension: Some(RequestIdExtension { typed_config: Some(any(&request_id)) }),
        http_filters,
        ..HttpConnectionManager::default()
    };
    let mut http1 = Http1ProtocolOptions::default();
    if cx.node.http10 || cx.push.settings.http10 {
        http1.accept_http_10 = true;
    }
    if kind.is_forward_proxy {
        http1.allow_absolute_url = yes();
    }
    if preserves_case(cx) {
        http1.header_key_format = crate::cluster::preserve_case().header_key_format;
    }
    if http1 != Http1ProtocolOptions::default() {
        out.http_protocol_options = Some(http1);
    }
    if inbound {
        let details = ph.set_current_client_cert_details.unwrap_or_default();
        out.forward_client_cert_details = match ph.forwarded_client_cert {
            Forward::Undefined | Forward::AppendForward => ForwardClientCertDetails::AppendForward,
            Forward::Sanitize => ForwardClientCertDetails::Sanitize,
            Forward::ForwardOnly => ForwardClientCertDetails::ForwardOnly,
            Forward::SanitizeSet => ForwardClientCertDetails::SanitizeSet,
            Forward::AlwaysForwardOnly => ForwardClientCertDetails::AlwaysForwardOnly,
        } as i32;
        out.set_current_client_cert_details = Some(SetCurrentClientCertDetails {
            subject: bool_value(details.subject.unwrap_or(true)),
            uri: details.uri.unwrap_or(true),
            dns: details.dns.unwrap_or(true),
            cert: details.cert.unwrap_or(false),
            chain: details.chain.unwrap_or(false),
            ..SetCurrentClientCertDetails::default()
        });
        if kind.http2 {
            out.http2_protocol_options = Some(Default::default());
        }
    }
    let settings = &cx.push.settings;
    if settings.internal_networks || out.use_remote_address == yes() {
        out.internal_address_config = internal_addresses(&settings.networks);
    }
    connection::apply(cx, &mut out);
    out
}

/// All ranges of the mesh's networks (istiod `MeshNetworksToEnvoyInternalAddressConfig`).
fn internal_addresses(networks: &MeshNetworks) -> Option<InternalAddressConfig> {
    let endpoints = networks.networks.values().flat_map(|network| &network.endpoints);
    let mut ranges: Vec<_> = endpoints.filter_map(|e| cidr(e.from_cidr.as_deref()?)).collect();
    ranges.sort_by_key(|r| (r.address_prefix.parse::<IpAddr>().ok(), r.prefix_len.map(|bits| bits.value)));
    let some = !ranges.is_empty();
    some.then(|| InternalAddressConfig { cidr_ranges: ranges, ..InternalAddressConfig::default() })
}

/// In istiod's order: who is calling, may they, what happens to them, where do they go.
fn http_filters(
    cx: &Context<'_>,
    kind: ManagerKind,
    port: u16,
    service: Option<&Service>,
    ph: &ProxyHeaders,
) -> Vec<HttpFilter> {
    let inbound = kind.side == Side::Server;
    let in_mesh_only = ph.metadata_exchange_headers.as_ref().is_some_and(|m| m.mode == MetadataExchangeMode::InMesh);
    let mut out: Vec<HttpFilter> = Vec::new();
    out.extend(filters::peer_metadata(cx, inbound, in_mesh_only && !kind.is_forward_proxy));
    let plugins = |phase| wasm::http(cx, kind.side, port, phase);
    if inbound {
        out.extend(authz::http_custom(cx));
    }
    out.extend(plugins(Phase::Authn));
    if inbound {
        out.extend(jwt::filter(cx));
    }
    out.extend(plugins(Phase::Authz));
    if inbound {
        out.extend(authz::http(cx));
    }
    out.extend(plugins(Phase::Stats));
    out.extend(plugins(Phase::Any));
    if kind.grpc_web {
        out.push(filters::grpc_web());
    }
    out.push(filters::grpc_stats());
    if !inbound && cx.has_istio_filters() && cx.push.settings.alpn_filter {
        out.push(filters::alpn());
    }
    out.push(filters::fault());
    out.push(filters::cors());
    out.extend(cx.telemetry.http_filters(kind.side));
    if !inbound && cx.push.settings.persistent_sessions {
        // Does nothing until a route says how sessions are kept.
        out.push(filters::http(filters::STATEFUL_SESSION, &StatefulSession::default()));
    }
    if let Some(service) = service
        && !inbound
        && service.is_wildcard()
        && service.resolution == Resolution::DynamicDns
    {
        out.push(filters::http_forward_proxy(filters::dns_cache(cx, service)));
    }
    if !inbound && cx.scope.dynamic_dns {
        out.push(filters::http_forward_proxy(filters::any_dns_cache(cx)));
    }
    out.push(filters::router(ph.envoy_debug_headers.as_ref().and_then(|d| d.disabled) == Some(true)));
    out
}

/// The statistics' prefix of an outbound listener.
pub(super) fn outbound_prefix(listener: &str) -> String {
    names::stat(&format!("outbound_{listener}"))
}
