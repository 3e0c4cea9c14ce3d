//! Objects as Go writes them after reading them into its structs.

use serde_json::{Map, Value};

use super::{Kind, TypeDef, canonical_quantity, enumeration};

/// A value that does not fit its type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: expected {expected}, found {found}")]
pub(crate) struct Mismatch {
    /// Such as `spec.containers[0].readinessProbe.failureThreshold`.
    pub(crate) path: String,
    pub(crate) expected: &'static str,
    pub(crate) found: String,
}

/// Whether fields that the tables do not know are kept.
///
/// DIFFERS: Istio drops what its Go structs do not know. Where an object goes back to somebody whose
/// API may be newer than these tables, it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    Keep,
    Drop,
}

/// The object as Go's `encoding/json` writes it: empty fields left out, quantities canonical, fields in
/// the order of the struct, unknown fields kept after them.
pub(crate) fn normalise(ty: &'static TypeDef, value: &Value) -> Result<Value, Mismatch> {
    structure(ty, value, Unknown::Keep, &mut String::new())
}

/// As [`normalise`] without the unknown fields: what a Go struct holds.
pub(crate) fn decode(ty: &'static TypeDef, value: &Value) -> Result<Value, Mismatch> {
    structure(ty, value, Unknown::Drop, &mut String::new())
}

/// Paths of the fields that the tables do not know, except those that hold nothing.
pub(crate) fn unknown(ty: &'static TypeDef, value: &Value, path: &str, found: &mut Vec<String>) {
    for (key, value) in value.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let dot = if path.is_empty() { "" } else { "." };
        let path = format!("{path}{dot}{key}");
        match ty.by_json(key) {
            Some(field) => unknown_of(&field.kind, value, &path, found),
            None => found.push(path),
        }
    }
}

fn unknown_of(kind: &Kind, value: &Value, path: &str, found: &mut Vec<String>) {
    match (kind, value) {
        (Kind::Pointer(inner), value) => unknown_of(inner, value, path, found),
        (Kind::Struct(_), value) => {
            if let Some(ty) = kind.definition() {
                unknown(ty, value, path, found);
            }
        }
        (Kind::List(inner), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                unknown_of(inner, item, &format!("{path}[{index}]"), found);
            }
        }
        (Kind::Map(inner), Value::Object(map)) => {
            for (key, item) in map {
                unknown_of(inner, item, &format!("{path}.{key}"), found);
            }
        }
        _ => {}
    }
}

/// Numbers and booleans where strings belong become strings, as sigs.k8s.io/yaml reads YAML into structs:
/// `version: 1` among labels is "1". Only for what a user writes in YAML; in JSON they stay faults.
pub(crate) fn texts(ty: &'static TypeDef, value: &mut Value) {
    let Value::Object(map) = value else { return };
    for (key, value) in map.iter_mut() {
        if let Some(field) = ty.by_json(key) {
            texts_of(&field.kind, value);
        }
    }
}

fn texts_of(kind: &Kind, value: &mut Value) {
    match (kind, value) {
        (Kind::Pointer(inner), value) => texts_of(inner, value),
        (Kind::Struct(_), value) => {
            if let Some(ty) = kind.definition() {
                texts(ty, value);
            }
        }
        (Kind::List(inner), Value::Array(items)) => items.iter_mut().for_each(|item| texts_of(inner, item)),
        (Kind::Map(inner), Value::Object(map)) => map.values_mut().for_each(|item| texts_of(inner, item)),
        (Kind::Text, value) => {
            if let Some(text) = scalar_text(value) {
                *value = Value::String(text);
            }
        }
        _ => {}
    }
}

/// A number or boolean as sigs.k8s.io/yaml writes it where a string belongs.
pub(crate) fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) if number.is_f64() => {
            Some(go_template::format::sprint(&go_template::Value::Float(number.as_f64()?)))
        }
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

pub(super) fn mismatch<T>(path: &str, expected: &'static str, found: &Value) -> Result<T, Mismatch> {
    let kind = manifest::type_name(found);
    let found = match found {
        Value::String(_) | Value::Number(_) | Value::Bool(_) => format!("{kind} ({found})"),
        _ => kind.to_owned(),
    };
    let path = if path.is_empty() { "the object".to_owned() } else { path.trim_start_matches('.').to_owned() };
    Err(Mismatch { path, expected, found })
}

fn structure(ty: &'static TypeDef, value: &Value, unknown: Unknown, path: &mut String) -> Result<Value, Mismatch> {
    let empty = Map::new();
    let map = match value {
        Value::Object(map) => map,
        Value::Null => &empty,
        other => return mismatch(path, "an object", other),
    };
    let mut out = Map::with_capacity(map.len());
    for field in ty.all() {
        let given = map.get(field.json).unwrap_or(&Value::Null);
        // An unset field that may be left out needs no look at its type.
        if given.is_null() && field.omit_zero {
            continue;
        }
        if given.is_null() && field.omit_empty && !matches!(field.kind, Kind::Struct(_) | Kind::Time) {
            continue;
        }
        let length = path.len();
        path.push('.');
        path.push_str(field.json);
        let written = value_of(&field.kind, given, unknown, path)?;
        path.truncate(length);
        if field.omit_empty && is_empty(&field.kind, &written) {
            continue;
        }
        out.insert(field.json.to_owned(), written);
    }
    if unknown == Unknown::Keep {
        for (key, value) in map {
            if ty.by_json(key).is_none() && !value.is_null() {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    Ok(Value::Object(out))
}

/// As `encoding/json`'s omitempty: structs are never empty, pointers only when nil.
fn is_empty(kind: &Kind, value: &Value) -> bool {
    match kind {
        Kind::Pointer(_) | Kind::Any | Kind::Duration | Kind::Wrapped(_) => value.is_null(),
        Kind::Struct(_) | Kind::Quantity | Kind::IntOrString | Kind::Time => false,
        Kind::Enum(index) => value.as_str().is_none_or(|name| enumeration(*index).names.first() == Some(&name)),
        _ => match value {
            Value::Null => true,
            Value::Bool(value) => !value,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.is_empty(),
        },
    }
}

fn value_of(kind: &Kind, value: &Value, unknown: Unknown, path: &mut String) -> Result<Value, Mismatch> {
    match kind {
        Kind::Pointer(_) if value.is_null() => Ok(Value::Null),
        Kind::Pointer(inner) => value_of(inner, value, unknown, path),
        Kind::Struct(_) => match kind.definition() {
            Some(ty) => structure(ty, value, unknown, path),
            None => Ok(value.clone()),
        },
        Kind::Text | Kind::Bytes => match value {
            Value::Null => Ok(Value::from("")),
            Value::String(_) => Ok(value.clone()),
            other => mismatch(path, "a string", other),
        },
        Kind::Bool => match value {
            Value::Null => Ok(Value::Bool(false)),
            Value::Bool(_) => Ok(value.clone()),
            other => mismatch(path, "a boolean", other),
        },
        Kind::Int(name) => integer(name, value, path),
        Kind::Float => match value {
            Value::Null => Ok(Value::from(0)),
            Value::Number(_) => Ok(value.clone()),
            other => mismatch(path, "a number", other),
        },
        Kind::Quantity => {
            let text = match value {
                Value::Null => "0".to_owned(),
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                other => return mismatch(path, "a quantity", other),
            };
            match canonical_quantity(&text) {
                Some(text) => Ok(Value::String(text)),
                None => mismatch(path, "a quantity", value),
            }
        }
        Kind::Time => match value {
            Value::Null | Value::String(_) => Ok(value.clone()),
            other => mismatch(path, "a time", other),
        },
        Kind::IntOrString => match value {
            Value::Null => Ok(Value::from(0)),
            Value::String(_) => Ok(value.clone()),
            Value::Number(_) => integer("int32", value, path),
            other => mismatch(path, "an integer or a string", other),
        },
        Kind::List(inner) => match value {
            Value::Null => Ok(Value::Null),
            Value::Array(items) => {
                let mut out = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    let length = path.len();
                    path.push_str(&format!("[{index}]"));
                    out.push(value_of(inner, item, unknown, path)?);
                    path.truncate(length);
                }
                Ok(Value::Array(out))
            }
            other => mismatch(path, "a list", other),
        },
        Kind::Map(inner) => match value {
            Value::Null => Ok(Value::Null),
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                let mut out = Map::with_capacity(map.len());
                for key in keys {
                    let length = path.len();
                    path.push('.');
                    path.push_str(key);
                    out.insert(key.clone(), value_of(inner, &map[key.as_str()], unknown, path)?);
                    path.truncate(length);
                }
                Ok(Value::Object(out))
            }
            other => mismatch(path, "an object", other),
        },
        Kind::Enum(index) => enumeration_value(*index, value, path),
        Kind::Any | Kind::Duration | Kind::Wrapped(_) => Ok(value.clone()),
    }
}

fn integer(name: &str, value: &Value, path: &str) -> Result<Value, Mismatch> {
    let bounds = match name {
        "int32" => (i128::from(i32::MIN), i128::from(i32::MAX)),
        "uint32" => (0, i128::from(u32::MAX)),
        "uint64" => (0, i128::from(u64::MAX)),
        _ => (i128::from(i64::MIN), i128::from(i64::MAX)),
    };
    let expected = match name {
        "int32" => "a 32-bit integer",
        "uint32" => "an unsigned 32-bit integer",
        _ => "an integer",
    };
    match value {
        Value::Null => Ok(Value::from(0)),
        Value::Number(number) => {
            let whole = number.as_i128().or_else(|| {
                let float = number.as_f64()?;
                (float.fract() == 0.0 && float.abs() < 1e18).then_some(float as i128)
            });
            match whole.filter(|whole| (bounds.0..=bounds.1).contains(whole)) {
                Some(whole) => Ok(i64::try_from(whole).map_or_else(|_| value.clone(), Value::from)),
                None => mismatch(path, expected, value),
            }
        }
        other => mismatch(path, expected, other),
    }
}

/// Enums are kept by name; a number that has a name becomes it.
fn enumeration_value(index: usize, value: &Value, path: &str) -> Result<Value, Mismatch> {
    match value {
        Value::Null | Value::String(_) => Ok(value.clone()),
        Value::Number(number) => {
            let name = number
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .and_then(|number| enumeration(index).names.get(number));
            Ok(name.map_or_else(|| value.clone(), |name| Value::from(*name)))
        }
        other => mismatch(path, "an enum's name", other),
    }
}
