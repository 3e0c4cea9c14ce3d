use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use envoy_api::Resource;
use mesh_types::ArcStr;

/// What a client has of one type: a version for each name, or that there is nothing of the name.
///
/// In rest that is the list it was sent last, which it shares with all clients that were sent the same: so a thousand
/// clients cost the memory of one, and a list that is the same object needs no comparison.
#[derive(Debug)]
pub(super) enum Held {
    /// Everything of this list, and nothing of these names.
    List(Arc<[Resource]>, BTreeSet<ArcStr>),
    /// Anything; `None`: it was told that there is none.
    Map(HashMap<ArcStr, Option<ArcStr>>),
}

impl Default for Held {
    fn default() -> Self {
        Held::List(Arc::default(), BTreeSet::new())
    }
}

/// How a list differs from what a client has.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// Places in the new list of what is new or has another version.
    pub(super) changed: Vec<u32>,
    /// Names that the client has and the new list has not.
    pub(super) gone: Vec<ArcStr>,
}

impl Held {
    /// Whether it is exactly this list.
    pub(super) fn is(&self, list: &Arc<[Resource]>) -> bool {
        matches!(self, Held::List(held, _) if Arc::ptr_eq(held, list))
    }

    /// For changes of single names.
    pub(super) fn map(&mut self) -> &mut HashMap<ArcStr, Option<ArcStr>> {
        if let Held::List(list, none) = self {
            let held = list.iter().map(|resource| (resource.name.clone(), Some(resource.version.clone())));
            let none = std::mem::take(none).into_iter().map(|name| (name, None));
            *self = Held::Map(held.chain(none).collect());
        }
        match self {
            Held::Map(map) => map,
            Held::List(..) => unreachable!("a list has just become a map"),
        }
    }

    /// Regards what the client has of these names as unknown; whether it has any.
    pub(super) fn forget(&mut self, names: &HashSet<&str>) -> bool {
        let has = match self {
            Held::List(list, _) => list.iter().any(|resource| names.contains(&*resource.name)),
            Held::Map(map) => names.iter().any(|name| map.get(*name).is_some_and(Option::is_some)),
        };
        if has {
            self.map().retain(|name, version| version.is_none() || !names.contains(&**name));
        }
        has
    }

    /// Whether the client was told that there is nothing of this name.
    pub(super) fn knows_of_nothing(&self, name: &str) -> bool {
        match self {
            Held::List(_, none) => none.contains(name),
            Held::Map(map) => map.get(name).is_some_and(Option::is_none),
        }
    }

    pub(super) fn difference(&self, list: &[Resource]) -> Difference {
        match self {
            Held::List(held, _) => difference_of_lists(held, list),
            Held::Map(held) => {
                let changed =
                    |resource: &Resource| held.get(&resource.name).and_then(Option::as_ref) != Some(&resource.version);
                let names: HashSet<&str> = list.iter().map(|resource| &*resource.name).collect();
                let gone = held.iter().filter(|(name, version)| version.is_some() && !names.contains(&***name));
                let mut gone: Vec<ArcStr> = gone.map(|(name, _)| name.clone()).collect();
                gone.sort();
                Difference { changed: places(list, changed), gone }
            }
        }
    }
}

/// Lists of one source have their common part in the same order, as a rule.
fn difference_of_lists(old: &[Resource], new: &[Resource]) -> Difference {
    let same_names = old.len() == new.len() && old.iter().zip(new).all(|(a, b)| a.is(b) || a.name == b.name);
    if same_names {
        let changed = old.iter().zip(new).enumerate().filter(|(_, (a, b))| !a.is(b) && a.version != b.version);
        return Difference { changed: changed.map(|(place, _)| place as u32).collect(), gone: Vec::new() };
    }
    let held: HashMap<&str, &str> = old.iter().map(|resource| (&*resource.name, &*resource.version)).collect();
    let changed = places(new, |resource| held.get(&*resource.name) != Some(&&*resource.version));
    let names: HashSet<&str> = new.iter().map(|resource| &*resource.name).collect();
    let gone = old.iter().filter(|resource| !names.contains(&*resource.name));
    let mut gone: Vec<ArcStr> = gone.map(|resource| resource.name.clone()).collect();
    gone.sort();
    Difference { changed, gone }
}

fn places(list: &[Resource], wanted: impl Fn(&Resource) -> bool) -> Vec<u32> {
    let wanted = list.iter().enumerate().filter(|(_, resource)| wanted(resource));
    wanted.map(|(place, _)| place as u32).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(of: &[(u8, u8)]) -> Arc<[Resource]> {
        let mut seen = BTreeSet::new();
        let of = of.iter().filter(|(name, _)| seen.insert(*name));
        of.map(|(name, version)| Resource::with_version(name.to_string(), version.to_string(), Vec::<u8>::new()))
            .collect()
    }

    proptest! {
        #[test]
        fn both_forms_see_the_same_difference(
            old in prop::collection::vec((0u8..6, 0u8..2), 0..6),
            new in prop::collection::vec((0u8..6, 0u8..2), 0..6),
        ) {
            let (old, new) = (list(&old), list(&new));
            let mut held = Held::List(old, BTreeSet::new());
            let of_list = held.difference(&new);
            held.map();
            let of_map = held.difference(&new);
            prop_assert_eq!(of_list.changed, of_map.changed);
            prop_assert_eq!(of_list.gone, of_map.gone);
        }
    }
}
