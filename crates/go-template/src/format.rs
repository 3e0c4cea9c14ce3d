//! Printing as Go's `fmt`.

mod printf;

pub use printf::sprintf;

use std::fmt::Write;

use crate::value::Value;

/// What `{{value}}` writes.
pub fn print_value(value: &Value<'_>) -> String {
    match value {
        Value::Nil => "<no value>".to_owned(),
        _ => sprint(value),
    }
}

/// `fmt.Sprint` of one value, which is `%v`.
pub fn sprint(value: &Value<'_>) -> String {
    let mut out = String::new();
    verb_v(&mut out, value, 0);
    out
}

/// sprig's `strval`: strings as they are, anything else by `%v`.
pub fn strval(value: &Value<'_>) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => sprint(value),
    }
}

/// `fmt.Sprint` of several: a space between two when neither is a string.
pub fn sprint_all(values: &[Value<'_>]) -> String {
    let mut out = String::new();
    let mut previous_text = true;
    for (index, value) in values.iter().enumerate() {
        let text = value.as_str().is_some();
        if index > 0 && !text && !previous_text {
            out.push(' ');
        }
        verb_v(&mut out, value, 0);
        previous_text = text;
    }
    out
}

/// Values within values; data is JSON, which is as deep as its parser allowed, so this is never met.
const DEPTH_LIMIT: usize = 200;

fn verb_v(out: &mut String, value: &Value<'_>, depth: usize) {
    if depth > DEPTH_LIMIT {
        return;
    }
    match value {
        Value::Nil => out.push_str("<nil>"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Int(value, _) => {
            let _ = write!(out, "{value}");
        }
        Value::Float(value) => out.push_str(&float_g(*value, None)),
        Value::Complex(re, im) => {
            let im = float_g(*im, None);
            let sign = if im.starts_with('-') { "" } else { "+" };
            let _ = write!(out, "({}{sign}{im}i)", float_g(*re, None));
        }
        Value::Str(text) => out.push_str(text.as_str()),
        Value::List(list) => {
            out.push('[');
            for (index, item) in list.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                verb_v(out, &item, depth + 1);
            }
            out.push(']');
        }
        Value::Map(map) => {
            out.push_str("map[");
            for (index, (key, item)) in map.entries().into_iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                out.push_str(&key);
                out.push(':');
                verb_v(out, &item, depth + 1);
            }
            out.push(']');
        }
        Value::Typed(typed) if typed.nil => out.push_str("<nil>"),
        Value::Typed(typed) => match typed.ty.display(typed.data) {
            Some(text) => out.push_str(&text),
            None => {
                out.push('{');
                for (index, name) in typed.ty.fields().into_iter().enumerate() {
                    if index > 0 {
                        out.push(' ');
                    }
                    verb_v(out, &typed.ty.field(typed.data, name).unwrap_or(Value::Nil), depth + 1);
                }
                out.push('}');
            }
        },
        Value::Record(record) => {
            out.push('{');
            for (index, (_, item)) in record.fields.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                verb_v(out, item, depth + 1);
            }
            out.push('}');
        }
        Value::Enum(value) => out.push_str(value.name),
        Value::Time(seconds, nanos) => out.push_str(&crate::time::display(*seconds, *nanos)),
        Value::Version(version) => {
            let _ = write!(out, "{version}");
        }
    }
}

/// `strconv.FormatFloat(value, 'g', precision)`; without precision the shortest that reads back.
pub(crate) fn float_g(value: f64, precision: Option<usize>) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned();
    }
    let scientific = match precision {
        None => format!("{value:e}"),
        Some(precision) => format!("{value:.*e}", precision.max(1) - 1),
    };
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let mantissa = match precision {
        Some(_) if mantissa.contains('.') => mantissa.trim_end_matches('0').trim_end_matches('.'),
        _ => mantissa,
    };
    let digits = mantissa.bytes().filter(u8::is_ascii_digit).count() as i32;
    // As strconv's %g: the shortest form changes to an exponent from a million on.
    let limit = match precision {
        None => 6,
        Some(precision) => {
            let precision = precision.max(1) as i32;
            if precision > digits && digits > exponent { digits } else { precision }
        }
    };
    if exponent < -4 || exponent >= limit {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    match precision {
        None => format!("{value}"),
        Some(_) => format!("{value:.*}", (digits - 1 - exponent).max(0) as usize),
    }
}

/// As spf13/cast `ToInt64`: what cannot be read is 0.
pub(crate) fn to_int(value: &Value<'_>) -> i64 {
    match value {
        Value::Int(value, _) => *value,
        Value::Float(value) => truncated(*value),
        Value::Bool(value) => i64::from(*value),
        Value::Enum(value) => i64::from(value.number),
        Value::Str(text) => parse_int(without_zero_fraction(text.as_str())).unwrap_or(0),
        other => other.target().map_or(0, |target| to_int(&target)),
    }
}

/// `int64(float)` as it is on amd64, where what does not fit is the smallest integer.
fn truncated(value: f64) -> i64 {
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    if (-LIMIT..LIMIT).contains(&value) { value as i64 } else { i64::MIN }
}

/// cast's `trimZeroDecimal`: `10.00` is read as `10`.
fn without_zero_fraction(text: &str) -> &str {
    match text.rsplit_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => whole,
        _ => text,
    }
}

/// `strconv.ParseInt(text, 0, 64)`
pub(crate) fn parse_int(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'b' | b'B', ..] => (2, &digits[2..]),
        [b'0', b'o' | b'O', ..] => (8, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    // Base 0 allows single underscores between digits.
    if digits.contains('_') {
        let odd = digits.starts_with('_') && radix == 10 || digits.ends_with('_') || digits.contains("__");
        let clean = digits.replace('_', "");
        return if odd { None } else { i64::from_str_radix(&clean, radix).ok().map(|value| value * sign) };
    }
    let value = u64::from_str_radix(digits, radix).ok()?;
    i64::try_from(i128::from(value) * i128::from(sign)).ok()
}

pub(crate) fn to_float(value: &Value<'_>) -> f64 {
    match value {
        Value::Float(value) => *value,
        Value::Str(text) => text.as_str().parse().unwrap_or(0.0),
        Value::Int(value, _) => *value as f64,
        other => match other.target() {
            Some(target) => to_float(&target),
            None => to_int(other) as f64,
        },
    }
}

/// `strconv.Quote`
pub fn quote(text: &str) -> String {
    quote_with(text, '"', false)
}

/// `strconv.IsPrint`: no control or format character, nothing unassigned or private, no space but ' '.
fn printable(c: char) -> bool {
    // Combining marks are escaped only at the start of a text.
    let text: String = ['a', c].into_iter().collect();
    text.escape_debug().nth(1) == Some(c)
}

fn quote_with(text: &str, mark: char, ascii: bool) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push(mark);
    for c in text.chars() {
        match c {
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if u32::from(c) < 0x20 || c == '\u{7f}' => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c if !c.is_ascii() && (ascii || !printable(c)) => {
                let _ = match u32::from(c) {
                    number @ 0..0x1_0000 => write!(out, "\\u{number:04x}"),
                    number => write!(out, "\\U{number:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(mark);
    out
}
