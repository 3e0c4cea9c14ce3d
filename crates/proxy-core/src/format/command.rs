use std::time::Duration;

use mesh_types::ArcStr;

use crate::cel::Expression;
use crate::format::time::TimeFormat;

/// One `%COMMAND%` of a format.
#[derive(Clone, Debug)]
pub enum Command {
    /// A header of the request: name, fallback name.
    Request(Box<str>, Option<Box<str>>),
    /// As before with the query cut off (`REQ_WITHOUT_QUERY`).
    RequestWithoutQuery(Box<str>, Option<Box<str>>),
    /// A header of the response.
    Response(Box<str>, Option<Box<str>>),
    /// A trailer of the response.
    Trailer(Box<str>, Option<Box<str>>),
    /// One query parameter, decoded.
    QueryParameter(Box<str>),
    /// Start of the stream.
    StartTime(TimeFormat),
    /// The moment of writing.
    EmitTime(TimeFormat),
    /// The time between two points of the stream's life, in parts of this length.
    Between(Point, Point, Duration),
    /// A plain number of the stream.
    Count(Count),
    /// An address.
    Address(Side, AddressPart),
    /// The hosts that were tried: all of a TCP connection, of a request the last one, if it was connected to.
    Attempted(HostPart),
    /// Something of a certificate or handshake.
    Tls(End, TlsField),
    /// Begin (true) or end of the validity of the peer's certificate.
    Validity(End, bool, TimeFormat),
    /// The path: which, and whether with its query.
    Path(PathSource, bool),
    /// Bytes of a head or of trailers, as Envoy's `HeaderMap` counts them.
    HeadBytes(Head),
    /// Anything else of the stream.
    Stream(Field),
    /// A value of a metadata namespace.
    Metadata(MetadataSource, ArcStr, Box<[Box<str>]>),
    /// A filter state object; `true`: its text, else its JSON.
    FilterState(Box<str>, bool),
    /// A text in a filter state object that has several.
    FilterStateField(Box<str>, Box<str>),
    /// What is never there: a field of a filter state object, all of which are text, and the upstream's state.
    Nothing,
    /// `GRPC_STATUS`, by number or one of two name styles.
    GrpcStatus(GrpcStatusStyle),
    /// A variable of the process's environment.
    Environment(Box<str>),
    /// The value of an expression; `true`: with its type in JSON.
    Cel(Box<Expression>, bool),
    /// This machine's name.
    Hostname,
    /// The first of these that has a value, each with how much of it at most (`COALESCE`).
    FirstOf(Box<[(Command, Option<usize>)]>),
    /// Facts of the socket that nobody measures here: always missing.
    Unmeasured,
}

/// A point in a stream's life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Point {
    Start,
    RequestReceived,
    UpstreamFirstTx,
    UpstreamLastTx,
    UpstreamFirstRx,
    UpstreamLastRx,
    DownstreamFirstTx,
    DownstreamLastTx,
    Complete,
    HandshakeEnd,
    UpstreamConnectBegin,
    UpstreamConnectEnd,
    /// One that is never reached.
    Unset,
}

/// A number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Count {
    BytesReceived,
    BytesSent,
    ResponseCode,
    ConnectionId,
    UpstreamConnectionId,
    UpstreamAttempts,
    UpstreamWireSent,
    UpstreamWireReceived,
    UpstreamHeadersSent,
    UpstreamHeadersReceived,
    DownstreamWireSent,
    DownstreamWireReceived,
    DownstreamHeadersSent,
    DownstreamHeadersReceived,
    /// What only QUIC counts: 0.
    Retransmitted,
}

/// Whose address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    DownstreamRemote,
    DownstreamDirectRemote,
    DownstreamLocal,
    UpstreamHost,
    /// The host's address once a connection stands.
    UpstreamRemote,
    UpstreamLocal,
}

/// How much of an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AddressPart {
    Whole,
    WithoutPort,
    /// The range of so many fixed bits that it is in; of all if it has fewer, and none with a negative number.
    Range(i32),
    Port,
}

/// What is told of a host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HostPart {
    Address(AddressPart),
    Name,
    NameWithoutPort,
}

/// Which connection's TLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    Downstream,
    Upstream,
}

/// Which part of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TlsField {
    PeerUriSan,
    PeerDnsSan,
    PeerIpSan,
    PeerEmailSan,
    PeerOtherNameSan,
    PeerIssuerSha256,
    PeerIssuerSerial,
    /// The name that was asked for.
    ServerName,
    PeerSubject,
    PeerIssuer,
    PeerSerial,
    PeerSha256,
    PeerSha1,
    PeerCert,
    PeerChainSha256,
    PeerChainSha1,
    PeerChainSerials,
    LocalUriSan,
    LocalDnsSan,
    LocalIpSan,
    LocalEmailSan,
    LocalOtherNameSan,
    LocalSubject,
    Version,
    Cipher,
    Group,
    SessionId,
}

/// A text of the stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Field {
    Protocol,
    UpstreamProtocol,
    ResponseCodeDetails,
    ConnectionTerminationDetails,
    ResponseFlags,
    ResponseFlagsLong,
    RouteName,
    VirtualClusterName,
    UpstreamHostName,
    UpstreamHostNameWithoutPort,
    UpstreamCluster,
    UpstreamClusterRaw,
    UpstreamTransportFailure,
    DownstreamTransportFailure,
    RequestedServerName,
    Ja3,
    Ja4,
    FilterChainName,
    ListenerName,
    LocalReplyBody,
    AccessLogType,
    TraceId,
    StreamId,
    /// An empty text, which is not a missing one.
    Nothing,
    SpanId,
    UniqueId,
    /// The SNI, else the host.
    ServerNameFirst(HostSource),
    /// The host, else the SNI.
    HostFirst(HostSource),
    /// With its white space.
    RawResponseCodeDetails,
    /// No connection ends in another way here as far as anybody can tell.
    DownstreamCloseType,
    DownstreamLocalCloseReason,
    UpstreamCloseType,
    Query,
    DecodedQuery,
}

/// Which path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PathSource {
    /// As it is now.
    Current,
    /// As it was before it was rewritten, if it was.
    Original,
    /// As it came.
    OriginalOrCurrent,
}

/// Which host, with its port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HostSource {
    /// As it is now.
    Current,
    /// As it was before it was rewritten, if it was.
    Original,
    /// As it came.
    OriginalOrCurrent,
}

/// Which part of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Head {
    Request,
    Response,
    ResponseTrailers,
}

/// Whose metadata.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MetadataSource {
    Dynamic,
    Cluster,
    Route,
    UpstreamHost,
    VirtualHost,
    Listener,
    FilterChain,
}

/// How a gRPC status prints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GrpcStatusStyle {
    Camel,
    Snake,
    Number,
}
