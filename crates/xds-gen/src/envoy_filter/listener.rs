use envoy_api::core::{TrafficDirection, address::Address, socket_address::PortSpecifier, transport_socket};
use envoy_api::http::{HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter};
use envoy_api::listener::{Filter, FilterChain, Listener, ListenerFilter, filter, listener_filter};
use envoy_api::{any, unpack};
use istio_api::envoy_filter::{ApplyTo, FilterMatch, Operation};

use super::{OtherType, Patch, Patches, Side, edit, merge_any, route};
use crate::filters::HTTP_CONNECTION_MANAGER;

fn side(listener: &Listener) -> Side {
    if listener.traffic_direction == TrafficDirection::Inbound as i32 { Side::Inbound } else { Side::Outbound }
}

fn is_virtual(listener: &Listener) -> bool {
    listener.name == "virtualInbound" || listener.name == "virtualOutbound"
}

pub(super) fn patch(patches: &Patches, listeners: Vec<Listener>) -> Vec<Listener> {
    let mut out = Vec::with_capacity(listeners.len());
    // What stopped of the two groups of listeners that are not virtual.
    let (mut inbound, mut outbound) = (Ok(()), Ok(()));
    for mut listener in listeners {
        let side = side(&listener);
        inline_routes(patches, side, &mut listener);
        let mut alone = Ok(());
        let group = match side {
            _ if is_virtual(&listener) => &mut alone,
            Side::Inbound => &mut inbound,
            Side::Outbound => &mut outbound,
        };
        if group.is_ok() {
            match one(patches, side, &mut listener) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(other) => *group = Err(other),
            }
        }
        out.push(listener);
    }
    for side in [Side::Outbound, Side::Inbound] {
        let added = patches.to(ApplyTo::Listener, side).filter(|p| p.adds_on(side));
        out.extend(added.map(Patch::value::<Listener>).filter(|l| !l.name.is_empty()));
    }
    out
}

fn fits(patch: &Patch, listener: &Listener) -> bool {
    let Some(wanted) = &patch.matching.listener else { return true };
    if !wanted.name.is_empty() && wanted.name != listener.name {
        return false;
    }
    // Ports of virtual listeners are those of their chains.
    if (patch.apply_to != ApplyTo::Listener && is_virtual(listener)) || wanted.port_number == 0 {
        return true;
    }
    match listener.address.as_ref().and_then(|a| a.address.as_ref()) {
        Some(Address::SocketAddress(address)) => {
            address.port_specifier == Some(PortSpecifier::PortValue(wanted.port_number))
        }
        _ => false,
    }
}

fn fits_chain(patch: &Patch, listener: &Listener, chain: &FilterChain) -> bool {
    let Some(wanted) = &patch.matching.listener else { return true };
    let own = chain.filter_chain_match.clone().unwrap_or_default();
    let port = own.destination_port.map_or(0, |p| p.value);
    if is_virtual(listener) && wanted.port_number > 0 && port != wanted.port_number {
        return false;
    }
    let Some(wanted) = &wanted.filter_chain else { return true };
    (wanted.name.is_empty() || wanted.name == chain.name)
        && (wanted.sni.is_empty() || own.server_names.contains(&wanted.sni))
        && (wanted.transport_protocol.is_empty() || own.transport_protocol == wanted.transport_protocol)
        && (wanted.application_protocols.is_empty()
            || wanted.application_protocols.split(',').all(|p| own.application_protocols.iter().any(|a| a == p)))
        && (wanted.destination_port == 0 || port == wanted.destination_port)
}

/// The network filter that a patch is about.
fn filter_match(patch: &Patch) -> Option<&FilterMatch> {
    patch.matching.listener.as_ref()?.filter_chain.as_ref()?.filter.as_ref()
}

fn fits_filter(patch: &Patch, name: &str) -> bool {
    filter_match(patch).is_none_or(|m| m.name == name)
}

/// The HTTP filter that a patch is about.
fn sub_filter(patch: &Patch) -> Option<&str> {
    Some(&filter_match(patch)?.sub_filter.as_ref()?.name)
}

/// Returns whether the listener stays.
fn one(patches: &Patches, side: Side, listener: &mut Listener) -> Result<bool, OtherType> {
    for patch in patches.to(ApplyTo::Listener, side) {
        if !fits(patch, listener) {
            continue;
        }
        if patch.operation == Operation::Remove {
            return Ok(false);
        }
        if patch.merges() {
            patch.merge_into(listener);
        }
    }
    listener_filters(patches, side, listener)?;
    let mut chains = std::mem::take(&mut listener.filter_chains);
    let mut default = listener.default_filter_chain.take();
    let done = filter_chains(patches, side, listener, &mut chains, &mut default);
    listener.filter_chains = chains;
    listener.default_filter_chain = default;
    done.map(|()| true)
}

fn filter_chains(
    patches: &Patches,
    side: Side,
    listener: &Listener,
    chains: &mut Vec<FilterChain>,
    default: &mut Option<FilterChain>,
) -> Result<(), OtherType> {
    let mut keep = Vec::with_capacity(chains.len());
    for chain in chains.iter_mut() {
        keep.push(filter_chain(patches, side, listener, chain)?);
    }
    if let Some(chain) = default.as_mut().filter(|chain| !chain.filters.is_empty())
        && !filter_chain(patches, side, listener, chain)?
    {
        *default = None;
    }
    let mut keep = keep.into_iter();
    chains.retain(|_| keep.next() != Some(false));
    let added = patches.to(ApplyTo::FilterChain, side).filter(|p| p.operation == Operation::Add && fits(p, listener));
    chains.extend(added.map(Patch::value::<FilterChain>).filter(|chain| !chain.filters.is_empty()));
    Ok(())
}

fn listener_filters(patches: &Patches, side: Side, listener: &mut Listener) -> Result<(), OtherType> {
    for patch in patches.to(ApplyTo::ListenerFilter, side) {
        if !fits(patch, listener) {
            continue;
        }
        let wanted = patch.matching.listener.as_ref().map(|l| l.listener_filter.as_str()).filter(|n| !n.is_empty());
        if patch.operation != Operation::Merge {
            edit(&mut listener.listener_filters, patch, wanted, |f| &f.name);
        } else if wanted.is_some() {
            let over: ListenerFilter = patch.value();
            let Some(listener_filter::ConfigType::TypedConfig(over)) = &over.config_type else { continue };
            for own in &mut listener.listener_filters {
                if let Some(listener_filter::ConfigType::TypedConfig(base)) = &mut own.config_type {
                    merge_any(base, over)?;
                }
            }
        }
    }
    Ok(())
}

/// Patches the route tables inside inbound listeners, which istiod does while it makes them; that of hosts looked up by
/// name, which is outbound, it leaves alone.
fn inline_routes(patches: &Patches, side: Side, listener: &mut Listener) {
    let kinds = [ApplyTo::RouteConfiguration, ApplyTo::VirtualHost, ApplyTo::HttpRoute];
    if side == Side::Outbound || !kinds.into_iter().any(|kind| patches.to(kind, side).next().is_some()) {
        return;
    }
    let chains = listener.filter_chains.iter_mut().chain(&mut listener.default_filter_chain);
    for filter in chains.flat_map(|chain| &mut chain.filters).filter(|f| f.name == HTTP_CONNECTION_MANAGER) {
        let Some(filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else { continue };
        let Ok(mut manager) = unpack::<HttpConnectionManager>(config) else { continue };
        if let Some(RouteSpecifier::RouteConfig(own)) = &mut manager.route_specifier {
            route::patch(patches, side, own);
        }
        *config = any(&manager);
    }
}

/// Returns whether the chain stays.
fn filter_chain(
    patches: &Patches,
    side: Side,
    listener: &Listener,
    chain: &mut FilterChain,
) -> Result<bool, OtherType> {
    if chain.filters.is_empty() {
        return Ok(false);
    }
    for patch in patches.to(ApplyTo::FilterChain, side) {
        if !fits(patch, listener) || !fits_chain(patch, listener, chain) {
            continue;
        }
        if patch.operation == Operation::Remove {
            return Ok(false);
        }
        if patch.merges() && !merge_socket(patch, chain)? {
            patch.merge_into(chain);
        }
    }
    network_filters(patches, side, listener, chain)?;
    // Also without any filter left, as istiod leaves it.
    Ok(true)
}

/// A patch with a transport socket of the chain's own name changes only that.
fn merge_socket(patch: &Patch, chain: &mut FilterChain) -> Result<bool, OtherType> {
    let value: FilterChain = patch.value();
    let (Some(over), Some(own)) = (value.transport_socket, &mut chain.transport_socket) else { return Ok(false) };
    if over.name != own.name {
        return Ok(false);
    }
    if let (
        Some(transport_socket::ConfigType::TypedConfig(base)),
        Some(transport_socket::ConfigType::TypedConfig(over)),
    ) = (&mut own.config_type, &over.config_type)
    {
        merge_any(base, over)?;
    }
    Ok(true)
}

fn network_filters(
    patches: &Patches,
    side: Side,
    listener: &Listener,
    chain: &mut FilterChain,
) -> Result<(), OtherType> {
    for patch in patches.to(ApplyTo::NetworkFilter, side) {
        if !fits(patch, listener) || !fits_chain(patch, listener, chain) {
            continue;
        }
        edit(&mut chain.filters, patch, filter_match(patch).map(|m| m.name.as_str()), |f| &f.name);
    }
    let mut filters = std::mem::take(&mut chain.filters);
    let done = filters.iter_mut().try_for_each(|filter| merge_filter(patches, side, listener, chain, filter));
    chain.filters = filters;
    done
}

/// What is laid over one network filter, and over those inside it.
fn merge_filter(
    patches: &Patches,
    side: Side,
    listener: &Listener,
    chain: &FilterChain,
    filter: &mut Filter,
) -> Result<(), OtherType> {
    for patch in patches.to(ApplyTo::NetworkFilter, side) {
        let is_meant =
            patch.operation == Operation::Merge && fits(patch, listener) && fits_chain(patch, listener, chain);
        if is_meant && fits_filter(patch, &filter.name) {
            merge_network_filter(patch, filter)?;
        }
    }
    if filter.name == HTTP_CONNECTION_MANAGER {
        http_filters(patches, side, listener, chain, filter)?;
    }
    Ok(())
}

fn merge_network_filter(patch: &Patch, filter: &mut Filter) -> Result<(), OtherType> {
    let over: Filter = patch.value();
    let Some(filter::ConfigType::TypedConfig(base)) = &mut filter.config_type else { return Ok(()) };
    if let Some(filter::ConfigType::TypedConfig(over)) = &over.config_type {
        merge_any(base, over)?;
    }
    if !over.name.is_empty() {
        filter.name = over.name;
    }
    Ok(())
}

fn http_filters(
    patches: &Patches,
    side: Side,
    listener: &Listener,
    chain: &FilterChain,
    filter: &mut Filter,
) -> Result<(), OtherType> {
    let Some(filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else { return Ok(()) };
    let Ok(mut manager) = unpack::<HttpConnectionManager>(config) else { return Ok(()) };
    let meant = |patch: &&Patch| {
        fits(patch, listener) && fits_chain(patch, listener, chain) && fits_filter(patch, HTTP_CONNECTION_MANAGER)
    };
    for patch in patches.to(ApplyTo::HttpFilter, side).filter(meant) {
        edit(&mut manager.http_filters, patch, sub_filter(patch), |f| &f.name);
    }
    for own in &mut manager.http_filters {
        for patch in patches.to(ApplyTo::HttpFilter, side).filter(meant) {
            if patch.operation != Operation::Merge || sub_filter(patch).is_some_and(|n| n != own.name) {
                continue;
            }
            let over: HttpFilter = patch.value();
            let Some(http_filter::ConfigType::TypedConfig(base)) = &mut own.config_type else { continue };
            if let Some(http_filter::ConfigType::TypedConfig(over)) = &over.config_type {
                merge_any(base, over)?;
            }
            if !over.name.is_empty() {
                own.name = over.name;
            }
        }
    }
    *config = any(&manager);
    Ok(())
}
