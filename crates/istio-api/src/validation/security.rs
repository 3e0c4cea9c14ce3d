use super::{Check, text};
use crate::Violation;
use crate::authorization_policy::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use crate::peer_authentication::PeerAuthentication;
use crate::request_authentication::{JwtRule, RequestAuthentication};

impl PeerAuthentication {
    /// What istiod would refuse or warn of (`ValidatePeerAuthentication`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            let selects = self.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
            if !selects && !self.port_level_mtls.is_empty() {
                check.error("mesh/namespace peer authentication cannot have port level mTLS");
            }
            for port in self.port_level_mtls.keys() {
                check.at(format_args!("portLevelMtls[\"{port}\"]"), |check| {
                    check.require((1..=65535).contains(port), "port must be in range 1..65535");
                });
            }
            check.some("selector", &self.selector, |check, selector| {
                check.at("matchLabels", |check| check.selector_labels(&selector.match_labels));
            });
        })
    }
}

impl RequestAuthentication {
    /// What istiod would refuse or warn of (`ValidateRequestAuthentication`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.targets(&self.selector, &self.target_ref, &self.target_refs);
            check.each("jwtRules", &self.jwt_rules, jwt_rule);
        })
    }
}

fn jwt_rule(check: &mut Check, rule: &JwtRule) {
    for (field, texts) in [
        ("audiences", &rule.audiences),
        ("fromParams", &rule.from_params),
        ("fromCookies", &rule.from_cookies),
        ("spaceDelimitedClaims", &rule.space_delimited_claims),
    ] {
        check.each(field, texts, |check, text| check.require(!text.is_empty(), "must be non-empty string"));
    }
    check.require(!rule.issuer.is_empty() || !rule.jwks_uri.is_empty(), "issuer or jwksUri must be non-empty string");
    if !rule.jwks_uri.is_empty() {
        let scheme = rule.jwks_uri.split_once("://").filter(|(_, rest)| !rest.is_empty() && !rest.starts_with('/'));
        let known = scheme.is_some_and(|(scheme, _)| scheme == "http" || scheme == "https");
        check.at("jwksUri", |check| check.require(known, "is not an http or https URL"));
    }
    if !rule.jwks.is_empty() {
        let keys = serde_json::from_str::<serde_json::Value>(&rule.jwks).ok();
        let valid =
            keys.is_some_and(|keys| keys.get("keys").is_some_and(|keys| keys.is_array()) || keys.get("kty").is_some());
        check.at("jwks", |check| check.require(valid, "is not a JSON Web Key Set"));
    }
    check.each("fromHeaders", &rule.from_headers, |check, header| {
        check.require(!header.name.is_empty(), "location header name must be non-empty string");
    });
    check.each("outputClaimToHeaders", &rule.output_claim_to_headers, |check, item| {
        if item.claim.is_empty() || item.header.is_empty() {
            return check.error("header and claim value must be non-empty string");
        }
        check.at("header", |check| check.refuse(text::strict_header_name(&item.header)));
    });
    check.duration("timeout", rule.timeout);
}

impl AuthorizationPolicy {
    /// What istiod would refuse or warn of (`ValidateAuthorizationPolicy`).
    pub fn validate(&self, _namespace: &str) -> Vec<Violation> {
        Check::walk("spec", |check| {
            check.targets(&self.selector, &self.target_ref, &self.target_refs);
            if self.action == Action::Custom {
                check.require(!self.rules.is_empty(), "CUSTOM action without `rules` is meaningless as it will never be triggered, add an empty rule `{}` if you want it be triggered for every request");
                let named = self.provider.as_ref().is_some_and(|provider| !provider.name.is_empty());
                check.require(named, "`provider.name` must not be empty");
            } else {
                check.require(self.provider.is_none(), "`provider` must not be with non CUSTOM action");
            }
            if self.action == Action::Deny && self.rules.is_empty() {
                check.error("DENY action without `rules` is meaningless as it will never be triggered, add an empty rule `{}` if you want it be triggered for every request");
            }
            check.each("rules", &self.rules, |check, rule| walk_rule(check, rule, self.action));
        })
    }
}

fn walk_rule(check: &mut Check, rule: &Rule, action: Action) {
    check.each("from", &rule.from, |check, from| match &from.source {
        None => check.error("`from.source` must not be nil"),
        Some(source) => check.at("source", |check| walk_source(check, source, action)),
    });
    check.each("to", &rule.to, |check, to| match &to.operation {
        None => check.error("`to.operation` must not be nil"),
        Some(operation) => check.at("operation", |check| walk_operation(check, operation)),
    });
    check.each("when", &rule.when, |check, condition| walk_condition(check, condition, action));
    let tcp_source = rule.from.iter().filter_map(|from| from.source.as_ref()).any(|source| {
        let http = [
            &source.request_principals,
            &source.not_request_principals,
            &source.trust_domains,
            &source.not_trust_domains,
        ];
        source_lists(source)
            .iter()
            .filter(|(_, list)| !http.iter().any(|http| std::ptr::eq(*http, *list)))
            .any(|(_, list)| !list.is_empty())
    });
    let tcp_operation = rule
        .to
        .iter()
        .filter_map(|to| to.operation.as_ref())
        .any(|operation| !operation.ports.is_empty() || !operation.not_ports.is_empty());
    let (from, to) = (!rule.from.is_empty(), !rule.to.is_empty());
    if action == Action::Deny && ((from && !to && !tcp_source) || (to && !tcp_operation)) {
        check.warning("will deny all traffic to TCP ports under its scope due to the use of only HTTP attributes in a DENY rule; it is recommended to explicitly specify the port");
    }
}

fn source_lists(source: &Source) -> [(&'static str, &Vec<String>); 14] {
    [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ]
}

fn walk_source(check: &mut Check, source: &Source, action: Action) {
    let lists = source_lists(source);
    check.require(lists.iter().any(|(_, list)| !list.is_empty()), "`from.source` must not be empty");
    let identities = [&source.principals, &source.not_principals, &source.namespaces, &source.not_namespaces];
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let mixed = accounts && identities.iter().any(|list| !list.is_empty());
    check.require(!mixed, "cannot set serviceAccounts with namespaces or principals");
    for (field, list) in lists {
        let addresses = field.to_ascii_lowercase().ends_with("ipblocks");
        if action == Action::Custom && !addresses && !list.is_empty() {
            check.at(field, |check| check.error("is currently not supported with CUSTOM action"));
        }
        check.each(field, list, |check, text| {
            check.require(!text.is_empty(), "must not be empty");
            if addresses && !text.is_empty() {
                check.refuse(text::subnet(text));
            }
            if field.ends_with("erviceAccounts") {
                check.refuse(service_account(text));
            }
        });
    }
}

fn walk_operation(check: &mut Check, operation: &Operation) {
    let lists = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    check.require(lists.iter().any(|(_, list)| !list.is_empty()), "`to.operation` must not be empty");
    for (field, list) in lists {
        check.each(field, list, |check, text| {
            check.require(!text.is_empty(), "must not be empty");
            if field.to_ascii_lowercase().ends_with("ports") {
                check.require(text.parse::<u16>().is_ok_and(|port| port > 0), "is not a port in the range 1..65535");
            }
            if field.to_ascii_lowercase().ends_with("paths") {
                check.refuse(path_template(text));
            }
        });
    }
}

/// istiod `CheckValidPathTemplate`: `{*}` and `{**}` as whole segments, `{**}` once, and no `*` beside them.
fn path_template(path: &str) -> Result<(), String> {
    if !path.contains("{*}") && !path.contains("{**}") {
        return Ok(());
    }
    let mut rest_seen = false;
    for segment in path.split('/') {
        match segment {
            "{*}" if rest_seen => return Err(format!("{path:?}: {{*}} must not follow {{**}}")),
            "{*}" => {}
            "{**}" if rest_seen => return Err(format!("{path:?}: {{**}} may stand only once")),
            "{**}" => rest_seen = true,
            other if other.contains(['{', '}', '*']) => {
                return Err(format!("{path:?}: segment {other:?} is not a literal, {{*}} or {{**}}"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn walk_condition(check: &mut Check, condition: &Condition, action: Action) {
    let key = condition.key.as_str();
    if key.is_empty() {
        return check.error("`key` must not be empty");
    }
    let identity =
        matches!(key, "source.namespace" | "source.serviceAccount" | "source.trustDomain" | "source.principal");
    if action == Action::Custom && (identity || key.starts_with("request.auth.")) {
        check.at("key", |check| check.error(format!("{key} is currently not supported with CUSTOM action")));
    }
    if condition.values.is_empty() && condition.not_values.is_empty() {
        check.error(format!("at least one of `values` or `notValues` must be set for key {key}"));
    }
    check.at("key", |check| check.refuse(attribute(key)));
    for (field, values) in [("values", &condition.values), ("notValues", &condition.not_values)] {
        check.each(field, values, |check, value| match key {
            "source.ip" | "remote.ip" | "destination.ip" => check.refuse(text::subnet(value)),
            "destination.port" => {
                check.require(value.parse::<u16>().is_ok_and(|port| port > 0), "is not a port in the range 1..65535")
            }
            "source.serviceAccount" => check.refuse(service_account(value)),
            _ => {}
        });
    }
}

/// istiod `security.validateServiceAccount`.
fn service_account(text: &str) -> Result<(), String> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts.len() {
        _ if text.contains('*') => Err("wildcard not allowed".to_owned()),
        1 | 2 if parts.iter().all(|part| !part.is_empty()) && text.len() <= 320 => Ok(()),
        _ => Err("must be of form NAMESPACE/NAME or NAME, of at most 320 characters".to_owned()),
    }
}

/// istiod `security.ValidateAttribute`.
fn attribute(key: &str) -> Result<(), String> {
    let map = |prefix: &str| {
        key.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('[') && rest.ends_with(']') && rest.len() > 2)
    };
    let simple = matches!(
        key,
        "source.ip"
            | "remote.ip"
            | "source.namespace"
            | "source.serviceAccount"
            | "source.trustDomain"
            | "source.principal"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
            | "destination.ip"
            | "destination.port"
            | "connection.sni"
    );
    if simple || map("request.headers") || map("request.auth.claims") || key.starts_with("experimental.envoy.filters.")
    {
        return Ok(());
    }
    Err(format!("unknown attribute: {key}"))
}
