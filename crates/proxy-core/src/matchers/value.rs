use std::net::IpAddr;

use mesh_types::ArcStr;
use serde_json::Value;

use crate::matchers::StringMatcher;
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// A condition on a metadata value.
#[derive(Clone, Debug)]
pub enum ValueMatcher {
    /// It is null.
    Null,
    /// It is this number.
    Exact(f64),
    /// It is a number from the first up to but not including the second.
    Range(f64, f64),
    /// It is such a string.
    Text(StringMatcher),
    /// It is this boolean.
    Bool(bool),
    /// It is there at all.
    Present(bool),
    /// It is a list with a member that fulfils this.
    ListOneOf(Box<ValueMatcher>),
    /// One of these holds.
    Any(Box<[ValueMatcher]>),
}

impl ValueMatcher {
    pub(crate) fn compile(matcher: &pb::matcher::ValueMatcher) -> Compiled<Self> {
        use pb::matcher::double_matcher::MatchPattern as Double;
        use pb::matcher::value_matcher::MatchPattern as Pattern;
        Ok(match &matcher.match_pattern {
            None => return Err(Invalid::new("match_pattern", "is missing")),
            Some(Pattern::NullMatch(_)) => Self::Null,
            Some(Pattern::BoolMatch(b)) => Self::Bool(*b),
            Some(Pattern::PresentMatch(b)) => Self::Present(*b),
            Some(Pattern::StringMatch(m)) => Self::Text(StringMatcher::compile(m).at("string_match")?),
            Some(Pattern::DoubleMatch(m)) => match &m.match_pattern {
                Some(Double::Exact(n)) => Self::Exact(*n),
                Some(Double::Range(r)) => Self::Range(r.start, r.end),
                None => return Err(Invalid::new("double_match", "is empty")),
            },
            Some(Pattern::ListMatch(list)) => match &list.match_pattern {
                Some(pb::matcher::list_matcher::MatchPattern::OneOf(m)) => {
                    Self::ListOneOf(Box::new(Self::compile(m).at("list_match.one_of")?))
                }
                None => return Err(Invalid::new("list_match", "is empty")),
            },
            Some(Pattern::OrMatch(any)) => {
                Self::Any(any.value_matchers.iter().map(Self::compile).collect::<Compiled<_>>().at("or_match")?)
            }
        })
    }

    /// Whether the condition holds; `None` is a value that is not there.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        match self {
            Self::Null => matches!(value, Some(Value::Null)),
            Self::Exact(n) => value.and_then(Value::as_f64).is_some_and(|v| v == *n),
            Self::Range(start, end) => value.and_then(Value::as_f64).is_some_and(|v| (*start..*end).contains(&v)),
            Self::Text(text) => value.and_then(Value::as_str).is_some_and(|v| text.matches(v.as_bytes())),
            Self::Bool(b) => value.and_then(Value::as_bool) == Some(*b),
            Self::Present(wanted) => *wanted && value.is_some(),
            Self::ListOneOf(m) => {
                value.and_then(Value::as_array).is_some_and(|list| list.iter().any(|v| m.matches(Some(v))))
            }
            Self::Any(any) => any.iter().any(|m| m.matches(value)),
        }
    }
}

/// A condition on the value at a path of a metadata namespace.
#[derive(Clone, Debug)]
pub struct MetadataMatcher {
    namespace: ArcStr,
    path: Box<[Box<str>]>,
    value: ValueMatcher,
    invert: bool,
}

impl MetadataMatcher {
    pub(crate) fn compile(matcher: &pb::matcher::MetadataMatcher) -> Compiled<Self> {
        use pb::matcher::metadata_matcher::path_segment::Segment;
        let path: Box<[Box<str>]> = matcher
            .path
            .iter()
            .map(|s| match &s.segment {
                Some(Segment::Key(key)) if !key.is_empty() => Ok(key.as_str().into()),
                _ => Err(Invalid::new("path", "has an empty key")),
            })
            .collect::<Compiled<_>>()?;
        if path.is_empty() {
            return Err(Invalid::new("path", "is empty"));
        }
        let value = matcher.value.as_ref().ok_or_else(|| Invalid::new("value", "is missing"))?;
        Ok(Self {
            namespace: crate::fields::required("filter", &matcher.filter)?,
            path,
            value: ValueMatcher::compile(value).at("value")?,
            invert: matcher.invert,
        })
    }

    /// Whether the condition holds.
    pub fn matches(&self, metadata: &Metadata) -> bool {
        self.value.matches(metadata.get(&self.namespace, &self.path)) != self.invert
    }

    /// The value it looks at, if it is there.
    pub fn find<'m>(&self, metadata: &'m Metadata) -> Option<&'m Value> {
        metadata.get(&self.namespace, &self.path)
    }
}

/// In words, for explanations: `metadata istio_authn.request.auth.claims.group`.
impl std::fmt::Display for MetadataMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}metadata {}", if self.invert { "not " } else { "" }, self.namespace)?;
        self.path.iter().try_for_each(|key| write!(f, ".{key}"))?;
        match &self.value {
            ValueMatcher::Text(text) => write!(f, " {text}"),
            _ => Ok(()),
        }
    }
}

/// A condition on a filter state object.
#[derive(Clone, Debug)]
pub struct FilterStateMatcher {
    key: ArcStr,
    condition: StateCondition,
}

#[derive(Clone, Debug)]
enum StateCondition {
    Text(StringMatcher),
    Address { ranges: Box<[crate::Cidr]>, invert: bool },
}

impl FilterStateMatcher {
    pub(crate) fn compile(matcher: &pb::matcher::FilterStateMatcher) -> Compiled<Self> {
        use pb::matcher::filter_state_matcher::Matcher;
        let condition = match &matcher.matcher {
            Some(Matcher::StringMatch(m)) => StateCondition::Text(StringMatcher::compile(m).at("string_match")?),
            Some(Matcher::AddressMatch(m)) => StateCondition::Address {
                ranges: m
                    .ranges
                    .iter()
                    .map(|r| {
                        crate::Cidr::compile(&pb::core::CidrRange {
                            address_prefix: r.address_prefix.clone(),
                            prefix_len: r.prefix_len,
                        })
                    })
                    .collect::<Compiled<_>>()
                    .at("address_match.ranges")?,
                invert: m.invert_match,
            },
            None => return Err(Invalid::new("matcher", "is missing")),
        };
        Ok(Self { key: crate::fields::required("key", &matcher.key)?, condition })
    }

    /// Whether the condition holds; an object that is not there fulfils none.
    pub fn matches(&self, state: &FilterState) -> bool {
        let Some(value) = state.values.get(&self.key) else { return false };
        match &self.condition {
            StateCondition::Text(text) => text.matches(value.as_bytes()),
            StateCondition::Address { ranges, invert } => {
                value.parse::<IpAddr>().is_ok_and(|ip| ranges.iter().any(|r| r.contains(ip)) != *invert)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values() {
        let text = ValueMatcher::Text(StringMatcher::exact("b"));
        assert!(ValueMatcher::ListOneOf(Box::new(text.clone())).matches(Some(&json!(["a", "b"]))));
        assert!(!ValueMatcher::ListOneOf(Box::new(text.clone())).matches(Some(&json!("b"))));
        assert!(!text.matches(None));
        assert!(ValueMatcher::Range(1.0, 2.0).matches(Some(&json!(1))));
        assert!(!ValueMatcher::Range(1.0, 2.0).matches(Some(&json!(2))));
        assert!(ValueMatcher::Null.matches(Some(&Value::Null)) && !ValueMatcher::Null.matches(None));
    }
}
