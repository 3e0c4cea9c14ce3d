use std::borrow::Cow;
use std::net::IpAddr;

use mesh_types::ArcStr;
use serde_json::Value;

use crate::address::Address;
use crate::any::Typed;
use crate::fields;
use crate::format::{FormatContext, percent_decode};
use crate::headers::Headers;
use crate::listener::is_same_ip_or_loopback;
use crate::matchers::{canonical_name, first_query_value};
use crate::metadata::{FilterState, Metadata};
use crate::pb;
use crate::pb::ext::matching::common_inputs::{environment_variable, network::v3 as network};
use crate::pb::matcher as http;
use crate::rejected::{Compiled, Invalid};
use crate::stream_info::{ConnectionInfo, PeerCertificate, StreamInfo, TlsInfo};

/// What conditions may look at. Who evaluates a tree fills in what its [`Place`] may ask for.
#[derive(Clone, Copy, Debug, Default)]
pub struct MatchData<'a> {
    /// Where the connection wanted to go.
    pub local: Option<&'a Address>,
    /// Where it came from; of requests, the trusted client address.
    pub remote: Option<&'a Address>,
    /// The socket's peer.
    pub direct_remote: Option<&'a Address>,
    /// SNI; empty without.
    pub server_name: &'a str,
    /// `tls` or `raw_buffer`; empty: not detected.
    pub transport_protocol: &'a str,
    /// In the client's order.
    pub application_protocols: &'a [Vec<u8>],
    /// The downstream handshake.
    pub tls: Option<&'a TlsInfo>,
    /// Written by filters.
    pub filter_state: Option<&'a FilterState>,
    /// Written by filters.
    pub metadata: Option<&'a Metadata>,
    /// Request head.
    pub request: Option<&'a Headers>,
    /// Head of the answer, once there is one.
    pub response: Option<&'a Headers>,
    /// What expressions look at besides.
    pub stream: Option<&'a StreamInfo>,
}

impl<'a> MatchData<'a> {
    /// What a connection says.
    pub fn of_connection(connection: &'a ConnectionInfo) -> Self {
        Self {
            local: Some(&connection.local),
            remote: Some(&connection.remote),
            direct_remote: Some(&connection.direct_remote),
            server_name: connection.server_name.as_deref().unwrap_or_default(),
            transport_protocol: connection.transport_protocol,
            application_protocols: &connection.application_protocols,
            tls: connection.tls.as_deref(),
            filter_state: Some(&connection.filter_state),
            ..Self::default()
        }
    }

    /// What a request says that has come so far.
    pub fn of_stream(stream: &'a StreamInfo, request: Option<&'a Headers>, response: Option<&'a Headers>) -> Self {
        Self {
            remote: Some(&stream.remote),
            filter_state: Some(&stream.filter_state),
            metadata: Some(&stream.dynamic_metadata),
            request,
            response,
            stream: Some(stream),
            ..Self::of_connection(&stream.connection)
        }
    }
}

/// Where a tree stands; that decides what it may look at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// RBAC of requests.
    HttpRbac,
    /// RBAC of connections.
    NetworkRbac,
    /// Routes of a virtual host.
    VirtualHost,
    /// Filter chains of a listener.
    Listener,
    /// A filter that may be passed over.
    Filter,
    /// The same, at a route.
    FilterOfRoute,
}

impl Place {
    pub(super) fn may_keep_matching(self) -> bool {
        self == Place::Listener
    }

    /// Whether Envoy has such an input there, and lets it be used (`ActionValidationVisitor` of RBAC,
    /// `RouteActionValidationVisitor`, `FilterConfigPerRoute::createFilterMatchTree`).
    fn allows(self, input: &Input) -> bool {
        use Input as I;
        match self {
            Place::HttpRbac | Place::NetworkRbac => match input {
                I::RequestHeader(_) | I::Metadata { .. } | I::Attributes => self == Place::HttpRbac,
                I::DestinationIp | I::DestinationPort | I::SourceIp | I::SourcePort | I::DirectSourceIp => true,
                I::ServerName | I::FilterState { .. } | I::Nowhere => true,
                I::UriSan | I::DnsSan | I::Subject => true,
                _ => false,
            },
            Place::VirtualHost => matches!(input, I::RequestHeader(_) | I::FilterState { .. } | I::Nowhere),
            Place::Listener => !input.is_http(),
            Place::Filter => !matches!(input, I::TransportProtocol | I::ApplicationProtocol),
            Place::FilterOfRoute => {
                let heads = matches!(input, I::RequestHeader(_) | I::ResponseHeader(_) | I::ResponseTrailer);
                heads || matches!(input, I::Attributes | I::Nowhere)
            }
        }
    }
}

/// Something that a condition looks at.
#[derive(Clone, Debug)]
pub(super) enum Input {
    DestinationIp,
    DestinationPort,
    SourceIp,
    SourcePort,
    DirectSourceIp,
    /// `local` or nothing.
    SourceType,
    ServerName,
    TransportProtocol,
    ApplicationProtocol,
    /// Where nothing is found: variables of the environment, whose values do not reach conditions in Envoy 1.40 either, and network
    /// namespaces, since listeners here open their sockets in this one.
    Nowhere,
    UriSan,
    DnsSan,
    Subject,
    FilterState {
        key: Box<str>,
        of_field: bool,
    },
    Metadata {
        namespace: Box<str>,
        path: Box<[Box<str>]>,
    },
    RequestHeader(Box<str>),
    ResponseHeader(Box<str>),
    /// Trees are not asked again when trailers come.
    RequestTrailer,
    ResponseTrailer,
    QueryParameter(Box<str>),
    StatusCode,
    StatusClass,
    Attributes,
}

/// What an input has.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// It may still come.
    NotYet,
    /// Nothing.
    Missing,
    Text(Cow<'a, [u8]>),
    /// A value of metadata, which may not be there. Conditions on text do not hold for it.
    Value(Option<&'a Value>),
    /// All attributes, for expressions.
    Attributes(FormatContext<'a>),
}

/// `HTTP_HEADER_NAME`, not strict.
fn header_name(name: &str) -> Compiled<Box<str>> {
    match name.bytes().any(|b| matches!(b, 0 | b'\r' | b'\n')) {
        true => Err(Invalid::new("header_name", "must not contain NUL, CR or LF")),
        false => Ok(canonical_name(name).into()),
    }
}

fn some(field: &str, text: &str) -> Compiled<Box<str>> {
    fields::required(field, text).map(|text| (*text).into())
}

impl Input {
    pub(super) fn compile(extension: Option<&pb::xds::TypedExtensionConfig>, place: Place) -> Compiled<Self> {
        let extension = extension.ok_or_else(|| Invalid::new("", "is missing"))?;
        let typed = Typed::open(extension.typed_config.as_ref())?;
        let input = Self::of(&typed)?;
        if place.allows(&input) {
            return Ok(input);
        }
        Err(Invalid::new("typed_config", format!("{} cannot be matched on here", typed.name)))
    }

    fn of(typed: &Typed<'_>) -> Compiled<Self> {
        if let Some(name) = typed.name.strip_prefix("envoy.extensions.matching.common_inputs.") {
            return Self::common(name, typed);
        }
        Ok(match typed.name.as_str() {
            "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
                Self::RequestHeader(header_name(&typed.decode::<http::HttpRequestHeaderMatchInput>()?.header_name)?)
            }
            "envoy.type.matcher.v3.HttpResponseHeaderMatchInput" => {
                Self::ResponseHeader(header_name(&typed.decode::<http::HttpResponseHeaderMatchInput>()?.header_name)?)
            }
            "envoy.type.matcher.v3.HttpRequestTrailerMatchInput" => {
                header_name(&typed.decode::<http::HttpRequestTrailerMatchInput>()?.header_name)?;
                Self::RequestTrailer
            }
            "envoy.type.matcher.v3.HttpResponseTrailerMatchInput" => {
                header_name(&typed.decode::<http::HttpResponseTrailerMatchInput>()?.header_name)?;
                Self::ResponseTrailer
            }
            "envoy.type.matcher.v3.HttpRequestQueryParamMatchInput" => {
                let config: http::HttpRequestQueryParamMatchInput = typed.decode()?;
                Self::QueryParameter(some("query_param", &config.query_param)?)
            }
            "envoy.type.matcher.v3.HttpResponseStatusCodeMatchInput" => Self::StatusCode,
            "envoy.type.matcher.v3.HttpResponseStatusCodeClassMatchInput" => Self::StatusClass,
            "xds.type.matcher.v3.HttpAttributesCelMatchInput" => Self::Attributes,
            _ => return Err(typed.unknown()),
        })
    }

    fn common(name: &str, typed: &Typed<'_>) -> Compiled<Self> {
        Ok(match name {
            "network.v3.DestinationIPInput" => Self::DestinationIp,
            "network.v3.DestinationPortInput" => Self::DestinationPort,
            "network.v3.SourceIPInput" => Self::SourceIp,
            "network.v3.SourcePortInput" => Self::SourcePort,
            "network.v3.DirectSourceIPInput" => Self::DirectSourceIp,
            "network.v3.SourceTypeInput" => Self::SourceType,
            "network.v3.ServerNameInput" => Self::ServerName,
            "network.v3.TransportProtocolInput" => Self::TransportProtocol,
            "network.v3.ApplicationProtocolInput" => Self::ApplicationProtocol,
            "network.v3.NetworkNamespaceInput" => Self::Nowhere,
            "network.v3.FilterStateInput" => {
                let config: network::FilterStateInput = typed.decode()?;
                Self::FilterState { key: some("key", &config.key)?, of_field: !config.field.is_empty() }
            }
            "network.v3.DynamicMetadataInput" => {
                use network::dynamic_metadata_input::path_segment::Segment;
                let config: network::DynamicMetadataInput = typed.decode()?;
                let keys = config.path.iter().map(|part| match &part.segment {
                    Some(Segment::Key(key)) => some("path", key),
                    None => Err(Invalid::new("path", "has an empty key")),
                });
                let path: Box<[Box<str>]> = keys.collect::<Compiled<_>>()?;
                if path.is_empty() {
                    return Err(Invalid::new("path", "is empty"));
                }
                Self::Metadata { namespace: some("filter", &config.filter)?, path }
            }
            "ssl.v3.UriSanInput" => Self::UriSan,
            "ssl.v3.DnsSanInput" => Self::DnsSan,
            "ssl.v3.SubjectInput" => Self::Subject,
            "environment_variable.v3.Config" => {
                let config: environment_variable::v3::Config = typed.decode()?;
                fields::required("name", &config.name)?;
                Self::Nowhere
            }
            _ => return Err(typed.unknown()),
        })
    }

    /// Whether there must be a request for it.
    fn is_http(&self) -> bool {
        use Input as I;
        let of_head = matches!(self, I::RequestHeader(_) | I::ResponseHeader(_) | I::QueryParameter(_) | I::Attributes);
        let of_answer = matches!(self, I::RequestTrailer | I::ResponseTrailer | I::StatusCode | I::StatusClass);
        of_head || of_answer || matches!(self, I::Metadata { .. })
    }

    pub(super) fn find<'a>(&self, data: &MatchData<'a>) -> Found<'a> {
        let text = |text: Option<String>| text.map_or(Found::Missing, |text| Found::Text(text.into_bytes().into()));
        let ip = |address: Option<&Address>| text(address.and_then(Address::ip).map(|ip: IpAddr| ip.to_string()));
        let port = |address: Option<&Address>| text(address.and_then(Address::port).map(|port| port.to_string()));
        let plain = |plain: &'a str| match plain {
            "" => Found::Missing,
            plain => Found::Text(plain.as_bytes().into()),
        };
        // Without TLS, certificates may still come, to Envoy.
        let peer = |show: &dyn Fn(&'a PeerCertificate) -> Found<'a>| match data.tls {
            None => Found::NotYet,
            Some(tls) => tls.peer.as_ref().map_or(Found::Missing, show),
        };
        let names = |names: &[ArcStr]| text((!names.is_empty()).then(|| names.join(",")));
        let header = |headers: Option<&'a Headers>, name: &str| match headers {
            None => Found::NotYet,
            Some(headers) => headers.joined(name).map_or(Found::Missing, Found::Text),
        };
        match self {
            Input::DestinationIp => ip(data.local),
            Input::DestinationPort => port(data.local),
            Input::SourceIp => ip(data.remote),
            Input::SourcePort => port(data.remote),
            Input::DirectSourceIp => ip(data.direct_remote),
            Input::SourceType => match (data.remote, data.local) {
                (Some(remote), Some(local)) if is_same_ip_or_loopback(remote, local) => plain("local"),
                _ => Found::Missing,
            },
            Input::ServerName => plain(data.server_name),
            Input::TransportProtocol => plain(data.transport_protocol),
            Input::ApplicationProtocol => match data.application_protocols {
                [] => Found::Missing,
                all => Found::Text([b"'", &all.join(&b"','"[..])[..], b"'"].concat().into()),
            },
            Input::Nowhere => Found::Missing,
            Input::UriSan => peer(&|peer| names(&peer.uri_sans)),
            Input::DnsSan => peer(&|peer| names(&peer.dns_sans)),
            Input::Subject => peer(&|peer| plain(&peer.subject)),
            // Texts have no fields.
            Input::FilterState { of_field: true, .. } => Found::Missing,
            Input::FilterState { key, .. } => {
                let value = data.filter_state.and_then(|state| state.values.get(&**key));
                value.map_or(Found::Missing, |value| Found::Text(value.as_bytes().into()))
            }
            Input::Metadata { namespace, path } => {
                Found::Value(data.metadata.and_then(|metadata| metadata.get(namespace, path)))
            }
            Input::RequestHeader(name) => header(data.request, name),
            Input::ResponseHeader(name) => header(data.response, name),
            Input::RequestTrailer | Input::ResponseTrailer => Found::NotYet,
            Input::QueryParameter(name) => match data.request.and_then(Headers::path) {
                None => Found::NotYet,
                Some(path) => match first_query_value(path, name) {
                    None => Found::Missing,
                    Some(value) => {
                        let mut decoded = Vec::with_capacity(value.len());
                        percent_decode(value, &mut decoded);
                        Found::Text(decoded.into())
                    }
                },
            },
            Input::StatusCode => match data.response.and_then(Headers::status) {
                None => Found::NotYet,
                Some(status) => text(Some(status.to_string())),
            },
            Input::StatusClass => match data.response.and_then(Headers::status) {
                None => Found::NotYet,
                Some(status) => text(Some(format!("{}xx", status / 100))),
            },
            Input::Attributes => match data.stream {
                None => Found::Missing,
                Some(stream) => Found::Attributes(FormatContext::new(stream, data.request, data.response)),
            },
        }
    }
}
