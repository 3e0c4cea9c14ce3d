//! Istio's rules and policies, indexed; kept kind by kind while that kind does not change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config_store::{Body, Kind, Snapshot};
use istio_api::destination_rule::{LoadBalancerSettings, TrafficPolicy};
use istio_api::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, MeshConfig, RequestAuthentication, Sidecar, Telemetry,
    VirtualService,
};
use mesh_types::{ArcStr, Labels};
use registry::Settings;

use crate::authn::PeerRules;
use crate::{Config, Extension, Keys, Same, config, destination_rule, extension, mesh_route, virtual_service};

/// Policies that select workloads by labels, by namespace.
pub(crate) type ByNamespace<T> = BTreeMap<ArcStr, Vec<Arc<Config<T>>>>;

/// Istio's rules and policies. Services and endpoints have no part in them.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) virtual_services: Arc<virtual_service::Index>,
    pub(crate) destination_rules: Arc<destination_rule::Index>,
    pub(crate) sidecars: Arc<Vec<Arc<Config<Sidecar>>>>,
    pub(crate) peers: Arc<PeerRules>,
    pub(crate) request_authentications: Arc<ByNamespace<RequestAuthentication>>,
    pub(crate) authorization_policies: Arc<ByNamespace<AuthorizationPolicy>>,
    pub(crate) telemetries: Arc<ByNamespace<Telemetry>>,
    pub(crate) envoy_filters: Arc<ByNamespace<EnvoyFilter>>,
    pub(crate) extensions: Arc<ByNamespace<Extension>>,
    /// Of token issuers.
    pub(crate) keys: Arc<Keys>,
    /// Labels of clients that outbound rules ask for.
    pub(crate) labels: Arc<BTreeSet<String>>,
}

/// The rules that listeners are made of, to compare: equal while none of them has changed.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ListenerRules {
    /// Rules for requests have no part in listeners.
    virtual_services: Option<Same<virtual_service::Index>>,
    destination_rules: Same<destination_rule::Index>,
    sidecars: Same<Vec<Arc<Config<Sidecar>>>>,
    peers: Same<PeerRules>,
    request_authentications: Same<ByNamespace<RequestAuthentication>>,
    authorization_policies: Same<ByNamespace<AuthorizationPolicy>>,
    telemetries: Same<ByNamespace<Telemetry>>,
    envoy_filters: Same<ByNamespace<EnvoyFilter>>,
    extensions: Same<ByNamespace<Extension>>,
    keys: Same<Keys>,
}

/// Labels that say where a workload runs, but for its node; preference for near endpoints may ask for any of them.
const TOPOLOGY: [&str; 5] = [
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "topology.istio.io/subzone",
    "topology.istio.io/network",
    "topology.istio.io/cluster",
];

/// What is kept and what is made.
struct Builder<'a> {
    previous: Option<(&'a Rules, &'a [Kind])>,
}

impl Builder<'_> {
    fn part<T>(&self, kind: Kind, of: impl Fn(&Rules) -> &Arc<T>, make: impl FnOnce() -> T) -> Arc<T> {
        match self.previous {
            Some((rules, changed)) if !changed.contains(&kind) => of(rules).clone(),
            _ => Arc::new(make()),
        }
    }

    /// VirtualServices, and what routes of the Gateway API are made into, which depends on other kinds too.
    fn virtual_services(
        &self,
        snapshot: &Snapshot,
        mesh: &MeshConfig,
        settings: &Settings,
    ) -> Arc<virtual_service::Index> {
        let make = || virtual_service::Index::build(snapshot, mesh, settings);
        let Some((previous, changed)) = self.previous else { return Arc::new(make()) };
        let own = [Kind::VirtualService].into_iter().chain(mesh_route::ROUTES);
        if own.into_iter().any(|kind| changed.contains(&kind)) {
            return Arc::new(make());
        }
        let routed = mesh_route::ROUTES.iter().any(|kind| snapshot.len(*kind) > 0);
        if !routed || !mesh_route::PARENTS.iter().any(|kind| changed.contains(kind)) {
            return previous.virtual_services.clone();
        }
        // Few changes of services make or unmake a route's parent.
        let index = make();
        if index == *previous.virtual_services { previous.virtual_services.clone() } else { Arc::new(index) }
    }
}

impl Rules {
    /// `previous` are the rules of an earlier snapshot and the kinds that have changed since.
    pub(crate) fn build(
        snapshot: &Snapshot,
        mesh: &MeshConfig,
        settings: &Settings,
        root: &ArcStr,
        previous: Option<(&Rules, &[Kind])>,
    ) -> Rules {
        let builder = Builder { previous };
        let mut rules = Rules {
            virtual_services: builder.virtual_services(snapshot, mesh, settings),
            destination_rules: builder.part(
                Kind::DestinationRule,
                |r| &r.destination_rules,
                || destination_rule::Index::build(snapshot, mesh, settings, root),
            ),
            sidecars: builder.part(
                Kind::Sidecar,
                |r| &r.sidecars,
                || {
                    config::list(snapshot, Kind::Sidecar, |body| match body {
                        Body::Sidecar(spec) => Some((**spec).clone()),
                        _ => None,
                    })
                },
            ),
            peers: builder.part(Kind::PeerAuthentication, |r| &r.peers, || PeerRules::build(snapshot, root)),
            request_authentications: builder.part(
                Kind::RequestAuthentication,
                |r| &r.request_authentications,
                || {
                    config::by_namespace(snapshot, Kind::RequestAuthentication, |body| match body {
                        Body::RequestAuthentication(spec) => Some((**spec).clone()),
                        _ => None,
                    })
                },
            ),
            authorization_policies: builder.part(
                Kind::AuthorizationPolicy,
                |r| &r.authorization_policies,
                || {
                    config::by_namespace(snapshot, Kind::AuthorizationPolicy, |body| match body {
                        Body::AuthorizationPolicy(spec) => Some((**spec).clone()),
                        _ => None,
                    })
                },
            ),
            telemetries: builder.part(
                Kind::Telemetry,
                |r| &r.telemetries,
                || {
                    config::by_namespace(snapshot, Kind::Telemetry, |body| match body {
                        Body::Telemetry(spec) => Some((**spec).clone()),
                        _ => None,
                    })
                },
            ),
            envoy_filters: builder.part(
                Kind::EnvoyFilter,
                |r| &r.envoy_filters,
                || {
                    config::by_namespace(snapshot, Kind::EnvoyFilter, |body| match body {
                        Body::EnvoyFilter(spec) => Some((**spec).clone()),
                        _ => None,
                    })
                },
            ),
            extensions: match previous.filter(|(_, changed)| {
                !changed.contains(&Kind::WasmPlugin) && !changed.contains(&Kind::TrafficExtension)
            }) {
                Some((previous, _)) => previous.extensions.clone(),
                None => Arc::new(extension::by_namespace(snapshot)),
            },
            keys: previous.map(|(previous, _)| previous.keys.clone()).unwrap_or_default(),
            labels: Arc::default(),
        };
        rules.labels = Arc::new(rules.client_labels(snapshot, mesh));
        // The same object while it is equal, for those who tell by identity.
        if let Some((previous, _)) = previous.filter(|(previous, _)| previous.labels == rules.labels) {
            rules.labels = previous.labels.clone();
        }
        rules
    }

    pub(crate) fn of_listeners(&self) -> ListenerRules {
        ListenerRules {
            virtual_services: self.virtual_services.has_l4.then(|| Same(self.virtual_services.clone())),
            destination_rules: Same(self.destination_rules.clone()),
            sidecars: Same(self.sidecars.clone()),
            peers: Same(self.peers.clone()),
            request_authentications: Same(self.request_authentications.clone()),
            authorization_policies: Same(self.authorization_policies.clone()),
            telemetries: Same(self.telemetries.clone()),
            envoy_filters: Same(self.envoy_filters.clone()),
            extensions: Same(self.extensions.clone()),
            keys: Same(self.keys.clone()),
        }
    }

    pub(crate) fn with_keys(&self, keys: Arc<Keys>) -> Rules {
        Rules { keys, ..self.clone() }
    }

    fn client_labels(&self, snapshot: &Snapshot, mesh: &MeshConfig) -> BTreeSet<String> {
        let mut out: BTreeSet<String> = TOPOLOGY.iter().map(|l| (*l).to_owned()).collect();
        for object in snapshot.list(Kind::VirtualService) {
            if let Body::VirtualService(spec) = &object.body {
                of_virtual_service(spec, &mut out);
            }
        }
        for object in snapshot.list(Kind::DestinationRule) {
            if let Body::DestinationRule(spec) = &object.body {
                of_destination_rule(spec, &mut out);
            }
        }
        for telemetry in self.telemetries.values().flatten() {
            out.extend(telemetry.spec.selector.iter().flat_map(|s| s.match_labels.keys().cloned()));
        }
        for extension in self.extensions.values().flatten() {
            out.extend(extension.spec.plugin.selector.iter().flat_map(|s| s.match_labels.keys().cloned()));
        }
        let locality = mesh.locality_lb_setting.iter().flat_map(|s| &s.failover_priority);
        let zone = mesh.zone_aware_lb_setting.iter().flat_map(|s| &s.failover_priority);
        out.extend(locality.chain(zone).map(|l| name_of(l)));
        out
    }
}

/// `NAME` of `NAME` or `NAME=VALUE`.
fn name_of(label: &str) -> String {
    label.split('=').next().unwrap_or(label).to_owned()
}

fn of_virtual_service(spec: &VirtualService, out: &mut BTreeSet<String>) {
    let mut add = |labels: &Labels| out.extend(labels.keys().cloned());
    spec.http.iter().flat_map(|r| &r.r#match).for_each(|m| add(&m.source_labels));
    spec.tcp.iter().flat_map(|r| &r.r#match).for_each(|m| add(&m.source_labels));
    spec.tls.iter().flat_map(|r| &r.r#match).for_each(|m| add(&m.source_labels));
}

fn of_load_balancer(lb: &LoadBalancerSettings) -> BTreeSet<String> {
    let locality = lb.locality_lb_setting.iter().flat_map(|s| &s.failover_priority);
    let zone = lb.zone_aware_lb_setting.iter().flat_map(|s| &s.failover_priority);
    locality.chain(zone).map(|l| name_of(l)).collect()
}

fn of_destination_rule(spec: &DestinationRule, out: &mut BTreeSet<String>) {
    out.extend(spec.workload_selector.iter().flat_map(|s| s.match_labels.keys().cloned()));
    let mut add = |policy: &TrafficPolicy| {
        let of_ports = policy.port_level_settings.iter().filter_map(|p| p.load_balancer.as_ref());
        out.extend(policy.load_balancer.iter().chain(of_ports).flat_map(of_load_balancer));
    };
    spec.traffic_policy.iter().for_each(&mut add);
    spec.subsets.iter().filter_map(|s| s.traffic_policy.as_ref()).for_each(&mut add);
}
