use crate::shell::{build_folder, command, must, root, show};
use crate::{fuzz, setup, tidy};
use anyhow::{Context, bail};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

/// Sums of libtest's result lines, and what said that it could not run.
#[derive(Default)]
struct Count {
    passed: u32,
    failed: u32,
    skipped: Vec<String>,
}

/// Where random tests start. Always the same here: what fails is then due to the change that is tested. `cargo xtask fuzz`
/// looks elsewhere each time.
const SEED: u64 = 1;

/// Set-up, then every check in turn; the last line is a plain count.
pub(crate) fn run() -> anyhow::Result<()> {
    setup::run()?;
    must(command("cargo").args(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    must(command("cargo").args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    // Advisories need a database from outside; CI has none.
    must(command(setup::deny()).args(["--log-level", "error", "check", "licenses", "bans", "sources"]))?;
    // End-to-end tests run the program as users do: optimised.
    must(command("cargo").args(["build", "--release", "--locked", "--package", "cli"]))?;
    let count = cargo_test()?;
    let summary = format!("\n{} passed, {} failed, {} skipped", count.passed, count.failed, count.skipped.len());
    println!("{summary}");
    if count.failed > 0 {
        bail!("{} tests failed", count.failed);
    }
    // Every parser for a minute, as many at a time as there are processors.
    fuzz::run(60, None, Some(SEED))?;
    println!("{summary}");
    Ok(())
}

fn cargo_test() -> anyhow::Result<Count> {
    let mut cargo = command("cargo");
    cargo
        .args(["test", "--workspace", "--locked", "--no-fail-fast", "--", "--show-output"])
        .env("OUTRIGGER_BIN", root().join("target/release/outrigger"))
        .env("OUTRIGGER_BUILD", build_folder())
        .env("PROPTEST_RNG_SEED", SEED.to_string())
        .env("PATH", path_with_python()?)
        .stdout(Stdio::piped());
    println!("$ {}", show(&cargo));
    let mut child = cargo.spawn().context("cannot run cargo")?;
    let output = child.stdout.take().context("cargo's output is piped")?;
    let mut count = Count::default();
    // Output of passing tests is only searched for skips; that of failing ones is shown.
    let mut quiet = false;
    for line in BufReader::new(output).lines() {
        let line = line?;
        match line.as_str() {
            "successes:" => quiet = true,
            "failures:" => quiet = false,
            _ => {}
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            quiet = false;
            count.passed += number_before(result, " passed");
            count.failed += number_before(result, " failed");
        }
        if line.starts_with("SKIPPED") {
            println!("{line}");
            count.skipped.push(line);
        } else if !quiet && !line.starts_with("running 0 tests") && !line.is_empty() {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    if !status.success() && count.failed == 0 {
        bail!("cargo test failed before a test did: {status}");
    }
    Ok(count)
}

/// Checkers and peers written in Python find their packages first.
fn path_with_python() -> anyhow::Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(setup::python_bin())
        .chain(std::env::split_paths(&path))
        .chain(["/usr/sbin".into(), "/sbin".into()]);
    Ok(std::env::join_paths(folders)?)
}

fn number_before(text: &str, word: &str) -> u32 {
    let before = text.split(word).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_libtest_lines() {
        let line = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!((number_before(line, " passed"), number_before(line, " failed")), (12, 3));
    }
}
