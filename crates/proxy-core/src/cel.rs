//! CEL as Envoy evaluates it: over attributes, with the functions that Envoy registers.
//!
//! Whatever Envoy refuses, or is not known here, is refused when the configuration comes, by its text.

mod attributes;
mod functions;
mod message;
mod parse;
mod value;

use std::borrow::Cow;

use regex_automata::meta;

pub(crate) use functions::Options;
pub use value::Value;

use crate::format::FormatContext;
use crate::matchers::searched;
use crate::pb;
use crate::rejected::{Compiled, Invalid};
use functions::Function;

/// A compiled expression.
#[derive(Clone, Debug)]
pub struct Expression {
    root: Node,
    /// As it was written; empty if it came as a message.
    pub source: Box<str>,
}

#[derive(Clone, Debug)]
enum Node {
    Literal(Value),
    Attribute {
        /// Such as `request`, `headers`, `x-a`.
        path: Box<[Box<str>]>,
        /// Its last part was selected by a dot, so that `has` may ask for it.
        selected: bool,
    },
    Select(Box<Node>, Box<str>),
    And(Box<[Node; 2]>),
    Or(Box<[Node; 2]>),
    Choose(Box<[Node; 3]>),
    Has(Box<Node>, Box<str>),
    /// With an expression that is known from the start.
    Matches(Box<Node>, Box<meta::Regex>),
    Call(Function, Box<[Node]>),
    List(Box<[Node]>),
    Map(Box<[(Node, Node)]>),
}

impl Expression {
    /// Parses, with what Envoy allows by default.
    pub(crate) fn compile(source: &str) -> Compiled<Self> {
        Self::with(source, Options::default())
    }

    pub(crate) fn with(source: &str, options: Options) -> Compiled<Self> {
        let invalid = |reason| Invalid::new("", format!("CEL expression {source:?}: {reason}"));
        Ok(Self { root: parse::parse(source, options).map_err(invalid)?, source: source.into() })
    }

    /// Reads a parsed expression.
    pub(crate) fn of_message(message: &pb::cel::Expr, options: Options) -> Compiled<Self> {
        let root = message::node(Some(message), options, 0);
        let root = root.map_err(|reason| Invalid::new("", format!("failed to create an expression: {reason}")))?;
        Ok(Self { root, source: "".into() })
    }

    /// The value; `None`: CEL's error, as of an attribute that is missing, or of types that do not fit.
    pub fn evaluate(&self, cx: &FormatContext<'_>) -> Option<Value> {
        self.root.evaluate(cx).map(Cow::into_owned)
    }

    /// Whether it is true.
    pub fn holds(&self, cx: &FormatContext<'_>) -> bool {
        self.root.truth(cx) == Some(true)
    }

    /// Whether it looks at attributes that begin so.
    pub(crate) fn reads(&self, root: &str) -> bool {
        self.root.reads(root)
    }

    /// The value as a metric's tag.
    pub fn text(&self, cx: &FormatContext<'_>) -> Option<String> {
        String::from_utf8(self.evaluate(cx)?.into_text()).ok()
    }

    /// The value in JSON.
    pub(crate) fn json(&self, cx: &FormatContext<'_>) -> Option<serde_json::Value> {
        match self.evaluate(cx)? {
            Value::Place(place) => attributes::json(&place, cx),
            value => value.json(),
        }
    }
}

/// Nodes are made from their parts; what can be decided then is.
impl Node {
    fn identifier(name: &str) -> Self {
        const TYPES: [&str; 9] = ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type"];
        let kind = TYPES.iter().chain(&["uint"]).find(|kind| **kind == name);
        match kind {
            Some(kind) => Node::Literal(Value::Type(kind)),
            None => Node::Attribute { path: Box::new([name.into()]), selected: false },
        }
    }

    fn select(of: Self, field: &str) -> Self {
        match of {
            Node::Attribute { path, .. } => Node::extended(path, field, true),
            of => Node::Select(Box::new(of), field.into()),
        }
    }

    fn index(of: Self, key: Self) -> Self {
        match (of, key) {
            (Node::Attribute { path, .. }, Node::Literal(Value::Text(key))) => Node::extended(path, &key, false),
            (of, key) => Node::Call(Function::Index, [of, key].into()),
        }
    }

    fn extended(path: Box<[Box<str>]>, key: &str, selected: bool) -> Self {
        Node::Attribute { path: path.into_iter().chain([key.into()]).collect(), selected }
    }

    fn has(arguments: Vec<Self>) -> Result<Self, String> {
        match <[Node; 1]>::try_from(arguments) {
            Ok([Node::Attribute { path, selected: true }]) => {
                let (field, before) = path.split_last().ok_or("an attribute without a name")?;
                let of = Node::Attribute { path: before.into(), selected: false };
                Ok(Node::Has(Box::new(of), field.clone()))
            }
            Ok([Node::Select(of, field)]) => Ok(Node::Has(of, field)),
            _ => Err("has() argument must be a field selection".to_owned()),
        }
    }

    fn call(name: &str, method: bool, arguments: Vec<Self>, options: Options) -> Result<Self, String> {
        if method && matches!(name, "all" | "exists" | "exists_one" | "map" | "filter") {
            return Err("Comprehension support is disabled".to_owned());
        }
        let function = Function::find(name, method, arguments.len(), options)
            .ok_or_else(|| format!("No overload found in reference resolve step for {name}"))?;
        Ok(match (function, <[Node; 2]>::try_from(arguments)) {
            // CEL searches, it does not match the whole text.
            (Function::Matches, Ok([text, Node::Literal(Value::Text(regex))])) => {
                let regex = searched(&regex).map_err(|reason| format!("invalid regular expression: {reason}"))?;
                Node::Matches(Box::new(text), Box::new(regex))
            }
            (_, Ok(arguments)) => Node::Call(function, arguments.into()),
            (_, Err(arguments)) => Node::Call(function, arguments.into()),
        })
    }

    fn list(items: Vec<Self>) -> Self {
        let literal = |item: &Node| if let Node::Literal(value) = item { Some(value.clone()) } else { None };
        match items.iter().map(literal).collect() {
            Some(values) => Node::Literal(Value::List(values)),
            None => Node::List(items.into()),
        }
    }

    fn map(entries: Vec<(Self, Self)>) -> Self {
        Node::Map(entries.into())
    }
}

impl Node {
    fn evaluate(&self, cx: &FormatContext<'_>) -> Option<Cow<'_, Value>> {
        Some(Cow::Owned(match self {
            Node::Literal(value) => return Some(Cow::Borrowed(value)),
            Node::Attribute { path, .. } => attributes::find(path, cx)?,
            Node::Select(of, field) => {
                functions::index(&*of.evaluate(cx)?, &Value::Text(field.as_ref().to_owned()), cx)?
            }
            // An error on one side does not matter if the other decides.
            Node::And(both) => match (both[0].truth(cx), &both[1]) {
                (Some(false), _) => Value::Bool(false),
                (Some(true), other) => Value::Bool(other.truth(cx)?),
                (None, other) => other.truth(cx).filter(|b| !b).map(Value::Bool)?,
            },
            Node::Or(both) => match (both[0].truth(cx), &both[1]) {
                (Some(true), _) => Value::Bool(true),
                (Some(false), other) => Value::Bool(other.truth(cx)?),
                (None, other) => other.truth(cx).filter(|b| *b).map(Value::Bool)?,
            },
            Node::Choose(parts) => {
                let [condition, yes, no] = &**parts;
                return if condition.truth(cx)? { yes } else { no }.evaluate(cx);
            }
            Node::Has(of, field) => match &*of.evaluate(cx)? {
                of @ (Value::Map(_) | Value::Place(_)) => {
                    Value::Bool(functions::index(of, &Value::Text(field.as_ref().to_owned()), cx).is_some())
                }
                _ => return None,
            },
            Node::Matches(text, regex) => match &*text.evaluate(cx)? {
                Value::Text(text) => Value::Bool(regex.is_match(text.as_bytes())),
                _ => return None,
            },
            Node::Call(function, arguments) => match &**arguments {
                // Most take one or two, which need no list of their own.
                [one] => function.call(&[one.evaluate(cx)?], cx)?,
                [one, two] => function.call(&[one.evaluate(cx)?, two.evaluate(cx)?], cx)?,
                all => function.call(&all.iter().map(|a| a.evaluate(cx)).collect::<Option<Vec<_>>>()?, cx)?,
            },
            Node::List(items) => {
                let items = items.iter().map(|item| item.evaluate(cx).map(Cow::into_owned));
                Value::List(items.collect::<Option<_>>()?)
            }
            Node::Map(entries) => {
                let mut map: Vec<(Value, Value)> = Vec::with_capacity(entries.len());
                for (key, value) in entries {
                    let key = key.evaluate(cx)?.into_owned();
                    let is_key = matches!(key, Value::Bool(_) | Value::Int(_) | Value::Uint(_) | Value::Text(_));
                    if !is_key || map.iter().any(|(known, _)| *known == key) {
                        return None;
                    }
                    map.push((key, value.evaluate(cx)?.into_owned()));
                }
                Value::Map(map)
            }
        }))
    }

    fn reads(&self, root: &str) -> bool {
        let any = |nodes: &[Node]| nodes.iter().any(|node| node.reads(root));
        match self {
            Node::Literal(_) => false,
            Node::Attribute { path, .. } => path.first().is_some_and(|first| **first == *root),
            Node::Select(of, _) | Node::Has(of, _) | Node::Matches(of, _) => of.reads(root),
            Node::And(both) | Node::Or(both) => any(&**both),
            Node::Choose(parts) => any(&**parts),
            Node::Call(_, nodes) | Node::List(nodes) => any(nodes),
            Node::Map(entries) => entries.iter().any(|(key, value)| key.reads(root) || value.reads(root)),
        }
    }

    fn truth(&self, cx: &FormatContext<'_>) -> Option<bool> {
        match *self.evaluate(cx)? {
            Value::Bool(b) => Some(b),
            _ => None,
        }
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
        assert!(holds("!has(request.headers.y) || false"));
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
    fn what_is_not_understood_is_refused() {
        for bad in [
            "",
            "a b",
            "[1,2].map(x, x)",
            "[1,2].all(x, x > 0)",
            "string(1)",
            "'a'.lowerAscii()",
            "'a'.matches('(')",
            "has(request)",
            "has(request.headers['a'])",
            "if",
            "'\\q'",
            "request.",
            "1 +",
            "'a",
            "((((",
            "foo(1)",
            "request.method ==",
        ] {
            assert!(Expression::compile(bad).is_err(), "{bad}");
        }
    }
}
