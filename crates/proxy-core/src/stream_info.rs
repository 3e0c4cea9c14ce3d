//! What is known about a connection and about a request, for conditions, formats and logs.
//!
//! The proxy fills these in as it goes; everything here only reads them.

mod flags;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_types::ArcStr;

pub use flags::ResponseFlags;

use crate::address::Address;
use crate::listener::Direction;
use crate::metadata::{FilterState, Metadata};
use crate::route::{Route, VirtualHost};
use crate::tlv::Tlv;

/// One downstream connection. Made when its filter chain is known; later facts are those of the TLS handshake.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Unique in this process.
    pub id: u64,
    /// Where the peer connects from, as told by PROXY protocol or original source, else the socket's.
    pub remote: Address,
    /// The socket's peer.
    pub direct_remote: Address,
    /// Where the peer wanted to go: the original destination if it was restored, else the socket's address.
    pub local: Address,
    /// SNI, from the inspector or the handshake.
    pub server_name: Option<ArcStr>,
    /// `raw_buffer` or `tls`, as detected by the TLS inspector.
    pub transport_protocol: &'static str,
    /// ALPN or the HTTP inspector's finding.
    pub application_protocols: Vec<Vec<u8>>,
    /// What the TLS inspector made of the client's offer, if it was to.
    pub fingerprints: ClientFingerprints,
    /// Present once TLS is terminated here.
    pub tls: Option<Arc<TlsInfo>>,
    /// The listener's name.
    pub listener: ArcStr,
    /// The filter chain's name.
    pub filter_chain: ArcStr,
    /// The listener's direction.
    pub direction: Direction,
    /// The listener's metadata, if it has some.
    pub listener_metadata: Option<Arc<Metadata>>,
    /// The filter chain's metadata, if it has some.
    pub filter_chain_metadata: Option<Arc<Metadata>>,
    /// Written by network filters; each stream begins with it.
    pub filter_state: FilterState,
    /// Written by listener filters; streams of HTTP do not show it.
    pub metadata: Metadata,
    /// What the client's PROXY header said besides, as far as it may go on.
    pub tlvs: Arc<[Tlv]>,
    /// Why the downstream transport failed, if it did.
    pub transport_failure: Option<ArcStr>,
    /// Who this proxy is, as the node's message has it, for expressions (`xds.node`).
    pub node: Option<Arc<serde_json::Map<String, serde_json::Value>>>,
    /// This machine's name, for `%HOSTNAME%`.
    pub hostname: ArcStr,
    /// Reads the process's environment, for `%ENVIRONMENT()%`; this crate does not.
    pub environment: fn(&str) -> Option<String>,
    /// Reads the clock, for commands about the moment of writing; this crate does not.
    pub clock: fn() -> SystemTime,
}

impl Default for ConnectionInfo {
    fn default() -> Self {
        let nowhere = Address::Ip(std::net::SocketAddr::from(([0, 0, 0, 0], 0)));
        Self {
            id: 0,
            remote: nowhere.clone(),
            direct_remote: nowhere.clone(),
            local: nowhere,
            server_name: None,
            transport_protocol: "raw_buffer",
            application_protocols: Vec::new(),
            fingerprints: ClientFingerprints::default(),
            tls: None,
            listener: "".into(),
            filter_chain: "".into(),
            direction: Direction::default(),
            listener_metadata: None,
            filter_chain_metadata: None,
            filter_state: FilterState::default(),
            metadata: Metadata::default(),
            tlvs: Arc::default(),
            transport_failure: None,
            node: None,
            hostname: "".into(),
            environment: |_| None,
            clock: || SystemTime::UNIX_EPOCH,
        }
    }
}

/// Names of a client program by what its ClientHello offers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClientFingerprints {
    /// JA3.
    pub ja3: Option<ArcStr>,
    /// JA4.
    pub ja4: Option<ArcStr>,
}

/// A finished TLS handshake, either side.
#[derive(Clone, Debug, Default)]
pub struct TlsInfo {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: ArcStr,
    /// OpenSSL's name of the cipher suite, as Envoy prints it.
    pub cipher: ArcStr,
    /// BoringSSL's name of the key exchange; empty if there was none, as in a session that went on.
    pub group: &'static str,
    /// The number of the suite.
    pub cipher_id: u32,
    /// The negotiated application protocol.
    pub alpn: Option<ArcStr>,
    /// Hex; empty with TLS 1.3.
    pub session_id: ArcStr,
    /// SNI, as it was sent (downstream) or offered (upstream).
    pub server_name: Option<ArcStr>,
    /// The peer's certificate, if it showed one.
    pub peer: Option<PeerCertificate>,
    /// Our own certificate.
    pub local: Option<PeerCertificate>,
}

/// What is said of all certificates that a peer showed, its own first.
#[derive(Clone, Debug, Default)]
pub struct PeerChain {
    /// As [`PeerCertificate::sha256`].
    pub sha256: Vec<ArcStr>,
    /// As [`PeerCertificate::sha1`].
    pub sha1: Vec<ArcStr>,
    /// As [`PeerCertificate::serial`].
    pub serials: Vec<ArcStr>,
}

/// The parts of a certificate that policies, headers and logs use. Parsed by the proxy.
#[derive(Clone, Debug, Default)]
pub struct PeerCertificate {
    /// Whether it was verified against the configured roots.
    pub validated: bool,
    /// URI SANs in order.
    pub uri_sans: Vec<ArcStr>,
    /// DNS SANs in order.
    pub dns_sans: Vec<ArcStr>,
    /// IP SANs in order.
    pub ip_sans: Vec<ArcStr>,
    /// E-mail SANs in order.
    pub email_sans: Vec<ArcStr>,
    /// Texts of other names among the SANs, in order.
    pub other_sans: Vec<ArcStr>,
    /// RFC 2253.
    pub subject: ArcStr,
    /// RFC 2253.
    pub issuer: ArcStr,
    /// Lower-case hex.
    pub serial: ArcStr,
    /// Lower-case hex of the SHA-256 of the DER form.
    pub sha256: ArcStr,
    /// It and those that came with it.
    pub chain: PeerChain,
    /// Lower-case hex of the SHA-1 of the DER form.
    pub sha1: ArcStr,
    /// URL-encoded PEM of the certificate.
    pub pem_url_encoded: ArcStr,
    /// URL-encoded PEM of certificate and chain.
    pub chain_url_encoded: ArcStr,
    /// As `sha256`, of who issued it; empty as long as it is not validated.
    pub issuer_sha256: ArcStr,
    /// As `serial`, likewise.
    pub issuer_serial: ArcStr,
    /// Start of validity.
    pub not_before: Option<SystemTime>,
    /// End of validity.
    pub not_after: Option<SystemTime>,
}

/// HTTP version of a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HttpProtocol {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

impl HttpProtocol {
    /// As access logs print it.
    pub fn as_str(self) -> &'static str {
        match self {
            HttpProtocol::Http10 => "HTTP/1.0",
            HttpProtocol::Http11 => "HTTP/1.1",
            HttpProtocol::Http2 => "HTTP/2",
        }
    }
}

/// When things happened, counted from the start of the stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamTimes {
    /// Last byte of the request received.
    pub request_received: Option<Duration>,
    /// First byte sent upstream.
    pub upstream_first_tx: Option<Duration>,
    /// Last byte sent upstream.
    pub upstream_last_tx: Option<Duration>,
    /// First byte of the response received.
    pub upstream_first_rx: Option<Duration>,
    /// Last byte of the response received.
    pub upstream_last_rx: Option<Duration>,
    /// First byte sent downstream.
    pub downstream_first_tx: Option<Duration>,
    /// Last byte sent downstream.
    pub downstream_last_tx: Option<Duration>,
    /// The stream is over.
    pub complete: Option<Duration>,
    /// The downstream TLS handshake took this long (of the connection).
    pub downstream_handshake: Option<Duration>,
    /// Connecting to the upstream, when this request had to: begin and end.
    pub upstream_connect: Option<(Duration, Duration)>,
}

/// The chosen upstream.
#[derive(Clone, Debug, Default)]
pub struct UpstreamInfo {
    /// `tcp_proxy` sees to it, which says that there is one before there is.
    pub of_tcp_proxy: bool,
    /// The cluster's name.
    pub cluster: Option<ArcStr>,
    /// The name under which it is counted and logged (`alt_stat_name`, else its name).
    pub cluster_stat_name: Option<ArcStr>,
    /// The cluster's metadata.
    pub cluster_metadata: Option<Arc<Metadata>>,
    /// The host that was (last) tried.
    pub host: Option<Arc<crate::Host>>,
    /// All hosts that were tried, of TCP: each try of a request begins anew.
    pub attempted: Vec<Arc<crate::Host>>,
    /// Our side of the connection.
    pub local: Option<Address>,
    /// Unique in this process.
    pub connection_id: Option<u64>,
    /// Why the transport failed, for instance `TLS_error:…`.
    pub transport_failure: Option<ArcStr>,
    /// Tries so far, the first included.
    pub attempts: u32,
    /// The upstream handshake.
    pub tls: Option<Arc<TlsInfo>>,
    /// The upstream's HTTP version.
    pub protocol: Option<HttpProtocol>,
    /// Bytes on the wire to and from the upstream.
    pub wire_bytes_sent: u64,
    /// See `wire_bytes_sent`.
    pub wire_bytes_received: u64,
    /// Of these, header bytes sent.
    pub header_bytes_sent: u64,
    /// Of these, header bytes received.
    pub header_bytes_received: u64,
}

/// One request, or one connection that carries no HTTP.
#[derive(Clone, Debug)]
pub struct StreamInfo {
    /// The connection it came on.
    pub connection: Arc<ConnectionInfo>,
    /// When its first byte was received.
    pub start: SystemTime,
    /// What happened when, after that.
    pub times: StreamTimes,
    /// The downstream's HTTP version; `None` for TCP.
    pub protocol: Option<HttpProtocol>,
    /// The trusted client address (after `x-forwarded-for`), else the connection's.
    pub remote: Address,
    /// Body bytes (HTTP) or all bytes (TCP) from the client.
    pub bytes_received: u64,
    /// Body bytes (HTTP) or all bytes (TCP) to the client.
    pub bytes_sent: u64,
    /// Header bytes from the client, as on the wire.
    pub downstream_header_bytes_received: u64,
    /// Header bytes to the client, as on the wire.
    pub downstream_header_bytes_sent: u64,
    /// All bytes from the client, as on the wire.
    pub downstream_wire_bytes_received: u64,
    /// All bytes to the client, as on the wire.
    pub downstream_wire_bytes_sent: u64,
    /// The status sent downstream; `None` if none was.
    pub response_code: Option<u16>,
    /// Envoy's word for where the status comes from, for instance `via_upstream`.
    pub response_code_details: Option<Cow<'static, str>>,
    /// Why the connection was ended, if a policy ended it.
    pub connection_termination_details: Option<Cow<'static, str>>,
    /// Why this proxy closed the downstream connection.
    pub local_close_reason: Option<Cow<'static, str>>,
    /// What went wrong.
    pub flags: ResponseFlags,
    /// The route that matched.
    pub route: Option<Arc<Route>>,
    /// The virtual host that matched.
    pub virtual_host: Option<Arc<VirtualHost>>,
    /// Name of the virtual cluster that the router found the request to be of.
    pub virtual_cluster: Option<ArcStr>,
    /// The chosen upstream.
    pub upstream: UpstreamInfo,
    /// Written by filters.
    pub dynamic_metadata: Metadata,
    /// Written by filters.
    pub filter_state: FilterState,
    /// Trace id in hex, if the request is traced.
    pub trace_id: Option<ArcStr>,
    /// Span id in hex, likewise.
    pub span_id: Option<ArcStr>,
    /// Unique id of the stream (`STREAM_ID`): the request id if there is one.
    pub stream_id: Option<ArcStr>,
    /// Whether this is a request of a health checker.
    pub health_check: bool,
    /// Whether the trace of this request is sampled.
    pub traced: bool,
}

impl StreamInfo {
    /// A stream that starts now on this connection.
    #[inline]
    pub fn new(connection: Arc<ConnectionInfo>, start: SystemTime) -> Self {
        Self {
            remote: connection.remote.clone(),
            filter_state: connection.filter_state.clone(),
            connection,
            start,
            times: StreamTimes::default(),
            protocol: None,
            bytes_received: 0,
            bytes_sent: 0,
            downstream_header_bytes_received: 0,
            downstream_header_bytes_sent: 0,
            downstream_wire_bytes_received: 0,
            downstream_wire_bytes_sent: 0,
            response_code: None,
            response_code_details: None,
            connection_termination_details: None,
            local_close_reason: None,
            flags: ResponseFlags::NONE,
            route: None,
            virtual_host: None,
            virtual_cluster: None,
            upstream: UpstreamInfo::default(),
            dynamic_metadata: Metadata::default(),
            trace_id: None,
            span_id: None,
            stream_id: None,
            health_check: false,
            traced: false,
        }
    }
}
