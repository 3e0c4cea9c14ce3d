//! Names outside the cluster: passed to the host's resolvers, from the host's network.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::Record;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// As the usual resolvers' first timeout.
const TIMEOUT: Duration = Duration::from_secs(3);
/// `MAXNS` of resolv.conf(5).
const SERVERS_MAX: usize = 3;

/// The host's resolvers.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    servers: Vec<SocketAddr>,
}

impl Upstream {
    /// Those of the text of `/etc/resolv.conf`.
    pub(crate) fn from_resolv_conf(text: &str) -> Self {
        let servers = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok())
            .take(SERVERS_MAX)
            .map(|ip| SocketAddr::new(ip, 53))
            .collect();
        Self { servers }
    }

    /// Passes a query on as it came and returns the answer as it came; SERVFAIL when nobody answers.
    pub(super) async fn forward(&self, bytes: &[u8], query: &Message, udp: bool) -> Option<Vec<u8>> {
        for server in &self.servers {
            let exchange = async {
                if udp { over_udp(*server, bytes, query.metadata.id).await } else { over_tcp(*server, bytes).await }
            };
            if let Ok(Ok(answer)) = tokio::time::timeout(TIMEOUT, exchange).await {
                return Some(answer);
            }
        }
        let mut response = Message::error_msg(query.metadata.id, OpCode::Query, ResponseCode::ServFail);
        response.metadata.recursion_desired = query.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_queries(query.queries.iter().cloned());
        response.to_vec().ok()
    }

    /// The answers to a question of our own (the target of an ExternalName).
    pub(super) async fn records(&self, question: &Query) -> Vec<Record> {
        // The identifier only has to match on a socket that is connected to one server and used once.
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(question.clone());
        let Ok(bytes) = message.to_vec() else { return Vec::new() };
        let answer = self.forward(&bytes, &message, true).await;
        answer.and_then(|bytes| Message::from_vec(&bytes).ok()).map(|message| message.answers).unwrap_or_default()
    }
}

async fn over_udp(server: SocketAddr, bytes: &[u8], id: u16) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)
    } else {
        SocketAddr::new(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), 0)
    };
    // A fresh socket per query: its random port is half of what protects against forged answers.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0u8; 65_535];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if length >= 12 && buffer[..2] == id.to_be_bytes() {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(server: SocketAddr, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_u16(u16::try_from(bytes.len()).map_err(std::io::Error::other)?).await?;
    stream.write_all(bytes).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0u8; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
