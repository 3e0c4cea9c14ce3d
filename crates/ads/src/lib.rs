//! The xDS protocol, both ends: state-of-the-world and delta sessions, nonces, ACK and NACK.
//!
//! ```text
//!  Source ──► server::Session ──► tonic stream ══► tonic stream ──► client::Session ──► Handler
//!  (control plane: named bytes)                                      (proxy: named bytes)
//! ```
//!
//! In: named, versioned, already encoded resources. Out: the same at the other end, each sent once.
//! Never: what is inside a resource. Only the order in which types are pushed is known here.

pub mod client;
pub mod server;

use std::fmt;

use envoy_api::type_url;

/// Type URLs in the order in which they are pushed, so that nothing refers to what has not arrived:
/// clusters, endpoints, listeners, routes, then filter configurations, secrets and the name table.
///
/// Source: Envoy's "xDS REST and gRPC protocol", eventual consistency considerations; types not named here come last.
pub const PUSH_ORDER: [&str; 7] = [
    type_url::CLUSTER,
    type_url::ENDPOINT,
    type_url::LISTENER,
    type_url::ROUTE,
    type_url::EXTENSION,
    type_url::SECRET,
    type_url::NAME_TABLE,
];

/// The largest message a client accepts; a state-of-the-world answer for a whole mesh is one message.
const MAX_RESPONSE: usize = 512 << 20;

/// The largest request a server accepts: subscriptions and versions of one proxy, sent by somebody not trusted.
const MAX_REQUEST: usize = 16 << 20;

/// Which flavour of the protocol a stream speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// Every answer to a wildcard type carries all resources.
    StateOfTheWorld,
    /// Answers carry what changed and what went.
    Delta,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::StateOfTheWorld => "SotW",
            Protocol::Delta => "delta",
        })
    }
}

/// Where `type_url` stands in [`PUSH_ORDER`].
fn rank(type_url: &str) -> usize {
    PUSH_ORDER.iter().position(|known| *known == type_url).unwrap_or(PUSH_ORDER.len())
}

/// Whether an empty list of names means everything for this type.
///
/// As istiod, `pilot/pkg/xds/delta.go`, `shouldUnsubscribe`/`isWildcardTypeURL`: all but endpoints, routes,
/// filter configurations and secrets.
fn is_wildcard_type(type_url: &str) -> bool {
    !matches!(type_url, type_url::ENDPOINT | type_url::ROUTE | type_url::EXTENSION | type_url::SECRET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_types_are_pushed_last_and_are_wildcards() {
        assert_eq!(rank("x"), PUSH_ORDER.len());
        assert!(is_wildcard_type("x") && is_wildcard_type(type_url::NAME_TABLE) && is_wildcard_type(PUSH_ORDER[0]));
        assert!(!is_wildcard_type(PUSH_ORDER[1]) && !is_wildcard_type(PUSH_ORDER[3]));
    }
}
