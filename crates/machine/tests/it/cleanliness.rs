//! What a mesh leaves of itself on the machine: nothing.

use std::collections::BTreeSet;
use std::process::Command;

use crate::mesh::{Mesh, out, outrigger};

const YAML: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec:
  replicas: 2
  selector: {}
  template:
    metadata: {labels: {app: a}}
    spec:
      containers:
      - {name: c, image: any, command: [sh, -c, "sleep 77777 & exec sleep 77777"], volumeMounts: [{name: v, mountPath: /v}]}
      volumes: [{name: v, emptyDir: {}}]
"#;

/// Everything of the machine that a mesh could change.
#[derive(Debug, PartialEq)]
struct Picture {
    links: String,
    routes: String,
    rules: String,
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

fn run(program: &str, args: &[&str]) -> String {
    out(&Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}")))
}

fn picture() -> Picture {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let cgroups = run("find", &["/sys/fs/cgroup", "-type", "d"]);
    // Counters of live links and the like do not matter; names, addresses and states do.
    Picture {
        links: run("ip", &["-j", "address"]),
        routes: run("ip", &["-j", "route", "show", "table", "all"]) + &run("ip", &["-j", "rule"]),
        rules: run("nft", &["-j", "-s", "list", "ruleset"]),
        mounts: mounts.lines().map(str::to_owned).collect(),
        cgroups: cgroups.lines().map(str::to_owned).collect(),
        namespaces: run("ip", &["netns", "list"]).lines().map(str::to_owned).collect(),
    }
}

fn sleepers() -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        count += usize::from(String::from_utf8_lossy(&line).contains("77777"));
    }
    count
}

pub(crate) fn down_leaves_nothing() {
    let before = picture();
    let mesh = Mesh::start("t-clean", YAML, &[]);
    mesh.says("all 2 pods ready");
    assert!(sleepers() >= 4);
    assert_eq!(picture().links, before.links, "not even a running mesh shows on the host");
    assert!(out(&outrigger(&["down", "--name", "t-clean"])).contains("ended"));
    assert_eq!(sleepers(), 0);
    assert_eq!(picture(), before);
    assert!(!std::path::Path::new("/run/outrigger/t-clean").exists());
}

pub(crate) fn sigkill_leaves_nothing_but_a_folder() {
    let before = picture();
    let mut mesh = Mesh::start("t-kill", YAML, &[]);
    mesh.says("all 2 pods ready");
    mesh.up.kill().unwrap();
    mesh.up.wait().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(sleepers(), 0, "the kernel ended the containers");
    assert!(std::path::Path::new("/run/outrigger/t-kill").exists());
    assert!(out(&outrigger(&["down", "--name", "t-kill"])).contains("left behind is removed"));
    assert!(!std::path::Path::new("/run/outrigger/t-kill").exists());
    assert_eq!(picture(), before);
}

pub(crate) fn two_names_at_once() {
    let one = Mesh::start("t-one", YAML, &[]);
    let two = Mesh::start("t-two", YAML, &[]);
    one.says("all 2 pods ready");
    two.says("all 2 pods ready");
    assert!(out(&outrigger(&["down", "--name", "t-one"])).contains("ended"));
    assert!(two.exec("a", "true").status.success(), "the other one runs on");
}

pub(crate) fn detached_until_down() {
    let before = picture();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mesh.yaml");
    std::fs::write(&file, YAML).unwrap();
    let up = outrigger(&["up", file.to_str().unwrap(), "--name", "t-detach", "--no-default-injection", "--detach"]);
    let text = String::from_utf8_lossy(&up.stderr).into_owned();
    assert!(up.status.success() && text.contains("all 2 pods ready") && text.contains("in the background"), "{text}");
    assert!(out(&outrigger(&["ps", "--name", "t-detach"])).matches("1/1").count() == 2);
    assert!(out(&outrigger(&["down", "--name", "t-detach"])).contains("ended"));
    assert_eq!(sleepers(), 0);
    assert_eq!(picture(), before);
}
