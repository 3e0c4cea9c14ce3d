//! The eBPF programs: the object in the repository, and what is left of them in a cgroup.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::undo::{calls, kill_at};
use crate::world::new_cgroup;
use crate::{cannot_load_programs, pod, tool};

/// The version of clang whose output is in the repository. Others make other instructions of the same source.
const VERSION: &str = "14.0.6";
const COMPILE: &str = "clang -target bpf -O2 -g -Wall -Wextra -Werror -fdebug-compilation-dir=. -c outbound.c -o \"$OUT\" && \
    llvm-objcopy --strip-debug --remove-section=.BTF.ext --remove-section=.rel.BTF.ext --remove-section=.llvm_addrsig \"$OUT\"";

/// Programs, maps and licence: the sections whose names do not depend on the compiler.
fn sections(object: &Path) -> Vec<String> {
    let out = Command::new("llvm-objdump").arg("-h").arg(object).output().expect("llvm-objdump");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    let lasting = |name: &&str| ["cgroup/", "sockops", ".maps", "license"].iter().any(|start| name.starts_with(start));
    names.filter(lasting).map(str::to_owned).collect()
}

#[test]
fn the_object_is_what_clang_makes_of_the_source() {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !["clang", "llvm-objcopy", "llvm-objdump"].into_iter().all(has) {
        println!("SKIPPED: needs clang and llvm");
        return;
    }
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("ebpf");
    let scratch = tempfile::tempdir().expect("folder");
    let made = scratch.path().join("outbound.o");
    let status = Command::new("sh").args(["-c", COMPILE]).env("OUT", &made).current_dir(&folder).status().expect("sh");
    assert!(status.success(), "outbound.c does not compile");
    let kept = folder.join("outbound.o");
    let version = Command::new("clang").arg("--version").output().expect("clang").stdout;
    let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().to_owned();
    if !version.contains(VERSION) {
        println!("SKIPPED in part: {version} is not {VERSION}, so only the sections are compared");
        assert_eq!(sections(&made), sections(&kept));
        return;
    }
    let bytes = std::fs::read(&made).expect("object");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&kept, &bytes).expect("write");
    }
    assert!(bytes == std::fs::read(&kept).expect("object"), "outbound.o is not made of outbound.c: UPDATE=1 writes it");
    assert_eq!(sections(&kept).len(), 12);
}

const FLAGS: [&str; 6] = ["--native-nftables", "-i", "*", "-b", "*", "--redirect-dns"];

#[test]
fn programs_stay_are_replaced_and_go() {
    if cannot_load_programs() {
        return;
    }
    let (Some(ns), Some(cgroup)) = (pod(&["10.244.0.7/24"]), new_cgroup()) else { return };
    let path = cgroup.display().to_string();
    let with = |extra: &[&'static str]| {
        let flags = [&FLAGS[..], extra, &["--capture-all-dns", "--ebpf-cgroup", &path]].concat();
        let out = tool(&ns, &flags, &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    let attached = || attached(&cgroup);
    assert_eq!(attached(), Vec::<u32>::new());
    with(&[]);
    let first = attached();
    assert_eq!(first.len(), 10);
    with(&[]);
    assert_eq!(attached(), first, "the same flags change nothing");
    with(&["-o", "25"]);
    let second = attached();
    assert!(second.len() == 10 && second.iter().all(|id| !first.contains(id)), "other flags replace each program");

    // Killed before each program is attached, and run again, it is whole.
    let clean = || {
        let out = tool(&ns, &["--cleanup-only", "--ebpf-cgroup", &path], &[]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(attached(), Vec::<u32>::new());
    };
    clean();
    let flags = [&FLAGS[..], &["--capture-all-dns", "--ebpf-cgroup", &path]].concat();
    let Some(steps) = calls(&ns, &flags, "bpf", "BPF_PROG_ATTACH") else { return };
    assert_eq!(steps.len(), 10);
    for (before, step) in steps.into_iter().enumerate() {
        clean();
        kill_at(&ns, &flags, "bpf", step);
        assert_eq!(attached().len(), before);
        with(&[]);
        assert_eq!(attached().len(), 10);
    }
    let out = tool(&ns, &["--cleanup-only"], &[]);
    assert!(out.status.success());
    let out = tool(&ns, &["--cleanup-only", "--ebpf-cgroup", &path], &[]);
    assert!(out.status.success());
    assert_eq!(attached(), Vec::<u32>::new());

    let out = tool(&ns, &["--ebpf-cgroup", "/proc", "-i", "*"], &[]);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("--ebpf-cgroup /proc: not a cgroup (v2)"), "{text}");
    std::fs::remove_dir(&cgroup).expect("remove");
}

fn attached(cgroup: &Path) -> Vec<u32> {
    capture::attached_programs(cgroup).expect("query")
}
