use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;
use serde_json::Value;

use super::json;
use crate::address::Address;
use crate::cidr::Cidr;
use crate::format::command::{
    AddressPart, Command, Count, End, Field, GrpcStatusStyle, Head, HostPart, HostSource, MetadataSource, PathSource,
    Point, Side, TlsField,
};
use crate::format::time::TimeFormat;
use crate::format::{FormatContext, Written};
use crate::headers::Headers;
use crate::matchers::first_query_value;
use crate::stream_info::{StreamInfo, TlsInfo};

impl Command {
    pub(super) fn write(&self, cx: &FormatContext<'_>, out: &mut Vec<u8>) -> Written {
        match self {
            Command::Request(name, other) => header(cx.request, name, other.as_deref(), out),
            Command::RequestWithoutQuery(name, other) => {
                let start = out.len();
                let written = header(cx.request, name, other.as_deref(), out);
                if let Some(at) = out[start..].iter().position(|b| *b == b'?') {
                    out.truncate(start + at);
                }
                written
            }
            Command::Response(name, other) => header(cx.response, name, other.as_deref(), out),
            Command::Trailer(name, other) => header(cx.trailers, name, other.as_deref(), out),
            Command::QueryParameter(name) => {
                let Some(value) = cx.request.and_then(|r| first_query_value(r.path()?, name)) else {
                    return Written::Missing;
                };
                percent_decode(value, out);
                Written::Text
            }
            Command::StartTime(format) => {
                format.write(cx.info.start, out);
                Written::Text
            }
            Command::EmitTime(format) => {
                format.write(cx.now(), out);
                Written::Text
            }
            Command::Between(from, to, unit) => match (moment(cx, *from), moment(cx, *to)) {
                (Some(from), Some(to)) if from <= to => {
                    number((to.saturating_sub(from).as_nanos() / unit.as_nanos().max(1)) as u64, out)
                }
                _ => Written::Missing,
            },
            Command::Validity(end, begin, format) => validity(cx.info, *end, *begin, format, out),
            Command::Path(source, query) => path(cx, *source, *query, out),
            Command::HeadBytes(which) => {
                let head = match which {
                    Head::Request => cx.request,
                    Head::Response => cx.response,
                    Head::ResponseTrailers => cx.trailers,
                };
                number(head.map_or(0, Headers::byte_size) as u64, out)
            }
            Command::Count(count) => count.get(cx.info).map_or(Written::Missing, |n| number(n, out)),
            Command::Address(side, part) => address(cx.info, *side, *part, out),
            Command::Attempted(part) => attempted(cx.info, *part, out),
            Command::Tls(end, field) => tls(cx.info, *end, *field, out),
            Command::Stream(field) => stream(cx, *field, out),
            Command::Metadata(source, namespace, path) => metadata(cx.info, *source, namespace, path, out),
            Command::FilterState(key, plain) => {
                let value = cx.info.filter_state.values.get(&**key).map(|v| &**v);
                match value {
                    // Objects are kept as their JSON already.
                    Some(value) if !plain && value.starts_with('{') => {
                        out.extend_from_slice(value.as_bytes());
                        Written::Json
                    }
                    Some(value) if !plain && !value.is_empty() => {
                        out.extend_from_slice(Value::from(value).to_string().as_bytes());
                        Written::Json
                    }
                    Some(value) => {
                        out.extend_from_slice(value.as_bytes());
                        Written::Text
                    }
                    None => Written::Missing,
                }
            }
            Command::FilterStateField(key, field) => {
                let object = cx.info.filter_state.values.get(&**key).filter(|value| value.starts_with('{'));
                let object = object.and_then(|value| serde_json::from_str::<Value>(value).ok());
                text(object.as_ref().and_then(|object| object.get(&**field)?.as_str()), out)
            }
            Command::Nothing => Written::Missing,
            Command::GrpcStatus(style) => grpc_status(cx, *style, out),
            Command::Environment(name) => {
                // Envoy prints a dash for variables that are not set, even where missing values print nothing.
                let value = (cx.info.connection.environment)(name);
                out.extend_from_slice(value.as_deref().unwrap_or("-").as_bytes());
                Written::Text
            }
            // A text that says nothing is a value, too.
            Command::Cel(expression, typed) => {
                if *typed {
                    let Some(value) = expression.json(cx) else { return Written::Missing };
                    return match value {
                        Value::String(text) => {
                            out.extend_from_slice(text.as_bytes());
                            Written::Text
                        }
                        value => {
                            json::value(&value, out);
                            Written::Json
                        }
                    };
                }
                let Some(value) = expression.evaluate(cx) else { return Written::Missing };
                out.extend(value.into_text());
                Written::Text
            }
            Command::FirstOf(commands) => {
                let start = out.len();
                for (command, limit) in commands {
                    let written = command.write(cx, out);
                    if written != Written::Missing {
                        cut(out, start, *limit);
                        return written;
                    }
                    out.truncate(start);
                }
                Written::Missing
            }
            Command::Hostname => text(Some(&cx.info.connection.hostname), out),
            Command::Unmeasured => Written::Missing,
        }
    }
}

/// Leaves so many bytes of what was written.
fn cut(out: &mut Vec<u8>, start: usize, limit: Option<usize>) {
    if let Some(limit) = limit {
        out.truncate(start.saturating_add(limit));
    }
}

/// Envoy's `PercentEncoding::urlDecode` of queries: what is no plain visible character stays as it is written, and a percent
/// sign that begins nothing is left out.
fn decode_visible(text: &str, out: &mut Vec<u8>) {
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' || after.len() < 2 {
            out.push(*first);
            continue;
        }
        let two = after.get(..2).filter(|two| two.iter().all(u8::is_ascii_hexdigit));
        let code = two.and_then(|two| std::str::from_utf8(two).ok()).and_then(|two| u8::from_str_radix(two, 16).ok());
        match code {
            None => {}
            Some(code) => {
                if code.is_ascii_graphic() && !b"\"<>\\^{|}".contains(&code) {
                    out.push(code);
                } else {
                    out.extend_from_slice(&[b'%', after[0], after[1]]);
                }
                rest = &after[2..];
            }
        }
    }
}

/// Bytes that were written as `%` and two digits are themselves again.
pub(crate) fn percent_decode(text: &str, out: &mut Vec<u8>) {
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let two = after.get(..2).filter(|two| *first == b'%' && two.iter().all(u8::is_ascii_hexdigit));
        let code = two.and_then(|two| std::str::from_utf8(two).ok());
        match code.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
}

fn text(value: Option<&str>, out: &mut Vec<u8>) -> Written {
    let Some(value) = value.filter(|v| !v.is_empty()) else { return Written::Missing };
    out.extend_from_slice(value.as_bytes());
    Written::Text
}

fn number(n: u64, out: &mut Vec<u8>) -> Written {
    crate::text::number(out, n);
    Written::Number
}

fn header(headers: Option<&Headers>, name: &str, other: Option<&str>, out: &mut Vec<u8>) -> Written {
    let value = headers.and_then(|h| h.get(name).or_else(|| other.and_then(|other| h.get(other))));
    let Some(value) = value else { return Written::Missing };
    out.extend_from_slice(value);
    Written::Text
}

fn moment(cx: &FormatContext<'_>, point: Point) -> Option<Duration> {
    let times = &cx.info.times;
    match point {
        Point::Start => Some(Duration::ZERO),
        Point::RequestReceived => times.request_received,
        Point::UpstreamFirstTx => times.upstream_first_tx,
        Point::UpstreamLastTx => times.upstream_last_tx,
        Point::UpstreamFirstRx => times.upstream_first_rx,
        Point::UpstreamLastRx => times.upstream_last_rx,
        Point::DownstreamFirstTx => times.downstream_first_tx,
        Point::DownstreamLastTx => times.downstream_last_tx,
        Point::Complete => cx.lasted(),
        Point::HandshakeEnd => times.downstream_handshake,
        Point::UpstreamConnectBegin => times.upstream_connect.map(|(begin, _)| begin),
        Point::UpstreamConnectEnd => times.upstream_connect.map(|(_, end)| end),
        Point::Unset => None,
    }
}

impl Count {
    pub(crate) fn get(self, info: &StreamInfo) -> Option<u64> {
        let up = &info.upstream;
        match self {
            Count::BytesReceived => Some(info.bytes_received),
            Count::BytesSent => Some(info.bytes_sent),
            Count::ResponseCode => Some(u64::from(info.response_code.unwrap_or(0))),
            Count::ConnectionId => Some(info.connection.id),
            Count::UpstreamConnectionId => up.connection_id,
            Count::UpstreamAttempts => Some(u64::from(up.attempts)),
            Count::UpstreamWireSent => Some(up.wire_bytes_sent),
            Count::UpstreamWireReceived => Some(up.wire_bytes_received),
            Count::UpstreamHeadersSent => Some(up.header_bytes_sent),
            Count::UpstreamHeadersReceived => Some(up.header_bytes_received),
            Count::DownstreamWireSent => Some(info.downstream_wire_bytes_sent),
            Count::DownstreamWireReceived => Some(info.downstream_wire_bytes_received),
            Count::DownstreamHeadersSent => Some(info.downstream_header_bytes_sent),
            Count::DownstreamHeadersReceived => Some(info.downstream_header_bytes_received),
            Count::Retransmitted => Some(0),
        }
    }
}

fn address(info: &StreamInfo, side: Side, part: AddressPart, out: &mut Vec<u8>) -> Written {
    let address = match side {
        Side::DownstreamRemote => Some(&info.remote),
        Side::DownstreamDirectRemote => Some(&info.connection.direct_remote),
        Side::DownstreamLocal => Some(&info.connection.local),
        Side::UpstreamHost => info.upstream.host.as_ref().map(|h| &h.address),
        Side::UpstreamRemote => connected(info).map(|h| &h.address),
        Side::UpstreamLocal => info.upstream.local.as_ref(),
    };
    address.map_or(Written::Missing, |address| part_of(address, part, out))
}

fn part_of(address: &Address, part: AddressPart, out: &mut Vec<u8>) -> Written {
    match (&part, address) {
        (AddressPart::WithoutPort, Address::Ip(ip)) => crate::text::ip(out, ip.ip()),
        (AddressPart::Range(length), Address::Ip(ip)) => {
            if let Ok(length) = u32::try_from(*length) {
                // Writing into a vector does not fail.
                let _ = write!(out, "{}", Cidr::of(ip.ip(), length));
            }
        }
        (AddressPart::Port, Address::Ip(ip)) => return number(u64::from(ip.port()), out),
        // To Envoy, a path has an empty one.
        (AddressPart::Port, _) => {}
        (_, address) => crate::text::address(out, address),
    }
    Written::Text
}

/// The host, once a connection to it stands; of our side of one to a path there is no address.
fn connected(info: &StreamInfo) -> Option<&Arc<crate::Host>> {
    let host = info.upstream.host.as_ref()?;
    let at_path = matches!(host.address, Address::Pipe(_)) && info.upstream.connection_id.is_some();
    (info.upstream.local.is_some() || at_path).then_some(host)
}

/// Envoy `UpstreamHostsAttemptedFormatter`, which knows the tries of one stream towards the upstream.
fn attempted(info: &StreamInfo, part: HostPart, out: &mut Vec<u8>) -> Written {
    let hosts = match &*info.upstream.attempted {
        [] => connected(info).map(std::slice::from_ref).unwrap_or_default(),
        all => all,
    };
    let mut written = Written::Missing;
    for (i, host) in hosts.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        written = match part {
            HostPart::Address(part) => part_of(&host.address, part, out),
            HostPart::Name => host_name(host, true, out),
            HostPart::NameWithoutPort => host_name(host, false, out),
        };
    }
    written
}

fn list(values: &[ArcStr], out: &mut Vec<u8>) -> Written {
    for (i, value) in values.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(value.as_bytes());
    }
    if values.is_empty() { Written::Missing } else { Written::Text }
}

fn tls(info: &StreamInfo, end: End, field: TlsField, out: &mut Vec<u8>) -> Written {
    let tls: Option<&TlsInfo> = match end {
        End::Downstream => info.connection.tls.as_deref(),
        End::Upstream => info.upstream.tls.as_deref(),
    };
    let Some(tls) = tls else { return Written::Missing };
    match field {
        TlsField::ServerName => return text(tls.server_name.as_deref(), out),
        TlsField::Group => return text(Some(tls.group), out),
        TlsField::Version => return text(Some(&tls.version), out),
        TlsField::Cipher => return text(Some(&tls.cipher), out),
        TlsField::SessionId => return text(Some(&tls.session_id), out),
        _ => {}
    }
    let certificate = match field {
        TlsField::LocalUriSan
        | TlsField::LocalDnsSan
        | TlsField::LocalIpSan
        | TlsField::LocalEmailSan
        | TlsField::LocalOtherNameSan
        | TlsField::LocalSubject => tls.local.as_ref(),
        _ => tls.peer.as_ref(),
    };
    let Some(certificate) = certificate else { return Written::Missing };
    match field {
        TlsField::PeerUriSan | TlsField::LocalUriSan => list(&certificate.uri_sans, out),
        TlsField::PeerDnsSan | TlsField::LocalDnsSan => list(&certificate.dns_sans, out),
        TlsField::PeerIpSan | TlsField::LocalIpSan => list(&certificate.ip_sans, out),
        TlsField::PeerEmailSan | TlsField::LocalEmailSan => list(&certificate.email_sans, out),
        TlsField::PeerOtherNameSan | TlsField::LocalOtherNameSan => list(&certificate.other_sans, out),
        TlsField::PeerSubject | TlsField::LocalSubject => text(Some(&certificate.subject), out),
        TlsField::PeerIssuer => text(Some(&certificate.issuer), out),
        TlsField::PeerSerial => text(Some(&certificate.serial), out),
        TlsField::PeerIssuerSha256 => text(Some(&certificate.issuer_sha256), out),
        TlsField::PeerIssuerSerial => text(Some(&certificate.issuer_serial), out),
        TlsField::PeerSha256 => text(Some(&certificate.sha256), out),
        TlsField::PeerSha1 => text(Some(&certificate.sha1), out),
        TlsField::PeerCert => text(Some(&certificate.pem_url_encoded), out),
        TlsField::PeerChainSha256 => list(&certificate.chain.sha256, out),
        TlsField::PeerChainSha1 => list(&certificate.chain.sha1, out),
        TlsField::PeerChainSerials => list(&certificate.chain.serials, out),
        TlsField::Version | TlsField::Cipher | TlsField::Group | TlsField::ServerName | TlsField::SessionId => {
            Written::Missing
        }
    }
}

fn validity(info: &StreamInfo, end: End, begin: bool, format: &TimeFormat, out: &mut Vec<u8>) -> Written {
    let tls = match end {
        End::Downstream => info.connection.tls.as_deref(),
        End::Upstream => info.upstream.tls.as_deref(),
    };
    let peer = tls.and_then(|tls| tls.peer.as_ref());
    let time = peer.and_then(|peer| if begin { peer.not_before } else { peer.not_after });
    let Some(time) = time else { return Written::Missing };
    format.write(time, out);
    Written::Text
}

fn path(cx: &FormatContext<'_>, source: PathSource, query: bool, out: &mut Vec<u8>) -> Written {
    let original = || cx.request.and_then(|request| request.get_str("x-envoy-original-path"));
    let current = || cx.request.and_then(Headers::path);
    let path = match source {
        PathSource::Current => current(),
        PathSource::Original => original(),
        PathSource::OriginalOrCurrent => original().or_else(current),
    };
    text(path.map(|path| if query { path } else { path.split('?').next().unwrap_or_default() }), out)
}

/// The host's name, or its address where it has none.
fn host_name(host: &crate::Host, port: bool, out: &mut Vec<u8>) -> Written {
    if host.hostname.is_empty() {
        match (&host.address, port) {
            (Address::Ip(ip), false) => crate::text::ip(out, ip.ip()),
            (address, _) => crate::text::address(out, address),
        }
        return Written::Text;
    }
    let name = &*host.hostname;
    text(Some(if port { name } else { name.rsplit_once(':').map_or(name, |(name, _)| name) }), out)
}

/// An id that no other record has: of what makes the stream one of a kind, in the form of a random UUID.
fn unique_id(cx: &FormatContext<'_>) -> String {
    let since = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let seed = [
        &cx.info.connection.id.to_be_bytes()[..],
        &since(cx.info.start).to_be_bytes(),
        &since(cx.now()).to_be_bytes(),
        cx.access_log_type.as_bytes(),
    ]
    .concat();
    let (high, low) = (crate::hash::xx64(&seed, 1), crate::hash::xx64(&seed, 2));
    let (high, low) = (high & !0xf000 | 0x4000, low & !(0b11 << 62) | 0b10 << 62);
    let rest = low & 0xffff_ffff_ffff;
    format!("{:08x}-{:04x}-{:04x}-{:04x}-{rest:012x}", high >> 32, high >> 16 & 0xffff, high & 0xffff, low >> 48)
}

fn stream(cx: &FormatContext<'_>, field: Field, out: &mut Vec<u8>) -> Written {
    let info = cx.info;
    let path = || cx.request.and_then(Headers::path);
    let host = |source| {
        let original = || cx.request.and_then(|request| request.get_str("x-envoy-original-host"));
        let current = || cx.request.and_then(Headers::authority);
        match source {
            HostSource::Current => current(),
            HostSource::Original => original(),
            HostSource::OriginalOrCurrent => original().or_else(current),
        }
    };
    let server_name = info.connection.server_name.as_deref();
    let upstream = info.upstream.host.as_deref();
    match field {
        Field::Protocol => text(info.protocol.map(|p| p.as_str()), out),
        Field::UpstreamProtocol => text(info.upstream.protocol.map(|p| p.as_str()), out),
        Field::ResponseCodeDetails => {
            let start = out.len();
            let written = text(info.response_code_details.as_deref(), out);
            // Envoy replaces white space, so that the text stays one column.
            for byte in &mut out[start..] {
                if byte.is_ascii_whitespace() {
                    *byte = b'_';
                }
            }
            written
        }
        Field::ConnectionTerminationDetails => text(info.connection_termination_details.as_deref(), out),
        Field::ResponseFlags => {
            match info.flags.is_empty() {
                true => out.push(b'-'),
                // Writing into a vector does not fail.
                false => drop(write!(out, "{}", info.flags)),
            }
            Written::Text
        }
        Field::ResponseFlagsLong => text(Some(&info.flags.long()), out),
        Field::RouteName => text(info.route.as_ref().map(|r| &*r.name), out),
        Field::VirtualClusterName => {
            let name = info.virtual_cluster.clone();
            text(name.as_deref(), out)
        }
        Field::UpstreamHostName => upstream.map_or(Written::Missing, |host| host_name(host, true, out)),
        Field::UpstreamHostNameWithoutPort => upstream.map_or(Written::Missing, |host| host_name(host, false, out)),
        Field::DownstreamCloseType => text(Some("Normal"), out),
        Field::DownstreamLocalCloseReason => text(info.local_close_reason.as_deref(), out),
        Field::UpstreamCloseType => text((upstream.is_some() || info.upstream.of_tcp_proxy).then_some("Normal"), out),
        Field::Nothing => Written::Text,
        Field::SpanId => text(info.span_id.as_deref(), out),
        Field::UniqueId => text(Some(&unique_id(cx)), out),
        Field::ServerNameFirst(source) => text(server_name.or_else(|| host(source)), out),
        Field::HostFirst(source) => text(host(source).or(server_name), out),
        Field::RawResponseCodeDetails => text(info.response_code_details.as_deref(), out),
        Field::UpstreamCluster => {
            let name = info.upstream.cluster_stat_name.as_deref().or(info.upstream.cluster.as_deref());
            text(name, out)
        }
        Field::UpstreamClusterRaw => text(info.upstream.cluster.as_deref(), out),
        Field::UpstreamTransportFailure => text(info.upstream.transport_failure.as_deref(), out),
        Field::DownstreamTransportFailure => text(info.connection.transport_failure.as_deref(), out),
        Field::RequestedServerName => text(server_name, out),
        Field::Ja3 => text(info.connection.fingerprints.ja3.as_deref(), out),
        Field::Ja4 => text(info.connection.fingerprints.ja4.as_deref(), out),
        Field::FilterChainName => text(Some(&info.connection.filter_chain), out),
        Field::ListenerName => text(Some(&info.connection.listener), out),
        Field::LocalReplyBody => {
            out.extend_from_slice(cx.local_reply_body.as_bytes());
            Written::Text
        }
        Field::AccessLogType => text(Some(cx.access_log_type), out),
        Field::TraceId => text(info.trace_id.as_deref(), out),
        Field::StreamId => {
            text(info.stream_id.as_deref().or_else(|| cx.request.and_then(|r| r.get_str("x-request-id"))), out)
        }
        Field::Query => {
            // One that says nothing is there, too.
            let Some((_, query)) = path().and_then(|path| path.split_once('?')) else { return Written::Missing };
            out.extend_from_slice(query.as_bytes());
            Written::Text
        }
        Field::DecodedQuery => {
            let Some((_, query)) = path().and_then(|path| path.split_once('?')) else { return Written::Missing };
            decode_visible(query, out);
            Written::Text
        }
    }
}

fn metadata(
    info: &StreamInfo,
    source: MetadataSource,
    namespace: &str,
    path: &[Box<str>],
    out: &mut Vec<u8>,
) -> Written {
    let found = match source {
        MetadataSource::Dynamic => Some(&info.dynamic_metadata),
        MetadataSource::Cluster => info.upstream.cluster_metadata.as_deref(),
        MetadataSource::Route => info.route.as_ref().map(|r| &r.metadata),
        MetadataSource::VirtualHost => info.virtual_host.as_ref().map(|v| &v.metadata),
        MetadataSource::UpstreamHost => info.upstream.host.as_ref().map(|h| &*h.metadata),
        MetadataSource::Listener => info.connection.listener_metadata.as_deref(),
        MetadataSource::FilterChain => info.connection.filter_chain_metadata.as_deref(),
    };
    let Some(found) = found else { return Written::Missing };
    if path.is_empty() {
        let Some(fields) = found.namespace(namespace) else { return Written::Missing };
        json::object(fields, out);
        return Written::Json;
    }
    match found.get(namespace, path) {
        None | Some(Value::Null) => Written::Missing,
        Some(Value::String(value)) => {
            out.extend_from_slice(value.as_bytes());
            Written::Text
        }
        Some(value) => {
            json::value(value, out);
            if value.is_number() { Written::Number } else { Written::Json }
        }
    }
}

/// Name and snake name of each gRPC status, by number.
const GRPC_STATUS: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

fn grpc_status(cx: &FormatContext<'_>, style: GrpcStatusStyle, out: &mut Vec<u8>) -> Written {
    // Only for gRPC requests, as Envoy's formatter since 1.2x; without a path it is none.
    if !cx.request.is_some_and(|request| request.contains(":path") && crate::route::is_grpc(request)) {
        return Written::Missing;
    }
    let status = [cx.trailers, cx.response].into_iter().flatten().find_map(|h| h.get_str("grpc-status"));
    let code: Option<u64> = match status {
        Some(status) => match status.parse() {
            Ok(code) => Some(code),
            Err(_) => {
                // Envoy's `InvalidCode`.
                out.extend_from_slice(b"-1");
                return Written::Number;
            }
        },
        None => cx.info.response_code.map(|http| u64::from(crate::retry::grpc_status_of_http(http))),
    };
    let Some(code) = code else { return Written::Missing };
    match (style, GRPC_STATUS.get(code as usize)) {
        (GrpcStatusStyle::Camel, Some((camel, _))) => text(Some(camel), out),
        (GrpcStatusStyle::Snake, Some((_, snake))) => text(Some(snake), out),
        _ => number(code, out),
    }
}
