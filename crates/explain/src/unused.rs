//! Rules that seem to be for a request and do nothing for it: VirtualServices and DestinationRules of its host, each with the reason.

use std::fmt;

use config_store::{Body, Key, Kind};
use istio_api::{DestinationRule, VirtualService};
use mesh_types::selects;
use push_context::host;
use registry::Service;

use crate::mesh::{Mesh, Pod};
use crate::trace::{Source, Step};
use crate::{origin, scope};

/// Why a rule does nothing, and what mends it. Doctor says the same of whole meshes.
pub struct Reason {
    /// In one sentence without its subject.
    pub why: String,
    /// What to do about it.
    pub mend: String,
}

/// Of a VirtualService that no sidecar follows at all.
pub fn gateways_only(rule: &VirtualService) -> Option<Reason> {
    let only = !rule.gateways.is_empty() && !rule.gateways.iter().any(|gateway| gateway == "mesh");
    only.then(|| Reason {
        why: format!("it is for gateways only ({})", rule.gateways.join(", ")),
        mend: "add mesh to spec.gateways, if requests within the mesh are meant, too".to_owned(),
    })
}

/// Of HTTP rules of a service's port that is declared as TCP.
pub fn hidden_by_port(service: &Service, port: u16) -> Option<Reason> {
    let port = service.port(port).filter(|port| port.protocol == mesh_types::Protocol::Tcp)?;
    let why = format!(
        "its HTTP rules do not apply to port {} of {}, which is declared as TCP by its name {:?}",
        port.port, service.hostname, port.name
    );
    Some(Reason { why, mend: format!("name the port http-{} (or add appProtocol: http)", port.name) })
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.why, self.mend)
    }
}

/// A client, and the service and port that it asks.
pub(crate) struct Asked<'a> {
    pub(crate) mesh: &'a Mesh,
    pub(crate) pod: &'a Pod,
    pub(crate) service: &'a Service,
    pub(crate) port: u16,
}

impl Asked<'_> {
    /// Why the proxy does not see the service; else a step for each rule that is not used.
    pub(crate) fn all(&self) -> Vec<Step> {
        scope::hidden(self.mesh, self.pod, self.service).map_or_else(|| self.steps(), |hidden| vec![hidden])
    }

    fn steps(&self) -> Vec<Step> {
        let mut out = Vec::new();
        for (kind, used) in [
            (Kind::VirtualService, self.virtual_services()),
            (Kind::DestinationRule, self.destination_rule().into_iter().collect()),
        ] {
            for object in self.mesh.files.snapshot.list(kind).filter(|object| !used.contains(&object.key)) {
                let key = &object.key;
                let reason = match &object.body {
                    Body::VirtualService(rule) => self.of_virtual_service(key, rule, used.first()),
                    Body::DestinationRule(rule) => self.of_destination_rule(key, rule, used.first()),
                    _ => None,
                };
                out.extend(
                    reason.map(|(why, source)| Step::new("not used", format!("{key}: {why}")).source(Some(source))),
                );
            }
        }
        out
    }

    /// Those whose routes the proxy has for the service's port.
    fn virtual_services(&self) -> Vec<Key> {
        let configuration = self.mesh.configuration(self.pod);
        let tables = [self.port.to_string(), format!("{}:{}", self.service.hostname, self.port)];
        let hosts =
            tables.iter().filter_map(|name| configuration.tables.get(name.as_str())).flat_map(|t| t.virtual_hosts());
        let own = hosts.filter(|vhost| vhost.domains.iter().any(|domain| **domain == *self.service.hostname));
        own.flat_map(|vhost| &vhost.routes).filter_map(|route| origin::key_of_metadata(&route.metadata)).collect()
    }

    fn destination_rule(&self) -> Option<Key> {
        let scope = self.mesh.files.push.scope(&self.pod.node);
        let rule = scope.destination_rule(&self.pod.node, &self.service.hostname, true)?;
        Some(Key::new(Kind::DestinationRule, &rule.namespace, &rule.name))
    }

    /// Whether a host in a rule means the service; otherwise why it does not, though it is written as if it did.
    fn means(&self, written: &str, key: &Key) -> Result<bool, String> {
        let resolved = host::resolve(written, &key.namespace, &self.mesh.files.push.settings.domain);
        if host::matches(&resolved, &self.service.hostname) {
            return Ok(true);
        }
        let is_short = written == &*self.service.name && !written.contains('.');
        let exists = self.mesh.files.push.registry.services.iter().any(|service| *service.hostname == *resolved);
        match is_short && !exists {
            true => Err(format!(
                "its host {written} means {resolved}, which is no service; write {}",
                self.service.hostname
            )),
            false => Ok(false),
        }
    }

    fn of_virtual_service(&self, key: &Key, rule: &VirtualService, winner: Option<&Key>) -> Option<(String, Source)> {
        let at = |field: &str, why: String| Some((why, self.mesh.source(key, field)));
        let means: Vec<_> = rule.hosts.iter().map(|written| self.means(written, key)).collect();
        if !means.contains(&Ok(true)) {
            let (index, why) = means.into_iter().enumerate().find_map(|(index, one)| Some((index, one.err()?)))?;
            return at(&format!("spec.hosts[{index}]"), why);
        }
        if let Some(reason) = gateways_only(rule) {
            // One for all hosts is meant for what comes from outside.
            let named = rule.hosts.iter().any(|host| host != "*");
            return named.then(|| at("spec.gateways", reason.to_string())).flatten();
        }
        let default = &self.mesh.files.push.mesh.default_virtual_service_export_to;
        if let Some((why, source)) = self.hidden(key, &rule.export_to, default, "defaultVirtualServiceExportTo") {
            return Some((why, source));
        }
        let scope = self.mesh.files.push.scope(&self.pod.node);
        let mut imported = scope.egress.iter().flat_map(|egress| &egress.virtual_services);
        if let Some(sidecar) = &scope.sidecar
            && !imported.any(|own| *own.name == *key.name && *own.namespace == *key.namespace)
        {
            let sidecar = Key::new(Kind::Sidecar, &sidecar.namespace, &sidecar.name);
            let why = format!(
                "{sidecar} does not import it; {}/{} in spec.egress would",
                key.namespace,
                rule.hosts.join(", ")
            );
            return Some((why, self.mesh.source(&sidecar, "spec.egress")));
        }
        if let Some(reason) = hidden_by_port(self.service, self.port) {
            // Its routes of connections leave no trace in the tables, and may well be used.
            let index = self.service.ports.iter().position(|port| port.port == self.port)?;
            let source = self.mesh.service_source(self.service, &format!("spec.ports[{index}]"));
            return (!rule.http.is_empty()).then(|| (reason.to_string(), source));
        }
        if rule.http.is_empty() {
            let why = format!("it has no HTTP routes, and port {} speaks HTTP", self.port);
            return (self.service.port(self.port)?.protocol.is_http()).then(|| at("spec", why)).flatten();
        }
        match winner {
            Some(winner) => at(
                "spec.hosts",
                format!("{} is for the same host and comes first; put both into one", self.named(winner)),
            ),
            None => at("spec.http", format!("none of its routes is for port {} and this client", self.port)),
        }
    }

    fn of_destination_rule(&self, key: &Key, rule: &DestinationRule, winner: Option<&Key>) -> Option<(String, Source)> {
        let push = &self.mesh.files.push;
        let at = |field: &str, why: String| Some((why, self.mesh.source(key, field)));
        match self.means(&rule.host, key) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(why) => return at("spec.host", why),
        }
        if let Some(selector) = &rule.workload_selector {
            if *key.namespace != *self.pod.namespace {
                return at(
                    "spec.workloadSelector",
                    format!("its workloadSelector is for pods of namespace {} only", key.namespace),
                );
            }
            if !selects(&selector.match_labels, &self.pod.labels) {
                return at("spec.workloadSelector", "its workloadSelector does not fit the client".to_owned());
            }
        }
        let default = &push.mesh.default_destination_rule_export_to;
        if let Some(hidden) = self.hidden(key, &rule.export_to, default, "defaultDestinationRuleExportTo") {
            return Some(hidden);
        }
        let looked_up = [&self.pod.namespace[..], &self.service.namespace, &push.root_namespace];
        if !looked_up.contains(&&*key.namespace) {
            let [client, server, root] = looked_up;
            let why = format!(
                "rules are looked for in the namespaces of client ({client}) and service ({server}) and in {root}, not in {}",
                key.namespace
            );
            return at("metadata.namespace", why);
        }
        let winner = winner?;
        let Body::DestinationRule(first) = &self.mesh.files.snapshot.get(winner)?.body else { return None };
        let resolved =
            |rule: &DestinationRule, key: &Key| host::resolve(&rule.host, &key.namespace, &push.settings.domain);
        let is_merged = winner.namespace == key.namespace && resolved(first, winner) == resolved(rule, key);
        if !is_merged || rule.workload_selector != first.workload_selector {
            return at("spec.host", format!("{} comes first", self.named(winner)));
        }
        // Of rules for one host in one namespace the oldest holds, with what the others have beyond it.
        let lost = rule.subsets.iter().position(|own| first.subsets.iter().any(|other| other.name == own.name));
        match (rule.traffic_policy.is_some() && first.traffic_policy.is_some(), lost) {
            (true, _) => {
                at("spec.trafficPolicy", format!("the trafficPolicy of {}, which is older, holds", self.named(winner)))
            }
            (false, Some(index)) => {
                let name = &rule.subsets[index].name;
                at(
                    &format!("spec.subsets[{index}]"),
                    format!("subset {name} of {}, which is older, holds", self.named(winner)),
                )
            }
            (false, None) => None,
        }
    }

    /// Of a rule that is not exported to the client. `default` is what the mesh says where the rule says nothing.
    fn hidden(&self, key: &Key, export_to: &[String], default: &[String], setting: &str) -> Option<(String, Source)> {
        let list = if export_to.is_empty() { default } else { export_to };
        let sees = |to: &String| {
            to == "*" || *to == self.pod.namespace || (to == "." && *key.namespace == *self.pod.namespace)
        };
        if list.is_empty() || list.iter().any(sees) {
            return None;
        }
        let why = format!("it is exported to {} only, and the client is in {}", list.join(", "), self.pod.namespace);
        let source = if export_to.is_empty() { self.mesh.files.mesh_source(setting) } else { None };
        Some((why, source.unwrap_or_else(|| self.mesh.source(key, "spec.exportTo"))))
    }

    /// An object with its line.
    fn named(&self, key: &Key) -> String {
        let source = self.mesh.source(key, "");
        if source.place.is_empty() { source.object } else { format!("{} ({})", source.object, source.place) }
    }
}
