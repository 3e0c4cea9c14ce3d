//! Names of clusters, and other fixed names that istiod and its proxies agree on.

use registry::{Provider, Service};

pub(crate) const BLACK_HOLE: &str = "BlackHoleCluster";
pub(crate) const PASSTHROUGH: &str = "PassthroughCluster";
pub(crate) const ALLOW_ANY_DYNAMIC_DNS: &str = "AllowAnyDynamicDNSCluster";
pub(crate) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
pub(crate) const HTTP_PROXY_ROUTE: &str = "http_proxy";

/// A port as text. Names are made by the thousand, and formatting machinery takes as long as all the rest of that.
pub(crate) struct Digits {
    bytes: [u8; 5],
    start: usize,
}

impl Digits {
    pub(crate) fn of(mut port: u16) -> Digits {
        let (mut bytes, mut start) = ([b'0'; 5], 5);
        loop {
            start -= 1;
            bytes[start] = b'0' + (port % 10) as u8;
            port /= 10;
            if port == 0 {
                return Digits { bytes, start };
            }
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[self.start..]).unwrap_or_default()
    }
}

/// The cluster of a service port, or of a subset of it: `outbound|80|v1|host`.
pub(crate) fn outbound(port: u16, subset: &str, host: &str) -> String {
    ["outbound|", Digits::of(port).as_str(), "|", subset, "|", host].concat()
}

/// The cluster of a port of the workload itself.
pub(crate) fn inbound(port: u16) -> String {
    format!("inbound|{port}||")
}

/// The SNI under which a client asks for a service port: `outbound_.80_.v1_.host`.
pub(crate) fn sni(port: u16, subset: &str, host: &str) -> String {
    ["outbound_.", Digits::of(port).as_str(), "_.", subset, "_.", host].concat()
}

/// The parts of an outbound cluster's name: port, subset and host.
pub(crate) fn parse_outbound(name: &str) -> Option<(u16, &str, &str)> {
    let mut parts = name.strip_prefix("outbound|")?.splitn(3, '|');
    Some((parts.next()?.parse().ok()?, parts.next()?, parts.next()?))
}

/// What MeshConfig's patterns for statistics are filled with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StatName<'a> {
    /// Full host name.
    pub(crate) host: &'a str,
    /// Name and namespace, of services of Kubernetes.
    pub(crate) kubernetes: Option<(&'a str, &'a str)>,
    pub(crate) subset: &'a str,
    pub(crate) port: u16,
    pub(crate) port_name: &'a str,
    /// Not known to all who ask.
    pub(crate) target: Option<u16>,
}

impl StatName<'_> {
    /// Fills a pattern (istiod `BuildStatPrefix`).
    pub(crate) fn fill(&self, pattern: &str) -> String {
        let short = self.kubernetes.map_or_else(|| self.host.to_owned(), |(name, ns)| format!("{name}.{ns}"));
        let out = pattern
            .replace("%SERVICE%", &short)
            .replace("%SERVICE_NAME%", self.kubernetes.map_or(self.host, |(name, _)| name))
            .replace("%SERVICE_FQDN%", self.host)
            .replace("%SUBSET_NAME%", self.subset);
        let out = match self.target {
            Some(target) => out.replace("%TARGET_PORT%", &target.to_string()),
            None => out,
        };
        out.replace("%SERVICE_PORT%", &self.port.to_string()).replace("%SERVICE_PORT_NAME%", self.port_name)
    }
}

/// Name and namespace of a service of Kubernetes.
pub(crate) fn of_kubernetes(service: &Service) -> Option<(&str, &str)> {
    (service.provider == Provider::Kubernetes).then_some((&*service.name, &*service.namespace))
}

/// Metric names end here, so that statistics can be told apart (istio `constants.StatPrefixDelimiter`).
pub(crate) fn stat(name: &str) -> String {
    [name, ";"].concat()
}

/// `ADDRESS_PORT`; unix sockets have port 0.
pub(crate) fn listener(bind: &str, port: u16) -> String {
    [bind, "_", Digits::of(port).as_str()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_named_by_pattern() {
        let name = StatName {
            host: "a.b.svc.cluster.local",
            kubernetes: Some(("a", "b")),
            subset: "v1",
            port: 80,
            port_name: "http",
            target: Some(0),
        };
        let all =
            "%SERVICE%_%SERVICE_NAME%_%SERVICE_FQDN%_%SUBSET_NAME%_%TARGET_PORT%_%SERVICE_PORT%_%SERVICE_PORT_NAME%";
        assert_eq!(name.fill(all), "a.b_a_a.b.svc.cluster.local_v1_0_80_http");
        let outside = StatName { kubernetes: None, target: None, ..name };
        assert_eq!(outside.fill("%SERVICE%|%TARGET_PORT%"), "a.b.svc.cluster.local|%TARGET_PORT%");
    }

    #[test]
    fn ports_are_written_in_full() {
        for port in [0, 7, 80, 100, 8080, 65535] {
            assert_eq!(Digits::of(port).as_str(), port.to_string());
        }
    }

    #[test]
    fn outbound_names_round_trip() {
        let name = outbound(9080, "v1", "reviews.default.svc.cluster.local");
        assert_eq!(parse_outbound(&name), Some((9080, "v1", "reviews.default.svc.cluster.local")));
        assert_eq!(parse_outbound("inbound|80||"), None);
        assert_eq!(parse_outbound("outbound|x||a"), None);
    }
}
