//! Types and values of sets and maps.

use std::fmt;
use std::net::IpAddr;

use super::L4;

/// Type of a key or of a map's data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Type {
    Ipv4,
    Ipv6,
    Protocol,
    Port,
    Mark,
    Uid,
    Gid,
    /// A plain number (numgen).
    Integer,
}

impl Type {
    /// nft's number of the type, only for `nft list`: the kernel stores it and does not look at it.
    fn number(self) -> u32 {
        match self {
            Self::Integer => 4,
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Mark => 19,
            Self::Uid => 24,
            Self::Gid => 25,
        }
    }

    /// Length in bytes.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Ipv6 => 16,
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Ipv4 | Self::Mark | Self::Uid | Self::Gid | Self::Integer => 4,
        }
    }

    /// Numbers that the kernel compares in its own byte order.
    pub(super) fn host_order(self) -> bool {
        matches!(self, Self::Mark | Self::Uid | Self::Gid | Self::Integer)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::Mark => "mark",
            Self::Uid => "uid",
            Self::Gid => "gid",
            Self::Integer => "integer",
        }
    }
}

/// nft's type number of a concatenation: six bits each.
pub(super) fn type_number(types: &[Type]) -> u32 {
    types.iter().fold(0, |number, t| number << 6 | t.number())
}

/// Length of a concatenation: every field padded to a register of four bytes, except when it stands alone.
pub(super) fn key_len(types: &[Type]) -> usize {
    match types {
        [single] => single.len(),
        many => many.iter().map(|t| t.len().next_multiple_of(4)).sum(),
    }
}

pub(super) fn names(types: &[Type]) -> String {
    types.iter().map(|t| t.name()).collect::<Vec<_>>().join(" . ")
}

/// One field of an element.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Value {
    Ip(IpAddr),
    Protocol(L4),
    Port(u16),
    /// Marks, ids and plain numbers.
    Number(u32),
}

impl Value {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Ip(IpAddr::V4(ip)) => ip.octets().to_vec(),
            Self::Ip(IpAddr::V6(ip)) => ip.octets().to_vec(),
            Self::Protocol(l4) => vec![l4.number()],
            Self::Port(port) => port.to_be_bytes().to_vec(),
            Self::Number(number) => number.to_ne_bytes().to_vec(),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Protocol(l4) => l4.fmt(f),
            Self::Port(port) => port.fmt(f),
            Self::Number(number) => number.fmt(f),
        }
    }
}

/// The bytes of a concatenation as registers hold it.
pub(super) fn key_bytes(values: &[Value]) -> Vec<u8> {
    if let [single] = values {
        return single.bytes();
    }
    let mut bytes = Vec::new();
    for value in values {
        bytes.extend(value.bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

pub(super) fn join(values: &[Value]) -> String {
    values.iter().map(Value::to_string).collect::<Vec<_>>().join(" . ")
}

/// Where a rule or a verdict map sends a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    pub(super) fn code(&self) -> i32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Jump(_) => -3,
            Self::Goto(_) => -4,
            Self::Return => -5,
        }
    }

    pub(super) fn chain(&self) -> Option<&str> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(chain),
            _ => None,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}
