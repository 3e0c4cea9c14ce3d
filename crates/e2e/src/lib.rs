//! What the end-to-end tests stand on: a mesh that ends with its test, and a browser's view of it.
//!
//! In: the built program (`OUTRIGGER_BIN`, else `target/release/outrigger`). Out: answers of a running mesh.
//! Never: crates of the product. These tests see what a user sees.

mod host;
mod http;
mod mesh;

pub use host::HostState;
pub use http::{Answer, Load, LoadReport, get};
pub use mesh::{Mesh, Output, envoy, outrigger, sample};

/// Whether this process may make network namespaces as root; says so visibly if not.
pub fn can_run_meshes(test: &str) -> bool {
    let id = std::process::Command::new("id").arg("-u").output();
    let root = id.is_ok_and(|output| output.stdout.trim_ascii() == b"0");
    if !root {
        println!("SKIPPED: {test}: a mesh in network namespaces needs root here");
    }
    root
}
