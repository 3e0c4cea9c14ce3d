//! Listening and connecting sockets: SO_REUSEPORT per worker, original destinations, peeking, keep-alive, binding.

use crate::io::Raw;
use crate::upstream::Source;
use proxy_core::Address;
use proxy_core::listener::SocketOption;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

/// A bound listening socket, not yet given to a worker's runtime.
#[derive(Debug)]
pub(crate) enum Bound {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Bound {
    /// Where a TCP socket listens.
    pub(crate) fn address(&self) -> Option<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok().map(Address::Ip),
            Self::Unix(_) => None,
        }
    }
}

/// What of a listener's configuration its sockets need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BindOptions<'a> {
    pub(crate) transparent: bool,
    pub(crate) freebind: bool,
    pub(crate) reuse_port: bool,
    pub(crate) backlog: i32,
    pub(crate) others: &'a [SocketOption],
}

/// When an option is set (`envoy.config.core.v3.SocketOption.SocketState`).
const BEFORE_BIND: i32 = 0;
const BOUND: i32 = 1;
const LISTENING: i32 = 2;

/// Sets those options of a configuration that are due now.
#[expect(unsafe_code, reason = "options that only a number names have no safe wrapper")]
fn set(socket: &impl AsRawFd, options: &[SocketOption], state: i32) -> io::Result<()> {
    for option in options.iter().filter(|option| option.state == state) {
        let number = |n: i64| libc::c_int::try_from(n).map_err(io::Error::other);
        let (level, name) = (number(option.level)?, number(option.name)?);
        let length = libc::socklen_t::try_from(option.value.len()).map_err(io::Error::other)?;
        // SAFETY: the value lives through the call, its length is its own, and the kernel only reads it.
        let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, option.value.as_ptr().cast(), length) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether the peer sends nothing more; what it sent may still be unread.
pub(crate) fn peer_is_done(stream: &TcpStream) -> bool {
    let ready = stream.ready(tokio::io::Interest::READABLE);
    futures::future::FutureExt::now_or_never(ready).is_some_and(|ready| ready.is_ok_and(|r| r.is_read_closed()))
}

/// Binds and listens.
pub(crate) fn listen(address: &Address, options: BindOptions<'_>) -> io::Result<Bound> {
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
            set(&socket, options.others, BEFORE_BIND)?;
            socket.bind(&SockAddr::from(*addr))?;
            set(&socket, options.others, BOUND)?;
            // Its connections inherit it, which saves each a system call.
            socket.set_tcp_nodelay(true)?;
            socket.listen(options.backlog)?;
            set(&socket, options.others, LISTENING)?;
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

/// What a new connection is made with.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ConnectOptions<'a> {
    /// The source address (inbound pass-through of Istio binds 127.0.0.6).
    pub(crate) bind: Option<SocketAddr>,
    /// A source that is somebody else's, instead.
    pub(crate) source: Option<Source>,
    pub(crate) others: &'a [SocketOption],
}

/// Connects.
pub(crate) async fn connect(address: &Address, options: ConnectOptions<'_>) -> io::Result<Raw> {
    let ConnectOptions { bind, source, others } = options;
    match address {
        Address::Ip(addr) => {
            let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            set(&socket, others, BEFORE_BIND)?;
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
            set(&socket, others, BOUND)?;
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
