//! The part of CEL that Istio's configurations use: attributes, comparisons, logic, string functions.
//!
//! Whatever is beyond it is refused when the configuration comes, by its text.

mod attributes;
mod parse;

use std::cmp::Ordering;
use std::time::{Duration, SystemTime};

use crate::format::{FormatContext, TimeFormat};
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
    /// Whether a map, such as `request.headers`, has this key.
    HasKey(Box<Node>, Box<[Box<str>]>),
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
    /// A span of time.
    Duration(Duration),
    /// A moment.
    Time(SystemTime),
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
        self.evaluate(cx)?.into_text()
    }
}

impl Value {
    /// As it is printed; null is not.
    pub(crate) fn into_text(self) -> Option<String> {
        Some(match self {
            Value::Int(n) => n.to_string(),
            Value::Double(n) => n.to_string(),
            Value::Text(text) => text,
            Value::Bool(b) => b.to_string(),
            Value::Duration(duration) => short(duration),
            Value::Time(time) => {
                let mut text = Vec::new();
                TimeFormat::parse("%Y-%m-%dT%H:%M:%E6S").write(time, &mut text);
                let text = String::from_utf8(text).ok()?;
                format!("{}+00:00", text.trim_end_matches('0').trim_end_matches('.'))
            }
            Value::Null => "NULL".to_owned(),
        })
    }

    /// As it is in JSON, and whether that is a number; `None`: as its text.
    pub(crate) fn json(&self) -> Option<(String, bool)> {
        Some(match self {
            Value::Int(n) => (n.to_string(), true),
            Value::Double(n) => (n.to_string(), true),
            Value::Bool(b) => (b.to_string(), false),
            Value::Null => ("null".to_owned(), false),
            // As messages of protobuf have it: three, six or nine digits of a fraction.
            Value::Duration(duration) => {
                let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
                let fraction = match (nanos, nanos % 1_000_000, nanos % 1000) {
                    (0, ..) => String::new(),
                    (_, 0, _) => format!(".{:03}", nanos / 1_000_000),
                    (_, _, 0) => format!(".{:06}", nanos / 1000),
                    _ => format!(".{nanos:09}"),
                };
                (format!("\"{seconds}{fraction}s\""), false)
            }
            Value::Time(time) => {
                let mut text = vec![b'"'];
                TimeFormat::parse("%Y-%m-%dT%H:%M:%E6SZ").write(*time, &mut text);
                text.push(b'"');
                (String::from_utf8(text).ok()?, false)
            }
            Value::Text(_) => return None,
        })
    }
}

/// As Abseil's `FormatDuration` prints it.
fn short(duration: Duration) -> String {
    let number = |n: f64, unit: &str| format!("{n}{unit}");
    let nanos = duration.as_nanos() as f64;
    match duration.as_nanos() {
        0 => "0".to_owned(),
        n if n < 1000 => number(nanos, "ns"),
        n if n < 1_000_000 => number(nanos / 1e3, "us"),
        n if n < 1_000_000_000 => number(nanos / 1e6, "ms"),
        _ => {
            let (hours, minutes) = (duration.as_secs() / 3600, duration.as_secs() / 60 % 60);
            let seconds = (duration - Duration::from_secs(hours * 3600 + minutes * 60)).as_secs_f64();
            let part = |n: u64, unit: &str| if n > 0 { format!("{n}{unit}") } else { String::new() };
            let seconds = if seconds > 0.0 { number(seconds, "s") } else { String::new() };
            format!("{}{}{seconds}", part(hours, "h"), part(minutes, "m"))
        }
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
            Node::HasKey(key, map) => match key.evaluate(cx)? {
                Value::Text(key) => {
                    let path: Vec<Box<str>> = map.iter().cloned().chain([key.into()]).collect();
                    Some(Value::Bool(attributes::find(&path, cx).is_some()))
                }
                _ => None,
            },
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
                // Envoy's expressions do not join texts (`enable_string_concat` is off).
                (Value::Int(a), Value::Int(b)) => a.checked_add(b).map(Value::Int),
                (Value::Double(a), Value::Double(b)) => Some(Value::Double(a + b)),
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
        (Value::Duration(a), Value::Duration(b)) => Some(a.cmp(b)),
        (Value::Time(a), Value::Time(b)) => Some(a.cmp(b)),
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
        assert!(holds("'x-a' in request.headers && !('x-b' in request.headers)"));
        assert!(holds("duration('1m1.5s') > duration('61s') && 1.5 + 1.0 == 2.5"));
        assert!(holds("response.grpc_status == 14 && request.total_size > 20"));
    }

    #[test]
    fn spans_of_time_print_as_abseils_and_protobufs() {
        for (nanos, text, json) in [
            (0, "0", "0s"),
            (999, "999ns", "0.000000999s"),
            (745_783, "745.783us", "0.000745783s"),
            (5_000_000, "5ms", "0.005s"),
            (3_661_500_000_000, "1h1m1.5s", "3661.500s"),
        ] {
            let value = Value::Duration(Duration::from_nanos(nanos));
            assert_eq!(value.json(), Some((format!("\"{json}\""), false)));
            assert_eq!(value.into_text().as_deref(), Some(text));
        }
        let time = Value::Time(UNIX_EPOCH + Duration::from_micros(1_500_000));
        assert_eq!(time.into_text().as_deref(), Some("1970-01-01T00:00:01.5+00:00"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bad in [
            "",
            "a b",
            "[1,2].map(x, x)",
            "request.",
            "1 +",
            "'a",
            "((((",
            "foo(1)",
            "request.method ==",
            "xds.node.id",
            "duration('5000000000000000h5000000000000000h') > duration('1s')",
        ] {
            assert!(Expression::compile(bad).is_err(), "{bad}");
        }
    }
}
