//! The HTTP connection manager: its settings, and what it does to every request and response before and after the filters.

mod detect;
mod local_reply;
mod path;
mod proxy_status;
mod request;
mod response;
mod tracing;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

pub use local_reply::{LocalReply, Rewritten};
pub use path::{PathVerdict, connect_udp_target, normalize};
pub use proxy_status::ProxyStatus;
pub use request::{RequestIdentity, conform_request, is_upgrade};
pub use response::{conform_response, tell_request_id};
pub use tracing::{CustomTag, RouteTracing, SpanService, TagSource, Tracing, TracingProvider};

use crate::access_log::AccessLog;
use crate::address::Address;
use crate::cidr::Cidr;
use crate::cluster::{Http1Options, Http2Options};
use crate::config_source::ConfigSource;
use crate::filters::{HeaderChanges, HttpFilter, HttpFilterEntry, RouterConfig};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::RouteTable;
use crate::{Jittered, Options, constraints, fields};

/// A compiled `HttpConnectionManager`.
#[derive(Debug)]
pub struct HttpConnectionManager {
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// HTTP version of connections.
    pub codec: Codec,
    /// Where routes come from.
    pub routes: Routes,
    /// In the order in which requests pass them; the router is the last.
    pub filters: Vec<HttpFilterEntry>,
    /// Logs.
    pub access_log: Vec<Arc<AccessLog>>,
    /// Write a record every so often while a request lasts.
    pub access_log_flush_interval: Option<Duration>,
    /// Write a record when a request comes.
    pub access_log_on_new_request: bool,
    /// A record is written when an upgrade or CONNECT succeeded, too.
    pub access_log_on_tunnel: bool,
    /// The `server` header.
    pub server_name: ArcStr,
    /// What happens to the upstream's `server` header.
    pub server_header: ServerHeader,
    /// Added to `via`.
    pub via: Option<ArcStr>,
    /// Tell of errors in answers.
    pub proxy_status: Option<ProxyStatus>,
    /// Of requests, before anything is made of their headers but host and path.
    pub early_changes: Box<[HeaderChanges]>,
    /// Most bytes of a request head.
    pub max_request_headers_bytes: u32,
    /// Most headers of a request.
    pub max_headers_count: u32,
    /// Close connections without requests after this.
    pub idle_timeout: Option<Duration>,
    /// Drain connections after this.
    pub max_connection_duration: Option<Jittered>,
    /// End streams on which nothing happens after this.
    pub stream_idle_timeout: Option<Duration>,
    /// What is left of an answer must have left after this; `Some(None)`: no limit, `None`: after the idle timeout.
    pub stream_flush_timeout: Option<Option<Duration>>,
    /// The request must be there by then.
    pub request_timeout: Option<Duration>,
    /// The request's head must be there by then.
    pub request_headers_timeout: Option<Duration>,
    /// Between the two GOAWAYs of a drain.
    pub drain_timeout: Jittered,
    /// Wait for the client to close before closing hard.
    pub delayed_close_timeout: Option<Duration>,
    /// A stream may take this long.
    pub max_stream_duration: Option<Duration>,
    /// A connection serves so many requests.
    pub max_requests_per_connection: Option<u32>,
    /// The peer's address is the client's; `x-forwarded-for` is for others.
    pub use_remote_address: bool,
    /// Trusted proxies in front of us.
    pub xff_num_trusted_hops: u32,
    /// Who finds the client's address instead of `x-forwarded-for` alone.
    detections: Box<[detect::Detection]>,
    /// Do not add the peer to `x-forwarded-for`.
    pub skip_xff_append: bool,
    /// Who counts as inside; `None`: nobody.
    pub internal: Option<InternalAddresses>,
    /// What happens to `x-forwarded-client-cert`.
    pub forward_client_cert: ForwardClientCert,
    /// What our element of it says.
    pub client_cert_details: ClientCertDetails,
    /// Give requests an id.
    pub generate_request_id: bool,
    /// Keep ids that come from outside.
    pub preserve_external_request_id: bool,
    /// Tell the client the id.
    pub always_set_request_id_in_response: bool,
    /// The id says whether a request is traced.
    pub use_request_id_for_trace_sampling: bool,
    /// The id is changed to say so.
    pub pack_trace_reason: bool,
    /// Normalise paths by RFC 3986.
    pub normalize_path: bool,
    /// Make one slash of many.
    pub merge_slashes: bool,
    /// What happens to escaped slashes.
    pub escaped_slashes: EscapedSlashes,
    /// Which ports are removed from the host.
    pub strip_port: StripPort,
    /// Remove a dot at the end of the host.
    pub strip_trailing_host_dot: bool,
    /// Pass on `expect: 100-continue` instead of answering it.
    pub proxy_100_continue: bool,
    /// IPv4 clients appear as IPv6 ones.
    pub represent_ipv4_remote_address_as_ipv4_mapped_ipv6: bool,
    /// Upgrades that are allowed.
    pub upgrades: Vec<Upgrade>,
    /// HTTP/1 options.
    pub http1: Http1Options,
    /// HTTP/2 options.
    pub http2: Http2Options,
    /// Names with underscores.
    pub headers_with_underscores: HeadersWithUnderscores,
    /// Answer and go on after a bad HTTP/1 request.
    pub stream_error_on_invalid_message: bool,
    /// Tracing.
    pub tracing: Option<Tracing>,
    /// Changes to our own answers.
    pub local_reply: LocalReply,
    /// Set `x-forwarded-port`.
    pub append_x_forwarded_port: bool,
    /// Add `x-envoy-local-overloaded` to answers of overload.
    pub append_local_overload: bool,
    /// Replace `:scheme`.
    pub scheme_overwrite: Option<ArcStr>,
    /// `:scheme` says whether upstream connections have TLS.
    pub scheme_of_upstream: bool,
    /// Tell upstream who we are.
    add_user_agent: bool,
    local_address: Option<IpAddr>,
    node_id: ArcStr,
    /// This proxy's `--service-cluster`.
    pub node_cluster: ArcStr,
}

/// Which peers count as inside.
#[derive(Clone, Debug)]
pub struct InternalAddresses {
    /// These; empty: private networks and loopback.
    pub ranges: Vec<Cidr>,
    /// Unix socket peers, too.
    pub unix_sockets: bool,
}

impl InternalAddresses {
    /// Whether a peer counts as inside (Envoy `InternalAddressConfig::isInternalAddress`).
    pub fn contains(&self, address: &Address) -> bool {
        match address.ip() {
            None => self.unix_sockets,
            Some(_) if self.ranges.is_empty() && address.is_loopback() => true,
            Some(IpAddr::V4(ip)) if self.ranges.is_empty() => ip.is_private(),
            Some(IpAddr::V6(ip)) if self.ranges.is_empty() => ip.is_unique_local(),
            Some(ip) => self.ranges.iter().any(|range| range.contains(ip)),
        }
    }
}

/// HTTP version of downstream connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Codec {
    /// By ALPN, else by the first bytes.
    Auto,
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Where routes come from.
#[derive(Clone, Debug)]
pub enum Routes {
    /// The configuration.
    Inline(Arc<RouteTable>),
    /// RDS.
    Rds {
        /// The route configuration's name.
        name: ArcStr,
        /// Who is asked.
        source: ConfigSource,
    },
}

/// What happens to the upstream's `server` header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ServerHeader {
    /// Ours replaces it.
    Overwrite,
    /// Ours is set if there is none.
    AppendIfAbsent,
    /// Nothing.
    PassThrough,
}

/// What happens to `x-forwarded-client-cert`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ForwardClientCert {
    /// It is removed.
    Sanitize,
    /// With mutual TLS it passes.
    ForwardOnly,
    /// With mutual TLS ours is added.
    AppendForward,
    /// With mutual TLS ours replaces it.
    SanitizeSet,
    /// It passes.
    AlwaysForwardOnly,
}

/// What our element of `x-forwarded-client-cert` says besides `By` and `Hash`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ClientCertDetails {
    /// The subject.
    pub subject: bool,
    /// The certificate.
    pub cert: bool,
    /// The chain.
    pub chain: bool,
    /// The DNS names.
    pub dns: bool,
    /// The URI.
    pub uri: bool,
}

/// What happens to escaped slashes in paths.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EscapedSlashes {
    /// They stay.
    KeepUnchanged,
    /// 400.
    RejectRequest,
    /// 307 to the path without them.
    UnescapeAndRedirect,
    /// They become slashes.
    UnescapeAndForward,
}

/// Which ports are removed from the host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StripPort {
    /// None.
    None,
    /// The listener's own.
    Matching,
    /// Any.
    Any,
}

/// What happens to headers whose names have underscores.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HeadersWithUnderscores {
    /// They pass.
    Allow,
    /// The request is refused.
    Reject,
    /// They are removed.
    Drop,
}

/// An upgrade.
#[derive(Clone, Debug)]
pub struct Upgrade {
    /// Its name, lower case: `websocket`, `connect`.
    pub kind: ArcStr,
    /// Allowed unless a route says otherwise.
    pub enabled: bool,
    /// Filters instead of the usual ones.
    pub filters: Option<Vec<HttpFilterEntry>>,
}

impl HttpConnectionManager {
    pub(crate) fn compile(hcm: &pb::hcm::HttpConnectionManager, options: &Options) -> Compiled<Self> {
        refuse! {
            "codec_type": hcm.codec_type == 3,
            "forward_client_cert_matcher": hcm.forward_client_cert_matcher.is_some(),
            "path_normalization_options": hcm.path_normalization_options.as_ref().is_some_and(|o| *o != Default::default()),
            "typed_header_validation_config": hcm.typed_header_validation_config.is_some(),
            "forward_proto_config": hcm.forward_proto_config.is_some(),
            "add_proxy_protocol_connection_state": fields::flag(hcm.add_proxy_protocol_connection_state.as_ref(), false),
        }
        constraints::manager(hcm)?;
        let common = hcm.common_http_protocol_options.unwrap_or_default();
        let duration = |field: &str, value: &Option<pb::Duration>, default: Option<Duration>| {
            fields::duration_or_off(field, value.as_ref(), default)
        };
        let log = hcm.access_log_options;
        let flush = log.as_ref().and_then(|o| o.access_log_flush_interval).or(hcm.access_log_flush_interval);
        let (pack_trace_reason, use_request_id_for_trace_sampling) = request_id(hcm.request_id_extension.as_ref())?;
        let details = hcm.set_current_client_cert_details.unwrap_or_default();
        refuse!("set_current_client_cert_details.format": details.format != 0, "set_current_client_cert_details.issuer": details.issuer);
        Ok(Self {
            stat_prefix: fields::required("stat_prefix", &hcm.stat_prefix)?,
            codec: match hcm.codec_type {
                1 => Codec::Http1,
                2 => Codec::Http2,
                _ => Codec::Auto,
            },
            routes: Routes::compile(hcm.route_specifier.as_ref(), options)?,
            filters: HttpFilterEntry::compile_all(&hcm.http_filters, options)?,
            access_log: AccessLog::compile_all(&hcm.access_log, options)?,
            access_log_flush_interval: duration("access_log_flush_interval", &flush, None)?,
            access_log_on_new_request: log.is_some_and(|o| o.flush_access_log_on_new_request)
                || hcm.flush_access_log_on_new_request,
            access_log_on_tunnel: log.is_some_and(|o| o.flush_log_on_tunnel_successfully_established),
            server_name: if hcm.server_name.is_empty() { "envoy".into() } else { hcm.server_name.as_str().into() },
            server_header: match hcm.server_header_transformation {
                0 => ServerHeader::Overwrite,
                1 => ServerHeader::AppendIfAbsent,
                2 => ServerHeader::PassThrough,
                other => {
                    return Err(Invalid::new("server_header_transformation", format!("{other} is no known value")));
                }
            },
            via: (!hcm.via.is_empty()).then(|| hcm.via.as_str().into()),
            proxy_status: hcm.proxy_status_config.as_ref().map(|config| {
                let server = if hcm.server_name.is_empty() { "envoy" } else { &hcm.server_name };
                ProxyStatus::compile(config, server, &options.node_id)
            }),
            early_changes: {
                let each = hcm.early_header_mutation_extensions.iter().enumerate();
                each.map(|(i, extension)| early_changes(extension).at_index("early_header_mutation_extensions", i))
                    .collect::<Compiled<_>>()?
            },
            max_request_headers_bytes: match fields::uint(hcm.max_request_headers_kb.as_ref(), 60) {
                kb @ 1..=8192 => kb * 1024,
                other => {
                    return Err(Invalid::new("max_request_headers_kb", format!("{other} is not between 1 and 8192")));
                }
            },
            max_headers_count: fields::uint(common.max_headers_count.as_ref(), 100).max(1),
            idle_timeout: duration(
                "common_http_protocol_options.idle_timeout",
                &common.idle_timeout,
                Some(Duration::from_secs(3600)),
            )?,
            max_connection_duration: duration(
                "common_http_protocol_options.max_connection_duration",
                &common.max_connection_duration,
                None,
            )?
            .map(|least| Jittered {
                least,
                percent: common.max_connection_duration_jitter.map_or(0.0, |jitter| jitter.value),
            }),
            stream_idle_timeout: duration(
                "stream_idle_timeout",
                &hcm.stream_idle_timeout,
                Some(Duration::from_secs(300)),
            )?,
            stream_flush_timeout: fields::duration("stream_flush_timeout", hcm.stream_flush_timeout.as_ref())?
                .map(|after| (!after.is_zero()).then_some(after)),
            request_timeout: duration("request_timeout", &hcm.request_timeout, None)?,
            request_headers_timeout: duration("request_headers_timeout", &hcm.request_headers_timeout, None)?,
            drain_timeout: Jittered {
                least: fields::duration("drain_timeout", hcm.drain_timeout.as_ref())?.unwrap_or(Duration::from_secs(5)),
                percent: hcm.drain_timeout_jitter.map_or(0.0, |jitter| jitter.value),
            },
            delayed_close_timeout: duration(
                "delayed_close_timeout",
                &hcm.delayed_close_timeout,
                Some(Duration::from_secs(1)),
            )?,
            max_stream_duration: duration(
                "common_http_protocol_options.max_stream_duration",
                &common.max_stream_duration,
                None,
            )?,
            max_requests_per_connection: common
                .max_requests_per_connection
                .as_ref()
                .map(|v| v.value)
                .filter(|n| *n > 0),
            use_remote_address: fields::flag(hcm.use_remote_address.as_ref(), false),
            xff_num_trusted_hops: hcm.xff_num_trusted_hops,
            detections: hcm
                .original_ip_detection_extensions
                .iter()
                .enumerate()
                .map(|(i, e)| detect::Detection::compile(e).at_index("original_ip_detection_extensions", i))
                .collect::<Compiled<_>>()?,
            skip_xff_append: hcm.skip_xff_append,
            internal: match &hcm.internal_address_config {
                None => None,
                Some(internal) => Some(InternalAddresses {
                    ranges: internal
                        .cidr_ranges
                        .iter()
                        .map(Cidr::compile)
                        .collect::<Compiled<_>>()
                        .at("internal_address_config.cidr_ranges")?,
                    unix_sockets: internal.unix_sockets,
                }),
            },
            forward_client_cert: match hcm.forward_client_cert_details {
                0 => ForwardClientCert::Sanitize,
                1 => ForwardClientCert::ForwardOnly,
                2 => ForwardClientCert::AppendForward,
                3 => ForwardClientCert::SanitizeSet,
                4 => ForwardClientCert::AlwaysForwardOnly,
                other => return Err(Invalid::new("forward_client_cert_details", format!("{other} is no known value"))),
            },
            client_cert_details: ClientCertDetails {
                subject: fields::flag(details.subject.as_ref(), false),
                cert: details.cert,
                chain: details.chain,
                dns: details.dns,
                uri: details.uri,
            },
            generate_request_id: fields::flag(hcm.generate_request_id.as_ref(), true),
            preserve_external_request_id: hcm.preserve_external_request_id,
            always_set_request_id_in_response: hcm.always_set_request_id_in_response,
            use_request_id_for_trace_sampling,
            pack_trace_reason,
            normalize_path: fields::flag(hcm.normalize_path.as_ref(), false),
            merge_slashes: hcm.merge_slashes,
            escaped_slashes: match hcm.path_with_escaped_slashes_action {
                0 | 1 => EscapedSlashes::KeepUnchanged,
                2 => EscapedSlashes::RejectRequest,
                3 => EscapedSlashes::UnescapeAndRedirect,
                4 => EscapedSlashes::UnescapeAndForward,
                other => {
                    return Err(Invalid::new("path_with_escaped_slashes_action", format!("{other} is no known value")));
                }
            },
            strip_port: match (&hcm.strip_port_mode, hcm.strip_matching_host_port) {
                (Some(pb::hcm::http_connection_manager::StripPortMode::StripAnyHostPort(true)), _) => StripPort::Any,
                (_, true) => StripPort::Matching,
                _ => StripPort::None,
            },
            strip_trailing_host_dot: hcm.strip_trailing_host_dot,
            proxy_100_continue: hcm.proxy_100_continue,
            represent_ipv4_remote_address_as_ipv4_mapped_ipv6: hcm.represent_ipv4_remote_address_as_ipv4_mapped_ipv6,
            upgrades: hcm
                .upgrade_configs
                .iter()
                .enumerate()
                .map(|(i, u)| Upgrade::compile(u, options).at_index("upgrade_configs", i))
                .collect::<Compiled<_>>()?,
            http1: Http1Options::compile(hcm.http_protocol_options.as_ref()).at("http_protocol_options")?,
            http2: Http2Options::compile(hcm.http2_protocol_options.as_ref()).at("http2_protocol_options")?,
            headers_with_underscores: match common.headers_with_underscores_action {
                0 => HeadersWithUnderscores::Allow,
                1 => HeadersWithUnderscores::Reject,
                2 => HeadersWithUnderscores::Drop,
                other => {
                    return Err(Invalid::new("headers_with_underscores_action", format!("{other} is no known value")));
                }
            },
            stream_error_on_invalid_message: fields::flag(hcm.stream_error_on_invalid_http_message.as_ref(), false),
            tracing: hcm.tracing.as_ref().map(|t| Tracing::compile(t, options)).transpose().at("tracing")?,
            local_reply: LocalReply::compile(hcm.local_reply_config.as_ref(), &options.runtime)
                .at("local_reply_config")?,
            append_x_forwarded_port: hcm.append_x_forwarded_port,
            append_local_overload: hcm.append_local_overload,
            scheme_overwrite: scheme(hcm.scheme_header_transformation.as_ref())?,
            scheme_of_upstream: hcm.scheme_header_transformation.as_ref().is_some_and(|t| t.match_upstream),
            add_user_agent: fields::flag(hcm.add_user_agent.as_ref(), false),
            local_address: options.local_address,
            node_id: options.node_id.as_str().into(),
            node_cluster: options.node_cluster.as_str().into(),
        })
    }

    /// How peers tell each other who they are, where Istio's filter says so.
    pub fn peer_metadata(&self) -> Option<&crate::filters::PeerMetadataConfig> {
        self.filters.iter().find_map(|entry| match &entry.filter {
            HttpFilter::PeerMetadata(config) => Some(&**config),
            _ => None,
        })
    }

    /// The route configuration that RDS must deliver, if there is one.
    pub fn rds_name(&self) -> Option<&ArcStr> {
        match &self.routes {
            Routes::Rds { name, .. } => Some(name),
            Routes::Inline(_) => None,
        }
    }

    /// The router's settings.
    pub fn router(&self) -> Option<&Arc<RouterConfig>> {
        match &self.filters.last()?.filter {
            HttpFilter::Router(router) => Some(router),
            _ => None,
        }
    }
}

impl Routes {
    fn compile(
        specifier: Option<&pb::hcm::http_connection_manager::RouteSpecifier>,
        options: &Options,
    ) -> Compiled<Self> {
        use pb::hcm::http_connection_manager::RouteSpecifier;
        match specifier {
            Some(RouteSpecifier::Rds(rds)) if rds.config_source.is_none() => {
                Err(Invalid::new("rds.config_source", "is missing"))
            }
            Some(RouteSpecifier::Rds(rds)) => Ok(Self::Rds {
                name: fields::required("rds.route_config_name", &rds.route_config_name)?,
                source: ConfigSource::compile(rds.config_source.as_ref()).at("rds.config_source")?,
            }),
            Some(RouteSpecifier::RouteConfig(table)) => {
                Ok(Self::Inline(Arc::new(RouteTable::build(table, options).at("route_config")?)))
            }
            Some(RouteSpecifier::ScopedRoutes(_)) => Err(Invalid::unsupported("scoped_routes")),
            None => Err(Invalid::new("route_specifier", "is missing")),
        }
    }
}

impl Upgrade {
    fn compile(config: &pb::hcm::http_connection_manager::UpgradeConfig, options: &Options) -> Compiled<Self> {
        Ok(Self {
            kind: config.upgrade_type.to_ascii_lowercase().into(),
            enabled: fields::flag(config.enabled.as_ref(), true),
            filters: match config.filters.as_slice() {
                [] => None,
                filters => Some(HttpFilterEntry::compile_all(filters, options)?),
            },
        })
    }
}

fn early_changes(extension: &pb::core::TypedExtensionConfig) -> Compiled<HeaderChanges> {
    let typed = crate::any::Typed::open(extension.typed_config.as_ref())?;
    if typed.name != "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation" {
        return Err(typed.unknown());
    }
    let config: pb::ext::http::early_header_mutation::header_mutation::v3::HeaderMutation = typed.decode()?;
    HeaderChanges::compile(&config.mutations)
}

fn request_id(extension: Option<&pb::hcm::RequestIdExtension>) -> Compiled<(bool, bool)> {
    let Some(any) = extension.and_then(|e| e.typed_config.as_ref()) else { return Ok((true, true)) };
    let typed = crate::any::Typed::open(Some(any)).at("request_id_extension")?;
    if typed.name != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" {
        return Err(typed.unknown()).at("request_id_extension");
    }
    let config: pb::ext::request_id::uuid::v3::UuidRequestIdConfig = typed.decode()?;
    Ok((
        fields::flag(config.pack_trace_reason.as_ref(), true),
        fields::flag(config.use_request_id_for_trace_sampling.as_ref(), true),
    ))
}

fn scheme(transformation: Option<&pb::core::SchemeHeaderTransformation>) -> Compiled<Option<ArcStr>> {
    use pb::core::scheme_header_transformation::Transformation;
    let Some(transformation) = transformation else { return Ok(None) };
    match &transformation.transformation {
        None => Ok(None),
        Some(Transformation::SchemeToOverwrite(scheme)) if matches!(scheme.as_str(), "http" | "https") => {
            Ok(Some(scheme.as_str().into()))
        }
        Some(Transformation::SchemeToOverwrite(scheme)) => {
            Err(Invalid::new("scheme_header_transformation", format!("{scheme:?} is neither http nor https")))
        }
    }
}

#[cfg(test)]
mod tests;
