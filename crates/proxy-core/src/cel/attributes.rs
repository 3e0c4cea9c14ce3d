use crate::cel::Value;
use crate::format::FormatContext;
use crate::headers::Headers;
use crate::matchers::path_without_query;
use crate::stream_info::{PeerCertificate, TlsInfo};

fn text(value: Option<&str>) -> Option<Value> {
    value.map(|v| Value::Text(v.to_owned()))
}

fn int(value: u64) -> Option<Value> {
    Some(Value::Int(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn header(headers: Option<&Headers>, name: &str) -> Option<Value> {
    let value = headers?.joined(&crate::matchers::canonical_name(name))?;
    Some(Value::Text(String::from_utf8_lossy(&value).into_owned()))
}

fn json(value: &serde_json::Value) -> Option<Value> {
    Some(match value {
        serde_json::Value::String(text) => Value::Text(text.clone()),
        serde_json::Value::Bool(b) => Value::Bool(*b),
        serde_json::Value::Number(n) => n.as_i64().map(Value::Int).or_else(|| n.as_f64().map(Value::Double))?,
        serde_json::Value::Null => Value::Null,
        other => Value::Text(other.to_string()),
    })
}

/// The value of an attribute (Envoy's list in `docs/…/arch_overview/advanced/attributes`), if there is one.
pub(super) fn find(path: &[Box<str>], cx: &FormatContext<'_>) -> Option<Value> {
    let info = cx.info;
    let parts: Vec<&str> = path.iter().map(|p| &**p).collect();
    let request_path = || cx.request.and_then(Headers::path);
    match parts.as_slice() {
        ["request", "method"] => text(cx.request?.method()),
        ["request", "path"] => text(request_path()),
        ["request", "url_path"] => text(request_path().map(path_without_query)),
        ["request", "query"] => text(request_path().map(|p| p.split_once('?').map_or("", |(_, q)| q))),
        ["request", "host"] => text(cx.request?.authority()),
        ["request", "scheme"] => text(cx.request?.scheme()),
        ["request", "protocol"] => text(info.protocol.map(|p| p.as_str())),
        ["request", "id"] => header(cx.request, "x-request-id"),
        ["request", "useragent"] => header(cx.request, "user-agent"),
        ["request", "referer"] => header(cx.request, "referer"),
        ["request", "headers", name] => header(cx.request, name),
        ["request", "size"] => int(info.bytes_received),
        ["request", "total_size"] => int(info.bytes_received + size(cx.request)),
        ["request", "duration"] => info.times.complete.map(Value::Duration),
        ["request", "time"] => Some(Value::Time(info.start)),
        ["response", "code"] => int(u64::from(info.response_code?)),
        ["response", "code_details"] => text(info.response_code_details.as_deref()),
        ["response", "flags"] => int(info.flags.bits().into()),
        ["response", "size"] => int(info.bytes_sent),
        ["response", "total_size"] => int(info.bytes_sent + size(cx.response) + size(cx.trailers)),
        ["response", "backend_latency"] => {
            info.times.upstream_last_rx?.checked_sub(info.times.upstream_first_tx?).map(Value::Duration)
        }
        ["response", "headers", name] => header(cx.response, name),
        ["response", "trailers", name] => header(cx.trailers, name),
        ["response", "grpc_status"] => {
            let status = [cx.trailers, cx.response].into_iter().flatten().find_map(|h| h.get_str("grpc-status"));
            match status {
                Some(status) => status.parse().ok().map(Value::Int),
                None => int(crate::retry::grpc_status_of_http(info.response_code?).into()),
            }
        }
        ["source", "address"] => text(Some(&info.remote.to_string())),
        ["source", "port"] => int(info.remote.port()?.into()),
        ["destination", "address"] => text(Some(&info.connection.local.to_string())),
        ["destination", "port"] => int(info.connection.local.port()?.into()),
        ["upstream", "address"] => text(Some(&info.upstream.host.as_ref()?.address.to_string())),
        ["upstream", "port"] => int(info.upstream.host.as_ref()?.address.port()?.into()),
        ["upstream", "local_address"] => text(Some(&info.upstream.local.as_ref()?.to_string())),
        ["upstream", "transport_failure_reason"] => {
            text(Some(info.upstream.transport_failure.as_deref().unwrap_or("")))
        }
        ["upstream", "request_attempt_count"] => int(info.upstream.attempts.into()),
        ["upstream", "cx_pool_ready_duration"] => info.times.upstream_first_tx.map(Value::Duration),
        ["upstream", name] => of_tls(info.upstream.tls.as_ref()?, name),
        ["connection", "mtls"] => Some(Value::Bool(peer(cx).is_some())),
        ["connection", "id"] => int(info.connection.id),
        ["connection", "requested_server_name"] => text(Some(info.connection.server_name.as_deref().unwrap_or(""))),
        ["connection", "transport_failure_reason"] => text(info.connection.transport_failure.as_deref()),
        ["connection", "termination_details"] => text(info.connection_termination_details.as_deref()),
        ["connection", name] => of_tls(info.connection.tls.as_ref()?, name),
        ["xds", name, "filter_metadata", namespace, rest @ ..] => {
            let metadata = match *name {
                "cluster_metadata" => info.upstream.cluster_metadata.as_deref()?,
                "route_metadata" => &info.route.as_ref()?.metadata,
                "virtual_host_metadata" => &info.virtual_host.as_ref()?.metadata,
                "listener_metadata" => info.connection.listener_metadata.as_deref()?,
                "upstream_host_metadata" => &info.upstream.host.as_ref()?.metadata,
                _ => return None,
            };
            json(metadata.get(namespace, rest)?)
        }
        ["xds", "cluster_name"] => text(info.upstream.cluster.as_deref()),
        ["xds", "route_name"] => text(info.route.as_ref().map(|r| &*r.name)),
        ["xds", "virtual_host_name"] => text(info.virtual_host.as_ref().map(|v| &*v.name)),
        ["xds", "filter_chain_name"] => text(Some(&info.connection.filter_chain)),
        ["xds", "listener_direction"] => int(info.connection.direction as u64),
        ["metadata", "filter_metadata", namespace, rest @ ..] => json(info.dynamic_metadata.get(namespace, rest)?),
        ["filter_state", key] => text(info.filter_state.values.get(*key).map(|v| &**v)),
        _ => None,
    }
}

fn peer<'a>(cx: &FormatContext<'a>) -> Option<&'a PeerCertificate> {
    cx.info.connection.tls.as_ref()?.peer.as_ref()
}

/// What either end's TLS says.
fn of_tls(tls: &TlsInfo, name: &str) -> Option<Value> {
    let (peer, local) = (tls.peer.as_ref(), tls.local.as_ref());
    match name {
        "tls_version" => text(Some(&tls.version)),
        "uri_san_peer_certificate" => text(peer?.uri_sans.first().map(|s| &**s)),
        "dns_san_peer_certificate" => text(peer?.dns_sans.first().map(|s| &**s)),
        "subject_peer_certificate" => text(Some(&peer?.subject)),
        "sha256_peer_certificate_digest" => text(Some(&peer?.sha256)),
        "uri_san_local_certificate" => text(local?.uri_sans.first().map(|s| &**s)),
        "dns_san_local_certificate" => text(local?.dns_sans.first().map(|s| &**s)),
        "subject_local_certificate" => text(Some(&local?.subject)),
        _ => None,
    }
}

/// Bytes of a head or of trailers.
fn size(headers: Option<&Headers>) -> u64 {
    headers.map_or(0, Headers::byte_size) as u64
}
