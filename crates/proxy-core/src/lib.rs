//! Everything the proxy decides: tables from configuration, matching, balancing, retries, RBAC.
//!
//! In: Envoy v3 messages (from `envoy-api`), request headers, connection facts, `now` and random numbers.
//! Out: immutable tables ([`Listener`], [`RouteTable`], [`Cluster`], …), decisions over them with their
//! reasons, and [`Rejected`] naming whatever is not understood.
//! Never: sockets, files, threads, clocks, the environment, randomness of its own.
//!
//! ```text
//! Bootstrap/Listener/RouteConfiguration/Cluster/ClusterLoadAssignment ──compile──► tables (Arc, immutable)
//! connection ─► Listener::find_chain ─► HttpConnectionManager ─► RouteTable::find ─► Matched ─► Cluster
//!                                                                  Cluster ─► LoadBalancer::pick ─► Host
//! ```

// Control planes still send fields that Envoy calls deprecated, so they must be read.
#![allow(deprecated)]

mod address;
mod any;
mod cidr;
mod constraints;
mod fields;
mod headers;
mod metadata;
mod pb;
mod percent;
mod random;
mod rejected;
mod text;

pub mod access_log;
pub mod balance;
pub mod bootstrap;
pub mod cel;
pub mod circuit;
pub mod cluster;
pub mod collector;
pub mod config_source;
pub mod endpoints;
pub mod filters;
pub mod format;
pub mod hash;
pub mod hcm;
pub mod health_check;
pub mod listener;
pub mod match_tree;
pub mod matchers;
pub mod outlier;
pub mod overload;
pub mod rbac;
pub mod retry;
pub mod route;
pub mod rules;
pub mod runtime;
pub mod stream_info;
pub mod tls;
pub mod tlv;
pub mod trace;

pub use access_log::AccessLog;
pub use address::Address;
pub use balance::{LoadBalancer, PickContext};
pub use bootstrap::Bootstrap;
pub use cidr::Cidr;
pub use cluster::Cluster;
pub use endpoints::{Endpoints, Host};
pub use format::{Format, FormatContext};
pub use hcm::HttpConnectionManager;
pub use headers::{Headers, WrittenNames};
pub use listener::{FilterChain, Listener, ListenerSet};
pub use mesh_types::ArcStr;
pub use metadata::{FilterState, Metadata, MetadataMatch, object as json_object};
pub use percent::Fraction;
pub use random::{Jittered, Random};
pub use rbac::Rbac;
pub use rejected::{Rejected, Result};
pub use retry::RetryState;
pub use route::RouteTable;
pub use runtime::Runtime;
pub use stream_info::{ConnectionInfo, ResponseFlags, StreamInfo, TlsInfo};

/// What compilation may assume about the process.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Accept filters that are not understood (Lua, Wasm, …) and leave them out. They are named in the
    /// filter list as [`filters::HttpFilter::NoOp`], so that a dump still shows them.
    pub allow_unsupported_filters: bool,
    /// This machine's own address, which `x-forwarded-for` gets for clients on the loopback interface.
    pub local_address: Option<std::net::IpAddr>,
    /// `--service-node`, for `add_user_agent` and formats.
    pub node_id: String,
    /// `--service-cluster`.
    pub node_cluster: String,
    /// Where keys beside defaults are looked up.
    pub runtime: Runtime,
    /// Who takes the spans of connection managers that name nobody.
    pub tracing: Option<hcm::TracingProvider>,
}
