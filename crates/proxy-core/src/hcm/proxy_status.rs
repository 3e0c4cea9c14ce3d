//! `proxy-status` (RFC 9209): what went wrong with a request, for whoever made it.

use mesh_types::ArcStr;

use crate::headers::Headers;
use crate::pb;
use crate::stream_info::{ResponseFlags, StreamInfo};

/// A compiled `HttpConnectionManager.ProxyStatusConfig`.
#[derive(Clone, Debug)]
pub struct ProxyStatus {
    name: ArcStr,
    details: bool,
    termination_details: bool,
    flags: bool,
    recommended_code: bool,
}

impl ProxyStatus {
    pub(super) fn compile(
        config: &pb::hcm::http_connection_manager::ProxyStatusConfig,
        server_name: &str,
        node_id: &str,
    ) -> Self {
        use pb::hcm::http_connection_manager::proxy_status_config::ProxyName;
        let name = match &config.proxy_name {
            // Which of the two it is alone counts.
            Some(ProxyName::UseNodeId(_)) => node_id,
            Some(ProxyName::LiteralProxyName(name)) => name,
            None => server_name,
        };
        Self {
            name: name.into(),
            details: !config.remove_details,
            termination_details: !config.remove_connection_termination_details,
            flags: !config.remove_response_flags,
            recommended_code: config.set_recommended_response_code,
        }
    }

    /// Adds to an answer what went wrong, and gives it the status that is meant for that (Envoy `ProxyStatusUtils`).
    pub fn apply(&self, headers: &mut Headers, info: &StreamInfo) {
        let error = ERRORS.iter().find(|(flag, ..)| info.flags.contains(*flag));
        let Some((_, error, code)) = error else { return };
        let mut value = format!("{}; error={error}", self.name);
        if let (true, Some(details)) = (self.details, &info.response_code_details) {
            let mut parts = vec![details.to_string()];
            if let (true, Some(termination)) = (self.termination_details, &info.connection_termination_details) {
                parts.push(termination.to_string());
            }
            if self.flags {
                parts.push(info.flags.to_string());
            }
            value.push_str("; details=\"");
            value.push_str(&escaped(&parts.join("; ")));
            value.push('"');
        }
        headers.append("proxy-status", value.as_bytes(), ", ");
        if let (true, Some(code)) = (self.recommended_code, code) {
            headers.set(":status", code.as_bytes());
        }
    }
}

/// What is told of each flag, and the status meant for it; the first one that is set counts. A client that violated HTTP is
/// told before its flag is set.
const ERRORS: [(ResponseFlags, &str, Option<&str>); 20] = [
    (ResponseFlags::LOCAL_HEALTH_CHECK_FAILED, "destination_unavailable", Some("503")),
    (ResponseFlags::NO_HEALTHY_UPSTREAM, "destination_unavailable", Some("503")),
    (ResponseFlags::UPSTREAM_TIMEOUT, "http_response_timeout", Some("504")),
    (ResponseFlags::LOCAL_RESET, "connection_timeout", Some("504")),
    (ResponseFlags::UPSTREAM_RESET, "connection_terminated", Some("502")),
    (ResponseFlags::UPSTREAM_CONNECTION_FAILURE, "connection_refused", Some("502")),
    (ResponseFlags::UPSTREAM_TERMINATION, "connection_terminated", Some("502")),
    (ResponseFlags::UPSTREAM_OVERFLOW, "connection_limit_reached", Some("503")),
    (ResponseFlags::NO_ROUTE, "destination_not_found", Some("500")),
    (ResponseFlags::FAULT_ABORT, "http_request_error", None),
    (ResponseFlags::RATE_LIMITED, "connection_limit_reached", Some("503")),
    (ResponseFlags::RATE_LIMIT_SERVICE_ERROR, "connection_limit_reached", Some("503")),
    (ResponseFlags::UPSTREAM_RETRY_LIMIT, "destination_unavailable", Some("503")),
    (ResponseFlags::STREAM_IDLE_TIMEOUT, "http_response_timeout", Some("504")),
    (ResponseFlags::INVALID_ENVOY_HEADERS, "http_request_error", None),
    (ResponseFlags::UPSTREAM_MAX_STREAM_DURATION, "http_response_timeout", Some("504")),
    (ResponseFlags::NO_FILTER_CONFIG, "proxy_configuration_error", Some("500")),
    (ResponseFlags::UPSTREAM_PROTOCOL_ERROR, "http_protocol_error", Some("502")),
    (ResponseFlags::NO_CLUSTER, "destination_unavailable", Some("503")),
    (ResponseFlags::DNS_FAILURE, "dns_error", Some("502")),
];

/// As in a string of C (Envoy `StringUtil::escape`).
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let letter = match c {
            '\n' => 'n',
            '\r' => 'r',
            '\t' => 't',
            '\u{b}' => 'v',
            '\0' => '0',
            '"' | '\'' | '\\' => c,
            _ => {
                out.push(c);
                continue;
            }
        };
        out.extend(['\\', letter]);
    }
    out
}
