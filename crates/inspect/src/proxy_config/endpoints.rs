use envoy_api::core::{Address, HealthStatus, Locality, address, envoy_internal_address, socket_address};
use envoy_api::endpoint::{ClusterLoadAssignment, LbEndpoint, lb_endpoint};

use super::{EndpointFilter, clusters};
use crate::table::Table;

/// Assignments with the endpoints that are wanted; those without any are left out.
pub(super) fn select(all: Vec<ClusterLoadAssignment>, filter: &EndpointFilter) -> Vec<ClusterLoadAssignment> {
    let mut out = Vec::new();
    for mut assignment in all {
        let cluster = assignment.cluster_name.clone();
        for locality in &mut assignment.endpoints {
            locality.lb_endpoints.retain(|endpoint| is_wanted(endpoint, &cluster, filter));
        }
        if assignment.endpoints.iter().any(|locality| !locality.lb_endpoints.is_empty()) {
            out.push(assignment);
        }
    }
    out.sort_by(|a, b| clusters::key(&a.cluster_name).cmp(&clusters::key(&b.cluster_name)));
    out
}

pub(super) fn table(all: Vec<ClusterLoadAssignment>, filter: &EndpointFilter, typed: bool) -> String {
    let mut table = Table::new(5, &["NAME", "STATUS", "LOCALITY", "CLUSTER"]);
    for assignment in select(all, filter) {
        for locality in &assignment.endpoints {
            for endpoint in &locality.lb_endpoints {
                let name = addresses(endpoint).join(",");
                let name = if typed { format!("endpoint/{name}") } else { name };
                let where_ = text(locality.locality.as_ref());
                table.row([name, status(endpoint), where_, assignment.cluster_name.clone()]);
            }
        }
    }
    table.render()
}

fn is_wanted(endpoint: &LbEndpoint, cluster: &str, filter: &EndpointFilter) -> bool {
    let is = |wanted: &Option<String>, own: &str| wanted.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(own));
    filter.address.as_ref().is_none_or(|wanted| addresses(endpoint).iter().any(|own| own.eq_ignore_ascii_case(wanted)))
        && filter.port.is_none_or(|port| all(endpoint).first().is_some_and(|first| self::port(first) == port))
        && is(&filter.cluster, cluster)
        && is(&filter.status, &status(endpoint))
}

fn status(endpoint: &LbEndpoint) -> String {
    HealthStatus::try_from(endpoint.health_status).unwrap_or_default().as_str_name().to_owned()
}

fn all(endpoint: &LbEndpoint) -> Vec<&Address> {
    let Some(lb_endpoint::HostIdentifier::Endpoint(endpoint)) = &endpoint.host_identifier else { return Vec::new() };
    let more = endpoint.additional_addresses.iter().filter_map(|additional| additional.address.as_ref());
    endpoint.address.iter().chain(more).collect()
}

fn addresses(endpoint: &LbEndpoint) -> Vec<String> {
    let name = |address: &&Address| match &address.address {
        Some(address::Address::SocketAddress(socket)) => format!("{}:{}", socket.address, port(address)),
        Some(address::Address::Pipe(pipe)) => pipe.path.clone(),
        Some(address::Address::EnvoyInternalAddress(internal)) => match &internal.address_name_specifier {
            Some(envoy_internal_address::AddressNameSpecifier::ServerListenerName(name)) => {
                format!("envoy://{name}/{}", internal.endpoint_id)
            }
            None => "unknown".to_owned(),
        },
        None => "unknown".to_owned(),
    };
    all(endpoint).iter().map(name).collect()
}

/// A socket's port; 0 for all others.
pub(super) fn port(address: &Address) -> u32 {
    match &address.address {
        Some(address::Address::SocketAddress(socket)) => match socket.port_specifier {
            Some(socket_address::PortSpecifier::PortValue(port)) => port,
            _ => 0,
        },
        _ => 0,
    }
}

/// Istio `LocalityToString`.
fn text(locality: Option<&Locality>) -> String {
    let Some(locality) = locality else { return String::new() };
    match (locality.zone.as_str(), locality.sub_zone.as_str()) {
        ("", _) => locality.region.clone(),
        (zone, "") => format!("{}/{zone}", locality.region),
        (zone, sub_zone) => format!("{}/{zone}/{sub_zone}", locality.region),
    }
}
