use mesh_types::{Labels, Protocol};

use super::{Check, text};
use crate::service_entry::{Resolution, ServiceEntry};
use crate::workload_entry::WorkloadEntry;
use crate::workload_group::{ReadinessProbe, WorkloadGroup};
use crate::{Severity, Violation};

impl ServiceEntry {
    /// What istiod would refuse or warn of (`ValidateServiceEntry`). Labels are the object's, by which it may refuse to be given
    /// addresses.
    pub fn validate(&self, namespace: &str, labels: &Labels) -> Vec<Violation> {
        Check::walk("spec", |check| self.walk(check, namespace, labels))
    }

    fn walk(&self, check: &mut Check, namespace: &str, labels: &Labels) {
        check.some("workloadSelector", &self.workload_selector, |check, selector| {
            check.at("labels", |check| check.selector_labels(&selector.labels));
        });
        if self.workload_selector.is_some() && !self.endpoints.is_empty() {
            check.error("only one of WorkloadSelector or Endpoints is allowed in Service Entry");
        }
        check.require(!self.hosts.is_empty(), "service entry must have at least one host");
        check.each("hosts", &self.hosts, |check, host| match host.as_str() {
            "*" => check.error("invalid host *"),
            host => {
                check.refuse(text::wildcard_host(host));
                let partial = host.starts_with('*') && !host.starts_with("*.");
                if partial && self.resolution != Resolution::DynamicDns {
                    check.warning(format!("partial wildcard {host:?} not recommended"));
                }
            }
        });
        check.each("addresses", &self.addresses, |check, address| check.refuse(text::subnet(address)));
        let cidr = self.addresses.iter().any(|address| address.contains('/'));
        if cidr && !matches!(self.resolution, Resolution::None | Resolution::Static) {
            check.at("addresses", |check| {
                check.error("CIDR addresses are allowed only for NONE/STATIC resolution types")
            });
        }
        let refuses = labels.get("networking.istio.io/enable-autoallocate-ip");
        let refuses = refuses.is_some_and(|text| text.eq_ignore_ascii_case("false"));
        self.ports(check, self.addresses.is_empty() && (refuses || self.resolution == Resolution::None));
        self.resolution(check);
        let http_or_tls = |protocol: Protocol| protocol.is_http() || protocol.is_tls();
        let protocols = || self.ports.iter().map(|port| Protocol::parse(&port.protocol));
        if self.resolution != Resolution::None && self.hosts.len() > 1 && !protocols().all(http_or_tls) {
            check.error("multiple hosts provided with non-HTTP, non-TLS ports");
        }
        check.export_to(namespace, &self.export_to, true);
    }

    /// `unknown`: connections to it have no address that they could be told by.
    fn ports(&self, check: &mut Check, unknown: bool) {
        for (index, port) in self.ports.iter().enumerate() {
            check.at(format_args!("ports[{index}]"), |check| {
                let earlier = &self.ports[..index];
                check.require(!earlier.iter().any(|other| other.name == port.name), "port name is already defined");
                check.require(
                    !earlier.iter().any(|other| other.number == port.number),
                    "port number is already defined",
                );
                if port.target_port != 0 {
                    check.port("targetPort", port.target_port);
                }
                if unknown && matches!(port.protocol.as_str(), "" | "TCP") {
                    check.warning(
                        "addresses are required for ports serving TCP (or unset) protocol when IP Autoallocation is not enabled",
                    );
                }
                check.at("name", |check| check.refuse(text::port_name(&port.name)));
                check.at("protocol", |check| check.refuse(text::protocol(&port.protocol)));
                check.port("number", port.number);
            });
        }
    }

    fn resolution(&self, check: &mut Check) {
        match self.resolution {
            Resolution::None => {
                check.require(self.endpoints.is_empty(), "no endpoints should be provided for resolution type none");
                if self.workload_selector.is_some() {
                    check.warning("workloadSelector should not be set when resolution mode is NONE");
                }
            }
            Resolution::Static => {
                check
                    .each("endpoints", &self.endpoints, |check, endpoint| workload(check, endpoint, Some(self), false));
            }
            Resolution::Dns | Resolution::DnsRoundRobin => {
                if self.endpoints.is_empty() {
                    check.each("hosts", &self.hosts, |check, host| {
                        let mode = self.resolution;
                        check.require(
                            text::fqdn(host).is_ok(),
                            &format!("must be FQDN if no endpoints are provided for resolution mode {mode}"),
                        );
                    });
                }
                if self.resolution == Resolution::DnsRoundRobin && self.endpoints.len() > 1 {
                    check.error("there must only be 0 or 1 endpoint for resolution mode DNS_ROUND_ROBIN");
                }
                check.each("endpoints", &self.endpoints, |check, endpoint| self.named_endpoint(check, endpoint));
                let tcp = self.ports.iter().any(|port| Protocol::parse(&port.protocol).is_tcp());
                if !self.addresses.is_empty() && tcp && self.hosts.len() > 1 {
                    check.warning(
                        "service entry can not have more than one host specified simultaneously with address and tcp port",
                    );
                }
            }
            Resolution::DynamicDns => {
                check.each("hosts", &self.hosts, |check, host| {
                    check.require(host.starts_with('*'), "host must be wildcarded for resolution mode DYNAMIC_DNS");
                });
                check.require(self.addresses.is_empty(), "addresses cannot be set for resolution type DYNAMIC_DNS");
                check.require(self.endpoints.is_empty(), "endpoints cannot be set for resolution type DYNAMIC_DNS");
                check.each("ports", &self.ports, |check, port| {
                    let protocol = Protocol::parse(&port.protocol);
                    let supported =
                        matches!(protocol, Protocol::Http | Protocol::Tls | Protocol::Grpc | Protocol::Http2);
                    check.require(
                        supported,
                        "only HTTP, TLS, GRPC, and HTTP2 protocols are supported for resolution type DYNAMIC_DNS",
                    );
                });
            }
        }
    }
}

impl ServiceEntry {
    /// An endpoint that proxies look up: neither a socket nor one without address.
    fn named_endpoint(&self, check: &mut Check, endpoint: &WorkloadEntry) {
        let address = endpoint.address.as_str();
        check.at("address", |check| {
            let good = text::is_ip(address) || text::fqdn(address).is_ok();
            let message = format!("endpoint address {address:?} is not a valid FQDN or an IP address");
            check.require(good, &message);
        });
        check.labels("labels", &endpoint.labels);
        endpoint_ports(check, endpoint, Some(self));
    }
}

impl WorkloadEntry {
    /// What istiod would refuse or warn of (`ValidateWorkloadEntry`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| workload(check, self, None, true))
    }
}

fn workload(check: &mut Check, entry: &WorkloadEntry, service: Option<&ServiceEntry>, names: bool) {
    let address = entry.address.as_str();
    let unix = address.strip_prefix("unix://");
    check.at("address", |check| match unix {
        Some(path) => check.refuse(text::unix_address(path)),
        None if address.is_empty() && entry.network.is_empty() => check.error("address is required"),
        None if address.is_empty() => check.warning(format!("address is unset with network {:?}", entry.network)),
        None if text::is_ip(address) => {}
        None if !names => check.error(format!("endpoint address {address:?} is not a valid IP address")),
        None => check.require(text::fqdn(address).is_ok(), "endpoint address is not a valid FQDN or an IP address"),
    });
    check.require(unix.is_none() || entry.ports.is_empty(), "unix endpoint must not include ports");
    if let (Some(_), Some(service)) = (unix, service) {
        check.require(service.ports.len() == 1, "exactly 1 service port required for unix endpoints");
    }
    endpoint_ports(check, entry, service);
    check.labels("labels", &entry.labels);
}

fn endpoint_ports(check: &mut Check, entry: &WorkloadEntry, service: Option<&ServiceEntry>) {
    check.entries("ports", &entry.ports, |check, name, port| {
        if service.is_some_and(|service| !service.ports.iter().any(|other| other.name == name)) {
            check.error(format!("endpoint port {port} is not defined by the service entry"));
        }
        check.refuse(text::port_name(name));
        check.require((1..=65535).contains(port), "port number must be in the range 1..65535");
    });
}

impl WorkloadGroup {
    /// What istiod would refuse or warn of (`ValidateWorkloadGroup`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.require(self.template.is_some(), "template is required");
            check.some("metadata", &self.metadata, |check, metadata| check.labels("labels", &metadata.labels));
            check.some("probe", &self.probe, probe);
        })
    }
}

fn probe(check: &mut Check, probe: &ReadinessProbe) {
    let numbers = [
        ("periodSeconds", probe.period_seconds),
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ];
    for (field, number) in numbers {
        check.at(field, |check| check.require(number >= 0, "must be non-negative"));
    }
    let methods = [
        ("httpGet", probe.http_get.is_some()),
        ("tcpSocket", probe.tcp_socket.is_some()),
        ("exec", probe.exec.is_some()),
        ("grpc", probe.grpc.is_some()),
    ];
    check.one_of(&methods);
    check.require(methods.iter().any(|(_, set)| *set), "unknown health check method");
    check.some("httpGet", &probe.http_get, |check, get| {
        check.port("port", get.port);
        check.at("scheme", |check| {
            check.require(matches!(get.scheme.as_str(), "" | "HTTP" | "HTTPS"), "must be HTTP or HTTPS")
        });
        check.each("httpHeaders", &get.http_headers, |check, header| {
            check.refuse(text::strict_header_name(&header.name))
        });
    });
    check.some("tcpSocket", &probe.tcp_socket, |check, socket| check.port("port", socket.port));
    check.some("exec", &probe.exec, |check, exec| check.require(!exec.command.is_empty(), "command is required"));
}

impl Violation {
    /// Whether the resource cannot be used because of it.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}
