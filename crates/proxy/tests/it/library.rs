//! The proxy inside another process, as the agent runs it.

use crate::fixture::{bootstrap, connect, free_port};
use identity::{PrivateKey, WorkloadCertificate};
use rustls_pki_types::ServerName;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

/// A listener that answers everything with `body`, over TLS with the workload's certificate when `tls`.
pub(crate) fn answering(port: u16, body: &str, tls: bool) -> serde_json::Value {
    let mut chain = serde_json::json!({
        "filters": [{
            "name": "hcm",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "in",
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                    {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": body}}}
                ]}]},
                "http_filters": [{
                    "name": "router",
                    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
                }]
            }
        }]
    });
    if tls {
        let sds = serde_json::json!({"ads": {}, "resource_api_version": "V3"});
        chain["transport_socket"] = serde_json::json!({
            "name": "tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": true,
                "common_tls_context": {
                    "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": sds}],
                    "combined_validation_context": {
                        "default_validation_context": {"match_subject_alt_names": [{"prefix": "spiffe://cluster.local/"}]},
                        "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": sds}
                    }
                }
            }
        });
    }
    serde_json::json!({"static_resources": {"listeners": [{
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [chain]
    }]}})
}

pub(crate) async fn get<S: AsyncReadExt + AsyncWriteExt + Unpin>(stream: &mut S) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n").await.expect("the proxy reads");
    let mut answer = vec![0; 4096];
    let n = stream.read(&mut answer).await.expect("the proxy answers");
    String::from_utf8_lossy(&answer[..n]).into_owned()
}

#[tokio::test]
async fn starts_serves_counts_and_stops() {
    let port = free_port();
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let handle = proxy::start(bootstrap(&answering(port, "hello", false)), options).expect("it starts");
    assert_eq!(handle.ready(), Ok(()));
    let mut stream = connect(port).await;
    let answer = get(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("hello"), "{answer}");
    let stats = handle.stats_prometheus(true);
    assert!(stats.contains("envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix=\"in\"} 1"), "{stats}");
    assert_eq!(handle.connections(), 1);
    handle.shutdown();
    let mut rest = Vec::new();
    assert_eq!(stream.read_to_end(&mut rest).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback works");
    let port = taken.local_addr().expect("bound").port();
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let error = proxy::start(bootstrap(&answering(port, "x", false)), options).err().expect("refused").to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
}

pub(crate) struct Authority {
    cert: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let cert = params.self_signed(&key).expect("self-signed");
        Self { cert, issuer: rcgen::Issuer::new(params, key) }
    }

    pub(crate) fn workload(&self, account: &str) -> WorkloadCertificate {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
        let uri = format!("spiffe://cluster.local/ns/default/sa/{account}");
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().expect("ASCII"))];
        let cert = params.signed_by(&key, &self.issuer).expect("signed");
        let key = PrivateKey::from_pkcs8(key.serialize_der());
        WorkloadCertificate::new(vec![cert.der().clone()], key, vec![self.cert.der().clone()]).expect("a fitting pair")
    }
}

pub(crate) fn client(cert: &WorkloadCertificate) -> tokio_rustls::TlsConnector {
    client_with(cert, &[])
}

/// A client that offers these protocols.
pub(crate) fn client_with(cert: &WorkloadCertificate, alpn: &[&str]) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(cert.roots.iter().cloned());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_client_auth_cert(cert.chain.clone(), cert.key.der().clone_key())
        .expect("a client certificate");
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    tokio_rustls::TlsConnector::from(Arc::new(config))
}

/// The test looks at the certificate itself.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn a_rotated_certificate_is_used_and_open_connections_stay() {
    let authority = Authority::new();
    let port = free_port();
    let (sender, certificates) = watch::channel(None);
    let options = proxy::Options { concurrency: 1, certificates: Some(certificates), ..Default::default() };
    let handle = proxy::start(bootstrap(&answering(port, "secret", true)), options).expect("it starts");
    let name = || ServerName::try_from("server").expect("a name");
    let me = authority.workload("client");

    // Without a certificate yet, the listener is not in use.
    assert!(handle.ready().is_err());
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err());

    let first = authority.workload("first");
    sender.send_replace(Some(Arc::new(first.clone())));
    let mut old = loop {
        if let Ok(stream) = client(&me).connect(name(), connect(port).await).await {
            break stream;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert!(get(&mut old).await.ends_with("secret"));

    let second = authority.workload("second");
    sender.send_replace(Some(Arc::new(second.clone())));
    loop {
        let fresh = client(&me).connect(name(), connect(port).await).await.expect("still served");
        let seen = fresh.get_ref().1.peer_certificates().expect("a server certificate")[0].clone();
        if seen == second.chain[0] {
            break;
        }
        assert_eq!(seen, first.chain[0]);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(get(&mut old).await.ends_with("secret"), "the connection from before the rotation goes on");

    // A client of another authority is refused (in TLS 1.3 it finds out when it reads).
    let stranger = Authority::new().workload("client");
    if let Ok(mut stream) = client(&stranger).connect(name(), connect(port).await).await {
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n").await;
        let mut answer = Vec::new();
        assert!(stream.read_to_end(&mut answer).await.is_err() || answer.is_empty());
    }
    drop(handle);
}

/// Answers every request with 200 until the test ends.
pub(crate) async fn upstream() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback works");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buf = [0; 4096];
                while let Ok(1..) = stream.read(&mut buf).await {
                    if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn active_checks_take_a_dead_host_out() {
    let (port, good, dead) = (free_port(), upstream().await, free_port());
    let mut config = answering(port, "", false);
    let routes = &mut config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]
        ["virtual_hosts"][0]["routes"];
    *routes = serde_json::json!([{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]);
    let endpoint = |port: u16| serde_json::json!({"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}});
    config["static_resources"]["clusters"] = serde_json::json!([{
        "name": "c",
        "type": "STATIC",
        "connect_timeout": "1s",
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [{
            "timeout": "1s", "interval": "0.05s", "no_traffic_interval": "0.05s",
            "unhealthy_threshold": 1, "healthy_threshold": 1, "http_health_check": {"path": "/healthz"}
        }],
        "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [endpoint(good), endpoint(dead)]}]}
    }]);
    let options = proxy::Options { concurrency: 1, ..Default::default() };
    let handle = proxy::start(bootstrap(&config), options).expect("it starts");
    let wanted = "envoy_cluster_membership_healthy{envoy_cluster_name=\"c\"} 1";
    for _ in 0..200 {
        let stats = handle.stats_prometheus(false);
        if stats.contains(wanted) && stats.contains("envoy_cluster_health_check_failure{envoy_cluster_name=\"c\"}") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let mut stream = connect(port).await;
    for _ in 0..10 {
        let answer = get(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    }
}

#[tokio::test]
async fn the_admin_may_listen_on_a_path_and_says_where() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, said) = (folder.path().join("admin.sock"), folder.path().join("address"));
    let value = serde_json::json!({"admin": {"address": {"pipe": {"path": socket}}}});
    let options = proxy::Options { admin_address_path: Some(said.clone()), ..proxy::Options::default() };
    let _running = proxy::start(bootstrap(&value), options).expect("it starts");
    let mut stream = tokio::net::UnixStream::connect(&socket).await.expect("it listens");
    stream.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("open");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("LIVE\n"), "{answer}");
    assert_eq!(std::fs::read_to_string(said).expect("written"), socket.to_str().expect("text"));
}
