//! Printing as Go's `fmt`.

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
        Value::Float(value) => *value as i64,
        Value::Bool(value) => i64::from(*value),
        Value::Enum(value) => i64::from(value.number),
        Value::Str(text) => parse_int(text.as_str()).unwrap_or(0),
        _ => 0,
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
    i64::from_str_radix(digits, radix).ok().map(|value| value * sign)
}

pub(crate) fn to_float(value: &Value<'_>) -> f64 {
    match value {
        Value::Float(value) => *value,
        Value::Str(text) => text.as_str().parse().unwrap_or(0.0),
        other => to_int(other) as f64,
    }
}

/// `strconv.Quote`
pub fn quote(text: &str) -> String {
    quote_with(text, '"', false)
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
            c if (c.is_control() || (ascii && !c.is_ascii())) && u32::from(c) < 0x1_0000 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c if ascii && !c.is_ascii() => {
                let _ = write!(out, "\\U{:08x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(mark);
    out
}

#[derive(Clone, Copy, Default)]
struct Flags {
    minus: bool,
    plus: bool,
    sharp: bool,
    space: bool,
    zero: bool,
    width: Option<usize>,
    precision: Option<usize>,
}

/// Widths and precisions beyond this are cut: a template must not make megabytes of blanks.
const WIDTH_LIMIT: usize = 10_000;

/// `fmt.Sprintf`
pub fn sprintf(format: &str, args: &[Value<'_>]) -> String {
    let mut out = String::new();
    let mut next = 0;
    let mut reordered = false;
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut flags = Flags::default();
        while let Some(flag) = chars.peek() {
            match flag {
                '-' => flags.minus = true,
                '+' => flags.plus = true,
                '#' => flags.sharp = true,
                ' ' => flags.space = true,
                '0' => flags.zero = true,
                _ => break,
            }
            chars.next();
        }
        let index = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>, next: &mut usize| {
            if chars.peek() == Some(&'[') {
                chars.next();
                let digits: String = std::iter::from_fn(|| chars.next_if(char::is_ascii_digit)).collect();
                chars.next_if_eq(&']');
                *next = digits.parse::<usize>().unwrap_or(1).saturating_sub(1);
                return true;
            }
            false
        };
        reordered |= index(&mut chars, &mut next);
        flags.width = size(&mut chars, args, &mut next, &mut flags.minus);
        if chars.next_if_eq(&'.').is_some() {
            reordered |= index(&mut chars, &mut next);
            let mut ignored = false;
            flags.precision = Some(size(&mut chars, args, &mut next, &mut ignored).unwrap_or(0));
        }
        reordered |= index(&mut chars, &mut next);
        let Some(verb) = chars.next() else {
            out.push_str("%!(NOVERB)");
            break;
        };
        if verb == '%' {
            out.push('%');
            continue;
        }
        let Some(value) = args.get(next) else {
            let _ = write!(out, "%!{verb}({})", if reordered { "BADINDEX" } else { "MISSING" });
            continue;
        };
        next += 1;
        one(&mut out, verb, flags, value, 0);
    }
    if !reordered && next < args.len() {
        out.push_str("%!(EXTRA ");
        for (index, value) in args[next..].iter().enumerate() {
            if index > 0 {
                out.push_str(", ");
            }
            match value {
                Value::Nil => out.push_str("<nil>"),
                _ => {
                    let _ = write!(out, "{}={}", value.type_name(), sprint(value));
                }
            }
        }
        out.push(')');
    }
    out
}

fn size(
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
    args: &[Value<'_>],
    next: &mut usize,
    minus: &mut bool,
) -> Option<usize> {
    if chars.next_if_eq(&'*').is_some() {
        let value = args.get(*next).map_or(0, to_int);
        *next += 1;
        *minus |= value < 0;
        return Some((value.unsigned_abs() as usize).min(WIDTH_LIMIT));
    }
    let digits: String = std::iter::from_fn(|| chars.next_if(char::is_ascii_digit)).collect();
    if digits.is_empty() { None } else { Some(digits.parse().unwrap_or(WIDTH_LIMIT).min(WIDTH_LIMIT)) }
}

fn pad(out: &mut String, text: &str, flags: Flags, numeric: bool) {
    let length = text.chars().count();
    let missing = flags.width.unwrap_or(0).saturating_sub(length);
    if flags.minus {
        out.push_str(text);
        out.extend(std::iter::repeat_n(' ', missing));
    } else if flags.zero && numeric {
        let (sign, digits) = match text.strip_prefix(['-', '+', ' ']) {
            Some(digits) => text.split_at(text.len() - digits.len()),
            None => ("", text),
        };
        out.push_str(sign);
        out.extend(std::iter::repeat_n('0', missing));
        out.push_str(digits);
    } else {
        out.extend(std::iter::repeat_n(' ', missing));
        out.push_str(text);
    }
}

fn one(out: &mut String, verb: char, flags: Flags, value: &Value<'_>, depth: usize) {
    if depth > DEPTH_LIMIT {
        return;
    }
    match (verb, value) {
        ('T', _) => return pad(out, &value.type_name(), flags, false),
        ('v', Value::Nil) => return pad(out, "<nil>", flags, false),
        (_, Value::Nil) => {
            let _ = write!(out, "%!{verb}(<nil>)");
            return;
        }
        ('p', _) => {
            let _ = write!(out, "%!p({}={})", value.type_name(), sprint(value));
            return;
        }
        _ => {}
    }
    let text = match value {
        Value::List(list) => {
            out.push('[');
            for (index, item) in list.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                one(out, verb, flags, &item, depth + 1);
            }
            out.push(']');
            return;
        }
        Value::Map(map) => {
            out.push_str("map[");
            for (index, (key, item)) in map.entries().into_iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                one(out, verb, flags, &Value::from(key.to_string()), depth + 1);
                out.push(':');
                one(out, verb, flags, &item, depth + 1);
            }
            out.push(']');
            return;
        }
        Value::Bool(value) if matches!(verb, 't' | 'v') => Some((value.to_string(), false)),
        Value::Int(number, _) => integer(verb, flags, i128::from(*number)).map(|text| (text, true)),
        Value::Enum(item) if matches!(verb, 'd' | 'x' | 'X' | 'o' | 'b' | 'c' | 'U') => {
            integer(verb, flags, i128::from(item.number)).map(|text| (text, true))
        }
        Value::Float(number) => float(verb, flags, *number).map(|text| (text, number.is_finite())),
        Value::Str(text) => string(verb, flags, text.as_str()).map(|text| (text, false)),
        Value::Enum(item) => string(verb, flags, item.name).map(|text| (text, false)),
        Value::Typed(_) | Value::Record(_) | Value::Time(..) if matches!(verb, 'v' | 's') => {
            Some((sprint(value), false))
        }
        _ => (verb == 'v').then(|| (sprint(value), false)),
    };
    match text {
        Some((text, numeric)) => pad(out, &text, flags, numeric),
        None => {
            let _ = write!(out, "%!{verb}({}={})", value.type_name(), sprint(value));
        }
    }
}

fn integer(verb: char, flags: Flags, value: i128) -> Option<String> {
    let magnitude = value.unsigned_abs();
    let mut digits = match verb {
        'd' | 'v' => magnitude.to_string(),
        'x' => format!("{magnitude:x}"),
        'X' => format!("{magnitude:X}"),
        'o' | 'O' => format!("{magnitude:o}"),
        'b' => format!("{magnitude:b}"),
        'c' => return char::from_u32(u32::try_from(value).ok()?).map(String::from),
        'q' => {
            let c = char::from_u32(u32::try_from(value).ok()?)?;
            return Some(quote_with(c.encode_utf8(&mut [0; 4]), '\'', flags.plus));
        }
        'U' => return Some(format!("U+{magnitude:04X}")),
        _ => return None,
    };
    if let Some(precision) = flags.precision {
        while digits.len() < precision {
            digits.insert(0, '0');
        }
    }
    let prefix = match verb {
        'x' if flags.sharp => "0x",
        'X' if flags.sharp => "0X",
        'o' if flags.sharp => "0",
        'O' => "0o",
        'b' if flags.sharp => "0b",
        _ => "",
    };
    Some(format!("{}{prefix}{digits}", sign(value < 0, flags)))
}

fn sign(negative: bool, flags: Flags) -> &'static str {
    match (negative, flags.plus, flags.space) {
        (true, ..) => "-",
        (false, true, _) => "+",
        (false, false, true) => " ",
        _ => "",
    }
}

fn float(verb: char, flags: Flags, value: f64) -> Option<String> {
    let text = match verb {
        'v' | 'g' => float_g(value.abs(), flags.precision),
        'G' => float_g(value.abs(), flags.precision).to_uppercase(),
        'f' | 'F' if value.is_finite() => format!("{:.*}", flags.precision.unwrap_or(6), value.abs()),
        'e' | 'E' if value.is_finite() => {
            let text = format!("{:.*e}", flags.precision.unwrap_or(6), value.abs());
            let (mantissa, exponent) = text.split_once('e')?;
            let exponent: i32 = exponent.parse().ok()?;
            let mark = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}{verb}{mark}{:02}", exponent.abs())
        }
        'f' | 'F' | 'e' | 'E' => float_g(value.abs(), None),
        _ => return None,
    };
    let text = text.trim_start_matches('+');
    Some(format!("{}{text}", sign(value.is_sign_negative() && !value.is_nan(), flags)))
}

fn string(verb: char, flags: Flags, text: &str) -> Option<String> {
    let cut: String = match flags.precision {
        Some(precision) => text.chars().take(precision).collect(),
        None => text.to_owned(),
    };
    Some(match verb {
        'v' if flags.sharp => quote(&cut),
        's' | 'v' => cut,
        'q' if flags.sharp && !cut.contains('`') && !cut.contains(char::is_control) => format!("`{cut}`"),
        'q' => quote_with(&cut, '"', flags.plus),
        'x' => cut.bytes().map(|byte| format!("{byte:02x}")).collect(),
        'X' => cut.bytes().map(|byte| format!("{byte:02X}")).collect(),
        _ => return None,
    })
}
