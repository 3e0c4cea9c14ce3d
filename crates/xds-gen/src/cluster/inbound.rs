//! Clusters that lead to the proxy's own application.

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_api::cluster::{
    Cluster,
    cluster::{ClusterDiscoveryType, CommonLbConfig, DiscoveryType},
};
use envoy_api::endpoint::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
};
use istio_api::mesh_config::{InboundTrafficPolicyMode, Visibility};
use istio_api::sidecar::IstioIngressListener;
use mesh_types::Protocol;
use registry::{Port, Provider, Resolution, Service, ServiceTarget, TargetPort};

use super::policy::{self, Draft};
use super::{bind_config, extra_source, service_metadata};
use crate::context::Context;
use crate::names::{self, StatName};
use crate::proto::{address, config_path, list, seconds, set_istio_metadata};

/// What istiod writes to say "never": the largest duration that Envoy takes.
const NEVER: i64 = 9_223_372_035;

pub(super) fn all(cx: &Context<'_>, out: &mut Vec<Cluster>) {
    let ingress = cx.scope.ingress();
    if if ingress.is_empty() { !cx.no_interception() } else { cx.push.settings.merge_inbound } {
        from_registry(cx, out);
    }
    out.extend(ingress.iter().filter_map(|listener| from_ingress(cx, listener)));
}

/// The ports of the proxy's services, but for those that its Sidecar names.
fn from_registry(cx: &Context<'_>, out: &mut Vec<Cluster>) {
    let mut by_port: BTreeMap<u16, Vec<&ServiceTarget>> = BTreeMap::new();
    for target in cx.targets.iter() {
        by_port.entry(target.target_port).or_default().push(target);
    }
    let localhost =
        cx.push.mesh.inbound_traffic_policy.as_ref().map(|p| p.mode) == Some(InboundTrafficPolicyMode::Localhost);
    let bind = if localhost { cx.localhosts()[0] } else { "" };
    for (port, targets) in by_port {
        if cx.scope.ingress().iter().any(|i| i.port.as_ref().is_some_and(|p| p.number == u32::from(port))) {
            continue;
        }
        let first = targets[0];
        out.push(cluster(cx, port, bind, first.target_port, &first.port, &first.service, &targets));
    }
}

/// `bind` empty: to where the connection was going.
fn cluster(
    cx: &Context<'_>,
    cluster_port: u16,
    bind: &str,
    endpoint_port: u16,
    port: &Port,
    service: &Service,
    targets: &[&ServiceTarget],
) -> Cluster {
    let name = names::inbound(cluster_port);
    let pattern = &cx.push.mesh.inbound_cluster_stat_name;
    let kind = if bind.is_empty() { DiscoveryType::OriginalDst } else { DiscoveryType::Static };
    let mut cluster = Cluster {
        alt_stat_name: names::stat(&match pattern.is_empty() {
            true => name.clone(),
            false => StatName {
                host: &service.hostname,
                kubernetes: names::of_kubernetes(service),
                subset: "",
                port: port.port,
                port_name: &port.name,
                target: Some(cluster_port),
            }
            .fill(pattern),
        }),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
        common_lb_config: Some(CommonLbConfig::default()),
        ..Cluster::default()
    };
    if bind.is_empty() {
        cluster.cleanup_interval = Some(seconds(NEVER));
    } else {
        let endpoint = Endpoint { address: Some(address(bind, endpoint_port)), ..Endpoint::default() };
        cluster.load_assignment = Some(ClusterLoadAssignment {
            cluster_name: name.clone(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: vec![LbEndpoint {
                    host_identifier: Some(HostIdentifier::Endpoint(endpoint)),
                    ..LbEndpoint::default()
                }],
                ..LocalityLbEndpoints::default()
            }],
            ..ClusterLoadAssignment::default()
        });
    }
    if !service.mesh_external && cx.push.settings.telemetry_label {
        let mut hosts: Vec<&str> = Vec::new();
        let mut services = Vec::new();
        for target in targets.iter().filter(|t| t.port.port == port.port) {
            if !hosts.contains(&&*target.service.hostname) {
                hosts.push(&target.service.hostname);
                services.push(service_metadata(&target.service));
            }
        }
        if targets.is_empty() {
            services.push(service_metadata(service));
        }
        set_istio_metadata(&mut cluster.metadata, "services", list(services));
    }
    cluster.name = name;
    let mut draft = Draft::new(cluster, port, cx);
    let mut policy = None;
    if let Some(rule) = cx.scope.destination_rule(cx.node, &service.hostname, false)
        && rule.spec.traffic_policy.is_some()
    {
        policy = policy::inbound_policy(&rule.spec, port.port);
        // As istiod: only beside other metadata.
        if draft.cluster.metadata.is_some() {
            let path = config_path("destination-rule", &rule.namespace, &rule.name);
            set_istio_metadata(&mut draft.cluster.metadata, "config", path);
        }
    }
    policy::apply_inbound(cx, &mut draft, policy, cluster_port);
    if bind != "127.0.0.1" && bind != "::1" {
        let (v4, v6) = (cx.node.supports_v4(), cx.node.supports_v6());
        let mut source = bind_config(if v4 { "127.0.0.6" } else { "::6" });
        if v4 && v6 && cx.dual_stack() {
            source.extra_source_addresses.push(extra_source("::6"));
        }
        draft.cluster.upstream_bind_config = Some(source);
    }
    draft.finish().into_message()
}

/// The cluster of a Sidecar's ingress listener: to its `defaultEndpoint`, else to where the connection was going.
fn from_ingress(cx: &Context<'_>, listener: &IstioIngressListener) -> Option<Cluster> {
    let written = listener.port.as_ref()?;
    let number = u16::try_from(written.number).ok()?;
    let (bind, endpoint_port) = default_endpoint(cx, &listener.default_endpoint)?;
    let port = Port {
        name: written.name.as_str().into(),
        port: number,
        protocol: Protocol::parse(&written.protocol),
        target: TargetPort::Number(number),
    };
    let own = cx.targets.iter().find(|t| t.target_port == number);
    let service = own.map_or_else(|| nameless(cx), |t| (*t.service).clone());
    let target =
        ServiceTarget { service: std::sync::Arc::new(service), port: port.clone(), target_port: endpoint_port };
    Some(cluster(cx, number, &bind, endpoint_port, &port, &target.service, &[&target]))
}

/// Stands for a listener that belongs to no service.
fn nameless(cx: &Context<'_>) -> Service {
    Service {
        hostname: format!("{}.{}", cx.scope.name, cx.scope.namespace).into(),
        name: cx.scope.name.clone(),
        namespace: cx.scope.namespace.clone(),
        object_name: cx.scope.name.clone(),
        provider: Provider::External,
        created: 0,
        resolution: Resolution::ClientSideLb,
        mesh_external: true,
        ports: Vec::new(),
        cluster_ips: Vec::new(),
        default_address: "".into(),
        labels: Default::default(),
        selector: Default::default(),
        export_to: Vec::new(),
        aliases: Vec::new(),
        external_name: "".into(),
        service_accounts: Vec::new(),
        traffic_distribution: Default::default(),
        node_local: false,
        publish_not_ready: false,
        passthrough_ports: BTreeMap::new(),
        allocated: Vec::new(),
        visibility: Visibility::Public,
        races: false,
    }
}

/// Address and port of a `defaultEndpoint`; empty if there is none. Nothing for one that makes no sense.
fn default_endpoint(cx: &Context<'_>, text: &str) -> Option<(String, u16)> {
    if text.is_empty() || text.starts_with("unix://") {
        return Some((text.to_owned(), 0));
    }
    let (host, port) = text.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_v6 = |a: &str| a.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6());
    let own = |v6: bool| cx.node.addresses.iter().find(|a| is_v6(a) == v6).cloned();
    let local = |v6: bool| {
        let all = cx.localhosts();
        all.iter().find(|a| is_v6(a) == v6).or(all.first()).map(|a| (*a).to_owned())
    };
    let address = match host {
        "0.0.0.0" => own(false).unwrap_or_else(|| "127.0.0.1".to_owned()),
        "::" => own(true).unwrap_or_else(|| "::1".to_owned()),
        "127.0.0.1" => local(false)?,
        "::1" => local(true)?,
        // Other addresses are refused by validation; istiod falls back to the connection's own destination.
        _ => String::new(),
    };
    Some((address, port))
}
