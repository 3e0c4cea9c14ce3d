//! Sockets of the DNS server, UDP and TCP on each address.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lifecycle::metrics::{Counter, Registry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::debug;

use super::SharedTable;
use super::cache::Cache;
use super::message::{self, Query, Record, SERVER_FAILURE, TYPE_A, TYPE_AAAA, TYPE_PTR, Unreadable};
use super::upstream::Upstream;
use super::zone::Zone;
use crate::settings::Dns;

/// Queries waiting for upstream at a time; more are answered SERVFAIL, which clients retry.
const MAX_FORWARDED: usize = 1024;
/// TCP connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// How long an idle TCP connection is kept. Source: RFC 7766, section 6.2.3: in the order of seconds.
const IDLE: Duration = Duration::from_secs(20);

/// The server; dropping it closes the sockets.
#[derive(Debug)]
pub(crate) struct Server {
    addresses: Vec<SocketAddr>,
    _tasks: JoinSet<()>,
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("DNS: {address} cannot be listened on")]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("DNS: no address of DNS_PROXY_ADDR can be listened on")]
    NoAddress,
}

struct Shared {
    table: SharedTable,
    upstream: Upstream,
    cache: Cache,
    forwarded: Arc<Semaphore>,
    /// Turns answers with several addresses, so that clients that take the first spread over all.
    turn: AtomicUsize,
    requests: Counter,
    upstream_requests: Counter,
    failures: Counter,
}

impl Server {
    /// Listens and answers from `table`, everything else from `servers`.
    pub(crate) async fn start(
        settings: &Dns,
        servers: Vec<SocketAddr>,
        table: SharedTable,
        metrics: &Registry,
    ) -> Result<Server, ServerError> {
        // Names as istio's agent exposes them: `pkg/dns/client/monitoring.go`.
        let counter = |name, help| metrics.counter(name, help, &[]);
        let shared = Arc::new(Shared {
            table,
            upstream: Upstream::new(servers, settings.parallel, settings.timeout),
            cache: Cache::default(),
            forwarded: Arc::new(Semaphore::new(MAX_FORWARDED)),
            turn: AtomicUsize::new(0),
            requests: counter("istio_agent_dns_requests_total", "Total number of DNS requests."),
            upstream_requests: counter(
                "istio_agent_dns_upstream_requests_total",
                "Total number of DNS requests forwarded to upstream.",
            ),
            failures: counter("istio_agent_dns_upstream_failures_total", "Total number of DNS failures from upstream."),
        });
        let mut tasks = JoinSet::new();
        let mut addresses = Vec::new();
        for (i, address) in settings.addresses.iter().enumerate() {
            let bound = async {
                let udp = UdpSocket::bind(address).await?;
                let tcp = TcpListener::bind(udp.local_addr()?).await?;
                Ok((udp, tcp))
            };
            match bound.await {
                Ok((udp, tcp)) => {
                    addresses.extend(udp.local_addr());
                    tasks.spawn(serve_udp(Arc::new(udp), shared.clone()));
                    tasks.spawn(serve_tcp(tcp, shared.clone()));
                }
                // The further addresses (::1 beside 127.0.0.1) may be missing where there is no IPv6.
                Err(error) if i > 0 => debug!(%address, %error, "DNS does not listen here"),
                Err(source) => return Err(ServerError::Bind { address: *address, source }),
            }
        }
        if addresses.is_empty() {
            return Err(ServerError::NoAddress);
        }
        Ok(Server { addresses, _tasks: tasks })
    }

    /// Where it listens.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

/// What becomes of a query.
enum Outcome {
    Answer(Vec<u8>),
    Forward,
    Silence,
}

impl Shared {
    fn decide(&self, packet: &[u8], tcp: bool) -> Outcome {
        self.requests.increment();
        let query = match Query::parse(packet) {
            Ok(query) => query,
            Err(Unreadable::Silent) => return Outcome::Silence,
            Err(Unreadable::Code(code)) => return Outcome::Answer(message::refuse(packet, code)),
        };
        // DIFFERS: istio answers SERVFAIL until the first name table, which breaks applications that start before it;
        // the pod's resolver knows all but the mesh's own names.
        let table = self.table.load();
        match table.as_ref().and_then(|zone| self.known(zone, &query, tcp)) {
            Some(answer) => Outcome::Answer(answer),
            None => Outcome::Forward,
        }
    }

    fn known(&self, zone: &Zone, query: &Query<'_>, tcp: bool) -> Option<Vec<u8>> {
        let name = query.name.as_deref().filter(|_| query.is_internet())?;
        let limit = if tcp { usize::from(u16::MAX) } else { query.udp_limit() };
        if query.kind == TYPE_PTR {
            let pointer = zone.name_of(message::reverse_address(name)?)?;
            return Some(query.answer(None, &[Record::Pointer(pointer)], limit));
        }
        if query.kind != TYPE_A && query.kind != TYPE_AAAA {
            // SRV, MX, TXT …: the name table does not know, the cluster's DNS does.
            return None;
        }
        let found = zone.find(name)?;
        let mut records: Vec<Record<'_>> = match query.kind {
            TYPE_A => found.v4.iter().map(|ip| Record::Address((*ip).into())).collect(),
            _ => found.v6.iter().map(|ip| Record::Address((*ip).into())).collect(),
        };
        if records.len() > 1 {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % records.len();
            records.rotate_left(turn);
        }
        // No address of this family is "no data", not "no such name": the other family's answer would be lost with it.
        let alias_of = found.alias_of.filter(|_| !records.is_empty());
        Some(query.answer(alias_of, &records, limit))
    }

    /// The answer of the pod's resolver, as it came. DIFFERS: istio asks again each time; here TTLs are honoured.
    async fn forward(&self, packet: &[u8], tcp: bool) -> Vec<u8> {
        if let Some(answer) = self.cache.get(packet, tcp, Instant::now()) {
            return answer;
        }
        self.upstream_requests.increment();
        let Ok(_permit) = self.forwarded.try_acquire() else { return failure(packet) };
        match self.upstream.ask(packet, tcp).await {
            Some(answer) => {
                self.cache.put(packet, tcp, &answer, Instant::now());
                answer
            }
            None => {
                self.failures.increment();
                failure(packet)
            }
        }
    }
}

fn failure(packet: &[u8]) -> Vec<u8> {
    match Query::parse(packet) {
        Ok(query) => query.failure(SERVER_FAILURE),
        Err(_) => message::refuse(packet, SERVER_FAILURE),
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut buffer = vec![0; 4096];
    let mut forwards = JoinSet::new();
    loop {
        while forwards.try_join_next().is_some() {}
        let Ok((n, client)) = socket.recv_from(&mut buffer).await else { continue }; // an ICMP error of an earlier answer
        match shared.decide(&buffer[..n], false) {
            Outcome::Answer(answer) => {
                let _ = socket.send_to(&answer, client).await; // the client asks again
            }
            Outcome::Forward => {
                if let Some(answer) = shared.cache.get(&buffer[..n], false, Instant::now()) {
                    let _ = socket.send_to(&answer, client).await;
                    continue;
                }
                let (packet, socket, shared) = (buffer[..n].to_vec(), socket.clone(), shared.clone());
                forwards.spawn(async move {
                    let answer = shared.forward(&packet, false).await;
                    let _ = socket.send_to(&answer, client).await;
                });
            }
            Outcome::Silence => {}
        }
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await; // out of file descriptors, most likely
            continue;
        };
        let shared = shared.clone();
        connections.spawn(async move {
            let _ = converse(stream, &shared).await; // the client hung up
            drop(permit);
        });
    }
}

async fn converse(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    loop {
        let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
        let mut packet = vec![0; usize::from(length)];
        tokio::time::timeout(IDLE, stream.read_exact(&mut packet)).await??;
        let answer = match shared.decide(&packet, true) {
            Outcome::Answer(answer) => answer,
            Outcome::Forward => shared.forward(&packet, true).await,
            Outcome::Silence => return Ok(()),
        };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        tokio::time::timeout(IDLE, stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())).await??;
    }
}

#[cfg(test)]
mod side_by_side;
#[cfg(test)]
mod tests;
