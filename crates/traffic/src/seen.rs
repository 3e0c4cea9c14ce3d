//! Istio's standard metrics of one proxy, as calls. Pure.

use std::collections::BTreeMap;

/// Who called what, as one proxy counted it.
#[derive(Clone, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Call {
    /// The proxy was the client's.
    pub(crate) outbound: bool,
    /// Workload, and `NAMESPACE` if it is known.
    pub(crate) from: String,
    pub(crate) from_namespace: String,
    pub(crate) to: String,
    pub(crate) to_namespace: String,
    /// The service's host name, or a cluster that stands for the outside.
    pub(crate) host: String,
    pub(crate) service_namespace: String,
    pub(crate) protocol: String,
    /// HTTP status; empty for TCP.
    pub(crate) code: String,
    pub(crate) flags: String,
    pub(crate) security: String,
}

/// Requests (or connections, for TCP) of each call.
pub(crate) fn calls(text: &str) -> BTreeMap<Call, u64> {
    let mut out = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("istio_")) {
        let Some(sample) = machine::parse_sample(line) else { continue };
        if !matches!(sample.name, "istio_requests_total" | "istio_tcp_connections_opened_total") || sample.value < 1.0 {
            continue;
        }
        let label = |name: &str| sample.labels.get(name).cloned().unwrap_or_default();
        let call = Call {
            outbound: label("reporter") == "source",
            from: label("source_workload"),
            from_namespace: label("source_workload_namespace"),
            to: label("destination_workload"),
            to_namespace: label("destination_workload_namespace"),
            host: label("destination_service"),
            service_namespace: label("destination_service_namespace"),
            protocol: label("request_protocol"),
            code: label("response_code"),
            flags: label("response_flags"),
            security: label("connection_security_policy"),
        };
        *out.entry(call).or_default() += sample.value as u64;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_connections_are_counted() {
        let text = "# TYPE istio_requests_total counter\n\
            istio_requests_total{reporter=\"source\",source_workload=\"a\",destination_service=\"b.x.svc\",response_code=\"200\"} 3\n\
            istio_requests_total{reporter=\"source\",source_workload=\"a\",destination_service=\"b.x.svc\",response_code=\"503\",response_flags=\"UH\"} 1\n\
            istio_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"a\",request_protocol=\"tcp\"} 2\n\
            istio_request_bytes_count{reporter=\"source\"} 9\n";
        let calls = calls(text);
        let numbers: Vec<_> = calls.iter().map(|(call, n)| (call.outbound, call.code.as_str(), *n)).collect();
        assert_eq!(numbers, [(false, "", 2), (true, "200", 3), (true, "503", 1)]);
    }
}
