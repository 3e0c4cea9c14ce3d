//! Matcher trees of the xDS API (`xds.type.matcher.v3.Matcher`): what is done with a connection or a request, chosen by
//! conditions on it.
//!
//! In: the tree's message, where it stands ([`Place`]), and how its actions are read. Out: the action that a
//! [`MatchData`] leads to. Users of trees (RBAC, virtual hosts, listeners, filters) differ in nothing but these.

mod input;
mod predicate;

use std::collections::HashMap;
use std::net::IpAddr;

use envoy_api::xds::{IpMatcher, ServerNameMatcher};

use crate::Options;
use crate::any::Typed;
use crate::cidr::Cidr;
use crate::pb;
use crate::pb::xds_matcher as proto;
use crate::rejected::{At, Compiled, Invalid};
pub use input::MatchData;
pub(crate) use input::Place;
use input::{Found, Input};
use predicate::Predicate;

/// A compiled tree, whose leaves are actions.
#[derive(Clone, Debug)]
pub struct MatchTree<A> {
    rule: Rule<A>,
    /// What is done if the rule leads to nothing.
    otherwise: Option<Box<OnMatch<A>>>,
}

#[derive(Clone, Debug)]
enum Rule<A> {
    /// Only what is done otherwise.
    None,
    /// The first whose condition holds and that leads anywhere.
    List(Box<[(Predicate, OnMatch<A>)]>),
    /// What a value stands for.
    Keyed(Input, Table<A>),
}

#[derive(Clone, Debug)]
enum Table<A> {
    Exact(HashMap<Box<[u8]>, OnMatch<A>>),
    Prefix {
        entries: HashMap<Box<[u8]>, OnMatch<A>>,
        /// Of the prefixes, the longest first.
        lengths: Box<[usize]>,
    },
    /// The longest prefix first, then in the order of the configuration.
    Ranges(Box<[Range]>, Box<[OnMatch<A>]>),
    Domains {
        names: HashMap<Box<[u8]>, usize>,
        /// What stands behind `*.`.
        wildcards: HashMap<Box<[u8]>, usize>,
        any: Option<usize>,
        actions: Box<[OnMatch<A>]>,
    },
}

#[derive(Clone, Debug)]
struct Range {
    addresses: Cidr,
    /// Not tried after another one that led to nothing.
    exclusive: bool,
    action: usize,
}

#[derive(Clone, Debug)]
struct OnMatch<A> {
    then: Then<A>,
    /// As if it had not matched.
    keep_matching: bool,
}

#[derive(Clone, Debug)]
enum Then<A> {
    Act(A),
    Descend(Box<MatchTree<A>>),
}

/// Where a tree led.
#[derive(Debug, Eq, PartialEq)]
pub enum Outcome<'t, A> {
    /// To this.
    Found(&'t A),
    /// Nowhere.
    Nothing,
    /// Something that it asks for is not known yet.
    Unknown,
}

impl<'t, A> Outcome<'t, A> {
    /// The action, if it is known that there is one.
    pub fn found(self) -> Option<&'t A> {
        match self {
            Outcome::Found(action) => Some(action),
            Outcome::Nothing | Outcome::Unknown => None,
        }
    }
}

/// Trees within trees, and conditions within conditions. Envoy has no such limit but the stack.
const MAX_DEPTH: usize = 64;

/// What compiling needs everywhere in a tree.
struct Compiler<'c, A> {
    place: Place,
    options: &'c Options,
    action: &'c mut dyn FnMut(&Typed<'_>) -> Compiled<A>,
}

impl<A> MatchTree<A> {
    /// `action` reads what stands at the leaves.
    pub(crate) fn compile(
        matcher: &proto::Matcher,
        place: Place,
        options: &Options,
        action: &mut dyn FnMut(&Typed<'_>) -> Compiled<A>,
    ) -> Compiled<Self> {
        Compiler { place, options, action }.tree(matcher, 0)
    }

    /// Leads nowhere.
    pub(crate) fn nowhere() -> Self {
        Self { rule: Rule::None, otherwise: None }
    }

    /// Leads to this, whatever it looks at.
    pub(crate) fn always(action: A) -> Self {
        let otherwise = OnMatch { then: Then::Act(action), keep_matching: false };
        Self { rule: Rule::None, otherwise: Some(Box::new(otherwise)) }
    }

    /// Follows the tree (Envoy `MatchTree::match` and `handleRecursionAndSkips`).
    pub fn evaluate(&self, data: &MatchData<'_>) -> Outcome<'_, A> {
        let led = match &self.rule {
            Rule::None => Outcome::Nothing,
            Rule::List(items) => Self::first(items, data),
            Rule::Keyed(input, table) => match input.find(data) {
                Found::NotYet => Outcome::Unknown,
                Found::Text(text) => table.find(&text, data),
                Found::Missing | Found::Value(_) | Found::Attributes(_) => Outcome::Nothing,
            },
        };
        match (led, &self.otherwise) {
            (Outcome::Nothing, Some(otherwise)) => otherwise.follow(data),
            (led, _) => led,
        }
    }

    fn first<'t>(items: &'t [(Predicate, OnMatch<A>)], data: &MatchData<'_>) -> Outcome<'t, A> {
        for (predicate, on_match) in items {
            match predicate.holds(data) {
                None => return Outcome::Unknown,
                Some(false) => {}
                Some(true) => match on_match.follow(data) {
                    Outcome::Nothing => {}
                    led => return led,
                },
            }
        }
        Outcome::Nothing
    }
}

impl<A> OnMatch<A> {
    fn follow(&self, data: &MatchData<'_>) -> Outcome<'_, A> {
        let led = match &self.then {
            Then::Act(action) => Outcome::Found(action),
            Then::Descend(tree) => tree.evaluate(data),
        };
        match led {
            Outcome::Found(_) if self.keep_matching => Outcome::Nothing,
            led => led,
        }
    }
}

/// The first that leads anywhere.
fn first_led<'t, A: 't>(candidates: impl Iterator<Item = &'t OnMatch<A>>, data: &MatchData<'_>) -> Outcome<'t, A> {
    candidates
        .map(|on_match| on_match.follow(data))
        .find(|led| !matches!(led, Outcome::Nothing))
        .unwrap_or(Outcome::Nothing)
}

impl<A> Table<A> {
    fn find(&self, text: &[u8], data: &MatchData<'_>) -> Outcome<'_, A> {
        match self {
            Table::Exact(entries) => first_led(entries.get(text).into_iter(), data),
            Table::Prefix { entries, lengths } => {
                let prefixes = lengths.iter().filter_map(|length| text.get(..*length));
                first_led(prefixes.filter_map(|prefix| entries.get(prefix)), data)
            }
            Table::Ranges(ranges, actions) => {
                let ip = std::str::from_utf8(text).ok().and_then(|text| text.parse::<IpAddr>().ok());
                let Some(ip) = ip else { return Outcome::Nothing };
                let within = ranges.iter().filter(|range| range.addresses.contains(ip)).enumerate();
                let tried = within.filter(|(index, range)| *index == 0 || !range.exclusive);
                first_led(tried.map(|(_, range)| &actions[range.action]), data)
            }
            Table::Domains { names, wildcards, any, actions } => {
                if text.is_empty() {
                    return Outcome::Nothing;
                }
                let dots = text.iter().enumerate().filter(|(_, byte)| **byte == b'.');
                let suffixes = dots.filter_map(|(at, _)| wildcards.get(&text[at + 1..]));
                let candidates = names.get(text).into_iter().chain(suffixes).chain(any);
                first_led(candidates.map(|action| &actions[*action]), data)
            }
        }
    }
}

impl<A> Compiler<'_, A> {
    fn tree(&mut self, matcher: &proto::Matcher, depth: usize) -> Compiled<MatchTree<A>> {
        use proto::matcher::MatcherType;
        if depth > MAX_DEPTH {
            return Err(Invalid::new("matcher", "is nested too deeply"));
        }
        let rule = match &matcher.matcher_type {
            None => Rule::None,
            Some(MatcherType::MatcherList(list)) => {
                if list.matchers.is_empty() {
                    return Err(Invalid::new("matcher_list.matchers", "is empty"));
                }
                let mut items = Vec::with_capacity(list.matchers.len());
                for (i, item) in list.matchers.iter().enumerate() {
                    items.push(self.item(item, depth).at_index("matcher_list.matchers", i)?);
                }
                Rule::List(items.into())
            }
            Some(MatcherType::MatcherTree(tree)) => self.keyed(tree, depth).at("matcher_tree")?,
        };
        let otherwise = match &matcher.on_no_match {
            Some(on_match) => Some(Box::new(self.on_match(Some(on_match), depth).at("on_no_match")?)),
            None => None,
        };
        Ok(MatchTree { rule, otherwise })
    }

    fn item(
        &mut self,
        item: &proto::matcher::matcher_list::FieldMatcher,
        depth: usize,
    ) -> Compiled<(Predicate, OnMatch<A>)> {
        let predicate = item.predicate.as_ref().ok_or_else(|| Invalid::new("predicate", "is missing"))?;
        let predicate = Predicate::compile(predicate, self.place, self.options, depth).at("predicate")?;
        Ok((predicate, self.on_match(item.on_match.as_ref(), depth).at("on_match")?))
    }

    fn on_match(&mut self, on_match: Option<&proto::matcher::OnMatch>, depth: usize) -> Compiled<OnMatch<A>> {
        use proto::matcher::on_match::OnMatch as Proto;
        let on_match = on_match.ok_or_else(|| Invalid::new("", "is missing"))?;
        // Only listeners do anything with what is passed over (Envoy `validateOnMatch`).
        if on_match.keep_matching && !self.place.may_keep_matching() {
            return Err(Invalid::new("keep_matching", "is not supported in this context"));
        }
        let then = match &on_match.on_match {
            Some(Proto::Matcher(tree)) => Then::Descend(Box::new(self.tree(tree, depth + 1).at("matcher")?)),
            Some(Proto::Action(action)) => {
                let typed = Typed::open(action.typed_config.as_ref()).at("action")?;
                Then::Act((self.action)(&typed).at("action")?)
            }
            None => return Err(Invalid::new("on_match", "is missing")),
        };
        Ok(OnMatch { then, keep_matching: on_match.keep_matching })
    }

    fn keyed(&mut self, tree: &proto::matcher::MatcherTree, depth: usize) -> Compiled<Rule<A>> {
        use proto::matcher::matcher_tree::TreeType;
        let input = Input::compile(tree.input.as_ref(), self.place).at("input")?;
        if matches!(input, Input::Attributes) {
            return Err(Invalid::new("input", "Unsupported data input type: cel_data_input"));
        }
        let table = match &tree.tree_type {
            Some(TreeType::ExactMatchMap(map)) => Table::Exact(self.entries(map, depth).at("exact_match_map")?),
            Some(TreeType::PrefixMatchMap(map)) => {
                let entries = self.entries(map, depth).at("prefix_match_map")?;
                let mut lengths: Vec<usize> = entries.keys().map(|prefix| prefix.len()).collect();
                lengths.sort_unstable_by(|a, b| b.cmp(a));
                lengths.dedup();
                Table::Prefix { entries, lengths: lengths.into() }
            }
            Some(TreeType::CustomMatch(custom)) => {
                let typed = Typed::open(custom.typed_config.as_ref()).at("custom_match")?;
                match typed.name.as_str() {
                    "xds.type.matcher.v3.IPMatcher" => self.ranges(&typed.decode()?, depth),
                    "xds.type.matcher.v3.ServerNameMatcher" => self.domains(&typed.decode()?, depth),
                    _ => Err(typed.unknown()),
                }
                .at("custom_match")?
            }
            None => return Err(Invalid::new("tree_type", "is missing")),
        };
        Ok(Rule::Keyed(input, table))
    }

    fn entries(
        &mut self,
        map: &proto::matcher::matcher_tree::MatchMap,
        depth: usize,
    ) -> Compiled<HashMap<Box<[u8]>, OnMatch<A>>> {
        if map.map.is_empty() {
            return Err(Invalid::new("map", "is empty"));
        }
        // Sorted: what is refused, and the numbers of actions, must not depend on the order of a hash table.
        let mut sorted: Vec<_> = map.map.iter().collect();
        sorted.sort_by_key(|(key, _)| *key);
        let mut entries = HashMap::with_capacity(sorted.len());
        for (key, on_match) in sorted {
            let on_match = self.on_match(Some(on_match), depth).at_key("map", key)?;
            entries.insert(key.as_bytes().into(), on_match);
        }
        Ok(entries)
    }

    /// Envoy `IpRangeMatcher`.
    fn ranges(&mut self, matcher: &IpMatcher, depth: usize) -> Compiled<Table<A>> {
        let (mut ranges, mut actions) = (Vec::new(), Vec::new());
        for (i, entry) in matcher.range_matchers.iter().enumerate() {
            if entry.ranges.is_empty() {
                return Err(Invalid::new(format!("range_matchers[{i}].ranges"), "is empty"));
            }
            let on_match = self.on_match(entry.on_match.as_ref(), depth).at("on_match");
            actions.push(on_match.at_index("range_matchers", i)?);
            for range in &entry.ranges {
                let prefix_len = range.prefix_len;
                let range = pb::core::CidrRange { address_prefix: range.address_prefix.clone(), prefix_len };
                let addresses = Cidr::compile(&range).at("ranges").at_index("range_matchers", i)?;
                ranges.push(Range { addresses, exclusive: entry.exclusive, action: i });
            }
        }
        ranges.sort_by_key(|range| std::cmp::Reverse(range.addresses.prefix_len()));
        Ok(Table::Ranges(ranges.into(), actions.into()))
    }

    /// Envoy `DomainTrieMatcher`.
    fn domains(&mut self, matcher: &ServerNameMatcher, depth: usize) -> Compiled<Table<A>> {
        let (mut names, mut wildcards, mut any, mut actions) = (HashMap::new(), HashMap::new(), None, Vec::new());
        for (i, entry) in matcher.domain_matchers.iter().enumerate() {
            if entry.domains.is_empty() {
                return Err(Invalid::new(format!("domain_matchers[{i}].domains"), "is empty"));
            }
            let on_match = self.on_match(entry.on_match.as_ref(), depth).at("on_match");
            actions.push(on_match.at_index("domain_matchers", i)?);
            for domain in &entry.domains {
                let invalid = |reason: &str| {
                    let reason = format!("Invalid wildcard domain format: {domain}. {reason}");
                    Err(Invalid::new(format!("domain_matchers[{i}]"), reason))
                };
                let known = match domain.strip_prefix("*.") {
                    _ if domain == "*" => any.replace(i),
                    Some(suffix) if suffix.contains('*') => return invalid("Multiple wildcards are not supported"),
                    Some(suffix) if !suffix.is_empty() => wildcards.insert(suffix.as_bytes().into(), i),
                    None if domain.is_empty() => {
                        return Err(Invalid::new(format!("domain_matchers[{i}]"), "Empty domain in ServerNameMatcher"));
                    }
                    None if !domain.contains('*') => names.insert(domain.as_bytes().into(), i),
                    _ => return invalid("Only '*' and '*.domain' patterns are supported"),
                };
                if known.is_some() {
                    let reason = format!("Duplicate domain in ServerNameMatcher: {domain}");
                    return Err(Invalid::new(format!("domain_matchers[{i}]"), reason));
                }
            }
        }
        Ok(Table::Domains { names, wildcards, any, actions: actions.into() })
    }
}

#[cfg(test)]
mod tests;
