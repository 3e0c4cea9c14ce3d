//! Route tables: virtual host by domain, route by conditions, and what the route does to request and response.

mod action;
mod domains;
mod hashing;
mod header_ops;
mod internal_redirect;
mod matching;
mod redirect;
mod template;
mod timeouts;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

pub use action::{
    Action, ClusterSpecifier, Connect, DirectResponse, Forward, HostRewrite, Mirror, PathRewrite, Priority,
    WeightedCluster, set_authority,
};
pub use hashing::{HashContext, HashPolicy, SetCookie};
pub use header_ops::HeaderOps;
pub use internal_redirect::{Hop, InternalRedirect, NotFollowed, PreviousRoutes};
pub use matching::RouteMatcher;
pub(crate) use matching::is_grpc;
pub(crate) use matching::without_parameters;
pub use redirect::{Redirect, own_location, tls_location};
pub(crate) use template::template_regex;
pub use timeouts::{Timeouts, grpc_timeout};

use crate::any::Typed;
use crate::filters::{CorsPolicy, PerFilter, RateLimitRule};
use crate::format::FormatContext;
use crate::hcm::RouteTracing;
use crate::headers::Headers;
use crate::match_tree::{MatchData, MatchTree, Place};
use crate::matchers::{HeaderMatcher, header_matchers};
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid, Result, refuse};
use crate::retry::RetryPolicy;
use crate::rules;
use crate::stream_info::TlsInfo;
use crate::{Options, constraints, fields};
use domains::Domains;

/// A compiled route configuration.
#[derive(Debug)]
pub struct RouteTable {
    /// What matched requests keep of it.
    pub common: Arc<TableCommon>,
    hosts: Vec<Arc<VirtualHost>>,
    domains: Domains,
    ignore_port: bool,
    host_header: Option<Box<str>>,
}

/// The parts of a route configuration that apply to all of its routes.
#[derive(Debug)]
pub struct TableCommon {
    /// The route configuration's name.
    pub name: ArcStr,
    /// Paths match without what stands behind a semicolon.
    pub ignore_path_parameters: bool,
    /// Header changes of this level.
    pub request_ops: HeaderOps,
    /// Header changes of this level.
    pub response_ops: HeaderOps,
    /// Inner levels are applied last, so that they win.
    pub most_specific_wins: bool,
    /// Removed from requests that come from outside.
    pub internal_only_headers: Vec<Box<str>>,
    /// Filter settings of this level.
    pub per_filter: PerFilterTable,
    /// Metadata.
    pub metadata: Metadata,
    /// Clusters must exist when the table comes (static tables only, by default).
    pub validate_clusters: Option<bool>,
}

/// Filter settings by the filter's name.
pub type PerFilterTable = HashMap<ArcStr, PerFilter>;

/// Which requests must come over TLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RequireTls {
    /// None.
    None,
    /// Those from outside.
    ExternalOnly,
    /// All.
    All,
}

/// A compiled virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: ArcStr,
    /// Its domains as configured.
    pub domains: Vec<ArcStr>,
    /// In the order in which they are tried; with a matcher tree, those of all its actions.
    pub routes: Vec<Arc<Route>>,
    /// Which of them are tried.
    tree: Option<MatchTree<Range<usize>>>,
    /// Which requests are redirected to https.
    pub require_tls: RequireTls,
    /// Header changes of this level.
    pub request_ops: HeaderOps,
    /// Header changes of this level.
    pub response_ops: HeaderOps,
    /// Filter settings of this level.
    pub per_filter: PerFilterTable,
    /// Retries of routes that say nothing.
    pub retry: Option<Arc<RetryPolicy>>,
    /// CORS of routes that say nothing.
    pub cors: Option<Arc<CorsPolicy>>,
    /// Send `x-envoy-attempt-count` upstream.
    pub include_request_attempt_count: bool,
    /// Send `x-envoy-attempt-count` downstream.
    pub include_attempt_count_in_response: bool,
    /// Send `x-envoy-is-timeout-retry` upstream.
    pub include_is_timeout_retry_header: bool,
    /// Mirrors of routes that have none.
    pub mirrors: Vec<Mirror>,
    /// Bytes of a request that are kept for retries.
    pub request_body_buffer_limit: Option<u64>,
    /// Rate limit descriptors.
    pub rate_limits: Vec<RateLimitRule>,
    /// Metadata.
    pub metadata: Metadata,
    virtual_clusters: Box<[VirtualCluster]>,
    /// What requests of no virtual cluster count under; `None`: there are no virtual clusters.
    other_requests: Option<ArcStr>,
}

/// Requests of a virtual host that are named and counted by themselves.
#[derive(Debug)]
pub struct VirtualCluster {
    /// Its name.
    pub name: ArcStr,
    /// Its place among the statistics: `VHOST.vcluster.NAME`.
    pub stat_name: ArcStr,
    headers: Box<[HeaderMatcher]>,
}

/// A compiled route.
#[derive(Debug)]
pub struct Route {
    /// Its name; may be empty.
    pub name: ArcStr,
    /// Its place in the virtual host.
    pub index: usize,
    /// When it applies.
    pub matcher: RouteMatcher,
    /// What it does.
    pub action: Action,
    /// Metadata.
    pub metadata: Metadata,
    /// Name of the trace span.
    pub decorator: Option<Decorator>,
    /// Tracing of this route.
    pub tracing: Option<RouteTracing>,
    /// Header changes of this level.
    pub request_ops: HeaderOps,
    /// Header changes of this level.
    pub response_ops: HeaderOps,
    /// Filter settings of this level.
    pub per_filter: PerFilterTable,
    /// Bytes of a request that are kept for retries.
    pub request_body_buffer_limit: Option<u64>,
    /// Its place among the statistics, if it has one: `VHOST.route.PREFIX`.
    pub stat_name: Option<ArcStr>,
}

/// Names spans.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decorator {
    /// The span's operation.
    pub operation: ArcStr,
    /// Send it upstream as `x-envoy-decorator-operation`.
    pub propagate: bool,
}

/// What the choice of a route looks at.
#[derive(Clone, Copy, Debug)]
pub struct RouteInput<'a> {
    /// Request head after normalisation.
    pub headers: &'a Headers,
    /// Written by filters.
    pub metadata: &'a Metadata,
    /// Written by filters.
    pub filter_state: &'a FilterState,
    /// The downstream handshake.
    pub tls: Option<&'a TlsInfo>,
    /// One number for the whole request: decides fractions and weights.
    pub random: u64,
}

/// The outcome of [`RouteTable::find`].
#[derive(Debug)]
pub enum RouteResult {
    /// A route.
    Found(Matched),
    /// No virtual host has the domain: 404, flag NR, details `route_not_found`.
    NoVirtualHost,
    /// No route of the virtual host matches: as before.
    NoRoute(Arc<VirtualHost>),
    /// The virtual host wants TLS: 301 to this location.
    RedirectToTls(Arc<VirtualHost>, String),
}

/// A route with the levels around it, to be kept while the request lives.
#[derive(Clone, Debug)]
pub struct Matched {
    /// The table's level.
    pub table: Arc<TableCommon>,
    /// The virtual host.
    pub vhost: Arc<VirtualHost>,
    /// The route.
    pub route: Arc<Route>,
    /// Which of the weighted clusters was drawn.
    pub weighted: Option<usize>,
}

impl RouteTable {
    /// Compiles a `config.route.v3.RouteConfiguration`.
    pub fn compile(config: &pb::route::RouteConfiguration, options: &Options) -> Result<Self> {
        rules::check(config)
            .and_then(|()| Self::build(config, options))
            .map_err(|invalid| invalid.of("route configuration", &config.name))
    }

    pub(crate) fn build(config: &pb::route::RouteConfiguration, options: &Options) -> Compiled<Self> {
        refuse! {
            "vhds": config.vhds.is_some(),
            "cluster_specifier_plugins": !config.cluster_specifier_plugins.is_empty(),
            "route_specifiers": !config.route_specifiers.is_empty(),
        }
        constraints::table(config)?;
        let body_limit = fields::uint(config.max_direct_response_body_size_bytes.as_ref(), 4096) as usize;
        let mirrors = Mirror::compile_all(&config.request_mirror_policies, options)?;
        let mut hosts = Vec::with_capacity(config.virtual_hosts.len());
        for (i, host) in config.virtual_hosts.iter().enumerate() {
            let host = VirtualHost::compile(host, body_limit, &mirrors, options).at_index("virtual_hosts", i)?;
            hosts.push(Arc::new(host));
        }
        Ok(Self {
            domains: Domains::compile(&hosts)?,
            hosts,
            ignore_port: config.ignore_port_in_host_matching,
            host_header: (!config.vhost_header.is_empty()).then(|| config.vhost_header.to_ascii_lowercase().into()),
            common: Arc::new(TableCommon {
                name: config.name.as_str().into(),
                ignore_path_parameters: config.ignore_path_parameters_in_path_matching,
                request_ops: HeaderOps::compile(&config.request_headers_to_add, &config.request_headers_to_remove)
                    .at("request_headers_to_add")?,
                response_ops: HeaderOps::compile(&config.response_headers_to_add, &config.response_headers_to_remove)
                    .at("response_headers_to_add")?,
                most_specific_wins: config.most_specific_header_mutations_wins,
                internal_only_headers: config
                    .internal_only_headers
                    .iter()
                    .map(|h| h.to_ascii_lowercase().into())
                    .collect(),
                per_filter: per_filter(&config.typed_per_filter_config, options)?,
                metadata: Metadata::compile(config.metadata.as_ref()),
                validate_clusters: config.validate_clusters.as_ref().map(|v| v.value),
            }),
        })
    }

    /// All virtual hosts in the order of the configuration.
    pub fn virtual_hosts(&self) -> &[Arc<VirtualHost>] {
        &self.hosts
    }

    /// The virtual host for a `Host` or `:authority` value.
    pub fn virtual_host(&self, authority: &str) -> Option<&Arc<VirtualHost>> {
        let host = if self.ignore_port { without_port(authority) } else { authority };
        self.domains.find(host).map(|index| &self.hosts[index])
    }

    /// Chooses virtual host and route (Envoy `RouteMatcher::route`).
    pub fn find(&self, input: &RouteInput<'_>) -> RouteResult {
        let authority = match &self.host_header {
            Some(name) => input.headers.get_str(name),
            None => input.headers.authority(),
        };
        // Not even the host of all domains is for who does not say one where another header does.
        if authority.is_none() && self.host_header.is_some() {
            return RouteResult::NoVirtualHost;
        }
        let Some(vhost) = self.virtual_host(authority.unwrap_or_default()) else {
            return RouteResult::NoVirtualHost;
        };
        // To Envoy, who does not know how the client came gets no route (`VirtualHostImpl::getRouteFromEntries`).
        let mut schemes = input.headers.get_all("x-forwarded-proto");
        if schemes.next().is_some_and(<[u8]>::is_empty) && schemes.next().is_none() {
            return RouteResult::NoRoute(Arc::clone(vhost));
        }
        if vhost.wants_tls(input.headers) {
            let location = tls_location(input.headers);
            return RouteResult::RedirectToTls(Arc::clone(vhost), location);
        }
        match vhost
            .candidates(input)
            .iter()
            .find(|route| route.matcher.matches(input, self.common.ignore_path_parameters))
        {
            None => RouteResult::NoRoute(Arc::clone(vhost)),
            Some(route) => {
                let weighted = route.forward().and_then(|f| f.draw(input.headers, input.random));
                // All weights are 0 by the runtime.
                if weighted.is_none() && route.forward().is_some_and(Forward::is_weighted) {
                    return RouteResult::NoRoute(Arc::clone(vhost));
                }
                RouteResult::Found(Matched {
                    table: Arc::clone(&self.common),
                    vhost: Arc::clone(vhost),
                    route: Arc::clone(route),
                    weighted,
                })
            }
        }
    }

    /// Why a route of this table does not apply to a request, in words; `None` if it does.
    pub fn mismatch(&self, route: &Route, input: &RouteInput<'_>) -> Option<String> {
        route.matcher.mismatch(input, self.common.ignore_path_parameters)
    }

    /// All names under which requests count besides their clusters.
    pub fn stat_names(&self) -> impl Iterator<Item = &ArcStr> {
        self.hosts.iter().flat_map(|host| host.stat_names())
    }

    /// The settings of filters at all levels but those of weighted clusters.
    pub fn filter_settings(&self) -> impl Iterator<Item = &PerFilter> {
        let routes = self.hosts.iter().flat_map(|host| &host.routes).map(|route| &route.per_filter);
        let outer = self.hosts.iter().map(|host| &host.per_filter).chain([&self.common.per_filter]);
        routes.chain(outer).flat_map(|level| level.values()).filter_map(PerFilter::settings)
    }

    /// Names of all clusters that its routes may go to, for validation and dumps.
    pub fn cluster_names(&self) -> impl Iterator<Item = &ArcStr> {
        self.hosts.iter().flat_map(|host| {
            let forwards = || host.routes.iter().filter_map(|route| route.forward());
            // What routes without mirrors of their own inherit.
            let inherit = forwards().any(|forward| forward.mirrors.is_empty());
            let inherited = host.mirrors.iter().filter(move |mirror| inherit && mirror.header.is_none());
            forwards().flat_map(Forward::cluster_names).chain(inherited.map(|mirror| &mirror.cluster))
        })
    }
}

/// The host without its port (Envoy `HeaderUtility::getPortStart`): what stands behind the last colon, whatever it is.
pub(crate) fn without_port(authority: &str) -> &str {
    match authority.rfind(':') {
        // An IPv6 address needs its brackets before the port.
        Some(at) if authority.rfind(']').is_none_or(|end| end < at) => &authority[..at],
        _ => authority,
    }
}

fn per_filter(configs: &HashMap<String, pb::Any>, options: &Options) -> Compiled<PerFilterTable> {
    let mut table = PerFilterTable::new();
    for (name, any) in configs {
        let key = name.as_str().into();
        if let Some(settings) = PerFilter::compile(&key, any, options).at_key("typed_per_filter_config", name)? {
            table.insert(key, settings);
        }
    }
    Ok(table)
}

/// A tree whose actions are routes, which `add` numbers.
fn route_tree(
    matcher: &pb::xds_matcher::Matcher,
    add: &mut dyn FnMut(&pb::route::Route) -> Compiled<usize>,
    options: &Options,
) -> Compiled<MatchTree<Range<usize>>> {
    MatchTree::compile(matcher, Place::VirtualHost, options, &mut |typed: &Typed<'_>| {
        let routes = match typed.name.as_str() {
            "envoy.config.route.v3.Route" => vec![typed.decode()?],
            "envoy.config.route.v3.RouteList" => typed.decode::<pb::route::RouteList>()?.routes,
            _ => return Err(typed.unknown()),
        };
        let mut range = 0..0;
        for (i, route) in routes.iter().enumerate() {
            let end = add(route).at_index("routes", i)?;
            range = end - 1 - i..end;
        }
        Ok(range)
    })
}

impl VirtualHost {
    fn compile(
        host: &pb::route::VirtualHost,
        body_limit: usize,
        outer_mirrors: &[Mirror],
        options: &Options,
    ) -> Compiled<Self> {
        refuse! {
            "hedge_policy": host.hedge_policy.as_ref().is_some_and(|h| h.hedge_on_per_try_timeout),
            "retry_policy_typed_config": host.retry_policy_typed_config.is_some(),
            "route_specifiers": !host.route_specifiers.is_empty(),
        }
        constraints::virtual_host(host)?;
        if host.domains.is_empty() {
            return Err(Invalid::new("domains", "is empty"));
        }
        let mut routes = Vec::with_capacity(host.routes.len());
        let mut add = |route: &pb::route::Route| {
            routes.push(Arc::new(Route::compile(route, &host.name, routes.len(), body_limit, options)?));
            Ok(routes.len())
        };
        for (index, route) in host.routes.iter().enumerate() {
            add(route).at_index("routes", index)?;
        }
        let tree = host.matcher.as_ref().map(|matcher| route_tree(matcher, &mut add, options)).transpose();
        let tree = tree.at("matcher")?;
        if tree.is_some() && !host.routes.is_empty() {
            return Err(Invalid::new("matcher", "cannot set both matcher and routes on virtual host"));
        }
        let mirrors = Mirror::compile_all(&host.request_mirror_policies, options)?;
        let stat_name = |cluster: &str| ArcStr::from(format!("{}.vcluster.{cluster}", host.name));
        let mut virtual_clusters = Vec::with_capacity(host.virtual_clusters.len());
        for (i, cluster) in host.virtual_clusters.iter().enumerate() {
            virtual_clusters.push(VirtualCluster {
                name: cluster.name.as_str().into(),
                stat_name: stat_name(&cluster.name),
                headers: header_matchers("headers", &cluster.headers).at_index("virtual_clusters", i)?,
            });
        }
        Ok(Self {
            name: fields::required("name", &host.name)?,
            domains: host.domains.iter().map(|d| d.as_str().into()).collect(),
            routes,
            tree,
            require_tls: match host.require_tls {
                0 => RequireTls::None,
                1 => RequireTls::ExternalOnly,
                2 => RequireTls::All,
                other => return Err(Invalid::new("require_tls", format!("{other} is no known value"))),
            },
            request_ops: HeaderOps::compile(&host.request_headers_to_add, &host.request_headers_to_remove)
                .at("request_headers_to_add")?,
            response_ops: HeaderOps::compile(&host.response_headers_to_add, &host.response_headers_to_remove)
                .at("response_headers_to_add")?,
            per_filter: per_filter(&host.typed_per_filter_config, options)?,
            retry: host.retry_policy.as_ref().map(RetryPolicy::compile).transpose().at("retry_policy")?.map(Arc::new),
            cors: CorsPolicy::of_route(host.cors.as_ref(), &options.runtime).at("cors")?.map(Arc::new),
            include_request_attempt_count: host.include_request_attempt_count,
            include_attempt_count_in_response: host.include_attempt_count_in_response,
            include_is_timeout_retry_header: host.include_is_timeout_retry_header,
            mirrors: if mirrors.is_empty() { outer_mirrors.to_vec() } else { mirrors },
            request_body_buffer_limit: body_buffer(
                host.request_body_buffer_limit.as_ref().map(|v| v.value),
                host.per_request_buffer_limit_bytes.as_ref(),
            ),
            rate_limits: RateLimitRule::compile_all(&host.rate_limits)?,
            metadata: Metadata::compile(host.metadata.as_ref()),
            other_requests: (!virtual_clusters.is_empty()).then(|| stat_name("other")),
            virtual_clusters: virtual_clusters.into(),
        })
    }

    /// The routes that a request may get.
    fn candidates(&self, input: &RouteInput<'_>) -> &[Arc<Route>] {
        let Some(tree) = &self.tree else { return &self.routes };
        let data =
            MatchData { request: Some(input.headers), filter_state: Some(input.filter_state), ..MatchData::default() };
        let range = tree.evaluate(&data).found();
        range.and_then(|range| self.routes.get(range.clone())).unwrap_or_default()
    }

    fn wants_tls(&self, headers: &Headers) -> bool {
        match self.require_tls {
            RequireTls::None => false,
            _ if headers.get_str("x-forwarded-proto") == Some("https") => false,
            RequireTls::All => true,
            RequireTls::ExternalOnly => headers.get_str("x-envoy-internal") != Some("true"),
        }
    }

    /// The first virtual cluster whose conditions the request fulfils.
    pub fn virtual_cluster(&self, headers: &Headers) -> Option<&VirtualCluster> {
        self.virtual_clusters.iter().find(|cluster| cluster.headers.iter().all(|m| m.matches(headers)))
    }

    /// Under which name a request counts besides its cluster: that of its virtual cluster, or `VHOST.vcluster.other`.
    pub fn stat_name<'a>(&'a self, cluster: Option<&'a VirtualCluster>) -> Option<&'a ArcStr> {
        cluster.map(|cluster| &cluster.stat_name).or(self.other_requests.as_ref())
    }

    /// All names under which requests count besides their clusters, those of routes included.
    pub fn stat_names(&self) -> impl Iterator<Item = &ArcStr> {
        let clusters = self.virtual_clusters.iter().map(|cluster| &cluster.stat_name).chain(&self.other_requests);
        clusters.chain(self.routes.iter().filter_map(|route| route.stat_name.as_ref()))
    }
}

fn body_buffer(limit: Option<u64>, old: Option<&pb::UInt32Value>) -> Option<u64> {
    limit.or(old.map(|v| v.value.into()))
}

impl Route {
    fn compile(
        route: &pb::route::Route,
        vhost: &str,
        index: usize,
        body_limit: usize,
        options: &Options,
    ) -> Compiled<Self> {
        refuse!("route_specifiers": !route.route_specifiers.is_empty());
        let matcher = route.r#match.as_ref().ok_or_else(|| Invalid::new("match", "is missing"))?;
        let share = |fraction: &Option<pb::kind::FractionalPercent>, key| {
            Ok(Fraction::compile(fraction.as_ref(), Fraction::ALL)?.under(key, &options.runtime))
        };
        Ok(Self {
            name: route.name.as_str().into(),
            index,
            matcher: RouteMatcher::compile(matcher, &options.runtime).at("match")?,
            action: Action::compile(route, body_limit, options)?,
            metadata: Metadata::compile(route.metadata.as_ref()),
            decorator: match &route.decorator {
                None => None,
                Some(decorator) => Some(Decorator {
                    operation: fields::required("decorator.operation", &decorator.operation)?,
                    propagate: fields::flag(decorator.propagate.as_ref(), true),
                }),
            },
            tracing: match &route.tracing {
                None => None,
                Some(tracing) => Some(RouteTracing::compile(tracing, share).at("tracing")?),
            },
            request_ops: HeaderOps::compile(&route.request_headers_to_add, &route.request_headers_to_remove)
                .at("request_headers_to_add")?,
            response_ops: HeaderOps::compile(&route.response_headers_to_add, &route.response_headers_to_remove)
                .at("response_headers_to_add")?,
            per_filter: per_filter(&route.typed_per_filter_config, options)?,
            request_body_buffer_limit: body_buffer(
                route.request_body_buffer_limit.as_ref().map(|v| v.value),
                route.per_request_buffer_limit_bytes.as_ref(),
            ),
            stat_name: (!route.stat_prefix.is_empty()).then(|| format!("{vhost}.route.{}", route.stat_prefix).into()),
        })
    }

    /// Whether it answers by itself, with a redirect or a body.
    pub fn answers(&self) -> bool {
        matches!(self.action, Action::Redirect(_) | Action::Direct(_))
    }

    /// The forwarding action, if that is what it does.
    pub fn forward(&self) -> Option<&Forward> {
        match &self.action {
            Action::Forward(forward) => Some(forward),
            _ => None,
        }
    }
}

impl Matched {
    /// The forwarding action, if that is what the route does.
    pub fn forward(&self) -> Option<&Forward> {
        self.route.forward()
    }

    /// Where hash policies draw the weighted cluster, chooses it anew, if they give a hash.
    pub fn draw_by_hash(&mut self, cx: &HashContext<'_>) {
        if let Some(forward) = self.route.forward()
            && forward.draws_by_hash()
            && let (Some(hash), _) = forward.hash(&[], cx)
        {
            self.weighted = forward.draw(cx.headers, hash);
        }
    }

    fn weighted(&self) -> Option<&WeightedCluster> {
        match (&self.forward()?.clusters, self.weighted) {
            (ClusterSpecifier::Weighted { clusters, .. }, Some(index)) => clusters.get(index),
            _ => None,
        }
    }

    /// The cluster's name: fixed, drawn, or out of a header. `None` if the header is missing.
    pub fn cluster(&self, headers: &Headers) -> Option<ArcStr> {
        let by_header = |name: &str| headers.get_str(name).filter(|v| !v.is_empty()).map(ArcStr::from);
        match &self.forward()?.clusters {
            ClusterSpecifier::Single(name) => Some(name.clone()),
            ClusterSpecifier::Header(header) => by_header(header),
            ClusterSpecifier::Weighted { .. } => {
                let cluster = self.weighted()?;
                match &cluster.header {
                    Some(header) => by_header(header),
                    None => Some(cluster.name.clone()),
                }
            }
        }
    }

    /// Subset criteria of the drawn cluster, else of the route.
    pub fn metadata_match(&self) -> Option<&crate::MetadataMatch> {
        self.weighted().and_then(|w| w.metadata_match.as_ref()).or(self.forward()?.metadata_match.as_ref())
    }

    /// Settings for a filter by its name in the filter list: those of the innermost level that has some.
    pub fn per_filter(&self, filter: &str) -> Option<&PerFilter> {
        self.weighted()
            .and_then(|w| w.per_filter.get(filter))
            .or_else(|| self.route.per_filter.get(filter))
            .or_else(|| self.vhost.per_filter.get(filter))
            .or_else(|| self.table.per_filter.get(filter))
    }

    /// Settings for a filter at all levels, the innermost first.
    pub fn per_filters<'a>(&'a self, filter: &'a str) -> impl DoubleEndedIterator<Item = &'a PerFilter> {
        let outer = [&self.route.per_filter, &self.vhost.per_filter, &self.table.per_filter];
        let levels = self.weighted().map(|w| &w.per_filter).into_iter().chain(outer);
        levels.filter_map(move |level| level.get(filter))
    }

    /// Retries: the route's, else the virtual host's.
    pub fn retry_policy(&self) -> Option<&Arc<RetryPolicy>> {
        self.forward()?.retry.as_ref().or(self.vhost.retry.as_ref())
    }

    /// As [`cors_policies_of`](Matched::cors_policies_of) the filter with the usual name.
    pub fn cors_policies(&self) -> Vec<&CorsPolicy> {
        self.cors_policies_of("envoy.filters.http.cors")
    }

    /// CORS policies of the filter with this name, the innermost first; those of the deprecated fields if there are no others. Only
    /// routes to clusters have some.
    pub fn cors_policies_of<'a>(&'a self, filter: &'a str) -> Vec<&'a CorsPolicy> {
        let Some(forward) = self.forward() else { return Vec::new() };
        let policies: Vec<_> = self
            .per_filters(filter)
            .filter_map(|per| match per.settings() {
                Some(PerFilter::Cors(policy)) => Some(&**policy),
                _ => None,
            })
            .collect();
        match policies.is_empty() {
            true => forward.cors.iter().chain(&self.vhost.cors).map(|policy| &**policy).collect(),
            false => policies,
        }
    }

    /// Mirrors: the route's, else those of the outer levels.
    pub fn mirrors(&self) -> &[Mirror] {
        match self.forward() {
            Some(forward) if !forward.mirrors.is_empty() => &forward.mirrors,
            _ => &self.vhost.mirrors,
        }
    }

    /// Rate limit rules: the route's, the virtual host's, and whether the route wants both. Only routes to clusters
    /// have some.
    pub fn rate_limit_rules(&self) -> Option<(&[RateLimitRule], &[RateLimitRule], bool)> {
        let forward = self.forward()?;
        Some((&forward.rate_limits, &self.vhost.rate_limits, forward.include_vhost_rate_limits))
    }

    /// Bytes of a request that may be kept for retries; `None`: the connection's limit.
    pub fn body_buffer_limit(&self) -> Option<u64> {
        self.route.request_body_buffer_limit.or(self.vhost.request_body_buffer_limit)
    }

    fn levels(&self, pick: impl Fn(&Self, usize) -> &HeaderOps) -> [&HeaderOps; 3] {
        // Envoy applies the route first and the table last, so that outer levels win, unless told otherwise.
        match self.table.most_specific_wins {
            false => [pick(self, 0), pick(self, 1), pick(self, 2)],
            true => [pick(self, 2), pick(self, 1), pick(self, 0)],
        }
    }

    /// Changes the request as route, virtual host and table say: headers, host, path. `keep_original`: leave
    /// `x-envoy-original-path` and `-host` behind (unless the router suppresses Envoy's headers).
    ///
    /// Envoy `RouteEntryImplBase::finalizeRequestHeaders`.
    pub fn finalize_request(&self, headers: &mut Headers, cx: &FormatContext<'_>, keep_original: bool) {
        let Some(forward) = self.forward() else { return };
        let weighted = self.weighted();
        if let Some(weighted) = weighted {
            weighted.request_ops.apply_to_request(headers, cx);
            if let Some(host) = &weighted.host_rewrite {
                headers.set(":authority", host.as_bytes());
            }
        }
        for ops in self.levels(|m, level| match level {
            0 => &m.route.request_ops,
            1 => &m.vhost.request_ops,
            _ => &m.table.request_ops,
        }) {
            ops.apply_to_request(headers, cx);
        }
        forward.rewrite_host(headers, keep_original);
        if let Some(rewrite) = &forward.path_rewrite {
            rewrite.apply(&self.route.matcher, headers, keep_original);
        }
    }

    /// Changes the response as route, virtual host and table say.
    pub fn finalize_response(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        if let Some(weighted) = self.weighted() {
            weighted.response_ops.apply_to_response(headers, cx);
        }
        for ops in self.levels(|m, level| match level {
            0 => &m.route.response_ops,
            1 => &m.vhost.response_ops,
            _ => &m.table.response_ops,
        }) {
            ops.apply_to_response(headers, cx);
        }
    }

    /// How long the whole stream may take (Envoy `ConnectionManagerImpl::ActiveStream::refreshDurationTimeout`).
    pub fn max_stream_duration(&self, headers: &Headers, of_listener: Option<Duration>) -> Option<Duration> {
        match self.forward() {
            Some(forward) => forward.max_stream_duration(headers, of_listener),
            None => of_listener,
        }
    }
}

#[cfg(test)]
mod tests;
