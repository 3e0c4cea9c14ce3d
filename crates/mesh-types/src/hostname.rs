use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A DNS name as Istio's configuration uses it: lower case, no trailing dot, possibly `*` or
/// starting with `*.`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Hostname(Arc<str>);

/// Text that is no host name.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("{text:?} is not a host name: {reason}")]
pub struct InvalidHostname {
    /// The text as it was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Hostname {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the name is `*` or starts with `*.`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with('*')
    }

    /// Whether the two names have a host in common (istiod `host.Name.Matches`).
    pub fn matches(&self, other: &Hostname) -> bool {
        match (self.is_wildcard(), other.is_wildcard()) {
            (true, true) => {
                let (a, b) = (&self.0[1..], &other.0[1..]);
                a.ends_with(b) || b.ends_with(a)
            }
            (true, false) => other.0.ends_with(&self.0[1..]),
            (false, true) => self.0.ends_with(&other.0[1..]),
            (false, false) => self == other,
        }
    }

    /// Whether every host of `other` is one of ours (istiod `host.Name.SubsetOf`, seen from the other side).
    pub fn contains(&self, other: &Hostname) -> bool {
        match (self.is_wildcard(), other.is_wildcard()) {
            (true, true) => other.0.len() >= self.0.len() && other.0[1..].ends_with(&self.0[1..]),
            (true, false) => other.0.ends_with(&self.0[1..]),
            (false, true) => false,
            (false, false) => self == other,
        }
    }
}

impl FromStr for Hostname {
    type Err = InvalidHostname;

    fn from_str(text: &str) -> Result<Self, InvalidHostname> {
        let invalid = |reason| InvalidHostname { text: text.to_owned(), reason };
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.is_empty() {
            return Err(invalid("it is empty"));
        }
        if name.len() > 255 {
            return Err(invalid("it is longer than 255 characters"));
        }
        let rest = name.strip_prefix("*.").unwrap_or(if name == "*" { "" } else { name });
        for label in rest.split('.').filter(|_| !rest.is_empty()) {
            if label.is_empty() {
                return Err(invalid("it has an empty label"));
            }
            if label.len() > 63 {
                return Err(invalid("a label is longer than 63 characters"));
            }
            if label.contains('*') {
                return Err(invalid("`*` may only stand alone as the first label"));
            }
            if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(invalid("labels consist of letters, digits, `-` and `_`"));
            }
        }
        Ok(Hostname(name.to_ascii_lowercase().into()))
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Hostname {
        text.parse().unwrap()
    }

    #[test]
    fn wildcards_match_by_suffix() {
        assert!(host("*.example.com").matches(&host("a.example.com")));
        assert!(!host("*.example.com").matches(&host("example.com")));
        assert!(host("*").matches(&host("anything")));
        assert!(host("*.com").matches(&host("*.example.com")));
        assert!(host("*.com").contains(&host("*.example.com")));
        assert!(!host("*.example.com").contains(&host("*.com")));
    }

    #[test]
    fn refuses_what_is_no_name() {
        for text in ["", ".", "a..b", "a.*.b", "a b", "a*.com", &"x".repeat(64)] {
            assert!(text.parse::<Hostname>().is_err(), "{text:?}");
        }
        assert_eq!(host("Reviews.Default.").as_str(), "reviews.default");
    }
}
