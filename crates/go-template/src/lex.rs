//! Template text to tokens, as Go's `text/template/parse` lexer.

/// A token with the line it starts on, counted from 1.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token<'t> {
    pub(crate) kind: Kind<'t>,
    /// As written, for messages and for error contexts.
    pub(crate) text: &'t str,
    pub(crate) line: u32,
    /// Byte offset of the token in the template.
    pub(crate) at: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind<'t> {
    Text(&'t str),
    Left,
    Right,
    Space,
    /// `true` and `false`
    Bool(bool),
    Nil,
    Dot,
    /// `.Name`
    Field(&'t str),
    /// `$name`, with the dollar.
    Variable(&'t str),
    Identifier(&'t str),
    Keyword(Keyword),
    Number(&'t str),
    Char(char),
    String(String),
    LeftParen,
    RightParen,
    Pipe,
    Comma,
    Assign,
    Declare,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keyword {
    If,
    Else,
    End,
    Range,
    With,
    Define,
    Block,
    Template,
    Break,
    Continue,
}

/// What separates actions from text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delimiters<'t> {
    pub left: &'t str,
    pub right: &'t str,
}

impl Default for Delimiters<'_> {
    fn default() -> Self {
        Self { left: "{{", right: "}}" }
    }
}

type Failure = (u32, String);

const BLANK: [char; 4] = [' ', '\t', '\r', '\n'];

/// All tokens of `source`; the last is [`Kind::End`].
pub(crate) fn tokens<'t>(source: &'t str, delimiters: Delimiters<'_>) -> Result<Vec<Token<'t>>, Failure> {
    let mut lexer = Lexer { source, at: 0, line: 1, tokens: Vec::new(), delimiters };
    lexer.run()?;
    Ok(lexer.tokens)
}

struct Lexer<'t, 'd> {
    source: &'t str,
    at: usize,
    line: u32,
    tokens: Vec<Token<'t>>,
    delimiters: Delimiters<'d>,
}

impl<'t> Lexer<'t, '_> {
    fn rest(&self) -> &'t str {
        &self.source[self.at..]
    }

    fn emit(&mut self, kind: Kind<'t>, length: usize) {
        let text = &self.source[self.at..self.at + length];
        self.tokens.push(Token { kind, text, line: self.line, at: self.at });
        self.skip(length);
    }

    fn skip(&mut self, length: usize) {
        self.line += self.source[self.at..self.at + length].matches('\n').count() as u32;
        self.at += length;
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Failure> {
        Err((self.line, message.into()))
    }

    fn run(&mut self) -> Result<(), Failure> {
        let mut trim = false;
        loop {
            let rest = self.rest();
            let Some(left) = rest.find(self.delimiters.left) else {
                self.text(rest.len(), trim, false);
                self.emit(Kind::End, 0);
                return Ok(());
            };
            let after = &rest[left + self.delimiters.left.len()..];
            let trim_before = after.starts_with('-') && after[1..].starts_with(BLANK);
            self.text(left, trim, trim_before);
            let marker = if trim_before { 2 } else { 0 };
            let after = &after[marker..];
            if after.starts_with("/*") {
                trim = self.comment(marker)?;
                continue;
            }
            self.emit(Kind::Left, self.delimiters.left.len());
            self.skip(marker);
            trim = self.action()?;
        }
    }

    /// Emits `length` bytes of text, trimmed on the sides asked for.
    fn text(&mut self, length: usize, trim_start: bool, trim_end: bool) {
        let mut text = &self.rest()[..length];
        if trim_end {
            text = text.trim_end_matches(BLANK);
        }
        let mut skip = 0;
        if trim_start {
            let trimmed = text.trim_start_matches(BLANK);
            skip = text.len() - trimmed.len();
            text = trimmed;
        }
        self.skip(skip);
        let left = length - skip;
        if !text.is_empty() {
            self.tokens.push(Token { kind: Kind::Text(text), text, line: self.line, at: self.at });
        }
        self.skip(left);
    }

    /// A comment must fill its action. Returns whether text after it is trimmed.
    fn comment(&mut self, marker: usize) -> Result<bool, Failure> {
        let start = self.delimiters.left.len() + marker;
        let Some(end) = self.rest()[start + 2..].find("*/") else {
            return self.fail("unclosed comment");
        };
        let end = start + 2 + end + 2;
        let after = &self.rest()[end..];
        let right = self.delimiters.right;
        if after.starts_with(right) {
            self.skip(end + right.len());
            return Ok(false);
        }
        if after.starts_with(BLANK) && after[1..].starts_with('-') && after[2..].starts_with(right) {
            self.skip(end + 2 + right.len());
            return Ok(true);
        }
        self.fail("comment ends before closing delimiter")
    }

    /// The inside of an action, to its right delimiter. Returns whether text after it is trimmed.
    fn action(&mut self) -> Result<bool, Failure> {
        let mut parens = 0;
        loop {
            let rest = self.rest();
            let right = self.delimiters.right;
            let trimmed = rest.starts_with(BLANK) && rest[1..].starts_with('-') && rest[2..].starts_with(right);
            if trimmed || rest.starts_with(right) {
                if parens > 0 {
                    return self.fail("unclosed left paren");
                }
                if trimmed {
                    self.skip(2);
                }
                self.emit(Kind::Right, right.len());
                return Ok(trimmed);
            }
            let Some(c) = rest.chars().next() else {
                return self.fail("unclosed action");
            };
            match c {
                ' ' | '\t' | '\r' | '\n' => {
                    let mut length = rest.len() - rest.trim_start_matches(BLANK).len();
                    // The last blank may belong to a trim marker.
                    let tail = &rest[length..];
                    if tail.starts_with('-') && tail[1..].starts_with(right) {
                        length -= 1;
                    }
                    self.emit(Kind::Space, length);
                }
                '=' => self.emit(Kind::Assign, 1),
                ':' if rest.starts_with(":=") => self.emit(Kind::Declare, 2),
                ':' => return self.fail("expected :="),
                '|' => self.emit(Kind::Pipe, 1),
                ',' => self.emit(Kind::Comma, 1),
                '(' => {
                    parens += 1;
                    self.emit(Kind::LeftParen, 1);
                }
                ')' => {
                    parens -= 1;
                    if parens < 0 {
                        return self.fail("unexpected right paren");
                    }
                    self.emit(Kind::RightParen, 1);
                }
                '"' => {
                    let (value, length) = self.quoted('"')?;
                    self.emit(Kind::String(value), length);
                }
                '`' => {
                    let Some(end) = rest[1..].find('`') else {
                        return self.fail("unterminated raw quoted string");
                    };
                    self.emit(Kind::String(rest[1..1 + end].to_owned()), end + 2);
                }
                '\'' => {
                    let (value, length) = self.quoted('\'')?;
                    let mut chars = value.chars();
                    match (chars.next(), chars.next()) {
                        (Some(c), None) => self.emit(Kind::Char(c), length),
                        _ => return self.fail(format!("malformed character constant: {}", &rest[..length])),
                    }
                }
                '$' => {
                    let length = 1 + word(&rest[1..]);
                    self.terminated(length)?;
                    self.emit(Kind::Variable(&rest[..length]), length);
                }
                '.' if !rest[1..].starts_with(|c: char| c.is_ascii_digit()) => {
                    let length = 1 + word(&rest[1..]);
                    self.terminated(length)?;
                    let kind = if length == 1 { Kind::Dot } else { Kind::Field(&rest[1..length]) };
                    self.emit(kind, length);
                }
                '+' | '-' | '.' | '0'..='9' => {
                    let length = number(rest);
                    if rest[length..].starts_with(|c: char| c.is_alphanumeric() || c == '_') {
                        let written: String = rest.chars().take(length + 1).collect();
                        return self.fail(format!("bad number syntax: {written:?}"));
                    }
                    self.emit(Kind::Number(&rest[..length]), length);
                }
                c if c.is_alphanumeric() || c == '_' => {
                    let length = word(rest);
                    self.terminated(length)?;
                    let text = &rest[..length];
                    let kind = match text {
                        "true" => Kind::Bool(true),
                        "false" => Kind::Bool(false),
                        "nil" => Kind::Nil,
                        _ => keyword(text).map_or(Kind::Identifier(text), Kind::Keyword),
                    };
                    self.emit(kind, length);
                }
                c => {
                    return self.fail(format!("unrecognized character in action: U+{:04X} {c:?}", u32::from(c)));
                }
            }
        }
    }

    /// After a word must come something that ends it.
    fn terminated(&self, length: usize) -> Result<(), Failure> {
        let rest = &self.rest()[length..];
        let fine = rest.is_empty()
            || rest.starts_with([' ', '\t', '\r', '\n', '.', ',', '|', ':', ')', '('])
            || rest.starts_with(self.delimiters.right);
        match rest.chars().next() {
            Some(c) if !fine => self.fail(format!("bad character U+{:04X} {c:?}", u32::from(c))),
            _ => Ok(()),
        }
    }

    /// A quoted constant with Go's escapes: its value and its length as written.
    fn quoted(&self, quote: char) -> Result<(String, usize), Failure> {
        let rest = self.rest();
        let unterminated = if quote == '"' { "unterminated quoted string" } else { "unterminated character constant" };
        let mut value = Vec::new();
        let mut chars = rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    let text = String::from_utf8_lossy(&value).into_owned();
                    return Ok((text, at + 1));
                }
                '\n' => return self.fail(unterminated),
                '\\' => {
                    let Some((at, escape)) = chars.next() else { return self.fail(unterminated) };
                    let mut digits = |radix: u32, from: usize, count: usize| -> Option<u32> {
                        let text = rest.get(from..from + count)?;
                        let code = u32::from_str_radix(text, radix).ok()?;
                        for _ in from.max(at + 1)..from + count {
                            chars.next();
                        }
                        Some(code)
                    };
                    let invalid = || (self.line, format!("invalid syntax: \\{escape}"));
                    match escape {
                        'n' => value.push(b'\n'),
                        't' => value.push(b'\t'),
                        'r' => value.push(b'\r'),
                        'a' => value.push(7),
                        'b' => value.push(8),
                        'f' => value.push(12),
                        'v' => value.push(11),
                        '\\' => value.push(b'\\'),
                        c if c == quote => value.push(c as u8),
                        'x' => value.push(digits(16, at + 1, 2).ok_or_else(invalid)? as u8),
                        '0'..='7' => {
                            let code = digits(8, at, 3).ok_or_else(invalid)?;
                            value.push(u8::try_from(code).map_err(|_| invalid())?);
                        }
                        'u' | 'U' => {
                            let code = digits(16, at + 1, if escape == 'u' { 4 } else { 8 }).ok_or_else(invalid)?;
                            let c = char::from_u32(code).ok_or_else(invalid)?;
                            value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                        }
                        _ => return Err(invalid()),
                    }
                }
                c => value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        self.fail(unterminated)
    }
}

/// Length of the identifier at the start.
fn word(text: &str) -> usize {
    text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len())
}

/// Length of the number at the start, as Go's lexer scans it.
fn number(text: &str) -> usize {
    let first = real(text);
    // A complex constant such as 1+2i: the second part must be imaginary.
    if text[first..].starts_with(['+', '-']) {
        let second = real(&text[first..]);
        if text[first..first + second].ends_with('i') {
            return first + second;
        }
    }
    first
}

fn real(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = usize::from(matches!(bytes.first(), Some(b'+' | b'-')));
    let scan = |at: &mut usize, set: &[u8]| {
        while bytes.get(*at).is_some_and(|b| set.contains(b)) {
            *at += 1;
        }
    };
    let mut digits: &[u8] = b"0123456789_";
    if bytes.get(at) == Some(&b'0') {
        at += 1;
        match bytes.get(at) {
            Some(b'x' | b'X') => {
                at += 1;
                digits = b"0123456789abcdefABCDEF_";
            }
            Some(b'o' | b'O') => {
                at += 1;
                digits = b"01234567_";
            }
            Some(b'b' | b'B') => {
                at += 1;
                digits = b"01_";
            }
            _ => {}
        }
    }
    scan(&mut at, digits);
    if bytes.get(at) == Some(&b'.') {
        at += 1;
        scan(&mut at, digits);
    }
    let exponent: &[u8] = if digits.len() > 12 { b"pP" } else { b"eE" };
    if digits.len() > 10 && bytes.get(at).is_some_and(|b| exponent.contains(b)) {
        at += 1;
        at += usize::from(matches!(bytes.get(at), Some(b'+' | b'-')));
        scan(&mut at, b"0123456789_");
    }
    if bytes.get(at) == Some(&b'i') {
        at += 1;
    }
    at
}

fn keyword(text: &str) -> Option<Keyword> {
    Some(match text {
        "if" => Keyword::If,
        "else" => Keyword::Else,
        "end" => Keyword::End,
        "range" => Keyword::Range,
        "with" => Keyword::With,
        "define" => Keyword::Define,
        "block" => Keyword::Block,
        "template" => Keyword::Template,
        "break" => Keyword::Break,
        "continue" => Keyword::Continue,
        _ => return None,
    })
}
