//! The pods' way outside: TCP connections redirected to `up`, which dials from the host's namespace.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Open relayed connections; beyond that new ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 4096;
/// As most clients' own patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until dropped.
pub(crate) async fn serve(listener: TcpListener) -> io::Result<std::convert::Infallible> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let own = listener.local_addr()?;
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(async move {
                        if let Err(error) = relay(stream, own).await {
                            tracing::debug!(%peer, %error, "connection to the outside");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a connection to the outside");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn relay(mut inside: TcpStream, own: SocketAddr) -> io::Result<()> {
    let target = original_destination(&inside)?;
    if target == own || !may_dial(target.ip()) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{target} is not outside")));
    }
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await;
    let mut outside = match connected {
        Ok(Ok(stream)) => stream,
        refused => {
            // The pod's side is connected already; a reset is the closest to what it would have seen.
            let _ = rustix::net::sockopt::set_socket_linger(inside.as_fd(), Some(Duration::ZERO));
            return match refused {
                Ok(Err(error)) => Err(error),
                _ => Err(io::ErrorKind::TimedOut.into()),
            };
        }
    };
    let _ = (inside.set_nodelay(true), outside.set_nodelay(true));
    tokio::io::copy_bidirectional(&mut inside, &mut outside).await.map(drop)
}

/// The host's loopback is not the pods' business: services there count on not being reachable.
fn may_dial(ip: IpAddr) -> bool {
    let ip = match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        v4 => v4,
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = socket2::SockRef::from(stream);
    let address = if stream.local_addr()?.is_ipv4() { socket.original_dst_v4()? } else { socket.original_dst_v6()? };
    address.as_socket().ok_or_else(|| io::Error::other("no original destination"))
}
