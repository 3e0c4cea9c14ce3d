//! Filters that ask somebody: JWT (keys), external authorization.

use super::exchange::{Exchange, Stop};
use super::local_reply::LocalReply;
use crate::jwks::{Jwks, Token};
use crate::stream::RecvBody;
use crate::upstream::{Protocol, Variant, call};
use base64::Engine as _;
use bytes::Bytes;
use envoy_api::Message;
use envoy_api::pb::envoy::service::auth::v3 as auth;
use proxy_core::cluster::UpstreamProtocol;
use proxy_core::filters::{
    AuthzService, ExtAuthz, HttpAuthz, JwksSource, JwtAuthn, JwtProvider, PerFilter, Requirement,
};
use proxy_core::route::Priority;
use proxy_core::{Headers, PickContext, ResponseFlags};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Asks a cluster; `None`: no host, no connection, no answer in time.
async fn ask(
    exchange: &mut Exchange,
    cluster: &str,
    headers: Headers,
    body: Bytes,
    timeout: Duration,
    limit: usize,
) -> Result<Option<(u16, Headers, Bytes)>, Stop> {
    let worker = exchange.http.worker.clone();
    let Some(cluster) = worker.cluster(cluster) else { return Ok(None) };
    let host = cluster.pick(&PickContext::at(Instant::now()), &mut worker.random.borrow_mut());
    let Some(host) = host else { return Ok(None) };
    let protocol = match cluster.config().protocol {
        UpstreamProtocol::Http2 => Protocol::Http2,
        UpstreamProtocol::Auto => Protocol::Auto,
        _ => Protocol::Http1,
    };
    let pool = cluster.pool(&worker, &host, &Variant { protocol, ..Variant::default() });
    let stats = cluster.stats.clone();
    let work = async move {
        let acquired = pool.acquire(Priority::Default).await.ok()?;
        stats.upstream_rq_total.inc();
        let answer = call(acquired, headers, body, limit).await.ok()?;
        stats.upstream_rq.inc(answer.0);
        Some(answer)
    };
    let answer = exchange.wait(tokio::time::timeout(timeout, work)).await?;
    Ok(answer.ok().flatten())
}

/// Why a token, or its absence, does not satisfy a requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Denied(&'static str);

const MISSING: Denied = Denied("Jwt is missing");
const UNKNOWN_ISSUER: Denied = Denied("Jwt issuer is not configured");
const AUDIENCE: Denied = Denied("Audiences in Jwt are not allowed");

/// Keys of remote providers, by provider, with the time at which they are stale.
pub(crate) type KeyCache = std::collections::HashMap<usize, (Option<Instant>, Arc<Jwks>)>;

pub(super) async fn jwt(exchange: &mut Exchange, config: &Arc<JwtAuthn>, per: Option<&PerFilter>) -> Result<(), Stop> {
    for provider in &config.providers {
        // What the filter writes may not be forged by clients.
        for name in provider.payload_header.iter().chain(provider.claim_to_headers.iter().map(|c| &c.header)) {
            exchange.request.remove(name);
        }
    }
    let over = match per {
        Some(PerFilter::Jwt(over)) => Some(over),
        _ => None,
    };
    let requirement = match config.requirement(&exchange.request, over) {
        Ok(Some(requirement)) => requirement,
        Ok(None) => {
            exchange.http.stats.other.inc("jwt_authn.allowed");
            return Ok(());
        }
        Err(name) => {
            tracing::debug!(%name, "no such JWT requirement");
            return Err(LocalReply::new(403, "Wrong requirement_name", "jwt_authn_access_denied").into());
        }
    };
    let mut keys = Vec::with_capacity(config.providers.len());
    for provider in &config.providers {
        keys.push(keys_of(exchange, provider).await?);
    }
    let mut applied = Vec::new();
    match check(&exchange.request, config, &keys, requirement, &mut applied) {
        Ok(()) => {
            exchange.http.stats.other.inc("jwt_authn.allowed");
            let mut clear = false;
            for (provider, token, place) in applied {
                clear |= apply(exchange, provider, &token, &place);
            }
            if clear {
                exchange.clear_route();
            }
            Ok(())
        }
        Err(denied) => {
            exchange.http.stats.other.inc("jwt_authn.denied");
            Err(refuse(exchange, config, denied))
        }
    }
}

fn refuse(exchange: &Exchange, config: &JwtAuthn, denied: Denied) -> Stop {
    let status = if denied == AUDIENCE { 403 } else { 401 };
    let body = if config.strip_failure_response { "" } else { denied.0 };
    let details = format!("jwt_authn_access_denied{{{}}}", denied.0.replace(' ', "_"));
    let mut reply = LocalReply::new(status, body, details);
    if status == 401 && !config.strip_failure_response {
        let request = &exchange.request;
        let mut realm = format!(
            "{}://{}{}",
            request.get_str("x-forwarded-proto").unwrap_or("http"),
            request.authority().unwrap_or_default(),
            request.path().unwrap_or_default()
        );
        // Envoy cuts the original URI there.
        realm.truncate(256);
        let error = if denied == MISSING { "" } else { ", error=\"invalid_token\"" };
        reply.headers.push(("www-authenticate".into(), format!("Bearer realm=\"{realm}\"{error}").into_bytes()));
    }
    reply.into()
}

type Applied<'a> = (&'a Arc<JwtProvider>, Token, proxy_core::filters::Token);

fn check<'a>(
    headers: &Headers,
    config: &'a JwtAuthn,
    keys: &[Option<Arc<Jwks>>],
    requirement: &Requirement,
    applied: &mut Vec<Applied<'a>>,
) -> Result<(), Denied> {
    match requirement {
        Requirement::Provider { provider, audiences } => {
            let Some(entry) = config.providers.get(*provider) else { return Err(MISSING) };
            one_provider(headers, entry, keys.get(*provider).and_then(Option::as_ref), audiences.as_deref(), applied)
        }
        Requirement::Any(list) => {
            let mut worst = MISSING;
            for part in list {
                match check(headers, config, keys, part, applied) {
                    Ok(()) => return Ok(()),
                    // A real fault says more than a missing or foreign token.
                    Err(e) if e == MISSING || (e == UNKNOWN_ISSUER && worst != MISSING) => {}
                    Err(e) => worst = e,
                }
            }
            Err(worst)
        }
        Requirement::All(list) => list.iter().try_for_each(|part| check(headers, config, keys, part, applied)),
        Requirement::AllowMissing => any_tokens(headers, config, keys, applied),
        Requirement::AllowMissingOrFailed => {
            let _ = any_tokens(headers, config, keys, applied);
            Ok(())
        }
    }
}

/// Every token that is there must be good; none need be.
fn any_tokens<'a>(
    headers: &Headers,
    config: &'a JwtAuthn,
    keys: &[Option<Arc<Jwks>>],
    applied: &mut Vec<Applied<'a>>,
) -> Result<(), Denied> {
    let mut seen: Vec<String> = Vec::new();
    for provider in &config.providers {
        for place in provider.tokens(headers) {
            if seen.contains(&place.text) {
                continue;
            }
            seen.push(place.text.clone());
            let token = Token::parse(&place.text).map_err(Denied)?;
            let owner = config.providers.iter().position(|p| p.issuer.is_empty() || *p.issuer == *token.issuer());
            let Some(owner) = owner else { return Err(UNKNOWN_ISSUER) };
            let entry = &config.providers[owner];
            verify(entry, keys.get(owner).and_then(Option::as_ref), None, &token)?;
            applied.push((entry, token, place));
        }
    }
    Ok(())
}

fn one_provider<'a>(
    headers: &Headers,
    provider: &'a Arc<JwtProvider>,
    keys: Option<&Arc<Jwks>>,
    audiences: Option<&[mesh_types::ArcStr]>,
    applied: &mut Vec<Applied<'a>>,
) -> Result<(), Denied> {
    let mut result = Err(MISSING);
    for place in provider.tokens(headers) {
        let parsed = Token::parse(&place.text).map_err(Denied);
        result = match parsed {
            Ok(token) => verify(provider, keys, audiences, &token).map(|()| applied.push((provider, token, place))),
            Err(e) => Err(e),
        };
        if result.is_ok() {
            break;
        }
    }
    result
}

fn verify(
    provider: &JwtProvider,
    keys: Option<&Arc<Jwks>>,
    audiences: Option<&[mesh_types::ArcStr]>,
    token: &Token,
) -> Result<(), Denied> {
    if !provider.issuer.is_empty() && *provider.issuer != *token.issuer() {
        return Err(UNKNOWN_ISSUER);
    }
    if let Some(subjects) = &provider.subjects
        && !subjects.matches(token.payload.get("sub").and_then(Value::as_str).unwrap_or_default().as_bytes())
    {
        return Err(Denied("Jwt sub is not allowed"));
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    token.check_time(now, provider.clock_skew.as_secs()).map_err(Denied)?;
    if provider.require_expiration && token.payload.get("exp").is_none() {
        return Err(Denied("Jwt is missing exp"));
    }
    let allowed = audiences.unwrap_or(&provider.audiences);
    if !allowed.is_empty() {
        let has = |wanted: &mesh_types::ArcStr| token.audiences().iter().any(|a| plain(a) == plain(wanted));
        if !allowed.iter().any(has) {
            return Err(AUDIENCE);
        }
    }
    let Some(keys) = keys else { return Err(Denied("Jwks remote fetch is failed")) };
    keys.verify(token).map_err(Denied)
}

/// Envoy compares audiences without scheme and trailing slash.
fn plain(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// A provider's keys: out of the configuration, or fetched and kept.
async fn keys_of(exchange: &mut Exchange, provider: &Arc<JwtProvider>) -> Result<Option<Arc<Jwks>>, Stop> {
    let worker = exchange.http.worker.clone();
    let key = Arc::as_ptr(provider) as usize;
    if let Some((stale, keys)) = worker.keys.borrow().get(&key)
        && stale.is_none_or(|at| Instant::now() < at)
    {
        return Ok(Some(keys.clone()));
    }
    let (text, stale) = match &provider.jwks {
        JwksSource::Local(source) => (crate::tls::read_source(source).ok().map(Bytes::from), None),
        JwksSource::Remote { uri, cluster, timeout, cache, .. } => {
            // A client without a token must not make us fetch keys.
            if provider.tokens(&exchange.request).is_empty() {
                return Ok(None);
            }
            let rest = uri.split_once("://").map_or(&**uri, |(_, rest)| rest);
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let mut headers = Headers::of([(":method", "GET"), (":scheme", "http"), (":authority", host)]);
            headers.push(b":path", if path.is_empty() { b"/" } else { path.as_bytes() });
            let answer = ask(exchange, cluster, headers, Bytes::new(), *timeout, 1 << 20).await?;
            let body = answer.filter(|(status, ..)| *status == 200).map(|(_, _, body)| body);
            (body, Some(Instant::now() + *cache))
        }
    };
    let keys = text.and_then(|t| Jwks::parse(&t)).map(Arc::new);
    if let Some(keys) = &keys {
        worker.keys.borrow_mut().insert(key, (stale, keys.clone()));
    }
    Ok(keys)
}

/// Writes what a good token says into headers and metadata; true when the route must be looked up again.
fn apply(exchange: &mut Exchange, provider: &JwtProvider, token: &Token, place: &proxy_core::filters::Token) -> bool {
    if !provider.forward {
        provider.remove(place, &mut exchange.request);
    }
    if let Some(name) = &provider.payload_header {
        let mut text = token.payload_text.clone();
        if provider.pad_payload_header {
            while !text.len().is_multiple_of(4) {
                text.push('=');
            }
        }
        exchange.request.set(name, text.as_bytes());
    }
    for claim in &provider.claim_to_headers {
        let value = claim.claim.iter().try_fold(&token.payload, |value, key| value.get(&**key));
        let text = match value {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Number(n)) => n.to_string(),
            Some(Value::Bool(b)) => b.to_string(),
            // Lists and objects go as base64 of their JSON.
            Some(other @ (Value::Array(_) | Value::Object(_))) => {
                base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(other.to_string())
            }
            _ => continue,
        };
        exchange.request.set(&claim.header, text.as_bytes());
    }
    const NAMESPACE: &str = "envoy.filters.http.jwt_authn";
    if let Some(key) = &provider.payload_in_metadata {
        let mut payload = token.payload.clone();
        for claim in &provider.space_delimited_claims {
            if let Some(Value::String(text)) = payload.get(&**claim).cloned() {
                payload[&**claim] = Value::Array(text.split(' ').map(|s| Value::String(s.to_owned())).collect());
            }
        }
        exchange.info.dynamic_metadata.set(NAMESPACE, key, payload);
    }
    if let Some(key) = &provider.header_in_metadata {
        exchange.info.dynamic_metadata.set(NAMESPACE, key, token.header.clone());
    }
    provider.clear_route_cache
}

/// What an authorization service decided.
enum Decision {
    Allow {
        set: Vec<(String, Vec<u8>)>,
        append: Vec<(String, Vec<u8>)>,
        remove: Vec<String>,
        to_client: Vec<(String, Vec<u8>)>,
    },
    Deny {
        status: u16,
        headers: Vec<(String, Vec<u8>)>,
        body: Bytes,
    },
    Error,
}

pub(super) async fn ext_authz(
    exchange: &mut Exchange,
    config: &Arc<ExtAuthz>,
    per: Option<&PerFilter>,
    body: &mut RecvBody,
) -> Result<(), Stop> {
    let worker = exchange.http.worker.clone();
    let asked = config.is_asked(&exchange.info.dynamic_metadata, &mut worker.random.borrow_mut());
    match asked {
        Ok(true) => {}
        Ok(false) => return Ok(()),
        Err(status) => {
            let reply = LocalReply::new(status, "", "ext_authz_disabled").flagged(ResponseFlags::UNAUTHORIZED);
            return Err(reply.into());
        }
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
    let sent_body = match &buffer {
        Some(buffer) => {
            super::filters::peek_body(exchange, body, buffer.max_bytes as usize, buffer.allow_partial).await?
        }
        None => Bytes::new(),
    };
    let decision = match &config.service {
        AuthzService::Http(http) => by_http(exchange, config, http, sent_body).await?,
        AuthzService::Grpc { cluster, timeout, authority, metadata } => {
            let authority = if authority.is_empty() { cluster } else { authority };
            let context = over.as_ref().map(|o| o.context.as_slice()).unwrap_or_default();
            let check = check_request(exchange, config, context, &sent_body);
            let mut headers = Headers::of([
                (":method", "POST"),
                (":scheme", "http"),
                (":path", "/envoy.service.auth.v3.Authorization/Check"),
                (":authority", authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            ]);
            for (name, value) in metadata {
                headers.push(name.as_bytes(), value.as_bytes());
            }
            let answer = ask(exchange, cluster, headers, grpc_frame(&check), *timeout, 1 << 20).await?;
            answer.map_or(Decision::Error, |(_, headers, body)| grpc_decision(&headers, &body))
        }
    };
    let cluster = exchange.info.upstream.cluster.clone().and_then(|name| worker.cluster(&name));
    let count = |what: &str| {
        if let Some(cluster) = &cluster {
            cluster.stats.other.inc(&format!("ext_authz.{what}"));
        }
    };
    match decision {
        Decision::Allow { set, append, remove, to_client } => {
            count("ok");
            for name in remove {
                exchange.request.remove(&name);
            }
            let changed = !set.is_empty() || !append.is_empty();
            for (name, value) in set {
                exchange.request.set(&name, &value);
            }
            for (name, value) in append {
                exchange.request.append(&name, &value, ",");
            }
            exchange.add_to_response.extend(to_client);
            if config.clear_route_cache && changed {
                exchange.clear_route();
            }
            Ok(())
        }
        Decision::Deny { status, headers, body } => {
            count("denied");
            let mut reply = LocalReply::new(status, "", "ext_authz_denied").flagged(ResponseFlags::UNAUTHORIZED);
            reply.raw_body = Some(body);
            reply.headers = headers;
            Err(reply.into())
        }
        Decision::Error => {
            count("error");
            if config.failure_mode_allow {
                count("failure_mode_allowed");
                if config.failure_mode_allow_header {
                    exchange.request.set("x-envoy-auth-failure-mode-allowed", b"true");
                }
                return Ok(());
            }
            let reply =
                LocalReply::new(config.status_on_error, "", "ext_authz_error").flagged(ResponseFlags::UNAUTHORIZED);
            Err(reply.into())
        }
    }
}

async fn by_http(exchange: &mut Exchange, config: &ExtAuthz, http: &HttpAuthz, body: Bytes) -> Result<Decision, Stop> {
    let request = &exchange.request;
    let path = http.path(request.path().unwrap_or("/"));
    let mut headers = Headers::with_capacity(16, 512);
    headers.push(b":method", request.get(":method").unwrap_or(b"GET"));
    headers.push(b":scheme", b"http");
    headers.push(b":path", path.as_bytes());
    headers.push(b":authority", request.get(":authority").unwrap_or_default());
    for (name, value) in config.sent(request) {
        if !name.starts_with(':') && name != "host" && name != "content-length" && name != "transfer-encoding" {
            headers.push(name.as_bytes(), value);
        }
    }
    for (name, value) in &http.headers_to_add {
        headers.set(name, value.as_bytes());
    }
    headers.set("content-length", body.len().to_string().as_bytes());
    headers.set("x-envoy-internal", b"true");
    headers.set("x-envoy-expected-rq-timeout-ms", http.timeout.as_millis().to_string().as_bytes());
    let answer = ask(exchange, &http.cluster, headers, body, http.timeout, 1 << 20).await?;
    let Some((status, headers, body)) = answer else { return Ok(Decision::Error) };
    if (500..600).contains(&status) {
        return Ok(Decision::Error);
    }
    let pick = |wanted: &dyn Fn(&str) -> bool| -> Vec<(String, Vec<u8>)> {
        headers
            .iter_regular()
            .filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, value)))
            .filter(|(name, _)| wanted(name))
            .map(|(name, value)| (name.to_owned(), value.to_vec()))
            .collect()
    };
    if status == 200 {
        return Ok(Decision::Allow {
            set: pick(&|name| http.sets_upstream(name)),
            append: pick(&|name| http.appends_upstream(name)),
            remove: Vec::new(),
            to_client: pick(&|name| http.tells_client_on_success(name)),
        });
    }
    let headers = pick(&|name| http.tells_client(name) && name != "content-length");
    Ok(Decision::Deny { status, headers, body })
}

fn grpc_frame(message: &impl Message) -> Bytes {
    let mut out = vec![0u8; 5];
    // Encoding into a Vec cannot run out of room.
    let _ = message.encode(&mut out);
    let len = (out.len() - 5) as u32;
    out[1..5].copy_from_slice(&len.to_be_bytes());
    out.into()
}

fn check_request(
    exchange: &Exchange,
    config: &ExtAuthz,
    context: &[(mesh_types::ArcStr, mesh_types::ArcStr)],
    body: &Bytes,
) -> auth::CheckRequest {
    use auth::attribute_context::{HttpRequest, Peer, Request};
    use envoy_api::core::socket_address::PortSpecifier;
    use envoy_api::core::{Address, SocketAddress, address};
    let info = &exchange.http.info;
    let peer = |address: &proxy_core::Address, principal: Option<&mesh_types::ArcStr>| Peer {
        address: address.socket().map(|s| Address {
            address: Some(address::Address::SocketAddress(SocketAddress {
                address: s.ip().to_string(),
                port_specifier: Some(PortSpecifier::PortValue(s.port().into())),
                ..Default::default()
            })),
        }),
        principal: principal.map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    };
    let request = &exchange.request;
    let headers = config
        .sent(request)
        .map(|(name, value)| (name.to_owned(), String::from_utf8_lossy(value).into_owned()))
        .collect();
    let tls = info.tls.as_deref();
    let text = |v: Option<&str>| v.unwrap_or_default().to_owned();
    let http = HttpRequest {
        id: text(request.get_str("x-request-id")),
        method: text(request.method()),
        headers,
        path: text(request.path()),
        host: text(request.authority()),
        scheme: text(request.scheme()),
        size: request.get_str("content-length").and_then(|s| s.parse().ok()).unwrap_or(-1),
        protocol: exchange.info.protocol.map(|p| p.as_str().to_owned()).unwrap_or_default(),
        body: String::from_utf8_lossy(body).into_owned(),
        ..Default::default()
    };
    auth::CheckRequest {
        attributes: Some(auth::AttributeContext {
            source: Some(peer(
                &exchange.info.remote,
                tls.and_then(|t| t.peer.as_ref()).and_then(|p| p.uri_sans.first()),
            )),
            destination: Some(peer(&info.local, tls.and_then(|t| t.local.as_ref()).and_then(|p| p.uri_sans.first()))),
            request: Some(Request { time: None, http: Some(http) }),
            context_extensions: context.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            ..Default::default()
        }),
    }
}

fn grpc_decision(headers: &Headers, body: &[u8]) -> Decision {
    use auth::check_response::HttpResponse;
    if headers.get_str("grpc-status").is_some_and(|s| s != "0") {
        return Decision::Error;
    }
    let Some(message) = body.get(5..) else { return Decision::Error };
    let Ok(response) = auth::CheckResponse::decode(message) else { return Decision::Error };
    let options = |list: Vec<envoy_api::core::HeaderValueOption>| -> Vec<(String, Vec<u8>)> {
        list.into_iter()
            .filter_map(|o| o.header)
            .map(|h| {
                let value = if h.value.is_empty() { h.raw_value } else { h.value.into_bytes() };
                (h.key.to_ascii_lowercase(), value)
            })
            .collect()
    };
    if response.status.as_ref().is_none_or(|s| s.code == 0) {
        return match response.http_response {
            Some(HttpResponse::OkResponse(ok)) => Decision::Allow {
                set: options(ok.headers),
                append: Vec::new(),
                remove: ok.headers_to_remove,
                to_client: options(ok.response_headers_to_add),
            },
            _ => Decision::Allow { set: Vec::new(), append: Vec::new(), remove: Vec::new(), to_client: Vec::new() },
        };
    }
    match response.http_response {
        Some(HttpResponse::DeniedResponse(denied)) => Decision::Deny {
            status: denied.status.map_or(403, |s| u16::try_from(s.code).unwrap_or(403)),
            headers: options(denied.headers),
            body: denied.body.into(),
        },
        _ => Decision::Deny { status: 403, headers: Vec::new(), body: Bytes::new() },
    }
}
