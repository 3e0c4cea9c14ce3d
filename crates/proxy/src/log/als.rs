//! Records for Envoy's access log service (Envoy `grpc_access_log_utils.cc` and `http_grpc_access_log_impl.cc`).

use envoy_api::pb::envoy::config::core::v3 as core;
use envoy_api::pb::envoy::data::accesslog::v3 as data;
use envoy_api::wkt;
use proxy_core::access_log::AlsLog;
use proxy_core::stream_info::{HttpProtocol, PeerCertificate, TlsInfo};
use proxy_core::{Address, FormatContext, Headers, ResponseFlags};
use serde_json::Value;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

/// One record.
pub(crate) enum Entry {
    Http(Box<data::HttpAccessLogEntry>),
    Tcp(Box<data::TcpAccessLogEntry>),
}

pub(super) fn entry(log: &AlsLog, cx: &FormatContext<'_>) -> Entry {
    let common = Some(common(log, cx));
    if log.http {
        Entry::Http(Box::new(data::HttpAccessLogEntry {
            common_properties: common,
            protocol_version: match cx.info.protocol {
                None => 0,
                Some(HttpProtocol::Http10) => 1,
                Some(HttpProtocol::Http11) => 2,
                Some(HttpProtocol::Http2) => 3,
            },
            request: Some(request(log, cx)),
            response: Some(response(log, cx)),
        }))
    } else {
        Entry::Tcp(Box::new(data::TcpAccessLogEntry {
            common_properties: common,
            connection_properties: Some(data::ConnectionProperties {
                received_bytes: cx.info.bytes_received,
                sent_bytes: cx.info.bytes_sent,
            }),
        }))
    }
}

fn address(address: &Address) -> Option<core::Address> {
    use core::address::Address as Kind;
    use core::socket_address::PortSpecifier;
    let ip = |socket: SocketAddr| core::SocketAddress {
        address: socket.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(socket.port().into())),
        ..Default::default()
    };
    let kind = match address.socket() {
        Some(socket) => Kind::SocketAddress(ip(socket)),
        None => Kind::Pipe(core::Pipe { path: address.to_string(), mode: 0 }),
    };
    Some(core::Address { address: Some(kind) })
}

fn duration(time: Duration) -> wkt::Duration {
    wkt::Duration { seconds: time.as_secs() as i64, nanos: time.subsec_nanos() as i32 }
}

fn text(value: Option<&str>) -> String {
    value.unwrap_or_default().to_owned()
}

fn common(log: &AlsLog, cx: &FormatContext<'_>) -> data::AccessLogCommon {
    let info = cx.info;
    let connection = &info.connection;
    let upstream = &info.upstream;
    let times = &info.times;
    let since = |time: Option<Duration>| time.map(duration);
    let start = info.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let objects = log.filter_state.iter().filter_map(|key| {
        let value = info.filter_state.values.get(key)?;
        let any = envoy_api::Any {
            type_url: "type.googleapis.com/google.protobuf.StringValue".to_owned(),
            value: prost::Message::encode_to_vec(&value.to_string()),
        };
        Some((key.to_string(), any))
    });
    data::AccessLogCommon {
        downstream_remote_address: address(&info.remote),
        downstream_direct_remote_address: address(&connection.direct_remote),
        downstream_local_address: address(&connection.local),
        tls_properties: connection.tls.as_deref().map(|tls| tls_properties(tls, connection.server_name.as_deref())),
        start_time: Some(wkt::Timestamp { seconds: start.as_secs() as i64, nanos: start.subsec_nanos() as i32 }),
        time_to_last_rx_byte: since(times.request_received),
        time_to_first_upstream_tx_byte: since(times.upstream_first_tx),
        time_to_last_upstream_tx_byte: since(times.upstream_last_tx),
        time_to_first_upstream_rx_byte: since(times.upstream_first_rx),
        time_to_last_upstream_rx_byte: since(times.upstream_last_rx),
        time_to_first_downstream_tx_byte: since(times.downstream_first_tx),
        time_to_last_downstream_tx_byte: since(times.downstream_last_tx),
        upstream_remote_address: upstream.host.as_ref().and_then(|host| address(&host.address)),
        upstream_local_address: upstream.local.as_ref().and_then(address),
        upstream_cluster: text(upstream.cluster.as_deref()),
        response_flags: (!info.flags.is_empty()).then(|| flags(info.flags)),
        metadata: Some(core::Metadata {
            filter_metadata: info.dynamic_metadata.iter().map(|(name, map)| (name.to_string(), fields(map))).collect(),
            ..Default::default()
        }),
        upstream_transport_failure_reason: text(upstream.transport_failure.as_deref()),
        route_name: info.route.as_ref().map(|route| route.name.to_string()).unwrap_or_default(),
        filter_state_objects: objects.collect(),
        duration: since(times.complete),
        upstream_request_attempt_count: upstream.attempts,
        connection_termination_details: text(info.connection_termination_details.as_deref()),
        stream_id: text(info.stream_id.as_deref()),
        downstream_transport_failure_reason: text(connection.transport_failure.as_deref()),
        downstream_wire_bytes_sent: info.downstream_wire_bytes_sent,
        downstream_wire_bytes_received: info.downstream_wire_bytes_received,
        upstream_wire_bytes_sent: upstream.wire_bytes_sent,
        upstream_wire_bytes_received: upstream.wire_bytes_received,
        access_log_type: data::AccessLogType::from_str_name(cx.access_log_type).map_or(0, |kind| kind as i32),
        ..Default::default()
    }
}

/// A JSON object as protobuf struct.
pub(crate) fn fields(map: &serde_json::Map<String, Value>) -> wkt::Struct {
    wkt::Struct { fields: map.iter().map(|(key, v)| (key.clone(), value(v))).collect() }
}

fn value(of: &Value) -> wkt::Value {
    use wkt::value::Kind;
    let kind = match of {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(list) => Kind::ListValue(wkt::ListValue { values: list.iter().map(value).collect() }),
        Value::Object(map) => Kind::StructValue(fields(map)),
    };
    wkt::Value { kind: Some(kind) }
}

fn tls_properties(tls: &TlsInfo, server_name: Option<&str>) -> data::TlsProperties {
    use data::tls_properties::CertificateProperties;
    use data::tls_properties::certificate_properties::{SubjectAltName, subject_alt_name::San};
    let certificate = |c: &PeerCertificate| CertificateProperties {
        subject_alt_name: c
            .uri_sans
            .iter()
            .map(|uri| San::Uri(uri.to_string()))
            .chain(c.dns_sans.iter().map(|dns| San::Dns(dns.to_string())))
            .map(|san| SubjectAltName { san: Some(san) })
            .collect(),
        subject: c.subject.to_string(),
        issuer: c.issuer.to_string(),
    };
    data::TlsProperties {
        tls_version: if &*tls.version == "TLSv1.2" { 3 } else { 4 },
        tls_cipher_suite: Some(wkt::UInt32Value { value: tls.cipher_id }),
        tls_sni_hostname: text(server_name),
        local_certificate_properties: Some(tls.local.as_ref().map(certificate).unwrap_or_default()),
        peer_certificate_properties: Some(tls.peer.as_ref().map(certificate).unwrap_or_default()),
        tls_session_id: tls.session_id.to_string(),
        ..Default::default()
    }
}

fn flags(set: ResponseFlags) -> data::ResponseFlags {
    use data::response_flags::{Unauthorized, unauthorized::Reason};
    let has = |flag| set.contains(flag);
    data::ResponseFlags {
        failed_local_healthcheck: has(ResponseFlags::LOCAL_HEALTH_CHECK_FAILED),
        no_healthy_upstream: has(ResponseFlags::NO_HEALTHY_UPSTREAM),
        upstream_request_timeout: has(ResponseFlags::UPSTREAM_TIMEOUT),
        local_reset: has(ResponseFlags::LOCAL_RESET),
        upstream_remote_reset: has(ResponseFlags::UPSTREAM_RESET),
        upstream_connection_failure: has(ResponseFlags::UPSTREAM_CONNECTION_FAILURE),
        upstream_connection_termination: has(ResponseFlags::UPSTREAM_TERMINATION),
        upstream_overflow: has(ResponseFlags::UPSTREAM_OVERFLOW),
        no_route_found: has(ResponseFlags::NO_ROUTE),
        delay_injected: has(ResponseFlags::FAULT_DELAY),
        fault_injected: has(ResponseFlags::FAULT_ABORT),
        rate_limited: has(ResponseFlags::RATE_LIMITED),
        unauthorized_details: has(ResponseFlags::UNAUTHORIZED)
            .then_some(Unauthorized { reason: Reason::ExternalService as i32 }),
        rate_limit_service_error: has(ResponseFlags::RATE_LIMIT_SERVICE_ERROR),
        downstream_connection_termination: has(ResponseFlags::DOWNSTREAM_TERMINATION),
        upstream_retry_limit_exceeded: has(ResponseFlags::UPSTREAM_RETRY_LIMIT),
        stream_idle_timeout: has(ResponseFlags::STREAM_IDLE_TIMEOUT),
        invalid_envoy_request_headers: has(ResponseFlags::INVALID_ENVOY_HEADERS),
        downstream_protocol_error: has(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR),
        upstream_max_stream_duration_reached: has(ResponseFlags::UPSTREAM_MAX_STREAM_DURATION),
        response_from_cache_filter: has(ResponseFlags::RESPONSE_FROM_CACHE),
        no_filter_config_found: has(ResponseFlags::NO_FILTER_CONFIG),
        duration_timeout: has(ResponseFlags::DURATION_TIMEOUT),
        upstream_protocol_error: has(ResponseFlags::UPSTREAM_PROTOCOL_ERROR),
        no_cluster_found: has(ResponseFlags::NO_CLUSTER),
        overload_manager: has(ResponseFlags::OVERLOAD),
        dns_resolution_failure: has(ResponseFlags::DNS_FAILURE),
        downstream_remote_reset: has(ResponseFlags::DOWNSTREAM_RESET),
    }
}

fn chosen(headers: Option<&Headers>, names: &[mesh_types::ArcStr]) -> HashMap<String, String> {
    let Some(headers) = headers else { return HashMap::new() };
    let one = |name: &mesh_types::ArcStr| {
        Some((name.to_string(), String::from_utf8_lossy(&headers.joined(name)?).into_owned()))
    };
    names.iter().filter_map(one).collect()
}

fn request(log: &AlsLog, cx: &FormatContext<'_>) -> data::HttpRequestProperties {
    let header = |name: &str| text(cx.request.and_then(|headers| headers.get_str(name)));
    let original = header("x-envoy-original-path");
    data::HttpRequestProperties {
        request_method: core::RequestMethod::from_str_name(&header(":method")).map_or(0, |method| method as i32),
        scheme: header(":scheme"),
        authority: header(":authority"),
        path: header(":path"),
        user_agent: header("user-agent"),
        referer: header("referer"),
        forwarded_for: header("x-forwarded-for"),
        request_id: header("x-request-id"),
        original_path: original,
        request_headers_bytes: cx.request.map_or(0, |headers| headers.byte_size() as u64),
        request_body_bytes: cx.info.bytes_received,
        request_headers: chosen(cx.request, &log.request_headers),
        upstream_header_bytes_sent: cx.info.upstream.header_bytes_sent,
        downstream_header_bytes_received: cx.info.downstream_header_bytes_received,
        ..Default::default()
    }
}

fn response(log: &AlsLog, cx: &FormatContext<'_>) -> data::HttpResponseProperties {
    data::HttpResponseProperties {
        response_code: cx.info.response_code.map(|code| wkt::UInt32Value { value: code.into() }),
        response_code_details: text(cx.info.response_code_details.as_deref()),
        response_headers_bytes: cx.response.map_or(0, |headers| headers.byte_size() as u64),
        response_body_bytes: cx.info.bytes_sent,
        response_headers: chosen(cx.response, &log.response_headers),
        response_trailers: chosen(cx.trailers, &log.response_trailers),
        upstream_header_bytes_received: cx.info.upstream.header_bytes_received,
        downstream_header_bytes_sent: cx.info.downstream_header_bytes_sent,
    }
}
