use crate::shell::{command, must};

/// The crates with fuzz targets: tests in a module `fuzz`.
const PACKAGES: [&str; 5] = ["agent", "http2", "inject", "proxy", "proxy-core"];

/// Runs the fuzz targets, each for so long, as many at a time as there are processors. The build is the tests' own.
/// Without a seed each run looks elsewhere.
pub(crate) fn run(seconds: u64, only: Option<&str>, seed: Option<u64>) -> anyhow::Result<()> {
    let filter = format!("fuzz::{}", only.unwrap_or_default());
    let mut cargo = command("cargo");
    cargo.args(["test", "--locked", "--lib", "--test=it"]);
    cargo.args(PACKAGES.map(|package| format!("--package={package}")));
    cargo.args(["--", &filter, "--show-output"]).env("FUZZ_SECONDS", seconds.to_string());
    if let Some(seed) = seed {
        cargo.env("FUZZ_SEED", seed.to_string());
    }
    must(&mut cargo)
}
