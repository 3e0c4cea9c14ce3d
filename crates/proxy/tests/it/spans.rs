//! Spans reach the collectors that istiod names.

use crate::fixture::{bound, cluster, connect, free_port, head, http_manager, listener, start};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Serves one traced request with that provider; returns head and body of what came to the collector.
async fn collected(collector: TcpListener, provider: Value) -> (String, Vec<u8>) {
    let collector_port = collector.local_addr().expect("bound").port();
    let port = free_port();
    let routes = json!([{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]);
    let manager = http_manager(routes, json!({"tracing": {"provider": provider}}));
    let handle = start(
        json!([listener("http", port, json!({"filters": [manager]}))]),
        json!([cluster("collector", &[collector_port], json!({}))]),
    );
    let mut client = connect(port).await;
    // A batch is sent at once when it has five spans.
    for _ in 0..5 {
        client.write_all(b"GET /traced HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("the proxy reads");
        assert_eq!(head(&mut client).await.lines().next(), Some("HTTP/1.1 200 OK"));
    }
    let (mut stream, _) = collector.accept().await.expect("a connection");
    let head = head(&mut stream).await;
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    let mut body = Vec::new();
    loop {
        let mut part = vec![0; chunk_size(&mut stream).await + 2];
        stream.read_exact(&mut part).await.expect("the whole body");
        if part.len() == 2 {
            break;
        }
        body.extend_from_slice(&part[..part.len() - 2]);
    }
    handle.shutdown();
    (head, body)
}

/// The line before a chunk.
async fn chunk_size(stream: &mut TcpStream) -> usize {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(stream.read_u8().await.expect("a line"));
    }
    let digits = std::str::from_utf8(&line).expect("text").trim_end();
    usize::from_str_radix(digits, 16).expect("a size")
}

fn service(uri: &str) -> Value {
    json!({
        "http_uri": {"uri": uri, "cluster": "collector", "timeout": "5s"},
        "request_headers_to_add": [{"header": {"key": "X-Token", "value": "%ENVIRONMENT(PATH)%"}}]
    })
}

/// The header that [`service`] adds, of which the environment says the value.
fn token() -> String {
    format!("x-token: {}\r\n", std::env::var("PATH").expect("a search path"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zipkin_is_an_http_service() {
    let (collector, _) = bound().await;
    let provider = json!({"name": "zipkin", "typed_config": {
        "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
        "collector_endpoint_version": "HTTP_JSON",
        "collector_service": service("http://zipkin.istio-system/api/v2/spans")
    }});
    let (head, body) = collected(collector, provider).await;
    assert!(head.starts_with("POST /api/v2/spans HTTP/1.1\r\nhost: zipkin.istio-system\r\n"), "{head}");
    assert!(head.contains("content-type: application/json\r\n") && head.contains(&token()), "{head}");
    let spans: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(spans.as_array().map(Vec::len), Some(5));
    assert_eq!(spans[0]["tags"]["http.status_code"], "200");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opentelemetry_is_an_http_service() {
    let (collector, _) = bound().await;
    let provider = json!({"name": "otel", "typed_config": {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "service_name": "shop.default",
        "http_service": service("otel.monitoring/v1/traces")
    }});
    let (head, body) = collected(collector, provider).await;
    assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\nhost: otel.monitoring\r\n"), "{head}");
    assert!(head.contains("content-type: application/x-protobuf\r\n") && head.contains(&token()), "{head}");
    // The resource comes first: ResourceSpans, Resource, KeyValue.
    let text = String::from_utf8_lossy(&body);
    assert!(text.contains("service.name") && text.contains("shop.default"), "{text}");
}
