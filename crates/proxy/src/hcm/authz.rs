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
    let protocol = Protocol::of(&cluster.config().protocol, None);
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

/// Namespace of the filter's dynamic metadata.
const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

const MISSING: Denied = Denied("Jwt is missing");
const UNKNOWN_ISSUER: Denied = Denied("Jwt issuer is not configured");
const AUDIENCE: Denied = Denied("Audiences in Jwt are not allowed");

impl Denied {
    /// The place in jwt_verify_lib's `enum class Status`; 0 where only its message is known here.
    fn code(self) -> u32 {
        const MESSAGES: [&str; 26] = [
            "OK",
            "Jwt is missing",
            "Jwt not yet valid",
            "Jwt is expired",
            "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            "Jwt header is an invalid Base64url encoded",
            "Jwt header is an invalid JSON",
            "Jwt header [alg] field is required and must be a string",
            "Jwt header [alg] is not supported",
            "Jwt header [kid] field is not a string",
            "Jwt payload is an invalid Base64url encoded",
            "Jwt payload is an invalid JSON",
            "Jwt payload [iss] field is not a string",
            "Jwt payload [sub] field is not a string",
            "Jwt payload [iat] field is not an integer",
            "Jwt payload [iat] field is not a positive integer",
            "Jwt payload [nbf] field is not an integer",
            "Jwt payload [nbf] field is not a positive integer",
            "Jwt payload [exp] field is not an integer",
            "Jwt payload [exp] field is not a positive integer",
            "Jwt payload [jti] field is not a string",
            "Jwt payload [aud] field is not a string or string list",
            "Jwt signature is an invalid Base64url encoded",
            "Jwt ED25519 signature is wrong length",
            "Jwt issuer is not configured",
            "Audiences in Jwt are not allowed",
        ];
        let known = MESSAGES.iter().position(|m| *m == self.0);
        match self.0 {
            "Jwt verification fails" => 26,
            _ => known.map_or(0, |at| at as u32),
        }
    }
}

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
    let mut keys = vec![None; config.providers.len()];
    for index in wanted_providers(config, requirement) {
        keys[index] = keys_of(exchange, &config.providers[index]).await?;
    }
    let mut clear = false;
    let checked = check(exchange, config, &keys, requirement, &mut clear);
    if clear {
        exchange.clear_route();
    }
    match checked {
        Ok(()) => {
            exchange.http.stats.other.inc("jwt_authn.allowed");
            Ok(())
        }
        Err(denied) => {
            exchange.http.stats.other.inc("jwt_authn.denied");
            Err(refuse(exchange, config, denied))
        }
    }
}

/// The providers whose tokens a requirement may look at.
fn wanted_providers(config: &JwtAuthn, requirement: &Requirement) -> Vec<usize> {
    match requirement {
        Requirement::Provider { provider, .. } => vec![*provider],
        Requirement::Any(list) | Requirement::All(list) => {
            let mut all: Vec<usize> = list.iter().flat_map(|part| wanted_providers(config, part)).collect();
            all.sort_unstable();
            all.dedup();
            all
        }
        Requirement::AllowMissing | Requirement::AllowMissingOrFailed => (0..config.providers.len()).collect(),
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
        // Envoy cuts the original URI there. HTTP/2 paths may hold characters of several bytes.
        realm.truncate(cut_at(&realm, MAX_REALM));
        let error = if denied == MISSING { "" } else { ", error=\"invalid_token\"" };
        reply.headers.push(("www-authenticate".into(), format!("Bearer realm=\"{realm}\"{error}").into_bytes()));
    }
    reply.into()
}

/// Bytes of a realm.
const MAX_REALM: usize = 256;

/// Where to cut a text of at most so many bytes: at a character's end.
fn cut_at(text: &str, most: usize) -> usize {
    (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Good tokens take effect at once: a later requirement no longer sees a token that was taken away.
fn check(
    exchange: &mut Exchange,
    config: &Arc<JwtAuthn>,
    keys: &[Option<Arc<Jwks>>],
    requirement: &Requirement,
    clear: &mut bool,
) -> Result<(), Denied> {
    match requirement {
        Requirement::Provider { provider, audiences } => {
            let Some(entry) = config.providers.get(*provider) else { return Err(MISSING) };
            let keys = keys.get(*provider).and_then(Option::as_ref);
            one_provider(exchange, entry, keys, audiences.as_deref(), clear)
        }
        Requirement::Any(list) => {
            let mut worst = MISSING;
            for part in list {
                match check(exchange, config, keys, part, clear) {
                    Ok(()) => return Ok(()),
                    // A real fault says more than a missing or foreign token.
                    Err(e) if e == MISSING || (e == UNKNOWN_ISSUER && worst != MISSING) => {}
                    Err(e) => worst = e,
                }
            }
            Err(worst)
        }
        Requirement::All(list) => list.iter().try_for_each(|part| check(exchange, config, keys, part, clear)),
        Requirement::AllowMissing => any_tokens(exchange, config, keys, clear),
        Requirement::AllowMissingOrFailed => {
            let _ = any_tokens(exchange, config, keys, clear);
            Ok(())
        }
    }
}

/// Every token that is there must be good; none need be.
fn any_tokens(
    exchange: &mut Exchange,
    config: &Arc<JwtAuthn>,
    keys: &[Option<Arc<Jwks>>],
    clear: &mut bool,
) -> Result<(), Denied> {
    let mut seen: Vec<String> = Vec::new();
    for provider in &config.providers {
        for place in provider.tokens(&exchange.request) {
            if seen.contains(&place.text) {
                continue;
            }
            seen.push(place.text.clone());
            let checked = Token::parse(&place.text).map_err(Denied).and_then(|token| {
                let owner = config.providers.iter().position(|p| p.issuer.is_empty() || *p.issuer == *token.issuer());
                let owner = owner.ok_or(UNKNOWN_ISSUER)?;
                let entry = &config.providers[owner];
                verify(entry, keys.get(owner).and_then(Option::as_ref), None, &token)?;
                *clear |= apply(exchange, entry, &token, &place);
                Ok(())
            });
            if let Err(denied) = checked {
                failed(exchange, provider, denied);
                return Err(denied);
            }
        }
    }
    if seen.is_empty() {
        for provider in &config.providers {
            failed(exchange, provider, MISSING);
        }
    }
    Ok(())
}

fn one_provider(
    exchange: &mut Exchange,
    provider: &Arc<JwtProvider>,
    keys: Option<&Arc<Jwks>>,
    audiences: Option<&[mesh_types::ArcStr]>,
    clear: &mut bool,
) -> Result<(), Denied> {
    let mut result = Err(MISSING);
    for place in provider.tokens(&exchange.request) {
        let parsed = Token::parse(&place.text).map_err(Denied);
        result = parsed.and_then(|token| {
            verify(provider, keys, audiences, &token)?;
            *clear |= apply(exchange, provider, &token, &place);
            Ok(())
        });
        if result.is_ok() {
            break;
        }
    }
    if let Err(denied) = result {
        failed(exchange, provider, denied);
    }
    result
}

/// `failed_status_in_metadata`: the number of jwt_verify_lib's status and its message.
fn failed(exchange: &mut Exchange, provider: &JwtProvider, denied: Denied) {
    let Some(key) = &provider.failed_status_in_metadata else { return };
    let value = serde_json::json!({ "code": denied.code(), "message": denied.0 });
    exchange.info.dynamic_metadata.set(NAMESPACE, key, value);
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

/// What Envoy's internal client adds to its requests.
fn as_internal(exchange: &Exchange, headers: &mut Headers, timeout: Duration) {
    headers.set("x-envoy-internal", b"true");
    if let Some(own) = exchange.http.worker.shared.own_address {
        headers.add("x-forwarded-for", own.to_string().as_bytes());
    }
    headers.set("x-envoy-expected-rq-timeout-ms", timeout.as_millis().to_string().as_bytes());
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
            headers.push(b"user-agent", b"Go-browser");
            as_internal(exchange, &mut headers, *timeout);
            let answer = ask(exchange, cluster, headers, Bytes::new(), *timeout, 1 << 20).await?;
            let body = answer.filter(|(status, ..)| *status == 200).map(|(_, _, body)| body);
            let good = body.as_ref().is_some_and(|text| Jwks::parse(text).is_some());
            let what = if good { "jwt_authn.jwks_fetch_success" } else { "jwt_authn.jwks_fetch_failed" };
            exchange.http.stats.other.inc(what);
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

/// Namespace of the filter's dynamic metadata.
const AUTHZ: &str = "envoy.filters.http.ext_authz";

/// What an authorization service decided.
enum Decision {
    Allow {
        set: Vec<(String, Vec<u8>)>,
        /// Added beside what is there.
        append: Vec<(String, Vec<u8>)>,
        /// Joined to what is there; left out if nothing is.
        join: Vec<(String, Vec<u8>)>,
        metadata: serde_json::Map<String, Value>,
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
    let had_body = !body.is_empty();
    let (sent_body, partial) = match &buffer {
        Some(buffer) if had_body => {
            let (sent, whole) =
                super::filters::peek_body(exchange, body, buffer.max_bytes as usize, buffer.allow_partial).await?;
            (sent, Some(!whole))
        }
        _ => (Bytes::new(), None),
    };
    let asked_at = Instant::now();
    let decision = match &config.service {
        AuthzService::Http(http) => by_http(exchange, config, http, sent_body, partial).await?,
        AuthzService::Grpc { cluster, timeout, authority, metadata } => {
            let authority = if authority.is_empty() { cluster } else { authority };
            let context = over.as_ref().map(|o| o.context.as_slice()).unwrap_or_default();
            let check =
                check_request(exchange, config, context, &sent_body, buffer.is_some_and(|b| b.as_bytes), partial);
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
            let prefix = if config.stat_prefix.is_empty() { "" } else { "." };
            cluster.stats.other.inc(&format!("ext_authz{prefix}{}.{what}", config.stat_prefix));
        }
    };
    match decision {
        Decision::Allow { set, append, join, mut metadata, remove, to_client } => {
            count("ok");
            if !metadata.is_empty() {
                metadata.insert("ext_authz_duration".into(), (asked_at.elapsed().as_millis() as u64).into());
                for (key, value) in metadata {
                    exchange.info.dynamic_metadata.set(AUTHZ, &key, value);
                }
            }
            for name in remove {
                exchange.request.remove(&name);
            }
            let changed = !set.is_empty() || !append.is_empty() || !join.is_empty();
            for (name, value) in set {
                exchange.request.set(&name, &value);
            }
            for (name, value) in append {
                exchange.request.push(name.as_bytes(), &value);
            }
            for (name, value) in join {
                if exchange.request.contains(&name) {
                    exchange.request.append(&name, &value, ",");
                }
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

async fn by_http(
    exchange: &mut Exchange,
    config: &ExtAuthz,
    http: &HttpAuthz,
    body: Bytes,
    partial: Option<bool>,
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
            headers.push(name.as_bytes(), value);
        }
    }
    for (name, value) in &http.headers_to_add {
        headers.set(name, value.as_bytes());
    }
    headers.set("content-length", body.len().to_string().as_bytes());
    if let Some(partial) = partial {
        headers.set("x-envoy-auth-partial-body", if partial { b"true" } else { b"false" });
    }
    headers.set("x-envoy-internal", b"true");
    headers.set("x-envoy-expected-rq-timeout-ms", http.timeout.as_millis().to_string().as_bytes());
    let asked_at = Instant::now();
    let answer = ask(exchange, &http.cluster, headers, body, http.timeout, 1 << 20).await?;
    let Some((status, mut headers, body)) = answer else { return Ok(Decision::Error) };
    // The router of Envoy's internal client adds it, so clients see it.
    headers.set("x-envoy-upstream-service-time", asked_at.elapsed().as_millis().to_string().as_bytes());
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
            join: Vec::new(),
            metadata: pick(&|name| http.goes_to_metadata(name))
                .into_iter()
                .map(|(name, value)| (name, String::from_utf8_lossy(&value).into_owned().into()))
                .collect(),
            remove: Vec::new(),
            to_client: pick(&|name| http.tells_client_on_success(name)),
        });
    }
    let headers = pick(&|name| http.tells_client(name) && name != "content-length");
    Ok(Decision::Deny { status, headers, body })
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
    auth::attribute_context::Peer {
        address: socket.map(|s| Address { address: Some(address::Address::SocketAddress(s)) }),
        principal: certificate.and_then(|c| c.uri_sans.first()).map(ToString::to_string).unwrap_or_default(),
        ..Default::default()
    }
}

/// What the service is told of a connection without requests.
pub(crate) fn connection_attributes(info: &proxy_core::ConnectionInfo) -> auth::CheckRequest {
    let tls = info.tls.as_deref();
    auth::CheckRequest {
        attributes: Some(auth::AttributeContext {
            source: Some(peer(&info.remote, tls.and_then(|t| t.peer.as_ref()))),
            destination: Some(peer(&info.local, tls.and_then(|t| t.local.as_ref()))),
            ..Default::default()
        }),
    }
}

/// The service's decision about a connection; `None`: that was no answer.
pub(crate) fn is_allowed(headers: &Headers, body: &[u8]) -> Option<bool> {
    match grpc_decision(headers, body) {
        Decision::Allow { .. } => Some(true),
        Decision::Deny { .. } => Some(false),
        Decision::Error => None,
    }
}

fn check_request(
    exchange: &Exchange,
    config: &ExtAuthz,
    context: &[(mesh_types::ArcStr, mesh_types::ArcStr)],
    body: &Bytes,
    as_bytes: bool,
    partial: Option<bool>,
) -> auth::CheckRequest {
    use auth::attribute_context::{HttpRequest, Request};
    let info = &exchange.http.info;
    let request = &exchange.request;
    let mut headers: std::collections::HashMap<String, String> = config
        .sent(request)
        .map(|(name, value)| (name.to_owned(), String::from_utf8_lossy(value).into_owned()))
        .collect();
    if let Some(partial) = partial {
        headers.insert("x-envoy-auth-partial-body".to_owned(), partial.to_string());
    }
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
        body: if as_bytes { String::new() } else { String::from_utf8_lossy(body).into_owned() },
        raw_body: if as_bytes { body.to_vec() } else { Vec::new() },
        ..Default::default()
    };
    auth::CheckRequest {
        attributes: Some(auth::AttributeContext {
            source: Some(peer(&exchange.info.remote, tls.and_then(|t| t.peer.as_ref()))),
            destination: Some(peer(&info.local, tls.and_then(|t| t.local.as_ref()))),
            request: Some(Request { time: None, http: Some(http) }),
            context_extensions: context.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            ..Default::default()
        }),
    }
}

#[expect(deprecated, reason = "services still set `append`")]
fn grpc_decision(headers: &Headers, body: &[u8]) -> Decision {
    use auth::check_response::HttpResponse;
    if headers.get_str("grpc-status").is_some_and(|s| s != "0") {
        return Decision::Error;
    }
    let Some(message) = body.get(5..) else { return Decision::Error };
    let Ok(response) = auth::CheckResponse::decode(message) else { return Decision::Error };
    let text = |h: envoy_api::core::HeaderValue| -> (String, Vec<u8>) {
        let value = if h.value.is_empty() { h.raw_value } else { h.value.into_bytes() };
        (h.key.to_ascii_lowercase(), value)
    };
    let options = |list: Vec<envoy_api::core::HeaderValueOption>| -> Vec<(String, Vec<u8>)> {
        list.into_iter().filter_map(|o| o.header).map(text).collect()
    };
    if response.status.as_ref().is_none_or(|s| s.code == 0) {
        let metadata = response.dynamic_metadata.as_ref().map(proxy_core::json_object).unwrap_or_default();
        let Some(HttpResponse::OkResponse(ok)) = response.http_response else {
            return Decision::Allow {
                set: Vec::new(),
                append: Vec::new(),
                join: Vec::new(),
                metadata,
                remove: Vec::new(),
                to_client: Vec::new(),
            };
        };
        let (join, set): (Vec<_>, Vec<_>) =
            ok.headers.into_iter().partition(|o| o.append.as_ref().is_some_and(|append| append.value));
        return Decision::Allow {
            set: options(set),
            append: Vec::new(),
            join: options(join),
            metadata,
            remove: ok.headers_to_remove,
            to_client: options(ok.response_headers_to_add),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_realm_is_cut_at_a_character() {
        let realm = format!("http://t/{}", "ä".repeat(200));
        assert_eq!(cut_at(&realm, MAX_REALM), 255);
        assert_eq!(cut_at("http://t/", MAX_REALM), 9);
    }
}
