//! `--run-validation`: does traffic of this process really come to the proxy's ports?
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::Config;
use crate::rules::{PASSTHROUGH_V4, PASSTHROUGH_V6};

/// Between two attempts, as the reference.
const EVERY: Duration = Duration::from_secs(1);
const CONNECT: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error("cannot listen on {port} or {other} of loopback")]
    Listen { port: u16, other: u16, source: io::Error },
    #[error(
        "iptables validation failed; workload is not ready for Istio: no connection to port {port} was redirected within {timeout:?}.\n\
         When using Istio CNI, this can occur if a pod is scheduled before the node is ready: restarting the pod then helps."
    )]
    Timeout { port: u16, timeout: Duration },
}

/// Over the family of the pod's first address, connects to the passthrough address at the probe port until a listener of the proxy's ports sees a connection that was meant for it.
/// Works only when this process is one whose traffic is captured.
pub(crate) fn validate(config: &Config, v6: bool, probe_port: u16, timeout: Duration) -> Result<(), Failed> {
    let loopback = if v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
    // Programs lead connections to addresses that tell them apart.
    let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let listening = if config.by_sockets { any } else { loopback };
    let listeners: Vec<io::Result<TcpListener>> =
        [config.proxy_port, config.inbound_port].map(|port| listen(listening, port)).into();
    let (ok, failed): (Vec<_>, Vec<_>) = listeners.into_iter().partition(Result::is_ok);
    let listeners: Vec<TcpListener> = ok.into_iter().flatten().collect();
    if let (true, Some(Err(source))) = (listeners.is_empty(), failed.into_iter().next()) {
        return Err(Failed::Listen { port: config.proxy_port, other: config.inbound_port, source });
    }
    let target = SocketAddr::new(if v6 { PASSTHROUGH_V6 } else { PASSTHROUGH_V4 }, probe_port);
    let deadline = Instant::now() + timeout;
    loop {
        let attempt = Instant::now();
        // Kept open until the listeners have looked: a closed connection may be gone from their queue.
        let connection = connect(loopback, target);
        if let Err(e) = &connection {
            eprintln!("Error connecting to {target}: {e}");
        }
        let seen = listeners.iter().any(|listener| {
            std::iter::from_fn(|| listener.accept().ok())
                .any(|(stream, _)| original_destination(&stream).is_ok_and(|to| to.port() == probe_port))
        });
        drop(connection);
        if seen {
            return Ok(());
        }
        let next = attempt + EVERY;
        if next >= deadline {
            std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            return Err(Failed::Timeout { port: probe_port, timeout });
        }
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn socket(ip: IpAddr) -> io::Result<Socket> {
    let domain = if ip.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    Ok(socket)
}

fn listen(ip: IpAddr, port: u16) -> io::Result<TcpListener> {
    let socket = socket(ip)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::new(ip, port).into())?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn connect(from: IpAddr, to: SocketAddr) -> io::Result<Socket> {
    let socket = socket(from)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), CONNECT)?;
    Ok(socket)
}

/// Where a redirected connection was going before (`SO_ORIGINAL_DST`); its local address when it was not redirected.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    const SO_ORIGINAL_DST: libc::c_int = 80;
    let mut local = stream.local_addr()?;
    local.set_ip(local.ip().to_canonical());
    // A dual-stack socket shows IPv4 connections as mapped addresses, but they are IPv4 ones to connection tracking.
    if local.is_ipv4() {
        // SAFETY: sockaddr_in is plain old data, for which all zeroes are valid.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        // SAFETY: the pointers are to a live structure and its length; the kernel writes at most that much.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_IP,
                SO_ORIGINAL_DST,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            return Ok(SocketAddrV4::new(ip, u16::from_be(address.sin_port)).into());
        }
    } else {
        // SAFETY: sockaddr_in6 is plain old data, for which all zeroes are valid.
        let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        // SAFETY: the pointers are to a live structure and its length; the kernel writes at most that much.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_IPV6,
                SO_ORIGINAL_DST,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            return Ok(SocketAddrV6::new(ip, u16::from_be(address.sin6_port), 0, 0).into());
        }
    }
    match io::Error::last_os_error() {
        // No connection tracking entry, or no connection tracking at all: nothing was redirected.
        e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => Ok(local),
        e => Err(e),
    }
}
