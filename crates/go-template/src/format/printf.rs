//! `fmt.Sprintf`, in the order of decisions of Go's `fmt/print.go` and `fmt/format.go`.

use std::fmt::Write;

use super::{float_g, quote_with, sprint};
use crate::value::Value;

/// Widths and precisions beyond this are cut: a template must not make megabytes of blanks.
const WIDTH_LIMIT: usize = 10_000;

/// Values within values, as in [`super::sprint`].
const DEPTH_LIMIT: usize = 200;

#[derive(Clone, Copy, Default)]
struct Flags {
    minus: bool,
    plus: bool,
    sharp: bool,
    space: bool,
    zero: bool,
    /// `%#v`: Go syntax.
    syntax: bool,
    width: Option<usize>,
    precision: Option<usize>,
}

/// A format that is being read, with the arguments that it takes one after the other.
struct Reader<'f, 'v, 'a> {
    rest: &'f str,
    args: &'v [Value<'a>],
    next: usize,
    /// An index such as `[2]` was used somewhere.
    reordered: bool,
    /// The last thing read was an index.
    indexed: bool,
    /// No bad index in this verb so far.
    good: bool,
}

impl Reader<'_, '_, '_> {
    fn take(&mut self, c: char) -> bool {
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn number(&mut self) -> Option<usize> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        if digits.is_empty() { None } else { Some(digits.parse().unwrap_or(WIDTH_LIMIT).min(WIDTH_LIMIT)) }
    }

    /// As `argNumber`: an index in brackets chooses the next argument.
    fn index(&mut self) {
        self.indexed = false;
        if !self.rest.starts_with('[') {
            return;
        }
        self.reordered = true;
        let Some(end) = self.rest.find(']') else {
            self.good = false;
            self.rest = &self.rest[1..];
            return;
        };
        let inner = &self.rest[1..end];
        self.rest = &self.rest[end + 1..];
        match inner.parse::<usize>() {
            Ok(number) if (1..=self.args.len()).contains(&number) => {
                self.next = number - 1;
                self.indexed = true;
            }
            _ => self.good = false,
        }
    }

    /// The argument that a `*` stands for, when it is an integer of a sensible size.
    fn star(&mut self) -> Option<i64> {
        let value = self.args.get(self.next)?;
        self.next += 1;
        match value {
            Value::Int(number, _) if number.unsigned_abs() <= 1_000_000 => Some(*number),
            _ => None,
        }
    }
}

/// `fmt.Sprintf`
pub fn sprintf(format: &str, args: &[Value<'_>]) -> String {
    let mut out = String::new();
    let mut reader = Reader { rest: format, args, next: 0, reordered: false, indexed: false, good: true };
    while let Some(at) = reader.rest.find('%') {
        out.push_str(&reader.rest[..at]);
        reader.rest = &reader.rest[at + 1..];
        reader.good = true;
        let mut flags = Flags::default();
        loop {
            match reader.rest.as_bytes().first() {
                Some(b'#') => flags.sharp = true,
                Some(b'0') => flags.zero = true,
                Some(b'+') => flags.plus = true,
                Some(b'-') => flags.minus = true,
                Some(b' ') => flags.space = true,
                _ => break,
            }
            reader.rest = &reader.rest[1..];
        }
        reader.index();
        if reader.take('*') {
            match reader.star() {
                Some(width) => {
                    flags.width = Some((width.unsigned_abs() as usize).min(WIDTH_LIMIT));
                    if width < 0 {
                        flags.minus = true;
                        flags.zero = false;
                    }
                }
                None => out.push_str("%!(BADWIDTH)"),
            }
            reader.indexed = false;
        } else {
            flags.width = reader.number();
            reader.good &= !(reader.indexed && flags.width.is_some());
        }
        // A dot at the very end is a verb.
        if reader.rest.len() > 1 && reader.take('.') {
            reader.good &= !reader.indexed;
            reader.index();
            if reader.take('*') {
                match reader.star().and_then(|precision| usize::try_from(precision).ok()) {
                    Some(precision) => flags.precision = Some(precision.min(WIDTH_LIMIT)),
                    None => out.push_str("%!(BADPREC)"),
                }
                reader.indexed = false;
            } else {
                flags.precision = Some(reader.number().unwrap_or(0));
            }
        }
        if !reader.indexed {
            reader.index();
        }
        let Some(verb) = reader.rest.chars().next() else {
            out.push_str("%!(NOVERB)");
            break;
        };
        reader.rest = &reader.rest[verb.len_utf8()..];
        if verb == '%' {
            out.push('%');
        } else if !reader.good {
            let _ = write!(out, "%!{verb}(BADINDEX)");
        } else if let Some(value) = args.get(reader.next) {
            if matches!(verb, 'v' | 'w') {
                flags.syntax = std::mem::take(&mut flags.sharp);
                flags.plus = false;
            }
            argument(&mut out, verb, flags, value);
            reader.next += 1;
        } else {
            let _ = write!(out, "%!{verb}(MISSING)");
        }
    }
    out.push_str(reader.rest);
    if !reader.reordered && reader.next < args.len() {
        out.push_str("%!(EXTRA ");
        for (index, value) in args[reader.next..].iter().enumerate() {
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

fn argument(out: &mut String, verb: char, flags: Flags, value: &Value<'_>) {
    match (verb, value) {
        ('T' | 'v', Value::Nil) => pad(out, "<nil>", flags),
        ('T', _) => print(out, 's', flags, &Value::from(value.type_name()), 0),
        _ => print(out, verb, flags, value, 0),
    }
}

/// `writePadding` on the side that the flags say.
fn pad(out: &mut String, text: &str, flags: Flags) {
    let missing = flags.width.unwrap_or(0).saturating_sub(text.chars().count());
    if flags.minus {
        out.push_str(text);
        out.extend(std::iter::repeat_n(' ', missing));
    } else {
        out.extend(std::iter::repeat_n(if flags.zero { '0' } else { ' ' }, missing));
        out.push_str(text);
    }
}

fn bad_verb(out: &mut String, verb: char, flags: Flags, value: &Value<'_>, depth: usize) {
    if matches!(value, Value::Nil) {
        let _ = write!(out, "%!{verb}(<nil>)");
        return;
    }
    let _ = write!(out, "%!{verb}({}=", value.type_name());
    print(out, 'v', flags, value, depth + 1);
    out.push(')');
}

/// `printArg` and `printValue`: one value, and those in it with the same verb and flags.
fn print(out: &mut String, verb: char, flags: Flags, value: &Value<'_>, depth: usize) {
    if depth > DEPTH_LIMIT {
        return;
    }
    let formatted = match value {
        Value::Nil if flags.syntax && depth > 0 => return out.push_str("interface {}(nil)"),
        Value::Nil if depth > 0 || verb == 'v' => return pad(out, "<nil>", Flags { width: None, ..flags }),
        Value::Nil => return bad_verb(out, verb, flags, value, depth),
        Value::List(list) => {
            sequence(out, verb, flags, (list.type_name(), "[", "]"), list.iter().map(|item| (None, item)), depth);
            return;
        }
        Value::Map(map) => {
            let entries = map.entries().into_iter().map(|(key, item)| (Some(Value::from(key.to_string())), item));
            let name = value.type_name();
            if flags.syntax && map.is_nil() {
                let _ = write!(out, "{name}(nil)");
                return;
            }
            sequence(out, verb, flags, (&name, "map[", "]"), entries, depth);
            return;
        }
        Value::Bool(value) if matches!(verb, 't' | 'v') => {
            pad(out, if *value { "true" } else { "false" }, flags);
            true
        }
        Value::Int(number, _) => integer(out, verb, flags, *number),
        Value::Enum(item) if matches!(verb, 'd' | 'x' | 'X' | 'o' | 'O' | 'b' | 'c' | 'U') => {
            integer(out, verb, flags, i64::from(item.number))
        }
        Value::Float(number) => float(out, verb, flags, *number),
        Value::Str(text) => string(out, verb, flags, text.as_str()),
        Value::Enum(item) => string(out, verb, flags, item.name),
        Value::Typed(_) | Value::Record(_) | Value::Time(..) | Value::Version(_) | Value::Complex(..) => {
            string(out, verb, flags, &sprint(value))
        }
        Value::Bool(_) => false,
    };
    if !formatted {
        bad_verb(out, verb, flags, value, depth);
    }
}

/// A list or map: `[a b]`, `map[k:a]`, or in Go syntax `[]T{a, b}`.
fn sequence<'a>(
    out: &mut String,
    verb: char,
    flags: Flags,
    (name, open, close): (&str, &str, &str),
    items: impl Iterator<Item = (Option<Value<'a>>, Value<'a>)>,
    depth: usize,
) {
    if flags.syntax {
        out.push_str(name);
    }
    out.push_str(if flags.syntax { "{" } else { open });
    for (index, (key, item)) in items.enumerate() {
        if index > 0 {
            out.push_str(if flags.syntax { ", " } else { " " });
        }
        if let Some(key) = key {
            print(out, verb, flags, &key, depth + 1);
            out.push(':');
        }
        print(out, verb, flags, &item, depth + 1);
    }
    out.push_str(if flags.syntax { "}" } else { close });
}

/// `fmtInteger` with its verbs; false when the verb is none of them.
fn integer(out: &mut String, verb: char, flags: Flags, value: i64) -> bool {
    let magnitude = value.unsigned_abs();
    // Negative numbers are no characters.
    let character = u32::try_from(value).ok().and_then(char::from_u32).unwrap_or('\u{fffd}');
    let plain = Flags { zero: false, ..flags };
    let mut digits = match verb {
        'd' | 'v' => magnitude.to_string(),
        'x' => format!("{magnitude:x}"),
        'X' => format!("{magnitude:X}"),
        'o' | 'O' => format!("{magnitude:o}"),
        'b' => format!("{magnitude:b}"),
        'c' => {
            pad(out, character.encode_utf8(&mut [0; 4]), flags);
            return true;
        }
        'q' => {
            pad(out, &quote_with(character.encode_utf8(&mut [0; 4]), '\'', flags.plus), flags);
            return true;
        }
        'U' => {
            let mut text = format!("U+{:0>1$X}", value as u64, flags.precision.unwrap_or(4).max(4));
            if flags.sharp && !character.is_control() && char::from_u32(value as u32).is_some() {
                let _ = write!(text, " '{character}'");
            }
            pad(out, &text, plain);
            return true;
        }
        _ => return false,
    };
    let signed = value < 0 || flags.plus || flags.space;
    let least = match flags.precision {
        Some(0) if value == 0 => {
            pad(out, "", plain);
            return true;
        }
        Some(precision) => precision,
        None if flags.zero && !flags.minus => flags.width.unwrap_or(0).saturating_sub(usize::from(signed)),
        None => 0,
    };
    if digits.len() < least {
        digits.insert_str(0, &"0".repeat(least - digits.len()));
    }
    let prefix = match verb {
        'x' if flags.sharp => "0x",
        'X' if flags.sharp => "0X",
        'o' if flags.sharp && !digits.starts_with('0') => "0",
        'O' if flags.sharp && !digits.starts_with('0') => "0o0",
        'O' => "0o",
        'b' if flags.sharp => "0b",
        _ => "",
    };
    pad(out, &format!("{}{prefix}{digits}", sign(value < 0, flags)), plain);
    true
}

fn sign(negative: bool, flags: Flags) -> &'static str {
    match (negative, flags.plus, flags.space) {
        (true, ..) => "-",
        (false, true, _) => "+",
        (false, false, true) => " ",
        _ => "",
    }
}

/// `fmtFloat` with its verbs; false when the verb is none of them.
fn float(out: &mut String, verb: char, flags: Flags, value: f64) -> bool {
    let magnitude = value.abs();
    if !matches!(verb, 'v' | 'g' | 'G' | 'f' | 'F' | 'e' | 'E' | 'x' | 'X' | 'b') {
        return false;
    }
    if !value.is_finite() {
        let flags = Flags { zero: false, ..flags };
        let text = if value.is_nan() { "NaN" } else { "Inf" };
        let sign = match (value.is_nan(), value < 0.0) {
            (false, false) if !flags.space => "+",
            (nan, negative) => sign(negative && !nan, flags),
        };
        pad(out, &format!("{sign}{text}"), flags);
        return true;
    }
    let mut text = match verb {
        'v' | 'g' => float_g(magnitude, flags.precision),
        'G' => float_g(magnitude, flags.precision).to_uppercase(),
        'f' | 'F' => format!("{magnitude:.*}", flags.precision.unwrap_or(6)),
        'e' | 'E' => {
            let text = format!("{magnitude:.*e}", flags.precision.unwrap_or(6));
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let mark = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}{verb}{mark}{:02}", exponent.abs())
        }
        'x' => hexadecimal(magnitude, flags.precision),
        'X' => hexadecimal(magnitude, flags.precision).to_uppercase(),
        _ => binary(magnitude),
    };
    if flags.sharp && verb != 'b' {
        text = pointed(&text, verb, flags.precision);
    }
    let sign = sign(value.is_sign_negative(), flags);
    let width = flags.width.unwrap_or(0);
    if !sign.is_empty() && flags.zero && !flags.minus && width > text.len() + 1 {
        // Zeros go between sign and number.
        let _ = write!(out, "{sign}{text:0>0$}", width - 1);
    } else {
        pad(out, &format!("{sign}{text}"), flags);
    }
    true
}

/// The sharp flag: always a point, and for %g the trailing zeros.
fn pointed(text: &str, verb: char, precision: Option<usize>) -> String {
    let tail = text.find(if matches!(verb, 'x' | 'X') { ['p', 'P'] } else { ['e', 'E'] }).unwrap_or(text.len());
    let (number, tail) = text.split_at(tail);
    let significant = number.trim_start_matches(['0', '.']).bytes().filter(u8::is_ascii_digit).count();
    let mut out = number.to_owned();
    let mut missing = match verb {
        'v' | 'g' | 'G' => precision.unwrap_or(6).saturating_sub(significant),
        _ => 0,
    };
    if !number.contains('.') {
        missing = missing.saturating_sub(usize::from(number == "0"));
        out.push('.');
    }
    out.push_str(&"0".repeat(missing));
    out + tail
}

/// `strconv.FormatFloat(value, 'x', precision)` of what is not negative.
fn hexadecimal(value: f64, precision: Option<usize>) -> String {
    if value == 0.0 {
        let zeros = precision.filter(|precision| *precision > 0);
        return format!("0x0{}p+00", zeros.map(|zeros| format!(".{}", "0".repeat(zeros))).unwrap_or_default());
    }
    let bits = value.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i32 - 1023;
    let mut mantissa = bits & ((1 << 52) - 1);
    if exponent == -1023 {
        // Denormal: normalise.
        let shift = mantissa.leading_zeros() as i32 - 11;
        mantissa = (mantissa << shift) & ((1 << 52) - 1);
        exponent = -1022 - shift;
    }
    let mut whole = 1 << 52 | mantissa;
    if let Some(precision) = precision.filter(|precision| *precision < 13) {
        let drop = 52 - 4 * precision as u32;
        let (half, rest) = (1u64 << (drop - 1), whole & ((1 << drop) - 1));
        whole >>= drop;
        if rest > half || (rest == half && whole & 1 == 1) {
            whole += 1;
        }
        whole <<= drop;
        if whole >> 53 != 0 {
            whole >>= 1;
            exponent += 1;
        }
    }
    let digits = format!("{:013x}", whole & ((1 << 52) - 1));
    let fraction = match precision {
        None => digits.trim_end_matches('0').to_owned(),
        Some(precision) => format!("{digits:0<precision$}").chars().take(precision).collect(),
    };
    let point = if fraction.is_empty() { "" } else { "." };
    format!("0x1{point}{fraction}p{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// `strconv.FormatFloat(value, 'b', -1)` of what is not negative.
fn binary(value: f64) -> String {
    let bits = value.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i32;
    let mantissa = bits & ((1 << 52) - 1);
    let (mantissa, exponent) = if exponent == 0 { (mantissa, 1) } else { (mantissa | 1 << 52, exponent) };
    let exponent = exponent - 1023 - 52;
    format!("{mantissa}p{}{}", if exponent >= 0 { "+" } else { "-" }, exponent.abs())
}

/// `fmtString` with its verbs; false when the verb is none of them.
fn string(out: &mut String, verb: char, flags: Flags, text: &str) -> bool {
    let cut = match flags.precision {
        Some(precision) => text.char_indices().nth(precision).map_or(text, |(at, _)| &text[..at]),
        None => text,
    };
    match verb {
        'v' if flags.syntax => pad(out, &quote_with(cut, '"', false), flags),
        's' | 'v' => pad(out, cut, flags),
        'q' if flags.sharp && raw_quotable(cut) => pad(out, &format!("`{cut}`"), flags),
        'q' => pad(out, &quote_with(cut, '"', flags.plus), flags),
        'x' | 'X' => {
            let bytes = &text.as_bytes()[..flags.precision.unwrap_or(text.len()).min(text.len())];
            let prefix = match (flags.sharp, verb) {
                (false, _) => "",
                (true, 'x') => "0x",
                _ => "0X",
            };
            let mut hex = String::with_capacity(bytes.len() * 2);
            for (index, byte) in bytes.iter().enumerate() {
                if index > 0 && flags.space {
                    hex.push(' ');
                }
                if index == 0 || flags.space {
                    hex.push_str(prefix);
                }
                let _ = if verb == 'x' { write!(hex, "{byte:02x}") } else { write!(hex, "{byte:02X}") };
            }
            pad(out, &hex, flags);
        }
        _ => return false,
    }
    true
}

/// `strconv.CanBackquote`
fn raw_quotable(text: &str) -> bool {
    !text.chars().any(|c| c == '`' || c == '\u{feff}' || c == '\u{7f}' || (c < ' ' && c != '\t'))
}
