//! What the agent's DNS proxy answers (istio `pkg/dns/server/name_table.go`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_api::istio::{NameInfo, NameTable};
use registry::{Health, Provider, Resolution, Service, UNSPECIFIED_IP};

use crate::context::Context;

/// Names of all services that the proxy may see.
pub(crate) fn build(cx: &Context<'_>) -> NameTable {
    let mut table: BTreeMap<String, NameInfo> = BTreeMap::new();
    for service in cx.scope.egress.iter().flat_map(|e| &e.services) {
        let own = cx.service_addresses(service);
        let mut ips: Vec<String> = Vec::new();
        if own.contains(&UNSPECIFIED_IP) {
            if service.resolution == Resolution::Passthrough && !service.ports.is_empty() {
                headless(cx, service, &mut ips, &mut table);
            }
        } else {
            ips.extend(own.iter().filter(|a| a.parse::<IpAddr>().is_ok()).map(|a| (*a).to_owned()));
        }
        if ips.is_empty() {
            continue;
        }
        let is_kubernetes = service.provider == Provider::Kubernetes;
        let info = |ips| NameInfo {
            ips,
            registry: service.provider.as_str().to_owned(),
            shortname: if is_kubernetes { service.name.to_string() } else { String::new() },
            namespace: if is_kubernetes { service.namespace.to_string() } else { String::new() },
        };
        match table.get_mut(&*service.hostname) {
            None => {
                table.insert(service.hostname.to_string(), info(ips));
            }
            Some(existing) if existing.registry != Provider::Kubernetes.as_str() => {
                if is_kubernetes {
                    *existing = info(ips);
                } else {
                    existing.ips.extend(ips);
                }
            }
            Some(_) => {}
        }
    }
    NameTable { table }
}

/// Addresses of the pods, and a name of its own for each pod of a StatefulSet.
fn headless(cx: &Context<'_>, service: &Service, ips: &mut Vec<String>, table: &mut BTreeMap<String, NameInfo>) {
    let mut seen: Vec<&str> = Vec::new();
    let mut of_pods: BTreeMap<String, NameInfo> = BTreeMap::new();
    for endpoint in cx.push.registry.endpoints(&service.hostname, &service.namespace) {
        let (own, theirs) = (&cx.node.network, &endpoint.workload.network);
        let near = own.is_empty() || theirs.is_empty() || own == theirs;
        let usable = near && endpoint.is_ip() && (service.publish_not_ready || endpoint.health == Health::Healthy);
        let Some(first) = endpoint.addresses.first().filter(|a| usable && !seen.contains(&&***a)) else { continue };
        seen.push(first);
        let addresses = || endpoint.addresses.iter().map(|a| a.to_string());
        let workload = &endpoint.workload;
        if !workload.subdomain.is_empty() {
            let Some((_, domain)) = service.hostname.split_once('.') else { continue };
            let short = format!("{}.{}", workload.hostname, workload.subdomain);
            let entry = of_pods.entry(format!("{short}.{domain}")).or_insert_with(|| NameInfo {
                ips: Vec::new(),
                registry: service.provider.as_str().to_owned(),
                shortname: short,
                namespace: service.namespace.to_string(),
            });
            entry.ips.extend(addresses());
        }
        ips.extend(addresses());
    }
    // What an earlier service said of the same pod is forgotten.
    table.extend(of_pods);
}
