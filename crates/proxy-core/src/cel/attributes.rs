//! Attributes of requests and connections, by name (Envoy `Expr::StreamActivation` and what it wraps).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Map;

use crate::cel::value::Value;
use crate::format::FormatContext;
use crate::headers::Headers;
use crate::matchers::path_without_query;
use crate::metadata::Metadata;
use crate::stream_info::{PeerCertificate, TlsInfo};

/// The name of attributes that are looked up one by one.
#[derive(Clone, Debug, PartialEq)]
pub struct Place(Box<[Box<str>]>);

impl Place {
    /// The attribute of this name in it.
    pub(super) fn at(&self, key: &str, cx: &FormatContext<'_>) -> Option<Value> {
        let path: Vec<Box<str>> = self.0.iter().cloned().chain([key.into()]).collect();
        find(&path, cx)
    }

    fn headers<'a>(&self, cx: &FormatContext<'a>) -> Option<Option<&'a Headers>> {
        let parts: Vec<&str> = self.0.iter().map(|part| &**part).collect();
        match parts.as_slice() {
            ["request", "headers"] => Some(cx.request),
            ["response", "headers"] => Some(cx.response),
            ["response", "trailers"] => Some(cx.trailers),
            _ => None,
        }
    }
}

/// How many it holds, as far as Envoy counts them: headers.
pub(super) fn size(place: &Place, cx: &FormatContext<'_>) -> usize {
    place.headers(cx).flatten().map_or(0, |headers| fields(headers).len())
}

/// In JSON: headers and metadata.
// DIFFERS: as text, too, metadata as a whole prints as a map, not in protobuf's text form.
pub(super) fn json(place: &Place, cx: &FormatContext<'_>) -> Option<serde_json::Value> {
    if let Some(headers) = place.headers(cx) {
        return Some(headers.map(fields).unwrap_or_default().into());
    }
    if place.0.iter().map(|part| &**part).eq(["upstream", "locality"]) {
        let parts = ["region", "zone", "sub_zone"].map(|part| (part, place.at(part, cx).and_then(Value::json)));
        let parts = parts.into_iter().filter_map(|(part, value)| Some((part.to_owned(), value?)));
        return Some(parts.filter(|(_, value)| value != "").collect::<Map<_, _>>().into());
    }
    let metadata = place.at("filter_metadata", cx)?.json()?;
    Some(serde_json::json!({ "filter_metadata": metadata }))
}

/// Each name once, with all its values.
fn fields(headers: &Headers) -> Map<String, serde_json::Value> {
    let mut fields = Map::new();
    for (name, value) in headers.iter() {
        let (name, value) = (String::from_utf8_lossy(name), String::from_utf8_lossy(value));
        match fields.get_mut(&*name) {
            Some(serde_json::Value::String(all)) => {
                all.push(',');
                all.push_str(&value);
            }
            _ => {
                fields.insert(name.into_owned(), value.into_owned().into());
            }
        }
    }
    fields.sort_keys();
    fields
}

fn text(value: Option<&str>) -> Option<Value> {
    value.map(|v| Value::Text(v.to_owned()))
}

fn int(value: u64) -> Option<Value> {
    Some(Value::Int(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn span(value: Duration) -> Option<Value> {
    Some(Value::Duration(i128::try_from(value.as_nanos()).ok()?))
}

/// Envoy's clock of the day counts microseconds.
fn time(value: SystemTime) -> Option<Value> {
    let micros = value.duration_since(UNIX_EPOCH).ok()?.as_micros();
    Some(Value::Time(i128::try_from(micros).ok()? * 1000))
}

fn header(headers: Option<&Headers>, name: &str) -> Option<Value> {
    let value = headers?.joined(&crate::matchers::canonical_name(name))?;
    Some(Value::Text(String::from_utf8_lossy(&value).into_owned()))
}

/// What is in metadata under `rest`; without that, all of it.
fn metadata(metadata: &Metadata, rest: &[&str]) -> Option<Value> {
    match rest {
        [] => {
            let namespaces =
                metadata.iter().map(|(name, fields)| (Value::Text(name.to_string()), Value::of_fields(fields)));
            Some(Value::Map(namespaces.collect()))
        }
        [namespace] => metadata.namespace(namespace).map(Value::of_fields),
        [namespace, rest @ ..] => metadata.get(namespace, rest).map(Value::of_json),
    }
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
        ["request", "query"] => {
            let query =
                |path: &'_ str| path.split_once('?').map(|(_, query)| query.split('#').next().unwrap_or("").to_owned());
            cx.request.map(|_| Value::Text(request_path().and_then(query).unwrap_or_default()))
        }
        ["request", "host"] => text(cx.request?.authority()),
        ["request", "scheme"] => text(cx.request?.scheme()),
        ["request", "protocol"] => text(info.protocol.map(|p| p.as_str())),
        ["request", "id"] => header(cx.request, "x-request-id"),
        ["request", "useragent"] => header(cx.request, "user-agent"),
        ["request", "referer"] => header(cx.request, "referer"),
        ["request", "headers", name] => header(cx.request, name),
        ["request", "size"] => match cx.request.and_then(|request| request.get_str("content-length")) {
            Some(length) => length.parse().ok().map(Value::Int),
            None => int(info.bytes_received),
        },
        ["request", "total_size"] => int(info.bytes_received + size_of(cx.request)),
        ["request", "duration"] => span(info.times.complete?),
        ["request", "time"] => time(info.start),
        ["request", "headers_bytes"] => int(size_of(cx.request)),
        ["response", "code"] => int(u64::from(info.response_code?)),
        ["response", "code_details"] => text(info.response_code_details.as_deref()),
        ["response", "flags"] => int(info.flags.bits().into()),
        ["response", "size"] => int(info.bytes_sent),
        ["response", "total_size"] => int(info.bytes_sent + size_of(cx.response) + size_of(cx.trailers)),
        ["response", "backend_latency"] => {
            info.times.upstream_last_rx?.checked_sub(info.times.upstream_first_tx?).and_then(span)
        }
        ["response", "headers_bytes"] => int(size_of(cx.response)),
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
        ["upstream", "request_attempt_count"] => Some(Value::Uint(info.upstream.attempts.into())),
        ["upstream", "cx_pool_ready_duration"] => span(info.times.upstream_first_tx?),
        ["upstream", "locality"] => {
            info.upstream.host.as_ref()?;
            Some(Value::Place(Place(path.into())))
        }
        ["upstream", "locality", part] => {
            let locality = &info.upstream.host.as_ref()?.locality;
            match *part {
                "region" => text(Some(&locality.region)),
                "zone" => text(Some(&locality.zone)),
                "sub_zone" => text(Some(&locality.sub_zone)),
                _ => None,
            }
        }
        ["upstream", name] => of_tls(info.upstream.tls.as_ref()?, name),
        ["connection", "mtls"] => Some(Value::Bool(peer(cx).is_some())),
        ["connection", "id"] => Some(Value::Uint(info.connection.id)),
        ["connection", "requested_server_name"] => text(Some(info.connection.server_name.as_deref().unwrap_or(""))),
        ["connection", "transport_failure_reason"] => text(info.connection.transport_failure.as_deref()),
        ["connection", "termination_details"] => text(info.connection_termination_details.as_deref()),
        ["connection", name] => of_tls(info.connection.tls.as_ref()?, name),
        ["xds", "node"] => info.connection.node.as_deref().map(Value::of_fields),
        ["xds", "node", field, rest @ ..] => {
            let mut value = info.connection.node.as_ref()?.get(*field)?;
            for key in rest {
                value = value.get(key)?;
            }
            Some(Value::of_json(value))
        }
        ["xds", name, "filter_metadata", rest @ ..] => metadata(of_xds(name, cx)?, rest),
        ["xds", "cluster_name"] => text(info.upstream.cluster.as_deref()),
        ["xds", "route_name"] => text(info.route.as_ref().map(|r| &*r.name)),
        ["xds", "virtual_host_name"] => text(info.virtual_host.as_ref().map(|v| &*v.name)),
        ["xds", "filter_chain_name"] => text(Some(&info.connection.filter_chain)),
        ["xds", "listener_direction"] => int(info.connection.direction as u64),
        ["metadata", "filter_metadata", rest @ ..] => metadata(&info.dynamic_metadata, rest),
        ["filter_state", key] => info.filter_state.values.get(*key).map(|v| Value::Bytes(v.as_bytes().to_vec())),
        ["xds", name] => of_xds(name, cx).map(|_| Value::Place(Place(path.into()))),
        [
            "request"
            | "response"
            | "source"
            | "destination"
            | "connection"
            | "upstream"
            | "xds"
            | "metadata"
            | "filter_state"
            | "upstream_filter_state",
        ]
        | ["request", "headers"]
        | ["response", "headers" | "trailers"] => Some(Value::Place(Place(path.into()))),
        _ => None,
    }
}

/// The metadata of what the request met.
fn of_xds<'a>(name: &str, cx: &FormatContext<'a>) -> Option<&'a Metadata> {
    let info = cx.info;
    match name {
        "cluster_metadata" => info.upstream.cluster_metadata.as_deref(),
        "route_metadata" => Some(&info.route.as_ref()?.metadata),
        "virtual_host_metadata" => Some(&info.virtual_host.as_ref()?.metadata),
        "listener_metadata" => info.connection.listener_metadata.as_deref(),
        "upstream_host_metadata" => Some(&info.upstream.host.as_ref()?.metadata),
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
fn size_of(headers: Option<&Headers>) -> u64 {
    headers.map_or(0, Headers::byte_size) as u64
}
