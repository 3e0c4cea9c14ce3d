//! Kubernetes' strategic merge patch.
//!
//! As k8s.io/apimachinery `pkg/util/strategicpatch`, with the schema from this crate's tables.

use serde_json::{Map, Value};

use crate::schema::{Field, Kind, TypeDef};

/// A patch that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MergeError {
    #[error("{0}: an item of the list has no {1}")]
    NoKey(String, &'static str),
    #[error("{0}: unknown patch directive {1}")]
    Directive(String, String),
    #[error("{0}: {1} must be a list")]
    DirectiveList(String, String),
    #[error("{0}: items of the list are not all objects")]
    Mixed(String),
}

const DIRECTIVE: &str = "$patch";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";
const RETAIN: &str = "$retainKeys";

/// Applies `patch` to an object of the type.
pub(crate) fn merge(ty: &'static TypeDef, original: Value, patch: &Value) -> Result<Value, MergeError> {
    let mut path = String::new();
    match (original, patch) {
        (Value::Object(original), Value::Object(patch)) => {
            Ok(Value::Object(merge_map(Some(ty), original, patch, &mut path)?))
        }
        (original, Value::Null) => Ok(original),
        (_, patch) => Ok(without_nulls(patch.clone())),
    }
}

fn merge_map(
    ty: Option<&'static TypeDef>,
    mut original: Map<String, Value>,
    patch: &Map<String, Value>,
    path: &mut String,
) -> Result<Map<String, Value>, MergeError> {
    match patch.get(DIRECTIVE).and_then(Value::as_str) {
        None => {}
        Some("replace") => {
            let mut patch = patch.clone();
            patch.shift_remove(DIRECTIVE);
            return Ok(patch);
        }
        Some("delete") => return Ok(Map::new()),
        Some("merge") => {}
        Some(other) => return Err(MergeError::Directive(path.clone(), other.to_owned())),
    }
    if let Some(keep) = patch.get(RETAIN) {
        let Some(keep) = keep.as_array() else {
            return Err(MergeError::DirectiveList(path.clone(), RETAIN.to_owned()));
        };
        original.retain(|key, _| keep.iter().any(|kept| kept.as_str() == Some(key)));
    }
    for (key, value) in patch {
        if key == DIRECTIVE || key == RETAIN || key.starts_with(ORDER) {
            continue;
        }
        if let Some(name) = key.strip_prefix(DELETE_FROM) {
            let Some(unwanted) = value.as_array() else {
                return Err(MergeError::DirectiveList(path.clone(), key.clone()));
            };
            if let Some(Value::Array(items)) = original.get_mut(name) {
                items.retain(|item| !unwanted.contains(item));
            }
            continue;
        }
        if value.is_null() {
            original.shift_remove(key);
            continue;
        }
        let field = ty.and_then(|ty| ty.by_json(key));
        let order = patch.get(&format!("{ORDER}{key}")).and_then(Value::as_array);
        let length = path.len();
        path.push('.');
        path.push_str(key);
        match original.get_mut(key) {
            // A list of the patch alone still has its directives carried out.
            None => {
                original.insert(key.clone(), fresh(field, value, path)?);
            }
            Some(slot) => {
                let old = slot.take();
                *slot = merge_value(field, old, value, order, path)?;
            }
        }
        path.truncate(length);
    }
    // An order may be given for a list that the patch does not change.
    for (key, order) in patch {
        let Some(name) = key.strip_prefix(ORDER) else { continue };
        if patch.contains_key(name) {
            continue;
        }
        let field = ty.and_then(|ty| ty.by_json(name));
        if let (Some(Value::Array(items)), Some(order)) = (original.get_mut(name), order.as_array()) {
            let old = std::mem::take(items);
            *items = ordered(old.clone(), order, &old, field.and_then(|field| field.merge_key));
        }
    }
    Ok(original)
}

/// A value for a key that the original does not have.
fn fresh(field: Option<&'static Field>, value: &Value, path: &mut String) -> Result<Value, MergeError> {
    match (field.and_then(|field| field.merge_key), value) {
        (Some(key), Value::Array(items)) if items.iter().any(|item| item.get(DIRECTIVE).is_some()) => {
            merge_value(field, Value::Array(Vec::new()), value, None, path).map(|merged| match merged {
                Value::Array(items) => Value::Array(items.into_iter().filter(|item| item.get(key).is_some()).collect()),
                other => other,
            })
        }
        (_, Value::Object(map)) => match map.get(DIRECTIVE).and_then(Value::as_str) {
            Some("delete") => Ok(Value::Object(Map::new())),
            _ => Ok(without_nulls(value.clone())),
        },
        _ => Ok(without_nulls(value.clone())),
    }
}

fn merge_value(
    field: Option<&'static Field>,
    original: Value,
    patch: &Value,
    order: Option<&Vec<Value>>,
    path: &mut String,
) -> Result<Value, MergeError> {
    match (original, patch) {
        (Value::Object(original), Value::Object(patch)) => {
            let ty = field.and_then(|field| field.kind.definition());
            Ok(Value::Object(merge_map(ty, original, patch, path)?))
        }
        (Value::Array(original), Value::Array(patch)) => {
            let merged = match field {
                Some(Field { merge_key: Some(key), kind, .. }) => merge_list(kind, key, original, patch, order, path)?,
                Some(Field { set: true, .. }) => {
                    let mut united = original.clone();
                    for item in patch {
                        if !united.contains(item) {
                            united.push(item.clone());
                        }
                    }
                    ordered(united, order.unwrap_or(patch), &original, None)
                }
                _ => patch.iter().cloned().map(without_nulls).collect(),
            };
            Ok(Value::Array(merged))
        }
        (_, patch) => Ok(without_nulls(patch.clone())),
    }
}

fn merge_list(
    kind: &Kind,
    key: &'static str,
    original: Vec<Value>,
    patch: &[Value],
    order: Option<&Vec<Value>>,
    path: &mut String,
) -> Result<Vec<Value>, MergeError> {
    if original.iter().chain(patch).any(|item| !item.is_object()) {
        return Err(MergeError::Mixed(path.clone()));
    }
    let ty = match kind {
        Kind::List(inner) => inner.definition(),
        _ => None,
    };
    let mut merged = original.clone();
    let mut replace = false;
    let mut normal = Vec::with_capacity(patch.len());
    for item in patch {
        match item.get(DIRECTIVE).and_then(Value::as_str) {
            None | Some("merge") => normal.push(item),
            Some("delete") => {
                let Some(id) = item.get(key) else { return Err(MergeError::NoKey(path.clone(), key)) };
                merged.retain(|known| known.get(key) != Some(id));
            }
            Some("replace") => replace = true,
            Some(other) => return Err(MergeError::Directive(path.clone(), other.to_owned())),
        }
    }
    if replace {
        return Ok(normal.into_iter().cloned().collect());
    }
    for item in &normal {
        let Some(id) = item.get(key) else { return Err(MergeError::NoKey(path.clone(), key)) };
        let Value::Object(changes) = item else { continue };
        match merged.iter_mut().find(|known| known.get(key) == Some(id)) {
            Some(slot) => {
                if let Value::Object(old) = slot.take() {
                    *slot = Value::Object(merge_map(ty, old, changes, path)?);
                }
            }
            None => {
                let mut item = without_nulls((*item).clone());
                if let Value::Object(map) = &mut item {
                    map.shift_remove(DIRECTIVE);
                }
                merged.push(item);
            }
        }
    }
    let wanted: Vec<Value> = normal.into_iter().cloned().collect();
    Ok(ordered(merged, order.unwrap_or(&wanted), &original, Some(key)))
}

/// The order of a merged list. Items that `order` names come in its order, the others in that of the
/// original; of the two heads the original's is taken first only when both were there before, in that
/// order. So items that are new go to the front.
fn ordered(merged: Vec<Value>, order: &[Value], original: &[Value], key: Option<&str>) -> Vec<Value> {
    let same = |a: &Value, b: &Value| match key {
        Some(key) => a.get(key) == b.get(key),
        None => a == b,
    };
    let place = |list: &[Value], item: &Value| list.iter().position(|other| same(other, item));
    let (mut named, mut others): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|item| place(order, item).is_some());
    named.sort_by_key(|item| place(order, item));
    others.sort_by_key(|item| place(original, item));
    let mut out = Vec::with_capacity(named.len() + others.len());
    let mut named = named.into_iter().peekable();
    let mut others = others.into_iter().peekable();
    while let (Some(new), Some(old)) = (named.peek(), others.peek()) {
        let before = match (place(original, old), place(original, new)) {
            (Some(old), Some(new)) => old < new,
            _ => false,
        };
        out.extend(if before { others.next() } else { named.next() });
    }
    out.extend(named);
    out.extend(others);
    out
}

/// A patch's null means "not there", also where there was nothing to remove.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema;

    #[track_caller]
    fn check(original: Value, patch: Value, want: Value) {
        assert_eq!(merge(schema::named("PodSpec"), original, &patch).unwrap(), want);
    }

    #[test]
    fn lists_merge_by_key_and_new_items_go_first() {
        check(
            json!({"volumes": [{"name": "tmp", "emptyDir": {}}]}),
            json!({"volumes": [{"name": "a", "emptyDir": null}, {"name": "b"}]}),
            json!({"volumes": [{"name": "a"}, {"name": "b"}, {"name": "tmp", "emptyDir": {}}]}),
        );
        check(
            json!({"containers": [{"name": "a", "args": ["1", "2"]}, {"name": "b"}]}),
            json!({"containers": [{"name": "b", "image": "i"}, {"name": "a", "args": ["3"]}]}),
            json!({"containers": [{"name": "b", "image": "i"}, {"name": "a", "args": ["3"]}]}),
        );
    }

    #[test]
    fn nulls_delete() {
        check(
            json!({"hostname": "x", "securityContext": {"runAsUser": 1, "fsGroup": 2}}),
            json!({"hostname": null, "securityContext": {"fsGroup": null}, "nodeName": null}),
            json!({"securityContext": {"runAsUser": 1}}),
        );
    }

    #[test]
    fn directives() {
        let two = json!({"containers": [{"name": "a"}, {"name": "b"}]});
        check(
            two.clone(),
            json!({"containers": [{"name": "a", "$patch": "delete"}]}),
            json!({"containers": [{"name": "b"}]}),
        );
        check(
            two.clone(),
            json!({"containers": [{"$patch": "replace"}, {"name": "c"}]}),
            json!({"containers": [{"name": "c"}]}),
        );
        check(
            two,
            json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}),
            json!({"containers": [{"name": "b"}, {"name": "a"}]}),
        );
        check(
            json!({"volumes": [{"name": "v", "emptyDir": {}}]}),
            json!({"volumes": [{"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}}]}),
            json!({"volumes": [{"name": "v", "secret": {"secretName": "s"}}]}),
        );
        check(
            json!({"securityContext": {"runAsUser": 1}}),
            json!({"securityContext": {"$patch": "replace", "fsGroup": 2}}),
            json!({"securityContext": {"fsGroup": 2}}),
        );
    }

    #[test]
    fn an_item_without_its_key_is_refused() {
        let found = merge(
            schema::named("PodSpec"),
            json!({"containers": [{"name": "a"}]}),
            &json!({"containers": [{"image": "i"}]}),
        );
        assert_eq!(found, Err(MergeError::NoKey(".containers".to_owned(), "name")));
    }
}
