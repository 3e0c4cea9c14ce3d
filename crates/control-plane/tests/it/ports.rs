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
    let metrics = get(&mesh, "/metrics").await;
    assert_eq!(value(&metrics, "citadel_server_csr_count"), 3.0);
    assert_eq!(value(&metrics, "citadel_server_success_cert_issuance_count"), 2.0);
    let (root, chain) = mesh.authority.expiry();
    assert_eq!(root, chain, "the root itself signs");
    let at = root.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    for part in ["root_cert", "cert_chain"] {
        assert_eq!(value(&metrics, &format!("citadel_server_{part}_expiry_timestamp")), at, "{metrics}");
        assert!(value(&metrics, &format!("citadel_server_{part}_expiry_seconds")) > 0.0);
    }
    assert!(value(&metrics, "istiod_uptime_seconds") > 0.0);
    assert_eq!(value(&metrics, "istiod_managed_clusters{cluster_type=\"local\"}"), 1.0);
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
    assert!(get(&mesh, "/debug/config_dump?proxyID=nobody").await.starts_with("HTTP/1.1 404"));
    assert!(get(&mesh, "/debug/config_dump").await.starts_with("HTTP/1.1 400"));
    assert!(get(&mesh, "/debug/nothing").await.starts_with("HTTP/1.1 404"));
}

/// The JSON of a page.
async fn page(mesh: &Mesh, name: &str) -> Value {
    let answer = get(mesh, &format!("/debug/{name}")).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{name}: {answer}");
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{name}: {error}: {body}"))
}

#[tokio::test]
async fn debug_pages_have_istiods_shapes() {
    let mesh = Mesh::start().await;
    let mut stream = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.unwrap();
    let first = stream.next().await;
    stream.answer(&first, None).await;
    mesh.handle.wait(1, Duration::from_secs(5)).await.unwrap();
    let endpoints = page(&mesh, "edsz?proxyID=sleep.default").await;
    assert_eq!(endpoints["configs"][0]["@type"], type_url::ENDPOINT);
    assert_eq!(endpoints["configs"][0]["clusterName"], REVIEWS);
    assert_eq!(page(&mesh, "config_dump?proxyID=sleep.default&types=eds").await, endpoints);
    assert_eq!(page(&mesh, "ecdsz?proxyID=sleep.default").await, json!({"configs": []}));
    assert_eq!(page(&mesh, "ndsz?proxyID=sleep.default").await, json!({"configs": []}), "it does not capture DNS");
    assert_eq!(page(&mesh, "clusterz").await, json!([{"id": "Kubernetes", "secretName": "", "syncStatus": "synced"}]));
    assert_eq!(page(&mesh, "networkz").await, json!([]));
    let kinds = page(&mesh, "resourcesz").await;
    let sidecar = json!({"group": "networking.istio.io", "version": "v1", "kind": "Sidecar"});
    assert!(kinds.as_array().unwrap().contains(&sidecar), "{kinds}");
    assert_eq!(page(&mesh, "pushcontext").await["AuthorizationPolicies"]["root_namespace"], "istio-system");
    assert!(page(&mesh, "inject").await["sidecar"].as_str().unwrap().contains("istio-proxy"));
    let cached = page(&mesh, "cachez").await;
    assert!(cached[type_url::CLUSTER].as_array().unwrap().contains(&json!(REVIEWS)), "{cached}");
    let sizes = page(&mesh, "cachez?sizes=true").await;
    assert!(sizes["total"].as_str().unwrap().ends_with('B') && sizes[type_url::CLUSTER] != "0B", "{sizes}");
    assert!(get(&mesh, "/debug/cachez?clear=true").await.contains("Cache cleared"));
    assert_eq!(page(&mesh, "cachez").await, json!({}));
    let listed = page(&mesh, "list").await;
    assert!(listed.as_array().unwrap().contains(&json!("syncz")) && !listed.to_string().contains("list"), "{listed}");
    assert!(get(&mesh, "/debug").await.contains("<a href='/debug/syncz'>"));
    let (_, version) =
        get(&mesh, "/version").await.rsplit_once("\r\n").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    assert_eq!(version.split('-').count(), 3, "{version}: version, revision, status");
    let status = page(&mesh, "push_status").await;
    assert_eq!(status["pilot_no_ip"]["sleep.default"], json!({"proxy": "sleep.default"}), "{status}");
    assert!(get(&mesh, "/debug/force_disconnect?proxyID=nobody").await.starts_with("HTTP/1.1 404"));
    assert!(get(&mesh, "/debug/force_disconnect?proxyID=sleep.default").await.ends_with("OK"));
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.responses.message()).await.expect("an end");
    assert_eq!(ended.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn debug_pages_of_proxies_have_istiods_shapes() {
    let mesh = Mesh::start().await;
    let more = "
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: narrow, namespace: default, labels: {a: b}, annotations: {c: d}}
spec: {egress: [{hosts: [./reviews.default.svc.cluster.local]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: rule, namespace: default}
spec: {host: reviews, exportTo: ['.'], trafficPolicy: {loadBalancer: {simple: RANDOM}}}
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: filter, namespace: default}
spec: {workloadSelector: {labels: {app: nobody}}}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: wide, namespace: istio-system}
spec: {accessLogging: [{providers: [{name: envoy}]}]}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: own, namespace: default}
spec: {selector: {matchLabels: {app: sleep}}, tracing: [{randomSamplingPercentage: 5}]}
";
    let revision = mesh.apply(more).await;
    let names = vec![REVIEWS.to_owned()];
    let first = DiscoveryRequest {
        node: Some(node()),
        type_url: type_url::ENDPOINT.into(),
        resource_names: names,
        ..DiscoveryRequest::default()
    };
    let mut stream = open(mesh.plain_channel().await, None, first).await.unwrap();
    let response = stream.next().await;
    stream.answer(&response, Some("not so")).await;
    let refused = async {
        while page(&mesh, "syncz").await[0]["endpoint_nacked"].is_null() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), refused).await.expect("the refusal is heard");

    let row = page(&mesh, "syncz?namespace=default").await[0].clone();
    assert_eq!((&row["proxy"], &row["proxy_type"]), (&json!("sleep.default"), &json!("sidecar")), "{row}");
    let endpoints = &row["resources"][type_url::ENDPOINT];
    assert_eq!((&endpoints["sent"], &endpoints["lastError"]), (&row["endpoint_sent"], &json!("not so")), "{row}");
    assert!(endpoints["sentTime"].as_str().unwrap().ends_with('Z'), "{row}");
    assert_eq!(page(&mesh, "syncz?namespace=other").await, json!([]));

    // As istiod, a part of the connection's name is enough.
    let client = page(&mesh, "adsz?proxyID=sleep").await["clients"][0].clone();
    assert_eq!(client["watches"], json!({type_url::ENDPOINT: [REVIEWS]}), "{client}");
    assert!(client["connectionId"].as_str().unwrap().starts_with("sleep.default-"), "{client}");
    assert!(get(&mesh, "/debug/adsz?proxyID=other").await.starts_with("HTTP/1.1 404"));
    assert!(get(&mesh, "/debug/adsz?push=true").await.ends_with("Pushed to 1 servers\n"));

    let dump = page(&mesh, "config_dump?proxyID=sleep.default").await;
    let sections = |dump: &Value| -> Vec<String> {
        let types = dump["configs"].as_array().unwrap().iter().map(|section| section["@type"].as_str().unwrap());
        types.map(|name| name.trim_start_matches("type.googleapis.com/envoy.admin.v3.").to_owned()).collect()
    };
    let mut expected = vec!["Bootstrap", "Clusters", "Listeners", "ScopedRoutes", "Routes", "Secrets", "Ecds"];
    assert_eq!(sections(&dump), expected.iter().map(|name| format!("{name}ConfigDump")).collect::<Vec<_>>());
    let clusters = &dump["configs"][1];
    assert_eq!(clusters["versionInfo"], revision.to_string());
    assert_eq!(clusters["dynamicActiveClusters"][0]["cluster"]["@type"], type_url::CLUSTER);
    assert!(dump["configs"][2]["dynamicListeners"][0]["activeState"]["listener"]["name"].is_string());
    expected.insert(2, "Endpoints");
    let dump = page(&mesh, "config_dump?proxyID=sleep.default&include_eds").await;
    assert_eq!(sections(&dump), expected.iter().map(|name| format!("{name}ConfigDump")).collect::<Vec<_>>());

    let scope = page(&mesh, "sidecarz?proxyID=sleep.default").await;
    let host = "reviews.default.svc.cluster.local";
    assert_eq!(scope["name"], "narrow");
    assert_eq!(scope["egressListenerServices"][0][0]["hostname"], host, "{scope}");
    assert_eq!(scope["servicesByHostname"][host]["defaultAddress"], "10.96.0.1");
    let rule = &scope["destinationRules"][host][0];
    assert_eq!((&rule["exportTo"], &rule["rule"]["name"]), (&json!({".": {}}), &json!("rule")), "{rule}");
    assert_eq!(rule["rule"]["Spec"]["trafficPolicy"]["loadBalancer"]["simple"], "RANDOM", "{rule}");

    let service = page(&mesh, "registryz").await[0].clone();
    assert_eq!(service["Attributes"]["Type"], "ClusterIP", "{service}");
    assert_eq!(service["Attributes"]["LabelSelectors"], json!({"app": "reviews"}), "{service}");
    assert_eq!(service["ports"], json!([{"name": "http", "port": 9080, "protocol": "HTTP"}]), "{service}");
    let shards = page(&mesh, "endpointShardz").await;
    let endpoint = &shards[host]["default"]["Shards"]["Kubernetes/Kubernetes"][0];
    assert_eq!((&endpoint["Addresses"], &endpoint["HealthStatus"]), (&json!(["10.0.0.1"]), &json!(1)), "{shards}");
    assert_eq!(page(&mesh, "endpointz").await, shards);

    let configs = page(&mesh, "configz").await;
    let of = |kind: &str| configs.as_array().unwrap().iter().find(|config| config["kind"] == kind).unwrap();
    assert_eq!(of("EnvoyFilter")["apiVersion"], "networking.istio.io/v1alpha3");
    let metadata = &of("Sidecar")["metadata"];
    assert_eq!((&metadata["labels"], &metadata["annotations"]["c"]), (&json!({"a": "b"}), &json!("d")), "{metadata}");
    assert!(metadata["creationTimestamp"].is_string());

    let telemetry = page(&mesh, "telemetryz?proxyID=sleep.default").await;
    assert_eq!(telemetry["Root"], json!({"Namespace": "istio-system", "Name": "wide"}), "{telemetry}");
    assert_eq!(telemetry["Workload"]["Name"], "own");
    assert_eq!(telemetry["Logging"][0]["Logging"][0]["providers"][0]["name"], "envoy");
    assert_eq!(telemetry["Tracing"][0]["randomSamplingPercentage"], 5.0);
    let all = page(&mesh, "telemetryz").await;
    assert_eq!(all["telemetries"]["namespace_to_telemetries"]["default"][0]["name"], "own", "{all}");
}

#[tokio::test]
async fn debug_pages_come_over_xds_to_those_who_may_see_them() {
    let mesh = Mesh::start().await;
    let ask = async |namespace: &str, page: &str| {
        let id = format!("sidecar~10.0.0.8~asker.{namespace}~{namespace}.svc.cluster.local");
        let first = DiscoveryRequest {
            node: Some(Node { id, ..Node::default() }),
            type_url: "istio.io/debug".into(),
            resource_names: vec![page.to_owned()],
            ..DiscoveryRequest::default()
        };
        let token = mesh.token_in(namespace, "asker");
        let mut stream = open(mesh.tls_channel(None).await, Some(&token), first).await.unwrap();
        let mut pages = stream.next().await.resources;
        assert!(pages.iter().all(|any| any.type_url == "istio.io/debug"));
        pages.pop().map(|any| serde_json::from_slice::<Value>(&any.value).unwrap())
    };
    let rows = ask("istio-system", "syncz").await.expect("a page");
    assert_eq!(rows[0]["proxy"], "asker.istio-system");
    assert_eq!(ask("default", "syncz").await, None, "it shows the whole mesh");
    let own = ask("default", "edsz?proxyID=asker.default").await.expect("what it is sent itself");
    assert_eq!(own["configs"][0]["clusterName"], REVIEWS);
    let mut other = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.unwrap();
    other.next().await;
    assert!(ask("default", "config_dump?proxyID=sleep.default").await.is_some(), "a neighbour's");
    assert_eq!(ask("elsewhere", "config_dump?proxyID=sleep.default").await, None, "another namespace's");
}

/// The value of a series; 0 when there is none.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn metrics_say_what_changed_what_it_took_and_what_is_amiss() {
    let mesh = Mesh::start().await;
    let mut stream = subscribe(mesh.plain_channel().await, None, type_url::CLUSTER).await.unwrap();
    let first = stream.next().await;
    stream.answer(&first, None).await;
    mesh.handle.wait(1, Duration::from_secs(5)).await.unwrap();
    let before = get(&mesh, "/metrics").await;
    assert_eq!(value(&before, "pilot_proxy_convergence_time_count"), 0.0, "it waited for no change yet");
    assert_eq!(value(&before, "pilot_eds_no_instances"), 0.0);
    let pieces = "
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {clusterIP: 10.96.0.8, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: ghost-1, labels: {kubernetes.io/service-name: reviews}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.77], conditions: {ready: true}, targetRef: {kind: Pod, name: ghost, namespace: default}}]
ports: [{name: http, port: 9080}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: one}
spec: {host: reviews, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: two}
spec: {host: reviews, subsets: [{name: v1, labels: {version: v2}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: one}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: two}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dns}
spec: {hosts: [out.example], location: MESH_EXTERNAL, resolution: DNS, workloadSelector: {labels: {app: none}}, ports: [{number: 443, name: tls, protocol: TLS}]}
";
    let revision = mesh.apply(pieces).await;
    let second = stream.next().await;
    stream.answer(&second, None).await;
    mesh.handle.wait(revision, Duration::from_secs(5)).await.unwrap();
    // A nonce of before is told apart.
    stream.answer(&first, None).await;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: late}\nspec: {clusterIP: 10.96.0.7, ports: [{name: http, port: 80}]}\n";
    mesh.apply(service).await;
    stream.next().await;
    let bad = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: bad}\nspec: {hosts: []}\n";
    let documents = manifest::parse(std::path::Path::new("bad.yaml"), bad).unwrap();
    let updates = documents.into_iter().map(|document| control_plane::Update::Apply(Box::new(document))).collect();
    assert_eq!(mesh.handle.update(updates).await.1.len(), 1);
    let metrics = get(&mesh, "/metrics").await;
    for (series, expected) in [
        ("pilot_xds{version=\"\"}", 1.0),
        ("pilot_proxy_convergence_time_count", 1.0),
        ("pilot_proxy_queue_time_count", 2.0),
        ("pilot_debounce_time_count", 3.0),
        ("pilot_xds_push_time_count{type=\"cds\"}", 3.0),
        ("pilot_push_triggers{type=\"config\"}", 5.0),
        ("pilot_push_triggers{type=\"service\"}", 2.0),
        ("pilot_push_triggers{type=\"endpoint\"}", 1.0),
        ("pilot_inbound_updates{type=\"svc\"}", 3.0),
        ("pilot_inbound_updates{type=\"config\"}", 5.0),
        ("pilot_inbound_updates{type=\"eds\"}", 3.0),
        ("pilot_k8s_reg_events{type=\"Services\",event=\"add\"}", 3.0),
        ("pilot_k8s_reg_events{type=\"EndpointSlice\",event=\"add\"}", 2.0),
        ("pilot_k8s_cfg_events{type=\"VirtualService\",event=\"add\"}", 2.0),
        ("pilot_total_rejected_configs{type=\"VirtualService\",name=\"default/bad\"}", 1.0),
        ("pilot_xds_expired_nonce", 1.0),
        ("pilot_k8s_endpoints_with_no_pods", 1.0),
        // When it came, and when `empty` and then `late` did.
        ("pilot_k8s_proxies_with_no_service_targets{reason=\"no_matching_services\"}", 3.0),
        ("pilot_xds_send_time_count", 3.0),
        ("endpoint_no_pod", 1.0),
        ("pilot_k8s_endpoints_pending_pod", 1.0),
        ("pilot_destrule_subsets", 1.0),
        ("pilot_vservice_dup_domain", 1.0),
        ("pilot_no_ip", 1.0),
        // `empty`, `late`, and the subset `v1`, whose labels no endpoint has.
        ("pilot_eds_no_instances", 3.0),
        ("pilot_dns_cluster_without_endpoints", 1.0),
        ("pilot_duplicate_envoy_clusters", 0.0),
        ("pilot_conflict_inbound_listener", 0.0),
    ] {
        assert_eq!(value(&metrics, series), expected, "{series}\n{metrics}");
    }
    let size = format!("pilot_xds_config_size_bytes_count{{type=\"{}\"}}", type_url::CLUSTER);
    assert_eq!(value(&metrics, &size), 3.0, "{metrics}");
}

#[tokio::test]
async fn refusals_are_shown_by_proxy_and_code_and_are_not_taken_back() {
    let mesh = Mesh::start().await;
    for type_url in [type_url::CLUSTER, type_url::LISTENER] {
        let mut stream = subscribe(mesh.plain_channel().await, None, type_url).await.unwrap();
        let first = stream.next().await;
        stream.answer(&first, Some(&"no".repeat(1000))).await;
        stream.answer(&first, None).await;
        mesh.handle.wait(1, Duration::from_secs(5)).await.unwrap();
    }
    let metrics = get(&mesh, "/metrics").await;
    for name in ["pilot_xds_cds_reject", "pilot_xds_lds_reject"] {
        assert_eq!(value(&metrics, &format!("{name}{{err=\"Internal\",node=\"sleep.default\"}}")), 1.0, "{metrics}");
        assert!(metrics.contains(&format!("# TYPE {name} gauge")), "{metrics}");
    }
    assert!(!metrics.contains("pilot_xds_rds_reject"), "nobody refused routes");
    let largest = value(&metrics, "pilot_xds_recv_max");
    assert!((2000.0..3000.0).contains(&largest), "{largest}");
}

#[tokio::test]
async fn conflicts_of_ports_are_counted() {
    let mesh = Mesh::start().await;
    mesh.apply(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: a}
spec: {hosts: [a.example], addresses: [10.9.9.9], resolution: STATIC, endpoints: [{address: 1.1.1.1}], ports: [{number: 9000, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: b}
spec: {hosts: [b.example], addresses: [10.9.9.9], resolution: STATIC, endpoints: [{address: 1.1.1.2}], ports: [{number: 9000, name: tcp, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: mine-http}
spec: {clusterIP: 10.96.0.21, selector: {app: sleep}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: mine-tcp}
spec: {clusterIP: 10.96.0.22, selector: {app: sleep}, ports: [{name: tcp, port: 81, targetPort: 8080}]}
",
    )
    .await;
    let mut stream = subscribe(mesh.plain_channel().await, None, type_url::LISTENER).await.unwrap();
    stream.next().await;
    let status = page(&mesh, "push_status").await;
    let listener = &status["pilot_conflict_outbound_listener_tcp_over_current_tcp"]["10.9.9.9_9000"];
    assert_eq!(listener["message"], "Listener=10.9.9.9_9000 Accepted=TCP Rejected=TCP (b.example)", "{status}");
    let message = status["pilot_conflict_inbound_listener"]["sleep.default"]["message"].as_str().unwrap();
    assert!(message.starts_with("Conflicting inbound listener:8080. existing: mine-http."), "{message}");
    let metrics = get(&mesh, "/metrics").await;
    assert_eq!(value(&metrics, "pilot_conflict_outbound_listener_tcp_over_current_tcp"), 1.0);
    assert_eq!(value(&metrics, "pilot_conflict_inbound_listener"), 1.0);
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
