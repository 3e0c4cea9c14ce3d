use std::net::IpAddr;
use std::sync::Arc;

use envoy_api::core::TransportSocket;
use envoy_api::listener::Filter;
use envoy_api::pb::envoy::config::accesslog::v3::AccessLog;
use istio_api::MeshProxyConfig;
use mesh_types::ArcStr;
use push_context::{InterceptionMode, IpMode, MtlsMode, Node, PeerPolicy, Profile, PushContext, Same, SidecarScope};
use registry::{Placement, Provider, Service, ServiceTarget, UNSPECIFIED_IP};

use crate::access_log::Of;
use crate::kept::Kept;
use crate::listener::ManagerKind;
use crate::telemetry::{Side, Telemetry};

/// Everything that is the same for all resources of one proxy.
pub(crate) struct Context<'a> {
    pub(crate) push: &'a PushContext,
    pub(crate) node: &'a Node,
    pub(crate) scope: Arc<SidecarScope>,
    /// Service ports of the proxy's own workload.
    pub(crate) targets: Arc<[ServiceTarget]>,
    /// Mesh default with the pod's own settings over it.
    pub(crate) proxy_config: Arc<MeshProxyConfig>,
    /// What its own ports accept.
    pub(crate) peer: PeerPolicy,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) common: Common,
}

/// All of a proxy that matters to the addresses it has for services.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Addressing {
    ip_mode: IpMode,
    in_cluster: bool,
    allocated: bool,
}

type Alpn = &'static [&'static str];
type Encoded = Arc<[u8]>;

/// What many resources of a proxy have in common.
#[derive(Default)]
pub(crate) struct Common {
    /// Connection managers without their routes and statistics' prefix, encoded.
    pub(crate) managers: Kept<ManagerKind, Encoded>,
    /// Contexts of mutual TLS towards servers, encoded: by ALPN and accounts.
    pub(crate) client_tls: Kept<(Alpn, Vec<String>), Encoded>,
    /// What ports take mutual TLS with; those of HTTP are told apart.
    pub(crate) server_tls: Kept<(MtlsMode, bool), Option<TransportSocket>>,
    pub(crate) logs: Kept<(Side, Of), Vec<AccessLog>>,
    /// Those of providers by name, without filters.
    pub(crate) log_providers: Kept<String, Option<AccessLog>>,
    /// A route to a service and its action, encoded, but for names.
    pub(crate) plain_route: Kept<(), (Encoded, Encoded)>,
    /// How clusters tell their peers who calls, encoded.
    pub(crate) exchange: Kept<(), Encoded>,
    /// What counts TCP connections.
    pub(crate) tcp_filters: Kept<Side, Vec<Filter>>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(push: &'a PushContext, node: &'a Arc<Node>) -> Context<'a> {
        let scope = push.scope(node);
        /// The mesh's own, which is one as long as there is this memo.
        #[derive(Eq, Hash, PartialEq)]
        struct Default;
        let proxy_config = match &node.proxy_config {
            Some(own) => Arc::new(own.parse()),
            None => push.memo().get(Default, || Arc::new(push.mesh.default_config.clone().unwrap_or_default())),
        };
        /// While rules change, the services of a proxy stay.
        #[derive(Eq, Hash, PartialEq)]
        struct Targets(Same<Node>, Same<Placement>);
        let of = Targets(Same(node.clone()), Same(push.registry.placement().clone()));
        let targets = push.memo().get(of, || push.registry.targets(&node.query(&push.settings.cluster_id)).into());
        let peer = push.peer_policy(&node.namespace, &node.labels);
        let telemetry = Arc::new(Telemetry::resolve(push, node));
        Context { push, node, scope, targets, proxy_config, peer, telemetry, common: Common::default() }
    }

    /// The same for a class of proxies, which have no ports of their own.
    pub(crate) fn of_class<'b>(&self, node: &'b Node) -> Context<'b>
    where
        'a: 'b,
    {
        Context {
            push: self.push,
            node,
            scope: self.scope.clone(),
            targets: Arc::default(),
            proxy_config: self.proxy_config.clone(),
            peer: self.push.peer_policy(&node.namespace, &node.labels),
            telemetry: self.telemetry.clone(),
            common: Common::default(),
        }
    }

    /// Filters that count TCP connections.
    pub(crate) fn tcp_filters(&self, side: Side) -> Vec<Filter> {
        self.common.tcp_filters.get(side, || self.telemetry.tcp_filters(side))
    }

    /// The proxy knows Istio's HTTP filters and statistics.
    pub(crate) fn has_istio_filters(&self) -> bool {
        self.node.profile != Profile::Stock
    }

    /// The proxy tells its peers about itself over TCP, inside the connection.
    pub(crate) fn exchanges_over_tcp(&self) -> bool {
        self.node.profile == Profile::IstioProxy && self.push.settings.metadata_exchange
    }

    /// And asks by ALPN whether the other side does, too.
    pub(crate) fn agrees_on_exchange(&self) -> bool {
        self.exchanges_over_tcp() && !self.push.settings.no_peer_exchange
    }

    pub(crate) fn dual_stack(&self) -> bool {
        self.push.settings.dual_stack
    }

    pub(crate) fn no_interception(&self) -> bool {
        self.node.interception == InterceptionMode::None
    }

    /// Addresses that mean "any", the primary one first.
    pub(crate) fn wildcards(&self) -> &'static [&'static str] {
        match self.node.ip_mode {
            IpMode::V4 => &["0.0.0.0"],
            IpMode::V6 => &["::"],
            IpMode::Dual => &["0.0.0.0", "::"],
        }
    }

    /// Loopback addresses, the primary one first.
    pub(crate) fn localhosts(&self) -> &'static [&'static str] {
        match self.node.ip_mode {
            IpMode::V4 => &["127.0.0.1"],
            IpMode::V6 => &["::1"],
            IpMode::Dual => &["127.0.0.1", "::1"],
        }
    }

    fn in_family(&self, address: &str) -> bool {
        match address.split('/').next().and_then(|a| a.parse::<IpAddr>().ok()) {
            Some(IpAddr::V4(_)) => self.node.supports_v4(),
            Some(IpAddr::V6(_)) => self.node.supports_v6(),
            None => true,
        }
    }

    /// The address of a service as this proxy knows it (istiod `GetAddressForProxy`).
    pub(crate) fn service_address<'s>(&self, service: &'s Service) -> &'s str {
        let own = service.cluster_ips.iter().find(|ip| !self.node.cluster_id.is_empty() && self.in_family(ip));
        let allocated = || {
            let unspecified = &*service.default_address == UNSPECIFIED_IP;
            self.allocated(service).iter().find(|ip| unspecified && self.in_family(ip))
        };
        own.or_else(allocated).map_or(&service.default_address, |ip| ip)
    }

    /// Addresses that the agent's DNS answers with for services without one.
    fn allocated<'s>(&self, service: &'s Service) -> &'s [ArcStr] {
        if self.addressing().allocated { &service.allocated } else { &[] }
    }

    /// What [`Context::service_addresses`] depend on.
    pub(crate) fn addressing(&self) -> Addressing {
        let on = self.node.dns_auto_allocate || self.push.settings.auto_allocate;
        Addressing {
            ip_mode: self.node.ip_mode,
            in_cluster: !self.node.cluster_id.is_empty(),
            allocated: on && self.node.dns_capture,
        }
    }

    /// All of them (istiod `GetAllAddressesForProxy`).
    pub(crate) fn service_addresses<'s>(&self, service: &'s Service) -> Vec<&'s str> {
        let two = self.node.ip_mode == IpMode::Dual;
        let mut own: Vec<&str> = service.cluster_ips.iter().map(|ip| &**ip).collect();
        if self.node.cluster_id.is_empty() {
            own.clear();
        }
        if own.is_empty() && (service.cluster_ips.is_empty() || self.node.cluster_id.is_empty()) {
            own.extend(self.allocated(service).iter().map(|ip| &**ip));
        }
        if !(two && self.dual_stack()) {
            own.retain(|ip| self.in_family(ip));
            // A mesh of one family takes that of the first address.
            let is_v6 = |ip: &str| ip.contains(':');
            if let Some(family) = own.first().map(|ip| is_v6(ip)).filter(|_| two) {
                own.retain(|ip| is_v6(ip) == family);
            }
        }
        if !own.is_empty() {
            return own;
        }
        if service.default_address.is_empty() {
            return Vec::new();
        }
        // A headless service of Kubernetes has no address of a family that the proxy lacks, either.
        if service.provider == Provider::Kubernetes && !self.in_family(&service.default_address) {
            return Vec::new();
        }
        vec![&service.default_address]
    }

    /// The unspecified address of an outside service in the proxy's own family.
    pub(crate) fn is_external_v6(&self, service: &Service, address: &str) -> bool {
        service.provider == Provider::External && self.node.ip_mode == IpMode::V6 && address == UNSPECIFIED_IP
    }
}
