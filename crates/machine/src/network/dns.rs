//! The cluster's DNS server, as Kubernetes' DNS-based service discovery specification (1.1.0) has it; other names are forwarded.

mod forward;
mod zone;

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub(crate) use forward::Upstream;
use zone::Answer;
pub(crate) use zone::{PodName, Zone};

/// Queries worked on at once; more are dropped (UDP) or wait (TCP), so that a flood costs bounded memory.
const QUERIES_MAX: usize = 1024;
/// What fits into an answer over UDP to a client that says nothing else (RFC 1035, 2.3.4).
const UDP_PLAIN: usize = 512;
const TCP_IDLE: Duration = Duration::from_secs(10);

struct Server {
    zone: watch::Receiver<Arc<Zone>>,
    upstream: Upstream,
}

/// Serves until dropped.
pub(crate) async fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    zone: watch::Receiver<Arc<Zone>>,
    upstream: Upstream,
) -> io::Result<std::convert::Infallible> {
    let server = Arc::new(Server { zone, upstream });
    let udp = Arc::new(tokio::net::UdpSocket::from_std(udp)?);
    let tcp = tokio::net::TcpListener::from_std(tcp)?;
    let slots = Arc::new(Semaphore::new(QUERIES_MAX));
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0u8; 4096];
    loop {
        tokio::select! {
            received = udp.recv_from(&mut buffer) => {
                // An earlier answer that could not be delivered shows up here as an error; the socket lives on.
                let Ok((length, peer)) = received else { continue };
                let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
                let (query, server, udp) = (buffer[..length].to_vec(), Arc::clone(&server), Arc::clone(&udp));
                tasks.spawn(async move {
                    if let Some(answer) = server.answer(&query, true).await {
                        let _ = udp.send_to(&answer, peer).await;
                    }
                    drop(slot);
                });
            }
            accepted = tcp.accept() => {
                let Ok((stream, peer)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
                let server = Arc::clone(&server);
                tasks.spawn(async move {
                    let _ = stream_queries(stream, peer, &server).await;
                    drop(slot);
                });
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn stream_queries(mut stream: tokio::net::TcpStream, _peer: SocketAddr, server: &Server) -> io::Result<()> {
    loop {
        let length = tokio::time::timeout(TCP_IDLE, stream.read_u16()).await??;
        let mut query = vec![0u8; usize::from(length)];
        tokio::time::timeout(TCP_IDLE, stream.read_exact(&mut query)).await??;
        let Some(answer) = server.answer(&query, false).await else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
        stream.write_u16(length).await?;
        stream.write_all(&answer).await?;
    }
}

impl Server {
    /// The answer to one message; `None` for what deserves none.
    async fn answer(&self, bytes: &[u8], udp: bool) -> Option<Vec<u8>> {
        let query = Message::from_vec(bytes).ok()?;
        if query.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut response = Message::response(query.metadata.id, query.metadata.op_code);
        response.metadata.recursion_desired = query.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_queries(query.queries.iter().cloned());
        let [question] = query.queries.as_slice() else {
            response.metadata.response_code = ResponseCode::FormErr;
            return response.to_vec().ok();
        };
        if query.metadata.op_code != OpCode::Query {
            response.metadata.response_code = ResponseCode::NotImp;
            return response.to_vec().ok();
        }
        let zone = Arc::clone(&self.zone.borrow());
        match zone.answer(question) {
            Answer::Foreign => return self.upstream.forward(bytes, &query, udp).await,
            Answer::Alias(record, target) => {
                response.metadata.authoritative = true;
                response.add_answer(*record);
                // The target's addresses come along, as CoreDNS does it: stub resolvers do not ask again.
                let inner = hickory_proto::op::Query::query(target, question.query_type);
                match zone.answer(&inner) {
                    Answer::Own { answers, .. } => response.insert_answers_after(answers),
                    _ => response.insert_answers_after(self.upstream.records(&inner).await),
                }
            }
            Answer::Own { code, answers, additionals, authority } => {
                response.metadata.authoritative = true;
                response.metadata.response_code = code;
                response.insert_answers_after(answers);
                response.add_additionals(additionals);
                response.add_authorities(authority);
            }
        }
        let limit = if udp { usize::from(query.max_payload()).max(UDP_PLAIN) } else { usize::from(u16::MAX) };
        let encoded = response.to_vec().ok()?;
        if encoded.len() <= limit { Some(encoded) } else { response.truncate().to_vec().ok() }
    }
}

/// Adds answers behind those already there.
trait AnswersAfter {
    fn insert_answers_after(&mut self, records: Vec<hickory_proto::rr::Record>);
}

impl AnswersAfter for Message {
    fn insert_answers_after(&mut self, records: Vec<hickory_proto::rr::Record>) {
        self.answers.extend(records);
    }
}
