//! What each port answers, and to whom.

use std::sync::Arc;
use std::time::Duration;

use ca::{CertificateRequest, CertificateResponse};
use envoy_api::pb::envoy::config::cluster::v3::Cluster;
use envoy_api::pb::envoy::config::core::v3::Node;
use envoy_api::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_api::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use envoy_api::{Message, type_url};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::mesh::{Mesh, tls_stream};

/// One open state-of-the-world stream.
pub(crate) struct Stream {
    pub(crate) requests: mpsc::Sender<DiscoveryRequest>,
    pub(crate) responses: Streaming<DiscoveryResponse>,
}

pub(crate) fn node() -> Node {
    Node { id: "sidecar~10.0.0.9~sleep.default~default.svc.cluster.local".into(), ..Node::default() }
}

async fn subscribe(channel: Channel, token: Option<&str>, type_url: &str) -> Result<Stream, Status> {
    let first = DiscoveryRequest { node: Some(node()), type_url: type_url.into(), ..DiscoveryRequest::default() };
    open(channel, token, first).await
}

/// Opens a stream with any first request.
pub(crate) async fn open(channel: Channel, token: Option<&str>, first: DiscoveryRequest) -> Result<Stream, Status> {
    let (requests, receiver) = mpsc::channel(8);
    requests.send(first).await.unwrap();
    let mut request = Request::new(ReceiverStream::new(receiver));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let responses = client.stream_aggregated_resources(request).await?.into_inner();
    Ok(Stream { requests, responses })
}

impl Stream {
    pub(crate) async fn next(&mut self) -> DiscoveryResponse {
        let next = tokio::time::timeout(Duration::from_secs(5), self.responses.message());
        next.await.expect("a response in time").unwrap().expect("an open stream")
    }

    pub(crate) async fn answer(&self, response: &DiscoveryResponse, error: Option<&str>) {
        let request = DiscoveryRequest {
            type_url: response.type_url.clone(),
            version_info: response.version_info.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| envoy_api::pb::google::rpc::Status {
                code: 13,
                message: message.into(),
                ..Default::default()
            }),
            ..DiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }
}

fn cluster_names(response: &DiscoveryResponse) -> Vec<String> {
    response.resources.iter().map(|any| Cluster::decode(&*any.value).unwrap().name).collect()
}

const REVIEWS: &str = "outbound|9080||reviews.default.svc.cluster.local";

#[tokio::test]
async fn a_change_reaches_the_proxy_and_the_wait_ends_with_its_ack() {
    let mesh = Mesh::start().await;
    let mut stream = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.unwrap();
    let first = stream.next().await;
    assert!(cluster_names(&first).iter().any(|name| name == REVIEWS), "{:?}", cluster_names(&first));
    stream.answer(&first, None).await;
    assert!(mesh.handle.wait(1, Duration::from_secs(5)).await.is_ok());
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: late}\nspec: {clusterIP: 10.96.0.7, ports: [{name: http, port: 80}]}\n";
    let revision = mesh.apply(service).await;
    let second = stream.next().await;
    assert!(cluster_names(&second).iter().any(|name| name.contains("late.default")), "{:?}", cluster_names(&second));
    stream.answer(&second, Some("no thanks")).await;
    let laggards = mesh.handle.wait(revision, Duration::from_millis(300)).await.unwrap_err();
    assert!(laggards.to_string().contains("no thanks"), "{laggards}");
    let status = mesh.handle.sync_status().remove(0);
    assert_eq!((status.proxy.as_str(), status.identity), ("sleep.default", None));
}

#[tokio::test]
async fn nobody_is_served_before_the_configuration_is_loaded() {
    let mesh = Mesh::empty().await;
    let refused = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 503"));
    mesh.apply(crate::mesh::MESH).await;
    assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn the_secure_port_serves_only_whom_a_token_or_certificate_proves() {
    let mesh = Mesh::start().await;
    let code = |result: Result<Stream, Status>| result.err().map(|status| status.code());
    let none = subscribe(mesh.tls_channel(None).await, None, type_url::CLUSTER).await;
    assert_eq!(code(none), Some(Code::Unauthenticated));
    let forged = ca::TokenIssuer::generate().unwrap().issue(&ca::TokenRequest::default()).unwrap();
    let forged = subscribe(mesh.tls_channel(None).await, Some(&forged), type_url::CLUSTER).await;
    assert_eq!(code(forged), Some(Code::Unauthenticated));
    let mut served =
        subscribe(mesh.tls_channel(None).await, Some(&mesh.token("sleep")), type_url::CLUSTER).await.unwrap();
    assert!(!served.next().await.resources.is_empty());
}

/// Asks for a certificate and gives it with its key.
pub(crate) async fn certificate(
    mesh: &Mesh,
    channel: Channel,
    token: Option<&str>,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Status> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    // Whatever the request asks for, the certificate says who the caller is.
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://cluster.local/ns/x/sa/admin".try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let mut request = Request::new(CertificateRequest { csr, validity_duration: 3600 });
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<CertificateRequest, CertificateResponse>::default();
    let path = http::uri::PathAndQuery::from_static(ca::METHOD);
    let response = client.unary(request, path, codec).await?.into_inner();
    assert_eq!(response.cert_chain.last().map(String::as_str), Some(mesh.authority.root_pem()));
    let leaf = CertificateDer::from_pem_slice(response.cert_chain[0].as_bytes()).unwrap();
    Ok((vec![leaf], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))))
}

#[tokio::test]
async fn a_certificate_is_got_with_a_token_and_then_proves_the_same_identity() {
    let mesh = Mesh::start().await;
    let refused = certificate(&mesh, mesh.tls_channel(None).await, None).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let first = certificate(&mesh, mesh.tls_channel(None).await, Some(&mesh.token("sleep"))).await.unwrap();
    let channel = mesh.tls_channel(Some(first)).await;
    let mut stream = subscribe(channel.clone(), None, type_url::CLUSTER).await.unwrap();
    assert!(!stream.next().await.resources.is_empty());
    let status = mesh.handle.sync_status().remove(0);
    assert_eq!(status.identity.as_deref(), Some("spiffe://cluster.local/ns/default/sa/sleep"), "not what the CSR said");
    certificate(&mesh, channel, None).await.expect("renewal with the old certificate");
}

#[tokio::test]
async fn a_proxy_may_not_act_for_another_namespace() {
    let mesh = Mesh::start().await;
    let request = ca::TokenRequest {
        namespace: "other".into(),
        service_account: "sleep".into(),
        audience: "istio-ca".into(),
        ttl: Duration::from_secs(60),
        ..ca::TokenRequest::default()
    };
    let token = mesh.issuer.issue(&request).unwrap();
    let refused = subscribe(mesh.tls_channel(None).await, Some(&token), type_url::CLUSTER).await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

async fn get(mesh: &Mesh, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(mesh.monitoring).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn monitoring_shows_metrics_and_debug_pages() {
    let mesh = Mesh::start().await;
    let mut stream = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.unwrap();
    let first = stream.next().await;
    stream.answer(&first, None).await;
    mesh.handle.wait(1, Duration::from_secs(5)).await.unwrap();
    let metrics = get(&mesh, "/metrics").await;
    assert!(metrics.contains("pilot_xds_pushes{type=\"cds\"} 1"), "{metrics}");
    assert!(get(&mesh, "/debug/syncz").await.contains("\"cluster_acked\""));
    assert!(get(&mesh, "/debug/endpointz").await.contains("\"reviews.default.svc.cluster.local:http\""));
    assert!(get(&mesh, "/debug/endpointShardz").await.contains("\"Kubernetes/Kubernetes\""));
    assert!(get(&mesh, "/debug/registryz").await.contains("\"defaultAddress\": \"10.96.0.1\""));
    assert!(get(&mesh, "/debug/sidecarz?proxyID=sleep.default").await.contains("\"outboundTrafficPolicy\""));
    assert!(get(&mesh, "/debug/mesh").await.contains("\"trustDomain\": \"cluster.local\""));
    for page in ["adsz", "configz", "connections", "instancesz", "telemetryz", "authorizationz", "push_status", "list"]
    {
        assert!(get(&mesh, &format!("/debug/{page}")).await.starts_with("HTTP/1.1 200"), "{page}");
    }
    let dump = get(&mesh, "/debug/config_dump?proxyID=sleep.default").await;
    assert!(dump.contains("\"outbound|9080||reviews.default.svc.cluster.local\""), "{dump}");
    assert!(get(&mesh, "/debug/config_dump?proxyID=nobody").await.starts_with("HTTP/1.1 400"));
    assert!(get(&mesh, "/debug/ndsz?proxyID=sleep.default").await.contains("does not capture DNS"));
    assert!(get(&mesh, "/debug/nothing").await.starts_with("HTTP/1.1 404"));
}

async fn review(mesh: &Mesh, path: &str, body: &Value) -> Value {
    let config = Arc::new(mesh.client_config(None, &[b"http/1.1"]));
    let mut stream = tls_stream(mesh.webhook, config).await.unwrap();
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    serde_json::from_str(body).unwrap()
}

#[tokio::test]
async fn the_webhooks_inject_and_validate() {
    let mesh = Mesh::start().await;
    let request = |kind: &str, group: &str, object: Value| {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "1", "operation": "CREATE", "namespace": "default",
            "kind": {"group": group, "version": "v1", "kind": kind}, "object": object}})
    };
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let answer = review(&mesh, "/inject", &request("Pod", "", pod)).await;
    assert_eq!(answer["response"]["allowed"], true, "{answer}");
    assert!(answer["response"]["patch"].is_string(), "{answer}");
    let bad = json!({"apiVersion": "networking.istio.io/v1", "kind": "Sidecar", "metadata": {"name": "a"}, "spec": {"egress": 1}});
    let answer = review(&mesh, "/validate", &request("Sidecar", "networking.istio.io", bad)).await;
    assert_eq!(answer["response"]["allowed"], false);
}
