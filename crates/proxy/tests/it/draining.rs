//! Listeners that drain little by little: how their connections end.

use crate::fixture::{bootstrap, connect, free_port, head, http_manager, listener};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A proxy that answers by itself and, once it drains, ends all connections 0.3 s after saying so.
fn start(port: u16) -> proxy::Handle {
    let answer = json!([{"match": {"prefix": "/"}, "direct_response": {"status": 204}}]);
    let manager = http_manager(answer, json!({"drain_timeout": "0.3s"}));
    let listeners = json!([listener("in", port, json!({"filters": [manager]}))]);
    let options = proxy::Options {
        concurrency: 1,
        drain_strategy: proxy::DrainStrategy::Gradual,
        drain_time: Duration::ZERO,
        ..Default::default()
    };
    proxy::start(bootstrap(&json!({"static_resources": {"listeners": listeners}})), options).expect("it starts")
}

fn told(proxy: &proxy::Handle) -> bool {
    let stats = proxy.stats_prometheus(false);
    stats.lines().any(|line| line.contains("downstream_cx_drain_close") && line.ends_with(" 1"))
}

#[tokio::test]
async fn http2_connections_end_after_their_next_answer() {
    let port = free_port();
    let proxy = start(port);
    let (mut client, connection) = h2::client::handshake(connect(port).await).await.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let mut get = async || {
        client = client.clone().ready().await.expect("it takes a request");
        let request = http::Request::get("http://t/").body(()).expect("a request");
        client.send_request(request, true).expect("it takes a request").0.await.expect("an answer").status()
    };
    assert_eq!(get().await, 204);
    proxy.drain();
    assert!(!told(&proxy), "nothing is said without an answer");
    assert_eq!(get().await, 204);
    let ended = tokio::time::timeout(Duration::from_secs(5), connection).await;
    ended.expect("the proxy ends it").expect("no panic").expect("without an error");
    assert!(told(&proxy));
}

#[tokio::test]
async fn a_client_that_goes_on_asking_does_not_put_the_end_off() {
    let port = free_port();
    let proxy = start(port);
    let mut client = connect(port).await;
    proxy.drain();
    let asking = async {
        loop {
            if client.write_all(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n").await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            let mut first = [0];
            if !matches!(client.read(&mut first).await, Ok(1)) {
                break;
            }
            let rest = head(&mut client).await;
            assert!(rest.contains("connection: close"), "{rest}");
        }
    };
    tokio::time::timeout(Duration::from_secs(5), asking).await.expect("the proxy ends it");
    assert!(told(&proxy), "once, whatever the number of answers");
}
