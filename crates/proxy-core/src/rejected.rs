use std::fmt::Display;

/// A configuration that is not accepted: which resource, where in it, and why.
///
/// This is what a NACK says. The last good version of the resource stays in use.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{resource}: {field}: {reason}")]
pub struct Rejected {
    /// Kind and name of the resource, for instance `listener virtualInbound`.
    pub resource: String,
    /// Proto path of the field, for instance `filter_chains[2].filters[0]`. Empty: the resource itself.
    pub field: String,
    /// What is wrong with it, lower case, no full stop.
    pub reason: String,
}

/// Outcome of compiling one resource.
pub type Result<T> = std::result::Result<T, Rejected>;

/// A [`Rejected`] that does not know its resource yet; the path grows while it travels outwards.
#[derive(Clone, Debug)]
pub(crate) struct Invalid {
    field: String,
    reason: String,
}

/// Outcome of compiling a part of a resource.
pub(crate) type Compiled<T> = std::result::Result<T, Invalid>;

impl Invalid {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// A field whose meaning is not implemented. Refused, because ignoring it would change behaviour silently.
    pub(crate) fn unsupported(field: impl Into<String>) -> Self {
        Self::new(field, "is not supported")
    }

    pub(crate) fn is(&self, reason: &str) -> bool {
        self.reason == reason
    }

    pub(crate) fn of(self, kind: &str, name: &str) -> Rejected {
        Rejected { resource: format!("{kind} {name}"), field: self.field, reason: self.reason }
    }
}

/// Adds an outer path element to an error on its way out.
pub(crate) trait At<T> {
    fn at(self, field: &str) -> Compiled<T>;
    fn at_index(self, field: &str, index: usize) -> Compiled<T>;
    fn at_key(self, field: &str, key: &str) -> Compiled<T>;
}

impl<T> At<T> for Compiled<T> {
    fn at(self, field: &str) -> Compiled<T> {
        self.map_err(|invalid| prefixed(field, invalid))
    }

    fn at_index(self, field: &str, index: usize) -> Compiled<T> {
        self.map_err(|invalid| prefixed(format_args!("{field}[{index}]"), invalid))
    }

    fn at_key(self, field: &str, key: &str) -> Compiled<T> {
        self.map_err(|invalid| prefixed(format_args!("{field}[{key:?}]"), invalid))
    }
}

fn prefixed(outer: impl Display, invalid: Invalid) -> Invalid {
    let field = match invalid.field.as_str() {
        "" => outer.to_string(),
        inner => format!("{outer}.{inner}"),
    };
    Invalid { field, reason: invalid.reason }
}

/// Refuses fields that are set but not implemented: `refuse!(self.name: condition, …)`.
macro_rules! refuse {
    ($($field:literal: $set:expr),+ $(,)?) => {
        $(if $set {
            return Err(crate::rejected::Invalid::unsupported($field));
        })+
    };
}
pub(crate) use refuse;
