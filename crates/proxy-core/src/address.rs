use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_types::ArcStr;

use crate::pb;
use crate::rejected::{Compiled, Invalid};

/// Where something listens or connects to. Prints as Envoy prints it (`1.2.3.4:80`, `[::1]:80`, `/run/x.sock`).
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Address {
    /// TCP.
    Ip(SocketAddr),
    /// A Unix socket; a leading `@` means the abstract namespace.
    Pipe(ArcStr),
    /// A listener of this process (`envoy_internal_address`).
    Internal(ArcStr),
}

impl Address {
    /// Address and port, unless it is no IP address.
    pub fn socket(&self) -> Option<SocketAddr> {
        match self {
            Address::Ip(addr) => Some(*addr),
            _ => None,
        }
    }

    /// The IP address, unless it is none.
    pub fn ip(&self) -> Option<IpAddr> {
        self.socket().map(|s| s.ip())
    }

    /// Whether it is 127.0.0.1 or ::1; the rest of 127.0.0.0/8 does not count, as in Envoy (`Network::Utility::isLoopbackAddress`).
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST)
    }

    /// The port, unless it is no IP address.
    pub fn port(&self) -> Option<u16> {
        self.socket().map(|s| s.port())
    }

    /// Reads `core.v3.Address` where only literal IP addresses are allowed.
    pub(crate) fn compile(address: Option<&pb::core::Address>) -> Compiled<Self> {
        match HostAddress::compile(address)? {
            HostAddress::Literal(address) => Ok(address),
            HostAddress::Name(name, _) => {
                Err(Invalid::new("socket_address.address", format!("malformed IP address: {name}")))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ip(addr) => addr.fmt(f),
            Address::Pipe(path) => f.write_str(path),
            Address::Internal(name) => write!(f, "envoy://{name}/"),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        Address::Ip(addr)
    }
}

/// An endpoint's address, which may be a DNS name in clusters that resolve names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum HostAddress {
    /// Known already.
    Literal(Address),
    /// Name and port, to be resolved.
    Name(ArcStr, u16),
}

impl HostAddress {
    pub(crate) fn compile(address: Option<&pb::core::Address>) -> Compiled<Self> {
        use pb::core::address::Address as Kind;
        let kind = address.and_then(|a| a.address.as_ref()).ok_or_else(|| Invalid::new("address", "is missing"))?;
        match kind {
            Kind::SocketAddress(socket) => socket_address(socket),
            Kind::Pipe(pipe) if pipe.path.is_empty() => Err(Invalid::new("pipe.path", "is empty")),
            Kind::Pipe(pipe) if pipe.mode > 0o777 => Err(Invalid::new("pipe.mode", "has more than permissions")),
            Kind::Pipe(pipe) => Ok(Self::Literal(Address::Pipe(pipe.path.as_str().into()))),
            Kind::EnvoyInternalAddress(internal) => match &internal.address_name_specifier {
                Some(pb::core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(name)) => {
                    Ok(Self::Literal(Address::Internal(name.as_str().into())))
                }
                None => Err(Invalid::new("envoy_internal_address", "has no listener name")),
            },
        }
    }
}

fn socket_address(socket: &pb::core::SocketAddress) -> Compiled<HostAddress> {
    if socket.protocol != 0 {
        return Err(Invalid::unsupported("socket_address.protocol"));
    }
    if !socket.network_namespace_filepath.is_empty() {
        return Err(Invalid::unsupported("socket_address.network_namespace_filepath"));
    }
    if !socket.resolver_name.is_empty() {
        return Err(Invalid::unsupported("socket_address.resolver_name"));
    }
    let port = port_of(socket)?;
    if socket.address.is_empty() {
        return Err(Invalid::new("socket_address.address", "is empty"));
    }
    Ok(match socket.address.parse::<IpAddr>() {
        Ok(ip) => HostAddress::Literal(Address::Ip(SocketAddr::new(ip, port))),
        Err(_) => HostAddress::Name(socket.address.as_str().into(), port),
    })
}

fn port_of(socket: &pb::core::SocketAddress) -> Compiled<u16> {
    match &socket.port_specifier {
        Some(pb::core::socket_address::PortSpecifier::PortValue(port)) => {
            u16::try_from(*port).map_err(|_| Invalid::new("socket_address.port_value", format!("{port} is no port")))
        }
        Some(pb::core::socket_address::PortSpecifier::NamedPort(_)) => {
            Err(Invalid::unsupported("socket_address.named_port"))
        }
        None => Err(Invalid::new("socket_address.port_value", "is missing")),
    }
}

/// The address of a `SocketAddress` used for binding (no name, port may be 0).
pub(crate) fn bind_address(socket: &pb::core::SocketAddress) -> Compiled<SocketAddr> {
    let ip = socket
        .address
        .parse::<IpAddr>()
        .map_err(|_| Invalid::new("address", format!("malformed IP address: {}", socket.address)))?;
    Ok(SocketAddr::new(ip, port_of(socket).unwrap_or(0)))
}
