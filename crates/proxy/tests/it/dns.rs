//! Names that change their meaning, asked of servers that the configuration gives.

use crate::fixture::{bound, cluster, connect, free_port, listener, start, tcp_proxy};
use hickory_resolver::proto::op::{Message, MessageType, ResponseCode};
use hickory_resolver::proto::rr::rdata::A;
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

/// What the test's server says.
#[derive(Clone, Copy)]
enum Says {
    Address(Ipv4Addr, u32),
    NoSuchName,
    Failure,
}

/// A DNS server on a port of the loopback interface, and what it says of every name, and how often it was asked for addresses.
async fn server(says: Says) -> (u16, Arc<Mutex<(Says, usize)>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("loopback works");
    let port = socket.local_addr().expect("bound").port();
    let state = Arc::new(Mutex::new((says, 0)));
    let shared = state.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((size, from)) = socket.recv_from(&mut buffer).await {
            let mut message = Message::from_vec(&buffer[..size]).expect("a question");
            message.metadata.message_type = MessageType::Response;
            let question = message.queries[0].clone();
            let says = {
                let state = &mut *shared.lock().expect("no panic");
                state.1 += usize::from(question.query_type() == RecordType::A);
                state.0
            };
            match says {
                Says::Address(address, ttl) if question.query_type() == RecordType::A => {
                    message.answers.push(Record::from_rdata(question.name().clone(), ttl, RData::A(A(address))));
                }
                Says::Address(..) => {}
                Says::NoSuchName => message.metadata.response_code = ResponseCode::NXDomain,
                Says::Failure => message.metadata.response_code = ResponseCode::ServFail,
            }
            socket.send_to(&message.to_vec().expect("it can be encoded"), from).await.expect("loopback works");
        }
    });
    (port, state)
}

/// A cluster with the host `service.test`, asked of that server; `fields` on top.
fn named(port: u16, dns: u16, fields: Value) -> Value {
    let mut cluster = cluster(
        "c",
        &[port],
        json!({
            "type": "STRICT_DNS", "respect_dns_ttl": true, "dns_refresh_rate": "3600s",
            "dns_failure_refresh_rate": {"base_interval": "0.1s", "max_interval": "0.2s"},
            "typed_dns_resolver_config": {"name": "cares", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
                "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": dns}}],
                "dns_resolver_options": {"no_default_search_domain": true}
            }}
        }),
    );
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["address"] =
        json!("service.test");
    for (name, value) in fields.as_object().into_iter().flatten() {
        cluster[name] = value.clone();
    }
    cluster
}

/// Says who it is and ends.
async fn greeter(address: &str, port: u16, name: &'static [u8]) -> u16 {
    let listener = TcpListener::bind((address, port)).await.expect("the loopback network is large");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(name).await;
        }
    });
    port
}

async fn who_answers(port: u16) -> String {
    let mut text = String::new();
    // A connection without a host is reset.
    let _ = connect(port).await.read_to_string(&mut text).await;
    text
}

/// Waits until `wanted` answers.
async fn until(port: u16, wanted: &str) {
    let mut last = String::new();
    for _ in 0..100 {
        last = who_answers(port).await;
        if last == wanted {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("{last:?} answers, and not {wanted:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ttl_says_when_names_are_asked_for_again() {
    let upstream = greeter("127.0.0.1", 0, b"one").await;
    greeter("127.0.0.2", upstream, b"two").await;
    let (dns, says) = server(Says::Address(Ipv4Addr::new(127, 0, 0, 1), 1)).await;
    let port = free_port();
    let handle = start(
        json!([listener("tcp", port, json!({"filters": [tcp_proxy("c", json!({}))]}))]),
        json!([named(upstream, dns, json!({}))]),
    );
    until(port, "one").await;
    says.lock().expect("no panic").0 = Says::Address(Ipv4Addr::new(127, 0, 0, 2), 1);
    until(port, "two").await;
    // Who cannot say changes nothing; who says that there is nothing, does.
    says.lock().expect("no panic").0 = Says::Failure;
    let asked = says.lock().expect("no panic").1;
    while says.lock().expect("no panic").1 < asked + 4 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(who_answers(port).await, "two");
    says.lock().expect("no panic").0 = Says::NoSuchName;
    until(port, "").await;
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_respect_for_the_ttl_the_cluster_says_when() {
    let upstream = greeter("127.0.0.1", 0, b"one").await;
    let (dns, says) = server(Says::Address(Ipv4Addr::new(127, 0, 0, 1), 1)).await;
    let port = free_port();
    let handle = start(
        json!([listener("tcp", port, json!({"filters": [tcp_proxy("c", json!({}))]}))]),
        json!([named(upstream, dns, json!({"respect_dns_ttl": false}))]),
    );
    until(port, "one").await;
    tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    assert_eq!(says.lock().expect("no panic").1, 1);
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_that_fails_does_not_hold_up_others() {
    let (_upstream, upstream) = bound().await;
    let good = greeter("127.0.0.1", 0, b"one").await;
    let (dns, says) = server(Says::Failure).await;
    let port = free_port();
    let mut both = named(upstream, dns, json!({}));
    let localhost = json!({"endpoint": {"address": {"socket_address": {"address": "localhost", "port_value": good}}}});
    both["load_assignment"]["endpoints"][0]["lb_endpoints"].as_array_mut().expect("a list").push(localhost);
    both["dns_lookup_family"] = json!("V4_ONLY");
    let handle = start(json!([listener("tcp", port, json!({"filters": [tcp_proxy("c", json!({}))]}))]), json!([both]));
    until(port, "one").await;
    assert!(says.lock().expect("no panic").1 > 0);
    handle.shutdown();
}
