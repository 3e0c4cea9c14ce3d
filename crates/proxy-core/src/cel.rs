//! The part of CEL that Istio's configurations use: attributes, comparisons, logic, string functions.
//!
//! Whatever is beyond it is refused when the configuration comes, by its text.

mod attributes;
mod parse;

use std::cmp::Ordering;

use crate::format::FormatContext;
use crate::matchers::Regex;
use crate::rejected::{Compiled, Invalid};

/// A compiled expression.
#[derive(Clone, Debug)]
pub struct Expression {
    root: Node,
    /// As it was written.
    pub source: Box<str>,
}

#[derive(Clone, Debug)]
enum Node {
    Literal(Value),
    /// A path such as `request.headers` / `x-a`.
    Attribute(Box<[Box<str>]>),
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Compare(Comparison, Box<Node>, Box<Node>),
    Choose(Box<Node>, Box<Node>, Box<Node>),
    Has(Box<Node>),
    In(Box<Node>, Box<[Node]>),
    Test(Test, Box<Node>, Box<Node>),
    Matches(Box<Node>, Regex),
    Size(Box<Node>),
    Add(Box<Node>, Box<Node>),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Test {
    StartsWith,
    EndsWith,
    Contains,
}

/// A value of an expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Whole number.
    Int(i64),
    /// Other number.
    Double(f64),
    /// Text.
    Text(String),
    /// Truth.
    Bool(bool),
    /// Null.
    Null,
}

impl Expression {
    /// Parses.
    pub(crate) fn compile(source: &str) -> Compiled<Self> {
        let root =
            parse::parse(source).map_err(|reason| Invalid::new("", format!("CEL expression {source:?}: {reason}")))?;
        Ok(Self { root, source: source.into() })
    }

    /// The value; `None` if an attribute is missing or types do not fit (CEL's error value).
    pub fn evaluate(&self, cx: &FormatContext<'_>) -> Option<Value> {
        self.root.evaluate(cx)
    }

    /// Whether it is true.
    pub fn holds(&self, cx: &FormatContext<'_>) -> bool {
        self.evaluate(cx) == Some(Value::Bool(true))
    }

    /// The value as a metric's tag.
    pub fn text(&self, cx: &FormatContext<'_>) -> Option<String> {
        Some(match self.evaluate(cx)? {
            Value::Int(n) => n.to_string(),
            Value::Double(n) => n.to_string(),
            Value::Text(text) => text,
            Value::Bool(b) => b.to_string(),
            Value::Null => return None,
        })
    }
}

impl Node {
    fn evaluate(&self, cx: &FormatContext<'_>) -> Option<Value> {
        match self {
            Node::Literal(value) => Some(value.clone()),
            Node::Attribute(path) => attributes::find(path, cx),
            Node::Not(inner) => inner.truth(cx).map(|b| Value::Bool(!b)),
            // An error on one side does not matter if the other decides.
            Node::And(a, b) => match (a.truth(cx), b) {
                (Some(false), _) => Some(Value::Bool(false)),
                (Some(true), b) => b.truth(cx).map(Value::Bool),
                (None, b) => (b.truth(cx) == Some(false)).then_some(Value::Bool(false)),
            },
            Node::Or(a, b) => match (a.truth(cx), b) {
                (Some(true), _) => Some(Value::Bool(true)),
                (Some(false), b) => b.truth(cx).map(Value::Bool),
                (None, b) => (b.truth(cx) == Some(true)).then_some(Value::Bool(true)),
            },
            Node::Compare(how, a, b) => how.holds(&a.evaluate(cx)?, &b.evaluate(cx)?).map(Value::Bool),
            Node::Choose(condition, yes, no) => if condition.truth(cx)? { yes } else { no }.evaluate(cx),
            Node::Has(inner) => Some(Value::Bool(inner.evaluate(cx).is_some())),
            Node::In(value, list) => {
                let value = value.evaluate(cx)?;
                Some(Value::Bool(list.iter().any(|item| item.evaluate(cx).as_ref() == Some(&value))))
            }
            Node::Test(test, text, part) => match (text.evaluate(cx)?, part.evaluate(cx)?) {
                (Value::Text(text), Value::Text(part)) => Some(Value::Bool(match test {
                    Test::StartsWith => text.starts_with(&part),
                    Test::EndsWith => text.ends_with(&part),
                    Test::Contains => text.contains(&part),
                })),
                _ => None,
            },
            Node::Matches(text, regex) => match text.evaluate(cx)? {
                Value::Text(text) => Some(Value::Bool(regex.matches(text.as_bytes()))),
                _ => None,
            },
            Node::Size(text) => match text.evaluate(cx)? {
                Value::Text(text) => Some(Value::Int(text.chars().count() as i64)),
                _ => None,
            },
            Node::Add(a, b) => match (a.evaluate(cx)?, b.evaluate(cx)?) {
                (Value::Text(a), Value::Text(b)) => Some(Value::Text(a + &b)),
                (Value::Int(a), Value::Int(b)) => a.checked_add(b).map(Value::Int),
                _ => None,
            },
        }
    }

    fn truth(&self, cx: &FormatContext<'_>) -> Option<bool> {
        match self.evaluate(cx)? {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }
}

impl Comparison {
    fn holds(self, a: &Value, b: &Value) -> Option<bool> {
        if let Comparison::Equal | Comparison::NotEqual = self {
            let equal = match order(a, b) {
                Some(order) => order == Ordering::Equal,
                None => a == b,
            };
            return Some(equal == (self == Comparison::Equal));
        }
        let order = order(a, b)?;
        Some(match self {
            Comparison::Less => order == Ordering::Less,
            Comparison::LessOrEqual => order != Ordering::Greater,
            Comparison::Greater => order == Ordering::Greater,
            _ => order != Ordering::Less,
        })
    }
}

fn order(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Int(a), Value::Int(b)) => Some(a.cmp(b)),
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        (Value::Int(a), Value::Double(b)) => (*a as f64).partial_cmp(b),
        (Value::Double(a), Value::Int(b)) => a.partial_cmp(&(*b as f64)),
        (Value::Double(a), Value::Double(b)) => a.partial_cmp(b),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::Headers;
    use crate::stream_info::{ConnectionInfo, StreamInfo};
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    fn holds(source: &str) -> bool {
        let mut info = StreamInfo::new(Arc::new(ConnectionInfo::default()), UNIX_EPOCH);
        info.response_code = Some(503);
        let request = Headers::of([(":method", "GET"), (":path", "/a?b=c"), ("x-a", "v1")]);
        let cx = FormatContext::new(&info, Some(&request), None);
        Expression::compile(source).unwrap().holds(&cx)
    }

    #[test]
    fn expressions() {
        assert!(holds("response.code >= 400"));
        assert!(!holds("response.code < 400"));
        assert!(holds("request.method == 'GET' && request.headers['x-a'].startsWith(\"v\")"));
        assert!(holds("!has(request.headers['x-b']) || false"));
        assert!(holds("request.url_path == '/a' && request.query == 'b=c'"));
        assert!(holds("response.code in [500, 503]"));
        assert!(holds("(response.code == 503 ? 'x' : 'y') == 'x'"));
        assert!(holds("request.headers['x-a'].matches('v[0-9]')"));
        assert!(!holds("request.headers['x-none'] == 'a'"));
        assert!(holds("size(request.method) == 3"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in ["", "a b", "[1,2].map(x, x)", "request.", "1 +", "'a", "((((", "foo(1)", "request.method =="] {
            assert!(Expression::compile(bad).is_err(), "{bad}");
        }
    }
}
