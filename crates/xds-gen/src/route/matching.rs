//! Which requests a route takes.

use envoy_api::pb::envoy::r#type::matcher::v3::MetadataMatcher;
use envoy_api::route::{
    HeaderMatcher, QueryParameterMatcher, RouteMatch, header_matcher::HeaderMatchSpecifier,
    query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
};
use istio_api::virtual_service::{HttpMatchRequest, StringMatch};

use super::everything;
use crate::proto::{bool_value, regex, string_match};

/// Whether the match says only that something is there.
fn is_presence(m: &StringMatch) -> bool {
    match (&m.exact, &m.prefix, &m.regex) {
        (None, None, None) => true,
        (None, None, Some(regex)) => regex == "*",
        _ => false,
    }
}

fn header(name: &str, m: &StringMatch) -> HeaderMatcher {
    let specifier = if is_presence(m) {
        Some(HeaderMatchSpecifier::PresentMatch(true))
    } else {
        string_match(m).map(HeaderMatchSpecifier::StringMatch)
    };
    HeaderMatcher { name: name.to_owned(), header_match_specifier: specifier, ..HeaderMatcher::default() }
}

/// Headers named `@request.auth.claims…` mean claims of a verified token.
fn claim(name: &str, m: &StringMatch, invert: bool) -> Option<MetadataMatcher> {
    let rest = name.strip_prefix("@request.auth.claims")?;
    let claims: Vec<&str> = match rest.strip_prefix('.') {
        Some(path) => path.split('.').collect(),
        None => rest.strip_prefix('[')?.strip_suffix(']')?.split("][").collect(),
    };
    let value = string_match(m)?;
    Some(MetadataMatcher { invert, ..crate::authz::jwt_claim(&claims, value) })
}

/// istiod `TranslateRouteMatch`. In the Gateway API, prefixes of paths are whole segments.
pub(super) fn translate(m: Option<&HttpMatchRequest>, gateway_api: bool) -> RouteMatch {
    let mut out = everything();
    let Some(m) = m else { return out };
    for (name, value) in &m.headers {
        match claim(name, value, false) {
            Some(matcher) => out.dynamic_metadata.push(matcher),
            None => out.headers.push(header(name, value)),
        }
    }
    for (name, value) in &m.without_headers {
        match claim(name, value, true) {
            Some(matcher) => out.dynamic_metadata.push(matcher),
            None => out.headers.push(HeaderMatcher {
                invert_match: true,
                treat_missing_header_as_empty: !is_presence(value),
                ..header(name, value)
            }),
        }
    }
    out.headers.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(uri) = &m.uri {
        let path = match (&uri.exact, &uri.prefix, &uri.regex) {
            (Some(path), _, _) => Some(PathSpecifier::Path(path.clone())),
            (_, Some(prefix), _) if gateway_api && prefix != "/" => {
                let segments = prefix.strip_suffix('/').unwrap_or(prefix);
                Some(PathSpecifier::PathSeparatedPrefix(segments.to_owned()))
            }
            (_, Some(prefix), _) => Some(PathSpecifier::Prefix(prefix.clone())),
            (_, _, Some(text)) => Some(PathSpecifier::SafeRegex(regex(text))),
            _ => None,
        };
        out.path_specifier = path.or(out.path_specifier);
    }
    out.case_sensitive = bool_value(!m.ignore_uri_case);
    for (name, value) in [(":method", &m.method), (":authority", &m.authority), (":scheme", &m.scheme)] {
        out.headers.extend(value.as_ref().map(|v| header(name, v)));
    }
    for (name, value) in &m.query_params {
        let specifier = if is_presence(value) {
            Some(QueryParameterMatchSpecifier::PresentMatch(true))
        } else {
            string_match(value).map(QueryParameterMatchSpecifier::StringMatch)
        };
        out.query_parameters
            .push(QueryParameterMatcher { name: name.clone(), query_parameter_match_specifier: specifier });
    }
    out
}

/// Whether no request is left for the routes after it.
pub(super) fn takes_all(m: &RouteMatch) -> bool {
    let any_path = match &m.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => prefix == "/",
        Some(PathSpecifier::SafeRegex(regex)) => regex.regex == ".*",
        _ => false,
    };
    any_path && m.headers.is_empty() && m.query_parameters.is_empty() && m.dynamic_metadata.is_empty()
}
