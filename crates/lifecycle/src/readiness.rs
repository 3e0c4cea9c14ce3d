//! Readiness as a list of named conditions, so that "not ready" always says what is missing.

use std::sync::Arc;

use tokio::sync::watch;

/// Set by the parts of a program, read by its probes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Readiness {
    conditions: Arc<watch::Sender<Vec<Condition>>>,
}

/// One thing that must be true before the program is ready.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Condition {
    /// What it is, such as `certificate`.
    pub name: &'static str,
    /// `None` when met, else why not, in words.
    pub missing: Option<String>,
}

impl Readiness {
    /// Not ready until each of these has been set.
    pub fn new(names: &[&'static str]) -> Readiness {
        let conditions =
            names.iter().map(|name| Condition { name, missing: Some("not there yet".to_owned()) }).collect();
        Readiness { conditions: Arc::new(watch::Sender::new(conditions)) }
    }

    /// The condition is met. Unknown names are added.
    pub fn met(&self, name: &'static str) {
        self.set(name, None);
    }

    /// The condition is not met, for this reason.
    pub fn unmet(&self, name: &'static str, reason: impl Into<String>) {
        self.set(name, Some(reason.into()));
    }

    fn set(&self, name: &'static str, missing: Option<String>) {
        self.conditions.send_if_modified(|conditions| match conditions.iter_mut().find(|c| c.name == name) {
            Some(condition) if condition.missing == missing => false,
            Some(condition) => {
                condition.missing = missing;
                true
            }
            None => {
                conditions.push(Condition { name, missing });
                true
            }
        });
    }

    /// Whether all conditions are met.
    pub fn is_ready(&self) -> bool {
        self.conditions.borrow().iter().all(|c| c.missing.is_none())
    }

    /// What is missing, as one line: `certificate: no answer from istiod:15012; listeners: not there yet`. Empty when ready.
    pub fn missing(&self) -> String {
        let conditions = self.conditions.borrow();
        let missing =
            conditions.iter().filter_map(|c| c.missing.as_ref().map(|reason| format!("{}: {reason}", c.name)));
        missing.collect::<Vec<_>>().join("; ")
    }

    /// Waits until all conditions are met.
    pub async fn wait(&self) {
        let mut changes = self.conditions.subscribe();
        // Fails only when the sender is gone, and we hold it.
        let _ = changes.wait_for(|conditions| conditions.iter().all(|c| c.missing.is_none())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_what_is_missing_until_nothing_is() {
        let readiness = Readiness::new(&["certificate", "listeners"]);
        readiness.unmet("certificate", "no answer");
        assert_eq!(readiness.missing(), "certificate: no answer; listeners: not there yet");
        readiness.met("certificate");
        assert!(!readiness.is_ready());
        readiness.met("listeners");
        readiness.wait().await;
        assert!(readiness.is_ready() && readiness.missing().is_empty());
    }
}
