use mesh_types::ArcStr;

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
    /// One query parameter, not decoded.
    QueryParameter(Box<str>),
    /// Start of the stream.
    StartTime(TimeFormat),
    /// The moment of writing.
    EmitTime(TimeFormat),
    /// Milliseconds between two points of the stream's life.
    Between(Point, Point),
    /// A plain number of the stream.
    Count(Count),
    /// An address.
    Address(Side, AddressPart),
    /// Something of a certificate or handshake.
    Tls(End, TlsField),
    /// Anything else of the stream.
    Stream(Field),
    /// A value of a metadata namespace.
    Metadata(MetadataSource, ArcStr, Box<[Box<str>]>),
    /// A filter state object; `true`: its text, else its JSON.
    FilterState(Box<str>, bool),
    /// `GRPC_STATUS`, by number or one of two name styles.
    GrpcStatus(GrpcStatusStyle),
    /// A variable of the process's environment.
    Environment(Box<str>),
    /// This machine's name.
    Hostname,
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
    Port,
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
    PeerSubject,
    PeerIssuer,
    PeerSerial,
    PeerSha256,
    PeerSha1,
    PeerCert,
    PeerNotBefore,
    PeerNotAfter,
    LocalUriSan,
    LocalDnsSan,
    LocalSubject,
    Version,
    Cipher,
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
    VirtualHostName,
    VirtualClusterName,
    UpstreamHostName,
    UpstreamHostNameWithoutPort,
    UpstreamCluster,
    UpstreamClusterRaw,
    UpstreamTransportFailure,
    DownstreamTransportFailure,
    RequestedServerName,
    FilterChainName,
    ListenerName,
    LocalReplyBody,
    AccessLogType,
    TraceId,
    StreamId,
    Path,
    PathWithQuery,
    Query,
    UpstreamLocality,
    ListenerDirection,
}

/// Whose metadata.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MetadataSource {
    Dynamic,
    Cluster,
    Route,
    UpstreamHost,
    VirtualHost,
}

/// How a gRPC status prints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GrpcStatusStyle {
    Camel,
    Snake,
    Number,
}
