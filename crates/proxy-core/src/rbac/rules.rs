use std::borrow::Cow;
use std::ops::Range;

use crate::any::Typed;
use crate::cidr::Cidr;
use crate::headers::Headers;
use crate::matchers::{FilterStateMatcher, HeaderMatcher, MetadataMatcher, Regex, StringMatcher, path_without_query};
use crate::pb;
use crate::rbac::RbacInput;
use crate::rejected::{At, Compiled, Invalid};
use crate::route::{template_regex, without_parameters};
use crate::tls::SanMatcher;

/// A condition on what is asked for.
#[derive(Debug)]
pub(super) enum Permission {
    Any,
    All(Box<[Permission]>),
    OneOf(Box<[Permission]>),
    Not(Box<Permission>),
    Header(HeaderMatcher),
    Path(StringMatcher),
    Template(Regex),
    DestinationIp(Cidr),
    DestinationPort(Range<u32>),
    Metadata(MetadataMatcher),
    RouteMetadata(MetadataMatcher),
    ServerName(StringMatcher),
    /// Set to what never holds, such as `any: false`, or HTTP conditions on TCP.
    Never,
}

/// A condition on who asks.
#[derive(Debug)]
pub(super) enum Principal {
    Any,
    All(Box<[Principal]>),
    OneOf(Box<[Principal]>),
    Not(Box<Principal>),
    /// `None`: any valid client certificate.
    Authenticated(Option<StringMatcher>),
    /// A client certificate that was verified, with such a name.
    MutualTls(Option<SanMatcher>),
    DirectRemote(Cidr),
    /// The connection's remote address: the direct one unless PROXY protocol changed it, never `x-forwarded-for`.
    ConnectionRemote(Cidr),
    Remote(Cidr),
    Header(HeaderMatcher),
    Path(StringMatcher),
    Metadata(MetadataMatcher),
    RouteMetadata(MetadataMatcher),
    FilterState(FilterStateMatcher),
    Never,
}

fn path_matcher(path: &pb::matcher::PathMatcher) -> Compiled<StringMatcher> {
    match &path.rule {
        Some(pb::matcher::path_matcher::Rule::Path(matcher)) => StringMatcher::compile(matcher).at("path"),
        None => Err(Invalid::new("rule", "is missing")),
    }
}

/// Envoy's network filter knows no headers.
fn no_headers() -> Invalid {
    Invalid::new("header", "is not supported by the network filter")
}

/// Which metadata, and the condition on it.
fn sourced(source: &pb::rbac::SourcedMetadata) -> Compiled<(MetadataMatcher, bool)> {
    let matcher = source.metadata_matcher.as_ref().ok_or_else(|| Invalid::new("metadata_matcher", "is missing"))?;
    Ok((MetadataMatcher::compile(matcher).at("metadata_matcher")?, source.metadata_source == 1))
}

impl Permission {
    pub(super) fn compile(permission: &pb::rbac::Permission, http: bool) -> Compiled<Self> {
        use pb::rbac::permission::{Rule, Set};
        let set = |set: &Set| -> Compiled<Box<[Self]>> {
            if set.rules.is_empty() {
                return Err(Invalid::new("rules", "is empty"));
            }
            set.rules.iter().enumerate().map(|(i, p)| Self::compile(p, http).at_index("rules", i)).collect()
        };
        Ok(match permission.rule.as_ref().ok_or_else(|| Invalid::new("rule", "is missing"))? {
            Rule::Any(true) => Self::Any,
            Rule::Any(false) => return Err(Invalid::new("any", "must be true")),
            Rule::AndRules(rules) => Self::All(set(rules).at("and_rules")?),
            Rule::OrRules(rules) => Self::OneOf(set(rules).at("or_rules")?),
            Rule::NotRule(rule) => Self::Not(Box::new(Self::compile(rule, http).at("not_rule")?)),
            Rule::Header(_) if !http => return Err(no_headers()),
            Rule::Header(header) => Self::Header(HeaderMatcher::compile(header).at("header")?),
            Rule::UrlPath(path) => {
                let matcher = path_matcher(path).at("url_path")?;
                if http { Self::Path(matcher) } else { Self::Never }
            }
            Rule::DestinationIp(range) => Self::DestinationIp(Cidr::compile(range).at("destination_ip")?),
            Rule::DestinationPort(port) if *port <= 65_535 => Self::DestinationPort(*port..port + 1),
            Rule::DestinationPort(port) => return Err(Invalid::new("destination_port", format!("{port} is no port"))),
            Rule::DestinationPortRange(range) => match (u32::try_from(range.start), u32::try_from(range.end)) {
                (Ok(start), Ok(end)) if start < end && end <= 65_536 => Self::DestinationPort(start..end),
                _ => return Err(Invalid::new("destination_port_range", "is no range of ports")),
            },
            Rule::Metadata(matcher) => Self::Metadata(MetadataMatcher::compile(matcher).at("metadata")?),
            Rule::RequestedServerName(matcher) => {
                Self::ServerName(StringMatcher::compile(matcher).at("requested_server_name")?)
            }
            Rule::UriTemplate(extension) => {
                let typed = Typed::open(extension.typed_config.as_ref()).at("uri_template")?;
                if typed.name != "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" {
                    return Err(typed.unknown()).at("uri_template");
                }
                let config: pb::ext::path::r#match::uri_template::v3::UriTemplateMatchConfig = typed.decode()?;
                let regex = template_regex(&config.path_template).at("uri_template")?;
                if http { Self::Template(regex) } else { Self::Never }
            }
            Rule::SourcedMetadata(source) => match sourced(source).at("sourced_metadata")? {
                (matcher, true) => Self::RouteMetadata(matcher),
                (matcher, false) => Self::Metadata(matcher),
            },
            Rule::Matcher(extension) => {
                return Err(Invalid::new("matcher", format!("{} is not supported", extension.name)));
            }
        })
    }

    pub(super) fn matches(&self, input: &RbacInput<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::Never => false,
            Self::All(all) => all.iter().all(|p| p.matches(input)),
            Self::OneOf(any) => any.iter().any(|p| p.matches(input)),
            Self::Not(inner) => !inner.matches(input),
            Self::Header(header) => input.headers.is_some_and(|h| header.matches(h)),
            Self::Path(path) => path_of(input).is_some_and(|p| path.matches(p.as_bytes())),
            Self::Template(regex) => path_of(input).is_some_and(|p| regex.matches(p.as_bytes())),
            Self::DestinationIp(range) => input.connection.local.ip().is_some_and(|ip| range.contains(ip)),
            Self::DestinationPort(ports) => {
                input.connection.local.port().is_some_and(|p| ports.contains(&u32::from(p)))
            }
            Self::Metadata(matcher) => matcher.matches(input.metadata),
            Self::RouteMetadata(matcher) => input.route.is_some_and(|m| matcher.matches(&m.route.metadata)),
            Self::ServerName(name) => {
                name.matches(input.connection.server_name.as_deref().unwrap_or_default().as_bytes())
            }
        }
    }
}

impl Principal {
    pub(super) fn compile(principal: &pb::rbac::Principal, http: bool) -> Compiled<Self> {
        use pb::rbac::principal::{Identifier, Set};
        let set = |set: &Set| -> Compiled<Box<[Self]>> {
            if set.ids.is_empty() {
                return Err(Invalid::new("ids", "is empty"));
            }
            set.ids.iter().enumerate().map(|(i, p)| Self::compile(p, http).at_index("ids", i)).collect()
        };
        Ok(match principal.identifier.as_ref().ok_or_else(|| Invalid::new("identifier", "is missing"))? {
            Identifier::Any(true) => Self::Any,
            Identifier::Any(false) => return Err(Invalid::new("any", "must be true")),
            Identifier::AndIds(ids) => Self::All(set(ids).at("and_ids")?),
            Identifier::OrIds(ids) => Self::OneOf(set(ids).at("or_ids")?),
            Identifier::NotId(id) => Self::Not(Box::new(Self::compile(id, http).at("not_id")?)),
            Identifier::Authenticated(authenticated) => {
                let name = authenticated.principal_name.as_ref().map(StringMatcher::compile).transpose();
                Self::Authenticated(name.at("authenticated.principal_name")?)
            }
            Identifier::SourceIp(range) => Self::ConnectionRemote(Cidr::compile(range).at("source_ip")?),
            Identifier::DirectRemoteIp(range) => Self::DirectRemote(Cidr::compile(range).at("direct_remote_ip")?),
            Identifier::RemoteIp(range) => Self::Remote(Cidr::compile(range).at("remote_ip")?),
            Identifier::Header(_) if !http => return Err(no_headers()),
            Identifier::Header(header) => Self::Header(HeaderMatcher::compile(header).at("header")?),
            Identifier::UrlPath(path) => {
                let matcher = path_matcher(path).at("url_path")?;
                if http { Self::Path(matcher) } else { Self::Never }
            }
            Identifier::Metadata(matcher) => Self::Metadata(MetadataMatcher::compile(matcher).at("metadata")?),
            Identifier::FilterState(matcher) => {
                Self::FilterState(FilterStateMatcher::compile(matcher).at("filter_state")?)
            }
            Identifier::SourcedMetadata(source) => match sourced(source).at("sourced_metadata")? {
                (matcher, true) => Self::RouteMetadata(matcher),
                (matcher, false) => Self::Metadata(matcher),
            },
            Identifier::Custom(extension) => {
                let typed = Typed::open(extension.typed_config.as_ref()).at("custom")?;
                if typed.name != "envoy.extensions.rbac.principals.mtls_authenticated.v3.Config" {
                    return Err(typed.unknown()).at("custom");
                }
                let config: pb::ext::rbac::principals::mtls_authenticated::v3::Config = typed.decode()?;
                if config.san_matcher.is_none() && !config.any_validated_client_certificate {
                    return Err(Invalid::new("custom", "says nothing of the certificate"));
                }
                let san = config.san_matcher.as_ref().map(SanMatcher::compile).transpose();
                Self::MutualTls(san.at("custom.san_matcher")?)
            }
        })
    }

    pub(super) fn matches(&self, input: &RbacInput<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::Never => false,
            Self::All(all) => all.iter().all(|p| p.matches(input)),
            Self::OneOf(any) => any.iter().any(|p| p.matches(input)),
            Self::Not(inner) => !inner.matches(input),
            Self::Authenticated(name) => authenticated(name.as_ref(), input),
            Self::MutualTls(san) => {
                let peer = input.connection.tls.as_ref().and_then(|tls| tls.peer.as_ref()).filter(|p| p.validated);
                peer.is_some_and(|peer| san.as_ref().is_none_or(|san| san.matches(peer)))
            }
            Self::DirectRemote(range) => input.connection.direct_remote.ip().is_some_and(|ip| range.contains(ip)),
            Self::ConnectionRemote(range) => input.connection.remote.ip().is_some_and(|ip| range.contains(ip)),
            Self::Remote(range) => input.remote.ip().is_some_and(|ip| range.contains(ip)),
            Self::Header(header) => input.headers.is_some_and(|h| header.matches(h)),
            Self::Path(path) => path_of(input).is_some_and(|p| path.matches(p.as_bytes())),
            Self::Metadata(matcher) => matcher.matches(input.metadata),
            Self::RouteMetadata(matcher) => input.route.is_some_and(|m| matcher.matches(&m.route.metadata)),
            Self::FilterState(matcher) => matcher.matches(input.filter_state),
        }
    }
}

/// The path as the route table matches paths.
fn path_of<'a>(input: &RbacInput<'a>) -> Option<Cow<'a, str>> {
    let path = input.headers.and_then(Headers::path).map(path_without_query)?;
    let without = input.route.is_some_and(|route| route.table.ignore_path_parameters);
    Some(if without { without_parameters(path) } else { path.into() })
}

/// Envoy `AuthenticatedMatcher`: without a name any TLS connection will do; else a URI SAN, a DNS SAN or the subject.
fn authenticated(name: Option<&StringMatcher>, input: &RbacInput<'_>) -> bool {
    let Some(tls) = &input.connection.tls else { return false };
    let Some(name) = name else { return true };
    let Some(peer) = &tls.peer else { return name.matches(b"") };
    let mut names = peer.uri_sans.iter().chain(&peer.dns_sans).chain([&peer.subject]);
    names.any(|own| name.matches(own.as_bytes()))
}
