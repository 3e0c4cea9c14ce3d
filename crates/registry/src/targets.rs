use std::sync::Arc;

use mesh_types::{Labels, selects};

use crate::kubernetes::target_port;
use crate::service::TargetPort;
use crate::{Provider, Registry, Resolution, Service, ServiceTarget, Workload};

/// What a proxy says about itself when asking which services it serves.
#[derive(Clone, Copy, Debug)]
pub struct ProxyQuery<'a> {
    /// Pod name.
    pub name: &'a str,
    /// Pod namespace.
    pub namespace: &'a str,
    /// Its addresses.
    pub addresses: &'a [String],
    /// Pod labels as the proxy reports them; used when the pod itself is not known.
    pub labels: &'a Labels,
}

impl Registry {
    /// The pod or WorkloadEntry that a proxy stands beside.
    pub fn workload(&self, query: &ProxyQuery<'_>) -> Option<&Arc<Workload>> {
        let by_name = |w: &&Arc<Workload>| &*w.name == query.name && &*w.namespace == query.namespace;
        let by_address = |w: &&Arc<Workload>| {
            &*w.namespace == query.namespace
                && !w.finished
                && w.addresses.first().is_some_and(|a| query.addresses.iter().any(|q| **q == **a))
        };
        self.workloads.iter().find(by_name).or_else(|| self.workloads.iter().find(by_address))
    }

    /// The service ports that the proxy's own workload serves, oldest service first.
    ///
    /// As istiod `GetProxyServiceTargets` of both registries and `Proxy.SetServiceTargets`: Kubernetes
    /// services by selector over the pod's labels (or over reported labels while the pod is unknown),
    /// headless services without selector and ServiceEntries by address.
    pub fn targets(&self, query: &ProxyQuery<'_>) -> Vec<ServiceTarget> {
        let workload = self.workload(query);
        let labels = workload.map_or(query.labels, |w| &w.labels);
        let mut out = Vec::new();
        for service in &self.services {
            match service.provider {
                Provider::Kubernetes if service.resolution == Resolution::Alias => {}
                Provider::Kubernetes if service.selector.is_empty() => self.by_address(service, query, &mut out),
                Provider::Kubernetes => {
                    if &*service.namespace == query.namespace && selects(&service.selector, labels) {
                        by_selector(service, workload, &mut out);
                    }
                }
                Provider::External => self.by_address(service, query, &mut out),
            }
        }
        out.sort_by(|a, b| (a.service.created, &a.service.hostname).cmp(&(b.service.created, &b.service.hostname)));
        out
    }

    fn by_address(&self, service: &Arc<Service>, query: &ProxyQuery<'_>, out: &mut Vec<ServiceTarget>) {
        if service.provider == Provider::External && &*service.namespace != query.namespace {
            return;
        }
        for endpoint in self.endpoints(&service.hostname, &service.namespace) {
            if !endpoint.addresses.first().is_some_and(|a| query.addresses.iter().any(|q| **q == **a)) {
                continue;
            }
            for port in service.ports.iter().filter(|p| p.name == endpoint.service_port_name) {
                out.push(ServiceTarget { service: service.clone(), port: port.clone(), target_port: endpoint.port });
            }
        }
    }
}

fn by_selector(service: &Arc<Service>, workload: Option<&Arc<Workload>>, out: &mut Vec<ServiceTarget>) {
    for port in &service.ports {
        let number = match (workload, &port.target) {
            (Some(workload), _) => target_port(port, workload),
            (None, TargetPort::Number(number)) => Some(*number),
            (None, TargetPort::Name(_)) => None,
        };
        if let Some(target_port) = number {
            out.push(ServiceTarget { service: service.clone(), port: port.clone(), target_port });
        }
    }
}
