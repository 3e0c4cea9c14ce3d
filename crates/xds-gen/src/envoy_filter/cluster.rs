use envoy_api::cluster::Cluster;
use envoy_api::core::{TransportSocket, transport_socket::ConfigType};
use istio_api::envoy_filter::{ApplyTo, Operation};

use super::{OtherType, Patch, Patches, Side, merge_any};
use crate::context::Context;
use crate::names::{self, INBOUND_PASSTHROUGH};

fn side(cluster: &Cluster) -> Side {
    if cluster.name.starts_with("inbound|") || cluster.name == INBOUND_PASSTHROUGH {
        Side::Inbound
    } else {
        Side::Outbound
    }
}

pub(super) fn patch(cx: &Context<'_>, patches: &Patches, clusters: Vec<Cluster>) -> Vec<Cluster> {
    let mut out: Vec<Cluster> = clusters.into_iter().filter_map(|c| one(cx, patches, c)).collect();
    for side in [Side::Outbound, Side::Inbound] {
        let added = patches.to(ApplyTo::Cluster, side).filter(|p| p.adds_on(side));
        out.extend(added.map(Patch::value::<Cluster>).filter(|c| !c.name.is_empty()));
    }
    let mut seen = std::collections::HashSet::new();
    out.retain(|c| seen.insert(c.name.clone()));
    out
}

fn one(cx: &Context<'_>, patches: &Patches, mut cluster: Cluster) -> Option<Cluster> {
    let side = side(&cluster);
    for patch in patches.to(ApplyTo::Cluster, side) {
        // What came before may have given it another name.
        if !fits(cx, patch, &cluster, side) {
            continue;
        }
        if patch.operation == Operation::Remove {
            return None;
        }
        if patch.merges() {
            match merge_socket(patch, &mut cluster) {
                Ok(true) => {}
                Ok(false) => patch.merge_into(&mut cluster),
                Err(OtherType) => break,
            }
        }
    }
    Some(cluster)
}

/// Whether a service is behind an inbound port: any of the workload's, or the one of a Sidecar's listener, which has
/// the Sidecar's name if there is no service.
fn serves(cx: &Context<'_>, port: u16, service: &str) -> bool {
    let own = || cx.targets.iter().filter(|t| t.target_port == port).map(|t| &*t.service.hostname);
    match cx.scope.ingress().iter().any(|i| i.port.as_ref().is_some_and(|p| p.number == u32::from(port))) {
        false => own().any(|host| host == service),
        true => match own().next() {
            Some(host) => host == service,
            None => format!("{}.{}", cx.scope.name, cx.scope.namespace) == service,
        },
    }
}

fn fits(cx: &Context<'_>, patch: &Patch, cluster: &Cluster, side: Side) -> bool {
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
        Side::Inbound => port != 0 && serves(cx, port, service),
    };
    (wanted.subset.is_empty() || wanted.subset == subset)
        && (wanted.service.is_empty() || serves(&wanted.service))
        && (wanted.port_number == 0 || wanted.port_number == u32::from(port))
}

/// A patch with a transport socket changes only that: the one of the same name, also among those that
/// auto mutual TLS chooses from. Returns whether the patch is done with.
fn merge_socket(patch: &Patch, cluster: &mut Cluster) -> Result<bool, OtherType> {
    let value: Cluster = patch.value();
    let Some(over) = value.transport_socket else { return Ok(false) };
    let target: Option<&mut TransportSocket> = if cluster.transport_socket_matches.is_empty() {
        cluster.transport_socket.as_mut().filter(|s| s.name == over.name)
    } else {
        let sockets = cluster.transport_socket_matches.iter_mut().filter_map(|m| m.transport_socket.as_mut());
        match { sockets }.find(|s| s.name == over.name) {
            Some(found) => Some(found),
            None => return Ok(true),
        }
    };
    match target {
        None => cluster.transport_socket = Some(over),
        Some(own) => {
            if let (Some(ConfigType::TypedConfig(base)), Some(ConfigType::TypedConfig(over))) =
                (&mut own.config_type, &over.config_type)
            {
                merge_any(base, over)?;
            }
        }
    }
    Ok(true)
}
