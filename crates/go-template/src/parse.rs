//! Tokens to trees, as Go's `text/template/parse`.

use std::collections::HashMap;
use std::sync::Arc;

use crate::functions::{Function, Functions};
use crate::lex::{self, Delimiters, Keyword, Kind, Token};

/// Blocks and parentheses within each other: each takes stack here and when the template runs.
const DEPTH_LIMIT: usize = 60;

/// `else if`s of one `if`: they are freed by recursion.
const ELSE_LIMIT: usize = 1_000;

#[derive(Debug)]
pub(crate) enum Node {
    Text(Box<str>),
    Action(Pipe),
    If(Branch),
    With(Branch),
    Range(Branch),
    Template { name: Box<str>, pipe: Option<Pipe>, context: Context },
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct Branch {
    pub(crate) pipe: Pipe,
    pub(crate) then: Vec<Node>,
    pub(crate) otherwise: Vec<Node>,
}

/// Where something stands in the template and how it is written, for error messages.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) text: Box<str>,
}

#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) declares: Vec<Box<str>>,
    /// `=` instead of `:=`
    pub(crate) assigns: bool,
    pub(crate) commands: Vec<Command>,
    pub(crate) context: Context,
}

#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) words: Vec<Word>,
    pub(crate) context: Context,
}

#[derive(Debug)]
pub(crate) struct Word {
    pub(crate) operand: Operand,
    pub(crate) context: Context,
}

#[derive(Debug)]
pub(crate) enum Operand {
    Dot,
    Nil,
    Bool(bool),
    Int(i64),
    Float(f64),
    Complex(f64, f64),
    /// A number that fits no Go type.
    Overflow(Box<str>),
    Text(Box<str>),
    Field(Vec<Box<str>>),
    Variable(Box<str>, Vec<Box<str>>),
    Function(Box<str>, Arc<Function>),
    Pipe(Box<Pipe>),
    Chain(Box<Word>, Vec<Box<str>>),
}

pub(crate) type Trees = HashMap<Box<str>, Vec<Node>>;
type Failure = (u32, String);

/// Functions that change a dictionary in place.
const CHANGING: [&str; 6] = ["set", "unset", "merge", "mustMerge", "mergeOverwrite", "mustMergeOverwrite"];

/// The named templates of `source`, the main one with the name `main`, and whether they call functions that
/// change dictionaries.
pub(crate) fn parse(
    main: &str,
    source: &str,
    delimiters: Delimiters<'_>,
    functions: &Functions,
) -> Result<(Trees, bool), Failure> {
    let tokens = lex::tokens(source, delimiters)?;
    let mut parser = Parser {
        source,
        tokens,
        at: 0,
        functions,
        variables: vec!["$".into()],
        trees: Trees::new(),
        depth: 0,
        ranges: 0,
        line: 1,
        changes: false,
    };
    let root = parser.top()?;
    parser.add(main, root)?;
    Ok((parser.trees, parser.changes))
}

struct Parser<'t> {
    source: &'t str,
    tokens: Vec<Token<'t>>,
    at: usize,
    functions: &'t Functions,
    variables: Vec<Box<str>>,
    trees: Trees,
    depth: usize,
    ranges: usize,
    line: u32,
    /// A function was called that changes a dictionary.
    changes: bool,
}

/// What ended a list of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    End,
    Else,
}

impl<'t> Parser<'t> {
    fn next(&mut self) -> Token<'t> {
        let token = self.tokens[self.at.min(self.tokens.len() - 1)].clone();
        self.at += 1;
        self.line = token.line;
        token
    }

    fn peek(&self) -> &Token<'t> {
        &self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn next_non_space(&mut self) -> Token<'t> {
        loop {
            let token = self.next();
            if token.kind != Kind::Space {
                return token;
            }
        }
    }

    fn peek_non_space(&mut self) -> &Token<'t> {
        while self.peek().kind == Kind::Space {
            self.at += 1;
        }
        self.peek()
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, Failure> {
        Err((self.line, message.into()))
    }

    fn unexpected<T>(&self, token: &Token<'_>, wherein: &str) -> Result<T, Failure> {
        self.fail(format!("unexpected {} in {wherein}", describe(token)))
    }

    fn context(&self, token: &Token<'t>) -> Context {
        self.context_from(token.at, token.line)
    }

    /// The context of what starts at `start` and has just been read to the end.
    fn context_from(&self, start: usize, line: u32) -> Context {
        let end = self.tokens[..self.at.min(self.tokens.len())]
            .iter()
            .rev()
            .find(|token| token.kind != Kind::Space)
            .map_or(start, |token| token.at + token.text.len())
            .max(start);
        let column = start - self.source[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let mut text: String = self.source[start..end].chars().take(60).collect();
        if text.len() < end - start {
            text.push_str("...");
        }
        Context { line, column: column as u32, text: text.into() }
    }

    fn enter(&mut self) -> Result<(), Failure> {
        self.depth += 1;
        if self.depth > DEPTH_LIMIT { self.fail("template is nested too deeply") } else { Ok(()) }
    }

    fn add(&mut self, name: &str, nodes: Vec<Node>) -> Result<(), Failure> {
        let empty =
            |nodes: &[Node]| nodes.iter().all(|node| matches!(node, Node::Text(text) if text.trim().is_empty()));
        match self.trees.get(name) {
            Some(old) if !empty(old) => {
                if empty(&nodes) {
                    return Ok(());
                }
                self.fail(format!("multiple definition of template {name:?}"))
            }
            _ => {
                self.trees.insert(name.into(), nodes);
                Ok(())
            }
        }
    }

    fn top(&mut self) -> Result<Vec<Node>, Failure> {
        let mut nodes = Vec::new();
        loop {
            match self.peek().kind {
                Kind::End => return Ok(nodes),
                Kind::Left => {
                    let start = self.at;
                    self.next();
                    if self.next_non_space().kind == Kind::Keyword(Keyword::Define) {
                        self.define()?;
                        continue;
                    }
                    self.at = start;
                }
                _ => {}
            }
            match self.node()? {
                Ok(node) => nodes.push(node),
                Err(ending) => {
                    let word = if ending == Ending::End { "{{end}}" } else { "{{else}}" };
                    return self.fail(format!("unexpected {word}"));
                }
            }
        }
    }

    fn define(&mut self) -> Result<(), Failure> {
        let name = self.template_name("define clause")?;
        self.right("define clause")?;
        // A define has its own variables and loops.
        let variables = std::mem::replace(&mut self.variables, vec!["$".into()]);
        let ranges = std::mem::take(&mut self.ranges);
        let (nodes, ending) = self.list()?;
        if ending != Ending::End {
            return self.fail("unexpected {{else}} in define clause");
        }
        self.variables = variables;
        self.ranges = ranges;
        self.add(&name, nodes)
    }

    fn template_name(&mut self, wherein: &str) -> Result<String, Failure> {
        let token = self.next_non_space();
        match token.kind {
            Kind::String(name) => Ok(name),
            _ => self.unexpected(&token, wherein),
        }
    }

    fn right(&mut self, wherein: &str) -> Result<(), Failure> {
        let token = self.next_non_space();
        if token.kind == Kind::Right { Ok(()) } else { self.unexpected(&token, wherein) }
    }

    /// Nodes up to `{{end}}` or `{{else`; of the latter the word is consumed, not what follows it.
    fn list(&mut self) -> Result<(Vec<Node>, Ending), Failure> {
        let mut nodes = Vec::new();
        loop {
            if self.peek().kind == Kind::End {
                self.line = self.peek().line;
                return self.fail("unexpected EOF");
            }
            match self.node()? {
                Ok(node) => nodes.push(node),
                Err(ending) => return Ok((nodes, ending)),
            }
        }
    }

    fn node(&mut self) -> Result<Result<Node, Ending>, Failure> {
        let token = self.next();
        match token.kind {
            Kind::Text(text) => Ok(Ok(Node::Text(text.into()))),
            Kind::Left => self.action(&token),
            _ => self.unexpected(&token, "input"),
        }
    }

    fn action(&mut self, left: &Token<'t>) -> Result<Result<Node, Ending>, Failure> {
        let token = self.next_non_space();
        let Kind::Keyword(keyword) = token.kind else {
            self.at -= 1;
            let pipe = self.pipeline("command", Kind::Right, false)?;
            return Ok(Ok(Node::Action(pipe)));
        };
        match keyword {
            Keyword::If => Ok(Ok(Node::If(self.branch("if", keyword)?))),
            Keyword::With => Ok(Ok(Node::With(self.branch("with", keyword)?))),
            Keyword::Range => Ok(Ok(Node::Range(self.branch("range", keyword)?))),
            Keyword::End => {
                self.right("end")?;
                Ok(Err(Ending::End))
            }
            Keyword::Else => {
                // What follows, `if` or `with` or the end, is read by the branch.
                if !matches!(self.peek_non_space().kind, Kind::Keyword(Keyword::If | Keyword::With) | Kind::Right) {
                    let token = self.next_non_space();
                    return self.unexpected(&token, "else");
                }
                Ok(Err(Ending::Else))
            }
            Keyword::Break | Keyword::Continue => {
                let word = if keyword == Keyword::Break { "break" } else { "continue" };
                self.right(word)?;
                if self.ranges == 0 {
                    return self.fail(format!("{{{{{word}}}}} outside {{{{range}}}}"));
                }
                Ok(Ok(if keyword == Keyword::Break { Node::Break } else { Node::Continue }))
            }
            Keyword::Template => {
                let name = self.template_name("template clause")?.into();
                let pipe = match self.peek_non_space().kind {
                    Kind::Right => {
                        self.next();
                        None
                    }
                    _ => Some(self.pipeline("template clause", Kind::Right, false)?),
                };
                let context = self.context_from(left.at, left.line);
                Ok(Ok(Node::Template { name, pipe, context }))
            }
            Keyword::Block => {
                let name = self.template_name("block clause")?;
                let pipe = self.pipeline("block clause", Kind::Right, false)?;
                let context = self.context_from(left.at, left.line);
                let variables = std::mem::replace(&mut self.variables, vec!["$".into()]);
                let ranges = std::mem::take(&mut self.ranges);
                self.enter()?;
                let (nodes, ending) = self.list()?;
                self.depth -= 1;
                if ending != Ending::End {
                    return self.fail("unexpected {{else}} in block clause");
                }
                self.variables = variables;
                self.ranges = ranges;
                self.add(&name, nodes)?;
                Ok(Ok(Node::Template { name: name.into(), pipe: Some(pipe), context }))
            }
            Keyword::Define => self.fail("unexpected {{define}}"),
        }
    }

    fn branch(&mut self, name: &str, keyword: Keyword) -> Result<Branch, Failure> {
        self.enter()?;
        let outer = self.variables.len();
        let (pipe, then, mut ending) = self.condition(name, keyword)?;
        let mut first = Branch { pipe, then, otherwise: Vec::new() };
        // {{else if}} and {{else with}} make a nested branch that shares the {{end}}; it is read here, not by
        // recursion, as there may be many.
        let mut more = Vec::new();
        let mut otherwise = Vec::new();
        while ending == Ending::Else {
            let token = self.next_non_space();
            match token.kind {
                Kind::Keyword(again @ (Keyword::If | Keyword::With)) if again == keyword => {
                    if more.len() >= ELSE_LIMIT {
                        return self.fail("template is nested too deeply");
                    }
                    let (pipe, then, next) = self.condition(name, keyword)?;
                    more.push((pipe, then));
                    ending = next;
                }
                Kind::Right => {
                    let (nodes, ending) = self.list()?;
                    if ending != Ending::End {
                        return self.fail("expected end; found {{else}}");
                    }
                    otherwise = nodes;
                    break;
                }
                _ => return self.unexpected(&token, "else"),
            }
        }
        for (pipe, then) in more.into_iter().rev() {
            let branch = Branch { pipe, then, otherwise };
            otherwise = vec![if keyword == Keyword::If { Node::If(branch) } else { Node::With(branch) }];
        }
        first.otherwise = otherwise;
        self.variables.truncate(outer);
        self.depth -= 1;
        Ok(first)
    }

    /// What decides about a branch, and what runs when it holds.
    fn condition(&mut self, name: &str, keyword: Keyword) -> Result<(Pipe, Vec<Node>, Ending), Failure> {
        let pipe = self.pipeline(name, Kind::Right, keyword == Keyword::Range)?;
        if keyword == Keyword::Range {
            self.ranges += 1;
        }
        let (then, ending) = self.list()?;
        if keyword == Keyword::Range {
            self.ranges -= 1;
        }
        Ok((pipe, then, ending))
    }

    fn pipeline(&mut self, wherein: &str, end: Kind<'static>, range: bool) -> Result<Pipe, Failure> {
        self.enter()?;
        let start = self.peek_non_space().clone();
        let (declares, assigns) = self.declarations(wherein, range)?;
        let mut commands = Vec::new();
        loop {
            let token = self.next_non_space();
            match token.kind {
                _ if token.kind == end => break,
                Kind::Right | Kind::RightParen => return self.unexpected(&token, wherein),
                Kind::Bool(_)
                | Kind::Char(_)
                | Kind::Dot
                | Kind::Field(_)
                | Kind::Identifier(_)
                | Kind::Number(_)
                | Kind::Nil
                | Kind::String(_)
                | Kind::Variable(_)
                | Kind::LeftParen => {
                    self.at -= 1;
                    commands.push(self.command()?);
                }
                _ => return self.unexpected(&token, wherein),
            }
        }
        if commands.is_empty() {
            return self.fail(format!("missing value for {wherein}"));
        }
        for (index, command) in commands.iter().enumerate().skip(1) {
            if matches!(
                command.words[0].operand,
                Operand::Bool(_)
                    | Operand::Dot
                    | Operand::Nil
                    | Operand::Int(_)
                    | Operand::Float(_)
                    | Operand::Complex(..)
                    | Operand::Overflow(_)
                    | Operand::Text(_)
            ) {
                return self.fail(format!("non executable command in pipeline stage {}", index + 1));
            }
        }
        self.depth -= 1;
        // The context ends before the closing delimiter.
        self.at -= 1;
        let context = self.context(&start);
        self.at += 1;
        Ok(Pipe { declares, assigns, commands, context })
    }

    /// `$x :=`, `$x =` or, for range, `$i, $x :=`; nothing when the pipeline starts otherwise.
    fn declarations(&mut self, wherein: &str, range: bool) -> Result<(Vec<Box<str>>, bool), Failure> {
        let start = self.at;
        let mut names: Vec<Box<str>> = Vec::new();
        while let Kind::Variable(name) = self.peek_non_space().kind {
            self.next();
            names.push(name.into());
            let token = self.peek_non_space().clone();
            match token.kind {
                Kind::Declare | Kind::Assign => {
                    self.next();
                    if names.len() > 1 && !range {
                        return self.fail(format!("too many declarations in {wherein}"));
                    }
                    let assigns = token.kind == Kind::Assign;
                    // Also with =: whether the variable exists shows when the template runs.
                    self.variables.extend(names.iter().cloned());
                    return Ok((names, assigns));
                }
                Kind::Comma if range && names.len() < 2 => {
                    self.next();
                    if !matches!(self.peek_non_space().kind, Kind::Variable(_)) {
                        return self.fail("range can only initialize variables");
                    }
                }
                Kind::Comma => return self.fail(format!("too many declarations in {wherein}")),
                _ if names.len() > 1 => return self.unexpected(&token, wherein),
                _ => break,
            }
        }
        self.at = start;
        Ok((Vec::new(), false))
    }

    fn known(&self, name: &str) -> Result<(), Failure> {
        if self.variables.iter().any(|variable| **variable == *name) {
            return Ok(());
        }
        self.fail(format!("undefined variable \"{name}\""))
    }

    fn command(&mut self) -> Result<Command, Failure> {
        let start = self.peek_non_space().clone();
        let mut words = Vec::new();
        let end;
        loop {
            self.peek_non_space();
            if let Some(word) = self.operand()? {
                words.push(word);
            }
            let token = self.next();
            match token.kind {
                Kind::Space => continue,
                Kind::Right | Kind::RightParen => {
                    self.at -= 1;
                    end = self.at;
                }
                Kind::Pipe => end = self.at - 1,
                _ => return self.unexpected(&token, "operand"),
            }
            break;
        }
        if words.is_empty() {
            return self.fail("empty command");
        }
        let at = std::mem::replace(&mut self.at, end);
        let context = self.context(&start);
        self.at = at;
        Ok(Command { words, context })
    }

    /// A term with the fields after it; `None` at what is not a term.
    fn operand(&mut self) -> Result<Option<Word>, Failure> {
        let start = self.peek().clone();
        let Some(operand) = self.term()? else { return Ok(None) };
        let mut word = Word { operand, context: self.context(&start) };
        let mut fields: Vec<Box<str>> = Vec::new();
        while let Kind::Field(name) = self.peek().kind {
            self.next();
            fields.push(name.into());
        }
        if fields.is_empty() {
            return Ok(Some(word));
        }
        let context = self.context(&start);
        match &mut word.operand {
            Operand::Field(names) | Operand::Variable(_, names) => {
                names.append(&mut fields);
                word.context = context;
                Ok(Some(word))
            }
            Operand::Dot
            | Operand::Nil
            | Operand::Bool(_)
            | Operand::Text(_)
            | Operand::Int(_)
            | Operand::Float(_)
            | Operand::Complex(..) => self.fail(format!("unexpected . after term {:?}", start.text)),
            _ => Ok(Some(Word { operand: Operand::Chain(Box::new(word), fields), context })),
        }
    }

    fn term(&mut self) -> Result<Option<Operand>, Failure> {
        let token = self.next();
        Ok(Some(match token.kind {
            Kind::Identifier(name) => match self.functions.get(name) {
                Some(function) => {
                    self.changes |= CHANGING.contains(&name);
                    Operand::Function(name.into(), function.clone())
                }
                None => return self.fail(format!("function {name:?} not defined")),
            },
            Kind::Dot => Operand::Dot,
            Kind::Nil => Operand::Nil,
            Kind::Variable(name) => {
                self.known(name)?;
                Operand::Variable(name.into(), Vec::new())
            }
            Kind::Field(name) => Operand::Field(vec![name.into()]),
            Kind::Bool(value) => Operand::Bool(value),
            Kind::Char(value) => Operand::Int(i64::from(u32::from(value))),
            Kind::Number(text) => match constant(text) {
                Some(operand) => operand,
                None => return self.fail(format!("bad number syntax: {text:?}")),
            },
            Kind::String(text) => Operand::Text(text.into()),
            Kind::LeftParen => {
                Operand::Pipe(Box::new(self.pipeline("parenthesized pipeline", Kind::RightParen, false)?))
            }
            _ => {
                self.at -= 1;
                return Ok(None);
            }
        }))
    }
}

/// A numeric constant with the type Go gives it where any type will do.
fn constant(text: &str) -> Option<Operand> {
    if let Some(imaginary) = text.strip_suffix('i') {
        let split = imaginary
            .char_indices()
            .skip(1)
            .filter(|(at, c)| matches!(c, '+' | '-') && !imaginary[..*at].ends_with(['e', 'E', 'p', 'P']));
        let split = split.last().map_or(0, |(at, _)| at);
        let (re, im) = imaginary.split_at(split);
        let re = if re.is_empty() { 0.0 } else { re.replace('_', "").parse().ok()? };
        return Some(Operand::Complex(re, im.replace('_', "").parse().ok()?));
    }
    if !underscores_fine(text) {
        return None;
    }
    let clean = text.replace('_', "");
    let (negative, digits) = match clean.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, clean.strip_prefix('+').unwrap_or(&clean)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, body) = if let Some(body) = lower.strip_prefix("0x") {
        (16, body)
    } else if let Some(body) = lower.strip_prefix("0o") {
        (8, body)
    } else if let Some(body) = lower.strip_prefix("0b") {
        (2, body)
    } else if lower.len() > 1 && lower.starts_with('0') && lower.bytes().all(|b| b.is_ascii_digit()) {
        (8, &lower[1..])
    } else {
        (10, lower.as_str())
    };
    if body.bytes().all(|b| (b as char).is_digit(radix)) && !body.is_empty() {
        let Ok(value) = u128::from_str_radix(body, radix) else { return Some(Operand::Overflow(text.into())) };
        let signed = i128::try_from(value).ok()? * if negative { -1 } else { 1 };
        return Some(match i64::try_from(signed) {
            Ok(value) => Operand::Int(value),
            Err(_) => Operand::Overflow(text.into()),
        });
    }
    if radix == 16 {
        return hexadecimal_float(body).map(|value| Operand::Float(if negative { -value } else { value }));
    }
    // Digits that are no integer, such as 08.
    if !lower.contains(['.', 'e']) {
        return None;
    }
    clean.parse().ok().filter(|value: &f64| value.is_finite()).map(Operand::Float)
}

/// Underscores stand between digits, or between a prefix such as `0x` and a digit.
fn underscores_fine(text: &str) -> bool {
    if !text.contains('_') {
        return true;
    }
    let digits = text.trim_start_matches(['+', '-']);
    let based = digits.len() > 1 && digits.starts_with('0');
    let prefix = based && digits[1..].starts_with(['x', 'X', 'o', 'O', 'b', 'B']);
    // Decimal numbers with a fraction or an exponent cannot have any.
    if !prefix && digits.contains(['.', 'e', 'E']) {
        return false;
    }
    let bytes = digits.as_bytes();
    bytes.iter().enumerate().filter(|(_, byte)| **byte == b'_').all(|(at, _)| {
        let before = at.checked_sub(1).and_then(|at| bytes.get(at));
        let prefixed = prefix && at == 2;
        before.is_some_and(|byte| byte.is_ascii_hexdigit() || prefixed)
            && bytes.get(at + 1).is_some_and(u8::is_ascii_hexdigit)
    })
}

/// `1.8p3` without its `0x`.
fn hexadecimal_float(body: &str) -> Option<f64> {
    let (mantissa, exponent) = body.split_once('p')?;
    let exponent: i32 = exponent.parse().ok()?;
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut value = 0.0;
    for c in whole.chars().chain(fraction.chars()) {
        value = value * 16.0 + f64::from(c.to_digit(16)?);
    }
    Some(value * 2f64.powi(exponent - 4 * i32::try_from(fraction.len()).ok()?))
}

fn describe(token: &Token<'_>) -> String {
    match &token.kind {
        Kind::End => "EOF".to_owned(),
        Kind::Keyword(_) => format!("<{}>", token.text),
        _ if token.text.len() > 10 => {
            let start: String = token.text.chars().take(10).collect();
            format!("{start:?}...")
        }
        _ => format!("{:?}", token.text),
    }
}
