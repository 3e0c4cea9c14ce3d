use std::time::Duration;

use serde_json::Value;

use crate::any::Typed;
use crate::format::Item;
use crate::format::command::{
    AddressPart, Command, Count, End, Field, GrpcStatusStyle, Head, HostPart, HostSource, MetadataSource, PathSource,
    Point, Side, TlsField,
};
use crate::format::time::TimeFormat;
use crate::matchers::canonical_name;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// Which commands a format may have besides those that every format has.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dialect {
    /// What expressions may do besides, by a formatter that is named beside the format.
    pub(crate) cel: crate::cel::Options,
    /// `REQ_WITHOUT_QUERY`, of a formatter that is named beside the format.
    pub(crate) without_query: bool,
    /// The old forms that values of headers still have (Envoy `HeaderParser::translateMetadataFormat` and
    /// `translatePerRequestState`): lists of keys of metadata, and `PER_REQUEST_STATE`.
    pub(crate) old_forms: bool,
}

impl Dialect {
    /// What these formatters add. Of those that Envoy has, two name commands that every format has anyway.
    pub(crate) fn of(formatters: &[pb::core::TypedExtensionConfig]) -> Compiled<Self> {
        let mut dialect = Self::default();
        for (i, formatter) in formatters.iter().enumerate() {
            let typed = Typed::open(formatter.typed_config.as_ref()).at_index("formatters", i)?;
            match typed.name.as_str() {
                "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery" => dialect.without_query = true,
                "envoy.extensions.formatter.metadata.v3.Metadata" => {}
                "envoy.extensions.formatter.cel.v3.Cel" => {
                    let config: pb::ext::formatter::cel::v3::Cel = typed.decode()?;
                    dialect.cel = crate::cel::Options::of(config.cel_config.as_ref());
                }
                _ => return Err(typed.unknown()).at_index("formatters", i),
            }
        }
        Ok(dialect)
    }
}

/// Splits a format into texts and commands (Envoy `SubstitutionFormatParser::parse`).
pub(super) fn items(format: &str, dialect: Dialect) -> Compiled<Box<[Item]>> {
    let mut items = Vec::new();
    let mut text = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            text.push('%');
            rest = after;
            continue;
        }
        let (item, after) = command(format, rest, dialect)?;
        if !text.is_empty() {
            items.push(Item::Text(std::mem::take(&mut text).into()));
        }
        items.push(item);
        rest = after;
    }
    text.push_str(rest);
    if !text.is_empty() {
        items.push(Item::Text(text.into()));
    }
    Ok(items.into())
}

/// Whether only a length may stand before the closing percent sign.
fn ends_command(rest: &str) -> bool {
    match rest.strip_prefix(':') {
        Some(length) => length.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with('%'),
        None => rest.starts_with('%'),
    }
}

/// `NAME`, `NAME(ARGUMENT)`, either with `:LENGTH`, up to the closing percent sign.
fn command<'a>(format: &str, text: &'a str, dialect: Dialect) -> Compiled<(Item, &'a str)> {
    let bad = |reason: &str| Invalid::new("format", format!("{reason} in {format:?}"));
    let name_end = text
        .find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
        .filter(|end| *end > 0)
        .ok_or_else(|| bad("incorrect command"))?;
    let name = &text[..name_end];
    let mut rest = &text[name_end..];
    let mut argument = None;
    if let Some(inside) = rest.strip_prefix('(') {
        // The first one that ends the command, too: arguments may hold parentheses themselves.
        let mut closing = inside.match_indices(')').map(|(at, _)| at).peekable();
        let first = *closing.peek().ok_or_else(|| bad("unclosed parenthesis"))?;
        let end = closing.find(|at| ends_command(&inside[at + 1..])).unwrap_or(first);
        argument = Some(&inside[..end]);
        rest = &inside[end + 1..];
    }
    let mut limit = None;
    if let Some(after) = rest.strip_prefix(':') {
        let end = after.find('%').ok_or_else(|| bad("unclosed command"))?;
        limit = Some(after[..end].parse().map_err(|_| bad("length is no number"))?);
        rest = &after[end..];
    }
    let rest = rest.strip_prefix('%').ok_or_else(|| bad("unclosed command"))?;
    Ok((Item::Command { command: checked(name, argument, limit, dialect)?, limit }, rest))
}

/// A command that takes the argument and the length that it has.
fn checked(name: &str, argument: Option<&str>, limit: Option<usize>, dialect: Dialect) -> Compiled<Command> {
    let command = named(name, argument, dialect)?;
    if stands_alone(name, &command) && (limit.is_some() || argument.is_some_and(|a| !a.is_empty())) {
        return Err(Invalid::new("format", format!("{name} does not take any parameters or length")));
    }
    if limit.is_some() && WITHOUT_LENGTH.contains(&name) {
        return Err(Invalid::new("format", format!("{name} does not allow length to be specified")));
    }
    Ok(command)
}

/// Commands that may have an argument and never a length: Envoy's `CommandSyntaxChecker` flags without `LENGTH_ALLOWED`.
const WITHOUT_LENGTH: [&str; 21] = [
    "START_TIME",
    "START_TIME_LOCAL",
    "EMIT_TIME",
    "EMIT_TIME_LOCAL",
    "GRPC_STATUS",
    "COMMON_DURATION",
    "REQUESTED_SERVER_NAME",
    "RESPONSE_CODE_DETAILS",
    "CLUSTER_METADATA",
    "UPSTREAM_METADATA",
    "DOWNSTREAM_PEER_CERT_V_START",
    "DOWNSTREAM_PEER_CERT_V_END",
    "UPSTREAM_PEER_CERT_V_START",
    "UPSTREAM_PEER_CERT_V_END",
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
    "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT",
];

/// Envoy's `CommandSyntaxChecker::COMMAND_ONLY`.
fn stands_alone(name: &str, command: &Command) -> bool {
    match command {
        Command::Count(_) | Command::Hostname | Command::HeadBytes(_) | Command::Unmeasured | Command::Tls(..) => true,
        Command::Attempted(_) => true,
        Command::Address(..) => !name.ends_with("_WITHOUT_PORT"),
        Command::Between(..) => name != "COMMON_DURATION",
        Command::GrpcStatus(_) => name == "GRPC_STATUS_NUMBER",
        Command::Stream(_) => !matches!(name, "REQUESTED_SERVER_NAME" | "RESPONSE_CODE_DETAILS" | "QUERY_PARAMS"),
        _ => false,
    }
}

fn named(name: &str, argument: Option<&str>, dialect: Dialect) -> Compiled<Command> {
    use Count::*;
    use Field as F;
    use Point as P;
    let needs = || {
        argument.filter(|a| !a.is_empty()).ok_or_else(|| Invalid::new("format", format!("{name} needs an argument")))
    };
    Ok(match name {
        "REQ" => header(needs()?, Command::Request)?,
        "REQ_WITHOUT_QUERY" if dialect.without_query => header(needs()?, Command::RequestWithoutQuery)?,
        "RESP" => header(needs()?, Command::Response)?,
        "TRAILER" => header(needs()?, Command::Trailer)?,
        "QUERY_PARAM" => Command::QueryParameter(needs()?.into()),
        "START_TIME" | "START_TIME_LOCAL" => Command::StartTime(TimeFormat::parse(argument.unwrap_or_default())),
        "EMIT_TIME" | "EMIT_TIME_LOCAL" => Command::EmitTime(TimeFormat::parse(argument.unwrap_or_default())),
        "DURATION" => Command::Between(P::Start, P::Complete, MS),
        "REQUEST_DURATION" => Command::Between(P::Start, P::RequestReceived, MS),
        "REQUEST_TX_DURATION" => Command::Between(P::Start, P::UpstreamLastTx, MS),
        "RESPONSE_DURATION" => Command::Between(P::Start, P::UpstreamFirstRx, MS),
        "RESPONSE_TX_DURATION" => Command::Between(P::UpstreamFirstRx, P::DownstreamLastTx, MS),
        "DOWNSTREAM_HANDSHAKE_DURATION" => Command::Between(P::Start, P::HandshakeEnd, MS),
        "UPSTREAM_CONNECTION_POOL_READY_DURATION" => Command::Between(P::Start, P::UpstreamFirstTx, MS),
        "COMMON_DURATION" => between(needs()?)?,
        "BYTES_RECEIVED" => Command::Count(BytesReceived),
        "BYTES_SENT" => Command::Count(BytesSent),
        "RESPONSE_CODE" => Command::Count(ResponseCode),
        "CONNECTION_ID" => Command::Count(ConnectionId),
        "UPSTREAM_CONNECTION_ID" => Command::Count(UpstreamConnectionId),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Command::Count(UpstreamAttempts),
        "UPSTREAM_WIRE_BYTES_SENT" => Command::Count(UpstreamWireSent),
        "UPSTREAM_WIRE_BYTES_RECEIVED" => Command::Count(UpstreamWireReceived),
        "UPSTREAM_HEADER_BYTES_SENT" | "UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => Command::Count(UpstreamHeadersSent),
        "UPSTREAM_HEADER_BYTES_RECEIVED" | "UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => {
            Command::Count(UpstreamHeadersReceived)
        }
        "DOWNSTREAM_WIRE_BYTES_SENT" => Command::Count(DownstreamWireSent),
        "DOWNSTREAM_WIRE_BYTES_RECEIVED" => Command::Count(DownstreamWireReceived),
        "DOWNSTREAM_HEADER_BYTES_SENT" | "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => {
            Command::Count(DownstreamHeadersSent)
        }
        "DOWNSTREAM_HEADER_BYTES_RECEIVED" | "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => {
            Command::Count(DownstreamHeadersReceived)
        }
        "PROTOCOL" => Command::Stream(F::Protocol),
        "UPSTREAM_PROTOCOL" => Command::Stream(F::UpstreamProtocol),
        "RESPONSE_CODE_DETAILS" if argument == Some("ALLOW_WHITESPACES") => Command::Stream(F::RawResponseCodeDetails),
        "RESPONSE_CODE_DETAILS" => Command::Stream(F::ResponseCodeDetails),
        "REQUEST_HEADERS_BYTES" => Command::HeadBytes(Head::Request),
        "RESPONSE_HEADERS_BYTES" => Command::HeadBytes(Head::Response),
        "RESPONSE_TRAILERS_BYTES" => Command::HeadBytes(Head::ResponseTrailers),
        "DOWNSTREAM_PEER_CERT_V_START" => Command::Validity(End::Downstream, true, validity_time(argument)),
        "DOWNSTREAM_PEER_CERT_V_END" => Command::Validity(End::Downstream, false, validity_time(argument)),
        "UPSTREAM_PEER_CERT_V_START" => Command::Validity(End::Upstream, true, validity_time(argument)),
        "UPSTREAM_PEER_CERT_V_END" => Command::Validity(End::Upstream, false, validity_time(argument)),
        // Envoy tells these of the last try, and only once that had its connection.
        "UPSTREAM_HOSTS_ATTEMPTED" => Command::Attempted(HostPart::Address(AddressPart::Whole)),
        "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT" => Command::Attempted(HostPart::Address(AddressPart::WithoutPort)),
        "UPSTREAM_HOST_NAMES_ATTEMPTED" => Command::Attempted(HostPart::Name),
        "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT" => Command::Attempted(HostPart::NameWithoutPort),
        "UPSTREAM_CONNECTION_IDS_ATTEMPTED" => Command::Count(UpstreamConnectionId),
        "DOWNSTREAM_DETECTED_CLOSE_TYPE" => Command::Stream(F::DownstreamCloseType),
        "UPSTREAM_DETECTED_CLOSE_TYPE" => Command::Stream(F::UpstreamCloseType),
        "DOWNSTREAM_LOCAL_CLOSE_REASON" => Command::Stream(F::DownstreamLocalCloseReason),
        "UPSTREAM_LOCAL_CLOSE_REASON" => Command::Unmeasured,
        "SPAN_ID" => Command::Stream(F::SpanId),
        "REQUEST_HEADER" | "STREAM_INFO_REQ" => header(needs()?, Command::Request)?,
        "RESPONSE_HEADER" => header(needs()?, Command::Response)?,
        "RESPONSE_TRAILER" => header(needs()?, Command::Trailer)?,
        "CONNECTION_TERMINATION_DETAILS" => Command::Stream(F::ConnectionTerminationDetails),
        "RESPONSE_FLAGS" => Command::Stream(F::ResponseFlags),
        "RESPONSE_FLAGS_LONG" => Command::Stream(F::ResponseFlagsLong),
        "ROUTE_NAME" => Command::Stream(F::RouteName),
        "VIRTUAL_CLUSTER_NAME" => Command::Stream(F::VirtualClusterName),
        "UPSTREAM_HOST_NAME" => Command::Stream(F::UpstreamHostName),
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => Command::Stream(F::UpstreamHostNameWithoutPort),
        "UPSTREAM_CLUSTER" => Command::Stream(F::UpstreamCluster),
        "UPSTREAM_CLUSTER_RAW" => Command::Stream(F::UpstreamClusterRaw),
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Command::Stream(F::UpstreamTransportFailure),
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => Command::Stream(F::DownstreamTransportFailure),
        "REQUESTED_SERVER_NAME" => {
            let argument = argument.unwrap_or_default();
            let (order, host) = argument.split_once(':').unwrap_or((argument, ""));
            let host = host.split(':').next().unwrap_or_default();
            let unknown = |what| Err(Invalid::new("format", format!("REQUESTED_SERVER_NAME: {what} is unknown")));
            let host = match host {
                "" | "ORIG_OR_HOST" => HostSource::OriginalOrCurrent,
                "ORIG" => HostSource::Original,
                "HOST" => HostSource::Current,
                other => return unknown(other),
            };
            Command::Stream(match order {
                "" | "SNI_ONLY" => F::RequestedServerName,
                "SNI_FIRST" => F::ServerNameFirst(host),
                "HOST_FIRST" => F::HostFirst(host),
                other => return unknown(other),
            })
        }
        "FILTER_CHAIN_NAME" => Command::Stream(F::FilterChainName),
        "LISTENER_NAME" => Command::Stream(F::ListenerName),
        "LOCAL_REPLY_BODY" => Command::Stream(F::LocalReplyBody),
        "ACCESS_LOG_TYPE" => Command::Stream(F::AccessLogType),
        "TRACE_ID" => Command::Stream(F::TraceId),
        "STREAM_ID" => Command::Stream(F::StreamId),
        "UNIQUE_ID" => Command::Stream(F::UniqueId),
        "PATH" => path(argument.unwrap_or_default())?,
        "QUERY_PARAMS" => Command::Stream(match argument.unwrap_or_default() {
            "" | "ORIG" => F::Query,
            "DECODED" => F::DecodedQuery,
            other => {
                return Err(Invalid::new("format", format!("QUERY_PARAMS only supports ORIG or DECODED, not {other}")));
            }
        }),
        "DYNAMIC_METADATA" => metadata(MetadataSource::Dynamic, needs()?, dialect)?,
        "CLUSTER_METADATA" => metadata(MetadataSource::Cluster, needs()?, Dialect::default())?,
        "UPSTREAM_METADATA" => metadata(MetadataSource::UpstreamHost, needs()?, dialect)?,
        "METADATA" => sourced_metadata(needs()?)?,
        // No filter's state is of the upstream's connection.
        "UPSTREAM_FILTER_STATE" => {
            named("FILTER_STATE", argument, dialect)?;
            Command::Nothing
        }
        "FILTER_STATE" => {
            let key = needs()?;
            let (key, form) = key.split_once(':').unwrap_or((key, "TYPED"));
            match form {
                _ if key.is_empty() => return Err(Invalid::new("format", format!("{name} needs a key"))),
                "PLAIN" | "TYPED" | "" => Command::FilterState(key.into(), form == "PLAIN"),
                _ if form.strip_prefix("FIELD:").is_some_and(|field| !field.is_empty()) => {
                    Command::FilterStateField(key.into(), form["FIELD:".len()..].into())
                }
                _ => {
                    let said = format!("{name}: only PLAIN, TYPED and FIELD are supported");
                    return Err(Invalid::new("format", said));
                }
            }
        }
        "PER_REQUEST_STATE" if dialect.old_forms => Command::FilterState(needs()?.into(), true),
        "GRPC_STATUS" => Command::GrpcStatus(match argument.unwrap_or_default() {
            "" | "CAMEL_STRING" => GrpcStatusStyle::Camel,
            "SNAKE_STRING" => GrpcStatusStyle::Snake,
            "NUMBER" => GrpcStatusStyle::Number,
            other => {
                return Err(Invalid::new(
                    "format",
                    format!("GRPC_STATUS only supports CAMEL_STRING, SNAKE_STRING or NUMBER, not {other}"),
                ));
            }
        }),
        "GRPC_STATUS_NUMBER" => Command::GrpcStatus(GrpcStatusStyle::Number),
        "ENVIRONMENT" => Command::Environment(needs()?.into()),
        "CEL" | "TYPED_CEL" => {
            let expression = crate::cel::Expression::with(needs()?, dialect.cel)?;
            Command::Cel(Box::new(expression), name == "TYPED_CEL")
        }
        "HOSTNAME" => Command::Hostname,
        // Only extensions set these, and there are none.
        "CUSTOM_FLAGS" => Command::Stream(F::Nothing),
        "TLS_JA3_FINGERPRINT" => Command::Stream(F::Ja3),
        "TLS_JA4_FINGERPRINT" => Command::Stream(F::Ja4),
        // Endpoints that are internal listeners do not exist.
        "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID"
        | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID"
        | "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID" => Command::Stream(F::Nothing),
        "BYTES_RETRANSMITTED" | "PACKETS_RETRANSMITTED" => Command::Count(Retransmitted),
        "ROUNDTRIP_DURATION" => Command::Unmeasured,
        "COALESCE" => first_of(needs()?, dialect)?,
        other => address(other, argument)
            .or_else(|| tls(other))
            .ok_or_else(|| Invalid::new("format", format!("not supported: {other}")))?,
    })
}

/// One part of a time.
const MS: Duration = Duration::from_millis(1);

fn validity_time(argument: Option<&str>) -> TimeFormat {
    TimeFormat::parse(argument.filter(|a| !a.is_empty()).unwrap_or("%Y-%m-%dT%H:%M:%E3SZ"))
}

/// `{"operators":["NAME", {"command": "NAME", "param": "ARGUMENT", "max_length": N}]}` (Envoy `CoalesceFormatter`).
fn first_of(argument: &str, dialect: Dialect) -> Compiled<Command> {
    let bad = |what: &str| Invalid::new("format", format!("COALESCE: {what} in {argument:?}"));
    let value: Value = serde_json::from_str(argument).map_err(|e| bad(&e.to_string()))?;
    let operators = value.get("operators").and_then(Value::as_array).filter(|list| !list.is_empty());
    let operators = operators.ok_or_else(|| bad("no list of operators"))?;
    let one = |operator: &Value| {
        let name = operator.as_str().or_else(|| operator.get("command")?.as_str()).filter(|name| !name.is_empty());
        let parameter = operator.get("param").and_then(Value::as_str);
        let limit = match operator.get("max_length") {
            None => None,
            Some(limit) => {
                let limit = limit.as_u64().filter(|n| *n > 0);
                Some(limit.ok_or_else(|| bad("a max_length that is no positive number"))? as usize)
            }
        };
        let name = name.ok_or_else(|| bad("an operator without a command"))?;
        Ok((checked(name, parameter, limit, dialect)?, limit))
    };
    Ok(Command::FirstOf(operators.iter().map(one).collect::<Compiled<_>>()?))
}

/// `[WQ|NQ][:PATH|ORIG|ORIG_OR_PATH]`; what comes behind is nothing to Envoy.
fn path(argument: &str) -> Compiled<Command> {
    let (query, source) = argument.split_once(':').unwrap_or((argument, ""));
    let source = source.split(':').next().unwrap_or_default();
    let unknown = |what: &str| Invalid::new("format", format!("PATH: {what} is unknown"));
    let query = match query {
        "" | "WQ" => true,
        "NQ" => false,
        other => return Err(unknown(other)),
    };
    let source = match source {
        "" | "ORIG_OR_PATH" => PathSource::OriginalOrCurrent,
        "ORIG" => PathSource::Original,
        "PATH" => PathSource::Current,
        other => return Err(unknown(other)),
    };
    Ok(Command::Path(source, query))
}

fn header(argument: &str, make: fn(Box<str>, Option<Box<str>>) -> Command) -> Compiled<Command> {
    let (main, other) = argument.split_once('?').map_or((argument, None), |(main, other)| (main, Some(other)));
    // A name, which may be a pseudo header's, or nothing, which no header is called.
    let name = |name: &str| {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        name.is_empty()
            || Some(name.strip_prefix(':').unwrap_or(name)).is_some_and(|n| !n.is_empty() && n.bytes().all(token))
    };
    if !argument.split('?').all(name) {
        return Err(Invalid::new("format", format!("{argument:?} contains invalid characters")));
    }
    if argument.matches('?').count() > 1 {
        return Err(Invalid::new("format", format!("more than one alternative header in {argument:?}")));
    }
    Ok(make(canonical_name(main).into(), other.map(|o| canonical_name(o).into())))
}

fn metadata(source: MetadataSource, argument: &str, dialect: Dialect) -> Compiled<Command> {
    // `["namespace", "key", …]`.
    if dialect.old_forms && argument.starts_with('[') {
        let list: Vec<String> = serde_json::from_str(argument)
            .map_err(|e| Invalid::new("format", format!("{argument:?} is no list of keys: {e}")))?;
        let (namespace, path) =
            list.split_first().ok_or_else(|| Invalid::new("format", "metadata needs a namespace"))?;
        return Ok(Command::Metadata(
            source,
            namespace.as_str().into(),
            path.iter().map(|k| k.as_str().into()).collect(),
        ));
    }
    let mut parts = argument.split(':');
    let namespace = parts.next().unwrap_or_default();
    Ok(Command::Metadata(source, namespace.into(), parts.map(Box::from).collect()))
}

fn sourced_metadata(argument: &str) -> Compiled<Command> {
    let (source, rest) = argument.split_once(':').unwrap_or((argument, ""));
    let source = match source {
        "DYNAMIC" => MetadataSource::Dynamic,
        "CLUSTER" => MetadataSource::Cluster,
        "ROUTE" => MetadataSource::Route,
        "UPSTREAM_HOST" => MetadataSource::UpstreamHost,
        "VIRTUAL_HOST" => MetadataSource::VirtualHost,
        "LISTENER" => MetadataSource::Listener,
        "LISTENER_FILTER_CHAIN" => MetadataSource::FilterChain,
        other => return Err(Invalid::new("format", format!("METADATA of {other} is not supported"))),
    };
    metadata(source, rest, Dialect::default())
}

fn between(argument: &str) -> Compiled<Command> {
    let point = |name: &str| match name {
        "DS_RX_BEG" => Point::Start,
        "DS_RX_END" => Point::RequestReceived,
        "US_TX_BEG" => Point::UpstreamFirstTx,
        "US_TX_END" => Point::UpstreamLastTx,
        "US_RX_BEG" => Point::UpstreamFirstRx,
        "US_RX_END" => Point::UpstreamLastRx,
        "DS_TX_BEG" => Point::DownstreamFirstTx,
        "DS_TX_END" => Point::DownstreamLastTx,
        "US_CX_BEG" => Point::UpstreamConnectBegin,
        "US_CX_END" | "US_HS_END" => Point::UpstreamConnectEnd,
        // Names of points that filters set; there are no such filters.
        _ => Point::Unset,
    };
    let mut parts = argument.split(':');
    let (Some(from), Some(to)) = (parts.next(), parts.next()) else {
        return Err(Invalid::new("format", "COMMON_DURATION needs two points"));
    };
    let unit = match parts.next() {
        None | Some("ms") => MS,
        Some("us") => Duration::from_micros(1),
        Some("ns") => Duration::from_nanos(1),
        Some(unit) => return Err(Invalid::new("format", format!("COMMON_DURATION in {unit} is not supported"))),
    };
    if parts.next().is_some() {
        return Err(Invalid::new("format", format!("COMMON_DURATION of two points and a unit, not {argument}")));
    }
    Ok(Command::Between(point(from), point(to), unit))
}

fn address(name: &str, argument: Option<&str>) -> Option<Command> {
    let found = [
        ("DOWNSTREAM_REMOTE_", Side::DownstreamRemote),
        ("DOWNSTREAM_DIRECT_REMOTE_", Side::DownstreamDirectRemote),
        ("DOWNSTREAM_LOCAL_", Side::DownstreamLocal),
        ("DOWNSTREAM_DIRECT_LOCAL_", Side::DownstreamLocal),
        ("UPSTREAM_LOCAL_", Side::UpstreamLocal),
        ("UPSTREAM_REMOTE_", Side::UpstreamRemote),
        ("UPSTREAM_HOST", Side::UpstreamHost),
    ]
    .iter()
    .find_map(|(prefix, side)| name.strip_prefix(prefix).map(|rest| (*side, rest)));
    let (side, rest) = found?;
    let part = match rest {
        "" if name == "UPSTREAM_HOST" => AddressPart::Whole,
        "ADDRESS" => AddressPart::Whole,
        "ADDRESS_WITHOUT_PORT" => match argument.filter(|a| !a.is_empty()) {
            None => AddressPart::WithoutPort,
            // What is no number asks for no range, and a negative one for one that does not exist.
            Some(length) => length.trim().parse().map_or(AddressPart::WithoutPort, AddressPart::Range),
        },
        "PORT" => AddressPart::Port,
        _ => return None,
    };
    Some(Command::Address(side, part))
}

fn tls(name: &str) -> Option<Command> {
    let (end, rest) = if let Some(rest) = name.strip_prefix("DOWNSTREAM_") {
        (End::Downstream, rest)
    } else {
        (End::Upstream, name.strip_prefix("UPSTREAM_")?)
    };
    let field = match rest {
        "PEER_URI_SAN" => TlsField::PeerUriSan,
        "PEER_DNS_SAN" => TlsField::PeerDnsSan,
        "PEER_IP_SAN" => TlsField::PeerIpSan,
        "PEER_EMAIL_SAN" if end == End::Downstream => TlsField::PeerEmailSan,
        "PEER_OTHERNAME_SAN" if end == End::Downstream => TlsField::PeerOtherNameSan,
        "PEER_ISSUER_FINGERPRINT_256" if end == End::Downstream => TlsField::PeerIssuerSha256,
        "PEER_ISSUER_SERIAL" if end == End::Downstream => TlsField::PeerIssuerSerial,
        "SERVER_NAME" if end == End::Upstream => TlsField::ServerName,
        "PEER_SUBJECT" => TlsField::PeerSubject,
        "PEER_ISSUER" => TlsField::PeerIssuer,
        "PEER_SERIAL" if end == End::Downstream => TlsField::PeerSerial,
        "PEER_FINGERPRINT_256" if end == End::Downstream => TlsField::PeerSha256,
        "PEER_FINGERPRINT_1" if end == End::Downstream => TlsField::PeerSha1,
        "PEER_CERT" => TlsField::PeerCert,
        "PEER_CHAIN_FINGERPRINTS_256" if end == End::Downstream => TlsField::PeerChainSha256,
        "PEER_CHAIN_FINGERPRINTS_1" if end == End::Downstream => TlsField::PeerChainSha1,
        "PEER_CHAIN_SERIALS" if end == End::Downstream => TlsField::PeerChainSerials,
        "LOCAL_URI_SAN" => TlsField::LocalUriSan,
        "LOCAL_DNS_SAN" => TlsField::LocalDnsSan,
        "LOCAL_IP_SAN" => TlsField::LocalIpSan,
        "LOCAL_EMAIL_SAN" if end == End::Downstream => TlsField::LocalEmailSan,
        "LOCAL_OTHERNAME_SAN" if end == End::Downstream => TlsField::LocalOtherNameSan,
        "LOCAL_SUBJECT" if end == End::Downstream => TlsField::LocalSubject,
        "TLS_VERSION" => TlsField::Version,
        "TLS_GROUP" => TlsField::Group,
        "TLS_CIPHER" => TlsField::Cipher,
        "TLS_SESSION_ID" => TlsField::SessionId,
        _ => return None,
    };
    Some(Command::Tls(end, field))
}
