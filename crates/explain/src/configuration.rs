//! What a proxy was given, compiled as the proxy compiles it.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_api::{Message, cluster, endpoint, listener, route, type_url};
use proxy_core::{ArcStr, Cluster, Endpoints, Listener, ListenerSet, Options, Rejected, RouteTable};
use push_context::{Node, PushContext};
use xds_gen::{Names, generate};

/// A proxy's listeners, routes, clusters and endpoints.
///
/// Listeners and route tables are compiled at once; of the clusters, of which there may be thousands, only those that are asked for.
#[derive(Debug)]
pub struct Configuration {
    /// All listeners that the proxy accepts, in the order in which they came.
    pub listeners: Vec<Arc<Listener>>,
    /// The same by address.
    pub set: ListenerSet,
    /// Route tables by name.
    pub tables: BTreeMap<ArcStr, Arc<RouteTable>>,
    /// What the proxy refuses; it goes on without these.
    pub rejected: Vec<Rejected>,
    /// As they came.
    pub raw: Resources,
    options: Options,
}

/// Resources as they came.
#[derive(Debug, Default)]
pub struct Resources {
    /// Listeners.
    pub listeners: Vec<listener::Listener>,
    /// Route tables.
    pub routes: Vec<route::RouteConfiguration>,
    /// Clusters.
    pub clusters: Vec<cluster::Cluster>,
    /// Endpoints, by the name under which clusters ask for them.
    pub endpoints: Vec<endpoint::ClusterLoadAssignment>,
}

impl Resources {
    /// What a control plane would send to this proxy.
    pub fn of_node(push: &PushContext, node: &Node) -> Self {
        Self {
            listeners: decode(push, node, type_url::LISTENER),
            routes: decode(push, node, type_url::ROUTE),
            clusters: decode(push, node, type_url::CLUSTER),
            endpoints: decode(push, node, type_url::ENDPOINT),
        }
    }
}

fn decode<M: Message + Default>(push: &PushContext, node: &Node, type_url: &str) -> Vec<M> {
    let all = generate(push, node, type_url, Names::Wildcard);
    all.iter().filter_map(|resource| M::decode(&*resource.body).ok()).collect()
}

impl Configuration {
    /// Compiles what a proxy was given.
    pub fn new(raw: Resources) -> Self {
        let options = Options { allow_unsupported_filters: true, ..Options::default() };
        let mut rejected = Vec::new();
        let mut listeners = Vec::new();
        for listener in &raw.listeners {
            match Listener::compile(listener, &options) {
                Ok(listener) => listeners.push(Arc::new(listener)),
                Err(error) => rejected.push(error),
            }
        }
        let mut tables = BTreeMap::new();
        for table in &raw.routes {
            match RouteTable::compile(table, &options) {
                Ok(compiled) => drop(tables.insert(ArcStr::from(table.name.as_str()), Arc::new(compiled))),
                Err(error) => rejected.push(error),
            }
        }
        Self { set: ListenerSet::new(listeners.iter().cloned()), listeners, tables, rejected, raw, options }
    }

    /// The listener of this name.
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        self.listeners.iter().find(|listener| *listener.name == *name)
    }

    /// Why the proxy refuses a listener or route table that it was given; of clusters only those know that ask for one.
    pub fn refusal(&self, name: &str) -> Option<&Rejected> {
        let named = |error: &&Rejected| error.resource.split_once(' ').is_some_and(|(_, own)| own == name);
        self.rejected.iter().find(named)
    }

    /// The cluster of this name with its endpoints as far as they are known.
    ///
    /// # Errors
    /// When the proxy would refuse it.
    pub fn cluster(&self, name: &str) -> Option<Result<(Cluster, Endpoints), Rejected>> {
        let raw = self.raw.clusters.iter().find(|cluster| cluster.name == name)?;
        Some(Cluster::compile(raw, &self.options).and_then(|cluster| {
            let service = raw.eds_cluster_config.as_ref().map(|eds| eds.service_name.as_str());
            let wanted = service.filter(|name| !name.is_empty()).unwrap_or(name);
            let endpoints = match self.raw.endpoints.iter().find(|e| e.cluster_name == wanted) {
                Some(assignment) if service.is_some() => Endpoints::compile(assignment, &cluster, None)?,
                _ => (*cluster.endpoints).clone(),
            };
            Ok((cluster, endpoints))
        }))
    }
}
