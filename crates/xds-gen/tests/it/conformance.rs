//! The reference cases: what a real istiod sends for a small input.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use config_store::{Snapshot, Store};
use envoy_api::type_url;
use istio_api::MeshConfig;
use push_context::{Node, PushContext, Settings};
use xds_gen::{Names, generate};

/// Share of resources that must equal istiod's, in percent.
const REQUIRED: &str = "100";

pub(crate) fn cases() -> Option<PathBuf> {
    let folder = match std::env::var_os("OUTRIGGER_CONFORMANCE") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"),
    };
    let cases = folder.join("xds/cases");
    if cases.is_dir() {
        return Some(cases);
    }
    println!("SKIPPED: no reference cases at {}; set OUTRIGGER_CONFORMANCE", cases.display());
    None
}

pub(crate) fn each_case(cases: &Path) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> =
        std::fs::read_dir(cases).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    out.sort();
    out
}

pub(crate) fn documents(case: &Path) -> Vec<manifest::Document> {
    let (documents, errors) = manifest::read(&[case.join("input.yaml")]);
    assert!(errors.is_empty(), "{errors:?}");
    documents
}

pub(crate) fn snapshot(case: &Path) -> Snapshot {
    let mut store = Store::new();
    for document in &documents(case) {
        // Cases hold objects that istiod refuses too.
        let _ = store.apply(document);
    }
    store.snapshot()
}

/// Context and proxies of a case.
pub(crate) fn load(case: &Path) -> (PushContext, Vec<Node>) {
    let read = |name: &str| std::fs::read_to_string(case.join(name)).unwrap_or_default();
    let mesh = MeshConfig::load(&case.join("mesh.yaml"), &read("mesh.yaml")).unwrap();
    let dual_stack = read("settings.yaml").contains("dualStack: true");
    let settings = Settings { dual_stack, ..Settings::default() };
    let push = PushContext::build(&snapshot(case), &Arc::new(mesh), &settings);
    let file = case.join("proxy.yaml");
    let documents = manifest::parse_plain(&file, &read("proxy.yaml")).unwrap();
    let nodes = documents.iter().map(|d| Node::from_yaml(&d.value, &settings).unwrap()).collect();
    (push, nodes)
}

#[test]
fn resources_equal_istiods() {
    let Some(cases) = cases() else { return };
    let out = tempfile::tempdir().unwrap();
    for case in each_case(&cases) {
        let optional = |name: &str| Some(case.join(name)).filter(|p| p.exists());
        let args = xds_gen::Args {
            input: vec![case.join("input.yaml")],
            mesh_config: optional("mesh.yaml"),
            mesh_networks: None,
            settings: optional("settings.yaml"),
            proxy: case.join("proxy.yaml"),
            output: out.path().join(case.file_name().unwrap()),
        };
        xds_gen::run(&args).unwrap_or_else(|e| panic!("{}: {e}", case.display()));
    }
    let compare = cases.parent().unwrap().join("compare.py");
    let result = Command::new("python3")
        .arg(compare)
        .args([&cases, out.path()])
        .args(["--show", "5", "--require", REQUIRED])
        .output()
        .expect("python3 is needed to compare with the reference cases");
    let text = String::from_utf8_lossy(&result.stdout);
    println!("{}", text.lines().last().unwrap_or_default());
    assert!(result.status.success(), "{text}");
}

#[test]
fn equal_input_gives_equal_bytes() {
    let Some(cases) = cases() else { return };
    let all = [type_url::CLUSTER, type_url::LISTENER, type_url::ROUTE, type_url::ENDPOINT, type_url::NAME_TABLE];
    for case in each_case(&cases) {
        let ((first, nodes), (second, _)) = (load(&case), load(&case));
        for (node, type_url) in nodes.iter().flat_map(|n| all.map(|t| (n, t))) {
            let of = |push: &PushContext| generate(push, node, type_url, Names::Wildcard);
            assert_eq!(of(&first), of(&second), "{} {type_url}", case.display());
        }
    }
}
