//! External authorization: a service is told of the request, over gRPC or HTTP, and says what becomes of it.

use super::encode::{AddToAnswer, Addition};
use super::exchange::{Exchange, Stop};
use super::filters::{self, Peeked};
use super::local_reply::LocalReply;
use crate::internal;
use crate::stream::RecvBody;
use bytes::Bytes;
use envoy_api::Message;
use envoy_api::core::header_value_option::HeaderAppendAction;
use envoy_api::core::{HeaderMap, HeaderValue, HeaderValueOption};
use envoy_api::pb::envoy::service::auth::v3 as auth;
use proxy_core::collector::GrpcService;
use proxy_core::filters::{Asked, AuthzService, ExtAuthz, HttpAuthz, PerFilter};
use proxy_core::{FormatContext, Headers, Metadata, ResponseFlags};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// Namespace of the filter's dynamic metadata.
const AUTHZ: &str = "envoy.filters.http.ext_authz";

/// What of a request tells a router how to send it.
const FOR_ROUTERS: [&str; 9] = [
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-max-retries",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-ms",
];

/// Counters of the filter below `http.PREFIX.ext_authz`.
pub(super) const COUNTERS: [&str; 13] = [
    "ok",
    "denied",
    "error",
    "disabled",
    "failure_mode_allowed",
    "invalid",
    "ignored_dynamic_metadata",
    "omitted_response_headers",
    "filter_state_name_collision",
    "request_header_limits_reached",
    "response_header_limits_reached",
    "shadow_denied",
    "shadow_error",
];

/// The name of one of them; the configuration may put a prefix in between.
pub(super) fn counter(config: &ExtAuthz, what: &str) -> String {
    match &*config.stat_prefix {
        "" => format!("ext_authz.{what}"),
        prefix => format!("ext_authz.{prefix}.{what}"),
    }
}

type Field = (String, Vec<u8>);

/// What an authorization service decided.
enum Decision {
    Allow(Allowed),
    Deny { status: u16, headers: Vec<Field>, body: Bytes, metadata: Map<String, Value> },
    Error,
}

/// Changes that come with a permission.
#[derive(Default)]
struct Allowed {
    set: Vec<Field>,
    /// Added beside what is there.
    append: Vec<Field>,
    /// Joined to what is there; left out if nothing is.
    join: Vec<Field>,
    remove: Vec<String>,
    query_set: Vec<(String, String)>,
    query_remove: Vec<String>,
    metadata: Map<String, Value>,
    to_client: Vec<AddToAnswer>,
}

impl Allowed {
    fn changes_route(&self) -> bool {
        !(self.set.is_empty()
            && self.append.is_empty()
            && self.join.is_empty()
            && self.remove.is_empty()
            && self.query_set.is_empty()
            && self.query_remove.is_empty())
    }

    fn fields(&self) -> impl Iterator<Item = &Field> {
        self.set.iter().chain(&self.append).chain(&self.join)
    }
}

pub(super) async fn run(
    exchange: &mut Exchange,
    config: &Arc<ExtAuthz>,
    per: Option<&PerFilter>,
    body: &mut RecvBody,
) -> Result<(), Stop> {
    // Envoy does not ask where there is no route, other than the one to TLS.
    if exchange.matched.is_none() && exchange.redirect_to_tls.is_none() {
        return Ok(());
    }
    let worker = exchange.http.worker.clone();
    let asked = config.is_asked(&exchange.info.dynamic_metadata, &mut worker.random.borrow_mut());
    if asked != Asked::Yes {
        exchange.http.stats.other.inc(&counter(config, "disabled"));
        return match asked {
            Asked::Refused if config.shadow => {
                exchange.http.stats.other.inc(&counter(config, "shadow_denied"));
                exchange.info.flags.insert(ResponseFlags::UNAUTHORIZED);
                Ok(())
            }
            Asked::Refused => Err(refuse(config.status_on_error, "ext_authz_error")),
            _ => Ok(()),
        };
    }
    let over = match per {
        Some(PerFilter::ExtAuthz(over)) => Some(over.clone()),
        _ => None,
    };
    let buffer = match &over {
        Some(over) if over.no_body => None,
        Some(over) if over.body.is_some() => over.body,
        _ => config.body,
    };
    let had_body = !body.is_empty();
    let peeked = match &buffer {
        Some(buffer) if had_body => {
            filters::peek_body(exchange, body, buffer.max_bytes as usize, buffer.allow_partial).await?
        }
        _ => None,
    };
    let asked_at = Instant::now();
    let of_route = over.as_ref().and_then(|over| over.service.as_ref());
    let decision = match of_route.unwrap_or(&config.service) {
        AuthzService::Http(http) => by_http(exchange, config, http, peeked).await?,
        AuthzService::Grpc { service, timeout } => {
            let context = over.as_ref().map(|o| o.context.as_slice()).unwrap_or_default();
            let as_bytes = buffer.is_some_and(|buffer| buffer.as_bytes);
            let check = check_request(exchange, config, context, peeked.as_ref(), as_bytes);
            let mut headers = check_head(service, *timeout);
            internal::mark(&worker, &mut headers, Some(*timeout));
            let asked = internal::ask(&worker, &service.cluster, headers, grpc_frame(&check), *timeout, 1 << 20);
            let answer = exchange.wait(asked).await?;
            answer.map_or(Decision::Error, |(status, headers, body)| grpc_decision(status, &headers, &body))
        }
    };
    let cluster = exchange.info.upstream.cluster.clone().and_then(|name| worker.cluster(&name));
    let own = exchange.http.clone();
    let count = |what: &str| {
        let name = counter(config, what);
        own.stats.other.inc(&name);
        if let Some(cluster) = &cluster {
            cluster.stats.other.inc(&name);
        }
    };
    match decision {
        Decision::Allow(mut allowed) => {
            if !allowed.metadata.is_empty() {
                let took = asked_at.elapsed().as_millis() as u64;
                allowed.metadata.insert("ext_authz_duration".into(), took.into());
            }
            set_metadata(exchange, config, std::mem::take(&mut allowed.metadata));
            if let Some(reason) = allowed.fields().find_map(invalid) {
                if config.validate_mutations {
                    count("invalid");
                    return Err(refuse(500, "ext_authz_invalid"));
                }
                count("ok");
                // Envoy's codec refuses to write such a head.
                let details = reason.replace(' ', "_");
                let details = format!("filter_removed_required_request_headers{{{details}}}");
                let reply = LocalReply::new(503, reason, details);
                return Err(reply.flagged(ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR).into());
            }
            let changed = allowed.changes_route();
            let adds = allowed.fields().next().is_some();
            allow(exchange, allowed);
            let limits = exchange.http.head_limits();
            let request = &exchange.request;
            if adds && (request.len() > limits.fields || request.byte_size() > limits.bytes) {
                own.stats.other.inc(&counter(config, "request_header_limits_reached"));
                count("invalid");
                return Err(refuse(500, "ext_authz_invalid"));
            }
            count("ok");
            if config.clear_route_cache && changed {
                exchange.clear_route();
            }
            Ok(())
        }
        Decision::Deny { status, headers, body, metadata } => {
            set_metadata(exchange, config, metadata);
            if config.validate_mutations && headers.iter().any(|field| invalid(field).is_some()) {
                count("invalid");
                return Err(refuse(500, "ext_authz_invalid"));
            }
            count("denied");
            if let Some(cluster) = cluster.as_ref().filter(|_| config.charges_cluster) {
                cluster.stats.charge(status, true);
            }
            if config.shadow {
                own.stats.other.inc(&counter(config, "shadow_denied"));
                return Ok(());
            }
            let mut reply = LocalReply::new(status, "", "ext_authz_denied").flagged(ResponseFlags::UNAUTHORIZED);
            reply.raw_body = Some(body.slice(..body.len().min(config.max_denied_body.unwrap_or(usize::MAX))));
            let grpc = super::exchange::is_grpc(&exchange.request);
            for (name, value) in headers {
                // What it is in a gRPC status has no length.
                if name.starts_with(':') || breaks_line(&value) || grpc && name == "content-length" {
                    continue;
                }
                match reply.headers.iter_mut().find(|(known, _)| *known == name && name == "content-type") {
                    // One of a kind: Envoy joins them.
                    Some((_, known)) => *known = [known, &b","[..], &value].concat(),
                    None => reply.headers.push((name, value)),
                }
            }
            Err(reply.into())
        }
        Decision::Error => {
            count("error");
            if config.shadow {
                own.stats.other.inc(&counter(config, "shadow_error"));
                return Ok(());
            }
            if config.failure_mode_allow {
                count("failure_mode_allowed");
                if config.failure_mode_allow_header {
                    exchange.request.push(b"x-envoy-auth-failure-mode-allowed", b"true");
                }
                return Ok(());
            }
            Err(refuse(config.status_on_error, "ext_authz_error"))
        }
    }
}

fn refuse(status: u16, details: &'static str) -> Stop {
    LocalReply::new(status, "", details).flagged(ResponseFlags::UNAUTHORIZED).into()
}

fn set_metadata(exchange: &mut Exchange, config: &ExtAuthz, metadata: Map<String, Value>) {
    if !config.takes_metadata {
        if !metadata.is_empty() {
            exchange.http.stats.other.inc(&counter(config, "ignored_dynamic_metadata"));
        }
        return;
    }
    for (key, value) in metadata {
        exchange.info.dynamic_metadata.set(AUTHZ, &key, value);
    }
}

fn breaks_line(value: &[u8]) -> bool {
    value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0))
}

/// What is wrong with a header, in the words of Envoy's codec.
fn invalid((name, value): &Field) -> Option<String> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let plain = name.strip_prefix(':').unwrap_or(name);
    if plain.is_empty() || !plain.bytes().all(token) {
        return Some(format!("invalid header name: {name}"));
    }
    breaks_line(value).then(|| format!("invalid header value for: {name}"))
}

/// Carries out what a permission says, in Envoy's order (`Filter::onComplete`).
fn allow(exchange: &mut Exchange, allowed: Allowed) {
    let request = &mut exchange.request;
    let canonical = |name: String| if name == "host" { ":authority".to_owned() } else { name };
    for (name, value) in allowed.set {
        request.set(&canonical(name), &value);
    }
    for (name, value) in allowed.append {
        request.push(name.as_bytes(), &value);
    }
    for (name, value) in allowed.join {
        if request.contains(&name) {
            request.append(&name, &value, ",");
        }
    }
    for name in allowed.remove {
        // What makes a request is never taken away.
        let name = name.to_ascii_lowercase();
        if !name.starts_with(':') && name != "host" {
            request.remove(&name);
        }
    }
    if (!allowed.query_set.is_empty() || !allowed.query_remove.is_empty())
        && let Some(path) = request.path()
    {
        let path = with_query(path, allowed.query_set, &allowed.query_remove);
        request.set(":path", path.as_bytes());
    }
    exchange.add_to_response.extend(allowed.to_client);
}

/// The path with other query parameters, which are then sorted by name (Envoy `QueryParamsMulti`).
fn with_query(path: &str, set: Vec<(String, String)>, remove: &[String]) -> String {
    let (start, query) = path.split_once('?').unwrap_or((path, ""));
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        all.entry(name.to_owned()).or_default().push(value.to_owned());
    }
    for (name, value) in set {
        all.insert(name, vec![value]);
    }
    for name in remove {
        all.remove(name);
    }
    let pairs: Vec<String> =
        all.iter().flat_map(|(name, values)| values.iter().map(move |value| format!("{name}={value}"))).collect();
    if pairs.is_empty() { start.to_owned() } else { format!("{start}?{}", pairs.join("&")) }
}

async fn by_http(
    exchange: &mut Exchange,
    config: &ExtAuthz,
    http: &HttpAuthz,
    peeked: Option<Peeked>,
) -> Result<Decision, Stop> {
    let request = &exchange.request;
    let path = http.path(request.path().unwrap_or("/"));
    let mut headers = Headers::with_capacity(16, 512);
    headers.push(b":method", request.get(":method").unwrap_or(b"GET"));
    headers.push(b":scheme", b"http");
    headers.push(b":path", path.as_bytes());
    headers.push(b":authority", request.get(":authority").unwrap_or_default());
    for (name, value) in config.sent(request) {
        if !name.starts_with(':') && name != "host" && name != "content-length" && name != "transfer-encoding" {
            // Fields of one name are one, as for gRPC.
            match headers.get(name).map(|known| [known, b",", value].concat()) {
                Some(joined) => headers.set(name, &joined),
                None => headers.push(name.as_bytes(), value),
            }
        }
    }
    // What says how to ask is for whoever asks, and goes no further (Envoy's own router sends the question).
    for name in FOR_ROUTERS {
        headers.remove(name);
    }
    http.headers_to_add.apply(&mut headers, &FormatContext::new(&exchange.info, Some(request), None));
    if let Some(peeked) = &peeked {
        headers.set("x-envoy-auth-partial-body", if peeked.whole { b"false" } else { b"true" });
    }
    let body = peeked.map(|peeked| peeked.data).unwrap_or_default();
    headers.set("content-length", body.len().to_string().as_bytes());
    headers.set("x-envoy-internal", b"true");
    headers.set("x-envoy-expected-rq-timeout-ms", http.timeout.as_millis().to_string().as_bytes());
    let asked_at = Instant::now();
    let worker = exchange.http.worker.clone();
    let answer = exchange.wait(internal::ask(&worker, &http.cluster, headers, body, http.timeout, 1 << 20)).await?;
    let Some((status, mut headers, body)) = answer else { return Ok(Decision::Error) };
    // The router of Envoy's internal client adds it, so clients see it.
    headers.set("x-envoy-upstream-service-time", asked_at.elapsed().as_millis().to_string().as_bytes());
    if (500..600).contains(&status) {
        return Ok(Decision::Error);
    }
    // What it says to us goes no further.
    let remove: Vec<String> = headers
        .get_all("x-envoy-auth-headers-to-remove")
        .filter_map(|list| std::str::from_utf8(list).ok())
        .flat_map(|list| list.split(','))
        .map(|name| name.trim().to_owned())
        .collect();
    headers.remove("x-envoy-auth-headers-to-remove");
    let pick = |wanted: &dyn Fn(&str) -> bool| -> Vec<Field> {
        headers
            .iter_regular()
            .filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, value)))
            .filter(|(name, _)| wanted(name))
            .map(|(name, value)| (name.to_owned(), value.to_vec()))
            .collect()
    };
    let metadata = pick(&|name| http.goes_to_metadata(name))
        .into_iter()
        .map(|(name, value)| (name, String::from_utf8_lossy(&value).into_owned().into()))
        .collect();
    if status == 200 {
        let add = |(name, value)| AddToAnswer { name, value, how: Addition::Append };
        return Ok(Decision::Allow(Allowed {
            set: pick(&|name| http.sets_upstream(name)),
            append: pick(&|name| http.appends_upstream(name)),
            remove,
            metadata,
            to_client: pick(&|name| http.tells_client_on_success(name)).into_iter().map(add).collect(),
            ..Allowed::default()
        }));
    }
    let headers = pick(&|name| http.tells_client(name) && name != "content-length");
    Ok(Decision::Deny { status, headers, body, metadata })
}

/// The head of a call of `Check`.
pub(crate) fn check_head(service: &GrpcService, timeout: std::time::Duration) -> Headers {
    let mut headers = Headers::of([
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/envoy.service.auth.v3.Authorization/Check"),
        (":authority", &service.authority),
        ("te", "trailers"),
        ("grpc-timeout", &format!("{}m", timeout.as_millis())),
        ("content-type", "application/grpc"),
    ]);
    for (name, value) in &service.metadata {
        headers.push(name.as_bytes(), value.as_bytes());
    }
    headers
}

/// A message in the frame of a gRPC body.
pub(crate) fn grpc_frame(message: &impl Message) -> Bytes {
    let mut out = vec![0u8; 5];
    // Encoding into a Vec cannot run out of room.
    let _ = message.encode(&mut out);
    let len = (out.len() - 5) as u32;
    out[1..5].copy_from_slice(&len.to_be_bytes());
    out.into()
}

/// One end of a connection, for the service.
fn peer(
    address: &proxy_core::Address,
    certificate: Option<&proxy_core::stream_info::PeerCertificate>,
) -> auth::attribute_context::Peer {
    use envoy_api::core::socket_address::PortSpecifier;
    use envoy_api::core::{Address, SocketAddress, address};
    let socket = address.socket().map(|s| SocketAddress {
        address: s.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(s.port().into())),
        ..Default::default()
    });
    let name = certificate.map(|c| c.uri_sans.first().or(c.dns_sans.first()).unwrap_or(&c.subject));
    auth::attribute_context::Peer {
        address: socket.map(|s| Address { address: Some(address::Address::SocketAddress(s)) }),
        principal: name.map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    }
}

/// Both ends of a connection and what its handshake said.
fn ends(config: &ExtAuthz, remote: &proxy_core::Address, info: &proxy_core::ConnectionInfo) -> auth::AttributeContext {
    let tls = info.tls.as_deref();
    let client = tls.and_then(|t| t.peer.as_ref());
    let mut source = peer(remote, client);
    if let (true, Some(certificate)) = (config.include_peer_certificate, client) {
        source.certificate = certificate.pem_url_encoded.to_string();
    }
    let sni = tls.filter(|_| config.include_tls_session).map(|tls| auth::attribute_context::TlsSession {
        sni: tls.server_name.as_deref().unwrap_or_default().to_owned(),
    });
    auth::AttributeContext {
        source: Some(source),
        destination: Some(peer(&info.local, tls.and_then(|t| t.local.as_ref()))),
        tls_session: sni,
        ..Default::default()
    }
}

/// What the service is told of a connection without requests.
pub(crate) fn connection_attributes(config: &ExtAuthz, info: &proxy_core::ConnectionInfo) -> auth::CheckRequest {
    auth::CheckRequest { attributes: Some(ends(config, &info.remote, info)) }
}

/// The service's decision about a connection; `None`: that was no answer.
pub(crate) fn is_allowed(status: u16, headers: &Headers, body: &[u8]) -> Option<bool> {
    match grpc_decision(status, headers, body) {
        Decision::Allow(_) => Some(true),
        Decision::Deny { .. } => Some(false),
        Decision::Error => None,
    }
}

/// The namespaces of metadata that the service is to see.
fn namespaces(metadata: Option<&Metadata>, wanted: &[mesh_types::ArcStr]) -> envoy_api::core::Metadata {
    let all = metadata.into_iter().flat_map(Metadata::iter);
    let chosen = all.filter(|(name, _)| wanted.contains(name));
    envoy_api::core::Metadata {
        filter_metadata: chosen.map(|(name, fields)| (name.to_string(), crate::log::to_struct(fields))).collect(),
        ..Default::default()
    }
}

fn check_request(
    exchange: &Exchange,
    config: &ExtAuthz,
    context: &[(mesh_types::ArcStr, mesh_types::ArcStr)],
    peeked: Option<&Peeked>,
    as_bytes: bool,
) -> auth::CheckRequest {
    use auth::attribute_context::{HttpRequest, Request};
    let request = &exchange.request;
    let mut all: Vec<(&str, &[u8])> = config.sent(request).collect();
    if let Some(peeked) = peeked {
        all.push(("x-envoy-auth-partial-body", if peeked.whole { b"false" } else { b"true" }));
    }
    let body = peeked.map(|peeked| &*peeked.data).unwrap_or_default();
    let mut headers: HashMap<String, String> = HashMap::new();
    let mut header_map = None;
    if config.raw_headers {
        let raw = |(name, value): (&str, &[u8])| HeaderValue {
            key: name.to_owned(),
            raw_value: value.to_vec(),
            ..Default::default()
        };
        header_map = Some(HeaderMap { headers: all.into_iter().map(raw).collect() });
    } else {
        for (name, value) in all {
            let value = String::from_utf8_lossy(value);
            match headers.get_mut(name) {
                // Fields of one name are one, as HTTP has it.
                Some(known) => *known = format!("{known},{value}"),
                None => _ = headers.insert(name.to_owned(), value.into_owned()),
            }
        }
    }
    let text = |v: Option<&str>| v.unwrap_or_default().to_owned();
    let http = HttpRequest {
        id: exchange.http.worker.random.borrow_mut().next().to_string(),
        method: text(request.method()),
        headers,
        header_map,
        path: text(request.path()),
        host: text(request.authority()),
        scheme: text(request.scheme()),
        size: peeked.map_or(0, |peeked| peeked.size as i64),
        protocol: exchange.info.protocol.map(|p| p.as_str().to_owned()).unwrap_or_default(),
        body: if as_bytes { String::new() } else { String::from_utf8_lossy(body).into_owned() },
        raw_body: if as_bytes { body.to_vec() } else { Vec::new() },
        ..Default::default()
    };
    let since = exchange.info.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = envoy_api::wkt::Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32 };
    let route = exchange.matched.as_ref().map(|matched| &matched.route.metadata);
    auth::CheckRequest {
        attributes: Some(auth::AttributeContext {
            request: Some(Request { time: Some(time), http: Some(http) }),
            context_extensions: context.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            metadata_context: Some(namespaces(Some(&exchange.info.dynamic_metadata), &config.metadata_namespaces)),
            route_metadata_context: Some(namespaces(route, &config.route_metadata_namespaces)),
            ..ends(config, &exchange.info.remote, &exchange.http.info)
        }),
    }
}

fn field(header: HeaderValue) -> Field {
    let value = if header.value.is_empty() { header.raw_value } else { header.value.into_bytes() };
    (header.key.to_ascii_lowercase(), value)
}

#[expect(deprecated, reason = "services still set `append`")]
fn appends(option: &HeaderValueOption) -> Option<bool> {
    option.append.as_ref().map(|append| append.value)
}

/// A header for the client: `append` of old services before the action of new ones.
fn to_client(option: HeaderValueOption) -> Option<AddToAnswer> {
    let how = match (appends(&option), HeaderAppendAction::try_from(option.append_action)) {
        (Some(true), _) => Addition::Append,
        (Some(false), _) => Addition::Set,
        (None, Ok(HeaderAppendAction::AppendIfExistsOrAdd)) => Addition::Append,
        (None, Ok(HeaderAppendAction::AddIfAbsent)) => Addition::IfAbsent,
        (None, Ok(HeaderAppendAction::OverwriteIfExistsOrAdd)) => Addition::Set,
        (None, Ok(HeaderAppendAction::OverwriteIfExists)) => Addition::IfPresent,
        (None, Err(_)) => return None,
    };
    let (name, value) = field(option.header?);
    (!breaks_line(&value)).then_some(AddToAnswer { name, value, how })
}

/// The last whole message of a gRPC body: as Envoy, which takes an answer of several.
fn last_message(mut body: &[u8]) -> Option<&[u8]> {
    let mut last = None;
    while let Some((head, rest)) = body.split_first_chunk::<5>() {
        let [_, length @ ..] = head;
        let length = u32::from_be_bytes(*length) as usize;
        let Some(message) = rest.get(..length) else { break };
        (last, body) = (Some(message), &rest[length..]);
    }
    last
}

#[expect(deprecated, reason = "services still set it")]
fn old_metadata(response: &auth::CheckResponse) -> Option<envoy_api::wkt::Struct> {
    match &response.http_response {
        Some(auth::check_response::HttpResponse::OkResponse(ok)) => ok.dynamic_metadata.clone(),
        _ => None,
    }
}

fn grpc_decision(status: u16, headers: &Headers, body: &[u8]) -> Decision {
    use auth::check_response::HttpResponse;
    // A call that ends without a status has failed, and one that is not answered with 200, whatever it says then (Envoy
    // `AsyncStreamImpl::onHeaders`).
    if status != 200 || headers.get_str("grpc-status") != Some("0") {
        return Decision::Error;
    }
    let Some(message) = last_message(body) else { return Decision::Error };
    let Ok(mut response) = auth::CheckResponse::decode(message) else { return Decision::Error };
    let mut metadata = response.dynamic_metadata.take();
    if let Some(old) = old_metadata(&response) {
        // Where services of old put it; it stands over the newer field.
        metadata = Some(old);
    }
    let metadata = metadata.as_ref().map(proxy_core::json_object).unwrap_or_default();
    let fields =
        |list: Vec<HeaderValueOption>| -> Vec<Field> { list.into_iter().filter_map(|o| o.header).map(field).collect() };
    if response.status.as_ref().is_none_or(|s| s.code == 0) {
        let Some(HttpResponse::OkResponse(ok)) = response.http_response else {
            return Decision::Allow(Allowed { metadata, ..Allowed::default() });
        };
        // Envoy looks at `append` of the request's headers, never at their action.
        let (join, set): (Vec<_>, Vec<_>) = ok.headers.into_iter().partition(|o| appends(o) == Some(true));
        return Decision::Allow(Allowed {
            set: fields(set),
            join: fields(join),
            remove: ok.headers_to_remove,
            query_set: ok.query_parameters_to_set.into_iter().map(|q| (q.key, q.value)).collect(),
            query_remove: ok.query_parameters_to_remove,
            metadata,
            to_client: ok.response_headers_to_add.into_iter().filter_map(to_client).collect(),
            append: Vec::new(),
        });
    }
    match response.http_response {
        Some(HttpResponse::DeniedResponse(denied)) => Decision::Deny {
            status: denied.status.and_then(|s| u16::try_from(s.code).ok()).filter(|code| *code > 0).unwrap_or(403),
            headers: fields(denied.headers.into_iter().filter(|o| appends(o) != Some(true)).collect()),
            body: denied.body.into(),
            metadata,
        },
        _ => Decision::Deny { status: 403, headers: Vec::new(), body: Bytes::new(), metadata },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameters_are_set_and_removed() {
        let set = |q: &[(&str, &str)]| q.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let gone = ["gone".to_owned()];
        assert_eq!(with_query("/p?q=1&gone=2&r=3&r=4", set(&[("q", "n"), ("z", "a")]), &gone), "/p?q=n&r=3&r=4&z=a");
        assert_eq!(with_query("/p?gone=2", Vec::new(), &gone), "/p");
        assert_eq!(with_query("/p", set(&[("a", "b")]), &[]), "/p?a=b");
    }

    #[test]
    fn the_last_whole_message_counts() {
        assert_eq!(last_message(b"\0\0\0\0\x01a\0\0\0\0\x01b"), Some(b"b".as_slice()));
        assert_eq!(last_message(b"\0\0\0\0\x01a\0\0\0\0\x02b"), Some(b"a".as_slice()));
        assert_eq!(last_message(b"\0\xff\xff\xff\xff"), None);
    }

    #[test]
    fn headers_that_break_out_are_found() {
        let of = |name: &str, value: &str| invalid(&(name.to_owned(), value.as_bytes().to_vec()));
        assert_eq!(of("x bad", "v").as_deref(), Some("invalid header name: x bad"));
        assert_eq!(of("x-a", "a\r\nb").as_deref(), Some("invalid header value for: x-a"));
        assert_eq!(of(":path", "/"), None);
    }
}
