use crate::fields;
use crate::headers::Headers;
use crate::matchers::StringMatcher;
use crate::pb;
use crate::percent::Fraction;
use crate::rejected::{At, Compiled};
use crate::runtime::Runtime;

/// Which origins may do what.
#[derive(Clone, Debug)]
pub struct CorsPolicy {
    origins: Vec<StringMatcher>,
    methods: Box<str>,
    headers: Box<str>,
    expose: Box<str>,
    max_age: Box<str>,
    credentials: Option<bool>,
    private_network: Option<bool>,
    forward_not_matching_preflights: bool,
    /// A share between none and all makes no sense for CORS; none switches it off.
    enabled: Fraction,
    /// Count what would have been done.
    shadow: Fraction,
}

/// What to do with a request that may come from another origin.
#[derive(Clone, Debug, PartialEq)]
pub enum CorsDecision {
    /// It does not, or nothing is said about it.
    NotCors,
    /// Only counted: whether its origin is allowed.
    Shadow(bool),
    /// Its origin is not allowed: it goes on without headers.
    Invalid,
    /// Its origin is not allowed, and preflights are answered here: 200 with these headers.
    Refused(Vec<(&'static str, Vec<u8>)>),
    /// Answer 200 with these headers.
    Preflight(Vec<(&'static str, Vec<u8>)>),
    /// Add these headers to the response.
    Actual(Vec<(&'static str, Vec<u8>)>),
}

impl CorsPolicy {
    pub(super) fn compile(policy: &pb::http_filter::cors::v3::CorsPolicy, runtime: &Runtime) -> Compiled<Self> {
        Ok(Self {
            origins: StringMatcher::compile_list(&policy.allow_origin_string_match).at("allow_origin_string_match")?,
            methods: policy.allow_methods.as_str().into(),
            headers: policy.allow_headers.as_str().into(),
            expose: policy.expose_headers.as_str().into(),
            max_age: policy.max_age.as_str().into(),
            credentials: policy.allow_credentials.as_ref().map(|v| v.value),
            private_network: policy.allow_private_network_access.as_ref().map(|v| v.value),
            forward_not_matching_preflights: fields::flag(policy.forward_not_matching_preflights.as_ref(), true),
            enabled: Fraction::runtime(policy.filter_enabled.as_ref(), Fraction::ALL, runtime)?,
            shadow: Fraction::runtime(policy.shadow_enabled.as_ref(), Fraction::NONE, runtime)?,
        })
    }

    /// The deprecated form inside routes.
    pub(crate) fn of_route(policy: Option<&pb::route::CorsPolicy>, runtime: &Runtime) -> Compiled<Option<Self>> {
        use pb::route::cors_policy::EnabledSpecifier;
        let Some(policy) = policy else { return Ok(None) };
        let enabled = policy.enabled_specifier.as_ref().map(|EnabledSpecifier::FilterEnabled(f)| f.clone());
        let policy = pb::http_filter::cors::v3::CorsPolicy {
            allow_origin_string_match: policy.allow_origin_string_match.clone(),
            allow_methods: policy.allow_methods.clone(),
            allow_headers: policy.allow_headers.clone(),
            expose_headers: policy.expose_headers.clone(),
            max_age: policy.max_age.clone(),
            allow_credentials: policy.allow_credentials,
            filter_enabled: enabled,
            shadow_enabled: policy.shadow_enabled.clone(),
            allow_private_network_access: policy.allow_private_network_access,
            forward_not_matching_preflights: policy.forward_not_matching_preflights,
        };
        Self::compile(&policy, runtime).map(Some)
    }
}

/// Envoy `CorsFilter::decodeHeaders`, by the policies of all levels, the innermost first: what one leaves open, the next says.
pub fn cors_decide(policies: &[&CorsPolicy], request: &Headers) -> CorsDecision {
    let on = |share: &Fraction| share.parts().0 > 0;
    let Some(policy) = policies.first().filter(|p| on(&p.enabled) || on(&p.shadow)) else {
        return CorsDecision::NotCors;
    };
    let said = |text: fn(&CorsPolicy) -> &str| policies.iter().map(|p| text(p)).find(|t| !t.is_empty()).unwrap_or("");
    let switch = |on: fn(&CorsPolicy) -> Option<bool>| policies.iter().find_map(|p| on(p)) == Some(true);
    let Some(origin) = request.get("origin").filter(|o| !o.is_empty()) else { return CorsDecision::NotCors };
    let preflight = request.method() == Some("OPTIONS")
        && request.get("access-control-request-method").is_some_and(|m| !m.is_empty());
    // A matcher that takes `*` takes every origin.
    let origins = policies.iter().map(|p| &p.origins).find(|origins| !origins.is_empty());
    let allowed = origins.into_iter().flatten().any(|m| m.matches(b"*") || m.matches(origin));
    if !on(&policy.enabled) {
        return CorsDecision::Shadow(allowed);
    }
    if !allowed && (!preflight || policy.forward_not_matching_preflights) {
        return CorsDecision::Invalid;
    }
    let mut headers = Vec::new();
    if allowed {
        headers.push(("access-control-allow-origin", origin.to_vec()));
    }
    if switch(|p| p.credentials) {
        headers.push(("access-control-allow-credentials", b"true".to_vec()));
    }
    let mut add = |name, value: &str| {
        if !value.is_empty() {
            headers.push((name, value.as_bytes().to_vec()));
        }
    };
    if allowed {
        // Envoy's encoder adds these to the answer of a preflight, too.
        add("access-control-expose-headers", said(|p| &p.expose));
    }
    if !preflight {
        return CorsDecision::Actual(headers);
    }
    // A star stands for what the client asked for.
    let asked = |name: &str, own: &str| match own {
        "*" => String::from_utf8_lossy(request.get(name).unwrap_or_default()).into_owned(),
        own => own.to_owned(),
    };
    add("access-control-allow-methods", &asked("access-control-request-method", said(|p| &p.methods)));
    add("access-control-allow-headers", &asked("access-control-request-headers", said(|p| &p.headers)));
    add("access-control-max-age", said(|p| &p.max_age));
    if switch(|p| p.private_network) && request.get("access-control-request-private-network") == Some(b"true") {
        add("access-control-allow-private-network", "true");
    }
    if allowed { CorsDecision::Preflight(headers) } else { CorsDecision::Refused(headers) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(forward: bool) -> CorsPolicy {
        CorsPolicy {
            origins: vec![StringMatcher::exact("https://a.test")],
            methods: "GET".into(),
            headers: "".into(),
            expose: "x-e".into(),
            max_age: "60".into(),
            credentials: Some(true),
            private_network: None,
            forward_not_matching_preflights: forward,
            enabled: Fraction::ALL,
            shadow: Fraction::NONE,
        }
    }

    #[test]
    fn preflight_and_actual() {
        let preflight = |origin: &str| {
            Headers::of([(":method", "OPTIONS"), ("origin", origin), ("access-control-request-method", "GET")])
        };
        let CorsDecision::Preflight(headers) = cors_decide(&[&policy(true)], &preflight("https://a.test")) else {
            panic!()
        };
        let names: Vec<_> = headers.iter().map(|(n, _)| *n).collect();
        assert_eq!(
            names,
            [
                "access-control-allow-origin",
                "access-control-allow-credentials",
                "access-control-expose-headers",
                "access-control-allow-methods",
                "access-control-max-age"
            ]
        );
        assert_eq!(cors_decide(&[&policy(true)], &preflight("https://b.test")), CorsDecision::Invalid);
        assert!(matches!(
            cors_decide(&[&policy(false)], &preflight("https://b.test")),
            CorsDecision::Refused(h) if h.iter().all(|(n, _)| *n != "access-control-allow-origin")
        ));
        let actual = Headers::of([(":method", "GET"), ("origin", "https://a.test")]);
        assert!(matches!(cors_decide(&[&policy(true)], &actual), CorsDecision::Actual(h) if h.len() == 3));
        assert_eq!(cors_decide(&[], &actual), CorsDecision::NotCors);
        let silent = CorsPolicy { methods: "".into(), origins: Vec::new(), credentials: Some(false), ..policy(true) };
        assert!(matches!(
            cors_decide(&[&silent, &policy(true)], &preflight("https://a.test")),
            CorsDecision::Preflight(h) if h.iter().any(|(n, v)| *n == "access-control-allow-methods" && v == b"GET")
                && h.iter().all(|(n, _)| *n != "access-control-allow-credentials")
        ));
    }
}
