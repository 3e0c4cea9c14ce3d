//! Verified tokens: RequestAuthentication (istiod `policy_applier.go`).

use std::collections::HashMap;

use envoy_api::core::{DataSource, HttpUri, data_source::Specifier, http_uri::HttpUpstreamType};
use envoy_api::http::HttpFilter;
use envoy_api::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList,
    JwtRequirementOrList, RemoteJwks, RequirementRule,
    jwt_provider::{JwksSourceSpecifier, NormalizePayload},
    jwt_requirement::RequiresType,
    requirement_rule::RequirementType,
};
use envoy_api::route::{RouteMatch, route_match::PathSpecifier};
use istio_api::request_authentication::JwtRule;
use push_context::KeySource;
use registry::JwksMode;

use crate::access_log::lookup;
use crate::context::Context;
use crate::filters;
use crate::names;
use crate::proto::{duration, seconds};

/// The filter of the proxy's own rules, if there are any.
pub(crate) fn filter(cx: &Context<'_>) -> Option<HttpFilter> {
    let policies = cx.push.request_authentications(&cx.node.namespace, &cx.node.labels);
    let mut rules: Vec<&JwtRule> = policies.iter().flat_map(|p| &p.spec.jwt_rules).collect();
    rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    if rules.is_empty() {
        return None;
    }
    let mut providers = HashMap::new();
    let (mut each, mut any_of) = (Vec::new(), Vec::new());
    let requirement = |kind| JwtRequirement { requires_type: Some(kind) };
    let one_of = |requirements| requirement(RequiresType::RequiresAny(JwtRequirementOrList { requirements }));
    for (i, rule) in rules.iter().enumerate() {
        let name = format!("origins-{i}");
        let by_name = || requirement(RequiresType::ProviderName(name.clone()));
        let missing = requirement(RequiresType::AllowMissing(Default::default()));
        each.push(one_of(vec![by_name(), missing]));
        any_of.push(by_name());
        providers.insert(name.clone(), provider(cx, rule));
    }
    // With several issuers a token of one of them is enough; without any token the request has no identity.
    let requires = if each.len() == 1 {
        each.remove(0)
    } else {
        any_of.push(requirement(RequiresType::RequiresAll(JwtRequirementAndList { requirements: each })));
        one_of(any_of)
    };
    let everything =
        RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..RouteMatch::default() };
    let config = JwtAuthentication {
        providers,
        rules: vec![RequirementRule {
            r#match: Some(everything),
            requirement_type: Some(RequirementType::Requires(requires)),
        }],
        bypass_cors_preflight: true,
        ..JwtAuthentication::default()
    };
    Some(filters::http("envoy.filters.http.jwt_authn", &config))
}

fn provider(cx: &Context<'_>, rule: &JwtRule) -> JwtProvider {
    let mut claims = vec!["permission".to_owned(), "scope".to_owned()];
    claims.extend(rule.space_delimited_claims.iter().cloned());
    claims.sort();
    claims.dedup();
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        forward_payload_header: rule.output_payload_to_header.clone(),
        payload_in_metadata: "payload".to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload { space_delimited_claims: claims }),
        claim_to_headers: rule
            .output_claim_to_headers
            .iter()
            .map(|c| JwtClaimToHeader {
                header_name: c.header.clone(),
                claim_name: c.claim.clone(),
                ..JwtClaimToHeader::default()
            })
            .collect(),
        from_headers: rule
            .from_headers
            .iter()
            .map(|h| JwtHeader { name: h.name.clone(), value_prefix: h.prefix.clone() })
            .collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        jwks_source_specifier: Some(keys(cx, rule)),
        ..JwtProvider::default()
    }
}

/// Keys that no token fits: what istiod sends in place of keys that it cannot fetch. Nobody has the private half.
const NO_KEYS: &str = r#"{
  "keys": [
    {
      "kty": "RSA",
      "e": "AQAB",
      "n": "0xObjM0UvS_oaazjpEYlAbwctEJ4L8pH3OuTb7qth7gUwqet-EzQB4dgFdvSdMgrLnSncQGRjpEYz3F3viIbH-3EN3TxSlPNviHxeOdyiBVfumN8dMxbLvVJUpfNOnvmMxJcl-8NNjAwcOjk4otSALaYgYYyOPyvKtgVdrQr-FoubWX4yrjxW-MJ2-7OBeepUUNOsVwGV23YX03sVkkyvY3otRflkBcY3_HKpBxJl9wk2GyOShN4_PNUF9-vwfnvOXMbCDX-w4PTef4geeb_GiT40YCKHTKMSPVanGRn5GExIWmki-mmqh94-mPTJyBR74ShspL3BxPZitDL574T1w"
    }
  ]
}"#;

/// The keys in the rule, or as the control plane has fetched them.
///
/// DIFFERS: istiod waits for the issuer's answer before it sends the first listeners; here tokens are refused until it
/// is there.
fn inline(cx: &Context<'_>, rule: &JwtRule) -> JwksSourceSpecifier {
    let text = match KeySource::of(rule) {
        None => &rule.jwks,
        Some(source) => cx.push.keys(&source).map_or(NO_KEYS, |keys| keys),
    };
    JwksSourceSpecifier::LocalJwks(DataSource {
        specifier: Some(Specifier::InlineString(text.to_owned())),
        ..DataSource::default()
    })
}

fn keys(cx: &Context<'_>, rule: &JwtRule) -> JwksSourceSpecifier {
    let mode = cx.push.settings.jwks;
    if mode == JwksMode::ControlPlane || rule.jwks_uri.is_empty() {
        return inline(cx, rule);
    }
    let (is_https, rest) = match rule.jwks_uri.split_once("://") {
        Some((scheme, rest)) => (scheme == "https", rest),
        None => (false, rule.jwks_uri.as_str()),
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let default = if is_https { 443 } else { 80 };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().unwrap_or(default)),
        None => (authority, default),
    };
    let cluster = match lookup(cx.push, "jwks", host, u32::from(port)) {
        Some((_, cluster)) => cluster,
        None if mode == JwksMode::Hybrid => return inline(cx, rule),
        None => names::outbound(port, "", host),
    };
    JwksSourceSpecifier::RemoteJwks(RemoteJwks {
        http_uri: Some(HttpUri {
            uri: rule.jwks_uri.clone(),
            timeout: Some(rule.timeout.map_or(seconds(5), duration)),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster)),
        }),
        cache_duration: Some(seconds(300)),
        ..RemoteJwks::default()
    })
}
