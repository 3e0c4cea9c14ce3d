//! Checks of objects. Pure.

use std::collections::BTreeMap;

use config_store::{Body, Key, Kind, Object};
use explain::{Files, unused};
use mesh_types::{Labels, Protocol, selects};
use push_context::{MtlsMode, host};
use registry::{Endpoint, Health, Service, TlsMode};
use serde_json::Value;

use crate::Finding;

/// All of them.
pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let checks = Checks { files };
    let mut out = Vec::new();
    checks.refused(&mut out);
    checks.destinations(&mut out);
    checks.ports(&mut out);
    checks.mutual_tls(&mut out);
    checks.duplicates(&mut out);
    checks.policies(&mut out);
    checks.selectors(&mut out);
    checks.gateways(&mut out);
    out
}

struct Checks<'a> {
    files: &'a Files,
}

fn list<'v>(value: &'v Value, path: &str) -> &'v [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'v>(value: &'v Value, path: &str) -> &'v str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn labels(value: Option<&Value>) -> Labels {
    value.and_then(|value| serde_json::from_value(value.clone()).ok()).unwrap_or_default()
}

fn named(labels: &Labels) -> String {
    let all: Vec<String> = labels.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    all.join(", ")
}

/// A DestinationRule, as far as these checks need it.
struct Rule {
    key: Key,
    host: String,
    spec: Value,
}

impl Rule {
    fn subset(&self, name: &str) -> Option<(usize, Labels)> {
        let subsets = list(&self.spec, "/subsets");
        let index = subsets.iter().position(|subset| text(subset, "/name") == name)?;
        Some((index, labels(subsets[index].get("labels"))))
    }
}

impl Checks<'_> {
    fn objects(&self, kind: Kind) -> impl Iterator<Item = (&Object, Value)> {
        self.files.snapshot.list(kind).map(|object| {
            let document = self.files.document(&object.key);
            let spec = document.and_then(|document| document.value.get("spec")).cloned();
            (&**object, spec.unwrap_or_default())
        })
    }

    fn resolved(&self, name: &str, namespace: &str) -> String {
        host::resolve(name, namespace, &self.files.push.settings.domain)
    }

    fn service(&self, hostname: &str) -> Option<&Service> {
        let services = &self.files.push.registry.services;
        services.iter().find(|service| host::matches(&service.hostname, hostname)).map(|service| &**service)
    }

    fn endpoints(&self, service: &Service) -> &[Endpoint] {
        self.files.push.registry.endpoints(&service.hostname, &service.namespace)
    }

    fn rules(&self) -> Vec<Rule> {
        let rules = self.objects(Kind::DestinationRule);
        rules
            .map(|(object, spec)| Rule {
                key: object.key.clone(),
                host: self.resolved(text(&spec, "/host"), &object.key.namespace),
                spec,
            })
            .collect()
    }

    fn refused(&self, out: &mut Vec<Finding>) {
        for error in &self.files.refused {
            let mend = "correct the field; `outrigger validate FILE` checks again".to_owned();
            out.push(Finding::problem("refused", format!("an object is refused and has no effect: {error}"), mend));
        }
    }

    /// Hosts, subsets and ports that VirtualServices send to.
    fn destinations(&self, out: &mut Vec<Finding>) {
        let rules = self.rules();
        for (object, spec) in self.objects(Kind::VirtualService) {
            let namespace = &object.key.namespace;
            for kind in ["http", "tcp", "tls"] {
                for (index, route) in list(&spec, &format!("/{kind}")).iter().enumerate() {
                    for (part, to) in list(route, "/route").iter().enumerate() {
                        let field = format!("spec.{kind}[{index}].route[{part}].destination");
                        let name = text(to, "/destination/host");
                        let hostname = self.resolved(name, namespace);
                        let source = self.files.source(&object.key, &field);
                        let Some(service) = self.service(&hostname) else {
                            let what = format!("a route leads to {hostname}, which is no service: requests get 503 NC");
                            let mend = format!(
                                "create the service, or a ServiceEntry with hosts: [{hostname}]; or correct {field}.host"
                            );
                            out.push(Finding::problem("destination", what, mend).at(source));
                            continue;
                        };
                        if let Some(port) = to.pointer("/destination/port/number").and_then(Value::as_u64)
                            && !service.ports.iter().any(|own| u64::from(own.port) == port)
                        {
                            let ports: Vec<String> = service.ports.iter().map(|own| own.port.to_string()).collect();
                            let what = format!("a route leads to port {port} of {hostname}, which it has not: 503 NC");
                            let mend = format!("set {field}.port.number to one of {}", ports.join(", "));
                            out.push(Finding::problem("destination", what, mend).at(source.clone()));
                        }
                        let subset = text(to, "/destination/subset");
                        if !subset.is_empty() {
                            self.subset(service, subset, &rules, source, out);
                        }
                    }
                }
            }
        }
    }

    fn subset(&self, service: &Service, subset: &str, rules: &[Rule], source: explain::Source, out: &mut Vec<Finding>) {
        let hostname = &service.hostname;
        let fits: Vec<&Rule> = rules.iter().filter(|rule| host::matches(&rule.host, hostname)).collect();
        let Some((rule, (index, wanted))) = fits.iter().find_map(|rule| Some((rule, rule.subset(subset)?))) else {
            let what =
                format!("a route leads to subset {subset:?} of {hostname}, which no DestinationRule defines: 503 NC");
            let entry = format!("- name: {subset}\n  labels: {{version: {subset}}}");
            let mend = match fits.first() {
                Some(rule) => {
                    let place = self.files.source(&rule.key, "spec.subsets").place;
                    let at = if place.is_empty() { String::new() } else { format!(", {place}") };
                    format!("add to spec.subsets of {}{at}:\n{entry}", rule.key)
                }
                None => format!(
                    "apply\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {}, namespace: {}}}\nspec:\n  host: {hostname}\n  subsets:\n  {}",
                    service.name,
                    service.namespace,
                    entry.replace('\n', "\n  ")
                ),
            };
            out.push(Finding::problem("subset", what, mend).at(source));
            return;
        };
        let all = self.endpoints(service);
        let of: Vec<&Endpoint> = all.iter().filter(|endpoint| selects(&wanted, &endpoint.workload.labels)).collect();
        let place = self.files.source(&rule.key, &format!("spec.subsets[{index}].labels"));
        if of.is_empty() && service.resolution == registry::Resolution::ClientSideLb {
            let what = format!(
                "a route leads to subset {subset:?} of {hostname}, whose labels ({}) fit no pod: 503 UH",
                named(&wanted)
            );
            let mut seen: Vec<String> = wanted
                .keys()
                .flat_map(|key| all.iter().filter_map(move |e| Some(format!("{key}: {}", e.workload.labels.get(key)?))))
                .collect();
            seen.sort();
            seen.dedup();
            let mend = match seen.is_empty() {
                true => format!("start pods with the labels {}, or change the subset's", named(&wanted)),
                false => format!("change the subset's labels; the service's pods have {}", seen.join(", ")),
            };
            out.push(Finding::problem("subset", what, mend).at(place));
        } else if !of.is_empty() && of.iter().all(|endpoint| endpoint.health == Health::Unhealthy) {
            let what = format!("no pod of subset {subset:?} of {hostname} is ready: 503 UH");
            let pod = &of[0].workload;
            let mend = format!("outrigger logs {}.{}", pod.name, pod.namespace);
            out.push(Finding::problem("subset", what, mend).at(place));
        }
    }

    /// Ports whose names hide what they speak from rules that need to know.
    fn ports(&self, out: &mut Vec<Finding>) {
        let mut said: BTreeMap<(String, u16), ()> = BTreeMap::new();
        for (object, spec) in self.objects(Kind::VirtualService) {
            if list(&spec, "/http").is_empty() {
                continue;
            }
            for name in list(&spec, "/hosts").iter().filter_map(Value::as_str) {
                let Some(service) = self.service(&self.resolved(name, &object.key.namespace)) else { continue };
                for port in &service.ports {
                    let Some(reason) = unused::hidden_by_port(service, port.port) else { continue };
                    if said.insert((service.hostname.to_string(), port.port), ()).is_some() {
                        continue;
                    }
                    let (what, mend) = (format!("{}: {}", object.key, reason.why), reason.mend);
                    out.push(Finding::problem("port name", what, mend).at(self.service_port(service, port.port)));
                }
            }
        }
        for service in self.files.push.registry.services.iter() {
            for port in service.ports.iter().filter(|port| port.protocol == Protocol::Unsupported) {
                let what = format!(
                    "port {} of {} ({:?}) does not say what it speaks: each connection is looked into, and one whose server speaks \
                     first waits",
                    port.port, service.hostname, port.name
                );
                let mend =
                    "name the port PROTOCOL or PROTOCOL-NAME (http, http2, grpc, tcp, tls, …), or add appProtocol"
                        .to_owned();
                out.push(Finding::warning("port name", what, mend).at(self.service_port(service, port.port)));
            }
        }
    }

    fn service_port(&self, service: &Service, port: u16) -> explain::Source {
        let kind = match service.provider {
            registry::Provider::Kubernetes => Kind::Service,
            _ => Kind::ServiceEntry,
        };
        let key = Key::new(kind, &service.namespace, &service.object_name);
        let index = service.ports.iter().position(|own| own.port == port).unwrap_or(0);
        self.files.source(&key, &format!("spec.ports[{index}]"))
    }

    /// What clients are told to do about TLS, against what servers take.
    fn mutual_tls(&self, out: &mut Vec<Finding>) {
        for rule in self.rules() {
            let mode = text(&rule.spec, "/trafficPolicy/tls/mode").to_owned();
            if mode.is_empty() {
                continue;
            }
            let Some(service) = self.service(&rule.host).filter(|service| !service.mesh_external) else { continue };
            for endpoint in self.endpoints(service) {
                let workload = &endpoint.workload;
                let takes = self.files.push.peer_policy(&workload.namespace, &workload.labels).for_port(endpoint.port);
                let has_sidecar = workload.tls_mode == TlsMode::Istio;
                let wrong = match (mode.as_str(), has_sidecar) {
                    ("ISTIO_MUTUAL", false) => Some("has no sidecar and takes plain text only"),
                    ("ISTIO_MUTUAL", true) if takes == MtlsMode::Disable => {
                        Some("takes plain text only (PeerAuthentication DISABLE)")
                    }
                    ("DISABLE" | "SIMPLE", true) if takes == MtlsMode::Strict => {
                        Some("takes mutual TLS only (PeerAuthentication STRICT)")
                    }
                    _ => None,
                };
                let Some(wrong) = wrong else { continue };
                let what = format!(
                    "{} makes clients use {mode} to {}, but its pod {}.{} {wrong}: 503",
                    rule.key, rule.host, workload.name, workload.namespace
                );
                let mend = match mode.as_str() {
                    "ISTIO_MUTUAL" => "remove spec.trafficPolicy.tls: clients find out by themselves".to_owned(),
                    _ => "remove spec.trafficPolicy.tls, or set its mode to ISTIO_MUTUAL".to_owned(),
                };
                let source = self.files.source(&rule.key, "spec.trafficPolicy.tls.mode");
                out.push(Finding::problem("mutual TLS", what, mend).at(source));
                break;
            }
        }
    }

    /// Objects of which only one can hold.
    fn duplicates(&self, out: &mut Vec<Finding>) {
        let mut first: BTreeMap<(Kind, String, String), Key> = BTreeMap::new();
        let mut seen = |kind: Kind, namespace: &str, about: String, key: &Key| -> Option<Key> {
            let at = first.entry((kind, namespace.to_owned(), about)).or_insert_with(|| key.clone());
            (at != key).then(|| at.clone())
        };
        let mut aged: Vec<(&Object, Value)> = [Kind::Sidecar, Kind::PeerAuthentication, Kind::VirtualService]
            .into_iter()
            .flat_map(|kind| self.objects(kind))
            .collect();
        aged.sort_by_key(|(object, _)| object.created);
        for (object, spec) in aged {
            let key = &object.key;
            let abouts = match key.kind {
                Kind::Sidecar => vec![named(&labels(spec.pointer("/workloadSelector/labels")))],
                Kind::PeerAuthentication => vec![named(&labels(spec.pointer("/selector/matchLabels")))],
                _ => {
                    let gateways = list(&spec, "/gateways");
                    let in_mesh = gateways.is_empty() || gateways.iter().any(|gateway| gateway == "mesh");
                    // One without hosts is a part that others delegate to.
                    let hosts = list(&spec, "/hosts").iter().filter_map(Value::as_str);
                    hosts.filter(|_| in_mesh).map(|host| self.resolved(host, &key.namespace)).collect()
                }
            };
            for about in abouts {
                let namespace = if key.kind == Kind::VirtualService { "" } else { &key.namespace };
                let Some(winner) = seen(key.kind, namespace, about.clone(), key) else { continue };
                let of = match (key.kind, about.as_str()) {
                    (Kind::VirtualService, host) => format!("host {host}"),
                    (_, "") => format!("all pods of namespace {}", key.namespace),
                    (_, labels) => format!("pods with {labels}"),
                };
                let what = format!("{key} and {winner} are both for {of}; the older one, {winner}, holds");
                let mend = format!(
                    "put both into one object, then: outrigger delete {} {}.{}",
                    key.kind, key.name, key.namespace
                );
                out.push(Finding::warning("conflict", what, mend).at(self.files.source(key, "")));
            }
        }
    }

    /// Services whose selectors fit no pod, and ports that lead to none of their pods' ports.
    fn selectors(&self, out: &mut Vec<Finding>) {
        let pods: Vec<(&Object, Value)> = self.objects(Kind::Pod).collect();
        if pods.is_empty() {
            return; // not a whole mesh
        }
        for (object, spec) in self.objects(Kind::Service) {
            let wanted = labels(spec.get("selector"));
            if wanted.is_empty() {
                continue;
            }
            let of: Vec<_> = pods
                .iter()
                .filter(|(pod, _)| pod.key.namespace == object.key.namespace && selects(&wanted, &pod.labels))
                .collect();
            if of.is_empty() {
                let what =
                    format!("the selector of {} ({}) fits no pod: requests get 503 UH", object.key, named(&wanted));
                let mend = "correct spec.selector, or the labels of the pods".to_owned();
                out.push(Finding::warning("selector", what, mend).at(self.files.source(&object.key, "spec.selector")));
                continue;
            }
            for (index, port) in list(&spec, "/ports").iter().enumerate() {
                let Some(target) = port.get("targetPort").or_else(|| port.get("port")) else { continue };
                let declared: Vec<&Value> = of
                    .iter()
                    .flat_map(|(_, pod)| list(pod, "/containers").iter().chain(list(pod, "/initContainers")))
                    .filter(|container| container["name"] != "istio-proxy")
                    .flat_map(|container| list(container, "/ports"))
                    .collect();
                // Declaring ports is a custom only: where none is declared, nothing is known.
                let fits = |own: &&Value| own["containerPort"] == *target || own["name"] == *target;
                if declared.is_empty() || declared.iter().any(fits) {
                    continue;
                }
                let mut ports: Vec<String> = declared.iter().map(|own| own["containerPort"].to_string()).collect();
                ports.sort();
                ports.dedup();
                let what = format!(
                    "port {} of {} leads to {target}, which no container of its pods declares",
                    port["port"], object.key
                );
                let mend = format!(
                    "set spec.ports[{index}].targetPort to one of {}, or declare the container's port",
                    ports.join(", ")
                );
                let source = self.files.source(&object.key, &format!("spec.ports[{index}]"));
                out.push(Finding::warning("target port", what, mend).at(source));
            }
        }
    }

    /// VirtualServices that no sidecar takes notice of, although their hosts are services of the mesh.
    fn gateways(&self, out: &mut Vec<Finding>) {
        for (object, spec) in self.objects(Kind::VirtualService) {
            let Body::VirtualService(rule) = &object.body else { continue };
            let Some(reason) = unused::gateways_only(rule) else { continue };
            let hosts = || list(&spec, "/hosts").iter().filter_map(Value::as_str);
            let Some(host) = hosts().find(|host| self.service(&self.resolved(host, &object.key.namespace)).is_some())
            else {
                continue;
            };
            let what = format!("{}: {}, and requests within the mesh to {host} pass it by", object.key, reason.why);
            let mend = reason.mend;
            out.push(Finding::warning("gateways", what, mend).at(self.files.source(&object.key, "spec.gateways")));
        }
    }

    /// Policies that cannot do what they seem to.
    fn policies(&self, out: &mut Vec<Finding>) {
        for (object, spec) in self.objects(Kind::AuthorizationPolicy) {
            let action = text(&spec, "/action");
            let wanted = labels(spec.pointer("/selector/matchLabels"));
            let workloads = self.files.push.registry.services.iter().flat_map(|service| self.endpoints(service));
            let everywhere = *object.key.namespace == *self.files.push.root_namespace;
            let here = |e: &&Endpoint| everywhere || e.workload.namespace == object.key.namespace;
            let selected: Vec<&Endpoint> =
                workloads.filter(here).filter(|e| selects(&wanted, &e.workload.labels)).collect();
            if !wanted.is_empty() && selected.is_empty() {
                let what = format!("{} selects no pod of a service ({})", object.key, named(&wanted));
                let mend = "correct spec.selector.matchLabels".to_owned();
                let source = self.files.source(&object.key, "spec.selector");
                out.push(Finding::warning("policy", what, mend).at(source));
                continue;
            }
            // Who somebody is, is known from mutual TLS only.
            for (index, rule) in list(&spec, "/rules").iter().enumerate() {
                let by_identity = list(rule, "/from").iter().any(|from| {
                    ["principals", "namespaces", "serviceAccounts"]
                        .iter()
                        .any(|field| from.pointer(&format!("/source/{field}")).is_some())
                });
                let plain = selected.iter().find(|e| {
                    self.files.push.peer_policy(&e.workload.namespace, &e.workload.labels).for_port(e.port)
                        == MtlsMode::Disable
                });
                let Some(plain) = plain.filter(|_| by_identity) else { continue };
                let word = if action == "DENY" { "denies nobody" } else { "allows nobody" };
                let what = format!(
                    "rule {index} of {} {word} at {}: it asks for identities, and PeerAuthentication lets no mutual TLS in",
                    object.key, plain.workload.name
                );
                let mend = "set spec.mtls.mode of the PeerAuthentication to PERMISSIVE or STRICT".to_owned();
                let source = self.files.source(&object.key, &format!("spec.rules[{index}].from"));
                out.push(Finding::problem("policy", what, mend).at(source));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use explain::Sources;

    use super::*;

    fn found(yaml: &str) -> Vec<(&'static str, String)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mesh.yaml");
        let base = "
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {selector: {app: a}, ports: [{name: http, port: 80}, {name: tcp-x, port: 90}, {name: odd, port: 91}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec: {template: {metadata: {labels: {app: a, version: v1}}, spec: {containers: []}}}
---
";
        std::fs::write(&path, format!("{base}{yaml}")).unwrap();
        let files = Files::load(&Sources { input: vec![path], ..Sources::default() }, true).unwrap();
        check(&files).into_iter().map(|finding| (finding.check, finding.what + "\n" + &finding.mend)).collect()
    }

    #[test]
    fn routes_that_lead_nowhere_are_found() {
        let found = found(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec:
  hosts: [a]
  http:
  - match: [{uri: {exact: /1}}]
    route: [{destination: {host: gone}}]
  - match: [{uri: {exact: /2}}]
    route: [{destination: {host: a, subset: v2}}]
  - match: [{uri: {exact: /3}}]
    route: [{destination: {host: a, subset: none, port: {number: 81}}}]
  - route: [{destination: {host: a, subset: v1}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a}
spec: {host: a, subsets: [{name: v1, labels: {version: v1}}, {name: none, labels: {version: v9}}]}
",
        );
        let of = |check: &str| {
            found.iter().filter(|(of, _)| *of == check).map(|(_, what)| what.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(of("destination").len(), 2, "{found:?}");
        let subsets = of("subset");
        assert!(
            subsets[0].contains("\"v2\"") && subsets[0].contains("- name: v2\n  labels: {version: v2}"),
            "{found:?}"
        );
        assert!(subsets[1].contains("fit no pod") && subsets[1].contains("version: v1"), "{found:?}");
        let ports = of("port name");
        assert!(ports[0].contains("http-tcp-x") && ports[1].contains("\"odd\""), "{found:?}");
        assert_eq!(found.len(), 6, "{found:?}");
    }

    #[test]
    fn what_no_pod_and_no_sidecar_takes_is_found() {
        let found = found(
            "
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {selector: {app: bb}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: c}
spec: {selector: {app: c}, ports: [{name: http, port: 80, targetPort: 8081}, {name: http-web, port: 81, targetPort: web}]}
---
apiVersion: v1
kind: Pod
metadata: {name: c, labels: {app: c}}
spec: {containers: [{name: c, ports: [{containerPort: 8080, name: web}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: c}
spec: {hosts: [c], gateways: [edge], http: [{route: [{destination: {host: c}}]}]}
",
        );
        let has =
            |check: &str, part: &str| found.iter().filter(|(of, what)| *of == check && what.contains(part)).count();
        assert_eq!(has("selector", "app: bb"), 1, "{found:?}");
        assert_eq!((has("target port", "8081"), has("target port", "web")), (1, 0), "{found:?}");
        assert_eq!(has("gateways", "edge"), 1, "{found:?}");
    }

    #[test]
    fn both_ends_must_agree_about_tls() {
        let found = found(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a}
spec: {host: a, trafficPolicy: {tls: {mode: DISABLE}}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
",
        );
        assert!(found.iter().any(|(check, what)| *check == "mutual TLS" && what.contains("STRICT")), "{found:?}");
    }

    #[test]
    fn contradictions_and_policies_without_effect_are_found() {
        let found = found(
            "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: one}
spec: {egress: [{hosts: ['./*']}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: two}
spec: {egress: [{hosts: ['*/*']}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: typo}
spec: {selector: {matchLabels: {app: aa}}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who}
spec: {rules: [{from: [{source: {principals: ['*']}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: DISABLE}}
",
        );
        let has = |check: &str, part: &str| found.iter().any(|(of, what)| *of == check && what.contains(part));
        assert!(has("conflict", "the older one, Sidecar default/one, holds"), "{found:?}");
        assert!(has("policy", "selects no pod") && has("policy", "allows nobody"), "{found:?}");
    }
}
