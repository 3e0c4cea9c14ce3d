//! The functions that `text/template` itself defines.

use std::cmp::Ordering;
use std::fmt::Write;

use super::{Args, Functions, Outcome};
use crate::format;
use crate::value::{List, Value};

pub(super) fn define(functions: &mut Functions) {
    // The executor runs these two itself, to stop at the argument that decides.
    functions.define("and", 1, None, |args| Ok(args.get(args.len() - 1).clone()));
    functions.define("or", 1, None, |args| Ok(args.get(args.len() - 1).clone()));
    functions.define("not", 1, Some(1), |args| Ok(Value::Bool(!args.get(0).truth())));
    functions.define("len", 1, Some(1), len);
    functions.define("index", 1, None, index);
    functions.define("slice", 1, Some(4), slice);
    functions.define("call", 1, None, |args| {
        let value = args.get(0);
        Err(match value {
            Value::Nil => "call of nil".to_owned(),
            _ => format!("non-function of type {}", value.type_name()),
        })
    });
    functions.define("eq", 1, None, |args| Ok(Value::Bool(eq(args)?)));
    functions.define("ne", 2, Some(2), |args| Ok(Value::Bool(!eq(args)?)));
    functions.define("lt", 2, Some(2), |args| Ok(Value::Bool(less(args.get(0), args.get(1))?)));
    functions.define("le", 2, Some(2), |args| Ok(Value::Bool(less(args.get(0), args.get(1))? || eq(args)?)));
    functions.define("gt", 2, Some(2), |args| Ok(Value::Bool(!less(args.get(0), args.get(1))? && !eq(args)?)));
    functions.define("ge", 2, Some(2), |args| Ok(Value::Bool(!less(args.get(0), args.get(1))?)));
    functions.define("print", 0, None, |args| Ok(Value::from(format::sprint_all(args.all()))));
    functions.define("println", 0, None, |args| {
        let words: Vec<String> = args.all().iter().map(format::sprint).collect();
        Ok(Value::from(words.join(" ") + "\n"))
    });
    functions.define("printf", 1, None, |args| {
        Ok(Value::from(format::sprintf(args.text(0)?, args.all().get(1..).unwrap_or_default())))
    });
    functions.define("html", 0, None, |args| Ok(Value::from(html(&joined(args)))));
    functions.define("js", 0, None, |args| Ok(Value::from(js(&joined(args)))));
    functions.define("urlquery", 0, None, |args| Ok(Value::from(url_query(&joined(args)))));
}

/// What the escaping functions work on: the arguments as `print` writes them.
fn joined(args: Args<'_, '_>) -> String {
    let values: Vec<Value<'_>> = args
        .all()
        .iter()
        .map(|value| if matches!(value, Value::Nil) { Value::from("<no value>") } else { value.clone() })
        .collect();
    format::sprint_all(&values)
}

fn len<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    Ok(Value::int(match args.get(0) {
        Value::Str(text) => text.as_str().len(),
        Value::List(list) => list.len(),
        Value::Map(map) => map.len(),
        Value::Nil => return Err("len of nil pointer".to_owned()),
        other => return Err(format!("len of type {}", other.type_name())),
    } as i64))
}

fn position(value: &Value<'_>, length: usize) -> Result<usize, String> {
    match value {
        Value::Int(at, _) if usize::try_from(*at).is_ok_and(|at| at < length) => Ok(*at as usize),
        Value::Int(at, _) => Err(format!("index out of range: {at}")),
        Value::Nil => Err("cannot index slice/array with nil".to_owned()),
        other => Err(format!("cannot index slice/array with type {}", other.type_name())),
    }
}

fn index<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let mut item = args.get(0).clone();
    if matches!(item, Value::Nil) {
        return Err("index of untyped nil".to_owned());
    }
    for key in args.all().get(1..).unwrap_or_default() {
        item = match &item {
            Value::Map(map) => match key {
                Value::Str(name) => map.get(name.as_str()).unwrap_or_else(|| map.zero()),
                Value::Nil => return Err("value is nil; should be of type string".to_owned()),
                other => return Err(format!("value has type {}; should be string", other.type_name())),
            },
            Value::List(list) => {
                let at = position(key, list.len())?;
                list.get(at).unwrap_or(Value::Nil)
            }
            Value::Str(text) => {
                let bytes = text.as_str().as_bytes();
                Value::Int(i64::from(bytes[position(key, bytes.len())?]), "uint8")
            }
            Value::Nil => return Err("index of nil pointer".to_owned()),
            other => return Err(format!("can't index item of type {}", other.type_name())),
        };
    }
    Ok(item)
}

/// Go's own `slice`, which sprig replaces by one for lists only.
fn slice<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let bounds = |length: usize| -> Result<(usize, usize), String> {
        let at = |index: usize, default: usize| match args.all().get(index) {
            None => Ok(default),
            Some(Value::Int(at, _)) if usize::try_from(*at).is_ok_and(|at| at <= length) => Ok(*at as usize),
            Some(Value::Int(at, _)) => Err(format!("index out of range: {at}")),
            Some(other) => Err(format!("cannot index slice/array with type {}", other.type_name())),
        };
        let (from, to) = (at(1, 0)?, at(2, length)?);
        if from > to { Err(format!("invalid slice index: {from} > {to}")) } else { Ok((from, to)) }
    };
    match args.get(0) {
        Value::Str(text) => {
            let (from, to) = bounds(text.as_str().len())?;
            let bytes = &text.as_str().as_bytes()[from..to];
            Ok(Value::from(String::from_utf8_lossy(bytes).into_owned()))
        }
        Value::List(list) => {
            let (from, to) = bounds(list.len())?;
            Ok(Value::List(List::new(list.to_vec()[from..to].to_vec())))
        }
        Value::Nil => Err("slice of untyped nil".to_owned()),
        other => Err(format!("can't slice item of type {}", other.type_name())),
    }
}

/// The kinds that can be compared with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basic {
    Bool,
    Complex,
    Int,
    Float,
    Text,
    Other,
}

fn basic(value: &Value<'_>) -> Basic {
    match value {
        Value::Bool(_) => Basic::Bool,
        Value::Complex(..) => Basic::Complex,
        Value::Int(..) | Value::Enum(_) => Basic::Int,
        Value::Float(_) => Basic::Float,
        Value::Str(_) => Basic::Text,
        _ => Basic::Other,
    }
}

fn eq(args: Args<'_, '_>) -> Result<bool, String> {
    let first = args.get(0);
    if args.len() < 2 {
        return Err("missing argument for comparison".to_owned());
    }
    for second in &args.all()[1..] {
        let (a, b) = (basic(first), basic(second));
        if a != b {
            if !matches!(first, Value::Nil) && !matches!(second, Value::Nil) {
                return Err(incompatible(first, second));
            }
            continue;
        }
        let equal = match (first, second) {
            // Anything can be compared with nil, and a nil list or map with its like.
            (Value::Nil, other) | (other, Value::Nil) => other.is_nil(),
            (Value::List(_), Value::List(_)) | (Value::Map(_), Value::Map(_)) if first.is_nil() || second.is_nil() => {
                first.is_nil() && second.is_nil()
            }
            (Value::List(_) | Value::Map(_), _) | (_, Value::List(_) | Value::Map(_)) => {
                return Err(format!("non-comparable type {}: {}", format::sprint(first), first.type_name()));
            }
            _ if a == Basic::Int => format::to_int(first) == format::to_int(second),
            (first, second) => first == second,
        };
        if equal {
            return Ok(true);
        }
    }
    Ok(false)
}

fn incompatible(first: &Value<'_>, second: &Value<'_>) -> String {
    format!("incompatible types for comparison: {} and {}", first.type_name(), second.type_name())
}

fn less(first: &Value<'_>, second: &Value<'_>) -> Result<bool, String> {
    if basic(first) != basic(second) {
        return Err(incompatible(first, second));
    }
    match (first, second) {
        (Value::Int(a, _), Value::Int(b, _)) => Ok(a < b),
        (Value::Float(a), Value::Float(b)) => Ok(a < b),
        (Value::Str(a), Value::Str(b)) => Ok(a.as_str().cmp(b.as_str()) == Ordering::Less),
        (Value::Enum(_), _) | (_, Value::Enum(_)) => Ok(format::to_int(first) < format::to_int(second)),
        _ => Err("invalid type for comparison".to_owned()),
    }
}

fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\0' => out.push('\u{fffd}'),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c => out.push(c),
        }
    }
    out
}

fn js(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\'' => out.push_str("\\'"),
            '"' => out.push_str("\\\""),
            '<' | '>' | '&' | '=' => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c if u32::from(c) < 0x20 || (!c.is_ascii() && c.is_control()) => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// `url.QueryEscape`
pub(super) fn url_query(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            b' ' => out.push('+'),
            byte => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}
