//! Writes what is generated for each case of a folder of reference cases, to be compared with `compare.py`.
//!
//! `cargo run -p xds-gen --example generate -- CASES OUT`

use std::path::{Path, PathBuf};

fn generate(case: &Path, out: &Path) -> Result<(), xds_gen::Error> {
    let optional = |name: &str| Some(case.join(name)).filter(|p| p.exists());
    let args = xds_gen::Args {
        input: vec![case.join("input.yaml")],
        mesh_config: optional("mesh.yaml"),
        mesh_networks: optional("networks.yaml"),
        settings: optional("settings.yaml"),
        proxy: case.join("proxy.yaml"),
        output: out.join(case.file_name().unwrap_or_default()),
    };
    xds_gen::run(&args)
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [cases, out] = arguments.as_slice() else {
        eprintln!("usage: generate CASES OUT");
        std::process::exit(2);
    };
    let mut folders: Vec<PathBuf> = std::fs::read_dir(cases)?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    folders.sort();
    for case in folders.iter().filter(|p| p.join("input.yaml").exists()) {
        eprintln!("== {}", case.display());
        if let Err(error) = generate(case, out) {
            eprintln!("FAIL {}: {error}", case.display());
        }
    }
    Ok(())
}
