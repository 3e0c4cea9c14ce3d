//! The types of values. As istio reads them into its `Values` message: what the message does not know is
//! for templates alone, all else must have its type, whether a template reads it or not.

use std::collections::HashMap;
use std::sync::LazyLock;

use manifest::Document;
use serde_json::Value;

use super::ConfigError;
use crate::schema;

static TYPES: LazyLock<HashMap<&str, &str>> = LazyLock::new(|| {
    include_str!("values.types")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(' '))
        .collect()
});

/// The first value of a wrong type.
pub(super) fn check(values: &Document) -> Result<(), ConfigError> {
    let mut place = Place { pattern: String::new(), path: String::new() };
    place.inside(&values.value).map_err(|(path, expected)| values.error(&path, format!("expected {expected}")).into())
}

/// Where the walk is: in the table, and in the document.
struct Place {
    pattern: String,
    path: String,
}

type Wrong = (String, &'static str);

impl Place {
    fn inside(&mut self, value: &Value) -> Result<(), Wrong> {
        match value {
            Value::Object(map) => map.iter().try_for_each(|(key, value)| {
                let dot = if self.path.is_empty() { "" } else { "." };
                let any = TYPES.contains_key(format!("{}.*", self.pattern).as_str());
                let name = if any { "*".to_owned() } else { schema::camel_case(key) };
                let shown = if key.contains(['.', '[']) { format!("[{key:?}]") } else { format!("{dot}{key}") };
                self.step(&format!("{dot}{name}"), &shown, value)
            }),
            Value::Array(items) => {
                items.iter().enumerate().try_for_each(|(index, item)| self.step("[]", &format!("[{index}]"), item))
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, pattern: &str, path: &str, value: &Value) -> Result<(), Wrong> {
        let lengths = (self.pattern.len(), self.path.len());
        self.pattern.push_str(pattern);
        self.path.push_str(path);
        let result = match TYPES.get(self.pattern.as_str()).filter(|_| !value.is_null()) {
            Some(ty) => match fault(ty, value) {
                Some(expected) => Err((self.path.clone(), expected)),
                None => self.inside(value),
            },
            None => Ok(()),
        };
        self.pattern.truncate(lengths.0);
        self.path.truncate(lengths.1);
        result
    }
}

/// What the type would have been.
fn fault(ty: &str, value: &Value) -> Option<&'static str> {
    let number = || value.as_f64().or_else(|| value.as_str()?.parse().ok());
    let whole = |least: f64| number().is_some_and(|number: f64| number.fract() == 0.0 && number >= least);
    let (fine, expected) = match ty {
        "string" => (value.is_string(), "a string"),
        "bool" => (value.is_boolean(), "a boolean"),
        "int" => (whole(f64::MIN), "an integer"),
        "uint" => (whole(0.0), "an integer that is not negative"),
        "number" => (number().is_some(), "a number"),
        "list" => (value.is_array(), "a list"),
        "object" => (value.is_object(), "an object"),
        _ => (value.is_string() || value.is_number(), "a name"),
    };
    (!fine).then_some(expected)
}
