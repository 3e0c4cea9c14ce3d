//! How the program is linked: as one file that needs no other, at addresses that change with every start.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Libraries that Rust asks the linker for, and the archives that hold them.
const LIBRARIES: [(&str, &str); 7] = [
    ("c", "c"),
    ("m", "m"),
    ("dl", "dl"),
    ("rt", "rt"),
    ("util", "util"),
    ("pthread", "pthread"),
    // What unwinds the stack.
    ("gcc_s", "gcc_eh"),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("HOST").ok() != std::env::var("TARGET").ok() {
        return;
    }
    // A third of what a start touches would be the table of relocations; packed, it is a hundredth. The C library must know the
    // format, which it does from 2.36 on.
    let version = said_by("getconf", "GNU_LIBC_VERSION");
    let minor = version.strip_prefix("glibc 2.").and_then(|minor| minor.parse::<u32>().ok());
    if minor.is_none_or(|minor| minor < 36) {
        return;
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    let Some(out) = std::env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    if stand_ins(&out) {
        // For this program alone: as a search path of cargo's it would be every documentation test's, too.
        println!("cargo:rustc-link-arg-bins=-L{}", out.display());
        println!("cargo:rustc-link-arg-bins=-static-pie");
    }
}

/// Leads the linker, which is asked for shared libraries, to the archives instead; false where these are not installed, and the
/// program is linked as usual. Rust's own way (`-C target-feature=+crt-static`) can be had for whole builds only, in which it
/// makes procedural macros impossible.
fn stand_ins(out: &Path) -> bool {
    // The compiler repeats the name of what it does not find.
    let found = |name: String| said_by("cc", &format!("-print-file-name={name}")) != name;
    let archives = LIBRARIES.map(|(_, archive)| format!("lib{archive}.a"));
    if !found("rcrt1.o".to_owned()) || !archives.iter().cloned().all(found) {
        return false;
    }
    LIBRARIES.iter().zip(archives).all(|((name, _), archive)| {
        std::fs::write(out.join(format!("lib{name}.so")), format!("INPUT ( -l:{archive} )\n")).is_ok()
    })
}

fn said_by(program: &str, argument: &str) -> String {
    let said = Command::new(program).arg(argument).output().map(|out| out.stdout).unwrap_or_default();
    String::from_utf8_lossy(&said).trim().to_owned()
}
