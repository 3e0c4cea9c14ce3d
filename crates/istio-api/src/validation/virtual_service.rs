use std::collections::{BTreeMap, BTreeSet};

use mesh_types::Hostname;

use super::{Check, text};
use crate::virtual_service::{
    Abort, CorsPolicy, Destination, GRPC_STATUSES, HeaderOperations, Headers, HttpDirectResponse, HttpMatchRequest,
    HttpRedirect, HttpRetry, HttpRewrite, HttpRoute, Percent, RouteDestination, StringMatch, TcpRoute, TlsRoute,
};
use crate::{Violation, VirtualService};

/// Methods of `corsPolicy.allowMethods`.
const CORS_METHODS: [&str; 10] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*"];

/// What `retryOn` may list, besides status codes (istiod `supportedRetryOnPolicies`).
const RETRY_ON: [&str; 18] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
    "unknown",
    "envoy-overloaded",
];

impl VirtualService {
    /// What istiod would refuse or warn of (`ValidateVirtualService`).
    pub fn validate(&self, namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| self.walk(check, namespace))
    }

    fn walk(&self, check: &mut Check, namespace: &str) {
        let delegate = self.hosts.is_empty();
        if delegate {
            check.require(self.gateways.is_empty(), "delegate virtual service must have no gateways specified");
            check.require(self.tls.is_empty(), "delegate virtual service must have no tls route specified");
            check.require(self.tcp.is_empty(), "delegate virtual service must have no tcp route specified");
        }
        gateways(check, &self.gateways);
        let mesh = self.gateways.is_empty() || self.gateways.iter().any(|gateway| gateway == "mesh");
        self.hosts(check, mesh);
        if self.http.is_empty() && self.tcp.is_empty() && self.tls.is_empty() {
            check.error("http, tcp or tls must be provided in virtual service");
        }
        check.each("http", &self.http, |check, route| http_route(check, route, delegate, mesh));
        check.each("tls", &self.tls, |check, route| self.tls_route(check, route));
        check.each("tcp", &self.tcp, tcp_route);
        check.export_to(namespace, &self.export_to, false);
        unreachable_routes(check, &self.http);
    }

    fn hosts(&self, check: &mut Check, mesh: bool) {
        let mut valid = Vec::new();
        check.each("hosts", &self.hosts, |check, host| match text::wildcard_host(host) {
            Err(reason) if !text::is_ip(host) => check.error(reason),
            Ok(()) if mesh && host == "*" => {
                check.error("wildcard host * is not allowed for virtual services bound to the mesh gateway");
            }
            _ => valid.push(host),
        });
        if valid.len() < self.hosts.len() {
            return;
        }
        let names: Vec<Option<Hostname>> = self.hosts.iter().map(|host| host.parse().ok()).collect();
        for (index, later) in names.iter().enumerate() {
            let twin =
                names[..index].iter().flatten().find(|earlier| later.as_ref().is_some_and(|l| l.matches(earlier)));
            if let Some(twin) = twin {
                check.at(format_args!("hosts[{index}]"), |check| {
                    check.error(format!("duplicate hosts in virtual service: {twin} & {}", self.hosts[index]));
                });
            }
        }
    }

    fn tls_route(&self, check: &mut Check, route: &TlsRoute) {
        check.require(!route.r#match.is_empty(), "TLS route must have at least one match condition");
        check.each("match", &route.r#match, |check, item| {
            check.require(!item.sni_hosts.is_empty(), "TLS match must have at least one SNI host");
            check.each("sniHosts", &item.sni_hosts, |check, sni| self.sni_host(check, sni));
            l4_match(check, &item.destination_subnets, item.port, &item.source_labels, &item.gateways);
        });
        check.require(!route.route.is_empty(), "TLS route is required");
        destinations(check, &route.route);
    }

    fn sni_host(&self, check: &mut Check, sni: &str) {
        if let Err(reason) = text::wildcard_host(sni) {
            return if text::is_ip(sni) {
                check.warning(format!(
                    "using an IP address ({sni:?}) goes against SNI spec and most clients do not support this"
                ));
            } else {
                check.error(reason);
            };
        }
        let Ok(name) = sni.parse::<Hostname>() else { return };
        let covered = |host: &String| host.parse::<Hostname>().is_ok_and(|host| host.contains(&name));
        if !self.hosts.iter().any(covered) {
            let hosts = self.hosts.join(", ");
            check.error(format!(
                "SNI host {sni:?} is not a compatible subset of any of the virtual service hosts: [{hosts}]"
            ));
        }
    }
}

fn gateways(check: &mut Check, names: &[String]) {
    check.each("gateways", names, |check, name| match name.split_once('/') {
        Some((namespace, name)) => {
            check.require(text::is_dns_label(namespace), "invalid value for namespace");
            check.require(text::is_dns_label(name), "invalid value for gateway name");
        }
        None => {
            if name.contains('.') {
                check
                    .warning(format!("using legacy gatewayName format {name:?}; prefer the <namespace>/<name> format"));
            }
            check.refuse(text::fqdn(name));
        }
    });
}

fn http_route(check: &mut Check, route: &HttpRoute, delegate: bool, mesh: bool) {
    conflicts(check, route, delegate);
    check.each("match", &route.r#match, |check, item| http_match(check, item, mesh));
    check.some("headers", &route.headers, headers);
    check.some("corsPolicy", &route.cors_policy, cors);
    check.some("fault", &route.fault, |check, fault| {
        check.require(
            fault.abort.is_some() || fault.delay.is_some(),
            "HTTP fault injection must have an abort and/or a delay",
        );
        check.some("abort", &fault.abort, abort);
        check.some("delay", &fault.delay, |check, delay| {
            percentage(check, &delay.percentage);
            check.duration("fixedDelay", delay.fixed_delay);
            check.one_of(&[
                ("fixedDelay", delay.fixed_delay.is_some()),
                ("exponentialDelay", delay.exponential_delay.is_some()),
            ]);
            check.require(delay.exponential_delay.is_none(), "exponentialDelay not supported yet");
        });
    });
    if let Some(percent) = route.mirror_percent {
        check.at("mirrorPercent", |check| {
            check.require(percent <= 100, "must have a max value of 100");
            check.warning("using deprecated setting \"mirrorPercent\", use \"mirrorPercentage\" instead");
        });
    }
    check.some("mirrorPercentage", &route.mirror_percentage, whole_percentage);
    check.some("mirror", &route.mirror, destination);
    check.each("mirrors", &route.mirrors, |check, mirror| {
        check.require(mirror.destination.is_some(), "destination is required for mirrors");
        check.some("destination", &mirror.destination, destination);
        check.some("percentage", &mirror.percentage, whole_percentage);
    });
    check.some("redirect", &route.redirect, |check, item| redirect(check, item, &route.r#match));
    check.some("directResponse", &route.direct_response, direct_response);
    check.some("retries", &route.retries, retry);
    check.some("rewrite", &route.rewrite, rewrite);
    authority_set_once(check, route);
    check.each("route", &route.route, |check, item| {
        check.require(item.destination.is_some(), "destination is required");
        check.some("destination", &item.destination, destination);
        check.some("headers", &item.headers, headers);
        check.at("weight", |check| check.require(item.weight >= 0, "must not be negative"));
    });
    if route.route.len() > 1 && route.route.iter().all(|item| item.weight == 0) {
        check.at("route", |check| check.error("total destination weight = 0"));
    }
    check.duration("timeout", route.timeout);
}

/// istiod `validateHTTPRouteConflict`.
fn conflicts(check: &mut Check, route: &HttpRoute, delegate: bool) {
    if route.delegate.is_some() && !delegate {
        check.require(route.redirect.is_none(), "root HTTP route must not specify redirect");
        check.require(route.route.is_empty(), "root HTTP route must not specify route");
        return;
    }
    check.require(route.delegate.is_none(), "delegate HTTP route cannot contain delegate");
    let action = match (&route.redirect, &route.direct_response) {
        (Some(_), Some(_)) => {
            check.error("HTTP route rule cannot contain both direct_response and redirect");
            "redirect"
        }
        (Some(_), None) => "redirect",
        (None, Some(_)) => "direct_response",
        (None, None) => {
            check.require(!route.route.is_empty(), "HTTP route, redirect or direct_response is required");
            ""
        }
    };
    if !action.is_empty() {
        for (name, set) in
            [("route", !route.route.is_empty()), ("fault", route.fault.is_some()), ("rewrite", route.rewrite.is_some())]
        {
            if set {
                check.error(format!("HTTP route cannot contain both {name} and {action}"));
            }
        }
    }
    check.require(
        route.mirror.is_none() || route.mirrors.is_empty(),
        "HTTP route cannot contain both mirror and mirrors",
    );
}

fn http_match(check: &mut Check, item: &HttpMatchRequest, mesh: bool) {
    check.entries("headers", &item.headers, |check, name, value| {
        check.refuse(text::header_match(name));
        string_match(check, value, false);
    });
    check.entries("withoutHeaders", &item.without_headers, |check, name, value| {
        check.refuse(text::header_match(name));
        // `*` is no RE2 pattern here: istiod reads it as "present".
        if value.regex.as_deref() != Some("*") {
            string_match(check, value, false);
        }
    });
    if mesh && item.headers.keys().chain(item.without_headers.keys()).any(|key| text::is_jwt_claim(key)) {
        check.error("JWT claim based routing is only supported for gateways");
    }
    check.some("uri", &item.uri, |check, value| string_match(check, value, true));
    check.some("scheme", &item.scheme, |check, value| string_match(check, value, false));
    check.some("method", &item.method, |check, value| string_match(check, value, false));
    check.some("authority", &item.authority, |check, value| string_match(check, value, false));
    check.entries("queryParams", &item.query_params, |check, _, value| string_match(check, value, false));
    if item.port != 0 {
        check.port("port", item.port);
    }
    check.labels("sourceLabels", &item.source_labels);
    gateways(check, &item.gateways);
    if !item.source_namespace.is_empty() {
        check.at("sourceNamespace", |check| {
            check.require(text::is_dns_label(&item.source_namespace), "is not a namespace")
        });
    }
}

fn string_match(check: &mut Check, value: &StringMatch, empty_prefix: bool) {
    check.one_of(&[
        ("exact", value.exact.is_some()),
        ("prefix", value.prefix.is_some()),
        ("regex", value.regex.is_some()),
    ]);
    if value.prefix.as_deref() == Some("") && !empty_prefix {
        check.at("prefix", |check| check.error("prefix string match should not be empty"));
    }
    if let Some(regex) = &value.regex {
        check.at("regex", |check| match regex.as_str() {
            "" => check.error("regex string match should not be empty"),
            regex => check.refuse(text::regex(regex)),
        });
    }
}

fn headers(check: &mut Check, headers: &Headers) {
    check.some("request", &headers.request, |check, operations| header_operations(check, operations, true));
    check.some("response", &headers.response, |check, operations| header_operations(check, operations, false));
}

fn header_operations(check: &mut Check, operations: &HeaderOperations, authority: bool) {
    for (field, entries) in [("add", &operations.add), ("set", &operations.set)] {
        check.entries(field, entries, |check, name, value| {
            check.refuse(text::header_operation(name, authority));
            check.refuse(text::header_value(value));
        });
    }
    check.each("remove", &operations.remove, |check, name| check.refuse(text::header_operation(name, false)));
}

/// istiod `validateAuthorityRewrite`.
fn authority_set_once(check: &mut Check, route: &HttpRoute) {
    let rewritten = route.rewrite.iter().filter(|rewrite| !rewrite.authority.is_empty()).count();
    let operations = route.headers.as_ref().and_then(|headers| headers.request.as_ref());
    let names = operations.into_iter().flat_map(|operations| operations.set.keys().chain(operations.add.keys()));
    let set = names.filter(|name| text::is_authority(name)).count();
    check.require(rewritten + set <= 1, "authority header cannot be set multiple times");
}

fn cors(check: &mut Check, policy: &CorsPolicy) {
    check.each("allowOrigins", &policy.allow_origins, |check, origin| {
        let given = [&origin.exact, &origin.prefix, &origin.regex].into_iter().flatten().any(|text| !text.is_empty());
        check.require(given, "is not a valid match type for CORS allow origins");
        string_match(check, origin, true);
    });
    check.each("allowMethods", &policy.allow_methods, |check, method| {
        check.require(CORS_METHODS.contains(&method.as_str()), "is not a supported HTTP method");
    });
    for (field, names) in [("allowHeaders", &policy.allow_headers), ("exposeHeaders", &policy.expose_headers)] {
        check.each(field, names, |check, name| check.refuse(text::header_name(name)));
    }
    check.duration("maxAge", policy.max_age);
    if policy.max_age.is_some_and(|age| age.subsec_nanos() > 0) {
        check.at("maxAge", |check| check.error("duration is accurate only to seconds precision"));
    }
}

fn abort(check: &mut Check, abort: &Abort) {
    percentage(check, &abort.percentage);
    let set = [
        ("httpStatus", abort.http_status.is_some()),
        ("grpcStatus", abort.grpc_status.is_some()),
        ("http2Error", abort.http2_error.is_some()),
    ];
    check.one_of(&set);
    if set.iter().all(|(_, set)| !set) {
        check.warning("abort configured, but error type not set");
    }
    check.some("httpStatus", &abort.http_status, |check, status| http_status(check, i64::from(*status)));
    check.some("grpcStatus", &abort.grpc_status, |check, status| {
        check.require(GRPC_STATUSES.contains(&status.as_str()), "is not a gRPC status such as NOT_FOUND");
    });
    check.require(abort.http2_error.is_none(), "HTTP/2 abort fault injection not supported yet");
}

fn http_status(check: &mut Check, status: i64) {
    if !(200..=600).contains(&status) {
        check.error(format!("HTTP status {status} is not in range 200-599"));
    }
}

fn percentage(check: &mut Check, percentage: &Option<Percent>) {
    check.some("percentage", percentage, |check, percentage| {
        let value = percentage.value;
        if !(0.0..=100.0).contains(&value) || (value > 0.0 && value < 0.0001) {
            check.error(format!("percentage {value} is neither 0.0, nor in range [0.0001, 100.0]"));
        }
    });
}

fn whole_percentage(check: &mut Check, percentage: &Percent) {
    check.require((0.0..=100.0).contains(&percentage.value), "must be in range 0..100");
}

/// istiod `validateDestination`.
pub(super) fn destination(check: &mut Check, destination: &Destination) {
    check.at("host", |check| match destination.host.as_str() {
        "*" => check.error("invalid destination host *"),
        host => check.refuse(text::wildcard_host(host)),
    });
    if !destination.subset.is_empty() {
        check.at("subset", |check| check.require(text::is_dns_label(&destination.subset), "subset name is invalid"));
    }
    check.some("port", &destination.port, |check, port| check.port("number", port.number));
}

fn redirect(check: &mut Check, redirect: &HttpRedirect, matches: &[HttpMatchRequest]) {
    let port = redirect.port.is_some() || redirect.derive_port.is_some();
    let HttpRedirect { uri, prefix_rewrite, authority, scheme, .. } = redirect;
    check
        .require(uri.is_empty() || prefix_rewrite.is_empty(), "redirect may only specify one of uri or prefix_rewrite");
    check.one_of(&[("port", redirect.port.is_some()), ("derivePort", redirect.derive_port.is_some())]);
    if !prefix_rewrite.is_empty()
        && matches.iter().any(|item| item.uri.as_ref().is_some_and(|uri| uri.prefix.is_none()))
    {
        check.error("redirect prefix_rewrite requires all URI matches to use prefix match type");
    }
    let nothing = [uri, prefix_rewrite, authority, scheme].into_iter().all(String::is_empty) && !port;
    check.require(!nothing, "redirect must specify URI, authority, scheme, or port");
    let code = redirect.redirect_code;
    check.require(code == 0 || (300..=399).contains(&code), "redirectCode must be 3xx");
    check.require(
        matches!(scheme.as_str(), "" | "http" | "https"),
        "invalid redirect scheme, must be \"http\" or \"https\"",
    );
    if let Some(port) = redirect.port.filter(|port| *port > 0) {
        check.port("port", port);
    }
}

fn direct_response(check: &mut Check, response: &HttpDirectResponse) {
    check.at("status", |check| http_status(check, i64::from(response.status)));
    check.some("body", &response.body, |check, body| {
        check.one_of(&[("string", body.string.is_some()), ("bytes", body.bytes.is_some())]);
        match body.string.as_ref().or(body.bytes.as_ref()).map_or(0, String::len) {
            size if size > 1 << 20 => check.error("must be less than 1MB"),
            size if size > 100 << 10 => check.warning("large direct_responses may impact control plane performance"),
            _ => {}
        }
    });
}

/// istiod `ValidateHTTPRetry`.
pub(super) fn retry(check: &mut Check, retry: &HttpRetry) {
    check.at("attempts", |check| check.require(retry.attempts >= 0, "cannot be negative"));
    if retry.attempts == 0
        && (retry.per_try_timeout.is_some() || !retry.retry_on.is_empty() || retry.retry_remote_localities.is_some())
    {
        check.error("http retry policy configured when attempts are set to 0 (disabled)");
    }
    check.duration("perTryTimeout", retry.per_try_timeout);
    check.duration("backoff", retry.backoff);
    check.at("retryOn", |check| {
        let policies = retry.retry_on.split(',').filter(|_| !retry.retry_on.is_empty());
        for policy in policies {
            let status = policy.parse::<u16>().is_ok_and(crate::virtual_service::is_http_status);
            if !status && !RETRY_ON.contains(&policy) {
                check.error(format!("{policy:?} is not a valid retry condition"));
            }
        }
    });
}

fn rewrite(check: &mut Check, rewrite: &HttpRewrite) {
    let regex = rewrite.uri_regex_rewrite.is_some();
    check.require(rewrite.uri.is_empty() || !regex, "rewrite may only contain one of URI or UriRegexRewrite");
    if rewrite.uri.is_empty() && rewrite.authority.is_empty() && !regex {
        check.error("rewrite must specify at least one of URI, UriRegexRewrite, or authority");
    }
    check.some("uriRegexRewrite", &rewrite.uri_regex_rewrite, |check, regex| {
        let complete = !regex.r#match.is_empty() && !regex.rewrite.is_empty();
        check.require(complete, "UriRegexRewrite requires both Rewrite and Match fields to be specified");
        check.at("match", |check| check.refuse(text::regex(&regex.r#match)));
    });
}

fn tcp_route(check: &mut Check, route: &TcpRoute) {
    check.each("match", &route.r#match, |check, item| {
        l4_match(check, &item.destination_subnets, item.port, &item.source_labels, &item.gateways);
    });
    check.require(!route.route.is_empty(), "TCP route is required");
    destinations(check, &route.route);
}

fn l4_match(check: &mut Check, subnets: &[String], port: u32, labels: &BTreeMap<String, String>, names: &[String]) {
    check.each("destinationSubnets", subnets, |check, subnet| check.refuse(text::subnet(subnet)));
    if port != 0 {
        check.port("port", port);
    }
    check.labels("sourceLabels", labels);
    gateways(check, names);
}

fn destinations(check: &mut Check, routes: &[RouteDestination]) {
    check.each("route", routes, |check, item| {
        check.require(item.destination.is_some(), "destination is required");
        check.some("destination", &item.destination, destination);
        check.at("weight", |check| check.require(item.weight >= 0, "must not be negative"));
    });
    if routes.len() > 1 && routes.iter().all(|item| item.weight == 0) {
        check.at("route", |check| check.error("total destination weight = 0"));
    }
}

/// istiod `analyzeUnreachableHTTPRules`, without the overlap of prefixes.
fn unreachable_routes(check: &mut Check, routes: &[HttpRoute]) {
    let mut catch_all = false;
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (index, route) in routes.iter().enumerate() {
        let reason = if catch_all {
            Some("a route without matches is defined before")
        } else if !route.r#match.is_empty() {
            let texts = route.r#match.iter().map(|item| {
                let unnamed = HttpMatchRequest { name: String::new(), ..item.clone() };
                serde_json::to_string(&unnamed).unwrap_or_default()
            });
            // Not `all`, which would stop at the first new one and leave the rest unseen.
            let fresh = texts.filter(|text| seen.insert(text.clone())).count();
            (fresh == 0).then_some("all matches used by prior rules")
        } else {
            catch_all = true;
            None
        };
        if let Some(reason) = reason {
            check.at(format_args!("http[{index}]"), |check| check.warning(format!("rule not used ({reason})")));
        }
    }
}
