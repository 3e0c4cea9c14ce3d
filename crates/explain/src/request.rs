//! The request that is asked about.

use std::str::FromStr;

use proxy_core::Headers;

use crate::Payload;

/// What a URL's scheme says about a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scheme {
    Http,
    /// The application speaks TLS itself.
    Https,
    /// No HTTP.
    Tcp,
    /// No HTTP, in TLS of the application.
    Tls,
}

/// A URL, as far as a request needs it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Url {
    pub(crate) scheme: Scheme,
    /// Without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Host and port as written.
    pub(crate) authority: String,
    /// Path and query.
    pub(crate) path: String,
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::Http, text),
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(("https", rest)) => (Scheme::Https, rest),
            Some(("tcp", rest)) => (Scheme::Tcp, rest),
            Some(("tls", rest)) => (Scheme::Tls, rest),
            Some((other, _)) => return Err(format!("scheme {other:?} is none of http, https, tcp, tls")),
        };
        let (authority, path) = match rest.find(['/', '?']) {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, Some(port.parse().map_err(|_| format!("{port:?} is no port"))?))
            }
            _ => (authority, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(format!("{text:?} names no host"));
        }
        let port = match (port, scheme) {
            (Some(port), _) => port,
            (None, Scheme::Http) => 80,
            (None, Scheme::Https) => 443,
            (None, Scheme::Tcp | Scheme::Tls) => return Err(format!("{text:?} names no port")),
        };
        let path = if path.starts_with('?') { format!("/{path}") } else { path.to_owned() };
        Ok(Self { scheme, host: host.to_owned(), port, authority: authority.to_owned(), path })
    }
}

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) http2: bool,
}

impl Request {
    pub(crate) fn payload(&self) -> Payload {
        match self.url.scheme {
            Scheme::Tcp | Scheme::Tls => Payload::Opaque,
            _ if self.http2 => Payload::Http2,
            _ => Payload::Http1,
        }
    }

    /// Its head as the application sends it.
    pub(crate) fn head(&self) -> Headers {
        let scheme = if self.url.scheme == Scheme::Https { "https" } else { "http" };
        let mut headers = Headers::of([(":method", self.method.as_str()), (":scheme", scheme)]);
        let host = self.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
        let authority = host.map_or(self.url.authority.as_str(), |(_, value)| value);
        headers.push(b":authority", authority.as_bytes());
        headers.push(b":path", self.url.path.as_bytes());
        for (name, value) in self.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")) {
            headers.add(&name.to_ascii_lowercase(), value.as_bytes());
        }
        headers
    }

    /// In one line.
    pub(crate) fn line(&self) -> String {
        let scheme = match self.url.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Tcp => return format!("tcp://{}", self.url.authority),
            Scheme::Tls => return format!("tls://{}", self.url.authority),
        };
        let headers: String = self.headers.iter().map(|(name, value)| format!("  {name}: {value}")).collect();
        format!("{} {scheme}://{}{}{headers}", self.method, self.url.authority, self.url.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let url = |text: &str| text.parse::<Url>().map(|u| (u.scheme, u.host, u.port, u.path));
        let all = |s, h: &str, p, path: &str| Ok((s, h.to_owned(), p, path.to_owned()));
        assert_eq!(url("http://reviews:9080/a?b=1"), all(Scheme::Http, "reviews", 9080, "/a?b=1"));
        assert_eq!(url("reviews"), all(Scheme::Http, "reviews", 80, "/"));
        assert_eq!(url("https://[fd00::1]?x"), all(Scheme::Https, "fd00::1", 443, "/?x"));
        assert_eq!(url("tcp://mysql:3306"), all(Scheme::Tcp, "mysql", 3306, "/"));
        assert!(url("tcp://mysql").is_err() && url("ftp://a").is_err() && url("http://:80").is_err());
    }
}
