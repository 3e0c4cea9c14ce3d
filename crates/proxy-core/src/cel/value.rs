//! Values of expressions: how they compare, and how they print.

use std::cmp::Ordering;

use base64::Engine;
use serde_json::{Map, Number};

use crate::cel::attributes::Place;
use crate::format::TimeFormat;

/// A value of an expression. Spans and moments are counted in nanoseconds, moments from 1970 on.
#[derive(Clone, Debug)]
pub enum Value {
    /// Null.
    Null,
    /// Truth.
    Bool(bool),
    /// Whole number.
    Int(i64),
    /// Whole number without a sign.
    Uint(u64),
    /// Other number.
    Double(f64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A span of time.
    Duration(i128),
    /// A moment.
    Time(i128),
    /// A list.
    List(Vec<Value>),
    /// A map; no key occurs twice.
    Map(Vec<(Value, Value)>),
    /// The type of a value, by name.
    Type(&'static str),
    /// Attributes by name, such as `request` or `request.headers`.
    Place(Place),
}

pub(super) const SECOND: i128 = 1_000_000_000;

impl Value {
    /// As it is printed (Envoy `Expr::print`).
    pub(crate) fn into_text(self) -> Vec<u8> {
        match self {
            Value::Text(text) => text.into_bytes(),
            Value::Bytes(bytes) => bytes,
            Value::Int(n) => n.to_string().into_bytes(),
            Value::Uint(n) => n.to_string().into_bytes(),
            Value::Double(n) => general(n).into_bytes(),
            Value::Bool(b) => b.to_string().into_bytes(),
            Value::Duration(nanos) => short(nanos).into_bytes(),
            Value::Time(nanos) => {
                let mut out = date(nanos);
                let fraction = format!("{:09}", nanos.rem_euclid(SECOND));
                let fraction = fraction.trim_end_matches('0');
                if !fraction.is_empty() {
                    out.push(b'.');
                }
                out.extend_from_slice(fraction.as_bytes());
                out.extend_from_slice(b"+00:00");
                out
            }
            Value::Null => b"NULL".to_vec(),
            Value::List(_) => b"CelList value".to_vec(),
            Value::Map(_) | Value::Place(_) => b"CelMap value".to_vec(),
            Value::Type(_) => b"CelType value".to_vec(),
        }
    }

    /// As it is in JSON, which is that of protobuf; `None`: it has no such form.
    pub(crate) fn json(self) -> Option<serde_json::Value> {
        use serde_json::Value as Json;
        Some(match self {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(b),
            Value::Int(n) => Json::Number(n.into()),
            Value::Uint(n) => Json::Number(n.into()),
            Value::Double(n) if n.fract() == 0.0 && n.abs() < 1e15 => Json::Number((n as i64).into()),
            Value::Double(n) => Number::from_f64(n).map_or(Json::Null, Json::Number),
            Value::Text(text) => Json::String(text),
            Value::Bytes(bytes) => Json::String(base64::prelude::BASE64_STANDARD.encode(bytes)),
            Value::Duration(nanos) => {
                let sign = if nanos < 0 { "-" } else { "" };
                Json::String(format!("{sign}{}{}s", (nanos / SECOND).abs(), fraction((nanos % SECOND).abs())))
            }
            Value::Time(nanos) => {
                let date = String::from_utf8(date(nanos)).ok()?;
                Json::String(format!("{date}{}Z", fraction(nanos.rem_euclid(SECOND))))
            }
            Value::List(items) => Json::Array(items.into_iter().map(Value::json).collect::<Option<_>>()?),
            Value::Map(entries) => {
                let mut fields = Map::new();
                for (key, value) in entries {
                    fields.insert(String::from_utf8(key.into_text()).ok()?, value.json()?);
                }
                fields.sort_keys();
                Json::Object(fields)
            }
            Value::Type(_) | Value::Place(_) => return None,
        })
    }

    /// What metadata holds.
    pub(super) fn of_json(value: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match value {
            Json::Null => Value::Null,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => Value::Double(n.as_f64().unwrap_or_default()),
            Json::String(text) => Value::Text(text.clone()),
            Json::Array(items) => Value::List(items.iter().map(Value::of_json).collect()),
            Json::Object(fields) => Value::of_fields(fields),
        }
    }

    pub(super) fn of_fields(fields: &Map<String, serde_json::Value>) -> Self {
        Value::Map(fields.iter().map(|(key, value)| (Value::Text(key.clone()), Value::of_json(value))).collect())
    }

    /// The name of its type.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null_type",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Uint(_) => "uint",
            Value::Double(_) => "double",
            Value::Text(_) => "string",
            Value::Bytes(_) => "bytes",
            Value::Duration(_) => "google.protobuf.Duration",
            Value::Time(_) => "google.protobuf.Timestamp",
            Value::List(_) => "list",
            Value::Map(_) | Value::Place(_) => "map",
            Value::Type(_) => "type",
        }
    }

    /// Which one is greater; `None`: nobody knows, as of different types. Numbers of all types compare.
    pub(super) fn order(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
            (Value::Bytes(a), Value::Bytes(b)) => Some(a.cmp(b)),
            (Value::Duration(a), Value::Duration(b)) | (Value::Time(a), Value::Time(b)) => Some(a.cmp(b)),
            (Value::Double(a), Value::Double(b)) => a.partial_cmp(b),
            (Value::Double(a), b) => a.partial_cmp(&(b.whole()? as f64)),
            (a, Value::Double(b)) => (a.whole()? as f64).partial_cmp(b),
            (a, b) => Some(a.whole()?.cmp(&b.whole()?)),
        }
    }

    fn whole(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some((*n).into()),
            Value::Uint(n) => Some((*n).into()),
            _ => None,
        }
    }

    /// The value under this key of a map.
    pub(super) fn at_key(entries: &[(Value, Value)], key: &Value) -> Option<Value> {
        entries.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone())
    }
}

/// Values of different types differ, but for numbers.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Value::Null, Value::Null) => true,
            (Value::Type(a), Value::Type(b)) => a == b,
            (Value::List(a), Value::List(b)) => a == b,
            (Value::Map(a), Value::Map(b)) => {
                a.len() == b.len() && a.iter().all(|(key, value)| Value::at_key(b, key).as_ref() == Some(value))
            }
            (a, b) => a.order(b) == Some(Ordering::Equal),
        }
    }
}

/// Date and time of day to the second.
fn date(nanos: i128) -> Vec<u8> {
    let seconds = u64::try_from(nanos.div_euclid(SECOND)).unwrap_or(0);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let mut out = Vec::new();
    TimeFormat::parse("%Y-%m-%dT%T").write(time, &mut out);
    out
}

/// As messages of protobuf have it: no, three, six or nine digits of a fraction.
fn fraction(nanos: i128) -> String {
    match (nanos, nanos % 1_000_000, nanos % 1000) {
        (0, ..) => String::new(),
        (_, 0, _) => format!(".{:03}", nanos / 1_000_000),
        (_, _, 0) => format!(".{:06}", nanos / 1000),
        _ => format!(".{nanos:09}"),
    }
}

/// Six digits, plain or scientific, as `%g` of C prints it.
fn general(n: f64) -> String {
    if !n.is_finite() {
        return if n.is_nan() { "nan".to_owned() } else { format!("{n}") };
    }
    let short = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    let scientific = format!("{n:.5e}");
    let Some((digits, power)) = scientific.split_once('e') else { return scientific };
    match power.parse::<i32>() {
        Ok(power @ -4..=5) => short(&format!("{n:.*}", usize::try_from(5 - power).unwrap_or(0))),
        Ok(power) => format!("{}e{}{:02}", short(digits), if power < 0 { '-' } else { '+' }, power.abs()),
        Err(_) => scientific,
    }
}

/// As Abseil's `FormatDuration` prints it.
fn short(nanos: i128) -> String {
    if nanos == 0 {
        return "0".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.abs();
    let text = match nanos {
        n if n < 1000 => format!("{n}ns"),
        n if n < 1_000_000 => format!("{}us", n as f64 / 1e3),
        n if n < SECOND => format!("{}ms", n as f64 / 1e6),
        _ => {
            let (hours, minutes) = (nanos / (3600 * SECOND), nanos / (60 * SECOND) % 60);
            let seconds = (nanos % (60 * SECOND)) as f64 / 1e9;
            let part = |n: i128, unit: &str| if n > 0 { format!("{n}{unit}") } else { String::new() };
            let seconds = if seconds > 0.0 { format!("{seconds}s") } else { String::new() };
            format!("{}{}{seconds}", part(hours, "h"), part(minutes, "m"))
        }
    };
    format!("{sign}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time_print_as_abseils_and_protobufs() {
        for (nanos, text, json) in [
            (0, "0", "0s"),
            (999, "999ns", "0.000000999s"),
            (745_783, "745.783us", "0.000745783s"),
            (5_000_000, "5ms", "0.005s"),
            (3_661_500_000_000, "1h1m1.5s", "3661.500s"),
            (-3_600_000_000_000, "-1h", "-3600s"),
        ] {
            let value = Value::Duration(nanos);
            assert_eq!(value.clone().json(), Some(json.into()));
            assert_eq!(value.into_text(), text.as_bytes());
        }
        let time = Value::Time(1_500_000_000);
        assert_eq!(time.clone().json(), Some("1970-01-01T00:00:01.500Z".into()));
        assert_eq!(time.into_text(), b"1970-01-01T00:00:01.5+00:00");
    }

    #[test]
    fn numbers_print_with_six_digits() {
        for (n, text) in [
            (4.0, "4"),
            (0.1 + 0.2, "0.3"),
            (1e21, "1e+21"),
            (123_456_789.123, "1.23457e+08"),
            (0.0015, "0.0015"),
            (0.000_01, "1e-05"),
            (-0.0, "-0"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(general(n), text);
        }
    }
}
