//! Destinations of routes that lead nowhere: where the destination is written, and what is wrong with it.

use config_store::{Body, Key, Kind};
use mesh_types::{Labels, selects};
use proxy_core::route::Matched;
use push_context::host;
use registry::Service;
use serde_json::Value;

use crate::mesh::{Mesh, Pod};
use crate::origin;
use crate::trace::Source;
use crate::vacancy::{self, Vacancy};

/// A cluster of a service, by its name: `outbound|PORT|SUBSET|HOST`.
pub(crate) struct Destination<'n> {
    port: u16,
    subset: &'n str,
    host: &'n str,
}

impl<'n> Destination<'n> {
    /// `None` for clusters of other kinds.
    pub(crate) fn of(cluster: &'n str) -> Option<Self> {
        let ["outbound", port, subset, host] = cluster.splitn(4, '|').collect::<Vec<_>>()[..] else { return None };
        Some(Self { port: port.parse().ok()?, subset, host })
    }

    /// Why the proxy has no such cluster.
    pub(crate) fn unknown(&self, mesh: &Mesh, pod: Option<&Pod>, matched: Option<&Matched>) -> Option<Vacancy> {
        let host = self.host;
        let route = matched.and_then(|matched| self.written(mesh, matched));
        let at = |field: &str, why: String| {
            let (key, destination) = route.as_ref()?;
            let source = mesh.files.written(key, &format!("{destination}.{field}"));
            Some(Vacancy { why, source: source.unwrap_or_else(|| mesh.source(key, destination)) })
        };
        let Some(service) = self.service(mesh) else {
            return at(
                "host",
                format!("a route leads to {host}, which is no service; a ServiceEntry would make it one"),
            );
        };
        if service.port(self.port).is_none() {
            let why = format!("a route leads to port {} of {host}, which has {}", self.port, vacancy::ports(service));
            return at("port.number", why);
        }
        if self.subset.is_empty() {
            return at("host", format!("a route leads to {host}, which the proxy does not see"));
        }
        let rule = pod.and_then(|pod| {
            let scope = mesh.files.push.scope(&pod.node);
            scope.destination_rule(&pod.node, &service.hostname, true).cloned()
        });
        let why = match rule {
            None => format!("a route leads to subset {} of {host}, for which no DestinationRule holds", self.subset),
            Some(rule) => {
                let names: Vec<String> = rule.spec.subsets.iter().map(|subset| subset.name.clone()).collect();
                let has = if names.is_empty() { "none".to_owned() } else { vacancy::shown(&names) };
                let place = mesh.source(&Key::new(Kind::DestinationRule, &rule.namespace, &rule.name), "spec.subsets");
                format!("a route leads to subset {} of {host}; the subsets of its {place}, are {has}", self.subset)
            }
        };
        at("subset", why)
    }

    /// Why the cluster has no endpoint that may be chosen. `rule` is its DestinationRule.
    pub(crate) fn empty(&self, mesh: &Mesh, rule: Option<&Key>) -> Option<Vacancy> {
        let service = self.service(mesh)?;
        if let Some(vacancy) = vacancy::of_port(mesh, service, self.port) {
            return Some(vacancy);
        }
        let key = rule?;
        let (index, wanted) = subset(mesh, key, self.subset)?;
        let endpoints = || mesh.files.push.registry.endpoints_by_port(service, self.port);
        let mut fit = endpoints().filter(|endpoint| selects(&wanted, &endpoint.workload.labels)).peekable();
        let object = format!("subset {} of {key}", self.subset);
        let source = mesh.source(key, &format!("spec.subsets[{index}].labels"));
        if fit.peek().is_some() {
            let names: Vec<String> =
                fit.map(|endpoint| format!("{}.{}", endpoint.workload.name, endpoint.workload.namespace)).collect();
            return Some(Vacancy {
                why: format!("{object} has no ready pod among {}", vacancy::shown(&names)),
                source,
            });
        }
        let mut seen: Vec<String> = wanted
            .keys()
            .flat_map(|key| endpoints().filter_map(move |e| Some(format!("{key}: {}", e.workload.labels.get(key)?))))
            .collect();
        seen.sort();
        seen.dedup();
        let instead = match seen.is_empty() {
            true => "have no such label".to_owned(),
            false => format!("have {}", vacancy::shown(&seen)),
        };
        let why = format!(
            "{object} wants {}, which no pod of {} has; its pods {instead}",
            vacancy::labels(&wanted),
            self.host
        );
        Some(Vacancy { why, source })
    }

    fn service<'m>(&self, mesh: &'m Mesh) -> Option<&'m Service> {
        mesh.files.push.registry.services.iter().find(|service| *service.hostname == *self.host).map(|found| &**found)
    }

    /// The destination in the object that the route is from, or the route where it cannot be told.
    fn written(&self, mesh: &Mesh, matched: &Matched) -> Option<(Key, String)> {
        let (key, field) = origin::of_route(&matched.route.metadata)?;
        let spec = &mesh.files.document(&key)?.value["spec"];
        let index: Option<usize> = field
            .strip_prefix("spec.http[")
            .and_then(|rest| rest.strip_suffix(']'))
            .and_then(|index| index.parse().ok());
        let all = index.and_then(|index| spec.pointer(&format!("/http/{index}/route"))?.as_array());
        let domain = &mesh.files.push.settings.domain;
        let is_meant = |to: &Value| {
            let text = |path: &str| to.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let port = to.pointer("/destination/port/number").and_then(Value::as_u64);
            host::resolve(text("/destination/host"), &key.namespace, domain) == self.host
                && text("/destination/subset") == self.subset
                && port.is_none_or(|port| port == u64::from(self.port))
        };
        let part = all.and_then(|all| all.iter().position(is_meant));
        let field = part.map_or(field.clone(), |part| format!("{field}.route[{part}].destination"));
        Some((key, field))
    }
}

/// Where a DestinationRule says something of a cluster: for its subset and port, its subset, its port, or for all.
pub(crate) fn policy(mesh: &Mesh, rule: &Key, cluster: &str, field: &str) -> Option<Source> {
    let Destination { port, subset: name, .. } = Destination::of(cluster)?;
    let of_subset = subset(mesh, rule, name).map(|(index, _)| format!("spec.subsets[{index}].trafficPolicy"));
    let spec = &mesh.files.document(rule)?.value;
    let mut paths = Vec::new();
    for path in of_subset.into_iter().chain(["spec.trafficPolicy".to_owned()]) {
        let pointer = format!("/{}/portLevelSettings", path.replace(['.', '['], "/").replace(']', ""));
        let levels = spec.pointer(&pointer).and_then(Value::as_array);
        let is_own = |level: &Value| level.pointer("/port/number").and_then(Value::as_u64) == Some(u64::from(port));
        // What is said of a port replaces all that is said around it (istiod `MergeSubsetTrafficPolicy`).
        let Some(index) = levels.and_then(|levels| levels.iter().position(is_own)) else {
            paths.push(format!("{path}.{field}"));
            continue;
        };
        paths.push(format!("{path}.portLevelSettings[{index}].{field}"));
        break;
    }
    paths.iter().find_map(|path| mesh.files.written(rule, path))
}

/// A subset of a DestinationRule: its place among the others, and the labels that it selects.
pub(crate) fn subset(mesh: &Mesh, rule: &Key, name: &str) -> Option<(usize, Labels)> {
    let Body::DestinationRule(spec) = &mesh.files.snapshot.get(rule)?.body else { return None };
    let index = spec.subsets.iter().position(|own| own.name == name)?;
    Some((index, spec.subsets[index].labels.clone()))
}
