//! Whether text is an expression of CEL: its grammar, not what the names in it mean.
//!
//! Source: the grammar of cel-go v0.28, whose parser istiod asks.

/// How deep expressions may be nested in each other.
const DEEPEST: usize = 250;

/// Names that expressions must not use.
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
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// What is wrong with an expression, if anything is.
pub(super) fn syntax(text: &str) -> Result<(), String> {
    let mut parser = Parser { text, at: 0, token: Token::End, start: 0, depth: 0 };
    parser.next()?;
    parser.expression()?;
    if parser.token == Token::End { Ok(()) } else { parser.unexpected("the end") }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    End,
    /// Also `true`, `in` and other words.
    Name(&'a str),
    /// A number, text or bytes.
    Literal,
    /// A number without a sign, which may follow one.
    Number,
    /// A name in backticks, which may follow a dot.
    Quoted,
    Sign(&'static str),
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    token: Token<'a>,
    /// Where the token starts.
    start: usize,
    depth: usize,
}

type Parsed = Result<(), String>;

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn fail(&self, what: impl std::fmt::Display) -> Parsed {
        Err(format!("must be a valid CEL expression: column {}: {what}", self.text[..self.start].chars().count() + 1))
    }

    fn unexpected(&self, wanted: &str) -> Parsed {
        match self.token {
            Token::End => self.fail(format_args!("expected {wanted}, found the end")),
            _ => self.fail(format_args!("expected {wanted}, found {:?}", &self.text[self.start..self.at])),
        }
    }

    /// Takes a token from the text.
    fn next(&mut self) -> Parsed {
        loop {
            let trimmed = self.rest().trim_start_matches([' ', '\t', '\r', '\n', '\u{c}']);
            self.at = self.text.len() - trimmed.len();
            if !trimmed.starts_with("//") {
                break;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
        self.start = self.at;
        let rest = self.rest();
        let Some(first) = rest.bytes().next() else {
            self.token = Token::End;
            return Ok(());
        };
        let word = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let is_prefix = matches!(rest[..word].to_ascii_lowercase().as_str(), "r" | "b" | "br");
        if matches!(first, b'"' | b'\'') || (is_prefix && rest[word..].starts_with(['"', '\''])) {
            return self.string(word);
        }
        if first.is_ascii_digit() || (first == b'.' && rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit)) {
            return self.number();
        }
        if first.is_ascii_alphabetic() || first == b'_' {
            self.at += word;
            self.token = Token::Name(&rest[..word]);
            return Ok(());
        }
        if let Some(inside) = rest.strip_prefix('`') {
            let end = inside.find('`').unwrap_or(0);
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/' | ' ');
            self.at += end + 2;
            self.token = Token::Quoted;
            if end == 0 || !inside[..end].chars().all(valid) {
                self.at = self.start + 1;
                return self.unexpected("a name");
            }
            return Ok(());
        }
        let signs = [
            "||", "&&", "<=", ">=", "==", "!=", "<", ">", "!", "-", "+", "*", "/", "%", ".", ",", "?", ":", "(", ")",
            "[", "]", "{", "}",
        ];
        let Some(sign) = signs.into_iter().find(|sign| rest.starts_with(sign)) else {
            self.at += rest.chars().next().map_or(0, char::len_utf8);
            return self.unexpected("an expression");
        };
        self.at += sign.len();
        self.token = Token::Sign(sign);
        Ok(())
    }

    fn number(&mut self) -> Parsed {
        let bytes = self.rest().as_bytes();
        let digits = |from: usize| bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
        let (mut end, mut whole) = (digits(0), true);
        let hex = match bytes {
            [b'0', b'x', rest @ ..] => rest.iter().take_while(|b| b.is_ascii_hexdigit()).count(),
            _ => 0,
        };
        if hex > 0 {
            end = 2 + hex;
        } else {
            if bytes.get(end) == Some(&b'.') && digits(end + 1) > 0 {
                end += 1 + digits(end + 1);
                whole = false;
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                let exponent = digits(end + 1 + sign);
                if exponent > 0 {
                    end += 1 + sign + exponent;
                    whole = false;
                }
            }
        }
        let text = &self.rest()[..end];
        let unsigned = whole && matches!(bytes.get(end), Some(b'u' | b'U'));
        self.at += end + usize::from(unsigned);
        self.token = if unsigned { Token::Literal } else { Token::Number };
        let value = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        // The smallest integer is read with its sign.
        let most = if unsigned { u64::MAX } else { i64::MAX.unsigned_abs() + 1 };
        if whole && !value.is_ok_and(|value| value <= most) {
            return self.fail(format_args!("invalid integer {text}"));
        }
        Ok(())
    }

    fn string(&mut self, prefix: usize) -> Parsed {
        let is_raw = self.rest()[..prefix].contains(['r', 'R']);
        let quoted = &self.rest()[prefix..];
        let three = quoted.starts_with("\"\"\"") || quoted.starts_with("'''");
        let quote = &quoted[..if three { 3 } else { 1 }];
        let mut at = quote.len();
        loop {
            let rest = &quoted[at..];
            if rest.starts_with(quote) {
                break;
            }
            match rest.chars().next() {
                None => return self.fail("a string lacks its end"),
                Some('\n' | '\r') if !three => return self.fail("a string ends with its line"),
                Some('\\') if !is_raw => match escape(&rest[1..]) {
                    0 => return self.fail("invalid escape in a string"),
                    length => at += 1 + length,
                },
                Some(c) => at += c.len_utf8(),
            }
        }
        self.at += prefix + at + quote.len();
        self.token = Token::Literal;
        Ok(())
    }

    fn takes(&mut self, sign: &str) -> Result<bool, String> {
        let is = matches!(self.token, Token::Sign(own) if own == sign);
        if is {
            self.next()?;
        }
        Ok(is)
    }

    fn expect(&mut self, sign: &str) -> Parsed {
        if self.takes(sign)? { Ok(()) } else { self.unexpected(&format!("{sign:?}")) }
    }

    fn expression(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > DEEPEST {
            return self.fail(format_args!("more than {DEEPEST} expressions inside each other"));
        }
        self.operators()?;
        if self.takes("?")? {
            self.operators()?;
            self.expect(":")?;
            self.expression()?;
        }
        self.depth -= 1;
        Ok(())
    }

    /// Operands with operators between them; which of them binds closer makes no difference here.
    fn operators(&mut self) -> Parsed {
        loop {
            self.unary()?;
            match self.token {
                Token::Sign("||" | "&&" | "<" | "<=" | ">=" | ">" | "==" | "!=" | "*" | "/" | "%" | "+" | "-")
                | Token::Name("in") => self.next()?,
                _ => return Ok(()),
            }
        }
    }

    fn unary(&mut self) -> Parsed {
        if let Token::Sign(sign @ ("!" | "-")) = self.token {
            while self.takes(sign)? {}
        }
        self.member()
    }

    fn member(&mut self) -> Parsed {
        self.primary()?;
        loop {
            if self.takes(".")? {
                match self.token {
                    Token::Quoted => self.next()?,
                    Token::Name(name) if !matches!(name, "in" | "true" | "false" | "null") => {
                        self.next()?;
                        if self.takes("(")? {
                            self.list(")")?;
                        }
                    }
                    _ => return self.unexpected("a name"),
                }
            } else if self.takes("[")? {
                self.expression()?;
                self.expect("]")?;
            } else {
                return Ok(());
            }
        }
    }

    fn primary(&mut self) -> Parsed {
        let is_absolute = self.takes(".")?;
        match self.token {
            Token::Name(name) if name != "in" => {
                if matches!(name, "true" | "false" | "null") && !is_absolute {
                    return self.next();
                }
                if RESERVED.contains(&name) {
                    return self.fail(format_args!("reserved identifier: {name}"));
                }
                self.name()
            }
            Token::Literal | Token::Number if !is_absolute => self.next(),
            Token::Sign("(") if !is_absolute => {
                self.next()?;
                self.expression()?;
                self.expect(")")
            }
            Token::Sign("[") if !is_absolute => {
                self.next()?;
                self.list("]")
            }
            Token::Sign("{") if !is_absolute => {
                self.next()?;
                self.entries(false)
            }
            _ => self.unexpected("an expression"),
        }
    }

    /// A name, a call, or a message with its fields.
    fn name(&mut self) -> Parsed {
        self.next()?;
        if self.takes("(")? {
            return self.list(")");
        }
        // Only behind names with dots alone a brace opens a message.
        let (at, token, start) = (self.at, self.token, self.start);
        while self.takes(".")? && matches!(self.token, Token::Name(_)) {
            self.next()?;
        }
        if self.takes("{")? {
            return self.entries(true);
        }
        (self.at, self.token, self.start) = (at, token, start);
        Ok(())
    }

    /// Expressions with commas between them. A list may end with one, arguments may not.
    fn list(&mut self, end: &str) -> Parsed {
        if self.takes(end)? {
            return Ok(());
        }
        if end == "]" && self.takes(",")? {
            return self.expect(end);
        }
        loop {
            self.expression()?;
            if self.takes(end)? {
                return Ok(());
            }
            self.expect(",")?;
            if end == "]" && self.takes(end)? {
                return Ok(());
            }
        }
    }

    /// Keys with values: fields of a message, or of a map.
    fn entries(&mut self, of_message: bool) -> Parsed {
        if self.takes(",")? {
            return self.expect("}");
        }
        while !self.takes("}")? {
            match self.token {
                Token::Name(_) | Token::Quoted if of_message => self.next()?,
                _ if of_message => return self.unexpected("a field"),
                _ => self.expression()?,
            }
            self.expect(":")?;
            self.expression()?;
            if !self.takes(",")? {
                return self.expect("}");
            }
        }
        Ok(())
    }
}

/// The length of what follows a backslash; 0 if it is no escape.
fn escape(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let hex = |count: usize| match bytes.get(1..=count) {
        Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => count + 1,
        _ => 0,
    };
    match bytes {
        [b'a' | b'b' | b'f' | b'n' | b'r' | b't' | b'v' | b'"' | b'\'' | b'`' | b'?' | b'\\', ..] => 1,
        [b'x' | b'X', ..] => hex(2),
        [b'u', ..] => hex(4),
        [b'U', ..] => hex(8),
        [b'0'..=b'3', b'0'..=b'7', b'0'..=b'7', ..] => 3,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn expressions_of_cel_pass() {
        for good in [
            "response.code >= 400 && response.code < 500 || connection.mtls",
            "request.headers['x-a'] == \"b\" ? true : false",
            "!has(request.auth.claims) && -1 < size(a)",
            "'a' in ['a', 'b',] && {1: 2, 'x': [],}['x'] == null",
            "[1, 2].all(x, x > 0) // why not",
            "r'\\d' != b\"\\x41\" && 0x1Fu > 1.5e-3 && .5 > 1e3",
            "google.protobuf.Duration{seconds: 5}.seconds % 2 == 1 && .a.b",
            "'''a\n\"b''' + \"\\u00e9\\101\"",
            "filter_state['a'].`b-c`",
            "a.b.c(d, 1u).e[f].g",
            "-9223372036854775808",
        ] {
            assert_eq!(syntax(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_is_none_is_told_where() {
        for (bad, wanted) in [
            ("", "column 1: expected an expression, found the end"),
            ("a ==", "column 5: expected an expression, found the end"),
            ("a = b", "column 3: expected an expression, found \"=\""),
            ("a b", "column 3: expected the end, found \"b\""),
            ("(a", "column 3: expected \")\""),
            ("f(a,)", "column 5: expected an expression"),
            ("a.1", "column 2: expected the end"),
            ("'a", "column 1: a string lacks its end"),
            ("'\\q'", "column 1: invalid escape"),
            ("for", "column 1: reserved identifier: for"),
            ("99999999999999999999", "column 1: invalid integer"),
            ("a ? b", "column 6: expected \":\""),
            ("a && #", "column 6: expected an expression, found \"#\""),
            (&"(".repeat(300), "more than 250"),
        ] {
            let found = syntax(bad).unwrap_err();
            assert!(found.contains(wanted), "{bad}: {found}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".*", signs in "[-a0.\\[\\](){}?:,'\"\\\\`!&|<=>+ ]*") {
            let _ = (syntax(&text), syntax(&signs));
        }
    }
}
