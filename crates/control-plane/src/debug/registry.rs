//! Services and endpoints as istiod prints them: its Go structs (pilot/pkg/model/service.go) as `encoding/json` writes them.

use std::collections::{BTreeMap, BTreeSet};

use mesh_types::Protocol;
use push_context::{PushContext, SidecarScope};
use registry::{Endpoint, Health, Port, Resolution, Service};
use serde_json::{Map, Value, json};

/// All services.
pub(super) fn services(push: &PushContext) -> Value {
    push.registry.services.iter().map(|service| of_service(push, service)).collect()
}

/// `HOST:PORT_NAME` and its endpoints, for each port of each service.
pub(super) fn endpoints(push: &PushContext) -> Value {
    let ports = push.registry.services.iter().flat_map(|service| service.ports.iter().map(move |port| (service, port)));
    let row = |(service, port): (&std::sync::Arc<Service>, &Port)| {
        let endpoints = push.registry.endpoints_by_port(service, port.port).map(|endpoint| of_endpoint(push, endpoint));
        json!({"svc": format!("{}:{}", service.hostname, port.name), "ep": endpoints.collect::<Value>()})
    };
    ports.map(row).collect()
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

/// What one proxy may see.
pub(super) fn scope(push: &PushContext, scope: &SidecarScope) -> Value {
    let listeners = scope.egress.iter().map(|egress| {
        let services: Vec<_> = egress.services.iter().map(|service| &*service.hostname).collect();
        let virtual_services: Vec<_> =
            egress.virtual_services.iter().map(|config| format!("{}/{}", config.namespace, config.name)).collect();
        json!({"istioListener": serde_json::to_value(&egress.listener).unwrap_or_default(),
            "services": services, "virtualServices": virtual_services})
    });
    let sidecar = scope.sidecar.as_ref().map(|config| serde_json::to_value(&config.spec).unwrap_or_default());
    json!({
        "name": &*scope.name, "namespace": &*scope.namespace, "sidecar": sidecar,
        "outboundTrafficPolicy": serde_json::to_value(&scope.outbound_policy).unwrap_or_default(),
        "egressListeners": listeners.collect::<Value>(),
        "services": scope.services.iter().map(|service| of_service(push, service)).collect::<Value>(),
    })
}

fn of_service(push: &PushContext, service: &Service) -> Value {
    let ports = service
        .ports
        .iter()
        .map(|port| json!({"name": &*port.name, "port": port.port, "protocol": protocol(port.protocol)}));
    let cluster = push.settings.cluster_id.to_string();
    let addresses: Vec<&str> = match &service.cluster_ips[..] {
        [] => vec![&*service.default_address],
        all => all.iter().map(|ip| &**ip).collect(),
    };
    let exported: Map<_, _> = service.export_to.iter().map(|to| (to.to_string(), json!({}))).collect();
    json!({
        "Attributes": {
            "ServiceRegistry": service.provider.as_str(), "Name": &*service.name, "Namespace": &*service.namespace,
            "Labels": service.labels, "ExportTo": exported, "LabelSelectors": service.selector,
        },
        "hostname": &*service.hostname,
        "ports": ports.collect::<Value>(),
        "serviceAccounts": service.service_accounts,
        "clusterVIPs": {"Addresses": {cluster: addresses}},
        "creationTime": time(service.created),
        "defaultAddress": &*service.default_address,
        "Resolution": resolution(service.resolution),
        "MeshExternal": service.mesh_external,
    })
}

fn of_endpoint(push: &PushContext, endpoint: &Endpoint) -> Value {
    let workload = &endpoint.workload;
    let locality = [&workload.locality.region, &workload.locality.zone, &workload.locality.subzone];
    let locality = locality.map(|part| &**part).join("/");
    json!({
        "Labels": *workload.topology_labels,
        "Addresses": endpoint.addresses.iter().map(|address| &**address).collect::<Vec<_>>(),
        "ServicePortName": &*endpoint.service_port_name,
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
        "NodeName": &*workload.node,
    })
}

/// As istio pkg/config/protocol, `Instance.MarshalText`.
fn protocol(protocol: Protocol) -> String {
    protocol.to_string()
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
