use std::collections::{BTreeMap, BTreeSet};

use mesh_types::Protocol;

use super::destination_rule::connection_pool;
use super::{Check, text};
use crate::Violation;
use crate::gateway::{ServerTlsMode, ServerTlsSettings};
use crate::sidecar::{
    CaptureMode, IstioEgressListener, IstioIngressListener, OutboundTrafficPolicy, OutboundTrafficPolicyMode, Sidecar,
    SidecarPort,
};

impl Sidecar {
    /// What istiod would refuse or warn of (`ValidateSidecar`).
    pub fn validate(&self, namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.some("workloadSelector", &self.workload_selector, |check, selector| {
                check.at("labels", |check| check.selector_labels(&selector.labels));
            });
            let empty = Sidecar { workload_selector: self.workload_selector.clone(), ..Sidecar::default() } == *self;
            check.require(!empty, "empty configuration provided");
            let mut ports = BTreeSet::new();
            check.each("ingress", &self.ingress, |check, listener| {
                ingress(check, listener);
                let number = listener.port.as_ref().map(|port| port.number);
                check.require(
                    number.is_none_or(|number| ports.insert(number)),
                    "ports on IP bound listeners must be unique",
                );
            });
            check.some("inboundConnectionPool", &self.inbound_connection_pool, connection_pool);
            self.egress(check, namespace);
            check.some("outboundTrafficPolicy", &self.outbound_traffic_policy, outbound_policy);
        })
    }

    fn egress(&self, check: &mut Check, namespace: &str) {
        let (mut ports, mut sockets) = (BTreeSet::new(), BTreeSet::new());
        let last = self.egress.len().saturating_sub(1);
        for (index, listener) in self.egress.iter().enumerate() {
            check.at(format_args!("egress[{index}]"), |check| {
                match &listener.port {
                    None => check.require(
                        index == last,
                        "the egress listener with empty port should be the last listener in the list",
                    ),
                    Some(port) => {
                        egress_port(check, port, listener);
                        if port.number == 0 {
                            check.require(
                                sockets.insert(&listener.bind),
                                "unix domain socket values for listeners must be unique",
                            );
                        } else {
                            check.require(ports.insert(port.number), "ports on IP bound listeners must be unique");
                        }
                    }
                }
                check.require(!listener.hosts.is_empty(), "egress listener must contain at least one host");
                egress_hosts(check, &listener.hosts, namespace);
            });
        }
    }
}

fn ingress(check: &mut Check, listener: &IstioIngressListener) {
    let Some(port) = &listener.port else {
        return check.error("port is required for ingress listeners");
    };
    named_port(check, port);
    check.port("port.number", port.number);
    bind_address(check, &listener.bind);
    if !listener.default_endpoint.is_empty() {
        check.at("defaultEndpoint", |check| check.refuse(default_endpoint(&listener.default_endpoint)));
    }
    let protocol = Protocol::parse(&port.protocol);
    check.some("tls", &listener.tls, |check, tls| {
        ingress_tls(check, tls);
        check.require(protocol.is_tls(), "server cannot have TLS settings for non HTTPS/TLS ports");
    });
    check.some("connectionPool", &listener.connection_pool, |check, pool| {
        connection_pool(check, pool);
        if pool.http.is_some() && !protocol.is_http() {
            check.warning("HTTP connection pool settings are configured but the port's protocol is not HTTP; only TCP settings will apply");
        }
    });
}

/// `unix://PATH`, or a port of the loopback or the pod's own address.
fn default_endpoint(endpoint: &str) -> Result<(), String> {
    if let Some(path) = endpoint.strip_prefix("unix://") {
        return text::unix_address(path);
    }
    let invalid =
        || "must be of form 127.0.0.1:<port>,0.0.0.0:<port>,[::1]:port,[::]:port,unix://filepath or unset".to_owned();
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(invalid)?;
    if !matches!(host, "" | "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]") {
        return Err(invalid());
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(()),
        _ => Err(format!("port {port:?} is not a number in the range 1..65535")),
    }
}

fn ingress_tls(check: &mut Check, tls: &ServerTlsSettings) {
    let unsupported = [
        ("subjectAltNames", !tls.subject_alt_names.is_empty()),
        ("httpsRedirect", tls.https_redirect),
        ("credentialName", !tls.credential_name.is_empty()),
        ("credentialNames", !tls.credential_names.is_empty()),
        ("tlsCertificates", !tls.tls_certificates.is_empty()),
    ];
    for (field, set) in unsupported {
        check.at(field, |check| check.require(!set, "is not supported in ingress tls"));
    }
    let mode = tls.mode;
    if matches!(mode, ServerTlsMode::IstioMutual | ServerTlsMode::AutoPassthrough) {
        check.at("mode", |check| check.error(format!("cannot set mode to {mode} in sidecar ingress tls")));
    }
    if matches!(mode, ServerTlsMode::Simple | ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual) {
        check.require(!tls.server_certificate.is_empty(), "a server certificate is required");
        check.require(!tls.private_key.is_empty(), "a private key is required");
    }
    if matches!(mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual) {
        check.require(!tls.ca_certificates.is_empty(), "a CA bundle is required for mutual TLS");
    }
}

fn egress_port(check: &mut Check, port: &SidecarPort, listener: &IstioEgressListener) {
    named_port(check, port);
    if port.number != 0 {
        check.port("port.number", port.number);
        bind_address(check, &listener.bind);
        return;
    }
    check.at("bind", |check| match listener.bind.strip_prefix("unix://") {
        Some(path) => check.refuse(text::unix_address(path)),
        None => check.error("ports with 0 value must have a unix domain socket bind address"),
    });
    let mode = matches!(listener.capture_mode, CaptureMode::Default | CaptureMode::None);
    check.at("captureMode", |check| check.require(mode, "must be DEFAULT/NONE for unix domain socket listeners"));
}

fn named_port(check: &mut Check, port: &SidecarPort) {
    if !port.name.is_empty() {
        check.at("port.name", |check| check.refuse(text::port_name(&port.name)));
    }
    check.at("port.protocol", |check| check.refuse(text::protocol(&port.protocol)));
    check.at("port.targetPort", |check| check.require(port.target_port == 0, "has no impact on Sidecars"));
}

fn bind_address(check: &mut Check, bind: &str) {
    if !bind.is_empty() {
        check.at("bind", |check| check.require(text::is_ip(bind), "is not a valid IP address"));
    }
}

fn egress_hosts(check: &mut Check, hosts: &[String], namespace: &str) {
    let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (index, host) in hosts.iter().enumerate() {
        check.at(format_args!("hosts[{index}]"), |check| {
            let Some((place, name)) = host.split_once('/') else {
                return check.error("host must be of form namespace/dnsName");
            };
            if place.is_empty() || name.is_empty() {
                return check.error("config namespace and dnsName in host entry cannot be empty");
            }
            let excluded = place.strip_prefix('~');
            let valid = matches!(excluded.unwrap_or(place), "" | "*" | ".");
            check.require(
                valid || text::is_dns_label(excluded.unwrap_or(place)),
                &format!("invalid namespace value {place:?} in sidecar"),
            );
            check.require(name == "*" || name.contains('.'), "short names (non FQDN) are not allowed");
            check.refuse(text::wildcard_host(name));
            if name.contains('*') && name != "*" && !name.starts_with("*.") {
                check.error(format!("partial wildcard {name:?} not allowed"));
            }
            if excluded.is_none() {
                let names = seen.entry(if place == "." { namespace } else { place }).or_default();
                let covered = names.contains("*") || names.contains(name) || (name == "*" && !names.is_empty());
                if covered {
                    check.warning(format!("duplicated egress host: {host}"));
                }
                names.insert(name);
            }
        });
    }
    if seen.len() > 1 && seen.get("*").is_some_and(|names| names.contains("*")) {
        check.warning("`*/*` host select all resources, no other hosts can be added");
    }
}

fn outbound_policy(check: &mut Check, policy: &OutboundTrafficPolicy) {
    check.some("egressProxy", &policy.egress_proxy, |check, proxy| {
        if policy.mode != OutboundTrafficPolicyMode::AllowAny {
            return check.error("egress_proxy must be set only with ALLOW_ANY outbound_traffic_policy mode");
        }
        check.at("host", |check| check.refuse(text::fqdn(&proxy.host)));
        check.require(proxy.port.is_some(), "egress_proxy port must be non-nil");
        super::virtual_service::destination(check, proxy);
    });
}
