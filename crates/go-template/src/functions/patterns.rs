//! sprig's functions on regular expressions. Go's RE2 syntax and Rust's are the same family.

use regex_automata::meta::Regex;
use regex_automata::util::syntax;

use super::{Args, Functions, Outcome};
use crate::value::Value;

/// Memory of a compiled expression.
const SIZE_LIMIT: usize = 1 << 20;

fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::builder()
        .configure(Regex::config().nfa_size_limit(Some(SIZE_LIMIT)).hybrid_cache_capacity(SIZE_LIMIT))
        .syntax(syntax::Config::new().nest_limit(50))
        .build(pattern)
        .map_err(|error| format!("error parsing regexp: {pattern:?}: {error}"))
}

fn text<'a>(value: impl Into<String>) -> Outcome<'a> {
    Ok(Value::from(value.into()))
}

pub(super) fn define(functions: &mut Functions) {
    for name in ["regexMatch", "mustRegexMatch"] {
        functions.define(name, 2, Some(2), |args| Ok(Value::Bool(compile(args.text(0)?)?.is_match(args.text(1)?))));
    }
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
            let found = compile(args.text(0)?)?
                .find_iter(whole)
                .take(count)
                .map(|found| Value::from(whole[found.range()].to_owned()))
                .collect();
            Ok(Value::list(found))
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

fn split<'a>(args: Args<'a, '_>) -> Outcome<'a> {
    let regex = compile(args.text(0)?)?;
    let (whole, count) = (args.text(1)?, args.int(2)?);
    let parts: Vec<&str> = match usize::try_from(count) {
        Ok(0) => Vec::new(),
        Ok(count) => regex.splitn(whole, count).map(|span| &whole[span]).collect(),
        Err(_) => regex.split(whole).map(|span| &whole[span]).collect(),
    };
    Ok(Value::list(parts.into_iter().map(|part| Value::from(part.to_owned())).collect()))
}
