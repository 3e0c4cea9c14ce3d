//! Names of clusters, and other fixed names that istiod and its proxies agree on.

pub(crate) const BLACK_HOLE: &str = "BlackHoleCluster";
pub(crate) const PASSTHROUGH: &str = "PassthroughCluster";
pub(crate) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
pub(crate) const HTTP_PROXY_ROUTE: &str = "http_proxy";

/// The cluster of a service port, or of a subset of it: `outbound|80|v1|host`.
pub(crate) fn outbound(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// The cluster of a port of the workload itself.
pub(crate) fn inbound(port: u16) -> String {
    format!("inbound|{port}||")
}

/// The SNI under which a client asks for a service port: `outbound_.80_.v1_.host`.
pub(crate) fn sni(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// The parts of an outbound cluster's name: port, subset and host.
pub(crate) fn parse_outbound(name: &str) -> Option<(u16, &str, &str)> {
    let mut parts = name.strip_prefix("outbound|")?.splitn(3, '|');
    Some((parts.next()?.parse().ok()?, parts.next()?, parts.next()?))
}

/// Metric names end here, so that statistics can be told apart (istio `constants.StatPrefixDelimiter`).
pub(crate) fn stat(name: &str) -> String {
    format!("{name};")
}

/// `ADDRESS_PORT`; unix sockets have port 0.
pub(crate) fn listener(bind: &str, port: u16) -> String {
    format!("{bind}_{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outbound_names_round_trip() {
        let name = outbound(9080, "v1", "reviews.default.svc.cluster.local");
        assert_eq!(parse_outbound(&name), Some((9080, "v1", "reviews.default.svc.cluster.local")));
        assert_eq!(parse_outbound("inbound|80||"), None);
        assert_eq!(parse_outbound("outbound|x||a"), None);
    }
}
