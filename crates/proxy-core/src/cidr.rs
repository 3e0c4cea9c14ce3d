use std::net::IpAddr;

use ipnet::IpNet;

use crate::pb;
use crate::rejected::{Compiled, Invalid};

/// A range of IP addresses; bits beyond the prefix do not count.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Cidr(IpNet);

impl From<IpNet> for Cidr {
    fn from(net: IpNet) -> Self {
        Self(net.trunc())
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Cidr {
    pub(crate) fn compile(range: &pb::core::CidrRange) -> Compiled<Self> {
        let bad = |reason: String| Invalid::new("address_prefix", reason);
        let ip: IpAddr =
            range.address_prefix.parse().map_err(|_| bad(format!("malformed IP address: {}", range.address_prefix)))?;
        // Envoy (CidrRange::create): a missing length is 0, one beyond the address is cut to it.
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let length = range.prefix_len.as_ref().map_or(0, |l| l.value).min(most);
        let net = IpNet::new(ip, length as u8).map_err(|e| bad(e.to_string()))?;
        Ok(Self(net.trunc()))
    }

    /// The range of an address with so many fixed bits, at most those it has.
    pub(crate) fn of(ip: IpAddr, length: u32) -> Self {
        let all = IpNet::from(ip);
        let length = length.min(all.prefix_len().into());
        Self(IpNet::new(ip, length as u8).unwrap_or(all).trunc())
    }

    /// Number of fixed bits.
    pub fn prefix_len(&self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether the address lies in the range. IPv4 ranges never hold IPv6 addresses, mapped ones neither.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }
}
