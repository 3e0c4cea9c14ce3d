//! TCP through the proxy: in requests, with PROXY headers, by names, with limits and a service that is asked.

use crate::fixture::{
    bootstrap, bound, cluster, connect, free_port, head, http_manager, http2, listener, start, tcp_proxy,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends back what comes, at once.
async fn mirror() -> u16 {
    let (listener, port) = bound().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // Either side may hang up.
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

/// Sends all and reads as much back.
async fn there_and_back(mut stream: TcpStream, sent: &[u8]) -> Vec<u8> {
    let (mut read, mut write) = stream.split();
    let mut answer = vec![0; sent.len()];
    let (wrote, got) = tokio::join!(write.write_all(sent), read.read_exact(&mut answer));
    wrote.expect("the proxy reads");
    got.expect("everything comes back");
    answer
}

/// Sends back what comes, with this in front, when the client has ended its side.
async fn echo(name: &'static str) -> u16 {
    let (listener, port) = bound().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = name.as_bytes().to_vec();
                if stream.read_to_end(&mut all).await.is_ok() {
                    let _ = stream.write_all(&all).await;
                }
            });
        }
    });
    port
}

/// Sends everything, ends its side and reads to the end.
async fn exchange(mut stream: TcpStream, sent: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    // A proxy that refuses may hang up before everything is sent.
    if stream.write_all(sent).await.is_ok() && stream.shutdown().await.is_ok() {
        let _ = stream.read_to_end(&mut answer).await;
    }
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_travel_in_requests() {
    let echo = mirror().await;
    let (h1, h2, post, end) = (free_port(), free_port(), free_port(), free_port());
    let tunnel = |post: bool| json!({"tunneling_config": {"hostname": "target.test:443", "use_post": post}});
    let terminating = http_manager(
        json!([{"match": {"connect_matcher": {}}, "route": {
            "cluster": "echo", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]
        }}]),
        json!({"upgrade_configs": [{"upgrade_type": "CONNECT"}], "http2_protocol_options": {"allow_connect": true}}),
    );
    let (proxy, proxy_port) = bound().await;
    let handle = start(
        json!([
            listener("h1", h1, json!({"filters": [tcp_proxy("end", tunnel(false))]})),
            listener("h2", h2, json!({"filters": [tcp_proxy("end2", tunnel(false))]})),
            listener("post", post, json!({"filters": [tcp_proxy("recorder", tunnel(true))]})),
            listener("end", end, json!({"filters": [terminating]})),
        ]),
        json!([
            cluster("end", &[end], json!({})),
            cluster("end2", &[end], http2()),
            cluster("recorder", &[proxy_port], json!({})),
            cluster("echo", &[echo], json!({})),
        ]),
    );
    let large: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    for port in [h1, h2] {
        assert_eq!(there_and_back(connect(port).await, b"hello").await, b"hello");
        assert!(there_and_back(connect(port).await, &large).await == large, "a large one");
    }

    // What a proxy of others sees.
    let mut client = connect(post).await;
    client.write_all(b"hello").await.expect("the proxy reads");
    let (mut stream, _) = proxy.accept().await.expect("a connection");
    let request = head(&mut stream).await;
    assert_eq!(request, "POST / HTTP/1.1\r\nhost: target.test:443\r\ntransfer-encoding: chunked\r\n\r\n");
    let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nworld\r\n0\r\n\r\n";
    stream.write_all(answer).await.expect("the proxy reads");
    let mut chunk = [0; 10];
    stream.read_exact(&mut chunk).await.expect("a chunk");
    assert_eq!(&chunk, b"5\r\nhello\r\n");
    let mut seen = Vec::new();
    client.read_to_end(&mut seen).await.expect("its end is passed on");
    assert_eq!(seen, b"world");
    client.shutdown().await.expect("still open");
    stream.read_exact(&mut chunk[..5]).await.expect("the last chunk");
    assert_eq!(&chunk[..5], b"0\r\n\r\n");

    // A proxy that refuses.
    let client = connect(post).await;
    let (mut stream, _) = proxy.accept().await.expect("a connection");
    head(&mut stream).await;
    stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").await.expect("the proxy reads");
    assert_eq!(exchange(client, b"").await, b"");
    let stats = handle.stats_prometheus(false);
    assert!(
        stats.contains("envoy_cluster_upstream_cx_connect_attempts_exceeded{envoy_cluster_name=\"recorder\"} 1"),
        "{stats}"
    );
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_get_proxy_headers() {
    let (upstream, upstream_port) = bound().await;
    let (tcp, http) = (free_port(), free_port());
    let wrapped = |version: &str| {
        json!({"transport_socket": {"name": "p", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport",
            "config": {"version": version},
            "transport_socket": {"name": "raw", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"
            }}
        }}})
    };
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "v1"}}]);
    let handle = start(
        json!([
            listener("tcp", tcp, json!({"filters": [tcp_proxy("v2", json!({}))]})),
            listener("http", http, json!({"filters": [http_manager(routes, json!({}))]})),
        ]),
        json!([cluster("v1", &[upstream_port], wrapped("V1")), cluster("v2", &[upstream_port], wrapped("V2"))]),
    );
    let mut client = connect(tcp).await;
    let port = client.local_addr().expect("connected").port();
    client.write_all(b"hello").await.expect("the proxy reads");
    let (mut stream, _) = upstream.accept().await.expect("a connection");
    let mut bytes = [0; 33];
    stream.read_exact(&mut bytes).await.expect("a header and the client's bytes");
    let ports = [port.to_be_bytes(), tcp.to_be_bytes()].concat();
    let header = [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01"[..], &ports, b"hello"].concat();
    assert_eq!(bytes, *header);

    let mut client = connect(http).await;
    let port = client.local_addr().expect("connected").port();
    client.write_all(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n").await.expect("the proxy reads");
    let (mut stream, _) = upstream.accept().await.expect("a connection");
    let request = head(&mut stream).await;
    let first = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {port} {http}\r\nGET / HTTP/1.1\r\n");
    assert!(request.starts_with(&first), "{request}");
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_stays_with_one_host() {
    let echoes = [echo("a").await, echo("b").await, echo("c").await];
    let port = free_port();
    let hash = json!({"hash_policy": [{"source_ip": {}}]});
    let handle = start(
        json!([listener("tcp", port, json!({"filters": [tcp_proxy("c", hash)]}))]),
        json!([cluster("c", &echoes, json!({"lb_policy": "RING_HASH"}))]),
    );
    let first = exchange(connect(port).await, b"").await;
    for _ in 0..20 {
        assert_eq!(exchange(connect(port).await, b"").await, first);
    }
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_clients_are_resolved() {
    let echo = echo("").await;
    let (http, upstream) = bound().await;
    let (port, plain) = (free_port(), free_port());
    let cache = json!({"name": "cache", "dns_lookup_family": "V4_ONLY"});
    let forward = json!({
        "name": "forward", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "1s",
        "cluster_type": {"name": "dfp", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
            "dns_cache_config": cache.clone()
        }}
    });
    let filters = json!([
        {"name": "dfp", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig",
            "dns_cache_config": cache.clone()
        }},
        {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}
    ]);
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "forward"}}]);
    let handle = start(
        json!([
            listener("http", port, json!({"filters": [http_manager(routes, json!({"http_filters": filters}))]})),
            listener("plain", plain, json!({"filters": [tcp_proxy("echo", json!({}))]})),
        ]),
        json!([forward, cluster("echo", &[echo], json!({}))]),
    );
    for name in ["localhost", "127.0.0.1"] {
        let mut client = connect(port).await;
        let request = format!("GET /x HTTP/1.1\r\nhost: {name}:{upstream}\r\nconnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.expect("the proxy reads");
        let (mut stream, _) = http.accept().await.expect("a connection");
        assert!(head(&mut stream).await.starts_with("GET /x HTTP/1.1\r\n"));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.expect("the proxy reads");
        assert_eq!(head(&mut client).await.lines().next(), Some("HTTP/1.1 200 OK"));
    }
    let mut client = connect(port).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: nothing.invalid\r\n\r\n").await.expect("the proxy reads");
    assert_eq!(head(&mut client).await.lines().next(), Some("HTTP/1.1 503 Service Unavailable"));
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn options_of_sockets_are_set() {
    let (upstream, upstream_port) = bound().await;
    let port = free_port();
    // SOL_SOCKET, SO_KEEPALIVE; IPPROTO_TCP, TCP_KEEPIDLE.
    let options = json!([
        {"level": 1, "name": 9, "int_value": 1, "state": "STATE_PREBIND"},
        {"level": 6, "name": 4, "int_value": 77, "state": "STATE_PREBIND"}
    ]);
    let mut tcp = listener("tcp", port, json!({"filters": [tcp_proxy("c", json!({}))]}));
    tcp["socket_options"] = options.clone();
    let bind = json!({"upstream_bind_config": {"socket_options": options}});
    let handle = start(json!([tcp]), json!([cluster("c", &[upstream_port], bind)]));
    let client = connect(port).await;
    let (_stream, from) = upstream.accept().await.expect("a connection");
    // Both of the proxy's connections have a timer, seen from their own side.
    let timers = |local: u16, remote: u16| {
        let table = std::fs::read_to_string("/proc/self/net/tcp").expect("Linux");
        let ends = format!("0100007F:{local:04X} 0100007F:{remote:04X} 01 ");
        let line = table.lines().find(|line| line.contains(&ends)).expect("an open connection").to_owned();
        let timer = line.split_whitespace().nth(5).expect("tr:tm->when").to_owned();
        timer.split(':').next().map(str::to_owned)
    };
    // 2: keep-alive.
    assert_eq!(timers(from.port(), upstream_port).as_deref(), Some("02"));
    let local = client.local_addr().expect("connected").port();
    assert_eq!(timers(port, local).as_deref(), Some("02"));
    handle.shutdown();

    let mut refused = listener("tcp", free_port(), json!({"filters": [tcp_proxy("c", json!({}))]}));
    refused["socket_options"] = json!([{"level": 6, "name": 9999, "int_value": 1}]);
    let config = json!({"static_resources": {"listeners": [refused], "clusters": [cluster("c", &[1], json!({}))]}});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let error = proxy::start(bootstrap(&config), options).err().expect("no such option").to_string();
    assert!(error.contains("cannot bind"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_connections_are_limited() {
    let (upstream, upstream_port) = bound().await;
    let port = free_port();
    let limit = json!({"name": "limit", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
        "stat_prefix": "l", "max_connections": 2
    }});
    let handle = start(
        json!([listener("tcp", port, json!({"filters": [limit, tcp_proxy("c", json!({}))]}))]),
        json!([cluster("c", &[upstream_port], json!({}))]),
    );
    let mut open = Vec::new();
    for _ in 0..2 {
        let client = connect(port).await;
        open.push((client, upstream.accept().await.expect("a connection").0));
    }
    assert_eq!(exchange(connect(port).await, b"third").await, b"");
    let (client, stream) = open.pop().expect("two are open");
    drop(stream);
    assert_eq!(exchange(client, b"").await, b"");
    // Its place is free once the proxy has seen both ends; until then others are refused.
    let mut accepted = std::pin::pin!(upstream.accept());
    let mut waiting = Vec::new();
    loop {
        waiting.push(connect(port).await);
        tokio::select! {
            accepted = &mut accepted => {
                assert!(accepted.is_ok());
                break;
            }
            () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {}
        }
    }
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_see_the_clients_address() {
    // Addresses of others need CAP_NET_ADMIN.
    let probe = std::process::Command::new("id").arg("-u").output().expect("id runs");
    if probe.stdout.trim_ascii() != b"0" {
        println!("SKIPPED: hosts_see_the_clients_address: not root");
        return;
    }
    let (upstream, upstream_port) = bound().await;
    let (tcp, http) = (free_port(), free_port());
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
    let mut listeners = json!([
        listener("tcp", tcp, json!({"filters": [tcp_proxy("c", json!({}))]})),
        listener("http", http, json!({"filters": [http_manager(routes, json!({}))]})),
    ]);
    for listener in listeners.as_array_mut().expect("a list") {
        listener["listener_filters"] = json!([{"name": "src", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc"
        }}]);
    }
    let handle = start(listeners, json!([cluster("c", &[upstream_port], json!({}))]));
    for port in [tcp, http] {
        connect(port).await;
    }
    for (port, ip) in [(tcp, "127.0.0.2"), (tcp, "127.0.0.3"), (http, "127.0.0.2"), (http, "127.0.0.3")] {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(format!("{ip}:0").parse().expect("an address")).expect("loopback has it");
        let mut client = socket.connect(([127, 0, 0, 1], port).into()).await.expect("the proxy listens");
        client.write_all(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n").await.expect("the proxy reads");
        // Connections that were only probes are passed on, too.
        let (mut stream, from) = loop {
            let (stream, from) = upstream.accept().await.expect("a connection");
            if from.ip() != std::net::Ipv4Addr::LOCALHOST {
                break (stream, from);
            }
        };
        assert_eq!(from.ip().to_string(), ip);
        head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.expect("the proxy reads");
        head(&mut client).await;
    }
    handle.shutdown();
}
