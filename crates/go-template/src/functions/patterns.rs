//! sprig's functions on regular expressions. Go's RE2 syntax and Rust's are the same family.

use regex_automata::meta::Regex;
use regex_automata::util::syntax;

use super::{Args, Functions, Outcome};
use crate::value::{List, Value};

/// What Go returns when nothing was found.
fn nothing<'a>() -> Value<'a> {
    Value::List(List::Nil("[]string"))
}

/// Memory of a compiled expression.
const SIZE_LIMIT: usize = 1 << 20;

fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::builder()
        .configure(Regex::config().nfa_size_limit(Some(SIZE_LIMIT)).hybrid_cache_capacity(SIZE_LIMIT))
        .syntax(syntax::Config::new().nest_limit(50))
        .build(&translated(pattern))
        .map_err(|error| format!("error parsing regexp: {pattern:?}: {error}"))
}

/// The expression as Rust's engine reads it: classes such as `\d` are ASCII in Go, a brace that repeats
/// nothing is itself, and sets have no operators.
fn translated(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut rest = pattern;
    let mut class = false;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        rest = after;
        match c {
            '\\' => {
                let Some(escaped) = after.chars().next() else {
                    out.push(c);
                    break;
                };
                rest = &after[escaped.len_utf8()..];
                match (escaped, class) {
                    ('d', true) => out.push_str("0-9"),
                    ('d', false) => out.push_str("[0-9]"),
                    ('D', _) => out.push_str("[^0-9]"),
                    ('w', true) => out.push_str("0-9A-Za-z_"),
                    ('w', false) => out.push_str("[0-9A-Za-z_]"),
                    ('W', _) => out.push_str("[^0-9A-Za-z_]"),
                    ('s', true) => out.push_str(r"\t\n\f\r\x20"),
                    ('s', false) => out.push_str(r"[\t\n\f\r\x20]"),
                    ('S', _) => out.push_str(r"[^\t\n\f\r\x20]"),
                    ('b', false) => out.push_str(r"(?-u:\b)"),
                    ('B', false) => out.push_str(r"(?-u:\B)"),
                    ('Q', false) => {
                        let (quoted, tail) = rest.split_once("\\E").unwrap_or((rest, ""));
                        quoted.chars().for_each(|c| push_literal(&mut out, c));
                        rest = tail;
                    }
                    (escaped, _) => {
                        out.push('\\');
                        out.push(escaped);
                    }
                }
            }
            '[' if !class => {
                class = true;
                out.push('[');
                if let Some(after) = rest.strip_prefix('^') {
                    out.push('^');
                    rest = after;
                }
                // A bracket right at the start is a member.
                if let Some(after) = rest.strip_prefix(']') {
                    out.push_str("\\]");
                    rest = after;
                }
            }
            '[' if after.starts_with(':') && after[1..].contains(":]") => {
                let end = after[1..].find(":]").map_or(0, |end| end + 3);
                out.push('[');
                out.push_str(&after[..end]);
                rest = &after[end..];
            }
            ']' if class => {
                class = false;
                out.push(']');
            }
            '[' | '&' | '~' if class => {
                out.push('\\');
                out.push(c);
            }
            '-' if class && after.starts_with('-') => out.push_str("\\-"),
            '{' if !class && !repetition(after) => out.push_str("\\{"),
            '}' if !class && !out.ends_with(|c: char| c.is_ascii_digit() || c == ',') => out.push_str("\\}"),
            c => out.push(c),
        }
    }
    out
}

/// Whether a brace before `text` repeats: `{2}`, `{2,}`, `{2,3}`.
fn repetition(text: &str) -> bool {
    let Some((inner, _)) = text.split_once('}') else { return false };
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match inner.split_once(',') {
        Some((least, most)) => number(least) && (most.is_empty() || number(most)),
        None => number(inner),
    }
}

fn push_literal(out: &mut String, c: char) {
    if r"\.+*?()|[]{}^$#&-~".contains(c) {
        out.push('\\');
    }
    out.push(c);
}

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

pub(super) fn define(functions: &mut Functions) {
    functions.define("mustRegexMatch", 2, Some(2), |args| {
        let whole = args.text(1)?;
        Ok(Value::Bool(compile(args.text(0)?)?.is_match(whole)))
    });
    functions.define("regexMatch", 2, Some(2), |args| {
        // A bad expression matches nothing.
        let whole = args.text(1)?;
        Ok(Value::Bool(compile(args.text(0)?).is_ok_and(|regex| regex.is_match(whole))))
    });
    for name in ["regexFind", "mustRegexFind"] {
        functions.define(name, 2, Some(2), |args| {
            let whole = args.text(1)?;
            text(compile(args.text(0)?)?.find(whole).map_or("", |found| &whole[found.range()]))
        });
    }
    for name in ["regexFindAll", "mustRegexFindAll"] {
        functions.define(name, 3, Some(3), |args| {
            let whole = args.text(1)?;
            let count = usize::try_from(args.int(2)?).unwrap_or(usize::MAX);
            let regex = compile(args.text(0)?)?;
            let found = regex.find_iter(whole).take(count).map(|found| whole[found.range()].to_owned());
            let found: Vec<String> = found.collect();
            Ok(if found.is_empty() { nothing() } else { Value::texts(found) })
        });
    }
    for name in ["regexReplaceAll", "mustRegexReplaceAll"] {
        functions.define(name, 3, Some(3), |args| text(replace(args, true)?));
    }
    for name in ["regexReplaceAllLiteral", "mustRegexReplaceAllLiteral"] {
        functions.define(name, 3, Some(3), |args| text(replace(args, false)?));
    }
    for name in ["regexSplit", "mustRegexSplit"] {
        functions.define(name, 3, Some(3), split);
    }
    functions.define("regexQuoteMeta", 1, Some(1), |args| {
        let mut out = String::new();
        for c in args.text(0)?.chars() {
            if r"\.+*?()|[]{}^$".contains(c) {
                out.push('\\');
            }
            out.push(c);
        }
        text(out)
    });
}

fn replace(args: Args<'_, '_>, expand: bool) -> Result<String, String> {
    let regex = compile(args.text(0)?)?;
    let (whole, template) = (args.text(1)?, args.text(2)?);
    let mut out = String::new();
    let mut last = 0;
    for captures in regex.captures_iter(whole) {
        let Some(found) = captures.get_match() else { continue };
        out.push_str(&whole[last..found.start()]);
        if expand {
            captures.interpolate_string_into(whole, template, &mut out);
        } else {
            out.push_str(template);
        }
        last = found.end();
    }
    out.push_str(&whole[last..]);
    Ok(out)
}

/// `regexp.Split`: no empty part at the start where the expression matches nothing.
fn split<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let pattern = args.text(0)?;
    let regex = compile(pattern)?;
    let (whole, count) = (args.text(1)?, args.int(2)?);
    let mut parts = Vec::new();
    if count == 0 {
        return Ok(nothing());
    }
    if !pattern.is_empty() && whole.is_empty() {
        return Ok(Value::texts([String::new()]));
    }
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let (mut start, mut end) = (0, 0);
    for found in regex.find_iter(whole).take(most) {
        if parts.len() == most - 1 {
            break;
        }
        end = found.start();
        if found.end() != 0 {
            parts.push(whole[start..end].to_owned());
        }
        start = found.end();
    }
    if end != whole.len() {
        parts.push(whole[start..].to_owned());
    }
    Ok(Value::texts(parts))
}
