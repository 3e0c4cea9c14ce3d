use crate::shell::{command, root};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// Checks the house rules that a script can see; every breach is named.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut breaches = Vec::new();
    for manifest in manifests()? {
        let text = std::fs::read_to_string(&manifest)?;
        if !text.contains("[lints]\nworkspace = true") {
            breaches.push(format!("{}: does not inherit the workspace's lints", relative(&manifest)));
        }
    }
    for file in tracked_files()? {
        // Binary files have no lines to look at.
        let Ok(text) = std::fs::read_to_string(root().join(&file)) else { continue };
        for (number, line) in text.lines().enumerate() {
            // Tests have clocks, and stand at the end of their file.
            if line.starts_with("#[cfg(test)]") && pure(&file) {
                break;
            }
            if let Some(breach) = breach(&file, line) {
                breaches.push(format!("{file}:{}: {breach}", number + 1));
            }
        }
    }
    if !breaches.is_empty() {
        bail!("house rules broken:\n  {}", breaches.join("\n  "));
    }
    println!("tidy: house rules hold");
    Ok(())
}

fn breach(file: &str, line: &str) -> Option<&'static str> {
    // This file spells out what it forbids.
    if file == "crates/xtask/src/tidy.rs" {
        return None;
    }
    let rust = file.ends_with(".rs");
    if rust && line.trim_start().starts_with("#[ignore") {
        return Some("a test is ignored: fix it, or assert today's result with a FIXME");
    }
    if rust && line.contains("allow(dead_code") {
        return Some("dead code is deleted, not allowed");
    }
    if line.contains("/work/") && !line.contains("://") {
        return Some("a path of one machine");
    }
    if rust && pure(file) {
        let code = line.split("//").next().unwrap_or_default();
        if code.contains("Instant::now") || code.contains("SystemTime::now") || code.contains("env::var") {
            return Some("a pure crate reads a clock or the environment");
        }
    }
    None
}

/// Invariant 1 of ARCHITECTURE.md: what decides reads no clock and no environment.
fn pure(file: &str) -> bool {
    let folders = ["crates/xds-gen/src", "crates/push-context/src", "crates/proxy-core/src"];
    folders.iter().any(|folder| file.starts_with(folder)) && !file.ends_with("tests.rs")
}

fn manifests() -> anyhow::Result<Vec<PathBuf>> {
    let crates = std::fs::read_dir(root().join("crates"))?;
    crates
        .map(|entry| Ok(entry?.path().join("Cargo.toml")))
        .filter(|path| path.as_ref().map_or(true, |p| p.exists()))
        .collect()
}

fn tracked_files() -> anyhow::Result<Vec<String>> {
    let output = command("git").args(["ls-files"]).output().context("cannot run git")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}
