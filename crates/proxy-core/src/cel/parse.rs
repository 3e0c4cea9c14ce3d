//! Text to nodes: CEL's grammar, without what Envoy turns off (macros that repeat) or does not know (messages, optional values).

use crate::cel::functions::Options;
use crate::cel::{Node, Value};

/// Deeper expressions are refused, so that neither parsing nor evaluation can exhaust the stack.
pub(super) const MAX_DEPTH: usize = 32;

/// Words that are no names.
const RESERVED: [&str; 17] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "package",
    "return",
    "var",
    "void",
];

pub(super) fn parse(source: &str, options: Options) -> Result<Node, String> {
    let mut parser = Parser { rest: source, depth: 0, options };
    let node = parser.choice()?;
    parser.space();
    if parser.rest.is_empty() { Ok(node) } else { Err(format!("unexpected {:?}", parser.rest)) }
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
    options: Options,
}

impl Parser<'_> {
    fn space(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            let Some(comment) = self.rest.strip_prefix("//") else { return };
            self.rest = comment.find('\n').map_or("", |end| &comment[end..]);
        }
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

    /// Runs a part of the grammar one level deeper.
    fn deeper<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T, String>) -> Result<T, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("it is nested too deeply".to_owned());
        }
        let parsed = part(self)?;
        self.depth -= 1;
        Ok(parsed)
    }

    fn call(&self, name: &str, method: bool, arguments: Vec<Node>) -> Result<Node, String> {
        Node::call(name, method, arguments, self.options)
    }

    fn choice(&mut self) -> Result<Node, String> {
        self.deeper(|parser| {
            let condition = parser.or()?;
            if !parser.eat("?") {
                return Ok(condition);
            }
            let yes = parser.or()?;
            parser.expect(":")?;
            Ok(Node::Choose(Box::new([condition, yes, parser.choice()?])))
        })
    }

    fn or(&mut self) -> Result<Node, String> {
        let mut left = self.and()?;
        while self.eat("||") {
            left = Node::Or(Box::new([left, self.and()?]));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Node, String> {
        let mut left = self.relation()?;
        while self.eat("&&") {
            left = Node::And(Box::new([left, self.relation()?]));
        }
        Ok(left)
    }

    fn relation(&mut self) -> Result<Node, String> {
        const RELATIONS: [(&str, &str); 6] =
            [("==", "_==_"), ("!=", "_!=_"), ("<=", "_<=_"), (">=", "_>=_"), ("<", "_<_"), (">", "_>_")];
        let mut left = self.sum()?;
        loop {
            let relation = RELATIONS.iter().find(|(token, _)| self.eat(token)).map(|(_, name)| *name);
            let Some(name) = relation.or_else(|| self.keyword("in").then_some("@in")) else { return Ok(left) };
            let right = self.sum()?;
            left = self.call(name, false, vec![left, right])?;
        }
    }

    fn keyword(&mut self, word: &str) -> bool {
        self.space();
        match self.rest.strip_prefix(word) {
            Some(rest) if !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    fn sum(&mut self) -> Result<Node, String> {
        self.operators(&[("+", "_+_"), ("-", "_-_")], |parser| {
            parser.operators(&[("*", "_*_"), ("/", "_/_"), ("%", "_%_")], Self::unary)
        })
    }

    /// Operands with operators of one rank between them.
    fn operators(
        &mut self,
        operators: &[(&str, &str)],
        operand: impl Fn(&mut Self) -> Result<Node, String>,
    ) -> Result<Node, String> {
        let mut left = operand(self)?;
        while let Some((_, name)) = operators.iter().find(|(token, _)| self.eat(token)) {
            let right = operand(self)?;
            left = self.call(name, false, vec![left, right])?;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Node, String> {
        self.space();
        let name = match self.rest.as_bytes() {
            [b'!', b'=', ..] => return Err(format!("unexpected {:?}", self.rest)),
            [b'!', ..] => "!_",
            // The sign belongs to the number behind it.
            [b'-', b'0'..=b'9', ..] => return self.member(),
            [b'-', b'.', b'0'..=b'9', ..] => return self.member(),
            [b'-', ..] => "-_",
            _ => return self.member(),
        };
        self.rest = &self.rest[1..];
        self.deeper(|parser| {
            let inner = parser.unary()?;
            parser.call(name, false, vec![inner])
        })
    }

    /// Expressions with commas between them, to the end of the list, of which the last may be one, too.
    fn list(&mut self, end: &str) -> Result<Vec<Node>, String> {
        let mut items = Vec::new();
        while !self.eat(end) {
            items.push(self.choice()?);
            if !self.eat(",") {
                self.expect(end)?;
                break;
            }
        }
        Ok(items)
    }

    fn map(&mut self) -> Result<Vec<(Node, Node)>, String> {
        let mut entries = Vec::new();
        while !self.eat("}") {
            let key = self.choice()?;
            self.expect(":")?;
            entries.push((key, self.choice()?));
            if !self.eat(",") {
                self.expect("}")?;
                break;
            }
        }
        Ok(entries)
    }

    /// A primary with `.name`, `[key]` and method calls behind it.
    fn member(&mut self) -> Result<Node, String> {
        let mut node = self.primary()?;
        // Each one goes around what is before it.
        let before = self.depth;
        loop {
            if self.eat(".") {
                let name = self.identifier().ok_or("expected a name behind the dot")?;
                if self.eat("(") {
                    let mut arguments = vec![node];
                    arguments.extend(self.list(")")?);
                    node = self.call(&name, true, arguments)?;
                } else {
                    node = Node::select(node, &name);
                }
            } else if self.eat("[") {
                let key = self.choice()?;
                self.expect("]")?;
                node = Node::index(node, key);
            } else {
                self.depth = before;
                return Ok(node);
            }
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err("it is nested too deeply".to_owned());
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
        if self.eat("(") {
            let inner = self.choice()?;
            self.expect(")")?;
            return Ok(inner);
        }
        if self.eat("[") {
            return Ok(Node::list(self.list("]")?));
        }
        if self.eat("{") {
            return Ok(Node::map(self.map()?));
        }
        if let Some(literal) = self.quoted()? {
            return Ok(Node::Literal(literal));
        }
        match self.rest.as_bytes() {
            [] => Err("it ends too early".to_owned()),
            [b'0'..=b'9' | b'-', ..] | [b'.', b'0'..=b'9', ..] => self.number().map(Node::Literal),
            _ => self.named(),
        }
    }

    /// What begins with a name.
    fn named(&mut self) -> Result<Node, String> {
        // A leading dot says that the name is whole.
        self.eat(".");
        let name = self.identifier().ok_or_else(|| format!("unexpected {:?}", self.rest))?;
        match name.as_str() {
            "true" => Ok(Node::Literal(Value::Bool(true))),
            "false" => Ok(Node::Literal(Value::Bool(false))),
            "null" => Ok(Node::Literal(Value::Null)),
            _ if RESERVED.contains(&name.as_str()) => Err(format!("reserved identifier: {name}")),
            _ if self.eat("(") => {
                let arguments = self.list(")")?;
                if name == "has" {
                    return Node::has(arguments);
                }
                self.call(&name, false, arguments)
            }
            _ => Ok(Node::identifier(&name)),
        }
    }

    /// A text or bytes: `'…'`, `"…"`, either three times, with `r` (raw) or `b` (bytes) before it.
    fn quoted(&mut self) -> Result<Option<Value>, String> {
        self.space();
        let prefix = self.rest.bytes().take(2).take_while(|b| b"rRbB".contains(b)).count();
        let (flags, quoted) = self.rest.split_at(prefix);
        let has = |flag: &str| flags.to_ascii_lowercase().contains(flag);
        let (raw, bytes) = (has("r"), has("b"));
        let Some(quote) = ["'''", "\"\"\"", "'", "\""].into_iter().find(|quote| quoted.starts_with(quote)) else {
            return Ok(None);
        };
        let mut text = Vec::new();
        let mut rest = &quoted[quote.len()..];
        loop {
            if let Some(after) = rest.strip_prefix(quote) {
                self.rest = after;
                break;
            }
            let first = rest.chars().next().ok_or("unclosed text")?;
            match first {
                '\n' | '\r' if quote.len() == 1 => return Err("unclosed text".to_owned()),
                '\\' if !raw => rest = escape(&rest[1..], bytes, &mut text)?,
                _ => {
                    text.extend_from_slice(&rest.as_bytes()[..first.len_utf8()]);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        Ok(Some(match bytes {
            true => Value::Bytes(text),
            false => Value::Text(String::from_utf8(text).map_err(|_| "text is not UTF-8")?),
        }))
    }

    fn number(&mut self) -> Result<Value, String> {
        let (sign, digits) = match self.rest.strip_prefix('-') {
            Some(rest) => ("-", rest),
            None => ("", self.rest),
        };
        let up_to = |text: &str, allowed: fn(char) -> bool| text.find(|c| !allowed(c)).unwrap_or(text.len());
        let is_digit = |c: char| c.is_ascii_digit();
        if let Some(hex) = digits.strip_prefix("0x") {
            let (number, after) = hex.split_at(up_to(hex, |c| c.is_ascii_hexdigit()));
            self.rest = after;
            return self.whole(&format!("{sign}{number}"), 16);
        }
        let mut end = up_to(digits, is_digit);
        let mut floating = false;
        if let Some(fraction) = digits[end..].strip_prefix('.').map(|rest| up_to(rest, is_digit)).filter(|n| *n > 0) {
            end += 1 + fraction;
            floating = true;
        }
        if let Some(power) = digits[end..].strip_prefix(['e', 'E']) {
            let signed = usize::from(power.starts_with(['+', '-']));
            let length = up_to(&power[signed..], is_digit);
            if length > 0 {
                end += 1 + signed + length;
                floating = true;
            }
        }
        let (number, after) = digits.split_at(end);
        self.rest = after;
        if floating {
            let value = format!("{sign}{number}").parse();
            return value.map(Value::Double).map_err(|_| format!("{number:?} is no number"));
        }
        self.whole(&format!("{sign}{number}"), 10)
    }

    /// A whole number, without a sign if `u` is behind it.
    fn whole(&mut self, digits: &str, radix: u32) -> Result<Value, String> {
        let value = match self.rest.strip_prefix(['u', 'U']) {
            Some(rest) => {
                self.rest = rest;
                u64::from_str_radix(digits, radix).map(Value::Uint)
            }
            None => i64::from_str_radix(digits, radix).map(Value::Int),
        };
        value.map_err(|_| format!("{digits:?} is no number"))
    }
}

/// Reads what is behind a backslash; what is behind that.
fn escape<'a>(rest: &'a str, bytes: bool, text: &mut Vec<u8>) -> Result<&'a str, String> {
    let unknown = || "unsupported escape".to_owned();
    let letter = rest.chars().next().ok_or_else(unknown)?;
    let plain = match letter {
        'a' => Some(7),
        'b' => Some(8),
        'f' => Some(12),
        'n' => Some(b'\n'),
        'r' => Some(b'\r'),
        't' => Some(b'\t'),
        'v' => Some(11),
        '\\' | '?' | '"' | '\'' | '`' => Some(letter as u8),
        _ => None,
    };
    if let Some(plain) = plain {
        text.push(plain);
        return Ok(&rest[1..]);
    }
    let (at, width, radix) = match letter {
        'x' | 'X' => (1, 2, 16),
        'u' if !bytes => (1, 4, 16),
        'U' if !bytes => (1, 8, 16),
        '0'..='3' => (0, 3, 8),
        _ => return Err(unknown()),
    };
    let digits = rest.get(at..at + width).ok_or_else(unknown)?;
    let number = u32::from_str_radix(digits, radix).map_err(|_| unknown())?;
    match u8::try_from(number) {
        Ok(byte) if bytes => text.push(byte),
        _ => text.extend(char::from_u32(number).ok_or_else(unknown)?.to_string().into_bytes()),
    }
    Ok(&rest[at + width..])
}
