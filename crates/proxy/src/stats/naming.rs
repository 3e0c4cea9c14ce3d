//! What a bootstrap's `stats_config` says: which statistics are shown, which parts of their names are labels, and the bounds
//! of histograms.

use super::{BOUNDS, Entry};
use proxy_core::bootstrap::{StatsConfig, StatsNames, TagRule};
use proxy_core::matchers::StringMatcher;
use regex_automata::meta::Regex;
use std::ops::Range;

/// Made once, from the bootstrap.
#[derive(Debug, Default)]
pub(crate) struct Naming {
    names: StatsNames,
    /// Those for all names, then those for names with a certain first part: the order in which Envoy asks them.
    rules: Vec<Rule>,
    /// Without Envoy's own rules.
    own_rules_only: bool,
    bounds: Vec<(StringMatcher, Vec<f64>)>,
}

/// A label that names may have.
#[derive(Debug)]
struct Rule {
    label: String,
    /// Only names whose first part is this have it.
    first: Option<String>,
    value: Value,
}

#[derive(Debug)]
enum Value {
    /// Its first group goes, its second one, if there is one, is the value.
    Part(Regex),
    Fixed(String),
}

/// What the rules find in a name.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Labels of the rules for all names.
    pub(super) early: Vec<(String, String)>,
    /// Labels of the others.
    pub(super) late: Vec<(String, String)>,
    /// What goes.
    parts: Vec<Range<usize>>,
}

impl Naming {
    pub(crate) fn new(config: &StatsConfig) -> Self {
        let mut rules: Vec<Rule> = config.tags.iter().filter_map(|tag| Rule::new(tag, config)).collect();
        rules.sort_by_key(|rule| rule.first.is_some());
        let sorted = |bounds: &Vec<f64>| {
            let mut bounds = bounds.clone();
            bounds.sort_by(f64::total_cmp);
            bounds
        };
        Self {
            names: config.names.clone(),
            rules,
            own_rules_only: config.without_default_tags,
            bounds: config.histogram_buckets.iter().map(|(name, bounds)| (name.clone(), sorted(bounds))).collect(),
        }
    }

    /// Leaves those that there are.
    pub(crate) fn choose(&self, entries: &mut Vec<Entry>) {
        if !matches!(self.names, StatsNames::All) {
            entries.retain(|entry| self.names.keeps(&entry.full_name()));
        }
    }

    /// The upper bounds of the buckets of a histogram.
    pub(super) fn bounds(&self, name: &str) -> &[f64] {
        let own = self.bounds.iter().find(|(matcher, _)| matcher.matches(name.as_bytes()));
        own.map(|(_, bounds)| &bounds[..]).filter(|bounds| !bounds.is_empty()).unwrap_or(&BOUNDS)
    }

    /// Whether Envoy's own rules make labels, too.
    pub(super) fn has_defaults(&self) -> bool {
        !self.own_rules_only
    }

    /// Asks the rules (Envoy `TagProducerImpl::produceTags`); `None`: there are none.
    pub(super) fn find(&self, name: &str) -> Option<Found> {
        if self.rules.is_empty() {
            return self.own_rules_only.then(Found::default);
        }
        let mut found = Found::default();
        let first = name.split('.').next();
        for rule in &self.rules {
            if rule.first.is_some() && rule.first.as_deref() != first {
                continue;
            }
            let value = match &rule.value {
                Value::Fixed(value) => value.clone(),
                Value::Part(regex) => {
                    let mut captures = regex.create_captures();
                    regex.captures(name, &mut captures);
                    let Some(part) = captures.get_group(1) else { continue };
                    let value = captures.get_group(2).unwrap_or(part);
                    found.parts.push(part.range());
                    name[value.range()].to_owned()
                }
            };
            let labels = if rule.first.is_some() { &mut found.late } else { &mut found.early };
            labels.push((rule.label.clone(), value));
        }
        Some(found)
    }
}

impl Found {
    /// What is left of the whole name.
    pub(super) fn rest_of(&self, name: &str) -> String {
        let gone = |at: usize| self.parts.iter().any(|part| part.contains(&at));
        name.char_indices().filter(|(at, _)| !gone(*at)).map(|(_, c)| c).collect()
    }

    /// Takes the parts out of what Envoy's own rules have left of `name`, as far as they are still there.
    pub(super) fn take_out(&self, name: &str, rest: &mut String) {
        for part in &self.parts {
            if let Some(at) = rest.find(&name[part.clone()]).filter(|_| !part.is_empty()) {
                rest.replace_range(at..at + part.len(), "");
            }
        }
    }
}

impl Rule {
    /// `None`: Envoy's own rules are there in any case.
    fn new(tag: &TagRule, config: &StatsConfig) -> Option<Self> {
        let label = |name: &str| name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "_");
        Some(match tag {
            TagRule::Regex(name, regex) => Self {
                label: label(name),
                first: first_part(regex),
                // It was compiled when the bootstrap was read.
                value: Value::Part(Regex::new(regex).ok()?),
            },
            TagRule::Fixed(name, value) => {
                Self { label: label(name), first: None, value: Value::Fixed(value.to_string()) }
            }
            TagRule::Default(_) if !config.without_default_tags => return None,
            TagRule::Default(name) => {
                let regex = proxy_core::bootstrap::default_tag(name)?;
                Self { label: label(name), first: first_part(regex), value: Value::Part(Regex::new(regex).ok()?) }
            }
        })
    }
}

/// The part that names must begin with to fit (Envoy `TagExtractorImplBase::extractRegexPrefix`).
fn first_part(regex: &str) -> Option<String> {
    let rest = regex.strip_prefix('^')?;
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|end| *end > 0)?;
    (rest[end..].starts_with("\\.") || &rest[end..] == "$").then(|| rest[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naming(tags: &[(&str, &str)], without_default_tags: bool) -> Naming {
        let tags = tags.iter().map(|(name, regex)| TagRule::Regex((*name).into(), (*regex).into())).collect();
        Naming::new(&StatsConfig { tags, without_default_tags, ..StatsConfig::default() })
    }

    #[test]
    fn groups_are_taken_out_of_names() {
        // Two of the rules of Istio's bootstrap.
        let naming = naming(&[("cluster_name", r"^cluster(\.(.+);)"), ("response_code", r"_rq(_(\d{3}))$")], true);
        let name = "cluster.outbound|80||a.b;.upstream_rq_503";
        let found = naming.find(name).unwrap();
        assert_eq!(found.rest_of(name), "cluster.upstream_rq");
        let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(found.early, [label("cluster_name", "outbound|80||a.b"), label("response_code", "503")]);
        assert!(found.late.is_empty());
    }

    #[test]
    fn rules_with_a_first_part_are_asked_last_and_only_for_it() {
        let naming = naming(&[("a", r"^http\.((.*?)\.)"), ("b", r"(\.(x))$")], true);
        let found = naming.find("http.in.x").unwrap();
        assert_eq!((found.early.len(), found.late.len()), (1, 1));
        assert!(naming.find("cluster.in.y").unwrap().late.is_empty());
    }

    #[test]
    fn without_a_configuration_there_are_no_rules() {
        let naming = Naming::default();
        assert!(naming.find("cluster.a.b").is_none() && naming.has_defaults());
        assert_eq!(naming.bounds("x"), BOUNDS);
    }
}
