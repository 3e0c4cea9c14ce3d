//! gRPC channels over TLS that verify the server against given roots, with or without a certificate of our own.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Uri};
use tower::service_fn;

/// How long a connection may take, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Pings find dead connections: as pilot-agent, `pkg/istio-agent`, keepalive of 30 s, 10 s to answer.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A server to connect to.
#[derive(Clone)]
pub struct Endpoint {
    /// `HOST:PORT`.
    pub address: String,
    /// TLS, and the name to verify and to send as SNI; `None` speaks plaintext.
    pub tls: Option<(Arc<ClientConfig>, String)>,
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("{address:?} is not HOST:PORT")]
    Address { address: String },
    #[error("{name:?} is not a server name")]
    ServerName { name: String },
    #[error("cannot connect to {address}")]
    Connect {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
}

impl Endpoint {
    /// Connects now and gives a channel on that one connection.
    pub async fn connect(&self) -> Result<Channel, ChannelError> {
        let bad_address = || ChannelError::Address { address: self.address.clone() };
        let name = self.tls.as_ref().map(|(_, name)| name.as_str()).unwrap_or(&self.address);
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let uri: Uri = format!("{scheme}://{name}").parse().map_err(|_| bad_address())?;
        if self.address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).is_none() {
            return Err(bad_address());
        }
        let tls = match &self.tls {
            Some((config, name)) => {
                let server =
                    ServerName::try_from(name.clone()).map_err(|_| ChannelError::ServerName { name: name.clone() })?;
                Some((TlsConnector::from(config.clone()), server))
            }
            None => None,
        };
        let address = self.address.clone();
        let connector = service_fn(move |_: Uri| {
            let (address, tls) = (address.clone(), tls.clone());
            async move { dial(&address, tls).await.map(TokioIo::new) }
        });
        let endpoint = tonic::transport::Endpoint::from(uri)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 20);
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| ChannelError::Connect { address: self.address.clone(), source })
    }
}

async fn dial(address: &str, tls: Option<(TlsConnector, ServerName<'static>)>) -> io::Result<Stream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    match tls {
        None => Ok(Stream::Plain(stream)),
        Some((connector, name)) => Ok(Stream::Tls(Box::new(connector.connect(name, stream).await?))),
    }
}

/// A connection with or without TLS.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(s) => Pin::new(s).poll_flush(cx),
            Stream::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Stream::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

/// Runs a future that must not take longer than `limit`.
pub(crate) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, future).await.ok()
}
