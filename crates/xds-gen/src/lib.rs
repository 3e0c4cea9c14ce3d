//! Turns a [`PushContext`] and one proxy's identity into Envoy resources.
//!
//! In: `&PushContext`, `&Node`. Out: encoded listeners, routes, clusters, endpoints, name tables
//! ([`Resource`]). Never: I/O (but for [`run`], the command), clocks, locks, environment variables, gRPC.
//! Same input, same bytes.
//!
//! Names and decisions follow istiod's `pilot/pkg/networking/core`; where we differ on purpose it says `DIFFERS:`.

mod access_log;
mod args;
mod authz;
mod cache;
mod client;
mod cluster;
mod conflict;
mod context;
mod endpoint;
mod envoy_filter;
mod filters;
mod grpc;
mod jwt;
mod kept;
mod listener;
mod name_table;
mod names;
mod notes;
mod proto;
mod route;
mod telemetry;
mod tls;
mod trace_provider;
mod wasm;

use std::sync::Arc;

use envoy_api::{Resource, type_url};
use mesh_types::ArcStr;
use push_context::{Node, PushContext};

use client::Client;
use context::Context;
use envoy_filter::Patches;

pub use args::{Args, Error, run};
pub use conflict::{Conflict, conflicts, inbound_conflicts};

/// Which resources of a type are wanted.
#[derive(Clone, Copy, Debug)]
pub enum Names<'a> {
    /// All there are; for routes and endpoints those that listeners and clusters refer to.
    Wildcard,
    /// These.
    List(&'a [ArcStr]),
}

impl Names<'_> {
    fn wants(&self, name: &str) -> bool {
        match self {
            Names::Wildcard => true,
            Names::List(list) => list.iter().any(|n| **n == *name),
        }
    }
}

/// The resources of one type for one proxy. Unknown types and names give nothing, but for route tables and
/// load assignments: a name that means nothing gets an empty one, so that the proxy does not wait for it.
pub fn generate(push: &PushContext, node: &Node, type_url: &str, names: Names<'_>) -> Vec<Resource> {
    shared(push, &Arc::new(node.clone()), type_url, names).to_vec()
}

/// As [`generate`]: a list that proxies share, and snapshots, while nothing in it changes.
pub fn shared(push: &PushContext, node: &Arc<Node>, type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
    let client = Client::of(push, node);
    let cx = client.context(push);
    if grpc::is_client(cx.node)
        && let Some(own) = grpc::resources(&cx, type_url, names)
    {
        return own;
    }
    let pick = |all: cache::Shared| match names {
        Names::Wildcard => all,
        Names::List(_) => all.iter().filter(|r| names.wants(&r.name)).cloned().collect(),
    };
    match type_url {
        type_url::CLUSTER => pick(cache::clusters(&cx, &client)),
        type_url::LISTENER => pick(cache::listeners(&cx, &client)),
        type_url::ROUTE => match names {
            Names::List(list) => cache::routes(&cx, &client, list).into(),
            Names::Wildcard => cache::routes(&cx, &client, &route_names(&cx, &Patches::of(&cx))).into(),
        },
        type_url::ENDPOINT => match names {
            Names::List(list) => cache::endpoints(&cx, &client, list),
            Names::Wildcard => cache::endpoints(&cx, &client, &eds_names(&cx, &Patches::of(&cx))),
        },
        type_url::EXTENSION => {
            let patches = Patches::of(&cx);
            let own = wasm::configurations(&cx, |name| names.wants(name)).into_iter();
            own.chain(patches.extensions(|name| names.wants(name)))
                .map(|e| Resource::new(e.name.as_str(), &e))
                .collect()
        }
        type_url::NAME_TABLE if node.dns_capture => Arc::from([cache::names(&cx, &client)]),
        _ => Arc::default(),
    }
}

/// What is kept from generation to generation: type URL, name, bytes; for people.
pub fn cached(push: &PushContext) -> Vec<(&'static str, ArcStr, usize)> {
    cache::kept(push)
}

/// Route tables that the proxy's listeners ask for by name.
fn route_names(cx: &Context<'_>, patches: &Patches) -> Vec<ArcStr> {
    use envoy_api::http::{HttpConnectionManager, http_connection_manager::RouteSpecifier};
    use envoy_api::listener::filter::ConfigType;
    let mut out: Vec<ArcStr> = Vec::new();
    for listener in patches.listeners(listener::all(cx)) {
        let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
        for filter in chains.flat_map(|c| &c.filters).filter(|f| f.name == filters::HTTP_CONNECTION_MANAGER) {
            let Some(ConfigType::TypedConfig(config)) = &filter.config_type else { continue };
            let Ok(manager) = envoy_api::unpack::<HttpConnectionManager>(config) else { continue };
            if let Some(RouteSpecifier::Rds(rds)) = manager.route_specifier
                && !out.iter().any(|n| **n == *rds.route_config_name)
            {
                out.push(rds.route_config_name.into());
            }
        }
    }
    out
}

/// Load assignments that the proxy's clusters ask for by name.
fn eds_names(cx: &Context<'_>, patches: &Patches) -> Vec<ArcStr> {
    let clusters = patches.clusters(cx, cluster::all(cx));
    clusters.into_iter().filter_map(|c| c.eds_cluster_config).map(|eds| eds.service_name.into()).collect()
}
