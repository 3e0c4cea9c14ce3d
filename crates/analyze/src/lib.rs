//! Faults of a mesh's configuration that the validation of single objects cannot see, with istioctl's message codes.
//!
//! In: manifests, from files, from a Kubernetes API server or from both, and MeshConfig. Out: [`Message`]s that name the
//! object and its line, sorted as `istioctl analyze` sorts them. What concerns gateways only is left out.
//! Never in [`analyze`]: I/O, clocks, what a proxy would be sent.

mod args;
mod checks;
mod message;
mod world;

pub use args::{AnalyzeArgs, run};
pub use message::{Level, Message, Subject};

use istio_api::MeshConfig;
use manifest::Document;

/// Everything that is wrong with these objects taken together. Objects without a namespace are of `namespace`.
pub fn analyze(documents: &[Document], mesh: &MeshConfig, namespace: &str) -> Vec<Message> {
    analyze_some(documents, mesh, namespace, |_| true)
}

/// As [`analyze`], with the chosen checks only.
fn analyze_some(
    documents: &[Document],
    mesh: &MeshConfig,
    namespace: &str,
    chosen: impl Fn(&str) -> bool,
) -> Vec<Message> {
    let world = world::World::new(documents, mesh, namespace);
    let mut found = Vec::new();
    for (_, check) in checks::ALL.iter().filter(|(name, _)| chosen(name)) {
        check(&world, &mut found);
    }
    found.retain(|message| !world.is_suppressed(message));
    message::sort(&mut found);
    found
}
