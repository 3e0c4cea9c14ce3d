//! sprig's functions on semantic versions, as Masterminds/semver reads versions and constraints.

use std::cmp::Ordering;
use std::rc::Rc;

use super::{Functions, Outcome};
use crate::value::{Element, Map, Value};

pub(super) fn define(functions: &mut Functions) {
    functions.define("semver", 1, Some(1), |args| {
        let written = args.text(0)?;
        let version = Version::parse(written).ok_or("Invalid Semantic Version")?;
        Ok(version.describe(written))
    });
    functions.define("semverCompare", 2, Some(2), |args| {
        let version = Version::parse(args.text(1)?).ok_or("Invalid Semantic Version")?;
        compare(args.text(0)?, &version)
    });
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    numbers: [u64; 3],
    /// How many of the numbers were written.
    written: usize,
    pre: String,
    build: String,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let (text, build) = text.split_once('+').unwrap_or((text, ""));
        let (core, pre) = text.split_once('-').unwrap_or((text, ""));
        let mut numbers = [0; 3];
        let mut written = 0;
        for part in core.split('.') {
            if written == 3 || part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            numbers[written] = part.parse().ok()?;
            written += 1;
        }
        Some(Self { numbers, written, pre: pre.to_owned(), build: build.to_owned() })
    }

    fn describe<'a>(&self, written: &str) -> Value<'a> {
        let number = |at: usize| Value::Int(self.numbers[at] as i64, "uint64");
        Value::Map(Map::new(
            Element::Any,
            [
                ("Major", number(0)),
                ("Minor", number(1)),
                ("Patch", number(2)),
                ("Prerelease", Value::from(self.pre.clone())),
                ("Metadata", Value::from(self.build.clone())),
                ("Original", Value::from(written.to_owned())),
            ]
            .map(|(name, value)| (Rc::from(name), value)),
        ))
    }

    fn order(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers).then_with(|| match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            (false, false) => order_pre(&self.pre, &other.pre),
        })
    }
}

fn order_pre(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a.split('.'), b.split('.'));
    loop {
        let order = match (left.next(), right.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(a), Some(b)) => match (a.parse::<u64>(), b.parse::<u64>()) {
                (Ok(a), Ok(b)) => a.cmp(&b),
                (Ok(_), Err(_)) => Ordering::Less,
                (Err(_), Ok(_)) => Ordering::Greater,
                (Err(_), Err(_)) => a.cmp(b),
            },
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Alternatives are split by `||`, what must hold together by commas or spaces.
fn compare<'a>(constraint: &str, version: &Version) -> Outcome<'a> {
    let mut matched = false;
    for alternative in constraint.split("||") {
        let mut all = true;
        let mut words: Vec<String> = Vec::new();
        for word in alternative.split([',', ' ']).filter(|word| !word.is_empty()) {
            match words.last_mut() {
                // An operator may stand apart from its version; a hyphen makes a range.
                Some(last) if last.ends_with(['=', '<', '>', '~', '^', '!']) => last.push_str(word),
                _ => words.push(word.to_owned()),
            }
        }
        if let [low, hyphen, high] = words.as_slice()
            && hyphen == "-"
        {
            words = vec![format!(">={low}"), format!("<={high}")];
        }
        for word in &words {
            all &= holds(word, version).ok_or_else(|| format!("improper constraint: {constraint}"))?;
        }
        matched |= all;
    }
    Ok(Value::Bool(matched))
}

fn holds(word: &str, version: &Version) -> Option<bool> {
    let split = word.find(|c: char| !"=!<>~^".contains(c))?;
    let (operator, text) = word.split_at(split);
    let text = text.strip_prefix('v').unwrap_or(text);
    let parts: Vec<&str> = text.split(['.', '-', '+']).take(3).collect();
    let wild = parts.iter().position(|part| matches!(*part, "x" | "X" | "*"));
    let base = match wild {
        Some(0) => Version { numbers: [0; 3], written: 0, pre: String::new(), build: String::new() },
        Some(count) => Version::parse(&parts[..count].join("."))?,
        None => Version::parse(text)?,
    };
    // A version with a pre-release only fits constraints that name one.
    if !version.pre.is_empty() && base.pre.is_empty() {
        return Some(false);
    }
    let order = version.order(&base);
    let same = |count: usize| version.numbers[..count] == base.numbers[..count];
    Some(match operator {
        "" | "=" if base.written < 3 => same(base.written),
        "" | "=" => order == Ordering::Equal,
        "!=" if base.written < 3 => !same(base.written),
        "!=" => order != Ordering::Equal,
        ">" if base.written < 3 => order == Ordering::Greater && !same(base.written),
        ">" => order == Ordering::Greater,
        ">=" | "=>" => order != Ordering::Less,
        "<" => order == Ordering::Less,
        "<=" | "=<" if base.written < 3 => order != Ordering::Greater || same(base.written),
        "<=" | "=<" => order != Ordering::Greater,
        "~" | "~>" => order != Ordering::Less && same(base.written.clamp(0, 2)),
        "^" => {
            let significant = match base.numbers {
                [0, 0, _] if base.written == 3 => 3,
                [0, _, _] if base.written >= 2 => 2,
                _ => base.written.min(1),
            };
            order != Ordering::Less && same(significant)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{Version, holds};

    #[test]
    fn constraints() {
        let check = |word: &str, version: &str| holds(word, &Version::parse(version).unwrap()).unwrap();
        assert!(check("^1.2", "1.9.0"));
        assert!(!check("^1.2", "2.0.0"));
        assert!(!check("^0.2.3", "0.3.0"));
        assert!(check("~1.2.3", "1.2.9"));
        assert!(!check("~1.2.3", "1.3.0"));
        assert!(check("1.x", "1.9.9"));
        assert!(!check(">=1.2", "1.3.0-rc1"));
        assert!(check(">=1.2-0", "1.3.0-rc1"));
    }
}
