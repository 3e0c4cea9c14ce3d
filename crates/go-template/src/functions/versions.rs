//! sprig's functions on semantic versions, as Masterminds/semver v3 reads versions and constraints.

use std::cmp::Ordering;
use std::fmt;
use std::rc::Rc;
use std::sync::LazyLock;

use regex_automata::meta::Regex;

use super::Functions;
use crate::value::Value;

pub(super) fn define(functions: &mut Functions) {
    functions.define("semver", 1, Some(1), |args| Ok(Value::Version(Rc::new(Version::parse(args.text(0)?)?))));
    functions.define("semverCompare", 2, Some(2), |args| {
        let (constraint, version) = (args.text(0)?, args.text(1)?);
        let alternatives = constraints(constraint)?;
        let version = Version::parse(version)?;
        Ok(Value::Bool(alternatives.iter().any(|all| all.iter().all(|one| one.holds(&version)))))
    });
}

/// A semantic version, of which minor and patch may be missing in writing.
#[derive(Clone, Debug)]
pub struct Version {
    numbers: [u64; 3],
    pre: String,
    build: String,
    original: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.numbers;
        write!(f, "{major}.{minor}.{patch}")?;
        if !self.pre.is_empty() {
            write!(f, "-{}", self.pre)?;
        }
        if !self.build.is_empty() {
            write!(f, "+{}", self.build)?;
        }
        Ok(())
    }
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.original == other.original
    }
}

/// Dot-separated identifiers.
fn identifiers(text: &str) -> bool {
    text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
}

impl Version {
    fn parse(original: &str) -> Result<Self, String> {
        let invalid = || "Invalid Semantic Version".to_owned();
        let text = original.strip_prefix('v').unwrap_or(original);
        let (text, build) = match text.split_once('+') {
            Some((text, build)) if identifiers(build) => (text, build),
            Some(_) => return Err(invalid()),
            None => (text, ""),
        };
        let (core, pre) = match text.split_once('-') {
            Some((core, pre)) if identifiers(pre) => (core, pre),
            Some(_) => return Err(invalid()),
            None => (text, ""),
        };
        let mut numbers = [0; 3];
        for (index, part) in core.split('.').enumerate() {
            let slot = numbers.get_mut(index).ok_or_else(invalid)?;
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return Err(invalid());
            }
            *slot = part.parse().map_err(|error| format!("Error parsing version segment: {error}"))?;
        }
        let leading_zero =
            |part: &str| part.len() > 1 && part.starts_with('0') && part.bytes().all(|b| b.is_ascii_digit());
        if !pre.is_empty() && pre.split('.').any(leading_zero) {
            return Err("Version segment starts with 0".to_owned());
        }
        Ok(Self { numbers, pre: pre.to_owned(), build: build.to_owned(), original: original.to_owned() })
    }

    fn order(&self, other: &Self) -> Ordering {
        self.numbers.cmp(&other.numbers).then_with(|| match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            (false, false) => order_pre(&self.pre, &other.pre),
        })
    }

    /// What the method `name` returns; `None` when there is none that takes these arguments.
    pub(crate) fn call<'a>(&self, name: &str, args: &[Value<'a>]) -> Option<Value<'a>> {
        let next = |numbers: [u64; 3]| {
            let version = Self { numbers, pre: String::new(), build: String::new(), original: String::new() };
            let prefix = if self.original.starts_with('v') { "v" } else { "" };
            Value::Version(Rc::new(Self { original: format!("{prefix}{version}"), ..version }))
        };
        let [major, minor, patch] = self.numbers;
        let number = |value: u64| Value::Int(value as i64, "uint64");
        Some(match (name, args) {
            ("Major", []) => number(major),
            ("Minor", []) => number(minor),
            ("Patch", []) => number(patch),
            ("Prerelease", []) => Value::from(self.pre.clone()),
            ("Metadata", []) => Value::from(self.build.clone()),
            ("Original", []) => Value::from(self.original.clone()),
            ("String", []) => Value::from(self.to_string()),
            ("IncMajor", []) => next([major + 1, 0, 0]),
            ("IncMinor", []) => next([major, minor + 1, 0]),
            ("IncPatch", []) => next([major, minor, patch + u64::from(self.pre.is_empty())]),
            ("Compare", [Value::Version(other)]) => Value::int(self.order(other) as i64),
            ("Equal", [Value::Version(other)]) => Value::Bool(self.order(other).is_eq()),
            ("LessThan", [Value::Version(other)]) => Value::Bool(self.order(other).is_lt()),
            ("LessThanEqual", [Value::Version(other)]) => Value::Bool(self.order(other).is_le()),
            ("GreaterThan", [Value::Version(other)]) => Value::Bool(self.order(other).is_gt()),
            ("GreaterThanEqual", [Value::Version(other)]) => Value::Bool(self.order(other).is_ge()),
            _ => return None,
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

/// An operator with the version after it.
struct Constraint {
    operator: String,
    base: Version,
    /// Some number is missing or `x`.
    open: bool,
    /// The minor number is the first that is open.
    minor_open: bool,
    /// The patch number is.
    patch_open: bool,
}

/// A version whose numbers may be `x` or missing.
const LOOSE: &str =
    r"v?[0-9|xX*]+(?:\.[0-9|xX*]+){0,2}(?:-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?";

struct Patterns {
    /// `1.2 - 2.3`
    range: Regex,
    /// One alternative as a whole.
    all: Regex,
    /// One constraint of it.
    one: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let operator = "=||!=|>|<|>=|=>|<=|=<|~|~>|\\^";
    let regex = |pattern: &str| Regex::new(pattern).expect("the pattern is constant");
    Patterns {
        range: regex(&format!(r"\s*({LOOSE})\s+-\s+({LOOSE})\s*")),
        all: regex(&format!(
            r"^(?:\s*(?:{operator})\s*(?:{LOOSE})\s*)(?:(?:\s+|,\s*)(?:{operator})\s*(?:{LOOSE})\s*)*$"
        )),
        one: regex(&format!(r"({operator})\s*({LOOSE})")),
    }
});

/// Alternatives are split by `||`, what must hold together by commas or blanks.
fn constraints(written: &str) -> Result<Vec<Vec<Constraint>>, String> {
    let mut text = String::new();
    let mut last = 0;
    for found in PATTERNS.range.captures_iter(written) {
        let (Some(whole), Some(low), Some(high)) = (found.get_match(), found.get_group(1), found.get_group(2)) else {
            continue;
        };
        text.push_str(&written[last..whole.start()]);
        text.push_str(&format!(">= {}, <= {} ", &written[low], &written[high]));
        last = whole.end();
    }
    text.push_str(&written[last..]);
    let alternative = |text: &str| {
        if !PATTERNS.all.is_match(text) {
            return Err(format!("improper constraint: {text}"));
        }
        PATTERNS
            .one
            .captures_iter(text)
            .filter_map(|found| Some((&text[found.get_group(1)?], &text[found.get_group(2)?])))
            .map(|(operator, version)| Constraint::parse(operator, version))
            .collect()
    };
    text.split("||").map(alternative).collect()
}

impl Constraint {
    fn parse(operator: &str, written: &str) -> Result<Self, String> {
        let text = written.strip_prefix('v').unwrap_or(written);
        let (text, _) = text.split_once('+').unwrap_or((text, ""));
        let (core, pre) = match text.find('-') {
            Some(at) => text.split_at(at),
            None => (text, ""),
        };
        let numbers: Vec<&str> = core.split('.').collect();
        let open = (0..3).find(|at| numbers.get(*at).is_none_or(|number| matches!(*number, "x" | "X" | "*")));
        let base = match open {
            Some(0) => format!("0.0.0{pre}"),
            Some(1) => format!("{}.0.0{pre}", numbers[0]),
            Some(_) => format!("{}.{}.0{pre}", numbers[0], numbers[1]),
            None => written.to_owned(),
        };
        let base = Version::parse(&base).map_err(|_| "constraint Parser Error".to_owned())?;
        Ok(Self {
            operator: operator.to_owned(),
            base,
            open: open.is_some(),
            minor_open: open == Some(1),
            patch_open: open == Some(2),
        })
    }

    fn holds(&self, version: &Version) -> bool {
        let (base, operator) = (&self.base, self.operator.as_str());
        // A version with a pre-release only fits constraints that name one.
        if !version.pre.is_empty() && base.pre.is_empty() && (operator != "!=" || self.open) {
            return false;
        }
        let order = version.order(base);
        let ([major, minor, _], [base_major, base_minor, base_patch]) = (version.numbers, base.numbers);
        match operator {
            "" | "=" if !self.open => order.is_eq(),
            "" | "=" | "~" | "~>" => {
                let anything = base.numbers == [0; 3] && !self.minor_open && !self.patch_open;
                order.is_ge() && (anything || (major == base_major && (minor == base_minor || self.minor_open)))
            }
            "!=" if !self.open => order.is_ne(),
            "!=" if major != base_major => true,
            "!=" if self.minor_open => false,
            "!=" if minor != base_minor => true,
            "!=" if self.patch_open => {
                (!version.pre.is_empty() || !base.pre.is_empty()) && order_pre(&version.pre, &base.pre).is_ne()
            }
            "!=" => order.is_ne(),
            ">" if !self.open => order.is_gt(),
            ">" if major != base_major => major > base_major,
            ">" if self.minor_open => false,
            ">" if self.patch_open => minor > base_minor,
            ">" => order.is_gt(),
            ">=" | "=>" => order.is_ge(),
            "<" => order.is_lt(),
            "<=" | "=<" if !self.open => order.is_le(),
            "<=" | "=<" => major < base_major || (major == base_major && (minor <= base_minor || self.minor_open)),
            // ^
            _ if order.is_lt() => false,
            _ if base_major > 0 || self.minor_open => major == base_major,
            _ if major > 0 => false,
            _ if base_minor > 0 || self.patch_open => minor == base_minor,
            _ => minor == 0 && version.numbers[2] == base_patch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Version, constraints};

    #[test]
    fn ranges() {
        let check = |written: &str, version: &str| {
            let version = Version::parse(version).unwrap();
            constraints(written).unwrap().iter().any(|all| all.iter().all(|one| one.holds(&version)))
        };
        assert!(check("^1.2", "1.9.0"));
        assert!(!check("^1.2", "2.0.0"));
        assert!(!check("^0.2.3", "0.3.0"));
        assert!(check("~1.2.3", "1.2.9"));
        assert!(!check("~1.2.3", "1.3.0"));
        assert!(check("1.x", "1.9.9"));
        assert!(!check(">=1.2", "1.3.0-rc1"));
        assert!(check(">=1.2-0", "1.3.0-rc1"));
        assert!(check("1.2 - 2 || 4", "4.1.0"));
        assert!(constraints("bad!").is_err());
    }
}
