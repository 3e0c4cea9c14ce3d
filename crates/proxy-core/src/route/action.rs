use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_types::ArcStr;

use super::internal_redirect::InternalRedirect;
use crate::filters::{CorsPolicy, RateLimitRule};
use crate::format::{FormatContext, FormatString};
use crate::headers::Headers;
use crate::matchers::{Substitution, canonical_name, path_without_query};
use crate::metadata::MetadataMatch;
use crate::pb;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid, refuse};
use crate::retry::RetryPolicy;
use crate::route::hashing::HashPolicy;
use crate::route::header_ops::HeaderOps;
use crate::route::redirect::Redirect;
use crate::route::template::{has_path_policy, rewrite_policy};
use crate::route::{PerFilterTable, RouteMatcher, per_filter};
use crate::runtime::Live;
use crate::{Options, constraints, fields};

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Sends the request to a cluster.
    Forward(Box<Forward>),
    /// Answers with another location.
    Redirect(Box<Redirect>),
    /// Answers by itself.
    Direct(DirectResponse),
    /// For listeners that only receive.
    NonForwarding,
}

/// Which circuit breaker and pool.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Priority {
    /// The usual one.
    #[default]
    Default,
    /// The other one.
    High,
}

/// Where requests go.
#[derive(Debug)]
pub enum ClusterSpecifier {
    /// Always here.
    Single(ArcStr),
    /// To the cluster that this header names.
    Header(Box<str>),
    /// To one of several, by weight.
    Weighted {
        /// The clusters.
        clusters: Box<[WeightedCluster]>,
        /// Sum of the weights; `None`: the runtime may change it.
        total: Option<u64>,
        /// This header holds the random number.
        random_header: Option<Box<str>>,
        /// The hash of the request is the random number.
        by_hash: bool,
    },
}

/// One of several clusters.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Its name; empty if `header` is set.
    pub name: ArcStr,
    /// The header that names it.
    pub header: Option<Box<str>>,
    /// Its share of the total.
    pub weight: Live<u64>,
    /// Subset criteria, those of the route included.
    pub metadata_match: Option<MetadataMatch>,
    /// Header changes of this level.
    pub request_ops: HeaderOps,
    /// Header changes of this level.
    pub response_ops: HeaderOps,
    /// Filter settings of this level.
    pub per_filter: PerFilterTable,
    /// Host to send.
    pub host_rewrite: Option<Box<str>>,
}

/// How the host is changed.
#[derive(Debug)]
pub enum HostRewrite {
    /// This host.
    Literal(Box<str>),
    /// The value of this header.
    Header(Box<str>),
    /// The path (without query) after this substitution.
    PathRegex(Substitution),
    /// The chosen endpoint's host name; the proxy does it with [`set_authority`] once the host is known.
    Auto,
}

/// How the path is changed.
#[derive(Debug)]
pub enum PathRewrite {
    /// In the place of what the route matched.
    Prefix(Box<str>),
    /// Wherever the expression is found.
    Regex(Substitution),
}

/// A copy of the request that nobody waits for.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// The cluster; empty if `header` is set.
    pub cluster: ArcStr,
    /// The header that names it.
    pub header: Option<Box<str>>,
    /// How many requests are copied.
    pub fraction: Fraction,
    /// Put `-shadow` behind the host.
    pub shadow_suffix: bool,
    /// Host to send.
    pub host_rewrite: Option<Box<str>>,
    /// Trace copies.
    pub trace_sampled: Option<bool>,
    /// Changes of the copy's headers alone.
    header_ops: Arc<[HeaderOps]>,
}

impl Mirror {
    pub(super) fn compile_all(
        policies: &[pb::route::route_action::RequestMirrorPolicy],
        options: &Options,
    ) -> Compiled<Vec<Self>> {
        let one = |(i, policy)| Self::compile(policy, options).at_index("request_mirror_policies", i);
        policies.iter().enumerate().map(one).collect()
    }

    fn compile(policy: &pb::route::route_action::RequestMirrorPolicy, options: &Options) -> Compiled<Self> {
        let some = |text: &str| (!text.is_empty()).then(|| text.into());
        if policy.cluster.is_empty() == policy.cluster_header.is_empty() {
            return Err(Invalid::new("cluster", "exactly one of cluster and cluster_header must be given"));
        }
        Ok(Self {
            cluster: policy.cluster.as_str().into(),
            header: some(&canonical_name(&policy.cluster_header)),
            fraction: Fraction::runtime(policy.runtime_fraction.as_ref(), Fraction::ALL, &options.runtime)
                .at("runtime_fraction")?,
            shadow_suffix: !policy.disable_shadow_host_suffix_append,
            host_rewrite: some(&policy.host_rewrite_literal),
            trace_sampled: policy.trace_sampled.as_ref().map(|v| v.value),
            header_ops: HeaderOps::compile_mutations(&policy.request_headers_mutations)
                .at("request_headers_mutations")?
                .into(),
        })
    }

    /// The cluster for a copy of this request, if one is to be sent.
    pub fn choose(&self, headers: &Headers, random: &mut Random) -> Option<ArcStr> {
        if !self.fraction.hit(random) {
            return None;
        }
        match &self.header {
            None => Some(self.cluster.clone()),
            Some(name) => headers.get_str(name).filter(|v| !v.is_empty()).map(ArcStr::from),
        }
    }

    /// Makes the changes of headers that are meant for the copy. `cx`: of the original.
    pub fn change_headers(&self, headers: &mut Headers, cx: &FormatContext<'_>) {
        self.header_ops.iter().for_each(|ops| ops.apply(headers, cx));
    }

    /// The copy's host for the original's (Envoy `ShadowWriterImpl`: the suffix goes before the last colon, whatever
    /// follows it, unless that is inside of brackets).
    pub fn authority<'a>(&'a self, authority: &'a str) -> Cow<'a, str> {
        if let Some(host) = &self.host_rewrite {
            return Cow::Borrowed(host);
        }
        if !self.shadow_suffix {
            return Cow::Borrowed(authority);
        }
        let closed = authority.rfind(']');
        let at = authority.rfind(':').filter(|at| closed.is_none_or(|closed| closed < *at)).unwrap_or(authority.len());
        let (host, port) = authority.split_at(at);
        Cow::Owned(format!("{host}-shadow{port}"))
    }
}

/// Forwarding to a cluster.
#[derive(Debug)]
pub struct Forward {
    /// Where to.
    pub clusters: ClusterSpecifier,
    /// The status if that cluster does not exist.
    pub cluster_not_found_status: u16,
    /// Subset criteria.
    pub metadata_match: Option<MetadataMatch>,
    /// The whole response must have come by then; `None`: no limit. Default 15 s.
    pub timeout: Option<Duration>,
    /// `Some(None)`: no idle timeout; `None`: the listener's.
    pub idle_timeout: Option<Option<Duration>>,
    /// What is left of an answer must have left after this, likewise.
    pub flush_timeout: Option<Option<Duration>>,
    /// See [`Forward::max_stream_duration`].
    pub stream_duration: Option<StreamDuration>,
    /// The deprecated cap for gRPC timeouts: `Some(None)` is "no cap".
    pub max_grpc_timeout: Option<Option<Duration>>,
    /// Taken off gRPC timeouts.
    pub grpc_timeout_offset: Option<Duration>,
    /// Retries.
    pub retry: Option<Arc<RetryPolicy>>,
    /// What is hashed for ring hash and Maglev.
    pub hash_policies: Box<[HashPolicy]>,
    /// Copies.
    pub mirrors: Vec<Mirror>,
    /// Which circuit breaker.
    pub priority: Priority,
    /// CORS.
    pub cors: Option<Arc<CorsPolicy>>,
    /// Upgrades that are switched on or off for this route, by lower-case name.
    pub upgrades: Vec<(ArcStr, bool)>,
    /// CONNECT is terminated here.
    pub connect: Option<Connect>,
    /// Follow redirects of the upstream.
    pub internal_redirect: Option<InternalRedirect>,
    /// How the host is changed.
    pub host_rewrite: Option<HostRewrite>,
    /// Keep the old host in `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// How the path is changed.
    pub path_rewrite: Option<PathRewrite>,
    /// Rate limit descriptors.
    pub rate_limits: Vec<RateLimitRule>,
    /// And those of the virtual host, too.
    pub include_vhost_rate_limits: bool,
}

/// How CONNECT ends at this proxy: hosts get its bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Connect {
    /// The bodies of POST go that way, too.
    pub allow_post: bool,
    /// Hosts get a PROXY header of this version first.
    pub proxy_protocol: Option<u8>,
}

/// `max_stream_duration` of a route. Zero durations mean no limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StreamDuration {
    /// For the stream.
    pub max: Option<Duration>,
    /// Caps the client's `grpc-timeout`.
    pub grpc_header_max: Option<Duration>,
    /// Taken off the client's `grpc-timeout`.
    pub grpc_header_offset: Option<Duration>,
}

impl Action {
    pub(super) fn compile(route: &pb::route::Route, body_limit: usize, options: &Options) -> Compiled<Self> {
        use pb::route::route::Action as Kind;
        Ok(match route.action.as_ref().ok_or_else(|| Invalid::new("action", "is missing"))? {
            Kind::Route(action) => {
                Self::Forward(Box::new(Forward::compile(action, route.r#match.as_ref(), options).at("route")?))
            }
            Kind::Redirect(redirect) => {
                let redirect = Redirect::compile(redirect, has_path_policy(route.r#match.as_ref())).at("redirect")?;
                Self::Redirect(Box::new(redirect))
            }
            Kind::DirectResponse(direct) => {
                Self::Direct(DirectResponse::compile(direct, body_limit).at("direct_response")?)
            }
            Kind::NonForwardingAction(_) => Self::NonForwarding,
            Kind::FilterAction(_) => return Err(Invalid::unsupported("filter_action")),
        })
    }
}

impl Forward {
    fn compile(
        action: &pb::route::RouteAction,
        matcher: Option<&pb::route::RouteMatch>,
        options: &Options,
    ) -> Compiled<Self> {
        refuse! {
            "path_rewrite": !action.path_rewrite.is_empty(),
            "retry_policy_typed_config": action.retry_policy_typed_config.is_some(),
            "internal_redirect_action": action.internal_redirect_action != 0,
            "hedge_policy": action.hedge_policy.as_ref().is_some_and(|h| h.hedge_on_per_try_timeout),
        }
        constraints::route_action(action)?;
        let path_rewrite = match (&action.regex_rewrite, action.prefix_rewrite.as_str(), &action.path_rewrite_policy) {
            (None, "", None) => None,
            (Some(rule), "", None) => Some(PathRewrite::Regex(Substitution::compile(rule).at("regex_rewrite")?)),
            (None, text, None) => Some(PathRewrite::Prefix(text.into())),
            (None, "", Some(policy)) => {
                Some(PathRewrite::Regex(rewrite_policy(policy, matcher).at("path_rewrite_policy")?))
            }
            _ => {
                return Err(Invalid::new(
                    "",
                    "only one of regex_rewrite, prefix_rewrite and path_rewrite_policy may be set",
                ));
            }
        };
        if matches!(path_rewrite, Some(PathRewrite::Prefix(_))) && has_path_policy(matcher) {
            return Err(Invalid::new("prefix_rewrite", "cannot be used with a path_match_policy"));
        }
        let metadata_match = MetadataMatch::compile(action.metadata_match.as_ref());
        let (upgrades, connect) = upgrades(action);
        Ok(Self {
            clusters: clusters(action, metadata_match.as_ref(), options)?,
            cluster_not_found_status: match action.cluster_not_found_response_code {
                1 => 404,
                2 => 500,
                _ => 503,
            },
            metadata_match,
            timeout: fields::duration_or_off("timeout", action.timeout.as_ref(), Some(Duration::from_secs(15)))?,
            idle_timeout: fields::duration("idle_timeout", action.idle_timeout.as_ref())?.map(off_if_zero),
            flush_timeout: fields::duration("flush_timeout", action.flush_timeout.as_ref())?.map(off_if_zero),
            stream_duration: stream_duration(action.max_stream_duration.as_ref()).at("max_stream_duration")?,
            max_grpc_timeout: fields::duration("max_grpc_timeout", action.max_grpc_timeout.as_ref())?.map(off_if_zero),
            grpc_timeout_offset: fields::duration("grpc_timeout_offset", action.grpc_timeout_offset.as_ref())?,
            retry: action.retry_policy.as_ref().map(RetryPolicy::compile).transpose().at("retry_policy")?.map(Arc::new),
            hash_policies: HashPolicy::compile_all(&action.hash_policy)?,
            mirrors: Mirror::compile_all(&action.request_mirror_policies, options)?,
            priority: if action.priority == 1 { Priority::High } else { Priority::Default },
            cors: CorsPolicy::of_route(action.cors.as_ref(), &options.runtime).at("cors")?.map(Arc::new),
            upgrades,
            connect,
            internal_redirect: action
                .internal_redirect_policy
                .as_ref()
                .map(InternalRedirect::compile)
                .transpose()
                .at("internal_redirect_policy")?,
            host_rewrite: host_rewrite(action)?,
            append_x_forwarded_host: action.append_x_forwarded_host,
            path_rewrite,
            rate_limits: RateLimitRule::compile_all(&action.rate_limits)?,
            include_vhost_rate_limits: fields::flag(action.include_vh_rate_limits.as_ref(), false),
        })
    }

    /// Which weighted cluster a request gets; `None` without weights.
    pub(super) fn draw(&self, headers: &Headers, random: u64) -> Option<usize> {
        let ClusterSpecifier::Weighted { clusters, total, random_header, .. } = &self.clusters else { return None };
        let by_header = random_header.as_ref().and_then(|name| headers.get_str(name)?.trim().parse().ok());
        // Weights that the runtime sets may be any number.
        let sum = || clusters.iter().fold(0_u64, |sum, cluster| sum.saturating_add(cluster.weight.get()));
        let total = total.unwrap_or_else(sum);
        let mut left = by_header.unwrap_or(random).checked_rem(total)?;
        clusters.iter().position(|cluster| {
            let weight = cluster.weight.get();
            let hit = left < weight;
            left = left.saturating_sub(weight);
            hit
        })
    }

    /// `use_hash_policy` of weighted clusters.
    pub(super) fn draws_by_hash(&self) -> bool {
        matches!(self.clusters, ClusterSpecifier::Weighted { by_hash: true, .. })
    }

    pub(super) fn is_weighted(&self) -> bool {
        matches!(self.clusters, ClusterSpecifier::Weighted { .. })
    }

    /// Names of all clusters it may go to.
    pub fn cluster_names(&self) -> impl Iterator<Item = &ArcStr> {
        let (single, weighted): (_, &[WeightedCluster]) = match &self.clusters {
            ClusterSpecifier::Single(name) => (Some(name), &[]),
            ClusterSpecifier::Header(_) => (None, &[]),
            ClusterSpecifier::Weighted { clusters, .. } => (None, clusters),
        };
        let mirrors = self.mirrors.iter().filter(|mirror| mirror.header.is_none()).map(|mirror| &mirror.cluster);
        single.into_iter().chain(weighted.iter().filter(|c| c.header.is_none()).map(|c| &c.name)).chain(mirrors)
    }

    /// How the bytes of a request with this method go to a host as they are, if they do.
    pub fn terminates(&self, method: &str) -> Option<Connect> {
        self.connect.filter(|connect| method == "CONNECT" || (connect.allow_post && method == "POST"))
    }

    /// Whether the upgrade (`websocket`, `connect`) is allowed here, if the route says so itself.
    pub fn upgrade(&self, kind: &str) -> Option<bool> {
        self.upgrades.iter().find(|(name, _)| name.eq_ignore_ascii_case(kind)).map(|(_, on)| *on)
    }

    pub(super) fn rewrite_host(&self, headers: &mut Headers, keep_original: bool) {
        let host: Vec<u8> = match &self.host_rewrite {
            None | Some(HostRewrite::Auto) => return,
            Some(HostRewrite::Literal(host)) => host.as_bytes().to_vec(),
            Some(HostRewrite::Header(name)) => headers.get(name).map(<[u8]>::to_vec).unwrap_or_default(),
            Some(HostRewrite::PathRegex(rule)) => {
                rule.apply(path_without_query(headers.path().unwrap_or_default()).as_bytes())
            }
        };
        if !host.is_empty() {
            set_authority(headers, &host, self.append_x_forwarded_host, keep_original);
        }
    }
}

/// Changes the host (Envoy `Http::Utility::updateAuthority`): the old one goes into `x-forwarded-host` and
/// `x-envoy-original-host` as asked.
pub fn set_authority(headers: &mut Headers, host: &[u8], append_x_forwarded_host: bool, keep_original: bool) {
    let old = headers.get(":authority").map(<[u8]>::to_vec).unwrap_or_default();
    if append_x_forwarded_host && !old.is_empty() {
        let last = headers.get_str("x-forwarded-host").and_then(|v| v.rsplit(',').next()).map(str::trim);
        if last.is_none_or(|last| last.as_bytes() != old) {
            headers.append("x-forwarded-host", &old, ",");
        }
    }
    if keep_original && !old.is_empty() {
        headers.set("x-envoy-original-host", &old);
    }
    headers.set(":authority", host);
}

impl PathRewrite {
    /// Changes the path in front of the query.
    pub(super) fn apply(&self, matcher: &RouteMatcher, headers: &mut Headers, keep_original: bool) {
        let Some(whole) = headers.get(":path").map(<[u8]>::to_vec) else { return };
        let end = whole.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(whole.len());
        let (path, rest) = whole.split_at(end);
        let new = match self {
            Self::Prefix(prefix) => {
                let matched = matcher.matched_length(path);
                [prefix.as_bytes(), path.get(matched..).unwrap_or_default()].concat()
            }
            Self::Regex(rule) => rule.apply(path),
        };
        if new.is_empty() {
            return;
        }
        if keep_original {
            headers.set("x-envoy-original-path", &whole);
        }
        headers.set(":path", &[&new, rest].concat());
    }
}

fn off_if_zero(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

fn clusters(
    action: &pb::route::RouteAction,
    outer: Option<&MetadataMatch>,
    options: &Options,
) -> Compiled<ClusterSpecifier> {
    use pb::route::route_action::ClusterSpecifier as Kind;
    use pb::route::weighted_cluster::RandomValueSpecifier;
    match action.cluster_specifier.as_ref().ok_or_else(|| Invalid::new("cluster_specifier", "is missing"))? {
        Kind::Cluster(name) => Ok(ClusterSpecifier::Single(fields::required("cluster", name)?)),
        Kind::ClusterHeader(name) => Ok(ClusterSpecifier::Header(canonical_name(name).into())),
        Kind::WeightedClusters(weighted) => {
            let (random_header, by_hash) = match &weighted.random_value_specifier {
                None => (None, false),
                Some(RandomValueSpecifier::HeaderName(name)) => (Some(canonical_name(name).into()), false),
                Some(RandomValueSpecifier::UseHashPolicy(on)) => (None, on.value),
            };
            let clusters: Box<[WeightedCluster]> = weighted
                .clusters
                .iter()
                .enumerate()
                .map(|(i, c)| {
                    WeightedCluster::compile(c, outer, &weighted.runtime_key_prefix, options).at_index("clusters", i)
                })
                .collect::<Compiled<_>>()
                .at("weighted_clusters")?;
            let weights = weighted.clusters.iter().map(|c| u64::from(fields::uint(c.weight.as_ref(), 0)));
            let total: u64 = weights.sum();
            if total == 0 {
                return Err(Invalid::new("weighted_clusters", "sum of weights must be greater than 0"));
            }
            if total > u64::from(u32::MAX) {
                return Err(Invalid::new("weighted_clusters", "sum of weights exceeds 4294967295"));
            }
            let total = weighted.runtime_key_prefix.is_empty().then_some(total);
            Ok(ClusterSpecifier::Weighted { clusters, total, random_header, by_hash })
        }
        Kind::ClusterSpecifierPlugin(_) | Kind::InlineClusterSpecifierPlugin(_) => {
            Err(Invalid::unsupported("cluster_specifier_plugin"))
        }
    }
}

impl WeightedCluster {
    fn compile(
        cluster: &pb::route::weighted_cluster::ClusterWeight,
        outer: Option<&MetadataMatch>,
        runtime_prefix: &str,
        options: &Options,
    ) -> Compiled<Self> {
        use pb::route::weighted_cluster::cluster_weight::HostRewriteSpecifier;
        if cluster.name.is_empty() == cluster.cluster_header.is_empty() {
            return Err(Invalid::new("name", "exactly one of name and cluster_header must be given"));
        }
        let weight = cluster.weight.ok_or_else(|| Invalid::new("weight", "is missing"))?.value;
        let key = match runtime_prefix {
            "" => String::new(),
            prefix => format!("{prefix}.{}", cluster.name),
        };
        Ok(Self {
            name: cluster.name.as_str().into(),
            header: (!cluster.cluster_header.is_empty()).then(|| canonical_name(&cluster.cluster_header).into()),
            weight: options.runtime.live(&key, weight.into()),
            metadata_match: MetadataMatch::compile(cluster.metadata_match.as_ref()).map(|m| m.merged_over(outer)),
            request_ops: HeaderOps::compile(&cluster.request_headers_to_add, &cluster.request_headers_to_remove)
                .at("request_headers_to_add")?,
            response_ops: HeaderOps::compile(&cluster.response_headers_to_add, &cluster.response_headers_to_remove)
                .at("response_headers_to_add")?,
            per_filter: per_filter(&cluster.typed_per_filter_config, options)?,
            host_rewrite: cluster
                .host_rewrite_specifier
                .as_ref()
                .map(|HostRewriteSpecifier::HostRewriteLiteral(host)| host.as_str().into()),
        })
    }
}

fn host_rewrite(action: &pb::route::RouteAction) -> Compiled<Option<HostRewrite>> {
    use pb::route::route_action::HostRewriteSpecifier as Kind;
    Ok(match &action.host_rewrite_specifier {
        None => None,
        Some(Kind::HostRewriteLiteral(host)) => Some(HostRewrite::Literal(host.as_str().into())),
        Some(Kind::HostRewriteHeader(name)) => Some(HostRewrite::Header(canonical_name(name).into())),
        Some(Kind::HostRewritePathRegex(rule)) => {
            Some(HostRewrite::PathRegex(Substitution::compile(rule).at("host_rewrite_path_regex")?))
        }
        Some(Kind::AutoHostRewrite(on)) => on.value.then_some(HostRewrite::Auto),
        Some(Kind::HostRewrite(_)) => return Err(Invalid::unsupported("host_rewrite")),
    })
}

fn stream_duration(duration: Option<&pb::route::route_action::MaxStreamDuration>) -> Compiled<Option<StreamDuration>> {
    let Some(duration) = duration else { return Ok(None) };
    Ok(Some(StreamDuration {
        max: fields::duration("max_stream_duration", duration.max_stream_duration.as_ref())?,
        grpc_header_max: fields::duration("grpc_timeout_header_max", duration.grpc_timeout_header_max.as_ref())?,
        grpc_header_offset: fields::duration(
            "grpc_timeout_header_offset",
            duration.grpc_timeout_header_offset.as_ref(),
        )?,
    }))
}

fn upgrades(action: &pb::route::RouteAction) -> (Vec<(ArcStr, bool)>, Option<Connect>) {
    let mut all = Vec::new();
    let mut connect = None;
    for upgrade in &action.upgrade_configs {
        all.push((upgrade.upgrade_type.to_ascii_lowercase().into(), fields::flag(upgrade.enabled.as_ref(), true)));
        if let Some(config) = &upgrade.connect_config {
            let version = config.proxy_protocol_config.as_ref().map(|proxy| if proxy.version == 1 { 2 } else { 1 });
            connect = Some(Connect { allow_post: config.allow_post, proxy_protocol: version });
        }
    }
    (all, connect)
}

/// An answer of the proxy's own.
#[derive(Debug)]
pub struct DirectResponse {
    /// The status.
    pub status: u16,
    /// The body, unless there is a format.
    pub body: Bytes,
    /// Writes the body; `%LOCAL_REPLY_BODY%` is `body`.
    pub body_format: Option<FormatString>,
    /// The formatted body's content type.
    pub content_type: Option<ArcStr>,
}

impl DirectResponse {
    fn compile(direct: &pb::route::DirectResponseAction, limit: usize) -> Compiled<Self> {
        let status = u16::try_from(direct.status).ok().filter(|s| (200..600).contains(s));
        let body = crate::tls::inline_bytes(direct.body.as_ref()).at("body")?;
        if body.len() > limit {
            return Err(Invalid::new(
                "body",
                format!("response body size is {} bytes; maximum is {limit}", body.len()),
            ));
        }
        let content_type = direct.body_format.as_ref().map(|f| f.content_type.as_str()).filter(|t| !t.is_empty());
        Ok(Self {
            status: status.ok_or_else(|| Invalid::new("status", format!("{} is no status", direct.status)))?,
            body,
            body_format: direct.body_format.as_ref().map(FormatString::compile).transpose().at("body_format")?,
            content_type: content_type.map(ArcStr::from),
        })
    }
}
