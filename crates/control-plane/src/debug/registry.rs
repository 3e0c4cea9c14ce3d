//! Services and endpoints as istiod prints them: its Go structs (pilot/pkg/model/service.go) as `encoding/json` writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config_store::{Body, Kind};
use istio_api::DestinationRule;
use istio_api::mesh_config::Visibility;
use push_context::{Config, PushContext, SidecarScope};
use registry::{Endpoint, Health, Port, Provider, Resolution, Service, ServiceTarget, TrafficDistribution};
use serde_json::{Map, Value, json};

use crate::world::State;

/// All services.
pub(super) fn services(state: &State) -> Value {
    list(state, &state.push.registry.services)
}

fn list(state: &State, services: &[Arc<Service>]) -> Value {
    services.iter().map(|service| of_service(state, service)).collect()
}

/// Host, namespace, `Shards` by who reported them; here that is one registry.
pub(super) fn endpoint_shards(push: &PushContext) -> Value {
    let mut hosts: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for service in &push.registry.services {
        let endpoints = push.registry.endpoints(&service.hostname, &service.namespace);
        if endpoints.is_empty() {
            continue;
        }
        let shard = format!("{}/{}", service.provider.as_str(), push.settings.cluster_id);
        let accounts: BTreeSet<&str> = endpoints.iter().map(|endpoint| &*endpoint.workload.identity).collect();
        let accounts: Map<_, _> = accounts.into_iter().map(|account| (account.to_owned(), json!({}))).collect();
        let list: Value = endpoints.iter().map(|endpoint| of_endpoint(push, endpoint)).collect();
        let shards = json!({"Shards": {shard: list}, "ServiceAccounts": accounts});
        hosts.entry(&service.hostname).or_default().insert(service.namespace.to_string(), shards);
    }
    json!(hosts)
}

/// What one proxy may see, as istiod's `SidecarScope`, and, ours, what each egress listener imports by name.
pub(super) fn scope(state: &State, scope: &SidecarScope) -> Value {
    let listeners = scope.egress.iter().map(|egress| {
        let services: Vec<_> = egress.services.iter().map(|service| &*service.hostname).collect();
        let virtual_services: Vec<_> =
            egress.virtual_services.iter().map(|config| format!("{}/{}", config.namespace, config.name)).collect();
        json!({"istioListener": serde_json::to_value(&egress.listener).unwrap_or_default(),
            "services": services, "virtualServices": virtual_services})
    });
    let sidecar = scope.sidecar.as_ref().map(|config| serde_json::to_value(&config.spec).unwrap_or_default());
    let by_host = scope.by_host().map(|service| (service.hostname.to_string(), of_service(state, service)));
    let rules = scope.destination_rules().map(|(host, rules)| {
        let rules = rules.map(|(rule, audience)| {
            let audience: Map<_, _> = audience.iter().map(|to| (to.clone(), json!({}))).collect();
            json!({"exportTo": audience, "rule": config(rule)})
        });
        (host.to_string(), rules.collect())
    });
    json!({
        "version": state.revision.to_string(),
        "name": &*scope.name, "namespace": &*scope.namespace, "sidecar": sidecar,
        "outboundTrafficPolicy": serde_json::to_value(&scope.outbound_policy).unwrap_or_default(),
        "egressListenerServices": scope.egress.iter().map(|egress| list(state, &egress.services)).collect::<Value>(),
        "egressListeners": listeners.collect::<Value>(),
        "services": list(state, &scope.services),
        "servicesByHostname": Value::Object(by_host.collect()),
        "destinationRules": Value::Object(rules.collect()),
    })
}

/// As istio `config.Config`.
fn config(rule: &Config<DestinationRule>) -> Value {
    json!({"type": {"group": Kind::DestinationRule.group(), "version": "v1", "kind": Kind::DestinationRule.as_str()},
        "name": &*rule.name, "namespace": &*rule.namespace, "creationTimestamp": time(rule.created),
        "Spec": serde_json::to_value(&rule.spec).unwrap_or_default()})
}

/// As istiod's `ServiceTarget`.
pub(super) fn target(state: &State, target: &ServiceTarget) -> Value {
    let mut out = of_port(&target.port);
    out["TargetPort"] = target.target_port.into();
    json!({"Service": of_service(state, &target.service), "Port": out})
}

fn of_port(port: &Port) -> Value {
    json!({"name": &*port.name, "port": port.port, "protocol": port.protocol.to_string()})
}

fn of_service(state: &State, service: &Service) -> Value {
    let cluster = state.push.settings.cluster_id.to_string();
    let addresses: Vec<&str> = match &service.cluster_ips[..] {
        [] => vec![&*service.default_address],
        all => all.iter().map(|ip| &**ip).collect(),
    };
    let exported: Map<_, _> = service.export_to.iter().map(|to| (to.to_string(), json!({}))).collect();
    let aliases =
        service.aliases.iter().map(|(host, namespace)| json!({"Hostname": &**host, "Namespace": &**namespace}));
    let passthrough: Map<_, _> = service.passthrough_ports.iter().map(|(p, to)| (p.to_string(), json!(to))).collect();
    let kind = match service.provider {
        Provider::Kubernetes => Kind::Service,
        Provider::External => Kind::ServiceEntry,
    };
    let object = state.snapshot.find(kind, &service.namespace, &service.object_name);
    let spec = object.and_then(|object| match &object.body {
        Body::Service(service) => service.spec.as_ref(),
        _ => None,
    });
    let mut out = json!({
        "Attributes": {
            "ServiceRegistry": service.provider.as_str(), "Name": &*service.name, "Namespace": &*service.namespace,
            "Labels": service.labels, "ExportTo": exported, "Visibility": visibility(service.visibility),
            "LabelSelectors": service.selector, "Aliases": aliases.collect::<Value>(),
            "ClusterExternalAddresses": {"Addresses": null}, "ClusterExternalPorts": null,
            "PassthroughTargetPorts": passthrough,
            "Type": spec.and_then(|spec| spec.type_.as_deref()).unwrap_or_default(),
            "ExternalName": &*service.external_name, "NodeLocal": service.node_local,
            "TrafficDistribution": distribution(service.traffic_distribution), "ObjectName": &*service.object_name,
            "DNSConnectStrategy": u8::from(service.races), "PublishNotReadyAddresses": service.publish_not_ready,
        },
        "hostname": &*service.hostname,
        "ports": service.ports.iter().map(of_port).collect::<Value>(),
        "serviceAccounts": service.service_accounts,
        "clusterVIPs": {"Addresses": {cluster: addresses}},
        "creationTime": time(service.created),
        "defaultAddress": &*service.default_address,
        "Resolution": resolution(service.resolution),
        "MeshExternal": service.mesh_external,
        "ResourceVersion": object.map(|object| object.resource_version.to_string()).unwrap_or_default(),
    });
    for address in &service.allocated {
        let family = if address.contains(':') { "autoAllocatedIPv6Address" } else { "autoAllocatedIPv4Address" };
        out[family] = (&**address).into();
    }
    out
}

fn of_endpoint(push: &PushContext, endpoint: &Endpoint) -> Value {
    let workload = &endpoint.workload;
    let locality = [&workload.locality.region, &workload.locality.zone, &workload.locality.subzone];
    let locality = locality.map(|part| &**part).join("/");
    json!({
        "Labels": *workload.topology_labels,
        "Addresses": endpoint.addresses.iter().map(|address| &**address).collect::<Vec<_>>(),
        "ServicePortName": &*endpoint.service_port_name,
        "LegacyClusterPortKey": 0,
        "ServiceAccount": workload.identity,
        "Network": &*workload.network,
        "Locality": {"Label": locality.trim_end_matches('/'), "ClusterID": &*push.settings.cluster_id},
        "EndpointPort": endpoint.port,
        "LbWeight": endpoint.weight,
        "TLSMode": workload.tls_mode.as_str(),
        "Namespace": &*workload.namespace,
        "WorkloadName": &*workload.workload_name,
        "HostName": &*workload.hostname,
        "SubDomain": &*workload.subdomain,
        "HealthStatus": health(endpoint.health),
        "SendUnhealthyEndpoints": push.settings.force_unhealthy,
        "NodeName": &*workload.node,
    })
}

/// The order of istiod's `ServiceVisibility` constants.
fn visibility(visibility: Visibility) -> u8 {
    match visibility {
        Visibility::Public | Visibility::VisibilityUnspecified => 0,
        Visibility::Namespace => 1,
        Visibility::None => 2,
    }
}

/// The order of istiod's `TrafficDistribution` constants.
fn distribution(distribution: TrafficDistribution) -> u8 {
    match distribution {
        TrafficDistribution::Any => 0,
        TrafficDistribution::PreferSameZone => 1,
        TrafficDistribution::PreferSameNode => 2,
    }
}

/// The order of istiod's `Resolution` constants.
fn resolution(resolution: Resolution) -> u8 {
    match resolution {
        Resolution::ClientSideLb => 0,
        Resolution::DnsLb => 1,
        Resolution::Passthrough => 2,
        Resolution::DnsRoundRobinLb => 3,
        Resolution::Alias => 4,
        Resolution::DynamicDns => 5,
    }
}

/// The order of istiod's `HealthStatus` constants; what was only written down counts as healthy.
fn health(health: Health) -> u8 {
    match health {
        Health::Unknown | Health::Healthy => 1,
        Health::Unhealthy => 2,
        Health::Draining => 3,
        Health::Terminating => 4,
    }
}

/// RFC 3339, as Go writes times.
pub(super) fn time(unix_seconds: i64) -> String {
    // Days since 1970 with years starting in March, so that the leap day is the last.
    let (days, seconds) = (unix_seconds.div_euclid(86_400) + 719_468, unix_seconds.rem_euclid(86_400));
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_go_writes_them() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_709_208_001), "2024-02-29T12:00:01Z");
        assert_eq!(time(1_735_689_599), "2024-12-31T23:59:59Z");
    }
}
