use mesh_types::ArcStr;

use crate::headers::Headers;

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
}

/// Why a redirect is passed on although its status is one to be followed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotFollowed {
    /// There is no `location`.
    NoLocation,
    /// `location` is no absolute http or https URL.
    BadLocation,
    /// It changes between http and https.
    UnsafeScheme,
    /// There were enough in a row.
    TooMany,
}

impl InternalRedirect {
    /// The next request, from the redirected one as it went upstream (Envoy
    /// `Filter::convertRequestHeadersForInternalRedirect`). `done`: redirects followed so far; `tls`: the client came
    /// over TLS. A 303 makes it a GET without a body.
    pub fn next(&self, request: &Headers, response: &Headers, done: u32, tls: bool) -> Result<Headers, NotFollowed> {
        let location = response.get_str("location").ok_or(NotFollowed::NoLocation)?;
        let (scheme, rest) = location.split_once("://").ok_or(NotFollowed::BadLocation)?;
        let secure = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(NotFollowed::BadLocation),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (host, tail) = rest.split_at(end);
        if host.is_empty() || host.contains(['@', ' ']) {
            return Err(NotFollowed::BadLocation);
        }
        let tail = tail.split('#').next().unwrap_or_default();
        let path = if tail.starts_with('/') { tail.to_owned() } else { format!("/{tail}") };
        let was_secure = request.scheme().map_or(tls, |s| s == "https");
        if !self.allow_cross_scheme && secure != was_secure {
            return Err(NotFollowed::UnsafeScheme);
        }
        if done >= self.max {
            return Err(NotFollowed::TooMany);
        }
        let mut next = request.clone();
        for name in &self.copied_headers {
            match response.get(name) {
                Some(value) => next.set(name, value),
                None => {
                    next.remove(name);
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_absolute_locations_only() {
        let policy = InternalRedirect {
            max: 1,
            codes: vec![302],
            allow_cross_scheme: false,
            copied_headers: vec!["x-copy".into(), "x-gone".into()],
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
        let next = to("http://o.test?q=1#f", 0).unwrap();
        assert_eq!((next.path(), next.authority(), next.method()), (Some("/?q=1"), Some("o.test"), Some("GET")));
        assert_eq!(next.get_str("x-envoy-original-url"), Some("http://t/a"));
        assert_eq!((next.get_str("x-copy"), next.get_str("x-gone")), (Some("c"), None));
        assert_eq!(to("/relative", 0).unwrap_err(), NotFollowed::BadLocation);
        assert_eq!(to("https://o.test/", 0).unwrap_err(), NotFollowed::UnsafeScheme);
        assert_eq!(to("http://o.test/", 1).unwrap_err(), NotFollowed::TooMany);
    }
}
