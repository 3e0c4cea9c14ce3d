//! A one-machine cluster: pods as network namespaces, containers as processes, services, DNS, probes, and the control plane inside.
//!
//! In: Kubernetes and Istio YAML, and commands over a control socket. Out: running pods, a control plane that knows them, published ports.
//! Never: anything in the host's network namespace, mount table, nftables or cgroups; knowledge of xDS or of the proxy.
//!
//! ```text
//!  YAML ─► load ─► objects ─► workload ─► cluster ─┬─► pod ─► container (re-exec of this program)
//!                                                  ├─► network: bridge, rules, DNS, outside, published ports
//!                                                  └─► plane: control plane, CA, injection
//! ```

mod args;
mod ask;
mod check;
mod client;
mod clock;
mod cluster;
mod container;
mod control;
mod detach;
mod folder;
mod live;
mod load;
mod logs;
mod metrics;
mod needs;
mod network;
mod objects;
mod plane;
mod pod;
mod progress;
mod rootless;
mod services;
mod up;
mod watch;
mod workload;

pub use args::{
    ApplyArgs, ConfigureArgs, DeleteArgs, DownArgs, ExecArgs, LogsArgs, Mesh, PsArgs, RotateRootArgs, RunJobArgs,
    UpArgs,
};
pub use ask::{Distribution, Objects, ProxySync, Wanted, ask_admin, ask_proxy, distribution, objects};
pub use client::{
    apply, configure_workload, delete, down, exec, kind_name, logs, pod_process, ps, rotate_root, run_job,
};
pub use container::init::container_init;
pub use metrics::{Sample, parse as parse_sample};
pub use network::publish::Publish;
pub use up::up;

/// Name of the one node that all pods are on.
pub(crate) const NODE_NAME: &str = "outrigger";
