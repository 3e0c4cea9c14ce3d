//! JSON as Go's `encoding/json` writes it.

use std::fmt::Write;

use serde_json::Value as Json;

/// The number a float64 becomes: an integer where Go would print no fraction.
pub(crate) fn number(value: f64) -> Json {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return Json::from(value as i64);
    }
    serde_json::Number::from_f64(value).map_or(Json::Null, Json::Number)
}

/// The text of `json.Marshal`: no spaces, and `<`, `>`, `&` escaped unless `raw`.
pub fn encode(value: &Json, raw: bool) -> String {
    let mut out = String::new();
    write_value(&mut out, value, raw, None, 0);
    out
}

/// The text of `json.MarshalIndent` with two spaces.
pub fn encode_pretty(value: &Json) -> String {
    let mut out = String::new();
    write_value(&mut out, value, false, Some("  "), 0);
    out
}

fn write_value(out: &mut String, value: &Json, raw: bool, indent: Option<&str>, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    };
    match value {
        Json::Null => out.push_str("null"),
        Json::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Json::Number(number) => write_number(out, number),
        Json::String(text) => write_string(out, text, raw),
        Json::Array(items) if items.is_empty() => out.push_str("[]"),
        Json::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                line(out, depth + 1);
                write_value(out, item, raw, indent, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        Json::Object(map) if map.is_empty() => out.push_str("{}"),
        Json::Object(map) => {
            out.push('{');
            for (index, (key, item)) in map.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                line(out, depth + 1);
                write_string(out, key, raw);
                out.push(':');
                if indent.is_some() {
                    out.push(' ');
                }
                write_value(out, item, raw, indent, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
    }
}

/// As Go's floatEncoder: an exponent only below 1e-6 and from 1e21 on.
fn write_number(out: &mut String, number: &serde_json::Number) {
    let Some(value) = number.as_f64().filter(|_| number.is_f64()) else {
        let _ = write!(out, "{number}");
        return;
    };
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-6..1e21).contains(&magnitude) {
        let text = format!("{value:e}");
        match text.split_once('e') {
            Some((mantissa, exponent)) if !exponent.starts_with('-') => {
                let _ = write!(out, "{mantissa}e+{exponent}");
            }
            _ => out.push_str(&text),
        }
    } else {
        let _ = write!(out, "{value}");
    }
}

fn write_string(out: &mut String, text: &str, raw: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '<' | '>' | '&' if !raw => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
