//! Route tables by the names of clusters: `outbound|80||host`.

use envoy_api::Resource;
use envoy_api::route::{RouteConfiguration, VirtualHost};
use push_context::host;

use super::split_host_port;
use crate::Names;
use crate::context::Context;
use crate::names;
use crate::proto::{host_port, host_text};

/// The tables of these names; without names there is none.
pub(super) fn all(cx: &Context<'_>, wanted: Names<'_>) -> Vec<Resource> {
    let Names::List(list) = wanted else { return Vec::new() };
    list.iter().filter_map(|name| Some(Resource::new(name.clone(), &table(cx, name)?))).collect()
}

fn table(cx: &Context<'_>, name: &str) -> Option<RouteConfiguration> {
    let (port, _, hostname) = names::parse_outbound(name).filter(|(port, _, host)| *port != 0 && !host.is_empty())?;
    let mut virtual_hosts = crate::route::virtual_host::outbound(cx, name, port);
    // A table of all hosts of the port would be sent anew whenever any of them changes.
    virtual_hosts.retain(|v| is_for(v, &hostname.to_ascii_lowercase(), port));
    Some(RouteConfiguration { name: name.to_owned(), virtual_hosts, ..RouteConfiguration::default() })
}

fn is_for(virtual_host: &VirtualHost, hostname: &str, port: u16) -> bool {
    let (host, with_port) = (host_text(hostname), host_port(hostname, port));
    virtual_host.domains.iter().any(|domain| {
        let domain = domain.to_ascii_lowercase();
        let (name, own_port) = split_host_port(&domain).unwrap_or((&domain, ""));
        let fits = own_port.is_empty() || own_port == port.to_string();
        domain == host
            || domain == with_port
            || (fits && (name == host || (host::is_wildcard(name) && host::matches(name, hostname))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_hosts_of_other_names_and_ports_are_left_out() {
        let of = |domain: &str, hostname: &str| {
            is_for(&VirtualHost { domains: vec![domain.to_owned()], ..VirtualHost::default() }, hostname, 80)
        };
        for domain in ["a.ns.svc", "A.ns.svc", "a.ns.svc:80", "*.svc", "*.ns.svc:80", "*"] {
            assert!(of(domain, "a.ns.svc"), "{domain}");
        }
        for domain in ["b.ns.svc", "a.ns.svc:81", "*.ns.svc:81", "*.other", "a.ns"] {
            assert!(!of(domain, "a.ns.svc"), "{domain}");
        }
        assert!(of("[::1]:80", "::1") && of("[::1]", "::1"));
    }
}
