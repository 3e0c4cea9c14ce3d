//! Lists within a pod: finding, moving and changing containers.

use serde_json::{Map, Value, json};

use crate::status::PROXY;

/// Which list of containers.
pub(crate) const LISTS: [&str; 2] = ["containers", "initContainers"];

/// The containers of one list; none when the list is absent.
pub(crate) fn containers<'a>(pod: &'a Value, list: &str) -> &'a [Value] {
    pod["spec"][list].as_array().map(Vec::as_slice).unwrap_or_default()
}

pub(crate) fn find<'a>(list: &'a [Value], name: &str) -> Option<&'a Value> {
    list.iter().find(|container| container["name"] == name)
}

/// The list for changing; made when it is absent.
pub(crate) fn list_mut<'a>(pod: &'a mut Value, list: &str) -> Option<&'a mut Vec<Value>> {
    let spec = pod.get_mut("spec")?.as_object_mut()?;
    let slot = spec.entry(list).or_insert_with(|| json!([]));
    if slot.is_null() {
        *slot = json!([]);
    }
    slot.as_array_mut()
}

/// The named container in either list.
pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    LISTS.iter().find_map(|list| find(containers(pod, list), name))
}

/// The named container in either list, for changing.
pub(crate) fn container_mut<'a>(pod: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    let list = LISTS.iter().find(|list| find(containers(pod, list), name).is_some())?;
    pod["spec"][*list].as_array_mut()?.iter_mut().find(|container| container["name"] == name)
}

pub(crate) fn sidecar(pod: &Value) -> Option<&Value> {
    container(pod, PROXY)
}

/// Takes the named containers out of a list; the last of them is returned.
pub(crate) fn remove(pod: &mut Value, list: &str, name: &str) -> Option<Value> {
    let items = pod.get_mut("spec")?.get_mut(list)?.as_array_mut()?;
    let mut found = None;
    items.retain_mut(|item| {
        if item["name"] == name {
            found = Some(item.take());
            return false;
        }
        true
    });
    found
}

pub(crate) fn move_first(pod: &mut Value, list: &str, name: &str) {
    if let Some(container) = remove(pod, list, name)
        && let Some(items) = list_mut(pod, list)
    {
        items.insert(0, container);
    }
}

pub(crate) fn move_last(pod: &mut Value, list: &str, name: &str) {
    if let Some(container) = remove(pod, list, name)
        && let Some(items) = list_mut(pod, list)
    {
        items.push(container);
    }
}

/// Appends an environment variable to a container.
pub(crate) fn push_env(container: &mut Value, name: &str, value: &str) {
    let Some(container) = container.as_object_mut() else { return };
    let env = container.entry("env").or_insert_with(|| json!([]));
    if let Some(env) = env.as_array_mut() {
        env.push(json!({"name": name, "value": value}));
    }
}

/// `metadata.annotations` or `metadata.labels`, made when absent.
pub(crate) fn metadata_mut<'a>(pod: &'a mut Value, map: &str) -> &'a mut Map<String, Value> {
    if !pod["metadata"].is_object() {
        pod["metadata"] = json!({});
    }
    if !pod["metadata"][map].is_object() {
        pod["metadata"][map] = json!({});
    }
    pod["metadata"][map].as_object_mut().expect("it was made an object just above")
}
