//! VirtualServices: short names resolved, delegates merged in, indexed by who may see them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config_store::{Body, Kind, Snapshot};
use istio_api::MeshConfig;
use istio_api::virtual_service::{HttpMatchRequest, HttpRoute, StringMatch, VirtualService};
use mesh_types::ArcStr;
use registry::Settings;

use crate::{Config, PushContext, host, mesh_route};

/// A merged VirtualService.
type Merged = Arc<Config<VirtualService>>;

/// The name under which sidecars, as opposed to gateways, appear in `gateways`.
const MESH: &str = "mesh";

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Index {
    /// Of sidecars, by namespace: exported only to its own.
    private: BTreeMap<ArcStr, Vec<Merged>>,
    /// Of sidecars, by namespace that it is exported to.
    exported: BTreeMap<ArcStr, Vec<Merged>>,
    /// Of sidecars, exported to all.
    public: Vec<Merged>,
    /// Any of them routes connections, not only requests.
    pub(crate) has_l4: bool,
}

fn export_to(spec: &VirtualService, namespace: &str, mesh: &MeshConfig) -> BTreeSet<String> {
    let list = if spec.export_to.is_empty() { &mesh.default_virtual_service_export_to } else { &spec.export_to };
    if list.is_empty() {
        return BTreeSet::from(["*".to_owned()]);
    }
    list.iter().map(|to| if to == "." { namespace.to_owned() } else { to.clone() }).collect()
}

impl Index {
    pub(crate) fn build(snapshot: &Snapshot, mesh: &MeshConfig, settings: &Settings) -> Index {
        let all: Vec<Config<VirtualService>> = snapshot
            .list(Kind::VirtualService)
            .filter_map(|object| match &object.body {
                Body::VirtualService(spec) => Some(Config::of(object, (**spec).clone())),
                _ => None,
            })
            .map(|mut config| {
                resolve_names(&mut config.spec, &config.namespace, &settings.domain);
                config
            })
            .collect();
        let delegates: BTreeMap<(&str, &str), &Config<VirtualService>> =
            all.iter().filter(|c| c.spec.hosts.is_empty()).map(|c| ((&*c.namespace, &*c.name), c)).collect();
        let mut index = Index::default();
        for config in all.iter().filter(|c| !c.spec.hosts.is_empty()) {
            if !config.spec.gateways.is_empty() && !config.spec.gateways.iter().any(|g| g == MESH) {
                continue;
            }
            let mut merged = config.clone();
            merge_delegates(&mut merged, &delegates, mesh);
            index.has_l4 |= !merged.spec.tcp.is_empty() || !merged.spec.tls.is_empty();
            index.add(merged, mesh);
        }
        for config in mesh_route::virtual_services(snapshot, settings) {
            index.add(config, mesh);
        }
        index
    }

    fn add(&mut self, config: Config<VirtualService>, mesh: &MeshConfig) {
        let audience = export_to(&config.spec, &config.namespace, mesh);
        let config = Arc::new(config);
        if audience.contains("*") {
            self.public.push(config);
        } else if !audience.contains("~") {
            for to in audience {
                let map = if *to == *config.namespace { &mut self.private } else { &mut self.exported };
                map.entry(to.into()).or_default().push(config.clone());
            }
        }
    }
}

impl PushContext {
    /// VirtualServices for sidecars that one namespace may see: its private ones, those exported to it, the
    /// public ones; each group by age, but its own routes of the Gateway API first: a consumer's win over the
    /// producer's.
    pub(crate) fn virtual_services<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Merged> {
        let index = &self.rules.virtual_services;
        let private = index.private.get(namespace).map_or(&[][..], Vec::as_slice);
        let exported = index.exported.get(namespace).map_or(&[][..], Vec::as_slice);
        let first = self.settings.unified_scope;
        let own = move |rule: &&Merged| first && rule.is_gateway_api() && *rule.namespace == *namespace;
        [private, exported, &index.public]
            .into_iter()
            .flat_map(move |group| group.iter().filter(own).chain(group.iter().filter(move |rule| !own(rule))))
    }
}

/// istiod `ResolveVirtualServiceShortnames`.
fn resolve_names(spec: &mut VirtualService, namespace: &str, domain: &str) {
    let resolve = |name: &mut String| *name = host::resolve(name, namespace, domain);
    spec.hosts.iter_mut().for_each(resolve);
    for route in &mut spec.http {
        let destinations = route.route.iter_mut().filter_map(|r| r.destination.as_mut());
        let mirrors = route.mirrors.iter_mut().filter_map(|m| m.destination.as_mut());
        destinations.chain(&mut route.mirror).chain(mirrors).for_each(|d| resolve(&mut d.host));
    }
    let tcp = spec.tcp.iter_mut().flat_map(|r| &mut r.route);
    let tls = spec.tls.iter_mut().flat_map(|r| &mut r.route);
    tcp.chain(tls).filter_map(|r| r.destination.as_mut()).for_each(|d| resolve(&mut d.host));
}

fn merge_delegates(
    root: &mut Config<VirtualService>,
    delegates: &BTreeMap<(&str, &str), &Config<VirtualService>>,
    mesh: &MeshConfig,
) {
    if !root.spec.http.iter().any(|route| route.delegate.is_some()) {
        return;
    }
    let mut out = Vec::new();
    for mut route in std::mem::take(&mut root.spec.http) {
        let Some(delegate) = route.delegate.take() else {
            out.push(route);
            continue;
        };
        let namespace = if delegate.namespace.is_empty() { &*root.namespace } else { &delegate.namespace };
        let Some(found) = delegates.get(&(namespace, delegate.name.as_str())) else {
            tracing::warn!(root = %root.name, namespace, name = delegate.name, "delegate VirtualService not found");
            continue;
        };
        let audience = export_to(&found.spec, &found.namespace, mesh);
        if !audience.contains("*") && !audience.contains(&*root.namespace) {
            tracing::warn!(root = %root.name, namespace, name = delegate.name, "delegate VirtualService is not exported");
            continue;
        }
        out.extend(found.spec.http.iter().filter_map(|sub| merge_route(&route, sub.clone())));
    }
    root.spec.http = out;
}

/// The delegate's route under the root's; nothing if their matches exclude each other.
fn merge_route(root: &HttpRoute, mut route: HttpRoute) -> Option<HttpRoute> {
    route.r#match = merge_matches(&root.r#match, &route.r#match)?;
    if route.name.is_empty() {
        route.name.clone_from(&root.name);
    } else if !root.name.is_empty() {
        route.name = format!("{}-{}", root.name, route.name);
    }
    macro_rules! inherit {
        ($($field:ident)*) => { $( if route.$field.is_none() { route.$field.clone_from(&root.$field); } )* };
    }
    inherit!(rewrite direct_response timeout retries fault mirror mirror_percent mirror_percentage cors_policy headers);
    if route.mirrors.is_empty() {
        route.mirrors.clone_from(&root.mirrors);
    }
    Some(route)
}

fn merge_matches(root: &[HttpMatchRequest], sub: &[HttpMatchRequest]) -> Option<Vec<HttpMatchRequest>> {
    if root.is_empty() {
        return Some(sub.to_vec());
    }
    if sub.is_empty() {
        return Some(root.to_vec());
    }
    let mut out = Vec::new();
    for leaf in sub {
        let before = out.len();
        out.extend(root.iter().filter(|root| !conflict(root, leaf)).map(|root| merge_match(root, leaf)));
        if out.len() == before {
            return None;
        }
    }
    Some(out)
}

fn merge_match(root: &HttpMatchRequest, leaf: &HttpMatchRequest) -> HttpMatchRequest {
    fn both<V: Clone>(root: &BTreeMap<String, V>, leaf: &BTreeMap<String, V>) -> BTreeMap<String, V> {
        root.iter().chain(leaf).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
    let mut out = leaf.clone();
    if out.name.is_empty() {
        out.name.clone_from(&root.name);
    } else if !root.name.is_empty() {
        out.name = format!("{}-{}", root.name, out.name);
    }
    macro_rules! inherit {
        ($($field:ident)*) => { $( if out.$field.is_none() { out.$field.clone_from(&root.$field); } )* };
    }
    inherit!(uri scheme method authority);
    out.headers = both(&root.headers, &leaf.headers);
    out.without_headers = both(&root.without_headers, &leaf.without_headers);
    out.query_params = both(&root.query_params, &leaf.query_params);
    out.source_labels = both(&root.source_labels, &leaf.source_labels);
    if out.port == 0 {
        out.port = root.port;
    }
    if out.source_namespace.is_empty() {
        out.source_namespace.clone_from(&root.source_namespace);
    }
    if out.gateways.is_empty() {
        out.gateways.clone_from(&root.gateways);
    }
    if out.stat_prefix.is_empty() {
        out.stat_prefix.clone_from(&root.stat_prefix);
    }
    out
}

/// istiod `hasConflict`: whether no request can fit both, as far as istiod can tell.
fn conflict(root: &HttpMatchRequest, leaf: &HttpMatchRequest) -> bool {
    type Strings = BTreeMap<String, StringMatch>;
    let map_conflict =
        |root: &Strings, leaf: &Strings| leaf.iter().any(|(key, value)| string_conflict(root.get(key), Some(value)));
    string_conflict(root.uri.as_ref(), leaf.uri.as_ref())
        || string_conflict(root.scheme.as_ref(), leaf.scheme.as_ref())
        || string_conflict(root.method.as_ref(), leaf.method.as_ref())
        || string_conflict(root.authority.as_ref(), leaf.authority.as_ref())
        || map_conflict(&root.headers, &leaf.headers)
        || map_conflict(&root.without_headers, &leaf.without_headers)
        || map_conflict(&root.query_params, &leaf.query_params)
        || root.ignore_uri_case != leaf.ignore_uri_case
        || (root.port > 0 && leaf.port > 0 && root.port != leaf.port)
        || (!root.source_namespace.is_empty() && leaf.source_namespace != root.source_namespace)
        || leaf.source_labels.iter().any(|(k, v)| root.source_labels.get(k).is_some_and(|r| r != v))
        || (!root.gateways.is_empty() && leaf.gateways.iter().any(|g| !root.gateways.contains(g)))
}

fn string_conflict(root: Option<&StringMatch>, leaf: Option<&StringMatch>) -> bool {
    let (Some(root), Some(leaf)) = (root, leaf) else { return false };
    fn set(value: &Option<String>) -> Option<&str> {
        value.as_deref().filter(|v| !v.is_empty())
    }
    let any = |m: &StringMatch| set(&m.exact).or(set(&m.prefix)).or(set(&m.regex)).is_some();
    if (set(&root.regex).is_some() && any(leaf)) || (set(&leaf.regex).is_some() && any(root)) {
        return true;
    }
    if let Some(exact) = set(&root.exact) {
        return set(&leaf.prefix).is_some() || set(&leaf.exact) != Some(exact);
    }
    match (set(&root.prefix), set(&leaf.prefix).or(set(&leaf.exact))) {
        (Some(prefix), Some(text)) => !text.starts_with(prefix),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(exact: &str, prefix: &str) -> HttpMatchRequest {
        let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let uri = StringMatch { exact: some(exact), prefix: some(prefix), ..StringMatch::default() };
        HttpMatchRequest { uri: Some(uri), ..HttpMatchRequest::default() }
    }

    #[test]
    fn a_delegate_must_lie_under_its_root() {
        let root = [uri("", "/a")];
        assert_eq!(merge_matches(&root, &[uri("/a/x", "")]).unwrap(), [uri("/a/x", "")]);
        assert_eq!(merge_matches(&root, &[uri("/b", "")]), None);
        assert_eq!(merge_matches(&root, &[]).unwrap(), root);
    }
}
