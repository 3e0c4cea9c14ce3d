use crate::shell::{command, must, root};
use std::path::PathBuf;

/// Runs the load generator, an example of the crate `control-plane`, against the program.
pub(crate) fn run(program: Option<PathBuf>) -> anyhow::Result<()> {
    let program = match program {
        Some(program) => std::path::absolute(program)?,
        None => {
            must(command("cargo").args(["build", "--release", "--locked", "--package", "cli"]))?;
            root().join("target/release/outrigger")
        }
    };
    must(
        command("cargo")
            .args(["run", "--release", "--locked", "--package", "control-plane", "--example", "load", "--"])
            .arg(program),
    )
}
