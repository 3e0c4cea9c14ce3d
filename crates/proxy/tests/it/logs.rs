//! Access logs: which records are written when, and those for a service of Envoy's protocol.

use crate::fixture::{cluster, connect, free_port, head, http_manager, http2, listener, start, tcp_proxy};
use bytes::Bytes;
use envoy_api::Message;
use envoy_api::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_api::pb::envoy::service::accesslog::v3::StreamAccessLogsMessage;
use envoy_api::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Takes every message that a proxy sends over gRPC: its path and the message.
async fn service() -> (u16, mpsc::UnboundedReceiver<(String, Bytes)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    let sender = sender.clone();
                    tokio::spawn(async move {
                        let (parts, mut body) = request.into_parts();
                        let mut all = Vec::new();
                        while let Some(Ok(data)) = body.data().await {
                            body.flow_control().release_capacity(data.len()).expect("it was received");
                            all.extend_from_slice(&data);
                        }
                        let head = http::Response::builder().header("grpc-status", "0").body(()).expect("a head");
                        answer.send_response(head, true).expect("still open");
                        assert_eq!(all[..5], [&[0][..], &((all.len() - 5) as u32).to_be_bytes()].concat());
                        // The test may be over.
                        let _ = sender.send((parts.uri.path().to_owned(), Bytes::from(all).slice(5..)));
                    });
                }
            });
        }
    });
    (port, receiver)
}

fn als(kind: &str, fields: Value) -> Value {
    let mut config = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.{kind}GrpcAccessLogConfig"),
        "common_config": {
            "log_name": kind, "transport_api_version": "V3", "buffer_size_bytes": 0,
            "grpc_service": {"envoy_grpc": {"cluster_name": "als"}}
        }
    });
    for (name, value) in fields.as_object().into_iter().flatten() {
        config[name] = value.clone();
    }
    json!([{"name": "als", "typed_config": config}])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_go_to_envoys_service() {
    let (als_port, mut messages) = service().await;
    let (http, tcp) = (free_port(), free_port());
    let routes =
        json!([{"match": {"prefix": "/"}, "direct_response": {"status": 418, "body": {"inline_string": "tea"}}}]);
    let headers = json!({
        "additional_request_headers_to_log": ["X-Wanted"], "additional_response_headers_to_log": ["content-type"]
    });
    let kinds = json!({
        "access_log": als("Tcp", json!({})),
        "access_log_options": {"flush_access_log_on_start": true, "flush_access_log_on_connected": true}
    });
    let handle = start(
        json!([
            listener(
                "http",
                http,
                json!({"filters": [
                    http_manager(routes, json!({"access_log": als("Http", headers)}))
                ]})
            ),
            listener("tcp", tcp, json!({"filters": [tcp_proxy("echo", kinds)]})),
        ]),
        json!([cluster("als", &[als_port], http2()), cluster("echo", &[http], json!({}))]),
    );
    let mut client = connect(http).await;
    let request = b"POST /pot?a=b HTTP/1.1\r\nhost: t.test\r\nx-wanted: 1\r\nx-other: 2\r\ncontent-length: 2\r\n\r\nhi";
    client.write_all(request).await.expect("the proxy reads");
    head(&mut client).await;
    let (path, message) = messages.recv().await.expect("a record");
    assert_eq!(path, "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs");
    let message = StreamAccessLogsMessage::decode(message).expect("a message");
    assert_eq!(message.identifier.expect("the first message has one").log_name, "Http");
    let Some(LogEntries::HttpLogs(entries)) = message.log_entries else { panic!("records of requests") };
    let [entry] = &entries.log_entry[..] else { panic!("one record") };
    let (request, response) = (entry.request.as_ref().expect("one"), entry.response.as_ref().expect("one"));
    assert_eq!((&*request.path, &*request.authority, request.request_method), ("/pot?a=b", "t.test", 3));
    assert_eq!(request.request_headers.get("x-wanted").map(String::as_str), Some("1"));
    assert_eq!(request.request_headers.len(), 1);
    assert_eq!(response.response_code.map(|code| code.value), Some(418));
    assert_eq!((response.response_body_bytes, &*response.response_code_details), (3, "direct_response"));
    assert_eq!(response.response_headers.get("content-type").map(String::as_str), Some("text/plain"));
    let common = entry.common_properties.as_ref().expect("one");
    assert_eq!(common.access_log_type, AccessLogType::DownstreamEnd as i32);
    assert!(common.duration.is_some() && common.start_time.is_some());

    let mut client = connect(tcp).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n").await.expect("the proxy reads");
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.expect("an answer");
    drop(client);
    let mut kinds = Vec::new();
    while kinds.len() < 3 {
        let (_, message) = messages.recv().await.expect("a record");
        let message = StreamAccessLogsMessage::decode(message).expect("a message");
        if let Some(LogEntries::TcpLogs(entries)) = message.log_entries {
            for entry in entries.log_entry {
                let (common, bytes) =
                    (entry.common_properties.expect("one"), entry.connection_properties.expect("one"));
                kinds.push((common.access_log_type, bytes.received_bytes, bytes.sent_bytes));
            }
        }
    }
    // Each record is a message of its own; they may overtake each other.
    kinds.sort_unstable();
    let (connected, end) = (AccessLogType::TcpUpstreamConnected as i32, AccessLogType::TcpConnectionEnd as i32);
    let begin = AccessLogType::TcpConnectionStart as i32;
    assert_eq!(kinds, [(connected, 0, 0), (end, 46, answer.len() as u64), (begin, 0, 0)]);
    handle.shutdown();
}
