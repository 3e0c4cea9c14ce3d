use std::borrow::Cow;

use crate::any::Typed;
use crate::headers::Headers;
use crate::matchers::{
    CookieMatcher, FilterStateMatcher, HeaderMatcher, MetadataMatcher, QueryMatcher, Regex, header_matchers,
    path_without_query,
};
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::RouteInput;
use crate::route::template::template_regex;
use crate::runtime::Runtime;

/// When a route applies (`route.v3.RouteMatch`).
#[derive(Debug)]
pub struct RouteMatcher {
    path: PathRule,
    fraction: Option<Fraction>,
    grpc: bool,
    headers: Box<[HeaderMatcher]>,
    query: Box<[QueryMatcher]>,
    cookies: Box<[CookieMatcher]>,
    tls: Option<TlsRule>,
    metadata: Box<[MetadataMatcher]>,
    filter_state: Box<[FilterStateMatcher]>,
}

#[derive(Debug)]
enum PathRule {
    Prefix {
        text: Box<str>,
        ignore_case: bool,
    },
    /// The prefix must end where a path element ends.
    Separated {
        text: Box<str>,
        ignore_case: bool,
    },
    Exact {
        text: Box<str>,
        ignore_case: bool,
    },
    Regex(Regex),
    Template(Regex),
    Connect,
}

#[derive(Debug)]
struct TlsRule {
    presented: Option<bool>,
    validated: Option<bool>,
}

fn starts_with(path: &str, prefix: &str, ignore_case: bool) -> bool {
    match path.get(..prefix.len()) {
        Some(start) if ignore_case => start.eq_ignore_ascii_case(prefix),
        Some(start) => start == prefix,
        None => false,
    }
}

impl RouteMatcher {
    pub(crate) fn compile(matcher: &pb::route::RouteMatch, runtime: &Runtime) -> Compiled<Self> {
        use pb::route::route_match::PathSpecifier;
        let ignore_case = matcher.case_sensitive.as_ref().is_some_and(|v| !v.value);
        let path = match matcher.path_specifier.as_ref().ok_or_else(|| Invalid::new("path_specifier", "is missing"))? {
            PathSpecifier::Prefix(text) => PathRule::Prefix { text: text.as_str().into(), ignore_case },
            PathSpecifier::Path(text) => PathRule::Exact { text: text.as_str().into(), ignore_case },
            PathSpecifier::PathSeparatedPrefix(text) => PathRule::Separated { text: text.as_str().into(), ignore_case },
            PathSpecifier::SafeRegex(regex) => PathRule::Regex(Regex::compile(regex).at("safe_regex")?),
            PathSpecifier::ConnectMatcher(_) => PathRule::Connect,
            PathSpecifier::PathMatchPolicy(extension) => {
                let typed = Typed::open(extension.typed_config.as_ref()).at("path_match_policy")?;
                if typed.name != "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" {
                    return Err(typed.unknown()).at("path_match_policy");
                }
                let config: pb::ext::path::r#match::uri_template::v3::UriTemplateMatchConfig = typed.decode()?;
                PathRule::Template(template_regex(&config.path_template).at("path_match_policy")?)
            }
        };
        let fraction = match &matcher.runtime_fraction {
            None => None,
            Some(fraction) => Some(Fraction::runtime(Some(fraction), Fraction::NONE, runtime).at("runtime_fraction")?),
        };
        Ok(Self {
            path,
            fraction,
            grpc: matcher.grpc.is_some(),
            headers: header_matchers("headers", &matcher.headers)?,
            query: each("query_parameters", &matcher.query_parameters, QueryMatcher::compile)?,
            cookies: each("cookies", &matcher.cookies, CookieMatcher::compile)?,
            tls: matcher.tls_context.as_ref().map(|tls| TlsRule {
                presented: tls.presented.as_ref().map(|v| v.value),
                validated: tls.validated.as_ref().map(|v| v.value),
            }),
            metadata: each("dynamic_metadata", &matcher.dynamic_metadata, MetadataMatcher::compile)?,
            filter_state: each("filter_state", &matcher.filter_state, FilterStateMatcher::compile)?,
        })
    }

    /// Whether the route applies (Envoy `RouteEntryImplBase::matchRoute` and the path rules of its subclasses).
    pub fn matches(&self, input: &RouteInput<'_>, ignore_path_parameters: bool) -> bool {
        self.path_matches(input.headers, ignore_path_parameters)
            && self.fraction.as_ref().is_none_or(|f| f.holds_for(input.random))
            && (!self.grpc || is_grpc(input.headers))
            && self.headers.iter().all(|m| m.matches(input.headers))
            && (self.query.is_empty() || {
                let path = input.headers.path_text().unwrap_or_default();
                self.query.iter().all(|m| m.matches(&path))
            })
            && self.cookies.iter().all(|m| m.matches(input.headers))
            && self.tls.as_ref().is_none_or(|rule| rule.matches(input))
            && self.metadata.iter().all(|m| m.matches(input.metadata))
            && self.filter_state.iter().all(|m| m.matches(input.filter_state))
    }

    /// Only the conditions of path, headers and query: the rules of `jwt_authn` know no others (Envoy
    /// `BaseMatcherImpl::matches`).
    pub(crate) fn matches_head(&self, headers: &Headers) -> bool {
        let path = headers.path_text().unwrap_or_default();
        self.path_matches(headers, false)
            && self.headers.iter().all(|m| m.matches(headers))
            && self.query.iter().all(|m| m.matches(&path))
    }

    fn path_matches(&self, headers: &Headers, ignore_path_parameters: bool) -> bool {
        if let PathRule::Connect = self.path {
            return headers.method() == Some("CONNECT");
        }
        let Some(whole) = headers.path_text() else {
            // A request without path (CONNECT) can match the empty prefix only.
            return matches!(&self.path, PathRule::Prefix { text, .. } if text.is_empty());
        };
        let mut path = path_without_query(&whole);
        let without;
        if ignore_path_parameters {
            without = without_parameters(path);
            path = &without;
        }
        match &self.path {
            PathRule::Prefix { text, ignore_case } => starts_with(path, text, *ignore_case),
            PathRule::Separated { text, ignore_case } => {
                starts_with(path, text, *ignore_case) && matches!(path.as_bytes().get(text.len()), None | Some(b'/'))
            }
            PathRule::Exact { text, ignore_case: true } => path.eq_ignore_ascii_case(text),
            PathRule::Exact { text, ignore_case: false } => path == &**text,
            PathRule::Regex(regex) | PathRule::Template(regex) => regex.matches(path.as_bytes()),
            PathRule::Connect => false,
        }
    }

    /// How much of a matching path (without query) a prefix rewrite replaces.
    pub(super) fn matched_length(&self, path: &[u8]) -> usize {
        match &self.path {
            PathRule::Prefix { text, .. } | PathRule::Separated { text, .. } | PathRule::Exact { text, .. } => {
                text.len().min(path.len())
            }
            _ => path.len(),
        }
    }

    /// The first condition that the request does not fulfil and what the request has there, in words; `None` if the route applies.
    pub(super) fn mismatch(&self, input: &RouteInput<'_>, ignore_path_parameters: bool) -> Option<String> {
        let headers = input.headers;
        let path = headers.path_text().unwrap_or_default();
        let path = &*path;
        let text = |value: Option<Cow<'_, [u8]>>| match value {
            Some(value) => format!("{:?}", String::from_utf8_lossy(&value)),
            None => "missing".to_owned(),
        };
        if !self.path_matches(headers, ignore_path_parameters) {
            let method = headers.method().unwrap_or_default();
            return Some(match &self.path {
                PathRule::Connect => format!("method CONNECT: it is {method}"),
                _ => format!("path {}: it is {:?}", self.describe(), path_without_query(path)),
            });
        }
        if let Some(fraction) = self.fraction.as_ref().filter(|f| !f.holds_for(input.random)) {
            return Some(format!("{fraction} of requests: this is none of them"));
        }
        if self.grpc && !is_grpc(headers) {
            return Some(format!("gRPC: content-type is {}", text(headers.joined("content-type"))));
        }
        if let Some(m) = self.headers.iter().find(|m| !m.matches(headers)) {
            return Some(format!("{m}: it is {}", text(headers.joined(m.name()))));
        }
        if let Some(m) = self.query.iter().find(|m| !m.matches(path)) {
            return Some(format!("{m}: the path is {path:?}"));
        }
        if let Some(m) = self.cookies.iter().find(|m| !m.matches(headers)) {
            return Some(format!("{m}: cookies are {}", text(headers.joined("cookie"))));
        }
        if self.tls.as_ref().is_some_and(|rule| !rule.matches(input)) {
            return Some("the client's certificate".to_owned());
        }
        if let Some(m) = self.metadata.iter().find(|m| !m.matches(input.metadata)) {
            let found = m.find(input.metadata).map_or_else(|| "missing".to_owned(), ToString::to_string);
            return Some(format!("{m}: it is {found}"));
        }
        self.filter_state.iter().any(|m| !m.matches(input.filter_state)).then(|| "the filter state".to_owned())
    }

    /// The condition on the path, in words: `/a*` is a prefix, `/a[/*]` one that ends where an element ends, `~` a regular expression.
    pub fn describe(&self) -> String {
        match &self.path {
            PathRule::Prefix { text, .. } => format!("{text}*"),
            PathRule::Separated { text, .. } => format!("{text}[/*]"),
            PathRule::Exact { text, .. } => text.to_string(),
            PathRule::Regex(regex) | PathRule::Template(regex) => format!("~{}", regex.source()),
            PathRule::Connect => "CONNECT".to_owned(),
        }
    }

    /// All conditions in words, that on the path first.
    pub fn conditions(&self) -> Vec<String> {
        let mut all = vec![format!("path {}", self.describe())];
        all.extend(self.fraction.as_ref().map(|f| format!("{f} of requests")));
        all.extend(self.grpc.then(|| "gRPC".to_owned()));
        all.extend(self.headers.iter().map(ToString::to_string));
        all.extend(self.query.iter().map(ToString::to_string));
        all.extend(self.cookies.iter().map(ToString::to_string));
        all.extend(self.metadata.iter().map(ToString::to_string));
        all
    }
}

/// The path without the parameters of its segments (`/a;x=1/b` is `/a/b`).
pub(crate) fn without_parameters(path: &str) -> Cow<'_, str> {
    if !path.contains(';') {
        return path.into();
    }
    let segments: Vec<&str> = path.split('/').map(|segment| segment.split(';').next().unwrap_or(segment)).collect();
    segments.join("/").into()
}

impl TlsRule {
    fn matches(&self, input: &RouteInput<'_>) -> bool {
        // Without TLS nothing is presented (Envoy `RouteEntryImplBase::evaluateTlsContextMatch`).
        let peer = input.tls.and_then(|tls| tls.peer.as_ref());
        let presented = peer.is_some();
        let validated = peer.is_some_and(|p| p.validated);
        self.presented.is_none_or(|wanted| wanted == presented)
            && self.validated.is_none_or(|wanted| wanted == validated)
    }
}

/// Envoy `Grpc::Common::isGrpcRequestHeaders`: content type `application/grpc`, or that and `+something`.
pub(crate) fn is_grpc(headers: &Headers) -> bool {
    headers.get_str("content-type").is_some_and(|t| {
        t.strip_prefix("application/grpc").is_some_and(|rest| rest.is_empty() || rest.starts_with('+'))
    })
}

fn each<P, T>(field: &str, all: &[P], compile: fn(&P) -> Compiled<T>) -> Compiled<Box<[T]>> {
    all.iter().enumerate().map(|(i, one)| compile(one).at_index(field, i)).collect()
}
