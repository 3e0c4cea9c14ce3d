//! EnvoyFilters: patches over generated resources (istiod `core/envoyfilter`).

mod cluster;
mod listener;
mod route;

use envoy_api::cluster::Cluster;
use envoy_api::core::TypedExtensionConfig;
use envoy_api::listener::Listener;
use envoy_api::route::RouteConfiguration;
use envoy_api::{Any, Message, Name, json};
use istio_api::envoy_filter::{
    ApplyTo, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, Operation, PatchContext, ProxyMatch,
};
use regex_automata::meta::Regex;

use crate::context::Context;

/// Direction of what is patched.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Inbound,
    Outbound,
}

/// One patch that holds for the proxy, its value encoded.
struct Patch {
    apply_to: ApplyTo,
    operation: Operation,
    matching: EnvoyConfigObjectMatch,
    value: Vec<u8>,
}

/// The patches for one proxy, in the order they are applied.
pub(crate) struct Patches(Vec<Patch>);

impl Patch {
    /// Nothing for patches of other proxies and for values that are no such message.
    fn read(cx: &Context<'_>, from: &EnvoyConfigObjectPatch) -> Option<Patch> {
        let patch = from.patch.as_ref()?;
        let matching = from.r#match.clone().unwrap_or_default();
        if from.apply_to == ApplyTo::Bootstrap || !matching.proxy.as_ref().is_none_or(|p| fits_proxy(cx, p)) {
            return None;
        }
        let inserts =
            matches!(patch.operation, Operation::InsertAfter | Operation::InsertBefore | Operation::InsertFirst);
        let has_order = matches!(
            from.apply_to,
            ApplyTo::HttpFilter | ApplyTo::NetworkFilter | ApplyTo::HttpRoute | ApplyTo::ListenerFilter
        );
        let value = match &patch.value {
            Some(value) => config_store::patch_value(from.apply_to, value).ok()?,
            None => Vec::new(),
        };
        Some(Patch {
            apply_to: from.apply_to,
            operation: if inserts && !has_order { Operation::Add } else { patch.operation },
            matching,
            value,
        })
    }

    fn is_for(&self, side: Side) -> bool {
        match self.matching.context {
            PatchContext::Any => true,
            PatchContext::SidecarInbound => side == Side::Inbound,
            PatchContext::SidecarOutbound => side == Side::Outbound,
            PatchContext::Gateway | PatchContext::Waypoint => false,
        }
    }

    /// Whether a whole new resource is added on this side: those for any context once, outbound.
    fn adds_on(&self, side: Side) -> bool {
        let once = self.matching.context != PatchContext::Any || side == Side::Outbound;
        self.operation == Operation::Add && self.is_for(side) && once
    }

    fn merges(&self) -> bool {
        matches!(self.operation, Operation::Merge | Operation::MergeAndReplaceList)
    }

    fn value<M: Message + Default>(&self) -> M {
        M::decode(self.value.as_slice()).unwrap_or_default()
    }

    /// Lays the value over a message of its type.
    fn merge_into<M: Message + Name + Default>(&self, base: &mut M) {
        merge_bytes(base, &self.value, self.operation == Operation::MergeAndReplaceList);
    }
}

fn merge_bytes<M: Message + Name + Default>(base: &mut M, over: &[u8], replace_lists: bool) {
    let merged = json::merge(&M::full_name(), &base.encode_to_vec(), over, replace_lists);
    if let Some(merged) = merged.ok().and_then(|bytes| M::decode(bytes.as_slice()).ok()) {
        *base = merged;
    }
}

/// A patch laid over a message of another type.
///
/// istiod panics there and recovers around the whole group it is patching (one cluster, one of the virtual listeners,
/// all other listeners of a side): what was patched before stays patched, everything after is left as it was made.
#[derive(Debug)]
struct OtherType;

/// Merges two packed messages. What cannot be read stays as it is.
fn merge_any(base: &mut Any, over: &Any) -> Result<(), OtherType> {
    let name = |any: &Any| any.type_url.rsplit('/').next().unwrap_or_default().to_owned();
    if name(base) != name(over) {
        return Err(OtherType);
    }
    if let Ok(merged) = json::merge(&base.type_url, &base.value, &over.value, false) {
        base.value = merged;
    }
    Ok(())
}

fn fits_proxy(cx: &Context<'_>, wanted: &ProxyMatch) -> bool {
    let version = cx.node.meta("ISTIO_VERSION").unwrap_or_default();
    let fits_version = || {
        // A pattern that is none matches nothing; the engine needs linear time, and the pattern is bounded.
        wanted.proxy_version.len() <= 1024
            && !version.is_empty()
            && Regex::new(&wanted.proxy_version).is_ok_and(|regex| regex.is_match(version))
    };
    (wanted.proxy_version.is_empty() || fits_version())
        && wanted.metadata.iter().all(|(key, value)| cx.node.metadata.get(key) == Some(value))
}

impl Patches {
    pub(crate) fn of(cx: &Context<'_>) -> Patches {
        let filters = cx.push.envoy_filters(&cx.node.namespace, &cx.node.labels);
        Patches(filters.iter().flat_map(|f| &f.spec.config_patches).filter_map(|p| Patch::read(cx, p)).collect())
    }

    fn to(&self, apply_to: ApplyTo, side: Side) -> impl Iterator<Item = &Patch> {
        self.0.iter().filter(move |p| p.apply_to == apply_to && p.is_for(side))
    }

    pub(crate) fn clusters(&self, cx: &Context<'_>, clusters: Vec<Cluster>) -> Vec<Cluster> {
        if self.0.is_empty() { clusters } else { cluster::patch(cx, self, clusters) }
    }

    pub(crate) fn listeners(&self, listeners: Vec<Listener>) -> Vec<Listener> {
        if self.0.is_empty() { listeners } else { listener::patch(self, listeners) }
    }

    /// Filter configurations that are asked for by name.
    pub(crate) fn extensions(&self, wanted: impl Fn(&str) -> bool) -> Vec<TypedExtensionConfig> {
        let added = self.0.iter().filter(|p| p.apply_to == ApplyTo::ExtensionConfig && p.operation == Operation::Add);
        added.map(Patch::value).filter(|c: &TypedExtensionConfig| wanted(&c.name)).collect()
    }

    pub(crate) fn route(&self, mut config: RouteConfiguration) -> RouteConfiguration {
        if !self.0.is_empty() {
            route::patch(self, Side::Outbound, &mut config);
        }
        config
    }
}

/// What a patch does to a list of filters, merging apart; `wanted` is the name of the filter that it is about, if it says one.
fn edit<T: Message + Default>(list: &mut Vec<T>, patch: &Patch, wanted: Option<&str>, name: fn(&T) -> &str) {
    let named = |item: &T| wanted.is_some_and(|wanted| wanted == name(item));
    match patch.operation {
        Operation::Add => list.push(patch.value()),
        Operation::InsertFirst => list.insert(0, patch.value()),
        Operation::InsertAfter | Operation::InsertBefore => {
            insert(list, patch.operation, wanted.is_some(), named, patch.value());
        }
        Operation::Replace => {
            if let Some(own) = list.iter_mut().find(|item| named(item)) {
                *own = patch.value();
            }
        }
        Operation::Remove => list.retain(|item| !named(item)),
        _ => {}
    }
}

/// Puts an item before or after the first that fits. Without anything to fit it goes to the front or the end.
fn insert<T>(list: &mut Vec<T>, operation: Operation, has_match: bool, fits: impl Fn(&T) -> bool, item: T) {
    match (operation, has_match) {
        (Operation::InsertAfter, false) => list.push(item),
        (Operation::InsertBefore, false) => list.insert(0, item),
        (Operation::InsertAfter, true) => {
            if let Some(at) = list.iter().position(fits) {
                list.insert(at + 1, item);
            }
        }
        (Operation::InsertBefore, true) => {
            if let Some(at) = list.iter().position(fits) {
                list.insert(at, item);
            }
        }
        _ => {}
    }
}
