use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use crate::balance::{LocalityWeights, Members, Pool};
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

/// How a choice was made among subsets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SubsetUse {
    /// Not in a way that is counted.
    #[default]
    None,
    /// In the subset of the criteria.
    Selected,
    /// By the cluster's fallback.
    Fallback,
    /// Among all hosts, because the fallback had none.
    FallbackPanic,
}

/// The subsets that a cluster's hosts make.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SubsetCount {
    /// All of them.
    pub subsets: u64,
    /// Hosts that share a subset which may have one only.
    pub duplicates: u64,
}

impl SubsetCount {
    /// Counts them.
    pub fn of(config: &SubsetConfig, endpoints: &Endpoints) -> Self {
        let mut count = Self::default();
        let mut known = HashSet::new();
        // Selectors of the same keys make the same subsets.
        for selector in config.selectors.iter().filter(|selector| known.insert(&selector.keys)) {
            let mut seen = HashSet::new();
            for host in endpoints.hosts() {
                let fields = host.metadata.lb();
                let values = selector.keys.iter().map(|key| fields?.get(&**key).map(ToString::to_string));
                let Some(values) = values.collect::<Option<Vec<_>>>() else { continue };
                if !seen.insert(values) && selector.single_host {
                    count.duplicates += 1;
                }
            }
            count.subsets += seen.len() as u64;
        }
        count
    }
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
    ) -> (Choice<'_>, SubsetUse) {
        let mut wanted = criteria.cloned();
        let mut fallback = config.fallback;
        let mut counted = SubsetUse::Fallback;
        // Each round may drop keys, so it ends.
        while let Some(criteria) = wanted.take() {
            let keys: Vec<_> = criteria.0.iter().map(|(k, _)| k.clone()).collect();
            let Some(selector) = config.selectors.iter().find(|s| s.keys == keys) else { break };
            if self.exists(&criteria, config, selector.single_host, cluster, endpoints, seed) {
                let choice = self.0.get_mut(&name(&criteria)).map_or(Choice::Nothing, Choice::Subset);
                return (choice, SubsetUse::Selected);
            }
            match selector.fallback {
                Some(SubsetFallback::Keys) if selector.fallback_keys.len() < keys.len() => {
                    let kept = criteria.0.into_iter().filter(|(k, _)| selector.fallback_keys.contains(k));
                    wanted = Some(MetadataMatch(kept.collect()));
                }
                Some(own) => {
                    fallback = own;
                    // Envoy counts the general fallback only.
                    counted = SubsetUse::None;
                    break;
                }
                None => break,
            }
        }
        let choice = match fallback {
            // Envoy looks for panic only where there is a fallback to fail.
            SubsetFallback::None | SubsetFallback::Keys => Choice::Nothing,
            SubsetFallback::Any => Choice::All,
            SubsetFallback::DefaultSubset => {
                let default =
                    MetadataMatch(config.default_subset.iter().map(|(k, v)| (k.as_str().into(), v.clone())).collect());
                // Without hosts it is there all the same: the choice in it fails, in panic.
                self.exists(&default, config, false, cluster, endpoints, seed);
                self.0.get_mut(&name(&default)).map_or(Choice::Nothing, Choice::Subset)
            }
        };
        (choice, counted)
    }

    /// Makes the subset if need be; false if it has no host.
    fn exists(
        &mut self,
        criteria: &MetadataMatch,
        config: &SubsetConfig,
        single: bool,
        cluster: &Cluster,
        endpoints: &Endpoints,
        seed: u64,
    ) -> bool {
        if self.0.len() >= LIMIT {
            self.0.clear();
        }
        let fits = |host: &Host| criteria.fits(&host.metadata, config.list_as_any);
        let make = || {
            let only = endpoints.hosts().find(|host| fits(host)).filter(|_| single);
            let fits = |host: &Host| fits(host) && only.is_none_or(|only| std::ptr::eq(&**only, host));
            let members = Members { fits: &fits, weights: LocalityWeights::of_subset(cluster, config) };
            // DIFFERS: within a subset zones do not matter; Envoy looks at those of its hosts.
            Pool::new(cluster, endpoints, None, seed, members)
        };
        !self.0.entry(name(criteria)).or_insert_with(make).is_empty()
    }
}

fn name(criteria: &MetadataMatch) -> String {
    let fields: Map<String, Value> = criteria.0.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    Value::Object(fields).to_string()
}
