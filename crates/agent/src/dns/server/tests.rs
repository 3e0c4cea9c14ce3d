use arc_swap::ArcSwapOption;
use hickory_proto::op::{Message, MessageType, OpCode, Query as HickoryQuery, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinEncodable};

use super::*;
use crate::dns::zone;

fn settings() -> Dns {
    Dns {
        addresses: vec!["127.0.0.1:0".parse().unwrap()],
        parallel: false,
        timeout: Duration::from_millis(300),
        resolv_conf: "/nowhere".into(),
    }
}

fn packet(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.add_query(HickoryQuery::query(Name::from_ascii(name).unwrap(), kind));
    message.to_bytes().unwrap()
}

async fn ask(server: SocketAddr, packet: &[u8]) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(packet, server).await.unwrap();
    let mut buffer = [0; 4096];
    let n = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.unwrap().unwrap();
    Message::from_bytes(&buffer[..n]).unwrap()
}

async fn ask_tcp(server: SocketAddr, packet: &[u8]) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    stream.write_u16(packet.len() as u16).await.unwrap();
    stream.write_all(packet).await.unwrap();
    let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_bytes(&answer).unwrap()
}

/// An upstream resolver that says NXDOMAIN, with one forged answer before each real one.
async fn upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (n, client) = socket.recv_from(&mut buffer).await.unwrap();
            let mut answer = buffer[..n].to_vec();
            answer[2] |= 0x80;
            answer[0] ^= 1;
            socket.send_to(&answer, client).await.unwrap();
            answer[0] ^= 1;
            answer[3] = 3;
            socket.send_to(&answer, client).await.unwrap();
        }
    });
    address
}

async fn server(table: SharedTable, upstream: Vec<SocketAddr>) -> (Server, SocketAddr) {
    // The port that is free for UDP may be taken for TCP; then another one will do.
    for _ in 0..20 {
        if let Ok(server) = Server::start(&settings(), upstream.clone(), table.clone(), &Registry::new()).await {
            let address = server.addresses()[0];
            return (server, address);
        }
    }
    panic!("no port is free for UDP and TCP");
}

#[tokio::test]
async fn known_names_are_answered_over_udp_and_tcp() {
    let table: SharedTable = Arc::new(ArcSwapOption::from_pointee(zone::tests::zone()));
    let (_server, address) = server(table, vec![upstream().await]).await;
    let answer = ask(address, &packet("details.default.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(answer.answers[0].data.to_string(), "10.1.0.1");
    let answer = ask_tcp(address, &packet("api.example.com.", RecordType::AAAA)).await;
    assert_eq!(answer.answers[0].data.to_string(), "2001:2::1");
    let no_data = ask(address, &packet("details.", RecordType::AAAA)).await;
    assert_eq!((no_data.metadata.response_code, no_data.answers.len()), (ResponseCode::NoError, 0));
    let pointer = ask(address, &packet("1.0.1.10.in-addr.arpa.", RecordType::PTR)).await;
    assert_eq!(pointer.answers[0].data.to_string(), "details.default.svc.cluster.local.");
}

#[tokio::test]
async fn unknown_names_and_types_go_upstream_and_forgeries_are_dropped() {
    let table: SharedTable = Arc::new(ArcSwapOption::from_pointee(zone::tests::zone()));
    let (_server, address) = server(table, vec![upstream().await]).await;
    for (name, kind) in [("example.org.", RecordType::A), ("details.default.svc.cluster.local.", RecordType::SRV)] {
        assert_eq!(ask(address, &packet(name, kind)).await.metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
}

#[tokio::test]
async fn before_the_first_table_everything_goes_upstream_and_a_dead_upstream_is_a_failure() {
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap(); // bound, never answers
    let (_server, address) = server(SharedTable::default(), vec![dead.local_addr().unwrap(), upstream().await]).await;
    let answer = ask(address, &packet("details.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    let (_server, address) = server(SharedTable::default(), vec![dead.local_addr().unwrap()]).await;
    assert_eq!(ask(address, &packet("details.", RecordType::A)).await.metadata.response_code, ResponseCode::ServFail);
}
