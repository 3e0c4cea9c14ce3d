use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::balance::Pool;
use crate::cluster::{Cluster, SubsetConfig, SubsetFallback};
use crate::endpoints::{Endpoints, Host};
use crate::metadata::MetadataMatch;

/// The subsets of a cluster that were asked for since the last change of its hosts.
#[derive(Debug, Default)]
pub(super) struct Subsets(HashMap<String, Pool>);

/// Where to choose from.
pub(super) enum Choice<'a> {
    /// All hosts.
    All,
    /// These.
    Subset(&'a mut Pool),
    /// None at all.
    Nothing,
}

/// Criteria come from routes, so there are few; this bounds what a header-driven mistake could cost.
const LIMIT: usize = 1024;

impl Subsets {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Envoy `SubsetLoadBalancer::chooseHost`.
    pub(super) fn choose(
        &mut self,
        config: &SubsetConfig,
        cluster: &Cluster,
        endpoints: &Endpoints,
        seed: u64,
        criteria: Option<&MetadataMatch>,
    ) -> Choice<'_> {
        let mut wanted = criteria.cloned();
        let mut fallback = config.fallback;
        // Each round may drop keys, so it ends.
        while let Some(criteria) = wanted.take() {
            let keys: Vec<_> = criteria.0.iter().map(|(k, _)| k.clone()).collect();
            let Some(selector) = config.selectors.iter().find(|s| s.keys == keys) else { break };
            if self.exists(&criteria, config, cluster, endpoints, seed) {
                return self.0.get_mut(&name(&criteria)).map_or(Choice::Nothing, Choice::Subset);
            }
            match selector.fallback {
                Some(SubsetFallback::Keys) if selector.fallback_keys.len() < keys.len() => {
                    let kept = criteria.0.into_iter().filter(|(k, _)| selector.fallback_keys.contains(k));
                    wanted = Some(MetadataMatch(kept.collect()));
                }
                Some(own) => {
                    fallback = own;
                    break;
                }
                None => break,
            }
        }
        let nothing = if config.panic_mode_any { Choice::All } else { Choice::Nothing };
        match fallback {
            // Envoy looks for panic only where there is a fallback to fail.
            SubsetFallback::None | SubsetFallback::Keys => Choice::Nothing,
            SubsetFallback::Any => Choice::All,
            SubsetFallback::DefaultSubset => {
                let default =
                    MetadataMatch(config.default_subset.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect());
                if !self.exists(&default, config, cluster, endpoints, seed) {
                    return nothing;
                }
                self.0.get_mut(&name(&default)).map_or(Choice::Nothing, Choice::Subset)
            }
        }
    }

    /// Makes the subset if need be; false if it has no host.
    fn exists(
        &mut self,
        criteria: &MetadataMatch,
        config: &SubsetConfig,
        cluster: &Cluster,
        endpoints: &Endpoints,
        seed: u64,
    ) -> bool {
        if self.0.len() >= LIMIT {
            self.0.clear();
        }
        let make = || Pool::new(cluster, endpoints, seed, |host| is_member(host, criteria, config.list_as_any));
        !self.0.entry(name(criteria)).or_insert_with(make).is_empty()
    }
}

fn name(criteria: &MetadataMatch) -> String {
    let fields: Map<String, Value> = criteria.0.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    Value::Object(fields).to_string()
}

fn is_member(host: &Host, criteria: &MetadataMatch, list_as_any: bool) -> bool {
    let fields = host.metadata.lb();
    criteria.0.iter().all(|(key, wanted)| match fields.and_then(|f| f.get(&**key)) {
        Some(Value::Array(list)) if list_as_any => list.contains(wanted),
        Some(value) => value == wanted,
        None => false,
    })
}
