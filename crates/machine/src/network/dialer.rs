//! Sockets of the mesh's namespace for code that runs in the host's.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};

use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes};
use hyper_util::rt::TokioIo;
use netns::Netns;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

/// Most bytes read of an answer; the largest are sidecars' metrics.
const BODY_LIMIT: usize = 8 << 20;

type Reply = oneshot::Sender<io::Result<TcpSocket>>;

/// Opens TCP connections from inside the mesh's namespace. Cheap to clone.
///
/// A socket belongs to the namespace it was made in for all its life, so one thread that lives there makes them, and the runtime's
/// threads never move.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    requests: mpsc::Sender<(bool, Reply)>,
}

impl Dialer {
    /// Starts the thread; it ends with the last handle.
    pub(crate) fn start(ns: Arc<Netns>) -> io::Result<Self> {
        let (requests, queue) = mpsc::channel::<(bool, Reply)>();
        std::thread::Builder::new().name("mesh-sockets".to_owned()).spawn(move || {
            let entered = ns.enter();
            for (v6, reply) in queue {
                let socket = match &entered {
                    Ok(()) if v6 => TcpSocket::new_v6(),
                    Ok(()) => TcpSocket::new_v4(),
                    Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
                };
                // A cancelled asker just drops the socket.
                let _ = reply.send(socket);
            }
        })?;
        Ok(Self { requests })
    }

    /// Connects to an address as the mesh's namespace sees it.
    pub(crate) async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other("the mesh's network is gone");
        self.requests.send((address.is_ipv6(), reply)).map_err(|_| gone())?;
        let stream = answer.await.map_err(|_| gone())??.connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// One HTTP/1.1 request on a connection of its own.
    pub(crate) async fn http<B>(
        &self,
        address: SocketAddr,
        request: http::Request<B>,
    ) -> Result<(http::StatusCode, Bytes), String>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = self.connect(address).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let body =
                Limited::new(response.into_body(), BODY_LIMIT).collect().await.map_err(|error| error.to_string())?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            // The connection may end before the answer has been read out of it.
            ended = connection => match ended {
                Ok(()) => exchange.await,
                Err(error) => Err(error.to_string()),
            },
        }
    }
}
