//! RFC 6902 patches.

use serde_json::{Value, json};

/// The operations that turn `raw` into `result`.
///
/// `base` is `raw` as it was read: where `base` and `result` agree nothing is changed, so that what
/// reading normalised stays as the sender wrote it.
pub(crate) fn between(raw: &Value, base: &Value, result: &Value) -> Vec<Value> {
    let mut operations = Vec::new();
    compare(raw, base, result, &mut String::new(), &mut operations);
    operations
}

fn compare(raw: &Value, base: &Value, result: &Value, path: &mut String, operations: &mut Vec<Value>) {
    if base == result {
        return;
    }
    match (raw, base, result) {
        (Value::Object(raw), Value::Object(base), Value::Object(result)) => {
            for (key, was) in base {
                let length = path.len();
                push(path, key);
                match (raw.get(key), result.get(key)) {
                    (Some(raw), Some(result)) => compare(raw, was, result, path, operations),
                    (Some(_), None) => operations.push(json!({"op": "remove", "path": path})),
                    (None, Some(result)) if result != was => {
                        operations.push(json!({"op": "add", "path": path, "value": result}));
                    }
                    (None, _) => {}
                }
                path.truncate(length);
            }
            for (key, value) in result {
                if !base.contains_key(key) {
                    let length = path.len();
                    push(path, key);
                    // Adding replaces a member that was there but did not count, such as a null.
                    operations.push(json!({"op": "add", "path": path, "value": value}));
                    path.truncate(length);
                }
            }
        }
        (Value::Array(raw), Value::Array(base), Value::Array(result)) if raw.len() == base.len() => {
            array(raw, base, result, path, operations);
        }
        _ => operations.push(json!({"op": "replace", "path": path, "value": result})),
    }
}

/// Items with names are moved to their places by removing and adding; what stays is compared within.
fn array(raw: &[Value], base: &[Value], result: &[Value], path: &mut String, operations: &mut Vec<Value>) {
    let same = |a: &Value, b: &Value| match (a.get("name"), b.get("name")) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    };
    // Pairs of old and new items that keep their order.
    let mut kept: Vec<Option<usize>> = Vec::with_capacity(base.len());
    let mut next = 0;
    for item in base {
        let place = result[next..].iter().position(|other| same(item, other)).map(|at| at + next);
        if let Some(place) = place {
            next = place + 1;
        }
        kept.push(place);
    }
    let mut gone = 0;
    for (index, place) in kept.iter().enumerate() {
        if place.is_none() {
            operations.push(json!({"op": "remove", "path": format!("{path}/{}", index - gone)}));
            gone += 1;
        }
    }
    let mut old = kept.iter().enumerate().filter_map(|(index, place)| place.map(|place| (index, place))).peekable();
    for (at, item) in result.iter().enumerate() {
        let length = path.len();
        push(path, &at.to_string());
        match old.next_if(|(_, place)| *place == at) {
            Some((index, _)) => compare(&raw[index], &base[index], item, path, operations),
            None => operations.push(json!({"op": "add", "path": path, "value": item})),
        }
        path.truncate(length);
    }
}

fn push(path: &mut String, key: &str) {
    path.push('/');
    path.push_str(&key.replace('~', "~0").replace('/', "~1"));
}

/// Applies add, remove and replace, for tests and for `inject review`'s own check.
#[cfg(test)]
pub(crate) fn apply(mut value: Value, operations: &[Value]) -> Value {
    for operation in operations {
        let path = operation["path"].as_str().unwrap();
        let Some((parent, key)) = path.rsplit_once('/') else {
            value = operation["value"].clone();
            continue;
        };
        let key = key.replace("~1", "/").replace("~0", "~");
        match (value.pointer_mut(parent).unwrap(), operation["op"].as_str().unwrap()) {
            (Value::Array(items), "add") => items.insert(key.parse().unwrap(), operation["value"].clone()),
            (Value::Array(items), "remove") => {
                items.remove(key.parse().unwrap());
            }
            (Value::Array(items), _) => items[key.parse::<usize>().unwrap()] = operation["value"].clone(),
            (Value::Object(map), "remove") => {
                map.shift_remove(&key).unwrap();
            }
            (Value::Object(map), _) => {
                map.insert(key, operation["value"].clone());
            }
            _ => panic!("{operation}"),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_lead_to_the_result_and_leave_the_rest() {
        let raw = json!({"a/b": {"x": 1, "odd": null}, "list": [{"name": "p"}, {"name": "q", "v": 1}, {"name": "r"}]});
        let base = json!({"a/b": {"x": 1}, "list": [{"name": "p", "r": {}}, {"name": "q", "v": 1}, {"name": "r"}]});
        let result = json!({"a/b": {"x": 2, "y~": 3}, "list": [{"name": "new"}, {"name": "p", "r": {}}, {"name": "r"}, {"name": "q", "v": 2}]});
        let patched = apply(raw.clone(), &between(&raw, &base, &result));
        assert_eq!(
            patched,
            json!({"a/b": {"x": 2, "odd": null, "y~": 3}, "list": [{"name": "new"}, {"name": "p"}, {"name": "r"}, {"name": "q", "v": 2}]})
        );
    }
}
