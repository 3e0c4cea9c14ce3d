use std::time::Duration;

use mesh_types::ArcStr;

use crate::any::Typed;
use crate::fields;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// Keeps clients at the host that served them first.
#[derive(Clone, Debug)]
pub struct StatefulSession {
    /// How the host is remembered; `None`: not at all.
    pub kind: Option<SessionKind>,
    /// If the host is gone, fail with this status instead of choosing another.
    pub strict: Option<u16>,
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
        let Some(state) = &config.session_state else { return Ok(Self { kind: None, strict }) };
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
                return Ok(Self { kind: None, strict });
            }
            _ => return Err(typed.unknown()).at("session_state"),
        };
        Ok(Self { kind: Some(kind), strict })
    }

    /// Whether the session applies to requests of this path.
    pub fn applies_to(&self, path: &str) -> bool {
        let path = crate::matchers::path_without_query(path);
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
