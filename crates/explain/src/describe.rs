//! `outrigger x describe pod|service`: what configuration concerns a pod or a service, in istioctl's words.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::anyhow;
use config_store::{Key, Kind};
use mesh_types::Labels;
use proxy_core::Metadata;
use serde_json::Value;

use crate::mesh::{Mesh, Pod};
use crate::{Configuration, Files, Sources, origin};

/// Describe what configuration concerns a pod or a service, as `istioctl x describe`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:
  outrigger x describe pod productpage
  outrigger x describe service reviews -f samples/bookinfo")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// A pod: its services, their rules, what it accepts.
    #[command(visible_alias = "po")]
    Pod(Of),
    /// A service: the rules of its ports.
    #[command(visible_alias = "svc")]
    Service(Of),
}

#[derive(Clone, Debug, clap::Args)]
struct Of {
    /// Its name, or the beginning of it, with `.NAMESPACE` if need be
    name: String,
    /// Its namespace
    #[arg(long, short = 'n')]
    namespace: Option<String>,
    #[command(flatten)]
    sources: Sources,
    /// Name of the running mesh that is asked where there is no --input
    #[arg(long, alias = "name", default_value = "default", env = "OUTRIGGER_NAME")]
    mesh: String,
}

impl Of {
    fn full_name(&self) -> String {
        match &self.namespace {
            Some(namespace) if !self.name.contains('.') => format!("{}.{namespace}", self.name),
            _ => self.name.clone(),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When the input cannot be read, or there is no such pod or service.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let text = match &args.what {
        What::Pod(of) => {
            let mesh = mesh(&of.sources, &of.mesh)?;
            pod(&mesh, &*mesh.pod(&of.full_name())?)
        }
        What::Service(of) => service(&mesh(&of.sources, &of.mesh)?, &of.full_name())?,
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// Files if there are any, else the running mesh.
pub(crate) fn mesh(sources: &Sources, name: &str) -> anyhow::Result<Mesh> {
    let files = match sources.input.is_empty() {
        true => Files::running(name, sources)?,
        false => Files::load(sources, true)?,
    };
    Mesh::new(files)
}

const RULE: &str = "--------------------\n";

fn pod(mesh: &Mesh, pod: &Pod) -> String {
    let mut out = String::new();
    let key = Key::new(Kind::Pod, &pod.namespace, &pod.name);
    let empty = Value::Null;
    let value = mesh.files.document(&key).map_or(&empty, |document| &document.value);
    let _ = writeln!(out, "Pod: {}", pod.name);
    let revision = pod.labels.get("istio.io/rev").or(pod.annotations.get("istio.io/rev"));
    let _ = writeln!(out, "   Pod Revision: {}", revision.map_or("", String::as_str));
    let containers = list(value, "/spec/containers");
    let ports: Vec<String> = containers.iter().flat_map(ports_of).collect();
    match ports.is_empty() {
        false => drop(writeln!(out, "   Pod Ports: {}", ports.join(", "))),
        true => out.push_str("   Pod does not expose ports\n"),
    }
    for status in list(value, "/status/containerStatuses").iter().chain(list(value, "/status/initContainerStatuses")) {
        if status["ready"] == false {
            let name = status["name"].as_str().unwrap_or_default();
            let _ = writeln!(out, "WARNING: Pod {} Container {name} NOT READY", pod.name);
        }
    }
    if !pod.has_sidecar {
        let _ = writeln!(out, "WARNING: {} is not part of mesh; no Istio sidecar", pod.name);
    }
    let of_pod = mesh.files.push.registry.services.iter().filter(|service| {
        *service.namespace == *pod.namespace
            && !service.selector.is_empty()
            && mesh_types::selects(&service.selector, &pod.labels)
    });
    let services: Vec<_> = of_pod.collect();
    if services.is_empty() {
        let _ = writeln!(out, "Warning: No Kubernetes Services select pod {}", pod.name);
    }
    out.push_str(RULE);
    for (row, service) in services.iter().enumerate() {
        if row > 0 {
            out.push_str(RULE);
        }
        let about = About { mesh, pod, configuration: &mesh.configuration(pod), labels: &[&pod.labels] };
        about.service(service, &mut out);
    }
    out.push_str(RULE);
    peer_authentication(mesh, pod, &mut out);
    out
}

fn service(mesh: &Mesh, said: &str) -> anyhow::Result<String> {
    let (name, namespace) = said.split_once('.').unwrap_or((said, "default"));
    let services = &mesh.files.push.registry.services;
    let service = services
        .iter()
        .find(|service| *service.name == *name && *service.namespace == *namespace)
        .ok_or_else(|| anyhow!("there is no service {name} in namespace {namespace}"))?;
    let selected = |pod: &&std::rc::Rc<Pod>| {
        *pod.namespace == *service.namespace
            && !service.selector.is_empty()
            && mesh_types::selects(&service.selector, &pod.labels)
    };
    let pods: Vec<_> = mesh.pods.iter().filter(selected).collect();
    let meshed: Vec<_> = pods.iter().filter(|pod| pod.has_sidecar).collect();
    let Some(first) = meshed.first() else {
        return Ok(match pods.len() {
            0 => format!("Service {name:?} has no pods.\n"),
            count => format!("Service {name:?} has no Istio pods.  ({count} pods in service).\n"),
        });
    };
    let labels: Vec<&Labels> = meshed.iter().map(|pod| &pod.labels).collect();
    let mut out = String::new();
    let about = About { mesh, pod: first, configuration: &mesh.configuration(first), labels: &labels };
    about.service(service, &mut out);
    Ok(out)
}

/// A service as one pod's proxy has it.
struct About<'a> {
    mesh: &'a Mesh,
    pod: &'a Pod,
    configuration: &'a Configuration,
    /// Of all pods that are described.
    labels: &'a [&'a Labels],
}

impl About<'_> {
    fn service(&self, service: &registry::Service, out: &mut String) {
        let _ = writeln!(out, "Service: {}", service.name);
        for port in service.ports.iter().filter(|port| port.protocol != mesh_types::Protocol::Udp) {
            let protocol = if port.name.is_empty() { "auto-detect".to_owned() } else { port.protocol.to_string() };
            let endpoints = self.mesh.files.push.registry.endpoints_by_port(service, port.port);
            let own = self.pod.ip.to_string();
            let target = { endpoints }.find(|endpoint| endpoint.addresses.iter().any(|address| **address == *own));
            match target {
                Some(target) => {
                    let (name, number) = (&port.name, port.port);
                    let _ = writeln!(out, "   Port: {name} {number}/{protocol} targets pod port {}", target.port);
                }
                None => drop(writeln!(out, "   no suitable port for manifest: {}", self.pod.name)),
            }
        }
        let several = service.ports.len() > 1;
        let indent = if several { 3 } else { 0 };
        for port in &service.ports {
            if several {
                let _ = writeln!(out, "{}:", port.port);
            }
            let rule = self.destination_rule(service, port.port);
            if let Some(rule) = &rule {
                self.print_rule(rule, indent, out);
            }
            if let Some(key) = self.virtual_service(service, port.port) {
                self.print_routes(&key, service, rule.as_ref(), indent, out);
            }
            let policies = self.policies();
            if !policies.is_empty() {
                if several {
                    let _ = write!(out, "{} ", port.port);
                }
                let _ = writeln!(out, "RBAC policies: {}", policies.join(", "));
            }
        }
    }

    fn destination_rule(&self, service: &registry::Service, port: u16) -> Option<Key> {
        let name = format!("outbound|{port}||{}", service.hostname);
        let (cluster, _) = self.configuration.cluster(&name)?.ok()?;
        origin::key_of_metadata(cluster.metadata()).filter(|key| key.kind == Kind::DestinationRule)
    }

    fn virtual_service(&self, service: &registry::Service, port: u16) -> Option<Key> {
        let table = self.configuration.tables.get(port.to_string().as_str())?;
        let host = table
            .virtual_hosts()
            .iter()
            .find(|host| host.domains.iter().any(|domain| **domain == *service.hostname))?;
        let metadata: &Metadata = &host.routes.first()?.metadata;
        origin::key_of_metadata(metadata).filter(|key| key.kind == Kind::VirtualService)
    }

    fn spec(&self, key: &Key) -> Value {
        let document = self.mesh.files.document(key);
        document.and_then(|document| document.value.get("spec")).cloned().unwrap_or_default()
    }

    /// Names of the rule's subsets: those that fit one of the pods, and the others.
    fn subsets(&self, rule: Option<&Key>) -> (Vec<String>, Vec<String>) {
        let spec = rule.map(|key| self.spec(key)).unwrap_or_default();
        let (mut fit, mut others) = (Vec::new(), Vec::new());
        for subset in list(&spec, "/subsets") {
            let wanted: Labels = serde_json::from_value(subset["labels"].clone()).unwrap_or_default();
            let name = subset["name"].as_str().unwrap_or_default().to_owned();
            match self.labels.iter().any(|labels| mesh_types::selects(&wanted, labels)) {
                true => fit.push(name),
                false => others.push(name),
            }
        }
        (fit, others)
    }

    fn print_rule(&self, key: &Key, indent: usize, out: &mut String) {
        let spec = self.spec(key);
        let at = |level: usize| " ".repeat(indent + level);
        let host = spec["host"].as_str().unwrap_or_default();
        let _ = writeln!(out, "{}DestinationRule: {} for {host:?}", at(0), self.named(key));
        let (fit, others) = self.subsets(Some(key));
        if !fit.is_empty() || !others.is_empty() {
            if fit.is_empty() {
                let others = others.join(",");
                let _ =
                    writeln!(out, "{}WARNING POD DOES NOT MATCH ANY SUBSETS.  (Non matching subsets {others})", at(3));
            }
            let _ = writeln!(out, "{}Matching subsets: {}", at(3), fit.join(","));
            if !others.is_empty() {
                let _ = writeln!(out, "{}(Non-matching subsets {})", at(6), others.join(","));
            }
        }
        let Some(policy) = spec.get("trafficPolicy") else {
            let _ = writeln!(out, "{}No Traffic Policy", at(3));
            return;
        };
        let short = |policy: &Value| {
            let kinds = [
                ("loadBalancer", "load balancer"),
                ("connectionPool", "connection pool"),
                ("outlierDetection", "outlier detection"),
            ];
            let named = kinds.iter().filter(|(field, _)| policy.get(field).is_some()).map(|(_, name)| *name);
            let named: Vec<&str> = named.collect();
            if named.is_empty() { None } else { Some(format!("Policies: {}", named.join("/"))) }
        };
        let tls = |policy: &Value| policy.get("tls").map(|tls| tls["mode"].as_str().unwrap_or("DISABLE").to_owned());
        if let Some(mode) = tls(policy) {
            let _ = writeln!(out, "{}Traffic Policy TLS Mode: {mode}", at(3));
        }
        if let Some(policies) = short(policy) {
            let _ = writeln!(out, "{}{policies}", at(3));
        }
        let levels = list(policy, "/portLevelSettings");
        if !levels.is_empty() {
            let _ = writeln!(out, "{}Port Level Settings:", at(3));
        }
        for level in levels {
            let _ = writeln!(out, "    {}:", level["port"]["number"]);
            if let Some(mode) = tls(level) {
                let _ = writeln!(out, "{}TLS Mode: {mode}", at(6));
            }
            if let Some(policies) = short(level) {
                let _ = writeln!(out, "{}{policies}", at(6));
            }
        }
    }

    fn print_routes(
        &self,
        key: &Key,
        service: &registry::Service,
        rule: Option<&Key>,
        indent: usize,
        out: &mut String,
    ) {
        let spec = self.spec(key);
        let at = |level: usize| " ".repeat(indent + level);
        let _ = writeln!(out, "{}VirtualService: {}", at(0), self.named(key));
        let subsets = self.subsets(rule);
        let (http, tcp) = (list(&spec, "/http"), list(&spec, "/tcp"));
        let (mut matches, mut facts, mut notes) = (0, 0, Vec::new());
        for route in http {
            let (fits, said) = self.http_route(route, key, service, &subsets, rule);
            match fits {
                true => {
                    matches += 1;
                    facts += said.len();
                    for fact in said {
                        let _ = writeln!(out, "{}{fact}", at(3));
                    }
                }
                false => notes.extend(said),
            }
        }
        for route in tcp {
            matches += usize::from(list(route, "/route").iter().any(|to| self.is_host(to, key, service)));
        }
        let noted = |out: &mut String, notes: &[String]| {
            for note in notes {
                let _ = writeln!(out, "{}{note}", at(6));
            }
        };
        let possible = http.len() + tcp.len() + list(&spec, "/tls").len();
        if matches == 0 {
            for (count, kind) in [(http.len(), "HTTP"), (tcp.len(), "TCP")] {
                if count > 0 {
                    let _ = writeln!(
                        out,
                        "{}WARNING: No destinations match pod subsets (checked {count} {kind} routes)",
                        at(3)
                    );
                }
            }
            noted(out, &notes);
        } else if matches < possible {
            let left = possible - matches;
            let _ = writeln!(out, "{}{left} additional destination(s) that will not reach this pod", at(3));
            if facts == 0 {
                noted(out, &notes);
            }
        } else if facts == 0 {
            for (count, kind) in [(http.len(), "HTTP"), (tcp.len(), "TCP")] {
                if count > 0 {
                    let _ = writeln!(out, "{}{count} {kind} route(s)", at(3));
                }
            }
        }
    }

    fn is_host(&self, to: &Value, key: &Key, service: &registry::Service) -> bool {
        let host = to.pointer("/destination/host").and_then(Value::as_str).unwrap_or_default();
        push_context::host::resolve(host, &key.namespace, &self.mesh.files.push.settings.domain) == *service.hostname
    }

    /// Whether a route leads to the pods, and what there is to say.
    fn http_route(
        &self,
        route: &Value,
        key: &Key,
        service: &registry::Service,
        (fit, others): &(Vec<String>, Vec<String>),
        rule: Option<&Key>,
    ) -> (bool, Vec<String>) {
        let (mut matches, mut facts, mut notes) = (false, Vec::new(), Vec::new());
        let conditions: Vec<String> = list(route, "/match").iter().map(condition).collect();
        for to in list(route, "/route") {
            let host = to.pointer("/destination/host").and_then(Value::as_str).unwrap_or_default();
            let subset = to.pointer("/destination/subset").and_then(Value::as_str).unwrap_or_default();
            let weight = to["weight"].as_u64().unwrap_or(0);
            if !self.is_host(to, key, service) {
                facts.push(match subset {
                    "" => format!("Route to host \"{host}\" with weight {weight}%"),
                    _ => format!("Route to {host} with invalid config"),
                });
                continue;
            }
            if others.iter().any(|name| name == subset) {
                let when = if conditions.is_empty() { "everything".to_owned() } else { conditions.join(", ") };
                notes.push(format!("Route to non-matching subset {subset} for ({when})"));
                continue;
            }
            if !subset.is_empty() && !fit.iter().any(|name| name == subset) {
                notes.push(match rule {
                    None => format!("Warning: Route to subset {subset} but NO DESTINATION RULE defining subsets!"),
                    Some(rule) => {
                        format!("Warning: Route to UNKNOWN subset {subset}; check DestinationRule {}", self.named(rule))
                    }
                });
                continue;
            }
            matches = true;
            if weight > 0 {
                let subset = if subset.is_empty() { String::new() } else { format!(" subset \"{subset}\"") };
                facts.push(format!("Route to host \"{host}\"{subset} with weight {weight}%"));
            }
        }
        match matches {
            true => {
                let fault = route.get("fault").map(|fault| format!("Fault injection {fault}"));
                let all: Vec<String> = fault.into_iter().chain(conditions).collect();
                if !all.is_empty() {
                    facts.push(all.join(", "));
                }
            }
            false => facts.extend(notes),
        }
        (matches, facts)
    }

    /// Names of the rules that the pod's own proxy holds.
    fn policies(&self) -> Vec<String> {
        use proxy_core::filters::HttpFilter;
        use proxy_core::listener::Terminal;
        let inbound = self.configuration.listener("virtualInbound");
        let http = inbound.iter().flat_map(|listener| &listener.chains).find_map(|chain| match &chain.terminal {
            Terminal::Http(http) => Some(http),
            _ => None,
        });
        let rbac = http.iter().flat_map(|http| &http.filters).find_map(|entry| match &entry.filter {
            HttpFilter::Rbac(rbac) => rbac.policies(),
            _ => None,
        });
        rbac.map(|(_, names)| names.map(ToString::to_string).collect()).unwrap_or_default()
    }

    /// With the namespace where it is another one.
    fn named(&self, key: &Key) -> String {
        match *key.namespace == *self.pod.namespace {
            true => key.name.to_string(),
            false => format!("{}.{}", key.name, key.namespace),
        }
    }
}

fn peer_authentication(mesh: &Mesh, pod: &Pod, out: &mut String) {
    let policy = mesh.files.push.peer_policy(&pod.namespace, &pod.labels);
    let word = |mode: push_context::MtlsMode| format!("{mode:?}").to_ascii_uppercase();
    let _ = writeln!(out, "Effective PeerAuthentication:\n   Workload mTLS mode: {}", word(policy.mode));
    if !policy.ports.is_empty() {
        out.push_str("   Port Level mTLS mode:\n");
        for (port, mode) in &policy.ports {
            let _ = writeln!(out, "      {port}: {}", word(*mode));
        }
    }
    let root = &mesh.files.push.root_namespace;
    let all = mesh.files.snapshot.list(Kind::PeerAuthentication).filter(|object| {
        let config_store::Body::PeerAuthentication(spec) = &object.body else { return false };
        let fits = spec.selector.as_ref().is_none_or(|s| mesh_types::selects(&s.match_labels, &pod.labels));
        fits && (*object.key.namespace == **root || *object.key.namespace == *pod.namespace)
    });
    let names: Vec<String> = all.map(|object| format!("{}.{}", object.key.name, object.key.namespace)).collect();
    if !names.is_empty() {
        let _ = writeln!(out, "Applied PeerAuthentication:\n   {}", names.join(", "));
    }
}

fn list<'v>(value: &'v Value, path: &str) -> &'v [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn ports_of(container: &Value) -> Vec<String> {
    let name = container["name"].as_str().unwrap_or_default();
    let port = |port: &Value| {
        let protocol = port["protocol"].as_str().filter(|protocol| *protocol != "TCP");
        let protocol = protocol.map(|protocol| format!("/{protocol}")).unwrap_or_default();
        format!("{}{protocol} ({name})", port["containerPort"])
    };
    list(container, "/ports").iter().map(port).collect()
}

/// A condition of a route, as istioctl words it.
fn condition(value: &Value) -> String {
    let text = |value: &Value| match value.as_object().and_then(|fields| fields.iter().next()) {
        Some((kind, wanted)) => match (kind.as_str(), wanted.as_str().unwrap_or_default()) {
            ("exact", wanted) => wanted.to_owned(),
            ("prefix", wanted) => format!("{wanted}*"),
            (kind, wanted) => format!("{kind}:{wanted:?}"),
        },
        None => String::new(),
    };
    let mut out = format!("Match: {}", value.get("uri").map(text).unwrap_or_default());
    if value["ignoreUriCase"] == true {
        out.push_str(" uncased");
    }
    if let Some(headers) = value.get("headers").and_then(Value::as_object).filter(|headers| !headers.is_empty()) {
        let all: Vec<String> = headers.iter().map(|(name, value)| format!("{name}={}", text(value))).collect();
        let _ = write!(out, " when headers are {}", all.join("; "));
    }
    out.trim().to_owned()
}
