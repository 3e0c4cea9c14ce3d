//! The same zone served by dnsmasq and by us: a table of queries must be answered alike.

use std::process::{Child, Command, Stdio};

use arc_swap::ArcSwapOption;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as HickoryQuery};
use hickory_proto::rr::{Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinEncodable};

use super::*;
use crate::dns::zone;

/// What the mesh's table in `zone::tests::zone` says, and what only the pod's resolver knows.
const ZONE: &str = "
host-record=details.default.svc.cluster.local,10.1.0.1
host-record=db.other.svc.cluster.local,10.1.0.2
host-record=db-0.db.other.svc.cluster.local,10.1.0.3
host-record=api.example.com,240.240.0.1,2001:2::1
address=/a.wild.example.com/240.240.0.2
address=/b.a.wild.example.com/240.240.0.2
local=/cluster.local/
local=/example.com/
local=/in-addr.arpa/
srv-host=_http._tcp.details.default.svc.cluster.local,details.default.svc.cluster.local,9080
host-record=outside.example.com,192.0.2.7,2001:db8::7
cname=alias.example.com,outside.example.com
mx-host=example.com,outside.example.com,10
txt-record=text.example.com,\"a text\"
ptr-record=7.9.9.10.in-addr.arpa,seven.example.com
local-ttl=30
";

const TABLE: [(&str, RecordType); 25] = [
    ("details.default.svc.cluster.local.", RecordType::A),
    ("DETAILS.Default.svc.cluster.local.", RecordType::A),
    ("details.default.svc.cluster.local.", RecordType::AAAA),
    ("details.default.svc.cluster.local.", RecordType::MX),
    ("_http._tcp.details.default.svc.cluster.local.", RecordType::SRV),
    ("_grpc._tcp.details.default.svc.cluster.local.", RecordType::SRV),
    ("nobody.default.svc.cluster.local.", RecordType::A),
    ("nobody.default.svc.cluster.local.", RecordType::AAAA),
    ("db.other.svc.cluster.local.", RecordType::A),
    ("db-0.db.other.svc.cluster.local.", RecordType::A),
    ("db-1.db.other.svc.cluster.local.", RecordType::A),
    ("api.example.com.", RecordType::A),
    ("api.example.com.", RecordType::AAAA),
    ("a.wild.example.com.", RecordType::A),
    ("b.a.wild.example.com.", RecordType::A),
    ("outside.example.com.", RecordType::A),
    ("outside.example.com.", RecordType::AAAA),
    ("alias.example.com.", RecordType::A),
    ("example.com.", RecordType::MX),
    ("text.example.com.", RecordType::TXT),
    ("nothing.example.com.", RecordType::A),
    ("1.0.1.10.in-addr.arpa.", RecordType::PTR),
    ("7.9.9.10.in-addr.arpa.", RecordType::PTR),
    ("9.9.9.10.in-addr.arpa.", RecordType::PTR),
    ("big.example.com.", RecordType::TXT),
];

struct Resolver(Child);

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A real resolver with the zone, or `None` where there is none.
fn dnsmasq(port: u16, dir: &std::path::Path) -> Option<Resolver> {
    let big: String = (0..20).map(|i| format!("txt-record=big.example.com,\"{i} {}\"\n", "x".repeat(100))).collect();
    let file = dir.join("dnsmasq.conf");
    std::fs::write(&file, format!("{ZONE}{big}")).unwrap();
    let mut command = Command::new("dnsmasq");
    command.args([
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
        "--listen-address=127.0.0.1",
    ]);
    command.arg(format!("--port={port}")).arg(format!("--conf-file={}", file.display())).arg("--user=root");
    command.arg("--pid-file").stdin(Stdio::null()).stderr(Stdio::inherit());
    command.spawn().ok().map(Resolver)
}

/// As [`dnsmasq`], once it answers. A port that is free now may be another test's a moment later: dnsmasq ends then, and the next
/// port is tried.
async fn answering(dir: &std::path::Path) -> Option<(Resolver, SocketAddr)> {
    let probe = packet("outside.example.com.", RecordType::A, false);
    for _ in 0..20 {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut resolver = dnsmasq(port, dir)?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        while resolver.0.try_wait().unwrap().is_none() {
            if udp(address, &probe).await.is_some() {
                return Some((resolver, address));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    panic!("dnsmasq ends as soon as it starts");
}

fn packet(name: &str, kind: RecordType, edns: bool) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(HickoryQuery::query(Name::from_ascii(name).unwrap(), kind));
    if edns {
        let mut options = Edns::new();
        options.set_max_payload(1232);
        message.edns = Some(options);
    }
    message.to_bytes().unwrap()
}

/// What a client sees of an answer: code, whether it is cut off, whether EDNS is spoken, and the records in any order.
fn seen(answer: &Message) -> String {
    let mut records: Vec<String> =
        answer.answers.iter().map(|r| format!("{} {} {}", r.name.to_lowercase(), r.record_type(), r.data)).collect();
    records.sort();
    let metadata = &answer.metadata;
    format!("{:?} truncated={} edns={} {records:?}", metadata.response_code, metadata.truncation, answer.edns.is_some())
}

async fn udp(server: SocketAddr, packet: &[u8]) -> Option<Message> {
    let any = if server.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let socket = UdpSocket::bind(any).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(packet).await.ok()?;
    let mut buffer = [0; 4096];
    let n = tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer)).await.ok()?.ok()?;
    Message::from_bytes(&buffer[..n]).ok()
}

async fn tcp(server: SocketAddr, packet: &[u8]) -> Option<Message> {
    let mut stream = TcpStream::connect(server).await.ok()?;
    stream.write_u16(packet.len() as u16).await.ok()?;
    stream.write_all(packet).await.ok()?;
    let mut answer = vec![0; usize::from(stream.read_u16().await.ok()?)];
    stream.read_exact(&mut answer).await.ok()?;
    Message::from_bytes(&answer).ok()
}

#[tokio::test]
async fn a_table_of_queries_is_answered_as_dnsmasq_does() {
    let dir = tempfile::tempdir().unwrap();
    let Some((_resolver, theirs)) = answering(dir.path()).await else {
        println!(
            "SKIPPED: a_table_of_queries_is_answered_as_dnsmasq_does: no dnsmasq; `cargo xtask setup` installs it"
        );
        return;
    };
    let settings = Dns {
        addresses: vec!["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap()],
        parallel: false,
        timeout: Duration::from_secs(1),
        resolv_conf: "/nowhere".into(),
    };
    let table: SharedTable = Arc::new(ArcSwapOption::from_pointee(zone::tests::zone()));
    let server = Server::start(&settings, vec![theirs], table, &Registry::new()).await.unwrap();
    let mut differences = Vec::new();
    // Twice, so that kept answers are compared as well.
    for _ in 0..2 {
        for (name, kind) in TABLE {
            for edns in [false, true] {
                let packet = packet(name, kind, edns);
                let expected = udp(theirs, &packet).await.map(|answer| seen(&answer));
                let over_tcp = tcp(theirs, &packet).await.map(|answer| seen(&answer));
                for ours in server.addresses() {
                    for (how, got, expected) in
                        [("UDP", udp(*ours, &packet).await, &expected), ("TCP", tcp(*ours, &packet).await, &over_tcp)]
                    {
                        let got = got.map(|answer| seen(&answer));
                        if got != *expected {
                            differences.push(format!(
                                "{name} {kind} {how} edns={edns} at {ours}: {got:?}, dnsmasq: {expected:?}"
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}
