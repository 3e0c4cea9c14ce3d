use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use mesh_types::ArcStr;

use crate::fields;
use crate::format::percent_decode;
use crate::headers::Headers;
use crate::matchers::{StringMatcher, canonical_name, cookie, first_query_value};
use crate::metadata::FilterState;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::RouteMatcher;
use crate::runtime::Runtime;
use crate::tls::DataSource;

/// JSON web tokens: which requests need which (`filters.http.jwt_authn.v3.JwtAuthentication`).
#[derive(Debug)]
pub struct JwtAuthn {
    /// Sorted by name.
    pub providers: Vec<Arc<JwtProvider>>,
    rules: Vec<(RouteMatcher, Option<Requirement>)>,
    /// Filter state whose text names one of these, for requests that no rule matches.
    by_state: Option<(ArcStr, HashMap<ArcStr, Requirement>)>,
    named: HashMap<ArcStr, Requirement>,
    /// CORS preflights need no token.
    pub bypass_cors_preflight: bool,
    /// Do not tell clients what was wrong.
    pub strip_failure_response: bool,
    /// What it counts.
    pub counters: JwtCounters,
}

/// The full names of the filter's counters, within the connection manager's.
#[derive(Debug)]
pub struct JwtCounters {
    /// Requests that went on.
    pub allowed: Box<str>,
    /// Requests that did not.
    pub denied: Box<str>,
    /// Preflights that went on without a look.
    pub cors_preflight_bypassed: Box<str>,
    /// Keys that came.
    pub jwks_fetch_success: Box<str>,
    /// Keys that did not.
    pub jwks_fetch_failed: Box<str>,
    /// Tokens that had been found good before.
    pub jwt_cache_hit: Box<str>,
    /// Other tokens.
    pub jwt_cache_miss: Box<str>,
}

impl JwtCounters {
    /// `jwt_authn.`, and behind that the configuration's prefix if it has one.
    fn of(prefix: &str) -> Self {
        let prefix = prefix.trim_end_matches('.');
        let name = |what: &str| match prefix {
            "" => format!("jwt_authn.{what}").into(),
            prefix => format!("jwt_authn.{prefix}.{what}").into(),
        };
        Self {
            allowed: name("allowed"),
            denied: name("denied"),
            cors_preflight_bypassed: name("cors_preflight_bypassed"),
            jwks_fetch_success: name("jwks_fetch_success"),
            jwks_fetch_failed: name("jwks_fetch_failed"),
            jwt_cache_hit: name("jwt_cache_hit"),
            jwt_cache_miss: name("jwt_cache_miss"),
        }
    }

    /// All of them.
    pub fn all(&self) -> [&str; 7] {
        [
            &self.allowed,
            &self.denied,
            &self.cors_preflight_bypassed,
            &self.jwks_fetch_success,
            &self.jwks_fetch_failed,
            &self.jwt_cache_hit,
            &self.jwt_cache_miss,
        ]
    }
}

/// Who issues tokens, and how they are found and checked.
#[derive(Debug)]
pub struct JwtProvider {
    /// Its name.
    pub name: ArcStr,
    /// `iss` must be this; empty: any.
    pub issuer: ArcStr,
    /// One of these must be in `aud`; none: any.
    pub audiences: Vec<ArcStr>,
    /// `sub` must be so.
    pub subjects: Option<StringMatcher>,
    /// Tokens without `exp` are refused.
    pub require_expiration: bool,
    /// Tokens may live this long.
    pub max_lifetime: Option<Duration>,
    /// Tolerated difference of clocks.
    pub clock_skew: Duration,
    /// The keys.
    pub jwks: JwksSource,
    /// Where tokens are looked for.
    pub places: Vec<TokenPlace>,
    /// Leave the token in the request.
    pub forward: bool,
    /// The payload goes into this header, in base64url.
    pub payload_header: Option<ArcStr>,
    /// With padding.
    pub pad_payload_header: bool,
    /// The payload goes into dynamic metadata under this key.
    pub payload_in_metadata: Option<ArcStr>,
    /// The header goes into dynamic metadata under this key.
    pub header_in_metadata: Option<ArcStr>,
    /// The reason of a failure goes into dynamic metadata under this key.
    pub failed_status_in_metadata: Option<ArcStr>,
    /// Claims that hold lists in one string (`scope`).
    pub space_delimited_claims: Vec<ArcStr>,
    /// Claims that go into headers.
    pub claim_to_headers: Vec<ClaimToHeader>,
    /// The route is chosen again after a token was accepted.
    pub clear_route_cache: bool,
    /// Good tokens are kept.
    pub token_cache: Option<TokenCache>,
}

/// How many good tokens are kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenCache {
    /// So many.
    pub most: usize,
    /// So many bytes of each.
    pub longest: usize,
}

impl TokenCache {
    /// Envoy `JwtCacheImpl`: 100 tokens of 4096 bytes unless others are named.
    fn of(config: &pb::http_filter::jwt_authn::v3::JwtCacheConfig) -> Self {
        let or = |n: u32, default: usize| if n == 0 { default } else { n as usize };
        Self { most: or(config.jwt_cache_size, 100), longest: or(config.jwt_max_token_size, 4096) }
    }
}

/// A claim that goes into a header.
#[derive(Clone, Debug)]
pub struct ClaimToHeader {
    /// The header.
    pub header: ArcStr,
    /// The claim; dots lead into objects.
    pub claim: Vec<ArcStr>,
}

/// Where keys come from.
#[derive(Clone, Debug)]
pub enum JwksSource {
    /// The configuration.
    Local(DataSource),
    /// A server.
    Remote {
        /// The URL.
        uri: ArcStr,
        /// The cluster.
        cluster: ArcStr,
        /// Answer by then.
        timeout: Duration,
        /// Fetch again after this.
        cache: Duration,
        /// Fetch before the first request, and again before they are stale; after a failure again after this.
        ahead: Option<Duration>,
        /// Tries after the first one, the first pause between them and the longest, which is also how long a try takes.
        retries: Option<(u32, Duration, Duration)>,
    },
}

/// Where a token is looked for.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum TokenPlace {
    /// In a header, behind this prefix.
    Header(Box<str>, Box<str>),
    /// In a query parameter.
    Query(Box<str>),
    /// In a cookie.
    Cookie(Box<str>),
}

/// A token found in a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    /// The token.
    pub text: String,
    /// Where it was.
    pub place: TokenPlace,
}

/// What a request must have.
#[derive(Clone, Debug)]
pub enum Requirement {
    /// A token of this provider (index), for these audiences instead of its own.
    Provider { provider: usize, audiences: Option<Vec<ArcStr>> },
    /// One of these.
    Any(Vec<Requirement>),
    /// All of these.
    All(Vec<Requirement>),
    /// Nothing, but the first of the tokens of these providers must be good.
    AllowMissing(Vec<usize>),
    /// Nothing at all; good tokens of these providers are used.
    AllowMissingOrFailed(Vec<usize>),
    /// The same; the upstream is told of tokens that are not good, in this header.
    ExtractOnly { used: Vec<usize>, status_header: ArcStr },
}

/// The token behind a prefix, which may stand anywhere; the token begins where its alphabet does.
fn behind<'v>(prefix: &str, value: &'v str) -> Option<&'v str> {
    if prefix.is_empty() {
        return Some(value);
    }
    let rest = &value[value.find(prefix)? + prefix.len()..];
    let begins = rest.find(|c: char| c.is_ascii_alphanumeric() || "-_.=".contains(c));
    Some(begins.map_or(value, |at| &rest[at..]))
}

/// What a route says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JwtOverride {
    /// No token is needed.
    Disabled,
    /// The requirement of this name.
    Named(ArcStr),
}

impl JwtOverride {
    pub(super) fn compile(config: &pb::http_filter::jwt_authn::v3::PerRouteConfig) -> Compiled<Self> {
        use pb::http_filter::jwt_authn::v3::per_route_config::RequirementSpecifier;
        match &config.requirement_specifier {
            Some(RequirementSpecifier::Disabled(true)) => Ok(Self::Disabled),
            Some(RequirementSpecifier::RequirementName(name)) if !name.is_empty() => {
                Ok(Self::Named(name.as_str().into()))
            }
            _ => Err(Invalid::new("requirement_specifier", "is missing")),
        }
    }
}

impl JwtAuthn {
    /// The one provider, if there is but one: what is wrong with any token is then told by its settings (Envoy
    /// `AuthenticatorImpl::doneWithStatus`).
    pub fn only_provider(&self) -> Option<usize> {
        (self.providers.len() == 1).then_some(0)
    }

    pub(super) fn compile(
        config: &pb::http_filter::jwt_authn::v3::JwtAuthentication,
        runtime: &Runtime,
    ) -> Compiled<Self> {
        use pb::http_filter::jwt_authn::v3::requirement_rule::RequirementType;
        let mut providers = Vec::with_capacity(config.providers.len());
        for (name, provider) in &config.providers {
            providers.push(Arc::new(JwtProvider::compile(name, provider).at_key("providers", name)?));
        }
        providers.sort_by(|a, b| a.name.cmp(&b.name));
        let mut named = HashMap::new();
        for (name, requirement) in &config.requirement_map {
            named.insert(
                name.as_str().into(),
                Requirement::compile(requirement, &providers).at_key("requirement_map", name)?,
            );
        }
        let mut rules = Vec::with_capacity(config.rules.len());
        for (i, rule) in config.rules.iter().enumerate() {
            let matcher =
                rule.r#match.as_ref().ok_or_else(|| Invalid::new(format!("rules[{i}].match"), "is missing"))?;
            let requirement = match &rule.requirement_type {
                None => None,
                Some(RequirementType::Requires(r)) => Some(Requirement::compile(r, &providers).at_index("rules", i)?),
                Some(RequirementType::RequirementName(name)) => {
                    let unknown =
                        || Invalid::new(format!("rules[{i}].requirement_name"), format!("{name:?} does not exist"));
                    Some(named.get(name.as_str()).cloned().ok_or_else(unknown)?)
                }
            };
            rules.push((RouteMatcher::compile(matcher, runtime).at("match").at_index("rules", i)?, requirement));
        }
        let mut by_state = None;
        if let Some(rule) = &config.filter_state_rules {
            fields::required("filter_state_rules.name", &rule.name)?;
            let mut all = HashMap::new();
            for (name, requirement) in &rule.requires {
                let compiled =
                    Requirement::compile(requirement, &providers).at_key("filter_state_rules.requires", name)?;
                all.insert(name.as_str().into(), compiled);
            }
            by_state = Some((rule.name.as_str().into(), all));
        }
        Ok(Self {
            providers,
            rules,
            by_state,
            named,
            bypass_cors_preflight: config.bypass_cors_preflight,
            strip_failure_response: config.strip_failure_response,
            counters: JwtCounters::of(&config.stat_prefix),
        })
    }

    /// What a request must have. A named requirement that does not exist is an error (403), whose text is returned.
    pub fn requirement(
        &self,
        headers: &Headers,
        state: &FilterState,
        over: Option<&JwtOverride>,
    ) -> Result<Needs<'_>, String> {
        let preflight = || {
            headers.method() == Some("OPTIONS")
                && ["origin", "access-control-request-method"]
                    .iter()
                    .all(|name| headers.get(name).is_some_and(|value| !value.is_empty()))
        };
        if self.bypass_cors_preflight && preflight() {
            return Ok(Needs::Preflight);
        }
        match over {
            Some(JwtOverride::Disabled) => Ok(Needs::Nothing),
            Some(JwtOverride::Named(name)) => self.named.get(name).map(Needs::Token).ok_or_else(|| {
                let mut known: Vec<&str> = self.named.keys().map(|name| &**name).collect();
                known.sort_unstable();
                format!("Wrong requirement_name: {name}. It should be one of [{}]", known.join(","))
            }),
            None => {
                if let Some((_, requirement)) = self.rules.iter().find(|(m, _)| m.matches_head(headers)) {
                    return Ok(requirement.as_ref().map_or(Needs::Nothing, Needs::Token));
                }
                let named = self.by_state.as_ref().and_then(|(key, all)| all.get(state.values.get(key)?));
                Ok(named.map_or(Needs::Nothing, Needs::Token))
            }
        }
    }

    /// The provider that a token's issuer names: the first with that issuer, else the first that takes any.
    pub fn of_issuer(&self, issuer: &str) -> Option<usize> {
        let first = |wanted: &str| self.providers.iter().position(|p| *p.issuer == *wanted);
        first(issuer).or_else(|| first(""))
    }

    /// The tokens of a request that these providers look at, in Envoy's order: headers, parameters, cookies, each
    /// sorted by name; with the providers that look there (Envoy `ExtractorImpl`).
    pub fn tokens(&self, of: &[usize], headers: &Headers) -> Vec<(Token, Vec<usize>)> {
        let mut places: BTreeMap<&TokenPlace, Vec<usize>> = BTreeMap::new();
        for index in of {
            for place in self.providers.get(*index).into_iter().flat_map(|p| &p.places) {
                places.entry(place).or_default().push(*index);
            }
        }
        let all = places.into_iter();
        all.flat_map(|(place, owners)| place.tokens(headers).into_iter().map(move |t| (t, owners.clone()))).collect()
    }
}

/// What a request needs.
#[derive(Clone, Copy, Debug)]
pub enum Needs<'a> {
    /// Nothing.
    Nothing,
    /// Nothing, as the question before a request.
    Preflight,
    /// This.
    Token(&'a Requirement),
}

impl TokenPlace {
    /// The tokens that a request has there: one, or one in each header of that name.
    fn tokens(&self, headers: &Headers) -> Vec<Token> {
        let of = |text: &str| Token { text: text.to_owned(), place: self.clone() };
        match self {
            // Envoy keeps this header in one line.
            Self::Header(name, prefix) if **name == *"authorization" => {
                let value = headers.joined(name);
                let text = value.as_deref().and_then(|v| std::str::from_utf8(v).ok());
                text.and_then(|text| behind(prefix, text)).map(of).into_iter().collect()
            }
            Self::Header(name, prefix) => {
                let values = headers.get_all(name).filter_map(|v| std::str::from_utf8(v).ok());
                values.filter_map(|text| behind(prefix, text)).map(of).collect()
            }
            Self::Query(name) => {
                let mut text = Vec::new();
                let Some(value) = headers.path().and_then(|path| first_query_value(path, name)) else {
                    return Vec::new();
                };
                percent_decode(value, &mut text);
                vec![of(&String::from_utf8_lossy(&text))]
            }
            Self::Cookie(name) => {
                let text = cookie(headers, name).and_then(|v| std::str::from_utf8(v).ok());
                text.map(of).into_iter().collect()
            }
        }
    }
}

impl Requirement {
    fn compile(
        requirement: &pb::http_filter::jwt_authn::v3::JwtRequirement,
        providers: &[Arc<JwtProvider>],
    ) -> Compiled<Self> {
        use pb::http_filter::jwt_authn::v3::jwt_requirement::RequiresType as Kind;
        let find = |name: &str| {
            let unknown = || Invalid::new("provider_name", format!("{name:?} does not exist"));
            providers.iter().position(|p| &*p.name == name).ok_or_else(unknown)
        };
        let all = |requirements: &[pb::http_filter::jwt_authn::v3::JwtRequirement]| {
            requirements.iter().map(|r| Self::compile(r, providers)).collect::<Compiled<Vec<_>>>()
        };
        let everybody = || (0..providers.len()).collect();
        let Some(kind) = &requirement.requires_type else {
            // Envoy's `AllowAllVerifierImpl`.
            return Ok(Self::All(Vec::new()));
        };
        Ok(match kind {
            Kind::ProviderName(name) => Self::Provider { provider: find(name)?, audiences: None },
            Kind::ProviderAndAudiences(both) => Self::Provider {
                provider: find(&both.provider_name)?,
                audiences: Some(both.audiences.iter().map(|a| a.as_str().into()).collect()),
            },
            Kind::RequiresAny(list) => Self::any(&list.requirements, providers).at("requires_any")?,
            Kind::RequiresAll(list) if list.requirements.len() < 2 => {
                return Err(Invalid::new("requires_all.requirements", "needs two at least"));
            }
            Kind::RequiresAll(list) => Self::All(all(&list.requirements).at("requires_all")?),
            Kind::AllowMissing(_) => Self::AllowMissing(everybody()),
            Kind::AllowMissingOrFailed(_) => Self::AllowMissingOrFailed(everybody()),
            Kind::ExtractOnlyWithoutValidation(only) => Self::ExtractOnly {
                used: everybody(),
                status_header: match only.verification_status_header.as_str() {
                    "" => "x-jwt-signature-verified".into(),
                    name => name.to_ascii_lowercase().as_str().into(),
                },
            },
        })
    }

    /// One of several; what allows tokens to be missing comes last and looks at those of the others' providers only
    /// (Envoy `AnyVerifierImpl`).
    fn any(
        requirements: &[pb::http_filter::jwt_authn::v3::JwtRequirement],
        providers: &[Arc<JwtProvider>],
    ) -> Compiled<Self> {
        if requirements.len() < 2 {
            return Err(Invalid::new("requirements", "needs two at least"));
        }
        let mut all = Vec::new();
        let mut lenient = None;
        for requirement in requirements {
            match Self::compile(requirement, providers)? {
                Self::AllowMissing(_) => lenient = lenient.or(Some(false)),
                Self::AllowMissingOrFailed(_) => lenient = Some(true),
                other => all.push(other),
            }
        }
        let own = |requirement: &Self| match requirement {
            Self::Provider { provider, .. } => Some(*provider),
            _ => None,
        };
        let mut used: Vec<usize> = all.iter().filter_map(own).collect();
        if used.is_empty() {
            used = (0..providers.len()).collect();
        }
        all.extend(lenient.map(|failed| match failed {
            true => Self::AllowMissingOrFailed(used),
            false => Self::AllowMissing(used),
        }));
        Ok(Self::Any(all))
    }
}

/// Envoy `Utility::convertCoreToRouteRetryPolicy`.
fn retries(policy: &pb::core::RetryPolicy) -> Compiled<(u32, Duration, Duration)> {
    let (mut base, mut most) = (Duration::from_secs(1), Duration::from_secs(10));
    if let Some(pause) = &policy.retry_back_off {
        base = fields::duration("retry_back_off.base_interval", pause.base_interval.as_ref())?.unwrap_or(base);
        most = fields::duration("retry_back_off.max_interval", pause.max_interval.as_ref())?.unwrap_or(base * 10);
        if most < base {
            return Err(Invalid::new("retry_back_off.max_interval", "must not be less than base_interval"));
        }
    }
    Ok((fields::uint(policy.num_retries.as_ref(), 1), base, most))
}

impl JwtProvider {
    fn compile(name: &str, provider: &pb::http_filter::jwt_authn::v3::JwtProvider) -> Compiled<Self> {
        use pb::core::http_uri::HttpUpstreamType;
        use pb::http_filter::jwt_authn::v3::jwt_provider::JwksSourceSpecifier;
        crate::constraints::jwt_provider(provider)?;
        let jwks = match &provider.jwks_source_specifier {
            Some(JwksSourceSpecifier::LocalJwks(source)) => {
                JwksSource::Local(DataSource::compile(source).at("local_jwks")?)
            }
            Some(JwksSourceSpecifier::RemoteJwks(remote)) => {
                let uri = remote.http_uri.as_ref().ok_or_else(|| Invalid::new("remote_jwks.http_uri", "is missing"))?;
                let cluster = match &uri.http_upstream_type {
                    Some(HttpUpstreamType::Cluster(cluster)) => cluster.as_str().into(),
                    None => return Err(Invalid::new("remote_jwks.http_uri.cluster", "is missing")),
                };
                JwksSource::Remote {
                    uri: fields::required("remote_jwks.http_uri.uri", &uri.uri)?,
                    cluster,
                    timeout: fields::duration("timeout", uri.timeout.as_ref())?.map_or(
                        Ok(Duration::from_secs(5)),
                        |timeout| match timeout.as_secs() >> 32 {
                            0 => Ok(timeout),
                            _ => Err(Invalid::new("timeout", "must be less than 2^32 seconds")),
                        },
                    )?,
                    // Whole seconds count.
                    cache: fields::duration("cache_duration", remote.cache_duration.as_ref())?
                        .map_or(Duration::from_secs(600), |cache| Duration::from_secs(cache.as_secs())),
                    retries: remote.retry_policy.as_ref().map(retries).transpose().at("remote_jwks.retry_policy")?,
                    ahead: match &remote.async_fetch {
                        None => None,
                        Some(fetch) => {
                            let failed = fetch.failed_refetch_duration.as_ref();
                            let failed = fields::duration("async_fetch.failed_refetch_duration", failed)?;
                            Some(failed.unwrap_or(Duration::from_secs(1)))
                        }
                    },
                }
            }
            None => return Err(Invalid::new("jwks_source_specifier", "is missing")),
        };
        let some = |text: &str| (!text.is_empty()).then(|| text.into());
        let header = |text: &str| (!text.is_empty()).then(|| canonical_name(text).into());
        let mut places: Vec<TokenPlace> = provider
            .from_headers
            .iter()
            .map(|h| TokenPlace::Header(canonical_name(&h.name).into(), h.value_prefix.as_str().into()))
            .collect();
        places.extend(provider.from_params.iter().map(|p| TokenPlace::Query(p.as_str().into())));
        places.extend(provider.from_cookies.iter().map(|c| TokenPlace::Cookie(c.as_str().into())));
        if places.is_empty() {
            places.push(TokenPlace::Header("authorization".into(), "Bearer ".into()));
            places.push(TokenPlace::Query("access_token".into()));
        }
        let delimited = provider.normalize_payload_in_metadata.as_ref().map(|n| n.space_delimited_claims.as_slice());
        Ok(Self {
            name: name.into(),
            issuer: provider.issuer.as_str().into(),
            audiences: provider.audiences.iter().map(|a| a.as_str().into()).collect(),
            subjects: provider.subjects.as_ref().map(StringMatcher::compile).transpose().at("subjects")?,
            require_expiration: provider.require_expiration,
            max_lifetime: fields::duration("max_lifetime", provider.max_lifetime.as_ref())?,
            clock_skew: Duration::from_secs(match provider.clock_skew_seconds {
                0 => 60,
                seconds => seconds.into(),
            }),
            jwks,
            places,
            forward: provider.forward,
            payload_header: header(&provider.forward_payload_header),
            pad_payload_header: provider.pad_forward_payload_header,
            payload_in_metadata: some(&provider.payload_in_metadata),
            header_in_metadata: some(&provider.header_in_metadata),
            failed_status_in_metadata: some(&provider.failed_status_in_metadata),
            space_delimited_claims: delimited.unwrap_or_default().iter().map(|c| c.as_str().into()).collect(),
            claim_to_headers: provider
                .claim_to_headers
                .iter()
                .map(|c| ClaimToHeader {
                    header: canonical_name(&c.header_name).into(),
                    claim: match c.claim_path.as_slice() {
                        [] => c.claim_name.split('.').map(ArcStr::from).collect(),
                        path => path.iter().map(|p| p.key.as_str().into()).collect(),
                    },
                })
                .collect(),
            clear_route_cache: provider.clear_route_cache,
            token_cache: provider.jwt_cache_config.as_ref().map(TokenCache::of),
        })
    }

    /// Removes this token from the request, so that it is not forwarded.
    pub fn remove(&self, token: &Token, headers: &mut Headers) {
        match &token.place {
            TokenPlace::Header(name, _) => {
                headers.remove(name);
            }
            TokenPlace::Query(name) => {
                let Some(path) = headers.path().map(str::to_owned) else { return };
                let Some((before, query)) = path.split_once('?') else { return };
                // Envoy writes the others anew (`QueryParamsMulti`), sorted by name.
                let pairs = query.split('&').filter(|pair| !pair.is_empty());
                let mut kept: Vec<(&str, &str)> =
                    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
                kept.retain(|(key, _)| **key != **name);
                kept.sort_by_key(|(key, _)| *key);
                let kept: Vec<String> = kept.iter().map(|(key, value)| format!("{key}={value}")).collect();
                let new = if kept.is_empty() { before.to_owned() } else { format!("{before}?{}", kept.join("&")) };
                headers.set(":path", new.as_bytes());
            }
            TokenPlace::Cookie(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provider(config: pb::http_filter::jwt_authn::v3::JwtProvider) -> JwtProvider {
        let jwks = pb::core::DataSource {
            specifier: Some(pb::core::data_source::Specifier::InlineString(r#"{"keys": [{"kty": "oct"}]}"#.into())),
            ..Default::default()
        };
        let source = pb::http_filter::jwt_authn::v3::jwt_provider::JwksSourceSpecifier::LocalJwks(jwks);
        JwtProvider::compile(
            "p",
            &pb::http_filter::jwt_authn::v3::JwtProvider { jwks_source_specifier: Some(source), ..config },
        )
        .unwrap()
    }

    #[test]
    fn tokens_are_found_and_removed() {
        let provider = Arc::new(provider(Default::default()));
        let config = JwtAuthn {
            providers: vec![provider.clone()],
            rules: Vec::new(),
            by_state: None,
            named: HashMap::new(),
            bypass_cors_preflight: false,
            strip_failure_response: false,
            counters: JwtCounters::of(""),
        };
        let mut headers = Headers::of([("authorization", "Bearer  a.b-c_d, x"), (":path", "/p?x=1&access_token=t")]);
        let tokens = config.tokens(&[0], &headers);
        let texts: Vec<&str> = tokens.iter().map(|(token, _)| token.text.as_str()).collect();
        assert_eq!(texts, ["a.b-c_d, x", "t"], "a token does not end before the value does");
        for (token, owners) in &tokens {
            assert_eq!(owners, &[0]);
            provider.remove(token, &mut headers);
        }
        assert_eq!((headers.contains("authorization"), headers.path()), (false, Some("/p?x=1")));
    }
}
