//! One rule of an AuthorizationPolicy as an RBAC policy (istiod `authz/model`).

use envoy_api::core::TypedExtensionConfig;
use envoy_api::pb::envoy::config::rbac::v3::{
    Permission, Policy, Principal, permission, principal, rbac::Action as RbacAction,
};
use envoy_api::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_api::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, OrMatcher, PathMatcher, StringMatcher, ValueMatcher, list_matcher,
    metadata_matcher::{PathSegment, path_segment::Segment},
    path_matcher, value_matcher,
};
use envoy_api::route::{HeaderMatcher, header_matcher::HeaderMatchSpecifier};
use istio_api::authorization_policy::{Condition, Operation, Rule, Source};

use crate::context::Context;
use crate::proto::{any, cidr, exact, prefix, regex_match, suffix};

const JWT: &str = "envoy.filters.http.jwt_authn";

/// A condition cannot be expressed, on TCP above all. ALLOW rules are dropped with it, DENY rules keep the rest.
struct Unsupported;

type Made<T> = Result<T, Unsupported>;

/// What a condition is about.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Attribute {
    DestinationIp,
    DestinationPort,
    Sni,
    /// Filter and key of dynamic metadata.
    EnvoyFilter(String),
    SourceIp,
    RemoteIp,
    Namespace,
    TrustDomain,
    ServiceAccount,
    Principal,
    RequestPrincipal,
    Audiences,
    Presenter,
    Header(String),
    Claims(String),
    Host,
    Path,
    Method,
}

impl Attribute {
    fn parse(key: &str) -> Option<Attribute> {
        Some(match key {
            "destination.ip" => Attribute::DestinationIp,
            "destination.port" => Attribute::DestinationPort,
            "connection.sni" => Attribute::Sni,
            "source.ip" => Attribute::SourceIp,
            "remote.ip" => Attribute::RemoteIp,
            "source.namespace" => Attribute::Namespace,
            "source.trustDomain" => Attribute::TrustDomain,
            "source.serviceAccount" => Attribute::ServiceAccount,
            "source.principal" => Attribute::Principal,
            "request.auth.principal" => Attribute::RequestPrincipal,
            "request.auth.audiences" => Attribute::Audiences,
            "request.auth.presenter" => Attribute::Presenter,
            _ => {
                if let Some(rest) = key.strip_prefix("request.headers") {
                    Attribute::Header(rest.to_owned())
                } else if let Some(rest) = key.strip_prefix("request.auth.claims") {
                    Attribute::Claims(rest.to_owned())
                } else {
                    let key = key.strip_prefix("experimental.").filter(|key| key.starts_with("envoy.filters."))?;
                    Attribute::EnvoyFilter(key.to_owned())
                }
            }
        })
    }

    fn is_permission(&self) -> bool {
        matches!(
            self,
            Attribute::DestinationIp
                | Attribute::DestinationPort
                | Attribute::Sni
                | Attribute::EnvoyFilter(_)
                | Attribute::Host
                | Attribute::Path
                | Attribute::Method
        )
    }
}

/// Values that must and must not be.
#[derive(Clone)]
struct Term {
    attribute: Attribute,
    values: Vec<String>,
    not_values: Vec<String>,
}

fn term(attribute: Attribute, values: &[String], not_values: &[String]) -> Option<Term> {
    (!values.is_empty() || !not_values.is_empty()).then(|| Term {
        attribute,
        values: values.to_vec(),
        not_values: not_values.to_vec(),
    })
}

/// Policies and rules are named after where they stand; the namespace completes service accounts.
pub(super) fn generate(
    cx: &Context<'_>,
    rule: &Rule,
    namespace: &str,
    action: RbacAction,
    tcp: bool,
) -> Option<Policy> {
    let (mut base_permissions, mut base_principals) = (Vec::new(), Vec::new());
    for Condition { key, values, not_values } in &rule.when {
        let attribute = Attribute::parse(key)?;
        let list = if attribute.is_permission() { &mut base_permissions } else { &mut base_principals };
        list.extend(term(attribute, values, not_values));
    }
    let sources: Vec<Option<&Source>> =
        if rule.from.is_empty() { vec![None] } else { rule.from.iter().map(|f| f.source.as_ref()).collect() };
    let operations: Vec<Option<&Operation>> =
        if rule.to.is_empty() { vec![None] } else { rule.to.iter().map(|t| t.operation.as_ref()).collect() };
    let strict = action == RbacAction::Allow;
    let mut out = Policy::default();
    for operation in operations {
        let mut terms: Vec<Term> = operation.into_iter().flat_map(operation_terms).collect();
        terms.extend(base_permissions.iter().cloned());
        let mut all = Vec::new();
        for t in &terms {
            all.extend(permissions(t, tcp, strict).ok()?);
        }
        if all.is_empty() {
            all.push(Permission { rule: Some(permission::Rule::Any(true)) });
        }
        out.permissions.push(Permission { rule: Some(permission::Rule::AndRules(permission::Set { rules: all })) });
    }
    for source in sources {
        let mut terms: Vec<Term> = source.into_iter().flat_map(source_terms).collect();
        terms.extend(base_principals.iter().cloned());
        let mut all = Vec::new();
        for mut t in terms {
            rename_trust_domains(cx, &mut t);
            all.extend(principals(&t, namespace, tcp, strict).ok()?);
        }
        if all.is_empty() {
            all.push(Principal { identifier: Some(principal::Identifier::Any(true)) });
        }
        out.principals.push(Principal { identifier: Some(principal::Identifier::AndIds(principal::Set { ids: all })) });
    }
    Some(out)
}

/// In istiod's order, which puts each in front of the one before.
fn source_terms(s: &Source) -> Vec<Term> {
    let all = [
        term(Attribute::Principal, &s.principals, &s.not_principals),
        term(Attribute::RequestPrincipal, &s.request_principals, &s.not_request_principals),
        term(Attribute::ServiceAccount, &s.service_accounts, &s.not_service_accounts),
        term(Attribute::TrustDomain, &s.trust_domains, &s.not_trust_domains),
        term(Attribute::Namespace, &s.namespaces, &s.not_namespaces),
        term(Attribute::RemoteIp, &s.remote_ip_blocks, &s.not_remote_ip_blocks),
        term(Attribute::SourceIp, &s.ip_blocks, &s.not_ip_blocks),
    ];
    all.into_iter().flatten().collect()
}

fn operation_terms(o: &Operation) -> Vec<Term> {
    let all = [
        term(Attribute::Host, &o.hosts, &o.not_hosts),
        term(Attribute::Method, &o.methods, &o.not_methods),
        term(Attribute::Path, &o.paths, &o.not_paths),
        term(Attribute::DestinationPort, &o.ports, &o.not_ports),
    ];
    all.into_iter().flatten().collect()
}

/// The mesh's trust domain also stands for its aliases (istiod `trustdomain.Bundle`).
fn rename_trust_domains(cx: &Context<'_>, t: &mut Term) {
    let mut domains = vec![cx.push.trust_domain().to_owned()];
    domains.extend(cx.push.mesh.trust_domain_aliases.iter().cloned());
    let principal = |name: &String| -> Vec<String> {
        let parts: Vec<&str> = name.split('/').collect();
        let [own, rest @ ..] = &parts[..] else { return vec![name.clone()] };
        let fits = |a: &str, b: &str| match (a.strip_prefix('*'), a.strip_suffix('*')) {
            _ if a == "*" => true,
            (Some(end), _) => b.ends_with(end),
            (_, Some(start)) => b.starts_with(start),
            _ => a == b,
        };
        if parts.len() != 5 || *own == "*" || !(domains.iter().any(|d| fits(own, d)) || *own == "cluster.local") {
            return vec![name.clone()];
        }
        let mut out: Vec<String> = Vec::new();
        for domain in &domains {
            let keeps = own.strip_prefix('*').is_some_and(|end| domain.ends_with(end));
            let renamed = if keeps { name.clone() } else { format!("{domain}/{}", rest.join("/")) };
            if !out.contains(&renamed) {
                out.push(renamed);
            }
        }
        out
    };
    let domain = |name: &String| if domains.contains(name) { domains.clone() } else { vec![name.clone()] };
    for list in [&mut t.values, &mut t.not_values] {
        match t.attribute {
            Attribute::Principal => *list = list.iter().flat_map(principal).collect(),
            Attribute::TrustDomain => {
                let mut seen = std::collections::HashSet::new();
                *list = list.iter().flat_map(domain).filter(|d| seen.insert(d.clone())).collect();
            }
            _ => {}
        }
    }
}

/// Keeps what could be made; a failure counts only where it would widen an ALLOW.
fn each<T>(values: &[String], strict: bool, make: impl Fn(&str) -> Made<T>) -> Made<Vec<T>> {
    let mut out = Vec::new();
    for value in values {
        match make(value) {
            Ok(made) => out.push(made),
            Err(error) if strict => return Err(error),
            Err(_) => {}
        }
    }
    Ok(out)
}

#[allow(deprecated)] // Metadata, as istiod sends it.
fn permissions(t: &Term, tcp: bool, strict: bool) -> Made<Vec<Permission>> {
    let wrap = |rule| Permission { rule: Some(rule) };
    let set = |values: &[String]| -> Made<Option<Permission>> {
        if values.is_empty() {
            return Ok(None);
        }
        if let Attribute::EnvoyFilter(key) = &t.attribute {
            return match envoy_filter(key, values) {
                Some(m) => Ok(Some(wrap(permission::Rule::Metadata(m)))),
                None if strict => Err(Unsupported),
                None => Ok(None),
            };
        }
        let rules = each(values, strict, |v| permission(&t.attribute, v, tcp))?;
        Ok((!rules.is_empty()).then(|| wrap(permission::Rule::OrRules(permission::Set { rules }))))
    };
    let not = set(&t.not_values)?.map(|p| wrap(permission::Rule::NotRule(Box::new(p))));
    Ok(set(&t.values)?.into_iter().chain(not).collect())
}

fn permission(attribute: &Attribute, value: &str, tcp: bool) -> Made<Permission> {
    let rule = match attribute {
        Attribute::DestinationIp => permission::Rule::DestinationIp(cidr(value).ok_or(Unsupported)?),
        Attribute::DestinationPort => {
            permission::Rule::DestinationPort(u32::from(value.parse::<u16>().map_err(|_| Unsupported)?))
        }
        Attribute::Sni => permission::Rule::RequestedServerName(string(value, "")),
        Attribute::Host if !tcp => permission::Rule::Header(header(":authority", value, true)),
        Attribute::Method if !tcp => permission::Rule::Header(header(":method", value, false)),
        Attribute::Path if !tcp => path(value),
        _ => return Err(Unsupported),
    };
    Ok(Permission { rule: Some(rule) })
}

fn path(value: &str) -> permission::Rule {
    if value.contains("{*}") || value.contains("{**}") {
        let template = value.replace("{**}", "**").replace("{*}", "*");
        return permission::Rule::UriTemplate(TypedExtensionConfig {
            name: "uri-template".to_owned(),
            typed_config: Some(any(&UriTemplateMatchConfig { path_template: template })),
        });
    }
    permission::Rule::UrlPath(PathMatcher { rule: Some(path_matcher::Rule::Path(string(value, ""))) })
}

fn principals(t: &Term, namespace: &str, tcp: bool, strict: bool) -> Made<Vec<Principal>> {
    let wrap = |identifier| Principal { identifier: Some(identifier) };
    let set = |values: &[String]| -> Made<Option<Principal>> {
        if values.is_empty() {
            return Ok(None);
        }
        let whole = match &t.attribute {
            Attribute::RequestPrincipal => Some(request_principal(values)),
            Attribute::Audiences => Some(claim_value(&["aud"], values)),
            Attribute::Presenter => Some(claim_value(&["azp"], values)),
            Attribute::Claims(key) => match nested_brackets(key) {
                Some(claims) => Some(claim_value(&claims, values)),
                None if strict => return Err(Unsupported),
                None => return Ok(None),
            },
            _ => None,
        };
        if let Some(whole) = whole {
            return match tcp {
                true if strict => Err(Unsupported),
                true => Ok(None),
                false => Ok(Some(whole)),
            };
        }
        let ids = each(values, strict, |v| principal(&t.attribute, v, namespace, tcp))?;
        Ok((!ids.is_empty()).then(|| wrap(principal::Identifier::OrIds(principal::Set { ids }))))
    };
    let not = set(&t.not_values)?.map(|p| wrap(principal::Identifier::NotId(Box::new(p))));
    Ok(set(&t.values)?.into_iter().chain(not).collect())
}

fn principal(attribute: &Attribute, value: &str, namespace: &str, tcp: bool) -> Made<Principal> {
    let name = |m| principal::Identifier::Authenticated(principal::Authenticated { principal_name: Some(m) });
    let identifier = match attribute {
        Attribute::SourceIp => principal::Identifier::DirectRemoteIp(cidr(value).ok_or(Unsupported)?),
        Attribute::RemoteIp => principal::Identifier::RemoteIp(cidr(value).ok_or(Unsupported)?),
        Attribute::Namespace => {
            let parts: Vec<String> = value.split('*').map(quote).collect();
            name(regex_match(&format!(".*/ns/{}/.*", parts.join(".*"))))
        }
        Attribute::ServiceAccount => {
            let (ns, account) = value.split_once('/').unwrap_or((namespace, value));
            name(regex_match(&format!("spiffe://.+/ns/{}/(.+/|)sa/{}(/.+)?", quote(ns), quote(account))))
        }
        Attribute::TrustDomain => name(match value.split_once('*') {
            Some(("", "")) => prefix("spiffe://"),
            None => prefix(&format!("spiffe://{value}/")),
            Some((a, b)) => regex_match(&format!("spiffe://{}[^/]*{}/.*", quote(a), quote(b))),
        }),
        Attribute::Principal => name(string(value, "spiffe://")),
        Attribute::Header(key) if !tcp => {
            let header_name = key.strip_prefix('[').and_then(|k| k.strip_suffix(']')).ok_or(Unsupported)?;
            principal::Identifier::Header(header(header_name, value, false))
        }
        _ => return Err(Unsupported),
    };
    Ok(Principal { identifier: Some(identifier) })
}

/// Text as a regular expression for itself (Go `regexp.QuoteMeta`).
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A value with an optional `*` at one end.
fn string(value: &str, with: &str) -> StringMatcher {
    if value == "*" {
        return regex_match(".+");
    }
    if let Some(rest) = value.strip_prefix('*') {
        return if with.is_empty() { suffix(rest) } else { regex_match(&format!("{with}.*{}", quote(rest))) };
    }
    match value.strip_suffix('*') {
        Some(rest) => prefix(&format!("{with}{rest}")),
        None => exact(&format!("{with}{value}")),
    }
}

fn header(name: &str, value: &str, ignore_case: bool) -> HeaderMatcher {
    let specifier = if value == "*" {
        HeaderMatchSpecifier::PresentMatch(true)
    } else {
        HeaderMatchSpecifier::StringMatch(StringMatcher { ignore_case, ..string(value, "") })
    };
    HeaderMatcher { name: name.to_owned(), header_match_specifier: Some(specifier), ..HeaderMatcher::default() }
}

pub(super) fn segment(key: &str) -> PathSegment {
    PathSegment { segment: Some(Segment::Key(key.to_owned())) }
}

fn value(pattern: value_matcher::MatchPattern) -> ValueMatcher {
    ValueMatcher { match_pattern: Some(pattern) }
}

fn string_value(m: StringMatcher) -> ValueMatcher {
    value(value_matcher::MatchPattern::StringMatch(m))
}

fn one_of(m: ValueMatcher) -> ValueMatcher {
    let list = ListMatcher { match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(m))) };
    value(value_matcher::MatchPattern::ListMatch(Box::new(list)))
}

fn any_of(mut matchers: Vec<ValueMatcher>) -> ValueMatcher {
    if matchers.len() == 1 {
        return matchers.remove(0);
    }
    value(value_matcher::MatchPattern::OrMatch(OrMatcher { value_matchers: matchers }))
}

/// A claim of the verified token: a list that has the value, or the value itself.
fn claim(claims: &[&str], m: ValueMatcher) -> MetadataMatcher {
    let path = std::iter::once("payload").chain(claims.iter().copied()).map(segment).collect();
    MetadataMatcher {
        filter: JWT.to_owned(),
        path,
        value: Some(any_of(vec![one_of(m.clone()), m])),
        ..MetadataMatcher::default()
    }
}

/// The same, for a plain match (routes by claim).
pub(crate) fn jwt_claim(claims: &[&str], m: StringMatcher) -> MetadataMatcher {
    claim(claims, string_value(m))
}

#[allow(deprecated)] // As istiod sends it.
fn metadata(m: MetadataMatcher) -> Principal {
    Principal { identifier: Some(principal::Identifier::Metadata(m)) }
}

fn claim_value(claims: &[&str], values: &[String]) -> Principal {
    metadata(claim(claims, any_of(values.iter().map(|v| string_value(string(v, ""))).collect())))
}

/// `ISSUER/SUBJECT` with a `*` at either end.
fn request_principal(values: &[String]) -> Principal {
    let one = |text: &String| {
        let (issuer, subject, split) = match text.rsplit_once('/') {
            Some((issuer, subject)) => (issuer, subject, true),
            None => (text.as_str(), "", false),
        };
        let anything = || regex_match(".+");
        let (issuer, subject) = if text == "*" {
            (anything(), anything())
        } else if let Some(rest) = text.strip_prefix('*') {
            if split {
                (if issuer == "*" { anything() } else { suffix(&issuer[1..]) }, exact(subject))
            } else {
                (anything(), suffix(rest))
            }
        } else if let Some(rest) = text.strip_suffix('*') {
            if split {
                let subject = if subject == "*" { anything() } else { prefix(&subject[..subject.len() - 1]) };
                (exact(issuer), subject)
            } else {
                (prefix(rest), anything())
            }
        } else {
            (exact(issuer), exact(subject))
        };
        let plain = |name: &str, m| {
            metadata(MetadataMatcher {
                filter: JWT.to_owned(),
                path: vec![segment("payload"), segment(name)],
                value: Some(string_value(m)),
                ..MetadataMatcher::default()
            })
        };
        let ids = vec![plain("iss", issuer), plain("sub", subject)];
        Principal { identifier: Some(principal::Identifier::AndIds(principal::Set { ids })) }
    };
    let mut ids: Vec<Principal> = values.iter().map(one).collect();
    if ids.len() == 1 {
        return ids.remove(0);
    }
    Principal { identifier: Some(principal::Identifier::OrIds(principal::Set { ids })) }
}

/// The names in `[a][b]`; one name with odd brackets as a whole.
fn nested_brackets(text: &str) -> Option<Vec<&str>> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    let parts: Vec<&str> = inner.split("][").collect();
    if parts.iter().any(|p| p.contains(['[', ']'])) { Some(vec![inner]) } else { Some(parts) }
}

/// Dynamic metadata of another filter: `envoy.filters.…[key]`.
fn envoy_filter(key: &str, values: &[String]) -> Option<MetadataMatcher> {
    let (filter, name) = key.strip_suffix(']').unwrap_or(key).split_once('[')?;
    let matcher = |v: &String| match v.strip_prefix('[').and_then(|v| v.strip_suffix(']')) {
        Some(inner) => one_of(string_value(string(inner, ""))),
        None => string_value(string(v, "")),
    };
    Some(MetadataMatcher {
        filter: filter.to_owned(),
        path: vec![segment(name)],
        value: Some(any_of(values.iter().map(matcher).collect())),
        ..MetadataMatcher::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_nest() {
        assert_eq!(nested_brackets("[a][b]"), Some(vec!["a", "b"]));
        assert_eq!(nested_brackets("[a[b]]"), Some(vec!["a[b]"]));
        assert_eq!(nested_brackets("a"), None);
    }

    #[test]
    fn quoting_leaves_letters_alone() {
        assert_eq!(quote("a.b-c/d"), r"a\.b-c/d");
    }
}
