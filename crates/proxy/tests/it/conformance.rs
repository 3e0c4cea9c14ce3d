//! Envoy's recorded behaviour: conformance/proxy/behave.py drives this proxy through its cases.

use std::path::{Path, PathBuf};
use std::process::Command;

fn reference() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let base = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| workspace.join("../shared/conformance"), PathBuf::from);
    base.join("proxy")
}

/// Cargo builds examples beside the tests: TARGET/debug/deps/it-… and TARGET/debug/examples/proxy.
fn binary() -> PathBuf {
    let own = std::env::current_exe().expect("a running test has a path");
    own.ancestors().nth(2).expect("tests run from TARGET/PROFILE/deps").join("examples/proxy")
}

#[test]
fn behaves_as_envoy() {
    behaves_as_recorded(&reference().join("cases"));
}

/// Cases of our own, recorded with Envoy in the same way.
#[test]
fn behaves_as_envoy_in_more_cases() {
    behaves_as_recorded(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases"));
}

fn behaves_as_recorded(cases: &Path) {
    let reference = reference();
    let script = reference.join("behave.py");
    if !script.exists() {
        eprintln!("SKIPPED: no reference data at {}", reference.display());
        return;
    }
    let python = Command::new("python3").args(["-c", "import h2, yaml"]).output();
    if !python.is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED: python3 with h2 and pyyaml is needed (pip install h2 pyyaml)");
        return;
    }
    let command = format!("{} -c {{bootstrap}} --concurrency 1", binary().display());
    let output = Command::new("python3")
        .arg(&script)
        .arg(cases)
        .args(["--proxy", &command, "--jobs", "2", "--diffs", "2", "--retry", "2"])
        .output()
        .expect("python3 runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    println!("{last}");
    let differing: Vec<&str> = text.lines().filter(|line| !line.starts_with("ok ")).collect();
    assert!(last.ends_with(" passed, 0 failed"), "{}", differing.join("\n"));
}
