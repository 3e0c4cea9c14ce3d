//! Real Envoy over ADS, state of the world and delta: what it refuses, we may not send.

mod changes;
mod process;
mod secrets;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use control_plane::{Settings, Update};
use istio_api::MeshConfig;
use netns::{Netlink, Netns};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::mesh::Mesh;
use process::{Envoy, MODES};
use secrets::Secrets;

/// Where Envoy is, or nothing and one visible line.
fn program(test: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let build = std::env::var_os("OUTRIGGER_BUILD").map_or_else(|| "build".into(), PathBuf::from);
    let found = std::fs::canonicalize(root.join(build).join("envoy")).ok().filter(|path| path.is_file());
    if found.is_none() {
        println!("SKIPPED: {test}: no Envoy; `cargo xtask setup` installs it");
    }
    found
}

/// A network of one's own, where every address is a local one; nothing and one visible line where that is not allowed.
fn network(test: &str) -> Option<Netns> {
    let made = Netns::create().inspect(|ns| {
        Netlink::open_in(ns).and_then(|mut link| link.loopback_up()).unwrap();
        netns::write_sysctl(ns, "net.ipv4.ip_nonlocal_bind", "1").unwrap();
        // Absent where IPv6 is off.
        let _ = netns::write_sysctl(ns, "net.ipv6.ip_nonlocal_bind", "1");
    });
    if let Err(error) = &made {
        println!("SKIPPED: {test}: no network namespace: {error}");
    }
    made.ok()
}

/// Runs a test's async part on this thread, which is in a network of its own.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The node that a proxy.yaml describes, as Envoy sends it, with the stock profile.
fn node(proxy: &Value) -> Value {
    let text = |key: &str, default: &str| proxy[key].as_str().unwrap_or(default).to_owned();
    let (name, namespace) = (text("name", ""), text("namespace", "default"));
    let ips: Vec<&str> = proxy["ips"].as_array().unwrap().iter().map(|ip| ip.as_str().unwrap()).collect();
    let mut metadata = json!({
        "NAME": name, "NAMESPACE": namespace, "INSTANCE_IPS": ips.join(","), "CLUSTER_ID": "Kubernetes",
        "INTERCEPTION_MODE": "REDIRECT", "SERVICE_ACCOUNT": text("serviceAccount", "default"), "LABELS": proxy["labels"],
    });
    for (key, value) in proxy["metadata"].as_object().into_iter().flatten() {
        metadata[key] = value.clone();
    }
    metadata["PROFILE"] = "stock".into();
    let mut locality = proxy["locality"].as_str().unwrap_or_default().split('/');
    let mut part = || locality.next().unwrap_or_default();
    json!({
        "id": format!("sidecar~{}~{name}.{namespace}~{namespace}.svc.cluster.local", ips[0]),
        "cluster": format!("{name}.{namespace}"),
        "locality": {"region": part(), "zone": part(), "sub_zone": part()},
        "metadata": metadata,
    })
}

/// What went wrong with one reference case.
async fn case_problems(program: &Path, case: &Path) -> Vec<String> {
    let read = |name: &str| std::fs::read_to_string(case.join(name)).unwrap_or_default();
    let settings = read("settings.yaml");
    let mut push = push_context::Settings { dual_stack: settings.contains("dualStack: true"), ..Default::default() };
    for (name, value) in settings.lines().filter_map(|line| line.trim().split_once(": ")) {
        push.set_env(name, value.trim_matches('"'));
    }
    let mesh = MeshConfig::load(&case.join("mesh.yaml"), &read("mesh.yaml")).unwrap();
    let mesh = Mesh::with(Settings { mesh, push, ..Settings::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    // Folders of sockets that a pod would have mounted.
    let sockets = folder.path().join("run");
    let input = read("input.yaml").replace("unix:///var/run", &format!("unix://{}", sockets.display()));
    let named = input.split("unix://").skip(1).filter_map(|rest| rest.split(['"', '\'', '\n']).next());
    for parent in named.filter_map(|path| Path::new(path.trim()).parent()).filter(|path| path.starts_with(&sockets)) {
        std::fs::create_dir_all(parent).unwrap();
    }
    let documents = manifest::parse(&case.join("input.yaml"), &input).unwrap();
    // Cases hold objects that istiod refuses, too.
    mesh.handle.update(documents.into_iter().map(|document| Update::Apply(Box::new(document))).collect()).await;

    let secrets = Secrets::serve(folder.path()).await;
    let proxies = manifest::parse_plain(&case.join("proxy.yaml"), &read("proxy.yaml")).unwrap();
    let mut problems = Vec::new();
    for (number, proxy) in proxies.iter().enumerate() {
        let envoys = MODES.map(|mode| {
            let folder = folder.path().join(format!("{number}-{mode}"));
            Envoy::start(program, &folder, mode, node(&proxy.value), mesh.grpc, &secrets)
        });
        for envoy in &envoys {
            problems
                .extend(envoy.initial_problems().await.into_iter().map(|problem| format!("{}: {problem}", envoy.mode)));
        }
    }
    for status in mesh.handle.sync_status() {
        problems.extend(status.refusals().map(|(type_url, error)| format!("NACK of {type_url}: {error}")));
    }
    problems
}

#[test]
fn envoy_accepts_every_case_over_ads() {
    const TEST: &str = "envoy_accepts_every_case_over_ads";
    let Some(program) = program(TEST) else { return };
    let root = match std::env::var_os("OUTRIGGER_CONFORMANCE") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance"),
    };
    // Those of the generators, and those of request simulation, which have the same form.
    let folders = ["xds/cases", "simulation/data"].map(|folder| root.join(folder));
    let entries = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let mut cases: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    if cases.is_empty() {
        println!("SKIPPED: {TEST}: no reference cases; set OUTRIGGER_CONFORMANCE");
        return;
    }
    cases.sort();
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || {
        let Some(network) = network(TEST) else { return };
        network.enter().unwrap();
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = block_on(case_problems(&program, case));
            let name = case.file_name().unwrap().to_string_lossy().into_owned();
            problems.lock().unwrap().extend(found.into_iter().map(|problem| format!("{name}: {problem}")));
        }
    };
    std::thread::scope(|scope| {
        let workers = [(); 4].map(|()| scope.spawn(worker));
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    let problems = problems.into_inner().unwrap();
    assert!(problems.is_empty(), "{}:\n{}", problems.len(), problems.join("\n"));
}

/// Looks again and again, for at most `patience`.
async fn until(patience: Duration, mut condition: impl AsyncFnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition().await {
        if start.elapsed() > patience {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}
