use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

use crate::collector::GrpcService;
use crate::fields;
use crate::headers::Headers;
use crate::matchers::{MetadataMatcher, StringMatcher};
use crate::metadata::Metadata;
use crate::pb;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::route::HeaderOps;
use crate::runtime::{Live, Runtime};

/// Asks a service whether a request (or connection) may go on.
#[derive(Clone, Debug)]
pub struct ExtAuthz {
    /// Who is asked.
    pub service: AuthzService,
    /// If the service does not answer, go on.
    pub failure_mode_allow: bool,
    /// And say so in `x-envoy-auth-failure-mode-allowed`.
    pub failure_mode_allow_header: bool,
    /// The status if the service does not answer.
    pub status_on_error: u16,
    /// Send the body, too.
    pub body: Option<BodyBuffer>,
    /// The route is chosen again after headers were added.
    pub clear_route_cache: bool,
    /// Prefix of its statistics.
    pub stat_prefix: ArcStr,
    /// Denials count among the answers of the route's cluster.
    pub charges_cluster: bool,
    /// Send the client's certificate.
    pub include_peer_certificate: bool,
    /// Send the SNI.
    pub include_tls_session: bool,
    /// Dynamic metadata to send.
    pub metadata_namespaces: Vec<ArcStr>,
    /// The route's metadata to send.
    pub route_metadata_namespaces: Vec<ArcStr>,
    /// Headers are sent one by one, as bytes.
    pub raw_headers: bool,
    /// Answers with headers that cannot be written are refused.
    pub validate_mutations: bool,
    /// Of a refusal's body.
    pub max_denied_body: Option<usize>,
    /// Metadata of answers is taken.
    pub takes_metadata: bool,
    /// What would be refused goes on, and is counted.
    pub shadow: bool,
    enabled: Fraction,
    enabled_metadata: Option<MetadataMatcher>,
    deny_at_disable: Live<bool>,
    allowed_headers: Option<Vec<StringMatcher>>,
    disallowed_headers: Vec<StringMatcher>,
}

/// Who is asked.
#[derive(Clone, Debug)]
pub enum AuthzService {
    /// `envoy.service.auth.v3.Authorization/Check`.
    Grpc {
        /// Where it is.
        service: Arc<GrpcService>,
        /// Answer by then.
        timeout: Duration,
    },
    /// The request's own method and path.
    Http(Box<HttpAuthz>),
}

/// Asking over HTTP.
#[derive(Clone, Debug)]
pub struct HttpAuthz {
    /// The cluster.
    pub cluster: ArcStr,
    /// The host to send.
    pub authority: ArcStr,
    /// Answer by then.
    pub timeout: Duration,
    /// In front of the request's path.
    pub path_prefix: ArcStr,
    /// Instead of the request's path.
    pub path_override: Option<ArcStr>,
    /// Added to the question.
    pub headers_to_add: HeaderOps,
    upstream: Vec<StringMatcher>,
    upstream_append: Vec<StringMatcher>,
    client: Option<Vec<StringMatcher>>,
    client_on_success: Vec<StringMatcher>,
    metadata: Vec<StringMatcher>,
}

/// Sending the body.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BodyBuffer {
    /// Up to so many bytes.
    pub max_bytes: u32,
    /// More is cut off, instead of 413.
    pub allow_partial: bool,
    /// As bytes rather than text (gRPC).
    pub as_bytes: bool,
}

impl BodyBuffer {
    fn compile(settings: &pb::http_filter::ext_authz::v3::BufferSettings) -> Self {
        Self {
            max_bytes: settings.max_request_bytes,
            allow_partial: settings.allow_partial_message,
            as_bytes: settings.pack_as_bytes,
        }
    }
}

/// Headers to set, whatever is there.
fn overwriting(headers: &[pb::core::HeaderValue]) -> Vec<pb::core::HeaderValueOption> {
    let option = |header: &pb::core::HeaderValue| pb::core::HeaderValueOption {
        header: Some(header.clone()),
        append_action: pb::core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..Default::default()
    };
    headers.iter().map(option).collect()
}

/// Whether the service is asked about a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Asked {
    /// It is.
    Yes,
    /// The request goes on without.
    No,
    /// The request is refused without.
    Refused,
}

fn names(of: &[String]) -> Vec<ArcStr> {
    of.iter().map(|n| n.as_str().into()).collect()
}

fn list(matchers: Option<&pb::matcher::ListStringMatcher>) -> Compiled<Vec<StringMatcher>> {
    matchers.map_or(Ok(Vec::new()), |m| StringMatcher::compile_list(&m.patterns))
}

impl AuthzService {
    fn grpc(service: Option<&pb::core::GrpcService>) -> Compiled<Self> {
        let service = service.ok_or_else(|| Invalid::new("grpc_service", "is missing"))?;
        Ok(Self::Grpc {
            service: GrpcService::compile(service).at("grpc_service")?,
            timeout: fields::duration("grpc_service.timeout", service.timeout.as_ref())?
                .unwrap_or(Duration::from_millis(200)),
        })
    }

    fn http(service: &pb::http_filter::ext_authz::v3::HttpService) -> Compiled<Self> {
        use pb::core::http_uri::HttpUpstreamType;
        let uri = service.server_uri.as_ref().ok_or_else(|| Invalid::new("server_uri", "is missing"))?;
        let cluster = match &uri.http_upstream_type {
            Some(HttpUpstreamType::Cluster(cluster)) => fields::required("server_uri.cluster", cluster)?,
            None => return Err(Invalid::new("server_uri.cluster", "is missing")),
        };
        let rest = uri.uri.split_once("://").map_or(uri.uri.as_str(), |(_, rest)| rest);
        let request = service.authorization_request.clone().unwrap_or_default();
        let response = service.authorization_response.clone().unwrap_or_default();
        Ok(Self::Http(Box::new(HttpAuthz {
            cluster,
            authority: rest.split('/').next().unwrap_or(rest).into(),
            timeout: fields::duration("server_uri.timeout", uri.timeout.as_ref())?
                .unwrap_or(Duration::from_millis(200)),
            path_prefix: service.path_prefix.as_str().into(),
            path_override: (!service.path_override.is_empty()).then(|| service.path_override.as_str().into()),
            headers_to_add: HeaderOps::compile(&overwriting(&request.headers_to_add), &[])
                .at("authorization_request.headers_to_add")?,
            upstream: list(response.allowed_upstream_headers.as_ref()).at("allowed_upstream_headers")?,
            upstream_append: list(response.allowed_upstream_headers_to_append.as_ref())?,
            client: response
                .allowed_client_headers
                .as_ref()
                .map(|m| StringMatcher::compile_list(&m.patterns))
                .transpose()?,
            client_on_success: list(response.allowed_client_headers_on_success.as_ref())?,
            metadata: list(response.dynamic_metadata_from_headers.as_ref())?,
        })))
    }
}

impl HttpAuthz {
    /// The path to ask for.
    pub fn path(&self, path: &str) -> String {
        match &self.path_override {
            Some(path) => path.to_string(),
            None => format!("{}{path}", self.path_prefix),
        }
    }

    /// Whether a header of a permission replaces the request's.
    pub fn sets_upstream(&self, name: &str) -> bool {
        any(&self.upstream, name)
    }

    /// Whether a header of a permission is added to the request's.
    pub fn appends_upstream(&self, name: &str) -> bool {
        any(&self.upstream_append, name)
    }

    /// Whether a header of a refusal reaches the client. Without a list all do; with one, these besides (Envoy
    /// `ClientConfig::toClientMatchers`): status, length, `www-authenticate`, `location`.
    pub fn tells_client(&self, name: &str) -> bool {
        let always = [":status", "content-length", "www-authenticate", "location"];
        match &self.client {
            None => name != ":authority",
            Some(list) => always.contains(&name) || any(list, name),
        }
    }

    /// Whether a header of a permission reaches the client.
    pub fn tells_client_on_success(&self, name: &str) -> bool {
        any(&self.client_on_success, name)
    }

    /// Whether a header of the answer goes into dynamic metadata.
    pub fn goes_to_metadata(&self, name: &str) -> bool {
        any(&self.metadata, name)
    }
}

fn any(matchers: &[StringMatcher], name: &str) -> bool {
    matchers.iter().any(|m| m.matches(name.as_bytes()))
}

impl ExtAuthz {
    pub(super) fn compile(config: &pb::http_filter::ext_authz::v3::ExtAuthz, runtime: &Runtime) -> Compiled<Self> {
        crate::constraints::ext_authz(config)?;
        use pb::http_filter::ext_authz::v3::ext_authz::Services;
        refuse! {
            "decoder_header_mutation_rules": config.decoder_header_mutation_rules.is_some(),
            "bootstrap_metadata_labels_key": !config.bootstrap_metadata_labels_key.is_empty(),
            "typed_metadata_context_namespaces": !config.typed_metadata_context_namespaces.is_empty(),
            "route_typed_metadata_context_namespaces": !config.route_typed_metadata_context_namespaces.is_empty(),
        }
        let service = match &config.services {
            Some(Services::GrpcService(service)) => AuthzService::grpc(Some(service))?,
            Some(Services::HttpService(service)) => AuthzService::http(service).at("http_service")?,
            None => return Err(Invalid::new("services", "is missing")),
        };
        let requested = match &config.services {
            Some(Services::HttpService(service)) => {
                service.authorization_request.as_ref().and_then(|r| r.allowed_headers.as_ref())
            }
            _ => None,
        };
        let allowed = config.allowed_headers.as_ref().or(requested);
        Ok(Self {
            service,
            failure_mode_allow: config.failure_mode_allow,
            failure_mode_allow_header: config.failure_mode_allow_header_add,
            status_on_error: config
                .status_on_error
                .as_ref()
                .and_then(|s| u16::try_from(s.code).ok())
                .filter(|s| *s > 0)
                .unwrap_or(403),
            body: config.with_request_body.as_ref().map(BodyBuffer::compile),
            clear_route_cache: config.clear_route_cache,
            stat_prefix: config.stat_prefix.as_str().into(),
            charges_cluster: config.charge_cluster_response_stats.as_ref().is_none_or(|v| v.value),
            include_peer_certificate: config.include_peer_certificate,
            include_tls_session: config.include_tls_session,
            metadata_namespaces: names(&config.metadata_context_namespaces),
            route_metadata_namespaces: names(&config.route_metadata_context_namespaces),
            raw_headers: config.encode_raw_headers,
            validate_mutations: config.validate_mutations,
            max_denied_body: Some(config.max_denied_response_body_bytes as usize).filter(|most| *most > 0),
            takes_metadata: config.enable_dynamic_metadata_ingestion.as_ref().is_none_or(|v| v.value),
            shadow: config.shadow_mode,
            enabled: Fraction::runtime(config.filter_enabled.as_ref(), Fraction::ALL, runtime).at("filter_enabled")?,
            enabled_metadata: config
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatcher::compile)
                .transpose()
                .at("filter_enabled_metadata")?,
            deny_at_disable: runtime.flag(config.deny_at_disable.as_ref(), false),
            allowed_headers: allowed
                .map(|m| StringMatcher::compile_list(&m.patterns))
                .transpose()
                .at("allowed_headers")?,
            disallowed_headers: list(config.disallowed_headers.as_ref()).at("disallowed_headers")?,
        })
    }

    pub(crate) fn compile_network(config: &pb::network_filter::ext_authz::v3::ExtAuthz) -> Compiled<Self> {
        refuse! {
            "shadow_mode": config.shadow_mode,
            "send_tls_alert_on_denial": config.send_tls_alert_on_denial,
            "bootstrap_metadata_labels_key": !config.bootstrap_metadata_labels_key.is_empty(),
            "typed_metadata_context_namespaces": !config.typed_metadata_context_namespaces.is_empty(),
        }
        Ok(Self {
            service: AuthzService::grpc(config.grpc_service.as_ref())?,
            failure_mode_allow: config.failure_mode_allow,
            failure_mode_allow_header: false,
            status_on_error: 403,
            body: None,
            clear_route_cache: false,
            stat_prefix: config.stat_prefix.as_str().into(),
            charges_cluster: false,
            include_peer_certificate: config.include_peer_certificate,
            include_tls_session: config.include_tls_session,
            metadata_namespaces: names(&config.metadata_context_namespaces),
            route_metadata_namespaces: Vec::new(),
            raw_headers: false,
            validate_mutations: false,
            max_denied_body: None,
            takes_metadata: true,
            shadow: false,
            enabled: Fraction::ALL,
            enabled_metadata: config
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatcher::compile)
                .transpose()
                .at("filter_enabled_metadata")?,
            deny_at_disable: Live::fixed(false),
            allowed_headers: None,
            disallowed_headers: Vec::new(),
        })
    }

    /// Whether this request is asked about.
    pub fn is_asked(&self, metadata: &Metadata, random: &mut Random) -> Asked {
        if self.enabled.hit(random) && self.enabled_metadata.as_ref().is_none_or(|m| m.matches(metadata)) {
            Asked::Yes
        } else if self.deny_at_disable.get() {
            Asked::Refused
        } else {
            Asked::No
        }
    }

    /// Whether a header of the request is sent to the service. HTTP services get the method, path, host and
    /// `authorization`-like ones they need in any case.
    pub fn sends(&self, name: &str) -> bool {
        if any(&self.disallowed_headers, name) {
            return false;
        }
        match (&self.allowed_headers, &self.service) {
            (Some(list), AuthzService::Http(_)) => {
                [":method", ":path", ":authority", "authorization"].contains(&name) || any(list, name)
            }
            (None, AuthzService::Http(_)) => [":method", ":path", ":authority", "authorization"].contains(&name),
            (Some(list), AuthzService::Grpc { .. }) => any(list, name),
            (None, AuthzService::Grpc { .. }) => true,
        }
    }

    /// The headers of a request that are sent.
    pub fn sent<'h>(&'h self, headers: &'h Headers) -> impl Iterator<Item = (&'h str, &'h [u8])> {
        headers
            .iter()
            .filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, value)))
            .filter(|(n, _)| self.sends(n))
    }
}

/// Changes to the check at a route.
#[derive(Clone, Debug)]
pub struct ExtAuthzOverride {
    /// Sent along.
    pub context: Vec<(ArcStr, ArcStr)>,
    /// Do not send the body.
    pub no_body: bool,
    /// Send the body like this.
    pub body: Option<BodyBuffer>,
    /// Ask this one instead.
    pub service: Option<AuthzService>,
}

impl ExtAuthzOverride {
    /// `None`: no check at this route.
    pub(super) fn compile(config: &pb::http_filter::ext_authz::v3::ExtAuthzPerRoute) -> Compiled<Option<Self>> {
        use pb::http_filter::ext_authz::v3::check_settings::ServiceOverride;
        use pb::http_filter::ext_authz::v3::ext_authz_per_route::Override;
        let settings = match &config.r#override {
            Some(Override::Disabled(_)) => return Ok(None),
            Some(Override::CheckSettings(settings)) => settings.clone(),
            None => return Err(Invalid::new("override", "is missing")),
        };
        if settings.disable_request_body_buffering && settings.with_request_body.is_some() {
            return Err(Invalid::new("check_settings.with_request_body", "is there, but switched off"));
        }
        let service = match &settings.service_override {
            Some(ServiceOverride::GrpcService(service)) => Some(AuthzService::grpc(Some(service))),
            Some(ServiceOverride::HttpService(service)) => Some(AuthzService::http(service).at("http_service")),
            None => None,
        };
        let mut context: Vec<(ArcStr, ArcStr)> =
            settings.context_extensions.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect();
        context.sort();
        Ok(Some(Self {
            context,
            no_body: settings.disable_request_body_buffering,
            body: settings.with_request_body.as_ref().map(BodyBuffer::compile),
            service: service.transpose().at("check_settings")?,
        }))
    }
}
