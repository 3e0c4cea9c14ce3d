//! One HTTP/1.1 request, as probes and scrapes make it: bounded in time and size, no connection kept.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

/// Where and how to connect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub address: SocketAddr,
    /// The local address; probes use 127.0.0.6, which capture lets pass to the application directly.
    pub from: Option<IpAddr>,
    /// TLS, verifying nothing: kubelets do not verify probed applications either.
    pub tls: bool,
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    /// Cut off at the limit.
    pub body: Bytes,
    /// There was more than the limit.
    pub cut: bool,
}

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("cannot connect to {address}: {source}")]
    Connect { address: SocketAddr, source: std::io::Error },
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// Sends one request and reads up to `limit` bytes of the answer, all within `timeout`.
pub(crate) async fn fetch(
    target: Target,
    request: Request<Full<Bytes>>,
    timeout: Duration,
    limit: usize,
) -> Result<Answer, FetchError> {
    tokio::time::timeout(timeout, exchange(target, request, limit)).await.unwrap_or(Err(FetchError::Timeout(timeout)))
}

/// Opens a TCP connection from the target's local address.
pub(crate) async fn connect(target: Target) -> std::io::Result<TcpStream> {
    let socket = if target.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(from) = target.from {
        socket.bind(SocketAddr::new(from, 0))?;
    }
    socket.connect(target.address).await
}

async fn exchange(target: Target, request: Request<Full<Bytes>>, limit: usize) -> Result<Answer, FetchError> {
    let failed = |source| FetchError::Connect { address: target.address, source };
    let stream = connect(target).await.map_err(failed)?;
    if !target.tls {
        return speak(stream, request, limit).await;
    }
    let config = Arc::new(unverified().map_err(|e| failed(std::io::Error::other(e)))?);
    let name = ServerName::IpAddress(target.address.ip().into());
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(failed)?;
    speak(stream, request, limit).await
}

async fn speak<S>(stream: S, request: Request<Full<Bytes>>, limit: usize) -> Result<Answer, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends when the sender is dropped, at the latest at the end of this function.
    tokio::spawn(async move {
        let _ = connection.await; // an error here is also the answer's
    });
    let response = sender.send_request(request).await?;
    let (head, mut body) = response.into_parts();
    let (mut bytes, mut cut) = (BytesMut::new(), false);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        let room = limit - bytes.len();
        bytes.extend_from_slice(&data[..data.len().min(room)]);
        if data.len() > room {
            cut = true;
            break;
        }
    }
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: bytes.freeze(), cut })
}

fn unverified() -> Result<ClientConfig, rustls::Error> {
    let provider = identity::tls::provider();
    let verifier = Unverified(provider.signature_verification_algorithms);
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth())
}

#[derive(Debug)]
struct Unverified(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
