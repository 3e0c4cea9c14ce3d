//! Listeners that drain little by little, and a proxy that ends: how their connections end.

use crate::fixture::{bootstrap, bound, cluster, connect, free_port, head, http_manager, listener, tcp_proxy};
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

#[tokio::test]
async fn a_proxy_that_ends_logs_what_is_open() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let format = "%PROTOCOL% %REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %DOWNSTREAM_LOCAL_CLOSE_REASON%\n";
    let log = json!([{"name": "file", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": path, "log_format": {"text_format_source": {"inline_string": format}}
    }}]);
    let (origin, upstream) = bound().await;
    let (http, raw) = (free_port(), free_port());
    let manager =
        http_manager(json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]), json!({"access_log": log}));
    let listeners = json!([
        listener("http", http, json!({"filters": [manager]})),
        listener("raw", raw, json!({"filters": [tcp_proxy("c", json!({"access_log": log}))]}))
    ]);
    let config =
        json!({"static_resources": {"listeners": listeners, "clusters": [cluster("c", &[upstream], json!({}))]}});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let proxy = proxy::start(bootstrap(&config), options).expect("it starts");
    // A request that nobody answers, half of one, a tunnel, and a stream of HTTP/2.
    let (mut asks, mut half, _tunnel) = (connect(http).await, connect(http).await, connect(raw).await);
    asks.write_all(b"GET /asked HTTP/1.1\r\nhost: t\r\n\r\n").await.expect("open");
    half.write_all(b"GET /half").await.expect("open");
    let (client, connection) = h2::client::handshake(connect(http).await).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = http::Request::get("http://t/stream").body(()).expect("a request");
    let mut client = client.ready().await.expect("it takes a request");
    let _answer = client.send_request(request, true).expect("it takes a request");
    let mut held = Vec::new();
    while held.len() < 3 {
        held.push(origin.accept().await.expect("a connection"));
    }
    while proxy.connections() < 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let ends = std::time::Instant::now();
    tokio::task::spawn_blocking(move || proxy.shutdown()).await.expect("it ends");
    assert!(ends.elapsed() < Duration::from_secs(1));
    let text = std::fs::read_to_string(&path).expect("the log");
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let why = "purging_socket_that_have_not_progressed_to_connections";
    let stream = |what: &str| format!("{what} 0 DC downstream_local_disconnect({why}) -");
    let expected =
        [format!("- - 0 - - {why}"), stream("HTTP/1.1 -"), stream("HTTP/1.1 /asked"), stream("HTTP/2 /stream")];
    assert_eq!(lines, expected);
}
