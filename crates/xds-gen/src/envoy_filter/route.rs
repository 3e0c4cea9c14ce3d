use envoy_api::route::{Route, RouteConfiguration, VirtualHost, route};
use istio_api::envoy_filter::{ApplyTo, Operation, RouteAction, VirtualHostMatch};

use super::{Patch, Patches, Side, insert};

/// The port that a route table is for: `80`, or that of an inbound cluster's name.
fn port(name: &str) -> u32 {
    let text = match name.strip_prefix("inbound|") {
        Some(rest) => rest.split('|').next().unwrap_or_default(),
        None => name,
    };
    text.parse().unwrap_or_default()
}

fn fits(patch: &Patch, config: &RouteConfiguration) -> bool {
    patch.matching.route_configuration.as_ref().is_none_or(|wanted| {
        (wanted.name.is_empty() || wanted.name == config.name)
            && (wanted.port_number == 0 || wanted.port_number == port(&config.name))
    })
}

fn host_match(patch: &Patch) -> Option<&VirtualHostMatch> {
    patch.matching.route_configuration.as_ref()?.vhost.as_ref()
}

fn fits_host(patch: &Patch, host: &VirtualHost) -> bool {
    host_match(patch).is_none_or(|wanted| {
        (wanted.name.is_empty() || wanted.name == host.name)
            && (wanted.domain_name.is_empty() || host.domains.contains(&wanted.domain_name))
    })
}

fn fits_route(patch: &Patch, own: &Route) -> bool {
    let Some(wanted) = host_match(patch).and_then(|h| h.route.as_ref()) else { return true };
    let fits_action = match (&own.action, wanted.action) {
        (_, RouteAction::Any) => true,
        (Some(route::Action::Route(_)), action) => action == RouteAction::Route,
        (Some(route::Action::Redirect(_)), action) => action == RouteAction::Redirect,
        (Some(route::Action::DirectResponse(_)), action) => action == RouteAction::DirectResponse,
        _ => true,
    };
    (wanted.name.is_empty() || wanted.name == own.name) && fits_action
}

/// istiod `ApplyRouteConfigurationPatches`.
pub(super) fn patch(patches: &Patches, side: Side, config: &mut RouteConfiguration) {
    for patch in patches.to(ApplyTo::RouteConfiguration, side) {
        if patch.merges() && fits(patch, config) {
            patch.merge_into(config);
        }
    }
    let mut hosts = std::mem::take(&mut config.virtual_hosts);
    let mut removed: Vec<String> = Vec::new();
    for host in &mut hosts {
        if !virtual_host(patches, side, config, host) {
            removed.push(host.name.clone());
        }
    }
    for patch in patches.to(ApplyTo::VirtualHost, side) {
        if patch.operation == Operation::Add && fits(patch, config) {
            hosts.push(patch.value());
        }
    }
    // As istiod: by name, and so also what was just added under it.
    hosts.retain(|host| !removed.contains(&host.name));
    config.virtual_hosts = hosts;
}

/// Returns whether the virtual host stays.
fn virtual_host(patches: &Patches, side: Side, config: &RouteConfiguration, host: &mut VirtualHost) -> bool {
    for patch in patches.to(ApplyTo::VirtualHost, side) {
        if !fits(patch, config) || !fits_host(patch, host) {
            continue;
        }
        match patch.operation {
            Operation::Remove => return false,
            Operation::Replace => *host = patch.value(),
            _ if patch.merges() => patch.merge_into(host),
            _ => {}
        }
    }
    routes(patches, side, config, host);
    true
}

fn routes(patches: &Patches, side: Side, config: &RouteConfiguration, host: &mut VirtualHost) {
    let meant: Vec<&Patch> =
        patches.to(ApplyTo::HttpRoute, side).filter(|p| fits(p, config) && fits_host(p, host)).collect();
    host.routes.retain_mut(|own| {
        for patch in &meant {
            if !fits_route(patch, own) {
                continue;
            }
            if patch.operation == Operation::Remove {
                return false;
            }
            if patch.merges() {
                patch.merge_into(own);
            }
        }
        true
    });
    for patch in meant {
        let has_match = host_match(patch).is_some_and(|h| h.route.is_some());
        let named = |r: &Route| fits_route(patch, r);
        match patch.operation {
            Operation::Add => host.routes.push(patch.value()),
            Operation::InsertAfter | Operation::InsertBefore => {
                insert(&mut host.routes, patch.operation, has_match, named, patch.value());
            }
            Operation::InsertFirst if !has_match || host.routes.iter().any(named) => {
                host.routes.insert(0, patch.value())
            }
            _ => {}
        }
    }
}
