use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_types::ArcStr;

use crate::any::Typed;
use crate::fields;
use crate::headers::Headers;
use crate::matchers::{cookie, path_without_query};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// Keeps clients at the host that served them first.
#[derive(Clone, Debug)]
pub struct StatefulSession {
    /// How the host is remembered; `None`: not at all.
    pub kind: Option<SessionKind>,
    /// If the host is gone, fail with this status instead of choosing another.
    pub strict: Option<u16>,
    /// What requests are counted under, if they are. Only the filter's own settings count, not those of routes.
    pub counters: Option<SessionCounters>,
}

/// Names of the counters of sessions (Envoy `StatefulSessionFilterStats`).
#[derive(Clone, Debug)]
pub struct SessionCounters {
    /// The host was not there, and no other was chosen.
    pub failed_closed: ArcStr,
    /// The host was not there, and another one was chosen.
    pub failed_open: ArcStr,
    /// The request named no host.
    pub no_session: ArcStr,
    /// The host was chosen.
    pub routed: ArcStr,
}

impl SessionCounters {
    fn under(prefix: &str) -> Option<Self> {
        let name = |what: &str| format!("stateful_session.{prefix}.{what}").into();
        (!prefix.is_empty()).then(|| Self {
            failed_closed: name("failed_closed"),
            failed_open: name("failed_open"),
            no_session: name("no_session"),
            routed: name("routed"),
        })
    }

    /// All of them.
    pub fn all(&self) -> [&str; 4] {
        [&self.failed_closed, &self.failed_open, &self.no_session, &self.routed]
    }
}

/// How the host is remembered.
#[derive(Clone, Debug)]
pub enum SessionKind {
    /// In a cookie.
    Cookie {
        /// Its name.
        name: ArcStr,
        /// Only for requests below this path.
        path: ArcStr,
        /// How long; zero: until the client ends.
        ttl: Duration,
        /// More attributes.
        attributes: Vec<(ArcStr, ArcStr)>,
    },
    /// In a header.
    Header(ArcStr),
}

impl StatefulSession {
    pub(super) fn compile(config: &pb::http_filter::stateful_session::v3::StatefulSession) -> Compiled<Self> {
        use pb::ext::http::stateful_session as kinds;
        let strict = config.strict.then(|| match config.status_on_strict_destination_not_found {
            0 => 503,
            status => u16::try_from(status).unwrap_or(503),
        });
        let counters = SessionCounters::under(&config.stat_prefix);
        let Some(state) = &config.session_state else { return Ok(Self { kind: None, strict, counters }) };
        let typed = Typed::open(state.typed_config.as_ref()).at("session_state")?;
        let kind = match typed.name.as_str() {
            "envoy.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState" => {
                let state: kinds::cookie::v3::CookieBasedSessionState = typed.decode()?;
                let cookie = state.cookie.ok_or_else(|| Invalid::new("session_state.cookie", "is missing"))?;
                SessionKind::Cookie {
                    name: fields::required("session_state.cookie.name", &cookie.name)?,
                    path: cookie.path.as_str().into(),
                    ttl: fields::duration("session_state.cookie.ttl", cookie.ttl.as_ref())?.unwrap_or_default(),
                    attributes: cookie
                        .attributes
                        .iter()
                        .map(|a| (a.name.as_str().into(), a.value.as_str().into()))
                        .collect(),
                }
            }
            "envoy.extensions.http.stateful_session.header.v3.HeaderBasedSessionState" => {
                let state: kinds::header::v3::HeaderBasedSessionState = typed.decode()?;
                SessionKind::Header(fields::required("session_state.name", &state.name)?.to_ascii_lowercase().into())
            }
            "envoy.extensions.http.stateful_session.envelope.v3.EnvelopeSessionState" => {
                refuse!("session_state.envelope": true);
                return Ok(Self { kind: None, strict, counters });
            }
            _ => return Err(typed.unknown()).at("session_state"),
        };
        // Envoy finds the kind by the name and then reads its message.
        let name = match kind {
            SessionKind::Cookie { .. } => "envoy.http.stateful_session.cookie",
            SessionKind::Header(_) => "envoy.http.stateful_session.header",
        };
        if state.name != name {
            return Err(Invalid::new("session_state.name", format!("must be {name} for this configuration")));
        }
        Ok(Self { kind: Some(kind), strict, counters })
    }

    /// The host that the request's session names, as `address:port`. `now`: seconds since 1970.
    pub fn wanted(&self, headers: &Headers, now: u64) -> Option<String> {
        if !self.applies_to(headers.path().unwrap_or_default()) {
            return None;
        }
        match self.kind.as_ref()? {
            SessionKind::Cookie { name, .. } => {
                let value = cookie(headers, name)?;
                let bytes = STANDARD.decode(value).ok()?;
                decode_cookie(&bytes, now)
            }
            SessionKind::Header(name) => {
                Some(String::from_utf8_lossy(&STANDARD.decode(headers.get(name)?).ok()?).into_owned())
            }
        }
    }

    /// The response header that makes the client come back to `host`, for a request that it [applies to](Self::applies_to).
    /// `now`: seconds since 1970.
    pub fn remember(&self, host: &str, now: u64) -> Option<(ArcStr, String)> {
        match self.kind.as_ref()? {
            SessionKind::Cookie { name, path, ttl, attributes } => {
                let value = STANDARD.encode(encode_cookie(host, (!ttl.is_zero()).then(|| now + ttl.as_secs())));
                let mut text = format!("{name}=\"{value}\"");
                if !ttl.is_zero() {
                    text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                }
                if !path.is_empty() {
                    text.push_str(&format!("; Path={path}"));
                }
                for (name, value) in attributes {
                    text.push_str(&format!("; {name}"));
                    if !value.is_empty() {
                        text.push_str(&format!("={value}"));
                    }
                }
                text.push_str("; HttpOnly");
                Some(("set-cookie".into(), text))
            }
            SessionKind::Header(name) => Some((name.clone(), STANDARD.encode(host))),
        }
    }

    /// Whether the session applies to requests of this path, as it was before it was rewritten.
    pub fn applies_to(&self, path: &str) -> bool {
        let path = path_without_query(path);
        match &self.kind {
            Some(SessionKind::Cookie { path: scope, .. }) => match path.strip_prefix(&**scope) {
                _ if scope.is_empty() || &**scope == "/" => true,
                Some(rest) => rest.is_empty() || rest.starts_with('/') || scope.ends_with('/'),
                None => false,
            },
            Some(SessionKind::Header(_)) => true,
            None => false,
        }
    }
}

/// `envoy.extensions.http.stateful_session.cookie.v3.Cookie`: field 1 the address, field 2 when it expires.
fn encode_cookie(host: &str, expires: Option<u64>) -> Vec<u8> {
    let mut out = vec![0x0a];
    varint(host.len() as u64, &mut out);
    out.extend_from_slice(host.as_bytes());
    if let Some(expires) = expires {
        out.push(0x10);
        varint(expires, &mut out);
    }
    out
}

fn varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push((n as u8) | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// The address, unless the cookie expired; cookies of old Envoys are the plain address.
fn decode_cookie(bytes: &[u8], now: u64) -> Option<String> {
    if bytes.first() != Some(&0x0a) {
        // Garbage names a host that does not exist.
        return Some(String::from_utf8_lossy(bytes).into_owned());
    }
    let length = usize::from(*bytes.get(1)?);
    let host = bytes.get(2..2 + length)?;
    if let Some((&0x10, rest)) = bytes[2 + length..].split_first() {
        let expires = rest.iter().take(9).enumerate().fold(0u64, |n, (i, b)| n | (u64::from(b & 0x7f) << (7 * i)));
        if expires < now {
            return None;
        }
    }
    String::from_utf8(host.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_round_trip_until_they_expire() {
        let session = StatefulSession {
            counters: None,
            kind: Some(SessionKind::Cookie {
                name: "sess".into(),
                path: "/".into(),
                ttl: Duration::from_secs(120),
                attributes: vec![("SameSite".into(), "Strict".into())],
            }),
            strict: None,
        };
        assert!(session.applies_to("/a") && session.applies_to("/"));
        let (name, value) = session.remember("127.0.0.1:31710", 1_795_272_593).unwrap();
        assert_eq!(&*name, "set-cookie");
        assert!(value.ends_with("; Max-Age=120; Path=/; SameSite=Strict; HttpOnly"), "{value}");
        let cookie = value.split(';').next().unwrap().to_owned();
        let back = Headers::of([(":path", "/a"), ("cookie", &cookie)]);
        assert_eq!(session.wanted(&back, 1_795_272_600).as_deref(), Some("127.0.0.1:31710"));
        assert_eq!(session.wanted(&back, 1_795_272_800), None);
        for garbage in ["sess=!!", "sess=Cg==", "sess=CgI="] {
            let _ = session.wanted(&Headers::of([(":path", "/"), ("cookie", garbage)]), 0);
        }
    }
}
