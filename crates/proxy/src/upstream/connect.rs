//! Opening one upstream connection: socket, PROXY header, TLS, within the connect timeout.

use super::WorkerCluster;
use crate::io::{Io, Raw};
use crate::peer;
use crate::runtime::exchange_of;
use crate::socket::{self, KeepAlive};
use crate::stats::Workload;
use crate::tls::{ClientTls, Failure, TlsError};
use mesh_types::ArcStr;
use proxy_core::cluster::{TransportSocket, UpstreamProtocol};
use proxy_core::route::Priority;
use proxy_core::stream_info::HttpProtocol;
use proxy_core::tlv::Tlv;
use proxy_core::{Address, Cluster, ConnectionInfo, FormatContext, Headers, Host, Listener, StreamInfo, TlsInfo};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tokio::io::AsyncWriteExt;

/// How a connection to a host is made; requests with different variants never share one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variant {
    /// HTTP version wanted: `None` for raw TCP or by ALPN.
    pub(crate) protocol: Protocol,
    pub(crate) names: ServerNames,
    /// ALPN from the route (Istio's alpn filter).
    pub(crate) alpn: Option<Arc<[Vec<u8>]>>,
    /// Who is announced by a PROXY header, for hosts that want one.
    pub(crate) announced: Option<Announced>,
    /// The client's address as the source, where capture by TPROXY keeps it.
    pub(crate) source: Option<Source>,
    /// Whose circuit breaker counts them.
    pub(crate) priority: Priority,
    /// The client's connection, where each has upstream connections of its own.
    pub(crate) owner: Option<u64>,
}

impl Variant {
    /// Whether others may come and use the same connections: such pools are kept when they are empty.
    pub(super) fn is_lasting(&self) -> bool {
        self.announced.is_none()
            && self.names == ServerNames::default()
            && self.source.is_none()
            && self.owner.is_none()
    }
}

/// A source address that is not ours (listener filter `original_src`), and the mark of its packets: by that mark the
/// answers find back to this socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) ip: IpAddr,
    pub(crate) mark: u32,
}

impl Source {
    /// What the listener asks for.
    pub(crate) fn of(listener: &Listener, info: &ConnectionInfo) -> Option<Self> {
        let mark = listener.inspect.original_src?;
        Some(Self { ip: info.remote.socket()?.ip(), mark })
    }
}

/// The two ends of the client's connection, as far as they are IP addresses, and what else a header tells.
#[derive(Clone, Debug)]
pub(crate) struct Announced {
    from: Option<SocketAddr>,
    to: Option<SocketAddr>,
    tlvs: Arc<[Tlv]>,
    keyed: bool,
}

impl PartialEq for Announced {
    /// Connections that differ in further fields alone are shared, unless the configuration says otherwise.
    fn eq(&self, other: &Self) -> bool {
        (self.from, self.to, self.keyed) == (other.from, other.to, other.keyed)
            && (!self.keyed || self.tlvs == other.tlvs)
    }
}

impl Eq for Announced {}

impl Announced {
    /// For hosts that get a PROXY header; `None` for all others.
    pub(crate) fn to(cluster: &WorkerCluster, host: &Host, info: &Arc<ConnectionInfo>) -> Option<Self> {
        let (TransportSocket::ProxyProtocol { header, .. }, _) = cluster.config().transport(host) else { return None };
        let stream = StreamInfo::new(info.clone(), SystemTime::now());
        let tlvs = header.tlvs(host, &FormatContext::new(&stream, None, None)).into();
        Some(Self { from: info.remote.socket(), to: info.local.socket(), tlvs, keyed: header.keyed })
    }

    /// Of a connection that is shared with nobody.
    pub(crate) fn alone(self) -> Self {
        Self { keyed: true, ..self }
    }
}

/// What is spoken on a pool's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// No HTTP.
    #[default]
    Raw,
    Http1,
    Http2,
    /// As the handshake's ALPN says.
    Auto,
}

impl Protocol {
    /// What is spoken to the hosts of a cluster, to which the client speaks `downstream`.
    pub(crate) fn of(protocol: &UpstreamProtocol, downstream: Option<HttpProtocol>) -> Self {
        match protocol {
            UpstreamProtocol::Http1 => Self::Http1,
            UpstreamProtocol::Http2 => Self::Http2,
            UpstreamProtocol::Auto => Self::Auto,
            UpstreamProtocol::UseDownstream => match downstream {
                Some(HttpProtocol::Http2) => Self::Http2,
                _ => Self::Http1,
            },
        }
    }
}

/// What a request says about the server's names: its host, or the value of a header of its own (Envoy
/// `Router::Filter::decodeHeaders`). Names that differ in their case share connections
/// (`CommonUpstreamTransportSocketFactory::hashKey`).
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerNames {
    /// What to ask for instead of what the context says (`auto_sni`); never an address.
    pub(crate) sni: Option<ArcStr>,
    /// Must be in the certificate (`auto_san_validation`).
    pub(crate) san: Option<ArcStr>,
}

impl PartialEq for ServerNames {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: &Option<ArcStr>, b: &Option<ArcStr>| match (a, b) {
            (Some(a), Some(b)) => a.eq_ignore_ascii_case(b),
            (a, b) => a.is_none() && b.is_none(),
        };
        same(&self.sni, &other.sni) && same(&self.san, &other.san)
    }
}

impl Eq for ServerNames {}

impl ServerNames {
    pub(crate) fn of(config: &Cluster, headers: &Headers) -> Self {
        if !config.auto_sni && !config.auto_san_validation {
            return Self::default();
        }
        let own = config.auto_sni_header.as_deref().and_then(|name| headers.joined(name)).filter(|v| !v.is_empty());
        let own = own.map(|value| String::from_utf8_lossy(&value).into_owned());
        let Some(authority) = own.as_deref().or_else(|| headers.authority()) else { return Self::default() };
        let port = authority.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
        let host = port.map_or(authority, |(host, _)| host);
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let is_address = bare.parse::<IpAddr>().is_ok();
        Self {
            sni: (config.auto_sni && !is_address).then(|| host.into()),
            san: config.auto_san_validation.then(|| bare.into()),
        }
    }
}

/// A connection that could not be made.
#[derive(Clone, Debug)]
pub(crate) struct ConnectError {
    pub(crate) timeout: bool,
    /// Envoy's transport failure reason, for logs and details; may be empty.
    pub(crate) reason: String,
}

/// What is known of an open upstream connection.
#[derive(Debug)]
pub(crate) struct ConnectionFacts {
    pub(crate) id: u64,
    pub(crate) local: Option<Address>,
    pub(crate) tls: Option<Arc<TlsInfo>>,
    /// Who the peer says it is (TCP metadata exchange).
    pub(crate) peer: Option<Workload>,
}

fn count(cluster: &WorkerCluster, host: &Host, protocol: Protocol) {
    let stats = &cluster.stats;
    stats.upstream_cx_total.inc();
    match protocol {
        Protocol::Http2 => stats.upstream_cx_http2_total.inc(),
        Protocol::Http1 => {
            stats.upstream_cx_http1_total.inc();
            stats.other.touch_all(&crate::stats::HTTP1_CODEC);
        }
        Protocol::Auto | Protocol::Raw => {}
    }
    host.state.stats.cx_total.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

/// Counts a connection whose protocol ALPN has told: to Envoy it is another one (`HttpConnPoolImplMixed::onConnected`).
pub(super) fn count_negotiated(cluster: &WorkerCluster, host: &Host, is_h2: bool) {
    count(cluster, host, if is_h2 { Protocol::Http2 } else { Protocol::Http1 });
}

/// Opens a connection and counts how that went.
pub(crate) async fn open(
    cluster: &Rc<WorkerCluster>,
    host: &Arc<Host>,
    tls: Option<&ClientTls>,
    variant: &Variant,
    shared: &crate::runtime::Shared,
) -> Result<(Io, ConnectionFacts), ConnectError> {
    let stats = &cluster.stats;
    if !cluster.entry.used.load(std::sync::atomic::Ordering::Relaxed) {
        cluster.entry.used.store(true, std::sync::atomic::Ordering::Relaxed);
    }
    count(cluster, host, variant.protocol);
    let begin = Instant::now();
    let timeout = cluster.config().connect_timeout;
    let result = match tokio::time::timeout(timeout, establish(cluster, host, tls, variant, shared)).await {
        Ok(result) => result,
        Err(_) => {
            stats.upstream_cx_connect_timeout.inc();
            Err(ConnectError { timeout: true, reason: String::new() })
        }
    };
    match result {
        Ok(done) => {
            stats.upstream_cx_connect_ms.record(begin.elapsed().as_millis() as u64);
            Ok(done)
        }
        Err(e) => {
            stats.upstream_cx_connect_fail.inc();
            host.state.stats.cx_connect_fail.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            // As Envoy, who says it in the loop's next turn: what its client sent meanwhile has come by then.
            tokio::task::yield_now().await;
            Err(e)
        }
    }
}

async fn establish(
    cluster: &Rc<WorkerCluster>,
    host: &Arc<Host>,
    tls: Option<&ClientTls>,
    variant: &Variant,
    shared: &crate::runtime::Shared,
) -> Result<(Io, ConnectionFacts), ConnectError> {
    let config = cluster.config();
    let bind = config.bind.iter().find(|b| host.address.socket().is_none_or(|a| a.is_ipv4() == b.is_ipv4())).copied();
    let options = socket::ConnectOptions { bind, source: variant.source, others: &config.socket_options };
    let raw = socket::connect(&host.address, options).await.map_err(|e| {
        let reason = match connect_reason(&e) {
            // What the kernel says at once, Envoy words in another way.
            Some(text) if is_immediate(&e, &host.address) => {
                format!("immediate connect error: {text}|remote address:{}", host.address)
            }
            reason => delayed(reason),
        };
        ConnectError { timeout: false, reason }
    })?;
    let mut local = None;
    if let Raw::Tcp(stream) = &raw {
        local = stream.local_addr().ok().map(Address::Ip);
        if let Some(keepalive) = &config.keepalive {
            let keepalive = KeepAlive { time: keepalive.time, interval: keepalive.interval, probes: keepalive.probes };
            if let Err(e) = keepalive.apply(stream) {
                tracing::debug!(error = %e, "cannot set TCP keep-alive");
            }
        }
    }
    let mut raw = raw;
    if let (TransportSocket::ProxyProtocol { header, .. }, _) = config.transport(host) {
        let announced = variant.announced.as_ref();
        let (from, to) = announced.map_or((None, None), |a| (a.from, a.to));
        let tlvs = announced.map_or(&[][..], |a| &a.tlvs);
        let header = crate::proxy_protocol::header_with(header.version, from, to, tlvs).unwrap_or_else(|| {
            cluster.stats.other.inc("upstream.proxyprotocol.v2_tlvs_exceed_max_length");
            crate::proxy_protocol::header(header.version, from, to)
        });
        raw.write_all(&header)
            .await
            .map_err(|e| ConnectError { timeout: false, reason: delayed(connect_reason(&e)) })?;
    }
    let id = shared.next_id();
    let Some(tls) = tls else {
        return Ok((Io::Raw(raw), ConnectionFacts { id, local, tls: None, peer: None }));
    };
    let fallback = match variant.protocol {
        Protocol::Raw => Vec::new(),
        Protocol::Http1 => vec![b"http/1.1".to_vec()],
        Protocol::Http2 => vec![b"h2".to_vec()],
        Protocol::Auto => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
    };
    // Only TCP streams can begin with who we are.
    let exchange = exchange_of(&config.filters).filter(|_| variant.protocol == Protocol::Raw);
    let all = exchange.map(|_| tls.alpn()).filter(|alpn| !alpn.is_empty());
    let alpn =
        variant.alpn.as_deref().or(all).or_else(|| tls.has_no_alpn().then_some(&*fallback).filter(|f| !f.is_empty()));
    match tls.connect(raw, &shared.secrets, &variant.names, &host.hostname, alpn).await {
        Ok((stream, info, refused)) => {
            cluster.stats.ssl_handshake.inc();
            if let Some(refused) = refused {
                count_failure(cluster, refused.failure);
            }
            if crate::tls::count(stream.get_ref().1, &info, &cluster.stats.other) {
                cluster.stats.ssl_session_reused.inc();
            }
            let mut io = Io::Client(stream);
            let mut peer = None;
            if let Some(exchange) = exchange
                && info.alpn.as_ref() == Some(&exchange.protocol)
            {
                peer = peer::exchange(&mut io, &shared.identity.frame(exchange))
                    .await
                    .map_err(|e| ConnectError { timeout: false, reason: delayed(connect_reason(&e)) })?;
            }
            Ok((io, ConnectionFacts { id, local, tls: Some(Arc::new(info)), peer }))
        }
        Err(failed) if TlsError::is_missing_secret(&failed.error) => {
            cluster.stats.other.inc("client_ssl_socket_factory.upstream_context_secrets_not_ready");
            Err(ConnectError { timeout: false, reason: "TLS_error: Secret is not supplied by SDS".to_owned() })
        }
        Err(failed) => {
            count_failure(cluster, failed.failure());
            tracing::debug!(host = %host.address, error = %failed.error, "upstream TLS handshake failed");
            let reason = match (failed.words(), failed.error.kind()) {
                (Some(words), _) => format!("TLS_error:|{words}:TLS_error_end"),
                // A peer that just hangs up has no reason in Envoy either.
                (None, io::ErrorKind::UnexpectedEof) => String::new(),
                (None, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
                    "TLS_error:|33554536:system library:OPENSSL_internal:Connection reset by peer:TLS_error_end"
                        .to_owned()
                }
                (None, _) => {
                    format!("TLS_error:|{}:TLS_error_end", crate::tls::of_server_in_boring_words(&failed.error))
                }
            };
            Err(ConnectError { timeout: false, reason })
        }
    }
}

fn count_failure(cluster: &WorkerCluster, failure: Failure) {
    match failure {
        Failure::San => cluster.stats.ssl_fail_verify_san.inc(),
        Failure::Hash => cluster.stats.ssl_fail_verify_cert_hash.inc(),
        Failure::Chain => cluster.stats.ssl_fail_verify_error.inc(),
        Failure::NoCertificate => cluster.stats.ssl_fail_verify_no_cert.inc(),
        Failure::Other => cluster.stats.ssl_connection_error.inc(),
    }
}

/// Whether the call of `connect` itself failed: to a path it waits for nothing, and without a route there is nothing to wait for.
fn is_immediate(e: &io::Error, address: &Address) -> bool {
    matches!(address, Address::Pipe(_)) || e.kind() == io::ErrorKind::NetworkUnreachable
}

/// `delayed connect error: Connection refused`, as Envoy words it.
fn delayed(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |text| format!("delayed connect error: {text}"))
}

/// What went wrong, in the system's words.
fn connect_reason(e: &io::Error) -> Option<&'static str> {
    Some(match e.kind() {
        io::ErrorKind::ConnectionRefused => "Connection refused",
        io::ErrorKind::HostUnreachable => "No route to host",
        io::ErrorKind::NetworkUnreachable => "Network is unreachable",
        io::ErrorKind::TimedOut => "Connection timed out",
        io::ErrorKind::ConnectionReset => "Connection reset by peer",
        io::ErrorKind::NotFound => "No such file or directory",
        io::ErrorKind::PermissionDenied => "Permission denied",
        _ => return None,
    })
}
