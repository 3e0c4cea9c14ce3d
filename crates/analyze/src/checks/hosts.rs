//! Which hosts there are, and who may see them.

use std::collections::BTreeMap;

use istio_api::ServiceEntry;

use crate::world::{NETWORKING, World, full_host};

/// What a host offers.
#[derive(Clone, Debug, Default)]
pub(super) struct Host {
    pub(super) ports: Vec<u32>,
    /// Of the ServiceEntry's workloads.
    pub(super) selector: mesh_types::Labels,
}

/// Hosts of Services and ServiceEntries by the namespace that sees them (`*` for all) and name.
pub(super) struct Hosts(BTreeMap<(String, String), Host>);

/// Namespaces that an `exportTo` means; `*` alone if it means all.
pub(super) fn scopes(export_to: &[String], namespace: &str) -> Vec<String> {
    if export_to.is_empty() || export_to.iter().any(|to| to == "*") {
        return vec!["*".to_owned()];
    }
    let mut out: Vec<String> =
        export_to.iter().map(|to| if to == "." { namespace.to_owned() } else { to.clone() }).collect();
    out.sort();
    out.dedup();
    out
}

impl Hosts {
    pub(super) fn of(world: &World<'_>) -> Hosts {
        let mut out = BTreeMap::new();
        for (resource, spec) in world.specs::<ServiceEntry>(NETWORKING, "ServiceEntry") {
            let host = Host {
                ports: spec.ports.iter().map(|port| port.number).collect(),
                selector: spec.workload_selector.map(|s| s.labels).unwrap_or_default(),
            };
            for scope in scopes(&spec.export_to, resource.namespace) {
                for name in &spec.hosts {
                    out.insert((scope.clone(), full_host(name, resource.namespace)), host.clone());
                }
            }
        }
        for resource in world.all("", "Service") {
            let number = |port: &serde_json::Value| port["port"].as_u64().and_then(|n| u32::try_from(n).ok());
            let host = Host {
                ports: resource.list("/spec/ports").iter().filter_map(number).collect(),
                selector: mesh_types::Labels::new(),
            };
            let export_to: Vec<String> = resource
                .annotations
                .get("networking.istio.io/exportTo")
                .map(|text| text.split(',').map(|to| to.trim().to_owned()).collect())
                .unwrap_or_default();
            for scope in scopes(&export_to, resource.namespace) {
                out.insert((scope, full_host(resource.name, resource.namespace)), host.clone());
            }
        }
        Hosts(out)
    }

    /// What a rule in `namespace`, exported so, means by a host (istioctl `GetDestinationHost`).
    pub(super) fn find(&self, host: &str, namespace: &str, export_to: &[String]) -> Option<&Host> {
        let name = full_host(host, namespace);
        let get = |scope: &str| self.0.get(&(scope.to_owned(), name.clone()));
        let exported = || match export_to.is_empty() {
            true => get(namespace),
            false => export_to.iter().find_map(|to| get(if to == "." { namespace } else { to })),
        };
        get("*").or_else(exported).or_else(|| {
            let bare = host.strip_prefix('*').unwrap_or(host);
            let mut wild = self.0.iter().filter(|((scope, _), _)| scope == "*" || scope == namespace);
            let fits = |name: &str| name.strip_prefix('*').is_some_and(|suffix| bare.ends_with(suffix));
            wild.find(|((_, name), _)| fits(name)).map(|(_, host)| host)
        })
    }
}
