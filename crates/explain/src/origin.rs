//! From what generated configuration carries (Istio's metadata, policies' names) back to the objects.

use config_store::{Body, Key, Kind};
use proxy_core::{Metadata, Rejected};
use push_context::Node;
use serde_json::Value;

use crate::Files;
use crate::mesh::{self, Mesh, Pod};
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

/// The object that a route is from, and the entry in it, `spec.http[1]`.
pub(crate) fn of_route(metadata: &Metadata) -> Option<(Key, String)> {
    let mut field = metadata.get("istio", &["origin"]).and_then(Value::as_str)?.to_owned();
    if let Some(at) = field.find(".match") {
        field.truncate(at);
    }
    Some((key_of_metadata(metadata)?, field))
}

/// The object behind a policy's name in RBAC rules, `ns[NAMESPACE]-policy[NAME]-rule[N]`.
pub(crate) fn of_policy(name: &str, mesh: Option<&Mesh>) -> Option<Source> {
    let (_, rest) = name.split_once("ns[")?;
    let (namespace, rest) = rest.split_once("]-policy[")?;
    let (policy, rest) = rest.split_once("]-rule[")?;
    let rule = rest.split_once(']')?.0;
    let (key, field) = (Key::new(Kind::AuthorizationPolicy, namespace, policy), format!("spec.rules[{rule}]"));
    // istiod makes up a rule, which nothing fulfils, of a policy that has none.
    let is_made_up = mesh.is_some_and(|mesh| mesh.files.written(&key, &field).is_none());
    Some(at(&key, if is_made_up { "spec" } else { &field }, mesh))
}

/// The field of an object that makes a pod's proxy refuse a resource, as far as the refusal's text tells: tokens' issuers are numbered
/// in their order (`xds-gen`, jwt.rs), clusters are named for a service.
pub(crate) fn of_refusal(text: &str, files: &Files, node: &Node) -> Option<Source> {
    let push = &files.push;
    if let Some((_, rest)) = text.split_once("origins-") {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: usize = rest[..digits].parse().ok()?;
        let policies = push.request_authentications(&node.namespace, &node.labels);
        let mut rules: Vec<_> = policies
            .iter()
            .flat_map(|policy| policy.spec.jwt_rules.iter().enumerate().map(move |(index, rule)| (policy, index, rule)))
            .collect();
        rules.sort_by(|a, b| a.2.issuer.cmp(&b.2.issuer));
        let (policy, index, _) = rules.get(number)?;
        let key = Key::new(Kind::RequestAuthentication, &policy.namespace, &policy.name);
        let rule = format!("spec.jwtRules[{index}]");
        let keys = files.written(&key, &format!("{rule}.jwks")).filter(|_| text.contains("jwks"));
        return Some(keys.unwrap_or_else(|| files.source(&key, &rule)));
    }
    let (_, rest) = text.split_once("outbound|")?;
    let host = rest.splitn(3, '|').nth(2)?.split(':').next()?;
    let scope = push.scope(node);
    let rule = scope.destination_rule(node, host, true)?;
    Some(files.source(&Key::new(Kind::DestinationRule, &rule.namespace, &rule.name), "spec.trafficPolicy"))
}

/// The field of an object that makes the proxy of a pod, `NAME.NAMESPACE`, refuse what it is sent, as far as its words tell.
pub fn blame(files: &Files, proxy: &str, text: &str) -> Option<Source> {
    let (name, namespace) = proxy.rsplit_once('.')?;
    let object = files.snapshot.get(&Key::new(Kind::Pod, namespace, name))?;
    let Body::Pod(pod) = &object.body else { return None };
    let pod = mesh::pod_of(object, &serde_json::to_value(pod).ok()?, files, files.push.trust_domain())?;
    of_refusal(text, files, &pod.node)
}

/// A refusal as a verdict.
pub(crate) fn refused(error: &Rejected, of: Option<(&Mesh, &Pod)>) -> String {
    let source = of.and_then(|(mesh, pod)| of_refusal(&error.to_string(), &mesh.files, &pod.node));
    let because = source.map_or_else(String::new, |source| format!(" because of {source}"));
    format!("the proxy refuses {}{because}: {} (one that runs keeps what it had)", error.resource, error.reason)
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
