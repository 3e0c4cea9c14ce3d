use crate::Headers;
use crate::matchers::StringMatcher;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// A condition on a header (`route.v3.HeaderMatcher`).
#[derive(Clone, Debug)]
pub struct HeaderMatcher {
    name: Box<str>,
    invert: bool,
    missing_is_empty: bool,
    condition: Condition,
}

#[derive(Clone, Debug)]
enum Condition {
    Present(bool),
    Text(StringMatcher),
    /// First number and the one behind the last.
    Range(i64, i64),
}

impl Condition {
    fn holds(&self, value: &[u8]) -> bool {
        match self {
            Self::Text(text) => text.matches(value),
            Self::Range(start, end) => {
                let number = std::str::from_utf8(value).ok().and_then(|v| v.trim().parse::<i64>().ok());
                number.is_some_and(|n| (*start..*end).contains(&n))
            }
            Self::Present(wanted) => *wanted,
        }
    }
}

/// `host` and `:authority` are one header in Envoy (`HeaderMapImpl`'s static lookup table).
pub(crate) fn canonical_name(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    if name == "host" { ":authority".to_owned() } else { name }
}

pub(crate) fn header_matchers(field: &str, matchers: &[pb::route::HeaderMatcher]) -> Compiled<Box<[HeaderMatcher]>> {
    matchers.iter().enumerate().map(|(i, m)| HeaderMatcher::compile(m).at_index(field, i)).collect()
}

impl HeaderMatcher {
    pub(crate) fn compile(matcher: &pb::route::HeaderMatcher) -> Compiled<Self> {
        use pb::matcher::string_matcher::MatchPattern as Pattern;
        use pb::route::header_matcher::HeaderMatchSpecifier as Specifier;
        if matcher.name.is_empty() {
            return Err(Invalid::new("name", "is empty"));
        }
        // The deprecated specifiers mean the same as a string match.
        let legacy = |pattern: Pattern| {
            StringMatcher::compile(&pb::matcher::StringMatcher { ignore_case: false, match_pattern: Some(pattern) })
        };
        let condition = match &matcher.header_match_specifier {
            None => Condition::Present(true),
            Some(Specifier::PresentMatch(present)) => Condition::Present(*present),
            Some(Specifier::RangeMatch(range)) => Condition::Range(range.start, range.end),
            Some(Specifier::StringMatch(m)) => Condition::Text(StringMatcher::compile(m).at("string_match")?),
            Some(Specifier::ExactMatch(t)) => Condition::Text(legacy(Pattern::Exact(t.clone()))?),
            Some(Specifier::PrefixMatch(t)) => Condition::Text(legacy(Pattern::Prefix(t.clone())).at("prefix_match")?),
            Some(Specifier::SuffixMatch(t)) => Condition::Text(legacy(Pattern::Suffix(t.clone())).at("suffix_match")?),
            Some(Specifier::ContainsMatch(t)) => {
                Condition::Text(legacy(Pattern::Contains(t.clone())).at("contains_match")?)
            }
            Some(Specifier::SafeRegexMatch(r)) => {
                Condition::Text(legacy(Pattern::SafeRegex(r.clone())).at("safe_regex_match")?)
            }
        };
        Ok(Self {
            name: canonical_name(&matcher.name).into(),
            invert: matcher.invert_match,
            missing_is_empty: matcher.treat_missing_header_as_empty,
            condition,
        })
    }

    /// Envoy `HeaderUtility::HeaderData::matchesHeaders`: a missing header fulfils no condition on its value, inverted or
    /// not. Of several values each is looked at for itself (`match_headers_individually`, Envoy 1.39 and later).
    pub fn matches(&self, headers: &Headers) -> bool {
        let mut values = headers.get_all(&self.name);
        let first = values.next();
        if let Condition::Present(wanted) = self.condition {
            return ((first.is_some() || self.missing_is_empty) == wanted) != self.invert;
        }
        let holds = match first {
            None if !self.missing_is_empty => return false,
            None => self.condition.holds(b""),
            Some(first) => self.condition.holds(first) || values.any(|value| self.condition.holds(value)),
        };
        holds != self.invert
    }

    /// The header it looks at, lower case.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// In words, for explanations: `header end-user exact "jason"`.
impl std::fmt::Display for HeaderMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "header {} ", self.name)?;
        match (&self.condition, self.invert) {
            (Condition::Present(wanted), invert) => f.write_str(if *wanted != invert { "present" } else { "absent" }),
            (Condition::Text(text), invert) => write!(f, "{}{text}", if invert { "not " } else { "" }),
            (Condition::Range(start, end), invert) => {
                write!(f, "{}from {start} to below {end}", if invert { "not " } else { "" })
            }
        }
    }
}

/// A condition on a query parameter.
#[derive(Clone, Debug)]
pub struct QueryMatcher {
    name: Box<str>,
    /// `None`: it must be there, with any value.
    condition: Option<StringMatcher>,
    absent: bool,
}

impl QueryMatcher {
    pub(crate) fn compile(matcher: &pb::route::QueryParameterMatcher) -> Compiled<Self> {
        use pb::route::query_parameter_matcher::QueryParameterMatchSpecifier as Specifier;
        if matcher.name.is_empty() {
            return Err(Invalid::new("name", "is empty"));
        }
        let (condition, absent) = match &matcher.query_parameter_match_specifier {
            None => (None, false),
            Some(Specifier::PresentMatch(present)) => (None, !present),
            Some(Specifier::StringMatch(m)) => (Some(StringMatcher::compile(m).at("string_match")?), false),
        };
        Ok(Self { name: matcher.name.as_str().into(), condition, absent })
    }

    /// Whether the first parameter of that name in this path fulfils the condition. Values are not decoded, as in Envoy.
    pub fn matches(&self, path: &str) -> bool {
        match (first_query_value(path, &self.name), &self.condition) {
            (value, None) => value.is_some() != self.absent,
            (Some(value), Some(condition)) => condition.matches(value.as_bytes()),
            (None, Some(_)) => false,
        }
    }
}

/// In words, for explanations: `query parameter v exact "1"`.
impl std::fmt::Display for QueryMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "query parameter {} ", self.name)?;
        match &self.condition {
            Some(text) => write!(f, "{text}"),
            None => f.write_str(if self.absent { "absent" } else { "present" }),
        }
    }
}

/// The first value of a query parameter in a path with query, not decoded (Envoy `QueryParamsMulti::parseQueryString`).
pub fn first_query_value<'a>(path: &'a str, name: &str) -> Option<&'a str> {
    let (_, query) = path.split_once('?')?;
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| *key == name)
        .map(|(_, v)| v)
}

/// The path without query and fragment (Envoy `PathUtil::removeQueryAndFragment`).
pub fn path_without_query(path: &str) -> &str {
    path.split(['?', '#']).next().unwrap_or(path)
}

/// A condition on a cookie.
#[derive(Clone, Debug)]
pub struct CookieMatcher {
    name: Box<str>,
    condition: StringMatcher,
    invert: bool,
}

impl CookieMatcher {
    pub(crate) fn compile(matcher: &pb::route::CookieMatcher) -> Compiled<Self> {
        refuse!("name": matcher.name.is_empty());
        let condition = matcher.string_match.as_ref().ok_or_else(|| Invalid::new("string_match", "is missing"))?;
        Ok(Self {
            name: matcher.name.as_str().into(),
            condition: StringMatcher::compile(condition).at("string_match")?,
            invert: matcher.invert_match,
        })
    }

    /// Whether the cookie fulfils the condition; a missing one does not, so it does if inverted.
    pub fn matches(&self, headers: &Headers) -> bool {
        cookie(headers, &self.name).is_some_and(|v| self.condition.matches(v)) != self.invert
    }
}

/// In words, for explanations: `cookie a exact "1"`.
impl std::fmt::Display for CookieMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cookie {} {}{}", self.name, if self.invert { "not " } else { "" }, self.condition)
    }
}

/// A cookie's value, without quotes (Envoy `Utility::parseCookieValue`).
pub(crate) fn cookie<'a>(headers: &'a Headers, name: &'a str) -> Option<&'a [u8]> {
    for line in headers.get_all("cookie") {
        for part in line.split(|b| *b == b';') {
            let part = part.trim_ascii_start();
            let Some(eq) = part.iter().position(|b| *b == b'=') else { continue };
            if &part[..eq] == name.as_bytes() {
                let value = &part[eq + 1..];
                let quoted = value.len() >= 2 && value.starts_with(b"\"") && value.ends_with(b"\"");
                return Some(if quoted { &value[1..value.len() - 1] } else { value });
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use pb::route::header_matcher::HeaderMatchSpecifier as Specifier;

    fn matcher(specifier: Option<Specifier>, invert: bool, empty: bool) -> HeaderMatcher {
        HeaderMatcher::compile(&pb::route::HeaderMatcher {
            name: "X-A".into(),
            invert_match: invert,
            treat_missing_header_as_empty: empty,
            header_match_specifier: specifier,
        })
        .unwrap()
    }

    #[test]
    fn missing_header_fulfils_nothing_but_absence() {
        let none = Headers::new();
        let some = Headers::of([("x-a", "5"), ("x-a", "6")]);
        let exact = || Some(Specifier::ExactMatch("6".into()));
        assert!(matcher(exact(), false, false).matches(&some));
        assert!(!matcher(exact(), true, false).matches(&none));
        assert!(matcher(exact(), true, true).matches(&none));
        assert!(matcher(Some(Specifier::PresentMatch(true)), true, false).matches(&none));
        assert!(!matcher(Some(Specifier::PresentMatch(true)), true, false).matches(&some));
        assert!(matcher(Some(Specifier::PresentMatch(false)), false, false).matches(&none));
        assert!(matcher(None, false, false).matches(&some));
        let range = Some(Specifier::RangeMatch(pb::kind::Int64Range { start: -1, end: 10 }));
        assert!(matcher(range.clone(), false, false).matches(&Headers::of([("x-a", "9")])));
        assert!(!matcher(range, false, false).matches(&Headers::of([("x-a", "10")])));
    }

    #[test]
    fn query_and_cookie() {
        assert_eq!(first_query_value("/p?a=1&b&a=2", "a"), Some("1"));
        assert_eq!(first_query_value("/p?a=1&b&a=2", "b"), Some(""));
        assert_eq!(first_query_value("/p", "b"), None);
        assert_eq!(path_without_query("/p?x#y"), "/p");
        let headers = Headers::of([("cookie", "a=1; user=\"bob\"; c")]);
        assert_eq!(cookie(&headers, "user"), Some(&b"bob"[..]));
        assert_eq!(cookie(&headers, "c"), None);
    }
}
