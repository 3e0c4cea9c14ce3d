//! Route tables (istiod `httproute.go`, `route.go`).

mod action;
pub(crate) mod encoded;
mod matching;
mod retry;
pub(crate) mod session;
pub(crate) mod virtual_host;

pub(crate) use action::ORIGINS;

use envoy_api::route::{
    Decorator, DirectResponseAction, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route,
    route_action::{ClusterSpecifier, MaxStreamDuration},
    route_match::PathSpecifier,
};
use istio_api::virtual_service::Destination;
use mesh_types::Protocol;
use push_context::Profile;
use registry::Service;

use crate::context::Context;
use crate::names::{self, HTTP_PROXY_ROUTE};
use crate::proto::{bool_value, seconds, u32_value};

/// Virtual host and route of requests to hosts that are looked up by name.
const ALLOW_ANY_DYNAMIC_DNS: &str = "allow_any_dynamic_dns";

/// The route table of that name; empty for one that nothing refers to.
pub(crate) fn outbound(cx: &Context<'_>, name: &str) -> RouteConfiguration {
    let Some((host, port)) = parse(name) else { return empty(name) };
    let mut virtual_hosts = virtual_host::outbound(cx, name, port);
    if let Some(host) = host {
        // The listener is the service's own: whatever the request's host is, it is for it.
        virtual_hosts.retain(|v| v.domains.iter().any(|d| d == name || d == host));
        match &mut virtual_hosts[..] {
            [only] => only.domains = vec!["*".to_owned()],
            _ => virtual_hosts.clear(),
        }
    }
    virtual_hosts.sort_by(|a, b| a.name.cmp(&b.name));
    let mut table = table(cx, name, port, host.is_none());
    virtual_hosts.append(&mut table.virtual_hosts);
    RouteConfiguration { virtual_hosts, ..table }
}

/// The host and the port that a route table is named after.
fn parse(name: &str) -> Option<(Option<&str>, u16)> {
    let is_unix = name.starts_with("unix://");
    let (host, port_text) = match name.rsplit_once(':') {
        Some((host, port)) if !is_unix => (Some(host), port),
        _ => (None, name),
    };
    match port_text.parse::<u16>() {
        Ok(port) => Some((host, port)),
        Err(_) if is_unix || name == HTTP_PROXY_ROUTE => Some((host, 0)),
        Err(_) => None,
    }
}

fn empty(name: &str) -> RouteConfiguration {
    RouteConfiguration { name: name.to_owned(), validate_clusters: bool_value(false), ..RouteConfiguration::default() }
}

/// A table without the virtual hosts of services; with that of unknown hosts, if it `catches_all`.
fn table(cx: &Context<'_>, name: &str, port: u16, catches_all: bool) -> RouteConfiguration {
    RouteConfiguration {
        virtual_hosts: catches_all.then(|| catch_all(cx)).into_iter().collect(),
        max_direct_response_body_size_bytes: u32_value(1024 * 1024),
        ignore_port_in_host_matching: !matches_ports(cx, name, port),
        ..empty(name)
    }
}

/// The hosts of this table are told apart by their ports: it is that of a unix socket or of a forward proxy.
///
/// DIFFERS: istiod sends hosts with ports and tells the proxy to ignore ports, so that only requests for port 80 find theirs
/// (istio/istio#47682). Nothing but istio-proxy, which is to get exactly what istiod sends, needs that.
fn matches_ports(cx: &Context<'_>, name: &str, port: u16) -> bool {
    let of_all_ports =
        || port == 0 || cx.scope.egress_for_route(port, name).is_some_and(|egress| egress.is_http_proxy());
    cx.node.profile != Profile::IstioProxy && of_all_ports()
}

/// The routes of plain HTTP to unknown addresses where hosts are looked up by name.
pub(crate) fn dynamic_dns(cx: &Context<'_>) -> RouteConfiguration {
    RouteConfiguration {
        name: ALLOW_ANY_DYNAMIC_DNS.to_owned(),
        virtual_hosts: vec![catch_all(cx)],
        validate_clusters: bool_value(false),
        max_direct_response_body_size_bytes: u32_value(1024 * 1024),
        ignore_port_in_host_matching: true,
        ..RouteConfiguration::default()
    }
}

/// Requests for hosts that are not in the mesh.
fn catch_all(cx: &Context<'_>) -> VirtualHost {
    let (name, action) = if cx.scope.allows_any() {
        let (name, cluster) = match cx.scope.dynamic_dns {
            true => (ALLOW_ANY_DYNAMIC_DNS, names::ALLOW_ANY_DYNAMIC_DNS.to_owned()),
            false => ("allow_any", crate::listener::catch_all_cluster(cx)),
        };
        let mut action = RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster)),
            append_x_forwarded_host: virtual_host::forwards_host(cx),
            ..RouteAction::default()
        };
        action::timeouts(&mut action, None);
        (name, route::Action::Route(action))
    } else {
        let action = DirectResponseAction { status: 502, ..DirectResponseAction::default() };
        ("block_all", route::Action::DirectResponse(action))
    };
    VirtualHost {
        name: name.to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![Route {
            name: name.to_owned(),
            r#match: Some(everything()),
            action: Some(action),
            ..Route::default()
        }],
        include_request_attempt_count: virtual_host::counts_attempts(cx),
        ..VirtualHost::default()
    }
}

pub(crate) fn everything() -> RouteMatch {
    RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..RouteMatch::default() }
}

/// The route that takes all requests to a cluster.
fn default_route(cluster: &str, operation: &str, action: RouteAction) -> Route {
    let action = RouteAction { cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())), ..action };
    Route {
        name: "default".to_owned(),
        r#match: Some(everything()),
        decorator: Some(Decorator { operation: operation.to_owned(), ..Decorator::default() }),
        action: Some(route::Action::Route(action)),
        ..Route::default()
    }
}

/// The routes of one of the proxy's own ports.
pub(crate) fn inbound(
    cx: &Context<'_>,
    cluster: &str,
    host: &str,
    port: u16,
    protocol: Protocol,
) -> RouteConfiguration {
    let action = RouteAction {
        timeout: Some(seconds(0)),
        max_stream_duration: Some(MaxStreamDuration {
            max_stream_duration: Some(seconds(0)),
            grpc_timeout_header_max: Some(seconds(0)),
            ..MaxStreamDuration::default()
        }),
        // A stream that gRPC resets is the application's answer.
        retry_policy: match protocol {
            Protocol::Grpc | Protocol::GrpcWeb => None,
            _ => retry::inbound(cx.push.mesh.default_inbound_http_retry_policy.as_ref()),
        },
        ..RouteAction::default()
    };
    RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: format!("inbound|http|{port}"),
            domains: vec!["*".to_owned()],
            routes: vec![default_route(cluster, &format!("{host}:{port}/*"), action)],
            ..VirtualHost::default()
        }],
        validate_clusters: bool_value(false),
        ..RouteConfiguration::default()
    }
}

/// The cluster of a rule's destination (istiod `GetDestinationCluster`).
pub(crate) fn destination_cluster(destination: &Destination, service: Option<&Service>, listener_port: u16) -> String {
    if destination.host.is_empty() {
        return "UnknownService".to_owned();
    }
    let host = service.map(|s| &*s.external_name).filter(|n| !n.is_empty()).unwrap_or(&destination.host);
    let port = match (&destination.port, service) {
        (Some(port), _) => u16::try_from(port.number).unwrap_or_default(),
        (None, Some(service)) if service.ports.len() == 1 => service.ports[0].port,
        _ => listener_port,
    };
    names::outbound(port, &destination.subset, host)
}
