//! Pods injected with Istio's own templates run on our agent without change.

use std::path::{Path, PathBuf};

use e2e::{Output, can_run_meshes, outrigger};

/// The reference data's folder of configurations, or `None` after saying that there is none.
fn configurations() -> Option<PathBuf> {
    let root = std::env::var_os("OUTRIGGER_CONFORMANCE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"), PathBuf::from);
    let folder = root.join("inject/_config");
    if folder.is_dir() {
        return Some(folder);
    }
    println!("SKIPPED: Istio's templates: no reference data in {}", folder.display());
    None
}

#[test]
fn pods_injected_with_istios_templates_run() {
    let Some(folder) = configurations().filter(|_| can_run_meshes("pods_injected_with_istios_templates_run")) else {
        return;
    };
    // As Istio's charts render them, and those that Istio's own tests add templates to.
    for (index, (config, values)) in [
        ("inject-config-d521712c.yaml", "values-531e24e5.json"),
        ("inject-config-8172d953.yaml", "values-27b19f8b.json"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("e2e-templates-{index}");
        let publish = format!("productpage:9080={}", 19_190 + index);
        let mut up = outrigger();
        up.args(["up", "samples/bookinfo", "--check", "--name", &name, "--publish", &publish]);
        up.arg("--inject-config").arg(folder.join(config)).arg("--inject-values").arg(folder.join(values));
        let output = Output::of(&mut up);
        assert!(output.success, "{config}: {}", output.all());
        let last = output.stdout.lines().last().unwrap_or_default();
        assert!(last.starts_with("check passed"), "{config}: {}", output.all());
    }
}
