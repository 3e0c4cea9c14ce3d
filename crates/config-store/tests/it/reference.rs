//! The inputs of the reference xDS cases must load as they loaded into the real istiod.

use std::fs;
use std::path::{Path, PathBuf};

use config_store::{Kind, Store};
use istio_api::MeshConfig;

fn cases() -> Option<PathBuf> {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"));
    let cases = root.join("xds/cases");
    if cases.is_dir() {
        return Some(cases);
    }
    println!("SKIPPED: no reference data at {}; set OUTRIGGER_CONFORMANCE", cases.display());
    None
}

#[test]
fn every_reference_input_loads_without_a_reject() {
    let Some(cases) = cases() else { return };
    let mut problems = Vec::new();
    let mut count = 0;
    for case in fs::read_dir(cases).unwrap().map(|entry| entry.unwrap().path()) {
        count += 1;
        let mut store = Store::new();
        let (documents, errors) = manifest::read(&[case.join("input.yaml")]);
        problems.extend(errors.iter().map(ToString::to_string));
        for document in &documents {
            if let Err(error) = store.apply(document) {
                problems.push(error.to_string());
            }
        }
        let stored: usize = Kind::ALL.iter().map(|kind| store.snapshot().len(*kind)).sum();
        assert!(stored > 0, "{} stored nothing", case.display());
        let mesh = case.join("mesh.yaml");
        if mesh.exists()
            && let Err(error) = MeshConfig::load(&mesh, &fs::read_to_string(&mesh).unwrap())
        {
            problems.push(error.to_string());
        }
    }
    assert!(count > 0);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
