use std::sync::Arc;

use mesh_types::{Labels, Protocol, selects};

use crate::kubernetes::{entry_port, target_port};
use crate::service::TargetPort;
use crate::{Port, Provider, Registry, Resolution, Service, ServiceTarget, Workload};

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
    /// The proxy says that it is of another cluster, of which our Kubernetes objects say nothing.
    pub elsewhere: bool,
}

impl Registry {
    /// The pod that a proxy stands beside, or the WorkloadEntry.
    pub fn workload(&self, query: &ProxyQuery<'_>) -> Option<&Arc<Workload>> {
        self.workloads.pod(query.namespace, query.name).filter(|_| !query.elsewhere).or_else(|| {
            let at = query.addresses.first().and_then(|a| self.workloads.by_address.get(a.as_str()))?;
            let own =
                |w: &&Arc<Workload>| &*w.namespace == query.namespace && !w.finished && !(w.is_pod && query.elsewhere);
            at.iter().filter(own).min_by_key(|w| (!w.is_pod, &*w.name != query.name))
        })
    }

    /// The service ports that the proxy's own workload serves, oldest service first.
    ///
    /// As istiod `GetProxyServiceTargets` of both registries and `Proxy.SetServiceTargets`: Kubernetes services by
    /// selector over the WorkloadEntry's or the pod's labels (or over reported labels while the pod is unknown), if
    /// none then services without selector by address; and ServiceEntries by address.
    pub fn targets(&self, query: &ProxyQuery<'_>) -> Vec<ServiceTarget> {
        let mut out = Vec::new();
        let entry = self.entry_of(query);
        let pod = self.workload(query).filter(|w| w.is_pod);
        let (namespace, labels) = match (entry, pod) {
            (Some(entry), _) => (&*entry.namespace, &*entry.topology_labels),
            (None, Some(pod)) => (&*pod.namespace, &*pod.labels),
            (None, None) => (query.namespace, query.labels),
        };
        let own = |s: &&Arc<Service>| {
            s.provider == Provider::Kubernetes
                && !query.elsewhere
                && s.resolution != Resolution::Alias
                && *s.namespace == *namespace
                && !s.selector.is_empty()
                && selects(&s.selector, labels)
        };
        let mut selected = self.services.iter().filter(own).peekable();
        if selected.peek().is_none() && entry.is_none() && pod.is_some() {
            for service in &self.services {
                if service.provider == Provider::Kubernetes && *service.namespace == *namespace {
                    self.by_address(service, &query.addresses[..query.addresses.len().min(1)], &mut out);
                }
            }
        }
        for service in selected {
            match entry {
                Some(entry) if service.resolution == Resolution::ClientSideLb => {
                    let tcp = service.ports.iter().filter(|p| p.protocol != Protocol::Udp);
                    let target = |port: &Port| Some((port.clone(), entry_port(port, entry)?));
                    push(service, tcp.filter_map(target), &mut out);
                }
                Some(_) => {}
                None => by_selector(service, pod, &mut out),
            }
        }
        for service in &self.services {
            if service.provider == Provider::External && *service.namespace == *query.namespace {
                self.by_address(service, query.addresses, &mut out);
            }
        }
        out.sort_by(|a, b| (a.service.created, &a.service.hostname).cmp(&(b.service.created, &b.service.hostname)));
        out
    }

    /// The WorkloadEntry at the proxy's first address: of its name, of its namespace, any.
    fn entry_of(&self, query: &ProxyQuery<'_>) -> Option<&Arc<Workload>> {
        let at = query.addresses.first().and_then(|a| self.workloads.by_address.get(a.as_str()))?;
        let rank = |w: &&Arc<Workload>| {
            let own = &*w.namespace == query.namespace;
            (!(own && &*w.name == query.name), !own, w.namespace.clone(), w.name.clone())
        };
        at.iter().filter(|w| !w.is_pod).min_by_key(rank)
    }

    fn by_address(&self, service: &Arc<Service>, addresses: &[String], out: &mut Vec<ServiceTarget>) {
        for endpoint in self.endpoints(&service.hostname, &service.namespace) {
            if !endpoint.addresses.first().is_some_and(|a| addresses.iter().any(|q| **q == **a)) {
                continue;
            }
            for port in service.ports.iter().filter(|p| p.name == endpoint.service_port_name) {
                out.push(ServiceTarget { service: service.clone(), port: port.clone(), target_port: endpoint.port });
            }
        }
    }
}

fn by_selector(service: &Arc<Service>, pod: Option<&Arc<Workload>>, out: &mut Vec<ServiceTarget>) {
    let target = |port: &Port| match (pod, &port.target) {
        (Some(pod), _) => Some((port.clone(), target_port(port, pod)?)),
        (None, TargetPort::Number(number)) => Some((port.clone(), *number)),
        (None, TargetPort::Name(_)) => None,
    };
    // Of several ports that lead to one place by one protocol the first is enough.
    let mut seen = Vec::new();
    let fresh = |(port, target): &(Port, u16)| {
        let key = (port.protocol, *target);
        let fresh = !seen.contains(&key);
        seen.push(key);
        fresh
    };
    push(service, service.ports.iter().filter_map(target).filter(fresh), out);
}

fn push(service: &Arc<Service>, ports: impl Iterator<Item = (Port, u16)>, out: &mut Vec<ServiceTarget>) {
    out.extend(ports.map(|(port, target_port)| ServiceTarget { service: service.clone(), port, target_port }));
}
