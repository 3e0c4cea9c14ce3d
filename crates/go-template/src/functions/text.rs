//! sprig's functions on strings.

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
    functions.define("upper", 1, Some(1), |args| text(args.text(0)?.to_uppercase()));
    functions.define("lower", 1, Some(1), |args| text(args.text(0)?.to_lowercase()));
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
        text(args.text(0)?.chars().filter(|c| !c.is_whitespace()).collect::<String>())
    });
    functions.define("trunc", 2, Some(2), |args| text(trunc(args.int(0)?, args.text(1)?)));
    functions.define("abbrev", 2, Some(2), |args| text(abbreviate(0, args.int(0)?, args.text(1)?)));
    functions.define("abbrevboth", 3, Some(3), |args| text(abbreviate(args.int(0)?, args.int(1)?, args.text(2)?)));
    functions.define("initials", 1, Some(1), |args| {
        text(args.text(0)?.split_whitespace().filter_map(|word| word.chars().next()).collect::<String>())
    });
    functions.define("wrap", 2, Some(2), |args| text(wrap(args.int(0)?, "\n", args.text(1)?)));
    functions.define("wrapWith", 3, Some(3), |args| text(wrap(args.int(0)?, args.text(1)?, args.text(2)?)));
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
    functions.define("indent", 2, Some(2), |args| text(indent(args.int(0)?, args.text(1)?)));
    functions.define("nindent", 2, Some(2), |args| text(format!("\n{}", indent(args.int(0)?, args.text(1)?))));
    functions.define("replace", 3, Some(3), |args| {
        let (old, new, whole) = (args.text(0)?, args.text(1)?, args.text(2)?);
        if whole.len().saturating_mul(new.len().max(1)) > REPEAT_LIMIT << 4 {
            return Err("the result is too long".to_owned());
        }
        text(whole.replace(old, new))
    });
    functions.define("plural", 3, Some(3), |args| text(args.text(if args.int(2)? == 1 { 0 } else { 1 })?));
    functions.define("snakecase", 1, Some(1), |args| text(separated(args.text(0)?, '_')));
    functions.define("kebabcase", 1, Some(1), |args| text(separated(args.text(0)?, '-')));
    functions.define("camelcase", 1, Some(1), |args| text(camel(args.text(0)?)));
    functions.define("swapcase", 1, Some(1), |args| text(swap_case(args.text(0)?)));
    functions.define("toString", 1, Some(1), |args| text(args.strval(0)));
    functions.define("toStrings", 1, Some(1), |args| {
        let words = strings(args.get(0)).into_iter().map(Value::from).collect();
        Ok(Value::list(words))
    });
    functions.define("join", 2, Some(2), |args| text(strings(args.get(1)).join(args.text(0)?)));
    functions.define("splitList", 2, Some(2), |args| {
        let parts = split(args.text(1)?, args.text(0)?);
        Ok(Value::list(parts.into_iter().map(|part| Value::from(part.to_owned())).collect()))
    });
    functions.define("sortAlpha", 1, Some(1), |args| {
        let mut words = strings(args.get(0));
        words.sort();
        Ok(Value::list(words.into_iter().map(Value::from).collect()))
    });
    functions.define("ellipsis", 2, Some(2), |args| text(abbreviate(0, args.int(0)?, args.text(1)?)));
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
    if separator.is_empty() {
        whole.char_indices().map(|(at, c)| &whole[at..at + c.len_utf8()]).collect()
    } else {
        whole.split(separator).collect()
    }
}

fn trim_all(cut: &str, whole: &str) -> String {
    whole.trim_matches(|c| cut.contains(c)).to_owned()
}

fn title(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut start = true;
    for c in words.chars() {
        if start {
            out.extend(c.to_uppercase());
        } else {
            out.push(c);
        }
        start = !(c.is_alphanumeric() || c == '_' || (!c.is_ascii() && !c.is_whitespace()) || c == '\'');
    }
    out
}

fn untitle(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut start = true;
    for c in words.chars() {
        if start {
            out.extend(c.to_lowercase());
        } else {
            out.push(c);
        }
        start = c.is_whitespace();
    }
    out
}

/// Go slices bytes; a cut within a character moves back to its start.
fn prefix(whole: &str, length: usize) -> &str {
    let mut end = length.min(whole.len());
    while !whole.is_char_boundary(end) {
        end -= 1;
    }
    &whole[..end]
}

fn trunc(count: i64, whole: &str) -> &str {
    if count >= 0 {
        return prefix(whole, usize::try_from(count).unwrap_or(usize::MAX));
    }
    let keep = usize::try_from(count.unsigned_abs()).unwrap_or(usize::MAX);
    let mut start = whole.len().saturating_sub(keep);
    while !whole.is_char_boundary(start) {
        start += 1;
    }
    &whole[start..]
}

fn substr<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let (start, end, whole) = (args.int(0)?, args.int(1)?, args.text(2)?);
    let bound = |at: i64| usize::try_from(at).ok();
    let cut = match (bound(start), bound(end)) {
        (None, None) => "",
        (None, Some(end)) => prefix(whole, end),
        (Some(start), end) => {
            let end = end.filter(|end| *end <= whole.len()).unwrap_or(whole.len());
            whole.get(start..end).ok_or_else(|| format!("slice bounds out of range [{start}:{end}]"))?
        }
    };
    text(cut)
}

fn abbreviate(offset: i64, width: i64, whole: &str) -> String {
    let chars: Vec<char> = whole.chars().collect();
    let width = usize::try_from(width).unwrap_or(0);
    let mut offset = usize::try_from(offset).unwrap_or(0);
    if width < 4 || (offset > 0 && width < 7) || chars.len() <= width {
        return whole.to_owned();
    }
    offset = offset.min(chars.len());
    if chars.len() - offset < width - 3 {
        offset = chars.len() - (width - 3);
    }
    if offset <= 4 {
        return chars[..width - 3].iter().chain(['.', '.', '.'].iter()).collect();
    }
    let rest: String = chars[offset..].iter().collect();
    if offset + width - 3 < chars.len() {
        return format!("...{}", abbreviate(0, (width - 3) as i64, &rest));
    }
    let tail: String = chars[chars.len() - (width - 3)..].iter().collect();
    format!("...{tail}")
}

/// As goutils' `WrapCustom`: lines end at spaces, words that are too long stay whole.
fn wrap(width: i64, newline: &str, whole: &str) -> String {
    let width = usize::try_from(width).unwrap_or(1).max(1);
    let chars: Vec<char> = whole.chars().collect();
    let mut out = String::with_capacity(whole.len());
    let mut at = 0;
    while chars.len() - at > width {
        if chars[at] == ' ' {
            at += 1;
            continue;
        }
        let end = (at + width + 1).min(chars.len());
        let space = chars[at..end].iter().rposition(|c| *c == ' ').map(|space| space + at);
        let space =
            space.or_else(|| chars[at + width..].iter().position(|c| *c == ' ').map(|space| space + at + width));
        let Some(space) = space else { break };
        out.extend(&chars[at..space]);
        out.push_str(newline);
        at = space + 1;
    }
    out.extend(&chars[at..]);
    out
}

fn indent(spaces: i64, whole: &str) -> String {
    let pad = " ".repeat(usize::try_from(spaces).unwrap_or(0).min(10_000));
    format!("{pad}{}", whole.replace('\n', &format!("\n{pad}")))
}

fn separated(words: &str, separator: char) -> String {
    let chars: Vec<char> = words.chars().collect();
    let mut out = String::with_capacity(words.len() + 4);
    for (at, c) in chars.iter().enumerate() {
        if matches!(c, ' ' | '_' | '-') {
            if !out.ends_with(separator) && !out.is_empty() {
                out.push(separator);
            }
            continue;
        }
        if c.is_uppercase() && at > 0 {
            let before = chars[at - 1];
            let after_lower = chars.get(at + 1).is_some_and(|next| next.is_lowercase());
            if (before.is_lowercase() || before.is_ascii_digit() || (before.is_uppercase() && after_lower))
                && !out.ends_with(separator)
            {
                out.push(separator);
            }
        }
        out.extend(c.to_lowercase());
    }
    out
}

fn camel(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    let mut upper = true;
    for c in words.chars() {
        if matches!(c, ' ' | '_' | '-') {
            upper = true;
        } else if upper {
            out.extend(c.to_uppercase());
            upper = false;
        } else {
            out.push(c);
        }
    }
    out
}

fn swap_case(words: &str) -> String {
    let mut out = String::with_capacity(words.len());
    for c in words.chars() {
        if c.is_lowercase() {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
    }
    out
}
