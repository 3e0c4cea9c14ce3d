//! YAML as sigs.k8s.io/yaml writes it, byte for byte: templates print values in it, and `kube-inject`'s
//! output should not differ from istioctl's.
//!
//! As goyaml.v2 `encode.go`, `emitterc.go` and `resolve.go`.

use std::cmp::Ordering;

use serde_json::Value;

/// The value as a YAML document that ends in a newline.
pub fn emit(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(&mut out, map, 0),
        Value::Array(items) if !items.is_empty() => sequence(&mut out, items, 0),
        other => {
            scalar(&mut out, other, 2);
            out.push('\n');
        }
    }
    out
}

fn pad(out: &mut String, indent: usize) {
    out.extend(std::iter::repeat_n(' ', indent));
}

/// Entries at `indent`; the first is written where the cursor is, which is there.
fn mapping(out: &mut String, map: &serde_json::Map<String, Value>, indent: usize) {
    let mut entries: Vec<(&String, &Value)> = map.iter().collect();
    entries.sort_by(|a, b| natural(a.0, b.0));
    for (index, (key, value)) in entries.into_iter().enumerate() {
        if index > 0 {
            pad(out, indent);
        }
        text(out, key, None);
        out.push(':');
        match value {
            Value::Object(map) if !map.is_empty() => {
                out.push('\n');
                pad(out, indent + 2);
                mapping(out, map, indent + 2);
            }
            // Lists are not indented under their key.
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                pad(out, indent);
                sequence(out, items, indent);
            }
            other => {
                out.push(' ');
                scalar(out, other, indent + 2);
                out.push('\n');
            }
        }
    }
}

fn sequence(out: &mut String, items: &[Value], indent: usize) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            pad(out, indent);
        }
        out.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => mapping(out, map, indent + 2),
            Value::Array(items) if !items.is_empty() => sequence(out, items, indent + 2),
            other => {
                scalar(out, other, indent + 2);
                out.push('\n');
            }
        }
    }
}

fn scalar(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Number(number) if number.is_f64() => {
            let float = go_template::Value::Float(number.as_f64().unwrap_or(0.0));
            out.push_str(&go_template::format::sprint(&float));
        }
        Value::Number(number) => out.push_str(&number.to_string()),
        Value::String(string) => text(out, string, Some(indent)),
        Value::Array(_) => out.push_str("[]"),
        Value::Object(_) => out.push_str("{}"),
    }
}

/// How a string may be written.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    plain: bool,
    single: bool,
    block: bool,
}

/// A string; keys have no indent, are never blocks and never folded.
fn text(out: &mut String, string: &str, indent: Option<usize>) {
    let shape = analyse(string);
    let lines = string.contains('\n');
    match indent {
        Some(indent) if lines && shape.block => literal(out, string, indent),
        _ if lines => double_quoted(out, string, indent),
        _ if !is_text(string) => double_quoted(out, string, indent),
        _ if shape.plain => folded(out, string, indent, false),
        _ if shape.single => {
            out.push('\'');
            folded(out, string, indent, true);
            out.push('\'');
        }
        _ => double_quoted(out, string, indent),
    }
}

/// Lines that are longer are broken at the next single space.
const WIDTH: usize = 80;

/// The column of the cursor.
fn column(out: &str) -> usize {
    out.rsplit('\n').next().map_or(0, |line| line.chars().count())
}

/// Breaks the line instead of writing a space.
fn fold(out: &mut String, indent: usize) {
    out.push('\n');
    pad(out, indent);
}

/// A plain or, without its quotes, single quoted string.
fn folded(out: &mut String, string: &str, indent: Option<usize>, quoted: bool) {
    let mut column = column(out);
    let mut after_space = false;
    for (at, c) in string.char_indices() {
        let next = string[at + c.len_utf8()..].chars().next();
        let inside = !quoted || (at > 0 && next.is_some());
        match indent {
            Some(indent) if c == ' ' && !after_space && column > WIDTH && inside && next != Some(' ') => {
                fold(out, indent);
                column = indent;
            }
            _ if c == '\'' && quoted => {
                out.push_str("''");
                column += 2;
            }
            _ => {
                out.push(c);
                column += 1;
            }
        }
        after_space = c == ' ';
    }
}

fn analyse(string: &str) -> Shape {
    if string.is_empty() {
        return Shape { plain: false, single: true, block: false };
    }
    let mut indicators = string.starts_with("---") || string.starts_with("...");
    let (mut special, mut line_breaks, mut space_break, mut break_space) = (false, false, false, false);
    let mut previous: Option<char> = None;
    let mut chars = string.chars().peekable();
    while let Some(c) = chars.next() {
        let before_blank = chars.peek().is_none_or(|next| matches!(next, ' ' | '\t' | '\n' | '\r'));
        let after_blank = previous.is_none_or(|previous| matches!(previous, ' ' | '\t' | '\n' | '\r'));
        indicators |= match (previous, c) {
            (None, '#' | ',' | '[' | ']' | '{' | '}' | '&' | '*' | '!' | '|' | '>' | '\'' | '"' | '%' | '@' | '`') => {
                true
            }
            (None, '?' | ':' | '-') => before_blank,
            (Some(_), ':') => before_blank,
            (Some(_), '#') => after_blank,
            _ => false,
        };
        special |= !printable(c);
        match c {
            '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => {
                line_breaks = true;
                space_break |= previous == Some(' ');
            }
            ' ' => break_space |= matches!(previous, Some('\n' | '\r')),
            _ => {}
        }
        previous = Some(c);
    }
    let blank = |c: char| matches!(c, ' ' | '\n' | '\r');
    let edges = string.starts_with(blank) || string.ends_with(blank);
    let odd = space_break || special;
    Shape {
        plain: !(line_breaks || edges || break_space || odd || indicators),
        single: !(break_space || odd),
        block: !(odd || string.ends_with(' ')),
    }
}

fn printable(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}')
}

fn literal(out: &mut String, string: &str, indent: usize) {
    out.push('|');
    if string.starts_with([' ', '\n']) {
        out.push('2');
    }
    if !string.ends_with('\n') {
        out.push('-');
    } else if string == "\n" || string.ends_with("\n\n") {
        out.push('+');
    }
    out.push('\n');
    let body = string.strip_suffix('\n').unwrap_or(string);
    for (index, line) in body.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if !line.is_empty() {
            pad(out, indent);
            out.push_str(line);
        }
    }
}

fn double_quoted(out: &mut String, string: &str, indent: Option<usize>) {
    out.push('"');
    let mut after_space = false;
    for (at, c) in string.char_indices() {
        let next = string[at + c.len_utf8()..].chars().next();
        let breakable = c == ' ' && !after_space && at > 0 && next.is_some();
        after_space = c == ' ';
        if let Some(indent) = indent.filter(|_| breakable && column(out) > WIDTH) {
            fold(out, indent);
            if next == Some(' ') {
                out.push('\\');
            }
            continue;
        }
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            '\0' => out.push_str("\\0"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            '\u{1b}' => out.push_str("\\e"),
            '\u{85}' => out.push_str("\\N"),
            '\u{2028}' => out.push_str("\\L"),
            '\u{2029}' => out.push_str("\\P"),
            '\u{feff}' => out.push_str("\\uFEFF"),
            c if printable(c) => out.push(c),
            c => match u32::from(c) {
                code @ 0..=0xff => out.push_str(&format!("\\x{code:02X}")),
                code @ 0x100..=0xffff => out.push_str(&format!("\\u{code:04X}")),
                code => out.push_str(&format!("\\U{code:08X}")),
            },
        }
    }
    out.push('"');
}

/// Whether YAML 1.1 reads the plain text as a string.
fn is_text(string: &str) -> bool {
    const WORDS: [&str; 37] = [
        "", "~", "null", "Null", "NULL", "y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON", "n",
        "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF", ".nan", ".NaN", ".NAN", ".inf", ".Inf",
        ".INF", "+.inf", "-.inf", "<<", "-.INF",
    ];
    if WORDS.contains(&string) || matches!(string, "+.Inf" | "+.INF" | "-.Inf") {
        return false;
    }
    if !string.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return true;
    }
    let plain = string.replace('_', "");
    !(is_number(&plain) || is_sexagesimal(string) || is_date(string))
}

fn is_number(plain: &str) -> bool {
    let unsigned = plain.strip_prefix(['+', '-']).unwrap_or(plain);
    for (prefix, radix) in [("0x", 16), ("0X", 16), ("0o", 8), ("0O", 8), ("0b", 2), ("0B", 2)] {
        if let Some(digits) = unsigned.strip_prefix(prefix) {
            return u64::from_str_radix(digits, radix).is_ok() && !digits.starts_with('+');
        }
    }
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    if let Some(exponent) = exponent {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        if exponent.is_empty() || !digits(exponent) {
            return false;
        }
    }
    match mantissa.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty()),
        None => !mantissa.is_empty() && digits(mantissa),
    }
}

/// `190:20:30`, which YAML 1.1 takes for a number of base 60.
fn is_sexagesimal(string: &str) -> bool {
    let unsigned = string.strip_prefix(['+', '-']).unwrap_or(string);
    let mut parts = unsigned.split(':');
    let first = parts.next().unwrap_or_default();
    let mut count = 0;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_');
    if !digits(first) {
        return false;
    }
    for part in parts {
        count += 1;
        let whole = part.split_once('.').map_or(part, |(whole, _)| whole);
        if whole.len() > 2 || !digits(whole) || (whole.len() == 2 && whole.as_bytes()[0] > b'5') {
            return false;
        }
    }
    count > 0
}

/// A date, with or without time.
fn is_date(string: &str) -> bool {
    let bytes = string.as_bytes();
    if bytes.len() < 8 || !bytes[..4].iter().all(u8::is_ascii_digit) || bytes[4] != b'-' {
        return false;
    }
    let mut parts = string[5..].splitn(2, '-');
    let month = parts.next().unwrap_or_default();
    let rest = parts.next().unwrap_or_default();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (day, time) = rest.split_at(end);
    let two = |text: &str, most: u32| {
        (1..=2).contains(&text.len()) && text.parse::<u32>().is_ok_and(|number| (1..=most).contains(&number))
    };
    let clock = time.trim_start_matches([' ', '\t', 't', 'T']);
    two(month, 12)
        && two(day, 31)
        && (time.is_empty()
            || (time.len() > clock.len()
                && clock.starts_with(|c: char| c.is_ascii_digit())
                && clock.matches(':').count() >= 2))
}

/// goyaml's order of keys: letters after other characters, numbers within by value.
fn natural(a: &str, b: &str) -> Ordering {
    let (left, right): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut digits = false;
    for at in 0..left.len().min(right.len()) {
        let (l, r) = (left[at], right[at]);
        if l == r {
            digits = l.is_numeric();
            continue;
        }
        match (l.is_alphabetic(), r.is_alphabetic()) {
            (true, true) => return l.cmp(&r),
            (true, false) => return if digits { Ordering::Less } else { Ordering::Greater },
            (false, true) => return if digits { Ordering::Greater } else { Ordering::Less },
            (false, false) => {}
        }
        let number = |chars: &[char]| -> (u64, usize) {
            let mut start = at;
            if l == '0' || r == '0' {
                // Zeros in the middle of a number count with what stands before them.
                while start > 0 && left[start - 1].is_ascii_digit() {
                    start -= 1;
                }
            }
            let run: String = chars[start..].iter().take_while(|c| c.is_ascii_digit()).collect();
            (run.parse().unwrap_or(0), run.len())
        };
        let ((left_number, left_length), (right_number, right_length)) = (number(&left), number(&right));
        return left_number.cmp(&right_number).then(left_length.cmp(&right_length)).then(l.cmp(&r));
    }
    left.len().cmp(&right.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn strings_are_quoted_as_go_quotes_them() {
        for (value, want) in [
            ("", "\"\""),
            ("a", "a"),
            ("*", "'*'"),
            ("15020", "\"15020\""),
            ("1.5", "\"1.5\""),
            ("1.20.3", "1.20.3"),
            ("yes", "\"yes\""),
            ("a: b", "'a: b'"),
            ("a:b", "a:b"),
            ("{\"a\":1}", "'{\"a\":1}'"),
            (" a", "' a'"),
            ("it's", "it's"),
            ("'a'", "'''a'''"),
            ("a\tb", "\"a\\tb\""),
            ("2026-11-21", "\"2026-11-21\""),
            ("12:30", "\"12:30\""),
            ("-b", "-b"),
            ("--x", "--x"),
            ("---", "'---'"),
            ("0x1F", "\"0x1F\""),
            ("l1\nl2", "|-\n  l1\n  l2"),
            ("l1\n", "|\n  l1"),
            ("l1\n\n", "|+\n  l1\n"),
            ("  l1\nl2", "|2-\n    l1\n  l2"),
            ("l1 \nl2", "\"l1 \\nl2\""),
        ] {
            assert_eq!(emit(&json!(value)), format!("{want}\n"), "{value:?}");
        }
    }

    #[test]
    fn long_lines_are_folded_at_spaces() {
        let long = "a".repeat(90);
        assert_eq!(emit(&json!({"k": format!("{long} b c")})), format!("k: {long}\n  b c\n"));
        assert_eq!(emit(&json!({"k": format!("{long}: b  c")})), format!("k: '{long}:\n  b  c'\n"));
        assert_eq!(emit(&json!({"k": format!("\t{long} b")})), format!("k: \"\\t{long}\n  b\"\n"));
        assert_eq!(emit(&json!({"k": long})), format!("k: {long}\n"));
    }

    #[test]
    fn collections() {
        let value = json!({"b": [{"x": 1, "y": []}, [1, 2]], "a10": {}, "a2": null, "c": {"d": "e\nf"}});
        assert_eq!(
            emit(&value),
            "a2: null\na10: {}\nb:\n- x: 1\n  \"y\": []\n- - 1\n  - 2\nc:\n  d: |-\n    e\n    f\n"
        );
    }
}
