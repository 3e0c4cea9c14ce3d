//! Functions that templates call, in a table that users of the crate extend.

mod args;
mod builtin;
mod collections;
mod dates;
mod encoding;
mod lists;
mod numbers;
mod patterns;
mod random;
mod text;
mod versions;

use std::collections::HashMap;
use std::sync::Arc;

pub use args::Args;
pub use versions::Version;

use crate::Value;

/// What a function returns; the error is what comes after `error calling NAME: `.
pub type Outcome<'a> = Result<Value<'a>, String>;

/// A function that templates can call.
pub struct Function {
    /// How many arguments it takes at least.
    pub least: usize,
    /// How many at most; `None` for a variadic function.
    pub most: Option<usize>,
    /// The function. It checks the types of its arguments through [`Args`].
    pub call: Call,
}

/// The code of a function.
pub type Call = for<'a, 'b> fn(Args<'a, 'b>) -> Outcome<'a>;

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Function({}..{:?})", self.least, self.most)
    }
}

/// Functions by name.
#[derive(Clone, Debug, Default)]
pub struct Functions {
    table: HashMap<&'static str, Arc<Function>>,
}

impl Functions {
    /// Those that Go's `text/template` defines.
    pub fn builtin() -> Self {
        let mut functions = Self::default();
        builtin::define(&mut functions);
        functions
    }

    /// Go's and those of sprig's `TxtFuncMap`, which replace Go's of the same name.
    ///
    /// DIFFERS: sprig's functions that make keys, certificates or hashes of passwords fail when they are
    /// called.
    pub fn sprig() -> Self {
        let mut functions = Self::builtin();
        text::define(&mut functions);
        lists::define(&mut functions);
        collections::define(&mut functions);
        numbers::define(&mut functions);
        encoding::define(&mut functions);
        patterns::define(&mut functions);
        versions::define(&mut functions);
        dates::define(&mut functions);
        random::define(&mut functions);
        functions
    }

    /// Adds or replaces a function of `least` to `most` arguments.
    pub fn define(&mut self, name: &'static str, least: usize, most: Option<usize>, call: Call) {
        self.table.insert(name, Arc::new(Function { least, most, call }));
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Function>> {
        self.table.get(name)
    }
}
