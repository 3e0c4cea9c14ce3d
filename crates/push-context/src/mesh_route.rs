//! HTTPRoutes and GRPCRoutes of services as VirtualServices (istiod `pilot/pkg/config/kube/gateway`).
//!
//! One for each namespace of routes, parent's host name and port; rules of several routes are merged in the order
//! that the Gateway API asks for.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use config_store::{Body, Kind, Object, Snapshot};
use istio_api::Duration;
use istio_api::gateway_api::{
    BackendKind, BackendRef, CorsFilter, Filter, GrpcMatch, HeaderFilter, HttpMatch, MeshParent, MirrorFilter,
    NamedMatch, ParentReference, PathMatchType, PathModifierType, RedirectFilter, Retry, RewriteFilter, Timeouts,
    ValueMatchType,
};
use istio_api::virtual_service::{
    CorsPolicy, Destination, HeaderOperations, Headers, HttpDirectResponse, HttpMatchRequest, HttpMirrorPolicy,
    HttpRedirect, HttpRetry, HttpRewrite, HttpRoute, HttpRouteDestination, Percent, PortSelector,
    RedirectPortSelection, RegexRewrite, StringMatch, UnmatchedPreflights, VirtualService,
};
use mesh_types::Labels;
use registry::Settings;

use crate::{Config, RouteSource};

/// The kinds that the conversion reads, besides the routes themselves.
pub(crate) const PARENTS: [Kind; 2] = [Kind::Service, Kind::ServiceEntry];
/// The kinds of route.
pub(crate) const ROUTES: [Kind; 2] = [Kind::HTTPRoute, Kind::GRPCRoute];

/// What names are looked up in.
#[derive(Clone, Copy)]
struct Known<'a> {
    snapshot: &'a Snapshot,
    settings: &'a Settings,
}

/// A rule of either kind of route.
struct Rule<'a> {
    name: Option<&'a str>,
    matches: Vec<HttpMatchRequest>,
    filters: &'a [Filter],
    backends: &'a [BackendRef],
    timeouts: Option<&'a Timeouts>,
    retry: Option<&'a Retry>,
}

/// The routes as VirtualServices, in the order of [`Snapshot::list`].
pub(crate) fn virtual_services(snapshot: &Snapshot, settings: &Settings) -> Vec<Config<VirtualService>> {
    let known = Known { snapshot, settings };
    let mut objects: Vec<&Object> = ROUTES.iter().flat_map(|kind| snapshot.list(*kind)).map(|o| &**o).collect();
    // Of rules that are equally specific the oldest route's wins.
    objects.sort_by(|a, b| (a.created, &a.key.namespace, &a.key.name).cmp(&(b.created, &b.key.namespace, &b.key.name)));
    let mut merged: BTreeMap<String, Config<VirtualService>> = BTreeMap::new();
    for object in objects {
        let namespace = &*object.key.namespace;
        let (parents, routes) = match &object.body {
            Body::HTTPRoute(spec) => (
                &spec.parent_refs,
                convert(
                    object,
                    spec.rules.iter().map(|rule| Rule {
                        name: rule.name.as_deref(),
                        matches: rule.matches.iter().map(http_match).collect(),
                        filters: &rule.filters,
                        backends: &rule.backend_refs,
                        timeouts: rule.timeouts.as_ref(),
                        retry: rule.retry.as_ref(),
                    }),
                    known,
                ),
            ),
            Body::GRPCRoute(spec) => (
                &spec.parent_refs,
                convert(
                    object,
                    spec.rules.iter().map(|rule| Rule {
                        name: rule.name.as_deref(),
                        matches: rule.matches.iter().map(grpc_match).collect(),
                        filters: &rule.filters,
                        backends: &rule.backend_refs,
                        timeouts: None,
                        retry: None,
                    }),
                    known,
                ),
            ),
            _ => continue,
        };
        if routes.is_empty() {
            continue;
        }
        let mut parents: Vec<&ParentReference> = parents.iter().collect();
        parents.sort_by_key(|parent| order(parent, namespace));
        for parent in parents {
            let routes = match parent.port {
                Some(port) => routes.iter().map(|(route, source)| (only_on(route, port), source.clone())).collect(),
                None => routes.clone(),
            };
            let key = parent.port.map_or_else(|| namespace.to_owned(), |port| format!("{namespace}~{port}"));
            for host in hosts(parent, namespace, known) {
                let name = format!("{key}~{host}");
                let rule = merged.entry(name.clone()).or_insert_with(|| Config {
                    name: name.into(),
                    namespace: object.key.namespace.clone(),
                    created: object.created,
                    annotations: Labels::new(),
                    sources: Vec::new(),
                    spec: VirtualService { hosts: vec![host], ..VirtualService::default() },
                });
                let (routes, sources): (Vec<_>, Vec<_>) = Vec::clone(&routes).into_iter().unzip();
                rule.spec.http.extend(routes);
                rule.sources.extend(sources);
            }
        }
    }
    let mut out: Vec<_> = merged.into_values().collect();
    for rule in &mut out {
        let routes = std::mem::take(&mut rule.spec.http);
        let mut routes: Vec<_> = routes.into_iter().zip(std::mem::take(&mut rule.sources)).collect();
        routes.sort_by_key(|(route, _)| precedence(route));
        (rule.spec.http, rule.sources) = routes.into_iter().unzip();
    }
    out.sort_by(|a, b| (a.created, &a.name, &a.namespace).cmp(&(b.created, &b.name, &b.namespace)));
    out
}

impl Known<'_> {
    /// Whether a Service or a ServiceEntry has that name.
    fn has_host(&self, host: &str) -> bool {
        let in_cluster = host.strip_suffix(&*self.settings.domain).and_then(|rest| rest.strip_suffix(".svc."));
        let service = in_cluster.and_then(|rest| rest.split_once('.'));
        let entries = || self.snapshot.list(Kind::ServiceEntry);
        service.is_some_and(|(name, namespace)| self.snapshot.find(Kind::Service, namespace, name).is_some())
            || entries()
                .any(|entry| matches!(&entry.body, Body::ServiceEntry(spec) if spec.hosts.iter().any(|h| h == host)))
    }
}

/// istiod `parentRefString`.
fn order(parent: &ParentReference, namespace: &str) -> String {
    let or = |text: &Option<String>, default: &str| text.clone().unwrap_or_else(|| default.to_owned());
    format!(
        "{}/{}/{}/{}/{}.{}",
        or(&parent.group, "gateway.networking.k8s.io"),
        or(&parent.kind, "Gateway"),
        parent.name,
        parent.section_name,
        parent.port.unwrap_or_default(),
        or(&parent.namespace, namespace)
    )
}

/// The host names of a parent; none for gateways and for what does not exist.
fn hosts(parent: &ParentReference, namespace: &str, known: Known<'_>) -> Vec<String> {
    let namespace = parent.namespace.as_deref().unwrap_or(namespace);
    let found = |kind| known.snapshot.find(kind, namespace, &parent.name);
    match parent.mesh_parent() {
        Some(MeshParent::Service) if found(Kind::Service).is_some() => {
            vec![format!("{}.{namespace}.svc.{}", parent.name, known.settings.domain)]
        }
        Some(MeshParent::ServiceEntry) => match found(Kind::ServiceEntry).map(|object| &object.body) {
            Some(Body::ServiceEntry(spec)) => spec.hosts.clone(),
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// istiod `augmentPortMatch`.
fn only_on(route: &HttpRoute, port: u32) -> HttpRoute {
    let mut route = route.clone();
    if route.r#match.is_empty() {
        route.r#match.push(HttpMatchRequest::default());
    }
    route.r#match.iter_mut().for_each(|m| m.port = port);
    route
}

/// The order in which rules are tried, as the Gateway API's specification of HTTPRouteRule has it
/// (istiod `sortHTTPRoutes`). Every route has one match at most.
fn precedence(route: &HttpRoute) -> impl Ord + use<> {
    route.r#match.first().map_or((true, Reverse((0, 0, false, 0, 0))), |m| {
        let (rank, length) = match m.uri.as_ref().map(|uri| (&uri.exact, &uri.prefix, &uri.regex)) {
            Some((Some(exact), _, _)) => (3, exact.len()),
            Some((_, Some(prefix), _)) => (2, prefix.len()),
            Some((_, _, Some(regex))) => (1, regex.len()),
            _ => (0, 0),
        };
        (false, Reverse((rank, length, m.method.is_some(), m.headers.len(), m.query_params.len())))
    })
}

fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

fn exact(value: &str) -> StringMatch {
    StringMatch { exact: text(value), ..StringMatch::default() }
}

fn prefix(value: &str) -> StringMatch {
    StringMatch { prefix: text(value), ..StringMatch::default() }
}

fn regex(value: &str) -> StringMatch {
    StringMatch { regex: text(value), ..StringMatch::default() }
}

fn named(matches: &[NamedMatch]) -> BTreeMap<String, StringMatch> {
    let value = |m: &NamedMatch| match m.r#type {
        ValueMatchType::Exact => exact(&m.value),
        ValueMatchType::RegularExpression => regex(&m.value),
    };
    matches.iter().map(|m| (m.name.clone(), value(m))).collect()
}

fn http_match(m: &HttpMatch) -> HttpMatchRequest {
    let path = m.path.clone().unwrap_or_default();
    let value = path.value.as_deref().unwrap_or("/");
    let uri = match path.r#type {
        // "When specified, a trailing `/` is ignored."
        PathMatchType::PathPrefix if value != "/" => prefix(value.strip_suffix('/').unwrap_or(value)),
        PathMatchType::PathPrefix => prefix(value),
        PathMatchType::Exact => exact(value),
        PathMatchType::RegularExpression => regex(value),
    };
    HttpMatchRequest {
        uri: Some(uri),
        headers: named(&m.headers),
        query_params: named(&m.query_params),
        method: m.method.as_deref().map(exact),
        ..HttpMatchRequest::default()
    }
}

/// istiod `createGRPCURIMatch`: the path of a call is `/SERVICE/METHOD`.
fn grpc_match(m: &GrpcMatch) -> HttpMatchRequest {
    let uri = m.method.as_ref().and_then(|method| {
        let is_exact = method.r#type == ValueMatchType::Exact;
        Some(match (&method.service, &method.method) {
            (Some(service), Some(name)) if is_exact => exact(&format!("/{service}/{name}")),
            (Some(service), Some(name)) => regex(&format!("/{service}/{name}")),
            (Some(service), None) if is_exact => prefix(&format!("/{service}/")),
            (Some(service), None) => regex(&format!("/{service}/.+")),
            (None, Some(name)) => regex(&format!("/[^/]+/{name}")),
            (None, None) => return None,
        })
    });
    HttpMatchRequest { uri, headers: named(&m.headers), ..HttpMatchRequest::default() }
}

/// The routes of one object, each with one match at most, and where they were written (istiod `convertHTTPRoute`).
fn convert<'a>(
    object: &Object,
    rules: impl Iterator<Item = Rule<'a>>,
    known: Known<'_>,
) -> Vec<(HttpRoute, RouteSource)> {
    let namespace = &*object.key.namespace;
    let mut out = Vec::new();
    for (position, rule) in rules.enumerate() {
        let name = match rule.name {
            Some(name) => name.to_owned(),
            None => format!("{namespace}.{}.{position}", object.key.name),
        };
        let mut route = HttpRoute { name, ..HttpRoute::default() };
        for filter in rule.filters {
            apply(filter, &mut route, namespace, known);
        }
        route.retries = rule.retry.map(retries);
        if let Some(timeouts) = rule.timeouts {
            let set = |timeout: Option<Duration>| timeout.filter(|timeout| !timeout.is_zero());
            route.timeout = set(timeouts.request);
            if let Some(timeout) = set(timeouts.backend_request) {
                match &mut route.retries {
                    Some(retries) => retries.per_try_timeout = Some(timeout),
                    None => route.timeout = Some(timeout),
                }
            }
        }
        let nowhere = rule.backends.iter().all(|backend| backend.weight == Some(0));
        if nowhere && route.redirect.is_none() {
            route.direct_response = Some(HttpDirectResponse { status: 500, body: None });
        } else {
            route.route = destinations(rule.backends, namespace, known.settings);
        }
        let source = |field| RouteSource { kind: object.key.kind, name: object.key.name.clone(), field };
        if rule.matches.is_empty() {
            out.push((route, source(format!("spec.rules[{position}]"))));
            continue;
        }
        for (index, m) in rule.matches.into_iter().enumerate() {
            let route = HttpRoute { r#match: vec![m], ..route.clone() };
            out.push((route, source(format!("spec.rules[{position}].matches[{index}]"))));
        }
    }
    out
}

fn destinations(backends: &[BackendRef], namespace: &str, settings: &Settings) -> Vec<HttpRouteDestination> {
    let used: Vec<&BackendRef> = backends.iter().filter(|backend| backend.weight != Some(0)).collect();
    let weight = |backend: &BackendRef| match used.len() {
        1 => 0,
        _ => i32::try_from(backend.weight.unwrap_or(1)).unwrap_or(i32::MAX),
    };
    used.iter()
        .map(|backend| {
            let mut headers = Headers::default();
            for filter in &backend.filters {
                modify_headers(filter, &mut headers);
            }
            HttpRouteDestination {
                destination: Some(destination(backend, namespace, settings)),
                weight: weight(backend),
                headers: (headers != Headers::default()).then_some(headers),
            }
        })
        .collect()
}

fn destination(backend: &BackendRef, namespace: &str, settings: &Settings) -> Destination {
    let host = match backend.backend_kind() {
        BackendKind::Service => {
            let namespace = backend.namespace.as_deref().unwrap_or(namespace);
            format!("{}.{namespace}.svc.{}", backend.name, settings.domain)
        }
        BackendKind::Hostname => backend.name.clone(),
        BackendKind::Unknown => return Destination::default(),
    };
    let port = backend.port.map(|number| PortSelector { number });
    Destination { host, port, ..Destination::default() }
}

fn retries(retry: &Retry) -> HttpRetry {
    // "Implementations SHOULD retry on connection errors (disconnect, reset, timeout, TCP failure)".
    let mut retry_on = "connect-failure,refused-stream,unavailable,cancelled".to_owned();
    for code in &retry.codes {
        retry_on.push_str(&format!(",{code}"));
    }
    let attempts = i32::try_from(retry.attempts.unwrap_or(2)).unwrap_or(i32::MAX);
    if attempts == 0 {
        retry_on.clear();
    }
    HttpRetry { attempts, retry_on, backoff: retry.backoff, ..HttpRetry::default() }
}

fn apply(filter: &Filter, route: &mut HttpRoute, namespace: &str, known: Known<'_>) {
    match filter.r#type.as_str() {
        "RequestHeaderModifier" | "ResponseHeaderModifier" => {
            modify_headers(filter, route.headers.get_or_insert_default());
        }
        "RequestRedirect" => route.redirect = filter.request_redirect.as_ref().map(redirect),
        "RequestMirror" => {
            route.mirrors.extend(filter.request_mirror.as_ref().and_then(|m| mirror(m, namespace, known)));
        }
        "URLRewrite" => route.rewrite = filter.url_rewrite.as_ref().and_then(rewrite),
        "CORS" => route.cors_policy = filter.cors.as_ref().map(cors),
        _ => {}
    }
}

fn modify_headers(filter: &Filter, headers: &mut Headers) {
    match filter.r#type.as_str() {
        "RequestHeaderModifier" => {
            headers.request = filter.request_header_modifier.as_ref().map(operations).or(headers.request.take());
        }
        "ResponseHeaderModifier" => {
            headers.response = filter.response_header_modifier.as_ref().map(operations).or(headers.response.take());
        }
        _ => {}
    }
}

fn operations(filter: &HeaderFilter) -> HeaderOperations {
    let map = |list: &[istio_api::gateway_api::Header]| {
        let mut out = BTreeMap::new();
        for header in list {
            // "Subsequent entries with an equivalent header name MUST be ignored".
            out.entry(header.name.to_ascii_lowercase()).or_insert_with(|| header.value.clone());
        }
        out
    };
    HeaderOperations { set: map(&filter.set), add: map(&filter.add), remove: filter.remove.clone() }
}

fn redirect(filter: &RedirectFilter) -> HttpRedirect {
    let mut out = HttpRedirect {
        redirect_code: filter.status_code.unwrap_or_default(),
        authority: filter.hostname.clone().unwrap_or_default(),
        scheme: filter.scheme.clone().unwrap_or_default(),
        port: filter.port,
        ..HttpRedirect::default()
    };
    if filter.port.is_none() {
        // "When empty, port (if specified) of the request is used", which is not what a VirtualService means.
        out.derive_port = Some(match filter.scheme {
            Some(_) => RedirectPortSelection::FromProtocolDefault,
            None => RedirectPortSelection::FromRequestPort,
        });
    }
    match &filter.path {
        Some(path) if path.r#type == PathModifierType::ReplaceFullPath => out.uri.clone_from(&path.replace_full_path),
        Some(path) => out.prefix_rewrite.clone_from(&path.replace_prefix_match),
        None => {}
    }
    out
}

fn rewrite(filter: &RewriteFilter) -> Option<HttpRewrite> {
    let mut out = HttpRewrite { authority: filter.hostname.clone().unwrap_or_default(), ..HttpRewrite::default() };
    match &filter.path {
        Some(path) if path.r#type == PathModifierType::ReplaceFullPath => {
            out.uri_regex_rewrite =
                Some(RegexRewrite { r#match: "/.*".to_owned(), rewrite: path.replace_full_path.clone() });
        }
        Some(path) => {
            let prefix = &path.replace_prefix_match;
            out.uri = prefix.strip_suffix('/').unwrap_or(prefix).to_owned();
            if out.uri.is_empty() {
                // The prefix is taken away.
                out.uri.push('/');
            }
        }
        None => {}
    }
    (out != HttpRewrite::default()).then_some(out)
}

/// Nothing for backends that do not exist.
fn mirror(filter: &MirrorFilter, namespace: &str, known: Known<'_>) -> Option<HttpMirrorPolicy> {
    let destination = destination(&filter.backend_ref, namespace, known.settings);
    if !known.has_host(&destination.host) {
        return None;
    }
    let percentage = match (&filter.fraction, filter.percent) {
        (Some(fraction), _) => {
            let whole = f64::from(fraction.denominator.unwrap_or(100));
            Some(100.0 * f64::from(fraction.numerator) / whole)
        }
        (None, percent) => percent.map(f64::from),
    };
    Some(HttpMirrorPolicy { destination: Some(destination), percentage: percentage.map(|value| Percent { value }) })
}

/// istiod `createCorsFilter`.
fn cors(filter: &CorsFilter) -> CorsPolicy {
    let origin = |origin: &String| match origin.strip_suffix('*') {
        // Any origin as RFC 6454 writes it: scheme, host, port.
        Some("") => regex(r"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#]+$"),
        Some(start) if !start.contains('*') => prefix(start),
        None if !origin.contains('*') => exact(origin),
        _ => {
            let parts: Vec<String> = origin.split('*').map(quote).collect();
            regex(&format!("^{}$", parts.join(".*")))
        }
    };
    CorsPolicy {
        allow_origins: filter.allow_origins.iter().filter(|o| !o.is_empty()).map(origin).collect(),
        allow_credentials: filter.allow_credentials.then_some(true),
        allow_methods: filter.allow_methods.clone(),
        allow_headers: filter.allow_headers.clone(),
        expose_headers: filter.expose_headers.clone(),
        max_age: (filter.max_age > 0).then(|| Duration::from_secs(filter.max_age.into())),
        unmatched_preflights: UnmatchedPreflights::Ignore,
        ..CorsPolicy::default()
    }
}

/// Text as a regular expression that means just it, as Go's `regexp.QuoteMeta`.
pub fn quote(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
