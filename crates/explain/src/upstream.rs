//! From a cluster's name to the connection that carries the request on: endpoint, TLS, identities.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use proxy_core::cluster::{Discovery, UpstreamProtocol};
use proxy_core::endpoints::Health;
use proxy_core::stream_info::HttpProtocol;
use proxy_core::tls::UpstreamTls;
use proxy_core::{Cluster, Endpoints, Host, LoadBalancer, MetadataMatch, PickContext, Random};
use serde_json::Value;

use crate::destination::{self, Destination};
use crate::hop::{Onward, answered};
use crate::mesh::{Mesh, Pod};
use crate::trace::{Outcome, Source, Step};
use crate::vacancy::Vacancy;
use crate::{ClientTls, Configuration, Payload, origin, scope};

/// More endpoints than this are only counted.
const SHOWN: usize = 12;

/// What goes to a cluster.
pub(crate) struct Departure<'a> {
    pub(crate) at: &'a Configuration,
    pub(crate) mesh: Option<&'a Mesh>,
    pub(crate) cluster: &'a str,
    pub(crate) metadata_match: Option<&'a MetadataMatch>,
    /// `None` for TCP.
    pub(crate) http: Option<&'a Onward>,
    pub(crate) payload: Payload,
    /// Where the client wanted to go.
    pub(crate) original: SocketAddr,
    /// The pod of this proxy, if it is known.
    pub(crate) pod: Option<&'a Pod>,
    pub(crate) random: u64,
}

/// How it arrives at the other end.
pub(crate) struct Landing {
    pub(crate) address: Option<SocketAddr>,
    /// In the endpoint's own words, where there is no address.
    pub(crate) name: String,
    pub(crate) tls: Option<ClientTls>,
    pub(crate) payload: Payload,
    pub(crate) by: Dialler,
    /// The DestinationRule's word on TLS.
    pub(crate) tls_policy: Option<Source>,
}

/// Who makes a connection, and so who notices that nobody answers it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Dialler {
    Application,
    TcpProxy,
    HttpProxy,
}

impl Departure<'_> {
    pub(crate) fn run(&self, steps: &mut Vec<Step>) -> Result<Landing, Outcome> {
        let name = self.cluster;
        let is_http = self.http.is_some();
        let (cluster, endpoints) = match self.at.cluster(name) {
            None => {
                let mut step = Step::new("cluster", format!("{name} is not among the proxy's clusters"));
                let matched = self.http.map(|http| &http.matched);
                let destination = self.mesh.zip(Destination::of(name));
                let vacancy = destination.and_then(|(mesh, to)| to.unknown(mesh, self.pod, matched));
                let summary =
                    vacancy.as_ref().map_or_else(|| format!("cluster {name} does not exist"), Vacancy::to_string);
                step = step.source(vacancy.map(|vacancy| vacancy.source));
                steps.push(step.end());
                let status = matched.and_then(|m| m.forward()).map_or(503, |f| f.cluster_not_found_status);
                return Err(refused(is_http, status, "NC", "cluster_not_found", &summary));
            }
            Some(Err(error)) => {
                steps.push(Step::new("cluster", format!("the proxy refuses {error}")).end());
                return Err(refused(is_http, 503, "NC", "cluster_not_found", "the cluster was refused"));
            }
            Some(Ok(found)) => found,
        };
        steps.push(self.describe(&cluster));
        // istiod's name for what stands where connections to unknown addresses are refused.
        if name == "BlackHoleCluster" {
            steps.push(scope::blocked(self.mesh.zip(self.pod), &self.original.to_string()));
            let why = "the proxy does not know the address, and may call no others (REGISTRY_ONLY)";
            return Err(refused(is_http, 503, "UH", "no_healthy_upstream", why));
        }
        let (cluster, endpoints) = (Arc::new(cluster), Arc::new(endpoints));
        match &cluster.discovery {
            Discovery::StrictDns(_) | Discovery::LogicalDns(_) | Discovery::DynamicForwardProxy { .. } => {
                return Ok(self.by_name(&cluster, steps));
            }
            _ => {}
        }
        let host = self.pick(&cluster, &endpoints);
        let mut step = self.endpoints(&cluster, &endpoints, host.as_deref());
        let Some(host) = host else {
            let rule = origin::key_of_metadata(cluster.metadata());
            let destination = self.mesh.zip(Destination::of(name));
            let vacancy = destination.and_then(|(mesh, to)| to.empty(mesh, rule.as_ref()));
            let why = match &vacancy {
                Some(vacancy) => vacancy.to_string(),
                None if endpoints.is_empty() => format!("{name} has no endpoints"),
                None => format!("{name} has no endpoint that may be chosen"),
            };
            step = step.source(vacancy.map(|vacancy| vacancy.source));
            steps.push(step);
            return Err(refused(is_http, 503, "UH", "no_healthy_upstream", &why));
        };
        steps.push(step);
        let tls = self.tls(&cluster, &host, steps);
        Ok(Landing {
            address: host.address.socket(),
            name: host.address.to_string(),
            tls,
            payload: self.payload_to(&cluster),
            by: self.dialler(),
            tls_policy: self.policy(&cluster, "tls.mode"),
        })
    }

    pub(crate) fn describe(&self, cluster: &Cluster) -> Step {
        let mut step = Step::new("cluster", &*cluster.name);
        let parts: Vec<&str> = cluster.name.splitn(4, '|').collect();
        if let [direction, _, subset, host] = parts[..] {
            if !subset.is_empty() {
                step = step.fact(format!("subset {subset:?} of {host}"));
            }
            let service = self.mesh.filter(|_| direction == "outbound").and_then(|mesh| {
                let service = mesh.files.push.registry.services.iter().find(|service| *service.hostname == *host)?;
                Some(mesh.service_source(service, ""))
            });
            step = step.source(service);
        }
        let subset = parts.get(2).copied().unwrap_or_default();
        step = step.source(self.rule(cluster, subset));
        let lb = format!("{:?}", cluster.lb);
        let word = lb.split([' ', '(']).next().unwrap_or_default().to_owned();
        step = step.fact(format!("balancing {word}, connect timeout {:?}", cluster.connect_timeout));
        let of_rule = self.mesh.zip(origin::key_of_metadata(cluster.metadata()));
        for field in ["connectionPool", "outlierDetection", "loadBalancer"] {
            let Some(source) = self.policy(cluster, field) else { continue };
            let said = of_rule.as_ref().and_then(|(mesh, key)| mesh.files.value(key, &source.field));
            step = step.fact(format!("{field}: {}", said.map(leaves).unwrap_or_default())).source(Some(source));
        }
        if cluster.outlier.is_some() && !step.facts.iter().any(|fact| fact.starts_with("outlierDetection")) {
            step = step.fact("outlier detection is on");
        }
        step
    }

    /// The DestinationRule, and the subset's entry in it.
    fn rule(&self, cluster: &Cluster, subset: &str) -> Option<Source> {
        let source = origin::of_metadata(cluster.metadata(), self.mesh)?;
        let mesh = self.mesh.filter(|_| !subset.is_empty());
        let found = mesh.and_then(|mesh| {
            let key = origin::key_of_metadata(cluster.metadata())?;
            let (index, _) = destination::subset(mesh, &key, subset)?;
            Some(mesh.source(&key, &format!("spec.subsets[{index}]")))
        });
        Some(found.unwrap_or(source))
    }

    fn pick(&self, cluster: &Arc<Cluster>, endpoints: &Arc<Endpoints>) -> Option<Arc<Host>> {
        let mut balancer = LoadBalancer::new(Arc::clone(cluster), Arc::clone(endpoints), self.random);
        // The moment only matters for slow start; one fixed at the call is as good as any.
        let context = PickContext {
            metadata_match: self.metadata_match,
            original_dst: Some(self.original),
            headers: self.http.map(|http| &http.head),
            ..PickContext::at(Instant::now())
        };
        balancer.pick(&context, &mut Random::new(self.random))
    }

    fn endpoints(&self, cluster: &Cluster, endpoints: &Endpoints, picked: Option<&Host>) -> Step {
        if let Discovery::OriginalDst(_) = &cluster.discovery {
            return Step::new("endpoint", format!("{}, where the client wanted to go", self.original));
        }
        let count = endpoints.hosts().count();
        let mut step = match picked {
            Some(host) if count == 1 => Step::new("endpoint", self.named(host)),
            Some(host) => Step::new("endpoint", format!("one of {count}, for instance {}", self.named(host))),
            None if count == 0 => Step::new("endpoint", "there is none").end(),
            None => Step::new("endpoint", format!("none of {count} may be chosen")).end(),
        };
        let total: u64 = endpoints.hosts().map(|host| u64::from(host.weight)).sum();
        if count > 1 {
            for host in endpoints.hosts().take(SHOWN) {
                let health = match host.health() {
                    Health::Healthy => "healthy",
                    Health::Degraded => "degraded",
                    Health::Unhealthy => "unhealthy",
                };
                let mut fact = format!("{}  weight {}/{total}, {health}", self.named(host), host.weight);
                let locality = host.locality.to_string();
                if !locality.is_empty() {
                    fact = format!("{fact}, {locality}");
                }
                if host.priority > 0 {
                    fact = format!("{fact}, priority {}", host.priority);
                }
                step = step.fact(fact);
            }
            if count > SHOWN {
                step = step.fact(format!("and {} more", count - SHOWN));
            }
        }
        step
    }

    fn named(&self, host: &Host) -> String {
        let pod = self.mesh.zip(host.address.socket()).and_then(|(mesh, address)| mesh.pod_at(address));
        match pod {
            Some(pod) => format!("{} ({})", host.address, pod.full_name()),
            None => host.address.to_string(),
        }
    }

    /// Where names are resolved when the connection is made.
    fn by_name(&self, cluster: &Cluster, steps: &mut Vec<Step>) -> Landing {
        use envoy_api::core::address::Address;
        use envoy_api::endpoint::lb_endpoint::HostIdentifier;
        let raw = self.at.raw.clusters.iter().find(|raw| raw.name == self.cluster);
        let localities =
            raw.and_then(|raw| raw.load_assignment.as_ref()).map(|all| &all.endpoints[..]).unwrap_or_default();
        let names: Vec<String> = localities
            .iter()
            .flat_map(|locality| &locality.lb_endpoints)
            .filter_map(|endpoint| match &endpoint.host_identifier {
                Some(HostIdentifier::Endpoint(endpoint)) => match endpoint.address.as_ref()?.address.as_ref()? {
                    Address::SocketAddress(socket) => Some((&socket.address, socket.port_specifier.as_ref())),
                    _ => None,
                },
                _ => None,
            })
            .map(|(address, port)| match port {
                Some(envoy_api::core::socket_address::PortSpecifier::PortValue(port)) => format!("{address}:{port}"),
                _ => address.clone(),
            })
            .collect();
        let name = match names.first() {
            Some(first) => first.clone(),
            None => self.http.and_then(|http| http.head.authority()).unwrap_or_default().to_owned(),
        };
        let all = if names.len() > 1 { names.join(", ") } else { name.clone() };
        steps.push(Step::new("endpoint", format!("{all}, as DNS resolves it")));
        let tls = cluster.transport.default.tls().map(|tls| self.client_tls(tls));
        if let Some(tls) = &tls {
            steps.push(Step::new("tls", format!("to {}, SNI {:?}", name, tls.sni)));
        }
        Landing {
            address: name.parse().ok(),
            name,
            tls,
            payload: self.payload_to(cluster),
            by: self.dialler(),
            tls_policy: self.policy(cluster, "tls.mode"),
        }
    }

    /// Where the cluster's DestinationRule says something of it.
    fn policy(&self, cluster: &Cluster, field: &str) -> Option<Source> {
        destination::policy(self.mesh?, &origin::key_of_metadata(cluster.metadata())?, self.cluster, field)
    }

    fn dialler(&self) -> Dialler {
        if self.http.is_some() { Dialler::HttpProxy } else { Dialler::TcpProxy }
    }

    fn tls(&self, cluster: &Cluster, host: &Host, steps: &mut Vec<Step>) -> Option<ClientTls> {
        let (socket, rule) = cluster.transport(host);
        let Some(tls) = socket.tls() else {
            let mut step = Step::new("tls", "none").source(self.policy(cluster, "tls.mode"));
            if let Some(rule) = rule {
                step = step.fact(format!("rule {rule} of the cluster fits the endpoint"));
            }
            steps.push(step);
            return None;
        };
        let mutual = !tls.common.certificates.is_empty();
        let mut step = Step::new("tls", if mutual { "mutual" } else { "one-sided" });
        if let Some(pod) = self.pod.filter(|_| mutual) {
            step = step.fact(format!("we are   {}", pod.identity));
        }
        let names: Vec<String> = tls
            .common
            .validation
            .san
            .iter()
            .map(|san| match san.matcher.as_exact() {
                Some(exact) => exact.to_owned(),
                None => san.matcher.to_string(),
            })
            .collect();
        if !names.is_empty() {
            step = step.fact(format!("they are {}", names.join(" or ")));
        }
        let client = self.client_tls(tls);
        let alpn: Vec<_> = client.alpn.iter().map(|protocol| String::from_utf8_lossy(protocol)).collect();
        step = step.fact(format!("SNI {}, ALPN {}", client.sni, alpn.join(",")));
        steps.push(step.source(origin::of_metadata(cluster.metadata(), self.mesh)));
        Some(client)
    }

    fn client_tls(&self, tls: &UpstreamTls) -> ClientTls {
        let over = self.http.and_then(|http| http.alpn.as_deref());
        let protocol = match self.payload {
            Payload::Http2 => HttpProtocol::Http2,
            _ => HttpProtocol::Http11,
        };
        let alpn = over.and_then(|over| over.protocols(protocol)).map(<[Vec<u8>]>::to_vec);
        ClientTls {
            sni: tls.sni.as_deref().unwrap_or_default().to_owned(),
            alpn: alpn.unwrap_or_else(|| tls.common.alpn.clone()),
            certificate: !tls.common.certificates.is_empty(),
        }
    }

    fn payload_to(&self, cluster: &Cluster) -> Payload {
        match (self.payload, &cluster.protocol) {
            (Payload::Opaque, _) => Payload::Opaque,
            (_, UpstreamProtocol::Http2) => Payload::Http2,
            (_, UpstreamProtocol::Http1) => Payload::Http1,
            (own, _) => own,
        }
    }
}

/// All that a field says in one line: `tcp.maxConnections 1, http.maxRetries 2`.
fn leaves(value: &Value) -> String {
    fn walk(path: &str, value: &Value, out: &mut Vec<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, inner)| {
                let dot = if path.is_empty() { "" } else { "." };
                walk(&format!("{path}{dot}{name}"), inner, out);
            }),
            Value::String(text) => out.push(format!("{path} {text}")),
            other => out.push(format!("{path} {other}")),
        }
    }
    let mut out = Vec::new();
    walk("", value, &mut out);
    out.join(", ")
}

/// An HTTP request is answered, a connection without HTTP is closed.
fn refused(is_http: bool, status: u16, flag: &'static str, details: &str, summary: &str) -> Outcome {
    match is_http {
        true => answered(status, Some(flag), details, summary),
        false => Outcome {
            flag: Some(flag.to_owned()),
            details: details.to_owned(),
            summary: format!("closed: {summary}"),
            ..Outcome::default()
        },
    }
}
