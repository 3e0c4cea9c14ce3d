//! Values that templates compute with: Go's dynamic types, reduced to what injection templates meet.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::Value as Json;

use crate::functions::Version;
use crate::json;

/// A Go value. Lists and maps of the data are borrowed; what functions make is shared.
#[derive(Clone)]
pub enum Value<'a> {
    /// The untyped nil: a missing map key, a JSON null.
    Nil,
    Bool(bool),
    /// Any of Go's integers; the name is the Go type, such as `int` or `uint8`.
    Int(i64, &'static str),
    Float(f64),
    Complex(f64, f64),
    Str(Text<'a>),
    List(List<'a>),
    Map(Map<'a>),
    /// A Go struct seen through its JSON form.
    Typed(Typed<'a>),
    /// A struct made of values, such as the data that a template is started with.
    Record(Rc<Record<'a>>),
    /// A named integer type that prints as its name.
    Enum(Enum<'a>),
    /// A `time.Time`: seconds and nanoseconds since 1970.
    Time(i64, u32),
    /// sprig's `*semver.Version`.
    Version(Rc<Version>),
}

/// A string, borrowed from data or template, or shared.
#[derive(Clone)]
pub enum Text<'a> {
    Borrowed(&'a str),
    Shared(Rc<str>),
}

impl Text<'_> {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Borrowed(text) => text,
            Self::Shared(text) => text,
        }
    }
}

/// A slice.
#[derive(Clone)]
pub enum List<'a> {
    /// A `[]interface{}` of the data.
    Json(&'a [Json]),
    Shared(Rc<Vec<Value<'a>>>),
    /// A slice of something else than `interface{}`; the name is the Go type, such as `[]string`.
    Typed(Rc<Vec<Value<'a>>>, &'static str),
    /// A nil slice of that Go type: empty, and `null` in JSON.
    Nil(&'static str),
}

/// What a map's values are declared as: it decides what `index` gives for a missing key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `map[string]interface{}`
    Any,
    /// `map[string]string`
    Text,
}

/// A map with string keys.
#[derive(Clone)]
pub struct Map<'a> {
    pub(crate) element: Element,
    pub(crate) entries: Entries<'a>,
}

#[derive(Clone)]
pub(crate) enum Entries<'a> {
    /// A nil map: empty, and `null` in JSON.
    Nil,
    Json(&'a serde_json::Map<String, Json>),
    Shared(Rc<RefCell<BTreeMap<Rc<str>, Value<'a>>>>),
}

/// A struct (or pointer to one) that is a view of JSON.
#[derive(Clone, Copy)]
pub struct Typed<'a> {
    /// How the JSON is read.
    pub ty: &'static dyn Type,
    /// The struct's JSON; null for a struct whose fields are all unset.
    pub data: &'a Json,
    /// A nil pointer: false, without fields, but with methods.
    pub nil: bool,
}

/// The declaration of a struct type whose values are JSON.
pub trait Type: Send + Sync {
    /// The Go name, such as `v1.Container`.
    fn name(&self) -> &str;
    /// The field of that Go name; `None` when the type has none.
    fn field<'a>(&'static self, data: &'a Json, name: &str) -> Option<Value<'a>>;
    /// The result of the method of that name without arguments; `None` when the type has none.
    /// `nil` tells that the receiver is a nil pointer.
    fn method<'a>(&'static self, data: &'a Json, nil: bool, name: &str) -> Option<Value<'a>>;
    /// The Go names of the fields in their order, for printing.
    fn fields(&self) -> Vec<&str>;
    /// What a pointer to a scalar points at, which is what functions that take the scalar get; structs have none.
    fn target<'a>(&'static self, _data: &'a Json) -> Option<Value<'a>> {
        None
    }
    /// What Go's `encoding/json` would write.
    fn to_json(&'static self, data: &Json) -> Json;
    /// What the type prints as, when it has a `String` method.
    fn display(&self, data: &Json) -> Option<String>;
}

/// A struct with fields of any value. A field that is not declared is an error, not "no value".
pub struct Record<'a> {
    pub name: &'static str,
    pub fields: Vec<(&'static str, Value<'a>)>,
}

/// A protobuf enum's value.
#[derive(Clone, Copy)]
pub struct Enum<'a> {
    pub ty: &'static str,
    pub name: &'a str,
    pub number: i32,
}

impl<'a> Map<'a> {
    pub fn nil(element: Element) -> Self {
        Self { element, entries: Entries::Nil }
    }

    pub fn json(element: Element, map: &'a serde_json::Map<String, Json>) -> Self {
        Self { element, entries: Entries::Json(map) }
    }

    pub fn new(element: Element, entries: impl IntoIterator<Item = (Rc<str>, Value<'a>)>) -> Self {
        Self { element, entries: Entries::Shared(Rc::new(RefCell::new(entries.into_iter().collect()))) }
    }

    pub fn element(&self) -> Element {
        self.element
    }

    pub fn is_nil(&self) -> bool {
        matches!(self.entries, Entries::Nil)
    }

    pub fn len(&self) -> usize {
        match &self.entries {
            Entries::Nil => 0,
            Entries::Json(map) => map.len(),
            Entries::Shared(map) => map.borrow().len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        match &self.entries {
            Entries::Nil => None,
            Entries::Json(map) => map.get(key).map(|value| self.lift(value)),
            Entries::Shared(map) => map.borrow().get(key).cloned(),
        }
    }

    fn lift(&self, value: &'a Json) -> Value<'a> {
        match (self.element, value) {
            (Element::Text, Json::Null) => Value::from(""),
            _ => Value::from_json(value),
        }
    }

    /// What a missing key gives where Go gives the element type's zero value.
    pub fn zero(&self) -> Value<'a> {
        match self.element {
            Element::Any => Value::Nil,
            Element::Text => Value::from(""),
        }
    }

    /// Entries in key order, as Go ranges and prints.
    pub fn entries(&self) -> Vec<(Rc<str>, Value<'a>)> {
        match &self.entries {
            Entries::Nil => Vec::new(),
            Entries::Json(map) => {
                let mut entries: Vec<(&String, &'a Json)> = map.iter().collect();
                entries.sort_by(|a, b| a.0.cmp(b.0));
                entries.into_iter().map(|(key, value)| (Rc::from(key.as_str()), self.lift(value))).collect()
            }
            Entries::Shared(map) => map.borrow().iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        }
    }

    /// Keys in order.
    pub fn keys(&self) -> Vec<Rc<str>> {
        self.entries().into_iter().map(|(key, _)| key).collect()
    }

    /// Changes the map in place, see [`Value::changeable`].
    pub(crate) fn update(&self, change: impl FnOnce(&mut BTreeMap<Rc<str>, Value<'a>>)) -> Self {
        match &self.entries {
            Entries::Shared(map) => {
                change(&mut map.borrow_mut());
                self.clone()
            }
            _ => {
                let mut entries = self.entries().into_iter().collect();
                change(&mut entries);
                Self::new(self.element, entries)
            }
        }
    }
}

impl<'a> List<'a> {
    pub fn new(items: Vec<Value<'a>>) -> Self {
        Self::Shared(Rc::new(items))
    }

    /// A slice of the Go type `ty`, such as `[]string`.
    pub fn typed(items: Vec<Value<'a>>, ty: &'static str) -> Self {
        Self::Typed(Rc::new(items), ty)
    }

    /// The Go type's name.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Typed(_, ty) | Self::Nil(ty) => ty,
            _ => "[]interface {}",
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Json(items) => items.len(),
            Self::Shared(items) | Self::Typed(items, _) => items.len(),
            Self::Nil(_) => 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn get(&self, index: usize) -> Option<Value<'a>> {
        match self {
            Self::Json(items) => items.get(index).map(Value::from_json),
            Self::Shared(items) | Self::Typed(items, _) => items.get(index).cloned(),
            Self::Nil(_) => None,
        }
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Value<'a>> + '_ {
        (0..self.len()).map(|index| self.get(index).unwrap_or(Value::Nil))
    }

    pub fn to_vec(&self) -> Vec<Value<'a>> {
        self.iter().collect()
    }
}

impl<'a> Value<'a> {
    /// The value as Go decodes JSON into `interface{}`: every number is a float64.
    pub fn from_json(value: &'a Json) -> Self {
        match value {
            Json::Null => Self::Nil,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            Json::String(text) => Self::Str(Text::Borrowed(text)),
            Json::Array(items) => Self::List(List::Json(items)),
            Json::Object(map) => Self::Map(Map::json(Element::Any, map)),
        }
    }

    /// As [`Self::from_json`], for JSON that nobody else keeps.
    pub fn from_owned_json(value: Json) -> Self {
        match value {
            Json::Null => Value::Nil,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(number) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            Json::String(text) => Value::from(text),
            Json::Array(items) => Value::List(List::new(items.into_iter().map(Value::from_owned_json).collect())),
            Json::Object(map) => Value::Map(Map::new(
                Element::Any,
                map.into_iter().map(|(key, value)| (Rc::from(key), Value::from_owned_json(value))),
            )),
        }
    }

    pub fn int(value: i64) -> Self {
        Self::Int(value, "int")
    }

    pub fn list(items: Vec<Value<'a>>) -> Self {
        Self::List(List::new(items))
    }

    /// A `[]string`.
    pub fn texts(items: impl IntoIterator<Item = String>) -> Self {
        Self::List(List::typed(items.into_iter().map(Value::from).collect(), "[]string"))
    }

    /// `if`'s test. As Go's `text/template` `IsTrue`.
    pub fn truth(&self) -> bool {
        match self {
            Self::Nil => false,
            Self::Bool(value) => *value,
            Self::Int(value, _) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Complex(re, im) => *re != 0.0 || *im != 0.0,
            Self::Str(text) => !text.as_str().is_empty(),
            Self::List(list) => !list.is_empty(),
            Self::Map(map) => !map.is_empty(),
            Self::Typed(typed) => !typed.nil,
            Self::Enum(value) => value.number != 0,
            Self::Record(_) | Self::Time(..) | Self::Version(_) => true,
        }
    }

    /// How many values there are in the lists and maps that functions made; `None` when they are nested
    /// more than `depth` deep or are more than `most`.
    pub(crate) fn count(&self, depth: usize, most: usize) -> Option<usize> {
        let mut counted = 1;
        let mut add = |item: &Value<'a>| -> Option<()> {
            counted += item.count(depth.checked_sub(1)?, most.checked_sub(counted)?)?;
            Some(())
        };
        match self {
            Self::List(List::Shared(items) | List::Typed(items, _)) => items.iter().try_for_each(&mut add)?,
            Self::Map(Map { entries: Entries::Shared(map), .. }) => map.borrow().values().try_for_each(&mut add)?,
            _ => {}
        }
        Some(counted)
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// The value with dictionaries of its own instead of the data's, so that what changes one is seen by
    /// whoever reads it later in the same rendering.
    ///
    /// DIFFERS: sprig's set would change the values for every later pod too.
    pub(crate) fn changeable(&self) -> Value<'a> {
        match self {
            Self::List(list @ List::Json(_)) => Self::list(list.iter().map(|item| item.changeable()).collect()),
            Self::Map(Map { element: Element::Any, entries: Entries::Json(map) }) => Self::Map(Map::new(
                Element::Any,
                map.iter().map(|(key, value)| (Rc::from(key.as_str()), Self::from_json(value).changeable())),
            )),
            Self::Record(record) => Self::Record(Rc::new(Record {
                name: record.name,
                fields: record.fields.iter().map(|(name, value)| (*name, value.changeable())).collect(),
            })),
            other => other.clone(),
        }
    }

    /// What a pointer to a scalar points at; `None` for all else and for nil pointers.
    pub(crate) fn target(&self) -> Option<Value<'a>> {
        match self {
            Self::Typed(typed) if !typed.nil => typed.ty.target(typed.data),
            _ => None,
        }
    }

    /// A nil list, map or pointer, or no value at all.
    pub(crate) fn is_nil(&self) -> bool {
        match self {
            Self::Nil | Self::List(List::Nil(_)) => true,
            Self::Map(map) => map.is_nil(),
            Self::Typed(typed) => typed.nil,
            _ => false,
        }
    }

    /// The Go type's name, as `%T` prints it.
    pub fn type_name(&self) -> String {
        match self {
            Self::Nil => "<nil>".to_owned(),
            Self::Bool(_) => "bool".to_owned(),
            Self::Int(_, name) => (*name).to_owned(),
            Self::Float(_) => "float64".to_owned(),
            Self::Complex(..) => "complex128".to_owned(),
            Self::Str(_) => "string".to_owned(),
            Self::List(list) => list.type_name().to_owned(),
            Self::Map(map) if map.element == Element::Text => "map[string]string".to_owned(),
            Self::Map(_) => "map[string]interface {}".to_owned(),
            Self::Typed(typed) => typed.ty.name().to_owned(),
            Self::Record(record) => record.name.to_owned(),
            Self::Enum(value) => value.ty.to_owned(),
            Self::Time(..) => "time.Time".to_owned(),
            Self::Version(_) => "*semver.Version".to_owned(),
        }
    }

    /// The Go kind's name, as sprig's `kindOf` says it.
    pub fn kind(&self) -> &str {
        match self {
            Self::Nil => "invalid",
            Self::Bool(_) => "bool",
            Self::Int(_, name) => name,
            Self::Float(_) => "float64",
            Self::Complex(..) => "complex128",
            Self::Str(_) => "string",
            Self::List(_) => "slice",
            Self::Map(_) => "map",
            Self::Typed(typed) if typed.nil || typed.ty.name().starts_with('*') => "ptr",
            Self::Version(_) => "ptr",
            Self::Typed(_) | Self::Record(_) | Self::Time(..) => "struct",
            Self::Enum(_) => "int32",
        }
    }

    /// What `encoding/json` makes of it; keys of maps are sorted.
    pub fn to_json(&self) -> Json {
        match self {
            Self::Nil => Json::Null,
            Self::Bool(value) => Json::Bool(*value),
            Self::Int(value, _) => Json::from(*value),
            Self::Float(value) => json::number(*value),
            Self::Complex(..) => Json::Null,
            Self::Str(text) => Json::from(text.as_str()),
            Self::List(List::Nil(_)) => Json::Null,
            Self::List(list) => Json::Array(list.iter().map(|item| item.to_json()).collect()),
            Self::Map(map) if map.is_nil() => Json::Null,
            Self::Map(map) => {
                Json::Object(map.entries().into_iter().map(|(key, value)| (key.to_string(), value.to_json())).collect())
            }
            Self::Typed(typed) if typed.nil => Json::Null,
            Self::Typed(typed) => typed.ty.to_json(typed.data),
            Self::Record(record) => {
                Json::Object(record.fields.iter().map(|(name, value)| ((*name).to_owned(), value.to_json())).collect())
            }
            Self::Enum(value) => Json::from(value.number),
            Self::Time(seconds, nanos) => Json::from(crate::time::rfc3339(*seconds, *nanos)),
            Self::Version(version) => Json::from(version.to_string()),
        }
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Str(Text::Borrowed(text))
    }
}

impl From<String> for Value<'_> {
    fn from(text: String) -> Self {
        Self::Str(Text::Shared(Rc::from(text)))
    }
}

impl From<bool> for Value<'_> {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

/// `reflect.DeepEqual`, but numbers and strings of different types are never equal.
impl PartialEq for Value<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Nil, Self::Nil) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a, x), Self::Int(b, y)) => a == b && x == y,
            (Self::Float(a), Self::Float(b)) => a == b,
            (Self::Complex(a, b), Self::Complex(c, d)) => a == c && b == d,
            (Self::Str(a), Self::Str(b)) => a.as_str() == b.as_str(),
            (Self::List(a), Self::List(b)) => {
                a.type_name() == b.type_name() && a.len() == b.len() && a.iter().zip(b.iter()).all(|(a, b)| a == b)
            }
            (Self::Map(a), Self::Map(b)) => a.element == b.element && a.entries() == b.entries(),
            (Self::Version(a), Self::Version(b)) => a == b,
            (Self::Enum(a), Self::Enum(b)) => a.ty == b.ty && a.number == b.number,
            (Self::Time(a, b), Self::Time(c, d)) => a == c && b == d,
            (Self::Typed(a), Self::Typed(b)) => a.ty.name() == b.ty.name() && a.nil == b.nil && a.data == b.data,
            _ => false,
        }
    }
}
