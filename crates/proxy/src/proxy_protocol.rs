//! The PROXY protocol, versions 1 and 2 (haproxy's proxy-protocol.txt): read by listeners, written to hosts.

use crate::stats::Named;
use proxy_core::Address;
use proxy_core::listener::ProxyProtocol;
use proxy_core::tlv::Tlv;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const PREFIX: &[u8; 6] = b"PROXY ";
/// The longest header of version 2.
const LONGEST: usize = LEAST + u16::MAX as usize;
/// The part of a version 2 header before its addresses.
const LEAST: usize = 16;
/// The longest version 1 line.
const MAX_LINE: usize = 107;

/// Addresses a header announces; `None` for LOCAL and UNKNOWN.
pub(crate) type Announced = Option<(SocketAddr, SocketAddr)>;

/// What a prefix of a connection is.
#[derive(Debug, PartialEq)]
pub(crate) enum Header {
    /// Its length and addresses.
    Found(usize, Announced),
    More,
    /// No PROXY header.
    Absent,
}

/// What reading headers counts, errors of all listeners in one.
pub(crate) const ERRORS: &str = "downstream_cx_proxy_proto_error";
const COUNTERS: [&str; 8] = [
    "not_found_allowed",
    "not_found_disallowed",
    "versions.v1.disallowed",
    "versions.v1.error",
    "versions.v1.found",
    "versions.v2.disallowed",
    "versions.v2.error",
    "versions.v2.found",
];

/// The names of all counters.
pub(crate) fn counters(config: &ProxyProtocol) -> impl Iterator<Item = String> {
    [ERRORS.to_owned()].into_iter().chain(COUNTERS.map(|what| counter(config, what)))
}

fn counter(config: &ProxyProtocol, what: &str) -> String {
    match &*config.stat_prefix {
        "" => format!("proxy_proto.{what}"),
        prefix => format!("proxy_proto.{prefix}.{what}"),
    }
}

/// Reads the header and replaces the addresses; its further fields.
pub(crate) async fn read(
    stream: &mut TcpStream,
    config: &ProxyProtocol,
    remote: &mut Address,
    local: &mut Address,
    stats: &Named,
) -> io::Result<Vec<Tlv>> {
    let count = |what: &str| stats.inc(&counter(config, what));
    let malformed = |version: usize| {
        stats.inc(ERRORS);
        count(&format!("versions.v{version}.error"));
        io::Error::from(io::ErrorKind::InvalidData)
    };
    let mut buf = vec![0u8; 536];
    loop {
        let n = stream.peek(&mut buf).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let version = if buf[0] == SIGNATURE[0] { 2 } else { 1 };
        if config.disallowed[version - 1] && (buf[..n].starts_with(SIGNATURE) || buf[..n].starts_with(PREFIX)) {
            if config.optional {
                // It is no header, then.
                count("not_found_allowed");
                return Ok(Vec::new());
            }
            count(&format!("versions.v{version}.found"));
            count(&format!("versions.v{version}.disallowed"));
            return Err(io::ErrorKind::InvalidData.into());
        }
        match parse(&buf[..n]).ok_or_else(|| malformed(version))? {
            Header::Found(len, addresses) => {
                let mut header = vec![0u8; len];
                stream.read_exact(&mut header).await?;
                if let Some((from, to)) = addresses {
                    *remote = Address::Ip(from);
                    *local = Address::Ip(to);
                }
                count(&format!("versions.v{version}.found"));
                return Ok(if version == 2 { tlvs(&header) } else { Vec::new() });
            }
            // As Envoy, which says so once a header of version 2 would be there.
            Header::Absent if !config.optional && n < LEAST && !crate::socket::peer_is_done(stream) => {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            Header::Absent if config.optional => {
                count("not_found_allowed");
                return Ok(Vec::new());
            }
            Header::Absent => {
                stats.inc(ERRORS);
                count("not_found_disallowed");
                return Err(io::ErrorKind::InvalidData.into());
            }
            // It says itself how long it is.
            Header::More if n == buf.len() && version == 2 && n < LONGEST => buf.resize(LONGEST, 0),
            Header::More if n == buf.len() => return Err(malformed(version)),
            Header::More if crate::socket::peer_is_done(stream) => return Err(io::ErrorKind::UnexpectedEof.into()),
            // Peeked bytes keep the socket readable, so this cannot wait for an event.
            Header::More => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
        }
    }
}

/// The further fields of a whole header of version 2.
fn tlvs(header: &[u8]) -> Vec<Tlv> {
    let addresses = match header.get(12..14) {
        Some([0x21, 0x11 | 0x12]) => 12,
        Some([0x21, 0x21 | 0x22]) => 36,
        _ => return Vec::new(),
    };
    let mut rest = header.get(LEAST + addresses..).unwrap_or_default();
    let mut all = Vec::new();
    while let Some(([kind, high, low], more)) = rest.split_first_chunk::<3>() {
        let Some((value, more)) = more.split_at_checked(usize::from(u16::from_be_bytes([*high, *low]))) else { break };
        all.push(Tlv { kind: *kind, value: value.into() });
        rest = more;
    }
    all
}

/// `None`: malformed.
pub(crate) fn parse(bytes: &[u8]) -> Option<Header> {
    let n = bytes.len().min(SIGNATURE.len());
    if bytes[..n] == SIGNATURE[..n] {
        return if bytes.len() < 16 { Some(Header::More) } else { parse_v2(bytes) };
    }
    let n = bytes.len().min(PREFIX.len());
    if bytes[..n] != PREFIX[..n] {
        return Some(Header::Absent);
    }
    let Some(end) = bytes.windows(2).take(MAX_LINE - 1).position(|w| w == b"\r\n") else {
        return if bytes.len() >= MAX_LINE { None } else { Some(Header::More) };
    };
    let line = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut words = line.trim_ascii_end().split(' ').skip(1);
    let addresses = match words.next()? {
        "UNKNOWN" => None,
        family @ ("TCP4" | "TCP6") => {
            let (from, to): (IpAddr, IpAddr) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let (from_port, to_port): (u16, u16) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let v4 = family == "TCP4";
            if from.is_ipv4() != v4 || to.is_ipv4() != v4 || words.next().is_some() {
                return None;
            }
            Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))
        }
        _ => return None,
    };
    found(end + 2, addresses)
}

fn parse_v2(bytes: &[u8]) -> Option<Header> {
    let len = 16 + usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    if bytes[12] >> 4 != 2 {
        return None;
    }
    let Some(body) = bytes.get(16..len) else { return Some(Header::More) };
    let port = |at: usize| body.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let addresses = match (bytes[12] & 0xf, bytes[13]) {
        (0, _) => None,
        (1, 0x11 | 0x12) => {
            check_tlvs(body.get(12..)?)?;
            let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?));
            Some((SocketAddr::from((ip(0)?, port(8)?)), SocketAddr::from((ip(4)?, port(10)?))))
        }
        (1, 0x21 | 0x22) => {
            check_tlvs(body.get(36..)?)?;
            let ip = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?));
            Some((SocketAddr::from((ip(0)?, port(32)?)), SocketAddr::from((ip(16)?, port(34)?))))
        }
        _ => return None,
    };
    found(len, addresses)
}

/// Connections go from one host to one other.
fn found(len: usize, addresses: Announced) -> Option<Header> {
    let unicast = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => !v4.is_unspecified() && !v4.is_broadcast() && !v4.is_multicast(),
        IpAddr::V6(v6) => !v6.is_unspecified() && !v6.is_multicast(),
    };
    let sound = addresses.is_none_or(|(from, to)| unicast(from.ip()) && unicast(to.ip()));
    sound.then_some(Header::Found(len, addresses))
}

/// Further fields of a version 2 header must fill it to its end.
fn check_tlvs(mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<3>()?;
        bytes = rest.get(usize::from(u16::from_be_bytes([head[1], head[2]]))..)?;
    }
    Some(())
}

/// As [`header`], with further fields, which version 2 has; `None`: they are more than it has room for.
pub(crate) fn header_with(
    version: u8,
    from: Option<SocketAddr>,
    to: Option<SocketAddr>,
    tlvs: &[Tlv],
) -> Option<Vec<u8>> {
    let mut out = header(version, from, to);
    if version == 1 || tlvs.is_empty() || out[12] != 0x21 {
        return Some(out);
    }
    for tlv in tlvs {
        out.push(tlv.kind);
        out.extend_from_slice(&u16::try_from(tlv.value.len()).ok()?.to_be_bytes());
        out.extend_from_slice(&tlv.value);
    }
    let length = u16::try_from(out.len() - LEAST).ok()?;
    out[14..16].copy_from_slice(&length.to_be_bytes());
    Some(out)
}

/// The header that announces a connection; addresses that are not both of one family are not told.
pub(crate) fn header(version: u8, from: Option<SocketAddr>, to: Option<SocketAddr>) -> Vec<u8> {
    let pair = from.zip(to).filter(|(from, to)| from.is_ipv4() == to.is_ipv4());
    if version == 1 {
        return match pair {
            Some((from, to)) => {
                let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
                format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
            }
            None => b"PROXY UNKNOWN\r\n".to_vec(),
        };
    }
    let mut out = SIGNATURE.to_vec();
    let Some((from, to)) = pair else {
        out.extend_from_slice(&[0x20, 0, 0, 0]);
        return out;
    };
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            out.extend_from_slice(&[0x21, 0x11, 0, 12]);
            out.extend_from_slice(&from.octets());
            out.extend_from_slice(&to.octets());
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            out.extend_from_slice(&[0x21, 0x21, 0, 36]);
            out.extend_from_slice(&octets(from));
            out.extend_from_slice(&octets(to));
        }
    }
    out.extend_from_slice(&from.port().to_be_bytes());
    out.extend_from_slice(&to.port().to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_where_the_specification_says_and_hold_nothing_else() {
        let padded = |length: usize| {
            let mut line = b"PROXY UNKNOWN ".to_vec();
            line.resize(length - 2, b'x');
            [&line[..], b"\r\n"].concat()
        };
        assert_eq!(parse(&padded(MAX_LINE)), Some(Header::Found(MAX_LINE, None)));
        assert_eq!(parse(&padded(MAX_LINE + 1)), None);
        assert!(parse(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n").is_some());
        for line in
            [" TCP4 1.2.3.4 5.6.7.8 1 2", "TCP4 1.2.3.4 5.6.7.8 1 2 3", "TCP4 ::1 ::2 1 2", "TCP6 1.2.3.4 ::2 1 2"]
        {
            assert_eq!(parse(format!("PROXY {line}\r\n").as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn further_fields_fill_the_header_and_addresses_are_of_one_host() {
        let v2 = |kind: u8, from: [u8; 4], more: &[u8]| {
            let mut bytes = [&SIGNATURE[..], &[0x21, kind, 0, 12 + more.len() as u8], &from, &[5, 6, 7, 8]].concat();
            bytes.extend_from_slice(&[0, 1, 0, 2]);
            bytes.extend_from_slice(more);
            parse(&bytes)
        };
        let found = |more: usize| {
            let (from, to) = ("1.2.3.4:1".parse().unwrap(), "5.6.7.8:2".parse().unwrap());
            Some(Header::Found(28 + more, Some((from, to))))
        };
        assert_eq!(v2(0x11, [1, 2, 3, 4], &[0xea, 0, 1, 7]), found(4));
        assert_eq!(v2(0x12, [1, 2, 3, 4], &[]), found(0), "datagrams are as good");
        assert_eq!(v2(0x11, [1, 2, 3, 4], &[0xea, 0, 1]), None, "a value is missing");
        assert_eq!(v2(0, [1, 2, 3, 4], &[]), None, "no family");
        assert_eq!(v2(0x11, [0; 4], &[]), None);
        assert_eq!(v2(0x11, [224, 0, 0, 1], &[]), None);
        assert_eq!(parse(b"PROXY TCP4 255.255.255.255 5.6.7.8 1 2\r\n"), None);
    }

    #[test]
    fn what_is_written_can_be_read() {
        let pairs = [("1.2.3.4:10", "5.6.7.8:20"), ("[::1]:1", "[fe80::1]:65535")];
        for (version, (from, to)) in [1, 2].into_iter().flat_map(|v| pairs.map(|pair| (v, pair))) {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let bytes = header(version, Some(from), Some(to));
            assert_eq!(parse(&bytes), Some(Header::Found(bytes.len(), Some((from, to)))));
            let unknown = header(version, Some(from), None);
            assert_eq!(parse(&unknown), Some(Header::Found(unknown.len(), None)));
        }
    }

    #[test]
    fn both_versions() {
        let line = b"PROXY TCP4 1.2.3.4 5.6.7.8 10 20\r\nrest";
        let want = Some(("1.2.3.4:10".parse().unwrap(), "5.6.7.8:20".parse().unwrap()));
        assert_eq!(parse(line), Some(Header::Found(34, want)));
        let mut v2 = SIGNATURE.to_vec();
        v2.extend([0x21, 0x11, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 0, 20]);
        assert_eq!(parse(&v2), Some(Header::Found(28, want)));
        for i in 1..28 {
            assert_eq!(parse(&v2[..i]), Some(Header::More));
        }
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Some(Header::Absent));
        assert_eq!(parse(b"PROXY TCP4 nonsense\r\n"), None);
    }
}
