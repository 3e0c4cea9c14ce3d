//! What `up` tells while it works: one line per step, with the time since the start.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Writes progress to standard error. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Progress {
    inner: Arc<Inner>,
}

struct Inner {
    began: Instant,
    colour: bool,
    /// While a live table is shown, lines are kept for it instead (the newest last).
    held: Mutex<Option<Vec<String>>>,
}

/// Lines that a live table shows below itself.
const HELD_MAX: usize = 6;

impl Progress {
    pub(crate) fn new() -> Self {
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { inner: Arc::new(Inner { began: Instant::now(), colour, held: Mutex::new(None) }) }
    }

    /// Time since `up` was called.
    pub(crate) fn elapsed(&self) -> Duration {
        self.inner.began.elapsed()
    }

    /// Something went as it should.
    pub(crate) fn step(&self, text: &str) {
        self.line("", text);
    }

    /// Something needs the user's attention; the rest goes on.
    pub(crate) fn warn(&self, text: &str) {
        let mark = if self.inner.colour { "\x1b[33mwarning:\x1b[0m " } else { "warning: " };
        self.line(mark, text);
    }

    fn line(&self, mark: &str, text: &str) {
        let line = format!("{:6.2}s  {mark}{text}", self.elapsed().as_secs_f64());
        let mut held = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *held {
            Some(lines) => {
                lines.push(line);
                let surplus = lines.len().saturating_sub(HELD_MAX);
                lines.drain(..surplus);
            }
            None => {
                // A closed terminal is no reason to stop the mesh.
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }

    /// From now on lines are kept for the live table.
    pub(crate) fn hold(&self) {
        let mut held = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get_or_insert_with(Vec::new);
    }

    /// The lines kept.
    pub(crate) fn held(&self) -> Vec<String> {
        self.inner.held.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }

    /// Ends the live table: lines are printed again.
    pub(crate) fn release(&self) {
        *self.inner.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
