//! Protobuf messages in JSON, as Istio's golang/protobuf jsonpb reads them, in their canonical form.

use serde_json::{Map, Value};

use super::normal::{Mismatch, mismatch};
use super::{Field, Kind, TypeDef, enumeration};
use crate::duration;

/// The message with its fields in camelCase and declared order, durations and enums canonical. Fields
/// that the table does not know are left out, as jsonpb does with AllowUnknownFields.
pub(crate) fn message(ty: &'static TypeDef, value: &Value, path: &mut String) -> Result<Value, Mismatch> {
    let map = match value {
        Value::Object(map) => map,
        Value::Null => return Ok(Value::Object(Map::new())),
        other => return mismatch(path, "an object", other),
    };
    let mut out = Map::with_capacity(map.len());
    for field in ty.all() {
        let given = map.get(field.json).or_else(|| map.get(&snake(field.json)));
        let Some(given) = given.filter(|given| !given.is_null()) else { continue };
        let length = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(field.json);
        out.insert(field.json.to_owned(), value_of(&field.kind, given, path)?);
        path.truncate(length);
    }
    Ok(Value::Object(out))
}

fn value_of(kind: &Kind, value: &Value, path: &mut String) -> Result<Value, Mismatch> {
    match kind {
        Kind::Pointer(inner) => value_of(inner, value, path),
        Kind::Struct(_) => match kind.definition() {
            Some(ty) => message(ty, value, path),
            None => Ok(value.clone()),
        },
        Kind::List(inner) => match value {
            Value::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    let length = path.len();
                    path.push_str(&format!("[{index}]"));
                    out.push(value_of(inner, item, path)?);
                    path.truncate(length);
                }
                Ok(Value::Array(out))
            }
            other => mismatch(path, "a list", other),
        },
        Kind::Map(inner) => match value {
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                let mut out = Map::with_capacity(map.len());
                for key in keys {
                    let length = path.len();
                    path.push('.');
                    path.push_str(key);
                    out.insert(key.clone(), value_of(inner, &map[key.as_str()], path)?);
                    path.truncate(length);
                }
                Ok(Value::Object(out))
            }
            other => mismatch(path, "an object", other),
        },
        Kind::Duration => match value.as_str().and_then(duration::nanoseconds) {
            Some(nanos) => Ok(Value::from(duration::protobuf(nanos))),
            None => mismatch(path, "a duration such as 10s", value),
        },
        Kind::Enum(index) => {
            let names = &enumeration(*index).names;
            let name = match value {
                Value::String(name) => names.iter().find(|known| **known == name.as_str()),
                Value::Number(number) => number.as_u64().and_then(|at| names.get(usize::try_from(at).ok()?)),
                _ => None,
            };
            match name {
                Some(name) => Ok(Value::from(*name)),
                None => mismatch(path, "the name of an enum's value", value),
            }
        }
        Kind::Text | Kind::Bytes => match value {
            Value::String(_) => Ok(value.clone()),
            other => mismatch(path, "a string", other),
        },
        Kind::Bool | Kind::Wrapped("BoolValue") => match value {
            Value::Bool(_) => Ok(value.clone()),
            other => mismatch(path, "a boolean", other),
        },
        Kind::Int(_) | Kind::Wrapped("Int32Value" | "UInt32Value" | "Int64Value" | "UInt64Value") => {
            // jsonpb also takes numbers in quotes.
            let number = value.as_i64().or_else(|| value.as_str()?.parse().ok());
            match number.or_else(|| value.as_f64().filter(|float| float.fract() == 0.0).map(|float| float as i64)) {
                Some(number) => Ok(Value::from(number)),
                None => mismatch(path, "an integer", value),
            }
        }
        Kind::Float | Kind::Wrapped("DoubleValue" | "FloatValue") => match value.as_f64() {
            Some(_) => Ok(value.clone()),
            None => mismatch(path, "a number", value),
        },
        _ => Ok(value.clone()),
    }
}

/// Lays `over` on `base`: messages and maps field by field, anything else replaced; a member of a oneof
/// replaces the others.
pub(crate) fn overlay(ty: &'static TypeDef, base: &mut Value, over: &Value) {
    let (Some(base), Some(over)) = (base.as_object_mut(), over.as_object()) else { return };
    for (key, value) in over {
        let field: Option<&'static Field> = ty.by_json(key);
        if let Some(group) = field.and_then(|field| field.oneof) {
            base.retain(|other, _| other == key || ty.by_json(other).and_then(|field| field.oneof) != Some(group));
        }
        match (field.map(|field| &field.kind), base.get_mut(key)) {
            (Some(kind), Some(old)) if old.is_object() && kind.definition().is_some() => {
                if let Some(inner) = kind.definition() {
                    overlay(inner, old, value);
                }
            }
            (Some(Kind::Map(_)), Some(Value::Object(old))) => {
                if let Some(new) = value.as_object() {
                    old.extend(new.iter().map(|(key, value)| (key.clone(), value.clone())));
                }
            }
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

/// `proxy_metadata` as JSON calls it: `proxyMetadata`.
pub(crate) fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if std::mem::take(&mut upper) => out.push(c.to_ascii_uppercase()),
            c => out.push(c),
        }
    }
    out
}

/// `proxyMetadata` as the .proto calls it: `proxy_metadata`.
fn snake(camel: &str) -> String {
    let mut out = String::with_capacity(camel.len() + 4);
    for c in camel.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
