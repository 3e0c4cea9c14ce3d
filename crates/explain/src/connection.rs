//! A connection's way to its filter chain: which listener, what is seen of it, which chain.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use proxy_core::listener::ChainInput;
use proxy_core::{Address, FilterChain, Listener};

use crate::Configuration;

/// How a connection reaches the proxy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Capture {
    /// From the application, redirected to the outbound port.
    Outbound,
    /// To the workload, redirected to the inbound port.
    Inbound,
    /// Straight to a listener.
    None,
}

/// What flows in the connection, inside its TLS if there is any.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Payload {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Something else.
    Opaque,
}

/// What the client does about TLS.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ClientTls {
    /// Server name sent; empty: none.
    pub sni: String,
    /// Protocols offered, in order.
    pub alpn: Vec<Vec<u8>>,
    /// The client shows a certificate of the mesh.
    pub certificate: bool,
}

/// A connection that is made.
#[derive(Clone, Debug)]
pub struct Dial {
    /// How it reaches the proxy.
    pub capture: Capture,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where the client wants to go.
    pub destination: SocketAddr,
    /// `None`: in clear.
    pub tls: Option<ClientTls>,
    /// What flows in it.
    pub payload: Payload,
    /// Where Istio's simulator is not Envoy; the default is Envoy.
    pub quirks: Quirks,
}

/// What Istio's simulator does and no proxy (istio `pilot/pkg/simulation/traffic.go`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Quirks {
    /// Listeners of `0.0.0.0` take IPv6 destinations too.
    pub any_family: bool,
    /// This server name is looked at even if nothing inspects TLS, or there is none.
    pub server_name: String,
}

/// Where it got to.
#[derive(Clone, Debug)]
pub struct Arrival<'c> {
    /// The listener.
    pub listener: &'c Arc<Listener>,
    /// The inspector saw TLS.
    pub saw_tls: bool,
    /// The server name that the choice looked at.
    pub server_name: String,
    /// The application protocols that the choice looked at.
    pub protocols: Vec<Vec<u8>>,
    /// The filter chain; `None`: the connection is closed.
    pub chain: Option<&'c Arc<FilterChain>>,
}

impl Dial {
    /// The proxy's way from the socket to the filter chain. `None`: nothing listens there.
    pub fn arrive<'c>(&self, at: &'c Configuration) -> Option<Arrival<'c>> {
        let listener = self.listener(at)?;
        let port = self.destination.port();
        let saw_tls = self.tls.is_some() && listener.inspect.needs_tls(port);
        let (server_name, protocols) = match &self.tls {
            Some(tls) if saw_tls => (tls.sni.to_ascii_lowercase(), tls.alpn.clone()),
            None if listener.inspect.needs_http(port) => (String::new(), self.payload.detected()),
            _ => (String::new(), Vec::new()),
        };
        let server_name = if server_name.is_empty() { self.quirks.server_name.clone() } else { server_name };
        let source = Address::Ip(self.source);
        let chain = listener.find_chain(&ChainInput {
            destination: &Address::Ip(self.destination),
            source: &source,
            direct_source: &source,
            server_name: &server_name,
            transport_protocol: if saw_tls { "tls" } else { "raw_buffer" },
            application_protocols: &protocols,
        });
        Some(Arrival { listener, saw_tls, server_name, protocols, chain })
    }

    fn listener<'c>(&self, at: &'c Configuration) -> Option<&'c Arc<Listener>> {
        match self.capture {
            Capture::Inbound => at.listener("virtualInbound"),
            Capture::Outbound => {
                let first = at.listener("virtualOutbound")?;
                let found = at.set.find_original_dst(first, self.destination);
                if self.quirks.any_family && Arc::ptr_eq(first, found) {
                    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), self.destination.port());
                    return Some(at.set.find_original_dst(first, any));
                }
                Some(found)
            }
            // A socket of this very address, else one of all addresses.
            Capture::None => {
                let bound = |ip: IpAddr| {
                    let wanted = SocketAddr::new(ip, self.destination.port());
                    at.listeners.iter().find(|listener| listener.address.socket() == Some(wanted))
                };
                bound(self.destination.ip())
                    .or_else(|| bound(Ipv4Addr::UNSPECIFIED.into()))
                    .or_else(|| at.listener("virtualOutbound"))
            }
        }
    }
}

impl Payload {
    /// What Envoy's HTTP inspector calls it.
    fn detected(self) -> Vec<Vec<u8>> {
        match self {
            Self::Http1 => vec![b"http/1.1".to_vec()],
            Self::Http2 => vec![b"h2c".to_vec()],
            Self::Opaque => Vec::new(),
        }
    }
}
