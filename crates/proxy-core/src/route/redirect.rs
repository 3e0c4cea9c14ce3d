use std::borrow::Cow;

use crate::headers::Headers;
use crate::matchers::Substitution;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::RouteMatcher;
use crate::route::action::PathRewrite;

/// An answer with another location.
#[derive(Debug)]
pub struct Redirect {
    status: u16,
    scheme: Option<Box<str>>,
    host: Option<Box<str>>,
    /// With the colon.
    port: Box<str>,
    path: Option<Box<str>>,
    rewrite: Option<PathRewrite>,
    strip_query: bool,
}

impl Redirect {
    /// `path_policy`: the path of its requests is matched by an extension, which has no prefix to rewrite.
    pub(super) fn compile(redirect: &pb::route::RedirectAction, path_policy: bool) -> Compiled<Self> {
        use pb::route::redirect_action::{PathRewriteSpecifier as Path, SchemeRewriteSpecifier as Scheme};
        let some = |text: &str| (!text.is_empty()).then(|| text.into());
        let (path, rewrite) = match &redirect.path_rewrite_specifier {
            None => (None, None),
            Some(Path::PathRedirect(path)) if path.is_empty() || path.starts_with('/') => (some(path), None),
            Some(Path::PathRedirect(path)) => (Some(format!("/{path}").into()), None),
            // To Envoy, an empty one is none.
            Some(Path::PrefixRewrite(prefix)) if prefix.is_empty() => (None, None),
            Some(Path::PrefixRewrite(_)) if path_policy => {
                return Err(Invalid::new("prefix_rewrite", "cannot be used with a path_match_policy"));
            }
            Some(Path::PrefixRewrite(prefix)) => (None, Some(PathRewrite::Prefix(prefix.as_str().into()))),
            Some(Path::RegexRewrite(rule)) => {
                (None, Some(PathRewrite::Regex(Substitution::compile(rule).at("regex_rewrite")?)))
            }
            Some(Path::PathRewrite(_)) => return Err(Invalid::unsupported("path_rewrite")),
        };
        Ok(Self {
            status: match redirect.response_code {
                0 => 301,
                1 => 302,
                2 => 303,
                3 => 307,
                4 => 308,
                other => return Err(Invalid::new("response_code", format!("{other} is no known value"))),
            },
            scheme: match &redirect.scheme_rewrite_specifier {
                Some(Scheme::HttpsRedirect(true)) => Some("https".into()),
                Some(Scheme::SchemeRedirect(scheme)) => some(scheme),
                _ => None,
            },
            host: some(&redirect.host_redirect),
            port: match redirect.port_redirect {
                0 => "".into(),
                port => format!(":{port}").into(),
            },
            path,
            rewrite,
            strip_query: redirect.strip_query,
        })
    }

    /// Status and `location` for a request, which stays as it is.
    pub fn location(&self, matcher: &RouteMatcher, headers: &Headers) -> (u16, String) {
        self.rewrite(matcher, &mut headers.clone(), false)
    }

    /// Status and `location` for a request (Envoy `Http::Utility::newUri`). The request's own path is rewritten first where the
    /// redirect says so, as Envoy does (`RouteEntryImplBase::rewritePathHeader`), and left in `x-envoy-original-path` if `keep_original`.
    pub fn rewrite(&self, matcher: &RouteMatcher, headers: &mut Headers, keep_original: bool) -> (u16, String) {
        if let Some(rewrite) = &self.rewrite {
            rewrite.apply(matcher, headers, keep_original);
        }
        let scheme = self.scheme.as_deref().or_else(|| headers.scheme()).unwrap_or("http");
        let host = match &self.host {
            Some(host) => host,
            None => host_for_redirect(headers, scheme, !self.port.is_empty()),
        };
        let current = headers.path().unwrap_or_default();
        let has_query = self.path.as_ref().is_some_and(|p| p.contains('?'));
        let mut path: Cow<'_, str> = match &self.path {
            None => Cow::Borrowed(current),
            Some(path) if has_query => Cow::Borrowed(path),
            Some(path) => match current.find('?') {
                Some(at) => Cow::Owned(format!("{path}{}", &current[at..])),
                None => Cow::Borrowed(path),
            },
        };
        if !path.starts_with('/') {
            path = Cow::Owned(format!("/{path}"));
        }
        if self.strip_query && !has_query {
            let end = path.find('?').unwrap_or(path.len());
            path = Cow::Owned(path[..end].to_owned());
        }
        (self.status, format!("{scheme}://{host}{}{path}", self.port))
    }
}

/// The host without a port that would be wrong (Envoy `processRequestHost`).
fn host_for_redirect<'a>(headers: &'a Headers, new_scheme: &str, new_port: bool) -> &'a str {
    let host = headers.authority().unwrap_or_default();
    let end = if host.starts_with('[') { host.rfind("]:").map(|at| at + 1) } else { host.rfind(':') };
    let Some(end) = end else { return host };
    let old_scheme = headers.get_str("x-forwarded-proto").unwrap_or_default();
    let standard = matches!((old_scheme, &host[end..]), ("https", ":443") | ("http", ":80"));
    if new_port || (new_scheme != old_scheme && standard) { &host[..end] } else { host }
}

/// The location of an answer that is configured with a status that asks for one: the request's own.
pub fn own_location(headers: &Headers) -> String {
    let [host, path] = [headers.authority(), headers.path()].map(Option::unwrap_or_default);
    format!("{}://{host}{path}", headers.scheme().unwrap_or("http"))
}

/// The location of a request that must come over TLS (Envoy `SslRedirector::newUri`).
pub fn tls_location(headers: &Headers) -> String {
    format!("https://{}{}", headers.authority().unwrap_or_default(), headers.path().unwrap_or_default())
}
