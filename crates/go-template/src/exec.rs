//! Running a parsed template over data, as Go's `text/template` exec.

use std::rc::Rc;

use serde_json::Value as Json;

use crate::Limits;
use crate::format;
use crate::functions::Args;
use crate::parse::{Branch, Command, Context, Node, Operand, Pipe, Trees, Word};
use crate::value::{Text, Value};

/// Why execution ended: message with the place in the template.
pub(crate) struct Failure {
    pub(crate) line: u32,
    pub(crate) column: u32,
    /// The part of the template, as it is written.
    pub(crate) text: String,
    /// The template that was running.
    pub(crate) template: String,
    pub(crate) message: String,
}

/// Bounds what a template takes of the stack.
const LEVEL_LIMIT: usize = 200;

/// Lists and dictionaries within each other; a dictionary that holds itself is endlessly deep.
const VALUE_DEPTH_LIMIT: usize = 100;

type Done<T> = Result<T, Box<Failure>>;

enum Flow {
    Next,
    Break,
    Continue,
}

pub(crate) struct Executor<'a> {
    trees: &'a Trees,
    limits: Limits,
    out: String,
    steps: usize,
    /// Templates that called each other.
    depth: usize,
    /// Blocks and pipelines within each other, over all templates: what the stack has to hold.
    level: usize,
    variables: Vec<(&'a str, Value<'a>)>,
    /// Where the running template's variables start.
    floor: usize,
    template: &'a str,
}

impl<'a> Executor<'a> {
    pub(crate) fn run(trees: &'a Trees, main: &'a str, data: Value<'a>, limits: Limits) -> Done<String> {
        let mut executor = Executor {
            trees,
            limits,
            out: String::new(),
            steps: 0,
            depth: 0,
            level: 0,
            variables: vec![("$", data.clone())],
            floor: 0,
            template: main,
        };
        if let Some(nodes) = trees.get(main) {
            executor.walk(&data, nodes)?;
        }
        Ok(executor.out)
    }

    fn fail<T>(&self, context: &Context, message: impl Into<String>) -> Done<T> {
        Err(Box::new(Failure {
            line: context.line,
            column: context.column,
            text: context.text.to_string(),
            template: self.template.to_owned(),
            message: message.into(),
        }))
    }

    fn step(&mut self, context: &Context) -> Done<()> {
        if self.level > LEVEL_LIMIT {
            return self.fail(context, "exceeded maximum template depth");
        }
        self.steps += 1;
        if self.steps > self.limits.steps {
            return self.fail(context, format!("more than {} steps", self.limits.steps));
        }
        if self.out.len() > self.limits.output {
            return self.fail(context, format!("more than {} bytes of output", self.limits.output));
        }
        Ok(())
    }

    fn walk(&mut self, dot: &Value<'a>, nodes: &'a [Node]) -> Done<Flow> {
        self.level += 1;
        let flow = self.nodes(dot, nodes);
        self.level -= 1;
        flow
    }

    fn nodes(&mut self, dot: &Value<'a>, nodes: &'a [Node]) -> Done<Flow> {
        for node in nodes {
            match node {
                Node::Text(text) => self.out.push_str(text),
                Node::Action(pipe) => {
                    let value = self.pipeline(dot, pipe)?;
                    if pipe.declares.is_empty() {
                        match &value {
                            Value::Str(text) => self.out.push_str(text.as_str()),
                            other => self.out.push_str(&format::print_value(other)),
                        }
                    }
                }
                Node::If(branch) => {
                    let flow = self.branch(dot, branch, false)?;
                    if !matches!(flow, Flow::Next) {
                        return Ok(flow);
                    }
                }
                Node::With(branch) => {
                    let flow = self.branch(dot, branch, true)?;
                    if !matches!(flow, Flow::Next) {
                        return Ok(flow);
                    }
                }
                Node::Range(branch) => {
                    let flow = self.range(dot, branch)?;
                    if !matches!(flow, Flow::Next) {
                        return Ok(flow);
                    }
                }
                Node::Template { name, pipe, context } => self.template(dot, name, pipe.as_ref(), context)?,
                Node::Break => return Ok(Flow::Break),
                Node::Continue => return Ok(Flow::Continue),
            }
        }
        Ok(Flow::Next)
    }

    fn branch(&mut self, dot: &Value<'a>, branch: &'a Branch, with: bool) -> Done<Flow> {
        let mark = self.variables.len();
        let mut branch = branch;
        let mut value = self.pipeline(dot, &branch.pipe)?;
        // `else if` and `else with` after each other take no stack, however many there are.
        while !value.truth() {
            match branch.otherwise.as_slice() {
                [Node::If(next)] if !with => branch = next,
                [Node::With(next)] if with => branch = next,
                _ => break,
            }
            value = self.pipeline(dot, &branch.pipe)?;
        }
        let flow = if !value.truth() {
            self.walk(dot, &branch.otherwise)?
        } else if with {
            self.walk(&value, &branch.then)?
        } else {
            self.walk(dot, &branch.then)?
        };
        self.variables.truncate(mark);
        Ok(flow)
    }

    fn range(&mut self, dot: &Value<'a>, branch: &'a Branch) -> Done<Flow> {
        let mark = self.variables.len();
        let pipe = &branch.pipe;
        let value = self.commands(dot, pipe)?;
        // With := the variables live for one turn, with = they are set from outside.
        if pipe.assigns {
            for name in &pipe.declares {
                self.assign(&pipe.context, name, value.clone())?;
            }
        } else {
            for name in &pipe.declares {
                self.variables.push((name, value.clone()));
            }
        }
        let inner = self.variables.len();
        let mut ran = false;
        let mut result = Flow::Next;
        let mut turn = |this: &mut Self, key: Option<Value<'a>>, item: Value<'a>| -> Done<bool> {
            this.step(&pipe.context)?;
            ran = true;
            match (pipe.declares.as_slice(), &key) {
                ([name], None) | ([name], Some(_)) => this.set(pipe, name, inner, 1, item.clone())?,
                ([first, second], Some(key)) => {
                    this.set(pipe, first, inner, 2, key.clone())?;
                    this.set(pipe, second, inner, 1, item.clone())?;
                }
                _ => {}
            }
            let flow = this.walk(&item, &branch.then)?;
            this.variables.truncate(inner);
            Ok(!matches!(flow, Flow::Break))
        };
        match &value {
            Value::Nil => {}
            Value::List(list) => {
                for (index, item) in list.iter().enumerate() {
                    if !turn(self, Some(Value::int(index as i64)), item)? {
                        break;
                    }
                }
            }
            Value::Map(map) => {
                for (key, item) in map.entries() {
                    if !turn(self, Some(Value::Str(Text::Shared(key))), item)? {
                        break;
                    }
                }
            }
            Value::Int(count, kind) => {
                if pipe.declares.len() > 1 {
                    let message = format!("can't use {count} to iterate over more than one variable");
                    return self.fail(&pipe.commands[0].context, message);
                }
                for index in 0..*count {
                    if !turn(self, None, Value::Int(index, kind))? {
                        break;
                    }
                }
            }
            Value::Typed(typed) if typed.nil => {}
            other => {
                let shown = format::sprint(other);
                return self.fail(
                    &pipe.commands[0].context,
                    format!("range can't iterate over {}", shown.chars().take(100).collect::<String>()),
                );
            }
        }
        if !ran {
            // The variables have the value of the whole here.
            self.variables.truncate(inner);
            result = self.walk(dot, &branch.otherwise)?;
        }
        self.variables.truncate(mark);
        Ok(result)
    }

    /// Sets a loop variable: the `back`th from the end of those declared before `inner`, or an outer one.
    fn set(&mut self, pipe: &Pipe, name: &str, inner: usize, back: usize, value: Value<'a>) -> Done<()> {
        if pipe.assigns {
            return self.assign(&pipe.context, name, value);
        }
        self.variables[inner - back].1 = value;
        Ok(())
    }

    fn assign(&mut self, context: &Context, name: &str, value: Value<'a>) -> Done<()> {
        let floor = self.floor;
        if let Some(slot) = self.variables[floor..].iter_mut().rev().find(|(known, _)| *known == name) {
            slot.1 = value;
            return Ok(());
        }
        self.fail(context, format!("undefined variable: {name}"))
    }

    fn template(&mut self, dot: &Value<'a>, name: &'a str, pipe: Option<&'a Pipe>, context: &'a Context) -> Done<()> {
        let Some(nodes) = self.trees.get(name) else {
            return self.fail(context, format!("template {name:?} not defined"));
        };
        if self.depth >= self.limits.depth {
            return self.fail(context, "exceeded maximum template depth");
        }
        let data = match pipe {
            Some(pipe) => self.pipeline(dot, pipe)?,
            None => Value::Nil,
        };
        self.step(context)?;
        let mark = self.variables.len();
        let floor = std::mem::replace(&mut self.floor, mark);
        let outer = std::mem::replace(&mut self.template, name);
        self.variables.push(("$", data.clone()));
        self.depth += 1;
        self.walk(&data, nodes)?;
        self.depth -= 1;
        self.variables.truncate(mark);
        self.floor = floor;
        self.template = outer;
        Ok(())
    }

    /// The pipeline's value; its variables are set.
    fn pipeline(&mut self, dot: &Value<'a>, pipe: &'a Pipe) -> Done<Value<'a>> {
        let value = self.commands(dot, pipe)?;
        for name in &pipe.declares {
            if pipe.assigns {
                self.assign(&pipe.context, name, value.clone())?;
            } else {
                self.variables.push((name, value.clone()));
            }
        }
        Ok(value)
    }

    fn commands(&mut self, dot: &Value<'a>, pipe: &'a Pipe) -> Done<Value<'a>> {
        self.step(&pipe.context)?;
        self.level += 1;
        let mut value = None;
        for command in &pipe.commands {
            value = Some(self.command(dot, command, value)?);
        }
        self.level -= 1;
        Ok(value.unwrap_or(Value::Nil))
    }

    fn command(&mut self, dot: &Value<'a>, command: &'a Command, last: Option<Value<'a>>) -> Done<Value<'a>> {
        let word = &command.words[0];
        let args = &command.words[1..];
        let has_args = !args.is_empty() || last.is_some();
        match &word.operand {
            Operand::Function(name, function) => {
                let given = args.len() + usize::from(last.is_some());
                if given < function.least || function.most.is_some_and(|most| given > most) {
                    let want = match function.most {
                        Some(_) => function.least.to_string(),
                        None => format!("at least {}", function.least),
                    };
                    return self
                        .fail(&word.context, format!("wrong number of args for {name}: want {want} got {given}"));
                }
                // and, or stop at the first argument that decides.
                if let decides @ ("and" | "or") = &**name {
                    let mut value = Value::Nil;
                    for arg in args {
                        value = self.argument(dot, arg)?;
                        if value.truth() == (decides == "or") {
                            return Ok(value);
                        }
                    }
                    return Ok(last.unwrap_or(value));
                }
                let mut values = Vec::with_capacity(given);
                let mut constants = 0;
                for (index, arg) in args.iter().enumerate() {
                    values.push(self.argument(dot, arg)?);
                    if index < 64 && matches!(arg.operand, Operand::Int(_) | Operand::Float(_)) {
                        constants |= 1 << index;
                    }
                }
                values.extend(last);
                let value = match (function.call)(Args::new(&values, constants)) {
                    Ok(value) => value,
                    Err(message) => {
                        return self.fail(&command.context, format!("error calling {name}: {message}"));
                    }
                };
                self.bounded(&command.context, &value)?;
                Ok(value)
            }
            Operand::Field(names) => self.method(dot, word, dot.clone(), names, (args, last)),
            Operand::Variable(name, names) => {
                let value = self.variable(&word.context, name)?;
                if names.is_empty() {
                    self.no_args(word, has_args)?;
                    return Ok(value);
                }
                self.method(dot, word, value, names, (args, last))
            }
            Operand::Chain(inner, names) => {
                let value = self.argument(dot, inner)?;
                self.method(dot, word, value, names, (args, last))
            }
            Operand::Nil => self.fail(&word.context, "nil is not a command"),
            _ => {
                self.no_args(word, has_args)?;
                self.argument(dot, word)
            }
        }
    }

    /// Fields after each other; the last may be a method that takes the arguments.
    fn method(
        &mut self,
        dot: &Value<'a>,
        word: &'a Word,
        value: Value<'a>,
        names: &'a [Box<str>],
        (args, last): (&'a [Word], Option<Value<'a>>),
    ) -> Done<Value<'a>> {
        let has_args = !args.is_empty() || last.is_some();
        let Some((name, before)) = names.split_last().filter(|_| has_args) else {
            return self.fields(&word.context, value, names, false);
        };
        let value = self.fields(&word.context, value, before, false)?;
        let Value::Version(version) = &value else { return self.field(&word.context, value, name, has_args) };
        let mut values = Vec::with_capacity(args.len() + 1);
        for arg in args {
            values.push(self.argument(dot, arg)?);
        }
        values.extend(last);
        match version.call(name, &values) {
            Some(value) => Ok(value),
            None => self.fail(&word.context, format!("can't evaluate field {name} in type *semver.Version")),
        }
    }

    fn no_args(&self, word: &Word, has_args: bool) -> Done<()> {
        if has_args {
            return self.fail(&word.context, format!("can't give argument to non-function {}", word.context.text));
        }
        Ok(())
    }

    /// What functions make may not grow beyond the output, and making it counts as steps.
    fn bounded(&mut self, context: &Context, value: &Value<'_>) -> Done<()> {
        if let Value::Str(text) = value {
            let size = text.as_str().len();
            if size > self.limits.output {
                return self.fail(context, format!("a value of more than {} bytes", self.limits.output));
            }
            self.steps += size / 1024;
            return Ok(());
        }
        match value.count(VALUE_DEPTH_LIMIT, self.limits.steps.saturating_sub(self.steps)) {
            Some(count) => self.steps += count - 1,
            None => return self.fail(context, "a value is too large or nested too deeply"),
        }
        Ok(())
    }

    fn argument(&mut self, dot: &Value<'a>, word: &'a Word) -> Done<Value<'a>> {
        Ok(match &word.operand {
            Operand::Dot => dot.clone(),
            Operand::Nil => Value::Nil,
            Operand::Bool(value) => Value::Bool(*value),
            Operand::Int(value) => Value::int(*value),
            Operand::Float(value) => Value::Float(*value),
            Operand::Complex(re, im) => Value::Complex(*re, *im),
            Operand::Overflow(text) => return self.fail(&word.context, format!("{text} overflows int")),
            Operand::Text(text) => Value::Str(Text::Borrowed(text)),
            Operand::Field(names) => self.fields(&word.context, dot.clone(), names, false)?,
            Operand::Variable(name, names) => {
                let value = self.variable(&word.context, name)?;
                self.fields(&word.context, value, names, false)?
            }
            Operand::Function(name, function) => {
                if function.least > 0 {
                    return self.fail(
                        &word.context,
                        format!("wrong number of args for {name}: want {} got 0", function.least),
                    );
                }
                match (function.call)(Args::new(&[], 0)) {
                    Ok(value) => value,
                    Err(message) => {
                        return self.fail(&word.context, format!("error calling {name}: {message}"));
                    }
                }
            }
            Operand::Pipe(pipe) => self.pipeline(dot, pipe)?,
            Operand::Chain(inner, names) => {
                if matches!(inner.operand, Operand::Nil) {
                    return self.fail(&word.context, "indirection through explicit nil");
                }
                let value = self.argument(dot, inner)?;
                self.fields(&word.context, value, names, false)?
            }
        })
    }

    fn variable(&self, context: &Context, name: &str) -> Done<Value<'a>> {
        match self.variables[self.floor..].iter().rev().find(|(known, _)| *known == name) {
            Some((_, value)) => Ok(value.clone()),
            None => self.fail(context, format!("undefined variable: {name}")),
        }
    }

    fn fields(
        &self,
        context: &Context,
        mut value: Value<'a>,
        names: &'a [Box<str>],
        has_args: bool,
    ) -> Done<Value<'a>> {
        for (index, name) in names.iter().enumerate() {
            let has_args = has_args && index + 1 == names.len();
            let mapped = matches!(value, Value::Map(_));
            let before = std::mem::replace(&mut value, Value::Nil);
            value = self.field(context, before.clone(), name, has_args)?;
            // Of a missing key there is no value, nor of what would be in it; null has no fields.
            if let (Value::Nil, true, Some(next)) = (&value, mapped, names.get(index + 1)) {
                let Value::Map(map) = &before else { continue };
                if map.get(name).is_none() {
                    return Ok(Value::Nil);
                }
                return self.fail(context, format!("nil pointer evaluating interface {{}}.{next}"));
            }
        }
        Ok(value)
    }

    fn field(&self, context: &Context, value: Value<'a>, name: &'a str, has_args: bool) -> Done<Value<'a>> {
        let no_args = |this: &Self| {
            if has_args {
                return this.fail(context, format!("{name} has arguments but cannot be invoked as function"));
            }
            Ok(())
        };
        match &value {
            // A missing key has no value, and neither has a key of it.
            Value::Nil => Ok(Value::Nil),
            Value::Map(map) => {
                no_args(self)?;
                Ok(map.get(name).unwrap_or(Value::Nil))
            }
            Value::Record(record) => match record.fields.iter().find(|(known, _)| *known == name) {
                Some((_, value)) => {
                    no_args(self)?;
                    Ok(value.clone())
                }
                None => self.fail(context, format!("can't evaluate field {name} in type {}", record.name)),
            },
            Value::Typed(typed) => {
                if let Some(value) = typed.ty.method(typed.data, typed.nil, name) {
                    return Ok(value);
                }
                if typed.nil {
                    return self.fail(context, format!("nil pointer evaluating *{}.{name}", typed.ty.name()));
                }
                match typed.ty.field(typed.data, name) {
                    Some(value) => {
                        no_args(self)?;
                        Ok(value)
                    }
                    None => self.fail(context, format!("can't evaluate field {name} in type {}", typed.ty.name())),
                }
            }
            Value::Enum(item) if name == "String" => Ok(Value::Str(Text::Shared(Rc::from(item.name)))),
            Value::Enum(item) if name == "Number" => Ok(Value::Int(i64::from(item.number), "int32")),
            Value::Version(version) => match version.call(name, &[]) {
                Some(value) => Ok(value),
                None => self.fail(context, format!("can't evaluate field {name} in type *semver.Version")),
            },
            Value::Time(seconds, _) if name == "Unix" => Ok(Value::Int(*seconds, "int64")),
            Value::Time(seconds, nanos) => match crate::time::part(*seconds, *nanos, name) {
                Some(value) => Ok(value),
                None => self.fail(context, format!("can't evaluate field {name} in type time.Time")),
            },
            other => {
                let holder = match other {
                    Value::Str(_) | Value::Bool(_) | Value::Float(_) | Value::List(_) => "interface {}".to_owned(),
                    other => other.type_name(),
                };
                self.fail(context, format!("can't evaluate field {name} in type {holder}"))
            }
        }
    }
}

/// The null that unset structs are views of.
pub static NULL: Json = Json::Null;
