//! What flows in a running mesh, as its proxies saw it.
//!
//! In: the proxies' statistics and their last requests, from their admin ports. Out: who calls whom (`graph`), requests as they come
//! (`tap`), and a Sidecar that covers exactly what was seen (`sidecar generate`).
//! Never: decisions about traffic, or a change of the mesh.

mod fleet;
mod generate;
mod graph;
mod seen;
mod tap;

pub use generate::{Args as GenerateArgs, run as generate};
pub use graph::{Args as GraphArgs, run as graph};
pub use tap::{Args as TapArgs, run as tap};
