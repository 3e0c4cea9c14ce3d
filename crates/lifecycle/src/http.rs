//! A small HTTP/1.1 server for probes, metrics and admin pages. Bounded in everything a peer can make grow.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream, unix};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::drain::Watch;

/// A request whose body ends with an error beyond [`MAX_BODY`].
pub type Request = http::Request<Limited<Incoming>>;
/// A response with its body in memory.
pub type Response = http::Response<Full<Bytes>>;

/// The largest request body: admin requests have next to none.
pub const MAX_BODY: usize = 1 << 20;
/// Connections at a time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 256;
/// How long a peer may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// The answer to one request; slow answers hold up only their own connection.
    fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send + '_>>;
}

/// Accepts connections until the drain starts, then lets the requests under way finish.
pub async fn serve(listener: TcpListener, handler: Arc<dyn Handler>, drain: Watch) {
    serve_by_peer(listener, move |_| handler.clone(), drain).await;
}

/// The same with a handler chosen by the peer's address, for pages that only some may see.
pub async fn serve_by_peer(listener: TcpListener, handler_for: impl Fn(SocketAddr) -> Arc<dyn Handler>, drain: Watch) {
    serve_accepted(listener, handler_for, drain).await;
}

/// The same on a unix socket.
pub async fn serve_unix(listener: UnixListener, handler: Arc<dyn Handler>, drain: Watch) {
    serve_accepted(listener, move |_| handler.clone(), drain).await;
}

/// What both kinds of listeners do.
trait Accepts {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    type Peer;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Accepts for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    fn next(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        self.accept()
    }
}

impl Accepts for UnixListener {
    type Stream = UnixStream;
    type Peer = unix::SocketAddr;

    fn next(&self) -> impl Future<Output = io::Result<(UnixStream, unix::SocketAddr)>> + Send {
        self.accept()
    }
}

async fn serve_accepted<L: Accepts>(listener: L, handler_for: impl Fn(L::Peer) -> Arc<dyn Handler>, drain: Watch) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit,
            () = drain.started() => return,
        };
        let accepted = tokio::select! {
            accepted = listener.next() => accepted,
            () = drain.started() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: give others time to close some.
                debug!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (handler, drain) = (handler_for(peer), drain.clone());
        // Nobody waits for a connection's task itself: it holds a drain watch, which the owner waits for.
        tokio::spawn(async move {
            let service = service_fn(|request: http::Request<Incoming>| {
                let handler = handler.clone();
                async move { Ok::<_, Infallible>(handler.handle(request.map(|body| Limited::new(body, MAX_BODY))).await) }
            });
            let mut builder = hyper::server::conn::http1::Builder::new();
            let connection = builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(64 << 10);
            let mut connection = std::pin::pin!(connection.serve_connection(TokioIo::new(stream), service));
            let result = tokio::select! {
                result = connection.as_mut() => result,
                () = drain.started() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
}

/// A plain text answer.
pub fn text(status: u16, body: impl Into<String>) -> Response {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

/// A JSON answer, indented for people.
pub fn json(status: u16, value: &serde_json::Value) -> Response {
    with_type(status, "application/json", format!("{value:#}\n"))
}

/// An answer of this media type.
pub fn with_type(status: u16, media_type: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(media_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send + '_>> {
            Box::pin(async move { text(200, request.uri().path().to_owned()) })
        }
    }

    #[tokio::test]
    async fn answers_and_drains() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watch) = crate::drain::channel();
        let server = tokio::spawn(serve(listener, Arc::new(Echo), watch));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut buffer = [0; 1024];
        let n = stream.read(&mut buffer).await.unwrap();
        let answer = String::from_utf8_lossy(&buffer[..n]).into_owned();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("/hello"), "{answer}");
        assert!(trigger.drain(Duration::from_secs(5)).await);
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn garbage_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_trigger, watch) = crate::drain::channel();
        tokio::spawn(serve(listener, Arc::new(Echo), watch));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"\x16\x03\x01\x00garbage\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"));
    }
}
