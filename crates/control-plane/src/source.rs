//! What the xDS server asks: who may connect, and which resources a proxy gets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ads::server::{Event, EventKind, Names, Peer, Source};
use envoy_api::Resource;
use envoy_api::pb::envoy::config::core::v3::Node as EnvoyNode;
use kube_source::Account;
use mesh_types::ArcStr;
use push_context::Node;
use tokio::sync::{Notify, watch};
use tonic::Status;
use tracing::{debug, info, warn};

use crate::debug;
use crate::metrics::{Metrics, short};
use crate::registration::{Claim, Registrar};
use crate::secrets::{self, Keys};
use crate::status::{Arrival, Statuses};
use crate::world::{State, World};

/// Generates from the latest state.
pub(crate) struct Generator {
    pub(crate) world: World,
    pub(crate) statuses: Arc<Statuses>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) registrar: Registrar,
    /// Shared by all ports, so that connections have numbers of their own.
    pub(crate) connections: Arc<AtomicU64>,
    /// Whether clients have proved who they are; not on the plaintext port, where nobody can.
    pub(crate) secure: bool,
    /// Who gets the keys in Secrets of their namespace.
    pub(crate) keys: Keys,
}

/// One stream's client.
pub(crate) struct Client {
    connection: u64,
    node: Arc<Node>,
    since: Instant,
    /// Rung when the stream is to end.
    end: Arc<Notify>,
    /// The latest snapshot that it was given something of.
    given: AtomicU64,
    /// For machines that stand for a WorkloadEntry.
    claim: Option<Arc<Claim>>,
}

impl Generator {
    fn admit(&self, node: &EnvoyNode, peer: &Peer) -> Result<Client, Status> {
        if *self.world.revisions().borrow() == 0 {
            return Err(Status::unavailable("the configuration is not loaded yet"));
        }
        let identity = peer.identity.clone().filter(|_| self.secure);
        if self.secure && identity.is_none() {
            return Err(Status::unauthenticated("nobody has verified who calls"));
        }
        let claimed = Node::from_envoy(node, None).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if let Some(identity) = &identity {
            // As istiod, pilot/pkg/xds/auth.go `authorize`: what the proxy says of itself must fit what it proved.
            let account = &claimed.service_account;
            if *claimed.namespace != *identity.namespace()
                || !(account.is_empty() || account == identity.service_account())
            {
                let said = format!("namespace {:?}, service account {account:?}", claimed.namespace);
                return Err(Status::permission_denied(format!("{identity} may not act for {said}")));
            }
        }
        let parsed = Node::from_envoy(node, identity.as_ref());
        let node = Arc::new(parsed.map_err(|error| Status::permission_denied(error.to_string()))?);
        let claim = Registrar::claim(&node, identity.as_ref(), &self.world.current())?;
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let end = Arc::<Notify>::default();
        self.statuses.arrive(Arrival {
            connection,
            end: end.clone(),
            node: node.clone(),
            identity: identity.as_ref(),
            address: peer.address.map(|address| address.to_string()).unwrap_or_default(),
        });
        self.count(&node);
        self.look_for_services(&node, &self.world.current());
        Ok(Client { connection, node, since: Instant::now(), end, given: AtomicU64::new(0), claim })
    }
}

impl Client {
    /// As whom it proved itself, on the secure port.
    fn account(&self) -> Account {
        Account { namespace: self.node.namespace.to_string(), name: self.node.service_account.clone() }
    }
}

impl Generator {
    /// A debug page as a resource.
    fn page(&self, proxy: &Client, name: &ArcStr, state: &State) -> Arc<[Resource]> {
        let namespace = (proxy.node.namespace != state.push.root_namespace).then_some(&*proxy.node.namespace);
        let about = debug::About { statuses: &self.statuses, injector: None, namespace };
        match debug::resource(name, state, &about) {
            Ok(page) => Arc::from([Resource::from_bytes(name.clone(), page)]),
            Err(reason) => {
                warn!(page = &**name, client = proxy.node.id, reason, "a debug page is not shown");
                Arc::default()
            }
        }
    }

    /// Counts a proxy that serves nothing, where istiod does: Kubernetes' services only, and none for machines.
    fn look_for_services(&self, node: &Node, state: &State) {
        let (registry, query) = (&state.push.registry, node.query(&state.push.settings.cluster_id));
        let reason = match registry.workload(&query) {
            Some(workload) if !workload.is_pod => return,
            Some(_) => "no_matching_services",
            None => "no_matching_metadata",
        };
        let served = registry.targets(&query);
        if !served.iter().any(|target| target.service.provider == registry::Provider::Kubernetes) {
            self.metrics.serves_nothing(reason);
        }
    }

    /// Keeps the number of connected proxies of this one's version.
    fn count(&self, node: &Node) {
        let version = node.meta("ISTIO_VERSION").unwrap_or_default();
        self.metrics.connected(version, self.statuses.count(version));
    }
}

impl Source for Generator {
    type Proxy = Client;

    fn connect(&self, node: &EnvoyNode, peer: &Peer) -> Result<Client, Status> {
        self.admit(node, peer).inspect_err(|status| {
            self.metrics.refused_connection();
            let id: String = node.id.chars().take(200).collect();
            warn!(node = id, reason = status.message(), "proxy refused");
        })
    }

    fn resources(&self, proxy: &Client, type_url: &str, names: Names<'_>) -> Arc<[Resource]> {
        let state = self.world.current();
        if proxy.given.swap(state.revision, Ordering::Relaxed) != state.revision {
            let has_other_services = self.metrics.dequeued(state.revision, proxy.since);
            if has_other_services {
                self.look_for_services(&proxy.node, &state);
            }
        }
        if type_url == envoy_api::type_url::SECRET {
            // Nobody's identity is known on the plaintext port, and a wildcard for secrets would be one for all.
            let (true, Names::List(names)) = (self.secure, names) else { return Arc::default() };
            let account = proxy.account();
            let allowed = self.keys.allows(&account);
            let found = secrets::resources(&state.snapshot, &account.namespace, allowed, names.iter().cloned());
            self.metrics.secrets_missing(names.len() - found.len());
            return found;
        }
        if type_url == debug::TYPE {
            // As istiod: exactly one page, for somebody who is known.
            let (true, Names::List([name])) = (self.secure, names) else { return Arc::default() };
            return self.page(proxy, name, &state);
        }
        let names = match names {
            Names::Wildcard => xds_gen::Names::Wildcard,
            Names::List(names) => xds_gen::Names::List(names),
        };
        xds_gen::shared(&state.push, &proxy.node, type_url, names)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.world.revisions()
    }

    async fn prepare(&self, proxy: &Client, type_url: &str, names: Names<'_>) {
        if type_url == envoy_api::type_url::SECRET
            && let (true, Names::List(names)) = (self.secure, names)
        {
            self.keys.prepare(&proxy.account(), names).await;
        }
    }

    async fn ended(&self, proxy: &Client) -> Status {
        proxy.end.notified().await;
        Status::unavailable("disconnected by the operator; connect again")
    }

    fn report(&self, proxy: &Client, event: &Event) {
        self.metrics.xds(&event.kind, &proxy.node);
        if matches!(event.kind, EventKind::Delivered { .. } | EventKind::Larger { .. }) {
            return; // only counted, and often
        }
        self.statuses.hear(proxy.connection, &event.kind);
        if let Some(claim) = &proxy.claim {
            match &event.kind {
                EventKind::Connected { .. } => self.registrar.connected(claim, proxy.connection),
                EventKind::Health { problem } => self.registrar.health(claim, problem.as_ref()),
                EventKind::Disconnected => self.registrar.disconnected(claim, proxy.connection),
                _ => {}
            }
        }
        let name = format_args!("{}.{}", proxy.node.name, proxy.node.namespace);
        match &event.kind {
            EventKind::Connected { protocol, .. } => info!(proxy = %name, %protocol, "proxy connected"),
            EventKind::Disconnected => {
                self.count(&proxy.node);
                info!(proxy = %name, "proxy disconnected");
            }
            EventKind::Sent { type_url, revision, resources, removed, bytes, .. } => {
                debug!(proxy = %name, r#type = short(type_url), revision, resources, removed, bytes, "pushed");
            }
            EventKind::Nacked { type_url, error, .. } => {
                warn!(proxy = %name, r#type = short(type_url), error, "proxy refused its configuration");
            }
            EventKind::Synced { revision } => self.metrics.converged(*revision, proxy.since),
            EventKind::Acked { .. }
            | EventKind::Stale { .. }
            | EventKind::Health { .. }
            | EventKind::Delivered { .. }
            | EventKind::Larger { .. } => {}
        }
    }
}
