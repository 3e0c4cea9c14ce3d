//! HTTP filters: their configuration and their decisions. Waiting, asking others and answering is the proxy's part.

mod composite;
mod cors;
mod descriptors;
mod ext_authz;
mod fault;
mod forward_proxy;
mod grpc_stats;
mod header_to_metadata;
mod istio;
mod jwt;
mod local_rate_limit;
mod session;
mod set_metadata;
mod small;

use std::sync::Arc;

use envoy_api::Message;
use mesh_types::ArcStr;

pub use composite::{Composite, Delegates, Execution, FilterAction, FilterTree};
pub use cors::{CorsDecision, CorsPolicy, cors_decide};
pub use descriptors::{RateLimitContext, RateLimitRule};
pub use ext_authz::{Asked, AuthzService, BodyBuffer, ExtAuthz, ExtAuthzOverride, HttpAuthz};
pub use fault::{Abort, Fault, FaultDecision};
pub use forward_proxy::{ForwardProxy, HostRewrite};
pub use grpc_stats::GrpcStats;
pub use header_to_metadata::{HeaderToMetadata, MetadataRules};
pub use istio::{AlpnOverride, IstioStats, MetricOverride, PeerMetadataConfig, PeerMethod, Reporter};
pub use jwt::{
    ClaimToHeader, JwksSource, JwtAuthn, JwtCounters, JwtOverride, JwtProvider, Needs, Requirement, Token, TokenCache,
    TokenPlace,
};
pub use local_rate_limit::{Demand, Descriptor, LocalRateLimit, TokenBucket, TokenBucketConfig};
pub use session::{SessionCounters, SessionKind, StatefulSession};
pub use set_metadata::SetMetadata;
pub use small::{FilterStateValue, HeaderChanges, HeaderMutation, HealthAnswer, HealthCheckFilter, RouterConfig};

use crate::any::Typed;
use crate::match_tree::{MatchTree, Place};
use crate::pb;
use crate::rbac::Rbac;
use crate::rejected::{At, Compiled, Invalid};
use crate::{Options, fields};

/// One entry of the filter list.
#[derive(Clone, Debug)]
pub struct HttpFilterEntry {
    /// Its name; per-route settings refer to it.
    pub name: ArcStr,
    /// Off, unless a route switches it on.
    pub disabled: bool,
    /// The filter.
    pub filter: HttpFilter,
    /// Whether it takes part, and who in its place (`ExtensionWithMatcher`).
    pub tree: Option<FilterTree>,
}

/// An HTTP filter.
#[derive(Clone, Debug)]
pub enum HttpFilter {
    /// Sends the request on its way. Always the last.
    Router(Arc<RouterConfig>),
    /// Cross-origin requests; policies stand in routes.
    Cors,
    /// Delays and aborts.
    Fault(Arc<Fault>),
    /// Who may do what.
    Rbac(Arc<Rbac>),
    /// JSON web tokens.
    Jwt(Arc<JwtAuthn>),
    /// Asks a service.
    ExtAuthz(Arc<ExtAuthz>),
    /// What others do, as its tree says.
    Composite(Arc<Composite>),
    /// So many requests a time.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Waits for the whole request, up to this many bytes.
    Buffer(u64),
    /// Counts gRPC messages; `true`: into filter state.
    GrpcStats(Arc<GrpcStats>),
    /// Translates the calls of browsers.
    GrpcWeb,
    /// Chooses the ALPN of upstream connections.
    IstioAlpn(Arc<AlpnOverride>),
    /// Exchanges workload metadata with the peer by headers.
    PeerMetadata(Arc<PeerMetadataConfig>),
    /// Istio's metrics.
    IstioStats(Arc<IstioStats>),
    /// Keeps clients at their host.
    StatefulSession(Arc<StatefulSession>),
    /// Writes filter state.
    SetFilterState(Arc<[FilterStateValue]>),
    /// Changes headers.
    HeaderMutation(Arc<HeaderMutation>),
    /// Writes headers into metadata.
    HeaderToMetadata(Arc<HeaderToMetadata>),
    /// Writes fixed metadata.
    SetMetadata(Arc<SetMetadata>),
    /// Answers health checks of this proxy.
    HealthCheck(Arc<HealthCheckFilter>),
    /// Resolves the request's host, for a dynamic forward proxy cluster.
    DynamicForwardProxy(Arc<ForwardProxy>),
    /// Accepted and without effect: an unsupported filter that the operator allowed.
    NoOp {
        /// The message that configured it.
        type_name: ArcStr,
    },
}

/// Settings of a filter at a route, virtual host, weighted cluster or route table.
#[derive(Clone, Debug)]
pub enum PerFilter {
    /// The filter is off here.
    Disabled,
    /// The filter is on here; with its own settings, if there are any.
    Enabled(Option<Arc<PerFilter>>),
    /// Replaces the filter's.
    Fault(Arc<Fault>),
    /// The policy.
    Cors(Arc<CorsPolicy>),
    /// Replaces the filter's rules.
    Rbac(Arc<Rbac>),
    /// Which requirement.
    Jwt(JwtOverride),
    /// Changes to the check.
    ExtAuthz(Arc<ExtAuthzOverride>),
    /// Replaces the filter's.
    LocalRateLimit(Arc<LocalRateLimit>),
    /// Replaces the filter's limit.
    Buffer(u64),
    /// Replaces the filter's.
    StatefulSession(Arc<StatefulSession>),
    /// Replaces the filter's.
    HeaderMutation(Arc<HeaderMutation>),
    /// Replaces the filter's.
    SetFilterState(Arc<[FilterStateValue]>),
    /// Replaces the filter's.
    HeaderToMetadata(Arc<HeaderToMetadata>),
    /// Another name than the request's.
    ForwardProxy(HostRewrite),
    /// Replaces the tree around the filter.
    Tree(FilterTree),
}

const PREFIX: &str = "envoy.extensions.filters.http.";

impl HttpFilterEntry {
    pub(crate) fn compile_all(filters: &[pb::hcm::HttpFilter], options: &Options) -> Compiled<Vec<Self>> {
        let mut all = Vec::with_capacity(filters.len());
        for (i, filter) in filters.iter().enumerate() {
            if let Some(entry) = Self::compile(filter, options).at_index("http_filters", i)? {
                all.push(entry);
            }
        }
        match all.iter().position(|f: &Self| matches!(f.filter, HttpFilter::Router(_))) {
            // Nobody answers then.
            None if filters.is_empty() => Ok(all),
            Some(at) if all[at].disabled => {
                Err(Invalid::new(format!("http_filters[{at}].disabled"), "is for no router"))
            }
            Some(at) if at + 1 == all.len() => Ok(all),
            Some(at) => Err(Invalid::new(format!("http_filters[{at}]"), "the router must be the last filter")),
            None => Err(Invalid::new("http_filters", "the last filter must be the router")),
        }
    }

    /// `None`: the filter is optional and not known.
    fn compile(filter: &pb::hcm::HttpFilter, options: &Options) -> Compiled<Option<Self>> {
        use pb::hcm::http_filter::ConfigType;
        let typed = match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) => Typed::open(Some(any))?,
            Some(ConfigType::ConfigDiscovery(source)) => Typed::discovered(source)?,
            None => return Err(Invalid::new("typed_config", "is missing")),
        };
        let delegating: Option<pb::ext::common::matching::v3::ExtensionWithMatcher> = match typed.name.as_str() {
            "envoy.extensions.common.matching.v3.ExtensionWithMatcher" => Some(typed.decode()?),
            _ => None,
        };
        let name = fields::required("name", &filter.name)?;
        let mut compiler = composite::Compiler { name: &name, options, inline: Vec::new() };
        let (typed, mut tree) = match &delegating {
            None => (typed, None),
            Some(delegating) => {
                let extension = delegating.extension_config.as_ref();
                let extension = extension.ok_or_else(|| Invalid::new("extension_config", "is missing"))?;
                let typed = Typed::open(extension.typed_config.as_ref()).at("extension_config")?;
                (typed, Some(tree_around(delegating, &mut compiler)?))
            }
        };
        let compiled = match HttpFilter::compile(&typed, options)? {
            Some(compiled) => compiled,
            None if typed.name == "envoy.extensions.filters.http.composite.v3.Composite" => {
                let (composite, own) = compiler.composite(&typed.decode()?)?;
                // Routes may bring one.
                tree = tree.or(own).or_else(|| Some(Arc::new(MatchTree::nowhere())));
                HttpFilter::Composite(Arc::new(composite.with(compiler.inline)))
            }
            None if filter.is_optional => return Ok(None),
            None if options.allow_unsupported_filters => HttpFilter::NoOp { type_name: typed.name.as_str().into() },
            None => return Err(typed.unknown()),
        };
        Ok(Some(Self { name, disabled: filter.disabled, filter: compiled, tree }))
    }
}

/// The tree around a filter; without one it is always passed over (Envoy `DelegatingStreamFilter`).
fn tree_around(
    config: &pb::ext::common::matching::v3::ExtensionWithMatcher,
    compiler: &mut composite::Compiler<'_>,
) -> Compiled<FilterTree> {
    match (&config.xds_matcher, &config.matcher) {
        (Some(tree), _) => compiler.tree(tree, Place::Filter).at("xds_matcher"),
        // The older message has the same fields.
        (None, Some(older)) => {
            let tree = pb::xds_matcher::Matcher::decode(older.encode_to_vec().as_slice());
            let tree = tree.map_err(|e| Invalid::new("", e.to_string()));
            tree.and_then(|tree| compiler.tree(&tree, Place::Filter)).at("matcher")
        }
        (None, None) => Ok(Arc::new(MatchTree::always(FilterAction::Skip))),
    }
}

impl HttpFilter {
    /// `None`: no such filter here.
    fn compile(typed: &Typed<'_>, options: &Options) -> Compiled<Option<Self>> {
        use pb::http_filter as http;
        let runtime = &options.runtime;
        let short = typed.name.strip_prefix(PREFIX).unwrap_or(&typed.name);
        Ok(Some(match short {
            "router.v3.Router" => Self::Router(Arc::new(RouterConfig::compile(&typed.decode()?, runtime)?)),
            "cors.v3.Cors" => Self::Cors,
            "fault.v3.HTTPFault" => Self::Fault(Arc::new(Fault::compile(&typed.decode()?, runtime)?)),
            "rbac.v3.RBAC" => Self::Rbac(Arc::new(Rbac::compile_http(&typed.decode()?, options)?)),
            "jwt_authn.v3.JwtAuthentication" => Self::Jwt(Arc::new(JwtAuthn::compile(&typed.decode()?, runtime)?)),
            "ext_authz.v3.ExtAuthz" => Self::ExtAuthz(Arc::new(ExtAuthz::compile(&typed.decode()?, runtime)?)),
            "local_ratelimit.v3.LocalRateLimit" => {
                Self::LocalRateLimit(Arc::new(LocalRateLimit::compile(&typed.decode()?, runtime)?))
            }
            "buffer.v3.Buffer" => Self::Buffer(buffer_limit(&typed.decode()?)?),
            "grpc_stats.v3.FilterConfig" => Self::GrpcStats(Arc::new(GrpcStats::compile(&typed.decode()?))),
            "grpc_web.v3.GrpcWeb" => Self::GrpcWeb,
            "stateful_session.v3.StatefulSession" => {
                Self::StatefulSession(Arc::new(StatefulSession::compile(&typed.decode()?)?))
            }
            "set_filter_state.v3.Config" => {
                let config: http::set_filter_state::v3::Config = typed.decode()?;
                Self::SetFilterState(FilterStateValue::compile_all(&config.on_request_headers)?)
            }
            "header_mutation.v3.HeaderMutation" => {
                let config: http::header_mutation::v3::HeaderMutation = typed.decode()?;
                Self::HeaderMutation(Arc::new(HeaderMutation {
                    most_specific_wins: config.most_specific_header_mutations_wins,
                    ..HeaderMutation::compile(config.mutations.as_ref())?
                }))
            }
            "header_to_metadata.v3.Config" => {
                Self::HeaderToMetadata(Arc::new(HeaderToMetadata::compile(&typed.decode()?)?))
            }
            "set_metadata.v3.Config" => Self::SetMetadata(Arc::new(SetMetadata::compile(&typed.decode()?)?)),
            "health_check.v3.HealthCheck" => Self::HealthCheck(Arc::new(HealthCheckFilter::compile(&typed.decode()?)?)),
            "dynamic_forward_proxy.v3.FilterConfig" => {
                Self::DynamicForwardProxy(Arc::new(ForwardProxy::compile(&typed.decode()?)?))
            }
            "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig" => {
                Self::IstioAlpn(Arc::new(AlpnOverride::compile(&typed.decode()?)?))
            }
            "io.istio.http.peer_metadata.Config" => {
                Self::PeerMetadata(Arc::new(PeerMetadataConfig::of(&typed.fields()?)?))
            }
            "stats.PluginConfig" => Self::IstioStats(Arc::new(IstioStats::compile(&typed.decode()?)?)),
            _ => return Ok(None),
        }))
    }
}

fn buffer_limit(buffer: &pb::http_filter::buffer::v3::Buffer) -> Compiled<u64> {
    match fields::uint(buffer.max_request_bytes.as_ref(), 0) {
        0 => Err(Invalid::new("max_request_bytes", "must be greater than 0")),
        limit => Ok(limit.into()),
    }
}

impl PerFilter {
    fn of_tree(name: &ArcStr, tree: &pb::xds_matcher::Matcher, options: &Options) -> Compiled<Self> {
        let mut compiler = composite::Compiler { name, options, inline: Vec::new() };
        Ok(Self::Tree(compiler.tree(tree, Place::FilterOfRoute)?))
    }

    /// `None`: optional and not known, or nothing is said.
    pub(crate) fn compile(name: &ArcStr, any: &pb::Any, options: &Options) -> Compiled<Option<Self>> {
        use pb::http_filter as http;
        let runtime = &options.runtime;
        let typed = Typed::open(Some(any))?;
        if typed.name == "envoy.config.route.v3.FilterConfig" {
            let config: pb::route::FilterConfig = typed.decode()?;
            if config.disabled {
                return Ok(Some(Self::Disabled));
            }
            if config == Default::default() {
                return Err(Invalid::new("config", "is missing"));
            }
            let inner = match &config.config {
                None => None,
                // `{}`: it is on, and that is all.
                Some(any) if any.type_url.is_empty() => None,
                Some(any) => match Self::compile(name, any, options) {
                    Ok(inner) => inner,
                    Err(_) if config.is_optional => return Ok(None),
                    Err(invalid) => return Err(invalid).at("config"),
                },
            };
            return Ok(Some(match inner {
                Some(Self::Disabled) => Self::Disabled,
                inner => Self::Enabled(inner.map(Arc::new)),
            }));
        }
        let short = typed.name.strip_prefix(PREFIX).unwrap_or(&typed.name);
        Ok(Some(match short {
            "fault.v3.HTTPFault" => Self::Fault(Arc::new(Fault::compile(&typed.decode()?, runtime)?)),
            "cors.v3.CorsPolicy" => Self::Cors(Arc::new(CorsPolicy::compile(&typed.decode()?, runtime)?)),
            "rbac.v3.RBACPerRoute" => {
                let config: http::rbac::v3::RbacPerRoute = typed.decode()?;
                // Without rules the filter is off for the route.
                Self::Rbac(Arc::new(Rbac::compile_http(&config.rbac.unwrap_or_default(), options)?))
            }
            "envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute" => {
                let config: pb::ext::common::matching::v3::ExtensionWithMatcherPerRoute = typed.decode()?;
                let tree = config.xds_matcher.unwrap_or_default();
                Self::of_tree(name, &tree, options).at("xds_matcher")?
            }
            "composite.v3.CompositePerRoute" => {
                let config: http::composite::v3::CompositePerRoute = typed.decode()?;
                Self::of_tree(name, &config.matcher.unwrap_or_default(), options).at("matcher")?
            }
            "dynamic_forward_proxy.v3.PerRouteConfig" => Self::ForwardProxy(HostRewrite::compile(typed.decode()?)),
            "jwt_authn.v3.PerRouteConfig" => Self::Jwt(JwtOverride::compile(&typed.decode()?)?),
            "ext_authz.v3.ExtAuthzPerRoute" => match ExtAuthzOverride::compile(&typed.decode()?)? {
                None => Self::Disabled,
                Some(settings) => Self::ExtAuthz(Arc::new(settings)),
            },
            "local_ratelimit.v3.LocalRateLimit" => {
                let limit = LocalRateLimit::compile(&typed.decode()?, runtime)?;
                if limit.bucket.is_none() {
                    return Err(Invalid::new("token_bucket", "is missing"));
                }
                Self::LocalRateLimit(Arc::new(limit))
            }
            "buffer.v3.BufferPerRoute" => {
                use http::buffer::v3::buffer_per_route::Override;
                let config: http::buffer::v3::BufferPerRoute = typed.decode()?;
                match config.r#override {
                    Some(Override::Disabled(true)) => Self::Disabled,
                    Some(Override::Buffer(buffer)) => Self::Buffer(buffer_limit(&buffer)?),
                    Some(Override::Disabled(false)) => return Err(Invalid::new("disabled", "must be true")),
                    None => return Err(Invalid::new("override", "is missing")),
                }
            }
            "stateful_session.v3.StatefulSessionPerRoute" => {
                use http::stateful_session::v3::stateful_session_per_route::Override;
                let config: http::stateful_session::v3::StatefulSessionPerRoute = typed.decode()?;
                match config.r#override {
                    Some(Override::Disabled(true)) => Self::Disabled,
                    Some(Override::StatefulSession(session)) => {
                        Self::StatefulSession(Arc::new(StatefulSession::compile(&session)?))
                    }
                    _ => return Ok(None),
                }
            }
            "header_mutation.v3.HeaderMutationPerRoute" => {
                let config: http::header_mutation::v3::HeaderMutationPerRoute = typed.decode()?;
                Self::HeaderMutation(Arc::new(HeaderMutation::compile(config.mutations.as_ref())?))
            }
            "set_filter_state.v3.Config" => {
                let config: http::set_filter_state::v3::Config = typed.decode()?;
                Self::SetFilterState(FilterStateValue::compile_all(&config.on_request_headers)?)
            }
            "header_to_metadata.v3.Config" => {
                Self::HeaderToMetadata(Arc::new(HeaderToMetadata::of_route(&typed.decode()?)?))
            }
            _ if options.allow_unsupported_filters => return Ok(None),
            _ => return Err(typed.unknown()),
        }))
    }

    /// Settings behind a mere switch-on.
    pub fn settings(&self) -> Option<&PerFilter> {
        match self {
            Self::Enabled(inner) => inner.as_deref(),
            other => Some(other),
        }
    }
}
