//! Pod in, patched pod out, and the admission webhook around it.
//!
//! In: a pod, its owner and namespace, a [`Config`] of templates, values and mesh configuration.
//! Out: the pod with its sidecar, or the rule that left it alone.
//! Never: an API server, sockets, clocks. [`run`] reads and writes files, nothing else here does.
//!
//! ```text
//! pod ─► decision ─► annotations ─► templates ─► strategic merge ─► user's overlay ─► post-processing ─► pod
//! ```

mod annotations;
mod cli;
mod config;

mod decision;
mod duration;
mod functions;
mod images;
mod merge;
mod mesh;
mod overlay;
mod owner;
mod patch;
mod pipeline;
mod pod;
mod probes;
mod prometheus;
mod rendered;
mod schema;
mod status;
pub mod webhook;
mod workload;
mod yaml;

pub use annotations::{InvalidAnnotation, check_annotation};
pub use cli::{Args, CheckArgs, ConfigArgs, InjectArgs, RenderArgs, ReviewArgs, render, run, run_inject};
pub use config::{Builtin, Config, ConfigError, Files, NativeSidecars, Texts};
pub use decision::{Decision, NamespaceMeta, Policy, Rule, selected};
pub use owner::Owner;
pub use pipeline::{InjectError, Outcome, ProxyConfigs, Request, inject};
pub use workload::{Document, WorkloadError, inject_text};
pub use yaml::emit as to_yaml;
