//! The explanation as data: sides, steps, reasons, and the places they come from.

use std::fmt;

use serde::Serialize;

/// Where a request goes, and why.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The request in one line.
    pub request: String,
    /// Who sends it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub from: String,
    /// The proxies it passes, in order.
    pub sides: Vec<Side>,
    /// What becomes of it.
    pub outcome: Outcome,
}

/// What becomes of a request.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// It reaches an application, or leaves the mesh.
    pub delivered: bool,
    /// The status that a proxy answers instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Envoy's response flag for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flag: Option<String>,
    /// Envoy's `response_code_details`, or why the connection is closed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
    /// In one sentence.
    pub summary: String,
}

/// One proxy's part.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Side {
    /// `client` or `server`.
    pub role: &'static str,
    /// `NAME.NAMESPACE` of its pod.
    pub proxy: String,
    /// Names that its access log will show.
    pub logged: Logged,
    /// Its decisions, in order.
    pub steps: Vec<Step>,
}

/// The names by which a proxy's access log tells what it did; those that it did not get to are left out.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Logged {
    /// The listener.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub listener: String,
    /// The filter chain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub filter_chain: String,
    /// The virtual host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub virtual_host: String,
    /// `%ROUTE_NAME%`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub route: String,
    /// `%UPSTREAM_CLUSTER_RAW%`; where chance decides, one that it may be.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// Where chance decides: all that it may be.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub clusters: Vec<String>,
}

/// One decision.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// What was decided: `listener`, `route`, …
    pub decides: &'static str,
    /// What came out.
    pub answer: String,
    /// More about it, one fact each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<String>,
    /// What was looked at before and did not apply.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<PassedOver>,
    /// Where it is written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
    /// The step ends the way: refused, not found.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ends: bool,
}

/// A candidate that did not apply.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PassedOver {
    /// Which.
    pub what: String,
    /// The first condition that does not hold, and what is there instead.
    pub why: String,
    /// Where it is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// A place in the configuration.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Source {
    /// `VirtualService default/reviews`.
    pub object: String,
    /// `spec.http[1]`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// `file:line`, if it was read from files.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub place: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        if !self.place.is_empty() {
            write!(f, ", {}", self.place)?;
        }
        Ok(())
    }
}

impl Step {
    /// A decision and its outcome.
    pub fn new(decides: &'static str, answer: impl Into<String>) -> Self {
        Self { decides, answer: answer.into(), ..Self::default() }
    }

    /// With one more fact.
    pub fn fact(mut self, fact: impl Into<String>) -> Self {
        self.facts.push(fact.into());
        self
    }

    /// With the place it is from, if there is one.
    pub fn source(mut self, source: Option<Source>) -> Self {
        self.sources.extend(source);
        self
    }

    /// As the end of the way.
    pub fn end(mut self) -> Self {
        self.ends = true;
        self
    }
}
