//! Clients that are broken, slow, many or hostile.

use std::time::Duration;

use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3::DiscoveryRequest;
use envoy_api::type_url;
use envoy_api::wkt::{Struct, Value, value::Kind};
use tonic::Code;

use crate::mesh::Mesh;
use crate::ports::{certificate, node, open};

fn first(type_url: &str) -> DiscoveryRequest {
    DiscoveryRequest { node: Some(node()), type_url: type_url.into(), ..DiscoveryRequest::default() }
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.1.1, ports: [{{name: http, port: 80}}]}}\n"
    )
}

#[tokio::test]
async fn malformed_nodes_are_refused_with_a_reason() {
    let mesh = Mesh::start().await;
    let with_id =
        |id: &str| DiscoveryRequest { node: Some(Node { id: id.into(), ..node() }), ..first(type_url::CLUSTER) };
    let huge = Value { kind: Some(Kind::StringValue("x".repeat(2 << 20))) };
    let huge = Struct { fields: [("LABELS".to_owned(), huge)].into() };
    let cases = [
        (DiscoveryRequest { node: None, ..first(type_url::CLUSTER) }, Code::InvalidArgument),
        (with_id(""), Code::InvalidArgument),
        (with_id("sidecar~~~"), Code::InvalidArgument),
        (with_id("nonsense"), Code::InvalidArgument),
        (with_id(&"~".repeat(100_000)), Code::InvalidArgument),
        (first(""), Code::InvalidArgument),
        (
            DiscoveryRequest { node: Some(Node { metadata: Some(huge), ..node() }), ..first(type_url::CLUSTER) },
            Code::ResourceExhausted,
        ),
    ];
    for (request, code) in cases {
        let id: String = request.node.iter().flat_map(|node| node.id.chars()).take(40).collect();
        let refused = open(mesh.plain_channel().await, None, request).await.err().expect("a refusal");
        assert_eq!(refused.code(), code, "{id:?}: {}", refused.message());
        assert!(!refused.message().is_empty());
    }
    // A request larger than any is cut off before it is read whole.
    let names = vec!["n".repeat(1 << 20); 20];
    let request = DiscoveryRequest { resource_names: names, ..first(type_url::ENDPOINT) };
    assert!(open(mesh.plain_channel().await, None, request).await.is_err());
}

#[tokio::test]
async fn unknown_types_and_wrong_nonces_do_no_harm() {
    let mesh = Mesh::start().await;
    let mut stream = open(mesh.plain_channel().await, None, first("type.googleapis.com/no.such.Type")).await.unwrap();
    assert!(stream.next().await.resources.is_empty());
    stream.requests.send(first(type_url::CLUSTER)).await.unwrap();
    let clusters = stream.next().await;
    for nonce in ["", "0", "99-99", "\u{1f980}"] {
        let wrong = DiscoveryRequest {
            response_nonce: nonce.into(),
            error_detail: Some(Default::default()),
            ..first(type_url::CLUSTER)
        };
        stream.requests.send(wrong).await.unwrap();
    }
    stream.answer(&clusters, None).await;
    mesh.apply(&service("late")).await;
    assert!(!stream.next().await.resources.is_empty(), "it is served as before");
}

#[tokio::test]
async fn too_many_types_end_a_stream_and_no_other() {
    let mesh = Mesh::start().await;
    let mut good = open(mesh.plain_channel().await, None, first(type_url::CLUSTER)).await.unwrap();
    good.next().await;
    let mut greedy = open(mesh.plain_channel().await, None, first("type.googleapis.com/t")).await.unwrap();
    let requests = greedy.requests.clone();
    tokio::spawn(async move {
        for number in 0..100 {
            // Fails once the stream is over.
            let _ = requests.send(first(&format!("type.googleapis.com/t{number}"))).await;
        }
    });
    let ended = loop {
        match greedy.responses.message().await {
            Ok(response) => assert!(response.is_some(), "the stream ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::InvalidArgument, "{ended:?}");
    mesh.apply(&service("late")).await;
    assert!(!good.next().await.resources.is_empty());
}

#[tokio::test]
async fn who_never_accepts_or_never_reads_holds_up_nobody() {
    let mesh = Mesh::start().await;
    // Accepts nothing: listeners wait for the clusters' acknowledgement for a moment only.
    let mut silent = open(mesh.plain_channel().await, None, first(type_url::CLUSTER)).await.unwrap();
    silent.requests.send(first(type_url::LISTENER)).await.unwrap();
    assert_eq!(silent.next().await.type_url, type_url::CLUSTER);
    assert_eq!(silent.next().await.type_url, type_url::LISTENER);
    // Reads nothing: its stream stands still, and snapshots pass by.
    let lazy = open(mesh.plain_channel().await, None, first(type_url::CLUSTER)).await.unwrap();
    let mut good = open(mesh.plain_channel().await, None, first(type_url::CLUSTER)).await.unwrap();
    let response = good.next().await;
    good.answer(&response, None).await;
    for number in 0..50 {
        mesh.apply(&service(&format!("s{number}"))).await;
        let response = good.next().await;
        good.answer(&response, None).await;
    }
    let laggards = mesh.handle.wait(51, Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(laggards.proxies.len(), 2, "{laggards}");
    drop(lazy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connect_at_once() {
    let mesh = Mesh::start().await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let channel = mesh.plain_channel().await;
        for _ in 0..50 {
            let channel = channel.clone();
            clients.spawn(async move {
                let mut stream = open(channel, None, first(type_url::CLUSTER)).await.unwrap();
                let response = tokio::time::timeout(Duration::from_secs(30), stream.responses.message()).await;
                let clusters = response.expect("a response in time").unwrap().unwrap();
                assert!(!clusters.resources.is_empty());
                stream
            });
        }
    }
    let streams = clients.join_all().await;
    assert_eq!(streams.len(), 1000);
    assert_eq!(mesh.handle.sync_status().len(), 1000);
    drop(streams);
    tokio::time::timeout(Duration::from_secs(10), async {
        while !mesh.handle.sync_status().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("who is gone is forgotten");
}

#[tokio::test]
async fn tokens_that_prove_nothing_get_nothing() {
    let mesh = Mesh::start().await;
    let token = |audience: &str, ttl: u64| {
        let request = ca::TokenRequest {
            namespace: "default".into(),
            service_account: "sleep".into(),
            audience: audience.into(),
            ttl: Duration::from_secs(ttl),
            ..ca::TokenRequest::default()
        };
        mesh.issuer.issue(&request).unwrap()
    };
    let good = token("istio-ca", 60);
    let (head, rest) = good.split_once('.').unwrap();
    let bad = ["x".into(), "a.b.c".into(), token("vault", 60), format!("{head}x.{rest}"), "y".repeat(100_000)];
    for token in bad {
        let short: String = token.chars().take(20).collect();
        // The longest does not even fit into a header, which the client learns only when it reads.
        if let Ok(mut stream) = open(mesh.tls_channel(None).await, Some(&token), first(type_url::CLUSTER)).await {
            assert!(stream.responses.message().await.is_err(), "{short}");
        }
        assert!(certificate(&mesh, mesh.tls_channel(None).await, Some(&token)).await.is_err(), "{short}");
    }
    assert!(open(mesh.tls_channel(None).await, Some(&good), first(type_url::CLUSTER)).await.is_ok());
}
