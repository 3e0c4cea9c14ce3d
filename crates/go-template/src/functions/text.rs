//! sprig's functions on strings.

mod words;

use super::{Args, Functions, Outcome};
use crate::format::{quote, strval};
use crate::value::Value;

/// Results of functions that multiply their argument.
const REPEAT_LIMIT: usize = 4 << 20;

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

pub(super) fn define(functions: &mut Functions) {
    functions.define("trim", 1, Some(1), |args| text(args.text(0)?.trim()));
    functions.define("trimAll", 2, Some(2), |args| text(trim_all(args.text(0)?, args.text(1)?)));
    functions.define("trimall", 2, Some(2), |args| text(trim_all(args.text(0)?, args.text(1)?)));
    functions.define("trimPrefix", 2, Some(2), |args| {
        let whole = args.text(1)?;
        text(whole.strip_prefix(args.text(0)?).unwrap_or(whole))
    });
    functions.define("trimSuffix", 2, Some(2), |args| {
        let whole = args.text(1)?;
        text(whole.strip_suffix(args.text(0)?).unwrap_or(whole))
    });
    functions.define("upper", 1, Some(1), |args| text(args.text(0)?.chars().map(upper).collect::<String>()));
    functions.define("lower", 1, Some(1), |args| text(args.text(0)?.chars().map(lower).collect::<String>()));
    functions.define("title", 1, Some(1), |args| text(title(args.text(0)?)));
    functions.define("untitle", 1, Some(1), |args| text(untitle(args.text(0)?)));
    functions.define("repeat", 2, Some(2), |args| {
        let (count, part) = (args.int(0)?, args.text(1)?);
        let count = usize::try_from(count).map_err(|_| "strings: negative Repeat count".to_owned())?;
        if part.len().saturating_mul(count) > REPEAT_LIMIT {
            return Err(format!("a result of more than {REPEAT_LIMIT} bytes"));
        }
        text(part.repeat(count))
    });
    functions.define("substr", 3, Some(3), substr);
    functions.define("nospace", 1, Some(1), |args| {
        text(latin(args.text(0)?).filter(|c| !c.is_whitespace()).collect::<String>())
    });
    functions.define("trunc", 2, Some(2), |args| text(trunc(args.int(0)?, args.text(1)?)));
    functions.define("abbrev", 2, Some(2), |args| text(abbreviate(0, args.int(0)?, args.text(1)?)));
    functions.define("abbrevboth", 3, Some(3), |args| text(abbreviate(args.int(0)?, args.int(1)?, args.text(2)?)));
    functions.define("initials", 1, Some(1), |args| text(initials(args.text(0)?)));
    functions.define("wrap", 2, Some(2), |args| text(wrap(args.int(0)?, "\n", args.text(1)?, false)));
    functions.define("wrapWith", 3, Some(3), |args| text(wrap(args.int(0)?, args.text(1)?, args.text(2)?, true)));
    functions.define("contains", 2, Some(2), |args| Ok(Value::Bool(args.text(1)?.contains(args.text(0)?))));
    functions.define("hasPrefix", 2, Some(2), |args| Ok(Value::Bool(args.text(1)?.starts_with(args.text(0)?))));
    functions.define("hasSuffix", 2, Some(2), |args| Ok(Value::Bool(args.text(1)?.ends_with(args.text(0)?))));
    functions.define("quote", 0, None, |args| {
        let words: Vec<String> = present(args).map(|value| quote(&strval(value))).collect();
        text(words.join(" "))
    });
    functions.define("squote", 0, None, |args| {
        let words: Vec<String> = present(args).map(|value| format!("'{}'", strval(value))).collect();
        text(words.join(" "))
    });
    functions.define("cat", 0, None, |args| {
        let words: Vec<String> = present(args).map(strval).collect();
        text(words.join(" "))
    });
    functions.define("indent", 2, Some(2), |args| text(indent(args.int(0)?, args.text(1)?)?));
    functions.define("nindent", 2, Some(2), |args| text(format!("\n{}", indent(args.int(0)?, args.text(1)?)?)));
    functions.define("replace", 3, Some(3), |args| {
        let (old, new, whole) = (args.text(0)?, args.text(1)?, args.text(2)?);
        if whole.len().saturating_mul(new.len().max(1)) > REPEAT_LIMIT << 4 {
            return Err("the result is too long".to_owned());
        }
        text(whole.replace(old, new))
    });
    functions.define("plural", 3, Some(3), |args| {
        let (one, many, count) = (args.text(0)?, args.text(1)?, args.int(2)?);
        text(if count == 1 { one } else { many })
    });
    functions.define("snakecase", 1, Some(1), |args| text(words::separated(args.text(0)?, '_')));
    functions.define("kebabcase", 1, Some(1), |args| text(words::separated(args.text(0)?, '-')));
    functions.define("camelcase", 1, Some(1), |args| text(words::pascal(args.text(0)?)));
    functions.define("swapcase", 1, Some(1), |args| text(swap_case(args.text(0)?)));
    functions.define("toString", 1, Some(1), |args| text(args.strval(0)));
    functions.define("toStrings", 1, Some(1), |args| Ok(Value::texts(strings(args.get(0)))));
    functions.define("join", 2, Some(2), |args| text(strings(args.get(1)).join(args.text(0)?)));
    functions.define("splitList", 2, Some(2), |args| {
        let parts = split(args.text(1)?, args.text(0)?);
        Ok(Value::texts(parts.into_iter().map(str::to_owned)))
    });
    functions.define("sortAlpha", 1, Some(1), |args| {
        let mut words = match args.get(0) {
            list @ Value::List(_) => strings(list),
            other => vec![strval(other)],
        };
        words.sort();
        Ok(Value::texts(words))
    });
    functions.define("hello", 0, Some(0), |_| text("Hello!"));
}

/// The arguments that are not nil, which the quoting functions leave out.
fn present<'a, 'b>(args: Args<'a, 'b>) -> impl Iterator<Item = &'b Value<'a>> {
    args.all().iter().filter(|value| !matches!(value, Value::Nil))
}

/// sprig's `strslice`: a list's items that are not nil as strings; anything else is its own only item.
pub(super) fn strings(value: &Value<'_>) -> Vec<String> {
    match value {
        Value::Nil => Vec::new(),
        Value::List(list) => list.iter().filter(|item| !matches!(item, Value::Nil)).map(|item| strval(&item)).collect(),
        other => vec![strval(other)],
    }
}

/// `strings.Split`: an empty separator splits after each character.
pub(super) fn split<'t>(whole: &'t str, separator: &str) -> Vec<&'t str> {
    splitn(whole, separator, usize::MAX)
}

/// `strings.SplitN` for at most `count` parts.
pub(super) fn splitn<'t>(whole: &'t str, separator: &str, count: usize) -> Vec<&'t str> {
    if count == 0 {
        return Vec::new();
    }
    if !separator.is_empty() {
        return whole.splitn(count, separator).collect();
    }
    let mut parts = Vec::new();
    let mut rest = whole;
    while let Some(c) = rest.chars().next() {
        if parts.len() + 1 == count {
            parts.push(rest);
            break;
        }
        let (first, after) = rest.split_at(c.len_utf8());
        parts.push(first);
        rest = after;
    }
    parts
}

/// `unicode.ToUpper`: what has no upper case of one character stays.
pub(super) fn upper(c: char) -> char {
    let mut all = c.to_uppercase();
    match (all.next(), all.next()) {
        (Some(one), None) => one,
        _ => c,
    }
}

/// `unicode.ToLower`.
fn lower(c: char) -> char {
    c.to_lowercase().next().unwrap_or(c)
}

/// The bytes as characters of their number, which is how goutils reads strings.
fn latin(text: &str) -> impl Iterator<Item = char> {
    // What has nothing to leave out stays as it is.
    let (whole, bytes) = if text.bytes().any(|b| char::from(b).is_whitespace()) { ("", text) } else { (text, "") };
    whole.chars().chain(bytes.bytes().map(char::from))
}

fn initials(text: &str) -> String {
    let mut gap = true;
    let mut out = String::new();
    for c in text.bytes().map(char::from) {
        if c.is_whitespace() {
            gap = true;
        } else if std::mem::take(&mut gap) {
            out.push(c);
        }
    }
    out
}

fn trim_all(cut: &str, whole: &str) -> String {
    whole.trim_matches(|c| cut.contains(c)).to_owned()
}

fn title(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut start = true;
    for c in words.chars() {
        if start {
            out.push(upper(c));
        } else {
            out.push(c);
        }
        // As strings.Title: within ASCII all but letters, digits and underscores separates words.
        start = if c.is_ascii() { !c.is_ascii_alphanumeric() && c != '_' } else { c.is_whitespace() };
    }
    out
}

fn untitle(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut start = true;
    for c in words.chars() {
        if start {
            out.push(lower(c));
        } else {
            out.push(c);
        }
        start = c.is_whitespace();
    }
    out
}

/// What Go's slice of bytes is as text: characters that were cut show as replacement characters.
fn bytes(slice: &[u8]) -> String {
    match std::str::from_utf8(slice) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            // One mark a byte, as Go decodes it.
            let mut out = String::new();
            for chunk in slice.utf8_chunks() {
                out.push_str(chunk.valid());
                out.extend(std::iter::repeat_n('\u{fffd}', chunk.invalid().len()));
            }
            out
        }
    }
}

fn trunc(count: i64, whole: &str) -> String {
    let size = usize::try_from(count.unsigned_abs()).unwrap_or(usize::MAX);
    if size >= whole.len() {
        return whole.to_owned();
    }
    bytes(if count >= 0 { &whole.as_bytes()[..size] } else { &whole.as_bytes()[whole.len() - size..] })
}

fn substr<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let (start, end, whole) = (args.int(0)?, args.int(1)?, args.text(2)?.as_bytes());
    let slice = match (usize::try_from(start), usize::try_from(end)) {
        (Err(_), Ok(end)) => whole.get(..end),
        (Err(_), Err(_)) => None,
        (Ok(start), Ok(end)) if end <= whole.len() => whole.get(start..end),
        (Ok(start), _) => whole.get(start..),
    };
    match slice {
        Some(slice) => text(bytes(slice)),
        None => Err(format!("runtime error: slice bounds out of range [{start}:{end}]")),
    }
}

/// As goutils' `AbbreviateFull`, which counts bytes.
fn abbreviate(offset: i64, width: i64, whole: &str) -> String {
    let whole = whole.as_bytes();
    let width = usize::try_from(width).unwrap_or(0);
    if width < 4 || (offset > 0 && width < 7) || whole.len() <= width {
        return bytes(whole);
    }
    let mut offset = usize::try_from(offset).unwrap_or(0).min(whole.len());
    let keep = width - 3;
    if whole.len() - offset < keep {
        offset = whole.len() - keep;
    }
    if offset <= 4 {
        return bytes(&whole[..keep]) + "...";
    }
    if offset + keep >= whole.len() {
        return format!("...{}", bytes(&whole[whole.len() - keep..]));
    }
    // What is in the middle is abbreviated itself, when there is room for it.
    let rest = &whole[offset..];
    match keep {
        ..4 => "...".to_owned(),
        _ if rest.len() <= keep => format!("...{}", bytes(rest)),
        _ => format!("...{}...", bytes(&rest[..keep - 3])),
    }
}

/// As goutils' `WrapCustom`, which counts bytes: lines end at spaces; words that are too long are cut or
/// stay whole.
fn wrap(width: i64, newline: &str, whole: &str, cut: bool) -> String {
    let width = usize::try_from(width).unwrap_or(1).max(1);
    let newline = if newline.is_empty() { "\n" } else { newline };
    let whole = whole.as_bytes();
    let mut out = Vec::with_capacity(whole.len());
    let mut at = 0;
    while whole.len() - at > width {
        if whole[at] == b' ' {
            at += 1;
            continue;
        }
        let space = match whole[at..=at + width].iter().rposition(|b| *b == b' ') {
            Some(space) => at + space,
            None if cut => {
                out.extend_from_slice(&whole[at..at + width]);
                out.extend_from_slice(newline.as_bytes());
                at += width;
                continue;
            }
            None => match whole[at + width..].iter().position(|b| *b == b' ') {
                Some(space) => at + width + space,
                None => break,
            },
        };
        out.extend_from_slice(&whole[at..space]);
        out.extend_from_slice(newline.as_bytes());
        at = space + 1;
    }
    out.extend_from_slice(&whole[at..]);
    bytes(&out)
}

fn indent(spaces: i64, whole: &str) -> Result<String, String> {
    let spaces = usize::try_from(spaces).map_err(|_| "strings: negative Repeat count".to_owned())?;
    let lines = whole.matches('\n').count() + 1;
    if spaces.saturating_mul(lines) > REPEAT_LIMIT {
        return Err(format!("a result of more than {REPEAT_LIMIT} bytes"));
    }
    let pad = " ".repeat(spaces);
    Ok(format!("{pad}{}", whole.replace('\n', &format!("\n{pad}"))))
}

/// As goutils' `SwapCase`; title case is upper case.
fn swap_case(words: &str) -> String {
    words
        .chars()
        .map(|c| match c {
            c if c.is_uppercase() => lower(c),
            c if c.is_lowercase() => upper(c),
            c => c,
        })
        .collect()
}
