use std::fmt::Write;

use explain::Source;
use serde::Serialize;

/// How bad it is; the worst sorts first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Requests fail, or will.
    Problem,
    /// Something does not do what it seems to.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which check found it.
    pub check: &'static str,
    /// In one sentence.
    pub what: String,
    /// Where it is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// A command, or lines of YAML and where they go.
    pub mend: String,
}

impl Finding {
    pub(crate) fn problem(check: &'static str, what: String, mend: String) -> Self {
        Self { severity: Severity::Problem, check, what, source: None, mend }
    }

    pub(crate) fn warning(check: &'static str, what: String, mend: String) -> Self {
        Self { severity: Severity::Warning, ..Self::problem(check, what, mend) }
    }

    pub(crate) fn at(mut self, source: Source) -> Self {
        self.source = Some(source);
        self
    }
}

/// All of them for people.
pub(crate) fn text(findings: &[Finding], colour: bool) -> String {
    let painted = |code: &str, text: &str| match colour {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    };
    let mut out = String::new();
    for finding in findings {
        let mark = match finding.severity {
            Severity::Problem => painted("31", "✘"),
            Severity::Warning => painted("33", "!"),
        };
        let _ = writeln!(out, "{mark} {}", finding.what);
        if let Some(source) = &finding.source {
            let mut place = source.object.clone();
            for part in [&source.field, &source.place] {
                if !part.is_empty() {
                    let _ = write!(place, ", {part}");
                }
            }
            let _ = writeln!(out, "  {}", painted("2", &format!("← {place}")));
        }
        for line in finding.mend.lines() {
            let _ = writeln!(out, "  {line}");
        }
        out.push('\n');
    }
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let (problems, warnings) = (count(Severity::Problem), count(Severity::Warning));
    match (problems, warnings) {
        (0, 0) => out.push_str("nothing is wrong\n"),
        _ => out.push_str(&format!("{problems} problems, {warnings} warnings\n")),
    }
    out
}
