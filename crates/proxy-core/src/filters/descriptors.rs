//! What a request is counted as: the descriptors that routes and the local rate limit make of it.

use mesh_types::ArcStr;

use crate::address::Address;
use crate::cidr::Cidr;
use crate::fields;
use crate::format::{Format, FormatContext};
use crate::headers::Headers;
use crate::matchers::{HeaderMatcher, QueryMatcher, canonical_name, first_query_value, header_matchers};
use crate::metadata::Metadata;
use crate::pb;
use crate::pb::xds;
use crate::rejected::{At, Compiled, Invalid, refuse};

/// How a route makes descriptors (`route.v3.RateLimit`).
#[derive(Clone, Debug)]
pub struct RateLimitRule {
    pub(super) stage: u32,
    actions: Vec<Action>,
    hits: Option<Hits>,
}

/// How many requests one counts for.
#[derive(Clone, Debug)]
enum Hits {
    Number(u64),
    Format(Format),
}

/// Envoy's bound of `hits_addend`.
const MAX_HITS: u64 = 1_000_000_000;

#[derive(Clone, Debug)]
enum Action {
    GenericKey(ArcStr, ArcStr),
    SourceCluster,
    DestinationCluster,
    RemoteAddress,
    MaskedRemoteAddress { v4: u8, v6: u8 },
    RemoteAddressMatch { key: ArcStr, value: Format, default: ArcStr, ranges: Vec<Cidr>, invert: bool },
    Header { name: Box<str>, key: ArcStr, skip: bool },
    Query { name: Box<str>, key: ArcStr, skip: bool },
    HeaderMatch { key: ArcStr, value: ArcStr, expect: bool, headers: Box<[HeaderMatcher]> },
    QueryMatch { key: ArcStr, value: ArcStr, expect: bool, parameters: Vec<QueryMatcher> },
    Metadata { key: ArcStr, of_route: bool, namespace: ArcStr, path: Vec<ArcStr>, default: ArcStr, skip: bool },
}

/// What descriptors are made of.
#[derive(Clone, Copy, Debug)]
pub struct RateLimitContext<'a> {
    /// Request head.
    pub headers: &'a Headers,
    /// The trusted client address.
    pub remote: &'a Address,
    /// This proxy's `--service-cluster`.
    pub local_cluster: &'a str,
    /// The route's cluster.
    pub cluster: &'a str,
    /// What filters have found out.
    pub metadata: &'a Metadata,
    /// The route's.
    pub route_metadata: Option<&'a Metadata>,
    /// For formats.
    pub format: FormatContext<'a>,
}

/// One descriptor of a request: keys with their values, in order.
pub(super) type Entries = Vec<(String, String)>;

impl RateLimitRule {
    /// Rules of a virtual host or route.
    pub(crate) fn compile_all(limits: &[pb::route::RateLimit]) -> Compiled<Vec<Self>> {
        limits.iter().enumerate().map(|(i, l)| Self::compile(l, false).at_index("rate_limits", i)).collect()
    }

    /// Rules of the filter itself, which know no stages.
    pub(super) fn compile_own(limits: &[pb::route::RateLimit]) -> Compiled<Vec<Self>> {
        limits.iter().enumerate().map(|(i, l)| Self::compile(l, true).at_index("rate_limits", i)).collect()
    }

    fn compile(limit: &pb::route::RateLimit, own: bool) -> Compiled<Self> {
        if own && (limit.stage.is_some() || !limit.disable_key.is_empty()) {
            return Err(Invalid::new("", "'stage' field and 'disable_key' field are not supported"));
        }
        refuse!("apply_on_stream_done": limit.apply_on_stream_done);
        if own {
            refuse!("limit": limit.limit.is_some());
        }
        let actions = limit.actions.iter().enumerate().map(|(i, a)| Action::compile(a).at_index("actions", i));
        Ok(Self {
            stage: fields::uint(limit.stage.as_ref(), 0),
            actions: actions.collect::<Compiled<_>>()?,
            hits: limit.hits_addend.as_ref().map(Hits::compile).transpose().at("hits_addend")?,
        })
    }

    /// The descriptor's entries; `None`: an action gave nothing, so there is no descriptor.
    pub(super) fn entries(&self, cx: &RateLimitContext<'_>) -> Option<Entries> {
        let mut entries = Vec::new();
        for action in &self.actions {
            match action.entry(cx) {
                Entry::Is(key, value) => entries.push((key, value)),
                Entry::LeftOut => {}
                Entry::Nothing => return None,
            }
        }
        Some(entries)
    }

    /// How many requests this one counts for; `None`: that cannot be told, and the descriptor does not count.
    pub(super) fn hits(&self, cx: &RateLimitContext<'_>) -> Option<u32> {
        let hits = match &self.hits {
            None => 1,
            Some(Hits::Number(number)) => *number,
            Some(Hits::Format(format)) => {
                let mut text = Vec::new();
                format.write(&cx.format, &mut text);
                std::str::from_utf8(&text).ok()?.parse().ok().filter(|n| *n <= MAX_HITS)?
            }
        };
        u32::try_from(hits).ok()
    }
}

impl Hits {
    fn compile(hits: &pb::route::rate_limit::HitsAddend) -> Compiled<Self> {
        match (&hits.number, hits.format.as_str()) {
            (Some(_), text) if !text.is_empty() => Err(Invalid::new("", "only one of number and format may be set")),
            (Some(number), _) if number.value > MAX_HITS => {
                Err(Invalid::new("number", format!("must be at most {MAX_HITS}")))
            }
            (Some(number), _) => Ok(Self::Number(number.value)),
            (None, text) if !text.starts_with('%') => Err(Invalid::new("format", "must be one command")),
            (None, text) => Ok(Self::Format(Format::compile(text, true).at("format")?)),
        }
    }
}

/// What an action makes of a request.
enum Entry {
    Is(String, String),
    /// Nothing, and the others count without it.
    LeftOut,
    /// Nothing, so that there is no descriptor.
    Nothing,
}

impl Entry {
    fn missing(skip: bool) -> Self {
        if skip { Self::LeftOut } else { Self::Nothing }
    }
}

impl Action {
    fn compile(action: &pb::route::rate_limit::Action) -> Compiled<Self> {
        use pb::route::rate_limit::action::ActionSpecifier as Kind;
        let key = |key: &str, default: &str| -> ArcStr { if key.is_empty() { default.into() } else { key.into() } };
        Ok(match action.action_specifier.as_ref().ok_or_else(|| Invalid::new("action_specifier", "is missing"))? {
            Kind::GenericKey(a) => {
                Self::GenericKey(key(&a.descriptor_key, "generic_key"), literal(&a.descriptor_value, &a.default_value)?)
            }
            Kind::SourceCluster(_) => Self::SourceCluster,
            Kind::DestinationCluster(_) => Self::DestinationCluster,
            Kind::RemoteAddress(_) => Self::RemoteAddress,
            Kind::MaskedRemoteAddress(a) => Self::MaskedRemoteAddress {
                v4: fields::uint(a.v4_prefix_mask_len.as_ref(), 32).min(32) as u8,
                v6: fields::uint(a.v6_prefix_mask_len.as_ref(), 128).min(128) as u8,
            },
            Kind::RemoteAddressMatch(a) => {
                let matcher =
                    a.address_matcher.as_ref().ok_or_else(|| Invalid::new("address_matcher", "is missing"))?;
                let range = |range: &xds::CidrRange| {
                    let length = range.prefix_len.as_ref().map(|l| pb::UInt32Value { value: l.value });
                    let address_prefix = range.address_prefix.clone();
                    Cidr::compile(&pb::core::CidrRange { address_prefix, prefix_len: length })
                };
                Self::RemoteAddressMatch {
                    key: key(&a.descriptor_key, "remote_address_match"),
                    value: Format::compile(&a.descriptor_value, true).at("descriptor_value")?,
                    default: a.default_value.as_str().into(),
                    ranges: matcher.ranges.iter().map(range).collect::<Compiled<_>>().at("address_matcher.ranges")?,
                    invert: matcher.invert_match,
                }
            }
            Kind::RequestHeaders(a) => Self::Header {
                name: canonical_name(&a.header_name).into(),
                key: a.descriptor_key.as_str().into(),
                skip: a.skip_if_absent,
            },
            Kind::QueryParameters(a) => Self::Query {
                name: a.query_parameter_name.as_str().into(),
                key: a.descriptor_key.as_str().into(),
                skip: a.skip_if_absent,
            },
            Kind::HeaderValueMatch(a) => Self::HeaderMatch {
                key: key(&a.descriptor_key, "header_match"),
                value: literal(&a.descriptor_value, &a.default_value)?,
                expect: fields::flag(a.expect_match.as_ref(), true),
                headers: header_matchers("headers", &a.headers)?,
            },
            Kind::QueryParameterValueMatch(a) => Self::QueryMatch {
                key: key(&a.descriptor_key, "query_match"),
                value: literal(&a.descriptor_value, &a.default_value)?,
                expect: fields::flag(a.expect_match.as_ref(), true),
                parameters: a
                    .query_parameters
                    .iter()
                    .enumerate()
                    .map(|(i, m)| QueryMatcher::compile(m).at_index("query_parameters", i))
                    .collect::<Compiled<_>>()?,
            },
            Kind::Metadata(a) => {
                use pb::metadata_key::metadata_key::path_segment::Segment;
                use pb::route::rate_limit::action::meta_data::Source;
                let from = a.metadata_key.as_ref().ok_or_else(|| Invalid::new("metadata_key", "is missing"))?;
                let segment = |s: &pb::metadata_key::metadata_key::PathSegment| match &s.segment {
                    Some(Segment::Key(key)) => Ok(ArcStr::from(key.as_str())),
                    Some(Segment::Index(_)) => Err(Invalid::unsupported("index")),
                    None => Err(Invalid::new("segment", "is missing")),
                };
                Self::Metadata {
                    key: a.descriptor_key.as_str().into(),
                    of_route: a.source == i32::from(Source::RouteEntry),
                    namespace: from.key.as_str().into(),
                    path: from.path.iter().map(segment).collect::<Compiled<_>>().at("metadata_key.path")?,
                    default: a.default_value.as_str().into(),
                    skip: a.skip_if_absent,
                }
            }
            _ => return Err(Invalid::unsupported("action_specifier")),
        })
    }

    fn entry(&self, cx: &RateLimitContext<'_>) -> Entry {
        let text = |v: &[u8]| String::from_utf8_lossy(v).into_owned();
        let is = |key: &str, value: &str| Entry::Is(key.to_owned(), value.to_owned());
        let remote = cx.remote.ip();
        match self {
            Self::GenericKey(key, value) => is(key, value),
            Self::SourceCluster => is("source_cluster", cx.local_cluster),
            Self::DestinationCluster => is("destination_cluster", cx.cluster),
            Self::RemoteAddress => match remote {
                Some(ip) => is("remote_address", &ip.to_string()),
                None => Entry::Nothing,
            },
            Self::MaskedRemoteAddress { v4, v6 } => {
                let Some(ip) = remote else { return Entry::Nothing };
                let length = if ip.is_ipv4() { *v4 } else { *v6 };
                is("masked_remote_address", &Cidr::of(ip, length.into()).to_string())
            }
            Self::RemoteAddressMatch { key, value, default, ranges, invert } => {
                if remote.is_some_and(|ip| ranges.iter().any(|range| range.contains(ip))) == *invert {
                    return Entry::Nothing;
                }
                let mut out = Vec::new();
                value.write(&cx.format, &mut out);
                match (out.is_empty(), default.is_empty()) {
                    (false, _) => is(key, &text(&out)),
                    (true, false) => is(key, default),
                    (true, true) => Entry::Nothing,
                }
            }
            Self::Header { name, key, skip } => match cx.headers.get(name) {
                Some(value) => is(key, &text(value)),
                None => Entry::missing(*skip),
            },
            Self::Query { name, key, skip } => match first_query_value(cx.headers.path().unwrap_or_default(), name) {
                Some(value) => is(key, value),
                None => Entry::missing(*skip),
            },
            Self::HeaderMatch { key, value, expect, headers } => {
                match headers.iter().all(|m| m.matches(cx.headers)) == *expect {
                    true => is(key, value),
                    false => Entry::Nothing,
                }
            }
            Self::QueryMatch { key, value, expect, parameters } => {
                let path = cx.headers.path().unwrap_or_default();
                match parameters.iter().all(|m| m.matches(path)) == *expect {
                    true => is(key, value),
                    false => Entry::Nothing,
                }
            }
            Self::Metadata { key, of_route, namespace, path, default, skip } => {
                let source = if *of_route { cx.route_metadata } else { Some(cx.metadata) };
                let value = source.and_then(|metadata| metadata.get(namespace, path)).and_then(|v| v.as_str());
                match (value.unwrap_or_default(), &**default) {
                    ("", "") => Entry::missing(*skip),
                    ("", default) => is(key, default),
                    (value, _) => is(key, value),
                }
            }
        }
    }
}

/// Values stand for themselves: Envoy takes formats only behind a runtime flag that is off.
fn literal(value: &str, default: &str) -> Compiled<ArcStr> {
    Ok(if value.is_empty() { default.into() } else { value.into() })
}
