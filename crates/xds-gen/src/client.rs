//! One proxy as all resources of a push see it, kept while that does not change.

use std::sync::Arc;

use envoy_api::Resource;
use istio_api::MeshProxyConfig;
use push_context::{Identity, Node, PeerPolicy, PushContext, Same, SidecarScope};
use registry::{Endpoint, ServiceTarget};

use crate::cache::{self, Use};
use crate::context::{Common, Context};
use crate::telemetry::Telemetry;

/// Resources that many hold.
pub(crate) type Shared = Arc<[Resource]>;

/// Endpoints of one service.
pub(crate) type Endpoints = Option<Same<[Endpoint]>>;

/// A proxy, with everything that is the same for all its resources; the same object while nothing but endpoints of services
/// with an address changes.
pub(crate) struct Client {
    /// As its pod or WorkloadEntry says it is; the one object that stands for all equal nodes.
    pub(crate) node: Arc<Node>,
    /// Whether any EnvoyFilter is for it: it shares nothing then.
    pub(crate) is_patched: bool,
    /// Endpoints of services without address, which have a part in listeners and names.
    pub(crate) headless: Vec<Endpoints>,
    scope: Arc<SidecarScope>,
    targets: Arc<[ServiceTarget]>,
    proxy_config: Arc<MeshProxyConfig>,
    peer: PeerPolicy,
    telemetry: Arc<Telemetry>,
    classes: [Arc<Node>; 4],
}

impl Client {
    /// The proxy that a node is.
    pub(crate) fn of(push: &PushContext, node: &Arc<Node>) -> Arc<Client> {
        #[derive(Eq, Hash, PartialEq)]
        struct Key(Same<Node>, Identity);
        push.memo().get(Key(Same(node.clone()), push.identity()), || Arc::new(Client::new(push, node)))
    }

    /// As [`Client::of`] for a node that is not seen again: nothing of it is kept.
    pub(crate) fn new(push: &PushContext, node: &Node) -> Client {
        let node = cache::one(push, push.effective(node).unwrap_or_else(|| node.clone()));
        let cx = Context::new(push, &node);
        let seen = cache::seen(&cx);
        let headless = seen.headless.iter();
        let headless: Vec<Endpoints> = headless.map(|s| push.registry.endpoint_list(s).cloned().map(Same)).collect();
        let is_patched = !push.envoy_filters(&node.namespace, &node.labels).is_empty();
        let classes = Use::ALL.map(|what| cache::class(&cx, what, &seen, &headless));
        let Context { scope, targets, proxy_config, peer, telemetry, .. } = cx;
        Client { is_patched, headless, scope, targets, proxy_config, peer, telemetry, classes, node }
    }

    /// What stands for all proxies that get the same.
    pub(crate) fn class(&self, what: Use) -> &Arc<Node> {
        &self.classes[what as usize]
    }

    /// The proxy in a push of its own identity.
    pub(crate) fn context<'a>(&'a self, push: &'a PushContext) -> Context<'a> {
        Context {
            push,
            node: &self.node,
            scope: self.scope.clone(),
            targets: self.targets.clone(),
            proxy_config: self.proxy_config.clone(),
            peer: self.peer.clone(),
            telemetry: self.telemetry.clone(),
            common: Common::default(),
        }
    }
}
