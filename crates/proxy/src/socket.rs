//! Listening and connecting sockets: SO_REUSEPORT per worker, original destinations, peeking, keep-alive, binding.

use crate::io::Raw;
use crate::upstream::Source;
use proxy_core::Address;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

/// A bound listening socket, not yet given to a worker's runtime.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// What of a listener's configuration its sockets need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BindOptions {
    pub(crate) transparent: bool,
    pub(crate) freebind: bool,
    pub(crate) reuse_port: bool,
    pub(crate) backlog: i32,
}

/// Binds and listens.
pub(crate) fn listen(address: &Address, options: BindOptions) -> io::Result<Bound> {
    match address {
        Address::Ip(addr) => {
            let socket = Socket::new(Domain::for_address(*addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            if options.reuse_port {
                socket.set_reuse_port(true)?;
            }
            if addr.is_ipv6() {
                // `::` without ipv4_compat listens to IPv6 only, as in Envoy.
                socket.set_only_v6(true)?;
            }
            if options.transparent {
                match addr {
                    SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                    SocketAddr::V6(_) => {
                        socket.set_ip_transparent_v6(true)?;
                    }
                }
            }
            if options.freebind {
                match addr {
                    SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
                    SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
                }
            }
            socket.bind(&SockAddr::from(*addr))?;
            socket.listen(options.backlog)?;
            socket.set_nonblocking(true)?;
            Ok(Bound::Tcp(socket.into()))
        }
        Address::Pipe(path) => {
            let listener = if let Some(name) = path.strip_prefix('@') {
                let addr = std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes())?;
                std::os::unix::net::UnixListener::bind_addr(&addr)?
            } else {
                // A socket file that an earlier process left is replaced, as Envoy does.
                match std::fs::remove_file(&**path) {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
                std::os::unix::net::UnixListener::bind(&**path)?
            };
            listener.set_nonblocking(true)?;
            Ok(Bound::Unix(listener))
        }
        Address::Internal(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Destination before REDIRECT, from conntrack; `None` when the connection was not redirected.
pub(crate) fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let local = stream.local_addr().ok()?;
    let found = if is_v4(&local) { socket.original_dst_v4() } else { socket.original_dst_v6() };
    found.ok().and_then(|a| a.as_socket())
}

fn is_v4(addr: &SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => v6.to_ipv4_mapped().is_some(),
    }
}

/// TCP keep-alive of upstream connections; zero durations leave the kernel's value.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KeepAlive {
    pub(crate) time: Option<Duration>,
    pub(crate) interval: Option<Duration>,
    pub(crate) probes: Option<u32>,
}

impl KeepAlive {
    pub(crate) fn apply(self, stream: &TcpStream) -> io::Result<()> {
        let mut params = socket2::TcpKeepalive::new();
        if let Some(time) = self.time {
            params = params.with_time(time);
        }
        if let Some(interval) = self.interval {
            params = params.with_interval(interval);
        }
        if let Some(probes) = self.probes {
            params = params.with_retries(probes);
        }
        SockRef::from(stream).set_tcp_keepalive(&params)
    }
}

/// Connects; `bind` is the source address (inbound pass-through of Istio binds 127.0.0.6), unless the connection comes
/// with a source of its own.
pub(crate) async fn connect(address: &Address, bind: Option<SocketAddr>, source: Option<Source>) -> io::Result<Raw> {
    match address {
        Address::Ip(addr) => {
            let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            let source = source.filter(|source| source.ip.is_ipv4() == addr.is_ipv4());
            if let Some(source) = source {
                let socket = SockRef::from(&socket);
                match source.ip {
                    IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                    IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
                }
                if source.mark != 0 {
                    socket.set_mark(source.mark)?;
                }
                socket.bind(&SocketAddr::new(source.ip, 0).into())?;
            } else if let Some(bind) = bind.filter(|b| b.is_ipv4() == addr.is_ipv4()) {
                socket.bind(bind)?;
            }
            let stream = socket.connect(*addr).await?;
            stream.set_nodelay(true)?;
            Ok(Raw::Tcp(stream))
        }
        Address::Pipe(path) => {
            if let Some(name) = path.strip_prefix('@') {
                let addr = std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes())?;
                let stream = std::os::unix::net::UnixStream::connect_addr(&addr)?;
                stream.set_nonblocking(true)?;
                return Ok(Raw::Unix(UnixStream::from_std(stream)?));
            }
            Ok(Raw::Unix(UnixStream::connect(&**path).await?))
        }
        Address::Internal(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}
