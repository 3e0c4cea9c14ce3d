//! sprig's functions on dictionaries, defaults and types.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{Args, Functions, Outcome};
use crate::format;
use crate::value::{Element, List, Map, Value};

/// sprig's `empty`: as false values, but structs are never empty.
pub(super) fn empty(value: &Value<'_>) -> bool {
    !value.truth()
}

pub(super) fn define(functions: &mut Functions) {
    functions.define("default", 1, None, |args| {
        // Without a second argument the default itself; the last given is the value.
        match args.all() {
            [default, value, ..] if empty(value) => Ok(default.clone()),
            [_, value, ..] => Ok(value.clone()),
            _ => Ok(args.get(0).clone()),
        }
    });
    functions.define("empty", 1, Some(1), |args| Ok(Value::Bool(empty(args.get(0)))));
    functions.define("coalesce", 0, None, |args| {
        Ok(args.all().iter().find(|value| !empty(value)).cloned().unwrap_or(Value::Nil))
    });
    functions.define("all", 0, None, |args| Ok(Value::Bool(!args.all().iter().any(empty))));
    functions.define("any", 0, None, |args| Ok(Value::Bool(args.all().iter().any(|value| !empty(value)))));
    functions.define("ternary", 3, Some(3), |args| Ok(args.get(if args.bool(2)? { 0 } else { 1 }).clone()));
    functions.define("fail", 1, Some(1), |args| Err(args.text(0)?.to_owned()));
    functions.define("typeOf", 1, Some(1), |args| Ok(Value::from(args.get(0).type_name())));
    functions.define("typeIs", 2, Some(2), |args| Ok(Value::Bool(args.get(1).type_name() == args.text(0)?)));
    functions.define("typeIsLike", 2, Some(2), |args| {
        let name = args.get(1).type_name();
        Ok(Value::Bool(name == args.text(0)? || name == format!("*{}", args.text(0)?)))
    });
    functions.define("kindOf", 1, Some(1), |args| Ok(Value::from(args.get(0).kind().to_owned())));
    functions.define("kindIs", 2, Some(2), |args| Ok(Value::Bool(args.get(1).kind() == args.text(0)?)));
    functions.define("deepEqual", 2, Some(2), |args| Ok(Value::Bool(args.get(0) == args.get(1))));
    for name in ["deepCopy", "mustDeepCopy"] {
        functions.define(name, 1, Some(1), |args| match args.get(0) {
            Value::Nil => Err("reflect: call of reflect.Value.Type on zero Value".to_owned()),
            value => Ok(copy(value, 0)),
        });
    }

    functions.define("dict", 0, None, |args| {
        let pairs = args.all().chunks(2).map(|pair| {
            let value = pair.get(1).cloned().unwrap_or_else(|| Value::from(""));
            (Rc::from(format::strval(&pair[0])), value)
        });
        Ok(Value::Map(Map::new(Element::Any, pairs)))
    });
    functions.define("get", 2, Some(2), |args| Ok(args.map(0)?.get(args.text(1)?).unwrap_or_else(|| Value::from(""))));
    functions.define("set", 3, Some(3), |args| {
        let (map, key) = (args.map(0)?, Rc::from(args.text(1)?));
        if map.is_nil() {
            return Err("assignment to entry in nil map".to_owned());
        }
        Ok(Value::Map(map.update(|map| {
            map.insert(key, args.get(2).clone());
        })))
    });
    functions.define("unset", 2, Some(2), |args| {
        let key = args.text(1)?;
        Ok(Value::Map(args.map(0)?.update(|map| {
            map.remove(key);
        })))
    });
    functions.define("hasKey", 2, Some(2), |args| Ok(Value::Bool(args.map(0)?.get(args.text(1)?).is_some())));
    functions.define("pluck", 1, None, |args| {
        let key = args.text(0)?;
        let mut found = Vec::new();
        for index in 1..args.len() {
            found.extend(args.map(index)?.get(key));
        }
        Ok(Value::list(found))
    });
    functions.define("keys", 0, None, |args| {
        let mut keys = Vec::new();
        for index in 0..args.len() {
            keys.extend(args.map(index)?.keys().into_iter().map(|key| key.to_string()));
        }
        Ok(Value::texts(keys))
    });
    functions.define("values", 1, Some(1), |args| {
        Ok(Value::list(args.map(0)?.entries().into_iter().map(|(_, value)| value).collect()))
    });
    functions.define("pick", 1, None, |args| select(args, true));
    functions.define("omit", 1, None, |args| select(args, false));
    for name in ["merge", "mustMerge"] {
        functions.define(name, 1, None, |args| merge(args, false));
    }
    for name in ["mergeOverwrite", "mustMergeOverwrite"] {
        functions.define(name, 1, None, |args| merge(args, true));
    }
    functions.define("dig", 3, None, dig);
    functions.define("split", 2, Some(2), |args| {
        let parts = super::text::split(args.text(1)?, args.text(0)?);
        Ok(numbered(parts))
    });
    functions.define("splitn", 3, Some(3), |args| {
        let count = usize::try_from(args.int(1)?).unwrap_or(usize::MAX);
        Ok(numbered(super::text::splitn(args.text(2)?, args.text(0)?, count)))
    });
}

/// A dictionary with the keys `_0`, `_1`, …
fn numbered<'a>(parts: Vec<&str>) -> Value<'a> {
    let pairs = parts
        .into_iter()
        .enumerate()
        .map(|(index, part)| (Rc::from(format!("_{index}")), Value::from(part.to_owned())));
    Value::Map(Map::new(Element::Text, pairs))
}

fn select<'a>(args: Args<'a, '_>, keep: bool) -> Outcome<'a> {
    let map = args.map(0)?;
    let mut keys = Vec::new();
    for index in 1..args.len() {
        keys.push(args.text(index)?);
    }
    let entries = map.entries().into_iter().filter(|(key, _)| keys.contains(&&**key) == keep);
    Ok(Value::Map(Map::new(map.element(), entries)))
}

fn merge<'a>(args: Args<'a, '_>, overwrite: bool) -> Outcome<'a> {
    let target = args.map(0)?;
    let mut merged: BTreeMap<Rc<str>, Value<'a>> = target.entries().into_iter().collect();
    for index in 1..args.len() {
        merge_into(&mut merged, &args.map(index)?, overwrite, 0);
    }
    Ok(Value::Map(target.update(|entries| *entries = merged)))
}

fn merge_into<'a>(into: &mut BTreeMap<Rc<str>, Value<'a>>, from: &Map<'a>, overwrite: bool, depth: usize) {
    for (key, value) in from.entries() {
        // As mergo: null only overwrites, maps merge, all else goes to what is missing or empty.
        let merged = match (into.get(&key), &value) {
            (_, Value::Nil) if !overwrite => continue,
            (Some(Value::Map(old)), Value::Map(new)) if !old.is_empty() && depth < 100 => {
                let mut entries = old.entries().into_iter().collect();
                merge_into(&mut entries, new, overwrite, depth + 1);
                Value::Map(old.update(|slot| *slot = entries))
            }
            (Some(old), _) if !overwrite && !empty(old) => continue,
            _ => value,
        };
        into.insert(key, merged);
    }
}

fn dig<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let count = args.len();
    let default = args.get(count - 2);
    let wrong = |value: &Value<'_>, wanted: &str| {
        let found = if matches!(value, Value::Nil) { "nil".to_owned() } else { value.type_name() };
        Err(format!("interface conversion: interface {{}} is {found}, not {wanted}"))
    };
    let mut value = match args.get(count - 1) {
        Value::Map(map) if map.element() == Element::Any => Value::Map(map.clone()),
        other => return wrong(other, "map[string]interface {}"),
    };
    let mut keys = Vec::with_capacity(count);
    for key in &args.all()[..count - 2] {
        match key.as_str() {
            Some(key) => keys.push(key),
            None => return wrong(key, "string"),
        }
    }
    for key in keys {
        value = match &value {
            Value::Map(map) => match map.get(key) {
                Some(value) => value,
                None => return Ok(default.clone()),
            },
            other => return wrong(other, "map[string]interface {}"),
        };
    }
    Ok(value)
}

fn copy<'a>(value: &Value<'a>, depth: usize) -> Value<'a> {
    match value {
        Value::Map(map) if depth < 100 => Value::Map(Map::new(
            map.element(),
            map.entries().into_iter().map(|(key, value)| (key, copy(&value, depth + 1))),
        )),
        Value::List(list) if depth < 100 => {
            let items = list.iter().map(|item| copy(&item, depth + 1)).collect();
            Value::List(match list {
                List::Typed(_, ty) => List::typed(items, ty),
                _ => List::new(items),
            })
        }
        other => other.clone(),
    }
}
