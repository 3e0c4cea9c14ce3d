//! DestinationRules, merged and indexed by host.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config_store::{Body, Kind, Snapshot};
use istio_api::{DestinationRule, MeshConfig};
use mesh_types::{ArcStr, Labels};
use registry::{Service, Settings};

use crate::{Config, PushContext, host};

/// Several DestinationRules for one host in one namespace, merged into one.
#[derive(Clone, Debug)]
pub struct ConsolidatedRule {
    /// The oldest, with subsets of the others added.
    pub rule: Arc<Config<DestinationRule>>,
    /// Whom it is exported to; empty is everybody.
    export_to: BTreeSet<String>,
}

impl ConsolidatedRule {
    /// Whom it is exported to; empty is everybody.
    pub fn export_to(&self) -> &BTreeSet<String> {
        &self.export_to
    }
}

#[derive(Debug, Default)]
struct Rules {
    exact: BTreeMap<ArcStr, Vec<ConsolidatedRule>>,
    wildcard: BTreeMap<ArcStr, Vec<ConsolidatedRule>>,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    namespace_local: BTreeMap<ArcStr, Rules>,
    exported: BTreeMap<ArcStr, Rules>,
    root_local: Rules,
}

fn selector(rule: &DestinationRule) -> Option<&Labels> {
    rule.workload_selector.as_ref().map(|s| &s.match_labels)
}

impl Index {
    /// As istiod `setDestinationRules`: rules with a selector first, then by age.
    pub(crate) fn build(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings, root: &ArcStr) -> Index {
        let mut all: Vec<Config<DestinationRule>> = snapshot
            .list(Kind::DestinationRule)
            .filter_map(|object| match &object.body {
                Body::DestinationRule(spec) => Some(Config::of(object, (**spec).clone())),
                _ => None,
            })
            .collect();
        all.sort_by(|a, b| {
            let key = |c: &Config<DestinationRule>| {
                (c.spec.workload_selector.is_none(), c.created, c.name.clone(), c.namespace.clone())
            };
            key(a).cmp(&key(b))
        });
        let private_by_default = mesh.default_destination_rule_export_to.iter().any(|e| e == ".");
        let apart = settings.audiences_apart;
        let mut index = Index::default();
        for mut config in all {
            config.spec.host = host::resolve(&config.spec.host, &config.namespace, &settings.domain);
            let export_to: BTreeSet<String> = if config.spec.workload_selector.is_some() {
                BTreeSet::from([".".to_owned()])
            } else {
                config.spec.export_to.iter().cloned().collect()
            };
            let has = |to: &str| export_to.contains(to);
            let own = has(".") || has(&config.namespace);
            let config = Arc::new(config);
            if export_to.is_empty() || has("*") || own {
                let rules = index.namespace_local.entry(config.namespace.clone()).or_default();
                rules.merge(&config, &export_to, apart);
            }
            let private = match export_to.len() {
                0 => private_by_default,
                1 => own,
                _ => false,
            };
            if !private {
                index.exported.entry(config.namespace.clone()).or_default().merge(&config, &export_to, apart);
            } else if config.namespace == *root {
                index.root_local.merge(&config, &export_to, apart);
            }
        }
        index
    }
}

impl Rules {
    fn find(&self, hostname: &str) -> Option<&Vec<ConsolidatedRule>> {
        host::most_specific(hostname, &self.exact, &self.wildcard).map(|(_, rules)| rules)
    }

    /// As istiod `mergeDestinationRule`: rules for the same host, with the same selector and, if those are kept
    /// apart, audience become one; the older one's traffic policy and subsets win.
    fn merge(&mut self, config: &Arc<Config<DestinationRule>>, export_to: &BTreeSet<String>, apart: bool) {
        let rule = &config.spec;
        let map = if host::is_wildcard(&rule.host) { &mut self.wildcard } else { &mut self.exact };
        let list = map.entry(rule.host.as_str().into()).or_default();
        let mut separate = true;
        for existing in list.iter_mut() {
            let equal = existing.export_to == *export_to;
            let wider = !existing.export_to.is_empty() && export_to.is_superset(&existing.export_to);
            if apart {
                separate = !equal;
                if !equal && !wider {
                    continue;
                }
            }
            let (theirs, ours) = (selector(&existing.rule.spec), selector(rule));
            if theirs.is_some() && ours.is_some() && theirs != ours {
                separate = true;
                continue;
            }
            if theirs.is_some() == ours.is_some() {
                separate = false;
            }
            let mut merged = (*existing.rule).clone();
            for subset in &rule.subsets {
                if !merged.spec.subsets.iter().any(|s| s.name == subset.name) {
                    merged.spec.subsets.push(subset.clone());
                }
            }
            if merged.spec.traffic_policy.is_none() {
                merged.spec.traffic_policy.clone_from(&rule.traffic_policy);
            }
            existing.rule = Arc::new(merged);
        }
        if separate {
            list.push(ConsolidatedRule { rule: config.clone(), export_to: export_to.clone() });
        }
    }
}

impl PushContext {
    fn exported_rules(&self, owner: &str, hostname: &str, client: &str) -> Vec<ConsolidatedRule> {
        let rules = self.rules.destination_rules.exported.get(owner).and_then(|rules| rules.find(hostname));
        let sees = |rule: &&ConsolidatedRule| {
            rule.export_to.is_empty() || rule.export_to.contains("*") || rule.export_to.contains(client)
        };
        rules.into_iter().flatten().filter(sees).cloned().collect()
    }

    /// The rules for a service as clients of one namespace see them: of the client's namespace, else the
    /// service's, else the root namespace (istiod `PushContext.destinationRule`).
    pub(crate) fn rules_for(&self, client: &str, service: &Service) -> Vec<ConsolidatedRule> {
        let index = &self.rules.destination_rules;
        let local =
            if *client == *self.root_namespace { Some(&index.root_local) } else { index.namespace_local.get(client) };
        if let Some(rules) = local.and_then(|rules| rules.find(&service.hostname)) {
            return rules.clone();
        }
        let own = self.exported_rules(&service.namespace, &service.hostname, client);
        if own.is_empty() { self.exported_rules(&self.root_namespace, &service.hostname, client) } else { own }
    }
}
