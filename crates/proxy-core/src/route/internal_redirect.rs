use mesh_types::ArcStr;
use prost::Name;

use crate::any::Typed;
use crate::fields;
use crate::headers::Headers;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// Redirects of the upstream that are followed here instead of being passed on.
#[derive(Clone, Debug)]
pub struct InternalRedirect {
    /// In a row.
    pub max: u32,
    /// Statuses that are followed.
    pub codes: Vec<u16>,
    /// From http to https and back, too.
    pub allow_cross_scheme: bool,
    /// Headers of the redirect that the next request gets.
    pub copied_headers: Vec<ArcStr>,
    /// What else must hold, in this order.
    predicates: Vec<Predicate>,
}

/// A further condition on following a redirect.
#[derive(Clone, Debug)]
enum Predicate {
    /// Each route is redirected to once only (Envoy `PreviousRoutesPredicate`).
    PreviousRoutes,
    /// To routes with these names only.
    AllowListed(Vec<ArcStr>),
    /// Not from http to https.
    SafeCrossScheme,
}

/// Where the redirects of one request led so far: for each route with the predicate, the names of its targets.
#[derive(Clone, Debug, Default)]
pub struct PreviousRoutes(Vec<(ArcStr, ArcStr)>);

impl PreviousRoutes {
    /// Remembers a target; `false`: it was one already.
    fn insert(&mut self, from: &str, to: &str) -> bool {
        let new = !self.0.iter().any(|(f, t)| **f == *from && **t == *to);
        if new {
            self.0.push((from.into(), to.into()));
        }
        new
    }
}

/// One hop, as the predicates see it.
#[derive(Clone, Copy, Debug)]
pub struct Hop<'a> {
    /// Name of the route whose upstream redirects.
    pub from: &'a str,
    /// Name of the route that the redirect leads to.
    pub to: &'a str,
    /// The client's request came by https.
    pub from_https: bool,
    /// The redirect names https.
    pub to_https: bool,
}

/// Why a redirect is passed on although its status is one to be followed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotFollowed {
    /// There is no `location`.
    NoLocation,
    /// `location` is no absolute URL.
    BadLocation,
    /// It changes between http and https.
    UnsafeScheme,
    /// There were enough in a row.
    TooMany,
}

impl InternalRedirect {
    pub(super) fn compile(policy: &pb::route::InternalRedirectPolicy) -> Compiled<Self> {
        let mut predicates = Vec::with_capacity(policy.predicates.len());
        for (i, predicate) in policy.predicates.iter().enumerate() {
            predicates.push(Predicate::compile(predicate).at_index("predicates", i)?);
        }
        // Only redirects; 302 unless others are listed (Envoy `InternalRedirectPolicyImpl::buildRedirectResponseCodes`).
        let codes = match policy.redirect_response_codes.as_slice() {
            [] => vec![302],
            some => some.iter().filter(|c| [301, 302, 303, 307, 308].contains(*c)).map(|c| *c as u16).collect(),
        };
        Ok(Self {
            max: fields::uint(policy.max_internal_redirects.as_ref(), 1),
            codes,
            allow_cross_scheme: policy.allow_cross_scheme_redirect,
            copied_headers: policy.response_headers_to_copy.iter().map(|h| h.to_ascii_lowercase().into()).collect(),
            predicates,
        })
    }

    /// Whether every predicate lets the redirect pass. Those in front of one that refuses have taken note of it.
    pub fn accepts(&self, hop: Hop<'_>, previous: &mut PreviousRoutes) -> bool {
        self.predicates.iter().all(|predicate| match predicate {
            Predicate::PreviousRoutes => previous.insert(hop.from, hop.to),
            Predicate::AllowListed(names) => names.iter().any(|name| **name == *hop.to),
            Predicate::SafeCrossScheme => hop.from_https || !hop.to_https,
        })
    }

    /// Whether the client's request counts as https: both its scheme and its connection must be secure.
    pub fn is_https(request: &Headers, tls: bool) -> bool {
        tls && request.scheme() != Some("http")
    }

    /// The next request, from the redirected one as it went upstream (Envoy
    /// `Filter::convertRequestHeadersForInternalRedirect`). `done`: redirects followed so far; `tls`: the client came
    /// over TLS. A 303 makes it a GET without a body.
    pub fn next(&self, request: &Headers, response: &Headers, done: u32, tls: bool) -> Result<Headers, NotFollowed> {
        let location = response.joined("location").ok_or(NotFollowed::NoLocation)?;
        let location = std::str::from_utf8(&location).map_err(|_| NotFollowed::BadLocation)?;
        let (scheme, rest) = location.split_once("://").ok_or(NotFollowed::BadLocation)?;
        let is_scheme = !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphabetic());
        if !is_scheme || rest.bytes().any(|b| b <= b' ' || b == 0x7f) {
            return Err(NotFollowed::BadLocation);
        }
        let scheme = scheme.to_ascii_lowercase();
        // Whatever is not http counts as the other scheme.
        let secure = scheme != "http";
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (host, tail) = rest.split_at(end);
        // Who asks there is nobody's business (Envoy `Utility::Url`).
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        if host.is_empty() {
            return Err(NotFollowed::BadLocation);
        }
        let tail = tail.split('#').next().unwrap_or_default();
        // A query without a path stays one, which no usual route takes.
        let path = if tail.is_empty() { "/" } else { tail };
        let was_secure = Self::is_https(request, tls);
        if !self.allow_cross_scheme && secure != was_secure {
            return Err(NotFollowed::UnsafeScheme);
        }
        if done >= self.max {
            return Err(NotFollowed::TooMany);
        }
        let mut next = request.clone();
        for name in &self.copied_headers {
            next.remove(name);
            for value in response.get_all(name) {
                next.push(name.as_bytes(), value);
            }
        }
        let original = format!(
            "{}://{}{}",
            if was_secure { "https" } else { "http" },
            request.authority().unwrap_or_default(),
            request.path().unwrap_or_default()
        );
        next.set("x-envoy-original-url", original.as_bytes());
        next.set(":authority", host.as_bytes());
        next.set(":path", path.as_bytes());
        next.set(":scheme", scheme.as_bytes());
        if response.status() == Some(303) && !matches!(request.method(), Some("GET" | "HEAD")) {
            next.set(":method", b"GET");
            next.remove("content-length");
            next.remove("transfer-encoding");
        }
        Ok(next)
    }
}

impl Predicate {
    fn compile(config: &pb::core::TypedExtensionConfig) -> Compiled<Self> {
        use pb::ext::internal_redirect as kinds;
        let typed = Typed::open(config.typed_config.as_ref())?;
        if typed.name == kinds::previous_routes::v3::PreviousRoutesConfig::full_name() {
            return Ok(Self::PreviousRoutes);
        }
        if typed.name == kinds::safe_cross_scheme::v3::SafeCrossSchemeConfig::full_name() {
            return Ok(Self::SafeCrossScheme);
        }
        if typed.name == kinds::allow_listed_routes::v3::AllowListedRoutesConfig::full_name() {
            let list: kinds::allow_listed_routes::v3::AllowListedRoutesConfig = typed.decode()?;
            if list.allowed_route_names.iter().any(String::is_empty) {
                return Err(Invalid::new("allowed_route_names", "names must not be empty"));
            }
            return Ok(Self::AllowListed(list.allowed_route_names.iter().map(|n| n.as_str().into()).collect()));
        }
        Err(Invalid::unsupported(typed.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predicates_decide_together() {
        let policy = InternalRedirect {
            max: 5,
            codes: vec![302],
            allow_cross_scheme: true,
            copied_headers: Vec::new(),
            predicates: vec![
                Predicate::AllowListed(vec!["b".into()]),
                Predicate::SafeCrossScheme,
                Predicate::PreviousRoutes,
            ],
        };
        let mut previous = PreviousRoutes::default();
        let mut hop =
            |from, to, from_https, to_https| policy.accepts(Hop { from, to, from_https, to_https }, &mut previous);
        assert!(!hop("a", "c", false, false), "not listed");
        assert!(!hop("a", "b", false, true), "from http to https");
        assert!(hop("a", "b", true, true));
        assert!(!hop("a", "b", true, true), "once only");
        assert!(hop("b", "b", true, true), "each route counts by itself");
    }

    #[test]
    fn follows_absolute_locations_only() {
        let policy = InternalRedirect {
            max: 1,
            codes: vec![302],
            allow_cross_scheme: false,
            copied_headers: vec!["x-copy".into(), "x-gone".into()],
            predicates: Vec::new(),
        };
        let request = Headers::of([
            (":method", "POST"),
            (":path", "/a"),
            (":authority", "t"),
            (":scheme", "http"),
            ("x-gone", "1"),
        ]);
        let to = |location: &str, done| {
            policy.next(
                &request,
                &Headers::of([(":status", "303"), ("location", location), ("x-copy", "c")]),
                done,
                false,
            )
        };
        let next = to("http://o.test/?q=1#f", 0).unwrap();
        assert_eq!((next.path(), next.authority(), next.method()), (Some("/?q=1"), Some("o.test"), Some("GET")));
        assert_eq!(to("http://o.test?q=1", 0).unwrap().path(), Some("?q=1"));
        assert_eq!(next.get_str("x-envoy-original-url"), Some("http://t/a"));
        assert_eq!((next.get_str("x-copy"), next.get_str("x-gone")), (Some("c"), None));
        assert_eq!(to("/relative", 0).unwrap_err(), NotFollowed::BadLocation);
        assert_eq!(to("https://o.test/", 0).unwrap_err(), NotFollowed::UnsafeScheme);
        assert_eq!(to("http://o.test/", 1).unwrap_err(), NotFollowed::TooMany);
    }
}
