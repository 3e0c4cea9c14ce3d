//! Addresses: what a name means to a pod, and where its node sends what no proxy has picked an endpoint for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use registry::{Endpoint, Health, Provider, Service};

use crate::Configuration;
use crate::mesh::{Mesh, Pod};
use crate::request::{Request, Url};
use crate::trace::{Outcome, Step};
use crate::vacancy::{self, Vacancy};

/// An address that stands for whatever DNS says (TEST-NET-3).
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// The address that a name means to the pod, or what becomes of a request to a name that means none.
pub(crate) fn resolve(mesh: &Mesh, pod: &Pod, request: &Request, steps: &mut Vec<Step>) -> Result<IpAddr, Outcome> {
    let host = &request.url.host;
    if let Ok(ip) = host.parse() {
        steps.push(Step::new("name", format!("{ip} is an address")));
        return Ok(ip);
    }
    if host == "localhost" {
        steps.push(Step::new("name", "localhost is the pod itself"));
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    if let Some(service) = mesh.service(pod, host) {
        return of_service(mesh, service, request, steps);
    }
    if let Some((named, service)) = host.split_once('.').and_then(|(name, rest)| of_set(mesh, pod, name, rest)) {
        let text = format!("{host} is pod {} of {}, headless", named.full_name(), service.hostname);
        steps.push(Step::new("name", text).source(Some(mesh.service_source(service, ""))));
        return Ok(named.ip);
    }
    if is_of_cluster(mesh, host) {
        let why = missing(mesh, pod, host);
        steps.push(Step::new("name", format!("{host} is nothing that DNS knows")).fact(why.as_str()).end());
        return Err(Outcome {
            summary: format!("not sent, DNS has no address for {host}: {why}"),
            ..Outcome::default()
        });
    }
    let text = format!("{host} is no service of the mesh; DNS says where it is ({ELSEWHERE} stands for that)");
    steps.push(Step::new("name", text));
    Ok(ELSEWHERE.into())
}

fn of_service(mesh: &Mesh, service: &Service, request: &Request, steps: &mut Vec<Step>) -> Result<IpAddr, Outcome> {
    let Url { host, port, .. } = &request.url;
    let own = service.cluster_ips.first().map(|ip| &**ip).or(Some(&*service.default_address));
    let fixed = own.and_then(|ip| ip.split('/').next()?.parse::<IpAddr>().ok()).filter(|ip| !ip.is_unspecified());
    let endpoints = mesh.files.push.registry.endpoints(&service.hostname, &service.namespace);
    // What DNS answers for a headless service.
    let answers = |endpoint: &&Endpoint| endpoint.health != Health::Unhealthy || service.publish_not_ready;
    let endpoint =
        || endpoints.iter().filter(answers).find_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok());
    let name = &service.hostname;
    let (ip, what) = if let Some(ip) = fixed {
        (Some(ip), format!("{host} is {name}, {ip}"))
    } else if let Some(ip) = endpoint() {
        (Some(ip), format!("{host} is {name}, headless; one of its endpoints: {ip}"))
    } else if service.provider == Provider::Kubernetes && service.external_name.is_empty() {
        (None, format!("{host} is {name}, headless"))
    } else {
        (Some(ELSEWHERE.into()), format!("{host} is {name}, without an address; {ELSEWHERE} stands for it"))
    };
    let mut step = Step::new("name", what).source(Some(mesh.service_source(service, "")));
    if service.port(*port).is_none() {
        step = step.fact(format!("it has no port {port}, it has {}", vacancy::ports(service)));
    }
    let Some(ip) = ip else {
        let port = service.port(*port).or(service.ports.first()).map_or(*port, |port| port.port);
        let why = vacancy::of_port(mesh, service, port).map_or_else(String::new, |vacancy| format!(": {vacancy}"));
        steps.push(step.end());
        return Err(Outcome { summary: format!("not sent, DNS has no address for {host}{why}"), ..Outcome::default() });
    };
    steps.push(step);
    Ok(ip)
}

/// `NAME.SERVICE`: a pod of a headless service. A workload of files has one pod, without a number.
fn of_set<'m>(mesh: &'m Mesh, pod: &Pod, name: &str, rest: &str) -> Option<(&'m Pod, &'m Service)> {
    let service = mesh.service(pod, rest).filter(|service| service.is_headless() && !service.is_wildcard())?;
    let is_meant = |other: &&std::rc::Rc<Pod>| {
        let numbered = name.rsplit_once('-').is_some_and(|(set, n)| set == other.name && n.parse::<u32>().is_ok());
        *other.namespace == *service.namespace
            && (other.name == name || numbered)
            && mesh_types::selects(&service.selector, &other.labels)
    };
    Some((mesh.pods.iter().find(is_meant)?, service))
}

/// Whether nobody but the cluster could know a name; the API server's service is of no manifest.
fn is_of_cluster(mesh: &Mesh, host: &str) -> bool {
    let host = host.trim_end_matches('.');
    let domain = &mesh.files.push.settings.domain;
    let of_api_server = host.strip_suffix(&format!(".svc.{domain}")).or(host.strip_suffix(".svc")).unwrap_or(host);
    of_api_server != "kubernetes.default"
        && (!host.contains('.') || host.ends_with(".svc") || host.ends_with(&format!(".{domain}")))
}

/// Why a name of the cluster means nothing, with what there is instead.
fn missing(mesh: &Mesh, pod: &Pod, host: &str) -> String {
    let mut labels = host.split('.');
    let name = labels.next().unwrap_or_default();
    let namespace = labels.next().unwrap_or(&pod.namespace);
    let services = || mesh.files.push.registry.services.iter().filter(|s| s.provider == Provider::Kubernetes);
    let elsewhere: Vec<String> =
        services().filter(|s| *s.name == *name).map(|s| format!("{}.{}", s.name, s.namespace)).collect();
    if !elsewhere.is_empty() {
        return format!("namespace {namespace} has no Service {name}; there is {}", vacancy::shown(&elsewhere));
    }
    let here: Vec<String> = services().filter(|s| *s.namespace == *namespace).map(|s| s.name.to_string()).collect();
    match here.is_empty() {
        true => format!("there is no Service {name}, and none in namespace {namespace}"),
        false => format!("there is no Service {name}; namespace {namespace} has {}", vacancy::shown(&here)),
    }
}

/// Where the node sends a connection to a service's own address, which nobody in the mesh has picked an endpoint for.
///
/// # Errors
/// When nobody is there to take it.
pub(crate) fn behind_service(mesh: &Mesh, address: SocketAddr, steps: &mut Vec<Step>) -> Result<SocketAddr, Vacancy> {
    let registry = &mesh.files.push.registry;
    let ip = address.ip().to_string();
    let Some(service) = registry.services.iter().find(|service| service.cluster_ips.iter().any(|own| **own == *ip))
    else {
        return Ok(address);
    };
    let name = &service.hostname;
    if let Some(vacancy) = vacancy::of_port(mesh, service, address.port()) {
        let step = Step::new("node", format!("{address} is the address of {name}, and nobody answers there"));
        steps.push(step.fact(vacancy.to_string()).source(Some(vacancy.source.clone())).end());
        return Err(vacancy);
    }
    let ready = registry.endpoints_by_port(service, address.port());
    let ready = ready.filter(|endpoint| matches!(endpoint.health, Health::Healthy | Health::Unknown));
    let all: Vec<SocketAddr> = ready
        .filter_map(|endpoint| Some(SocketAddr::new(endpoint.addresses.first()?.parse().ok()?, endpoint.port)))
        .collect();
    let text = match all.as_slice() {
        // Endpoints that have names only.
        [] => format!("{address} is the address of {name}"),
        [one] => format!("{address} is the address of {name}; the node sends it to {one}"),
        [first, ..] => {
            format!("{address} is the address of {name}; the node picks one of {}, for instance {first}", all.len())
        }
    };
    steps.push(Step::new("node", text).source(Some(mesh.service_source(service, ""))));
    Ok(all.first().copied().unwrap_or(address))
}

/// The address that a name means where only a proxy's configuration is known: Istio writes services' addresses into the domains of
/// their virtual hosts.
pub(crate) fn in_tables(at: &Configuration, request: &Request) -> (IpAddr, Step) {
    let host = &request.url.host;
    if let Ok(ip) = host.parse() {
        return (ip, Step::new("name", format!("{ip} is an address")));
    }
    let hosts = at.tables.values().flat_map(|table| table.virtual_hosts());
    let named = hosts.filter(|vhost| vhost.domains.iter().any(|domain| domain.eq_ignore_ascii_case(host)));
    let found = named.flat_map(|vhost| &vhost.domains).find_map(|domain| domain.parse::<IpAddr>().ok());
    match found {
        Some(ip) => (ip, Step::new("name", format!("{host} is {ip}, as its virtual host says"))),
        None => {
            let text = format!("{host} has no address in this configuration; {ELSEWHERE} stands for it");
            (IpAddr::V4(ELSEWHERE), Step::new("name", text))
        }
    }
}
