use crate::shell::{command, must, root, show};
use anyhow::{Context, bail};
use std::path::PathBuf;
use std::process::Stdio;

/// Runs the load generator, an example of the crate `control-plane`, against the program.
pub(crate) fn run(program: Option<PathBuf>) -> anyhow::Result<()> {
    let program = super::program(program)?;
    must(
        command("cargo")
            .args(["run", "--release", "--locked", "--package", "control-plane", "--example", "load", "--"])
            .arg(program),
    )?;
    generation()
}

/// istiod's own benchmarks with its cache off: microseconds for the listeners, clusters and routes of one proxy, as recorded in
/// the reference's `bench/generation`.
const ISTIOD: [(&str, [Option<u32>; 3]); 7] = [
    ("http", [Some(132), Some(2053), Some(679)]),
    ("tcp", [Some(711), Some(2020), None]),
    ("auto", [Some(2284), Some(1964), Some(2274)]),
    ("virtualservice", [Some(126), Some(1374), Some(1703)]),
    ("telemetry-api", [Some(2200), Some(5056), Some(1461)]),
    ("serviceentry-workloadentry", [Some(1770), Some(7092), Some(1118)]),
    ("authorizationpolicy", [Some(1385), None, None]),
];

/// Generation without any cache, by the example `speed` of the crate `xds-gen`, on the inputs of those benchmarks.
fn generation() -> anyhow::Result<()> {
    let inputs = root().join("../shared/bench/generation");
    if !inputs.is_dir() {
        println!("SKIPPED: generation, as the reference's inputs are not there");
        return Ok(());
    }
    let mut cargo = command("cargo");
    cargo.args(["run", "--quiet", "--release", "--locked", "--package", "xds-gen", "--example", "speed", "--"]);
    cargo.args(ISTIOD.map(|(case, _)| inputs.join(format!("{case}.yaml"))));
    let out = cargo.stderr(Stdio::inherit()).output()?;
    if !out.status.success() {
        bail!("`{}` failed: {}", show(&cargo), out.status);
    }
    println!("\ngeneration, µs for one proxy, ours : istiod's (asked: at least 5 times its speed)");
    println!(
        "`proxy`: its scope, services and classes, once while it is connected; istiod's figures leave out the like"
    );
    println!("{:<28} {:>24} {:>24} {:>24} {:>8}", "", "listeners", "clusters", "routes", "proxy");
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((case, istiod)) = ISTIOD.iter().find(|(case, _)| words.first() == Some(case)) else { continue };
        let ours = |of: &str| -> anyhow::Result<u32> {
            let at = words.iter().position(|word| *word == of).with_context(|| format!("no {of} in: {line}"))?;
            words.get(at + 1).and_then(|word| word.parse().ok()).with_context(|| line.to_owned())
        };
        print!("{case:<28}");
        for (of, istiod) in ["listeners", "clusters", "routes"].iter().zip(istiod) {
            let ours = ours(of)?;
            match istiod {
                Some(istiod) => {
                    let times = f64::from(*istiod) / f64::from(ours.max(1));
                    print!(" {:>24}", format!("{ours} : {istiod} = {times:.1} x"));
                }
                None => print!(" {ours:>24}"),
            }
        }
        println!(" {:>8}", ours("proxy")?);
    }
    Ok(())
}
