//! JSON web tokens: keys are asked for, tokens are checked, and what they say is handed on.

use super::exchange::{Exchange, Stop};
use super::keys;
use super::local_reply::LocalReply;
use crate::jwks::{Jwks, Token};
use base64::Engine as _;
use proxy_core::Headers;
use proxy_core::filters::{JwtAuthn, JwtProvider, Needs, PerFilter, Requirement, Token as Place};
use serde_json::Value;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Why a token, or its absence, does not satisfy a requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Denied(&'static str);

/// Namespace of the filter's dynamic metadata.
const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

const MISSING: Denied = Denied("Jwt is missing");
const UNKNOWN_ISSUER: Denied = Denied("Jwt issuer is not configured");
const UNVERIFIED: Denied = Denied("Jwt verification fails");
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
            "Jwt payload [iat] field is not a positive 64 bit integer",
            "Jwt payload [nbf] field is not an integer",
            "Jwt payload [nbf] field is not a positive 64 bit integer",
            "Jwt payload [exp] field is not an integer",
            "Jwt payload [exp] field is not a positive 64 bit integer",
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
            "Jwks doesn't have key to match kid or alg from Jwt" => 32,
            _ => known.map_or(0, |at| at as u32),
        }
    }
}

pub(super) async fn jwt(exchange: &mut Exchange, config: &Arc<JwtAuthn>, per: Option<&PerFilter>) -> Result<(), Stop> {
    // What the filter writes may not be forged by clients.
    config.providers.iter().for_each(|provider| sanitize(exchange, provider));
    let over = match per {
        Some(PerFilter::Jwt(over)) => Some(over),
        _ => None,
    };
    let stats = exchange.http.stats.clone();
    let requirement = match config.requirement(&exchange.request, &exchange.info.filter_state, over) {
        Ok(Needs::Token(requirement)) => requirement,
        Ok(needs) => {
            if matches!(needs, Needs::Preflight) {
                stats.other.inc(&config.counters.cors_preflight_bypassed);
            }
            stats.other.inc(&config.counters.allowed);
            return Ok(());
        }
        Err(text) => {
            stats.other.inc(&config.counters.denied);
            let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
            let body = if config.strip_failure_response {
                String::new()
            } else {
                format!("Failed JWT authentication: {text}")
            };
            return Err(LocalReply::new(403, body, details).into());
        }
    };
    let mut keys = vec![None; config.providers.len()];
    let audiences = match requirement {
        Requirement::Provider { audiences, .. } => Some(audiences.as_deref()),
        _ => None,
    };
    for index in wanted_providers(config, requirement) {
        let provider = &config.providers[index];
        keys[index] = exchange.http.worker.keys.keys(provider);
        if keys[index].is_none() {
            // A client without a token that may turn out to be good must not make us fetch keys.
            let tokens = config.tokens(&[index], &exchange.request);
            if tokens.iter().any(|(place, _)| may_be_good(provider, audiences, &place.text)) {
                let http = exchange.http.clone();
                keys[index] = exchange.wait(keys::fetch(&http.worker, &http.stats, config, provider)).await?;
            }
        }
    }
    let mut clear = false;
    // Of the request as it came: good tokens are taken out of it.
    let realm = realm(&exchange.request);
    let checked = check(exchange, config, &keys, requirement, &mut clear);
    if clear {
        exchange.clear_route();
    }
    match checked {
        Ok(()) => {
            exchange.http.stats.other.inc(&config.counters.allowed);
            Ok(())
        }
        Err(denied) => {
            exchange.http.stats.other.inc(&config.counters.denied);
            Err(refuse(realm, config, denied))
        }
    }
}

/// Takes away the headers that are written for a provider's tokens.
fn sanitize(exchange: &mut Exchange, provider: &JwtProvider) {
    for name in provider.payload_header.iter().chain(provider.claim_to_headers.iter().map(|c| &c.header)) {
        exchange.request.remove(name);
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
        // A token's issuer may name any provider.
        Requirement::AllowMissing(_) | Requirement::AllowMissingOrFailed(_) | Requirement::ExtractOnly { .. } => {
            (0..config.providers.len()).collect()
        }
    }
}

/// The URL of a request, for `www-authenticate`.
fn realm(request: &Headers) -> String {
    let path = request.get_str("x-envoy-original-path").or(request.path()).unwrap_or_default();
    // Envoy cuts the path there. HTTP/2 paths may hold characters of several bytes.
    format!(
        "{}://{}{}",
        request.scheme().unwrap_or("http"),
        request.authority().unwrap_or_default(),
        &path[..cut_at(path, MAX_REALM)]
    )
}

fn refuse(realm: String, config: &JwtAuthn, denied: Denied) -> Stop {
    let status = if denied == AUDIENCE { 403 } else { 401 };
    let body = if config.strip_failure_response { "" } else { denied.0 };
    let details = format!("jwt_authn_access_denied{{{}}}", denied.0.replace(' ', "_"));
    let mut reply = LocalReply::new(status, body, details);
    if !config.strip_failure_response {
        let error = if denied == MISSING { "" } else { ", error=\"invalid_token\"" };
        reply.headers.push(("www-authenticate".into(), format!("Bearer realm=\"{realm}\"{error}").into_bytes()));
    }
    reply.into()
}

/// Bytes of a path in a realm.
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
            let tokens = config.tokens(&[*provider], &exchange.request);
            all_tokens(exchange, config, keys, (*provider, audiences.as_deref()), tokens, clear)
        }
        Requirement::Any(list) => {
            let mut worst = MISSING;
            for part in list {
                // What allows tokens to be missing does so only if no provider found any.
                if worst != MISSING && matches!(part, Requirement::AllowMissing(_)) {
                    return Err(worst);
                }
                // What allows tokens to fail looks at none that the others have seen.
                if list.len() > 1 && matches!(part, Requirement::AllowMissingOrFailed(_)) {
                    return Ok(());
                }
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
        Requirement::AllowMissing(used) => any_tokens(exchange, config, keys, used, clear),
        Requirement::AllowMissingOrFailed(used) => {
            let _ = any_tokens(exchange, config, keys, used, clear);
            Ok(())
        }
        Requirement::ExtractOnly { used, status_header } => {
            if any_tokens(exchange, config, keys, used, clear).is_err() {
                exchange.request.set(status_header, b"false");
            }
            Ok(())
        }
    }
}

/// Tokens of these providers, the last one first; what the first one says counts. None need be there (Envoy
/// `AuthenticatorImpl` with `allow_missing`).
fn any_tokens(
    exchange: &mut Exchange,
    config: &Arc<JwtAuthn>,
    keys: &[Option<Arc<Jwks>>],
    used: &[usize],
    clear: &mut bool,
) -> Result<(), Denied> {
    let mut result = Ok(());
    // What an earlier requirement wrote does not outlive this one, as in Envoy.
    used.iter().filter_map(|at| config.providers.get(*at)).for_each(|provider| sanitize(exchange, provider));
    let tokens = config.tokens(used, &exchange.request);
    if let (true, Some(only)) = (tokens.is_empty(), config.only_provider()) {
        failed(exchange, &config.providers[only], MISSING);
    }
    for (place, owners) in tokens.into_iter().rev() {
        let issues = |issuer: &str| {
            owners.iter().any(|at| config.providers[*at].issuer.is_empty() || *config.providers[*at].issuer == *issuer)
        };
        let mut owner = None;
        result = Token::parse(&place.text).map_err(Denied).and_then(|token| {
            let found = config.of_issuer(token.issuer()).filter(|_| issues(token.issuer())).ok_or(UNKNOWN_ISSUER)?;
            owner = Some(found);
            let entry = &config.providers[found];
            verify(entry, keys.get(found).and_then(Option::as_ref), None, &token)?;
            *clear |= apply(exchange, entry, &token, &place);
            Ok(())
        });
        if let (Err(denied), Some(owner)) = (result, owner.or(config.only_provider())) {
            failed(exchange, &config.providers[owner], denied);
        }
    }
    result
}

/// Every token that is there must be good, and one must be there: the upstream may take any of them for the good one.
fn all_tokens(
    exchange: &mut Exchange,
    config: &Arc<JwtAuthn>,
    keys: &[Option<Arc<Jwks>>],
    (at, audiences): (usize, Option<&[mesh_types::ArcStr]>),
    tokens: Vec<(Place, Vec<usize>)>,
    clear: &mut bool,
) -> Result<(), Denied> {
    let Some(provider) = config.providers.get(at) else { return Err(MISSING) };
    sanitize(exchange, provider);
    if tokens.is_empty() {
        if let Some(only) = config.only_provider() {
            failed(exchange, &config.providers[only], MISSING);
        }
        return Err(MISSING);
    }
    for (place, _) in tokens.into_iter().rev() {
        let http = exchange.http.clone();
        let kept = http.worker.keys.token(provider, &place.text, now());
        let counters = &config.counters;
        http.stats.other.inc(if kept.is_some() { &counters.jwt_cache_hit } else { &counters.jwt_cache_miss });
        let keys = keys.get(at).and_then(Option::as_ref);
        let checked = match kept {
            // Its signature was good.
            Some(token) => check_claims(provider, audiences, &token).map(|()| token),
            None => Token::parse(&place.text).map_err(Denied).and_then(|token| {
                verify(provider, keys, audiences, &token)?;
                let token = Rc::new(token);
                http.worker.keys.keep(provider, &place.text, &token);
                Ok(token)
            }),
        };
        let checked = checked.map(|token| *clear |= apply(exchange, provider, &token, &place));
        if let Err(denied) = checked {
            failed(exchange, provider, denied);
            return Err(denied);
        }
    }
    Ok(())
}

/// `failed_status_in_metadata`: the number of jwt_verify_lib's status and its message.
fn failed(exchange: &mut Exchange, provider: &JwtProvider, denied: Denied) {
    let Some(key) = &provider.failed_status_in_metadata else { return };
    let value = serde_json::json!({ "code": denied.code(), "message": denied.0 });
    exchange.info.dynamic_metadata.set(NAMESPACE, key, value);
}

/// Whether only a token's signature is left to be checked. `audiences`: those of the requirement; without any, any will do.
fn may_be_good(provider: &JwtProvider, audiences: Option<Option<&[mesh_types::ArcStr]>>, text: &str) -> bool {
    Token::parse(text).is_ok_and(|token| check_claims(provider, audiences.unwrap_or(Some(&[])), &token).is_ok())
}

fn verify(
    provider: &JwtProvider,
    keys: Option<&Arc<Jwks>>,
    audiences: Option<&[mesh_types::ArcStr]>,
    token: &Token,
) -> Result<(), Denied> {
    check_claims(provider, audiences, token)?;
    let Some(keys) = keys else { return Err(Denied("Jwks remote fetch is failed")) };
    keys.verify(token).map_err(Denied)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// All but the signature.
fn check_claims(provider: &JwtProvider, audiences: Option<&[mesh_types::ArcStr]>, token: &Token) -> Result<(), Denied> {
    if !provider.issuer.is_empty() && *provider.issuer != *token.issuer() {
        return Err(UNKNOWN_ISSUER);
    }
    token.check_time(now(), provider.clock_skew.as_secs()).map_err(Denied)?;
    let allowed = audiences.unwrap_or(&provider.audiences);
    if !allowed.is_empty() {
        let has = |wanted: &mesh_types::ArcStr| token.audiences().iter().any(|a| plain(a) == plain(wanted));
        if !allowed.iter().any(has) {
            return Err(AUDIENCE);
        }
    }
    let subject = token.payload.get("sub").and_then(Value::as_str).unwrap_or_default();
    if provider.subjects.as_ref().is_some_and(|subjects| !subjects.matches(subject.as_bytes())) {
        return Err(UNVERIFIED);
    }
    let left = token.expiration().map(|exp| Duration::from_secs(exp.saturating_sub(now())));
    let lives_long = provider.max_lifetime.is_some_and(|most| left.is_none_or(|left| left > most));
    if lives_long || (provider.require_expiration && left.is_none()) {
        return Err(UNVERIFIED);
    }
    Ok(())
}

/// Envoy compares audiences without scheme and trailing slash.
fn plain(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// Writes what a good token says (beside what another one said) into headers and metadata; true when the route must be looked up again.
fn apply(exchange: &mut Exchange, provider: &JwtProvider, token: &Token, place: &Place) -> bool {
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
        exchange.request.push(name.as_bytes(), text.as_bytes());
    }
    for claim in &provider.claim_to_headers {
        let value = claim.claim.iter().try_fold(&token.payload, |value, key| value.get(&**key));
        let text = match value {
            Some(Value::String(s)) if s.is_empty() => continue,
            Some(Value::String(s)) => s.clone(),
            // Floating, as in a protobuf struct.
            Some(Value::Number(n)) => match n.as_f64().unwrap_or_default() {
                n if n >= 0.0 && n.fract() == 0.0 && n < u64::MAX as f64 => (n as u64).to_string(),
                // As printf's `%f`.
                n => format!("{n:.6}"),
            },
            Some(Value::Bool(b)) => b.to_string(),
            // Lists and objects go as base64 of their JSON, whose members are sorted.
            Some(other @ (Value::Array(_) | Value::Object(_))) => {
                let mut sorted = other.clone();
                sorted.sort_all_objects();
                base64::engine::general_purpose::STANDARD.encode(sorted.to_string())
            }
            _ => continue,
        };
        exchange.request.push(claim.header.as_bytes(), text.as_bytes());
    }
    if let Some(key) = &provider.payload_in_metadata {
        let mut payload = token.payload.clone();
        for claim in &provider.space_delimited_claims {
            if let Some(Value::String(text)) = payload.get(&**claim).cloned() {
                let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
                if !words.is_empty() {
                    payload[&**claim] = words.into();
                }
            }
        }
        exchange.info.dynamic_metadata.set(NAMESPACE, key, payload);
    }
    if let Some(key) = &provider.header_in_metadata {
        exchange.info.dynamic_metadata.set(NAMESPACE, key, token.header.clone());
    }
    provider.clear_route_cache
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_realm_is_cut_at_a_character() {
        let path = format!("/{}", "ä".repeat(200));
        assert_eq!(cut_at(&path, MAX_REALM), 255);
        assert_eq!(cut_at("/p", MAX_REALM), 2);
    }
}
