use std::time::Duration;

use mesh_types::ArcStr;

use crate::address::Address;
use crate::fields;
use crate::hash::xx64;
use crate::headers::Headers;
use crate::matchers::{Substitution, canonical_name, cookie, first_query_value};
use crate::metadata::FilterState;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::Forward;

/// One thing that is hashed to choose a host.
#[derive(Debug)]
pub struct HashPolicy {
    /// If this gave a hash, the policies behind it are left out.
    terminal: bool,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Header {
        name: Box<str>,
        rewrite: Option<Substitution>,
    },
    Cookie {
        name: Box<str>,
        path: Box<str>,
        ttl: Option<Duration>,
        attributes: Box<[(Box<str>, Box<str>)]>,
    },
    Address,
    /// A connection's properties, none of which is asked for.
    Nothing,
    Query(Box<str>),
    FilterState(ArcStr),
}

/// What hash policies look at.
#[derive(Clone, Copy, Debug)]
pub struct HashContext<'a> {
    /// Request head.
    pub headers: &'a Headers,
    /// The trusted client address.
    pub remote: &'a Address,
    /// The connection's own address.
    pub local: &'a Address,
    /// Written by filters.
    pub filter_state: &'a FilterState,
}

/// A cookie that the response must set, so that the client comes back to the same host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SetCookie(pub String);

impl HashPolicy {
    pub(crate) fn compile_all(policies: &[pb::route::route_action::HashPolicy]) -> Compiled<Box<[Self]>> {
        policies.iter().enumerate().map(|(i, p)| Self::compile(p).at_index("hash_policy", i)).collect()
    }

    fn compile(policy: &pb::route::route_action::HashPolicy) -> Compiled<Self> {
        use pb::route::route_action::hash_policy::PolicySpecifier as Kind;
        let source =
            match policy.policy_specifier.as_ref().ok_or_else(|| Invalid::new("policy_specifier", "is missing"))? {
                Kind::Header(header) => Source::Header {
                    name: canonical_name(&header.header_name).into(),
                    rewrite: header
                        .regex_rewrite
                        .as_ref()
                        .map(Substitution::compile)
                        .transpose()
                        .at("header.regex_rewrite")?,
                },
                Kind::Cookie(cookie) => Source::Cookie {
                    name: cookie.name.as_str().into(),
                    path: cookie.path.as_str().into(),
                    ttl: fields::duration("cookie.ttl", cookie.ttl.as_ref())?,
                    attributes: cookie
                        .attributes
                        .iter()
                        .map(|a| (a.name.as_str().into(), a.value.as_str().into()))
                        .collect(),
                },
                Kind::ConnectionProperties(properties) if properties.source_ip => Source::Address,
                Kind::ConnectionProperties(_) => Source::Nothing,
                Kind::QueryParameter(query) => Source::Query(query.name.as_str().into()),
                Kind::FilterState(state) => Source::FilterState(state.key.as_str().into()),
            };
        Ok(Self { terminal: policy.terminal, source })
    }

    /// Its hash, and a cookie to be set.
    fn evaluate(&self, cx: &HashContext<'_>, set: &mut Option<SetCookie>) -> Option<u64> {
        match &self.source {
            Source::Header { name, rewrite } => {
                // Sorted, so that the order of the values does not matter. Each hash is the seed of the next.
                let mut values: Vec<Vec<u8>> = cx
                    .headers
                    .get_all(name)
                    .map(|value| rewrite.as_ref().map_or_else(|| value.to_vec(), |r| r.apply(value)))
                    .collect();
                values.sort();
                (!values.is_empty()).then(|| values.iter().fold(0, |seed, value| xx64(value, seed)))
            }
            Source::Cookie { name, path, ttl, attributes } => {
                if let Some(value) = cookie(cx.headers, name).filter(|v| !v.is_empty()) {
                    return Some(xx64(value, 0));
                }
                let ttl = (*ttl)?;
                // Equal for all streams of a connection, so that racing ones get the same cookie.
                let value = format!("{:016x}", xx64(format!("{}{}", cx.remote, cx.local).as_bytes(), 0));
                *set = Some(SetCookie(set_cookie(name, &value, path, ttl, attributes)));
                Some(xx64(value.as_bytes(), 0))
            }
            Source::Nothing => None,
            Source::Address => cx.remote.ip().map(|ip| xx64(ip.to_string().as_bytes(), 0)),
            Source::Query(name) => first_query_value(cx.headers.path()?, name).map(|value| xx64(value.as_bytes(), 0)),
            Source::FilterState(key) => cx.filter_state.hash(key),
        }
    }
}

/// Envoy `Http::Utility::makeSetCookieValue`.
fn set_cookie(name: &str, value: &str, path: &str, ttl: Duration, attributes: &[(Box<str>, Box<str>)]) -> String {
    let mut text = format!("{name}=\"{value}\"");
    if !ttl.is_zero() {
        text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
    }
    if !path.is_empty() {
        text.push_str(&format!("; Path={path}"));
    }
    for (key, value) in attributes {
        match &**value {
            "" => text.push_str(&format!("; {key}")),
            value => text.push_str(&format!("; {key}={value}")),
        }
    }
    text.push_str("; HttpOnly");
    text
}

impl Forward {
    /// The request's hash for ring hash and Maglev, and a cookie for the response (Envoy `HashPolicyImpl::generateHash`).
    /// `own`: what the cluster says about it, which counts more than the route.
    pub fn hash(&self, own: &[HashPolicy], cx: &HashContext<'_>) -> (Option<u64>, Option<SetCookie>) {
        let mut hash: Option<u64> = None;
        let mut set = None;
        for policy in if own.is_empty() { &self.hash_policies } else { own } {
            if let Some(new) = policy.evaluate(cx, &mut set) {
                // Rotated, so that the same rule twice does not cancel itself out.
                hash = Some(hash.unwrap_or(0).rotate_left(1) ^ new);
            }
            if policy.terminal && hash.is_some() {
                break;
            }
        }
        (hash, set)
    }
}
