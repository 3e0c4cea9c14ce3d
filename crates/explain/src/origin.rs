//! From what generated configuration carries (Istio's metadata, policies' names) back to the objects.

use config_store::{Key, Kind};
use proxy_core::Metadata;
use serde_json::Value;

use crate::mesh::Mesh;
use crate::trace::Source;

/// The object that a resource's `istio` metadata names, and the field if it says so.
pub(crate) fn of_metadata(metadata: &Metadata, mesh: Option<&Mesh>) -> Option<Source> {
    let text = |key: &str| metadata.get("istio", &[key]).and_then(Value::as_str);
    let key = of_path(text("config")?)?;
    Some(at(&key, text("origin").unwrap_or_default(), mesh))
}

/// The object that a resource's `istio` metadata names.
pub(crate) fn key_of_metadata(metadata: &Metadata) -> Option<Key> {
    of_path(metadata.get("istio", &["config"]).and_then(Value::as_str)?)
}

/// The object behind a policy's name in RBAC rules, `ns[NAMESPACE]-policy[NAME]-rule[N]`.
pub(crate) fn of_policy(name: &str, mesh: Option<&Mesh>) -> Option<Source> {
    let (_, rest) = name.split_once("ns[")?;
    let (namespace, rest) = rest.split_once("]-policy[")?;
    let (policy, rest) = rest.split_once("]-rule[")?;
    let rule = rest.split_once(']')?.0;
    Some(at(&Key::new(Kind::AuthorizationPolicy, namespace, policy), &format!("spec.rules[{rule}]"), mesh))
}

pub(crate) fn at(key: &Key, field: &str, mesh: Option<&Mesh>) -> Source {
    match mesh {
        Some(mesh) => mesh.source(key, field),
        None => Source { object: key.to_string(), field: field.to_owned(), place: String::new() },
    }
}

/// `/apis/networking.istio.io/v1/namespaces/default/virtual-service/reviews`.
fn of_path(path: &str) -> Option<Key> {
    let parts: Vec<&str> = path.split('/').collect();
    let ["", "apis", group, _, "namespaces", namespace, kind, name] = parts[..] else { return None };
    let camel: String = kind
        .split('-')
        .map(|word| {
            word.chars().take(1).map(|c| c.to_ascii_uppercase()).chain(word.chars().skip(1)).collect::<String>()
        })
        .collect();
    Some(Key::new(Kind::of(group, &camel)?, namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_by_what_istio_writes_into_resources() {
        let key = of_path("/apis/networking.istio.io/v1/namespaces/a/destination-rule/b").unwrap();
        assert_eq!(key, Key::new(Kind::DestinationRule, "a", "b"));
        let source = of_policy("istio-ext-authz-ns[a]-policy[b]-rule[2]", None).unwrap();
        assert_eq!((source.object.as_str(), source.field.as_str()), ("AuthorizationPolicy a/b", "spec.rules[2]"));
        assert_eq!(of_policy("none", None), None);
    }
}
