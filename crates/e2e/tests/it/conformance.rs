//! The reference data's own checker as judge of injection, admission, templates and capture.

use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{Output, can_run_meshes, outrigger};

/// The checker, or `None` after saying that there is none.
fn checker() -> Option<PathBuf> {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"), PathBuf::from);
    let script = root.join("check.py");
    if script.is_file() {
        return Some(script);
    }
    println!("SKIPPED: no checker at {}; set OUTRIGGER_CONFORMANCE", script.display());
    None
}

/// Every case of these groups passes, and there were some.
fn passes(groups: &[&str]) {
    let Some(script) = checker() else { return };
    let output =
        Output::of(Command::new("python3").arg(script).args(groups).arg("--tool").arg(outrigger().get_program()));
    let last = output.stdout.lines().last().unwrap_or_default();
    println!("{groups:?}: {last}");
    assert!(output.success && last.contains(" passed, 0 failed, "), "{}", output.all());
    assert!(!last.starts_with("0 passed"), "{groups:?}: no case was found");
}

#[test]
fn captured_as_by_the_reference() {
    // Rules are applied in namespaces of their own.
    if can_run_meshes("captured_as_by_the_reference") {
        passes(&["capture"]);
    }
}

#[test]
fn injected_as_by_the_reference() {
    passes(&["inject", "inject-cli", "admission", "templates"]);
}
