//! How the program is linked.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A third of what a start touches would be the table of relocations; packed, it is a hundredth. The C library must know the
    // format, which it does from 2.36 on.
    let native = std::env::var("HOST").ok() == std::env::var("TARGET").ok();
    let version = Command::new("getconf").arg("GNU_LIBC_VERSION").output().map(|out| out.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    let minor = version.trim().strip_prefix("glibc 2.").and_then(|minor| minor.parse::<u32>().ok());
    if native && minor.is_some_and(|minor| minor >= 36) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
