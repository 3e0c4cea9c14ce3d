//! Endpoints of a cluster (istiod `endpoint_builder.go`).

pub(crate) mod locality;
pub(crate) mod network;

use std::collections::BTreeMap;

use envoy_api::core::{self, HealthStatus};
use envoy_api::endpoint::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints, endpoint::AdditionalAddress,
    lb_endpoint::HostIdentifier,
};
use istio_api::DestinationRule;
use istio_api::destination_rule::{LoadBalancerSettings, TlsMode as ClientMode, TrafficPolicy};
use mesh_types::{Labels, selects};
use push_context::MtlsMode;
use registry::{Endpoint, Health, Locality, Service, TlsMode, Workload, canonical_service};

use crate::context::Context;
use crate::names;
use crate::proto::{address, structure, text, u32_value};
use locality::Setting;

/// Builds the endpoints of one service port, or of a subset of it.
pub(crate) struct Builder<'a> {
    cx: &'a Context<'a>,
    service: &'a Service,
    port: u16,
    rule: Option<&'a DestinationRule>,
    subset: &'a str,
    labels: Option<&'a Labels>,
    /// Only those of the proxy's own workload.
    alike_only: bool,
}

/// The cluster by which a proxy that prefers its zone knows how many of its kind there are in each.
pub(crate) const LOCAL_CLUSTER: &str = "local_cluster";
/// Labels that tell generations of one workload apart.
const GENERATIONS: [&str; 2] = ["pod-template-hash", "rollouts-pod-template-hash"];

/// The endpoints of the proxy's own workload in its region, by its oldest service; no rule has a say in them.
pub(crate) fn local_cluster(cx: &Context<'_>) -> ClusterLoadAssignment {
    let mut out = ClusterLoadAssignment { cluster_name: LOCAL_CLUSTER.to_owned(), ..ClusterLoadAssignment::default() };
    let service = cx.targets.first().and_then(|t| Some((cx.scope.service(&t.service.hostname)?, t.port.port)));
    if let Some((service, port)) = service.filter(|(s, port)| s.port(*port).is_some() && !s.resolution.is_dns()) {
        out.endpoints = Builder { alike_only: true, ..Builder::new(cx, service, port, "", None) }.group().0;
    }
    out
}

/// The load assignment that EDS is asked for; empty for clusters that do not exist.
pub(crate) fn load_assignment(cx: &Context<'_>, cluster: &str) -> ClusterLoadAssignment {
    let empty = || ClusterLoadAssignment { cluster_name: cluster.to_owned(), ..ClusterLoadAssignment::default() };
    let Some((port, subset, host)) = names::parse_outbound(cluster) else { return empty() };
    let Some(service) = cx.scope.service(host) else { return empty() };
    if service.port(port).is_none() || service.resolution.is_dns() {
        return empty();
    }
    let rule = cx.scope.destination_rule(cx.node, host, true);
    let builder = Builder::new(cx, service, port, subset, rule.map(|r| &r.spec));
    let (endpoints, labels) = builder.group();
    if endpoints.is_empty() {
        return empty();
    }
    let mut assignment = ClusterLoadAssignment { endpoints, ..empty() };
    let (failover, lb) = builder.outlier_and_load_balancer();
    if let Some(setting) = Setting::effective(&cx.push.mesh, lb.as_ref(), service) {
        builder.apply_locality(&setting, failover, &mut assignment, &labels);
    }
    assignment
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        cx: &'a Context<'a>,
        service: &'a Service,
        port: u16,
        subset: &'a str,
        rule: Option<&'a DestinationRule>,
    ) -> Builder<'a> {
        let labels =
            rule.and_then(|r| r.subsets.iter().find(|s| !subset.is_empty() && s.name == subset)).map(|s| &s.labels);
        Builder { cx, service, port, rule, subset, labels, alike_only: false }
    }

    /// Whether there is nowhere to send requests to.
    pub(crate) fn is_empty(&self) -> bool {
        self.chosen().is_empty()
    }

    /// Endpoints of a cluster whose proxy resolves names itself.
    pub(crate) fn dns_endpoints(&self) -> Vec<LocalityLbEndpoints> {
        self.group().0
    }

    fn chosen(&self) -> Vec<&'a Endpoint> {
        let (service, settings) = (self.service, &self.cx.push.settings);
        let (dns, networked) = (service.resolution.is_dns(), self.gateways().is_some());
        // DIFFERS: istiod sends endpoints without address even where no gateway stands for them, which Envoy refuses.
        let take = |e: &Endpoint| match e.addresses.is_empty() {
            true => networked,
            false => dns || e.port == 0 || e.is_ip(),
        };
        let visible = |e: &&Endpoint| {
            let local = !service.node_local || self.node_name().unwrap_or_default() == &*e.workload.node;
            let wanted = match self.health(e) {
                Health::Unknown | Health::Healthy => true,
                Health::Unhealthy => self.sends_unhealthy(),
                Health::Draining => service.session(&settings.session_label).is_some(),
                Health::Terminating => false,
            };
            local
                && self.views(&e.workload.network)
                && wanted
                && (!self.alike_only || self.is_alike(e))
                && self.labels.is_none_or(|l| selects(l, &e.workload.topology_labels))
                && take(e)
        };
        let registry = &self.cx.push.registry;
        match dns {
            true => registry.endpoints_by_number(service, self.port).filter(visible).collect(),
            false => registry.endpoints_by_port(service, self.port).filter(visible).collect(),
        }
    }

    /// Whether an endpoint is of the proxy's own workload, and in its region.
    fn is_alike(&self, endpoint: &Endpoint) -> bool {
        let (node, workload) = (self.cx.node, &endpoint.workload);
        let region = &node.locality.region;
        node.meta("WORKLOAD_NAME").unwrap_or_default() == &*workload.workload_name
            && GENERATIONS.iter().all(|label| node.labels.get(*label) == workload.labels.get(*label))
            && (region.is_empty() || *region == workload.locality.region)
    }

    /// Its health; workloads may say by a label that they drain.
    fn health(&self, endpoint: &Endpoint) -> Health {
        let label = &*self.cx.push.settings.draining_label;
        match endpoint.workload.labels.get(label) {
            Some(value) if !label.is_empty() && !value.is_empty() && endpoint.health != Health::Terminating => {
                Health::Draining
            }
            _ => endpoint.health,
        }
    }

    fn node_name(&self) -> Option<&str> {
        self.cx.node.meta("NODE_NAME")
    }

    /// A minimum of healthy endpoints needs the panic threshold, which would then use unhealthy ones.
    fn sends_unhealthy(&self) -> bool {
        let settings = &self.cx.push.settings;
        if self.service.forces_unhealthy(settings) || !settings.send_unhealthy {
            return self.service.forces_unhealthy(settings);
        }
        let policy = self.policy();
        policy.and_then(|p| p.outlier_detection).is_none_or(|o| o.min_health_percent <= 0)
    }

    fn policy(&self) -> Option<TrafficPolicy> {
        let rule = self.rule?;
        let subset = rule.subsets.iter().find(|s| s.name == self.subset);
        crate::cluster::merged_policy(
            rule.traffic_policy.as_ref(),
            subset.and_then(|s| s.traffic_policy.as_ref()),
            self.port,
        )
    }

    /// Whether failover is possible, and how load is balanced.
    fn outlier_and_load_balancer(&self) -> (bool, Option<LoadBalancerSettings>) {
        match self.policy() {
            Some(policy) => (policy.outlier_detection.is_some(), policy.load_balancer),
            None => (false, None),
        }
    }

    /// The client's TLS mode for this port, if a rule names one.
    fn rule_mode(&self) -> Option<ClientMode> {
        let of = |policy: Option<&TrafficPolicy>| {
            let policy = policy?;
            let own = policy
                .port_level_settings
                .iter()
                .find(|p| p.port.as_ref().is_some_and(|n| n.number == u32::from(self.port)) && p.tls.is_some());
            own.and_then(|p| p.tls.as_ref()).or(policy.tls.as_ref()).map(|t| t.mode)
        };
        let rule = self.rule?;
        let whole = || of(rule.traffic_policy.as_ref());
        if self.subset.is_empty() {
            return whole();
        }
        let subset = rule.subsets.iter().find(|s| s.name == self.subset)?;
        of(subset.traffic_policy.as_ref()).or_else(whole)
    }

    /// Endpoints by locality, and the labels of each.
    pub(crate) fn group(&self) -> (Vec<LocalityLbEndpoints>, Vec<Vec<&'a Labels>>) {
        type Listed<'a> = (&'a Locality, Vec<(&'a Endpoint, LbEndpoint)>);
        let mut by_locality: BTreeMap<&str, Listed<'a>> = BTreeMap::new();
        for endpoint in self.chosen() {
            let Workload { locality, locality_label, .. } = &*endpoint.workload;
            let (_, list) = by_locality.entry(locality_label).or_insert((locality, Vec::new()));
            list.push((endpoint, self.convert(endpoint)));
        }
        let gateways = self.gateways();
        let convert = |(locality, list): Listed<'a>| {
            let members: Vec<network::Member<'a>> = match gateways {
                Some(gateways) => self.by_network(gateways, list),
                None => list.into_iter().map(|(e, own)| (&*e.workload.topology_labels, own)).collect(),
            };
            let (labels, lb_endpoints): (Vec<_>, Vec<_>) = members.into_iter().unzip();
            let whole = LocalityLbEndpoints {
                load_balancing_weight: match lb_endpoints.is_empty() {
                    true => None,
                    false => u32_value(locality::total_weight(&lb_endpoints)),
                },
                locality: Some(core::Locality {
                    region: locality.region.to_string(),
                    zone: locality.zone.to_string(),
                    sub_zone: locality.subzone.to_string(),
                }),
                lb_endpoints,
                ..LocalityLbEndpoints::default()
            };
            (whole, labels)
        };
        by_locality.into_values().map(convert).unzip()
    }

    fn takes_mtls(&self, endpoint: &Endpoint) -> bool {
        if let Some(mode) = self.rule_mode() {
            return mode == ClientMode::IstioMutual;
        }
        let workload = &endpoint.workload;
        workload.tls_mode == TlsMode::Istio
            && self.cx.push.peer_policy(&workload.namespace, &workload.labels).for_port(endpoint.port)
                != MtlsMode::Disable
    }

    fn convert(&self, endpoint: &Endpoint) -> LbEndpoint {
        let workload = &endpoint.workload;
        let mut metadata = core::Metadata::default();
        let mode = workload.tls_mode.as_str();
        if workload.tls_mode != TlsMode::Disabled && !mode.is_empty() && self.takes_mtls(endpoint) {
            let mode = structure([("tlsMode", text(mode))]);
            metadata.filter_metadata.insert("envoy.transport_socket_match".to_owned(), mode);
        }
        let settings = &self.cx.push.settings;
        if settings.telemetry_label && settings.endpoint_telemetry {
            let (name, revision) = match settings.external_canonical && self.service.mesh_external {
                true => canonical_service(&self.service.labels, &self.service.object_name),
                false => canonical_service(&workload.labels, &workload.workload_name),
            };
            let revision = if revision == "latest" { "" } else { revision };
            let (own, cluster) = (&workload.workload_name, &settings.cluster_id);
            let description = format!("{own};{};{name};{revision};{cluster}", workload.namespace);
            metadata.filter_metadata.insert("istio".to_owned(), structure([("workload", text(&description))]));
        }
        let more = endpoint.addresses.iter().skip(1).filter(|_| self.cx.dual_stack());
        LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
                address: Some(address(endpoint.addresses.first().map_or("", |a| a), endpoint.port)),
                additional_addresses: more
                    .map(|a| AdditionalAddress { address: Some(address(a, endpoint.port)) })
                    .collect(),
                ..EnvoyEndpoint::default()
            })),
            health_status: match self.health(endpoint) {
                Health::Unknown => HealthStatus::Unknown as i32,
                Health::Healthy => HealthStatus::Healthy as i32,
                Health::Draining => HealthStatus::Draining as i32,
                Health::Unhealthy | Health::Terminating => HealthStatus::Unhealthy as i32,
            },
            metadata: Some(metadata),
            load_balancing_weight: u32_value(endpoint.weight.max(1)),
        }
    }

    /// Sorts localities by distance or weighs them, as a rule or the mesh says.
    pub(crate) fn apply_locality(
        &self,
        setting: &Setting,
        failover: bool,
        assignment: &mut ClusterLoadAssignment,
        labels: &[Vec<&Labels>],
    ) {
        setting.apply(self.cx.node, &self.cx.node.locality, failover, assignment, labels);
    }
}
