//! Conditions on strings, headers, query parameters, paths and metadata, compiled once.

mod regex;
mod request;
mod value;

pub use regex::{Regex, Substitution, searched};
pub use request::{CookieMatcher, HeaderMatcher, QueryMatcher, first_query_value, path_without_query};
pub(crate) use request::{canonical_name, cookie, header_matchers};
pub use value::{FilterStateMatcher, MetadataMatcher, ValueMatcher};

use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// A condition on a string (`type.matcher.v3.StringMatcher`).
#[derive(Clone, Debug)]
pub enum StringMatcher {
    /// The whole text; lower case if `ignore_case`.
    Exact { text: Box<str>, ignore_case: bool },
    /// Its beginning.
    Prefix { text: Box<str>, ignore_case: bool },
    /// Its end.
    Suffix { text: Box<str>, ignore_case: bool },
    /// Any part of it.
    Contains { text: Box<str>, ignore_case: bool },
    /// The whole text by RE2 syntax.
    Regex(Regex),
}

impl StringMatcher {
    pub(crate) fn compile(matcher: &pb::matcher::StringMatcher) -> Compiled<Self> {
        use pb::matcher::string_matcher::MatchPattern as Pattern;
        let ignore_case = matcher.ignore_case;
        let text = |field: &str, text: &str, may_be_empty: bool| -> Compiled<Box<str>> {
            if text.is_empty() && !may_be_empty {
                return Err(Invalid::new(field, "is empty"));
            }
            Ok(if ignore_case { text.to_ascii_lowercase().into() } else { text.into() })
        };
        Ok(match &matcher.match_pattern {
            Some(Pattern::Exact(t)) => Self::Exact { text: text("exact", t, true)?, ignore_case },
            Some(Pattern::Prefix(t)) => Self::Prefix { text: text("prefix", t, false)?, ignore_case },
            Some(Pattern::Suffix(t)) => Self::Suffix { text: text("suffix", t, false)?, ignore_case },
            Some(Pattern::Contains(t)) => Self::Contains { text: text("contains", t, false)?, ignore_case },
            Some(Pattern::SafeRegex(_)) if ignore_case => {
                return Err(Invalid::new("ignore_case", "has no effect for safe_regex"));
            }
            Some(Pattern::SafeRegex(r)) => Self::Regex(Regex::compile(r).at("safe_regex")?),
            Some(Pattern::Custom(_)) => return Err(Invalid::unsupported("custom")),
            None => return Err(Invalid::new("match_pattern", "is missing")),
        })
    }

    pub(crate) fn compile_list(matchers: &[pb::matcher::StringMatcher]) -> Compiled<Vec<Self>> {
        matchers.iter().enumerate().map(|(i, m)| Self::compile(m).at_index("patterns", i)).collect()
    }

    /// The whole text, case-sensitive.
    pub fn exact(text: &str) -> Self {
        Self::Exact { text: text.into(), ignore_case: false }
    }

    /// Whether the condition holds for this text.
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact { text, ignore_case: false } => value == text.as_bytes(),
            Self::Exact { text, ignore_case: true } => value.eq_ignore_ascii_case(text.as_bytes()),
            Self::Prefix { text, ignore_case } => {
                value.get(..text.len()).is_some_and(|start| equal(start, text, *ignore_case))
            }
            Self::Suffix { text, ignore_case } => {
                value.len().checked_sub(text.len()).is_some_and(|at| equal(&value[at..], text, *ignore_case))
            }
            Self::Contains { text, ignore_case } => {
                value.windows(text.len().max(1)).any(|part| equal(part, text, *ignore_case))
            }
            Self::Regex(regex) => regex.matches(value),
        }
    }

    /// The text that is matched, for exact matches only (used for messages and lookups).
    pub fn as_exact(&self) -> Option<&str> {
        match self {
            Self::Exact { text, ignore_case: false } => Some(text),
            _ => None,
        }
    }
}

/// In words, for explanations: `exact "a"`, `prefix "a" (any case)`.
impl std::fmt::Display for StringMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (word, text, ignore_case) = match self {
            Self::Exact { text, ignore_case } => ("exact", text, *ignore_case),
            Self::Prefix { text, ignore_case } => ("prefix", text, *ignore_case),
            Self::Suffix { text, ignore_case } => ("suffix", text, *ignore_case),
            Self::Contains { text, ignore_case } => ("containing", text, *ignore_case),
            Self::Regex(regex) => return write!(f, "regex {:?}", regex.source()),
        };
        write!(f, "{word} {text:?}{}", if ignore_case { " (any case)" } else { "" })
    }
}

fn equal(part: &[u8], text: &str, ignore_case: bool) -> bool {
    if ignore_case { part.eq_ignore_ascii_case(text.as_bytes()) } else { part == text.as_bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::matcher::string_matcher::MatchPattern as Pattern;

    fn check(pattern: Pattern, ignore_case: bool, yes: &[&str], no: &[&str]) {
        let m =
            StringMatcher::compile(&pb::matcher::StringMatcher { ignore_case, match_pattern: Some(pattern) }).unwrap();
        for text in yes {
            assert!(m.matches(text.as_bytes()), "{m:?} {text}");
        }
        for text in no {
            assert!(!m.matches(text.as_bytes()), "{m:?} {text}");
        }
    }

    #[test]
    fn string_matchers() {
        check(Pattern::Exact("Ab".into()), false, &["Ab"], &["ab", "Abc", ""]);
        check(Pattern::Exact("Ab".into()), true, &["Ab", "aB"], &["abc"]);
        check(Pattern::Prefix("ab".into()), false, &["ab", "abc"], &["a", "xab"]);
        check(Pattern::Suffix("Bc".into()), true, &["abc", "BC"], &["c", "bcd"]);
        check(Pattern::Contains("bc".into()), false, &["abcd", "bc"], &["b", ""]);
        let regex = pb::matcher::RegexMatcher { regex: "a|ab".into(), ..Default::default() };
        check(Pattern::SafeRegex(regex), false, &["a", "ab"], &["abc", "xa"]);
    }
}
