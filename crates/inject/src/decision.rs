//! Whether a pod is injected, and which rule says so.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::status::{INJECT, REVISION, annotation, label};

/// A namespace as injection sees it.
#[derive(Clone, Debug, Default)]
pub struct NamespaceMeta {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

/// What is done where neither pod nor selectors say anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    #[default]
    Enabled,
    Disabled,
    /// Neither word: then nothing is ever injected.
    Illegal,
}

/// The rule that decided; its `Display` is one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    HostNetwork,
    SystemNamespace(String),
    /// Label or annotation of the pod.
    Pod {
        what: &'static str,
        value: String,
    },
    NeverSelector(String),
    AlwaysSelector(String),
    Policy(Policy),
    /// The webhook is not called for this namespace and pod.
    NotSelected(String),
    /// The webhook is called because of this.
    Selected(String),
}

/// The answer and what the user should know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub inject: bool,
    pub rule: Rule,
    pub warnings: Vec<String>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostNetwork => write!(f, "the pod has hostNetwork: true, and redirection would change the node"),
            Self::SystemNamespace(name) => write!(f, "namespace {name} is never injected"),
            Self::Pod { what, value } => write!(f, "the pod's {what} {INJECT} is {value:?}"),
            Self::NeverSelector(selector) => write!(f, "the pod's labels match neverInjectSelector {selector}"),
            Self::AlwaysSelector(selector) => write!(f, "the pod's labels match alwaysInjectSelector {selector}"),
            Self::Policy(Policy::Enabled) => write!(f, "the policy is enabled and nothing opts out"),
            Self::Policy(Policy::Disabled) => write!(f, "the policy is disabled and nothing opts in"),
            Self::Policy(Policy::Illegal) => write!(f, "the policy is neither enabled nor disabled"),
            Self::NotSelected(why) | Self::Selected(why) => f.write_str(why),
        }
    }
}

/// Namespaces whose pods are never injected.
const SYSTEM: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "local-path-storage"];

/// Selectors and policy of a configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    pub(crate) policy: Policy,
    /// Label selectors as in the API.
    pub(crate) never: Vec<Value>,
    pub(crate) always: Vec<Value>,
}

/// As `injectRequired`.
pub(crate) fn decide(pod: &Value, namespace: &str, selection: &Selection) -> Decision {
    let mut warnings = Vec::new();
    let done = |inject, rule, warnings| Decision { inject, rule, warnings };
    if pod["spec"]["hostNetwork"] == true {
        return done(false, Rule::HostNetwork, warnings);
    }
    if SYSTEM.contains(&namespace) {
        return done(false, Rule::SystemNamespace(namespace.to_owned()), warnings);
    }
    let (what, value) = match label(pod, INJECT) {
        Some(value) => ("label", value),
        None => ("annotation", annotation(pod, INJECT).unwrap_or_default()),
    };
    // A policy that is neither word switches everything off, even what a pod asks for.
    if selection.policy == Policy::Illegal {
        return done(false, Rule::Policy(Policy::Illegal), warnings);
    }
    match value {
        "true" | "false" => {
            let rule = Rule::Pod { what, value: value.to_owned() };
            return done(value == "true", rule, warnings);
        }
        "" => {}
        other => warnings.push(format!(
            "invalid value for {INJECT}: {other:?}; only 'true' and 'false' are accepted, the default policy applies"
        )),
    }
    for (selectors, inject) in [(&selection.never, false), (&selection.always, true)] {
        for selector in selectors {
            match matches(selector, pod) {
                Ok(true) => {
                    let text = selector.to_string();
                    let rule = if inject { Rule::AlwaysSelector(text) } else { Rule::NeverSelector(text) };
                    return done(inject, rule, warnings);
                }
                Ok(false) => {}
                Err(message) => warnings.push(format!("invalid selector {selector}: {message}; it is skipped")),
            }
        }
    }
    done(selection.policy == Policy::Enabled, Rule::Policy(selection.policy), warnings)
}

/// Whether the API server would call the webhook of this revision at all, by the labels of namespace
/// and pod. As the selectors of Istio's MutatingWebhookConfiguration.
pub fn selected(namespace: &NamespaceMeta, pod: &Value, revision: &str, unlabelled: bool) -> Decision {
    let answer = |inject, why: String| Decision {
        inject,
        rule: if inject { Rule::Selected(why) } else { Rule::NotSelected(why) },
        warnings: Vec::new(),
    };
    let revision = if revision.is_empty() { "default" } else { revision };
    let default = revision == "default";
    let name = &namespace.name;
    let wanted = label(pod, INJECT);
    match (namespace.labels.get("istio-injection").map(String::as_str), namespace.labels.get(REVISION)) {
        (Some("enabled"), _) if default && wanted != Some("false") => {
            answer(true, format!("namespace {name} has the label istio-injection=enabled"))
        }
        (Some("enabled"), _) if default => answer(false, format!("the pod has the label {INJECT}=false")),
        (Some("enabled"), _) => answer(
            false,
            format!("namespace {name} has istio-injection=enabled, which selects the revision default, not {revision}"),
        ),
        (Some(other), _) => answer(false, format!("namespace {name} has the label istio-injection={other}")),
        (None, Some(label)) if label == revision && wanted != Some("false") => {
            answer(true, format!("namespace {name} has the label {REVISION}={label}"))
        }
        (None, Some(label)) if label == revision => answer(false, format!("the pod has the label {INJECT}=false")),
        (None, Some(label)) => {
            answer(false, format!("namespace {name} has the label {REVISION}={label}, this is revision {revision}"))
        }
        (None, None) => {
            let own = label(pod, REVISION);
            if own == Some(revision) && wanted != Some("false") {
                answer(true, format!("the pod has the label {REVISION}={revision}"))
            } else if default && wanted == Some("true") && own.is_none() {
                answer(true, format!("the pod has the label {INJECT}=true"))
            } else if default && unlabelled && wanted != Some("false") && !SYSTEM.contains(&name.as_str()) {
                answer(true, "namespaces without labels are injected here".to_owned())
            } else {
                answer(false, format!("neither namespace {name} nor the pod has a label that asks for injection"))
            }
        }
    }
}

/// A label selector of the API against the pod's labels. An empty selector matches nothing here.
fn matches(selector: &Value, pod: &Value) -> Result<bool, String> {
    let mut any = false;
    if let Some(labels) = selector["matchLabels"].as_object() {
        for (name, value) in labels {
            any = true;
            if label(pod, name) != value.as_str() {
                return Ok(false);
            }
        }
    }
    let mut all = true;
    for expression in selector["matchExpressions"].as_array().map(Vec::as_slice).unwrap_or_default() {
        any = true;
        let name = expression["key"].as_str().filter(|name| !name.is_empty()).ok_or("an expression has no key")?;
        let values: Vec<&str> =
            expression["values"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let found = label(pod, name);
        let operator = expression["operator"].as_str().unwrap_or_default();
        if matches!(operator, "In" | "NotIn") && values.is_empty() {
            return Err(format!("values must not be empty for {operator}"));
        }
        if matches!(operator, "Exists" | "DoesNotExist") && !values.is_empty() {
            return Err(format!("values must be empty for {operator}"));
        }
        all &= match operator {
            "In" => found.is_some_and(|found| values.contains(&found)),
            "NotIn" => found.is_none_or(|found| !values.contains(&found)),
            "Exists" => found.is_some(),
            "DoesNotExist" => found.is_none(),
            other => return Err(format!("{other:?} is not an operator")),
        };
    }
    Ok(any && all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(labels: Value) -> Value {
        json!({"metadata": {"labels": labels}, "spec": {}})
    }

    #[test]
    fn pods_opt_in_and_out() {
        let selection = Selection::default();
        assert!(decide(&pod(json!({})), "default", &selection).inject);
        assert!(!decide(&pod(json!({INJECT: "false"})), "default", &selection).inject);
        assert!(!decide(&pod(json!({})), "kube-system", &selection).inject);
        let odd = decide(&pod(json!({INJECT: "yes"})), "default", &selection);
        assert!(odd.inject && odd.warnings.len() == 1);
        let off = Selection { policy: Policy::Illegal, ..Selection::default() };
        assert!(!decide(&pod(json!({INJECT: "true"})), "default", &off).inject);
    }

    #[test]
    fn selectors() {
        let selection = Selection {
            policy: Policy::Disabled,
            never: vec![json!({}), json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]})],
            always: vec![json!({"matchLabels": {"b": "1"}})],
        };
        assert!(!decide(&pod(json!({})), "x", &selection).inject);
        assert!(decide(&pod(json!({"b": "1"})), "x", &selection).inject);
        let never = decide(&pod(json!({"a": "", "b": "1"})), "x", &selection);
        assert!(matches!(never.rule, Rule::NeverSelector(_)));
    }

    #[test]
    fn namespaces_are_selected_by_labels() {
        let namespace = |labels: &[(&str, &str)]| NamespaceMeta {
            name: "n".to_owned(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            annotations: BTreeMap::new(),
        };
        let plain = pod(json!({}));
        assert!(selected(&namespace(&[("istio-injection", "enabled")]), &plain, "default", false).inject);
        assert!(
            !selected(&namespace(&[("istio-injection", "disabled"), (REVISION, "default")]), &plain, "default", false)
                .inject
        );
        assert!(selected(&namespace(&[(REVISION, "canary")]), &plain, "canary", false).inject);
        assert!(!selected(&namespace(&[]), &plain, "default", false).inject);
        assert!(selected(&namespace(&[]), &plain, "default", true).inject);
        assert!(selected(&namespace(&[]), &pod(json!({INJECT: "true"})), "default", false).inject);
    }
}
