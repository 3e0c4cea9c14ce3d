//! `xds generate` for every case of a conformance folder: `generate CASES OUT`.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [cases, out] = args.as_slice() else { return Err("usage: generate CASES OUT".into()) };
    for case in std::fs::read_dir(cases)? {
        let case = case?.path();
        let optional = |name: &str| Some(case.join(name)).filter(|p| p.exists());
        let args = xds_gen::Args {
            input: vec![case.join("input.yaml")],
            mesh_config: optional("mesh.yaml"),
            settings: optional("settings.yaml"),
            proxy: case.join("proxy.yaml"),
            output: out.join(case.file_name().unwrap_or_default()),
        };
        if let Err(error) = xds_gen::run(&args) {
            eprintln!("{}: {error}: {:?}", case.display(), std::error::Error::source(&error).map(|s| s.to_string()));
        }
    }
    Ok(())
}
