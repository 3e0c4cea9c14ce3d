use crate::shell::{build_folder, command, must};
use std::path::PathBuf;

/// Runs the scenario of `samples/sidecar/unix-sockets.yaml`, whose test prints what a request takes over either way.
pub(crate) fn run(program: Option<PathBuf>) -> anyhow::Result<()> {
    let program = super::program(program)?;
    must(
        command("cargo")
            .args(["test", "--quiet", "--package", "e2e", "--test", "it", "--", "unix_sockets::", "--nocapture"])
            // One mesh at a time: they would take each other's processor time.
            .arg("--test-threads=1")
            .env("OUTRIGGER_BIN", program)
            .env("OUTRIGGER_BUILD", build_folder()),
    )
}
