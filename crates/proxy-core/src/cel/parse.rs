use std::time::Duration;

use crate::cel::{Comparison, Node, Test, Value};
use crate::matchers::Regex;

/// Deeper expressions are refused, so that neither parsing nor evaluation can exhaust the stack.
const MAX_DEPTH: usize = 32;

pub(super) fn parse(source: &str) -> Result<Node, String> {
    let mut parser = Parser { rest: source, depth: 0 };
    let node = parser.choice()?;
    parser.space();
    if parser.rest.is_empty() { Ok(node) } else { Err(format!("unexpected {:?}", parser.rest)) }
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl Parser<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.eat(token) { Ok(()) } else { Err(format!("expected {token:?} before {:?}", self.rest)) }
    }

    fn choice(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("it is nested too deeply".to_owned());
        }
        let condition = self.or()?;
        let node = if self.eat("?") {
            let yes = self.choice()?;
            self.expect(":")?;
            Node::Choose(Box::new(condition), Box::new(yes), Box::new(self.choice()?))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(node)
    }

    fn or(&mut self) -> Result<Node, String> {
        let mut left = self.and()?;
        while self.eat("||") {
            left = Node::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Node, String> {
        let mut left = self.comparison()?;
        while self.eat("&&") {
            left = Node::And(Box::new(left), Box::new(self.comparison()?));
        }
        Ok(left)
    }

    fn comparison(&mut self) -> Result<Node, String> {
        let left = self.sum()?;
        let how = [
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<=", Comparison::LessOrEqual),
            (">=", Comparison::GreaterOrEqual),
            ("<", Comparison::Less),
            (">", Comparison::Greater),
        ];
        for (token, how) in how {
            if self.eat(token) {
                return Ok(Node::Compare(how, Box::new(left), Box::new(self.sum()?)));
            }
        }
        self.space();
        if self.rest.starts_with("in ") || self.rest.starts_with("in[") {
            self.rest = &self.rest[2..];
            if self.eat("[") {
                return Ok(Node::In(Box::new(left), self.list("]")?.into()));
            }
            return match self.member()? {
                Node::Attribute(map) => Ok(Node::HasKey(Box::new(left), map)),
                _ => Err("only lists and attributes have members".to_owned()),
            };
        }
        Ok(left)
    }

    fn sum(&mut self) -> Result<Node, String> {
        let mut left = self.unary()?;
        while self.eat("+") {
            left = Node::Add(Box::new(left), Box::new(self.unary()?));
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Node, String> {
        self.space();
        if self.rest.starts_with('!') && !self.rest.starts_with("!=") {
            self.rest = &self.rest[1..];
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err("it is nested too deeply".to_owned());
            }
            let inner = self.unary()?;
            self.depth -= 1;
            return Ok(Node::Not(Box::new(inner)));
        }
        self.member()
    }

    fn list(&mut self, end: &str) -> Result<Vec<Node>, String> {
        let mut items = Vec::new();
        if self.eat(end) {
            return Ok(items);
        }
        loop {
            items.push(self.choice()?);
            if self.eat(end) {
                return Ok(items);
            }
            self.expect(",")?;
        }
    }

    /// A primary with `.name`, `[key]` and method calls behind it.
    fn member(&mut self) -> Result<Node, String> {
        let mut node = self.primary()?;
        loop {
            if self.eat(".") {
                let name = self.identifier().ok_or("expected a name behind the dot")?;
                if self.eat("(") {
                    let arguments = self.list(")")?;
                    node = method(node, &name, arguments)?;
                } else {
                    node = extended(node, &name)?;
                }
            } else if self.eat("[") {
                let key = self.choice()?;
                self.expect("]")?;
                let Node::Literal(Value::Text(key)) = key else {
                    return Err("only text keys are supported".to_owned());
                };
                node = extended(node, &key)?;
            } else {
                return Ok(node);
            }
        }
    }

    fn identifier(&mut self) -> Option<String> {
        self.space();
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(self.rest.len());
        let name = &self.rest[..end];
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        self.rest = &self.rest[end..];
        Some(name.to_owned())
    }

    fn primary(&mut self) -> Result<Node, String> {
        self.space();
        let first = self.rest.chars().next().ok_or("it ends too early")?;
        match first {
            '(' => {
                self.rest = &self.rest[1..];
                let inner = self.choice()?;
                self.expect(")")?;
                Ok(inner)
            }
            '\'' | '"' => self.text(first).map(|text| Node::Literal(Value::Text(text))),
            '0'..='9' | '-' => self.number(),
            _ => {
                let name = self.identifier().ok_or_else(|| format!("unexpected {:?}", self.rest))?;
                match name.as_str() {
                    "true" => Ok(Node::Literal(Value::Bool(true))),
                    "false" => Ok(Node::Literal(Value::Bool(false))),
                    "null" => Ok(Node::Literal(Value::Null)),
                    _ if self.eat("(") => {
                        let arguments = self.list(")")?;
                        call(&name, arguments)
                    }
                    _ => Ok(Node::Attribute(Box::new([name.into()]))),
                }
            }
        }
    }

    fn text(&mut self, quote: char) -> Result<String, String> {
        let mut text = String::new();
        let mut chars = self.rest[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &self.rest[1 + at + 1..];
                    return Ok(text);
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, c)) if !c.is_alphanumeric() => text.push(c),
                    _ => return Err("unsupported escape".to_owned()),
                },
                c => text.push(c),
            }
        }
        Err("unclosed text".to_owned())
    }

    fn number(&mut self) -> Result<Node, String> {
        let end = self.rest[1..].find(|c: char| !(c.is_ascii_digit() || c == '.')).map_or(self.rest.len(), |at| at + 1);
        let digits = &self.rest[..end];
        let value = match digits.contains('.') {
            true => digits.parse().map(Value::Double).ok(),
            false => digits.parse().map(Value::Int).ok(),
        };
        self.rest = &self.rest[end..];
        self.rest = self.rest.strip_prefix('u').unwrap_or(self.rest);
        value.map(Node::Literal).ok_or_else(|| format!("{digits:?} is no number"))
    }
}

fn extended(node: Node, key: &str) -> Result<Node, String> {
    match node {
        // The node is not known where expressions are evaluated, nor are localities.
        Node::Attribute(path)
            if matches!((&*path[0], key), ("xds", "node") | ("upstream", "locality")) && path.len() == 1 =>
        {
            Err(format!("{}.{key} is not supported", path[0]))
        }
        Node::Attribute(path) => Ok(Node::Attribute(path.into_iter().chain([key.into()]).collect())),
        _ => Err(format!("only attributes have fields such as {key:?}")),
    }
}

fn call(name: &str, arguments: Vec<Node>) -> Result<Node, String> {
    match (name, <[Node; 1]>::try_from(arguments)) {
        ("has", Ok([inner])) => Ok(Node::Has(Box::new(inner))),
        ("size", Ok([inner])) => Ok(Node::Size(Box::new(inner))),
        ("duration", Ok([Node::Literal(Value::Text(text))])) => {
            duration(&text).map(|d| Node::Literal(Value::Duration(d))).ok_or_else(|| format!("{text:?} is no duration"))
        }
        // Attributes are typed already; conversions keep the value.
        ("string" | "int" | "uint" | "double", Ok([inner])) => Ok(inner),
        _ => Err(format!("function {name} is not supported")),
    }
}

/// `1h2.5s`: numbers with units, as Go writes them.
fn duration(text: &str) -> Option<Duration> {
    let mut all = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, after) = rest.split_at(end);
        let unit = &after[..after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len())];
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        all = all.checked_add(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?)?;
        rest = &after[unit.len()..];
    }
    (!text.is_empty()).then_some(all)
}

fn method(node: Node, name: &str, arguments: Vec<Node>) -> Result<Node, String> {
    let unknown = || format!("function {name} is not supported");
    if name == "size" && arguments.is_empty() {
        return Ok(Node::Size(Box::new(node)));
    }
    let [argument] = <[Node; 1]>::try_from(arguments).map_err(|_| unknown())?;
    let test = match name {
        "startsWith" => Test::StartsWith,
        "endsWith" => Test::EndsWith,
        "contains" => Test::Contains,
        "matches" => {
            let Node::Literal(Value::Text(regex)) = argument else { return Err("matches needs a literal".to_owned()) };
            // CEL searches, our expressions match the whole text.
            let regex = Regex::new(&format!("(?s:.*)(?:{regex})(?s:.*)"))?;
            return Ok(Node::Matches(Box::new(node), regex));
        }
        _ => return Err(unknown()),
    };
    Ok(Node::Test(test, Box::new(node), Box::new(argument)))
}
