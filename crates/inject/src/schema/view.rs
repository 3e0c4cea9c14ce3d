//! Templates' view of objects: Go field names over JSON.

use go_template::{Element, Enum, List, Map, NULL, Type, Typed, Value};
use serde_json::Value as Json;

use super::{Kind, SCHEMA, TypeDef, decode, enumeration};

/// The object as a value of its Go type.
pub(crate) fn view<'a>(ty: &'static TypeDef, data: &'a Json) -> Value<'a> {
    Value::Typed(Typed { ty, data, nil: false })
}

impl Type for TypeDef {
    fn name(&self) -> &str {
        &self.name
    }

    fn field<'a>(&'static self, data: &'a Json, name: &str) -> Option<Value<'a>> {
        match self.by_go(name) {
            // An embedded struct reads the same JSON.
            Some(field) if field.inline => {
                let ty = field.kind.definition()?;
                Some(Value::Typed(Typed { ty, data, nil: false }))
            }
            Some(field) => Some(value(&field.kind, data.get(field.json).unwrap_or(&NULL))),
            None => self.oneof(data, name),
        }
    }

    /// Getters of protobuf messages, which a nil pointer has too.
    fn method<'a>(&'static self, data: &'a Json, nil: bool, name: &str) -> Option<Value<'a>> {
        let field = self.by_go(name.strip_prefix("Get")?)?;
        let data = if nil { &NULL } else { data.get(field.json).unwrap_or(&NULL) };
        Some(value(&field.kind, data))
    }

    fn fields(&self) -> Vec<&str> {
        self.fields.iter().filter(|field| !field.inline).map(|field| field.go).collect()
    }

    fn to_json(&'static self, data: &Json) -> Json {
        decode(self, data).unwrap_or(Json::Null)
    }

    fn display(&self, _: &Json) -> Option<String> {
        None
    }
}

impl TypeDef {
    /// A oneof's field holds the member that is set, in a struct of its own with that only field.
    fn oneof<'a>(&'static self, data: &'a Json, name: &str) -> Option<Value<'a>> {
        let mut members = self.fields.iter().filter(|field| field.oneof == Some(name)).peekable();
        members.peek()?;
        let set = members.find(|field| data.get(field.json).is_some_and(|value| !value.is_null()));
        Some(match set {
            Some(_) => Value::Typed(Typed { ty: &SCHEMA.types[self.index], data, nil: false }),
            None => Value::Nil,
        })
    }
}

/// A field's value by its declared type; null is the zero value.
fn value<'a>(kind: &Kind, data: &'a Json) -> Value<'a> {
    match kind {
        Kind::Text | Kind::Bytes => Value::from(data.as_str().unwrap_or("")),
        Kind::Bool => Value::Bool(data.as_bool().unwrap_or(false)),
        Kind::Int(name) => Value::Int(data.as_i64().unwrap_or(0), name),
        Kind::Float => Value::Float(data.as_f64().unwrap_or(0.0)),
        Kind::Quantity => scalar(&QUANTITY, data, false),
        Kind::Time => scalar(&TIME, data, false),
        Kind::IntOrString => scalar(&INT_OR_STRING, data, false),
        Kind::Any => Value::from_json(data),
        Kind::Duration => scalar(&DURATION, data, data.is_null()),
        Kind::Wrapped(name) => scalar(wrapper(name), data, data.is_null()),
        Kind::Struct(_) => match kind.definition() {
            Some(ty) => Value::Typed(Typed { ty, data, nil: false }),
            None => Value::Nil,
        },
        Kind::Pointer(inner) => pointer(inner, data),
        Kind::List(inner) => Value::List(match data.as_array() {
            None => List::Nil(if **inner == Kind::Text { "[]string" } else { "[]interface {}" }),
            Some(items) => List::new(items.iter().map(|item| value(inner, item)).collect()),
        }),
        Kind::Map(inner) => {
            let element = if **inner == Kind::Text { Element::Text } else { Element::Any };
            match data.as_object() {
                None => Value::Map(Map::nil(element)),
                Some(map) if matches!(**inner, Kind::Text | Kind::Any) => Value::Map(Map::json(element, map)),
                Some(map) => Value::Map(Map::new(
                    element,
                    map.iter().map(|(key, item)| (key.as_str().into(), value(inner, item))),
                )),
            }
        }
        Kind::Enum(index) => {
            let ty = enumeration(*index);
            let name = data.as_str().or_else(|| ty.names.first().copied()).unwrap_or("");
            let number = ty.names.iter().position(|known| *known == name);
            Value::Enum(Enum { ty: &ty.go, name, number: number.and_then(|at| i32::try_from(at).ok()).unwrap_or(-1) })
        }
    }
}

/// A pointer to a scalar is true and not empty when set, whatever it points at, so it stays a pointer.
///
/// DIFFERS: Go prints a pointer within a list as an address; here it is always the value.
fn pointer<'a>(inner: &Kind, data: &'a Json) -> Value<'a> {
    match inner {
        Kind::Struct(_) => match inner.definition() {
            Some(ty) => Value::Typed(Typed { ty, data, nil: data.is_null() }),
            None => Value::Nil,
        },
        Kind::Duration | Kind::Wrapped(_) => value(inner, data),
        Kind::Text => scalar(&TEXT_POINTER, data, data.is_null()),
        Kind::Bool => scalar(&BOOL_POINTER, data, data.is_null()),
        Kind::Int("int32") => scalar(&INT32_POINTER, data, data.is_null()),
        Kind::Int(_) => scalar(&INT64_POINTER, data, data.is_null()),
        _ if data.is_null() => Value::Nil,
        _ => value(inner, data),
    }
}

fn scalar<'a>(ty: &'static Scalar, data: &'a Json, nil: bool) -> Value<'a> {
    Value::Typed(Typed { ty, data, nil })
}

/// A Go struct that is a scalar in JSON.
struct Scalar {
    name: &'static str,
    fields: &'static [&'static str],
}

static QUANTITY: Scalar = Scalar { name: "resource.Quantity", fields: &["Format"] };
static TIME: Scalar = Scalar { name: "v1.Time", fields: &["Time"] };
static INT_OR_STRING: Scalar = Scalar { name: "intstr.IntOrString", fields: &["Type", "IntVal", "StrVal"] };
static TEXT_POINTER: Scalar = Scalar { name: "*string", fields: &[] };
static BOOL_POINTER: Scalar = Scalar { name: "*bool", fields: &[] };
static INT32_POINTER: Scalar = Scalar { name: "*int32", fields: &[] };
static INT64_POINTER: Scalar = Scalar { name: "*int64", fields: &[] };
static DURATION: Scalar = Scalar { name: "durationpb.Duration", fields: &["Seconds", "Nanos"] };
static BOOL_VALUE: Scalar = Scalar { name: "wrapperspb.BoolValue", fields: &["Value"] };
static INT_VALUE: Scalar = Scalar { name: "wrapperspb.Int32Value", fields: &["Value"] };
static UINT_VALUE: Scalar = Scalar { name: "wrapperspb.UInt32Value", fields: &["Value"] };
static DOUBLE_VALUE: Scalar = Scalar { name: "wrapperspb.DoubleValue", fields: &["Value"] };
static STRING_VALUE: Scalar = Scalar { name: "wrapperspb.StringValue", fields: &["Value"] };

fn wrapper(name: &str) -> &'static Scalar {
    match name {
        "BoolValue" => &BOOL_VALUE,
        "StringValue" => &STRING_VALUE,
        "DoubleValue" | "FloatValue" => &DOUBLE_VALUE,
        "UInt32Value" | "UInt64Value" => &UINT_VALUE,
        _ => &INT_VALUE,
    }
}

impl Scalar {
    fn wrapped<'a>(&self, data: &'a Json) -> Value<'a> {
        match self.name {
            "wrapperspb.BoolValue" => Value::Bool(data.as_bool().unwrap_or(false)),
            "wrapperspb.StringValue" => Value::from(data.as_str().unwrap_or("")),
            "wrapperspb.DoubleValue" => Value::Float(data.as_f64().unwrap_or(0.0)),
            "wrapperspb.UInt32Value" => Value::Int(data.as_i64().unwrap_or(0), "uint32"),
            _ => Value::Int(data.as_i64().unwrap_or(0), "int32"),
        }
    }
}

impl Type for Scalar {
    fn name(&self) -> &str {
        self.name
    }

    fn field<'a>(&'static self, data: &'a Json, name: &str) -> Option<Value<'a>> {
        let nanos = || data.as_str().and_then(crate::duration::nanoseconds).unwrap_or(0);
        Some(match name {
            _ if !self.fields.contains(&name) => return None,
            "Value" => self.wrapped(data),
            "Seconds" => Value::Int(i64::try_from(nanos() / 1_000_000_000).unwrap_or(0), "int64"),
            "Nanos" => Value::Int(i64::try_from(nanos() % 1_000_000_000).unwrap_or(0), "int32"),
            "Type" => Value::Int(i64::from(data.is_string()), "int64"),
            "IntVal" => Value::Int(data.as_i64().unwrap_or(0), "int32"),
            _ => Value::from(data.as_str().unwrap_or("")),
        })
    }

    fn method<'a>(&'static self, data: &'a Json, nil: bool, name: &str) -> Option<Value<'a>> {
        let data = if nil { &NULL } else { data };
        match name {
            "GetValue" if self.fields == ["Value"] => Some(self.wrapped(data)),
            "GetSeconds" | "GetNanos" => self.field(data, &name[3..]),
            "AsDuration" if self.fields.first() == Some(&"Seconds") => {
                let nanos = data.as_str().and_then(crate::duration::nanoseconds).unwrap_or(0);
                Some(Value::from(crate::duration::display(nanos)))
            }
            "String" | "GetString" if !self.fields.is_empty() => {
                Some(Value::from(self.display(data).unwrap_or_default()))
            }
            "IntValue" if self.fields.first() == Some(&"Type") => {
                let number = data.as_i64().or_else(|| data.as_str()?.parse().ok()).unwrap_or(0);
                Some(Value::int(number))
            }
            _ => None,
        }
    }

    fn fields(&self) -> Vec<&str> {
        self.fields.to_vec()
    }

    fn target<'a>(&'static self, data: &'a Json) -> Option<Value<'a>> {
        Some(match self.name {
            "*string" => Value::from(data.as_str().unwrap_or("")),
            "*bool" => Value::Bool(data.as_bool().unwrap_or(false)),
            "*int32" => Value::Int(data.as_i64().unwrap_or(0), "int32"),
            "*int64" => Value::Int(data.as_i64().unwrap_or(0), "int64"),
            _ => return None,
        })
    }

    fn to_json(&'static self, data: &Json) -> Json {
        data.clone()
    }

    fn display(&self, data: &Json) -> Option<String> {
        Some(match data {
            Json::String(text) => text.clone(),
            Json::Null => String::new(),
            other => other.to_string(),
        })
    }
}
