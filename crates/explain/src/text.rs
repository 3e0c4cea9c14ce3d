//! The explanation for people.

use std::fmt::Write;

use crate::trace::{Explanation, Side, Step};

/// Whether colours are wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Paint {
    Plain,
    Colour,
}

const LABEL: usize = 15;

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }

    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    fn bad(self, text: &str) -> String {
        self.with("31", text)
    }
}

/// Renders it.
pub(crate) fn render(explanation: &Explanation, paint: Paint) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", paint.bold(&explanation.request));
    if !explanation.from.is_empty() {
        let _ = writeln!(out, "from {}", explanation.from);
    }
    for side in &explanation.sides {
        render_side(&mut out, side, paint);
    }
    let outcome = &explanation.outcome;
    let (mark, summary) = match outcome.delivered {
        true => (paint.good("✔"), paint.bold(&outcome.summary)),
        false => (paint.bad("✘"), paint.bold(&outcome.summary)),
    };
    let _ = writeln!(out, "\n{mark} {summary}");
    let mut logged = Vec::new();
    logged.extend(outcome.status.map(|status| status.to_string()));
    logged.extend(outcome.flag.clone());
    if !outcome.details.is_empty() {
        logged.push(outcome.details.clone());
    }
    if !outcome.delivered && !logged.is_empty() {
        let _ = writeln!(out, "  {}", paint.dim(&format!("access log: {}", logged.join(" "))));
    }
    out
}

fn render_side(out: &mut String, side: &Side, paint: Paint) {
    let title = match side.role {
        "client" => format!("At the client, {}", side.proxy),
        "server" => format!("At the server, {}", side.proxy),
        _ => side.proxy.clone(),
    };
    let _ = writeln!(out, "\n{}", paint.bold(&title));
    for step in &side.steps {
        render_step(out, step, paint);
    }
}

fn render_step(out: &mut String, step: &Step, paint: Paint) {
    let answer = if step.ends { paint.bad(&step.answer) } else { step.answer.clone() };
    let _ = writeln!(out, "  {:LABEL$}{answer}", step.decides);
    let indent = " ".repeat(LABEL + 2);
    for source in &step.sources {
        let _ = writeln!(out, "{indent}{}", paint.dim(&format!("← {source}")));
    }
    for passed in &step.passed_over {
        let from = passed.source.as_ref().map(|source| format!("  ← {source}")).unwrap_or_default();
        let wants = if passed.why.is_empty() { String::new() } else { format!(", which wants {}", passed.why) };
        let _ = writeln!(out, "{indent}not {}{wants}{}", passed.what, paint.dim(&from));
    }
    for fact in &step.facts {
        let _ = writeln!(out, "{indent}{fact}");
    }
}
