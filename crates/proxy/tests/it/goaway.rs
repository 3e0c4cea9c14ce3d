//! Hosts that leave: GOAWAY while requests are under way.

use crate::fixture::{bound, cluster, connect, free_port, http_manager, http2, listener, start};
use bytes::Bytes;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// Answers each request when told to; every connection says GOAWAY after its first request.
async fn leaving_host(listener: TcpListener, requests: mpsc::UnboundedSender<(usize, oneshot::Sender<()>)>) {
    for number in 0.. {
        let (stream, _) = listener.accept().await.expect("it accepts");
        let requests = requests.clone();
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
            while let Some(Ok((_, mut answer))) = connection.accept().await {
                connection.graceful_shutdown();
                let (go, wait) = oneshot::channel();
                requests.send((number, go)).expect("the test listens");
                tokio::spawn(async move {
                    let _ = wait.await;
                    let mut body = answer.send_response(http::Response::new(()), false).expect("a stream");
                    body.send_data(Bytes::from_static(b"ok"), true).expect("a stream");
                });
            }
        });
    }
}

async fn get(port: u16) -> String {
    let mut client = connect(port).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n").await.expect("it takes a request");
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("it answers");
    answer
}

#[tokio::test]
async fn requests_after_a_goaway_take_a_new_connection_and_those_before_it_end() {
    let (port, (host, host_port)) = (free_port(), bound().await);
    let (sender, mut requests) = mpsc::unbounded_channel();
    let server = tokio::spawn(leaving_host(host, sender));
    let manager = http_manager(json!([{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]), json!({}));
    let listeners = json!([listener("in", port, json!({"filters": [manager]}))]);
    let proxy = start(listeners, json!([cluster("a", &[host_port], http2())]));

    let first = tokio::spawn(get(port));
    let (connection, answer_first) = requests.recv().await.expect("a request");
    assert_eq!(connection, 0);
    // The GOAWAY is on its way.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let second = tokio::spawn(get(port));
    let (connection, answer_second) =
        tokio::time::timeout(Duration::from_secs(5), requests.recv()).await.expect("it is sent").expect("a request");
    assert_eq!(connection, 1, "the first one takes no more requests");
    answer_second.send(()).expect("it waits");
    answer_first.send(()).expect("it waits");
    for answer in [first, second] {
        let answer = answer.await.expect("no panic");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
    drop(proxy);
    server.abort();
}
