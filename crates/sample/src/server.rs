use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) type Reply = Response<Full<Bytes>>;

/// The largest request body that a sample takes, in bytes.
const BODY_LIMIT: usize = 1 << 20;

/// What a sample answers; shared by all its connections.
pub(crate) trait App: Send + Sync + 'static {
    fn answer(&self, request: Request<Bytes>) -> impl Future<Output = Reply> + Send;
}

/// Where a sample listens.
pub(crate) enum At {
    /// A port of all addresses.
    Port(u16),
    Address(SocketAddr),
    Socket(PathBuf),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    async fn open(at: At) -> anyhow::Result<Listener> {
        match at {
            // A dual-stack socket where IPv6 exists, as the images' servers have it.
            At::Port(port) => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
                Ok(listener) => Ok(Listener::Tcp(listener)),
                Err(_) => {
                    let listener = TcpListener::bind(("0.0.0.0", port)).await;
                    listener.map(Listener::Tcp).with_context(|| format!("cannot listen on port {port}"))
                }
            },
            At::Address(address) => {
                let listener = TcpListener::bind(address).await;
                listener.map(Listener::Tcp).with_context(|| format!("cannot listen on {address}"))
            }
            At::Socket(path) => {
                // What a former container of the pod left in the volume.
                let _ = std::fs::remove_file(&path);
                let listener = UnixListener::bind(&path);
                let listener = listener.with_context(|| format!("cannot listen on {}", path.display()))?;
                // The sidecar is another user.
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
                Ok(Listener::Unix(listener))
            }
        }
    }

    async fn accept(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Listener::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Serves HTTP/1.1 and h2c, until listening fails.
pub(crate) async fn serve(at: At, app: impl App) -> anyhow::Result<()> {
    let listener = Listener::open(at).await?;
    let app = Arc::new(app);
    lifecycle::memory::release_unused();
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            // The client went away, or files ran out for a moment.
            Err(_) => {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                continue;
            }
        };
        let app = app.clone();
        // Nobody waits for a connection: the process ends when it is told to.
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let app = app.clone();
                async move { Ok::<_, Infallible>(answer(&*app, request).await) }
            });
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(app: &impl App, request: Request<Incoming>) -> Reply {
    let (head, body) = request.into_parts();
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(body) => app.answer(Request::from_parts(head, body.to_bytes())).await,
        Err(_) => text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large"),
    }
}

pub(crate) fn text(status: StatusCode, body: &str) -> Reply {
    reply(status, "text/plain; charset=utf-8", body.to_owned())
}

pub(crate) fn json(status: StatusCode, body: &serde_json::Value) -> Reply {
    reply(status, "application/json", body.to_string())
}

pub(crate) fn html(body: String) -> Reply {
    reply(StatusCode::OK, "text/html; charset=utf-8", body)
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// Returns when the process is asked to stop.
pub(crate) async fn stop_signal() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
