use envoy_api::cluster::Cluster;
use envoy_api::core::{TransportSocket, transport_socket::ConfigType};
use envoy_api::wkt::value::Kind;
use istio_api::envoy_filter::{ApplyTo, Operation};

use super::{Patch, Patches, Side, merge_any};
use crate::names::{self, INBOUND_PASSTHROUGH};

fn side(cluster: &Cluster) -> Side {
    if cluster.name.starts_with("inbound|") || cluster.name == INBOUND_PASSTHROUGH {
        Side::Inbound
    } else {
        Side::Outbound
    }
}

pub(super) fn patch(patches: &Patches, clusters: Vec<Cluster>) -> Vec<Cluster> {
    let mut out: Vec<Cluster> = clusters.into_iter().filter_map(|c| one(patches, c)).collect();
    for side in [Side::Outbound, Side::Inbound] {
        let added = patches.to(ApplyTo::Cluster, side).filter(|p| p.adds_on(side));
        out.extend(added.map(Patch::value::<Cluster>).filter(|c| !c.name.is_empty()));
    }
    let mut seen = std::collections::HashSet::new();
    out.retain(|c| seen.insert(c.name.clone()));
    out
}

fn one(patches: &Patches, mut cluster: Cluster) -> Option<Cluster> {
    let side = side(&cluster);
    for patch in patches.to(ApplyTo::Cluster, side).filter(|p| fits(p, &cluster, side)).collect::<Vec<_>>() {
        if patch.operation == Operation::Remove {
            return None;
        }
        if patch.merges() && !merge_socket(patch, &mut cluster) {
            patch.merge_into(&mut cluster);
        }
    }
    Some(cluster)
}

/// Host names of the services that an inbound cluster serves.
fn hosts(cluster: &Cluster) -> Vec<&str> {
    let istio = cluster.metadata.as_ref().and_then(|m| m.filter_metadata.get("istio"));
    let Some(Kind::ListValue(list)) = istio.and_then(|s| s.fields.get("services")).and_then(|v| v.kind.as_ref()) else {
        return Vec::new();
    };
    list.values
        .iter()
        .filter_map(|v| match v.kind.as_ref()? {
            Kind::StructValue(s) => match s.fields.get("host")?.kind.as_ref()? {
                Kind::StringValue(host) => Some(host.as_str()),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

fn fits(patch: &Patch, cluster: &Cluster, side: Side) -> bool {
    let Some(wanted) = &patch.matching.cluster else { return true };
    if !wanted.name.is_empty() {
        return wanted.name == cluster.name;
    }
    let (port, subset, host) = match side {
        Side::Outbound => names::parse_outbound(&cluster.name).unwrap_or_default(),
        Side::Inbound => {
            let port = cluster.name.strip_prefix("inbound|").and_then(|rest| rest.split('|').next()?.parse().ok());
            (port.unwrap_or_default(), "", "")
        }
    };
    let serves = |service: &str| match side {
        Side::Outbound => service == host,
        Side::Inbound => hosts(cluster).contains(&service),
    };
    (wanted.subset.is_empty() || wanted.subset == subset)
        && (wanted.service.is_empty() || serves(&wanted.service))
        && (wanted.port_number == 0 || wanted.port_number == u32::from(port))
}

/// A patch with a transport socket changes only that: the one of the same name, also among those that
/// auto mutual TLS chooses from. Returns whether the patch is done with.
fn merge_socket(patch: &Patch, cluster: &mut Cluster) -> bool {
    let value: Cluster = patch.value();
    let Some(over) = value.transport_socket else { return false };
    let target: Option<&mut TransportSocket> = if cluster.transport_socket_matches.is_empty() {
        cluster.transport_socket.as_mut().filter(|s| s.name == over.name)
    } else {
        let sockets = cluster.transport_socket_matches.iter_mut().filter_map(|m| m.transport_socket.as_mut());
        match { sockets }.find(|s| s.name == over.name) {
            Some(found) => Some(found),
            None => return true,
        }
    };
    match target {
        None => cluster.transport_socket = Some(over),
        Some(own) => {
            if let (Some(ConfigType::TypedConfig(base)), Some(ConfigType::TypedConfig(over))) =
                (&mut own.config_type, &over.config_type)
            {
                merge_any(base, over);
            }
        }
    }
    true
}
