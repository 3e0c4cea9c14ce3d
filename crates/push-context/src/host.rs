//! Host names in configuration: exact, or wildcards such as `*.example.com` and `*`.
//!
//! As istio `pkg/config/host/name.go`; plain text, because services keep whatever name users wrote.

use std::collections::BTreeMap;

use mesh_types::ArcStr;

/// Whether the name starts with `*`.
pub fn is_wildcard(name: &str) -> bool {
    name.starts_with('*')
}

/// Whether two names have a host in common.
pub fn matches(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(a), Some(b)) => {
            if a.len() < b.len() {
                b.ends_with(a)
            } else {
                a.ends_with(b)
            }
        }
        (Some(a), None) => b.ends_with(a),
        (None, Some(b)) => a.ends_with(b),
        (None, None) => a == b,
    }
}

/// Whether every host that `a` means is also meant by `b`.
pub fn is_subset(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(a), Some(b)) => a.len() >= b.len() && a.ends_with(b),
        (Some(_), None) => false,
        (None, Some(b)) => a.ends_with(b),
        (None, None) => a == b,
    }
}

/// A short name in a rule means a service of the rule's namespace (istiod `ResolveShortnameToFQDN`).
pub fn resolve(name: &str, namespace: &str, domain: &str) -> String {
    if name.is_empty() || name.contains('.') || is_wildcard(name) {
        return name.to_owned();
    }
    format!("{name}.{namespace}.svc.{domain}")
}

/// The entry whose name fits `needle` most closely (istiod `MostSpecificHostMatch`): itself, else the
/// longest wildcard around it.
pub fn most_specific<'a, V>(
    needle: &str,
    exact: &'a BTreeMap<ArcStr, V>,
    wildcards: &'a BTreeMap<ArcStr, V>,
) -> Option<(&'a ArcStr, &'a V)> {
    let own = if is_wildcard(needle) { wildcards } else { exact };
    own.get_key_value(needle).or_else(|| {
        let around = wildcards.iter().filter(|(name, _)| is_subset(needle, name));
        // Of equally long ones the first in the alphabet.
        around.max_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then(b.cmp(a)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_and_contain_by_suffix() {
        assert!(matches("*.com", "*.example.com") && matches("*.example.com", "*.com"));
        assert!(matches("a.com", "*.com") && !matches("a.com", "*.org"));
        assert!(is_subset("*.example.com", "*.com") && !is_subset("*.com", "*.example.com"));
        assert!(is_subset("a.b", "*") && !is_subset("*", "a.b"));
    }

    #[test]
    fn the_longest_wildcard_is_most_specific() {
        let exact = BTreeMap::from([("a.prod.svc".into(), 1)]);
        let wild = BTreeMap::from([("*".into(), 2), ("*.svc".into(), 3), ("*.prod.svc".into(), 4)]);
        let find = |name| most_specific(name, &exact, &wild).map(|(_, v)| *v);
        assert_eq!(find("a.prod.svc"), Some(1));
        assert_eq!(find("b.prod.svc"), Some(4));
        assert_eq!(find("b.test.svc"), Some(3));
        assert_eq!(find("example.com"), Some(2));
        assert_eq!(find("*.svc"), Some(3));
    }

    #[test]
    fn short_names_are_of_the_rules_namespace() {
        assert_eq!(resolve("reviews", "prod", "cluster.local"), "reviews.prod.svc.cluster.local");
        assert_eq!(resolve("a.b", "prod", "cluster.local"), "a.b");
        assert_eq!(resolve("*", "prod", "cluster.local"), "*");
    }
}
