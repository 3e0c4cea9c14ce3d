//! Clients that cost more than they send: each ends like with Envoy, and the proxy keeps serving others.

use crate::fixture::{self, bootstrap, cluster, connect, free_port, http_manager, listener};
use serde_json::json;
use std::collections::HashSet;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// GET of the path with `:authority: a.test`; nothing of it goes into the table.
fn head(path: &str) -> Vec<u8> {
    [&b"\x82\x86\x01\x06a.test\x04"[..], &[path.len() as u8], path.as_bytes()].concat()
}

fn frame(kind: u8, flags: u8, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), body].concat()
}

fn times(count: usize, one: &[u8]) -> Vec<u8> {
    one.repeat(count)
}

/// Sends everything, or as much as is taken, and reads to the end. False: the connection stayed open.
async fn ends(port: u16, frames: &[u8]) -> bool {
    let mut stream = connect(port).await;
    let (mut read, mut write) = stream.split();
    let send = async {
        // The proxy may hang up at any time.
        let _ = write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let _ = write.write_all(&frame(SETTINGS, 0, 0, b"")).await;
        let _ = write.write_all(frames).await;
        // Whoever is still served gets an answer to this.
        let _ = write.write_all(&frame(PING, 0, 0, b"the last")).await;
    };
    let answered = async {
        let (mut seen, mut buf) = (Vec::new(), [0; 4096]);
        loop {
            match read.read(&mut buf).await {
                Ok(0) | Err(_) => return true,
                Ok(n) => seen.extend_from_slice(&buf[..n]),
            }
            if seen.windows(17).any(|w| w[3] == PING && w[4] == 1 && &w[9..] == b"the last") {
                return false;
            }
            // Only the end matters, and frames may be cut anywhere.
            seen.drain(..seen.len().saturating_sub(17));
        }
    };
    tokio::join!(send, answered).1
}

/// Accepts and never answers.
async fn silent() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    port
}

fn resident_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a size");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("kilobytes")
}

async fn start() -> (proxy::Handle, u16) {
    let (port, upstream) = (free_port(), silent().await);
    let routes = json!([
        {"match": {"path": "/silent"}, "route": {"cluster": "c", "timeout": "0s"}},
        {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "hello"}}}
    ]);
    let endpoint =
        json!({"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}}});
    let config = json!({"static_resources": {
        "listeners": [listener("in", port, json!({"filters": [http_manager(routes, json!({}))]}))],
        "clusters": [{"name": "c", "type": "STATIC", "connect_timeout": "1s", "load_assignment": {
            "cluster_name": "c", "endpoints": [{"lb_endpoints": [endpoint]}]
        }}]
    }});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let handle = proxy::start(bootstrap(&config), options).expect("it starts");
    connect(port).await;
    (handle, port)
}

async fn is_served(port: u16) -> bool {
    let mut stream: TcpStream = connect(port).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n").await.expect("the proxy reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("the proxy answers");
    answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("hello")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_frames_end_the_connection() {
    let (handle, port) = start().await;
    let get = frame(HEADERS, 5, 1, &head("/"));
    let post = frame(HEADERS, 4, 1, &head("/silent"));
    let open = frame(HEADERS, 0, 1, &head("/"));
    let reset = |path: &str| -> Vec<u8> {
        let pair =
            |stream| [frame(HEADERS, 5, stream, &head(path)), frame(RST_STREAM, 0, stream, b"\0\0\0\x08")].concat();
        (0..4000).flat_map(|n| pair(n * 2 + 1)).collect()
    };
    // A field of 4000 bytes goes into the table; each byte after it brings it back whole.
    let bomb = [&head("/")[..], b"\x40\x04bomb\x7f\xa1\x1e", &[b'b'; 4000]].concat();
    let references = [&head("/")[..], &[0xbe; 16_000]].concat();
    let hostile: [(&str, Vec<u8>); 10] = [
        ("rapid reset", reset("/silent")),
        ("settings", times(20_000, &frame(SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff"))),
        ("pings", times(20_000, &frame(PING, 0, 0, b"12345678"))),
        ("empty DATA", [&post[..], &times(2, &frame(DATA, 0, 1, b""))].concat()),
        ("empty CONTINUATION", [&open[..], &times(2000, &frame(CONTINUATION, 0, 1, b""))].concat()),
        ("CONTINUATION", [&open[..], &times(20_000, &frame(CONTINUATION, 0, 1, b"\0\x01a\x01b"))].concat()),
        ("PRIORITY", times(101, &frame(PRIORITY, 0, 1, b"\0\0\0\0\x10"))),
        ("DATA after the end", [&get[..], &times(2000, &frame(DATA, 0, 1, b"x"))].concat()),
        ("WINDOW_UPDATE", [&post[..], &times(8, &frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\x01"))].concat()),
        (
            "a header without end",
            frame(HEADERS, 0, 1, &head("/"))
                .into_iter()
                .chain(times(200, &frame(CONTINUATION, 0, 1, &[b'a'; 16_000])))
                .collect(),
        ),
    ];
    let before = resident_kilobytes();
    for (name, frames) in &hostile {
        assert!(ends(port, frames).await, "{name}");
        assert!(is_served(port).await, "after {name}");
    }
    // As in Envoy, this costs only its stream.
    let bomb = [frame(HEADERS, 5, 1, &bomb), frame(HEADERS, 5, 3, &references)].concat();
    assert!(!ends(port, &bomb).await, "HPACK bomb");
    assert!(is_served(port).await, "after the HPACK bomb");
    // Together they sent some megabytes and asked for gigabytes.
    let grown = resident_kilobytes().saturating_sub(before);
    assert!(grown < 64 * 1024, "{grown} KB more");

    // Who reads no answers is not read from for long: nothing piles up.
    for asks in [
        (0..100_000).flat_map(|n| frame(HEADERS, 5, n * 2 + 1, &head("/"))).collect::<Vec<u8>>(),
        (0..200).flat_map(|_| times(900, &frame(PING, 0, 0, b"12345678"))).collect(),
    ] {
        let before = resident_kilobytes();
        let mut stream = connect(port).await;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("the proxy reads");
        stream.write_all(&frame(SETTINGS, 0, 0, b"")).await.expect("the proxy reads");
        for part in asks.chunks(900 * 17).cycle().take(4 * asks.len() / (900 * 17)) {
            let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), stream.write_all(part)).await else { break };
        }
        let grown = resident_kilobytes().saturating_sub(before);
        assert!(grown < 32 * 1024, "{grown} KB more");
        assert!(is_served(port).await);
    }

    // What well-behaved clients do.
    let fine: [(&str, Vec<u8>); 4] = [
        ("some pings", times(500, &frame(PING, 0, 0, b"12345678"))),
        ("one empty DATA", [&post[..], &frame(DATA, 0, 1, b""), &frame(DATA, 1, 1, b"x")].concat()),
        ("priorities", [&get[..], &times(100, &frame(PRIORITY, 0, 1, b"\0\0\0\0\x10"))].concat()),
        ("frames of the future", times(1000, &frame(0x55, 0, 0, &[b'x'; 100]))),
    ];
    for (name, frames) in &fine {
        assert!(!ends(port, frames).await, "{name}");
    }
    handle.shutdown();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_silent_clients_do_not_keep_others_waiting() {
    let (handle, port) = start().await;
    let mut held = Vec::new();
    for n in 0..300 {
        let mut stream = connect(port).await;
        let part: &[u8] = match n % 3 {
            0 => b"",
            1 => b"GET / HTTP/1.1\r\nhost: t\r\nx-a: ",
            _ => b"POST / HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\nsome",
        };
        stream.write_all(part).await.expect("the proxy reads");
        held.push(stream);
    }
    for _ in 0..20 {
        assert!(is_served(port).await);
    }
    drop(held);
    handle.shutdown();
}

/// `x-envoy-upstream-alt-stat-name` of an internal client makes statistics, so many and no more.
#[tokio::test]
async fn requests_give_only_so_many_names_to_statistics() {
    // With `.internal` after it each name counts twice.
    const MOST: usize = 500;
    let (port, up) = (free_port(), crate::library::upstream().await);
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
    let internal = json!({
        "use_remote_address": true,
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]}
    });
    let chain = json!({"filters": [http_manager(routes, internal)]});
    let handle = fixture::start(json!([listener("in", port, chain)]), json!([cluster("c", &[up], json!({}))]));
    let mut stream = connect(port).await;
    let too_long = "n".repeat(257);
    for name in std::iter::once(too_long.clone()).chain((0..MOST + 50).map(|n| format!("alt{n}"))) {
        let request = format!("GET / HTTP/1.1\r\nhost: t\r\nx-envoy-upstream-alt-stat-name: {name}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("the proxy reads");
        assert!(fixture::head(&mut stream).await.starts_with("HTTP/1.1 200 OK"));
        assert_eq!(stream.read_u16().await.expect("the body"), u16::from_be_bytes(*b"ok"));
    }
    let stats = handle.stats_prometheus(true);
    let made: HashSet<_> =
        stats.lines().filter_map(|line| Some(line.split_once("envoy_cluster_alt")?.1.split('_').next())).collect();
    assert_eq!(made.len(), MOST);
    assert!(!stats.contains(&too_long));
    handle.shutdown();
}
