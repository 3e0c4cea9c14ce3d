use std::fmt;

/// Something about a resource that istiod's validation would refuse, or warn about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Violation {
    /// The field from the resource's root, like `spec.http[0].route[1].destination.host`.
    pub path: String,
    /// What is wrong: lower case, no full stop.
    pub message: String,
    /// Whether the resource cannot be used because of it.
    pub severity: Severity,
}

/// What becomes of the resource.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Severity {
    /// It is used all the same.
    Warning,
    /// It is left out.
    Error,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}
