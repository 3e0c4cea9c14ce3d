//! What changed between registries, so that who derived something from an earlier one need not derive all anew.

use std::sync::Arc;

use mesh_types::ArcStr;

/// A service's host name and namespace.
pub type ServiceKey = (ArcStr, ArcStr);

/// Stands for the endpoints of one moment: equal to no other.
#[derive(Debug)]
pub struct Version(());

/// How many steps back a registry remembers.
const STEPS: usize = 16;

/// The versions before this one, as long as nothing but endpoints changed.
#[derive(Debug)]
pub(crate) struct History {
    version: Arc<Version>,
    /// Earlier versions and what changed after each; the oldest first.
    steps: Vec<(Arc<Version>, Arc<[ServiceKey]>)>,
}

impl Default for History {
    fn default() -> History {
        History { version: Arc::new(Version(())), steps: Vec::new() }
    }
}

impl History {
    /// The history one step on.
    pub(crate) fn next(&self, changed: Vec<ServiceKey>) -> History {
        if changed.is_empty() {
            return History { version: self.version.clone(), steps: self.steps.clone() };
        }
        let old = self.steps.iter().skip((self.steps.len() + 1).saturating_sub(STEPS)).cloned();
        let steps = old.chain([(self.version.clone(), changed.into())]).collect();
        History { version: Arc::new(Version(())), steps }
    }

    pub(crate) fn version(&self) -> &Arc<Version> {
        &self.version
    }

    pub(crate) fn since(&self, version: &Arc<Version>) -> Option<impl Iterator<Item = &ServiceKey>> {
        let from = match Arc::ptr_eq(version, &self.version) {
            true => self.steps.len(),
            false => self.steps.iter().position(|(step, _)| Arc::ptr_eq(step, version))?,
        };
        Some(self.steps[from..].iter().flat_map(|(_, changed)| changed.iter()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_add_up_as_far_as_they_are_remembered() {
        let key = |n: usize| (ArcStr::from(n.to_string()), ArcStr::from(""));
        let mut all = vec![History::default()];
        for n in 0..STEPS + 3 {
            all.push(all[n].next(vec![key(n)]));
        }
        let last = &all[STEPS + 3];
        let since = |n: usize| last.since(all[n].version()).map(|keys| keys.cloned().collect::<Vec<_>>());
        assert_eq!(since(STEPS + 3), Some(Vec::new()));
        assert_eq!(since(STEPS + 1), Some(vec![key(STEPS + 1), key(STEPS + 2)]));
        assert_eq!(since(3).map(|keys| keys.len()), Some(STEPS));
        assert_eq!(since(2), None);
        assert_eq!(last.since(History::default().version()).map(Iterator::count), None);
        assert!(Arc::ptr_eq(last.next(Vec::new()).version(), last.version()));
    }
}
