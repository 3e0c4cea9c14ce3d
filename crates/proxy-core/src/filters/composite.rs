use std::collections::HashMap;
use std::sync::Arc;

use mesh_types::ArcStr;

use super::{HttpFilter, HttpFilterEntry};
use crate::Options;
use crate::any::Typed;
use crate::match_tree::{MatchTree, Place};
use crate::pb;
use crate::pb::http_filter::composite::v3 as proto;
use crate::percent::Fraction;
use crate::random::Random;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// Filters that stand in for a `Composite` one.
pub type Delegates = Arc<[HttpFilterEntry]>;

/// What the tree of a filter leads to.
#[derive(Clone, Debug)]
pub enum FilterAction {
    /// The filter is passed over.
    Skip,
    /// Others do its work, if it is a [`Composite`].
    Execute(Arc<Execution>),
}

/// The tree of a filter.
pub type FilterTree = Arc<MatchTree<FilterAction>>;

/// A compiled `ExecuteFilterAction`.
#[derive(Debug)]
pub struct Execution {
    /// What it is called in filter state.
    pub name: ArcStr,
    /// The filters; without them, those that the filter has under this name.
    filters: Option<Delegates>,
    sample: Fraction,
}

impl Execution {
    /// Whether it is this request's turn.
    pub fn hit(&self, random: &mut Random) -> bool {
        self.sample.hit(random)
    }

    /// The filters that do the work of `composite`.
    pub fn filters<'a>(&'a self, composite: &'a Composite) -> Option<&'a Delegates> {
        self.filters.as_ref().or_else(|| composite.named.get(&self.name))
    }
}

/// A filter whose work others do, chosen by a tree for each request (`filters.http.composite.v3.Composite`).
#[derive(Debug, Default)]
pub struct Composite {
    named: HashMap<ArcStr, Delegates>,
    /// Those that stand in its tree.
    inline: Vec<Delegates>,
}

impl Composite {
    pub(super) fn with(self, inline: Vec<Delegates>) -> Self {
        Self { inline, ..self }
    }

    /// All filters that may do its work.
    pub fn all(&self) -> impl Iterator<Item = &HttpFilterEntry> {
        self.named.values().chain(&self.inline).flat_map(|filters| filters.iter())
    }
}

/// Reads the parts of a composite filter. All that stands in its place has its name, by which routes know it.
pub(super) struct Compiler<'a> {
    pub(super) name: &'a ArcStr,
    pub(super) options: &'a Options,
    /// The filters of its tree so far.
    pub(super) inline: Vec<Delegates>,
}

impl Compiler<'_> {
    /// The filter, and its tree if that is its own.
    pub(super) fn composite(&mut self, config: &proto::Composite) -> Compiled<(Composite, Option<FilterTree>)> {
        let mut named = HashMap::new();
        for (name, chain) in &config.named_filter_chains {
            named.insert(name.as_str().into(), self.chain(chain).at_key("named_filter_chains", name)?);
        }
        let tree = config.matcher.as_ref().map(|tree| self.tree(tree, Place::Filter).at("matcher")).transpose()?;
        Ok((Composite { named, inline: Vec::new() }, tree))
    }

    pub(super) fn tree(&mut self, tree: &pb::xds_matcher::Matcher, place: Place) -> Compiled<FilterTree> {
        let options = self.options;
        let mut action = |typed: &Typed<'_>| match typed.name.as_str() {
            "envoy.extensions.filters.common.matcher.action.v3.SkipFilter" => Ok(FilterAction::Skip),
            "envoy.extensions.filters.http.composite.v3.ExecuteFilterAction" => {
                Ok(FilterAction::Execute(Arc::new(self.execution(&typed.decode()?)?)))
            }
            _ => Err(typed.unknown()),
        };
        Ok(Arc::new(MatchTree::compile(tree, place, options, &mut action)?))
    }

    fn execution(&mut self, config: &proto::ExecuteFilterAction) -> Compiled<Execution> {
        refuse!("dynamic_config": config.dynamic_config.is_some());
        let (name, filters): (&str, _) = match (&config.typed_config, &config.filter_chain) {
            (Some(filter), None) => (&filter.name, Some([self.filter(filter).at("typed_config")?].into())),
            (None, Some(chain)) => ("filter_chain", Some(self.chain(chain).at("filter_chain")?)),
            (Some(_), Some(_)) => return Err(Invalid::new("filter_chain", "cannot stand beside typed_config")),
            (None, None) if config.filter_chain_name.is_empty() => {
                return Err(Invalid::new("typed_config", "is missing"));
            }
            (None, None) => (&config.filter_chain_name, None),
        };
        self.inline.extend(filters.clone());
        let sample = Fraction::runtime(config.sample_percent.as_ref(), Fraction::ALL, &self.options.runtime);
        Ok(Execution { name: name.into(), filters, sample: sample.at("sample_percent")? })
    }

    fn chain(&mut self, chain: &proto::FilterChainConfiguration) -> Compiled<Delegates> {
        let all = chain.typed_config.iter().enumerate();
        all.map(|(i, filter)| self.filter(filter).at_index("typed_config", i)).collect()
    }

    fn filter(&mut self, config: &pb::core::TypedExtensionConfig) -> Compiled<HttpFilterEntry> {
        let typed = Typed::open(config.typed_config.as_ref())?;
        // Composites within composites would have one name, and so one decision.
        let filter = match HttpFilter::compile(&typed, self.options)? {
            Some(filter) => filter,
            None if self.options.allow_unsupported_filters => {
                HttpFilter::NoOp { type_name: typed.name.as_str().into() }
            }
            None => return Err(typed.unknown()),
        };
        Ok(HttpFilterEntry { name: self.name.clone(), disabled: false, filter, tree: None })
    }
}

#[cfg(test)]
mod tests {
    use envoy_api::Message;
    use serde_json::{Value, json};

    use super::*;

    const EXECUTE: &str = "type.googleapis.com/envoy.extensions.filters.http.composite.v3.ExecuteFilterAction";

    fn compile(action: &Value, named: &Value) -> Result<Vec<HttpFilterEntry>, String> {
        let mut action = action.clone();
        action["@type"] = EXECUTE.into();
        let config = json!({"stat_prefix": "s", "route_config": {}, "http_filters": [
            {"name": "co", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.composite.v3.Composite",
                "named_filter_chains": named,
                "matcher": {"on_no_match": {"action": {"name": "a", "typed_config": action}}}}},
            {"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]});
        let name = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
        let bytes = envoy_api::json::from_json(&format!("type.googleapis.com/{name}"), &config).unwrap();
        let message = pb::hcm::HttpConnectionManager::decode(bytes.as_slice()).unwrap();
        HttpFilterEntry::compile_all(&message.http_filters, &Options::default())
            .map_err(|e| e.of("listener", "").to_string())
    }

    #[test]
    fn what_is_executed_stands_in_the_tree_or_under_a_name() {
        let cors = json!({"name": "cors", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}});
        let count = |entries: &[HttpFilterEntry]| match &entries[0].filter {
            HttpFilter::Composite(composite) => {
                composite.all().filter(|e| matches!(e.filter, HttpFilter::Cors) && *e.name == *"co").count()
            }
            _ => 0,
        };
        let one = compile(&json!({"typed_config": cors}), &json!({})).unwrap();
        let chain = compile(&json!({"filter_chain": {"typed_config": [cors, cors]}}), &json!({})).unwrap();
        let named = json!({"c": {"typed_config": [cors]}});
        let by_name = compile(&json!({"filter_chain_name": "c"}), &named).unwrap();
        assert_eq!([count(&one), count(&chain), count(&by_name)], [1, 2, 1]);
        assert!(by_name[0].tree.is_some());
        let refused = compile(&json!({}), &json!({})).unwrap_err();
        assert!(refused.contains("typed_config: is missing"), "{refused}");
    }
}
