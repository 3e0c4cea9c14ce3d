use std::net::{IpAddr, SocketAddr};

use crate::address::Address;
use crate::format::FormatContext;
use crate::hcm::{ForwardClientCert, HttpConnectionManager, StripPort};
use crate::headers::Headers;
use crate::route::without_port;
use crate::stream_info::{ConnectionInfo, StreamInfo};
use crate::text::IpText;

/// Who a request is from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RequestIdentity {
    /// The trusted client address. Out of `x-forwarded-for` it has port 0.
    pub remote: Address,
    /// It comes from inside.
    pub internal: bool,
    /// It comes from outside to an edge proxy.
    pub edge: bool,
    /// Its client's address was not found, which is answered with this status.
    pub refuse: Option<u16>,
}

/// Headers that only requests from inside may have.
const INTERNAL_ONLY: [&str; 15] = [
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-stream-duration-ms",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-original-url",
];

/// And these, too, at the edge.
const EDGE_REMOVED: [&str; 5] = [
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-original-path",
    "x-envoy-original-host",
];

/// Brings a request head into the form that filters and upstreams expect (Envoy
/// `ConnectionManagerUtility::mutateRequestHeaders`): host, early changes, hop-by-hop headers, forwarding headers, internal headers,
/// request id, client certificate.
pub fn conform_request<Id: AsRef<[u8]>>(
    config: &HttpConnectionManager,
    headers: &mut Headers,
    info: &StreamInfo,
    new_request_id: impl FnOnce() -> Id,
) -> RequestIdentity {
    let connection = &info.connection;
    host(config, headers, connection);
    for changes in &config.early_changes {
        changes.apply_to_request(headers, &FormatContext::new(info, None, None));
    }
    hop_by_hop(headers);
    let tls = connection.tls.is_some();
    let (trusted, single) = match client_address(config, headers, connection, tls) {
        Ok(found) => found,
        Err(status) => {
            let remote = connection.remote.clone();
            return RequestIdentity { remote, internal: false, edge: false, refuse: Some(status) };
        }
    };
    forwarded_proto(config, headers, tls);
    // Without `internal_address_config` nobody is inside (`explicit_internal_address_config`).
    let inside = |address: &Address| config.internal.as_ref().is_some_and(|internal| internal.contains(address));
    let internal = single && trusted.as_ref().is_some_and(inside);
    let remote = trusted.unwrap_or_else(|| connection.remote.clone());
    let edge = !internal && config.use_remote_address;
    if internal {
        headers.set("x-envoy-internal", b"true");
    } else if headers.iter().any(|(name, _)| name.starts_with(b"x-envoy-")) {
        let removed = if edge { &EDGE_REMOVED[..] } else { &[] };
        for name in removed.iter().chain(&INTERNAL_ONLY) {
            headers.remove(name);
        }
    }
    if config.add_user_agent {
        headers.set("x-envoy-downstream-service-cluster", config.node_cluster.as_bytes());
        if headers.get("user-agent").is_none_or(<[u8]>::is_empty) {
            headers.set("user-agent", config.node_cluster.as_bytes());
        }
        if !config.node_id.is_empty() {
            headers.set("x-envoy-downstream-service-node", config.node_id.as_bytes());
        }
    }
    if let Some(via) = &config.via {
        headers.append("via", via.as_bytes(), ", ");
    }
    if edge && let Some(ip) = remote.ip() {
        headers.set("x-envoy-external-address", IpText::of(ip).as_bytes());
    }
    if config.generate_request_id {
        let replaced = edge && !config.preserve_external_request_id;
        if replaced || headers.get("x-request-id").is_none_or(<[u8]>::is_empty) {
            headers.set("x-request-id", new_request_id().as_ref());
        }
    }
    client_cert(config, headers, connection);
    RequestIdentity { remote, internal, edge, refuse: None }
}

/// Envoy `maybeNormalizeHost`.
fn host(config: &HttpConnectionManager, headers: &mut Headers, connection: &ConnectionInfo) {
    if config.strip_port == StripPort::None && !config.strip_trailing_host_dot {
        return;
    }
    let Some(original) = headers.authority().map(str::to_owned) else { return };
    let mut authority = original.clone();
    if config.strip_trailing_host_dot {
        // The last dot goes, at the end or before a colon (Envoy `HeaderUtility::stripTrailingHostDot`).
        let dot = authority.rfind('.').filter(|at| matches!(authority.as_bytes().get(at + 1), None | Some(b':')));
        if let Some(at) = dot {
            authority.remove(at);
        }
    }
    let host = without_port(&authority);
    let port = authority[host.len()..].strip_prefix(':').and_then(|p| p.parse::<u32>().ok());
    let strip = match config.strip_port {
        StripPort::None => false,
        StripPort::Any => port.is_some(),
        StripPort::Matching => port.is_some() && port == connection.local.port().map(u32::from),
    };
    let new = if strip && headers.method() != Some("CONNECT") { host } else { &authority };
    if new != original {
        headers.set(":authority", new.as_bytes());
    }
}

/// Whether `connection` asks for, or grants, an upgrade (Envoy `Utility::isUpgrade`).
pub fn is_upgrade(headers: &Headers) -> bool {
    headers.contains("upgrade")
        && headers
            .get_str("connection")
            .is_some_and(|c| c.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")))
}

fn hop_by_hop(headers: &mut Headers) {
    if !is_upgrade(headers) {
        headers.remove("connection");
        headers.remove("upgrade");
        if let Some(te) = headers.get_str("te") {
            // One with a weight is not that one, nor one in other letters. One that says nothing stays.
            match te.split(',').any(|t| t.trim() == "trailers") {
                true => headers.set("te", b"trailers"),
                false if te.is_empty() => {}
                false => {
                    headers.remove("te");
                }
            }
        }
    }
    headers.remove("x-envoy-internal");
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    headers.remove("transfer-encoding");
}

/// The address that may be trusted, and whether it may be inside; appends the peer to `x-forwarded-for`. An error is the
/// status of the answer to a request that is to have an address.
fn client_address(
    config: &HttpConnectionManager,
    headers: &mut Headers,
    connection: &ConnectionInfo,
    tls: bool,
) -> Result<(Option<Address>, bool), u16> {
    let hops = config.xff_num_trusted_hops as usize;
    if !config.use_remote_address {
        let found = detected_address(config, headers, connection)?;
        if config.append_x_forwarded_port
            && !headers.contains("x-forwarded-port")
            && let Some(port) = connection.local.port()
        {
            headers.set("x-forwarded-port", port.to_string().as_bytes());
        }
        return Ok(found);
    }
    let first_hop = !headers.contains("x-forwarded-for");
    let by_header = if hops > 0 { last_forwarded(headers, hops - 1).0 } else { None };
    let trusted = by_header.unwrap_or_else(|| connection.remote.clone());
    if !config.skip_xff_append {
        append_peer(config, headers, connection);
    }
    // What untrusted peers say about the protocol does not count.
    if hops == 0 || !headers.contains("x-forwarded-proto") {
        headers.set("x-forwarded-proto", if tls { b"https" } else { b"http" });
    }
    if config.append_x_forwarded_port
        && (hops == 0 || !headers.contains("x-forwarded-port"))
        && let Some(port) = connection.local.port()
    {
        headers.set("x-forwarded-port", port.to_string().as_bytes());
    }
    Ok((Some(trusted), first_hop))
}

/// As [`client_address`], where the peer's own does not count.
fn detected_address(
    config: &HttpConnectionManager,
    headers: &mut Headers,
    connection: &ConnectionInfo,
) -> Result<(Option<Address>, bool), u16> {
    if config.detections.is_empty() {
        return Ok(last_forwarded(headers, config.xff_num_trusted_hops as usize));
    }
    let mut append = false;
    let mut found = (None, false);
    for detection in &config.detections {
        let detected = detection.detect(headers, &connection.remote);
        if let Some(status) = detected.refuse {
            return Err(status);
        }
        append |= detected.append;
        if detected.address.is_some() {
            found = (detected.address, detected.may_be_inside);
            break;
        }
    }
    if append {
        append_peer(config, headers, connection);
    }
    Ok(found)
}

fn append_peer(config: &HttpConnectionManager, headers: &mut Headers, connection: &ConnectionInfo) {
    let Some(ip) = connection.remote.ip() else { return };
    // For peers on this machine its own address is more telling.
    let shown = if connection.remote.is_loopback() { config.local_address.unwrap_or(ip) } else { ip };
    headers.append("x-forwarded-for", IpText::of(shown).as_bytes(), ",");
}

/// The address `skip` places before the last in `x-forwarded-for`, and whether it is the only one
/// (Envoy `Http::Utility::getLastAddressFromXFF`).
pub(super) fn last_forwarded(headers: &Headers, skip: usize) -> (Option<Address>, bool) {
    let Some(value) = headers.joined("x-forwarded-for") else { return (None, false) };
    let Ok(value) = std::str::from_utf8(&value) else { return (None, false) };
    let mut from_the_end = value.rsplit(',');
    let Some(text) = from_the_end.nth(skip) else { return (None, false) };
    // A bare address: one with a port is none.
    match text.trim().parse::<IpAddr>().ok() {
        Some(ip) => (Some(Address::Ip(SocketAddr::new(ip, 0))), skip == 0 && from_the_end.next().is_none()),
        None => (None, false),
    }
}

fn forwarded_proto(config: &HttpConnectionManager, headers: &mut Headers, tls: bool) {
    let proto: &[u8] = if tls { b"https" } else { b"http" };
    if !headers.contains("x-forwarded-proto") {
        headers.set("x-forwarded-proto", proto);
    }
    if let Some(scheme) = &config.scheme_overwrite {
        headers.set(":scheme", scheme.as_bytes());
        headers.set("x-forwarded-proto", scheme.as_bytes());
    }
    match headers.scheme() {
        Some("http" | "https") => {}
        Some(scheme) if ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) => {
            let lower = scheme.to_ascii_lowercase();
            headers.set(":scheme", lower.as_bytes());
        }
        _ => {
            let scheme: &[u8] = match headers.get("x-forwarded-proto") {
                Some(said) if said.eq_ignore_ascii_case(b"http") => b"http",
                Some(said) if said.eq_ignore_ascii_case(b"https") => b"https",
                _ => proto,
            };
            headers.set(":scheme", scheme);
        }
    }
}

/// Envoy `ConnectionManagerUtility::mutateXfccRequestHeader`.
fn client_cert(config: &HttpConnectionManager, headers: &mut Headers, connection: &ConnectionInfo) {
    const NAME: &str = "x-forwarded-client-cert";
    let how = config.forward_client_cert;
    if how == ForwardClientCert::AlwaysForwardOnly {
        return;
    }
    let tls = connection.tls.as_deref();
    let Some((tls, peer)) = tls.and_then(|tls| Some((tls, tls.peer.as_ref()?))) else {
        headers.remove(NAME);
        return;
    };
    match how {
        ForwardClientCert::Sanitize => {
            headers.remove(NAME);
            return;
        }
        ForwardClientCert::ForwardOnly => return,
        _ => {}
    }
    let mut element = String::with_capacity(256);
    let mut part = |name: &str, value: &str, quote: &str| {
        let parts = [if element.is_empty() { "" } else { ";" }, name, "=", quote, value, quote];
        element.extend(parts);
    };
    for uri in tls.local.iter().flat_map(|local| &local.uri_sans) {
        part("By", uri, "");
    }
    if !peer.sha256.is_empty() {
        part("Hash", &peer.sha256, "");
    }
    let details = config.client_cert_details;
    if details.cert && !peer.pem_url_encoded.is_empty() {
        part("Cert", &peer.pem_url_encoded, "\"");
    }
    if details.chain && !peer.chain_url_encoded.is_empty() {
        part("Chain", &peer.chain_url_encoded, "\"");
    }
    if details.subject {
        part("Subject", &peer.subject, "\"");
    }
    if details.uri {
        match peer.uri_sans.as_slice() {
            [] => part("URI", "", ""),
            sans => sans.iter().for_each(|uri| part("URI", uri, "")),
        }
    }
    if details.dns {
        peer.dns_sans.iter().for_each(|dns| part("DNS", dns, ""));
    }
    if how == ForwardClientCert::AppendForward {
        headers.append(NAME, element.as_bytes(), ",");
    } else {
        headers.set(NAME, element.as_bytes());
    }
}
