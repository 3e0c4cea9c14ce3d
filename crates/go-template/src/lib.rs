//! Go's `text/template`, with the functions that injection templates use.
//!
//! In: template text, a table of functions, borrowed data ([`Value`]).  Out: text.
//! Never: files, the network (but for sprig's `getHostByName`), Kubernetes or Istio; those add their functions and types from outside.
//!
//! ```
//! use go_template::{Functions, Limits, Template, Value};
//! let template = Template::parse("greeting", "hello {{ .name | upper }}", &Functions::sprig())?;
//! let data = serde_json::json!({"name": "mesh"});
//! assert_eq!(template.render(Value::from_json(&data), Limits::default())?, "hello MESH");
//! # Ok::<(), go_template::Error>(())
//! ```

mod exec;
pub mod format;
pub mod functions;
pub mod json;
mod lex;
mod parse;
mod time;
mod value;

pub use exec::NULL;
pub use functions::{Args, Functions, Outcome};
pub use lex::Delimiters;
pub use value::{Element, Enum, List, Map, Record, Text, Type, Typed, Value};

/// A template that cannot be parsed or run. The text is Go's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Found when the template is loaded.
    #[error("template: {template}:{line}: {message}")]
    Parse { template: String, line: u32, message: String },
    /// Found when it runs over data.
    #[error("template: {template}:{line}:{column}: executing {running:?} at <{text}>: {message}")]
    Run { template: String, line: u32, column: u32, running: String, text: String, message: String },
}

/// Bounds of one rendering: templates are the user's, but the machine is shared.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of output and of any one value.
    pub output: usize,
    /// Templates that call templates.
    pub depth: usize,
    /// Pipelines evaluated and loop turns.
    pub steps: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { output: 4 << 20, depth: 64, steps: 2_000_000 }
    }
}

/// A parsed template with the templates that it defines.
#[derive(Debug)]
pub struct Template {
    name: Box<str>,
    trees: parse::Trees,
    /// Calls functions that change dictionaries, those of the data too.
    changes: bool,
}

impl Template {
    /// Parses `source`, whose actions stand in `{{ }}`.
    ///
    /// # Errors
    /// Bad syntax, unbalanced blocks, unknown functions, undeclared variables.
    pub fn parse(name: &str, source: &str, functions: &Functions) -> Result<Self, Error> {
        Self::parse_with(name, source, Delimiters::default(), functions)
    }

    /// As [`Self::parse`] with other delimiters, such as the `[[ ]]` of old configurations.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_with(
        name: &str,
        source: &str,
        delimiters: Delimiters<'_>,
        functions: &Functions,
    ) -> Result<Self, Error> {
        let (trees, changes) = parse::parse(name, source, delimiters, functions)
            .map_err(|(line, message)| Error::Parse { template: name.to_owned(), line, message })?;
        Ok(Self { name: name.into(), trees, changes })
    }

    /// Runs the template over `data`.
    ///
    /// # Errors
    /// What Go's `Execute` fails for, and a limit that is exceeded.
    pub fn render<'a>(&'a self, data: Value<'a>, limits: Limits) -> Result<String, Error> {
        let data = if self.changes { data.changeable() } else { data };
        exec::Executor::run(&self.trees, &self.name, data, limits).map_err(|failure| Error::Run {
            template: self.name.to_string(),
            line: failure.line,
            column: failure.column,
            running: failure.template,
            text: failure.text,
            message: failure.message,
        })
    }
}
