//! Published ports: listeners of the host that lead into the mesh, as an ingress gateway would.
//!
//! To pods with a sidecar the connection is mutual TLS with an identity of its own, so that STRICT mode and authorization policies
//! mean what they say; to others it is plain.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Dialer;

const CONNECTIONS_MAX: usize = 4096;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// `SVC[.NS]:PORT=[ADDRESS:]PORT`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    pub(crate) service: String,
    pub(crate) namespace: Option<String>,
    /// The service's port.
    pub(crate) port: u16,
    /// Where the host listens; its loopback address unless another one is written.
    pub(crate) at: SocketAddr,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("{text:?} should look like productpage:9080=9080");
        let (target, at) = text.split_once('=').unwrap_or((text, text.rsplit(':').next().unwrap_or_default()));
        let (service, port) = target.split_once(':').ok_or_else(shape)?;
        let port = port.parse().map_err(|_| shape())?;
        let (service, namespace) = match service.split_once('.') {
            Some((service, namespace)) => (service, Some(namespace.to_owned())),
            None => (service, None),
        };
        let at = match at.parse::<SocketAddr>() {
            Ok(at) => at,
            Err(_) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), at.parse().map_err(|_| shape())?),
        };
        if service.is_empty() {
            return Err(shape());
        }
        Ok(Self { service: service.to_owned(), namespace, port, at })
    }
}

/// Where a published port leads right now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Destination {
    /// `None` while the service does not exist.
    pub(crate) address: Option<SocketAddr>,
    /// All its pods have sidecars.
    pub(crate) mesh: bool,
}

/// A destination that follows the service.
pub(crate) type Target = watch::Receiver<Destination>;

/// How connections into the mesh are made.
#[derive(Clone)]
pub(crate) struct Gateway {
    pub(crate) dialer: Dialer,
    /// Mutual TLS with the gateway's own identity.
    pub(crate) tls: watch::Receiver<Arc<rustls::ClientConfig>>,
}

/// A byte stream of either kind.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Gateway {
    async fn connect(&self, to: Destination) -> io::Result<Box<dyn Stream>> {
        let address =
            to.address.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the service does not exist"))?;
        if to.mesh {
            let stream = self.dialer.connect(address).await?;
            // The peer is known by its SPIFFE identity; the name is only a formality of TLS.
            let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
            let tls = Arc::clone(&self.tls.borrow());
            let handshake = tokio_rustls::TlsConnector::from(tls).connect(name, stream);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
                Ok(Ok(stream)) => return Ok(Box::new(stream)),
                // With mutual TLS disabled by policy the sidecar does not answer in TLS.
                Ok(Err(error)) => tracing::debug!(%error, "no mutual TLS with a published service; trying without"),
                Err(_) => tracing::debug!("no mutual TLS with a published service in time; trying without"),
            }
        }
        Ok(Box::new(self.dialer.connect(address).await?))
    }
}

/// Serves one published port until dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    target: Target,
    gateway: Gateway,
) -> io::Result<std::convert::Infallible> {
    let mut connections = JoinSet::new();
    let gateway = Arc::new(gateway);
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (to, gateway) = (*target.borrow(), Arc::clone(&gateway));
                    connections.spawn(async move {
                        if let Err(error) = relay(stream, to, &gateway).await {
                            tracing::debug!(%error, "published connection");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept on a published port");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn relay(mut outside: TcpStream, to: Destination, gateway: &Gateway) -> io::Result<()> {
    let mut inside = gateway.connect(to).await?;
    outside.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_flags() {
        let parse = |text: &str| text.parse::<Publish>();
        let plain = parse("productpage:9080=9081").unwrap();
        assert_eq!(
            (plain.service.as_str(), plain.port, plain.at),
            ("productpage", 9080, "127.0.0.1:9081".parse().unwrap())
        );
        assert_eq!(parse("web.shop:80=0.0.0.0:8080").unwrap().namespace.as_deref(), Some("shop"));
        assert_eq!(parse("web:8080").unwrap().at.port(), 8080);
        for bad in ["web", "web:x=1", ":80=1", "web:80=host"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
