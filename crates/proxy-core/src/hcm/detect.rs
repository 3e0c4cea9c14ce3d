//! Extensions that find the client's address where `use_remote_address` is off
//! (`HttpConnectionManager.original_ip_detection_extensions`).

use std::net::{IpAddr, SocketAddr};

use crate::address::Address;
use crate::any::Typed;
use crate::cidr::Cidr;
use crate::headers::Headers;
use crate::pb;
use crate::rejected::{At, Compiled, Invalid};

/// One extension; the first that finds an address is followed.
#[derive(Clone, Debug)]
pub(crate) enum Detection {
    /// `envoy.http.original_ip_detection.xff`.
    Forwarded { trusted: Trusted, append: bool },
    /// `envoy.http.original_ip_detection.custom_header`.
    Header {
        name: Box<str>,
        /// The address may be one from inside.
        may_be_inside: bool,
        /// Requests without an address are answered with this status.
        refuse: Option<u16>,
    },
}

/// Which addresses of `x-forwarded-for` are our own proxies'.
#[derive(Clone, Debug)]
pub(crate) enum Trusted {
    Hops(usize),
    Ranges(Box<[Cidr]>),
}

/// What an extension says.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Detected {
    pub(super) address: Option<Address>,
    /// The address may be one from inside.
    pub(super) may_be_inside: bool,
    /// The peer goes into `x-forwarded-for`.
    pub(super) append: bool,
    pub(super) refuse: Option<u16>,
}

impl Detection {
    pub(super) fn compile(extension: &pb::core::TypedExtensionConfig) -> Compiled<Self> {
        let typed = Typed::open(extension.typed_config.as_ref())?;
        match &*typed.name {
            "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig" => {
                let config: pb::ext::http::original_ip_detection::xff::v3::XffConfig = typed.decode()?;
                let trusted = match &config.xff_trusted_cidrs {
                    None => Trusted::Hops(config.xff_num_trusted_hops as usize),
                    Some(_) if config.xff_num_trusted_hops > 0 => {
                        return Err(Invalid::new("xff_num_trusted_hops", "cannot stand beside xff_trusted_cidrs"));
                    }
                    Some(trusted) => Trusted::Ranges(
                        trusted.cidrs.iter().map(Cidr::compile).collect::<Compiled<_>>().at("xff_trusted_cidrs")?,
                    ),
                };
                Ok(Self::Forwarded { trusted, append: !crate::fields::flag(config.skip_xff_append.as_ref(), true) })
            }
            "envoy.extensions.http.original_ip_detection.custom_header.v3.CustomHeaderConfig" => {
                let config: pb::ext::http::original_ip_detection::custom_header::v3::CustomHeaderConfig =
                    typed.decode()?;
                if config.header_name.is_empty() {
                    return Err(Invalid::new("header_name", "is missing"));
                }
                // Envoy `toErrorCode`: what is no error says 403.
                let status = |code: i32| u16::try_from(code).ok().filter(|code| (400..600).contains(code));
                Ok(Self::Header {
                    name: config.header_name.to_ascii_lowercase().into(),
                    may_be_inside: config.allow_extension_to_set_address_as_trusted,
                    refuse: config.reject_with_status.as_ref().map(|s| status(s.code).unwrap_or(403)),
                })
            }
            _ => Err(typed.unknown()),
        }
    }

    /// Looks for the address of a request from this peer.
    pub(super) fn detect(&self, headers: &Headers, peer: &Address) -> Detected {
        match self {
            Self::Forwarded { trusted: Trusted::Hops(hops), append } => {
                let (address, may_be_inside) = super::request::last_forwarded(headers, *hops);
                Detected { address, may_be_inside, append: *append, refuse: None }
            }
            Self::Forwarded { trusted: Trusted::Ranges(ranges), append } => {
                let ours = |ip: IpAddr| ranges.iter().any(|range| range.contains(ip));
                let found = peer.ip().filter(|ip| ours(*ip)).and_then(|_| last_foreign(headers, ours));
                let (address, may_be_inside) = found.map_or((None, false), |(address, only)| (Some(address), only));
                Detected { address, may_be_inside, append: *append, refuse: None }
            }
            Self::Header { name, may_be_inside, refuse } => {
                let ip = headers.get_str(name).and_then(|value| value.trim().parse().ok());
                let refuse = if ip.is_none() { *refuse } else { None };
                Detected { address: ip.map(at), may_be_inside: *may_be_inside, append: false, refuse }
            }
        }
    }
}

fn at(ip: IpAddr) -> Address {
    Address::Ip(SocketAddr::new(ip, 0))
}

/// The last address of `x-forwarded-for` that is not ours, else the first, and whether it is the only one
/// (Envoy `Http::Utility::getLastNonTrustedAddressFromXFF`).
fn last_foreign(headers: &Headers, ours: impl Fn(IpAddr) -> bool) -> Option<(Address, bool)> {
    let value = headers.joined("x-forwarded-for")?;
    let mut last = None;
    for text in std::str::from_utf8(&value).ok()?.rsplit(',') {
        let ip = text.trim().parse().ok()?;
        last = Some(at(ip));
        if !ours(ip) {
            break;
        }
    }
    last.map(|address| (address, !value.contains(&b',')))
}
