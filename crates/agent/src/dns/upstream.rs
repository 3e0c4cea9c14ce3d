//! The pod's own resolver: bytes out, bytes back, so that EDNS, truncation and whatever comes next are kept.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tracing::debug;

use super::message::Query;

/// The largest UDP answer.
const MAX_DATAGRAM: usize = 65535;

/// What a resolv.conf says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct ResolvConf {
    pub servers: Vec<SocketAddr>,
    pub search: Vec<String>,
    /// A name with fewer dots is looked for in the search domains first.
    pub ndots: usize,
}

impl ResolvConf {
    /// Reads the file.
    pub(crate) fn load(path: &Path) -> std::io::Result<ResolvConf> {
        Ok(ResolvConf::parse(&std::fs::read_to_string(path)?))
    }

    /// Reads the text; see resolv.conf(5): the last `search` or `domain` counts, comments start with `#` or `;`.
    pub(crate) fn parse(text: &str) -> ResolvConf {
        let mut conf = ResolvConf { ndots: 1, ..ResolvConf::default() };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words
                        .next()
                        .and_then(|word| word.split('%').next())
                        .and_then(|word| word.parse::<IpAddr>().ok());
                    conf.servers.extend(address.map(|ip| SocketAddr::new(ip, 53)));
                }
                Some("search" | "domain") => conf.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let ndots = words.filter_map(|word| word.strip_prefix("ndots:")?.parse().ok()).next_back();
                    conf.ndots = ndots.unwrap_or(conf.ndots);
                }
                _ => {}
            }
        }
        conf
    }

    /// The names that a resolver asks for, in order, without trailing dots. Source: resolv.conf(5), `ndots`.
    pub(crate) fn candidates(&self, name: &str) -> Vec<String> {
        let lower = name.to_ascii_lowercase();
        if let Some(absolute) = lower.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let searched = self.search.iter().map(|domain| format!("{lower}.{}", domain.trim_matches('.')));
        let first = lower.matches('.').count() >= self.ndots;
        let own = || std::iter::once(lower.clone());
        if first { own().chain(searched).collect() } else { searched.chain(own()).collect() }
    }
}

/// The servers to ask.
#[derive(Debug)]
pub(super) struct Upstream {
    servers: Vec<SocketAddr>,
    parallel: bool,
    timeout: Duration,
    /// Where the next query starts, so that servers share the load as in istio.
    next: AtomicUsize,
}

impl Upstream {
    pub(super) fn new(servers: Vec<SocketAddr>, parallel: bool, timeout: Duration) -> Upstream {
        Upstream { servers, parallel, timeout, next: AtomicUsize::new(0) }
    }

    /// Asks until one answers; `None` if none does.
    pub(super) async fn ask(&self, packet: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let query = Query::parse(packet).ok()?;
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.servers.len();
        let mut answers: FuturesUnordered<_> = FuturesUnordered::new();
        for i in 0..count {
            answers.push(self.ask_one(self.servers[(start + i) % count], packet, &query, tcp));
            if self.parallel && i + 1 < count {
                continue;
            }
            while let Some(answer) = answers.next().await {
                if answer.is_some() {
                    return answer;
                }
            }
        }
        None
    }

    async fn ask_one(&self, server: SocketAddr, packet: &[u8], query: &Query<'_>, tcp: bool) -> Option<Vec<u8>> {
        let exchange =
            async { if tcp { over_tcp(server, packet).await } else { over_udp(server, packet, query).await } };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(Ok(answer)) if query.is_answered_by(&answer) => Some(answer),
            Ok(Ok(_)) => None,
            Ok(Err(error)) => {
                debug!(%server, %error, "upstream resolver failed");
                None
            }
            Err(_) => {
                debug!(%server, "upstream resolver did not answer");
                None
            }
        }
    }
}

/// A socket for each query: the random port is half of the protection against forged answers.
async fn over_udp(server: SocketAddr, packet: &[u8], query: &Query<'_>) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr =
        if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(packet).await?;
    let mut buffer = vec![0; query.udp_limit().clamp(1500, MAX_DATAGRAM)];
    loop {
        let n = socket.recv(&mut buffer).await?;
        // Not ours: a late answer to somebody else's port, or a forgery.
        if query.is_answered_by(&buffer[..n]) {
            buffer.truncate(n);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(server: SocketAddr, packet: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(packet.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), packet].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_as_the_manual_says() {
        let conf = ResolvConf::parse(
            "# x\nnameserver 10.0.0.10\nnameserver fe80::1%eth0\nnameserver rubbish\nsearch a b\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n",
        );
        assert_eq!(conf.servers, ["10.0.0.10:53".parse().unwrap(), "[fe80::1]:53".parse().unwrap()]);
        assert_eq!(conf.search, ["default.svc.cluster.local", "svc.cluster.local"]);
        assert_eq!(
            conf.candidates("Details"),
            ["details.default.svc.cluster.local", "details.svc.cluster.local", "details"]
        );
        assert_eq!(conf.candidates("a.b.c.d.e.f")[0], "a.b.c.d.e.f");
        assert_eq!(conf.candidates("example.com."), ["example.com"]);
    }
}
