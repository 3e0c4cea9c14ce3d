//! Istio's proxies tell each other who they are: in headers, and in the first bytes of TCP streams.

use crate::fixture::{bootstrap, connect, free_port};
use crate::library::{Authority, client_with};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_api::wkt::value::Kind;
use envoy_api::wkt::{Struct, Value as Field};
use envoy_api::{Any, Message};
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

const NODE: &str = "sidecar~10.0.0.1~reviews-v1-1.default~default.svc.cluster.local";
const MAGIC: [u8; 4] = [0x3D, 0x23, 0x04, 0x67];

fn node() -> Value {
    json!({"id": NODE, "cluster": "reviews.default", "metadata": {
        "NAME": "reviews-v1-1", "NAMESPACE": "default", "WORKLOAD_NAME": "reviews-v1", "CLUSTER_ID": "Kubernetes",
        "LABELS": {"app": "reviews", "version": "v1", "service.istio.io/canonical-name": "reviews"}
    }})
}

/// What an Envoy of Istio's says of its workload.
fn card_of_envoy() -> Struct {
    let json = json!({
        "NAME": "productpage-1", "NAMESPACE": "shop", "WORKLOAD_NAME": "productpage-v1", "CLUSTER_ID": "other",
        "OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/productpage-v1",
        "LABELS": {"app": "productpage", "version": "v7", "service.istio.io/canonical-name": "page"}
    });
    let bytes = envoy_api::json::from_json("type.googleapis.com/google.protobuf.Struct", &json).expect("a struct");
    Struct::decode(&bytes[..]).expect("its own encoding")
}

fn text<'a>(card: &'a Struct, name: &str) -> &'a str {
    match card.fields.get(name).and_then(|f| f.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text,
        other => panic!("{name}: {other:?}"),
    }
}

/// Istio's filter as istiod sends it.
fn peer_metadata(fields: Value) -> Value {
    json!({"name": "istio.peer_metadata", "typed_config": {
        "@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
        "type_url": "type.googleapis.com/io.istio.http.peer_metadata.Config",
        "value": fields
    }})
}

fn http_listener(port: u16, direction: &str, cluster: &str, filter: Value) -> Value {
    json!({
        "name": direction, "traffic_direction": direction,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": direction,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}]},
            "http_filters": [filter, {"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]
        }}]}]
    })
}

fn static_cluster(name: &str, port: u16) -> Value {
    json!({"name": name, "type": "STATIC", "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}]}]}})
}

fn start(config: &Value) -> proxy::Handle {
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    proxy::start(bootstrap(config), options).expect("it starts")
}

/// Answers each request with its own head as the body, and with these headers.
async fn mirror(headers: String) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let headers = headers.clone();
            tokio::spawn(async move {
                let mut buf = [0; 8192];
                while let Ok(n @ 1..) = stream.read(&mut buf).await {
                    let head = format!("HTTP/1.1 200 OK\r\n{headers}content-length: {n}\r\n\r\n");
                    if stream.write_all(&[head.as_bytes(), &buf[..n]].concat()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// The head of the answer, and the request as the upstream saw it.
async fn exchange(port: u16, headers: &str) -> (String, String) {
    let mut stream = connect(port).await;
    let request = format!("GET / HTTP/1.1\r\nhost: t\r\n{headers}connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("the proxy reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("the proxy answers");
    let (head, seen) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), seen.to_owned())
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v))
}

fn card_in(head: &str) -> Struct {
    let value = header(head, "x-envoy-peer-metadata").expect("the header");
    Struct::decode(&STANDARD.decode(value).expect("padded base64")[..]).expect("a struct")
}

#[tokio::test]
async fn an_envoy_in_front_is_known_by_its_headers_and_told_who_answers() {
    let port = free_port();
    let filter = peer_metadata(json!({
        "downstream_discovery": [{"istio_headers": {}}, {"workload_discovery": {}}],
        "downstream_propagation": [{"istio_headers": {}}]
    }));
    let config = json!({"node": node(), "static_resources": {
        "listeners": [http_listener(port, "INBOUND", "app", filter)],
        "clusters": [static_cluster("app", mirror(String::new()).await)]
    }});
    let proxy = start(&config);
    let card = STANDARD.encode(card_of_envoy().encode_to_vec());
    let (head, seen) =
        exchange(port, &format!("x-envoy-peer-metadata: {card}\r\nx-envoy-peer-metadata-id: sidecar~1\r\n")).await;
    assert!(!seen.contains("x-envoy-peer-metadata"), "{seen}");
    assert_eq!(header(&head, "x-envoy-peer-metadata-id"), Some(NODE));
    assert_eq!(text(&card_in(&head), "WORKLOAD_NAME"), "reviews-v1");

    // Who says nothing is told nothing, and who talks nonsense is nobody.
    let (head, _) = exchange(port, "").await;
    assert!(header(&head, "x-envoy-peer-metadata").is_none(), "{head}");
    exchange(port, "x-envoy-peer-metadata: cmV2aWV3cy12MTtkZWZhdWx0\r\nx-envoy-peer-metadata-id: x\r\n").await;
    let stats = proxy.stats_prometheus(true);
    let count = |labels: &[&str]| {
        let mut series = stats.lines().filter(|l| l.starts_with("istio_requests_total{"));
        series.find(|l| labels.iter().all(|label| l.contains(label))).unwrap_or_else(|| panic!("{labels:?}: {stats}"))
    };
    let known = count(&["source_workload=\"productpage-v1\"", "source_workload_namespace=\"shop\""]);
    for label in [
        "source_app=\"productpage\"",
        "source_version=\"v7\"",
        "source_canonical_service=\"page\"",
        "source_cluster=\"other\"",
    ] {
        assert!(known.contains(label), "{known}");
    }
    assert!(known.ends_with(" 1"), "{known}");
    assert!(count(&["source_workload=\"unknown\"", "source_app=\"unknown\""]).ends_with(" 2"), "{stats}");
}

#[tokio::test]
async fn an_envoy_behind_is_told_and_believed() {
    let (port, outside, silent) = (free_port(), free_port(), free_port());
    let card = STANDARD.encode(card_of_envoy().encode_to_vec());
    let upstream = mirror(format!("x-envoy-peer-metadata: {card}\r\nx-envoy-peer-metadata-id: sidecar~2\r\n")).await;
    let filter = || {
        peer_metadata(json!({
            "upstream_discovery": [{"istio_headers": {}}, {"workload_discovery": {}}],
            "upstream_propagation": [{"istio_headers": {"skip_external_clusters": true}}, {"baggage": {}}],
            "additional_labels": ["version"]
        }))
    };
    let mut external = static_cluster("external", upstream);
    external["metadata"] = json!({"filter_metadata": {"istio": {"external": true}}});
    let nothing = peer_metadata(json!({"upstream_discovery": [{"workload_discovery": {}}]}));
    let mut listeners = vec![
        http_listener(port, "OUTBOUND", "peer", filter()),
        http_listener(outside, "OUTBOUND", "external", filter()),
        http_listener(silent, "OUTBOUND", "peer", nothing),
    ];
    for (i, listener) in listeners.iter_mut().enumerate() {
        listener["name"] = format!("out-{i}").into();
    }
    let clusters = [static_cluster("peer", upstream), external];
    let proxy = start(&json!({"node": node(), "static_resources": {"listeners": listeners, "clusters": clusters}}));
    let (head, seen) = exchange(port, "").await;
    assert!(!head.contains("x-envoy-peer-metadata"), "{head}");
    let told = card_in(&seen);
    assert_eq!((text(&told, "NAMESPACE"), text(&told, "NAME")), ("default", "reviews-v1-1"));
    assert_eq!(header(&seen, "x-envoy-peer-metadata-id"), Some(NODE));
    let baggage = header(&seen, "baggage").expect("baggage");
    assert!(baggage.starts_with("k8s.pod.name=reviews-v1,k8s.namespace.name=default,"), "{baggage}");
    let stats = proxy.stats_prometheus(true);
    let known = "destination_workload=\"productpage-v1\",destination_workload_namespace=\"shop\"";
    assert!(stats.contains(known), "{stats}");

    let (_, seen) = exchange(outside, "").await;
    assert!(header(&seen, "x-envoy-peer-metadata").is_none(), "{seen}");
    let (_, seen) = exchange(silent, "").await;
    assert!(header(&seen, "x-envoy-peer-metadata").is_none() && header(&seen, "baggage").is_none(), "{seen}");
}

/// TLS with the workload's certificate; `side`: downstream or upstream.
fn tls(side: &str) -> Value {
    let sds = json!({"ads": {}, "resource_api_version": "V3"});
    json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext"),
        "common_tls_context": {
            "alpn_protocols": ["istio-peer-exchange", "istio"],
            "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": sds}],
            "combined_validation_context": {
                "default_validation_context": {},
                "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": sds}
            }
        }
    }})
}

fn metadata_exchange() -> Value {
    json!({"name": "istio.metadata_exchange", "typed_config": {
        "@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
        "type_url": "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange",
        "value": {"protocol": "istio-peer-exchange", "enable_discovery": true}
    }})
}

fn tcp_listener(port: u16, direction: &str, cluster: &str) -> Value {
    let proxy = json!({"name": "tcp", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster, "cluster": cluster}});
    let mut chain = json!({"filters": [proxy.clone()]});
    if direction == "INBOUND" {
        chain = json!({"filters": [metadata_exchange(), proxy], "transport_socket": tls("Downstream")});
    }
    json!({"name": direction, "traffic_direction": direction, "filter_chains": [chain],
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}})
}

/// Sends a greeting, then everything back.
async fn greeter() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // Either side may hang up.
                if write.write_all(b"hello\n").await.is_ok() {
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                }
            });
        }
    });
    port
}

async fn two_sidecars() -> (proxy::Handle, Authority, u16, u16) {
    let (out, inbound) = (free_port(), free_port());
    let mut cluster = static_cluster("outbound", inbound);
    cluster["transport_socket"] = tls("Upstream");
    let mut filter = metadata_exchange();
    filter["name"] = "istio.metadata_exchange".into();
    cluster["filters"] = json!([filter]);
    let authority = Authority::new();
    let certificate = Some(Arc::new(authority.workload("reviews")));
    let options =
        proxy::Options { concurrency: 1, certificates: Some(watch::channel(certificate).1), ..Default::default() };
    let config = json!({"node": node(), "static_resources": {
        "listeners": [tcp_listener(out, "OUTBOUND", "outbound"), tcp_listener(inbound, "INBOUND", "app")],
        "clusters": [cluster, static_cluster("app", greeter().await)]
    }});
    (proxy::start(bootstrap(&config), options).expect("it starts"), authority, out, inbound)
}

async fn series(proxy: &proxy::Handle, labels: &[&str]) -> String {
    for _ in 0..1000 {
        let stats = proxy.stats_prometheus(true);
        let mut opened = stats.lines().filter(|l| l.starts_with("istio_tcp_connections_opened_total{"));
        if let Some(found) = opened.find(|l| labels.iter().all(|label| l.contains(label))) {
            return found.to_owned();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no series with {labels:?} in\n{}", proxy.stats_prometheus(true));
}

#[tokio::test]
async fn two_proxies_exchange_metadata_before_the_first_byte() {
    let (proxy, _authority, out, _) = two_sidecars().await;
    let mut stream = connect(out).await;
    let mut greeting = [0; 6];
    stream.read_exact(&mut greeting).await.expect("the server speaks first");
    assert_eq!(&greeting, b"hello\n");
    stream.write_all(b"there and back").await.expect("written");
    let mut back = [0; 14];
    stream.read_exact(&mut back).await.expect("it comes back");
    assert_eq!(&back, b"there and back");
    let me = "source_workload=\"reviews-v1\",";
    series(&proxy, &["reporter=\"destination\"", me, "source_version=\"v1\""]).await;
    series(&proxy, &["reporter=\"source\"", "destination_workload=\"reviews-v1\"", "destination_version=\"v1\""]).await;
}

/// Magic, length and `Any`, as Envoy's filter writes them.
fn frame() -> Vec<u8> {
    let card = Field { kind: Some(Kind::StructValue(card_of_envoy())) };
    let id = Field { kind: Some(Kind::StringValue("sidecar~1".to_owned())) };
    let fields = [("x-envoy-peer-metadata".to_owned(), card), ("x-envoy-peer-metadata-id".to_owned(), id)];
    let value = Struct { fields: fields.into() }.encode_to_vec();
    let any = Any { type_url: "type.googleapis.com/google.protobuf.Struct".to_owned(), value }.encode_to_vec();
    let length = u32::try_from(any.len()).expect("short").to_be_bytes();
    [&MAGIC[..], &length, &any].concat()
}

#[tokio::test]
async fn an_envoy_client_speaks_after_it_was_spoken_to() {
    let (proxy, authority, _, inbound) = two_sidecars().await;
    let connector = client_with(&authority.workload("page"), &["istio-peer-exchange", "istio"]);
    let name = ServerName::try_from("server").expect("a name");
    let mut stream = connector.connect(name, connect(inbound).await).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"istio-peer-exchange"[..]));
    let mut head = [0; 8];
    stream.read_exact(&mut head).await.expect("the server's frame comes by itself");
    assert_eq!(head[..4], MAGIC);
    let mut body = vec![0; u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize];
    stream.read_exact(&mut body).await.expect("all of it");
    let any = Any::decode(&body[..]).expect("an Any");
    let whole = Struct::decode(&any.value[..]).expect("a struct");
    assert_eq!(text(&whole, "x-envoy-peer-metadata-id"), NODE);
    // In pieces, and with the application's first bytes right behind.
    let own = frame();
    stream.write_all(&own[..20]).await.expect("written");
    stream.flush().await.expect("flushed");
    stream.write_all(&[&own[20..], b"data"].concat()).await.expect("written");
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"hello\ndata");
    series(&proxy, &["reporter=\"destination\"", "source_workload=\"productpage-v1\"", "source_app=\"productpage\""])
        .await;
}

#[tokio::test]
async fn a_client_that_agreed_but_does_not_say_is_served_all_the_same() {
    let (_proxy, authority, _, inbound) = two_sidecars().await;
    for protocols in [&["istio-peer-exchange"][..], &["istio"]] {
        let connector = client_with(&authority.workload("page"), protocols);
        let name = ServerName::try_from("server").expect("a name");
        let mut stream = connector.connect(name, connect(inbound).await).await.expect("a handshake");
        stream.write_all(b"plain data").await.expect("written");
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello\nplain data") {
            let mut buf = [0; 4096];
            let n = stream.read(&mut buf).await.expect("still open");
            assert_ne!(n, 0, "{}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buf[..n]);
        }
        assert_eq!(answer.starts_with(&MAGIC), protocols[0] == "istio-peer-exchange");
    }
}

#[tokio::test]
async fn ways_that_are_not_understood_are_refused_by_name() {
    let filter = peer_metadata(json!({"upstream_discovery": [{"upstream_filter_state": {"peer_metadata_key": "x"}}]}));
    let config = json!({"static_resources": {
        "listeners": [http_listener(free_port(), "OUTBOUND", "c", filter)], "clusters": [static_cluster("c", 1)]}});
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let error = proxy::start(bootstrap(&config), options).err().expect("refused").to_string();
    assert!(error.contains("upstream_discovery.[0].upstream_filter_state: is not supported"), "{error}");
}
