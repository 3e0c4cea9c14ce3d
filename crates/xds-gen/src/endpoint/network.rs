//! Endpoints in other networks, which are reached through gateways (istiod `ep_filters.go`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_api::core;
use envoy_api::endpoint::{Endpoint as EnvoyEndpoint, LbEndpoint, lb_endpoint::HostIdentifier};
use mesh_types::Labels;
use push_context::IpMode;
use registry::{Endpoint, Gateways, NetworkGateway};

use super::Builder;
use crate::proto::{address, structure, text, u32_value};

/// Metadata with the networks whose endpoints a proxy wants to see, separated by commas.
pub(crate) const VIEW: &str = "REQUESTED_NETWORK_VIEW";

/// An endpoint as it is sent, and the labels by which it is preferred.
pub(super) type Member<'a> = (&'a Labels, LbEndpoint);

impl<'a> Builder<'a> {
    /// Gateways, if there are any: without, everything is in reach.
    pub(super) fn gateways(&self) -> Option<&'a Gateways> {
        let networks = self.cx.push.registry.networks();
        // Names are resolved by who looks up names anyway.
        let own = if self.service.resolution.is_dns() { &networks.unresolved } else { &networks.gateways };
        (!own.is_empty()).then_some(own)
    }

    /// Whether the proxy wants to see endpoints of a network.
    pub(super) fn views(&self, network: &str) -> bool {
        let wanted = self.cx.node.meta(VIEW);
        wanted.is_none_or(|list| network.is_empty() || list.split(',').any(|own| own == network))
    }

    /// Endpoints in reach as they are, and the gateways that lead to the others, which weigh as much as these.
    pub(super) fn by_network(
        &self,
        gateways: &'a Gateways,
        endpoints: Vec<(&'a Endpoint, LbEndpoint)>,
    ) -> Vec<Member<'a>> {
        let (node, cluster) = (self.cx.node, &self.cx.push.settings.cluster_id);
        let mut out = Vec::with_capacity(endpoints.len());
        let mut weights: BTreeMap<&NetworkGateway, u32> = BTreeMap::new();
        for (endpoint, mut own) in endpoints {
            let network = &*endpoint.workload.network;
            let towards: Vec<&NetworkGateway> = gateways.towards(network, cluster).collect();
            let weight = own.load_balancing_weight.map_or(1, |w| w.value).saturating_mul(gateways.scale());
            own.load_balancing_weight = u32_value(weight);
            // A proxy that does not know its network is in none that has gateways.
            let near = network.is_empty() || (!node.network.is_empty() && *node.network == *network);
            if near || towards.is_empty() {
                // As istiod: neither unix sockets nor entries without address are in reach.
                if endpoint.port != 0 && !endpoint.addresses.is_empty() {
                    out.push((&*endpoint.workload.topology_labels, own));
                }
                continue;
            }
            let reachable: Vec<_> = towards.into_iter().filter(|gateway| self.reaches(gateway)).collect();
            // Gateways tell services apart by the SNI of mutual TLS.
            if !takes_mtls(&own) {
                continue;
            }
            let share = u32::try_from(reachable.len()).ok().and_then(|count| weight.checked_div(count));
            for gateway in reachable {
                let sum = weights.entry(gateway).or_default();
                *sum = sum.saturating_add(share.unwrap_or_default());
            }
        }
        out.extend(weights.into_iter().map(|(gateway, weight)| (&*gateway.labels, self.gateway(gateway, weight))));
        out
    }

    /// Whether the proxy has an address of the gateway's family.
    fn reaches(&self, gateway: &NetworkGateway) -> bool {
        let ip = gateway.address.parse::<IpAddr>().map(|ip| ip.to_canonical());
        match self.cx.node.ip_mode {
            IpMode::Dual => true,
            IpMode::V4 => ip.is_ok_and(|ip| ip.is_ipv4()),
            IpMode::V6 => ip.is_ok_and(|ip| ip.is_ipv6()),
        }
    }

    fn gateway(&self, gateway: &NetworkGateway, weight: u32) -> LbEndpoint {
        let mut metadata = core::Metadata::default();
        let mode = structure([("tlsMode", text("istio"))]);
        metadata.filter_metadata.insert("envoy.transport_socket_match".to_owned(), mode);
        let settings = &self.cx.push.settings;
        if settings.telemetry_label && settings.endpoint_telemetry {
            let nobody = format!(";;;;{}", gateway.cluster);
            metadata.filter_metadata.insert("istio".to_owned(), structure([("workload", text(&nobody))]));
        }
        let mut to = address(&gateway.address, 1);
        if let Some(core::address::Address::SocketAddress(socket)) = &mut to.address {
            socket.port_specifier = Some(core::socket_address::PortSpecifier::PortValue(gateway.port));
        }
        LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
                address: Some(to),
                ..EnvoyEndpoint::default()
            })),
            metadata: Some(metadata),
            load_balancing_weight: u32_value(weight.max(1)),
            ..LbEndpoint::default()
        }
    }
}

/// Whether clients speak Istio's mutual TLS to an endpoint.
fn takes_mtls(endpoint: &LbEndpoint) -> bool {
    use envoy_api::wkt::value::Kind;
    let matched = endpoint.metadata.as_ref().and_then(|m| m.filter_metadata.get("envoy.transport_socket_match"));
    let mode = matched.and_then(|m| m.fields.get("tlsMode")).and_then(|value| value.kind.as_ref());
    matches!(mode, Some(Kind::StringValue(mode)) if mode == "istio")
}
