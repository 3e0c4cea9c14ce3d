//! Accepts connections and serves gRPC or HTTPS on them.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ads::server::Peer;
use bytes::Bytes;
use http_body_util::{Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lifecycle::drain::Watch;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::identity::{Identities, bearer};
use crate::metrics::Metrics;

/// Connections at a time on one port; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 20_000;
/// Handshakes at a time: each costs a signature, and a thousand clients may come at once after a restart.
const MAX_HANDSHAKES: usize = 256;
/// How long a client may take for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connections may stay after the shutdown began.
const GRACE: Duration = Duration::from_secs(2);
/// As istiod's keepalive: a dead peer is found after 40 seconds.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// Bytes of a stream that wait for the kernel: what a slow reader costs, beside one shared list.
const MAX_UNSENT: usize = 64 << 10;

/// The largest HTTPS request: an admission review of the largest object that etcd holds.
const MAX_BODY: usize = 4 << 20;

/// A request of [`serve_https`].
pub(crate) type Request = http::Request<Limited<Incoming>>;
/// Its answer.
pub(crate) type Response = http::Response<Full<Bytes>>;

/// What makes a port secure.
#[derive(Clone)]
pub(crate) struct Secure {
    pub(crate) tls: TlsAcceptor,
    pub(crate) identities: Identities,
    pub(crate) metrics: Arc<Metrics>,
}

/// Serves gRPC on `listener` until the shutdown starts. Every request carries the [`Peer`]; on a secure port only
/// requests of a verified identity arrive.
pub(crate) async fn serve_grpc(listener: TcpListener, secure: Option<Secure>, routes: Routes, shutdown: Watch) {
    accept(listener, shutdown.clone(), move |stream, address, handshakes| {
        grpc_connection(stream, address, secure.clone(), routes.clone(), handshakes, shutdown.clone())
    })
    .await;
}

/// Serves HTTPS on `listener` until the shutdown starts.
pub(crate) async fn serve_https<F, A>(listener: TcpListener, tls: TlsAcceptor, answer: F, shutdown: Watch)
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response> + Send + 'static,
{
    accept(listener, shutdown.clone(), move |stream, _, handshakes| {
        https_connection(stream, tls.clone(), answer.clone(), handshakes, shutdown.clone())
    })
    .await;
}

async fn accept<F, C>(listener: TcpListener, shutdown: Watch, connection: F)
where
    F: Fn(TcpStream, SocketAddr, Arc<Semaphore>) -> C,
    C: Future<Output = ()> + Send + 'static,
{
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
            Some(_) = connections.join_next() => continue,
            () = shutdown.started() => break,
        };
        match accepted {
            Ok((stream, address)) => {
                connections.spawn(connection(stream, address, handshakes.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: give others time to close some.
                warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    let ended = async { while connections.join_next().await.is_some() {} };
    // Streams of xDS never end by themselves; dropping the set ends what is left.
    let _ = tokio::time::timeout(GRACE, ended).await;
}

async fn grpc_connection(
    stream: TcpStream,
    address: SocketAddr,
    secure: Option<Secure>,
    routes: Routes,
    handshakes: Arc<Semaphore>,
    shutdown: Watch,
) {
    let _ = stream.set_nodelay(true);
    match secure {
        None => {
            let peer = Peer { address: Some(address), ..Peer::default() };
            http2(stream, peer, None, routes, shutdown).await;
        }
        Some(secure) => {
            let Some(stream) = handshake(&secure.tls, stream, &handshakes).await else { return };
            let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let identity = certificate.and_then(crate::tls::identity);
            let peer = Peer { address: Some(address), identity, token: None };
            http2(stream, peer, Some(secure), routes, shutdown).await;
        }
    }
}

async fn handshake(
    tls: &TlsAcceptor,
    stream: TcpStream,
    handshakes: &Semaphore,
) -> Option<tokio_rustls::server::TlsStream<TcpStream>> {
    // Closed never: the semaphore lives as long as the listener's loop.
    let _permit = handshakes.acquire().await.ok()?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            debug!(%error, "TLS handshake failed");
            None
        }
        Err(_) => {
            debug!("TLS handshake took too long");
            None
        }
    }
}

async fn http2<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: I,
    peer: Peer,
    secure: Option<Secure>,
    routes: Routes,
    shutdown: Watch,
) {
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        let (mut peer, secure, routes) = (peer.clone(), secure.clone(), routes.clone());
        async move {
            if let Some(secure) = secure {
                match secure.identities.verify(peer.identity.as_ref(), bearer(request.headers())).await {
                    Ok(identity) => peer.identity = Some(identity),
                    Err(status) => {
                        secure.metrics.unauthenticated(request.uri().path() == ca::METHOD);
                        return Ok(status.into_http());
                    }
                }
                if request.uri().path() == ca::METHOD {
                    secure.metrics.csr();
                }
            }
            request.extensions_mut().insert(peer);
            routes.oneshot(request).await
        }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(KEEPALIVE.0))
        .keep_alive_timeout(KEEPALIVE.1)
        .max_concurrent_streams(64)
        .max_send_buf_size(MAX_UNSENT)
        .max_header_list_size(64 << 10);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, "gRPC connection ended");
    }
}

async fn https_connection<F, A>(
    stream: TcpStream,
    tls: TlsAcceptor,
    answer: F,
    handshakes: Arc<Semaphore>,
    shutdown: Watch,
) where
    F: Fn(Request) -> A + Send + Sync + 'static,
    A: Future<Output = Response> + Send + 'static,
{
    let Some(stream) = handshake(&tls, stream, &handshakes).await else { return };
    let service = service_fn(move |request: http::Request<Incoming>| {
        let answer = answer(request.map(|body| Limited::new(body, MAX_BODY)));
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Some(KEEPALIVE.0)).max_concurrent_streams(64);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, "HTTPS connection ended");
    }
}
