//! What happens to the requests of one rule (istiod `TranslateRoute`).

use envoy_api::core::{
    DataSource, HeaderValue, HeaderValueOption, RuntimeFractionalPercent, data_source::Specifier,
    header_value_option::HeaderAppendAction,
};
use envoy_api::pb::envoy::extensions::filters::common::fault::v3::{FaultDelay, fault_delay::FaultDelaySecifier};
use envoy_api::pb::envoy::extensions::filters::http::{
    cors::v3::CorsPolicy as EnvoyCors,
    fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
};
use envoy_api::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute;
use envoy_api::pb::envoy::r#type::v3::FractionalPercent;
use envoy_api::route::{
    Decorator, DirectResponseAction, RedirectAction, Route, RouteAction, WeightedCluster, redirect_action, route,
    route_action::{
        ClusterNotFoundResponseCode, ClusterSpecifier, HashPolicy, HostRewriteSpecifier, RequestMirrorPolicy,
        hash_policy,
    },
    route_match::PathSpecifier,
    weighted_cluster::{ClusterWeight, cluster_weight},
};
use envoy_api::wire::Spliced;
use foldhash::HashMap;
use istio_api::destination_rule::{ConsistentHashLb, TrafficPolicy};
use istio_api::virtual_service::{
    CorsPolicy, Destination, GRPC_STATUSES, Headers, HttpDirectResponse, HttpFaultInjection, HttpMatchRequest,
    HttpRedirect, HttpRoute, HttpRouteDestination, RedirectPortSelection, UnmatchedPreflights, VirtualService,
};
use mesh_types::selects;
use push_context::Config;
use registry::Service;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{destination_cluster, matching, retry, session, virtual_host};
use crate::context::Context;
use crate::notes::Notes;
use crate::proto::{
    any, bool_value, duration, exact, fraction, regex, seconds, string_match, u32_value, whole_percent,
};
use crate::{filters, names};

/// Services of the route table, by host name.
pub(super) type Services = HashMap<Arc<str>, Arc<Service>>;

/// Node metadata of those who want to know which field of a VirtualService a route is from (`outrigger explain`).
pub(crate) const ORIGINS: &str = "OUTRIGGER_ORIGINS";

/// A route with its notes.
pub(super) type Made = Spliced<Route>;
/// Field number in `Route`.
const METADATA: u32 = 4;

/// All routes of a VirtualService for one port; empty if none applies to this proxy.
pub(super) fn routes(cx: &Context<'_>, rule: &Config<VirtualService>, port: u16, services: &Services) -> Vec<Made> {
    let mut out = Vec::new();
    for (i, route) in rule.spec.http.iter().enumerate() {
        let matches: Vec<Option<&HttpMatchRequest>> =
            if route.r#match.is_empty() { vec![None] } else { route.r#match.iter().map(Some).collect() };
        for (j, m) in matches.into_iter().enumerate() {
            let Some((translated, mut notes)) = translate(cx, rule, route, m, port, services) else {
                // An unconditional route ends the list even where its redirect code is unknown.
                if m.is_none() {
                    return out;
                }
                continue;
            };
            if cx.node.meta(ORIGINS).is_some() {
                let origin = match (rule.sources.get(i), m) {
                    (Some(source), _) => {
                        // Written into another object than the one that istiod names.
                        let group = source.kind.group();
                        let path =
                            format!("/apis/{group}/v1/namespaces/{}/{}/{}", rule.namespace, source.kind, source.name);
                        notes.text("config", &path);
                        source.field.clone()
                    }
                    (None, Some(_)) => format!("spec.http[{i}].match[{j}]"),
                    (None, None) => format!("spec.http[{i}]"),
                };
                notes.text("origin", &origin);
            }
            let last = m.is_none() || translated.r#match.as_ref().is_some_and(matching::takes_all);
            out.push(Made::new(translated, notes.into_field(METADATA).into_iter().collect()));
            if last {
                return out;
            }
        }
    }
    out
}

fn applies(cx: &Context<'_>, m: &HttpMatchRequest, port: u16) -> bool {
    if m.port != 0 && m.port != u32::from(port) {
        return false;
    }
    if !m.gateways.is_empty() {
        return m.gateways.iter().any(|g| g == "mesh");
    }
    selects(&m.source_labels, &cx.node.labels)
        && (m.source_namespace.is_empty() || *m.source_namespace == *cx.node.namespace)
}

fn translate(
    cx: &Context<'_>,
    rule: &Config<VirtualService>,
    from: &HttpRoute,
    m: Option<&HttpMatchRequest>,
    port: u16,
    services: &Services,
) -> Option<(Route, Notes)> {
    if m.is_some_and(|m| !applies(cx, m, port)) {
        return None;
    }
    let mut out = Route {
        name: match m {
            Some(m) if !m.name.is_empty() => format!("{}.{}", from.name, m.name),
            _ => from.name.clone(),
        },
        r#match: Some(matching::translate(m, rule.is_gateway_api())),
        stat_prefix: m.map(|m| m.stat_prefix.clone()).unwrap_or_default(),
        ..Route::default()
    };
    let mut notes = Notes::default();
    notes.config("virtual-service", &rule.namespace, &rule.name);
    let operations = Operations::of(from.headers.as_ref());
    out.request_headers_to_add = operations.request_add;
    out.request_headers_to_remove = operations.request_remove;
    out.response_headers_to_add = operations.response_add;
    out.response_headers_to_remove = operations.response_remove;
    if let Some(redirect) = &from.redirect {
        out.action = redirect_action(redirect, port).map(route::Action::Redirect);
    } else if let Some(direct) = &from.direct_response {
        out.action = Some(route::Action::DirectResponse(direct_response(direct)));
    } else {
        forward(cx, &mut out, rule, from, operations.authority, port, services);
    }
    out.decorator = Some(Decorator { operation: operation(&out, &rule.name, port), ..Decorator::default() });
    if let Some(fault) = from.fault.as_ref().and_then(fault) {
        out.typed_per_filter_config.insert("envoy.filters.http.fault".to_owned(), any(&fault));
    }
    if let Some(policy) = &from.cors_policy {
        out.typed_per_filter_config.insert("envoy.filters.http.cors".to_owned(), any(&cors(policy)));
    }
    if from.redirect.is_none() && from.direct_response.is_none() {
        let counts = |r: &&HttpRouteDestination| from.route.len() == 1 || r.weight != 0;
        let service = |r: &HttpRouteDestination| services.get(r.destination.as_ref()?.host.as_str()).map(|s| &**s);
        let session = session::of_route(cx, from.route.iter().filter(counts).map(service));
        out.typed_per_filter_config.extend(session.map(|own| (filters::STATEFUL_SESSION.to_owned(), own)));
    }
    Some((out, notes))
}

/// How the route is called in traces.
fn operation(route: &Route, rule: &str, port: u16) -> String {
    let path = match route.r#match.as_ref().and_then(|m| m.path_specifier.as_ref()) {
        Some(PathSpecifier::Prefix(prefix)) => format!("{prefix}*"),
        Some(PathSpecifier::Path(path)) => path.clone(),
        Some(PathSpecifier::SafeRegex(regex)) => regex.regex.clone(),
        _ => "/*".to_owned(),
    };
    if let Some(route::Action::Route(action)) = &route.action
        && let Some(ClusterSpecifier::Cluster(cluster)) = &action.cluster_specifier
        && let Some((port, _, host)) = names::parse_outbound(cluster)
    {
        return format!("{host}:{port}{path}");
    }
    format!("{rule}:{port}{path}")
}

/// Header changes of a rule.
#[derive(Default)]
struct Operations {
    request_add: Vec<HeaderValueOption>,
    request_remove: Vec<String>,
    response_add: Vec<HeaderValueOption>,
    response_remove: Vec<String>,
    /// A set or added Host header rewrites the host instead.
    authority: String,
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

fn is_internal(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

impl Operations {
    fn of(headers: Option<&Headers>) -> Operations {
        let Some(headers) = headers else { return Operations::default() };
        let options = |map: &BTreeMap<String, String>, action: HeaderAppendAction| -> Vec<HeaderValueOption> {
            let visible = map.iter().filter(|(name, _)| !is_internal(name));
            visible
                .map(|(key, value)| HeaderValueOption {
                    header: Some(HeaderValue { key: key.clone(), value: value.clone(), ..HeaderValue::default() }),
                    append_action: action as i32,
                    ..HeaderValueOption::default()
                })
                .collect()
        };
        let visible = |list: &[String]| list.iter().filter(|name| !is_internal(name)).cloned().collect();
        let request = headers.request.clone().unwrap_or_default();
        let response = headers.response.clone().unwrap_or_default();
        let both = |set, add| {
            let mut out = options(set, HeaderAppendAction::OverwriteIfExistsOrAdd);
            out.extend(options(add, HeaderAppendAction::AppendIfExistsOrAdd));
            out
        };
        let authority =
            |map: &BTreeMap<String, String>| map.iter().find(|(n, _)| is_authority(n)).map(|(_, v)| v.clone());
        Operations {
            request_add: both(&request.set, &request.add),
            request_remove: visible(&request.remove),
            response_add: both(&response.set, &response.add),
            response_remove: visible(&response.remove),
            authority: authority(&request.set).or_else(|| authority(&request.add)).unwrap_or_default(),
        }
    }
}

fn redirect_action(from: &HttpRedirect, port: u16) -> Option<RedirectAction> {
    use redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let code = match from.redirect_code {
        0 | 301 => RedirectResponseCode::MovedPermanently,
        302 => RedirectResponseCode::Found,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => return None,
    };
    let mut port_redirect = match (from.port, from.derive_port) {
        (Some(port), _) => port,
        (None, Some(RedirectPortSelection::FromRequestPort)) => u32::from(port),
        _ => 0,
    };
    let scheme = if from.scheme.is_empty() { "http" } else { &from.scheme };
    if matches!((scheme, port_redirect), ("http", 80) | ("https", 443)) {
        port_redirect = 0;
    }
    Some(RedirectAction {
        host_redirect: from.authority.clone(),
        port_redirect,
        response_code: code as i32,
        scheme_rewrite_specifier: (!from.scheme.is_empty())
            .then(|| SchemeRewriteSpecifier::SchemeRedirect(from.scheme.clone())),
        path_rewrite_specifier: Some(if from.prefix_rewrite.is_empty() {
            PathRewriteSpecifier::PathRedirect(from.uri.clone())
        } else {
            PathRewriteSpecifier::PrefixRewrite(from.prefix_rewrite.clone())
        }),
        ..RedirectAction::default()
    })
}

fn direct_response(from: &HttpDirectResponse) -> DirectResponseAction {
    let specifier = from.body.as_ref().and_then(|body| match (&body.string, &body.bytes) {
        (Some(text), _) => Some(Specifier::InlineString(text.clone())),
        (None, Some(base64)) => Some(Specifier::InlineBytes(decode_base64(base64)?)),
        _ => None,
    });
    DirectResponseAction {
        status: from.status,
        body: specifier.map(|s| DataSource { specifier: Some(s), ..DataSource::default() }),
        ..DirectResponseAction::default()
    }
}

/// Standard alphabet, with or without padding; nothing for other text.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

fn runtime(percent: FractionalPercent) -> RuntimeFractionalPercent {
    RuntimeFractionalPercent { default_value: Some(percent), ..RuntimeFractionalPercent::default() }
}

fn mirror(cx: &Context<'_>, cluster: String, percent: FractionalPercent) -> RequestMirrorPolicy {
    RequestMirrorPolicy {
        cluster,
        runtime_fraction: Some(runtime(percent)),
        trace_sampled: bool_value(false),
        disable_shadow_host_suffix_append: cx.push.settings.no_shadow_suffix,
        ..RequestMirrorPolicy::default()
    }
}

fn forward(
    cx: &Context<'_>,
    out: &mut Route,
    rule: &Config<VirtualService>,
    from: &HttpRoute,
    mut authority: String,
    port: u16,
    services: &Services,
) {
    let mut action = RouteAction::default();
    timeouts(&mut action, from.timeout);
    if crate::grpc::is_client(cx.node) {
        crate::grpc::timeout(&mut action);
    }
    if rule.is_gateway_api() {
        // The Gateway API's answer where a backend does not exist.
        action.cluster_not_found_response_code = ClusterNotFoundResponseCode::InternalServerError as i32;
    }
    if let Some(rewrite) = &from.rewrite {
        action.append_x_forwarded_host = virtual_host::forwards_host(cx);
        if let Some(own) = &rewrite.uri_regex_rewrite {
            action.regex_rewrite =
                Some(RegexMatchAndSubstitute { pattern: Some(regex(&own.r#match)), substitution: own.rewrite.clone() });
        } else if rule.is_gateway_api() && rewrite.uri == "/" {
            // The prefix is taken away, with the slash after it if there is one.
            let prefix = match out.r#match.as_ref().and_then(|m| m.path_specifier.as_ref()) {
                Some(PathSpecifier::PathSeparatedPrefix(prefix)) => push_context::quote(prefix),
                _ => String::new(),
            };
            action.regex_rewrite = Some(RegexMatchAndSubstitute {
                pattern: Some(regex(&format!("^{prefix}(/?)(.*)"))),
                substitution: r"/\2".to_owned(),
            });
        } else {
            action.prefix_rewrite.clone_from(&rewrite.uri);
        }
        if !rewrite.authority.is_empty() {
            authority.clone_from(&rewrite.authority);
        }
    }
    if !authority.is_empty() {
        action.host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral(authority));
    }
    let cluster_of = |d: &Destination| destination_cluster(d, services.get(d.host.as_str()).map(|s| &**s), port);
    if let Some(destination) = &from.mirror {
        let percent = match (&from.mirror_percentage, from.mirror_percent) {
            (Some(percent), _) => (percent.value > 0.0).then(|| fraction(percent.value)),
            (None, Some(percent)) => (percent > 0).then(|| whole_percent(percent)),
            (None, None) => Some(whole_percent(100)),
        };
        action.request_mirror_policies.extend(percent.map(|p| mirror(cx, cluster_of(destination), p)));
    }
    for policy in &from.mirrors {
        let percent = match &policy.percentage {
            Some(percent) => (percent.value > 0.0).then(|| fraction(percent.value)),
            None => Some(whole_percent(100)),
        };
        if let (Some(destination), Some(percent)) = (&policy.destination, percent) {
            action.request_mirror_policies.push(mirror(cx, cluster_of(destination), percent));
        }
    }
    let mut is_hashed = false;
    let none = Destination::default();
    let of = |d: &'_ HttpRouteDestination| d.destination.clone().unwrap_or_else(|| none.clone());
    if let [only] = &from.route[..] {
        let destination = of(only);
        action.cluster_specifier = Some(ClusterSpecifier::Cluster(cluster_of(&destination)));
        let own = Operations::of(only.headers.as_ref());
        out.request_headers_to_add.extend(own.request_add);
        out.request_headers_to_remove.extend(own.request_remove);
        out.response_headers_to_add.extend(own.response_add);
        out.response_headers_to_remove.extend(own.response_remove);
        if !own.authority.is_empty() && action.host_rewrite_specifier.is_none() {
            action.host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral(own.authority));
        }
        let hash = hash_for(cx, &destination);
        is_hashed = hash.is_some();
        action.hash_policy.extend(hash.as_ref().and_then(hash_policy));
    } else {
        let mut clusters = Vec::new();
        for own in from.route.iter().filter(|r| r.weight != 0) {
            let destination = of(own);
            let operations = Operations::of(own.headers.as_ref());
            clusters.push(ClusterWeight {
                name: cluster_of(&destination),
                weight: u32_value(u32::try_from(own.weight).unwrap_or_default()),
                request_headers_to_add: operations.request_add,
                request_headers_to_remove: operations.request_remove,
                response_headers_to_add: operations.response_add,
                response_headers_to_remove: operations.response_remove,
                host_rewrite_specifier: (!operations.authority.is_empty())
                    .then_some(cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(operations.authority)),
                ..ClusterWeight::default()
            });
            action.hash_policy.extend(hash_for(cx, &destination).as_ref().and_then(hash_policy));
        }
        action.cluster_specifier =
            Some(ClusterSpecifier::WeightedClusters(WeightedCluster { clusters, ..WeightedCluster::default() }));
    }
    let retries = from.retries.as_ref().or(cx.push.mesh.default_http_retry_policy.as_ref());
    action.retry_policy = retry::outbound(retries, is_hashed);
    out.action = Some(route::Action::Route(action));
}

/// No timeout unless a rule names one.
#[allow(deprecated)] // As istiod sends it.
pub(super) fn timeouts(action: &mut RouteAction, timeout: Option<istio_api::Duration>) {
    let timeout = timeout.map_or(seconds(0), duration);
    action.timeout = Some(timeout);
    action.max_grpc_timeout = Some(timeout);
}

fn policy_hash(policy: Option<&TrafficPolicy>) -> Option<&ConsistentHashLb> {
    policy?.load_balancer.as_ref()?.consistent_hash.as_ref()
}

fn port_hash(policy: Option<&TrafficPolicy>, port: u32) -> Option<&ConsistentHashLb> {
    let own = policy?.port_level_settings.iter().find(|p| p.port.as_ref().is_some_and(|n| n.number == port))?;
    own.load_balancer.as_ref()?.consistent_hash.as_ref()
}

/// The hash of a service's port, without subset.
pub(super) fn service_hash(cx: &Context<'_>, service: &Service, port: u16) -> Option<ConsistentHashLb> {
    let rule = cx.scope.destination_rule(cx.node, &service.hostname, true)?;
    let policy = rule.spec.traffic_policy.as_ref();
    port_hash(policy, u32::from(port)).or_else(|| policy_hash(policy)).cloned()
}

/// The hash of a destination: its subset's port, its subset, its port, its rule (istiod `HashForHTTPDestination`).
fn hash_for(cx: &Context<'_>, destination: &Destination) -> Option<ConsistentHashLb> {
    let rule = cx.scope.destination_rule(cx.node, &destination.host, true)?;
    let port = destination.port.as_ref().map(|p| p.number);
    let subset = rule.spec.subsets.iter().find(|s| s.name == destination.subset);
    let (own, whole) = (subset.and_then(|s| s.traffic_policy.as_ref()), rule.spec.traffic_policy.as_ref());
    port.and_then(|p| port_hash(own, p))
        .or_else(|| policy_hash(own))
        .or_else(|| port.and_then(|p| port_hash(whole, p)))
        .or_else(|| policy_hash(whole))
        .cloned()
}

pub(super) fn hash_policy(hash: &ConsistentHashLb) -> Option<HashPolicy> {
    use hash_policy::{ConnectionProperties, Cookie, CookieAttribute, Header, PolicySpecifier, QueryParameter};
    let specifier = if let Some(name) = &hash.http_header_name {
        PolicySpecifier::Header(Header { header_name: name.clone(), ..Header::default() })
    } else if let Some(cookie) = &hash.http_cookie {
        let attribute = |a: &istio_api::destination_rule::CookieAttribute| CookieAttribute {
            name: a.name.clone(),
            value: a.value.clone(),
        };
        PolicySpecifier::Cookie(Cookie {
            name: cookie.name.clone(),
            ttl: cookie.ttl.map(duration),
            path: cookie.path.clone(),
            attributes: cookie.attributes.iter().map(attribute).collect(),
        })
    } else if let Some(source_ip) = hash.use_source_ip {
        PolicySpecifier::ConnectionProperties(ConnectionProperties { source_ip })
    } else {
        let name = hash.http_query_parameter_name.clone()?;
        PolicySpecifier::QueryParameter(QueryParameter { name })
    };
    Some(HashPolicy { policy_specifier: Some(specifier), ..HashPolicy::default() })
}

fn cors(from: &CorsPolicy) -> EnvoyCors {
    EnvoyCors {
        allow_origin_string_match: if from.allow_origins.is_empty() {
            from.allow_origin.iter().map(|o| exact(o)).collect()
        } else {
            from.allow_origins.iter().filter_map(string_match).collect()
        },
        allow_methods: from.allow_methods.join(","),
        allow_headers: from.allow_headers.join(","),
        expose_headers: from.expose_headers.join(","),
        max_age: from.max_age.map(|age| age.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: from.allow_credentials.and_then(bool_value),
        filter_enabled: Some(runtime(whole_percent(100))),
        forward_not_matching_preflights: bool_value(from.unmatched_preflights != UnmatchedPreflights::Ignore),
        ..EnvoyCors::default()
    }
}

fn fault(from: &HttpFaultInjection) -> Option<HttpFault> {
    let delay = from.delay.as_ref().and_then(|delay| {
        let fixed = delay.fixed_delay?;
        Some(FaultDelay {
            percentage: Some(match &delay.percentage {
                Some(percent) => fraction(percent.value),
                None => whole_percent(u32::try_from(delay.percent).unwrap_or_default()),
            }),
            fault_delay_secifier: Some(FaultDelaySecifier::FixedDelay(duration(fixed))),
        })
    });
    let abort = from.abort.as_ref().and_then(|abort| {
        let error_type = match (abort.http_status, &abort.grpc_status) {
            (Some(status), _) => ErrorType::HttpStatus(u32::try_from(status).unwrap_or_default()),
            (None, Some(status)) => ErrorType::GrpcStatus(grpc_code(status)),
            (None, None) => return None,
        };
        Some(FaultAbort {
            percentage: abort.percentage.as_ref().map(|p| fraction(p.value)),
            error_type: Some(error_type),
            ..FaultAbort::default()
        })
    });
    (delay.is_some() || abort.is_some()).then(|| HttpFault { delay, abort, ..HttpFault::default() })
}

/// Unknown names are OK, as in istiod.
fn grpc_code(name: &str) -> u32 {
    GRPC_STATUSES.iter().position(|n| *n == name).and_then(|i| u32::try_from(i).ok()).unwrap_or_default()
}
