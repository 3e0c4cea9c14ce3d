//! Keys of token issuers that the control plane fetches for its proxies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use istio_api::Duration;
use istio_api::request_authentication::JwtRule;
use registry::JwksMode;

use crate::PushContext;

/// Where the keys of a rule without inline keys come from.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KeySource {
    /// `jwksUri`; empty if it must be found out by OpenID discovery.
    pub uri: String,
    /// `issuer`, where discovery asks.
    pub issuer: String,
    /// How long to wait for an answer.
    pub timeout: Duration,
}

/// Key sets (JSON) as they were fetched.
pub type Keys = BTreeMap<KeySource, Arc<str>>;

impl KeySource {
    /// Where a rule's keys are, unless they stand in it.
    pub fn of(rule: &JwtRule) -> Option<KeySource> {
        rule.jwks.is_empty().then(|| KeySource {
            uri: rule.jwks_uri.clone(),
            issuer: rule.issuer.clone(),
            timeout: rule.timeout.unwrap_or(Duration::from_secs(5)),
        })
    }
}

impl PushContext {
    /// All that is to be fetched: nothing where proxies do it.
    pub fn key_sources(&self) -> BTreeSet<KeySource> {
        let rules = self.rules.request_authentications.values().flatten().flat_map(|config| &config.spec.jwt_rules);
        let own = |source: &KeySource| source.uri.is_empty() || self.settings.jwks != JwksMode::Proxy;
        rules.filter_map(KeySource::of).filter(own).collect()
    }

    /// The keys of a source, if it was reached.
    pub fn keys(&self, source: &KeySource) -> Option<&Arc<str>> {
        self.rules.keys.get(source)
    }

    /// The same with other keys.
    pub fn with_keys(&self, keys: Keys) -> PushContext {
        let keys = if keys == *self.rules.keys { self.rules.keys.clone() } else { Arc::new(keys) };
        let same = Arc::ptr_eq(&keys, &self.rules.keys);
        PushContext {
            mesh: self.mesh.clone(),
            settings: self.settings.clone(),
            registry: self.registry.clone(),
            root_namespace: self.root_namespace.clone(),
            by_host: self.by_host.clone(),
            rules: if same { self.rules.clone() } else { Arc::new(self.rules.with_keys(keys)) },
            snapshot: self.snapshot.clone(),
            memo: self.memo.clone(),
            // Scopes stand for all that listeners are made of.
            scopes: Mutex::new(if same { self.known_scopes() } else { Default::default() }),
            former: self.latest_scopes(),
        }
    }
}
