//! Arguments of a call, with Go's complaints about their types.

use crate::format;
use crate::value::{Element, List, Map, Text, Typed, Value};

/// The arguments of one call.
#[derive(Clone, Copy)]
pub struct Args<'a, 'b> {
    values: &'b [Value<'a>],
    /// Bit n: argument n is a constant, which Go reads as the type that the function wants.
    constants: u64,
}

impl<'a, 'b> Args<'a, 'b> {
    pub(crate) fn new(values: &'b [Value<'a>], constants: u64) -> Self {
        Self { values, constants }
    }

    fn constant(&self, index: usize) -> bool {
        index < 64 && self.constants >> index & 1 == 1
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub fn all(&self) -> &'b [Value<'a>] {
        self.values
    }

    /// An argument that is known to be there from the function's declared number of arguments.
    pub fn get(&self, index: usize) -> &'b Value<'a> {
        self.values.get(index).unwrap_or(const { &Value::Nil })
    }

    /// An argument declared as `string`.
    pub fn text(&self, index: usize) -> Result<&'b str, String> {
        match self.get(index) {
            Value::Str(Text::Borrowed(text)) => Ok(text),
            Value::Str(Text::Shared(text)) => Ok(text),
            // What a pointer to a string points at is borrowed from the data.
            Value::Typed(typed) => match self.get(index).target() {
                Some(Value::Str(Text::Borrowed(_))) => Ok(typed.data.as_str().unwrap_or_default()),
                _ => Err(wrong_type("string", self.get(index))),
            },
            other => Err(wrong_type("string", other)),
        }
    }

    /// An argument declared as `interface{}` that sprig turns into a string by `strval`.
    pub fn strval(&self, index: usize) -> String {
        format::strval(self.get(index))
    }

    /// An argument declared as `int`.
    pub fn int(&self, index: usize) -> Result<i64, String> {
        match self.get(index) {
            Value::Int(value, "int") => Ok(*value),
            // A constant such as 2.0 is an int where one is wanted.
            Value::Float(value) if self.constant(index) && value.fract() == 0.0 && value.abs() < 1e18 => {
                Ok(*value as i64)
            }
            other => Err(wrong_type("int", other)),
        }
    }

    /// An argument declared as `interface{}` that sprig turns into an integer by `cast.ToInt64`.
    pub fn to_int(&self, index: usize) -> i64 {
        format::to_int(self.get(index))
    }

    /// As [`Self::to_int`], by `cast.ToFloat64`.
    pub fn to_float(&self, index: usize) -> f64 {
        format::to_float(self.get(index))
    }

    /// An argument declared as `time.Time`: seconds and nanoseconds since 1970.
    pub fn time(&self, index: usize) -> Result<(i64, u32), String> {
        match self.get(index) {
            Value::Time(seconds, nanos) => Ok((*seconds, *nanos)),
            other => Err(wrong_type("time.Time", other)),
        }
    }

    pub fn bool(&self, index: usize) -> Result<bool, String> {
        match self.get(index) {
            Value::Bool(value) => Ok(*value),
            other => match other.target() {
                Some(Value::Bool(value)) => Ok(value),
                _ => Err(wrong_type("bool", other)),
            },
        }
    }

    /// An argument that must be a list; `function` is named in the complaint.
    pub fn list(&self, index: usize, function: &str) -> Result<&'b List<'a>, String> {
        match self.get(index) {
            Value::List(list) => Ok(list),
            other => Err(format!("Cannot find {function} on type {}", other.kind())),
        }
    }

    /// An argument declared as `map[string]interface{}`; nil is an empty map.
    pub fn map(&self, index: usize) -> Result<Map<'a>, String> {
        self.map_of(index, Element::Any, "map[string]interface {}")
    }

    /// An argument declared as `map[string]string`; nil is an empty map.
    pub fn text_map(&self, index: usize) -> Result<Map<'a>, String> {
        self.map_of(index, Element::Text, "map[string]string")
    }

    fn map_of(&self, index: usize, element: Element, expected: &str) -> Result<Map<'a>, String> {
        match self.get(index) {
            Value::Map(map) if map.element() == element => Ok(map.clone()),
            Value::Nil => Ok(Map::nil(element)),
            other => Err(wrong_type(expected, other)),
        }
    }

    /// An argument that is a struct of the data.
    pub fn typed(&self, index: usize) -> Option<Typed<'a>> {
        match self.get(index) {
            Value::Typed(typed) => Some(*typed),
            _ => None,
        }
    }
}

fn wrong_type(expected: &str, found: &Value<'_>) -> String {
    match found {
        Value::Nil => format!("invalid value; expected {expected}"),
        _ => format!("wrong type for value; expected {expected}; got {}", found.type_name()),
    }
}
