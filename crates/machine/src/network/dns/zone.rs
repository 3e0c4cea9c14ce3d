//! The names of the cluster and what they mean. Pure.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::network::PODS_V4;
use crate::services::ServiceView;

/// As CoreDNS' kubernetes plugin answers by default.
const TTL: u32 = 5;
const DOMAIN: &str = "cluster.local";

/// What a reverse lookup needs of a pod that no service names.
pub(crate) struct PodName {
    pub(crate) namespace: String,
    pub(crate) ip: IpAddr,
}

/// All names of the cluster at one moment.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    /// By `name.namespace`.
    services: HashMap<String, Service>,
    reverse: HashMap<IpAddr, String>,
    /// Namespaces with pods, for `1-2-3-4.NS.pod`.
    namespaces: Vec<String>,
}

#[derive(Debug)]
struct Service {
    cluster_ips: Vec<IpAddr>,
    external_name: Option<String>,
    /// (name, protocol in lower case, port)
    ports: Vec<(String, String, u16)>,
    /// Of headless services.
    endpoints: Vec<Endpoint>,
}

#[derive(Debug)]
struct Endpoint {
    hostname: String,
    ips: Vec<IpAddr>,
    ports: Vec<Option<u16>>,
}

/// What the zone has to say to a question.
pub(super) enum Answer {
    /// The name is not the cluster's.
    Foreign,
    /// An ExternalName service: the record, and the name it leads to.
    Alias(Box<Record>, Name),
    Own {
        code: ResponseCode,
        answers: Vec<Record>,
        additionals: Vec<Record>,
        authority: Vec<Record>,
    },
}

impl Zone {
    pub(crate) fn new(services: &[ServiceView], pods: &[PodName]) -> Self {
        let mut zone = Self::default();
        for view in services {
            let headless = view.cluster_ips.is_empty() && view.external_name.is_none();
            let full = format!("{}.{}.svc.{DOMAIN}.", view.name, view.namespace);
            for ip in &view.cluster_ips {
                zone.reverse.insert(*ip, full.clone());
            }
            let mut endpoints = Vec::new();
            if headless {
                for endpoint in view.serving() {
                    // Unnamed endpoints are reachable by their address with dashes.
                    let hostname = endpoint.hostname.clone().unwrap_or_else(|| dashed(endpoint.ips.first()));
                    for ip in &endpoint.ips {
                        zone.reverse.entry(*ip).or_insert_with(|| format!("{hostname}.{full}"));
                    }
                    endpoints.push(Endpoint { hostname, ips: endpoint.ips.clone(), ports: endpoint.ports.clone() });
                }
            }
            zone.services.insert(
                format!("{}.{}", view.name, view.namespace).to_ascii_lowercase(),
                Service {
                    cluster_ips: view.cluster_ips.clone(),
                    external_name: view.external_name.clone(),
                    ports: view
                        .ports
                        .iter()
                        .map(|p| (p.name.clone(), p.protocol.to_ascii_lowercase(), p.port))
                        .collect(),
                    endpoints,
                },
            );
        }
        for pod in pods {
            zone.namespaces.push(pod.namespace.clone());
            let name = format!("{}.{}.pod.{DOMAIN}.", dashed(Some(&pod.ip)), pod.namespace);
            zone.reverse.entry(pod.ip).or_insert(name);
        }
        zone.namespaces.sort();
        zone.namespaces.dedup();
        zone
    }

    pub(super) fn answer(&self, question: &Query) -> Answer {
        let name = question.name.to_ascii().to_ascii_lowercase();
        let name = name.trim_end_matches('.');
        if let Some(ip) = reverse_address(name) {
            return match self.reverse.get(&ip) {
                Some(target) if question.query_type == RecordType::PTR => match Name::from_ascii(target) {
                    Ok(target) => {
                        own(vec![Record::from_rdata(question.name.clone(), TTL, RData::PTR(PTR(target)))], Vec::new())
                    }
                    Err(_) => nothing(ResponseCode::ServFail),
                },
                Some(_) => nothing(ResponseCode::NoError),
                None if cluster_address(ip) => nothing(ResponseCode::NXDomain),
                None => Answer::Foreign,
            };
        }
        let Some(rest) = name.strip_suffix(DOMAIN) else {
            return Answer::Foreign;
        };
        if rest.is_empty() {
            return nothing(ResponseCode::NoError);
        }
        let Some(rest) = rest.strip_suffix('.') else {
            return Answer::Foreign;
        };
        let labels: Vec<&str> = rest.split('.').collect();
        match labels.as_slice() {
            ["dns-version"] if question.query_type == RecordType::TXT => own(
                vec![Record::from_rdata(
                    question.name.clone(),
                    TTL,
                    RData::TXT(hickory_proto::rr::rdata::TXT::new(vec!["1.1.0".to_owned()])),
                )],
                Vec::new(),
            ),
            ["svc" | "pod"] => nothing(ResponseCode::NoError),
            [namespace, "svc"] => {
                nothing(if self.has_namespace(namespace) { ResponseCode::NoError } else { ResponseCode::NXDomain })
            }
            [before @ .., service, namespace, "svc"] => self.service(question, before, service, namespace),
            [ip, namespace, "pod"] => self.pod(question, ip, namespace),
            _ => nothing(ResponseCode::NXDomain),
        }
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.iter().any(|known| known == namespace)
            || self.services.keys().any(|key| key.split_once('.').is_some_and(|(_, ns)| ns == namespace))
    }

    fn service(&self, question: &Query, before: &[&str], name: &str, namespace: &str) -> Answer {
        let Some(service) = self.services.get(&format!("{name}.{namespace}")) else {
            return nothing(ResponseCode::NXDomain);
        };
        if let Some(external) = &service.external_name {
            let Ok(target) = Name::from_ascii(format!("{}.", external.trim_end_matches('.'))) else {
                return nothing(ResponseCode::ServFail);
            };
            let record = Record::from_rdata(question.name.clone(), TTL, RData::CNAME(CNAME(target.clone())));
            return Answer::Alias(Box::new(record), target);
        }
        let base = format!("{name}.{namespace}.svc.{DOMAIN}.");
        match before {
            [] if question.query_type == RecordType::SRV => service.srv(question, &base, None, None),
            [] => {
                let ips = if service.cluster_ips.is_empty() {
                    service.endpoints.iter().flat_map(|endpoint| &endpoint.ips).copied().collect()
                } else {
                    service.cluster_ips.clone()
                };
                if ips.is_empty() {
                    return nothing(ResponseCode::NXDomain);
                }
                addresses(question, &ips)
            }
            [port, protocol] if port.starts_with('_') && protocol.starts_with('_') => {
                service.srv(question, &base, Some(&port[1..]), Some(&protocol[1..]))
            }
            [hostname] => match service.endpoints.iter().find(|endpoint| endpoint.hostname == *hostname) {
                Some(endpoint) => addresses(question, &endpoint.ips),
                None => nothing(ResponseCode::NXDomain),
            },
            _ => nothing(ResponseCode::NXDomain),
        }
    }

    fn pod(&self, question: &Query, ip: &str, namespace: &str) -> Answer {
        let parsed = ip.replace('-', ".").parse::<IpAddr>().or_else(|_| ip.replace('-', ":").parse::<IpAddr>());
        match parsed {
            // As CoreDNS' `pods insecure`: the address need not exist, the namespace must.
            Ok(ip) if self.has_namespace(namespace) => addresses(question, &[ip]),
            _ => nothing(ResponseCode::NXDomain),
        }
    }
}

impl Service {
    fn srv(&self, question: &Query, base: &str, port: Option<&str>, protocol: Option<&str>) -> Answer {
        let matching = self.ports.iter().enumerate().filter(|(_, (name, proto, _))| {
            port.is_none_or(|wanted| wanted == name) && protocol.is_none_or(|wanted| wanted == proto)
        });
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        let mut add = |target: String, number: u16, ips: &[IpAddr]| {
            if let Ok(target) = Name::from_ascii(target) {
                answers.push(Record::from_rdata(
                    question.name.clone(),
                    TTL,
                    RData::SRV(SRV::new(0, 100, number, target.clone())),
                ));
                additionals.extend(ips.iter().map(|ip| address(&target, *ip)));
            }
        };
        for (index, (_, _, number)) in matching {
            if self.cluster_ips.is_empty() {
                for endpoint in &self.endpoints {
                    if let Some(target) = endpoint.ports.get(index).copied().flatten() {
                        add(format!("{}.{base}", endpoint.hostname), target, &endpoint.ips);
                    }
                }
            } else {
                add(base.to_owned(), *number, &self.cluster_ips);
            }
        }
        if answers.is_empty() {
            return nothing(ResponseCode::NXDomain);
        }
        if !matches!(question.query_type, RecordType::SRV | RecordType::ANY) {
            return nothing(ResponseCode::NoError);
        }
        own(answers, additionals)
    }
}

fn own(answers: Vec<Record>, additionals: Vec<Record>) -> Answer {
    Answer::Own { code: ResponseCode::NoError, answers, additionals, authority: Vec::new() }
}

/// An empty answer with the zone's SOA, so that resolvers may remember it for [`TTL`].
fn nothing(code: ResponseCode) -> Answer {
    let authority = match (
        Name::from_ascii("cluster.local."),
        Name::from_ascii("ns.dns.cluster.local."),
        Name::from_ascii("hostmaster.cluster.local."),
    ) {
        (Ok(zone), Ok(primary), Ok(contact)) => {
            vec![Record::from_rdata(zone, TTL, RData::SOA(SOA::new(primary, contact, 1, 7200, 1800, 86_400, TTL)))]
        }
        _ => Vec::new(),
    };
    Answer::Own { code, answers: Vec::new(), additionals: Vec::new(), authority }
}

fn addresses(question: &Query, ips: &[IpAddr]) -> Answer {
    let wanted = |ip: &&IpAddr| match question.query_type {
        RecordType::A => ip.is_ipv4(),
        RecordType::AAAA => ip.is_ipv6(),
        RecordType::ANY => true,
        _ => false,
    };
    let answers: Vec<Record> = ips.iter().filter(wanted).map(|ip| address(&question.name, *ip)).collect();
    if answers.is_empty() { nothing(ResponseCode::NoError) } else { own(answers, Vec::new()) }
}

fn address(name: &Name, ip: IpAddr) -> Record {
    let data = match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    };
    Record::from_rdata(name.clone(), TTL, data)
}

fn dashed(ip: Option<&IpAddr>) -> String {
    ip.map(|ip| ip.to_string().replace(['.', ':'], "-")).unwrap_or_default()
}

/// `4.3.2.1.in-addr.arpa` and the nibbles of `ip6.arpa`.
fn reverse_address(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut parts: Vec<u8> = rest.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        parts.reverse();
        let octets: [u8; 4] = parts.try_into().ok()?;
        return Some(IpAddr::V4(Ipv4Addr::from(octets)));
    }
    let rest = name.strip_suffix(".ip6.arpa")?;
    let nibbles: Vec<char> =
        rest.split('.').rev().map(|part| part.chars().next().filter(|_| part.len() == 1)).collect::<Option<_>>()?;
    if nibbles.len() != 32 {
        return None;
    }
    let text: String = nibbles.into_iter().collect();
    u128::from_str_radix(&text, 16).ok().map(|bits| IpAddr::V6(bits.into()))
}

fn cluster_address(ip: IpAddr) -> bool {
    match (ip, PODS_V4.ip) {
        (IpAddr::V4(ip), IpAddr::V4(pods)) => ip.octets()[..2] == pods.octets()[..2] || ip.octets()[..2] == [10, 96],
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::{EndpointView, PortView};

    fn zone() -> Zone {
        let port =
            |name: &str, port| PortView { name: name.to_owned(), port, protocol: "TCP".to_owned(), app_protocol: None };
        let service = |name: &str, ips: &[&str]| ServiceView {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            external_name: None,
            publish_not_ready: false,
            ports: vec![port("http", 80)],
            endpoints: vec![EndpointView {
                ips: vec!["10.244.0.9".parse().unwrap()],
                pod: "db-0".to_owned(),
                pod_uid: String::new(),
                hostname: Some("db-0".to_owned()),
                ready: true,
                terminating: false,
                ports: vec![Some(8080)],
            }],
            selected: true,
        };
        let mut external = service("out", &[]);
        external.external_name = Some("example.com".to_owned());
        let pods = [PodName { namespace: "shop".to_owned(), ip: "10.244.0.7".parse().unwrap() }];
        Zone::new(&[service("web", &["10.96.0.5"]), service("db", &[]), external], &pods)
    }

    #[track_caller]
    fn check(kind: RecordType, name: &str, expected: &str) {
        let question = Query::query(Name::from_ascii(name).unwrap(), kind);
        let text = match zone().answer(&question) {
            Answer::Foreign => "foreign".to_owned(),
            Answer::Alias(_, target) => format!("alias {target}"),
            Answer::Own { code: ResponseCode::NoError, answers, .. } => {
                answers.iter().map(|record| record.data.to_string()).collect::<Vec<_>>().join(", ")
            }
            Answer::Own { code, .. } => format!("{code:?}"),
        };
        assert_eq!(text, expected, "{name}");
    }

    #[test]
    fn names_of_the_cluster() {
        use RecordType as T;
        check(T::A, "web.shop.svc.cluster.local.", "10.96.0.5");
        check(T::A, "WEB.shop.svc.Cluster.Local.", "10.96.0.5");
        check(T::AAAA, "web.shop.svc.cluster.local.", "");
        check(T::A, "db.shop.svc.cluster.local.", "10.244.0.9");
        check(T::A, "db-0.db.shop.svc.cluster.local.", "10.244.0.9");
        check(T::A, "db-1.db.shop.svc.cluster.local.", "NXDomain");
        check(T::SRV, "_http._tcp.web.shop.svc.cluster.local.", "0 100 80 web.shop.svc.cluster.local.");
        check(T::SRV, "_http._tcp.db.shop.svc.cluster.local.", "0 100 8080 db-0.db.shop.svc.cluster.local.");
        check(T::A, "out.shop.svc.cluster.local.", "alias example.com.");
        check(T::A, "10-244-0-7.shop.pod.cluster.local.", "10.244.0.7");
        check(T::PTR, "5.0.96.10.in-addr.arpa.", "web.shop.svc.cluster.local.");
        check(T::PTR, "9.0.244.10.in-addr.arpa.", "db-0.db.shop.svc.cluster.local.");
        check(T::PTR, "7.0.244.10.in-addr.arpa.", "10-244-0-7.shop.pod.cluster.local.");
        check(T::PTR, "8.8.8.8.in-addr.arpa.", "foreign");
        check(T::A, "nope.shop.svc.cluster.local.", "NXDomain");
        check(T::A, "example.com.", "foreign");
        check(T::A, "notcluster.local.", "foreign");
    }
}
